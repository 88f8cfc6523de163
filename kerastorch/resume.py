"""Going on with a run that ended early: what of it is in every file, and the way back into a run that begins.

Beside the model's own state (`state.py`): the place in the data, the random numbers, the gradients gathered for the
next step, and the sums behind the means of the running epoch. What is saved at a safe point is gone on from exactly.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .accumulation import merged_parked, merged_windows
from .checkpoint import read
from .folders import read as read_any
from .passes import Passes
from .position import Position
from .seeding import Generator, random_state, set_random_state
from .state import refuse_incomplete, refuse_unlike, restore, restore_callbacks
from .step import Recipe, open_windows


class Run:
    """A run of `fit`, as far as another one needs to know it to go on.

    Args:
        model: The `kerastorch.Model` that is trained.
        training: What its steps are made of.
        step: `forward_backward`, or what stands for it.
        position: Where it is.
        passes: Its data.
        generators: Random numbers of the user's own that its data draws from.
    """

    def __init__(
        self,
        model: Any,
        training: Recipe,
        step: Any,
        position: Position,
        passes: Passes,
        generators: Sequence[Generator],
    ) -> None:
        self.model, self.training, self.step, self.position = model, training, step, position
        self.passes, self.generators = passes, tuple(generators)
        self._has_said = False

    def random(self) -> dict[str, Any]:
        """The random numbers that it may draw from, as they are."""
        return random_state(self.generators)

    def state_dict(self) -> dict[str, Any]:
        """Where it is: tensors and plain data."""
        training, position = self.training, self.position
        self._say_what_is_inexact()
        return {
            "epoch": position.epoch,
            "batch": position.batch,
            "batches_before": position.batches_before,
            "dropped": position.dropped,
            "is_validating": position.is_validating,
            "random": position.random or self.random(),
            "data": self.passes.state_dict(),
            "steps": {name: update.steps for name, update in training.updates.items()},
            "batch_size": self.model.batch_size and int(self.model.batch_size),
            "rates": dict(training.rates),
            "is_scale_due": training.is_scale_due,
            "unproven": [tracker.is_unproven for tracker in self._trackers],
            **self._of_ranks(),
        }

    def _of_ranks(self) -> dict[str, Any]:
        """What each process has for itself: of rank 0, or who measures all, as if it were alone, and of all others."""
        backend = self.model.backend
        own = {"within_epoch": self._within_epoch() if self.position.batch else None, "backend": backend.state_dict()}
        if not backend.measures_parts:
            of_each = backend.collect(own["backend"]) if backend.world > 1 else []
            return {"within_epoch": backend.announce(own["within_epoch"]), "ranks": [], "backends": of_each}
        return {"within_epoch": own["within_epoch"], "ranks": backend.collect(own)}

    def refuse_other(self, saved: Mapping[str, Any], source: str) -> None:
        """Says before anything begins that a state is none to go on from.

        Raises:
            ValueError: it is of another module, other data, or windows of another size; or of a version of the format
                that does not say where the run was.
        """
        if "run" not in saved:
            raise ValueError(
                f"{source} was written in format 1, which does not say where its run was. Call model.load, and fit "
                f"with initial_epoch={saved['epochs_trained']}."
            )
        refuse_unlike(self.model.module, saved["module"], source)
        run = saved["run"]
        if run is None:
            return
        self.passes.refuse_other_data(run["data"], source)
        size = self.training.size_of(run["epoch"])
        if run["within_epoch"] is not None and run["within_epoch"]["size"] != size:
            raise ValueError(
                f"{source} goes on within an epoch with accumulate={run['within_epoch']['size']}, but fit was given "
                f"accumulate={size}. Give what the run was given that was saved."
            )

    def go_on(self, saved: Mapping[str, Any], source: str) -> None:
        """Puts the state of a run back, once the callbacks have begun.

        Args:
            saved: All of the state, as `state.state_of` returned it.
            source: Where it is from, for errors.
        Raises:
            ValueError: it is of another module, or compiled otherwise; nothing was changed.
        """
        model, position, training = self.model, self.position, self.training
        history, run = model.history, saved["run"]
        restore(model, saved, source)
        if model.history is not None:
            history.go_on_from(model.history)
        model.history = history
        if run is None:  # of a model that was saved outside of a run
            position.epoch = history.epoch[-1] + 1 if history.epoch else position.epoch
            return
        position.epoch, position.batch, position.batches_before = run["epoch"], run["batch"], run["batches_before"]
        position.dropped, position.is_validating = run["dropped"], run["is_validating"]
        training.rates, training.is_scale_due = dict(run["rates"]), run["is_scale_due"]
        for name, steps in run["steps"].items():
            training.updates[name].steps = steps
        training.steps = max(run["steps"].values(), default=0)
        # A batch that is measured to prove that it can be is added up by itself: sums would be rounded otherwise.
        for tracker, is_unproven in zip(self._trackers, run.get("unproven", []), strict=False):
            tracker.is_unproven = is_unproven
        within_epoch = self._taken_up(run)
        if within_epoch is not None:
            self._go_on_within_epoch(within_epoch)
        self.passes.load_state_dict(run["data"], run["random"])
        set_random_state(run["random"], self.generators)

    def _taken_up(self, run: Mapping[str, Any]) -> dict[str, Any] | None:
        """This process's part of what is known of the epoch: its own, or another one of as many as there are now."""
        backend, ranks = self.model.backend, run.get("ranks") or [{"within_epoch": run["within_epoch"], "backend": {}}]
        of_each = run.get("backends") or []
        if len(of_each) == backend.world and not backend.measures_parts:
            backend.load_state_dict(of_each[backend.rank])
        if len(ranks) == backend.world and (backend.measures_parts or backend.world == 1):
            backend.load_state_dict(ranks[backend.rank]["backend"])
            return ranks[backend.rank]["within_epoch"]
        if run["within_epoch"] is None:
            return None
        return self._merged([one["within_epoch"] for one in ranks])

    def _merged(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """What other processes had of an epoch: rank 0 takes all of it; where each measures all, each does."""
        backend = self.model.backend
        is_first = backend.rank == 0 or not backend.measures_parts
        scale = len(states) / (backend.world if backend.measures_parts else 1)
        merged = dict(states[0])
        merged["tracker"] = self.training.tracker.merged([one["tracker"] for one in states], is_first)
        gradients = [one["gradients"] for one in states] if is_first else []
        merged["gradients"] = _added(gradients)
        windows = [one["window"] for one in states]
        merged["window"] = windows[0] and merged_windows(windows, is_first, scale)
        parked = [one["parked"] for one in states]
        merged["parked"] = {name: merged_parked([one[name] for one in parked], is_first) for name in parked[0]}
        return merged

    def _within_epoch(self) -> dict[str, Any]:
        """What is forgotten when an epoch is over."""
        window, named = self.training.window, dict(self.model.module.named_parameters())
        gradients = self.model.backend.gathered([one.grad for one in named.values()])
        return {
            "tracker": self.training.tracker.state_dict(),
            "window": None if window is None else window.state_dict(),
            "parked": {name: one.state_dict() for name, one in self._parked().items()},
            "gradients": {name: one for name, one in zip(named, gradients, strict=True) if one is not None},
            "size": self.training.size_of(self.position.epoch),
            "step": self.step.state_dict() if hasattr(self.step, "state_dict") else None,
        }

    def _go_on_within_epoch(self, state: Mapping[str, Any]) -> None:
        training, parameters = self.training, dict(self.model.module.named_parameters())
        open_windows(training, self.position.epoch)
        training.tracker.reset()
        training.tracker.load_state_dict(state["tracker"], training.device)
        saved = [state["gradients"].get(name) for name in parameters]
        taken_up = self.model.backend.taken_up(saved, [*parameters.values()])
        for parameter, gradient in zip(parameters.values(), taken_up, strict=True):
            parameter.grad = gradient
        if training.window is not None and state["window"] is not None:
            training.window.load_state_dict(state["window"])
        if state["step"] is not None and hasattr(self.step, "load_state_dict"):
            self.step.load_state_dict(state["step"])
        for name, parked in self._parked().items():
            parked.load_state_dict(state["parked"][name])

    @property
    def _trackers(self) -> tuple[Any, ...]:
        return self.training.tracker, self.model._evaluation_tracker

    def _parked(self) -> dict[str, Any]:
        updates = self.training.updates.items()
        return {name: update.parked for name, update in updates if update.parked is not None}

    def _say_what_is_inexact(self) -> None:
        """Once, when it first matters: within an epoch."""
        if self._has_said or not self.position.batch:
            return
        self._has_said = True
        metrics = [metric.name for _, metric in self.training.tracker.stateful if not metric.is_savable]
        reasons = [self.passes.data.caveat] if self.passes.data.caveat else []
        reasons += [f"the metric {name!r} has no state_dict: it begins anew" for name in metrics]
        for reason in reasons:
            warnings.warn(f"going on from within an epoch is not exact: {reason}.", stacklevel=2)


def _added(trees: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = {name for tree in trees for name in tree}
    return {name: sum(tree[name] for tree in trees if name in tree) for name in names}


def find_saved(resume: Any, callbacks: Sequence[Any], run: Run) -> tuple[dict[str, Any], str] | None:
    """The state to go on from, and the name of its file; `None` = there is none, a run begins.

    The callbacks have their part of it then.

    Args:
        resume: A path; `True` = the newest of the files of callbacks; `None` = the newest of those that are backups;
            `False` = none.
        run: The run that is to go on.
        callbacks: Those with `backups()` are always asked, those with `saved_files()` where `resume` is `True`.
    Raises:
        OSError: there is no such file.
        TypeError, ValueError: the file is damaged or something else; or no callback writes files to go on from.
    """
    saved = newest_saved(resume, callbacks, run.model.backend.collect)
    if saved is not None:
        refuse_incomplete(*saved)
        run.refuse_other(*saved)
        states = run.model.backend.parted(saved[0]["callbacks"], run.model.module)
        restore_callbacks(callbacks, saved[0] | {"callbacks": states})
    return saved


def newest_saved(resume: Any, callbacks: Sequence[Any], collect: Callable) -> tuple[dict[str, Any], str] | None:
    """As `find_saved`, which looks whether it is one to go on from: only what is in the file, and its name."""
    if isinstance(resume, (str, os.PathLike)):
        return read_any(resume), repr(str(resume))
    if resume is False:
        return None
    if resume is not None and resume is not True:
        raise TypeError(
            f"resume={resume!r} is a {type(resume).__name__}, expected the path of a file, or True, False or None."
        )
    files = [path for one in callbacks if hasattr(one, "backups") for path in one.backups()]
    if resume:
        _refuse_no_savers(callbacks)
        files += [path for one in callbacks if hasattr(one, "saved_files") for path in one.saved_files()]
    files = collect([str(path) for path in files if path.exists()])[0]  # rank 0 has written them
    return _first_readable(sorted({*map(Path, files)}, key=lambda path: path.stat().st_mtime_ns, reverse=True))


def _refuse_no_savers(callbacks: Sequence[Any]) -> None:
    if not any(hasattr(one, "backups") or hasattr(one, "saved_files") for one in callbacks):
        raise ValueError(
            "resume=True looks for files of the callbacks, none of which saves all of the state. Give a "
            "ModelCheckpoint or BackupAndRestore, or the path of a file."
        )


def _first_readable(files: Sequence[Path]) -> tuple[dict[str, Any], str] | None:
    for path in files:
        try:
            return read(path), repr(str(path))
        except ValueError as error:
            if path == files[-1]:
                raise ValueError(
                    f"the run would go on from what it has saved, but {error} Delete that file to begin anew."
                ) from error
            warnings.warn(f"{error} The run goes on from the one before.", stacklevel=2)
    return None
