"""A module as a program that runs without its Python code: `.pt2` for torch, `.onnx` for everybody else.

Decided here: what is exported (the plain module, in eval mode, on the CPU), and when the file is good: once it was read
back and returned what the module returns. Left to others: what a batch is (`data.py`), and that a file appears whole
(`checkpoint.py`).
"""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from .checkpoint import replacing
from .seeding import random_state_kept
from .step import forward
from .structures import leaves, map_structure, named_leaves

ENDINGS = (".pt2", ".onnx")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_BYTES = 2**31  # of one file, which is a protobuf message

# Largest difference that is rounding, in parts of the largest output. Between runtimes the order of sums differs.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
CHATTY = ("torch", "torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")  # loggers
OF_TORCH_ITSELF = (  # warnings of its own recurrent layers, which keep a list of their weights, and of its reader
    r"The tensor attributes? self\.\S*_flat_weights",
    "The given buffer is not writable",
)

Program = Callable[[Any], list[Tensor]]  # from a batch of inputs to all tensors that come out


def export(
    module: nn.Module,
    path: str | os.PathLike,
    x: Any,
    *,
    dynamic_batch: bool = True,
    check: bool = True,
    tolerance: float | None = None,
) -> None:
    """Writes a module as a program, once that was read back and has returned what the module returns.

    Args:
        module: Any module; it is as it was afterwards.
        path: Where to; its ending is the format.
        x: A batch of inputs, as `forward` takes it: a tensor, or a tuple or dict of these. No value of it gets into
            the file.
        dynamic_batch: Whether the first dim of all inputs may have any size. Default: `True`.
        check: Whether to compare. Default: `True`.
        tolerance: Largest difference that is rounding, in parts of the largest output, or of 1 where that is more.
            `None` = by dtype, 1e-5 of float32.
    Raises:
        ImportError: the packages for ONNX are not installed.
        ValueError: another ending; the module cannot be exported, or not so; the program returns something else.
        OSError: it cannot be written.
    Source: `torch.export.export` and `torch.onnx.export`.
    """
    refuse_ending(path)
    module = _exportable(module)
    x = map_structure(Tensor.cpu, x)
    samples = len(next(leaves(x)))
    # Torch takes a size of 1 for one that never changes.
    traced = max(samples, 2) if dynamic_batch else samples
    with _undisturbed(module):
        output = forward(module, x)  # raises what is the user's own mistake as the module raises it
        program = _exported(module, _of_size(x, traced), dynamic_batch)
        write, load = FORMATS[ending_of(path)]
        with replacing(path) as temporary:
            write(program, temporary, output, dynamic_batch)
            if check:
                loaded = _read_back(load, temporary, str(path))
                for size in (traced, traced + 1, 1) if dynamic_batch else (samples,):
                    _compare(loaded, module, _of_size(x, size), tolerance, str(path))


def ending_of(path: str | os.PathLike) -> str:
    """The ending, in small letters."""
    return Path(path).suffix.lower()


def refuse_ending(path: str | os.PathLike) -> None:
    """The ending must be one of the two, and what it takes must be installed.

    Raises:
        ValueError: it is another.
        ImportError: packages are missing.
    """
    if ending_of(path) not in ENDINGS:
        raise ValueError(
            f"{str(path)!r} ends neither in '.pt2', for torch.export, nor in '.onnx'. Give "
            f"{str(Path(path).with_suffix('.pt2'))!r} or {str(Path(path).with_suffix('.onnx'))!r}."
        )
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if ending_of(path) == ".onnx" and missing:
        raise ImportError(f"{str(path)!r} needs {', '.join(missing)}. Run: pip install kerastorch[onnx]")


# The module, and its batches.


def with_shapes_filled(data: Any, dtype: torch.dtype) -> Any:
    """Data in which each shape, a tuple of whole numbers, is random numbers of that shape.

    Args:
        data: Anything, or a tuple or dict in which there are shapes.
        dtype: Of the numbers.
    Raises:
        ValueError: a size below 1.
    """
    if isinstance(data, Mapping):
        return {name: with_shapes_filled(part, dtype) for name, part in data.items()}
    if type(data) is not tuple or not data:
        return data
    if any(type(size) is not int for size in data):
        return tuple(with_shapes_filled(part, dtype) for part in data)
    if min(data) < 1:
        raise ValueError(f"shape {data} has a size below 1. Give the sizes of one batch, e.g. 32 for -1.")
    return torch.rand(data, generator=torch.Generator().manual_seed(0)).to(dtype)


def _exportable(module: nn.Module) -> nn.Module:
    """The module itself if it is on the CPU, else a copy: a program has the device in it that it was traced on."""
    module = getattr(module, "_orig_mod", module)  # below the wrapper of torch.compile
    tensors = [*module.parameters(), *module.buffers()]
    if any(map(is_lazy, tensors)):
        raise ValueError("the module is lazy and has no shapes yet. Call predict or fit first, which give it some.")
    if all(tensor.is_cpu for tensor in tensors):
        return module
    moved = {id(one): one.detach().cpu() for one in module.buffers()}
    moved |= {id(one): nn.Parameter(one.detach().cpu(), one.requires_grad) for one in module.parameters()}
    return copy.deepcopy(module, moved)


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, without gradients and without what exporters say of themselves; then as it was."""
    modes = [(part, part.training) for part in module.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with torch.no_grad(), random_state_kept(), _silenced():
            module.eval()
            try:
                yield
            finally:
                for buffer, before in buffers:
                    buffer.copy_(before)
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _silenced() -> Iterator[None]:
    """Without the exporters' notes on themselves; warnings of what is wrong with the module are still shown."""
    levels = [(logger, logger.level) for logger in map(logging.getLogger, CHATTY)]
    for logger, _ in levels:
        logger.setLevel(logging.CRITICAL)  # what is an error is raised, too
    with warnings.catch_warnings():
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        for message in OF_TORCH_ITSELF:
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            for logger, level in levels:
                logger.setLevel(level)


def _of_size(x: Any, samples: int) -> Any:
    """A batch of so many samples, from those of `x` over and over."""
    return map_structure(lambda leaf: leaf[torch.arange(samples) % len(leaf)], x)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


# From the module to a program.


def _exported(module: nn.Module, x: Any, dynamic_batch: bool) -> torch.export.ExportedProgram:
    try:
        return _trace(module, x, dynamic_batch)
    except Exception as error:  # of many types: `forward` is the user's
        if dynamic_batch and _is_traceable(module, x):
            raise ValueError(
                f"{type(module).__name__} does not take batches of every size: {_reason(error)} Have forward take the "
                f"size from its input, as x.shape[0] or -1, or give dynamic_batch=False for a program that takes "
                f"batches of {len(next(leaves(x)))} samples alone."
            ) from error
        raise ValueError(
            f"torch.export cannot make a program of {type(module).__name__}: {_reason(error)} What forward does must "
            f"not depend on values of tensors, nor leave torch."
        ) from error


def _trace(module: nn.Module, x: Any, dynamic_batch: bool) -> torch.export.ExportedProgram:
    x = map_structure(torch.zeros_like, x)  # goes into the file as an example
    positional = () if isinstance(x, Mapping) else tuple(x) if isinstance(x, (tuple, list)) else (x,)
    named = dict(x) if isinstance(x, Mapping) else {}
    shapes = None
    if dynamic_batch:
        collected, batch = torch.export.ShapesCollection(), torch.export.Dim("batch")
        for leaf in leaves(x):
            collected[leaf] = {0: batch}
        shapes = collected.dynamic_shapes(module, positional, named)
    capture = partial(torch.export.export, module, positional, named, dynamic_shapes=shapes)
    with _prints_dropped():
        try:
            return capture(strict=False)
        except Exception:
            # Reads the code instead of running it: torch before 2.10 exports recurrent layers in no other way.
            with suppress(Exception):
                return capture(strict=True)
            raise


def _is_traceable(module: nn.Module, x: Any) -> bool:
    try:
        _trace(module, x, dynamic_batch=False)
    except Exception:  # the same as with a dynamic batch, which will be told of
        return False
    return True


@contextmanager
def _prints_dropped() -> Iterator[None]:
    """Without the graphs that torch.export prints when it fails; warnings are shown afterwards."""
    with redirect_stderr(io.StringIO()), warnings.catch_warnings(record=True) as seen:
        yield
    for one in seen:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _reason(error: BaseException) -> str:
    """The first line that says what is wrong, as a sentence."""
    lines = [line.strip(" -\t") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    is_title = lines[0].startswith("Constraints violated") and len(lines) > 1
    reason = re.split(r"\. If you| \(unhinted", lines[1 if is_title else 0])[0]  # advice on exporters' options
    return f"{reason.rstrip('.')}."


# The two formats.


def _write_torch(program: torch.export.ExportedProgram, path: Path, output: Any, dynamic_batch: bool) -> None:
    with open(path, "xb") as file:
        memory = io.BytesIO()  # torch's own writer ends the process where the disk is full
        torch.export.save(program, memory)
        file.write(memory.getbuffer())


def _load_torch(path: Path) -> Program:
    with open(path, "rb") as file:
        program = torch.export.load(file).module()
    return lambda x: _tensors(forward(program, x))


def _write_onnx(program: torch.export.ExportedProgram, path: Path, output: Any, dynamic_batch: bool) -> None:
    stored = sum(tensor.nbytes for tensor in program.state_dict.values())
    if stored >= ONNX_BYTES:
        raise ValueError(f"the weights take {stored} bytes, and an .onnx file holds {ONNX_BYTES}. Export to .pt2.")
    inputs = list(program.graph_signature.user_inputs)
    shapes = [{0: "batch"}, *[None] * (len(inputs) - 1)] if dynamic_batch else None  # the others' is the same one
    try:
        converted = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            dynamic_shapes=shapes,
            input_names=inputs,
            output_names=_output_names(output, inputs),
        )
    except Exception as error:  # of many types
        raise ValueError(f"torch.onnx cannot translate the program: {_reason(error)} Export to .pt2.") from error
    for value, name in zip(converted.model.graph.inputs, inputs, strict=True):
        value.name = name  # torch 2.9 renames those that are returned as they are
    path.touch(exist_ok=False)
    converted.save(str(path), external_data=False)


def _output_names(output: Any, inputs: list[str]) -> list[str]:
    """`output`, or where there are several their keys, or `output_0` and so on."""
    if isinstance(output, Mapping) and len(_tensors(output)) == len([*named_leaves(output, "")]):
        paths = (path for path, _ in named_leaves(output, ""))
        names = ["_".join(part.strip("'\"") for part in path[1:-1].split("][")) for path in paths]
    else:
        number = len(_tensors(output))
        names = ["output"] if number == 1 else [f"output_{index}" for index in range(number)]
    return [f"{name}_output" if name in inputs else name for name in names]


def _load_onnx(path: Path) -> Program:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(x: Any) -> list[Tensor]:
        arrays = [leaf.numpy() for leaf in leaves(x)]
        return [torch.as_tensor(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


FORMATS: dict[str, tuple[Callable, Callable]] = {
    ".pt2": (_write_torch, _load_torch),
    ".onnx": (_write_onnx, _load_onnx),
}


# Whether it is the same.


def _read_back(load: Callable[[Path], Program], written: Path, path: str) -> Program:
    try:
        return load(written)
    except Exception as error:  # of the runtime's own types
        raise ValueError(
            f"{path!r} was not written: the program cannot be loaded: {_reason(error)} Give check=False to have it "
            f"as it is."
        ) from error


def _compare(program: Program, module: nn.Module, x: Any, tolerance: float | None, path: str) -> None:
    wanted, told = _tensors(forward(module, x)), f"{path!r} was not written: for a batch of {len(next(leaves(x)))} the"
    try:
        found = program(x)
    except Exception as error:  # of the runtime's own types
        raise ValueError(f"{told} program fails: {_reason(error)} {ADVICE}") from error
    told += " program returns"
    shapes = [", ".join(str(tuple(one.shape)) for one in ones) for ones in (found, wanted)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{told} shapes {shapes[0]}, where the module returns {shapes[1]}. {ADVICE}")
    for one, other in zip(found, wanted, strict=True):
        difference, allowed = _difference(one, other), _allowed(other, tolerance)
        if not difference <= allowed:  # NaN is not, either
            raise ValueError(
                f"{told} what differs from the module's by up to {difference:.3g}, and only {allowed:.3g} is rounding. "
                f"{ADVICE}"
            )


ADVICE = (
    "Forward may draw random numbers, or decide by values in Python. Give check=False to have the program as it is, or "
    "a larger tolerance."
)


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference of two values; there is none between NaNs."""
    is_equal = (one == other) | ((one != one) & (other != other))
    differences = torch.where(is_equal, 0, (_wide(one) - _wide(other)).abs())
    return float(differences.max()) if differences.numel() else 0.0


def _allowed(wanted: Tensor, tolerance: float | None) -> float:
    tolerance = TOLERANCES.get(wanted.dtype, 0.0) if tolerance is None else tolerance
    sizes = _wide(wanted[torch.isfinite(wanted)]).abs()
    return tolerance * max(1.0, float(sizes.max()) if sizes.numel() else 0.0)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
