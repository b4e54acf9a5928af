"""Read a file that may be anything: a device without an end, or more than memory holds."""

import os
import stat
from pathlib import Path

from headwise.errors import BadInput

MOST_BYTES = 2**30  # more than a hundred million words


def read_bytes(path: Path, max_bytes: int, description: str = "") -> bytes:
    """Read all of a file or a pipe. `description` names it in errors.

    Raises BadInput if it is a device or has more than `max_bytes`, and OSError.
    """
    name = f"{description} {path}".strip()
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not file.isatty()):
            raise BadInput(f"{name} is a device, not a file.")
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise BadInput(f"{name} is larger than {max_bytes // 2**20} MiB; give a part of it.")
    return data
