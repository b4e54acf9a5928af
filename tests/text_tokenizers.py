"""Tokenizers of any text, made here: of bytes as GPT-2's, and with a space before every text as Llama 2's."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPACE = "▁"
WORDS = ("Who", "was", "it", "The", "harbour", "master", "Ingrid", "Answer")


def byte_tokenizer(closes: bool = False) -> PreTrainedTokenizerFast:
    """A token per byte and for some words, `<s>` before every text; `closes`: `</s>` behind it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, "<s> $A </s>" if closes else "<s> $A")


def spacing_tokenizer(scheme: str) -> PreTrainedTokenizerFast:
    """Words and bytes. `scheme`: where a space is put before a text, "first", "always" or "never"; or as in "llama"."""
    pieces = [*("<unk>", "<s>", "</s>"), *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, SPACE * 2]
    letters = sorted({letter for word in WORDS for letter in word})
    merged: dict[str, None] = {}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(1, len(word)):
            if word[: end + 1] not in merged:
                merged[word[: end + 1]] = None
                merges.append((word[:end], word[end]))
    spaced = [SPACE + word for word in WORDS]
    merges += [(SPACE, word) for word in WORDS] + [(SPACE, SPACE)]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *letters, *merged, *spaced])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    if scheme == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return _finished(tokenizer, "<s> $A", unk_token="<unk>")


def _finished(tokenizer: Tokenizer, template: str, **names: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    special = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **names)
