"""Work that is done context by context into files beside the result, so that a killed run goes on where it was.

Processes can share the work. Neither that nor a kill changes the result: parts are put together in the data's order.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from headwise.artifacts.tensors import describe, fingerprint
from headwise.errors import BadInput
from headwise.files.writing import failed, remove, require_folder

_PART = re.compile(r"[0-9a-f]{24}\.safetensors")
# What a killed process leaves of writing one: a folder now, files when headwise was older.
_TEMPORARY = re.compile(rf"\.{_PART.pattern}\.[0-9a-f]{{12,32}}\.tmp|\.tmp\w{{6}}")


class Parts:
    """The folder OUT.parts of a result OUT, which `what` names in messages."""

    def __init__(self, out: str | os.PathLike[str], what: str):
        self.folder, self.what = Path(f"{os.fspath(out)}.parts"), what

    def file(self, *named: Tensor | str) -> Path:
        """The file of what these name."""
        return self.folder / f"{fingerprint(*named)[:24]}.safetensors"

    def require(self) -> None:
        """Raise BadInput if the folder cannot be written, or holds what is no part: it would be lost."""
        require_folder(self.folder)
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            ours = _PART.fullmatch(path.name) and describe(path).get("kind") == "part"
            if not (ours or _TEMPORARY.fullmatch(path.name)):
                raise BadInput(
                    f"the folder {self.folder} holds {path.name}, which is no part of {self.what}. Move it away, or "
                    "name another --out."
                )

    def make(self) -> None:
        """Raises WriteFailed."""
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise failed(self.folder, error) from error

    def remove(self) -> None:
        """Remove parts, and their folder if nobody has put something else there."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if _TEMPORARY.fullmatch(path.name) or _PART.fullmatch(path.name):
                remove(path)
        with suppress(OSError):
            self.folder.rmdir()
