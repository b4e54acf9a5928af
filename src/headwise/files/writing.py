"""Write files at once or not at all, and over nothing but a regular file.

`require_file` and `require_folder` check a goal before any work is done for it. `replacing` writes a file beside the
goal, which then takes its place: a reader sees the old file or the new one. A link stays a link, and its target is
replaced. A file that was there keeps its mode and, if the system allows it, its owner.

Imports no torch: reports need this too.
"""

import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from headwise.errors import BadInput, WriteFailed

_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{12}\.tmp")
_SHOWN = 40  # characters of a goal's name in the name of its temporary file; a name has at most 255 bytes


def require_file(path: str | os.PathLike[str], *, inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Raise BadInput unless a file can be written at `path`, and it is none of the `inputs`.

    The folder must exist and be writable. If there is something at `path`, it must be a regular, writable file.
    """
    try:
        status = _status(path)
        if status is not None:
            _require_regular(path, status)
            if any(os.path.exists(source) and os.path.samestat(status, os.stat(source)) for source in inputs):
                raise BadInput(f"cannot write {path}: it is one of the files that are read. Name another file.")
        folder = _target(path).parent
        if not folder.is_dir():
            raise BadInput(f"cannot write {path}: the folder {folder} does not exist; create it first.")
        _require_room(folder)
    except BadInput:
        raise
    except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
        raise BadInput(f"cannot write {path}: {reason(error)}. Name another file.") from error


def require_folder(path: str | os.PathLike[str]) -> None:
    """Raise BadInput unless `path` is a folder in which files can be written, or one that can be made."""
    nearest = Path(path)
    try:
        while not os.path.lexists(nearest) and nearest != nearest.parent:
            nearest = nearest.parent
        if not stat.S_ISDIR(os.stat(nearest).st_mode):
            raise BadInput(f"cannot write to {path}: {nearest} is no folder. Name another folder.")
        _status(path)
        _require_room(nearest)
    except BadInput:
        raise
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot write to {path}: {reason(error)}. Name another folder.") from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file near `path`. It takes the place of `path` if the block ends well, else it is removed.

    Raises BadInput as `require_file` does, and WriteFailed if the system fails: a full disk, a limit.
    """
    require_file(path)
    goal = _target(path)
    before = _status(goal)
    folder = goal.with_name(f".{goal.name[:_SHOWN]}.{uuid4().hex[:12]}.tmp")
    try:
        folder.mkdir(mode=0o700)  # nobody else may read what a private file is about to hold
        temporary = folder / "new"
        temporary.touch()
        fresh = temporary.stat()
        yield temporary
        _settle(temporary, before or fresh)
        os.replace(temporary, goal)
    except WriteFailed:
        raise
    except OSError as error:
        raise failed(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file, as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def append(path: str | os.PathLike[str], content: bytes) -> None:
    """Add to a file. Raises WriteFailed if the system fails; then nothing is added."""
    start = None
    try:
        with open(path, "ab") as file:
            start = file.tell()
            file.write(content)
    except OSError as error:
        if start is not None:
            with suppress(OSError):
                os.truncate(path, start)
        raise failed(path, error) from error


def remove(path: Path) -> None:
    """Remove a file or a folder that this program has made. Raises WriteFailed if the system fails."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise WriteFailed(f"cannot remove {path}: {reason(error)}. Remove it yourself.") from error


def left_of(name: str) -> str | None:
    """Return the start of the name of the file that a killed process was writing in a folder of this name, or None."""
    match = _LEFTOVER.fullmatch(name)
    return match and match[1]


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove what killed processes left of writing `path`. The caller must hold its lock, see locks.py."""
    goal = _target(path)
    for entry in goal.parent.iterdir():
        if left_of(entry.name) == goal.name[:_SHOWN]:
            remove(entry)


def failed(path: str | os.PathLike[str], error: OSError) -> WriteFailed:
    """Return the error to raise if the system failed while `path` was written."""
    return WriteFailed(f"cannot write {path}: {reason(error)}. What was there before is unchanged.")


def reason(error: BaseException) -> str:
    """Return the system's text of an error, without number and path."""
    message = error.strerror if isinstance(error, OSError) else None
    return (message or str(error) or type(error).__name__).rstrip(".")


def _target(path: str | os.PathLike[str]) -> Path:
    """Return the file itself if `path` is a link to it."""
    return Path(os.path.realpath(path))


def _status(path: str | os.PathLike[str]) -> os.stat_result | None:
    """Return the status of what is at `path`, links followed; None if there is nothing."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _require_regular(path: str | os.PathLike[str], status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise BadInput(f"cannot write {path}: it is a folder; name a file.")
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise BadInput(f"cannot write {path}: it is {kind}, no regular file. Name another file.")
    if not os.access(path, os.W_OK):
        raise BadInput(f"cannot write {path}: the file is read-only. Name another file.")


def _require_room(folder: Path) -> None:
    """Raise OSError unless a file can be made there. Only trying shows it, on every kind of file system."""
    with tempfile.TemporaryFile(dir=folder):
        pass


def _settle(temporary: Path, status: os.stat_result) -> None:
    """Put the content on the disk, which fails if that is full, and give the file its owner and mode."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    if sys.platform != "win32":
        for owner, group in ((-1, status.st_gid), (status.st_uid, -1)):
            with suppress(PermissionError):
                os.chown(temporary, owner, group)
    temporary.chmod(stat.S_IMODE(status.st_mode))
