"""Which gradient a library really applies where batches are accumulated, clipped, weighted or masked.

With SGD at a rate of 1 and no momentum, the difference of the weights before and after an optimizer step is the
gradient that was applied. It is compared with the gradient of the one large batch made of all batches since the step
before: the mean over its samples, or over its targets that are not masked, computed by plain torch in float32 at the
same weights, and clipped as a whole where clipping was asked for. A cell is the largest `max|g - g_ref| / max|g_ref|`
over the steps of an epoch; below 1e-5 is rounding. "2 of 3 steps" says that a window was never applied, "1 over two
epochs" that a step took in batches of two epochs, "loss nan" what the library reports as the loss of the epoch.

Every library trains a copy of the same module on the same batches, by its own accumulation, set as its documentation
says. "usual loop" is the loop of most tutorials: `(loss / 4).backward()`, and a step after every fourth batch and at
the end of the epoch. skorch is absent, as it has no accumulation.

How to run:
    pip install -c constraints.txt -e .[conformance]
    python benchmarks/gradients.py                      # seconds
    python benchmarks/gradients.py --without lightning,keras
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import logging
import math
import os
import pydoc_data.topics
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader

os.environ["KERAS_BACKEND"] = "torch"  # read when Keras is imported

WINDOW = 4  # batches in an optimizer step
MASKED = -100  # the `ignore_index` of torch
# Below the norm of each window's gradient (about 0.38) and above half of it: a gradient that is only half as large as
# it should be then stays unclipped. A much lower threshold would hide such a factor, as it keeps the direction alone.
CLIP = 0.3

Batch = tuple[Tensor, ...]  # x, target and, where samples are weighted, their weights


# What is trained: the rows of the table.


@dataclass
class Scenario:
    """An epoch of batches, and how they are trained on.

    Attributes:
        name: Heading of the row.
        module: The initial weights: each library gets a copy.
        batches: Those of an epoch, in order.
        clip: Largest global norm of a gradient; `None` = unclipped.
        epochs: How often the batches are gone through.
        counts_steps: Whether steps and samples are counted, instead of gradients compared.
    """

    name: str
    module: nn.Module
    batches: list[Batch]
    clip: float | None = None
    epochs: int = 1
    counts_steps: bool = False

    def loader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)

    def stream(self) -> list[Batch]:
        """The batches of all epochs, in order."""
        return self.batches * self.epochs

    def steps(self) -> int:
        """Steps that leave no batch out and mix no epochs."""
        return self.epochs * math.ceil(len(self.batches) / WINDOW)


def scenarios() -> list[Scenario]:
    digits, tokens = digits_module(), tokens_module()
    regular, short = digits_batches([32] * 8), digits_batches([32] * 10)
    return [
        Scenario("regular windows", digits, regular),
        Scenario("short last window", digits, short),
        Scenario("short last batch", digits, digits_batches([32] * 7 + [5])),
        Scenario("leftovers, 3 epochs", digits, short, epochs=3, counts_steps=True),
        Scenario("batches of 5, 40, 17, 2", digits, digits_batches([5, 40, 17, 2])),
        Scenario("masked targets", tokens, paragraphs(8)),
        Scenario("clipping", digits, regular, clip=CLIP),
        Scenario("clipping, short last window", digits, short, clip=CLIP),
        Scenario("sample weights", digits, weighted(regular)),
        Scenario("a batch all masked", tokens, with_one_masked(lines(8))),
    ]


def digits_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def digits_batches(sizes: list[int]) -> list[Batch]:
    """The first handwritten digits in scikit-learn's order: x of shape (size, 64), target of shape (size,)."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    x, target = torch.tensor(images).float() / 16, torch.tensor(classes)
    total = sum(sizes)
    return list(zip(x[:total].split(sizes), target[:total].split(sizes), strict=True))


def weighted(batches: list[Batch]) -> list[Batch]:
    """Weights that grow from 0 to 2 over the samples, so that their sums differ from batch to batch."""
    weights = torch.linspace(0, 2, sum(len(x) for x, _ in batches)).split([len(x) for x, _ in batches])
    return [(*batch, weight) for batch, weight in zip(batches, weights, strict=True)]


def tokens_module() -> nn.Module:
    """Logits, shape (samples, length, 128), of the byte that follows each of `tokens`, shape (samples, length)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(128, 16), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 128))


def help_texts() -> str:
    return "\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore").decode()


def paragraphs(batches: int) -> list[Batch]:
    """Paragraphs of Python's help texts as they come, four in a batch, all padded to the longest of them."""
    texts = [text for text in help_texts().split("\n\n") if text.strip()]
    return token_batches(texts[: 4 * batches])


def lines(batches: int) -> list[Batch]:
    """Pieces of 65 bytes of the same texts, four in a batch: no padding, so that no target is masked."""
    text = help_texts()
    return token_batches([text[start : start + 65] for start in range(0, 4 * batches * 65, 65)])


def token_batches(texts: list[str]) -> list[Batch]:
    """Bytes and the bytes that follow them, each of shape (4, length); targets in the padding are masked."""
    rows = [torch.tensor(list(text.encode())) for text in texts]
    x = nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True)
    target = nn.utils.rnn.pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=MASKED)
    return list(zip(x.split(4), target.split(4), strict=True))


def with_one_masked(batches: list[Batch]) -> list[Batch]:
    """The second batch of the first window has no target that counts."""
    x, target = batches[1]
    return [batches[0], (x, torch.full_like(target, MASKED)), *batches[2:]]


def cross_entropy(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean over all targets that are not masked; with weights `sum(weight * loss) / n`."""
    output, target = output.flatten(0, -2), target.flatten()
    if weight is None:
        return F.cross_entropy(output, target, ignore_index=MASKED)
    return (weight * F.cross_entropy(output, target, reduction="none")).mean()


# What a library did.


class Recording:
    """A copy of a module and its weights after each optimizer step.

    Attributes:
        net: The copy.
        weights: Those at the start and after each step.
        batches: How many batches had been seen by then.
        loss: What the library reports for the last epoch.
    """

    def __init__(self, module: nn.Module) -> None:
        self.net = copy.deepcopy(module)
        self.weights, self.batches, self.loss = [self._weights()], [0], math.nan
        self._seen = 0

    def sgd(self) -> torch.optim.Optimizer:
        """An optimizer whose steps are recorded; a forward pass is a batch."""
        optimizer = torch.optim.SGD(self.net.parameters(), lr=1.0)
        self.net.register_forward_hook(lambda *_: self._see())
        optimizer.register_step_post_hook(lambda *_: self._take())
        return optimizer

    def end_batch(self) -> None:
        """For a library with optimizers of its own, called after each batch: a step is what changes the weights."""
        self._see()
        if not torch.equal(self._weights(), self.weights[-1]):
            self._take()

    def _see(self) -> None:
        self._seen += 1

    def _take(self) -> None:
        self.weights.append(self._weights())
        self.batches.append(self._seen)

    def _weights(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.net.parameters()).detach()


def describe(scenario: Scenario, recording: Recording) -> str:
    """The cell of a library."""
    taken, due = len(recording.weights) - 1, scenario.steps()
    steps = f"{taken} of {due} steps"
    if scenario.counts_steps:
        return ", ".join([steps, *leftovers(scenario, recording.batches)])
    size = error(scenario, recording)
    parts = [f"{size:.2f}" if size >= 1e-3 else f"{size:.0e}"]
    if taken != due:
        parts.append(steps)
    if not math.isfinite(recording.loss):
        parts.append(f"loss {recording.loss}")
    return ", ".join(parts)


def error(scenario: Scenario, recording: Recording) -> float:
    """The largest error of a step, relative to the largest entry of the gradient that it should have applied."""
    errors, stream = [], scenario.stream()
    weights, batches = itertools.pairwise(recording.weights), itertools.pairwise(recording.batches)
    for (before, after), (start, end) in zip(weights, batches, strict=True):
        expected = gradient(scenario, before, stream[start:end])
        errors.append((before - after - expected).abs().max() / expected.abs().max())
    return torch.stack(errors).max().item()  # unlike Python's, this `max` lets no NaN pass unseen


def gradient(scenario: Scenario, weights: Tensor, batches: Iterable[Batch]) -> Tensor:
    """The gradient of the one large batch made of `batches`, clipped where the scenario asks for it."""
    net = copy.deepcopy(scenario.module)
    nn.utils.vector_to_parameters(weights, net.parameters())
    x, target, *weight = (torch.cat(parts) for parts in zip(*batches, strict=True))
    cross_entropy(net(x), target, *weight).backward()
    if scenario.clip is not None:
        nn.utils.clip_grad_norm_(net.parameters(), scenario.clip)
    return nn.utils.parameters_to_vector(parameter.grad for parameter in net.parameters())


def leftovers(scenario: Scenario, batches: list[int]) -> list[str]:
    """What became of batches that filled no window by the end of an epoch; nothing where they were applied there.

    Args:
        scenario: What was trained.
        batches: How many batches had been seen at the start and after each step.
    """
    epoch = len(scenario.batches)
    crossing = sum(start // epoch != (end - 1) // epoch for start, end in itertools.pairwise(batches))
    lost = sum(len(x) for x, *_ in scenario.stream()[batches[-1] :])
    return [f"{crossing} over two epochs"] * bool(crossing) + [f"{lost} samples lost"] * bool(lost)


# The libraries: each trains on a scenario and returns what was recorded.


def with_kerastorch(scenario: Scenario) -> Recording:
    import kerastorch as kt

    recording = Recording(scenario.module)
    model = kt.Model(recording.net, backend="cpu").compile(recording.sgd(), "cross_entropy", clip=scenario.clip)
    history = model.fit(scenario.loader(), accumulate=WINDOW, epochs=scenario.epochs, shuffle=False, verbose=0)
    recording.loss = history.history["loss"][-1]
    return recording


def with_lightning(scenario: Scenario) -> Recording:
    import lightning as L

    recording = Recording(scenario.module)

    class Learner(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = recording.net

        def training_step(self, batch: Batch) -> Tensor:
            x, *target = batch
            loss = cross_entropy(self.net(x), *target)
            self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return recording.sgd()

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=scenario.epochs,
        accumulate_grad_batches=WINDOW,
        gradient_clip_val=scenario.clip,
        **quiet,
    )
    trainer.fit(Learner(), scenario.loader())
    recording.loss = trainer.callback_metrics["loss"].item()
    return recording


def with_keras(scenario: Scenario) -> Recording:
    import keras

    recording = Recording(scenario.module)

    class Wrapped(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.net = keras.layers.TorchModuleWrapper(recording.net)

        def call(self, x: Tensor) -> Tensor:
            return self.net(x)

    model = Wrapped()
    model.compile(
        keras.optimizers.SGD(1.0, gradient_accumulation_steps=WINDOW, global_clipnorm=scenario.clip),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=MASKED),
    )
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: recording.end_batch())
    history = model.fit(scenario.loader(), epochs=scenario.epochs, shuffle=False, callbacks=[watch], verbose=0)
    recording.loss = history.history["loss"][-1]
    return recording


def with_poutyne(scenario: Scenario) -> Recording:
    import poutyne

    recording = Recording(scenario.module)
    # Batches are pairs here, so weights travel with the targets.
    pairs = [(x, target if len(target) > 1 else target[0]) for x, *target in scenario.batches]
    model = poutyne.Model(
        recording.net,
        recording.sgd(),
        lambda output, target: cross_entropy(output, *(target if isinstance(target, (tuple, list)) else (target,))),
    )
    clipping = [] if scenario.clip is None else [poutyne.ClipNorm(recording.net.parameters(), scenario.clip)]
    logs = model.fit_generator(
        DataLoader(pairs, batch_size=None),
        epochs=scenario.epochs,
        batches_per_step=WINDOW,
        callbacks=clipping,
        verbose=False,
    )
    recording.loss = logs[-1]["loss"]
    return recording


def with_usual_loop(scenario: Scenario) -> Recording:
    recording = Recording(scenario.module)
    net, optimizer, loader = recording.net, recording.sgd(), scenario.loader()
    for _ in range(scenario.epochs):
        loss_sum = 0.0
        for index, (x, *target) in enumerate(loader, start=1):
            loss = cross_entropy(net(x), *target)
            (loss / WINDOW).backward()
            loss_sum += loss.item()
            if index % WINDOW == 0 or index == len(loader):
                if scenario.clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), scenario.clip)
                optimizer.step()
                optimizer.zero_grad()
    recording.loss = loss_sum / len(loader)
    return recording


LIBRARIES: dict[str, Callable[[Scenario], Recording]] = {
    "kerastorch": with_kerastorch,
    "lightning": with_lightning,
    "keras": with_keras,
    "poutyne": with_poutyne,
    "usual loop": with_usual_loop,
}


# The table.


def column(library: str, rows: list[Scenario]) -> list[str] | None:
    """The cells of a library, or `None` where it is not installed."""
    try:
        return [describe(row, LIBRARIES[library](row)) for row in rows]
    except ImportError as missing:
        print(f"{library} is left out: {missing}")
        return None


def version(library: str) -> str:
    return f"{library} {importlib.metadata.version(library)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--without", default="", help=f"some of {','.join(LIBRARIES)}, to leave out")
    left_out = set(filter(None, parser.parse_args().without.split(",")))
    if unknown := left_out - set(LIBRARIES):
        parser.error(f"unknown libraries {', '.join(sorted(unknown))}; known are {', '.join(LIBRARIES)}")
    warnings.filterwarnings("ignore")  # peers advise on workers of loaders
    torch.set_num_threads(1)

    rows = scenarios()
    columns = {library: column(library, rows) for library in LIBRARIES if library not in left_out}
    columns = {library: cells for library, cells in columns.items() if cells}
    print(tabulate({"": [row.name for row in rows], **columns}, "keys", "github", disable_numparse=True))
    print()
    for library in ("torch", *columns):
        if library != "usual loop":
            print(version(library))


if __name__ == "__main__":
    main()
