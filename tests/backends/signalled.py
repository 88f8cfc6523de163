"""A run of many short steps that saves, for tests that send signals to it: under `torchrun`, or starting its ranks."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

import kerastorch as kt
from kerastorch import callbacks


class Slowly(callbacks.Callback):
    adds_to_logs = ()

    def __init__(self, folder, last_s):
        self.folder, self.last_s = folder, last_s

    def on_train_batch_end(self, batch, logs=None):
        time.sleep(0.02)
        if batch == 3:
            (self.folder / "started").touch()
            time.sleep(self.last_s)


def main():
    options, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.manual_seed(0)
    x = torch.rand(640, 4)
    backend = getattr(kt.backends, options.pop("backend"))(**options)
    model = kt.Model(nn.Linear(4, 1), backend=backend).compile("sgd", "mse", lr=0.01)
    saving = callbacks.ModelCheckpoint(folder / "{epoch}.pt", save_last=True)
    slowly = Slowly(folder, float(*sys.argv[3:]))
    history = model.fit(x, x.sum(1, keepdim=True), epochs=1000, callbacks=[slowly, saving], verbose=2)
    if model.backend.rank == 0:
        end = {"stopped_by": history.stopped_by, "epochs": len(history.epoch), "steps": model.steps_taken}
        (folder / "end.json").write_text(json.dumps(end))


main()
