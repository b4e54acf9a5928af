"""Natural texts: cut where one would cut, asked about what is in them, and apart from what evaluates."""

import ast
import json
import re
from pathlib import Path
from random import Random

import pytest

import headwise
from headwise.offline.texts import words
from headwise.offline.texts.cutting import FOLLOWING, passage, sentence_spans
from headwise.offline.texts.mix import ORDER, natural
from headwise.offline.texts.questions import about_code, about_text, looks_like_code
from headwise.offline.texts.sources import SPAN
from headwise.tasks.mini_ruler.lexicon import REFERENCE_VOCABULARY
from headwise.tasks.ruler.sources import load_words

LENGTHS = (300, 600)
_TOKEN = re.compile(r"\w{1,6}|[^\w\s]|\s")
NAMED = re.compile(r"(?:begins with|starts like this|means|the next one): (.+) \.\.\.$", re.DOTALL)
RULER = [
    "special magic",
    "hidden within the following text",
    "I will quiz you",
    "mentioned in the provided text",
    "The grass is green",
    "Memorize and track",
    "chain(s) of variable",
    "are assigned the value",
    "Below is a numbered list",
    "appear more often than others",
    "most common words in the above list",
    "coded text",
    "frequently appeared",
    "Answer the question based on the given documents",
    "VAR ",
]
CHINESE = "老船长把钥匙放在灯塔的第三级台阶下面。年轻的管理员每天早上都去那里看一看。有一天钥匙不见了。"
THAI = "เรือลำหนึ่งแล่นเข้ามาในท่าเรือตอนเช้ามืด\nชาวประมงสามคนยืนรออยู่บนฝั่งด้วยความเงียบ\nไม่มีใครพูดถึงพายุเมื่อคืนนี้เลยแม้แต่คำเดียว\n"


def count(text):
    """As a tokenizer of short pieces of words counts."""
    return len(_TOKEN.findall(text))


def mix(number=22, split="calibration", seed=0, lengths=LENGTHS):
    return natural(count, number, lengths, seed, split)


@pytest.fixture(scope="module")
def made():
    return mix(len(ORDER) * 3)


def spans(texts):
    found = (re.findall(r"\w+", text) for text in texts)
    return {tuple(those[at : at + SPAN]) for those in found for at in range(len(those) - SPAN + 1)}


# --- the mix ---


def test_it_is_the_same_every_time_and_longer_ones_begin_alike(made):
    assert mix() == made[: len(ORDER) * 2]
    assert mix(4) == made[:4]
    assert [example.domain for example in made[: len(ORDER)]] == list(ORDER)
    other = mix(len(ORDER), seed=1)
    assert all(a.context != b.context for a, b in zip(other, made, strict=False))
    assert len({example.context for example in made}) == len(made)


def test_contexts_are_as_long_as_asked_and_something_follows(made):
    for number, example in enumerate(made):
        length = LENGTHS[number % 2]
        assert length * 0.6 < count(example.context) <= length
        assert FOLLOWING * 0.25 < count(example.following) <= FOLLOWING
        assert 5 <= len(example.questions) <= 12
        assert len(set(example.questions)) == len(example.questions)


@pytest.mark.slow
def test_splits_share_no_eight_words_of_prose_or_code():
    calibration, train = (
        spans(e.context + e.following for e in mix(len(ORDER) * 4, split) if e.domain in ("prose", "code"))
        for split in ("calibration", "train")
    )
    assert min(len(calibration), len(train)) > 1000
    assert not calibration & train


def test_splits_share_no_record_and_no_conversation():
    made = [{e.context for e in mix(split=split)} for split in ("calibration", "train")]
    lines = [
        {line for text in texts for line in text.split("\n") if re.search(r"[A-Z]{2}-\d{4}", line)} for texts in made
    ]
    assert min(map(len, lines)) > 30
    assert not lines[0] & lines[1]


def test_nothing_is_worded_as_ruler_words_it(made):
    ruler = Path(headwise.__file__).parent / "tasks" / "ruler"
    sources = "".join((ruler / f"{name}.py").read_text() for name in ("needles", "lists", "documents", "sources"))
    for example in [*made, *mix(split="train")]:
        for text in (example.context, example.following, *example.questions):
            assert not [wording for wording in RULER if wording in text]
    assert [wording for wording in RULER if wording not in sources] == []


def test_no_word_is_in_the_lists_of_an_evaluation():
    bundled = load_words()
    taken = {*bundled.adjectives, *bundled.nouns, *REFERENCE_VOCABULARY}
    for name in ("FIRST", "LAST", "TOWNS", "PRODUCTS", "GOODS", "TEAMS", "TRADES", "STATES"):
        assert not {word.lower() for word in getattr(words, name)} & taken, name


def test_the_package_imports_nothing_of_evaluations():
    for path in (Path(headwise.__file__).parent / "offline" / "texts").glob("*.py"):
        imported = [
            node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        ]
        assert not [name for name in imported if name.startswith(("headwise.evals", "headwise.tasks"))]


def test_questions_name_what_the_context_holds(made):
    checked = 0
    for example in made:
        for question in example.questions:
            named = NAMED.search(question) if example.domain == "prose" else None
            codes = re.findall(r"\b[A-Z]{2}-\d{4}\b", question) if example.domain in ("table", "records") else []
            for part in [named[1]] if named else codes:
                assert part in example.context
                checked += 1
            if named:
                assert example.context.count(named[1]) == 1
    assert checked > 50


def test_json_records_are_records(made):
    checked = 0
    for example in [*made, *mix(len(ORDER) * 2, "train")]:
        if example.domain == "records" and example.context.startswith("["):
            if example.context.startswith("[\n"):
                assert all(isinstance(record, dict) for record in json.loads(f"{example.context}\n]"))
                checked += 1
        elif example.domain == "records" and example.context.startswith("{"):
            assert all(isinstance(json.loads(line), dict) for line in example.context.split("\n"))
            checked += 1
    assert checked


def test_what_follows_a_table_is_its_next_rows(made):
    for example in (e for e in made if e.domain == "table"):
        rows = (example.context + example.following).split("\n")
        marks = {row.count("|") or max(row.count(mark) for mark in ",;\t") for row in rows}
        assert len(marks) == 1 or rows[1].startswith("|---")
        assert example.following.startswith("\n")


# --- cutting ---


def test_what_follows_is_what_follows_in_the_source():
    text = "\n\n".join(f"Paragraph {n} of a text. It goes on for a while, as paragraphs do." for n in range(60))
    context, following = passage(text, count, 200)
    assert text.startswith(context + following)
    assert context.endswith("do.") and following.startswith("\n\nParagraph")
    assert following.endswith("do.")


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("One sentence here, and not short. Another one here. " * 40, "."),
        ("word " * 500, "word"),
        ("x" * 3000, "x"),
        ("first line of it\n" * 100, "it"),
    ],
)
def test_a_text_is_cut_at_the_largest_part_that_leaves_little_empty(text, end):
    context, following = passage(text, count, 100)
    assert 75 <= count(context) <= 100
    assert context.endswith(end)
    assert text.startswith(context + following)


def test_a_text_that_is_used_up_ends_earlier_so_that_something_follows():
    text = "A short sentence stands here. " * 10
    context, following = passage(text, count, 1000)
    assert count(context) < count(text)
    assert following.strip()


def test_sentences_end_where_they_do():
    text = "Mrs. Jones met J. Smith. Was it e.g. late? “Yes!” he said.\n\nA heading\n\n今天下雨。明天再看。"
    found = [text[start:end] for start, end in sentence_spans(text)]
    assert found == [
        "Mrs. Jones met J. Smith.",
        "Was it e.g. late?",
        "“Yes!” he said.",
        "A heading",
        "今天下雨。",
        "明天再看。",
    ]


# --- questions for any text ---


@pytest.mark.parametrize("text", [CHINESE + "海鸥在屋顶上叫个不停。" + "风从北方吹来带着盐的味道。", THAI])
def test_scripts_without_spaces_are_asked_about_by_their_first_letters(text):
    named = [NAMED.search(question) for question in about_text(text, Random(0))]
    found = [match[1] for match in named if match]
    assert found
    assert all(text.count(part) == 1 for part in found)


def test_a_text_that_says_the_same_everywhere_is_asked_about_as_a_whole_only():
    questions = about_text("The same words stand here again. " * 20, Random(0))
    assert questions
    assert not [question for question in questions if NAMED.search(question)]


def test_code_is_told_from_prose_and_asked_about_by_name_and_line():
    source = Path(about_code.__code__.co_filename).read_text()
    assert looks_like_code(source)
    assert looks_like_code("int main(void) {\n  int x = 3;\n  return x;\n}\n")
    assert not looks_like_code("The door opened, and nobody came in.\nHe waited; it was late.\n" * 5)
    questions = about_code(source, Random(3))
    lines = [found[1] for q in questions if (found := re.search(r"(?:this one:|for\?) (.+)$", q))]
    names = [found[1] for q in questions if (found := re.search(r"`(\w+)`", q))]
    assert lines
    assert all(source.count(line) >= 1 for line in lines)
    assert all(re.search(rf"(?:def|class) {name}\b", source) for name in names)
