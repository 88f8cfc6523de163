"""A GAN of two small networks learns to write digits: two losses, two optimizers, one `train_step`.

Run: python examples/gan.py   (needs the extra "examples"; takes some ten seconds on one core)
"""

from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import softplus

import kerastorch as kt

kt.set_seed(0)
digits = (load_digits().data / 16.0).astype("float32")  # 1,797 images of 8x8 pixels
noise = np.random.default_rng(0).standard_normal((5000, 16), dtype="float32")


class Networks(nn.Module):
    def __init__(self):
        super().__init__()
        hidden = nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()
        self.generator = nn.Sequential(*hidden, nn.Linear(64, 64), nn.Sigmoid())
        hidden = nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(128, 64), nn.LeakyReLU(0.2)
        self.discriminator = nn.Sequential(*hidden, nn.Dropout(0.3), nn.Linear(64, 1))

    def forward(self, noise):
        return self.generator(noise)


class GAN(kt.Model):
    def train_step(self, batch):
        real, _ = batch
        fake = self.module(torch.randn(len(real), 16, device=real.device))
        judge = self.module.discriminator
        d_loss = softplus(-judge(real)).mean() + softplus(judge(fake.detach())).mean()
        self.backward(d_loss)
        self.optimizer_step("discriminator")
        g_loss = softplus(-judge(fake)).mean()
        self.backward(g_loss)
        self.optimizer_step("generator")
        return {"d_loss": d_loss, "g_loss": g_loss}


def distance(images):
    """Fréchet distance from the digits: both taken as normal distributions of 64 pixels."""
    (mean, cov), (real_mean, real_cov) = ((part.mean(0), np.cov(part.T)) for part in (images, digits))
    root = np.sqrt(np.linalg.eigvals(cov @ real_cov).astype(complex)).real.sum()
    return ((mean - real_mean) ** 2).sum() + np.trace(cov) + np.trace(real_cov) - 2 * root


model = GAN(Networks())
adam = partial(torch.optim.Adam, betas=(0.5, 0.999))
model.compile({"generator": adam, "discriminator": adam}, lr={"generator": 1e-3, "discriminator": 4e-3})
before = distance(model.predict(noise, verbose=0))
history = model.fit(digits, epochs=40, batch_size=64, verbose=0)
history.plot(path="gan.png")

after = distance(model.predict(noise, verbose=0))
unrelated = distance(np.random.default_rng(0).permuted(digits, axis=0))  # each pixel right, but not beside the others
print(f"distance from real digits: {before:.2f} untrained, {unrelated:.2f} pixel by pixel, {after:.2f} trained")
assert after < unrelated / 2, f"the distance is {after:.2f}, expected less than half of {unrelated:.2f}"
