"""Texts that follow each other, as tokens: those of the whole, and letter for letter."""

import pytest
from folders import word_tokenizer
from text_tokenizers import byte_tokenizer, spacing_tokenizer

from headwise.errors import BadInput
from headwise.tasks.document import text_ids, tokenize
from headwise.tasks.seams import token_texts


@pytest.mark.parametrize("scheme", ["llama", "first", "always", "never"])
@pytest.mark.parametrize("question", ["\n\nWho was it?", " Answer", "Who was it?", "  it", "\nit"])
def test_a_question_follows_the_document_without_a_space_of_its_own(scheme, question):
    """Tokenizers such as Llama 2's put a space before every text, so also before every question."""
    tokenizer, context = spacing_tokenizer(scheme), "The harbour master was Ingrid."
    tokens = tokenize(tokenizer, context, [question, "?"], separator="", prefixes=[" The harbour", ""])
    for asked, ids in zip([f"{question} The harbour", "?"], tokens.questions, strict=True):
        assert [*tokens.context[0].tolist(), *ids.tolist()] == tokenizer(context + asked)["input_ids"]


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), spacing_tokenizer("llama"), spacing_tokenizer("first")])
@pytest.mark.parametrize("prefix", ["", " The harbour", "Answer: "])
def test_the_templates_end_and_an_answers_beginning_stay_letter_for_letter(tokenizer, prefix):
    context, question = "The harbour.", "Who\tétait-ce?"
    tokenizer.chat_template = "{{ bos_token }}[I] {{ messages[0]['content'] }} \n[/I]"
    tokens = tokenize(tokenizer, context, [question], prefixes=[prefix])
    assert tokenizer.decode(tokens.questions[0]).lstrip() == f"{question} \n[/I]{prefix}"
    whole = tokenizer(f"<s>[I] {context}\n\n{question} \n[/I]{prefix}", add_special_tokens=False)["input_ids"]
    assert [*tokens.context[0].tolist(), *tokens.questions[0].tolist()] == whole


@pytest.mark.parametrize("closes", [False, True])
def test_what_stands_before_every_text_is_known(closes):
    tokenizer = byte_tokenizer(closes)
    start, ids = text_ids(tokenizer, "it was")
    assert (start, tokenizer.decode(ids)) == ([tokenizer.bos_token_id], "it was")
    tokenizer.backend_tokenizer.post_processor = None
    assert text_ids(tokenizer, "it was") == ([], ids)
    with pytest.raises(BadInput, match="words of the text, such as The, annual, report"):
        text_ids(word_tokenizer(), "The annual report of the company was signed by Ada Lovelace. " * 20)


@pytest.mark.parametrize(
    ("tokenizer", "texts"),
    [
        (byte_tokenizer(), ["<s>", "i", "t", " ", *["", "", "港"], *["", "", "务"], " ", *["", "é"]]),
        (spacing_tokenizer("llama"), ["<s>", " it", " ", *["", "", "港"], *["", "", "务"], " ", *["", "é"]]),
    ],
)
def test_texts_of_tokens_make_up_the_text(tokenizer, texts):
    """Parts of a letter were once drawn as what stands for no letter, and words without the spaces before them."""
    assert token_texts(tokenizer, tokenizer("it 港务 é")["input_ids"]) == texts


def test_half_a_letter_is_not_waited_for():
    tokenizer = byte_tokenizer()
    ids = tokenizer("港" * 2 + "it", add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, [*ids[:1] * 6, *ids[-2:]])
    assert len(texts) == 8
    assert "".join(texts[4:]).endswith("it")
