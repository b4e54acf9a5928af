"""Which answers count as right: contained, the same, or how much of them; in any script."""

import re
import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.tasks.metrics import METRICS, answers_found, exact_match, word_f1
from headwise.tasks.scripts import fold, words


@pytest.mark.parametrize(
    ("text", "answers", "share"),
    [
        ("It is blue.", ["blue"], 1.0),
        ("It is BLUE", ["Blue"], 1.0),
        ("blueberry", ["blue"], 0.0),
        ("a blue\n  whale", ["blue whale"], 1.0),
        ("whale, blue", ["blue", "whale"], 1.0),
        ("blue", ["blue", "whale"], 0.5),
        ("", ["blue"], 0.0),
        ("costs $5.00 now", ["$5.00"], 1.0),
        ("a.c", ["a.c"], 1.0),
        ("abc", ["a.c"], 0.0),  # not a pattern
        ("code 12345", ["1234"], 0.0),
        ("?!", ["?!"], 1.0),
        ("", [""], 1.0),  # a full cache that says nothing agrees with itself
        ("something", [""], 0.0),
        ("well, ...", [""], 0.0),
        ("bluebell blue", ["blue"], 1.0),  # the second time
    ],
)
def test_whole_words_in_any_case_and_order(text, answers, share):
    assert answers_found(text, answers) == share


UNSPACED = [
    ("港务长是英格丽德·弗莱特。", "英格丽德·弗莱特"),
    ("港务长是英格丽德 ・\n弗莱特。", "英格丽德·弗莱特"),  # another dot, and a line that ends within a name
    ("答えはイングリッドです。", "イングリッド"),
    ("答えはｲﾝｸﾞﾘｯﾄﾞです", "イングリッド"),
    ("คำตอบคือเจ็ดโมงครับ", "เจ็ดโมง"),
    ("ນະຄອນຫຼວງວຽງຈັນແມ່ນ", "ວຽງຈັນ"),
    ("រាជធានី\u200bភ្នំ\u200bពេញ\u200bគឺ", "ភ្នំពេញ"),  # places to break a line do not show
    ("မြို့ရန်ကုန်ဖြစ်သည်", "ရန်ကုန်"),
    ("第12章", "12"),
    ("第１２章", "12"),
    ("答案是Ingrid。", "Ingrid"),
    ("他用Windows系统", "windows 系统"),
    ("คำตอบคือ๗โมง", "7"),
    ("张三一直在家", "张三"),
    ("选项一 二 三", "二"),
]


@pytest.mark.parametrize(("text", "answer"), UNSPACED)
def test_an_answer_is_found_where_no_space_shows_where_a_word_ends(text, answer):
    """Right answers in such scripts once counted as wrong."""
    assert answers_found(text, [answer]) == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("一百二十三", "一百"),
        ("二十二", "十二"),
        ("十二", "二"),
        ("十一月", "一月"),
        ("共12万人", "12"),
        ("共 12 万人", "12"),
        ("共1.5万人", "1.5"),
        ("１２３", "12"),  # noqa: RUF001
        ("他有iPhones", "iPhone"),
        ("กี่", "ก"),  # a vowel sign is a part of its letter
        ("北京", "东京"),
    ],
)
def test_numbers_and_letters_are_not_found_in_parts(text, answer):
    assert answers_found(text, [answer]) == 0


@pytest.mark.parametrize(
    ("text", "answer", "share"),
    [
        ("정답은 잉그리드입니다.", "잉그리드", 1),
        ("서울은 크다", "서울", 1),
        ("동서울은 크다", "서울", 0),
        ("Ingrid는 왔다", "Ingrid", 1),
        ("오후3시", "3", 1),
        ("12시", "2", 0),
        ("KBS뉴스", "뉴스", 1),
        ("서울2024", "서울", 1),
        ("\u1109\u1165\u110b\u116e\u11af은", "서울", 1),  # written in letters, not in syllables
    ],
)
def test_korean_particles_follow_a_word(text, answer, share):
    assert answers_found(text, [answer]) == share


@pytest.mark.parametrize(
    ("text", "answer", "share"),
    [
        ("кот спит", "Кот", 1),
        ("котёл", "кот", 0),
        ("राम ने कहा", "राम", 1),
        ("रामा ने कहा", "राम", 0),  # a vowel sign goes on with the word
        ("كتابي", "كتاب", 0),
        ("٤٢ كتابا", "42", 1),
        ("cafe\u0301", "café", 1),
        ("cafe\u0301", "cafe", 0),
        ("STRASSE", "Straße", 1),
        ("ΟΔΟΣ", "οδος", 1),
        ("İSTANBUL", "istanbul", 1),
        ("the ﬁnal day", "final", 1),
        ("Ａｄａ Ｌｏｖｅｌａｃｅ", "ada lovelace", 1),  # noqa: RUF001
        ("It’s “so”", 'it\'s "so"', 1),  # noqa: RUF001
        ("from 1815–1852", "1815-1852", 1),  # noqa: RUF001
        ("Ing\u00adrid", "Ingrid", 1),
        ("100\u00a0000", "100 000", 1),
        ("10²", "102", 0),
        ("10²", "10", 0),
        ("1½", "11/2", 0),
        ("Foo™ is here", "Foo", 1),
        ("100㎡", "100", 1),
        ("❤\ufe0f", "❤", 1),
    ],
)
def test_one_letter_has_one_form_and_another_letter_another(text, answer, share):
    assert answers_found(text, [answer]) == share


@pytest.mark.parametrize(
    ("text", "answer", "same"),
    [
        ("The Tower!", "tower", 1),
        ("英格丽德。", "英格丽德", 1),
        ("「東京」", "東京", 1),
        ("¿Sí?", "si\u0301", 1),
        ("«Ада»…", "ада", 1),
        ("३", "3", 1),
        ("Ｙｅｓ！", "yes", 1),  # noqa: RUF001
        ("서울 시", "서울시", 1),
        ("東 京", "東京", 1),
        ("It’s", "it's", 1),  # noqa: RUF001
        ("英格丽德来了", "英格丽德", 0),
        ("≤5", "≥5", 0),
        ("√2", "2", 0),
        ("12", "1 2", 0),
        ("A", "A", 1),
        ("(a)", "A", 1),
        ("the", "A", 0),  # articles alone were once all the same
        ("", "A", 0),
        ("-", "+", 0),
        ("+", "+", 1),
        ("", "", 1),
        ("word", "", 0),
    ],
)
def test_the_same_but_for_punctuation_articles_and_spaces(text, answer, same):
    assert exact_match(text, [answer]) == same
    assert exact_match(text, ["no", answer]) == same
    assert word_f1(text, [answer]) == 1 or not same


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("It is Ingrid.", "Ingrid", 2 / 4),
        ("the answer is a", "A", 2 / 5),  # the articles of the text count too then
        ("答えはイングリッドです。", "イングリッド", 12 / 17),
        ("정답은 잉그리드입니다.", "잉그리드", 8 / 14),
        ("北京2008年", "2008", 2 / 5),
        ("北京2008年", "200", 0),
        ("กี่โมง", "กี่", 2 / 5),  # a letter with its marks is one
        ("la niña", "nin\u0303a", 2 / 3),
        ("", "word", 0),
    ],
)
def test_f1_is_of_words_or_of_letters_where_words_do_not_show(text, answer, score):
    assert word_f1(text, [answer]) == pytest.approx(score)


def test_letters_of_their_own_and_words_beside_each_other():
    assert words(fold("Ada到1843年 서울a b_c คำ")) == ["ada", "到", "1843", "年", "서", "울", "a", "b_c", "คํ", "า"]


# --- as it was, on ASCII ---


def found_as_regular_expressions_do(text: str, answers: list[str]) -> float:
    text = " ".join(text.lower().split())
    spaced = [" ".join(answer.lower().split()) for answer in answers]
    return sum(bool(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text)) for answer in spaced) / len(answers)


def squad_words(text: str) -> list[str]:
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def squad_f1(said: list[str], wanted: list[str]) -> float:
    return 2 * (Counter(said) & Counter(wanted)).total() / (len(said) + len(wanted))


FEW = st.sampled_from(["a", "A", "ab", "the", "1", "12", " ", "  ", ".", "-", "_", "'", "\n", "\t"])
ASCII = st.one_of(st.lists(FEW, max_size=8).map("".join), st.text(st.characters(max_codepoint=127), max_size=12))


NOT_BLANK = st.tuples(ASCII, st.sampled_from(["a", "the", "ab", "12", "."]), ASCII).map("".join)


@given(ASCII, st.lists(NOT_BLANK, min_size=1, max_size=3), st.data())
def test_english_is_judged_as_by_squad_and_by_whole_words(text, answers, data):
    if text.strip():  # else hardly any answer would be there
        start = data.draw(st.integers(0, len(text) - 1))
        taken = text[start : start + data.draw(st.integers(1, 5))]
        answers = [*answers, taken] if taken.strip() else answers
    assert answers_found(text, answers) == found_as_regular_expressions_do(text, answers)
    said, wanted = squad_words(text), [squad_words(answer) for answer in answers]
    if all(wanted):  # not where an answer has no word but articles
        assert exact_match(text, answers) == float(said in wanted)
        assert word_f1(text, answers) == max(squad_f1(said, words) for words in wanted)


@given(st.text(min_size=1, max_size=12))
def test_every_text_is_right_for_itself(text):
    assert fold(fold(text)) == fold(text)
    for metric in METRICS.values():
        assert metric(text, [text]) == 1
        assert metric(f"  {text}\n", [text]) == 1
