"""How fast a device is, so that ranks can share out their work in proportion."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

WARM_UP_S, MEASURED_S = 0.1, 0.3
CPU_SIZE, GPU_SIZE = 256, 4096  # of matrices that keep the device busy for about a millisecond
STEPS = 10  # weights are told apart in tenths of the fastest: equal machines shall have equal parts


def multiplications_per_s(device: torch.device) -> float:
    """Multiplications of matrices that the device does in a second now, beside whatever else it does."""
    size = CPU_SIZE if device.type == "cpu" else GPU_SIZE
    matrix, product = torch.ones(size, size, device=device), torch.empty(size, size, device=device)

    def done_in(seconds: float) -> float:
        began, count = time.perf_counter(), 0
        while (took := time.perf_counter() - began) < seconds or not count:
            torch.mm(matrix, matrix, out=product)
            if device.type != "cpu":
                torch.get_device_module(device).synchronize()
            count += 1
        return count / took

    done_in(WARM_UP_S)
    return done_in(MEASURED_S)


def as_weights(speeds: Sequence[float]) -> list[float]:
    """Speeds in tenths of the fastest, at least one."""
    return [max(round(STEPS * speed / max(speeds)), 1) / STEPS for speed in speeds]
