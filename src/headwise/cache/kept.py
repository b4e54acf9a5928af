"""A kept context as a value: what a method has kept of it, and where it came from.

`RaggedCache.kept` gives it, `RaggedCache.of` continues from it, and one safetensors file holds it, which names the
model and the context that it belongs to. Nothing changes it: caches that continue from it grow on their own.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.artifacts.tensors import fingerprint, opened, write_tensors
from headwise.cache.saved import IDS, QUANTISED, Expected, bits_in, prefix_of, read
from headwise.cache.transcript import Transcript
from headwise.errors import ArtifactMismatch
from headwise.kernels.quantised import Bits, Quantised
from headwise.kernels.segments import Segments
from headwise.methods.keep import Keep
from headwise.methods.method import Method
from headwise.models.families import ModelView, view
from headwise.models.fingerprint import model_fingerprint
from headwise.models.images import images_in

LARGEST_STATE = 1e9  # of a key or value: what attention makes of them is finite


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeptLayer:
    """Of a layer that is compressed: the kept entries, and what came after the context."""

    segments: Segments
    rows: Int[Tensor, " batch"]  # which context every row of the batch continues
    tail_keys: Float[Tensor, "batch kv_heads tail head_dim"]
    tail_values: Float[Tensor, "batch kv_heads tail head_dim"]

    def tensors(self) -> dict[str, Tensor]:
        """By the names that a file has; a tail only where there is one."""
        segments = self.segments
        tensors = {
            "keys": segments.keys,
            "values": segments.values,
            "positions": segments.positions,
            "lengths": torch.tensor(segments.lengths, dtype=torch.int64, device="cpu").view(-1, segments.kv_heads),
            "rows": self.rows,
        }
        tail = {"tail_keys": self.tail_keys, "tail_values": self.tail_values} if self.tail_keys.shape[2] else {}
        for part in segments.quantised:
            lengths = torch.tensor(part.lengths, dtype=torch.int64, device="cpu").view(-1, part.kv_heads)
            own = {"lengths": lengths} | {name: getattr(part, name) for name in QUANTISED if name != "lengths"}
            tensors |= {prefix_of(part.bits) + name: tensor for name, tensor in own.items()}
        return tensors | tail

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "KeptLayer":
        """From such tensors."""
        keys, rows, lengths = tensors["keys"], tensors["rows"], tensors["lengths"]
        empty = keys.new_empty(len(rows), lengths.shape[1], 0, keys.shape[-1])
        return cls(
            segments=Segments(
                keys=keys,
                values=tensors["values"],
                positions=tensors["positions"],
                lengths=tuple(lengths.flatten().tolist()),
                kv_heads=lengths.shape[1],
                quantised=tuple(_quantised(tensors, bits) for bits in bits_in(tensors)),
            ),
            rows=rows,
            tail_keys=tensors.get("tail_keys", empty),
            tail_values=tensors.get("tail_values", empty),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeptWindow:
    """Of a sliding-window layer: all that it holds. A file has no `dropped`: what was saved cannot be undone."""

    keys: Float[Tensor, "batch kv_heads window head_dim"]
    values: Float[Tensor, "batch kv_heads window head_dim"]
    newest: int = 0  # tokens of the latest pass
    dropped: tuple[Tensor, ...] = ()  # keys and values that left the window in it

    def tensors(self) -> dict[str, Tensor]:
        """By the names that a file has."""
        return {"keys": self.keys, "values": self.values}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "KeptWindow":
        """From such tensors."""
        return cls(keys=tensors["keys"], values=tensors["values"])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeptState:
    """Of a layer with a state, or with nothing: the state, by the names that a file has."""

    states: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """By the names that a file has."""
        return dict(self.states)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Kept:
    """What is kept of one or more contexts. Two are equal where every number of them is."""

    layers: tuple[KeptLayer | KeptWindow | KeptState, ...]  # every layer of the model
    seen: int  # tokens of a row: context, padding included, and what came after
    transcript: Transcript  # ids of these, as far as they are known
    context_tokens: tuple[int, ...] | None  # of every context, padding excluded, where it is known
    provenance: Mapping[str, Any]  # the method and the keep
    tokens_fingerprint: str | None  # of the context, if it was read by compress()
    peak_nbytes: int  # the most bytes of keys and values that were held meanwhile
    # Of every context, for models that place images on a grid: how far positions of what follows are ahead of tokens.
    ahead: tuple[int, ...] | None = None

    @property
    def segments(self) -> tuple[Segments, ...]:
        """Of the layers that are compressed."""
        return tuple(layer.segments for layer in self.layers if isinstance(layer, KeptLayer))

    def with_segments(self, segments: Sequence[Segments], **others: Any) -> "Kept":
        """With other entries kept, and other fields."""
        left = iter(segments)
        layers = tuple(
            replace(layer, segments=next(left)) if isinstance(layer, KeptLayer) else layer for layer in self.layers
        )
        return replace(self, layers=layers, **others)

    def save(self, path: str | os.PathLike[str], model: PreTrainedModel | ModelView) -> None:
        """Write it, naming the model that it was made with. Raises BadInput and WriteFailed as `write_tensors`."""
        model_view = view(model)
        tensors = {f"{i}.{name}": t for i, layer in enumerate(self.layers) for name, t in layer.tensors().items()}
        if self.transcript.ids is not None:
            tensors[IDS] = self.transcript.ids.to(torch.int32)
        metadata = {
            "model": model_view.model.config.name_or_path,
            "model_fingerprint": model_fingerprint(model_view),
            "tokens_fingerprint": self.tokens_fingerprint,
            **self.provenance,
            "seen": self.seen,
            "context_tokens": self.context_tokens,
            "peak_nbytes": self.peak_nbytes,
            **({} if self.ahead is None else {"ahead": self.ahead}),
        }
        write_tensors(path, "cache", tensors, metadata)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel | ModelView,
        *,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
        **images: Any,
    ) -> "Kept":
        """What `save` wrote, onto the devices of the model's layers and in the model's dtype.

        With `input_ids` (and `attention_mask` and `images`, if there were any) it is checked that it is of these.
        Raises ArtifactMismatch for one of another model or context, BadInput for a missing or damaged file.
        """
        model_view = view(model)
        shown = images_in(model_view.model, input_ids, images)
        with opened(path, "cache") as file:
            _require_model(file.metadata, model_view, path)
            saved = read(file, _expected(model_view))
        metadata, ids = saved.metadata, saved.ids
        if input_ids is not None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            _require_context(tokens_fingerprint(input_ids, mask, shown), metadata["tokens_fingerprint"], path)
            if ids is None and input_ids.shape[1] == metadata["seen"]:  # of a file without ids, the context
                ids = input_ids
        layers: list[KeptLayer | KeptWindow | KeptState] = []
        for i, (kind, device) in enumerate(zip(model_view.layers, model_view.devices, strict=True)):
            states = saved.layers.get(i, {})
            own = {
                name: _for_model(name, states.pop(name), device, model_view.model.dtype) for name in list(states)
            }  # one copy at a time
            layers.append(_OF_KIND.get(kind.kind, _state)(own))
        return cls(
            layers=tuple(layers),
            seen=metadata["seen"],
            transcript=Transcript().followed_by(None if ids is None else ids.to(model_view.device)),
            context_tokens=saved.context_tokens,
            provenance={name: metadata[name] for name in ("method", "keep", "entries", "reading")},
            tokens_fingerprint=metadata["tokens_fingerprint"],
            peak_nbytes=metadata["peak_nbytes"],
            ahead=saved.ahead,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Kept):
            return NotImplemented
        facts = ("seen", "context_tokens", "provenance", "tokens_fingerprint", "peak_nbytes", "ahead")
        if any(getattr(self, name) != getattr(other, name) for name in facts) or len(self.layers) != len(other.layers):
            return False
        return all(_equal(*pair) for pair in zip(self._tensors(), other._tensors(), strict=True))

    def __hash__(self) -> int:
        return hash((self.seen, self.context_tokens, self.tokens_fingerprint, self.peak_nbytes))

    def _tensors(self) -> Iterator[dict[str, Tensor]]:
        yield {} if self.transcript.ids is None else {IDS: self.transcript.ids}
        for layer in self.layers:
            yield layer.tensors()


def provenance_of(method: Method, keep: Keep, entries: str, reading: str) -> dict[str, Any]:
    """What made a cache, in the words that a file can hold: what is read again equals what was written.

    Scorers of users may have parameters of any kind: of a tensor its fingerprint is told, of other things their repr.
    """
    about = {"method": method.provenance(), "keep": str(keep), "entries": entries, "reading": reading}
    return json.loads(json.dumps(about, default=lambda x: fingerprint(x) if isinstance(x, Tensor) else repr(x)))


def tokens_fingerprint(
    input_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"],
    images: Mapping[str, Tensor] = MappingProxyType({}),
) -> str:
    """Names a context, whatever integers its ids and its mask are made of, and the images that it has."""
    parts: list[str | Tensor] = [input_ids.long(), attention_mask.long()]
    for name, value in sorted(images.items()):
        parts += [name, value.float() if value.is_floating_point() else value.long()]
    return fingerprint(*parts)


def _state(tensors: Mapping[str, Tensor]) -> KeptState:
    return KeptState(states=tensors)


_OF_KIND = {"whole": KeptLayer.of, "window": KeptWindow.of}


def _equal(first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)


def _require_model(metadata: Mapping[str, Any], model_view: ModelView, path: str | os.PathLike[str]) -> None:
    """Raise ArtifactMismatch for another model; what is no fingerprint at all is refused where the file is read."""
    written, expected = metadata.get("model_fingerprint"), model_fingerprint(model_view)
    if isinstance(written, str) and written != expected:
        made_with = metadata.get("model") or "a model"
        raise ArtifactMismatch(
            f"{path} was made with {made_with!s:.80} (fingerprint {written[:12]}), not with "
            f"{model_view.model.config.name_or_path or 'this model'} ({expected[:12]}): the weights differ, or another "
            "adapter is active. Compress the context again."
        )


def _expected(model_view: ModelView) -> Expected:
    layers, windows = model_view.layers, model_view.anatomy.windows
    return Expected(
        layers=model_view.shape.layers,
        windows={i: (layer.window, *windows[i]) for i, layer in enumerate(layers) if layer.kind == "window"},
        states=frozenset(i for i, layer in enumerate(layers) if layer.kind == "state"),
        kv_heads=model_view.shape.kv_heads,
        head_dim=model_view.shape.head_dim,
        max_positions=model_view.max_positions,
        largest=min(torch.finfo(model_view.model.dtype).max, LARGEST_STATE),
    )


def _require_context(asked: str, expected: str | None, path: str | os.PathLike[str]) -> None:
    if asked != expected:
        raise ArtifactMismatch(
            f"{path} is the cache of another context (tokens {(expected or 'unknown')[:12]}, asked for {asked[:12]}). "
            "Compress this context."
        )


def _quantised(tensors: Mapping[str, Tensor], bits: Bits) -> Quantised:
    own = {name: tensors[prefix_of(bits) + name] for name in QUANTISED}
    lengths = own.pop("lengths")
    return Quantised(**own, lengths=tuple(lengths.flatten().tolist()), kv_heads=lengths.shape[1])


def _for_model(name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Scales, and states that are summed up in more bits than the model has, stay what they are.
    native = tensor.is_floating_point() and not name.endswith("_scales") and not name.startswith("recurrent_")
    return tensor.to(device, dtype if native else tensor.dtype)
