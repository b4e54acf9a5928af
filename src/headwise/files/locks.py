"""Lock a file, so that one process at a time writes. The system frees the lock when its process ends, however it ends.

The locked file is removed at the end. A killed process leaves the file, but not the lock.
"""

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from headwise.errors import BadInput, WriteFailed
from headwise.files.writing import reason

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

SUFFIX = ".headwise.lock"


def lock_of(path: str | os.PathLike[str]) -> Path:
    """Return the file that is locked while `path` is made. Its name is short, however long that of `path` is."""
    goal = Path(os.path.realpath(path))
    return goal.with_name(f".{hashlib.sha256(os.fsencode(goal.name)).hexdigest()[:16]}{SUFFIX}")


@contextmanager
def locked(lock: Path, path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the file `lock` while `path` is written. Raises BadInput if another process holds it, WriteFailed."""
    descriptor = None
    try:
        while descriptor is None:
            descriptor = _held(lock)
    except BlockingIOError as error:
        raise BadInput(
            f"another process is writing {path}. Wait until it has ended, or name another place with --out."
        ) from error
    except OSError as error:
        raise WriteFailed(f"cannot lock {lock}: {reason(error)}. Name a place on another file system.") from error
    try:
        yield
    finally:
        with suppress(OSError):  # removed while it is held: who comes now makes a new one
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                lock.unlink()
        os.close(descriptor)


def _held(lock: Path) -> int | None:
    """Return a descriptor that holds the lock, or None if the file was removed meanwhile.

    A lock on a removed file would keep nobody out.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        _take(descriptor)
        if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
            return descriptor
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _take(descriptor: int) -> None:
    """Raise BlockingIOError if another process holds it."""
    if sys.platform == "win32":
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
