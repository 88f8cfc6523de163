"""What a training step costs around its arithmetic: kerastorch, two hand-written loops and the libraries nearest to it.

Measured is the time of a training step, in microseconds, of three small models on one CPU thread. All contenders train
the same module from the same weights on the same tensors, with Adam, batches of 32 in a new order each epoch, and keep
the mean loss and accuracy of the training data for each epoch. Each is built once, the way its own documentation shows,
with its progress bar, logger and checkpoints off; a first epoch (imports, warm-up) is not counted. Then all train a few
epochs in turn, round after round, the order rotated, so that a busy machine is busy for everybody. A call of `fit` is
timed as a whole: what it costs before its first step is in the numbers.

The two loops are the ends of what people write by hand:
- `best loop`: batches gathered by `index_select` from one `randperm` an epoch, `Adam(fused=True)`, sums kept in tensors;
- `usual loop`: TensorDataset and DataLoader, `Adam()`, `.item()` of loss and accuracy in each step.

How to run:
    pip install -c constraints.txt -e .[conformance]
    python benchmarks/overhead.py                                  # all models, about three minutes
    python benchmarks/overhead.py --model mlp --validation         # each epoch ends with a tenth of the data validated
    python benchmarks/overhead.py --contenders kerastorch,usual --fused
    python benchmarks/overhead.py --imports                        # what `import` costs, on top of torch
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

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH_SIZE = 32
Train = Callable[[int], tuple[float, float]]  # trains so many epochs more; loss and accuracy of the last one


@dataclass
class Task:
    """What everybody trains.

    Attributes:
        module: The initial weights; `net` gives each contender a copy.
        x: Inputs, shape (samples, ...).
        y: Classes, shape (samples,).
        validation: The same two of other samples, or `None`.
        fused: Whether the peers that take a torch optimizer get `Adam(fused=True)` too.
        keras_layers: `keras.layers` -> the same module as a list of Keras layers; `None` = there is no such list.
    """

    module: nn.Module
    x: Tensor
    y: Tensor
    validation: tuple[Tensor, Tensor] | None = None
    fused: bool = False
    keras_layers: Callable | None = None

    def net(self) -> nn.Module:
        return copy.deepcopy(self.module)

    def adam(self, parameters: object) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, fused=self.fused or None)

    def loader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.x, self.y), batch_size=BATCH_SIZE, shuffle=True)

    def validation_loader(self) -> DataLoader | None:
        return self.validation and DataLoader(TensorDataset(*self.validation), batch_size=BATCH_SIZE)

    def steps(self) -> int:
        return -(-len(self.x) // BATCH_SIZE)


# The contenders: each builds everything once and returns a function that trains on.


def kerastorch(task: Task) -> Train:
    import kerastorch as kt

    model = kt.Model(task.net(), backend="cpu").compile("adam", "cross_entropy", metrics=["accuracy"])

    def train(epochs: int) -> tuple[float, float]:
        history = model.fit(
            task.x, task.y, epochs=epochs, batch_size=BATCH_SIZE, validation_data=task.validation, verbose=0
        ).history
        return history["loss"][-1], history["accuracy"][-1]

    return train


def best_loop(task: Task) -> Train:
    net, x, y = task.net(), task.x, task.y
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def train(epochs: int) -> tuple[float, float]:
        for _ in range(epochs):
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
            if task.validation:
                validate()
        return loss_sum.item() / len(x), right.item() / len(x)

    @torch.no_grad()
    def validate() -> tuple[float, float]:
        net.eval()
        output, target = net(task.validation[0]), task.validation[1]
        return F.cross_entropy(output, target).item(), (output.argmax(1) == target).float().mean().item()

    return train


def usual_loop(task: Task) -> Train:
    net, loader, validation_loader = task.net(), task.loader(), task.validation_loader()
    optimizer = task.adam(net.parameters())
    loss_function = nn.CrossEntropyLoss()

    def train(epochs: int) -> tuple[float, float]:
        for _ in range(epochs):
            net.train()
            loss_sum, right = 0.0, 0
            for x, y in loader:
                optimizer.zero_grad()
                output = net(x)
                loss = loss_function(output, y)
                loss.backward()
                optimizer.step()
                loss_sum += loss.item() * len(x)
                right += (output.argmax(1) == y).sum().item()
            if task.validation:
                validate()
        return loss_sum / len(task.x), right / len(task.x)

    @torch.no_grad()
    def validate() -> tuple[float, float]:
        net.eval()
        loss_sum, right = 0.0, 0
        for x, y in validation_loader:
            output = net(x)
            loss_sum += loss_function(output, y).item() * len(x)
            right += (output.argmax(1) == y).sum().item()
        return loss_sum / len(task.validation[0]), right / len(task.validation[0])

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
        optimizer__lr=1e-3,  # skorch's own default is 1e-2
        optimizer__fused=task.fused or None,
        batch_size=BATCH_SIZE,
        iterator_train__shuffle=True,
        train_split=task.validation and predefined_split(Dataset(*task.validation)),
        callbacks=[EpochScoring("accuracy", name="train_acc", lower_is_better=False, on_train=True)],
        callbacks__print_log=None,
        verbose=0,
    )

    def train(epochs: int) -> tuple[float, float]:
        net.set_params(max_epochs=epochs)
        net.partial_fit(task.x, task.y)
        return net.history[-1, ("train_loss", "train_acc")]

    return train


def poutyne(task: Task) -> Train:
    from poutyne import Model

    net = task.net()
    model = Model(net, task.adam(net.parameters()), "cross_entropy", batch_metrics=["accuracy"])

    def train(epochs: int) -> tuple[float, float]:
        logs = model.fit(
            task.x, task.y, task.validation, epochs=epochs, batch_size=BATCH_SIZE, progress_options=None, verbose=False
        )
        return logs[-1]["loss"], logs[-1]["acc"] / 100

    return train


def lightning(task: Task) -> Train:
    import lightning as L

    class Classifier(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = task.net()
            self.optimizer = task.adam(self.net.parameters())  # kept, so that a second `fit` goes on

        def measure(self, batch: tuple[Tensor, Tensor], prefix: str) -> Tensor:
            x, y = batch
            output = self.net(x)
            loss = F.cross_entropy(output, y)
            accuracy = (output.argmax(1) == y).float().mean()
            self.log(f"{prefix}loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
            self.log(f"{prefix}accuracy", accuracy, on_step=False, on_epoch=True, batch_size=len(x))
            return loss

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return self.measure(batch, "")

        def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
            self.measure(batch, "val_")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.optimizer

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=0, num_sanity_val_steps=0, **quiet)
    module, loaders = Classifier(), (task.loader(), task.validation_loader())

    def train(epochs: int) -> tuple[float, float]:
        trainer.fit_loop.max_epochs += epochs
        trainer.fit(module, *loaders)
        return trainer.callback_metrics["loss"].item(), trainer.callback_metrics["accuracy"].item()

    return train


def keras_wrapping(task: Task) -> Train:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    class Wrapped(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.net = keras.layers.TorchModuleWrapper(task.net())

        def call(self, x: Tensor) -> Tensor:
            return self.net(x)

    return _fit_of_keras(Wrapped(), task)


def keras_layers(task: Task) -> Train | None:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    if task.keras_layers is None:
        return None
    model = keras.Sequential([keras.Input(task.x.shape[1:]), *task.keras_layers(keras.layers)])
    # Keras has the axes of its kernels the other way round: (inputs, outputs), (height, width, inputs, outputs).
    weights = (weight.detach() for weight in task.module.parameters())
    model.set_weights([w.permute(*range(2, w.ndim), 1, 0) if w.ndim > 1 else w for w in weights])
    return _fit_of_keras(model, task)


def _fit_of_keras(model: object, task: Task) -> Train:
    import keras

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    x, y = task.x.numpy(), task.y.numpy()
    validation = task.validation and tuple(tensor.numpy() for tensor in task.validation)

    def train(epochs: int) -> tuple[float, float]:
        history = model.fit(x, y, BATCH_SIZE, epochs, verbose=0, validation_data=validation).history
        return history["loss"][-1], history["accuracy"][-1]

    return train


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
    """64-128-10 on 4,096 random vectors, whose class a random linear map decides."""
    x = torch.randn(4096, 64)
    y = (x @ torch.randn(64, 10)).argmax(1)
    module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    return Task(
        module, x, y, keras_layers=lambda layers: [layers.Dense(128, activation="relu"), layers.Dense(10)]
    )


def conv() -> Task:
    """Two convolutions on the 1,797 handwritten digits of scikit-learn, 8 x 8 pixels each."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    head = (nn.Flatten(), nn.Linear(32 * 2 * 2, 10))
    module = nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2), *head)

    def in_keras(layers: object) -> list:
        order = {"data_format": "channels_first"}
        parts = []
        for filters in (16, 32):
            parts += [layers.Conv2D(filters, 3, padding="same", activation="relu", **order)]
            parts += [layers.MaxPooling2D(2, **order)]
        return [*parts, layers.Flatten(), layers.Dense(10)]

    return Task(module, x, torch.tensor(digits.target), keras_layers=in_keras)


class NextByte(nn.Module):
    """Which byte follows a sequence of 32: two transformer layers of width 64, four heads."""

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
    """2,048 sequences from the help texts that come with Python."""
    text = "".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")
    windows = torch.tensor(list(text[: 2048 * 33])).view(2048, 33)
    return Task(NextByte(), windows[:, :32].contiguous(), windows[:, 32].contiguous())


MODELS = {"mlp": mlp, "conv": conv, "transformer": transformer}


# Measuring.


def measure(name: str, options: argparse.Namespace) -> None:
    """Trains one model with all contenders in turn and prints the table."""
    torch.manual_seed(0)
    task = MODELS[name]()
    task.fused = options.fused
    if options.validation:
        cut = len(task.x) // 10
        task.validation = task.x[-cut:], task.y[-cut:]
        task.x, task.y = task.x[:-cut], task.y[:-cut]

    trains = {}
    for contender in options.contenders:
        try:
            train = CONTENDERS[contender](task)
        except ImportError as error:
            print(f"{contender}: skipped, {error}")
            continue
        if train is None:
            print(f"{contender}: skipped, there is no {name} of that kind")
            continue
        train(1)
        trains[contender] = train

    steps = options.epochs * task.steps()
    times, results, order = {contender: [] for contender in trains}, {}, list(trains)
    for _ in range(options.rounds):
        for contender in order:
            start = time.perf_counter()
            results[contender] = trains[contender](options.epochs)
            times[contender].append((time.perf_counter() - start) / steps * 1e6)
        order = order[1:] + order[:1]

    epochs = 1 + options.rounds * options.epochs
    print(f"\n{name}: {' '.join(MODELS[name].__doc__.split())}")
    print(f"{task.steps()} steps an epoch, {options.rounds} rounds of {options.epochs} epochs, loss after {epochs}\n")
    print(table(times, results), flush=True)
    losses = [loss for loss, _ in results.values()]
    # Their orders of the samples differ, so their losses do a little; work left out would show in more.
    assert max(losses) - min(losses) < 0.1 * statistics.median(losses) + 0.02, f"not the same work: {results}"


def table(times: dict[str, list[float]], results: dict[str, tuple[float, float]]) -> str:
    """One line for each contender, the fastest first; ratios are ratios of medians."""
    medians = {contender: statistics.median(values) for contender, values in times.items()}
    lines = []
    for contender in sorted(medians, key=medians.get):
        ratios = [
            f"{medians[contender] / medians[loop]:.2f}" if loop in medians else "-" for loop in ("best", "usual")
        ]
        spread = f"{min(times[contender]):.0f}..{max(times[contender]):.0f}"
        loss, accuracy = results[contender]
        lines.append([contender, f"{medians[contender]:.0f}", *ratios, spread, f"{loss:.3f}", f"{accuracy:.3f}"])
    headers = ["contender", "us/step", "x best", "x usual", "min..max", "loss", "accuracy"]
    return tabulate(lines, headers, "github", disable_numparse=True, colalign=("left", *["right"] * 6))


def imports(repeats: int = 5) -> None:
    """Prints what `import` of each library takes after `import torch`: the median of fresh processes."""
    lines = []
    for library in ("kerastorch", "skorch", "poutyne", "lightning", "keras"):
        code = f"import torch, time; t = time.perf_counter(); import {library}; print(time.perf_counter() - t)"
        command, environment = [sys.executable, "-c", code], os.environ | {"KERAS_BACKEND": "torch"}
        runs = [subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(repeats)]
        if any(run.returncode for run in runs):
            print(f"{library}: skipped, {runs[0].stderr.strip().splitlines()[-1]}")
            continue
        lines.append([library, f"{statistics.median(float(run.stdout.split()[-1]) for run in runs):.2f}"])
    print(tabulate(lines, ["library", "import, s over torch"], "github", disable_numparse=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender is timed (default: 5)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs in a round (default: 2)")
    parser.add_argument("--validation", action="store_true", help="validate on a tenth after each epoch")
    parser.add_argument("--fused", action="store_true", help="Adam(fused=True) for all that take a torch optimizer")
    parser.add_argument("--contenders", type=lambda names: names.split(","), default=list(CONTENDERS))
    parser.add_argument("--imports", action="store_true", help="measure imports instead")
    options = parser.parse_args()
    if unknown := set(options.contenders) - set(CONTENDERS):
        parser.error(f"unknown contenders {', '.join(sorted(unknown))}; known are {', '.join(CONTENDERS)}")
    if options.imports:
        return imports()
    warnings.filterwarnings("ignore")  # peers advise on workers of the loader and the like
    torch.set_num_threads(1)
    for name in MODELS if options.model == "all" else [options.model]:
        measure(name, options)


if __name__ == "__main__":
    main()
