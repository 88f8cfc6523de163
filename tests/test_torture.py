"""A training script that is killed with SIGKILL ends as one that is not: a short form of `benchmarks/torture.py`."""

from __future__ import annotations

import os
import random

import pytest
import torch

from benchmarks import torture
from kerastorch import checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs the signals of POSIX")
EPOCHS, SAMPLES = 3, 700


@pytest.mark.parametrize(("kind", "kills"), [("workers", 2), ("ranks", 1)])
def test_a_script_that_is_killed_ends_with_the_same_files_bit_for_bit(tmp_path, kind, kills):
    torture.write_data(tmp_path / "data.pt", *torture.small_digits(), SAMPLES)
    result = torture.torture(kind, tmp_path / "data.pt", tmp_path, kills=kills, epochs=EPOCHS)
    assert result.differences == []
    assert result.kills >= kills and result.ends >= 1 and result.batches == EPOCHS * 12


@pytest.fixture
def pair(tmp_path):
    """Two folders with equal files."""
    for name in ("whole", "other"):
        (tmp_path / name).mkdir()
        state = {"weights": torch.arange(4.0), "best": [0.1, None], "path": f"{tmp_path}/{name}/best.pt"}
        checkpoint.write(tmp_path / name / "end.pt", state)
        (tmp_path / name / "log.csv").write_text("epoch,loss\n0,0.5\n")
    return tmp_path / "whole", tmp_path / "other"


CHANGES = {
    "nothing": (lambda folder: None, []),
    "a bit": (
        lambda folder: checkpoint.write(
            folder / "end.pt",
            {"weights": torch.tensor([-0.0, 1, 2, 3]), "best": [0.1, None], "path": f"{folder}/best.pt"},
        ),
        ["other/end.pt.weights: another tensor"],
    ),
    "numbers": (
        lambda folder: checkpoint.write(
            folder / "end.pt", {"weights": torch.arange(4.0), "best": [0.2, 1], "path": f"{folder}/best.pt"}
        ),
        ["other/end.pt.best[0]: 0.1 and 0.2", "other/end.pt.best[1]: None and 1"],
    ),
    "the log": (
        lambda folder: (folder / "log.csv").write_text("epoch,loss\r\n0,0.5\n"),
        ["other/log.csv has other bytes"],
    ),
    "a leftover": (lambda folder: (folder / ".a.tmp").touch(), [".a.tmp is left over in other"]),
    "a loss": (lambda folder: (folder / "log.csv").unlink(), ["log.csv is missing from other"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_differs_is_found(pair, change):
    act, expected = CHANGES[change]
    act(pair[1])
    assert torture.differences_of_folders(*pair) == expected


def test_a_script_that_fails_is_no_result(tmp_path):
    with pytest.raises(RuntimeError, match=r"the training script ended with 3:\nno such thing"):
        torture.live(["sh", "-c", "echo no such thing >&2; exit 3"], tmp_path, None)


def test_a_kill_is_one_of_all_processes_and_counted_by_what_it_hit(tmp_path):
    chance, whole = random.Random(0), torture.Life(batches=1, start_s=0.0, train_s=0.1, is_killed=False)
    script = tmp_path / "script.sh"
    # The first one sleeps with a child and a file half written, the second one comes to its end.
    script.write_text(
        'printf . >> "$1.pulse"; echo something else\n'
        '[ -e "$1/.a.tmp" ] && rm "$1/.a.tmp" && exit\ntouch "$1/.a.tmp"; sleep 60 & sleep 60'
    )
    folder, result = tmp_path / "run", torture.Result("arrays", differences=[])
    folder.mkdir()
    chance.random = lambda: 0.99  # neither while it starts nor when the next file is begun
    torture._to_its_end(["sh", str(script), str(folder)], folder, whole, 1, 2.0, chance, result)
    assert (result.kills, result.during_writes, result.starting, result.ends, result.repeated) == (1, 1, 0, 1, 1)
