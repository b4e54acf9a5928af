"""Files in zip archives, read with a bound: a few bytes of an archive can become gigabytes."""

import struct
import zipfile
import zlib
from collections.abc import Iterator

from headwise.errors import BadInput

PIECE = 2**20  # bytes
# What zipfile raises for damaged archives, unknown methods and passwords, and for names that are not there.
DAMAGE = (OSError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, ValueError, RuntimeError)


def pieces(archive: zipfile.ZipFile, name: str, most: int) -> Iterator[bytes]:
    """What a file in an archive holds. Raises BadInput beyond `most` bytes, whatever the archive says it has.

    Only deflate can be unpacked piece by piece.
    """
    found = archive.getinfo(name)
    if found.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadInput(f"{archive.filename}: {name} is not packed by deflate; unpack it, and pack it as usual.")
    left = most
    with archive.open(found) as file:
        while piece := file.read(PIECE):
            left -= len(piece)
            if found.file_size > most or left < 0:
                raise BadInput(f"{archive.filename}: {name} is larger than {most // 2**20} MiB; get it again.")
            yield piece
