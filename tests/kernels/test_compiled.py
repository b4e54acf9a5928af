"""The compiled kernel on disk: own, private and whole, or not loaded."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headwise import kernels
from headwise.errors import KernelUnavailable
from headwise.kernels import compiled, native

SOURCE = 'extern "C" int answer() { return 42; }\n'
OTHER_USER = 12345
posix = pytest.mark.skipif(os.name != "posix", reason="owners and permissions are those of POSIX")

pytestmark = pytest.mark.skipif(kernels.why_not("native") is not None, reason=str(kernels.why_not("native")))


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The cache folder, private."""
    place = tmp_path / "cache"
    monkeypatch.setenv("HEADWISE_CACHE", str(place))
    return place


@pytest.fixture
def load(folder, tmp_path):
    """Compile a small source, or find it: (path, its function, built)."""
    source = tmp_path / "small.cpp"
    source.write_text(SOURCE)
    return lambda: compiled.library(source, ("-shared", "-fPIC"), lambda library: library.answer)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Put a shell script in the compiler's place; $REAL is the real one."""
    real = " ".join(compiled.find_compiler())

    def write(script: str, *options: str) -> Path:
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\nREAL='{real}'\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", " ".join([str(path), *options]))
        return path

    return write


def refusal(load) -> str:
    with pytest.raises(KernelUnavailable) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_it_is_compiled_once(load, folder):
    (path, function, built), (again, _, built_again) = load(), load()
    assert (function(), built, built_again, again) == (42, True, False, path)
    assert list(folder.iterdir()) == [path]


# --- whole ---


def rewrite(path, content):
    """In a file of its own: this process has the old one mapped into memory, and would be killed when it ends."""
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_library_is_built_anew(load, folder, share):
    """Mapped into memory, it once killed the process."""
    path = load()[0]
    content = path.read_bytes()
    rewrite(path, content[: int(share * len(content))])
    found, function, built = load()
    assert (built, function()) == (True, 42)
    assert list(folder.iterdir()) == [found]
    assert load()[2] is False


def test_the_kernel_is_compiled_once_and_a_truncated_one_kills_no_process(folder, monkeypatch, tmp_path):
    """In another process, for the one that may be killed."""
    first, second = native.load.__wrapped__(), native.load.__wrapped__()
    assert (first.built, second.built, first.path) == (True, False, second.path)
    assert list(folder.iterdir()) == [first.path]
    (tmp_path / "other").mkdir(mode=0o700)
    (tmp_path / "other" / first.path.name).write_bytes(first.path.read_bytes()[:5000])
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "other"))
    script = "from headwise.kernels import native; print(native.load().built)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.parametrize("content", [b"", b"no library", b"\x7fELF" + bytes(100)])
def test_a_file_with_other_content_than_its_name_says_is_built_anew(load, content):
    path = load()[0]
    rewrite(path, content)
    assert load()[2] is True


def test_a_library_under_the_name_of_older_versions_is_not_loaded(load, folder):
    path = load()[0]
    path.rename(folder / f"{path.stem.rpartition('-')[0]}.so")
    assert load()[2] is True


def test_a_library_without_the_functions_is_refused_and_not_kept(folder, tmp_path):
    source = tmp_path / "small.cpp"
    source.write_text(SOURCE)
    said = refusal(lambda: compiled.library(source, ("-shared", "-fPIC"), lambda library: library.question))
    assert "cannot be used" in said and "question" in said
    assert list(folder.iterdir()) == []


def test_processes_that_build_at_once_all_get_it(folder, tmp_path):
    (tmp_path / "small.cpp").write_text(SOURCE)
    script = (
        "import sys; from pathlib import Path; from headwise.kernels import compiled\n"
        "found = compiled.library(Path(sys.argv[1]), ('-shared', '-fPIC'), lambda library: library.answer)\n"
        "print(found[1]())"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "small.cpp")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate() for process in running] == [("42\n", "")] * 2
    assert [path.suffix for path in folder.iterdir()] == [".so"]


# --- own and private ---


@posix
def test_folder_and_file_can_be_written_by_their_owner_only(load, folder):
    before = os.umask(0)
    try:
        path = load()[0]
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o755


@posix
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o702])
def test_a_folder_that_others_can_write_to_is_refused(load, folder, mode):
    load()
    folder.chmod(mode)
    assert refusal(load).endswith("set HEADWISE_CACHE to a folder of your own that only you can write to (chmod 700).")
    assert folder.stat().st_mode & 0o7777 == mode


@posix
def test_the_folder_of_our_own_name_is_closed_to_others(load, monkeypatch, tmp_path):
    """Made by an earlier version where umask let the group write."""
    monkeypatch.delenv("HEADWISE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "headwise").mkdir()
    (tmp_path / "headwise").chmod(0o775)
    assert load()[0].parent == tmp_path / "headwise"
    assert (tmp_path / "headwise").stat().st_mode & 0o777 == 0o700


def disown(monkeypatch, path: Path) -> None:
    """Give the path to another user, for root really, else for `os.stat`."""
    if os.geteuid() == 0:
        os.chown(path, OTHER_USER, -1)
        return
    stat = Path.stat

    def owned(self, **options):
        found = stat(self, **options)
        if self != path:
            return found
        return os.stat_result([*found[:4], OTHER_USER, *found[5:]])

    monkeypatch.setattr(Path, "stat", owned)


@posix
def test_a_folder_of_another_user_is_refused(load, folder, monkeypatch):
    load()
    disown(monkeypatch, folder)
    assert "set HEADWISE_CACHE" in refusal(load)


@posix
def test_a_library_of_another_user_is_refused_before_it_runs(load, folder, monkeypatch):
    path = load()[0]
    disown(monkeypatch, path)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail(f"{name} was loaded"))
    said = refusal(load)
    assert "belongs to another user" in said and "HEADWISE_CACHE" in said
    assert path.exists()


@posix
def test_a_library_that_others_can_write_to_is_built_anew(load):
    path = load()[0]
    path.chmod(0o777)
    assert load()[2] is True


def test_where_users_have_no_numbers(load, monkeypatch):
    """As on Windows, which knows no geteuid."""
    monkeypatch.setattr(compiled.os, "name", "nt")
    monkeypatch.delattr(compiled.os, "geteuid")
    monkeypatch.setattr(compiled, "_private", lambda folder: folder.mkdir() or folder)  # pathlib asks os.name, too
    assert compiled._is_trusted(os.stat_result([0o666, *[7] * 9]))
    assert compiled._is_closed(os.stat_result([0o666, *[7] * 9]))


# --- places ---


def test_a_folder_that_cannot_be_made(load, folder):
    folder.touch()
    assert "cannot be stored" in refusal(load)


def test_a_folder_that_is_named_relatively(load, monkeypatch, tmp_path):
    """The loader looks for a bare file name elsewhere."""
    (tmp_path / "here").mkdir(mode=0o700)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HEADWISE_CACHE", ".")
    assert [load()[2], load()[2]] == [True, False]


@posix
def test_a_folder_that_can_only_be_read_is_read(load, folder, monkeypatch):
    path = load()[0]

    def fail(**options):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(compiled.tempfile, "TemporaryDirectory", fail)  # root could write anyway
    assert load()[:1] == (path,)
    path.unlink()
    said = refusal(load)
    assert "Read-only file system" in said and "set HEADWISE_CACHE" in said


def test_no_home(load, monkeypatch):
    for name in ("HEADWISE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(compiled.Path, "home", fail)
    said = refusal(load)
    assert "no home folder" in said and "set HEADWISE_CACHE" in said


# --- compilers ---


def test_a_compiler_with_options(load, compiler):
    path = compiler('[ "$1" = wrapped ] || exit 7\nshift\nexec $REAL "$@"', "wrapped", "-DEXTRA='a b'")
    assert compiled.find_compiler() == [str(path), "wrapped", "-DEXTRA=a b"]
    assert load()[1]() == 42


def test_a_compiler_in_a_folder_with_a_space(load, monkeypatch, tmp_path):
    (tmp_path / "my tools").mkdir()
    link = tmp_path / "my tools" / "g++"
    link.symlink_to(compiled.find_compiler()[0])
    monkeypatch.setenv("CXX", str(link))
    assert compiled.find_compiler() == [str(link)]
    assert load()[1]() == 42


@pytest.mark.parametrize("chosen", ["", "  "])
def test_a_blank_choice_is_none(monkeypatch, chosen):
    before = compiled.find_compiler()
    monkeypatch.setenv("CXX", chosen)
    monkeypatch.setattr(compiled, "COMPILERS", (before[0],))
    assert compiled.find_compiler() == before[:1]


@pytest.mark.parametrize("chosen", ["no-such-compiler", "'g++", "no-such-compiler -O2"])
def test_a_compiler_that_is_not_there(load, monkeypatch, chosen):
    monkeypatch.setenv("CXX", chosen)
    assert f"CXX={chosen!r} is not there" in refusal(load)


FAILING = {
    "error": (
        "echo 'x.cpp:1: error: no such flag' >&2; exit 1",
        r"did not compile the kernel: x.cpp:1: error: no such flag",
    ),
    "silent": ("exit 3", "it gave no reason (exit code 3)"),
    "nothing written": ("exit 0", "reported no error but wrote no library"),
    "not utf-8": (r"printf '\377 error\n' >&2; exit 1", "\ufffd error"),
    "no library": ('for last; do :; done; [ "$last" = --version ] || echo no > "$last"', "cannot be used"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(load, folder, compiler, name):
    script, message = FAILING[name]
    compiler(script)
    assert message in refusal(load)
    assert list(folder.iterdir()) == []


@posix
@pytest.mark.parametrize("hangs", ["always", "when it compiles"])
def test_a_compiler_that_hangs_is_ended_with_all_it_has_started(load, folder, compiler, monkeypatch, tmp_path, hangs):
    version = '[ "$1" = --version ] && exit 0\n' if hangs != "always" else ""
    compiler(f"{version}sleep 600 &\necho $! > {tmp_path}/pid\nwait")
    monkeypatch.setattr(compiled, "TIMEOUT", 1)
    monkeypatch.setattr(compiled, "ASKING", 1)
    assert "did not end within 1 seconds: check CXX" in refusal(load)
    status = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/status")
    deadline = time.monotonic() + 10  # a signal that has been sent takes a moment to arrive

    def gone():
        try:
            return "Z (zombie)" in status.read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True

    while not gone() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone()
    assert list(folder.iterdir()) == []
