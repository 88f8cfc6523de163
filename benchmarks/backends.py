"""The same run on every backend: how much weights, history, evaluate and predict differ from those of one process.

    python benchmarks/backends.py [--xla PYTHON] [--write]

1,009 digits (a prime number: no batch size divides it) with a third of the targets masked, batches of 50 in windows of
3, clipping, a cosine schedule, validation; AdamW, float32. `--xla` names a Python that has torch_xla, for the TPU
backend on XLA's CPU client. `--write` puts the table into docs/backends.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import nn

ROOT = Path(__file__).parents[1]
WHAT = ("weights", "history", "evaluate", "predict")
RUNS = {  # name: (backend, ranks that torchrun starts, XLA's cores)
    "one process on the CPU": ("CPU()", 0, 0),
    "the same again": ("CPU()", 0, 0),
    "DDP, 2 ranks, torchrun": ("DDP()", 2, 0),
    "DDP, 2 ranks, started by fit": ("DDP(2)", 0, 0),
    "DDP, 4 ranks": ("DDP()", 4, 0),
    "DDP, 4 ranks, weights=[4, 1, 2, 3]": ("DDP(weights=[4, 1, 2, 3])", 4, 0),
    "FSDP, 2 ranks": ("FSDP(wrap=1)", 2, 0),
    "FSDP, 2 ranks, shard='optimizer'": ("FSDP(shard='optimizer')", 2, 0),
    "DeepSpeed, 2 ranks, stage=1": ("DeepSpeed(1)", 2, 0),
    "DeepSpeed, 2 ranks, stage=2": ("DeepSpeed(2)", 2, 0),
    "DeepSpeed, 2 ranks, stage=3": ("DeepSpeed(3)", 2, 0),
    "Pipeline, 2 stages": ("Pipeline(2, microbatches=4)", 2, 0),
    "TPU, 1 core": ("TPU(1)", 0, 1),
    "TPU, 4 cores": ("TPU(4)", 0, 4),
}


def run(backend: str, out: str) -> None:
    """In whatever process this is: trains, and leaves what came of it in a file."""
    import kerastorch as kt

    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype("float32")[:1009], y.astype("int64")[:1009]
    masked = np.where(np.arange(1009) % 3 == 0, -100, y)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    kt.set_seed(0)
    model = kt.Model(net, backend=eval(f"kt.backends.{backend}"))
    model.compile("adamw", "cross_entropy", metrics=["accuracy"], lr=3e-3, clip=0.5, schedule="cosine")
    options = {"epochs": 5, "batch_size": 50, "accumulate": 3, "validation_split": 0.1, "verbose": 0}
    history = model.fit(x, masked, **options)
    found = {"history": history.history, "evaluate": model.evaluate(x, y, batch_size=64, verbose=0)}
    found["predict"] = torch.from_numpy(model.predict(x, batch_size=64, verbose=0))
    path = Path(out)
    model.save_weights(path.with_suffix(".safetensors"))
    if model.backend.rank == 0:
        torch.save(found, path)


def result_of(name: str, folder: Path, xla: str | None) -> dict | None:
    """Of one run, in processes of its own; `None` = what it needs is not there."""
    from safetensors.torch import load_file

    backend, ranks, cores = RUNS[name]
    if cores and xla is None:
        return None
    if backend.startswith("DeepSpeed") and find_spec("deepspeed") is None:
        print(f"{name}: left out, deepspeed is not installed")
        return None
    out = folder / f"{list(RUNS).index(name)}.pt"
    python = xla if cores else sys.executable
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    devices = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(cores)} if cores else {}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | devices
    subprocess.run([python, *launcher, __file__, "-", backend, str(out)], env=environment, check=True, timeout=600)
    return torch.load(out, weights_only=True) | {"weights": load_file(out.with_suffix(".safetensors"))}


def largest_difference(one: object, other: object) -> float:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return max(largest_difference(one[name], other[name]) for name in one)
    one, other = (torch.as_tensor(value, dtype=torch.float64) for value in (one, other))
    assert one.shape == other.shape
    return (one - other).abs().max().item()


def main() -> None:
    if sys.argv[1:2] == ["-"]:  # one of the processes that this script starts
        run(*sys.argv[2:])
        return
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--xla")
    arguments.add_argument("--write", action="store_true")
    arguments = arguments.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        first = result_of(next(iter(RUNS)), Path(folder), None)
        for name in list(RUNS)[1:]:
            found = result_of(name, Path(folder), arguments.xla)
            if found is not None:
                rows.append([name, *(f"{largest_difference(first[what], found[what]):.0e}" for what in WHAT)])
                print(*rows[-1], flush=True)
    table = tabulate(rows, ["", *WHAT], tablefmt="github", disable_numparse=True)
    print(table)
    if arguments.write:
        page = ROOT / "docs" / "backends.md"
        before, _, rest = page.read_text().partition("<!-- table -->\n")
        text = f"{before}<!-- table -->\n{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
        page.write_text(text)


if __name__ == "__main__":
    main()
