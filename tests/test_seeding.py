"""Seeds: what one seed reproduces, and that the order of an epoch depends on the seed and its number alone."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import kerastorch as kt
from kerastorch import seeding
from kerastorch.seeding import epoch_order


@pytest.fixture(autouse=True)
def _unseeded(monkeypatch):
    """`set_seed` is remembered by the process; here each test starts, and ends, without it."""
    monkeypatch.setattr(seeding, "_order_seed", None)
    torch.manual_seed(0)


class Recorder(nn.Module):
    """Remembers the samples in the order in which it has seen them."""

    def __init__(self, *, draws: int = 0) -> None:
        super().__init__()
        self.scale, self.draws, self.seen = nn.Parameter(torch.ones(1)), draws, []

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(self.draws)
        self.seen += x[:, 0].int().tolist()
        return self.scale * x


def orders(*, epochs=2, samples=20, fits=1, draws=0, between=lambda: None, **options) -> list[list[int]]:
    """The order of each epoch of training on samples 0, 1, 2..."""
    net, x = Recorder(draws=draws), torch.arange(float(samples))[:, None]
    model = kt.Model(net, backend="cpu").compile("sgd", "mse", lr=0.0)
    for _ in range(fits):
        between()
        model.fit(x, x, epochs=epochs, batch_size=6, verbose=0, **options)
    return [net.seen[start : start + samples] for start in range(0, len(net.seen), samples)]


def dropout_run(*, fits=1, epochs=4) -> list[Tensor]:
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    model = kt.Model(net, backend="cpu").compile("adam", "mse", lr=0.01)
    x = torch.randn(24, 3)
    for _ in range(fits):
        model.fit(x, x[:, :1], epochs=epochs, batch_size=5, verbose=0)
    return [parameter.detach() for parameter in net.parameters()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


# One seed for everything.


def test_set_seed_reproduces_weights_dropout_and_shuffling() -> None:
    runs = []
    for seed in (5, 5, 6):
        kt.set_seed(seed)
        runs.append(dropout_run())
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


def test_set_seed_seeds_python_numpy_and_torch() -> None:
    drawn = []
    for _ in range(2):
        kt.set_seed(7)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


def test_two_epochs_at_once_are_one_and_one_more() -> None:
    kt.set_seed(3)
    at_once = dropout_run(epochs=2)
    kt.set_seed(3)
    assert equal(at_once, dropout_run(fits=2, epochs=1))


def test_deterministic_algorithms_are_asked_for_only_where_wanted() -> None:
    benchmark = torch.backends.cudnn.benchmark
    try:
        kt.set_seed(0)
        assert not torch.are_deterministic_algorithms_enabled()
        kt.set_seed(0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        kt.set_seed(0)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = benchmark


@pytest.fixture
def algorithms(monkeypatch):
    """torch's own switches, put back afterwards."""
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches = cudnn.deterministic, cudnn.benchmark
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield cudnn
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    cudnn.deterministic, cudnn.benchmark = switches


def test_deterministic_warns_or_raises_as_asked_and_can_be_switched_off(algorithms) -> None:
    kt.set_seed(0, deterministic="warn")
    assert torch.is_deterministic_algorithms_warn_only_enabled() and algorithms.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    kt.set_seed(0, True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    kt.set_seed(1)
    assert torch.are_deterministic_algorithms_enabled()
    kt.set_seed(0, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled() and not algorithms.deterministic


def test_benchmark_is_a_switch_of_its_own(algorithms) -> None:
    kt.set_seed(0, benchmark=True)
    assert algorithms.benchmark
    kt.set_seed(1)
    assert algorithms.benchmark
    kt.set_seed(0, deterministic=True)
    assert not algorithms.benchmark
    kt.set_seed(0, deterministic=False, benchmark=True)
    assert algorithms.benchmark
    kt.set_seed(0, benchmark=False)
    assert not algorithms.benchmark


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"deterministic": "yes"}, "deterministic='yes' is not known"),
        ({"deterministic": 1}, "deterministic=1 is not known"),
        ({"benchmark": "on"}, "benchmark='on' is not known"),
        ({"deterministic": True, "benchmark": True}, "contradict each other"),
    ],
)
def test_switches_that_are_none_are_refused_and_nothing_is_seeded(algorithms, options, text) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=text):
        kt.set_seed(3, **options)
    assert torch.equal(torch.get_rng_state(), before)


class Noise(Dataset):
    """Draws from all three generators, as augmentation does."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])
        return drawn, drawn


def test_data_workers_draw_the_same_in_each_run_and_others_in_each_epoch_and_worker() -> None:
    runs = []
    for seed in (3, 3, 4):
        kt.set_seed(seed)
        net, drawn = Recorder(), []
        net.register_forward_pre_hook(lambda _, inputs, drawn=drawn: drawn.append(inputs[0].clone()))
        loader = DataLoader(Noise(), batch_size=2, num_workers=2, shuffle=True)
        kt.Model(net, backend="cpu").compile("sgd", "mse", lr=0.0).fit(loader, epochs=2, verbose=0)
        runs.append(torch.cat(drawn))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    for column in runs[0].T:
        assert len(column.unique()) == 16


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "7", True, None], ids=str)
def test_bad_seed_is_refused_and_changes_nothing(seed) -> None:
    kt.set_seed(1)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="is not a seed. Give an int from 0 to 4294967295"):
        kt.set_seed(seed)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [0, 2**32 - 1, np.int64(5)], ids=str)
def test_seeds_at_the_ends_and_of_numpy_are_taken(seed) -> None:
    kt.set_seed(seed)
    assert sorted(epoch_order(5, 0).tolist()) == list(range(5))


# The order of an epoch.


def test_order_is_a_permutation_that_differs_by_epoch_and_by_seed() -> None:
    kt.set_seed(0)
    first, second = orders()
    kt.set_seed(1)
    other, _ = orders()
    assert sorted(first) == sorted(second) == list(range(20))
    assert len({tuple(order) for order in (first, second, other)}) == 3


def test_neighbouring_seeds_and_epochs_share_no_order() -> None:
    found = set()
    for seed in range(10):
        kt.set_seed(seed)
        found |= {tuple(epoch_order(20, epoch).tolist()) for epoch in range(10)}
    assert len(found) == 100


def test_order_does_not_depend_on_what_the_model_draws() -> None:
    kt.set_seed(2)
    quiet = orders()
    assert orders(draws=3) == quiet  # nor on what was drawn before


def test_order_after_set_seed_does_not_depend_on_the_global_generators() -> None:
    def disturb() -> None:
        torch.manual_seed(99)
        random.seed(99)
        np.random.seed(99)

    kt.set_seed(2)
    quiet = orders()
    assert orders(between=disturb) == quiet


def test_order_goes_on_from_fit_to_fit() -> None:
    kt.set_seed(2)
    assert orders(epochs=1, fits=3) == orders(epochs=3)


def test_order_of_a_later_initial_epoch_is_that_of_the_uninterrupted_run() -> None:
    kt.set_seed(2)
    assert orders(epochs=4, initial_epoch=2) == orders(epochs=4)[2:]


def test_order_does_not_depend_on_batch_size_or_validation() -> None:
    kt.set_seed(2)
    x = torch.zeros(4, 1)
    with_validation = orders(epochs=1, validation_data=(x, x))[0]
    assert with_validation == orders(epochs=1)[0] == epoch_order(20, 0).tolist()


def test_order_without_shuffling_is_that_of_the_data() -> None:
    assert orders(epochs=1, shuffle=False) == [list(range(20))]


def test_order_follows_torchs_seed_until_set_seed_is_called() -> None:
    torch.manual_seed(11)
    first = orders()
    assert orders() == first  # the seed counts, not how far its generator has come
    torch.manual_seed(12)
    second = orders()
    assert second != first
    torch.manual_seed(11)
    assert orders() == first
    kt.set_seed(12)
    assert orders() == second  # one and the same seed, whoever sets it
    torch.manual_seed(11)
    assert orders() == second


def test_negative_seed_of_torch_has_an_order() -> None:
    torch.manual_seed(-1)
    assert sorted(epoch_order(9, 0).tolist()) == list(range(9))


def test_shuffling_draws_nothing_from_any_global_generator() -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    orders()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_order_is_the_same_in_another_process() -> None:
    code = "import kerastorch as kt; kt.set_seed(4); print(kt.seeding.epoch_order(12, 3).tolist())"
    kt.set_seed(4)
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(epoch_order(12, 3).tolist())
