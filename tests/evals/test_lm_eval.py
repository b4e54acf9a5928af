"""The lm-evaluation-harness on a compressed cache: everything kept is HFLM itself, less kept is what compress keeps."""

import json
import os
import subprocess
import sys
import warnings
from importlib import import_module

import pytest
import torch
from folders import save_model, word_tokenizer
from transformers import AutoModelForCausalLM, RobertaConfig

from headwise.cache.compress import compress
from headwise.errors import BadInput, BudgetInfeasible, UnsupportedModel
from headwise.models.families import given

WORDS = ["apple", "copper", "lantern", "locker", "badge", "bakery", "ball", "banjo"]
CHOICES = ["apple", "copper lantern", "locker badge bakery"]
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}} ? locker"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
CHOOSE = """
task: local_choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}} ? lantern"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TASKS = ["local_generate", "local_choose"]


@pytest.fixture(scope="module")
def harness():
    """The module under test, where the harness is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("lm_eval")
        pytest.importorskip("accelerate")
        import_module("lm_eval.evaluator")
        return import_module("headwise.evals.lm_eval")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks on six documents of different lengths."""
    root = tmp_path_factory.mktemp("tasks")
    generator = torch.Generator().manual_seed(0)
    with (root / "data.jsonl").open("w") as data:
        for index in range(6):
            words = [WORDS[i] for i in torch.randint(0, len(WORDS), (40 + 7 * index,), generator=generator)]
            line = {"context": " ".join(words), "answer": words[0], "choices": CHOICES, "label": index % len(CHOICES)}
            data.write(f"{json.dumps(line)}\n")
    for name, text in (("generate", GENERATE), ("choose", CHOOSE)):
        (root / f"{name}.yaml").write_text(text.format(data=root / "data.jsonl", cache=root / "cache"))
    return root


@pytest.fixture(scope="module")
def make(harness, model_folders):
    """A model of the harness, on the CPU."""

    def made(name="base", batch_size=4, **options):
        return harness.HeadwiseLM(str(model_folders[name]), device="cpu", batch_size=batch_size, **options)

    return made


def evaluate(lm, tasks, names=TASKS):
    """Run the harness: {task: metrics}, {task: what the model answered, by document}, its notes on the model."""
    manager = import_module("lm_eval.tasks").TaskManager(include_path=str(tasks), include_defaults=False)
    found = import_module("lm_eval").simple_evaluate(
        model=lm, tasks=list(names), task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    answers = {name: [s["resps"] for s in sorted(found["samples"][name], key=lambda s: s["doc_id"])] for name in names}
    return found["results"], answers, found["config"]


def asked(kind, *arguments):
    """Requests, as the harness makes them from documents."""
    instance = import_module("lm_eval.api.instance").Instance
    return [instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def contexts(tasks):
    """The documents of the two tasks."""
    return [json.loads(line)["context"] for line in (tasks / "data.jsonl").read_text().splitlines()]


def generated(lm, prompts, **options):
    """What the model says to each prompt."""
    how = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False, **options}
    return lm.generate_until(asked("generate_until", *((prompt, how) for prompt in prompts)), disable_tqdm=True)


def scored(lm, pairs):
    """(log-likelihood, is it greedy) of each continuation."""
    return lm.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)


def assert_scores_equal(found, expected, tolerance=1e-3):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=tolerance)


@pytest.fixture
def read(harness, monkeypatch):
    """Every cache that is read from here on: [(tokens of the prompts, entries kept per layer, row and head)]."""
    seen = []

    def counted(model, prompts, *args, **options):
        memory = compress(model, prompts, *args, **options)
        seen.append((options["attention_mask"].sum(-1).tolist(), memory.lengths))
        return memory

    monkeypatch.setattr(harness, "compress", counted)
    return seen


def test_a_whole_run_of_the_harness(harness, make, model_folders, tasks, read):
    """Everything kept answers as HFLM; half kept answers otherwise, from half the entries."""
    plain = import_module("lm_eval.models.huggingface").HFLM(str(model_folders["base"]), device="cpu", batch_size=4)
    results, answers, _ = evaluate(plain, tasks)
    whole_results, whole, _ = evaluate(make(method="keydiff", keep=1.0), tasks)
    assert whole["local_generate"] == answers["local_generate"]
    for found, expected in zip(whole["local_choose"], answers["local_choose"], strict=True):
        assert_scores_equal([one for (one,) in found], [one for (one,) in expected])
    for metric in ("acc,none", "acc_norm,none"):
        assert whole_results["local_choose"][metric] == results["local_choose"][metric]
    read.clear()
    _, half, config = evaluate(make(method="keydiff", keep=0.5), tasks)
    assert half["local_generate"] != answers["local_generate"]
    assert len(read) == 2 + 6  # two batches of prompts, and every context once for all its choices
    for tokens, lengths in read:
        assert lengths.sum((0, 2)).tolist() == pytest.approx([6 * n / 2 for n in tokens], abs=1)
    assert config["headwise_kept"] == pytest.approx(0.5, abs=0.01)
    assert config["headwise_keep"] == 0.5 and config["headwise_protocol"] == "query-aware"
    assert config["headwise_entries"] == "native"
    assert config["headwise_method"]["scorer"]["name"] == "KeyDiff"


def test_full_is_the_plain_model(make, tasks, read):
    lm = make(method="full")
    assert generated(lm, contexts(tasks)) == generated(make(method="keydiff", keep=1.0, batch_size=1), contexts(tasks))
    read.clear()
    assert lm.loglikelihood_rolling(asked("loglikelihood_rolling", ("apple lantern",)), disable_tqdm=True)[0] < 0
    assert "headwise_kept" not in lm.get_model_info()
    assert not read


@pytest.mark.parametrize("method", ["keydiff", "snapkv+adakv", "expected+global", "kvzip"])
def test_generation_is_that_of_each_prompt_compressed_alone(make, tasks, method):
    lm = make("qwen3", method=method, keep=0.8)
    found = generated(lm, contexts(tasks)[:4])
    for text, prompt in zip(found, contexts(tasks), strict=False):
        ids = lm.tokenizer(prompt, return_tensors="pt").input_ids
        memory = compress(lm.model, ids[:, :-1], method, keep=0.8)
        new = lm.model.generate(ids, **given(lm.model, memory), max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert text == lm.tokenizer.decode(new, skip_special_tokens=True)


def one_by_one(lm, context, continuation, method, keep, **options):
    """Log-likelihood and greediness, a token at a time."""
    ids, rest = (lm.tokenizer(text, add_special_tokens=False).input_ids for text in (context, continuation))
    ids = torch.tensor([[lm.tokenizer.bos_token_id, *ids]])
    memory = compress(lm.model, ids[:, :-1], method, keep=keep, **options)
    total, greedy, last = 0.0, True, ids[:, -1:]
    for token in rest:
        with torch.no_grad():
            logs = lm.model(last, **given(lm.model, memory), use_cache=True).logits[0, -1].log_softmax(-1)
        total, greedy, last = (
            total + float(logs[token]),
            greedy and int(logs.argmax()) == token,
            torch.tensor([[token]]),
        )
    return total, greedy


def test_entries_are_stored_as_asked(make, tasks):
    """Scores are those of a cache of codes, and a share of the bytes holds more of them."""
    pairs = [(context, f" {CHOICES[1]}") for context in contexts(tasks)]
    small = make(method="keydiff", keep=0.5, entries="int8")
    found = scored(small, pairs)
    assert_scores_equal(found, [one_by_one(small, *pair, "keydiff", 0.5, entries="int8") for pair in pairs])
    assert found != scored(make(method="keydiff", keep=0.5), pairs)
    assert small.get_model_info()["headwise_entries"] == "int8"
    more = make(method="keydiff", keep="50%bytes", entries="int8")
    scored(more, pairs)
    assert more.get_model_info()["headwise_kept"] > 0.7


@pytest.mark.parametrize("method", ["keydiff", "snapkv+adakv", "kvzip"])
def test_scores_are_those_of_a_token_at_a_time(make, tasks, method):
    """Continuations of one context share its cache, in batches; the model's own continuation is known for greedy."""
    lm = make("base", batch_size=2, method=method, keep=0.8)
    pairs = [(context, f" {choice}") for context in contexts(tasks)[:3] for choice in CHOICES]
    pairs += [(context, f" {generated(lm, [context])[0]}") for context in contexts(tasks)[:3]]
    pairs = pairs[::2] + pairs[1::2]  # what belongs together need not come together
    found = scored(lm, pairs)
    assert_scores_equal(found, [one_by_one(lm, *pair, method, 0.8) for pair in pairs])
    assert {greedy for _, greedy in found} == {True, False}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("gemma") / "model", "gemma3_text")


@pytest.mark.parametrize(
    "options",
    [{}, {"max_length": 48}, {"batch_size": "auto", "max_batch_size": 2}, {"softmax_dtype": "float64"}],
    ids=["gemma", "truncated", "auto", "softmax"],
)
def test_everything_kept_is_hflm_with_its_options(harness, model_folders, gemma, tasks, options):
    """Contexts beyond max_length lose their first tokens, as HFLM has it; sliding windows slide."""
    folder = str(model_folders["base"] if options else gemma)
    options = {"device": "cpu", "batch_size": 3, **options}
    plain = import_module("lm_eval.models.huggingface").HFLM(folder, **options)
    ours = harness.HeadwiseLM(folder, method="keydiff", keep=1.0, **options)
    pairs = [(context, f" {choice}") for context in contexts(tasks) for choice in CHOICES]
    assert_scores_equal(scored(ours, pairs), scored(plain, pairs))
    assert generated(ours, contexts(tasks)) == generated(plain, contexts(tasks))


@pytest.mark.parametrize("how", [{"until": ["{word}"]}, {"until": []}, {"num_beams": 3}], ids=["stop", "none", "beams"])
def test_generation_stops_and_searches_as_hflm_s(make, tasks, how):
    full, ours = make(method="full"), make(method="keydiff", keep=1.0)
    word = generated(full, contexts(tasks)[:1])[0].split()[3]
    how = {key: [word] if value == ["{word}"] else value for key, value in how.items()}
    found = generated(ours, contexts(tasks), **how)
    assert found == generated(full, contexts(tasks), **how)
    if how.get("until"):
        assert len(found[0].split()) == 3


def test_mixed_precision(make, tasks):
    """HFLM's autocast is around reading and scoring alike."""
    options = {"mixed_precision_dtype": "bfloat16"}
    pairs = [(contexts(tasks)[0], f" {choice}") for choice in CHOICES]
    full, ours = (make(method=method, keep=1.0, **options) for method in ("full", "keydiff"))
    for (found, _), (expected, _) in zip(scored(ours, pairs), scored(full, pairs), strict=True):
        assert found == pytest.approx(expected, rel=0.03)


def test_a_prompt_too_short_for_the_method_is_named(make):
    """SnapKV always keeps 32 tokens: of a short prompt that is more than a fifth."""
    lm = make(method="snapkv", keep=0.2, batch_size=2)
    short, long = "copper lantern " * 20 + "copper lantern", "apple badge bakery ball " * 60
    for ask in (lambda: generated(lm, [long, short]), lambda: scored(lm, [(short, " apple")])):
        with pytest.raises(BudgetInfeasible, match=r"'[^']*copper lantern'.*sink and window.*keep=256tok"):
            ask()
    with pytest.raises(BudgetInfeasible, match=r"^of a batch of 2 prompts the shortest, '.*lantern' \(43 tokens"):
        generated(lm, [long, short])
    whole, full = make(method="snapkv", keep="256tok"), make(method="full")
    assert generated(whole, [long, short])[1] == generated(full, [short])[0]


def test_a_request_without_a_context_is_refused(make):
    """There is nothing to compress: such a task would measure the plain model under the method's name."""
    lm = make(method="keydiff", keep=0.5)
    with pytest.raises(BadInput, match=r"1 tokens.*no context.*method=full"):
        scored(lm, [("", "apple copper")])
    with pytest.raises(BadInput, match="headwise eval --tasks perplexity:FILE"):
        lm.loglikelihood_rolling(asked("loglikelihood_rolling", ("apple lantern",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "adakw", "keep": 0.5}, "Did you mean 'adakv'"),
        ({"method": "adakv", "keep": 1.5}, "outside"),
        ({"method": "adakv"}, "keep is missing"),
        ({"keep": 0.5}, "method is missing"),
        ({"method": "adakv", "keep": 0.5, "protocol": "query-agnostic"}, "use headwise eval"),
        ({"method": "adakv", "keep": 0.5, "entries": "int3"}, "choose native, int8"),
        ({"method": "full", "entries": "int8"}, "use keep=1.0 of a method"),
    ],
)
def test_wrong_arguments_are_refused_before_the_model_is_loaded(harness, options, message):
    with pytest.raises(BadInput, match=message):
        harness.HeadwiseLM("/no/such/model", **options)


def test_an_unsupported_model_is_refused_before_any_task(harness, model_folders):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
    small = AutoModelForCausalLM.from_config(RobertaConfig(**sizes, vocab_size=97, is_decoder=True))
    with pytest.raises(UnsupportedModel, match="roberta"):
        harness.HeadwiseLM(small, tokenizer=word_tokenizer(), method="keydiff", keep=0.5)


def run(*arguments, **environment):
    """Run python: (exit code, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def line(folder, tasks, model_args):
    """The command of the docs, on local tasks."""
    return [
        *("--model", "headwise", "--device", "cpu", "--batch_size", "3", "--include_path", str(tasks)),
        *("--model_args", f"pretrained={folder},{model_args}", "--tasks", ",".join(TASKS)),
    ]


def test_the_command_prints_the_harness_s_table(harness, model_folders, tasks):
    code, out, err = run("-m", "headwise.evals.lm_eval", *line(model_folders["base"], tasks, "method=keydiff,keep=0.5"))
    assert code == 0, err
    assert "'method': 'keydiff', 'keep': 0.5" in out
    for name in ("local_generate", "local_choose", "exact_match", "acc_norm"):
        assert f"|{name}" in out.replace(" ", "")


def test_an_error_of_ours_is_one_line_and_an_exit_code(harness, model_folders, tasks, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lm_eval", *line(model_folders["base"], tasks, "method=snapkv,keep=0.2")])
    with pytest.raises(SystemExit) as caught:
        harness.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("headwise: of a batch of 3 prompts the shortest, ")
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: harness.HeadwiseLM("model", method="adakw", keep=0.5))
    with pytest.raises(SystemExit) as caught:
        harness.main()
    assert caught.value.code == 2


def test_without_the_harness_one_line_says_what_to_install(tmp_path):
    """And nothing else of headwise asks for it."""
    (tmp_path / "lm_eval.py").write_text("raise ImportError('No module named lm_eval')")
    program = (
        "import headwise.cli, headwise.evals.run, runpy; "
        "runpy.run_module('headwise.evals.lm_eval', run_name='__main__')"
    )
    code, out, err = run("-c", program, PYTHONPATH=str(tmp_path))
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "headwise: this needs the lm-evaluation-harness (No module named lm_eval): pip install 'headwise[lm-eval]'."
    ]
