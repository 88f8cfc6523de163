"""Checks of the step itself: outputs, losses, gradients, modes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from ..losses import Loss
from ..seeding import random_state_kept
from .findings import Finding, counted, several
from .module import covering, is_broken
from .outputs import kind_of, last_operation, output_called, target_called
from .seen import Seen

LARGE_NORM, VANISHING_NORM = 1e5, 1e-7  # of the gradient of the first batch


def masked_targets(seen: Seen) -> Iterator[Finding]:
    """A batch without a target that counts, whose loss is the mean of none; its gradient is 0 and does no harm."""
    for name, loss, output, target in seen.outputs():
        if _is_masked(loss, output, target):
            yield Finding(
                "note",
                "masked-targets",
                target_called(name),
                f"All targets of the first batch are {loss.ignore_index}, which is masked: nothing is learnt from it.",
                "Give another ignore_index, or larger batches, if there are many of these.",
            )


def loss_not_finite(seen: Seen) -> Iterator[Finding]:
    """A loss of NaN that neither weights nor data explain."""
    if seen.is_loss_finite or any(map(is_broken, seen.module.parameters())):
        return
    if any(_is_masked(loss, output, target) for _, loss, output, target in seen.outputs()):
        return
    if any(isinstance(values, Tensor) and is_broken(values) for _, values in seen.batch_at_hand()):
        return
    first = seen.layers.first_not_finite
    yield Finding(
        "error",
        "loss-not-finite",
        first or "loss",
        f"The loss of the first batch is {next(loss for loss in map(float, seen.losses) if not math.isfinite(loss))}, "
        + (f"and {first} is the first layer to return NaN or infinity." if first else "though every layer is finite."),
        "Look there for a logarithm or a division by 0, or for numbers too large for the precision.",
    )


def loss_at_start(seen: Seen) -> Iterator[Finding]:
    """A loss far above that of guessing, where it is one of classes."""
    if seen.batch is None or seen.batch[2] is not None or not seen.losses:
        return
    for name, loss, output, target in seen.outputs():
        classes, value = _classes(loss, output, target), float(seen.terms.get(name, seen.losses[0]))
        if classes and not loss.is_sum and math.isfinite(value) and value > 2 * math.log(classes) + 1:
            yield Finding(
                "note",
                "large-loss",
                output_called(name),
                f"The loss at start is {value:.3g}, and guessing among {classes} classes has {math.log(classes):.2g}.",
                "Normalize the inputs, and look at the scale of the last layer's weights.",
            )


def no_log_probabilities(seen: Seen) -> Iterator[Finding]:
    for name, loss, output, target in seen.outputs():
        kind = kind_of(loss)
        if kind not in ("nll", "kl_div") or output.ndim < 2 or is_broken(output):
            continue
        values = output.detach().float()
        if kind == "nll" and values.ndim > 2 and loss.layout.has_classes_last(values, target):
            values = values.movedim(-1, 1)
        sums_to_one = kind == "kl_div" or bool((values.logsumexp(1).abs() < 0.01).all())
        if not sums_to_one or bool((values > 1e-3).any()):
            instead = "'cross_entropy'" if kind == "nll" else "'kl_divergence'"
            yield Finding(
                "error",
                "no-log-probabilities",
                output_called(name),
                f"loss={loss.name!r} takes log-probabilities, but the outputs, from {float(values.min()):.3g} to "
                f"{float(values.max()):.3g}, are none: the loss can fall without end.",
                f"End the module in a LogSoftmax, or give {instead}, which takes logits.",
            )


def squashed_logits(seen: Seen) -> Iterator[Finding]:
    """Probabilities that the values do not give away: of a sigmoid for each class, or of a few samples."""
    if any("expects logits" in text for text in seen.warnings):
        return
    for name, loss, output, _ in seen.outputs():
        last = last_operation(output)
        if loss.on_logits and last in ("Sigmoid", "Softmax"):
            yield Finding(
                "warning",
                "probabilities",
                output_called(name),
                f"loss={loss.name!r} takes logits, but they come from a {last}, and so are squashed twice.",
                f"Remove the final {last}.",
            )


def clipped_logits(seen: Seen) -> Iterator[Finding]:
    for name, loss, output, _ in seen.outputs():
        if loss.on_logits and last_operation(output) == "Relu":
            yield Finding(
                "warning",
                "clipped-logits",
                output_called(name),
                f"loss={loss.name!r} takes logits, but they come from a ReLU, which leaves none below 0.",
                "Remove the final ReLU.",
            )


def broadcast(seen: Seen) -> Iterator[Finding]:
    """A loss of the user's own that compares (N, 1) with (N,), all against all: no order of the targets changes it."""
    if any("Using a target size" in text for text in seen.warnings):  # torch has found it
        return
    for name, loss, output, target in seen.outputs():
        is_near = loss.targets is None and abs(output.ndim - target.ndim) == 1 and output.numel() == target.numel()
        if not is_near or torch.equal(target, target.flip(0)):
            continue
        orders = (target, target.flip(0), target.reshape(output.shape))
        given, turned, meant = (_value(seen, loss, output, one) for one in orders)
        if _is_close(given, turned) and not _is_close(given, meant):
            yield Finding(
                "warning",
                "broadcast",
                target_called(name),
                f"loss={loss.name!r} compares outputs {tuple(output.shape)} with targets {tuple(target.shape)} all "
                f"against all: {given:.4g}, where one by one it is {meant:.4g}.",
                "Give y[:, None], or let the module return output.squeeze(-1)."
                if output.ndim > target.ndim
                else "Give y.squeeze(-1), or let the module return output[:, None].",
            )


def mixed_samples(seen: Seen) -> Iterator[Finding]:
    if seen.mixes_samples:
        yield Finding(
            "warning",
            "samples-mix",
            "outputs",
            "The output for a sample depends on the other samples in its batch, in eval mode too.",
            "Look for a reshape across samples, or a layer that needs batch_first=True.",
        )


def unused_parameters(seen: Seen) -> Iterator[Finding]:
    trainable = [name for name, one in seen.module.named_parameters() if one.requires_grad]
    unused = {name for name in trainable if name not in seen.gradients}
    if seen.is_trained and unused:
        yield Finding(
            "note" if seen.overrides("train_step") else "warning",
            "unused-parameters",
            several(covering(seen.module, unused)),
            f"{len(unused)} of {len(trainable)} trainable parameters got no gradient from the first batch.",
            "Use them in forward, remove them or freeze them; if other batches use them, all is well.",
        )


def gradient_norm(seen: Seen) -> Iterator[Finding]:
    if not seen.is_trained or not seen.gradients or not seen.is_loss_finite:
        return
    norm, broken = seen.norm, [name for name, gradient in seen.gradients.items() if is_broken(gradient)]
    if broken and seen.gradient_scale > 1:  # the scale begins too high, and is halved until it fits
        return
    if broken:
        yield Finding(
            "error",
            "gradient-not-finite",
            several(broken),
            f"{len(broken)} of {len(seen.gradients)} gradients of the first batch have NaN or infinity, though the "
            "loss is finite.",
            "Look for a square root, a norm or a logarithm of 0 in forward or loss; add a small number to it.",
        )
    elif norm < VANISHING_NORM:
        yield Finding(
            "warning",
            "vanishing-gradient",
            "gradients",
            f"The gradient of the first batch has norm {norm:.3g}: there is nothing to learn by.",
            "Look for dead ReLUs, a softmax over one value, or a loss that does not depend on the outputs.",
        )
    elif norm > LARGE_NORM and not seen.is_clipped:
        yield Finding(
            "warning",
            "exploding-gradient",
            "gradients",
            f"The gradient of the first batch has norm {norm:.3g}.",
            "Normalize inputs and targets, or give compile clip=1.0.",
        )


def modes(seen: Seen) -> Iterator[Finding]:
    if seen.left_in_eval:
        yield Finding(
            "note",
            "stays-in-eval",
            several(seen.left_in_eval),
            f"fit calls train() on the module, which leaves {counted(len(seen.left_in_eval), 'module')} in eval mode.",
            "Leave it so, if a train method of your own does that on purpose.",
        )
    if seen.modes_changed:
        yield Finding(
            "note",
            "forward-sets-modes",
            several(seen.modes_changed),
            f"forward changes the mode, train or eval, of {counted(len(seen.modes_changed), 'module')} in a step.",
            "Call model.freeze with their names instead, if they are to stay in eval mode.",
        )


def overridden(seen: Seen) -> Iterator[Finding]:
    names = [name for name in ("train_step", "compute_loss") if seen.overrides(name)]
    if seen.compiled is not None and names:
        yield Finding(
            "note",
            "overridden",
            names[0],
            f"Your own {names[0]} knows alone which outputs and targets it compares, so their shapes and ranges were "
            "not checked.",
            "Make sure of them in it, e.g. by an assert on shapes.",
        )


CHECKS = (
    masked_targets,
    loss_not_finite,
    loss_at_start,
    no_log_probabilities,
    squashed_logits,
    clipped_logits,
    broadcast,
    mixed_samples,
    unused_parameters,
    gradient_norm,
    modes,
    overridden,
)


def _is_masked(loss: Loss, output: Tensor, target: Tensor) -> bool:
    return loss.masks(output, target) and not bool((target != loss.ignore_index).any())


def _classes(loss: Loss, output: Tensor, target: Tensor) -> int | None:
    """Of how many classes a loss guesses one; `None` where it is another kind of loss, or weighs them."""
    if kind_of(loss) in ("cross_entropy", "nll") and output.ndim > 1 and loss.class_weights is None:
        is_last = output.ndim > 2 and loss.layout.has_classes_last(output, target)
        return output.shape[-1 if is_last else 1]
    weights = (getattr(loss.function, name, None) for name in ("weight", "pos_weight", "keywords"))
    is_binary = kind_of(loss) in ("bce", "bce_with_logits") and all(one is None for one in weights)
    return 2 if is_binary else None


@torch.no_grad()
def _value(seen: Seen, loss: Loss, output: Tensor, target: Tensor) -> float:
    """A loss of the user's own; NaN where it takes no such target."""
    with random_state_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in the step it gave them already
        try:
            return float(loss.function(output.detach(), target).mean())
        except Exception:  # which a loss that looks at shapes itself may raise
            return math.nan


def _is_close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-4 * (abs(a) + abs(b))
