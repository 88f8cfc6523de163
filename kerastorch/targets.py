"""Whether targets fit the outputs they are compared with, and whether outputs are logits or probabilities.

Looked at once, on the first batch of a run and on all targets that are in memory: everything here may wait for the
device. The one exception is `align_classes`, which each step calls and which only looks at shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

# How many samples may decide whether an output looks like probabilities: fewer would cry wolf.
MIN_SAMPLES_TO_JUDGE = 8


class Layout:
    """Where the classes of an output are: dim 1, as torch has them, or last; learnt from batches that leave no doubt.

    A batch of as many tokens as there are classes fits both. It is read as the others were, and the first as torch
    reads it.

    Attributes:
        is_last: How a batch that fits both is read.
    """

    def __init__(self) -> None:
        self.is_last = False

    def has_classes_last(self, output: Tensor, target: Tensor) -> bool:
        """Whether `output` is (N, ..., C) for indices (N, ...)."""
        is_last = output.shape[1:-1] == target.shape[1:]
        if is_last and output.shape[2:] == target.shape[1:]:
            return self.is_last
        if is_last != self.is_last:
            self.is_last = is_last
        return is_last


def align_classes(output: Tensor, target: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Moves classes to dim 1, where torch has them, and makes whole floats class indices."""
    if target.ndim == output.ndim - 1 or output.ndim == target.ndim == 1:
        if output.ndim > 2 and layout.has_classes_last(output, target):
            output = output.movedim(-1, 1)
        if target.dtype != torch.int64:
            target = target.long()
    elif target.dtype != output.dtype and target.shape == output.shape:
        target = target.to(output.dtype)
    return output, target


def check_classes(
    output: Tensor,
    target: Tensor,
    known: tuple[Tensor, ...],
    name: str,
    layout: Layout,
    ignore_index: int | None = None,
    takes_probabilities: bool = False,
) -> None:
    """Raises where targets cannot be classes of the output.

    Args:
        output: What the module returned for a first batch, shape (samples, classes, ...) or (samples, ..., classes).
        target: The targets of that batch.
        known: The targets to look into: of the whole run where they are in memory, else `target`.
        name: How messages call the loss.
        layout: Where the classes of the output are.
        ignore_index: A class index that is no class.
        takes_probabilities: Whether targets of the output's shape are probabilities.
    Raises:
        ValueError: shapes that do not belong together, indices out of range, values that are neither.
    """
    if target.shape == output.shape and output.ndim > 1 and takes_probabilities:
        for all_targets in known:
            values = all_targets.detach()
            if values.is_floating_point() and not are_probabilities(values):
                raise ValueError(
                    f"float targets of shape {tuple(target.shape)} are neither class indices nor probabilities that "
                    f"sum to 1 over dim 1, as loss={name!r} expects. Give indices, probabilities, or loss='mse'."
                )
        return
    is_index = target.ndim == output.ndim - 1 and (
        target.shape[1:] == output.shape[2:] or layout.has_classes_last(output, target)
    )
    if not is_index or target.shape[:1] != output.shape[:1]:
        expected = tuple(output.shape[:1] + output.shape[2:])
        hint = "try target.squeeze(1)" if target.ndim == 2 and target.shape[1] == 1 else "give such targets"
        if output.ndim == 1:
            hint = "let the module return an output of shape (samples, classes)"
        raise ValueError(
            f"output has shape {tuple(output.shape)} but target has shape {tuple(target.shape)}. {name!r} takes "
            f"class indices of shape {expected}: {hint}, or another loss, e.g. 'mse'."
        )
    classes = output.shape[-1 if output.ndim > 2 and layout.has_classes_last(output, target) else 1]
    for all_targets in known:
        _check_indices(all_targets.detach(), classes, name, ignore_index)


def _check_indices(target: Tensor, classes: int, name: str, ignore_index: int | None) -> None:
    if target.is_floating_point() and not bool((target == target.round()).all()):
        raise ValueError(
            f"float targets with values such as {float(target[target != target.round()][0]):g} are no class indices, "
            f"as loss={name!r} expects. Give whole numbers from 0 to {classes - 1}, or loss='mse'."
        )
    indices = target.long()
    if ignore_index is not None:
        indices = indices[indices != ignore_index]
    if indices.numel() == 0:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"target has class indices from {low} to {high}, but the output has {classes} classes, 0 to {classes - 1}. "
            f"Give the module {high + 1} outputs, or number the classes from 0."
        )


def check_values(output: Tensor, target: Tensor, name: str) -> None:
    """Raises where targets that are compared value by value have not the output's shape.

    Raises:
        ValueError: with the shapes, and how to make them equal.
    """
    if output.shape == target.shape:
        return
    hint = f"Give targets of shape {tuple(output.shape)}."
    if target.ndim == output.ndim - 1 and output.shape[-1] == 1:
        hint = "Try y[:, None], or let the module return output.squeeze(-1)."
    elif output.ndim == target.ndim - 1 and target.shape[-1] == 1:
        hint = "Try y.squeeze(-1), or let the module return output[:, None]."
    raise ValueError(
        f"output has shape {tuple(output.shape)} but target has shape {tuple(target.shape)}. {name!r} compares them "
        f"value by value, so the shapes must be equal (torch would broadcast them to something meant by nobody). {hint}"
    )


def sum_to_one(output: Tensor) -> bool:
    """Whether an output looks like a softmax's, judged by its values."""
    return len(output) >= MIN_SAMPLES_TO_JUDGE and are_probabilities(output.detach())


def come_from_a_sigmoid(output: Tensor) -> bool:
    """Whether a sigmoid made an output; the values cannot tell, since young logits often lie between 0 and 1."""
    node = output.grad_fn
    while node is not None and node.name().startswith(("Squeeze", "Unsqueeze", "View", "Select", "ToCopy")):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("Sigmoid")


def are_probabilities(values: Tensor) -> bool:
    """Whether all values are shares that sum to 1 over dim 1."""
    is_share = (values >= 0).all() & (values <= 1 + 1e-4).all()
    return bool(is_share & ((values.sum(1) - 1).abs() < 1e-3).all())
