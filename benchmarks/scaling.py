"""Step time and memory of ranks: kerastorch's DDP and the same written by hand with torch alone, interleaved.

    python benchmarks/scaling.py [ranks]

Each line is one module: medians of both, their ratio, the largest resident memory of a rank, and the largest difference
of the weights afterwards. Below it, on paper: what the gradients of that module would cost to send at 8, 64 and 1024
ranks, by the usual ring model (Patarasu and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
workstations"): 2 (n - 1) / n times the bytes over the bandwidth, and 2 (n - 1) messages of some latency.
"""

from __future__ import annotations

import copy
import os
import statistics
import subprocess
import sys
import time

import psutil
import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import nn

import kerastorch as kt

ROUNDS, STEPS, BATCH = 7, 60, 64
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


NETS = {
    "MLP 128 x 2": lambda: mlp(128, 2),
    "MLP 512 x 4": lambda: mlp(512, 4),
    "Transformer 64 x 2": lambda: encoder(64),
}


class ByHand:
    """The loop of torch's DDP tutorial, with the local part of each global batch."""

    def __init__(self, net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        self.net = nn.parallel.DistributedDataParallel(net)
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        self.x, self.y = x, y

    def run(self) -> None:
        rank, part = dist.get_rank(), BATCH // dist.get_world_size()
        for step in range(STEPS):
            first = step * BATCH + rank * part
            x, y = self.x[first : first + part], self.y[first : first + part]
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(x), y).backward()
            self.optimizer.step()


class Ours:
    def __init__(self, net: nn.Module, x: torch.Tensor, y: torch.Tensor, backend: kt.backends.DDP) -> None:
        sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9)  # noqa: E731
        self.model, self.x, self.y = kt.Model(net, backend=backend).compile(sgd, "cross_entropy"), x, y

    def run(self) -> None:
        self.model.fit(self.x, self.y, batch_size=BATCH, shuffle=False, verbose=0)


def measured(make: object) -> list[object]:
    backend = kt.backends.DDP()
    torch.manual_seed(0)
    x, y = torch.randn(STEPS * BATCH, 64), torch.randint(0, 10, (STEPS * BATCH,))
    net = make()
    hand, ours = ByHand(copy.deepcopy(net), x, y), Ours(net, x, y, backend)
    times = {hand: [], ours: []}
    for round_ in range(ROUNDS + 2):
        for one in (hand, ours) if round_ % 2 else (ours, hand):
            dist.barrier()
            began = time.perf_counter()
            one.run()
            if round_ >= 2:
                times[one].append((time.perf_counter() - began) / STEPS)
    pairs = zip(hand.net.module.state_dict().values(), net.state_dict().values(), strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    ratio = statistics.median(b / a for a, b in zip(times[hand], times[ours], strict=True))
    count = sum(parameter.numel() for parameter in net.parameters())
    resident = psutil.Process().memory_info().rss / 2**20
    return [count, *(1e3 * statistics.median(times[one]) for one in (hand, ours)), ratio, resident, difference]


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
    rows = [[name, *measured(make)] for name, make in NETS.items()]
    if os.environ["RANK"] == "0":
        heads = ["module", "parameters", "by hand, ms", "kerastorch, ms", "ratio", "rank, MB", "weights differ by"]
        print(tabulate(rows, heads, floatfmt=("", "", ".3f", ".3f", ".3f", ".0f", ".1e")))
        print("\nOn paper: milliseconds to average the gradients once, where nothing overlaps")
        paper = [row for parameters in (25e6, 1e9, 7e9) for row in on_paper(int(parameters))]
        print(tabulate(paper, ["gradients", "link", "8 ranks", "64 ranks", "1024 ranks"], floatfmt=".1f"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
