"""Saving and loading a RaggedCache: one safetensors file that names the model and the context it belongs to."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.artifacts.tensors import fingerprint, opened, write_tensors
from headwise.cache.cache import RaggedCache
from headwise.cache.layer import RaggedLayer
from headwise.cache.saved import IDS, Expected, Saved, read
from headwise.cache.transcript import Transcript
from headwise.errors import ArtifactMismatch, UnsupportedGeneration
from headwise.kernels.segments import Segments
from headwise.models.families import view
from headwise.models.fingerprint import model_fingerprint

LARGEST_STATE = 1e9  # of a key or value: what attention makes of them is finite


def tokens_fingerprint(
    input_ids: Int[Tensor, "batch tokens"], attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"]
) -> str:
    """Names a context, whatever integers its ids and its mask are made of."""
    return fingerprint(input_ids.long(), attention_mask.long())


def save(cache: RaggedCache, path: str | os.PathLike[str]) -> None:
    """Write a compressed cache, its tail included.

    Raises UnsupportedGeneration if its context is not complete, BadInput and WriteFailed as `write_tensors`.
    """
    if not cache.compressed:
        raise UnsupportedGeneration("this cache has not read its context yet: there is nothing to save.")
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(cache.layers):
        found = _ragged_tensors(layer) if isinstance(layer, RaggedLayer) else _sliding_tensors(layer)
        tensors |= {f"{i}.{name}": tensor for name, tensor in found.items()}
    if cache.transcript.ids is not None:
        tensors[IDS] = cache.transcript.ids.to(torch.int32)
    metadata = {
        "model": cache.view.model.config.name_or_path,
        "model_fingerprint": model_fingerprint(cache.view.model),
        "tokens_fingerprint": cache.tokens_fingerprint,
        **cache.provenance,
        "seen": cache.get_seq_length(),
        "context_tokens": cache.context_tokens,
        "peak_nbytes": cache.peak_nbytes,
    }
    write_tensors(path, "cache", tensors, metadata)


def load(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    *,
    input_ids: Int[Tensor, "batch tokens"] | None = None,
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
    kernel: str = "auto",
) -> RaggedCache:
    """Read a cache that `save` wrote, onto the model's device and in the model's dtype.

    With `input_ids` (and `attention_mask`, if there was one) it is checked that the cache is of that context.
    Raises ArtifactMismatch for a cache of another model or context, BadInput for a missing or damaged file.
    """
    with opened(path, "cache") as file:
        _require_model(file.metadata, model, path)
        found = read(file, _expected(model))
    metadata = found.metadata
    if input_ids is not None:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        _require_context(tokens_fingerprint(input_ids, mask), metadata["tokens_fingerprint"], path)
    cache = RaggedCache(model, "random", keep=1.0, kernel=kernel)  # a method is of no use any more: all is cut
    cache.provenance = {name: metadata[name] for name in cache.provenance}
    cache.tokens_fingerprint, cache.meter.peak = metadata["tokens_fingerprint"], metadata["peak_nbytes"]
    cache.note(_transcript(found, input_ids, model), found.context_tokens)
    for i, layer in enumerate(cache.layers):
        states = found.layers[i]
        own = {name: _for_model(states.pop(name), model) for name in list(states)}  # one copy at a time
        _restore(layer, own, metadata["seen"])
    return cache


def _transcript(found: Saved, input_ids: Tensor | None, model: PreTrainedModel) -> Transcript:
    """What the file says that was seen; of a file without ids, the context that it was found to be of."""
    ids = found.ids
    if ids is None and input_ids is not None and input_ids.shape[1] == found.metadata["seen"]:
        ids = input_ids
    return Transcript().followed_by(None if ids is None else ids.to(model.device))


def _require_model(metadata: Mapping[str, Any], model: PreTrainedModel, path: str | os.PathLike[str]) -> None:
    """Raise ArtifactMismatch for another model; what is no fingerprint at all is refused where the file is read."""
    found, expected = metadata.get("model_fingerprint"), model_fingerprint(model)
    if isinstance(found, str) and found != expected:
        made_with = metadata.get("model") or "a model"
        raise ArtifactMismatch(
            f"{path} was made with {made_with!s:.80} (fingerprint {found[:12]}), not with "
            f"{model.config.name_or_path or 'this model'} ({expected[:12]}): the weights differ, or another adapter is "
            "active. Compress the context again."
        )


def _expected(model: PreTrainedModel) -> Expected:
    seen, config = view(model), model.config.get_text_config()
    return Expected(
        num_layers=seen.shape.num_layers,
        layers=seen.shape.layers,
        kv_heads=seen.shape.kv_heads,
        head_dim=seen.shape.head_dim,
        window=getattr(config, "sliding_window", None) or 0,
        max_positions=seen.max_positions,
        largest=min(torch.finfo(model.dtype).max, LARGEST_STATE),
    )


def _require_context(found: str, expected: str | None, path: str | os.PathLike[str]) -> None:
    if found != expected:
        raise ArtifactMismatch(
            f"{path} is the cache of another context (tokens {(expected or 'unknown')[:12]}, asked for {found[:12]}). "
            "Compress this context."
        )


def _for_model(tensor: Tensor, model: PreTrainedModel) -> Tensor:
    return tensor.to(model.device, model.dtype if tensor.is_floating_point() else tensor.dtype)


def _ragged_tensors(layer: RaggedLayer) -> dict[str, Tensor]:
    segments = layer.segments
    assert segments is not None and layer.rows is not None
    tensors = {
        "keys": segments.keys,
        "values": segments.values,
        "positions": segments.positions,
        "lengths": torch.tensor(segments.lengths, dtype=torch.int64, device="cpu").view(-1, segments.kv_heads),
        "rows": layer.rows,
    }
    if layer.tail_keys is not None and layer.tail_values is not None:
        tensors["tail_keys"] = layer.tail_keys[:, :, : layer.tail_length]
        tensors["tail_values"] = layer.tail_values[:, :, : layer.tail_length]
    return tensors


def _sliding_tensors(layer: Any) -> dict[str, Tensor]:
    return {"keys": layer.keys, "values": layer.values}


def _restore(layer: Any, tensors: dict[str, Tensor], seen: int) -> None:
    layer.lazy_initialization(tensors["keys"], tensors["values"])
    if not isinstance(layer, RaggedLayer):
        layer.keys, layer.values, layer.cumulative_length = tensors["keys"], tensors["values"], seen
        return
    layer.segments = Segments(
        keys=tensors["keys"],
        values=tensors["values"],
        positions=tensors["positions"],
        lengths=tuple(tensors["lengths"].flatten().tolist()),
        kv_heads=tensors["lengths"].shape[1],
    )
    layer.rows, layer.seen = tensors["rows"], seen
    if "tail_keys" in tensors:
        layer.tail_keys, layer.tail_values = tensors["tail_keys"], tensors["tail_values"]
        layer.tail_length = tensors["tail_keys"].shape[2]
