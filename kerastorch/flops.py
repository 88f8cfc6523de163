"""Floating point operations (FLOPs): how many a computation takes, by format, and how many a GPU can do in a second.

A multiplication and an addition are two. Only products of matrices, convolutions, attention and recurrent layers count:
that is what peaks are stated for.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

FORMATS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


def _tera(**peaks: float) -> dict[str, float]:
    return {name: peak * 1e12 for name, peak in peaks.items()}


# Dense, so without the sparsity that most data sheets count in (their footnote says to halve), and accumulated in fp32
# as torch does. The vendors' data sheets of these products; for GeForce, NVIDIA's GA102 and Ada white papers.
PEAKS: dict[str, dict[str, float]] = {
    r"V100-SXM2-\d+GB": _tera(fp32=15.7, fp16=125),
    r"V100-PCIE-\d+GB": _tera(fp32=14, fp16=112),
    r"T4": _tera(fp32=8.1, fp16=65),
    r"A10": _tera(fp32=31.2, tf32=62.5, bf16=125, fp16=125),
    r"A30": _tera(fp32=10.3, tf32=82, bf16=165, fp16=165),
    r"A40": _tera(fp32=37.4, tf32=74.8, bf16=149.7, fp16=149.7),
    r"A100([ -].*)?": _tera(fp32=19.5, tf32=156, bf16=312, fp16=312),
    r"GeForce RTX 3090": _tera(fp32=35.6, tf32=35.6, bf16=71, fp16=71),
    r"L4": _tera(fp32=30.3, tf32=60, bf16=121, fp16=121),
    r"L40": _tera(fp32=90.5, tf32=90.5, bf16=181, fp16=181),
    r"L40S": _tera(fp32=91.6, tf32=183, bf16=362, fp16=362),
    r"GeForce RTX 4090": _tera(fp32=82.6, tf32=82.6, bf16=165.2, fp16=165.2),
    r"H100 PCIe": _tera(fp32=51, tf32=378, bf16=756, fp16=756),
    r"H100 NVL|H200 NVL": _tera(fp32=60, tf32=417.5, bf16=835.5, fp16=835.5),
    r"H100 80GB HBM3|H200|GH200 .*": _tera(fp32=67, tf32=494.5, bf16=989.5, fp16=989.5),
    r"B200": _tera(fp32=75, tf32=1125, bf16=2250, fp16=2250),
    r"Instinct MI300X": _tera(fp32=163.4, bf16=1307.4, fp16=1307.4),
}


def peaks_of(device: torch.device) -> Mapping[str, float]:
    """FLOP/s that a device can do at most, by format; empty where nobody knows."""
    return _peaks_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else {}


def _peaks_named(name: str) -> Mapping[str, float]:
    """Peaks by the name that torch has for a GPU; a part of one (MIG) is none of these.

    Example:
        >>> _peaks_named("NVIDIA A100-SXM4-80GB")["bf16"], _peaks_named("NVIDIA A100-SXM4-40GB MIG 1g.5gb")
        (312000000000000.0, {})
    """
    name = re.sub(r"^(NVIDIA|AMD|Tesla) ", "", name)
    if "MIG" in name:
        return {}
    return next((peaks for pattern, peaks in PEAKS.items() if re.fullmatch(pattern, name)), {})


def seconds_at_peak(flops: Mapping[str, float], peaks: Mapping[str, float]) -> float | None:
    """Seconds that work in these formats takes at the peaks; `None` where one has no known peak.

    Example:
        >>> seconds_at_peak({"bf16": 4e12, "fp32": 1e12}, {"bf16": 4e12, "fp32": 2e12})
        1.5
    """
    if not flops or not set(flops) <= set(peaks):
        return None
    return sum(number / peaks[name] for name, number in flops.items())


class FlopMeter:
    """Counts the FLOPs of all that runs between `start` and `stop`, backward passes included.

    What was compiled runs eagerly meanwhile.

    Attributes:
        flops: What was counted, by format: `"fp16"`, `"bf16"`, `"tf32"`, `"fp32"`, `"fp64"`, or torch's name of others.
    """

    def __init__(self) -> None:
        self.flops: Counter = Counter()
        self._open: ExitStack | None = None

    def start(self) -> None:
        """From now on, anew."""
        from torch.utils.flop_counter import FlopCounterMode, flop_registry

        self.stop()
        self.flops.clear()
        formulas = flop_registry | _left_out()
        counting = {op: self._counting(op, formula) for op, formula in formulas.items()}
        with ExitStack() as opened:
            if "torch._dynamo" in sys.modules:  # in compiled code nobody sees the operators
                opened.enter_context(torch.compiler.set_stance("force_eager"))
            opened.enter_context(FlopCounterMode(display=False, custom_mapping=counting))
            self._open = opened.pop_all()

    def stop(self) -> None:
        """Until now; nothing where it is not counting."""
        opened, self._open = self._open, None
        if opened is not None:
            opened.close()

    def _counting(self, op: Any, formula: Callable) -> Callable:
        def count(*args: Any, **kwargs: Any) -> int:
            number = formula(*args, **kwargs)
            self.flops[_format_of(op, args)] += number
            return number

        count._get_raw = True  # tells torch that it takes tensors, not shapes
        return count


def _format_of(op: Any, args: tuple) -> str:
    """The format that an operator multiplies in."""
    first = next(arg for arg in args if isinstance(arg, Tensor))
    if first.dtype != torch.float32:
        return FORMATS.get(first.dtype, str(first.dtype).removeprefix("torch."))
    if not first.is_cuda:
        return "fp32"
    is_convolution = "conv" in str(op)
    products = torch.backends.cudnn.conv if is_convolution else torch.backends.cuda.matmul
    is_rounded = products.fp32_precision == "tf32" and "tf32" in peaks_of(first.device)
    return "tf32" if is_rounded else "fp32"


def _left_out() -> dict[Any, Callable]:
    """Formulas for what torch's counter does not know: attention on the CPU, and fused recurrent layers."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query.shape, key.shape, value.shape)

    def attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)

    def recurrent(input: Tensor, *weights: Any, **_: Any) -> int:
        # Each weight matrix meets each step of each sequence once. cuDNN passes its weights as one list.
        matrices = weights[:2] if isinstance(weights[0], Tensor) else [one for one in weights[0] if one.ndim == 2]
        return 2 * input.numel() // input.shape[-1] * sum(matrix.numel() for matrix in matrices)

    def recurrent_backward(*args: Any, **_: Any) -> int:
        return 2 * recurrent(*args)  # a product for the gradient of each factor

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        aten.mkldnn_rnn_layer: recurrent,
        aten.mkldnn_rnn_layer_backward: recurrent_backward,
        aten._cudnn_rnn: recurrent,
        aten._cudnn_rnn_backward: recurrent_backward,
    }
