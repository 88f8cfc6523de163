"""The mean of several files: each number by hand, and which file does not belong."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch import averages, checkpoint
from tests.test_checkpoint import FIT, compiled


def written(folder, *weights):
    paths = [folder / f"{number}.safetensors" for number in range(len(weights))]
    for path, one in zip(paths, weights, strict=True):
        checkpoint.write_weights(path, one)
    return paths


def alike(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize("endings", [("pt", "pt", "pt"), ("safetensors",) * 3, ("pt", "safetensors", "pt")])
def test_the_epochs_of_a_run_are_averaged(tmp_path, classifier, digits, endings):
    class Save(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.save(tmp_path / f"{epoch}.pt")
            self.model.save_weights(tmp_path / f"{epoch}.safetensors")
            weights.append({name: tensor.clone() for name, tensor in self.model.module.state_dict().items()})

    weights, model = [], compiled(nn.Sequential(classifier, nn.BatchNorm1d(10)), optimizer="adam")
    model.fit(*digits, epochs=3, callbacks=Save(), **FIT)
    mean = {name: (sum(one[name].double() for one in weights) / 3).float() for name in weights[0]}
    mean["1.num_batches_tracked"] = torch.tensor(15)  # of the last, not the mean of 5, 10 and 15
    paths = [tmp_path / f"{epoch}.{ending}" for epoch, ending in enumerate(endings)]
    found = kt.average_checkpoints(iter(paths), output=tmp_path / "new" / "mean.safetensors")
    assert alike(found, mean)
    assert alike(checkpoint.read_weights(tmp_path / "new" / "mean.safetensors"), mean)
    assert alike(model.load_weights(tmp_path / "new" / "mean.safetensors").module.state_dict(), mean)


def test_without_an_output_nothing_is_written(tmp_path):
    paths = written(tmp_path, {"a": torch.ones(2)})
    assert torch.equal(kt.average_checkpoints(map(str, paths))["a"], torch.ones(2))
    assert os.listdir(tmp_path) == ["0.safetensors"]


def test_it_is_added_up_in_double_precision(tmp_path):
    """In half precision 2048 + 1 is 2048, and the mean of large numbers is infinite."""
    numbers = [2048.0, 1.0, 1.0, 1.0], [60000.0] * 4
    weights = [{"a": torch.tensor([first, second]).half()} for first, second in zip(*numbers, strict=True)]
    found = kt.average_checkpoints(written(tmp_path, *weights))["a"]
    assert found.dtype == torch.float16 and found.tolist() == [torch.tensor(2051 / 4).half().item(), 60000.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_every_kind_of_float_is_averaged(tmp_path, dtype):
    paths = written(tmp_path, *({"a": torch.tensor([number, 2.0]).to(dtype)} for number in (0.0, 1.0, 2.0)))
    found = kt.average_checkpoints(paths)["a"]
    assert found.dtype == dtype and found.to(torch.complex128).tolist() == [1, 2]


@pytest.mark.parametrize(
    "value", [torch.tensor([3, 4]), torch.tensor([True, False]), torch.tensor(5, dtype=torch.uint8)]
)
def test_what_is_no_float_is_the_last_files(tmp_path, value):
    first = torch.zeros_like(value)
    assert torch.equal(kt.average_checkpoints(written(tmp_path, {"a": first}, {"a": value}))["a"], value)


def test_the_files_are_as_they_were(tmp_path):
    """Also in double precision, in which the sum begins with what was read."""
    paths = written(tmp_path, {"a": torch.ones(3).double()}, {"a": torch.zeros(3).double()})
    before = [path.read_bytes() for path in paths]
    kt.average_checkpoints(paths)
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": torch.ones(2)}, "has nothing as 'b' and '{first}' has float32 of shape (1,), with 1 tensors"),
        (
            {"a": torch.ones(2), "b": torch.ones(1), "c": torch.ones(1)},
            "has float32 of shape (1,) as 'c' and '{first}' has nothing, with 1 tensors",
        ),
        (
            {"a": torch.ones(2, 1), "b": torch.ones(2)},
            "has float32 of shape (2, 1) as 'a' and '{first}' has float32 of shape (2,), with 2 tensors",
        ),
        (
            {"a": torch.ones(2).bfloat16(), "b": torch.ones(1)},
            "has bfloat16 of shape (2,) as 'a' and '{first}' has float32 of shape (2,), with 1 tensors",
        ),
    ],
)
def test_a_file_of_another_model_is_named(tmp_path, other, message):
    own = {"a": torch.ones(2), "b": torch.ones(1)}
    paths = written(tmp_path, own, own, other)
    with pytest.raises(ValueError) as caught:
        kt.average_checkpoints(paths, tmp_path / "mean.safetensors")
    assert str(caught.value) == (f"'{paths[2]}' {message.format(first=paths[0])} that differ. Give files of one model.")
    assert not (tmp_path / "mean.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ValueError, r"^paths is empty\. Give at least one file\.$"),
        (("a.pt",), TypeError, r"^paths='a\.pt' is one path\. Give a list of them\.$"),
        ((["a.pt"],), FileNotFoundError, "there is no file 'a.pt'. Give the path of one that was saved"),
        ((["a.pt"], "mean.pt"), ValueError, "'mean.pt' ends as pickled files do. Give 'mean.safetensors', which says"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read(arguments, error, message):
    with pytest.raises(error, match=message):
        kt.average_checkpoints(*arguments)


def test_tied_weights_are_added_once(tmp_path):
    """In double precision the sum could be one memory too."""
    for number in range(2):
        weight = torch.full((3,), 1.0 + 3 * number).double()
        checkpoint.write(tmp_path / f"{number}.pt", {"module": {"a": weight, "tied": weight}})
    found = kt.average_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"])
    assert found["a"].tolist() == found["tied"].tolist() == [2.5] * 3


def test_what_is_no_tensor_has_no_mean(tmp_path):
    checkpoint.write(tmp_path / "a.pt", {"module": {"_extra_state": {"scale": 2}}})
    with pytest.raises(TypeError, match="'_extra_state' is a dict, and safetensors holds dense tensors alone"):
        kt.average_checkpoints([tmp_path / "a.pt"])


def test_an_output_that_is_one_of_the_files_takes_its_place(tmp_path):
    paths = written(tmp_path, {"a": torch.zeros(2)}, {"a": torch.ones(2)})
    kt.average_checkpoints(paths, paths[0])
    assert checkpoint.read_weights(paths[0])["a"].tolist() == [0.5, 0.5]


def test_there_is_one_file_in_memory_at_a_time(tmp_path, monkeypatch):
    for number in range(3):
        checkpoint.write(tmp_path / f"{number}.pt", {"module": {name: torch.full((4321,), 1.0) for name in "abc"}})
    alive, read = [], averages.read_weights

    def counted(path):
        gc.collect()
        tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor and one.shape == (4321,)]
        alive.append(sum(one.dtype == torch.float32 for one in tensors))
        return read(path)

    monkeypatch.setattr(averages, "read_weights", counted)
    kt.average_checkpoints([tmp_path / f"{number}.pt" for number in range(3)])
    assert max(alive) <= 1, "the one that was added last"
