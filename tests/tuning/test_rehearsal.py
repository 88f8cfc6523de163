"""A search leaves no trace: whatever is trained, `fit` after it is bit-equal to `fit` alone."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import kerastorch as kt
from kerastorch.tuning.rehearsal import rehearsing
from tests.test_untouched import Draws, Restless, assert_same, state_of


def net(*extra: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), *extra, nn.Linear(16, 10))


def compiled(module: nn.Module | None = None, optimizer: object = "adam", kind: type = kt.Model, **options) -> kt.Model:
    return kind(module or net(nn.Dropout(0.5)), backend="cpu").compile(optimizer, "cross_entropy", **options)


class Adversaries(kt.Model):
    """Two optimizers, stepped by hand."""

    def train_step(self, batch):
        for name, sign in (("0", 1.0), ("3", -1.0)):
            loss = F.cross_entropy(self.module(batch[0]), batch[1])
            self.backward(sign * loss)
            self.optimizer_step(name)
        self.log("last", loss)


class OwnLoss(kt.Model):
    """Counts, too."""

    calls = 0

    def compute_loss(self, batch):
        self.calls += 1
        return F.cross_entropy(self.module(batch[0]), batch[1]) + torch.rand(())


def halving(optimizer: torch.optim.Optimizer) -> object:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


class Distracted(nn.Module):
    """Draws from each generator there is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.generator = nn.Linear(64, 10), torch.Generator().manual_seed(7)

    def forward(self, x: Tensor) -> Tensor:
        noise = random.random() + np.random.rand() + torch.rand(()) + torch.rand((), generator=self.generator)
        return self.layer(x) * noise


CASES = {
    "dropout and BatchNorm": lambda: (compiled(), {}),
    "momentum": lambda: (compiled(optimizer=lambda given: torch.optim.SGD(given, 0.1, momentum=0.9)), {}),
    "a scaler": lambda: (compiled(precision="16"), {}),
    "bf16": lambda: (compiled(precision="bf16"), {}),
    "one cycle": lambda: (compiled(schedule="one_cycle"), {}),
    "a schedule of torch's each epoch": lambda: (compiled(schedule=halving), {}),
    "a schedule of torch's each step": lambda: (compiled(schedule=("step", halving)), {}),
    "clipping": lambda: (compiled(clip=0.1), {}),
    "metrics": lambda: (compiled(metrics=["accuracy", "f1", MulticlassAccuracy(10)]), {"validation_split": 0.2}),
    "accumulation": lambda: (compiled(), {"accumulate": 3}),
    "microbatches": lambda: (compiled(), {"microbatch": 5}),
    "weights of classes": lambda: (compiled(), {"class_weight": {1: 3.0}}),
    "weights of samples": lambda: (compiled(), {"sample_weight": torch.arange(150.0) / 75}),
    "a lazy module": lambda: (compiled(nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(10))), {}),
    "two optimizers": lambda: (compiled(optimizer={"0": "adam", "3": "sgd"}, kind=Adversaries, module=net()), {}),
    "a loss of one's own": lambda: (compiled(kind=OwnLoss), {}),
    "random numbers of all kinds": lambda: (compiled(Distracted()), {}),
}


def all_of(model: kt.Model) -> dict:
    """What a run leaves: no identities, which differ between two models."""
    return {
        "weights": copy.deepcopy(model.module.state_dict()),
        "gradients": [None if one.grad is None else one.grad.clone() for one in model.module.parameters()],
        "optimizers": [copy.deepcopy(one.optimizer.state_dict()) for one in model.updates.values()],
        "scaler": model._compiled.scaler and model._compiled.scaler.state_dict(),
        "modes": [part.training for part in model.module.modules()],
        "random": (random.getstate(), str(np.random.get_state(legacy=False)["state"]), torch.get_rng_state()),
        "history": model.history.history,
        "epochs": model.epochs_trained,
        "norms": [update.gradient_norm for update in model.updates.values()],
        "calls": getattr(model, "calls", 0),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_as_if_nothing_had_been_tried(digits, case) -> None:
    def trained(searches: bool) -> list[dict]:
        kt.set_seed(3)
        (model, options), found = CASES[case](), []
        for _ in range(2):  # the second time with an optimizer that has a state
            if searches:
                tried = {name: value for name, value in options.items() if name != "validation_split"}
                before = None if model.optimizer is None else state_of(model)  # a lazy parameter has no values
                for mode in ("power", "predict"):
                    model.find_batch_size(*digits, mode=mode, init=32, apply=False, steps_per_trial=2, **tried)
                assert before is None or assert_same(before, state_of(model)) is None
            model.fit(*digits, epochs=2, batch_size=20, verbose=0, **options)
            found.append(all_of(model))
        return found

    assert_same(trained(False), trained(True))


@pytest.mark.parametrize("mode", ["power", "predict"])
def test_a_loader_draws_the_same_order_afterwards(digits, mode) -> None:
    def trained(searches: bool) -> list:
        kt.set_seed(3)
        generator, rows = torch.Generator().manual_seed(5), Draws(*digits)
        data = DataLoader(rows, 20, shuffle=True, generator=generator)
        model = compiled()
        if searches:
            assert model.find_batch_size(data, mode=mode, init=50, apply=False) > 50
            assert rows.reads == 0
        model.fit(data, epochs=2, verbose=0)
        return [all_of(model), generator.get_state(), rows.noise.bit_generator.state, rows.reads]

    assert_same(trained(False), trained(True))


def test_a_size_that_is_applied_trains_as_one_that_is_given(digits) -> None:
    def trained(searches: bool) -> dict:
        kt.set_seed(3)
        model = compiled()
        if searches:
            assert model.find_batch_size(*digits, mode="power", init=40, max_trials=1) == 40
        model.fit(*digits, epochs=2, verbose=0, **({} if searches else {"batch_size": 40}))
        return all_of(model)

    assert_same(trained(False), trained(True))


class Breaks(nn.Module):
    """Fails where a batch is large, after having changed much."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.inside, self.error = net(nn.Dropout(0.5)), error
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        self.inside.eval()
        with torch.no_grad():
            self.inside[0].bias.add_(1)
        if len(x) >= 60 and not isinstance(x, torch._subclasses.FakeTensor):
            raise self.error
        return self.inside(x)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3), torch.OutOfMemoryError("no")])
def test_whatever_ends_a_trial_nothing_of_it_is_left(digits, error) -> None:
    model = compiled(Breaks(error))
    model.fit(*digits, batch_size=30, verbose=0)
    model.module.inside[0].weight.grad = torch.ones(16, 64)
    before = state_of(model)
    if isinstance(error, torch.OutOfMemoryError):
        assert model.find_batch_size(*digits, mode="power", init=20, apply=False) == 40
    else:
        with pytest.raises(type(error)):
            model.find_batch_size(*digits, mode="power", init=20)
    assert_same(before, state_of(model))
    assert torch.equal(model.module.inside[0].weight.grad, torch.ones(16, 64))
    assert set(model.module.sizes) == {30} and model.batch_size is None


def test_an_interrupt_ends_the_search_and_not_only_a_trial(digits) -> None:
    class Interrupted(Breaks):
        def forward(self, x):
            if len(x) == 40 and not isinstance(x, torch._subclasses.FakeTensor):
                import signal

                signal.raise_signal(signal.SIGINT)
            return super().forward(x)

    model = compiled(Interrupted(ValueError("later")))
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        model.find_batch_size(*digits, mode="power", init=20)
    assert_same(before, state_of(model))


@pytest.mark.filterwarnings("ignore")
def test_a_module_that_changes_itself_is_put_back() -> None:
    tokens, classes = torch.randint(0, 10, (40, 4)), torch.arange(40) % 3
    module = Restless()
    model = compiled(module)
    before = state_of(model)
    assert model.find_batch_size(tokens, classes, apply=False) == 40
    assert_same(before, state_of(model))
    assert module.number == 0 and module.plain.tolist() == [0, 0] and module.seen == [] and module.latest is None


def test_warnings_wait_for_the_run_that_is_to_follow(digits) -> None:
    import warnings

    class Warns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("mind this", stacklevel=1)
            return self.layer(x)

    model = compiled(Warns())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.find_batch_size(*digits, apply=False)
    with pytest.warns(UserWarning, match="mind this"):
        model.fit(*digits, verbose=0)


def test_nothing_is_printed_and_no_file_is_written(digits, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    compiled(metrics=["accuracy"]).find_batch_size(*digits, mode="power", init=64)
    assert capsys.readouterr() == ("", "") and not [*tmp_path.iterdir()]


def test_hooks_history_and_flags_of_the_model_are_as_they_were(digits) -> None:
    model, calls = compiled(), []
    history = model.fit(*digits, verbose=0)
    model.stop_training = True
    model.module.register_forward_hook(lambda *_: calls.append(1))
    model.find_batch_size(*digits, mode="power", init=64, apply=False)
    assert model.history is history and model.stop_training and calls and model._live_run is None


def test_two_searches_find_the_same(digits) -> None:
    model = compiled(Breaks(torch.OutOfMemoryError("no")))
    sizes = [model.find_batch_size(*digits, mode="binsearch", margin=0) for _ in range(2)]
    assert sizes == [59, 59]


def test_what_is_done_in_a_rehearsal_can_be_undone_within(digits) -> None:
    model = compiled()
    before = state_of(model)
    with rehearsing(model, TensorDataset(*digits)) as undo:
        for _ in range(2):
            model.fit(*digits, verbose=0)
            undo()
            assert_same(before, state_of(model))
        model.fit(*digits, verbose=0)
    assert_same(before, state_of(model))


class Counted(Dataset):
    def __init__(self, samples: int) -> None:
        self.samples, self.reads = samples, 0

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads += 1
        return torch.rand(64), index % 10


def test_a_trial_reads_no_more_than_it_needs() -> None:
    data, reads = Counted(10**6), []

    class Reads(nn.Linear):
        def forward(self, x):
            reads.append(data.reads)
            return super().forward(x)

    model = compiled(Reads(64, 10))
    assert model.find_batch_size(data, mode="power", init=8, max_trials=1, steps_per_trial=2) == 8
    assert max(reads) <= 2 * 8 + 8 + 8  # of one trial: steps, the validation, and a batch that is read ahead
