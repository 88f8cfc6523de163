"""One process on one device: CPU, CUDA, MPS or XPU; and what the verbs of a backend mean, here where they are simplest.

`place` puts the module where it runs, once. `hold` says where data that is in memory is kept for gathering. `feed`
brings each batch to the device. The loop and the step ask a backend for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..structures import leaves, map_structure

# Share of the free device memory that data may take to live there, so that no batch is ever copied.
HELD_SHARE = 0.25


class Single:
    """Runs in this process, on one device.

    Args:
        device: As in torch: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`, `"xpu"`.
    Raises:
        ValueError: torch cannot use such a device here.
    """

    rank, world = 0, 1

    def __init__(self, device: str | torch.device = "cpu") -> None:
        # With its number: batches that are there say "cuda:0", and "cuda" is not equal to that.
        self.device = real_device(torch.device(device))
        if self.device is None:
            raise ValueError(
                f"backend={str(device)!r} cannot be used: torch {torch.__version__} finds no such device here. "
                f'Give backend="cpu", or "auto" for the best there is.'
            )

    @property
    def looks_ahead(self) -> bool:
        """Whether `feed` takes a batch before the one before it is done with."""
        return self.device.type == "cuda"

    def place(self, module: nn.Module) -> nn.Module:
        """Moves the module's parameters and buffers to the device, in place."""
        return module.to(self.device)

    def hold(self, tensors: list[Tensor]) -> list[Tensor]:
        """Tensors that batches will be gathered from, moved to the device where they take little of its memory."""
        if self.device.type != "cuda":
            return tensors
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        free, _ = torch.cuda.mem_get_info(self.device)
        return [tensor.to(self.device) for tensor in tensors] if needed < HELD_SHARE * free else tensors

    def feed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches, on the device."""
        if self.device.type == "cpu":
            return iter(batches)
        if self.device.type == "cuda":
            return self._copied_ahead(batches)
        return (self.move(batch) for batch in batches)

    def move(self, tree: Any) -> Any:
        """All tensors of `tree`, on the device."""
        return map_structure(lambda leaf: leaf.to(self.device) if isinstance(leaf, Tensor) else leaf, tree)

    def _copied_ahead(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Copies the next batch on a stream of its own while the device works on this one."""
        stream = torch.cuda.Stream(self.device)
        waiting = None
        for batch in batches:
            ahead = self._start_copy(batch, stream)
            if waiting is not None:
                yield self._arrived(*waiting)
            waiting = ahead
        if waiting is not None:
            yield self._arrived(*waiting)

    def _start_copy(self, batch: Any, stream: torch.cuda.Stream) -> tuple[Any, torch.cuda.Event]:
        def copy(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.device == self.device:
                return leaf
            if leaf.device.type != "cpu":  # only the host's memory can be pinned
                return leaf.to(self.device, non_blocking=True)
            # Only from pinned memory does a copy run beside the host.
            return (leaf if leaf.is_pinned() else leaf.pin_memory()).to(self.device, non_blocking=True)

        with torch.cuda.stream(stream):
            return map_structure(copy, batch), stream.record_event()

    def _arrived(self, batch: Any, copied: torch.cuda.Event) -> Any:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(copied)  # on the device: the host does not wait
        for leaf in leaves(batch):
            if isinstance(leaf, Tensor):
                leaf.record_stream(stream)  # else the allocator could reuse its memory while the step still reads it
        return batch


def real_device(device: torch.device) -> torch.device | None:
    """The device, with its number, if torch can really put something there; `None` if not.

    Asked by trying: a driver may be present, and the device be none that this torch knows.
    """
    try:
        tried = torch.ones(1, device=device)
        return tried.device if tried.add_(1).cpu() == 2 else None
    except (RuntimeError, AssertionError, NotImplementedError):
        return None
