"""Truncated backpropagation through time: a step for each piece, the state carried and cut."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kerastorch as kt
from tests import reference

SAMPLES, TIME, BATCH = 11, 17, 4


class Recurrent(nn.Module):
    """`(x, state) -> (output, state)`; remembers which states it was given."""

    def __init__(self, kind: type = nn.GRU, outputs: int = 1) -> None:
        super().__init__()
        self.cell, self.head = kind(3, 8, batch_first=True), nn.Linear(8, outputs)
        self.states = []

    def forward(self, x: Tensor, state=None):
        self.states.append(state)
        hidden, state = self.cell(x, state)
        return self.head(hidden), state


@pytest.fixture
def sequences() -> tuple[Tensor, Tensor]:
    x = torch.randn(SAMPLES, TIME, 3)
    return x, x.cumsum(1)[..., :1] / 4


def by_hand(net: nn.Module, x: Tensor, y: Tensor, steps: int, epochs: int, loss=F.mse_loss, prepare=None):
    """A copy of `net` after a step for each piece, and its epoch losses: means over samples and time."""
    net = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    history = []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.arange(len(x)).split(BATCH):
            state = None
            for start in range(0, x.shape[1], steps):
                piece = slice(start, start + steps)
                output, state = net(x[rows, piece], state)
                state = tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()
                value = loss(output, y[rows, piece])
                optimizer.zero_grad()
                value.backward()
                if prepare is not None:
                    prepare(net)
                optimizer.step()
                total += value.item() * len(rows) * output.shape[1]
        history.append(total / len(x) / x.shape[1])
    return net, history


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM], ids=["tensor state", "tuple state"])
@pytest.mark.parametrize("steps", [1, 5, TIME, 100])
def test_each_piece_is_a_step_as_by_hand(sequences, kind, steps) -> None:
    net = Recurrent(kind)
    expected, losses = by_hand(net, *sequences, steps, epochs=2)
    model = kt.Model(net, backend="cpu").compile("sgd", "mse", lr=0.1, tbptt_steps=steps)
    history = model.fit(*sequences, batch_size=BATCH, shuffle=False, epochs=2, verbose=0).history
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert history["loss"] == pytest.approx(losses, abs=1e-6)


def test_clipping_and_schedule_apply_to_each_piece(sequences) -> None:
    net = Recurrent()
    taken = []

    def prepare(twin):
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)

    expected, _ = by_hand(net, *sequences, 5, epochs=1, prepare=prepare)
    model = kt.Model(net, backend="cpu").compile("sgd", "mse", lr=0.1, tbptt_steps=5, clip=0.1)
    model.optimizer.register_step_post_hook(lambda *_: taken.append(1))
    model.fit(*sequences, batch_size=BATCH, shuffle=False, verbose=0)
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert len(taken) == 3 * 4  # batches times pieces
    model.compile("sgd", "mse", lr=0.1, tbptt_steps=5, schedule="linear")
    history = model.fit(*sequences, batch_size=BATCH, epochs=2, verbose=0).history
    assert history["lr"] == pytest.approx([0.1 * (1 - 11 / 24), 0.1 * (1 - 23 / 24)])


def test_the_state_is_carried_without_its_graph_and_starts_anew_with_each_batch(sequences) -> None:
    net = Recurrent()
    kt.Model(net, backend="cpu").compile("sgd", "mse", tbptt_steps=6).fit(*sequences, batch_size=BATCH, verbose=0)
    assert [state is None for state in net.states] == 3 * [True, False, False]
    assert not any(state.requires_grad for state in net.states if state is not None)


def test_masked_tokens_and_weights_count_as_in_whole_sequences(sequences) -> None:
    x, _ = sequences
    y = torch.randint(0, 5, (SAMPLES, TIME))
    y[torch.rand(y.shape) < 0.4] = -100
    net = Recurrent(outputs=5)
    expected, _ = by_hand(net, x, y, 5, 1, loss=lambda o, t: F.cross_entropy(o.movedim(-1, 1), t))
    model = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy", lr=0.1, tbptt_steps=5, metrics=["accuracy"])
    history = model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0).history
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert 0 <= history["accuracy"][0] <= 1
    lowest = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy", lr=0.0, tbptt_steps=5, metrics=["accuracy"])
    trained = lowest.fit(x, y, batch_size=BATCH, verbose=0).history
    assert [trained["loss"][0], trained["accuracy"][0]] == pytest.approx(lowest.evaluate(x, y, verbose=0), abs=1e-6)


def test_evaluation_and_prediction_take_sequences_whole_and_return_outputs_alone(sequences) -> None:
    x, y = sequences
    net = Recurrent()
    model = kt.Model(net, backend="cpu").compile("sgd", "mse", tbptt_steps=5)
    with torch.no_grad():
        expected = net(x)[0]
    assert torch.equal(model.predict(x, batch_size=SAMPLES), expected)
    assert torch.equal(model(x), expected)
    assert model.evaluate(x, y, verbose=0) == pytest.approx(F.mse_loss(expected, y).item(), abs=1e-6)
    assert model.train_on_batch(x, y) > 0


def test_features_of_a_whole_sequence_go_with_each_piece(sequences) -> None:
    class Conditioned(Recurrent):
        def forward(self, x, kind, state=None):
            return super().forward(x * kind[:, None], state)

    x, y = sequences
    kind = torch.rand(SAMPLES, 1)
    conditioned, plain = Conditioned(), Recurrent()
    plain.load_state_dict(conditioned.state_dict())
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    kt.Model(conditioned, backend="cpu").compile("sgd", "mse", tbptt_steps=5).fit((x, kind), y, **options)
    kt.Model(plain, backend="cpu").compile("sgd", "mse", tbptt_steps=5).fit(x * kind[:, None], y, **options)
    assert reference.same_weights(conditioned, plain)


@pytest.mark.parametrize("precision", ["64", "bf16", "bf16-true"])
def test_precisions_go_with_it(sequences, precision) -> None:
    model = kt.Model(Recurrent(), backend="cpu").compile("adam", "mse", lr=0.01, tbptt_steps=5, precision=precision)
    losses = model.fit(*sequences, batch_size=BATCH, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert model.predict(sequences[0]).dtype == (torch.float64 if precision == "64" else torch.float32)


class Stateless(nn.Linear):
    def forward(self, x, state=None):
        return super().forward(x)


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (lambda x, y: fitted(Stateless(3, 1), x, y), "returns .output, state., but it returned a Tensor"),
        (lambda x, y: fitted(Recurrent(), x, y[:, 0]), r"17 steps of time, but the targets have shape \(4, 1\)"),
        (lambda x, y: fitted(Recurrent(), x, y[:, :5]), r"Give a target for each step, shape \(4, 17"),
        (lambda x, y: fitted(Recurrent(), x, y, accumulate=2), "accumulate=2 does not go with tbptt_steps=5"),
        (lambda x, y: fitted(Recurrent(), x, y, microbatch=2), "microbatch=2 does not go with tbptt_steps=5"),
    ],
    ids=["no state", "no time in targets", "another length", "accumulate", "microbatch"],
)
def test_what_cannot_be_cut_is_refused_and_changes_nothing(sequences, fit, message) -> None:
    with pytest.raises(ValueError, match=message):
        fit(*sequences)


def fitted(net, x, y, **options) -> None:
    before = copy.deepcopy(net)
    try:
        kt.Model(net, backend="cpu").compile("sgd", "mse", tbptt_steps=5).fit(
            x, y, batch_size=BATCH, verbose=0, **options
        )
    finally:
        assert reference.same_weights(net, before)


@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_steps_must_be_a_whole_number_from_1_up(steps, error) -> None:
    with pytest.raises(error, match="tbptt_steps="):
        kt.Model(Recurrent(), backend="cpu").compile("sgd", "mse", tbptt_steps=steps)
