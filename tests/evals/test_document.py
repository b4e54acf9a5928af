"""Documents and questions: from files, and into tokens."""

import json

import pytest
import torch
from folders import CHAT_TEMPLATE, word_tokenizer

from headwise.calibration import Example, encode, load_examples
from headwise.errors import BadInput
from headwise.evals.document import Asked, read_questions, read_text, tokenize
from headwise.evals.plain import file_task

CONTEXT = " the red stone.\nthe blue stone. "
QUESTIONS = ["? locker apple", "who was it?  "]


class Spy:
    """A tokenizer that notes every text it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.texts, self.eos_token_id = tokenizer, [], tokenizer.eos_token_id
        self.chat_template, self.apply_chat_template = tokenizer.chat_template, tokenizer.apply_chat_template

    def __call__(self, text, **options):
        self.texts.append(text)
        return self.tokenizer(text, **options)


def rendered(tokenizer, question: str) -> str:
    message = [{"role": "user", "content": f"{CONTEXT}\n\n{question}"}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)


TEMPLATES = {
    "trims": CHAT_TEMPLATE,
    "does not": CHAT_TEMPLATE.replace("| trim", ""),
    "no head": "{% for message in messages %}{{ message['content'] }}{% endfor %} [assistant]",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_context_and_question_join_to_the_whole_template(name):
    """A template that trims messages once gave another text than the joined parts."""
    spy = Spy(word_tokenizer(TEMPLATES[name]))
    tokens = tokenize(spy, CONTEXT, QUESTIONS)
    opening, *endings = spy.texts
    for question, ending, ids in zip(QUESTIONS, endings, tokens.questions, strict=True):
        whole = rendered(spy.tokenizer, question)
        assert opening + ending == whole
        expected = spy.tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert tokens.context[0].tolist() + ids.tolist() == expected
    assert opening.endswith("the blue stone. ")  # no part of any question


def test_the_template_opens_the_context_and_closes_every_question():
    tokenizer = word_tokenizer(CHAT_TEMPLATE)
    tokens = tokenize(tokenizer, CONTEXT, QUESTIONS)
    assert tokenizer.decode(tokens.context[0]).startswith("<bos> [ user ]")
    assert tokens.context[0].tolist().count(tokenizer.bos_token_id) == 1
    for ids in tokens.questions:
        assert tokenizer.decode(ids).endswith("<eos> [ assistant ]")
        assert tokenizer.bos_token_id not in ids


def test_a_model_that_thinks_is_asked_not_to():
    template = CHAT_TEMPLATE + "{% if enable_thinking is not false %} still {% else %} never {% endif %}"
    tokenizer = word_tokenizer(template)
    assert tokenizer.decode(tokenize(tokenizer, CONTEXT, ["who?"]).questions[0]).endswith("never")


def test_a_template_that_drops_the_message_is_refused():
    with pytest.raises(BadInput, match="does not show the user's message"):
        tokenize(word_tokenizer("[user] [assistant]"), CONTEXT, QUESTIONS)


def test_a_base_model_gets_the_start_once_and_plain_text():
    tokenizer = word_tokenizer()
    tokens = tokenize(tokenizer, CONTEXT, QUESTIONS)
    expected = tokenizer(CONTEXT)["input_ids"]
    assert tokens.context[0].tolist() == expected
    assert expected.count(tokenizer.bos_token_id) == 1
    assert tokens.questions[0].tolist() == tokenizer("? locker apple", add_special_tokens=False)["input_ids"]


def test_an_end_that_the_tokenizer_adds_is_taken_off():
    class Closing(Spy):
        def __call__(self, text, *, add_special_tokens):
            ids = super().__call__(text, add_special_tokens=add_special_tokens)["input_ids"]
            return {"input_ids": [*ids, self.eos_token_id] if add_special_tokens else ids}

    plain = word_tokenizer()
    assert tokenize(Closing(plain), CONTEXT, QUESTIONS).context.equal(tokenize(plain, CONTEXT, QUESTIONS).context)


REPORT = "The annual report of the company was signed by Ada Lovelace. " * 20


def test_a_document_or_question_of_unknown_words_is_refused():
    """The bundled model of some 500 words once answered questions about English reports, with nonsense."""
    for template in (None, CHAT_TEMPLATE):
        tokenizer = word_tokenizer(template)
        with pytest.raises(BadInput, match=r"does not know \d+% of the words of the document, such as \w+, \w+, \w+:"):
            tokenize(tokenizer, REPORT, QUESTIONS)
    with pytest.raises(BadInput, match=r"40% of the words of the question 'who was Ada Lovelace\?', .* --model"):
        tokenize(word_tokenizer(), CONTEXT, [*QUESTIONS, "who was Ada Lovelace?"])


def test_some_unknown_words_are_common():
    tokenizer = word_tokenizer()
    known = "the red stone. " * 30
    tokens = tokenize(tokenizer, f"{known} Ada", ["the locker was Ada?"])
    assert tokenizer.unk_token_id in tokens.context[0].tolist()
    assert tokenizer.unk_token_id in tokens.questions[0].tolist()


def test_a_tokenizer_without_unknown_words_is_not_questioned():
    """GPT-2's marks the end of a text by its unknown token, which no text needs."""
    bytewise, double = word_tokenizer(), word_tokenizer()
    bytewise.unk_token = None
    double.eos_token = double.unk_token
    for tokenizer in (bytewise, double):
        assert tokenize(tokenizer, REPORT, QUESTIONS).context.shape[1] > 100


def test_tokens_are_whole_numbers():
    assert tokenize(word_tokenizer(), CONTEXT, QUESTIONS).context.dtype == torch.long


@pytest.mark.parametrize(("questions", "message"), [([], "no question"), ([" "], "empty"), (["who?", ""], "empty")])
def test_no_question(questions, message):
    with pytest.raises(BadInput, match=message):
        tokenize(word_tokenizer(), CONTEXT, questions)


def test_a_document_is_read_as_utf8(tmp_path):
    (tmp_path / "text").write_bytes("Zoë\n".encode())
    assert read_text(tmp_path / "text") == "Zoë\n"


def test_documents_that_are_none(tmp_path):
    for content, message in [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe\x00", "not UTF-8 text")]:
        (tmp_path / "text").write_bytes(content)
        with pytest.raises(BadInput, match=message):
            read_text(tmp_path / "text")
    with pytest.raises(BadInput, match="cannot read the document"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="cannot read the document"):
        read_text(tmp_path)


def test_questions_with_and_without_answers(tmp_path):
    lines = [{"question": "Who?", "answers": ["Ada", "Zoë\u2028"]}, {"question": "What?"}]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "q.jsonl").write_text(text + "\n", encoding="utf-8")
    assert read_questions(tmp_path / "q.jsonl") == [
        Asked(question="Who?", answers=("Ada", "Zoë\u2028")),
        Asked(question="What?"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "who?",
        "[1]",
        '{"q": "who?"}',
        '{"question": 5}',
        '{"question": ""}',
        '{"question": "who?", "answers": "Ada"}',  # once taken as the three answers A, d, a
        '{"question": "who?", "answers": ["Ada", 3]}',
        '{"question": "who?", "answers": [""]}',
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line):
    (tmp_path / "q.jsonl").write_text('{"question": "good?"}\n' + line)
    with pytest.raises(BadInput, match=r"q\.jsonl, line 2 is no question; write"):
        read_questions(tmp_path / "q.jsonl")


def test_no_questions_in_a_file(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(BadInput, match="holds no questions"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(BadInput, match="cannot read questions"):
        read_questions(tmp_path / "nowhere.jsonl")


HALF = "locker marble \ud800 robin"


def test_half_a_character_is_refused_before_the_tokenizer_sees_it(tmp_path):
    tokenizer = word_tokenizer()
    for given in ((HALF, ["who?"]), ("locker apple " * 20, ["who?", HALF])):
        with pytest.raises(BadInput, match=r"holds half a character .*character 15"):
            tokenize(tokenizer, *given)
    with pytest.raises(BadInput, match="holds half a character"):
        encode(tokenizer, Example(context=HALF), device="cpu")
    task = tmp_path / "own.jsonl"
    good = {"context": "locker apple", "question": "who?", "answers": [HALF]}
    task.write_text(json.dumps(good) + "\n")
    assert file_task(task, 100).sample(0).questions[0].answers == (HALF,)  # compared with, never read
    for bad in ({"context": HALF}, {"question": HALF}):
        task.write_text(json.dumps(good) + "\n" + json.dumps(good | bad) + "\n")
        with pytest.raises(BadInput, match="line 2 holds half a character"):
            file_task(task, 100)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\r"])
def test_json_lines_end_at_line_feeds_only(tmp_path, mark, end):
    """A carriage return alone is space between two fields of JSON; the others are text."""
    text = "a" if mark == "\r" else f"a{mark}b"
    fields = [f'"context": "locker {text}"', f'"question": "who {text}"', '"answers": ["x"]']
    line = ("{" + (f",{mark}" if mark == "\r" else ", ").join(fields) + "}" + end).encode()
    path = tmp_path / "some.jsonl"
    path.write_bytes(2 * line)
    assert read_questions(path) == 2 * [Asked(question=f"who {text}", answers=("x",))]
    assert file_task(path, 100).num_samples == 2
    assert file_task(path, 100).sample(1).context == f"locker {text}"
    path.write_bytes(2 * line.replace(b'"question": "', b'"questions": ["').replace(b'", "answers"', b'"], "answers"'))
    path.write_bytes(path.read_bytes().replace(b'",\r"answers"', b'"],\r"answers"'))
    assert [e.questions for e in load_examples(str(path), None, max_positions=1)] == 2 * [(f"who {text}",)]
