"""Model folders as `save_pretrained` writes them, tiny, random and with a word-level tokenizer: no network needed."""

from pathlib import Path

from families import tiny_model
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from headwise.tasks.mini_ruler.lexicon import BOS, EOS, PAD, REFERENCE_VOCABULARY, UNKNOWN

# `<bos>` and the roles are in the template, as in Llama's and Qwen's.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] | trim }} "
    "<eos>{% endfor %}{% if add_generation_prompt %} [assistant] {% endif %}"
)


def word_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per word or mark; `<bos>` before every text unless special tokens are switched off."""
    words = [*REFERENCE_VOCABULARY, "[", "]", "user", "assistant", "system"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        chat_template=chat_template,
    )


def save_model(folder: Path, family: str = "llama", chat_template: str | None = None) -> Path:
    """Write a tiny random model of a family and its tokenizer."""
    tokenizer = word_tokenizer(chat_template)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    tiny_model(family, vocab_size=len(tokenizer), **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
