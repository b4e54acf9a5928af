"""A saved cache as a web page: the words of its document, coloured by how many heads keep them.

Drawn for `headwise inspect --plot`. The page is one file that needs nothing else, for any browser, light and dark. What
every head keeps is one bit per token in it; the page's script counts them for the heads that are chosen.
"""

import base64
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int

from headwise.artifacts import read_tensors
from headwise.errors import ArtifactMismatch, BadInput
from headwise.evals.models import REFERENCE, reference_path
from headwise.ragged.store import tokens_fingerprint
from headwise.writing import require_file, write_bytes

FORMATS = (".html", ".htm")
SHADES = 8
_MARK = "\u241edocument\u241e"  # occurs in no document


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
        tensors, metadata = read_tensors(path, "cache")
        layers = tuple(sorted(int(name.split(".")[0]) for name in tensors if name.endswith(".positions")))
        if not layers:
            raise BadInput(f"{path} is damaged: it holds no kept positions; compress the context again.")
        try:
            tails = [tensors[f"{i}.tail_keys"].shape[2] for i in layers if f"{i}.tail_keys" in tensors]
            tokens = metadata["seen"] - max(tails, default=0)
            kept = np.stack([_mask(tensors[f"{i}.positions"], tensors[f"{i}.lengths"], tokens, path) for i in layers])
            method = "+".join(metadata["method"][part]["name"] for part in ("scorer", "allocator"))
            return cls(
                kept=kept,
                layers=layers,
                name=f"{method}, keep {metadata['keep']}",
                model=metadata["model"] or "",
                tokens_fingerprint=metadata["tokens_fingerprint"],
            )
        except (KeyError, TypeError, IndexError, RuntimeError) as error:
            raise BadInput(f"{path} is damaged ({error}); compress the context again.") from error


def _mask(
    positions: Int[torch.Tensor, " rows"],
    lengths: Int[torch.Tensor, "batch kv_heads"],
    tokens: int,
    path: str | os.PathLike[str],
) -> Bool[np.ndarray, "kv_heads tokens"]:
    batch, heads = lengths.shape
    if batch != 1:
        raise BadInput(f"{path} holds {batch} contexts; a map is of one. Compress the one to draw by itself.")
    kept = torch.zeros(heads, tokens, dtype=torch.bool)
    kept[torch.arange(heads).repeat_interleave(lengths[0]), positions.long()] = True
    return kept.numpy()


def load_tokenizer(name: str) -> Any:
    """A tokenizer by hub id, by folder, or the bundled one. Raises BadInput if there is none."""
    from transformers import AutoTokenizer

    if not name:
        raise BadInput("the cache does not say which model made it: name one with --model, for its tokenizer.")
    try:
        return AutoTokenizer.from_pretrained(str(reference_path()) if name == REFERENCE else name)
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"cannot load the tokenizer of {name!r} ({reason}); name the model with --model.") from error


def pieces(tokenizer: Any, text: str, found: KeptTokens) -> list[tuple[str, str]]:
    """The text before every token of the context (spaces, mostly), and the token's own.

    The context is the document as it is, or in the tokenizer's chat template, up to the document's end.
    Raises ArtifactMismatch if it is neither, BadInput for a tokenizer that cannot say where its tokens are.
    """
    if not tokenizer.is_fast:
        raise BadInput(
            f"{type(tokenizer).__name__} does not say where in the text its tokens are: no map can be drawn."
        )
    for source, special in _sources(tokenizer, text):
        coded = tokenizer(source, add_special_tokens=special, return_offsets_mapping=True)
        ids = coded["input_ids"]
        closed = bool(ids) and ids[-1] == tokenizer.eos_token_id  # some tokenizers close every text
        for known in (ids, ids[:-1]) if closed else (ids,):
            if _is_context(known, found):
                return list(_pieces(tokenizer, source, known, coded["offset_mapping"]))
    raise ArtifactMismatch(
        f"the document is not what was compressed: {found.kept.shape[-1]} tokens of other text, or of another "
        "tokenizer. Give the very file with --context, and the model with --model."
    )


def _sources(tokenizer: Any, text: str) -> Iterator[tuple[str, bool]]:
    """Texts whose tokens the context may be, and whether special tokens are added to them."""
    yield text, True
    yield text, False
    if getattr(tokenizer, "chat_template", None) is not None:  # as evals.document.tokenize writes it
        messages = [{"role": "user", "content": f"{text}{_MARK}"}]
        write = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
        yield write(messages, enable_thinking=False).partition(_MARK)[0], False


def _is_context(ids: Sequence[int], found: KeptTokens) -> bool:
    if len(ids) != found.kept.shape[-1]:
        return False
    tokens = torch.tensor([ids])
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

    `text` is the document that was compressed, `context` its file's name; `model` has the tokenizer, the one that the
    cache names if it is left out. Raises BadInput, ArtifactMismatch, WriteFailed.
    """
    target = Path(out)
    if target.suffix.lower() not in FORMATS:
        raise BadInput(f"{target}: the map of a cache is a web page; name an .html file.")
    require_file(target, inputs=[path])
    found = KeptTokens.load(path)
    words = pieces(load_tokenizer(model or found.model), text, found)
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
    template = (files("headwise.report") / "kept.html").read_text(encoding="utf-8")
    return _filled(template, parts)


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """Every {{name}} of the template replaced; the parts themselves are left as they are."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


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
