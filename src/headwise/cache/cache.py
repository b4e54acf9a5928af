"""RaggedCache: a transformers Cache in which every KV head of every layer keeps its own number of entries."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from headwise.cache.kept import Kept, KeptLayer, provenance_of
from headwise.cache.layer import FrozenLayer, RaggedLayer
from headwise.cache.listener import Listener
from headwise.cache.masks import require_whole_context
from headwise.cache.meter import Meter
from headwise.cache.prefill import Prefill
from headwise.cache.sliding import SlidingLayer
from headwise.cache.state import EmptyLayer, StateLayer
from headwise.cache.transcript import ADVICE, Transcript
from headwise.cache.ways import how
from headwise.errors import BadInput, UnsupportedGeneration, UnsupportedModel
from headwise.interfaces import AbstractScorer
from headwise.kernels import Kernel, get_kernel, require_options
from headwise.kernels.quantised import NATIVE, require_entries
from headwise.methods.keep import Keep, parse_keep
from headwise.methods.method import Method, for_model
from headwise.methods.reading import EXACT
from headwise.models import attention, grids
from headwise.models.families import ModelView, given, view
from headwise.models.images import are_read as images_are_read
from headwise.models.images import images_in, require_no_images
from headwise.models.layout import Layer
from headwise.models.passes import PassAware


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pass:
    """A forward pass that has begun: where the cache stood, and the ids that it brings."""

    seen: int
    compressed: bool
    ids: Tensor | None
    handled: BaseException | None  # what the caller was handling when it began


class RaggedCache(Cache, PassAware):
    """A KV cache that is cut, head by head, as soon as the prompt has been read.

    >>> cache = RaggedCache(model, "snapkv+adakv", keep=0.15)
    >>> model.generate(**cache.inputs(**prompt))  # query-aware: the whole prompt is compressed

    To compress a context before any question is known use `headwise.compress`. Sliding-window layers are left whole.
    Several caches can be in use on one model. Making one sets the model's attention implementation to "headwise",
    which is SDPA for every other cache.

    Parameters
    ----------
    model
        The model that will use this cache, and no other.
    method
        `scorer+allocator`, a short name, "auto" or a Method.
    keep
        What is kept of all entries: a fraction (0.15), tokens per head ("1024tok") or bytes ("2GiB").
    prompt_length
        Tokens of the context. None: the first forward pass is the context. It is needed where the context comes in
        pieces (`prefill_chunk_size`); a UserWarning says when it seems to be missing.
    kernel
        What decodes: "auto", or a name that `headwise doctor` lists.
    entries
        How kept entries are stored, see `compress`.
    replays
        Promise that the model will read the context again for scorers that ask for it (KVzip), as `compress` does and
        `generate` does not.
    reading
        How a context is read in pieces, see `compress`.

    Raises
    ------
    UnsupportedModel, UnsupportedGeneration, BadInput
        At once, if the model, the method or an option cannot be served.
    BudgetInfeasible, BadInput, NonFiniteValues
        While the context is read.
    """

    def __init__(
        self,
        model: PreTrainedModel | ModelView,
        method: str | Method,
        *,
        keep: float | str | Keep,
        prompt_length: int | None = None,
        kernel: str = "auto",
        entries: str = NATIVE,
        replays: bool = False,
        reading: str = EXACT,
    ):
        model_view, keep = view(model), parse_keep(keep)
        method = for_model(method, model_view.shape, model_view.config_hash, name=model_view.name, replays=replays)
        model_view.require_parts(method.scorer, method.allocator)
        if prompt_length is not None and prompt_length < 1:
            raise BadInput(f"prompt_length={prompt_length} must be at least 1 token, or None: the first forward pass.")
        _require_replay(model_view, method.scorer, replays)
        require_entries(entries)
        prefill_kind, layer_kind = how(reading)
        prefill = prefill_kind(view=model_view, method=method, keep=keep, prompt_length=prompt_length, entries=entries)
        places = {layer: at for at, layer in enumerate(model_view.shape.layers)}
        chosen, meter = _kernel(model_view, kernel, quantised=entries != NATIVE), Meter()
        layers = [
            layer_kind(index=places[i], model_index=i, kernel=chosen, meter=meter, observer=prefill, shared=kind.shared)
            if i in places
            else _left_whole(kind, i, meter)
            for i, kind in enumerate(model_view.layers)
        ]
        self._set_up(model_view, layers, meter, provenance_of(method, keep, entries, reading))
        self.prefill = prefill
        self._replays = replays
        prefill.watch(self)

    @classmethod
    def of(cls, model: PreTrainedModel | ModelView, kept: Kept, *, kernel: str | Kernel = "auto") -> "RaggedCache":
        """A cache that continues from what was kept. Raises UnsupportedModel, BadInput for an unknown kernel."""
        cache = cls.__new__(cls)
        model_view, quantised = view(model), any(segments.quantised for segments in kept.segments)
        cache._continue(model_view, kept, _kernel(model_view, kernel, quantised=quantised))
        return cache

    def _continue(self, model_view: ModelView, kept: Kept, kernel: Kernel) -> None:
        meter, places = Meter(), {layer: at for at, layer in enumerate(model_view.shape.layers)}
        layers, kinds = list[Any](), model_view.layers
        for i, part in enumerate(kept.layers):
            if isinstance(part, KeptLayer):
                layer = FrozenLayer(
                    index=places[i],
                    model_index=i,
                    kernel=kernel,
                    meter=meter,
                    segments=part.segments,
                    rows=part.rows,
                    seen=kept.seen,
                    tail=(part.tail_keys.clone(), part.tail_values.clone()),
                )
            else:
                layer = _left_whole(kinds[i], i, meter)
                layer.fill(part, kept.seen)
            meter.report(i, layer.nbytes)
            layers.append(layer)
        meter.peak = kept.peak_nbytes
        self._set_up(model_view, layers, meter, dict(kept.provenance))
        self.tokens_fingerprint, self.context_tokens = kept.tokens_fingerprint, kept.context_tokens
        self._noted = kept.transcript
        if self._grids is not None:
            if kept.ahead is None:
                raise BadInput(
                    "this cache does not say at which position its context ends: compress the context again."
                )
            self._ahead = torch.tensor(kept.ahead, dtype=torch.int64, device=model_view.device)

    def _set_up(self, model_view: ModelView, layers: list[Any], meter: Meter, provenance: Mapping[str, Any]) -> None:
        self.view: ModelView = model_view
        self.provenance = dict(provenance)
        self.tokens_fingerprint: str | None = None  # of the context, once it has been read by compress()
        self._noted = Transcript()  # by the passes that told of themselves
        self.context_tokens: tuple[int, ...] | None = None  # of every context, padding excluded, where it is known
        self._pass: _Pass | None = None  # that has begun and not ended
        self._just_cut = False  # whether the context was cut here and nothing has come after it yet
        self._grids = grids.holder_of(model_view.model)  # where the model keeps how far positions are ahead, if it does
        if self._grids is not None:
            model_view.require_weights_together("a cache that places images on a grid")
        self._ahead: Tensor | None = None  # [contexts], as `Kept` has it
        self.meter = meter
        self.prefill: Prefill | None = None  # of a context that is, or was, read here
        attention.enable(model_view)
        super().__init__(layers=layers)
        self.ragged_layers: list[RaggedLayer] = _ragged(layers)  # those that can be compressed
        self._first = next(i for i, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin))

    @property
    def frozen_layers(self) -> list[FrozenLayer]:
        """The layers that have been cut."""
        return [layer for layer in self.ragged_layers if isinstance(layer, FrozenLayer)]

    def put(self, frozen: FrozenLayer) -> None:
        """Go on with a layer that has been cut."""
        self.layers[frozen.model_index] = self.ragged_layers[frozen.index] = frozen
        self._just_cut = True

    def listen(self, listener: Listener) -> None:
        """Let `listener` hear what passes through the layers from now on. Forks do not take it along.

        Raises UnsupportedModel, UnsupportedGeneration where a scorer of the listener needs a second reading of the
        context that it cannot have; BadInput where it listens already, its scorers come after the context has begun, or
        two scorers want different second readings.
        """
        if any(listener is other for other in self.ragged_layers[0].listeners):
            raise BadInput("this listener hears this cache already.")
        if self.prefill is not None and not self.compressed:
            for scorer in listener.scorers:
                _require_replay(self.view, scorer, self._replays)
            self.prefill.add_listener(listener)
        for layer in self.ragged_layers:
            layer.listeners = (*layer.listeners, listener)

    @property
    def kept(self) -> Kept:
        """What is kept, as a value. Raises UnsupportedGeneration before the cut."""
        self._require_compressed()
        layers: list[Any] = self.layers
        return Kept(
            layers=tuple(layer.value() for layer in layers),
            seen=self.get_seq_length(),
            transcript=self.transcript,
            context_tokens=self.context_tokens,
            provenance=self.provenance,
            tokens_fingerprint=self.tokens_fingerprint,
            peak_nbytes=self.peak_nbytes,
            ahead=None if self._ahead is None else tuple(self._ahead.tolist()),
        )

    @property
    def compressed(self) -> bool:
        """Whether the context has been read and cut."""
        return all(layer.frozen for layer in self.ragged_layers)

    @property
    def transcript(self) -> Transcript:
        """The tokens seen; not known if a pass did not tell of itself (the decoder was called without its model)."""
        return self._noted if self._noted.length == self._stood_at() else Transcript(pieces=None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, kept or not; those of a forward pass that has not ended do not count."""
        return self._stood_at()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new tokens' keys and values [B, H, T, D] of a layer; return what its attention needs."""
        if layer_idx == self._first:
            if any(layer.get_seq_length() != self._stood_at() for layer in self._growing):
                self._undo_unfinished()  # where masks are made elsewhere, nobody has asked for their sizes
            self._expect(key_states.shape[-2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _expect(self, num_tokens: int) -> None:
        """New tokens are about to enter the first layer: raise if they cannot be served, warn of a likely mistake."""
        if self.prefill is not None:
            self.prefill.expect(self._stood_at(), num_tokens)
        if not attention.is_enabled(self.view.model):  # it would ignore the frozen part
            raise UnsupportedModel(
                "the model's attention implementation was changed while a RaggedCache is in use; call "
                "headwise.enable(model) again before using the cache."
            )
        if self._just_cut and num_tokens > 1 and self.prefill is not None and self.prefill.prompt_length is None:
            self._warn_of_pieces(num_tokens)
        self._just_cut = False

    def _warn_of_pieces(self, num_tokens: int) -> None:
        seen = self._stood_at()
        warnings.warn(
            f"this cache took the first {seen} tokens for its whole context and compressed them; now {num_tokens} more "
            f"came at once. If they are the next piece of the prompt (prefill_chunk_size), give RaggedCache the "
            f"prompt's length as prompt_length; if they are a later question, give prompt_length={seen}, or use "
            "headwise.compress().",
            UserWarning,
            stacklevel=3,
        )

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys that a mask covers, and the number of the first of them. Asked for before a forward pass."""
        self._undo_unfinished()
        return super().get_mask_sizes(query_length, layer_idx)

    def begin(self, ids: Tensor | None, mask: Tensor | None, num_tokens: int, images: Mapping[str, Any]) -> None:
        """A forward pass begins. One before it that did not end well is undone: raises where it cannot be.

        Raises BadInput for a mask or images that do not fit, UnsupportedGeneration, UnsupportedModel.
        """
        self._settle()
        seen = self._stood_at()
        if mask is not None and mask.ndim == 2:
            self._require_mask(mask, seen, num_tokens)
        if seen:
            require_no_images(self.view.model, ids, images, look=num_tokens > 1)  # one may be a model's own word
        elif images_are_read(self.view.model, ids, images) and self.prefill is not None:
            self.view.require_weights_together("a context with images")
            self.prefill.take_images(on_grid=self._grids is not None)
        self.tell_positions(0)
        self._pass = _Pass(seen=seen, compressed=self.compressed, ids=ids, handled=sys.exception())

    def tell_positions(self, rows: int) -> None:
        """The model is about to work out positions of new tokens: it shall know how far they are ahead.

        `rows` are those of the ids, which beams share; 0 for those of this cache.
        """
        if self._grids is not None:
            ahead = self._ahead_of_rows() if self._stood_at() else None
            grids.tell(self._grids, ahead if ahead is None or not rows else ahead[:: max(1, len(ahead) // rows)])

    def place(self, position_ids: Tensor | None, mask: Tensor | None, shape: tuple[int, int]) -> None:
        """The decoder is about to read new tokens [batch, tokens] at these positions, which may be on a grid.

        Raises BadInput if they do not go on from the context, UnsupportedModel for methods that grids are nothing for.
        """
        seen, device = self._stood_at(), self.view.device
        if mask is not None and mask.ndim != 2:
            raise BadInput("a model that places images on a grid needs an attention_mask [batch, tokens], or none.")
        if not seen:
            if position_ids is None and self._pass is not None and self._pass.ids is None:
                raise BadInput("inputs_embeds do not say where images are: give position_ids, or input_ids.")
            self._ahead = grids.ahead_of(position_ids, mask, shape, device)
            if self.prefill is not None and grids.on_grid(position_ids):
                self.prefill.refuse_turning()
        elif self._can_look(shape[1], device) and (mask is None or len(mask) == shape[0]):
            real = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask[:, -shape[1] :].bool()
            grids.require_placed(position_ids, seen, self._expected_positions(mask, shape), real)

    def _expected_positions(self, mask: Tensor | None, shape: tuple[int, int]) -> Int[Tensor, "batch new"]:
        """Where the new tokens go on from what has been seen."""
        new = torch.arange(shape[1], dtype=torch.int64, device=self.view.device)
        if mask is not None:
            counts = (mask.long().cumsum(-1) - 1)[:, -shape[1] :]
        elif self.context_tokens is not None and isinstance(self.ragged_layers[0], FrozenLayer):
            first = self.ragged_layers[0]
            counts = torch.tensor(self.context_tokens, dtype=torch.int64, device=new.device)[first.rows]
            counts = counts[:, None] + first.tail_length + new
        else:
            counts = (self._stood_at() + new).expand(shape)
        return counts + self._ahead_of_rows()[:, None]

    def _ahead_of_rows(self) -> Int[Tensor, " batch"]:
        """By how much positions of every row are ahead of its tokens."""
        first, ahead = self.ragged_layers[0], self._ahead
        if ahead is None:
            raise UnsupportedGeneration(
                "this cache has not been told at which positions its context was read: read it without torch.compile."
            )
        return ahead[first.rows] if isinstance(first, FrozenLayer) else ahead

    def _can_look(self, num_tokens: int, device: torch.device) -> bool:
        """Whether numbers may be looked at: on a GPU once per turn, for a decoding step must not wait for it."""
        return num_tokens > 1 or self.ragged_layers[0].tail_length == 0 or device.type == "cpu"

    def end(self) -> None:
        """The forward pass is over. If it has raised, go back to where it began, else what it brought has been seen."""
        done = self._pass
        if done is not None and sys.exception() is done.handled:
            self._commit(done)
        else:
            with suppress(UnsupportedGeneration):  # the next call says why it cannot go on
                self._settle()

    def _commit(self, done: _Pass) -> None:
        noted = self.transcript.followed_by(done.ids)
        self._pass = None
        for layer in self._states:
            layer.settle()
        if self._stood_at() > done.seen:  # a second reading brings nothing new
            self._noted = noted

    def require_continued(self, ids: Tensor, mask: Tensor | None) -> None:
        """Raise BadInput unless the prompt `ids` [batch, tokens] begins with what this cache has seen, and goes on."""
        self.transcript.require_prefix(self._stood_at(), ids, mask)

    def _stood_at(self) -> int:
        """Tokens seen by every layer before a pass that has not ended."""
        return self._pass.seen if self._pass is not None else min(layer.seen for layer in self.ragged_layers)

    def _undo_unfinished(self) -> None:
        """Take back what some or all layers got from a forward pass that did not end well, or raise."""
        stood = self._stood_at()
        layers: list[Any] = self.layers
        if all(layer.get_seq_length() == stood for layer in self._growing):
            for layer in self._states:
                layer.settle() if self._pass is None else layer.undo()
            return
        unfinished = not self.compressed or (self._pass is not None and not self._pass.compressed)
        if self.prefill is not None and unfinished:
            self.prefill.refuse_failed()
        for layer in layers:
            layer.require_undoable(stood)
        for layer in layers:
            layer.undo(stood)

    def _settle(self) -> None:
        """Outside of any forward pass: undo one that did not end, and forget it."""
        self._undo_unfinished()
        self._pass = None

    def _require_mask(self, mask: Tensor, seen: int, num_tokens: int) -> None:
        """Raise BadInput unless a mask [batch, tokens] is of everything seen and what is new, and hides no context."""
        first = self.ragged_layers[0]
        if isinstance(first, FrozenLayer) and len(mask) != len(first.rows):
            return  # the layers refuse it
        if mask.shape[1] < seen + num_tokens:
            raise BadInput(
                f"attention_mask is for {mask.shape[1]} tokens, but this cache has seen {seen} and {num_tokens} are "
                f"new: {ADVICE}."
            )
        can_look = self._can_look(num_tokens, mask.device)
        if can_look and isinstance(first, FrozenLayer) and self.context_tokens is not None:
            counts = torch.tensor(self.context_tokens, dtype=torch.int64, device=first.rows.device)
            require_whole_context(mask[:, : seen - first.tail_length], counts[first.rows].to(mask.device))

    @property
    def is_dummy(self) -> list[bool]:
        """Which layers hold nothing; masks are made for others."""
        return [isinstance(layer, EmptyLayer) for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in storage now: frozen, tail (its spare capacity included) and sliding layers."""
        return sum(layer.nbytes for layer in self.ragged_layers) + self.sliding_nbytes

    @property
    def peak_nbytes(self) -> int:
        """The most bytes of keys and values held at once so far."""
        return self.meter.peak

    @property
    def sliding_nbytes(self) -> int:
        """Bytes of the layers that are left whole: keys and values of sliding windows, and states."""
        return sum(layer.nbytes for layer in self._whole.values())

    @property
    def _whole(self) -> dict[int, Any]:
        """The layers that are left whole."""
        return {i: layer for i, layer in enumerate(self.layers) if not isinstance(layer, RaggedLayer)}

    @property
    def _states(self) -> list[StateLayer]:
        return [layer for layer in self.layers if isinstance(layer, StateLayer)]

    @property
    def _growing(self) -> list[Any]:
        """The layers that count tokens."""
        return [layer for layer in self.layers if isinstance(layer, CacheLayerMixin)]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What the model reads inside, layers that are left whole forget afterwards: for a second reading."""
        whole = self._whole
        stood = {i: layer.fork(self.meter) for i, layer in whole.items()}
        yield
        for i, layer in stood.items():
            self.layers[i] = layer
            self.meter.report(i, layer.nbytes)

    @property
    def index_nbytes(self) -> int:
        """Bytes of what is not keys and values: kept positions, page tables, rows, ids of the tokens seen."""
        return sum(layer.index_nbytes for layer in self.ragged_layers) + self._noted.nbytes

    @property
    def lengths(self) -> Int[Tensor, "layers batch kv_heads"]:
        """Kept entries of every head, for the contexts that were compressed."""
        self._require_compressed()
        kept = [layer.segments.kept for layer in self.frozen_layers]
        return torch.tensor(kept, dtype=torch.int64, device="cpu").view(len(kept), -1, self.view.shape.kv_heads)

    def positions(self, layer: int, row: int, head: int) -> Int[Tensor, " kept"]:
        """Rotary positions, ascending, of the entries a head has kept, in a context that was compressed.

        `layer` counts compressible layers. Where a model places images on a grid, a token's number stands for its three
        positions. Raises UnsupportedGeneration before the cut, BadInput.
        """
        self._require_compressed()
        _require_index("layer", layer, len(self.ragged_layers))
        segments = self.frozen_layers[layer].segments
        _require_index("row", row, segments.batch)
        _require_index("head", head, segments.kv_heads)
        return segments.positions_of(row * segments.kv_heads + head).long()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the compressed cache, its tail included, for headwise.load. Raises UnsupportedGeneration, BadInput."""
        self._settle()
        if not self.compressed:
            raise UnsupportedGeneration("this cache has not read its context yet: there is nothing to save.")
        self.kept.save(path, self.view)

    def inputs(
        self,
        input_ids: Int[Tensor, "batch new"] | Int[Tensor, " new"],
        attention_mask: Int[Tensor, "batch new"] | None = None,
        **images: Any,
    ) -> dict[str, Any]:
        """What generate() is given to go on from here: all ids, their mask, and this cache.

        >>> answer = model.generate(**cache.fork().inputs(question_ids), max_new_tokens=64)

        `input_ids` are the new tokens only, with their own `attention_mask` if rows are padded on the left. What the
        cache has seen comes before them, a loaded cache's context too. The cache has the name that this version of
        transformers calls it by. A cache that has seen nothing takes `images` along, all that the processor has made
        (`pixel_values` and what comes with them). Raises BadInput where the rows or images do not fit,
        UnsupportedGeneration where the tokens seen are not known, UnsupportedModel for models not tried with images.
        """
        self._settle()
        new = torch.atleast_2d(input_ids)
        mask = torch.ones_like(new) if attention_mask is None else attention_mask
        if self._stood_at():
            require_no_images(self.view.model, new, images, look=True)
        shown = images_in(self.view.model, new, images)
        if self._stood_at():
            known = self.transcript.ids
            if known is None:
                raise UnsupportedGeneration(
                    "this cache does not know the tokens it has seen, because the decoder was called without its "
                    "model: give generate() all of them, followed by the new ones."
                )
            if len(known) != len(new):
                raise BadInput(
                    f"this cache has {len(known)} rows, the new ids {len(new)}: give one row of ids for each."
                )
            mask = torch.cat([self._seen_mask(known).to(mask), mask.to(new.device)], dim=-1)
            new = torch.cat([known.to(new), new], dim=-1)
        return {"input_ids": new, "attention_mask": mask, **shown, **given(self.view.model, self)}

    def _seen_mask(self, known: Int[Tensor, "batch seen"]) -> Int[Tensor, "batch seen"]:
        """0 at the padding of contexts, which lies before them."""
        first, mask = self.ragged_layers[0], torch.ones_like(known)
        if self.context_tokens is None or not isinstance(first, FrozenLayer):
            return mask
        counts = torch.tensor(self.context_tokens, dtype=torch.int64, device=first.rows.device)
        counts = counts[first.rows].to(known.device)
        context = known.shape[1] - first.tail_length
        places = torch.arange(known.shape[1], dtype=torch.int64, device=known.device)
        return mask * (places >= context - counts[:, None])

    def fork(self, copies: int = 1) -> "RaggedCache":
        """A cache that continues from here on its own. The frozen part is shared, never copied.

        With `copies` > 1 every row of the batch is repeated that often: for many questions on one context, beam search
        or `num_return_sequences`.
        """
        self._require_compressed()
        if copies < 1:
            raise BadInput(f"copies={copies} must be at least 1.")
        twin = RaggedCache.__new__(RaggedCache)
        vars(twin).update(vars(self))
        twin.meter, twin._just_cut = self.meter.fork(), False
        layers: list[Any] = self.layers
        twin.layers = [layer.fork(twin.meter) for layer in layers]
        twin.ragged_layers = _ragged(twin.layers)
        if copies > 1:
            twin.batch_repeat_interleave(copies)
        return twin

    @staticmethod
    def join(caches: Sequence["RaggedCache"]) -> "RaggedCache":
        """One cache whose batch is the rows of all of them: to continue the same context, cut in many ways, at once.

        Copies what they keep. All must have seen equally many tokens and nothing after their context, and store their
        entries in the same way: raises BadInput.
        """
        if not caches:
            raise BadInput("there is no cache to join.")
        for cache in caches:
            cache._require_compressed()
        seen = {cache.get_seq_length() for cache in caches}
        if len(seen) > 1 or any(layer.tail_length for cache in caches for layer in cache.ragged_layers):
            raise BadInput(f"caches of {sorted(seen)} tokens, or with tokens after their context, cannot be joined.")
        if len({cache.provenance["entries"] for cache in caches}) > 1:
            raise BadInput("caches whose entries are stored in different bits cannot be joined.")
        whole, *others = (cache.fork() for cache in caches)
        stacks: Any = zip(whole.layers, *(other.layers for other in others), strict=True)
        whole.meter, whole.tokens_fingerprint = Meter(), None
        whole._noted = Transcript.stacked([cache.transcript for cache in caches])
        counts = [cache.context_tokens for cache in caches]
        ahead = [cache._ahead for cache in caches if cache._ahead is not None]
        whole._ahead = torch.cat(ahead) if ahead else None
        known = [count for count in counts if count is not None]
        whole.context_tokens = sum(known, ()) if len(known) == len(counts) else None
        whole.layers = [first.joined(rest, whole.meter) for first, *rest in stacks]
        whole.ragged_layers = _ragged(whole.layers)
        return whole

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; give minus their number. All layers or none: raises UnsupportedGeneration."""
        self._settle()
        layers: list[Any] = self.layers
        for layer in layers:
            layer.require_croppable(tokens_to_remove)
        known = self.transcript
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self._noted = known.cut(self._stood_at())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch. Frozen contexts are shared, not copied."""
        self._pick(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch. Frozen contexts are shared, not copied."""
        self._pick(lambda t: t.repeat_interleave(repeats, dim=0))

    def _pick(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Rows of all layers, or of none where one fails."""
        layers: list[Any] = self.layers
        if not any(layer.is_initialized for layer in layers):
            return
        picked, noted = [layer.picked(pick) for layer in layers], self._noted.picked(pick)
        for layer, states in zip(layers, picked, strict=True):
            layer.put(states)
        self._noted = noted

    def __copy__(self) -> "RaggedCache":
        """As fork(): two caches that shared their tails would spoil each other."""
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> "RaggedCache":
        """What transformers' users do to ask twice of one prefix; neither model nor frozen storage is copied."""
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be pickled (torch.save and queues of processes do it too): the whole model would go along."""
        raise UnsupportedGeneration(
            "a RaggedCache cannot be pickled, because the whole model would be written with it: use "
            "cache.save('document.safetensors'), and headwise.load('document.safetensors', model) where it is needed."
        )

    def activate_past_recording(self) -> None:
        """Called for assisted generation, which gives the whole prompt to a cache again, read or not."""
        raise UnsupportedGeneration(
            "assisted generation (a draft model or prompt_lookup_num_tokens) cannot use a RaggedCache: it takes back "
            "tokens that may have been evicted. Generate without it."
        )

    def _require_compressed(self) -> None:
        self._settle()
        if not self.compressed:
            seen = self.get_seq_length()
            raise UnsupportedGeneration(
                f"this cache has read {seen} tokens but its context is not complete, so nothing has been cut yet. "
                "Run the model on the context first, or use headwise.compress()."
            )

    def __repr__(self) -> str:
        state = f"kept {int(self.lengths.sum())} entries" if self.compressed else "context not read yet"
        return f"RaggedCache({state}, seen {self.get_seq_length()} tokens, {self.nbytes} bytes)"


def load(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    *,
    input_ids: Int[Tensor, "batch tokens"] | None = None,
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
    kernel: str = "auto",
    **images: Any,
) -> RaggedCache:
    """Read a cache that `RaggedCache.save` wrote, onto the devices of the model's layers and in the model's dtype.

    Parameters
    ----------
    path
        The file.
    model
        The model that made the cache: the same weights.
    input_ids, attention_mask
        The context, to check that the cache is of it. None: it is not checked.
    kernel
        What decodes: "auto", or a name that `headwise doctor` lists.
    images
        With `input_ids`: what the processor has made of the context's images, as `compress` was given it.

    Raises
    ------
    ArtifactMismatch
        The cache is of another model or context.
    BadInput
        The file is missing or damaged.
    """
    model_view = view(model)
    kept = Kept.load(path, model_view, input_ids=input_ids, attention_mask=attention_mask, **images)
    return RaggedCache.of(model_view, kept, kernel=kernel)


def _require_replay(model_view: ModelView, scorer: AbstractScorer, replays: bool) -> None:
    name = type(scorer).__name__
    if scorer.replay is None:
        return
    if not replays:
        raise UnsupportedGeneration(
            f"{name} has the model read the context twice, which generate() does not: use headwise.compress() on "
            "the context, and give its cache to generate()."
        )


def _left_whole(layer: Layer, model_index: int, meter: Meter) -> Any:
    """A layer that is not compressed."""
    if layer.kind == "window":
        return SlidingLayer(sliding_window=layer.window, model_index=model_index, meter=meter)
    if layer.kind == "state":
        return StateLayer(number_of_states=layer.states, model_index=model_index, meter=meter)
    return EmptyLayer()


def _kernel(model_view: ModelView, kernel: str | Kernel, *, quantised: bool) -> Kernel:
    """The kernel for what the model's attention needs. Raises BadInput."""
    anatomy = model_view.anatomy
    if isinstance(kernel, str):
        return get_kernel(kernel, quantised=quantised, softcap=anatomy.softcap, sinks=anatomy.sinks)
    require_options(kernel, softcap=anatomy.softcap, sinks=anatomy.sinks)
    return kernel


def _ragged(layers: Sequence[Any]) -> list[RaggedLayer]:
    return [layer for layer in layers if isinstance(layer, RaggedLayer)]


def _require_index(name: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise BadInput(f"{name}={index} does not exist: there are {count}, counted from 0.")
