"""Searches in several processes: all agree on the size that fits each, and none waits for one that has failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import kerastorch as kt
from tests.processes import torchrun

CASES = Path(__file__).with_name("rank_cases.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("ranks") / "found"
    ran = torchrun(CASES, str(out))
    assert ran.returncode == 0, ran.stderr[-6000:]
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2)]


def test_the_size_fits_the_rank_that_has_least(ranks) -> None:
    for one in (found["less_memory"] for found in ranks):
        assert one["found"] == 81 and one["per_rank"] == 41  # rank 1 takes 40 of 81, and 41 of 82
        assert one["trials"] == ranks[0]["less_memory"]["trials"] and one["speeds"] == ranks[0]["less_memory"]["speeds"]
        assert [128, False, "out of memory"] in one["trials"] and [80, True, ""] in one["trials"]
        assert one["same"] and one["steps"] == 4


def test_training_in_ranks_goes_on_as_if_nothing_had_been_tried(ranks) -> None:
    assert [found["less_memory"]["trained"] for found in ranks] == [True, True]


def test_what_one_rank_fails_with_ends_all_at_once(ranks) -> None:
    first, second = (found["fails_alone"] for found in ranks)
    assert first["said"] == "RuntimeError: rank 1 failed in a trial of batch size 128: rank 1 is not well"
    assert second["said"] == "ValueError: rank 1 is not well"
    assert first["same"] and second["same"] and max(first["seconds"], second["seconds"]) < 25


def test_the_smallest_budget_of_all_ranks_is_kept(ranks) -> None:
    assert ranks[0]["other_budgets"] == ranks[1]["other_budgets"]
    for size, budget, trials in ranks[0]["other_budgets"].values():
        assert budget == 5_000_000 and 2 < size < 300 and [size, True] in trials


def test_sharded_modules_are_tried_as_they_are(ranks) -> None:
    for one in (found["sharded"] for found in ranks):
        assert one["found"] in one["run"] and one["same"] and one["steps"] == -(-300 // one["found"])
    assert ranks[0]["sharded"] == ranks[1]["sharded"]


def test_a_normalization_gets_two_samples_in_each_process(ranks) -> None:
    for one in (found["normalized"] for found in ranks):
        assert one["found"] == {"power": 300, "predict": 300}
        assert "does not fit into the 1 B there are for it" in one["said"]


def test_sharded_modules_without_room_on_one_rank_leave_nobody_waiting(ranks) -> None:
    for one in (found["sharded_without_room"] for found in ranks):
        assert "does not fit into the 10 MB there are for it" in one["said"] and one["seconds"] < 50


def test_ranks_that_are_started_for_a_search_bring_it_back() -> None:
    x, y = torch.rand(60, 4), torch.rand(60, 1)
    model = kt.Model(nn.Linear(4, 1), backend=kt.backends.DDP(2, timeout_s=30)).compile("sgd", "mse")
    before = [one.clone() for one in model.module.parameters()]
    found = model.find_batch_size(x, y, mode="power", init=30)
    assert found == 60 == model.batch_size and found.per_rank == 30
    assert [one.size for one in found.trials] == [30, 60] and model.batch_size.trials == found.trials
    assert all(map(torch.equal, before, model.module.parameters()))
