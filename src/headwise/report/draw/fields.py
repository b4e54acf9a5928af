"""The fields of `headwise eval`'s and `headwise bench`'s files, each with what checks it (strict_json.py).

records.py and benchmarks.py read the files.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from headwise.files.strict_json import (
    MOST,
    Check,
    above_0,
    count,
    flag,
    list_of,
    mapping,
    number,
    or_none,
    positive,
    seed,
    size,
    text,
    texts,
    whole,
)
from headwise.shapes import ModelShape

ADVICE = "remove it, or evaluate into a new folder."


def versions(value: Any) -> dict[str, str]:
    """Return versions of libraries, by name. Raises an error if a value is none."""
    return {text(name): text(str(version)) for name, version in mapping(value).items()}


def model_shape(value: Any) -> ModelShape:
    """Return the sizes of a model."""
    sizes = {name: value[name] for name in ("num_layers", "kv_heads", "query_heads", "head_dim")}
    return ModelShape(**sizes, layers=list_of(size)(value["layers"]))


def _entries(value: Any) -> np.ndarray:
    if value == []:  # of a short record
        return np.zeros((0, 0), dtype=np.float32)
    entries = np.array(value)
    if entries.ndim != 2 or entries.dtype.kind not in "if" or not ((entries >= 0) & (entries <= MOST)).all():
        raise ValueError
    return entries.astype(np.float32)


def _by_head(value: Any) -> dict[tuple[int, int], list[int]]:
    """Return indices of tokens by layer (among those that can be compressed) and head, from "layer,head"."""
    indices_of: dict[tuple[int, int], list[int]] = {}
    for name, indices in value.items():
        layer, head = map(int, name.split(","))
        if name != f"{layer},{head}":
            raise ValueError
        indices_of[size(layer), size(head)] = list(list_of(size)(indices))
    if not indices_of:
        raise ValueError
    return dict(sorted(indices_of.items()))


RUN: Mapping[str, Check] = {
    **dict.fromkeys(("model", "protocol", "dtype", "device", "hardware", "command"), text),
    **dict.fromkeys(("tasks", "methods", "keeps", "entries"), texts),
    "samples": count,
    "seed": seed,
    **dict.fromkeys(("config_hash", "started"), or_none(text)),
    "length": or_none(count),
    "shape": model_shape,
    "versions": versions,
}
RECORD: Mapping[str, Check] = {
    **dict.fromkeys(("task", "method", "keep", "entries", "protocol"), text),
    **dict.fromkeys(("index", "length", "kv_bytes", "sliding_kv_bytes", "peak_kv_bytes"), count),
    "seed": seed,
    **dict.fromkeys(("score", "kl", "agreement", "nll", "step_ms"), or_none(number)),
    **dict.fromkeys(("context_tokens", "full_kv_bytes", "prefill_shared_by", "decode_rows"), positive),
    **dict.fromkeys(("prefill_seconds", "decode_seconds"), number),
    "kept": _entries,
    "versions": versions,
}


def _pieces(value: Any) -> tuple[str, ...]:
    """Return texts of tokens. Half a character is shown as a question mark."""
    if not isinstance(value, list):
        raise TypeError
    return tuple(str.encode(piece, errors="replace").decode() for piece in value)


TOKEN_MAP: Mapping[str, Check] = {
    **dict.fromkeys(("task", "method", "keep", "entries"), text),
    "index": count,
    "tokens": _pieces,
    "kept": _by_head,
}
_ANY: Mapping[str, Check] = {
    **dict.fromkeys(("benchmark", "candidate", "dtype", "hardware", "command"), text),
    **dict.fromkeys(("batch", "tokens", "threads"), positive),
    "keep": above_0,
    "versions": versions,
}
_GENERATE: Mapping[str, Check] = {
    **_ANY,
    "model": text,
    "entries": or_none(text),
    "new_tokens": positive,
    **dict.fromkeys(("prefill_s", "ms_per_token", "speedup_vs_full"), number),
    **dict.fromkeys(("attention_ms", "attention_share", "logits_error", "rel_error", "plain_error"), or_none(number)),
    **dict.fromkeys(("kv_bytes", "peak_prefill_bytes", "peak_decode_bytes", "peak_bytes", "claimed_bytes"), count),
    **dict.fromkeys(("saved_bytes", "claimed_saved_bytes"), or_none(whole)),
}
BENCHMARKS: Mapping[str, Mapping[str, Check]] = {
    "decode": {
        **_ANY,
        **dict.fromkeys(("ms", "floor_ms"), above_0),
        **dict.fromkeys(("speedup_vs_full", "times_floor", "rel_error", "plain_error"), number),
        "skewed": flag,
        "entries": or_none(text),
        "kv_bytes": or_none(count),
    },
    "prefill": {
        **_ANY,
        "model": text,
        **dict.fromkeys(("seconds", "overhead"), number),
        **dict.fromkeys(("ours_seconds", "ours_share", "logits_error"), or_none(number)),
        "kv_bytes": or_none(count),
    },
    "generate": _GENERATE,
    "memory": _GENERATE,
}
