"""What crosses between the stages of a pipeline, and how torch's schedules call a stage.

Schedules send tensors, all with gradients, of shapes that they know before: here, each tensor between two stages is a
wire, a float that lies in one piece. What has no gradient (masks, indices, what frozen layers return) is wired as the
bits of floats, and its gradient is zero: versions of torch before 2.13 send nothing else. What is no tensor is known
from the piece that found the shapes out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..structures import detached, leaves, map_structure
from .stages import Stage, bound


@dataclass
class Piece:
    """A part of a batch.

    Attributes:
        x: Inputs.
        target: Targets.
        weight: Weights of the samples.
        samples: How many it has.
        divisors: Name -> what the loss times its count is divided by.
        output: What the last stage returned, without its graph; kept where it was asked for.
        loss: Its part of the batch's mean loss; on the last rank.
    """

    x: Any
    target: Any
    weight: Any
    samples: int
    divisors: Mapping[Any, Any] = field(default_factory=dict)
    output: Any = None
    loss: Tensor | None = None


@dataclass(frozen=True)
class Sort:
    """Shape and dtype of a tensor, and whether a gradient comes back for it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    has_gradient: bool


@dataclass
class Way:
    """What crosses between stages, for pieces of one shape; of the stages of this process.

    Attributes:
        key: What shape that is.
        before: Stage -> the structure of what arrives, with a `Sort` in the place of each tensor.
        after: Stage -> the same of what it returns.
        unread: Stage -> numbers of arriving tensors that no gradient comes back for.
        output: The structure of the module's output, on all ranks.
    """

    key: Any
    before: dict[int, Any] = field(default_factory=dict)
    after: dict[int, Any] = field(default_factory=dict)
    unread: dict[int, frozenset[int]] = field(default_factory=dict)
    output: Any = None


class Part(nn.Module):
    """A stage as torch's schedules call it: tensors in, tensors out, and the number of the piece.

    The last one returns the piece's part of the loss, so that torch neither keeps nor joins outputs.
    """

    def __init__(
        self,
        stage: Stage,
        signature: inspect.Signature,
        before: Any,
        unread: frozenset[int],
        is_last: bool,
        training: bool,
        context: Callable[[], AbstractContextManager],
    ) -> None:
        super().__init__()
        self.graph = stage.graph
        self.stage, self.signature, self.before = stage, signature, before
        self.is_last, self.is_trained, self.context, self.unread = is_last, training, context, unread
        self.pieces: list[Piece] = []
        self.criterion: Any = None

    def forward(self, *wires: Tensor, index: Tensor) -> Tensor | tuple[Tensor, ...]:
        piece = self.pieces[int(index)]
        with self.context():
            arriving = map_structure(changeable, _unwired(self.before, wires))
            leaving = self.graph(*inputs_of(self.stage, self.signature, piece), *arriving)
            results = [self._end(piece, leaving)] if self.is_last else _wired(leaving)
        if self.is_trained:
            results[0] = self._tied(results[0], wires)
        return results[0] if self.is_last else tuple(results)

    def _end(self, piece: Piece, output: Any) -> Tensor:
        if not self.is_trained:
            piece.output = map_structure(detached, output)
            return torch.zeros(1)
        shares = self.criterion.shares(output, piece.target, piece.weight, piece.samples)
        parts = [_weighted(share, piece.divisors[share.name]) for share in shares]
        # A mean of nothing is NaN, but counts nothing.
        numbers = [part.detach() for part in parts]
        piece.loss = sum(
            number if not isinstance(share.count, Tensor) else torch.where(share.count > 0, number, 0.0)
            for share, number in zip(shares, numbers, strict=True)
        )
        # Not a view: torch detaches what is none in place, and so frees the graph before the schedule is over.
        return torch.stack([sum(parts).float()])

    def _tied(self, result: Tensor, wires: Sequence[Tensor]) -> Tensor:
        """The same, whose backward gives every wire a gradient, of zeros if need be: the stage before waits for it."""
        loose = [wires[number] for number in self.unread]
        if loose:
            return _Tied.apply(result, *loose)
        return result if result.requires_grad else result.detach().requires_grad_()


class Run:
    """One schedule, for so many pieces of one shape."""

    def __init__(self, schedule: Any, parts: list[Part], number: int, has_targets: bool) -> None:
        self.schedule, self.parts = schedule, parts
        # On the CPU, where reading them waits for nothing.
        self.index = torch.arange(number)
        self.targets = self.index if has_targets else None

    def __call__(self, pieces: list[Piece], criterion: Any) -> None:
        for part in self.parts:
            part.pieces, part.criterion = pieces, criterion
        try:
            self.schedule.step(index=self.index, target=self.targets)
        finally:
            for part in self.parts:
                part.pieces, part.criterion = [], None


class _Tied(torch.autograd.Function):
    """`result`; the others get gradients of zeros."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *others: Tensor) -> Tensor:
        ctx.sorts = [(other.shape, other.dtype, other.device) for other in others]
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.sorts)


class _Changeable(torch.autograd.Function):
    """The same memory, which is no leaf."""

    @staticmethod
    def forward(ctx: Any, wire: Tensor) -> Tensor:
        return wire.data  # not a view: what a function returns as one may not be changed either

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def changeable(leaf: Any) -> Any:
    """An arrived tensor that a layer may change in place, as `nn.ReLU(inplace=True)` does, though it has a gradient."""
    return _Changeable.apply(leaf) if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


class FillAndDrain:
    """All forwards, then all backwards, stage by stage: for fewer pieces than processes.

    torch's schedules for one stage in each process refuse so few, and those for several mix up messages before 2.10.
    """

    def __init__(
        self, parts: list[tuple[int, Part]], way: Way, training: bool, last: int, device: torch.device
    ) -> None:
        self.parts, self.way, self.training, self.last, self.device = parts, way, training, last, device
        self.world = dist.get_world_size()

    def step(self, index: Tensor, target: Tensor | None) -> None:
        self.works: list[dist.Work] = []
        self.kept: list[Tensor] = []  # what is being sent
        done = {(stage, int(one)): self._forward(stage, part, one) for stage, part in self.parts for one in index}
        for stage, _ in reversed(self.parts) if self.training else ():
            for number in range(len(index)):
                self._backward(stage, *done[stage, number])
        for work in self.works:
            work.wait()
        self.works, self.kept = [], []

    def _forward(self, stage: int, part: Part, number: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What a stage takes and returns."""
        wires = self._received(self.way.before[stage], stage - 1) if stage else []
        wires = [wire.requires_grad_(self.training) for wire in wires]
        results = part(*wires, index=number)
        if stage == self.last:
            return wires, [results]
        self._send(results, stage + 1)
        return wires, [*results]

    def _backward(self, stage: int, wires: list[Tensor], results: list[Tensor]) -> None:
        gradients = self._received(self.way.after[stage], stage + 1) if stage < self.last else [None]
        pairs = [pair for pair in zip(results, gradients, strict=True) if pair[0].requires_grad]
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
        if stage:
            self._send([wire.grad for wire in wires], stage - 1)

    def _received(self, structure: Any, stage: int) -> list[Tensor]:
        arrived = [torch.empty_like(sort, device=self.device, requires_grad=False) for sort in wire_sorts(structure)]
        for wire in arrived:
            dist.recv(wire, stage % self.world)
        return arrived

    def _send(self, tensors: Iterable[Tensor], stage: int) -> None:
        for tensor in tensors:
            self.kept.append(tensor.detach().contiguous())
            self.works.append(dist.isend(self.kept[-1], stage % self.world))


@functools.cache
def stage_class() -> type:
    from torch.distributed.pipelining import PipelineStage

    class Stage(PipelineStage):
        def _get_init_p2p_neighbors_ops(self) -> list:
            # torch 2.9 greets the neighbours with 8 bytes where they wait for 4, of which gloo dies. The processes have
            # met by then.
            return []

    return Stage


def identity(output: Tensor, target: Tensor) -> Tensor:
    return output


def _weighted(share: Any, divisor: Any) -> Tensor:
    if share.count is None:
        return share.loss
    if isinstance(divisor, Tensor):
        divisor = torch.where(divisor > 0, divisor, 1)
        return share.loss * share.count / divisor  # not their quotient, a float32
    return share.loss * (share.count / divisor)


def inputs_of(stage: Stage, signature: inspect.Signature, piece: Piece) -> list[Any]:
    if not stage.arguments:
        return []
    given = bound(signature, piece.x)
    return [given[name] for name in stage.arguments]


def sort_of(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return Sort(tuple(leaf.shape), leaf.dtype, leaf.requires_grad)


def sort_to_cross(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_complex() and leaf.requires_grad:
        raise ValueError(
            f"a complex tensor of shape {tuple(leaf.shape)} with a gradient would have to pass from one stage to the "
            f"next, which takes real ones. Give balance so that no cut goes through complex layers."
        )
    return sort_of(leaf)


def on_meta(leaf: Any) -> Any:
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") if isinstance(leaf, Sort) else leaf


def wire_sorts(structure: Any) -> Iterator[Tensor]:
    for sort in leaves(structure):
        if isinstance(sort, Sort) and sort.dtype.is_floating_point:
            yield torch.empty(sort.shape, dtype=sort.dtype, device="meta", requires_grad=True)
        elif isinstance(sort, Sort):
            yield torch.empty(-(-_bytes(sort) // 4), device="meta", requires_grad=True)


def _bytes(sort: Sort) -> int:
    return torch.Size(sort.shape).numel() * sort.dtype.itemsize


def _wired(values: Any) -> list[Tensor]:
    """The tensors as floats that lie in one piece."""
    wires = []
    for leaf in leaves(values):
        if not isinstance(leaf, Tensor):
            continue
        leaf = leaf.contiguous()
        if not leaf.dtype.is_floating_point:
            bits = leaf.reshape(-1).view(torch.uint8)
            leaf = torch.nn.functional.pad(bits, (0, -len(bits) % 4)).view(torch.float32)
        wires.append(leaf)
    return wires


def _unwired(structure: Any, wires: Sequence[Tensor]) -> Any:
    arrived = iter(wires)

    def put(sort: Any) -> Any:
        if not isinstance(sort, Sort):
            return sort
        wire = next(arrived)
        if sort.has_gradient:
            return wire
        if sort.dtype.is_floating_point:
            return wire.detach()
        return wire.detach().view(torch.uint8)[: _bytes(sort)].view(sort.dtype).reshape(sort.shape)

    return map_structure(put, structure)


@dataclass(frozen=True)
class _Sent:
    """A tensor on its way, on the CPU, without its graph."""

    tensor: Tensor
    has_gradient: bool


def to_send(leaf: Any) -> Any:
    return _Sent(leaf.detach().cpu(), leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def received(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, _Sent):
        return leaf
    return leaf.tensor.detach().to(device).requires_grad_(leaf.has_gradient)


def unread_of(arriving: Any, leaving: Any) -> frozenset[int]:
    """Numbers of the arriving tensors that `leaving` was not computed from by a differentiable way."""
    tensors = [leaf for leaf in leaves(arriving) if isinstance(leaf, Tensor)]
    waiting = [leaf.grad_fn for leaf in leaves(leaving) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    read, seen = set[int](), set(waiting)
    while waiting:
        node = waiting.pop()
        read.add(id(getattr(node, "variable", None)))
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                waiting.append(before)
    return frozenset(number for number, leaf in enumerate(tensors) if id(leaf) not in read)
