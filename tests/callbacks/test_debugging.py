"""What `kt.debug_nan` says of each way in which a run stops being finite, and that it leaves nothing behind."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

import kerastorch as kt
from kerastorch import debugging
from kerastorch.callbacks.debugging import NaNFinder, nan_finders

STEP = "step 1 (epoch 1, batch 1, counted from 1)"
ALL_10 = "samples [0, 1, 2, 3, 4, 5, 6, 7, ... (10 in all)]"
GENTLER = "Try a lower lr or clip=1.0 in compile"
LAYER = f"{GENTLER}, look at these samples, and for a log, root or division of 0 add an eps."
GRADIENT = f"{GENTLER}, and for a root, norm or division of 0 add an eps within it."


@pytest.fixture(autouse=True)
def off_again():
    yield
    assert not debugging.is_on()
    debugging._is_on = False


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        return self.function(*inputs, **named)


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x)


class Sqrt(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(x)


def linear(inputs: int = 64, outputs: int = 10) -> nn.Linear:
    """With positive weights, so that positive inputs have positive results."""
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.abs_().add_(0.1)
        layer.bias.fill_(0.1)
    return layer


def model_of(module: nn.Module, loss="cross_entropy", optimizer="sgd", *, kind=kt.Model, **options) -> kt.Model:
    return kind(module, backend="cpu").compile(optimizer, loss, **options)


def error_of(model: kt.Model, *data, **options) -> str:
    options = {"batch_size": 10, "shuffle": False, "verbose": 0} | options
    with kt.debug_nan(), pytest.raises(FloatingPointError) as caught:
        model.fit(*data, **options)
    assert_nothing_left(model)
    return str(caught.value)


def assert_nothing_left(model: kt.Model) -> None:
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.module.modules())
    assert all(parameter.grad is None and not parameter._backward_hooks for parameter in model.module.parameters())
    assert torch.compiler.set_stance("default").prev.stance == "default"


def test_a_layer_that_returns_nan_is_named_with_its_samples(digits):
    x, y = digits
    x = x.clone()
    x[12], x[17] = -x[12], -x[17]
    model = model_of(nn.Sequential(linear(), nn.Sequential(nn.Identity(), Log()), nn.Identity()))
    assert error_of(model, x, y) == (
        f"the loss of step 2 (epoch 1, batch 2, counted from 1) is nan. It began in '1.1' (Log), the first layer whose "
        f"result is not finite: it returned nan for samples [12, 17]. {LAYER}"
    )


def test_steps_epochs_and_batches_are_counted_from_1(digits):
    x, y = digits
    calls = []

    def forward(x: Tensor) -> Tensor:
        calls.append(x)
        return x / 0 if len(calls) == 20 else x

    model = model_of(nn.Sequential(linear(), Function(forward)))
    assert error_of(model, x, y, epochs=3, accumulate=2) == (
        f"the loss of step 11 (epoch 2, batch 5, counted from 1) is nan. It began in '1' (Function), the first layer "
        f"whose result is not finite: it returned inf for samples [40, 41, 42, 43, 44, 45, 46, 47, ... (10 in "
        f"all)]. {LAYER}"
    )


def test_positions_in_the_data_are_given_where_they_are_known(digits):
    class Known(kt.Model):
        batch_indices = [100 + index for index in range(10)]

    x, y = digits
    model = model_of(
        nn.Sequential(linear(), Function(lambda x: x / torch.arange(len(x))[:, None].clamp(max=1))), kind=Known
    )
    assert "it returned inf for samples [100]. " in error_of(model, x, y)
    assert "it returned inf for samples [100]. " in error_of(model, x, y, microbatch=4)
    late = Function(lambda x: x / (x.sum() - x.sum()) if len(x) == 2 else x)
    assert "it returned inf for samples [108, 109]. " in error_of(
        model_of(nn.Sequential(linear(), late), kind=Known), x, y, microbatch=4
    )


def test_what_forward_computes_between_its_layers_is_its_own(digits):
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = linear(64, 8), linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.log(-self.first(x)))

    assert error_of(model_of(nn.Sequential(Own())), *digits) == (
        f"the loss of {STEP} is nan. It began in what forward of '0' (Own) computes itself: it gave nan to '0.second' "
        f"(Linear) for {ALL_10}. {LAYER}"
    )
    assert error_of(model_of(Own()), *digits) == (
        f"the loss of {STEP} is nan. It began in what forward of the module (Own) computes itself: it gave nan to "
        f"'second' (Linear) for {ALL_10}. {LAYER}"
    )


def test_infinities_are_told_from_the_nan_they_become(digits):
    overflow = Function(lambda x: x * torch.inf)
    told = error_of(model_of(nn.Sequential(linear(), overflow, nn.Identity(), nn.Softmax(1))), *digits)
    assert told == (
        f"the loss of {STEP} is nan. It began in '1' (Function), the first layer whose result is not finite: it "
        f"returned inf for {ALL_10}. The first nan was returned by '3' (Softmax). {LAYER}"
    )


def test_a_buffer_that_is_nan_is_named(digits):
    norm = nn.BatchNorm1d(10).eval()
    norm.running_mean[3] = torch.nan
    model = model_of(nn.Sequential(linear(), norm)).freeze("1")
    assert error_of(model, *digits) == (
        f"the loss of {STEP} is nan. It began in '1' (BatchNorm1d), the first layer whose result is not finite: it "
        f"returned nan for {ALL_10}. Its 'running_mean' has nan. {LAYER}"
    )


@pytest.mark.filterwarnings("ignore:.*NaN")
def test_data_that_is_not_finite_is_told_from_layers(digits):
    x, y = digits
    x = x.clone()
    x[12, 3], x[17] = torch.nan, torch.nan
    rest = "Leave these samples out, or fill in what is missing."
    assert error_of(model_of(nn.Sequential(linear())), x, y) == (
        f"the loss of step 2 (epoch 1, batch 2, counted from 1) is nan. It began in the data: the input has nan in "
        f"samples [12, 17]. {rest}"
    )
    x[12:] = torch.inf
    module = Function(lambda left, right: left + right)
    module.layer = linear()
    both = Function(lambda left, right: module.layer(left + right))
    both.layer = module.layer
    assert "It began in the data: input[1] has inf in samples [12, 13, 14, 15, 16, 17, 18, 19]. " in error_of(
        model_of(both), (x.clamp(max=1).nan_to_num(), x.nan_to_num(posinf=torch.inf)), y
    )
    named = {"left": x.clamp(max=1).nan_to_num(), "right": x}
    assert "It began in the data: input['right'] has inf in samples" in error_of(model_of(both), named, y)


def test_without_a_layer_it_is_the_loss_function_or_the_targets(digits):
    x, _ = digits
    y = torch.ones(150, 1)
    y[7] = torch.nan
    with pytest.warns(UserWarning, match="NaN"):
        told = error_of(model_of(nn.Sequential(linear(64, 1)), "mse"), x, y)
    assert told == (
        f"the loss of {STEP} is nan. All results of layers were finite, so it began in the loss function or in the "
        f"targets. Look at the targets of {ALL_10}, and in the loss for a log, root or division of 0 and for a mean "
        f"over nothing; where outputs have grown too large for it, try a lower lr or clip=1.0 in compile."
    )


class Zeros(nn.Module):
    """Whose result is 0, and whose gradient is not finite if what comes back is not."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0


def test_a_gradient_is_traced_to_the_layer_that_it_came_back_through(digits):
    nested = nn.Sequential(Zeros(), nn.Sequential(nn.Sequential(Sqrt(), nn.Identity())))
    assert error_of(model_of(nn.Sequential(linear(), linear(10, 10), nested, linear(10, 10))), *digits) == (
        f"the loss of {STEP} is finite, but the gradient of '1.weight' is nan. It began on the way back through "
        f"'2.1.0.0' (Sqrt), for {ALL_10}. {GRADIENT}"
    )


def test_a_gradient_is_traced_to_the_loss_function(digits):
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output * 0).square().sum(1).sqrt().mean()

    assert error_of(model_of(nn.Sequential(linear()), loss), *digits) == (
        f"the loss of {STEP} is finite, but the gradient of '0.weight' is nan. It began in the loss function, for "
        f"{ALL_10}. {GRADIENT}"
    )


def test_a_gradient_is_traced_to_what_forward_computes_itself(digits):
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = linear(), linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.second((self.first(x) * 0).sqrt())

    assert error_of(model_of(Own()), *digits) == (
        f"the loss of {STEP} is finite, but the gradient of 'first.weight' is nan. It began in what is computed from "
        f"the result of 'first' (Linear), for {ALL_10}. {GRADIENT}"
    )


def test_a_gradient_of_the_second_of_two_losses_is_traced_too(digits):
    class Twice(kt.Model):
        def train_step(self, batch: tuple) -> None:
            losses = [self.module[name](batch[0]).mean() for name in ("left", "right")]
            for loss in losses:
                self.backward(loss)
            self.optimizer_step()

    module = nn.ModuleDict({"left": linear(), "right": nn.Sequential(linear(), Zeros(), Sqrt())})
    assert "It began on the way back through 'right.2' (Sqrt), " in error_of(
        model_of(module, None, kind=Twice), *digits
    )


def test_a_gradient_may_be_a_parameters_own(digits):
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(64))

        def forward(self, x: Tensor) -> Tensor:
            return x * (self.scale * 0).sqrt()

    assert error_of(model_of(nn.Sequential(Scale(), linear())), *digits) == (
        f"the loss of {STEP} is finite, but the gradient of '0.scale' is nan. All that came back through the layers "
        f"was finite: it began in the parameter's own. {GRADIENT}"
    )


def test_a_step_that_goes_too_far_is_told_from_its_gradients(digits):
    x, y = digits
    model = model_of(nn.Sequential(linear(), nn.Softplus()), lr=3e38, optimizer="sgd")
    model.optimizer.param_groups[0]["weight_decay"] = 100.0
    assert error_of(model, x, y) == (
        f"parameter '0.weight' is inf after {STEP}, whose gradients were finite: SGD went too far, with lr=3e+38. "
        f"{GENTLER}."
    )


def test_parameters_that_were_not_finite_before_are_told(digits):
    module = nn.Sequential(linear(), linear(10, 10))
    with torch.no_grad():
        module[1].bias[3] = torch.nan
    assert error_of(model_of(module), *digits) == (
        f"parameter '1.bias' is nan before {STEP}. Load other weights, or make the module anew."
    )


def test_infinities_in_a_mask_that_is_frozen_are_no_error(digits):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear()
            self.mask = nn.Parameter(torch.tensor([0.0] * 9 + [-torch.inf]), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.layer(x) + self.mask).softmax(1)

    x, y = digits
    with kt.debug_nan():
        model_of(Masked()).fit(x, y, verbose=0)


@pytest.mark.parametrize(
    "options, given",
    [
        ({}, {"accumulate": 3}),
        ({}, {"microbatch": 4}),
        ({}, {"microbatch": "auto", "accumulate": 2}),
        ({"precision": "bf16"}, {}),
        ({"precision": "16"}, {}),
        ({"optimizer": "lbfgs"}, {}),
        ({"jit": True}, {}),
        ({"clip": 1.0, "schedule": "cosine"}, {}),
    ],
    ids=lambda options: "-".join(map(str, options)) or "plain",
)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
def test_a_layer_is_found_in_whatever_way_steps_are_made(digits, options, given):
    options = {"optimizer": "sgd", "lr": 1e-3} | options
    told = error_of(model_of(nn.Sequential(linear(), Function(lambda x: -x), Log()), **options), *digits, **given)
    assert (
        "is nan. It began in '2' (Log), the first layer whose result is not finite: it returned nan for samples" in told
    )
    x, y = digits
    with kt.debug_nan():  # and without a mistake nothing is found
        model_of(nn.Sequential(linear(), nn.ReLU(inplace=True), nn.Dropout(0.1)), **options).fit(
            x, y, verbose=0, **given
        )


def test_a_train_step_of_ones_own_with_two_optimizers_is_searched_too(digits):
    class Twins(kt.Model):
        def train_step(self, batch: tuple) -> None:
            x, y = batch
            for name in ("left", "right"):
                self.backward(nn.functional.cross_entropy(self.module[name](x), y))
                self.optimizer_step(name)

    module = nn.ModuleDict({"left": linear(), "right": nn.Sequential(linear(), Function(lambda x: -x), Log())})
    model = model_of(module, None, {"left": "adam", "right": "sgd"}, kind=Twins)
    assert "It began in 'right.2' (Log), the first layer" in error_of(model, *digits)

    class Given(Twins):
        def train_step(self, batch: tuple) -> None:
            x, y = batch
            self.backward(self.module["left"](torch.log(-x - 1)).mean())
            self.optimizer_step("left")

    told = error_of(model_of(module, None, {"left": "adam", "right": "sgd"}, kind=Given), *digits)
    assert told == (
        f"the loss of {STEP} is nan. It began outside of the layers: 'left' (Linear) was given nan (input[0]), when no "
        f"layer had returned any. Look at what was computed before it."
    )


def test_gradients_that_overflow_in_fp16_are_left_to_loss_scaling(digits):
    x, y = digits
    model = model_of(nn.Sequential(linear(), linear(10, 10)), precision="16", lr=1e-3)
    with kt.debug_nan():
        model.fit(x * 100, y, epochs=3, batch_size=10, verbose=0)
    assert model.skipped_steps > 0


def test_a_layer_called_after_an_error_that_was_caught_is_named_right(digits):
    def forward(x: Tensor) -> Tensor:
        raise KeyError

    class Caught(kt.Model):
        def compute_loss(self, batch: tuple) -> Tensor:
            with suppress(KeyError):
                self.module[1](batch[0])
            return nn.functional.cross_entropy(self.module[2](self.module[0](batch[0])), batch[1])

    module = nn.Sequential(
        linear(), nn.Sequential(nn.Identity(), Function(forward)), nn.Sequential(Function(lambda x: -x), Log())
    )
    told = error_of(model_of(module, None, kind=Caught), *digits)
    assert "It began in '2.1' (Log), the first layer" in told


def test_a_model_can_be_trained_after_the_error(digits, classifier):
    x, y = digits
    module = nn.Sequential(classifier, Function(lambda x: x / 0 if broken else x))
    model, broken = model_of(module, "cross_entropy", "adam", lr=0.01), True
    error_of(model, x, y)
    broken = False
    with kt.debug_nan():
        history = model.fit(x, y, epochs=5, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert_nothing_left(model)


def test_searching_changes_no_number(digits):
    x, y = digits
    weights = []
    for is_on in (False, True):
        torch.manual_seed(3)
        module = nn.Sequential(
            nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(8, 10)
        )
        with kt.debug_nan(is_on):
            model = model_of(module, optimizer="adam")
            model.fit(x, y, epochs=2, validation_split=0.2, verbose=0)
        assert_nothing_left(model)
        weights.append(module.state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


class Spy(kt.Callback):
    """The hooks of layers that there are while it is trained, and what is saved."""

    def on_train_batch_begin(self, batch: int, logs=None) -> None:
        self.hooks = [
            len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in self.model.module.modules()
        ]


def test_while_it_is_off_it_costs_nothing(digits, classifier, monkeypatch, tmp_path):
    x, y = digits
    model, spy = model_of(classifier), Spy()
    assert nan_finders() == []
    monkeypatch.setattr(NaNFinder, "__init__", lambda self: pytest.fail("there should be none"))
    model.fit(x, y, callbacks=spy, verbose=0)
    assert spy.hooks == [0, 0, 0, 0]
    model.save(tmp_path / "off.pt")
    monkeypatch.undo()
    with kt.debug_nan():
        assert len(nan_finders()) == 1
        model.fit(x, y, callbacks=spy, verbose=0)
        model.save(tmp_path / "on.pt")
    assert spy.hooks == [2, 2, 2, 2]
    states = [torch.load(tmp_path / name, weights_only=True)["state"]["callbacks"] for name in ("off.pt", "on.pt")]
    assert str(states[0]) == str(states[1])
    model.fit(x, y, callbacks=spy, verbose=0)
    assert spy.hooks == [0, 0, 0, 0]


def test_it_is_switched_at_once_or_for_a_block():
    assert not debugging.is_on()
    kt.debug_nan()
    assert debugging.is_on()
    with kt.debug_nan(False):
        assert not debugging.is_on()
    assert debugging.is_on()
    with pytest.raises(KeyError), kt.debug_nan(False):
        raise KeyError
    assert debugging.is_on()
    kt.debug_nan(False)
    assert not debugging.is_on()
    with pytest.raises(KeyError), kt.debug_nan():
        raise KeyError
    assert not debugging.is_on()
    with kt.debug_nan():
        with kt.debug_nan():
            pass
        assert debugging.is_on()
    switch = kt.debug_nan(False)
    with pytest.raises(TypeError, match=r"^mode=1 is a int, expected True or False\.$"):
        kt.debug_nan(1)
    assert switch.mode is False


def test_predictions_and_evaluations_are_not_searched(digits):
    x, y = digits
    model = model_of(nn.Sequential(linear(), Log()))
    with kt.debug_nan():
        model.predict(-x, verbose=0)
        model.evaluate(-x, y, verbose=0)
        model.train_on_batch(x, y)
        assert_nothing_left(model)


def test_a_validation_and_other_callbacks_may_see_nan(digits):
    class Predicts(kt.Callback):
        def on_train_batch_end(self, batch: int, logs=None) -> None:
            self.model.predict(-x, verbose=0)

    x, y = digits
    model = model_of(nn.Sequential(linear(), Log()), lr=1e-3)
    with kt.debug_nan():
        model.fit(x, y, validation_data=(-x, y), callbacks=Predicts(), epochs=2, verbose=0)


def test_compiled_modules_are_looked_into(digits):
    x, y = digits
    module = nn.Sequential(linear(), Function(lambda x: -x), nn.Sequential(Log()))
    model = model_of(torch.compile(module, backend="eager"))
    model.predict(x, verbose=0)  # compiled by now
    assert "It began in '2.0' (Log), the first layer" in error_of(model, x, y)
    with torch.no_grad():
        module[0].weight[0, 0] = torch.nan
    assert "parameter '0.weight' is nan before" in error_of(model, x, y)


def test_forward_passes_that_are_not_trained_on_are_not_noted(digits, monkeypatch):
    x, y = digits
    noted, note = [], NaNFinder._note
    monkeypatch.setattr(NaNFinder, "_note", lambda self, *given: noted.append(given[0]) or note(self, *given))

    class Predicts(kt.Callback):
        def on_train_batch_end(self, batch: int, logs=None) -> None:
            before = len(noted)
            self.model.predict(x, verbose=0)
            assert len(noted) == before > 0

        def on_validation_begin(self, logs=None) -> None:
            self.before = len(noted)

        def on_validation_end(self, logs=None) -> None:
            assert len(noted) == self.before

    with kt.debug_nan():
        model_of(nn.Sequential(linear())).fit(x, y, validation_data=(x, y), callbacks=Predicts(), verbose=0)
    assert set(noted) == {"inputs", "result", "result's gradient"}


def test_what_was_computed_after_the_last_step_is_forgotten(digits):
    class Watches(kt.Model):
        batches = 0

        def train_step(self, batch: tuple) -> None:
            super().train_step(batch)
            self.batches += 1
            with torch.no_grad():
                self.module[1](-batch[0])  # NaN, which nothing depends on

    forward = Function(lambda x: x / 0 if model.batches == 1 else x)
    model = model_of(nn.Sequential(linear(), Log(), forward), lr=1e-6, kind=Watches)
    told = error_of(model, *digits)
    assert told.startswith("the loss of step 2 (epoch 1, batch 2, counted from 1) is nan. It began in '2' (Function), ")


@pytest.mark.filterwarnings("ignore:.*NaN")
def test_errors_that_are_caught_do_not_confuse_it(digits):
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails = Fails()

        def forward(self, x: Tensor) -> Tensor:
            with suppress(KeyError):
                self.fails(x)
            return torch.log(-x)

    x, y = digits
    assert "It began in '1' (Catches), the first layer" in error_of(model_of(nn.Sequential(linear(), Catches())), x, y)

    class Twice(kt.Model):
        def compute_loss(self, batch: tuple) -> Tensor:
            self.module.fails = True
            with suppress(KeyError):
                self.module(torch.ones_like(batch[0]))
            self.module.fails = False
            return super().compute_loss(batch)

    class FailsFirst(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return {}["no such"] if self.fails else super().forward(x)

    told = error_of(model_of(FailsFirst(64, 10), kind=Twice), torch.where(x == 1, torch.nan, x), y)
    assert "It began in the data: input[0] has nan" in told or "It began in the data: the input has nan" in told


def test_results_that_are_not_by_sample_are_of_the_whole_batch(digits):
    turned = nn.Sequential(linear(64, 12), Function(lambda x: x.T / 0), Function(lambda x: x.T))
    assert f"It began in '1' (Function), the first layer whose result is not finite: it returned inf for {ALL_10}." in (
        error_of(model_of(turned), *digits)
    )


def test_a_loss_function_behind_several_layers_is_not_taken_for_one_of_them(digits):
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output * 0).square().sum(1).sqrt().mean()

    told = error_of(model_of(nn.Sequential(linear(), linear(10, 10)), loss), *digits)
    assert told.startswith(
        f"the loss of {STEP} is finite, but the gradient of '1.weight' is nan. It began in the loss "
    )


def test_sparse_gradients_and_scripted_layers_go_through(digits):
    x, y = digits
    layers = nn.Embedding(17, 4, sparse=True), nn.Flatten(), torch.jit.script(nn.Linear(256, 10))
    model = model_of(nn.Sequential(*layers))
    with kt.debug_nan():
        model.fit((x * 16).long(), y, verbose=0)
    assert_nothing_left(model)


def test_other_callbacks_do_not_see_what_is_not_finite(digits):
    class Sees(kt.Callback):
        seen = 0

        def on_before_backward(self, loss: Tensor) -> None:
            self.seen += 1

    sees = Sees()
    error_of(model_of(nn.Sequential(linear(), Function(lambda x: -x), Log())), *digits, callbacks=sees)
    assert sees.seen == 0


def test_a_switch_can_be_used_again():
    switch = kt.debug_nan()
    kt.debug_nan(False)
    with switch:
        assert debugging.is_on()
    assert not debugging.is_on()


def test_the_module_can_be_exported_meanwhile(digits, tmp_path):
    broken = False

    class Exports(kt.Callback):
        def on_train_batch_begin(self, batch: int, logs=None) -> None:
            nonlocal broken
            if batch == 1:
                self.model.export(tmp_path / "net.pt2", (3, 64))
                broken = True

    model = model_of(nn.Sequential(linear(), Function(lambda x: x / 0 if broken else x)))
    told = error_of(model, *digits, callbacks=Exports())
    assert told.startswith("the loss of step 2 (epoch 1, batch 2, counted from 1) is nan. It began in '1' (Function), ")
    assert torch.export.load(tmp_path / "net.pt2").module()(digits[0][:5]).shape == (5, 10)


def test_nothing_of_a_graph_is_alive_after_the_error_even_where_the_module_keeps_some(digits):
    """No garbage collector sees a cycle through the hooks of a graph: what is in one stays until the process ends."""

    def failed() -> weakref.ref:
        module, kept = nn.Sequential(linear(), Function(lambda x: kept.append(x) or x / (len(kept) != 3))), []
        error_of(model_of(module), *digits)
        assert len(kept) == 3 and graph_tensors() >= before + 3
        return weakref.ref(module)

    gc.collect()
    before = graph_tensors()
    module = failed()
    gc.collect()
    assert module() is None and graph_tensors() == before


def graph_tensors() -> int:
    return sum(type(one) is Tensor and one.grad_fn is not None for one in gc.get_objects())
