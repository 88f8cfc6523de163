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
        ValueError: a pattern that means none.
    """
    found: dict[str, nn.Parameter] = {}
    known = dict(module.named_parameters())
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}={pattern!r} is a {type(pattern).__name__}, expected a name or pattern.")
        meant = {name: parameter for name, parameter in known.items() if matches(name, pattern)}
        if not meant:
            modules = [name for name, _ in module.named_modules() if name]
            close = difflib.get_close_matches(pattern, [*modules, *known], n=1, cutoff=0.5)
            hint = f"Did you mean {close[0]!r}?" if close else f"Submodules are {', '.join(modules[:8]) or 'none'}."
            raise ValueError(f"{argument}={pattern!r} is the name or pattern of no parameter. {hint}")
        found |= meant
    return found


def norms_inside(module: nn.Module, parameters: Iterable[nn.Parameter], patterns: Iterable[str]) -> list[nn.Module]:
    """Layers with running statistics whose own parameters are all among `parameters`, or which a pattern names.

    Args:
        module: Whose submodules are looked through.
        parameters: The frozen ones.
        patterns: The patterns they were frozen by: a norm without parameters is told by its name alone.
    """
    frozen = {id(parameter) for parameter in parameters}
    found = []
    for name, part in module.named_modules():
        if getattr(part, "running_mean", None) is None:
            continue
        own = [id(parameter) for parameter in part.parameters(recurse=False)]
        is_named = any(matches(name, pattern) for pattern in patterns)
        if frozen.issuperset(own) and (own or is_named):
            found.append(part)
    return found
