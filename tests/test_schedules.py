"""Schedules: each by name against torch's own scheduler or its formula, over whole runs, resumed and restored."""

from __future__ import annotations

import copy
import io
import math
import pickle
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, lr_scheduler
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

from kerastorch import schedules
from kerastorch.schedules import Running, constant, cosine, exp_range, get, linear, one_cycle, plateau, triangular

STEPS = 40
NAMES = ["one_cycle", "cosine", "linear", "constant", "triangular", "triangular2", "exp_range"]
exactly = partial(pytest.approx, rel=1e-12, abs=0)
of_names = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def sgd(*rates: float, kind=SGD, **options) -> torch.optim.Optimizer:
    """An optimizer with a parameter group for each rate."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates or (0.1,)]
    return kind(groups, **options)


def named(part) -> str | None:
    return part if isinstance(part, str) else getattr(part, "name", None)


def settings(optimizer: torch.optim.Optimizer) -> list:
    return [(float(group["lr"]), group.get("momentum"), group.get("betas")) for group in optimizer.param_groups]


def rates(running: Running, steps: int) -> list[float]:
    """The rates of the first group at which `steps` steps are taken."""
    used = []
    for _ in range(steps):
        used.append(float(running.optimizer.param_groups[0]["lr"]))
        running.optimizer.step()
        running.after_step()
    return used


def run(schedule, steps: int = STEPS, optimizer=None, done: int = 0) -> list[float]:
    running = Running(get(schedule), optimizer or sgd())
    running.begin(steps, done)
    return rates(running, steps - done)


def torchs(make, steps: int = STEPS, optimizer=None) -> list[float]:
    """The rates of one of torch's schedulers in a loop by hand."""
    optimizer = optimizer or sgd()
    scheduler, used = make(optimizer), []
    for step in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps - 1:
            scheduler.step()
    return used


def cyclic(**options):
    return lambda optimizer: lr_scheduler.CyclicLR(
        optimizer, base_lr=0.025, max_lr=0.1, cycle_momentum=False, **{"step_size_up": STEPS / 6} | options
    )


# Names against torch.


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("one_cycle", lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS)),
        ("cosine", lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)),
        ("linear", lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)),
        ("constant", lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        ("triangular", cyclic(mode="triangular")),
        ("triangular2", cyclic(mode="triangular2")),
        ("exp_range", cyclic(mode="exp_range", gamma=0.1 ** (1 / STEPS))),
        (one_cycle(pct_start=0.5, div_factor=5.0, three_phase=False),
         lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, STEPS, pct_start=0.5, div_factor=5.0)),
        (cosine(final=0.25), lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=0.025)),
        (triangular(step_size=7), cyclic(step_size_up=7)),
        (exp_range(gamma=0.9, step_size=5), cyclic(step_size_up=5, mode="exp_range", gamma=0.9)),
    ],
    ids=named,
)  # fmt: skip
def test_rates_are_those_of_torchs_scheduler(name, make) -> None:
    assert run(name) == exactly(torchs(make))


@pytest.mark.parametrize("steps", [1, 2, 3, 1000])
def test_cosine_and_line_are_their_formulas_whatever_the_length(steps) -> None:
    cosines = [0.1 * (0.2 + 0.8 * (1 + math.cos(math.pi * i / steps)) / 2) for i in range(steps)]
    assert run(cosine(final=0.2), steps) == exactly(cosines)
    assert run(linear(final=0.2), steps) == exactly([0.1 * (0.2 + 0.8 * (1 - i / steps)) for i in range(steps)])


@pytest.mark.parametrize(("warmup", "steps"), [(4, 4), (0.1, 4), (0.09, 4), (np.int64(4), 4), (0, 0), (0.0, 0)])
def test_warmup_rises_in_equal_parts_and_the_decay_takes_the_rest(warmup, steps) -> None:
    up = [0.1 * (i + 1) / (steps + 1) for i in range(steps)]
    assert run(constant(warmup=warmup)) == exactly(up + [0.1] * (STEPS - steps))
    rest = STEPS - steps
    assert run(linear(warmup=warmup)) == exactly(up + [0.1 * (1 - i / rest) for i in range(rest)])
    after = [0.05 * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]
    assert run(cosine(warmup=warmup)) == exactly(up + after)


def test_run_shorter_than_its_warmup_ends_in_it() -> None:
    assert run(cosine(warmup=9), 3) == exactly([0.01, 0.02, 0.03])
    assert run(linear(warmup=3), 3) == exactly([0.025, 0.05, 0.075])


def test_cycles_peak_at_the_rate_as_often_as_said() -> None:
    for name in ("triangular", "triangular2", "exp_range"):
        used = run(getattr(schedules, name)(cycles=2, base=0.5))
        peaks = [i for i in range(1, STEPS - 1) if used[i - 1] < used[i] > used[i + 1]]
        assert len(peaks) == 2 and min(used) == exactly(0.05) and max(used) <= 0.1
    assert run(triangular(cycles=2))[10] == run(triangular(cycles=2))[30] == exactly(0.1)
    assert run(triangular(), 3) == exactly([0.025, 0.1, 0.025])  # too few steps for three cycles


def test_exp_range_leaves_a_tenth_of_the_height_by_default() -> None:
    used = run(exp_range(cycles=20, base=0.0), 4001)
    assert used[3900] == pytest.approx(0.1 * 0.1 ** (3900 / 4001), rel=0.05)


@of_names
def test_groups_keep_their_ratios(name) -> None:
    optimizer = sgd(0.1, 0.02, 3.0)
    running = Running(get(name), optimizer)
    running.begin(STEPS)
    for expected in run(name):
        now = [group["lr"] for group in optimizer.param_groups]
        assert now == exactly([expected, 0.2 * expected, 30 * expected])
        rates(running, 1)


@of_names
def test_rate_may_be_a_tensor(name) -> None:
    optimizer = sgd(kind=Adam)
    optimizer.param_groups[0]["lr"] = rate = torch.tensor(0.1, dtype=torch.float64)
    assert run(name, optimizer=optimizer) == pytest.approx(run(name), rel=1e-6)
    assert optimizer.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("kind", [SGD, Adam, Adagrad])
def test_one_cycle_cycles_the_momentum_where_there_is_one(kind) -> None:
    optimizer, other = sgd(kind=kind), sgd(kind=kind)
    running = Running(get("one_cycle"), optimizer)
    running.begin(STEPS)
    scheduler = lr_scheduler.OneCycleLR(other, 0.1, STEPS, cycle_momentum=kind is not Adagrad)
    for _ in range(STEPS - 1):
        rates(running, 1)
        other.step()
        scheduler.step()
        assert settings(optimizer) == settings(other)
    assert kind is Adagrad or settings(optimizer) != settings(sgd(kind=kind))


# Runs.


@pytest.mark.parametrize("schedule", [*NAMES, triangular(step_size=6), constant(warmup=4), cosine(steps=25)], ids=named)
def test_rate_stays_after_the_end(schedule) -> None:
    running = Running(get(schedule), sgd())
    running.begin(STEPS)
    *_, last = rates(running, STEPS)
    assert rates(running, 5) == [last] * 5


@of_names
@pytest.mark.parametrize("kind", [partial(SGD, momentum=0.5), Adam], ids=["sgd", "adam"])
def test_second_run_starts_anew_with_its_own_length(name, kind) -> None:
    running = Running(get(name), sgd(kind=kind))
    running.begin(STEPS)
    rates(running, 13)
    for steps in (STEPS, 15):
        fresh = Running(get(name), sgd(kind=kind))
        fresh.begin(steps)
        running.begin(steps)
        assert settings(running.optimizer) == settings(fresh.optimizer)
        assert rates(running, steps) == run(name, steps)
        assert settings(running.optimizer) == settings(rates(fresh, steps) and fresh.optimizer)


def test_momentum_is_the_optimizers_own_again_in_the_next_run() -> None:
    running = Running(one_cycle(cycle_momentum=False), sgd(momentum=0.5))
    running.begin(STEPS)
    running.optimizer.param_groups[0]["momentum"] = 0.7
    running.begin(STEPS)
    assert running.optimizer.param_groups[0]["momentum"] == 0.5


@of_names
@pytest.mark.parametrize("done", [1, 17, STEPS - 1])
def test_resumed_run_has_the_rates_of_the_tail(name, done) -> None:
    optimizer, whole = sgd(kind=Adam), sgd(kind=Adam)
    assert run(name, optimizer=optimizer, done=done) == run(name, optimizer=whole)[done:]
    assert settings(optimizer) == settings(whole)
    assert run(name, done=STEPS + 5, optimizer=optimizer) == []


def test_length_of_its_own_goes_before_the_runs() -> None:
    running = Running(cosine(steps=10), sgd())
    running.begin(None)
    assert rates(running, 10) == run("cosine", 10)
    running.begin(STEPS, done=4)
    assert rates(running, 6) == run("cosine", 10)[4:]
    running = Running(triangular(step_size=6), sgd())
    running.begin(None, done=3)
    assert rates(running, 90)[:30] == run(triangular(step_size=6))[3:33]
    running = Running(constant(warmup=3), sgd())
    running.begin(None)
    assert rates(running, 9) == run(constant(warmup=3), 9)


@of_names
def test_run_without_steps_is_no_error(name) -> None:
    assert run(name, 0) == []


def test_group_added_between_runs_takes_part_in_the_next() -> None:
    running = Running(get("linear"), sgd())
    running.begin(4)
    rates(running, 4)
    running.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.4})
    running.begin(4)
    rates(running, 2)
    assert [group["lr"] for group in running.optimizer.param_groups] == exactly([0.05, 0.2])


@pytest.mark.parametrize("name", ["cosine", "one_cycle"])
def test_first_step_that_a_gradient_scaler_leaves_out_does_not_warn(name) -> None:
    running = Running(get(name), sgd())
    running.begin(STEPS)
    running.after_step()


def test_rescaled_rates_are_the_new_base() -> None:
    running = Running(get("linear"), sgd())
    running.rescale([0.5])
    assert settings(running.optimizer)[0][0] == 0.5
    running.begin(10)
    assert rates(running, 4) == exactly([0.5, 0.45, 0.4, 0.35])
    running.rescale([1.0])
    assert rates(running, 6) == exactly([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    running.rescale([0.2])
    assert rates(running, 2) == [0.2, 0.2]
    with pytest.raises(ValueError, match="2 rates for 1 parameter groups. Give one per group"):
        running.rescale([1.0, 2.0])
    own = Running(get(("step", partial(ExponentialLR, gamma=0.5))), sgd())
    rates(own, 3)
    own.rescale([0.8])
    assert rates(own, 3) == exactly([0.8, 0.4, 0.2])


# States.


def saved_and_loaded(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


OWN = [
    ("step", partial(ExponentialLR, gamma=0.9)),
    ("step", partial(lr_scheduler.MultiStepLR, milestones=[3, 20])),
    ("step", lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.2, 7)),
    ("step", lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [ExponentialLR(optimizer, 0.9), StepLR(optimizer, 4)], [15])),
    ("step", lambda optimizer: lr_scheduler.ChainedScheduler([ExponentialLR(optimizer, 0.9), StepLR(optimizer, 4)])),
]  # fmt: skip


@pytest.mark.parametrize("schedule", [*NAMES, triangular(step_size=6), *OWN], ids=named)
@pytest.mark.parametrize("at", [0, 13, STEPS])
def test_restored_state_goes_on_at_the_same_rates(schedule, at) -> None:
    running = Running(get(schedule), sgd(0.1, 0.3, momentum=0.5))
    running.begin(STEPS)
    rates(running, at)
    state = saved_and_loaded(running.state_dict())
    untouched = copy.deepcopy(state)
    expected = rates(running, STEPS - at) + settings(running.optimizer)
    restored = Running(get(schedule), sgd(0.7, 0.7, momentum=0.1))  # all of it is in the state
    restored.load_state_dict(state)
    assert rates(restored, STEPS - at) + settings(restored.optimizer) == expected
    assert state == untouched
    running.begin(STEPS)
    restored.begin(STEPS)
    assert rates(restored, 5) == rates(running, 5)


def test_state_before_any_run_is_restored_too() -> None:
    running = Running(get("cosine"), sgd())
    running.begin(5)
    running.load_state_dict(saved_and_loaded(Running(get("cosine"), sgd(0.6)).state_dict()))
    assert rates(running, 3) == [0.6] * 3


def test_state_of_another_schedule_is_refused() -> None:
    state = Running(get("cosine"), sgd()).state_dict()
    with pytest.raises(ValueError, match="of schedule='cosine' over 1 parameter groups; expected 'linear' over 1"):
        Running(get("linear"), sgd()).load_state_dict(state)
    with pytest.raises(ValueError, match="expected 'cosine' over 2. Compile as it was"):
        Running(get("cosine"), sgd(1.0, 2.0)).load_state_dict(state)


@pytest.mark.parametrize("schedule", NAMES)
def test_schedule_is_plain_and_can_be_pickled(schedule) -> None:
    assert run(pickle.loads(pickle.dumps(get(schedule)))) == run(schedule)


# Per epoch.


def epochs(running: Running, logs: list[dict]) -> list[float]:
    used = []
    for each in logs:
        running.optimizer.step()
        running.after_step()
        running.after_epoch(each)
        used.append(running.optimizer.param_groups[0]["lr"])
    return used


@pytest.mark.parametrize(
    "schedule",
    [plateau(patience=0), partial(ReduceLROnPlateau, patience=0), lambda opt: ReduceLROnPlateau(opt, patience=0)],
    ids=["name", "partial", "callable"],
)
def test_plateau_cuts_the_rate_where_the_loss_stops_falling(schedule) -> None:
    assert get(ReduceLROnPlateau).every == "epoch"
    running = Running(get(schedule), sgd())
    assert epochs(running, [{"loss": loss} for loss in (3, 2, 2, 1)]) == exactly([0.1, 0.1, 0.01, 0.01])
    running.begin(STEPS)  # goes on where it is
    state = saved_and_loaded(running.state_dict())
    restored = Running(get(schedule), sgd(0.7))
    restored.load_state_dict(state)
    for each in (running, restored):
        assert epochs(each, [{"loss": 1.5}, {"loss": 0.5}]) == exactly([0.001, 0.001])


def test_plateau_looks_at_the_validation_where_there_is_one() -> None:
    logs = [{"loss": 9.0, "val_loss": loss} for loss in (3, 2, 2)]
    assert epochs(Running(plateau(patience=0), sgd()), logs) == exactly([0.1, 0.1, 0.01])
    # Validated every other epoch: the first loss is of the training and does not compare.
    logs = [{"loss": 0.1}, {"loss": 0.1, "val_loss": 5}, {"loss": 0.1}, {"loss": 0.1, "val_loss": 5}]
    assert epochs(Running(plateau(patience=0), sgd()), logs) == exactly([0.1, 0.1, 0.1, 0.01])
    assert epochs(Running(plateau(patience=0, monitor="val_loss"), sgd()), logs) == exactly([0.1, 0.1, 0.1, 0.01])


def test_plateau_of_an_accuracy_waits_for_it_to_rise() -> None:
    logs = [{"loss": 1.0, "accuracy": torch.tensor(value)} for value in (0.1, 0.2, 0.2, 0.3)]
    for schedule in (plateau(monitor="accuracy", patience=0), plateau(monitor="accuracy", patience=0, mode="max")):
        assert epochs(Running(schedule, sgd()), logs) == exactly([0.1, 0.1, 0.01, 0.01])


def test_plateau_without_its_monitor_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"monitors 'auc', but this epoch has loss, mae. Give kt.schedules.plateau\("):
        Running(plateau(monitor="auc"), sgd()).after_epoch({"loss": 1.0, "mae": 2.0})
    with pytest.raises(ValueError, match="monitors 'val_auc', but this epoch has loss, val_loss"):
        Running(plateau(monitor="val_auc"), sgd()).after_epoch({"loss": 1.0, "val_loss": 2.0})


def test_own_scheduler_is_moved_when_it_is_told_to() -> None:
    half = partial(ExponentialLR, gamma=0.5)
    for schedule in (half, ("epoch", half), lambda optimizer: ExponentialLR(optimizer, 0.5)):
        running = Running(get(schedule), sgd())
        running.begin(None)
        assert rates(running, 3) == [0.1] * 3
        assert epochs(running, [{}, {}]) == exactly([0.05, 0.025])
        running.begin(None)
        assert epochs(running, [{}]) == exactly([0.0125])
    running = Running(get(("step", half)), sgd())
    assert rates(running, 3) == exactly([0.1, 0.05, 0.025])
    assert epochs(running, [{}]) == exactly([0.00625])


def test_own_scheduler_starts_from_the_rates_that_the_optimizer_has_now() -> None:
    optimizer = sgd()
    run("cosine", optimizer=optimizer)
    optimizer.param_groups[0]["lr"] = 0.8
    running = Running(get(("step", partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.5**step))), optimizer)
    assert rates(running, 3) == exactly([0.8, 0.4, 0.2])


# Forms and errors.


def test_every_name_is_known_in_any_case() -> None:
    names = [*NAMES, "OneCycle", "onecycle", "COSINE", "plateau", "reduce_lr_on_plateau", "ReduceLROnPlateau"]
    assert [get(name).name for name in names] == [*NAMES, "one_cycle", "one_cycle", "cosine", *["plateau"] * 3]
    given = cosine(final=0.1)
    assert get(given) is given and get(("step", given)) is given and get(None) is None
    assert get(cosine).name == get(("step", "Cosine")).name == "cosine" and get(("epoch", "plateau")).every == "epoch"


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        ("cosin", ValueError, "schedule='cosin' is not known. Did you mean 'cosine'"),
        ("zzzz", ValueError, "Known are constant, cosine, exp_range, linear, one_cycle, plateau, tri"),
        (3, TypeError, "schedule=3 is a int; expected a name, what a function of kt.schedules returns, or a callable"),
        (("batch", "cosine"), TypeError, "is a tuple; expected a name"),
        (("step", None), TypeError, "schedule=None is a NoneType; expected"),
        (("step", "plateau"), ValueError, "schedule='plateau' is moved every epoch, not every step. Give it without"),
        (("step", plateau()), ValueError, "'plateau' is moved every epoch"),
        (("epoch", "cosine"), ValueError, r'is moved every step, not every epoch. Give it without \("epoch", ...\)'),
        (StepLR, TypeError, r"StepLR cannot be made of the optimizer alone: .* Give functools.partial\(StepLR, step_s"),
        (partial(StepLR, gamma=0.5), TypeError, r"lambda optimizer: StepLR\(optimizer, step_size=...\)"),
        (("step", lr_scheduler.CyclicLR), TypeError, r"partial\(CyclicLR, base_lr=..., max_lr=...\)"),
        (lambda: None, TypeError, "cannot be made of the optimizer alone: too many positional arguments"),
        (StepLR(sgd(), 1), TypeError, "is a StepLR; expected a name"),
    ],
    ids=named,
)
def test_what_is_no_schedule_is_refused(schedule, error, message) -> None:
    with pytest.raises(error, match=message):
        get(schedule)


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (lambda optimizer: None, TypeError, "schedule='<lambda>' returned a NoneType, expected a scheduler of torch"),
        (dict, TypeError, "not iterable"),
        (lambda optimizer: StepLR(sgd(), 3), ValueError, "returned a StepLR of another optimizer. Make it of the"),
        (("step", ReduceLROnPlateau), ValueError, "schedule='ReduceLROnPlateau' is moved every epoch, not every step"),
        (("step", lambda optimizer: ReduceLROnPlateau(optimizer)), ValueError, "is moved every epoch"),
        (partial(ReduceLROnPlateau, mode="up"), ValueError, "mode up is unknown"),
    ],
)
def test_callable_that_makes_no_fitting_scheduler_is_refused_at_once(schedule, error, message) -> None:
    with pytest.raises(error, match=message):
        running = Running(get(schedule), sgd())
        epochs(running, [{}])


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "linear", "triangular", "exp_range", constant(warmup=0.1)])
def test_unknown_length_is_refused_where_it_is_needed(schedule) -> None:
    running = Running(get(schedule), sgd())
    name = running.schedule.name
    with pytest.raises(
        ValueError, match=rf"schedule='{name}' goes over .* no known length.*kt.schedules.{name}\(steps"
    ):
        running.begin(None)


def test_rise_of_a_single_step_is_refused() -> None:
    with pytest.raises(
        ValueError, match="pct_start=0.1 of 10 steps is a rise of one step, by which torch's OneCycleLR"
    ):
        run(one_cycle(pct_start=0.1), 10)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        *[(make, {"warmup": value}, "is neither steps nor a part of the run. Give a whole number")
          for make in (cosine, linear, constant) for value in (-1, 1.0, -0.1, 2.5, True, "a", math.nan, None)],
        *[(make, {"final": value}, "final=.* is not a part of lr. Give a number from 0 to 1")
          for make in (cosine, linear) for value in (-0.1, 1.1, False, "a", math.nan, None)],
        *[(make, {name: value}, f"{name}=.* is not a count. Give a whole number from 1 up")
          for make, name in [(one_cycle, "steps"), (cosine, "steps"), (linear, "steps"), (constant, "steps"),
                             (triangular, "steps"), (triangular, "cycles"), (exp_range, "step_size")]
          for value in (0, -1, 1.5, True, "a")],
        *[(triangular, {"base": value}, "base=.* is not a part of lr") for value in (-1, 2, True)],
        (triangular, {"cycles": None}, "cycles=None is not a count"),
        *[(exp_range, {"gamma": value}, "gamma=.* is not a decay per step") for value in (0, -1, 1.01, True, "a")],
        (one_cycle, {"max_lr": 1.0}, "one_cycle takes no max_lr: its peak is the optimizer's lr"),
        (one_cycle, {"pct_start": 2.0}, "pct_start"),
        (plateau, {"monitor": 3}, "monitor=3 is not a name. Give one that the logs have"),
        (plateau, {"factor": 1.5}, "Factor should be"),
    ],
)  # fmt: skip
def test_bad_value_is_refused_at_once(make, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("make", [one_cycle, plateau])
def test_option_that_torch_does_not_know_is_refused_at_once(make) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'speed'"):
        make(speed=3)


def test_step_adds_one_call_to_torchs_own() -> None:
    running = Running(get("cosine"), sgd())
    running.begin(STEPS)
    calls = []
    sys.setprofile(lambda frame, event, _: event == "call" and calls.append(frame.f_code.co_filename))
    running.after_step()
    sys.setprofile(None)
    own = [file for file in calls if file == schedules.__file__]
    assert len(own) == 3  # after_step, and the two functions of the formula
