"""One document, several methods: bytes that storage has, answers against the full cache's."""

import weakref
from dataclasses import asdict

import pytest
import torch
from families import tiny_model
from folders import CHAT_TEMPLATE, word_tokenizer

import headwise
from headwise.artifacts.budget import Budget
from headwise.artifacts.origin import Origin
from headwise.cache.reading import read
from headwise.errors import ArtifactMismatch, BadInput, BudgetInfeasible
from headwise.evals.answers import FullMemory
from headwise.evals.compare import compare
from headwise.shapes import ModelShape
from headwise.tasks.document import Asked, instructed, tokenize
from headwise.tasks.task import PROTOCOLS

CONTEXT = "locker apple copper lantern. the bold fox guarded the silver bridge. " * 10
ASKED = [Asked(question="? locker apple"), Asked(question="? lockers apple badge:")]
METHODS = ["full", "streaming", "keydiff+adakv", "expected+global"]


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def model(request):
    return tiny_model(request.param, vocab_size=len(word_tokenizer()))


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", vocab_size=len(word_tokenizer()))


def compared(model, asked=ASKED, methods=METHODS, tokenizer=None, **changes):
    options = {"keep": 0.25, "max_new_tokens": 4, **changes}
    return compare(model, tokenizer or word_tokenizer(), CONTEXT, asked, methods=methods, **options)


def test_bytes_are_those_of_the_stored_tensors(model):
    num_tokens = tokenize(word_tokenizer(), CONTEXT, ["?"]).context.shape[1]
    rows = {row.method: row for row in compared(model)}
    config = model.config
    sliding = (getattr(config, "layer_types", None) or []).count("sliding_attention")
    per_token = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    bounded = sliding * min(num_tokens, (getattr(config, "sliding_window", None) or 1) - 1) * per_token
    full = (config.num_hidden_layers - sliding) * num_tokens * per_token
    assert rows["full"].kv_bytes == full + bounded
    assert {row.sliding_kv_bytes for row in rows.values()} == {bounded}
    for method in METHODS[1:]:
        row = rows[method]
        assert row.full_kv_bytes == rows["full"].kv_bytes
        assert row.kv_bytes == pytest.approx(bounded + full / 4, abs=per_token)
        assert row.kv_bytes < row.peak_kv_bytes
    assert rows["streaming"].peak_kv_bytes < full + bounded < rows["expected+global"].peak_kv_bytes


def test_without_known_answers_accuracy_is_agreement_with_the_full_cache(llama):
    full, whole, starved = compared(llama, methods=["full", "snapkv", "random"], keep=1.0)
    assert full.accuracy == 1.0
    assert whole.accuracy == 1.0
    assert (full.answers, starved.keep) == (whole.answers, 1.0)
    assert compared(llama, methods=["streaming"], keep="4tok", max_new_tokens=16)[0].accuracy < 1.0


def test_known_answers_count(llama):
    said = compared(llama, methods=["full"])[0].answers
    asked = [
        Asked(question=ASKED[0].question, answers=(said[0],)),
        Asked(question=ASKED[1].question, answers=("no such words", said[1])),
    ]
    assert compared(llama, asked, methods=["full"])[0].accuracy == 0.75


def test_a_row_per_method_in_the_order_asked(llama):
    rows = compared(llama, methods=["snapkv", "streaming", "full", "snapkv"])
    assert [row.method for row in rows] == ["snapkv", "streaming", "full"]
    assert [row.keep for row in rows] == [0.25, 0.25, 1.0]
    assert compared(llama, methods=["snapkv"], keep="64tok")[0].keep == "64tok"
    assert all(row.decode_ms_per_token > 0 for row in rows)


def test_entries_are_rows_of_their_own_with_the_bytes_of_a_cache(llama):
    names = ["native", "int8", "k8v4", "int4"]
    rows = compared(llama, methods=["full", "keydiff"], entries=names)
    assert [(row.method, row.entries) for row in rows] == [("full", "native"), *(("keydiff", name) for name in names)]
    context = tokenize(word_tokenizer(), CONTEXT, ["?"]).context
    for row in rows[1:]:
        cache = headwise.compress(llama, context, "keydiff", keep=0.25, entries=row.entries)
        assert (row.kv_bytes, row.peak_kv_bytes) == (cache.nbytes, cache.peak_nbytes)
    assert len({row.kl for row in rows[1:]}) == 4
    (alone,) = compared(llama, methods=["keydiff"], entries="int4")
    assert (alone.answers, alone.kv_bytes) == (rows[-1].answers, rows[-1].kv_bytes)
    assert alone.kl == pytest.approx(rows[-1].kl, abs=1e-5)


def test_what_bytes_can_hold_depends_on_the_entries(llama):
    """Of 32 tokens that every head must keep: too few bytes for native ones, enough for others."""
    (row,) = compared(llama, methods=["snapkv"], keep="15KiB", entries="int4")
    assert 12 * 1024 < row.kv_bytes <= 15 * 1024
    with pytest.raises(BudgetInfeasible, match="snapkv cannot work with keep=15360B: "):
        compared(llama, methods=["snapkv"], keep="15KiB", entries=["int4", "native"])


@pytest.mark.parametrize("entries", ["int3", ["native", "int3"], []])
def test_unknown_entries_are_refused_before_anything_is_read(llama, monkeypatch, entries):
    monkeypatch.setattr("headwise.evals.compare.Session", lambda **options: pytest.fail("it reads"))
    with pytest.raises(BadInput, match="choose native, int8, k8v4, int4" if entries else "no entries are given"):
        compared(llama, entries=entries)


def test_the_full_cache_is_measured_even_if_nobody_asks(llama):
    (row,) = compared(llama, methods=["streaming"])
    assert row.full_kv_bytes == compared(llama, methods=["full"])[0].kv_bytes


def test_a_chat_template_is_applied(llama):
    plain, chat = (
        compared(llama, methods=["full"], tokenizer=word_tokenizer(template))[0] for template in (None, CHAT_TEMPLATE)
    )
    per_token = 2 * 3 * 2 * 16 * 4
    assert chat.kv_bytes == plain.kv_bytes + 3 * per_token  # "[", "user" and "]"; the template writes <bos> itself


def test_reading_in_pieces_keeps_the_same(llama):
    whole, pieces = (compared(llama, prefill_chunk_size=size) for size in (None, 17))
    for a, b in zip(whole, pieces, strict=True):
        assert (a.answers, a.kv_bytes) == (b.answers, b.kv_bytes)


def test_rows_are_json_ready_and_progress_reaches_its_end(llama):
    steps = []
    rows = compared(llama, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(0, 4), (1, 4), (4, 4)]
    assert set(asdict(rows[0])) == {
        "method",
        "keep",
        "entries",
        "protocol",
        "kv_bytes",
        "full_kv_bytes",
        "peak_kv_bytes",
        "sliding_kv_bytes",
        "accuracy",
        "kl",
        "agreement",
        "prefill_seconds",
        "prefill_shared_by",
        "decode_ms_per_token",
        "answers",
    }


def test_the_full_cache_is_let_go_before_the_document_is_read_again(llama, monkeypatch):
    alive: list[weakref.ref] = []

    class Watched(FullMemory):
        def __init__(self, *args):
            super().__init__(*args)
            alive.append(weakref.ref(self))

    def watched(*args, **kwargs):
        assert all(ref() is None for ref in alive)
        return read(*args, **kwargs)

    monkeypatch.setattr("headwise.evals.session.FullMemory", Watched)
    monkeypatch.setattr("headwise.evals.session.read", watched)
    compared(llama)
    assert len(alive) == 1


def test_one_reading_serves_every_method_and_keep_that_can_share_it(llama):
    rows = compared(llama, methods=["full", "keydiff", "snapkv+adakv", "kvzip", "kvzip-l2"], keep=[0.6, "45tok"])
    assert [(row.method, row.keep) for row in rows] == [
        ("full", 1.0),
        *((method, keep) for method in ("keydiff", "snapkv+adakv", "kvzip", "kvzip-l2") for keep in (0.6, "45tok")),
    ]
    assert [row.prefill_shared_by for row in rows] == [1, 4, 4, 4, 4, 4, 4, 4, 4]
    assert len({row.prefill_seconds for row in rows}) == 3
    assert all(row.prefill_seconds > 0 for row in rows)


@pytest.mark.parametrize("size", [None, 17])
def test_the_peak_is_what_compress_holds(model, size):
    tokens = tokenize(word_tokenizer(), CONTEXT, [a.question for a in ASKED])
    for row in compared(model, methods=METHODS[1:], prefill_chunk_size=size):
        cache = headwise.compress(model, tokens.context, row.method, keep=0.25, prefill_chunk_size=size)
        assert (row.kv_bytes, row.peak_kv_bytes) == (cache.nbytes, cache.peak_nbytes)


def test_nearness_to_the_full_cache(llama):
    full, near, far = compared(llama, methods=["full", "streaming"], keep=[1.0, "4tok"], max_new_tokens=16)
    assert (full.agreement, near.agreement) == (1.0, 1.0)
    assert full.kl == pytest.approx(0, abs=1e-5)
    assert near.kl == pytest.approx(0, abs=1e-5)
    assert far.kl > 1e-4
    assert far.agreement < 1


def test_questions_without_known_answers_do_not_count_as_wrong(llama):
    asked = [Asked(question=ASKED[0].question, answers=("no such words",)), ASKED[1]]
    assert compared(llama, asked, methods=["full"])[0].accuracy == 0


def test_query_aware_the_question_is_compressed_with_the_document(llama):
    agnostic, aware = (compared(llama, methods=["snapkv"], keep=0.6, protocol=protocol)[0] for protocol in PROTOCOLS)
    assert (agnostic.protocol, aware.protocol) == PROTOCOLS
    assert agnostic.full_kv_bytes < aware.full_kv_bytes
    assert len(aware.answers) == 2
    assert (
        compared(llama, methods=["full"], protocol=PROTOCOLS[1])[0].answers
        == compared(llama, methods=["full"])[0].answers
    )


def test_kvzip_repeats_after_its_instruction(llama, monkeypatch):
    """In this tokenizer's words; a tokenizer without them gives none."""
    told: list[tuple[int, ...]] = []

    def watched(model, ids, scorers, **options):
        told.extend(scorer.instruction for scorer in scorers)
        return read(model, ids, scorers, **options)

    monkeypatch.setattr("headwise.evals.session.read", watched)
    words = ["the", "bold", "fox", "guarded", "the", "silver", "bridge"]
    monkeypatch.setattr("headwise.methods.scores.reconstruct.INSTRUCTION", " ".join(words))
    for template in (None, CHAT_TEMPLATE):
        compared(llama, methods=["kvzip"], tokenizer=word_tokenizer(template))
    plain, chat = told
    assert word_tokenizer().decode(plain).split() == words
    assert chat[: len(plain)] == plain
    assert word_tokenizer().decode(chat[len(plain) :]).split() == ["<eos>", "[", "assistant", "]"]
    monkeypatch.undo()
    assert instructed("kvzip", word_tokenizer()).scorer.instruction == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": []}, "no method is named"),
        ({"methods": ["full", "nope"]}, "there is no scorer 'nope'"),
        ({"asked": []}, "no question"),
        ({"asked": [Asked(question=" ")]}, "empty"),
        ({"keep": 0.0}, "outside"),
        ({"keep": "some"}, "not understood"),
        ({"keep": []}, "no keep is given"),
        ({"protocol": "aware"}, "choose query-agnostic or query-aware"),
    ],
)
def test_what_cannot_be_compared(llama, monkeypatch, changes, message):
    monkeypatch.setattr("headwise.evals.session.FullMemory", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(BadInput, match=message):
        compared(llama, **changes)


def test_a_document_beyond_the_model_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("headwise.evals.session.FullMemory", lambda *a, **k: pytest.fail("work was done"))
    small = tiny_model("llama", vocab_size=len(word_tokenizer()), max_position_embeddings=64)
    with pytest.raises(BadInput, match="made for 64"):
        compared(small)


MADE_FOR_ANOTHER = ModelShape(num_layers=9, layers=tuple(range(9)), kv_heads=2, query_heads=4, head_dim=16)


def test_a_method_that_cannot_run_is_refused_before_the_others_have_run(model, monkeypatch, tmp_path):
    """Once all results of the others were lost when the last method turned out to be impossible."""
    monkeypatch.setattr("headwise.evals.session.FullMemory", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(BudgetInfeasible, match=r"snapkv cannot work with keep=0\.1: .*The smallest keep that works"):
        compared(model, methods=["full", "streaming", "snapkv"], keep=0.1)
    with pytest.raises(BudgetInfeasible, match="streaming cannot work with keep=10B"):
        compared(model, methods=["streaming"], keep="10B")
    origin = Origin(shape=MADE_FOR_ANOTHER, model="a/b")
    budget = Budget(ratios=torch.tensor([0.5]), fractions=torch.full((1, 9, 2), 0.5), origin=origin)
    budget.save(tmp_path / "budget.safetensors")
    with pytest.raises(ArtifactMismatch):
        compared(model, methods=["full", f"keydiff+fixed@{tmp_path}/budget.safetensors"])


def test_too_small_a_keep_says_what_would_work(llama):
    with pytest.raises(BudgetInfeasible, match="The smallest keep that works is"):
        compared(llama, methods=["snapkv"], keep=0.01)
