"""Make RULER's questions about documents: SQuAD for qa_1 and HotpotQA for qa_2, read from files."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from headwise.errors import BadInput
from headwise.tasks.ruler.drafts import Draft, Family, Prepared, Prompt, Setting
from headwise.tasks.ruler.sources import first_file, read_json

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)

FILES = {  # of a data folder, the first that is there
    "squad": ("squad.json", "dev-v2.0.json", "*squad*.json", "xquad*.json"),
    "hotpotqa": ("hotpotqa.json", "*hotpot*.json"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentQuestion:
    """A question, the numbers of the documents that hold its answer, and of all documents on its subject."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    subject: tuple[int, ...] = ()  # shared by all questions on it: they may be thousands

    @property
    def related(self) -> tuple[int, ...]:
        """Documents on the subject that do not hold the answer."""
        return tuple(number for number in self.subject if number not in self.documents)


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Documents and questions about them."""

    documents: tuple[str, ...]
    questions: tuple[DocumentQuestion, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionAnswering(Family):
    """A question, the documents that answer it, and others."""

    dataset: Literal["squad", "hotpotqa"]
    tokens_to_generate: int = 32
    any_answer_counts: ClassVar[bool] = True

    def has_data(self, data_dir: Path | None) -> bool:
        """Return whether the folder holds its file. Raises BadInput if there is no such folder."""
        return first_file(data_dir, FILES[self.dataset]) is not None

    def prepare(self, setting: Setting) -> Prepared:
        corpus = load_squad(setting.data_dir) if self.dataset == "squad" else load_hotpotqa(setting.data_dir)
        return Prepared(draft=partial(_draft_documents, corpus), most_samples=len(corpus.questions))


def load_squad(data_dir: Path | None) -> Corpus:
    """Read SQuAD for qa_1, without questions that have no answer, as RULER does. Raises BadInput if it is missing."""
    advice = (
        "put SQuAD's dev-v2.0.json (https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json) "
        "into the data folder as squad.json"
    )
    return _load_corpus(data_dir, "qa_1", FILES["squad"], _parse_squad, advice)


def load_hotpotqa(data_dir: Path | None) -> Corpus:
    """Read HotpotQA in its distractor setting for qa_2. Raises BadInput if it is missing."""
    advice = (
        "put HotpotQA's hotpot_dev_distractor_v1.json "
        "(http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json) into the data folder as hotpotqa.json"
    )
    return _load_corpus(data_dir, "qa_2", FILES["hotpotqa"], _parse_hotpotqa, advice)


def _draft_documents(corpus: Corpus, index: int) -> Draft:
    """Take documents one by one, and then words of one more."""
    question = corpus.questions[index]

    def write_cut(num_whole: int, rng: np.random.Generator, num_words: int) -> Prompt:
        return _write_documents(corpus, question, rng, num_whole, num_words)

    return Draft(
        write=partial(_write_documents, corpus, question),
        fewest=len(question.documents),
        then=lambda size: Draft(write=partial(write_cut, size), fewest=0),
    )


def _write_documents(
    corpus: Corpus, question: DocumentQuestion, rng: np.random.Generator, num_whole: int, num_words_more: int = 0
) -> Prompt:
    order = _order_documents(corpus, question, rng)
    num_documents = num_whole + (num_words_more > 0)
    rounds = math.ceil(num_documents / len(order))
    documents = [corpus.documents[number] for number in (order * rounds)[:num_documents]]
    if num_words_more:
        documents[-1] = _first_words(documents[-1], num_words_more)
    # A smaller prompt has the same documents in the same order, so that the tokens grow with the size.
    shuffled = [documents[i] for i in np.argsort(rng.random(num_documents))]
    numbered = (f"Document {n}:\n{document}" for n, document in enumerate(shuffled, start=1))
    return Prompt(
        context=f"{INSTRUCTION}\n\nThe following are given documents.\n\n" + "\n\n".join(numbered),
        question=f"\n\n{INSTRUCTION}\n\nQuestion: {question.question}",
        answer_prefix=" Answer:",
        answers=question.answers,
    )


def _order_documents(corpus: Corpus, question: DocumentQuestion, rng: np.random.Generator) -> list[int]:
    """Order all documents by when they are taken: the needed ones, those on the same subject, the others."""
    related = question.related
    unrelated = np.setdiff1d(np.arange(len(corpus.documents)), [*question.documents, *related])
    return [*question.documents, *rng.permutation(related).astype(int).tolist(), *rng.permutation(unrelated).tolist()]


def _first_words(text: str, num_words: int) -> str:
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return text[: ends[num_words - 1]] if num_words < len(ends) else text


def _load_corpus(
    data_dir: Path | None, task: str, patterns: Iterable[str], parse: Callable[[Any], Corpus], advice: str
) -> Corpus:
    path = first_file(data_dir, patterns)
    if path is None:
        where = "no data folder is given" if data_dir is None else f"{data_dir} has no such file"
        raise BadInput(f"{task} needs questions and documents, and {where}; {advice}.")
    content = read_json(path)
    try:
        corpus = parse(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path} is damaged ({type(error).__name__}: {error!s:.200}); {advice}.") from error
    if not corpus.questions or not corpus.documents:
        raise BadInput(f"{path} holds no questions with documents; {advice}.")
    return corpus


def _parse_squad(content: Any) -> Corpus:
    articles = [article["paragraphs"] for article in content["data"]]
    documents, number = _number(paragraph["context"] for article in articles for paragraph in article)
    questions = []
    for article in articles:
        numbers = tuple(dict.fromkeys(number[paragraph["context"]] for paragraph in article))
        for paragraph in article:
            document = number[paragraph["context"]]
            questions += [
                DocumentQuestion(
                    question=str(qa["question"]), answers=_texts(qa), documents=(document,), subject=numbers
                )
                for qa in paragraph["qas"]
                if not qa.get("is_impossible", False) and _texts(qa)
            ]
    return Corpus(documents=documents, questions=tuple(questions))


def _texts(qa: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the different answers."""
    return tuple(dict.fromkeys(str(answer["text"]) for answer in qa["answers"]))


def _parse_hotpotqa(content: Any) -> Corpus:
    contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in _paragraphs(entry)] for entry in content]
    documents, number = _number(document for context in contexts for document in context)
    questions = tuple(
        DocumentQuestion(
            question=str(entry["question"]),
            answers=(str(entry["answer"]),),
            documents=tuple(dict.fromkeys(number[document] for document in context)),
        )
        for entry, context in zip(content, contexts, strict=True)
    )
    return Corpus(documents=documents, questions=questions)


def _paragraphs(entry: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return titles and sentences, from HotpotQA's own format or that of Hugging Face's copy."""
    context = entry["context"]
    if isinstance(context, dict):
        return list(zip(context["title"], context["sentences"], strict=True))
    return [(title, sentences) for title, sentences in context]


def _number(documents: Iterable[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Sort the different documents, and give each its number."""
    ordered = tuple(sorted(set(documents)))
    if not all(isinstance(document, str) for document in ordered):
        raise TypeError("a document is no text")
    return ordered, {document: n for n, document in enumerate(ordered)}
