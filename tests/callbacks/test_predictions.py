"""Predictions: files hold what `predict` returns, whatever the outputs are, and are named when they are whole."""

from __future__ import annotations

import io
import weakref
from collections import namedtuple

import numpy as np
import pytest
import torch
from numpy.lib import format as npy
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import Predictions

X = torch.rand(10, 4)


class Net(nn.Module):
    """Returns what a function makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.function, self.linear = function, nn.Linear(4, 3)

    def forward(self, x):
        return self.function(self.linear(x))


def predict(function, path, data=X, *callbacks, batch_size=4, **options):
    model = kt.Model(Net(function), backend="cpu")
    callbacks = [Predictions(path), *callbacks]
    return model.predict(data, callbacks=callbacks, batch_size=batch_size, verbose=0, **options)


def read(path):
    array = np.load(path, mmap_mode="r")
    assert isinstance(array, np.memmap)
    return torch.from_numpy(np.array(array))


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 99])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x,
        lambda x: x.double(),
        lambda x: x.half(),
        lambda x: x.argmax(1),
        lambda x: x > 0,
        lambda x: x.to(torch.complex64) * 1j,
        lambda x: x[..., None].expand(-1, -1, 5).transpose(1, 2),
        lambda x: x[:, :0],
        lambda x: (x * 100).to(torch.uint8),
    ],
    ids=["floats", "doubles", "halves", "classes", "truth values", "complex", "strided", "none", "bytes"],
)
def test_a_file_holds_what_predict_returns(tmp_path, function, batch_size):
    path = tmp_path / "outputs.npy"
    outputs = predict(function, path, batch_size=batch_size)
    assert torch.equal(read(path), outputs) and read(path).dtype == outputs.dtype
    assert np.load(path).flags.c_contiguous and names(tmp_path) == ["outputs.npy"]


def test_bfloat16_is_written_as_float32(tmp_path):
    outputs = predict(lambda x: x.bfloat16(), tmp_path / "a.npy")
    assert torch.equal(read(tmp_path / "a.npy"), outputs.float())


def test_a_scalar_for_each_batch_is_a_row_each(tmp_path):
    outputs = predict(lambda x: x.sum(), tmp_path / "a.npy")
    assert torch.equal(read(tmp_path / "a.npy"), outputs) and len(outputs) == 3


@pytest.mark.parametrize(
    "data",
    [X.numpy(), [X[:3], X[3:]], lambda: iter([X[:3], X[3:5], X[5:]]), torch.utils.data.DataLoader(X, 3)],
    ids=["numpy", "list", "callable", "loader"],
)
def test_rows_are_in_the_order_of_the_inputs(tmp_path, data):
    outputs = predict(lambda x: x, tmp_path / "a.npy", data, batch_size=None)
    assert torch.equal(read(tmp_path / "a.npy"), torch.as_tensor(outputs)) and len(outputs) == 10


def test_so_many_batches_are_so_many_rows(tmp_path):
    predict(lambda x: x, tmp_path / "a.npy", steps=2)
    assert len(read(tmp_path / "a.npy")) == 8


Pair = namedtuple("Pair", ["mean", "scale"])


@pytest.mark.parametrize(
    ("function", "files"),
    [
        (lambda x: x, {"outputs": lambda out: out}),
        (lambda x: (x, x.argmax(1)), {"0": lambda out: out[0], "1": lambda out: out[1]}),
        (lambda x: [x, None, x + 1], {"0": lambda out: out[0], "2": lambda out: out[2]}),
        (lambda x: Pair(x, x.exp()), {"0": lambda out: out.mean, "1": lambda out: out.scale}),
        (
            lambda x: {"logits": x, "state": (x + 1, {"deep": x + 2})},
            {
                "logits": lambda out: out["logits"],
                "state.0": lambda out: out["state"][0],
                "state.1.deep": lambda out: out["state"][1]["deep"],
            },
        ),
        (
            lambda x: {"a/b": x, "c.d": x + 1, "c": {"d": x + 2}, "..": x + 3, 5: x + 4, "e f": x + 5},
            {
                "a%2Fb": lambda out: out["a/b"],
                "c%2Ed": lambda out: out["c.d"],
                "c.d": lambda out: out["c"]["d"],
                "%2E%2E": lambda out: out[".."],
                "5": lambda out: out[5],
                "e f": lambda out: out["e f"],
            },
        ),
    ],
    ids=["one", "tuple", "list", "namedtuple", "nested", "odd keys"],
)
def test_a_folder_has_a_file_for_each_output(tmp_path, function, files):
    folder = tmp_path / "deep" / "outputs"
    outputs = predict(function, folder)
    assert names(folder) == sorted(f"{name}.npy" for name in files)
    for name, part in files.items():
        assert torch.equal(read(folder / f"{name}.npy"), part(outputs))


def test_files_that_are_there_are_replaced(tmp_path):
    callback, model = Predictions(tmp_path / "a.npy"), kt.Model(Net(lambda x: x), backend="cpu")
    for rows in (10, 3, 7):
        outputs = model.predict(X[:rows], callbacks=callback, verbose=0)
        assert torch.equal(read(tmp_path / "a.npy"), outputs) and len(outputs) == rows


def test_a_path_may_be_text(tmp_path):
    outputs = predict(lambda x: x, str(tmp_path / "a.npy"))
    assert torch.equal(read(tmp_path / "a.npy"), outputs)


def test_the_model_says_where_a_file_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(kt.Model, "path_for", lambda self, path: tmp_path / "elsewhere" / "b.npy")
    outputs = predict(lambda x: x, tmp_path / "a.npy")
    assert torch.equal(read(tmp_path / "elsewhere" / "b.npy"), outputs)
    assert names(tmp_path) == ["elsewhere", "elsewhere/b.npy"]


def test_room_is_left_in_the_header_for_any_number_of_rows():
    lengths = set()
    for rows in (0, 1, 10**6, 10**18):
        header = io.BytesIO()
        npy.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (rows, 3)})
        lengths.add(header.tell())
    assert len(lengths) == 1


def test_nothing_has_its_name_before_all_is_written(tmp_path):
    class Look(kt.Callback):
        def on_predict_batch_end(self, batch, logs=None):
            seen.append(names(tmp_path))

    seen = []
    predict(lambda x: x, tmp_path / "a.npy", X, Look())
    assert seen == [["a.npy.partial"]] * 3 and names(tmp_path) == ["a.npy"]


class Fail(kt.Callback):
    def __init__(self, at):
        self.at = at

    def on_predict_batch_begin(self, batch, logs=None):
        if batch == self.at:
            raise RuntimeError("on purpose")


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("name", ["a.npy", "folder"])
def test_an_error_leaves_what_was_there_and_no_half_file(tmp_path, name, at):
    function = (lambda x: x) if name == "a.npy" else lambda x: (x, x + 1)
    before = predict(function, tmp_path / name)
    files = names(tmp_path)
    with pytest.raises(RuntimeError, match="on purpose"):
        predict(function, tmp_path / name, X + 1, Fail(at))
    assert names(tmp_path) == files
    if name == "a.npy":
        assert torch.equal(read(tmp_path / name), before)
    else:
        assert torch.equal(read(tmp_path / name / "1.npy"), before[1])


def test_a_file_that_cannot_be_finished_leaves_no_half_ones(tmp_path):
    (tmp_path / "folder" / "1.npy").mkdir(parents=True)
    with pytest.raises(OSError):
        predict(lambda x: (x, x, x), tmp_path / "folder")
    assert "partial" not in "".join(names(tmp_path))


def test_a_file_that_cannot_be_made_leaves_no_half_ones(tmp_path):
    (tmp_path / "folder" / "1.npy.partial").mkdir(parents=True)
    with pytest.raises(OSError):
        predict(lambda x: (x, x, x), tmp_path / "folder")
    assert names(tmp_path / "folder") == ["1.npy.partial"]


def test_after_an_error_the_callback_can_go_on(tmp_path):
    callback, model = Predictions(tmp_path / "a.npy"), kt.Model(Net(lambda x: x), backend="cpu")
    with pytest.raises(RuntimeError, match="on purpose"):
        model.predict(X, callbacks=[callback, Fail(1)], batch_size=4, verbose=0)
    outputs = model.predict(X, callbacks=callback, batch_size=4, verbose=0)
    assert torch.equal(read(tmp_path / "a.npy"), outputs)


def test_memory_does_not_grow_with_what_is_written_where_nothing_is_returned(tmp_path):
    class Look(kt.Callback):
        def on_predict_batch_end(self, batch, logs=None):
            alive.append(sum(reference() is not None for reference in references))
            references.append(weakref.ref(logs["outputs"]))

    references, alive = [], []
    model, path = kt.Model(Net(lambda x: x), backend="cpu"), tmp_path / "a.npy"
    options = {"batch_size": 1, "verbose": 0}
    assert model.predict(X, callbacks=[Predictions(path, in_memory=False), Look()], **options) is None
    assert len(alive) == 10 and max(alive) <= 1
    assert torch.equal(read(path), model.predict(X, callbacks=Predictions(path), **options))


def test_data_without_a_batch_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="the data is empty"):
        predict(lambda x: x, tmp_path / "a.npy", [], batch_size=None)
    assert names(tmp_path) == []


# Mistakes.


class Changing:
    """Outputs that are different in the second batch."""

    def __init__(self, first, then):
        self.outputs = iter((first, then, then))

    def __call__(self, x):
        return next(self.outputs)(x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            Changing(lambda x: x, lambda x: x[:, :2]),
            r"batch 1 has outputs of shape \(samples, 2\) and dtype float32, those before had \(samples, 3\)",
        ),
        (Changing(lambda x: x, lambda x: x.double()), r"dtype float64, those before had \(samples, 3\) and float32"),
        (
            Changing(lambda x: {"a": x}, lambda x: {"a": x, "b": x}),
            r"batch 1 has outputs \['a', 'b'\], those before had \['a'\]",
        ),
    ],
)
def test_outputs_that_change_are_refused(tmp_path, function, message):
    with pytest.raises(ValueError, match=message):
        predict(function, tmp_path / "folder")
    assert names(tmp_path / "folder") == []


def test_several_outputs_do_not_fit_into_one_file(tmp_path):
    with pytest.raises(ValueError, match=r"one file, '.*a.npy', for outputs logits, state.0. Give a folder"):
        predict(lambda x: {"logits": x, "state": (x,)}, tmp_path / "a.npy")
    assert names(tmp_path) == []


def test_outputs_that_are_no_tensors_are_refused(tmp_path):
    with pytest.raises(TypeError, match="the module returned a str in its output, expected tensors only"):
        predict(lambda x: (x, "text"), tmp_path / "folder")
    assert names(tmp_path / "folder") == []


class Untouched(nn.Module):
    def forward(self, x):
        raise AssertionError("predicted")


@pytest.mark.parametrize("name", ["file/a.npy", "file/folder", "file"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_predicting(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Predictions cannot write to .*Give a folder that can be written to"):
        kt.Model(Untouched(), backend="cpu").predict(X, callbacks=Predictions(tmp_path / name), verbose=0)


def test_so_is_a_folder_where_a_file_is_meant(tmp_path):
    (tmp_path / "a.npy").mkdir()
    with pytest.raises(IsADirectoryError, match=r"Predictions cannot write to .*a.npy': it is a folder"):
        kt.Model(Untouched(), backend="cpu").predict(X, callbacks=Predictions(tmp_path / "a.npy"), verbose=0)


@pytest.mark.parametrize("path", [None, 3, True])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(TypeError, match=f"path={path} is a {type(path).__name__}, expected a file or folder"):
        Predictions(path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_what_a_gpu_predicts_is_written(tmp_path):
    model = kt.Model(Net(lambda x: x), backend="gpu")
    outputs = model.predict(X, batch_size=4, callbacks=Predictions(tmp_path / "a.npy"), verbose=0)
    assert torch.equal(read(tmp_path / "a.npy"), outputs)
