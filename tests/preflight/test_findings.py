"""The list, the table and its last line; golden files hold tables, `KERASTORCH_RECORD=1` writes them again."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import progress
from kerastorch.preflight import Finding, Findings

GOLDEN = Path(__file__).parents[1] / "golden"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Troubled(nn.Module):
    """Softmax in front of a loss on logits, a norm before one sample, frozen and unused layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.body[0].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)).softmax(1)


@pytest.fixture
def still(monkeypatch) -> None:
    """A clock that stands still."""
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)


@pytest.fixture
def troubled() -> Findings:
    x, y, net = 100.0 * torch.arange(198.0).sin().reshape(33, 6), torch.arange(33) // 11, Troubled()
    for parameter in net.parameters():  # the same on every machine
        parameter.data = torch.arange(parameter.numel()).float().cos().reshape(parameter.shape)
    return kt.Model(net.eval(), backend="cpu").compile("sgd", "cross_entropy").check(x, y, verbose=0)


def assert_golden(name: str, text: str) -> None:
    path = GOLDEN / f"check_{name}.txt"
    if os.environ.get("KERASTORCH_RECORD"):
        path.write_text(text + "\n", encoding="utf-8")
    assert text + "\n" == path.read_text(encoding="utf-8")


def test_table_of_several_findings(still, troubled) -> None:
    assert_golden("troubled", str(troubled))


def test_line_of_no_findings(still, digits, classifier) -> None:
    classifier.load_state_dict({name: torch.zeros_like(one) for name, one in classifier.state_dict().items()})
    findings = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy").check(*digits, verbose=0)
    assert_golden("nothing", str(findings))


def test_findings_are_a_list_with_errors_first(troubled) -> None:
    severities = [one.severity for one in troubled]
    assert severities == sorted(severities, key=["error", "warning", "note"].index) and len(set(severities)) == 3
    assert troubled.errors + troubled.warnings + troubled.notes == list(troubled) and not troubled.ok
    assert len(troubled) == len(severities) and troubled and troubled[0] is troubled.errors[0]
    assert repr(troubled) == str(troubled)


def test_only_errors_are_not_ok() -> None:
    note, warning, error = (
        Finding(severity, "name", "x", "Found.", "Do.") for severity in ("note", "warning", "error")
    )
    assert Findings([note, warning]).ok and not Findings([note, error]).ok and Findings().ok
    assert list(Findings([note, error, warning, note])) == [error, warning, note, note]
    assert not Findings() and str(Findings()) == "no mistakes found; checked: nothing"
    assert str(Findings([note, error, note], "one batch")).splitlines()[-1] == "1 error, 2 notes; checked: one batch"


def test_terminal_has_colours_and_a_file_has_none(troubled, monkeypatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, file = Terminal(), io.StringIO()
    troubled.print(terminal)
    troubled.print(file)
    assert "\x1b[31merror\x1b[0m" in terminal.getvalue() and "\x1b[33mwarning\x1b[0m" in terminal.getvalue()
    assert file.getvalue() == f"{troubled}\n"
    stripped = terminal.getvalue()
    for code in ("\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[33m", "\x1b[0m"):
        stripped = stripped.replace(code, "")
    assert stripped == file.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    troubled.print(plain)
    assert plain.getvalue() == file.getvalue()


def test_a_pipe_that_cannot_show_a_letter_shows_the_rest() -> None:
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Findings([Finding("note", "name", "größe", "Found.", "Do.")]).print(pipe)
    pipe.flush()
    assert b"gr??e" in pipe.buffer.getvalue()


def test_notebook_gets_a_table_of_its_own() -> None:
    shown = Findings([Finding("note", "name", "x < y", "Found.", "Do.")], "a & b")._repr_html_()
    assert "<table>" in shown and "x &lt; y" in shown and "<p>1 note; checked: a &amp; b</p>" in shown
    assert Findings()._repr_html_() == "<p>no mistakes found; checked: nothing</p>"


def test_check_prints_unless_told_not_to_or_in_a_notebook(digits, classifier, capsys, monkeypatch) -> None:
    model = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy")
    model.check(*digits)
    assert capsys.readouterr().out.startswith("no mistakes found; checked: 1,210 parameters")
    model.check(*digits, verbose=0)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(kt.model, "is_notebook", lambda: True)
    model.check(*digits)
    assert capsys.readouterr().out == ""
    model.check(*digits, verbose=1)
    assert "no mistakes found" in capsys.readouterr().out
    assert progress.is_notebook() is False


def test_last_line_names_the_first_parts_of_many() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, *inputs):
            return self.linear(sum(inputs))

    x = tuple(torch.randn(9, 2) for _ in range(5))
    findings = kt.Model(Sums(), backend="cpu").compile("sgd", "mse").check(x, torch.rand(9, 1), verbose=0)
    assert "one batch of x[0] (9, 2), x[1] (9, 2), x[2] (9, 2), x[3] (9, 2), ..., loss" in findings.checked
