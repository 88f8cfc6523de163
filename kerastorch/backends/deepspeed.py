"""DeepSpeed: each rank holds a part of the optimizer's states, of gradients, and of parameters, by its ZeRO optimizers.

`zero.py` hands module and optimizer over; here is how that takes part in a run. DeepSpeed has them from the first batch
on, until the run ends or somebody wants to look at all of them; between runs they are those of any process, whole.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .ddp import DDP
from .zero import PARAMETERS, Zero, quiet, settings_of

# Each number of a parameter by itself: flat parts of parameters take the same steps.
IN_FLAT_PARTS = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adadelta", "Adagrad", "ASGD", "Rprop")
IN_FLOAT32 = "it makes its steps in float32. Give precision='32' or 'bf16', or backend=FSDP()"
WITHOUT = {
    "precision='16'": "it has the gradients that the scale of losses is found by. Give precision='bf16'",
    "precision='16-true'": IN_FLOAT32,
    "precision='bf16-true'": IN_FLOAT32,
    "precision='64'": IN_FLOAT32,
    "an override of train_step": "it must know which backward passes make a step. Override compute_loss instead",
    "tbptt_steps": "it must know which backward passes make a step. Leave it out, or give backend=DDP()",
    "jit": "its hooks are none that torch.compile knows. Leave it out, or give backend=DDP()",
    "microbatch": "each piece would be sent by itself. Give a smaller batch_size and accumulate=2",
    "a callback of all parameters": "gradients, and with stage=3 parameters, are in parts. Leave it out",
    "an optimizer with a closure": "it looks at all parameters together, and a process has a part. Give backend=DDP()",
}
WITHOUT_PARAMETERS = {
    "an override of compute_loss": "with stage=3 parameters are whole within the module's calls alone. Give stage=2",
}


class DeepSpeed(DDP):
    """Data parallelism by DeepSpeed's ZeRO: the parts that processes hold are flat, whatever the module is made of.

    Under `torchrun` each process runs the script. Without it, `fit`, `evaluate` and `predict` start the processes of
    this machine themselves, and bring weights, optimizer state, history and results back. What is saved is whole, and
    fits any number of processes. Averaging, clipping, schedules and accumulation are those of every backend, not
    DeepSpeed's own. Each trained parameter must have a gradient in each step.

    Args:
        stage: 1 = states of the optimizer are shared out, 2 = gradients too, 3 = while it trains, parameters too.
            Default: 2.
        offload: Whether states are kept, and steps made, in the memory of the host. Default: `False`.
        devices: As in `DDP`.
        num_nodes: As in `DDP`.
        weights: As in `DDP`.
        sync_batchnorm: As in `DDP`.
        checkpoint_activations: As in `DDP`.
        timeout_s: As in `DDP`.
        max_restarts: As in `DDP`.
    Raises:
        ImportError: deepspeed is not installed.
        ValueError, TypeError: an argument that is none of these; or as in `DDP`. When the module is placed or the
            optimizer made: parameters are not float32, or it looks at more than one number at a time.

    Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models".
    """

    unable: Mapping[str, str] = WITHOUT

    def __init__(
        self,
        stage: int = 2,
        offload: bool = False,
        devices: str | int | Sequence[int] = "auto",
        num_nodes: int | None = None,
        *,
        weights: str | Sequence[float] | None = None,
        sync_batchnorm: bool = True,
        checkpoint_activations: Any = None,
        timeout_s: float = 600.0,
        max_restarts: int = 0,
    ) -> None:
        if isinstance(stage, bool) or stage not in (1, 2, 3):
            raise ValueError(
                f"stage={stage!r} is none of ZeRO's. Give 1 (states of the optimizer), 2 (gradients too) or 3 "
                f"(parameters too)."
            )
        if not isinstance(offload, bool):
            raise ValueError(f"offload={offload!r} is neither True nor False. Give one of them.")
        if importlib.util.find_spec("deepspeed") is None:
            raise ImportError("DeepSpeed needs the package deepspeed: pip install kerastorch[deepspeed].")
        self.stage, self.offload = stage, offload
        if stage == PARAMETERS:
            self.unable = WITHOUT | WITHOUT_PARAMETERS
        self._zero: Zero | None = None
        self._lost: str | None = None
        self._adopted: dict[int, torch.optim.Optimizer] = {}
        super().__init__(
            devices,
            num_nodes,
            weights=weights,
            sync_batchnorm=sync_batchnorm,
            checkpoint_activations=checkpoint_activations,
            timeout_s=timeout_s,
            max_restarts=max_restarts,
        )

    @property
    def leaves_gradients(self) -> bool:
        return not self.is_joined

    def place(self, module: nn.Module) -> nn.Module:
        if any(map(is_lazy, module.parameters())):
            raise ValueError(
                "the module is lazy: its parameters are made by the first batch, and cannot be shared out before. Call "
                "it on a batch before it is given to Model."
            )
        scalar = next((name for name, one in module.named_parameters() if not one.ndim), None)
        if scalar is not None and self.stage == PARAMETERS:
            raise ValueError(
                f"{scalar!r} is a parameter without dimensions, which stage=3 cannot share out. Give it shape (1,), "
                f"or stage=2."
            )
        return super().place(module)

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        name = type(optimizer).__name__
        if not isinstance(optimizer, tuple(getattr(torch.optim, kind) for kind in IN_FLAT_PARTS)):
            raise ValueError(
                f"{name} may look at more than single numbers of a parameter, and DeepSpeed gives it flat parts of "
                f"several. Give one of {', '.join(IN_FLAT_PARTS)} or what is derived from them, or backend=FSDP()."
            )
        dtypes = {one.dtype for group in optimizer.param_groups for one in group["params"]} - {torch.float32}
        if dtypes:
            raise ValueError(
                f"parameters are {', '.join(sorted(map(str, dtypes)))}, and DeepSpeed makes its steps in float32. Give "
                f"module.float(), or backend=FSDP()."
            )
        if self.stage != PARAMETERS:
            self._lost = None
        if self._adopted.get(id(optimizer)) is not optimizer:
            self._adopted[id(optimizer)] = optimizer
            optimizer.register_step_post_hook(self._step)

    # What holds during a run.

    @contextmanager
    def running(self, module: nn.Module) -> Iterator[None]:
        with quiet(), super().running(module):
            yield

    def by_itself(self) -> AbstractContextManager:
        return nullcontext()

    def gather_state(self) -> None:
        if self._zero is not None:
            self._zero.give_back()
            self._zero = None

    def _abandon(self) -> None:
        if self._zero is not None:
            self._zero.abandon()
            self._lost, self._zero = self._zero.lost, None

    def network(self, module: nn.Module) -> Callable:
        return module

    def step_for(self, step: Callable, compiled: Any) -> Callable:
        return partial(self._train, step, compiled)

    def _train(self, step: Callable, compiled: Any, recipe: Any, batch: tuple[Any, Any, Any]) -> bool:
        optimizer = compiled.updates[""].optimizer
        if self.is_joined and any(one.requires_grad for one in recipe.module.parameters()):
            self._hand_over(recipe.module, optimizer)
            recipe.backward = self._zero.backward
        return step(recipe, batch)

    def _hand_over(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """DeepSpeed has them from here on, as they are now."""
        if self._lost is not None:
            remedy = "Make the Model anew" if self.stage == PARAMETERS else "Call compile again"
            raise RuntimeError(f"a run has failed while DeepSpeed had {self._lost}. {remedy}, and load what was saved.")
        zero = self._zero
        if zero is not None and (zero.optimizer is not optimizer or zero.settings != settings_of(module, optimizer)):
            self.gather_state()
        if self._zero is None:
            self._zero = Zero(module, optimizer, self.stage, self.offload)

    # Steps.

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        if self._zero is None:
            super().average(parameters)
        else:
            self._zero.close()

    def _wrap(self, has_all: bool) -> None:
        """No wrapper of torch's."""

    def gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor | None]:
        return super().gradients(parameters) if self._zero is None else self._zero.gradients

    def clip_norm(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        if self._zero is None:
            return super().clip_norm(parameters, max_norm)
        squared = nn.utils.get_total_norm(self._zero.gradients).square().to(self.device)
        dist.all_reduce(squared)
        norm = squared.sqrt()
        torch._foreach_mul_(self._zero.gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    def clip_value(self, parameters: Sequence[nn.Parameter], bound: float) -> None:
        for gradient in self.gradients(parameters):
            if gradient is not None:
                gradient.clamp_(-bound, bound)

    def _step(self, optimizer: torch.optim.Optimizer, args: tuple, named: dict) -> None:
        """Behind the optimizer's own step, which had no gradient to step on."""
        if self._zero is not None and self._zero.optimizer is optimizer:
            self._zero.step()
