"""DeepSpeed computes what one process does: real ranks over gloo, started by torchrun and by fit itself."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import kerastorch as kt
from kerastorch.backends import DeepSpeed
from tests.backends import deepspeed_cases as cases
from tests.backends.fsdp_cases import Here, differences
from tests.processes import torchrun

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install kerastorch[deepspeed]")
pytestmark = [pytest.mark.conformance, pytest.mark.timeout(600)]

ROUNDING = 1e-5
SCRIPT = Path(cases.__file__)
COMMON = [
    "everything_at_once", "momentum_and_batchnorm", "tied_weights", "frozen_and_thawed", "in_and_out",
    "groups_of_adagrad", "groups_of_momentum", "groups_of_nadam", "thawed_within_a_run", "recomputed",
    "batch_by_batch", "uninterrupted",
]  # fmt: skip
SAME = {
    1: [*COMMON, "losses_of_their_own_counts", "changed_by_hand"],
    2: [*COMMON, "changed_by_hand"],
    3: COMMON,
    -2: ["everything_at_once", "groups_of_nadam", "uninterrupted"],
    -3: ["everything_at_once", "groups_of_nadam", "uninterrupted"],
}
OWN = ["broken_off", "gone_on", "held", "refused", "in_bf16"]


def started(folder, processes, stage, *names):
    """What rank 0 has of each case, run by so many ranks."""
    file = folder / f"stage{stage}-{processes}.pt"
    ran = torchrun(SCRIPT, str(file), str(stage), *names, ranks=processes)
    assert file.is_file(), ran.stderr[-3000:]
    words = [line for line in (ran.stdout + ran.stderr).splitlines() if "DeepSpeed" in line or "[INFO]" in line]
    return torch.load(file, weights_only=False) | {"said": words}  # our own, with numpy's arrays


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {stage: tmp_path_factory.mktemp("stage") for stage in SAME}


@pytest.fixture(scope="module")
def found(folders):
    kept = {}

    def of(stage):
        if stage not in kept:
            kept[stage] = started(folders[stage], 2, stage, *SAME[stage], *(OWN if stage > 0 else OWN[:2]))
        return kept[stage]

    return of


@pytest.fixture(scope="module")
def expected():
    kept = {}

    def of(name):
        if name not in kept:
            kept[name] = cases.CASES[name](Here())
        return kept[name]

    return of


def assert_equal(first, second, tolerance=ROUNDING):
    assert not isinstance(second, str), second  # a traceback
    found = differences(first, second)
    assert max(found.values()) <= tolerance, {name: value for name, value in found.items() if value > tolerance}


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage in SAME for name in SAME[stage]])
def test_two_ranks_compute_what_one_process_does(found, expected, stage, name):
    assert_equal(expected(name), found(stage)[name])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_in_bf16_the_result_is_that_of_one_process_to_its_rounding(found, expected, stage):
    assert_equal(expected("in_bf16"), found(stage)["in_bf16"], 0.02)


@pytest.mark.parametrize("stage", list(SAME))
def test_a_run_that_was_broken_off_within_a_step_goes_on_as_if_it_had_not_been(found, expected, stage):
    assert_equal(found(stage)["uninterrupted"], found(stage)["gone_on"], 1e-7)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_process_goes_on_from_what_two_ranks_have_saved(found, expected, folders, stage, monkeypatch):
    assert "gone_on" in found(stage)
    monkeypatch.setenv("FOLDER", str(folders[stage]))
    assert_equal(expected("uninterrupted"), cases.gone_on(Here()))


def test_ranks_go_on_from_what_one_process_has_saved(expected, tmp_path, monkeypatch):
    monkeypatch.setenv("FOLDER", str(tmp_path))
    cases.broken_off(Here())
    assert_equal(expected("uninterrupted"), started(tmp_path, 2, 2, "gone_on")["gone_on"])


def test_three_ranks_of_another_stage_go_on_from_what_two_have_saved(found, expected, folders):
    assert "gone_on" in found(2)
    assert_equal(expected("uninterrupted"), started(folders[2], 3, 3, "gone_on")["gone_on"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_was_written_is_read_back(found, stage):
    result = found(stage)["in_and_out"]
    files = result["files"]
    for arrays in (files["arrays"], files["weights"], [array / 2 for array in files["doubled"]]):
        assert all(np.array_equal(*pair) for pair in zip(files["saved"], arrays, strict=True))
    assert_equal(result["expected"], list(result["weights"].values()), 1e-7)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_rank_holds_its_part_alone_and_nothing_is_left_behind(found, stage):
    sizes = found(stage)["held"]
    assert 0.49 * 2 * sizes["whole"] <= sizes["state"] <= 0.51 * 2 * sizes["whole"]
    assert sizes["own"] == 0
    assert sizes["left behind"] == []
    assert sizes["tables"] == {"dict"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_cannot_be_is_refused_with_the_reason(found, stage):
    said = found(stage)["refused"]
    assert re.search(r"'2.weight' is trained, but the optimizer does not have it.*Freeze it", said["others"])
    assert re.search(r"'unused.weight' has no gradient in this step.*Freeze it", said["unused"])
    lost = "the parameters. Make the Model anew" if stage == 3 else "the optimizer's states. Call compile again"
    assert f"a run has failed while DeepSpeed had {lost}, and load what was saved" in said["fails_twice"]
    if stage > 1:
        assert re.search(rf"means over different things.*stage={stage}.*Give stage=1", said["other_counts"])
    else:
        assert "other_counts" not in said


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_after_one_that_failed_is_as_any_other(found, expected, stage):
    assert found(stage)["refused"]["after"] == pytest.approx(expected("after_failure"), abs=ROUNDING)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_says_nothing_of_itself(found, stage):
    assert found(stage)["said"] == []
    assert found(stage)["warnings"] == []


def test_fit_starts_the_ranks_and_brings_all_of_it_back(expected):
    class Own(Here):
        def __call__(self, **options):
            return DeepSpeed(3, devices=2, timeout_s=100)

    result = cases.groups_of_nadam(Own())
    assert_equal(expected("groups_of_nadam"), result)
    assert type(kt.backends.get(DeepSpeed(2, devices=2))) is DeepSpeed
