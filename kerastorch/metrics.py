"""Names of metrics: a string, callable or torchmetrics object -> something that is summed over an epoch.

Two kinds: a `Mean` has a sum and a count, which `tracker.py` keeps on the device; a `Stateful` keeps its own state, as
torchmetrics do. Scores that torchmetrics has (`"auc"`, `"f1"`, ...) are torchmetrics'.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .losses import FUNCTIONS, VALUES, Loss, SumOfLosses, known_name, refuse_kerass
from .structures import leaves, map_structure
from .targets import Layout, check_values

Sums = tuple[Tensor, Any]  # sum of values on the device, and how many values: an int, or a tensor on the device


class Mean:
    """A metric that is the mean of a value over all samples (or targets) of an epoch.

    Attributes:
        name: Its key in logs and history.
        function: `(output, target, weight) -> (sum, count)`.
        is_weighted: Whether it is given the samples' weights; else `weight` is `None`.
        joins: Whether batches may be joined before they are measured.
        finish: What is done to the mean in the end.
    """

    def __init__(self, name: str, function: Callable, *, joins: bool = True, finish: Callable = float) -> None:
        self.name, self.function, self.joins, self.finish = name, function, joins, finish
        self.is_weighted = False
        self.prefix = ""  # of its name: the name of its output


class Stateful:
    """A metric with a state of its own: `update(output, target)`, `compute()`, `reset()`, as torchmetrics have them.

    Attributes:
        name: Its key in logs and history.
        metric: The object; `None` where `build` will make it from the first batch.
        joins: Whether batches may be joined before they are measured.
    """

    def __init__(self, name: str, metric: Any = None, build: Callable | None = None) -> None:
        self.name, self.metric, self.joins = name, metric, build is not None
        self._build, self._prepare, self._ranks = build, None, None
        self.prefix = ""  # of its name, and of the keys of a MetricCollection: the name of its output
        self._example: tuple[Any, Any] | None = None  # what it was built from

    def place(self, ranks: Any) -> None:
        """Has it measure where a backend has its tensors.

        Raises:
            TypeError: there are several processes, and it cannot say what it has measured together with others.
        """
        self._ranks = ranks
        if self.metric is None:
            return
        if hasattr(self.metric, "to"):
            self.metric.to(ranks.device)
        parts = _torchmetrics_in(self.metric).values()
        if ranks.measures_parts and not parts:
            raise TypeError(
                f"the metric {self.name!r} is a {type(self.metric).__name__}, whose state cannot be added up over "
                f"{ranks.world} processes. Derive it from torchmetrics.Metric, or give a callable (output, target)."
            )
        for one in parts:  # else each `compute`, also that of one process alone, would wait for the others
            one.sync_on_compute = one._to_sync = False

    def update(self, output: Any, target: Any, counts: bool = True) -> None:
        """Takes in a batch, or where it does not count, its shapes alone."""
        if self.metric is None:  # which variant it is shows in the shapes
            self._example = output[:1], target[:1]
            self.metric, self._prepare = self._build(output, target)
            self.place(self._ranks)
        if not counts:
            return
        self.metric.update(*((output, target) if self._prepare is None else self._prepare(output, target)))

    def reset(self) -> None:
        if self.metric is not None:
            self.metric.reset()

    def result(self, of_all: bool) -> dict[str, Any]:
        """What it has measured: in all processes, which must ask together, or in this one alone."""
        with ExitStack() as stack:
            for one in _torchmetrics_in(self.metric).values() if of_all and self._ranks.measures_parts else ():
                one._computed = None
                stack.enter_context(_with_empty_lists(one, self._ranks))
                stack.enter_context(one.sync_context(distributed_available=lambda: True))
            value = self.metric.compute()
        if isinstance(value, Mapping):  # a MetricCollection
            return {f"{self.prefix}{name}": _plain(part) for name, part in value.items()}
        return {self.name: _plain(value)}

    @property
    def is_savable(self) -> bool:
        """Whether it can be saved between two batches, as torchmetrics and all that have a `state_dict` can."""
        return self.metric is None or hasattr(self.metric, "_defaults") or hasattr(self.metric, "state_dict")

    def state_dict(self) -> dict[str, Any]:
        """What it has counted: tensors and plain data."""
        if self.metric is None or not self.is_savable:
            return {}
        parts = _torchmetrics_in(self.metric)
        if not parts:
            return {"own": self.metric.state_dict()}
        counted = {
            name: {"updates": one._update_count, "values": {key: getattr(one, key) for key in one._defaults}}
            for name, one in parts.items()
        }
        return {"example": self._example, "counted": counted}

    def load_state_dict(self, state: Mapping[str, Any], device: Any) -> None:
        """Goes on from a state."""
        if self.metric is None and state:
            self._example = map_structure(lambda leaf: leaf.to(device), state["example"])
            self.metric, self._prepare = self._build(*self._example)
            self.place(self._ranks)
        if "own" in state:
            self.metric.load_state_dict(state["own"])
        for name, one in _torchmetrics_in(self.metric).items() if "counted" in state else ():
            saved = state["counted"][name]
            one._update_count, one._computed = saved["updates"], None
            for key, value in saved["values"].items():
                setattr(one, key, map_structure(lambda leaf: leaf.to(device), value))

    def merged(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One state for what several processes have counted."""
        total, *others = (copy.deepcopy(self) for _ in states)
        total.load_state_dict(states[0], self._ranks.device)
        for other, state in zip(others, states[1:], strict=True):
            other.load_state_dict(state, self._ranks.device)
            for own, more in zip(*(_torchmetrics_in(one.metric).values() for one in (total, other)), strict=True):
                own.merge_state(more)
        return total.state_dict()


@contextmanager
def _with_empty_lists(metric: Any, ranks: Any) -> Iterator[None]:
    """Meanwhile a process that has seen no samples has lists of none, of the sort that the others have.

    torchmetrics would send float32 numbers in the place of any, and the others wait for what is of their own sort.
    """
    joined = [name for name, by in metric._reductions.items() if getattr(by, "__name__", "") == "dim_zero_cat"]
    lists = {name: value for name in joined if isinstance(value := getattr(metric, name), list)}
    sorts = {name: (value[0].dtype, value[0].shape[1:]) for name, value in lists.items() if value}
    known = {name: sort for found in (ranks.collect(sorts) if lists else ()) for name, sort in found.items()}
    missing = [name for name in known if name not in sorts]
    for name in missing:
        dtype, shape = known[name]
        setattr(metric, name, [torch.empty((0, *shape), dtype=dtype, device=ranks.device)])
    try:
        yield
    finally:
        for name in missing:
            setattr(metric, name, [])


def _torchmetrics_in(metric: Any) -> dict[str, Any]:
    """A torchmetrics metric and those inside of it, which keep their states as attributes, by their names."""
    parts = metric.named_modules() if isinstance(metric, torch.nn.Module) else ()
    return {name: part for name, part in parts if hasattr(part, "_defaults")}


def get(metrics: Any, loss: Loss | SumOfLosses | None, weighted: Any = ()) -> list[tuple[Any, Mean | Stateful]]:
    """What `compile` was given as `metrics` -> pairs of the key of an output (`None` = the only one) and its metric.

    Args:
        metrics: A name, callable `(output, target) -> scalar or per-sample tensor` or object with `update`, `compute`
            and `reset`, or a list of these; for several outputs a dict or list of lists of them.
        loss: The losses compiled with them: names of outputs, and whether outputs are logits.
        weighted: More of them, which are means weighted by `sample_weight` and `class_weight`; where one of the others
            has its name, it is called `weighted_...`, as in Keras. Default: none.
    Raises:
        ValueError: an unknown name (with the close ones), an output without a loss of that name, or a score that
            cannot be weighted.
        TypeError: something else than these.
    """
    found = _of(metrics, loss)
    names = {metric.name for _, metric in found}
    for key, metric in _of(weighted, loss):
        if not isinstance(metric, Mean):
            raise ValueError(
                f"weighted_metrics has {metric.name!r}, which has a state of its own and takes no weights. Give it as "
                f"one of metrics, or a callable (output, target) -> a value for each sample."
            )
        metric.is_weighted = True
        if metric.name in names:
            metric.name = f"{metric.prefix}weighted_{metric.name.removeprefix(metric.prefix)}"
        found.append((key, metric))
    return found


def _of(metrics: Any, loss: Loss | SumOfLosses | None) -> list[tuple[Any, Mean | Stateful]]:
    if isinstance(loss, SumOfLosses):
        return _of_several_outputs(metrics, loss)
    if isinstance(metrics, Mapping):
        raise ValueError(
            f"metrics is a dict of outputs {sorted(map(str, metrics))}, but loss is not. Give both as dicts."
        )
    if loss is None and metrics:
        raise ValueError("metrics were given with loss=None, where only the module knows its targets. Give a loss too.")
    return _numbered([(None, _one(metric, loss)) for metric in _as_list(metrics)])


def _of_several_outputs(metrics: Any, loss: SumOfLosses) -> list[tuple[Any, Mean | Stateful]]:
    if not metrics:
        return []
    if not isinstance(metrics, Mapping):
        metrics = _as_list(metrics)
        if len(metrics) != len(loss.parts):
            raise ValueError(
                f"metrics is a list of {len(metrics)} for {len(loss.parts)} outputs. Give a list of metrics for each "
                f"output, e.g. {[['accuracy'] for _ in loss.parts]}, or a dict by output."
            )
        metrics = dict(zip(loss.keys.values(), metrics, strict=True))
    found = []
    for output, chosen in metrics.items():
        if str(output) not in loss.parts and output not in loss.keys.values():
            raise ValueError(f"metrics name the output {output!r}, but the losses name {', '.join(loss.parts)}.")
        name = next(name for name, key in loss.keys.items() if output in (name, key))
        for metric in _as_list(chosen):
            one = _one(metric, loss.parts[name])
            one.name, one.prefix = f"{name}_{one.name}", f"{name}_"
            found.append((loss.keys[name], one))
    # Keras lists the metrics of several outputs by name.
    return _numbered(sorted(found, key=lambda pair: pair[1].name))


def _numbered(found: list[tuple[Any, Mean | Stateful]]) -> list[tuple[Any, Mean | Stateful]]:
    """A name used twice gets a number, as in Keras: `f1`, `f1_1`."""
    seen: dict[str, int] = {}
    for _, metric in found:
        seen[metric.name] = seen.get(metric.name, -1) + 1
        if seen[metric.name]:
            metric.name = f"{metric.name}_{seen[metric.name]}"
    return found


def _as_list(metrics: Any) -> list:
    if metrics is None:
        return []
    return list(metrics) if isinstance(metrics, (list, tuple)) else [metrics]


def _one(metric: Any, loss: Loss | None) -> Mean | Stateful:
    refuse_kerass("metric", metric)
    if isinstance(metric, str):
        return _named(metric, loss)
    if inspect.isclass(metric):
        raise TypeError(f"metric {metric.__name__} is a class, expected an instance. Give {metric.__name__}(...).")
    if all(hasattr(metric, method) for method in ("update", "compute", "reset")):
        return Stateful(_snake_case(type(metric).__name__), metric)
    if callable(metric):
        name = getattr(metric, "__name__", None) or getattr(getattr(metric, "func", None), "__name__", None)
        return Mean(name or _snake_case(type(metric).__name__), _sums_of(metric), joins=False)
    raise TypeError(
        f"metric {metric!r} is a {type(metric).__name__}; expected a name, a callable (output, target), or an object "
        f"with update, compute and reset such as a torchmetrics.Metric."
    )


def _named(name: str, loss: Loss | None) -> Mean | Stateful:
    key = _snake_case(name.replace("-", "_"))
    key = ALIASES.get(key, key)
    if top := re.fullmatch(
        r"top_?(\d+)(?:_(?:categorical_)?(?:accuracy|acc))?|(?:sparse_)?top_k_categorical_accuracy", key
    ):
        k = int(top.group(1)) if top.group(1) else 5  # Keras's
        if k < 1:
            raise ValueError(f"metric {name!r} asks for the best {k} classes. Give at least 1, e.g. 'top5_accuracy'.")
        return Mean(name, Accuracy(loss, k=k))
    if key in ("accuracy", "binary_accuracy", "categorical_accuracy", "sparse_categorical_accuracy"):
        return Mean(name, Accuracy(loss, is_binary={"accuracy": None, "binary_accuracy": True}.get(key, False)))
    if key in ERRORS:
        error, finish = ERRORS[key]
        return Mean(name, error, finish=finish)
    if key in SCORES:
        return Stateful(name, build=SCORES[key](loss))
    if (loss_name := known_name(name)) is not None:
        measure = Loss(FUNCTIONS[loss_name][0], name, FUNCTIONS[loss_name][1])
        measure.layout = Layout() if loss is None else loss.layout
        # As a loss it is the negative similarity, as a metric the similarity itself: Keras's, both.
        finish = operator.neg if loss_name == "cosine_similarity" else float
        return Mean(name, _sums_of_loss(measure), finish=finish)
    known = ["accuracy", "top5_accuracy", *ERRORS, *SCORES, *ALIASES]
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known are {', '.join(known[:9])}."
    raise ValueError(f"metric {name!r} is not a metric. {hint} Any callable or torchmetrics.Metric works too.")


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _sums_of_loss(loss: Loss) -> Callable[..., Sums]:
    """Any loss is a metric too, as in Keras."""

    def sums(output: Tensor, target: Tensor, weight: Tensor | None) -> Sums:
        masks = loss.masks(output, target)
        count = loss.units(target[None])[0] if masks else len(output)
        total = loss(output, target, weight) * count
        return (total, count) if weight is None else (total, _summed(loss.counted(output, target), weight)[0])

    return sums


def _sums_of(function: Callable) -> Callable[..., Sums]:
    """A user's metric as sum and count: a scalar is the mean of its batch, anything else one value a sample."""

    def sums(output: Any, target: Any, weight: Tensor | None) -> Sums:
        values = torch.as_tensor(function(output, target)).detach()
        if values.ndim > 0:
            return _summed(values, weight)
        if weight is not None:
            raise ValueError(
                f"weighted_metrics has {function!r}, which returned one number for a batch. Return a value for each "
                f"sample, shape ({len(weight)},), or give it as one of metrics."
            )
        samples = len(next(leaves(output)))
        return values * samples, samples

    return sums


def _summed(values: Tensor, weight: Tensor | None, counts: Tensor | None = None) -> Sums:
    """Sum and count of values, of those alone that count, and each as often as its sample weighs."""
    if weight is not None:
        weight = weight.reshape(weight.shape + (1,) * (values.ndim - weight.ndim)).expand_as(values)
        weight = weight if counts is None else weight * counts
        return (values * weight).sum(), weight.sum()
    return (values.sum(), values.numel()) if counts is None else ((values & counts).sum(), counts.sum())


class Accuracy:
    """Share of right predictions: binary, multi-class or multi-label by the shapes, as Keras chooses.

    Targets with one dim less than the output are class indices (those of the loss's `ignore_index` do not count).
    Targets of the output's shape are binary where there is one value a sample or the loss compares values one by one
    (`bce_with_logits`: several labels), else one-hot.

    Args:
        loss: Tells whether outputs are logits (threshold 0) or probabilities (0.5), and what is ignored.
        k: A prediction is right where the target is among the `k` highest. Default: 1.
        is_binary: `True` or `False` where the metric's name says it; `None` = by shape.
    """

    def __init__(self, loss: Loss | None, k: int = 1, is_binary: bool | None = None) -> None:
        self.k, self.is_binary = k, is_binary
        self.ignore_index = getattr(loss, "ignore_index", None)
        self.layout = Layout() if loss is None else loss.layout
        self.compares_values = loss is not None and loss.targets is VALUES
        self.threshold = loss.threshold if self.compares_values else 0.0

    def __call__(self, output: Tensor, target: Tensor, weight: Tensor | None) -> Sums:
        if self.is_binary or (self.is_binary is None and self._is_binary(output, target)):
            target = target.reshape(output.shape)
            return _summed((output > self.threshold) == (target > 0.5), weight)
        return self._of_classes(output, target, weight)

    def _is_binary(self, output: Tensor, target: Tensor) -> bool:
        compares = output.shape == target.shape and self.compares_values and self.k == 1
        return compares or has_one_value(output, target)

    def _of_classes(self, output: Tensor, target: Tensor, weight: Tensor | None) -> Sums:
        output, target = classes_first(output, target, self.layout)
        if self.k == 1:
            right = output.argmax(1) == target
        else:
            k = min(self.k, output.shape[1])
            right = (output.topk(k, dim=1).indices == target.unsqueeze(1)).any(1)
        return _summed(right, weight, None if self.ignore_index is None else target != self.ignore_index)


def _values(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Sums]:
    def sums(output: Tensor, target: Tensor, weight: Tensor | None) -> Sums:
        check_values(output, target, "the metric")
        values = function(output, target.to(output.dtype))
        if weight is not None:
            return _summed(values, weight)
        return values.sum(dtype=torch.float64 if values.device.type != "mps" else None), values.numel()

    return sums


_squares = _values(lambda output, target: (output - target).square())
_absolutes = _values(lambda output, target: (output - target).abs())

# Name -> (sums, what is done to the mean in the end).
ERRORS: dict[str, tuple[Callable, Callable]] = {
    "mse": (_squares, float),
    "mae": (_absolutes, float),
    "rmse": (_squares, lambda mean: mean**0.5),
}

ALIASES = {
    "acc": "accuracy",
    "mean_squared_error": "mse",
    "mean_absolute_error": "mae",
    "l1": "mae",
    "root_mean_squared_error": "rmse",
    "r2_score": "r2",
    "auroc": "auc",
    "f1_score": "f1",
}


# Scores that are no means: torchmetrics has them, for two classes, many, or several labels at once.


def _score(name: str, **options: Any) -> Callable[[Loss | None], Callable]:
    def for_loss(loss: Loss | None) -> Callable:
        compares_values = loss is not None and loss.targets is VALUES

        def build(output: Tensor, target: Tensor) -> tuple[Any, Callable]:
            import torchmetrics.classification as classification

            if has_one_value(output, target):
                metric, prepare = getattr(classification, f"Binary{name}")(), partial(_binary_scores, loss)
            elif output.shape == target.shape and compares_values:
                metric = getattr(classification, f"Multilabel{name}")(num_labels=output.shape[1], **options)
                prepare = partial(_binary_scores, loss)
            else:
                layout = Layout() if loss is None else loss.layout
                classes = output.shape[-1 if layout.has_classes_last(output, target) else 1]
                ignored = getattr(loss, "ignore_index", None)
                metric = getattr(classification, f"Multiclass{name}")(classes, ignore_index=ignored, **options)
                prepare = partial(_class_scores, layout)
            return metric.to(output.device), prepare

        return build

    return for_loss


def _binary_scores(loss: Loss | None, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    # Squashed here, probabilities too: torchmetrics would guess anew for each batch whether it sees logits.
    threshold = loss.threshold if loss is not None and loss.targets is VALUES else 0.0
    return (_wide(output) - threshold).sigmoid().reshape(target.shape), (target > 0.5).long()


def _class_scores(layout: Layout, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    output, target = classes_first(output, target, layout)
    return _wide(output).softmax(1), target.long()


def _wide(output: Tensor) -> Tensor:
    """In float64 where there is one: in float32 every sigmoid from 17 on is 1, and different scores become equal."""
    return output if output.device.type == "mps" else output.double()


def _r2(loss: Loss | None) -> Callable:
    def build(output: Tensor, target: Tensor) -> tuple[Any, Callable]:
        from torchmetrics.regression import R2Score

        # In float64 where there is one: the sums of squares nearly cancel.
        dtype = torch.float32 if output.device.type == "mps" else torch.float64
        return R2Score().to(output.device).set_dtype(dtype), partial(_flat_values, dtype)

    return build


def _flat_values(dtype: torch.dtype, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(tensor.reshape(len(tensor), -1).squeeze(-1).to(dtype) for tensor in (output, target))


SCORES: dict[str, Callable] = {
    "auc": _score("AUROC", average="macro"),
    "f1": _score("F1Score", average="macro"),
    "precision": _score("Precision", average="macro"),
    "recall": _score("Recall", average="macro"),
    "r2": _r2,
}


def has_one_value(output: Tensor, target: Tensor) -> bool:
    """Whether there is one number for each target; (N, C, 1) for targets (N, 1) are classes of sequences of one."""
    return output.ndim == 1 or (output.shape[-1] == 1 and output.numel() == target.numel())


def classes_first(output: Tensor, target: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Output with its classes in dim 1, and targets as indices: one-hot ones are read, a last dim of 1 is dropped."""
    if target.shape == output.shape:
        return output, target.argmax(1)
    if target.ndim == output.ndim and target.shape[-1] == 1:
        target = target.squeeze(-1)
    if output.ndim > 2 and layout.has_classes_last(output, target):
        output = output.movedim(-1, 1)
    return output, target


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
