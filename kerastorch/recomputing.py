"""`checkpoint_activations`: which submodules keep no activations for backward, but compute them again there.

Recomputing a part costs its forward pass once more, and saves what lies between its inputs and its outputs. Here is
decided which parts that is worth it for, and what must hold for the result to be the same: random numbers, autocast and
buffers in the second pass are those of the first. The rest is `torch.utils.checkpoint`.
"""

from __future__ import annotations

import difflib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy as has_no_shape_yet
from torch.utils.checkpoint import checkpoint

from .patterns import matches

ARGUMENT = "checkpoint_activations"
Slot = tuple[nn.Module, str]  # where a buffer is: in which module, by what name
EXPECTED = (
    "True for the repeated blocks, names or patterns of submodules such as 'encoder.layers.*', or classes of them"
)


@contextmanager
def recomputed(module: nn.Module, what: Any) -> Iterator[None]:
    """While it holds, the chosen parts of `module` compute their activations again in backward, if in train mode.

    Gradients, dropout and running statistics are those of a run without. Parameters, names and classes stay as they
    are, and copies or pickles made meanwhile are of the plain module. Hooks of a part run once; those of layers inside
    it, and what else its forward does besides changing buffers (counting in Python, a cache for generation), twice.
    On a TPU dropout is the same in both passes; from the second step on it is another one than in a run without.

    Args:
        module: Whose parts these are. Changed in place, and as before afterwards.
        what: As in `parts_to_recompute`.
    Raises:
        ValueError, TypeError: as `parts_to_recompute`.
    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Dropout(0.1))
        >>> net = nn.Sequential(block(), block(), nn.Linear(8, 1))
        >>> with recomputed(net, True):
        ...     net(torch.rand(4, 8)).sum().backward()
        >>> net[0][0].weight.grad.shape
        torch.Size([8, 8])

    Source: "Training Deep Nets with Sublinear Memory Cost", Chen et al. 2016; `torch.utils.checkpoint`.
    """
    parts = [part for part in parts_to_recompute(module, what).values() if not _is_held(part)]
    is_lazy = any(parameter.device.type == "xla" for parameter in module.parameters())
    for part in parts:
        part.__dict__["forward"] = _Recomputing(part, is_lazy)
    try:
        yield
    finally:
        for part in parts:
            part.__dict__["forward"].let_go()


def parts_to_recompute(module: nn.Module, what: Any) -> dict[str, nn.Module]:
    """The parts that `what` means, by name. Of those that lie in one another, the outermost.

    Args:
        module: Whose submodules are looked through. It is no part itself: all at once would save nothing.
        what: `True` = the repeated blocks: every instance of the classes of which `nn.ModuleList`s and
            `nn.Sequential`s hold at least two that have several layers, such as the layers of a Transformer or the
            bottlenecks of a ResNet; where there are none, of those that occur twice anywhere. A name or pattern of
            submodules, as in `freeze`; a class; or a list or tuple of names, patterns and classes. `False` or `None` =
            nothing.
    Raises:
        ValueError: nothing fits.
        TypeError: `what` is nothing of these, or means a TorchScript module.
    Example:
        >>> net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 3, enable_nested_tensor=False)
        >>> list(parts_to_recompute(net, True))
        ['layers.0', 'layers.1', 'layers.2']
        >>> list(parts_to_recompute(net, ["layers.0", nn.Dropout]))
        ['layers.0', 'layers.1.dropout', 'layers.1.dropout1', 'layers.1.dropout2', 'layers.2.dropout', \
'layers.2.dropout1', 'layers.2.dropout2']
    """
    refuse_unknown(what)
    if what is None or what is False:
        return {}
    known = {name: part for name, part in module.named_modules(remove_duplicate=False) if name and _runs(part)}
    if what is True:
        return _outermost(_repeated_blocks(module, known))
    found = {}
    for one in what if isinstance(what, (list, tuple)) else [what]:
        found |= _meant(module, known, one)
    parts = _outermost({name: part for name, part in known.items() if name in found})
    for name, part in parts.items():
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(
                f"{ARGUMENT}={what!r} means {name!r}, a module of TorchScript, whose forward cannot be replaced. Name "
                f"the module around it, or the parts that are plain modules."
            )
    return parts


def refuse_unknown(what: Any) -> None:
    """What can be known of `checkpoint_activations` without a module.

    Raises:
        TypeError: it is neither a bool, a name, a class of modules nor a list of these.
        ValueError: an empty list.
    """
    if what is None or isinstance(what, bool):
        return
    several = what if isinstance(what, (list, tuple)) else [what]
    if not several:
        raise ValueError(f"{ARGUMENT}={what!r} names nothing. Give {EXPECTED}; or False.")
    for one in several:
        if not isinstance(one, str) and not _is_class(one):
            raise TypeError(f"{ARGUMENT} was given {one!r}, a {type(one).__name__}. Give {EXPECTED}.")


def _is_class(one: Any) -> bool:
    return isinstance(one, type) and issubclass(one, nn.Module)


def _runs(part: nn.Module) -> bool:
    """Whether it is called: an `nn.ModuleList` is not, those in it are."""
    return isinstance(part, torch.jit.ScriptModule) or type(part).forward is not nn.Module.forward


def _meant(module: nn.Module, known: dict[str, nn.Module], one: str | type) -> dict[str, nn.Module]:
    """The submodules that one pattern or class means."""
    if not isinstance(one, str):
        found = {name: part for name, part in known.items() if isinstance(part, one)}
        if not found:
            kinds = sorted({type(part).__name__ for part in known.values()})
            raise ValueError(
                f"{ARGUMENT}={one.__name__} is the class of no submodule. There are {', '.join(kinds) or 'none'}."
            )
        return found
    found = {name: part for name, part in known.items() if matches(name, one)}
    if not found:
        if any(matches(name, one) for name, _ in module.named_parameters()):
            hint = "It fits parameters; name the module that has them."
        else:
            close = difflib.get_close_matches(one, list(known), n=1, cutoff=0.6)
            hint = f"Did you mean {close[0]!r}?" if close else f"Submodules are {_listed(known)}."
        raise ValueError(f"{ARGUMENT}={one!r} is the name or pattern of no submodule. {hint}")
    return found


def _listed(known: dict[str, nn.Module]) -> str:
    return ", ".join(list(known)[:8]) + (", ..." if len(known) > 8 else "") if known else "none"


def _outermost(parts: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Without those inside of others, and each once whatever the number of its names."""
    inside = {id(inner) for part in set(parts.values()) for inner in part.modules() if inner is not part}
    first = {id(part): name for name, part in reversed(parts.items())}
    return {name: part for name, part in parts.items() if id(part) not in inside and first[id(part)] == name}


def _repeated_blocks(module: nn.Module, known: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The parts that `True` means; `parts_to_recompute` says which."""
    blocks = {name: part for name, part in known.items() if _has_several_layers(part)}
    rows = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    in_rows = {
        name: part for name, part in blocks.items() if isinstance(module.get_submodule(name.rpartition(".")[0]), rows)
    }
    for found in (in_rows, blocks):
        repeated = {kind for kind, count in Counter(map(type, set(found.values()))).items() if count > 1}
        own = repeated - {nn.Sequential}  # in those there are others
        if own:
            return {name: part for name, part in blocks.items() if type(part) in own}
        if repeated:
            return {name: part for name, part in found.items() if _is_row_of_layers(part)}
    raise ValueError(
        f"{ARGUMENT}=True found no repeated blocks: no class of submodules with several layers occurs twice. There "
        f"are {_listed(known)}. Name those to compute again, e.g. {ARGUMENT}={next(iter(known), 'encoder')!r}."
    )


def _has_several_layers(part: nn.Module) -> bool:
    """One layer alone saves little else than its input, which is saved for recomputing it, too."""
    is_script = isinstance(part, torch.jit.ScriptModule)
    return not is_script and sum(not any(True for _ in inner.children()) for inner in part.modules()) > 1


def _is_row_of_layers(part: nn.Module) -> bool:
    return type(part) is nn.Sequential and not any(type(inner) is nn.Sequential for inner in part.children())


def _is_held(part: nn.Module) -> bool:
    """By a run around this one."""
    return isinstance(part.__dict__.get("forward"), _Recomputing)


class _Recomputing:
    """Stands where a part's `forward` is looked up, which is inside of its hooks.

    As an attribute of the instance it changes neither class nor names. Copied or pickled it is what it stands for.
    """

    def __init__(self, part: nn.Module, is_lazy: bool) -> None:
        self.part, self.had_own = part, "forward" in part.__dict__
        self.inner = tuple(part.modules())
        self.is_lazy = is_lazy
        self.forward: Callable = part.forward
        functools.update_wrapper(self, self.forward, updated=())  # for those who ask for its arguments

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if not (self.part.training and torch.is_grad_enabled()):
            return self.forward(*inputs, **named)
        # All by position: torch knows device and autocast from these, and some names are its own arguments.
        run, given = self._passes(tuple(named)), (*inputs, *named.values())
        if self.is_lazy:
            return checkpoint(_on_xla(run, self.part, given), use_reentrant=False)
        return checkpoint(run, *given, use_reentrant=False)

    def _passes(self, names: tuple[str, ...]) -> Callable:
        """What is called first in the forward pass, and then for each recomputation of it."""
        forward, buffers = self.forward, _Buffers(self.inner)

        def run(*given: Any) -> Any:
            positional = len(given) - len(names)
            inputs, named = given[:positional], dict(zip(names, given[positional:], strict=True))
            if torch.compiler.is_compiling():  # there a change of a buffer is part of the graph, and happens once
                return forward(*inputs, **named)
            with buffers.pass_begins():
                return forward(*inputs, **named)

        return run

    def let_go(self) -> None:
        """The part is as it was."""
        if self.had_own:
            self.part.__dict__["forward"] = self.forward
        else:
            del self.part.__dict__["forward"]

    def __reduce__(self) -> tuple:
        return functools.partial, (self.forward,)


def _on_xla(run: Callable, part: nn.Module, given: tuple) -> Callable:
    """The passes on torch_xla's tensors, of whose random numbers and autocast torch's checkpoint knows nothing.

    Source: `torch_xla.utils.checkpoint`, which needs inputs with gradients and outputs that are plain tensors.
    """
    import torch_xla.core.xla_model as xla

    first = []

    def run_lazily() -> Any:
        if not first:
            first[:] = xla.get_rng_state(), torch.is_autocast_enabled("xla"), torch.get_autocast_dtype("xla")
            return run(*given)
        seed, enabled, dtype = first
        # Else the compiler would see that it has these values already, and keep them instead.
        xla.optimization_barrier_([*filter(torch.is_tensor, given), *part.parameters(), *part.buffers()])
        with xla.fork_rng(), torch.autocast("xla", dtype, enabled):
            xla.set_rng_state(seed)
            return run(*given)

    return run_lazily


class _Buffers:
    """Those of one part in one forward pass and its recomputations.

    These begin with what the first pass began with, as a power iteration goes on from there, and what they change is
    lost: else running statistics would move twice.

    Args:
        modules: The part and all in it.
    """

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        self.modules, self.is_first = modules, True
        self.before: dict[Slot, Tensor] = {}  # those that the first pass has changed

    def pass_begins(self) -> AbstractContextManager[None]:
        """The first one, or one of the others."""
        is_first, self.is_first = self.is_first, False
        return self._watched() if is_first else self._replaced()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        copies = _Copies()
        started = {slot: (buffer, buffer._version, copies.of(buffer)) for slot, buffer in self._slots()}
        yield
        for slot, buffer in self._slots():
            original, version, before = started.get(slot, (buffer, buffer._version, None))
            if buffer is not original or buffer._version != version:
                self.before[slot] = before

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        originals, copies = self._slots(), _Copies()
        try:
            # All of them: torch's norms change theirs without a trace in `_version`, but read none of them in training.
            for (module, name), buffer in originals:
                module._buffers[name] = copies.of(self.before.get((module, name), buffer))
            yield
        finally:
            for (module, name), buffer in originals:
                module._buffers[name] = buffer

    def _slots(self) -> list[tuple[Slot, Tensor]]:
        return [
            ((module, name), buffer)
            for module in self.modules
            for name, buffer in module._buffers.items()
            if buffer is not None and not has_no_shape_yet(buffer)
        ]


class _Copies:
    """One of each tensor, so that what two modules share is still shared."""

    def __init__(self) -> None:
        self._made: dict[int, Tensor] = {}

    def of(self, buffer: Tensor) -> Tensor:
        if id(buffer) not in self._made:
            self._made[id(buffer)] = buffer.detach().clone().requires_grad_(buffer.requires_grad)
        return self._made[id(buffer)]
