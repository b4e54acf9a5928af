"""Judge answers as LongBench does: the nine official metrics, each from 0 to 1.

Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding", arXiv:2308.14508; official
code: https://github.com/THUDM/LongBench, LongBench/metrics.py. ROUGE and the Chinese word segmentation come from the
libraries the official code uses, `rouge` and `jieba`, loaded when a metric needs them (`pip install 'headwise[eval]'`).

Ours differs in one place: `code_sim` is computed by the standard library's difflib. That is what the official
`fuzzywuzzy` does as the official requirements install it; with python-Levenshtein beside it, or with `rapidfuzz`, the
same pair of lines can score a third higher or lower.
"""

import logging
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any

from headwise.errors import BadInput

Metric = Callable[[str, str, Sequence[str]], float]  # (prediction, answer, all classes) -> 0..1

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# The official list, which lacks a few opening brackets.
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～"  # noqa: RUF001
    "｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)
_NO_CHINESE_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)
_NO_CODE = ("`", "#", "//")  # a line with one of these is a comment or a fence around the code


def find_metric(name: str) -> Metric:
    """Return a metric, its libraries loaded. Raises BadInput if one is not installed."""
    for library in _LIBRARIES.get(name, ()):
        _load(library)
    return METRICS[name]


def qa_f1(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return F1 of the words in common, in any case, without punctuation and articles (SQuAD's)."""
    return _f1(_bare_words(prediction), _bare_words(answer))


def qa_f1_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return F1 of jieba's words in common, in any case, without punctuation."""
    return _f1(_bare_chinese_words(prediction), _bare_chinese_words(answer))


def rouge(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return ROUGE-L's F measure; 0 if the library fails, as in the official code."""
    measure = _load("rouge").Rouge(metrics=["rouge-l"])
    try:
        return measure.get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
    except (ValueError, RecursionError):  # no sentence in it; or one of about a thousand words
        return 0.0


def rouge_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return ROUGE-L's F measure of jieba's words."""
    return rouge(" ".join(_chinese_words(prediction)), " ".join(_chinese_words(answer)))


def classification(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return 1 over the number of classes that the prediction names, if the answer is one of them; else 0.

    Classes that are a part of the answer's own name do not count, unless one is named right after another such class,
    as in the official code.
    """
    named: list[str] = []
    after_dropped = False
    for label in (label for label in classes if label in prediction):
        after_dropped = not after_dropped and label != answer and label in answer
        if not after_dropped:
            named.append(label)
    return 1 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the share of the numbers in the prediction that are the paragraph's; the answer reads `Paragraph 3`."""
    return count(prediction, _number_after("Paragraph ", answer))


def retrieval_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the share of the numbers in the prediction that are the paragraph's; the answer reads `段落3`."""
    return count(prediction, _number_after("段落", answer))


def count(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the share of the numbers in the prediction that are the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def code_sim(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the similarity of the prediction's first line of code and the answer, in whole hundredths."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in _NO_CODE)), "")
    if line and answer:
        return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100
    return float(line == answer)


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    common = (Counter(prediction) & Counter(answer)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def _bare_words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split()


def _bare_chinese_words(text: str) -> list[str]:
    bare = ("".join(word.lower().translate(_NO_CHINESE_PUNCTUATION).split()) for word in _chinese_words(text))
    return [word for word in bare if word]


def _chinese_words(text: str) -> list[str]:
    jieba = _load("jieba")
    jieba.setLogLevel(logging.WARNING)  # or it announces on stderr that it reads its dictionary
    return list(jieba.cut(text, cut_all=False))


def _number_after(word: str, answer: str) -> str:
    match = re.search(rf"{word}(\d+)", answer)
    if match is None:
        raise BadInput(f"the answer {answer!r} names no paragraph; it must hold {word!r} and a number.")
    return match[1]


@cache
def _load(library: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jieba 0.42 imports pkg_resources, which warns of its end
            return import_module(library)
    except ImportError as error:
        raise BadInput(
            f"this LongBench metric needs the library {library}, which is not installed: pip install 'headwise[eval]'"
        ) from error


_LIBRARIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"qa_f1_zh": ("jieba",), "rouge": ("rouge",), "rouge_zh": ("rouge", "jieba")}
)
METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "qa_f1": qa_f1,
        "qa_f1_zh": qa_f1_zh,
        "rouge": rouge,
        "rouge_zh": rouge_zh,
        "classification": classification,
        "retrieval": retrieval,
        "retrieval_zh": retrieval_zh,
        "count": count,
        "code_sim": code_sim,
    }
)
