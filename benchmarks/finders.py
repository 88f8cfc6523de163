"""Finders of batch sizes and learning rates, kerastorch's beside others', against what is really the best.

    python benchmarks/finders.py [--batch-size] [--lr] [--quick] [--seeds 4]

Batch sizes: each finder in a process of its own, whose memory is limited to what it has before and a budget, so that a
larger batch ends in the error of torch's allocator that Lightning and Accelerate wait for. kerastorch is also run with
`memory=` the budget and no limit. Before, optimizers have made a step: what is compared afterwards is bit for bit.

Rates: one epoch of `fit` at the rate that each finder suggests, as a ratio to the best of a grid of 8 rates a decade,
on the problems of `problems.py`. Finders are given the same module, initial weights, data and batch size, and are left
at their defaults.

lightning comes with the extra "conformance"; accelerate and torch-lr-finder are to be installed beside it. What is not
installed is left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import json
import logging
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import psutil
import torch
from problems import BATCH_SIZE, Problem, distance_of, problems
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from kerastorch.memory import free_memory, is_out_of_memory
from kerastorch.tuning.budget import Peak

CPU = torch.device("cpu")
STEPS = 3  # of a trial, for everybody
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
LOSSES = {"cross_entropy": nn.CrossEntropyLoss(), "mse": nn.MSELoss()}
PACKAGES = {"lightning": "lightning", "accelerate": "accelerate", "torch-lr-finder": "torch_lr_finder"}


def is_there(contender: str) -> bool:
    """Whether the package of a contender is installed."""
    package = PACKAGES.get(contender.split()[0])
    return package is None or find_spec(package) is not None


# Batch sizes.

SIZES_SEEN: list[int] = []  # by a module that trains: a trial is a run of equal ones


class Convolutions(nn.Module):
    """Images (batch, 3, 64, 64) -> logits (batch, 10); half a megabyte an image in each of its large tensors."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()
        second = nn.Conv2d(32, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1)
        self.layers = nn.Sequential(*first, *second, nn.Linear(32, 10))

    def forward(self, images: Tensor) -> Tensor:
        _note(self, images)
        return self.layers(images)

    @staticmethod
    def data() -> tuple[Tensor, Tensor]:
        return torch.randn(1024, 3, 64, 64), torch.randint(10, (1024,))


class Encoder(nn.Module):
    """Indices (batch, 64) -> logits (batch, 10), by a layer of attention; 16 kB a sequence and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.layer = nn.TransformerEncoderLayer(64, 2, 256, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, indices: Tensor) -> Tensor:
        _note(self, indices)
        return self.head(self.layer(self.embedding(indices)).mean(1))

    @staticmethod
    def data() -> tuple[Tensor, Tensor]:
        return torch.randint(256, (8192, 64)), torch.randint(10, (8192,))


MODULES = {"convolutions": (Convolutions, 600), "transformer": (Encoder, 1000)}  # and the budget, in MB


def _note(module: nn.Module, x: Tensor) -> None:
    if module.training and type(x) is Tensor:  # no fake one, of a forecast
        SIZES_SEEN.append(len(x))


class Task:
    """What a finder is given: a module, its optimizer after a first step, data, and the budget in bytes."""

    def __init__(self, name: str, budget: int) -> None:
        self.budget = budget
        torch.manual_seed(0)
        self.module = MODULES[name][0]()
        self.x, self.y = self.module.data()
        # What a process takes once, for code that is loaded late say, is no matter of batch sizes.
        other = MODULES[name][0]()
        self.train(other, torch.optim.Adam(other.parameters()), 8, 1)

    def train(self, module: nn.Module, optimizer: torch.optim.Optimizer, size: int, steps: int = STEPS) -> None:
        """Some steps of a plain loop."""
        for step in range(steps):
            start = step * size % (len(self.x) - size + 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(self.x[start : start + size]), self.y[start : start + size]).backward()
            optimizer.step()

    def limit(self) -> None:
        """From now on the process may take the budget beyond what it has."""
        import resource

        free_memory(CPU)
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (psutil.Process().memory_info().data + self.budget, hard))


def with_kerastorch(task: Task, mode: str, by_memory: bool) -> tuple[Callable, Callable]:
    model = kt.Model(task.module, backend="cpu").compile("adam", "cross_entropy")
    model.fit(task.x[:8], task.y[:8], batch_size=8, verbose=0)
    options = {"mode": mode, "memory": task.budget if by_memory else None}
    return lambda: int(model.find_batch_size(task.x, task.y, **options)), lambda: model.optimizer


def with_lightning(task: Task, mode: str) -> tuple[Callable, Callable]:
    import lightning as pl
    from lightning.pytorch.tuner import Tuner

    optimizer = torch.optim.Adam(task.module.parameters())
    task.train(task.module, optimizer, 8, 1)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.batch_size = task.module, 2

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.module(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

        def train_dataloader(self) -> DataLoader:
            return DataLoader(TensorDataset(task.x, task.y), self.batch_size, shuffle=True)

    trainer, module = lightning_trainer(), Module()
    return lambda: Tuner(trainer).scale_batch_size(module, mode=mode, steps_per_trial=STEPS), lambda: optimizer


def with_accelerate(task: Task) -> tuple[Callable, Callable]:
    from accelerate.utils import find_executable_batch_size

    optimizer = torch.optim.Adam(task.module.parameters())
    task.train(task.module, optimizer, 8, 1)

    @find_executable_batch_size(starting_batch_size=len(task.x))
    def largest(batch_size: int) -> int:
        task.train(task.module, optimizer, batch_size)
        return batch_size

    return largest, lambda: optimizer


SEARCHES: dict[str, Callable] = {
    "kerastorch predict, memory=": lambda task: with_kerastorch(task, "predict", True),
    "kerastorch predict": lambda task: with_kerastorch(task, "predict", False),
    "kerastorch power": lambda task: with_kerastorch(task, "power", False),
    "kerastorch binsearch": lambda task: with_kerastorch(task, "binsearch", False),
    "lightning power": lambda task: with_lightning(task, "power"),
    "lightning binsearch": lambda task: with_lightning(task, "binsearch"),
    "accelerate": with_accelerate,
}
QUICK = ("kerastorch predict, memory=", "kerastorch predict", "lightning binsearch")


def lightning_trainer() -> Any:
    """Without anything that is not needed."""
    import lightning as pl

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "default_root_dir": tempfile.mkdtemp()}
    return pl.Trainer(accelerator="cpu", devices=1, max_epochs=100, **quiet)


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list]:
    """What a search should leave as it was."""
    slots = [value for slot in optimizer.state_dict()["state"].values() for value in slot.values()]
    return {
        "weights": [value.clone() for value in module.parameters()],
        "buffers": [value.clone() for value in module.buffers()],
        "optimizer": [torch.as_tensor(value).clone() for value in slots],
        "RNG": [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].copy()), repr(random.getstate())],
        "mode": [module.training],
    }


def changed(before: dict[str, list], after: dict[str, list]) -> str:
    """Names of what is not as it was, bit for bit."""

    def is_same(one: Any, other: Any) -> bool:
        return torch.equal(one, other) if isinstance(one, Tensor) else one == other

    def are_same(name: str) -> bool:
        return len(before[name]) == len(after[name]) and all(map(is_same, before[name], after[name]))

    return ", ".join(name for name in before if not are_same(name))


def search(module: str, budget: int, contender: str) -> dict[str, Any]:
    """Of one contender, in this process."""
    task = Task(module, budget)
    find, optimizer_of = SEARCHES[contender](task)
    task.module.train()
    before = state_of(task.module, optimizer_of())
    if "memory=" not in contender:
        task.limit()
    SIZES_SEEN.clear()
    start = time.perf_counter()
    size = find()
    seconds = time.perf_counter() - start
    trials = len([*itertools.groupby(SIZES_SEEN)])
    return {
        "size": size,
        "trials": trials,
        "seconds": seconds,
        "changed": changed(before, state_of(task.module, optimizer_of())),
    }


def largest(module: str, budget: int, is_limited: bool) -> dict[str, Any]:
    """The largest batch of which three steps of a plain loop run within the limit, or are measured to."""
    task = Task(module, budget)
    optimizer = torch.optim.Adam(task.module.parameters())
    task.train(task.module, optimizer, 8)
    if is_limited:
        task.limit()

    def fits(size: int) -> bool:
        free_memory(CPU)
        try:
            with Peak(CPU) as taken:
                task.train(task.module, optimizer, size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return is_limited or taken.bytes <= budget

    low, high = 1, len(task.x) + 1  # the first fits, the second does not
    size = 64
    while high - low > max(1, low // 200):
        if fits(size):
            low = size
        else:
            high = size
        size = min(2 * low, len(task.x)) if high > len(task.x) else (low + high) // 2
    return {"size": low}


def in_a_process(*arguments: Any) -> dict[str, Any] | str:
    """What a job has found in a process of its own; or how that process has failed, in a line."""
    command = [sys.executable, __file__, "--job", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0:
        return json.loads(lines[-1])
    said = [line for line in done.stderr.strip().splitlines() if "Error" in line]
    return (said[-1] if said else f"ended with {done.returncode}")[:100]


def compare_batch_sizes(is_quick: bool) -> None:
    for name in [*MODULES][:1] if is_quick else MODULES:
        megabytes = MODULES[name][1]
        budget = megabytes * 10**6
        most = {limited: in_a_process("largest", name, budget, limited)["size"] for limited in (True, False)}
        print(
            f"\n{name}, {megabytes} MB: {most[True]} run within the limit; {most[False]} measured to be in the budget"
        )
        rows = []
        for contender in filter(is_there, QUICK if is_quick else SEARCHES):
            found = in_a_process("search", name, budget, contender)
            if isinstance(found, str):
                rows.append((contender, "", "", "failed", "", found))
                continue
            share = found["size"] / most["memory=" not in contender]
            restored = f"not {found['changed']}" if found["changed"] else "all"
            rows.append(
                (contender, found["trials"], f"{found['seconds']:.1f}", found["size"], f"{share:.0%}", restored)
            )
        names = ("finder", "trials", "s", "size", "of the largest", "as it was")
        print(tabulate(rows, names, "github", disable_numparse=True), flush=True)


# Rates.

COARSE = {"sgd": range(-20, 17, 4), "adam": range(-36, -7, 4), "adamw": range(-36, -7, 4)}  # eighths of a decade
NEAR = range(-3, 4)


@cache
def losses_after(problem: str, optimizer: str, seed: int, rate: float) -> tuple[float, float]:
    """One epoch of `fit`: the loss of all training data after it, and its mean during it."""
    one = known(problem)
    model = one.model(seed).compile(optimizer, one.loss, lr=rate)
    history = model.fit(one.x, one.y, batch_size=BATCH_SIZE, verbose=0)
    losses = model.evaluate(one.x, one.y, batch_size=256, verbose=0), history.history["loss"][0]
    return tuple(float(loss) if math.isfinite(loss) else math.inf for loss in losses)


@cache
def known(name: str) -> Problem:
    return {problem.name: problem for problem in problems()}[name]


def best_of_grid(problem: str, optimizer: str, seed: int) -> tuple[float, float]:
    """The lowest loss after an epoch and the lowest mean of one, each of the rate that is best for it."""
    grid = {step: losses_after(problem, optimizer, seed, 10 ** (step / 8)) for step in COARSE[optimizer]}
    for which in (0, 1):
        center = min(grid, key=lambda step: grid[step][which])
        for step in (center + near for near in NEAR):
            grid[step] = losses_after(problem, optimizer, seed, 10 ** (step / 8))
    return min(loss for loss, _ in grid.values()), min(mean for _, mean in grid.values())


def kerastorch_rates(problem: Problem, optimizer: str, seed: int) -> dict[str, float | None]:
    model = problem.model(seed).compile(optimizer, problem.loss)
    return {"kerastorch": model.find_lr(problem.x, problem.y, batch_size=BATCH_SIZE).lr}


def curve_rates(problem: Problem, optimizer: str, seed: int) -> dict[str, float | None]:
    model = problem.model(seed).compile(optimizer, problem.loss)
    found = model.find_lr(problem.x, problem.y, batch_size=BATCH_SIZE, confirm=False)
    return {f"curve: {name}": found.suggestion(name) for name in METHODS}


def lightning_rates(problem: Problem, optimizer: str, seed: int) -> dict[str, float | None]:
    import lightning as pl
    from lightning.pytorch.tuner import Tuner

    net = problem.model(seed).module

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.lr = net, 1e-3

        def training_step(self, batch: Any, index: int) -> Tensor:
            return LOSSES[problem.loss](self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return OPTIMIZERS[optimizer](self.parameters(), lr=self.lr)

    found = Tuner(lightning_trainer()).lr_find(Module(), loader_of(problem), update_attr=False)
    return {"lightning": found.suggestion()}


def lr_finder_rates(problem: Problem, optimizer: str, seed: int) -> dict[str, float | None]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from torch_lr_finder import LRFinder

    net = problem.model(seed).module
    finder = LRFinder(net, OPTIMIZERS[optimizer](net.parameters(), lr=1e-7), LOSSES[problem.loss], device="cpu")
    finder.range_test(loader_of(problem), end_lr=10, num_iter=100)  # its example
    _, rate = finder.plot()
    pyplot.close("all")
    return {"torch-lr-finder": float(rate)}


def loader_of(problem: Problem) -> DataLoader:
    data = TensorDataset(torch.from_numpy(problem.x), torch.from_numpy(problem.y))
    return DataLoader(data, BATCH_SIZE, shuffle=True)


METHODS = ("steepest", "valley", "minimum", "slide")
FINDERS = {
    "kerastorch": kerastorch_rates,
    "curve": curve_rates,
    "lightning": lightning_rates,
    "torch-lr-finder": lr_finder_rates,
}


@contextlib.contextmanager
def counting_steps() -> Iterator[list[int]]:
    """Steps that any optimizer makes within."""
    steps = [0]

    def count(*_: Any) -> None:
        steps[0] += 1

    hook = register_optimizer_step_post_hook(count)
    try:
        yield steps
    finally:
        hook.remove()


def timed(find: Callable, *arguments: Any) -> tuple[dict[str, Any], float, int]:
    """What a finder has found, without what it prints; seconds and steps."""
    start = time.perf_counter()
    silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with silent[0], silent[1], counting_steps() as steps:
        found = find(*arguments)
    return found, time.perf_counter() - start, steps[0]


def compare_rates(is_quick: bool, seeds: int) -> None:
    names = ["tabular", "autoencoder"] if is_quick else ["digits", "tabular", "text", "autoencoder"]
    finders = [finder for name, finder in FINDERS.items() if is_there(name)]
    for package in filter(find_spec, PACKAGES.values()):
        importlib.import_module(package)  # which is no part of a search
    rows, of_contender = [], {}
    for name, optimizer, seed in itertools.product(names, OPTIMIZERS, range(1 if is_quick else seeds)):
        problem, best, row = known(name), best_of_grid(name, optimizer, seed), {}
        for find in finders:
            try:
                found, seconds, steps = timed(find, problem, optimizer, seed)
            except Exception as error:
                print(f"{find.__name__} failed on {name} with {optimizer}, seed {seed}: {error!r}"[:200])
                continue
            for contender, rate in found.items():
                losses = (math.inf, math.inf) if rate is None else losses_after(name, optimizer, seed, rate)
                ratios = [loss / least for loss, least in zip(losses, best, strict=True)]
                of_contender.setdefault(contender, []).append((*ratios, seconds, steps))
                row[contender] = "no answer" if rate is None else f"{rate:.1e} ({ratios[0]:.2f})"
        rows.append({"": f"{name} {optimizer} {seed}", "best": f"{best[0]:.4f}"} | row)
        print("   ".join(rows[-1].values()), flush=True)
    print("\nRates, and in brackets the loss after an epoch as a ratio to the best of the grid:\n")
    print(tabulate(rows, "keys", "github", disable_numparse=True))
    print("\nAll of them; the second half is by the mean loss of the epoch:\n")
    print(tabulate([summary_of(*one) for one in of_contender.items()], "keys", "github", disable_numparse=True))


def summary_of(contender: str, results: list[tuple]) -> dict[str, str]:
    after, mean, seconds, steps = map(np.array, zip(*results, strict=True))
    row = {"finder": contender}
    for ratios, what in ((after, ""), (mean, ", mean")):
        row |= {f"within {part}%{what}": f"{(ratios <= 1 + part / 100).mean():.0%}" for part in (10, 20)}
        row[f"worst{what}"] = f"{ratios.max():.2f}"
    return row | {"s": f"{seconds.mean():.1f}", "steps": f"{steps.mean():.0f}"}


# The GAN has two optimizers and is scored by the distance of what it makes from real digits.

GAN_RATES = [10 ** (half / 2) for half in range(-8, -2)]


@cache
def distance_after(seed: int, generator: float, discriminator: float) -> float:
    problem = known("gan")
    model = problem.model(seed)
    model.compile(
        dict.fromkeys(problem.optimizers, "adam"), lr={"generator": generator, "discriminator": discriminator}
    )
    model.fit(problem.x, batch_size=BATCH_SIZE, verbose=0)
    return distance_of(model)


def compare_gan(seeds: int) -> None:
    problem, rows = known("gan"), []
    for seed in range(seeds):
        grid = {rates: distance_after(seed, *rates) for rates in itertools.product(GAN_RATES, GAN_RATES)}
        best = min(grid, key=grid.get)
        model = problem.model(seed)
        model.compile(dict.fromkeys(problem.optimizers, "adam"), lr=1e-3)
        found, seconds, steps = timed(lambda: model.find_lr(problem.x, batch_size=BATCH_SIZE))  # noqa: B023
        suggested = {"best of the grid": best, "1e-3 for both": (1e-3, 1e-3)}
        suggested |= {
            f"curve: {name}": tuple(found[one].suggestion(name) for one in problem.optimizers) for name in METHODS
        }
        for name, rates in suggested.items():
            is_read = name.startswith("curve")
            told = [f"{rate:.1e}" if rate else "no answer" for rate in rates]
            distance = distance_after(seed, *(rate or 1e-3 for rate in rates))  # without an answer it stays as it was
            times = (f"{seconds:.1f}", steps) if is_read else ("", "")
            rows.append((seed, name, *told, f"{distance:.2f}", f"{distance / grid[best]:.2f}", *times))
    print("\nThe GAN: distance of its digits from real ones. Others refuse two optimizers, or know of one alone.\n")
    heads = ("seed", "rates", "generator", "discriminator", "distance", "x best", "s", "steps")
    print(tabulate(rows, heads, "github", disable_numparse=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", action="store_true", help="only finders of batch sizes, unless --lr, too")
    parser.add_argument("--lr", action="store_true", help="only finders of rates, unless --batch-size, too")
    parser.add_argument("--quick", action="store_true", help="less of everything: some two minutes")
    parser.add_argument("--seeds", type=int, default=2, help="of each problem and optimizer. Default: 2")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.job:
        name, *rest = json.loads(arguments.job)
        print(json.dumps({"search": search, "largest": largest}[name](*rest)))
        return
    for package in PACKAGES:
        if not is_there(package):
            print(f"{package}: left out, it is not installed")
    is_all = not (arguments.batch_size or arguments.lr)
    if arguments.batch_size or is_all:
        compare_batch_sizes(arguments.quick)
    if arguments.lr or is_all:
        compare_rates(arguments.quick, arguments.seeds)
        if not arguments.quick:
            compare_gan(arguments.seeds)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
