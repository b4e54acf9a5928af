"""The fields of `headwise eval`'s and `headwise bench`'s files, each with what checks it: they may be damaged.

A check returns the value as it is kept, or raises TypeError or ValueError. records.py and benchmarks.py read the files.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from headwise.errors import BadInput
from headwise.shapes import ModelShape

Check = Callable[[Any], Any]
ADVICE = "remove it, or evaluate into a new folder."


def checked(raw: Any, fields: Mapping[str, Check], place: str, advice: str = ADVICE) -> dict[str, Any]:
    """The fields that are known, checked; others are passed over. Raises BadInput, naming the place and the field."""
    if not isinstance(raw, dict):
        raise BadInput(f"{place} is damaged: it is no JSON object; {advice}")
    found = {}
    for name, check in fields.items():
        if name not in raw:
            raise BadInput(f"{place} is damaged: it lacks {name!r}; {advice}")
        try:
            found[name] = check(raw[name])
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise BadInput(f"{place} is damaged: {name!r} is {str(raw[name])[:60]!r}; {advice}") from error
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _whole_text(value: Any) -> str:
    """Half a character cannot be drawn."""
    return _text(value).encode().decode()


def _count(value: Any) -> int:
    if _whole(value) < 0:
        raise ValueError
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or abs(value) >= 2**63:
        raise TypeError
    return value


def _positive(value: Any) -> int:
    """At least 1: something that is divided by."""
    if _count(value) == 0:
        raise ValueError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError
    return float(value)


def _above_0(value: Any) -> float:
    """What a logarithm is taken of; beyond these ends there is nothing to measure."""
    if not 1e-99 < _number(value) < 1e99:
        raise ValueError
    return float(value)


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise TypeError
    return value


def _or_none(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError
    return tuple(_text(item) for item in value)


def _versions(value: Any) -> dict[str, str]:
    return {_text(name): str(version) for name, version in value.items()}


def _shape(value: Any) -> ModelShape:
    sizes = {name: _positive(value[name]) for name in ("num_layers", "kv_heads", "query_heads", "head_dim")}
    return ModelShape(**sizes, layers=tuple(_count(layer) for layer in value["layers"]))


def _entries(value: Any) -> np.ndarray:
    entries = np.array(value)
    if entries.ndim != 2 or entries.dtype.kind not in "if" or not (entries >= 0).all() or np.isinf(entries).any():
        raise ValueError
    return entries.astype(np.float32)


def _by_head(value: Any) -> dict[tuple[int, int], list[int]]:
    """Indices of tokens by layer, among those that can be compressed, and head, from "layer,head"."""
    found: dict[tuple[int, int], list[int]] = {}
    for name, indices in value.items():
        layer, head = (_count(int(part)) for part in name.split(","))
        found[layer, head] = [_count(index) for index in indices]
    if not found:
        raise ValueError
    return dict(sorted(found.items()))


RUN: Mapping[str, Check] = {
    **dict.fromkeys(("model", "protocol", "dtype", "device", "hardware", "command"), _text),
    **dict.fromkeys(("tasks", "methods", "keeps"), _texts),
    **dict.fromkeys(("samples", "seed"), _count),
    **dict.fromkeys(("config_hash", "started"), _or_none(_text)),
    "length": _or_none(_count),
    "shape": _shape,
    "versions": _versions,
}
RECORD: Mapping[str, Check] = {
    **dict.fromkeys(("task", "method", "keep", "protocol"), _text),
    **dict.fromkeys(("index", "length", "seed", "kv_bytes", "sliding_kv_bytes", "peak_kv_bytes"), _count),
    **dict.fromkeys(("score", "kl", "agreement", "nll", "step_ms"), _or_none(_number)),
    **dict.fromkeys(("context_tokens", "full_kv_bytes", "prefill_shared_by", "decode_rows"), _positive),
    **dict.fromkeys(("prefill_seconds", "decode_seconds"), _number),
    "kept": _entries,
    "versions": _versions,
}
TOKEN_MAP: Mapping[str, Check] = {
    **dict.fromkeys(("task", "method", "keep"), _text),
    "index": _count,
    "tokens": _texts,
    "kept": _by_head,
}
_ANY: Mapping[str, Check] = {
    **dict.fromkeys(("benchmark", "candidate", "dtype", "hardware", "command"), _whole_text),
    **dict.fromkeys(("batch", "tokens", "threads"), _positive),
    "keep": _above_0,
    "versions": _versions,
}
_GENERATE: Mapping[str, Check] = {
    **_ANY,
    "model": _whole_text,
    "new_tokens": _positive,
    **dict.fromkeys(("prefill_s", "ms_per_token", "speedup_vs_full"), _number),
    **dict.fromkeys(("attention_ms", "attention_share", "logits_error", "rel_error", "plain_error"), _or_none(_number)),
    **dict.fromkeys(("kv_bytes", "peak_prefill_bytes", "peak_decode_bytes", "peak_bytes", "claimed_bytes"), _count),
    **dict.fromkeys(("saved_bytes", "claimed_saved_bytes"), _or_none(_whole)),
}
BENCHMARKS: Mapping[str, Mapping[str, Check]] = {
    "decode": {
        **_ANY,
        **dict.fromkeys(("ms", "floor_ms"), _above_0),
        **dict.fromkeys(("speedup_vs_full", "times_floor", "rel_error", "plain_error"), _number),
        "skewed": _flag,
    },
    "prefill": {
        **_ANY,
        "model": _whole_text,
        **dict.fromkeys(("seconds", "overhead"), _number),
        **dict.fromkeys(("ours_seconds", "ours_share", "logits_error"), _or_none(_number)),
        "kv_bytes": _or_none(_count),
    },
    "generate": _GENERATE,
    "memory": _GENERATE,
}
