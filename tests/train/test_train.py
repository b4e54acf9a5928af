"""Training as a verb: from texts to a Gates file; resuming, sharing the work between processes, what is refused."""

import json
import math
import os
import shlex
import signal
import sys
from dataclasses import replace

import file_kinds
import pytest
import torch
from killing import ended, forked
from launching import SHARDED, fork
from random_gates import gates_file, gates_for

import headwise
from headwise import cli
from headwise.artifacts.gates import Gates
from headwise.artifacts.tensors import read_tensors, write_tensors
from headwise.errors import BadInput
from headwise.methods.registry import SCORERS
from headwise.models import loading as models
from headwise.models.families import view
from headwise.offline.calibration import Example, encode
from headwise.offline.train import run as module
from headwise.offline.train import warm
from headwise.offline.train.fit import FitSettings
from headwise.offline.train.loop import Settings, Trainer
from headwise.offline.train.run import Lessons, train

QUICK = Settings(
    fit=FitSettings(steps=0), steps=5, warm_steps=2, contexts_per_step=2, questions=2, answer_tokens=3, sink=1, window=3
)
WORDS = "locker apple red stone. the key was under the old tower, near a river. "
OPENINGS = ["then", "he saw a", "she had a", "near the", "under the", "a red", "an old", "the key", "the tower", "who"]
EXAMPLES = [
    Example(
        context=f"{opening} {WORDS * (1 + number % 2)}", questions=("? locker apple", "? who", "? near the")[:number]
    )
    for number, opening in enumerate([*OPENINGS, *OPENINGS[:2]])
]


PROFILED = warm.PROFILED


@pytest.fixture(scope="module", autouse=True)
def _short_start():
    """The first budgets are solved from one context."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm, "PROFILED", 1)
        yield


@pytest.fixture(scope="session")
def loaded(model_folders):
    """Model and tokenizer."""
    return models.load(str(model_folders["qwen3"]), device="cpu")


def make(loaded, out, examples=EXAMPLES, settings=QUICK, **options):
    train(*loaded, examples, out, settings=settings, **options)
    return Gates.load(out)


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory):
    """Gates made at one go, saved and validated every two steps, and their path."""
    out = tmp_path_factory.mktemp("train") / "g.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SAVE_EVERY", 2)
        return make(loaded, out), out


def log_of(out):
    return [json.loads(line) for line in out.with_name(f"{out.name}.log.jsonl").read_text().splitlines()]


def same(found, expected):
    return found.provenance()["fingerprint"] == expected.provenance()["fingerprint"]


# --- what is in it ---


def test_gates_say_what_they_were_made_for_and_how(loaded, whole):
    found, out = whole
    assert found.budgets is not None and found.scores is not None
    found.require(view(loaded[0]).shape, view(loaded[0]).config_hash)
    assert (found.origin.model, found.origin.sink, found.origin.window) == ("qwen3", 1, 3)
    assert found.origin.calibration
    for name in ("steps", "seed", "sink", "window", "questions", "answer_tokens"):
        assert found.settings[name] == getattr(QUICK, name)
    assert found.settings["part"] == "lkv"
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name, f"{out.name}.log.jsonl"]


def test_the_log_has_a_row_for_every_step(whole):
    start, *rows = log_of(whole[1])
    assert (start.keys(), start["step"]) == ({"step", "validation", "validation_agreement"}, -1)
    assert [row["step"] for row in rows] == list(range(5))
    assert [row["step"] for row in rows if "validation" in row] == [1, 3, 4]
    for row in rows:
        assert math.isfinite(row["loss"])
        assert 0 <= row["agreement"] <= 1


def test_progress_is_told_after_every_step(loaded, tmp_path):
    seen = []
    make(loaded, tmp_path / "g", progress=lambda done, total, text: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2), *((n, 5) for n in range(1, 6))]


def test_every_tenth_example_is_kept_for_validation(loaded, tmp_path, monkeypatch):
    seen, when = {"taught": set(), "held out": set()}, ["taught"]
    prepare, validate = module.prepare, Trainer.validate

    def note(model, tokenizer, example, *rest):
        seen[when[-1]].add(example.context)
        return prepare(model, tokenizer, example, *rest)

    def noting(self, lessons):
        when.append("held out")
        found = validate(self, lessons)
        when.pop()
        return found

    monkeypatch.setattr(module, "prepare", note)
    monkeypatch.setattr(Trainer, "validate", noting)
    make(loaded, tmp_path / "g", settings=replace(QUICK, steps=1, contexts_per_step=11))
    assert seen["held out"] == {EXAMPLES[9].context}
    assert seen["taught"] == {example.context for number, example in enumerate(EXAMPLES) if number != 9}


def test_the_best_gates_are_kept_not_the_last(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY", 1)
    losses, means = iter([4.0, 3.0, 1.0, 2.0, 1.5, 1.0]), []

    def validate(self, lessons):
        means.append([mean.clone() for mean in self.mean])
        return next(losses), 0.5

    monkeypatch.setattr(Trainer, "validate", validate)
    found = make(loaded, tmp_path / "g")
    kept = [*found.budgets.parameters(), *found.scores.parameters()]
    assert all(a.equal(b) for a, b in zip(kept, means[2], strict=True))


@pytest.mark.parametrize(("part", "scorer"), [("lkv-h", "keydiff"), ("lkv-h", "snapkv"), ("lkv-t", None)])
def test_one_part_alone(loaded, tmp_path, part, scorer):
    """What a fixed scorer protects is protected in training, as it will be in use."""
    out = tmp_path / "g.safetensors"
    examples = [replace(example, context=f"{example.context} {WORDS * 2}") for example in EXAMPLES]
    found = make(loaded, out, examples, part=part, scorer=scorer)
    assert (found.origin.sink, found.origin.window) == (QUICK.sink, 32 if scorer == "snapkv" else QUICK.window)
    assert (found.budgets is None, found.scores is None) == (part == "lkv-t", part == "lkv-h")
    assert found.origin.scorer == (scorer or "")
    assert found.origin.scorer_parameters == ({} if scorer is None else SCORERS[scorer].make().provenance())
    model, tokenizer = loaded
    context = encode(tokenizer, EXAMPLES[1], device="cpu")[0]
    method = f"{scorer}+lkv-h@{out}" if scorer else f"lkv-t@{out}"
    cache = headwise.compress(model, context, method, keep="20tok")
    assert int(cache.lengths.sum()) == 20 * cache.lengths.numel()


def test_budgets_for_entry_scores_that_were_trained_before(loaded, tmp_path):
    scores = gates_file(tmp_path, loaded[0], parts=("scores",))
    found = make(loaded, tmp_path / "g", part="lkv-h", scorer=f"lkv-t@{scores}")
    assert found.origin.scorer_parameters["name"] == "LKVT"
    assert found.budgets is not None


def test_the_same_seed_gives_the_same_gates_and_another_others(loaded, tmp_path):
    short = replace(QUICK, steps=2)
    first = make(loaded, tmp_path / "a", settings=short)
    torch.rand(3)
    make(loaded, tmp_path / "b", settings=short)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert not same(make(loaded, tmp_path / "c", settings=replace(short, seed=1)), first)


def test_lessons_that_do_not_fit_are_made_again(whole, loaded, tmp_path, monkeypatch):
    made = []

    class Thing:
        nbytes = 10

    lessons = Lessons(lambda at: made.append(at) or Thing(), 3, room=25)
    assert len([lesson for _ in range(2) for lesson in lessons]) == 6
    assert made == [0, 1, 2, 2]
    assert len(lessons[1:]) == 2
    monkeypatch.setattr(module, "SAVE_EVERY", 2)
    monkeypatch.setattr(Lessons.__init__, "__defaults__", (0,))
    assert same(make(loaded, tmp_path / "g"), whole[0])


# --- resuming ---


def steps_until(monkeypatch, last=None):
    """Note the steps that are done; raise, as a kill would, instead of step `last`."""
    done, step = [], Trainer.step
    monkeypatch.setattr(module, "SAVE_EVERY", 2)

    def noting(self, number):
        if number == last:
            raise KeyboardInterrupt
        done.append(number)
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", noting)
    return done


def kill(loaded, out, last=3, **options):
    with pytest.MonkeyPatch.context() as patch:
        steps_until(patch, last)
        with pytest.raises(KeyboardInterrupt):
            make(loaded, out, **options)
    assert not out.exists()


@pytest.mark.parametrize("last", [1, 3, 4])
def test_a_killed_run_goes_on_where_it_was(loaded, whole, tmp_path, monkeypatch, last):
    out = tmp_path / "g.safetensors"
    kill(loaded, out, last)
    done = steps_until(monkeypatch)
    assert same(make(loaded, out), whole[0])
    assert done == list(range(last // 2 * 2, 5))
    assert out.read_bytes() == whole[1].read_bytes()
    assert log_of(out) == log_of(whole[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, f"{out.name}.log.jsonl"]


def test_a_run_that_was_killed_while_writing_needs_no_step(loaded, whole, tmp_path, monkeypatch):
    out = tmp_path / "g.safetensors"
    done = steps_until(monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gates, "save", lambda self, path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(loaded, out)
    make(loaded, out)
    assert done == list(range(5))
    assert out.read_bytes() == whole[1].read_bytes()


@pytest.mark.parametrize("change", ["settings", "data", "weights", "part", "scorer"])
def test_the_state_of_another_run_is_not_taken_up(loaded, whole, model_folders, tmp_path, monkeypatch, change):
    other, mine = loaded, {"part": "lkv-h", "scorer": "keydiff"} if change == "scorer" else {}
    options = {
        "settings": {"settings": replace(QUICK, seed=3)},
        "data": {"examples": EXAMPLES[::-1]},
        "part": {"part": "lkv-t"},
        "scorer": {"part": "lkv-h", "scorer": "knorm"},
        "weights": {},
    }[change]
    if change == "weights":
        other = models.load(str(model_folders["qwen3"]), device="cpu")
        with torch.no_grad():
            other[0].model.layers[0].self_attn.o_proj.weight.mul_(1.5)
    kill(other, tmp_path / "g", 2, **options)
    assert (tmp_path / "g.state").exists()
    kill(loaded, tmp_path / "g", 1, **mine)  # had the state been taken up, step 1 would not have come
    if change == "settings":
        done = steps_until(monkeypatch)
        assert same(make(loaded, tmp_path / "g"), whole[0])
        assert done == list(range(5))
        assert not (tmp_path / "g.state").exists()


def test_a_damaged_state_is_named_and_the_old_gates_stay(loaded, tmp_path):
    out = tmp_path / "g"
    kill(loaded, out)
    state = tmp_path / "g.state"
    state.write_bytes(state.read_bytes()[:100])
    out.write_text("old")
    with pytest.raises(BadInput, match=r"g\.state is damaged"):
        make(loaded, out)
    assert out.read_text() == "old"


# --- several processes ---


def lines(path):
    records = [{"context": e.context, "questions": e.questions} for e in EXAMPLES]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


COMMAND = "train --model {folder} --data {data} --out {out} --fit-steps 100 --steps 4 --warm-steps 2 "
COMMAND += "--contexts-per-step 4 --questions 2 --answer-tokens 3 --keeps 0.1,0.4 --sink 1 --window 3 --seed 2 "
COMMAND += "--device cpu --json"


def command_line(line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["headwise", *shlex.split(line)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(model_folders, tmp_path, monkeypatch):
    """Each with the whole model, or each with half of its weights."""
    monkeypatch.setattr(warm, "PROFILED", PROFILED)
    data, outs = lines(tmp_path / "data.jsonl"), [tmp_path / f"{name}.safetensors" for name in ("one", "two", "halves")]
    for out, how in zip(outs, [(1,), (2,), (2, SHARDED)], strict=True):
        line = COMMAND.format(folder=model_folders["qwen3"], data=data, out=out)
        said = json.loads(fork(line, *how))
        assert said == {"gates": str(out), "log": f"{out}.log.jsonl", "steps": 4, "method": f"lkv@{out}"}
        assert not out.with_name(f"{out.name}.state").exists()
    for alone, *together in zip(*map(log_of, outs), strict=True):
        assert all(found == pytest.approx(alone, rel=1e-3) for found in together)
    one, *others = map(Gates.load, outs)
    for other in others:
        assert (one.settings, one.origin) == (other.settings, other.origin)
        for kind in ("scores", "budgets"):
            learned = [dict(getattr(gates, kind).named_parameters()) for gates in (one, other)]
            torch.testing.assert_close(*learned, rtol=1e-2, atol=1e-3)


# --- what is refused, before anything is trained or written ---

LONG = Example(context=WORDS * 80, questions=("? who",))
REFUSED = {
    "few examples": ({"examples": EXAMPLES[:9]}, "9 examples are too few"),
    "no examples": ({"examples": []}, "0 examples are too few"),
    "fewer than a step takes": ({"settings": replace(QUICK, contexts_per_step=12)}, "too few.*12 contexts"),
    "too long": ({"examples": [*EXAMPLES, LONG]}, "this model was made for 1024"),
    "too long with the answer": ({"settings": replace(QUICK, answer_tokens=1010)}, "1010 tokens of answer need"),
    "too short": ({"settings": replace(QUICK, sink=4, window=40)}, "no longer than the 44 that are protected"),
    "keeps nothing": ({"settings": replace(QUICK, keeps=(0.0, 0.5))}, "keeps=.*in \\(0, 1\\)"),
    "keeps all": ({"settings": replace(QUICK, keeps=(0.1, 1.0))}, "keeps=.*in \\(0, 1\\)"),
    "keeps reversed": ({"settings": replace(QUICK, keeps=(0.5, 0.1))}, "keeps="),
    "no steps": ({"settings": replace(QUICK, warm_steps=0, steps=0)}, "steps=0"),
    "no contexts": ({"settings": replace(QUICK, contexts_per_step=0)}, "contexts_per_step=0"),
    "no questions": ({"settings": replace(QUICK, questions=0)}, "questions=0"),
    "no answers": ({"settings": replace(QUICK, answer_tokens=0)}, "answer_tokens=0"),
    "an empty question": ({"examples": [*EXAMPLES, Example(context=WORDS, questions=(" ",))]}, "a question is empty"),
    "a scorer besides its own": ({"scorer": "keydiff"}, "only budgets alone"),
    "a scorer for scores": ({"part": "lkv-t", "scorer": "keydiff"}, "only budgets alone"),
    "budgets for no scorer": ({"part": "lkv-h"}, "name one, such as keydiff"),
    "unknown scorer": ({"part": "lkv-h", "scorer": "keydif"}, "Did you mean 'keydiff'"),
    "an allocator": ({"part": "lkv-h", "scorer": "adakv"}, "It is an allocator"),
    "reads twice": ({"part": "lkv-h", "scorer": "kvzip"}, "kvzip cannot be trained with"),
    "needs the keep": ({"part": "lkv-h", "scorer": "criticalkv"}, "criticalkv cannot be trained with"),
    "none are shipped": ({"part": "lkv-h", "scorer": "lkv-t"}, "no gates are shipped"),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_with_nothing_written(loaded, tmp_path, monkeypatch, options, words):
    done = steps_until(monkeypatch)
    with pytest.raises(BadInput, match=words):
        make(loaded, tmp_path / "g", **options)
    assert not done
    assert list(tmp_path.iterdir()) == []


def test_a_folder_and_a_file_in_no_folder_are_refused(loaded, tmp_path):
    with pytest.raises(BadInput, match="is a folder"):
        make(loaded, tmp_path)
    with pytest.raises(BadInput, match="does not exist; create it first"):
        make(loaded, tmp_path / "nowhere" / "g")
    assert list(tmp_path.iterdir()) == []


def test_gates_of_another_model_are_no_fixed_scorer(loaded, model_folders, tmp_path):
    other, _ = models.load(str(model_folders["base"]), device="cpu")
    gates_for(other).save(tmp_path / "other.safetensors")
    with pytest.raises(headwise.HeadwiseError, match="were trained for"):
        make(loaded, tmp_path / "g", part="lkv-h", scorer=f"lkv-t@{tmp_path / 'other.safetensors'}")


# --- on the command line ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--part lkv-x", "choose lkv, lkv-h or lkv-t"),
        ("--keeps 0.1", "write the smallest and the largest"),
        ("--keeps 0.1,2", "is outside (0, 1]"),
        ("--keeps 16tok,0.5", "keeps="),
        ("--keeps 0.1tok,0.3tok", "write fractions strictly between 0 and 1"),
        ("--keeps 0.5,0.1", "write the smallest and the largest, in this order"),
        ("--part lkv-h", "name one, such as keydiff"),
        ("--contexts-per-step 30", "too few"),
    ],
)
def test_a_wrong_option_is_one_line_on_stderr(model_folders, tmp_path, monkeypatch, capsys, options, words):
    out = tmp_path / "g"
    line = COMMAND.format(folder=model_folders["qwen3"], data=lines(tmp_path / "data.jsonl"), out=out)
    code, said, err = command_line(f"{line} {options}", monkeypatch, capsys)
    assert words in err
    assert (code, said, err.count("\n"), out.exists()) == (2, "", 1, False)


def test_what_is_printed_is_how_to_use_it(model_folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    data, out = lines(tmp_path / "data" / "a.jsonl"), tmp_path / "g.safetensors"
    line = COMMAND.format(folder=model_folders["qwen3"], data=data.parent, out=out).removesuffix(" --json")
    code, said, err = command_line(f"{line} --part lkv-h --scorer keydiff", monkeypatch, capsys)
    assert (code, said) == (0, f"{out}: trained on 12 contexts. Use it as keydiff+lkv-h@{out}\n"), err
    model, tokenizer = models.load(str(model_folders["qwen3"]), device="cpu")
    ids = torch.tensor([tokenizer(WORDS)["input_ids"]])
    headwise.compress(model, ids, f"keydiff+lkv-h@{out}", keep=0.3)


@pytest.fixture
def state(tmp_path, monkeypatch):
    """The state of a run after three steps of five."""
    monkeypatch.setattr(file_kinds, "FOLDER", [tmp_path])
    path = tmp_path / "g.state"
    path.write_bytes(file_kinds.make_state())
    return path


def test_a_state_is_taken_up(state):
    made = file_kinds.trainer()
    assert module._State(state, made, "a run").restore() == 3
    assert module._State(state, made, "another run").restore() is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", 3),
        ("done", 6),
        ("done", -1),
        ("done", "3"),
        ("best_loss", None),
        ("log", []),
        ("log", [{"step": 0, "loss": 1.0}]),
        ("log", [{"step": "0", "validation": 1.0, "validation_agreement": 1.0}]),
    ],
)
def test_a_state_with_altered_metadata_is_refused(state, field, value):
    """It is the work of hours: nothing is begun anew without a word."""
    tensors, metadata = read_tensors(state, "training")
    write_tensors(state, "training", tensors, {**metadata, field: value})
    with pytest.raises(BadInput, match=r"g\.state: the state is damaged: .*remove it to train from the beginning"):
        module._State(state, file_kinds.trainer(), "a run").restore()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("now.0", lambda x: x * torch.nan, "'now.0' holds numbers from nan"),
        ("best.1", lambda x: x[:1], "'best.1' has shape"),
        ("optimizer.0.exp_avg_sq", lambda x: x - 1, "'optimizer.0.exp_avg_sq' holds numbers from -"),
        ("optimizer.2.step", lambda x: x[None], "'optimizer.2.step' has shape"),
        ("mean.0", lambda x: None, "lacks 'mean.0'"),
        ("buffer.start", torch.Tensor.long, "'buffer.start' is of dtype I64"),
    ],
)
def test_a_state_with_altered_tensors_is_refused_and_nothing_is_set(state, name, change, words):
    tensors, metadata = read_tensors(state, "training")
    tensors[name] = change(tensors[name])
    write_tensors(state, "training", {n: t for n, t in tensors.items() if t is not None}, metadata)
    made = file_kinds.trainer()
    before = [parameter.clone() for parameter in made.parameters()]
    with pytest.raises(BadInput, match=f"g.state is damaged: .*{words}.* Remove it to train from the beginning"):
        module._State(state, made, "a run").restore()
    assert all(map(torch.equal, before, made.parameters()))


# --- files ---


@pytest.mark.parametrize("beside", ["", ".state", ".log.jsonl"])
def test_what_training_cannot_write_is_told_before_it_starts(loaded, tmp_path, monkeypatch, beside):
    done = steps_until(monkeypatch)
    pipe = tmp_path / f"g{beside}"
    os.mkfifo(pipe)
    with pytest.raises(BadInput, match=f"cannot write .*g{beside}: it is a pipe"):
        make(loaded, tmp_path / "g")
    assert (done, [*tmp_path.iterdir()]) == ([], [pipe])


@pytest.mark.parametrize("text", ["dear diary\n", '{"loss": 1}\n', "[1]\n", "[" * 100_000])
def test_a_log_of_the_user_s_own_is_not_replaced(loaded, tmp_path, monkeypatch, text):
    done = steps_until(monkeypatch)
    mine = tmp_path / "g.log.jsonl"
    mine.write_text(text)
    with pytest.raises(BadInput, match=r"g\.log\.jsonl is no log of a training. Move it away"):
        make(loaded, tmp_path / "g")
    assert (done, [*tmp_path.iterdir()], mine.read_text()) == ([], [mine], text)


def test_a_state_of_the_user_s_own_is_not_replaced(loaded, tmp_path, monkeypatch):
    done = steps_until(monkeypatch)
    mine = tmp_path / "g.state"
    mine.write_text("mine")
    with pytest.raises(BadInput, match=r"g\.state"):
        make(loaded, tmp_path / "g")
    assert (done, [*tmp_path.iterdir()], mine.read_text()) == ([], [mine], "mine")


def test_gates_and_log_replace_those_of_an_earlier_training_and_keep_modes_and_links(loaded, whole, tmp_path):
    names = ("g.safetensors", "g.safetensors.log.jsonl")
    for name in names:
        (tmp_path / name).symlink_to(f"real.{name}")
        (tmp_path / f"real.{name}").touch(0o600)
    out = tmp_path / names[0]
    assert same(make(loaded, out, settings=replace(QUICK, seed=1)), make(loaded, out, settings=replace(QUICK, seed=1)))
    for name in names:
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / f"real.{name}").stat().st_mode & 0o777 == 0o600
    assert len(log_of(out)) == 6
    assert len([*tmp_path.iterdir()]) == 4


def test_two_trainings_at_once_are_refused_and_a_killed_one_goes_on(loaded, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY", 2)
    out, (begun, ready) = tmp_path / "g.safetensors", os.pipe()

    def hold(done, total, text):
        if done == 3:
            os.write(ready, b"!")
            signal.pause()

    process = forked(lambda: make(loaded, out, progress=hold))
    os.read(begun, 1)
    with pytest.raises(BadInput, match=r"another process is writing .*g\.safetensors"):
        make(loaded, out)
    os.kill(process, signal.SIGKILL)
    ended(process)
    done = steps_until(monkeypatch)
    assert same(make(loaded, out), whole[0])
    assert done == [2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, f"{out.name}.log.jsonl"]


def test_the_largest_seed_trains_and_beyond_it_none(loaded, tmp_path):
    make(loaded, tmp_path / "g", settings=replace(QUICK, steps=1, warm_steps=1, seed=2**63 - 1))
    for seed in (2**63, -1, 10**5000):
        with pytest.raises(BadInput, match="the seed is out of range"):
            make(loaded, tmp_path / "h", settings=replace(QUICK, seed=seed))
    assert not (tmp_path / "h").exists()
