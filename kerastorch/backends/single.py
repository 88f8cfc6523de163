"""One process on one device: CPU, CUDA, MPS or XPU; and what the verbs of a backend mean, here where they are simplest.

Where it runs: `place` puts the module there, once; `hold` says where data that is in memory is kept for gathering;
`feed` brings each batch to the device. With whom: `share` is this process's part of a global batch, of which `part`
says what it counts; `running` is what holds during a run, `network` what training calls for the module, `average` what
becomes of its gradients; `sum`, `gather` and `collect` bring together what each process has, `announce` what one has
for all, and `agree` ends a run for all at once. Where no process can call the whole module `step_for`,
`evaluation_for` and `predictor` say what is done instead, and `gather_state` puts the module together for whoever looks
at it. The loop and the step ask a backend for nothing else.

What is saved: `state` is that of a module or an optimizer as one process would have it, and `load` puts it back;
`whole` and `parted` do so for other tensors, `gathered` and `taken_up` for gradients of a step that is still to come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..recomputing import parts_to_recompute, recomputed, refuse_unknown
from ..structures import leaves, map_structure

# Share of the free device memory that data may take to live there, so that no batch is ever copied.
HELD_SHARE = 0.25

GPUS = ("cuda", "mps", "xpu")


class Whole:
    """What a process alone has of each batch, and what a mean over it counts: all."""

    samples: int | None = None  # how many; `None` = as many as there are
    whole: int | None = None  # of all processes

    def samples_of(self, rows: int) -> int:
        """How many of so many rows, of a batch or of a piece of one, count here."""
        return rows

    def expected(self, batches: int, count: float) -> float:
        """What the losses of so many batches will be means over, together, if each counts as much as this one."""
        return max(round(batches * count), 1)

    def counts(self, count: int | Tensor, samples: int, of: int) -> tuple[int | Tensor, int | Tensor | None]:
        """What the mean loss of `samples` rows, of a batch with `of`, counts here, and what it counts on the mean.

        `None` for the latter = that is known once all processes have added up the former.
        """
        return count, count


class Single:
    """Runs in this process, on one device.

    Args:
        device: As in torch: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`, `"xpu"`.
        checkpoint_activations: Which submodules keep no activations for the backward pass, but compute them again
            there, for less memory: `True` = the repeated blocks; names or patterns of submodules, such as
            `"encoder.layers.*"`; or classes of them. Default: none.
    Raises:
        ValueError: torch cannot use such a device here.
        TypeError: `checkpoint_activations` is none of these.
    """

    rank, world = 0, 1
    share: Callable[[int], tuple[slice, Any]] | None = None  # samples of a batch -> those taken here; `None` = all
    portion = 1.0  # which part of all samples are taken here, on the mean
    part: Any = Whole()  # what is here of the batch that `feed` gave last, as `share` said
    in_pieces = False  # whether a run cuts its batches into pieces of which the others know nothing
    starts_ranks = False  # whether `launch` must run a verb in processes of its own
    scratch: str | None = None  # where files go that another process writes; `None` = it is this one
    measures_parts = False  # whether each process measures its own part of the data, rather than one all of it
    leaves_gradients = True  # whether gradients are in the parameters when an optimizer step is made
    passes_are_common = False  # whether all processes must go through the module as often
    weighs_pieces = False  # whether a step asks what each loss of a piece is the mean over
    unable: Mapping[str, str] = {}  # what does not go with it -> why, and what to do

    def __init__(self, device: str | torch.device = "cpu", *, checkpoint_activations: Any = None) -> None:
        refuse_unknown(checkpoint_activations)
        self.checkpoint_activations = checkpoint_activations
        # With its number: batches that are there say "cuda:0", and "cuda" is not equal to that.
        self.device = real_device(torch.device(device))
        if self.device is None:
            raise ValueError(
                f"backend={str(device)!r} cannot be used: torch {torch.__version__} finds no such device here. "
                f'Give backend="cpu", or "auto" for the best there is.'
            )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} on {self.device}>"

    def __deepcopy__(self, memo: Any) -> Single:
        return self  # whoever is copied runs in the same place

    @property
    def looks_ahead(self) -> bool:
        """Whether `feed` takes a batch before the one before it is done with."""
        return self.device.type == "cuda"

    def place(self, module: nn.Module) -> nn.Module:
        """Moves the module's parameters and buffers to the device, in place."""
        parts_to_recompute(module, self.checkpoint_activations)  # an unknown name is refused here
        return module.to(self.device)

    def hold(self, tensors: list[Tensor]) -> list[Tensor]:
        """Tensors that batches will be gathered from, moved to the device where they take little of its memory."""
        if self.device.type != "cuda":
            return tensors
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        free, _ = torch.cuda.mem_get_info(self.device)
        return [tensor.to(self.device) for tensor in tensors] if needed < HELD_SHARE * free else tensors

    def feed(self, batches: Iterable[Any], ahead: bool = True) -> Iterator[Any]:
        """The same batches, on the device; with `ahead` the next one may be taken while this one is worked on."""
        if self.device.type == "cpu":
            return iter(batches)
        if self.device.type == "cuda" and ahead:
            return self._copied_ahead(batches)
        return (self.move(batch) for batch in batches)

    def move(self, tree: Any) -> Any:
        """All tensors of `tree`, on the device."""
        return map_structure(lambda leaf: leaf.to(self.device) if isinstance(leaf, Tensor) else leaf, tree)

    def cut(self) -> None:
        """Before values are read: has the device do what was asked of it, where it only takes note of it at first."""

    # What several processes would do together, for one.

    def running(self, module: nn.Module) -> AbstractContextManager:
        """What holds while the module is trained or measured."""
        return recomputed(module, self.checkpoint_activations)

    def by_itself(self) -> AbstractContextManager:
        """Meanwhile this process does everything as if there were no others; where it cannot, all do it together."""
        return nullcontext()

    def alone(self, function: Callable) -> Callable:
        """A function that computes, drawing random numbers that no other process draws."""
        return function

    def network(self, module: nn.Module) -> Callable:
        """What a training step calls for the module."""
        return module

    def step_for(self, step: Callable, compiled: Any) -> Callable:
        """What is called with the recipe and each batch in the place of `step.forward_backward`."""
        return step

    def evaluation_for(self, step: Callable, compiled: Any) -> Callable:
        """What is called with the recipe and each batch in the place of `step.evaluation_step`."""
        return step

    def predictor(self, network: Callable, compiled: Any) -> Callable:
        """What `predict` calls for the network, the module in its precision; `compiled` may be `None`."""
        return network

    def gather_state(self) -> None:
        """Within a run: has the whole module and its optimizers' states here, for who reads or changes all of them."""

    def expect_step(self, is_due: bool) -> None:
        """Before a batch: whether an optimizer step follows on it."""

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leaves the mean of all processes' gradients in the parameters, before an optimizer step."""

    def gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor | None]:
        """What this process has of the gradients that `average` has left."""
        return [parameter.grad for parameter in parameters]

    def clip_value(self, parameters: Sequence[nn.Parameter], bound: float) -> None:
        """Bounds each number of the gradients by itself."""
        if any(one.grad is not None for one in parameters):  # of none torch makes an error
            nn.utils.clip_grad_value_(parameters, bound)

    @staticmethod
    def clip_norm(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_`, with a norm that is whole where gradients are parts."""
        norm = nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def sum(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """The sums over all processes of scalars on the device."""
        return values

    def gather(self, output: Any) -> Any:
        """The output for the whole batch, of which each process has computed its part."""
        return output

    def collect(self, value: Any, of: str = "") -> list[Any]:
        """Plain data of all processes, in their order; `of` says what asks, which must be the same in all of them."""
        return [value]

    def announce(self, value: Any) -> Any:
        """What the process that measures has found, for all of them: plain data."""
        return value

    def state_dict(self) -> dict[str, Any]:
        """What this process needs beside the model to go on with a run: tensors and plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of the same process among as many."""

    def agree(self, wishes: list[bool], now: bool) -> list[bool]:
        """Which of several wishes any process has; where they need not be known `now`, nobody waits for the others."""
        return wishes

    # What is saved, of which each of several processes may hold a part.

    def whole(self, tree: Any) -> Any:
        """Nested containers with whole tensors where processes hold parts of one; all of them must ask."""
        return tree

    @contextmanager
    def apart(self, mark: Callable[[str, Tensor], Any]) -> Iterator[dict[str, Tensor]]:
        """Meanwhile `whole` leaves parts as they are: they get into a dict by names, and marks into their places."""
        yield {}

    def parted(self, tree: Any, module: nn.Module) -> Any:
        """What `whole` returned, with parts again of what has the name of a tensor of the module."""
        return tree

    def state(self, of: nn.Module | torch.optim.Optimizer) -> dict[str, Any]:
        """Its `state_dict`, of whole tensors; all processes must ask."""
        self.gather_state()
        return self.whole(of.state_dict())

    def load(self, into: nn.Module | torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Puts back what `state` returned; into a module whatever there is a place for."""
        into.load_state_dict(state, **({"strict": False} if isinstance(into, nn.Module) else {}))

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Called with each optimizer once it is made: has it step on this process's part."""

    def gathered(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Gradients of steps to come, to be saved: whole tensors, whose sum over the processes counts."""
        return gradients

    def taken_up(self, gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """What `gathered` returned, as it was in the parameters."""
        pairs = zip(gradients, parameters, strict=True)
        return [gradient if gradient is None else gradient.to(parameter.device) for gradient, parameter in pairs]

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


class CPU(Single):
    """Runs in this process, on the CPU.

    Args:
        checkpoint_activations: As in `Single`.
    """

    def __init__(self, *, checkpoint_activations: Any = None) -> None:
        super().__init__("cpu", checkpoint_activations=checkpoint_activations)


class GPU(Single):
    """Runs in this process, on one GPU: CUDA, MPS or XPU, the first of them that is really usable.

    Args:
        index: Its number. Default: 0.
        checkpoint_activations: As in `Single`.
    Raises:
        ValueError: there is none, or none of that number.
    """

    def __init__(self, index: int = 0, *, checkpoint_activations: Any = None) -> None:
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"index={index!r} is no number of a GPU. Give a whole number from 0 up.")
        kind = first_usable(GPUS)
        if kind is None:
            raise ValueError('backend="gpu" found no GPU that torch can use. Give backend="cpu".')
        super().__init__(torch.device(kind, index), checkpoint_activations=checkpoint_activations)


def first_usable(kinds: Sequence[str]) -> str | None:
    """The first kind of device that torch can really put something on."""
    return next((kind for kind in kinds if real_device(torch.device(kind)) is not None), None)


def real_device(device: torch.device) -> torch.device | None:
    """The device, with its number, if torch can really put something there; `None` if not.

    Asked by trying: a driver may be present, and the device be none that this torch knows.
    """
    try:
        tried = torch.ones(1, device=device)
        return tried.device if tried.add_(1).cpu() == 2 else None
    except (RuntimeError, AssertionError, NotImplementedError):
        return None
