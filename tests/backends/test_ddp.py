"""DDP: several processes train as one, whatever the data, the step and the loss; and what happens when one fails."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from kerastorch import backends
from tests.backends import going_on
from tests.backends.cases import CASES, X, Y
from tests.backends.cases import differences as differences_here
from tests.backends.ranks import differences
from tests.processes import FORKING, Forked, finished, in_session, run, start, torchrun

HERE = Path(__file__).parent
# Adam divides by the size of a gradient, and so makes of a rounding in one that is almost 0 a step of the rate's size.
LARGEST = 1e-5
FEW = (
    "everything at once",
    "a rank without samples",
    "a rank without samples, normalized",
    "a window of such",
    "loader with workers",
)


def assert_same(found, largest=LARGEST):
    first, other = found["stopped_by"]
    assert first == other or "one rank" in str(found)
    assert all(found[what] <= largest for what in ("weights", "history", "evaluate", "predict")), found


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    return differences(tmp_path_factory.mktemp("two"), {"backend": "DDP", "timeout_s": 60})


@pytest.mark.parametrize("name", [name for name in CASES if "one rank" not in name])
def test_two_ranks_train_as_one_process(by_two, name):
    assert_same(by_two[name], {"double": 1e-12, "fp16": 1e-3}.get(name, LARGEST))


def test_a_stop_that_one_rank_asks_for_ends_the_run_of_all_at_that_batch(by_two):
    assert by_two["a stop that one rank asks for"]["weights"] <= LARGEST


def test_four_ranks_and_unequal_shares_train_as_one_process(tmp_path):
    options = {"backend": "DDP", "timeout_s": 60, "weights": [3, 1, 0.5, 2], "devices": 4}
    found = differences(tmp_path, options, *FEW, ranks=4)
    assert set(found) == set(FEW)
    for one in found.values():
        assert_same(one)


# Going on.


@pytest.fixture(scope="module")
def gone_on(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gone-on")
    ran = torchrun(HERE / "going_on.py", json.dumps({"backend": "DDP", "timeout_s": 60}), str(folder))
    assert ran.returncode == 0, ran.stderr[-6000:]
    return folder, torch.load(folder / "ends.pt", weights_only=True)


@pytest.mark.parametrize("name", ["arrays", "dropout", "loader"])
def test_a_run_of_two_ranks_that_died_ends_as_the_one_that_did_not(gone_on, name):
    """In the middle of an epoch and of a window: bit for bit, with what each rank has drawn for itself."""
    _, ends = gone_on
    assert_equal_ends(ends[name], ends[f"{name}, gone on with"], largest=0.0)


def test_what_two_ranks_have_saved_is_gone_on_with_by_one_process(gone_on):
    folder, ends = gone_on
    assert_equal_ends(going_on.end_of(*going_on.fit("cpu", resume=folder / "cut.pt")), ends["arrays"], largest=1e-6)
    assert_equal_ends(going_on.end_of(*going_on.fit("cpu")), ends["arrays"], largest=1e-6)


@pytest.mark.parametrize("saved_by", ["two ranks", "one process"])
def test_what_others_have_saved_is_gone_on_with_by_three_ranks(gone_on, tmp_path, saved_by):
    folder, ends = gone_on
    cut = folder / "cut.pt"
    if saved_by == "one process":
        cut = tmp_path / "cut.pt"
        with pytest.raises(going_on.Died):
            going_on.fit("cpu", callbacks=[going_on.Saves(cut, going_on.DIES_AT)])
    model, history = going_on.fit(backends.DDP(3, timeout_s=60), resume=cut)
    assert_equal_ends(going_on.end_of(model, history), ends["arrays"], largest=1e-6)


def assert_equal_ends(one, other, largest):
    assert one.keys() == other.keys()
    for name, tensor in one["module"].items():
        torch.testing.assert_close(tensor, other["module"][name], rtol=0, atol=largest)
    for name in one.keys() - {"module"}:
        assert one[name] == pytest.approx(other[name], rel=0, abs=largest)


# Ranks that fit starts itself.


def test_ranks_that_fit_starts_train_as_one_process():
    found = [differences_here(CASES[name], backends.DDP(2, timeout_s=60)) for name in FEW]
    for one in found:
        assert_same(one)


def test_what_the_ranks_did_is_brought_back():
    stopping = kt.callbacks.EarlyStopping("loss", patience=0, min_delta=100.0)
    model = kt.Model(nn.Linear(64, 10), backend=backends.DDP(2, timeout_s=60)).compile("adam", "cross_entropy")
    history = model.fit(X, Y, epochs=5, callbacks=[stopping], verbose=0)
    assert history is model.history and history.stopped_by == "stop_training" and len(history.epoch) == 2
    assert stopping.stopped_epoch == 1 and stopping.model is model
    assert model.epochs_trained == 2 and model.steps_taken == 2 * 4
    steps = {float(state["step"]) for state in model.optimizer.state.values()}
    assert steps == {8.0}
    model.fit(X, Y, epochs=1, verbose=0)  # goes on from there
    assert {float(state["step"]) for state in model.optimizer.state.values()} == {12.0}


def test_a_script_without_a_main_guard_starts_ranks(tmp_path):
    script = textwrap.dedent("""
        import kerastorch as kt, torch
        class Net(torch.nn.Linear):  # that no other process could import
            pass
        x = torch.rand(64, 4)
        torch.nn.functional.mse_loss(Net(4, 1)(x), x[:, :1]).backward()  # torch has been at work here
        model = kt.Model(Net(4, 1), backend=kt.backends.DDP(2)).compile("sgd", lambda output, y: (output - y).square())
        model.fit(x, x[:, :1], epochs=2, verbose=2)
        print("end", model.predict(x, verbose=0).shape)
    """)
    process = start([sys.executable, "-"], stdin=subprocess.PIPE)  # as in a REPL: there is no file
    process.stdin.write(script)
    process.stdin.close()
    process.stdin = None
    ran = finished(process)
    said = re.findall(r"\[./2\] \d|end torch.*", ran.stdout)  # torch 2.9 has remarks of its own, of each rank
    assert said == ["[1/2] 0", "[2/2] 0", "end torch.Size([64, 1])"], (ran.stdout, ran.stderr)


SHARED = """
import multiprocessing, os, sys, time
import kerastorch as kt, torch
from torch import nn
def work():
    while True:
        sum(range(1000))
rank = int(os.environ["RANK"])
os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
if rank == 1:  # its core is that of others, too
    for _ in range(5):
        multiprocessing.get_context("fork").Process(target=work, daemon=True).start()
torch.manual_seed(0)
x = torch.rand(320, 4)
found = {}
for name, backend in (("one", "cpu"), ("auto", kt.backends.DDP(weights="auto", timeout_s=60))):
    torch.manual_seed(0)
    model = kt.Model(nn.Linear(4, 1), backend=backend).compile("adam", "mse")
    found[name] = model.fit(x, x.sum(1, keepdim=True), batch_size=40, epochs=2, verbose=0).history["loss"]
if rank == 0:
    torch.save(found | {"samples": backend.share(40)[1].samples}, sys.argv[1])
"""


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda pid: ())(0)) < 2, reason="needs two cores")
def test_ranks_that_are_slower_take_less_if_asked_to_find_out(tmp_path):
    (tmp_path / "script.py").write_text(SHARED)
    for _ in range(3):  # for a moment, others may be at work on the free core, too
        ran = torchrun(tmp_path / "script.py", str(tmp_path / "found.pt"), limit_s=60)
        assert ran.returncode == 0, ran.stderr
        found = torch.load(tmp_path / "found.pt")
        if found["samples"] > 22:  # of 40; it would be 33 if nobody else was here
            break
    assert found["samples"] > 22
    assert found["auto"] == pytest.approx(found["one"], abs=LARGEST)


def test_random_numbers_go_on_after_ranks_that_fit_has_started_as_after_one_process():
    digits, ends = TensorDataset(torch.tensor(X), torch.tensor(Y)), []
    for backend in ("cpu", kt.backends.DDP(2, timeout_s=60)):
        kt.set_seed(3)
        loader = DataLoader(digits, 20, shuffle=True, generator=torch.Generator().manual_seed(1))
        model = kt.Model(nn.Linear(64, 10), backend=backend).compile("adam", "cross_entropy")
        losses = [model.fit(loader, verbose=0).history["loss"][0] for _ in range(2)]
        ends.append((losses, random.random(), float(np.random.rand()), torch.rand(2).tolist()))
    assert ends[1][0] == pytest.approx(ends[0][0], abs=LARGEST)
    assert ends[1][1:] == ends[0][1:]


# Failing and ending.

SMALL = """
import os, sys, time
import kerastorch as kt, torch
from torch import nn
class Fails(kt.callbacks.Callback):
    adds_to_logs = ()
    def on_train_batch_end(self, batch, logs=None):
        if batch == 3 and self.model.backend.rank == 1:
            {failure}
torch.manual_seed(0)
x = torch.rand(320, 4)
model = kt.Model(nn.Linear(4, 1), backend=kt.backends.DDP({options})).compile("sgd", "mse", lr=0.01)
history = model.fit(x, x.sum(1, keepdim=True), epochs=3, verbose=0, callbacks=[Fails(), *{more}])
print(history.history["loss"][-1])
"""


def script(tmp_path, failure, options="2, timeout_s=60", more="[]"):
    path = tmp_path / "script.py"
    path.write_text(SMALL.format(failure=failure, options=options, more=more))
    return path


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ("raise LookupError('of rank 1')", "LookupError: of rank 1 (raised in Fails.on_train_batch_end) (rank 1)"),
        ("os.kill(os.getpid(), 9)", "RuntimeError: rank 1 was killed by "),
        ("os._exit(3)", "RuntimeError: rank 1 "),
    ],
)
def test_a_rank_that_fails_ends_the_run_of_all_with_its_own_error(tmp_path, failure, said):
    process = Forked(script(tmp_path, failure))
    ran = finished(process, limit_s=60)
    assert ran.returncode == 1
    assert said in ran.stderr
    assert not in_session(process.pid)
    if "LookupError" in failure:
        assert "script.py" in ran.stderr.split("in rank 1:")[1]  # the line where it was raised


class Fails(kt.callbacks.Callback):
    adds_to_logs = ()

    def on_train_batch_end(self, batch, logs=None):
        if self.model.backend.rank == 0:
            raise LookupError("the cause")


COUNTED = """
import os, sys
import kerastorch as kt, torch, torch.distributed as dist
from torch import nn
calls, all_reduce = [], dist.all_reduce
def counted(*args, **named):
    calls.append(1)
    return all_reduce(*args, **named)
dist.all_reduce = counted
torch.manual_seed(0)
x, y = torch.rand(2000, 4), torch.randint(0, 3, (2000,))
model = kt.Model(nn.Linear(4, 3), backend=kt.backends.DDP(timeout_s=60)).compile("sgd", "cross_entropy")
model.fit(x, y, batch_size=20, verbose=0)
if model.backend.rank == 0:
    open(sys.argv[1], "w").write(str(len(calls)))
"""


def test_a_step_on_targets_of_which_none_is_masked_asks_the_others_for_nothing_but_gradients(tmp_path):
    (tmp_path / "script.py").write_text(COUNTED)
    ran = torchrun(tmp_path / "script.py", str(tmp_path / "calls"))
    assert ran.returncode == 0, ran.stderr
    assert int((tmp_path / "calls").read_text()) < 60  # of 100 steps: whether the run is to end, ten times a second


class Collect(kt.callbacks.Callback):
    adds_to_logs = ()

    def on_train_begin(self, logs=None):
        gc.collect()


@pytest.mark.timeout(60)
def test_ranks_do_not_wait_for_what_an_earlier_launch_has_left():
    model = kt.Model(nn.Linear(64, 10), backend=kt.backends.DDP(2, timeout_s=20)).compile("sgd", "cross_entropy")
    for _ in range(2):
        with pytest.raises(LookupError, match=r"the cause.* \(rank 0\)"):
            model.fit(X, Y, epochs=1, verbose=0, callbacks=[Fails()])
    history = model.fit(X, Y, epochs=1, verbose=0, callbacks=[Collect()])  # a store of theirs would wait for threads
    assert history.epoch == [0]


def test_a_wrong_name_is_refused_before_ranks_are_started(monkeypatch):
    model = kt.Model(nn.Linear(64, 10), backend=kt.backends.DDP(2)).compile("sgd", "mse")
    monkeypatch.setattr(type(model.backend), "launch", None)
    with pytest.raises(TypeError, match=r"fit\(\) got an unexpected keyword argument 'epoch'"):
        model.fit(X, X, epoch=3)


SOMETIMES = """
import sys
import kerastorch as kt, torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.calls = nn.Linear(4, 1), nn.Linear(4, 1), 0
    def forward(self, x):
        self.calls += 1
        return self.first(x) + (self.second(x) if self.calls % 3 else 0)
torch.manual_seed(0)
x = torch.rand(64, 4)
backend = kt.backends.DDP(timeout_s=30, find_unused_parameters=bool(sys.argv[1:]))
kt.Model(Net(), backend=backend).compile("sgd", "mse").fit(x, x[:, :1], batch_size=8, verbose=0)
"""


def test_parameters_that_get_a_gradient_in_some_steps_alone_are_explained(tmp_path):
    (tmp_path / "script.py").write_text(SOMETIMES)
    ran = torchrun(tmp_path / "script.py")
    assert ran.returncode == 1 and "Give DDP(find_unused_parameters=True), or freeze" in ran.stderr
    assert torchrun(tmp_path / "script.py", "find").returncode == 0


def test_a_backend_in_each_of_several_processes_is_warned_of(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.warns(UserWarning, match="has started 2 processes, and with backend='cpu' each trains by itself"):
        kt.Model(nn.Linear(2, 1), backend="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_one_process_where_several_may_be_meant_is_warned_of():
    with pytest.warns(UserWarning, match=r"DDP\(\) found no GPUs here, so that one process trains"):
        backend = backends.DDP()
    assert "rank 0 of 1" in repr(backend) and "starts 2 processes" in repr(backends.DDP(2))


def test_what_all_ranks_refuse_is_said_as_one_process_says_it():
    said = []
    for backend in ("cpu", kt.backends.DDP(2, timeout_s=20)):
        model = kt.Model(nn.Linear(64, 10), backend=backend).compile("sgd", "mse")
        with pytest.raises(ValueError, match="output has shape") as caught:
            model.fit(X, X, verbose=0)
        said.append(re.sub(r"\(\d+, ", "(..., ", str(caught.value)))
    assert said[0] == said[1]


def test_a_rank_that_fails_ends_all_that_torchrun_has_started(tmp_path):
    ran = torchrun(script(tmp_path, "raise LookupError('of rank 1')", options="timeout_s=60"), anew=True, limit_s=60)
    assert ran.returncode == 1
    assert "LookupError: of rank 1" in ran.stderr
    assert "another rank has ended, which this one missed in training" in ran.stderr


def test_ranks_that_do_different_things_are_told_so_in_time(tmp_path):
    path = script(tmp_path, "self.model.evaluate(x, x[:, :1], verbose=0)", options="2, timeout_s=5")
    began = time.monotonic()
    ran = run(path, limit_s=60)
    assert "waited in vain for another one" in ran.stderr and time.monotonic() - began < 45


LATE = """
import os, sys, time
if os.environ["RANK"] == "1":
    time.sleep({late_s})
from kerastorch.backends import DDP, ranks
ranks.MEETING_S = {meeting_s}
print(f"met: {{sum(DDP(timeout_s=2).collect(1))}}")
"""


def test_ranks_may_start_later_than_one_another(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(LATE.format(late_s=6, meeting_s="ranks.MEETING_S"))
    assert torchrun(path, limit_s=60).stdout.count("met: 2\n") == 2  # torch 2.9 has remarks of its own
    path.write_text(LATE.format(late_s=60, meeting_s=3))
    assert "rank 0 waited 3 s for ranks [1] to start, in vain: their own errors" in torchrun(path, limit_s=60).stderr


ALONE = """
import os, sys, time
import torch, kerastorch as kt
kt.set_seed(0)
model = kt.Model(torch.nn.Linear(4, 2), backend=kt.backends.{backend}(timeout_s=5)).compile("adam", "mse")
if int(os.environ["RANK"]) == 0:
    model.save({folder!r} + "/alone.pt")
else:
    {other}
"""


@pytest.mark.parametrize(
    ("backend", "other", "said"),
    [
        ("DDP", "pass", "another rank has ended, which this one missed outside of a run"),
        ("FSDP", "time.sleep(60)", "this rank waited in vain for another one, outside of a run"),
        ("DDP", "model.evaluate(torch.rand(8, 4), torch.rand(8, 2))", "rank 0 is in a write, rank 1 in model.evaluate"),
        (
            "FSDP",
            "model.predict(torch.rand(8, 4))",
            "rank 0 is in what puts its state together, rank 1 in model.predict",
        ),
    ],
)
def test_what_one_rank_does_alone_is_said_in_words(tmp_path, backend, other, said):
    path = tmp_path / "script.py"
    path.write_text(ALONE.format(backend=backend, other=other, folder=str(tmp_path)))
    ran = torchrun(path, anew=other == "pass", limit_s=60)
    assert ran.returncode == 1
    assert said in ran.stderr and "rank 0 alone writes" in ran.stderr


MIXED = """
import os
import torch, kerastorch as kt
kt.set_seed(0)
rank, x, y = int(os.environ["RANK"]), torch.rand(64, 4), torch.rand(64, 2)
model = kt.Model(torch.nn.Linear(4, 2), backend=kt.backends.DDP(timeout_s=60)).compile("adam", "mse")
for verb in (lambda x, y: model.evaluate(x, y, verbose=0), lambda x, y: model.predict(x)):
    try:
        verb(x + rank, y + rank)
    except ValueError as error:
        with open(os.path.join(os.path.dirname(__file__), f"said-{rank}"), "a") as file:
            file.write(str(error))
"""


def test_measuring_on_other_data_than_other_ranks_is_refused_at_once(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(MIXED)
    ran = torchrun(path, limit_s=60)
    assert ran.returncode == 0, ran.stderr
    for rank in range(2):
        assert (tmp_path / f"said-{rank}").read_text().count("rank 1 was given another data than rank 0") == 2


def test_a_batch_of_one_sample_cannot_be_normalized_as_in_one_process():
    said = []
    for backend in ("cpu", kt.backends.DDP(2, timeout_s=20)):
        net = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
        model = kt.Model(net, backend=backend).compile("sgd", "cross_entropy")
        with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
            model.fit(X[:21], Y[:21], batch_size=10, shuffle=False, verbose=0)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_ranks_are_started_again_from_the_last_file(tmp_path):
    once = "os.path.exists('died') or (open('died', 'w').close(), os.kill(os.getpid(), 9))"
    more = "[kt.callbacks.BackupAndRestore('backup', save_freq=1)]"
    ends = []
    for failure, options in ((once, "2, timeout_s=60, max_restarts=1"), ("pass", "2, timeout_s=60")):
        folder = tmp_path / str(len(ends))
        folder.mkdir()
        ran = run(script(folder, failure, options, more), folder=folder)
        assert ran.returncode == 0, ran.stderr
        ends.append(ran.stdout.splitlines()[-1])
    assert (tmp_path / "0" / "died").exists() and ends[0] == ends[1]


def test_ranks_are_not_started_again_from_the_files_of_an_earlier_run(tmp_path):
    more = "[kt.callbacks.ModelCheckpoint('{epoch}.pt')]"
    ends = []
    for failure in ("pass", "os.path.exists('died') or (open('died', 'w').close(), os.kill(os.getpid(), 9))"):
        path = script(tmp_path, failure, "2, timeout_s=60, max_restarts=1", more)
        ran = run(path, folder=tmp_path)
        assert ran.returncode == 0, ran.stderr
        ends.append(ran.stdout.splitlines()[-1])
    assert ends[0] == ends[1] and "all were started again (restart 1) from where the call began" in ran.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_ends_ranks_that_fit_has_started_with_all_saved(tmp_path, name):
    process = Forked(HERE / "signalled.py", json.dumps({"backend": "DDP", "devices": 2}), str(tmp_path))
    send_when_started(process, name, tmp_path)
    assert process.returncode == 0
    end = json.loads((tmp_path / "end.json").read_text())
    assert end["stopped_by"] == name.replace("SIGINT", "interrupt") and end["steps"] > 0
    assert (tmp_path / "last.pt").exists()


def test_a_signal_to_torchrun_ends_the_ranks_at_one_step_with_all_saved(tmp_path):
    arguments = [str(HERE / "signalled.py"), json.dumps({"backend": "DDP"}), str(tmp_path)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = start([*launcher, *arguments])
    send_when_started(process, "SIGTERM", tmp_path)
    assert json.loads((tmp_path / "end.json").read_text())["stopped_by"] == "SIGTERM"
    assert (tmp_path / "last.pt").exists()


def test_a_second_ctrl_c_ends_ranks_at_once(tmp_path):
    options = json.dumps({"backend": "DDP", "devices": 2})
    process = Forked(HERE / "signalled.py", options, str(tmp_path), "30")
    wait_until_started(tmp_path)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)  # each rank sleeps in a hook, which another one breaks off
    os.kill(process.pid, signal.SIGINT)
    ran = finished(process, limit_s=20)
    assert "KeyboardInterrupt" in ran.stderr and not in_session(process.pid)
    assert not (tmp_path / "end.json").exists()


def wait_until_started(folder):
    until = time.monotonic() + 60
    while not (folder / "started").exists() and time.monotonic() < until:
        time.sleep(0.05)


def send_when_started(process, name, folder):
    wait_until_started(folder)
    os.kill(process.pid, getattr(signal, name))
    finished(process, limit_s=60)
    assert not in_session(process.pid)


# More than one machine, and what is no machine.


def test_two_nodes_train_as_one_process(tmp_path):
    """Two agents of torchrun, each with a rank and a rendezvous over the network of this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    out = tmp_path / "found.json"
    options = json.dumps({"backend": "DDP", "num_nodes": 2, "timeout_s": 60})
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=test"]
    launcher = (*FORKING, *rendezvous, f"--rdzv-endpoint={endpoint}", "--local-addr=localhost")
    nodes = [Forked(*launcher, str(HERE / "cases.py"), options, str(out), *FEW[:2]) for _ in range(2)]
    for node in nodes:
        assert finished(node).returncode == 0
    for one in json.loads(out.read_text()).values():
        assert_same(one)


def test_a_machine_of_other_processes_than_asked_for_is_refused(tmp_path):
    for options, said in (
        ("3", "asks for 3 processes on each machine, but 2 were"),
        ("num_nodes=2", "num_nodes=2 with 2"),
    ):
        ran = torchrun(script(tmp_path, "pass", options))
        assert ran.returncode == 1 and said in ran.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"devices": 0}, "devices=0 names no devices"),
        ({"devices": "two"}, "devices='two' names no devices"),
        ({"devices": True}, "devices=True names no devices"),
        ({"devices": [0, 99]}, "has no GPUs. Give devices=2 for processes"),
        ({"devices": 2, "num_nodes": 2}, "torchrun --nnodes=2 --nproc-per-node=2"),
        ({"devices": 2, "num_nodes": 0}, "num_nodes=0 is no number"),
        ({"weights": [1, -1]}, "is no list of numbers above 0"),
        ({"timeout_s": 0}, "timeout_s=0 is no time"),
        ({"timeout_s": float("inf")}, "timeout_s=inf is no time"),
        ({"find_unused_parameters": "yes"}, "find_unused_parameters='yes' is neither True nor False"),
        ({"sync_batchnorm": "no"}, "sync_batchnorm='no' is neither True nor False"),
        ({"max_restarts": -1}, "max_restarts=-1"),
        ({"devices": 2, "weights": [1, 2, 3]}, "weights has 3 numbers, but there are 2"),
    ],
)
def test_mistakes_are_refused_before_anything_starts(options, said):
    with pytest.raises(ValueError, match=said):
        backends.DDP(**options)


def test_one_process_is_started_nowhere():
    model = kt.Model(nn.Linear(64, 10), backend=backends.DDP(1)).compile("sgd", "cross_entropy")
    assert model.fit(X, Y, verbose=0).epoch == [0]
    assert model.backend.world == 1 and not torch.distributed.is_initialized()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["DDP", "FSDP"])
def test_one_rank_on_a_gpu_trains_as_the_cpu(tmp_path, backend):
    """By NCCL, which all gradients and sums go through."""
    found = differences(tmp_path, {"backend": backend, "devices": 1, "timeout_s": 60}, *FEW, ranks=1)
    for one in found.values():
        assert_same(one, 1e-4)
