"""The bundled model, served: the same tokens as `headwise.compress`, whatever the engine does to requests."""

import pytest
from serving_engine import BLOCK, COUNT, FEWER, LKV, LONG_COUNT, LUKV, MIXED, SHORT, SNAPKV, compressed_tokens
from serving_engine import mini_ruler_prompts as prompts_of


def test_mixed_prompts_at_once(served):
    """At least 50 mini-RULER prompts of 176 to 1397 tokens, in one engine at once."""
    found, prompts = served("mixed"), prompts_of(*MIXED)
    assert len(prompts) >= 50
    assert max(step["running"] for step in found["steps"]) == 16
    assert found["tokens"] == compressed_tokens(prompts, *LUKV, COUNT, BLOCK)


def test_learned_scores_and_budgets(served):
    assert served("lkv")["tokens"] == compressed_tokens(prompts_of(*FEWER), *LKV, COUNT, BLOCK)


def test_the_scheduler_a_step_ahead(served):
    """Asynchronous scheduling, vLLM's default on GPUs."""
    assert served("ahead")["tokens"] == served("lkv")["tokens"]


def test_two_ranks_each_with_its_gates(served):
    """Tiers are balanced for them; one rank with that setting keeps the same."""
    expected = compressed_tokens(prompts_of(*FEWER), *LKV, COUNT, BLOCK, ranks=2)
    assert served("ranks")["tokens"] == expected
    assert served("one for two")["tokens"] == expected
    assert served("ranks")["pool_bytes"] == served("one for two")["pool_bytes"] // 2


def test_a_window_of_queries_that_comes_in_chunks(served):
    """Chunks of 48 tokens at most, shared by all requests: the window of 32 queries is torn apart again and again."""
    found = served("chunks")
    assert max(step["tokens"] for step in found["steps"]) <= 48
    assert found["tokens"] == compressed_tokens(prompts_of(*FEWER), *SNAPKV, COUNT, BLOCK)


def test_preempted_requests_go_on_as_if_nothing_had_happened(served):
    """Their prompt and answer so far are read again; the chunk that ends the prompt holds queries of both."""
    found, prompts = served("preempted"), prompts_of(*SHORT)
    assert found["preempted"] > 0
    assert found["tokens"] == compressed_tokens(prompts, *LKV, LONG_COUNT, BLOCK)


def test_budgets_by_layer(served):
    prompts = prompts_of(*FEWER)[::3]
    assert served("pyramid")["tokens"] == compressed_tokens(prompts, "knorm+pyramid", 0.25, COUNT, BLOCK)


def test_with_everything_kept_it_is_stock_vllm(served):
    assert served("all kept")["tokens"] == served("stock")["tokens"]


@pytest.mark.parametrize("job", ["mixed", "chunks", "preempted", "aborted", "all kept"])
def test_blocks_in_use_are_what_the_formula_says_at_every_step(served, job):
    steps = served(job)["steps"]
    assert [step["used"] for step in steps] == [step["expected"] for step in steps]


@pytest.mark.parametrize("job", ["mixed", "chunks", "preempted", "aborted", "long", "ranks", "ahead"])
def test_all_blocks_come_back(served, job):
    assert served(job)["used_at_end"] == 0
    assert served(job)["leftover"] == 0


def test_500_requests_of_which_many_are_aborted(served):
    found = served("aborted")
    assert len(found["tokens"]) == 500
    assert len(found["aborted"]) > 100
    assert sum(tokens is not None for tokens in found["tokens"]) == 500 - len(found["aborted"])
    used = [step["used"] for step in found["steps"]]
    thirds = [max(used[len(used) * part // 3 : len(used) * (part + 1) // 3]) for part in range(3)]
    print(f"{len(found['aborted'])} of 500 aborted; blocks in use at most {thirds} by thirds, {used[-1]} at the end")
    assert thirds[2] <= 1.5 * thirds[0]  # no growth


def test_a_long_prompt_leaves_what_was_asked_and_rounding(served):
    """Used blocks, from vLLM's own pool, when a long prompt has been read."""
    found = served("long")
    (prompt,) = prompts_of((1700,), 1)[:1]
    groups = found["groups"]
    blocks = -(-len(prompt) // BLOCK)
    full = blocks * len(groups)
    keep = sum(g["keep"] * g["heads"] for g in groups) / sum(g["heads"] for g in groups) / 1e6
    # Every group keeps whole blocks: what it must, the part of a block before it, and the block that is being filled.
    bound = keep * full + 2 * len(groups)
    after = next(step["used"] for step in found["steps"] if step["decoding"])
    peak = max(step["used"] for step in found["steps"])
    print(
        f"prompt of {len(prompt)} tokens: {peak} blocks while it was read, {after} after it; "
        f"bound {keep:.4f} x {full} + 2 x {len(groups)} = {bound:.0f}"
    )
    assert keep == pytest.approx(0.2, abs=1e-3)
    assert peak >= full
    assert after <= bound
