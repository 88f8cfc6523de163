"""What was seen of a model on one batch, and the views on it that checks take: by output, by target, by array."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..arguments import as_pair
from ..data import Data
from ..losses import Loss, SumOfLosses
from ..structures import leaves, named_leaves
from ..tensors import array_of, grouped, is_arrays
from .layers import Layers


@dataclass(frozen=True)
class Failure:
    """An error that `fit` would raise.

    Attributes:
        stage: `"callbacks"`, `"data"`, `"optimizer"`, `"step"`, `"metrics"`, `"evaluation"` or `"validation_data"`.
        error: What was raised.
        where: The innermost layer that ran; "" where none did.
        got: Shapes of what that layer was given.
    """

    stage: str
    error: Exception
    where: str = ""
    got: str = ""


class Seen:
    """What was seen of one batch of training, and one of validation.

    Args:
        model: The `Model`.
        source: `(data, y, sample_weight)`, as in `fit`.
        batch_size: As in `fit`, and so are the others.
    Attributes:
        failures: Errors, in the order of the run.
        warnings: Texts of the warnings that were given.
        training, validation: The data, opened.
        batch: Inputs, targets and weights of the first batch.
        validation_batch: The same of the first validation batch.
        output: What loss and metrics were given as the output; `None` where nothing was measured.
        losses: Losses that a backward pass began with, on the device.
        terms: Losses of the outputs by their names, where there are several.
        gradients: Name of a parameter -> its gradient.
        gradient_scale: What all gradients are too large by.
        validation_loss: That of the first validation batch.
        layers: What was seen of the layers in the training step.
        left_in_eval: Submodules that `fit` could not put into train mode, by name.
        modes_changed: Submodules whose mode `forward` changed, by name.
        mixes_samples: Whether an output depends on other samples in its batch; `None` where nobody looked.
        is_trained: Whether the whole training step went through.
    """

    def __init__(
        self, model: Any, source: tuple, *, batch_size: int | None, callbacks: list, validation_data: Any, split: float
    ) -> None:
        self.model, self.compiled, self.module = model, model._compiled, model.module
        self.source = (_in_this_process(source[0]), *source[1:])
        self.batch_size, self.callbacks = batch_size, callbacks
        self.validation_given = _in_this_process(as_pair(validation_data))
        self.split = split if validation_data is None else 0.0
        self.is_validated = validation_data is not None or split > 0
        self.failures: list[Failure] = []
        self.warnings: list[str] = []
        self.training: Data | None = None
        self.validation: Data | None = None
        self.batch: tuple | None = None
        self.validation_batch: tuple | None = None
        self.output: Any = None
        self.losses: list[Tensor] = []
        self.terms: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.gradient_scale, self.validation_loss = 1.0, None
        self.layers = Layers()
        self.left_in_eval: list[str] = []
        self.modes_changed: list[str] = []
        self.mixes_samples: bool | None = None
        self.is_trained = False

    @property
    def is_plain(self) -> bool:
        """Whether output and loss are those of module and compiled loss."""
        is_overridden = self.overrides("train_step") or self.overrides("compute_loss")
        return self.compiled is not None and not is_overridden and not self.compiled.has_own_loss

    @property
    def is_loss_finite(self) -> bool:
        """Whether no loss was NaN or infinite."""
        return all(bool(torch.isfinite(loss).all()) for loss in self.losses)

    @property
    def is_clipped(self) -> bool:
        """Whether `compile` bounds the gradients."""
        return any(update.clip is not None for update in self.model.updates.values())

    @property
    def norm(self) -> float:
        """Norm of all gradients together."""
        values = (one.coalesce().values() if one.is_sparse else one for one in self.gradients.values())
        return math.hypot(*(float(one.detach().float().norm()) for one in values)) / self.gradient_scale

    def overrides(self, name: str) -> bool:
        """Whether a method of the model is the user's own."""
        return self.model._overrides(name)

    @property
    def samples(self) -> int:
        """Samples in the batch; 0 where it holds no tensor."""
        return next((len(leaf) for leaf in leaves(self.batch[0]) if isinstance(leaf, Tensor) and leaf.ndim), 0)

    def outputs(self, output: Any = None) -> Iterator[tuple[str, Loss, Tensor, Tensor]]:
        """Name, loss, output and target of each output of the batch; nothing where no loss compares them."""
        output = self.output if output is None else output
        for name, loss, key in self._parts() if self.batch is not None else ():
            pair = _at(output, key), _at(self.batch[1], key)
            if all(isinstance(one, Tensor) for one in pair):
                yield name, loss, *pair

    def targets(self) -> Iterator[tuple[str, Loss, Tensor]]:
        """Name, loss and training targets of each output: all of them, where they are in memory, else the batch's."""
        for name, loss, key in self._parts():
            known = (_at(one, key) for one in (self.training and self.training.targets, self.batch and self.batch[1]))
            if (first := next((one for one in known if isinstance(one, Tensor)), None)) is not None:
                yield name, loss, first

    def targets_in_memory(self) -> Iterator[tuple[str, Loss, Tensor, Tensor | None]]:
        """Name, loss, and all targets of training and validation, as far as they are in memory."""
        for name, loss, key in self._parts():
            pair = [_at(opened and opened.targets, key) for opened in (self.training, self.validation)]
            ours, theirs = (one if isinstance(one, Tensor) else None for one in pair)
            if ours is not None:
                yield name, loss, ours, theirs

    def arrays(self) -> Iterator[tuple[str, Any]]:
        """Name and array of all training data that was given as arrays."""
        data, y, weight = self.source
        if self.training is None or not is_arrays(data):
            return
        if y is None and isinstance(data, tuple) and 2 <= len(data) <= 3:  # as `open_data` reads it
            data, y, weight = (*data, weight)[:3]
        for name, part in (("x", data), ("y", y), ("sample_weight", weight)):
            if not isinstance(part, str):
                yield from ((path, array_of(leaf)) for path, leaf in named_leaves(grouped(part), name))

    def batch_at_hand(self) -> Iterator[tuple[str, Any]]:
        """Name and value of all that is in the batch."""
        for name, part in zip(("x", "y", "sample_weight"), self.batch or (), strict=False):
            yield from named_leaves(part, name)

    def data_at_hand(self) -> Iterator[tuple[str, Any]]:
        """All training data that was given as arrays in memory, and of other data the batch."""
        arrays = dict(self.arrays())
        in_memory = {name: array for name, array in arrays.items() if not isinstance(array, np.memmap)}
        is_all = arrays and len(in_memory) == len(arrays)
        yield from (in_memory if is_all else dict(self.batch_at_hand()) | in_memory).items()

    def _parts(self) -> list[tuple[str, Loss, Any]]:
        """Name of each output ("" of a single one), its loss, and its key in outputs and targets."""
        loss = self.compiled.loss if self.is_plain else None
        if isinstance(loss, SumOfLosses):
            return [(name, part, loss.keys[name]) for name, part in loss.parts.items()]
        return [] if loss is None else [("", loss, None)]


def _at(tree: Any, key: Any) -> Any:
    """The part of outputs or targets with a key; `None` where there is none, which the step refuses."""
    if key is None or tree is None:
        return tree
    has = tree if isinstance(tree, Mapping) else range(len(tree)) if isinstance(tree, (tuple, list)) else ()
    return tree[key] if key in has else None


def _in_this_process(data: Any) -> Any:
    """A loader over the same data that needs no worker processes, which take long to start; other data as it is."""
    is_plain = type(data) is DataLoader and data.worker_init_fn is None
    if not is_plain or not data.num_workers or isinstance(data.dataset, IterableDataset):
        return data
    if data.batch_sampler is None:
        order = {"batch_size": None, "sampler": data.sampler}
    elif data.batch_size is None:
        order = {"batch_sampler": data.batch_sampler}
    else:
        order = {"batch_size": data.batch_size, "sampler": data.sampler, "drop_last": data.drop_last}
    return DataLoader(data.dataset, collate_fn=data.collate_fn, generator=data.generator, **order)
