"""Programs that `model.export` writes: read by torch.export and onnxruntime alone, they return what predict does."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kerastorch as kt
from kerastorch import export as exporting

HAS_ONNX = all(importlib.util.find_spec(name) for name in exporting.ONNX_PACKAGES)
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript and onnxruntime are not installed")
FORMATS = [".pt2", pytest.param(".onnx", marks=needs_onnx)]


class Pixels(nn.Module):
    """Embedding, attention and pooling over the 64 pixels of a digit, as tokens from 0 to 16."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.recurrent(images.reshape(-1, 8, 8))[0][:, -1])


class Named(nn.Module):
    """Two inputs by name, several outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(17, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> dict:
        hidden = self.layer(self.embedding(tokens)) * mask[..., None]
        return {"scores": hidden.mean(1), "parts": [hidden.amax(1), mask], "mask": mask.sum(1)}


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, -1) * 2


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class ByValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def trained(module: nn.Module, x: Tensor, y: Tensor) -> kt.Model:
    model = kt.Model(module, backend="cpu").compile("adam", "cross_entropy", lr=0.01)
    model.fit(x, y, epochs=2, verbose=0)
    return model


def run(path: str, *inputs: Tensor) -> list[np.ndarray]:
    """What any user of torch or onnxruntime would write."""
    if path.endswith(".pt2"):
        outputs = torch.export.load(path).module()(*inputs)
        return [leaf.detach().numpy() for leaf in torch.utils._pytree.tree_leaves(outputs)]
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})


def assert_untouched(folder) -> None:
    assert os.listdir(folder) == []


@pytest.fixture
def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(4 * 36, 10),
    )


@pytest.mark.parametrize("ending", FORMATS)
def test_a_trained_network_predicts_the_same_from_its_file(digits, convolutional, tmp_path, ending):
    x, y = digits
    model, path = trained(convolutional, x, y), str(tmp_path / f"net{ending}")
    assert model.export(path, x) is None
    for samples in (1, 7, 150):
        expected = model.predict(x[:samples].numpy(), verbose=0)
        np.testing.assert_allclose(run(path, x[:samples])[0], expected, atol=2e-6)
    assert os.listdir(tmp_path) == [f"net{ending}"]


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("make", [Pixels, Rows])
def test_attention_embeddings_and_recurrent_layers_take_any_batch(digits, tmp_path, ending, make):
    x, y = digits
    x = (x * 16).long() if make is Pixels else x
    model, path = trained(make(), x, y), str(tmp_path / f"net{ending}")
    model.export(path, x[:4])
    for samples in (1, 11):
        expected = model.predict(x[:samples], verbose=0)
        np.testing.assert_allclose(run(path, x[:samples])[0], expected, atol=2e-6)
    model.fit(x, y, verbose=0)  # on weights that are still its own


@pytest.mark.parametrize("ending", FORMATS)
def test_inputs_and_outputs_may_be_several_and_have_names(tmp_path, ending):
    model, path = kt.Model(Named(), backend="cpu"), str(tmp_path / f"net{ending}")
    data = {"tokens": torch.randint(17, (3, 5)), "mask": torch.rand(3, 5)}
    model.export(path, data)
    expected = model.predict({name: tensor[:2] for name, tensor in data.items()}, verbose=0)
    parts = [expected["scores"], *expected["parts"], expected["mask"]]
    if ending == ".pt2":
        found = torch.export.load(path).module()(**{name: tensor[:2] for name, tensor in data.items()})
        assert list(found) == ["scores", "parts", "mask"]
        found = [found["scores"], *found["parts"], found["mask"]]
    else:
        found = run(path, data["tokens"][:2], data["mask"][:2])
        session = __import__("onnxruntime").InferenceSession(path)
        assert [(one.name, one.shape) for one in session.get_inputs()] == [
            ("tokens", ["batch", 5]),
            ("mask", ["batch", 5]),
        ]
        assert [one.name for one in session.get_outputs()] == ["scores", "parts_0", "parts_1", "mask_output"]
    for one, other in zip(found, parts, strict=True):
        np.testing.assert_allclose(np.asarray(one.detach() if ending == ".pt2" else one), other, atol=1e-6)


@needs_onnx
@pytest.mark.parametrize(
    "module, shape, names",
    [
        (nn.Linear(4, 2), (3, 4), ["output"]),
        (nn.LSTM(4, 2, batch_first=True), (3, 5, 4), ["output_0", "output_1", "output_2"]),
    ],
)
def test_outputs_without_names_are_numbered(tmp_path, module, shape, names):
    kt.Model(module, backend="cpu").export(tmp_path / "net.onnx", shape)
    session = __import__("onnxruntime").InferenceSession(str(tmp_path / "net.onnx"))
    assert [one.name for one in session.get_outputs()] == names
    assert session.get_inputs()[0].shape == ["batch", *shape[1:]]


class Sum(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left + 2 * right


@pytest.mark.parametrize(
    "data",
    [
        ((3, 4), (3, 4)),
        (torch.rand(3, 4), torch.rand(3, 4)),
        [np.ones((3, 4), np.float32), np.ones((3, 4), np.float32)],
        {"left": (3, 4), "right": np.ones((3, 4))},
    ],
    ids=["shapes", "tensors", "arrays", "mixed"],
)
def test_a_batch_has_the_forms_that_predict_and_summary_take(tmp_path, data):
    kt.Model(Sum(), backend="cpu").export(tmp_path / "net.pt2", data)
    left, right = torch.rand(2, 4), torch.rand(2, 4)
    inputs = {"left": left, "right": right} if isinstance(data, dict) else {}
    program = torch.export.load(tmp_path / "net.pt2").module()
    assert torch.equal(program(**inputs) if inputs else program(left, right), left + 2 * right)


def test_pairs_of_inputs_and_targets_and_loaders_give_their_inputs(digits, classifier, tmp_path):
    x, y = digits
    model = kt.Model(classifier, backend="cpu")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    for number, data in enumerate([(x, y), loader, x.tolist()]):
        model.export(tmp_path / f"{number}.pt2", data)
        assert np.allclose(run(str(tmp_path / f"{number}.pt2"), x[:3])[0], model.predict(x[:3], verbose=0), atol=1e-6)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_batch_size_that_forward_has_in_it_is_said_and_can_be_kept(tmp_path, ending):
    model, path = kt.Model(Fixed(), backend="cpu"), str(tmp_path / f"net{ending}")
    with pytest.raises(ValueError) as caught:
        model.export(path, (4, 2))
    assert str(caught.value) == (
        "Fixed does not take batches of every size: You marked batch as dynamic but your code specialized it to be a "
        "constant (4). Have forward take the size from its input, as x.shape[0] or -1, or give dynamic_batch=False for "
        "a program that takes batches of 4 samples alone."
    )
    assert_untouched(tmp_path)
    model.export(path, (4, 2), dynamic_batch=False)
    x = torch.rand(4, 2)
    assert np.allclose(run(path, x)[0], 2 * x)
    with pytest.raises(Exception, match="4"):
        run(path, torch.rand(5, 2))


@pytest.mark.parametrize("samples", [1, 40])
def test_without_a_dynamic_batch_it_is_that_of_the_data(classifier, tmp_path, samples):
    kt.Model(classifier, backend="cpu").export(tmp_path / "net.pt2", torch.rand(samples, 64), dynamic_batch=False)
    assert run(str(tmp_path / "net.pt2"), torch.rand(samples, 64))[0].shape == (samples, 10)
    with pytest.raises(Exception, match=str(samples)):
        run(str(tmp_path / "net.pt2"), torch.rand(samples + 1, 64))


@pytest.mark.parametrize("ending", FORMATS)
def test_a_program_that_returns_something_else_is_no_file(tmp_path, ending):
    path = tmp_path / f"net{ending}"
    path.write_text("the one before")
    with pytest.raises(ValueError, match=r"was not written: for a batch of 3 the program returns what differs from "):
        kt.Model(Random(), backend="cpu").export(path, torch.zeros(3, 2))
    assert path.read_text() == "the one before" and os.listdir(tmp_path) == [path.name]
    kt.Model(Random(), backend="cpu").export(path, torch.zeros(3, 2), check=False)
    assert run(str(path), torch.zeros(5, 2))[0].shape == (5, 2)
    kt.Model(Random(), backend="cpu").export(path, torch.zeros(3, 2), tolerance=1.0)


def altered(monkeypatch, change) -> None:
    """Has the program that is read back return something else."""
    write, load = exporting.FORMATS[".pt2"]
    changed = lambda path: lambda x: change(load(path)(x), len(x))  # noqa: E731
    monkeypatch.setitem(exporting.FORMATS, ".pt2", (write, changed))


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda found, samples: [found[0] + 2e-5], "of 3 .* by up to 2e-05, and only 1e-05 is rounding"),
        (lambda found, samples: [found[0] + (samples == 4)], "of 4 .* by up to 1, and"),
        (lambda found, samples: [found[0] + (samples == 1)], "of 1 .* by up to 1, and"),
        (lambda found, samples: [found[0] * torch.nan], "of 3 .* by up to nan, and"),
        (lambda found, samples: [found[0] / 0], "of 3 .* by up to inf, and"),
        (
            lambda found, samples: [found[0][:, :1]],
            r"of 3 .* returns shapes \(3, 1\), where the module ret.* \(3, 2\)\.",
        ),
        (
            lambda found, samples: found * 2,
            r"of 3 .* returns shapes \(3, 2\), \(3, 2\), where the module returns \(3, 2\)\.",
        ),
        (lambda found, samples: 1 / 0, r"of 3 the program fails: division by zero\."),
    ],
)
def test_every_difference_is_found(tmp_path, monkeypatch, change, told):
    altered(monkeypatch, change)
    with pytest.raises(ValueError, match=f"'{tmp_path}/net.pt2' was not written: for a batch {told}"):
        kt.Model(nn.Hardtanh(), backend="cpu").export(tmp_path / "net.pt2", torch.full((3, 2), 0.5))
    assert_untouched(tmp_path)


def test_rounding_is_none_and_of_large_outputs_there_is_more(tmp_path, monkeypatch):
    altered(monkeypatch, lambda found, samples: [found[0] + 5e-6])
    kt.Model(nn.ReLU(), backend="cpu").export(tmp_path / "net.pt2", torch.rand(3, 2))
    altered(monkeypatch, lambda found, samples: [found[0] + 5e-4])
    kt.Model(nn.ReLU(), backend="cpu").export(tmp_path / "net.pt2", torch.full((3, 2), 100.0))
    with pytest.raises(ValueError, match="only 1e-07 is rounding"):
        kt.Model(nn.ReLU(), backend="cpu").export(tmp_path / "net.pt2", torch.full((3, 2), 1.0), tolerance=1e-7)


def test_nan_where_the_module_has_nan_is_the_same(tmp_path):
    with pytest.warns(UserWarning, match="NaN"):
        kt.Model(nn.ReLU(), backend="cpu").export(tmp_path / "net.pt2", torch.tensor([[1.0, torch.nan, torch.inf]] * 2))
    assert (tmp_path / "net.pt2").exists()


def test_what_cannot_be_read_back_is_no_file(tmp_path, monkeypatch):
    monkeypatch.setitem(exporting.FORMATS, ".pt2", (exporting.FORMATS[".pt2"][0], lambda path: 1 / 0))
    with pytest.raises(ValueError) as caught:
        kt.Model(nn.ReLU(), backend="cpu").export(tmp_path / "net.pt2", (3, 2))
    assert str(caught.value) == (
        f"'{tmp_path}/net.pt2' was not written: the program cannot be loaded: division by zero. Give check=False to "
        f"have it as it is."
    )
    assert_untouched(tmp_path)


@pytest.mark.parametrize("ending", FORMATS)
def test_what_goes_by_values_cannot_be_exported(tmp_path, ending, capfd):
    with pytest.raises(
        ValueError, match=r"^torch.export cannot make a program of ByValue: .*ata-dependent .*leave torch"
    ):
        kt.Model(ByValue(), backend="cpu").export(tmp_path / f"net{ending}", (3, 2))
    assert_untouched(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_mistakes_of_forward_are_raised_as_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        kt.Model(nn.Linear(4, 2), backend="cpu").export(tmp_path / "net.pt2", (3, 5))
    assert_untouched(tmp_path)


def test_other_endings_and_no_shapes_are_refused(tmp_path):
    model = kt.Model(nn.Linear(4, 2), backend="cpu")
    with pytest.raises(ValueError) as caught:
        model.export("net.pt", (3, 4))
    assert str(caught.value) == (
        "'net.pt' ends neither in '.pt2', for torch.export, nor in '.onnx'. Give 'net.pt2' or 'net.onnx'."
    )
    with pytest.raises(ValueError, match=r"^shape \(0, 4\) has a size below 1\. Give the sizes of one batch"):
        model.export(tmp_path / "net.pt2", (0, 4))
    with pytest.raises(ValueError, match="^the module is lazy and has no shapes yet. Call predict or fit first"):
        kt.Model(nn.LazyLinear(2), backend="cpu").export(tmp_path / "net.pt2", (3, 4))
    assert_untouched(tmp_path)


def test_missing_packages_are_named_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "ONNX_PACKAGES", ("no_onnx", "torch", "no_script"))
    with pytest.raises(ImportError) as caught:
        kt.Model(nn.Linear(4, 2), backend="cpu").export("net.onnx", object())
    assert str(caught.value) == "'net.onnx' needs no_onnx, no_script. Run: pip install kerastorch[onnx]"
    kt.Model(nn.Linear(4, 2), backend="cpu").export(tmp_path / "net.pt2", (3, 4))


@needs_onnx
def test_more_than_one_file_of_onnx_can_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "ONNX_BYTES", 40)
    with pytest.raises(ValueError, match=r"^the weights take 40 bytes, and an .onnx file holds 40\. Export to .pt2\.$"):
        kt.Model(nn.Linear(4, 2), backend="cpu").export(tmp_path / "net.onnx", (3, 4))
    assert_untouched(tmp_path)


@needs_onnx
def test_what_onnxruntime_has_not_is_said(tmp_path):
    model = kt.Model(nn.Linear(4, 2).bfloat16(), backend="cpu")
    with pytest.raises(ValueError, match=r"the program cannot be loaded: .*NOT_IMPLEMENTED.* Give check=False"):
        model.export(tmp_path / "net.onnx", (3, 4))
    assert_untouched(tmp_path)
    model.export(tmp_path / "net.onnx", (3, 4), check=False)
    model.export(tmp_path / "net.pt2", (3, 4))


class Counting(nn.Module):
    """Changes a buffer and draws a random number that it does not use, whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(64, 10), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        torch.rand(1)
        return self.dropout(self.layer(x))


@pytest.mark.parametrize("ending", FORMATS)
def test_the_module_is_as_it_was(digits, tmp_path, ending):
    x, y = digits
    model = trained(Counting(), x, y)
    module = model.module.train()
    module.layer.eval()
    module.layer.bias.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    random, numbers, weight = torch.get_rng_state(), np.random.get_state()[1].copy(), module.layer.weight
    levels = [logging.getLogger(name).level for name in exporting.CHATTY]
    model.export(tmp_path / f"net{ending}", x)
    with pytest.raises(ValueError, match="only -1 is rounding"):
        model.export(tmp_path / f"net{ending}", x / 100, tolerance=-1.0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and (np.random.get_state()[1] == numbers).all()
    assert [part.training for part in module.modules()] == [True, False, True]
    assert module.layer.weight is weight and weight.requires_grad and not module.layer.bias.requires_grad
    assert weight.grad is None and torch.backends.mha.get_fastpath_enabled()
    assert levels == [logging.getLogger(name).level for name in exporting.CHATTY]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("ending", FORMATS)
def test_nothing_is_said_but_what_the_module_warns_of(tmp_path, ending, capfd, caplog):
    class Warning_(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("this one is old", UserWarning, stacklevel=1)
            return super().forward(x)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        kt.Model(Rows(), backend="cpu").export(tmp_path / f"rows{ending}", (3, 64))
        assert [str(one.message) for one in seen] == []
        kt.Model(Warning_(4, 2), backend="cpu").export(tmp_path / f"net{ending}", (3, 4))
    assert {str(one.message) for one in seen} == {"this one is old"}
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


def test_no_value_of_the_data_is_in_the_file(tmp_path):
    secret = torch.full((40, 64), 0.123)
    kt.Model(nn.Linear(64, 2), backend="cpu").export(tmp_path / "net.pt2", secret)
    with zipfile.ZipFile(tmp_path / "net.pt2") as file:
        assert not any(secret[0, :1].numpy().tobytes() in file.read(name) for name in file.namelist())


def test_it_is_the_module_without_the_precision_it_was_compiled_with(digits, classifier, tmp_path):
    x, y = digits
    model = kt.Model(classifier, backend="cpu").compile("adam", "cross_entropy", precision="bf16")
    model.fit(x, y, verbose=0)
    model.export(tmp_path / "net.pt2", x)
    classifier.eval()
    assert np.allclose(run(str(tmp_path / "net.pt2"), x)[0], classifier(x).detach(), atol=1e-6)
    assert not np.allclose(run(str(tmp_path / "net.pt2"), x)[0], model.predict(x, verbose=0), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ending", FORMATS)
def test_weights_keep_their_dtype(tmp_path, dtype, ending):
    module = nn.Linear(4, 2).to(dtype)
    check = (ending, dtype) != (".onnx", torch.bfloat16)  # which onnxruntime has not on the CPU
    kt.Model(module, backend="cpu").export(tmp_path / f"net{ending}", (3, 4), check=check)
    if check:
        x = torch.rand(5, 4).to(dtype)
        found = torch.as_tensor(run(str(tmp_path / f"net{ending}"), x)[0]) if dtype != torch.bfloat16 else None
        assert found is None or (found.dtype == dtype and torch.allclose(found, module(x), atol=1e-3))


def test_it_may_be_called_by_a_callback_in_the_middle_of_a_run(digits, classifier, tmp_path):
    x, y = digits
    weights = {}
    for name in ("exporting", "plain"):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 10))
        model = kt.Model(module, backend="cpu").compile("adam", "cross_entropy")
        export = lambda epoch, logs: model.export(tmp_path / f"{epoch}.pt2", x)  # noqa: B023, E731
        callbacks = kt.callbacks.LambdaCallback(on_epoch_end=export) if name == "exporting" else None
        model.fit(x, y, epochs=2, callbacks=callbacks, verbose=0)
        weights[name] = module.state_dict()
    assert sorted(os.listdir(tmp_path)) == ["0.pt2", "1.pt2"]
    assert all(torch.equal(tensor, weights["plain"][name]) for name, tensor in weights["exporting"].items())


def test_a_compiled_module_is_exported_as_what_it_wraps(classifier, tmp_path):
    model = kt.Model(torch.compile(classifier, backend="eager"), backend="cpu")
    model.export(tmp_path / "net.pt2", (3, 64))
    x = torch.rand(5, 64)
    assert np.allclose(run(str(tmp_path / "net.pt2"), x)[0], classifier(x).detach(), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("ending", FORMATS)
def test_from_a_gpu_the_file_is_for_the_cpu(digits, convolutional, tmp_path, ending):
    x, y = digits
    model = kt.Model(convolutional, backend="cuda").compile("adam", "cross_entropy")
    model.fit(x, y, verbose=0)
    model.export(tmp_path / f"net{ending}", x)
    assert np.allclose(
        run(str(tmp_path / f"net{ending}"), x)[0], convolutional.eval()(x.cuda()).cpu().detach(), atol=1e-2
    )
    assert all(parameter.is_cuda for parameter in convolutional.parameters())
