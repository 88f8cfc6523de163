"""Arguments of the verbs: refused early, in one sentence, before anything has changed."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn

from .callbacks.base import hooks_of
from .structures import named_leaves


def refuse_nonpositive(**arguments: Any) -> None:
    """Each argument must be an int of at least 1, or `None`."""
    for name, value in arguments.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}, expected a whole number. Give 1 or more.")
        if value < 1:
            raise ValueError(f"{name}={value} is less than 1. Give a whole number from 1 up.")


def refuse_no_batch_size(batch_size: Any, validation_batch_size: Any) -> None:
    """Each must be an int of at least 1, or `None`; that of training may be "auto"."""
    is_auto = isinstance(batch_size, str) and batch_size == "auto"
    refuse_nonpositive(batch_size=None if is_auto else batch_size, validation_batch_size=validation_batch_size)


def refuse_no_split(split: Any) -> None:
    """`validation_split` must be a fraction."""
    if isinstance(split, bool) or not isinstance(split, Real) or not 0 <= split < 1:
        raise ValueError(
            f"validation_split={split!r} is not a fraction. Give a number from 0 up to but not including 1, "
            f"e.g. 0.1 for the last tenth."
        )


def refuse_class_weight(class_weight: Any) -> None:
    """It must map class indices to weights."""
    if class_weight is None:
        return
    pairs = class_weight.items() if isinstance(class_weight, Mapping) else ()
    if not pairs or not all(isinstance(i, Integral) and i >= 0 and isinstance(w, Real) for i, w in pairs):
        raise ValueError(f"class_weight={class_weight!r} is not {{class index: weight}}, such as {{0: 1.0, 1: 5.0}}.")


def refuse_accumulation(accumulate: Any, microbatch: Any, tbptt_steps: int | None, has_own_step: bool) -> None:
    """`accumulate` must be a count or counts by epoch, from epoch 0 on; `microbatch` a count, "auto" or `None`."""
    if isinstance(accumulate, Mapping):
        counts = [*accumulate.values()]
        if 0 not in accumulate:
            raise ValueError(
                f"accumulate={dict(accumulate)} says nothing about epoch 0. Give the first epochs a number of batches "
                f"too, e.g. {{0: 1, ...}}."
            )
        if not all(is_count(epoch, least=0) for epoch in accumulate):
            raise ValueError(f"accumulate={dict(accumulate)} has keys that are no epochs. Count them from 0.")
    else:
        counts = [accumulate]
    if not all(map(is_count, counts)):
        raise ValueError(
            f"accumulate={accumulate!r} is no number of batches for a step. Give a whole number from 1 up, or "
            f"{{epoch: number}}."
        )
    if microbatch is not None and microbatch != "auto" and not is_count(microbatch):
        raise ValueError(
            f"microbatch={microbatch!r} is no number of samples. Give a whole number from 1 up, or 'auto'."
        )
    _refuse_pieces(tbptt_steps, has_own_step, accumulate, microbatch)


def refuse_halving(microbatch: Any, backend: Any) -> None:
    """On a TPU memory runs out long after the forward pass that took it."""
    if microbatch == "auto" and backend.passes_are_common:
        raise ValueError(
            "microbatch='auto' halves what does not fit into one rank's memory, and all ranks of FSDP must go through "
            "the module as often. Give a number of samples."
        )
    if microbatch == "auto" and backend.device.type == "xla":
        raise ValueError("microbatch='auto' cannot find out what fits into a TPU. Give a number of samples.")


def is_count(value: Any, least: int = 1) -> bool:
    """Whether it is a whole number from `least` up."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def size_at(accumulate: int | Mapping[int, int], epoch: int) -> int:
    """Batches for each optimizer step in this epoch."""
    if isinstance(accumulate, Mapping):
        return accumulate[max(start for start in accumulate if start <= epoch)]
    return accumulate


def _largest(accumulate: int | Mapping[int, int]) -> int:
    return max(accumulate.values()) if isinstance(accumulate, Mapping) else accumulate


def _refuse_pieces(tbptt_steps: int | None, has_own_step: bool, accumulate: Any, microbatch: Any) -> None:
    """Steps that are not made of whole batches cannot be gathered or cut."""
    gathers = _largest(accumulate) > 1
    if tbptt_steps is not None and (gathers or microbatch is not None):
        given = f"accumulate={accumulate!r}" if gathers else f"microbatch={microbatch!r}"
        raise ValueError(
            f"{given} does not go with tbptt_steps={tbptt_steps}, where each piece of a batch is a step of its own. "
            f"Give larger or smaller batches instead."
        )
    if has_own_step and microbatch is not None:
        raise ValueError(
            f"microbatch={microbatch!r} cannot cut a batch that your own train_step works on. Give a smaller "
            f"batch_size and accumulate={accumulate if gathers else 2}."
        )


def refuse_gathering(optimizer: str, accumulate: int | Mapping[int, int], microbatch: Any) -> None:
    """An optimizer that evaluates the loss again needs the batch whole, and at once."""
    if _largest(accumulate) > 1 or microbatch is not None:
        raise ValueError(
            f"{optimizer} evaluates the loss several times a step, which does not go with accumulate or microbatch. "
            f"Give a larger batch_size, or another optimizer."
        )


def refuse_combinations(compiled: Any, jit: Any, has_own_step: bool, has_own_loss: bool) -> None:
    """What `compile` was given must fit what is overridden."""
    if not compiled.is_single and not has_own_step:
        raise ValueError(
            "optimizer is a dict of several, but nothing says which loss is whose. Override train_step(self, batch) "
            "and call self.backward(loss) and self.optimizer_step(name) in it, or give one optimizer."
        )
    overridden = "train_step" if has_own_step else "compute_loss"
    if (has_own_step or has_own_loss) and jit:
        raise ValueError(
            f"jit={jit!r} compiles the module and the loss of compile, but {overridden} is overridden. Call "
            f"torch.compile on what is slow in it, e.g. self.module.compile()."
        )
    if (has_own_step or has_own_loss) and compiled.tbptt_steps is not None:
        raise ValueError(
            f"tbptt_steps={compiled.tbptt_steps} cuts sequences for the loss of compile, but {overridden} is "
            f"overridden. Cut them there, or give compile a loss."
        )


def refuse_unable(backend: Any, *used: tuple[str, Any]) -> None:
    """Pairs of what there is to use, as the backend's `unable` has it, and whether it is used."""
    for name, is_used in used:
        if is_used and name in backend.unable:
            raise ValueError(f"{name} does not go with backend={type(backend).__name__}: {backend.unable[name]}.")


def refuse_no_number(name: str, value: Any) -> None:
    """What is logged must be a number or a tensor of one."""
    is_number = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)
    if not is_number:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"log was given {what} as {name!r}, expected a number or a scalar tensor. Log its mean.")


def refuse_unlike(targets: Any, validation_targets: Any) -> None:
    """Targets of training and validation must have one structure and, samples aside, one shape."""
    if targets is None or validation_targets is None:
        return
    ours, theirs = dict(named_leaves(targets, "y")), dict(named_leaves(validation_targets, "y"))
    if set(ours) != set(theirs):
        raise ValueError(
            f"validation targets are {sorted(theirs)}, training targets {sorted(ours)}: expected the same."
        )
    for name, tensor in ours.items():
        other = theirs[name]
        if isinstance(tensor, Tensor) and tensor.ndim != other.ndim:
            raise ValueError(
                f"validation targets {name} have shape {tuple(other.shape)}, training targets {tuple(tensor.shape)}: "
                f"expected the same number of dimensions."
            )


def refuse_second_pass(validated: Any, taken: Any, is_repeated: bool) -> None:
    """A generator of validation data cannot be gone through again after the next epoch."""
    if is_repeated and validated is not None and not validated.repeats and not taken.goes_on:
        raise ValueError(
            "validation_data is a generator, which ends after the first of several validations. "
            "Give validation_steps, a list, or a callable that makes a new one each time."
        )


def refuse_unknown_monitors(callbacks: list[Any], names: list[str], is_validated: bool) -> None:
    """What callbacks watch, or put into file names, must be among the names that the logs will have.

    A callback sees what those before it put into the logs; behind one of which that is not known, nothing can be said.
    """
    known = names + [f"val_{name}" for name in names if is_validated]
    for callback in callbacks:
        seen = names if getattr(callback, "reads_batches", False) else known
        refuse_unknown_monitor(callback, seen, is_validated)
        for name in getattr(callback, "keys_needed", ()):
            names_files = f"the files of {type(callback).__name__} are named after"
            _refuse_unknown_name(names_files, name, seen, is_validated, "epoch", "batch", "step")
        added = getattr(callback, "adds_to_logs", None)
        if added is None and hooks_of([callback]).on_epoch_end:
            return
        known = known + [name for name in added or () if name not in known]


def refuse_unknown_monitor(one: Any, known: list[str], is_validated: bool) -> None:
    """What a callback or a schedule monitors must be known; Keras's checkpoints may have a monitor for nothing."""
    monitor = getattr(one, "monitor", None)
    if isinstance(monitor, str) and getattr(one, "save_best_only", True):
        _refuse_unknown_name(f"{type(one).__name__} monitors", monitor, known, is_validated)


def _refuse_unknown_name(who: str, name: str, known: list[str], is_validated: bool, *others: str) -> None:
    if name in known:
        return
    close = difflib.get_close_matches(name, [*known, *others], n=1, cutoff=0.6)
    remedy = "Give one of these, add the metric to compile, or put the callback that logs it first."
    hint = f"Did you mean {close[0]!r}?" if close else remedy
    without = "" if is_validated else " (val_ names need validation_data)"
    raise ValueError(f"{who} {name!r}, but the logs will have {', '.join(known)}{without}. {hint}")


def refuse_no_forward(module: nn.Module) -> None:
    """A validation calls the module where `compute_loss` is not overridden."""
    if type(module).forward is nn.Module.forward:
        raise ValueError(
            f"validation needs a loss, but {type(module).__name__} has no forward and compute_loss is not overridden. "
            f"Override compute_loss(self, batch), or give the module a forward."
        )


def refuse_two_averages(callbacks: list[Any]) -> None:
    """Of several averages only one can be left in the module."""
    names = [type(callback).__name__ for callback in callbacks if getattr(callback, "leaves_average", False)]
    if len(names) > 1:
        raise ValueError(
            f"callbacks {' and '.join(names)} would each leave their average in the module. Give one of them, or "
            f"EMA(swap=False), which leaves the module alone."
        )


def refuse_lost_weights(callbacks: list[Any]) -> None:
    """Of an average and the best weights, the later one in the list would take the place of the other in the module."""
    restoring = [index for index, one in enumerate(callbacks) if getattr(one, "restore_best_weights", False)]
    for index, average in enumerate(callbacks):
        if not restoring or not getattr(average, "leaves_average", False):
            continue
        kinds = type(average).__name__, type(callbacks[restoring[0]]).__name__
        if not getattr(average, "serves_validation", False):
            raise ValueError(
                f"{kinds[0]} leaves its average in the module, and {kinds[1]} its best weights: one of them would be "
                f"lost. Give restore_best_weights=False."
            )
        if index > restoring[0]:
            raise ValueError(
                f"{kinds[0]} comes after {kinds[1]} and would overwrite the weights that it restores. Give {kinds[0]} "
                f"first: the best average is restored then."
            )


def refuse_shared_files(callbacks: list[Any]) -> None:
    """Of two callbacks that write to the same files, one that deletes some would delete those of the other."""
    paths = [os.path.normpath(one.filepath) if hasattr(one, "filepath") else None for one in callbacks]
    for index, (path, callback) in enumerate(zip(paths, callbacks, strict=True)):
        if getattr(callback, "save_top_k", None) is not None and path in paths[:index] + paths[index + 1 :]:
            raise ValueError(
                f"two callbacks write to {path!r}, and {type(callback).__name__}(save_top_k=...) deletes files there. "
                f"Give each names of its own."
            )


def refuse_resumed_dry_run(resume: Any, dry_run: Any) -> None:
    """A dry run begins where the model is.

    Raises:
        ValueError: it is to go on with another run.
    """
    if resume and dry_run:
        raise ValueError(f"resume={resume!r} and dry_run={dry_run!r} were both given. Try the run out without resume.")
