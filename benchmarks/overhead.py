"""What a training step costs around its arithmetic: kerastorch, two hand-written loops and the libraries nearest to it.

Measured is the time of a training step of three small models on one CPU thread. All contenders train the same module
from the same weights on the same tensors, with Adam, batches of 32 in a new order each epoch, and keep the mean loss
and accuracy of each epoch. Each is built once, as its own documentation shows, with progress bar, logger and
checkpoints off; a first epoch (imports, warm-up) is not counted. Then all train a few epochs in turn, round after
round, each round begun by another, so that a busy machine is busy for everybody. A call of `fit` is timed as a whole;
what it does before its first step takes 4 ms at most (Lightning), below 1% of a round with the defaults.

The two loops are the ends of what people write by hand:
- best: batches gathered by `index_select` from one `randperm` an epoch, `Adam(fused=True)`, sums kept in tensors;
- usual: TensorDataset and DataLoader, `Adam()`, `.item()` of loss and accuracy in each step.

How to run:
    pip install -c constraints.txt -e .[conformance]
    python benchmarks/overhead.py                              # all models, about four minutes
    python benchmarks/overhead.py --model mlp --validation     # each epoch ends with a validation
    python benchmarks/overhead.py --fused --contenders best,kerastorch,poutyne
    python benchmarks/overhead.py --imports                    # what `import` costs on top of torch
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

os.environ["KERAS_BACKEND"] = "torch"  # read when Keras is imported

BATCH_SIZE = 32
LOGS = ("loss", "accuracy", "val_loss")
Train = Callable[[int], Any]  # trains so many epochs more and returns LOGS of the last; `val_loss` may be None


@dataclass
class Task:
    """What everybody trains."""

    module: nn.Module  # the initial weights: each contender gets a copy
    x: Tensor  # shape (samples, ...)
    y: Tensor  # class indices, shape (samples,)
    keras_layers: Callable | None = None  # `keras.layers` -> the same module as Keras layers
    validation: tuple[Tensor, Tensor] | None = None  # x and y of other samples
    fused: bool | None = None  # for the Adam of peers; `None` is torch's default

    def net(self) -> nn.Module:
        return copy.deepcopy(self.module)

    def loaders(self) -> tuple[DataLoader, DataLoader | None]:
        training = DataLoader(TensorDataset(self.x, self.y), batch_size=BATCH_SIZE, shuffle=True)
        return training, self.validation and DataLoader(TensorDataset(*self.validation), batch_size=BATCH_SIZE)


# The contenders: each builds everything once and returns a function that trains on.


def kerastorch(task: Task) -> Train:
    import kerastorch as kt

    model = kt.Model(task.net(), backend="cpu").compile("adam", "cross_entropy", metrics=["accuracy"])
    options = {"batch_size": BATCH_SIZE, "validation_data": task.validation, "verbose": 0}
    return lambda epochs: last(model.fit(task.x, task.y, epochs=epochs, **options).history)


def best_loop(task: Task) -> Train:
    net, x, y = task.net(), task.x, task.y
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def train_epoch() -> tuple[float, float]:
        net.train()
        loss_sum, right = torch.zeros(()), torch.zeros((), dtype=torch.long)
        for rows in torch.randperm(len(x)).split(BATCH_SIZE):
            target = y.index_select(0, rows)
            output = net(x.index_select(0, rows))
            loss = F.cross_entropy(output, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss_sum += loss.detach() * len(rows)
            right += (output.detach().argmax(1) == target).sum()
        return loss_sum.item() / len(x), right.item() / len(x)

    @torch.no_grad()
    def validate(x: Tensor, y: Tensor) -> tuple[float, float]:
        output = net.eval()(x)  # without gradients a tenth of the data is one batch
        return F.cross_entropy(output, y).item(), (output.argmax(1) == y).float().mean().item()

    def train(epochs: int) -> Any:
        for _ in range(epochs):
            logs = train_epoch()
            val_logs = validate(*task.validation) if task.validation else (None,)
        return *logs, val_logs[0]

    return train


def usual_loop(task: Task) -> Train:
    net, (loader, validation_loader) = task.net(), task.loaders()
    optimizer = torch.optim.Adam(net.parameters())
    criterion = nn.CrossEntropyLoss()

    def run(loader: DataLoader, is_training: bool) -> tuple[float, float]:
        net.train(is_training)
        loss_sum, right = 0.0, 0
        for x, y in loader:
            output = net(x)
            loss = criterion(output, y)
            if is_training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss_sum += loss.item() * len(x)
            right += (output.argmax(1) == y).sum().item()
        return loss_sum / len(loader.dataset), right / len(loader.dataset)

    def train(epochs: int) -> Any:
        for _ in range(epochs):
            logs = run(loader, True)
            with torch.no_grad():
                val_logs = run(validation_loader, False) if validation_loader else (None,)
        return *logs, val_logs[0]

    return train


def skorch(task: Task) -> Train:
    from skorch import NeuralNetClassifier
    from skorch.callbacks import EpochScoring
    from skorch.dataset import Dataset
    from skorch.helper import predefined_split

    net = NeuralNetClassifier(
        task.net(),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        optimizer__lr=1e-3,  # skorch's default is 1e-2
        optimizer__fused=task.fused,
        batch_size=BATCH_SIZE,
        iterator_train__shuffle=True,
        train_split=task.validation and predefined_split(Dataset(*task.validation)),
        callbacks=[EpochScoring("accuracy", name="train_acc", lower_is_better=False, on_train=True)],
        callbacks__print_log=None,
        verbose=0,
    )

    def train(epochs: int) -> Any:
        row = net.set_params(max_epochs=epochs).partial_fit(task.x, task.y).history[-1]
        return row["train_loss"], row["train_acc"], row.get("valid_loss")

    return train


def poutyne(task: Task) -> Train:
    from poutyne import Model

    net, loaders = task.net(), task.loaders()
    optimizer = torch.optim.Adam(net.parameters(), fused=task.fused)
    model = Model(net, optimizer, "cross_entropy", batch_metrics=["accuracy"])

    def train(epochs: int) -> Any:
        logs = model.fit_generator(*loaders, epochs=epochs, verbose=False)[-1]
        return logs["loss"], logs["acc"] / 100, logs.get("val_loss")

    return train


def lightning(task: Task) -> Train:
    import lightning as L

    class Classifier(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = task.net()
            self.optimizer = torch.optim.Adam(self.net.parameters(), fused=task.fused)

        def training_step(self, batch: Any) -> Tensor:
            return self.measure(batch, "")

        def validation_step(self, batch: Any) -> Tensor:
            return self.measure(batch, "val_")

        def measure(self, batch: Any, prefix: str) -> Tensor:
            x, y = batch
            output = self.net(x)
            loss = F.cross_entropy(output, y)
            accuracy = (output.argmax(1) == y).float().mean()
            self.log(f"{prefix}loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
            self.log(f"{prefix}accuracy", accuracy, on_step=False, on_epoch=True, batch_size=len(x))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.optimizer  # the same at each `fit`, so that training goes on

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=0, num_sanity_val_steps=0, **quiet)
    module, loaders = Classifier(), task.loaders()

    def train(epochs: int) -> Any:
        trainer.fit_loop.max_epochs += epochs
        trainer.fit(module, *loaders)
        return [trainer.callback_metrics.get(name) for name in LOGS]

    return train


def keras_wrapping(task: Task) -> Train:
    import keras

    class Wrapped(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.net = keras.layers.TorchModuleWrapper(task.net())

        def call(self, x: Tensor) -> Tensor:
            return self.net(x)

    return train_of_keras(keras, Wrapped(), task)


def keras_layers(task: Task) -> Train | None:
    import keras

    if task.keras_layers is None:
        return None
    model = keras.Sequential([keras.Input(task.x.shape[1:]), *task.keras_layers(keras.layers)])
    # The axes of Keras's kernels are (inputs, outputs) and (height, width, inputs, outputs).
    weights = (weight.detach() for weight in task.module.parameters())
    model.set_weights([w.permute(*range(2, w.ndim), 1, 0) if w.ndim > 1 else w for w in weights])
    return train_of_keras(keras, model, task)


def train_of_keras(keras: Any, model: Any, task: Task) -> Train:
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    x, y = task.x.numpy(), task.y.numpy()
    options = {"validation_data": task.validation and tuple(part.numpy() for part in task.validation), "verbose": 0}
    return lambda epochs: last(model.fit(x, y, BATCH_SIZE, epochs, **options).history)


def last(history: dict[str, list[float]]) -> list[float | None]:
    return [history.get(name, [None])[-1] for name in LOGS]


CONTENDERS = {
    "kerastorch": kerastorch,
    "best": best_loop,
    "usual": usual_loop,
    "skorch": skorch,
    "poutyne": poutyne,
    "lightning": lightning,
    "keras-wrapping": keras_wrapping,
    "keras-layers": keras_layers,
}


# The models and their data.


def mlp() -> Task:
    """64-128-10, 4,096 random vectors whose class a random linear map decides."""
    x = torch.randn(4096, 64)
    module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    in_keras = lambda layers: [layers.Dense(128, activation="relu"), layers.Dense(10)]  # noqa: E731
    return Task(module, x, (x @ torch.randn(64, 10)).argmax(1), in_keras)


def conv() -> Task:
    """two convolutions (16, 32), the 1,797 handwritten digits of scikit-learn, 8 x 8 pixels each."""
    from sklearn.datasets import load_digits

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]

    def in_keras(layers: Any) -> list[Any]:
        options, order = {"padding": "same", "activation": "relu"}, {"data_format": "channels_first"}
        blocks = [(layers.Conv2D(n, 3, **options, **order), layers.MaxPooling2D(2, **order)) for n in (16, 32)]
        return [*blocks[0], *blocks[1], layers.Flatten(), layers.Dense(10)]

    module = nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * 2 * 2, 10))
    images, classes = load_digits(return_X_y=True)
    return Task(module, torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(classes), in_keras)


class NextByte(nn.Module):
    """Logits, shape (samples, 128), of the byte that follows `tokens`, shape (samples, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 64)
        self.position = nn.Parameter(0.02 * torch.randn(32, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens) + self.position)[:, -1])


def transformer() -> Task:
    """two layers of width 64 with 4 heads, the byte after each of 2,048 sequences of 32 from Python's help texts."""
    text = "".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")
    sequences = torch.tensor(list(text[: 2048 * 33])).view(2048, 33)
    return Task(NextByte(), sequences[:, :32].contiguous(), sequences[:, 32].contiguous())


MODELS = {"mlp": mlp, "conv": conv, "transformer": transformer}


# Measuring.


def measure(name: str, options: argparse.Namespace) -> None:
    """Trains one model with all contenders in turn and prints the table."""
    torch.manual_seed(0)
    task = MODELS[name]()
    task.fused = options.fused or None
    if options.validation:
        cut = len(task.x) // 10
        task.validation = task.x[-cut:], task.y[-cut:]
        task.x, task.y = task.x[:-cut], task.y[:-cut]
    trains = build(task, options.contenders)
    if not trains:
        return

    steps = options.epochs * len(task.loaders()[0])
    times, logs, order = {contender: [] for contender in trains}, {}, list(trains)
    for _ in range(options.rounds):
        for contender in order:
            start = time.perf_counter()
            logs[contender] = trains[contender](options.epochs)
            times[contender].append((time.perf_counter() - start) / steps * 1e6)
        order = order[1:] + order[:1]

    print(f"\n{name}: {MODELS[name].__doc__} {options.rounds} rounds of {steps} steps, after a first epoch.\n")
    print(table(times, logs), flush=True)
    losses = [loss for loss, *_ in logs.values()]
    # Their orders of the samples differ, so their losses do a little; work left out would show in more.
    assert max(losses) - min(losses) < 0.1 * statistics.median(losses) + 0.02, "they did not all do the same work"


def build(task: Task, contenders: list[str]) -> dict[str, Train]:
    """What trains on, by contender; the first epoch is behind it."""
    trains = {}
    for contender in contenders:
        try:
            train = CONTENDERS[contender](task)
        except ImportError as error:
            print(f"{contender} is skipped: {error}")
            continue
        if train is None:
            print(f"{contender} is skipped: this model is not written with its layers here")
            continue
        train(1)
        trains[contender] = train
    return trains


def table(times: dict[str, list[float]], logs: dict[str, Any]) -> str:
    """A line for each contender, the fastest first; ratios are ratios of medians."""
    medians = {contender: statistics.median(values) for contender, values in times.items()}
    headers, lines = ["contender", "us/step", "x best", "x usual", "min..max", *LOGS], []
    for contender in sorted(medians, key=medians.get):
        median, values = medians[contender], times[contender]
        ratios = [f"{median / medians[loop]:.2f}" if loop in medians else "-" for loop in ("best", "usual")]
        ends = [f"{value:.3f}" for value in logs[contender] if value is not None]
        lines.append([contender, f"{median:.0f}", *ratios, f"{min(values):.0f}..{max(values):.0f}", *ends])
    headers, align = headers[: len(lines[0])], ["left"] + ["right"] * (len(lines[0]) - 1)
    return tabulate(lines, headers, "github", disable_numparse=True, colalign=align)


def imports(repeats: int = 5) -> None:
    """Prints what `import` of each library takes after `import torch`: the median of fresh processes."""
    lines = []
    for library in ("kerastorch", "skorch", "poutyne", "lightning", "keras"):
        code = f"import time, torch; start = time.perf_counter(); import {library}; print(time.perf_counter() - start)"
        runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(repeats)]
        if any(run.returncode for run in runs):
            print(f"{library} is skipped: {runs[0].stderr.strip().splitlines()[-1]}")
            continue
        lines.append([library, f"{statistics.median(float(run.stdout.split()[-1]) for run in runs):.2f}"])
    print(tabulate(lines, ["library", "s over torch"], "github", disable_numparse=True, colalign=("left", "right")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender is timed (default: 5)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs in a round (default: 3)")
    parser.add_argument("--validation", action="store_true", help="validate on the last tenth after each epoch")
    parser.add_argument("--fused", action="store_true", help="Adam(fused=True) for the peers too, as no docs show")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="some of %(default)s")
    parser.add_argument("--imports", action="store_true", help="measure imports instead")
    options = parser.parse_args()
    if options.imports:
        return imports()
    options.contenders = options.contenders.split(",")
    if unknown := set(options.contenders) - set(CONTENDERS):
        parser.error(f"unknown contenders {', '.join(sorted(unknown))}; known are {', '.join(CONTENDERS)}")
    warnings.filterwarnings("ignore")  # peers advise on workers of loaders
    torch.set_num_threads(1)
    for name in MODELS if options.model == "all" else [options.model]:
        measure(name, options)


if __name__ == "__main__":
    main()
