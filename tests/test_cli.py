"""The command line: what it prints where, exit codes, help with examples, and a page that documents it all."""

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from folders import save_model
from typer.testing import CliRunner

import headwise
from headwise import cli, kernels
from headwise.artifacts.budget import Budget
from headwise.artifacts.origin import Origin
from headwise.bench import decode
from headwise.commands import inputs
from headwise.commands.streaming import AnswerStreamer
from headwise.errors import BadInput, BudgetInfeasible
from headwise.kernels import quantised
from headwise.methods.registry import ALIASES, ALLOCATORS, SCORERS
from headwise.models import loading as models
from headwise.shapes import ModelShape
from headwise.tasks.mini_ruler.lexicon import REFERENCE_LEXICON
from headwise.tasks.mini_ruler.suite import generate

COMMANDS = {
    f"{name} {inner}" if inner else name: command
    for name, outer in typer.main.get_command(cli.app).commands.items()
    for inner, command in getattr(outer, "commands", {"": outer}).items()
}
PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
COMPARE = {
    "method",
    "keep",
    "entries",
    "protocol",
    "kv_bytes",
    "full_kv_bytes",
    "peak_kv_bytes",
    "accuracy",
    "kl",
    "agreement",
    "prefill_seconds",
    "prefill_shared_by",
    "decode_ms_per_token",
}
EVAL = {"method", "keep", "entries", "task", "length", "samples", "accuracy", "full_accuracy", "kv_fraction"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A document, questions, and files that are neither."""
    root = tmp_path_factory.mktemp("files")
    sample = generate("niah_multikey", lexicon=REFERENCE_LEXICON, length=200, seed=0, index=0, split="demo")
    (root / "text.txt").write_text(sample.context)
    lines = [json.dumps({"question": q.prompt, "answers": q.answers}) for q in sample.questions]
    (root / "questions.jsonl").write_text("\n".join(lines))
    (root / "report.txt").write_text("The annual report of the company was signed by Ada Lovelace. " * 20)
    (root / "binary").write_bytes(bytes(range(256)))
    (root / "empty").touch()
    (root / "bad.jsonl").write_text('{"ask": 1}')
    shape = ModelShape(num_layers=3, layers=(0, 1, 2), kv_heads=2, query_heads=4, head_dim=16)
    budget = Budget(
        ratios=torch.tensor([0.5]), fractions=torch.full((1, 3, 2), 0.5), origin=Origin(shape=shape, model="a/b")
    )
    budget.save(root / "budget.safetensors")
    return root


@pytest.fixture
def run(model_folders, folder, monkeypatch, capsys):
    """Run a command as the console script does: (exit code, stdout, stderr). {base}, {chat} ... are put in."""
    names = {**model_folders, "dir": folder}

    def call(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["headwise", *(part.format(**names) for part in shlex.split(line))])
        capsys.readouterr()  # what the test itself has printed
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return call


def succeed(run, line: str) -> str:
    code, out, err = run(line)
    assert (code, err) == (0, "")
    return out


OWN = "--model {base} --context {dir}/text.txt --questions {dir}/questions.jsonl"


# --- compare ---


@pytest.mark.parametrize("model", ["base", "chat", "qwen3"])
def test_compare_prints_exactly_the_agreed_fields(run, model):
    line = f"compare --model {{{model}}} --context {{dir}}/text.txt --questions {{dir}}/questions.jsonl --keep 0.25"
    rows = json.loads(succeed(run, f"{line} --methods full,keydiff,expected+global --max-new-tokens 3 --json"))
    assert [row["method"] for row in rows] == ["full", "keydiff", "expected+global"]
    for row in rows:
        assert set(row) == COMPARE
    full, kept, _ = rows
    assert full["keep"] == 1.0
    assert full["kv_bytes"] == full["full_kv_bytes"] == kept["full_kv_bytes"]
    assert full["kv_bytes"] % (2 * 3 * 2 * 16 * 4) == 0
    assert kept["kv_bytes"] == pytest.approx(0.25 * full["kv_bytes"], abs=2 * 16 * 4)


def test_compare_without_answers_measures_agreement(run):
    line = "compare -m {base} -c {dir}/text.txt -q '? locker apple' -q '? locker ant' --methods full --max-new-tokens 3"
    (row,) = json.loads(succeed(run, f"{line} --json --answers"))
    assert row["accuracy"] == 1.0
    assert (row["agreement"], row["keep"]) == (1.0, 1.0)
    assert len(row["answers"]) == 2
    shown = succeed(run, line.replace("full", "full,keydiff") + " --keep 1.0")
    assert "right" not in shown, "nobody knows what is right"
    assert "agreement" in shown and "as full" in shown
    assert "as full" not in succeed(run, f"{line} --no-answers")


def test_compare_takes_several_keeps_and_both_protocols(run):
    line = f"compare {OWN} --methods keydiff,snapkv --keep 0.5,60tok --max-new-tokens 2 --json"
    for protocol in ("query-agnostic", "query-aware"):
        rows = json.loads(succeed(run, f"{line} --protocol {protocol}"))
        assert [(row["method"], row["keep"]) for row in rows] == [
            (method, keep) for method in ("keydiff", "snapkv") for keep in (0.5, "60tok")
        ]
        assert {row["protocol"] for row in rows} == {protocol}
    assert "compressed with the document each (query-aware)" in succeed(
        run, f"compare {OWN} --methods keydiff --keep 0.5 --max-new-tokens 1 --protocol query-aware"
    )


def test_compare_has_a_row_for_all_kinds_of_entries(run):
    line = f"compare {OWN} --methods full,keydiff --keep 0.5,20%bytes --entries native,int4 --max-new-tokens 2"
    rows = json.loads(succeed(run, f"{line} --json"))
    assert [(row["method"], row["keep"], row["entries"]) for row in rows] == [
        ("full", 1.0, "native"),
        *(("keydiff", keep, entries) for keep in (0.5, "20%bytes") for entries in ("native", "int4")),
    ]
    half, small, *same = [row["kv_bytes"] for row in rows[1:]]
    assert small < half / 2
    assert all(size <= rows[0]["kv_bytes"] / 5 for size in same)
    shown = succeed(run, f"{line} --answers")
    assert [cells.split()[2] for cells in shown.splitlines() if " int4 " in cells][:2] == ["int4", "int4"]
    assert shown.count("entries") == 5, "of the table, and of the answers to each question"
    assert "entries" not in succeed(run, line.replace("native,int4", "native"))


def test_compare_reads_with_little_memory(run):
    """Between pieces a layer holds half as much again as the budget; what is kept in the end takes the same bytes."""
    line = f"compare {OWN} --keep 0.2 --max-new-tokens 2 --prefill-chunk-size 64 --methods keydiff --json"
    exact, evict, offload = (
        json.loads(succeed(run, f"{line} --reading {reading}")) for reading in ("exact", "evict", "offload")
    )
    for rows in (evict, offload):
        assert [(row["method"], row["kv_bytes"]) for row in rows] == [("keydiff", exact[0]["kv_bytes"])]
        assert rows[0]["peak_kv_bytes"] < exact[0]["peak_kv_bytes"]
    code, out, err = run(f"compare {OWN} --keep 0.2 --max-new-tokens 1 --prefill-chunk-size 64 --reading evict --json")
    assert code == 0 and "full" not in {row["method"] for row in json.loads(out)}
    assert "the full cache may not fit. Name it to have it." in err


def test_the_command_line_knows_all_kinds_of_entries():
    """It says them without torch."""
    assert (quantised.NATIVE, *quantised.ENTRIES) == inputs.ENTRIES
    for command, name in {"generate": "entries", "plan": "entries", "compare": "entries", "eval": "entries"}.items():
        (parameter,) = [one for one in COMMANDS[command].params if one.name == name]
        assert all(kind in parameter.help for kind in inputs.ENTRIES), command


def test_answers_stand_beside_the_full_cache_s(run):
    line = "compare -m {base} -c {dir}/text.txt -q '? locker apple' --methods keydiff --keep 1.0 --max-new-tokens 4"
    (row,) = json.loads(succeed(run, f"{line} --json --answers"))
    lines = [cells.split() for cells in succeed(run, line).splitlines() if cells.strip()]
    at = lines.index(["?", "locker", "apple"])
    assert lines[at + 1] == ["method", "keep", "answer"]
    assert lines[at + 3] == ["full", "1.0", *row["answers"][0].split()]
    assert lines[at + 4] == ["keydiff", "1.0", "as", "full"]


def test_compare_prints_a_table_and_the_answers(run):
    out = succeed(run, f"compare {OWN} --methods full,streaming --keep 0.25 --max-new-tokens 3 --answers")
    assert "4 questions asked of the compressed document (query-agnostic)" in out
    for word in ("full", "streaming", "25.0%", "KiB", "right", "peak KV", "ms/token", "? locker"):
        assert word in out


def test_markup_in_a_question_is_printed_as_it_is(run):
    """A closing tag in a question once ended in a traceback."""
    line = "compare -m {base} -c {dir}/text.txt -q 'the [/red] [b] :star: stone' --methods full --answers"
    assert "the [/red] [b] :star: stone" in succeed(run, line)


@pytest.mark.parametrize("evil", ["\x1b[2J", "\x9b2J", "\u202e", "\u2066", "\x07", "\r"])
def test_control_characters_of_others_reach_no_terminal(run, folder, evil):
    """In questions, documents, and names of files and models."""
    written = evil.encode("unicode_escape").decode()
    question = f"the red stone, the blue stone, the red stone? {evil}"
    out = succeed(run, f"compare -m {{base}} -c {{dir}}/text.txt -q '{question}' --methods full --answers")
    assert written in out and evil not in out
    named = folder / f"a{evil}.txt"
    named.write_text("%PDF-1.4")
    for line in (
        f"compare -c '{named}' -q ?",
        f"plan --model '/no{evil}'",
        f"inspect 'no{evil}'",
        f"generate -q 'Ada Lovelace {evil}?'",
    ):
        _, out, err = run(line)
        assert written in err and evil not in out + err
        assert err.count("\n") == 1


def test_compare_names_a_method_once(run):
    rows = json.loads(succeed(run, f"compare {OWN} --methods keydiff,,keydiff --keep 30tok --max-new-tokens 1 --json"))
    assert [(row["method"], row["keep"]) for row in rows] == [("keydiff", "30tok")]


def test_compare_with_a_budget_file(run):
    line = f"compare {OWN} --methods keydiff+fixed@{{dir}}/budget.safetensors --keep 0.5 --max-new-tokens 1 --json"
    (row,) = json.loads(succeed(run, line))
    assert row["kv_bytes"] * 2 == pytest.approx(row["full_kv_bytes"], abs=128)


# --- generate, eval ---


def test_generate_streams_the_answer_it_reports(run):
    line = "generate -m {qwen3} -c {dir}/text.txt -q '? locker apple' --method keydiff --keep 0.5 --max-new-tokens 5"
    found = json.loads(succeed(run, f"{line} --json"))
    assert set(found) == {"method", "keep", "entries", "answer", "kv_bytes"}
    assert (found["method"], found["keep"]) == ("keydiff", 0.5)
    assert found["answer"]
    assert succeed(run, line).strip() == found["answer"]


def test_generate_reads_with_little_memory(run):
    line = (
        "generate -m {base} -c {dir}/text.txt -q '? locker apple' --keep 0.5 --max-new-tokens 4 --method knorm --json"
    )
    exact, evict, offload = (
        json.loads(succeed(run, f"{line} --prefill-chunk-size 64 --reading {reading}"))
        for reading in ("exact", "evict", "offload")
    )
    assert offload == exact and evict["kv_bytes"] == exact["kv_bytes"]


def test_generate_stores_entries_as_asked_and_inspect_says_it(run, tmp_path):
    save = tmp_path / "report.safetensors"
    line = "generate -m {base} -c {dir}/text.txt -q '? locker apple' --keep 0.5 --max-new-tokens 2 --json"
    native = json.loads(succeed(run, f"{line} --method streaming"))
    small = json.loads(succeed(run, f"{line} --method streaming --entries int4 --save {save}"))
    assert (native["entries"], small["entries"]) == ("native", "int4")
    assert small["kv_bytes"] < native["kv_bytes"] / 2
    whole = json.loads(succeed(run, f"{line} --method full --entries int4"))
    assert (whole["keep"], whole["entries"]) == (1.0, "native")
    assert json.loads(succeed(run, f"inspect {save} --json"))["entries"] == "int4"
    out = succeed(run, f"inspect {save}")
    (held,) = re.findall(r"KV held +([\d.]+) KiB", out)
    assert float(held) == pytest.approx(small["kv_bytes"] / 1024, rel=1e-3)
    parts = re.findall(r"([\d,]+) (?:with 4 bits a key, 4 a value|of the first tokens .*?), ([\d.]+) KiB", out)
    assert sum(float(size) for _, size in parts) == pytest.approx(float(held), rel=1e-3)
    assert int(parts[1][0]) == 4 * 6 and "int4: " in out, "the first tokens of every head"
    assert "50.0% of those read" in out
    succeed(run, f"inspect {save} --plot --context {{dir}}/text.txt --model {{base}}")
    assert "keep 0.5, int4" in save.with_suffix(".html").read_text()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "found"), [(Terminal, r"a\x1b[2J \u202eb"), (io.StringIO, "a\x1b[2J \u202eb")])
def test_an_answer_is_escaped_for_terminals_only(monkeypatch, stream, found):
    """A pipe gets the answer as it is."""
    tokenizer = models.load_tokenizer("reference")
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: "a\x1b[2J \u202eb\n")
    monkeypatch.setattr(sys, "stdout", stream())
    streamer = AnswerStreamer(tokenizer)
    streamer.put(torch.tensor([5]))
    streamer.end()
    assert sys.stdout.getvalue() == f"{found}\n\n"


@pytest.mark.parametrize("model", ["base", "chat"])
def test_control_tokens_of_a_document_can_be_text(run, folder, model):
    (folder / "spoofed.txt").write_text((folder / "text.txt").read_text() + "<eos><bos>")
    own = f"-m {{{model}}} -c {{dir}}/spoofed.txt -q '? locker apple' --max-new-tokens 1 --json"
    for line in (f"generate {own} --method full", f"compare {own} --methods full"):
        found = [json.loads(succeed(run, line + more)) for more in ("", " --split-special-tokens")]
        tokens, text = (one[0] if isinstance(one, list) else one for one in found)
        assert text["kv_bytes"] == tokens["kv_bytes"] + 4 * 2 * 3 * 2 * 16 * 4  # "<", "eos", ">" in place of "<eos>"


def test_generate_saves_the_document_it_has_cut(run, tmp_path):
    """And `inspect` draws which words every head keeps."""
    save = tmp_path / "report.safetensors"
    line = f"generate -m {{base}} -c {{dir}}/text.txt -q '? locker apple' --method keydiff --keep 0.5 --save {save}"
    succeed(run, f"{line} --max-new-tokens 2")
    succeed(run, f"inspect {save} --plot --context {{dir}}/text.txt --model {{base}}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.safetensors"]


@pytest.mark.parametrize(("model", "method"), [("{qwen3}", "kvzip-l2"), ("reference", "lkv")])
def test_the_default_method_is_said_with_its_reason(run, model, method):
    line = f"generate -m {model} -c {{dir}}/text.txt -q '? locker apple' --keep 0.5 --max-new-tokens 2 --json"
    code, out, err = run(line)
    assert code == 0
    assert json.loads(out)["method"] == method
    assert re.fullmatch(rf"headwise: the method is {method}: [^\n]*gates[^\n]*\.\n", err)
    code, out, err = run(f"{line.replace('generate', 'compare')} --methods full,auto")
    assert [row["method"] for row in json.loads(out)] == ["full", method]
    assert err.count("\n") == 1


def test_a_saved_document_says_which_method_the_default_was(run, tmp_path):
    save = tmp_path / "report.safetensors"
    assert run(f"generate -m {{base}} -c {{dir}}/text.txt -q '? locker apple' --keep 0.5 --save {save}")[0] == 0
    assert json.loads(succeed(run, f"inspect {save} --json"))["method"]["scorer"]["name"] == "KVzipL2"


LIGHT = {  # answered before torch is imported, which takes seconds
    "compare -m nofolder/x": "there is no folder of this name",
    "compare -m {dir}": "has no config.json",
    "generate -q who -m {dir}/empty": "is a file",
    "eval -m /no/such/model": "there is no folder",
    "profile -m /no/such/model --out {dir}/profile": "there is no folder",
    "train -m /no/such/model --out {dir}/gates": "there is no folder",
    "plan -m /no/such/model": "there is no folder",
    "tiers -m /no/such/model": "there is no folder",
    "compare --methods keydif": "Did you mean 'keydiff'?",
    "eval --methods keydiff+adakw": "there is no allocator",
    "generate -q who --method lkv+": "It is short for lkv-t+lkv-c",
    "compare --keep 0.15,15": "is outside (0, 1]",
    "eval --keep lots": "is not understood",
    "generate -q who --keep 0": "is outside (0, 1]",
    "compare --entries native,int3": "entries='int3' does not exist; choose native, int8, k8v4, int4",
    "eval --entries int3": "choose native, int8, k8v4, int4",
    "generate -q who --entries native,int4": "choose native, int8, k8v4, int4",
    "plan --entries INT4": "choose native, int8, k8v4, int4",
    "compare --protocol aware": "choose query-agnostic or query-aware",
    "compare --reading never": "reading='never' does not exist; choose exact, evict, offload",
    "eval --reading all": "choose exact, evict, offload",
    "plan --reading EVICT": "choose exact, evict, offload",
    "plan --reading evict --keep 5%bytes --entries auto": "cannot be used with entries='auto'",
    "compare --reading evict --keep 5%bytes --entries auto": "cannot be used with entries='auto'",
    "eval --reading evict --keep 5%bytes --entries auto": "cannot be used with entries='auto'",
    "generate -q who --reading evict --method full": "is for methods that compress",
    "compare -c {dir}/nowhere.txt -q who": "cannot read the document",
    "compare -c {dir}/binary -q who": "is not UTF-8 text",
    "compare --questions {dir}/bad.jsonl": "is no question",
}


def test_wrong_inputs_are_told_without_torch(folder):
    """One process for all: no import of the heavy libraries may come before any of these messages."""
    program = (
        "import json, sys\n"
        "from headwise import cli\n"
        "for line in json.loads(sys.stdin.read()):\n"
        "    sys.argv = ['headwise', *line]\n"
        "    try: cli.main()\n"
        "    except SystemExit as end: print(end.code, sorted({*HEAVY} & {*sys.modules}))\n"
    ).replace("HEAVY", "('torch', 'transformers', 'jaxtyping')")
    lines = [[part.format(dir=folder) for part in shlex.split(line)] for line in LIGHT]
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(lines), capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == ["2 []"] * len(LIGHT), done.stderr
    for said, message in zip(done.stderr.splitlines(), LIGHT.values(), strict=True):
        assert message in said


def test_generate_from_the_full_cache(run):
    line = "generate -m {base} -c {dir}/text.txt -q '? locker apple' --method full --max-new-tokens 5 --json"
    assert json.loads(succeed(run, line))["keep"] == 1.0


def test_generate_ends_at_the_model_s_last_position(run):
    line = "generate -m {base} -c {dir}/text.txt -q '? locker apple' --method adakv --keep 0.25"
    line += " --max-new-tokens 1000000 --json"
    assert len(json.loads(succeed(run, line))["answer"].split()) < 1024


def test_eval_prints_exactly_the_agreed_fields(run):
    line = "eval -m {base} --tasks mini-ruler:vt,niah_single --methods full,keydiff --keep 0.25,0.5"
    line += " --samples 1 --length 160 --seed 3"
    records = json.loads(succeed(run, f"{line} --json"))
    assert len(records) == 6
    for record in records:
        assert set(record) == EVAL
        assert record["kv_fraction"] == pytest.approx(record["keep"], abs=0.005)
        assert (record["length"], record["samples"]) == (160, 1)
    out = succeed(run, line)
    assert "1 sample per task, 160 tokens, seed 3, query-agnostic" in out
    assert "niah_single" in out


def test_eval_has_a_row_for_all_kinds_of_entries(run, tmp_path):
    line = "eval -m {base} --tasks mini-ruler:vt --methods keydiff --keep 0.5 --samples 1 --length 160"
    rows = json.loads(succeed(run, f"{line} --entries native,int8 --out {tmp_path / 'run'} --json"))
    assert [(row["keep"], row["entries"]) for row in rows] == [(0.5, "native"), (0.5, "int8")]
    assert rows[1]["kv_fraction"] < rows[0]["kv_fraction"] / 2
    out = succeed(run, f"{line} --entries int8 --out {tmp_path / 'run'}")
    assert "entries" in out and "int8" in out and "native" not in out
    assert "entries" not in succeed(run, f"{line} --out {tmp_path / 'run'}")
    succeed(run, f"report {tmp_path / 'run'} -o {tmp_path / 'report.html'}")
    assert "| keydiff, int8 |" in (tmp_path / "report.md").read_text()


def test_eval_writes_records_and_goes_on_where_it_was(run, tmp_path):
    line = f"eval -m {{base}} --tasks mini-ruler:vt --keep 0.25 --samples 1 --length 160 --out {tmp_path / 'run'}"
    first = json.loads(succeed(run, f"{line} --methods keydiff --json"))
    lines = (tmp_path / "run" / "records.jsonl").read_text().splitlines()
    assert [json.loads(record)["method"] for record in lines] == ["full", "keydiff"]
    both = json.loads(succeed(run, f"{line} --methods keydiff,knorm --json"))
    assert both[0] == first[0]
    assert (tmp_path / "run" / "records.jsonl").read_text().splitlines()[:2] == lines
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["command"].startswith("headwise eval -m ")
    assert told["methods"] == ["full", "keydiff", "knorm"]


def test_the_whole_of_ruler_leaves_out_what_has_no_data(run, tmp_path, monkeypatch):
    """The README's example once ended with an error; a task that is named is an error as ever."""
    named = []

    def stop(given, tokenizer, sizes):
        named.extend(name for _, name in given)
        raise BadInput("enough")

    monkeypatch.setattr("headwise.tasks.suites.make_tasks", stop)
    _, _, err = run("eval -m {base} --tasks ruler --length 1024")
    assert err.splitlines()[0].startswith("headwise: ruler: qa_1, qa_2 are left out for want of data")
    assert len(named) == 11 and "qa_1" not in named
    (tmp_path / "squad.json").write_text("{{}}")
    named.clear()
    _, _, err = run(f"eval -m {{base}} --tasks ruler,ruler:qa_2 --length 1024 --data-dir {tmp_path}")
    assert err.splitlines()[0].startswith("headwise: ruler: qa_2 is left out for want of data")
    assert len(named) == 13, "what is named is not left out"


def test_eval_shows_how_sure_a_mean_is(run):
    out = succeed(run, "eval -m {base} --tasks mini-ruler:vt --methods full --samples 1 --length 160")
    (row,) = [line.split() for line in out.splitlines() if "mini-ruler:vt" in line]
    low, high = map(float, row[5].split("-"))
    assert low <= float(row[4]) <= high and high - low > 0.7, "of a single sample"


def test_a_report_without_matplotlib_says_what_is_left_out(run, tmp_path, monkeypatch):
    folder, page = tmp_path / "run", tmp_path / "report.html"
    succeed(run, f"eval -m {{base}} --tasks mini-ruler:vt --methods full --samples 1 --length 160 --out {folder}")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "headwise.report.draw.picture", raising=False)
    code, out, err = run(f"report {folder} -o {page} --json")
    assert code == 0
    assert json.loads(out) == {"written": [str(page.with_suffix(end)) for end in (".html", ".csv", ".md")]}
    assert err.count("\n") == 1 and f"{page.with_suffix('.png')} is left out" in err and "headwise[plot]" in err


def test_report_of_an_evaluation(run, tmp_path):
    folder, page = tmp_path / "run", tmp_path / "report.html"
    line = "eval -m {base} --tasks mini-ruler:vt,cwe --methods keydiff --keep 0.25,0.5 --samples 2 --length 160"
    succeed(run, f"{line} --out {folder}")
    said = json.loads(succeed(run, f"report {folder} -o {page} --json"))
    assert said == {"written": [str(page.with_suffix(end)) for end in (".html", ".csv", ".md", ".png")]}
    text = page.read_text()
    assert "keydiff" in text and "mini-ruler:cwe" in text and "headwise eval -m" in text
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_eval_of_own_documents_and_texts(run, tmp_path):
    words = " ".join(REFERENCE_LEXICON.keys[:40])
    document = {"context": f"{words}. " * 3, "question": "? who", "answers": ["nobody"], "metric": "f1"}
    (tmp_path / "my.jsonl").write_text(json.dumps(document))
    (tmp_path / "my.txt").write_text(f"{words}. " * 9)
    line = f"eval -m {{base}} --tasks file:{tmp_path}/my.jsonl,perplexity:{tmp_path}/my.txt --methods keydiff "
    out = succeed(run, f"{line} --keep 0.5 --length 120")
    assert "file:my.jsonl" in out
    assert "ppl " in out
    rows = json.loads(succeed(run, f"{line} --keep 0.5 --length 120 --json"))
    assert [(row["task"], row["accuracy"] is None) for row in rows] == [
        ("file:my.jsonl", False),
        ("perplexity:my.txt", True),
    ]


# --- doctor, build-kernels, bench ---


def test_doctor_names_the_kernel_that_is_used(run):
    found = json.loads(succeed(run, "doctor --json"))
    assert {"headwise", "torch", "transformers", "python"} <= set(found["versions"])
    names = [kernel["name"] for kernel in found["kernels"]]
    assert names == [*kernels.KERNELS]
    assert {"reference", "pages", "native", "triton"} <= {*names}
    used = [kernel["name"] for kernel in found["kernels"] if kernel["used_on"] == "cpu"]
    assert used == [kernels.fastest(torch.device("cpu"))]
    assert used[0] in succeed(run, "doctor")


@pytest.mark.skipif(kernels.why_not("native") is not None, reason=str(kernels.why_not("native")))
def test_build_kernels_says_where_the_library_is(run):
    found = json.loads(succeed(run, "build-kernels --json"))
    assert Path(found["path"]).is_file()
    assert set(found) == {"path", "features", "built", "seconds"}
    assert found["path"] in succeed(run, "build-kernels")


def test_bench_decode_prints_a_row_for_every_candidate_and_setting(run, monkeypatch):
    """How large a storage every candidate goes round does not matter here."""
    copies = decode._copies
    monkeypatch.setattr(decode, "_copies", lambda tensors, gigabytes: copies(tensors, gigabytes / 1000))
    line = "bench decode --tokens 1024 --dtype bfloat16 --keep 0.2,0.5 --rounds 1"
    rows = json.loads(succeed(run, f"{line} --json"))
    assert [(row["keep"], row["candidate"]) for row in rows[:3]] == [
        (0.2, "full"),
        (0.2, "full, grouped"),
        (0.2, "pages"),
    ]
    assert {row["keep"] for row in rows} == {0.2, 0.5}
    wanted = {"candidate", "dtype", "batch", "ms", "speedup_vs_full", "times_floor", "rel_error"}
    assert all(wanted | {"hardware", "versions", "command"} <= set(row) for row in rows)
    assert "full, grouped" in succeed(run, line)


def test_bench_prefill_prints_a_row_for_every_method_and_context(run):
    line = (
        "bench prefill --model random-narrow --layers 2 --dtype float32 --tokens 256,512 --methods lkv,knorm --rounds 1"
    )
    rows = json.loads(succeed(run, f"{line} --json"))
    assert [(row["tokens"], row["candidate"]) for row in rows] == [
        (tokens, name) for tokens in (256, 512) for name in ("full", "lkv", "knorm")
    ]
    assert all({"overhead", "hardware", "versions", "command"} <= set(row) for row in rows)
    assert "of it ours" in succeed(run, line)


@pytest.mark.parametrize("command", ["prefill", "generate", "memory"])
def test_bench_looks_at_budgets_before_it_measures(run, monkeypatch, command):
    """The full cache was measured first, for minutes."""
    work = {"prefill": "headwise.bench.prefill.run"}.get(command, "headwise.bench.candidates.run")
    monkeypatch.setattr(work, lambda *args, **kwargs: pytest.fail("it measures"))
    line = f"bench {command} --model random-narrow --tokens 4096,512 --methods lkv,snapkv --keep 0.05"
    code, out, err = run(line)
    assert "snapkv cannot work with keep=0.05 of 512 tokens" in err and "The smallest keep that works" in err
    assert (code, out, err.count("\n")) == (1, "", 1)


# --- methods, inspect, plan ---


def test_methods_lists_everything_registered(run):
    rows = json.loads(succeed(run, "methods --json"))
    assert all(set(row) == {"kind", "name", "summary", "paper", "served"} for row in rows)
    names = {kind: [row["name"] for row in rows if row["kind"] == kind] for kind in ("scorer", "allocator", "alias")}
    assert names == {"scorer": [*SCORERS], "allocator": [*ALLOCATORS], "alias": [*ALIASES]}
    out = succeed(run, "methods")
    for row in rows:
        assert row["name"] in out
        assert row["summary"] in out
        assert row["paper"] in out


def test_inspect_describes_an_artifact(run):
    found = json.loads(succeed(run, "inspect {dir}/budget.safetensors --json"))
    assert (found["kind"], found["origin"]["model"]) == ("budget", "a/b")
    assert found["tensors"]["fractions"]["shape"] == [1, 3, 2]
    assert found["budgets"]["0.15"] == [[pytest.approx(0.15)] * 2] * 3
    out = succeed(run, "inspect {dir}/budget.safetensors")
    for words in ("a budget: how", "a/b: 3 layers x 2 KV heads of 16", "SCORER+fixed@", "15.0%", "least of a head"):
        assert words in out
    assert "[1, 3, 2]" not in out and "format_version" not in out
    for flag in ("-v", "--verbose"):
        more = succeed(run, f"inspect {{dir}}/budget.safetensors {flag}")
        assert more.startswith(out.rstrip("\n"))
        assert "[1, 3, 2]" in more and "format_version" in more


def test_inspect_describes_a_cache(run, model_folders, tmp_path):
    from headwise import compress

    model, tokenizer = models.load(str(model_folders["base"]), device="cpu")
    ids = torch.tensor([tokenizer("the red stone. " * 10)["input_ids"]])
    compress(model, ids, "keydiff", keep=0.5).save(tmp_path / "stone.safetensors")
    found = json.loads(succeed(run, f"inspect {tmp_path}/stone.safetensors --json"))
    assert (found["kind"], found["keep"]) == ("cache", "0.5")
    assert found["method"]["scorer"]["name"] == "KeyDiff"
    states = [one["shape"] for name, one in found["tensors"].items() if name.endswith((".keys", ".values"))]
    held = sum(entries * numbers * 4 for entries, numbers in states)
    out = succeed(run, f"inspect {tmp_path}/stone.safetensors")
    for words in (
        "KeyDiff + Uniform, keep 0.5",
        "native: in the model's dtype (F32)",
        f"{held / 1024:.4g} KiB; at most",
        "50.0% of those read",
    ):
        assert words in out


def test_inspect_of_a_damaged_header_is_one_line(run, tmp_path):
    from headwise.artifacts.tensors import write_tensors

    for at, damage in enumerate([{"method": 3}, {"method": {"scorer": [1]}}, {"context_tokens": "x"}]):
        path = tmp_path / f"{at}.safetensors"
        write_tensors(path, "cache", {"0.lengths": torch.ones(1, 2)}, {"keep": "0.5", **damage})
        code, out, err = run(f"inspect {path}")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "its header is damaged" in err
        succeed(run, f"inspect {path} --json")


def test_tiers_say_what_a_server_would_keep(run, model_folders, tmp_path):
    (tmp_path / "config.json").write_text((model_folders["base"] / "config.json").read_text())
    line = f"tiers -m {tmp_path} --method snapkv+pyramid -k 25% -c 1k --block-size 8 --tiers 2"
    found = json.loads(succeed(run, f"{line} --json"))
    assert sum(tier["heads"] for tier in found["tiers"]) == 6
    assert len(found["tiers"]) == 2
    assert found["average_keep"] == pytest.approx(0.25, abs=1e-4)
    assert found["blocks_reading"] == 128 * 6 // found["heads_per_group"]
    assert found["blocks_kept"] < found["blocks_reading"] / 3
    assert (found["floor"], found["keep"]) == (32, 0.25)
    words = shlex.split(found["command"])
    assert words[:3] == ["vllm", "serve", str(tmp_path)]
    assert json.loads(words[-1])["headwise"] == {
        "method": "snapkv+pyramid",
        "keep": 0.25,
        "tiers": 2,
        "context": 1024,
        "ranks": 1,
    }
    out = succeed(run, line)
    assert "KV heads" in out
    assert found["command"] in out


def test_plan_needs_the_configuration_only(run, model_folders, tmp_path):
    (tmp_path / "config.json").write_text((model_folders["base"] / "config.json").read_text())
    line = f"plan --model {tmp_path} --context 1k --keep 0.5 --memory 1GiB --batch 2"
    found = json.loads(succeed(run, f"{line} --json"))
    assert found["full_kv_bytes"] == 2 * 2 * 3 * 2 * 1024 * 16 * 4
    assert (found["dtype"], found["beyond_positions"]) == ("float32", False)
    assert found["kv_bytes"] * 2 == found["full_kv_bytes"]
    assert found["fits"] is True
    out = succeed(run, line)
    for words in ("made for 1,024 tokens", "KV peak while reading", "largest batch", "longest context", "Note: "):
        assert words in out
    assert "longer context may fit, but is refused" in out
    assert "largest batch" not in succeed(run, f"plan --model {tmp_path}")
    assert "Too long for the model: it was made for 1,024 tokens, so 2,048 are refused." in succeed(
        run, f"plan --model {tmp_path} -c 2k"
    )


def test_plan_says_what_a_reading_takes(run):
    """Whole layers, or what is kept and half as much again and one piece, or two layers."""
    line = "plan --context 1k --keep 0.1 --prefill-chunk-size 128"
    plans = {
        name: json.loads(succeed(run, f"{line} --reading {name} --json")) for name in ("exact", "evict", "offload")
    }
    full, layer = plans["exact"]["full_kv_bytes"], plans["exact"]["full_kv_bytes"] // 6
    assert plans["exact"]["peak_kv_bytes"] > full * 0.9
    assert plans["evict"]["peak_kv_bytes"] == pytest.approx(0.15 * full + layer / 8, rel=0.01)
    assert plans["offload"]["peak_kv_bytes"] == 2 * layer
    assert {plan["prefill_chunk_size"] for plan in plans.values()} == {128}
    assert "(evict, 128 tokens a piece)" in succeed(run, f"{line} --reading evict")


def test_plan_counts_entries_as_they_are_stored(run):
    line = "plan --context 1k --keep 0.5"
    native, small = (json.loads(succeed(run, f"{line} --entries {name} --json")) for name in ("native", "int4"))
    assert (native["entries"], small["entries"]) == ("native", "int4")
    assert small["kv_bytes"] < native["kv_bytes"] / 2 and small["full_kv_bytes"] == native["full_kv_bytes"]
    assert "keep 0.5, int4" in succeed(run, f"{line} --entries int4")
    assert "native" not in succeed(run, line)


def test_the_plan_of_the_bundled_model_is_what_auto_loads_it_in(run):
    assert json.loads(succeed(run, "plan --json"))["dtype"] == "float32"


# --- errors ---

WRONG = {
    "generate -q who --reading evict --method kvzip --keep 0.5": "scores a context that is all there",
    "compare -m {base} -c {dir}/text.txt": "a document needs questions",
    "compare -m {base} -c {dir}/text.txt -q ''": "a question is empty",
    "compare -m {base} -c {dir}/nowhere.txt -q who": "cannot read the document",
    "compare -m {base} -c {dir} -q who": "cannot read the document",
    "compare -m {base} -c {dir}/binary -q who": "is not UTF-8 text",
    "compare -m {base} -c {dir}/empty -q who": "is empty",
    "compare -m {base} -c {dir}/text.txt --questions {dir}/bad.jsonl": "line 1 is no question",
    "compare -m {base} -c {dir}/text.txt --questions {dir}/nowhere.jsonl": "cannot read questions",
    "compare -m {base} -c {dir}/text.txt --questions {dir}/empty": "holds no questions",
    f"compare {OWN} --methods ,": "is an empty list",
    f"compare {OWN} --methods adakw": "Did you mean 'adakv'?",
    f"compare {OWN} --methods keydiff+fixed@nowhere": "is not a file",
    f"compare {OWN} --keep 0": "is outside (0, 1]",
    f"compare {OWN} --keep -1": "is not understood",
    f"compare {OWN} --keep lots": "is not understood",
    f"compare {OWN} --dtype int4": "choose auto, float32",
    f"compare {OWN} --device abacus": "cannot be used",
    "compare -m /no/such/model -c {dir}/text.txt -q who": "there is no folder /no/such/model",
    "tiers -m {base} --method adakv": "cannot be served, because of its allocator 'adakv'",
    "tiers -m {base} --method h2o": "Use streaming, knorm, keydiff, snapkv, lkv-t",
    "tiers -m {base} --keep 64tok": "must be a fraction",
    "tiers -m {base} --context 0": "is not a number of tokens",
    "plan -m ./no/such/model": "there is no folder ./no/such/model",
    "compare -m {base} -c {dir}/report.txt -q who": "does not know",
    "generate -m {base} -c {dir}/report.txt -q who": "does not know",
    "generate -m {base} -c {dir}/text.txt -q 'Zanzibar?'": "such as Zanzibar: its answers would mean nothing",
    "compare -m {dir}/empty -c {dir}/text.txt -q who": "is a file",
    "generate -m {base} -c {dir}/text.txt -q who --method nope": "no scorer 'nope'",
    "generate -m {base} -c {dir}/text.txt -q ' '": "a question is empty",
    "generate -m {base} -c {dir}/text.txt -q who --method full --save x": "a method that compresses",
    "generate -m {base} -c {dir}/text.txt -q who --save {dir}/nowhere/x": "in a folder that exists",
    "eval -m {base} --tasks mini-ruler:nope": "the tasks are niah_single",
    "eval -m {base} --tasks mini-ruler:": "names no task",
    "eval -m {base} --tasks longbanch": "'longbanch' is no suite; choose mini-ruler, ruler, longbench",
    "eval -m {base} --tasks file:nope.jsonl": "cannot read the document nope.jsonl",
    "eval -m {base} --tasks ruler:qa_1 --length 4096": "squad.json",
    "eval -m {base} --protocol aware": "choose query-agnostic or query-aware",
    "eval -m {base} --keep ''": "is an empty list",
    "bench decode --tokens many": "'many' is no list of numbers",
    "bench decode --dtype int8": "dtype='int8' is not measured",
    "bench decode --kvpress nowhere/python": "nowhere/python cannot be run",
    "bench prefill --methods full,nope": "no scorer 'nope'",
    "bench prefill --model nope/nope": "cannot load 'nope/nope'",
    "bench generate --keep 0": "keep=0.0 is a share",
    "bench generate --methods kvpress:adakv": "name the Python of an environment",
    "bench generate --methods kvpress:nope": "kvpress:nope is not measured",
    "bench memory -m {base} --layers 2": "the layers of a checkpoint are its own",
    "bench memory --tokens 0": "must be at least 1",
    "eval -m {base} --methods full,nope": "no scorer 'nope'",
    "eval -m {base} --tasks mini-ruler:vt --length 4": "too short",
    "eval -m {base} --tasks mini-ruler:vt --length 5000": "made for 1024",
    "plan -m {base} --context 1x": "is not a number of tokens",
    "plan -m {base} --memory 24": "is not a size in bytes",
    "plan -m {base} --keep 2": "is outside (0, 1]",
    "plan -m {base} --dtype int4": "choose auto, float32",
    "inspect {dir}/text.txt": "damaged or no safetensors file",
    "inspect {dir}": "is not a file",
    "inspect {dir}/budget.safetensors --ratio 0.15": "--ratio 0.15 is of a plot: add --plot",
    "generate -m {base} -c {dir}/text.txt -q who -q when": "generate answers one question, and 2 are given",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_input_is_one_line_on_stderr_and_code_2(run, line):
    code, out, err = run(line)
    assert WRONG[line] in err
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("headwise: ")


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "compare --nonsense",
        "generate",
        "compare --max-new-tokens 0",
        "compare --prefill-chunk-size 0",
        "eval --samples 0",
        "eval --length -5",
        "eval --seed -1",
        "plan --batch 0",
        "inspect",
    ],
)
def test_a_wrong_command_line_is_code_2(run, line):
    code, out, err = run(line)
    assert (code, out) == (2, "")
    assert "Usage: " in err
    assert "Traceback" not in err


def test_what_cannot_be_done_is_code_1(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    for line, words in {
        f"compare -m {tmp_path} -c {{dir}}/text.txt -q who": "'roberta' is not supported",
        f"plan -m {tmp_path}": "'roberta' is not supported",
        f"compare {OWN} --methods snapkv --keep 0.01": "The smallest keep that works",
        "inspect {base}/model.safetensors": "headwise did not write it",
    }.items():
        code, out, err = run(line)
        assert words in err
        assert (code, out, err.count("\n")) == (1, "", 1)


def test_out_of_memory_is_told_and_other_errors_are_not_hidden(run, monkeypatch):
    def fail(error):
        def raising(*args, **kwargs):
            raise error

        monkeypatch.setattr("headwise.models.loading.load", raising)

    fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16 GiB.\nDetails"))
    code, out, err = run(f"compare {OWN}")
    assert "out of memory; try --prefill-chunk-size" in err
    assert (code, out, err.count("\n")) == (1, "", 1)
    for error in (
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate"),
    ):
        fail(error)
        code, out, err = run(f"compare {OWN}")
        assert "out of memory; try --prefill-chunk-size" in err
        assert (code, out, err.count("\n")) == (1, "", 1)
    fail(RuntimeError("a bug of ours"))
    with pytest.raises(RuntimeError, match="a bug of ours"):
        run(f"compare {OWN}")


def test_without_the_bundled_files_the_message_names_them(run, monkeypatch, tmp_path):
    monkeypatch.setattr("headwise.tasks.texts.reference_path", lambda: tmp_path)
    code, out, err = run("compare -m {base}")
    assert "cannot read the document" in err
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("command", ["compare --methods keydiff", "generate --method keydiff"])
def test_a_budget_that_holds_nothing_is_named_as_it_was_asked(run, command):
    """It was once said that keep=0 was asked."""
    code, out, err = run(f"{command} -m {{base}} -c {{dir}}/text.txt -q '? locker apple' --keep 10B")
    assert "keydiff cannot work with keep=10B" in err
    assert (code, out, err.count("\n")) == (1, "", 1)


def test_sliding_window_layers_are_mentioned_where_there_are_some(run, tmp_path):
    folder = save_model(tmp_path / "gemma", "gemma3_text")
    line = f"compare -m {folder} -c {{dir}}/text.txt -q '? locker apple' --methods full,streaming --max-new-tokens 1"
    sliding = 2 * 2 * 15 * 16 * 4  # keys and values of 2 heads x (window - 1) tokens x 16 numbers of 4 bytes
    said = f"Sliding-window layers are left whole, whatever the keep: {sliding / 1024:.4g} KiB of the KV held."
    assert said in succeed(run, line)
    assert {key for row in json.loads(succeed(run, f"{line} --json")) for key in row} == COMPARE
    assert "Sliding-window" not in succeed(run, line.replace(str(folder), "{base}"))
    assert said in succeed(run, f"plan -m {folder} --dtype float32")
    assert "Sliding-window" not in succeed(run, "plan -m {base}")


def test_the_version(run):
    assert succeed(run, "--version") == f"headwise {headwise.__version__}\n"


def test_infeasible_budgets_are_not_usage_errors():
    assert issubclass(BudgetInfeasible, ValueError)
    assert not issubclass(BudgetInfeasible, BadInput)


# --- help and documentation ---


def example(command: str) -> list[str]:
    """The words of the example that ends a command's help."""
    words = shlex.split(COMMANDS[command].epilog.removeprefix("Example: "))
    name = ["headwise", *command.split()]
    assert words[: len(name)] == name
    return words[len(name) :]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example_that_parses(command):
    shown = CliRunner().invoke(cli.app, [*command.split(), "--help"])
    assert shown.exit_code == 0
    assert "Example: headwise" in shown.stdout
    with COMMANDS[command].make_context(command, example(command), resilient_parsing=False) as context:
        assert context.params


def test_help_of_the_whole_and_no_arguments():
    shown = CliRunner().invoke(cli.app, ["--help"])
    assert shown.exit_code == 0
    assert "Example: headwise" in shown.stdout
    assert all(command.split()[0] in shown.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_is_documented(command):
    section = re.search(rf"^## {command}$(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert section, f"docs/cli.md has no section {command!r}"
    for parameter in COMMANDS[command].params:
        for name in [*parameter.opts, *parameter.secondary_opts]:
            if name.startswith("-") and name != "--help":
                assert f"`{name}" in section[1], f"docs/cli.md, {command}: {name} is missing"
    assert f"headwise {command}" in section[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_defaults_are_the_defaults(command):
    section = re.split(rf"^## {command}$", PAGE.read_text(), flags=re.MULTILINE)[1].split("\n## ")[0]
    said = dict(re.findall(r"^\| `(--[\w-]+)`[^|]*\| ([^|]*) \| [^|]* \|$", section, re.MULTILINE))
    for parameter in COMMANDS[command].params:
        if isinstance(parameter.default, str | int) and not parameter.is_flag:
            assert said[parameter.opts[0]].strip("`") == str(parameter.default)


def test_the_page_documents_nothing_that_is_not_there():
    sections = re.split(r"^## ([\w -]+)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    assert set(sections[::2]) == set(COMMANDS)
    for command, section in zip(sections[::2], sections[1::2], strict=True):
        known = {name for parameter in COMMANDS[command].params for name in parameter.opts}
        assert set(re.findall(r"^\| `(--[\w-]+)", section, re.MULTILINE)) <= known


def test_every_example_on_the_page_parses(model_folders):
    lines = re.findall(r"^\$ headwise (.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(lines) >= len(COMMANDS)
    for line in lines:
        command = next(name for name in sorted(COMMANDS, key=len, reverse=True) if f"{line} ".startswith(f"{name} "))
        words = shlex.split(line.removeprefix(command))
        with COMMANDS[command].make_context(command, words, resilient_parsing=False):
            pass


# --- as a process ---

SCRIPT = "import sys; sys.argv = ['headwise', 'inspect', 'nowhere']; from headwise.cli import main; main()"


def test_a_process_of_its_own():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "headwise: nowhere is not a file; check the path.\n"


def test_help_needs_no_torch():
    code = "import sys, headwise.cli; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


# --- calibrate ---


def test_calibrate_prints_a_row_per_domain(run):
    out = succeed(run, "calibrate --model {base} --contexts 8 --length 100")
    for word in ("8 contexts from builtin", "niah_multikey_dense", "cwe", "tokens", "questions"):
        assert word in out
    rows = json.loads(succeed(run, "calibrate --model {base} --contexts 8 --length 100 --json"))
    fields = {"domain", "contexts", "tokens", "shortest", "longest", "following_tokens", "questions"}
    assert all(set(row) == fields for row in rows)
    assert sum(row["contexts"] for row in rows) == 8


def test_calibrate_shows_examples_and_writes_what_data_reads(run, folder, tmp_path):
    text, out = folder / "report.txt", tmp_path / "mix.jsonl"
    line = f"calibrate --model reference --data {text} --length 80 --questions none"
    shown = succeed(run, f"{line} --show 1 --out {out}")
    assert "signed by Ada Lovelace" in shown and "follows" in shown and "own continuation" in shown
    assert "1 characters ..." not in shown
    made = json.loads(succeed(run, f"{line} --show 9 --json"))
    assert made == json.loads(succeed(run, f"calibrate --model reference --data {out} --show 9 --json"))
    assert set(made[0]) == {"context", "questions", "domain", "following"}
    assert text.read_text().startswith(made[0]["context"] + made[0]["following"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--questions some", "write auto, none, or how many"),
        ("--split evaluation", "never from what evaluates"),
        ("--length 9", "64 tokens or more"),
        ("--data nowhere.txt", "cannot read"),
        ("--data {dir}/empty", "is empty"),
        ("--contexts 4 --data builtin:5", "two numbers of contexts"),
    ],
)
def test_calibrate_refuses_what_is_wrong(run, options, words):
    code, out, err = run(f"calibrate --model {{base}} {options}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
