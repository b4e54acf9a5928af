"""Read LongBench's 21 datasets and the 13 of LongBench-E from files, and say how each is asked and judged.

Names, answer lengths and metrics are those of https://github.com/THUDM/LongBench, whose paper suite.py names. The
rows come from a folder, or from the official archive on the Hugging Face hub. That is fetched as a file: the library
`datasets` no longer loads it, since version 4 dropped data sets that are read by a script.
"""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from headwise.errors import BadInput
from headwise.files import strict_json
from headwise.files.archives import pieces
from headwise.files.writing import replacing

HUB_REPOSITORY, HUB_FILE = "THUDM/LongBench", "data.zip"
_URL = f"https://huggingface.co/datasets/{HUB_REPOSITORY}/resolve/main/{HUB_FILE}"
LONGEST_LINE = 2**26  # bytes
MOST_BYTES = 2**30  # of a dataset
_FORMAT = '{"input": "...", "context": "...", "answers": ["..."], "length": 12, "all_classes": null, "dataset": "..."}'


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """How a dataset is asked and judged."""

    metric: str  # a name in metrics.METRICS
    max_new_tokens: int
    chat: bool = True  # few-shot examples and code are to be continued, not replied to
    first_line: bool = False  # all that is judged of an answer
    extended: bool = False  # is in LongBench-E, where its name ends in _e


LONGBENCH_TASKS: Mapping[str, Dataset] = MappingProxyType(
    {
        "narrativeqa": Dataset(metric="qa_f1", max_new_tokens=128),
        "qasper": Dataset(metric="qa_f1", max_new_tokens=128, extended=True),
        "multifieldqa_en": Dataset(metric="qa_f1", max_new_tokens=64, extended=True),
        "multifieldqa_zh": Dataset(metric="qa_f1_zh", max_new_tokens=64),
        "hotpotqa": Dataset(metric="qa_f1", max_new_tokens=32, extended=True),
        "2wikimqa": Dataset(metric="qa_f1", max_new_tokens=32, extended=True),
        "musique": Dataset(metric="qa_f1", max_new_tokens=32),
        "dureader": Dataset(metric="rouge_zh", max_new_tokens=128),
        "gov_report": Dataset(metric="rouge", max_new_tokens=512, extended=True),
        "qmsum": Dataset(metric="rouge", max_new_tokens=512),
        "multi_news": Dataset(metric="rouge", max_new_tokens=512, extended=True),
        "vcsum": Dataset(metric="rouge_zh", max_new_tokens=512),
        "trec": Dataset(metric="classification", max_new_tokens=64, chat=False, first_line=True, extended=True),
        "triviaqa": Dataset(metric="qa_f1", max_new_tokens=32, chat=False, first_line=True, extended=True),
        "samsum": Dataset(metric="rouge", max_new_tokens=128, chat=False, first_line=True, extended=True),
        "lsht": Dataset(metric="classification", max_new_tokens=64, chat=False, first_line=True),
        "passage_count": Dataset(metric="count", max_new_tokens=32, extended=True),
        "passage_retrieval_en": Dataset(metric="retrieval", max_new_tokens=32, extended=True),
        "passage_retrieval_zh": Dataset(metric="retrieval_zh", max_new_tokens=32),
        "lcc": Dataset(metric="code_sim", max_new_tokens=64, chat=False, extended=True),
        "repobench-p": Dataset(metric="code_sim", max_new_tokens=64, chat=False, extended=True),
    }
)
LONGBENCH_E_NAMES = tuple(f"{name}_e" for name, dataset in LONGBENCH_TASKS.items() if dataset.extended)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of a dataset."""

    input: str
    context: str
    answers: tuple[str, ...]
    words: int  # of all of it, as LongBench counted them: characters if Chinese
    classes: tuple[str, ...] = ()  # all labels, where an answer is one of them


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """The place of a row. The rows of all datasets are too many for memory."""

    path: Path
    number: int
    start: int  # in bytes


def base_name(name: str) -> str:
    """Return the name without LongBench-E's ending. Raises BadInput if there is no such dataset."""
    base = name.removesuffix("_e") if name in LONGBENCH_E_NAMES else name
    if base not in LONGBENCH_TASKS:
        names = ", ".join([*LONGBENCH_TASKS, *LONGBENCH_E_NAMES])
        raise BadInput(f"LongBench has no dataset {name!r}; it has {names}.")
    return base


def length_group(words: int) -> str:
    """Return the group in which LongBench-E reports a row of so many words."""
    if words < 4000:
        return "0-4k"
    return "4-8k" if words < 8000 else "8k+"


def load_rows(name: str, data_dir: Path | None = None) -> list[Row]:
    """Return all rows of a dataset, in the order of its task's samples. Raises BadInput if one is damaged."""
    return [read_row(name, line) for line in find_rows([name], data_dir)[name]]


def find_rows(names: Sequence[str], data_dir: Path | None) -> dict[str, list[Line]]:
    """Find each dataset's rows in `<name>.jsonl`, or else in all files that are not a dataset's own, in name order.

    None for `data_dir` downloads the official files. Raises BadInput if a dataset has no rows, or a row is damaged.
    """
    folder = _download(names) if data_dir is None else data_dir
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder} with LongBench's files; unpack {_URL} and give its data folder.")
    lines_of: dict[str, list[Line]] = {name: [] for name in names}
    own = [name for name in names if (folder / f"{name}.jsonl").is_file()]
    for path in sorted(folder.glob("*.jsonl")):
        if path.stem in own:
            lines_of[path.stem] = [_checked(path.stem, line, content) for line, content in _scan(path)]
        elif path.stem not in LONGBENCH_TASKS and path.stem not in LONGBENCH_E_NAMES and len(own) < len(names):
            for line, content in _scan(path):
                name = str(content.get("dataset"))
                if name in lines_of and name not in own:
                    lines_of[name].append(_checked(name, line, content))
    for name, lines in lines_of.items():
        if not lines:
            raise BadInput(
                f"{folder} has no rows of {name}. Put {name}.jsonl there, out of {_URL}, or any .jsonl file with lines "
                f"{_FORMAT} whose dataset is {name!r}."
            )
    return lines_of


def read_row(name: str, line: Line) -> Row:
    """Read one row of a dataset. Raises BadInput if it cannot be read, or is no row."""
    try:
        with line.path.open("rb") as file:
            file.seek(line.start)
            text = file.readline(LONGEST_LINE)
    except OSError as error:
        raise BadInput(f"cannot read {line.path}: {error.strerror}.") from error
    return _parse_row(name, line, _parse(line, text))


def _checked(name: str, line: Line, content: dict[str, Any]) -> Line:
    _parse_row(name, line, content)
    return line


def _scan(path: Path) -> Iterator[tuple[Line, dict[str, Any]]]:
    start = 0
    try:
        with path.open("rb") as file:
            for number, text in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
                if len(text) > LONGEST_LINE:
                    raise BadInput(f"{path}, line {number} is longer than {LONGEST_LINE // 2**20} MiB; it is no row.")
                if text.strip():
                    line = Line(path=path, number=number, start=start)
                    yield line, _parse(line, text)
                start += len(text)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}.") from error


def _parse(line: Line, text: bytes) -> dict[str, Any]:
    try:
        content = strict_json.loads(text)
    except ValueError as error:
        raise BadInput(f"{line.path}, line {line.number} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise BadInput(f"{line.path}, line {line.number} is no row; a row reads {_FORMAT}.")
    return content


def _parse_row(name: str, line: Line, content: dict[str, Any]) -> Row:
    match content:
        case {"input": str(question), "context": str(context), "answers": [_, *_] as answers, "length": int(words)}:
            classes = content.get("all_classes") or []
            labelled = bool(classes) or LONGBENCH_TASKS[base_name(name)].metric != "classification"
            if context.strip() and _are_texts(answers) and _are_texts(classes) and labelled:
                return Row(input=question, context=context, answers=tuple(answers), words=words, classes=tuple(classes))
    raise BadInput(
        f"{line.path}, line {line.number} is no row of {name}: a row reads {_FORMAT}, with a context, at least one "
        "answer, and all_classes a list where answers are classes."
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _download(names: Sequence[str]) -> Path:
    """Put the official files of these datasets into the hub's cache, where they are not yet, and return the folder."""
    from huggingface_hub import cached_assets_path, hf_hub_download  # takes a while

    folder = cached_assets_path(library_name="headwise", namespace="longbench", subfolder="data")
    missing = [name for name in names if not (folder / f"{name}.jsonl").is_file()]
    if not missing:
        return folder
    try:
        with zipfile.ZipFile(hf_hub_download(HUB_REPOSITORY, HUB_FILE, repo_type="dataset")) as archive:
            members = {Path(member).name: member for member in archive.namelist()}
            for name in missing:
                with replacing(folder / f"{name}.jsonl") as part, part.open("wb") as file:
                    file.writelines(pieces(archive, members[f"{name}.jsonl"], MOST_BYTES))
    except Exception as error:  # the network's own errors too; the way out is the same for all
        raise BadInput(
            f"cannot download LongBench ({type(error).__name__}). Download {_URL} yourself, unpack it and give its "
            "data folder as data_dir."
        ) from error
    return folder
