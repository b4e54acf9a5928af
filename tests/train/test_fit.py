"""LKV's first stage: scores that predict attention, budgets for them, and what of it can be resumed."""

import json
from dataclasses import replace

import pytest
import torch
from families import random_ids, tiny_model
from random_gates import gates_file, gates_for, make_gates
from test_train import EXAMPLES, loaded  # noqa: F401  (a fixture)

import headwise
from headwise.artifacts.gates import EntryScores, Gates, HeadBudgets
from headwise.artifacts.tensors import read_tensors, write_tensors
from headwise.errors import BadInput
from headwise.methods.allocate import LKVH, Global
from headwise.methods.method import Method
from headwise.models.families import view
from headwise.models.loading import REFERENCE, load_tokenizer
from headwise.models.processes import Processes
from headwise.offline.train import collect
from headwise.offline.train.fit import FitSettings, Sampled, fit, fit_budgets, instruction_ids, predicted, quality
from headwise.offline.train.loop import Settings
from headwise.offline.train.run import train
from headwise.serving.settings import Settings as Served
from headwise.serving.settings import resolved

LAYERS, KV_HEADS, HEAD_DIM, ENTRIES = 2, 3, 4, 200
WIDTH = 2 * HEAD_DIM + 5
FIT = Settings(fit=FitSettings(steps=60, entries=16, answer_tokens=3))


def samples(number, seed=0):
    """Entries whose targets are a bent function of their features, another in every head."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(LAYERS * KV_HEADS, WIDTH, generator=torch.Generator().manual_seed(7))
    level = torch.arange(LAYERS * KV_HEADS)[:, None].float()
    found = []
    for _ in range(number):
        features = torch.randn(LAYERS * KV_HEADS, ENTRIES, WIDTH, generator=draw)
        targets = torch.einsum("hnf,hf->hn", features, weights).tanh() * 2 - level
        found.append(
            Sampled(
                features=features.half(),
                again=(2 * targets).exp() / 4,
                following=(2 * targets).exp() / 16,
                answers=(2 * targets).exp() / 8,
                summary=torch.randn(24, generator=draw),
            )
        )
    return found


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    scores = EntryScores(LAYERS, KV_HEADS, HEAD_DIM)
    history = fit(scores, samples(8), samples(2, seed=1), FitSettings(steps=600))
    return scores.requires_grad_(False), history


def test_scores_predict_targets_they_have_not_seen(fitted):
    scores, history = fitted
    explained, shared = quality(scores, samples(3, seed=2), FitSettings())
    assert explained > 0.85 and shared > 0.75
    assert [row["step"] for row in history][-1] == 600
    assert history[-1]["explained"] > history[0]["explained"]


def test_predictions_are_the_scores_of_inference(fitted):
    scores, features = fitted[0], samples(1)[0].features
    layers = [scores(layer[None].float(), at)[0] for at, layer in enumerate(features.unflatten(0, (LAYERS, KV_HEADS)))]
    torch.testing.assert_close(predicted(scores, features), torch.cat(layers))


def test_budgets_are_mean_shares_of_a_contest(fitted):
    budgets, found = HeadBudgets(LAYERS * KV_HEADS, 24), samples(5, seed=4)
    fit_budgets(budgets, fitted[0], found)
    shares = budgets(0.25).detach()
    assert float(shares.mean()) == pytest.approx(0.25, abs=1e-4)
    assert shares.sort(descending=True).indices.tolist() == list(range(LAYERS * KV_HEADS))  # the levels of `samples`
    torch.testing.assert_close(budgets.usual[0], torch.stack([one.summary for one in found]).mean(0))


# --- what a file says of its scores ---


def test_a_contest_for_scores_that_compare_and_budgets_for_others(tmp_path):
    model = tiny_model("llama")
    one, other = (gates_file(tmp_path, model, comparable=comparable) for comparable in (True, False))
    assert Gates.load(one).comparable and not Gates.load(other).comparable
    assert Method.parse(f"lkv@{one}").allocator == Global()
    assert type(Method.parse(f"lkv@{other}").allocator) is LKVH
    assert type(Method.parse(f"lkv-t@{one}+lkv-h@{one}").allocator) is LKVH
    cache = headwise.compress(model, random_ids(1, 60), f"lkv@{one}", keep=0.3)
    assert int(cache.lengths.sum()) == round(0.3 * 60 * cache.lengths.numel())


def test_a_server_has_the_budgets_that_were_learned_with_such_scores(tmp_path):
    model = tiny_model("llama")
    path = gates_file(tmp_path, model, comparable=True)
    method, _ = resolved(Served(method=f"lkv@{path}", keep=0.3), model.config)
    assert type(method.allocator) is LKVH


def test_files_from_before_compare_within_a_head_only(tmp_path):
    path = gates_file(tmp_path, tiny_model("llama"), comparable=True)
    tensors, metadata = read_tensors(path, "gates")
    del tensors["scores.bias_out"]
    fields = {"origin": metadata["origin"], "settings": metadata["settings"]}
    write_tensors(path, "gates", tensors, fields)
    gates = Gates.load(path)
    assert not gates.comparable
    assert gates.scores is not None and not gates.scores.bias_out.any()


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_whether_scores_compare_is_true_or_false(tmp_path, value):
    path = gates_file(tmp_path, tiny_model("llama"))
    tensors, metadata = read_tensors(path, "gates")
    write_tensors(path, "gates", tensors, {"origin": metadata["origin"], "comparable": value})
    with pytest.raises(BadInput, match="comparable"):
        Gates.load(path)


# --- as a verb ---


def test_training_ends_with_scores_that_compare(loaded, tmp_path):  # noqa: F811
    out, told = tmp_path / "g.safetensors", []
    train(*loaded, EXAMPLES, out, settings=FIT, progress=lambda *say: told.append(say))
    gates = Gates.load(out)
    assert gates.comparable and gates.budgets is not None and gates.scores is not None
    assert gates.settings["fit"]["steps"] == 60 and gates.settings["part"] == "lkv"
    rows = [json.loads(line) for line in (tmp_path / "g.safetensors.log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [50, 60]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.safetensors", "g.safetensors.log.jsonl"]
    assert told[0][:2] == (1, len(EXAMPLES)) and told[-1][:2] == (60, 60)


def test_later_stages_begin_with_these_scores_and_compare_no_more(loaded, tmp_path):  # noqa: F811
    out = tmp_path / "g.safetensors"
    train(*loaded, EXAMPLES, out, settings=replace(FIT, steps=2, contexts_per_step=2, questions=1, answer_tokens=2))
    assert not Gates.load(out).comparable


def test_a_killed_run_reads_no_context_twice(loaded, tmp_path, monkeypatch):  # noqa: F811
    whole, out, read = tmp_path / "whole.safetensors", tmp_path / "g.safetensors", []
    train(*loaded, EXAMPLES, whole, settings=FIT)

    def noting(model, tokenizer, example, *rest):
        if len(read) == 5:
            read.append(None)
            raise KeyboardInterrupt
        read.append(example.context)
        return sample(model, tokenizer, example, *rest)

    sample = collect.sample
    monkeypatch.setattr(collect, "sample", noting)
    with pytest.raises(KeyboardInterrupt):
        train(*loaded, EXAMPLES, out, settings=FIT)
    train(*loaded, EXAMPLES, out, settings=replace(FIT, fit=replace(FIT.fit, steps=60)))
    assert [one for one in read if one] == [example.context for example in EXAMPLES]
    assert out.read_bytes() == whole.read_bytes()


def test_what_follows_and_answers_are_futures_too(loaded, tmp_path):  # noqa: F811
    """Each changes what is learned."""
    model, tokenizer = loaded
    without = [replace(example, questions=("? who",), following="") for example in EXAMPLES]
    asked = FitSettings(entries=64, questions=1, answer_tokens=3)

    def targets(example, settings):
        return collect.sample(model, tokenizer, example, settings, torch.Generator().manual_seed(0)).targets(settings)

    bare = targets(without[0], replace(asked, questions=0))
    for other, settings in [
        (without[0], asked),
        (replace(without[0], following=" then he saw the key near the river"), replace(asked, questions=0)),
    ]:
        found = targets(other, settings)
        assert bool((found >= bare - 1e-4).all()) and bool((found > bare + 1e-2).any())


def test_a_tokenizer_without_the_words_gets_no_instruction(loaded):  # noqa: F811
    assert instruction_ids(load_tokenizer(REFERENCE)) == []


def test_a_part_of_another_run_is_named(loaded, tmp_path):  # noqa: F811
    model, tokenizer = loaded
    parts = collect.Parts(tmp_path / "g", "gates")
    settings = FitSettings(entries=8, questions=0)
    options = (settings, Processes(), lambda *say: None)
    collect.collect(model, tokenizer, EXAMPLES[:1], parts, *options)
    (file,) = parts.folder.iterdir()
    tensors, _ = read_tensors(file, "part")
    write_tensors(file, "part", tensors, {"run": "another"})
    with pytest.raises(BadInput, match="is damaged: it is not of this run"):
        collect.collect(model, tokenizer, EXAMPLES[:1], parts, *options)


def test_gates_made_for_a_model_keep_their_kind_in_every_place(tmp_path):
    """A copy for some heads, and one read back, say the same of their scores."""
    model = tiny_model("llama")
    gates = gates_for(model, comparable=True)
    assert gates.scores is not None
    some = gates.scores.of_heads(slice(0, 1))
    torch.testing.assert_close(some.bias_out, gates.scores.bias_out[:, :1])
    assert make_gates(view(model).shape).comparable is False
