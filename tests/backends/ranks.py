"""Real processes for the tests of backends: scripts under `torchrun`, with a time limit and nobody left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT_S = 240


def torchrun(script: Path, *arguments: str, ranks: int = 2, options: tuple[str, ...] = (), limit_s: float = LIMIT_S):
    """Runs a script in ranks and returns the finished process, whatever its exit code."""
    launcher = options or ("--standalone", f"--nproc-per-node={ranks}")
    return finished(start([sys.executable, "-m", "torch.distributed.run", *launcher, str(script), *arguments]), limit_s)


def start(command: list[str], **options: Any) -> subprocess.Popen:
    """A process in a session of its own, so that all that it starts can be ended with it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes | options)


def finished(process: subprocess.Popen, limit_s: float = LIMIT_S) -> subprocess.CompletedProcess:
    """The process once it has ended, by itself or by the time limit; what it started has ended with it."""
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        end(process)
        out, err = process.communicate()
        raise AssertionError(f"not finished after {limit_s} s:\n{out[-2000:]}\n{err[-4000:]}") from None
    finally:
        end(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def end(process: subprocess.Popen) -> None:
    """Kills all processes of its session."""
    for pid in in_session(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def in_session(session: int) -> list[int]:
    """Processes that belong to a session and have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def differences(folder: Path, options: dict[str, Any], *names: str, ranks: int = 2) -> dict[str, dict[str, Any]]:
    """What `cases.py` finds: how much runs in ranks differ from those in one process."""
    out = folder / "differences.json"
    ran = torchrun(Path(__file__).with_name("cases.py"), json.dumps(options), str(out), *names, ranks=ranks)
    assert ran.returncode == 0, ran.stderr[-6000:]
    return json.loads(out.read_text())
