"""The report of benchmarks: what is drawn of hand-made rows, the page, the files, and what is refused."""

import csv
import json
import re
import shutil
import subprocess
import sys
from html import unescape
from typing import Any

import pytest
from test_report_results import Structure, python

from headwise.errors import BadInput
from headwise.report.draw import picture
from headwise.report.draw.charts import Chart, Line, log_ticks
from headwise.report.quality import results
from headwise.report.quality.results import write_report
from headwise.report.speed import speed
from headwise.report.speed.benchmarks import load
from headwise.report.speed.curves import FLOOR, curves

TAG = "<script>alert('|')</script>{{data}}"
COMMON = {
    "dtype": "bfloat16",
    "batch": 1,
    "tokens": 4096,
    "keep": 0.2,
    "threads": 1,
    "hardware": "a CPU, 2 of 2 cores",
    "versions": {"headwise": "0.1.0", "torch": "2.11.0"},
    "command": "headwise bench --json",
}


def decode(candidate="native", ms: Any = 2.0, **known) -> dict[str, Any]:
    """A row of `headwise bench decode`; the floor is a fifth of a millisecond per thousand tokens."""
    row = {**COMMON, **known}
    numbers = {"speedup_vs_full": 12.5, "times_floor": 1.75, "rel_error": 1.7e-3, "plain_error": 1.9e-3}
    floor = row["tokens"] / 5120 * row["batch"] * (1 if candidate.startswith(("full", "kvpress")) else row["keep"])
    return {
        "benchmark": "decode",
        "candidate": candidate,
        "ms": ms,
        "floor_ms": floor,
        "skewed": True,
        **numbers,
        **row,
    }


def memory(candidate="snapkv", peak=300, claimed=500, *, benchmark="memory", **known) -> dict[str, Any]:
    """A row of `headwise bench memory`, in MiB: the full cache peaks at 1,000 and `claimed` is what the other saves."""
    full, mib = candidate == "full", 2**20
    return {
        **COMMON,
        "benchmark": benchmark,
        "candidate": candidate,
        "model": "random",
        "new_tokens": 64,
        "prefill_s": 1.25,
        "ms_per_token": 33.5,
        "speedup_vs_full": 1.5,
        "attention_share": None,
        "kv_bytes": 100 * mib,
        "peak_prefill_bytes": peak * mib,
        "peak_decode_bytes": 120 * mib,
        "peak_bytes": peak * mib,
        "claimed_bytes": 110 * mib,
        "saved_bytes": None if full else (1000 - peak) * mib,
        "claimed_saved_bytes": None if full else claimed * mib,
        **({"keep": 1.0} if full else {}),
        **known,
    }


def prefill(candidate="snapkv", **known) -> dict[str, Any]:
    own = {"benchmark": "prefill", "model": "random", "seconds": 4.125, "overhead": 0.031, "ours_seconds": None}
    return {**COMMON, **own, "candidate": candidate, **known}


@pytest.fixture
def file(tmp_path):
    """A function that writes a file of rows, or of text."""

    def write(name, rows):
        (tmp_path / name).write_text(rows if isinstance(rows, str) else json.dumps(rows))
        return tmp_path / name

    return write


@pytest.fixture
def drawn(file):
    """A function: the charts of rows of one benchmark."""

    def find(rows) -> dict[str, list[Chart]]:
        (section,) = load([file("rows.json", rows)])
        return curves(section)

    return find


def points(line: Line) -> list[tuple[float, float]]:
    return [(point.x, point.y.value) for point in line.points]


# --- what is drawn ---


def test_an_axis_has_several_values_and_the_others_those_of_most_rows(drawn):
    """Tokens vary at batch 1, batches at 4,096 tokens, the keep never."""
    rows = [decode("full", 50, batch=4), decode(ms=9, batch=4)]
    candidates = (("full", 10), ("kvpress, head-wise", 20), ("native", 1))
    rows += [decode(name, ms * n, tokens=1024 * n) for n in (2, 4, 8) for name, ms in candidates]
    found = drawn(rows)
    assert list(found) == ["bfloat16, 1 thread"]
    by_tokens, by_batch = found["bfloat16, 1 thread"]
    assert by_tokens.title == "Step by tokens, ms (batch 1, keep 0.2, skewed)"
    assert by_batch.title == "Step by batch, ms (4,096 tokens, keep 0.2, skewed)"
    assert [line.method for line in by_tokens.lines] == ["full", "native", "kvpress, head-wise", FLOOR]
    full, native, _, floor = by_tokens.lines
    assert points(full) == [(2048, 20), (4096, 40), (8192, 80)]
    assert points(native) == [(2048, 2), (4096, 4), (8192, 8)]
    assert [y for _, y in points(floor)] == pytest.approx([0.08, 0.16, 0.32]), "of kernels, not of full"
    assert [line.thin for line in by_tokens.lines] == [False, False, False, True]
    assert points(by_batch.lines[1]) == [(1, 4), (4, 9)]
    assert (by_tokens.x_label, by_batch.x_label, by_tokens.loglog) == ("tokens", "batch", True)


def test_dtypes_and_threads_are_drawn_apart_lines_alike(drawn):
    rows = [
        decode(name, keep=keep, dtype=dtype, threads=threads)
        for dtype in ("float32", "bfloat16")
        for threads in (1, 2)
        for keep in (0.1, 0.2)
        for name in (("full", "native") if threads == 1 else ("native",))
    ]
    found = drawn(rows)
    assert list(found) == [f"{dtype}, {n}" for dtype in ("float32", "bfloat16") for n in ("1 thread", "2 threads")]
    assert [chart.title for charts in found.values() for chart in charts] == [
        "Step by keep, ms (4,096 tokens, batch 1, skewed)"
    ] * 4
    numbers = [[(line.method, line.number) for line in charts[0].lines] for charts in found.values()]
    assert numbers[0] == [("full", 0), ("native", 1), (FLOOR, 2)]
    assert numbers[1] == numbers[0][1:]


def test_even_and_skewed_do_not_meet_in_a_line_and_repeats_are_medians(drawn):
    rows = [decode(ms=ms, tokens=n) for n in (1024, 2048) for ms in (1, 2, 9)]
    rows += [decode(ms=0.1, tokens=n, skewed=False) for n in (1024, 2048)]
    (chart,) = drawn(rows)["bfloat16, 1 thread"]
    assert points(chart.lines[0]) == [(1024, 2), (2048, 2)]
    assert chart.title.endswith("skewed)")


def test_a_single_length_is_no_curve(drawn):
    assert drawn([decode("full"), decode()]) == {}
    assert drawn([decode(tokens=1024, batch=2), decode()]) == {}, "nothing else is the same"
    assert drawn([memory("full"), memory()]) == {}
    assert drawn([prefill(tokens=n) for n in (1024, 2048)]) == {}


def test_peaks_by_tokens_and_what_is_claimed(drawn):
    rows = [row for n in (1024, 2048) for row in (memory("full", 1000, tokens=n), memory(tokens=n))]
    rows += [memory(tokens=1024, keep=0.5, peak=600), memory(tokens=1024, model="other")]
    found = drawn(rows)
    assert list(found) == ["random, bfloat16"]
    (chart,) = found["random, bfloat16"]
    assert chart.title == "Peak by tokens, GiB (batch 1, 64 new tokens, 1 thread); dashed: as claimed"
    gib = [(line.method, [(x, 1024 * y) for x, y in points(line)]) for line in chart.lines]
    assert gib == [
        ("full", [(1024, 1000), (2048, 1000)]),
        ("snapkv, keep 0.2", [(1024, 300), (2048, 300)]),
        ("snapkv, keep 0.5", [(1024, 600)]),
        ("snapkv, keep 0.2, as claimed", [(1024, 500), (2048, 500)]),
        ("snapkv, keep 0.5, as claimed", [(1024, 500)]),
    ]
    assert [line.number for line in chart.lines] == [0, 1, 2, 1, 2]
    assert [line.method for line in chart.named] == ["full", "snapkv, keep 0.2", "snapkv, keep 0.5"]


def test_what_cannot_be_on_a_logarithmic_axis_is_left_out(drawn):
    rows = [memory(tokens=n, claimed=2000, peak=p) for n, p in ((1024, 300), (2048, 300), (4096, 0))]
    (chart,) = drawn(rows)["random, bfloat16"]
    assert [(line.method, points(line)) for line in chart.lines] == [
        ("snapkv, keep 0.2", [(1024, 300), (2048, 300)])
    ], "more claimed than the full cache takes; nothing measured at 4,096"


def test_labels_of_logarithmic_axes():
    assert log_ticks(30.0, 45.0) == pytest.approx([30, 35, 40, 45]), "no power of ten, nor 2 or 5"
    assert log_ticks(0.3, 400.0) == [1, 10, 100]
    assert log_ticks(0.9, 11.0) == [1, 2, 5, 10]


# --- the page and the files ---


@pytest.fixture
def files(file):
    """Every benchmark; names and the command are markup."""
    versions = {"torch": TAG}
    rows = [
        decode(name, ms * n / 1024, tokens=n, command=TAG, threads=t)
        for t in (1, 2)
        for n in (1024, 4096)
        for name, ms in (("full", 13.1), (TAG, 0.517))
    ]
    tagged = {"model": TAG, "dtype": TAG, "command": TAG, "versions": versions}
    sized = [memory(name, tokens=n, **tagged) for n in (1024, 4096) for name in ("full", TAG)]
    read = [prefill(TAG, hardware=TAG, **tagged), memory(TAG, benchmark="generate", attention_share=0.25, **tagged)]
    return [file("decode.json", rows), file("memory.json", sized), file("read.json", read)]


def test_a_report_is_four_files(files, file, tmp_path):
    paths = write_report([*files, files[0]], tmp_path / "r.html")
    assert [path.name for path in paths] == ["r.html", "r.csv", "r.md", "r.png"]
    assert paths[3].read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert [row["benchmark"] for row in rows] == ["decode"] * 8 + ["memory"] * 4 + ["prefill", "generate"]
    assert (rows[3]["ms"], rows[3]["tokens"], rows[3]["skewed"], rows[3]["peak_bytes"]) == ("2.068", "4096", "True", "")
    assert (rows[-1]["attention_share"], rows[-1]["ms"], rows[0]["versions"]) == (
        "0.25",
        "",
        "headwise 0.1.0, torch 2.11.0",
    )


def test_the_page_is_well_formed_and_shows_names_as_text(files):
    html = speed.page(load(files))
    structure = Structure()
    structure.feed(html)
    assert structure.open == []
    assert structure.links == ["#s0", "#s1", "#s2", "#s3"]
    assert "<script>alert" not in html
    assert html.count("<script") == 2
    assert not re.search(r"{{(?!data}})", html), "every part of the template is filled"
    assert structure.said.count(TAG) > 10
    for told in ("a CPU, 2 of 2 cores", "headwise 0.1.0, torch 2.11.0", f"torch {TAG}", f"<pre>{TAG}</pre>"):
        assert told in unescape(html)


def test_every_number_of_the_tables_is_in_the_page_and_the_summary(files):
    sections = load(files)
    html, text = unescape(speed.page(sections)), speed.markdown(sections)
    written = [entry.text for section in sections for _, row in speed.table(section).rows for entry in row]
    for said in (
        "52.4",
        "0.517",
        "1,024",
        "12.50x",
        "1.75x",
        "1.7e-03",
        "300 MiB",
        "500 MiB",
        "25.0%",
        "3.1%",
        "4.125",
    ):
        assert said in written
    for said in written:
        assert f">{said}</td>" in html
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, "columns of one table"
    assert "| full | bfloat16 | 1,024 | 0.2 | 1 | 1 | skewed | 13.1 | 12.50x |" in text
    assert "<script>" not in re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def test_numbers_are_written_to_be_read(file):
    rows = [memory(saved_bytes=-3 * 2**30), decode(ms=12345.6), decode(ms=0.012345)]
    one, other = (speed.table(section) for section in load([file("rows.json", rows)]))
    assert dict(zip(one.columns, one.rows[0][1], strict=True))["saved"].text == "-3 GiB"
    assert [row[1][other.columns.index("step, ms")].text for row in other.rows] == ["12,346", "0.01235"]


def test_machines_have_sections_of_their_own(file):
    first, second = file("a.json", [decode(), prefill()]), file("b.json", [decode(hardware="a GPU"), decode()])
    assert [(section.name, len(section.rows)) for section in load([first, second])] == [
        ("A decoding step of one layer: a CPU, 2 of 2 cores", 2),
        ("Reading a context: a CPU, 2 of 2 cores", 1),
        ("A decoding step of one layer: a GPU", 1),
    ]


def test_a_row_of_an_older_bench_decode_is_skewed(file):
    row = {name: value for name, value in decode().items() if name not in ("benchmark", "skewed")}
    (section,) = load([file("old.json", [row])])
    assert (section.benchmark, section.rows[0]["skewed"]) == ("decode", True)


def test_without_curves_the_picture_says_so(file, tmp_path, monkeypatch):
    said = []
    text = picture.Figure.text
    monkeypatch.setattr(
        picture.Figure, "text", lambda self, x, y, s, **known: said.append(s) or text(self, x, y, s, **known)
    )
    paths = write_report([file("a.json", [prefill()])], tmp_path / "r.html")
    assert said == ["There is no curve to draw; see the tables."]
    assert 'class="charts"' not in paths[0].read_text()


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium")
@pytest.mark.process
def test_a_phone_shows_the_page_without_scrolling_sideways(files, tmp_path):
    """What does not fit scrolls in its own box; a click in one legend singles out a line in all charts and rows."""
    (tmp_path / "page.html").write_text(speed.page(load(files)))
    (tmp_path / "frame.html").write_text(
        '<body><iframe src="page.html" style="width:360px;height:800px;border:0" onload="'
        "const d = this.contentDocument; d.querySelector('.legend button').click();"
        "document.body.dataset.found = [d.documentElement.scrollWidth, d.querySelectorAll('g.m.on').length,"
        "d.querySelectorAll('tr.on').length]"
        '"></iframe></body>'
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path}/chromium", "--virtual-time-budget=3000", "--dump-dom"]
    out = subprocess.run([*command, f"file://{tmp_path}/frame.html"], capture_output=True, text=True, timeout=60).stdout
    (found,) = re.findall(r'data-found="([^"]*)"', out)
    width, lines, rows = map(int, found.split(","))
    assert width <= 360
    assert (lines, rows) == (2, 4)


@pytest.mark.process
def test_it_needs_no_torch(files, tmp_path):
    done = python(
        "import sys; from pathlib import Path; from headwise.report.quality.results import write_report;"
        f"write_report([Path({str(files[0])!r})], Path({str(tmp_path / 'r.html')!r}));"
        "print(sorted({'torch', 'transformers', 'matplotlib.pyplot'} & {*sys.modules}))"
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_without_matplotlib_everything_but_the_picture_is_written(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "headwise.report.draw.picture")
    told = []
    paths = write_report(files, tmp_path / "r.html", tell=told.append)
    assert [path.name for path in paths] == ["r.html", "r.csv", "r.md"]
    assert len(told) == 1 and "r.png is left out" in told[0]
    assert "<svg" in paths[0].read_text()


# --- what is refused ---


def without(name, row):
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([], "it is no JSON object"),
        (without("ms", decode()), "it lacks 'ms'"),
        (without("hardware", decode()), "it lacks 'hardware'"),
        (without("claimed_bytes", memory()), "it lacks 'claimed_bytes'"),
        (without("ours_seconds", prefill()), "it lacks 'ours_seconds'"),
        (decode(benchmark="sleep"), "'benchmark' is 'sleep'"),
        (decode(benchmark=["decode"]), "'benchmark' is"),
        (decode(ms="1"), "'ms' is '1'"),
        (decode(ms=0), "'ms' is '0'"),
        (decode(ms=float("inf")), "'ms' is 'inf'"),
        (decode(ms=1e300), "'ms' is '1e+300'"),
        (decode("\ud800"), "'candidate' is"),
        (decode(ms=10**400), "'ms' is '1000"),
        (decode(batch=True), "'batch' is 'True'"),
        (decode(keep=-0.2), "'keep' is '-0.2'"),
        (decode(skewed=1), "'skewed' is '1'"),
        (decode() | {"candidate": None}, "'candidate' is 'None'"),
        (decode(versions=[]), "'versions' is"),
        (memory(peak_bytes=1.5), "'peak_bytes' is '1.5'"),
        (memory(peak_bytes=-1), "'peak_bytes' is '-1'"),
        (memory(saved_bytes=10**400), "'saved_bytes' is '1000"),
    ],
)
def test_damaged_rows_are_refused_by_file_and_number(file, tmp_path, row, words):
    path = file("rows.json", [decode(), row])
    with pytest.raises(BadInput, match=f"rows.json, row 2 is damaged: {re.escape(words)}") as caught:
        write_report([path], tmp_path / "r.html")
    assert str(path) in str(caught.value)
    assert "measure again" in str(caught.value)
    assert [found.name for found in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is damaged"),
        ('[{"benchmark": "dec', "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[]", "holds no list of rows"),
        ("{}", "holds no list of rows; name files that 'headwise bench ... --json' has written, or folders"),
        ("null", "holds no list of rows"),
    ],
)
def test_files_without_rows_are_refused(file, tmp_path, text, words):
    good, bad = file("good.json", [decode()]), file("bad.json", text)
    with pytest.raises(BadInput, match=f"bad.json {words}"):
        write_report([good, bad], tmp_path / "r.html")
    assert len(list(tmp_path.iterdir())) == 2


def test_files_and_folders_are_not_mixed_and_must_be_there(file, tmp_path):
    (tmp_path / "run").mkdir()
    path = file("rows.json", [decode()])
    for sources in ([tmp_path / "run", path], [path, tmp_path / "run"]):
        with pytest.raises(
            BadInput, match=r"rows.json is a file, others are folders: name files .* make a report of each"
        ):
            write_report(sources, tmp_path / "r.html")
    with pytest.raises(BadInput, match=r"nowhere.json: No such file"):
        write_report([path, tmp_path / "nowhere.json"], tmp_path / "r.html")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["rows.json", "run"]


def test_an_error_leaves_everything_as_it_was(files, tmp_path, monkeypatch):
    (tmp_path / "r.csv").write_text("mine")
    before = sorted(found.name for found in tmp_path.iterdir())
    monkeypatch.setattr(results.speed, "charts_by_name", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(files, tmp_path / "r.html")
    assert sorted(found.name for found in tmp_path.iterdir()) == before
    assert (tmp_path / "r.csv").read_text() == "mine"


def test_quantised_entries_are_lines_of_their_own(tmp_path):
    """And the floor is that of native ones."""
    rows = [
        decode(tokens=n, entries=e, kv_bytes=9, ms=m) for n in (1024, 4096) for e, m in (("native", 2.0), ("int8", 1.0))
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    (section,) = load([file])
    ((chart,),) = curves(section).values()
    assert [line.method for line in chart.lines] == ["native", "native, int8", FLOOR]
    assert "| native, int8 | bfloat16 |" in speed.markdown([section])
    assert "| entries |" in speed.markdown([section])
    older = [{key: value for key, value in decode(tokens=n).items() if key != "entries"} for n in (1024, 4096)]
    file.write_text(json.dumps(older))
    (section,) = load([file])
    assert "| entries |" not in speed.markdown([section])
    assert [chart.lines[0].method for (chart,) in curves(section).values()] == ["native"]
