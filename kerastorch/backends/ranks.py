"""Several processes that train together, each on its part of every global batch: what DDP and FSDP have in common.

A global batch of N samples is cut into contiguous parts, one for each rank. A mean over the n samples of one part
counts n / (N / world) in the mean over all ranks: so gradients, averaged over the ranks, and the sums behind metrics
are those of one process, however uneven the parts are. A rank that gets no sample computes one of another's, which
counts nothing: so it takes part in all that the ranks do together.

Random numbers that the data is drawn with are the same on all ranks; those that a step draws (dropout) are each rank's.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from itertools import accumulate, count, pairwise
from math import ceil
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parameter import is_lazy

from ..missing import missed, refuse_other_askers
from ..structures import join, map_structure
from .single import Single
from .speed import as_weights, multiplications_per_s

GPUS = ("cuda", "xpu")
_HOSTS: dict[tuple[Any, float], Any] = {}  # one group for all backends of a process: each has threads and sockets
_MEETINGS = count()
SCRATCH = "KERASTORCH_SCRATCH"  # variable of the environment: where ranks that must not write put what they write
MEETING_S = 120.0  # processes that begin to import torch on a busy machine are far apart
AGREE_S, MOST_CALLS = 0.1, 100  # how long one rank's wish to end may wait, and for how many batches


class Part(NamedTuple):
    """What a rank has of a global batch, and what a mean over it counts.

    Attributes:
        samples: How many; 0 = one of another rank's is in their place.
        whole: How many the global batch has.
        mean: How many the ranks have on the mean.
        most: How many the rank with the most of them has.
    """

    samples: int
    whole: int
    mean: float
    most: int

    def samples_of(self, rows: int) -> int:
        return min(rows, self.samples)

    def expected(self, batches: int, count: float) -> float:
        """As many as there are samples, whatever is counted: it must be the same number on all ranks."""
        return batches * self.mean

    def counts(self, count: int | Tensor, samples: int, of: int) -> tuple[int | Tensor, int | Tensor | None]:
        if isinstance(count, int) and count == samples:
            return min(samples, self.samples), self.mean * samples / of
        return count if self.samples else 0 * count, None


class Ranks(Single):
    """One of several processes; or, where there are none yet, the one that starts them when there is something to do.

    Args:
        devices: Processes on this machine: `"auto"` = as many as `torchrun` started, or one for each GPU; a number, of
            CPU processes where there are no GPUs; or the numbers of the GPUs.
        num_nodes: Machines; more than one are started by `torchrun`. `None` = as many as it did.
        weights: How much of each batch each rank takes, in proportion; `"auto"` = as fast as its device multiplies
            matrices when the ranks meet; `None` = all the same.
        timeout_s: Seconds that a rank waits for the others before it gives up; for them to start, `MEETING_S` at least.
        checkpoint_activations: As in `Single`.
    Raises:
        ValueError, TypeError: no such devices; or `torchrun` has started other processes than asked for.
    """

    def __init__(
        self,
        devices: str | int | Sequence[int],
        num_nodes: int | None,
        weights: str | Sequence[float] | None,
        timeout_s: float,
        checkpoint_activations: Any,
    ) -> None:
        self.devices, self.num_nodes, self.weights, self.timeout_s = devices, num_nodes, weights, timeout_s
        _refuse_no_devices(devices, num_nodes, timeout_s)
        _refuse_no_weights(weights)
        self._asked: tuple[Any, Tensor] | None = None
        self._calls, self._every, self._agreed_at = 0, 1, time.monotonic()
        self.own_random: Tensor | None = None  # those that this rank alone draws
        self._is_running = False
        self.is_joined = self.starts_ranks = False
        self.checkpoint_activations = checkpoint_activations
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            self.join()
            return
        self.processes = _processes(devices)
        self._refuse_other_weights(self.processes)
        self.starts_ranks = self.processes > 1
        if devices == "auto" and not _gpus():
            warnings.warn(
                f"{type(self).__name__}() found no GPUs here, so that one process trains. Give {type(self).__name__}"
                f"(devices=2) for two processes on the CPU, or start the script with torchrun --nproc-per-node=2.",
                stacklevel=3,
            )
        if (num_nodes or 1) > 1:
            raise ValueError(
                f"num_nodes={num_nodes} was given to a process by itself. Start the script on each machine with "
                f"torchrun --nnodes={num_nodes} --nproc-per-node={self.processes} --rdzv-backend=c10d "
                f"--rdzv-endpoint=HOST:29500, HOST being one of them."
            )
        # GPUs are left alone until the ranks have started: a process that has used one cannot be forked.
        device = "cpu" if self.starts_ranks else _device_of(devices, 0)
        super().__init__(device, checkpoint_activations=checkpoint_activations)

    def __repr__(self) -> str:
        if self.starts_ranks:
            return f"<{type(self).__name__} that starts {self.processes} processes>"
        return f"<{type(self).__name__} on {self.device}, rank {self.rank} of {self.world}>"

    @property
    def measures_parts(self) -> bool:
        return self.world > 1

    def join(self) -> None:
        """Becomes the rank that the environment names."""
        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        super().__init__(_device_of(self.devices, local), checkpoint_activations=self.checkpoint_activations)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        limit = timedelta(seconds=self.timeout_s)
        if not dist.is_initialized():
            kind = self.device.type
            engine = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
            store, rank, world = self._met()
            dist.init_process_group(engine, store=store, rank=rank, world_size=world, timeout=limit)
            atexit.register(_leave)  # else threads of the group may be at work while the process ends
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # A group of its own: what the hosts tell one another never waits for what the devices do.
        met = dist.group.WORLD, self.timeout_s
        self.hosts = _HOSTS[met] = _HOSTS.get(met) or dist.new_group(backend="gloo", timeout=limit)
        self.is_joined, self.starts_ranks = True, False
        self._refuse_other_world()
        if self.weights == "auto":
            weights = as_weights(self.collect(multiplications_per_s(self.device)))
        else:
            weights = [float(one) for one in self.weights or [1.0] * self.world]
        self._bounds = [0.0, *(upto / sum(weights) for upto in accumulate(weights))]
        self.share = self._share
        if self.rank > 0:
            folder = os.environ.get(SCRATCH)  # of the launcher, since a forked process tidies nothing up
            self._scratch = tempfile.TemporaryDirectory(prefix=f"kerastorch-rank{self.rank}-", dir=folder)
            self.scratch = self._scratch.name

    def _met(self) -> tuple[dist.Store, int, int]:
        """Waits until all have come: their store, and rank and number of the processes."""
        limit_s = max(self.timeout_s, MEETING_S)
        limit = timedelta(seconds=limit_s)
        store, rank, world = next(rendezvous("env://", timeout=limit))
        # Ranks that were started again, or have parted, must not find the addresses of those before them.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0), next(_MEETINGS)
        store = dist.PrefixStore(f"kerastorch/{attempt}", store)
        keys = [f"{one} is here" for one in range(world)]
        store.set(keys[rank], "")
        try:
            store.wait(keys, limit)
        except dist.DistStoreError as error:
            late = [one for one, key in enumerate(keys) if not store.check([key])]
            raise RuntimeError(
                f"rank {rank} waited {limit_s:g} s for ranks {late} to start, in vain: their own errors say why. Give "
                f"the backend a longer timeout_s if they only take longer."
            ) from error
        return store, rank, world

    def _refuse_other_world(self) -> None:
        """What was asked for and what was started must be the same."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        wanted = local if self.devices == "auto" else _processes(self.devices)
        if wanted != local:
            raise ValueError(
                f"devices={self.devices!r} asks for {wanted} processes on each machine, but {local} were started. Give "
                f"torchrun --nproc-per-node={wanted}, or leave devices out."
            )
        if self.num_nodes is not None and self.num_nodes * local != self.world:
            raise ValueError(
                f"num_nodes={self.num_nodes} with {local} processes each asks for {self.num_nodes * local}, but "
                f"{self.world} were started. Give torchrun --nnodes={self.num_nodes}, or leave num_nodes out."
            )
        self._refuse_other_weights(self.world)

    def _refuse_other_weights(self, processes: int) -> None:
        if isinstance(self.weights, (list, tuple)) and len(self.weights) != processes:
            raise ValueError(
                f"weights has {len(self.weights)} numbers, but there are {processes} processes. Give one for each."
            )

    # Where it runs, and on what.

    def place(self, module: nn.Module) -> nn.Module:
        """Moves the module to this rank's device, with the parameters and buffers of rank 0."""
        module = super().place(module)
        if self.is_joined:
            self._send_from_first([*module.parameters(), *module.buffers()])
        return module

    @torch.no_grad()
    @missed("between runs")
    def _send_from_first(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if not is_lazy(tensor):
                dist.broadcast(tensor.detach(), src=0)

    @property
    def portion(self) -> float:
        return 1.0 if self.share is None else self._bounds[self.rank + 1] - self._bounds[self.rank]

    def _share(self, samples: int) -> tuple[slice, Part]:
        """Rows of a global batch that are this rank's, and what they count."""
        # A little less: the shares are rounded, and a whole number must not become the next one.
        ends = [ceil(samples * bound - 1e-9) for bound in self._bounds]
        first, last = ends[self.rank], ends[self.rank + 1]
        most = max(after - before for before, after in pairwise(ends))
        part = Part(last - first, samples, samples / self.world, most)
        return slice(first, last) if last > first else slice(0, 1), part

    def feed(self, batches: Iterable[Any], ahead: bool = True) -> Iterator[Any]:
        """The same batches, on the device; each says by `part` what it counts, until the next one."""
        fed = super().feed(batches, ahead)
        return self._parted(fed) if self.is_joined else fed

    def _parted(self, batches: Iterable[Any]) -> Iterator[Any]:
        for x, target, weight, part in batches:
            self.part = part
            yield x, target, weight

    # What holds during a run.

    @contextmanager
    def running(self, module: nn.Module) -> Iterator[None]:
        if not self.is_joined or self._is_running:
            with super().running(module):
                yield
            return
        self._share_random()
        self._is_running, self._calls, self._every = True, 0, 1
        try:
            with self._words_of_first(), super().running(module):
                yield
                self.gather_state()
        except BaseException:
            self._abandon()
            raise
        finally:
            self._is_running, self.part = False, Single.part
        self._send_from_first(module.buffers())  # what layers count for themselves, in each rank its own
        self._move_on_if_drawn()
        if self._asked is not None:
            self._asked[0].wait()
            self._asked = None

    def _abandon(self) -> None:
        """After a failure: the other processes may be gone, so that nothing can be brought together."""

    @contextmanager
    def _words_of_first(self) -> Iterator[None]:
        """What all ranks would warn of, rank 0 does."""
        with warnings.catch_warnings():
            if self.rank > 0:
                warnings.simplefilter("ignore")
            yield

    @missed("where a run begins")
    def _share_random(self) -> None:
        """The random numbers of rank 0 for all; and for what each computes a sequence that follows from them."""
        common = torch.get_rng_state()
        dist.broadcast(common, src=0, group=self.hosts)
        torch.set_rng_state(common)
        others = [random.getstate(), np.random.get_state()]  # samplers may draw from these
        dist.broadcast_object_list(others, src=0, group=self.hosts)
        random.setstate(others[0])
        np.random.set_state(others[1])
        seed = int.from_bytes(hashlib.sha256(common.numpy().tobytes() + bytes([self.rank])).digest()[:7], "big")
        self.own_random = torch.Generator().manual_seed(seed).get_state()
        if self.device.type in GPUS:
            torch.get_device_module(self.device).manual_seed(seed)
        self._random_before = self._random()

    def _random(self) -> list[Tensor]:
        """Where the random numbers are that this rank alone draws."""
        of_device = [torch.get_device_module(self.device).get_rng_state()] if self.device.type in GPUS else []
        return [self.own_random, *of_device]

    def _move_on_if_drawn(self) -> None:
        """The next run has other random numbers if this one has drawn any, as it would in one process."""
        pairs = zip(self._random(), self._random_before, strict=True)
        has_drawn = any(not torch.equal(now, before) for now, before in pairs)
        if any(self.collect(has_drawn)):
            torch.empty((), dtype=torch.int64).random_()

    def state_dict(self) -> dict[str, Any]:
        return {"random": self._random()} if self._is_running else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not state:  # of a run in one process, without any of its own
            return
        self.own_random, *of_device = state["random"]
        for one in of_device:
            torch.get_device_module(self.device).set_rng_state(one)

    def alone(self, function: Callable) -> Callable:
        if not self.is_joined:
            return function

        def run(*inputs: Any, **named: Any) -> Any:
            common = torch.get_rng_state()
            torch.set_rng_state(self.own_random)
            try:
                return function(*inputs, **named)
            finally:
                self.own_random = torch.get_rng_state()
                torch.set_rng_state(common)

        return run

    # Bringing together.

    def sum(self, values: Sequence[Any]) -> Sequence[Any]:
        if not self.is_joined or not values:
            return values
        together = torch.stack([torch.as_tensor(one, dtype=torch.float64, device=self.device) for one in values])
        dist.all_reduce(together)
        return [*together.unbind()]

    def gather(self, output: Any) -> Any:
        if not self.is_joined:
            return output
        rows = max(self.part.samples, 1)

        def cut(leaf: Any) -> Any:
            is_of_samples = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows
            return leaf[: self.part.samples] if is_of_samples else leaf

        return join(self.collect(map_structure(cut, output)), _joined)

    def collect(self, value: Any, of: str = "") -> list[Any]:
        if not self.is_joined:
            return [value]
        found: list[Any] = [None] * self.world
        with self._saying_who_is_missed():
            dist.all_gather_object(found, (of, value), group=self.hosts)
        refuse_other_askers([asked for asked, _ in found])
        return [one for _, one in found]

    def _saying_who_is_missed(self) -> AbstractContextManager:
        """Outside of a run: in it, the loop says where that was."""
        return nullcontext() if self._is_running else missed("outside of a run")

    def agree(self, wishes: list[bool], now: bool) -> list[bool]:
        self._calls += 1
        if not now and self._calls < self._every:  # asked for a tenth of a second's batches at once
            return [False] * len(wishes)
        flags = torch.tensor([*wishes, MOST_CALLS - self._calls_in_time()], dtype=torch.uint8)
        asked = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.hosts, async_op=True), flags
        before, self._asked = self._asked, None if now else asked
        answers = [one for one in (before, asked if now else None) if one is not None]
        for work, flags in answers:
            work.wait()
            self._every = MOST_CALLS - int(flags[-1])
        return [any(flags[index] for _, flags in answers) for index in range(len(wishes))]

    def _calls_in_time(self) -> int:
        """How many calls go into the time that a wish may wait."""
        now = time.monotonic()
        number = AGREE_S * self._calls / max(now - self._agreed_at, 1e-9)
        self._calls, self._agreed_at = 0, now
        return min(max(int(number), 1), MOST_CALLS)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _joined(parts: list[Any]) -> Any:
    return torch.cat(parts) if isinstance(parts[0], Tensor) and parts[0].ndim else parts[0]


def _device_of(devices: Any, local: int) -> torch.device:
    """The device of a process, by its number on the machine."""
    kind = next((one for one in GPUS if torch.get_device_module(one).device_count()), None)
    if kind is None:
        return torch.device("cpu")
    return torch.device(kind, devices[local] if isinstance(devices, (list, tuple)) else local)


def _processes(devices: Any) -> int:
    """How many processes `devices` asks for on this machine."""
    if isinstance(devices, (list, tuple)):
        return len(devices)
    return max(_gpus(), 1) if devices == "auto" else int(devices)


def _gpus() -> int:
    return max(torch.get_device_module(kind).device_count() for kind in GPUS)


def _refuse_no_devices(devices: Any, num_nodes: Any, timeout_s: Any) -> None:
    is_number = isinstance(devices, Integral) and not isinstance(devices, bool) and devices >= 1
    are_numbers = isinstance(devices, (list, tuple)) and devices and all(_is_index(one) for one in devices)
    if devices != "auto" and not is_number and not are_numbers:
        raise ValueError(
            f'devices={devices!r} names no devices. Give "auto", a number of processes, or the numbers of GPUs, such '
            f"as [0, 1]."
        )
    gpus = _gpus()
    if gpus and is_number and devices > gpus:
        raise ValueError(f"devices={devices}, but this machine has {gpus} GPUs. Give at most so many.")
    if are_numbers and not gpus:
        raise ValueError(
            f"devices={devices!r}, but this machine has no GPUs. Give devices={len(devices)} for processes on the CPU."
        )
    if are_numbers and max(devices) >= gpus:
        raise ValueError(f"devices={devices!r}, but this machine has {gpus} GPUs, from 0 on. Give their numbers.")
    if num_nodes is not None and (not _is_index(num_nodes) or num_nodes < 1):
        raise ValueError(f"num_nodes={num_nodes!r} is no number of machines. Give a whole number from 1 up.")
    if not isinstance(timeout_s, Real) or isinstance(timeout_s, bool) or not 0 < timeout_s < float("inf"):
        raise ValueError(f"timeout_s={timeout_s!r} is no time. Give seconds above 0.")


def _is_index(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 0


def _refuse_no_weights(weights: Any) -> None:
    if weights is None or weights == "auto":
        return
    are_numbers = isinstance(weights, (list, tuple)) and all(
        isinstance(one, Real) and not isinstance(one, bool) and 0 < one < float("inf") for one in weights
    )
    if not are_numbers or not weights:
        raise ValueError(
            f'weights={weights!r} is no list of numbers above 0. Give one for each process, [1, 0.5], or "auto".'
        )
