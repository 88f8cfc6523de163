"""Learning rates of parameter groups, which may be tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Gives a parameter group another learning rate."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)  # in place: a captured graph reads the rate from this very tensor
    else:
        group["lr"] = float(rate)
