"""Stages of one module in several processes, each batch in pieces that follow each other through the stages.

`torch.distributed.pipelining` moves the pieces and orders their forwards and backwards; decided here is what makes the
result that of one process on the whole batch:

- Pieces. A batch is cut as `torch.tensor_split` cuts it: sizes that differ by one at most. torch's schedules know one
  size, so the larger pieces and the smaller ones are two runs of a schedule, whose gradients add up; a batch size that
  `microbatches` divides needs one. Padding would have cost no second filling of the pipeline, but samples that are not
  there would count in BatchNorm's statistics and give losses without a meaning.
- Weights. A piece's mean loss counts by its part of what the batch's loss is the mean over: samples, or targets that
  are not masked, counted over the whole batch before the first piece starts.
- Shapes. Before the first run of a size, one piece goes through the stages alone, under a copy of random numbers and
  running statistics, and each stage tells the next what comes. torch's own way would train BatchNorm on a piece of
  zeros or of nothing.

What crosses between stages is in `crossing.py`, where a module is cut in `stages.py`. Every process goes through all
batches in the same order: stages read the inputs that they use, the last one the targets, and all need to know the
sizes. BatchNorm sees pieces, as in torch and in GPipe: a module that has it is trained as one process would with these
microbatches. Random numbers are each process's own; other layers draw the same ones in two processes of one seed.

How it takes part in a run is in `pipeline.py`; everything is called on all ranks, in the same order. Between `start`
and `finish` the whole module's own `forward` cannot be called, and of its tensors only those of this process's stages
are real; `optimizer.step`, schedules and `zero_grad` are used as ever. In a window of several batches `divisors` adds
the totals to those of the window and returns what it expects, the same for each batch; the gradients are multiplied by
expected / total when it closes.

Source: pieces and BatchNorm, Huang et al. 2019, "GPipe", section 2; 1F1B, Narayanan et al. 2021, "Efficient Large-Scale
Language Model Training on GPU Clusters Using Megatron-LM", section 2.2; torch.distributed.pipelining.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..structures import join, leaves, map_structure
from .crossing import (
    FillAndDrain,
    Part,
    Piece,
    Run,
    Sort,
    Way,
    changeable,
    identity,
    inputs_of,
    on_meta,
    received,
    sort_of,
    sort_to_cross,
    stage_class,
    to_send,
    unread_of,
    wire_sorts,
)
from .stages import Stage, named_tensors, split, unchanged

# Name -> (torch's class, whether ranks may have several stages).
SCHEDULES = {
    "gpipe": ("ScheduleGPipe", False),
    "1f1b": ("Schedule1F1B", False),
    "interleaved1f1b": ("ScheduleInterleaved1F1B", True),
    "loopedbfs": ("ScheduleLoopedBFS", True),
}
# Schedules and their buffers that are kept: sizes of batches, in train and in eval mode.
KEPT_SCHEDULES = 6


class Count(NamedTuple):
    """A mean loss and what it is the mean over; `losses.Share` is one too.

    Attributes:
        name: Losses of one name are means over the same.
        loss: The mean, with a graph.
        count: How many it is the mean over; `None` = it is a sum.
    """

    name: Any
    loss: Tensor
    count: int | Tensor | None


class Engine:
    """Runs a module in stages, one process for each, or for several.

    Args:
        stages: How many; `"auto"` = one for each process, or two with a schedule that interleaves stages.
        microbatches: Pieces of each batch; a smaller batch is cut into samples. `"auto"` = four for each stage, which
            leaves at most a fifth of the time idle; more leave less and make smaller pieces.
        schedule: `"gpipe"`, `"1f1b"` (the memory of fewer pieces), or with several stages for each process
            `"interleaved1f1b"` or `"loopedbfs"`.
        balance: `"parameters"`, `"time"`, or where the stages begin: see `stages.split`.
        checkpoint_activations: Whether units compute their activations again in the backward pass rather than keep
            them; or a glob of the names of submodules that do.
        device: Of this process. Default: the current CUDA device if there is one, else the CPU.
    Raises:
        ValueError: an option that is unknown or fits no other.
        TypeError: one of a wrong type.
    """

    def __init__(
        self,
        stages: int | str = "auto",
        microbatches: int | str = "auto",
        schedule: str = "1f1b",
        balance: str | Sequence[int | str] = "parameters",
        checkpoint_activations: bool | str = False,
        device: torch.device | str | None = None,
    ) -> None:
        _check_count("stages", stages)
        _check_count("microbatches", microbatches)
        self.schedule = str(schedule).lower().replace("_", "").replace("-", "")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r} is not known. Give one of {', '.join(map(repr, SCHEDULES))}.")
        if isinstance(balance, str) and balance not in ("parameters", "time"):
            raise ValueError(
                f"balance={balance!r} is not known. Give 'parameters', 'time' or a list of where stages begin."
            )
        if not isinstance(checkpoint_activations, (bool, str)):
            raise TypeError(
                f"checkpoint_activations={checkpoint_activations!r} is a {type(checkpoint_activations).__name__}; "
                f"expected True, False or a glob of names of submodules."
            )
        self.wanted_stages, self.wanted_microbatches, self.wanted_device = stages, microbatches, device
        self.balance, self.checkpoint_activations = balance, checkpoint_activations
        self._forget()

    @property
    def is_last(self) -> bool:
        """Whether outputs and losses are computed in this process."""
        return self.rank == self.last_rank

    # The life of a run.

    def start(
        self,
        module: nn.Module,
        x: Any,
        context: Callable[[], AbstractContextManager] = nullcontext,
        cut: Any = None,
    ) -> None:
        """Takes the module apart: this process keeps its stages, with the weights of rank 0, on its device.

        Parameters and buffers of other stages are on the meta device until `finish`, their memory is free.

        Args:
            module: The same on all ranks but for the weights.
            x: Inputs of a few samples, as the module will get them.
            context: What forwards and losses run in, such as autocast.
            cut: The `cut` of an earlier start with the same module; `None` = it is still to be cut.
        Raises:
            ValueError: the module cannot be cut so, or not into stages for so many processes.
        """
        self.meet()
        self.cut = cut or split(module, self.stages, x, self.balance, self.device, agree=self._of_first)
        self._recomputed = self._to_recompute(module)
        self._module, self._context = module, context
        self._signature = inspect.signature(module.forward)
        self._homes = {name: tensor.device for name, tensor in named_tensors(module)}
        self._share_weights()
        self._foreign = _let_go(module, {name for name, stage in self.cut.stage_of.items() if stage not in self.own})
        for tensor in self._own_tensors().values():
            _put(tensor, tensor.data.to(self.device), tensor.grad)
        _flatten(module)
        for part in self._recomputed:
            part.forward = partial(_recompute, part, part.forward)
        self._parameters = [*module.parameters()]

    def finish(self) -> None:
        """Puts the module and the optimizers together again, on all ranks, where they were."""
        own = self._own_tensors()
        values = self._gathered(own)
        gradients = self._gathered({name: one.grad for name, one in own.items() if one.grad is not None})
        states = {optimizer: self._optimizer_state(optimizer) for optimizer in self._groups}
        for slot in self._foreign:
            slot.put_back()
        for name, tensor in named_tensors(self._module):
            _put(tensor, values[name].to(self._homes[name]), gradients.get(name))
        for optimizer, groups in self._groups.items():
            for group, parameters in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = parameters
            optimizer.load_state_dict(states[optimizer])
        self._end()

    def abandon(self) -> None:
        """After an error, which the other ranks may not have: what they have of the module is NaN here."""
        for slot in self._foreign:
            slot.put_back()
            empty = torch.zeros_like(slot.stand_in, device=slot.home)
            slot.given.data = empty.fill_(float("nan")) if empty.is_floating_point() else empty
        for optimizer, groups in self._groups.items():
            for group, parameters in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = parameters
        self._end()

    def _end(self) -> None:
        for part in self._recomputed:
            del part.forward
        _flatten(self._module)
        self._forget()

    def meet(self) -> None:
        """What the options mean among these processes."""
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(self.wanted_device) if self.wanted_device is not None else _local_device()
        self.stages = self._checked_stages(self.wanted_stages)
        self.microbatches = 4 * self.stages if self.wanted_microbatches == "auto" else self.wanted_microbatches
        self.own = range(self.rank, self.stages, self.world)
        self.last_rank = (self.stages - 1) % self.world

    def _forget(self) -> None:
        self._module: nn.Module | None = None
        self._foreign: list[_Slot] = []
        self._groups: dict[torch.optim.Optimizer, list[list[nn.Parameter]]] = {}
        self._known: dict[Any, Way] = {}
        self._runs: OrderedDict[Any, Run] = OrderedDict()

    # Computing.

    def train(
        self,
        batch: tuple[Any, Any, Any],
        criterion: Any,
        divisors: Callable[[dict[Any, Any]], Mapping[Any, Any]] | None = None,
    ) -> Tensor | None:
        """Adds the gradient of a batch's mean loss to the parameters of this process.

        Args:
            batch: Inputs, targets and weights, whole, on each rank; on this process's device where it uses them.
            criterion: Has `counts(output, target, samples)`: what the mean of each name is over, `None` for a sum, for
                an output on the meta device, on all ranks; and `shares(output, target, weight, samples)`: the mean
                losses of a piece, as `Count`s, for each in order, on the last rank.
            divisors: What the batch's losses are the mean over -> what each is divided by instead, by name; for
                gradients that are gathered over several batches. Default: the same.
        Returns:
            The mean loss on the last rank, without its graph; `None` on others.
        """
        pieces = self._pieces(*batch)
        totals = self._count(pieces, criterion)
        by = totals if divisors is None else divisors(totals)
        for piece in pieces:
            piece.divisors = by
        for group in _by_size(pieces):
            self._run(group, training=True, criterion=criterion)
        return sum(piece.loss for piece in pieces) if self.is_last else None

    @torch.no_grad()
    def forward(self, x: Any, to: str = "last") -> Any:
        """The module's output for a batch, in eval mode if the module is, without a graph.

        Args:
            x: Inputs, whole, on each rank.
            to: Which ranks get it: `"last"` or `"all"`.
        Returns:
            The output, of the whole batch; `None` where it was not asked for.
        """
        pieces = self._pieces(x, None, None)
        for group in _by_size(pieces):
            self._run(group, training=False)
        output = _joined(pieces) if self.is_last else None
        if to == "last" or self.world == 1:
            return output
        if output is None:
            output = self._expected_output(pieces)
        return map_structure(lambda leaf: self._passed(leaf, self.last_rank, None), output)

    def from_last(self, value: Tensor | float | None) -> Tensor:
        """A number of the last rank, on all: a scalar on the device."""
        number = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.is_last:
            number.copy_(torch.as_tensor(value).detach())
        dist.broadcast(number, self.last_rank)
        return number

    def clip_gradients(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scales gradients, in place, so that the norm over all stages is at most `max_norm`; returns it as it was."""
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([one.grad for one in parameters]) if parameters else torch.zeros(())
        # In one dtype on all ranks, of which some may have no gradients.
        squared = norm.to(self.device, torch.float64).square()
        dist.all_reduce(squared)
        norm = squared.sqrt().to(norm.dtype)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    # Optimizers, by the numbers of the whole module.

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Leaves the optimizer only what is trained in this process: parameters of its stages and their state.

        Raises:
            ValueError: the optimizer looks at all parameters together, as LBFGS does.
        """
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS looks at all parameters together, but each process of a pipeline has those of its stages. "
                "Give another optimizer, or another backend."
            )
        whole = optimizer.state_dict()
        self._groups[optimizer] = [list(group["params"]) for group in optimizer.param_groups]
        own = {id(tensor) for tensor in self._own_tensors().values()}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in own]
        optimizer.state.clear()
        if whole["state"]:
            self._load_optimizer_state(optimizer, whole)

    def _optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state_dict of an adopted optimizer as it would be of the whole module; all ranks must ask."""
        indices = self._indices(optimizer)
        own = {
            (indices[id(parameter)], key): value
            for parameter, values in optimizer.state.items()
            for key, value in values.items()
        }
        gathered = self._gathered(own)
        state: dict[int, dict[str, Any]] = {}
        for (index, key), value in sorted(gathered.items(), key=lambda item: item[0][0]):
            state.setdefault(index, {})[key] = value
        groups, first = [], 0
        for group, parameters in zip(optimizer.param_groups, self._groups[optimizer], strict=True):
            numbers = list(range(first, first + len(parameters)))
            groups.append({key: value for key, value in group.items() if key != "params"} | {"params": numbers})
            first += len(parameters)
        return {"state": state, "param_groups": groups}

    def _load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Puts the state of a plain optimizer into an adopted one; called on all ranks, each takes what is its own."""
        indices = self._indices(optimizer)
        own = [indices[id(parameter)] for parameter in _flat(optimizer)]
        places = {index: place for place, index in enumerate(own)}
        groups = []
        for group, now in zip(state["param_groups"], optimizer.param_groups, strict=True):
            numbers = [places[indices[id(parameter)]] for parameter in now["params"]]
            groups.append(dict(group) | {"params": numbers})
        kept = {places[index]: values for index, values in state["state"].items() if index in places}
        optimizer.load_state_dict({"state": kept, "param_groups": groups})

    # Pieces of a batch.

    def _pieces(self, x: Any, target: Any, weight: Any) -> list[Piece]:
        samples = len(next(leaf for leaf in leaves(x) if isinstance(leaf, Tensor)))
        number = min(self.microbatches, samples)
        small, larger = divmod(samples, number)
        sizes = [small + 1] * larger + [small] * (number - larger)
        pieces, first = [], 0
        for size in sizes:
            cut = partial(_cut, samples=samples, first=first, last=first + size)
            pieces.append(Piece(*(map_structure(cut, part) for part in (x, target, weight)), size))
            first += size
        return pieces

    def _count(self, pieces: list[Piece], criterion: Any) -> dict[Any, Any]:
        """What the losses of the pieces together are the mean over; of a sum `None`."""
        totals: dict[Any, Any] = {}
        for piece in pieces:
            output = map_structure(on_meta, self._way(piece, training=True).output)
            for name, count in criterion.counts(output, piece.target, piece.samples).items():
                totals[name] = count if count is None or name not in totals else totals[name] + count
        return totals

    def _expected_output(self, pieces: list[Piece]) -> Any:
        """Where the output of a batch will be received."""
        samples = sum(piece.samples for piece in pieces)
        known = self._way(pieces[0], training=False).output

        def whole(leaf: Any) -> Any:
            if not isinstance(leaf, Sort):
                return leaf
            shape = (samples, *leaf.shape[1:]) if len(pieces) > 1 else leaf.shape
            return torch.empty(shape, dtype=leaf.dtype, device=self.device)

        return map_structure(whole, known)

    # Schedules.

    def _run(self, pieces: list[Piece], training: bool, criterion: Any = None) -> None:
        """Pieces of one size, through all stages."""
        way = self._way(pieces[0], training)
        key = (way.key, len(pieces))
        run = self._runs.pop(key, None)
        if run is None:
            run = self._scheduled(way, len(pieces), training)
        self._runs[key] = run
        if len(self._runs) > KEPT_SCHEDULES:
            self._runs.popitem(last=False)
        run(pieces, criterion)

    def _scheduled(self, way: Way, number: int, training: bool) -> Run:
        parts = [self._part(index, way, training) for index in self.own]
        name = self._schedule_for(number, training)
        if name is None:
            schedule = FillAndDrain([*zip(self.own, parts, strict=True)], way, training, self.stages - 1, self.device)
        else:
            schedule = self._of_torch(name, parts, way, number, training)
        return Run(schedule, parts, number, self.is_last and training)

    def _schedule_for(self, number: int, training: bool) -> str | None:
        """The one that was asked for or one that computes the same; `None` where torch has none for so few pieces."""
        if number < self.world:
            return None
        if not SCHEDULES[self.schedule][1]:
            return self.schedule if training else "gpipe"
        is_whole = training and number % (number // self.world) == 0
        return self.schedule if is_whole else "loopedbfs"

    def _of_torch(self, name: str, parts: list[Part], way: Way, number: int, training: bool) -> Any:
        from torch.distributed import pipelining  # half a second that only pipelines need to spend

        kind, is_looped = SCHEDULES[name]
        stages = [self._torch_stage(part, index, way) for part, index in zip(parts, self.own, strict=True)]
        loss = identity if training else None
        return getattr(pipelining, kind)(stages if is_looped else stages[0], number, loss, scale_grads=False)

    def _part(self, index: int, way: Way, training: bool) -> Part:
        is_last = index == self.stages - 1
        stage, before, unread = self._stage(index), way.before[index], way.unread[index]
        return Part(stage, self._signature, before, unread, is_last, training, self._context)

    def _torch_stage(self, part: Part, index: int, way: Way) -> Any:
        """The stage in torch's terms, told all shapes, on the meta device: then no version computes them itself."""
        arriving = tuple(wire_sorts(way.before[index]))
        loss = torch.empty(1, device="meta", requires_grad=part.is_trained)
        leaving = (loss,) if part.is_last else tuple(wire_sorts(way.after[index]))
        kind = stage_class()
        return kind(part, index, self.stages, self.device, input_args=arriving, output_args=leaving)

    def _stage(self, index: int) -> Stage:
        return (self.cut.training if self._module.training else self.cut.evaluating)[index]

    # What crosses between stages.

    def _way(self, piece: Piece, training: bool) -> Way:
        """What the stages pass on for pieces of this shape: found out once."""
        training = training and torch.is_grad_enabled()
        mode = self._module.training
        sorts = tuple(sort_of(leaf) for leaf in leaves(piece.x))
        trained = tuple(parameter.requires_grad for parameter in self._parameters) if training else ()
        key = (training, mode, sorts, trained)
        if key not in self._known:
            self._known[key] = self._explored(key, piece, training)
        return self._known[key]

    def _explored(self, key: Any, piece: Piece, training: bool) -> Way:
        """One piece through all stages, without a schedule; nothing changes."""
        way, sent = Way(key), ()
        devices = [self.device] if self.device.type != "cpu" else []
        kind = self.device.type if devices else "cuda"
        for index in range(self.stages):
            sender, receiver = (index - 1) % self.world, index % self.world
            if self.rank not in (sender, receiver):
                continue
            if index and sender != receiver:
                sent = self._sent(sent, sender, receiver)
            if self.rank != receiver:
                continue
            stage = self._stage(index)
            arriving = map_structure(partial(received, device=self.device), sent)
            with (
                torch.random.fork_rng(devices, device_type=kind),
                unchanged(stage.graph),
                torch.set_grad_enabled(training),
                self._context(),
            ):
                own = map_structure(_copied, inputs_of(stage, self._signature, piece))
                leaving = stage.graph(*own, *map_structure(changeable, arriving))
            way.before[index] = map_structure(sort_of, arriving)
            way.after[index] = map_structure(sort_of if index == self.stages - 1 else sort_to_cross, leaving)
            way.unread[index] = unread_of(arriving, leaving)
            sent = map_structure(to_send, leaving)
        output = [way.after.get(self.stages - 1)]
        dist.broadcast_object_list(output, self.last_rank, device=self.device)
        way.output = output[0]
        return way

    def _sent(self, values: Any, sender: int, receiver: int) -> Any:
        if self.rank == sender:
            dist.send_object_list([values], receiver, device=self.device)
            return ()
        box = [None]
        dist.recv_object_list(box, sender, device=self.device)
        return box[0]

    # Weights and other values of all ranks.

    def _checked_stages(self, stages: int | str) -> int:
        interleaves = SCHEDULES[self.schedule][1]
        if stages == "auto":
            stages = self.world * (2 if interleaves and self.world > 1 else 1)
        if self.world == 1 and stages > 1:
            raise ValueError(
                f"stages={stages}, but there is one process. Start several, e.g. torchrun --nproc-per-node {stages}."
            )
        if interleaves and self.world > 1 and (stages % self.world or stages == self.world):
            raise ValueError(
                f"schedule={self.schedule!r} with stages={stages} does not give each of the {self.world} processes "
                f"several stages, as many to each. Give stages={2 * self.world}, or schedule='1f1b'."
            )
        if not interleaves and stages != self.world:
            raise ValueError(
                f"stages={stages}, but there are {self.world} processes, and schedule={self.schedule!r} has one stage "
                f"in each. Start {stages} processes, or give schedule='interleaved1f1b' for several stages in each."
            )
        return stages

    def _of_first(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    def _own_tensors(self) -> dict[str, Tensor]:
        names = self.cut.stage_of
        return {name: one for name, one in named_tensors(self._module) if names[name] in self.own}

    def _share_weights(self) -> None:
        """Each stage gets the weights that rank 0 has for it."""
        for name, tensor in named_tensors(self._module):
            owner = self.cut.stage_of[name] % self.world
            if owner and self.rank in (0, owner):
                arrived = self._passed(tensor.detach().to(self.device), 0, owner)
                tensor.data.copy_(arrived)

    def _gathered(self, own: Mapping[Any, Any]) -> dict[Any, Any]:
        """What all ranks have, tensors on the CPU, on all; one tensor at a time."""
        tables = [None] * self.world
        dist.all_gather_object(tables, {key: sort_of(value) for key, value in own.items()})
        gathered = {}
        for owner, table in enumerate(tables):
            for key, sort in table.items():
                value = sort
                if isinstance(sort, Sort):
                    mine = own[key].detach().to(self.device) if self.rank == owner else None
                    if mine is None:
                        mine = torch.empty(sort.shape, dtype=sort.dtype, device=self.device)
                    value = self._passed(mine, owner, None).to("cpu", copy=True)
                gathered[key] = value
        return gathered

    def _passed(self, tensor: Any, sender: int, receiver: int | None) -> Any:
        """A tensor of the sender, on the receiver, or with `None` on all; a place for it is given on these."""
        if not isinstance(tensor, Tensor) or receiver == sender:
            return tensor
        raw = tensor.contiguous()
        bits = raw.reshape(-1).view(torch.uint8)  # any dtype: a backend may not know some
        if receiver is None:
            dist.broadcast(bits, sender)
        elif self.rank == sender:
            dist.send(bits, receiver)
        elif self.rank == receiver:
            dist.recv(bits, sender)
        return raw

    def _indices(self, optimizer: torch.optim.Optimizer) -> dict[int, int]:
        """Each parameter of the whole optimizer -> its number in a state_dict."""
        every = (parameter for group in self._groups[optimizer] for parameter in group)
        return {id(parameter): index for index, parameter in enumerate(every)}

    # Activation checkpointing.

    def _to_recompute(self, module: nn.Module) -> list[nn.Module]:
        """Submodules of this process's stages whose activations are computed again: units, or what is inside."""
        wanted = "*" if self.checkpoint_activations is True else self.checkpoint_activations
        units = self.cut.units
        if not wanted:
            return []
        chosen: list[str] = []
        for name, _ in module.named_modules():
            is_inside = any(_is_in(name, unit) for names in units for unit in names)
            is_meant = fnmatchcase(name, wanted) or fnmatchcase(name, f"{wanted}.*")
            # What is in one that is chosen is computed again with it.
            if is_inside and is_meant and not any(_is_in(name, one) for one in chosen):
                chosen.append(name)
        if not chosen:
            known = ", ".join(name for names in units for name in names)
            raise ValueError(
                f"checkpoint_activations={wanted!r} is the name or glob of no submodule in a stage. Units are {known}."
            )
        own = [unit for index in self.own for unit in units[index]]
        mine = [name for name in chosen if any(_is_in(name, unit) for unit in own)]
        return list(dict.fromkeys(map(module.get_submodule, mine)))


# Pieces.


def _cut(leaf: Any, samples: int, first: int, last: int) -> Any:
    is_of_samples = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == samples
    return leaf[first:last] if is_of_samples else leaf


def _copied(leaf: Any) -> Any:
    """For a layer that changes its inputs."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _by_size(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Larger ones first, as they lie in the batch."""
    for size in dict.fromkeys(piece.samples for piece in pieces):
        yield [piece for piece in pieces if piece.samples == size]


def _joined(pieces: list[Piece]) -> Any:
    """The output of the whole batch."""
    if len(pieces) == 1:
        return pieces[0].output

    def together(parts: list[Any]) -> Any:
        if not isinstance(parts[0], Tensor):
            return parts[0]
        if any(part.ndim == 0 or len(part) != piece.samples for part, piece in zip(parts, pieces, strict=True)):
            raise ValueError(
                f"the module returned a tensor of shape {tuple(parts[0].shape)} for {pieces[0].samples} samples; in a "
                f"pipeline outputs of microbatches are put together along their first axis, which must be that of the "
                f"samples."
            )
        return torch.cat(parts)

    return join([piece.output for piece in pieces], together)


# Tensors of other stages.


@dataclass
class _Slot:
    """Where a parameter or buffer of another stage was, and will be again."""

    owner: nn.Module
    key: str
    given: Tensor
    stand_in: Tensor
    home: torch.device

    def put_back(self) -> None:
        self.given.requires_grad_(self.stand_in.requires_grad)
        self._table()[self.key] = self.given

    def put_away(self) -> None:
        self._table()[self.key] = self.stand_in

    def _table(self) -> dict[str, Any]:
        is_parameter = isinstance(self.given, nn.Parameter)
        return self.owner._parameters if is_parameter else self.owner._buffers


def _let_go(module: nn.Module, names: set[str]) -> list[_Slot]:
    """Frees the memory of parameters and buffers; in their places are tensors on the meta device."""
    foreign = {id(tensor) for name, tensor in named_tensors(module) if name in names}
    stand_ins: dict[int, Tensor] = {}
    slots = []
    for owner in module.modules():
        for key, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is None or id(tensor) not in foreign:
                continue
            if id(tensor) not in stand_ins:
                empty = torch.empty_like(tensor, device="meta")
                is_parameter = isinstance(tensor, nn.Parameter)
                stand_ins[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            slots.append(_Slot(owner, key, tensor, stand_ins[id(tensor)], tensor.device))
    for slot in slots:
        slot.put_away()
        slot.given.grad = None
        slot.given.data = slot.given.data.new_empty(0)
    return slots


def _put(tensor: Tensor, values: Tensor, gradient: Tensor | None) -> None:
    """Gives a tensor other values, of any device, and a gradient there."""
    tensor.grad = None
    tensor.data = values
    tensor.grad = None if gradient is None else gradient.to(values.device)


def _flatten(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.RNNBase) and not any(weight.is_meta for weight in part.parameters()):
            part.flatten_parameters()


def _flat(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# Activation checkpointing.


def _is_in(name: str, around: str) -> bool:
    return name == around or name.startswith(f"{around}.")


def _recompute(module: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=partial(_contexts, module), **kwargs)


def _contexts(module: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """For the forward and its second time, in which running statistics do not count a batch twice."""
    return nullcontext(), unchanged(module)


# Options.


def _check_count(name: str, value: Any) -> None:
    if value == "auto":
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}, expected a whole number or 'auto'.")
    if value < 1:
        raise ValueError(f"{name}={value} is less than 1. Give a whole number from 1 up, or 'auto'.")


def _local_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
