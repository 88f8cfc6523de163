"""Runs of `Model` in a pipeline of two ranks, beside those of one process: a script for `torchrun`.

    torchrun --standalone --nproc-per-node=2 tests/backends/pipeline_runs.py folder

Rank 0 writes `folder/found.json`: name of a check -> what it found; and leaves `folder/run.pt`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import kerastorch as kt
from kerastorch import callbacks
from tests.backends.cases import ADAM, CASES, MASKED, OUTPUTS, SGD, Heads, OwnStep, Penalized, Recurrent, X, Y, mlp
from tests.backends.cases import differences as differences_of

SAME = (
    "arrays", "everything at once", "a window of such", "sample_weight", "class_weight", "loader with workers",
    "iterable dataset", "frozen", "unfrozen later", "torchmetrics", "validation within epochs", "max_steps",
    "EarlyStopping", "a stop that one rank asks for", "double", "sanity_steps", "dry_run",
)  # fmt: skip
HEADS = {"optimizer": "sgd", "loss": OUTPUTS, "lr": 0.1, "metrics": {"digit": ["accuracy"]}}


def frozen_first() -> nn.Module:
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    net[0].requires_grad_(False)
    return net


MORE = {
    "several losses": {
        "net": Heads, "compile": HEADS, "data": (X, {"digit": MASKED, "value": Y.astype("float32")}),
    },
    "masked": {"compile": SGD, "data": (X, MASKED)},
    "masked, in windows": {"compile": SGD, "data": (X, MASKED), "fit": {"accumulate": 2, "batch_size": 20}},
    "values clipped": {"compile": SGD | {"clip": ("value", 1e-3)}},
    "values clipped, a stage frozen": {"net": frozen_first, "compile": SGD | {"clip": ("value", 1e-3)}},
    "best weights restored": {
        "fit": {
            "epochs": 4, "validation_split": 0.3,
            "callbacks": lambda: [callbacks.EarlyStopping(patience=0, mode="max", restore_best_weights=True)],
        },
    },
    "sums": {"compile": SGD | {"loss": nn.CrossEntropyLoss(reduction="sum"), "lr": 1e-3}, "fit": {"accumulate": 2}},
    "classes weighted": {"compile": SGD | {"loss": nn.CrossEntropyLoss(torch.linspace(0.1, 2, 10))}},
}  # fmt: skip


class Hears(callbacks.Callback):
    """What a callback sees of each batch."""

    adds_to_logs = ()

    def __init__(self) -> None:
        self.losses, self.samples, self.norms, self.afterwards = [], [], [], 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.losses.append(float(logs["loss"]))
        self.samples.append(self.model.samples_seen)
        self.norms.append(float(self.model.gradient_norm))

    def on_after_backward(self) -> None:
        self.afterwards += 1


def pipeline(**options: Any) -> kt.backends.Pipeline:
    return kt.backends.Pipeline(**{"stages": 2, "microbatches": 4, "timeout_s": 60} | options)


def heard() -> dict[str, Any]:
    found = []
    for backend in ("cpu", pipeline()):
        hears = Hears()
        kt.Model(mlp(), backend=backend).compile(**SGD, clip=0.3).fit(
            X, Y, epochs=2, shuffle=False, callbacks=[hears], verbose=0
        )
        found.append(hears)
    one, other = found
    assert one.samples == other.samples and one.afterwards == other.afterwards == 8
    return {
        name: max(abs(a - b) for a, b in zip(getattr(one, name), getattr(other, name), strict=True))
        for name in ("losses", "norms")
    }


def in_bf16() -> dict[str, Any]:
    """Metrics, losses and outputs are float32, as in one process."""
    found = []
    for backend in ("cpu", pipeline()):
        model = kt.Model(mlp(), backend=backend).compile(**SGD | {"precision": "bf16"})
        model.fit(X, Y, epochs=2, verbose=0)
        found.append((model.evaluate(X, Y, verbose=0), model.predict(X, verbose=0)))
    return {"evaluate": abs(found[0][0][0] - found[1][0][0]), "dtypes": [str(output.dtype) for _, output in found]}


def batch_norm() -> float:
    """As one process with these microbatches."""
    found = []
    for backend, own in (("cpu", {"microbatch": 7}), (pipeline(microbatches=2), {})):
        kt.set_seed(3)
        model = kt.Model(mlp(norm=True), backend=backend).compile(**SGD)
        model.fit(X[:98], Y[:98], batch_size=14, epochs=2, verbose=0, **own)
        found.append(model.module.state_dict())
    return max((found[0][name] - found[1][name]).abs().max().item() for name in found[0])


def saved(folder: Path) -> dict[str, Any]:
    """Files of a run and after it; a model of two ranks reads them again."""
    kt.set_seed(3)
    model = kt.Model(mlp(), backend=pipeline()).compile(**ADAM)
    checkpoint = callbacks.ModelCheckpoint(folder / "epoch{epoch}.safetensors", save_weights_only=True)
    model.fit(X, Y, epochs=2, callbacks=[checkpoint], verbose=0)
    model.save(folder / "run.pt")
    again = kt.Model(mlp(seed=2), backend=pipeline()).compile(**ADAM).load(folder / "run.pt")
    again.fit(X, Y, epochs=3, initial_epoch=2, verbose=0)
    kt.set_seed(3)
    straight = kt.Model(mlp(), backend=pipeline()).compile(**ADAM)
    straight.fit(X, Y, epochs=3, verbose=0)
    pairs = zip(again.get_weights(), straight.get_weights(), strict=True)
    return {"again": max(float(abs(a - b).max()) for a, b in pairs)}


def alone() -> list[float]:
    """Dropout draws different numbers on each rank."""
    net = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 10))
    kept = []
    for layer in (net[1], net[3]):
        layer.register_forward_hook(lambda layer, given, output: kept.append((output != 0).float()))
    kt.Model(net, backend=pipeline(microbatches=1, balance=["2"])).compile(**SGD).fit(
        X[:8], Y[:8], batch_size=8, verbose=0
    )
    masks = [None, None]
    dist.all_gather_object(masks, kept[-1])
    return [float((masks[0] == masks[1]).float().mean())]


def refusals() -> dict[str, str]:
    def fit(net: Any = mlp, of: type = kt.Model, options: Any = SGD, data: Any = (X, Y), **own: Any) -> Any:
        return of(net(), backend=pipeline()).compile(**options).fit(*data, verbose=0, **own)

    heads = {"net": Heads, "options": HEADS, "data": (X, {"digit": MASKED, "value": Y.astype("float32")})}
    tries = {
        "precision": {"options": SGD | {"precision": "16"}},
        "loss": {"options": {"loss": None}},
        "compute_loss": {"of": Penalized},
        "train_step": {"of": OwnStep},
        "tbptt": {"net": Recurrent, "options": {"loss": "cross_entropy", "tbptt_steps": 3}},
        "jit": {"options": SGD | {"jit": True}},
        "closure": {"options": SGD | {"optimizer": "lbfgs"}},
        "microbatch": {"microbatch": 4},
        "window": heads | {"accumulate": 2},
        "callback": {"callbacks": [callbacks.EMA(0.9)]},
        "cut": {"net": lambda: nn.Linear(64, 10)},
    }
    found = {}
    for name, how in tries.items():
        try:
            fit(**how)
        except ValueError as error:
            found[name] = str(error)
    try:
        pipeline(stages=3)
    except ValueError as error:
        found["stages"] = str(error)
    return found


class FailsOnAll(callbacks.Callback):
    adds_to_logs = ()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        raise LookupError("of all ranks")


def failed() -> dict[str, Any]:
    """An error leaves a module whose foreign stages are lost, and says so by NaN; another run is not disturbed."""
    backend, net = pipeline(balance=["3"]), mlp()
    shapes = [one.shape for one in net.parameters()]
    try:
        kt.Model(net, backend=backend).compile(**SGD).fit(X, Y, verbose=0, callbacks=[FailsOnAll()])
    except LookupError as error:
        said = str(error)
    lost = [bool(one.isnan().all()) for one in net.parameters()]
    assert [one.shape for one in net.parameters()] == shapes
    kt.Model(mlp(), backend=backend).compile(**SGD).fit(X, Y, verbose=0)
    return {"said": said, "lost": backend.collect(lost)}


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    try:
        found = {name: differences_of(CASES[name], pipeline()) for name in SAME}
        found |= {name: differences_of(case, pipeline()) for name, case in MORE.items()}
        gpipe = pipeline(schedule="gpipe", balance=["2"], checkpoint_activations=True)
        found["other options"] = differences_of(CASES["everything at once"], gpipe)
        looped = pipeline(stages=4, schedule="interleaved1f1b", balance=["1", "2", "3"])
        found["several stages each"] = differences_of(CASES["arrays"], looped)
        found |= {"heard": heard(), "bf16": in_bf16(), "batch_norm": batch_norm(), "saved": saved(folder)}
        found |= {"alone": alone(), "refusals": refusals(), "failed": failed()}
    except BaseException as error:
        traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(1)  # the other rank may wait anywhere
    if os.environ["RANK"] == "0":
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
