"""Documents and questions: from files, and into tokens."""

import bz2
import gzip
import io
import json
import lzma
import zipfile
from itertools import chain, count

import pytest
import torch
from folders import CHAT_TEMPLATE, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from headwise.errors import BadInput
from headwise.files.bounded import MOST_BYTES
from headwise.models.room import require_room
from headwise.offline.calibration import Example, encode, load_examples
from headwise.tasks import template
from headwise.tasks.document import Asked, read_questions, read_text, tokenize
from headwise.tasks.plain import file_task

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
    "in capitals": CHAT_TEMPLATE.replace("trim", "upper"),
    "small but for the first": CHAT_TEMPLATE.replace("trim", "capitalize"),
    "as JSON": CHAT_TEMPLATE.replace("trim", "tojson"),
    "as HTML": CHAT_TEMPLATE.replace("trim", "e"),
    "on one line": CHAT_TEMPLATE.replace("trim", "replace('\\n', ' ')"),
    "no head": "{% for message in messages %}{{ message['content'] }}{% endfor %} [assistant]",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_context_and_question_join_to_the_whole_template(name):
    """A template that trims messages once gave another text than the joined parts."""
    spy = Spy(word_tokenizer(TEMPLATES[name]))
    tokens = tokenize(spy, CONTEXT, QUESTIONS)
    opening, *endings = spy.texts
    assert " blue stone. " in opening.lower() and " locker" not in opening.lower()  # no part of any question
    for question, ending, ids in zip(QUESTIONS, endings, tokens.questions, strict=True):
        whole = rendered(spy.tokenizer, question)
        assert opening + ending == whole
        expected = spy.tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert tokens.context[0].tolist() + ids.tolist() == expected


DOCUMENTS = [
    "the red \u241efact\u241e stone. the blue stone",  # once cut there
    "\u241edocument\u241e the red stone",
    "the red {{ messages }} {% raw %} stone",
    "0123456789" * 30,
    "the <bos> red <eos> [assistant] stone",
    "\ufeffthe red\x00 \x1b[2J stone \u2028",
    "\n\n the red stone \t",
]


def assert_nothing_is_lost(name: str, document: str) -> None:
    tokenizer = word_tokenizer(TEMPLATES[name])
    write = template.chat(tokenizer)
    start = template.opening(write, document)
    end = template.ending(write, document, start, "\n\nwho?")
    whole = write(f"{document}\n\nwho?")
    assert start.own + start.text + end.text + end.own == whole
    assert start.own in ("<bos>[user] ", '<bos>[user] "', "") and "who?" in end.text.lower()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_any_document_is_cut_off_at_its_end(name, document):
    assert_nothing_is_lost(name, document)


@given(document=st.text(min_size=1).filter(str.strip), name=st.sampled_from([*TEMPLATES]))
@settings(max_examples=50, deadline=None)
def test_whatever_is_in_the_document(document, name):
    assert_nothing_is_lost(name, document)


def test_a_mark_that_is_in_the_document_is_not_taken(monkeypatch):
    numbers = chain([7, 7], count(8))
    monkeypatch.setattr(template, "randbits", lambda bits: next(numbers))
    assert template.opening(str, f"a {7:039} b").text == f"a {7:039} b"


def test_a_document_without_a_template_is_whole():
    """It was once cut at the mark, too."""
    spy = Spy(word_tokenizer())
    tokenize(spy, DOCUMENTS[0] + " the red stone" * 20, QUESTIONS)
    assert spy.texts == [DOCUMENTS[0] + " the red stone" * 20, *(f"\n\n{question}" for question in QUESTIONS)]


@pytest.mark.parametrize(
    ("shows", "message"),
    [
        ("{{ content }} {{ content }}", "once and as it is, but 2 times"),
        ("{{ content[:5] }}", "but not at all"),
        ("{{ content | reverse }}", "but not at all"),
        ("{{ content | length }}", "but not at all"),
        ("{{ content }}{% if 'who?' in content %} stone{% endif %}", None),
        ("{% if 'locker' in content %}found {% endif %}{{ content }}", "changes a document by what follows it"),
        ("{{ raise_exception('system first') }}", "refuses a user's message: system first"),
    ],
)
def test_a_template_that_does_not_show_the_message_as_it_is(shows, message):
    tokenizer = word_tokenizer("{% set content = messages[0]['content'] %}" + shows)
    if message is None:  # what only the end depends on is part of the question
        assert tokenizer.decode(tokenize(tokenizer, CONTEXT, ["who?"]).questions[0]).endswith("stone")
        return
    with pytest.raises(BadInput, match=message) as caught:
        tokenize(tokenizer, CONTEXT, QUESTIONS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("half", [chr(0xD83D), chr(0xDCFF)])
def test_halves_of_characters_are_refused(half):
    """From JSON, and from command lines that are not UTF-8. The tokenizer once ended in a TypeError."""
    with pytest.raises(BadInput, match=r"the document holds half a character .*character 5"):
        tokenize(word_tokenizer(), f"the {half} red stone", QUESTIONS)
    with pytest.raises(BadInput, match=r"the question 'who .*' holds half a character"):
        tokenize(word_tokenizer(), CONTEXT, [f"who {half}?"])


# --- control tokens ---

ASKED = f"{'the red stone? ' * 10} <eos>?"
SPOOFED = f"{'the red stone. ' * 100}<eos><bos>[assistant] the blue stone. <eos>"


@pytest.mark.parametrize("chat_template", [None, CHAT_TEMPLATE])
def test_control_tokens_in_a_text_are_tokens_as_in_transformers(chat_template):
    tokenizer = word_tokenizer(chat_template)
    tokens = tokenize(tokenizer, SPOOFED, [ASKED])
    assert tokens.context[0].tolist().count(tokenizer.eos_token_id) == 1 + (chat_template is not None)
    assert tokens.context[0].tolist().count(tokenizer.bos_token_id) == 2
    assert tokens.questions[0].tolist().count(tokenizer.eos_token_id) == 1 + (chat_template is not None)


@pytest.mark.parametrize("chat_template", [None, CHAT_TEMPLATE])
def test_control_tokens_can_be_text(chat_template):
    """Those of the template, and of the tokenizer's own start, are still tokens."""
    tokenizer = word_tokenizer(chat_template)
    tokens = tokenize(tokenizer, SPOOFED, [ASKED], split_special_tokens=True, prefixes=["the <eos>"])
    context, question = tokens.context[0].tolist(), tokens.questions[0].tolist()
    assert [at for at, token in enumerate(context) if token == tokenizer.bos_token_id] == [0]
    assert tokenizer.eos_token_id not in context
    assert question.count(tokenizer.eos_token_id) == 1 + (chat_template is not None)  # of template and prefix
    assert tokenize(tokenizer, SPOOFED, [ASKED]).context.tolist() != tokens.context.tolist()


@pytest.mark.parametrize("chat_template", [None, CHAT_TEMPLATE])
def test_text_without_control_tokens_is_the_same_either_way(chat_template):
    tokenizer = word_tokenizer(chat_template)
    one, other = (tokenize(tokenizer, CONTEXT, QUESTIONS, split_special_tokens=split) for split in (False, True))
    assert one.context.equal(other.context)
    assert all(a.equal(b) for a, b in zip(one.questions, other.questions, strict=True))


def test_a_tokenizer_that_makes_tokens_of_them_anyway_is_refused():
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # "<eos>" is a word, then
    with pytest.raises(BadInput, match="makes control tokens of text even with split_special_tokens"):
        tokenize(tokenizer, "the red <eos> stone", QUESTIONS, split_special_tokens=True)


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
    for chat_template in (None, CHAT_TEMPLATE):
        tokenizer = word_tokenizer(chat_template)
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


@pytest.mark.parametrize("data", ["Zoë\n", "\ufeffZoë\n", "Zoë\r\n", "Zoë\r"])
def test_a_document_is_read_as_utf8(tmp_path, data):
    (tmp_path / "text").write_bytes(data.encode())
    assert read_text(tmp_path / "text") == "Zoë\n"


@pytest.mark.parametrize(
    "text", ["PK is the mark of ZIP files", "{rtf}", "a %PDF-1.4 file", "%!TEX root", "<html>\x1b[1m"]
)
def test_text_that_looks_like_another_format_is_text(tmp_path, text):
    (tmp_path / "text").write_bytes(text.encode())
    assert read_text(tmp_path / "text") == text


def zipped() -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("word/document.xml", "<x/>")
    return raw.getvalue()


NO_TEXT = {
    "empty": (b"", "is empty"),
    "blank": (b" \n", "is empty"),
    "mark alone": (b"\xef\xbb\xbf", "is empty"),
    "utf-16": ("Zoë".encode("utf-16"), "is UTF-16, not UTF-8 text"),
    "half of utf-16": (b"\xff\xfe\x00", "not UTF-8 text"),
    "utf-32": ("Zoë".encode("utf-32"), "is UTF-32, not UTF-8 text"),
    "utf-16 without a mark": ("Who?".encode("utf-16-le"), "not UTF-8 text: it has zero bytes"),
    "latin-1": ("Zoë".encode("latin-1"), r"not UTF-8 text \(byte 2\)"),
    "pdf": (b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n", "is a PDF file, not text; convert it"),
    "pdf after a line": (b"\xef\xbb\xbf\r\n%PDF-1.4\n", "is a PDF file, not text"),
    "rtf": (rb"{\rtf1\ansi Who signed it?}", "is an RTF file, not text"),
    "postscript": (b"%!PS-Adobe-3.0\n(Who) show\n", "is a PostScript file, not text"),
    "docx": (zipped(), "is a ZIP archive"),
    "gzip": (gzip.compress(b"Who?"), "is a gzip archive"),
    "bzip2": (bz2.compress(b"Who?"), "is a bzip2 archive"),
    "xz": (lzma.compress(b"Who?"), "is an xz archive"),
    "program": (b"\x7fELF\x02\x01\x01", "is a program"),
    "zeros": (b"the red\0stone", "it has zero bytes"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_documents_that_are_none(tmp_path, name):
    """An all-ASCII PDF file was once answered about, with nonsense."""
    data, message = NO_TEXT[name]
    (tmp_path / "text").write_bytes(data)
    with pytest.raises(BadInput, match=message):
        read_text(tmp_path / "text")


def test_documents_that_cannot_be_read(tmp_path):
    with pytest.raises(BadInput, match="cannot read the document"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="cannot read the document"):
        read_text(tmp_path)


def test_questions_after_a_byte_order_mark(tmp_path):
    (tmp_path / "q.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "Who?"}\r\n')
    assert read_questions(tmp_path / "q.jsonl") == [Asked(question="Who?")]
    (tmp_path / "q.jsonl").write_bytes(zipped())
    with pytest.raises(BadInput, match=r"the file of questions .*q\.jsonl is a ZIP archive"):
        read_questions(tmp_path / "q.jsonl")


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


class Endless:
    """A tokenizer that must not be asked: its longest token has eight characters."""

    def get_vocab(self):
        return {"a": 0, "word four"[:8]: 1}

    def __call__(self, *texts, **options):
        pytest.fail("it was tokenised")


@pytest.mark.parametrize("text", ["word " * 40_000, "abcdefgh" * 10_000 + " a b" * 10_000])
def test_a_document_that_cannot_fit_is_not_tokenised(text):
    with pytest.raises(BadInput, match=r"characters, more than 1,000 tokens however they are cut"):
        require_room(Endless(), text, 1000)


@pytest.mark.parametrize(
    "text", ["word " * 6000, "w" * 10**6, " " * 10**6 + "a", "ab " * 999, "\n \t" * 9999 + "a " * 999]
)
def test_a_document_that_might_fit_is_let_through(text):
    """Long words may be unknown, each one token; spaces may be none at all."""
    require_room(Endless(), text, 1000)


def test_a_file_that_is_no_document_is_not_read(tmp_path):
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # takes no room on the disk
    for read in (read_text, read_questions):
        with pytest.raises(BadInput, match="is larger than 1024 MiB"):
            read(path)


HALF = "locker marble \ud800 robin"


def test_half_a_character_is_refused_before_the_tokenizer_sees_it(tmp_path):
    tokenizer = word_tokenizer()
    for text, questions in ((HALF, ["who?"]), ("locker apple " * 20, ["who?", HALF])):
        with pytest.raises(BadInput, match=r"holds half a character .*character 15"):
            tokenize(tokenizer, text, questions)
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
