"""`python -m kerastorch`: what it finds, and that nothing broken stops it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

import kerastorch as kt
from kerastorch import __main__ as main
from kerastorch import environment

GIB = 2**30


def row_of(rows, name) -> dict:
    """The row whose first column says `name`."""
    return next(row for row in rows if next(iter(row.values())) == name)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def in_a_path(folder: Path, package: str, body: str, version="9.9") -> None:
    """A package that seems to be installed."""
    write(folder, {
        f"{package}/__init__.py": body,
        f"{package}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n",
    })  # fmt: skip


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs packages for this process and those it starts."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda package, body="": in_a_path(tmp_path, package, body)


# The command.


def test_the_command_prints_every_table_and_imports_nothing_heavy(tmp_path):
    program = (
        "import runpy, sys\n"
        "try: runpy.run_module('kerastorch', run_name='__main__')\n"
        "finally: print({'torch_xla', 'deepspeed', 'torch._dynamo', 'transformers', 'onnx'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(kt.__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    for text in ("versions", f"torch {metadata.version('torch')}", "DDP", "torchrun --standalone", 'backend="auto"'):
        assert text in said
    brought_by_torch = {"torch_xla"} & set(sys.modules)  # a device that is installed announces itself to torch
    assert done.stdout.strip().splitlines()[-1] == str(brought_by_torch or set())


def test_json_is_the_report(capsys):
    main.main(["--json"])
    tables = json.loads(capsys.readouterr().out)
    assert list(tables) == list(environment.report())
    assert row_of(tables["versions"], "kerastorch")["version"] == kt.__version__
    assert row_of(tables["devices"], "cpu")["total_bytes"] > 0


def test_in_a_file_each_row_is_a_line_and_on_a_terminal_it_is_wrapped(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    why = "a reason " * 30
    tables = {"backends": [{"backend": "DDP", "usable": True, "free_bytes": 3 * GIB, "total_bytes": None, "why": why}],
              "variables": [], "to launch": [{"where": "here", "command": "run " * 40}]}  # fmt: skip
    piped = main.as_text(tables, io.StringIO())
    assert piped.splitlines()[1].split() == ["backend", "usable", "free", "total", "why"]
    assert piped.splitlines()[2].split() == ["DDP", "yes", "3.0", "GiB", *why.split()]
    assert "variables" not in piped
    monkeypatch.setenv("COLUMNS", "80")
    wide = main.as_text(tables, Terminal())
    assert "---" in wide
    table, launch = wide.split("\n\n")
    assert max(map(len, table.splitlines())) <= 80
    assert launch == "# here\n" + "run " * 40


def test_characters_that_the_terminal_has_not_are_replaced(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(main, "report", lambda: {"a": [{"b": "Größe"}], "to launch": []})
    main.main([])
    output.flush()
    assert output.buffer.getvalue() == b"a\nb\nGr??e\n"


# Devices.


def test_the_cpu_has_what_this_process_may_use(monkeypatch):
    row = row_of(environment.devices(), "cpu")
    assert row["total_bytes"] <= psutil.virtual_memory().total
    assert 0 < row["free_bytes"] <= row["total_bytes"]
    assert row["note"].startswith(str(environment.cores()))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert environment.cores(Path("/nowhere")) == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert environment.cores(Path("/nowhere")) == 1


V2 = {"proc/self/cgroup": "0::/pod/one\n"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/\n"}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        (V2 | {"sys/fs/cgroup/pod/one/cpu.max": "max 100000"}, 64),
        (V2 | {"sys/fs/cgroup/pod/one/cpu.max": "max 100000", "sys/fs/cgroup/pod/cpu.max": "350000 100000"}, 3),
        (V2 | {"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),  # as it looks within a container
        (V1 | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 64),
        (
            V1
            | {
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        ({}, 64),
    ],
)
def test_the_cores_of_a_container(files, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert environment.cores(write(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (V2 | {"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": "5"}, (8 * GIB, 6 * GIB)),
        (
            V2
            | {
                "sys/fs/cgroup/pod/memory.max": str(4 * GIB),
                "sys/fs/cgroup/pod/memory.current": str(3 * GIB),
                "sys/fs/cgroup/pod/memory.stat": f"anon 1\ninactive_file {GIB}\n",
            },
            (4 * GIB, 2 * GIB),
        ),
        (
            V1
            | {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(GIB),
                "sys/fs/cgroup/memory/memory.usage_in_bytes": str(2 * GIB),
            },
            (GIB, 0),
        ),
        (
            V1
            | {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
            },
            (8 * GIB, 6 * GIB),
        ),
    ],
)
def test_the_memory_of_a_container(files, expected, tmp_path, monkeypatch):
    machine = types.SimpleNamespace(total=8 * GIB, available=6 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    assert environment.memory(write(tmp_path, files)) == expected


class TwoGpus:
    """What torch.cuda would answer; the second GPU is another process's own."""

    def is_available(self):
        return True

    def device_count(self):
        return 2

    def get_device_properties(self, name):
        return types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0)

    def mem_get_info(self, name):
        if name == "cuda:1":
            raise RuntimeError("CUDA-capable device(s) is/are busy\nor unavailable. Compile with X.")
        return 100 * GIB, 140 * GIB


def test_a_gpu_that_is_busy_hides_no_other(monkeypatch):
    monkeypatch.setattr(torch, "cuda", TwoGpus())
    rows = environment.devices()
    assert row_of(rows, "cuda:0") == {
        "device": "cuda:0", "model": "NVIDIA H200", "free_bytes": 100 * GIB, "total_bytes": 140 * GIB,
        "note": "capability 9.0",
    }  # fmt: skip
    assert row_of(rows, "cuda:1")["note"] == "CUDA-capable device(s) is/are busy or unavailable."


# Backends.


def with_gpus(monkeypatch, nccl=True):
    monkeypatch.setattr(torch, "cuda", TwoGpus())
    monkeypatch.setattr(environment, "real_device", lambda device: device if device.type == "cuda" else None)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)


def test_gpus_are_used_by_gpu_and_by_ranks(monkeypatch):
    with_gpus(monkeypatch)
    found = environment.backends({})
    assert row_of(found, '"gpu"') == {
        "backend": '"gpu"', "usable": True, "why": "2 devices of CUDA; one is used, DDP uses all.",
    }  # fmt: skip
    assert row_of(found, "DDP")["why"].startswith("2 GPUs here, by NCCL. Built in: NCCL, Gloo")
    assert environment.report({})['backend="auto"'][0]["is"] == '"cuda"'
    assert "--nproc-per-node=gpu" in environment.launches()[0]["command"]
    with_gpus(monkeypatch, nccl=False)
    assert row_of(environment.backends({}), "DDP")["why"].startswith("CPU ranks, by Gloo")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_torch_says_why():
    row = row_of(environment.backends({}), '"gpu"')
    assert row["usable"] is False
    assert "CUDA: Torch not compiled with CUDA" in row["why"] or "CUDA: Found no NVIDIA driver" in row["why"]
    assert "MPS: Torch not compiled with MPS enabled." in row["why"] or sys.platform == "darwin"
    assert environment.report({})['backend="auto"'][0]["is"] == f'"{kt.backends.get("auto").device.type}"'


def test_ranks_need_torch_distributed_and_an_engine(monkeypatch):
    for name in ("is_gloo_available", "is_nccl_available", "is_mpi_available"):
        monkeypatch.setattr(dist, name, lambda: False)
    row = row_of(environment.backends({}), "DDP")
    assert (row["usable"], row["why"]) == (
        False, "This torch is built without NCCL and Gloo, so that processes cannot meet.",
    )  # fmt: skip
    monkeypatch.setattr(dist, "is_available", lambda: False)
    for name in ("DDP", "FSDP", "Pipeline"):
        assert row_of(environment.backends({}), name)["why"] == "This torch is built without torch.distributed."
    assert row_of(environment.backends({}), '"cpu"')["usable"]


def test_a_torch_without_an_engine_is_told(monkeypatch):
    monkeypatch.setattr(environment, "find_spec", lambda name: None if name.endswith("pipelining") else name)
    found = environment.backends({})
    assert row_of(found, "Pipeline")["why"] == f"torch {torch.__version__} has no torch.distributed.pipelining."
    assert row_of(found, "FSDP")["usable"]


def test_without_deepspeed_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch",))
    row = row_of(environment.backends({}), "DeepSpeed")
    assert (row["usable"], row["why"]) == (False, "not installed: pip install kerastorch[deepspeed].")


def test_deepspeed_is_there_if_it_is_installed_and_processes_can_meet(installed, monkeypatch):
    installed("deepspeed", "raise SystemExit('nobody imports it')")
    row = row_of(environment.backends({}), "DeepSpeed")
    assert row["usable"]
    assert row["why"] == f"deepspeed 9.9, {row_of(environment.backends({}), 'DDP')['why']}"
    monkeypatch.setattr(dist, "is_available", lambda: False)
    row = row_of(environment.backends({}), "DeepSpeed")
    assert (row["usable"], row["why"]) == (False, "This torch is built without torch.distributed.")


XLA = """
import sys, types
tpu = types.SimpleNamespace(num_available_chips=lambda: {})
sys.modules["torch_xla._internal"] = types.SimpleNamespace(tpu=tpu)
"""


@pytest.mark.parametrize(
    ("body", "client", "usable", "why"),
    [
        (XLA.format(0), None, False, "torch_xla 9.9 finds no TPU. Set PJRT_DEVICE=CPU to try its CPU client."),
        (XLA.format(0), "TPU", False, "torch_xla 9.9 finds no TPU. "),
        (XLA.format(0), "CPU", True, "torch_xla 9.9 on its CPU client (PJRT_DEVICE=CPU)."),
        (XLA.format(4), None, True, "torch_xla 9.9, 4 chips on this host."),
        ("raise ImportError('undefined symbol: _ZN5torch')", "TPU", False, "ImportError: undefined symbol: _ZN5torch"),
        ("import os; os.abort()", None, False, "cannot be imported with torch"),
    ],
)
def test_a_tpu_is_there_if_torch_xla_can_be_imported_and_finds_one(body, client, usable, why, installed):
    installed("torch_xla", body)
    variables = {name: value for name, value in os.environ.items() if name != "PJRT_DEVICE"}
    row = row_of(environment.backends(variables | ({"PJRT_DEVICE": client} if client else {})), "TPU")
    assert row["usable"] is usable
    assert why in row["why"]


def test_an_import_that_does_not_end_is_ended(installed, monkeypatch):
    monkeypatch.setattr(environment, "XLA_TIMEOUT_S", 0.5)
    installed("torch_xla", "import time; time.sleep(100)")
    assert "did not end within 0.5 s" in row_of(environment.backends(os.environ), "TPU")["why"]


def test_what_fails_while_it_is_asked_is_a_reason(monkeypatch):
    def broken():
        raise OSError("libgomp.so.1: cannot open shared object file. And more.")

    monkeypatch.setattr(dist, "is_available", broken)
    row = row_of(environment.backends({}), "FSDP")
    assert row["usable"] is False
    assert row["why"] == "Asking failed: libgomp.so.1: cannot open shared object file."


# What "auto" is, and launching.


@pytest.mark.parametrize(
    ("variables", "tpu", "expected"),
    [
        ({"WORLD_SIZE": "4"}, True, "DDP"),
        ({"WORLD_SIZE": "1"}, True, "TPU"),
        ({"WORLD_SIZE": "several"}, False, '"cpu"'),
        ({"PJRT_DEVICE": "CPU"}, True, '"cpu"'),
        ({}, False, '"cpu"'),
    ],
)
def test_auto_is_ddp_under_torchrun_and_else_the_best_that_works(variables, tpu, expected):
    found = [{"backend": "TPU", "usable": tpu}, {"backend": '"gpu"', "usable": False}]
    chosen = environment._automatic(found, variables)
    assert chosen["is"] == expected
    if expected == "DDP":
        assert chosen["because"] == "torchrun started 4 ranks (WORLD_SIZE)."


def test_variables_that_are_set_are_shown():
    tables = environment.report({"RANK": "0", "SLURM_JOB_ID": "17", "HOME": "/x"})
    assert tables["variables"] == [{"variable": "RANK", "value": "0"}, {"variable": "SLURM_JOB_ID", "value": "17"}]


def test_the_commands_to_launch_are_torchruns_own(tmp_path):
    """Torchrun starts two ranks with what is printed for one machine, and takes the arguments of the others."""
    from torch.distributed.run import parse_args

    script = tmp_path / "train.py"
    script.write_text("import os; open(f'{os.environ[\"RANK\"]} of {os.environ[\"WORLD_SIZE\"]}', 'w')")
    here, two, slurm, _ = (row["command"] for row in environment.launches())
    program, *arguments = here.split()
    assert program == "torchrun"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments], cwd=tmp_path, timeout=300, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    ranks = torch.cuda.device_count() or 2
    assert sorted(path.name for path in tmp_path.glob("* of *")) == [f"{rank} of {ranks}" for rank in range(ranks)]
    for command in (
        two,
        slurm.removeprefix("srun ").replace("$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)", "a"),
    ):
        options = parse_args(command.split()[1:])
        assert options.rdzv_backend == "c10d"
        assert options.rdzv_endpoint.endswith(":29500")
        assert options.training_script == "train.py"
