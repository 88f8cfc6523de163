"""Which parameters a name or pattern means: `"backbone"`, `"backbone.*"`, `"*.bias"`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is the name of the parameter or module, of a module around it, or a glob of either."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def parameters_of(module: nn.Module, patterns: Iterable[str], argument: str) -> dict[str, nn.Parameter]:
    """The parameters that any of the patterns means, by name.

    Args:
        module: Whose parameters are looked through.
        patterns: Names of parameters or submodules, or globs of them.
        argument: How messages call the patterns.
    Raises:
        TypeError: a pattern that is no text.
        ValueError: no pattern, or one that means no parameter.
    """
    patterns = list(patterns)
    if not patterns:
        raise ValueError(f"{argument} was given no name or pattern. Give one, or '*' for all.")
    found: dict[str, nn.Parameter] = {}
    # A parameter that several modules share is that of each of them, but is found once.
    known = dict(module.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}={pattern!r} is a {type(pattern).__name__}, expected a name or pattern.")
        meant = {name: parameter for name, parameter in known.items() if matches(name, pattern)}
        if not meant:
            raise ValueError(f"{argument}={pattern!r} is the name or pattern of no parameter. {_hint(module, pattern)}")
        there = set(map(id, found.values()))
        for name, parameter in meant.items():
            if id(parameter) not in there:
                there.add(id(parameter))
                found[name] = parameter
    return found


def _hint(module: nn.Module, pattern: str) -> str:
    modules = [name for name, _ in module.named_modules() if name]
    if any(matches(name, pattern) for name in modules):
        return "What it fits has none; name the module around it."
    close = difflib.get_close_matches(pattern, [*modules, *dict(module.named_parameters())], n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Submodules are {', '.join(modules[:8]) or 'none'}."


def norms_inside(module: nn.Module, parameters: Iterable[nn.Parameter], patterns: Iterable[str]) -> list[nn.Module]:
    """Layers with running statistics that a pattern means, if their own parameters are all among `parameters`.

    Args:
        module: Whose submodules are looked through.
        parameters: The frozen ones, by these patterns or others.
        patterns: Names or globs of the layers, or of parameters of theirs: one without parameters is told by its name.
    """
    frozen = {id(parameter) for parameter in parameters}
    found = []
    for name, part in module.named_modules():
        if getattr(part, "running_mean", None) is None:
            continue
        own = dict(part.named_parameters(prefix=name, recurse=False))
        is_meant = any(matches(one, pattern) for one in (name, *own) for pattern in patterns)
        if is_meant and frozen.issuperset(map(id, own.values())):
            found.append(part)
    return found
