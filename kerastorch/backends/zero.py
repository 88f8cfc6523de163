"""A module and its optimizer in the hands of DeepSpeed, whose ZeRO shares out states, gradients and parameters.

DeepSpeed has a stand-in of the optimizer step on flat tensors, of which each process has a part. The optimizer itself
keeps its parameters, rates and schedules, and gets the states back in the end. What each loss counts, and how gradients
are clipped, is decided elsewhere: what DeepSpeed would do of that is off.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PARAMETERS = 3  # the stage that shares these out, too
BUCKET_NUMBERS = 50_000_000  # gradients sent at once
OF_ALL_NUMBERS = ("step", "eta", "mu", "mu_product")  # states that are one number, whatever the parameter's shape


class Zero:
    """Has a module and its optimizer, with states and gradients, from here to `give_back` or `abandon`.

    Args:
        module: Its trained parameters are float32.
        optimizer: One that treats each number by itself.
        stage: 1 = states of the optimizer are shared out, 2 = gradients too, 3 = parameters too.
        offload: Whether states are kept, and steps made, in the memory of the host.
    Attributes:
        gradients: From `close` to `step`: this process's part of the means over all processes.
    Raises:
        ValueError: the optimizer has not all trained parameters.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, stage: int, offload: bool) -> None:
        self.module, self.optimizer, self.stage, self.offload = module, optimizer, stage, offload
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.settings = settings_of(module, optimizer)
        self.gradients: list[Tensor] = []
        self._groups = [*_alike(optimizer)]
        self._names = {one: name for name, one in module.named_parameters() if one.requires_grad and one.numel()}
        self._shapes = {one: one.shape for one in self._names}
        self._refuse_others()
        carried = self._taken_gradients()
        self._seen: set[nn.Parameter] = set()
        self._hooks = [one.register_post_accumulate_grad_hook(self._seen.add) for one in self._names]
        parts = [*module.modules(), *module.parameters()]
        before = [{*vars(part)} for part in parts]
        self._tables = [(part, part._parameters) for part in module.modules()]
        self._engine = self._made()
        self._zero = self._engine.optimizer
        self._added = [(part, {*vars(part)} - names) for part, names in zip(parts, before, strict=True)]
        self._take_over()
        self._carried = carried and [self._part_of([carried[one] for one in group]) for group in self._members]

    def _refuse_others(self) -> None:
        own = {one for _, parameters in self._groups for one in parameters}
        others = [name for one, name in self._names.items() if one not in own]
        if others:
            raise ValueError(
                f"{others[0]!r} is trained, but the optimizer does not have it, and DeepSpeed shares out all that is "
                f"trained. Freeze it (model.freeze), or give the optimizer all parameters."
            )

    def _made(self) -> Any:
        with quiet():
            import deepspeed
            import deepspeed.ops

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it would compile that now
            groups = [group | {"params": parameters} for group, parameters in self._groups]
            self._stand_in = _stand_in(self.optimizer, groups)
            options = {"optimizer": self._stand_in, "config": self._config(), "dist_init_required": False}
            for one in self.module.parameters():
                one.ds_optim_param = True  # it is the same everywhere, and need not be sent, which fails for scalars
            engine = deepspeed.initialize(model=self.module, **options)[0]
            for one in self.module.parameters():
                del one.ds_optim_param
            zero = engine.optimizer
            if zero.optimizer is not self._stand_in:  # of Adagrad it has made one of its own, with one group
                zero.optimizer = self._stand_in
                zero._link_all_hp_params()
            return engine

    def _config(self) -> dict[str, Any]:
        sizes = [one.numel() for one in self._names]
        return {
            "train_micro_batch_size_per_gpu": 1,  # which nothing depends on
            "managed_gradient_accumulation": False,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": self.stage,
                "overlap_comm": False,
                "reduce_bucket_size": max(min(sum(sizes), BUCKET_NUMBERS), *sizes, 1),
                "memory_efficient_linear": False,  # which replaces torch's function, for good
                "offload_optimizer": {"device": "cpu" if self.offload else "none"},
            },
        }

    def _take_over(self) -> None:
        """Gives the stand-in the optimizer's states, and DeepSpeed no reason to leave a step out."""
        zero = self._zero
        if self.stage == PARAMETERS:
            self._flats, self._members = zero.fp32_partitioned_groups_flat, zero.fp16_groups
            zero._get_norm_groups = lambda: [torch.zeros(())]
        else:
            self._flats, self._members = zero.single_partition_of_fp32_groups, zero.bit16_groups
            zero.scaled_global_norm = lambda: torch.zeros(())
            for flat, parts in zip(self._flats, zero.parallel_partitioned_bit16_groups, strict=True):
                if not self.offload:  # no copy: what is done to parameters is done to what the optimizer steps on
                    flat.data = parts[self.rank].data
        zero.set_gradient_accumulation_boundary(False)
        self._backwards = 0
        for flat, members in zip(self._flats, self._members, strict=True):
            states = [self.optimizer.state.pop(one) for one in members if one in self.optimizer.state]
            for name, first in states[0].items() if states else ():
                part = first if _is_one(name, first) else self._part_of([one[name] for one in states]).to(flat.device)
                self._stand_in.state[flat][name] = part

    # Computing.

    def backward(self, loss: Tensor, retain_graph: bool | None = None) -> None:
        """Adds the gradients of a loss."""
        if retain_graph is not None and self.stage > 1:
            raise ValueError(
                f"the losses are means over different things (samples, targets that are not masked), whose gradients "
                f"DeepSpeed(stage={self.stage}) does not keep apart. Give stage=1, or backend=FSDP()."
            )
        zero, self._backwards = self._zero, self._backwards + 1
        zero.clear_backward_seen_flag()
        if self.stage == PARAMETERS:
            zero.micro_step_id = max(zero.micro_step_id, 1)  # it adds to what there is, and `step` leaves zeros
        zero.backward_prologue()
        zero.enter_backward()
        self._engine.backward(loss, retain_graph=bool(retain_graph), scale_wrt_gas=False)

    def close(self) -> None:
        """Puts this process's part of the gradients' means, of all batches since the last step, into `gradients`."""
        self._refuse_unused()
        zero = self._zero
        zero.set_gradient_accumulation_boundary(True)
        if self.stage == 1:
            zero.setup_buckets()
            zero.reduce_gradients()
        elif self._backwards:
            zero.finalize_gradient_accumulation_boundary()
        zero.set_gradient_accumulation_boundary(False)
        self.gradients = self._closed()
        zero.averaged_gradients = {index: [one] for index, one in enumerate(self.gradients)}
        if self._carried is not None:
            torch._foreach_add_(self.gradients, self._carried)
        self._carried, self._backwards = None, 0
        self._seen.clear()

    def _closed(self) -> list[Tensor]:
        is_there = self._backwards or self.stage == 1
        if self.offload:
            return [flat.grad if is_there else flat.grad.zero_() for flat in self._flats]
        if not is_there:
            return [torch.zeros_like(flat) for flat in self._flats]
        return [torch.cat([one.reshape(-1) for one in parts]) for parts in self._zero.averaged_gradients.values()]

    def _refuse_unused(self) -> None:
        unused = [name for one, name in self._names.items() if one not in self._seen]
        if unused and self._backwards:
            raise ValueError(
                f"{unused[0]!r} has no gradient in this step, and would be left as it is in one process, which "
                f"DeepSpeed cannot do. Freeze it (model.freeze), or give backend=DDP() or FSDP()."
            )

    def step(self) -> None:
        """One step of the optimizer, with the settings that its groups have now, on `gradients`."""
        for (group, _), own in zip(self._groups, self._stand_in.param_groups, strict=True):
            own.update({name: value for name, value in group.items() if name != "params"})
        self._zero.step()
        self._zero.zero_grad()
        if self.stage == PARAMETERS:
            self._zero.grad_partitions_flat_buffer.zero_()
        self.gradients = []

    # Bringing back.

    @torch.no_grad()
    def give_back(self) -> None:
        """Leaves all of it in the module and the optimizer: parameters, states, and gradients of a step to come."""
        gradients = self._whole_gradients()
        for flat, members in zip(self._flats, self._members, strict=True):
            states = self._stand_in.state.get(flat, {})
            whole = {name: one if _is_one(name, one) else self._whole(members, one) for name, one in states.items()}
            for index, parameter in enumerate(members if states else ()):
                self.optimizer.state[parameter] = {
                    name: copy.deepcopy(one) if _is_one(name, one) else one[index] for name, one in whole.items()
                }
        parameters = [*self.module.parameters()]
        if self.stage == PARAMETERS and parameters:
            parameters[0].all_gather(param_list=parameters)
        values = [one.detach().clone() for one in parameters]
        self.abandon()
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def abandon(self) -> None:
        """Takes DeepSpeed's hooks and attributes off the module; parameters that it has shared out stay parts."""
        with quiet():
            self._engine.destroy()
        for hook in self._hooks:
            hook.remove()
        for part, table in self._tables:
            part._parameters = table
        for part, names in self._added:
            for name in {name for name in vars(part) if name in names or name.startswith(("ds_", "_ds_"))}:
                delattr(part, name)

    @property
    def lost(self) -> str | None:
        """What is nowhere else, and is lost if it is not given back; `None` = nothing."""
        if self.stage == PARAMETERS:
            return "the parameters"
        return "the optimizer's states" if self._stand_in.state else None

    def _whole_gradients(self) -> dict[nn.Parameter, Tensor]:
        """Those of a step to come. The first process has their sums, where it is not each that has its own."""
        if self.stage == 1 or not (self._backwards or self._carried is not None):
            return {one: one.grad for one in self._names if one.grad is not None}
        self.close()
        whole = [self._whole(*pair) for pair in zip(self._members, self.gradients, strict=True)]
        if self.rank:
            return {}
        members = (one for members in self._members for one in members)
        return dict(zip(members, (one * self.world for group in whole for one in group), strict=True))

    def _taken_gradients(self) -> dict[nn.Parameter, Tensor] | None:
        """Their means, where there are any already; with stage 1 each process keeps its own."""
        first = next(iter(self._names))
        has_any = torch.tensor(float(any(one.grad is not None for one in self._names)), device=first.device)
        dist.all_reduce(has_any)
        if not has_any:
            return None
        for one in self._names:
            one.grad = torch.zeros_like(one) if one.grad is None else one.grad
        if self.stage == 1:
            return None
        taken = {one: one.grad for one in self._names}
        for parameter, gradient in taken.items():
            dist.all_reduce(gradient)
            gradient /= self.world
            parameter.grad = None
        return taken

    # Parts. With stage 3 each tensor is cut into them, else all of a group, one behind the other.

    def _part_of(self, whole: list[Tensor]) -> Tensor:
        """This process's part of whole tensors."""
        flats = [one.detach().reshape(-1) for one in whole]
        flats = flats if self.stage == PARAMETERS else [torch.cat(flats)]
        return torch.cat([self._padded(one).chunk(self.world)[self.rank] for one in flats])

    def _padded(self, flat: Tensor) -> Tensor:
        # DeepSpeed has parts of up to stage 2 begin at even numbers.
        unit = self.world if self.stage == PARAMETERS else 2 * self.world
        return nn.functional.pad(flat, (0, -len(flat) % unit))

    def _whole(self, members: list[nn.Parameter], part: Tensor) -> list[Tensor]:
        """Whole tensors, shaped as some parameters, of which each process has such a part."""
        parts = [torch.empty_like(part) for _ in range(self.world)]
        dist.all_gather(parts, part.detach().contiguous())
        sizes = [self._shapes[one].numel() for one in members]
        if self.stage == PARAMETERS:
            cuts = zip(*(one.split([-(-size // self.world) for size in sizes]) for one in parts), strict=True)
            flats = [torch.cat(cut)[:size] for cut, size in zip(cuts, sizes, strict=True)]
        else:
            flats = torch.cat(parts)[: sum(sizes)].split(sizes)
        return [flat.reshape(self._shapes[one]).clone() for flat, one in zip(flats, members, strict=True)]


def settings_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """What must not change while DeepSpeed has a module: what is trained, and in which groups."""
    return [one.requires_grad for one in module.parameters()], [
        len(group["params"]) for group in optimizer.param_groups
    ]


def _alike(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], list[nn.Parameter]]]:
    """Its groups, with those of their trained parameters whose states have the same numbers, such as the steps made."""
    for group in optimizer.param_groups:
        alike: dict[Any, list[nn.Parameter]] = {}
        for one in group["params"]:
            if one.requires_grad and one.numel():
                state = optimizer.state.get(one, {})
                numbers = [(name, float(value) if name in OF_ALL_NUMBERS else None) for name, value in state.items()]
                alike.setdefault(tuple(sorted(numbers)), []).append(one)
        yield from ((group, parameters) for parameters in alike.values())


def _is_one(name: str, value: Any) -> bool:
    """Whether a state is one for all numbers of a parameter."""
    return name in OF_ALL_NUMBERS or not isinstance(value, (Tensor, list))


def _stand_in(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer that steps as another one does, of other groups, without states; nobody hears of its steps."""
    # Ours keep lists of tensors that DeepSpeed replaces: their parents step in the same way.
    kind = next(one for one in type(optimizer).__mro__ if "_lists" not in vars(one))
    other = object.__new__(kind)
    vars(other).update({name: value for name, value in vars(optimizer).items() if name not in ("step", "_lists")})
    for name in vars(other):
        if name.endswith("_hooks"):
            setattr(other, name, OrderedDict())
    other.state, other.param_groups = defaultdict(dict), groups
    return other


def _is_news(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()  # which was asked for


@contextmanager
def quiet() -> Iterator[None]:
    """Without what DeepSpeed says of itself; its warnings stay, but for those that torch has of it."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.(distributed|jit)\..*is deprecated")
        yield
