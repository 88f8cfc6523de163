"""FSDP computes what one process does: real ranks over gloo, started by torchrun and by fit itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.backends import FSDP
from kerastorch.backends.fsdp import groups
from tests.backends import fsdp_cases as cases
from tests.processes import torchrun

ROUNDING = 1e-5
SAME = {
    "parameters": [
        "everything_at_once",
        "momentum_and_batchnorm",
        "losses_of_their_own_counts",
        "several_optimizers",
        "parts_called_by_themselves",
        "frozen_and_thawed",
        "tied_weights",
        "in_pieces",
        "in_double",
        "averaged",
        "in_and_out",
        "uninterrupted",
    ],
    "optimizer": ["everything_at_once", "several_optimizers", "averaged", "in_and_out", "uninterrupted"],
}
# What only ranks have, or what ends in files for other runs.
OWN = {
    "parameters": ["broken_off", "gone_on", "saved_apart", "gone_on_from_folder", "scaled_losses", "refused", "held"],
    "optimizer": ["broken_off", "gone_on", "scaled_losses", "held"],
}


def started(folder, processes, shard, *names):
    """What rank 0 has of each case, run by so many ranks."""
    file = folder / f"{shard}-{processes}.pt"
    done = torchrun(cases.__file__, str(file), shard, *names, ranks=processes)
    assert file.is_file(), done.stderr[-3000:]
    return torch.load(file, weights_only=False)  # our own, with numpy's arrays


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {shard: tmp_path_factory.mktemp(shard) for shard in SAME}


@pytest.fixture(scope="module")
def found(folders):
    return {shard: started(folder, 2, shard, *SAME[shard], *OWN[shard]) for shard, folder in folders.items()}


@pytest.fixture(scope="module")
def expected():
    kept = {}

    def of(name):
        if name not in kept:
            kept[name] = cases.CASES[name](cases.Here())
        return kept[name]

    return of


def assert_equal(first, second, tolerance=ROUNDING):
    assert not isinstance(second, str), second  # a traceback
    differences = cases.differences(first, second)
    assert max(differences.values()) <= tolerance, {k: v for k, v in differences.items() if v > tolerance}


@pytest.mark.parametrize(("shard", "name"), [(shard, name) for shard in SAME for name in SAME[shard]])
def test_two_ranks_compute_what_one_process_does(found, expected, shard, name):
    assert_equal(expected(name), found[shard][name])


def test_losses_are_scaled_alike_whatever_is_sharded(found):
    assert_equal(found["optimizer"]["scaled_losses"], found["parameters"]["scaled_losses"])


@pytest.mark.parametrize("shard", list(SAME))
def test_a_run_that_was_broken_off_within_a_step_goes_on_as_if_it_had_not_been(found, shard):
    assert_equal(found[shard]["uninterrupted"], found[shard]["gone_on"], 0.0)


def test_a_folder_written_by_all_ranks_is_gone_on_from_exactly(found):
    assert_equal(found["parameters"]["uninterrupted"], found["parameters"]["gone_on_from_folder"], 0.0)


@pytest.mark.parametrize("name", ["gone_on", "gone_on_from_folder"])
def test_one_process_goes_on_from_what_two_ranks_have_saved(found, expected, folders, name, monkeypatch):
    assert "gone_on" in found["parameters"]
    monkeypatch.setenv("FOLDER", str(folders["parameters"]))
    assert_equal(expected("uninterrupted"), cases.CASES[name](cases.Here()))


def test_three_ranks_go_on_from_what_two_have_saved(found, expected, folders):
    names = ["gone_on", "gone_on_from_folder"]
    assert set(names) <= set(found["parameters"])
    three = started(folders["parameters"], 3, "parameters", *names)
    for name in names:
        assert_equal(expected("uninterrupted"), three[name])


def test_what_was_written_is_read_back(found):
    for shard in SAME:
        result = found[shard]["in_and_out"]
        files = result["files"]
        for arrays in (files["arrays"], files["weights"], [array / 2 for array in files["doubled"]]):
            assert all(np.array_equal(*pair) for pair in zip(files["saved"], arrays, strict=True))
        assert_equal(result["expected"], list(result["weights"].values()), 0.0)


def test_each_rank_holds_its_part_alone(found):
    sizes = found["parameters"]["held"]
    whole = sizes["whole"]
    assert sizes["parameters"] <= 0.51 * whole + 33
    assert sizes["state"] <= 2 * (0.51 * whole + 33)
    sizes = found["optimizer"]["held"]
    assert sizes["parameters"] == whole
    assert sizes["state"] <= 2 * 0.9 * whole


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("lazy", "the module is lazy"),
        ("lbfgs", "LBFGS looks at more at once than a process has"),
        ("adafactor", "Adafactor looks at more at once than a process has"),
        ("bypassed", "Call the module as a whole, or have FSDP.wrap=.... name the submodules"),
        ("recast", "FSDP cannot change once the module has run"),
        ("checkpoint", "ModelCheckpoint writes files"),
    ],
)
def test_what_cannot_be_sharded_is_refused_with_the_reason(found, case, words):
    import re

    assert re.search(words, found["parameters"]["refused"][case]), found["parameters"]["refused"][case]


def test_a_run_after_one_that_failed_is_as_any_other(found, expected):
    assert found["parameters"]["refused"]["after"] == pytest.approx(expected("after_failure"), abs=ROUNDING)


# Started by fit itself.


@pytest.mark.parametrize("shard", list(SAME))
def test_fit_starts_the_ranks_and_brings_all_of_it_back(expected, shard, tmp_path):
    class Own(cases.Here):
        def __call__(self, **options):
            return FSDP(devices=2, shard=shard, timeout_s=60, **(options if shard == "parameters" else {}))

    result = cases.averaged(Own())
    assert_equal(expected("averaged"), result)


def test_the_optimizer_comes_back_whole_and_trains_on_in_one_process(tmp_path):
    x, y = cases.digits(101)

    def run(backend, again):
        kt.set_seed(3)
        model = kt.Model(cases.mlp(), backend=backend).compile("adamw", "cross_entropy", lr=1e-2)
        model.fit(x, y, verbose=0)
        if again:
            model.save(tmp_path / "all.pt")
            model = kt.Model(cases.mlp(), backend="cpu").compile("adamw", "cross_entropy", lr=1e-2)
            model.load(tmp_path / "all.pt")
        model.fit(x, y, verbose=0)
        return cases.shown(model)

    assert_equal(run("cpu", again=False), run(FSDP(devices=2, wrap=nn.Linear), again=True))


# What is gathered at once.


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 200)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 200))] * 1)
        self.more = nn.ModuleList([nn.TransformerEncoderLayer(200, 2, 300) for _ in range(2)])
        self.head = nn.Linear(200, 3)

    def forward(self, x):
        return x


def names(module, wrap):
    known = {id(part): name for name, part in module.named_modules()}
    return [known[id(part)] for part in groups(module, wrap)]


@pytest.mark.parametrize(
    ("wrap", "wanted"),
    [
        (None, [""]),
        ("auto", ["more.0", "more.1", ""]),
        (nn.TransformerEncoderLayer, ["more.0", "more.1", ""]),
        ((nn.Sequential, nn.TransformerEncoderLayer), ["blocks.0", "more.0", "more.1", ""]),
        ("more.?", ["more.0", "more.1", ""]),
        (["stem", "blocks.0.*"], ["stem", "blocks.0.0", "blocks.0.2", ""]),
        (110_000, ["blocks.0", "more.0.self_attn", "more.0", "more.1.self_attn", "more.1", ""]),
    ],
)
def test_wrap_names_what_is_gathered_at_once(wrap, wanted):
    assert names(Blocks(), wrap) == wanted


def test_tied_parameters_are_gathered_with_what_is_around_both():
    assert names(cases.Tied(), nn.Embedding) == [""]
    assert names(cases.Tied(), (nn.Embedding, nn.TransformerEncoderLayer)) == ["blocks.0", "blocks.1", ""]


def test_a_module_that_is_not_called_itself_is_sharded_by_what_is_in_it():
    assert names(nn.ModuleDict({"left": cases.mlp(), "right": nn.Linear(2, 2)}), None) == ["left", "right"]


@pytest.mark.parametrize(("wrap", "words"), [("nope", "no submodule's name or class"), ("more", "never called itself")])
def test_names_of_nothing_that_can_be_gathered_are_refused(wrap, words):
    with pytest.raises(ValueError, match=words):
        groups(Blocks(), wrap)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shard": "gradients"}, "shard='gradients' is not known"),
        ({"shard": "optimizer", "wrap": None}, "Leave these out, or give shard='parameters'"),
        ({"shard": "optimizer", "precision": "bf16"}, "Leave these out"),
        ({"wrap": 0}, "wrap=0 says not what"),
        ({"wrap": True}, "wrap=True says not what"),
        ({"wrap": [nn.Linear, "0"]}, "says not what"),
        ({"wrap": int}, "says not what"),
        ({"precision": "fp8"}, "precision='fp8' is nothing FSDP gathers"),
        ({"offload": 1}, "offload=1"),
        ({"offload": True, "devices": 2}, "offload=True keeps parts in the memory of the host"),
    ],
)
def test_arguments_are_refused_early(options, words):
    if options.get("offload") is True and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=words):
        FSDP(**options)


def test_fsdp_is_known_by_its_name(monkeypatch):
    assert type(kt.backends.get("fsdp")) is FSDP


# Folders.


def test_one_process_writes_and_reads_a_folder_too(tmp_path):
    x, y = cases.digits(50)
    model = kt.Model(cases.mlp(), backend="cpu").compile("adamw", "cross_entropy")
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "run.dcp")
    first = model.get_weights()
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "run.dcp")
    other = kt.Model(cases.mlp(), backend="cpu").compile("adamw", "cross_entropy").load(tmp_path / "run.dcp")
    assert all(np.array_equal(*pair) for pair in zip(model.get_weights(), other.get_weights(), strict=True))
    assert not np.array_equal(first[0], other.get_weights()[0])
    assert [one.name for one in tmp_path.iterdir()] == ["run.dcp"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "run.dcp").mkdir()
    (tmp_path / "run.dcp" / "thesis.tex").write_text("years")
    with pytest.raises(OSError, match="something else than a folder of model.save"):
        kt.Model(cases.mlp(), backend="cpu").save(tmp_path / "run.dcp")
    assert (tmp_path / "run.dcp" / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_folder_is_refused(found, folders, harm, tmp_path):
    import shutil

    assert "saved_apart" in found["parameters"]
    shutil.copytree(folders["parameters"] / "run.dcp", tmp_path / "run.dcp")
    file = sorted((tmp_path / "run.dcp").glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    if harm == "remove":
        file.unlink()
    else:
        file.write_bytes(content if harm == "flip" else content[:-40])
    model = cases.going_on_model(cases.Here())
    with pytest.raises((ValueError, OSError), match="damaged|No such file"):
        model.load(tmp_path / "run.dcp")
