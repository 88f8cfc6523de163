"""Where a module is cut into stages, and which parameters go with each.

The forward of the module is traced by `torch.fx` down to units, the submodules that it calls one after the other; a
stage is a run of them, a graph module that calls the same submodule objects. So the names in the whole module's
state_dict stay what they are, train and eval mode work, and any size of batch does. What is computed in one stage and
used in a later one crosses the cuts between them.

Stock `nn.Sequential`s are always gone into, other submodules where they are larger than a stage should be. A forward
that cannot be traced (it branches on values, or takes `*args`) is refused.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..structures import leaves, map_structure

REPEATS = 3  # of each unit when its time is taken; the shortest counts


@dataclass(frozen=True)
class Unit:
    """What no cut goes through: one call of a submodule and the functions up to the next call."""

    name: str
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Trace:
    """The forward of a module, unit by unit."""

    module: nn.Module
    inputs: tuple[fx.Node, ...]
    units: tuple[Unit, ...]
    output: fx.Node


class Stage(NamedTuple):
    """One stage in train or in eval mode.

    Attributes:
        graph: Takes inputs of the whole module, then what the stage before returned; returns a tuple, the last stage
            the output.
        arguments: Names of the inputs that it takes.
    """

    graph: fx.GraphModule
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Stages:
    """A module in stages.

    Attributes:
        training: The stages in train mode.
        evaluating: The same in eval mode; they differ where a forward reads `self.training`.
        units: Names of the units of each stage.
        stage_of: Name of a parameter or buffer -> its stage; of one that no stage uses 0.
    """

    training: tuple[Stage, ...]
    evaluating: tuple[Stage, ...]
    units: tuple[tuple[str, ...], ...]
    stage_of: dict[str, int]


def split(
    module: nn.Module,
    stages: int,
    x: Any,
    balance: str | Sequence[int | str] = "parameters",
    device: torch.device | str = "cpu",
    agree: Callable[[list[int]], list[int]] = lambda starts: starts,
) -> Stages:
    """Cuts a module into stages.

    Args:
        module: `nn.Sequential`, or a module whose forward `torch.fx` can trace.
        stages: How many, from 1 up.
        x: Inputs of a few samples: a tensor, a tuple of positional or a dict of named arguments. Their values matter
            only to `balance="time"`.
        balance: `"parameters"` (bytes of them, the largest stage as small as can be), `"time"` (of forward and
            backward, measured), or where stages begin but for the first: numbers or names of units.
        device: Where times are measured.
        agree: Gives all ranks the same starts, those of one of them: measured times differ.
    Raises:
        ValueError: it cannot be cut so: the forward cannot be traced, there are too few units, or stages share
            parameters.
        TypeError: a `balance` that is none of these.
    Example:
        >>> module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> split(module, 2, torch.zeros(1, 8)).units
        (('0', '1'), ('2', '3', '4'))
    """
    trace = _opened(module, stages, x, is_free=isinstance(balance, str))
    names = [unit.name for unit in trace.units]
    if len(names) < stages:
        raise ValueError(
            f"the module cannot be cut into {stages} stages: it calls {len(names)} submodules one after the other "
            f"({', '.join(names[:8]) or 'none'}). Give fewer stages, or write it as an nn.Sequential of smaller parts."
        )
    starts = agree(_starts(trace, stages, x, balance, torch.device(device)))
    ranges = [*zip(starts, [*starts[1:], len(names)], strict=True)]
    by_mode = {}
    for mode in (True, False):
        traced = _trace(module, x, frozenset(_containers(module, names)), mode)
        if [unit.name for unit in traced.units] != names:
            raise ValueError(
                "the module cannot be cut into stages: its forward calls other submodules in train mode than in eval "
                "mode. Move what depends on self.training into a submodule."
            )
        by_mode[mode] = tuple(_cut(traced, ranges))
    units = tuple(tuple(names[start:end]) for start, end in ranges)
    return Stages(by_mode[True], by_mode[False], units, _owners(module, by_mode[True]))


def bound(signature: inspect.Signature, x: Any) -> dict[str, Any]:
    """The inputs by the names of a forward's arguments, as `module(x)`, `module(*x)` or `module(**x)` gives them."""
    try:
        if isinstance(x, Mapping):
            return signature.bind(**x).arguments
        return signature.bind(*(x if isinstance(x, (tuple, list)) else (x,))).arguments
    except TypeError as error:
        raise ValueError(f"the inputs do not fit the module's forward{signature}: {error}.") from error


# Tracing.


class _Tracer(fx.Tracer):
    """Goes into stock sequentials and the modules named in `opened`."""

    def __init__(self, opened: frozenset[str]) -> None:
        super().__init__()
        self.opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not (_is_stock_sequential(m) or module_qualified_name in self.opened)


def _is_stock_sequential(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _opened(module: nn.Module, stages: int, x: Any, is_free: bool) -> Trace:
    """Traces, going into what is larger than a stage should be, as long as that can be traced too."""
    if _has_hooks(module):
        raise ValueError(
            "the module cannot be cut into stages: it has hooks on its whole forward, which no stage runs. Put them on "
            "submodules."
        )
    opened, closed = frozenset[str](), set[str]()
    trace = _trace(module, x, opened, module.training)
    while is_free:
        most = sum(map(_bytes, module.parameters())) / stages
        name = next((name for name in _large(trace, most) if name not in closed), None)
        if name is None:
            break
        try:
            trace = _trace(module, x, opened | {name}, module.training)
            opened |= {name}
        except ValueError:
            closed.add(name)
    return trace


def _large(trace: Trace, most: float) -> Iterator[str]:
    """Names of the user's own containers that have more bytes of parameters than a stage should."""
    for unit in trace.units:
        part = trace.module.get_submodule(unit.name)
        is_own = not type(part).__module__.startswith("torch.nn") and not _has_hooks(part)
        if is_own and any(part.children()) and sum(map(_bytes, part.parameters())) > most:
            yield unit.name


def _containers(module: nn.Module, units: Sequence[str]) -> Iterator[str]:
    """What was gone into: the modules around units."""
    for name in units:
        while "." in name:
            name = name.rpartition(".")[0]
            yield name


def _trace(module: nn.Module, x: Any, opened: frozenset[str], mode: bool) -> Trace:
    signature = inspect.signature(module.forward)
    given, arguments = bound(signature, x), signature.parameters
    if any(arguments[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) for name in given):
        raise ValueError(
            f"the module cannot be cut into stages: its forward{signature} takes any number of arguments. Name them."
        )
    fixed = {name: one.default for name, one in arguments.items() if name not in given and one.default is not one.empty}
    try:
        with _in_mode(module, mode), _len_of_proxies([module, *map(module.get_submodule, opened)]):
            graph = _Tracer(opened).trace(module, concrete_args=fixed)
    except Exception as error:  # of any kind: it is the user's forward that runs, on what is no tensor
        raise ValueError(
            f"the module cannot be cut into stages: the forward of {type(module).__name__} cannot be traced "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). Write it as an "
            f"nn.Sequential, or put what branches on values into a submodule."
        ) from error
    inputs = _only_given(graph, list(arguments), given)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    output = next(node for node in graph.nodes if node.op == "output")
    return Trace(module, inputs, tuple(_units(nodes)), output)


def _only_given(graph: fx.Graph, names: list[str], given: Mapping[str, Any]) -> tuple[fx.Node, ...]:
    """Drops the placeholders of arguments that have their default, with the checks that fx puts on them."""
    kept = []
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for name, node in zip(names, placeholders, strict=True):
        if name in given:
            node.target = name
            kept.append(node)
            continue
        for user in reversed([user for user in graph.nodes if _descends(user, node)]):
            graph.erase_node(user)
        graph.erase_node(node)
    return tuple(kept)


def _descends(node: fx.Node, ancestor: fx.Node) -> bool:
    return any(before is ancestor or _descends(before, ancestor) for before in node.all_input_nodes)


def _units(nodes: Sequence[fx.Node]) -> Iterator[Unit]:
    """Each begins with the call of a submodule; functions before the first go with it."""
    gathered: list[fx.Node] = []
    name = None
    for node in nodes:
        if node.op == "call_module" and name is not None:
            yield Unit(name, tuple(gathered))
            gathered = []
        if node.op == "call_module":
            name = node.target
        gathered.append(node)
    if name is not None:
        yield Unit(name, tuple(gathered))


@contextmanager
def _len_of_proxies(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Lets forwards ask for `len(x)`, which Python does not let stand for anything but a number."""
    tables = [getattr(type(module).forward, "__globals__", {}) for module in modules]
    tables = [*{id(table): table for table in tables if "len" not in table}.values()]
    for table in tables:
        table["len"] = lambda value: value.size(0) if isinstance(value, fx.Proxy) else len(value)
    try:
        yield
    finally:
        for table in tables:
            del table["len"]


@contextmanager
def _in_mode(module: nn.Module, mode: bool) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.train(mode)
    try:
        yield
    finally:
        for part, before in modes:
            part.training = before


# Cutting.


def _starts(trace: Trace, stages: int, x: Any, balance: Any, device: torch.device) -> list[int]:
    """Index of the first unit of each stage."""
    if not isinstance(balance, str):
        return _given_starts(trace, stages, balance)
    if balance == "parameters":
        return balanced(_sizes(trace), stages)
    if balance == "time":
        return balanced(_times(trace, x, device), stages)
    raise ValueError(f"balance={balance!r} is not known. Give 'parameters', 'time' or a list of where stages begin.")


def _given_starts(trace: Trace, stages: int, balance: Sequence[int | str]) -> list[int]:
    names = [unit.name for unit in trace.units]
    starts = [0]
    for point in balance:
        if isinstance(point, str) and point not in names:
            raise ValueError(f"balance names {point!r}, which is no unit. Units are {', '.join(names)}.")
        starts.append(names.index(point) if isinstance(point, str) else point)
    if len(starts) != stages or sorted(set(starts)) != starts or starts[-1] >= len(names):
        raise ValueError(
            f"balance={list(balance)!r} does not make {stages} stages of {len(names)} units. Give {stages - 1} numbers "
            f"or names of units, ascending, where the stages after the first begin."
        )
    return starts


def balanced(costs: Sequence[float], stages: int) -> list[int]:
    """Where to begin each of so many runs of costs so that the largest sum is as small as can be.

    Args:
        costs: At least one for each stage.
        stages: How many runs.
    Returns:
        Index of the first of each run, ascending from 0.
    Example:
        >>> balanced([5, 1, 1, 1, 4], 3)
        [0, 1, 3]

    Source: the linear partition problem, by dynamic programming; Skiena, "The Algorithm Design Manual", 8.5.
    """
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[k][end]: the largest sum, and where the last of k runs over the first `end` costs begins.
    best = [{end: (sums[end], 0) for end in range(1, len(costs) + 1)}]
    for runs in range(2, stages + 1):
        best.append(
            {
                end: min((max(best[-1][start][0], sums[end] - sums[start]), start) for start in range(runs - 1, end))
                for end in range(runs, len(costs) + 1)
            }
        )
    starts, end = [], len(costs)
    for table in reversed(best):
        end = table[end][1]
        starts.append(end)
    return starts[::-1]


def _cut(trace: Trace, ranges: Sequence[tuple[int, int]]) -> Iterator[Stage]:
    """A stage for each range of units: takes inputs, and what came before that it or later ones use."""
    crossing: list[fx.Node] = []
    for start, end in ranges:
        nodes = [node for unit in trace.units[start:end] for node in unit.nodes]
        later = {node for unit in trace.units[end:] for node in unit.nodes} | {trace.output}
        is_last = end == len(trace.units)
        # Inputs do not cross: each rank has the batch.
        inputs = _inputs_of(trace, nodes, is_last)
        leaving = [node for node in [*crossing, *nodes] if later & node.users.keys()]
        result = trace.output.args[0] if is_last else tuple(leaving)
        graph = _graph(trace.module, nodes, [*inputs, *crossing], result)
        yield Stage(graph, tuple(node.target for node in inputs))
        crossing = leaving


def _inputs_of(trace: Trace, nodes: Sequence[fx.Node], is_last: bool) -> list[fx.Node]:
    users = {*nodes, trace.output} if is_last else {*nodes}
    return [node for node in trace.inputs if users & node.users.keys()]


def _graph(module: nn.Module, nodes: Sequence[fx.Node], taken: Sequence[fx.Node], output: Any) -> fx.GraphModule:
    graph, copies = fx.Graph(), {}
    for node in taken:
        copies[node] = graph.placeholder(node.name)
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.map_arg(output, copies.__getitem__))
    return fx.GraphModule(module, graph, class_name="Stage")


def _owners(module: nn.Module, stages: Sequence[Stage]) -> dict[str, int]:
    """Name of each parameter and buffer -> its stage."""
    names = dict(named_tensors(module))
    stage_of: dict[int, int] = {}
    for index, stage in enumerate(stages):
        for _, tensor in named_tensors(stage.graph):
            if stage_of.setdefault(id(tensor), index) != index:
                shared = next(name for name, one in names.items() if one is tensor)
                raise ValueError(
                    f"{shared!r} is used in stages {stage_of[id(tensor)]} and {index}, but a parameter lives in one. "
                    f"Untie the weights, or give balance so that both uses are in one stage."
                )
    return {name: stage_of.get(id(tensor), 0) for name, tensor in names.items()}


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


# What units cost.


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _sizes(trace: Trace) -> list[float]:
    """Bytes of parameters of each unit, at least 1; of a parameter that several use, at the first."""
    seen: set[int] = set()
    sizes = []
    for unit in trace.units:
        size = 0
        for parameter in _parameters(trace, unit):
            size += _bytes(parameter) if id(parameter) not in seen else 0
            seen.add(id(parameter))
        sizes.append(max(size, 1))
    return sizes


def _parameters(trace: Trace, unit: Unit) -> Iterator[nn.Parameter]:
    for node in unit.nodes:
        if node.op == "call_module":
            yield from trace.module.get_submodule(node.target).parameters()
        elif node.op == "get_attr" and isinstance(value := _attribute(trace.module, node.target), nn.Parameter):
            yield value


def _attribute(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _times(trace: Trace, x: Any, device: torch.device) -> list[float]:
    """Seconds of forward and backward of each unit, one at a time on the device; nothing changes."""
    given = bound(inspect.signature(trace.module.forward), x)
    values: dict[fx.Node, Any] = {node: _moved(given[node.target], device) for node in trace.inputs}
    times = []
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"), torch.enable_grad():
        for unit in trace.units:
            part = trace.module.get_submodule(unit.name)
            home = next((tensor.device for _, tensor in named_tensors(part)), device)
            with unchanged(part):
                part.to(device)
                times.append(min(_time(trace, unit, values, device) for _ in range(REPEATS)))
                part.to(home)
    return times


def _time(trace: Trace, unit: Unit, values: dict[fx.Node, Any], device: torch.device) -> float:
    """Seconds of one forward and backward of a unit, whose results are left in `values`, without their graph."""
    _wait_for(device)
    begin = time.perf_counter()
    for node in unit.nodes:
        values[node] = _run(trace.module, node, values, device)
    out = [leaf for node in unit.nodes for leaf in leaves(values[node]) if isinstance(leaf, Tensor)]
    out = [leaf for leaf in out if leaf.requires_grad]
    into = [parameter for parameter in _parameters(trace, unit) if parameter.requires_grad]
    if out and into:
        torch.autograd.grad(out, into, [torch.ones_like(leaf) for leaf in out], allow_unused=True)
    _wait_for(device)
    seconds = time.perf_counter() - begin
    for node in unit.nodes:
        # Needs a gradient again, so that the next unit's backward goes through all of it, as in training.
        values[node] = map_structure(_cut_off, values[node])
    return seconds


def _run(module: nn.Module, node: fx.Node, values: Mapping[fx.Node, Any], device: torch.device) -> Any:
    args, kwargs = (fx.map_arg(given, values.__getitem__) for given in (node.args, node.kwargs))
    if node.op == "call_module":
        return module.get_submodule(node.target)(*args, **kwargs)
    if node.op == "get_attr":
        return _moved(_attribute(module, node.target), device)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)


def _cut_off(leaf: Any) -> Any:
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _moved(tree: Any, device: torch.device) -> Any:
    return map_structure(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Buffers are after it what they were before: running statistics, say."""
    before = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, values in before:
            # By .data: a graph that saved the buffer does not see a change of what it never reads.
            buffer.data.copy_(values)
