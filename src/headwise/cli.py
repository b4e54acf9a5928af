"""The command line. Every command is thin: parse, call the library, print. Results on stdout, progress on stderr.

Exit codes: 0 done, 1 it could not be done, 2 the command line or an input is wrong, 130 interrupted (endings.py).
"""

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from headwise import __version__
from headwise.commands import bench as commands
from headwise.commands.console import print_json, print_table, progress_bar
from headwise.commands.endings import Commands
from headwise.commands.endings import run as run_to_the_end
from headwise.errors import BadInput
from headwise.files.strict_json import MOST
from headwise.files.terminal import complain, count, say, size, split
from headwise.files.writing import require_file, require_folder, write_bytes
from headwise.methods.keep import Keep as ParsedKeep
from headwise.methods.keep import parse_keep
from headwise.methods.registry import AUTO, FULL, HUB, require_names
from headwise.models.places import Source, find
from headwise.tasks.task import PROTOCOLS, require_protocol
from headwise.tasks.texts import Asked, bundled, read_questions, read_text

app = typer.Typer(
    name="headwise",
    cls=Commands,
    epilog="Example: headwise compare --model reference --methods full,snapkv,adakv --keep 0.15",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="Hub id, folder, or 'reference' (bundled).")]
Keep = Annotated[str, typer.Option("--keep", "-k", help="What to retain: 0.15, 15%, 1024tok or 2GiB.")]
Keeps = Annotated[str, typer.Option("--keep", "-k", help="Comma-separated: 0.15,0.25.")]
Protocol = Annotated[str, typer.Option(help="query-agnostic, or query-aware.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Chunk = Annotated[int | None, typer.Option(min=1, max=MOST, help="Read the context in pieces of so many tokens.")]
Document = Annotated[
    Path | None, typer.Option("--context", "-c", help="Text file (UTF-8); left out: the bundled document.")
]
NewTokens = Annotated[
    int, typer.Option(min=1, max=MOST, help="Longest answer; it ends at the model's last position at the latest.")
]
SplitSpecial = Annotated[
    bool, typer.Option("--split-special-tokens", help="Control tokens in document and questions are text.")
]
Methods = Annotated[str, typer.Option(help="Comma-separated; see 'headwise methods'.")]
Data = Annotated[str, typer.Option(help="FILE.jsonl, FILE.txt, FILE.md, a folder of them, or builtin[:N].")]
Length = Annotated[int | None, typer.Option(min=1, max=MOST, help="Tokens of a context, at most.")]
Contexts = Annotated[int | None, typer.Option(min=1, max=MOST, help="How many contexts are made of the data.")]
Questions = Annotated[
    str | None, typer.Option(help="auto: also made for texts that have none; none; or how many of each context.")
]
SEEDS = 2**63 - 1  # the largest


def main() -> None:
    """Entry point: an error is one line on stderr and an exit code."""
    run_to_the_end(app)


def _version(asked: bool | None) -> None:
    if asked:
        print(f"headwise {__version__}")
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = None,
) -> None:
    """Evict a language model's KV cache head by head: less memory, faster decoding."""


@app.command(epilog="Example: headwise compare --model reference --methods full,snapkv,adakv --keep 0.15,0.25")
def compare(
    model: Model = "reference",
    methods: Methods = "full,streaming,snapkv,keydiff,adakv,expected+global",
    keep: Keeps = "0.15",
    context: Document = None,
    question: Annotated[list[str] | None, typer.Option("--question", "-q", help="May be repeated.")] = None,
    questions: Annotated[Path | None, typer.Option(help='Lines such as {"question": "?", "answers": ["!"]}.')] = None,
    protocol: Protocol = "query-agnostic",
    max_new_tokens: NewTokens = 32,
    prefill_chunk_size: Chunk = None,
    split_special_tokens: SplitSpecial = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    answers: Annotated[
        bool | None,
        typer.Option("--answers/--no-answers", help="Show every answer; left out: where no right ones are known."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """One document, its questions, several methods: memory held, nearness to the full cache, speed, answers."""
    names, keeps = _names(methods), _keeps(keep)
    require_protocol(protocol)
    text, asked = _document(context, question, questions)
    source = find(model)
    from headwise.evals.compare import compare as run

    loaded, tokenizer = _load(source, dtype, device)
    names = _chosen(names, loaded)
    with progress_bar("methods") as progress:
        rows = run(
            loaded,
            tokenizer,
            text,
            asked,
            methods=[*names, FULL],
            keep=keeps,
            protocol=protocol,
            max_new_tokens=max_new_tokens,
            prefill_chunk_size=prefill_chunk_size,
            split_special_tokens=split_special_tokens,
            progress=progress,
        )
    full = next(row for row in rows if row.method == FULL)
    rows = [row for row in rows if row.method in names]
    if as_json:
        hidden = {"sliding_kv_bytes"} | (set() if answers else {"answers"})
        print_json([{k: v for k, v in asdict(row).items() if k not in hidden} for row in rows])
        return
    known = any(a.answers for a in asked)
    asking = "asked of the compressed document" if protocol == PROTOCOLS[0] else "compressed with the document each"
    _print_comparisons(f"{count(asked, 'question')} {asking} ({protocol}). Model: {model}", rows, known=known)
    if answers if answers is not None else not known:
        _print_answers([a.question for a in asked], rows, full)


def _print_comparisons(title: str, rows: Sequence[Any], *, known: bool) -> None:
    """The table of `compare`; the share of right answers where some are known."""
    header = ["method", "keep", "KV held", "of full", "peak KV", "right", "agreement", "KL", "reading", "ms/token"]
    table = [
        [
            row.method,
            str(row.keep),
            size(row.kv_bytes),
            f"{row.kv_bytes / row.full_kv_bytes:.1%}",
            size(row.peak_kv_bytes),
            f"{row.accuracy:.2f}",
            "-" if row.agreement is None else f"{row.agreement:.2f}",
            _number(row.kl),
            f"{row.prefill_seconds:.2f} s{'*' * (row.prefill_shared_by > 1)}",
            f"{row.decode_ms_per_token:.1f}",
        ]
        for row in rows
    ]
    shown = [i for i, name in enumerate(header) if known or name != "right"]
    print_table(title, [header[i] for i in shown], [[cells[i] for i in shown] for cells in table])
    if any(row.prefill_shared_by > 1 for row in rows):
        say("* One reading of the document served several rows, so its time is not that of one method.")
    _print_sliding(rows[0].sliding_kv_bytes)


def _print_answers(questions: Sequence[str], rows: Sequence[Any], full: Any) -> None:
    """Every question with the full cache's answer, then what each row says where it says something else."""
    for i, question in enumerate(questions):
        expected = full.answers[i].strip()
        others = [[row.method, str(row.keep), row.answers[i].strip()] for row in rows if row.method != FULL]
        cells = [[name, keep, "as full" if text == expected else text] for name, keep, text in others]
        print_table(question, ["method", "keep", "answer"], [[FULL, str(full.keep), expected], *cells])


@app.command(
    epilog='Example: headwise generate --model Qwen/Qwen3-4B --context report.txt -q "Who signed it?" --keep 0.2'
)
def generate(
    question: Annotated[list[str], typer.Option("--question", "-q", help="What to ask: one question.")],
    model: Model = "reference",
    context: Document = None,
    method: Annotated[
        str, typer.Option(help="See 'headwise methods'; 'auto': the model's default; 'full' keeps everything.")
    ] = AUTO,
    keep: Keep = "0.15",
    max_new_tokens: NewTokens = 256,
    prefill_chunk_size: Chunk = None,
    split_special_tokens: SplitSpecial = False,
    save: Annotated[Path | None, typer.Option(help="Where to save the compressed document, for headwise.load.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compress a document, ask one question, stream the answer."""
    if len(question) > 1:
        raise BadInput(
            f"generate answers one question, and {len(question)} are given: 'headwise compare' asks several, and "
            "--save keeps the document for another one."
        )
    parsed = parse_keep(keep)
    require_names([method])
    if save is not None and (method == FULL or not os.path.isdir(save.parent)):
        raise BadInput(f"--save {save}: name a file in a folder that exists, and a method that compresses.")
    if save is not None:
        require_file(save, inputs=_inputs(model, [method], context))
    text, _ = _document(context, question, None)
    source = find(model)
    from headwise.cache.cache import RaggedCache
    from headwise.commands.streaming import AnswerStreamer
    from headwise.evals.answers import answer, read_context, require_possible, room_for_answers
    from headwise.models.families import view
    from headwise.models.room import require_room
    from headwise.tasks.document import instructed, tokenize

    loaded, tokenizer = _load(source, dtype, device)
    require_room(tokenizer, text, view(loaded).max_positions)
    tokens = tokenize(tokenizer, text, question, device=loaded.device, split_special_tokens=split_special_tokens)
    room_for_answers(loaded, tokens)
    (name,) = _chosen([method], loaded)
    require_possible(loaded, [name], [parsed], tokens)
    used = name if name == FULL else instructed(name, tokenizer)
    with progress_bar("tokens") as progress:
        memory = read_context(
            loaded, tokens.context, used, parsed, prefill_chunk_size=prefill_chunk_size, progress=progress
        )
    kv_bytes = memory.nbytes
    if save is not None:
        assert isinstance(memory, RaggedCache)
        memory.save(save)
    streamer = None if as_json else AnswerStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    found = answer(loaded, tokenizer, memory, tokens, max_new_tokens=max_new_tokens, streamer=streamer)
    if as_json:
        kept = 1.0 if name == FULL else parsed.value
        print_json({"method": name, "keep": kept, "answer": found[0], "kv_bytes": kv_bytes})


@app.command(
    name="eval",
    epilog="Example: headwise eval --tasks mini-ruler:niah_multikey_dense --methods keydiff --keep 0.15,0.25 --out run",
)
def evaluate(
    model: Model = "reference",
    tasks: Annotated[
        str,
        typer.Option(help="Suites or suite:task,task of mini-ruler, ruler, longbench; file:X.jsonl; perplexity:X.txt."),
    ] = "mini-ruler",
    methods: Methods = "full,snapkv,keydiff,adakv,expected+global",
    keep: Keeps = "0.15",
    samples: Annotated[int, typer.Option(min=1, max=MOST, help="Documents per task.")] = 20,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="Of the evaluation split; no training data has it.")] = 0,
    length: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens of document, question and answer.")] = 512,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for records; a killed run goes on there.")
    ] = None,
    protocol: Protocol = "query-agnostic",
    data_dir: Annotated[Path | None, typer.Option(help="Where RULER's and LongBench's data lie.")] = None,
    fidelity: Annotated[bool, typer.Option(help="Also KL and agreement with the full cache.")] = True,
    timed: Annotated[int, typer.Option(min=0, max=MOST, help="Samples per task of which single steps are timed.")] = 1,
    rows: Annotated[int, typer.Option(min=1, max=MOST, help="Sequences decoded together, at most.")] = 256,
    brief: Annotated[
        bool, typer.Option("--brief", help="Short records, without answers and maps: for a repository.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Quality and measured memory of methods on tasks, against the full cache. Also under 'accelerate launch'."""
    from headwise.evals.records import RunFolder, require_place

    names, keeps = _names(methods, oracle=True), _keeps(keep)
    require_protocol(protocol)
    if out is not None:
        require_place(out)
    source = find(model)
    from headwise.evals.run import Evaluation, manifest, summarise
    from headwise.evals.run import evaluate as run
    from headwise.models.families import view
    from headwise.report.quality.statistics import interval
    from headwise.tasks.suites import Sizes, make_tasks, parse_tasks, with_data

    named = parse_tasks(tasks, whole=partial(with_data, data_dir=data_dir, tell=complain))
    processes, loaded, tokenizer = _load_launched(source, dtype, device, shared_out=False)
    names = _chosen(names, loaded, quiet=processes.rank > 0)
    made = make_tasks(named, tokenizer, Sizes(samples=samples, length=length, seed=seed, data_dir=data_dir))
    limit = view(loaded).max_positions
    if length > limit and any(suite != "file" for suite, _ in named):
        raise BadInput(f"--length {length}: this model was made for {limit} tokens; give as many or fewer.")
    evaluation = Evaluation(
        tasks=tuple(made),
        methods=tuple(names),
        keeps=tuple(keeps),
        seed=seed,
        protocol=protocol,
        fidelity=fidelity,
        timed=timed,
        rows=rows,
        brief=brief,
    )
    folder = None
    if out is not None:
        told = manifest(loaded, model, evaluation, length, shlex.join(["headwise", *sys.argv[1:]]))
        folder = RunFolder(out, told, rank=processes.rank if processes.number > 1 else None)
    with progress_bar("samples") as progress:
        records = run(loaded, tokenizer, evaluation, folder=folder, processes=processes, progress=progress)
    if processes.rank > 0:
        return
    summaries = [s for s in summarise(records) if s.method in names]
    if as_json:
        agreed = ("method", "keep", "task", "length", "samples", "accuracy", "full_accuracy", "kv_fraction")
        rows_of = [{**asdict(summary), "task": summary.task.removeprefix("mini-ruler:")} for summary in summaries]
        marked = [agreed + ("sees_answers",) * row["sees_answers"] for row in rows_of]
        print_json([{name: row[name] for name in names} for row, names in zip(rows_of, marked, strict=True)])
        return
    print_table(
        f"Up to {count(range(samples), 'sample')} per task, {length} tokens, seed {seed}, {protocol}. Model: {model}",
        ["task", "method", "keep", "KV of full", "accuracy", "95%", "full cache", "KL", "agreement"],
        [
            [
                s.task,
                f"{s.method} (sees the answers)" if s.sees_answers else s.method,
                str(s.keep),
                f"{s.kv_fraction:.1%}",
                _number(s.accuracy) if s.nll is None or s.accuracy is not None else f"ppl {math.exp(s.nll):.3f}",
                _ends(interval(s.scores)),
                _number(s.full_accuracy),
                _number(s.kl),
                _number(s.agreement),
            ]
            for s in summaries
        ],
    )


@app.command(epilog="Example: headwise report run -o report.html")
def report(
    sources: Annotated[
        list[Path], typer.Argument(help="Folders of 'headwise eval --out', or files of 'headwise bench ... --json'.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Page to write; .csv, .md and .png go beside it.")] = Path(
        "report.html"
    ),
    as_json: AsJson = False,
) -> None:
    """Quality against measured bytes, or speed and memory: a web page, a table, a summary and a picture."""
    from headwise.report.quality.results import write_report

    written = [str(path) for path in write_report(sources, out, tell=complain)]
    if as_json:
        print_json({"written": written})
    else:
        say(", ".join(written))


def _ends(found: Any) -> str:
    return "-" if found is None else f"{found.low:.2f}-{found.high:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@app.command(epilog="Example: headwise calibrate --model Qwen/Qwen3-4B --data report.txt --questions auto --show 3")
def calibrate(
    model: Model = "reference",
    data: Data = "builtin",
    length: Length = None,
    contexts: Contexts = None,
    questions: Questions = None,
    part: Annotated[str, typer.Option("--split", help="Of builtin: calibration, as profile has it, or train.")] = (
        "calibration"
    ),
    show: Annotated[int, typer.Option(min=0, max=MOST, help="How many examples to print.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="Print contexts with their middle.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File (.jsonl) to write, for --data.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a model would be profiled or trained on: a table, examples, or a file. Loads the tokenizer only."""
    from headwise.offline.calibration import count_tokens, load_examples, to_json_lines

    source = find(model)
    from headwise.models.families import max_positions
    from headwise.models.loading import load_config, load_tokenizer
    from headwise.offline.texts.showing import told, totals

    if out is not None:
        require_file(out, inputs=_inputs(model, [], Path(data)))
    positions, tokenizer = max_positions(load_config(source)), load_tokenizer(source)
    examples = load_examples(
        data,
        tokenizer,
        max_positions=positions,
        split=part,
        length=length,
        contexts=contexts,
        questions=_questions(questions),
    )
    counter = count_tokens(tokenizer)
    if out is not None:
        write_bytes(out, to_json_lines(examples).encode())
    if as_json:
        rows = [asdict(example) for example in examples[:show]] or [asdict(row) for row in totals(examples, counter)]
        print_json(rows)
        return
    for example in examples[:show]:
        say(told(example, counter, full=full))
    if not show:
        rows = [[str(cell) for cell in asdict(row).values()] for row in totals(examples, counter)]
        header = ["domain", "contexts", "tokens", "shortest", "longest", "following", "questions"]
        print_table(f"{count(examples, 'context')} from {data}. Model: {model}", header, rows)


@app.command(epilog="Example: headwise profile --model reference --scorer snapkv,keydiff --out profile.safetensors")
def profile(
    out: Annotated[Path, typer.Option("--out", "-o", help="Profile to write; a killed run goes on from OUT.parts.")],
    model: Model = "reference",
    scorer: Annotated[str, typer.Option("--scorer", help="Comma-separated; one pass serves all.")] = "snapkv",
    data: Data = "builtin",
    length: Length = None,
    contexts: Contexts = None,
    questions: Questions = None,
    future: Annotated[
        str | None,
        typer.Option(help="What tells which entries matter, of answers,repeat,following; left out: by the model."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Tokens decoded per question; 64 if answers are the only future, else 8."),
    ] = None,
    queries: Annotated[
        int, typer.Option(min=1, max=MOST, help="Of 1,024 tokens that are read as a future, how many count.")
    ] = 128,
    sink: Annotated[int, typer.Option(min=0, max=MOST, help="First tokens that every head keeps first.")] = 4,
    window: Annotated[int, typer.Option(min=0, max=MOST, help="Last tokens that every head keeps next.")] = 32,
    temperature: Annotated[float, typer.Option(min=0, max=MOST, help="0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(min=-SEEDS, max=SEEDS, help="Of sampling.")] = 0,
    published: Annotated[
        bool, typer.Option("--published", help="Also solve every question by itself, as the paper does.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """LU-KV, offline: what every head gains, by how much it keeps. Also under 'accelerate launch'."""
    source = find(model)
    from headwise.models.families import view
    from headwise.offline.calibration import load_examples
    from headwise.offline.profile import Settings, default_futures, default_steps
    from headwise.offline.profile import profile as run
    from headwise.offline.watch import Sampling

    asked = _questions(questions)
    require_file(out, inputs=_inputs(model, split(scorer), Path(data)))
    require_folder(f"{out}.parts")
    processes, loaded, tokenizer = _load_launched(source, dtype, device)
    examples = load_examples(
        data,
        tokenizer,
        max_positions=view(loaded).max_positions,
        length=length,
        contexts=contexts,
        questions=asked,
    )
    futures = default_futures(tokenizer, examples) if future is None else tuple(split(future))
    settings = Settings(
        steps=steps or default_steps(futures),
        futures=futures,
        queries=queries,
        sampling=Sampling(temperature=temperature, seed=seed),
        sink=sink,
        window=window,
        published=published,
    )
    with progress_bar("contexts") as progress:
        run(
            loaded,
            tokenizer,
            examples,
            split(scorer),
            out,
            settings=settings,
            processes=processes,
            progress=progress,
        )
    if processes.rank > 0:
        return
    if as_json:
        print_json({"profile": str(out), "contexts": len(examples), "scorers": split(scorer)})
    else:
        say(f"{out}: {len(examples)} contexts, {scorer}. Next: headwise solve {out} --scorer ... --out ...")


@app.command(epilog="Example: headwise solve profile.safetensors --scorer snapkv --out snapkv.safetensors")
def solve(
    path: Annotated[Path, typer.Argument(help="A file written by 'headwise profile'.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Budget to write.")],
    scorer: Annotated[str | None, typer.Option(help="Which scorer; may be left out if the profile has one.")] = None,
    ratios: Annotated[str | None, typer.Option(help="Kept fractions to tabulate, such as 0.0625,0.15,0.25.")] = None,
    domain_weights: Annotated[str | None, typer.Option(help="Such as code=2,text=1; others 0.")] = None,
    loss: Annotated[
        str, typer.Option(help="output, normalised (LU-KV's code), raw (its formula), or published (averaged).")
    ] = "output",
    check: Annotated[bool, typer.Option("--check", help="Compare with exact dynamic programming.")] = False,
    as_json: AsJson = False,
) -> None:
    """LU-KV, offline: share any budget among all heads by marginal utility, exactly, and write it for lukv@FILE."""
    import time

    from headwise.artifacts.profile import Profile
    from headwise.methods.keep import parse_fraction
    from headwise.offline.solve import RATIOS, published
    from headwise.offline.solve import check as compare_with_optimum
    from headwise.offline.solve import solve as run

    require_file(out, inputs=[path])
    found = Profile.load(path)
    if scorer is None and len(found.curves) > 1:
        raise BadInput(f"{path} holds {', '.join(found.curves)}: choose one with --scorer.")
    name = scorer or next(iter(found.curves))
    weights = None if domain_weights is None else dict(_weight(part) for part in split(domain_weights))
    grid = RATIOS if ratios is None else [parse_fraction(part, "ratios") for part in split(ratios)]
    averaged = loss == "published"
    if averaged and (check or ratios is not None):
        raise BadInput("loss='published' is a table of 99 ratios without curves: leave out --ratios and --check.")
    start = time.perf_counter()
    if averaged:
        budget = published(found, name, domain_weights=weights)
    else:
        budget = run(found, name, ratios=grid, domain_weights=weights, loss=loss)
    seconds = time.perf_counter() - start
    budget.save(out)
    points = budget.ratios.tolist()
    quality = compare_with_optimum(found, name, points, domain_weights=weights, loss=loss) if check else []
    rows = [{**asdict(q), "gap": q.gap} for q in quality]
    if as_json:
        print_json(
            {"budget": str(out), "scorer": name, "loss": loss, "ratios": points, "seconds": seconds, "check": rows}
        )
        return
    use = f"{name}+{'fixed' if averaged else 'lukv'}@{out}"
    say(f"{out}: {name}, {len(points)} ratios, solved in {seconds:.2f} s. Use it as {use}")
    if rows:
        header = ["ratio", "lukv", "optimum", "uniform", "adakv", "gap"]
        print_table("share of the utility retained", header, [[f"{row[k]:.4f}" for k in header] for row in rows])


@app.command(epilog="Example: headwise train --model reference --out gates.safetensors")
def train(
    out: Annotated[Path, typer.Option("--out", "-o", help="Gates to write; a killed run goes on from OUT.state.")],
    model: Model = "reference",
    data: Data = "builtin",
    length: Length = None,
    contexts: Contexts = None,
    questions: Questions = None,
    part: Annotated[str, typer.Option(help="lkv (both), lkv-h (budgets only) or lkv-t (scores only).")] = "lkv",
    scorer: Annotated[str | None, typer.Option(help="The fixed scorer that budgets alone are trained for.")] = None,
    fit_steps: Annotated[
        int, typer.Option(min=0, max=MOST, help="Steps in which scores learn to predict attention; 0: none.")
    ] = 1000,
    warm_steps: Annotated[
        int, typer.Option(min=0, max=MOST, help="Steps then in which every head learns alone what its output needs.")
    ] = 0,
    steps: Annotated[
        int | None,
        typer.Option(min=0, max=MOST, help="Steps of joint training from answers; left out: 600 for lkv-h, or 0."),
    ] = None,
    contexts_per_step: Annotated[int, typer.Option(min=1, max=MOST, help="Of all processes together.")] = 4,
    answer_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens the teacher answers, at most.")] = 16,
    keeps: Annotated[str, typer.Option(help="Smallest and largest keep to train for.")] = "0.03,0.3",
    sink: Annotated[int, typer.Option(min=0, max=MOST, help="First tokens that every head keeps first.")] = 1,
    window: Annotated[int, typer.Option(min=0, max=MOST, help="Last tokens that every head keeps next.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="The same seed gives the same gates.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """LKV: learn how much every head keeps, and which entries. Also under 'accelerate launch'."""
    source = find(model)
    from headwise.methods.keep import parse_fraction
    from headwise.models.families import view
    from headwise.offline.calibration import TRAINING_CONTEXTS, load_examples
    from headwise.offline.train.fit import FitSettings
    from headwise.offline.train.loop import Settings
    from headwise.offline.train.run import train as run
    from headwise.offline.train.run import written

    if part not in ("lkv", "lkv-h", "lkv-t"):
        raise BadInput(f"part={part!r}: choose lkv, lkv-h or lkv-t.")
    bounds = [parse_fraction(keep, "keeps") for keep in split(keeps)]
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise BadInput(f"keeps={keeps!r}: write the smallest and the largest, in this order, such as 0.03,0.5.")
    asked = _questions(questions)
    for path in written(out):
        require_file(path, inputs=_inputs(model, [scorer or ""], Path(data)))
    processes, loaded, tokenizer = _load_launched(source, dtype, device)
    examples = load_examples(
        data,
        tokenizer,
        max_positions=view(loaded).max_positions,
        split="train",
        default=TRAINING_CONTEXTS,
        length=length,
        contexts=contexts,
        questions=asked,
    )
    joint = steps if steps is not None else 600 * (part == "lkv-h")
    most = asked if isinstance(asked, int) else Settings().questions
    settings = Settings(
        fit=FitSettings(steps=fit_steps, seed=seed),
        steps=joint,
        warm_steps=warm_steps,
        contexts_per_step=contexts_per_step,
        questions=most,
        answer_tokens=answer_tokens,
        keeps=(bounds[0], bounds[1]),
        sink=sink,
        window=window,
        seed=seed,
    )
    with progress_bar("steps") as progress:
        run(
            loaded,
            tokenizer,
            examples,
            out,
            part=part,
            scorer=scorer,
            settings=settings,
            processes=processes,
            progress=progress,
        )
    if processes.rank > 0:
        return
    use = {"lkv": f"lkv@{out}", "lkv-h": f"{scorer}+lkv-h@{out}", "lkv-t": f"lkv-t@{out}"}[part]
    if as_json:
        print_json({"gates": str(out), "log": f"{out}.log.jsonl", "steps": joint, "method": use})
    else:
        say(f"{out}: trained on {len(examples)} contexts. Use it as {use}")


@app.command(epilog="Example: headwise methods --model Qwen/Qwen3-4B")
def methods(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Hub id, folder, or 'reference': what is ready for this model.")
    ] = None,
    files: Annotated[
        Path | None, typer.Option(help="With --model: a folder with budgets and gates of your own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Every scorer, allocator and short name, with its paper; with --model what is ready for it, and what is not."""
    if files is not None and model is None:
        raise BadInput(f"--files {files}: name the model that the files are for, with --model.")
    if model is not None:
        _methods_of(model, files, as_json)
        return
    from headwise.methods.method import ALIASES, ALLOCATORS, SCORERS, entries_of, paper_of

    parts = [("scorer", SCORERS), ("allocator", ALLOCATORS)]
    rows = [
        {"kind": kind, "name": name, "summary": entry.summary, "paper": entry.paper, "served": entry.served}
        for kind, registry in parts
        for name, entry in registry.items()
    ]
    for name, pair in ALIASES.items():
        scorer, allocator = entries_of(name)
        served = SCORERS[scorer].served and ALLOCATORS[allocator].served
        rows.append({"kind": "alias", "name": name, "summary": pair, "paper": paper_of(name), "served": served})
    if as_json:
        print_json(rows)
        return
    print_table(
        "A method is scorer+allocator, such as keydiff+adakv, or a short name. 'full' is transformers' own cache.",
        ["kind", "name", "what it does", "arXiv", "vLLM"],
        [[row["kind"], row["name"], row["summary"], row["paper"], "yes" * row["served"]] for row in rows],
    )


def _methods_of(model: str, files: Path | None, as_json: bool) -> None:
    from headwise.models.available import overview
    from headwise.models.loading import load_config

    found = overview(model, load_config(model), files)
    if as_json:
        print_json(asdict(found))
        return
    told = {"ready": "ready", "make": "make first", "refused": "no"}
    print_table(
        f"Methods for {model}",
        ["method", "use it?", "file made for", "how, or why not"],
        [[row.method, told[row.state], row.made_for, row.command or row.why or row.file] for row in found.methods],
    )
    say(f"Default: {found.default.name}, because {found.default.reason}.")


@app.command(epilog="Example: headwise shrink gates.safetensors --model Qwen/Qwen3-4B --out lkv.safetensors")
def shrink(
    path: Annotated[Path, typer.Argument(help="Gates or a budget.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The small copy to write.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Hub id to name as the model it was made for; left out: as it is."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """A copy that is small enough to share: gates in half precision, budgets without the curves for pictures."""
    from headwise.offline.shrink import shrink as run

    require_file(out, inputs=[path])
    found = run(path, out, model=model)
    if as_json:
        print_json({"path": str(out), **asdict(found)})
        return
    say(f"{out}: {size(found.bytes_after)} instead of {size(found.bytes_before)}.")
    say(f"A head's share changes by at most {found.changed:.5f}; at least {found.shared:.1%} of its entries stay.")


@app.command(epilog="Example: headwise doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """What this machine has: versions, devices, and which attention kernels can be used and are."""
    import torch

    from headwise.evals.run import hardware, versions
    from headwise.kernels import survey

    devices = [hardware(torch.device("cpu"))]
    devices += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = {
        "versions": versions(),
        "devices": devices,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": [asdict(kernel) for kernel in survey()],
    }
    if as_json:
        print_json(found)
        return
    say(", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    say("; ".join(devices) + f"; PyTorch uses {found['cpu_capability']}")
    print_table(
        "Attention kernels. 'auto' takes the one that is used on the model's device.",
        ["kernel", "usable", "used on", "about"],
        [[k["name"], _yes(k["usable"]), k["used_on"] or "", k["about"]] for k in found["kernels"]],
    )


@app.command("build-kernels", epilog="Example: headwise build-kernels")
def build_kernels(as_json: AsJson = False) -> None:
    """Compile the C++ kernel now, instead of at first use."""
    from headwise.kernels import native

    start = time.perf_counter()
    made = native.load()
    seconds = time.perf_counter() - start
    if as_json:
        print_json({"path": str(made.path), "features": made.features, "built": made.built, "seconds": seconds})
    else:
        say(f"{made.path}: {'built in' if made.built else 'was there, loaded in'} {seconds:.1f} s ({made.features})")


app.add_typer(commands.app, name="bench", no_args_is_help=True)


@app.command(epilog="Example: headwise inspect gates.safetensors --plot --beside budget.safetensors")
def inspect(
    path: Annotated[Path, typer.Argument(help="A file written by headwise: a cache, a budget, gates ...")],
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw a budget or gates (needs headwise[plot]), or what a cache has kept.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Plot to write: .png, .svg or .pdf; of a cache .html.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Kept fraction at which budgets are drawn; left out: 0.15.")
    ] = None,
    beside: Annotated[Path | None, typer.Option(help="Of gates: a budget or gates to draw beside them.")] = None,
    context: Annotated[
        Path | None, typer.Option("--context", "-c", help="Of a cache: the document it was made from (UTF-8).")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Of a cache: whose tokenizer; left out: the folder it names.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Everything its header says, and its tensors.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What a saved cache or artifact is, and what it was made for. Draws budgets, gates and caches."""
    from headwise.report.inspect.facts import facts
    from headwise.report.quality.told import SPREAD, spread, summary

    options = {"--out": out, "--ratio": ratio, "--beside": beside, "--context": context, "--model": model}
    for name, value in options.items():
        if value is not None and not plot:
            raise BadInput(f"{name} {value} is of a plot: add --plot.")
    found = facts(path)
    if plot:
        found["plot"] = str(_plot(found["kind"], path, out, 0.15 if ratio is None else ratio, beside, context, model))
    if as_json:
        print_json(found)
        return
    drawn = [("plot", found["plot"])] if plot else []
    print_table(str(path), ["field", "value"], [*summary(path, found), *drawn])
    budgets = found.pop("budgets", {})
    if budgets:
        print_table("share of the context that is kept, by the keep of the whole cache", SPREAD, spread(budgets))
    if verbose:
        _print_all(found, budgets)


def _print_all(found: dict[str, Any], budgets: dict[str, Any]) -> None:
    """All that a file's header says, what the heads of every layer keep, and the tensors."""
    tensors = found.pop("tensors")
    print_table("header", ["field", "value"], list(_fields(found)))
    if budgets:
        print_table(
            "share of the context that a layer's heads keep on average (least to most), by the keep of the whole cache",
            ["layer", *budgets],
            [
                [str(layer), *(_spread(fractions[at]) for fractions in budgets.values())]
                for at, layer in enumerate(found["origin"]["shape"]["layers"])
            ],
        )
    print_table("tensors", ["name", "dtype", "shape"], [[n, t["dtype"], str(t["shape"])] for n, t in tensors.items()])


@app.command(epilog="Example: headwise plan --model Qwen/Qwen3-8B --context 128k --keep 0.15 --memory 24GiB")
def plan(
    model: Model = "reference",
    context: Annotated[str, typer.Option("--context", "-c", help="Tokens, such as 32768 or 128k.")] = "1024",
    keep: Keep = "0.15",
    memory: Annotated[str | None, typer.Option(help="What the device has, such as 24GiB.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=MOST, help="Sequences at a time.")] = 1,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """KV memory before and after, and what fits. Needs the configuration only, no weights."""
    source = find(model)
    from headwise.methods.keep import parse_bytes, parse_tokens
    from headwise.models.loading import find_dtype, load_config
    from headwise.models.plan import plan as make

    chosen = find_dtype(model, dtype)
    found = make(
        load_config(source),
        context=parse_tokens(context),
        keep=keep,
        batch=batch,
        memory=None if memory is None else parse_bytes(memory),
        dtype=None if chosen == "auto" else chosen,
    )
    if as_json:
        print_json({"model": model, **asdict(found)})
        return
    rows = [
        ["weights", size(found.weight_bytes), size(found.weight_bytes)],
        ["KV held", size(found.full_kv_bytes), size(found.kv_bytes)],
        ["KV peak while reading", size(found.full_kv_bytes), size(found.peak_kv_bytes)],
        ["the same, scope 'model'", size(found.full_kv_bytes), size(found.peak_kv_bytes_model_scope)],
    ]
    if found.memory_bytes is not None:
        rows += [
            [f"fits in {size(found.memory_bytes)}", _yes(found.full_fits), _yes(found.fits)],
            ["largest batch", str(found.max_batch_full), str(found.max_batch)],
            ["longest context", f"{found.max_context_full:,}", f"{found.max_context:,}"],
        ]
    title = f"{model}, made for {found.max_positions:,} tokens: {found.context:,} x {found.batch}, {found.dtype}"
    print_table(title, ["", "everything kept", f"keep {found.keep}"], rows)
    _print_sliding(found.sliding_kv_bytes)
    if found.beyond_positions:
        say(
            f"Too long for the model: it was made for {found.max_positions:,} tokens, so {found.context:,} are refused."
        )
    elif (found.max_context or 0) > found.max_positions:
        say(f"The model was made for {found.max_positions:,} tokens: a longer context may fit, but is refused.")
    say(f"Note: {found.note}.")


@app.command(
    epilog="Example: headwise tiers -m meta-llama/Llama-3.1-8B-Instruct --method keydiff+lukv@budget.safetensors -k 0.2"
)
def tiers(
    model: Model = "reference",
    method: Annotated[str, typer.Option(help="One that can be served: 'headwise methods' marks what can.")] = "keydiff",
    keep: Keep = "0.2",
    tiers: Annotated[int, typer.Option(min=1, max=MOST, help="Different keeps that heads may have.")] = 8,
    context: Annotated[
        str | None, typer.Option("--context", "-c", help="Prompt that budgets are solved for; left out: the longest.")
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens of a block, as vLLM's --block-size.")] = 16,
    ranks: Annotated[
        int, typer.Option(min=1, max=MOST, help="Tensor-parallel ranks, as vLLM's --tensor-parallel-size.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """What vLLM would be served with: head budgets in tiers, blocks of a prompt, and the command that starts it."""
    source = find(model)
    from headwise.methods.keep import parse_tokens
    from headwise.models.loading import REFERENCE, load_config, reference_path
    from headwise.serving import Served, Settings, command

    settings = Settings(
        method=method,
        keep=parse_keep(keep).value,
        tiers=tiers,
        context=None if context is None else parse_tokens(context),
        ranks=ranks,
    )
    served = Served.of(settings, load_config(source))
    found, tokens = served.tiers, served.context
    before, after = found.blocks(tokens, block_size)
    line = command(str(reference_path()) if model == REFERENCE else model, settings, block_size)
    if as_json:
        facts = {"model": model, **settings.as_json(), "context": tokens, "block_size": block_size}
        sizes = [{"keep": each / 1e6, "heads": heads} for each, heads in found.sizes.items()]
        groups = {"average_keep": found.keep, "floor": found.floor, "heads_per_group": found.heads_per_group}
        blocks = {"largest_change": served.largest_change, "blocks_reading": before, "blocks_kept": after}
        print_json({**facts, "tiers": sizes, **groups, **blocks, "command": line})
        return
    rows = [[f"{each / 1e6:.4f}", str(heads)] for each, heads in found.sizes.items()]
    print_table(f"{model}, {method}, keep {keep}: {found.keep:.4f} on average", ["keep", "KV heads"], rows)
    say(f"A head's budget changes by at most {served.largest_change:.4f}; groups of {found.heads_per_group} heads.")
    say(f"A prompt of {tokens:,} tokens takes {before:,} blocks while it is read and {after:,} after it.")
    say(f"\n{line}")


def _plot(
    kind: str,
    path: Path,
    out: Path | None,
    ratio: float,
    beside: Path | None,
    context: Path | None,
    model: str | None,
) -> Path:
    """Draw a file as its kind is drawn; where it was drawn to."""
    if beside is not None and kind != "gates":
        raise BadInput(f"--beside {beside} is drawn beside gates; {path} is a {kind}.")
    if kind == "cache":
        from headwise.report.inspect.kept import plot as draw_kept

        if context is None:
            raise BadInput("the words that a cache keeps are those of its document: name the file with --context.")
        target = out or path.with_suffix(".html")
        require_file(target, inputs=[path, context])
        draw_kept(path, target, context=context, text=read_text(context), model=model)
        return target
    if context is not None or model is not None:
        raise BadInput(f"--context and --model are for the plot of a cache; {path} is a {kind}.")
    target = out or path.with_suffix(".png")
    require_file(target, inputs=[path] if beside is None else [path, beside])
    if kind == "gates":
        from headwise.report.inspect.gates import plot as draw_gates

        draw_gates(path, target, ratio=ratio, beside=beside)
    else:
        from headwise.artifacts.budget import Budget
        from headwise.report.inspect.budget import plot as draw_budget

        draw_budget(Budget.load(path), target, ratio=ratio)
    return target


def _fields(found: dict[str, Any]) -> Iterator[list[str]]:
    """Rows of a file's metadata; what is nested is named field.part."""
    for name, value in found.items():
        nested = {f"{name}.{part}": v for part, v in value.items()} if isinstance(value, dict) else {name: value}
        yield from ([key, v if isinstance(v, str) else json.dumps(v)] for key, v in nested.items())


def _spread(fractions: Sequence[float]) -> str:
    return f"{sum(fractions) / len(fractions):.1%} ({min(fractions):.1%} to {max(fractions):.1%})"


def _document(context: Path | None, question: Sequence[str] | None, questions: Path | None) -> tuple[str, list[Asked]]:
    asked = [Asked(question=text) for text in question or ()] + (read_questions(questions) if questions else [])
    if context is None:
        text, known = bundled()
        return text, asked or known
    if not asked:
        raise BadInput("a document needs questions: add --question 'Who ...?' or --questions FILE.jsonl.")
    return read_text(context), asked


def _inputs(model: str, methods: Sequence[str], text: Path | None) -> list[Path]:
    """Files that a command reads: the model's, those that methods name, and a text, or the texts of a folder."""
    of_model = [*Path(model).iterdir()] if os.path.isdir(model) else []
    texts = [] if text is None else [text]
    if text is not None and os.path.isdir(text):
        texts = [file for file in text.iterdir() if file.suffix in (".jsonl", ".txt", ".md")]
    named = [part.partition("@")[2] for method in methods for part in method.split("+") if "@" in part]
    return [*of_model, *texts, *(Path(name) for name in named if not name.startswith(HUB))]


def _names(text: str, *, oracle: bool = False) -> list[str]:
    """Methods of a list; with `oracle` also that yardstick. Raises BadInput."""
    names = split(text)
    require_names(names, oracle=oracle)
    return names


def _keeps(text: str) -> list[ParsedKeep]:
    """Keeps of a list. Raises BadInput."""
    return [parse_keep(part) for part in split(text)]


def _chosen(names: Sequence[str], model: Any, *, quiet: bool = False) -> list[str]:
    """The methods, with the model's default for "auto"; which one that is, and why, is said on stderr."""
    if AUTO not in names:
        return list(names)
    from headwise.methods.method import choose
    from headwise.models.families import view

    seen = view(model)
    choice = choose(seen.shape, seen.config_hash)
    if not quiet:
        complain(f"the method is {choice.name}: {choice.reason}.")
    return [choice.name if name == AUTO else name for name in names]


def _load(model: Source, dtype: str, device: str) -> tuple[Any, Any]:
    from transformers.utils import logging

    from headwise.models.loading import load

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load(model, dtype=dtype, device=device)


def _load_launched(model: Source, dtype: str, device: str, *, shared_out: bool = True) -> tuple[Any, Any, Any]:
    """This process among those of 'accelerate launch' or torchrun; model and tokenizer, where they belong."""
    from headwise.models.processes import Launched, Sharded, launched

    processes = launched(device)
    if isinstance(processes, Sharded) and not shared_out:  # generate() then counts its steps across processes by itself
        raise BadInput("eval needs the whole model in every process: launch it with --multi_gpu, not with --use_fsdp.")
    if isinstance(processes, Launched):
        device = "cpu" if isinstance(processes, Sharded) else str(processes.device)
    loaded, tokenizer = _load(model, dtype, device)
    if isinstance(processes, Sharded):
        processes.adopt(loaded)
    return processes, loaded, tokenizer


def _questions(text: str | None) -> Any:
    """What --questions says, as the library takes it."""
    return int(text) if text is not None and text.isdecimal() and len(text) <= 9 else text


def _weight(text: str) -> tuple[str, float]:
    name, equals, number = text.partition("=")
    try:
        return name.strip(), float(number if equals else "")
    except ValueError:
        raise BadInput(f"domain weight {text!r}: write name=number, such as code=2.") from None


def _print_sliding(sliding_bytes: int) -> None:
    if sliding_bytes:
        say(f"Sliding-window layers are left whole, whatever the keep: {size(sliding_bytes)} of the KV held.")


def _yes(value: bool | None) -> str:
    return "yes" if value else "no"
