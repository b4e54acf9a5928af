"""Folders of evaluations in real processes: killed at every step of their writing, two at once, and odd text."""

import json
import os
import signal
from dataclasses import replace
from itertools import count

import pytest
from evaluated import evaluation_of
from families import tiny_model
from folders import word_tokenizer
from killing import ended, forked, killed_at
from ranks import Rank

from headwise.errors import BadInput, BudgetInfeasible, WriteFailed
from headwise.evals import run
from headwise.evals.records import RunFolder
from headwise.evals.run import evaluate, manifest, summarise
from headwise.report.quality.records import load

FILES = ["maps.jsonl", "records.jsonl", "run.json"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=len(word_tokenizer()))


@pytest.fixture(scope="module")
def evaluation():
    return evaluation_of(word_tokenizer(), "mini-ruler:vt,cwe", ["snapkv"], [0.5], length=120)


@pytest.fixture(scope="module")
def measured(model, evaluation):
    """What is measured, by sample."""
    found, measure = {}, run._measure
    with pytest.MonkeyPatch.context() as patch:

        def noting(session, task, index, *rest):
            found[task.name, index] = measure(session, task, index, *rest)
            return found[task.name, index]

        patch.setattr(run, "_measure", noting)
        evaluate(model, word_tokenizer(), evaluation)
    return found


@pytest.fixture
def go(model, evaluation, measured, monkeypatch):
    """Evaluate into a folder, the measuring itself already done."""

    def told(session, task, index, settings, *rest):
        records, maps = measured[task.name, index]
        return [r for r in records if r.setting in {setting.names for setting in settings}], maps

    monkeypatch.setattr(run, "_measure", told)

    def call(path, processes=None, progress=lambda done, total: None):
        rank = None if processes is None else processes.rank
        folder = RunFolder(path, manifest(model, "tiny", evaluation, 120, "headwise eval"), rank=rank)
        options = {"folder": folder, "processes": processes, "progress": progress}
        return evaluate(model, word_tokenizer(), evaluation, **options)

    return call


@pytest.fixture
def whole(go, tmp_path):
    return go(tmp_path / "whole")


def kept(path):
    return [(r.key, r.predictions, r.score) for r in RunFolder(path, {}).records()]


def maps_of(path):
    return sorted(path.joinpath("maps.jsonl").read_text().splitlines())


def names(path):
    return sorted(found.name for found in path.iterdir())


def test_a_run_that_is_killed_at_any_step_goes_on_and_ends_like_an_unbroken_one(go, whole, tmp_path):
    """Every step that it takes on files is the last one of some run; a second kill hits the run that goes on."""
    for step in count():
        out = tmp_path / str(step)
        if not killed_at(step, out, lambda out=out: go(out)):
            break
        killed_at(step // 2, out, lambda out=out: go(out))
        assert go(out) == whole
        assert sorted(kept(out)) == sorted(kept(tmp_path / "whole"))
        assert maps_of(out) == maps_of(tmp_path / "whole")
        assert names(out) == FILES
    assert step > 30


def test_what_several_processes_wrote_is_put_together_after_any_kill(go, whole, tmp_path):
    """The first of two is killed while it puts together what both have written."""
    for step in count(0, 4):
        out = tmp_path / str(step)
        RunFolder(out, {**json.loads((tmp_path / "whole" / "run.json").read_text())}).open()
        go(out, Rank(1, 2))
        if not killed_at(step, out, lambda out=out: go(out, Rank(0, 2))):
            break
        assert go(out) == whole
        assert names(out) == FILES
        assert maps_of(out) == maps_of(tmp_path / "whole")
    assert step > 30


def holding(go, out, processes=None):
    """A process at work in a folder; what it is told to end with."""
    ready, begun = os.pipe()
    wait, end = os.pipe()

    def hold(done, total):
        if done == 1:
            os.write(begun, b"!")
            os.read(wait, 1)

    process = forked(lambda: go(out, processes, hold))
    os.read(ready, 1)
    for one in (ready, begun, wait):
        os.close(one)
    return process, end


@pytest.mark.parametrize("number", [1, 2], ids=["alone", "launched"])
def test_a_second_run_is_kept_out_until_the_first_ends_however_it_ends(go, whole, tmp_path, number):
    out, ranks = tmp_path / "run", (Rank(0, 2), Rank(0, 2)) if number == 2 else (None, None)
    process, end = holding(go, out, ranks[0])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(BadInput, match=r"another process is writing .*run\. Wait until it has ended, or name another"):
        go(out, ranks[1])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    os.kill(process, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL
    os.close(end)
    assert go(out) == whole
    assert names(out) == FILES


def test_the_first_run_ends_well_beside_one_that_was_kept_out(go, whole, tmp_path):
    out = tmp_path / "run"
    process, end = holding(go, out)
    with pytest.raises(BadInput):
        go(out)
    os.write(end, b"!")
    os.close(end)
    assert ended(process) == 0
    assert go(out) == whole
    assert names(out) == FILES


def test_what_two_older_processes_wrote_twice_counts_once(go, whole, tmp_path):
    file = tmp_path / "whole" / "records.jsonl"
    file.write_text(2 * file.read_text())
    found = RunFolder(tmp_path / "whole", {}).records()
    assert [summary.samples for summary in summarise(found)] == [2, 2, 2, 2]
    (section,) = load([tmp_path / "whole"]).sections
    assert len(section.records) == len(found) == len(whole)
    assert go(tmp_path / "whole") == whole
    assert len(file.read_text().splitlines()) == len(whole)


# --- text ---

ODD = "a\u2028b\u2029c\u0085d\x0b\x0c\x1c\re \ud800 \udcff \U0001f642 \u00e9"


def test_any_text_is_written_so_that_strict_readers_read_it_and_the_folder_goes_on(go, whole, tmp_path, monkeypatch):
    measure = run._measure

    def odd(*given):
        records, maps = measure(*given)
        changed = [replace(r, predictions=(ODD,), answers=((ODD, ODD),), scores=(1.0,)) for r in records]
        return changed, [{**one, "tokens": [ODD, *one["tokens"][1:]]} for one in maps]

    monkeypatch.setattr(run, "_measure", odd)
    out = tmp_path / "odd"
    for _ in range(2):
        found = go(out)
        assert {r.predictions for r in found} == {(ODD,)}
        assert len(found) == len(whole)
    for file in (out / "records.jsonl", out / "maps.jsonl"):
        content = file.read_bytes()
        lines = content.decode("utf-8", "strict").split("\n")
        assert lines[-1] == "" and all(isinstance(json.loads(line), dict) for line in lines[:-1])
        assert content.decode().splitlines() == lines[:-1]  # of any reader's idea of a line
    load([out])


@pytest.mark.parametrize("lost", [1, 2, 3, 4])
def test_a_record_that_is_torn_inside_a_character_is_measured_again(go, whole, tmp_path, lost):
    """Records were UTF-8 once: a killed run may have left half of a character."""
    out = tmp_path / "whole"
    for file in (out / "records.jsonl", out / "maps.jsonl"):
        last = file.read_bytes().splitlines(keepends=True)[-1]
        file.write_bytes(file.read_bytes() + last[:30] + "\U0001f642".encode()[:lost])
    assert go(out) == whole
    assert len((out / "records.jsonl").read_bytes().decode().splitlines()) == len(whole)


def test_records_of_an_older_run_are_read_with_every_mark_in_them(go, whole, tmp_path):
    file = tmp_path / "whole" / "records.jsonl"
    rows = [{**json.loads(line), "predictions": ["x\u2028y\u0085z"]} for line in file.read_text().splitlines()]
    file.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    (file.parent / "run.json.new").write_text("{")  # of a process that was killed
    assert {r.predictions for r in go(tmp_path / "whole")} == {("x\u2028y\u0085z",)}
    assert names(file.parent) == FILES
    (tmp_path / "whole" / "run.json").unlink()
    (tmp_path / "whole" / "run.json.new").write_text("{")
    with pytest.raises(BadInput, match=r"other files and no run\.json"):
        go(tmp_path / "whole")


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"samples": ' + "9" * 5000 + "}"])
def test_a_damaged_run_is_told(go, whole, tmp_path, text):
    (tmp_path / "whole" / "run.json").write_text(text)
    with pytest.raises(BadInput, match=r"run\.json is damaged"):
        go(tmp_path / "whole")


# --- the system ---


def test_what_is_refused_leaves_no_folder(model, tmp_path):
    small = evaluation_of(word_tokenizer(), "mini-ruler:vt", ["snapkv"], [0.01], length=120)
    folder = RunFolder(tmp_path / "run", manifest(model, "tiny", small, 120, "headwise eval"))
    with pytest.raises(BudgetInfeasible):
        evaluate(model, word_tokenizer(), small, folder=folder)
    assert [*tmp_path.iterdir()] == []


def test_what_a_full_disk_refuses_is_measured_again(go, whole, tmp_path):
    out = tmp_path / "run"

    def limited():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))
        with pytest.raises(WriteFailed, match=r"cannot write .*\.jsonl: File too large"):
            go(out)

    assert ended(forked(limited)) == 0
    assert all(line.endswith(b"\n") for file in out.glob("*.jsonl") for line in file.read_bytes().splitlines(True))
    assert go(out) == whole
    assert names(out) == FILES


def test_links_stay_and_what_is_no_file_is_refused(go, whole, tmp_path):
    out, other = tmp_path / "whole", tmp_path / "elsewhere"
    (out / "records.jsonl").rename(other)
    (out / "records.jsonl").symlink_to(other)
    assert go(out) == whole
    assert (out / "records.jsonl").is_symlink() and other.stat().st_size > 0
    (tmp_path / "link").symlink_to(out)
    assert go(tmp_path / "link") == whole
    (out / "maps.jsonl").unlink()
    os.mkfifo(out / "maps.jsonl")
    with pytest.raises(BadInput, match=r"maps\.jsonl: it is a pipe"):
        go(out)
    (tmp_path / "nothing").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "nothing", other, other / "run", tmp_path / ("x" * 300)):
        with pytest.raises(BadInput, match="cannot write to"):
            go(path)
