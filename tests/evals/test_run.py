"""Evaluation: records, measured fractions, the same again for the same seed, and from a folder after a kill."""

import copy
import json
from dataclasses import asdict, replace

import pytest
import torch
from evaluated import evaluated, evaluation_of
from families import tiny_model
from folders import CHAT_TEMPLATE, word_tokenizer
from launching import fork, launch
from ranks import Rank

from headwise.errors import BadInput, BudgetInfeasible
from headwise.evals import run
from headwise.evals.answers import answer, read_context
from headwise.evals.records import RunFolder
from headwise.evals.run import evaluate, manifest
from headwise.methods.method import Method
from headwise.report.quality.results import write_report
from headwise.tasks.document import tokenize
from headwise.tasks.mini_ruler.lexicon import REFERENCE_LEXICON
from headwise.tasks.mini_ruler.tasks import lexicon_for

METHODS = ("full", "snapkv", "keydiff+global", "kvzip", "criticalkv")
TIMES = {"prefill_seconds": 0.0, "decode_seconds": 0.0, "step_ms": None}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=len(word_tokenizer()))


def wanted(**changes):
    options = {"tasks": "mini-ruler:niah_single,vt", "methods": METHODS, "keeps": [0.25, 0.5], "length": 160}
    return evaluation_of(word_tokenizer(), **{**options, **changes})


def records_of(model, folder=None, tokenizer=None, processes=None, **changes):
    return evaluate(model, tokenizer or word_tokenizer(), wanted(**changes), folder=folder, processes=processes)


def untimed(records):
    return [replace(record, **TIMES) for record in records]


@pytest.fixture(scope="module")
def records(model):
    return records_of(model)


def test_a_record_for_every_sample_method_and_keep(records):
    pairs = [("full", "1"), *((m, k) for m in METHODS[1:] for k in ("0.25", "0.5"))]
    assert [(r.task, r.index, r.method, r.keep) for r in records] == [
        (f"mini-ruler:{task}", index, *pair) for task in ("niah_single", "vt") for index in (0, 1) for pair in pairs
    ]
    for record in records:
        assert (record.length, record.seed, record.protocol) == (160, 0, "query-agnostic")
        assert len(record.predictions) == len(record.answers) == len(record.scores)
        assert record.score == pytest.approx(sum(record.scores) / len(record.scores))
        assert record.versions.keys() == {"headwise", "torch", "transformers", "python"}
        assert record.prefill_seconds > 0
        assert record.decode_seconds > 0
        assert record.step_ms is None


def test_bytes_and_counts_are_measured(records):
    for record in records:
        keep = float(record.keep)
        assert record.kv_bytes / record.full_kv_bytes == pytest.approx(keep, abs=0.005)
        counts = torch.tensor(record.kept)
        assert counts.shape == (3, 2)
        assert int(counts.sum()) == pytest.approx(keep * record.context_tokens * 6, abs=1)
        if record.method == "snapkv":  # one layer whole, the others cut
            assert record.kv_bytes < record.peak_kv_bytes < record.full_kv_bytes * (keep + 0.5)


def test_what_is_asked_together_is_answered_as_alone(model, records):
    """Caches of all methods and keeps are continued as one batch; each answers as if it were alone."""
    tokenizer = word_tokenizer()
    evaluation = wanted()
    for record in (r for r in records if r.method != "full"):
        task = next(task for task in evaluation.tasks if task.name == record.task)
        sample = task.sample(record.index)
        tokens = tokenize(tokenizer, sample.context, [q.prompt for q in sample.questions])
        memory = read_context(model, tokens.context, record.method, record.keep)
        assert (memory.nbytes, memory.peak_nbytes) == (record.kv_bytes, record.peak_kv_bytes)
        texts = answer(model, tokenizer, memory, tokens, max_new_tokens=sample.max_new_tokens)
        assert tuple(texts) == record.predictions


def test_few_rows_at_a_time_give_the_same(model, records):
    for few, many in zip(records_of(model, rows=3), records, strict=True):
        assert (few.unit, few.method, few.keep, few.predictions) == (
            many.unit,
            many.method,
            many.keep,
            many.predictions,
        )
        assert few.kl == pytest.approx(many.kl, abs=1e-5)
        assert few.decode_rows <= max(3, len(few.answers))


def test_who_agrees_with_the_full_cache_all_along_need_not_decode(model):
    """Its answer is known from the comparison; without the comparison everyone decodes, and says the same."""
    keeps = [0.5, 0.97]
    compared, decoded = (records_of(model, keeps=keeps, fidelity=fidelity) for fidelity in (True, False))
    assert [r.predictions for r in decoded] == [r.predictions for r in compared]
    agreeing = [r.agreement == 1 for r in compared if r.method != "full"]
    assert any(agreeing) and not all(agreeing)


def test_full_is_the_yardstick(records):
    for record in (r for r in records if r.method == "full"):
        assert (record.kl, record.agreement, record.kv_bytes) == (0, 1, record.full_kv_bytes)
        assert record.nll > 0


def test_everything_kept_is_as_good_as_the_full_cache(model):
    for record in records_of(model, methods=["random"], keeps=[1.0], tasks="mini-ruler:niah_multikey"):
        assert record.kv_bytes == record.full_kv_bytes
        assert record.kl == pytest.approx(0, abs=1e-6)
        assert record.agreement == 1


def test_the_same_seed_gives_the_same_records_and_another_others(model, records):
    assert untimed(records_of(model)) == untimed(records)
    other = records_of(model, seed=1)
    assert not {r.answers for r in other} & {r.answers for r in records}


def test_query_aware_means_that_the_question_is_compressed_with_the_context(model, records):
    found = records_of(model, protocol="query-aware", methods=["snapkv"], tasks="mini-ruler:vt")
    agnostic = {(r.index, r.keep): r for r in records if (r.task, r.method) == ("mini-ruler:vt", "snapkv")}
    for record in (r for r in found if r.method == "snapkv"):
        assert record.protocol == "query-aware"
        assert len(record.predictions) == len(record.answers)
        assert record.context_tokens > agnostic[record.index, record.keep].context_tokens


def test_summaries_are_means(model, records):
    for row in evaluated(model, word_tokenizer(), "mini-ruler:niah_single,vt", METHODS, [0.25, 0.5], length=160):
        own = [r for r in records if (r.task, r.method, float(r.keep)) == (row.task, row.method, row.keep)]
        full = [r for r in records if (r.task, r.method) == (row.task, "full")]
        assert row.samples == len(own) == 2
        assert row.accuracy == pytest.approx(sum(r.score for r in own) / 2)
        assert row.full_accuracy == pytest.approx(sum(r.score for r in full) / 2)
        assert row.kl == pytest.approx(sum(r.kl for r in own) / 2)


def test_names_given_twice_count_once(model):
    found = records_of(model, tasks="mini-ruler:vt,vt", methods=["snapkv"] * 2, keeps=[0.5, "0.5", "50%"], samples=1)
    assert [(r.task, r.method, r.keep) for r in found] == [
        ("mini-ruler:vt", "full", "1"),
        ("mini-ruler:vt", "snapkv", "0.5"),
    ]


def test_steps_are_timed_for_the_first_samples(model):
    found = records_of(model, methods=["snapkv"], timed=1)
    assert all((r.step_ms is not None) == (r.index == 0) for r in found)


def test_lengths_are_counted_with_the_tokenizer_at_hand():
    lexicon = lexicon_for(word_tokenizer())
    assert lexicon.num_special_tokens == 1
    assert lexicon.count_tokens("locker apple, copper.") == 5
    assert lexicon.keys == REFERENCE_LEXICON.keys


def test_a_chat_model_is_evaluated_too(model):
    options = {"methods": ["snapkv"], "keeps": ["40tok"], "samples": 1, "tasks": "mini-ruler:vt"}
    _, record = records_of(model, tokenizer=word_tokenizer(CHAT_TEMPLATE), **options)
    assert record.keep == "40tok"
    assert 0.2 < record.kv_bytes / record.full_kv_bytes < 0.4


# --- entries in fewer bits ---

STORED = {"methods": ["keydiff"], "keeps": [0.5], "samples": 1, "tasks": "mini-ruler:vt"}


def test_entries_are_settings_of_their_own(model, tmp_path):
    """Of every method but the full cache; measured together, each answers as by itself."""
    asked = {**STORED, "methods": ["full", "keydiff"], "entries": ("native", "int4", "int8")}
    folder = folder_of(model, tmp_path / "run", **asked)
    found = records_of(model, folder, **asked)
    assert [record.setting for record in found] == [
        ("full", "1", "native"),
        *(("keydiff", "0.5", entries) for entries in ("native", "int4", "int8")),
    ]
    full, native, int4, int8 = found
    assert int4.kv_bytes < int8.kv_bytes < native.kv_bytes / 2 < full.kv_bytes / 4 + 64
    assert int4.kept == int8.kept == native.kept
    assert int4.kl != native.kl
    for record in (native, int4, int8):
        (_, alone) = records_of(model, **{**STORED, "entries": (record.entries,)})
        assert (alone.setting, alone.predictions, alone.kv_bytes) == (
            record.setting,
            record.predictions,
            record.kv_bytes,
        )
        assert alone.kl == pytest.approx(record.kl, abs=1e-5)
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["entries"] == ["native", "int4", "int8"]
    assert told["latest"][1:] == [["keydiff", "0.5", entries] for entries in told["entries"]]
    maps = [json.loads(line) for line in (tmp_path / "run" / "maps.jsonl").read_text().splitlines()]
    assert sorted(one["entries"] for one in maps) == ["int4", "int8", "native"]
    assert all(one["kept"] == maps[0]["kept"] for one in maps)


def written_before(model, path):
    """A folder as a version wrote it that knew of no entries."""
    records_of(model, folder_of(model, path, **STORED), **STORED)
    told = json.loads((path / "run.json").read_text())
    told["latest"] = [setting[:2] for setting in told["latest"]]
    (path / "run.json").write_text(json.dumps({name: value for name, value in told.items() if name != "entries"}))
    for name in ("records.jsonl", "maps.jsonl"):
        rows = [json.loads(line) for line in (path / name).read_text().splitlines()]
        assert [row.pop("entries") for row in rows] == ["native"] * len(rows)
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_killed_run_of_an_earlier_version_measures_its_last_sample_again(model, tmp_path, monkeypatch):
    path = written_before(model, tmp_path / "run")
    (path / "records.jsonl").write_text(lines_of(path)[0])  # the full cache's alone
    calls = killed_after(99, monkeypatch)
    records_of(model, folder_of(model, path, **STORED), **STORED)
    assert [[setting.names for setting in settings] for _, _, _, settings, *_ in calls] == [
        [("full", "1", "native"), ("keydiff", "0.5", "native")]
    ]


def test_entries_may_be_added_to_a_folder_that_knew_of_none(model, tmp_path, monkeypatch):
    """What it holds is native, and is not measured again."""
    path = written_before(model, tmp_path / "run")
    before, maps = lines_of(path), (path / "maps.jsonl").read_text()
    calls = killed_after(99, monkeypatch)
    assert {record.entries for record in records_of(model, folder_of(model, path, **STORED), **STORED)} == {"native"}
    assert (calls, lines_of(path), (path / "maps.jsonl").read_text()) == ([], before, maps)
    more = {**STORED, "entries": ("int4",)}
    records_of(model, folder_of(model, path, **more), **more)
    assert [[setting.entries for setting in settings] for _, _, _, settings, *_ in calls] == [["int4"]]
    assert lines_of(path)[:2] == before
    assert [record.entries for record in folder_of(model, path).records()] == ["native", "native", "int4"]
    assert json.loads((path / "run.json").read_text())["entries"] == ["native", "int4"]


# --- folders ---


def folder_of(model, path, rank=None, **changes):
    return RunFolder(path, manifest(model, "tiny", wanted(**changes), 160, "headwise eval"), rank=rank)


def lines_of(path):
    return (path / "records.jsonl").read_text().splitlines(keepends=True)


@pytest.fixture(scope="module")
def whole(model, records, tmp_path_factory):
    """A folder of an unbroken run."""
    path = tmp_path_factory.mktemp("eval") / "run"
    assert untimed(records_of(model, folder_of(model, path))) == untimed(records)
    return path


def killed_after(number, monkeypatch):
    """A run that is killed when it wants to measure sample `number`."""
    calls = []
    measured = run._measure

    def counted(*args):
        if len(calls) == number:
            raise KeyboardInterrupt
        calls.append(args)
        return measured(*args)

    monkeypatch.setattr("headwise.evals.run._measure", counted)
    return calls


@pytest.mark.parametrize("torn", [0, 1, 700, 5000])
def test_a_killed_run_goes_on_and_ends_like_an_unbroken_one(model, whole, tmp_path, monkeypatch, torn):
    """Two of four samples were done; of the last one `torn` characters are lost, as if killed while writing."""
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            records_of(model, folder_of(model, tmp_path / "run"))
    file = tmp_path / "run" / "records.jsonl"
    text = file.read_text()
    file.write_text(text[: len(text) - torn])
    calls = killed_after(99, monkeypatch)
    found = records_of(model, folder_of(model, tmp_path / "run"))
    assert len(calls) == (2 if torn == 0 else 3)
    assert untimed(found) == untimed(folder_of(model, whole).records())
    assert untimed(folder_of(model, tmp_path / "run").records()) == untimed(found)
    ours, theirs = (sorted((path / "maps.jsonl").read_text().splitlines()) for path in (tmp_path / "run", whole))
    assert list(dict.fromkeys(ours)) == theirs


def test_a_finished_run_is_not_repeated(model, whole, monkeypatch):
    before = lines_of(whole)
    calls = killed_after(99, monkeypatch)
    records_of(model, folder_of(model, whole))
    assert calls == []
    assert lines_of(whole) == before


def test_methods_keeps_and_samples_may_be_added(model, tmp_path, monkeypatch):
    small = {"methods": ["snapkv"], "keeps": [0.5], "samples": 1}
    large = {"methods": ["snapkv", "keydiff"], "keeps": [0.25, 0.5], "samples": 2}
    records_of(model, folder_of(model, tmp_path / "run", **small), **small)
    records_of(model, folder_of(model, tmp_path / "run", **large), **large)
    found = folder_of(model, tmp_path / "run").records()
    assert len(found) == len({(r.unit, r.method, r.keep) for r in found}) == 4 * 5
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (told["methods"], told["keeps"], told["samples"]) == (["full", "snapkv", "keydiff"], ["0.5", "0.25"], 2)


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"protocol": "query-aware"}, {"fidelity": False}], ids=["seed", "protocol", "fidelity"]
)
def test_a_folder_is_of_one_evaluation(model, whole, changes):
    (name,) = changes
    before = lines_of(whole)
    with pytest.raises(BadInput, match=f"an evaluation with {name}=.*another folder"):
        records_of(model, folder_of(model, whole, **changes), **changes)
    assert lines_of(whole) == before


def test_a_folder_goes_on_where_the_model_lies_elsewhere(model, tmp_path, monkeypatch):
    small = {"methods": ["snapkv"], "samples": 1}
    records_of(model, folder_of(model, tmp_path / "run", **small), **small)
    calls = killed_after(99, monkeypatch)
    told = manifest(model, "elsewhere/tiny", wanted(**small), 160, "headwise eval")
    records_of(model, RunFolder(tmp_path / "run", told), **small)
    assert calls == []


def test_a_folder_is_of_one_model_s_weights(model, tmp_path):
    small = {"methods": ["snapkv"], "samples": 1}
    records_of(model, folder_of(model, tmp_path / "run", **small), **small)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    with pytest.raises(BadInput, match=r"an evaluation with weights=.*another folder"):
        records_of(other, folder_of(other, tmp_path / "run", **small), **small)
    file = tmp_path / "run" / "run.json"
    older = {name: value for name, value in json.loads(file.read_text()).items() if name not in ("weights", "made_of")}
    file.write_text(json.dumps(older))
    records_of(model, folder_of(model, tmp_path / "run", **small), **small)  # an older headwise wrote it: by its name
    file.write_text(json.dumps({**older, "model": "other"}))
    with pytest.raises(BadInput, match="an evaluation with model='other'"):
        records_of(model, folder_of(model, tmp_path / "run", **small), **small)


def test_a_method_that_has_changed_is_refused(model, tmp_path, monkeypatch):
    small = {"methods": ["snapkv"], "samples": 1}
    records_of(model, folder_of(model, tmp_path / "run", **small), **small)
    monkeypatch.setattr(Method, "provenance", lambda self: {"window_size": 64})
    more = {**small, "methods": ["snapkv", "keydiff"]}
    with pytest.raises(BadInput, match="measured with another snapkv"):
        records_of(model, folder_of(model, tmp_path / "run", **more), **more)
    added = {**small, "methods": ["keydiff"]}
    records_of(model, folder_of(model, tmp_path / "run", **added), **added)


def test_short_records_hold_what_a_report_needs(model, records, tmp_path):
    """Neither answers nor maps, which may be texts of a data set; counts of a task's first sample."""
    pytest.importorskip("matplotlib")
    folder = folder_of(model, tmp_path / "run", brief=True)
    found = records_of(model, folder, brief=True)
    for short, long in zip(found, records, strict=True):
        assert (short.key, short.predictions, short.scores) == (long.key, long.predictions, long.scores)
        assert short.answers == ()
        assert short.kept == (long.kept if long.index == 0 else ())
        assert short.kl == pytest.approx(long.kl, rel=1e-5)
    assert not (tmp_path / "run" / "maps.jsonl").exists()
    long_lines, short_lines = (len(json.dumps(asdict(r))) for r in (records[-1], found[-1]))
    assert short_lines < long_lines
    assert untimed(records_of(model, folder_of(model, tmp_path / "run", brief=True), brief=True)) == untimed(found)
    records_of(model, folder_of(model, tmp_path / "long"))
    for name in ("run", "long"):
        write_report([tmp_path / name], tmp_path / f"{name}.html")
    tables = [(tmp_path / f"{name}.md").read_text().partition("## ")[2] for name in ("run", "long")]
    quality = [text[text.index("The best at") : text.index("Tokens of the full")] for text in tables]
    assert quality[0] == quality[1]


def test_a_folder_with_other_things_is_refused(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(BadInput, match=r"other files and no run\.json"):
        records_of(model, folder_of(model, tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write"):
        records_of(model, folder_of(model, tmp_path / "file"))


def test_a_damaged_record_is_named(model, tmp_path):
    small = {"methods": ["full"], "samples": 1}
    records_of(model, folder_of(model, tmp_path / "run", **small), **small)
    file = tmp_path / "run" / "records.jsonl"
    file.write_text("{}\n" + file.read_text())
    with pytest.raises(BadInput, match=r"records\.jsonl, line 1 is no record"):
        records_of(model, folder_of(model, tmp_path / "run", **small), **small)


def test_processes_share_the_samples(model, whole, tmp_path, monkeypatch):
    """One after the other here: each does every second sample; the first puts together what both have written."""
    calls = killed_after(99, monkeypatch)
    folder_of(model, tmp_path / "run").open()
    records_of(model, folder_of(model, tmp_path / "run", rank=1), processes=Rank(1, 2))
    assert len(calls) == 2
    records_of(model, folder_of(model, tmp_path / "run", rank=0), processes=Rank(0, 2))
    assert len(calls) == 4
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["maps.jsonl", "records.jsonl", "run.json"]
    ours, theirs = (untimed(folder_of(model, path).records()) for path in (tmp_path / "run", whole))
    assert ours == theirs


@pytest.mark.slow
def test_two_processes_write_what_one_writes(model_folders, tmp_path):
    for processes in (1, 2):
        line = f"eval --model {model_folders['base']} --tasks mini-ruler:vt,cwe --methods keydiff --keep 0.5 "
        line += f"--samples 3 --length 160 --timed 0 --device cpu --json --out {tmp_path / str(processes)}"
        said = json.loads(launch(f"-m headwise {line}") if processes > 1 else fork(line, processes))
        assert [(row["task"], row["samples"]) for row in said] == [("vt", 3), ("cwe", 3)]
    one, two = (RunFolder(tmp_path / name, {}).records() for name in "12")
    assert untimed(one) == untimed(two)
    assert sorted(path.name for path in (tmp_path / "2").iterdir()) == ["maps.jsonl", "records.jsonl", "run.json"]


def test_maps_say_which_tokens_heads_kept(model, whole):
    maps = [json.loads(line) for line in (whole / "maps.jsonl").read_text().splitlines()]
    assert {(m["task"], m["index"], m["method"], m["keep"]) for m in maps} == {
        (f"mini-ruler:{task}", 0, method, "0.5") for task in ("niah_single", "vt") for method in METHODS[1:]
    }
    for found in maps:
        assert found["kept"].keys() == {f"{layer},{head}" for layer in range(3) for head in range(2)}
        total = sum(map(len, found["kept"].values()))
        assert total == pytest.approx(0.5 * 6 * len(found["tokens"]), abs=1)


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keeps": [0.5, 0.1]}, r"snapkv cannot work with keep=0\.1"),
        ({"tasks": "mini-ruler:niah_single,cwe", "length": 60, "keeps": [0.5]}, "snapkv cannot work with keep=0.5"),
        ({"keeps": ["10B"], "entries": ("int4",)}, "snapkv cannot work with keep=10B, entries=int4"),
    ],
)
def test_a_budget_that_some_task_cannot_meet_is_refused_before_any_work(model, monkeypatch, changes, message):
    for name in ("read", "FullMemory"):
        monkeypatch.setattr(f"headwise.evals.session.{name}", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(BudgetInfeasible, match=message):
        records_of(model, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples=0"),
        ({"length": -5}, "length=-5"),
        ({"seed": -1}, "seed=-1"),
        ({"length": 8}, "too short"),
        ({"length": 5000}, "made for 1024"),
        ({"keeps": []}, "nothing to evaluate"),
        ({"keeps": [2.0]}, "outside"),
        ({"entries": ("int3",)}, "entries='int3' does not exist; choose native, int8, k8v4, int4"),
        ({"entries": ()}, "nothing to evaluate"),
        ({"methods": []}, "no method is named"),
        ({"methods": ["nope"]}, "no scorer 'nope'"),
        ({"protocol": "aware"}, "query-agnostic or query-aware"),
        ({"rows": 0}, "rows=0"),
    ],
)
def test_what_cannot_be_evaluated(model, changes, message):
    with pytest.raises(BadInput, match=message):
        records_of(model, **changes)
