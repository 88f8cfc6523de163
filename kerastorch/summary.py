"""What a module holds and what it costs, as a table: collect -> totals -> table.

`summarize` lets `tracing.py` run the module on fake tensors, collects one `Row` per layer and adds up the totals;
`Summary` prints them. What a batch looks like is left to the caller: labels, loaders and losses are unknown here.
"""

from __future__ import annotations

import html
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from .tracing import Call, Trace, arguments_of, batch_size_of, home, resized, try_trace

DEPTHS = {"top": 1, "full": sys.maxsize}
# PyTorch's names for the optimizers whose state is not two tensors per parameter, as Adam's is. Momentum, AMSGrad and
# centring add one each, see `optimizer_bytes`.
STATE_TENSORS = {"SGD": 0, "Muon": 0, "Adafactor": 0, "RMSprop": 1, "Adagrad": 1, "ASGD": 1, "Lion": 1}


def summarize(
    module: nn.Module,
    input: Any = None,
    *,
    depth: int | str = 3,
    batch_size: int | None = None,
    optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer] | None = None,
) -> Summary:
    """Table of a module's layers, with output shapes, FLOPs and the memory of one training step.

    Nothing is computed and nothing of the module changes: forward and backward run on fake tensors and on a copy,
    hooks included. Where that is impossible (control flow that depends on values, `.item()`, numpy inside `forward`),
    the table comes without shapes and its last line says why. Under `torch.autocast` memory is that of mixed precision.

    Args:
        module: Any module; parameters may be frozen, shared or lazy, on any device.
        input: One batch: a tensor or array; a shape with the batch first, such as `(32, 3, 8, 8)`, which stands for
            floats of the module's dtype; a tuple of these for positional arguments; a dict of these for keywords.
            Default: None, for a table without shapes, FLOPs and memory.
        depth: Levels of layers below the module to show: an int from 1 up, "top" (1) or "full" (all). Default: 3.
        batch_size: Samples in the training step whose memory is estimated. Default: None, the input's batch.
        optimizer: Whose state, or those whose states, count in that memory: as it is after a step, else by its kind.
            Default: None, for Adam.
    Returns:
        A `Summary`: `print` it, or read its numbers.
    Raises:
        TypeError: `module` is no module, or `input` is none of the above.
        ValueError: `depth` or `batch_size` is out of range.
    Example:
        >>> summary = summarize(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), (32, 4))
        >>> summary.total_parameters, summary.flops, summary.rows[-1].output_shape
        (40, 2048, (32, 8))

    Source: FLOPs (2 per multiply-add of matmuls, convolutions, attention) by `torch.utils.flop_counter`; the tree of
        rows and the three steps after torchinfo.
    """
    levels = _levels(depth)
    _check(module, batch_size)
    module = getattr(module, "_orig_mod", module)  # the wrapper of torch.compile is not a layer
    trace = training = None
    note = "Lazy layers count as 0 parameters until an input is given." if _has_lazy(module) else ""
    if input is not None:
        arguments = arguments_of(input, home(module)[1])
        batch_size = batch_size or batch_size_of(arguments)
        trace, note = try_trace(module, arguments)
        if trace:  # the second pass is in train mode: dropout and batch norm save more than in eval mode
            training, note = try_trace(module, resized(arguments, batch_size), training=True)
    rows = list(_rows(trace.module if trace else module, levels, trace.calls if trace else {}))
    return _totals(rows, module, trace, training, batch_size, optimizer, note)


@dataclass(frozen=True)
class Row:
    """One layer of the table.

    Attributes:
        name: The layer's attribute in its parent; "" for the module itself.
        depth: Levels below the module itself.
        class_name: The layer's class.
        output_shape: A tuple for a tensor; a list or a dict of these for several; None if `forward` was not traced
            or did not reach the layer.
        parameters: Those of the layer, with its children's if they have no rows. Each parameter is counted in the
            first row that holds it, so that the rows add up to the total.
        is_shared: The layer, or all it holds, was counted in an earlier row.
        trainable: "yes", "frozen" or "partly", of the same parameters; "" if there are none.
        dtype: Of the same parameters.
        mode: "train" or "eval".
        calls: How often one forward pass calls the layer.
        flops: Of all these calls, children included; None as for `output_shape`.
    """

    name: str
    depth: int
    class_name: str
    output_shape: tuple | list | dict | None
    parameters: int
    is_shared: bool
    trainable: str
    dtype: str
    mode: str
    calls: int
    flops: int | None


@dataclass(frozen=True, repr=False)
class Summary:
    """The table and its totals; `str` is the plain table.

    Attributes:
        rows: One per layer shown, in the order of registration.
        total_parameters, trainable_parameters: Each parameter once, however many layers share it.
        parameter_bytes, buffer_bytes: Memory of the module at rest.
        flops: Of one forward pass of the input; None without a trace.
        step_parts: Bytes at the peak of one training step: parameters, buffers, gradients (of parameters, or of
            parameters and activations in the middle of backward, if those are more), optimizer (its state) and
            activations (the batch, what autograd keeps for backward, and the output). None without a training trace.
        batch_size: Samples in that step.
        optimizer: Class name of the optimizer in that step.
        note: Why something is missing; "" if nothing is.
    """

    rows: list[Row]
    total_parameters: int
    trainable_parameters: int
    parameter_bytes: int
    buffer_bytes: int
    flops: int | None
    step_parts: dict[str, int] | None
    batch_size: int | None
    optimizer: str
    note: str

    @property
    def frozen_parameters(self) -> int:
        """Parameters that no gradient reaches."""
        return self.total_parameters - self.trainable_parameters

    @property
    def step_bytes(self) -> int | None:
        """Memory of one training step at its peak, without the optimizer's scratch space."""
        return None if self.step_parts is None else sum(self.step_parts.values())

    def __str__(self) -> str:
        return "\n".join([_table(self.rows, "simple"), "", *_total_lines(self)])

    __repr__ = __str__  # so that a REPL shows the table

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        totals = html.escape("\n".join(_total_lines(self)))
        # `pre` keeps the blanks in front of the tree's branches.
        return f'<div style="white-space: pre">{_table(self.rows, "html")}{totals}</div>'

    def colored(self) -> str:
        """The table with terminal colours: frozen rows dim yellow, headers and totals bright."""
        from colorama import Fore, Style

        header, rule, *lines = _table(self.rows, "simple").splitlines()
        tints = [Style.DIM + Fore.YELLOW if row.trainable == "frozen" else "" for row in self.rows]
        painted = [f"{tint}{line}{Style.RESET_ALL}" if tint else line for tint, line in zip(tints, lines, strict=True)]
        bright = [f"{Style.BRIGHT}{line}{Style.RESET_ALL}" for line in _total_lines(self)]
        return "\n".join([f"{Style.BRIGHT}{header}{Style.RESET_ALL}", rule, *painted, "", *bright])

    def print(self, file: TextIO | None = None) -> None:
        """Print the table, in colour on a terminal unless NO_COLOR is set.

        Args:
            file: Where to. Default: None, for `sys.stdout`.
        Source: https://no-color.org
        """
        file = file or sys.stdout
        table = self.colored() if file.isatty() and not os.environ.get("NO_COLOR") else str(self)
        encoding = getattr(file, "encoding", None) or "utf-8"  # a Windows pipe may have no branches of trees
        print(table.encode(encoding, errors="replace").decode(encoding), file=file)


def _levels(depth: int | str) -> int:
    levels = DEPTHS.get(depth) if isinstance(depth, str) else depth
    if not isinstance(levels, int) or isinstance(levels, bool) or levels < 1:
        raise ValueError(f'depth={depth!r} is not a depth. Give a number of levels from 1 up, "top" for 1, or "full".')
    return levels


def _check(module: nn.Module, batch_size: int | None) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}; expected a torch.nn.Module. Give an instance of one.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not a batch size. Give a number of samples from 1 up, or None.")


def _has_lazy(module: nn.Module) -> bool:
    return any(is_lazy(parameter) for parameter in module.parameters())


# Collect: a trace, or the bare module, to rows.


def _rows(
    module: nn.Module,
    levels: int,
    calls: dict[nn.Module, Call],
    name: str = "",
    depth: int = 0,
    seen: set[int] | None = None,
) -> Iterator[Row]:
    """The module's row, then its children's, down to `levels`."""
    seen = set() if seen is None else seen
    is_open = depth < levels and id(module) not in seen
    children = {child_name: child for child_name, child in module._modules.items() if child is not None and is_open}
    parameters = list(module.parameters(recurse=not children))
    new = [parameter for parameter in parameters if id(parameter) not in seen]
    call = calls.get(module, Call())
    yield Row(
        name=name,
        depth=depth,
        class_name=type(module).__name__,
        output_shape=call.output_shape,
        parameters=_count(new),
        is_shared=id(module) in seen or (bool(parameters) and not new),
        trainable=_trainable(parameters),
        dtype="/".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})),
        mode="train" if module.training else "eval",
        calls=call.count,
        flops=call.flops if call.count else None,
    )
    seen.update(map(id, [module, *parameters]))
    for child_name, child in children.items():
        yield from _rows(child, levels, calls, child_name, depth + 1, seen)


def _trainable(parameters: list[nn.Parameter]) -> str:
    kinds = {"yes" if parameter.requires_grad else "frozen" for parameter in parameters}
    return "partly" if len(kinds) > 1 else "".join(kinds)


# Totals: from tensors to numbers.


def _totals(
    rows: list[Row],
    module: nn.Module,
    trace: Trace | None,
    training: Trace | None,
    batch_size: int | None,
    optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer] | None,
    note: str,
) -> Summary:
    """The rows and the sums over the whole module, whatever the depth of the table."""
    module = trace.module if trace else module
    parameters = list(module.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return Summary(
        rows=rows,
        total_parameters=_count(parameters),
        trainable_parameters=_count(trainable),
        parameter_bytes=_bytes(parameters),
        buffer_bytes=_bytes(module.buffers()),
        flops=trace.flops if trace else None,
        step_parts=_step_parts(training, optimizer) if training else None,
        batch_size=batch_size,
        optimizer=_name_of(optimizer),
        note=note,
    )


def _step_parts(training: Trace, optimizer: Any) -> dict[str, int]:
    """Bytes by cause at the peak of a training step, which is in backward (or after it, if the batch is small)."""
    gradient_bytes = _bytes(parameter for parameter in training.module.parameters() if parameter.requires_grad)
    return {
        "parameters": _bytes(training.module.parameters()),
        "buffers": _bytes(training.module.buffers()),
        # Backward adds gradients of activations as it frees activations, and gradients of parameters.
        "gradients": max(gradient_bytes, training.peak_bytes - training.activation_bytes),
        "optimizer": optimizer_bytes(optimizer, gradient_bytes),
        "activations": training.activation_bytes,
    }


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters if not is_lazy(parameter))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if not is_lazy(tensor))


def optimizer_bytes(optimizer: Any, gradient_bytes: int) -> int:
    """Bytes of the optimizer's state: counted if there is one, else as its kind will make it."""
    if optimizer is None:
        return 2 * gradient_bytes
    if isinstance(optimizer, Mapping):
        return sum(optimizer_bytes(one, _bytes(_trained_by(one))) for one in optimizer.values())
    if optimizer.state:
        return _bytes(leaf for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor))
    options = ("momentum", "amsgrad", "centered")
    extra = sum(bool(optimizer.defaults.get(option)) for option in options)
    return (STATE_TENSORS.get(type(optimizer).__name__, 2) + extra) * gradient_bytes


def _trained_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.requires_grad]


def _name_of(optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer] | None) -> str:
    if isinstance(optimizer, Mapping):
        return " and ".join(dict.fromkeys(map(_name_of, optimizer.values())))
    return type(optimizer).__name__ if optimizer else "Adam"


# Table: from numbers to text.


def _table(rows: list[Row], style: str) -> str:
    """The rows in one of tabulate's formats; without a trace, without the columns that need one."""
    from tabulate import tabulate

    tree = zip(_branches(rows), rows, strict=True)
    columns = {
        "layer": [branch + ": ".join(filter(None, [row.name, row.class_name])) for branch, row in tree],
        "output shape": [_output_text(row) for row in rows],
        "parameters": [_parameters_text(row) for row in rows],
        "trainable": [row.trainable for row in rows],
        "dtype": [row.dtype for row in rows],
        "mode": [row.mode for row in rows],
        "FLOPs": ["" if row.flops is None else _scaled(row.flops) for row in rows],
    }
    if not any(row.calls for row in rows):
        del columns["output shape"], columns["FLOPs"]
    alignment = ["right" if name in ("parameters", "FLOPs") else "left" for name in columns]
    # Kept whitespace: the branches of the tree begin with blanks. No number parsing: "1,234" is ready to print.
    return tabulate(columns, headers="keys", tablefmt=style, colalign=alignment, disable_numparse=True,
                    preserve_whitespace=True)  # fmt: skip


def _branches(rows: list[Row]) -> list[str]:
    """The tree's lines in front of each row."""
    branches: list[str] = []
    continued: set[int] = set()  # depths at which another row of the same parent follows
    for row in reversed(rows):
        stem = "".join("│  " if depth in continued else "   " for depth in range(1, row.depth))
        branches.append(stem + ("├─ " if row.depth in continued else "└─ ") if row.depth else "")
        continued = {depth for depth in continued if depth < row.depth} | {row.depth}
    return branches[::-1]


def _output_text(row: Row) -> str:
    times = f" ×{row.calls}" if row.calls > 1 else ""
    return _shape_text(row.output_shape) + times if row.calls else "—"


def _shape_text(shape: tuple | list | dict | None) -> str:
    """`(32, 10)`, `[(32, 10), (4, 32, 8)]`, `{logits: (32, 10)}`; the first three of more."""
    if isinstance(shape, dict):
        return "{" + _first([f"{name}: {_shape_text(value)}" for name, value in shape.items()]) + "}"
    if isinstance(shape, list):
        return "[" + _first([_shape_text(value) for value in shape]) + "]"
    return "" if shape is None else str(shape)


def _first(texts: list[str], limit: int = 3) -> str:
    more = [f"… {len(texts)} in all"] if len(texts) > limit else []
    return ", ".join(texts[:limit] + more)


def _parameters_text(row: Row) -> str:
    if row.is_shared:
        return "(shared)"
    return f"{row.parameters:,}" if row.parameters else "—"


def _total_lines(summary: Summary) -> list[str]:
    """The lines under the table."""
    counts = f"{summary.trainable_parameters:,} trainable, {summary.frozen_parameters:,} frozen"
    lines = [f"parameters: {summary.total_parameters:,} ({counts}), {_scaled(summary.parameter_bytes, 'B')}"]
    if summary.buffer_bytes:
        lines.append(f"buffers: {_scaled(summary.buffer_bytes, 'B')}")
    if summary.flops is not None:
        lines.append(f"forward pass of this input: {_scaled(summary.flops, 'FLOPs')}")
    if summary.step_parts is not None:
        parts = " + ".join(f"{name} {_scaled(size, 'B')}" for name, size in summary.step_parts.items() if size)
        batch = f" at batch {summary.batch_size}" if summary.batch_size else ""
        title = f"one training step{batch} with {summary.optimizer}"
        lines.append(f"{title}: {_scaled(summary.step_bytes, 'B')} = {parts or 'nothing'}")
    return [*lines, summary.note] if summary.note else lines


def _scaled(number: int, unit: str = "") -> str:
    """Three digits and a prefix in powers of 1000: `1.23 M`, `1.23 MB`, `987 B`."""
    value, prefixes = float(number), iter(["", "k", "M", "G", "T", "P"])
    prefix = next(prefixes)
    while value >= 999.5 and (larger := next(prefixes, None)):
        value, prefix = value / 1000, larger
    decimals = 0 if not prefix or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f} {prefix}{unit}".rstrip()
