"""FSDP: each rank holds a part of every parameter, its gradient and its optimizer state, or of the latter alone.

torch's `fully_shard` does the former: the parameters become DTensors, whole ones are gathered group by group as the
forward and backward passes need them, and gradients are averaged and scattered as soon as they are there. They are so
after each batch, those of a step that takes several too: gathered in parts they cost memory for a part alone, their sum
is the same, and a step may come after any batch. With `shard="optimizer"` all is as with DDP but for the step itself,
which each rank makes for some of the parameters and sends them to the others (`owners.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..recomputing import parts_to_recompute
from .ddp import DDP
from .owners import Owners
from .ranks import GPUS

AUTO_PARAMETERS = 100_000  # a layer with fewer is gathered with what is around it
LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Of these torch's fused kernels take parts; others, and Rprop's for many tensors, take whole ones alone.
FUSED_IN_PARTS = (torch.optim.Adam, torch.optim.AdamW)
NOT_SHARED_OUT = (torch.optim.LBFGS,)  # all parameters are one vector
NOT_IN_PARTS = (*NOT_SHARED_OUT, torch.optim.Adafactor)  # which has means over rows and columns
SHARDS = ("parameters", "optimizer")


class FSDP(DDP):
    """Data parallelism for modules that one device has no room for: each process holds a part of every parameter.

    Under `torchrun` each process runs the script, and the module's parameters are parts from the `Model` on. Without
    it, `fit`, `evaluate` and `predict` start the processes of this machine themselves; the module of the calling
    process stays whole, and gets the weights back. What is saved is whole, and fits any number of processes.

    The module must be called as a whole, or by what `wrap` names, and by all processes: on one of them alone
    `model(x)` waits for the others until `timeout_s` is over.

    Args:
        devices: As in `DDP`.
        num_nodes: As in `DDP`.
        wrap: What is gathered at once; the more parts, the less memory and the more messages. `"auto"` = each layer in
            an `nn.Sequential` or `nn.ModuleList` with 100,000 parameters or more; a class of modules, or a tuple of
            classes; a number = submodules with at least so many parameters; names or globs of submodules; `None` = all
            at once. Default: `"auto"`.
        precision: What parameters are gathered and computed in: `None` = as they are, `"bf16"`, with gradients that are
            averaged in float32, or a `torch.distributed.fsdp.MixedPrecisionPolicy`. Default: `None`.
        offload: Whether parts are kept, and the optimizer steps, in the memory of the host; on GPUs. Default: `False`.
        shard: `"parameters"`, with their gradients and optimizer state, or `"optimizer"`, its state alone: then all
            else is as with `DDP`. Default: `"parameters"`.
        weights: As in `DDP`.
        checkpoint_activations: As in `DDP`.
        timeout_s: As in `DDP`.
        max_restarts: As in `DDP`.
    Raises:
        ValueError, TypeError: an argument that is none of these; or as in `DDP`. When the module is placed: nothing is
            what `wrap` names, or it is lazy.

    Source: Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel"; Rajbhandari et al.
    2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models".
    """

    def __init__(
        self,
        devices: str | int | Sequence[int] = "auto",
        num_nodes: int | None = None,
        *,
        wrap: Any = "auto",
        precision: Any = None,
        offload: bool = False,
        shard: str = "parameters",
        checkpoint_activations: Any = None,
        weights: str | Sequence[float] | None = None,
        timeout_s: float = 600.0,
        max_restarts: int = 0,
    ) -> None:
        if shard not in SHARDS:
            raise ValueError(f"shard={shard!r} is not known. Give 'parameters', or 'optimizer' for its state alone.")
        if shard == "optimizer" and (wrap != "auto" or precision is not None or offload):
            raise ValueError(
                "shard='optimizer' leaves the parameters whole, and wrap, precision and offload are about parts of "
                "them. Leave these out, or give shard='parameters'."
            )
        if not isinstance(offload, bool):
            raise ValueError(f"offload={offload!r} is neither True nor False. Give one of them.")
        _refuse_no_wrap(wrap)
        self.wrap, self.shard, self.offload = wrap, shard, offload
        self._options = {"mp_policy": _mixed(precision)}
        self._roots: list[nn.Module] = []
        self._mark: Callable[[str, Tensor], Any] | None = None
        self._marks: dict[str, Tensor] = {}
        self._dtypes: list[torch.dtype] | None = None
        self._owners: Owners | None = None
        super().__init__(
            devices,
            num_nodes,
            weights=weights,
            checkpoint_activations=checkpoint_activations,
            timeout_s=timeout_s,
            max_restarts=max_restarts,
        )
        if offload and not any(torch.get_device_module(kind).device_count() for kind in GPUS):
            raise ValueError(
                "offload=True keeps parts in the memory of the host, where they are without a GPU. Leave it out."
            )

    @property
    def passes_are_common(self) -> bool:
        return self._has_parts

    @property
    def _has_parts(self) -> bool:
        return self.is_joined and self.shard == "parameters"

    # Where it runs.

    def place(self, module: nn.Module) -> nn.Module:
        """Shards the module in place; as it is, it never is on this rank's device as a whole."""
        if not self._has_parts:
            return super().place(module)
        parts_to_recompute(module, self.checkpoint_activations)
        if any(map(is_lazy, module.parameters())):
            raise ValueError(
                "the module is lazy: its parameters are made by the first batch, and cannot be sharded before. Call it "
                "on a batch before it is given to Model."
            )
        if not any(map(_is_part, module.parameters())):
            self._send_from_first([*module.parameters(), *module.buffers()])
            self._shard(module)
        self._roots, self._dtypes = _roots(module), None
        return module.to(self.device) if not self.offload else module

    def _shard(self, module: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

        options = {"mesh": init_device_mesh(self.device.type, (self.world,)), **self._options}
        if self.offload:
            options["offload_policy"] = CPUOffloadPolicy()
        # torch shards none without dimensions: they stay whole, and are averaged as with DDP.
        options["ignored_params"] = {one for one in module.parameters() if one.ndim == 0}
        for part in groups(module, self.wrap):
            fully_shard(part, **options)
        for root in _roots(module):  # after a forward pass alone torch leaves its own parameters whole
            root.register_forward_hook(_reshard_without_graph)

    # What holds during a run.

    @contextmanager
    def running(self, module: nn.Module) -> Iterator[None]:
        self._begin()
        with super().running(module):
            yield

    def by_itself(self) -> AbstractContextManager:
        return nullcontext()

    def _begin(self) -> None:
        """Before the first forward pass, which torch makes plans for."""
        from torch.distributed.fsdp import fully_shard

        dtypes = [one.dtype for root in self._roots for one in root.parameters()]
        if self._dtypes is not None and dtypes != self._dtypes:
            raise ValueError(
                f"the module's parameters were {_named(self._dtypes)} and are {_named(dtypes)}, which FSDP cannot "
                f"change once the module has run. Make it anew, and compile it so from the beginning."
            )
        self._dtypes = dtypes
        for root in self._roots:  # else a part of it that is called by itself first would take itself for the root
            fully_shard.state(root)._lazy_init()

    def alone(self, function: Callable) -> Callable:
        run = super().alone(function)
        return self._in_parts(run) if self._has_parts else run

    def _in_parts(self, run: Callable) -> Callable:
        """Whatever happens in it, the parameters are parts again afterwards."""

        def in_parts(*inputs: Any, **named: Any) -> Any:
            try:
                returned = run(*inputs, **named)
            except Exception as error:
                for root in self._roots:
                    getattr(root, "reset_iter_state", root.reshard)()  # torch before 2.13 has the latter alone
                if "mixed torch.Tensor and DTensor" in str(error):
                    raise RuntimeError(
                        f"a parameter was used outside of the call of what it is gathered for, where a process has a "
                        f"part of it alone ({error}). Call the module as a whole, or have FSDP(wrap=...) name the "
                        f"submodules that are called by themselves."
                    ) from error
                raise
            for root in self._roots:
                root.reshard()
            return returned

        return in_parts

    def network(self, module: nn.Module) -> Callable:
        return module if self._has_parts else super().network(module)

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Those of parts are averaged already, by their backward passes."""
        super().average([one for one in parameters if not _is_part(one)] if self._has_parts else parameters)

    def _wrap(self, has_all: bool) -> None:
        if not self._has_parts:
            super()._wrap(has_all)

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        name = type(optimizer).__name__
        if isinstance(optimizer, NOT_SHARED_OUT if self.shard == "optimizer" else NOT_IN_PARTS):
            raise ValueError(
                f"{name} looks at more at once than a process has with FSDP(shard={self.shard!r}). Give backend=DDP(), "
                f"or another optimizer."
            )
        for group in optimizer.param_groups if self._has_parts else ():
            if group.get("fused") and not isinstance(optimizer, FUSED_IN_PARTS):
                group.update(fused=False, foreach=True)
            if isinstance(optimizer, torch.optim.Rprop):
                group["foreach"] = False
        if self.is_joined and self.shard == "optimizer":
            self._owners = self._owners or Owners(self.rank, self.world)
            self._owners.adopt(optimizer)

    # What is saved.

    def whole(self, tree: Any) -> Any:
        if not self._has_parts:
            return tree
        if _is_part(tree):
            return self._marked(tree.detach()) if self._mark else tree.detach().full_tensor().cpu()
        if isinstance(tree, dict):
            made = copy.copy(tree)  # with the versions of its layers, which a module's state has
            made.update({key: self.whole(value) for key, value in tree.items()})
            return made
        return type(tree)(map(self.whole, tree)) if isinstance(tree, (list, tuple)) else tree

    @contextmanager
    def apart(self, mark: Callable[[str, Tensor], Any]) -> Iterator[dict[str, Tensor]]:
        self._mark, self._marks = mark, {}
        try:
            yield self._marks
        finally:
            self._mark = None

    def _marked(self, part: Tensor) -> Any:
        name = f"part-{len(self._marks)}"
        self._marks[name] = part
        return self._mark(name, part)

    def parted(self, tree: Any, module: nn.Module) -> Any:
        return _parted(tree, module.state_dict(keep_vars=True)) if self._has_parts else tree

    def state(self, of: nn.Module | torch.optim.Optimizer) -> dict[str, Any]:
        if self._has_parts:  # before anything that all must take part in
            self.collect(None, "what puts its state together")
        with self._saying_who_is_missed():
            state = super().state(of)
        if self._owners is not None and isinstance(of, torch.optim.Optimizer):
            for other in self.collect(_on_host(state["state"])):
                state["state"].update(other)
        return state

    def load(self, into: nn.Module | torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        super().load(into, self.parted(state, into) if isinstance(into, nn.Module) else self._own_part(into, state))

    def _own_part(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        if self._owners is not None:
            return {**state, "state": self._owners.own_of(optimizer, state["state"])}
        if not self._has_parts:
            return {**state}
        numbered = [one for group in optimizer.param_groups for one in group["params"]]
        parts = {
            number: {name: _part_of(value, numbered[number]) for name, value in one.items()}
            for number, one in state["state"].items()
        }
        return {**state, "state": parts}

    def gathered(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Those of parts are means over all processes: whole, they are the sum, which the first one has for all."""
        if not self._has_parts:
            return gradients
        whole = [one.detach().full_tensor().cpu() if _is_part(one) else None for one in gradients]
        of_parts = [one * self.world if one is not None and self.rank == 0 else None for one in whole]
        return [part if _is_part(one) else one for part, one in zip(of_parts, gradients, strict=True)]

    def taken_up(self, gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        own = super().taken_up(gradients, parameters)
        if not self._has_parts:
            return own
        has_gradient = self._of_any([one is not None for one in own])
        for index, parameter in enumerate(parameters):
            if has_gradient[index] and _is_part(parameter):
                own[index] = self._mean_in_parts(own[index], parameter)
        return own

    def _mean_in_parts(self, gradient: Tensor | None, parameter: nn.Parameter) -> Tensor:
        total = torch.zeros(parameter.shape, dtype=parameter.dtype, device=self.device)
        if gradient is not None:
            total.copy_(gradient)
        dist.all_reduce(total)
        return _part_of(total / self.world, parameter)


# Parts.


def _is_part(value: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _reshard_without_graph(root: Any, *_: Any) -> None:
    if not torch.is_grad_enabled():
        root.reshard()


def _part_of(value: Any, like: Tensor) -> Any:
    """A whole tensor in parts as those of `like`; what has another shape, each process has as a whole."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    if not isinstance(value, Tensor) or not _is_part(like) or value.ndim == 0:
        return value
    mesh = like.device_mesh
    placements = like.placements if value.shape == like.shape else [Replicate()] * mesh.ndim
    # Each process has it, and cuts its part out of it.
    parts = distribute_tensor(value.detach().to(mesh.device_type), mesh, placements, src_data_rank=None)
    return parts.to(like.device)


def _parted(tree: Any, named: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        made = copy.copy(tree)
        for key, value in tree.items():
            is_named = isinstance(value, Tensor) and key in named and value.shape == named[key].shape
            made[key] = _part_of(value, named[key]) if is_named else _parted(value, named)
        return made
    return type(tree)(_parted(one, named) for one in tree) if isinstance(tree, (list, tuple)) else tree


def _named(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted({str(one) for one in dtypes}))


def _on_host(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _on_host(value) for key, value in tree.items()}
    return tree.cpu() if isinstance(tree, Tensor) else tree


# What is gathered at once.


def groups(module: nn.Module, wrap: Any) -> list[nn.Module]:
    """The submodules whose parameters are gathered together, inner ones before outer ones, the whole module last.

    Args:
        module: The module. Where it has no forward pass, as a `ModuleDict`, what is in it has its place.
        wrap: As in `FSDP`.
    Raises:
        ValueError: nothing is what `wrap` names, or what it names cannot be called.
    """
    named = {id(part): name for name, part in module.named_modules()}
    chosen = {id(part) for part in _chosen(module, wrap) if _is_by_itself(part, module)}
    chosen |= {id(part) for part in _tops(module)}
    inner_first = [*_inner_first(module)]
    for part in inner_first:
        if id(part) in chosen and not _is_callable(part):
            raise ValueError(
                f"wrap={wrap!r} names {named[id(part)]!r}, a {type(part).__name__}, which is never called itself. Name "
                f"what is in it."
            )
    return [part for part in inner_first if id(part) in chosen]


def _inner_first(module: nn.Module) -> Iterator[nn.Module]:
    seen: set[int] = set()

    def visit(part: nn.Module) -> Iterator[nn.Module]:
        if id(part) not in seen:
            seen.add(id(part))
            for child in part.children():
                yield from visit(child)
            yield part

    return visit(module)


def _tops(module: nn.Module) -> list[nn.Module]:
    if _is_callable(module):
        return [module]
    return [top for child in module.children() for top in _tops(child) if any(True for _ in top.parameters())]


def _is_callable(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _chosen(module: nn.Module, wrap: Any) -> list[nn.Module]:
    if wrap is None:
        return []
    if wrap == "auto":
        return [part for part in _layers(module) if _count(part) >= AUTO_PARAMETERS]
    if isinstance(wrap, Integral):
        return _of_size(module, wrap)
    kinds = wrap if isinstance(wrap, (tuple, list)) else (wrap,)
    if isinstance(kinds[0], str):
        pairs = [(name, part) for name, part in module.named_modules() if name]
        found = [part for name, part in pairs if any(fnmatchcase(name, pattern) for pattern in kinds)]
    else:
        found = [part for part in module.modules() if isinstance(part, tuple(kinds)) and part is not module]
    if not found:
        raise ValueError(
            f"wrap={wrap!r} is no submodule's name or class. Submodules are "
            f"{', '.join([name for name, _ in module.named_children()][:8]) or 'none'}."
        )
    return [part for part in found if _count(part)]


def _layers(module: nn.Module, is_listed: bool = False) -> Iterator[nn.Module]:
    """What the lists of layers have in them, which may be lists again."""
    if is_listed and not isinstance(module, LISTS):
        yield module
        return
    for child in module.children():
        yield from _layers(child, isinstance(module, LISTS))


def _of_size(module: nn.Module, parameters: int) -> list[nn.Module]:
    """Innermost submodules with so many parameters, beside those of others that were found."""
    found: list[nn.Module] = []
    taken: set[int] = set()
    for part in _inner_first(module):
        left = {id(one): one.numel() for one in part.parameters() if id(one) not in taken}
        if sum(left.values()) >= parameters and _is_callable(part):
            found.append(part)
            taken |= {*left}
    return found


def _count(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


def _is_by_itself(part: nn.Module, module: nn.Module) -> bool:
    """Whether no module outside has one of its parameters, too: tied ones are gathered together."""
    own, inside = set(map(id, part.parameters())), set(map(id, part.modules()))
    outside = (one for one in module.modules() if id(one) not in inside)
    return not any(id(parameter) in own for one in outside for parameter in one.parameters(recurse=False))


def _roots(module: nn.Module) -> list[nn.Module]:
    """The outermost modules that are sharded."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        return [module]
    return [root for child in module.children() for root in _roots(child)]


# Arguments.


def _refuse_no_wrap(wrap: Any) -> None:
    is_number = isinstance(wrap, Integral) and not isinstance(wrap, bool) and wrap > 0
    several = wrap if isinstance(wrap, (tuple, list)) and wrap else [wrap]
    are_names = all(isinstance(one, str) for one in several)
    are_kinds = all(isinstance(one, type) and issubclass(one, nn.Module) for one in several)
    if wrap is not None and not (is_number or are_names or are_kinds):
        raise ValueError(
            f"wrap={wrap!r} says not what is gathered at once. Give 'auto', a class of modules or a tuple of them, a "
            f"number of parameters above 0, names or globs of submodules, or None."
        )


def _mixed(precision: Any) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if isinstance(precision, MixedPrecisionPolicy):
        return precision
    if precision is None:
        return MixedPrecisionPolicy()
    if precision not in ("bf16", "bfloat16", torch.bfloat16):
        raise ValueError(
            f"precision={precision!r} is nothing FSDP gathers parameters in. Give 'bf16', a MixedPrecisionPolicy, or "
            f"None and compile(precision=...)."
        )
    return MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
