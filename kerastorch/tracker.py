"""Running sums of losses and metrics on the device; the one read of an epoch happens when somebody looks.

A step only keeps what it computed. Every so many steps the kept batches are joined and turned into sums in one go: the
cost of a metric is a few operations per `MAX_PENDING` steps instead of a few per step, and the sums are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .history import Logs
from .losses import Loss, OwnLoss, SumOfLosses
from .metrics import Mean, Stateful, Sums
from .structures import detached, map_structure

# Batches kept before they are summed: at most so many, and at most so many output values (1 MB of float32) together,
# so that large outputs, say of a language model, are summed at once and never kept.
MAX_PENDING = 64
MAX_PENDING_VALUES = 2**18


class Tracker:
    """The running means of one epoch, or of one evaluation.

    Args:
        loss: What the losses given to `add` came from: says by `masks` and `units` what they are means over.
        metrics: Pairs of the key of an output (`None` = the only one) and a `Mean` or `Stateful`.
        ranks: The backend: has the device where the sums are kept, and adds up those of several processes.
    """

    def __init__(self, loss: Loss | SumOfLosses | Any, metrics: list[tuple[Any, Mean | Stateful]], ranks: Any) -> None:
        self.loss, self.ranks = loss, ranks
        self.means = [(key, metric) for key, metric in metrics if isinstance(metric, Mean)]
        self.stateful = [(key, metric) for key, metric in metrics if isinstance(metric, Stateful)]
        self.names = [metric.name for _, metric in metrics]
        self._has_parts, self._has_latest = isinstance(loss, SumOfLosses), not isinstance(loss, Loss)
        self._has_weighted = any(metric.is_weighted for _, metric in self.means)
        self.joins = all(metric.joins for _, metric in metrics) and not self._has_parts and not self._has_weighted
        # Sums in float64: in float32 a count stops growing at 2**24 samples. MPS has no float64.
        self.dtype = torch.float32 if ranks.device.type == "mps" else torch.float64
        # XLA would compile a program for each number of batches; within the program of the step sums cost nothing.
        self._max_pending = 1 if ranks.device.type == "xla" else MAX_PENDING
        for _, metric in self.stateful:
            metric.place(ranks)
        self.measures = bool(metrics)
        self._keeps_outputs = self.measures or not isinstance(loss, OwnLoss)  # which tells by the targets what it masks
        self.expect()
        self.reset()

    def keys(self) -> list[str]:
        """Names that the results will have."""
        parts = [f"{name}_loss" for name in self.loss.parts] if self._has_parts else []
        keys = ["loss", *parts, *self.names]
        for _, one in self.stateful:
            names = one.metric.keys() if hasattr(one.metric, "keys") else ()  # a MetricCollection has its own
            keys += [f"{one.prefix}{name}" for name in names]
        return keys

    def expect(self) -> None:
        """Measures the next batch at once, so that a metric that does not fit the data fails before any training."""
        self.is_unproven = True

    def reset(self) -> None:
        """Forgets everything: a new epoch begins."""
        self.samples = 0
        # Never changed in place, only replaced: logs handed out earlier go on reading the state of their own moment.
        self._sums: tuple[Sums, ...] | None = None
        self.logged: dict[str, Sums] = {}
        self._heard: dict[str, Sums] = {}
        self._pending: list[tuple] = []
        self._shape, self._batch_samples, self._capacity = None, 0, 1
        for _, metric in self.stateful:
            metric.reset()

    def add(self, loss: Tensor | tuple, output: Any, target: Any, samples: int, weight: Any = None) -> None:
        """Takes in one batch.

        Args:
            loss: Its mean loss, a scalar that was computed just now; or what `values_of` made of one computed before.
            output: What the module returned.
            target: Its targets.
            samples: How many rows it has.
            weight: Their weights.
        """
        if self.ranks.part.samples == 0:  # one of another process's is here in the place of none
            samples = 0
        if self._keeps_outputs:
            # Without its graph, so that keeping the output keeps no activations.
            output = output.detach() if type(output) is Tensor else map_structure(detached, output)
            shape = (output.shape, target.shape) if type(output) is type(target) is Tensor else None
        else:
            output, shape = None, None if type(target) is dict else (None, getattr(target, "shape", None))
        if samples != self._batch_samples or shape != self._shape:
            self._flush()
            self._shape, self._batch_samples = shape, samples
            self._capacity = self._capacity_for(target if output is None else output)
        self.samples += samples
        if isinstance(loss, tuple) or (self._has_latest and self.loss.latest):
            loss, terms = loss if isinstance(loss, tuple) else self.values_of(loss)
            for name, term in terms.items():
                self.log(name, term, samples)
        self._pending.append((loss.detach(), output, target, weight if self._has_weighted else None))
        if len(self._pending) >= self._capacity or self.is_unproven:
            self._flush()
            self.is_unproven = False

    def hear(self, loss: Tensor, samples: int) -> None:
        """Takes in the mean loss of a batch that another process has measured: for the logs of batches alone."""
        total, count = self._heard.get("loss", (0.0, 0))
        self._heard = {"loss": (total + loss * samples, count + samples)}
        self.samples += samples

    def values_of(self, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss just computed, or its parts stacked where there are several; and the module's own terms."""
        if self._has_parts:
            return torch.stack([*self.loss.latest.values()]), {}
        return loss, self.loss.latest if self._has_latest else {}

    def log(self, name: str, value: Tensor | float, samples: int) -> None:
        """Takes in a value of one's own: the mean of `samples` samples."""
        value = value.detach().to(self.dtype) if isinstance(value, Tensor) else value
        total, count = self.logged.get(name, (0.0, 0))
        self.logged = self.logged | {name: (total + value * samples, count + samples)}

    def _capacity_for(self, kept: Any) -> int:
        if self._shape is None or not self.joins or (kept is not None and kept.ndim == 0):
            return 1
        values = 1 if kept is None else kept.numel()
        return max(1, min(self._max_pending, MAX_PENDING_VALUES // max(values, 1)))

    @property
    def has_batches(self) -> bool:
        """Whether `add` was called since `reset`."""
        return self._sums is not None or bool(self._pending)

    def logs(self, others: dict[str, Any]) -> Logs:
        """The means so far, read from the device when somebody looks, and `others` behind them."""
        sums, pending, number, samples = self._sums, self._pending, len(self._pending), self._batch_samples
        logged = self.logged | self._heard

        def read() -> dict[str, float]:
            # Means can be read without summing: in which portions they are summed is not to depend on who looks.
            if self.stateful and self._pending is pending and len(pending) == number:
                self._flush()
                return self._read(self._sums, logged) | others
            return self._read(_add(sums, self._measure(pending[:number], samples)) if number else sums, logged) | others

        return Logs(read)

    def result(self) -> dict[str, Any]:
        """The means of everything added since `reset`, by all processes: the one read of an epoch."""
        self._flush()
        return self.ranks.announce(self._read(*self._of_all(self._sums, self.logged), of_all=True))

    def means_so_far(self) -> dict[str, Any]:
        """The means so far, of all processes, which must ask together; read at once, and nothing is summed for it."""
        if self.stateful:
            return self.result()
        pending = self._pending
        sums = _add(self._sums, self._measure(pending, self._batch_samples)) if pending else self._sums
        return self.ranks.announce(self._read(*self._of_all(sums, self.logged), of_all=True))

    def take(self) -> tuple[Sums, ...] | None:
        """Sums of what was added since the last call, of this process, for `losses_of`; nothing is read."""
        self._flush()
        sums, self._sums = self._sums, None
        return sums

    def losses_of(self, taken: Sequence[tuple[Sums, ...] | None]) -> list[float | None]:
        """The mean loss of each `take`, of all processes, which must ask together: one read for all of them.

        `None` = it is of nothing, say of targets that are all masked.
        """
        if not taken:
            return []
        number = len(self.loss.parts) if self._has_parts else 1
        pairs = [pair for sums in taken for pair in (sums or [(0.0, 0)] * number)[:number]]
        of_all = self.ranks.sum([value for pair in pairs for value in pair])
        values = torch.stack([torch.as_tensor(one, dtype=self.dtype, device=self.ranks.device) for one in of_all])
        counts = values[1::2].reshape(len(taken), number)
        means = values[::2].reshape(len(taken), number) / counts
        if self._has_parts:
            means = means * torch.tensor([*self.loss.weights.values()], dtype=self.dtype, device=means.device)
        self.ranks.cut()
        read = torch.stack([means.sum(1), counts.amin(1)], 1).tolist()
        return self.ranks.announce([mean if count else None for mean, count in read])

    def state_dict(self) -> dict[str, Any]:
        """All that was taken in since `reset`, as it is kept: tensors and plain data."""
        return {
            "sums": self._sums,
            "pending": list(self._pending),
            "shape": self._shape,
            "batch_samples": self._batch_samples,
            "capacity": self._capacity,
            "samples": self.samples,
            "logged": dict(self.logged),
            "stateful": [metric.state_dict() for _, metric in self.stateful],
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Goes on from a state of the same loss and metrics."""
        state = map_structure(lambda leaf: _brought(leaf, device), dict(state))
        self._sums, self._pending = state["sums"], list(state["pending"])
        self._shape, self._batch_samples, self._capacity = state["shape"], state["batch_samples"], state["capacity"]
        self.samples, self.logged = state["samples"], state["logged"]
        for (_, metric), saved in zip(self.stateful, state["stateful"], strict=True):
            metric.load_state_dict(saved, device)
        self.is_unproven = self.is_unproven and not self.has_batches  # else sums would be of other portions

    def merged(self, states: Sequence[Mapping[str, Any]], is_first: bool) -> dict[str, Any]:
        """The state for one of another number of processes: what all took in goes to the first of them, summed up."""
        self.reset()
        empty = self.state_dict()
        if not is_first:
            return empty
        found: list[dict[str, Any]] = []
        for state in states:
            self.reset()
            self.load_state_dict(state, self.ranks.device)
            self._flush()
            found.append(copy.deepcopy(self.state_dict()))
        self.reset()
        sums = [one["sums"] for one in found if one["sums"] is not None]
        logged = [one["logged"] for one in found]
        counted = zip(*(one["stateful"] for one in found), strict=True)
        return empty | {
            "sums": reduce(_add, sums) if sums else None,
            "logged": {name: reduce(_plus, [one[name] for one in logged if name in one]) for name in logged[0]},
            "samples": sum(one["samples"] for one in found),
            "stateful": [metric.merged(of) for (_, metric), of in zip(self.stateful, counted, strict=True)],
        }

    @torch.no_grad()
    def _flush(self) -> None:
        if self._pending:
            pending, self._pending = self._pending, []
            self._sums = _add(self._sums, self._measure(pending, self._batch_samples))
            for _, output, target, _ in _joined(pending):
                for key, metric in self.stateful:
                    metric.update(_at(output, key), _at(target, key), counts=self._batch_samples > 0)

    def _of_all(self, sums: tuple[Sums, ...] | None, logged: dict[str, Sums]) -> tuple:
        """Sums and what was logged, of all processes."""
        pairs = [*(sums or ()), *logged.values()]
        values = self.ranks.sum([value for pair in pairs for value in pair])
        pairs = [*zip(values[::2], values[1::2], strict=True)]
        number = len(pairs) - len(logged)
        return tuple(pairs[:number]) or None, dict(zip(logged, pairs[number:], strict=True))

    def _measure(self, pending: list[tuple], samples: int) -> tuple[Sums, ...]:
        """Sums and counts of batches of one shape: the losses' first, then each `Mean`'s."""
        sums = self._loss_sums(pending, samples)
        for _, output, target, weight in _joined(pending):
            sums += [
                metric.function(_at(output, key), _at(target, key), _weight_at(weight, key, metric))
                for key, metric in self.means
            ]
        if not samples:  # of one in the place of none
            return tuple((torch.zeros_like(total, dtype=self.dtype), 0) for total, _ in sums)
        return tuple((total.to(self.dtype), number) for total, number in sums)

    def _loss_sums(self, pending: list[tuple], samples: int) -> list[Sums]:
        if self._has_parts:  # one at a time
            (losses, output, target, _), keys = pending[0], self.loss.keys
            return [
                _loss_sum(loss, value[None].to(self.dtype), output[keys[name]], [target[keys[name]]], samples)
                for value, (name, loss) in zip(losses, self.loss.parts.items(), strict=True)
            ]
        losses = torch.stack([loss for loss, *_ in pending]).to(self.dtype)
        return [_loss_sum(self.loss, losses, pending[0][1], [target for _, _, target, _ in pending], samples)]

    def _read(self, sums: tuple[Sums, ...] | None, logged: dict[str, Sums], of_all: bool = False) -> dict[str, Any]:
        self.ranks.cut()
        own = _means(logged)
        if sums is None:
            return own
        totals = torch.stack([total for total, _ in sums]).tolist()
        counts = [count.tolist() if isinstance(count, Tensor) else count for _, count in sums]
        means = [total / count if count else float("nan") for total, count in zip(totals, counts, strict=True)]
        number = len(means) - len(self.means)
        losses, measures = means[:number], means[number:]
        values: dict[str, Any] = {"loss": losses[0]}
        if self._has_parts:
            weights = self.loss.weights.values()
            values = {"loss": sum(mean * weight for mean, weight in zip(losses, weights, strict=True))}
            values |= {f"{name}_loss": mean for name, mean in zip(self.loss.parts, losses, strict=True)}
        of_metrics = zip(self.means, measures, strict=True)
        measured = {metric.name: metric.finish(mean) for (_, metric), mean in of_metrics}
        for _, metric in self.stateful:
            measured.update(metric.result(of_all))
        return values | own | _in_order(measured, self.names)


def _means(logged: dict[str, Sums]) -> dict[str, float]:
    """Means of what was logged, in one read from the device."""
    on_device = {name: total.reshape(()) for name, (total, _) in logged.items() if isinstance(total, Tensor)}
    read = dict(zip(on_device, torch.stack([*on_device.values()]).tolist(), strict=True)) if on_device else {}
    counts = {name: count.item() if isinstance(count, Tensor) else count for name, (_, count) in logged.items()}
    return {
        name: read.get(name, total) / counts[name] if counts[name] else float("nan")
        for name, (total, _) in logged.items()
    }


def _loss_sum(loss: Any, losses: Tensor, output: Tensor, targets: list[Tensor], samples: int) -> Sums:
    if not loss.masks(output, targets[0]):
        return losses.sum() * samples, samples * len(losses)
    # Each batch counts as often as it has targets that are not masked; one that has none has no loss.
    units = loss.units(torch.stack(targets))
    return torch.where(units > 0, losses * units, 0.0).sum(), units.sum()


def _in_order(values: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values} | values


def _add(sums: tuple[Sums, ...] | None, more: tuple[Sums, ...]) -> tuple[Sums, ...]:
    if sums is None:
        return more
    return tuple(map(_plus, sums, more))


def _plus(one: Sums, other: Sums) -> Sums:
    return one[0] + other[0], one[1] + other[1]


def _joined(pending: list[tuple]) -> list[tuple]:
    if len(pending) == 1:
        return pending
    _, outputs, targets, _ = zip(*pending, strict=True)
    return [(None, *(None if part[0] is None else torch.cat(part) for part in (outputs, targets)), None)]


def _at(tree: Any, key: Any) -> Any:
    return tree if key is None else tree[key]


def _weight_at(weight: Any, key: Any, metric: Mean) -> Any:
    if not metric.is_weighted:
        return None
    return weight if isinstance(weight, Tensor) else None if weight is None else _at(weight, key)


def copies(metrics: list[tuple[Any, Mean | Stateful]]) -> list[tuple[Any, Mean | Stateful]]:
    """The same metrics with states of their own: training and validation never count into one another."""
    return [(key, copy.deepcopy(metric) if isinstance(metric, Stateful) else metric) for key, metric in metrics]


def _brought(leaf: Any, device: torch.device) -> Any:
    """To a device; not what has a shape alone."""
    return leaf.to(device) if isinstance(leaf, Tensor) and not leaf.is_meta else leaf
