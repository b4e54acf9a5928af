"""Every misuse is an error of headwise.errors that says what would work, and leaves nothing half-done behind."""

from inspect import unwrap

import pytest
import torch
from families import random_ids, tiny_model
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import headwise
from headwise import HeadwiseError, RaggedCache
from headwise.errors import (
    BadInput,
    BudgetInfeasible,
    NonFiniteValues,
    ShapeMismatch,
    UnsupportedGeneration,
    UnsupportedModel,
)
from headwise.methods.scores import SnapKV

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.fixture
def model():
    """A model that must still generate with a stock cache what it did before, whatever the test has done to it."""
    model, ids = tiny_model(), random_ids(1, 20)
    expected = model.generate(ids, past_key_values=DynamicCache(config=model.config), **GREEDY)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    yield model
    model.load_state_dict(weights)
    assert torch.equal(model.generate(ids, past_key_values=DynamicCache(config=model.config), **GREEDY), expected)
    headwise.compress(model, ids, "keydiff+global", keep=0.5)


def refuse(error, message, model, *args, **kwargs):
    with pytest.raises(error, match=message) as caught:
        headwise.compress(model, *args, **kwargs)
    assert isinstance(caught.value, HeadwiseError)


@pytest.mark.parametrize("keep", ["", "much", "0,5", "10 tokens", "2GX", "-0.1", "nan"])
def test_a_keep_that_cannot_be_read(model, keep):
    message = r"keep must be a fraction in \(0, 1\] such as 0.15, .*'1024tok'.*'2GiB'"
    refuse(BadInput, message, model, random_ids(1, 40), "keydiff", keep=keep)
    with pytest.raises(BadInput, match=message):
        RaggedCache(model, "keydiff", keep=keep)


@pytest.mark.parametrize("keep", [0.0, 1.5, float("nan"), "0", "150%", "2", "0tok", "0GiB"])
def test_a_keep_out_of_range(model, keep):
    refuse(BadInput, r"keep must be a fraction in \(0, 1\]", model, random_ids(1, 40), "keydiff", keep=keep)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("snapvk", "no scorer 'snapvk'. Did you mean 'snapkv'"),
        ("snapkv+adavk", "no allocator 'adavk'. Did you mean 'adakv'"),
        ("", "Known scorers: random, streaming"),
        ("snapkv+zzz", "Known allocators: uniform, pyramid"),
        ("snapkv@file", "takes no file"),
        ("snapkv+fixed", "needs a file, as in fixed@FILE"),
        ("snapkv+fixed@/nowhere/at.all", "/nowhere/at.all is not a file"),
    ],
)
def test_an_unknown_method(model, method, message):
    refuse(BadInput, message, model, random_ids(1, 40), method, keep=0.5)


def test_an_unknown_kernel(model):
    refuse(BadInput, "choose auto, reference, ", model, random_ids(1, 40), "keydiff", keep=0.5, kernel="fast")


def test_an_empty_context(model):
    refuse(BadInput, "the context is empty", model, random_ids(1, 0), "keydiff", keep=0.5)


def test_ids_without_a_batch_axis(model):
    with pytest.raises(ShapeMismatch, match=r"\[batch, tokens\]; got shape \(40,\)"):
        unwrap(headwise.compress)(model, random_ids(1, 40)[0], "keydiff", keep=0.5)


def test_a_mask_of_another_size(model):
    with pytest.raises(ShapeMismatch, match=r"attention_mask has shape \(1, 39\), input_ids \(1, 40\)"):
        unwrap(headwise.compress)(
            model, random_ids(1, 40), "keydiff", keep=0.5, attention_mask=torch.ones(1, 39, dtype=torch.long)
        )


@pytest.mark.parametrize("chunk", [None, 16])
def test_a_row_that_is_all_padding(model, chunk):
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1] = 0
    options = {"attention_mask": mask, "prefill_chunk_size": chunk}
    refuse(BadInput, "at least one token that is not padding", model, random_ids(2, 40), "keydiff", keep=0.5, **options)


@pytest.mark.parametrize("chunk", [None, 16])
def test_padding_on_the_right(model, chunk):
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 30:] = 0
    options = {"attention_mask": mask, "prefill_chunk_size": chunk}
    refuse(BadInput, "padding_side = 'left'", model, random_ids(2, 40), "keydiff", keep=0.5, **options)


@pytest.mark.parametrize("size", [0, -3])
def test_a_chunk_size_that_is_no_size(model, size):
    refuse(BadInput, "prefill_chunk_size", model, random_ids(1, 40), "keydiff", keep=0.5, prefill_chunk_size=size)


def test_a_context_longer_than_the_model_was_made_for(model):
    ids = random_ids(1, 1025)
    refuse(BadInput, "1025 tokens, but this model was made for 1024. Shorten", model, ids, "keydiff", keep=0.5)
    with pytest.raises(BadInput, match="reaches position 1025, but this model was made for 1024"):
        model.generate(ids, past_key_values=RaggedCache(model, "keydiff", keep=0.5), **GREEDY)


def test_padding_does_not_count_as_length(model):
    ids, mask = random_ids(1, 1030), torch.ones(1, 1030, dtype=torch.long)
    mask[0, :6] = 0
    assert headwise.compress(model, ids, "keydiff", keep=0.1, attention_mask=mask).compressed


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", ["keydiff", "keydiff+global", "kvzip"])
def test_weights_that_are_not_finite(model, name, value, method):
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, name).weight[3, 5] = value
    refuse(NonFiniteValues, "of model layer 1 are not finite", model, random_ids(1, 40), method, keep=0.5)


def test_large_float16_values_are_finite():
    """A sum over a head may overflow float16 where no single value does."""
    model = tiny_model(dtype=torch.float16)
    model.model.layers[2].self_attn.v_proj.bias = torch.nn.Parameter(torch.full((32,), 3e4, dtype=torch.float16))
    assert headwise.compress(model, random_ids(1, 40), "keydiff", keep=0.5).compressed


def test_a_window_that_does_not_fit_into_the_budget(model):
    """The message names the smallest keep that works, and it does."""
    ids, mask = random_ids(2, 200), torch.ones(2, 200, dtype=torch.long)
    mask[1, :40] = 0
    options = {"attention_mask": mask}
    refuse(
        BudgetInfeasible, r"smallest keep that works is 0\.2 \(or '32tok'\)", model, ids, "snapkv", keep=0.15, **options
    )
    for keep in ("0.2", "32tok"):
        assert headwise.compress(model, ids, "snapkv", keep=keep, **options).lengths.min() >= 32
    refuse(BudgetInfeasible, "32tok", model, ids, "snapkv", keep="31tok", **options)


def test_fewer_bytes_than_one_entry_per_head(model):
    refuse(BudgetInfeasible, "'1tok'", model, random_ids(1, 40), "keydiff", keep="128B")


@pytest.mark.parametrize("keep", [0.01, 0.9, "1tok", "200B"])
def test_a_context_no_longer_than_the_window_is_kept_whole(model, keep):
    """A first turn of a chat: no keep but everything would suit it, and there is nothing to gain."""
    with pytest.warns(UserWarning, match="context of 20 tokens is kept whole.*: sink 0 and window 32 cover it"):
        cache = headwise.compress(model, random_ids(1, 20), "snapkv", keep=keep)
    assert cache.lengths.unique().tolist() == [20]
    assert headwise.compress(model, random_ids(1, 20), "snapkv", keep=1.0).lengths.unique().tolist() == [20]


def test_only_the_rows_that_are_too_short_are_kept_whole(model):
    ids, mask = random_ids(2, 200), torch.ones(2, 200, dtype=torch.long)
    mask[1, :170] = 0
    with pytest.warns(UserWarning, match="context of 30 tokens is kept whole"):
        cache = headwise.compress(model, ids, "snapkv", keep=0.2, attention_mask=mask)
    assert cache.lengths.sum((0, 2)).tolist() == [6 * 40, 6 * 30]


def test_a_context_of_one_token_is_kept(model):
    with pytest.warns(UserWarning, match="context of 1 token is kept whole, .*: every head keeps one at least"):
        assert headwise.compress(model, random_ids(1, 1), "keydiff", keep=0.15).lengths.unique().tolist() == [1]


def test_the_message_names_the_keep_that_was_asked(model):
    """And no protection where there is none."""
    message = r"^keep=0\.15 gives 3 entries to 6 heads, 0\.5 .* every head needs 1 of 3 tokens\..* works is 0\.3334 "
    refuse(BudgetInfeasible, message, model, random_ids(1, 3), "keydiff", keep=0.15)
    refuse(BudgetInfeasible, "^keep=100B gives", model, random_ids(1, 30), "keydiff", keep="100B")
    refuse(BudgetInfeasible, "sink and window need 32 of 33", model, random_ids(1, 33), "adakv", keep="25%")


def test_a_scorer_with_impossible_parameters():
    with pytest.raises(BadInput, match="at least 1 query"):
        SnapKV(window_size=0)


def latents():
    ranks = {
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**SMALL, **ranks}, n_routed_experts=4, n_group=1, topk_group=1))


def attention_of_its_own():
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    return GPTNeoForCausalLM(GPTNeoConfig(**sizes, attention_types=[[["global"], 2]], bos_token_id=1, eos_token_id=2))


def sliding_mistral():
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (latents, r"one latent for all heads of a layer \(MLA\)"),
        (attention_of_its_own, "does not give its attention, through transformers' attention interface, the keys"),
        (sliding_mistral, "sliding window of 16 tokens: .* nothing to compress"),
    ],
)
def test_an_unsupported_model(make, message):
    model = make().eval()
    implementation = model.config._attn_implementation
    refuse(UnsupportedModel, message, model, random_ids(1, 20), "keydiff", keep=0.5)
    with pytest.raises(UnsupportedModel, match=message):
        headwise.enable(model)
    assert model.config._attn_implementation == implementation
    assert model.generate(random_ids(1, 20), **GREEDY).shape == (1, 24)


def test_a_replaying_scorer_under_plain_generate(model):
    """It would never be cut: generate() reads the prompt only once."""
    with pytest.raises(UnsupportedGeneration, match=r"KVzip .* use headwise.compress\(\)"):
        RaggedCache(model, "kvzip", keep=0.5)


def test_changing_the_attention_implementation_while_a_cache_is_in_use(model):
    cache = headwise.compress(model, random_ids(1, 40), "keydiff", keep=0.5)
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedModel, match=r"call headwise.enable\(model\) again"):
        model(random_ids(1, 1), past_key_values=cache)
    assert cache.get_seq_length() == 40
    headwise.enable(model)
    with torch.no_grad():
        assert torch.isfinite(model(random_ids(1, 1), past_key_values=cache).logits).all()


def test_giving_the_cache_to_another_model(model):
    """The other model, loaded anew perhaps, does not route its attention to us. Seen at its second step."""
    other = tiny_model()
    for cache in (
        RaggedCache(model, "keydiff", keep=0.5),
        headwise.compress(model, random_ids(1, 40), "keydiff", keep=0.5),
    ):
        with pytest.raises(UnsupportedModel, match=r"headwise.enable\(model\)"):
            other.generate(random_ids(1, 44), past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_of_another_size(model, batch):
    cache = headwise.compress(model, random_ids(2, 40), "keydiff", keep=0.5)
    with pytest.raises(ShapeMismatch, match=rf"holds 2 rows but the batch has {batch}. .*fork\(copies\)"):
        model(random_ids(batch, 1), past_key_values=cache)
    assert cache.get_seq_length() == 40
    with torch.no_grad():
        assert model(random_ids(2, 1), past_key_values=cache).logits.shape[0] == 2


def test_questions_before_the_context_is_complete(model):
    cache = RaggedCache(model, "keydiff", keep=0.5, prompt_length=40)
    with torch.no_grad():
        model(random_ids(1, 10), past_key_values=cache)
    for use in (cache.fork, lambda: cache.lengths, lambda: cache.positions(0, 0, 0), lambda: cache.save("nowhere")):
        with pytest.raises(UnsupportedGeneration, match=r"(read 10 tokens|not read its context yet)"):
            use()


def test_a_question_without_its_context(model):
    """generate() drops as many ids as the cache has seen: here all of them."""
    cache = headwise.compress(model, random_ids(1, 40), "keydiff", keep=0.5)
    with pytest.raises(BadInput, match=r"no new tokens for this cache, which has seen 40: give .* followed by the new"):
        model.generate(random_ids(1, 5), past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_assisted_generation(family):
    """transformers would give the cache its prompt a second time, and answer wrongly without a word.

    Recent versions announce what they are about to do. Older ones are caught when they give the prompt again (their
    mask is that of the prompt), or when they take tokens back.
    """
    model = tiny_model(family)
    prompt = random_ids(1, 50)
    for cache in (
        headwise.compress(model, prompt[:, :40], "keydiff", keep=0.5),
        RaggedCache(model, "keydiff", keep=0.5),
    ):
        refused = (
            r"Generate without it|asks to keep the first tokens|attention_mask is for 5\d tokens, but .* seen 40 and 5"
        )
        with pytest.raises((UnsupportedGeneration, BadInput), match=refused):
            model.generate(prompt, past_key_values=cache, prompt_lookup_num_tokens=3, **{**GREEDY, "eos_token_id": 2})


def test_what_a_cache_cannot_do(model):
    cache = headwise.compress(model, random_ids(1, 40), "keydiff", keep=0.5)
    with pytest.raises(BadInput, match="copies=0 must be at least 1"):
        cache.fork(copies=0)
    for use in (cache.reset, lambda: cache.crop(-1), lambda: cache.crop(39)):
        with pytest.raises(UnsupportedGeneration, match="fork"):
            use()


def test_an_error_in_the_middle_leaves_the_model_usable(model):
    """The last layer fails after the first ones were cut; the next cache finds nothing of it (see the fixture)."""
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight.fill_(torch.nan)
    refuse(NonFiniteValues, "layer 2", model, random_ids(1, 40), "keydiff+adakv", keep=0.5)


@pytest.mark.parametrize("length", [0, -1])
def test_a_prompt_length_that_is_no_length(model, length):
    with pytest.raises(BadInput, match=f"prompt_length={length} must be at least 1 token"):
        RaggedCache(model, "keydiff", keep=0.5, prompt_length=length)


def test_a_prompt_in_pieces_without_its_length(model):
    """Only the first piece would be compressed, and nobody would know."""
    cache = RaggedCache(model, "keydiff", keep=0.5)
    with pytest.warns(UserWarning, match="first 17 tokens for its whole context .* as prompt_length"):
        model.generate(random_ids(1, 60), past_key_values=cache, prefill_chunk_size=17, **GREEDY)


def test_a_later_turn_is_no_piece_of_the_prompt(model):
    """Warnings are errors here: after decoding, after compress, after a fork, and with the prompt's length given."""
    ids = random_ids(1, 40)
    turn = model.generate(ids, past_key_values=(cache := RaggedCache(model, "keydiff", keep=0.5)), **GREEDY)
    read, told = RaggedCache(model, "keydiff", keep=0.5), RaggedCache(model, "keydiff", keep=0.5, prompt_length=40)
    with torch.no_grad():
        for new in (read, told):
            model(ids, past_key_values=new)
        for old in (cache, headwise.compress(model, ids, "keydiff", keep=0.5), read.fork(), told):
            model(random_ids(1, 5), past_key_values=old)
    assert turn.shape == (1, 44)


@pytest.mark.parametrize("chunk", [None, 17])
def test_a_prompt_length_beyond_the_prompt(model, chunk):
    """The context would never be complete, and never cut."""
    cache = RaggedCache(model, "keydiff", keep=0.5, prompt_length=1000)
    with pytest.raises(UnsupportedGeneration, match="prompt_length=1000, but 60 tokens came before single ones"):
        model.generate(random_ids(1, 60), past_key_values=cache, prefill_chunk_size=chunk, **GREEDY)


@pytest.mark.parametrize("chunk", [1, 39])
def test_a_piece_of_one_token_is_a_piece(model, chunk):
    whole = headwise.compress(model, random_ids(1, 40), "keydiff", keep=0.5)
    pieces = headwise.compress(model, random_ids(1, 40), "keydiff", keep=0.5, prefill_chunk_size=chunk)
    assert torch.equal(whole.lengths, pieces.lengths)


def test_a_cache_whose_prefill_failed_is_refused(model):
    """It used to go on from what was half-filled, and double the context."""
    cache = RaggedCache(model, "snapkv", keep=0.1)
    for _ in range(2):
        with pytest.raises((BudgetInfeasible, UnsupportedGeneration)) as caught, torch.no_grad():
            model(random_ids(1, 100), past_key_values=cache)
    assert caught.match(r"failed while reading its context \(BudgetInfeasible: .*\): make a new one")
    assert caught.type is UnsupportedGeneration


def test_a_cache_whose_forward_pass_was_interrupted_is_refused(model):
    def interrupt(*_):
        raise KeyboardInterrupt

    cache = RaggedCache(model, "keydiff", keep=0.5)
    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(random_ids(1, 40), past_key_values=cache)
    hook.remove()
    with pytest.raises(UnsupportedGeneration, match="a forward pass did not finish"), torch.no_grad():
        model(random_ids(1, 40), past_key_values=cache)


@pytest.mark.parametrize(("name", "at"), [("layer", (3, 0, 0)), ("row", (0, 1, 0)), ("head", (0, 0, 2))])
def test_positions_of_a_head_that_does_not_exist(model, name, at):
    cache = headwise.compress(model, random_ids(1, 40), "keydiff", keep=0.5)
    with pytest.raises(BadInput, match=f"{name}={max(at)} does not exist: there are {max(at)}"):
        cache.positions(*at)
    with pytest.raises(BadInput, match=f"{name}=-1 does not exist"):
        cache.positions(*(-1 if index else 0 for index in at))


def test_a_sliding_layer_cannot_take_back_what_it_has_forgotten():
    """All layers or none: full layers before a sliding one keep what they have."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = tiny_model("gemma3_text", layer_types=kinds)
    cache = headwise.compress(model, random_ids(1, 40), "keydiff", keep=0.5)
    with torch.no_grad():
        model(random_ids(1, 5), past_key_values=cache)
    with pytest.raises(UnsupportedGeneration, match="left the sliding window of 16 is gone"):
        cache.crop(-2)
    cache.crop(0)
    assert [layer.get_seq_length() for layer in cache.layers] == [45, 45, 45]
    with pytest.raises(UnsupportedGeneration, match=r"crop\(43\) .* give minus the number"):
        cache.crop(43)


def test_kvzip_repeats_in_chunks_that_stay_within_the_models_positions(model):
    """The context leaves room for 1024 - 1000 - 8 tokens; longer chunks were read at positions the model never saw."""
    reached = []
    hook = model.model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: reached.append(int(kwargs.get("position_ids", args[-1]).max())), with_kwargs=True
    )
    ids = random_ids(1, 1000)
    cache = headwise.compress(model, ids, "kvzip", keep=0.5)
    hook.remove()
    assert max(reached) == 1023
    assert cache.lengths.sum() == 3 * 2 * 500
    refuse(BadInput, "1016 tokens .* leaves no room to repeat it", model, random_ids(1, 1016), "kvzip", keep=0.5)


@pytest.mark.parametrize("ids", [[[1, 2, 3]], {"input_ids": random_ids(1, 40)}], ids=["list", "dict"])
def test_ids_that_are_no_tensor(model, ids):
    with pytest.raises(BadInput, match=rf"input_ids is a {type(ids).__name__}; .*return_tensors='pt'"):
        unwrap(headwise.compress)(model, ids, "keydiff", keep=0.5)
