"""The page of a Budget: its numbers by hand, the file, what is refused, and the command."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from headwise import cli
from headwise.artifacts.budget import Budget
from headwise.artifacts.hulls import concave_hulls
from headwise.artifacts.origin import Origin
from headwise.errors import ArtifactMismatch, BadInput, HeadwiseError
from headwise.report.inspect import budget as report
from headwise.report.inspect.budget import at_fraction, heads_to_draw, hull_edges, kept_at, missed, plot, retained
from headwise.shapes import ModelShape

SHAPE = ModelShape(num_layers=4, layers=(1, 3), kv_heads=2, query_heads=4, head_dim=8)
KEPT = [[0.25, 0.0], [1.0, 0.25]]
# One protected token, then four ranks. Both orders retain the same of everything.
SCORER = [[[0.1, 0.1, 0.2, 0.1, 0.0], [0.02] * 5], [[0.04] * 5, [0.0, 0.0, 0.1, 0.1, 0.0]]]
IDEAL = [[[0.1, 0.2, 0.1, 0.1, 0.0], [0.02] * 5], [[0.04] * 5, [0.0, 0.1, 0.1, 0.0, 0.0]]]


@pytest.fixture(scope="module")
def budget():
    curve = torch.tensor(SCORER)
    hulls = concave_hulls(curve.flatten(0, 1)[:, 1:])
    return Budget(
        ratios=torch.tensor([0.375], dtype=torch.float64),
        fractions=torch.tensor([KEPT], dtype=torch.float64),
        origin=Origin(shape=SHAPE, model="a/$b$c", scorer="keydiff", sink=1),
        hull={"protected": curve.flatten(0, 1)[:, :1].double(), "width": hulls.width, "slope": hulls.slope},
        evidence={"curve": curve, "scorer": curve.clone(), "ideal": torch.tensor(IDEAL)},
    )


@pytest.fixture(scope="module")
def path(budget, tmp_path_factory):
    path = tmp_path_factory.mktemp("budgets") / "b.safetensors"
    budget.save(path)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command as the console script does: (exit code, stdout, stderr)."""

    def call(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["headwise", *shlex.split(line)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return call


# --- the numbers ---


def test_kept_fractions_are_the_table_s_and_between_its_rows_interpolated(budget):
    assert kept_at(budget, 0.375).tolist() == KEPT
    np.testing.assert_allclose(kept_at(budget, 0.1875), np.array(KEPT) / 2)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 15.0, float("nan")])
def test_a_ratio_is_within_0_and_1(budget, tmp_path, ratio):
    with pytest.raises(BadInput, match="strictly between 0 and 1"):
        plot(budget, tmp_path / "b.png", ratio=ratio)
    assert not list(tmp_path.iterdir())


def test_a_curve_starts_with_what_the_protected_tokens_retain(budget):
    found = retained(budget, "ideal")
    np.testing.assert_allclose(found[0], [0.1, 0.3, 0.4, 0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found[3], [0.0, 0.1, 0.2, 0.2, 0.2], rtol=1e-6)
    hull = {**budget.hull, "protected": torch.empty(4, 0)}
    without = replace(budget, origin=replace(budget.origin, sink=0), hull=hull)
    assert retained(without, "ideal").shape == (4, 6)
    assert (retained(without, "ideal")[:, 0] == 0).all()


def test_values_between_points_are_interpolated():
    curves = np.array([[0.0, 0.5, 0.6], [0.2, 0.2, 1.0]])
    assert at_fraction(curves, np.array([0.25, 1.0])).tolist() == [0.25, 1.0]


def test_a_hull_lies_over_its_curve_and_meets_its_ends(budget):
    x, gained = hull_edges(budget, 0)  # .1, .2, .1 and 0 gained: the first two are one step
    np.testing.assert_allclose(x, [0, 0.5, 0.75, 1])
    np.testing.assert_allclose(gained, [0, 0.3, 0.4, 0.4], rtol=1e-6)
    for head, curve in enumerate(retained(budget, "curve")):
        hull = curve[0] + np.interp(np.linspace(0, 1, 5), *hull_edges(budget, head))
        assert (hull >= curve - 1e-7).all()
        np.testing.assert_allclose(hull[[0, -1]], curve[[0, -1]], rtol=1e-6)


def test_what_the_scorer_misses_is_told_of_the_head_and_of_the_model(budget):
    own, of_model = missed(budget, np.array(KEPT))
    # Both heads keep one rank of four. The first gains 0.2 by importance, 0.1 by the scorer; the last 0.1 or nothing.
    np.testing.assert_allclose(own, [[0.1 / 0.5, 0], [0, 0.1 / 0.2]], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(of_model, [[0.1 / 1.0, 0], [0, 0.1 / 1.0]], rtol=1e-6, atol=1e-9)


def test_a_head_that_matters_to_nothing_misses_nothing(budget):
    nothing = {name: torch.zeros(2, 2, 5) for name in budget.evidence}
    assert all((part == 0).all() for part in missed(replace(budget, evidence=nothing), np.array(KEPT)))


def test_heads_are_chosen_from_both_ends_ties_by_utility():
    kept = np.array([0.0, 0.9, 0.0, 0.1, 0.0, 0.5, 0.2, 0.0])
    utility = np.array([0.1, 0.1, 0.4, 0.1, 0.3, 0.1, 0.1, 0.2])
    assert heads_to_draw(kept, utility).tolist() == [1, 5, 6, 2, 4, 7]
    assert heads_to_draw(kept[:1], utility[:1]).tolist() == [0]
    for heads in range(1, 9):
        assert len(set(heads_to_draw(kept[:heads], utility[:heads]).tolist())) == min(heads, 6)
    assert len(set(heads_to_draw(np.ones(8), utility).tolist())) == 6


# --- the file ---


def texts(monkeypatch, budget, path, **settings) -> str:
    """Everything written on the page."""
    said = []
    page = report._page

    def watched(*args):
        figure = page(*args)
        said.extend(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))
        return figure

    monkeypatch.setattr(report, "_page", watched)
    plot(budget, path, **settings)
    return "\n".join(said)


@pytest.mark.parametrize(
    ("name", "starts"), [("b.png", b"\x89PNG"), ("b.svg", b"<?xml"), ("b.pdf", b"%PDF"), ("B.PNG", b"\x89PNG")]
)
def test_the_page_is_written_in_the_format_of_its_name(budget, tmp_path, name, starts):
    (tmp_path / name).write_text("an older one")
    plot(budget, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(starts)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_the_page_names_model_scorer_ratio_and_the_model_s_own_layers(monkeypatch, budget, tmp_path):
    said = texts(monkeypatch, budget, tmp_path / "b.png", ratio=0.375)
    assert "a/$b$c, keydiff, 0.375 of the KV cache kept" in said
    assert "layer 3, head 1: 20.0% of all utility" in said
    assert "whole model's: 20.0% in all" in said
    assert "first 1 and last 0 tokens" in said


@pytest.mark.parametrize("without", ["evidence", "hull"])
def test_without_curves_there_is_the_map_and_the_reason(monkeypatch, budget, tmp_path, without):
    said = texts(monkeypatch, replace(budget, **{without: {}}), tmp_path / "b.png")
    assert report.NO_CURVES in said
    assert "that each head keeps" in said
    assert "misses" not in said


def test_an_imported_table_that_names_nothing(monkeypatch, tmp_path):
    np.save(tmp_path / "table.npy", np.full((99, 4, 2), 0.5))
    said = texts(monkeypatch, Budget.from_kvpress(tmp_path / "table.npy", shape=SHAPE), tmp_path / "b.svg")
    assert "model unknown, scorer unknown, 0.15" in said


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (1, 5), (80, 8), (3, 32)])
@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_models_of_any_size_and_heads_that_gain_nothing(tmp_path, layers, heads, fraction):
    """At fraction 0 no head has an order to judge; with one head or five the last row of curves is not full."""
    shape = ModelShape(num_layers=layers, layers=tuple(range(layers)), kv_heads=heads, query_heads=heads, head_dim=2)
    curve = torch.zeros(layers, heads, 4)
    hulls = concave_hulls(curve.flatten(0, 1))
    budget = Budget(
        ratios=torch.tensor([0.5]),
        fractions=torch.full((1, layers, heads), fraction),
        origin=Origin(shape=shape),
        hull={"protected": torch.empty(len(hulls.width), 0), "width": hulls.width, "slope": hulls.slope},
        evidence={"curve": curve, "scorer": curve, "ideal": curve},
    )
    plot(budget, tmp_path / "b.png", ratio=0.5)
    assert (tmp_path / "b.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("b.jpeg", "a plot is a .png, .svg, .pdf file"),
        ("b", "a plot is a .png, .svg, .pdf file"),
        ("nowhere/b.png", "the folder .*nowhere does not exist"),
        ("folder.png", "is a folder; name a file"),
    ],
)
def test_where_no_plot_can_be(budget, tmp_path, name, words):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(BadInput, match=words):
        plot(budget, tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize("shape", [(2, 2, 1), (2, 3, 5), (4, 5)])
def test_damaged_evidence_is_refused_and_nothing_half_written(budget, tmp_path, shape):
    (tmp_path / "b.png").write_text("an older one")
    with pytest.raises(BadInput, match=r"'evidence.ideal' has shape .*need \(2, 2, 5\)"):
        plot(replace(budget, evidence={**budget.evidence, "ideal": torch.zeros(*shape)}), tmp_path / "b.png")
    assert (tmp_path / "b.png").read_text() == "an older one"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failure_while_drawing_leaves_what_was_there(monkeypatch, budget, tmp_path):
    def half(figure, target, **settings):
        target.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    with pytest.raises(OSError, match="disk full"):
        plot(budget, tmp_path / "b.png")
    assert not list(tmp_path.iterdir())


# --- the command ---


def test_the_command_writes_beside_the_budget(run, path):
    code, out, err = run(f"inspect {path} --plot --json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["plot"] == str(path.with_suffix(".png"))
    assert (found["kind"], found["origin"]["model"]) == ("budget", "a/$b$c")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_where_it_is_told(run, path, tmp_path):
    code, out, err = run(f"inspect {path} --plot --out {tmp_path}/page.svg --ratio 0.25")
    assert (code, err) == (0, "")
    assert "plot" in out
    assert (tmp_path / "page.svg").is_file()
    assert "plot" not in json.loads(run(f"inspect {path} --json")[1])


def test_what_the_command_refuses(run, path, tmp_path):
    (tmp_path / "text").write_text("no budget")
    for line, words in {
        f"inspect {path} --out {tmp_path}/b.png": "add --plot",
        f"inspect {path} --plot --out {tmp_path}/b.txt": "a plot is a .png",
        f"inspect {path} --plot --out {tmp_path}/nowhere/b.png": "does not exist",
        f"inspect {path} --plot --ratio 15 --out {tmp_path}/b.png": "strictly between 0 and 1",
        f"inspect {tmp_path}/text --plot": "no safetensors file",
        f"inspect {tmp_path}/nowhere --plot": "is not a file",
    }.items():
        code, out, err = run(line)
        assert words in err
        assert (code, out, err.count("\n")) == (2, "", 1)
    assert [file.name for file in tmp_path.iterdir()] == ["text"]


def test_another_kind_of_file_is_told(run, tmp_path):
    from headwise.artifacts.tensors import write_tensors

    write_tensors(tmp_path / "part.safetensors", "part", {"x": torch.zeros(1)}, {})
    code, out, err = run(f"inspect {tmp_path}/part.safetensors --plot")
    assert "is a part of format" in err
    assert "expected a budget" in err
    assert (code, out) == (1, "")
    with pytest.raises(ArtifactMismatch):
        Budget.load(tmp_path / "part.safetensors")


def test_without_matplotlib_the_message_says_how_to_get_it(run, monkeypatch, path, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in ("draw.drawing", "inspect.budget", "inspect.gates"):
        monkeypatch.delitem(sys.modules, f"headwise.report.{module}", raising=False)
    code, out, err = run(f"inspect {path} --plot --out {tmp_path}/b.png")
    assert "pip install 'headwise[plot]'" in err
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert not list(tmp_path.iterdir())
    assert run(f"inspect {path} --json")[0] == 0
    with pytest.raises(HeadwiseError, match="plots need matplotlib"):
        import headwise.report.draw.drawing  # noqa: F401


def test_neither_headwise_nor_the_command_line_needs_matplotlib_nor_a_plot_a_display():
    code = (
        "import sys, headwise, headwise.cli; assert not {'matplotlib', 'headwise.report'} & set(sys.modules);"
        "import headwise.report.inspect.facts, headwise.report.inspect.kept; assert 'matplotlib' not in sys.modules;"
        "import headwise.report.inspect.budget, headwise.report.inspect.gates;"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
