"""Reading a file that may be anything: a device without an end, or more than memory holds."""

import os
import stat
from pathlib import Path

from headwise.errors import BadInput

MOST_BYTES = 2**30  # more than a hundred million words


def read_bytes(path: Path, most: int, what: str = "") -> bytes:
    """All of a file, or of a pipe, of at most `most` bytes. Raises BadInput for more or a device, OSError."""
    name = f"{what} {path}".strip()
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not file.isatty()):
            raise BadInput(f"{name} is a device, not a file.")
        data = file.read(most + 1)
    if len(data) > most:
        raise BadInput(f"{name} is larger than {most // 2**20} MiB; give a part of it.")
    return data
