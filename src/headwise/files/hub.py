"""Fetch files of others from the model hub: budgets and gates, `hub:owner/name[/file.safetensors][@revision]`.

Only safetensors files are read: data, checked like any other file. No code of a repository is run.
"""

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from headwise.errors import BadInput

PATIENCE = 3.0  # seconds for the hub's first answer, unless HF_HUB_ETAG_TIMEOUT says otherwise
_NAME = re.compile(r"hub:(?P<repo>[^/@\s]+/[^/@\s]+)(/(?P<file>[^@]+))?(@(?P<revision>\S+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FORM = "write hub:owner/name, hub:owner/name/FILE.safetensors, or either with @REVISION"


@dataclass(frozen=True, kw_only=True, slots=True)
class HubFile:
    """A file in the hub's cache on this machine. `source` names it with the commit that it is of."""

    path: Path
    source: str


@lru_cache(maxsize=32)  # both halves of a method are of one commit, and a branch that moves changes no running process
def fetch(name: str, default: str) -> HubFile:
    """Fetch the file that `hub:...` names. `default` is its name if only a repository is named.

    If the hub does not answer, the file must be in its cache. Raises BadInput if the name is wrong, or the file cannot
    be read.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise BadInput(f"{name!r} names no file on the hub: {_FORM}.")
    repo, file, revision = match["repo"], match["file"] or default, match["revision"]
    if not file.endswith(".safetensors") or not set(file.split("/")).isdisjoint({"", ".", ".."}):
        raise BadInput(f"{name!r}: {file!r} is not read from the hub, only safetensors files are; {_FORM}.")
    try:
        missing = unreachable(hf_hub_url(repo, file, revision=revision))
    except HFValidationError as error:
        raise BadInput(f"{name!r}: {first_line(error)} Check the name; {_FORM}.") from error
    try:
        path = Path(hf_hub_download(repo, file, revision=revision, local_files_only=bool(missing)))
    except Exception as error:  # besides the hub's own: those of the HTTP library, which changes with its version
        reason = f"{missing}, and the file is not in the hub's cache on this machine." if missing else _explain(error)
        raise BadInput(f"cannot read {file!r} of {repo!r}{_at(revision)} on the hub: {reason}") from error
    return HubFile(path=path, source=f"hub:{repo}/{file}@{_commit(path)}")


def _commit(path: Path) -> str:
    """Return the commit of a file in the hub's cache, .../snapshots/COMMIT/. Raises BadInput if there is none."""
    commits = [part for part in path.parts if _COMMIT.fullmatch(part)]
    if not commits:
        raise BadInput(f"{path} does not say of which commit it is: the hub's cache is not laid out as it should be.")
    return commits[-1]


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at {revision!r}"


def _explain(error: Exception) -> str:
    """Return what an error of the hub means."""
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private or gated: check the name, or log in with 'hf auth login'."
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision: give a branch, a tag or a commit."
    if isinstance(error, EntryNotFoundError):
        return "the repository has no such file there: name one as hub:owner/name/FILE.safetensors."
    return first_line(error)


def unreachable(url: str) -> str:
    """Return why the hub does not answer about a file, empty if it does. Its client would retry for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE switches the hub off"
    seconds = float(constants.HF_HUB_ETAG_TIMEOUT) if "HF_HUB_ETAG_TIMEOUT" in os.environ else PATIENCE
    reasons: Queue[str] = Queue()
    # A host has several addresses, and a name server has its own patience: together they can take far longer.
    Thread(target=lambda: reasons.put(_ask(url, seconds)), daemon=True).start()
    try:
        return reasons.get(timeout=seconds)
    except Empty:
        return f"the hub did not answer within {seconds:g} seconds (HF_HUB_ETAG_TIMEOUT sets how long to wait)"


def first_line(error: Exception) -> str:
    """Return the first line of an error, as a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0].strip().rstrip('.:')}."


def _ask(url: str, seconds: float) -> str:
    try:
        get_hf_file_metadata(url, timeout=seconds)
    except HfHubHTTPError:  # an answer, if not a good one: the download says what it means
        pass
    except Exception as error:  # those of the HTTP library, which changes with the version of the hub's client
        return f"the hub could not be reached ({first_line(error).rstrip('.')})"
    return ""
