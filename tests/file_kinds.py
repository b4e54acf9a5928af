"""Every kind of file that headwise reads: how to make a whole one, and how to read one and use what it says.

A reader returns quietly for what it accepts, and then has looked that it is finite and fits together.
"""

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import test_report_results as evaluated
import test_report_speed as measured
import torch
from families import random_ids, tiny_model
from random_gates import gates_for

import headwise
from headwise.artifacts.budget import Budget
from headwise.artifacts.contents import LOSSES
from headwise.artifacts.gates import EntryScores, Gates, HeadBudgets, summary_width
from headwise.artifacts.origin import Origin
from headwise.artifacts.profile import Profile
from headwise.artifacts.tensors import write_tensors
from headwise.errors import HeadwiseError
from headwise.interfaces import Demand
from headwise.methods.allocate.fixed import Fixed
from headwise.methods.allocate.profiled import LUKV
from headwise.methods.method import Method
from headwise.methods.storage import Limits, Storage
from headwise.models.families import view
from headwise.offline import profile as profiling
from headwise.offline.calibration import load_examples
from headwise.offline.losses import RANKS
from headwise.offline.solve import check, solve
from headwise.offline.train.loop import Settings, Trainer
from headwise.offline.train.run import _State
from headwise.report.inspect.facts import facts
from headwise.report.inspect.gates import log_of
from headwise.report.inspect.kept import KeptTokens
from headwise.report.quality import records, results
from headwise.report.quality.page import page
from headwise.report.speed import benchmarks, speed
from headwise.tasks.document import read_questions
from headwise.tasks.longbench.data import load_rows
from headwise.tasks.plain import file_task
from headwise.tasks.ruler.documents import load_hotpotqa, load_squad
from headwise.tasks.ruler.sources import load_more_words, load_words


@dataclass(frozen=True, kw_only=True)
class Kind:
    """`make` returns a whole file, `read` reads it from where it lies, under `name`."""

    name: str
    make: Callable[[], bytes]
    read: Callable[[Path], object]


@cache
def model():
    return tiny_model()


@cache
def shape():
    return view(model()).shape


def written(write: Callable[[Path], None], suffix=".safetensors") -> bytes:
    """What a writer of files writes."""
    path = FOLDER[0] / f"whole{suffix}"
    write(path)
    content = path.read_bytes()
    path.unlink()
    return content


FOLDER: list[Path] = [Path()]  # where whole files are made


def finite(*tensors) -> None:
    assert all(torch.isfinite(tensor).all() for tensor in tensors)


# --- what saves work: caches, budgets, profiles, gates ---


def make_cache() -> bytes:
    cache = headwise.compress(model(), random_ids(2, 40), "keydiff+adakv", keep=0.4)
    with torch.no_grad():
        model()(random_ids(2, 3, seed=1), past_key_values=cache)
    return written(cache.save)


def make_quantised() -> bytes:
    return written(headwise.compress(model(), random_ids(2, 80), "keydiff+adakv", keep=0.8, entries="k8v4").save)


def read_cache(path: Path) -> None:
    """Loaded, decoded one step by the C++ kernel where there is a compiler, and drawn."""
    loaded = headwise.load(path, model())
    assert (loaded.lengths >= 0).all()
    for layer in loaded.ragged_layers:
        assert sum(layer.segments.lengths) == len(layer.segments.keys) == len(layer.segments.values)
        finite(layer.segments.keys, layer.segments.values, layer.tail_keys, layer.tail_values)
        for part in layer.segments.quantised:
            finite(*part.numbers(torch.arange(len(part.key_scales))))
    with torch.no_grad():
        logits = model()(random_ids(len(loaded.ragged_layers[0].rows), 1), past_key_values=loaded.fork()).logits
    finite(logits)


def read_kept(path: Path) -> None:
    assert KeptTokens.load(path).kept.ndim == 3


def make_kept() -> bytes:
    return written(headwise.compress(model(), random_ids(1, 40), "keydiff+adakv", keep=0.4).save)


def make_profile() -> bytes:
    layers, heads = len(shape().layers), shape().kv_heads
    curves = torch.rand(2, layers, heads, 5 + RANKS, generator=torch.Generator().manual_seed(0))
    curves = curves / curves.sum((1, 2, 3), keepdim=True)
    small = {"int8": 0.99 * curves, "int4": 0.9 * curves}
    profile = Profile(
        curves={"keydiff": {name: curves.clone() for name in (*LOSSES, "ideal")} | small},
        domains=("text", "code"),
        contexts=(2, 1),
        protection={"keydiff": (1, 4)},
        parameters={"keydiff": Method.parse("keydiff").scorer.provenance()},
        settings={"steps": 4},
        origin=Origin(shape=shape(), model="tiny", config_hash=view(model()).config_hash),
        published={"keydiff": torch.rand(2, 99, layers, heads)},
    )
    return written(profile.save)


def read_profile(path: Path) -> None:
    profile = Profile.load(path)
    for scorer in profile.curves:
        budget = solve(profile, scorer, ratios=[0.25])
        finite(budget.fractions, *budget.hull.values())
        assert all(np.isfinite(quality.lukv) for quality in check(profile, scorer, [0.25]))


def make_budget() -> bytes:
    path = FOLDER[0] / "profile"
    path.write_bytes(make_profile())
    return written(solve(Profile.load(path), "keydiff", ratios=[0.1, 0.5]).save)


def read_budget(path: Path) -> None:
    budget = Budget.load(path)
    finite(budget.ratios, budget.fractions, *budget.hull.values(), *budget.evidence.values())
    seen = budget.origin.shape
    demand = Demand(shape=seen, tokens=(60,), totals=(20 * seen.num_heads,), floors=(1,), protected=(0,))
    assert int(Fixed(budget=budget).counts(demand).sum()) == demand.totals[0]
    if budget.hull:
        candidates, layers = torch.ones(1, 60, dtype=torch.bool), range(len(seen.layers))
        scores = torch.zeros(1, 1, 1, 1).expand(len(layers), 1, seen.kv_heads, 60)
        allocator = LUKV(budget=budget)
        assert int(allocator.allocate(scores, candidates, layers, demand).sum()) == demand.totals[0]
        storages = tuple(Storage(head_dim=seen.head_dim, itemsize=4, bits=bits) for bits in allocator.kinds)
        limits = Limits(nbytes=(20 * seen.num_heads * storages[0].native,), storages=storages, first_kept=False)
        counts, kinds = allocator.stored(demand, limits)
        taken = [int(limits.price(n, k)) for n, k in zip(counts.flatten(), kinds.flatten().tolist(), strict=True)]
        assert sum(taken) <= limits.nbytes[0]


def make_gates() -> bytes:
    return written(gates_for(model()).save)


def read_gates(path: Path) -> None:
    gates = Gates.load(path)
    if gates.budgets is not None:
        summary = torch.ones(summary_width(gates.origin.shape))
        for keep in (0.01, 0.2, 0.9):
            for found in (gates.fractions(keep), gates.fractions(keep, summary)):
                finite(found)
                assert abs(float(found.mean()) - keep) < 0.02 * keep + 1e-4
    if gates.scores is not None:
        seen = gates.origin.shape
        width = gates.scores.weight_in.shape[2]
        with torch.no_grad():
            finite(gates.scores(torch.ones(1, seen.kv_heads, 3, width), 0))


SCORER = {"keydiff": Method.parse("keydiff").scorer}
SETTINGS = profiling.Settings(sink=1, window=4)


def make_part() -> bytes:
    curves = torch.rand(len(shape().layers), shape().kv_heads, 5 + RANKS)
    tensors = {f"keydiff.{name}": curves / curves.sum() for name in profiling.CURVES}
    return written(lambda path: write_tensors(path, "part", tensors, {"run": "a run", "domain": "text"}))


def read_part(path: Path) -> None:
    found = profiling._merge([path], ["text"], SCORER, Origin(shape=shape()), SETTINGS, "a run")
    finite(*found.curves["keydiff"].values())


def trainer() -> Trainer:
    torch.manual_seed(0)
    made = Trainer(
        model=model(),
        lessons=[],
        settings=Settings(steps=5),
        budgets=HeadBudgets(shape().num_heads, summary_width(shape())),
        scores=EntryScores(len(shape().layers), shape().kv_heads, shape().head_dim),
    )
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.optimizer.step()
    return made


def make_state() -> bytes:
    def write(path: Path) -> None:
        state = _State(path, trainer(), "a run")
        state.log, state.best_loss = [{"step": -1, "validation": 1.0, "validation_agreement": 0.5}], 1.0
        state.save(3)

    return written(write)


def read_state(path: Path) -> None:
    made = trainer()
    state = _State(path, made, "a run")
    done = state.restore()
    if done is not None:
        assert 0 <= done <= 5
        assert any("validation_agreement" in row for row in state.log)
        for parameter in made.parameters():
            parameter.grad = torch.ones_like(parameter)
        made.optimizer.step()
        finite(*made.parameters(), *made.mean, *state.best)


def read_any(path: Path) -> None:
    """As `headwise inspect` does."""
    json.dumps(facts(path), allow_nan=False)


# --- tables, texts, questions ---


def make_npy() -> bytes:
    out = io.BytesIO()
    np.save(out, np.random.default_rng(0).random((99, shape().num_layers, shape().kv_heads)))
    return out.getvalue()


def read_npy(path: Path) -> None:
    finite(Budget.from_kvpress(path, shape=shape()).fractions)


def make_tsv() -> bytes:
    rows = np.random.default_rng(0).random((shape().num_layers, shape().kv_heads))
    return "\n".join("\t".join(f"{alpha:.6e}" for alpha in row) for row in rows).encode()


def read_tsv(path: Path) -> None:
    finite(Budget.from_duo_attention(path, shape=shape()).fractions)


def lines(*rows) -> Callable[[], bytes]:
    return lambda: b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def whole(found) -> Callable[[], bytes]:
    return lambda: json.dumps(found).encode()


ASKED = {"question": "Who signed?", "answers": ["Ada", "Ada L."]}
CALIBRATION = {"context": "Ada signed it in May.", "questions": ["Who?", "When?"], "domain": "text"}
TASK = {"context": "Ada signed it.", **ASKED, "metric": "f1", "max_new_tokens": 8}
SEVERAL = {"context": "Ada signed it.", "questions": [ASKED, ASKED], "metric": "f1"}
LONG = {"input": "Who?", "context": "Ada.", "answers": ["Ada"], "length": 5, "all_classes": None, "dataset": "qasper"}
QA = [{"question": f"Who {n}?", "answers": [{"text": f"Ada {n}"}]} for n in range(2)]
SQUAD = {"data": [{"paragraphs": [{"context": f"Ada signed {n}.", "qas": QA} for n in range(3)]}]}
HOTPOT = [{"question": "Who?", "answer": "Ada", "context": [[f"Title {n}", ["Ada ", "signed."]] for n in range(3)]}]
MAP = {
    "task": "s:a",
    "method": "snapkv",
    "keep": "0.25",
    "index": 0,
    "tokens": ["a", "b"],
    "kept": {"0,0": [0], "1,1": [0, 1]},
}


def make_words() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("words/en", "zebra\nquokka\n")
    return out.getvalue()


def read_words(path: Path) -> None:
    found = load_more_words(path.parent, load_words())
    assert found and all(word.isascii() for word in found)


def read_corpus(load) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        corpus = load(path.parent)
        assert corpus.questions and all(isinstance(document, str) for document in corpus.documents)

    return read


# --- what evaluations and benchmarks wrote ---


def read_results(path: Path) -> None:
    """Beside the two other files of an evaluation, whole; up to the page."""
    for name, make in EVALUATED.items():
        if name != path.name:
            (path.parent / name).write_bytes(make())
    found = records.load([path.parent])
    summaries = results.summaries_by_name(found)
    results.markdown(summaries, found.duplicates), page(summaries, found.duplicates)


EVALUATED = {
    "run.json": whole(evaluated.RUN),
    "records.jsonl": lines(*(evaluated.record(method, index=at) for method in ("full", "snapkv") for at in range(2))),
    "maps.jsonl": lines(MAP),
}


def read_bench(path: Path) -> None:
    sections = benchmarks.load([path])
    speed.page(sections), speed.markdown(sections), speed.charts_by_name(sections)


def read_log(path: Path) -> None:
    log_of(path.with_name("g"))


def read_examples(path: Path) -> None:
    assert all(example.context.strip() for example in load_examples(str(path), None, max_positions=512))


BENCH = [measured.decode(), measured.decode("full"), measured.memory(), measured.memory("full"), measured.prefill()]
KINDS = [
    Kind(name="cache.safetensors", make=make_cache, read=read_cache),
    Kind(name="quantised.safetensors", make=make_quantised, read=read_cache),
    Kind(name="kept.safetensors", make=make_kept, read=read_kept),
    Kind(name="budget.safetensors", make=make_budget, read=read_budget),
    Kind(name="profile.safetensors", make=make_profile, read=read_profile),
    Kind(name="part.safetensors", make=make_part, read=read_part),
    Kind(name="gates.safetensors", make=make_gates, read=read_gates),
    Kind(name="state.safetensors", make=make_state, read=read_state),
    Kind(name="any.safetensors", make=make_budget, read=read_any),
    Kind(name="table.npy", make=make_npy, read=read_npy),
    Kind(name="table.tsv", make=make_tsv, read=read_tsv),
    Kind(name="calibration.jsonl", make=lines(CALIBRATION, CALIBRATION), read=read_examples),
    Kind(name="calibration.txt", make=lambda: "Ada signed it \u2014 in May.".encode(), read=read_examples),
    Kind(name="questions.jsonl", make=lines(ASKED, ASKED), read=read_questions),
    Kind(name="task.jsonl", make=lines(TASK, TASK, SEVERAL), read=lambda path: file_task(path, 99)),
    Kind(name="words.zip", make=make_words, read=read_words),
    Kind(name="english_words.json", make=whole({"0": "zebra", "1": "quokka"}), read=read_words),
    Kind(name="squad.json", make=whole(SQUAD), read=read_corpus(load_squad)),
    Kind(name="hotpotqa.json", make=whole(HOTPOT), read=read_corpus(load_hotpotqa)),
    Kind(
        name="qasper.jsonl",
        make=lines(LONG, LONG),
        read=lambda path: load_rows("qasper", path.parent),
    ),
    *(Kind(name=name, make=make, read=read_results) for name, make in EVALUATED.items()),
    Kind(name="bench.json", make=whole(BENCH), read=read_bench),
    Kind(name="g.log.jsonl", make=lines({"step": 0, "loss": 1.5}, {"step": 1, "validation": 0.5}), read=read_log),
]


def outcome(kind: Kind, path: Path) -> str:
    """ "accepted" or "refused"; whatever else is raised comes out."""
    try:
        kind.read(path)
    except HeadwiseError as error:
        return "refused" if 10 < len(str(error)) < 2000 else f"refused in {len(str(error))} characters"
    return "accepted"
