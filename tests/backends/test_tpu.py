"""TPU: what is refused anywhere; and on torch_xla's CPU client, with one core and with four, the numbers of the CPU.

Nothing in here has seen a TPU. What needs one is skipped without one and says so.
"""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from kerastorch.backends import TPU, tpu
from tests.reference import cut, distance, train_in_windows

CORES = int(os.environ.get("CPU_NUM_DEVICES", "1"))
ROWS, BATCH = 77, 16  # four batches and 13 rows, which neither 4 nor 16 divides
several = pytest.mark.skipif(CORES == 1, reason="of several cores: test_on_four_cores runs it in another process")
alone = pytest.mark.skipif(CORES > 1, reason="the same with one core")


@pytest.fixture(scope="module")
def xla():
    if importlib.util.find_spec("torch_xla") is None:
        pytest.skip("needs torch_xla, which has an environment of its own")
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    return importlib.import_module("torch_xla")


@pytest.fixture
def backend(xla):
    return TPU()


@pytest.fixture
def data(digits):
    return digits[0][:ROWS], digits[1][:ROWS]


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def counts(*names: str) -> list[int]:
    """How often torch_xla has done these things so far."""
    metrics = tpu._xla("debug.metrics")
    return [(metrics.metric_data(name) or [metrics.counter_value(name) or 0])[0] for name in names]


class Counting(kt.Callback):
    """What torch_xla does within each epoch, before its one read and in all."""

    def __init__(self):
        self.epochs = []

    def on_epoch_begin(self, epoch, logs=None):
        self.before = self.now()

    def on_train_batch_end(self, batch, logs=None):
        self.at_last_batch = self.now()

    def on_epoch_end(self, epoch, logs=None):
        both = (self.at_last_batch, self.now())
        self.epochs.append([{key: now[key] - self.before[key] for key in now} for now in both])

    def now(self):
        # Executions themselves are counted when they have ended.
        cached, compiled, from_device, scalars = counts(
            "CachedCompile", "UncachedCompile", "TransferFromDeviceTime", "aten::_local_scalar_dense"
        )
        return {"compiled": compiled, "executed": cached + compiled, "reads": from_device + scalars}


# What is refused, with torch_xla or without.


@alone
@pytest.mark.parametrize("cores", [0, -1, True, 1.0, "all"])
def test_what_is_no_number_of_cores_is_refused(cores):
    with pytest.raises(ValueError, match=f"cores={cores!r} is no number of cores"):
        TPU(cores)


@alone
def test_an_unknown_way_to_shard_is_refused():
    with pytest.raises(ValueError, match="shard='optimizer' is not known. Give \"parameters\""):
        TPU(shard="optimizer")


@alone
@pytest.mark.parametrize("name", ["tpu", "xla", torch.device("xla")])
def test_without_torch_xla_an_error_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(ImportError, match=r"needs torch_xla.*pip install torch_xla==2.9.0 torch==2.9.0, and set PJRT"):
        kt.Model(nn.Linear(1, 1), backend=name)


@alone
def test_importing_the_package_leaves_torch_xla_alone():
    program = "import sys, kerastorch; assert not any(name.startswith('torch_xla') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


@alone
def test_a_machine_without_a_tpu_is_refused_unless_its_cpu_is_asked_for(xla):
    program = "import kerastorch as kt; kt.backends.TPU()"
    environment = {key: value for key, value in os.environ.items() if key not in ("PJRT_DEVICE", "CPU_NUM_DEVICES")}
    if tpu._xla("runtime").device_type() != "CPU":
        pytest.skip("there is a TPU")
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "ValueError: torch_xla finds no TPU here. Set PJRT_DEVICE=CPU" in ended.stderr


@alone
def test_several_processes_on_a_host_are_refused(xla, monkeypatch):
    monkeypatch.setattr(tpu._xla("runtime"), "local_process_count", lambda: 4)
    with pytest.raises(ValueError, match="Start one process on each host"):
        TPU()


def test_cores_that_are_not_there_are_refused_with_the_number_there_is(xla):
    with pytest.raises(ValueError, match=f"cores=3 cannot be had: there are {CORES} here.*TPU_VISIBLE_CHIPS"):
        TPU(3)


@alone
def test_one_core_has_nothing_to_shard_over(xla):
    with pytest.raises(ValueError, match="shard='parameters' needs several cores, and there is one"):
        TPU(shard="parameters")


@several
def test_a_process_that_uses_all_cores_cannot_use_one(backend):
    with pytest.raises(RuntimeError, match="this process uses all of its 4 cores.*now one would be used"):
        TPU(1)


@alone
def test_a_process_that_uses_one_of_several_cores_cannot_use_all(xla):
    program = "import kerastorch as kt; print(kt.backends.TPU(1).cores); kt.backends.TPU(1); kt.backends.TPU()"
    environment = os.environ | {"CPU_NUM_DEVICES": "4", "PJRT_DEVICE": "CPU"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.stdout == "1\n"
    assert "RuntimeError: this process uses one of its 4 cores" in ended.stderr


# The numbers.


@pytest.mark.parametrize(
    "shard, accumulate",
    [pytest.param(None, 1, marks=alone), (None, 3), pytest.param("parameters", 3, marks=several)],
)
def test_numbers_are_those_of_a_loop_by_hand_on_the_cpu(xla, data, shard, accumulate):
    x, y = data
    y = y.masked_fill(torch.arange(ROWS) % 3 == 0, -100)
    net = network()
    by_hand = train_in_windows(
        net,
        lambda epoch: cut(x, y, BATCH),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        lambda output, target: nn.functional.cross_entropy(output, target, reduction="sum"),
        epochs=2,
        accumulate=lambda epoch: accumulate,
        units=lambda target: (target != -100).sum(),
        clip=lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.5),
        schedule=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    )
    schedule = ("step", lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
    model = kt.Model(copy.deepcopy(net), backend=TPU(shard=shard))
    model.compile("adamw", "cross_entropy", lr=0.01, clip=0.5, schedule=schedule, metrics=["accuracy"])
    history = model.fit(x, y, epochs=2, batch_size=BATCH, shuffle=False, accumulate=accumulate, verbose=0)
    assert history.history["loss"] == pytest.approx(by_hand.losses, abs=1e-5)
    assert history.history["lr"][-1] == pytest.approx(by_hand.rates[-1])
    with torch.no_grad():
        outputs = by_hand.net(x)
    assert (model.predict(x, verbose=0) - outputs).abs().max() <= 1e-5
    assert model.evaluate(x, y, verbose=0)[0] == pytest.approx(nn.functional.cross_entropy(outputs, y).item(), abs=1e-5)
    assert distance(by_hand.net, model.module.cpu()) <= 1e-5


LAYERS = {
    "BatchNorm1d": lambda **options: [nn.Linear(64, 12, bias=False), nn.BatchNorm1d(12, **options), nn.Linear(12, 10)],
    "BatchNorm2d": lambda **options: [
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, **options)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)),
    ],
    "InstanceNorm1d": lambda **options: [
        *(nn.Unflatten(1, (8, 8)), nn.InstanceNorm1d(8, track_running_stats=True, **options)),
        *(nn.Flatten(), nn.Linear(64, 10)),
    ],
}


@pytest.mark.parametrize(
    "layers, options",
    [
        ("BatchNorm2d", {}),
        *(
            pytest.param(*given, marks=alone)
            for given in (("BatchNorm1d", {}), ("BatchNorm1d", {"momentum": None}), ("InstanceNorm1d", {}))
        ),
    ],
)
def test_normalization_keeps_the_statistics_that_torch_keeps(backend, data, layers, options):
    net = nn.Sequential(*LAYERS[layers](**options))
    models = [kt.Model(copy.deepcopy(net), backend=where).compile("sgd", "cross_entropy") for where in ("cpu", backend)]
    histories = [one.fit(*data, epochs=2, validation_split=0.2, batch_size=BATCH, verbose=0).history for one in models]
    for name, values in histories[0].items():
        assert histories[1][name] == pytest.approx(values, abs=1e-5)
    assert distance(models[0].module, models[1].module.cpu()) <= 1e-5


@alone
def test_a_module_that_is_back_on_the_cpu_keeps_its_statistics_by_itself(backend, data):
    net = nn.Sequential(*LAYERS["BatchNorm1d"]())
    placed = kt.Model(kt.Model(copy.deepcopy(net), backend=backend).module, backend=backend).module.cpu()
    placed(data[0]), net(data[0])
    assert distance(net, placed) == 0


@pytest.mark.parametrize("rows", [1, 3, 5, 16])
def test_any_number_of_rows_is_computed_exactly(backend, rows):
    x = torch.rand(rows, 3)
    on_cores = backend.move({"x": x, "name": "kept"})
    assert on_cores["name"] == "kept" and on_cores["x"].device == backend.device
    assert torch.equal(on_cores["x"].cpu(), x)
    assert torch.allclose(torch.softmax(on_cores["x"], 0).cpu(), torch.softmax(x, 0), atol=1e-7)
    assert torch.allclose(on_cores["x"].mean(0).cpu(), x.mean(0), atol=1e-7)


def test_what_cannot_be_sent_ahead_is_moved_all_the_same(backend):
    scalar, parameter = torch.tensor(2.0), nn.Parameter(torch.ones(2))
    moved = backend.move([scalar, parameter])
    again = backend.move(moved)
    assert again[0] is moved[0] and again[1] is moved[1]
    assert backend.hold([scalar])[0] is scalar  # batches are cut out on the host
    (moved[0] * moved[1]).sum().backward()
    assert parameter.grad.tolist() == [2.0, 2.0]


@alone
def test_bf16_trains_in_bfloat16(backend, data):
    models = [kt.Model(network(), backend=where) for where in ("cpu", backend)]
    for model in models:
        model.compile("adamw", "cross_entropy", precision="bf16", lr=0.01)
    histories = [model.fit(*data, epochs=3, batch_size=BATCH, verbose=0).history["loss"] for model in models]
    assert histories[1] == pytest.approx(histories[0], abs=0.02) and histories[1] != histories[0]
    assert {parameter.dtype for parameter in models[1].module.parameters()} == {torch.float32}
    assert models[1].predict(data[0], verbose=0).dtype == torch.float32


# One program for each step.


@pytest.mark.parametrize("form", ["arrays", pytest.param("loader", marks=alone)])
def test_a_step_is_one_program_compiled_once_and_nothing_is_read_within_an_epoch(backend, data, form):
    x, y = data
    steps = -(-ROWS // BATCH)
    given = (x, y) if form == "arrays" else (DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True),)
    counting = Counting()
    model = kt.Model(network(), backend=backend)
    model.compile("adamw", "cross_entropy", metrics=["accuracy"], clip=1.0, schedule="cosine")
    options = {"batch_size": BATCH} if form == "arrays" else {}
    model.fit(*given, epochs=4, callbacks=[counting], verbose=0, **options)
    first, _ = counting.epochs[0]
    # Of the first step, of one with the optimizer's state, what is read of it to check the data, and what was to come.
    assert first["compiled"] <= 5 and first["reads"] <= 2
    second, _ = counting.epochs[1]
    assert second["compiled"] <= 1  # its first step, whose sums are not added to others
    for within, whole in counting.epochs[2:]:
        assert within == {"compiled": 0, "executed": steps - 1, "reads": 0}  # the last one is not cut off yet
        assert whole["compiled"] == 0 and whole["executed"] <= steps + 1 and whole["reads"] <= 3


@alone
def test_a_step_is_handed_to_the_device_before_the_next_batch_is_read(backend, data, monkeypatch):
    events = []
    sync = tpu._sync
    monkeypatch.setattr(tpu, "_sync", lambda: [events.append("cut"), sync()])

    def batches():
        for number in range(3):
            events.append(f"read {number}")
            yield data[0][:8], data[1][:8]

    model = kt.Model(network(), backend=backend).compile("sgd", "cross_entropy")
    model.fit(batches(), epochs=1, verbose=0)
    *steps, before_sums_are_read = events
    assert steps == ["cut", "read 0", "cut", "read 1", "cut", "read 2", "cut"]
    assert before_sums_are_read == "cut"


@alone
def test_data_with_a_state_of_its_own_has_a_program_for_each_step_too(backend, data):
    loader = DataLoader(TensorDataset(*data), batch_size=BATCH)
    loader.state_dict, loader.load_state_dict = dict, lambda state: None
    counting = Counting()
    kt.Model(network(), backend=backend).compile("sgd", "cross_entropy").fit(
        loader, epochs=3, callbacks=[counting], verbose=0
    )
    assert counting.epochs[-1][0]["executed"] == -(-ROWS // BATCH) - 1


# Objects and state.


@alone
def test_tied_parameters_stay_tied_and_an_optimizer_made_before_keeps_its_parameters(backend, data):
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 10))
    net[2].weight = net[0].weight
    on_cpu = copy.deepcopy(net)
    models = [
        kt.Model(one, backend=where).compile(torch.optim.SGD(one.parameters(), lr=0.1), "cross_entropy")
        for one, where in ((on_cpu, "cpu"), (net, backend))
    ]
    for model in models:
        model.fit(*data, batch_size=BATCH, verbose=0)
    assert net[2].weight is net[0].weight and net[0].weight.device == backend.device
    assert torch.__future__.get_swap_module_params_on_conversion() is False
    assert distance(on_cpu, net.cpu()) <= 1e-5


@alone
def test_lazy_layers_get_their_shapes_from_the_first_batch(backend, data):
    net = nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.Linear(16, 10))
    model = kt.Model(net, backend=backend)
    losses = model.compile("adam", "cross_entropy", lr=0.01).fit(*data, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0] and model.module[0].weight.shape == (16, 64)
    assert {tensor.device for tensor in net.state_dict().values()} == {backend.device}


def dropping() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 10))


class SaveAndStop(kt.Callback):
    """Saves within the second epoch, and ends the run."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, batch, logs=None):
        if self.model.epochs_trained == 1 and batch == 2:
            self.model.at_safe_point(lambda: self.model.save(self.path))
            self.model.stop_training = True


def test_a_run_that_goes_on_draws_what_it_would_have_drawn(backend, data, tmp_path):
    def compiled():
        return kt.Model(dropping(), backend=backend).compile("adamw", "cross_entropy", lr=0.01)

    options = {"epochs": 3, "batch_size": BATCH, "verbose": 0}
    kt.set_seed(3)
    whole = compiled()
    history = whole.fit(*data, **options).history["loss"]
    kt.set_seed(3)
    compiled().fit(*data, callbacks=[SaveAndStop(tmp_path / "run.pt")], **options)
    kt.set_seed(4)
    other = compiled()
    assert other.fit(*data, **options).history["loss"] != pytest.approx(history, abs=1e-3)
    gone_on = compiled()
    assert gone_on.fit(*data, resume=tmp_path / "run.pt", **options).history["loss"] == pytest.approx(history, abs=1e-6)
    assert distance(whole.module.cpu(), gone_on.module.cpu()) <= 1e-6


@alone
def test_what_is_saved_on_xla_goes_on_on_the_cpu(backend, data, tmp_path):
    model = kt.Model(network(), backend=backend).compile("adamw", "cross_entropy")
    model.fit(*data, epochs=2, batch_size=BATCH, verbose=0)
    model.save(tmp_path / "run.pt")
    model.save_weights(tmp_path / "weights.safetensors")
    on_cpu = kt.Model(network(), backend="cpu").compile("adamw", "cross_entropy").load(tmp_path / "run.pt")
    again = kt.Model(network(), backend=backend).compile("adamw", "cross_entropy").load(tmp_path / "run.pt")
    weights = kt.Model(network(), backend=backend).load_weights(tmp_path / "weights.safetensors")
    assert all(map(torch.equal, *(map(torch.tensor, one.get_weights()) for one in (model, weights))))
    for one in (on_cpu, again):
        one.fit(*data, epochs=4, initial_epoch=2, batch_size=BATCH, verbose=0)
    assert distance(on_cpu.module, again.module.cpu()) <= 1e-5


# Several cores.


@several
def test_parameters_and_the_optimizers_state_are_sharded_along_the_largest_dim_that_is_divided(xla, data):
    model = kt.Model(network(), backend=TPU(4, shard="parameters")).compile("adamw", "cross_entropy")
    model.fit(*data, batch_size=BATCH, verbose=0)
    spec = xla._XLAC._get_xla_sharding_spec
    specs = [spec(parameter) for parameter in model.module.parameters()]
    assert specs == ["{devices=[1,4]0,1,2,3}", "{devices=[4]0,1,2,3}", "{devices=[1,4]0,1,2,3}", "{replicated}"]
    for parameter in model.module.parameters():
        assert spec(model.optimizer.state[parameter]["exp_avg"]) == spec(parameter)


@several
def test_a_batch_is_laid_over_all_cores(backend, xla):
    x, _ = backend.move((torch.rand(7, 3), torch.tensor(1)))
    assert xla._XLAC._get_xla_sharding_spec(x) == "{devices=[4,1]0,1,2,3}"


@several
def test_lazy_layers_have_no_shapes_to_shard(xla):
    with pytest.raises(ValueError, match="lazy layers. Call it with one batch"):
        kt.Model(nn.Sequential(nn.LazyLinear(4)), backend=TPU(shard="parameters"))


@alone
@pytest.mark.timeout(600)
def test_on_four_cores(xla):
    """This file again, but for what is the same with one core, in a process with four devices."""
    environment = os.environ | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-p", "no:cacheprovider"]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=580)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-1000:]
    assert " passed" in ended.stdout


def test_finders_leave_no_trace(xla):
    x, y = torch.rand(64, 5), torch.randint(0, 3, (64,))

    def trained(finds: bool) -> tuple[list[float], dict]:
        kt.set_seed(0)
        module = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 3))
        model = kt.Model(module, backend="tpu").compile("adam", "cross_entropy")
        model.fit(x, y, batch_size=16, verbose=0)
        if finds:
            assert model.find_batch_size(x, y, apply=False) == 64
            assert len(model.find_lr(x, y, apply=False, steps=20, confirm=2, stop_factor=None).lrs) == 20
        losses = model.fit(x, y, batch_size=16, epochs=3, verbose=0).history["loss"]
        return losses, {name: one.cpu() for name, one in model.module.state_dict().items()}

    (losses, weights), (expected, expected_weights) = trained(finds=True), trained(finds=False)
    assert losses == expected
    assert all(torch.equal(weights[name], one) for name, one in expected_weights.items())


# Pods.

FIRST_HOST = """
import os, sys, torch, torch.distributed as dist
from pathlib import Path
from torch import nn
from kerastorch.backends.tpu import be_as_on_first_host

rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
torch.manual_seed(rank)
net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
be_as_on_first_host(net)
sums = [round(float(one.double().sum()), 6) for one in net.state_dict().values()]
Path(sys.argv[1], str(rank)).write_text(f"{torch.initial_seed()} {sums}")
dist.destroy_process_group()
"""


@alone
def test_hosts_begin_with_the_weights_and_the_seed_of_the_first(tmp_path):
    program = tmp_path / "host.py"
    program.write_text(FIRST_HOST)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = os.environ | {"PYTHONPATH": str(Path(kt.__file__).parents[1])}
    subprocess.run([*command, str(tmp_path)], env=environment, check=True, timeout=180)
    first, second = (tmp_path.joinpath(rank).read_text() for rank in "01")  # files: lines of two ranks may be mixed
    assert first == second and first.startswith("0 [")


@alone
def test_on_a_pod_each_host_has_its_rank(xla):
    if tpu._hosts() == 1:
        pytest.skip("needs a TPU pod: several processes cannot meet on torch_xla's CPU client")
    assert TPU().rank == tpu._host()
    assert torch.distributed.get_world_size() == tpu._hosts()
