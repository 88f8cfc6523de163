"""Activations computed again in backward: the same numbers, less memory, and a module that is as it was."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import kerastorch as kt
from kerastorch import recomputing
from kerastorch.recomputing import parts_to_recompute, recomputed, refuse_unknown

ROOT = Path(__file__).parent.parent


class Block(nn.Module):
    """Residual, with all that must be the same when it is computed again: random numbers and running statistics."""

    def __init__(self, width: int = 16, norm: type[nn.Module] = nn.BatchNorm1d):
        super().__init__()
        self.inner, self.norm = nn.Linear(width, 4 * width), norm(4 * width)
        self.drop, self.outer = nn.Dropout(0.2), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.outer(self.drop(torch.relu(self.norm(self.inner(x)))))


def blocks(count: int = 3, **options) -> nn.Module:
    return nn.Sequential(*[Block(**options) for _ in range(count)])


def doubled(x):
    return 2 * x


class Wrapped(nn.Module):
    """One part, named `part`, and what becomes of its output."""

    def __init__(self, part, call=lambda part, x: part(x)):
        super().__init__()
        self.part, self.call = part, call

    def forward(self, x):
        return self.call(self.part, x)


def trained(net, x, what, passes=2):
    """Gradients, then buffers, after some passes in train mode with the same seed; of a copy."""
    net = copy.deepcopy(net).train()
    torch.manual_seed(1)
    with recomputed(net, what):
        for _ in range(passes):
            net(x).square().mean().backward()
    return [parameter.grad for parameter in net.parameters()] + list(net.buffers())


def assert_same(first, second):
    assert len(first) == len(second)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def kept_bytes(net, x, what) -> int:
    """What a forward pass keeps for backward besides parameters."""
    own, kept = {parameter.data_ptr() for parameter in net.parameters()}, {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with recomputed(net, what), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def forward_calls(net) -> list[str]:
    """Names of submodules, as they are called."""
    called = []
    for name, part in net.named_modules():
        part.register_forward_hook(lambda *_, name=name: called.append(name))
    return called


# The same numbers.


class Momentless(nn.BatchNorm1d):
    def __init__(self, width):
        super().__init__(width, momentum=None)


class OwnNorm(nn.Module):
    """Running statistics that torch changes without a trace in their version."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var, training=self.training)


class Codebook(nn.Module):
    """Reads a buffer and then replaces it, and counts in place in another that two modules share."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("count", torch.zeros(()))
        self.twin = nn.Module()
        self.twin.register_buffer("count", self.count)

    def forward(self, x):
        self.count.add_(1)
        shifted = (x - self.mean) * self.twin.count
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return shifted


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, Momentless, nn.LayerNorm, OwnNorm, Codebook])
def test_gradients_and_buffers_are_those_without(norm):
    net, x = blocks(norm=norm), torch.randn(8, 16)
    assert_same(trained(net, x, True), trained(net, x, False))


def test_a_power_iteration_goes_one_step_on_in_each_pass():
    net = nn.Sequential(*[nn.Sequential(spectral_norm(nn.Linear(6, 6)), nn.Tanh()) for _ in range(2)])
    x = torch.randn(8, 6)
    assert_same(trained(net, x, True), trained(net, x, False))


def test_a_buffer_that_carries_a_gradient_is_one_that_does_again():
    class Carry(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("state", torch.ones(4))

        def forward(self, x):
            self.state = torch.tanh(self.linear(x).mean(0) * self.state)
            return x * self.state

    net, x, results = Wrapped(Carry(), lambda part, x: part(part(x))), torch.rand(3, 4), []
    for what in ("part", None):
        one = copy.deepcopy(net)
        with recomputed(one, what):
            one(x).sum().backward()
        results.append([parameter.grad for parameter in one.parameters()])
    assert_same(*results)


def test_constants_are_not_kept_for_the_second_pass():
    net = Wrapped(Block(norm=nn.LayerNorm))
    net.part.register_buffer("mask", torch.zeros(1000))
    buffers = recomputing._Buffers(tuple(net.part.modules()))
    with buffers._watched():
        net.part(torch.rand(2, 16))
    assert not buffers.before
    with buffers._watched():
        net.part.mask.add_(1)
    assert [name for _, name in buffers.before] == ["mask"]


def test_backward_twice_recomputes_from_the_same_state():
    net, x, gradients = Wrapped(Codebook(4)), torch.rand(3, 4, requires_grad=True), []
    with recomputed(net, "part"):
        for _ in range(2):
            net(x)  # the state moves on
        loss = net(x).square().sum()
        for _ in range(2):
            gradients.append(torch.autograd.grad(loss, x, retain_graph=True)[0])
    assert torch.equal(*gradients)
    assert net.part.count == 3


def test_a_part_called_several_times_is_recomputed_with_what_it_had_then():
    net, x = Wrapped(Block(), lambda part, x: part(part(x)) + part(x)), torch.randn(8, 16)
    assert_same(trained(net, x, "part"), trained(net, x, None))


def test_a_part_of_two_names_is_found_by_either_and_recomputed_once():
    net = nn.ModuleDict({"first": Block(), "second": nn.Identity()})
    net["second"] = net["first"]
    assert list(parts_to_recompute(net, "second")) == ["second"]
    assert list(parts_to_recompute(net, Block)) == ["first"]


@pytest.mark.parametrize("by_name", [False, True])
def test_autocast_holds_in_the_second_pass(by_name):
    dtypes = []

    class Seen(Block):
        def forward(self, x):
            hidden = self.inner(x)
            dtypes.append(hidden.dtype)
            return self.outer(torch.relu(hidden))

    net = Wrapped(Seen(), (lambda part, x: part(x=x)) if by_name else (lambda part, x: part(x)))
    with recomputed(net, "part"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(torch.rand(2, 16)).sum()
        loss.backward()
    assert dtypes == [torch.bfloat16] * 2


def test_inputs_and_outputs_of_any_structure():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, scale=None, *, debug, use_reentrant=None):
            hidden = torch.tanh(self.linear(x["a"])) * debug
            return {"two": (hidden, None), "scale": scale, "sum": hidden.exp().sum()}

    def call(part, x):
        output = part(x={"a": x}, scale=None, debug=x + 1)
        assert output["two"][1] is None
        assert output["scale"] is None
        return output["two"][0] * output["sum"]

    net, x = Wrapped(Odd(), call), torch.rand(3, 4)
    assert_same(trained(net, x, "part"), trained(net, x, None))


def test_frozen_parts_are_fine():
    net, x = blocks(), torch.rand(8, 16)
    for parameter in net[:2].parameters():
        parameter.requires_grad_(False)
    net[0].register_forward_pre_hook(lambda *_: None)
    for what in (True, False):
        one = copy.deepcopy(net)
        with recomputed(one, what):
            one(x).sum().backward()
        assert [parameter.grad is None for parameter in one.parameters()] == [True] * 12 + [False] * 6


# The memory.


def test_a_transformer_keeps_little_more_than_the_inputs_of_its_layers():
    layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.1, batch_first=True)
    net, x = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False), torch.rand(8, 32, 32)
    input_bytes = x.numel() * x.element_size()
    assert kept_bytes(net, x, True) == 12 * input_bytes
    assert kept_bytes(net, x, False) > 12 * 12 * input_bytes


def test_nothing_is_computed_twice_nor_copied_without_gradients(monkeypatch):
    monkeypatch.setattr(recomputing, "checkpoint", None)
    net, x = blocks(), torch.rand(8, 16)
    with recomputed(net, True):
        with torch.no_grad():
            net(x)
        net.eval()(x).sum().backward()
        net.train()
        with pytest.raises(TypeError):
            net(x)


# The module.


def test_while_it_holds_the_module_looks_as_before():
    net = blocks()
    before = {
        "keys": list(net.state_dict()),
        "types": list(map(type, net.modules())),
        "names": list(dict(net.named_modules())),
    }
    with recomputed(net, True):
        assert list(net.state_dict()) == before["keys"]
        assert list(map(type, net.modules())) == before["types"]
        assert list(dict(net.named_modules())) == before["names"]
        assert inspect.signature(net[0].forward) == inspect.signature(Block().forward)
        net.load_state_dict(net.state_dict())


def test_afterwards_it_is_as_before_even_after_an_error():
    net = blocks()
    net[1].forward = own = net[1].forward
    before = [dict(vars(part)) for part in net.modules()]
    with pytest.raises(KeyError), recomputed(net, True):
        assert net[1].forward is not own
        raise KeyError
    assert [vars(part) for part in net.modules()] == before
    assert net[1].forward is own
    pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
@pytest.mark.parametrize("has_own", [False, True])
def test_copies_made_meanwhile_are_plain_and_on_their_own(copied, has_own, monkeypatch):
    net, x = blocks(norm=nn.LayerNorm), torch.rand(8, 16)
    if has_own:
        net[0].forward = doubled
    with recomputed(net, True):
        other = copied(net)
        monkeypatch.setattr(recomputing, "checkpoint", None)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
        other[1:](other[0](x)).sum().backward()
    if has_own:
        assert torch.equal(other[0](x), 2 * x)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(parameter.grad is not None for parameter in other[1:].parameters())
    assert (other[0].inner.weight.grad is None) == has_own
    assert other[0].inner.weight.abs().sum() > 0
    copied(other)(x)


def test_hooks_of_a_part_run_once_and_those_inside_it_twice():
    net = Wrapped(blocks(1))
    called = forward_calls(net)
    backwards = []
    net.part[0].register_full_backward_hook(lambda *_: backwards.append(1))
    with recomputed(net, "part.0"):
        net(torch.rand(8, 16, requires_grad=True)).sum().backward()
    assert [called.count(name) for name in ("", "part", "part.0", "part.0.inner", "part.0.norm")] == [1, 1, 1, 2, 2]
    assert len(backwards) == 1


def test_a_run_within_a_run_leaves_the_outer_one_as_it_is(monkeypatch):
    net, x = blocks(), torch.rand(8, 16)
    with recomputed(net, True):
        held = net[0].forward
        with recomputed(net, "*"):
            assert net[0].forward is held
            called = forward_calls(net)
            net(x).sum().backward()
            assert called.count("0.inner") == 2
        net(x).sum().backward()
        assert called.count("0.inner") == 4
    assert not any("forward" in vars(part) for part in net.modules())


def test_modules_that_wait_for_their_first_batch():
    class Lazy(Block):
        def __init__(self):
            super().__init__()
            self.inner, self.norm = nn.LazyLinear(64), nn.LazyBatchNorm1d()

    net, x = nn.Sequential(Lazy(), Lazy()), torch.rand(8, 16)
    with recomputed(net, True):
        net(x).sum().backward()
    assert net[0].norm.num_batches_tracked == 1


# Which parts.


def test_true_means_the_layers_of_a_transformer():
    net = nn.Transformer(8, 2, 2, 3, 16, batch_first=True)
    assert list(parts_to_recompute(net, True)) == [
        *(f"encoder.layers.{number}" for number in range(2)),
        *(f"decoder.layers.{number}" for number in range(3)),
    ]


def test_true_means_residual_blocks_in_stages_whatever_their_number_in_each():
    net = nn.Sequential(nn.Linear(4, 16), nn.Sequential(Block()), nn.Sequential(Block(), Block()), nn.Linear(16, 4))
    assert list(parts_to_recompute(net, True)) == ["1.0", "2.0", "2.1"]


def test_true_means_rows_of_layers_where_there_are_no_other_blocks():
    row = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())  # noqa: E731
    net = nn.Sequential(nn.Sequential(row(), row()), nn.Sequential(row(), nn.Tanh()), nn.Linear(4, 4))
    assert list(parts_to_recompute(net, True)) == ["0.0", "0.1", "1.0"]


def test_true_means_the_outermost_and_not_the_experts_within():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Block()
            self.experts = nn.ModuleList(Block() for _ in range(4))

        def forward(self, x):
            return self.experts[0](self.attention(x))

    net = nn.ModuleDict({"layers": nn.ModuleList([Mixture(), Mixture()])})
    assert list(parts_to_recompute(net, True)) == ["layers.0", "layers.1"]


def test_true_means_what_repeats_as_attributes_where_nothing_is_in_rows():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up, self.head = Block(), Block(), nn.Linear(4, 4)

    assert list(parts_to_recompute(Net(), True)) == ["down", "up"]


def test_true_means_the_blocks_of_two_towers_and_not_the_towers():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = blocks(2)

        def forward(self, x):
            return self.blocks(x)

    net = nn.Module()
    net.query, net.key = Tower(), Tower()
    assert list(parts_to_recompute(net, True)) == ["query.blocks.0", "query.blocks.1", "key.blocks.0", "key.blocks.1"]


def test_blocks_of_a_kind_are_found_outside_of_rows_too():
    net = Wrapped(nn.ModuleList([Block(), Block()]))
    net.stem = Block()
    assert list(parts_to_recompute(net, True)) == ["part.0", "part.1", "stem"]


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("part", ["part.0", "part.1"]),  # an nn.ModuleList is never called itself
        ("part.*", ["part.0", "part.1"]),
        ("part.1", ["part.1"]),
        ("*.norm", ["part.0.norm", "part.1.norm", "head.norm"]),
        ("*", ["part.0", "part.1", "head"]),
        (["head", "part.0"], ["part.0", "head"]),
        (["head.norm", "head"], ["head"]),
        (nn.Linear, ["part.0.inner", "part.0.outer", "part.1.inner", "part.1.outer", "head.inner", "head.outer"]),
        ((nn.Dropout, "part"), ["part.0", "part.1", "head.drop"]),
        ([Block], ["part.0", "part.1", "head"]),
        (None, []),
        (False, []),
    ],
)
def test_names_patterns_and_classes(what, names):
    net = Wrapped(nn.ModuleList([Block(), Block()]))
    net.head = Block()
    assert list(parts_to_recompute(net, what)) == names


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("blcks.0", ValueError, "is the name or pattern of no submodule. Did you mean 'blocks.0'?"),
        ("transformer", ValueError, "Submodules are blocks.0, blocks.0.inner, .*, \\.\\.\\."),
        ("*.weight", ValueError, "It fits parameters; name the module that has them."),
        (["blocks", "heads"], ValueError, "'heads' is the name or pattern of no submodule"),
        (nn.Conv2d, ValueError, "Conv2d is the class of no submodule. There are BatchNorm1d, Block, Dropout, Linear."),
        (nn.ModuleList, ValueError, "ModuleList is the class of no submodule"),
        ([], ValueError, "names nothing. Give True for the repeated blocks"),
        (1, TypeError, "was given 1, a int. Give True for the repeated blocks"),
        ([True], TypeError, "was given True, a bool"),
        (int, TypeError, "was given <class 'int'>, a type"),
        (Block(), TypeError, "a Block. Give True"),
    ],
)  # fmt: skip
def test_what_fits_nothing_is_refused(what, error, message):
    net = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()])})
    with pytest.raises(error, match=message):
        parts_to_recompute(net, what)


@pytest.mark.parametrize("what", [1, [], [2.0], object])
def test_what_can_be_refused_without_a_module_is(what):
    with pytest.raises((TypeError, ValueError), match="Give True for the repeated blocks"):
        refuse_unknown(what)
    refuse_unknown(["any.name", nn.Linear])


def test_true_without_repeated_blocks_is_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), Block(4))
    with pytest.raises(ValueError, match="found no repeated blocks.* There are 0, 1, 2, 3, 4.* e.g. .*='0'"):
        parts_to_recompute(net, True)
    with pytest.raises(ValueError, match="There are none"):
        parts_to_recompute(nn.Linear(1, 1), True)


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_a_module_of_torchscript_is_refused_by_name_and_left_out_by_true():
    net = blocks(norm=nn.LayerNorm)
    for _ in range(2):
        net.append(torch.jit.trace(nn.Sequential(nn.Linear(16, 16), nn.Tanh()), torch.rand(1, 16)))
    assert list(parts_to_recompute(net, True)) == ["0", "1", "2"]
    with pytest.raises(TypeError, match="means '3', a module of TorchScript"):
        parts_to_recompute(net, "*")


# In a run.


def fitted(net, x, y, what, **options):
    torch.manual_seed(3)
    compiled = {name: options.pop(name) for name in ("optimizer", "precision", "clip") if name in options}
    model = kt.Model(copy.deepcopy(net), backend="cpu").compile(**{"optimizer": "adam", "loss": "mse"} | compiled)
    with recomputed(model.module, what):
        history = model.fit(x, y, epochs=2, batch_size=10, verbose=0, **options)
    return [*model.module.state_dict().values(), torch.tensor(history.history["loss"], dtype=torch.float64)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2},
        {"microbatch": 5},
        {"precision": "bf16"},
        {"optimizer": "lbfgs"},
        {"clip": 0.1, "validation_split": 0.2},
    ],
    ids=str,
)
def test_a_fit_is_the_same(options, diabetes):
    x, y = diabetes
    net = nn.Sequential(nn.Linear(10, 8), blocks(2, width=8), nn.Linear(8, 1))
    x, y = x[:50], y[:50]
    assert_same(fitted(net, x, y, True, **options), fitted(net, x, y, False, **options))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_a_traced_module_is_in_one_graph_and_the_same(norm):
    net, x, results = blocks(2, norm=norm), torch.rand(8, 16), []
    for block in net:
        block.drop.p = 0.0  # a compiler may draw other random numbers
    for what in (True, False):
        one = copy.deepcopy(net)
        with recomputed(one, what):
            torch.compile(one, fullgraph=True, backend="aot_eager")(x).sum().backward()
        results.append([parameter.grad for parameter in one.parameters()] + list(one.buffers()))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)


def test_a_part_that_cannot_be_traced_counts_once():
    class Broken(Block):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    net = nn.Sequential(Broken(), Broken())
    with recomputed(net, True):
        torch.compile(net, backend="aot_eager")(torch.rand(8, 16)).sum().backward()
    assert [part.norm.num_batches_tracked.item() for part in net] == [1, 1]


def test_what_was_traced_before_is_traced_anew():
    net, x = blocks(2, norm=nn.LayerNorm), torch.rand(8, 16)
    traced = torch.compile(net, backend="aot_eager")
    plain = kept_bytes(traced, x, None)
    with recomputed(net, True):
        assert kept_bytes(traced, x, None) < plain
    assert kept_bytes(traced, x, None) == plain


ON_XLA = """
import copy, torch, torch_xla
import torch_xla.debug.metrics as metrics
from kerastorch.recomputing import recomputed
from tests.test_recomputing import blocks

device = torch_xla.device()
net, x, results = blocks(2).to(device), torch.rand(8, 16).to(device), []
torch_xla.sync()
for what in (False, True):
    torch_xla.manual_seed(3)
    one = copy.deepcopy(net)
    with recomputed(one, what):
        with torch.autocast("xla", torch.bfloat16):
            loss = one(x).sum()
        loss.backward()
        graph = torch_xla._XLAC._get_xla_tensors_hlo([parameter.grad for parameter in one.parameters()])
    torch_xla.sync()
    results.append([parameter.grad.cpu() for parameter in one.parameters()] + [b.cpu() for b in one.buffers()])
assert all(map(torch.equal, *results))
assert "opt-barrier" in graph

compiled = []
with recomputed(net, True):
    for _ in range(4):
        net(x).sum().backward()
        net.zero_grad()
        torch_xla.sync()
        compiled.append(metrics.metric_data("CompileTime")[0])
assert compiled[1] == compiled[-1], compiled
"""


@pytest.mark.skipif(find_spec("torch_xla") is None, reason="needs torch_xla")
def test_on_xla_random_numbers_and_autocast_are_those_of_the_first_pass():
    environment = os.environ | {"PJRT_DEVICE": "CPU"}
    subprocess.run([sys.executable, "-c", ON_XLA], check=True, timeout=300, env=environment, cwd=ROOT)


@pytest.mark.conformance
def test_a_language_model_has_the_gradients_of_its_own_checkpointing():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=50, n_positions=32, use_cache=False)
    net, ids = transformers.GPT2LMHeadModel(config).train(), torch.randint(0, 50, (2, 16))
    results = []
    for is_own in (True, False):
        torch.manual_seed(0)
        one = copy.deepcopy(net)
        if is_own:
            one.gradient_checkpointing_enable({"use_reentrant": False})
        with recomputed(one, not is_own):
            one(input_ids=ids, labels=ids).loss.backward()
        results.append([parameter.grad for parameter in one.parameters()])
    assert_same(*results)
