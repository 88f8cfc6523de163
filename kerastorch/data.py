"""Whatever the user passed -> global batches `(x, target, weight)` in a known order, or one process's part of each.

Decided here: which form of data it is, the dtype of each tensor, how batches are cut, shuffled, weighted and split.
Parts are taken before anything is loaded where samples have numbers; else each process reads all and keeps its part.
Left to others: what a batch is used for (`step.py`), and on which device (`backends/`).

To add a form of data, write a function that returns a `Data` and name it in `open_data`.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)
from torch.utils.data.dataloader import default_collate

from .samples import IndexedLoader, NamingDataset, Recent, generators_in, positioned, skipping
from .seeding import Generator, epoch_order, sample_seeds
from .structures import leaves, map_structure, named_leaves
from .tensors import Batch, array_of, class_table, grouped, is_arrays, to_tensors, unpack, warn_of_nan, weighted

DEFAULT_BATCH_SIZE = 32  # Keras's

# Evaluation keeps no activations, so small samples are batched up to so many values and samples: the time of a small
# batch is dispatch, not arithmetic. Samples of a few thousand values keep the default size, and so do tokens, of which
# an embedding makes far more.
EVALUATION_BATCH_VALUES = 2**16
EVALUATION_BATCH_SAMPLES = 512


@dataclass(frozen=True)
class Data:
    """Batches that can be gone through pass by pass.

    Attributes:
        batches: Number of the pass (0-based), and of the first batch wanted -> its batches from there on, `(x, target,
            weight)`; target and weight may be `None`. Where that batch is not the first, all random numbers that
            belong to the beginning are drawn within the call.
        steps: Batches in one pass; `None` where that is not known.
        targets: All the targets where they are in memory, else `None`: lets mistakes be found before training.
        repeats: Whether there is a second pass; `False` for a generator or another one-shot iterator.
        generators: Random numbers of the user's own that a pass draws from.
        draws: Whether a pass draws from the random numbers of this process, too.
        own: What tells by its own `state_dict` where it is; `None` = the number of the batch says that.
        own_size: Samples in each batch of `own`; one with fewer is the last of a pass. `None` = not known.
        indices: Number of the pass and of a batch that was just given -> the numbers of its samples in the data.
        caveat: What cannot be exact in a run that goes on within a pass; `None` = nothing.
    """

    batches: Callable[..., Iterator[Batch]]
    steps: int | None = None
    targets: Any = None
    repeats: bool = True
    generators: tuple[Generator, ...] = ()
    draws: bool = False
    own: Any = None
    own_size: int | None = None
    indices: Callable[[int, int], list[int] | None] = lambda number, batch: None
    caveat: str | None = None


@dataclass(frozen=True)
class Reading:
    """How raw data is turned into tensors.

    Attributes:
        dtype: What floating point values become: the module's dtype.
        batch_size: Samples in a global batch, asked for: refused by data that brings its own batches.
        fallback_batch_size: Samples in a global batch where nobody asked; `None` = 32.
        shuffle: Whether each pass has an order of its own (arrays and map-style datasets; others bring theirs).
        targets: Names that the target may have where samples are mappings; none = mappings have no target.
        class_weight: `{class index: weight}`, a factor on the weight of each sample; `None` = 1.
        hold: Called with a list of all tensors in memory, returns them on the device they shall be gathered on.
        evaluating: No gradients will be needed, so a batch size that nobody chose may be larger.
        share: Samples of a global batch -> which of them are taken here, and what the batch then has as its fourth
            part; `None` = all, and there is none.
    """

    dtype: torch.dtype = torch.float32
    batch_size: int | None = None
    fallback_batch_size: int | None = None
    shuffle: bool = False
    targets: tuple[str, ...] = ()
    class_weight: Mapping[int, float] | None = None
    hold: Callable[[list[torch.Tensor]], list[torch.Tensor]] = list
    evaluating: bool = False
    share: Callable[[int], tuple[slice, Any]] | None = None


def open_data(data: Any, y: Any, sample_weight: Any, reading: Reading) -> Data:
    """Recognises the form of `data` and opens it.

    Args:
        data: Arrays (numpy, torch, pandas, lists of numbers, nested tuples and dicts of them), `(x, y[, weight])`, a
            `Dataset`, `IterableDataset`, `DataLoader`, Hugging Face dataset, an iterable of batches, or a callable
            that returns one of these and is called anew for each pass.
        y: Targets of arrays, shape (samples, ...); or the name of the target's column where batches are mappings.
        sample_weight: Weights of arrays, shape (samples,); a dict or list of these for several outputs.
        reading: How to turn it into tensors.
    Raises:
        TypeError: `data` is of no known form, or `y` or `sample_weight` do not belong to that form.
        ValueError: lengths differ, or there are no samples.
    """
    if isinstance(y, (bool, int, float)):
        raise TypeError(f"y={y!r} is a single number, expected targets. Did you mean epochs={y!r} or batch_size={y!r}?")
    if isinstance(y, str):
        _refuse_unknown_column(data, y)
        reading, y = replace(reading, targets=(y,)), None
    if y is None and isinstance(data, tuple) and 2 <= len(data) <= 3 and is_arrays(data[0]):
        data, y, sample_weight = (*data, sample_weight)[:3]
    if is_arrays(data):
        return _open_arrays(data, y, sample_weight, reading)
    if y is not None or sample_weight is not None:
        given = "y" if y is not None else "sample_weight"
        raise TypeError(
            f"{given} was given beside a {type(data).__name__}, expected arrays there. Let the data yield "
            f"(x, y) or (x, y, weight) itself."
        )
    if isinstance(data, DataLoader):
        return _open_loader(data, reading)
    if hasattr(data, "with_format") and hasattr(data, "column_names"):  # Hugging Face
        if not hasattr(data, "__len__"):
            return _open_iterable_dataset(data.with_format("torch"), reading)
        return _open_dataset(data if data.format["type"] else data.with_format("torch"), reading, _hugging_face_loader)
    if isinstance(data, IterableDataset):
        return _open_iterable_dataset(data, reading)
    if isinstance(data, Dataset) or (hasattr(data, "__getitem__") and not hasattr(data, "__iter__")):
        return _open_dataset(data, reading, _dataset_loader)
    if isinstance(data, Iterable):
        return _open_batches(data, reading)
    if callable(data):
        return _open_callable(data, reading)
    raise TypeError(
        f"data is a {type(data).__name__}; expected arrays, (x, y), a Dataset, a DataLoader, an iterable of batches, "
        f"or a callable that returns one of these."
    )


def peek(data: Data) -> tuple[Batch, Data]:
    """The first batch, and the data as it was before the look."""
    (first, *_), data = first_batches(data, 1)
    return first, data


def first_batches(data: Data, number: int | None) -> tuple[list[Batch], Data]:
    """The first batches (`None` = all), and the data as it was: a one-shot iterator gets its batches back."""
    batches = data.batches(0)
    first = list(islice(batches, number))
    if not first:
        raise ValueError("the data is empty: it gave no batch, expected at least one.")
    whole = chain(first, batches)
    return first, data if data.repeats else replace(data, batches=lambda number, start=0: skipping(whole, start))


def in_order(data: Any) -> Any:
    """A loader that torch shuffles, without the shuffling; anything else as it is."""
    if isinstance(data, DataLoader) and _has_torchs_sampler(data):
        return _loader_over(data.dataset, data, shuffled=False)
    return data


def with_batches_of(data: Any, batch_size: int, drops_last: bool = True) -> Any:
    """A loader with all its settings but for its batch size; anything else, which `batch_size` is given beside, as is.

    Without `drops_last` a loader that leaves out its last batch gives it, too.

    Raises:
        TypeError: it brings batches that nobody can make of another size.
    """
    what = type(data).__name__
    if isinstance(data, DataLoader):
        if type(data) is not DataLoader or data.batch_size is None:
            made = "its dataset" if data.batch_sampler is None else f"a {type(data.batch_sampler).__name__} of its own"
            made = made if type(data) is DataLoader else "its own class"
            raise TypeError(
                f"the {what}'s batches come from {made}, which cannot be made anew for other sizes. Give its dataset, "
                f"or a plain DataLoader with batch_size=."
            )
        sampler = {} if isinstance(data.dataset, IterableDataset) else {"sampler": data.sampler}
        options = {"batch_size": batch_size, "drop_last": data.drop_last and drops_last, **sampler}
        return DataLoader(data.dataset, **_settings_of(data), **options)
    is_dataset = isinstance(data, IterableDataset) or hasattr(data, "__getitem__") or hasattr(data, "column_names")
    if is_arrays(data) or (is_dataset and not isinstance(data, (list, str))):
        return data
    raise TypeError(
        f"data is a {what}, whose batches are made already and cannot be made of another size. Give arrays, a Dataset, "
        f"or a DataLoader."
    )


def split_tail(data: Any, y: Any, sample_weight: Any, fraction: float) -> tuple[tuple, tuple]:
    """Cuts the last `fraction` of the samples off, before any shuffling, as Keras does.

    Args:
        data: Arrays, a map-style `Dataset`, or a `DataLoader` over one, as in `open_data`; with `y`, `sample_weight`.
        fraction: Share of the samples in the second part, over 0 and below 1.
    Returns:
        `(data, y, sample_weight)` of the first part and of the last.
    Raises:
        ValueError: `fraction` is no fraction, leaves one part empty, or the data has no known order to cut.
    Source: `train_validation_split` of Keras 3, for the rounding.
    """
    if y is None and isinstance(data, tuple) and 2 <= len(data) <= 3 and is_arrays(data[0]):
        data, y, sample_weight = (*data, sample_weight)[:3]
    if isinstance(data, DataLoader):
        first, last = _split_dataset(data.dataset, fraction)
        return (_loader_over(first, data, shuffled=True), y, None), (_loader_over(last, data, shuffled=False), y, None)
    if is_arrays(data):
        arrays = (data, None if isinstance(y, str) else y, sample_weight)
        samples = _common_length([(name, _length(leaf)) for name, leaf in _named_parts(*arrays)])
        cut = _cut(samples, fraction)
        first, last = (_rows_of(arrays, rows) for rows in (slice(0, cut), slice(cut, samples)))
        return (first, last) if not isinstance(y, str) else ((first[0], y, first[2]), (last[0], y, last[2]))
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (list, IterableDataset)):
        first, last = _split_dataset(data, fraction)
        return (first, y, None), (last, y, None)
    raise ValueError(
        f"validation_split={fraction} needs data whose length and order are known, got a {type(data).__name__}. "
        f"Give arrays, a map-style Dataset or a DataLoader over one; or give validation_data."
    )


# Arrays: one permutation a pass, one gather a batch and array.


def _open_arrays(x: Any, y: Any, sample_weight: Any, reading: Reading) -> Data:
    if y is None and isinstance(x, Mapping):
        x, y, _ = unpack(x, reading.targets)
    samples = _common_length([(name, _length(leaf)) for name, leaf in _named_parts(x, y, sample_weight)])
    parts, device = _in_memory((x, y, sample_weight), reading)
    batch_size = _batch_size(reading, parts[0], samples)

    def batches(number: int, start: int = 0) -> Iterator[Batch]:
        if reading.shuffle:
            rows = epoch_order(samples, number).to(device).split(batch_size)[start:]
        else:
            rows = (slice(row, row + batch_size) for row in range(start * batch_size, samples, batch_size))
        rows_of = _select if reading.shuffle else _slice
        take_x, take_y, take_weight = _takers(parts, rows_of, reading.dtype)
        for chosen, *part in _shared(rows, samples, reading.share):
            yield take_x(chosen), take_y and take_y(chosen), take_weight and take_weight(chosen), *part

    indices = partial(_chunk, samples, batch_size, reading.shuffle)
    return Data(batches, steps=-(-samples // batch_size), targets=parts[1], indices=indices)


def _shared(rows: Iterable[Any], samples: int, share: Callable | None) -> Iterator[tuple]:
    """Rows of global batches, tensors of numbers or slices -> those taken here, and what they count."""
    return zip(rows) if share is None else _parts_of(rows, samples, share)


def _parts_of(rows: Iterable[Any], samples: int, share: Callable) -> Iterator[tuple]:
    for chosen in rows:
        if isinstance(chosen, slice):
            mine, part = share(min(chosen.stop, samples) - chosen.start)
            yield slice(chosen.start + mine.start, chosen.start + mine.stop), part
        else:
            mine, part = share(len(chosen))
            yield chosen[mine], part


def _order(samples: int, shuffle: bool, number: int) -> Any:
    return epoch_order(samples, number).tolist() if shuffle else range(samples)


def _chunk(samples: int, batch_size: int, shuffle: bool, number: int, batch: int) -> list[int]:
    return list(_order(samples, shuffle, number)[batch * batch_size : (batch + 1) * batch_size])


def _in_memory(parts: Batch, reading: Reading) -> tuple[Batch, torch.device]:
    """Tensors of all the data, where the backend wants them kept, and the device that is."""
    for name, leaf in _named_parts(*parts):
        warn_of_nan(name, leaf)
    parts = to_tensors(parts, reading.dtype, keeps_maps=True)
    if reading.class_weight is not None:
        parts = weighted(parts, class_table(reading.class_weight), reading.dtype)
    held = iter(reading.hold(list(leaves(parts))))
    parts = map_structure(lambda _: next(held), parts)
    return parts, next(leaves(parts)).device


def _select(tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return partial(torch.index_select, tensor, 0)


def _slice(tensor: torch.Tensor) -> Callable[[slice], torch.Tensor]:
    return partial(operator.getitem, tensor)


def _takers(parts: Batch, taker_of: Callable, dtype: torch.dtype) -> tuple:
    """A taker for inputs, targets and weights; of these only inputs may be in a memory map, in a dtype of its own."""
    x, y, weight = parts
    return _taker(x, taker_of, dtype), _taker(y, taker_of), _taker(weight, taker_of)


def _taker(tree: Any, taker_of: Callable, dtype: torch.dtype | None = None) -> Callable[[Any], Any] | None:
    """A function from rows to those rows of every tensor of `tree`; for a single tensor one without Python frames."""
    if tree is None:
        return None
    if not isinstance(tree, torch.Tensor):
        return lambda rows: map_structure(lambda tensor: _taker(tensor, taker_of, dtype)(rows), tree)
    take = taker_of(tree)
    if dtype is not None and tree.is_floating_point() and tree.dtype != dtype:  # a memory map
        return lambda rows: take(rows).to(dtype)
    return take


def _batch_size(reading: Reading, x: Any = None, samples: int = 1) -> int:
    chosen = reading.batch_size or reading.fallback_batch_size
    is_small = reading.evaluating and x is not None and all(map(torch.is_floating_point, leaves(x)))
    if chosen is not None or not is_small:
        return chosen or DEFAULT_BATCH_SIZE
    values = max(sum(tensor.numel() for tensor in leaves(x)) // samples, 1)
    return max(DEFAULT_BATCH_SIZE, min(EVALUATION_BATCH_SAMPLES, EVALUATION_BATCH_VALUES // values))


# Datasets, loaders and iterables: torch's own DataLoader does the fetching.


def _open_dataset(dataset: Any, reading: Reading, loader_over: Callable) -> Data:
    if (seen := _tensors_of(dataset)) is not None:
        tensors, rows = seen
        return _open_arrays(*unpack([tensor if rows is None else tensor[rows] for tensor in tensors]), reading)
    samples = len(dataset)
    batch_size = _batch_size(reading)

    _refuse_empty(samples, dataset)
    read = _reader(replace(reading, share=None))  # taken by their numbers

    def batches(number: int, start: int = 0) -> Iterator[Batch]:
        order = _order(samples, reading.shuffle, number)
        firsts = range(start * batch_size, samples, batch_size)
        chunks = [list(order[first : first + batch_size]) for first in firsts]
        if reading.share is None:
            return map(read, loader_over(dataset, chunks))
        shares = [reading.share(len(chunk)) for chunk in chunks]
        mine = [chunk[taken] for chunk, (taken, _) in zip(chunks, shares, strict=True)]
        numbered = enumerate(zip(chunks, shares, strict=True), start)
        seeds = deque(sample_seeds(number, batch, len(chunk))[taken][0] for batch, (chunk, (taken, _)) in numbered)
        return _with_parts(map(read, loader_over(dataset, mine, seeds)), (part for _, part in shares))

    indices = partial(_chunk, samples, batch_size, reading.shuffle)
    generators = tuple(generators_in(dataset))
    return Data(batches, steps=-(-samples // batch_size), generators=generators, draws=True, indices=indices)


def _taken_from(parts: deque) -> Iterator[Any]:
    while True:
        yield parts.popleft()


def _with_parts(batches: Iterable[Batch], parts: Iterable[Any]) -> Iterator[tuple]:
    return ((*batch, part) for batch, part in zip(batches, parts, strict=False))


# A generator of their own: `iter(DataLoader)` draws a number, which would change what the model draws after it.
def _dataset_loader(dataset: Any, chunks: list[list[int]], seeds: deque | None = None) -> DataLoader:
    named = NamingDataset(dataset, seeds=seeds)
    collate = partial(named.collate, default_collate)
    return DataLoader(named, batch_sampler=chunks, collate_fn=collate, generator=torch.Generator())


def _hugging_face_loader(dataset: Any, chunks: list[list[int]], seeds: deque | None = None) -> DataLoader:
    """Its samples are rows of a table, which draw nothing."""
    return DataLoader(dataset, sampler=chunks, batch_size=None, generator=torch.Generator())


def _open_iterable_dataset(dataset: Any, reading: Reading) -> Data:
    batch_size = _batch_size(reading)
    read = _reader(reading)

    def batches(number: int, start: int = 0) -> Iterator[Batch]:
        return map(read, skipping(DataLoader(dataset, batch_size=batch_size, generator=torch.Generator()), start))

    steps = -(-len(dataset) // batch_size) if hasattr(dataset, "__len__") else None
    way_back = _way_back(dataset) | {"own_size": batch_size}
    return Data(batches, steps, generators=tuple(generators_in(dataset)), draws=True, **way_back)


def _open_loader(loader: DataLoader, reading: Reading) -> Data:
    _refuse_batch_size(loader, reading)
    if reading.share is not None and isinstance(loader.sampler, DistributedSampler):
        raise ValueError(
            "the loader has a DistributedSampler, which gives each rank a part, of which the backend would take a part "
            "again. Leave it out (shuffle=True instead): each rank takes its part of every batch."
        )
    steps = _length_or_none(loader)
    _refuse_empty(steps, loader)
    if _is_plain(loader) and (seen := _tensors_of(loader.dataset)) is not None:
        return _see_through(loader, *seen, steps, reading)
    read, generators = _reader(reading), _generators_of(loader)
    if IndexedLoader.fits(loader):
        indexed = IndexedLoader(loader, reading.share)
        options = {"generators": generators, "draws": True, "indices": indexed.indices, "caveat": indexed.caveat}
        if not indexed.shares:
            return Data(partial(_mapped, read, indexed.batches), steps, **options)
        read_part = _reader(replace(reading, share=None))

        def parts_of(number: int, start: int = 0) -> Iterator[tuple]:
            parts: deque = deque()
            return _with_parts(map(read_part, indexed.batches(number, start, parts)), _taken_from(parts))

        return Data(parts_of, steps, **options)
    way_back = _way_back(loader if hasattr(loader, "state_dict") or loader.num_workers else loader.dataset)
    batches = partial(_mapped, read, lambda number, start: skipping(loader, start))
    return Data(batches, steps, generators=generators, draws=True, own_size=loader.batch_size, **way_back)


def _mapped(read: Callable[[Any], Batch], batches: Callable, number: int, start: int = 0) -> Iterator[Batch]:
    return map(read, batches(number, start))


def _way_back(data: Any) -> dict[str, Any]:
    """How a run that goes on finds its place in data without numbers: by its own state, or by reading it again."""
    if hasattr(data, "state_dict") and hasattr(data, "load_state_dict"):
        return {"own": data, "caveat": _caveat_of_workers(data)}
    what = (
        f"data of type {type(data).__name__} has neither numbered samples nor a state_dict: a run that goes on within "
        f"a pass reads it again up to there, and is exact only if it gives the same batches again"
    )
    return {"caveat": what}


def _caveat_of_workers(data: Any) -> str | None:
    if not getattr(data, "num_workers", 0):
        return None
    return (
        f"the state of a {type(data).__name__} has no random numbers of its workers: a run that goes on within a pass "
        f"is exact only if samples draw none. Those of torch's own DataLoader are seeded one by one"
    )


def _see_through(
    loader: DataLoader, tensors: list[torch.Tensor], subset: torch.Tensor | None, steps: int | None, reading: Reading
) -> Data:
    """The batches of a loader over tensors, gathered in one go instead of sample by sample, in the loader's order."""
    parts, device = _in_memory(unpack(tensors), reading)
    recent = Recent()

    def batches(number: int, start: int = 0) -> Iterator[Batch]:
        # The number that `iter(loader)` draws before its sampler draws: keeps order and model as in a loop by hand.
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
        return gathered(positioned(loader.batch_sampler, start), number, start)

    def gathered(order: Iterable[list[int]], number: int, start: int) -> Iterator[Batch]:
        take_x, take_y, take_weight = _takers(parts, _select, reading.dtype)
        for batch, indices in enumerate(order, start):
            recent.note((number, batch, indices))
            rows, part = torch.as_tensor(indices), ()
            if reading.share is not None:
                mine, *part = reading.share(len(rows))
                rows = rows[mine]
            rows = rows if subset is None else subset[rows]
            if device.type == "cuda":  # from pinned memory the host need not wait for the copy
                rows = rows.pin_memory().to(device, non_blocking=True)
            yield take_x(rows), take_y and take_y(rows), take_weight and take_weight(rows), *part

    # A subset or a sampler of the user's own leaves some rows out, whose targets may be anything.
    targets = parts[1] if subset is None and _has_torchs_sampler(loader) else None
    options = {"generators": _generators_of(loader), "draws": True, "indices": recent.of}
    return Data(batches, steps, targets, **options)


def _generators_of(loader: DataLoader) -> tuple[Generator, ...]:
    sources = (loader, loader.sampler, loader.batch_sampler)
    found = [one for source in sources for one in generators_in(source)]
    if not loader.num_workers:  # else they are others', in the workers
        found += generators_in(loader.dataset)
    return tuple({id(one): one for one in found}.values())


def _has_torchs_sampler(loader: DataLoader) -> bool:
    """Whether the loader was made with `shuffle=`: a batch sampler of the user's own leaves it without a batch size."""
    return type(loader.sampler) in (RandomSampler, SequentialSampler) and loader.batch_size is not None


def _is_plain(loader: DataLoader) -> bool:
    return (
        type(loader) is DataLoader
        and loader.collate_fn is default_collate
        and loader.batch_sampler is not None
        and loader.worker_init_fn is None
    )


def _tensors_of(dataset: Any) -> tuple[list[torch.Tensor], torch.Tensor | None] | None:
    """Tensors behind a `TensorDataset` or subsets of one, with the rows in use (`None` = all); else `None`."""
    rows = None
    while type(dataset) is Subset:
        indices = torch.as_tensor(dataset.indices)
        rows, dataset = indices if rows is None else indices[rows], dataset.dataset
    # A subclass may do anything in its `__getitem__`.
    if type(dataset) is TensorDataset and 1 <= len(dataset.tensors) <= 3:
        return list(dataset.tensors), rows
    return None


def _open_batches(iterable: Iterable, reading: Reading) -> Data:
    _refuse_batch_size(iterable, reading)
    steps = _length_or_none(iterable)
    _refuse_empty(steps, iterable)
    # An iterator is its own `iter`: it goes on where it stopped, and once it is over there is no second pass.
    repeats = iter(iterable) is not iterable if not hasattr(iterable, "__next__") else False
    # A generator may fill the same arrays again for its next batch, while the targets of this one are still measured.
    read = _reader(reading, keeps_targets=True)
    way_back = {} if isinstance(iterable, Sequence) else _way_back(iterable)
    batches = partial(_mapped, read, lambda number, start: skipping(iterable, start))
    return Data(batches, steps, repeats=repeats, draws=True, **way_back)


def _open_callable(make: Callable[[], Any], reading: Reading) -> Data:
    def batches(number: int, start: int = 0) -> Iterator[Batch]:
        return open_data(make(), None, None, reading).batches(number, start)

    what = (
        "a callable makes its data anew: a run that goes on within a pass calls it again, and is exact only if it "
        "gives the same batches again"
    )
    return Data(batches, draws=True, caveat=what)


def _reader(reading: Reading, keeps_targets: bool = False) -> Callable[[Any], Batch]:
    """The function that turns one raw batch of a loader or iterable into `(x, target, weight)` tensors."""
    dtype, targets = reading.dtype, reading.targets
    table = None if reading.class_weight is None else class_table(reading.class_weight)

    is_first = True

    def read(raw: Any) -> Batch:
        nonlocal is_first
        raw = unpack(raw, targets)
        if is_first:  # all of the data cannot be looked at, so one batch is
            is_first = False
            for name, leaf in _named_parts(*raw):
                warn_of_nan(name, leaf)
        x, y, weight = to_tensors(raw, dtype)
        parts = x, map_structure(torch.clone, y) if keeps_targets else y, weight
        parts = parts if table is None else weighted(parts, table, dtype)
        return parts if reading.share is None else _part_of(parts, reading.share)

    return read


def _part_of(batch: Batch, share: Callable) -> tuple:
    """This process's part of a batch that was read whole."""
    rows = len(next(leaves(batch[0])))
    mine, part = share(rows)

    def cut(leaf: Any) -> Any:
        is_of_samples = isinstance(leaf, torch.Tensor) and leaf.ndim and len(leaf) == rows
        return leaf[mine] if is_of_samples else leaf

    return *(map_structure(cut, one) for one in batch), part


def _named_parts(x: Any, y: Any, sample_weight: Any) -> list[tuple[str, Any]]:
    parts = (("x", x), ("y", y), ("sample_weight", sample_weight))
    return [named for name, part in parts for named in named_leaves(grouped(part), name)]


def _length(leaf: Any) -> int:
    shape = array_of(leaf).shape
    if not shape:
        raise ValueError(f"{leaf!r} is a single value, expected an array with one row for each sample.")
    return int(shape[0])


def _common_length(lengths: list[tuple[str, int]]) -> int:
    if len({length for _, length in lengths}) > 1:
        given = ", ".join(f"{name} has {length} samples" for name, length in lengths)
        raise ValueError(f"{given}; expected the same number everywhere. Give one row of each for every sample.")
    if not lengths or lengths[0][1] == 0:
        raise ValueError("the data is empty: the arrays have 0 samples, expected at least 1.")
    return lengths[0][1]


# Splitting and refusing.


def _rows_of(arrays: tuple, rows: slice) -> tuple:
    def cut(leaf: Any) -> Any:
        return leaf.iloc[rows] if hasattr(leaf, "iloc") else array_of(leaf)[rows]

    return tuple(map_structure(cut, grouped(part)) for part in arrays)


def _cut(samples: int, fraction: float) -> int:
    cut = int(samples * (1.0 - fraction))
    if cut in (0, samples):
        raise ValueError(
            f"validation_split={fraction} of {samples} samples leaves none for "
            f"{'training' if cut == 0 else 'validation'}. Give more data or another fraction."
        )
    return cut


def _split_dataset(dataset: Any, fraction: float) -> tuple[Dataset, Dataset]:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"validation_split={fraction} needs a map-style dataset, got {type(dataset).__name__}, whose length and "
            f"order are not known. Give validation_data instead."
        )
    cut = _cut(len(dataset), fraction)
    if hasattr(dataset, "select"):  # Hugging Face: keeps whole batches in one read
        return dataset.select(range(cut)), dataset.select(range(cut, len(dataset)))
    return Subset(dataset, range(cut)), Subset(dataset, range(cut, len(dataset)))


def _loader_over(dataset: Dataset, like: DataLoader, *, shuffled: bool) -> DataLoader:
    """A loader with all settings of `like` over another dataset: in `like`'s kind of order or, to validate, in order.

    Raises:
        ValueError: `like` has a sampler or batch sampler of the user's own, which knows the old dataset only.
    """
    sampler = like.sampler
    if not _has_torchs_sampler(like):
        raise ValueError(
            f"validation_split cannot cut a DataLoader with a {type(sampler).__name__} of its own. "
            f"Split its dataset and give the second part as validation_data."
        )
    keeps_order = not shuffled or type(sampler) is SequentialSampler
    if keeps_order:
        sampler = SequentialSampler(dataset)
    else:
        sampler = RandomSampler(dataset, replacement=sampler.replacement, generator=sampler.generator)
    options = {"batch_size": like.batch_size, "sampler": sampler, "drop_last": like.drop_last and shuffled}
    return DataLoader(dataset, **_settings_of(like), **options)


def _settings_of(loader: DataLoader) -> dict[str, Any]:
    """All that a loader was made with, but for its dataset and what makes batches of it."""
    names = ["num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context"]
    names += ["generator", "prefetch_factor", "persistent_workers", "in_order"]
    return {name: getattr(loader, name) for name in names}


def _length_or_none(sized: Any) -> int | None:
    try:
        return len(sized)
    except TypeError:  # no `__len__`, or one that says it does not know
        return None


def _refuse_batch_size(data: Any, reading: Reading) -> None:
    if reading.batch_size is not None:
        raise ValueError(
            f"batch_size={reading.batch_size} was given, but a {type(data).__name__} brings its own batches. "
            f"Leave batch_size out, or set it where the batches are made."
        )


def _refuse_empty(length: int | None, data: Any) -> None:
    if length == 0:
        raise ValueError(f"the data is empty: a {type(data).__name__} of length 0, expected at least one sample.")


def _refuse_unknown_column(data: Any, name: str) -> None:
    columns = getattr(data, "column_names", None) or (list(data) if isinstance(data, Mapping) else [name])
    if name not in columns:
        raise ValueError(f"y={name!r} names no column of the data, which has {', '.join(map(repr, columns))}.")
