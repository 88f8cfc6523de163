"""What ends a run from outside of it, each provoked for real where that can be: the whole text, and what is left.

Elsewhere, by the whole text too: a loss, gradient or parameter that is not finite (`callbacks/test_debugging.py`), and
weights of another architecture for `load_weights` (`test_checkpoint.py`, `TestOtherNames`). 10,000 damaged files, and
pickles that would run something: `test_checkpoint_damage.py`. Each way in which a single file cannot be written:
`test_checkpoint.py` and `test_writing.py`. Signals, and a run gone on with after each: `test_resume.py`.
"""

from __future__ import annotations

import errno
import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import kerastorch as kt
from kerastorch import checkpoint
from kerastorch.callbacks import BackupAndRestore, ModelCheckpoint
from kerastorch.state import restore, state_of

from . import reference
from .processes import run

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
BF16 = 'compile precision="bf16", which halves most of what is kept for the backward pass'


class Net(nn.Sequential):
    """Calls a function with the number of each forward pass, from 1 on."""

    def __init__(self, at_call=lambda number: None):
        super().__init__(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.at_call, self.calls = at_call, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.at_call(self.calls)
        return super().forward(x)


def compiled(module=None, kind=kt.Model, **options):
    kt.set_seed(3)
    return kind(module or Net(), backend="cpu").compile(**{"optimizer": "adam", "loss": "mse"} | options)


def fit(model, *data, **options):
    return model.fit(*(data or (X, Y)), **{"verbose": 0} | ({} if data else {"batch_size": 10}) | options)


# Memory that runs out.


def too_much():
    return torch.empty(4 * 10**15, dtype=torch.uint8)


def at(number, act=too_much):
    return lambda call: act() if call == number else None


def ends(error, action):
    """What it says, with the peak, of which nobody knows the number, as "?"."""
    gc.collect()
    with pytest.raises(error) as caught:
        action()
    assert type(caught.value) is error and "\n" not in str(caught.value)
    told = re.fullmatch(r"(.*At its peak, )(\d+\.\d\d)( GiB were in use.*)", str(caught.value))
    if told is None:
        return str(caught.value), str(caught.value.__cause__)
    assert 0.05 < float(told[2]) < 200
    return f"{told[1]}?{told[3]}", str(caught.value.__cause__)


PHASES = {
    "training": (
        lambda: fit(compiled(Net(at(9))), epochs=3),
        "in training, at batch 3 of epoch 2 (counted from 1), which has 10 samples",
        f'Give fit microbatch="auto", which cuts batches into pieces that fit, or a smaller batch_size; or {BF16}.',
    ),
    "pieces": (
        lambda: fit(compiled(Net(at(9))), microbatch=4),
        "in training, at batch 3 of epoch 1 (counted from 1), which has 10 samples",
        f"Give a microbatch smaller than 4, or {BF16}.",
    ),
    "a single sample": (
        lambda: fit(compiled(Net(lambda number: too_much() if number > 1 else None)), microbatch="auto"),
        "in training, at batch 2 of epoch 1 (counted from 1), which has 10 samples",
        f"A single sample does not fit: give smaller ones or a smaller module, or {BF16}.",
    ),
    "an optimizer with a closure": (
        lambda: fit(compiled(Net(at(1)), optimizer="lbfgs")),
        "in training, at batch 1 of epoch 1 (counted from 1), which has 10 samples",
        f"Give a smaller batch_size with accumulate, which makes one step of several batches; or {BF16}.",
    ),
    "validation": (
        lambda: fit(compiled(Net(at(17))), epochs=3, validation_data=(X, Y), validation_batch_size=20),
        "in validation, at batch 2 of epoch 2 (counted from 1), which has 20 samples",
        "Give fit a smaller validation_batch_size, or the loader that it reads from.",
    ),
    "evaluation": (
        lambda: compiled(Net(at(2))).evaluate(X, Y, batch_size=40, verbose=0),
        "in evaluation, at batch 2 (counted from 1), which has 20 samples",
        "Give evaluate a smaller batch_size, or the loader that it reads from.",
    ),
    "prediction": (
        lambda: compiled(Net(at(3))).predict((X, Y), batch_size=20, verbose=0),
        "in prediction, at batch 3 (counted from 1), which has 20 samples",
        "Give predict a smaller batch_size; kt.callbacks.Predictions keeps outputs on the disk.",
    ),
}


@pytest.mark.filterwarnings("ignore:microbatch='auto'")
@pytest.mark.parametrize("phase", PHASES)
def test_memory_that_runs_out_says_where_and_what_to_do(phase):
    act, where, advice = PHASES[phase]
    told, cause = ends(RuntimeError, act)
    assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000000 bytes" in cause
    reason = cause.partition("\n")[0].rstrip(".")
    assert told == f"memory ran out {where}: {reason}. At its peak, ? GiB were in use. {advice}"


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient + too_much()[: len(gradient), None]


class Large(torch.optim.SGD):
    def step(self, closure=None):
        too_much()


@pytest.mark.parametrize(
    "make",
    [
        lambda: compiled(nn.Sequential(Net(), Applied())),
        lambda: compiled(optimizer=Large),
        lambda: compiled(loss=lambda output, target: (output - target + too_much()[:10, None]).mean()),
    ],
    ids=["backward", "optimizer", "loss"],
)
def test_in_the_backward_pass_the_loss_and_the_step_too(make):
    told, cause = ends(RuntimeError, lambda: fit(make()))
    where, advice = PHASES["training"][1:]
    where = where.replace("batch 3 of epoch 2", "batch 1 of epoch 1")
    reason = cause.partition("\n")[0].rstrip(".")
    assert told == f"memory ran out {where}: {reason}. At its peak, ? GiB were in use. {advice}"


class Applied(nn.Module):
    def forward(self, x):
        return Backward.apply(x)


def raises(error):
    def act():
        raise error

    return act


def test_whoever_catches_the_error_of_the_device_catches_this_one():
    """Its text has that of the device in it, by which some look for it: Accelerate's `find_executable_batch_size`."""
    first = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.77 GiB."
    error = torch.OutOfMemoryError(f"{first}\nException raised from malloc at CUDACachingAllocator.cpp:1")
    told, cause = ends(torch.OutOfMemoryError, lambda: fit(compiled(Net(at(1, raises(error))))))
    where, advice = PHASES["training"][1:]
    where = where.replace("batch 3 of epoch 2", "batch 1 of epoch 1")
    assert cause == str(error) and told == f"memory ran out {where}: {first} {advice}"


def test_pythons_and_numpys_memory_errors_keep_their_type():
    where, advice = PHASES["training"][1:]
    where = where.replace("batch 3 of epoch 2", "batch 2 of epoch 1")
    told, _ = ends(MemoryError, lambda: fit(compiled(Net(at(2, lambda: bytearray(10**17))))))
    assert told == f"memory ran out {where}: MemoryError. At its peak, ? GiB were in use. {advice}"
    told, cause = ends(MemoryError, lambda: fit(compiled(Net(at(2, lambda: np.empty(10**16, np.uint8))))))
    assert cause == "Unable to allocate 8.88 PiB for an array with shape (10000000000000000,) and data type uint8"
    assert told == f"memory ran out {where}: {cause}. At its peak, ? GiB were in use. {advice}"


def test_while_a_batch_is_read_it_has_no_samples_yet():
    def batches():
        yield X[:10], Y[:10]
        yield X[:10], bytearray(10**17)

    told, _ = ends(MemoryError, lambda: fit(compiled(), batches))
    advice = PHASES["training"][2]
    assert told == (
        f"memory ran out in training, at batch 2 of epoch 1 (counted from 1): MemoryError. At its peak, ? GiB were in "
        f"use. {advice}"
    )
    told, _ = ends(MemoryError, lambda: compiled().predict(batches(), verbose=0))
    assert told.startswith("memory ran out in prediction, at batch 2 (counted from 1): MemoryError. At its peak, ")


class Samples(Dataset):
    """Does something instead of returning sample 27."""

    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 60

    def __getitem__(self, index):
        if index == 27:
            self.act()
        return X[index], Y[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_sample_it_is_the_sample_that_is_named(workers):
    with pytest.raises(MemoryError, match=r"\(raised by the dataset for sample 27\)"):
        fit(compiled(), DataLoader(Samples(lambda: bytearray(10**17)), 5, num_workers=workers))


def test_in_a_callback_it_is_the_callback_that_is_named():
    class Hoards(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise MemoryError("too many pictures")

    class Predicts(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.module.at_call = too_much_at_once
            self.model.predict(X, verbose=0)

    def too_much_at_once(number):
        raise MemoryError("too many pictures")

    with pytest.raises(MemoryError) as caught:
        fit(compiled(), callbacks=Hoards())
    assert caught.value.args == ("too many pictures (raised in Hoards.on_epoch_end)",)
    told, cause = ends(MemoryError, lambda: fit(compiled(), callbacks=Predicts()))
    assert told == (
        "memory ran out in prediction, at batch 1 (counted from 1), which has 60 samples: too many pictures. At its "
        "peak, ? GiB were in use. Give predict a smaller batch_size; kt.callbacks.Predictions keeps outputs on the "
        "disk. (raised in Predicts.on_epoch_end)"
    )


def test_callbacks_hear_of_what_is_raised_and_the_model_can_be_trained_after_it():
    heard = []

    class Hears(kt.Callback):
        def on_exception(self, error):
            heard.append(error)

    model = compiled(Net(at(3)))
    with pytest.raises(RuntimeError, match="memory ran out in training") as caught:
        fit(model, callbacks=Hears())
    assert heard == [caught.value]
    assert len(fit(model, epochs=2).history["loss"]) == 2


def test_other_errors_stay_what_they_are():
    error = RuntimeError("a worker exited unexpectedly")
    with pytest.raises(RuntimeError) as caught:
        fit(compiled(Net(at(3, raises(error)))))
    assert caught.value is error and caught.value.__cause__ is None


# Workers that die.


def kill(name):
    return lambda: (quiet(), os.kill(os.getpid(), getattr(signal, name)))


def quiet():
    """Until what the worker had to hand over is handed over: one killed meanwhile takes torch's lock with it."""
    time.sleep(0.3)


DEATHS = {
    "SIGKILL": (
        kill("SIGKILL"),
        "was killed by SIGKILL",
        "The system sends it when memory runs out (its log then names the process), and so do schedulers at a limit. "
        "Each worker holds batches of its own: give fewer num_workers or a smaller prefetch_factor.",
    ),
    "SIGBUS": (
        kill("SIGBUS"),
        "was killed by SIGBUS",
        "Shared memory, through which workers hand over batches, is most likely full. Make it larger (docker run "
        "--shm-size=8g). Each worker holds batches of its own: give fewer num_workers or a smaller prefetch_factor.",
    ),
    "SIGSEGV": (
        kill("SIGSEGV"),
        "was killed by SIGSEGV",
        "Give num_workers=0 once, which shows what the dataset does there in this process.",
    ),
    "exit": (
        lambda: (quiet(), os._exit(3)),
        "ended with exit code 3",
        "Give num_workers=0 once, which shows what the dataset does there in this process.",
    ),
}
needs_fork = pytest.mark.skipif(
    sys.platform != "linux", reason="workers are made by fork, and signals have Linux's names"
)


def said_of_worker(told):
    """The text without the numbers that are of chance: workers are ahead of the run, and a death is heard at once."""
    found = re.fullmatch(
        r"a data worker \(process (\d+)\) (.*), at batch (\d+)( of epoch 1)? \(counted from 1\)\. (.*)", told
    )
    assert found is not None, told
    assert int(found[1]) > 1 and 1 <= int(found[3]) <= 6
    return found[2], found[5]


OF_ITS_OWN = """
import sys, time
from tests.test_faults import DEATHS, DataLoader, Samples, compiled, fit

def told_by(action):
    began = time.monotonic()
    try:
        action()
    except RuntimeError as error:
        print(time.monotonic() - began, error, sep="|", flush=True)

loader = DataLoader(Samples(DEATHS[sys.argv[1]][0]), 5, num_workers=2, persistent_workers=sys.argv[2] == "True")
for _ in range(2):
    told_by(lambda: fit(compiled(), loader, epochs=2))
told_by(lambda: compiled().evaluate(loader, verbose=0))
told_by(lambda: compiled().predict(loader, verbose=0))
"""


@needs_fork
@pytest.mark.parametrize(("death", "persistent"), [("SIGKILL", True), ("SIGBUS", False), ("exit", True)])
def test_a_worker_that_dies_ends_the_run_at_once(tmp_path, death, persistent):
    """A loader whose workers persist is used again: one that is dead is not waited for then."""
    _, how, advice = DEATHS[death]
    script = tmp_path / "script.py"
    script.write_text(OF_ITS_OWN)
    lines = [line.split("|") for line in run(script, death, str(persistent), limit_s=120).stdout.splitlines()]
    phases = ["training", "training", "evaluation", "prediction"]
    assert [said_of_worker(told) for _, told in lines] == [(f"{how} in {phase}", advice) for phase in phases]
    assert all(float(seconds) < 15 for seconds, _ in lines)


@needs_fork
def test_a_worker_that_somebody_ended_is_told_of():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from zip(X[:20], Y[:20], strict=True)
            kill("SIGTERM")()
            time.sleep(20)

    with pytest.raises(RuntimeError) as caught:
        fit(compiled(), DataLoader(Stream(), 5, num_workers=1))
    assert said_of_worker(str(caught.value)) == (
        "was killed by SIGTERM in training",
        "Somebody has ended it. Leave workers alone: a SIGTERM to the main process ends the run in good order.",
    )


@needs_fork
@pytest.mark.parametrize("freq", ["epoch", 1])
def test_a_run_whose_worker_died_goes_on_from_its_backup(tmp_path, freq):
    def run(*callbacks, act=lambda: None):
        model, loader = compiled(), DataLoader(Samples(act), 5, shuffle=True, num_workers=2)
        return model, fit(model, loader, epochs=3, callbacks=callbacks)

    def die_in_the_second_epoch():
        with open(tmp_path / "calls", "a") as file:
            file.write("x")
        if (tmp_path / "calls").stat().st_size == 2:
            kill("SIGKILL")()

    whole, history = run()
    with pytest.raises(
        RuntimeError, match=r"^a data worker \(process \d+\) was killed by SIGKILL in training, at batch"
    ):
        run(BackupAndRestore(tmp_path / "backup", save_freq=freq), act=die_in_the_second_epoch)
    assert os.listdir(tmp_path / "backup") == ["backup.pt"]
    model, resumed = run(BackupAndRestore(tmp_path / "backup", save_freq=freq))
    assert reference.same_weights(model.module, whole.module) and resumed.history == history.history


@needs_fork
def test_a_script_whose_worker_dies_ends_and_leaves_no_process_behind(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, time, torch, kerastorch as kt
            from torch.utils.data import DataLoader, Dataset

            class Samples(Dataset):
                def __len__(self):
                    return 4000

                def __getitem__(self, index):
                    if index == 99:
                        time.sleep(0.3)
                        os.kill(os.getpid(), signal.SIGKILL)
                    return torch.rand(3), torch.rand(1)

            model = kt.Model(torch.nn.Linear(3, 1), backend="cpu").compile("sgd", "mse")
            model.fit(DataLoader(Samples(), 5, num_workers=3, persistent_workers=True), verbose=0)
            """
        )
    )
    process = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, told = process.communicate(timeout=60)
        assert process.returncode == 1
        assert re.search(
            r"^RuntimeError: a data worker \(process \d+\) was killed by SIGKILL in training, ", told, re.M
        )
        time.sleep(0.2)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


# Samples that raise.


class Together(Samples):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


def no_picture():
    raise ValueError("no such picture")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (lambda: Samples(no_picture), "no such picture (raised by the dataset for sample 27)"),
        (lambda: DataLoader(Samples(no_picture), 5), "no such picture (raised by the dataset for sample 27)"),
        (
            lambda: DataLoader(Together(no_picture), 5),
            "no such picture (raised by the dataset for samples [25, 26, 27, 28, 29])",
        ),
    ],
    ids=["dataset", "loader", "batches"],
)
def test_a_sample_that_raises_is_named(data, told):
    with pytest.raises(ValueError) as caught:
        fit(compiled(), data(), shuffle=False)
    assert str(caught.value) == told and str(caught.value.__cause__) == "no such picture"


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_samples_that_make_no_batch_are_named(workers):
    class Longer(Samples):
        def __getitem__(self, index):
            return (X[index], Y[index]) if index != 27 else (torch.zeros(9), Y[index])

    data = Longer(no_picture) if workers is None else DataLoader(Longer(no_picture), 5, num_workers=workers)
    with pytest.raises(RuntimeError) as caught:
        fit(compiled(), data, shuffle=False, batch_size=5 if workers is None else None)
    assert "equal size" in str(caught.value)
    assert str(caught.value).strip().endswith("(raised by the collate_fn for samples [25, 26, 27, 28, 29])")


def test_a_sample_that_raises_in_a_worker_is_named():
    with pytest.raises(ValueError) as caught:
        fit(compiled(), DataLoader(Samples(no_picture), 5, num_workers=2))
    first, *_, last = str(caught.value).splitlines()
    assert re.fullmatch(r"Caught ValueError in DataLoader worker process \d\.", first)
    assert last == "ValueError: no such picture (raised by the dataset for sample 27)"


# Files to go on from.


@pytest.fixture
def path(tmp_path):
    model = compiled()
    fit(model)
    model.save(tmp_path / "run.pt")
    return tmp_path / "run.pt"


def ways_in(path, make=compiled):
    """The two ways in which all of a state is put back, each with the model that it is put into."""
    return [(model := make(), lambda: model.load(path)), (other := make(), lambda: fit(other, resume=path, epochs=2))]


def refused(path, make=compiled):
    """The text of the error, which is the same in both ways; both leave the model as it was."""
    told = set()
    for model, action in ways_in(path, make):
        before = checkpoint.snapshot(state_of(model))
        with pytest.raises(ValueError) as caught:
            action()
        told.add(str(caught.value))
        assert same(state_of(model), before)
    assert len(told) == 1
    return told.pop()


def same(one, other):
    return repr(one) == repr(other)


def cut(content):
    return content[: len(content) // 2]


def with_a_bit_flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, "is a torch file that is cut off or damaged, no checkpoint. Give a file that model.save wrote."),
        (with_a_bit_flipped, "is damaged: its SHA-256 is not the one it was written with. Give an older file."),
        (lambda content: b"", "is an empty file, no checkpoint. Give a file that model.save wrote."),
        (
            lambda content: b"epoch,loss\n0,0.25\n",
            "is damaged or a file of another kind, no checkpoint. Give a file that model.save wrote.",
        ),
    ],
    ids=["cut off", "a bit", "empty", "text"],
)
def test_a_damaged_file_is_said_to_be_so(path, damage, told):
    path.write_bytes(damage(path.read_bytes()))
    assert refused(path) == f"{str(path)!r} {told}"


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (
            lambda path: torch.save(Net().state_dict(), path),
            "is a plain state_dict of 4 tensors. Call model.module.load_state_dict(torch.load({path!r})).",
        ),
        (
            lambda path: torch.save({"model": Net().state_dict(), "epoch": 3}, path),
            "is a torch file with a dict of somebody else's. Give a file that model.save wrote.",
        ),
        (
            lambda path: torch.save({"pytorch-lightning_version": "2.6.0", "state_dict": {}}, path),
            "is a checkpoint of Lightning. Its names begin with the attribute that held the module, such as 'net.': "
            "call model.module.load_state_dict({{name.removeprefix('net.'): value for name, value in torch.load("
            "{path!r}, weights_only=True)['state_dict'].items()}}).",
        ),
        (
            lambda path: torch.save(nn.Linear(4, 1), path),
            "holds more than tensors and plain data, and was not read: reading the rest may run anything. Give a file "
            "that model.save wrote.",
        ),
        (
            lambda path: checkpoint.write_weights(path, Net().state_dict()),
            "is a safetensors file, no checkpoint. It holds weights alone: call model.load_weights.",
        ),
    ],
    ids=["state_dict", "own dict", "Lightning", "module", "safetensors"],
)
def test_a_foreign_file_is_said_to_be_so(tmp_path, write, told):
    path = tmp_path / "run.pt"
    write(path)
    assert refused(path) == f"{str(path)!r} {told.format(path=str(path))}"


def test_a_file_of_another_architecture_lists_what_differs(path):
    def other():
        return compiled(nn.ModuleDict({"0": nn.Linear(4, 3), "head": nn.Linear(3, 1)}))

    assert refused(path, other) == (
        f"{str(path)!r} does not fit the module, which is as it was: missing 'head.weight', 'head.bias'; unexpected "
        f"'2.weight', '2.bias'; of another shape '0.weight' (8, 4) instead of (3, 4), '0.bias' (8,) instead of (3,). "
        f"Make the module as it was when the file was written."
    )


@pytest.mark.parametrize(
    ("drop", "missing"),
    [
        (lambda state: state.pop("module"), "['module']"),
        (lambda state: state.pop("optimizers"), "['optimizers']"),
        (lambda state: (state.pop("history"), state.pop("schedules")), "['schedules'], ['history']"),
        (lambda state: state["history"].pop("logs"), "['history']['logs']"),
        (lambda state: state["schedules"].clear(), "['schedules']['']"),
        (lambda state: state["optimizers"][""].pop("groups"), "['optimizers']['']['groups']"),
        (
            lambda state: state.clear(),
            "['module'], ['optimizers'], ['schedules'], ['scaler'], ['epochs_trained'], ['history'], ['callbacks']",
        ),
    ],
)
def test_a_state_with_parts_missing_lists_them(path, drop, missing):
    state, model = checkpoint.read(path), compiled()
    drop(state)
    before = checkpoint.snapshot(state_of(model))
    with pytest.raises(ValueError) as caught:
        restore(model, state, "'run.pt'")
    assert str(caught.value) == (
        f"'run.pt' has not all of a state: missing {missing}. Nothing was changed. Give a file that model.save wrote."
    )
    assert same(state_of(model), before)


# Disks.


def failing(code):
    def fsync(opened):
        raise OSError(code, os.strerror(code))

    return fsync


class Breaks(kt.Callback):
    """From the second epoch on the disk takes nothing more."""

    def __init__(self, act):
        self.act = act

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            self.act()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ENOENT, errno.EDQUOT])
def test_a_disk_that_takes_nothing_ends_the_run_and_leaves_what_was_there(tmp_path, monkeypatch, code):
    path = tmp_path / "backup" / "backup.pt"
    whole = compiled()
    fit(whole, epochs=3)
    with monkeypatch.context() as patched, pytest.raises(OSError) as caught:
        breaks = Breaks(lambda: patched.setattr(os, "fsync", failing(code)))
        fit(compiled(), epochs=3, callbacks=[breaks, BackupAndRestore(tmp_path / "backup")])
    assert caught.value.errno == code
    assert str(caught.value) == (
        f"[Errno {code}] {str(path)!r} cannot be written: {os.strerror(code)}. Make room or give another path; a file "
        f"that was there is as it was."
    )
    assert os.listdir(path.parent) == ["backup.pt"] and checkpoint.read(path)["epochs_trained"] == 1
    model = compiled()
    fit(model, epochs=3, callbacks=BackupAndRestore(tmp_path / "backup"))
    assert reference.same_weights(model.module, whole.module)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("saver", ["backup", "checkpoint", "checkpoint in the background"])
def test_a_disk_that_is_really_full_ends_the_run_and_leaves_what_was_there(small_disk, saver):
    path = small_disk / "backup.pt"

    def savers():
        if saver == "backup":
            return BackupAndRestore(small_disk, delete_checkpoint=False)
        return ModelCheckpoint(path, background="background" in saver)

    def fill():
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for size in (2**16, 1):
            with open(small_disk / f"filler{size}", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(size))
                except OSError as error:
                    assert error.errno == errno.ENOSPC

    with pytest.raises(OSError) as caught:
        fit(compiled(), epochs=4, callbacks=[Breaks(fill), savers()])
    assert str(caught.value) == (
        f"[Errno 28] {str(path)!r} cannot be written: No space left on device. Make room or give another path; a file "
        f"that was there is as it was."
    )
    assert checkpoint.read(path)["epochs_trained"] == 1
    for filler in small_disk.glob("filler*"):
        filler.unlink()
    assert [one.name for one in Path(small_disk).iterdir()] == ["backup.pt"]
    model = compiled()
    fit(model, epochs=4, callbacks=savers(), resume=True)
    whole = compiled()
    fit(whole, epochs=4)
    assert reference.same_weights(model.module, whole.module)
