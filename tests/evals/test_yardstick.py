"""The oracle of evaluations: its scores by brute force, what it keeps, where it is refused, how it is marked."""

import json
from dataclasses import replace

import pytest
import torch
from dense_decoding import dense_twin
from evaluated import evaluated, evaluation_of
from families import random_ids, tiny_model
from folders import word_tokenizer

import headwise
from headwise import cli
from headwise.cache.reading import read
from headwise.errors import BadInput
from headwise.evals.compare import compare
from headwise.evals.oracle import as_method, foresee, squared_attention
from headwise.evals.records import RunFolder
from headwise.evals.run import evaluate, manifest, summarise
from headwise.methods.method import Method
from headwise.models.loading import load
from headwise.report.quality.results import write_report
from headwise.tasks.document import Asked

FAMILIES = ["llama", "qwen3", "gemma3_text", "phi3", "gemma2", "gpt_oss"]
CONTEXT = 37
ASKED = [(6, 3), (1, 1), (9, 150)]  # tokens of a question and its answer; of one more than are looked at in one block


def pairs():
    return [
        (random_ids(1, question, seed=10 + at)[0], random_ids(1, answer, seed=20 + at)[0])
        for at, (question, answer) in enumerate(ASKED)
    ]


@torch.no_grad()
def brute_force(family, context):
    """[layers, kv_heads, tokens] from the whole attention matrices of transformers' own model."""
    model, found = dense_twin(family), []
    for question, answer in pairs():
        ids = torch.cat([context, question[None], answer[None, :-1]], dim=-1)
        attentions = model(ids, output_attentions=True).attentions
        layers = [attentions[layer][0] for layer in headwise.models.families.view(model).shape.layers]
        paid = torch.stack([weights[:, CONTEXT:, :CONTEXT].square().sum(1) for weights in layers])
        found.append(paid.unflatten(1, (model.config.num_key_value_heads, -1)).sum(2))
    return torch.stack(found).sum(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_entry_counts_what_any_later_token_pays_it(family):
    context, model = random_ids(1, CONTEXT, seed=3), tiny_model(family)
    questions, answers = zip(*pairs(), strict=True)
    reading = read(model, context, [Method.parse("keydiff").scorer])
    kernels = [layer.kernel for layer in reading.whole.ragged_layers]
    found = squared_attention(model, reading.whole, questions, answers)
    torch.testing.assert_close(found, brute_force(family, context), rtol=1e-3, atol=1e-6)
    assert [layer.kernel for layer in reading.whole.ragged_layers] == kernels
    assert reading.whole.get_seq_length() == CONTEXT


@pytest.mark.parametrize("keep", [0.05, 0.3])
def test_the_best_entries_of_all_heads_together_are_kept(keep):
    context, model = random_ids(1, CONTEXT, seed=3), tiny_model("llama")
    questions, answers = zip(*pairs(), strict=True)
    reading = foresee(model, read(model, context, []), questions, answers)
    cache = reading.cut(as_method("oracle"), keep)
    assert int(cache.lengths.sum()) == round(keep * cache.view.shape.num_heads * CONTEXT)
    scores, kept = reading.scores[as_method("oracle").scorer][:, 0], torch.zeros(3, 2, CONTEXT, dtype=torch.bool)
    for layer in range(3):
        for head in range(2):
            kept[layer, head, cache.positions(layer, 0, head)] = True
    alone = kept.sum(-1, keepdim=True) == 1  # every head keeps one
    worst, best = scores[kept & ~alone].min(), scores[~kept & ~alone].max()
    assert worst >= best


def with_one_question(task):
    def sample(index):
        found = task.sample(index)
        return replace(found, questions=found.questions[:1])

    return replace(task, sample=sample)


def test_it_is_the_ceiling_at_a_small_keep():
    """A document with one question: what the oracle keeps answers it as well as what any method keeps, or better."""
    model, tokenizer = load("reference")
    methods = ["oracle", "lkv", "keydiff+lukv", "keydiff", "random"]
    wanted = evaluation_of(tokenizer, "mini-ruler:niah_single,vt", methods, [0.02], samples=6)
    wanted = replace(wanted, tasks=tuple(map(with_one_question, wanted.tasks)))
    found = [row for row in summarise(evaluate(model, tokenizer, wanted)) if row.method in methods]
    mean = {name: sum(row.accuracy for row in found if row.method == name) / 2 for name in methods}
    assert mean["oracle"] == max(mean.values()) > mean["random"]
    assert all(row.sees_answers == (row.method == "oracle") for row in found)
    assert all(row.kv_fraction == pytest.approx(0.02, abs=2e-4) for row in found)


@pytest.mark.parametrize("options", [{"protocol": "query-aware"}, {"fidelity": False}], ids=["aware", "plain"])
def test_it_works_under_both_protocols_and_without_fidelity(options):
    tokenizer = word_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    wanted = evaluation_of(tokenizer, "mini-ruler:vt", ["oracle"], [1.0], length=160, samples=1, **options)
    full, oracle = evaluate(model, tokenizer, wanted)
    assert oracle.predictions == full.predictions
    assert oracle.kv_bytes == full.kv_bytes


def test_a_text_that_goes_on_is_its_own_question(tmp_path):
    tokenizer = word_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    (tmp_path / "book.txt").write_text(" ".join(words[at * 7 % len(words)] for at in range(170)))
    task = f"perplexity:{tmp_path / 'book.txt'}"
    found = evaluated(model, tokenizer, task, ["oracle", "random"], [0.1], length=160, samples=1)
    oracle, random = (next(row for row in found if row.method == name) for name in ("oracle", "random"))
    assert oracle.kl < random.kl


@pytest.mark.parametrize("name", ["oracle", "oracle+global", "oracle+uniform"])
def test_it_is_no_method(name):
    with pytest.raises(BadInput, match=r"a yardstick and no method.*headwise eval"):
        Method.parse(name)


def test_it_is_refused_elsewhere():
    model, tokenizer = load("reference")
    with pytest.raises(BadInput, match="a yardstick and no method"):
        headwise.compress(model, random_ids(1, 20, seed=0), "oracle", keep=0.5)
    with pytest.raises(BadInput, match="a yardstick and no method"):
        compare(model, tokenizer, "locker", [Asked(question="locker ?")], methods=["oracle"], keep=0.5)


def test_the_command_line_refuses_it_where_answers_are_made(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["headwise", "generate", "--method", "oracle", "--context", "x", "--question", "y"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "yardstick and no method" in capsys.readouterr().err


def test_records_and_report_mark_it(tmp_path):
    """Neither is it the best of the methods, however good."""
    pytest.importorskip("matplotlib")
    tokenizer = word_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    wanted = evaluation_of(tokenizer, "mini-ruler:vt", ["oracle", "snapkv"], [0.5], length=160)
    folder = RunFolder(tmp_path / "run", manifest(model, "tiny", wanted, 160, "headwise eval"))
    evaluate(model, tokenizer, wanted, folder=folder)
    lines = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert {line["method"]: line["sees_answers"] for line in lines} == {"full": False, "oracle": True, "snapkv": False}
    write_report([tmp_path / "run"], tmp_path / "report.html")
    text = (tmp_path / "report.md").read_text()
    assert "oracle (sees the answers)" in text
    assert "a yardstick: it was shown the questions" in text
    best = text[text.index("The best at every keep") :].split("\n\n")[1]
    assert "snapkv" in best
    assert "oracle" not in best
