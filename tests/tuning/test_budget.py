"""How much memory there is, what was taken of it, and searches within a real limit."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kerastorch.tuning import budget
from kerastorch.tuning.budget import Peak, as_bytes, free_bytes, in_words, limited
from tests.processes import ROOT

CPU = torch.device("cpu")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits and peaks of Linux")


@pytest.mark.parametrize(
    ("memory", "bytes_"),
    [
        (None, None), (1, 1), (2_000_000_000, 2 * 10**9), (torch.tensor([7]).numpy()[0], 7),
        ("2GB", 2 * 10**9), ("2gb", 2 * 10**9), ("2 GB", 2 * 10**9), (" 2G ", 2 * 10**9), ("1.5 GB", 15 * 10**8),
        ("512MiB", 2**29), ("512Mi", 2**29), ("1 KiB", 1024), ("1.5 KiB", 1536), ("3kB", 3000), ("1TB", 10**12),
        ("2TiB", 2**41), ("100", 100), ("100B", 100), ("0.001kB", 1),
    ],
)  # fmt: skip
def test_amounts_of_memory(memory, bytes_) -> None:
    assert as_bytes(memory) == bytes_


@pytest.mark.parametrize("memory", ["lots", "", "GB", "2 PB", "-2GB", "2,5GB", "1e9", "0", "0.1 B", 0, -5, "2GBit"])
def test_what_is_no_amount_of_memory(memory) -> None:
    with pytest.raises(ValueError, match=r"is no amount of memory. Give bytes \(2_000_000_000\) or a text \('2GB'\)"):
        as_bytes(memory)


@pytest.mark.parametrize("memory", [True, False, 1.5, 2e9, [2], b"2GB", float("inf")])
def test_what_is_no_amount_by_its_kind(memory) -> None:
    with pytest.raises(TypeError, match=f"is a {type(memory).__name__}. Give bytes"):
        as_bytes(memory)


def test_bytes_in_words() -> None:
    shown = {0: "0 B", 999: "999 B", 1000: "1 kB", 1_234_567: "1.23 MB", 2 * 10**9: "2 GB", 15 * 10**11: "1500 GB"}
    assert {one: in_words(one) for one in shown} == shown


# What is free.


def test_a_tenth_of_what_is_free_is_left_to_others_and_the_rest_is_shared(monkeypatch) -> None:
    monkeypatch.setattr(budget, "_free_on_host", lambda: iter([5000.0, 1000.0, 3000.0]))
    assert free_bytes(CPU) == 900 and free_bytes(CPU, processes=2) == 450
    assert free_bytes(torch.device("meta")) is None


@LINUX
def test_no_more_is_free_than_the_machine_has() -> None:
    import psutil

    assert 0 < free_bytes(CPU) <= 0.9 * psutil.virtual_memory().total


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def in_containers(tmp_path: Path, *lines: str) -> list[float]:
    (tmp_path / "of").write_text("".join(f"{line}\n" for line in lines))
    return [*budget._free_in_containers(tmp_path / "root", tmp_path / "of")]


def test_a_group_of_the_second_version_leaves_free_what_it_has_not_used(tmp_path) -> None:
    stat = "anon 5\ninactive_file 30\nactive_file 7"
    group(tmp_path / "root/a", memory__max=1000, memory__current=400, memory__stat=stat)
    assert in_containers(tmp_path, "0::/a") == [630]


def test_the_groups_that_a_group_is_in_count_too(tmp_path) -> None:
    group(tmp_path / "root/a/b/c", memory__max="max", memory__current=400)
    group(tmp_path / "root/a/b", memory__max=1000, memory__current=400)
    group(tmp_path / "root/a", memory__max=700, memory__current=500, memory__stat="anon 3")
    group(tmp_path, memory__max=1, memory__current=0)  # above the root: none of ours
    assert in_containers(tmp_path, "0::/a/b/c") == [600, 200]


def test_a_group_without_a_limit_says_nothing(tmp_path) -> None:
    group(tmp_path / "root", memory__max="max", memory__current=400)
    assert in_containers(tmp_path, "0::/") == []


def test_a_container_sees_its_own_group_as_the_root(tmp_path) -> None:
    group(tmp_path / "root", memory__max=1000, memory__current=900)
    assert in_containers(tmp_path, "0::/docker/not-visible-from-inside") == [100]


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path) -> None:
    group(tmp_path / "root/a", memory__max=1000, memory__current=1200)
    assert in_containers(tmp_path, "0::/a") == [0]


def test_a_group_of_the_first_version(tmp_path) -> None:
    files = {"memory__limit_in_bytes": 1000, "memory__usage_in_bytes": 300, "memory__stat": "cache 1\ninactive_file 50"}
    group(tmp_path / "root/memory/a", **files)
    group(tmp_path / "root/memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=300)
    lines = ("12:cpu,cpuacct:/a", "5:memory:/a", "1:name=systemd:/a", "0::/a")
    assert in_containers(tmp_path, *lines) == [750, 9223372036854771412]


def test_without_groups_nothing_is_said(tmp_path) -> None:
    assert [*budget._free_in_containers(tmp_path, tmp_path / "missing")] == []
    assert in_containers(tmp_path, "5:memory:/a", "0::/a") == []


# What was taken.


@LINUX
@pytest.mark.parametrize("is_forgotten", [True, False])
def test_a_peak_is_what_was_taken_at_most(monkeypatch, is_forgotten) -> None:
    if not is_forgotten:  # as in containers that may not write to clear_refs: then somebody must look, time and again
        monkeypatch.setattr(budget, "_forget_peak", lambda: False)
    for sizes in ((100_000_000, 200_000_000, 50_000_000), (50_000_000,)):
        with Peak(CPU) as taken:
            for size in sizes:
                held = torch.ones(size, dtype=torch.uint8)
                if not is_forgotten:
                    time.sleep(0.3)
                del held
        assert taken.bytes == pytest.approx(max(sizes), abs=8e6)


@LINUX
def test_a_peak_above_all_before_is_seen_however_short_it_is(monkeypatch) -> None:
    monkeypatch.setattr(budget, "_forget_peak", lambda: False)
    monkeypatch.setattr(budget, "SAMPLED_S", 3600)
    now, noted = budget.level(CPU), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = noted - now + 100_000_000
    with Peak(CPU) as taken:
        torch.ones(size, dtype=torch.uint8)
    assert taken.bytes == pytest.approx(size, abs=8e6)


@LINUX
def test_a_peak_of_nothing_is_next_to_nothing() -> None:
    held = torch.ones(100_000_000, dtype=torch.uint8)
    with Peak(CPU) as taken:
        held.fill_(2)
    assert taken.bytes < 4e6


@LINUX
def test_a_peak_ends_with_an_error_too() -> None:
    taken = Peak(CPU)
    with pytest.raises(ValueError), taken:
        torch.ones(100_000_000, dtype=torch.uint8)
        raise ValueError
    assert taken.bytes == pytest.approx(100_000_000, abs=8e6)


@LINUX
@pytest.mark.parametrize("fails", [False, True])
def test_a_limit_is_put_back(fails) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        with limited(CPU, 10**9):
            assert 10**9 < resource.getrlimit(resource.RLIMIT_DATA)[0] < 10**12
            assert not fails or {}["x"]
    except KeyError:
        assert fails
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_without_a_budget_nothing_is_limited() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    for device, bytes_ in ((CPU, None), (torch.device("meta"), 1)):
        with limited(device, bytes_):
            assert resource.getrlimit(resource.RLIMIT_DATA) == before


# In processes of their own, whose memory nothing else has touched.


def run(*arguments: str, limit_s: float = 200) -> subprocess.CompletedProcess:
    command = [sys.executable, str(Path(__file__).with_name("limited.py")), *arguments]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit_s)


def in_process(*arguments: str) -> dict:
    ran = run(*arguments)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


@LINUX
def test_what_is_taken_beyond_a_limit_is_an_error() -> None:
    found = in_process("over_allocation")
    assert found["errors"][0] == "" and "can't allocate memory" in found["errors"][1]
    assert found["is_back"] and found["was"]


BUDGET, SAMPLES = 400_000_000, 8000
LARGE, MANY = 1_000_000_000, 20_000  # where one tensor of so many samples is more than the C library keeps when freed
KINDS = ("quadratic", "affine", "constant", "untraceable")


@pytest.fixture(scope="module")
def budgeted() -> dict:
    return in_process("budgeted", str(BUDGET), str(SAMPLES), "affine", "constant") | in_process(
        "budgeted", str(LARGE), str(MANY), "quadratic", "untraceable"
    )


@LINUX
@pytest.mark.parametrize("kind", KINDS)
def test_the_true_maximum_is_found_within_the_budget(budgeted, kind) -> None:
    found = budgeted[kind]
    assert all(fits and peak <= found["budget"] for _, fits, peak in found["run"]), found["table"]
    assert found["found"] in [size for size, _, _ in found["run"]]
    assert found["above"] is None or found["above"] > found["budget"], found["table"]  # what is 6% larger
    assert found["budget"] == (BUDGET if kind in ("affine", "constant") else LARGE)


@LINUX
@pytest.mark.parametrize(("kind", "most"), [*zip(KINDS, (3, 3, 1, 10), strict=True)])
def test_a_forecast_leaves_few_trials(budgeted, kind, most) -> None:
    assert len(budgeted[kind]["run"]) <= most, budgeted[kind]["table"]


@LINUX
def test_what_does_not_grow_with_the_batch_takes_all_samples(budgeted) -> None:
    assert budgeted["constant"]["found"] == SAMPLES


@LINUX
def test_a_process_with_a_limit_of_its_own_lives() -> None:
    found = in_process("address_space", "binsearch")
    assert found["limit"] and found["budget"] <= 400_000_000
    assert found["found"] > 1 and all(peak <= found["budget"] for _, fits, peak in found["run"] if fits)
    assert max(peak for _, fits, peak in found["run"] if fits) > 0.6 * found["budget"]
    assert len(found["loss"]) == 1


@pytest.fixture
def control_group() -> Iterator[Path]:
    """A control group whose processes have 900 MB, as a container's have."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root, f"kerastorch-test-{os.getpid()}")
        try:
            group.mkdir()
            (group / limit).write_text("900000000")
        except OSError:  # no such version, or not allowed
            if group.exists():
                group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("no control group can be made here")


@LINUX
@pytest.mark.parametrize("kind", ["affine", "untraceable"])
def test_a_process_in_a_container_lives(control_group, kind) -> None:
    found = json.loads(run("container", str(control_group), kind, "1").stdout.splitlines()[-1])
    assert 300_000_000 < found["budget"] < 900_000_000
    assert all(fits and peak <= found["budget"] for _, fits, peak in found["run"]), found["table"]
    assert max(peak for _, _, peak in found["run"]) > 0.9 * found["budget"], found["table"]
    assert found["found"] in [size for size, _, _ in found["run"]]


@LINUX
def test_a_process_in_a_container_does_not_live_with_more_than_was_found(control_group) -> None:
    assert run("container", str(control_group), "affine", "1.6").returncode == -signal.SIGKILL
