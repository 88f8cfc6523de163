"""Files appear whole or not at all, are read back from the disk, and stay what they were after an error."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from kerastorch import checkpoint, writing

KINDS = {
    "a.pt": (checkpoint.write, checkpoint.read),
    "a.safetensors": (checkpoint.write_weights, checkpoint.read_weights),
}
OLD, NEW = {"a": torch.zeros(100)}, {"a": torch.ones(100)}


def is_folder(opened):
    return stat.S_ISDIR(os.fstat(opened).st_mode)


def refused(path, text):
    """Writes the new over the old; that it is refused, and the old still there."""
    write, read = KINDS[path.name]
    with pytest.raises(OSError) as caught:
        write(path, NEW)
    assert str(caught.value) == (
        f"[Errno {caught.value.errno}] {str(path)!r} cannot be written: {text}. Make room or give another path; a file "
        f"that was there is as it was."
    )
    assert torch.equal(read(path)["a"], OLD["a"]) and os.listdir(path.parent) == [path.name]


LOSSES = {
    "a byte": lambda opened: os.pwrite(opened, b"\x17", os.fstat(opened).st_size // 2),
    "the end": lambda opened: os.ftruncate(opened, os.fstat(opened).st_size - 100),
    "all": lambda opened: os.ftruncate(opened, 0),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_what_the_disk_has_lost_without_a_word_does_not_take_the_place_of_what_was_there(
    tmp_path, monkeypatch, name, loss
):
    KINDS[name][0](tmp_path / name, OLD)
    monkeypatch.setattr(os, "fsync", lambda opened: is_folder(opened) or LOSSES[loss](opened))
    refused(tmp_path / name, "what was read back from the disk is not what was written")


def test_weights_that_change_while_they_are_written_are_not_kept(tmp_path, monkeypatch):
    """As those that are trained on in another thread; a state is hashed as it is written, in one go."""
    checkpoint.write_weights(tmp_path / "a.safetensors", OLD)
    digest, changing = checkpoint.hexdigest_of_weights, NEW["a"].clone()

    def hashed_and_changed(weights):
        found = digest(weights)
        changing.mul_(3)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "hexdigest_of_weights", hashed_and_changed)
        with pytest.raises(OSError, match="what was read back from the disk is not what was written"):
            checkpoint.write_weights(tmp_path / "a.safetensors", {"a": changing})
    assert torch.equal(checkpoint.read_weights(tmp_path / "a.safetensors")["a"], OLD["a"])


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no fsync of a folder")
@pytest.mark.parametrize("name", KINDS)
def test_file_and_folder_are_on_the_disk_in_this_order(tmp_path, monkeypatch, name):
    done, fsync, replace, fadvise = [], os.fsync, os.replace, getattr(os, "posix_fadvise", None)
    monkeypatch.setattr(
        os, "fsync", lambda opened: (done.append("folder" if is_folder(opened) else "file"), fsync(opened))
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    if fadvise is not None:
        monkeypatch.setattr(os, "posix_fadvise", lambda *args: (done.append(args[3]), fadvise(*args)))
    KINDS[name][0](tmp_path / name, NEW)
    assert [one for one in done if isinstance(one, str)] == ["file", "replace", "folder"]
    assert fadvise is None or done[1] == os.POSIX_FADV_DONTNEED


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_knows_no_fsync_of_a_folder_will_do(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "fsync", failing_for_folders(code))
    checkpoint.write(tmp_path / "a.pt", NEW)
    assert torch.equal(checkpoint.read(tmp_path / "a.pt")["a"], NEW["a"])


def test_a_folder_that_the_disk_does_not_take_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing_for_folders(errno.EIO))
    with pytest.raises(OSError) as caught:
        checkpoint.write(tmp_path / "a.pt", NEW)
    assert str(caught.value) == (
        f"[Errno 5] a file is in {str(tmp_path)!r}, which may forget it in a power cut: Input/output error. Check the "
        f"disk."
    )


def failing_for_folders(code):
    def fsync(opened):
        if is_folder(opened):
            raise OSError(code, os.strerror(code))

    return fsync


@pytest.mark.skipif(os.name == "nt", reason="needs the permissions of POSIX")
@pytest.mark.parametrize("name", KINDS)
def test_a_folder_that_may_not_be_written_to_leaves_the_file_as_it_was(name):
    folder = Path(tempfile.mkdtemp())  # not below a folder that another user may not enter
    try:
        KINDS[name][0](folder / name, OLD)
        folder.chmod(0o555)
        (folder / name).chmod(0o444)
        if os.geteuid() == 0:
            os.seteuid(65534)  # whom permissions hold
        refused(folder / name, "Permission denied")
    finally:
        os.seteuid(os.getuid())
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_that_is_gone_is_made_again(tmp_path, name):
    write, read = KINDS[name]
    write(tmp_path / "run" / name, OLD)
    shutil.rmtree(tmp_path / "run")
    write(tmp_path / "run" / name, NEW)
    assert torch.equal(read(tmp_path / "run" / name)["a"], NEW["a"])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_folder_that_goes_while_it_is_written_to_is_said(tmp_path, monkeypatch, name, moment):
    function = getattr(os, moment)

    def late(*args):
        shutil.rmtree(tmp_path / "run")
        return function(*args)

    monkeypatch.setattr(os, moment, late)
    with pytest.raises(
        OSError, match=r"cannot be written: No such file or directory\. Make room or give another path; "
    ):
        KINDS[name][0](tmp_path / "run" / name, NEW)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a pipe in a folder")
@pytest.mark.parametrize("name", KINDS)
def test_a_device_or_a_pipe_is_not_replaced(tmp_path, name):
    """As root could do to /dev/null."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match=r"a\.\w+' is a device or a pipe, and not to be replaced\. Give another path\."):
        KINDS[name][0](tmp_path / name, NEW)
    assert stat.S_ISFIFO((tmp_path / name).stat().st_mode)


def test_torch_writes_from_beginning_to_end():
    """What the digest of a state stands on: there is no going back in what is hashed."""
    file = io.BytesIO()
    hashed = writing.Hashed(file)
    torch.save({"a": torch.rand(300_000), "b": [torch.ones(3), "text"]}, hashed)
    assert hashed.hexdigest() == hashlib.sha256(file.getvalue()).hexdigest()
    assert file.getvalue()[-22:-18] == b"PK\5\6" and file.getvalue()[-2:] == b"\0\0", "an end without a comment"


@pytest.mark.parametrize("count", [0, 1, writing.CHUNK_BYTES - 1, writing.CHUNK_BYTES, 2 * writing.CHUNK_BYTES + 5])
def test_the_digest_of_the_first_bytes_of_a_file(count):
    data = os.urandom(count + 7)
    file = io.BytesIO(data)
    assert writing.hexdigest_of(file, count, then=b"end") == hashlib.sha256(data[:count] + b"end").hexdigest()
    assert writing.hexdigest_of(file, count + 99) == hashlib.sha256(data).hexdigest(), (
        "to its end, if that comes before"
    )


# What writers leave that are killed.


def leaves(path, then="os.kill(os.getpid(), 9)"):
    """A process that is about to put a file into its place, and then does something."""
    code = f"import os, sys; from kerastorch.writing import replacing\nwith replacing({str(path)!r}) as temporary:\n"
    code += f" temporary.write_bytes(b'half')\n print(temporary, flush=True)\n {then}"
    environment = os.environ | {"PYTHONPATH": str(Path(writing.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, env=environment
    )
    left = Path(process.stdout.readline().decode().strip())
    return process, left


@pytest.mark.parametrize("name", KINDS)
def test_what_a_killed_writer_leaves_the_next_one_of_the_same_file_removes(tmp_path, name):
    process, left = leaves(tmp_path / name)
    with process:
        assert process.wait(60) == -signal.SIGKILL and os.listdir(tmp_path) == [left.name]
    KINDS[name][0](tmp_path / ("another-" + name), NEW)
    assert left.exists()
    KINDS[name][0](tmp_path / name, NEW)
    assert sorted(os.listdir(tmp_path)) == [name, "another-" + name]


def test_what_a_writer_has_begun_that_lives_stays(tmp_path):
    """Of this process, too: another thread may write."""
    process, other = leaves(tmp_path / "a.pt", then="sys.stdin.read()")
    with process, writing.replacing(tmp_path / "a.pt") as own:
        own.write_bytes(b"own")
        checkpoint.write(tmp_path / "a.pt", NEW)
        assert other.read_bytes() == b"half" and own.read_bytes() == b"own"
        process.stdin.close()
        assert process.wait(60) == 0 and (tmp_path / "a.pt").read_bytes() == b"half"
    assert (tmp_path / "a.pt").read_bytes() == b"own" and os.listdir(tmp_path) == ["a.pt"]


def test_what_was_begun_elsewhere_goes_once_nobody_can_be_at_it(tmp_path, monkeypatch):
    """On another machine or in another container, where a process of that number may live."""
    process, left = leaves(tmp_path / "a.pt")
    with process:
        process.wait(60)
    elsewhere = left.with_name("-".join([left.name.split("-")[0], "0" * 12, *left.name.split("-")[2:]]))
    left.rename(elsewhere)
    checkpoint.write(tmp_path / "a.pt", NEW)
    assert elsewhere.exists()
    os.utime(elsewhere, (1, 1))  # a link to an old file is as old as that: it is its name that is new
    checkpoint.write(tmp_path / "a.pt", NEW)
    assert elsewhere.exists()
    later = time.time() + writing.UNTOUCHED_S + 5
    monkeypatch.setattr(time, "time", lambda: later)
    checkpoint.write(tmp_path / "a.pt", NEW)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_names_that_only_look_alike_are_nobodys_leftovers(tmp_path, monkeypatch):
    with writing.replacing(tmp_path / "a.pt") as temporary:
        temporary.touch()
        mark = temporary.name.split("-")[0]
    names = [f"{mark}-x-y-z.tmp", f"{mark}.tmp", f"{mark}-1-2.tmp"]
    for name in names:
        (tmp_path / name).touch()
    later = time.time() + writing.UNTOUCHED_S + 5
    monkeypatch.setattr(time, "time", lambda: later)
    checkpoint.write(tmp_path / "a.pt", NEW)
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "a.pt"])


def test_a_leftover_that_cannot_be_removed_hinders_nobody(tmp_path, monkeypatch):
    process, left = leaves(tmp_path / "a.pt")
    with process:
        process.wait(60)
    unlink = Path.unlink

    def refusing(path, missing_ok=False):
        if path == left:
            raise PermissionError(errno.EPERM, "not yours")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refusing)
    checkpoint.write(tmp_path / "a.pt", NEW)
    assert torch.equal(checkpoint.read(tmp_path / "a.pt")["a"], NEW["a"]) and left.exists()
