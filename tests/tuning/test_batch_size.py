"""The search for a batch size: what it tries, what it finds, what it takes and what it refuses."""

from __future__ import annotations

import gc
import json
import pickle
import weakref
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import kerastorch as kt
from kerastorch.tuning import BatchSize
from kerastorch.tuning.batch_size import Trial
from tests.test_untouched import assert_same, state_of

X = torch.rand(300, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
CPU_WORDS = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


class Full(nn.Module):
    """Has no memory for batches above `most`, in one stage of the step."""

    def __init__(self, most: float = 70, stage: str = "forward", error: BaseException | None = None) -> None:
        super().__init__()
        self.layer, self.most, self.stage = nn.Linear(4, 1), most, stage
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch._subclasses.FakeTensor):  # a forecast: it sees no trouble coming
            return self.layer(x)
        SEEN.append((len(x), self.training))
        stage = self.stage if len(x) > self.most else ""
        if stage == "forward" or (stage == "validation" and not self.training):
            raise self.error
        return Fails.apply(self.layer(x), self.error) if stage == "backward" else self.layer(x)


SEEN: list[tuple[int, bool]] = []  # outside of the module, which is put back


class Fails(torch.autograd.Function):
    """As it is; its backward pass fails."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ctx.error


class FullSGD(torch.optim.SGD):
    """Has no memory for its step after a batch above 70."""

    def step(self, closure=None):
        if SEEN[-1][0] > 70:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().step(closure)


def stacking_collate(samples: list) -> list[Tensor]:
    return [torch.stack(one) for one in zip(*samples, strict=True)]


def full_collate(samples: list) -> list[Tensor]:
    if len(samples) > 70:
        raise RuntimeError(CPU_WORDS)
    return torch.utils.data.default_collate(samples)


class Rows(Dataset):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


class FullRows(Rows):
    """Has no memory for many samples at a time."""

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        if len(indices) > 70:
            raise MemoryError
        return [self[index] for index in indices]


class Stream(IterableDataset):
    def __init__(self, samples: int = 300) -> None:
        self.samples = samples

    def __iter__(self):
        yield from zip(X[: self.samples], Y[: self.samples], strict=True)


class KnownStream(Stream):
    def __len__(self) -> int:
        return self.samples


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.full = Full()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.full(a + b)


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    SEEN.clear()


def model_of(module: nn.Module, optimizer="sgd", **options) -> kt.Model:
    return kt.Model(module, backend="cpu").compile(optimizer, "mse", **options)


def tried(found: BatchSize) -> list[int]:
    return [one.size for one in found.trials if one.was_run]


def loader(data=None, batch_size=16, **options) -> DataLoader:
    return DataLoader(TensorDataset(X, Y) if data is None else data, batch_size, **options)


# What is tried and found.


def test_power_doubles_from_init_until_something_does_not_fit() -> None:
    found = model_of(Full()).find_batch_size(X, Y, mode="power", init=3)
    assert found == 48 and tried(found) == [3, 6, 12, 24, 48, 96]
    assert [one.fits for one in found.trials] == [True] * 5 + [False]
    assert found.trials[-1].reason == "out of memory"


def test_binsearch_finds_the_very_largest() -> None:
    found = model_of(Full()).find_batch_size(X, Y, mode="binsearch", margin=0)
    assert found == 70 and tried(found)[:7] == [2, 4, 8, 16, 32, 64, 128]


def test_binsearch_is_content_within_its_margin() -> None:
    found = model_of(Full()).find_batch_size(X, Y, mode="binsearch", margin=0.1)
    assert found == 68 and tried(found)[6:] == [128, 96, 80, 72, 68]


@pytest.mark.parametrize("most", [1, 2, 37, 150, 299])
def test_predict_finds_the_largest_that_no_forecast_could_know_of(most) -> None:
    found = model_of(Full(most)).find_batch_size(X, Y, margin=0)
    assert found == most and most + 1 in tried(found)


@pytest.mark.parametrize("mode", ["predict", "power", "binsearch"])
def test_never_more_than_the_samples_there_are(mode) -> None:
    found = model_of(Full(most=1e9)).find_batch_size(X, Y, mode=mode)
    assert found == 300 == max(tried(found))
    assert max(size for size, _ in SEEN) == 300
    few = model_of(Full(most=1e9)).find_batch_size(X[:5], Y[:5], mode=mode, init=64)
    assert few == 5 and tried(few) == [5]


def test_predict_takes_all_at_once_where_there_is_memory_by_far() -> None:
    assert tried(model_of(nn.Linear(4, 1)).find_batch_size(X, Y)) == [300]


@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_a_first_size_that_does_not_fit_is_halved(mode) -> None:
    found = model_of(Full()).find_batch_size(X, Y, mode=mode, init=256, margin=0)
    assert tried(found)[:3] == [256, 128, 64]
    assert found == (64 if mode == "power" else 70)


@pytest.mark.parametrize("mode", ["predict", "power", "binsearch"])
def test_where_nothing_fits_it_is_said_what_a_step_takes_and_what_there_is(mode) -> None:
    model = model_of(Full(most=0))
    words = r"a step of batch size 1 .*does not fit into the 2 GB there are for it. Give compile precision='bf16'"
    with pytest.raises(torch.OutOfMemoryError, match=words):
        model.find_batch_size(X, Y, mode=mode, memory="2GB")
    assert model.batch_size is None


def test_a_forecast_that_not_even_one_sample_fits_is_trusted_on_the_cpu() -> None:
    big = nn.Sequential(nn.Flatten(), nn.Linear(4, 2**20), nn.Linear(2**20, 1))
    with pytest.raises(torch.OutOfMemoryError, match=r"batch size 1 takes .* does not fit into the 1 MB there are"):
        model_of(big).find_batch_size(X, Y, memory="1MB")


@pytest.mark.parametrize("max_trials", [1, 3])
def test_no_more_trials_than_allowed(max_trials) -> None:
    found = model_of(Full()).find_batch_size(X, Y, mode="power", max_trials=max_trials)
    assert tried(found) == [2, 4, 8][:max_trials] and found == tried(found)[-1]


def test_trials_have_the_steps_asked_for_and_a_validation() -> None:
    model_of(Full()).find_batch_size(X, Y, mode="power", init=50, steps_per_trial=2, max_trials=1)
    assert SEEN.count((50, True)) == 2 and SEEN.count((50, False)) == 1


@pytest.mark.parametrize("stage", ["forward", "backward", "validation"])
@pytest.mark.parametrize("mode", ["binsearch", "predict"])
def test_memory_may_run_out_at_any_stage_of_the_step(stage, mode) -> None:
    assert model_of(Full(stage=stage)).find_batch_size(X, Y, mode=mode, margin=0) == 70


@pytest.mark.parametrize("mode", ["binsearch", "predict"])
def test_memory_may_run_out_in_the_optimizer(mode) -> None:
    module = Full(most=1e9)
    model = model_of(module, FullSGD(module.parameters(), lr=0.1))
    assert model.find_batch_size(X, Y, mode=mode, margin=0) == 70


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_may_run_out_where_batches_are_made(workers) -> None:
    data = loader(collate_fn=full_collate, num_workers=workers)
    options = {"init": 40, "max_trials": 2} if workers else {"margin": 0}
    found = model_of(Full(most=1e9)).find_batch_size(data, mode="binsearch", **options)
    assert found == (40 if workers else 70) and found.trials[1].fits is (not workers)
    assert any(one.reason == "out of memory" for one in found.trials)


def test_memory_may_run_out_in_a_dataset() -> None:
    assert model_of(Full(most=1e9)).find_batch_size(FullRows(), mode="binsearch", margin=0) == 70


ERRORS = [
    torch.OutOfMemoryError("whatever"),
    MemoryError(),
    RuntimeError(CPU_WORDS),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
    RuntimeError("XPU out of memory. Tried to allocate 2 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("RESOURCE_EXHAUSTED: Attempting to reserve 2G at the bottom of memory"),
    RuntimeError("std::bad_alloc"),
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__} {error}"[:40])
def test_errors_that_say_that_memory_ran_out(error) -> None:
    found = model_of(Full(20, error=error)).find_batch_size(X, Y, mode="power", init=16)
    assert found == 16 and found.trials[-1].reason == "out of memory"


@pytest.mark.parametrize(
    "error", [ValueError("too large"), RuntimeError("shapes differ"), KeyError("x"), OSError(2, "memory, no file")]
)
@pytest.mark.parametrize("mode", ["predict", "power"])
def test_any_other_error_comes_through_unchanged_and_leaves_nothing(error, mode) -> None:
    model = model_of(Full(20, error=error), "adam")
    model.fit(X, Y, batch_size=10, verbose=0)
    before = state_of(model)
    with pytest.raises(type(error)) as caught:
        model.find_batch_size(X, Y, mode=mode)
    assert caught.value is error and not getattr(error, "__notes__", [])
    assert_same(before, state_of(model))
    assert model.batch_size is None


def test_nothing_of_a_trial_that_failed_is_kept_in_memory() -> None:
    kept = []

    class Keeps(Full):
        def forward(self, x):
            output = super().forward(x)
            kept.append(weakref.ref(output))
            return output

    model = model_of(Keeps(stage="validation"))
    model.find_batch_size(X, Y, mode="power")
    assert kept and all(one() is None for one in kept)


# Forms of data.

FRAME = {name: X[:, index].numpy() for index, name in enumerate("abcd")}
FORMS = {
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "tensors": lambda: (X, Y),
    "tuple": lambda: ((X, Y),),
    "tuple with weights": lambda: ((X, Y, torch.ones(300)),),
    "lists": lambda: (X.tolist(), Y.tolist()),
    "Dataset": lambda: (Rows(),),
    "TensorDataset": lambda: (TensorDataset(X, Y),),
    "IterableDataset": lambda: (Stream(),),
    "IterableDataset with a length": lambda: (KnownStream(),),
    "callable": lambda: (Stream,),
    "DataLoader": lambda: (loader(),),
    "DataLoader of a dataset": lambda: (loader(Rows(), shuffle=True, generator=torch.Generator().manual_seed(3)),),
    "DataLoader of a stream": lambda: (loader(Stream()),),
    "DataLoader with a sampler": lambda: (loader(sampler=WeightedRandomSampler(torch.ones(300), 300)),),
    "DataLoader that collates": lambda: (loader(collate_fn=stacking_collate),),
    "DataLoader that drops": lambda: (loader(drop_last=True),),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_data_of_any_form(form) -> None:
    found = model_of(Full()).find_batch_size(*FORMS[form](), mode="binsearch", margin=0)
    assert found == 70


@pytest.mark.parametrize("form", FORMS)
def test_all_samples_at_once_of_data_of_any_form(form) -> None:
    found = model_of(Full(1e9)).find_batch_size(*FORMS[form]())
    assert found == 300 and max(size for size, _ in SEEN) == 300


def test_dicts_of_inputs() -> None:
    found = model_of(Named()).find_batch_size({"a": X, "b": X.numpy()}, Y, mode="binsearch", margin=0)
    assert found == 70


def test_frames_of_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(FRAME)
    assert model_of(Full()).find_batch_size(frame, frame.sum(axis=1).to_frame(), mode="binsearch", margin=0) == 70


def test_datasets_of_hugging_face() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"x": X.tolist(), "label": Y.tolist()})

    model = model_of(Full())
    assert model.find_batch_size(data, mode="binsearch", margin=0) == 70
    assert model.find_batch_size(data, "label", mode="power") == 64


def test_a_loader_with_a_worker() -> None:
    data = loader(Rows(), num_workers=1)
    assert model_of(Full()).find_batch_size(data, mode="power", init=40) == 40


def test_a_loader_keeps_all_its_other_settings() -> None:
    made, sampler, generator = [], SubsetRandomSampler(range(250)), torch.Generator()
    collate = torch.utils.data.default_collate
    options = {"sampler": sampler, "drop_last": True, "generator": generator, "collate_fn": collate}
    data = loader(Rows(), **options)
    make = DataLoader.__init__

    def notes(self, *args, **options):
        make(self, *args, **options)
        made.append(self)

    with mock.patch.object(DataLoader, "__init__", notes):
        found = model_of(Full(1e9)).find_batch_size(data, mode="power", init=20)
    made = [one for one in made if one.batch_size is not None]
    assert found == 250 and {one.batch_size for one in made} == {1, 2, 20, 40, 80, 160, 250}
    for one in made:
        assert one.dataset is data.dataset and one.sampler is sampler and one.drop_last
        assert one.generator is generator and one.collate_fn is collate
    assert data.batch_size == 16


def test_samples_of_a_sampler_are_the_samples_there_are() -> None:
    data = loader(sampler=SubsetRandomSampler(range(90)))
    assert model_of(Full(1e9)).find_batch_size(data) == 90


@pytest.mark.parametrize("mode", ["predict", "power", "binsearch"])
def test_where_a_stream_ends_no_larger_batch_is_looked_for(mode) -> None:
    found = model_of(Full(1e9)).find_batch_size(Stream(90), mode=mode)
    assert found == 90 and 90 in tried(found)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: DataLoader(Rows(), batch_sampler=BatchSampler(SequentialSampler(Rows()), 7, False)), None),
        (lambda: DataLoader(Rows(), batch_sampler=[[1, 2], [3]]), "batches come from a list of its own"),
        (lambda: type("Mine", (DataLoader,), {})(Rows(), 4), "the Mine's batches come from its own class"),
        (lambda: DataLoader(Rows(), None), "cannot be made anew for other sizes"),
        (lambda: [(X, Y), (X, Y)], "data is a list, whose batches are made already"),
        (lambda: iter([(X, Y)]), "data is a list_iterator, whose batches are made already"),
        (lambda: ((X, Y) for _ in range(3)), "data is a generator, whose batches are made already"),
    ],
)
def test_batches_that_are_made_already_are_refused(data, words) -> None:
    words = words or "from a BatchSampler of its own, which cannot be made anew .* Give its dataset, or a plain Data"
    model, given = model_of(Full()), data()
    with pytest.raises(TypeError, match=words):
        model.find_batch_size(given)
    assert SEEN == [] and model.batch_size is None
    if "generator" in type(given).__name__:
        assert len(list(given)) == 3


@pytest.mark.parametrize("data", [lambda: (X[:1], Y[:1]), lambda: (loader(TensorDataset(X[:1], Y[:1])),)])
def test_one_sample_is_no_choice(data) -> None:
    with pytest.raises(ValueError, match="the data has one sample, so there are no batch sizes to choose from"):
        model_of(Full()).find_batch_size(*data())


def test_one_sample_of_a_stream_is_no_choice_either() -> None:
    with pytest.raises(ValueError, match="the data has one sample"):
        model_of(Full()).find_batch_size(Stream(1))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"memory": "lots"}, ValueError, r"memory='lots' is no amount of memory. Give bytes"),
        ({"memory": 0}, ValueError, r"memory=0 is no amount"),
        ({"memory": -1}, ValueError, r"memory=-1 is no amount"),
        ({"memory": "0GB"}, ValueError, r"memory='0GB' is no amount"),
        ({"memory": True}, TypeError, r"memory=True is a bool. Give bytes"),
        ({"memory": 1.5}, TypeError, r"memory=1.5 is a float. Give bytes"),
        ({"mode": "fast"}, ValueError, "mode='fast' is not known. Give 'predict', 'power', 'binsearch'"),
        ({"mode": None}, ValueError, "mode=None is not known"),
        ({"mode": ["power"]}, ValueError, r"mode=\['power'\] is not known"),
        ({"margin": 1}, ValueError, "margin=1 is no part of a batch size"),
        ({"margin": -0.1}, ValueError, "margin=-0.1 is no part"),
        ({"margin": True}, ValueError, "margin=True is no part"),
        ({"margin": "5%"}, ValueError, "margin='5%' is no part"),
        ({"margin": float("nan")}, ValueError, "margin=nan is no part"),
        ({"init": 0}, ValueError, "init=0"),
        ({"steps_per_trial": 0}, ValueError, "steps_per_trial=0"),
        ({"max_trials": 0}, ValueError, "max_trials=0"),
        ({"max_trials": 2.5}, (ValueError, TypeError), "max_trials=2.5"),
    ],
)
def test_arguments_that_say_nothing_are_refused_before_anything_is_tried(options, error, words) -> None:
    model = model_of(Full())
    with pytest.raises(error, match=words):
        model.find_batch_size(X, Y, **options)
    assert SEEN == []


def test_a_model_that_is_not_compiled_is_refused() -> None:
    with pytest.raises(RuntimeError, match="find_batch_size"):
        kt.Model(Full(), backend="cpu").find_batch_size(X, Y)


# What the next `fit` does with it.


def steps_of(model: kt.Model, *data, **options) -> int:
    return model.fit(*data, verbose=0, **options).params["steps"]


def test_the_next_fit_takes_what_was_found() -> None:
    model = model_of(Full())
    assert steps_of(model, X, Y) == 10  # batches of 32
    found = model.find_batch_size(X, Y, mode="binsearch", margin=0)
    assert model.batch_size is found and steps_of(model, X, Y) == 5
    assert max(size for size, _ in SEEN[-5:]) == 70
    assert steps_of(model, Rows()) == 5 and steps_of(model, X, Y, batch_size=30) == 10


@pytest.mark.parametrize("validation", [lambda: {"validation_data": Rows()}, lambda: {"validation_split": 0.5}])
def test_a_validation_takes_it_too(validation) -> None:
    model = model_of(Full())
    model.find_batch_size(X, Y, mode="binsearch", margin=0)
    SEEN.clear()
    model.fit(X, Y, verbose=0, **validation())
    assert {max(size for size, trains in SEEN if trains is one) for one in (True, False)} == {70}


def test_only_the_loader_that_was_given_is_made_anew() -> None:
    model, data = model_of(Full()), loader()
    model.find_batch_size(data, mode="power")
    assert steps_of(model, data) == 5 and steps_of(model, loader()) == 19
    assert data.batch_size == 16 and len(data) == 19


def test_a_batch_size_beside_the_loader_that_was_given_is_refused_as_ever() -> None:
    model, data = model_of(Full()), loader()
    model.find_batch_size(data, mode="power")
    with pytest.raises(ValueError, match="batch_size=4 was given, but a DataLoader brings its own batches"):
        model.fit(data, batch_size=4, verbose=0)


def test_a_loader_is_not_kept_alive_for_it() -> None:
    model, data = model_of(Full(1e9)), loader()
    model.find_batch_size(data, mode="power")
    gone = weakref.ref(data)
    del data
    gc.collect()
    assert gone() is None and steps_of(model, X, Y) == 1


def test_a_search_that_is_not_applied_changes_nothing() -> None:
    model, data = model_of(Full()), loader()
    before = state_of(model)
    assert model.find_batch_size(data, mode="power", apply=False) == 64
    assert_same(before, state_of(model))
    assert model.batch_size is None and steps_of(model, data) == 19 and steps_of(model, X, Y) == 10


def test_fit_searches_first_if_asked_to() -> None:
    model = model_of(Full())
    history = model.fit(X, Y, batch_size="auto", epochs=2, verbose=0)
    assert 66 < model.batch_size <= 70 and history.params["steps"] == 5 and len(history.history["loss"]) == 2
    again = loader()
    assert steps_of(model, again, batch_size="auto") == 5


def test_fit_searches_with_the_weights_it_was_given(digits) -> None:
    model = kt.Model(nn.Linear(64, 10), backend="cpu").compile("sgd", "cross_entropy")
    seen = []
    with mock.patch.object(model, "find_batch_size", lambda *data, **options: seen.append(options) or BatchSize(100)):
        history = model.fit(*digits, batch_size="auto", class_weight={3: 2.0}, accumulate=2, verbose=0)
    assert history.params["steps"] == -(-len(digits[0]) // 100)
    assert seen == [{"sample_weight": None, "accumulate": 2, "microbatch": None, "class_weight": {3: 2.0}}]


def test_unknown_words_for_a_batch_size_are_refused() -> None:
    with pytest.raises((ValueError, TypeError), match="batch_size='most'"):
        model_of(Full()).fit(X, Y, batch_size="most", verbose=0)


# The result.


def found_by_hand(size: int = 64, budget: int | None = 2 * 10**9) -> BatchSize:
    result = BatchSize(size)
    result.trials = (
        Trial(16, True, 250 * 10**6, 1000.0),
        Trial(32, True, 500 * 10**6, 1990.0),
        Trial(64, True, 10**9, 2000.0),
        Trial(128, False, 2 * 10**9, None, True, "out of memory"),
        Trial(256, False, 4 * 10**9, None, False),
    )
    result.per_rank, result.budget_bytes = size // 2, budget
    return result


def test_the_result_is_a_whole_number() -> None:
    found = found_by_hand()
    assert found == 64 and isinstance(found, int) and found // 3 == 21 and len(range(found)) == 64
    assert json.dumps({"batch_size": found}) == '{"batch_size": 64}'
    assert hash(found) == hash(64) and f"{found:d}" == "64" and [*range(100)][found] == 64
    assert np.zeros(found).shape == (64,) and torch.zeros(found).shape == (64,)
    assert len(DataLoader(Rows(), batch_size=found)) == 5


def test_the_result_says_what_is_as_fast() -> None:
    assert found_by_hand().throughput_best == 32 and found_by_hand().per_rank == 32
    assert repr(found_by_hand()) == "BatchSize(64, per_rank=32, throughput_best=32)"
    assert BatchSize(8).throughput_best == 8  # nothing was measured


def test_the_result_is_a_table() -> None:
    assert str(found_by_hand()).splitlines() == [
        "batch size 64 of 2 GB; as fast from 32 on",
        "  batch size    fits    peak memory    samples/s",
        "------------  ------  -------------  -----------  -------------------",
        "          16     yes         250 MB        1,000",
        "          32     yes         500 MB        1,990",
        "          64     yes           1 GB        2,000             <- found",
        "         128      no           2 GB                     out of memory",
        "         256      no           4 GB               forecast, not tried",
    ]
    assert str(found_by_hand(budget=None)).startswith("batch size 64; as fast")


def test_the_result_survives_being_pickled_and_copied() -> None:
    again = pickle.loads(pickle.dumps(found_by_hand()))
    assert again == 64 and again.trials == found_by_hand().trials
    assert (again.per_rank, again.budget_bytes) == (32, 2 * 10**9)


@pytest.mark.parametrize(("budget", "far"), [(None, ""), (2 * 10**9, ""), (90 * 10**9, ", of 90 GB")])
def test_the_result_is_drawn(tmp_path, budget, far) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    path = tmp_path / "found.png"
    figure = found_by_hand(budget=budget).plot(str(path))
    assert isinstance(figure, Figure) and path.stat().st_size > 5000
    memory, speed = figure.axes
    assert memory.get_title() == f"peak memory in GB{far}" and speed.get_title() == "samples/s"
    labels = [text.get_text() for text in memory.get_legend().get_texts()]
    assert labels[:2] == ["fits", "does not fit"] and ("there is" in labels) is (budget == 2 * 10**9)
    assert speed.lines[0].get_xydata().tolist() == [[16, 1000], [32, 1990], [64, 2000]]
    pyplot.close(figure)


def test_a_search_leaves_all_its_trials_in_the_result() -> None:
    found = model_of(Full()).find_batch_size(X, Y, mode="power", memory="2GB")
    assert found.per_rank == found == 64 and found.budget_bytes == 2 * 10**9
    assert all(one.samples_per_s > 0 for one in found.trials if one.fits)
    assert found.throughput_best in tried(found) and found.trials[-1].samples_per_s is None
    assert "<- found" in str(found) and "out of memory" in str(found)


def test_a_search_within_a_run_of_the_same_model_is_refused() -> None:
    class Searches(kt.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.find_batch_size(X, Y)

    with pytest.raises(RuntimeError, match="called by a callback while the same model trains"):
        model_of(Full()).fit(X, Y, verbose=0, callbacks=[Searches()])


# On a GPU: these take its real memory.


def wide(width: int = 2048, layers: int = 8) -> nn.Module:
    parts = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*parts, nn.Linear(width, 1))


class Wide(Dataset):
    """Many samples, of which only one is ever kept."""

    def __init__(self) -> None:
        self.row = torch.rand(2048)

    def __len__(self) -> int:
        return 2**23

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        return Stacked(self.row.expand(len(indices), -1), torch.zeros(len(indices), 1))


class Stacked(list):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__([0])
        self.x, self.y = x, y


def stacked(samples: Stacked) -> tuple[Tensor, Tensor]:
    return samples.x, samples.y


@pytest.fixture
def half_a_gigabyte():
    """Of the GPU's memory is left to this process, whoever else is there: the allocator's own limit."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**29) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_runs_out_of_memory_and_goes_on(half_a_gigabyte) -> None:
    torch.manual_seed(0)
    model = kt.Model(wide(), backend="cuda").compile("sgd", "mse")
    data = DataLoader(Wide(), 32, collate_fn=stacked)
    before = [one.clone() for one in model.module.parameters()]
    found = model.find_batch_size(data, mode="power", init=256)
    assert found.trials[-1].reason == "out of memory" and found.trials[-1].size == 2 * found
    assert found.trials[-1].peak_bytes <= 2**29
    assert all(map(torch.equal, before, model.module.parameters()))
    assert model.fit(data, steps_per_epoch=3, verbose=0).params["steps"] == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_forecast_on_cuda_is_as_good_as_a_search(half_a_gigabyte) -> None:
    data = DataLoader(Wide(), 32, collate_fn=stacked)

    def found(mode: str) -> BatchSize:
        torch.manual_seed(0)
        model = kt.Model(wide(), backend="cuda").compile("sgd", "mse")
        return model.find_batch_size(data, mode=mode, memory=400_000_000, margin=0.02)

    predicted, searched = found("predict"), found("binsearch")
    assert predicted == pytest.approx(searched, rel=0.05)
    assert len(tried(predicted)) <= 3
    assert all(one.peak_bytes <= 400_000_000 for one in predicted.trials if one.was_run)
