"""LongBench against its own data, its own configuration and the official definitions, written out once more here."""

import difflib
import io
import json
import re
import string
import sys
import tarfile
import warnings
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jieba
import pytest
from families import tiny_model
from folders import CHAT_TEMPLATE, word_tokenizer
from rouge import Rouge
from text_tokenizers import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from headwise.errors import BadInput
from headwise.evals.run import Evaluation, evaluate
from headwise.methods.keep import parse_keep
from headwise.models.loading import reference_path
from headwise.tasks.longbench import data as longbench_data
from headwise.tasks.longbench import metrics as longbench_metrics
from headwise.tasks.longbench.data import Row
from headwise.tasks.longbench.metrics import METRICS
from headwise.tasks.longbench.suite import (
    LONGBENCH_E_NAMES,
    LONGBENCH_TASKS,
    cut_middle,
    length_group,
    load_rows,
    longbench_tasks,
    render,
)
from headwise.tasks.task import Question

ARCHIVE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "longbench_en.tar.xz"

QA = ["narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"]
METRIC_OF = {
    **dict.fromkeys(QA, "qa_f1"),
    "multifieldqa_zh": "qa_f1_zh",
    **dict.fromkeys(["gov_report", "qmsum", "multi_news", "samsum"], "rouge"),
    **dict.fromkeys(["dureader", "vcsum"], "rouge_zh"),
    **dict.fromkeys(["trec", "lsht"], "classification"),
    "passage_retrieval_en": "retrieval",
    "passage_retrieval_zh": "retrieval_zh",
    "passage_count": "count",
    **dict.fromkeys(["lcc", "repobench-p"], "code_sim"),
}
NO_CHAT = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}
NOT_IN_E = {"narrativeqa", "multifieldqa_zh", "musique", "dureader", "qmsum", "vcsum", "lsht", "passage_retrieval_zh"}

ROW = {
    "input": "Who?",
    "context": "It was Ada.",
    "answers": ["Ada", "Ada Lovelace"],
    "length": 5,
    "dataset": "qasper",
    "language": "en",
    "all_classes": None,
    "_id": "1",
}


# --- the official definitions, in other words ------------------------------------------------------------------------


def f1_of(mine: list[str], right: list[str]) -> float:
    shared = sum(min(mine.count(word), right.count(word)) for word in set(mine))
    return 2 * shared / (len(mine) + len(right)) if shared else 0.0


def squad_words(text: str) -> list[str]:
    for mark in string.punctuation:
        text = text.replace(mark, "")
    words = re.sub(r"\ban?\b|\bthe\b", " ", text.lower())
    return words.split()


def chinese_words(text: str) -> list[str]:
    marks = set(string.punctuation + "，。？！：；、“”‘’（）【】》「」『』—…～％－／")  # noqa: RUF001
    words = ["".join(c for c in word.lower() if c not in marks and not c.isspace()) for word in jieba.cut(text)]
    return [word for word in words if word]


def rouge_l(mine: str, right: str) -> float:
    try:
        return Rouge().get_scores([mine], [right], avg=True)["rouge-l"]["f"]
    except ValueError:
        return 0.0


def named_class(mine: str, right: str, classes: tuple[str, ...]) -> float:
    named = [label for label in classes if label in mine]
    for label in named:  # the official loop: it takes out of the list that it walks along
        if label in right and label != right:
            named.remove(label)
    return 1 / len(named) if right in named else 0.0


def share_of_numbers(mine: str, right: str) -> float:
    numbers = re.findall("[0-9]+", mine)
    return Counter(numbers)[right] / max(1, len(numbers))


def first_code_line(mine: str, right: str) -> float:
    while mine.startswith("\n"):
        mine = mine[1:]
    line = ([line for line in mine.split("\n") if not re.search("[`#]|//", line)] or [""])[0]
    if line == right:
        return 1.0
    same = sum(size for *_, size in difflib.SequenceMatcher(None, line, right).get_matching_blocks())
    return round(100 * 2 * same / (len(line) + len(right))) / 100 if line and right else 0.0


ORACLES = {
    "qa_f1": lambda mine, right, _: f1_of(squad_words(mine), squad_words(right)),
    "qa_f1_zh": lambda mine, right, _: f1_of(chinese_words(mine), chinese_words(right)),
    "rouge": lambda mine, right, _: rouge_l(mine, right),
    "rouge_zh": lambda mine, right, _: rouge_l(" ".join(jieba.cut(mine)), " ".join(jieba.cut(right))),
    "classification": named_class,
    "retrieval": lambda mine, right, _: share_of_numbers(mine, right.removeprefix("Paragraph ")),
    "retrieval_zh": lambda mine, right, _: share_of_numbers(mine, right.removeprefix("段落")),
    "count": lambda mine, right, _: share_of_numbers(mine, right),
    "code_sim": lambda mine, right, _: first_code_line(mine, right),
}


def official_score(name: str, mine: str, question: Question) -> float:
    if name in FIRST_LINE:
        mine = mine.lstrip("\n").partition("\n")[0]
    return max(ORACLES[METRIC_OF[name]](mine, right, question.classes) for right in question.answers)


def official_cut(tokenizer, text: str, limit: int) -> str:
    ids = tokenizer(text)["input_ids"]
    if len(ids) > limit:
        half = int(limit / 2)
        text = tokenizer.decode(ids[:half], skip_special_tokens=True)
        text += tokenizer.decode(ids[-half:], skip_special_tokens=True)
    return text


# --- what the tests share --------------------------------------------------------------------------------------------


class Endless:
    """A tokenizer to which every text is one token: nothing is ever cut."""

    chat_template = None

    def __call__(self, text, **options):
        return {"input_ids": [0]}


@pytest.fixture(scope="session")
def longbench(tmp_path_factory):
    """Folder of real rows and the official configuration."""
    if not ARCHIVE.is_file():
        pytest.skip(f"LongBench's data is not at {ARCHIVE}")
    root = tmp_path_factory.mktemp("longbench")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root, filter="data")
    return root / "longbench_en"


@pytest.fixture(scope="session")
def rows(longbench):
    """The first real rows of every dataset, as they are in the file."""
    found: dict[str, list[dict]] = {}
    for line in (longbench / "mini237_from_MiniLongBench.jsonl").read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            found.setdefault(row["dataset"], []).append(row)
    return {name: those[:4] for name, those in found.items()}


@pytest.fixture(scope="session")
def bpe(rows):
    """A byte-level BPE tokenizer of English, Chinese and code that marks the start of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((those[0]["context"][:20_000] for those in rows.values()), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def uncut(longbench):
    """Every dataset's task, with whole prompts."""
    made = longbench_tasks(
        list(LONGBENCH_TASKS), tokenizer=Endless(), length=4096, num_samples=None, data_dir=longbench
    )
    return {task.name.removeprefix("longbench:"): task for task in made}


def one_task(name: str, folder: Path, *, tokenizer=None, length: int = 4096, num_samples: int | None = None):
    options = {"tokenizer": tokenizer or Endless(), "length": length, "num_samples": num_samples}
    return longbench_tasks([name], **options, data_dir=folder)[0]


def write(path: Path, *rows: dict | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# --- the table of datasets -------------------------------------------------------------------------------------------


def test_names_lengths_and_prompts_are_the_official_ones(longbench):
    lengths = json.loads((longbench / "config" / "dataset2maxlen.json").read_text(encoding="utf-8"))
    prompts = json.loads((longbench / "config" / "dataset2prompt.json").read_text(encoding="utf-8"))
    assert {name: dataset.max_new_tokens for name, dataset in LONGBENCH_TASKS.items()} == lengths
    row = Row(input="{context}<in>", context="<con{input}text>", answers=("",), words=1)  # braces stay as they are
    for name, prompt in prompts.items():
        assert "".join(render(name, row)) == prompt.format(input=row.input, context=row.context)
        if f"{name}_e" in LONGBENCH_E_NAMES:
            assert render(f"{name}_e", row) == render(name, row)


def test_metrics_chat_templates_and_first_lines_are_the_official_ones():
    assert {name: dataset.metric for name, dataset in LONGBENCH_TASKS.items()} == METRIC_OF
    assert set(METRIC_OF.values()) == set(METRICS)
    assert {name for name, dataset in LONGBENCH_TASKS.items() if not dataset.chat} == NO_CHAT
    assert {name for name, dataset in LONGBENCH_TASKS.items() if dataset.first_line} == FIRST_LINE
    assert {f"{name}_e" for name in LONGBENCH_TASKS if name not in NOT_IN_E} == set(LONGBENCH_E_NAMES)
    assert (len(LONGBENCH_TASKS), len(LONGBENCH_E_NAMES)) == (21, 13)


def test_an_unknown_dataset_is_refused(tmp_path):
    for name in ("qaspr", "musique_e", "lsht_e"):
        with pytest.raises(BadInput, match=f"no dataset '{name}'; it has narrativeqa, .*qasper_e"):
            one_task(name, tmp_path)


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LONGBENCH_TASKS)
def test_a_real_row_is_rendered_as_the_official_prompt(name, longbench, rows, uncut):
    template = json.loads((longbench / "config" / "dataset2prompt.json").read_text(encoding="utf-8"))[name]
    if name == "multi_news":  # has a file of its own, which comes before any file of mixed rows
        with (longbench / "multi_news.jsonl").open(encoding="utf-8") as file:
            row = json.loads(next(file))
    else:
        row = rows[name][0]
    sample = uncut[name].sample(0)
    (question,) = sample.questions
    assert sample.context + question.prompt == template.format(**row)
    assert sample.context.endswith(row["context"])
    assert question.prompt.strip()
    assert question.prompt.startswith(template.partition("{context}")[2].partition("{input}")[0])
    assert (question.answers, question.classes) == (tuple(row["answers"]), tuple(row["all_classes"] or ()))
    assert (sample.verbatim, sample.chat) == (True, name not in NO_CHAT)
    assert sample.max_new_tokens == LONGBENCH_TASKS[name].max_new_tokens


def test_a_few_shot_row_without_input_is_refused(tmp_path):
    write(tmp_path / "trec.jsonl", {**ROW, "input": " ", "all_classes": ["Ada"]})
    with pytest.raises(BadInput, match="a row of trec asks nothing"):
        one_task("trec", tmp_path).sample(0)


# --- metrics ---------------------------------------------------------------------------------------------------------


def predictions(answer: str, other: str, classes: tuple[str, ...]) -> list[str]:
    """Right, wrong and half-right answers, in the shapes that models give them."""
    return [
        answer,
        answer[: len(answer) // 2],
        f"The answer is: {answer}.",
        f"\n\n{answer}\nQuestion: {other}",
        f"    {answer}  \n",
        f" \n{answer}",
        f"{other} {answer}",
        f"“{answer.upper()}”，an {answer}!!",  # noqa: RUF001
        f"```python\n# so\n{answer}\n```",
        f"Paragraph 7, {answer}, 1 段落7",
        " ".join(classes[:3]),
        other,
        "",
        " ",
        "...",
    ]


@pytest.mark.parametrize("name", [name for name in LONGBENCH_TASKS if METRIC_OF[name] not in ("rouge", "rouge_zh")])
def test_scores_of_real_answers_are_the_official_ones(name, uncut):
    task, scores = uncut[name], []
    questions = [task.sample(index).questions[0] for index in range(min(4, task.num_samples))]
    for question, other in zip(questions, questions[1:] + questions[:1], strict=True):
        for text in predictions(question.answers[-1], other.answers[0], question.classes):
            scores.append(task.judge(text, question))
            assert scores[-1] == pytest.approx(official_score(name, text, question), abs=1e-12), text
    assert max(scores) == 1
    assert min(scores) == 0


@pytest.mark.parametrize("name", ["gov_report", "qmsum", "samsum", "dureader", "vcsum"])
def test_rouge_of_real_answers_is_the_official_one(name, uncut):
    """Of few and shortened ones: the library takes its time."""
    question = uncut[name].sample(0).questions[0]
    answers = tuple(answer[:300] for answer in question.answers)
    question = Question(prompt=question.prompt, answers=answers)
    for text in predictions(answers[-1], "Something else.", ()):
        assert uncut[name].judge(text, question) == pytest.approx(official_score(name, text, question), abs=1e-12)
    assert uncut[name].judge(answers[0], question) == pytest.approx(1, abs=1e-6)
    assert uncut[name].judge("", question) == 0


@pytest.mark.parametrize(
    ("metric", "prediction", "answer", "score"),
    [
        ("qa_f1", "The  Cat, sat!", "a cat", 2 / 3),  # precision 1/2, recall 1
        ("qa_f1", "an answer", "the answer", 1),
        ("qa_f1", "dogs", "cat", 0),
        ("qa_f1", "", "cat", 0),
        ("qa_f1", "The", "cat", 0),
        ("qa_f1", "cat cat cat", "cat cat dog", 2 / 3),  # as often as in both
        ("qa_f1_zh", "北京，大学。", "北京", 2 / 3),  # noqa: RUF001
        ("qa_f1_zh", "", "北京", 0),
        ("rouge", "the cat sat", "the cat ran", 2 / 3),
        ("rouge", "a b", "a b c d", 2 / 3),
        ("rouge", "d c b a", "a b c d", 1 / 4),  # the order counts
        ("rouge", "", "a b", 0),  # the library calls these errors
        ("rouge", "...", "a b", 0),
        ("rouge", "a b", "a " + "b " * 1200, 0),  # and so this, in which it calls itself too often
        ("rouge_zh", "北京大学", "北京大学", 1),
        ("count", "There are 7 of 12, so 7", "7", 2 / 3),
        ("count", "none", "7", 0),
        ("count", "17", "7", 0),
        ("retrieval", "Paragraph 7", "Paragraph 7", 1),
        ("retrieval", "7 or 8", "Paragraph 7", 1 / 2),
        ("retrieval", "Paragraph seven", "Paragraph 7", 0),
        ("retrieval_zh", "段落7", "段落7", 1),
        ("retrieval_zh", "段落 17", "段落7", 0),
        ("code_sim", "abcd", "abce", 0.75),
        ("code_sim", "\n\n# abcd\n// abcd\n`abcd`\nabcd\nabce", "abce", 0.75),
        ("code_sim", "\n \nabcd", "abcd", 0),  # a line of spaces is a line of code
        ("code_sim", "# abcd", "abcd", 0),
        ("code_sim", "abc", "abd", 0.67),  # whole hundredths
        ("code_sim", "", "abcd", 0),
    ],
)
def test_scores_computed_by_hand(metric, prediction, answer, score):
    assert METRICS[metric](prediction, answer, ()) == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Food", "Food", 1),
        ("Food and Date", "Food", 1 / 2),
        ("Date", "Food", 0),
        ("", "Food", 0),
        ("food", "Food", 0),
        ("Sea Food", "Sea Food", 1),  # Food is a part of the answer's name
        ("Sea Food", "Food", 1 / 2),
        ("Big Sea Food", "Big Sea Food", 1 / 2),  # the second part right after a first is overlooked
    ],
)
def test_classes_named_in_an_answer(prediction, answer, score):
    classes = ("Date", "Food", "Sea Food", "Big Sea Food")
    assert METRICS["classification"](prediction, answer, classes) == score == named_class(prediction, answer, classes)


def test_the_best_of_several_answers_counts(tmp_path):
    write(tmp_path / "qasper.jsonl", ROW)
    task = one_task("qasper", tmp_path)
    question = task.sample(0).questions[0]
    assert task.judge("Ada Lovelace", question) == 1
    assert task.judge("Ada", question) == 1
    assert task.judge("Lovelace", question) == pytest.approx(2 / 3)


def test_only_few_shot_answers_end_with_their_first_line(tmp_path):
    for name in ("triviaqa", "hotpotqa"):
        write(tmp_path / f"{name}.jsonl", ROW)
        task = one_task(name, tmp_path)
        right = task.judge("\n\nAda\nPassage: Zoë", task.sample(0).questions[0])
        assert right == (1 if name == "triviaqa" else pytest.approx(1 / 2))


def test_code_similarity_is_that_of_fuzzywuzzy(rows):
    """As the official requirements install it: without python-Levenshtein, which rounds and counts otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz = pytest.importorskip("fuzzywuzzy.fuzz")
    if fuzz.SequenceMatcher is not difflib.SequenceMatcher:
        pytest.skip("python-Levenshtein is installed")
    for row in rows["lcc"] + rows["repobench-p"]:
        answer = row["answers"][0]
        for line in [answer, *row["context"].split("\n")[:50]]:
            if not re.search("[`#]|//", line):
                assert METRICS["code_sim"](line, answer, ()) == fuzz.ratio(line, answer) / 100


def test_an_answer_that_names_no_paragraph_is_refused():
    with pytest.raises(BadInput, match="'7' names no paragraph"):
        METRICS["retrieval"]("7", "7", ())


@pytest.mark.parametrize(("name", "library"), [("samsum", "rouge"), ("vcsum", "jieba"), ("multifieldqa_zh", "jieba")])
def test_a_missing_library_is_named_at_once(name, library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    longbench_metrics._load.cache_clear()
    with pytest.raises(BadInput, match=rf"needs the library {library}.*pip install 'headwise\[eval\]'"):
        one_task(name, tmp_path)
    longbench_metrics._load.cache_clear()
    write(tmp_path / "qasper.jsonl", ROW)
    assert one_task("qasper", tmp_path).num_samples == 1  # needs none


# --- cutting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LONGBENCH_TASKS)
def test_long_prompts_are_cut_by_the_official_rule(name, rows, bpe):
    row = rows[name][-1]
    parsed = Row(input=row["input"], context=row["context"][:8_000], answers=("",), words=1)
    whole = "".join(render(name, parsed))
    room = len(bpe(render(name, parsed)[1])["input_ids"])
    for limit in (2 * room + 20, 2 * room + 301):
        context, prompt = cut_middle(bpe, *render(name, parsed), num_tokens=limit)
        assert context + prompt == official_cut(bpe, whole, limit)
        assert prompt == render(name, parsed)[1]
    assert cut_middle(bpe, *render(name, parsed), num_tokens=10**6) == render(name, parsed)


def test_a_task_leaves_room_for_template_and_answer(tmp_path, bpe):
    write(tmp_path / "qasper.jsonl", {**ROW, "context": "the red stone " * 500})
    write(tmp_path / "lcc.jsonl", {**ROW, "context": "the red stone " * 500})
    chatty = PreTrainedTokenizerFast(
        tokenizer_object=bpe.backend_tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    around = chatty.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True, tokenize=False)
    cost = len(chatty(around, add_special_tokens=False)["input_ids"])
    for name, tokenizer, taken in [("qasper", bpe, 0), ("qasper", chatty, cost), ("lcc", chatty, 0)]:
        sample = one_task(name, tmp_path, tokenizer=tokenizer, length=700).sample(0)
        text = sample.context + sample.questions[0].prompt
        room = 700 - sample.max_new_tokens - taken
        assert text == official_cut(bpe, "".join(render(name, load_rows(name, tmp_path)[0])), room)
        assert room - 5 <= len(bpe(text)["input_ids"]) <= room + 5


def test_a_question_that_does_not_fit_is_refused(tmp_path, bpe):
    write(tmp_path / "qasper.jsonl", {**ROW, "context": "the red stone " * 500})
    with pytest.raises(BadInput, match=r"the length is too short: .* the last 20 are kept.*; add \d+ or more"):
        one_task("qasper", tmp_path, tokenizer=bpe, length=168).sample(0)
    with pytest.raises(BadInput, match="length 129 is too short for qasper: its answer takes 128"):
        one_task("qasper", tmp_path, tokenizer=bpe, length=129)


def test_the_length_a_refusal_asks_for_is_enough(bpe):
    context, prompt = "the red stone " * 500, "\n\nNow, which stone was it that the report spoke of?"
    with pytest.raises(BadInput, match="too short") as refusal:
        cut_middle(bpe, context, prompt, num_tokens=10)
    asked = int(re.search(r"add (\d+) or more", str(refusal.value))[1])
    assert cut_middle(bpe, context, prompt, num_tokens=10 + asked)[1] == prompt


@pytest.mark.parametrize("kind", ["reference", "words"])
def test_a_tokenizer_that_loses_spaces_still_asks_the_question(kind):
    """The bundled model's gives back no line ends and no spaces before marks: the prompt is not found as it was."""
    tokenizer = AutoTokenizer.from_pretrained(reference_path()) if kind == "reference" else word_tokenizer()
    context, prompt = "the red stone . " * 500, "\n\nthe blue stone , the locker ?\nthe lantern :"
    cut, asked = cut_middle(tokenizer, context, prompt, num_tokens=100)
    assert cut + asked == official_cut(tokenizer, context + prompt, 100)
    same = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, prompt)]
    assert same[0] == same[1]


def test_special_tokens_are_no_part_of_a_cut_text(bpe):
    context, prompt = cut_middle(bpe, "the red stone " * 500, "\n\nwhich?", num_tokens=100)
    assert "<s>" not in context + prompt


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_come_from_a_file_of_their_own_or_from_mixed_ones(tmp_path):
    rows = [{**ROW, "input": str(n)} for n in range(6)]
    write(tmp_path / "b.jsonl", {**rows[1], "dataset": "musique"}, rows[2], "", rows[3])
    write(tmp_path / "a.jsonl", rows[0], {**ROW, "dataset": ["qasper"]})
    write(tmp_path / "other.txt", "no row")
    assert [row.input for row in load_rows("qasper", tmp_path)] == ["0", "2", "3"]
    assert [row.input for row in load_rows("musique", tmp_path)] == ["1"]
    write(tmp_path / "qasper.jsonl", rows[4], {"dataset": "whatever", **rows[5]})
    assert [row.input for row in load_rows("qasper", tmp_path)] == ["4", "5"]  # the same rows twice would count twice
    task = one_task("qasper", tmp_path, num_samples=1)
    assert (task.name, task.num_samples, task.length) == ("longbench:qasper", 1, 4096)
    assert one_task("qasper", tmp_path, num_samples=9).num_samples == 2


def test_tasks_are_in_the_order_asked_for_and_once(tmp_path):
    for name in ("lcc", "qasper", "musique"):
        write(tmp_path / f"{name}.jsonl", ROW)
    names = ["qasper", "lcc", "qasper", "musique"]
    made = longbench_tasks(names, tokenizer=Endless(), length=999, num_samples=None, data_dir=tmp_path)
    assert [task.name for task in made] == ["longbench:qasper", "longbench:lcc", "longbench:musique"]


def test_the_e_variant_has_its_own_rows_and_groups(tmp_path):
    """Its rows may bear the name of the dataset without _e."""
    sizes = [3999, 4000, 7999, 8000, 20000]
    write(tmp_path / "qasper.jsonl", ROW)
    write(tmp_path / "qasper_e.jsonl", *({**ROW, "length": size} for size in sizes))
    assert [row.words for row in load_rows("qasper", tmp_path)] == [5]
    rows = load_rows("qasper_e", tmp_path)
    assert [length_group(row.words) for row in rows] == ["0-4k", "4-8k", "4-8k", "8k+", "8k+"]
    plain, extended = (one_task(name, tmp_path) for name in ("qasper", "qasper_e"))
    assert (extended.name, extended.num_samples) == ("longbench:qasper_e", 5)
    assert extended.sample(0) == plain.sample(0)
    write(tmp_path / "mixed.jsonl", {**ROW, "dataset": "lcc_e"})
    assert one_task("lcc_e", tmp_path).num_samples == 1
    with pytest.raises(BadInput, match="no rows of lcc"):
        one_task("lcc", tmp_path)
    (tmp_path / "qasper.jsonl").unlink()
    with pytest.raises(BadInput, match="no rows of qasper"):  # and does not fall back to those of LongBench-E
        one_task("qasper", tmp_path)


def test_real_rows_of_all_datasets_are_found(uncut, longbench):
    assert {name: uncut[name].num_samples for name in ("multi_news", "narrativeqa", "qmsum", "lcc")} == {
        "multi_news": 200,
        "narrativeqa": 26,
        "qmsum": 278,
        "lcc": 26,
    }
    last = uncut["lcc"].num_samples - 1
    assert uncut["lcc"].sample(last).context.endswith(load_rows("lcc", longbench)[last].context)


def test_missing_rows_say_what_to_put_where(tmp_path):
    with pytest.raises(BadInput, match=rf"{tmp_path} has no rows of qasper\. Put qasper\.jsonl there, out of https://"):
        one_task("qasper", tmp_path)
    write(tmp_path / "qasper.jsonl", "")
    with pytest.raises(BadInput, match="no rows of qasper"):
        one_task("qasper", tmp_path)
    with pytest.raises(BadInput, match=r"no folder .*nowhere.*; unpack https://"):
        one_task("qasper", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": ', "is damaged: "),
        ("[1]", "is no row; a row reads"),
        (json.dumps({**ROW, "answers": []}), "is no row of qasper"),
        (json.dumps({**ROW, "answers": "Ada"}), "is no row of qasper"),
        (json.dumps({**ROW, "answers": [1]}), "is no row of qasper"),
        (json.dumps({**ROW, "context": " "}), "is no row of qasper"),
        (json.dumps({**ROW, "length": "5"}), "is no row of qasper"),
        (json.dumps({**ROW, "all_classes": "Food"}), "is no row of qasper"),
        (json.dumps({key: ROW[key] for key in ROW if key != "input"}), "is no row of qasper"),
    ],
)
@pytest.mark.parametrize("file", ["qasper.jsonl", "mixed.jsonl"])
def test_a_damaged_line_is_named_before_any_sample(file, line, message, tmp_path):
    if file == "mixed.jsonl" and '"dataset"' not in line and message.startswith("is no row of"):
        pytest.skip("a row without its dataset is nobody's")
    write(tmp_path / file, ROW, "", line, ROW)
    with pytest.raises(BadInput, match=rf"{file}, line 3 {message}"):
        one_task("qasper", tmp_path, num_samples=1)


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "qasper.jsonl").write_bytes(json.dumps(ROW).encode() + b'\n{"input": "\xff"}\n')
    with pytest.raises(BadInput, match=r"qasper\.jsonl, line 2 is damaged: "):
        one_task("qasper", tmp_path)


def test_classes_are_required_where_answers_are_classes(tmp_path):
    write(tmp_path / "trec.jsonl", ROW)
    with pytest.raises(BadInput, match=r"is no row of trec: .* all_classes a list"):
        one_task("trec", tmp_path)


def test_line_ends_inside_a_text_do_not_end_its_line(tmp_path):
    row = {**ROW, "context": "one\u2028two\x85three\r\nfour"}
    write(tmp_path / "qasper.jsonl", row, row)
    assert load_rows("qasper", tmp_path)[1].context == row["context"]


def test_a_file_that_goes_away_is_named(tmp_path):
    task = one_task("qasper", write(tmp_path / "qasper.jsonl", ROW).parent)
    (tmp_path / "qasper.jsonl").unlink()
    with pytest.raises(BadInput, match=r"cannot read .*qasper\.jsonl"):
        task.sample(0)


def test_a_number_of_samples_below_one_is_refused(tmp_path):
    with pytest.raises(BadInput, match="num_samples=0"):
        one_task("qasper", tmp_path, num_samples=0)


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one row of two datasets, whose downloads are counted."""
    content, downloads = io.BytesIO(), []
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("data/qasper.jsonl", json.dumps(ROW))
        archive.writestr("data/qasper_e.jsonl", json.dumps({**ROW, "length": 9000}))
        archive.writestr("__MACOSX/data/._qasper.jsonl", "\x00")
    (tmp_path / "data.zip").write_bytes(content.getvalue())
    (tmp_path / "assets").mkdir()

    def download(repository, file, *, repo_type):
        downloads.append((repository, file, repo_type))
        return str(tmp_path / "data.zip")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda **names: tmp_path / "assets")
    return downloads


def test_official_files_are_downloaded_once(hub):
    assert [row.words for row in load_rows("qasper_e")] == [9000]
    assert [row.words for row in load_rows("qasper")] == [5]
    assert [row.words for row in load_rows("qasper")] == [5]
    assert hub == [("THUDM/LongBench", "data.zip", "dataset")] * 2  # which the hub's own cache answers


def test_a_download_that_fails_says_what_to_do(hub, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match=r"cannot download LongBench \(KeyError\)"):
        load_rows("musique")
    (tmp_path / "data.zip").write_bytes(b"not found")
    with pytest.raises(BadInput, match=r"\(BadZipFile\)\. Download https://.*data\.zip yourself.*data_dir"):
        load_rows("qasper")
    monkeypatch.undo()  # the real hub, which tests are kept from
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda **names: tmp_path / "assets")
    with pytest.raises(BadInput, match="cannot download LongBench"):
        load_rows("qasper")


# --- through a model -------------------------------------------------------------------------------------------------


class Says:
    """A tokenizer by which every answer of a model reads alike."""

    def __init__(self, tokenizer, text):
        self.tokenizer, self.text = tokenizer, text

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *texts, **options):
        return self.tokenizer(*texts, **options)

    def batch_decode(self, answers, **options):
        return [self.text for _ in answers]


@pytest.mark.parametrize(
    ("name", "answer", "said", "score"),
    [
        ("lcc", "        mEffects.add(new NoEffect());", "        mEffects.add(new NoEffect());\n    }", 1),
        ("repobench-p", "\treturn 1;", "\n\treturn 1;\n", 1),
        ("repobench-p", "\treturn 1;", "return 1;", 0.95),
        ("triviaqa", "Ada", " \nAda", 0),  # its first line is blank
        ("triviaqa", "Ada", "\nAda\n", 1),
    ],
)
def test_an_answer_is_judged_as_it_was_said(name, answer, said, score, tmp_path):
    """It was once stripped before: perfect code was given 0.88."""
    write(tmp_path / f"{name}.jsonl", {**ROW, "context": "class A {\n    void add() {\n", "answers": [answer]})
    tokenizer = Says(byte_tokenizer(), said)
    task = one_task(name, tmp_path, tokenizer=tokenizer, length=1000)
    task = replace(task, sample=lambda index: replace(one_task(name, tmp_path).sample(index), max_new_tokens=2))
    evaluation = Evaluation(tasks=(task,), methods=("keydiff",), keeps=(parse_keep(0.5),), timed=0)
    records = evaluate(tiny_model("llama", vocab_size=len(byte_tokenizer())), tokenizer, evaluation)
    assert [(record.method, record.predictions, record.score) for record in records] == [
        (method, (said,), score) for method in ("full", "keydiff")
    ]
    assert official_score(name, said, task.sample(0).questions[0]) == score


@pytest.mark.slow
def test_a_model_runs_one_sample_of_every_task(longbench, bpe):
    """Real text, tokenizer, Qwen3 and all: prompts that are cut, compressed, answered and judged. Answers are short."""
    model = tiny_model("qwen3", vocab_size=len(bpe), max_position_embeddings=4096)
    tasks = longbench_tasks(list(LONGBENCH_TASKS), tokenizer=bpe, length=3000, num_samples=1, data_dir=longbench)

    def short(task):
        return replace(task, sample=lambda index: replace(task.sample(index), max_new_tokens=4))

    evaluation = Evaluation(
        tasks=tuple(map(short, tasks)), methods=("snapkv+adakv", "keydiff"), keeps=(parse_keep(0.2),), timed=0
    )
    records = evaluate(model, bpe, evaluation)
    assert [(r.task, r.method) for r in records] == [
        (f"longbench:{name}", method) for name in LONGBENCH_TASKS for method in ("full", "snapkv+adakv", "keydiff")
    ]
    for record in records:
        assert 0 <= record.score <= 1
        assert len(record.predictions) == 1
        assert record.context_tokens <= 3000
        assert record.kv_bytes / record.full_kv_bytes == pytest.approx(1 if record.method == "full" else 0.2, abs=0.01)


def test_a_line_without_an_end_is_not_read(tmp_path):
    with (tmp_path / "qasper.jsonl").open("wb") as file:
        file.truncate(longbench_data.LONGEST_LINE + 2)
    with pytest.raises(BadInput, match="line 1 is longer than 64 MiB; it is no row"):
        load_rows("qasper", tmp_path)
