"""Where a model is: the bundled one, a folder, or a hub id. Imports no torch, so that a wrong name is told at once."""

from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from headwise.errors import BadInput
from headwise.files.hub import unreachable

REFERENCE = "reference"
_ADVICE = f"Give a folder written by save_pretrained, a hub id such as Qwen/Qwen3-4B, or {REFERENCE!r}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a model is read from."""

    name: str  # as it was given
    place: str  # folder or hub id
    missing: str = ""  # why nothing can come from the hub: what is in its cache must do


def reference_path() -> Path:
    """Folder of the bundled model, its tokenizer and its document."""
    return Path(str(files("headwise"))) / "reference"


def find(name: str | Source, *, file: str = constants.CONFIG_NAME) -> Source:
    """Where the model of this name is; what was found already is returned. `file` is one that must be there.

    Raises BadInput for a file, a folder without that one, a name that can only be a folder's, and where neither the hub
    nor its cache has it.
    """
    if isinstance(name, Source):
        return name
    if name == REFERENCE:
        return Source(name=name, place=str(reference_path()))
    path = Path(name)
    if path.is_file():
        raise BadInput(f"{name!r} is a file; give the folder it is in.")
    if path.is_dir():
        if file and not (path / file).is_file():
            raise BadInput(f"cannot load {name!r}: the folder has no {file}. {_ADVICE}")
        return Source(name=name, place=name)
    try:
        url = hf_hub_url(name, constants.CONFIG_NAME)
    except HFValidationError:
        url = None
    if url is None or name.startswith((".", "/", "~")):
        raise BadInput(f"there is no folder {name}. {advice(name)}")
    missing = unreachable(url)
    if missing and file and not isinstance(try_to_load_from_cache(name, file), str):
        raise BadInput(f"cannot load {name!r}: there is no folder of this name, and {missing}. {advice(name)}")
    return Source(name=name, place=name, missing=missing)


def advice(name: str) -> str:
    """What to give instead of this name."""
    return (f"Did you mean {REFERENCE!r}? " if get_close_matches(name, [REFERENCE]) else "") + _ADVICE
