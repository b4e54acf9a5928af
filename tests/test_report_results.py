"""The report of evaluations: reading and merging, the numbers by hand and by a slow bootstrap, the page, the files."""

import base64
import csv
import io
import json
import random
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from html.parser import HTMLParser
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from scipy.stats import beta
from scipy.stats import t as student

from headwise.errors import BadInput
from headwise.report.draw.charts import charts, log_ticks, ticks
from headwise.report.draw.markup import Entry, Table
from headwise.report.draw.picture import apart
from headwise.report.quality import results, tables
from headwise.report.quality.notes import explanations, warnings
from headwise.report.quality.page import page
from headwise.report.quality.records import load
from headwise.report.quality.results import as_csv, markdown, summaries_by_name, write_report
from headwise.report.quality.statistics import Estimate, Setting, interval
from headwise.report.quality.summary import summarise

TAG = "<script>alert('|')</script>"
VERSIONS = {"headwise": "0.1.0", "torch": "2.11.0", "transformers": "5.4.0", "python": "3.11.9"}
RUN = {
    "format": 1,
    "model": "reference",
    "config_hash": "abc",
    "shape": {"num_layers": 3, "layers": [0, 2], "kv_heads": 2, "query_heads": 4, "head_dim": 8},
    "tasks": ["a"],
    "methods": ["full", "snapkv"],
    "keeps": ["0.25"],
    "protocol": "query-agnostic",
    "samples": 2,
    "seed": 0,
    "length": 512,
    "dtype": "float32",
    "device": "cpu",
    "hardware": "a CPU, 2 threads",
    "versions": VERSIONS,
    "command": f"headwise eval --methods 'full,{TAG}' --out DIR",
    "started": "2026-11-26T18:00:00",
}


def record(
    method: str = "snapkv", score: Any = 1.0, *, task="s:a", index: Any = 0, keep="0.25", fraction=0.25, **known
):
    """One line of records.jsonl."""
    if method == "full":
        keep, fraction = "1.0", 1.0
    return {
        "task": task,
        "index": index,
        "length": 512,
        "method": method,
        "keep": keep,
        "protocol": "query-agnostic",
        "seed": 0,
        "predictions": [TAG],
        "answers": [["b"]],
        "scores": [score],
        "score": score,
        "kl": None,
        "agreement": None,
        "nll": None,
        "context_tokens": 100,
        "kv_bytes": int(1000 * fraction),
        "full_kv_bytes": 1000,
        "sliding_kv_bytes": 0,
        "peak_kv_bytes": int(1000 * fraction) + 100,
        "prefill_seconds": 0.5,
        "prefill_shared_by": 3,
        "decode_seconds": 2.0,
        "decode_rows": 8,
        "step_ms": 5.0,
        "kept": [[10, 20], [30, 40]],
        "versions": VERSIONS,
        **known,
    }


@pytest.fixture
def folder(tmp_path):
    """A function that writes a folder of `headwise eval`: its records, or lines of text, and changes to run.json."""

    def write(name, records, maps=(), **run):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({**RUN, **run}))
        lines = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in records]
        (tmp_path / name / "records.jsonl").write_text("".join(lines))
        if maps:
            (tmp_path / name / "maps.jsonl").write_text("".join(json.dumps(found) + "\n" for found in maps))
        return tmp_path / name

    return write


def scores(method, values, **known):
    return [record(method, value, index=index, **known) for index, value in enumerate(values)]


def summary(*folders):
    (section,) = load(folders).sections
    return summarise(section)


# --- the numbers ---


def test_every_task_counts_the_same_by_hand(folder):
    """Task a: 0.5 of 1.0, two samples; task b: 0.25 of 0.5, four samples."""
    found = summary(
        folder(
            "d",
            scores("full", [1, 1])
            + scores("snapkv", [1, 0], fraction=0.2)
            + scores("full", [1, 0, 1, 0], task="s:b")
            + scores("snapkv", [0, 0, 1, 0], task="s:b", fraction=0.4),
        )
    )
    overall, full = found.overall[Setting("snapkv", "0.25")], found.full
    assert full is not None and full.score is not None and overall.score is not None and overall.of_full is not None
    assert full.score.value == 0.75
    assert overall.score.value == 0.375
    assert overall.of_full.value == 0.5
    assert overall.cost.kv_fraction == pytest.approx(0.3)
    assert overall.cost.decode_seconds == 0.25
    np.testing.assert_allclose(overall.kept, [[0.1, 0.2], [0.3, 0.4]])
    assert [task.label for task in found.tasks] == ["a", "b"]
    (cells,) = ([cell.samples for cell in found.cells.values()],)
    assert cells == [2, 2, 4, 4]


@pytest.mark.parametrize(("right", "samples"), [(2, 2), (0, 2), (1, 1), (1, 2), (20, 20), (19, 20), (7, 100)])
def test_of_right_and_wrong_answers_the_interval_is_jeffreys(right, samples):
    """Two right answers of two were once 100.0 ± 0.0. The interval holds the mean."""
    found = interval([1.0] * right + [0.0] * (samples - right))
    assert found is not None and found.low is not None and found.high is not None
    low, high = beta.ppf([0.025, 0.975], right + 0.5, samples - right + 0.5)
    expected = (low if right else 0.0, high if right < samples else 1.0)
    assert (found.low, found.high) == pytest.approx(expected, abs=0.03)
    assert found.low <= found.value == right / samples <= found.high


def test_without_a_score_there_is_no_interval():
    assert interval([]) is None


def test_more_samples_that_score_the_same_are_surer():
    ends = [found.low for n in (1, 2, 5, 20, 100) if (found := interval([0.8] * n)) and found.low is not None]
    assert ends == sorted(ends)
    assert 0.1 < ends[0] < 0.4 and 0.75 < ends[-1] < 0.8


def test_means_of_several_tasks_are_those_of_a_slow_bootstrap(folder):
    """Samples are reweighted within their tasks, and tasks count the same, whatever their number of samples."""
    draw = random.Random(0)
    tasks = {"s:a": [draw.random() for _ in range(30)], "s:b": [draw.random() ** 3 for _ in range(12)]}
    records = [line for task, values in tasks.items() for line in scores("snapkv", values, task=task)]
    score = summary(folder("d", records)).overall[Setting("snapkv", "0.25")].score

    def reweighted(values):
        weights = [draw.gammavariate(1, 1) for _ in values] + [draw.gammavariate(0.5, 1) for _ in (0, 1)]
        return sum(w * x for w, x in zip(weights, [*values, 0.0, 1.0], strict=True)) / sum(weights)

    means = sorted(fmean(reweighted(values) for values in tasks.values()) for _ in range(8000))
    assert score is not None
    assert score.value == pytest.approx(fmean(fmean(values) for values in tasks.values()))
    assert (score.low, score.high) == pytest.approx((means[200], means[7800]), abs=0.01)


def test_ratios_to_the_full_cache_see_the_same_weights(folder):
    """A method that gets half of every sample right that the full cache gets right is near one half, far surer than
    its score is; and the full cache's share of its own score is certain.
    """
    whole = [1.0, 0.2, 0.6, 0.0, 0.8] * 8
    found = summary(folder("d", scores("full", whole) + scores("snapkv", [value / 2 for value in whole])))
    ratio, score = (getattr(found.overall[Setting("snapkv", "0.25")], name) for name in ("of_full", "score"))
    assert ratio.value == 0.5
    assert 0.4 < ratio.low < 0.5 < ratio.high < 0.62
    assert (ratio.high - ratio.low) / ratio.value < (score.high - score.low) / score.value
    assert found.full is not None and found.full.of_full == Estimate(value=1.0)


def test_where_two_samples_agree_their_ratio_is_unsure(folder):
    found = summary(folder("d", scores("full", [1, 1]) + scores("snapkv", [1, 1])))
    ratio = found.overall[Setting("snapkv", "0.25")].of_full
    assert ratio is not None and ratio.low is not None and ratio.high is not None
    assert ratio.low < 0.7 and ratio.high > 1.3
    assert "**100.0 (100.0 to 100.0)**" not in tables.quality(found, "0.25").markdown()


def test_divergences_are_spread_by_student_s_t(folder):
    draw = np.random.default_rng(0)
    for n in (3, 10, 40):
        values = draw.normal(10, 1, n)
        (kl,) = [
            one.kl
            for one in summary(
                folder(f"d{n}", [record(kl=float(x), index=i) for i, x in enumerate(values)])
            ).overall.values()
        ]
        half = student.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5
        assert kl is not None and kl.low is not None and kl.high is not None
        assert (kl.low, kl.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.25 * half)


def test_a_perplexity_is_of_mean_nats_and_no_part_of_the_score(folder):
    records = scores("full", [1, 1]) + scores("snapkv", [1, 0])
    for method, nats in (("full", (1.0, 2.0)), ("snapkv", (2.0, 3.0))):
        records += [record(method, None, task="s:p", index=i, nll=value) for i, value in enumerate(nats)]
    found = summary(folder("d", records))
    overall = found.overall[Setting("snapkv", "0.25")]
    assert [task.label for task in found.scored] == ["a"]
    assert overall.score is not None and overall.score.value == 0.5
    found_nats = overall.perplexity
    assert found_nats is not None and found_nats.low is not None and found_nats.high is not None
    assert found_nats.value == pytest.approx(np.exp(2.5))
    assert found_nats.low == 1.0 and found_nats.high > np.exp(6), "of two samples little is known"
    assert tables.quality(found, "0.25").columns[-1] == "p ↓"
    assert [chart.title for chart in charts(found)][-1] == "Perplexity on one task (less is better)"


def test_of_a_single_sample_no_divergence_is_known_and_little_of_its_score(folder):
    lines = [record("full", 1), record("snapkv", 1, kl=0.2), record("keydiff", 0, kl=0.3)]
    found = summary(folder("d", lines))
    overall = found.overall[Setting("snapkv", "0.25")]
    assert overall.kl == Estimate(value=0.2)
    assert overall.score is not None and overall.score.low is not None
    assert overall.score.low < 0.25 and overall.score.high == 1.0
    assert re.search(
        r"\| snapkv \| 25.0 \| \*\*100.0 \(\d+.\d to \d+.\d\)\*\* \|", tables.quality(found, "0.25").markdown()
    )
    assert "0.200 (-)" in "".join(table.markdown() for table in tables.fidelity(found))


def test_the_best_is_bold_and_who_overlaps_it_is_marked(folder):
    values = {"full": 1.0, "a": 0.9, "b": 0.88, "c": 0.1}
    spread = [-0.1, -0.05, 0.0, 0.05, 0.1] * 4
    records = [line for name, mean in values.items() for line in scores(name, [mean + x for x in spread])]
    found = {name: entries[-1] for name, entries in tables.quality(summary(folder("d", records)), "0.25").rows}
    assert {name: (entry.best, entry.close) for name, entry in found.items()} == {
        "full": (False, False),
        "a": (True, False),
        "b": (False, True),
        "c": (False, False),
    }


def test_means_are_over_tasks_that_every_method_has(folder):
    """A run that was killed in its last task still has a mean, and says over what."""
    records = [line for m in ("full", "snapkv", "keydiff") for line in scores(m, [1, 0])]
    records += [line for m in ("full", "snapkv") for line in scores(m, [0, 0], task="s:b")]
    found = summary(folder("d", records))
    assert [task.label for task in found.scored] == ["a"]
    assert {one.score.value for one in found.overall.values() if one.score} == {0.5}
    assert warnings(found) == ["Not every method has b: means are over the other tasks."]


def test_without_a_common_task_there_are_no_means(folder):
    found = summary(folder("d", scores("full", [1, 1]) + scores("snapkv", [1, 0], task="s:b")))
    assert [one.score for one in found.overall.values()] == [None, None]
    assert "No mean, for some of its tasks are missing: full at keep 1.0, snapkv at keep 0.25." in warnings(found)
    assert charts(found) == []


def test_keeps_are_in_the_order_of_their_bytes(folder):
    keeps = {"1024tok": 0.5, "0.25": 0.25, "2GiB": 0.9}
    records = [line for keep, part in keeps.items() for line in scores("snapkv", [1], keep=keep, fraction=part)]
    assert summary(folder("d", records)).keeps == ("0.25", "1024tok", "2GiB")


def test_ticks_are_round():
    assert ticks(0.3, 8.2) == [2, 4, 6, 8]
    assert ticks(14.955, 15.045) == pytest.approx([14.96, 14.98, 15.0, 15.02, 15.04])
    assert log_ticks(6.0, 90.0) == [10, 20, 50]


def test_labels_move_apart_from_their_middle():
    np.testing.assert_allclose(apart(np.array([0.5, 0.5, 0.9]), 0.1), [0.45, 0.55, 0.9])
    crowded = apart(np.full(9, 1.0), 0.1)
    np.testing.assert_allclose(crowded, np.arange(9) * 0.1 + 0.15)


# --- entries in fewer bits ---


@pytest.fixture
def stored(folder):
    """Eviction alone, quantisation alone and both: a file of an earlier version beside one that names entries."""
    earlier = scores("full", [1, 1, 1, 1]) + scores("snapkv", [1, 1, 0, 0], keep="0.25", fraction=0.25)
    earlier += scores("snapkv", [0, 0, 0, 0], keep="0.1", fraction=0.1)
    settings = {("1", "int4"): ([1, 1, 1, 0], 0.28), ("0.25", "int4"): ([1, 1, 1, 0], 0.07)}
    settings[("0.25", "native")] = ([1, 1, 0, 0], 0.25)
    later = [
        line
        for (keep, entries), (values, fraction) in settings.items()
        for line in scores("snapkv", values, keep=keep, fraction=fraction, entries=entries, kl=0.5)
    ]
    maps = [token_map(), token_map(entries="int4")]
    known = {"keeps": ["0.25", "1"], "entries": ["native", "int4"]}
    return [folder("earlier", earlier), folder("later", later, maps, **known)]


def test_entries_of_one_kind_are_a_curve(stored):
    """What names no entries is native: the same setting of two folders counts once."""
    loaded = load(stored)
    found = summarise(loaded.sections[0])
    assert loaded.duplicates == 4
    assert [curve.name for curve in found.curves] == ["snapkv", "snapkv, int4"]
    assert found.methods == ("snapkv",)
    lines = {line.method: [point.x for point in line.points] for line in charts(found)[0].lines}
    assert lines == {"snapkv": pytest.approx([10, 25]), "snapkv, int4": pytest.approx([7, 28])}
    assert charts(found)[0].lines[0].style != charts(found)[0].lines[1].style
    overall = found.overall[Setting("snapkv", "0.25", "int4")]
    assert overall.score is not None and overall.score.value == 0.75


def test_tables_name_entries_beside_measured_bytes(stored):
    found = summary(*stored)
    rows = {name: entries[0].text for name, entries in tables.quality(found, "0.25").rows}
    assert rows == {"full": "100.0", "snapkv": "25.0", "snapkv, int4": "7.0"}
    headline = tables.headline(found)
    assert [name for name, _ in headline.rows] == ["0.1", "0.25", "0.25, int4", "1, int4"]
    assert [name for name, _ in tables.fidelity(found)[0].rows] == ["snapkv", "snapkv, int4"]
    (frontier,) = tables.frontier(found)
    assert [(name, *(entry.text for entry in entries[:3])) for name, entries in frontier.rows] == [
        ("snapkv, int4", "0.25", "7.0", "75.0")
    ]
    (told,) = [text for text in explanations(found) if "stored in fewer bits" in text]
    assert told.startswith("int4 behind a method's name: ")


def test_means_are_over_tasks_that_entries_of_every_kind_have(folder):
    lines = [line for entries in ("native", "int4") for line in scores("snapkv", [1, 0], entries=entries)]
    found = summary(folder("d", [*lines, *scores("snapkv", [0, 0], task="s:b")]))
    assert [task.label for task in found.scored] == ["a"]
    assert warnings(found)[0] == "Not every method has b: means are over the other tasks."


def test_the_frontier_is_what_no_other_setting_beats(folder):
    """By hand, with a perplexity too: less of it is better. The oracle is on no frontier."""
    points = {
        ("a", "native"): (0.1, 0.2),
        ("a", "int4"): (0.2, 0.6),
        ("b", "native"): (0.3, 0.5),
        ("b", "int4"): (0.4, 0.9),
    }
    lines = [line for m in ("full", "oracle") for line in scores(m, [1.0], fraction=0.05)]
    nats = scores("full", [None], task="s:p", nll=0.0)
    for (method, entries), (fraction, value) in points.items():
        lines += scores(method, [value], fraction=fraction, entries=entries)
        nats += scores(method, [None], task="s:p", nll=1 - value, fraction=fraction, entries=entries)
    for name, records in (("scores", lines), ("nats", nats)):
        (table,) = tables.frontier(summary(folder(name, records)))
        assert [row for row, _ in table.rows] == ["a", "a, int4", "b, int4"]


def test_page_and_files_name_entries(stored, tmp_path):
    html = page(summaries_by_name(load(stored)), 0)
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    (data,) = json.loads(text)
    assert [*data["budgets"]] == ["snapkv", "snapkv, int4"]
    assert [found["name"] for found in data["maps"]] == ["snapkv, keep 0.25", "snapkv, int4, keep 0.25"]
    assert "<span>snapkv, int4</span>" in html
    assert html.count("The frontier: ") == 1
    rows = list(csv.DictReader(results.table(summaries_by_name(load(stored))).splitlines()))
    assert [(row["method"], row["keep"], row["entries"], row["kv_fraction"]) for row in rows] == [
        ("full", "1.0", "native", "1.0"),
        ("snapkv", "0.1", "native", "0.1"),
        ("snapkv", "0.25", "native", "0.25"),
        ("snapkv", "0.25", "int4", "0.07"),
        ("snapkv", "1", "int4", "0.28"),
    ]


def test_where_all_is_native_nothing_is_said_of_entries(evaluated):
    found = summary(evaluated)
    assert tables.frontier(found) == [] and not found.quantised
    assert not [text for text in explanations(found) if "fewer bits" in text]


# --- reading and merging ---


def test_folders_are_merged_and_what_occurs_twice_counts_once(folder):
    first = folder("a", scores("full", [1, 1]) + scores("snapkv", [0, 0]))
    second = folder("b", scores("full", [1, 1]) + scores("snapkv", [1, 1]) + scores("keydiff", [1, 1]))
    seeds = folder("c", scores("snapkv", [1, 1], seed=1), seed=1)
    found = load([first, second, seeds, first])
    (section,) = found.sections
    assert (found.duplicates, len(section.runs)) == (4, 3)
    merged = summarise(section)
    cell = next(cell for (of, _), cell in merged.cells.items() if of.method == "snapkv")
    assert (cell.samples, cell.quality.value) == (4, 0.5)
    assert merged.methods == ("snapkv", "keydiff")
    assert warnings(merged) == ["Not all methods have the same number of samples on a."]


def test_other_models_protocols_and_lengths_are_kept_apart(folder):
    one = folder("a", scores("snapkv", [1]) + scores("snapkv", [0], protocol="query-aware"))
    other = folder("b", scores("snapkv", [0]), config_hash="def")
    names = list(summaries_by_name(load([one, other])))
    assert names == [
        "reference, float32, query-agnostic, configuration abc",
        "reference, float32, query-aware",
        "reference, float32, query-agnostic, configuration def",
    ]
    lengths = summary(folder("c", scores("snapkv", [1]) + scores("snapkv", [0], length=2048)))
    assert [task.label for task in lengths.tasks] == ["a (512)", "a (2048)"]


def test_what_several_processes_write_is_read_while_they_do(folder):
    """Of a sample whose questions are each read with the context, kept entries are means."""
    path = folder("d", [])
    (path / "records.jsonl").rename(path / "records.0.jsonl")
    (path / "records.1.jsonl").write_text(json.dumps(record(kept=[[0.5, 1.5], [2.0, 3.0]], nll=0.3)) + "\n")
    np.testing.assert_allclose(
        summary(path).overall[Setting("snapkv", "0.25")].kept, [[0.005, 0.015], [0.02, 0.03]], 1e-6
    )


def test_machines_and_versions_that_differ_are_told(folder):
    other = {**VERSIONS, "torch": "2.12.0"}
    one = folder("a", scores("snapkv", [1]))
    two = folder("b", scores("keydiff", [1], versions=other, sliding_kv_bytes=300), hardware="a GPU", versions=other)
    told = warnings(summary(one, two))
    assert any("different machines" in line and "a GPU" in line for line in told)
    assert any("torch 2.11.0" in line and "torch 2.12.0" in line for line in told)
    assert "Sliding-window layers are left whole: 30.0%" in " ".join(explanations(summary(one, two)))


def test_a_half_written_last_line_is_passed_over(folder):
    whole = scores("snapkv", [1, 0])
    for name, rest in (("a", '{"task": "s:a", "ind'), ("b", '{"task": "Zü'), ("c", json.dumps(record(index=2)))):
        (section,) = load([folder(name, [*whole, rest])]).sections
        assert len(section.records) == 2 + (name == "c"), "a whole line may lack its end"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"task": "s:a", "ind\n', "is damaged"),
        ("[1]\n", "is no JSON object"),
        ({name: value for name, value in record().items() if name != "kv_bytes"}, "it lacks 'kv_bytes'"),
        (record(index="1"), "'index' is '1'"),
        (record(score=float("nan")), "'score' is 'nan'"),
        (record(score=True), "'score' is 'True'"),
        (record(full_kv_bytes=0), "'full_kv_bytes' is '0'"),
        (record(entries=4), "'entries' is '4'"),
        (record(kept=[[1, 2], [3]]), "'kept' is"),
        (record(kept=[[1, 2], [3, float("nan")]]), "'kept' is"),
        (record(kept=[[1, 2]]), r"'kept' has shape \(1, 2\); by run.json it must be \(2, 2\)"),
        (record(score=None), "neither 'score' nor 'nll'"),
        (record(versions="1"), "'versions' is '1'"),
    ],
)
def test_damaged_lines_are_refused_by_file_and_line(folder, line, words):
    path = folder("d", [record(), line, record(index=1)])
    with pytest.raises(BadInput, match=words) as caught:
        load([path])
    assert f"{path}/records.jsonl, line 2" in str(caught.value)


def test_damaged_and_missing_runs_are_refused(folder, tmp_path):
    with pytest.raises(BadInput, match=r"nowhere/run.json: No such file .*headwise eval --out DIR"):
        load([tmp_path / "nowhere"])
    with pytest.raises(BadInput, match="no folder is named"):
        load([])
    with pytest.raises(BadInput, match="holds no record: give 'headwise eval' time"):
        load([folder("empty", ['{"task'])])
    with pytest.raises(BadInput, match="of format 2, expected 1"):
        load([folder("new", [record()], format=2)])
    with pytest.raises(BadInput, match=r"run.json is damaged: 'shape' is"):
        load([folder("shape", [record()], shape={"layers": [0]})])
    path = folder("d", [record()])
    (path / "run.json").write_text("{")
    with pytest.raises(BadInput, match=r"run.json is damaged"):
        load([path])
    (path / "records.jsonl").unlink()
    (path / "run.json").write_text(json.dumps(RUN))
    with pytest.raises(BadInput, match="holds no record"):
        load([path])


# --- the page ---


def token_map(**known):
    kept = {"1,1": [0, 3], "0,0": [1], "0,1": [], "1,0": [0, 1, 2, 3]}  # layers 0 and 2 of the model
    tokens = ["<i>", " b", "\n", " {{data}}"]
    return {"task": "s:a", "index": 0, "method": "snapkv", "keep": "0.25", "tokens": tokens, "kept": kept, **known}


@pytest.fixture
def evaluated(folder):
    """A folder with a bit of everything: fidelity, perplexity, maps of tokens, names that are markup."""
    records = []
    for at, method in enumerate(["full", "snapkv", TAG, "a+b"]):
        for keep, fraction in (("0.25", 0.25), ("0.5", 0.5)) if method != "full" else (("1.0", 1.0),):
            known = {"keep": keep, "fraction": fraction, "kl": 0.1 * at, "agreement": 1 - 0.1 * at}
            records += scores(method, [1, 0.5, 1 - 0.2 * at], **known)
            records += [record(method, None, task="s:p", index=i, nll=1.0 + i, **known) for i in range(2)]
    return folder("evaluated", records, [token_map(), token_map(keep="0.5")], model=f"a/{TAG}")


class Structure(HTMLParser):
    """Fails on elements that are not closed, collects what is loaded or linked."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.elements, self.said = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag == "path"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said += data


def test_the_page_is_well_formed_and_needs_nothing_else(evaluated, folder):
    html = page(summaries_by_name(load([evaluated, folder("other", scores("snapkv", [1, 0]))])), 0)
    structure = Structure()
    structure.feed(html)
    assert structure.open == []
    assert structure.links == ["#s0", "#s1"]
    assert not re.search(r"@import|url\(|<link|<iframe|<img|fetch\(|XMLHttp", html)
    assert set(re.findall(r"https?://[^\"' <]*", html)) == {"http://www.w3.org/2000/svg"}, "a name, not an address"
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    assert len(html) < 2**16


def test_the_page_shows_methods_and_the_command_as_text(evaluated):
    html = page(summaries_by_name(load([evaluated])), 7)
    assert "<script>alert" not in html
    assert html.count("<script") == 2
    structure = Structure()
    structure.feed(html)
    for method in ("snapkv", TAG, "a+b"):
        assert structure.said.count(method) > 10
    assert RUN["command"] in unescape(html)
    assert escape(str(RUN["command"])) in html
    for told in ("a CPU, 2 threads", "transformers 5.4.0", "2026-11-26T18:00:00", "7 that repeat a sample"):
        assert told in html
    assert "{{" not in html.replace("{{data}}", ""), "a token's text; every part of the template is filled"


def test_the_page_s_script_gets_what_heads_and_tokens_keep(evaluated):
    html = page(summaries_by_name(load([evaluated])), 0)
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    (data,) = json.loads(text)
    assert (data["layers"], data["heads"]) == ([0, 2], 2)
    shares = np.frombuffer(base64.b64decode(data["budgets"]["snapkv"][0]), dtype="<u2") / 65535
    np.testing.assert_allclose(shares, [0.1, 0.2, 0.3, 0.4], atol=1e-5)
    assert data["contexts"] == [{"name": "s:a, sample 0", "tokens": ["<i>", " b", "\n", " {{data}}"]}]
    assert [found["name"] for found in data["maps"]] == ["snapkv, keep 0.25", "snapkv, keep 0.5"]
    assert data["maps"][0]["heads"] == [[0, 0], [0, 1], [2, 0], [2, 1]]
    bits = np.frombuffer(base64.b64decode(data["maps"][0]["kept"]), dtype=np.uint8).reshape(4, 1)
    assert np.unpackbits(bits, axis=-1)[:, :4].tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1]]


def test_tokens_that_lost_their_spaces_are_set_apart(folder):
    """One at a time, some tokenizers decode no spaces: a text without any could not be read."""
    html = page(summaries_by_name(load([folder("d", [record()], [token_map(tokens=["the", "red", "fox", "."])])])), 0)
    assert '"tokens":[" the"," red"," fox"," ."]' in html


@pytest.mark.parametrize(
    "damage", [{"kept": {"0,0": [4]}}, {"kept": {"2,0": [1]}}, {"kept": {"0": [1]}}, {"kept": {}}, {"tokens": None}]
)
def test_damaged_maps_are_refused(folder, damage):
    with pytest.raises(BadInput, match=r"maps.jsonl, line 2"):
        load([folder("d", [record()], [token_map(), token_map(**damage)])])


def test_lines_of_many_methods_differ(folder):
    records = [line for at in range(30) for line in scores(f"method {at}", [1, 0])]
    (chart,) = charts(summary(folder("d", records)))
    assert len({line.style for line in chart.lines}) == 30
    assert not chart.banded


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium")
def test_a_phone_shows_the_page_without_scrolling_sideways(evaluated, tmp_path):
    """The frame is as wide as a phone; what does not fit scrolls in its own box."""
    (tmp_path / "page.html").write_text(page(summaries_by_name(load([evaluated])), 0))
    (tmp_path / "frame.html").write_text(
        '<body><iframe src="page.html" style="width:360px;height:800px;border:0" onload="'
        "const d = this.contentDocument; d.querySelector('.legend button').click();"
        "document.body.dataset.found = [d.documentElement.scrollWidth, d.querySelectorAll('.heat path').length,"
        "d.querySelectorAll('.text i').length, d.querySelectorAll('[data-keep]:not([hidden])').length,"
        "d.querySelectorAll('tr.on').length > 0]"
        '"></iframe></body>'
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path}/chromium", "--virtual-time-budget=3000", "--dump-dom"]
    out = subprocess.run([*command, f"file://{tmp_path}/frame.html"], capture_output=True, text=True, timeout=60).stdout
    (found,) = re.findall(r'data-found="([^"]*)"', out)
    width, cells, words, shown, highlighted = found.split(",")
    assert int(width) <= 360
    assert (int(cells), int(words), int(shown), highlighted) == (12, 4, 2, "true")


# --- the files ---


def test_a_report_is_four_files(evaluated, tmp_path):
    paths = write_report([evaluated], tmp_path / "r.html")
    assert [path.name for path in paths] == ["r.html", "r.csv", "r.md", "r.png"]
    assert paths[3].read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert len(rows) == 14  # the full cache and three methods at two keeps, on two tasks
    row = next(row for row in rows if (row["method"], row["keep"], row["task"]) == ("snapkv", "0.25", "s:a"))
    assert float(row["score"]) == pytest.approx(2.3 / 3)
    assert (row["n"], row["perplexity"], row["kv_fraction"], row["peak_kv_bytes"]) == ("3", "", "0.25", "350.0")
    assert float(row["lo"]) <= float(row["score"]) <= float(row["hi"])
    assert (float(row["kl"]), float(row["agreement"])) == pytest.approx((0.1, 0.9))
    row = next(row for row in rows if row["task"] == "s:p")
    assert (row["score"], float(row["perplexity"])) == ("", pytest.approx(np.exp(1.5)))
    write_report([evaluated], tmp_path / "r.html")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evaluated", "r.csv", "r.html", "r.md", "r.png"]


def test_the_summary_in_markdown(evaluated):
    text = markdown(summaries_by_name(load([evaluated])), 7)
    assert f"\n    {RUN['command']}\n" in text, "as code it is shown as it is"
    told = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    assert "<script>" not in told
    assert "| &lt;script&gt;alert('\\|')&lt;/script&gt; | 25.0 |" in text
    for line in (
        "7 records that repeat",
        "### The best at every keep",
        "### Scores in % at keep 0.5",
        "| a+b | 50.0 |",
    ):
        assert line in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, "columns of one table"


def test_of_the_full_cache_alone_there_is_a_report_too(folder, tmp_path):
    paths = write_report([folder("d", scores("full", [1, 0]))], tmp_path / "r.html")
    assert "No method but the full cache has been evaluated yet." in paths[2].read_text()


def test_where_no_report_can_be(evaluated, tmp_path):
    (tmp_path / "f.html").mkdir()
    (tmp_path / "g.csv").mkdir()
    for name, words in [
        ("r.png", "name an .html file"),
        ("nowhere/r.html", "does not exist; create it first"),
        ("f.html", "is a folder"),
        ("g.html", "g.csv: it is a folder"),
    ]:
        with pytest.raises(BadInput, match=words):
            write_report([evaluated], tmp_path / name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evaluated", "f.html", "g.csv"]


def test_an_error_leaves_everything_as_it_was(evaluated, tmp_path, monkeypatch):
    (tmp_path / "r.csv").write_text("mine")
    monkeypatch.setattr(results, "markdown", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report([evaluated], tmp_path / "r.html")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evaluated", "r.csv"]
    assert (tmp_path / "r.csv").read_text() == "mine"


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_report_needs_neither_torch_nor_transformers(evaluated, tmp_path):
    done = python(
        "import sys; from pathlib import Path; from headwise.report.quality.results import write_report;"
        "assert 'matplotlib' not in sys.modules;"
        f"write_report([Path({str(evaluated)!r})], Path({str(tmp_path / 'r.html')!r}));"
        "print(sorted({'torch', 'transformers', 'matplotlib.pyplot'} & {*sys.modules}))"
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_without_matplotlib_everything_but_the_picture_is_written(evaluated, tmp_path):
    """Once nothing was."""
    done = python(
        "import sys; sys.modules['matplotlib'] = None; from pathlib import Path;"
        "from headwise.report.quality.results import write_report;"
        f"found = write_report([Path({str(evaluated)!r})], Path({str(tmp_path / 'r.html')!r}), tell=print);"
        "print(*(path.name for path in found))"
    )
    assert done.stderr == ""
    told, written = done.stdout.splitlines()
    assert f"{tmp_path}/r.png is left out, for it needs matplotlib" in told
    assert "pip install 'headwise[plot]'" in told
    assert written == "r.html r.csv r.md"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evaluated", "r.csv", "r.html", "r.md"]
    assert 'class="chart' in (tmp_path / "r.html").read_text()


EVIL = "\x1b[2J\u202e\r\n"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r=", " =", "\uff1d"])
def test_no_cell_of_the_table_is_a_formula(start):
    """Spreadsheets run them: https://owasp.org/www-community/attacks/CSV_Injection"""
    text = as_csv([{f"{start}head": f'{start}HYPERLINK("http://x","y")', "more": f"x{EVIL}"}])
    for line in csv.reader(io.StringIO(text)):
        assert not line[0].startswith(("=", "+", "-", "@", "\t", "\r", " ", "\uff1d"))
        assert "\x1b" not in line[1] and len(line) == 2


def test_numbers_in_the_table_are_numbers():
    values = {"a": -1.5, "b": "-1.5", "c": "+3", "d": None, "e": "-2e-5", "f": "0.15", "g": "snapkv+adakv"}
    head, row = csv.reader(io.StringIO(as_csv([values])))
    assert row == ["-1.5", "-1.5", "+3", "", "-2e-5", "0.15", "snapkv+adakv"]
    assert head == [*values]


def test_names_are_text_in_markdown():
    name = "a|b\n<img src=x>`c`![d](http://e)\\|f"
    table = Table(title=name, columns=(name,), rows=((name, (Entry(text=name),)),))
    heading, _, head, _, row, *_ = table.markdown().splitlines()
    for line in (heading, head, row):
        assert "<img" not in line and "[d]" not in line.replace("\\[", "")
    for line in (head, row):
        cells = re.sub(r"\\.", "", line)  # what is escaped ends no cell
        assert cells.count("|") == 3 and "`" not in cells


def test_control_characters_stay_out_of_page_and_summary(evaluated):
    results = load([evaluated])
    evil = {f"m{EVIL}{name}": summary for name, summary in summaries_by_name(results).items()}
    for text in (page(evil, 0), markdown(evil, 0)):
        assert not {"\x1b", "\u202e", "\r"} & set(text)
