"""Samples by their numbers: a DataLoader that begins anywhere in its order, seeds what is random in each sample, and
says which sample it was that failed.

torch's own loader does the fetching. It is made anew from the parts of the user's: order, collation, workers and the
random numbers that it draws are the same.
"""

from __future__ import annotations

import multiprocessing.util
import os
import random
import signal
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache, partial
from itertools import islice
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, get_worker_info

from .seeding import GENERATORS, Generator, sample_seeds

PARTS = 1000  # more than so many are samples
OPAQUE = (torch.Tensor, np.ndarray, ModuleType, type, random.SystemRandom)  # the last has no state
KEPT = 256  # batches whose samples are remembered: loaders fetch ahead


class Recent:
    """The numbers of the samples in the last batches that were asked for."""

    def __init__(self) -> None:
        self._batches: deque = deque(maxlen=KEPT)
        self.note = self._batches.append  # called with (number of the pass, number of the batch, samples)

    def of(self, number: int, batch: int) -> list[int] | None:
        """The samples of a batch, as their dataset numbers them; `None` = too long ago."""
        found = (samples for one, other, samples in self._batches if (one, other) == (number, batch))
        samples = next(found, None)
        return None if samples is None else [samples] if isinstance(samples, int) else list(samples)


class NamingDataset:
    """A dataset whose errors name the sample, and those of making a batch of them, the samples.

    With `is_seeded`, samples are asked for as `(seed, number)`, and what they draw depends on the seed alone. Where
    `seeds` has one, a batch draws from it, and from nothing that others draw from: so it is in ranks, which draw the
    order together, and load different samples.
    """

    def __init__(self, dataset: Any, is_seeded: bool = False, seeds: deque | None = None) -> None:
        self.dataset, self.is_seeded, self._seeds = dataset, is_seeded, seeds
        self._asked: Any = None  # for last
        self._common: tuple | None = None  # random numbers of all ranks, while a batch draws from its own

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        index = self._asked = self._begin(key)
        try:
            return self.dataset[index]
        except Exception as error:
            raise _naming(error, f"sample {index}") from error

    def __getitems__(self, keys: list[Any]) -> list[Any]:
        if not self._seeds:
            return self._samples(keys)
        self._common = random.getstate(), np.random.get_state(), torch.get_rng_state()
        _seed(self._seeds.popleft())
        try:
            return self._samples(keys)
        except BaseException:
            self._draw_from_common()
            raise

    def _draw_from_common(self) -> None:
        if self._common is not None:
            python, numpy, torchs = self._common
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(torchs)
            self._common = None

    def _samples(self, keys: list[Any]) -> list[Any]:
        indices = [index for _, index in keys] if self.is_seeded else keys
        if not getattr(self.dataset, "__getitems__", None):
            samples = [self[key] for key in keys]
            self._asked = indices
            return samples
        self._begin(keys[0])
        self._asked = indices
        try:
            return self.dataset.__getitems__(indices)
        except Exception as error:
            raise _naming(error, f"samples {indices}") from error

    def collate(self, collate_fn: Callable[[Any], Any], samples: Any) -> Any:
        """What `collate_fn` makes of the samples that were asked for last."""
        try:
            return collate_fn(samples)
        except Exception as error:
            what = f"samples {self._asked}" if isinstance(self._asked, list) else f"sample {self._asked}"
            raise _naming(error, what, "by the collate_fn") from error
        finally:
            self._draw_from_common()

    def _begin(self, key: Any) -> Any:
        """The number of a sample, once what it may draw from is seeded."""
        if not self.is_seeded:
            return key
        seed, index = key
        _seed(seed)
        return index


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def _naming(error: Exception, what: str, by: str = "by the dataset") -> Exception:
    """The error again, of its own type where that takes a message alone, with what was asked for in it."""
    message = f"{error} (raised {by} for {what})"
    try:
        return type(error)(message)
    except Exception:  # a type that wants other arguments
        return RuntimeError(f"{type(error).__name__}: {message}")


class IndexedLoader:
    """A loader over a dataset with numbered samples, from any batch on.

    Random numbers that a sample draws in a worker depend on the seed, the pass and its place in the order, and not on
    what the worker did before: as many workers as you like, and a run that goes on, give the same samples.

    Args:
        loader: One that `fits`; it is left as it is.
        share: Samples of a batch -> which of them to load, and what the batch then counts; `None` = all.
    Attributes:
        caveat: What cannot be exact in a run that goes on within a pass; `None` = nothing.
        shares: Whether it takes its share by the numbers of the samples, so that the others are not loaded.
    """

    def __init__(self, loader: DataLoader, share: Callable[[int], tuple[slice, Any]] | None = None) -> None:
        self.loader, self._recent, self._share = loader, Recent(), share
        self.shares = share is not None and loader.batch_sampler is not None and loader.in_order
        self.indices = self._recent.of
        self.caveat = _caveat(loader)
        if loader in _whole and _whole[loader][2] != os.getpid():
            _inherited.append(_whole.pop(loader))
        if loader not in _whole:
            _whole[loader] = _made_of(loader, order := self._keys()), order, os.getpid()
        self._all, self._order, _ = _whole[loader]

    @staticmethod
    def fits(loader: DataLoader) -> bool:
        """Whether it is torch's own, over a dataset with numbered samples."""
        own = (type(loader).__iter__, type(loader)._get_iterator) == (DataLoader.__iter__, DataLoader._get_iterator)
        return own and not isinstance(loader.dataset, IterableDataset)

    def batches(self, number: int, start: int, parts: deque | None = None) -> Iterator[Any]:
        """The batches of a pass from one on; those before it are not loaded.

        Args:
            number: Of the pass.
            start: Number of the first batch.
            parts: Where it puts, in their order, what its shares of the batches count; `None` = it takes all of them.
        """
        loader = self.loader
        options = {"recent": self._recent, "is_seeded": loader.num_workers > 0, "parts": parts}
        options["share"] = None if parts is None else self._share
        if start or loader.persistent_workers:
            self._draw(number)
        if not start:
            return self._whole_pass(number, options)
        order = self._keys(start)
        return self._apart(order, number, options, start)

    def _whole_pass(self, number: int, options: dict[str, Any]) -> Iterator[Any]:
        if not self.loader.persistent_workers:
            self._order.begin(number, **options)
            return iter(self._all)
        if self._order.is_busy:  # torch would end the pass that is under way
            return self._apart(self._keys(), number, options)
        self._order.begin(number, **options)
        _forget_dead_workers(self._all)
        return self._order.watching(iter(self._all))

    def _apart(self, order: _Keys, number: int, options: dict[str, Any], start: int = 0) -> Iterator[Any]:
        """A pass by a loader, and workers, of its own."""
        order.begin(number, **options, start=start)
        return iter(_made_of(self.loader, order, generator=torch.Generator(), persistent_workers=False))

    def _keys(self, start: int = 0) -> _Keys:
        return _Keys(positioned(self.loader._index_sampler, start), self.loader.batch_sampler is not None)

    def _draw(self, number: int) -> None:
        """Draws what `iter(loader)` does, before the order is drawn; workers that persist are seeded once."""
        if not self.loader.persistent_workers or number == 0:
            torch.empty((), dtype=torch.int64).random_(generator=self.loader.generator)


# Made once for each loader, so that workers that are to persist do so from one `fit` to the next.
_whole: WeakKeyDictionary = WeakKeyDictionary()
_inherited: list[Any] = []  # by a process that was forked: its end would end workers that are not its own


def _forget_dead_workers(loader: DataLoader) -> None:
    """Workers that persist are started anew where one has died: torch would wait for it."""
    workers = getattr(loader._iterator, "_workers", ())
    if not all(worker.is_alive() for worker in workers):
        loader._iterator = None


class _Keys:
    """The order of a loader, with a seed beside the number of each sample where that is wanted."""

    def __init__(self, order: Iterable[Any], is_batched: bool) -> None:
        self.order, self.is_batched, self.is_busy = order, is_batched, False
        self.seeds: deque = deque()  # of batches to come, in ranks that load samples themselves

    def watching(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of a pass in this order, known to be under way until they end or nobody wants them any more."""
        self.is_busy = True
        try:
            yield from batches
        finally:
            self.is_busy = False

    def begin(
        self, number: int, recent: Recent, is_seeded: bool, share: Any, parts: deque | None, start: int = 0
    ) -> None:
        self.number, self.recent, self.is_seeded, self.start = number, recent, is_seeded, start
        self.share, self.parts = share, parts
        self.seeds.clear()

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Any]:
        number, note, share, parts = self.number, self.recent.note, self.share, self.parts
        for batch, samples in enumerate(self.order, self.start):
            note((number, batch, samples))
            mine = slice(None)
            if share is not None:
                samples = list(samples)
                mine, part = share(len(samples))
                parts.append(part)
            if share is not None and not self.is_seeded:
                self.seeds.append(sample_seeds(number, batch, len(samples))[mine][0])
            if not self.is_seeded:
                yield samples if share is None else samples[mine]
            elif self.is_batched:
                samples = list(samples)  # whose seeds do not depend on who loads them
                yield list(zip(sample_seeds(number, batch, len(samples)), samples, strict=True))[mine]
            else:
                yield sample_seeds(number, batch, 1)[0], samples


def _made_of(loader: DataLoader, order: _Keys, **options: Any) -> DataLoader:
    """A loader with all settings of another, in an order of its own."""
    has_workers = loader.num_workers > 0
    settings = {
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": _WorkerStart(loader.worker_init_fn) if has_workers else None,
        "multiprocessing_context": loader.multiprocessing_context,
        # With workers that persist, when it draws would depend on whether they run already.
        "generator": torch.Generator() if loader.persistent_workers else loader.generator,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
        "in_order": loader.in_order,
    }
    is_whole = loader.batch_sampler is None  # samples come as they are
    ordered = {"sampler": order, "batch_size": None} if is_whole else {"batch_sampler": order}
    dataset = NamingDataset(loader.dataset, is_seeded=has_workers, seeds=None if has_workers else order.seeds)
    collate = partial(dataset.collate, loader.collate_fn)
    return DataLoader(dataset, collate_fn=collate, **ordered, **settings | options)


class _WorkerStart:
    """What a worker begins with: signals sent to all processes of a run are for the main one to act on."""

    def __init__(self, own: Callable[[int], None] | None) -> None:
        self.own, self.is_over = own, _end_of(os.getpid())

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "SIGUSR1"):
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._end_if_meant)
        info = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.dataset)  # the user's, for whoever asks
        if self.own is not None:
            self.own(worker)

    def _end_if_meant(self, number: int, frame: Any) -> None:
        """One SIGTERM may have gone to all processes of the run. What ends a loader or its process sends one, too."""
        if self.is_over.value or _is_of_closed_loader(frame):
            os._exit(0)  # as torch has it: else its owner is told of a failure
        signal.signal(number, signal.SIG_DFL)


@cache
def _end_of(process: int) -> Any:
    """Shared with the workers of a process: 1 once it ends, before it sends them SIGTERM and waits for them."""
    flag = multiprocessing.RawValue("b", 0)
    multiprocessing.util.Finalize(None, setattr, (flag, "value", 1), exitpriority=0)
    return flag


def _is_of_closed_loader(frame: Any) -> bool:
    """Whether the loader of this worker has told it to end: what waits then, and gets SIGTERM, is stuck."""
    while frame is not None and frame.f_code.co_name != "_worker_loop":
        frame = frame.f_back
    return frame is not None and frame.f_locals["done_event"].is_set()


def positioned(order: Iterable[Any], start: int) -> Iterable[Any]:
    """Batches of numbers from one on, whose beginning is drawn, and what is before it left out, within the call."""
    if not start:
        return order
    if type(order) is BatchSampler:  # goes by numbers instead of lists of them
        numbers = _without(iter(order.sampler), start * order.batch_size)
        return BatchSampler(numbers, order.batch_size, order.drop_last)
    return _without(iter(order), start)


def skipping(data: Iterable[Any], start: int) -> Iterator[Any]:
    """What data gives from an item on, which takes reading it up to there, within the call.

    Raises:
        ValueError: it ends before.
    """
    items = iter(data)
    read = sum(1 for _ in islice(items, start))
    if read < start:
        raise ValueError(
            f"the run goes on after batch {start} of an epoch, but the data ended after {read}. Give the data that the "
            f"run was given."
        )
    return items


def _without(items: Iterator[Any], number: int) -> Iterator[Any]:
    if number:
        next(islice(items, number - 1, number), None)
    return items


def generators_in(owner: Any, depth: int = 6) -> list[Generator]:
    """Random number generators among the attributes of an object and its parts, in lists, tuples and dicts too."""
    found, seen, left = [], set(), deque([(owner, depth)])
    while left:
        one, depth = left.popleft()
        if id(one) in seen or isinstance(one, OPAQUE):
            continue
        seen.add(id(one))
        if isinstance(one, GENERATORS):
            found.append(one)
        elif depth:
            parts = _parts_of(one)
            left += [(part, depth - 1) for part in parts if len(parts) <= PARTS]
    return found


def _parts_of(one: Any) -> Collection[Any]:
    if isinstance(one, (list, tuple)):
        return one
    return (one if isinstance(one, dict) else getattr(one, "__dict__", {})).values()


def _caveat(loader: DataLoader) -> str | None:
    if not loader.num_workers:
        return None
    if not loader.in_order:
        return "a DataLoader with in_order=False gives its batches in whatever order they are ready"
    if generators_in(loader.dataset):
        return (
            "the dataset has a random number generator of its own, which each worker has a copy of: a run that goes "
            "on within a pass draws other numbers from it. Draw from random, numpy.random or torch, which are seeded "
            "for each sample"
        )
    return None
