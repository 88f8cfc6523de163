"""Step time and memory of ranks: kerastorch's DDP and FSDP, and the same by hand with torch alone, interleaved.

    python benchmarks/scaling.py [ranks]

A step's time is what so many steps more cost a run, so that its start, which has a column of its own, is left out; each
ratio is the median over rounds. The CPU time of a process is less a matter of what else the machine does. `state` is
what a rank holds: parameters and the optimizer's state. Below it, on paper: what the gradients would cost to send at 8,
64 and 1024 ranks, by the usual ring model (Patarasu and Yuan 2009, "Bandwidth optimal all-reduce algorithms for
clusters of workstations"): 2 (n - 1) / n times the bytes over the bandwidth, and 2 (n - 1) messages of some latency.
"""

from __future__ import annotations

import copy
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import kerastorch as kt

ROUNDS, FEW, MANY, BATCH = 5, 20, 80, 64
LINKS = {"100 Gb/s Ethernet": (12.5e9, 20e-6), "NVLink, 450 GB/s": (450e9, 5e-6)}  # bytes/s, s


def mlp(width: int, depth: int) -> nn.Module:
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), *layers, nn.Linear(width, 10))


def encoder(width: int) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
            self.embed, self.body = nn.Linear(8, width), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(width, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(self.embed(x.view(-1, 8, 8))).mean(1))

    return Net()


NETS = {  # and which of their modules FSDP gathers at once
    "MLP 128 x 2": (lambda: mlp(128, 2), nn.Linear),
    "MLP 512 x 4": (lambda: mlp(512, 4), nn.Linear),
    "Transformer 64 x 2": (lambda: encoder(64), nn.TransformerEncoderLayer),
}


class ByHand:
    """The loop of torch's tutorials, with the local part of each global batch."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, wrap: type[nn.Module] | None) -> None:
        if wrap is None:
            self.net = nn.parallel.DistributedDataParallel(net)
        else:
            for part in net.modules():
                if isinstance(part, wrap):
                    fully_shard(part)
            self.net = fully_shard(net)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)
        self.x, self.y = x, y

    def run(self, steps: int) -> None:
        rank, part = dist.get_rank(), BATCH // dist.get_world_size()
        for step in range(steps):
            first = step * BATCH + rank * part
            x, y = self.x[first : first + part], self.y[first : first + part]
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(x), y).backward()
            self.optimizer.step()

    def state(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        return getattr(self.net, "module", self.net), self.optimizer


class Ours:
    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, backend: kt.backends.DDP) -> None:
        sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9)  # noqa: E731
        self.model, self.x, self.y = kt.Model(net, backend=backend).compile(sgd, "cross_entropy"), x, y

    def run(self, steps: int) -> None:
        rows = slice(0, steps * BATCH)
        self.model.fit(self.x[rows], self.y[rows], batch_size=BATCH, shuffle=False, verbose=0)

    def state(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        return self.model.module, self.model.optimizer


def measured(make: Callable[[], nn.Module], wrap: type[nn.Module] | None) -> list[object]:
    """A line of the table: of DDP where `wrap` is `None`, else of FSDP."""
    torch.manual_seed(0)
    x, y = torch.randn(MANY * BATCH, 64), torch.randint(0, 10, (MANY * BATCH,))
    net = make()
    backend = kt.backends.DDP() if wrap is None else kt.backends.FSDP(wrap=wrap)
    hand, ours = ByHand(copy.deepcopy(net), x, y, wrap), Ours(net, x, y, backend)
    steps, starts, cpu = ({hand: [], ours: []} for _ in range(3))
    for round_ in range(ROUNDS + 1):
        for one in (hand, ours) if round_ % 2 else (ours, hand):
            (few, _), (many, used) = timed(one, FEW), timed(one, MANY)
            if round_:
                steps[one].append((many - few) / (MANY - FEW))
                starts[one].append(few - FEW * steps[one][-1])
                cpu[one].append(used / MANY)
    ratios = [statistics.median(b / a for a, b in zip(of[hand], of[ours], strict=True)) for of in (steps, cpu)]
    times = [1e3 * statistics.median(steps[one]) for one in (hand, ours)]
    start = 1e3 * (statistics.median(starts[ours]) - statistics.median(starts[hand]))
    held = [megabytes(*one.state()) for one in (hand, ours)]
    count = sum(parameter.numel() for parameter in net.parameters())
    return [count, *times, *ratios, start, *held, largest_difference(hand.state()[0], ours.state()[0])]


def timed(one: ByHand | Ours, steps: int) -> tuple[float, float]:
    """Seconds that a run takes, and those that this process works."""
    dist.barrier()
    began, used = time.perf_counter(), time.process_time()
    one.run(steps)
    return time.perf_counter() - began, time.process_time() - used


def megabytes(module: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """What this rank holds of parameters and of the optimizer's state."""
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(local(one).nbytes for one in [*module.parameters(), *states]) / 2**20


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((local(a) - local(b)).abs().max().item() for a, b in pairs)


def on_paper(parameters: int) -> list[list[object]]:
    """Milliseconds that a ring takes for float32 gradients."""
    rows = []
    for name, (bandwidth, latency) in LINKS.items():
        costs = [2 * (n - 1) / n * 4 * parameters / bandwidth + 2 * (n - 1) * latency for n in (8, 64, 1024)]
        rows.append([f"{parameters / 1e6:.0f}M parameters", name, *(1e3 * cost for cost in costs)])
    return rows


def main() -> None:
    if "RANK" not in os.environ:
        ranks = sys.argv[1] if len(sys.argv) > 1 else "2"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
        raise SystemExit(subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode)
    rows = []
    for kind in ("DDP", "FSDP"):
        for name, (make, wrap) in NETS.items():
            rows.append([kind, name, *measured(make, wrap if kind == "FSDP" else None)])
            if os.environ["RANK"] == "0":
                print(*rows[-1], file=sys.stderr, flush=True)
    if os.environ["RANK"] == "0":
        heads = ["", "module", "parameters", "by hand, ms", "kerastorch, ms", "ratio", "of CPU time", "start, ms"]
        heads += ["by hand: state, MB", "kerastorch, MB", "weights differ by"]
        formats = ("", "", "", ".3f", ".3f", ".3f", ".3f", ".0f", ".2f", ".2f", ".0e")
        print(tabulate(rows, heads, "github", floatfmt=formats))
        print(f"\nA rank's resident memory at the end: {psutil.Process().memory_info().rss / 2**20:.0f} MB")
        print("\nOn paper: milliseconds to average the gradients once, where nothing overlaps")
        paper = [row for parameters in (25e6, 1e9, 7e9) for row in on_paper(int(parameters))]
        print(tabulate(paper, ["gradients", "link", "8 ranks", "64 ranks", "1024 ranks"], "github", floatfmt=".1f"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
