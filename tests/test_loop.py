"""The order of everything: hooks as data for every way a run can end, validation, steps, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks.base import HOOKS


def recorder(**actions):
    """A callback that writes down every call, and does `actions[name](self, *arguments)` after it."""
    calls = []

    def hook(name):
        def record(self, *arguments):
            calls.append((name, *(argument for argument in arguments if isinstance(argument, int))))
            if name in actions:
                actions[name](self, *arguments)

        return record

    hooks = {name: hook(name) for name in HOOKS if name not in ("on_batch_begin", "on_batch_end")}
    return type("Recorder", (kt.Callback,), hooks)(), calls


STEP = ["on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad"]


def batch(index):
    return [("on_train_batch_begin", index), *((name,) for name in STEP), ("on_train_batch_end", index)]


def validation(steps):
    batches = [(f"on_test_batch_{end}", index) for index in range(steps) for end in ("begin", "end")]
    return [("on_validation_begin",), ("on_test_begin",), *batches, ("on_test_end",), ("on_validation_end",)]


def run(callback, *, epochs=2, data=None, **options):
    x, y = torch.rand(6, 3), torch.rand(6, 1)
    model = kt.Model(nn.Linear(3, 1)).compile("sgd", "mse")
    return model, model.fit(*(data or (x, y)), epochs=epochs, batch_size=4, callbacks=[callback], verbose=0, **options)


def test_hooks_of_a_whole_run_come_in_order():
    callback, calls = recorder()
    run(callback, validation_data=(torch.rand(5, 3), torch.rand(5, 1)))
    epoch = lambda n: [("on_epoch_begin", n), *batch(0), *batch(1), *validation(2), ("on_epoch_end", n)]  # noqa: E731
    assert calls == [("on_train_begin",), *epoch(0), *epoch(1), ("on_train_end",)]


def test_a_stop_within_a_batch_ends_the_epoch_after_it_and_still_validates():
    callback, calls = recorder(on_train_batch_end=lambda self, *_: setattr(self.model, "stop_training", True))
    _, history = run(callback, validation_data=(torch.rand(4, 3), torch.rand(4, 1)))
    epoch = [("on_epoch_begin", 0), *batch(0), ("on_train_pause",), *validation(1), ("on_epoch_end", 0)]
    assert calls == [("on_train_begin",), *epoch, ("on_train_end",)]
    assert history.epoch == [0] and "val_loss" in history.history


def test_a_stop_at_the_end_of_an_epoch_ends_the_run():
    callback, calls = recorder(on_epoch_end=lambda self, *_: setattr(self.model, "stop_training", True))
    run(callback, epochs=9)
    assert calls == [
        ("on_train_begin",),
        ("on_epoch_begin", 0),
        *batch(0),
        *batch(1),
        ("on_epoch_end", 0),
        ("on_train_pause",),
        ("on_train_end",),
    ]


def test_hooks_of_a_run_that_ends_by_max_steps_come_in_order():
    callback, calls = recorder()
    _, history = run(callback, epochs=9, max_steps=3, validation_data=(torch.rand(4, 3), torch.rand(4, 1)))
    first = [("on_epoch_begin", 0), *batch(0), *batch(1), *validation(1), ("on_epoch_end", 0)]
    second = [("on_epoch_begin", 1), *batch(0), ("on_train_pause",), *validation(1), ("on_epoch_end", 1)]
    assert calls == [("on_train_begin",), *first, *second, ("on_train_end",)]
    assert history.stopped_by == "max_steps"


def test_hooks_of_a_run_that_ends_by_max_time_come_in_order():
    callback, calls = recorder(on_after_backward=lambda self: time.sleep(0.03))
    _, history = run(callback, epochs=9, max_time=0.02, validation_data=(torch.rand(4, 3), torch.rand(4, 1)))
    epoch = [("on_epoch_begin", 0), *batch(0), ("on_train_pause",), *validation(1), ("on_epoch_end", 0)]
    assert calls == [("on_train_begin",), *epoch, ("on_train_end",)]
    assert history.stopped_by == "max_time"


def test_hooks_of_a_validation_within_an_epoch_come_between_the_batches():
    callback, calls = recorder()
    run(callback, epochs=1, validation_data=(torch.rand(4, 3), torch.rand(4, 1)), validation_freq="1 steps")
    interval = [*validation(1), ("on_interval_end", 0)]
    epoch = [("on_epoch_begin", 0), *batch(0), *interval, *batch(1), *interval, ("on_epoch_end", 0)]
    assert calls == [("on_train_begin",), *epoch, ("on_train_end",)]


def test_hooks_of_an_epoch_ended_before_a_batch_come_in_order():
    callback, calls = recorder()
    skip = kt.Callback()
    skip.on_train_batch_begin = lambda index, logs=None: -1
    x, y = torch.rand(6, 3), torch.rand(6, 1)
    model = kt.Model(nn.Linear(3, 1)).compile("sgd", "mse")
    model.fit(x, y, epochs=2, validation_data=(x, y), callbacks=[callback, skip], verbose=0)
    epoch = lambda n: [  # noqa: E731
        ("on_epoch_begin", n), ("on_train_batch_begin", 0), *validation(1), ("on_epoch_end", n)
    ]  # fmt: skip
    assert calls == [("on_train_begin",), *epoch(0), *epoch(1), ("on_train_end",)]


def test_hooks_of_a_run_ended_by_ctrl_c_come_in_order():
    def interrupt(self, index, logs):
        if index == 1:
            os.kill(os.getpid(), signal.SIGINT)

    callback, calls = recorder(on_train_batch_begin=interrupt)
    _, history = run(callback, validation_data=(torch.rand(4, 3), torch.rand(4, 1)))
    epoch = [("on_epoch_begin", 0), *batch(0), *batch(1), ("on_train_pause",), ("on_epoch_end", 0)]
    assert calls == [("on_train_begin",), *epoch, ("on_train_end",)]
    assert history.stopped_by == "interrupt"


def test_ctrl_c_within_an_epoch_ends_its_validation_of_which_nobody_hears():
    callback, calls = recorder(on_test_batch_end=lambda self, *_: os.kill(os.getpid(), signal.SIGINT))
    _, history = run(callback, validation_data=(torch.rand(9, 3), torch.rand(9, 1)), validation_freq="1 steps")
    ends = [("on_validation_end",), ("on_train_pause",), ("on_epoch_end", 0), ("on_train_end",)]
    assert calls[-5:] == [("on_test_end",), *ends]
    assert list(history.history) == ["loss"] and history.intervals == []


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ArithmeticError("mine"), "mine (raised in Failing.on_epoch_end)"),
        (RuntimeError(), "(raised in Failing.on_epoch_end)"),
        (KeyError("acc"), "'acc (raised in Failing.on_epoch_end)'"),
    ],
    ids=repr,
)
def test_an_error_of_a_callback_says_whose_it_is_and_all_others_hear_of_it(error, text):
    class Failing(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise error

    (first, before), (last, after) = recorder(), recorder()
    model = kt.Model(nn.Linear(3, 1)).compile("sgd", "mse")
    with pytest.raises(type(error)) as caught:
        model.fit(torch.rand(4, 3), torch.rand(4, 1), callbacks=[first, Failing(), last], verbose=0)
    assert str(caught.value) == text and caught.value is error
    assert before[-2:] == [("on_epoch_end", 0), ("on_exception",)]
    assert after[-1] == ("on_exception",) and ("on_epoch_end", 0) not in after


def test_of_two_callbacks_with_one_inherited_hook_the_right_one_is_named():
    class Base(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.act()

    class Failing(Base):
        def act(self):
            raise ArithmeticError("mine")

    class Fine(Base):
        def act(self):
            pass

    x, y = torch.rand(4, 3), torch.rand(4, 1)
    for callbacks in ([Failing(), Fine()], [Fine(), Failing()]):
        with pytest.raises(ArithmeticError, match=r"mine \(raised in Failing.on_epoch_end\)"):
            kt.Model(nn.Linear(3, 1)).compile("sgd", "mse").fit(x, y, callbacks=callbacks, verbose=0)


def test_of_functions_it_is_said_what_they_were_given_as():
    def fail(*arguments):
        raise ArithmeticError("mine")

    callback = kt.callbacks.LambdaCallback(on_train_begin=lambda logs: None, on_epoch_end=fail)
    with pytest.raises(ArithmeticError, match=r"mine \(raised in the function given as on_epoch_end\)"):
        run(callback)


def test_ctrl_c_before_the_first_epoch_opens_none():
    callback, calls = recorder(on_train_begin=lambda self, logs: os.kill(os.getpid(), signal.SIGINT))
    _, history = run(callback)
    assert calls == [("on_train_begin",), ("on_train_pause",), ("on_train_end",)]
    assert history.stopped_by == "interrupt"


def test_ctrl_c_keeps_a_validation_within_the_epoch_that_was_over():
    def interrupt(self, index, logs):
        if index == 1:
            os.kill(os.getpid(), signal.SIGINT)

    callback, _ = recorder(on_train_batch_begin=interrupt)
    _, history = run(callback, validation_data=(torch.rand(4, 3), torch.rand(4, 1)), validation_freq=0.5)
    assert len(history.intervals) == 1 and history.history["val_loss"] == [history.intervals[0]["val_loss"]]


def test_an_error_with_more_than_a_message_keeps_its_arguments():
    class Failing(kt.Callback):
        def on_train_begin(self, logs=None):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError) as caught:
        run(Failing())
    assert caught.value.args == (28, "No space left on device")
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == ["raised in Failing.on_train_begin"]


def test_an_error_of_the_module_names_no_callback():
    class Broken(nn.Linear):
        def forward(self, x):
            raise ArithmeticError("mine")

    callback, _ = recorder()
    with pytest.raises(ArithmeticError) as caught:
        model = kt.Model(Broken(3, 1)).compile("sgd", "mse")
        model.fit(torch.rand(4, 3), torch.rand(4, 1), callbacks=callback, verbose=0)
    assert str(caught.value) == "mine"


def test_a_callback_that_fails_when_told_of_an_error_keeps_it_from_nobody():
    class Twice(kt.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            raise ArithmeticError("first")

        def on_exception(self, error):
            raise ValueError("second")

    callback, calls = recorder()
    model = kt.Model(nn.Linear(3, 1)).compile("sgd", "mse")
    with (
        pytest.warns(UserWarning, match=r"Twice.on_exception failed too, with ValueError\('second'\)"),
        pytest.raises(ArithmeticError, match="first"),
    ):
        model.fit(torch.rand(4, 3), torch.rand(4, 1), callbacks=[Twice(), callback], verbose=0)
    assert calls[-1] == ("on_exception",)


def test_a_stop_asked_for_earlier_does_not_stop_the_next_run():
    callback, _ = recorder()
    model, _ = run(callback)
    model.stop_training = True
    assert len(model.fit(torch.rand(4, 3), torch.rand(4, 1), epochs=3, verbose=0).epoch) == 3


def test_an_error_is_announced_and_comes_through():
    def fail(self, *arguments):
        raise ArithmeticError("mine")

    callback, calls = recorder(on_after_backward=fail)
    with pytest.raises(ArithmeticError, match="mine"):
        run(callback)
    begun = [("on_train_begin",), ("on_epoch_begin", 0), ("on_train_batch_begin", 0), ("on_before_backward",)]
    assert calls == [*begun, ("on_after_backward",), ("on_exception",)]


def test_evaluate_and_predict_announce_errors_too():
    def fail(self, *arguments):
        raise ArithmeticError("mine")

    model = kt.Model(nn.Linear(3, 1)).compile("sgd", "mse")
    for verb, name in ((model.evaluate, "on_test_batch_end"), (model.predict, "on_predict_batch_end")):
        callback, calls = recorder(**{name: fail})
        with pytest.raises(ArithmeticError):
            verb((torch.rand(4, 3), torch.rand(4, 1)), callbacks=callback, verbose=0)
        assert calls[-1] == ("on_exception",)


def test_hooks_of_evaluate_and_predict_come_in_order():
    model = kt.Model(nn.Linear(3, 1)).compile("sgd", "mse")
    callback, calls = recorder()
    model.evaluate(torch.rand(6, 3), torch.rand(6, 1), batch_size=4, callbacks=[callback], verbose=0)
    assert calls == validation(2)[1:-1]
    callback, calls = recorder()
    model.predict(torch.rand(6, 3), batch_size=4, callbacks=[callback], verbose=0)
    batches = [(f"on_predict_batch_{end}", index) for index in range(2) for end in ("begin", "end")]
    assert calls == [("on_predict_begin",), *batches, ("on_predict_end",)]


def test_ctrl_c_finishes_the_step_keeps_the_history_and_calls_the_last_hooks():
    def interrupt(self, index, logs):
        if index == 2:
            os.kill(os.getpid(), signal.SIGINT)

    callback, calls = recorder(on_train_batch_begin=interrupt)

    def endless():
        while True:
            yield torch.rand(4, 3), torch.rand(4, 1)

    model = kt.Model(nn.Linear(3, 1)).compile("sgd", "mse")
    history = model.fit(endless(), callbacks=[callback], verbose=0)
    assert calls[-4:] == [("on_train_batch_end", 2), ("on_train_pause",), ("on_epoch_end", 0), ("on_train_end",)]
    assert history is model.history and len(history.history["loss"]) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_skips_the_validation_of_the_epoch_it_cut_short():
    callback, calls = recorder(on_train_batch_end=lambda self, *_: os.kill(os.getpid(), signal.SIGINT))
    _, history = run(callback, validation_data=(torch.rand(4, 3), torch.rand(4, 1)))
    assert ("on_test_begin",) not in calls and list(history.history) == ["loss"]


def test_ctrl_c_ends_a_validation_whose_part_is_not_kept():
    callback, calls = recorder(on_test_batch_end=lambda self, *_: os.kill(os.getpid(), signal.SIGINT))
    _, history = run(callback, validation_data=(torch.rand(9, 3), torch.rand(9, 1)))
    assert calls.count(("on_test_batch_begin", 0)) == 1 and ("on_test_batch_begin", 1) not in calls
    ends = [("on_validation_end",), ("on_train_pause",), ("on_epoch_end", 0), ("on_train_end",)]
    assert calls[-5:] == [("on_test_end",), *ends]
    assert list(history.history) == ["loss"] and history.epoch == [0]


def test_a_keyboard_interrupt_raised_by_the_data_ends_the_run_with_its_history():
    def data():
        yield torch.rand(4, 3), torch.rand(4, 1)
        raise KeyboardInterrupt

    history = kt.Model(nn.Linear(3, 1)).compile("sgd", "mse").fit(data(), epochs=5, verbose=0)
    assert history.epoch == [0]


def test_an_interrupt_before_the_first_batch_ends_the_run_in_order():
    def data():
        raise KeyboardInterrupt
        yield

    callback, calls = recorder()
    model = kt.Model(nn.Linear(3, 1)).compile("sgd", "mse")
    assert model.fit(data(), callbacks=callback, verbose=0).epoch == []
    assert calls == [("on_train_begin",), ("on_epoch_begin", 0), ("on_train_end",)]


def test_a_second_ctrl_c_stops_at_once():
    program = """
import time, torch, kerastorch as kt
from torch import nn
def slow():
    yield torch.rand(4, 3), torch.rand(4, 1)
    print("waiting", flush=True)
    time.sleep(60)
kt.Model(nn.Linear(3, 1)).compile("sgd", "mse").fit(slow(), verbose=2)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"waiting\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None, "the first one waits for the running step"
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=20)[1]
        assert b"\nThe run ends after this step; Ctrl-C again ends it at once.\n" in told
        assert b"KeyboardInterrupt" in told


def test_training_works_in_another_thread_where_signals_cannot_be_handled():
    result = []
    thread = threading.Thread(target=lambda: result.append(run(recorder()[0])[1]))
    thread.start()
    thread.join(60)
    assert len(result[0].epoch) == 2


def test_an_iterator_goes_on_where_the_last_epoch_stopped():
    seen = []

    def numbers():
        for number in range(100):
            yield torch.full((2, 3), float(number)), torch.zeros(2, 1)

    class Watch(nn.Linear):
        def forward(self, x):
            seen.append(int(x[0, 0]))
            return super().forward(x)

    data = numbers()
    model = kt.Model(Watch(3, 1)).compile("sgd", "mse", lr=0.0)
    model.fit(data, epochs=2, steps_per_epoch=3, verbose=0)
    assert seen == [0, 1, 2, 3, 4, 5]
    assert next(data)[0][0, 0] == 6, "nothing was taken that was not trained on"
    model.fit(data, epochs=1, steps_per_epoch=2, verbose=0)
    assert seen[6:] == [7, 8]


def test_steps_per_epoch_goes_through_arrays_pass_after_pass():
    seen = []

    class Watch(nn.Linear):
        def forward(self, x):
            seen.extend(x[:, 0].tolist())
            return super().forward(x)

    x = torch.arange(10.0)[:, None].repeat(1, 3)
    model = kt.Model(Watch(3, 1)).compile("sgd", "mse", lr=0.0)
    history = model.fit(x, torch.zeros(10, 1), batch_size=2, epochs=5, steps_per_epoch=2, verbose=0)
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]
    assert len(history.epoch) == 5


def test_data_that_ends_too_early_ends_the_run_with_a_warning():
    batches = iter([(torch.rand(2, 3), torch.rand(2, 1))] * 5)
    model = kt.Model(nn.Linear(3, 1)).compile("sgd", "mse")
    with pytest.warns(UserWarning, match="ended after 2 of 3 steps in epoch 2"):
        history = model.fit(batches, epochs=4, steps_per_epoch=3, verbose=0)
    assert history.epoch == [0, 1]


def test_a_generator_without_steps_per_epoch_is_one_epoch():
    batches = ((torch.rand(2, 3), torch.rand(2, 1)) for _ in range(3))
    model = kt.Model(nn.Linear(3, 1)).compile("sgd", "mse")
    with pytest.warns(UserWarning, match="a generator can be gone through once"):
        assert model.fit(batches, epochs=2, verbose=0).epoch == [0]


def test_validation_freq_counts_epochs_from_one():
    callback, _ = recorder()
    held_out = (torch.rand(4, 3), torch.rand(4, 1))
    _, history = run(callback, epochs=5, validation_data=held_out, validation_freq=2)
    assert len(history.history["val_loss"]) == 2
    _, history = run(callback, epochs=5, validation_data=held_out, validation_freq=[1, 5])
    assert len(history.history["val_loss"]) == 2
    assert history.to_pandas()["val_loss"].notna().tolist() == [True, False, False, False, True]


def test_what_a_callback_puts_into_the_logs_gets_into_the_history():
    class Rate(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["rate"] = 0.5**epoch

    assert run(Rate())[1].history["rate"] == [1.0, 0.5]


def test_the_module_trains_in_train_mode_validates_in_eval_mode_and_comes_back_as_it_was():
    modes = []

    class Watch(nn.Linear):
        def forward(self, x):
            modes.append(self.training)
            return super().forward(x)

    net = nn.Sequential(Watch(3, 3), nn.Dropout(), nn.Linear(3, 1))
    net.eval()
    net[1].train()  # half and half
    model = kt.Model(net).compile("sgd", "mse")
    model.fit(
        torch.rand(4, 3), torch.rand(4, 1), validation_data=(torch.rand(4, 3), torch.rand(4, 1)), epochs=2, verbose=0
    )
    assert modes == [True, False, True, False]
    assert [part.training for part in net.modules()] == [False, False, True, False]
    for use in (model.evaluate, model.predict, model.train_on_batch, model.test_on_batch):
        use(*[torch.rand(4, 3), torch.rand(4, 1)][: 1 if use == model.predict else 2])
        assert [part.training for part in net.modules()] == [False, False, True, False]


def test_a_loss_that_is_lost_is_said_once_and_training_goes_on(classifier, digits) -> None:
    model = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy", lr=1e20)
    with pytest.warns(UserWarning, match=r"the loss of epoch \d is (nan|inf). Try a lower lr or clip=1.0") as caught:
        history = model.fit(*digits, epochs=4, verbose=0)
    assert len(history.epoch) == 4
    assert len([one for one in caught if "the loss of epoch" in str(one.message)]) == 1


def test_a_loss_without_a_gradient_says_what_cuts_it(classifier, digits) -> None:
    model = kt.Model(classifier, backend="cpu").compile("sgd", lambda output, y: output.detach().sum(1))
    with pytest.raises(ValueError, match="the loss has no gradient.*detach, no_grad"):
        model.fit(*digits, verbose=0)
