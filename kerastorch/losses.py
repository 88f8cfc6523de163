"""Names of losses: a string, callable, module or dict of these -> `loss(output, target, weight)`.

Decided here: which torch function a name stands for, and what a loss is the mean of; which shapes and values belong
together is in `targets.py`. The mean is torch's own: over samples, or over the targets that are not `ignore_index`.
With weights it is `sum(weight * loss) / n`, as in Keras (`reduction="sum_over_batch_size"`).
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .targets import Layout, align_classes, check_classes, check_values, come_from_a_sigmoid, sum_to_one


def _log_cosh(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    error = output - target  # log(cosh(e)) without the overflow of cosh
    return _reduce(error + F.softplus(-2.0 * error) - 0.6931471805599453, reduction)


def _hinge(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    # Labels of 0 and 1 stand for -1 and 1. Decided on the device: an `if` here would make the host wait.
    is_binary = ((target == 0) | (target == 1)).all()
    return _reduce(F.relu(1.0 - torch.where(is_binary, 2.0 * target - 1.0, target) * output), reduction)


def _squared_hinge(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return _reduce(_hinge(output, target, "none").square(), reduction)


def _mape(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return _reduce(100.0 * ((target - output) / target.abs().clamp_min(1e-7)).abs(), reduction)


def _msle(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    logs = (tensor.clamp_min(1e-7).log1p() for tensor in (output, target))
    return F.mse_loss(*logs, reduction=reduction)


def _cosine_similarity(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return _reduce(-F.cosine_similarity(output, target, dim=-1), reduction)


def _kl_divergence(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return _reduce(F.kl_div(output.log_softmax(-1), target, reduction="none").sum(-1), reduction)


def _poisson(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return F.poisson_nll_loss(output, target, log_input=False, eps=1e-7, reduction=reduction)


def _multilabel_margin(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return F.multilabel_margin_loss(output, target.long(), reduction=reduction)  # indices, ended by a -1


def _reduce(values: Tensor, reduction: str) -> Tensor:
    return values.mean() if reduction == "mean" else values


CLASSES, VALUES = "class indices or probabilities", "values of the output's shape"

# Name -> (function, what its targets are). Names are torch's without "_loss"; Keras's stand below them.
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "cross_entropy": (F.cross_entropy, CLASSES),
    "nll": (F.nll_loss, CLASSES),
    "multi_margin": (F.multi_margin_loss, CLASSES),
    "mse": (F.mse_loss, VALUES),
    "l1": (F.l1_loss, VALUES),
    "smooth_l1": (F.smooth_l1_loss, VALUES),
    "huber": (F.huber_loss, VALUES),
    "bce_with_logits": (F.binary_cross_entropy_with_logits, VALUES),
    "bce": (F.binary_cross_entropy, VALUES),
    "poisson_nll": (F.poisson_nll_loss, VALUES),
    "kl_div": (F.kl_div, VALUES),
    "soft_margin": (F.soft_margin_loss, VALUES),
    "hinge_embedding": (F.hinge_embedding_loss, VALUES),
    "multilabel_margin": (_multilabel_margin, VALUES),
    "multilabel_soft_margin": (F.multilabel_soft_margin_loss, VALUES),
    # Keras's own, with Keras's formulas: https://keras.io/api/losses
    "kl_divergence": (_kl_divergence, VALUES),
    "poisson": (_poisson, VALUES),
    "log_cosh": (_log_cosh, VALUES),
    "hinge": (_hinge, VALUES),
    "squared_hinge": (_squared_hinge, VALUES),
    "mean_absolute_percentage_error": (_mape, VALUES),
    "mean_squared_logarithmic_error": (_msle, VALUES),
    "cosine_similarity": (_cosine_similarity, VALUES),
}

ALIASES = {
    "sparse_categorical_crossentropy": "cross_entropy",
    "categorical_crossentropy": "cross_entropy",
    "crossentropy": "cross_entropy",
    "binary_crossentropy": "bce_with_logits",
    "binary_cross_entropy_with_logits": "bce_with_logits",
    "bcewithlogits": "bce_with_logits",
    "binary_cross_entropy": "bce",
    "mean_squared_error": "mse",
    "mean_absolute_error": "l1",
    "mae": "l1",
    "negative_log_likelihood": "nll",
    "kld": "kl_divergence",
    "logcosh": "log_cosh",
    "mape": "mean_absolute_percentage_error",
    "msle": "mean_squared_logarithmic_error",
}

# torch's loss modules by what their targets are; any other module is called as it is.
CLASS_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)
VALUE_MODULES = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCEWithLogitsLoss,
    nn.BCELoss,
    nn.PoissonNLLLoss,
)

LOGIT_FUNCTIONS = (F.cross_entropy, F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss)
LOGIT_MODULES = (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)
# Losses of margins: no logits, but their sign decides too.
MARGIN_FUNCTIONS = (_hinge, _squared_hinge, F.soft_margin_loss, F.multilabel_margin_loss)


MEAN = 1  # of the reductions in torch's graphs


class Share(NamedTuple):
    """A mean loss and what it is the mean over, which is how much it counts beside those of other batches.

    Attributes:
        name: Shares of one name, any hashable, are means over the same: samples, say, or one output's unmasked targets.
        loss: The mean, with a graph.
        count: How many it is the mean over: an int, or a tensor on the device; `None` = it is a sum.
        most: `count` if nothing is masked.
    """

    name: Any
    loss: Tensor
    count: int | Tensor | None
    most: int


class Loss:
    """One loss on one output.

    Attributes:
        name: How messages call it.
        targets: `CLASSES`, `VALUES`, or `None` where nothing is known of a user's own function.
        ignore_index: Class index whose targets do not count, or `None` where the loss knows no such thing.
        class_weights: What torch's own `weight=` multiplies each class's losses with, shape (classes,); `None` = 1.
        is_sum: Whether it is a sum, not a mean.
        on_logits: Whether the output is expected to be logits, not probabilities.
        threshold: Above which a single output says yes: 0 for logits and margins, else 0.5.
        layout: Where the output's classes are.
        is_gathered: Whether `shares` will be asked for after each call.
    """

    def __init__(self, function: Callable[..., Tensor], name: str, targets: str | None = None) -> None:
        self.function, self.name, self.targets = function, name, targets
        bare = function.func if isinstance(function, functools.partial) else function
        options = function.keywords if isinstance(function, functools.partial) else getattr(function, "__dict__", {})
        has_classes = bare in (F.cross_entropy, F.nll_loss) or isinstance(bare, (nn.CrossEntropyLoss, nn.NLLLoss))
        self.ignore_index: int | None = options.get("ignore_index", -100) if has_classes else None
        is_mean = options.get("reduction", "mean") == "mean"
        self._class_weights = options.get("weight") if has_classes and is_mean else None
        self.is_sum = options.get("reduction") == "sum"
        self.on_logits = bare in LOGIT_FUNCTIONS or isinstance(bare, LOGIT_MODULES)
        is_known = targets is not None and not self.on_logits and bare not in MARGIN_FUNCTIONS
        self.threshold = 0.5 if is_known else 0.0
        self.is_unchecked, self._known_targets, self.has_warned = True, (), False
        self._unseen_targets: tuple[Tensor, ...] = ()  # in which no masks were looked for
        self._may_be_masked, self.layout, self.is_gathered = True, Layout(), False
        self.unreduce()

    def unreduce(self) -> None:
        """Makes the module that returns a loss for each sample; again where the module has been replaced."""
        self._unreduced: nn.Module | None = None
        if isinstance(self.function, nn.Module) and hasattr(self.function, "reduction"):
            self._unreduced = copy.copy(self.function)  # which shares its tensors
            self._unreduced.reduction = "none"

    @property
    def class_weights(self) -> Tensor | None:
        # Asked of the module each time: it may have been moved to another device.
        if isinstance(self.function, (nn.CrossEntropyLoss, nn.NLLLoss)):
            return self.function.weight if self.function.reduction == "mean" else None
        return self._class_weights

    def expect(self, *targets: Tensor | None, beside: bool = False) -> None:
        """Checks again at the next call, on it and on all `targets`, those of the whole run where they are known.

        With `beside`, what was found in the targets of the run that goes on stays in mind.
        """
        self.is_unchecked, self._known_targets = True, tuple(known for known in targets if known is not None)
        self._unseen_targets = self._known_targets
        may_be_masked = not targets or len(self._known_targets) < len(targets)
        self._may_be_masked = may_be_masked or (beside and self._may_be_masked)

    def __call__(self, output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """The mean loss, a scalar.

        Args:
            output: What the module returned, shape (samples, ...).
            target: Class indices or values, shape (samples, ...).
            weight: Weight of each sample, shape (samples,), or of each value of the loss; `None` = 1.
        """
        if self.is_unchecked:
            self._check_first(output, target)
        if self.targets is CLASSES:
            output, target = align_classes(output, target, self.layout)
        elif self.targets is VALUES and target.dtype != output.dtype:
            target = target.to(output.dtype)
        if weight is None:
            loss = self.function(output, target)
            return loss if loss.ndim == 0 else self._mean(loss, output, target)
        return self._weighted_mean(output, target, weight)

    def _weighted_mean(self, output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        losses = self._per_sample(output, target)
        if weight.ndim > losses.ndim:
            weight = weight.reshape(losses.shape)
        else:  # several values a sample: each has the sample's weight
            weight = weight.reshape(weight.shape + (1,) * (losses.ndim - weight.ndim))
        return self._mean(losses * weight, output, target)

    def _mean(self, losses: Tensor, output: Tensor, target: Tensor) -> Tensor:
        if self.is_sum:
            return losses.sum()
        units = self.units(target[None])[0] if self.masks(output, target) else losses.numel()
        return losses.sum() / units

    def _per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        if self._unreduced is not None:
            losses = self._unreduced(output, target)
        elif self.targets is not None:
            losses = self.function(output, target, reduction="none")
        else:
            losses = self.function(output, target)
        if losses.ndim == 0:
            raise ValueError(
                f"sample_weight and class_weight need a loss for each sample, but {self.name!r} returned one number. "
                f"Return a tensor of shape ({len(output)},) instead of its mean."
            )
        return losses

    def masks(self, output: Any, target: Any) -> bool:
        """Whether some of `target` may be ignored, so that the loss is a mean over the targets that are not.

        Targets of the output's shape are probabilities, of which none is.
        """
        return self.ignore_index is not None and output.shape != target.shape

    def units(self, targets: Tensor) -> Tensor:
        """How many targets of each batch are not ignored: shape (batches, samples, ...) -> (batches,).

        With torch's own class weights, of which its mean is a weighted one, each counts as its class weighs.
        """
        is_counted = targets != self.ignore_index
        if (weights := self.class_weights) is not None:
            is_counted = weights[torch.where(is_counted, targets, 0).long()] * is_counted
        return is_counted.flatten(1).sum(1)

    def counted(self, output: Tensor, target: Tensor) -> Tensor:
        """For each loss that the mean is over whether it counts: shape (samples, ...)."""
        if not self.masks(output, target):
            return torch.ones(len(output), dtype=torch.bool, device=output.device)
        return target != self.ignore_index

    def shares(self, loss: Tensor, output: Any, batch: tuple[Any, Any, Any], samples: int) -> list[Share]:
        """What `loss`, just computed from `output` and the batch `(x, target, weight)`, is the mean over."""
        return [Share("", loss, *self.count(output, batch[1], samples))]

    def count(self, output: Any, target: Any, samples: int) -> tuple[int | Tensor | None, int]:
        """`count` and `most` of a `Share`."""
        if self.is_sum:
            return None, 1
        if not self.masks(output, target):
            return samples, samples
        if self._may_be_masked or self.class_weights is not None:
            return self.units(target[None])[0], target.numel()
        return target.numel(), target.numel()

    def counts(self, output: Any, target: Any, samples: int) -> dict[Any, int | Tensor | None]:
        """Name of a share -> its count, before the loss is computed; of the output the shape is enough."""
        self._look_for_masks()
        return {"": self.count(output, target, samples)[0]}

    def _look_for_masks(self) -> None:
        known, self._unseen_targets = self._unseen_targets, ()
        if self.ignore_index is not None:
            self._may_be_masked = self._may_be_masked or any(bool((all_ == self.ignore_index).any()) for all_ in known)

    def _check_first(self, output: Any, target: Any) -> None:
        self._look_for_masks()
        known, self._known_targets, self.is_unchecked = self._known_targets, (), False
        if target is None:
            raise ValueError(
                f"the data has no targets, but loss={self.name!r} needs them. Give y, let batches be (x, y), or name "
                f"the target's column: y='label'."
            )
        if self.targets is None:
            return
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the module returned a {type(output).__name__}, but loss={self.name!r} takes one tensor. "
                f"Give a loss for each output, as a dict or list like the output."
            )
        if not isinstance(target, Tensor):
            raise ValueError(f"the target is a {type(target).__name__}, but loss={self.name!r} takes one tensor.")
        if self.targets is CLASSES:
            # Cross entropy alone, of the losses on classes, takes probabilities too.
            check_classes(output, target, known or (target,), self.name, self.layout, self.ignore_index, self.on_logits)
        else:
            check_values(output, target, self.name)
        look_like_probabilities = sum_to_one if self.targets is CLASSES else come_from_a_sigmoid
        if self.on_logits and not self.has_warned and look_like_probabilities(output):
            self.warn_of_probabilities("the outputs look like probabilities")

    def warn_of_probabilities(self, finding: str) -> None:
        """Says once that the loss expects logits."""
        self.has_warned = True
        warnings.warn(
            f"{finding}, but loss={self.name!r} expects logits and would squash them twice: training will be slow and "
            f"weak. Remove the final Softmax or Sigmoid.",
            stacklevel=2,
        )


class SumOfLosses:
    """The weighted sum of a loss for each of several outputs.

    Attributes:
        parts: Name of the output -> its loss.
        weights: Name of the output -> factor in the sum.
        keys: Name of the output -> where it is found in outputs and targets: a key of a dict, an index of a tuple.
        latest: Name of the output -> its mean loss in the last call, not weighted against the others.
        is_gathered: Whether `shares` will be asked for after each call.
    """

    def __init__(self, parts: dict[str, Loss], weights: dict[str, float], keys: dict[str, Any]) -> None:
        self.parts, self.weights, self.keys = parts, weights, keys
        self.latest: dict[str, Tensor] = {}
        self.is_gathered, self._terms = False, {}

    @property
    def is_unchecked(self) -> bool:
        return any(loss.is_unchecked for loss in self.parts.values())

    def expect(self, *targets: Any, beside: bool = False) -> None:
        for name, loss in self.parts.items():
            known = (None if one is None else _part(one, self.keys[name], "targets") for one in targets)
            loss.expect(*known, beside=beside)

    def __call__(self, output: Any, target: Any, weight: Any = None) -> Tensor:
        """The weighted sum, a scalar; `latest` has the parts."""
        losses = {
            name: loss(
                _part(output, self.keys[name], "outputs"),
                _part(target, self.keys[name], "targets"),
                _part(weight, self.keys[name], "sample weights")
                if isinstance(weight, (Mapping, tuple, list))
                else weight,
            )
            for name, loss in self.parts.items()
        }
        self.latest = {name: loss.detach() for name, loss in losses.items()}
        self._terms = losses if self.is_gathered else {}  # a graph must not outlive its step
        return sum(loss * self.weights[name] for name, loss in losses.items())

    def shares(self, loss: Tensor, output: Any, batch: tuple[Any, Any, Any], samples: int) -> list[Share]:
        """What `loss`, just computed, is the sum of: means over the samples in one, each other mean for itself."""
        found: dict[tuple[str, str], Share] = {}
        for name, part in self.parts.items():
            key = self.keys[name]
            count, most = part.count(_part(output, key, "outputs"), _part(batch[1], key, "targets"), samples)
            share = _kind_of(count, samples, name)
            weighted = self._terms.pop(name) * self.weights[name]
            before = found.get(share)
            found[share] = Share(share, weighted if before is None else before.loss + weighted, count, most)
        return [*found.values()]

    def counts(self, output: Any, target: Any, samples: int) -> dict[Any, int | Tensor | None]:
        """Name of a share -> its count, before the losses are computed."""
        found: dict[tuple[str, str], int | Tensor | None] = {}
        for name, part in self.parts.items():
            key = self.keys[name]
            (count,) = part.counts(_part(output, key, "outputs"), _part(target, key, "targets"), samples).values()
            found[_kind_of(count, samples, name)] = count
        return found


def _kind_of(count: int | Tensor | None, samples: int, name: str) -> tuple[str, str]:
    """The name of a share: of one kind or of this output, as an output may be called anything."""
    is_of_samples = not isinstance(count, Tensor) and count == samples
    return ("sums", "") if count is None else ("samples", "") if is_of_samples else ("targets of", name)


class OwnLoss:
    """The loss that a module computed itself: its scalar output, or `.loss`, `["loss"]` or the one scalar of it.

    It is taken to be a mean over the samples, or over the tokens where targets are indices of tokens, of which those
    below 0 are masked (-100 is Transformers', -1 nanoGPT's). Causal language models predict no first token: whether
    one is counted is read off the cross entropy in the graph of a first loss.

    Args:
        module: Who computes it.
    Attributes:
        latest: Other scalars that the module returned beside the last loss, by name.
        is_gathered: Whether `shares` will be asked for after each call.
    """

    def __init__(self, module: nn.Module) -> None:
        # Transformers says which of its losses it takes; some models take another one all the same.
        self._skipped_tokens = 1 if getattr(module, "loss_type", None) == "ForCausalLM" else 0
        self._looks = 3  # into as many graphs, at most: each makes the host wait
        self.latest: dict[str, Tensor] = {}
        self._terms: list[str] | None = None  # known from the first output
        self.is_gathered = False

    def expect(self, *targets: Any, beside: bool = False) -> None:
        """Nothing to check: only the module knows its targets."""

    def __call__(self, output: Any, target: Any = None, weight: Any = None) -> Tensor:
        """
        Raises:
            ValueError: there is none, or there are weights, which only the module could heed.
        """
        if weight is not None:
            raise ValueError(
                "sample_weight and class_weight were given, but with loss=None the module computes its loss itself. "
                "Weigh the samples in the module, or give compile a loss."
            )
        if isinstance(output, Tensor):
            loss = output
        elif isinstance(output, tuple) and not hasattr(output, "_fields"):
            scalars = [part for part in output if isinstance(part, Tensor) and part.ndim == 0]
            loss = scalars[0] if len(scalars) == 1 else None
        else:
            loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            raise ValueError(
                f"loss=None means that the module returns its own loss, but it returned {_describe(output)}. Return a "
                f"scalar or something with a scalar .loss, give compile a loss, or override compute_loss."
            )
        if self._terms is None:
            self._terms = _scalars_of(output)
        if self._terms:
            self.latest = {str(name): output[name].detach() for name in self._terms if name in output}
        if self._looks and loss.grad_fn is not None:
            self._learn(loss, target)
        return loss if loss.element_size() >= 4 else loss.float()

    @property
    def is_unchecked(self) -> bool:
        """Whether the graph of the next loss is looked into."""
        return self._looks > 0

    def _learn(self, loss: Tensor, target: Any) -> None:
        """Whether the first token counts, from how many the cross entropy in the loss was divided by."""
        self._looks -= 1
        if not self.masks(None, target):  # no tokens
            self._looks = 0
            return
        node = loss.grad_fn
        while node is not None and not node.name().startswith("NllLoss"):
            node = next((before for before, _ in node.next_functions if before is not None), None)
        if node is None or node._saved_reduction != MEAN:
            return
        counted = int(node._saved_total_weight)
        whole, shifted = (int((target[..., first:] >= 0).sum()) for first in (0, 1))
        if whole != shifted and counted in (whole, shifted):
            self._skipped_tokens, self._looks = int(counted == shifted), 0

    def masks(self, output: Any, target: Any) -> bool:
        """Whether the loss is a mean over tokens, of which some may be masked."""
        return isinstance(target, Tensor) and target.ndim >= 2 and not target.is_floating_point()

    def units(self, targets: Tensor) -> Tensor:
        """How many tokens of each batch are not masked: shape (batches, samples, ...) -> (batches,)."""
        return (targets[..., self._skipped_tokens :] >= 0).flatten(1).sum(1)

    def shares(self, loss: Tensor, output: Any, batch: tuple[Any, Any, Any], samples: int) -> list[Share]:
        """What the loss is the mean over."""
        target = batch[1]
        if not self.masks(output, target):
            return [Share("", loss, samples, samples)]
        return [Share("", loss, self.units(target[None])[0], target.numel())]


def _scalars_of(output: Any) -> list[Any]:
    """Names of the scalars, beside the loss, of an output by name."""
    parts = output.items() if isinstance(output, Mapping) else ()
    return [name for name, part in parts if isinstance(part, Tensor) and part.ndim == 0 and name != "loss"]


def get(loss: Any) -> Loss | SumOfLosses | None:
    """What `compile` was given as `loss` -> something to call.

    Args:
        loss: A name, `nn.Module`, callable `(output, target) -> tensor`, dict or list of these for several outputs,
            each optionally `(loss, weight)`; `None` = the module returns its own loss.
    Raises:
        ValueError: an unknown name.
        TypeError: something else than these.
    """
    if loss is None:
        return None
    if isinstance(loss, Mapping):
        keys = {str(key): key for key in loss}
        return _sum_of({str(key): part for key, part in loss.items()}, keys)
    if isinstance(loss, list):
        keys = {f"output_{index + 1}": index for index in range(len(loss))}
        return _sum_of(dict(zip(keys, loss, strict=True)), keys)
    return _one(loss)


def _sum_of(losses: dict[str, Any], keys: dict[str, Any]) -> SumOfLosses:
    if not losses:
        raise ValueError("loss has no entries. Give a loss for at least one output.")
    pairs = {name: part if isinstance(part, tuple) else (part, 1.0) for name, part in losses.items()}
    for name, pair in pairs.items():
        if len(pair) != 2 or not isinstance(pair[1], (int, float)):
            raise ValueError(f'loss of {name!r} is {pair!r}, expected a loss or (loss, weight) such as ("mse", 0.5).')
    return SumOfLosses(
        {name: _one(part) for name, (part, _) in pairs.items()},
        {name: float(w) for name, (_, w) in pairs.items()},
        keys,
    )


def parts_of(loss: Loss | SumOfLosses | OwnLoss) -> list[Loss]:
    """The losses of all outputs; none where the module has its own."""
    if isinstance(loss, SumOfLosses):
        return [*loss.parts.values()]
    return [loss] if isinstance(loss, Loss) else []


def place(loss: Loss | SumOfLosses | OwnLoss, device: torch.device, dtype: torch.dtype | None) -> None:
    """Moves what losses have of tensors (`nn.CrossEntropyLoss(weight=...)`) to the device, in place.

    With a dtype, a copy of the module is taken: the user's stays as it is.
    """
    for part in parts_of(loss):
        if isinstance(part.function, nn.Module):
            part.function = (
                part.function.to(device) if dtype is None else copy.deepcopy(part.function).to(device, dtype)
            )
            part.unreduce()


def _one(loss: Any) -> Loss:
    refuse_kerass("loss", loss)
    if isinstance(loss, str):
        if (known := known_name(loss)) is None:
            _refuse_name(loss)
        return Loss(FUNCTIONS[known][0], loss, FUNCTIONS[known][1])
    if inspect.isclass(loss):
        raise TypeError(f"loss={loss.__name__} is a class, expected an instance. Give {loss.__name__}().")
    if isinstance(loss, nn.Module):
        kind = CLASSES if isinstance(loss, CLASS_MODULES) else VALUES if isinstance(loss, VALUE_MODULES) else None
        return Loss(loss, type(loss).__name__, kind)
    if callable(loss):
        bare = loss.func if isinstance(loss, functools.partial) else loss
        known = next((kind for function, kind in FUNCTIONS.values() if function is bare), None)
        return Loss(loss, getattr(bare, "__name__", type(loss).__name__), known)
    raise TypeError(
        f"loss={loss!r} is a {type(loss).__name__}; expected a name, an nn.Module, a callable (output, target), "
        f"or a dict or list of these."
    )


def refuse_kerass(what: str, given: Any) -> None:
    """Objects of Keras take the targets first, and its metrics give means over all batches so far: neither is told."""
    module = getattr(given, "__module__", None) or ""
    if module.partition(".")[0] == "keras" or module.partition(".")[0] == "tf_keras":
        name = getattr(given, "__name__", type(given).__name__)
        raise TypeError(
            f"{what} {name} is Keras's own, called with (target, output) and made for Keras's loop. Give the name as a "
            f"text, such as 'mse', or a function (output, target)."
        )


def known_name(name: str) -> str | None:
    """The key in `FUNCTIONS` that a name means, in any spelling ("MSELoss", "mse_loss"); `None` if it means none."""
    name = name.lower().replace("-", "_").replace(" ", "_")
    undivided = {known.replace("_", ""): known for known in (*FUNCTIONS, *ALIASES)}
    for candidate in (name, name.removesuffix("loss").removesuffix("_")):
        candidate = undivided.get(candidate, candidate)
        candidate = ALIASES.get(candidate, candidate)
        if candidate in FUNCTIONS:
            return candidate
    return None


def _refuse_name(name: str) -> None:
    close = difflib.get_close_matches(name.lower(), [*FUNCTIONS, *ALIASES], n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known are {', '.join(FUNCTIONS)}."
    raise ValueError(f"loss={name!r} is not a loss. {hint}")


# Several outputs, and what a module returned.


def _part(tree: Any, key: Any, what: str) -> Any:
    try:
        if isinstance(tree, Tensor):  # whose `[0]` would be a sample
            raise TypeError(f"{what} are one tensor")
        return tree[key]
    except (KeyError, IndexError, TypeError) as error:
        has = sorted(map(str, tree)) if isinstance(tree, Mapping) else _describe(tree)
        raise ValueError(f"the losses name {key!r}, but the {what} are {has}. Use the same names in both.") from error


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict of {sorted(map(str, value))}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")


# Logits or probabilities.


def warn_of_final_softmax(module: nn.Module, loss: Loss | SumOfLosses | None) -> None:
    """One warning where the last layer makes probabilities and the loss expects logits."""
    # Of a module with a `forward` of its own nobody knows which submodule comes last.
    final = module
    while isinstance(final, nn.Sequential) and len(final):
        final = final[-1]
    if isinstance(loss, Loss) and loss.on_logits and isinstance(final, (nn.Softmax, nn.Softmax2d, nn.Sigmoid)):
        loss.warn_of_probabilities(f"the module ends in {type(final).__name__}")
