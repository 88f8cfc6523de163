"""Pipeline: each process has some layers of the module, and batches go through them in pieces.

`engine.py` takes the module apart and computes; here is how it takes part in a run. Every process goes through whole
batches. The module is apart from the first batch on, and put together at the end, or earlier where somebody wants all
of its state. The last process has the outputs, so it alone measures; the others are told what it has found.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..precision import LOW, as_float32, autocast
from ..structures import map_structure, samples_in
from .engine import SCHEDULES, Engine
from .launch import launch
from .ranks import Ranks
from .single import Single

BATCHNORM = nn.modules.batchnorm._BatchNorm


class Pipeline(Ranks):
    """Sequential model parallelism: each of several processes has a stage of the module, or several.

    Under `torchrun` each process runs the script. Without it, `fit`, `evaluate` and `predict` start the processes of
    this machine themselves, and bring weights, optimizer state, history and results back. The module stays on the CPU
    between runs; in a run each process has its stages on its device. BatchNorm sees microbatches, of
    which a warning tells.

    Args:
        stages: How many; `"auto"` = one for each process, or two with a schedule that interleaves them. Default:
            `"auto"`.
        microbatches: Pieces of each batch that follow each other through the stages; `"auto"` = four for each stage.
            Default: `"auto"`.
        schedule: `"gpipe"`, `"1f1b"` (the memory of fewer pieces), or with several stages for each process
            `"interleaved1f1b"` or `"loopedbfs"`. Default: `"1f1b"`.
        balance: What stages have alike: `"parameters"`, `"time"`, or the names or numbers of the layers that stages
            begin with. Default: `"parameters"`.
        checkpoint_activations: Whether layers compute their activations again in the backward pass rather than keep
            them; or a glob of the names of those that do. Default: `False`.
        timeout_s: Seconds that a rank waits for the others before it gives up with an error; for them to start,
            120 at least. Default: 600.
    Raises:
        ValueError, TypeError: an option that is unknown or fits no other; or other processes than stages need.
    """

    measures_parts = False
    weighs_pieces = True
    unable: Mapping[str, str] = {
        "precision='16'": "the scale of losses would have to be one for all stages. Give precision='bf16'",
        "loss=None": "only the last stage knows what the module returns. Give compile a loss",
        "an override of compute_loss": "no process can call the whole module. Give compile a loss",
        "an override of train_step": "no process can call the whole module. Give compile a loss and an optimizer",
        "tbptt_steps": "the state of a sequence would have to go round all stages. Leave it out",
        "jit": "stages are taken from the module's own code. Leave it out",
        "microbatch": "batches go through in microbatches anyway. Give Pipeline(microbatches=...)",
        "an optimizer with a closure": "it looks at all parameters together, and no process has them. Give another one",
        "a callback of all parameters": "no process has them while it trains. Leave it out",
    }

    def __init__(
        self,
        stages: int | str = "auto",
        microbatches: int | str = "auto",
        schedule: str = "1f1b",
        balance: str | Sequence[int | str] = "parameters",
        *,
        checkpoint_activations: bool | str = False,
        timeout_s: float = 600.0,
    ) -> None:
        self._options = stages, microbatches, schedule, balance, checkpoint_activations
        self.engine = Engine(*self._options)  # wrong options are refused here
        self._module: nn.Module | None = None
        self._optimizers: list[torch.optim.Optimizer] = []
        self._cut, self._is_apart = None, False
        interleaves = SCHEDULES[self.engine.schedule][1]
        wanted = stages if stages == "auto" else max(stages // 2, 1) if interleaves else stages
        super().__init__(wanted, None, None, timeout_s, None)
        if not self.is_joined and not self.starts_ranks:
            raise ValueError(
                f"stages={stages!r} makes one process here, which is no pipeline. Give stages=2 or more, or start the "
                f"script with torchrun --nproc-per-node=N."
            )

    def join(self) -> None:
        wanted, self.devices = self.devices, "auto"  # how many there must be is the engine's to say
        super().join()
        self.devices, self.share = wanted, None
        self.engine = Engine(*self._options, device=self.device)
        self.engine.meet()

    def launch(self, call: Callable[[], Any]) -> Any:
        """Calls a function in ranks that are started for it, and returns what rank 0 returns."""
        return launch(self.processes, call)

    def place(self, module: nn.Module) -> nn.Module:
        """Leaves the module where it is, with the parameters and buffers of rank 0."""
        if self._options[1] != 1 and any(isinstance(part, BATCHNORM) for part in module.modules()):
            warnings.warn(
                "the module has BatchNorm, and Pipeline normalizes each microbatch by itself: the result is not that "
                "of one process. Give it LayerNorm or GroupNorm, Pipeline(microbatches=1), or backend=DDP().",
                stacklevel=2,
            )
        if self.is_joined:
            self._send_from_first([*module.parameters(), *module.buffers()])
        return module

    def feed(self, batches: Iterable[Any], ahead: bool = True) -> Iterator[Any]:
        return Single.feed(self, batches, ahead)

    @contextmanager
    def running(self, module: nn.Module) -> Iterator[None]:
        is_outermost = self.is_joined and not self._is_running
        try:
            with super().running(module):
                self._module = module if is_outermost else self._module
                yield
        finally:
            if is_outermost:
                self._module, self._cut, self._optimizers = None, None, []

    def gather_state(self) -> None:
        if self._is_apart:
            self.engine.finish()
            self._is_apart = False

    def _abandon(self) -> None:
        if self._is_apart:
            self.engine.abandon()
            self._is_apart = False

    def _started(self, x: Any, precision: Any) -> Engine:
        """The engine, with the module taken apart as it is for inputs like these."""
        engine = self.engine
        if self._is_apart:
            return engine
        context = nullcontext if precision is None else partial(autocast, precision, self.device)
        engine.start(self._module, self._few(x), context, self._cut)
        self._cut, self._is_apart = engine.cut, True
        for optimizer in self._optimizers:
            engine.adopt(optimizer)
        return engine

    def _few(self, x: Any) -> Any:
        """As many samples as a piece has."""
        samples = samples_in(x)
        few = -(-samples // self.engine.microbatches)
        is_of_samples = lambda leaf: isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == samples  # noqa: E731
        return map_structure(lambda leaf: leaf[:few] if is_of_samples(leaf) else leaf, x)

    # Computing.

    def step_for(self, step: Callable, compiled: Any) -> Callable:
        self._optimizers = [update.optimizer for update in compiled.updates.values()]
        return partial(self._train, step, compiled)

    def evaluation_for(self, step: Callable, compiled: Any) -> Callable:
        return partial(self._measure, step, compiled)

    def predictor(self, network: Callable, compiled: Any) -> Callable:
        precision = None if compiled is None else compiled.precision

        def run(*inputs: Any, **named: Any) -> Any:
            if self._module is None:
                return network(*inputs, **named)
            x = named or (inputs[0] if len(inputs) == 1 else inputs)
            return _widened(self._started(x, precision).forward(x, to="all"), precision)

        return run

    def _train(self, alone: Callable, compiled: Any, recipe: Any, batch: tuple[Any, Any, Any]) -> bool:
        """Adds the gradient of one batch; says whether its window is full. Outside of a run as one process does."""
        if self._module is None:
            return alone(recipe, batch)
        window, samples = recipe.window, samples_in(batch[0])
        divisors = window and (lambda totals: window.count(totals, samples))
        criterion = Criterion(recipe, compiled, samples, self._exact)
        loss = self._started(batch[0], compiled.precision).train(batch, criterion, divisors)
        self._tell(recipe.tracker, loss, samples)
        for hook in recipe.hooks.on_after_backward:
            hook()
        return window is None or window.count_batch()

    def _measure(self, alone: Callable, compiled: Any, recipe: Any, batch: tuple[Any, Any, Any]) -> None:
        """Loss and metrics of one batch."""
        if self._module is None:
            return alone(recipe, batch)
        x, target, weight = batch
        output, loss, samples = self._started(x, compiled.precision).forward(x), None, samples_in(x)
        if self.engine.is_last:
            output = _widened(output, compiled.precision)
            loss = compiled.loss(output, target, weight)
            recipe.tracker.add(loss, output, target, samples, weight)
        self._tell(recipe.tracker, loss, samples)

    def _exact(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, enabled=False)

    def _tell(self, tracker: Any, loss: Tensor | None, samples: int) -> None:
        """The loss of a batch, to those who have not computed it."""
        heard = self.engine.from_last(loss)
        if not self.engine.is_last:
            tracker.hear(heard, samples)

    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        if not self._is_apart:
            return super().clip_norm(parameters, max_norm)
        return self.engine.clip_gradients(parameters, max_norm)

    # Bringing together.

    def sum(self, values: Sequence[Any]) -> Sequence[Any]:
        return values

    def gather(self, output: Any) -> Any:
        return output

    def announce(self, value: Any) -> Any:
        if not self.is_joined:
            return value
        box = [value]
        dist.broadcast_object_list(box, self.engine.last_rank, group=self.hosts)
        return box[0]


class Criterion:
    """The compiled loss in the form that `Engine.train` takes: measured as it is computed, on the last rank.

    Args:
        recipe: Of the run: its tracker and hooks.
        compiled: Has loss and precision.
        whole: Samples of the batch.
        exact: The context that losses are computed in, within that of the forward passes.
    """

    def __init__(self, recipe: Any, compiled: Any, whole: int, exact: Callable[[], AbstractContextManager]) -> None:
        self.recipe, self.loss, self.precision, self.exact = recipe, compiled.loss, compiled.precision, exact
        self.whole, self.is_sum = whole, getattr(self.loss, "is_sum", False)

    def counts(self, output: Any, target: Any, samples: int) -> dict[Any, Any]:
        """Name -> what the mean of that name is over."""
        return self.loss.counts(output, target, samples)

    def shares(self, output: Any, target: Any, weight: Any, samples: int) -> list[Any]:
        """The mean losses of a piece."""
        with self.exact():
            output = _widened(output, self.precision)
            loss = self.loss(output, target, weight)
        # A sum is shown as that of a batch, the mean over pieces of what would be the batch's.
        shown = loss * (self.whole / samples) if self.is_sum else loss
        self.recipe.tracker.add(shown, output, target, samples, weight)
        for hook in self.recipe.hooks.on_before_backward:
            hook(loss)
        return self.loss.shares(loss, output, (None, target, weight), samples)


def _widened(output: Any, precision: Any) -> Any:
    """What losses and metrics are computed from, as where one process computes."""
    is_low = precision is not None and (precision.autocast is not None or precision.weights in LOW)
    return as_float32(output) if is_low else output
