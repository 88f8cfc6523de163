"""Checks of the data: inputs, targets and their sizes, those of validation, and what losses want targets to be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from ..losses import CLASSES, VALUES
from ..structures import leaves, named_leaves
from .findings import Finding, counted, several
from .hints import last_batch_size, other_size
from .outputs import REACH, kind_of, last_operation, output_called, target_called
from .seen import Seen

# Root mean square of what the first layer gets: standardized data has 1, images from 0 to 255 about 100.
LARGE_SCALE, ENORMOUS_SCALE = 20.0, 1000.0
UNLIKE_SCALE = 10.0  # ratio of the scales of training and validation inputs
LARGE_COPY_BYTES = 1_000_000

# Name of a loss -> between what its targets must be.
RANGES = {
    "bce": (0.0, 1.0),
    "bce_with_logits": (0.0, 1.0),
    "multilabel_soft_margin": (0.0, 1.0),
    "kl_divergence": (0.0, 1.0),
    "poisson": (0.0, math.inf),
    "poisson_nll": (0.0, math.inf),
    "mean_squared_logarithmic_error": (0.0, math.inf),
    "soft_margin": (-1.0, 1.0),
    "hinge": (-1.0, 1.0),
    "squared_hinge": (-1.0, 1.0),
}
OF_VALUES = ("mse", "l1", "smooth_l1", "huber", "log_cosh")


def infinite_data(seen: Seen) -> Iterator[Finding]:
    for name, values in seen.data_at_hand():
        number = _infinities(values)
        if number:
            yield Finding(
                "warning" if seen.is_loss_finite else "error",
                "data-not-finite",
                name,
                f"{name} has {counted(number, 'infinite value')}: the loss will be infinite or NaN.",
                "Clip them, or drop these samples.",
            )


def double_data(seen: Seen) -> Iterator[Finding]:
    dtype = next((one.dtype for one in seen.module.parameters() if one.dtype.is_floating_point), torch.float32)
    for name, values in seen.arrays():
        copied_bytes = values.nbytes // 2
        if values.dtype in (torch.float64, np.float64) and dtype is torch.float32 and copied_bytes >= LARGE_COPY_BYTES:
            yield Finding(
                "note",
                "float64-data",
                name,
                f"{name} is float64, and each fit copies it as float32: {copied_bytes / 1e6:.0f} MB.",
                'Convert it once, e.g. by array.astype("float32").',
            )


def last_batch_of_one(seen: Seen) -> Iterator[Finding]:
    norms = [name for name, values in seen.layers.values_per_sample.items() if values == 1]
    data, split = seen.source[0], seen.split
    if norms and seen.is_trained and last_batch_size(data, seen.batch_size, split) == 1:
        yield Finding(
            "error",
            "last-batch-of-one",
            several(norms),
            "The last batch of an epoch has one sample, by which BatchNorm cannot normalize: torch raises there.",
            other_size(data, seen.batch_size, split),
        )


def input_scale(seen: Seen) -> Iterator[Finding]:
    layer, scale = seen.layers.first or ("", None)
    rms = 0.0 if scale is None else float(scale)
    if math.isfinite(rms) and rms >= LARGE_SCALE:
        yield Finding(
            "warning" if rms >= ENORMOUS_SCALE else "note",
            "input-scale",
            "x",
            f"The first layer, {layer}, gets inputs of root mean square {rms:.3g}, where about 1 trains best.",
            "Normalize them, images by x / 255, columns by (x - x.mean(0)) / x.std(0).",
        )


def target_scale(seen: Seen) -> Iterator[Finding]:
    for name, loss, target in seen.targets():
        rms = _scale(target) if kind_of(loss) in OF_VALUES else 0.0
        if math.isfinite(rms) and rms >= ENORMOUS_SCALE:
            yield Finding(
                "note",
                "target-scale",
                target_called(name),
                f"The targets have root mean square {rms:.3g}, which the outputs have to grow to.",
                "Standardize them, (y - y.mean()) / y.std(), and undo that on predictions.",
            )


def constant_targets(seen: Seen) -> Iterator[Finding]:
    for name, loss, target, _ in seen.targets_in_memory():
        if target.numel() < 2 or loss.targets is None or not bool((target == target.flatten()[0]).all()):
            continue
        value = target.flatten()[0].item()
        yield Finding(
            # Zeros may be meant: of a residual, say, that shall vanish.
            "note" if loss.targets is VALUES and value == 0 else "warning",
            "constant-targets",
            target_called(name),
            f"All {target.numel():,} targets are {value:g}.",
            "Look at how they were made: there is nothing to tell apart.",
        )


def targets_out_of_range(seen: Seen) -> Iterator[Finding]:
    for name, loss, target in seen.targets():
        least, most = RANGES.get(kind_of(loss), (-math.inf, math.inf))
        low, high = _ends(target)
        if low < least or high > most:
            yield Finding(
                "error",
                "target-range",
                target_called(name),
                f"The targets go from {low:.4g} to {high:.4g}, but loss={loss.name!r} takes {_range(least, most)}.",
                "Scale them or number them anew, or give 'cross_entropy' for classes, 'mse' for values.",
            )


def targets_out_of_reach(seen: Seen) -> Iterator[Finding]:
    """Values that the last operation of the module cannot return."""
    known = {name: target for name, _, target in seen.targets()}
    for name, loss, output, _ in seen.outputs():
        last = last_operation(output)
        if loss.targets is not VALUES or loss.on_logits or last not in REACH:
            continue
        (least, most), (low, high) = REACH[last], _ends(known[name])
        slack = 0.01 * (high - low)
        if low < least - slack or high > most + slack:
            yield Finding(
                "warning",
                "targets-out-of-reach",
                target_called(name),
                f"The targets go from {low:.4g} to {high:.4g}, but {output_called(name)} come from a {last}: "
                f"{_range(least, most)}.",
                "Scale the targets into that range, or let the module end in a linear layer.",
            )


def sorted_targets(seen: Seen) -> Iterator[Finding]:
    data = seen.source[0]
    keeps_order = isinstance(data, DataLoader) and type(data.sampler) is SequentialSampler
    for name, loss, ours, theirs in seen.targets_in_memory():
        if loss.targets is not CLASSES or not _is_sorted(ours):
            continue
        if _is_split_in_order(seen, ours, theirs):
            yield Finding(
                "warning",
                "sorted-targets",
                target_called(name),
                f"The targets are sorted, and validation_split holds back the end: {_classes(theirs)} alone.",
                "Shuffle x and y together first; fit shuffles only after the split, as Keras does.",
            )
        elif keeps_order:
            yield Finding(
                "warning",
                "sorted-targets",
                target_called(name),
                "The targets are sorted by class, and the loader keeps the order: most batches have one class only.",
                "Give the DataLoader shuffle=True.",
            )
        elif not seen.is_validated:
            yield Finding(
                "note",
                "sorted-targets",
                target_called(name),
                "The targets are sorted by class: fit shuffles, but only what validation_split has left of them.",
                "Shuffle x and y together before you give fit a validation_split.",
            )


def unseen_classes(seen: Seen) -> Iterator[Finding]:
    for name, loss, ours, theirs in seen.targets_in_memory():
        if loss.targets is not CLASSES or theirs is None or ours.ndim != 1 or theirs.ndim != 1:
            continue
        if _is_split_in_order(seen, ours, theirs) or not seen.is_trained:  # which says it all
            continue
        ignored = -100 if loss.ignore_index is None else loss.ignore_index
        unseen = theirs[~torch.isin(theirs, ours) & (theirs != ignored)]
        if len(unseen):
            yield Finding(
                "warning",
                "unseen-classes",
                target_called(name),
                f"Validation has targets that training has not: {_classes(unseen)}.",
                "Split by class, or shuffle before you split.",
            )


def validation_scale(seen: Seen) -> Iterator[Finding]:
    if seen.validation_batch is None:
        return
    ours, theirs = (dict(named_leaves(batch[0], "x")) for batch in (seen.batch, seen.validation_batch))
    for name in ours.keys() & theirs.keys():
        scales = [_scale(one) if _is_floats(one) else 0.0 for one in (ours[name], theirs[name])]
        if min(scales) > 0 and max(scales) > UNLIKE_SCALE * min(scales) and math.isfinite(max(scales)):
            yield Finding(
                "warning",
                "validation-scale",
                "validation_data",
                f"{name} has root mean square {scales[1]:.3g} in validation, but {scales[0]:.3g} in training.",
                "Prepare both in the same way, by mean and scale of the training data.",
            )


def validation_is_training(seen: Seen) -> Iterator[Finding]:
    ours, theirs = (next(leaves(one), None) for one in (seen.source[0], seen.validation_given))
    if ours is not None and ours is theirs:
        yield Finding(
            "note",
            "validation-is-training",
            "validation_data",
            "It is the training data itself, so that val_loss says nothing of new data.",
            "Hold samples back, e.g. by validation_split=0.1.",
        )


def validation_loss(seen: Seen) -> Iterator[Finding]:
    loss = seen.validation_loss
    if loss is not None and not math.isfinite(loss) and seen.is_loss_finite:
        yield Finding(
            "error",
            "loss-not-finite",
            "validation_data",
            f"The loss of the first validation batch is {loss}, that of training is finite.",
            "Look for NaN, infinity or other units in the validation data.",
        )


CHECKS = (
    infinite_data,
    double_data,
    last_batch_of_one,
    input_scale,
    target_scale,
    constant_targets,
    targets_out_of_range,
    targets_out_of_reach,
    sorted_targets,
    unseen_classes,
    validation_scale,
    validation_is_training,
    validation_loss,
)


def _infinities(values: Any) -> int:
    """How many there are; counted only where the sum, one cheap read, says that there may be some."""
    if not _is_floats(values):
        return 0
    with np.errstate(invalid="ignore", over="ignore"):
        if math.isfinite(float(values.sum())):
            return 0
        return int((torch if isinstance(values, Tensor) else np).isinf(values).sum())


def _is_floats(values: Any) -> bool:
    if isinstance(values, Tensor):
        return values.is_floating_point()
    return isinstance(values, np.ndarray) and values.dtype.kind == "f"


def _scale(tensor: Tensor) -> float:
    """Root mean square."""
    return float(tensor.detach().float().square().mean().sqrt())


def _ends(target: Tensor) -> tuple[float, float]:
    if not target.numel() or target.is_complex():
        return 0.0, 0.0
    low, high = torch.aminmax(target.detach())
    return float(low), float(high)


def _range(least: float, most: float) -> str:
    return f"values from {least:g} to {most:g}" if math.isfinite(most) else f"values from {least:g} up"


def _is_sorted(target: Tensor) -> bool:
    """Whether it has class after class, in either direction."""
    if target.ndim != 1 or len(target) < 3:
        return False
    steps = target.diff()
    return bool(((steps >= 0).all() | (steps <= 0).all()) & (steps != 0).any())


def _is_split_in_order(seen: Seen, ours: Tensor, theirs: Tensor | None) -> bool:
    """Whether `validation_split` has cut sorted targets."""
    return seen.split > 0 and theirs is not None and ours.ndim == 1 and _is_sorted(torch.cat([ours, theirs]))


def _classes(target: Tensor) -> str:
    values = target.unique().tolist()
    return f"class{'es' * (len(values) > 1)} {several(f'{one:g}' for one in values)}"
