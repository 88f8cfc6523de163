"""What can be known of a loss, and of an output by how it was computed; and what outputs and targets are called."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ..losses import FUNCTIONS, Loss, known_name

# Last operation of a module -> between what its outputs stay.
REACH = {"Sigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0), "Tanh": (-1.0, 1.0), "Relu": (0.0, math.inf)}
# Operations that leave values as they are.
PASSES = ("Squeeze", "Unsqueeze", "View", "Select", "Reshape", "UnsafeView", "ToCopy", "T", "Transpose", "Permute")


def kind_of(loss: Loss) -> str | None:
    """The name in `losses.FUNCTIONS` that a loss goes by, be it torch's function or module; `None` = the user's own."""
    function = getattr(loss.function, "func", loss.function)
    if isinstance(function, nn.Module):
        is_torchs = type(function).__module__.startswith("torch.nn.")
        return known_name(type(function).__name__) if is_torchs else None
    return next((name for name, (known, _) in FUNCTIONS.items() if known is function), None)


def last_operation(output: Tensor) -> str:
    """The name that autograd has for what made the values of an output, such as `"Relu"`; "" where it has none."""
    node = output.grad_fn
    while node is not None and _operation(node) in PASSES:
        node = node.next_functions[0][0]
    return "" if node is None else _operation(node)


def _operation(node: Any) -> str:
    return node.name().partition("Backward")[0]


def output_called(name: str) -> str:
    """How messages call the output with this name."""
    return f"outputs[{name!r}]" if name else "outputs"


def target_called(name: str) -> str:
    """How messages call the targets with this name."""
    return f"y[{name!r}]" if name else "y"
