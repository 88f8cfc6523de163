"""ProgressBar and `progress_for`, driven hook by hook with a clock that stands still unless a test moves it.

The golden files hold what is printed; re-record them with `KERASTORCH_RECORD=1` and read the difference.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kerastorch.callbacks.base import Callback, hooks_of
from kerastorch.callbacks.progress import ProgressBar, _duration, _pace, _text, progress_for
from kerastorch.history import Logs

GOLDEN = Path(__file__).parent.parent / "golden"
EPOCHS = [
    {"loss": 0.4123, "accuracy": 0.8712, "val_loss": 0.3001, "val_accuracy": 0.9100, "lr": 1e-3},
    {"loss": 0.0812, "accuracy": 0.9750, "val_loss": 0.0771, "val_accuracy": 0.9764, "lr": 1e-3},
    {"loss": 0.0512, "accuracy": 0.9750, "val_loss": 0.0912, "val_accuracy": 0.9770, "lr": 5e-4},
]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr("tqdm.std.time", clock)
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return clock


def connected(bar: ProgressBar, steps: int | None = 313, epochs: int = 3) -> ProgressBar:
    backend, history = SimpleNamespace(portion=1.0), SimpleNamespace(history={})
    bar.set_model(SimpleNamespace(samples_seen=0, stop_training=False, history=history, backend=backend))
    bar.set_params({"verbose": "auto", "epochs": epochs, "steps": steps})
    return bar


def run_epoch(bar: ProgressBar, clock: Clock, epoch: int, logs: dict, step_s: float = 0.01, steps: int = 313) -> None:
    bar.on_epoch_begin(epoch, {})
    running = {name: value for name, value in logs.items() if not name.startswith("val_")}
    for batch in range(steps):
        clock.now += step_s
        bar.on_train_batch_end(batch, Logs(running.copy))
    bar.model.samples_seen = 192 * steps
    if "val_loss" in logs:
        values = {name[4:]: value for name, value in logs.items() if name.startswith("val_")}
        bar.on_validation_begin({})
        bar.on_test_begin({})
        for batch in range(50):
            clock.now += step_s
            bar.on_test_batch_end(batch, Logs(values.copy))
        bar.model.samples_seen = 10
        bar.on_test_end(values)
        bar.on_validation_end(values)
    bar.on_epoch_end(epoch, logs)


def run_fit(bar: ProgressBar, clock: Clock, **options) -> str:
    bar.on_train_begin({})
    for epoch, logs in enumerate(EPOCHS):
        run_epoch(bar, clock, epoch, logs, **options)
    bar.on_train_end(EPOCHS[-1])
    return bar.stream.getvalue()


def check_golden(name: str, printed: str) -> None:
    printed = printed.replace("\x1b", "\\e").replace("\r", "\\r\n")
    path = GOLDEN / f"progress_{name}.txt"
    if os.environ.get("KERASTORCH_RECORD"):
        path.write_text(printed, encoding="utf-8")
    assert printed == path.read_text(encoding="utf-8")


def shown_on_screen(printed: str) -> list[str]:
    """What is left on a terminal: `\\r` goes back to the begin of the line, what follows overwrites."""
    lines = []
    for line in re.sub(r"\x1b\[\d*m", "", printed).replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_plain_output_is_one_line_per_epoch(clock):
    printed = run_fit(connected(ProgressBar(stream=io.StringIO())), clock)
    check_golden("plain", printed)
    assert printed.count("\n") == 3 and printed.isascii()
    assert "\r" not in printed and "\x1b" not in printed


def test_long_epochs_have_a_heartbeat_each_minute(clock):
    check_golden("heartbeat", run_fit(connected(ProgressBar(stream=io.StringIO())), clock, step_s=0.5))


def test_heartbeat_of_unknown_length_counts_steps(clock):
    bar = connected(ProgressBar(stream=io.StringIO()), steps=None, epochs=1)
    bar.on_train_begin({})
    run_epoch(bar, clock, 0, {"loss": 0.5}, step_s=2.0, steps=31)
    assert bar.stream.getvalue().splitlines()[0] == "[1/1] step 30 60s 2.0s/step loss=0.5000"


def test_terminal_shows_a_live_line_and_keeps_one_per_epoch(clock):
    printed = run_fit(connected(ProgressBar(1.0, stream=Terminal())), clock)
    check_golden("terminal", printed)
    assert [line[:9] for line in shown_on_screen(printed)] == ["Epoch 1/3", "Epoch 2/3", "Epoch 3/3", ""]


def test_a_long_validation_is_shown_and_a_short_one_is_not(clock):
    long = run_fit(connected(ProgressBar(0.1, stream=Terminal())), clock)
    assert re.search(r"Epoch 2/3 validating  \d+ steps  00:00, 10ms/step  loss 0.07710  accuracy 0.9764\r", long)
    assert shown_on_screen(long)[1].startswith("Epoch 2/3  3.6s")
    assert "validating" not in run_fit(connected(ProgressBar(1.0, stream=Terminal())), clock)


def test_terminal_of_unknown_length_counts_steps(clock):
    check_golden("terminal_unknown_length", run_fit(connected(ProgressBar(1.0, stream=Terminal()), steps=None), clock))


@pytest.mark.parametrize("stream", [Terminal, io.StringIO], ids=["live", "plain"])
def test_validations_within_an_epoch_leave_a_line_each_and_training_is_shown_again(clock, stream):
    bar = connected(ProgressBar(stream=stream()), steps=100, epochs=None)
    bar.on_train_begin({})
    bar.on_epoch_begin(0, {})
    for batch in range(100):
        clock.now += 0.01
        bar.on_train_batch_end(batch, Logs(lambda: {"loss": 0.5}))
        bar.model.samples_seen = 32 * (batch + 1)
        if batch + 1 in (40, 80):
            bar.on_validation_begin({})
            clock.now += 100
            bar.model.samples_seen = 7  # of the validation
            bar.on_validation_end({})
            bar.model.samples_seen = 32 * (batch + 1)
            bar.on_interval_end(0, {"loss": 0.5, "val_loss": 0.25})
    bar.on_epoch_end(0, {"loss": 0.5, "val_loss": 0.25})
    bar.on_train_end({})
    printed = bar.stream.getvalue()
    lines = [line for line in shown_on_screen(printed) if line]
    name, gap, link = ("Epoch 1", "  ", " ") if stream is Terminal else ("[1]", " ", "=")
    values = gap.join(f"{one}{link}{value}" for one, value in (("loss", "0.5000"), ("val_loss", "0.2500")))
    assert lines == [
        gap.join([name, "40/100", values]),
        gap.join([name, "80/100", values]),
        gap.join([name, "3m21s", "3.2k samples/s", values]),
    ]
    assert ("90/100" in printed) == (stream is Terminal), "after a validation the bar goes on where it was"


def test_star_marks_values_better_than_in_all_epochs_before(clock):
    printed = run_fit(connected(ProgressBar(stream=Terminal())), clock)
    starred = [re.findall(r"(\w+) [\d.e-]+ \*", line) for line in shown_on_screen(printed)[:3]]
    assert starred == [[], ["loss", "accuracy", "val_loss", "val_accuracy"], ["loss", "val_accuracy"]]


def test_nan_is_never_the_best(clock):
    bar = connected(ProgressBar(stream=Terminal()))
    bar.on_train_begin({})
    for epoch, loss in enumerate([float("nan"), 3.0, float("nan"), 2.0]):
        run_epoch(bar, clock, epoch, {"loss": loss})
    values = [line.partition("loss ")[2] for line in shown_on_screen(bar.stream.getvalue())[:4]]
    assert values == ["nan", "3.000", "nan", "2.000 *"]


def test_a_second_fit_starts_over(clock):
    bar = connected(ProgressBar(stream=Terminal()))
    first = shown_on_screen(run_fit(bar, clock))[:3]
    both = shown_on_screen(run_fit(bar, clock))[:6]
    assert both == first + first


def test_no_color_keeps_the_star_and_drops_its_colour(clock, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    printed = run_fit(connected(ProgressBar(stream=Terminal())), clock)
    assert " *" in printed and "\x1b" not in printed


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("TERM", "dumb")])
def test_ci_and_dumb_terminals_get_plain_lines(clock, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    printed = run_fit(connected(ProgressBar(stream=Terminal())), clock)
    assert printed == (GOLDEN / "progress_plain.txt").read_text()


@pytest.mark.parametrize("verbose", [2, 1, True, "auto"])
def test_each_verbose_is_plain_in_a_pipe(clock, verbose):
    printed = run_fit(connected(ProgressBar(verbose=verbose, stream=io.StringIO())), clock)
    assert printed == (GOLDEN / "progress_plain.txt").read_text()


def test_verbose_2_is_plain_on_a_terminal(clock):
    printed = run_fit(connected(ProgressBar(verbose=2, stream=Terminal())), clock)
    assert printed == (GOLDEN / "progress_plain.txt").read_text()


def test_verbose_0_prints_nothing(clock):
    assert run_fit(connected(ProgressBar(verbose=0, stream=Terminal())), clock, step_s=1.0) == ""


def test_stdout_is_looked_up_when_something_is_printed(clock, capsys):
    bar = connected(ProgressBar())
    bar.on_train_begin({})
    run_epoch(bar, clock, 0, {"loss": 0.5})
    assert capsys.readouterr().out.startswith("[1/3] 3.1s ")


def test_samples_are_those_of_all_processes_that_have_a_part(clock):
    bar = connected(ProgressBar(0.5, stream=io.StringIO()), steps=100)
    bar.model.backend = SimpleNamespace(portion=0.25)
    bar.on_test_begin({})
    clock.now += 0.8
    bar.model.samples_seen = 4250
    bar.on_test_end({"loss": 0.1})
    assert bar.stream.getvalue() == "evaluate 0.80s 21k samples/s loss=0.1000\n"


def test_evaluate_ends_as_a_line_and_its_live_line_is_gone(clock):
    def evaluated(stream: io.StringIO) -> str:
        bar = connected(ProgressBar(0.5, stream=stream), steps=100)
        bar.on_test_begin({})
        for batch in range(100):
            clock.now += 0.008
            bar.on_test_batch_end(batch, Logs(lambda: {"loss": 0.1}))
        bar.model.samples_seen = 17000
        bar.on_test_end({"loss": 0.1, "accuracy": 0.97})
        return bar.stream.getvalue()

    assert evaluated(io.StringIO()) == "evaluate 0.80s 21k samples/s loss=0.1000 accuracy=0.9700\n"
    printed = evaluated(Terminal())
    assert printed.count("/100") == 2  # when it begins and after 0.5 s
    assert shown_on_screen(printed) == ["evaluate  0.80s  21k samples/s  loss 0.1000  accuracy 0.9700", ""]


def test_predict_is_live_on_a_terminal_and_leaves_nothing(clock):
    def predicted(stream: io.StringIO) -> str:
        bar = connected(ProgressBar(stream=stream), steps=10)
        bar.on_predict_begin({})
        for batch in range(10):
            clock.now += 70.0
            bar.on_predict_batch_end(batch, {"outputs": torch.zeros(3, 2)})
        bar.on_predict_end({})
        return bar.stream.getvalue()

    assert predicted(io.StringIO()) == ""
    printed = predicted(Terminal())
    assert "predict   50%" in printed and "5/10" in printed
    assert shown_on_screen(printed) == [""]


def test_an_interrupted_epoch_leaves_a_clean_terminal(clock):
    bar = connected(ProgressBar(stream=Terminal()))
    bar.on_train_begin({})
    run_epoch(bar, clock, 0, {"loss": 0.5}, steps=20)
    bar.on_train_end({"loss": 0.5})
    screen = shown_on_screen(bar.stream.getvalue())
    assert len(screen) == 2 and screen[0].startswith("Epoch 1/3") and screen[1] == ""


def test_an_epoch_without_a_batch_leaves_nothing(clock):
    bar = connected(ProgressBar(stream=Terminal()))
    bar.on_train_begin({})
    bar.on_epoch_begin(0, {})
    bar.on_train_end({})
    assert shown_on_screen(bar.stream.getvalue()) == [""]


@pytest.mark.parametrize("is_validating", [False, True])
def test_traceback_starts_on_a_line_of_its_own(clock, is_validating):
    bar = connected(ProgressBar(stream=Terminal()))
    bar.on_train_begin({})
    bar.on_epoch_begin(0, {})
    if is_validating:
        bar.on_validation_begin({})
    bar.on_exception(RuntimeError("out of memory"))
    bar.stream.write("Traceback\n")
    assert shown_on_screen(bar.stream.getvalue()) == ["Traceback", ""]


def test_after_an_exception_the_same_bar_evaluates(clock):
    bar = connected(ProgressBar(stream=io.StringIO()))
    bar.on_train_begin({})
    bar.on_epoch_begin(0, {})
    bar.on_exception(RuntimeError("out of memory"))
    bar.on_test_begin({})
    clock.now += 1.0
    bar.on_test_end({"loss": 1.0})
    assert bar.stream.getvalue() == "evaluate 1.0s 0.00 samples/s loss=1.000\n"


def test_exception_before_the_first_hook_is_no_second_exception():
    ProgressBar().on_exception(RuntimeError("in a callback before this one"))


def test_a_step_that_is_not_due_is_one_python_call_and_reads_nothing(monkeypatch):
    monkeypatch.undo()  # the real clock, which is no Python function
    bar = connected(ProgressBar(1e6, stream=Terminal()))
    bar.on_train_begin({})
    bar.on_epoch_begin(0, {})
    logs = Logs(lambda: pytest.fail("the device was read"))
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(frame.f_code.co_name) if event == "call" else None)
    for batch in range(100):
        bar.on_train_batch_end(batch, logs)
    sys.setprofile(None)
    bar.on_train_end({})
    assert calls == ["on_train_batch_end"] * 100


def test_each_refresh_reads_the_logs_once(clock):
    bar = connected(ProgressBar(1.0, stream=Terminal()))
    bar.on_train_begin({})
    bar.on_epoch_begin(0, {})
    reads = []
    for batch in range(50):
        clock.now += 0.1
        bar.on_train_batch_end(batch, Logs(lambda: reads.append(1) or {"loss": 0.5}))
    assert 4 <= len(reads) <= 5
    bar.on_train_end({})


def test_lines_go_above_a_bar_that_the_user_has_around_fit(clock):
    from tqdm import tqdm

    terminal = Terminal()
    with tqdm(range(2), desc="outer", file=terminal, leave=False, ncols=60):
        bar = connected(ProgressBar(verbose=1, stream=terminal))
        bar.on_train_begin({})
        run_epoch(bar, clock, 0, {"loss": 0.5}, steps=3)
        bar.on_train_end({})
    line = next(line for line in shown_on_screen(terminal.getvalue()) if "Epoch 1/3  0.03s" in line)
    assert "outer" not in line


def test_only_numbers_are_shown(clock):
    bar = connected(ProgressBar(stream=io.StringIO()))
    bar.on_train_begin({})
    logs = {"loss": torch.tensor(0.5), "per_class": [0.1, 0.2], "note": "x", "confusion": torch.eye(2), "steps": 12}
    bar.on_epoch_begin(0, {})
    bar.on_epoch_end(0, logs)
    assert bar.stream.getvalue().endswith("samples/s loss=0.5000 steps=12\n")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0812, "0.08120"), (0, "0"), (0.0, "0.000"), (1.0, "1.000"), (-12.3456, "-12.35"), (999.97, "1000")]
    + [(12345.6, "12346"), (12345, "12345"), (1.5e7, "1.500e+07"), (1e-7, "1.000e-07"), (0.0001, "0.0001000")]
    + [(float("nan"), "nan"), (float("-inf"), "-inf"), (float("inf"), "inf"), (True, "1")],
)
def test_numbers_are_legible(value, text):
    assert _text("loss", value) == text


def test_learning_rates_have_two_decimals_and_an_exponent():
    assert _text("lr", 1e-3) == "1.00e-03"


def test_times_are_short_at_any_scale():
    assert [_duration(value) for value in (0, 0.034, 4.64, 60, 99.6, 3599.6, 86400)] == [
        "0.00s", "0.03s", "4.6s", "60s", "1m40s", "1h00m", "24h00m",
    ]  # fmt: skip
    assert [_pace(value) for value in (3.1e-4, 0.0089, 0.31, 0.9999, 12)] == [
        "0.31ms/step", "8.9ms/step", "310ms/step", "1.0s/step", "12s/step",
    ]  # fmt: skip


def test_progress_for_gives_one_bar_and_never_a_second():
    assert [type(callback) for callback in progress_for("auto", [Callback()])] == [ProgressBar]
    assert progress_for(2, ())[0].verbose == 2 and progress_for(True, None)[0].verbose == 1
    assert progress_for("auto", [ProgressBar()]) == progress_for(0, ()) == progress_for(False, ()) == []


@pytest.mark.parametrize("verbose", [3, -1, "always", None, 1.0, [1]])
def test_unknown_verbose_is_refused(verbose):
    with pytest.raises(ValueError, match=r'is not known, expected 0, 1, 2 or "auto". Give 0 for silence'):
        progress_for(verbose, ())


@pytest.mark.parametrize("refresh_s", [-1, float("nan")])
def test_impossible_refresh_is_refused(refresh_s):
    with pytest.raises(ValueError, match="is no time. Give seconds from 0 up"):
        ProgressBar(refresh_s)


def test_no_hook_before_a_batch_is_taken():
    hooks = hooks_of([ProgressBar()])
    assert len(hooks.on_train_batch_end) == 1 and not hooks.on_train_batch_begin and not hooks.on_test_batch_begin


def test_fit_in_a_pipe_prints_a_line_per_epoch(capsys, monkeypatch):
    monkeypatch.undo()
    kt = pytest.importorskip("kerastorch")
    x = torch.rand(64, 3)
    model = kt.Model(nn.Linear(3, 1), backend="cpu").compile("sgd", "mse")
    model.fit(x, x.sum(1, keepdim=True), epochs=2, verbose=2)
    printed = capsys.readouterr().out
    assert re.fullmatch(r"(\[[12]/2\] [\d.]+s [\d.]+[kMG]? samples/s loss=[\d.e-]+\n){2}", printed)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty")
def test_fit_on_a_terminal_leaves_a_line_per_epoch(monkeypatch):
    monkeypatch.undo()
    script = """
        import torch
        from torch import nn
        import kerastorch as kt
        x = torch.rand(640, 3)
        model = kt.Model(nn.Linear(3, 1), backend="cpu").compile("sgd", "mse")
        model.fit(x, x.sum(1, keepdim=True), epochs=2, validation_data=(x, x.sum(1, keepdim=True)))
        model.evaluate(x, x.sum(1, keepdim=True))
        model.predict(x)
    """
    printed = run_on_a_terminal(textwrap.dedent(script))
    number = r"[\d.e-]+( \*)?"
    epoch = rf"Epoch [12]/2  [\d.]+s  [\d.]+[kMG]? samples/s  loss {number}  val_loss {number}"
    first, second, evaluated, rest = shown_on_screen(printed)
    assert re.fullmatch(epoch, first) and re.fullmatch(epoch, second) and first[:9] == "Epoch 1/2"
    assert re.fullmatch(rf"evaluate  [\d.]+s  [\d.]+[kMG]? samples/s  loss {number}", evaluated)
    assert rest == ""
    assert "0%|          | 0/20  00:00<?" in printed
    assert second.endswith("*") and "\x1b[32m*\x1b[39m" in printed


def run_on_a_terminal(script: str) -> str:
    """What a Python script prints to a terminal of 100 columns."""
    import pty
    from fcntl import ioctl
    from struct import pack
    from termios import TIOCSWINSZ

    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, pack("HHHH", 40, 100, 0, 0))
    variables = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR")}
    variables |= {"TERM": "xterm", "PYTHONPATH": str(GOLDEN.parent.parent), "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=theirs, stderr=theirs, env=variables)
    os.close(theirs)
    printed = b"".join(iter(lambda: _read(ours), b""))
    os.close(ours)
    assert process.wait() == 0, printed.decode()
    return printed.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux's end of file: the other side closed
        return b""
