"""Files that are damaged, or made to do harm: one sentence says so, or what they give is what was written."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import kerastorch as kt
from kerastorch import checkpoint
from tests.test_checkpoint import OURS, Trap, same, saved

V1 = Path(__file__).parent / "data" / "checkpoint-v1.pt"


@pytest.fixture
def memory():
    """A folder in memory where there is one: thousands of files are written."""
    folder = tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    yield Path(folder)
    shutil.rmtree(folder)


# Damage.


def flipped(whole, draw, times):
    data = bytearray(whole)
    for position in draw.sample(range(8 * len(data)), times):
        data[position // 8] ^= 1 << position % 8
    return bytes(data)


def zeroed(whole, draw):
    start, count = draw.randrange(len(whole)), draw.randint(1, 600)
    count = min(count, len(whole) - start)
    return whole[:start] + bytes(count) + whole[start + count :]


def lengthened(whole, draw):
    start = draw.randrange(len(whole) + 1)
    return whole[:start] + draw.randbytes(draw.randint(1, 80)) + whole[start:]


def shortened(whole, draw):
    start = draw.randrange(len(whole))
    return whole[:start] + whole[start + draw.randint(1, 80) :]


DAMAGES = {
    "a bit": lambda whole, draw: flipped(whole, draw, 1),
    "bits": lambda whole, draw: flipped(whole, draw, draw.randint(2, 20)),
    "cut off": lambda whole, draw: whole[: draw.randrange(len(whole))],
    "longer": lengthened,
    "shorter": shortened,
    "zeros": zeroed,
}
WEIGHTS = {"a.weight": torch.arange(12.0).view(3, 4), "a.bias": torch.ones(3).bfloat16(), "count": torch.tensor(7)}
STATE = {"module": WEIGHTS, "optimizers": {"": [torch.zeros(3), {"lr": 0.1}]}, "epochs_trained": 3, "name": "tée"}


def state_of_2(path):
    checkpoint.write(path, STATE)


def weights_with_digest(path):
    checkpoint.write_weights(path, WEIGHTS)


def state_of_1(path):
    path.write_bytes(saved(OURS | {"state": STATE}))


def real_state_of_1(path):
    path.write_bytes(V1.read_bytes())


def weights_of_others(path):
    safetensors.torch.save_file(WEIGHTS, path, {"format": "pt"})


def is_alike(found, whole):
    """Names and what is stored by them; where there is no digest, a number may be another."""
    forms = [{name: (one.shape, one.dtype) for name, one in weights.items()} for weights in (found, whole)]
    return forms[0] == forms[1]


def read_by_names(path):
    """As `load_weights`, that knows what names there must be."""
    weights = checkpoint.read_weights(path)
    if weights.keys() != WEIGHTS.keys():
        raise ValueError(f"{str(path)!r} does not fit.")
    return weights


@pytest.mark.filterwarnings("ignore::UserWarning")  # what torch has to say on the way
@pytest.mark.parametrize(
    ("write", "read", "is_fine", "count"),
    [
        (state_of_2, checkpoint.read, same, 3000),
        (weights_with_digest, read_by_names, same, 2500),
        (state_of_1, checkpoint.read, same, 2000),
        (real_state_of_1, checkpoint.read, same, 500),
        (weights_of_others, read_by_names, is_alike, 2000),
    ],
)
def test_what_is_damaged_is_said_to_be_so_or_gives_what_was_written(memory, write, read, is_fine, count):
    """10,000 files in all."""
    path, draw = memory / "file", random.Random(5)
    write(path)
    content, whole = path.read_bytes(), read(path)
    refused, began, rss = dict.fromkeys(DAMAGES, 0), time.monotonic(), peak_bytes()
    for number in range(count):
        kind = list(DAMAGES)[number % len(DAMAGES)]
        path.write_bytes(DAMAGES[kind](content, draw))
        try:
            found = read(path)
        except (ValueError, OSError) as error:
            refused[kind] += 1
            assert re.match(r"'.*file' .*\.$", str(error)) and "\n" not in str(error)
        else:
            assert is_fine(found, whole), (kind, number)
    is_verified = is_fine is same
    assert all(times > (0.3 if is_verified else 0.1) * count / len(DAMAGES) for times in refused.values()), refused
    assert peak_bytes() - rss < 100e6 and time.monotonic() - began < 60


def peak_bytes():
    return (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize(
    ("write", "read"), [(state_of_2, checkpoint.read), (weights_with_digest, checkpoint.read_weights)]
)
def test_every_byte_of_a_file_counts(memory, write, read):
    """But for what other libraries are told in the header of safetensors, such as "pt", which no tensor depends on."""
    path = memory / "file"
    write(path)
    content, whole, accepted = path.read_bytes(), read(path), []
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        try:
            assert same(read(path), whole)
        except ValueError as error:
            assert re.match(r"'.*file' is .*\.$", str(error))
        else:
            accepted.append(position)
    told = range(content.find(b'"format"'), content.find(b'"sha256"') + len(b'"sha256"'))
    assert set(accepted) <= set(told) and len(accepted) < 40


def test_torch_does_not_see_a_byte_of_a_file_that_its_digest_does_not_fit(memory, monkeypatch):
    state_of_2(memory / "file")
    content = bytearray((memory / "file").read_bytes())
    content[len(content) // 2] ^= 1
    (memory / "file").write_bytes(content)
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"'.*file' is damaged: its SHA-256 is not the one .*\. Give an older file\.$"):
        checkpoint.read(memory / "file")


def test_a_file_of_format_2_has_its_digest(memory):
    for end in (b"", b"G\0sha256:" + 64 * b"x"):
        content = saved(OURS | {"version": 2})
        (memory / "file").write_bytes(content[:-2] + end if end else content)
        with pytest.raises(ValueError, match="is damaged: the SHA-256 that it was written with is not at its end. Gi"):
            checkpoint.read(memory / "file")


def test_a_file_of_format_1_is_as_the_sums_in_its_zip_say(memory):
    """torch itself does not look at them."""
    content = saved(OURS | {"state": {"a": torch.full((100,), 7.0)}})
    position = content.index(torch.full((100,), 7.0).numpy().tobytes())
    other = content[:position] + b"\1" + content[position + 1 :]
    assert torch.load(io.BytesIO(other), weights_only=True)["state"]["a"][0] != 7.0
    (memory / "file").write_bytes(other)
    with pytest.raises(ValueError, match=r"is damaged: the checksum of 'archive/data/0' in it is another\. Give an ol"):
        checkpoint.read(memory / "file")


def test_no_bit_of_a_file_of_format_1_gives_other_data(memory):
    """Also in its list of parts, which has no sum: one makes a folder of a part, and torch gives memory as it is."""
    path, state = memory / "file", {"a": torch.full((2,), 7.0)}
    content, accepted = saved(OURS | {"state": state}), 0
    bits = range(8 * content.index(b"PK\1\2"), 8 * len(content))
    for bit in bits:
        data = bytearray(content)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            assert same(checkpoint.read(path), state)
        except ValueError as error:
            assert re.match(r"'.*file' is .*\.$", str(error))
        else:
            accepted += 1
    assert accepted < len(bits) / 2


def test_of_the_digest_of_weights_no_part_can_be_gone(memory):
    path = memory / "file"
    for metadata in ({"kerastorch": "0.1.0"}, {"sha256": "0" * 64}, {"kerastorch": "0.1.0", "sha257": "0" * 64}):
        safetensors.torch.save_file(WEIGHTS, path, metadata)
        with pytest.raises(
            ValueError, match="is damaged: the SHA-256 of its tensors is not the one it was written with"
        ):
            checkpoint.read_weights(path)


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(2), "c": torch.zeros(4)},
        {"a": torch.zeros(2), "b": torch.ones(4)},
        {"a": torch.zeros(2), "b": torch.zeros(2, 2)},
        {"a": torch.zeros(2), "b": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.zeros(4), "b": torch.zeros(2)},
    ],
)
def test_the_digest_of_weights_is_of_names_dtypes_shapes_and_values(other):
    digest = checkpoint.hexdigest_of_weights({"a": torch.zeros(2), "b": torch.zeros(4)})
    assert checkpoint.hexdigest_of_weights(other) != digest
    assert checkpoint.hexdigest_of_weights({"b": torch.zeros(4), "a": torch.zeros(2)}) == digest, "in any order"


# Safetensors with a wrong header.


def with_header(header, data=bytes(8), length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (with_header({"a": tensor()}, length=2**63), "header too large"),
        (with_header({"a": tensor()}, length=10_000), "invalid header length"),
        (with_header({"a": tensor()}, length=5), "invalid JSON in header"),
        (with_header(b"{not json}"), "invalid JSON in header"),
        (with_header(b'{"\xff":1}'), "invalid UTF-8 in header"),
        (with_header([1, 2]), "damaged or a file of another kind, no safetensors. Give a file that model.save_weights"),
        (with_header({"a": tensor(offsets=(0, 8)), "b": tensor(offsets=(4, 12))}, bytes(12)), "invalid offset"),
        (with_header({"a": tensor(offsets=(8, 0))}), "invalid offset|invalid shape"),
        (with_header({"a": tensor(offsets=(0, 4))}, bytes(4)), "invalid shape, data type, or offset"),
        (with_header({"a": tensor(offsets=(0, 80), shape=(20,))}), "incomplete metadata"),
        (with_header({"a": tensor(offsets=(0, 8))}, bytes(80)), "incomplete metadata"),
        (with_header({"a": tensor("F33")}), "invalid JSON in header: unknown variant `F33`"),
        (with_header({"a": tensor(shape=(2**62, 2**62))}), "overflow|invalid shape"),
        (with_header({"a": tensor(shape=(2**40,), offsets=(0, 2**42))}), "incomplete metadata"),
        (with_header({"a": tensor(shape=(-2,))}), "invalid JSON in header"),
        (with_header({"a": {"dtype": "F32"}}), "invalid JSON in header"),
        (with_header({"__metadata__": {"sha256": 3}, "a": tensor()}), "invalid JSON in header"),
    ],
)
def test_a_wrong_header_is_said_in_one_sentence(memory, content, message):
    path = memory / "a.safetensors"
    path.write_bytes(content)
    module = nn.Linear(2, 1, bias=False)
    actions = (
        checkpoint.read_weights,
        kt.Model(module, backend="cpu").load_weights,
        lambda path: kt.average_checkpoints([path]),
    )
    for action in actions:
        with pytest.raises(ValueError, match=rf"^'.*a\.safetensors' is .*({message})") as caught:
            action(path)
        assert "\n" not in str(caught.value)


# Malice.


def zipped(parts, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in parts:
            file.writestr(name, content)
    return buffer.getvalue()


def sealed(content):
    """With a digest that holds, as anybody can write it."""
    return content[:-2] + b"G\0sha256:" + hashlib.sha256(content).hexdigest().encode()


def parts_of(content):
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return [(name, file.read(name)) for name in file.namelist()]


def as_legacy(content):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def as_script(content):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


def as_long_pickle(content):
    """With the byte in it by which a file of safetensors is known."""
    return b"\x80\x04\x8c\x05aaaa{0" + pickle.dumps(content)[2:]


POISONS = {
    "a torch file": saved,
    "a torch file with a digest": lambda content: sealed(saved(content)),
    "a torch file of newer format": lambda content: sealed(saved(content | {"version": 99})),
    "a pickle": pickle.dumps,
    "an old pickle": lambda content: pickle.dumps(content, 0),
    "a pickle like safetensors": as_long_pickle,
    "torch's format before": as_legacy,
    "a zip of other names": lambda content: zipped([("../../data.pkl", pickle.dumps(content))]),
    "a zip with two of one name": lambda content: zipped(
        [("archive/data.pkl", pickle.dumps({})), *parts_of(saved(content))]
    ),
}


@pytest.mark.filterwarnings("ignore:Duplicate name", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("where", ["module", "state", "beside"])
@pytest.mark.parametrize("poison", POISONS)
def test_what_is_in_a_file_is_not_run(tmp_path, poison, where, name):
    trap = tmp_path / "trapped"
    content = {
        "module": OURS | {"state": {"module": {"weight": Trap(trap)}, "optimizers": {}}},
        "state": OURS | {"state": Trap(trap)},
        "beside": OURS | {"state": {"module": {}, "optimizers": {}}, "more": Trap(trap)},
    }[where]
    path = tmp_path / name
    path.write_bytes(POISONS[poison](content))
    model = kt.Model(nn.Linear(1, 1), backend="cpu").compile("sgd", "mse")
    before = model.get_weights()
    for action in (model.load, model.load_weights, lambda path: kt.average_checkpoints([path, path])):
        with pytest.raises(ValueError, match=r"^'.*' (is|holds|was) .*\.$") as caught:
            action(path)
        assert "\n" not in str(caught.value)
    assert not trap.exists() and all(map(same, model.get_weights(), before))


def test_a_poison_would_have_worked(tmp_path):
    """Read without care, what the test above writes runs."""
    for number, write in enumerate((saved, lambda content: sealed(saved(content)), pickle.dumps, as_legacy)):
        content = OURS | {"state": Trap(tmp_path / str(number))}
        if write is pickle.dumps:
            pickle.loads(write(content))["state"].close()
        else:
            torch.load(io.BytesIO(write(content)), weights_only=False)["state"].close()
        assert (tmp_path / str(number)).exists()


def test_a_part_that_grows_when_it_is_unpacked_is_not_unpacked(memory):
    parts = [
        (name, content if "pkl" not in name else content + bytes(50_000_000)) for name, content in parts_of(saved(OURS))
    ]
    for content in (zipped(parts, zipfile.ZIP_DEFLATED), sealed(zipped(parts, zipfile.ZIP_DEFLATED))):
        (memory / "file").write_bytes(content)
        rss = peak_bytes()
        with pytest.raises(ValueError, match="is damaged: its parts are not as torch writes them. Give an older file"):
            checkpoint.read(memory / "file")
        assert peak_bytes() - rss < 20e6


def test_parts_are_as_large_as_they_say_and_no_larger_than_the_file(memory):
    """Also under a digest that holds, which says nothing of who made it."""
    packed = zipped([*parts_of(saved(OURS)), ("archive/noise", random.Random(0).randbytes(5000))], zipfile.ZIP_DEFLATED)
    stored = zipped(parts_of(saved(OURS)))
    sizes = stored.index(b"PK\1\2") + 20  # compressed and not, of the first part
    large = stored[:sizes] + 2 * (1 << 30).to_bytes(4, "little") + stored[sizes + 8 :]
    for content in (packed, sealed(packed), large, sealed(large)):
        (memory / "file").write_bytes(content)
        with pytest.raises(ValueError, match="is damaged: its parts are not as torch writes them. Give an older file"):
            checkpoint.read(memory / "file")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_parts_of_one_name_are_refused(memory):
    """Which of them is read, and which is summed, would be for each library to say."""
    parts = parts_of(saved(OURS))
    for content in (zipped([*parts, parts[0]]), sealed(zipped([*parts, parts[0]]))):
        (memory / "file").write_bytes(content)
        with pytest.raises(ValueError, match="is damaged: its parts are not as torch writes them. Give an older file"):
            checkpoint.read(memory / "file")


def test_a_tensor_larger_than_its_part_is_not_made_of_memory_of_others(memory):
    """torch 2.9 makes it, and dies when it is read."""
    large = (50_000_000).to_bytes(4, "little")
    small = saved(OURS | {"state": {"a": torch.arange(7777.0)}})
    count = b"M" + (7777).to_bytes(2, "little")
    parts = [(name, content.replace(count, b"J" + large)) for name, content in parts_of(small)]
    assert parts != parts_of(small)
    for content in (zipped(parts), sealed(zipped(parts))):
        (memory / "file").write_bytes(content)
        with pytest.raises(ValueError, match="is damaged: (record size|its tensors are larger than what is in it)"):
            checkpoint.read(memory / "file")


def test_of_what_torch_has_made_larger_nothing_is_returned(memory, monkeypatch):
    """On any version of torch; tensors that share memory count once."""
    flat = torch.ones(500)
    checkpoint.write(memory / "file", {"a": [flat, flat, {1: flat[:3]}]})
    assert len(checkpoint.read(memory / "file")["a"]) == 3
    monkeypatch.setattr(
        torch, "load", lambda *args, **options: OURS | {"version": 2, "state": {"a": (torch.ones(5000),)}}
    )
    with pytest.raises(ValueError, match="is damaged: its tensors are larger than what is in it. Give an older file"):
        checkpoint.read(memory / "file")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_no_checkpoint(tmp_path):
    (tmp_path / "a.pt").write_bytes(as_script(None))
    for read in (checkpoint.read, checkpoint.read_weights):
        with pytest.raises(ValueError, match=r"^'.*a\.pt' (is|holds) .*\.$"):
            read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "change",
    [{"version": "2"}, {"version": torch.tensor(2)}, {"format": torch.ones(2)}, {"state": [1]}, {"kerastorch": None}],
)
def test_a_head_of_other_kinds_is_somebody_elses(memory, change):
    (memory / "file").write_bytes(sealed(saved(OURS | change)))
    with pytest.raises(ValueError, match="is a torch file with a dict of somebody else's. Give a file that model.save"):
        checkpoint.read(memory / "file")


def test_a_state_without_weights_has_none_to_load(memory):
    checkpoint.write(memory / "a.pt", {"epochs_trained": 1})
    with pytest.raises(
        ValueError, match=r"^'.*a\.pt' has no weights in it\. Give a file that model\.save or model\.sav"
    ):
        checkpoint.read_weights(memory / "a.pt")
