"""The Python on the pages runs, and the registry lines they show are ones the registry takes."""

import re
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch

from headwise.method import ALLOCATORS, SCORERS, Entry
from headwise.scores import SnapKV

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "how-to-extend.md").read_text()


@pytest.fixture(scope="module")
def names():
    """What the page's Python defines, run from top to bottom."""
    found = {"__name__": "__main__"}
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    exec(compile(code, "how-to-extend.md", "exec"), found)
    return found


def test_the_scorer_keeps_what_the_page_says(names):
    headwise, method = names["headwise"], names["Method"](scorer=names["ValueNorm"](), allocator=names["Uniform"]())
    cache = headwise.compress(names["model"], names["context"], method, keep=0.2)
    assert cache.lengths.unique().tolist() == [20]
    assert cache.positions(0, 0, 0)[:4].tolist() == [0, 1, 2, 3]
    assert method.provenance()["scorer"] == {"name": "ValueNorm", "p": 2.0}
    pieces = headwise.compress(names["model"], names["context"], method, keep=0.2, prefill_chunk_size=7)
    assert torch.equal(pieces.positions(1, 0, 1), cache.positions(1, 0, 1))


def test_the_allocator_keeps_what_the_page_says(names):
    lengths = names["cache"].lengths[:, 0]
    assert int(lengths.sum()) == 120
    assert lengths[:, 0].diff().gt(0).all()


def test_a_wrong_parameter_is_refused(names):
    with pytest.raises(ValueError, match="ValueNorm: p=0"):
        names["ValueNorm"](p=0)


def test_the_registry_lines(names):
    lines = re.findall(r'^    ("\w+": Entry\(.*\)),$', PAGE, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        (entry,) = eval(f"{{{line}}}", {**names, "Entry": Entry}).values()
        assert is_dataclass(entry.make())
        assert entry.summary


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:src|tests)/[\w/.]+)`", PAGE))))
def test_files_the_page_names_are_there(path):
    assert (DOCS.parent / path).exists()


def test_every_scorer_and_allocator_has_its_row_in_how_to_choose():
    rows = re.findall(r"^\| `(\w+)(?:@FILE)?` \|", (DOCS / "how-to-choose.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted([*SCORERS, *ALLOCATORS])


def test_what_how_to_choose_says_about_snapkv():
    assert SnapKV().query_window == SnapKV().window == 32
