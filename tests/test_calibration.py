"""Calibration data: the builtin mix, and examples from files."""

import json

import pytest
import text_tokenizers
import torch
from folders import CHAT_TEMPLATE, word_tokenizer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from headwise.errors import BadInput
from headwise.offline.calibration import TASKS, Example, builtin, encode, load_examples, to_json_lines
from headwise.offline.texts.mix import ORDER
from headwise.tasks.mini_ruler.lexicon import REFERENCE_LEXICON
from headwise.tasks.mini_ruler.suite import generate

POSITIONS = 1024


def byte_tokenizer():
    """Knows every text, as a hub model's tokenizer does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({char: n for n, char in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def load(source):
    return load_examples(str(source), word_tokenizer(), max_positions=POSITIONS)


def write(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


# --- builtin ---


def test_the_builtin_mix_is_the_same_every_time_and_longer_ones_begin_alike():
    mix = builtin(word_tokenizer(), 12, max_positions=POSITIONS)
    assert mix == load("builtin:12")
    assert mix[:5] == load("builtin:5")
    assert len({example.context for example in mix}) == 12
    assert len(load("builtin")) == 24


def test_the_builtin_mix_has_all_kinds_several_lengths_and_many_questions():
    mix = load("builtin:16")
    assert {example.domain for example in mix} == set(TASKS)
    lengths = [encode(word_tokenizer(), example, device="cpu")[0].shape[1] for example in mix]
    assert max(lengths[:8]) <= POSITIONS // 4 < min(lengths[8:]) <= max(lengths) <= POSITIONS // 2
    dense = [example for example in mix if example.domain == "niah_multikey_dense"]
    assert all(len(example.questions) >= 10 for example in dense)
    assert all(1 <= len(example.questions) <= 40 for example in mix)


def test_the_builtin_mix_shares_no_context_with_the_evaluation():
    for number, example in enumerate(load("builtin:16")):
        for split in ("evaluation", "train", "demo"):
            length = POSITIONS // 4 if number < 8 else POSITIONS // 2
            other = generate(
                example.domain, lexicon=REFERENCE_LEXICON, length=length, seed=0, index=number, split=split
            )
            assert other.context != example.context
        same = generate(
            example.domain, lexicon=REFERENCE_LEXICON, length=length, seed=0, index=number, split="calibration"
        )
        assert same.context == example.context


def test_every_other_tokenizer_gets_natural_language():
    assert {example.domain for example in load("builtin:16")} == set(TASKS)
    mix = builtin(byte_tokenizer(), 12, max_positions=4096, length=900)
    assert {example.domain for example in mix} == {*ORDER}
    assert all(400 < len(byte_tokenizer()(example.context)["input_ids"]) <= 900 for example in mix)
    assert all(example.following and example.questions for example in mix)


def test_natural_contexts_are_as_long_as_positions_allow():
    for positions, most in ((8192, (512, 1024)), (1024, (256, 512))):
        mix = builtin(byte_tokenizer(), 4, max_positions=positions)
        lengths = [len(byte_tokenizer()(example.context)["input_ids"]) for example in mix]
        assert all(0.5 * limit < length <= limit for length, limit in zip(lengths, most * 2, strict=True))


def test_special_tokens_count():
    (example,) = builtin(text_tokenizers.byte_tokenizer(), 1, max_positions=4096, length=300)
    assert len(text_tokenizers.byte_tokenizer()(example.context)["input_ids"]) <= 300


def test_length_and_number_of_builtin_contexts():
    mix = load_examples("builtin", word_tokenizer(), max_positions=POSITIONS, length=300, contexts=3)
    assert len(mix) == 3
    assert all(250 < len(word_tokenizer()(example.context)["input_ids"]) <= 300 for example in mix)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 10}, "64 tokens or more"),
        ({"length": POSITIONS}, "fewer than the 1024 positions"),
        ({"contexts": 0}, "a number from 1"),
        ({"contexts": 5}, "two numbers of contexts"),
        ({"questions": 0}, "auto, none, or how many"),
        ({"questions": "many"}, "auto, none, or how many"),
    ],
)
def test_a_wrong_option(options, words):
    with pytest.raises(BadInput, match=words):
        load_examples("builtin:4", word_tokenizer(), max_positions=POSITIONS, **options)


def test_no_builtin_context_is_longer_than_4096_tokens():
    (example,) = builtin(word_tokenizer(), 1, max_positions=1_000_000)
    assert 3000 < len(word_tokenizer()(example.context)["input_ids"]) <= 4096


@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5", "²"])
def test_a_wrong_number_of_builtin_contexts(count):
    with pytest.raises(BadInput, match="builtin:N"):
        load(f"builtin:{count}")


# --- files ---


def test_json_lines(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"context": "the red stone.", "questions": ["? who", "? what"], "domain": "stones"},
        "",
        {"context": "the key.", "more": 1},
    )
    assert load(path) == [
        Example(context="the red stone.", questions=("? who", "? what"), domain="stones"),
        Example(context="the key.", questions=(), domain="text"),
    ]


def test_a_line_ends_where_json_lines_end_and_nowhere_else(tmp_path):
    """Line separators of Unicode are allowed inside JSON strings; splitlines() would cut there."""
    context = "a\u2028b\x85c"
    path = write(tmp_path / "a.jsonl", json.dumps({"context": context}, ensure_ascii=False))
    assert load(path)[0].context == context


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "null",
        '"context"',
        {"questions": ["? who"]},
        {"context": ""},
        {"context": " "},
        {"context": ["a"]},
        {"context": "a", "questions": "who"},
        {"context": "a", "questions": [""]},
        {"context": "a", "questions": [1]},
        {"context": "a", "domain": ""},
        {"context": "a", "domain": None},
        {"context": "a", "following": 3},
        {"context": "a", "following": None},
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    path = write(tmp_path / "bad.jsonl", {"context": "fine"}, line)
    with pytest.raises(BadInput, match=r"bad\.jsonl, line 2: "):
        load(path)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    write(tmp_path / "b.txt", "the stone and the key.")
    write(tmp_path / "a.jsonl", {"context": "one", "questions": ["? who"]}, {"context": "two"})
    write(tmp_path / "c.md", "the old key.")
    write(tmp_path / "d.csv", "not this")
    assert load(tmp_path) == [
        Example(context="one", questions=("? who",)),
        Example(context="two"),
        Example(context="the stone and the key.", domain="b"),
        Example(context="the old key.", domain="c"),
    ]


def test_files_that_hold_nothing_or_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, words in {
        "empty": "holds no examples",
        "blank.jsonl": "is empty",
        "binary.txt": "not UTF-8",
        "nowhere.txt": "cannot read",
    }.items():
        with pytest.raises(BadInput, match=words):
            load(tmp_path / name)


# --- a user's texts ---

PARAGRAPHS = [
    f"Paragraph {n} is about the year {1900 + n}. It says so, and little else. Then it ends." for n in range(90)
]
BOOK = "\n\n".join(PARAGRAPHS)


def cut(source, **options):
    return load_examples(str(source), byte_tokenizer(), max_positions=4096, **options)


def tokens(text):
    return len(byte_tokenizer()(text)["input_ids"])


def test_a_text_is_used_whole_unless_told(tmp_path):
    path = write(tmp_path / "book.txt", BOOK)
    assert cut(path) == [Example(context=BOOK, domain="book")]


def test_a_long_text_is_cut_into_contexts_with_what_follows_them(tmp_path):
    made = cut(write(tmp_path / "book.txt", BOOK), length=1000)
    assert len(made) >= 7
    places = [BOOK.index(example.context) for example in made]
    ends = [place + len(example.context) for place, example in zip(places, made, strict=True)]
    assert all(end <= start for end, start in zip(ends, places[1:], strict=False))
    for example, end in zip(made, ends, strict=True):
        assert tokens(example.context) <= 1000
        assert example.following and BOOK[end:].startswith(example.following)
        assert example.context.startswith("Paragraph") and example.context.endswith("ends.")
        assert (example.domain, example.questions) == ("book", ())


def test_few_contexts_come_from_all_over_a_text(tmp_path):
    made = cut(write(tmp_path / "book.txt", BOOK), length=500, contexts=3)
    places = [BOOK.index(example.context) / len(BOOK) for example in made]
    assert len(made) == 3
    assert all(place == pytest.approx(n / 3, abs=0.05) for n, place in enumerate(places))


def test_questions_are_made_for_texts_that_have_none(tmp_path):
    write(tmp_path / "a.jsonl", {"context": "the red stone.", "questions": ["? who", "? what", "? why"]})
    write(tmp_path / "b.md", BOOK)
    own, *made = cut(tmp_path, length=1000, questions="auto")
    assert own.questions == ("? who", "? what", "? why")
    assert all(6 <= len(example.questions) <= 12 for example in made)
    own, *others = cut(tmp_path, length=1000, questions=2)
    assert own.questions == ("? who", "? what")
    assert not any(example.questions for example in others)  # a number limits, and makes none
    assert not any(example.questions for example in cut(tmp_path, length=1000, questions="none"))


def test_lines_of_json_are_contexts_as_they_are(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"context": f"{BOOK} {n}"} for n in range(40)))
    assert [e.context for e in cut(path, length=100, questions="none")] == [f"{BOOK} {n}" for n in range(40)]
    assert [e.context[-2:].strip() for e in cut(path, contexts=4)] == ["0", "10", "20", "30"]


def test_a_text_in_a_script_without_spaces(tmp_path):
    text = "".join(f"第{n}天我们在海边看见了{n * 7}只海鸥。它们飞向北方去了再没有回来过。" for n in range(100))
    path = write(tmp_path / "sea.txt", text)
    for example in cut(path, length=1500, questions="auto"):
        assert tokens(example.context) <= 1500
        assert text.count(example.context + example.following) == 1
        assert example.context[-1] == "。"
        assert any(" ..." in question for question in example.questions)


def test_a_text_that_is_too_short_is_named(tmp_path):
    write(tmp_path / "a.txt", BOOK)
    write(tmp_path / "note.txt", "Call Ada.")
    with pytest.raises(BadInput, match=r"'Call Ada.' \(note\) is too short"):
        cut(tmp_path, questions="auto")


def test_examples_are_written_and_read_without_a_loss(tmp_path):
    made = builtin(byte_tokenizer(), 11, max_positions=4096)
    made += [Example(context=" \u2028 a\n\n", following="\n 海\x85"), Example(context="x", domain="日")]
    path = tmp_path / "mix.jsonl"
    path.write_text(to_json_lines(made))
    assert cut(path) == made


# --- tokens ---


def test_questions_follow_the_context_in_the_chat_template():
    tokenizer, example = word_tokenizer(CHAT_TEMPLATE), Example(context="the red stone.", questions=("? red", "? key."))
    context, questions = encode(tokenizer, example, device="cpu")
    assert tokenizer.decode(context[0]).split() == ["<bos>", "[", "user", "]", "the", "red", "stone", "."]
    endings = [tokenizer.decode(question).split() for question in questions]
    assert endings == [["?", "red", "<eos>", "[", "assistant", "]"], ["?", "key", ".", "<eos>", "[", "assistant", "]"]]


def test_the_model_continues_a_plain_text_from_its_last_token():
    for template in (None, CHAT_TEMPLATE):
        tokenizer = word_tokenizer(template)
        context, questions = encode(tokenizer, Example(context="the red stone and the key"), device="cpu")
        assert torch.cat([context[0], *questions]).tolist() == tokenizer("the red stone and the key")["input_ids"]
        assert [len(question) for question in questions] == [1]


def test_an_end_that_the_tokenizer_adds_is_not_what_a_text_goes_on_from():
    opened, closed = (
        encode(text_tokenizers.byte_tokenizer(closes), Example(context="it was"), device="cpu")
        for closes in (False, True)
    )
    assert torch.equal(opened[0], closed[0])
    assert opened[1][0].tolist() == closed[1][0].tolist()


def test_a_text_of_one_token_has_no_future():
    tokenizer = lambda text: {"input_ids": [7]}  # noqa: E731
    with pytest.raises(BadInput, match="at least two tokens"):
        encode(tokenizer, Example(context="stone"), device="cpu")


@pytest.mark.parametrize("count", ["100001", "9" * 5000, "0"])
def test_more_builtin_contexts_than_anybody_waits_for(count):
    with pytest.raises(BadInput, match="with a number of contexts, at most 100000"):
        load_examples(f"builtin:{count}", None, max_positions=512)
