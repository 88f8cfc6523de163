"""Files of ModelCheckpoint and the states of all callbacks: a run that goes on is the one that never ended."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch import checkpoint
from kerastorch.callbacks import (
    EMA,
    BackupAndRestore,
    CSVLogger,
    EarlyStopping,
    GradNorm,
    LearningRateScheduler,
    ModelCheckpoint,
    ReduceLROnPlateau,
    StochasticWeightAveraging,
    TensorBoard,
    Unfreeze,
)
from tests.reference import DieBehindWhatIsSaved as Die
from tests.reference import Killed

X = torch.rand(44, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
BATCHES, EPOCHS = 11, 3


def fit(callbacks, *, optimizer="adamw", schedule=None, frozen=(), **options):
    """A run in the working folder; everything is made anew."""
    kt.set_seed(1)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    model = kt.Model(net, backend="cpu")
    for pattern in frozen:
        model.freeze(pattern)
    model.compile(optimizer, "mse", lr=0.02, metrics=["mae"], schedule=schedule)
    options = {"epochs": EPOCHS, "batch_size": 4, "validation_data": (X, Y), "accumulate": 2, "verbose": 0} | options
    model.fit(X, Y, callbacks=callbacks, **options)
    return model


def differences(one, other, where=""):
    """Where nested states differ, if only in the last bit."""
    one, other = (tuple(part) if isinstance(part, (list, tuple)) else part for part in (one, other))
    if type(one) is not type(other):
        return [f"{where}: {one!r} instead of {other!r}"]
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [f"{where}: another tensor"]
    if isinstance(one, dict):
        found = [] if one.keys() == other.keys() else [f"{where}: {[*one]} instead of {[*other]}"]
        return found + [
            line for key in one.keys() & other.keys() for line in differences(one[key], other[key], f"{where}.{key}")
        ]
    if isinstance(one, tuple):
        found = [] if len(one) == len(other) else [f"{where}: {one!r} instead of {other!r}"]
        parts = zip(one, other, strict=False)
        return found + [line for number, pair in enumerate(parts) for line in differences(*pair, f"{where}[{number}]")]
    return [] if one == other or one != one else [f"{where}: {one!r} instead of {other!r}"]


def state_of(model, callbacks):
    """All that a run leaves behind, but for files."""
    history = model.history
    return {
        "weights": dict(model.module.state_dict()),
        "optimizer": model.optimizer.state_dict(),
        "history": [history.history, history.epoch, history.intervals],
        "counts": [model.steps_taken, model.epochs_trained],
        "callbacks": [[type(one).__name__, one.state_dict()] for one in callbacks],
    }


# ModelCheckpoint, first in the list.


KEPT = "kept"


def many():
    return [
        ModelCheckpoint("a/{epoch}-{val_loss:.4f}.pt", save_last=True),
        EMA(0.9),
        EarlyStopping("val_loss", patience=50, restore_best_weights=True),
        ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=0.2),
        LearningRateScheduler(lambda epoch, rate: 0.9 * rate if epoch else rate),
        CSVLogger("log.csv"),
        ModelCheckpoint("b/{step:02d}-{batch}.pt", "loss", save_top_k=2, save_freq=5),
        ModelCheckpoint("c/best.pt", save_best_only=True),
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Goes into a folder of this name."""

    def enter(name):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        return tmp_path / name

    return enter


def files():
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
def test_each_file_is_gone_on_from_exactly_whatever_comes_behind_the_one_that_writes_it(folder, background):
    def callbacks():
        within = ModelCheckpoint("within/{epoch}-{step:02d}-{batch}.pt", save_freq=7, background=background)
        return [within, ModelCheckpoint("ends/{epoch}.pt", background=background), *many()]

    origin, others = folder("whole"), callbacks()
    whole = fit(others)
    expected = Path("log.csv").read_bytes()
    names = [name for name in files() if name.startswith(("within", "ends"))]
    assert len(names) == EPOCHS * BATCHES // 7 + EPOCHS
    for number, name in enumerate(names):
        target = folder(f"again{number}")
        shutil.copytree(origin, target, dirs_exist_ok=True)
        again = callbacks()
        model = fit(again, resume=name)
        assert Path("log.csv").read_bytes() == expected, name
        found = [line for line in differences(state_of(model, again), state_of(whole, others)) if KEPT not in line]
        assert found == [], name
        assert set(files()) >= set(names)


@pytest.mark.parametrize(("after", "background"), [(1, False), (11, False), (12, True), (33, True)])
def test_a_run_that_died_leaves_the_files_of_the_one_that_did_not(folder, after, background):
    def callbacks(after=-1):
        return [ModelCheckpoint("now.pt", save_freq=1, background=background), *many(), Die(after)]

    folder("whole")
    others = callbacks()
    whole = fit(others, validation_freq="4 steps")
    expected, log = files(), Path("log.csv").read_bytes()
    folder("died")
    with pytest.raises(Killed):
        fit(callbacks(after), validation_freq="4 steps")
    again = callbacks()
    model = fit(again, validation_freq="4 steps", resume="now.pt")
    assert differences(state_of(model, again), state_of(whole, others)) == []
    assert files() == expected and Path("log.csv").read_bytes() == log
    for name in expected:
        if name.endswith(".pt"):
            written, wanted = (dict(checkpoint.read(Path(place, name))) for place in (".", "../whole"))
            assert differences(written, wanted) == [], name


# Each callback and each way to train that has a state of its own, by itself.


def stepped(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def restarted(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3)


def waiting(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.2)


WAYS = {
    "averages": (lambda: [StochasticWeightAveraging(0.005, 1, annealing_epochs=2)], {}),
    "averages after a schedule": (lambda: [StochasticWeightAveraging(0.005, 1)], {"schedule": "cosine"}),
    "averages of what is unfrozen": (
        lambda: [Unfreeze(1, "0"), StochasticWeightAveraging(0.005, 1)],
        {"frozen": ["0"]},
    ),
    "moving averages of what is unfrozen": (lambda: [Unfreeze(1, "0"), EMA(0.9)], {"frozen": ["0"]}),
    "unfrozen at a rate of its own": (lambda: [Unfreeze(1, "0", lr=0.003)], {"frozen": ["0"]}),
    "unfrozen with a schedule": (lambda: [Unfreeze(2, "0", lr=0.003)], {"frozen": ["0"], "schedule": "cosine"}),
    "norms": (lambda: [GradNorm(per_layer=True, every=3)], {}),
    "events": (lambda: [TensorBoard("events", update_freq=3, write_graph=False)], {}),
    "plateaus within epochs": (
        lambda: [ReduceLROnPlateau("val_loss", factor=0.5, patience=0, min_delta=0.2)],
        {"validation_freq": "4 steps"},
    ),
    "stopped within an epoch": (
        lambda: [EarlyStopping("val_loss", patience=0, min_delta=0.2, restore_best_weights=True)],
        {"validation_freq": "4 steps"},
    ),
    "not stopped before its time": (lambda: [EarlyStopping("loss", patience=0, min_delta=1.0)], {"min_epochs": 3}),
    "a schedule of torch by epochs": (list, {"schedule": stepped}),
    "a schedule of torch by steps": (list, {"schedule": ("step", restarted)}),
    "a schedule of torch by values": (list, {"schedule": waiting}),
    "one cycle": (list, {"schedule": "one_cycle"}),
    "closures": (list, {"optimizer": "lbfgs", "accumulate": 1}),
    "windows that grow": (list, {"accumulate": {0: 3, 2: 5}}),
    "pieces": (list, {"microbatch": 2}),
    "a part split off": (list, {"validation_data": None, "validation_split": 0.5}),
    "epochs shorter than the data": (list, {"steps_per_epoch": 7}),
    "parts of the data": (list, {"steps_per_epoch": 0.5}),
    "the same batches": (list, {"overfit_batches": 3}),
    "so many steps": (list, {"max_steps": 15, "epochs": None}),
}


@pytest.mark.filterwarnings("ignore:.*(before the first epoch|trainable parameters got no gradient)")
@pytest.mark.parametrize(
    ("way", "share", "save_freq"),
    [(way, *((0.35, 2) if number % 2 else (0.8, "epoch"))) for number, way in enumerate(WAYS)],
)
def test_each_way_to_train_is_gone_on_with(folder, way, share, save_freq):
    if way == "events":
        pytest.importorskip("tensorboard")
    make, options = WAYS[way]

    def run(after, callbacks):
        die = Die(after)
        model = fit([*callbacks, BackupAndRestore("backup", save_freq), die], **options)
        return model, after - die.left  # batches

    folder("whole")
    others, again = make(), make()
    whole, batches = run(-1, others)
    folder("died")
    with pytest.raises(Killed):
        run(int(share * batches), make())
    model, batches_after = run(-1, again)
    assert batches_after < batches
    assert differences(state_of(model, again), state_of(whole, others)) == []


# Ended by a signal, and gone on with by `resume=True`.


class Signal(kt.Callback):
    """Sends this process a signal within an epoch."""

    def __init__(self, epoch, batch, number=signal.SIGTERM):
        self.moment, self.number = (epoch, batch), number

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.moment:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("batch", "background"), [(4, False), (5, True), (10, False), (10, True)])
def test_what_a_signal_has_cut_is_gone_on_with_from_last(folder, batch, background):
    def callbacks():
        return [
            ModelCheckpoint("runs/{epoch}-{val_loss:.4f}.pt", save_last=True, background=background),
            CSVLogger("log.csv"),
        ]

    folder("whole")
    others = callbacks()
    whole = fit(others, resume=True)
    expected, log = files(), Path("log.csv").read_bytes()
    folder("cut")
    cut = fit([*callbacks(), Signal(1, batch)], resume=True)
    assert cut.history.stopped_by == "SIGTERM"
    epochs = [name for name in files() if name.startswith("runs/") and not name.endswith("last.pt")]
    assert len(epochs) == 1  # of the first epoch; the second one is not over
    again = callbacks()
    model = fit(again, resume=True)
    assert differences(state_of(model, again), state_of(whole, others)) == []
    assert files() == expected and Path("log.csv").read_bytes() == log


class Interrupt(kt.Callback):
    """Raises in the middle of a step of the second epoch, as Ctrl-C does where somebody handles signals otherwise."""

    def on_before_optimizer_step(self, optimizer):
        if self.model.history.epoch == [0] and self.model.samples_seen > 20:
            raise KeyboardInterrupt


def test_what_was_interrupted_within_a_step_is_gone_on_with_from_the_file_before(folder):
    def callbacks():
        return [ModelCheckpoint("{epoch}.pt", save_last=True), ModelCheckpoint("often/{epoch}-{batch}.pt", save_freq=4)]

    folder("whole")
    whole = fit(callbacks())
    expected = files()
    folder("cut")
    cut = fit([*callbacks(), Interrupt()])
    assert cut.history.stopped_by == "interrupt"
    assert files() == ["1.pt", "last.pt", "often/1-4.pt", "often/1-8.pt", "often/2-1.pt", "often/2-5.pt"]
    model = fit(callbacks(), resume=True)
    assert files() == expected and model.history.history == whole.history.history
    assert torch.equal(model.module[0].weight, whole.module[0].weight)


def test_the_newest_file_is_gone_on_from_and_one_that_is_damaged_passed_over(folder):
    def callbacks():
        return [ModelCheckpoint("runs/{epoch}.pt"), ModelCheckpoint("best.pt", "loss", save_best_only=True)]

    folder("whole")
    whole = fit(callbacks())
    folder("died")
    with pytest.raises(Killed):
        fit([*callbacks(), Die(25)])
    assert sorted(path.name for path in callbacks()[0].saved_files()) == ["1.pt", "2.pt"]
    assert [path.name for path in callbacks()[1].saved_files()] == ["best.pt"]
    for name in ("runs/2.pt", "best.pt"):
        Path(name).write_bytes(Path(name).read_bytes()[:-100])
    with pytest.warns(UserWarning, match="damaged") as found:
        model = fit(callbacks(), resume=True)
    assert len([one for one in found if "damaged" in str(one.message)]) == 2
    assert torch.equal(model.module[0].weight, whole.module[0].weight)
    assert model.history.history == whole.history.history


def test_weights_alone_are_nothing_to_go_on_from(folder):
    folder("weights")
    callbacks = [ModelCheckpoint("{epoch}.safetensors", save_weights_only=True, save_last=True)]
    fit(callbacks)
    assert len(files()) == EPOCHS + 1 and callbacks[0].saved_files() == []


@pytest.mark.parametrize("after", [7, 14, 26])
def test_what_a_thread_is_writing_when_a_backup_is_made_is_known_to_the_run_that_goes_on(folder, monkeypatch, after):
    def callbacks(after=-1):
        often = ModelCheckpoint("often/{epoch}-{batch}.pt", "loss", save_top_k=2, save_freq=3, background=True)
        return [often, BackupAndRestore("backup", save_freq=1), Die(after)]

    write = checkpoint.write
    monkeypatch.setattr("kerastorch.callbacks.checkpoint.write", lambda *args: (time.sleep(0.02), write(*args)))
    folder("whole")
    others = callbacks()
    whole, expected = fit(others), files()
    folder("died")
    with pytest.raises(Killed):
        fit(callbacks(after))
    again = callbacks()
    assert differences(state_of(fit(again), again), state_of(whole, others)) == [] and files() == expected


@pytest.mark.parametrize("after", [3, 6, 14])
def test_a_file_that_the_run_before_had_no_time_for_is_the_one_that_it_would_have_written(folder, after):
    """It is written before the first batch, when the data is still to be opened."""

    def callbacks(after=-1):
        return [BackupAndRestore("backup", save_freq=1), Die(after), ModelCheckpoint("{epoch}-{batch}.pt", save_freq=1)]

    whole = folder("whole")
    fit(callbacks())
    died = folder("died")
    with pytest.raises(Killed):
        fit(callbacks(after))
    before = files()
    fit(callbacks())
    late = f"{(after - 1) // BATCHES + 1}-{(after - 1) % BATCHES + 1}.pt"
    assert late not in before and late in files()
    assert differences(*(dict(checkpoint.read(place / late)) for place in (died, whole))) == []


@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize("resume", [True, "2-3.pt"])
def test_a_file_that_was_to_be_deleted_when_the_run_died_is_deleted_by_the_one_that_goes_on(
    folder, monkeypatch, background, resume
):
    def callbacks():
        return [ModelCheckpoint("{epoch}-{batch}.pt", "loss", save_top_k=2, save_freq=7, background=background)]

    def die(self, path):
        raise Killed

    folder("whole")
    others = callbacks()
    whole, expected = fit(others), files()
    folder("died")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ModelCheckpoint, "_delete", die)
        fit(callbacks())
    assert files() == ["1-7.pt", "2-10.pt", "2-3.pt"], "one too many"
    again = callbacks()
    model = fit(again, resume=resume)
    assert differences(state_of(model, again), state_of(whole, others)) == [] and files() == expected
