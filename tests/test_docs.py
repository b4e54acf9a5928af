"""The Python on the pages runs and does what they say. That what is added works: test_extending.py."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from families import random_ids, tiny_model

import headwise
from headwise import compress
from headwise.methods.registry import ALLOCATORS, SCORERS
from headwise.methods.scores import SnapKV
from headwise.models.families import shape_of

DOCS = Path(__file__).parents[1] / "docs"
README = (DOCS.parent / "README.md").read_text()
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


def test_the_pages_import_what_is_public_only():
    """A name of `headwise`, or of a module that `headwise.PUBLIC` lists; and every module there is one of those."""
    pages = [README, *(page.read_text() for page in sorted(DOCS.glob("*.md")))]
    imports = {line for page in pages for line in re.findall(r"^from (headwise\S*) import (.+)$", page, re.MULTILINE)}
    assert {name for module, names in imports if module == "headwise" for name in names.split(", ")} <= set(
        headwise.__all__
    )
    assert {module for module, _ in imports} - {"headwise"} == set(headwise.PUBLIC)


def test_a_wrong_parameter_is_refused(names):
    with pytest.raises(ValueError, match="ValueNorm: p=0"):
        names["ValueNorm"](p=0)


def test_the_suite_asks_what_the_page_says(names):
    sample, judge = names["task"].sample(4), names["task"].judge
    (question,) = sample.questions
    (box,) = re.findall(r"^What does box (\d+) hold\?$", question.prompt)
    assert f"Box {box} holds {question.answers[0]}.\n" in sample.context
    assert (judge(f"It holds {question.answers[0]}.", question), judge(box, question)) == (1, 0)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the file is left open for brevity
@pytest.mark.slow
def test_the_ten_lines_of_the_readme(model_folders, tmp_path, monkeypatch, capsys):
    """As they are, but for the model, which is a tiny one in a folder, and questions in its words."""
    (code,) = re.findall(r"^## Ten lines\n+```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert code.count("Qwen/Qwen3-4B") == 2
    assert "device_map" not in code, "it needs accelerate, which is not installed with headwise"
    (tmp_path / "report.txt").write_text("the bold fox guarded the silver bridge. " * 25)
    monkeypatch.chdir(tmp_path)
    found = {}
    tiny = {"Qwen/Qwen3-4B": str(model_folders["qwen3"]), "Who signed the report": "? locker", "What does it cost": "?"}
    for text, known in tiny.items():
        assert text in code
        code = code.replace(text, known)
    exec(compile(code, "README.md", "exec"), found)
    document, kept = found["prompt"].context.shape[1], found["cache"].lengths
    assert document == 201
    assert int(kept.sum()) == round(0.15 * document * kept.numel())
    assert document < found["answer"].shape[1] <= document + len(found["question"]) + 64
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_published_table_of_lu_kv_is_used_as_the_page_says(tmp_path, monkeypatch):
    """A table of the same layout, for a tiny model: every head keeps what the row says, protected tokens included."""
    section = re.split(r"^## ", (DOCS / "lukv.md").read_text(), flags=re.MULTILINE)
    (page,) = [part for part in section if part.startswith("The published budget for Llama-3.1-8B-Instruct")]
    make, use = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    model, ids = tiny_model("llama"), random_ids(1, 200)
    shape = shape_of(model.config)
    unlike = np.linspace(-0.5, 0.5, shape.num_layers * shape.kv_heads).reshape(shape.num_layers, shape.kv_heads)
    removed = np.arange(1, 100)[:, None, None] / 100
    table = removed + unlike * np.minimum(removed, 1 - removed)  # [99, L, H], the mean of each row is its percents
    monkeypatch.chdir(tmp_path)
    np.save("ea_0.02_sink4_win1_llama_avg_ratio.npy", table)
    model.config.save_pretrained(tmp_path / "model")
    exec(compile(make.replace("meta-llama/Llama-3.1-8B-Instruct", str(tmp_path / "model")), "lukv.md", "exec"), {})
    names = {"model": model, "input_ids": ids}
    exec(compile(use, "lukv.md", "exec"), names)
    kept = names["cache"].lengths[:, 0].numpy()
    np.testing.assert_allclose(kept, 200 * (1 - table[79]), atol=1)
    assert kept.sum() == round(0.2 * 200 * kept.size)
    for layer, head in np.ndindex(kept.shape):
        assert {0, 1, 2, 3, 199} <= {*names["cache"].positions(layer, 0, head).tolist()}
    assert names["method"].scorer.epsilon == 0.02
    by_name = compress(model, ids, "expected+fixed@llama-3.1-8b-ea.safetensors", keep=0.2)
    assert torch.equal(by_name.lengths, names["cache"].lengths)


@pytest.mark.parametrize(
    "page", [*sorted(DOCS.rglob("*.md")), *sorted(DOCS.parent.glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:src|tests)/[\w/.]+)`", PAGE))))
def test_files_the_page_names_are_there(path):
    assert (DOCS.parent / path).exists()


def test_every_scorer_and_allocator_has_its_row_in_how_to_choose():
    rows = re.findall(r"^\| `([\w-]+)(?:@FILE)?` \|", (DOCS / "how-to-choose.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted([*SCORERS, *ALLOCATORS])


def test_what_how_to_choose_says_about_snapkv():
    assert SnapKV().query_window == SnapKV().window == 32


@pytest.mark.slow
def test_the_python_page_runs_without_warnings(capsys):
    """From top to bottom, in one namespace; transformers logs what it does not warn of."""
    page = (DOCS / "python.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    found = {"__name__": "__main__"}
    exec(compile(code, "python.md", "exec"), found)
    assert "warn" not in capsys.readouterr().err.lower()  # bars of progress are fine
    assert found["later"].lengths.tolist() == found["cache"].lengths.tolist()
    assert [row.method for row in found["rows"]] == ["full", "keydiff", "keydiff"]
    assert [row.entries for row in found["stored"]] == ["native", "int4"]
