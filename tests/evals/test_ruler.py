import itertools
import json
import re
import resource
import tarfile
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from headwise.errors import BadInput
from headwise.models.loading import reference_path
from headwise.tasks.ruler.documents import load_hotpotqa, load_squad
from headwise.tasks.ruler.drafts import Prompt, Setting, largest
from headwise.tasks.ruler.sources import (
    NOISE,
    haystack_name,
    load_essays,
    load_more_words,
    load_words,
    split_sentences,
)
from headwise.tasks.ruler.suite import RULER_TASKS, match_all, match_part, ruler_tasks
from headwise.tasks.task import Question, Sample

LENGTH = 4096
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "ruler_sources.tar.xz"
NIAH = tuple(name for name in RULER_TASKS if name.startswith("niah"))
MOST_TOKENIZATIONS = 20


def questions_answers(*pairs):
    return [{"question": question, "answers": [{"text": text} for text in texts]} for question, texts in pairs]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A data folder in the formats of SQuAD and HotpotQA, with texts of ours and no essays."""
    folder = tmp_path_factory.mktemp("made")
    sentences = iter(load_essays(None).sentences)

    def text(num_sentences):
        return " ".join(itertools.islice(sentences, num_sentences))

    paragraphs = [
        {"context": text(12), "qas": questions_answers((f"Question {n}?", [f"Answer {n}"]))} for n in range(30)
    ]
    squad = {"data": [{"paragraphs": paragraphs[:5]}, {"paragraphs": paragraphs[5:]}]}
    hotpotqa = [
        {
            "question": f"Which {n}?",
            "answer": f"That {n}",
            "context": [[f"Title {n} {i}", [text(3)]] for i in range(10)],
        }
        for n in range(8)
    ]
    (folder / "squad.json").write_text(json.dumps(squad), encoding="utf-8")
    (folder / "hotpotqa.json").write_text(json.dumps(hotpotqa), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """The real sources, where this machine has them."""
    if not SHARED.is_file():
        pytest.skip(f"the real sources are not at {SHARED}")
    folder = tmp_path_factory.mktemp("sources")
    with tarfile.open(SHARED) as archive:
        archive.extractall(folder, filter="data")
    return folder / "ruler_sources"


@pytest.fixture(scope="session")
def tokenizers():
    """Two real ones: byte-level BPE of 2000 tokens, and the reference model's, which knows few words."""
    words = load_words()
    texts = [*load_essays(None).sentences[:2000], NOISE, *words.adjectives, *words.nouns]
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=2000, show_progress=False, initial_alphabet=ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    return {
        "bpe": PreTrainedTokenizerFast(tokenizer_object=bpe),
        "reference": AutoTokenizer.from_pretrained(str(reference_path())),
    }


@pytest.fixture(scope="session")
def make(tokenizers, made):
    def make_sample(name, index=0, *, tokenizer="bpe", **changes) -> Sample:
        arguments = {"length": LENGTH, "num_samples": 8, "seed": 0, "data_dir": made} | changes
        (task,) = ruler_tasks([name], tokenizer=tokenizers[tokenizer], **arguments)
        return task.sample(index)

    return make_sample


def text_of(sample: Sample) -> str:
    (question,) = sample.questions
    return sample.context + question.prompt + question.answer_prefix


def num_tokens(tokenizer, sample: Sample) -> int:
    return len(tokenizer(text_of(sample), verbose=False)["input_ids"]) + sample.max_new_tokens


def write(name, size, *, data_dir=None, length=LENGTH, index=0, count_tokens=len) -> Prompt:
    """Write a prompt of a size, whatever its length."""
    prepared = RULER_TASKS[name].prepare(Setting(count_tokens=count_tokens, length=length, data_dir=data_dir))
    return prepared.draft(index).write(np.random.default_rng(0), size)


def test_official_parameters():
    """Those of RULER's synthetic.yaml and constants.py."""
    needles = ("type_haystack", "type_needle_k", "type_needle_v", "num_needle_k", "num_needle_v", "num_needle_q")
    official = {
        "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
        "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
        "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
        "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
        "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
        "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
        "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
        "niah_multiquery": ("essay", "words", "numbers", 1, 1, 4),
    }
    for name, values in official.items():
        assert tuple(getattr(RULER_TASKS[name], field) for field in needles) == values
    assert (RULER_TASKS["vt"].num_chains, RULER_TASKS["vt"].num_hops) == (1, 4)
    assert (RULER_TASKS["cwe"].freq_cw, RULER_TASKS["cwe"].freq_ucw, RULER_TASKS["cwe"].num_cw) == (30, 3, 10)
    assert RULER_TASKS["fwe"].alpha == 2.0
    assert (RULER_TASKS["qa_1"].dataset, RULER_TASKS["qa_2"].dataset) == ("squad", "hotpotqa")
    generated = {name: task.tokens_to_generate for name, task in RULER_TASKS.items()}
    others = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    assert generated == dict.fromkeys(official, 128) | others


@pytest.mark.parametrize("tokenizer", ["bpe", "reference"])
@pytest.mark.parametrize("name", RULER_TASKS)
def test_length_is_met_with_few_tokenizations(name, tokenizer, tokenizers, made):
    texts = []

    def count(text, **options):
        texts.append(text)
        return tokenizers[tokenizer](text, **options)

    (task,) = ruler_tasks([name], tokenizer=count, length=LENGTH, num_samples=2, seed=0, data_dir=made)
    texts.clear()
    sample = task.sample(1)
    assert 0.98 * LENGTH <= num_tokens(tokenizers[tokenizer], sample) <= LENGTH
    assert len(texts) <= MOST_TOKENIZATIONS
    assert (task.name, task.length, task.num_samples) == (f"ruler:{name}", LENGTH, 2)
    assert (sample.verbatim, sample.chat, len(sample.questions)) == (True, True, 1)
    assert sample.max_new_tokens == RULER_TASKS[name].tokens_to_generate


@pytest.mark.parametrize("name", ["niah_single_2", "niah_multiquery", "qa_1", "qa_2"])
def test_length_is_met_with_the_real_sources(name, make, tokenizers, sources):
    sample = make(name, 3, data_dir=sources)
    assert 0.98 * LENGTH <= num_tokens(tokenizers["bpe"], sample) <= LENGTH


@pytest.mark.parametrize("length", [20_000, 32_768])
def test_word_lists_longer_than_the_bundled_words(make, tokenizers, length):
    sample = make("cwe", length=length)
    assert 0.98 * length <= num_tokens(tokenizers["bpe"], sample) <= length
    assert set(main_list(sample).values()) == {30, 3}


def test_essays_are_read_again_where_they_end(make, tokenizers, tmp_path):
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": "I  wrote\nthis. It is short."}))
    sample = make("niah_multikey_1", data_dir=tmp_path)
    assert 0.98 * LENGTH <= num_tokens(tokenizers["bpe"], sample) <= LENGTH
    assert " I wrote this. It is short. I wrote this. " in sample.context


@pytest.mark.parametrize("name", RULER_TASKS)
def test_samples_depend_on_seed_and_index_only(name, make):
    first = make(name, length=2048)
    assert first == make(name, length=2048)
    others = [make(name, 1, length=2048), make(name, length=2048, seed=1)]
    assert len({text_of(sample) for sample in [first, *others]}) == 3


@pytest.mark.parametrize("name", NIAH)
def test_asked_values_stand_once_under_their_key(name, make):
    sample = make(name)
    (question,) = sample.questions
    found = re.findall(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.", sample.context)
    values = [value for _, value in found]
    assert len(set(values)) == len(values)
    keys = Counter(key for key, _ in found)
    assert set(keys.values()) == {RULER_TASKS[name].num_needle_v}
    for answer in question.answers:
        assert sample.context.count(answer) == 1
    asked = [key for key, value in found if value in question.answers]
    assert all(f" {key}" in question.prompt and f" {key}" in question.answer_prefix for key in asked)
    assert len(question.answers) == {"niah_multivalue": 4, "niah_multiquery": 4}.get(name, 1)
    if RULER_TASKS[name].type_haystack != "needle":
        assert len(found) == {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}.get(name, 1)


def test_variables_are_assigned_once(make):
    sample = make("vt")
    (question,) = sample.questions
    names = question.answers
    value = re.findall(r"value (\d+)", question.prompt)[0]
    assert len(set(names)) == 5
    assert [sample.context.count(name) for name in names] == [2, 2, 2, 2, 1]
    assert sample.context.count(f"VAR {names[0]} = {value}\n") == sample.context.count(value) == 1
    places = [sample.context.index(f"VAR {name} = ") for name in names]
    assert places == sorted(places)


def main_list(sample: Sample) -> Counter:
    """Count the words of the list that is asked about."""
    return Counter(re.findall(r"\d+\. (\S+)", sample.context.split("\n")[-1]))


@pytest.mark.parametrize(("length", "common", "uncommon"), [(2048, 6, 1), (LENGTH, 30, 3)])
def test_common_words_are_more_frequent(make, length, common, uncommon):
    sample = make("cwe", length=length)
    (question,) = sample.questions
    counts = main_list(sample)
    assert {word for word, count in counts.items() if count == common} == set(question.answers)
    assert set(counts.values()) == {common, uncommon} and len(question.answers) == 10
    example = re.findall(r"\d+\. (\S+)", sample.context.rsplit("\n", 1)[0])
    assert not set(example) & set(counts)


def test_frequent_words_are_the_most_frequent(make):
    sample = make("fwe")
    (question,) = sample.questions
    counts = Counter(sample.context.split("coded words. ")[1].split())
    assert counts.most_common(1)[0][0] == "..."
    (*asked, fourth) = counts.most_common(5)[1:]
    assert [word for word, _ in asked] == list(question.answers)
    assert asked[-1][1] > fourth[1]


@pytest.mark.parametrize("dataset", ["squad", "hotpotqa"])
def test_documents_that_answer_are_whole(dataset, make, made):
    corpus = {"squad": load_squad, "hotpotqa": load_hotpotqa}[dataset](made)
    sample = make({"squad": "qa_1", "hotpotqa": "qa_2"}[dataset], 7)
    (question,) = sample.questions
    assert question.prompt.endswith(f"\n\nQuestion: {corpus.questions[7].question}")
    assert question.answers == corpus.questions[7].answers
    for number in corpus.questions[7].documents:
        assert f":\n{corpus.documents[number]}\n\n" in f"{sample.context}\n\n"
    numbers = [int(number) for number in re.findall(r"Document (\d+):\n", sample.context)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_documents_on_the_same_subject_come_first(made):
    corpus = load_squad(made)
    context = write("qa_1", 7, data_dir=made).context
    same_subject = [
        corpus.documents[number] for number in (*corpus.questions[0].documents, *corpus.questions[0].related)
    ]
    assert len(same_subject) == 5 and all(document in context for document in same_subject)


def test_rendering_of_a_single_needle():
    prompt = write("niah_single_1", 1)
    (value,) = prompt.answers
    key = re.findall(r"for (\S+) is:", prompt.context)[0]
    assert prompt.text == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
        f"One of the special magic numbers for {key} is: {value}.\n"
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
        f"What is the special magic number for {key} mentioned in the provided text?"
        f" The special magic number for {key} mentioned in the provided text is"
    )
    assert re.fullmatch(r"[a-z]+-[a-z]+ [1-9]\d{6}", f"{key} {value}")


def test_rendering_of_several_needles(tmp_path):
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": "One two. Three. Four five six."}))
    prompt = write("niah_multiquery", 6, data_dir=tmp_path)
    needles = {
        value: key
        for key, value in re.findall(r"One of the special magic numbers for (\S+) is: (\d+)\.", prompt.context)
    }
    first, second, third, fourth = (needles[value] for value in prompt.answers)
    query = f"{first}, {second}, {third}, and {fourth}"
    head, _, haystack = prompt.context.partition("\n")
    assert head == (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards."
    )
    assert prompt.question == f"\nWhat are all the special magic numbers for {query} mentioned in the provided text?"
    assert prompt.answer_prefix == f" The special magic numbers for {query} mentioned in the provided text are"
    rest = re.sub(r"One of the special magic numbers for \S+ is: \d+\.", "", haystack)
    assert rest.split() == ["One", "two.", "Three.", "Four", "five", "six."]


def test_rendering_of_needles_among_needles():
    prompt = write("niah_multikey_3", 3)
    (value,) = prompt.answers
    lines = prompt.context.split("\n")
    needle = r"One of the special magic uuids for [0-9a-f-]{36} is: [0-9a-f-]{36}\."
    assert len(lines) == 5 and all(re.fullmatch(needle, line) for line in lines[1:])
    assert prompt.question.startswith("\nWhat is the special magic uuid for ") and value in prompt.context


def test_rendering_of_variable_tracking():
    """A tokenizer of many tokens makes the example as short as it can be: a line of noise for each of the chain."""
    prompt = write("vt", 5, count_tokens=lambda text: 1000)
    example_value, value = re.findall(r"VAR \S+ = (\d{5})", prompt.context)
    example_names = re.findall(r"VAR ([A-Z]{3}) = ", prompt.context)
    expected = ""
    for given, names in ((example_value, example_names), (value, list(prompt.answers))):
        one, two, three, four, five = names
        noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
        expected += (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            f"VAR {one} = {given}\n{noise}\nVAR {two} = VAR {one} \n{noise}\nVAR {three} = VAR {two} \n{noise}\n"
            f"VAR {four} = VAR {three} \n{noise}\nVAR {five} = VAR {four} \n{noise}\n"
            f"Question: Find all variables that are assigned the value {given} in the text above."
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"5 variables are assigned the value {given}, they are: "
        )
        if names is example_names:
            expected += f" {one} {two} {three} {four} {five}\n\n"
    assert prompt.text == expected
    assert example_value != value and all(len(name) == 5 for name in prompt.answers)


def test_rendering_of_common_words():
    prompt = write("cwe", 11, length=1024)
    template = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n{list}\n"
        "Question: What are the 10 most common words in the above list?"
        " Answer: The top 10 words that appear most often in the list are:"
    )
    lists = [re.findall(r"\d+\. \S+", line) for line in prompt.context.split("\n") if line.startswith("1. ")]
    assert [len(listed) for listed in lists] == [10 * 3 + 10 * 1, 10 * 6 + 1 * 1]
    example, main = (" ".join(listed) for listed in lists)
    shown = Counter(item.split()[1] for item in lists[0])
    answer = re.findall(r"are: (.*)", prompt.context)[0]
    assert [item.split()[0] for item in re.findall(r"\d+\. \S+", answer)] == [f"{n}." for n in range(1, 11)]
    assert {shown[item.split()[1]] for item in re.findall(r"\d+\. \S+", answer)} == {3}
    assert prompt.text == f"{template.format(list=example)} {answer}\n{template.format(list=main)}"


def test_rendering_of_frequent_words():
    prompt = write("fwe", 80, length=562)
    words = prompt.context.split("coded words. ")[1].split()
    assert prompt.text == (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {' '.join(words)}\n"
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
        " Answer: According to the coded text above, the three most frequently appeared words are:"
    )
    # 80 / zeta(2) / rank**2, for the ten words of a vocabulary of a fiftieth of the length
    assert [count for _, count in Counter(words).most_common()] == [48, 12, 5, 3, 1, 1]
    assert all(re.fullmatch(r"[a-z]{6}", word) for word in set(words) - {"..."})


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_rendering_of_questions(name, tmp_path):
    squad = {
        "data": [{"paragraphs": [{"context": "A cat sat.", "qas": questions_answers(("Who sat?", ["a cat", "cat"]))}]}]
    }
    hotpotqa = [{"question": "Who sat?", "answer": "cat", "context": [["Cats", ["A cat", " sat."]]]}]
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    (tmp_path / "hotpotqa.json").write_text(json.dumps(hotpotqa))
    prompt = write(name, 1, data_dir=tmp_path)
    document = {"qa_1": "A cat sat.", "qa_2": "Cats\nA cat sat."}[name]
    assert prompt.text == (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        f"\n\nThe following are given documents.\n\nDocument 1:\n{document}\n\n"
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        "\n\nQuestion: Who sat? Answer:"
    )
    assert prompt.context.endswith(document)
    assert prompt.answers == {"qa_1": ("a cat", "cat"), "qa_2": ("cat",)}[name]


@pytest.mark.parametrize(
    ("prediction", "part", "share"),
    [
        ("the Numbers are 12, 34, 56 and XyZ", 1, 1),
        (" 12 and xyz\n", 1, 0.5),
        ("1 2", 0, 0),
        ("x\x00yz 56", 1, 0.25),
        ("", 0, 0),
    ],
)
def test_scores_are_string_matches(prediction, part, share):
    question = Question(prompt="?", answers=("12", "34", "56", "xYz"))
    assert match_part(prediction, question) == part
    assert match_all(prediction, question) == share


def test_any_answer_counts_in_qa_only(tokenizers, made):
    tasks = ruler_tasks(
        tuple(RULER_TASKS), tokenizer=tokenizers["bpe"], length=LENGTH, num_samples=1, seed=0, data_dir=made
    )
    question = Question(prompt="?", answers=("one", "two"))
    scores = {task.name: task.judge("ONE.", question) for task in tasks}
    assert scores == {f"ruler:{name}": 1.0 if name.startswith("qa") else 0.5 for name in RULER_TASKS}


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (["niah_single_9"], {}, "niah_single_1, niah_single_2"),
        (["vt"], {"seed": -1}, "seed=-1"),
        (["vt"], {"num_samples": 0}, "num_samples=0"),
        (["vt"], {"length": 0}, "length=0"),
        (["qa_2"], {"num_samples": 9}, "8 questions"),
        (["qa_1"], {"data_dir": None}, r"dev-v2\.0\.json .*squad\.json"),
        (["qa_2"], {"data_dir": None}, r"hotpot_dev_distractor_v1\.json .*hotpotqa\.json"),
        (["niah_single_2"], {"data_dir": Path("nowhere")}, "no data folder nowhere"),
    ],
)
def test_wrong_arguments(names, changes, message, tokenizers, made):
    arguments = {"length": LENGTH, "num_samples": 1, "seed": 0, "data_dir": made} | changes
    with pytest.raises(BadInput, match=message):
        ruler_tasks(names, tokenizer=tokenizers["bpe"], **arguments)


@pytest.mark.parametrize("name", RULER_TASKS)
def test_a_length_too_short(name, make):
    with pytest.raises(BadInput, match=f"ruler:{name}: length 100 is too short; it takes at least \\d+ tokens"):
        make(name, length=100)


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        ("squad.json", "{", "qa_1"),
        ("squad.json", "[]", "qa_1"),
        ("squad.json", '{"data": []}', "qa_1"),
        ("squad.json", '{"data": [{"paragraphs": [{"context": 1, "qas": []}]}]}', "qa_1"),
        ("squad.json", '{"data": [{"paragraphs": [{"context": "A", "qas": [{"question": "Q"}]}]}]}', "qa_1"),
        ("hotpotqa.json", '[{"question": "Q", "answer": "A", "context": [["title"]]}]', "qa_2"),
        ("hotpotqa.json", '{"question": "Q"}', "qa_2"),
        ("PaulGrahamEssays.json", '{"essays": "text"}', "niah_single_2"),
        ("PaulGrahamEssays.json", '{"text": " "}', "niah_single_2"),
        ("english_words.json", "{}", "cwe"),
        ("words.zip", "no archive", "cwe"),
    ],
)
def test_damaged_sources(file, text, name, tmp_path, tokenizers):
    (tmp_path / file).write_text(text)
    with pytest.raises(BadInput, match=rf"{file}|{tmp_path.name}"):
        ruler_tasks([name], tokenizer=tokenizers["bpe"], length=LENGTH, num_samples=1, seed=0, data_dir=tmp_path)


def test_text_that_is_not_utf8(tmp_path, tokenizers):
    (tmp_path / "PaulGrahamEssays").mkdir()
    (tmp_path / "PaulGrahamEssays" / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match=r"a\.txt"):
        ruler_tasks(
            ["niah_single_2"], tokenizer=tokenizers["bpe"], length=LENGTH, num_samples=1, seed=0, data_dir=tmp_path
        )


def test_haystack_is_named(tmp_path):
    assert haystack_name(None) == haystack_name(tmp_path) == "bundled"
    (tmp_path / "PaulGrahamEssays").mkdir()
    assert haystack_name(tmp_path) == "bundled"
    (tmp_path / "PaulGrahamEssays" / "a.txt").write_text("An essay.")
    assert haystack_name(tmp_path) == "paul-graham"
    assert load_essays(tmp_path).sentences == ("An essay.",)


def test_real_sources_are_found(sources):
    assert haystack_name(sources) == "paul-graham"
    assert len(load_squad(sources).questions) > 1000
    assert len(load_hotpotqa(sources).questions) == 100
    assert len(load_more_words(sources, load_words())) > 100_000


def test_word_lists(tmp_path):
    words = load_words()
    plain = words.adjectives + words.nouns
    assert len(set(plain)) == len(plain) > 1500
    pairs = load_more_words(None, words)
    assert len(set(pairs)) == len(pairs) > 50_000 and not set(pairs) & set(plain)
    with zipfile.ZipFile(tmp_path / "words.zip", "w") as archive:
        archive.writestr("words/en", f"Zebu\nzebu\nax\nco-op\n{plain[0]}\n")
    assert load_more_words(tmp_path, words) == ("zebu",)
    (tmp_path / "english_words.json").write_text('{"1": "yak", "2": "gnu"}')
    assert load_more_words(tmp_path, words) == ("gnu", "yak")


def test_sentences_end_before_a_capital():
    text = 'He met Mr. Smith, e.g. at 5 p.m. or  so.\n"Did he?" Yes! J. P. Morgan did... and 3.5 times. 7 it was.'
    assert split_sentences(text) == [
        "He met Mr. Smith, e.g. at 5 p.m. or so.",
        '"Did he?"',
        "Yes!",
        "J. P. Morgan did... and 3.5 times.",
        "7 it was.",
    ]


def test_first_words_of_essays(tmp_path):
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": "One two. Three four five."}))
    essays = load_essays(tmp_path)
    assert essays.first_words(1) == ["One"]
    assert essays.first_words(4) == ["One two.", "Three four"]
    assert essays.first_words(8) == ["One two.", "Three four five.", "One two.", "Three"]


@pytest.mark.parametrize("tokens_per_unit", [0.7, 1, 3.3, 40, 5000])
def test_largest_is_found_in_few_tries(tokens_per_unit):
    tried = []

    def count(size):
        tried.append(size)
        return 200 + int(tokens_per_unit * size)

    size, num_tokens = largest(count, room=131_072, slack=0, fewest=3)
    assert num_tokens == count(size) <= 131_072 < count(size + 1)
    assert len(tried) <= 2 + MOST_TOKENIZATIONS


def test_largest_where_tokens_jump():
    size, num_tokens = largest(lambda size: 10 if size < 777 else 10**6, room=5000, slack=0, fewest=1)
    assert (size, num_tokens) == (776, 10)
    assert largest(lambda size: size, room=5000, slack=100, fewest=1, most=30) == (30, 30)
    assert largest(lambda size: 9000, room=5000, slack=0, fewest=4) == (4, 9000)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_small_archive_of_endless_words_is_not_unpacked(tmp_path, method):
    """3 MB of it were 6 GB in memory once; other methods than deflate cannot be unpacked piece by piece."""
    # bzip2 packs short words for minutes
    words = (b"z" * 1023 + b" ") * 13 * 2**10 if method == zipfile.ZIP_BZIP2 else b"quokka zebra " * 2**20
    with zipfile.ZipFile(tmp_path / "words.zip", "w", method) as archive, archive.open("words/en", "w") as file:
        for _ in range(40):
            file.write(words)
    assert (tmp_path / "words.zip").stat().st_size < 3 * 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        BadInput, match="words/en is larger than 32 MiB" if method == zipfile.ZIP_DEFLATED else "deflate"
    ):
        load_more_words(tmp_path, load_words())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


@pytest.mark.parametrize(("name", "most"), [("english_words.json", 32), ("squad.json", 256)])
def test_a_file_that_is_far_too_large_is_not_read(tmp_path, name, most):
    with (tmp_path / name).open("wb") as file:
        file.truncate(most * 2**20 + 1)
    load = load_squad if name == "squad.json" else partial(load_more_words, words=load_words())
    with pytest.raises(BadInput, match=f"is larger than {most} MiB"):
        load(tmp_path)


def test_questions_on_one_subject_share_its_documents(tmp_path):
    """Thousands of them on thousands of documents would not fit into memory otherwise."""
    paragraphs = [{"context": f"{n}.", "qas": questions_answers((f"{n}?", ["a"]))} for n in range(2000)]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    asked = load_squad(tmp_path).questions
    assert len({id(one.subject) for one in asked}) == 1
    assert len(asked[7].related) == 1999 and asked[7].documents[0] not in asked[7].related
