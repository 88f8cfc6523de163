"""Where a NaN comes from: the callback that `fit` adds before all others while `kerastorch.debug_nan` is on.

Hooks note of all that goes through the layers, forwards and backwards, whether it is finite, in the order in which it
happens. Nobody looks at these notes before the loss, a gradient or a parameter is not finite: then the first note of
what is not says where it began.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..debugging import is_on
from ..structures import leaves, named_leaves
from .base import Callback

LISTED = 8  # samples named in an error

GENTLER = "Try a lower lr or clip=1.0 in compile"


def nan_finders() -> list[Callback]:
    """The callback, or none while nobody wants it."""
    return [NaNFinder()] if is_on() else []


@dataclass(eq=False)
class Call:
    """One call of a layer.

    Attributes:
        name: Of the layer within the module; "" is the module itself.
        layer: What was called.
        caller: The call in whose `forward` that happened; `None` = the loop's own, or a `train_step`'s.
    """

    name: str
    layer: nn.Module
    caller: Call | None

    def __str__(self) -> str:
        kind = type(self.layer).__name__
        return f"'{self.name}' ({kind})" if self.name else f"the module ({kind})"

    def is_within(self, other: Call) -> bool:
        """Whether it happened during the other."""
        return self.caller is not None and (self.caller is other or self.caller.is_within(other))


class Note(NamedTuple):
    """Whether a tensor is finite.

    Attributes:
        what: "inputs" or "result" of a call, or "inputs' gradient" or "result's gradient".
        call: The call.
        label: Which of several it is.
        is_finite: For each row, on the device.
        has_nan: A scalar on the device.
    """

    what: str
    call: Call
    label: str
    is_finite: Tensor
    has_nan: Tensor

    @property
    def kind(self) -> str:
        return "nan" if self.has_nan else "inf"


class NaNFinder(Callback):
    """Raises `FloatingPointError` at the first loss, gradient or parameter that is not finite.

    With loss scaling (fp16) gradients overflow now and then and the step is left out: they may.
    """

    def __init__(self) -> None:
        self._cleanup = ExitStack()
        # The hooks of a graph refer to this object, and no garbage collector sees that: so it keeps no error, whose
        # traceback leads back to the graph, and takes the hooks off again.
        self._text: str | None = None
        self._handles: list[Any] = []

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        self._epoch = self._batch = -1
        self._is_watching, self._has_begun = False, False
        self._forget()
        self._names = {id(parameter): name for name, parameter in self._parameters()}
        self._checks_gradients = all(update.scaled_step is None for update in self.model.updates.values())
        self._cleanup.close()
        if "torch._dynamo" in sys.modules:  # else nothing is compiled: hooks would not be called within
            self._cleanup.enter_context(torch.compiler.set_stance("force_eager"))
        for name, layer in self.model.module.named_modules():
            if not isinstance(layer, torch.jit.ScriptModule):
                begin = partial(self._begin, _unwrapped(name))
                self._cleanup.callback(layer.register_forward_pre_hook(begin, with_kwargs=True).remove)
                self._cleanup.callback(layer.register_forward_hook(self._end).remove)

    def on_train_end(self, logs: MutableMapping | None = None) -> None:
        self._cleanup.close()
        self._forget()
        self._unhook()

    def on_exception(self, error: BaseException) -> None:
        self._cleanup.close()
        self._forget()
        self._unhook()
        if self._text is not None and str(error).startswith(self._text):
            error.args = (self._text,)  # without the name of this callback, which nobody has given

    def on_epoch_begin(self, epoch: int, logs: MutableMapping | None = None) -> None:
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: MutableMapping | None = None) -> None:
        self._batch, self._is_watching = batch, True
        self._forget()
        self._unhook()
        if not self._has_begun:  # not in `on_train_begin`: a run that is resumed gets its weights after that
            self._has_begun = True
            # Of those that are frozen, some are masks, where infinities belong.
            bad = _first_bad((name, one) for name, one in self._parameters() if one.requires_grad)
            if bad is not None:
                self._fail(f"parameter {bad} before {self._where()}. Load other weights, or make the module anew.")

    def on_train_batch_end(self, batch: int, logs: MutableMapping | None = None) -> None:
        self._is_watching = False

    def on_before_backward(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            self._fail(f"the loss of {self._where()} is {float(loss.detach())}. {self._origin_of_loss()}")

    def on_after_backward(self) -> None:
        if self._checks_gradients:
            gradients = [(name, one.grad) for name, one in self._parameters() if one.grad is not None]
            bad = _first_bad(self._in_order_of_backward(gradients))
            if bad is not None:
                self._fail(
                    f"the loss of {self._where()} is finite, but the gradient of {bad}. {self._origin_of_gradient()}"
                )
        rows = self._rows_before + self._rows
        self._forget()
        self._rows_before = rows  # of the pieces of the batch so far

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        stepped = [one for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
        bad = _first_bad((self._names.get(id(one), "outside of the module"), one) for one in stepped)
        if bad is not None:
            rates = ", ".join(sorted({f"{float(group['lr']):g}" for group in optimizer.param_groups}))
            self._fail(
                f"parameter {bad} after {self._where(self.model.steps_taken)}, whose gradients were finite: "
                f"{type(optimizer).__name__} went too far, with lr={rates}. {GENTLER}."
            )

    # What goes through the layers.

    def _begin(self, name: str, layer: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        if not self._is_watching or torch.compiler.is_compiling():
            return
        if not name:
            self._running.clear()  # of calls that ended with an error, which somebody caught
        call = Call(name, layer, self._running[-1] if self._running else None)
        self._running.append(call)
        self._calls.append(call)
        if call.caller is None:
            self._rows = next((len(one) for one in leaves((inputs, named)) if isinstance(one, Tensor) and one.ndim), 0)
        for label, tensor in _floats(named_leaves(inputs, "input"), named_leaves(named, "input")):
            self._note("inputs", call, label, tensor)
            if tensor.requires_grad and self._checks_gradients:
                self._handles.append(tensor.register_hook(partial(self._note, "inputs' gradient", call, label)))

    def _end(self, layer: nn.Module, inputs: tuple, output: Any) -> None:
        if not self._running or torch.compiler.is_compiling():
            return
        call = self._running.pop()
        while call.layer is not layer:  # whose error a `forward` caught
            call = self._running.pop()
        for label, tensor in _floats(named_leaves(output, "output")):
            self._note("result", call, label, tensor)
            if tensor.requires_grad and self._checks_gradients:
                self._handles.append(tensor.register_hook(partial(self._note, "result's gradient", call, label)))

    def _note(self, what: str, call: Call, label: str, tensor: Tensor) -> None:
        tensor = tensor.detach()
        is_finite = torch.isfinite(tensor)
        rows = is_finite.flatten(1).all(1) if tensor.ndim > 1 else is_finite.reshape(-1)
        self._notes.append(Note(what, call, label, rows, torch.isnan(tensor).any()))

    def _forget(self) -> None:
        self._running: list[Call] = []
        self._calls: list[Call] = []
        self._notes: list[Note] = []
        self._rows = self._rows_before = 0

    def _unhook(self) -> None:
        """Not before a batch is over: what it computed first may be what it goes back through last."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # What the notes say.

    def _origin_of_loss(self) -> str:
        notes = [note for note in self._notes if note.what in ("inputs", "result") and not note.is_finite.all()]
        if not notes:
            return (
                f"All results of layers were finite, so it began in the loss function or in the targets. Look at the "
                f"targets of {self._samples()}, and in the loss for a log, root or division of 0 and for a mean over "
                f"nothing; where outputs have grown too large for it, try a lower lr or clip=1.0 in compile."
            )
        first, call = notes[0], notes[0].call
        if first.what == "inputs" and call.caller is None:
            if call.layer is not self.model.module:
                return (
                    f"It began outside of the layers: {call} was given {first.kind} ({first.label}), when no layer had "
                    f"returned any. Look at what was computed before it."
                )
            given = [note.label for note in self._notes if note.call is call and note.what == "inputs"]
            label = "the input" if len(given) == 1 else first.label
            return (
                f"It began in the data: {label} has {first.kind} in {self._samples(first)}. Leave these samples "
                f"out, or fill in what is missing."
            )
        if first.what == "inputs":
            told = f"It began in what forward of {call.caller} computes itself: it gave {first.kind} to {call}"
        else:
            told = f"It began in {call}, the first layer whose result is not finite: it returned {first.kind}"
        told += f" for {self._samples(first)}."
        own = [*call.layer.named_parameters(recurse=False), *call.layer.named_buffers(recurse=False)]
        spoiled = [name for name, tensor in own if torch.isnan(tensor).any()]
        if spoiled and first.what == "result":
            told += f" Its {spoiled[0]!r} has nan."
        nan = next((note for note in notes if note.what == "result" and note.has_nan), None)
        if first.kind == "inf" and nan is not None and nan.call is not call:
            told += f" The first nan was returned by {nan.call}."
        return f"{told} {GENTLER}, look at these samples, and for a log, root or division of 0 add an eps."

    def _origin_of_gradient(self) -> str:
        notes = [note for note in self._notes if note.what.endswith("gradient")]
        bad = [note for note in notes if not note.is_finite.all()]
        advice = f"{GENTLER}, and for a root, norm or division of 0 add an eps within it."
        if not bad:
            return f"All that came back through the layers was finite: it began in the parameter's own. {advice}"
        spoiled = {note.call for note in bad if note.what == "result's gradient"}
        found = [note for note in bad if note.what == "inputs' gradient" and note.call not in spoiled]
        if found:
            first = found[0]
            for note in found:  # of a layer and one in it, the one in it
                first = note if note.call.is_within(first.call) else first
            return f"It began on the way back through {first.call}, for {self._samples(first)}. {advice}"
        if bad[0] is notes[0]:
            return f"It began in the loss function, for {self._samples(bad[0])}. {advice}"
        return f"It began in what is computed from the result of {bad[0].call}, for {self._samples(bad[0])}. {advice}"

    def _samples(self, note: Note | None = None) -> str:
        """Which samples it is about: by their positions in the data, where these are known."""
        known = self.model.batch_indices
        rows = list(range(self._rows))
        if note is not None and len(note.is_finite) == self._rows:
            rows = (~note.is_finite).nonzero().flatten().tolist()
        what, of_batch = "rows", " of the batch"
        if known is not None and len(known) >= self._rows:
            start = self._rows_before if self._rows_before + self._rows <= len(known) else 0
            rows, what, of_batch = [int(known[start + row]) for row in rows], "samples", ""
        more = f", ... ({len(rows)} in all)" if len(rows) > LISTED else ""
        return f"{what} [{', '.join(map(str, rows[:LISTED]))}{more}]{of_batch}"

    def _in_order_of_backward(self, gradients: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """Those of the layers that were called last come first."""
        turns = {call.name: turn for turn, call in enumerate(self._calls)}
        return sorted(gradients, key=lambda one: turns.get(one[0].rpartition(".")[0], -1), reverse=True)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((_unwrapped(name), one) for name, one in self.model.module.named_parameters())

    def _where(self, step: int | None = None) -> str:
        step = self.model.steps_taken + 1 if step is None else step
        return f"step {step} (epoch {self._epoch + 1}, batch {self._batch + 1}, counted from 1)"

    def _fail(self, text: str) -> None:
        self._text = text
        raise FloatingPointError(text)


def _unwrapped(name: str) -> str:
    """Without what torch.compile puts into names."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _floats(*named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    for parts in named:
        for label, leaf in parts:
            if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                yield label, leaf


def _first_bad(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first that is not finite, and what it is."""
    tensors = [(name, _values(tensor.detach())) for name, tensor in tensors]
    flags = [torch.isfinite(tensor).all() for _, tensor in tensors]
    if not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all()):
        return None
    name, tensor = next(one for one, flag in zip(tensors, flags, strict=True) if not flag)
    return f"{name!r} is {'nan' if torch.isnan(tensor).any() else 'inf'}"


def _values(tensor: Tensor) -> Tensor:
    return tensor.coalesce().values() if tensor.is_sparse else tensor
