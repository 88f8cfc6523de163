"""Checks of the module and its optimizers as they are, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .findings import Finding, counted, several
from .layers import ROOT
from .seen import Seen


def not_compiled(seen: Seen) -> Iterator[Finding]:
    if seen.compiled is None:
        yield Finding(
            "note",
            "not-compiled",
            "model",
            "Loss, targets, gradients, metrics and monitors were not checked, since compile was not called.",
            'Call e.g. model.compile("adam", "cross_entropy") first.',
        )


def broken_weights(seen: Seen) -> Iterator[Finding]:
    tensors = [*seen.module.named_parameters(), *seen.module.named_buffers()]
    if broken := [name for name, tensor in tensors if is_broken(tensor)]:
        yield Finding(
            "error",
            "weights-not-finite",
            several(broken),
            f"{len(broken)} of {len(tensors)} parameters and buffers hold NaN or infinity.",
            "Load or initialize them again; after a run that diverged, give a lower lr or clip=1.0 to compile.",
        )


def frozen_parameters(seen: Seen) -> Iterator[Finding]:
    named = dict(seen.module.named_parameters())
    frozen = {name for name, parameter in named.items() if not parameter.requires_grad}
    if frozen and len(frozen) < len(named):  # that nothing can be trained is an error of its own
        yield Finding(
            "note",
            "frozen-parameters",
            several(covering(seen.module, frozen)),
            f"{len(frozen)} of {len(named)} parameters are frozen and will keep their values.",
            "Call model.unfreeze with their names if they should be trained.",
        )


def frozen_norms(seen: Seen) -> Iterator[Finding]:
    """BatchNorm whose parameters were frozen by hand: its statistics go on changing."""
    moving = []
    for name, part in _trained_parts(seen).items():
        own = list(part.parameters(recurse=False))
        if getattr(part, "running_mean", None) is not None and own and not any(one.requires_grad for one in own):
            moving.append(name)
    if moving:
        yield Finding(
            "note",
            "frozen-norms-move",
            several(moving),
            f"fit goes on changing the statistics of {counted(len(moving), 'BatchNorm layer')} with frozen parameters.",
            f"Freeze them by model.freeze({moving[0]!r}), which keeps the statistics too.",
        )


def eval_mode(seen: Seen) -> Iterator[Finding]:
    parts = _trained_parts(seen)
    quiet = [name for name, part in parts.items() if not part.training]
    if quiet:
        yield Finding(
            "note",
            "eval-mode",
            ROOT if ROOT in quiet else several(quiet),
            f"{len(quiet)} of {counted(len(parts), 'module')} in eval mode: fit trains in train mode and puts it back.",
            "Call model.freeze with their names if their BatchNorm statistics should stay.",
        )


def foreign_parameters(seen: Seen) -> Iterator[Finding]:
    own = set(map(id, seen.module.parameters()))
    for name, update in seen.model.updates.items():
        given = update.in_groups()
        if strangers := sum(id(parameter) not in own for parameter in given):
            yield Finding(
                "error",
                "foreign-parameters",
                _optimizer(name),
                f"{strangers} of the {len(given)} parameters that it optimizes are not the module's.",
                "Call compile again: a layer was replaced after it, and the optimizer still has the old one's.",
            )


def parameters_without_optimizer(seen: Seen) -> Iterator[Finding]:
    known = {id(parameter) for update in seen.model.updates.values() for parameter in update.in_groups()}
    named = {name: one for name, one in seen.module.named_parameters() if one.requires_grad}
    missing = {name for name, parameter in named.items() if id(parameter) not in known}
    if known and missing:
        yield Finding(
            "note" if seen.overrides("train_step") else "warning",
            "not-in-optimizer",
            several(covering(seen.module, missing)),
            f"{len(missing)} of {len(named)} trainable parameters are in no optimizer and will keep their values.",
            "Make the optimizer of all of module.parameters(); or freeze them, if that is meant.",
        )


def parameters_twice(seen: Seen) -> Iterator[Finding]:
    for name, update in seen.model.updates.items():
        given = update.in_groups()
        if twice := len(given) - len(set(map(id, given))):
            yield Finding(
                "warning",
                "duplicate-parameters",
                _optimizer(name),
                f"It has {twice} of its {counted(len(given), 'parameter')} twice, and steps on them twice.",
                "Give each parameter once: module.parameters() has shared ones once.",
            )


def shared_memory(seen: Seen) -> Iterator[Finding]:
    """Two parameters in one place: tied by their values, where the parameter itself was meant to be shared."""
    places: dict[tuple, list[str]] = {}
    for name, one in seen.module.named_parameters():
        if one.requires_grad and _has_memory(one):
            places.setdefault((one.device, one.data_ptr()), []).append(name)
    for names in places.values():
        if len(names) > 1:
            yield Finding(
                "warning",
                "shared-memory",
                several(names),
                "They are parameters of their own in the same memory, which the optimizer steps on for each.",
                "Share the parameter itself: b.weight = a.weight, without data or detach.",
            )


def double_precision(seen: Seen) -> Iterator[Finding]:
    double = {name for name, one in seen.module.named_parameters() if one.dtype is torch.float64}
    if double and (seen.compiled is None or seen.compiled.precision.weights is not torch.float64):
        yield Finding(
            "note",
            "float64-weights",
            several(covering(seen.module, double)),
            f"{counted(len(double), 'parameter')} in float64: twice the memory, and much slower on most devices.",
            'Call module.float(), or say that it is meant by compile(precision="64").',
        )


CHECKS = (
    not_compiled,
    broken_weights,
    frozen_parameters,
    frozen_norms,
    eval_mode,
    foreign_parameters,
    parameters_without_optimizer,
    parameters_twice,
    shared_memory,
    double_precision,
)


def is_broken(tensor: Tensor) -> bool:
    """Whether it has NaN or infinity."""
    if is_lazy(tensor) or tensor.is_meta or not tensor.is_floating_point():
        return False
    return not bool(torch.isfinite(tensor.coalesce().values() if tensor.is_sparse else tensor).all())


def covering(module: nn.Module, names: set[str], prefix: str = "") -> list[str]:
    """The largest submodules whose parameters are all among `names`, and the parameters left over."""
    own = [name for name, _ in module.named_parameters(prefix=prefix)]
    if own and names.issuperset(own):
        return [prefix or ROOT]
    left = [name for name, _ in module.named_parameters(prefix=prefix, recurse=False) if name in names]
    for child_name, child in module.named_children():
        left += covering(child, names, f"{prefix}.{child_name}".lstrip("."))
    return left


def _trained_parts(seen: Seen) -> dict[str, nn.Module]:
    """The modules, but those that `model.freeze` keeps in eval mode."""
    kept = {id(part) for one in seen.model._frozen for part in one.modules()}
    return {name or ROOT: part for name, part in seen.module.named_modules() if id(part) not in kept}


def _optimizer(name: str) -> str:
    return f"optimizer {name!r}" if name else "optimizer"


def _has_memory(parameter: Tensor) -> bool:
    if is_lazy(parameter) or parameter.is_meta or parameter.is_sparse or not parameter.numel():
        return False
    return parameter.data_ptr() != 0  # as of one that several processes hold in parts
