"""Runs of `fit` of which nothing is left: weights, optimizers, random numbers, data and callbacks are as they were."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..callbacks.base import SIGNALS
from ..samples import generators_in
from ..untouched import parts_of, sources_of, untouched


@contextmanager
def rehearsing(model: Any, *data: Any, on_host: bool = False) -> Iterator[Callable[[], None]]:
    """Whatever is done with a model within, `fit` above all, it and its data are afterwards as they were.

    Args:
        model: A `kerastorch.Model`.
        data: What it is given.
        on_host: Whether copies of its weights are kept in the host's memory, all of the device's being needed.
    Yields:
        What puts all back at once.
    """
    states = [part for update in model.updates.values() for part in _of_update(update)]
    compiled = model._compiled
    states += [] if compiled is None or compiled.scaler is None else [compiled.scaler]
    states += [one for tracker in (model._training_tracker, model._evaluation_tracker) for one in _metrics(tracker)]
    attributes = [part for one in (*data, model.backend) for part in sources_of(one)]
    generators, options = generators_in([*data, model.module]), {"device": model.backend.device, "on_host": on_host}
    with (
        _workers_of_its_own(attributes),
        untouched([*parts_of(model), *states], attributes, generators, **options) as undo,
    ):
        yield undo


@contextmanager
def _workers_of_its_own(sources: Iterable[Any]) -> Iterator[None]:
    """Workers that a loader keeps alive, with random numbers that nobody can put back, wait meanwhile."""
    kept = [(one, one._iterator) for one in sources if isinstance(one, DataLoader)]
    try:
        for loader, _ in kept:
            loader._iterator = None
        yield
    finally:
        for loader, workers in kept:
            loader._iterator = workers


def fit_quietly(model: Any, data: Any, y: Any, **options: Any) -> None:
    """`fit` without a word; a signal that would have ended it early ends the search that it is part of."""
    # Not the one of a subclass, which may call the search.
    own = next(one for one in type(model).__mro__ if one.__module__ == f"{__package__.partition('.')[0]}.model")
    model._finds_lr = False  # with `lr="auto"` each of them would find a rate first
    with warnings.catch_warnings():  # they come again in the run that is to follow
        warnings.simplefilter("ignore")
        history = own.fit(model, data, y, verbose=0, **options)
    if history.stopped_by == "interrupt":
        raise KeyboardInterrupt
    if history.stopped_by in SIGNALS:
        signal.raise_signal(signal.Signals[history.stopped_by])


def without_schedules(model: Any) -> None:
    """Has rates stay where they are, or where somebody puts them; within a rehearsal."""
    compiled = model._compiled
    compiled._schedules.update(dict.fromkeys(compiled._schedules))  # of optimizers that a lazy module has still to get
    for update in model.updates.values():
        update.schedule = None


def _of_update(update: Any) -> list[Any]:
    schedule = update.schedule
    return [update, update.optimizer, update.scaled_step, schedule, getattr(schedule, "_scheduler", None)]


def _metrics(tracker: Any) -> list[Any]:
    """Metrics with a state of their own, and the objects behind them."""
    of = [] if tracker is None else [metric for _, metric in tracker.stateful]
    return [part for metric in of for part in (metric, metric.metric) if part is not None]


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was asked for."""
    if device.type == "xla":
        import torch_xla

        torch_xla.sync()
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
