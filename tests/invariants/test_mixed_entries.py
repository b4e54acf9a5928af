"""Caches whose heads store their entries in different bits (entries="auto"): bytes, kernels, files, joins, errors."""

import json
import shlex
import sys
from dataclasses import replace

import pytest
import torch
from families import padded_ids, random_ids, tiny_model
from held_memory import storages_in
from mixed_budgets import mixed_budget

import headwise
from headwise import RaggedCache, cli
from headwise.artifacts.budget import Budget
from headwise.artifacts.contents import KINDS
from headwise.cache.reading import read
from headwise.errors import BadInput, BudgetInfeasible
from headwise.kernels import KERNELS, get_kernel, usable
from headwise.kernels.quantised import ENTRIES
from headwise.kernels.segments import Segments
from headwise.methods.allocate.profiled import LUKV
from headwise.methods.method import Method
from headwise.methods.registry import SCORERS
from headwise.methods.storage import Storage
from headwise.models.plan import plan

LENGTHS = (300, 170)
ENTRY = 2 * 16 * 4  # bytes of a native one


def method(model=None, **options):
    budget = mixed_budget(model or tiny_model(), **options)
    return Method(scorer=SCORERS["keydiff"].make(), allocator=LUKV(budget=budget))


def compressed(keep="20%bytes", lengths=LENGTHS, **options):
    ids, mask = padded_ids(lengths)
    return headwise.compress(tiny_model(), ids, method(), keep=keep, attention_mask=mask, entries="auto", **options)


def following(cache, ids):
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return cache.view.model.generate(**cache.fork().inputs(ids), **options).logits[0]


@torch.no_grad()
def logits(cache):
    return following(cache, random_ids(len(cache.frozen_layers[0].rows), 5, seed=1))


def kinds_in(cache):
    """Of every layer, the bits of its storages."""
    return [[part.bits for part in layer.segments.quantised] for layer in cache.frozen_layers]


def test_names_in_files_are_those_of_the_kinds():
    assert tuple(ENTRIES) == KINDS


@pytest.mark.parametrize("keep", ["20000B", "33333B", "5%bytes", "20%bytes", "45%bytes", "80%bytes"])
def test_bytes_are_never_exceeded_and_spent_to_the_last_entry(keep):
    cache = compressed(keep, lengths=(300,))
    asked = int(keep[:-1]) if keep[-2].isdigit() else 6 * 300 * ENTRY * int(keep.partition("%")[0]) // 100
    assert cache.nbytes <= asked
    # Where every head is whole, better bits for all of a head may not fit, and fewer entries in them would be worse.
    assert asked - ENTRY - 4 * 16 < cache.nbytes or int(cache.lengths.min()) == 300
    assert cache.provenance["entries"] == "auto"


def test_rows_of_a_batch_have_their_share_of_the_bytes_and_nobody_takes_more():
    asked = 6 * sum(LENGTHS) * ENTRY // 5
    assert asked - 2 * (ENTRY + 4 * 16) < compressed().nbytes <= asked


def test_all_bytes_keep_everything_native():
    cache = compressed("100%bytes", lengths=(300,))
    assert (cache.nbytes, kinds_in(cache)) == (6 * 300 * ENTRY, [[], [], []])


def test_every_head_has_entries_of_one_kind_beside_the_first_tokens():
    """And the heads that suffer most have the most bits."""
    cache = compressed(lengths=(300,))
    bits = torch.full((3, 2), 32)
    for layer, frozen in enumerate(cache.frozen_layers):
        for part in frozen.segments.quantised:
            for head, length in enumerate(part.lengths):
                if length:
                    assert bits[layer, head] == 32
                    assert frozen.segments.lengths[head] <= 4
                    assert int(part.positions[part.slice(head)].min()) >= 4
                    bits[layer, head] = part.bits.keys + part.bits.values
    assert len({part for kinds in kinds_in(cache) for part in kinds}) > 1
    assert len(bits.unique()) > 1


def test_bytes_are_those_of_every_storage_that_is_held():
    cache = compressed()
    assert cache.nbytes + cache.index_nbytes - cache._noted.nbytes == sum(storages_in(cache.layers).values())


def dequantised(segments):
    """The same entries as float32 numbers, those of a head in the order of its storages."""
    keys, values, positions, lengths = [], [], [], []
    for segment in range(len(segments.lengths)):
        parts = [(segments.keys[segments.slice(segment)], segments.values[segments.slice(segment)])]
        parts += [part.segment(segment) for part in segments.quantised]
        keys += [part[0] for part in parts]
        values += [part[1] for part in parts]
        positions += [own.positions[own.slice(segment)] for own in (segments, *segments.quantised)]
        lengths.append(sum(len(part[0]) for part in parts))
    return Segments(
        keys=torch.cat(keys),
        values=torch.cat(values),
        positions=torch.cat(positions),
        lengths=tuple(lengths),
        kv_heads=segments.kv_heads,
    )


@pytest.mark.parametrize("name", [name for name in usable("cpu") if KERNELS[name].quantised])
@pytest.mark.parametrize("num_queries", [1, 40])
def test_kernels_read_all_kinds_at_once(name, num_queries):
    cache = compressed()
    assert max(map(len, kinds_in(cache))) >= 2
    for layer in cache.frozen_layers:
        query, tail = torch.randn(2, 2, 2, num_queries, 16), torch.randn(2, 2, 2, num_queries, 16)
        mask = torch.ones(num_queries, num_queries, dtype=torch.bool).tril().expand(2, -1, -1)
        rest = (layer.rows, *tail, mask, 0.25)
        found = get_kernel(name, quantised=True)(query, layer.segments, *rest)
        expected = get_kernel("reference")(query, dequantised(layer.segments), *rest)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_reading_is_cut_as_compress_does_it():
    ids, mask = padded_ids(LENGTHS)
    reading = read(tiny_model(), ids, [SCORERS["keydiff"].make()], attention_mask=mask)
    for keep in ("20%bytes", "31000B"):
        own, cut = compressed(keep), reading.cut(method(), keep, entries="auto")
        assert cut.kept.with_segments(own.kept.segments) == own.kept
        assert (cut.nbytes, cut.peak_nbytes) == (own.nbytes, own.peak_nbytes)
        torch.testing.assert_close(logits(cut), logits(own), rtol=1e-3, atol=1e-3)


def test_pieces_of_prefill_make_no_difference():
    whole, pieces = compressed(lengths=(300,)), compressed(lengths=(300,), prefill_chunk_size=77)
    for one, other in zip(whole.frozen_layers, pieces.frozen_layers, strict=True):
        assert one.segments.lengths == other.segments.lengths
        assert [p.lengths for p in one.segments.quantised] == [p.lengths for p in other.segments.quantised]


def test_a_file_holds_all_kinds(tmp_path, monkeypatch, capsys):
    cache, file = compressed(lengths=(300,)), tmp_path / "cache.safetensors"
    cache.save(file)
    loaded = headwise.load(file, tiny_model(), input_ids=padded_ids((300,))[0])
    assert loaded.kept == replace(cache.kept, provenance=loaded.provenance)
    assert (loaded.nbytes, kinds_in(loaded)) == (cache.nbytes, kinds_in(cache))
    assert logits(loaded).equal(logits(cache))
    monkeypatch.setattr(sys, "argv", ["headwise", "inspect", str(file)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    said = capsys.readouterr().out
    assert not caught.value.code
    used = {part for kinds in kinds_in(cache) for part in kinds}
    assert "auto: " in said
    for bits in used:
        assert f"with {bits.keys} bits a key, {bits.values} a value" in said


def test_contexts_with_other_kinds_are_joined():
    """Heads of the two have other bits, and layers other storages."""
    first, other = (compressed(keep, lengths=(300,)) for keep in ("12%bytes", "75%bytes"))
    assert kinds_in(first) != kinds_in(other)
    both = RaggedCache.join([first, other])
    assert both.nbytes == first.nbytes + other.nbytes
    ids = random_ids(1, 5, seed=1)
    expected = torch.cat([following(first, ids), following(other, ids)])
    torch.testing.assert_close(following(both, ids.repeat(2, 1)), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(BadInput, match="different bits"):
        RaggedCache.join([first, headwise.compress(tiny_model(), padded_ids((300,))[0], "keydiff", keep=0.5)])


def test_forks_share_all_kinds():
    cache = compressed()
    twin = cache.fork(copies=2)
    assert all(a.segments is b.segments for a, b in zip(cache.frozen_layers, twin.frozen_layers, strict=True))
    found = following(twin, random_ids(2, 5, seed=1).repeat_interleave(2, 0))
    torch.testing.assert_close(found[::2], logits(cache), rtol=1e-4, atol=1e-4)


def test_a_row_of_a_batch_is_as_if_it_were_alone():
    batch = compressed()
    ids, _ = padded_ids(LENGTHS)
    for row, length in enumerate(LENGTHS):
        keep = f"{6 * sum(LENGTHS) * ENTRY // 5 * length // sum(LENGTHS)}B"
        alone = headwise.compress(tiny_model(), ids[row : row + 1, -length:], method(), keep=keep, entries="auto")
        for layer in range(3):
            for head in range(2):
                assert torch.equal(batch.positions(layer, row, head), alone.positions(layer, 0, head))
        expected = following(alone, random_ids(2, 5, seed=1)[row : row + 1])
        torch.testing.assert_close(logits(batch)[row : row + 1], expected, rtol=2e-3, atol=2e-3)


def test_a_short_row_is_kept_whole_natively():
    with pytest.warns(UserWarning, match="kept whole"):
        cache = compressed("15%bytes", lengths=(300, 1))
    assert cache.lengths[:, 1].unique().tolist() == [1]


def test_protection_that_is_named_is_kept_by_every_head():
    budget = mixed_budget(tiny_model())
    named = Method(scorer=SCORERS["keydiff"].make(), allocator=LUKV(budget=budget), protect_sink=2, protect_window=20)
    ids = random_ids(1, 300)
    cache = headwise.compress(tiny_model(), ids, named, keep="15%bytes", entries="auto")
    assert cache.nbytes <= 6 * 300 * ENTRY * 15 // 100
    for layer in range(3):
        for head in range(2):
            kept = cache.positions(layer, 0, head).tolist()
            assert set(kept) >= {0, 1, *range(280, 300)}


def test_a_budget_that_knows_one_kind_chooses_between_two():
    model = tiny_model()
    cache = headwise.compress(model, random_ids(1, 300), method(kinds=("k8v4",)), keep="20%bytes", entries="auto")
    assert {bits for kinds in kinds_in(cache) for bits in kinds} == {ENTRIES["k8v4"]}


def test_generate_compresses_a_prompt():
    model, ids = tiny_model(), random_ids(1, 200)
    cache = RaggedCache(model, method(), keep="25%bytes", entries="auto")
    assert model.generate(**cache.inputs(ids), max_new_tokens=4, do_sample=False).shape == (1, 204)
    assert len({bits for kinds in kinds_in(cache) for bits in kinds}) > 1


def test_a_keep_that_counts_entries_is_refused():
    for keep in (0.15, "100tok"):
        with pytest.raises(BadInput, match="chooses entries AND bits by bytes: give keep as bytes"):
            RaggedCache(tiny_model(), method(), keep=keep, entries="auto")
    with pytest.raises(BadInput, match="chooses entries AND bits by bytes"):
        plan(tiny_model().config, context=800, keep=0.15, entries="auto")


@pytest.mark.parametrize("name", ["keydiff", "keydiff+adakv", "keydiff+global", "without"])
def test_methods_that_know_nothing_of_bits_are_refused(name):
    used = method(kinds=()) if name == "without" else name
    said = "one without" if name == "without" else f"the allocator {type(Method.parse(name).allocator).__name__}"
    with pytest.raises(BadInput, match=rf"{said}\. Make one with 'headwise profile --entries native,int8,k8v4,int4'"):
        headwise.compress(tiny_model(), random_ids(1, 50), used, keep="20%bytes", entries="auto")


def test_too_few_bytes_are_refused():
    with pytest.raises(BudgetInfeasible):
        compressed("500B", lengths=(300,))


def test_a_plan_takes_the_bytes_that_are_asked_for():
    config = tiny_model().config
    found = plan(config, context=800, keep="20%bytes", entries="auto", dtype=torch.float32)
    assert found.kv_bytes == 6 * 800 * ENTRY // 5
    assert plan(config, context=800, keep="1GiB", entries="auto", dtype=torch.float32).kv_bytes == found.full_kv_bytes


def test_a_budget_file_holds_hulls_of_every_kind_and_damage_is_found(tmp_path):
    budget, file = mixed_budget(tiny_model()), tmp_path / "budget.safetensors"
    budget.save(file)
    found = Budget.load(file)
    assert found.kinds.keys() == budget.kinds.keys()
    for kind, hull in budget.kinds.items():
        assert all(found.kinds[kind][name].equal(tensor) for name, tensor in hull.items())
    assert LUKV(budget=found).provenance() == LUKV(budget=budget).provenance()
    assert LUKV(budget=found).provenance() != LUKV(budget=mixed_budget(tiny_model(), kinds=())).provenance()
    spoilt = {**budget.kinds["int4"], "slope": budget.kinds["int4"]["slope"].flip(-1)}
    with pytest.raises(BadInput, match="slopes must not increase"):
        Budget(**{n: getattr(budget, n) for n in ("ratios", "fractions", "origin", "hull")}, kinds={"int4": spoilt})
    with pytest.raises(BadInput, match="needs those of native entries"):
        Budget(**{n: getattr(budget, n) for n in ("ratios", "fractions", "origin")}, kinds=budget.kinds)


def test_the_price_of_a_choice_is_what_its_head_takes():
    cache = compressed("20%bytes", lengths=(300,))
    for layer in cache.frozen_layers:
        bits = {head: part.bits for part in layer.segments.quantised for head in range(2) if part.lengths[head]}
        prices = [
            int(Storage(head_dim=16, itemsize=4, bits=bits.get(head)).nbytes(torch.tensor(kept)))
            for head, kept in enumerate(layer.segments.kept)
        ]
        assert layer.segments.nbytes == sum(prices)


@pytest.mark.parametrize("command", ["compare", "generate", "eval"])
def test_commands_take_it(command, tmp_path, model_folders, monkeypatch, capsys):
    from headwise.models import loading

    folder = str(model_folders["qwen3"])
    model, _ = loading.load(folder, device="cpu")
    mixed_budget(model).save(tmp_path / "b.safetensors")
    used = f"keydiff+lukv@{tmp_path / 'b.safetensors'}"
    (tmp_path / "text.txt").write_text("locker apple red stone. the key was under the old tower, near a river. " * 4)
    document = f"--context {tmp_path / 'text.txt'} --question '? locker apple' --max-new-tokens 2"
    line = {
        "compare": f"compare --methods {used} --keep 30%bytes --entries int4,auto {document}",
        "generate": f"generate --method {used} --keep 30%bytes --entries auto --context {tmp_path / 'text.txt'} "
        "--max-new-tokens 2 --question '? locker apple'",
        "eval": f"eval --methods {used} --keep 30%bytes --entries auto --tasks perplexity:{tmp_path / 'text.txt'} "
        "--samples 1 --length 60",
    }[command]
    monkeypatch.setattr(sys, "argv", ["headwise", *shlex.split(line), "--model", folder, "--json"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    assert not caught.value.code, err
    found = json.loads(out)
    rows = found if isinstance(found, list) else [found]
    assert "auto" in [row["entries"] for row in rows]
