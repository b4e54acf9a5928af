"""Read files in zip archives with a limit: a few bytes of an archive can become gigabytes."""

import struct
import zipfile
import zlib
from collections.abc import Iterator

from headwise.errors import BadInput

PIECE = 2**20  # bytes
# What zipfile raises for damaged archives, unknown methods and passwords, and for names that are not there.
DAMAGE = (OSError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, ValueError, RuntimeError)


def pieces(archive: zipfile.ZipFile, name: str, max_bytes: int) -> Iterator[bytes]:
    """Yield what a file in an archive holds, in pieces.

    Raises BadInput if it has more than `max_bytes`, whatever the archive says, or is not packed by deflate: only that
    can be unpacked piece by piece.
    """
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadInput(f"{archive.filename}: {name} is not packed by deflate; unpack it, and pack it as usual.")
    remaining = max_bytes
    with archive.open(info) as file:
        while piece := file.read(PIECE):
            remaining -= len(piece)
            if info.file_size > max_bytes or remaining < 0:
                raise BadInput(f"{archive.filename}: {name} is larger than {max_bytes // 2**20} MiB; get it again.")
            yield piece
