"""Contexts with images: each type of models that sees answers as transformers' own cache does, or refuses by name."""

from functools import partial

import pytest
import torch
from seeing import IMAGE, KINDS, ON_GRIDS, TYPES, VIDEO, followed, seeing, shown, stacked, words
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

import headwise
from headwise.cache.kept import tokens_fingerprint
from headwise.cache.listener import Listener
from headwise.errors import ArtifactMismatch, BadInput, UnsupportedGeneration, UnsupportedModel
from headwise.interfaces import AbstractScorer
from headwise.methods.scores import H2O, SnapKV
from headwise.models.families import given, view
from headwise.models.loading import load

QUESTION = words(5, seed=9)
GREEDY = {"max_new_tokens": 5, "do_sample": False}
TOLERANCE = 1e-5  # relative, float32

pytestmark = pytest.mark.filterwarnings("ignore:this model's attention was 'eager'")


def compressed(kind, inputs=None, method="keydiff", keep=1.0, **options):
    """A cache of a context; the model has read another one, with two images, since then."""
    model = seeing(kind)
    cache = headwise.compress(model, **(inputs or shown(kind)), method=method, keep=keep, **options)
    headwise.compress(model, **shown(kind, seed=50, before=30, images=2), method="keydiff", keep=1.0)
    return cache


@torch.no_grad()
def asked(kind, cache, mask=None, question=QUESTION):
    """Logits of the question's tokens. Without a mask, and on grids, the model works out their positions."""
    options = {}
    if mask is not None:
        options["attention_mask"] = torch.cat([mask, torch.ones_like(question)], dim=-1)
    if mask is not None and kind not in ON_GRIDS:
        options["position_ids"] = (options["attention_mask"].cumsum(-1) - 1)[:, -question.shape[1] :]
    return seeing(kind)(input_ids=question, **options, **given(seeing(kind), cache)).logits


@torch.no_grad()
def stock(kind, inputs, implementation="eager"):
    """Logits of the question's tokens with transformers' own attention, all in one pass."""
    model = seeing(kind)
    model.set_attn_implementation(implementation)
    try:
        return model(**followed(kind, inputs, QUESTION), use_cache=False).logits[:, -QUESTION.shape[1] :]
    finally:
        model.set_attn_implementation("headwise")


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_keeping_everything_changes_nothing(kind, implementation):
    cache, inputs = compressed(kind), shown(kind)
    expected = stock(kind, inputs, implementation)
    assert distance(asked(kind, cache.fork()), expected) < TOLERANCE
    assert distance(asked(kind, cache.fork(), inputs["attention_mask"]), expected) < TOLERANCE
    other = stock(kind, inputs | {"pixel_values": inputs["pixel_values"] + 1.0}, implementation)
    assert distance(other, expected) > 100 * TOLERANCE  # so the image matters


@pytest.mark.parametrize("kind", KINDS)
def test_the_stock_cache_answers_the_same(kind):
    model, inputs = seeing(kind), shown(kind)
    cache = compressed(kind)
    with torch.no_grad():
        plain = DynamicCache(config=model.config)
        model(**inputs, **given(model, plain))
        expected = model(input_ids=QUESTION, **given(model, plain)).logits
    assert distance(asked(kind, cache), expected) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_may_end_with_an_image(kind):
    inputs = shown(kind, after=0)
    cache = compressed(kind, inputs, method="snapkv+adakv")
    assert distance(asked(kind, cache.fork()), stock(kind, inputs)) < TOLERANCE
    expected = seeing(kind).generate(**followed(kind, inputs, QUESTION), **GREEDY)
    assert torch.equal(seeing(kind).generate(**cache.inputs(QUESTION), **GREEDY), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_half_is_masked_attention(kind):
    inputs, model = shown(kind), seeing(kind)
    cache, shape = compressed(kind, keep=0.5), view(model).shape
    kept = {layer: torch.zeros(shape.kv_heads, inputs["input_ids"].shape[1]).bool() for layer in shape.layers}
    for index, layer in enumerate(shape.layers):
        for head in range(shape.kv_heads):
            kept[layer][head, cache.positions(index, 0, head)] = True
    AttentionInterface.register("masked", partial(_masked, kept))
    AttentionMaskInterface.register("masked", sdpa_mask)
    found = asked(kind, cache)
    assert distance(found, stock(kind, inputs, {"text_config": "masked"})) < TOLERANCE
    assert distance(found, stock(kind, inputs)) > 100 * TOLERANCE


def _masked(kept, module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Eager attention with a mask that hides from the question what was not kept."""
    tokens, group = query.shape[2], query.shape[1] // key.shape[1]
    seen = torch.ones(tokens, tokens).bool().tril() if attention_mask is None else attention_mask
    seen = seen.expand(1, query.shape[1], tokens, tokens).clone()
    if module.layer_idx in kept:
        context = kept[module.layer_idx]
        seen[:, :, context.shape[1] :, : context.shape[1]] &= context.repeat_interleave(group, 0)[:, None]
    keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = (query @ keys.transpose(-1, -2) * scaling).masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ values).transpose(1, 2), None


@pytest.mark.parametrize("kind", KINDS)
def test_generate_goes_on(kind):
    model, whole = seeing(kind), followed(kind, shown(kind), QUESTION)
    expected = model.generate(**whole, **GREEDY)
    cache = compressed(kind)
    one, types = cache.fork(), {TYPES[kind]: torch.zeros_like(QUESTION)} if kind in TYPES else {}
    assert torch.equal(model.generate(**one.inputs(QUESTION, **types), **GREEDY), expected)
    two = model.generate(**cache.fork(copies=2).inputs(QUESTION.expand(2, -1)), **GREEDY)
    assert torch.equal(two, expected.expand(2, -1))
    asked(kind, compressed(kind))  # the model knows of another context before the next turn
    further = torch.cat([expected[:, -1:], words(3, seed=4)], dim=-1)
    longer = followed(kind, whole, torch.cat([expected[:, -5:], words(3, seed=4)], dim=-1))
    assert torch.equal(model.generate(**one.inputs(further), **GREEDY), model.generate(**longer, **GREEDY))


@pytest.mark.parametrize("kind", KINDS)
def test_beams_share_a_context(kind):
    model, cache = seeing(kind), compressed(kind)
    expected = model.generate(**followed(kind, shown(kind), QUESTION), num_beams=2, **GREEDY)
    compressed(kind, shown(kind, seed=3, before=20))
    inputs = cache.inputs(QUESTION) | given(model, cache.fork(copies=2))
    assert torch.equal(model.generate(**inputs, num_beams=2, **GREEDY), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_prompt(kind):
    model, whole = seeing(kind), followed(kind, shown(kind), QUESTION)
    once = headwise.RaggedCache(model, "keydiff", keep=1.0)
    found = model.generate(**once.inputs(**whole), **GREEDY)
    assert torch.equal(found, model.generate(**whole, **GREEDY))
    assert once.compressed


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_answers_as_its_rows(kind):
    rows = [shown(kind, seed=1), shown(kind, seed=2, before=5, images=2)]
    batch = stacked(kind, rows)
    mask = batch["attention_mask"]
    cache = compressed(kind, batch, method="snapkv+adakv", keep="34tok")
    question = QUESTION.expand(2, -1)
    together = asked(kind, cache.fork(), mask, question)
    answers = seeing(kind).generate(**cache.fork().inputs(question), **GREEDY)
    for row, inputs in enumerate(rows):
        alone = compressed(kind, inputs, method="snapkv+adakv", keep="34tok")
        assert distance(together[row : row + 1], asked(kind, alone.fork())) < TOLERANCE
        answer = seeing(kind).generate(**alone.inputs(QUESTION), **GREEDY)
        assert torch.equal(answers[row, -5:], answer[0, -5:])
    turned = cache.fork()
    turned.batch_select_indices(torch.tensor([1, 0]))
    assert distance(asked(kind, turned, mask.flip(0), question), together.flip(0)) < TOLERANCE
    joined = headwise.RaggedCache.join([cache.fork(), cache.fork()])
    twice = asked(kind, joined, mask.repeat(2, 1), QUESTION.expand(4, -1))
    assert distance(twice, together.repeat(2, 1, 1)) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    model, inputs, path = seeing(kind), shown(kind), tmp_path / "cache.safetensors"
    cache = compressed(kind, keep=0.5)
    cache.save(path)
    loaded = headwise.load(path, model, **inputs)
    assert loaded.kept == cache.kept
    expected = model.generate(**cache.fork().inputs(QUESTION), **GREEDY)
    compressed(kind, shown(kind, seed=3, before=20))
    assert torch.equal(model.generate(**loaded.inputs(QUESTION), **GREEDY), expected)
    with pytest.raises(ArtifactMismatch, match="another context"):
        headwise.load(path, model, **inputs | {"pixel_values": inputs["pixel_values"] * 1.01})
    with pytest.raises(BadInput, match="no pixel_values"):
        headwise.load(path, model, input_ids=inputs["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
def test_text_only(kind):
    model, text = seeing(kind), words(40)
    types = {TYPES[kind]: torch.zeros_like(text)} if kind in TYPES else {}  # as processors make them
    cache = compressed(kind, {"input_ids": text, **types}, prefill_chunk_size=16)
    expected = model.generate(torch.cat([text, QUESTION], dim=-1), **GREEDY)
    compressed(kind)
    assert torch.equal(model.generate(**cache.fork().inputs(QUESTION), **GREEDY), expected)
    assert cache.tokens_fingerprint == tokens_fingerprint(text, torch.ones_like(text))
    for method in ("kvzip", "expected"):
        repeated = headwise.compress(model, text, method, keep=0.5)
        assert asked(kind, repeated).isfinite().all()


@pytest.mark.parametrize("reading", ["exact", "offload"])
@pytest.mark.parametrize("kind", KINDS)
def test_ways_to_read(kind, reading, monkeypatch):
    monkeypatch.setattr("headwise.methods.reading.PIECE", 16)  # what texts are read in, if nobody says how much
    cache = compressed(kind, reading=reading)
    assert distance(asked(kind, cache), stock(kind, shown(kind))) < TOLERANCE


METHODS = ("keydiff", "knorm", "streaming", "snapkv", "tova", "h2o", "criticalkv", "expected")


@pytest.mark.parametrize("kind", KINDS)
def test_methods(kind):
    inputs = shown(kind, before=30)
    for method in METHODS:
        if method == "expected" and kind in ON_GRIDS:
            with pytest.raises(UnsupportedModel, match="three positions"):
                compressed(kind, inputs, method=method)
        else:
            assert asked(kind, compressed(kind, inputs, method=method, keep=0.8)).isfinite().all()
    with pytest.raises(UnsupportedGeneration, match="KVzip"):
        compressed(kind, inputs, method="kvzip")


class _Scores(Listener):
    """What scorers give, layer by layer."""

    def __init__(self, *scorers: AbstractScorer):
        self._scorers, self.found = scorers, {scorer: [] for scorer in scorers}

    @property
    def scorers(self):
        return self._scorers

    def observed(self, scorer, observation):
        if scorer in self.found:
            self.found[scorer].append(scorer.score(observation)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_scorers_look_at_the_attention_of_the_model(kind):
    """Where tokens of an image see one another, these attentions count, too."""
    model, inputs = seeing(kind), shown(kind, after=2)
    snap, heavy = SnapKV(window_size=8, kernel_size=1), H2O()
    listener = _Scores(snap, heavy)
    compressed(kind, inputs, listeners=[listener])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("headwise")
    for index, layer in enumerate(view(model).shape.layers):
        grouped = weights[layer][0].unflatten(0, (2, -1))  # [H, G, T, N]
        assert torch.allclose(listener.found[snap][index][:, :-8], grouped[..., -8:, :-8].mean((1, 2)), atol=1e-6)
        count = (grouped > 0).sum(2).float()
        assert torch.allclose(listener.found[heavy][index], (grouped.sum(2) / count).mean(1), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_text_may_follow_the_image(kind):
    """Positions go on, whatever the model has read in between, and what tokens of the image have seen is remembered."""
    model, inputs, text = seeing(kind), shown(kind, after=2), words(7, seed=5)
    whole, scorers = followed(kind, inputs, text), (SnapKV(window_size=16, kernel_size=1), H2O())
    cache = headwise.RaggedCache(model, "keydiff", keep=1.0, prompt_length=whole["input_ids"].shape[1])
    pieces, once = _Scores(*scorers), _Scores(*scorers)
    cache.listen(pieces)
    with torch.no_grad():
        model(**inputs, **given(model, cache))
        compressed(kind, whole, listeners=[once])
        model(input_ids=text, **given(model, cache))
    assert distance(asked(kind, cache), stock(kind, whole)) < TOLERANCE
    for scorer in scorers:
        assert torch.allclose(torch.stack(pieces.found[scorer]), torch.stack(once.found[scorer]), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_in_a_later_piece_is_refused(kind):
    late = headwise.RaggedCache(seeing(kind), "keydiff", keep=0.7, prompt_length=60)
    with torch.no_grad():
        seeing(kind)(input_ids=words(7), **given(seeing(kind), late))
    with pytest.raises(BadInput, match="images belong to the context, which is read in one piece"):
        seeing(kind)(**shown(kind) | {"attention_mask": None}, **given(seeing(kind), late))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"pixel_values": None}, BadInput, "no pixel_values"),
        ({"input_ids": words(40), "attention_mask": None}, BadInput, "no placeholder|types of tokens"),
        ({"prefill_chunk_size": 16}, BadInput, "one piece"),
        ({"reading": "evict"}, UnsupportedGeneration, "one piece|read in one"),
        ({"pixels": 1}, BadInput, "takes no argument 'pixels'"),
        ({"labels": words(28)}, BadInput, "'labels'"),
        ({"mm_encoder_outputs": {}}, BadInput, "'mm_encoder_outputs'"),
        ({"pixel_values": [1.0]}, BadInput, "expected a tensor"),
    ],
)
def test_what_does_not_fit_is_refused(kind, change, error, reason):
    with pytest.raises(error, match=reason):
        headwise.compress(seeing(kind), **{**shown(kind), "method": "keydiff", "keep": 0.5, **change})


@pytest.mark.parametrize("kind", [*sorted(TYPES), "mistral3"])
def test_what_comes_with_images_must_come(kind):
    inputs = shown(kind)
    for name in inputs.keys() - {"input_ids", "attention_mask", "pixel_values"}:
        with pytest.raises(BadInput, match=name):
            compressed(kind, inputs | {name: None})
        with pytest.raises(BadInput, match=name):
            seeing(kind)(**inputs | {name: None}, **given(seeing(kind), _fresh(kind)))


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_types_of_tokens_must_be_those_of_the_ids(kind):
    inputs = shown(kind)
    with pytest.raises(BadInput, match="must be 1 at the placeholders"):
        compressed(kind, inputs | {TYPES[kind]: 1 - inputs[TYPES[kind]]})
    with pytest.raises(BadInput, match="have shape"):
        compressed(kind, inputs | {TYPES[kind]: inputs[TYPES[kind]][:, 1:]})


@pytest.mark.parametrize("kind", KINDS)
def test_images_come_with_the_context(kind):
    model, cache, late = seeing(kind), compressed(kind), shown(kind, seed=4, before=3)
    with pytest.raises(BadInput, match="images belong to the context"):
        cache.inputs(late["input_ids"])
    with pytest.raises(BadInput, match="images belong to the context"):
        cache.inputs(**late)
    with pytest.raises(BadInput, match="images belong to the context"):
        model(**late | {"attention_mask": None}, **given(model, cache))
    with pytest.raises(BadInput, match="images belong to the context"):
        model(input_ids=late["input_ids"], **given(model, cache))
    with pytest.raises(BadInput, match="no pixel_values"):
        model(input_ids=late["input_ids"], **given(model, _fresh(kind)))
    assert distance(asked(kind, cache), stock(kind, shown(kind))) < TOLERANCE  # nothing of that has been read


def _fresh(kind):
    return headwise.RaggedCache(seeing(kind), "keydiff", keep=1.0)


@pytest.mark.parametrize("kind", ON_GRIDS)
def test_positions_of_another_context_are_refused(kind):
    cache, tokens = compressed(kind), shown(kind)["input_ids"].shape[1]
    counted = torch.arange(tokens, tokens + QUESTION.shape[1])[None]
    with pytest.raises(BadInput, match="positions are not the number of tokens"):
        seeing(kind)(input_ids=QUESTION, position_ids=counted, **given(seeing(kind), cache))
    ahead = cache.kept.ahead[0]
    assert ahead < 0
    with torch.no_grad():
        found = seeing(kind)(input_ids=QUESTION, position_ids=counted + ahead, **given(seeing(kind), cache)).logits
    assert distance(found, stock(kind, shown(kind))) < TOLERANCE


@pytest.mark.parametrize("kind", ON_GRIDS)
def test_videos_are_refused(kind):
    text = words(20)
    text[0, 3] = VIDEO
    with pytest.raises(BadInput, match="video"):
        compressed(kind, {"input_ids": text})
    inputs = shown(kind)
    inputs["input_ids"][0, 3] = VIDEO
    with pytest.raises(BadInput, match="video"):
        compressed(kind, inputs)
    with pytest.raises(BadInput, match="'pixel_values_videos'"):
        compressed(kind, inputs | {"pixel_values_videos": inputs["pixel_values"]})


@pytest.mark.parametrize("kind", ON_GRIDS)
@pytest.mark.parametrize(
    ("ahead", "reason"), [((-100,), "positions ahead"), ((-8, -8), "positions ahead"), (None, "does not say")]
)
def test_a_file_whose_positions_cannot_be_is_refused(kind, tmp_path, ahead, reason):
    cache, path = compressed(kind), tmp_path / "cache.safetensors"
    kept = cache.kept
    kept.with_segments(kept.segments, ahead=ahead).save(path, seeing(kind))
    with pytest.raises(BadInput, match=reason):
        headwise.load(path, seeing(kind))


def test_types_that_were_not_tried_are_refused():
    model = seeing("vipllava")
    with pytest.raises(UnsupportedModel, match="'vipllava' has not been tried with images"):
        headwise.compress(model, **shown("llava"), method="keydiff", keep=0.5)
    with pytest.raises(UnsupportedModel, match="'vipllava' has not been tried with images"):
        model(**shown("llava"), **given(model, headwise.RaggedCache(model, "keydiff", keep=0.5)))
    with pytest.raises(BadInput, match="no pixel_values"):
        headwise.compress(model, torch.full((1, 20), IMAGE), "keydiff", keep=0.5)


def test_a_model_without_eyes_takes_no_images():
    model = load("reference", device="cpu")[0]
    with pytest.raises(BadInput, match="takes no argument 'pixel_values'"):
        headwise.compress(model, words(20), "keydiff", keep=0.5, pixel_values=torch.zeros(1))
