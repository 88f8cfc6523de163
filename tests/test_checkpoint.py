"""Files of a model: whole or not at all, read without running anything, and back into a model that goes on the same."""

from __future__ import annotations

import copy
import errno
import hashlib
import io
import math
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections import Counter, OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import kerastorch as kt
from kerastorch import checkpoint
from tests.reference import same_weights

FIT = {"batch_size": 32, "verbose": 0}


def same(first, second):
    """Whether nested states are the same, tensors bit for bit."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second or (first != first and second != second)


def state_of(model):
    """A copy of everything that `load` could change."""
    return copy.deepcopy(kt.state.state_of(model))


# A state as a file.


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {
        "tensors": [torch.arange(3), torch.rand(2, 2, dtype=torch.float64), torch.tensor(True), torch.empty(0)],
        "numbers": (1, -2.5, True, None, 2**70, math.inf, math.nan),
        "text": "tée",
        "counter": Counter({3: 2}),
        "ordered": OrderedDict(b=1, a=OrderedDict()),
        "others": [torch.float16, torch.device("cpu"), torch.Size([2, 3])],
        7: {(1, "a"): [], None: {}, 2.5: b"bytes", False: ()},
    }
    checkpoint.write(tmp_path / "state.pt", state)
    assert same(checkpoint.read(tmp_path / "state.pt"), state)


def test_the_file_says_who_wrote_it_and_torch_reads_it_safely(tmp_path):
    checkpoint.write(tmp_path / "state.pt", {"a": 1})
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    assert content == {
        "format": "kerastorch checkpoint",
        "version": 2,
        "kerastorch": kt.__version__,
        "torch": torch.__version__,
        "state": {"a": 1},
    }


def test_a_state_may_be_any_dict(tmp_path):
    checkpoint.write(tmp_path / "state.pt", OrderedDict(b=1, a=2))
    assert same(checkpoint.read(tmp_path / "state.pt"), OrderedDict(b=1, a=2))


def test_numpys_numbers_become_pythons(tmp_path):
    state = {"best": np.float64(0.5), "epoch": np.int32(3), "done": np.bool_(True), "name": np.str_("a")}
    checkpoint.write(tmp_path / "state.pt", state)
    found = checkpoint.read(tmp_path / "state.pt")
    assert found == {"best": 0.5, "epoch": 3, "done": True, "name": "a"}
    assert [type(value) for value in found.values()] == [float, int, bool, str]


def test_parameters_become_tensors_that_share_memory_as_they_did(tmp_path):
    weight = nn.Parameter(torch.rand(3))
    weight.note = lambda: None  # what somebody has hung on to it cannot be in a file
    checkpoint.write(tmp_path / "state.pt", {"a": weight, "b": weight, "c": weight * 2})
    found = checkpoint.read(tmp_path / "state.pt")
    assert type(found["a"]) is torch.Tensor and not found["c"].requires_grad
    assert found["a"].data_ptr() == found["b"].data_ptr() and torch.equal(found["a"], weight)


def test_the_versions_of_layers_are_kept(tmp_path):
    state = nn.BatchNorm1d(2).state_dict()
    checkpoint.write(tmp_path / "state.pt", {"module": state})
    assert checkpoint.read(tmp_path / "state.pt")["module"]._metadata == state._metadata == {"": {"version": 2}}


class Point(tuple):
    pass


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"callbacks": [{"fn": print}]}, r"^state\['callbacks'\]\[0\]\['fn'\] is a builtin_function_or_method, which"),
        ({"a": ({"b": lambda: 1},)}, r"^state\['a'\]\[0\]\['b'\] is a function, which"),
        ({"a": {1, 2}}, r"^state\['a'\] is a set, which"),
        ({"a": Point()}, r"^state\['a'\] is a Point, which"),
        ({"a": np.zeros(2)}, r"^state\['a'\] is a ndarray, which"),
        ({"a": nn.Linear(1, 1)}, r"^state\['a'\] is a Linear, which .* Give tensors, dicts, lists, tuples"),
        ({"a": {frozenset(): 1}}, r"^a key of state\['a'\] is a frozenset, which"),
        ({"a": nn.UninitializedParameter()}, r"^state\['a'\] is a UninitializedParameter, which"),
    ],
)
def test_anything_else_is_refused_with_the_keys_that_lead_to_it(tmp_path, state, message):
    with pytest.raises(TypeError, match=message):
        checkpoint.write(tmp_path / "state.pt", state)
    assert os.listdir(tmp_path) == []


# Formats.


V1 = Path(__file__).parent / "data" / "checkpoint-v1.pt"


def test_a_file_of_format_1_goes_on(digits):
    """Written by the code of that time after the second of three epochs, with EarlyStopping and EMA."""
    net = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    model = kt.Model(net, backend="cpu").compile("adam", "cross_entropy", metrics=["accuracy"], schedule="cosine")
    content = torch.load(V1, weights_only=True)
    assert content["version"] == 1 and same(checkpoint.read(V1), content["state"])
    model.load(V1)
    assert model.epochs_trained == 2 and model.history.epoch == [0, 1]
    validation = [tensor[120:] for tensor in digits]
    found = model.evaluate(*validation, batch_size=32, verbose=0, return_dict=True)
    assert found["loss"] == pytest.approx(model.history.history["val_loss"][-1], rel=1e-5)
    callbacks = [kt.callbacks.EarlyStopping("val_loss", patience=3), kt.callbacks.EMA(0.9)]
    kt.state.restore_callbacks(callbacks, content["state"])
    options = {"validation_split": 0.2, "initial_epoch": 2, "epochs": 3, "callbacks": callbacks}
    assert model.fit(*digits, **options, **FIT).history["lr"][-1] == pytest.approx(1.70370868554659e-05)
    assert model.load_weights(V1) is model


def test_a_file_ends_in_a_digest_of_itself_as_the_comment_of_a_zip(tmp_path):
    checkpoint.write(tmp_path / "a.pt", {"a": torch.arange(5)})
    whole = (tmp_path / "a.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        said = file.comment.decode()
        assert file.testzip() is None
    assert said == "sha256:" + hashlib.sha256(whole[: -len(said) - 2] + b"\0\0").hexdigest()
    for mmap in (False, True):
        assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)["state"]["a"], torch.arange(5))


def test_equal_weights_make_equal_files(tmp_path, classifier):
    for number in range(5):
        checkpoint.write_weights(tmp_path / str(number), classifier.state_dict())
    assert len({(tmp_path / str(number)).read_bytes() for number in range(5)}) == 1


# A copy of a state.


def test_a_copy_of_a_state_stays_what_it_was_while_training_goes_on(tmp_path, classifier, digits):
    model = compiled(classifier, optimizer="adamw", schedule="cosine")
    model.fit(*digits, epochs=2, **FIT)
    state = kt.state.state_of(model)
    kept, copied = copy.deepcopy(state), checkpoint.snapshot(state)
    assert same(copied, kept)
    thread = threading.Thread(target=checkpoint.write, args=(tmp_path / "a.pt", copied))
    model.fit(*digits, epochs=1, **FIT)
    thread.start()
    thread.join()
    assert same(checkpoint.read(tmp_path / "a.pt"), kept) and not same(kt.state.state_of(model), kept)


def test_tensors_that_share_memory_share_it_in_the_copy_as_much_as_they_did():
    flat = torch.arange(12.0)
    state = {
        "views": [flat[:4], flat[4:], flat.view(3, 4).t(), flat[:1].expand(5), flat[::3]],
        "alone": [torch.ones(2), nn.Parameter(torch.ones(2)), torch.tensor(True), torch.empty(0), torch.empty(0, 3)],
        "odd": [torch.eye(2).to_sparse(), torch.tensor([1 + 2j]).conj(), torch.tensor([1j]).conj().imag],
        "brain": torch.ones(3).bfloat16(),
    }
    found, kept = checkpoint.snapshot(state), copy.deepcopy(state)
    flat.zero_()
    kept["alone"][1] = kept["alone"][1].detach()
    kept["odd"], found_odd = [one.to_dense().resolve_conj() for one in kept["odd"]], found["odd"]
    assert same(found | {"odd": [one.to_dense() for one in found_odd]}, kept)
    assert [one.stride() for one in found["views"]] == [one.stride() for one in state["views"]]
    assert len({one.untyped_storage().data_ptr() for one in found["views"]}) == 1
    assert found["views"][0].untyped_storage().nbytes() == 48
    memories = [one.untyped_storage().data_ptr() for one in (*found["alone"][:3], found["brain"], found["views"][0])]
    assert len(set(memories)) == 5 and not any(one.requires_grad for one in found["alone"])


def test_views_that_say_more_than_their_memory_are_copied_as_they_are():
    numbers = [torch.tensor([complex(one, one)] * 1000) for one in range(10)]
    state = {"conj": [one.conj() for one in numbers], "negative": [one.conj().imag for one in numbers]}
    found = checkpoint.snapshot(state)
    for one in range(10):
        assert found["conj"][one][0] == complex(one, -one) and found["negative"][one][0] == -one
    numbers[1].zero_()
    assert found["conj"][1][0] == 1 - 1j


def test_a_memory_of_many_tensors_is_copied_once(monkeypatch):
    flat, copies = torch.arange(1000.0), []
    copied = checkpoint._copied_storage
    monkeypatch.setattr(checkpoint, "_copied_storage", lambda storage: (copies.append(1), copied(storage))[1])
    found = checkpoint.snapshot({"parts": list(flat.split(1)), "other": torch.ones(1)})
    assert len(copies) == 2 and torch.equal(torch.cat(found["parts"]), flat)


def test_a_copy_is_plain_or_refused():
    state = OrderedDict(best=np.float64(0.5), names=("a", None))
    state._metadata = {"": {"version": np.int64(2)}}
    found = checkpoint.snapshot({"a": state})["a"]
    assert same(found, OrderedDict(best=0.5, names=("a", None))) and same(found._metadata, {"": {"version": 2}})
    with pytest.raises(TypeError, match=r"^state\['a'\]\[0\] is a function, which"):
        checkpoint.snapshot({"a": [lambda: 1]})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_from_a_gpu_it_is_copied_into_pinned_memory():
    weight = torch.arange(1_000_000.0, device="cuda")
    found = checkpoint.snapshot({"a": weight, "tied": weight, "half": weight[:10]})
    weight.zero_()
    assert found["a"].is_pinned() and torch.equal(found["a"], torch.arange(1_000_000.0))
    assert found["tied"].data_ptr() == found["half"].data_ptr() == found["a"].data_ptr()


# Whole or not at all.


def failing(error, after=10):
    """Writes a little, and then no more."""

    def save(content, file, **options):
        if isinstance(file, os.PathLike):
            file.write_bytes(b"x" * after)
        else:
            file.write(b"x" * after)
        raise error

    return save


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("has_old", [True, False])
@pytest.mark.parametrize("kind", ["state", "weights"])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch, kind, has_old):
    path = tmp_path / {"state": "a.pt", "weights": "a.safetensors"}[kind]
    write = {"state": checkpoint.write, "weights": checkpoint.write_weights}[kind]
    if has_old:
        write(path, {"a": torch.ones(2)})
    before = path.read_bytes() if has_old else None
    monkeypatch.setattr(torch, "save", failing(FULL))
    monkeypatch.setattr(safetensors.torch, "save_file", failing(FULL))
    with pytest.raises(OSError, match=r"a\.\w+' cannot be written: No space left on device\. Make room or") as caught:
        write(path, {"a": torch.zeros(2)})
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ([path.name] if has_old else [])
    assert not has_old or path.read_bytes() == before


@pytest.mark.parametrize("what", ["os.replace", "os.fsync"])
def test_a_disk_that_fails_at_the_end_leaves_the_file_as_it_was(tmp_path, monkeypatch, what):
    checkpoint.write(tmp_path / "a.pt", {"a": 1})

    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(what, fail)
    with pytest.raises(OSError, match="cannot be written: Input/output error"):
        checkpoint.write(tmp_path / "a.pt", {"a": 2})
    assert os.listdir(tmp_path) == ["a.pt"] and checkpoint.read(tmp_path / "a.pt") == {"a": 1}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("of somebody else"), MemoryError()])
def test_any_error_leaves_the_file_as_it_was_and_is_itself(tmp_path, monkeypatch, error):
    checkpoint.write(tmp_path / "a.pt", {"a": 1})
    monkeypatch.setattr(torch, "save", failing(error))
    with pytest.raises(type(error)) as caught:
        checkpoint.write(tmp_path / "a.pt", {"a": 2})
    assert caught.value is error
    assert os.listdir(tmp_path) == ["a.pt"] and checkpoint.read(tmp_path / "a.pt") == {"a": 1}


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
@pytest.mark.parametrize("write", ["write", "write_weights"])
def test_what_torch_and_safetensors_say_of_a_real_limit_is_said_in_one_sentence(tmp_path, write):
    program = (
        "import resource, signal, sys, torch\n"
        "from kerastorch import checkpoint\n"
        f"path, write = sys.argv[1], checkpoint.{write}\n"
        "write(path, {'a': torch.ones(2)})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "try:\n"
        "    write(path, {'a': torch.zeros(100_000)})\n"
        "except OSError as error:\n"
        "    print(error.errno, error)\n"
    )
    path = tmp_path / "a"
    said = subprocess.run([sys.executable, "-c", program, path], check=True, capture_output=True, text=True).stdout
    assert said.startswith(f"{errno.EFBIG} [Errno {errno.EFBIG}] '{path}' cannot be written: File too large. Make room")
    assert os.listdir(tmp_path) == ["a"]
    read = {"write": checkpoint.read, "write_weights": checkpoint.read_weights}[write]
    assert torch.equal(read(path)["a"], torch.ones(2))


def test_what_is_killed_leaves_the_file_as_it_was(tmp_path):
    checkpoint.write(tmp_path / "a.pt", {"a": 1})
    program = (
        "import os, sys, torch\n"
        "from kerastorch import checkpoint\n"
        "os.replace = lambda *paths: os._exit(9)\n"
        "checkpoint.write(sys.argv[1], {'a': 2})\n"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path / "a.pt"]).returncode == 9
    assert checkpoint.read(tmp_path / "a.pt") == {"a": 1}
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == ["a.pt"]


def test_writers_at_the_same_time_leave_the_file_of_one_of_them(tmp_path):
    states = [{"a": torch.full((10_000,), float(number))} for number in range(4)]
    threads = [threading.Thread(target=checkpoint.write, args=(tmp_path / "a.pt", state)) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = checkpoint.read(tmp_path / "a.pt")
    assert os.listdir(tmp_path) == ["a.pt"] and any(same(found, state) for state in states)


@pytest.mark.skipif(os.name == "nt", reason="needs the permissions of POSIX")
@pytest.mark.parametrize("write", [checkpoint.write, checkpoint.write_weights])
def test_others_may_read_the_file_as_they_may_any_other(tmp_path, write):
    before = os.umask(0o027)
    try:
        write(tmp_path / "a", {"a": torch.ones(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_folders_are_made_and_links_followed(tmp_path):
    checkpoint.write(tmp_path / "b" / "c" / "a.pt", {"a": 1})
    (tmp_path / "link.pt").symlink_to(tmp_path / "b" / "c" / "a.pt")
    checkpoint.write(tmp_path / "link.pt", {"a": 2})
    assert (tmp_path / "link.pt").is_symlink() and checkpoint.read(tmp_path / "b" / "c" / "a.pt") == {"a": 2}


def test_a_folder_is_no_file(tmp_path):
    for action in (partial(checkpoint.write, state={}), partial(checkpoint.write_weights, weights={}), checkpoint.read):
        with pytest.raises(IsADirectoryError, match="is a folder. Give the path of a file in it"):
            action(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written: .*(exists|directory)"):
        checkpoint.write(tmp_path / "file" / "a.pt", {})


# Reading.


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def zipped(name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(name, "")
    return buffer.getvalue()


OURS = {"format": "kerastorch checkpoint", "version": 1, "kerastorch": "0.1.0", "state": {}}
GOOD = saved(OURS | {"state": {"a": torch.ones(1000)}})
NEWER = OURS | {"version": 3, "kerastorch": "9.1"}
LIGHTNING = {"pytorch-lightning_version": "2.6.0", "state_dict": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "'.*file' is an empty file, no checkpoint. Give a file that model.save wrote."),
        (b"hello, world", "is damaged or a file of another kind, no checkpoint"),
        (GOOD[: len(GOOD) // 2], "is a torch file that is cut off or damaged, no checkpoint"),
        (GOOD[:-1], "is a torch file that is cut off|is damaged"),
        (GOOD[:100] + bytes([GOOD[100] ^ 255]) + GOOD[101:], "is damaged: .*. Give an older file"),
        (
            safetensors.torch.save({"a": torch.ones(1)}),
            "is a safetensors file, .* It holds weights alone: call model.l",
        ),
        (b"\x89HDF\r\n\x1a\n" + b"0" * 100, "is a Keras file, no checkpoint. Its weights are in Keras's layout"),
        (zipped("model.weights.h5"), "is a Keras file, no checkpoint"),
        (zipped("word/document.xml"), "is a zip file, no checkpoint"),
        (
            saved({"a": torch.ones(1), "b": torch.ones(1)}),
            r"a plain state_dict of 2 tensors. Call model.module.load_st",
        ),
        (
            saved(LIGHTNING),
            r"is a checkpoint of Lightning. .*load_state_dict\(.*torch.load\('.*file', weights_only=True\)",
        ),
        (saved(LIGHTNING | {"hyper": Point()}), "is a checkpoint of Lightning"),
        (saved(nn.Linear(1, 1)), "holds more than tensors and plain data, and was not read: reading the rest may run"),
        (saved([1, 2]), "is a torch file with a list of somebody else's. Give a file that model.save wrote"),
        (saved({}), "is a torch file with a dict of somebody else's"),
        (
            saved(NEWER),
            "was written by kerastorch 9.1 in format 3, and this one reads up to format 2. Install kerastorch 9",
        ),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_sentence(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.read(tmp_path / "file")
    assert "\n" not in str(caught.value)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_that_is_not_there_is_said_to_be_so(tmp_path):
    for read in (checkpoint.read, checkpoint.read_weights):
        with pytest.raises(FileNotFoundError, match="there is no file '.*a.pt'. Give the path of one that was saved"):
            read(tmp_path / "a.pt")


# Weights.


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.out.weight = self.embedding.weight

    def forward(self, x):
        return self.out(self.embedding(x))


def test_any_torch_user_can_load_the_weights(tmp_path, classifier):
    model = kt.Model(nn.Sequential(classifier, nn.BatchNorm1d(10)), backend="cpu")
    model.save_weights(tmp_path / "a.safetensors")
    weights = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert weights.keys() == model.module.state_dict().keys()
    plain = copy.deepcopy(model.module)
    for tensor in plain.state_dict().values():
        tensor.zero_()
    plain.load_state_dict(weights)
    assert same_weights(plain, model.module)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    digest = checkpoint.hexdigest_of_weights(weights)
    assert metadata == {"format": "pt", "kerastorch": kt.__version__, "sha256": digest}


def test_tied_weights_are_there_by_each_name_and_stay_tied(tmp_path):
    first, second = (kt.Model(Tied(), backend="cpu") for _ in range(2))
    first.save_weights(tmp_path / "a.safetensors")
    assert list(safetensors.torch.load_file(tmp_path / "a.safetensors")) == sorted(first.module.state_dict())
    second.load_weights(tmp_path / "a.safetensors")
    assert same_weights(first.module, second.module)
    assert second.module.out.weight is second.module.embedding.weight


def test_one_name_of_tied_weights_is_enough(tmp_path):
    first, second = (kt.Model(Tied(), backend="cpu") for _ in range(2))
    safetensors.torch.save_model(first.module, tmp_path / "a.safetensors")
    assert len(safetensors.torch.load_file(tmp_path / "a.safetensors")) == 2
    assert same_weights(first.module, second.load_weights(tmp_path / "a.safetensors").module)


def test_views_of_one_memory_and_every_dtype_come_back(tmp_path):
    flat = torch.arange(12.0)
    weights = {
        "head": flat[:4],
        "tail": flat[4:],
        "whole": flat,
        "transposed": flat.view(3, 4).t(),
        "expanded": flat[:1].expand(5),
        "brain": torch.rand(3).bfloat16(),
        "counted": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True, False]),
    }
    checkpoint.write_weights(tmp_path / "a.safetensors", weights)
    found = checkpoint.read_weights(tmp_path / "a.safetensors")
    assert same({name: found[name] for name in weights}, weights)


class Extra(nn.Linear):
    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"a._extra_state": {"x": 1}},
            "'a._extra_state' is a dict, and safetensors holds dense tensors alone. Call model.s",
        ),
        ({"a": torch.eye(2).to_sparse()}, "'a' is sparse, and"),
        (
            {"a": nn.UninitializedParameter()},
            "'a' is a UninitializedParameter, .* Call fit or predict first, which make it",
        ),
        ({"a": torch.ones(1, dtype=torch.complex128)}, "safetensors has no form for .*complex128"),
        ({"a": torch.ones(1, device="meta")}, "safetensors has no form for .*meta"),
    ],
)
def test_what_safetensors_cannot_hold_is_refused(tmp_path, weights, message):
    with pytest.raises(TypeError, match=message):
        checkpoint.write_weights(tmp_path / "a.safetensors", weights)
    assert os.listdir(tmp_path) == []


def test_extra_state_is_saved_with_everything_and_refused_beside_weights(tmp_path):
    first, second = (kt.Model(Extra(2, 1), backend="cpu").compile("sgd", "mse") for _ in range(2))
    first.module.extra, second.module.extra = {"scale": 2.0}, None
    with pytest.raises(TypeError, match="'_extra_state' is a dict"):
        first.save_weights(tmp_path / "a.safetensors")
    first.save(tmp_path / "a.pt")
    second.load(tmp_path / "a.pt")
    assert second.module.extra == {"scale": 2.0} and same(state_of(first), state_of(second))


@pytest.mark.parametrize("cut", [4, 40, -1])
def test_safetensors_that_are_cut_off_are_damaged(tmp_path, cut):
    content = safetensors.torch.save({"a": torch.ones(100)})
    (tmp_path / "a.safetensors").write_bytes(content[:cut])
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.read_weights(tmp_path / "a.safetensors")


def test_a_checkpoint_of_all_state_has_the_weights_too(tmp_path, classifier, digits):
    model = kt.Model(copy.deepcopy(classifier), backend="cpu").compile("sgd", "cross_entropy")
    model.fit(*digits, **FIT)
    model.save(tmp_path / "a.pt")
    assert same_weights(kt.Model(classifier, backend="cpu").load_weights(tmp_path / "a.pt").module, model.module)


@pytest.mark.parametrize(
    ("verb", "path", "message"),
    [
        ("save_weights", "a.weights.h5", "'a.weights.h5' ends as Keras's files do. Give 'a.safetensors', which says"),
        ("save_weights", "a.h5", "'a.h5' ends as Keras's files do. Give 'a.safetensors'"),
        ("save_weights", "a.pt", "'a.pt' ends as pickled files do. Give 'a.safetensors'"),
        ("save", "a.keras", "'a.keras' ends as Keras's files do. Give 'a.pt'"),
        ("save", "a.safetensors", "'a.safetensors' ends as weights alone do. Give 'a.pt'"),
    ],
)
def test_endings_of_other_files_are_refused(tmp_path, monkeypatch, classifier, verb, path, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        getattr(kt.Model(classifier, backend="cpu"), verb)(path)
    assert os.listdir(tmp_path) == []


def test_a_path_without_an_ending_is_used_as_it_is(tmp_path, classifier):
    model = kt.Model(classifier, backend="cpu")
    model.save_weights(tmp_path / "best")
    model.save(tmp_path / "v1.5")
    assert sorted(os.listdir(tmp_path)) == ["best", "v1.5"]
    model.load_weights(tmp_path / "best").load(tmp_path / "v1.5")


class TestOtherNames:
    """Weights of `(64, 16), (16, 10)` and a name of their own, for a module of `(64, 8), (8, 10), (10, 2)`."""

    @pytest.fixture
    def path(self, tmp_path, classifier):
        checkpoint.write_weights(tmp_path / "a.safetensors", classifier.state_dict() | {"head.bias": torch.ones(1)})
        return tmp_path / "a.safetensors"

    @pytest.fixture
    def model(self):
        return kt.Model(nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10), nn.Linear(10, 2)), backend="cpu")

    def test_all_that_differs_is_in_one_error_and_the_module_as_it_was(self, path, model):
        before = copy.deepcopy(model.module)
        with pytest.raises(ValueError) as caught:
            model.load_weights(path)
        assert str(caught.value) == (
            f"{str(path)!r} does not fit the module, which is as it was: missing '3.weight', '3.bias'; unexpected "
            f"'head.bias'; of another shape '0.weight' (16, 64) instead of (8, 64), '0.bias' (16,) instead of (8,), "
            f"'2.weight' (10, 16) instead of (10, 8). Make the module as it was when the file was written, or give "
            f"strict=False and skip_mismatch=True to leave out what does not fit."
        )
        assert same_weights(model.module, before)

    def test_other_shapes_are_refused_without_strict_too(self, path, model):
        before = copy.deepcopy(model.module)
        with pytest.raises(ValueError, match="of another shape '0.weight'"):
            model.load_weights(path, strict=False)
        assert same_weights(model.module, before)

    def test_without_strict_what_fits_is_taken_and_the_rest_said(self, path, classifier):
        module = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10), nn.Linear(10, 2))
        last = module[3].weight.clone()
        with pytest.warns(UserWarning, match="but for what is missing '3.weight', '3.bias'; unexpected 'head.bias'"):
            kt.Model(module, backend="cpu").load_weights(path, strict=False)
        assert same_weights(module[:3], classifier) and torch.equal(module[3].weight, last)

    def test_without_strict_something_must_fit(self, path):
        with pytest.raises(ValueError, match="does not fit the module"):
            kt.Model(nn.ModuleDict({"other": nn.Linear(1, 1)}), backend="cpu").load_weights(path, strict=False)

    def test_tensors_of_another_shape_are_left_out_if_asked(self, path, classifier):
        module = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
        model, head = kt.Model(module, backend="cpu"), copy.deepcopy(module[2])
        checkpoint.write_weights(path, classifier.state_dict())
        with pytest.warns(UserWarning) as caught:
            assert model.load_weights(path, skip_mismatch=True) is model
        assert [str(one.message) for one in caught] == [
            f"{str(path)!r} was loaded but for what is of another shape '2.weight' (10, 16) instead of (3, 16), "
            f"'2.bias' (10,) instead of (3,)."
        ]
        assert caught[0].filename == __file__
        assert same_weights(module[:1], classifier[:1]) and same_weights(module[2], head)

    @pytest.mark.filterwarnings("error")
    def test_where_all_shapes_are_the_same_nothing_is_said(self, path, classifier):
        checkpoint.write_weights(path, classifier.state_dict())
        other = copy.deepcopy(classifier)
        torch.nn.init.zeros_(other[0].weight)
        kt.Model(other, backend="cpu").load_weights(path, skip_mismatch=True)
        assert same_weights(other, classifier)

    def test_other_names_are_refused_beside_other_shapes(self, path, model):
        """Keras's argument is of shapes alone; `strict=False` is of names."""
        before = copy.deepcopy(model.module)
        with pytest.raises(
            ValueError, match="missing '3.weight', '3.bias'; unexpected 'head.bias'; of another shape '0"
        ):
            model.load_weights(path, skip_mismatch=True)
        assert same_weights(model.module, before)
        with pytest.warns(UserWarning, match="but for what is missing '3.weight', .*; unexpected .*; of another shape"):
            model.load_weights(path, strict=False, skip_mismatch=True)
        assert torch.equal(model.module[2].bias, checkpoint.read_weights(path)["2.bias"])
        assert torch.equal(model.module[0].weight, before[0].weight)

    def test_when_nothing_is_left_it_is_an_error(self, path, classifier):
        module = nn.Sequential(nn.Linear(3, 2))
        checkpoint.write_weights(path, nn.Sequential(nn.Linear(2, 3)).state_dict())
        with pytest.raises(ValueError, match="does not fit the module, .*: of another shape '0.weight'"):
            kt.Model(module, backend="cpu").load_weights(path, skip_mismatch=True)

    def test_of_many_names_some_are_shown(self, path):
        module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(20)))
        with pytest.raises(ValueError, match="missing '1.weight', .*'6.weight', '6.bias' and 26 more; unexpected"):
            kt.Model(module, backend="cpu").load_weights(path)


def test_weights_take_the_dtype_of_the_module_and_leave_the_optimizer_alone(tmp_path, classifier, digits):
    kt.Model(classifier, backend="cpu").save_weights(tmp_path / "a.safetensors")
    model = kt.Model(copy.deepcopy(classifier), backend="cpu").compile("adam", "cross_entropy", precision="bf16-true")
    model.fit(*digits, **FIT)
    before = copy.deepcopy(model.optimizer.state_dict())
    model.load_weights(tmp_path / "a.safetensors")
    assert torch.equal(model.module[0].weight, classifier[0].weight.bfloat16())
    assert same(model.optimizer.state_dict(), before)


# All of a model's state.


def compiled(net, **options):
    options = {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9), "loss": "cross_entropy"} | options
    return kt.Model(copy.deepcopy(net), backend="cpu").compile(**options)


OPTIONS = {
    "momentum": {},
    "adamw, cosine": {"optimizer": "adamw", "schedule": "cosine"},
    "scaled": {"optimizer": "adam", "precision": "16", "schedule": "linear", "clip": 0.5},
    "plateau, half": {"schedule": kt.schedules.plateau(patience=0), "precision": "bf16-true"},
    "own": {"schedule": partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[1, 3])},
    "own by steps": {"schedule": ("step", partial(torch.optim.lr_scheduler.StepLR, step_size=7))},
    "lbfgs": {"optimizer": "lbfgs"},
    "two groups": {"optimizer": "adagrad", "lr": {"0.*": 0.01, "*": 0.1}},
    "rate in a tensor": {"optimizer": partial(torch.optim.Adam, lr=torch.tensor(0.01), foreach=False)},
}


@pytest.mark.parametrize("chosen", OPTIONS)
def test_a_run_goes_on_as_if_it_had_not_ended(tmp_path, classifier, digits, chosen):
    whole, first, second = (compiled(classifier, **OPTIONS[chosen]) for _ in range(3))
    whole.fit(*digits, epochs=4, **FIT)
    first.fit(*digits, epochs=4, callbacks=Until(2), **FIT)  # a schedule has to know of all four
    first.save(tmp_path / "a.pt")
    second.load(tmp_path / "a.pt")
    assert same(state_of(second), state_of(first))
    second.fit(*digits, initial_epoch=2, epochs=4, **FIT)
    assert same_weights(second.module, whole.module)
    assert same(second.optimizer.state_dict(), whole.optimizer.state_dict())


class Until(kt.Callback):
    """Ends a run after so many epochs."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch + 1 == self.epochs


def test_the_rate_in_a_tensor_stays_that_tensor_and_a_number_a_number(tmp_path, classifier, digits):
    in_tensor = {"optimizer": partial(torch.optim.Adam, lr=torch.tensor(0.01), foreach=False)}
    in_number = {"optimizer": partial(torch.optim.Adam, lr=0.02)}
    for name, chosen in (("tensor", in_tensor), ("number", in_number)):
        compiled(classifier, **chosen).save(tmp_path / f"{name}.pt")
    model = compiled(classifier, optimizer=partial(torch.optim.Adam, lr=torch.tensor(0.5), foreach=False))
    rate = model.optimizer.param_groups[0]["lr"]
    for name, value in (("tensor", 0.01), ("number", 0.02)):
        model.load(tmp_path / f"{name}.pt")
        assert model.optimizer.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(value)
    model = compiled(classifier, **in_number).load(tmp_path / "tensor.pt")
    assert type(model.optimizer.param_groups[0]["lr"]) is float


def test_how_an_optimizer_computes_is_as_compiled_here(tmp_path, classifier, digits):
    """A file from a GPU, where it was `capturable`, serves on a CPU, where that is an error."""
    model = compiled(classifier, optimizer="adam")
    model.fit(*digits, **FIT)
    model.optimizer.param_groups[0].update(capturable=True, fused=None, foreach=True, betas=(0.5, 0.9))
    model.save(tmp_path / "a.pt")
    other = compiled(classifier, optimizer="adam").load(tmp_path / "a.pt")
    group = other.optimizer.param_groups[0]
    assert (group["capturable"], group["fused"], group["foreach"], group["betas"]) == (False, True, None, (0.5, 0.9))
    other.fit(*digits, **FIT)


def test_history_and_epochs_come_back(tmp_path, classifier, digits):
    class Odd(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch % 2:
                logs["odd"] = np.float64(epoch)

    model = compiled(classifier, metrics=["accuracy"])
    options = {"validation_split": 0.2, "validation_freq": 2, "initial_epoch": 1}
    history = model.fit(*digits, epochs=4, callbacks=Odd(), **options, **FIT)
    model.save(tmp_path / "a.pt")
    other = compiled(classifier, metrics=["accuracy"])
    other.load(tmp_path / "a.pt")
    found = other.history
    assert (found.history, found.epoch, found.params) == (history.history, history.epoch, history.params)
    assert list(found.history) == list(history.history) and repr(found) == repr(history)
    assert other.epochs_trained == model.epochs_trained == 4


def test_a_model_that_was_not_trained_or_compiled_comes_back_too(tmp_path, classifier):
    model = compiled(classifier)
    model.save(tmp_path / "a.pt")
    assert compiled(classifier).load(tmp_path / "a.pt").history is None
    model = kt.Model(copy.deepcopy(classifier), backend="cpu")
    model.save(tmp_path / "b.pt")
    torch.nn.init.zeros_(classifier[0].weight)
    assert same_weights(kt.Model(classifier, backend="cpu").load(tmp_path / "b.pt").module, model.module)


class Pair(kt.Model):
    def train_step(self, batch):
        x, y = batch
        for name in ("first", "second"):
            self.backward(nn.functional.cross_entropy(self.module[name](x), y))
            self.optimizer_step(name)


def pair(**options):
    nets = nn.ModuleDict({name: nn.Linear(64, 10) for name in ("first", "second")})
    chosen = {"optimizer": {"first": "adam", "second": "sgd"}, "schedule": {"second": "cosine"}} | options
    return Pair(nets, backend="cpu").compile(**chosen)


def test_several_optimizers_come_back_by_their_names(tmp_path, digits):
    first, second = pair(), pair()
    first.fit(*digits, epochs=2, **FIT)
    first.save(tmp_path / "a.pt")
    assert not same_weights(first.module, second.module)
    second.load(tmp_path / "a.pt")
    assert same(state_of(first), state_of(second))
    for model in (first, second):
        model.fit(*digits, initial_epoch=2, epochs=4, **FIT)
    assert same_weights(first.module, second.module)


def lazy(kind=nn.LazyLinear):
    return nn.Sequential(kind(16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


def test_a_lazy_module_gets_its_weights_and_its_optimizer(tmp_path, digits):
    model = kt.Model(lazy(), backend="cpu").compile("adam", "cross_entropy", precision="bf16-true")
    with pytest.raises(TypeError, match=r"state\['module'\]\['0.weight'\] is a UninitializedParameter"):
        model.save(tmp_path / "a.pt")
    model.fit(*digits, epochs=2, **FIT)
    model.save(tmp_path / "a.pt")
    model.save_weights(tmp_path / "a.safetensors")
    other = kt.Model(lazy(), backend="cpu").compile("adam", "cross_entropy", precision="bf16-true")
    other.load(tmp_path / "a.pt")
    assert same(state_of(other), state_of(model)) and other.optimizer is other.updates[""].optimizer
    for one in (model, other):
        one.fit(*digits, initial_epoch=2, epochs=4, **FIT)
    assert same_weights(other.module, model.module)
    weights = kt.Model(lazy(), backend="cpu").compile("adam", "cross_entropy").load_weights(tmp_path / "a.safetensors")
    weights.fit(*digits, **FIT)
    with pytest.raises(ValueError, match="has the state of Adam, and the optimizer is SGD"):
        kt.Model(lazy(), backend="cpu").compile("sgd", "cross_entropy").load(tmp_path / "a.pt")


def test_the_states_of_the_runs_callbacks_are_in_the_file(tmp_path, classifier, digits):
    class Foreign:
        """As a callback of Keras, without a state."""

        def set_params(self, params):
            self.params = params

        def set_model(self, model):
            self.model = model

        def on_epoch_end(self, epoch, logs=None):
            self.model.save(tmp_path / "a.pt")

    ema = kt.callbacks.EMA(0.5)
    model = compiled(classifier)
    model.fit(*digits, callbacks=[Foreign(), ema], **FIT)
    (name, nothing), (kind, state) = checkpoint.read(tmp_path / "a.pt")["callbacks"]
    assert (name, nothing, kind) == ("Foreign", {}, "EMA")
    assert same(state["averages"], ema.state_dict()["averages"])
    model.fit(*digits, **FIT)
    model.save(tmp_path / "a.pt")
    assert checkpoint.read(tmp_path / "a.pt")["callbacks"] == []


def test_a_schedule_that_a_callback_has_put_in_place_is_the_callbacks_to_put_there_again(tmp_path, classifier, digits):
    class Save(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.save(tmp_path / f"{epoch}.pt")

    swa = kt.callbacks.StochasticWeightAveraging(0.05, 1)
    compiled(classifier, schedule="cosine").fit(*digits, epochs=3, callbacks=[Save(), swa], **FIT)
    schedules = [checkpoint.read(tmp_path / f"{epoch}.pt")["schedules"][""] for epoch in range(3)]
    assert schedules[0]["schedule"] == "cosine" and schedules[1:] == [None, None]
    compiled(classifier, schedule="cosine").load(tmp_path / "1.pt")


@pytest.mark.parametrize("precision", ["32", "16"])
def test_saving_changes_nothing_about_the_run(tmp_path, classifier, digits, precision):
    class Save(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.save(tmp_path / "a.pt")

    models = [compiled(classifier, precision=precision, schedule="linear") for _ in range(2)]
    for model, callbacks in zip(models, ([], [Save()]), strict=True):
        model.fit(*digits, epochs=3, callbacks=callbacks, **FIT)
    assert same(state_of(models[0]), state_of(models[1]))


@pytest.mark.parametrize("precision", ["32", "16"])
def test_a_schedule_is_where_the_steps_are(tmp_path, classifier, digits, precision):
    """Under loss scaling it follows a step later, when it is known whether the step was taken."""
    done = []

    class Save(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.save(tmp_path / "a.pt")
            done.append(checkpoint.read(tmp_path / "a.pt")["schedules"][""]["done"])

    compiled(classifier, precision=precision, schedule="linear").fit(*digits, epochs=2, callbacks=Save(), **FIT)
    assert done == [*range(1, 10), 9]  # the last step has no rate after it


# What does not fit.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda net: kt.Model(net, backend="cpu"), RuntimeError, "load was called before compile"),
        (
            lambda net: compiled(nn.Linear(64, 10)),
            ValueError,
            "missing 'weight', 'bias'; unexpected '0.weight', '0.bias'",
        ),
        (
            lambda net: compiled(nn.Sequential(net[0], net[1], nn.Linear(16, 2))),
            ValueError,
            r"another shape '2.weight' \(",
        ),
        (
            lambda net: compiled(net, optimizer="adam", schedule="cosine"),
            ValueError,
            "the state of SGD, and the .* is Adam",
        ),
        (
            lambda net: compiled(net, schedule="cosine", lr={"0.*": 0.1, "*": 0.2}),
            ValueError,
            r"an optimizer of 4 parameters, the model one of 2 \+ 2 parameters: expected the same parameters",
        ),
        (
            lambda net: compiled(net),
            ValueError,
            "has the state of schedule='cosine', the model none. Compile as it was",
        ),
        (lambda net: compiled(net, schedule="linear"), ValueError, "state of schedule='cosine', the model 'linear'"),
        (
            lambda net: Pair(net, backend="cpu").compile({"0": "sgd", "2": "sgd"}, schedule="cosine"),
            ValueError,
            "has the optimizers '', the model '0', '2'. Compile as it was",
        ),
    ],
)
def test_a_model_made_otherwise_is_refused_and_stays_as_it_was(tmp_path, classifier, digits, make, error, message):
    saved = compiled(classifier, schedule="cosine")
    saved.fit(*digits, **FIT)
    saved.save(tmp_path / "a.pt")
    model = make(copy.deepcopy(classifier))
    before = state_of(model)
    with pytest.raises(error, match=message):
        model.load(tmp_path / "a.pt")
    assert same(state_of(model), before)


def test_parameters_in_another_order_are_not_taken_for_each_other(tmp_path):
    module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    compiled(module).save(tmp_path / "a.pt")
    swapped = nn.ModuleDict({"b": module["b"], "a": module["a"]})
    with pytest.raises(ValueError, match="expected the same parameters in the same groups"):
        compiled(swapped).load(tmp_path / "a.pt")


def test_a_file_from_before_compile_has_no_optimizer_to_put_back(tmp_path, classifier):
    kt.Model(classifier, backend="cpu").save(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="has the optimizers of no compile, the model ''. Compile as it was"):
        compiled(classifier).load(tmp_path / "a.pt")


def test_an_own_schedule_that_cannot_be_in_a_file_is_named(tmp_path, classifier, digits):
    class Odd(torch.optim.lr_scheduler.StepLR):
        def __init__(self, optimizer):
            self.remembers = object()
            super().__init__(optimizer, 1)

    with pytest.raises(TypeError, match=r"state\['schedules'\]\[''\]\['scheduler'\]\['remembers'\] is a object, which"):
        compiled(classifier, schedule=Odd).save(tmp_path / "a.pt")


def test_an_error_before_has_nothing_to_do_with_it(tmp_path):
    """As when a callback saves because the loader's file is not there."""
    try:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")
    except FileNotFoundError:
        with pytest.raises(TypeError, match="safetensors has no form for .*complex128"):
            checkpoint.write_weights(tmp_path / "a.safetensors", {"a": torch.ones(1, dtype=torch.complex128)})


def test_one_inside_the_other_says_the_systems_error_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", failing(FULL))
    with pytest.raises(OSError) as caught, checkpoint.replacing(tmp_path / "outer.pt") as temporary:
        checkpoint.write(temporary, {})
    assert str(caught.value).startswith(
        f"[Errno 28] '{tmp_path}/outer.pt' cannot be written: No space left on device. M"
    )
    assert os.listdir(tmp_path) == []
