"""What is left of long runs and of many: memory, tensors, objects, open files, threads and processes.

    python benchmarks/long_runs.py                  # everything, some minutes
    python benchmarks/long_runs.py --case steps     # one of them

Each line is taken after a garbage collection. What grows from line to line leaks; the first line of a case has what
torch and Python keep from a first use on.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader, Dataset

import kerastorch as kt
from kerastorch import callbacks

COLUMNS = ["case", "after", "RSS MB", "tensors", "objects", "files", "threads", "processes", "models alive"]
MODELS: weakref.WeakSet = weakref.WeakSet()


def census() -> dict[str, Any]:
    """What is there now."""
    gc.collect()
    process, objects = psutil.Process(), gc.get_objects()
    return {
        "RSS MB": round(process.memory_info().rss / 2**20, 1),
        "tensors": sum(issubclass(type(one), torch.Tensor) for one in objects),
        "objects": len(objects),
        "files": process.num_fds() if hasattr(process, "num_fds") else process.num_handles(),
        "threads": threading.active_count(),
        "processes": len(multiprocessing.active_children()),
        "models alive": len(MODELS),
    }


class Samples(Dataset):
    """512 vectors and what class each is of, one by one."""

    def __init__(self) -> None:
        self.x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
        self.y = self.x[:, :10].argmax(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]


def made(**options: Any) -> kt.Model:
    """A small network of its own kind, compiled with all that keeps a state."""
    net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
    options = {"metrics": ["accuracy"], "clip": 1.0, "schedule": "cosine"} | options
    model = kt.Model(net, backend="cpu").compile("adamw", "cross_entropy", **options)
    MODELS.add(model)
    MODELS.add(net)
    return model


def steps(count: int) -> Iterator[tuple[Any, dict]]:
    """one fit of 10 epochs, with gradients gathered over 2 batches; looked at within it"""
    data, taken, every = Samples(), [], count // 10

    class Look(kt.Callback):
        batches = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.batches += 1
            if self.batches % every == 0:
                taken.append((f"{self.batches} batches", census()))

    options = {"steps_per_epoch": count // 10, "epochs": 10, "accumulate": 2, "verbose": 0}
    made().fit(data.x, data.y, validation_data=(data.x, data.y), callbacks=[Look(), callbacks.EMA(0.99)], **options)
    yield from taken


def calls(count: int, folder: Path) -> Iterator[tuple[Any, dict]]:
    """fit with many callbacks, evaluate and predict of one model, again and again"""
    data, model = Samples(), made()
    for number in range(1, count + 1):
        given = [
            callbacks.EMA(0.9),
            callbacks.CSVLogger(folder / "log.csv"),
            callbacks.ModelCheckpoint(folder / "best.pt", monitor="loss", background=True),
            callbacks.BackupAndRestore(folder / "backup"),
            callbacks.EarlyStopping("loss", patience=3, restore_best_weights=True),
        ]
        if number % 10 == 0:
            # Without the graph: torch.jit.trace, which draws it, keeps some 50 kB of each (torch 2.13).
            given.append(callbacks.TensorBoard(folder / "board", write_graph=False))
        model.fit(data.x, data.y, validation_split=0.2, epochs=2, callbacks=given, verbose=0)
        model.predict(data.x[:40], verbose=0)
        model.evaluate(data.x, data.y, verbose=0)
        if number in (1, 10, count // 4, count // 2, 3 * count // 4, count):
            yield f"{number} calls", census()


def workers(count: int, persistent: bool = False) -> Iterator[tuple[Any, dict]]:
    """fit, evaluate and predict with a DataLoader of 2 workers"""
    loader, model = DataLoader(Samples(), 64, shuffle=True, num_workers=2, persistent_workers=persistent), made()
    for number in range(1, count + 1):
        model.fit(loader, validation_data=loader, epochs=2, verbose=0)
        model.predict(loader, verbose=0)
        if number in (1, count // 2, count):
            yield f"{number} calls", census()


def loaders(count: int) -> Iterator[tuple[Any, dict]]:
    """as the one before with workers that persist, but a new loader each time"""
    model = made()
    for number in range(1, count + 1):
        model.fit(DataLoader(Samples(), 64, num_workers=2, persistent_workers=True), epochs=2, verbose=0)
        if number in (1, count // 2, count):
            yield f"{number} calls", census()


def models(count: int, folder: Path) -> Iterator[tuple[Any, dict]]:
    """models made, trained, saved, loaded, summarized and dropped; every fifth fails within a step"""
    data = Samples()
    for number in range(1, count + 1):
        model = made(precision="bf16" if number % 2 else "32")
        x = data.x * (float("inf") if number % 5 == 0 else 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with kt.debug_nan(number % 5 == 0):
                    model.fit(x, data.y, validation_split=0.2, callbacks=[callbacks.EMA(0.9)], verbose=0)
            except FloatingPointError:
                assert number % 5 == 0
        model.save(folder / "model.pt")
        model.load(folder / "model.pt").summary((32, 64), verbose=0)
        model.predict(x, verbose=0)
        del model
        if number in (1, 5, count // 2, count):
            yield f"{number} models", census()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=["steps", "calls", "workers", "persistent", "loaders", "models"])
    parser.add_argument("--steps", type=int, default=10_000, help="training batches (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=200, help="fits and predicts (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            "steps": lambda: steps(options.steps),
            "calls": lambda: calls(options.calls, Path(folder)),
            "workers": lambda: workers(options.calls // 5),
            "persistent": lambda: workers(options.calls // 5, persistent=True),
            "loaders": lambda: loaders(options.calls // 5),
            "models": lambda: models(options.calls, Path(folder)),
        }
        for name in [options.case] if options.case else cases:
            lines = [[name, after, *found.values()] for after, found in cases[name]()]
            print(tabulate(lines, COLUMNS, "github"), end="\n\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
