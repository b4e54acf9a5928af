"""Files that an earlier tree wrote, before the package was divided into rooms, are read and say what they said then.

They were made with the bundled model by `generate --context text.txt --method keydiff --keep 0.3 --save`,
`profile --scorer keydiff --contexts 2 --questions 1 --steps 2`, `solve --ratios 0.1,0.3`,
`train --contexts 10 --fit-steps 20 --questions 1` (then shrunk), and
`eval --tasks mini-ruler:niah_multikey_dense --methods full,keydiff --samples 2 --keep 0.15 --brief`.
"""

import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from evaluated import evaluation_of

import headwise
from headwise.artifacts.gates import Gates
from headwise.evals import run
from headwise.evals.records import RunFolder
from headwise.methods.method import Method
from headwise.models.loading import load
from headwise.report.inspect.facts import facts
from headwise.report.quality.results import write_report

COUNTS = [16, 16, 15, 15] + [16, 15, 15, 15] * 5  # entries of every head


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(Path(__file__).parent / "older_files.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def loaded():
    return load("reference")


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


def test_a_cache_goes_on_as_one_made_now(older, loaded):
    model, tokenizer = loaded
    cache = headwise.load(older / "cache.safetensors", model)
    assert cache.lengths.flatten().tolist() == COUNTS
    assert (cache.nbytes, cache.get_seq_length()) == (93952, 51)
    assert cache.provenance["method"]["scorer"]["name"] == "KeyDiff"
    assert facts(older / "cache.safetensors")["entries"] == "native"
    prompt = headwise.prompt(tokenizer, (older / "text.txt").read_text(), ["? locker apple"])
    now = headwise.compress(model, prompt.context, "keydiff", keep=0.3)
    assert now.lengths.equal(cache.lengths) and now.positions(3, 0, 1).equal(cache.positions(3, 0, 1))
    answers = [
        model.generate(**each.inputs(prompt.questions[0]), max_new_tokens=8, do_sample=False) for each in (cache, now)
    ]
    assert answers[0].equal(answers[1])


def test_a_profile_is_solved_to_the_budget_of_then(older):
    from headwise.offline.solve import solve

    budget = headwise.Budget.load(older / "budget.safetensors")
    profile = headwise.Profile.load(older / "profile.safetensors")
    assert list(profile.curves) == ["keydiff"] and budget.ratios.tolist() == pytest.approx([0.1, 0.3])
    assert budget.fractions.sum((-1, -2)).tolist() == pytest.approx([2.4, 7.2], abs=1e-4)
    torch.testing.assert_close(solve(profile, "keydiff", ratios=[0.1, 0.3]).fractions, budget.fractions)


@pytest.mark.parametrize("name", ["keydiff+lukv@{}/budget.safetensors", "lkv@{}/gates.safetensors"])
def test_budgets_and_gates_compress(older, model, name):
    ids = torch.arange(60)[None] % 90
    assert int(headwise.compress(model, ids, name.format(older), keep=0.25).lengths.sum()) == 60 * 24 // 4


def test_gates_are_those_of_then(older):
    gates = Gates.load(older / "gates.safetensors")
    assert gates.comparable
    assert float(gates.fractions(0.15).sum()) == pytest.approx(3.6, abs=1e-4)
    assert gates.provenance()["fingerprint"] == "68a97d751fff8bbc260d22e93dc5c7f34729e7179ba1729db0120606680d7457"
    assert Method.parse(f"lkv@{older}/gates.safetensors").scorer.made_for == gates.origin.model


def test_a_run_goes_on_and_is_native(older, loaded, tmp_path, monkeypatch):
    """What it holds is not measured again; entries in fewer bits may be added."""
    path, asked = tmp_path / "run", {"length": 512, "samples": 2, "timed": 1, "brief": True}
    shutil.copytree(older / "run", path)
    assert "entries" not in (path / "run.json").read_text() + (path / "records.jsonl").read_text()

    def measured(**options):
        evaluation = evaluation_of(
            loaded[1], "mini-ruler:niah_multikey_dense", ["full", "keydiff"], ["0.15"], **asked, **options
        )
        folder = RunFolder(path, run.manifest(loaded[0], "reference", evaluation, 512, "headwise eval"))
        return run.evaluate(*loaded, evaluation, folder=folder)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_measure", lambda *given: pytest.fail("measured again"))
        before = measured()
    assert [record.setting for record in before] == 2 * [("full", "1", "native"), ("keydiff", "0.15", "native")]
    after = measured(entries=("native", "int4"))
    assert [record for record in after if record.entries == "native"] == before
    assert [record.setting for record in after[2::3]] == 2 * [("keydiff", "0.15", "int4")]
    write_report([path], tmp_path / "report.html", tell=pytest.fail)
    assert "keydiff, int4" in (tmp_path / "report.html").read_text()


def test_records_of_a_run_are_reported(older, tmp_path):
    page = tmp_path / "report.html"
    assert page in write_report([older / "run"], page, tell=pytest.fail)
    assert "keydiff" in page.read_text() and "niah_multikey_dense" in page.read_text()
