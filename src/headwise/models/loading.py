"""Loading a model and its tokenizer by hub id, by path, or the bundled one by the name "reference"."""

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForImageTextToText,
)

from headwise.errors import BadInput, UnsupportedModel
from headwise.files.hub import first_line
from headwise.models.families import shape_of
from headwise.models.places import REFERENCE as REFERENCE
from headwise.models.places import Source, advice, find
from headwise.models.places import reference_path as reference_path

DEVICES = ("cpu", "cuda", "mps", "xpu")
DTYPES: dict[str, torch.dtype | Literal["auto"]] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load(name: str | Source, *, dtype: str = "auto", device: str = "auto") -> tuple[PreTrainedModel, Any]:
    """A model in eval mode and its tokenizer, padding on the left.

    `dtype` "auto" is the checkpoint's own (float32 for the bundled model); `device` "auto" is CUDA where there is one.
    Raises BadInput if it cannot be loaded, UnsupportedModel before any weight is read.
    """
    place, source = find_device(device), find(name)
    chosen = find_dtype(source.name, dtype)
    config = load_config(source)
    shape_of(config)
    model = _read(auto_class(config), source, dtype=chosen)
    tokenizer = _read(AutoTokenizer, source, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(place).eval(), tokenizer


def auto_class(config: PretrainedConfig) -> type[AutoModelForCausalLM | AutoModelForImageTextToText]:
    """Which class of transformers makes a model of a configuration: many that see images are of none but the second.

    Raises UnsupportedModel if neither makes one.
    """
    for kind, known in (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    ):
        if type(config) in known:
            return kind
    raise UnsupportedModel(
        f"model type {config.model_type!r} is not supported: transformers makes no causal language model of it."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU or the machine has no memory left (on the CPU torch raises a plain RuntimeError)."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)


def load_config(name: str | Source) -> PretrainedConfig:
    """The model's configuration only. Raises BadInput, UnsupportedModel if it is of no causal language model."""
    config = _read(AutoConfig, find(name))
    auto_class(config)
    return config


def load_tokenizer(name: str | Source) -> Any:
    """A model's tokenizer only. Raises BadInput."""
    return _read(AutoTokenizer, find(name, file=""), what="the tokenizer of ")


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
        raise BadInput(
            f"device={name!r} cannot be used: {first_line(error):.60}... Choose auto, cpu or cuda."
        ) from error


def _read(kind: Any, source: Source, *, what: str = "", **options: Any) -> Any:
    """What a class of transformers reads there: data, never code that comes with a model."""
    local = {"local_files_only": True} if source.missing else {}
    try:
        return kind.from_pretrained(source.place, trust_remote_code=False, **local, **options)
    # A damaged weight file is a SafetensorError, a wrong size a RuntimeError, a missing library an ImportError.
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        reason, path = first_line(error), Path(source.place)
        if source.missing and isinstance(error, OSError):
            reason = f"there is no folder of this name, and {source.missing}."
        elif kind is AutoTokenizer and path.is_dir() and not any(path.glob("tokenizer*")):
            reason = "the folder has no tokenizer files (tokenizer.json, tokenizer_config.json)."
        raise BadInput(f"cannot load {what}{source.name!r}: {reason} {advice(source.name)}") from error
