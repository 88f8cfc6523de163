"""The summary's numbers against hand calculations, its tables against golden files, the module against its own past.

`KERASTORCH_RECORD=1 pytest tests/test_summary.py` writes the golden files again; read the difference in review.
"""

import copy
import html
import io
import os
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kerastorch.summary import Summary, summarize

GOLDEN = Path(__file__).parent / "golden"
FLOAT_BYTES = 4


class ConvNet(nn.Module):
    """A frozen stem, a batch norm with buffers, a container and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)
        self.body = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 16, 3, bias=False))
        self.head = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(images)).mean((2, 3)))


class TiedLanguageModel(nn.Module):
    """Tied weights, a block called twice and registered twice, a tuple and a dict among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.again = self.block
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.unused = nn.Linear(8, 3)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> dict:
        hidden = self.again(self.block(self.embedding(tokens)))
        hidden, state = self.recurrent(hidden)
        return {"logits": self.head(hidden), "state": state, "cache": None}


class ReadsValue(nn.Module):
    """Cannot run without values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.linear(values) * values.sum().item()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def assert_golden(name: str, text: str) -> None:
    path = GOLDEN / f"summary_{name}.txt"
    if os.environ.get("KERASTORCH_RECORD"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    assert text + "\n" == path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **sizes)
    return transformers.BertForSequenceClassification(config)


# Tables


def test_table_of_a_convnet_with_a_frozen_layer() -> None:
    assert_golden("convnet", str(summarize(ConvNet(), (32, 3, 8, 8), batch_size=64)))


def test_table_without_input_has_no_shapes_flops_or_memory() -> None:
    assert_golden("without_input", str(summarize(ConvNet().eval(), depth="top")))


def test_table_of_shared_layers_and_several_outputs() -> None:
    assert_golden("shared", str(summarize(TiedLanguageModel(), torch.zeros(2, 5, dtype=torch.long))))


def test_table_of_an_untraceable_module_says_why() -> None:
    assert_golden("untraceable", str(summarize(ReadsValue(), (3, 4))))


def test_repr_is_the_table_and_depth_limits_its_rows() -> None:
    summary = summarize(ConvNet(), depth=1)
    assert repr(summary) == str(summary)
    assert [row.name for row in summary.rows] == ["", "stem", "body", "head"]
    assert len(summarize(ConvNet(), depth="full").rows) == 8


def test_last_children_leave_no_line_below_them() -> None:
    module = nn.Sequential(nn.Sequential(nn.Sequential(nn.ReLU())), nn.Sequential(nn.ReLU()))
    lines = [line.split("  train")[0].rstrip(" —") for line in str(summarize(module)).splitlines()[2:8]]
    assert lines[1:] == [
        "├─ 0: Sequential",
        "│  └─ 0: Sequential",
        "│     └─ 0: ReLU",
        "└─ 1: Sequential",
        "   └─ 0: ReLU",
    ]


def test_no_escape_codes_in_a_pipe(capsys: pytest.CaptureFixture) -> None:
    summary = summarize(ConvNet())
    summary.print()
    assert capsys.readouterr().out == str(summary) + "\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_on_a_terminal_unless_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = summarize(ConvNet())
    monkeypatch.delenv("NO_COLOR", raising=False)
    summary.print(coloured := Terminal())
    frozen = next(line for line in coloured.getvalue().splitlines() if "stem" in line)
    assert frozen.startswith("\x1b[2m\x1b[33m") and frozen.endswith("\x1b[0m")
    monkeypatch.setenv("NO_COLOR", "1")
    summary.print(plain := Terminal())
    assert plain.getvalue() == str(summary) + "\n"


def test_html_is_escaped() -> None:
    hostile = type("<script>", (nn.ReLU,), {})()
    shown = summarize(nn.Sequential(OrderedDict({"a&b": hostile})), (2, 3))._repr_html_()
    assert "<script>" not in shown
    assert html.escape("a&b: <script>") in shown
    assert "one training step" in shown


# Numbers


@pytest.mark.parametrize("depth", [1, 2, 3, "full"])
def test_rows_add_up_to_the_parameters_at_every_depth(depth: int | str) -> None:
    for module in (ConvNet(), TiedLanguageModel(), nn.Transformer(8, 2, 1, 1, 16)):
        summary = summarize(module, depth=depth)
        total = sum(parameter.numel() for parameter in module.parameters())
        assert sum(row.parameters for row in summary.rows) == summary.total_parameters == total
        assert summary.parameter_bytes == total * FLOAT_BYTES


def test_trainable_and_frozen_parameters_and_buffers() -> None:
    summary = summarize(ConvNet(), depth="top")
    assert summary.frozen_parameters == 3 * 8 * 9 + 8
    assert summary.trainable_parameters == 2 * 8 + 8 * 16 * 9 + 16 * 10 + 10
    assert summary.buffer_bytes == 2 * 8 * FLOAT_BYTES + 8
    module = nn.Sequential(mlp())
    module[0][0].requires_grad_(False)
    assert summarize(module, depth=1).rows[1].trainable == "partly"


def test_flops_of_linear_conv_attention_and_recurrent_layers() -> None:
    assert summarize(nn.Linear(5, 7), (3, 5)).flops == 2 * 3 * 5 * 7
    assert summarize(nn.Conv2d(3, 8, 3), (2, 3, 10, 12)).flops == 2 * 2 * 8 * 10 * 3 * 9 * 8
    projections, attention = 2 * (3 * 5) * 8 * (4 * 8), 2 * (2 * 3 * 2 * 5 * 5 * 4)
    assert summarize(nn.MultiheadAttention(8, 2, batch_first=True), ((3, 5, 8),) * 3).flops == projections + attention
    for layer, gates in ((nn.LSTM(4, 8), 4), (nn.GRU(4, 8), 3)):
        assert summarize(layer, (6, 3, 4)).flops == 2 * 6 * 3 * gates * 8 * (4 + 8)


def test_flops_by_layer_add_up_and_count_each_call() -> None:
    summary = summarize(ConvNet(), (2, 3, 8, 8))
    flops = {row.name: row.flops for row in summary.rows}
    assert flops["stem"] + flops["body"] + flops["head"] == flops[""] == summary.flops
    shared = nn.Linear(4, 4)
    row = summarize(nn.Sequential(shared, shared), (3, 4)).rows[1]
    assert (row.calls, row.flops) == (2, 2 * (2 * 3 * 4 * 4))


def test_activations_of_a_perceptron_by_hand() -> None:
    batch = 1000
    parts = summarize(mlp(), (batch, 4)).step_parts
    # Kept for backward: the batch, ReLU's output (its input is freed), and the output.
    assert parts["activations"] == batch * (4 + 16 + 3) * FLOAT_BYTES
    # The peak is in ReLU's backward, which adds the gradients of the output, of ReLU's output and of its input, and
    # those of the last layer's weights.
    assert parts["gradients"] == (batch * (3 + 16 + 16) + 16 * 3 + 3) * FLOAT_BYTES


def test_batch_size_scales_activations_but_not_weights_or_shapes() -> None:
    small, large = summarize(ConvNet(), (8, 3, 8, 8)), summarize(ConvNet(), (8, 3, 8, 8), batch_size=80)
    assert large.step_parts["activations"] == pytest.approx(10 * small.step_parts["activations"], rel=0.01)
    assert large.step_parts["parameters"] == small.step_parts["parameters"]
    assert large.rows == small.rows and large.flops == small.flops and large.batch_size == 80


def test_memory_of_a_step_is_that_of_a_measured_step() -> None:
    tracker_module = pytest.importorskip("torch.distributed._tools.mem_tracker")
    module, images, targets = ConvNet(), torch.randn(64, 3, 8, 8), torch.randint(10, (64,))
    module.requires_grad_(True)  # MemTracker cannot follow frozen layers
    optimizer = torch.optim.Adam(module.parameters())

    def step() -> None:
        nn.functional.cross_entropy(module(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    tracker = tracker_module.MemTracker()
    tracker.track_external(module, optimizer, images)
    with tracker:
        step()
    measured = max(next(iter(tracker.get_tracker_snapshot("peak").values())).values())
    assert summarize(module, images, optimizer=optimizer).step_bytes == pytest.approx(measured, rel=0.02)


def test_checkpointing_lowers_activations() -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, values, use_reentrant=False)

    layers = [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()]
    plain, checkpointed = summarize(nn.Sequential(*layers), (50, 8)), summarize(Checkpointed(*layers), (50, 8))
    assert checkpointed.step_parts["activations"] == 2 * 50 * 8 * FLOAT_BYTES < plain.step_parts["activations"]


def test_autocast_lowers_activations() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        mixed = summarize(ConvNet(), (64, 3, 8, 8))
    full = summarize(ConvNet(), (64, 3, 8, 8))
    assert mixed.step_parts["activations"] < full.step_parts["activations"]


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (lambda parameters: torch.optim.SGD(parameters, 0.1), 0),
        (lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9), 1),
        (lambda parameters: torch.optim.RMSprop(parameters, centered=True, momentum=0.9), 3),
        (lambda parameters: torch.optim.Adagrad(parameters), 1),
        (lambda parameters: torch.optim.AdamW(parameters), 2),
        (lambda parameters: torch.optim.Adam(parameters, amsgrad=True), 3),
    ],
)
def test_optimizer_state_is_foreseen_and_then_counted(make, copies: int) -> None:
    module = mlp()
    optimizer = make(module.parameters())
    foreseen = summarize(module, (2, 4), optimizer=optimizer).step_parts["optimizer"]
    module(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    counted = summarize(module, (2, 4), optimizer=optimizer).step_parts["optimizer"]
    # PyTorch also keeps the step number, one float per parameter.
    assert foreseen == pytest.approx(counted, abs=4 * FLOAT_BYTES)
    assert foreseen == pytest.approx(copies * summarize(module).parameter_bytes, abs=4 * FLOAT_BYTES)


# Inputs and outputs


@pytest.mark.parametrize(
    "given",
    [(5, 4), torch.Size([5, 4]), torch.zeros(5, 4), (torch.zeros(5, 4),), {"input": torch.zeros(5, 4)}, ((5, 4),)],
    ids=["shape", "Size", "tensor", "tuple", "dict", "tuple of shapes"],
)
def test_every_form_of_input_gives_the_same_table(given) -> None:
    assert str(summarize(nn.Linear(4, 2), given)) == str(summarize(nn.Linear(4, 2), (5, 4)))


def test_numpy_floats_take_the_modules_dtype_and_integers_stay() -> None:
    numpy = pytest.importorskip("numpy")
    frozen = numpy.zeros((5, 4))
    frozen.flags.writeable = False
    assert summarize(nn.Linear(4, 2), frozen[::-1]).rows[0].output_shape == (5, 2)
    assert summarize(nn.Embedding(9, 2), numpy.zeros(5, numpy.int32)).rows[0].output_shape == (5, 2)


def test_shape_stands_for_the_modules_dtype() -> None:
    summary = summarize(nn.Linear(4, 2).to(torch.bfloat16), (5, 4))
    assert (summary.rows[0].dtype, summary.rows[0].output_shape, summary.note) == ("bfloat16", (5, 2), "")


def test_tuples_dicts_and_dataclasses_of_outputs() -> None:
    @dataclass
    class Output:
        scores: torch.Tensor
        boxes: list
        comment: str = "not a tensor"

    class Detector(nn.Module):
        def forward(self, images: torch.Tensor) -> Output:
            return Output(images.mean(), [images] * 5)

    row = summarize(Detector(), (2, 3)).rows[0]
    assert row.output_shape == {"scores": (), "boxes": [(2, 3)] * 5}
    assert "{scores: (), boxes: [(2, 3), (2, 3), (2, 3), … 5 in all]}" in str(summarize(Detector(), (2, 3)))


@pytest.mark.conformance
def test_transformers_model_with_labels_and_mask(bert: nn.Module) -> None:
    tokens = torch.ones(2, 7, dtype=torch.long)
    batch = {"input_ids": tokens, "attention_mask": tokens, "labels": torch.ones(2, dtype=torch.long)}
    summary = summarize(bert, batch, batch_size=4)
    assert summary.note == ""
    assert summary.rows[0].output_shape == {"loss": (), "logits": (2, 2)}
    bert(**batch)  # transformers installs hooks on the first call, which then belong to its forward
    assert str(summarize(bert, batch, batch_size=4)) == str(summary)


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Identity(), nn.Sequential()])
def test_modules_without_parameters(module: nn.Module) -> None:
    summary = summarize(module, (2, 3))
    assert (summary.total_parameters, summary.flops, summary.note) == (0, 0, "")
    assert summary.rows[0].output_shape == (2, 3)


def test_compiled_module_is_shown_as_what_it_compiles() -> None:
    assert str(summarize(torch.compile(mlp()), (2, 4))) == str(summarize(mlp(), (2, 4)))


# The module as it was


def test_nothing_of_the_module_changes() -> None:
    module = ConvNet()
    module.body[0].eval()
    module(torch.randn(4, 3, 8, 8)).sum().backward()
    before = copy.deepcopy(module.state_dict())
    gradient = module.head.weight.grad.clone()
    modes = [layer.training for layer in module.modules()]
    random_state = torch.get_rng_state()
    attributes = {name: dict(vars(layer)) for name, layer in module.named_modules()}
    summarize(module, (4, 3, 8, 8), batch_size=2)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())
    assert torch.equal(gradient, module.head.weight.grad) and module.stem.weight.grad is None
    assert modes == [layer.training for layer in module.modules()]
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(vars(layer).keys() == attributes[name].keys() for name, layer in module.named_modules())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())


def test_python_and_numpy_generators_are_as_before() -> None:
    import random

    numpy = pytest.importorskip("numpy")

    class Draws(nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return values * random.random() * float(numpy.random.rand())

    states = random.getstate(), numpy.random.get_state()[1].tolist()
    assert summarize(Draws(), (2, 3)).note == ""
    assert states == (random.getstate(), numpy.random.get_state()[1].tolist())


def test_module_is_as_before_when_forward_raises() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5))
    summary = summarize(module, (2, 4))
    assert "RuntimeError" in summary.note and summary.flops is summary.step_bytes is None
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())


def test_lazy_layers_show_what_they_would_get_and_stay_lazy() -> None:
    module = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
    ready = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    assert str(summarize(module, (2, 3, 8, 8))) == str(summarize(ready, (2, 3, 8, 8)))
    assert isinstance(module[3], nn.LazyLinear) and module[3].has_uninitialized_params()
    assert isinstance(module[1].running_mean, nn.UninitializedBuffer)
    without = summarize(module)
    assert without.total_parameters == 0 and "Lazy layers" in without.note


def test_forward_never_runs_for_real() -> None:
    class Witness(nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            seen.append(type(values).__name__)
            return values if values.sum() > 0 else -values

    seen: list[str] = []
    summary = summarize(Witness(), torch.ones(2, 3))
    assert seen == ["FakeTensor"]
    assert summary.note.startswith("No shapes: tracing a copy on fake tensors") and "DataDependent" in summary.note


def test_shapes_remain_when_only_training_fails() -> None:
    summary = summarize(nn.BatchNorm1d(3).eval(), (1, 3))
    assert summary.rows[0].output_shape == (1, 3) and summary.rows[0].mode == "eval"
    assert summary.step_bytes is None and summary.note.startswith("No training memory")
    assert summarize(nn.BatchNorm1d(3).eval(), (1, 3), batch_size=2).note == ""


# Mistakes


@pytest.mark.parametrize("depth", [0, -1, "all", 1.5, True, None])
def test_bad_depth_is_named(depth) -> None:
    with pytest.raises(ValueError, match=r"depth=.* is not a depth. Give a number of levels from 1 up"):
        summarize(nn.ReLU(), depth=depth)


@pytest.mark.parametrize("given", [{1, 2}, "image", 3])
def test_bad_input_is_named(given) -> None:
    with pytest.raises(TypeError, match=rf"input is a {type(given).__name__}; expected a tensor"):
        summarize(nn.ReLU(), given)


def test_other_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"input shape \(-1, 3\) has a negative size"):
        summarize(nn.ReLU(), (-1, 3))
    with pytest.raises(ValueError, match="batch_size=0 is not a batch size"):
        summarize(nn.ReLU(), (2, 3), batch_size=0)
    with pytest.raises(TypeError, match="module is a type; expected a torch.nn.Module"):
        summarize(nn.ReLU)


def test_import_brings_in_nothing_heavy() -> None:
    heavy = ["tabulate", "colorama", "tqdm", "torchmetrics", "torch.utils.flop_counter", "torch._dynamo"]
    program = (
        "import sys, torch; before = set(sys.modules); import kerastorch\n"
        f"assert not set({heavy!r}) & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_summary_is_frozen() -> None:
    summary = summarize(nn.ReLU())
    assert isinstance(summary, Summary)
    with pytest.raises(AttributeError):
        summary.note = "changed"


def test_a_pipe_that_cannot_show_the_branches_gets_the_numbers_all_the_same() -> None:
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    summarize(nn.Sequential(nn.Linear(2, 3)), (4, 2)).print(pipe)
    pipe.flush()
    assert b"parameters: 9" in pipe.buffer.getvalue()


def test_states_of_several_optimizers_are_added_up() -> None:
    module = nn.ModuleDict({"g": nn.Linear(4, 3), "d": nn.Linear(4, 2)})
    pair = {
        "g": torch.optim.Adam(module["g"].parameters()),
        "d": torch.optim.SGD(module["d"].parameters(), momentum=0.9),
    }

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = module

        def forward(self, x):
            return self.parts["g"](x).sum() + self.parts["d"](x).sum()

    found = summarize(Both(), (2, 4), optimizer=pair)
    assert found.step_parts["optimizer"] == 4 * (2 * 15 + 10)
    assert found.optimizer == "Adam and SGD"
