"""FLOPs against the sums of products that one writes down; peaks by the names that torch has for GPUs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from kerastorch import flops
from kerastorch.flops import FlopMeter, _peaks_named, seconds_at_peak


def counted(run):
    meter = FlopMeter()
    meter.start()
    try:
        run()
    finally:
        meter.stop()
    assert _get_current_dispatch_mode() is None
    return dict(meter.flops)


def trained(net, *inputs):
    output = net(*inputs)
    (output[0] if isinstance(output, tuple) else output).float().sum().backward()


LINEAR = 2 * 32 * 4 * 8  # one product of a batch of 32, 4 features, 8 outputs


@pytest.mark.parametrize(
    ("net", "shape", "forward", "products"),
    [
        (nn.Linear(4, 8), (32, 4), LINEAR, 2),  # the input needs no gradient
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), (32, 4), LINEAR, 2 + 3),
        (nn.Linear(4, 8).requires_grad_(False), (32, 4), LINEAR, 1),
        (nn.Conv2d(3, 2, 3), (5, 3, 8, 8), 2 * 5 * 36 * 27 * 2, 2),
        (nn.LSTM(4, 5), (3, 2, 4), 2 * (3 * 2) * (20 * 4 + 20 * 5), 3),
        (nn.LSTM(4, 5, batch_first=True, bidirectional=True), (2, 3, 4), 2 * 2 * (3 * 2) * (20 * 4 + 20 * 5), 3),
        (nn.ReLU(), (32, 4), 0, 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_step_takes_so_many_products(net, shape, forward, products):
    parts = [part for part in net.parameters() if part.requires_grad]
    found = counted(lambda: trained(net, torch.rand(shape)) if parts else net(torch.rand(shape)))
    assert sum(found.values()) == forward * products and set(found) <= {"fp32"}


def test_attention_is_counted_forward_and_backward():
    query, key, value = (torch.rand(2, 3, length, 8, requires_grad=True) for length in (5, 7, 7))
    attention = nn.functional.scaled_dot_product_attention
    product = 2 * (2 * 3) * 5 * 7 * 8
    assert counted(lambda: attention(query.detach(), key.detach(), value.detach())) == {"fp32": 2 * product}
    # Backward: the scores again, and two products for each of the two.
    assert counted(lambda: trained(attention, query, key, value)) == {"fp32": (2 + 5) * product}


def test_each_format_is_counted_for_itself():
    net, x = nn.Linear(4, 8), torch.rand(32, 4)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            output = net(x)
        (output.float() @ torch.rand(8, 3)).sum().backward()
        torch.rand(5, 6, dtype=torch.float64) @ torch.rand(6, 7, dtype=torch.float64)
        torch.rand(5, 6, dtype=torch.complex64) @ torch.rand(6, 7, dtype=torch.complex64)
        torch.rand(5, 6).half() @ torch.rand(6, 7).half()

    product = 2 * 5 * 6 * 7
    assert counted(run) == {
        "bf16": 2 * LINEAR,
        "fp32": 2 * 2 * 32 * 8 * 3,
        "fp64": product,
        "complex64": product,
        "fp16": product,
    }


def test_a_meter_counts_anew_and_ends_quietly():
    meter, net, x = FlopMeter(), nn.Linear(4, 8), torch.rand(32, 4)
    meter.stop()
    for _ in range(2):
        meter.start()
        net(x)
        meter.start()  # which ends the one before
        net(x)
        meter.stop()
        net(x)
        assert meter.flops == {"fp32": LINEAR} and _get_current_dispatch_mode() is None


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835.5, 60),
        ("NVIDIA H200", 989.5, 67),
        ("NVIDIA H200 NVL", 835.5, 60),
        ("NVIDIA GH200 480GB", 989.5, 67),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA A100-SXM4-40GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA A40", 149.7, 37.4),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40", 181, 90.5),
        ("NVIDIA L40S", 362, 91.6),
        ("Tesla T4", None, 8.1),
        ("Tesla V100-SXM2-16GB", None, 15.7),
        ("Tesla V100-PCIE-32GB", None, 14),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("AMD Instinct MI300X", 1307.4, 163.4),
    ],
)
def test_gpus_are_known_by_name(name, bf16, fp32):
    peaks = _peaks_named(name)
    assert peaks["fp32"] == fp32 * 1e12
    assert peaks.get("bf16") == (None if bf16 is None else bf16 * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "Tesla V100S-PCIE-32GB",
        "NVIDIA A1000",
        "Some GPU",
        "",
    ],
)
def test_others_have_no_peak(name):
    assert _peaks_named(name) == {}


def test_tensor_cores_are_faster_the_less_exact_they_are():
    for peaks in flops.PEAKS.values():
        assert peaks["fp32"] <= peaks.get("tf32", peaks["fp32"]) <= peaks["fp16"] == peaks.get("bf16", peaks["fp16"])
        assert all(1e12 < peak < 1e16 for peak in peaks.values())


def test_time_at_the_peak_adds_up_and_is_unknown_where_a_part_is():
    peaks = {"bf16": 4.0, "fp32": 2.0}
    assert math.isclose(seconds_at_peak({"bf16": 4, "fp32": 1}, peaks), 1.5)
    assert seconds_at_peak({"bf16": 4, "fp64": 1}, peaks) is None
    assert seconds_at_peak({"bf16": 4}, {}) is None and seconds_at_peak({}, peaks) is None
    assert flops.peaks_of(torch.device("cpu")) == {}


def test_a_gpu_is_asked_for_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", {torch.device("cuda:1"): "NVIDIA L4"}.get)
    assert flops.peaks_of(torch.device("cuda:1"))["bf16"] == 121e12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_gpu_rounds_factors_where_it_may(precision):
    net, x = nn.Linear(64, 8, device="cuda"), torch.rand(32, 64, device="cuda")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = counted(lambda: trained(net, x))
    finally:
        torch.set_float32_matmul_precision(before)
    rounds = precision == "high" and "tf32" in flops.peaks_of(x.device)
    assert found == {"tf32" if rounds else "fp32": 2 * 2 * 32 * 64 * 8}
