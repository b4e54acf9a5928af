"""Names of tasks, and tasks from a user's own files."""

import json
import re
from pathlib import Path

import pytest
from families import tiny_model
from folders import word_tokenizer
from text_tokenizers import byte_tokenizer, spacing_tokenizer

from headwise.errors import BadInput
from headwise.evals.session import Session
from headwise.tasks.mini_ruler.suite import TASKS, generate
from headwise.tasks.mini_ruler.tasks import lexicon_for
from headwise.tasks.suites import SUITES, Sizes, make_tasks, parse_tasks
from headwise.tasks.task import Question

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
WORDS = "locker apple red stone. the key was under the old tower, near a river. "
MADE_HERE = pytest.mark.parametrize(
    "name",
    [
        "mini-ruler:vt",
        "ruler:niah_single_1",
    ],
)  # a task of every suite that needs no data


def made(text, **sizes):
    return make_tasks(parse_tasks(text), word_tokenizer(), Sizes(**{"samples": 3, "length": 160, **sizes}))


def test_a_suite_alone_is_all_of_its_tasks():
    assert parse_tasks("mini-ruler") == [("mini-ruler", name) for name in TASKS]
    assert len(parse_tasks("ruler")) == 13
    assert len(parse_tasks("longbench")) == 21
    assert len(parse_tasks("longbench-e")) == 13


def test_names_follow_their_suite_until_the_next():
    text = "mini-ruler:vt, cwe,ruler:vt,vt,file:a.jsonl,b.jsonl,mini-ruler:vt,perplexity:c.txt,"
    assert parse_tasks(text) == [
        ("mini-ruler", "vt"),
        ("mini-ruler", "cwe"),
        ("ruler", "vt"),
        ("file", "a.jsonl"),
        ("file", "b.jsonl"),
        ("perplexity", "c.txt"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no suite"),
        ("vt", "'vt' is no suite; choose mini-ruler, ruler"),
        ("mini-ruler:", "names no task"),
        ("mini-ruler:vt,nope", "unknown task 'nope' of mini-ruler; the tasks are niah_single"),
        ("file", "names no task"),
    ],
)
def test_names_that_are_none(text, message):
    with pytest.raises(BadInput, match=message):
        parse_tasks(text)


def test_every_suite_has_its_row_in_evaluation():
    section = PAGE.read_text().partition("\n## Tasks\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w[\w-]*)(?::MY\.\w+)?` \|", section, re.MULTILINE) == [*SUITES]


@MADE_HERE
def test_samples_come_from_their_seed(name):
    (task,), (same,), (other,) = (made(name, length=400, seed=seed) for seed in (0, 0, 1))
    assert (task.name, task.num_samples, task.length) == (name, 3, 400)
    assert task.sample(2) == same.sample(2)
    assert task.sample(2) not in (task.sample(1), other.sample(2))


@MADE_HERE
def test_samples_fit_and_fill_their_length(name):
    tokenizer, (task,) = word_tokenizer(), made(name, length=400)
    for sample in map(task.sample, range(3)):
        context, *questions = (
            len(tokenizer(text)["input_ids"]) for text in (sample.context, *(q.prompt for q in sample.questions))
        )
        assert 200 < context + max(questions) <= 400


@MADE_HERE
def test_a_right_answer_is_judged_right(name):
    (task,) = made(name, length=400)
    for question in task.sample(0).questions:
        assert task.judge(" ".join(question.answers), question) == 1
        assert task.judge("nothing", question) == 0


def test_mini_ruler_samples_are_those_of_the_evaluation_split():
    (task,) = made("mini-ruler:niah_multikey", seed=4)
    lexicon = lexicon_for(word_tokenizer())
    expected = generate("niah_multikey", lexicon=lexicon, length=160, seed=4, index=2, split="evaluation")
    sample = task.sample(2)
    assert (task.name, task.num_samples, task.length) == ("mini-ruler:niah_multikey", 3, 160)
    assert (sample.context, sample.max_new_tokens) == (expected.context, expected.max_new_tokens)
    assert [(q.prompt, q.answers) for q in sample.questions] == [(q.prompt, q.answers) for q in expected.questions]
    assert task.judge(" ".join(expected.questions[0].answers), sample.questions[0]) == 1
    assert task.judge("nothing", sample.questions[0]) == 0


# --- own documents ---


def test_own_documents(tmp_path):
    records = [
        {"context": WORDS, "question": "? who", "answers": ["the tower"], "metric": "f1", "max_new_tokens": 7},
        {"context": WORDS * 2, "questions": [{"question": "? a", "answers": ["b", "c"]}] * 2, "metric": "f1"},
    ]
    path = tmp_path / "my.jsonl"
    path.write_text("\n\n".join(map(json.dumps, records)) + "\n")
    (task,) = made(f"file:{path}")
    assert (task.name, task.num_samples) == ("file:my.jsonl", 2)
    first, second = task.sample(0), task.sample(1)
    assert (first.context, first.max_new_tokens, len(second.questions)) == (WORDS, 7, 2)
    assert first.questions == (Question(prompt="? who", answers=("the tower",)),)
    assert task.judge("The tower!", first.questions[0]) == 1
    assert task.judge("c or b or d", second.questions[0]) == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("not json", "line 1 is no JSON"),
        ([1], "line 1 has no context"),
        ({"question": "? a", "answers": ["b"]}, "line 1 has no context"),
        ({"context": WORDS, "question": "? a", "answers": []}, "at least one answer"),
        ({"context": WORDS, "question": "? a", "answers": [""]}, "at least one answer"),
        ({"context": WORDS, "question": " ", "answers": ["b"]}, "every question needs text"),
        ({"context": WORDS, "questions": []}, "has no questions"),
        ({"context": WORDS, "question": "? a", "answers": ["b"], "metric": "bleu"}, "choose contains, exact, f1"),
        ({"context": WORDS, "question": "? a", "answers": ["b"], "max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_documents_that_are_none(tmp_path, record, message):
    path = tmp_path / "my.jsonl"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    with pytest.raises(BadInput, match=message):
        made(f"file:{path}")


def test_documents_of_several_metrics(tmp_path):
    path, own = tmp_path / "my.jsonl", {"context": WORDS, "question": "? a", "answers": ["b"]}
    path.write_text("\n".join(json.dumps({**own, "metric": metric}) for metric in ("f1", "exact")))
    with pytest.raises(BadInput, match=r"several metrics \(exact, f1\)"):
        made(f"file:{path}")


def test_a_text_in_pieces_with_their_continuations(tmp_path):
    tokenizer, path = word_tokenizer(), tmp_path / "my.txt"
    path.write_text(WORDS * 20)
    (task,) = made(f"perplexity:{path}", length=65)
    number = len(tokenizer(WORDS * 20, add_special_tokens=False)["input_ids"])
    assert (task.name, task.num_samples, task.judge) == ("perplexity:my.txt", 3, None)
    samples = [task.sample(index) for index in range(3)]
    sizes = [
        [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (s.context, s.questions[0].prompt)]
        for s in samples
    ]
    assert sizes == [[56, 8]] * 3
    assert number // 64 > 3
    with pytest.raises(BadInput, match="makes no piece of 2000"):
        made(f"perplexity:{path}", length=2000)


LETTERS = "The harbour master was Ingrid. 港务长是英格丽德。港务长是英格丽德。  Who was it?\n" * 5


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), byte_tokenizer(closes=True), spacing_tokenizer("llama")])
def test_pieces_have_the_tokens_of_the_text(tmp_path, tokenizer):
    """Pieces were once decoded and read again: a letter that was cut became others, and every piece got a space."""
    (tmp_path / "my.txt").write_text(LETTERS, encoding="utf-8")
    sizes = Sizes(samples=99, length=50, seed=0)
    (task,) = make_tasks(parse_tasks(f"perplexity:{tmp_path}/my.txt"), tokenizer, sizes)
    session = Session(model=tiny_model("llama", vocab_size=len(tokenizer)), tokenizer=tokenizer)
    samples = [task.sample(index) for index in range(task.num_samples)]
    parts = [tokens for sample in samples for tokens in session.tokens(sample)]
    assert {(part.context.shape[1], *map(len, part.questions)) for part in parts} == {(44, 6)}
    assert {part.context[0, 0].item() for part in parts} == {tokenizer.bos_token_id}
    found = [token for part in parts for token in [*part.context[0, 1:].tolist(), *part.questions[0].tolist()]]
    expected = tokenizer(LETTERS, add_special_tokens=False)["input_ids"]
    assert found == expected[: len(found)]
    assert len(expected) - len(found) < 49
    shown = [(sample.context, sample.questions[0].prompt) for sample in samples]
    read_again = [tokenizer(text, add_special_tokens=False)["input_ids"] for texts in shown for text in texts]
    assert [token for ids in read_again for token in ids] != found  # the texts would not do


def test_a_text_that_goes_on_cannot_be_query_aware(tmp_path):
    """Once its end was compressed with it, and nothing was measured."""
    (tmp_path / "my.txt").write_text(LETTERS, encoding="utf-8")
    sizes = Sizes(samples=1, length=50, seed=0)
    (task,) = make_tasks(parse_tasks(f"perplexity:{tmp_path}/my.txt"), byte_tokenizer(), sizes)
    session = Session(model=tiny_model("llama"), tokenizer=byte_tokenizer(), query_aware=True)
    with pytest.raises(BadInput, match="has no question"):
        session.tokens(task.sample(0))
