"""Draw a saved cache as a web page: the words of its document, coloured by how many heads keep them.

For `headwise inspect --plot`. The page is one file that needs nothing else, for any browser, light and dark. It holds
one bit per head and token; its script counts the bits of the heads that a reader chooses.
"""

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int

from headwise.artifacts.tensors import opened
from headwise.cache.kept import tokens_fingerprint
from headwise.cache.saved import bits_in, prefix_of, read
from headwise.errors import ArtifactMismatch, BadInput
from headwise.files.writing import require_file, write_bytes
from headwise.kernels.quantised import NATIVE
from headwise.models.loading import REFERENCE, load_tokenizer
from headwise.report.draw.template import filled
from headwise.tasks import template

FORMATS = (".html", ".htm")
SHADES = 8
LARGEST = 2**30  # bytes of a map while it is made: one for every token and head

Coding = tuple[str, list[int], list[tuple[int, int]]]  # a text, its tokens, and from where to where each stands in it


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeptTokens:
    """Which tokens of one context every head of a saved cache has kept."""

    kept: Bool[np.ndarray, "layers kv_heads tokens"]
    layers: tuple[int, ...]  # of the model, those that can be compressed
    name: str  # of method, keep and entries
    model: str  # folder or hub id
    tokens_fingerprint: str | None  # of the context; not known where generate() has read it

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "KeptTokens":
        """Read what `RaggedCache.save` wrote. Raises ArtifactMismatch, or BadInput if it is a batch or damaged."""
        with opened(path, "cache") as file:
            saved = read(file)
        layer_states, metadata = saved.layers, saved.metadata
        layers = tuple(layer for layer, states in layer_states.items() if "positions" in states)
        if not layers:
            raise BadInput(f"{path} is damaged: it holds no kept positions; compress the context again.")
        tails = [layer_states[i]["tail_keys"].shape[2] for i in layers if "tail_keys" in layer_states[i]]
        tokens = metadata["seen"] - max(tails, default=0)
        if tokens * sum(layer_states[i]["lengths"].numel() for i in layers) > LARGEST:
            raise BadInput(f"{path} says that it saw {metadata['seen']} tokens, which are too many for a map.")
        kept = np.stack([_kept(layer_states[i], tokens, path) for i in layers])
        return cls(
            kept=kept,
            layers=layers,
            name=f"{_method(metadata['method'], path)}, keep {metadata['keep']}{_entries(metadata['entries'])}",
            model=metadata["model"] or "",
            tokens_fingerprint=metadata["tokens_fingerprint"],
        )


def _method(method: Mapping[str, Any], path: str | os.PathLike[str]) -> str:
    """Return the names of scorer and allocator, as the classes are called."""
    match method:
        case {"scorer": {"name": str(scorer)}, "allocator": {"name": str(allocator)}}:
            return f"{scorer}+{allocator}"
    raise BadInput(f"{path} is damaged: it does not name its method; compress the context again.")


def _entries(entries: str) -> str:
    """Return what to say of entries that are not in the model's dtype."""
    return "" if entries == NATIVE else f", {entries}"


def _kept(
    states: Mapping[str, torch.Tensor], tokens: int, path: str | os.PathLike[str]
) -> Bool[np.ndarray, "kv_heads tokens"]:
    """Return what the heads of a layer have kept, in the model's dtype or in fewer bits."""
    parts = ("", *map(prefix_of, bits_in(states)))
    masks = [_mask(states[f"{part}positions"], states[f"{part}lengths"], tokens, path) for part in parts]
    return np.logical_or.reduce(masks)


def _mask(
    positions: Int[torch.Tensor, " rows"],
    lengths: Int[torch.Tensor, "batch kv_heads"],
    tokens: int,
    path: str | os.PathLike[str],
) -> Bool[np.ndarray, "kv_heads tokens"]:
    batch, heads = lengths.shape
    if batch != 1:
        raise BadInput(f"{path} holds {batch} contexts; a map is of one. Compress the one to draw by itself.")
    kept = torch.zeros(heads, tokens, dtype=torch.bool, device="cpu")
    kept[torch.arange(heads, dtype=torch.int64, device="cpu").repeat_interleave(lengths[0]), positions.long()] = True
    return kept.numpy()


def tokenizer_for(kept_tokens: KeptTokens, model: str | None) -> Any:
    """Load the tokenizer of the model that the user names, or else of the cache's model, if that is a folder here.

    Somebody else may have written the name in a file: nothing is fetched for it. Raises BadInput if there is none.
    """
    if model is not None:
        return load_tokenizer(model)
    if not kept_tokens.model:
        raise BadInput("the cache does not say which model made it: name one with --model, for its tokenizer.")
    # A path that starts so names another machine on Windows, which would be asked.
    name = kept_tokens.model
    if name == REFERENCE or (not name.startswith((r"\\", "//")) and Path(name).is_dir()):
        return load_tokenizer(name)
    raise BadInput(
        f"the cache is of the model {name!r}, which is no folder here, and nothing is fetched for a name in a file: "
        "name the model with --model, for its tokenizer."
    )


def pieces(tokenizer: Any, text: str, kept_tokens: KeptTokens) -> list[tuple[str, str]]:
    """Return the text before every token of the context (spaces, mostly), and the token's own text.

    The context is the document as it is, or in the tokenizer's chat template, up to the document's end.
    Raises ArtifactMismatch if it is neither, BadInput if the tokenizer cannot say where its tokens are.
    """
    if not tokenizer.is_fast:
        raise BadInput(
            f"{type(tokenizer).__name__} does not say where in the text its tokens are: no map can be drawn."
        )
    for source, ids, offsets in _codings(tokenizer, text):
        closed = bool(ids) and ids[-1] == tokenizer.eos_token_id  # some tokenizers close every text
        for candidate in (ids, ids[:-1]) if closed else (ids,):
            if _is_context(candidate, kept_tokens):
                return list(_pieces(tokenizer, source, candidate, offsets))
    raise ArtifactMismatch(
        f"the document is not what was compressed: {kept_tokens.kept.shape[-1]} tokens of other text, or of another "
        "tokenizer. Give the very file with --context, and the model with --model."
    )


def _codings(tokenizer: Any, text: str) -> Iterator[Coding]:
    """Yield what the context may be: the document alone or in the template, with control tokens or as plain text."""
    for options in ({}, {"split_special_tokens": True}):
        yield _encode(tokenizer, text, add_special_tokens=True, **options)
        yield _encode(tokenizer, text, add_special_tokens=False, **options)
    if getattr(tokenizer, "chat_template", None) is not None:
        start = template.opening(template.chat(tokenizer), text)
        yield _encode(tokenizer, start.own + start.text, add_special_tokens=False)
        own, ids, offsets = _encode(tokenizer, start.own, add_special_tokens=False)
        inner = _encode(tokenizer, start.text, add_special_tokens=False, split_special_tokens=True)
        moved = [(len(own) + begin, len(own) + end) for begin, end in inner[2]]
        yield own + inner[0], ids + inner[1], offsets + moved


def _encode(tokenizer: Any, text: str, **options: bool) -> Coding:
    encoding = tokenizer(text, return_offsets_mapping=True, **options)
    return text, encoding["input_ids"], encoding["offset_mapping"]


def _is_context(ids: Sequence[int], kept_tokens: KeptTokens) -> bool:
    if len(ids) != kept_tokens.kept.shape[-1]:
        return False
    tokens = torch.tensor([ids], dtype=torch.int64, device="cpu")
    return kept_tokens.tokens_fingerprint in (None, tokens_fingerprint(tokens, torch.ones_like(tokens)))


def _pieces(
    tokenizer: Any, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> Iterator[tuple[str, str]]:
    done = 0
    for token, (start, end) in zip(ids, offsets, strict=False):
        if start == end and token in tokenizer.all_special_ids:
            yield "", str(tokenizer.convert_ids_to_tokens(token))
            continue
        start = max(start, done)  # tokens of bytes share a character: the first has it
        yield text[done:start], text[start:end]
        done = max(done, end)


def plot(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, context: Path, text: str, model: str | None = None
) -> None:
    """Write the page of a saved cache as .html, at once or not at all.

    `text` is the document that was compressed, `context` its file's name. `model` has the tokenizer; None is the model
    that the cache names, if it is in a folder. Raises BadInput, ArtifactMismatch or WriteFailed.
    """
    target = Path(out)
    if target.suffix.lower() not in FORMATS:
        raise BadInput(f"{target}: the map of a cache is a web page; name an .html file.")
    require_file(target, inputs=[path])
    kept_tokens = KeptTokens.load(path)
    words = pieces(tokenizer_for(kept_tokens, model), text, kept_tokens)
    write_bytes(target, page(kept_tokens, words, context.name).encode(errors="replace"))  # half a character is no text


def page(kept_tokens: KeptTokens, words: Sequence[tuple[str, str]], document: str) -> str:
    """Return the page of a context."""
    layers, heads, tokens = kept_tokens.kept.shape
    data = {
        "layers": kept_tokens.layers,
        "heads": heads,
        "tokens": tokens,
        "kept": base64.b64encode(np.packbits(kept_tokens.kept, axis=-1).tobytes()).decode(),
    }
    share = f"{kept_tokens.kept.mean():.1%} of {tokens:,} tokens x {layers} layers x {heads} KV heads"
    model = Path(kept_tokens.model).name if Path(kept_tokens.model).is_absolute() else kept_tokens.model
    parts = {
        "title": escape(f"{document}: what every head keeps"),
        "subtitle": escape(f"{model or 'model unknown'}, {kept_tokens.name}: {share}"),
        "layers": _options(kept_tokens.layers, "layer"),
        "heads": _options(range(heads), "KV head"),
        "table": _table(kept_tokens),
        "text": "".join(f"{escape(before)}{_element(token)}" for before, token in words),
        "data": json.dumps(data),
    }
    return filled("headwise.report.inspect", "kept.html", parts)


def _element(token: str) -> str:
    """Return the HTML of a token. One that is blank, or shares a character with the one before, is a dot."""
    return f"<i>{escape(token)}</i>" if token.strip() else f'<i class="b">·</i>{token}'


def _options(numbers: Sequence[int], name: str) -> str:
    return "".join(f'<option value="{index}">{name} {number}</option>' for index, number in enumerate(numbers))


def _table(kept_tokens: KeptTokens) -> str:
    """Return a table of the kept entries of every head, layers down."""
    counts = kept_tokens.kept.sum(-1)
    shades = np.ceil(SHADES * np.sqrt(counts / kept_tokens.kept.shape[-1])).astype(int)
    head = "".join(f'<th scope="col">{head}</th>' for head in range(counts.shape[1]))
    rows = [
        f'<tr><th scope="row">{layer}</th>'
        + "".join(f'<td class="s{shade}">{count}</td>' for count, shade in zip(*row, strict=True))
        + "</tr>"
        for layer, *row in zip(kept_tokens.layers, counts.tolist(), shades.tolist(), strict=True)
    ]
    return f'<thead><tr><th scope="col">layer</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
