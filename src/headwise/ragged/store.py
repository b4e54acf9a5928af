"""Saving and loading a RaggedCache: one safetensors file that names the model and the context it belongs to."""

import os
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from headwise.artifacts import config_hash, fingerprint, read_tensors, write_tensors
from headwise.errors import ArtifactMismatch, BadInput, UnsupportedGeneration
from headwise.layout import Segments
from headwise.ragged.cache import RaggedCache
from headwise.ragged.layer import RaggedLayer

_SAMPLE = 64  # values looked at in each weight


def model_fingerprint(model: PreTrainedModel) -> str:
    """Hash of the configuration and of a sample of every weight (as float32, so that the dtype does not matter)."""
    parts: list[str | Tensor] = [config_hash(model.config.get_text_config().to_dict())]
    for name, weight in model.get_decoder().named_parameters():
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight  # shared out among processes
        step = max(1, weight.numel() // _SAMPLE)
        parts += [name, weight.detach().flatten()[::step][:_SAMPLE].to("cpu", torch.bfloat16).float()]
    return fingerprint(*parts)


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
    metadata = {
        "model": cache.view.model.config.name_or_path,
        "model_fingerprint": model_fingerprint(cache.view.model),
        "tokens_fingerprint": cache.tokens_fingerprint,
        **cache.provenance,
        "seen": cache.get_seq_length(),
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
    tensors, metadata = read_tensors(path, "cache")
    found, expected = metadata["model_fingerprint"], model_fingerprint(model)
    if found != expected:
        raise ArtifactMismatch(
            f"{path} was made with {metadata['model'] or 'a model'} (fingerprint {found[:12]}), not with "
            f"{model.config.name_or_path or 'this model'} ({expected[:12]}). Compress the context again."
        )
    if input_ids is not None:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        _require_context(tokens_fingerprint(input_ids, mask), metadata["tokens_fingerprint"], path)
    cache = RaggedCache(model, "random", keep=1.0, kernel=kernel)  # a method is of no use any more: all is cut
    cache.provenance = {name: metadata[name] for name in cache.provenance}
    cache.tokens_fingerprint, cache.meter.peak = metadata["tokens_fingerprint"], metadata["peak_nbytes"]
    for i, layer in enumerate(cache.layers):
        prefix = f"{i}."
        own = {k.removeprefix(prefix): _for_model(v, model) for k, v in tensors.items() if k.startswith(prefix)}
        try:
            _restore(layer, own, metadata["seen"])
        except KeyError as missing:
            raise BadInput(f"{path} is damaged: layer {i} has no {missing}. Compress the context again.") from missing
    return cache


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
        "lengths": torch.tensor(segments.lengths).view(-1, segments.kv_heads),
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
