"""DDP: each rank has the whole module and its part of each batch; gradients are averaged once for each step.

torch's `DistributedDataParallel` does it, while the backward pass still runs, wherever one forward and one backward
pass of the whole module make the step. Where they do not (windows that end early, batches in pieces, steps of the
user's own, a parameter without a gradient), gradients are averaged before the optimizer's step, with the same result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .batchnorm import normalizing
from .launch import launch
from .ranks import Ranks

# Its name since torch 2.13; with `False` buffers are sent once at the beginning there, which is no matter.
SYNC_BUFFERS = "broadcast_buffers"
if "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel).parameters:
    SYNC_BUFFERS = "forward_sync_buffers"
BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's: gradients sent at once


class DDP(Ranks):
    """Data parallelism: the same module in each of several processes.

    Under `torchrun` each process runs the script. Without it, `fit`, `evaluate` and `predict` start the processes of
    this machine themselves, and bring weights, optimizer state, history and results back.

    Args:
        devices: Processes on each machine: `"auto"` = as many as `torchrun` started, or one for each GPU, and one where
            there is none; a number, of CPU processes where there are no GPUs; or the numbers of the GPUs. Default:
            `"auto"`.
        num_nodes: Machines; more than one take `torchrun`. Default: as many as it started.
        weights: How much of each batch each rank takes, in proportion, for machines of different speed or memory; the
            result does not change. `"auto"` = in proportion to how fast each device multiplies matrices when the
            ranks meet. Default: all the same.
        sync_batchnorm: Whether BatchNorm normalizes by the statistics of the global batch, as one process would, or
            each rank by those of its part. Default: `True`.
        find_unused_parameters: Whether parameters may have a gradient in some steps and none in others. Default:
            `False`; those that never have one are no matter.
        checkpoint_activations: Submodules that compute their activations again in the backward pass, as in `Single`.
            Default: none.
        timeout_s: Seconds that a rank waits for the others before it gives up with an error; for them to start,
            120 at least. Default: 600.
        max_restarts: How often processes that `fit` has started are started again when one of them died, from the last
            file of the run's `ModelCheckpoint` or `BackupAndRestore`. Default: 0.
    Raises:
        ValueError, TypeError: no such devices; or `torchrun` has started other processes than asked for.
    """

    def __init__(
        self,
        devices: str | int | Sequence[int] = "auto",
        num_nodes: int | None = None,
        *,
        weights: str | Sequence[float] | None = None,
        sync_batchnorm: bool = True,
        find_unused_parameters: bool = False,
        checkpoint_activations: Any = None,
        timeout_s: float = 600.0,
        max_restarts: int = 0,
    ) -> None:
        for name, value in (("sync_batchnorm", sync_batchnorm), ("find_unused_parameters", find_unused_parameters)):
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} is neither True nor False. Give one of them.")
        self.sync_batchnorm, self.find_unused_parameters = sync_batchnorm, find_unused_parameters
        if not isinstance(max_restarts, int) or isinstance(max_restarts, bool) or max_restarts < 0:
            raise ValueError(f"max_restarts={max_restarts!r} is no number of restarts. Give a whole number from 0 up.")
        self.max_restarts = max_restarts
        self._module: nn.Module | None = None
        self._forget()
        super().__init__(devices, num_nodes, weights, timeout_s, checkpoint_activations)

    def launch(self, call: Callable[[], Any]) -> Any:
        """Calls a function in ranks that are started for it, and returns what rank 0 returns."""
        return launch(self.processes, call, self.max_restarts)

    @contextmanager
    def running(self, module: nn.Module) -> Iterator[None]:
        was_running = self._is_running
        with ExitStack() as stack:
            if not was_running:
                stack.callback(self._leave_module)
            stack.enter_context(super().running(module))
            if self.is_joined and not was_running:
                stack.enter_context(normalizing(module, self))
            yield

    @contextmanager
    def by_itself(self) -> Iterator[None]:
        before = self.rank, self.world, self.share, self.is_joined
        self.rank, self.world, self.share, self.is_joined = 0, 1, None, False
        try:
            yield
        finally:
            self.rank, self.world, self.share, self.is_joined = before

    def network(self, module: nn.Module) -> Callable:
        """Calls the module, or torch's wrapper around it once it is known that each parameter has a gradient."""
        self._module = module if self.is_joined else None
        self._forget()
        if self._module is None:
            return module

        def run(*inputs: Any, **named: Any) -> Any:
            if self._wrapped is None or not torch.is_grad_enabled():
                return module(*inputs, **named)
            self._is_averaging = self._wrapped.require_backward_grad_sync
            return self._wrapped(*inputs, **named)

        return run

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"is_wrapped": self._wrapped is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if state.get("is_wrapped") and self._module is not None:  # at once: sums would be rounded otherwise
            self._wrap(has_all=True)

    def _leave_module(self) -> None:
        self._module = None
        self._forget()

    def _forget(self) -> None:
        self._wrapped: nn.parallel.DistributedDataParallel | None = None
        self._parameters, self._trained = [], []
        self._is_averaging = False

    def expect_step(self, is_due: bool) -> None:
        if self._wrapped is None:
            return
        if self._trained != [one.requires_grad for one in self._parameters]:  # frozen or not since
            self._forget()
            return
        self._wrapped.require_backward_grad_sync = is_due

    @torch.no_grad()
    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        if self._is_averaging or not self.is_joined:
            self._is_averaging = False
            return
        parameters = [one for one in parameters if one.requires_grad]
        has_gradient = self._of_any([one.grad is not None for one in parameters])
        averaged = [one for one, has in zip(parameters, has_gradient, strict=True) if has]
        for parameter in averaged:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in buckets([one.grad for one in averaged]):
            _average(bucket, self.world)
        if self._module is not None and self._wrapped is None:
            self._wrap(all(has_gradient))

    def _of_any(self, flags: list[bool]) -> list[bool]:
        agreed = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.hosts)
        return agreed.bool().tolist()

    def _wrap(self, has_all: bool) -> None:
        parameters = list(self._module.parameters())
        trained = [one.requires_grad for one in parameters]
        if not any(trained) or not (has_all or self.find_unused_parameters):
            return
        self._parameters, self._trained = parameters, trained
        self._wrapped = nn.parallel.DistributedDataParallel(
            self._module,
            **{SYNC_BUFFERS: not self.sync_batchnorm},
            find_unused_parameters=self.find_unused_parameters,
            gradient_as_bucket_view=True,
            init_sync=False,  # they are the same from `place` on
        )


def buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients to be sent at once: of one dtype, and not more than is good for the memory; a sparse one by itself."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        is_full = sum(one.nbytes for one in bucket) >= BUCKET_BYTES
        if bucket and (is_full or gradient.is_sparse or bucket[0].is_sparse or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _average(gradients: list[Tensor], world: int) -> None:
    if gradients[0].is_sparse:
        dist.all_reduce(gradients[0])
        gradients[0].div_(world)
        return
    flat = torch.cat([one.reshape(-1) for one in gradients]).mul_(1 / world)  # as torch's wrapper rounds
    dist.all_reduce(flat)
    parts = flat.split([one.numel() for one in gradients])
    torch._foreach_copy_(gradients, [part.view_as(one) for part, one in zip(parts, gradients, strict=True)])
