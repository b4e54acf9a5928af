"""Where a model is: the bundled one, a folder, or a hub id. Imports no torch, so that a wrong name is told at once."""

import os
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from headwise.errors import BadInput

REFERENCE = "reference"
_ADVICE = f"Give a folder written by save_pretrained, a hub id such as Qwen/Qwen3-4B, or {REFERENCE!r}."
PATIENCE = 3.0  # seconds for the hub's first answer, unless HF_HUB_ETAG_TIMEOUT says otherwise


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
    missing = _unreachable(url)
    if missing and file and not isinstance(try_to_load_from_cache(name, file), str):
        raise BadInput(f"cannot load {name!r}: there is no folder of this name, and {missing}. {advice(name)}")
    return Source(name=name, place=name, missing=missing)


def advice(name: str) -> str:
    """What to give instead of this name."""
    return (f"Did you mean {REFERENCE!r}? " if get_close_matches(name, [REFERENCE]) else "") + _ADVICE


def first_line(error: Exception) -> str:
    """The first line of an error, as a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0].strip().rstrip('.:')}."


def _unreachable(url: str) -> str:
    """Why the hub says nothing about a file, empty if it does: from_pretrained would try again for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE switches the hub off"
    seconds = float(constants.HF_HUB_ETAG_TIMEOUT) if "HF_HUB_ETAG_TIMEOUT" in os.environ else PATIENCE
    found: Queue[str] = Queue()
    # A host has several addresses, and a name server has its own patience: together they can take far longer.
    Thread(target=lambda: found.put(_ask(url, seconds)), daemon=True).start()
    try:
        return found.get(timeout=seconds)
    except Empty:
        return f"the hub did not answer within {seconds:g} seconds (HF_HUB_ETAG_TIMEOUT sets how long to wait)"


def _ask(url: str, seconds: float) -> str:
    try:
        get_hf_file_metadata(url, timeout=seconds)
    except HfHubHTTPError:  # an answer, if not a good one: from_pretrained says what it means
        pass
    except Exception as error:  # those of the HTTP library, which changes with the version of the hub's client
        return f"the hub could not be reached ({first_line(error).rstrip('.')})"
    return ""
