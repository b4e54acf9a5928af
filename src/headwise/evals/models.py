"""Loading a model and its tokenizer by hub id, by path, or the bundled one by the name "reference"."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from headwise.errors import BadInput
from headwise.hf.families import shape_of

REFERENCE = "reference"
_ADVICE = f"Give a folder written by save_pretrained, a hub id such as Qwen/Qwen3-4B, or {REFERENCE!r}."
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def reference_path() -> Path:
    """Folder of the bundled model, its tokenizer and its document."""
    return Path(str(files("headwise"))) / "reference"


def load(name: str, *, dtype: str = "auto", device: str = "auto") -> tuple[PreTrainedModel, Any]:
    """A model in eval mode and its tokenizer, padding on the left.

    `dtype` "auto" is the checkpoint's own (float32 for the bundled model); `device` "auto" is CUDA where there is one.
    Raises BadInput if it cannot be loaded, UnsupportedModel before any weight is read.
    """
    if dtype not in DTYPES:
        raise BadInput(f"dtype={dtype!r} is not known; choose {', '.join(DTYPES)}.")
    place = find_device(device)
    shape_of(load_config(name))
    chosen = torch.float32 if (name, dtype) == (REFERENCE, "auto") else DTYPES[dtype]
    model = _read(AutoModelForCausalLM, name, dtype=chosen)
    tokenizer = _read(AutoTokenizer, name, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(place).eval(), tokenizer


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU or the machine has no memory left (on the CPU torch raises a plain RuntimeError)."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)


def load_config(name: str) -> PretrainedConfig:
    """The model's configuration only. Raises BadInput."""
    return _read(AutoConfig, name)


def find_device(name: str) -> torch.device:
    """The device by name, after a first use of it. Raises BadInput."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises all three
        raise BadInput(f"device={name!r} cannot be used: {_reason(error)} Choose auto, cpu or cuda.") from error


def _read(kind: Any, name: str, **options: Any) -> Any:
    path = reference_path() if name == REFERENCE else Path(name)
    if path.is_file():
        raise BadInput(f"{name!r} is a file; give the folder it is in.")
    if name.startswith((".", "/", "~")) and not path.is_dir():
        raise BadInput(f"there is no folder {name}. {_ADVICE}")
    try:
        return kind.from_pretrained(str(path) if name == REFERENCE else name, **options)
    # A damaged weight file is a SafetensorError, a wrong size a RuntimeError, a missing library an ImportError.
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        reason = _reason(error)
        if kind is AutoTokenizer and path.is_dir() and not any(path.glob("tokenizer*")):
            reason = "the folder has no tokenizer files (tokenizer.json, tokenizer_config.json)."
        raise BadInput(f"cannot load {name!r}: {reason} {_ADVICE}") from error


def _reason(error: Exception) -> str:
    """The first line of an error, as a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0].strip().rstrip('.:')}."
