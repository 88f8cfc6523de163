"""Model: Keras's verbs for any `torch.nn.Module`, what they remember, and the checks of their arguments.

No loop and no maths: `fit` goes on in `loop.fit`, a step in `step.forward_backward`, the data in `data.open_data`.
"""

from __future__ import annotations

import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.data import DataLoader

from . import backends, checkpoint, checks, folders, limits, loop, optimizers, preflight, scopes, tuning
from . import export as exporting
from . import losses as named_losses
from . import metrics as named_metrics
from . import precision as precisions
from .arguments import (
    as_list,
    as_pair,
    concatenated,
    length_of,
    returned,
    takes,
    targets_as_inputs,
    to_numpy,
    with_labels,
)
from .callbacks.base import hooks_of
from .callbacks.debugging import nan_finders
from .callbacks.messages import say
from .callbacks.progress import is_notebook, progress_for
from .compilation import Compiled
from .computation import Overridden
from .data import Data, Reading, first_batches, in_order, open_data, peek, split_tail, with_batches_of
from .history import History
from .launching import launch_verbs
from .microbatch import PiecewiseStep
from .overrides import OwnStep
from .passes import Passes
from .patterns import norms_inside, parameters_of
from .position import Position
from .precision import scaled_backward
from .resume import Run, find_saved, newest_saved
from .samples import generators_in
from .seeding import random_state_kept, seed_of_order
from .state import refuse_unlike, reshaped_of, restore, state_of
from .step import (
    Recipe,
    Update,
    closure_step,
    evaluation_step,
    forward,
    forward_backward,
    open_windows,
    optimizer_step,
    rate_of,
)
from .structures import join, leaves, map_structure, samples_in
from .summary import Summary, summarize
from .tbptt import TruncatedStep
from .tensors import is_arrays, is_numbers, to_tensor
from .tracker import Tracker, copies
from .tuning import BatchSize, LearningRate
from .writing import failure_of_first


class Model:
    """Gives a module `compile`, `fit`, `evaluate`, `predict` and `summary`.

    Args:
        module: Any `torch.nn.Module`. It is moved to the backend's device and stays usable on its own.
        backend: `"auto"` (the best device there is), `"cpu"`, `"gpu"`, a device such as `"cuda:1"`, or an instance from
            `kerastorch.backends`. Default: `"auto"`.
    Attributes:
        module: The module.
        history: The `History` of the last `fit`; `None` before the first.
        optimizer: The torch optimizer, or a dict of them where `compile` was given several; `None` before `compile`,
            and before a lazy module has seen its first batch.
        stop_training: Set to `True`, by a callback say, to end the run after the running batch.
        stop_epoch: Set to `True`, by a callback say, to end the epoch after the running batch.
        epochs_trained: Epochs finished over all calls of `fit`: the order of the next epoch depends on it.
        batch_size: What `find_batch_size` found, for every `fit` that is given none; `None` = 32.
    Example:
        >>> model = Model(nn.Linear(4, 1), backend="cpu").compile("sgd", "mse")
        >>> history = model.fit(torch.rand(64, 4), torch.rand(64, 1), epochs=2, verbose=0)
        >>> len(history.history["loss"])
        2
    """

    def __init__(self, module: nn.Module, *, backend: Any = "auto") -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module is a {type(module).__name__}, expected a torch.nn.Module.")
        self.backend = backends.get(backend)
        self.module = self.backend.place(module)
        self._history: History | None = None
        self.optimizer: torch.optim.Optimizer | dict[str, torch.optim.Optimizer] | None = None
        self.stop_training = self.stop_epoch = False
        self.epochs_trained = 0
        self._compiled: Compiled | None = None
        self._frozen: list[nn.Module] = []
        self._own_dtypes: dict[str, torch.dtype] | None = None  # the module's, where a precision has changed them
        self._training_tracker: Tracker | None = None
        self._evaluation_tracker: Tracker | None = None
        self._running: Recipe | None = None
        self._own_step: OwnStep | None = None
        self._compile_options: dict[str, Any] = {}
        self._steps_of_ranks = 0  # which `fit` has started
        self._training_data: Data | None = None
        self._training: Recipe | None = None
        self._dry_run_folder: Path | None = None
        self._finds_lr = False  # when `fit` is called next
        self.batch_size: BatchSize | None = None
        self._sized_loader: Callable[[], Any] = _nobody  # the one that `batch_size` was found for
        self._live_run: Run | None = None
        self._ended_run: dict[str, Any] | None = None
        if self.backend.starts_ranks:
            launch_verbs(self)

    @property
    def history(self) -> History | None:
        """The `History` of the last `fit`, or of the running one; `None` before the first."""
        return self._history

    @history.setter
    def history(self, history: Any) -> None:
        if history is None or isinstance(history, History):  # Keras's would put itself there
            self._history = history

    # Choosing.

    def compile(
        self,
        optimizer: Any = "adam",
        loss: Any = None,
        *,
        metrics: Any = (),
        weighted_metrics: Any = (),
        precision: str | int = "32",
        clip: float | tuple[str, float] | None = None,
        lr: float | str | Mapping[str, float] | None = None,
        schedule: Any = None,
        jit: bool | str = False,
        tbptt_steps: int | None = None,
    ) -> Model:
        """Chooses how the module is trained and measured; a second call starts over with a new optimizer.

        Args:
            optimizer: Name of any class in `torch.optim` (any case), a class or `functools.partial` of one, an
                instance, or a callable `params -> Optimizer`; a dict of these by the names of submodules, with
                `train_step` overridden. Default: `"adam"`.
            loss: A torch name (`"cross_entropy"`, `"mse"`, `"bce_with_logits"`, ...) or Keras's
                (`"sparse_categorical_crossentropy"`, ...), always on logits; an `nn.Module`; a callable
                `(output, target) -> tensor`; for several outputs a dict or list of these, each optionally
                `(loss, weight)`. `None` = the module returns its own loss. Default: `None`.
            metrics: Names, callables `(output, target) -> scalar or per-sample tensor`, torchmetrics objects; for
                several outputs a dict or list of lists of these. They are not weighted. Default: none.
            weighted_metrics: More of these, but no torchmetrics, weighted by `sample_weight` and `class_weight`, as in
                Keras. Default: none.
            precision: `"32"`, `"tf32"`, `"16"` and `"bf16"` (autocast), `"16-true"`, `"bf16-true"`, `"64"` (the
                module is cast). Default: `"32"`, the module's own dtype.
            clip: Bound of the gradients' global norm before each step, or `("value", bound)`. Default: none.
            lr: Learning rate, or `{pattern of parameter names: rate}`, the first that fits deciding; for several
                optimizers also by their names. `"auto"` = what `find_lr` finds when `fit` is called next. `None` = the
                optimizer's own default.
            schedule: `"one_cycle"`, `"cosine"`, `"linear"`, `"triangular"`, ..., with options from
                `kerastorch.schedules`: moves the rate each step over the run's length; a callable `optimizer ->
                LRScheduler` is stepped each epoch, `("step", callable)` each step. Default: none.
            jit: `True` or a mode of `torch.compile` compiles module and loss. Default: `False`.
            tbptt_steps: Truncated backpropagation through time: sequences are cut along dim 1 into pieces so long, with
                an optimizer step each; the module is `(x, state) -> (output, state)`. Default: not cut.
        Returns:
            The model, so that `kt.Model(net).compile("adam", "mse").fit(x, y)` is one line.
        Raises:
            ValueError: an unknown name, an impossible rate, an optimizer of other parameters, several optimizers
                without a `train_step`, a precision that the device cannot do.
            TypeError: an argument of a type not named above.
        """
        checks.refuse_nonpositive(tbptt_steps=tbptt_steps)
        options = {
            "optimizer": optimizer,
            "loss": loss,
            "precision": precision,
            "clip": clip,
            "lr": None if lr == "auto" else lr,
            "schedule": schedule,
            "jit": jit,
            "tbptt_steps": tbptt_steps,
        }
        compiled = Compiled(self.module, self.backend, **options)
        checks.refuse_combinations(compiled, jit, self._overrides("train_step"), self._overrides("compute_loss"))
        self._refuse_unable(compiled, jit)
        chosen_metrics = named_metrics.get(metrics, None if compiled.has_own_loss else compiled.loss, weighted_metrics)
        # A lazy module has no parameters yet, and a module without any can still be evaluated.
        waits = _is_lazy(self.module) or not any(True for _ in self.module.parameters())
        if self._compiled is not None:
            self._compiled.leave(compiled.given)
        self._cast(compiled.precision)
        try:
            if not waits:
                compiled.make_updates()
        except BaseException:
            self._cast(precisions.KNOWN["32"] if self._compiled is None else self._compiled.precision)
            raise
        own_loss = self._own_loss if self._overrides("compute_loss") else None
        compiled.settle(own_loss, bool(chosen_metrics))
        self._compiled, self.optimizer = compiled, compiled.optimizer
        self._compile_options = options | {"metrics": metrics, "weighted_metrics": weighted_metrics}
        self._finds_lr = isinstance(lr, str) and lr == "auto"
        # Two states: validation never counts into the running epoch. The user's own objects hold the evaluation's.
        self._training_tracker = Tracker(compiled.logged_loss, copies(chosen_metrics), self.backend)
        self._evaluation_tracker = Tracker(compiled.logged_loss, chosen_metrics, self.backend)
        named_losses.warn_of_final_softmax(self.module, compiled.loss)
        return self

    def freeze(self, *patterns: str) -> Model:
        """Stops the training of parameters: they keep their values, and frozen BatchNorm its statistics.

        Args:
            patterns: Names of parameters or submodules, or globs of them: `"backbone"`, `"layers.*.bias"`.
        Returns:
            The model.
        Raises:
            ValueError: a pattern that fits nothing.
        Example:
            >>> model = Model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1)), backend="cpu").freeze("0")
            >>> [name for name, parameter in model.module.named_parameters() if parameter.requires_grad]
            ['1.weight', '1.bias']
        """
        for parameter in parameters_of(self.module, patterns, "freeze").values():
            parameter.requires_grad_(False)
        frozen = [parameter for parameter in self.module.parameters() if not parameter.requires_grad]
        found = norms_inside(self.module, frozen, patterns)
        self._frozen += [part for part in found if part not in self._frozen]
        return self

    def unfreeze(self, *patterns: str) -> Model:
        """Trains parameters (again); arguments and result as in `freeze`.

        An optimizer that `compile` made has them already.

        Raises:
            ValueError: a pattern that fits nothing, or parameters that an optimizer of your own does not have.
        """
        found = parameters_of(self.module, patterns, "unfreeze").values()
        trained = {id(one) for update in self.updates.values() for one in update.in_groups()}
        if trained and not all(id(parameter) in trained for parameter in found):
            raise ValueError(
                f"unfreeze was given {', '.join(map(repr, patterns))}, but the optimizer was made without these "
                f"parameters and would never train them. Make it from all of module.parameters()."
            )
        for parameter in found:
            parameter.requires_grad_(True)
        thawed = norms_inside(self.module, found, patterns)
        self._frozen[:] = [part for part in self._frozen if not any(part is other for other in thawed)]
        return self

    # Training.

    def fit(
        self,
        data: Any,
        y: Any = None,
        *,
        epochs: int | None = None,
        batch_size: int | str | None = None,
        accumulate: int | Mapping[int, int] = 1,
        microbatch: int | str | None = None,
        callbacks: Any = (),
        validation_data: Any = None,
        validation_split: float = 0.0,
        validation_freq: int | float | str | Iterable[int] = 1,
        shuffle: bool = True,
        class_weight: Mapping[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | float | None = None,
        validation_steps: int | float | None = None,
        validation_batch_size: int | None = None,
        min_epochs: int | None = None,
        min_steps: int | None = None,
        max_steps: int | None = None,
        max_time: float | str | timedelta | Mapping[str, float] | None = None,
        sanity_steps: int = 0,
        overfit_batches: int | float = 0,
        dry_run: bool | int = False,
        resume: str | os.PathLike | bool | None = None,
        verbose: int | str = "auto",
    ) -> History:
        """Trains the module; a second call goes on where the first ended.

        Args:
            data: Arrays (numpy, torch, pandas, lists, nested tuples and dicts of them), `(x, y[, weight])`, a
                `Dataset`, `IterableDataset`, `DataLoader`, Hugging Face dataset, an iterable of batches, or a callable
                that returns one of these and is called anew for each epoch.
            y: Targets of arrays, shape (samples, ...); or the name of the target's column where samples are mappings.
            epochs: Number of the epoch to end before, as in Keras: with `initial_epoch=2`, `epochs=5` trains three.
                `None` = 1, or as many as `max_steps` and `max_time` take.
            batch_size: Samples in a batch of arrays or a dataset; `"auto"` = what `find_batch_size` finds now, or found
                for the run that goes on. `None` = what it has found before, else 32, beside `steps_per_epoch` too
                (Keras divides the samples by the steps there). Loaders bring their own, but for one that
                `find_batch_size` was given.
            accumulate: Batches for each optimizer step, whose gradient is that of one large batch; or
                `{epoch: batches}`, from that epoch on, 0-based: `{0: 8, 4: 4}`.
            microbatch: Samples that fit into memory at once: batches go through in pieces of so many, with the same
                result (but for BatchNorm, which sees the pieces); `"auto"` = halve on out-of-memory. `None` = whole.
            callbacks: `Callback`s, or Keras's.
            validation_data: Any form that `data` may have. Default: none.
            validation_split: Share of the samples cut off the end, before shuffling, to validate on.
            validation_freq: Validate after every so many epochs, or after the epochs in a list, counted from 1; within
                epochs after a fraction of one (`0.25`), or after training batches, counted on across epochs
                (`"100 steps"`).
            shuffle: Whether each epoch has a new order (arrays and datasets; loaders keep theirs).
            class_weight: `{class index: weight}`, for the loss of training.
            sample_weight: Weights of arrays, shape (samples,): the loss is `sum(weight * loss) / samples`.
            initial_epoch: Number of the first epoch, 0-based.
            steps_per_epoch: Batches in an epoch; the next one goes on in the data where it ended. A fraction: that part
                of each pass, in its order. `None` = one pass.
            validation_steps: Batches of a validation, or a fraction of those there are; 0 = none. `None` = all.
            validation_batch_size: As `batch_size`, for validation; `None` = `batch_size`.
            min_epochs, min_steps: Epochs and optimizer steps before which no `stop_training` (`EarlyStopping`) ends it.
            max_steps: Optimizer steps to end after, in the middle of an epoch too. A batch is finished.
            max_time: Time to end after: seconds, `"DD:HH:MM:SS"`, a `timedelta` or a dict of its keywords. The running
                batch is finished, and the epoch validated.
            sanity_steps: Batches to validate on before training, to find mistakes early; nothing of it is kept. -1 =
                all.
            overfit_batches: So many batches, or that fraction of them, to train and validate on, always the same first
                ones, unshuffled: a model that is right can learn them by heart. 0 = all the data.
            dry_run: `True` or a number of batches: one epoch of so many, the validation, all callbacks and saving and
                loading are tried; the model is afterwards as it was, and no file is left.
            resume: File to go on from, as `save` or a `ModelCheckpoint` wrote it; `True` = the newest of the files of
                this run's `ModelCheckpoint` or `BackupAndRestore` by their time, where there is one; `None` = that of
                a `BackupAndRestore` alone; `False` = none. The run ends as if it had never ended, bit for bit on the
                CPU, from within an epoch too. Give all else as the run was given that was saved; `epochs` may be more.
            verbose: 0 = silent, 1 = a live line, 2 = a line for each epoch, `"auto"` = 1 on a terminal, else 2.
        Returns:
            The `History`, also in `model.history`.
        Raises:
            RuntimeError: `compile` was not called.
            ValueError, TypeError: an argument or the data is not as above; the module is as it was before.
        Source: semantics of `keras.Model.fit`.
        """
        self._refuse_uncompiled("fit")
        bounds = limits.limits(epochs, initial_epoch, min_epochs, min_steps, max_steps, max_time, dry_run)
        checks.refuse_no_batch_size(batch_size, validation_batch_size)
        checks.refuse_no_split(validation_split)
        checks.refuse_class_weight(class_weight)
        checks.refuse_accumulation(accumulate, microbatch, self._compiled.tbptt_steps, self._overrides("train_step"))
        checks.refuse_halving(microbatch, self.backend)
        limits.refuse_no_amounts(steps_per_epoch, validation_steps, sanity_steps, overfit_batches, dry_run)
        checks.refuse_resumed_dry_run(resume, dry_run)
        source, callbacks = (data, y, sample_weight), as_list(callbacks)

        split = 0.0 if validation_data is not None else validation_split
        how = {"accumulate": accumulate, "microbatch": microbatch, "class_weight": class_weight, "shuffle": shuffle}
        source, batch_size = self._found(source, batch_size, split, resume, callbacks, dry_run, verbose, **how)
        reading = self._reading(batch_size, self.batch_size, shuffle=shuffle, class_weight=class_weight)
        held_out = as_pair(validation_data), validation_split, validation_batch_size
        opened, validated = self._open(source, reading, held_out, callbacks, overfit_batches)
        taken = limits.portion("steps_per_epoch", steps_per_epoch, opened.steps)
        when = limits.frequency(validation_freq, taken.batches)
        validated = None if validation_steps == 0 else validated
        checked = validated and limits.portion("validation_steps", validation_steps, validated.steps)
        checks.refuse_second_pass(validated, checked, when.is_repeated_in(bounds))
        if dry_run:
            taken, when = taken.at_most(dry_run, opened.steps), limits.Frequency()
            checked = checked and checked.at_most(dry_run, validated.steps)

        params = {"verbose": self._shown(verbose), "epochs": bounds.epochs, "steps": taken.batches}
        opened = self._with_optimizer(opened)
        hooks = self._hooks(callbacks, params)
        self._refuse_unfit(callbacks, validated is not None)
        training = self._training_recipe(self._training_tracker, hooks, accumulate, taken.batches, microbatch)
        step = self._step(training, accumulate, microbatch)
        whole = taken.batches == opened.steps and not overfit_batches
        hints = preflight.first_batch_hints(training, whole and preflight.last_batch_size(source[0], batch_size, split))
        self._expect(opened, validated)
        with scopes.no_trace(self, dry_run, opened.generators), scopes.training(self, training, step, opened), hints:
            validation = validated and self._validation(validated, checked.batches, when, hooks, sanity_steps)
            self._begin_schedules(training, self._pieces_in(opened, taken.batches), accumulate, bounds)
            self.history, self.stop_training, self._callbacks = History(params), False, callbacks
            self.epochs_trained = max(self.epochs_trained, initial_epoch)
            run = self._begin_run(training, step, opened, taken, validated, initial_epoch)
            saved = find_saved(resume, callbacks, run)
            options = {"validation": validation, "step": self.backend.alone(step), "limits": bounds}
            options |= {"resume": saved and partial(run.go_on, *saved), "steps_per_epoch": taken.asked_for}
            return loop.fit(self, training, run.passes.epoch, self.history, run.position, **options)

    def train_on_batch(
        self,
        x: Any,
        y: Any = None,
        *,
        sample_weight: Any = None,
        class_weight: Mapping[int, float] | None = None,
        return_dict: bool = False,
    ) -> float | list | dict[str, Any]:
        """One optimizer step on one batch.

        Args:
            x: Inputs, first dim samples; a tuple is spread as positional arguments, a dict as keywords.
            y: Targets.
            sample_weight: Weights, shape (samples,).
            class_weight: `{class index: weight}`.
            return_dict: Whether to return `{name: value}`. Default: `False`.
        Returns:
            Loss and metrics of this batch alone, before the update: a float, a list if there are metrics, or a dict.
        Raises:
            RuntimeError: `compile` was not called.
            ValueError, TypeError: the data is not as above; the module is as it was before.
        """
        self._refuse_uncompiled("train_on_batch")
        checks.refuse_class_weight(class_weight)
        reading = self._reading(length_of(x), class_weight=class_weight)
        batch = self._with_optimizer(open_data((x, y), None, sample_weight, reading))
        training = self._training_recipe(self._evaluation_tracker, NO_HOOKS, accumulate=1, batches=1)
        step = self._step(training)
        self._evaluation_tracker.reset()
        self._expect(batch)
        for update in self._compiled.updates.values():
            if update.schedule is not None and not update.schedule.has_begun:
                update.schedule.begin(None)
        with scopes.training(self, training, step, batch):
            loop.set_modes(training)
            open_windows(training, 0)
            if self.backend.alone(step)(training, next(self._batches(batch.batches(0)))):
                optimizer_step(training, training.updates[""])
        return returned(self._evaluation_tracker.result(), return_dict)

    # Choosing by trying.

    def _found(
        self,
        source: tuple,
        batch_size: Any,
        split_off: float,
        resume: Any,
        callbacks: list[Any],
        dry_run: Any,
        verbose: Any,
        *,
        shuffle: bool,
        **options: Any,
    ) -> tuple[tuple, int | None]:
        """Before a `fit`: its data and batch size, once it is found what it, or `compile`, was asked to find."""
        finds_size, batch_size = batch_size == "auto", None if batch_size == "auto" else batch_size
        if (finds_size or self._finds_lr) and not dry_run:
            data, y, weight = split_tail(*source, split_off)[0] if split_off else source
            for saving in (one for one in callbacks if hasattr(one, "backups") or hasattr(one, "saved_files")):
                saving.set_model(self)  # by which it knows its files
            saved = newest_saved(resume, callbacks, self.backend.collect)
            self._finds_lr &= saved is None  # else the rate is that of the run that goes on, and the size, too
            before = saved and (saved[0].get("run") or {}).get("batch_size")
            tell = say if verbose else lambda title: None
            if finds_size:
                search = partial(self.find_batch_size, data, y, sample_weight=weight, **options)
                size = tuning.known_size(self.backend, before) if before else search()
                self._take_size(size, source[0])
                tell(size.title)
            if self._finds_lr:
                data = self._sized(data, source[0])
                found = self.find_lr(data, y, batch_size=batch_size, sample_weight=weight, shuffle=shuffle, **options)
                for one in found.values() if isinstance(found, dict) else [found]:
                    tell(one.title)
        return (self._sized(source[0]), *source[1:]), batch_size

    def _take_size(self, size: BatchSize, data: Any) -> None:
        """From now on each `fit` that is given none takes this batch size; of loaders, with this one alone."""
        self.batch_size, self._sized_loader = size, weakref.ref(data) if isinstance(data, DataLoader) else _nobody

    def _sized(self, data: Any, whole: Any = None) -> Any:
        """The loader that `find_batch_size` was given, or a part of it, with the size it found; else as it is."""
        is_it = isinstance(data, DataLoader) and (data if whole is None else whole) is self._sized_loader()
        return with_batches_of(data, self.batch_size) if is_it and self.batch_size is not None else data

    def find_batch_size(
        self,
        data: Any,
        y: Any = None,
        *,
        mode: str = "predict",
        steps_per_trial: int = 3,
        max_trials: int = 25,
        init: int = 2,
        margin: float = 0.05,
        memory: int | str | None = None,
        apply: bool = True,
        sample_weight: Any = None,
        class_weight: Mapping[int, float] | None = None,
        accumulate: int | Mapping[int, int] = 1,
        microbatch: int | str | None = None,
    ) -> BatchSize:
        """The largest batch size that fits into memory, by trying real steps of which nothing is left.

        A trial is a short `fit`, as compiled, and a validation. Several processes each try their part, and the size
        fits where it fits all of them. Afterwards weights, optimizers, random numbers and data are as they were.

        Args:
            data: As in `fit`, with `y`; but no batches made already. A `DataLoader` is made anew with other sizes.
            mode: `"predict"` = a forecast, made without running anything, that a few trials confirm; `"power"` =
                doubled until it does not fit; `"binsearch"` = then halved in between. Default: `"predict"`.
            steps_per_trial: Optimizer steps in a trial. Default: 3.
            max_trials: Trials at most. Default: 25.
            init: Size to begin with, where there is no forecast; in several processes twice their number at least, as
                normalizations refuse a single sample. Default: 2.
            margin: How near to the largest is near enough, as a part of it. Default: 0.05.
            memory: What training may take in each process beyond what it has now: bytes, or `"2GB"`. `None` = what is
                free; on the CPU less a tenth, and shared by the processes of a machine. Nothing is tried there that is
                expected to take more, since running out of memory would end the process.
            apply: Whether each `fit` that is given no `batch_size` takes it from now on, also with this `DataLoader`.
                Default: `True`.
            sample_weight, class_weight, accumulate, microbatch: As in the `fit` that is to follow.
        Returns:
            A `BatchSize`: the global size as an int, with `.per_rank`, `.trials`, `.throughput_best` and `.plot()`; its
            `str` is a table.
        Raises:
            RuntimeError: `compile` was not called; or what `fit` raises, unless it is about memory.
            torch.OutOfMemoryError: not even one sample fits.
            ValueError, TypeError: an argument is not as above, or data whose batches cannot be made anew.
        Example:
            >>> model = Model(nn.Linear(4, 1), backend="cpu").compile("sgd", "mse")
            >>> int(model.find_batch_size(torch.rand(64, 4), torch.rand(64, 1)))  # all there are
            64
        """
        self._refuse_uncompiled("find_batch_size")
        options = {"sample_weight": sample_weight, "class_weight": class_weight}
        options |= {"accumulate": accumulate, "microbatch": microbatch}
        search = {"mode": mode, "steps_per_trial": steps_per_trial, "max_trials": max_trials, "init": init}
        found = tuning.find_batch_size(self, data, y, margin=margin, memory=memory, **search, **options)
        if apply:
            self._take_size(found, data)
        return found

    def find_lr(
        self,
        data: Any,
        y: Any = None,
        *,
        min_lr: float = 1e-7,
        max_lr: float = 10,
        steps: int = 100,
        mode: str = "exponential",
        smoothing: float = 0.98,
        stop_factor: float | None = 4,
        optimizer: str | None = None,
        confirm: bool | int = True,
        apply: bool = True,
        batch_size: int | None = None,
        sample_weight: Any = None,
        class_weight: Mapping[int, float] | None = None,
        accumulate: int | Mapping[int, int] = 1,
        microbatch: int | str | None = None,
        shuffle: bool = True,
    ) -> LearningRate | dict[str, LearningRate]:
        """A good learning rate: a range test of real steps, and short runs that confirm what its curve suggests.

        All of it is as compiled, but without the schedule; nothing of it is left. Parameter groups keep their ratios,
        and rates are those of the first.

        Args:
            data: As in `fit`, with `y`; but no generator. It is gone through again where it is shorter than the test.
            min_lr, max_lr: First and last rate of the test, and the bounds of the answer. Default: 1e-7 and 10.
            steps: Optimizer steps of the test, each at a higher rate. Default: 100.
            mode: `"exponential"` = in equal ratios, `"linear"` = in equal steps. Default: `"exponential"`.
            smoothing: Weight of what was before in the moving average of losses. Default: 0.98.
            stop_factor: The test ends where the smoothed loss is so many times its lowest; `None` = at `max_lr`.
                Default: 4.
            optimizer: Of several, the one to find a rate for, while the others keep theirs. `None` = all in turn.
            confirm: Whether up to 11 rates are tried, beginning with what the curve suggests, in runs of 100 steps or
                an epoch each from where the model is now; or how many steps. Not with several optimizers, whose losses
                do not tell which rate is better. Default: `True`.
            apply: Whether the optimizer gets the rate, where there is an answer. Default: `True`.
            batch_size, sample_weight, class_weight, accumulate, microbatch, shuffle: As in the `fit` that is to follow.
        Returns:
            A `LearningRate`, with `.lr`, `.lrs`, `.losses`, `.smoothed`, `.suggestion(method)`, `.plot()`; its `str` is
            a table. A dict of them by the names of optimizers where several were asked for.
        Raises:
            RuntimeError: `compile` was not called; or what `fit` raises.
            ValueError, TypeError: an argument or the data is not as above.
        Example:
            >>> model = Model(nn.Linear(4, 1), backend="cpu").compile("sgd", "mse")
            >>> x = torch.rand(256, 4)
            >>> found = model.find_lr(x, x.sum(1, keepdim=True))
            >>> model.optimizer.param_groups[0]["lr"] == found.lr
            True

        Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3.
        """
        self._refuse_uncompiled("find_lr")
        checks.refuse_nonpositive(batch_size=batch_size)
        data = self._sized(data)
        if self.optimizer is None:  # it gets a rate, so that it must be there
            self._with_optimizer(open_data(data, y, sample_weight, self._reading(batch_size)))
        options = {"batch_size": batch_size, "sample_weight": sample_weight, "class_weight": class_weight}
        options |= {"accumulate": accumulate, "microbatch": microbatch, "shuffle": shuffle}
        sweep = {"min_lr": min_lr, "max_lr": max_lr, "steps": steps, "mode": mode, "smoothing": smoothing}
        sweep |= {"stop_factor": stop_factor, "optimizer": optimizer, "confirm": confirm}
        found = tuning.find_lr(self, data, y, **sweep, **options)
        self._finds_lr &= not apply
        for one in found.values() if isinstance(found, dict) else [found]:
            if apply and one.lr is None:
                warnings.warn(
                    f"find_lr has no answer: {one.refuted or one.reason}. The rate stays as it was.", stacklevel=2
                )
            elif apply:
                tuning.apply_rate(self.updates[one.optimizer], one.lr)
        return found

    # Measuring.

    def evaluate(
        self,
        data: Any,
        y: Any = None,
        *,
        batch_size: int | None = None,
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: Any = (),
        return_dict: bool = False,
        verbose: int | str = "auto",
    ) -> float | list | dict[str, Any]:
        """Loss and metrics over the data, in eval mode and without gradients.

        Args:
            data: As in `fit`, with `y` and `sample_weight`.
            batch_size: Samples in a batch of arrays or a dataset; `None` = 32, or more where samples are small.
            steps: Batches to evaluate; `None` = all.
            callbacks: `Callback`s, or Keras's.
            return_dict: Whether to return `{name: value}`. Default: `False`.
            verbose: As in `fit`.
        Returns:
            The loss as a float, `[loss, *metrics]` if there are metrics, or a dict.
        Raises:
            RuntimeError: `compile` was not called.
            ValueError, TypeError: an argument or the data is not as above.
        """
        self._refuse_uncompiled("evaluate")
        checks.refuse_nonpositive(batch_size=batch_size, steps=steps)
        callbacks = as_list(callbacks)
        may_enlarge = steps is None and not _hears_batches(callbacks, "test")
        opened = open_data(data, y, sample_weight, self._reading(batch_size, may_enlarge=may_enlarge))
        params = {"verbose": self._shown(verbose), "epochs": 1, "steps": steps or opened.steps}
        hooks = self._hooks(callbacks, params)
        self._expect(opened)
        if self.backend.world > 1:
            self._refuse_other_ranks("evaluate", data=_fingerprint(opened), steps=steps)
        evaluation = self._recipe(self._evaluation_tracker, hooks)
        running = self.backend.running(self.module)
        with running, scopes.computing(self), scopes.shown(self, evaluation), loop.announced_errors(hooks):
            logs = loop.evaluate(evaluation, self._batches(islice(opened.batches(0), steps), is_evaluated=True))
        return returned(logs, return_dict)

    def test_on_batch(
        self, x: Any, y: Any = None, *, sample_weight: Any = None, return_dict: bool = False
    ) -> float | list | dict[str, Any]:
        """Loss and metrics of one batch, in eval mode; arguments and result as in `train_on_batch`."""
        self._refuse_uncompiled("test_on_batch")
        batch = (x, y) if sample_weight is None else (x, y, sample_weight)
        return self.evaluate(batch, batch_size=length_of(x), return_dict=return_dict, verbose=0)

    def predict(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        steps: int | None = None,
        callbacks: Any = (),
        verbose: int | str = "auto",
    ) -> Any:
        """What the module returns for the data, in eval mode and without gradients.

        Args:
            data: As in `fit`; targets and weights in it are left aside. A tuple of arrays is several inputs where the
                module takes as many, else `(x, y[, weight])`.
            batch_size: Samples in a batch of arrays or a dataset; `None` = 32, or more where samples are small.
            steps: Batches to predict; `None` = all.
            callbacks: `Callback`s, or Keras's.
            verbose: As in `fit`.
        Returns:
            The outputs in the order of the inputs and in the structure the module returns: numpy arrays where the
            inputs are numpy, pandas or lists, else tensors on the CPU. `None` where a callback takes them over.
        Raises:
            ValueError, TypeError: an argument or the data is not as above.
        """
        checks.refuse_nonpositive(batch_size=batch_size, steps=steps)
        callbacks = as_list(callbacks)
        may_enlarge = steps is None and not _hears_batches(callbacks, "predict")
        wants_numpy = is_arrays(data) and not any(isinstance(leaf, Tensor) for leaf in leaves(data))
        opened = open_data(self._inputs(data), None, None, self._reading(batch_size, may_enlarge=may_enlarge))
        params = {"verbose": self._shown(verbose), "epochs": 1, "steps": steps or opened.steps}
        hooks = self._hooks(callbacks, params)
        if self.backend.world > 1:
            self._refuse_other_ranks("predict", data=_fingerprint(opened, data), steps=steps)
        with self.backend.running(self.module), scopes.computing(self), loop.announced_errors(hooks):
            batches = self.backend.feed(islice(opened.batches(0), steps))
            keeps_outputs = not any(getattr(callback, "takes_outputs", False) for callback in callbacks)
            network = self.backend.alone(self.backend.predictor(self._network(), self._compiled))
            outputs = loop.predict(self.module, network, hooks, batches, self.backend.gather, keeps_outputs)
        if not keeps_outputs:
            return None
        joined = join(outputs, concatenated)
        return map_structure(to_numpy, joined) if wants_numpy else joined

    def predict_on_batch(self, x: Any) -> Any:
        """What the module returns for one batch; argument and result as in `predict`."""
        return self.predict(x, batch_size=length_of(x), verbose=0)

    def __call__(self, *inputs: Any, **named_inputs: Any) -> Any:
        """Runs the module in eval mode and without gradients; arrays become tensors on its device."""
        tensors = map_structure(
            lambda leaf: self.backend.move(to_tensor(leaf, precisions.dtype_of(self.module))), (inputs, named_inputs)
        )
        with scopes.computing(self), torch.no_grad():
            self.module.eval()
            return self._network()(*tensors[0], **tensors[1])

    def check(
        self,
        data: Any,
        y: Any = None,
        *,
        batch_size: int | None = None,
        sample_weight: Any = None,
        callbacks: Any = (),
        validation_data: Any = None,
        validation_split: float = 0.0,
        verbose: int | str = "auto",
    ) -> preflight.Findings:
        """Looks for mistakes before hours of training: one step on one batch, which changes nothing.

        Weights, buffers, gradients, optimizers, random numbers, modes, metrics and history stay as they are; only what
        objects of your own inside of data, module or callbacks keep to themselves is out of reach.

        Args:
            data: As in `fit`, like the others; but no generator, which would not get its batch back.
            verbose: 0 = only return them, 1 = also print them, `"auto"` = print them unless in a notebook.
        Returns:
            The `Findings`, a list whose `str` is a table: errors (`fit` will fail or be wrong), warnings (probably a
            mistake) and notes. Before `compile` only module and inputs can be checked.
        Raises:
            ValueError, TypeError: a generator, or an argument that is not as in `fit`.
        Example:
            >>> model = Model(nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), backend="cpu").compile("sgd", "mse")
            >>> [(one.severity, one.name) for one in model.check(torch.rand(9, 4), torch.rand(9), verbose=0)]
            [('error', 'shapes')]
        """
        options = {"batch_size": batch_size, "sample_weight": sample_weight, "callbacks": callbacks}
        held_out = {"validation_data": validation_data, "validation_split": validation_split}
        findings = preflight.check(self, data, y, **options, **held_out)
        if verbose == 1 or (self._shown(verbose) == "auto" and not is_notebook()):
            findings.print()
        return findings

    def summary(
        self,
        input: Any = None,
        *,
        depth: int | str = 3,
        batch_size: int | None = None,
        verbose: int | str = "auto",
    ) -> Summary:
        """The weights summary: a tree of modules with shapes, parameters and FLOPs; nothing is computed or changed.

        Args:
            input: A batch of inputs, or its shape such as `(32, 1, 28, 28)`; `None` = a table without shapes.
            depth: Levels of the tree, or `"top"` (1) or `"full"` (all). Default: 3.
            batch_size: Batch size to estimate the memory of a training step for; `None` = that of `input`.
            verbose: 0 = only return it, 1 = also print it, `"auto"` = print it unless in a notebook, which shows it.
        Returns:
            A `Summary`, whose `str` is the table.
        Raises:
            ValueError: a `depth` or `input` that is none.
        """
        summary = summarize(self.module, input, depth=depth, batch_size=batch_size, optimizer=self.optimizer)
        if verbose == 1 or (self._shown(verbose) == "auto" and not is_notebook()):
            summary.print()
        return summary

    # Saving.

    _callbacks: Sequence[Any] = ()
    """Those of the running `fit`, or of the last one."""

    def save_weights(self, path: str | os.PathLike) -> None:
        """Writes the weights alone, as safetensors: any torch user can load them, by the names of `state_dict()`.

        Args:
            path: Where to, as it is: give it the ending `.safetensors`. Folders above it are made.
        Raises:
            ValueError: an ending of other files.
            TypeError: something in the module's state is no dense tensor.
            OSError: it cannot be written; a file that was there is as it was.
        Example:
            >>> import tempfile
            >>> first, second = (Model(nn.Linear(4, 1), backend="cpu") for _ in range(2))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     first.save_weights(f"{folder}/best.safetensors")
            ...     second = second.load_weights(f"{folder}/best.safetensors")
            >>> torch.equal(first.module.weight, second.module.weight)
            True
        """
        checkpoint.refuse_ending(path, is_weights=True)
        self._write(checkpoint.write_weights, path, self.backend.state(self.module))

    def load_weights(self, path: str | os.PathLike, *, strict: bool = True, skip_mismatch: bool = False) -> Model:
        """Puts weights into the module; optimizer and all else stay as they are.

        Args:
            path: What `save_weights` or any other library wrote as safetensors, or `save`, of which it takes the
                weights.
            strict: Whether all names must be there, and no others; `False` takes those that are and warns of the rest.
                Default: `True`.
            skip_mismatch: Whether tensors of another shape are left out, with a warning, as for a head of another
                number of classes. Default: `False`, they are refused.
        Returns:
            The model.
        Raises:
            ValueError: names or shapes are not the module's, or nothing fits; the module is as it was. Or the file is
                damaged, or no such.
            OSError: there is no such file.

        Source: `skip_mismatch`: Keras, `Model.load_weights`.
        """
        weights = folders.read(path)["module"] if folders.is_folder(path) else checkpoint.read_weights(path)
        self.backend.gather_state()
        differences = refuse_unlike(self.module, weights, repr(str(path)), strict, skip_mismatch)
        for name in reshaped_of(self.module, weights):
            del weights[name]
        self.backend.load(self.module, weights)
        if differences:
            warnings.warn(f"{str(path)!r} was loaded but for what is {'; '.join(differences)}.", stacklevel=2)
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Writes all of the state: weights, optimizers, schedules, loss scale, history and the callbacks of the run.

        Args:
            path: Where to, such as `"run.pt"`. Folders above it are made. With the ending `.dcp` it is a folder, where
                each process of FSDP writes what it holds, and no process needs memory for all.
        Raises:
            ValueError: an ending of other files.
            TypeError: something in the state is neither a tensor nor plain data.
            OSError: it cannot be written; a file that was there is as it was.
        """
        if folders.is_folder(path):
            with self.backend.apart(folders.mark) as parts:
                state = state_of(self, self._callbacks)
            folders.write(path, state, parts, self.backend)
            return
        checkpoint.refuse_ending(path, is_weights=False)
        self._write(checkpoint.write, path, state_of(self, self._callbacks))

    def _write(self, write: Callable, path: str | os.PathLike, state: Mapping[str, Any]) -> None:
        """Has rank 0 write a file; the others wait for it, and fail where it does."""
        error = None
        try:
            if self.backend.rank == 0 or self.is_dry_run:  # of which each process has a folder
                write(path, state)
            elif Path(path).is_relative_to(self.backend.scratch):  # what callbacks look after as rank 0's do
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).touch()
        except Exception as failure:
            error = failure
        error = failure_of_first(self.backend, error)
        if error is not None:
            raise error

    def load(self, path: str | os.PathLike) -> Model:
        """Puts back what `save` wrote, but for the states of callbacks.

        Args:
            path: What `save` wrote, of a model that was made and compiled as this one.
        Returns:
            The model.
        Raises:
            RuntimeError: `compile` was not called.
            ValueError: module, optimizers or schedules are others, and as they were; or the file is damaged, or no
                such.
            OSError: there is no such file.
        """
        saved = folders.read(path)
        if saved.get("optimizers"):
            self._refuse_uncompiled("load")
        restore(self, saved, repr(str(path)))
        self._finds_lr &= self.is_dry_run  # else the rate is that of the file
        return self

    def export(
        self,
        path: str | os.PathLike,
        data: Any,
        *,
        dynamic_batch: bool = True,
        check: bool = True,
        tolerance: float | None = None,
    ) -> None:
        """Writes the module as a program that runs without its Python code, on the CPU or wherever it is moved to.

        It computes what the module does in eval mode, with the weights as they are; `compile(precision="16")` and the
        like are not in it. The file appears once it was read back and has returned what the module returns, for a batch
        of the data, for a larger one, and for a single sample.

        Args:
            path: Where to: `.pt2` for `torch.export.load`, `.onnx` for ONNX runtimes. Folders above it are made.
            data: As in `predict`: its first batch shows what inputs look like, and none of its values gets into the
                file. Or the shape of a batch, such as `(32, 1, 28, 28)`, or a tuple or dict of shapes.
            dynamic_batch: Whether the program takes batches of any size, or of that in `data` alone. Default: `True`.
            check: Whether to compare. Default: `True`.
            tolerance: Largest difference that is rounding, in parts of the largest output, or of 1 where that is more.
                `None` = by dtype, 1e-5 of float32.
        Raises:
            ImportError: an `.onnx` file without `pip install kerastorch[onnx]`.
            ValueError: another ending; the module cannot be exported, or not so; the program returns something else.
            OSError: it cannot be written; a file that was there is as it was.
        Example:
            >>> import tempfile
            >>> model = Model(nn.Linear(4, 1), backend="cpu")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     model.export(f"{folder}/net.pt2", (32, 4))
            ...     net = torch.export.load(f"{folder}/net.pt2").module()
            >>> net(torch.rand(5, 4)).shape
            torch.Size([5, 1])
        """
        exporting.refuse_ending(path)
        data = exporting.with_shapes_filled(data, precisions.dtype_of(self.module))
        batch_size = None if dynamic_batch or not is_arrays(data) else length_of(data)
        batch, _ = peek(open_data(self._inputs(data), None, None, self._reading(batch_size)))
        with scopes.computing(self):
            exporting.export(self.module, path, batch[0], dynamic_batch=dynamic_batch, check=check, tolerance=tolerance)

    def _make_optimizer(self) -> None:
        """Makes what `compile` left to be made when a lazy module has its parameters."""
        self._compiled.make_updates()
        self.optimizer = self._compiled.optimizer

    # What Keras's callbacks ask a model for.

    @property
    def samples_seen(self) -> int:
        """Samples of the running epoch or evaluation so far."""
        return 0 if self._running is None else self._running.tracker.samples

    @property
    def steps_taken(self) -> int:
        """Optimizer steps of the running `fit`, or of the last one."""
        return self._steps_of_ranks if self._training is None else self._training.steps

    @property
    def is_gathering(self) -> bool:
        """Whether gradients of earlier batches wait for the batches that complete their step."""
        if self._training is None:
            return False
        windows = (self._training.window, *(update.parked for update in self.updates.values()))
        return any(window is not None and window.is_open for window in windows)

    def at_safe_point(self, function: Callable[[], None]) -> None:
        """Calls a function when all callbacks have done their part of a batch or an epoch; at once outside of `fit`.

        For callbacks that save: nothing of the next batch has begun then, and what is saved is gone on from exactly.
        """
        if self._live_run is None:
            function()
        else:
            self._live_run.position.waiting.append(function)

    def of_all_ranks(self, logs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The logs of a batch, which each of several processes has of its own part, over all; all of them must ask."""
        if self.backend.world == 1 or self._training is None:
            return logs
        return self._training.tracker.means_so_far() | self._training.rates

    @property
    def batch_indices(self) -> list[int] | None:
        """The numbers in the data of the samples in the running batch of `fit`; `None` where that is not known."""
        return None if self._live_run is None else self._live_run.passes.indices

    @property
    def may_stop_at_batches(self) -> bool:
        """Whether callbacks of the running `fit`, or steps of the user's own, may ask for an end after any batch."""
        has_own = self._overrides("train_step") or self._overrides("compute_loss")
        return has_own or _hears_batches(self._callbacks, "train")

    @property
    def is_dry_run(self) -> bool:
        """Whether a `fit(dry_run=...)` is running, of which nothing shall be left."""
        return self._dry_run_folder is not None

    def path_for(self, path: str | os.PathLike) -> Path:
        """Where a callback shall write a file: `path` itself, or in a dry run a place that is gone afterwards."""
        folder = self._dry_run_folder or self.backend.scratch
        if folder is None:
            return Path(path)
        path = Path(os.path.abspath(path))  # without "..", which would lead out of the folder
        return Path(folder) / path.relative_to(path.anchor)

    @property
    def gradient_norm(self) -> Tensor | dict[str, Tensor] | None:
        """Norm of the last step's gradients before they were clipped, a scalar on the device.

        Of each optimizer by its name where there are several; `None` where no norm is clipped.
        """
        norms = {name: update.gradient_norm for name, update in self.updates.items()}
        if "" in norms or all(norm is None for norm in norms.values()):
            return norms.get("")
        return norms

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps left out since `compile` for gradients that overflowed in fp16; read from the device."""
        steps = (update.scaled_step for update in self.updates.values())
        return sum(int(step.skipped) for step in steps if step is not None)

    def change_schedule(self, schedule: Any) -> None:
        """Has the learning rate follow another schedule until the running `fit` ends; for callbacks.

        Args:
            schedule: As in `compile`, but none over the run's length; `None` = the rate stays where it is.
        """
        if self._running is None:
            raise RuntimeError("change_schedule was called outside of fit. Give compile the schedule.")
        self._compiled.change_schedule(schedule)

    def training_batches(self) -> Iterator[tuple]:
        """One pass over the training data of the running `fit`: `(x, y, weight)` on the device; for callbacks.

        Raises:
            RuntimeError: no `fit` is running.
            ValueError: the data is a generator, which cannot be gone through again.
        """
        if self._training_data is None:
            raise RuntimeError("training_batches was called outside of fit. Call it in a hook of a callback.")
        if not self._training_data.repeats:
            raise ValueError(
                "the training data is a generator, which cannot be gone through again. Give fit a list, a DataLoader, "
                "or a callable that makes a new generator."
            )
        data, number = self._training_data, self.epochs_trained
        # Not begun before somebody iterates: a loader draws from the random numbers and starts its workers then.
        return (batch for one in (data,) for batch in self._batches(one.batches(number)))

    @property
    def updates(self) -> dict[str, Update]:
        """What becomes of the gradients of each optimizer, by its name; `""` is the name of a single one."""
        return {} if self._compiled is None else self._compiled.updates

    # What can be overridden, and what overrides use.

    def compute_loss(self, batch: tuple) -> Tensor:
        """The loss of a batch; override it to compute another one, for training and evaluation.

        Args:
            batch: `(x, y)` on the device, `y=None` where there is none; `(x, y, weight)` where there are weights.
        Returns:
            The mean over the samples, a scalar; an override with metrics returns `(loss, output)`, or calls this one.
        Example:
            >>> class Regularized(Model):
            ...     def compute_loss(self, batch):
            ...         penalty = sum(parameter.abs().sum() for parameter in self.module.parameters())
            ...         self.log("penalty", penalty)
            ...         return super().compute_loss(batch) + 1e-4 * penalty
        """
        batch = (*batch, None)[:3]
        if self._compiled.has_own_loss:
            batch = targets_as_inputs(batch)
        if isinstance(self._compiled.compute, Overridden):
            return self._compiled.compute.ask(batch)
        return self._compiled.plain(*batch)[1]

    def train_step(self, batch: tuple) -> Mapping[str, Any] | None:
        """What is done with a batch; override it for several optimizers, or several losses.

        Args:
            batch: As in `compute_loss`.
        Returns:
            `None`, or values to `log` by their names.
        Example:
            >>> class Twins(Model):
            ...     def train_step(self, batch):
            ...         x, y = batch
            ...         for name in ("left", "right"):
            ...             loss = nn.functional.mse_loss(self.module[name](x), y)
            ...             self.backward(loss)
            ...             self.optimizer_step(name)
            ...             self.log(f"{name}_loss", loss)
        """
        x, y, weight = (*batch, None)[:3]
        if self._compiled.has_own_loss and not self._overrides("compute_loss"):
            x, y, weight = targets_as_inputs((x, y, weight))
        output, loss = self._compiled.compute(x, y, weight)
        self._running.tracker.add(loss, output, y, self._running.samples, weight)
        if self._compiled.logged_loss.is_gathered:
            rows = samples_in(x)
            shares = self._running.shares(loss, output, (x, y, weight), rows)
            if len(shares) == 1 and shares[0].count is not None:
                self._stepping("train_step").weigh(shares[0].count, loss, rows)
        self.backward(loss)
        self.optimizer_step()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a scalar loss, within `train_step`; after an `optimizer_step`, to none."""
        self._stepping("backward").backward(loss)

    def optimizer_step(self, name: str | None = None) -> None:
        """Has an optimizer update its parameters and clears their gradients, within `train_step`.

        With `accumulate=K` that is every K-th call. Clipping, loss scaling and schedule are as compiled.

        Args:
            name: Which optimizer; `None` = the only one.
        """
        self._stepping("optimizer_step").optimizer_step(name)

    def log(self, name: str, value: Tensor | float) -> None:
        """Puts a value into the logs, as a mean over the epoch's samples; within `train_step` or `compute_loss`.

        Args:
            name: Its key in logs and history, there with `val_` before it in validation.
            value: Of the running batch, a number or a scalar tensor, which is not read before somebody looks.
        """
        if self._running is None:
            raise RuntimeError(f"log({name!r}) was called outside of a step. Call it in train_step or compute_loss.")
        checks.refuse_no_number(name, value)
        self._running.tracker.log(name, value, self._running.samples)

    def _stepping(self, verb: str) -> OwnStep:
        if self._own_step is None:
            raise RuntimeError(f"{verb} was called outside of train_step. Override train_step and call it there.")
        return self._own_step

    def _overrides(self, name: str) -> bool:
        return getattr(getattr(self, name), "__func__", None) is not getattr(Model, name)

    def _own_loss(self, batch: tuple) -> Any:
        self._running.samples = self.backend.part.samples_of(samples_in(batch[0]))
        return self.compute_loss(batch)

    def get_weights(self) -> list[np.ndarray]:
        """Copies of all parameters and buffers as numpy arrays, in the order of `module.state_dict()`."""
        state = self.backend.state(self.module)
        return [to_numpy(tensor.detach().cpu()).copy() for tensor in state.values()]

    def set_weights(self, weights: list[np.ndarray]) -> None:
        """Puts back what `get_weights` returned.

        Raises:
            ValueError: not as many arrays as the module has parameters and buffers.
        """
        self.backend.gather_state()
        state = self.module.state_dict()
        if len(weights) != len(state):
            raise ValueError(
                f"weights has {len(weights)} arrays, expected {len(state)}, one for each of {list(state)}."
            )
        named = {name: torch.as_tensor(array) for name, array in zip(state, weights, strict=True)}
        self.backend.load(self.module, named)

    # From arguments to what the loop takes.

    def _reading(
        self, batch_size: int | None, fallback: int | None = None, *, may_enlarge: bool = False, **options: Any
    ) -> Reading:
        return Reading(
            dtype=precisions.dtype_of(self.module),
            batch_size=batch_size and int(batch_size),
            fallback_batch_size=fallback,
            # The names that Hugging Face's datasets give to targets; a module with a loss of its own takes them itself.
            targets=() if self._compiled is not None and self._compiled.has_own_loss else ("labels", "label"),
            hold=self.backend.hold,
            share=self.backend.share,
            evaluating=may_enlarge and self._treats_samples_alone(),
            **options,
        )

    def _open(
        self,
        source: tuple,
        reading: Reading,
        held_out: tuple[Any, float, int | None],
        callbacks: list,
        overfit_batches: int | float = 0,
    ) -> tuple[Data, Data | None]:
        """The data to train on, and that to validate on: given by itself, or split off, or none, or the same."""
        if overfit_batches:
            opened = open_data(in_order(source[0]), *source[1:], replace(reading, shuffle=False))
            number = limits.portion("overfit_batches", overfit_batches, opened.steps).batches
            batches, _ = first_batches(opened, number)
            opened = Data(lambda number, start=0: iter(batches[start:]), len(batches), opened.targets)
            return opened, opened
        (validation_data, fraction, batch_size), y = held_out, source[1]
        validation_source = validation_data, y if isinstance(y, str) else None, None
        if fraction and validation_data is None:
            source, validation_source = split_tail(*source, fraction)
        training = open_data(*source, reading)
        if validation_source[0] is None:
            return training, None
        may_enlarge = not _hears_batches(callbacks, "test")
        fallback = reading.batch_size or reading.fallback_batch_size
        validation = open_data(*validation_source, self._reading(batch_size, fallback, may_enlarge=may_enlarge))
        checks.refuse_unlike(training.targets, validation.targets)
        return training, validation

    def _treats_samples_alone(self) -> bool:
        """Whether results cannot depend on how samples are batched, as far as is known."""
        normalizes_batches = any(
            isinstance(part, nn.modules.batchnorm._NormBase) and part.running_mean is None
            for part in self.module.modules()
        )
        if normalizes_batches or self._compiled is None or self._overrides("compute_loss"):
            return not normalizes_batches and self._compiled is None
        return self._evaluation_tracker.joins and getattr(self._compiled.loss, "targets", None) is not None

    def _with_optimizer(self, opened: Data) -> Data:
        """Makes the optimizer if it is still to be made: a lazy module gets its parameters from a first batch."""
        if _is_lazy(self.module):
            batch, opened = peek(opened)
            with scopes.computing(self), torch.no_grad():
                forward(self.module.eval(), self.backend.move(batch[0]))
            self._cast(self._compiled.precision)
            self.module = self.backend.place(self.module)  # again: now there are parameters, for all ranks the same
        if not any(parameter.requires_grad for parameter in self.module.parameters()):
            raise ValueError(
                "the module has no trainable parameters. Unfreeze some (model.unfreeze('*')), or call evaluate or "
                "predict, which need none."
            )
        if self.optimizer is None:
            self._compiled.make_updates()
            self.optimizer = self._compiled.optimizer
        return opened

    def _cast(self, precision: Any) -> None:
        """Gives the module the dtype of a precision, or its own again."""
        if precision.weights is not None:
            self._own_dtypes = self._own_dtypes or precisions.dtypes_of(self.module)
            precisions.cast(self.module, precision.weights)
        elif self._own_dtypes is not None:
            precisions.cast_back(self.module, self._own_dtypes)
            self._own_dtypes = None

    def _recipe(self, tracker: Tracker, hooks: Any) -> Recipe:
        compute, shares = self._compiled.compute_evaluated, self._compiled.logged_loss.shares
        return Recipe(
            self.module,
            self.backend.alone(compute),
            shares,
            tracker,
            hooks,
            self.backend,
            self.backend.alone(self.backend.evaluation_for(evaluation_step, self._compiled)),
            device=self.backend.device,
        )

    def _training_recipe(
        self, tracker: Tracker, hooks: Any, accumulate: int | Mapping[int, int], batches: int | None, pieces: Any = None
    ) -> Recipe:
        recipe, compiled = self._recipe(tracker, hooks), self._compiled
        recipe.updates, recipe.scaler = compiled.updates, compiled.scaler
        recipe.compute = compiled.compute
        if recipe.scaler is not None:
            recipe.backward = partial(scaled_backward, recipe.scaler)
        recipe.frozen, self.backend.in_pieces = self._frozen, pieces is not None
        recipe.size_of = partial(checks.size_at, accumulate)
        recipe.batches, recipe.gathers_pieces = batches, pieces is not None
        if self._running is None:
            is_parted = self.backend.share is not None or self.backend.weighs_pieces
            compiled.gather(accumulate != 1 or pieces is not None or is_parted)
        return recipe

    def _step(self, training: Recipe, accumulate: Any = 1, microbatch: int | str | None = None) -> Callable:
        compiled = self._compiled
        is_pieced = microbatch is not None
        has_closure = compiled.is_single and optimizers.needs_closure(self.optimizer)
        checks.refuse_unable(self.backend, ("microbatch", is_pieced), ("an optimizer with a closure", has_closure))
        if self._overrides("train_step"):
            return OwnStep(self.train_step, training, compiled.precision)
        if compiled.tbptt_steps is not None:
            return TruncatedStep(compiled.with_state, compiled.tbptt_steps)
        if has_closure:
            checks.refuse_gathering(type(self.optimizer).__name__, accumulate, microbatch)
            return closure_step
        if microbatch is not None:
            return PiecewiseStep(microbatch)
        if compiled.is_plain:
            training.compute = compiled.over(self.backend.network(self.module))
        return self.backend.step_for(forward_backward, compiled)

    def _begin_schedules(self, training: Recipe, batches: int | None, accumulate: Any, bounds: limits.Limits) -> None:
        """Starts the schedules of a run, over as many optimizer steps as it will have."""

        def steps_before(epoch: int) -> int:
            return sum(-(-batches // checks.size_at(accumulate, one)) for one in range(epoch)) if batches else 0

        done = steps_before(bounds.first_epoch)
        by_epochs = steps_before(bounds.epochs) if batches and bounds.epochs is not None else math.inf
        total = min(by_epochs, done + bounds.max_steps)
        for update in self._compiled.updates.values():
            if update.schedule is not None:
                update.schedule.begin(None if total == math.inf else int(total), done)
                training.rates[update.rate_name] = rate_of(update.optimizer)

    def _pieces_in(self, opened: Data, batches: int | None) -> int | None:
        """Batches in an epoch; with truncated backpropagation the pieces of them, where that is known."""
        if self._compiled.tbptt_steps is None:
            return batches
        target = next(leaves(opened.targets), None)
        if batches is None or target is None or target.ndim < 2:
            return None
        return batches * -(-target.shape[1] // self._compiled.tbptt_steps)

    def _network(self) -> Callable:
        """The module, computing in the precision that was compiled."""
        return self.module if self._compiled is None else self._compiled.network

    def _begin_run(
        self, training: Recipe, step: Any, opened: Data, taken: limits.Portion, validated: Data | None, epoch: int
    ) -> Run:
        """What another run needs to know of this one; until it ends, what is saved has it too."""
        if self._live_run is not None:
            raise RuntimeError(
                "fit was called by a callback while the same model trains. Train another, or call it later."
            )
        if self.backend.world > 1:
            alike = {"seed": seed_of_order(), "weights": _checksum(self.module), "optimizer": self._rates_and_such()}
            alike |= {"data": _fingerprint(opened), "validation_data": _fingerprint(validated)}
            self._refuse_other_ranks("fit", **alike)
        position = Position(epoch)
        feed = self._batches if opened.own is None else partial(self._batches, ahead=False)
        looks_ahead = self.backend.looks_ahead and opened.own is None
        passes = Passes(opened, taken, position, lambda: self.epochs_trained, feed, looks_ahead)
        own = [one for part in self.module.modules() for one in generators_in(part, depth=1)]
        generators = [*opened.generators, *(() if validated is None else validated.generators), *own]
        self._live_run = Run(self, training, step, position, passes, generators)
        return self._live_run

    def _run_state(self) -> dict[str, Any] | None:
        """Where the running `fit` is, or where the last one ended; `None` = there was none."""
        return self._ended_run if self._live_run is None else self._live_run.state_dict()

    def _batches(self, batches: Iterable, is_evaluated: bool = False, ahead: bool = True) -> Iterator:
        fed = self.backend.feed(batches, ahead)
        if not self._compiled.has_own_loss:
            return fed
        is_plain = not self._overrides("compute_loss") and (is_evaluated or not self._overrides("train_step"))
        return map(targets_as_inputs if is_plain else with_labels, fed)

    def _validation(
        self, validated: Data, steps: int | None, when: limits.Frequency, hooks: Any, sanity_steps: int
    ) -> loop.Validation:
        """What the loop validates, once it was tried on a few batches of which nobody hears."""
        if sanity_steps:
            tried, number = (
                self._recipe(self._evaluation_tracker, NO_HOOKS),
                steps if sanity_steps == -1 else min(sanity_steps, steps or sanity_steps),
            )
            with random_state_kept(validated.generators):
                batches, validated = first_batches(validated, number)
                self._validate(tried, Data(lambda number: iter(batches)), None)
        evaluation = self._recipe(self._evaluation_tracker, hooks)
        # Looked up when it is called: the run begins later.
        return loop.Validation(
            partial(self._validate, evaluation, validated, steps), when, lambda: self._live_run.random()
        )

    def _validate(self, evaluation: Recipe, validated: Data, steps: int | None, ending: Any = None) -> dict[str, Any]:
        with scopes.shown(self, evaluation):
            batches = self._batches(islice(validated.batches(0), steps), is_evaluated=True)
            return loop.evaluate(evaluation, batches, ending)

    def _inputs(self, data: Any) -> Any:
        """`data` for `predict`, where arrays in a tuple or list are several inputs if the module takes as many.

        Else a tuple is `(x, y[, weight])`, and a list is one of batches.
        """
        if not isinstance(data, (tuple, list)) or not is_arrays(data):
            return data
        if is_numbers(data) or takes(self.module, len(data)):
            return data, None
        return iter(data) if isinstance(data, list) else (data[0], None)

    def _expect(self, *data: Data | None) -> None:
        """Has loss and metrics checked on the next batch, and the loss on all the targets that are in memory."""
        self._training_tracker.expect()
        targets = (opened.targets for opened in data if opened is not None)
        self._compiled.loss.expect(*targets, beside=self._running is not None)

    def _refuse_unfit(self, callbacks: list[Any], is_validated: bool) -> None:
        """Callbacks and a validation that this model cannot have."""
        checks.refuse_two_averages(callbacks)
        checks.refuse_lost_weights(callbacks)
        checks.refuse_shared_files(callbacks)
        needs_all = any(getattr(one, "needs_all_parameters", False) for one in callbacks)
        checks.refuse_unable(self.backend, ("a callback of all parameters", needs_all))
        if is_validated and self._overrides("train_step") and not self._overrides("compute_loss"):
            checks.refuse_no_forward(self.module)
        if self._overrides("train_step") or self._overrides("compute_loss") or self._compiled.has_own_loss:
            return  # they may log anything
        updates = self._compiled.updates.values()
        names = self._training_tracker.keys() + [update.rate_name for update in updates if update.schedule is not None]
        known = names + [f"val_{name}" for name in names if is_validated]
        for update in updates:
            if update.schedule is not None:
                checks.refuse_unknown_monitor(update.schedule.schedule, known, is_validated)
        checks.refuse_unknown_monitors(callbacks, names, is_validated)

    def _refuse_other_ranks(self, verb: str, **given: Any) -> None:
        """All processes must do the same, on the same data, of which each takes its part."""
        of_ranks = self.backend.collect(given, f"model.{verb}")
        for rank, found in enumerate(of_ranks):
            for name, first in of_ranks[0].items():
                if found[name] != first:
                    raise ValueError(
                        f"rank {rank} was given another {OF_RANKS.get(name, name)} than rank 0: {found[name]} instead "
                        f"of {first}. Give all ranks the same; each takes its part of every batch."
                    )

    def _rates_and_such(self) -> list[dict[str, str]]:
        """What the optimizers are to do, in words."""
        groups = (group for update in self.updates.values() for group in update.optimizer.param_groups)
        return [{name: str(value) for name, value in group.items() if name != "params"} for group in groups]

    def _shown(self, verbose: int | str) -> int | str:
        return verbose if self.backend.rank == 0 else 0

    def _hooks(self, callbacks: list[Any], params: dict[str, Any]) -> Any:
        callbacks = nan_finders() + callbacks + progress_for(params["verbose"], callbacks)
        called = [one for one in callbacks if self.backend.rank == 0 or not getattr(one, "rank_zero_only", False)]
        hooks = hooks_of(called)
        for callback in callbacks:
            for method, argument in (("set_params", params), ("set_model", self)):
                if hasattr(callback, method):
                    getattr(callback, method)(argument)
        return hooks

    def _refuse_unable(self, compiled: Compiled, jit: Any) -> None:
        checks.refuse_unable(
            self.backend,
            (f"precision={compiled.precision.name!r}", True),
            ("an override of compute_loss", self._overrides("compute_loss")),
            ("an override of train_step", self._overrides("train_step")),
            ("loss=None", compiled.has_own_loss),
            ("tbptt_steps", compiled.tbptt_steps is not None),
            ("jit", jit),
        )

    def _refuse_uncompiled(self, verb: str) -> None:
        if self._compiled is None:
            raise RuntimeError(
                f'{verb} was called before compile. Call e.g. model.compile("adam", "cross_entropy") first.'
            )


NO_HOOKS = hooks_of(())
OF_RANKS = {"seed": "kt.set_seed", "weights": "module, by the sum of its weights,"}  # what is to be alike, in words


def _nobody() -> None:
    """A reference to nothing."""


def _is_lazy(module: nn.Module) -> bool:
    return any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters())


def _fingerprint(opened: Data | None, inputs: Any = None) -> Any:
    """What other data would not have: its batches, and a few numbers of it where it is in memory."""
    if opened is None:
        return None
    arrays = [one for one in leaves((opened.targets, inputs)) if isinstance(one, (Tensor, np.ndarray))]
    numbers = [one for one in arrays if one.ndim and len(one) and (isinstance(one, Tensor) or one.dtype.kind in "biuf")]
    ends = (torch.as_tensor(one[index]) for one in numbers for index in (0, len(one) // 2, -1))
    return opened.steps, [float(one.double().nan_to_num().sum()) for one in ends]


def _checksum(module: nn.Module) -> str:
    """What other weights would not sum up to; nothing where a process has parts of them."""
    weights = [one.detach() for one in module.parameters() if one.is_floating_point()]
    if not weights or any(one.is_meta or hasattr(one, "to_local") for one in weights):
        return ""
    return str(sum(one.double().sum() for one in weights).item())


def _hears_batches(callbacks: list[Any], stage: str) -> bool:
    hooks = hooks_of(callbacks)
    return bool(getattr(hooks, f"on_{stage}_batch_begin") or getattr(hooks, f"on_{stage}_batch_end"))
