"""What is said of gates, and their page: its numbers by hand, the file, what is refused, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_gates import make_gates
from test_report import run as run

from headwise.artifacts.budget import Budget
from headwise.artifacts.origin import Origin
from headwise.artifacts.tensors import describe
from headwise.errors import ArtifactMismatch, BadInput
from headwise.report.inspect import gates as report
from headwise.report.inspect.facts import KEEPS, facts
from headwise.report.inspect.gates import budgets_at, log_of, plot, series, smoothed
from headwise.shapes import ModelShape

SHAPE = ModelShape(num_layers=4, layers=(1, 3), kv_heads=2, query_heads=4, head_dim=8)
LOG = [{"step": -1, "validation": 0.5, "validation_agreement": 0.6}] + [
    {"step": step, "loss": 0.4 - step / 100, "agreement": 0.7} for step in range(30)
]
LOG[21] |= {"validation": 0.2, "validation_agreement": 0.8}
LOG[30] |= {"validation": 0.3, "validation_agreement": 0.9}
TABLE = [[0.25, 0.0], [1.0, 0.25]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gates with a log, gates without, gates of one part, and budgets."""
    folder = tmp_path_factory.mktemp("gates")
    for name, parts in {"both": ("budgets", "scores"), "budgets": ("budgets",), "scores": ("scores",)}.items():
        make_gates(SHAPE, parts=parts).save(folder / f"{name}.safetensors")
    (folder / "both.safetensors.log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LOG))
    origin = Origin(shape=SHAPE, model="a/b", scorer="keydiff")
    fractions = torch.tensor([TABLE], dtype=torch.float64)
    budget = Budget(ratios=torch.tensor([0.375], dtype=torch.float64), fractions=fractions, origin=origin)
    budget.save(folder / "budget.safetensors")
    other = replace(origin, shape=replace(SHAPE, head_dim=16))
    replace(budget, origin=other).save(folder / "other.safetensors")
    return folder


@pytest.fixture
def said(monkeypatch):
    """Everything written on the pages that are drawn."""
    found, page = [], report._page

    def watched(*args):
        figure = page(*args)
        found.extend(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))
        return figure

    monkeypatch.setattr(report, "_page", watched)
    return found


# --- what is said ---


def test_facts_are_the_header_the_parts_and_the_budgets(folder):
    path = folder / "both.safetensors"
    found, gates = facts(path), make_gates(SHAPE)
    assert found["parts"] == ["budgets (LKV-H)", "scores (LKV-T)"]
    assert found["settings"] == gates.settings
    assert list(found["budgets"]) == [str(keep) for keep in KEEPS]
    for keep, rows in found["budgets"].items():
        torch.testing.assert_close(torch.tensor(rows).flatten(), gates.fractions(float(keep)))
        assert np.mean(rows) == pytest.approx(float(keep), rel=1e-3)
    assert {name: found[name] for name in describe(path)} == describe(path)


def test_facts_of_one_part_and_of_other_files(folder):
    scores = facts(folder / "scores.safetensors")
    assert scores["parts"] == ["scores (LKV-T)"]
    assert "budgets" not in scores
    budget = facts(folder / "budget.safetensors")
    assert budget.pop("budgets")["0.15"]
    assert budget == describe(folder / "budget.safetensors")


def test_facts_of_a_format_that_is_not_read_any_more_are_its_header(monkeypatch, folder):
    monkeypatch.setattr("headwise.report.inspect.facts.FORMAT_VERSIONS", {"gates": 0})
    assert "parts" not in facts(folder / "both.safetensors")


# --- the numbers of the page ---


def test_a_log_is_read_with_what_was_measured_before_the_first_step(folder):
    log = log_of(folder / "both.safetensors")
    assert log == LOG
    steps, values = series(log, "validation")
    assert (steps.tolist(), values.tolist()) == ([0, 21, 30], [0.5, 0.2, 0.3])
    assert len(series(log, "loss")[0]) == 30
    assert log_of(folder / "scores.safetensors") == []


@pytest.mark.parametrize("line", ["", '{"loss": 1}', "[1, 2]", "3", '{"step": "x"}', '{"step": 1, "loss": null}', "{"])
def test_a_log_that_is_none_is_refused_with_its_line(tmp_path, line):
    (tmp_path / "g.log.jsonl").write_text(f'{{"step": 0}}\n{line}\n')
    if not line:
        assert log_of(tmp_path / "g") == [{"step": 0}]
        return
    with pytest.raises(BadInput, match=r"log.jsonl, line 2 is no line of a training log"):
        log_of(tmp_path / "g")


def test_curves_are_means_of_neighbours_with_the_middle_of_them():
    steps = np.arange(1.0, 41)  # two by two
    at, mean, low, high = smoothed(steps, 10 * steps)
    assert at.tolist() == [step + 0.5 for step in range(1, 40)]
    np.testing.assert_allclose(mean, 10 * at)
    np.testing.assert_allclose([low, high], [mean - 4, mean + 4])
    assert smoothed(steps[:3], steps[:3]).tolist() == [[1, 2, 3]] * 4
    assert smoothed(steps[:0], steps[:0]).shape == (4, 0)


def test_budgets_of_either_kind_may_be_beside(folder):
    gates = make_gates(SHAPE)
    kind, kept = budgets_at(folder / "budget.safetensors", gates, 0.375)
    assert (kind, kept.tolist()) == ("budget for keydiff", TABLE)
    kind, kept = budgets_at(folder / "budgets.safetensors", gates, 0.2)
    assert kind == "learned (LKV)"
    np.testing.assert_allclose(kept.flatten(), gates.fractions(0.2))
    with pytest.raises(ArtifactMismatch, match="The budget was made for a/b with"):
        budgets_at(folder / "other.safetensors", gates, 0.2)
    hashed = make_gates(SHAPE, "one")
    make_gates(SHAPE, "other").save(folder / "hashed.safetensors")
    with pytest.raises(ArtifactMismatch, match="The gates were trained for a/b"):
        budgets_at(folder / "hashed.safetensors", hashed, 0.2)


# --- the file ---


@pytest.mark.parametrize(("name", "starts"), [("g.png", b"\x89PNG"), ("g.svg", b"<?xml"), ("g.pdf", b"%PDF")])
def test_the_page_is_written_in_the_format_of_its_name(folder, tmp_path, name, starts):
    (tmp_path / name).write_text("an older one")
    plot(folder / "both.safetensors", tmp_path / name, beside=folder / "budget.safetensors")
    assert (tmp_path / name).read_bytes().startswith(starts)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_the_page_names_both_files_and_draws_the_log(folder, tmp_path, said):
    plot(folder / "both.safetensors", tmp_path / "g.png", ratio=0.375, beside=folder / "budget.safetensors")
    for words in (
        "a/b, 0.375 of the KV cache kept",
        "a  both.safetensors\nlearned (LKV)",
        "b  budget.safetensors\nbudget for keydiff",
        "Loss: unexplained share of the full cache's logits",
        "Answer tokens on which full and cut cache agree",
        "gates in the file",
        f"{report.MAPS_NOTE}\n{report.CURVES_NOTE}",
    ):
        assert words in said


def test_maps_share_one_colour_scale(monkeypatch, folder, tmp_path):
    most, draw = [], report.draw_map
    monkeypatch.setattr(report, "draw_map", lambda *args: most.append(args[-1]) or draw(*args))
    plot(folder / "both.safetensors", tmp_path / "g.png", ratio=0.375, beside=folder / "budget.safetensors")
    assert most == [1.0, 1.0]


def test_without_a_log_there_are_maps_only_and_without_budgets_curves_only(folder, tmp_path, said):
    plot(folder / "budgets.safetensors", tmp_path / "g.png")
    assert "a  budgets.safetensors\nlearned (LKV)" in said
    assert not any("Loss" in words for words in said)
    said.clear()
    path = tmp_path / "scores.safetensors"
    make_gates(SHAPE, parts=("scores",)).save(path)
    (tmp_path / "scores.safetensors.log.jsonl").write_text('{"step": -1, "validation": 0.5}\n')
    plot(path, tmp_path / "g.png")
    assert "a/b" in said
    assert "validation" in said
    assert "KV head" not in said


@pytest.mark.parametrize("rows", [['{"step": 0, "loss": 1}'], ['{"step": 0, "validation": NaN}'], ['{"step": 3}']])
def test_a_log_of_any_length(folder, tmp_path, rows):
    make_gates(SHAPE).save(tmp_path / "g.safetensors")
    (tmp_path / "g.safetensors.log.jsonl").write_text("\n".join(rows))
    plot(tmp_path / "g.safetensors", tmp_path / "g.png")
    assert (tmp_path / "g.png").is_file()


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (80, 8), (3, 32)])
def test_models_of_any_size(tmp_path, layers, heads):
    shape = ModelShape(num_layers=layers, layers=tuple(range(layers)), kv_heads=heads, query_heads=heads, head_dim=2)
    make_gates(shape, parts=("budgets",)).save(tmp_path / "g.safetensors")
    plot(tmp_path / "g.safetensors", tmp_path / "g.png", ratio=0.5, beside=tmp_path / "g.safetensors")
    assert (tmp_path / "g.png").stat().st_size > 5_000


# --- the command ---


def test_the_command_prints_what_gates_are(run, folder):
    code, out, err = run(f"inspect {folder}/both.safetensors")
    assert (code, err) == (0, "")
    for words in ("lkv@", "budgets (LKV-H) and scores (LKV-T)", "a/b: ", "least of a head", "0.0625"):
        assert words in out
    assert "settings.seed" not in out
    code, out, err = run(f"inspect {folder}/both.safetensors -v")
    assert (code, err) == (0, "")
    for words in ("gates", "budgets (LKV-H)", "settings.seed", "origin.model", "a/b", "(least to most)", "0.0625"):
        assert words in out
    assert "least" not in run(f"inspect {folder}/scores.safetensors")[1]
    found = json.loads(run(f"inspect {folder}/both.safetensors --json")[1])
    assert found["budgets"]["0.15"] == facts(folder / "both.safetensors")["budgets"]["0.15"]


def test_the_command_draws(run, folder, tmp_path):
    line = f"inspect {folder}/both.safetensors --plot --beside {folder}/budget.safetensors --json"
    found = json.loads(run(line)[1])
    assert found["plot"] == str(folder / "both.png")
    assert (folder / "both.png").read_bytes().startswith(b"\x89PNG")
    assert run(f"{line} --out {tmp_path}/g.svg --ratio 0.05")[0] == 0
    assert (tmp_path / "g.svg").is_file()


def test_what_the_command_refuses(run, folder, tmp_path):
    (tmp_path / "text").write_text("no budget")
    draw = f"inspect {folder}/both.safetensors --plot --out {tmp_path}/g.png"
    for line, words, expected in [
        (f"inspect {folder}/both.safetensors --beside {folder}/budget.safetensors", "add --plot", 2),
        (f"{draw} --beside {tmp_path}/text", "no safetensors file", 2),
        (f"{draw} --beside {folder}/other.safetensors", "The budget was made for a/b", 1),
        (f"{draw} --beside {folder}/scores.safetensors", "holds scores only", 2),
        (f"{draw} --ratio 1", "strictly between 0 and 1", 2),
        (f"{draw} --context {tmp_path}/text", "are for the plot of a cache", 2),
        (f"inspect {folder}/scores.safetensors --plot --out {tmp_path}/g.png", "holds scores only", 2),
        (f"inspect {folder}/both.safetensors --plot --out {tmp_path}/g.html", "a plot is a .png", 2),
        (f"inspect {folder}/budget.safetensors --plot --beside {folder}/both.safetensors", "drawn beside gates", 2),
    ]:
        code, out, err = run(line)
        assert words in err
        assert (code, out, err.count("\n")) == (expected, "", 1)
    assert [file.name for file in tmp_path.iterdir()] == ["text"]


def test_a_log_s_lines_end_at_line_feeds_only(tmp_path):
    (tmp_path / "g.log.jsonl").write_bytes('{"step": 0,\r"loss": 1}\n{"step": 1, "of \u2028": 2}\n'.encode())
    assert log_of(tmp_path / "g") == [{"step": 0.0, "loss": 1.0}, {"step": 1.0, "of \u2028": 2.0}]
