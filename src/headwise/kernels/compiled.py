"""A C++ file as a library: compiled for this machine at first use, kept in a folder of the user's own, loaded if whole.

A library runs in our process, so it is only loaded from a folder and a file that nobody else can write to, and if its
name has the SHA-256 of what is in it. It is written beside its place and renamed: others see all of it or none.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from headwise.errors import KernelUnavailable

COMPILERS = ("c++", "g++", "clang++")
TIMEOUT = 120  # seconds, to compile
ASKING = 20  # seconds, to tell a version
ADVICE = "set HEADWISE_CACHE to a folder of your own that only you can write to (chmod 700)"

Bound = TypeVar("Bound")


def library(source: Path, flags: Sequence[str], bind: Callable[[ctypes.CDLL], Bound]) -> tuple[Path, Bound, bool]:
    """Path, what `bind` makes of the loaded library, and whether it was built just now. Raises KernelUnavailable.

    `bind` looks up the functions: a library that lacks one is not stored.
    """
    command = find_compiler()
    folder = _private(cache_folder())
    name = _name(source, flags, command)
    for path in sorted(folder.glob(f"{name}-*.so")):
        if _is_whole(path):
            return path, _open(path, bind), False
        with suppress(OSError):  # it is not used in any case; another process may have been faster
            path.unlink()
    return *_build([*command, *flags, str(source)], folder, name, bind), True


def find_compiler() -> list[str]:
    """The C++ compiler as a command: a path, and what else $CXX holds. Raises KernelUnavailable if there is none."""
    chosen = os.environ.get("CXX", "").strip()
    for words in _commands(chosen) if chosen else [[name] for name in COMPILERS]:
        found = shutil.which(words[0]) if words else None
        if found:
            return [found, *words[1:]]
    wanted = f"CXX={chosen!r} is not there" if chosen else f"none of {', '.join(COMPILERS)} is installed"
    raise KernelUnavailable(f"the C++ kernel needs a compiler, and {wanted}: install g++ or clang++, or set CXX.")


def cache_folder() -> Path:
    """Where compiled kernels are kept. Raises KernelUnavailable where the user has no home folder."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(os.environ.get("HEADWISE_CACHE") or Path(base) / "headwise")
    except RuntimeError as error:
        raise KernelUnavailable(f"the compiled kernel has no place, for there is no home folder: {ADVICE}.") from error


def _commands(chosen: str) -> list[list[str]]:
    """What $CXX may mean: one path, perhaps with spaces, or a command with options."""
    try:
        return [[chosen], shlex.split(chosen, posix=os.name == "posix")]
    except ValueError:  # a quotation mark too many
        return [[chosen]]


def _private(folder: Path) -> Path:
    """The folder, made if it is not there. Raises KernelUnavailable if others can put files into it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (os.environ.get("HEADWISE_CACHE") or _is_closed(folder.stat())) and _is_trusted(folder.stat()):
            folder.chmod(0o700)  # the folder of our own name, which earlier versions made with the user's umask
        found = folder.stat()
    except OSError as error:
        raise _no_place(folder, error) from error
    if not (_is_trusted(found) and _is_closed(found)):
        raise KernelUnavailable(f"other users can put files into {folder}, and its libraries would run here: {ADVICE}.")
    return folder


def _is_whole(path: Path) -> bool:
    """Whether it is a library that we have written, all of it. Raises KernelUnavailable for a file of somebody else."""
    try:
        found = path.stat()
        if not _is_trusted(found):
            raise KernelUnavailable(f"{path} belongs to another user, so it is not loaded: delete it, or {ADVICE}.")
        regular = stat.S_ISREG(found.st_mode) and _is_closed(found)
        return regular and path.stem.endswith(f"-{_sum(path)}")
    except OSError:
        return False


def _is_trusted(found: os.stat_result) -> bool:
    """Ours, or root's, who can do anything anyway. Windows has no such owners: folders of users are closed there."""
    return os.name != "posix" or found.st_uid in (os.geteuid(), 0)


def _is_closed(found: os.stat_result) -> bool:
    return os.name != "posix" or not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _name(source: Path, flags: Sequence[str], command: Sequence[str]) -> str:
    """Changes with everything that the result depends on."""
    version = _run([*command, "--version"], ASKING).stdout
    parts = (source.read_text(encoding="utf-8"), *command, version, *flags, platform.platform(), _cpu())
    return f"{source.stem}-{hashlib.sha256(chr(0).join(parts).encode(errors='replace')).hexdigest()[:16]}"


def _cpu() -> str:
    """What -march=native looks at, where the system tells."""
    info = Path("/proc/cpuinfo")
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else [platform.processor()]
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _build(command: Sequence[str], folder: Path, name: str, bind: Callable[[ctypes.CDLL], Bound]) -> tuple[Path, Bound]:
    """Compile beside the goal, try it, then move it there."""
    try:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = Path(place) / "made.so"
            done = _run([*command, "-o", str(made)], TIMEOUT)
            if done.returncode != 0:
                raise KernelUnavailable(f"{command[0]} did not compile the kernel: {_first_error(done)}")
            if not made.is_file():
                raise KernelUnavailable(f"{command[0]} reported no error but wrote no library: is it a C++ compiler?")
            made.chmod(0o755)  # never writable by others, whatever the umask
            bound = _open(made, bind)
            return made.replace(folder / f"{name}-{_sum(made)}.so"), bound
    except OSError as error:
        raise _no_place(folder, error) from error


def _open(path: Path, bind: Callable[[ctypes.CDLL], Bound]) -> Bound:
    try:
        return bind(ctypes.CDLL(str(path.absolute())))  # a bare name would be looked for elsewhere
    except (OSError, AttributeError) as error:  # not loadable, or a function is missing
        raise KernelUnavailable(
            f"the compiled kernel {path} cannot be used ({error}): check CXX, or {ADVICE}."
        ) from error


def _no_place(folder: Path, error: OSError) -> KernelUnavailable:
    return KernelUnavailable(f"the compiled kernel cannot be stored in {folder} ({error}): {ADVICE}.")


def _run(command: Sequence[str], seconds: int) -> subprocess.CompletedProcess[str]:
    """Run a command that gets no input, in a process group of its own: what it has started ends with it."""
    try:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            process_group=0,
        ) as process:
            try:
                out, err = process.communicate(timeout=seconds)
            except BaseException:
                _end(process)
                raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)
    except subprocess.TimeoutExpired as error:
        raise KernelUnavailable(f"{command[0]} did not end within {seconds} seconds: check CXX.") from error
    except OSError as error:
        raise KernelUnavailable(f"{command[0]} cannot be run ({error}): check CXX.") from error


def _end(process: subprocess.Popen[str]) -> None:
    if os.name == "posix":
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _first_error(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr + done.stdout).splitlines()
    errors = (
        [line for line in lines if "error" in line] or lines or [f"it gave no reason (exit code {done.returncode})."]
    )
    return errors[0]
