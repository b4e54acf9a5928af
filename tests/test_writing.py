"""What is written: where it cannot be, what is kept of what was there, links, modes, full disks, and one at a time."""

import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from families import random_ids, tiny_model
from killing import ended, forked, killed_at

import headwise
from headwise.artifacts.budget import Budget
from headwise.artifacts.origin import Origin
from headwise.artifacts.tensors import read_tensors, write_tensors
from headwise.errors import BadInput, HeadwiseError, WriteFailed
from headwise.files.locks import lock_of, locked
from headwise.files.writing import append, remove_leftovers, replacing, require_file, require_folder, write_bytes
from headwise.shapes import ModelShape

SHAPE = ModelShape(num_layers=3, layers=(0, 1, 2), kv_heads=2, query_heads=4, head_dim=16)
NOBODY = 65534


def budget():
    fractions = torch.full((1, 3, 2), 0.5)
    return Budget(ratios=torch.tensor([0.5]), fractions=fractions, origin=Origin(shape=SHAPE, model="a/b"))


def save_cache(path):
    headwise.compress(tiny_model(), random_ids(1, 60), "keydiff", keep=0.5).save(path)


WRITERS = {
    "bytes": lambda path: write_bytes(path, b"new"),
    "tensors": lambda path: write_tensors(path, "profile", {"a": torch.ones(3000)}, {}),
    "budget": lambda path: budget().save(path),
    "kvpress": lambda path: budget().to_kvpress(path),
    "cache": save_cache,
}
every_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def permissions(path):
    return stat.S_IMODE(path.stat().st_mode)


# --- where nothing can be written ---


def special(folder, kind):
    """A goal of this kind, or a skipped test where it cannot be made."""
    path = folder / "goal"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(os.path.relpath(path))
    elif kind == "device":
        try:
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))  # a copy of the null device
        except PermissionError:
            pytest.skip("devices are made by root only")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path)
    else:
        special(folder, kind.removeprefix("link to a "))
        path.rename(folder / "real")
        path.symlink_to(folder / "real")
    return path


KINDS = {
    "pipe": "it is a pipe",
    "socket": "it is a socket",
    "device": "it is a device",
    "folder": "it is a folder; name a file",
    "link to itself": "Too many levels of symbolic links",
    "link to a pipe": "it is a pipe",
    "link to a device": "it is a device",
    "link to a folder": "it is a folder; name a file",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_stays_as_it_is(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = special(tmp_path, kind)
    before, names = path.lstat(), sorted(tmp_path.iterdir())
    for write in WRITERS.values():
        with pytest.raises(BadInput, match=f"cannot write .*{KINDS[kind]}"):
            write(path)
    assert (path.lstat().st_mode, path.lstat().st_ino) == (before.st_mode, before.st_ino)
    assert sorted(tmp_path.iterdir()) == names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere/goal", "the folder .*nowhere does not exist; create it first"),
        ("file/goal", "Not a directory"),
        ("x" * 256, "File name too long"),
        ("a\0b", "null byte"),
        ("dangling", "the folder .*nowhere does not exist"),
    ],
)
def test_places_that_are_none(tmp_path, name, words):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "goal")
    for check in (require_file, WRITERS["tensors"]):
        with pytest.raises(BadInput, match=words):
            check(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


def as_nobody(work):
    """Do it as a user who may write hardly anywhere, in a folder of its own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)

    def without_rights():
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        work(folder)

    return folder, lambda: ended(forked(without_rights))


@pytest.mark.process
def test_a_folder_and_a_file_that_are_read_only_are_found_before_any_work():
    def look(folder):
        for check, path, words in (
            (require_file, folder / "new", "Permission denied"),
            (require_file, folder / "old", "the file is read-only"),
            (require_folder, folder, "Permission denied"),
            (require_folder, folder / "a" / "b", "Permission denied"),
            (WRITERS["tensors"], folder / "new", "Permission denied"),
        ):
            with pytest.raises(BadInput, match=f"cannot write .*{words}"):
                check(path)

    folder, run = as_nobody(look)
    (folder / "old").touch(0o444)
    folder.chmod(0o555)
    try:
        assert run() == 0
        assert [path.name for path in folder.iterdir()] == ["old"]
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_what_is_read_is_not_written(tmp_path):
    path, link, hard = tmp_path / "in", tmp_path / "link", tmp_path / "hard"
    path.touch()
    link.symlink_to(path)
    hard.hardlink_to(path)
    for one in (path, link, hard):
        with pytest.raises(BadInput, match="one of the files that are read"):
            require_file(one, inputs=[tmp_path / "nowhere", "x" * 300, path])
    require_file(tmp_path / "out", inputs=[path, tmp_path / "out"])


# --- what stays of what was there ---


@every_writer
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o777])
def test_a_file_keeps_its_mode_and_a_link_its_place(tmp_path, write, mode):
    real, link = tmp_path / "deep" / "real", tmp_path / "link"
    real.parent.mkdir()
    real.write_bytes(b"old")
    real.chmod(mode)
    link.symlink_to(Path("deep") / "real")
    write(link)
    assert link.is_symlink() and os.readlink(link) == "deep/real"
    assert permissions(real) == mode
    assert real.read_bytes() != b"old"
    assert (sorted(tmp_path.iterdir()), [*real.parent.iterdir()]) == ([real.parent, link], [real])


@every_writer
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path, write, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "new")
    finally:
        os.umask(before)
    assert permissions(tmp_path / "new") == 0o666 & ~umask
    assert len(list(tmp_path.iterdir())) == 1


def test_a_link_to_nothing_gets_its_target(tmp_path):
    (tmp_path / "link").symlink_to("target")
    write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_keeps_its_owner(tmp_path):
    path = tmp_path / "theirs"
    path.touch(0o640)
    os.chown(path, NOBODY, 12)
    write_bytes(path, b"new")
    found = path.stat()
    assert (found.st_uid, found.st_gid, permissions(path), path.read_bytes()) == (NOBODY, 12, 0o640, b"new")


def test_nobody_reads_a_private_file_while_it_is_written(tmp_path):
    path = tmp_path / "private"
    path.touch(0o600)
    with replacing(path) as temporary:
        temporary.write_bytes(b"secret")
        assert permissions(temporary.parent) == 0o700


@pytest.mark.parametrize("name", ["x" * 255, "\U0001f642" * 63, os.fsdecode(b"a\xff")], ids=["long", "wide", "bytes"])
def test_names_that_the_system_allows_are_allowed(tmp_path, name):
    write_tensors(tmp_path / name, "profile", {"a": torch.ones(3)}, {})
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with locked(lock_of(tmp_path / name), name):
        assert len(list(tmp_path.iterdir())) == 2
    if name.isprintable():
        assert read_tensors(tmp_path / name, "profile")[0]["a"].tolist() == [1, 1, 1]


def test_the_table_of_a_budget_is_written_through_the_same_door(tmp_path):
    path = tmp_path / "table.npy"
    path.touch(0o600)
    budget().to_kvpress(path)
    assert (np.load(path).shape, permissions(path)) == ((99, 3, 2), 0o600)


# --- where the system fails ---


@every_writer
@pytest.mark.process
def test_a_full_disk_leaves_what_was_there(tmp_path, write):
    """A limit on the size of files fails as a full disk does, and needs no rights."""
    path = tmp_path / "goal"
    path.write_bytes(b"old")

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2, 2))
        with pytest.raises(WriteFailed, match=r"cannot write .*goal: .*File too large.*is unchanged") as caught:
            write(path)
        assert isinstance(caught.value, HeadwiseError) and isinstance(caught.value, OSError)

    assert ended(forked(limited)) == 0
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.process
def test_a_disk_that_is_full_or_read_only_is_told(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems are mounted by root only")
    try:
        path = tmp_path / "goal"
        path.write_bytes(b"old")
        with pytest.raises(WriteFailed, match="No space left on device"):
            write_tensors(path, "profile", {"a": torch.ones(100_000)}, {})
        with pytest.raises(WriteFailed, match="No space left on device"):
            append(path, bytes(100_000))
        assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"old", [path])
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        for check in (require_file, require_folder, WRITERS["bytes"]):
            with pytest.raises(BadInput, match="Read-only file system"):
                check(tmp_path / "new")
        with pytest.raises(WriteFailed, match="Read-only file system"):
            append(path, b"more")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@every_writer
@pytest.mark.process
def test_a_kill_at_any_step_leaves_the_old_or_the_new(tmp_path, write):
    path = tmp_path / "goal"
    write(path)
    new, step = path.read_bytes(), 0
    path.write_bytes(b"old")
    while killed_at(step, tmp_path, lambda: write(path)):
        assert path.read_bytes() in (b"old", new)
        remove_leftovers(path)
        assert list(tmp_path.iterdir()) == [path]
        step += 1
    assert path.read_bytes() == new
    assert step >= 3


# --- one at a time ---


@pytest.mark.process
def test_a_lock_is_let_go_when_its_process_is_killed(tmp_path):
    lock = lock_of(tmp_path / "out")
    begun, ready = os.pipe()

    def hold():
        with locked(lock, "out"):
            os.write(ready, b"!")
            signal.pause()

    process = forked(hold)
    os.read(begun, 1)
    with pytest.raises(BadInput, match="another process is writing out"), locked(lock, "out"):
        pass
    assert lock.exists()
    os.kill(process, signal.SIGKILL)
    ended(process)
    with locked(lock, "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_one_for_a_file_and_a_link_to_it(tmp_path):
    (tmp_path / "link").symlink_to("real")
    assert lock_of(tmp_path / "link") == lock_of(tmp_path / "real") != lock_of(tmp_path / "other")


@pytest.mark.process
def test_of_many_at_once_one_is_let_in(tmp_path):
    """Each counts up a file a hundred times; without the lock some would read what another is about to change."""
    counter = tmp_path / "counter"
    counter.write_text("0")

    def add():
        done = 0
        while done < 100:
            try:
                with locked(tmp_path / "lock", counter):
                    counter.write_text(str(int(counter.read_text()) + 1))
                    done += 1
            except BadInput:
                pass

    assert [ended(process) for process in [forked(add) for _ in range(3)]] == [0, 0, 0]
    assert counter.read_text() == "300"
    assert list(tmp_path.iterdir()) == [counter]
