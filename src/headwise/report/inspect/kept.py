"""A saved cache as a web page: the words of its document, coloured by how many heads keep them.

Drawn for `headwise inspect --plot`. The page is one file that needs nothing else, for any browser, light and dark. What
every head keeps is one bit per token in it; the page's script counts them for the heads that are chosen.
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
from headwise.cache.saved import read
from headwise.errors import ArtifactMismatch, BadInput
from headwise.files.writing import require_file, write_bytes
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
    name: str  # of method and keep
    model: str  # folder or hub id
    tokens_fingerprint: str | None  # of the context; not known where generate() has read it

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "KeptTokens":
        """From what `RaggedCache.save` wrote. Raises ArtifactMismatch, BadInput for a batch or a damaged file."""
        with opened(path, "cache") as file:
            saved = read(file)
        found, metadata = saved.layers, saved.metadata
        layers = tuple(layer for layer, states in found.items() if "positions" in states)
        if not layers:
            raise BadInput(f"{path} is damaged: it holds no kept positions; compress the context again.")
        tails = [found[i]["tail_keys"].shape[2] for i in layers if "tail_keys" in found[i]]
        tokens = metadata["seen"] - max(tails, default=0)
        if tokens * sum(found[i]["lengths"].numel() for i in layers) > LARGEST:
            raise BadInput(f"{path} says that it saw {metadata['seen']} tokens, which are too many for a map.")
        kept = np.stack([_mask(found[i]["positions"], found[i]["lengths"], tokens, path) for i in layers])
        return cls(
            kept=kept,
            layers=layers,
            name=f"{_method(metadata['method'], path)}, keep {metadata['keep']}",
            model=metadata["model"] or "",
            tokens_fingerprint=metadata["tokens_fingerprint"],
        )


def _method(found: Mapping[str, Any], path: str | os.PathLike[str]) -> str:
    """Scorer and allocator, as the classes are called."""
    match found:
        case {"scorer": {"name": str(scorer)}, "allocator": {"name": str(allocator)}}:
            return f"{scorer}+{allocator}"
    raise BadInput(f"{path} is damaged: it does not name its method; compress the context again.")


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


def tokenizer_for(found: KeptTokens, model: str | None) -> Any:
    """The tokenizer of the model that the user names, or else that of the cache's model, if it lies in a folder here.

    A name in a file is somebody else's word: nothing is fetched for it. Raises BadInput.
    """
    if model is not None:
        return load_tokenizer(model)
    if not found.model:
        raise BadInput("the cache does not say which model made it: name one with --model, for its tokenizer.")
    # A path that starts so names another machine on Windows, which would be asked.
    if found.model == REFERENCE or (not found.model.startswith((r"\\", "//")) and Path(found.model).is_dir()):
        return load_tokenizer(found.model)
    raise BadInput(
        f"the cache is of the model {found.model!r}, which is no folder here, and nothing is fetched for a name in a "
        "file: name the model with --model, for its tokenizer."
    )


def pieces(tokenizer: Any, text: str, found: KeptTokens) -> list[tuple[str, str]]:
    """The text before every token of the context (spaces, mostly), and the token's own.

    The context is the document as it is, or in the tokenizer's chat template, up to the document's end.
    Raises ArtifactMismatch if it is neither, BadInput for a tokenizer that cannot say where its tokens are.
    """
    if not tokenizer.is_fast:
        raise BadInput(
            f"{type(tokenizer).__name__} does not say where in the text its tokens are: no map can be drawn."
        )
    for source, ids, offsets in _codings(tokenizer, text):
        closed = bool(ids) and ids[-1] == tokenizer.eos_token_id  # some tokenizers close every text
        for known in (ids, ids[:-1]) if closed else (ids,):
            if _is_context(known, found):
                return list(_pieces(tokenizer, source, known, offsets))
    raise ArtifactMismatch(
        f"the document is not what was compressed: {found.kept.shape[-1]} tokens of other text, or of another "
        "tokenizer. Give the very file with --context, and the model with --model."
    )


def _codings(tokenizer: Any, text: str) -> Iterator[Coding]:
    """What the context may be: the document alone, or in the template, each with control tokens in it or as text."""
    for options in ({}, {"split_special_tokens": True}):
        yield _coded(tokenizer, text, add_special_tokens=True, **options)
        yield _coded(tokenizer, text, add_special_tokens=False, **options)
    if getattr(tokenizer, "chat_template", None) is not None:
        start = template.opening(template.chat(tokenizer), text)
        yield _coded(tokenizer, start.own + start.text, add_special_tokens=False)
        own, ids, offsets = _coded(tokenizer, start.own, add_special_tokens=False)
        inner = _coded(tokenizer, start.text, add_special_tokens=False, split_special_tokens=True)
        moved = [(len(own) + at, len(own) + to) for at, to in inner[2]]
        yield own + inner[0], ids + inner[1], offsets + moved


def _coded(tokenizer: Any, text: str, **options: bool) -> Coding:
    found = tokenizer(text, return_offsets_mapping=True, **options)
    return text, found["input_ids"], found["offset_mapping"]


def _is_context(ids: Sequence[int], found: KeptTokens) -> bool:
    if len(ids) != found.kept.shape[-1]:
        return False
    tokens = torch.tensor([ids], dtype=torch.int64, device="cpu")
    return found.tokens_fingerprint in (None, tokens_fingerprint(tokens, torch.ones_like(tokens)))


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

    `text` is the document that was compressed, `context` its file's name; `model` has the tokenizer, left out: the one
    that the cache names, if it is in a folder. Raises BadInput, ArtifactMismatch, WriteFailed.
    """
    target = Path(out)
    if target.suffix.lower() not in FORMATS:
        raise BadInput(f"{target}: the map of a cache is a web page; name an .html file.")
    require_file(target, inputs=[path])
    found = KeptTokens.load(path)
    words = pieces(tokenizer_for(found, model), text, found)
    write_bytes(target, page(found, words, context.name).encode(errors="replace"))  # half a character is no text


def page(found: KeptTokens, words: Sequence[tuple[str, str]], document: str) -> str:
    """The page of a context."""
    layers, heads, tokens = found.kept.shape
    data = {
        "layers": found.layers,
        "heads": heads,
        "tokens": tokens,
        "kept": base64.b64encode(np.packbits(found.kept, axis=-1).tobytes()).decode(),
    }
    share = f"{found.kept.mean():.1%} of {tokens:,} tokens x {layers} layers x {heads} KV heads"
    model = Path(found.model).name if Path(found.model).is_absolute() else found.model
    parts = {
        "title": escape(f"{document}: what every head keeps"),
        "subtitle": escape(f"{model or 'model unknown'}, {found.name}: {share}"),
        "layers": _options(found.layers, "layer"),
        "heads": _options(range(heads), "KV head"),
        "table": _table(found),
        "text": "".join(f"{escape(before)}{_element(token)}" for before, token in words),
        "data": json.dumps(data),
    }
    return filled("headwise.report.inspect", "kept.html", parts)


def _element(token: str) -> str:
    """Blank tokens, and those that share a character with the one before, show as a dot."""
    return f"<i>{escape(token)}</i>" if token.strip() else f'<i class="b">·</i>{token}'


def _options(numbers: Sequence[int], name: str) -> str:
    return "".join(f'<option value="{at}">{name} {number}</option>' for at, number in enumerate(numbers))


def _table(found: KeptTokens) -> str:
    """Kept entries of every head, layers down."""
    counts = found.kept.sum(-1)
    shades = np.ceil(SHADES * np.sqrt(counts / found.kept.shape[-1])).astype(int)
    head = "".join(f'<th scope="col">{head}</th>' for head in range(counts.shape[1]))
    rows = [
        f'<tr><th scope="row">{layer}</th>'
        + "".join(f'<td class="s{shade}">{count}</td>' for count, shade in zip(*row, strict=True))
        + "</tr>"
        for layer, *row in zip(found.layers, counts.tolist(), shades.tolist(), strict=True)
    ]
    return f'<thead><tr><th scope="col">layer</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
