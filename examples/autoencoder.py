"""An autoencoder of two networks, each with an optimizer and a rate of its own, beside PCA.

Run: python examples/autoencoder.py   (needs the extra "examples"; takes some ten seconds on one core)
"""

from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import mse_loss

import kerastorch as kt

CODE = 8  # numbers that an image of 64 pixels becomes

kt.set_seed(0)
images = (load_digits().data / 16.0).astype("float32")
x_train, x_test = train_test_split(images, test_size=0.2, random_state=0)


def dense(*widths):
    pairs = zip(widths, widths[1:], strict=False)
    return [layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU())][:-1]


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(*dense(64, 128, 64, CODE))
        self.decoder = nn.Sequential(*dense(CODE, 64, 128, 64), nn.Sigmoid())

    def forward(self, x):
        return self.decoder(self.encoder(x))


class Reconstruction(kt.Model):
    def train_step(self, batch):
        x, _ = batch
        loss = mse_loss(self.module(x), x)
        self.backward(loss)  # one loss ...
        self.optimizer_step("encoder")  # ... two optimizers
        self.optimizer_step("decoder")
        self.log("loss", loss)


model = Reconstruction(Autoencoder())
model.compile({"encoder": "adamw", "decoder": "adamw"}, "mse", lr={"encoder": 2e-3, "decoder": 4e-3}, schedule="cosine")
history = model.fit(x_train, epochs=60, batch_size=64, verbose=0)
history.plot(path="autoencoder.png")

pca, error = PCA(CODE).fit(x_train), model.evaluate(x_test, x_test, verbose=0)
pca_error = ((pca.inverse_transform(pca.transform(x_test)) - x_test) ** 2).mean()
print(f"test error with {CODE} numbers an image: PCA {pca_error:.4f}, autoencoder {error:.4f}")
assert error < 0.75 * pca_error, f"the error is {error:.4f}, expected less than 3/4 of PCA's {pca_error:.4f}"
