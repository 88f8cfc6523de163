"""A pipeline computes what one process does: the engine by itself, in two and four processes, and runs of `Model`."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kerastorch as kt
from kerastorch import backends, losses
from kerastorch.backends.engine import Engine
from kerastorch.backends.stages import balanced, bound, split
from tests.backends import going_on, pipeline_runs
from tests.backends.cases import ADAM, CASES, SGD, X, Y, mlp
from tests.backends.cases import differences as differences_here
from tests.processes import run, torchrun

HERE = Path(__file__).parent

SAME = ["seen", "weights", "optimizer", "output"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    """Number of ranks -> what they found; nothing of them is left behind."""
    folder = tmp_path_factory.mktemp("ranks")
    done = run(HERE / "pipeline_ranks.py", str(folder))
    assert done.returncode == 0, done.stderr[-6000:]
    return {ranks: json.loads((folder / f"{ranks}.json").read_text(encoding="utf-8")) for ranks in (2, 4)}


@pytest.fixture
def two(found: dict[int, dict]) -> dict:
    return found[2]


@pytest.fixture
def four(found: dict[int, dict]) -> dict:
    return found[4]


@pytest.mark.parametrize(
    "case",
    [
        "gpipe", "one_forward_one_backward", "interleaved", "looped", "more_microbatches_than_samples",
        "one_microbatch", "changed_in_place", "by_time", "recomputed", "transformer_in_two",
        "transformer_recomputed_by_name", "sum_of_losses",
    ],
)  # fmt: skip
def test_two_epochs_of_uneven_masked_batches_are_those_of_one_process(two, case):
    assert max(two[case][name] for name in SAME) < 1e-6


def test_a_convnet_learns_digits_as_in_one_process(two):
    found = two["digits_by_convnet"]
    assert max(found[name] for name in ("weights", "optimizer")) < 1e-6
    assert max(found[name] for name in ("seen", "output")) < 1e-5  # of logits and norms of some 20


@pytest.mark.parametrize("case", ["four_in_turn", "four_interleaved", "four_for_a_transformer"])
def test_four_ranks_compute_what_one_does(four, case):
    assert max(four[case][name] for name in SAME) < 1e-6


def test_a_rank_holds_its_stages_alone(two, four):
    assert two["gpipe"]["part"] < 0.6
    assert four["four_in_turn"]["part"] < 0.3


@pytest.mark.parametrize("case", ["batch_norm", "batch_norm_recomputed"])
def test_batch_norm_sees_microbatches_once_each(two, case):
    assert two[case]["weights"] < 1e-6


def test_batches_of_a_window_count_as_their_targets_do(two):
    assert two["accumulated"]["weights"] < 1e-6


def test_layers_that_are_frozen_and_no_longer_get_the_gradients_that_they_should(two):
    assert two["frozen_then_not"] == {"weights": pytest.approx(0, abs=1e-6), "frozen": 0}


def test_a_run_goes_on_in_one_process_and_in_other_stages(two):
    assert max(two["resumed"].values()) < 1e-6


def test_finding_shapes_changes_no_inputs(two):
    assert two["inputs_changed_once"]["output"] < 1e-6


def test_finding_shapes_draws_no_random_numbers(two):
    assert two["random_numbers"]["gradients"] < 1e-6
    assert two["random_numbers"]["tensors"] >= 2


def test_shapes_may_change_from_batch_to_batch(two):
    found = two["lengths_that_vary"]
    assert max(found["weights"], found["seen"]) < 1e-6
    assert found["kept"] == 6


def test_bf16_under_autocast_is_that_of_one_process(two):
    assert two["under_autocast"]["weights"] < 1e-6
    assert two["under_autocast"]["wires"] == "torch.bfloat16"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("stages", "stages=3, but there are 2 processes"),
        ("interleaved stages", "stages=2 does not give each of the 2 processes several stages"),
        ("checkpoint", "checkpoint_activations='layers.*' is the name or glob of no submodule"),
        ("lbfgs", "LBFGS looks at all parameters together"),
        ("scalar", "returned a tensor of shape () for 2 samples"),
        ("complex", "a complex tensor of shape (2, 8) with a gradient would have to pass"),
    ],
)
def test_what_cannot_be_is_refused(two, case, message):
    assert message in two["refusals"][case]


# Options and cuts, in this process.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stages": 0}, ValueError, "stages=0 is less than 1"),
        ({"microbatches": True}, TypeError, "microbatches=True is a bool"),
        ({"schedule": "2f2b"}, ValueError, "schedule='2f2b' is not known"),
        ({"balance": "memory"}, ValueError, "balance='memory' is not known"),
        ({"checkpoint_activations": 3}, TypeError, "checkpoint_activations=3 is a int"),
    ],
)
def test_options_are_checked_at_once(options, error, message):
    with pytest.raises(error, match=message):
        Engine(**options)


def layers(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)))


def through(stages, module: nn.Module, x: object) -> object:
    values = ()
    for stage in stages.training if module.training else stages.evaluating:
        given = bound(inspect.signature(module.forward), x)
        values = stage.graph(*[given[name] for name in stage.arguments], *values)
    return values


def test_the_largest_stage_is_as_small_as_can_be():
    assert balanced([1, 1, 1, 1, 8, 1, 1], 3) == [0, 4, 5]
    assert balanced([3, 3, 3], 3) == [0, 1, 2]
    assert split(layers(4, 64, 4, 4, 4), 2, torch.zeros(1, 4)).units == (("0",), ("1", "2", "3"))


def test_balanced_is_the_best_of_all_ways():
    costs = torch.randint(1, 20, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    best = min(
        max(sum(costs[:a]), sum(costs[a:b]), sum(costs[b:])) for a in range(1, 8) for b in range(a + 1, 9)
    )  # fmt: skip
    _, a, b = balanced(costs, 3)
    assert max(sum(costs[:a]), sum(costs[a:b]), sum(costs[b:])) == best


def test_time_balances_what_takes_long_without_parameters():
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(300):
                x = x + 1e-3 * x.sin()
            return x

    module = nn.Sequential(
        nn.Linear(4, 64), nn.Linear(64, 64), Slow(), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 2)
    )
    before, random = {name: one.clone() for name, one in module.state_dict().items()}, torch.get_rng_state()
    cut = split(module, 2, torch.randn(3, 4, generator=torch.Generator()), "time")
    assert cut.units[0] in (("0", "1"), ("0", "1", "2"))
    assert split(module, 2, torch.zeros(3, 4)).units[0] == ("0",)
    assert all(torch.equal(one, before[name]) for name, one in module.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_cut_points_are_numbers_or_names():
    module = layers(4, 4, 4, 4)
    assert split(module, 2, torch.zeros(1, 4), [2]).units == (("0", "1"), ("2",))
    assert split(module, 3, torch.zeros(1, 4), ["1", 2]).units == (("0",), ("1",), ("2",))
    with pytest.raises(ValueError, match=r"balance names 'head', which is no unit. Units are 0, 1, 2"):
        split(module, 2, torch.zeros(1, 4), ["head"])
    with pytest.raises(ValueError, match=r"balance=\[2, 1\] does not make 3 stages of 3 units. Give 2 numbers"):
        split(module, 3, torch.zeros(1, 4), [2, 1])


def test_stages_are_made_of_the_modules_own_parameters_by_their_names():
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)), nn.Linear(4, 4))
    cut = split(module, 2, torch.zeros(2, 4), ["1.1"])
    assert cut.units == (("0", "1.0"), ("1.1", "2"))
    assert cut.stage_of == {name: int(name >= "1.1") for name in module.state_dict()}
    assert {*map(id, cut.training[1].graph.parameters())} == {
        *map(id, [*module[1][1].parameters(), *module[2].parameters()])
    }


class Skipping(nn.Module):
    """Its first values are used last; arguments have defaults; a forward that reads its mode and `len`."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = Inside()
        self.head, self.shift = nn.Linear(4, 4), nn.Buffer(torch.ones(4))

    def forward(self, x: Tensor, y: Tensor | None = None, *, times: float = 2.0) -> tuple[Tensor, Tensor]:
        early = x.relu()
        x = F.dropout(self.inside(x), 0.5, self.training)
        if y is not None:
            x = x + y
        return self.head(x).reshape(len(early), -1) * times + early, x + self.shift


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("names", ["x", "xy", "times"])
def test_a_forward_of_ones_own_is_cut_where_values_cross(names):
    module, x = Skipping(), torch.randn(5, 4)
    given = {"x": x, "xy": (x, x), "times": {"x": x, "times": 3.0}}[names]
    cut = split(module, 3, given)
    assert sorted(map(len, cut.units)) == [1, 2, 2]
    assert cut.units[0][0] == "inside.layers.0"
    for mode in (True, False):
        module.train(mode)
        torch.manual_seed(0)
        expected = module(**given) if isinstance(given, dict) else module(*given) if names == "xy" else module(given)
        torch.manual_seed(0)
        for one, other in zip(expected, through(cut, module, given), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_modes_are_left_as_they_were():
    module = Skipping()
    module.head.eval()
    split(module, 2, torch.zeros(1, 4))
    assert [module.training, module.inside.training, module.head.training] == [True, True, False]


def test_a_parameter_of_two_stages_is_refused():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    module[2].weight = module[0].weight
    with pytest.raises(ValueError, match=r"'0.weight' is used in stages 0 and 1, but a parameter lives in one. Untie"):
        split(module, 2, torch.zeros(1, 4))
    module[1].weight = module[0].weight
    with pytest.raises(ValueError, match="Untie the weights"):
        split(module, 3, torch.zeros(1, 4))
    module[2].weight = nn.Parameter(torch.ones(4, 4))
    assert split(module, 2, torch.zeros(1, 4), ["2"]).units == (("0", "1"), ("2",))


def test_what_cannot_be_cut_says_why():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else self.b(x)

    class Any(Branching):
        def forward(self, *x: Tensor) -> Tensor:
            return self.b(self.a(x[0]))

    class Moody(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if self.training else self.a(x)

    x = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"the forward of Branching cannot be traced \(TraceError"):
        split(Branching(), 2, x)
    with pytest.raises(ValueError, match=r"its forward\(\*x: .*\) .*takes any number of arguments. Name them"):
        split(Any(), 2, x)
    with pytest.raises(ValueError, match="calls other submodules in train mode than in eval mode"):
        split(Moody(), 2, x)
    with pytest.raises(ValueError, match=r"cannot be cut into 3 stages: it calls 2 submodules .*\(0, 1\)"):
        split(layers(4, 4, 4), 3, x)
    with pytest.raises(ValueError, match=r"do not fit the module's forward\(input\)"):
        split(layers(4, 4, 4), 2, (x, x))
    hooked = layers(4, 4, 4)
    hooked.register_forward_hook(lambda *given: None)
    with pytest.raises(ValueError, match="it has hooks on its whole forward"):
        split(hooked, 2, x)


def test_a_part_with_hooks_is_not_gone_into():
    module = nn.Sequential(layers(4, 4, 4), layers(4, 4, 4))
    module[0].register_forward_hook(lambda *given: None)
    assert split(module, 2, torch.zeros(1, 4)).units == (("0",), ("1.0", "1.1"))


# Runs of Model.


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What two ranks of `pipeline_runs.py` found, and the folder with what they have written."""
    folder = tmp_path_factory.mktemp("runs")
    ran = torchrun(HERE / "pipeline_runs.py", str(folder))
    assert ran.returncode == 0, ran.stderr[-6000:]
    return json.loads((folder / "found.json").read_text()), folder


@pytest.mark.parametrize("name", [*pipeline_runs.SAME, *pipeline_runs.MORE, "other options", "several stages each"])
def test_a_model_in_two_stages_is_trained_as_in_one_process(runs, name):
    assert_same(runs[0][name], {"double": 1e-12, "sums": 1e-4}.get(name, 1e-6))  # sums are some 50


def assert_same(found, largest):
    first, other = found["stopped_by"]
    assert first == other
    assert all(found[what] <= largest for what in ("weights", "history", "evaluate", "predict")), found


def test_a_callback_on_any_rank_sees_loss_samples_and_norm_of_each_batch(runs):
    assert max(runs[0]["heard"].values()) < 1e-6


def test_bf16_is_computed_in_the_stages_and_measured_in_float32(runs):
    assert runs[0]["bf16"]["evaluate"] < 1e-3
    assert runs[0]["bf16"]["dtypes"] == ["float32", "float32"]


def test_batch_norm_of_a_model_sees_microbatches(runs):
    assert runs[0]["batch_norm"] < 1e-6


def test_stages_draw_random_numbers_of_their_own(runs):
    (alike,) = runs[0]["alone"]
    assert 0.3 < alike < 0.7  # of two masks of 0.5


def test_files_of_a_pipeline_are_those_of_one_process(runs):
    found, folder = runs
    assert found["saved"]["again"] < 1e-6
    model = kt.Model(mlp(seed=2), backend="cpu").compile(**ADAM).load(folder / "run.pt")
    weights = kt.Model(mlp(seed=3), backend="cpu").load_weights(folder / "epoch2.safetensors")
    kt.set_seed(3)
    one = kt.Model(mlp(), backend="cpu").compile(**ADAM)
    one.fit(X, Y, epochs=2, verbose=0)
    for name, tensor in one.module.state_dict().items():
        torch.testing.assert_close(model.module.state_dict()[name], tensor, rtol=0, atol=1e-6)
        torch.testing.assert_close(weights.module.state_dict()[name], tensor, rtol=0, atol=1e-6)
    assert model.epochs_trained == 2
    states = [list(one.optimizer.state_dict()["state"].values()) for one in (model, one)]
    for own, other in zip(*states, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("precision", "precision='16' does not go with backend=Pipeline: .* Give precision='bf16'."),
        ("loss", "loss=None does not go with backend=Pipeline: .* Give compile a loss."),
        ("compute_loss", "an override of compute_loss does not go with backend=Pipeline"),
        ("train_step", "an override of train_step does not go with backend=Pipeline"),
        ("tbptt", "tbptt_steps does not go with backend=Pipeline"),
        ("jit", "jit does not go with backend=Pipeline"),
        ("closure", "an optimizer with a closure does not go with backend=Pipeline"),
        ("microbatch", r"microbatch does not go with backend=Pipeline: .* Give Pipeline\(microbatches=...\)."),
        ("window", "accumulate=2 was given with losses that are means over different things"),
        ("callback", "a callback of all parameters does not go with backend=Pipeline"),
        ("cut", "the module cannot be cut into 2 stages"),
        ("stages", "stages=3, but there are 2 processes"),
    ],
)
def test_what_a_pipeline_of_a_model_cannot_do_is_refused(runs, name, said):
    assert re.match(said, runs[0]["refusals"][name])


def test_after_an_error_a_rank_has_its_stages_and_says_that_the_others_are_lost(runs):
    failed = runs[0]["failed"]
    assert failed["said"].startswith("of all ranks")
    assert failed["lost"] == [[False, False, True, True], [True, True, False, False]]


def test_a_pipeline_that_died_ends_as_the_one_that_did_not(tmp_path):
    """In the middle of an epoch and of a window: bit for bit, with what each rank has drawn for itself."""
    options = {"backend": "Pipeline", "stages": 2, "microbatches": 3, "timeout_s": 60}
    ran = torchrun(HERE / "going_on.py", json.dumps(options), str(tmp_path))
    assert ran.returncode == 0, ran.stderr[-6000:]
    ends = torch.load(tmp_path / "ends.pt", weights_only=True)
    for name in ("arrays", "dropout", "loader"):
        one, other = ends[name], ends[f"{name}, gone on with"]
        assert all(torch.equal(one["module"][key], other["module"][key]) for key in one["module"])
        assert all(one[key] == other[key] for key in one.keys() - {"module"})
    gone_on = going_on.end_of(*going_on.fit("cpu", resume=tmp_path / "cut.pt"))
    assert gone_on["loss"] == pytest.approx(ends["arrays"]["loss"], abs=0.1)  # BatchNorm has seen whole batches since
    assert gone_on["loss"][0] == ends["arrays"]["loss"][0]


def test_ranks_that_fit_starts_are_stages_and_what_they_did_is_brought_back():
    assert_same(differences_here(CASES["everything at once"], backends.Pipeline(2, 4, timeout_s=60)), 1e-6)
    model = kt.Model(mlp(), backend=backends.Pipeline(2, timeout_s=60)).compile(**SGD | {"optimizer": "adam"})
    history = model.fit(X, Y, epochs=2, verbose=0)
    assert history is model.history and model.epochs_trained == 2 and model.steps_taken == 2 * 4
    assert {float(state["step"]) for state in model.optimizer.state.values()} == {8.0}
    assert len(model.optimizer.state) == 4


def test_one_process_is_no_pipeline():
    with pytest.raises(ValueError, match=r"stages=1 makes one process here, which is no pipeline. Give stages=2"):
        backends.Pipeline(1)
    with pytest.raises(ValueError, match="microbatches=0 is less than 1"):
        backends.Pipeline(2, microbatches=0)
    with pytest.raises(ValueError, match="precision='16' does not go with backend=Pipeline"):  # before any rank starts
        kt.Model(mlp(), backend=backends.Pipeline(2)).compile(**SGD, precision="16")


def test_targets_are_counted_before_a_loss_was_computed():
    """On ranks that compute none; the masks of a run are in targets that are known, or may be in those that are not."""
    target, output = torch.tensor([1, -100, 2]), torch.zeros(3, 4, device="meta")
    loss = losses.get("cross_entropy")
    loss.expect(target)
    assert loss.counts(output, target, 3) == {"": 2}
    loss.expect(target[::2])
    assert loss.counts(output[::2], target[::2], 2) == {"": 2}
    both = losses.get({"a": "cross_entropy", "b": "mse"})
    both.expect({"a": target, "b": target})
    counted = both.counts({"a": output, "b": output}, {"a": target, "b": target}, 3)
    assert counted == {("targets of", "a"): 2, ("samples", ""): 3}


def test_batchnorm_which_sees_microbatches_is_warned_of():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="Pipeline normalizes each microbatch by itself"):
        kt.Model(net, backend=kt.backends.Pipeline(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kt.Model(net, backend=kt.backends.Pipeline(2, microbatches=1))
