"""The reference model's tokenizer: one token per word or punctuation mark, loadable by AutoTokenizer."""

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from headwise.tasks.mini_ruler.lexicon import BOS, EOS, PAD, REFERENCE_VOCABULARY, UNKNOWN

LONGEST_INPUT = 2048


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer; it puts the beginning-of-document token first unless special tokens are switched off."""
    vocabulary = {word: index for index, word in enumerate(REFERENCE_VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
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
        padding_side="left",
        model_max_length=LONGEST_INPUT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=True,
    )
