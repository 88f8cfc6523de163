"""Real processes for tests: with a time limit, nobody left behind, and torch imported once for all of them.

Importing torch takes seconds, over and over where tests start hundreds of processes. So these are forked from one that
has imported it and done nothing else: each is a process of its own, which runs a script as `python script.py` does.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed.run

ROOT = Path(__file__).parents[1]
LIMIT_S = 500  # of what takes seconds: a machine that is busy with other things is no failure
TORCHRUN = "torch.distributed.run"
FORKING = (TORCHRUN, "--run-path", "--start-method=fork")  # its ranks are forked, too
ALWAYS = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
FORKED = multiprocessing.get_context("forkserver")
# What a first step, torch's own wrappers and the scripts import.
FORKED.set_forkserver_preload(
    [TORCHRUN, "kerastorch", "sklearn.datasets", "torchmetrics", "torch._dynamo", "torch.distributed.fsdp"]
)


class Forked:
    """A script that runs in a forked process, as far as its `Popen` would be asked for something.

    Args:
        script: A path.
        arguments: Of its command line.
        folder: Where it runs. Default: here.
        environment: Variables beside those of this process.
    """

    def __init__(self, script: Path | str, *arguments: str, folder: Path | None = None, **environment: str) -> None:
        _serve()
        self.args, self._place = [str(script), *arguments], tempfile.TemporaryDirectory()
        self._files = [Path(self._place.name, name) for name in ("out", "err")]
        variables = os.environ | ALWAYS | environment
        self._process = FORKED.Process(target=_become, args=(self.args, folder or Path.cwd(), variables, self._files))
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired(self.args, timeout)
        with self._place:
            out, err = (file.read_text(errors="replace") if file.exists() else "" for file in self._files)
        return out, err


def run(script: Path | str, *arguments: str, limit_s: float = LIMIT_S, **others: Any) -> subprocess.CompletedProcess:
    """Runs a script and returns the finished process, whatever its exit code; others are those of `Forked`."""
    return finished(Forked(script, *arguments, **others), limit_s)


def torchrun(
    script: Path | str,
    *arguments: str,
    ranks: int = 2,
    options: tuple[str, ...] = (),
    anew: bool = False,
    limit_s: float = LIMIT_S,
) -> subprocess.CompletedProcess:
    """Runs a script in ranks that `torchrun` starts.

    Args:
        script: A path.
        arguments: Of its command line.
        ranks: How many.
        options: Those of `torchrun`. Default: so many ranks here.
        anew: Whether ranks are programs of their own as by default, for what is said and done where one fails.
        limit_s: As in `run`.
    """
    launcher = (*(options or ("--standalone", f"--nproc-per-node={ranks}")), str(script), *arguments)
    if anew:
        return finished(start([sys.executable, "-m", TORCHRUN, *launcher]), limit_s)
    return run(*FORKING, *launcher, limit_s=limit_s)


def start(command: list[str], **options: Any) -> subprocess.Popen:
    """A process in a session of its own, so that all that it starts can be ended with it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | ALWAYS, start_new_session=True, **pipes | options)


def finished(process: subprocess.Popen | Forked, limit_s: float = LIMIT_S) -> subprocess.CompletedProcess:
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


def end(process: subprocess.Popen | Forked) -> None:
    """Kills it, and all processes of its session."""
    process.kill()
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


def _serve() -> None:
    """Starts the process that others are forked from; OpenMP, and torch's log, read their variables once."""
    before = dict(os.environ)
    os.environ.update(ALWAYS)
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


def _become(arguments: list[str], folder: Path, environment: Mapping[str, str], files: list[Path]) -> None:
    """Makes of a forked process what `python script arguments` is."""
    script, *_ = sys.argv = arguments
    os.setsid()  # so that all that it starts can be ended with it
    gc.freeze()  # what has been imported is not looked through each time that memory is freed
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # it would be the one that this process was made by
    # What importing numpy would draw: ranks that `torchrun` forks, too, have random numbers of their own.
    own = os.getpid()
    os.register_at_fork(after_in_child=lambda: own == os.getppid() and script == TORCHRUN and np.random.seed())
    np.random.seed()
    try:
        if script == TORCHRUN:
            torch.distributed.run.main()
        else:
            sys.path.insert(0, str(Path(script).parent))
            runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out
