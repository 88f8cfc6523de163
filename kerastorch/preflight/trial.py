"""One step of training that leaves no trace, and what was seen of it: outputs, losses, gradients, errors, warnings.

The step is the model's own, with its data, precision, checks and overrides; but its optimizers stand still. What to
make of what was seen is left to the checks.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .. import loop, scopes
from ..callbacks.base import Callback, hooks_of
from ..losses import parts_of as of_losses
from ..losses import warn_of_final_softmax
from ..precision import LOW
from ..seeding import random_state_kept
from ..step import Recipe, Update, evaluation_step, forward, open_windows, optimizer_step
from ..structures import leaves, map_structure
from ..tracker import Tracker, copies
from ..untouched import parts_of, sources_of, untouched
from .layers import ROOT, Layers
from .outputs import kind_of
from .seen import Failure, Seen

# As large as the first scale of torch's GradScaler, so that fp16 gradients do not vanish here either.
LOSS_SCALE = 2.0**16


class Trial(Seen):
    """Runs one step of training, and one of validation, and puts down what it sees. Arguments as those of `Seen`."""

    @contextmanager
    def within(self) -> Iterator[None]:
        """Nothing that happens within is left behind."""
        whole = parts_of(self.model)
        attributes = [part for one in (self.source[0], self.validation_given) for part in sources_of(one)]
        if self.compiled is not None:  # optimizers stand still
            optimizers = [one for one in self.compiled._named.values() if isinstance(one, torch.optim.Optimizer)]
            whole += [optimizer.param_groups for optimizer in optimizers]
        with untouched(whole, attributes, device=self.model.backend.device):
            yield

    def run(self) -> None:
        """Goes through the stages; an error ends it, where later stages could not do without.

        Raises:
            ValueError: the data is a generator, which would not get its batch back.
        """
        with warnings.catch_warnings(record=True) as caught, _eagerly():
            warnings.simplefilter("always", UserWarning)
            self._run_stages()
        self.warnings = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]

    def _run_stages(self) -> None:
        self._attempt("callbacks", self._look_at_callbacks)
        if not self._open_both() or not self._attempt("optimizer", self._take_batch):
            return
        if self.compiled is None:
            self._attempt("step", self._forward_alone, self.layers)
            return
        if not self._attempt("step", self._train, self.layers):
            return
        self.is_trained = True
        if self.is_plain:
            self._attempt("evaluation", self._compare_alone, Layers(keeps_values=False))
        if self.validation is not None:
            self._attempt("validation_data", self._validate, Layers(keeps_values=False))

    def _attempt(self, stage: str, function: Callable, *arguments: Any) -> bool:
        """Whether a stage went through; its error is put down."""
        watch = next((one for one in arguments if isinstance(one, Layers)), Layers())
        try:
            function(*arguments)
        except Exception as error:  # the user's code may raise anything; all of it becomes a finding
            self.failures.append(Failure(stage, error, watch.innermost, watch.innermost_inputs))
            return False
        return True

    def _look_at_callbacks(self) -> None:
        hooks_of(self.callbacks)
        if self.compiled is not None:
            self.model._refuse_unfit(self.callbacks, self.is_validated)

    def _open_both(self) -> bool:
        """Opens the data; where that fails with validation data and works without, it was the validation data's."""
        if not self._attempt("data", self._open, (self.validation_given, self.split, None)):
            if not self.is_validated:
                return False
            failure = self.failures.pop()
            if not self._attempt("data", self._open, (None, 0.0, None)):
                return False
            self.failures.append(replace(failure, stage="validation_data"))
        for name, opened in (("data", self.training), ("validation_data", self.validation)):
            if opened is not None and not opened.repeats:
                raise ValueError(
                    f"{name} is a generator, which would miss the batch that check takes out of it. Give a callable "
                    f"that makes a new one, a list of batches, or one batch as (x, y)."
                )
        return True

    def _open(self, held_out: tuple) -> None:
        # Not held on the device: one batch is all that is needed there.
        reading = replace(self.model._reading(self.batch_size, shuffle=True), hold=list)
        callbacks = [] if self.failures else self.callbacks
        self.training, self.validation = self.model._open(self.source, reading, held_out, callbacks)

    def _take_batch(self) -> None:
        model = self.model
        if self.compiled is not None:
            self.training = model._with_optimizer(self.training)
        batches = self.training.batches(model.epochs_trained)
        fed = model.backend.feed(batches) if self.compiled is None else model._batches(batches)
        self.batch = next(iter(fed), None)
        if self.batch is None:
            raise ValueError("the data is empty: it gave no batch, expected at least one.")

    def _forward_alone(self, layers: Layers) -> None:
        module = self.module
        with layers.watching(module), scopes.computing(self.model), torch.no_grad():
            self._set_modes()
            forward(self.model._network(), self.batch[0])

    def _train(self, layers: Layers) -> None:
        """One step, as the model does it."""
        model, compiled = self.model, self.compiled
        compiled.gather(False)
        watch = _Watch(self)
        tracker = _Watched(self, model._training_tracker)
        recipe = Recipe(
            self.module,
            compiled.compute,
            compiled.logged_loss.shares,
            tracker,
            hooks_of([watch]),
            model.backend,
            evaluation_step,
            updates=compiled.updates,
            device=model.backend.device,
            frozen=model._frozen,
        )
        step = model._step(recipe)
        standing = {name: _Standing(one.optimizer, self._note_gradients) for name, one in compiled.updates.items()}
        recipe.updates = {name: Update(standing[name], one.parameters) for name, one in compiled.updates.items()}
        model.optimizer = standing[""] if compiled.is_single else standing
        if compiled.scaler is not None:
            recipe.backward, self.gradient_scale = _scaled_backward, LOSS_SCALE
        for loss in of_losses(compiled.loss):
            loss.has_warned = False  # what `compile` has warned of is found again
        warn_of_final_softmax(self.module, compiled.loss)
        model._expect(self.training, self.validation)
        layers.refuse_output = self._refuse_output if self.is_plain else None
        with layers.watching(self.module), scopes.training(model, recipe, step, self.training):
            before = self._set_modes()
            open_windows(recipe, 0)
            if step(recipe, self.batch):
                optimizer_step(recipe, recipe.updates[""])
            self._note_gradients()
            changed = [name for name, part in self.module.named_modules() if part.training != before.get(name)]
            self.modes_changed = [name or ROOT for name in changed]

    def _set_modes(self) -> dict[str, bool]:
        """The modes of a training step, by the names of the submodules."""
        loop.set_modes(SimpleNamespace(module=self.module, frozen=self.model._frozen))
        frozen = {id(part) for one in self.model._frozen for part in one.modules()}
        modes = {name: part.training for name, part in self.module.named_modules()}
        parts = dict(self.module.named_modules())
        self.left_in_eval = [name or ROOT for name, mode in modes.items() if not mode and id(parts[name]) not in frozen]
        return modes

    def _note_gradients(self) -> None:
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                self.gradients.setdefault(name, parameter.grad)

    def _refuse_output(self, output: Any) -> None:
        """What `bce` is given must be probabilities: on a GPU it would not raise, but end the process's use of it."""
        for _, loss, part, _ in self.outputs(output):
            if kind_of(loss) == "bce" and part.numel():
                low, high = (float(end) for end in torch.aminmax(part.detach().float()))
                if low < 0 or high > 1:
                    raise ValueError(
                        f"the outputs lie between {low:.3g} and {high:.3g}, but loss={loss.name!r} takes "
                        f"probabilities from 0 to 1. End the module in a Sigmoid, or give 'bce_with_logits'."
                    )

    @torch.no_grad()
    def _compare_alone(self, layers: Layers) -> None:
        """Whether the output for a sample changes with the others in its batch, in eval mode."""
        x, samples = self.batch[0], self.samples
        tensors = [leaf for leaf in leaves(x) if isinstance(leaf, Tensor)]
        norms = (part for part in self.module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
        if samples < 2 or any(not leaf.ndim or len(leaf) != samples for leaf in tensors):
            return
        if any(norm.running_mean is None for norm in norms):  # which are made to
            return
        last_alone = map_structure(lambda leaf: _repeated(leaf) if isinstance(leaf, Tensor) else leaf, x)
        with layers.watching(self.module), scopes.computing(self.model):
            self.module.eval()
            pairs = []
            for inputs in (x, last_alone):
                with random_state_kept():  # the same ones for both
                    pairs.append([*leaves(forward(self.compiled.network, inputs))])
        is_low = self.compiled.precision.autocast or self.compiled.precision.weights in LOW
        self.mixes_samples = any(_differ(a, b, samples, 0.05 if is_low else 1e-3) for a, b in zip(*pairs, strict=True))

    def _validate(self, layers: Layers) -> None:
        model, compiled = self.model, self.compiled
        tracker = _like(model._evaluation_tracker)
        evaluation = Recipe(
            self.module,
            compiled.compute_evaluated,
            compiled.logged_loss.shares,
            tracker,
            hooks_of(()),
            model.backend,
            evaluation_step,
            device=model.backend.device,
        )
        batches = model._batches(self.validation.batches(0), is_evaluated=True)
        self.validation_batch = next(iter(batches), None)
        if self.validation_batch is None:
            raise ValueError("the data is empty: it gave no batch, expected at least one.")
        with layers.watching(self.module), scopes.computing(model), scopes.shown(model, evaluation):
            self.validation_loss = loop.evaluate(evaluation, [self.validation_batch]).get("loss")


class _Standing:
    """Stands for an optimizer: it has its groups and its state, and steps nowhere."""

    def __init__(self, optimizer: torch.optim.Optimizer, note: Callable[[], None]) -> None:
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults
        self._note = note

    def step(self, closure: Callable | None = None) -> Any:
        result = None if closure is None else closure()
        self._note()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class _Watch(Callback):
    """Puts down the losses."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def on_before_backward(self, loss: Any) -> None:
        self.trial.losses.append(loss.detach())


class _Watched(Tracker):
    """A tracker of its own, with metrics of their own, that puts down what it is given and which metric fails."""

    def __init__(self, trial: Trial, like: Tracker) -> None:
        super().__init__(like.loss, copies(like.means + like.stateful), trial.model.backend)
        self.trial = trial

    def add(self, loss: Any, output: Any, target: Any, samples: int, weight: Any = None) -> None:
        if self.trial.output is None:
            self.trial.output = output
            self.trial.terms = dict(getattr(self.loss, "latest", {}))
        self.trial._attempt("metrics", super().add, loss, output, target, samples, weight)


def _like(tracker: Tracker) -> Tracker:
    """A tracker of the same loss, with metrics of its own."""
    return Tracker(tracker.loss, copies(tracker.means + tracker.stateful), tracker.ranks)


def _scaled_backward(loss: Tensor, retain_graph: bool | None = None) -> None:
    (loss * LOSS_SCALE).backward(retain_graph=retain_graph)


def _eagerly() -> AbstractContextManager:
    """Nothing is compiled meanwhile: that would take longer than all the rest."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _repeated(leaf: Tensor) -> Tensor:
    return leaf[-1:].expand_as(leaf).contiguous()


def _differ(together: Any, alone: Any, samples: int, tolerance: float) -> bool:
    """Whether the last of so many samples has another output: one that a recurrence reaches from those before it."""
    if not isinstance(together, Tensor) or not together.is_floating_point() or not together.ndim:
        return False
    is_of_samples = len(together) == samples and together.shape == alone.shape
    if not is_of_samples or together.shape[1:2] == (samples,):  # (samples, samples) compares them with each other
        return False
    a, b = together[-1].float(), alone[-1].float()
    return bool((a - b).abs().max() > tolerance * (a.abs().max() + 1e-6)) if a.numel() else False
