"""Loading a model and its tokenizer by hub id, by path, or the bundled one by the name "reference"."""

import os
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, Literal

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from headwise.errors import BadInput
from headwise.hf.families import shape_of

REFERENCE = "reference"
_ADVICE = f"Give a folder written by save_pretrained, a hub id such as Qwen/Qwen3-4B, or {REFERENCE!r}."
PATIENCE = 3.0  # seconds for the hub's first answer, unless HF_HUB_ETAG_TIMEOUT says otherwise
DEVICES = ("cpu", "cuda", "mps", "xpu")
DTYPES: dict[str, torch.dtype | Literal["auto"]] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """Where a model is read from."""

    name: str  # as it was given
    place: str  # folder or hub id
    missing: str = ""  # why nothing can come from the hub: what is in its cache must do


def reference_path() -> Path:
    """Folder of the bundled model, its tokenizer and its document."""
    return Path(str(files("headwise"))) / "reference"


def load(name: str, *, dtype: str = "auto", device: str = "auto") -> tuple[PreTrainedModel, Any]:
    """A model in eval mode and its tokenizer, padding on the left.

    `dtype` "auto" is the checkpoint's own (float32 for the bundled model); `device` "auto" is CUDA where there is one.
    Raises BadInput if it cannot be loaded, UnsupportedModel before any weight is read.
    """
    chosen = find_dtype(name, dtype)
    place = find_device(device)
    source = _find(name)
    shape_of(_read(AutoConfig, source))
    model = _read(AutoModelForCausalLM, source, dtype=chosen)
    tokenizer = _read(AutoTokenizer, source, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(place).eval(), tokenizer


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU or the machine has no memory left (on the CPU torch raises a plain RuntimeError)."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)


def load_config(name: str) -> PretrainedConfig:
    """The model's configuration only. Raises BadInput."""
    return _read(AutoConfig, _find(name))


def load_tokenizer(name: str) -> Any:
    """A model's tokenizer only. Raises BadInput."""
    return _read(AutoTokenizer, _find(name), what="the tokenizer of ")


def find_dtype(name: str, dtype: str) -> torch.dtype | Literal["auto"]:
    """What a model is loaded in: by name, or "auto", the checkpoint's own (of the bundled one float32).

    Raises BadInput.
    """
    if dtype not in DTYPES:
        raise BadInput(f"dtype={dtype!r} is not known; choose {', '.join(DTYPES)}.")
    return torch.float32 if (name, dtype) == (REFERENCE, "auto") else DTYPES[dtype]


def find_device(name: str) -> torch.device:
    """The device by name, after a first use of it. Raises BadInput."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in DEVICES:
        raise BadInput(f"device={name!r} cannot be used: it is none of {', '.join(DEVICES)}. Choose auto, cpu or cuda.")
    try:
        return torch.empty(0, device=name, dtype=torch.float32).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises all three, at length
        raise BadInput(f"device={name!r} cannot be used: {_reason(error):.60}... Choose auto, cpu or cuda.") from error


def _find(name: str) -> _Source:
    """Where the model of this name is. Raises BadInput for a file, and for a name that can only be a folder's."""
    if name == REFERENCE:
        return _Source(name=name, place=str(reference_path()))
    path = Path(name)
    if path.is_file():
        raise BadInput(f"{name!r} is a file; give the folder it is in.")
    if path.is_dir():
        return _Source(name=name, place=name)
    try:
        url = hf_hub_url(name, constants.CONFIG_NAME)
    except HFValidationError:
        url = None
    if url is None or name.startswith((".", "/", "~")):
        raise BadInput(f"there is no folder {name}. {_advice(name)}")
    return _Source(name=name, place=name, missing=_unreachable(url))


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
        return f"the hub could not be reached ({_reason(error).rstrip('.')})"
    return ""


def _advice(name: str) -> str:
    """What to give instead of this name."""
    return (f"Did you mean {REFERENCE!r}? " if get_close_matches(name, [REFERENCE]) else "") + _ADVICE


def _read(kind: Any, source: _Source, *, what: str = "", **options: Any) -> Any:
    """What a class of transformers reads there: data, never code that comes with a model."""
    local = {"local_files_only": True} if source.missing else {}
    try:
        return kind.from_pretrained(source.place, trust_remote_code=False, **local, **options)
    # A damaged weight file is a SafetensorError, a wrong size a RuntimeError, a missing library an ImportError.
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        reason, path = _reason(error), Path(source.place)
        if source.missing and isinstance(error, OSError):
            reason = f"there is no folder of this name, and {source.missing}."
        elif kind is AutoTokenizer and path.is_dir() and not any(path.glob("tokenizer*")):
            reason = "the folder has no tokenizer files (tokenizer.json, tokenizer_config.json)."
        raise BadInput(f"cannot load {what}{source.name!r}: {reason} {_advice(source.name)}") from error


def _reason(error: Exception) -> str:
    """The first line of an error, as a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0].strip().rstrip('.:')}."
