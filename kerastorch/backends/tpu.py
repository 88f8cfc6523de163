"""TPUs, and whatever else torch_xla runs on: operations are only written down, and run as one program for each step.

Decided here: where one program ends and the next begins, and how batches and parameters are laid over several cores.
The functions at the end are all that is asked of torch_xla, so that another engine can stand in its place.

A step is cut off before the next batch is taken from the data. The device then computes it while the host reads that
batch, sends it, and writes down the next step: what `MpDeviceLoader` does, without threads that would read ahead of the
state that is saved. Nothing in a step reads from the device. Each shape of a batch costs one compilation in a process,
the short last one too: a `batch_size` that divides the data, or a loader with `drop_last`, saves that one, and
torch_xla's `XLA_PERSISTENT_CACHE_PATH` saves all of them in the next process.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

from ..recomputing import parts_to_recompute, refuse_unknown
from ..structures import map_structure
from .single import Single

AXIS = "cores"  # the only one of the mesh


class TPU(Single):
    """Runs on XLA devices through torch_xla: in this process, on one core or on all cores together.

    With several cores a batch, whatever its size, is divided over them, and XLA adds up what they compute (SPMD): loss,
    metrics, BatchNorm and gradients are those of the whole batch. The first model decides for the process whether it
    uses one core or all, as torch_xla cannot change that once there is a tensor on a core.

    `PJRT_DEVICE` says what the cores are: `TPU`, or `CPU` to try a program out without one, with `CPU_NUM_DEVICES` of
    them. On a pod, start the same script on each of its hosts: each reads all of the data and sends its cores theirs.

    Args:
        cores: `"auto"` = all that there are; 1; or how many there must be.
        checkpoint_activations: As in `Single`.
        shard: `"parameters"` = each core keeps a part of each parameter, along its largest dim that the cores divide,
            of its gradient and of the optimizer's state; XLA gathers a parameter where it is used. `None` = each core
            has all of them.
    Raises:
        ImportError: torch_xla is not there, or not the one for this torch.
        ValueError: there is no TPU, or another number of cores; `shard` is unknown, or there is nothing to shard over.
        RuntimeError: this process has tensors on a core already and uses one, where now all are wanted, or vice versa.
    Example:
        >>> model = Model(net, backend=TPU(cores=4, shard="parameters"))  # doctest: +SKIP

    Source: torch_xla, `torch_xla.distributed.parallel_loader.MpDeviceLoader`; "PyTorch/XLA SPMD User Guide", "How to
        do Fully Sharded Data Parallel with SPMD".
    """

    looks_ahead = False

    def __init__(
        self, cores: int | str = "auto", *, shard: str | None = None, checkpoint_activations: Any = None
    ) -> None:
        refuse_unknown(checkpoint_activations)
        self.checkpoint_activations = checkpoint_activations
        if cores != "auto" and (isinstance(cores, bool) or not isinstance(cores, int) or cores < 1):
            raise ValueError(f'cores={cores!r} is no number of cores. Give "auto" for all there are, or 1.')
        if shard not in (None, "parameters"):
            raise ValueError(f'shard={shard!r} is not known. Give "parameters", or None for whole ones on each core.')
        _refuse_missing()
        found = _cores()
        if cores not in ("auto", 1, found):
            raise ValueError(
                f"cores={cores} cannot be had: there are {found} here, and XLA uses one or all of them. Give 1 or "
                f'"auto", or start the process with fewer in sight (TPU_VISIBLE_CHIPS; CPU_NUM_DEVICES without a TPU).'
            )
        self.cores = found if cores == "auto" else cores
        if shard is not None and self.cores == 1:
            raise ValueError(f"shard={shard!r} needs several cores, and there is one. Leave shard out.")
        self.shard = shard
        self.device, self._mesh = _open(self.cores, found)
        self.rank = _host()

    def place(self, module: nn.Module) -> nn.Module:
        """Moves the module's parameters and buffers to the cores, in place: parameters stay the objects they are."""
        parts_to_recompute(module, self.checkpoint_activations)
        if _hosts() > 1:
            _join_hosts()
            be_as_on_first_host(module)
            _set_random_state(torch.initial_seed(), self.device)
        with _lazy_left_out(module, self.device), _parameters_stay_objects():
            module.to(self.device)
        if self.shard is not None:
            self._shard_parameters(module)
        for part in module.modules():
            if isinstance(part, _NormBase):
                _correct_variance(part)
        return module

    def hold(self, tensors: list[Tensor]) -> list[Tensor]:
        """As they are: batches cut out on the device would be a program for each place that one begins at."""
        return tensors

    def feed(self, batches: Iterable[Any], ahead: bool = True) -> Iterator[Any]:
        """The same batches, on the cores; the program of a step ends before the next one is taken from the data.

        None is taken `ahead`: the next one is read and sent while the cores compute.
        """
        self.cut()
        for batch in batches:
            yield self.move(batch)
            self.cut()

    def move(self, tree: Any) -> Any:
        """All tensors of `tree`, on the cores. They are on their way when this returns."""
        return map_structure(lambda leaf: self._sent(leaf) if isinstance(leaf, Tensor) else leaf, tree)

    def cut(self) -> None:
        """Has the device compute what was written down so far, as one program, and does not wait for it."""
        state = _random_state(self.device)
        _sync()
        # A cut changes the state. Put back, what is drawn depends on what was drawn before alone, not on how often it
        # was cut: so a run that goes on draws what it would have drawn.
        _set_random_state(state, self.device)

    def _sent(self, tensor: Tensor) -> Tensor:
        if type(tensor) is not Tensor or tensor.requires_grad or tensor.device.type != "cpu":
            return tensor.to(self.device)
        # Rows that the cores do not divide are laid over them too: XLA leaves what fills them up out of all results.
        spec = (AXIS, *[None] * (tensor.ndim - 1)) if self._mesh is not None and tensor.ndim else None
        return _send(tensor, self.device, self._mesh, spec)

    def _shard_parameters(self, module: nn.Module) -> None:
        parameters = list(module.parameters())
        if any(map(is_lazy, parameters)):
            raise ValueError(
                'shard="parameters" needs to know their shapes, and the module has lazy layers. Call it with one batch '
                "before it is given to Model."
            )
        for parameter in parameters:
            divided = [dim for dim, size in enumerate(parameter.shape) if size and size % self.cores == 0]
            if divided:
                largest = max(divided, key=lambda dim: parameter.shape[dim])
                spec = tuple(AXIS if dim == largest else None for dim in range(parameter.ndim))
                _shard(parameter, self._mesh, spec)


@contextmanager
def _parameters_stay_objects() -> Iterator[None]:
    """`module.to` leaves tied parameters tied, and optimizers made before theirs, though they change device."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@contextmanager
def _lazy_left_out(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Gives lazy layers new parameters on the device: `module.to` would make them ones of shape (0,) there."""
    tables = [table for part in module.modules() for table in (part._parameters, part._buffers)]
    found = [(table, name, one) for table in tables for name, one in table.items() if one is not None and is_lazy(one)]
    for table, name, _ in found:
        table[name] = None
    try:
        yield
    finally:
        for table, name, one in found:
            table[name] = type(one)(requires_grad=one.requires_grad, device=device, dtype=one.dtype)


# torch_xla 2.9 puts the biased variance into BatchNorm's running mean of variances, torch the unbiased one: evaluation
# would differ.


def _correct_variance(norm: nn.Module) -> None:
    """Has the layer keep the running variance that torch keeps; where it is not on XLA nothing changes."""
    if _note_variance not in norm._forward_pre_hooks.values():  # of another Model of the same module
        norm.register_forward_pre_hook(_note_variance)
        norm.register_forward_hook(_unbias_variance)


def _note_variance(norm: nn.Module, inputs: tuple) -> None:
    if norm.training and norm.running_var is not None and norm.running_var.device.type == "xla":
        norm._variance_before = norm.running_var.clone()


def _unbias_variance(norm: nn.Module, inputs: tuple, output: Tensor) -> None:
    before = norm.__dict__.pop("_variance_before", None)
    if before is None:
        return
    values = _values_per_variance(norm, inputs[0])
    momentum = 1.0 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    running = norm.running_var.data  # backward, which does not use it in training, would complain of a change
    running += (running - (1.0 - momentum) * before) / (values - 1)


def _values_per_variance(norm: nn.Module, x: Tensor) -> int:
    if isinstance(norm, _BatchNorm):
        return x.numel() // x.shape[1]
    return x.shape[1 - norm._get_no_batch_dim() :].numel()  # InstanceNorm: of one sample


# Pods: one process on each host, which all run the same programs on the same data.


def be_as_on_first_host(module: nn.Module) -> None:
    """Gives the module the weights, and torch the seed, that the first process of the default group has.

    Args:
        module: On the CPU.
    """
    seed = [torch.initial_seed()]
    dist.broadcast_object_list(seed, src=0)
    if dist.get_rank() > 0:
        torch.manual_seed(seed[0])
    for tensor in module.state_dict().values():
        dist.broadcast(tensor.detach(), src=0)


# All that is asked of the engine.


def _xla(name: str = "") -> Any:
    return importlib.import_module(f"torch_xla.{name}" if name else "torch_xla")


def _refuse_missing() -> None:
    is_chosen = "PJRT_DEVICE" in os.environ or "torch_xla" in sys.modules  # which chooses when it is imported
    try:
        _xla()
    except ImportError as error:
        raise ImportError(
            f"the TPU backend needs torch_xla, which cannot be imported ({error}). "
            f"pip install torch_xla==2.9.0 torch==2.9.0, and set PJRT_DEVICE=TPU, or PJRT_DEVICE=CPU to try it out."
        ) from error
    if not is_chosen and _xla("runtime").device_type() == "CPU":
        raise ValueError("torch_xla finds no TPU here. Set PJRT_DEVICE=CPU to try the program out without one.")
    if _xla("runtime").local_process_count() > 1:
        raise ValueError(
            "several processes on one host, as torch_xla.launch starts them, cannot share a batch here. Start one "
            "process on each host: it uses all cores of the host."
        )


def _cores() -> int:
    return _xla("runtime").global_runtime_device_count()


def _host() -> int:
    return _xla("runtime").process_index()


def _hosts() -> int:
    return _xla("runtime").process_count()


def _join_hosts() -> None:
    if not dist.is_initialized():
        _xla("distributed.xla_backend")  # makes "xla://" known
        dist.init_process_group("gloo", init_method="xla://")


def _open(cores: int, found: int) -> tuple[torch.device, Any]:
    """The device, which stands for all cores where there are several, and their mesh, `None` for one.

    torch_xla decides once, with the first tensor on a core, whether a process uses one core or all.
    """
    runtime = _xla("runtime")
    is_fixed = runtime.is_spmd() or _xla()._XLAC._xla_get_spmd_config_is_locked()
    if found > 1 and is_fixed and runtime.is_spmd() != (cores > 1):
        used, wanted = ("all", "one") if runtime.is_spmd() else ("one", "all")
        raise RuntimeError(
            f"this process uses {used} of its {found} cores, for an earlier model say, and torch_xla cannot change "
            f"that: now {wanted} would be used. Give all models of a process the same cores, or start another process."
        )
    if cores > 1 and not runtime.is_spmd():
        runtime.use_spmd()
    mesh = _xla("distributed.spmd").Mesh(list(range(cores)), (cores,), (AXIS,)) if cores > 1 else None
    device = torch.empty(0, device=_xla().device()).device
    if not is_fixed:  # torch.manual_seed, before this, knew nothing of it
        _set_random_state(torch.initial_seed(), device)
    return device, mesh


def _sync() -> None:
    _xla().sync()


def _send(tensor: Tensor, device: torch.device, mesh: Any, spec: tuple | None) -> Tensor:
    sharding = None if spec is None else _xla("distributed.spmd").ShardingSpec(mesh, spec)
    (sent,) = _xla("core.xla_model").send_cpu_data_to_device(tensor, device, sharding)
    return sent


def _shard(tensor: Tensor, mesh: Any, spec: tuple) -> None:
    _xla("distributed.spmd").mark_sharding(tensor, mesh, spec)


def _random_state(device: torch.device) -> int:
    return _xla("core.xla_model").get_rng_state(str(device))


def _set_random_state(state: int, device: torch.device) -> None:
    _xla("core.xla_model").set_rng_state(state, str(device))
