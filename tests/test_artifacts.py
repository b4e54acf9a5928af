"""Artifact files: save and load, what is refused and how it is named, kvpress' and DuoAttention's tables."""

import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_configs import QWEN_CODER, SMOLLM2, from_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig

from headwise.artifacts import tensors as artifacts
from headwise.artifacts.budget import Budget
from headwise.artifacts.origin import Origin, config_hash
from headwise.artifacts.profile import Profile
from headwise.artifacts.tensors import describe, fingerprint, read_tensors, write_tensors
from headwise.errors import ArtifactMismatch, BadInput, ShapeMismatch
from headwise.interfaces import Demand
from headwise.methods.allocate.fixed import Fixed
from headwise.models.loading import reference_path
from headwise.shapes import ModelShape

CASES = settings(max_examples=50, deadline=None, derandomize=True)
SHAPE = ModelShape(num_layers=3, layers=(0, 2), kv_heads=2, query_heads=4, head_dim=8)
WHOLE_SHAPE = replace(SHAPE, layers=(0, 1, 2))
DUO_TABLES = Path(__file__).parents[2] / "shared" / "data" / "duo_attention_patterns.tar.xz"


def hull():
    """Of the four heads: two steps each, the last of them one."""
    width = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.1, 0.9], [1.0, 0.0]])
    slope = torch.tensor([[3.0, 1.0], [2.0, 2.0], [0.5, -0.5], [1.0, 0.0]], dtype=torch.float64)
    return {"protected": torch.empty(4, 0), "width": width, "slope": slope}


def budget(hull=None):
    fractions = torch.linspace(0, 1, 12).reshape(3, 2, 2)
    origin = Origin(
        shape=SHAPE,
        model="org/model",
        config_hash="abc",
        scorer="expected",
        scorer_parameters={"epsilon": 0.02, "sink": 4},
        calibration="def",
    )
    return Budget(ratios=torch.tensor([0.1, 0.3, 0.5]), fractions=fractions, origin=origin, hull=hull or {})


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "budget.safetensors"
    budget().save(path)
    return path


def test_save_and_load_give_back_every_bit(tmp_path):
    original = budget(hull=hull())
    original.save(tmp_path / "b.safetensors")
    loaded = Budget.load(tmp_path / "b.safetensors")
    assert loaded.origin == original.origin
    assert loaded.ratios.equal(original.ratios)
    assert loaded.fractions.equal(original.fractions)
    assert loaded.hull.keys() == original.hull.keys()
    for name, tensor in original.hull.items():
        assert loaded.hull[name].equal(tensor)
        assert loaded.hull[name].dtype == tensor.dtype


def test_saving_replaces_the_old_file_and_leaves_nothing_else(saved):
    replace(budget(), ratios=torch.tensor([0.2, 0.4, 0.6])).save(saved)
    assert Budget.load(saved).ratios[0] == torch.tensor(0.2)
    assert list(saved.parent.iterdir()) == [saved]


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    before = saved.read_bytes()
    monkeypatch.setattr(artifacts, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        budget().save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_files_are_as_readable_as_any_new_file(saved):
    """safetensors makes its files private (0600), which a colleague or a server cannot read."""
    (saved.parent / "plain").touch()
    assert saved.stat().st_mode == (saved.parent / "plain").stat().st_mode


def test_describe_tells_kind_versions_metadata_and_sizes(saved):
    description = describe(saved)
    assert description["kind"] == "budget"
    assert description["format_version"] == 2
    assert description["origin"]["model"] == "org/model"
    assert description["tensors"]["fractions"] == {"dtype": "F32", "shape": [3, 2, 2]}
    json.dumps(description)


def test_other_kinds_are_stored_alike(tmp_path):
    tensors = {"keys": torch.rand(4, 2).T, "lengths": torch.tensor([1, 3]), "none": torch.empty(0)}
    write_tensors(tmp_path / "c", "cache", tensors, {"tokens": [3, 4]})
    found, metadata = read_tensors(tmp_path / "c", "cache")
    assert metadata == {"tokens": [3, 4]}
    assert all(found[name].equal(tensor) for name, tensor in tensors.items())


def test_writing_into_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(BadInput, match="nowhere does not exist"):
        budget().save(tmp_path / "nowhere" / "b.safetensors")


def test_a_missing_file_is_named(tmp_path):
    for read in (Budget.load, describe):
        with pytest.raises(BadInput, match="absent is not a file"):
            read(tmp_path / "absent")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_damaged_file_is_named(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(BadInput, match=r"budget\.safetensors is damaged"):
        Budget.load(saved)


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        (None, ArtifactMismatch, "headwise did not write it"),
        ("{", BadInput, "metadata is damaged"),
        ("3", BadInput, "metadata is damaged"),
        ('{"kind": "gates", "format_version": 1}', ArtifactMismatch, "is a gates of format 1, expected a budget of"),
        ('{"kind": "budget", "format_version": 7}', ArtifactMismatch, "format 7, expected a budget of format 2"),
        ('{"kind": "budget", "format_version": 2}', BadInput, "metadata is incomplete"),
        ('{"kind": "budget", "format_version": 2, "origin": {"shape": {"layers": [0]}}}', BadInput, "incomplete"),
    ],
)
def test_foreign_metadata_is_refused(tmp_path, record, error, message):
    path = tmp_path / "f"
    tensors = {"ratios": torch.rand(1), "fractions": torch.rand(1, 2, 2)}
    save_file(tensors, path, None if record is None else {"headwise": record})
    with pytest.raises(error, match=message):
        Budget.load(path)


def test_a_budget_without_its_table_is_refused(tmp_path):
    write_tensors(tmp_path / "b", "budget", {"ratios": torch.rand(1)}, {})
    with pytest.raises(BadInput, match=r"\['ratios'\] but no ratios and fractions"):
        Budget.load(tmp_path / "b")


def test_senseless_tables_are_refused():
    good = budget()
    with pytest.raises(ShapeMismatch, match=r"\(3, 2, 1\).*need \(3, 2, 2\)"):
        replace(good, fractions=good.fractions[..., :1])
    for wrong in (good.fractions + 0.1, good.fractions - 0.1, good.fractions * torch.nan):
        with pytest.raises(BadInput, match=r"\[0, 1\]"):
            replace(good, fractions=wrong)
    for ratios in ([0.0, 0.1, 0.2], [0.5, 0.6, 1.0], [0.2, 0.2, 0.3], [0.3, 0.2, 0.4]):
        with pytest.raises(BadInput, match="ascend"):
            replace(good, ratios=torch.tensor(ratios))


def test_interpolation_meets_the_rows_and_the_ends():
    table = budget()
    found = table.at(torch.tensor([0.0, 0.1, 0.2, 0.5, 0.75, 1.0]))
    assert found[0].eq(0).all()
    assert found[5].eq(1).all()
    assert found[1].equal(table.fractions[0])
    assert found[3].equal(table.fractions[2])
    torch.testing.assert_close(found[2], (table.fractions[0] + table.fractions[1]) / 2)
    torch.testing.assert_close(found[4], (table.fractions[2] + 1) / 2)


@pytest.mark.parametrize("shape", [SHAPE, WHOLE_SHAPE], ids=["some layers", "all layers"])
def test_kvpress_tables_make_the_round_trip(tmp_path, shape):
    removed = np.random.default_rng(0).random((99, 3, 2))
    removed[:, sorted({0, 1, 2} - set(shape.layers))] = 0
    np.save(tmp_path / "in.npy", removed)
    table = Budget.from_kvpress(tmp_path / "in.npy", shape=shape, model="m", scorer="expected")
    table.save(tmp_path / "b.safetensors")
    Budget.load(tmp_path / "b.safetensors").to_kvpress(tmp_path / "out.npy")
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), removed, atol=1e-15)
    assert table.origin.calibration == fingerprint((tmp_path / "in.npy").read_bytes())


def test_kvpress_rows_are_removed_fractions_in_percents_removed(tmp_path):
    removed = np.zeros((99, 3, 2))
    removed[79, 2, 1] = 0.95  # at 80% removed, head (2, 1) loses 95%
    np.save(tmp_path / "t.npy", removed)
    table = Budget.from_kvpress(tmp_path / "t.npy", shape=SHAPE)
    row = table.ratios.tolist().index(0.2)
    assert table.fractions[row, 1, 1].item() == pytest.approx(0.05)


def test_other_grids_are_interpolated_for_kvpress(tmp_path):
    budget().to_kvpress(tmp_path / "t.npy")
    again = Budget.from_kvpress(tmp_path / "t.npy", shape=SHAPE)
    torch.testing.assert_close(again.at(torch.tensor([0.1, 0.3, 0.5])).float(), budget().fractions)


def test_kvpress_tables_of_other_models_and_other_files_are_refused(tmp_path):
    np.save(tmp_path / "t.npy", np.zeros((99, 32, 8)))
    with pytest.raises(ArtifactMismatch, match=r"\(99, 32, 8\); this model needs \(99, 3, 2\)"):
        Budget.from_kvpress(tmp_path / "t.npy", shape=SHAPE)
    np.save(tmp_path / "pickle.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "text.npy").write_text("nothing")
    for name in ("pickle.npy", "text.npy", "absent.npy"):
        with pytest.raises(BadInput, match=name):
            Budget.from_kvpress(tmp_path / name, shape=SHAPE)


def duo_table(tmp_path, rows):
    path = tmp_path / "full_attention_heads.tsv"
    path.write_text("\n".join("\t".join(f"{alpha:.6e}" for alpha in row) for row in rows))
    return path


def whole_heads(table, ratio, *, tokens=1000, sink=10, recent=20):
    """Counts [L * H] for a demand that leaves room for `ratio` of the heads kept whole."""
    heads, floor = table.origin.shape.num_heads, sink + recent
    total = round(ratio * heads) * (tokens - floor) + heads * floor
    demand = Demand(shape=table.origin.shape, tokens=(tokens,), totals=(total,), floors=(floor,), protected=(0,))
    return Fixed(budget=table).counts(demand)[:, 0].flatten().tolist()


def test_duo_heads_are_whole_or_streaming_by_alpha(tmp_path):
    path = duo_table(tmp_path, [[0.9, -0.001], [0.5, 0.6], [1.0, 0.2]])
    table = Budget.from_duo_attention(path, shape=WHOLE_SHAPE, model="m", sink=10, recent=20)
    assert table.origin.scorer == "streaming"
    assert (table.origin.sink, table.origin.window) == (10, 20)
    assert whole_heads(table, 0.5) == [1000, 30, 30, 1000, 1000, 30]
    assert whole_heads(table, 1 / 6) == [30, 30, 30, 30, 1000, 30]
    assert whole_heads(table, 0.0) == [30] * 6


def test_duo_fills_one_more_head_in_part_when_the_total_asks_for_it(tmp_path):
    shape = replace(SHAPE, num_layers=2, layers=(0, 1))
    table = Budget.from_duo_attention(duo_table(tmp_path, [[0.9, 0.1], [0.5, 0.6]]), shape=shape)
    demand = Demand(shape=shape, tokens=(1000,), totals=(1500,), floors=(30,), protected=(0,))
    assert Fixed(budget=table).counts(demand)[:, 0].flatten().tolist() == [1000, 30, 30, 440]


def test_duo_ties_and_clipped_alphas_go_by_layer_and_head(tmp_path):
    path = duo_table(tmp_path, [[1.0, 1.2], [-0.5, 1.0], [-0.1, 0.0]])
    table = Budget.from_duo_attention(path, shape=WHOLE_SHAPE)
    order = table.fractions.flatten(1).sum(0).argsort(descending=True, stable=True)
    assert order.tolist() == [0, 1, 3, 2, 4, 5]


def test_duo_takes_the_compressible_layers_only(tmp_path):
    path = duo_table(tmp_path, [[0.1, 0.2], [1.0, 1.0], [0.3, 0.4]])
    assert whole_heads(Budget.from_duo_attention(path, shape=SHAPE), 0.5) == [30, 30, 1000, 1000]


def test_duo_tables_of_other_models_and_other_files_are_refused(tmp_path):
    with pytest.raises(ArtifactMismatch, match=r"\(2, 2\); this model needs \(3, 2\)"):
        Budget.from_duo_attention(duo_table(tmp_path, [[1, 0], [0, 1]]), shape=SHAPE)
    (tmp_path / "bad.tsv").write_text("a\tb\n")
    for name in ("bad.tsv", "absent.tsv"):
        with pytest.raises(BadInput, match=name):
            Budget.from_duo_attention(tmp_path / name, shape=SHAPE)


@pytest.mark.skipif(not DUO_TABLES.exists(), reason=f"DuoAttention's published tables are not at {DUO_TABLES}")
def test_duo_published_tables(tmp_path):
    with tarfile.open(DUO_TABLES) as archive:
        # Python 3.11 has the filter from 3.11.4 on; these are the project's own files.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    tables = sorted(tmp_path.rglob("full_attention_heads.tsv"))
    assert len(tables) == 6
    for path in tables:
        heads = 32 if "Llama-2-7B" in str(path) else 8
        shape = ModelShape(num_layers=32, layers=tuple(range(32)), kv_heads=heads, query_heads=32, head_dim=128)
        table = Budget.from_duo_attention(path, shape=shape)
        counts = whole_heads(table, 0.5, sink=128, recent=256)
        assert sorted(counts) == [384] * (16 * heads) + [1000] * (16 * heads)
        alphas = np.loadtxt(path).clip(0, 1).flatten()
        whole = np.array(counts) == 1000
        assert alphas[whole].min() >= alphas[~whole].max()


PARTS = (torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16), torch.tensor([True, False]), b"bytes", "text")


@pytest.mark.process
def test_fingerprints_are_the_same_in_another_process():
    code = (
        "import torch; from headwise.artifacts.tensors import fingerprint; "
        "print(fingerprint(torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16), "
        "torch.tensor([True, False]), b'bytes', 'text'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == fingerprint(*PARTS)


def test_fingerprints_see_values_sizes_types_and_order():
    one = torch.arange(4)
    variants = [
        (one,),
        (one + 1,),
        (one.reshape(2, 2),),
        (one.float(),),
        (one, one),
        (b"ab", b"c"),
        (b"a", b"bc"),
        (b"bc", b"a"),
        ("bc", "a"),
        (),
        (torch.empty(0),),
    ]
    assert len({fingerprint(*parts) for parts in variants}) == len(variants)
    assert fingerprint(one.reshape(2, 2).T.T) == fingerprint(one.reshape(2, 2))
    assert fingerprint(torch.arange(8)[::2]) == fingerprint(torch.arange(0, 8, 2))


BASE = {"model_type": "llama", "hidden_size": 64, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}


@CASES
@given(st.dictionaries(st.text().map("x_{}".format), st.none() | st.integers() | st.text() | st.lists(st.integers())))
def test_config_hash_ignores_order_and_what_is_not_architecture(others):
    config = {**others, **BASE}
    backwards = dict(reversed(list(config.items())))
    loaded = {**backwards, "_name_or_path": "elsewhere", "dtype": "bfloat16", "transformers_version": "9.9"}
    served = {"pad_token_id": 7, "use_cache": False, "architectures": ["X"], "quantization_config": {"bits": 4}}
    assert config_hash({**loaded, **served, "head_dim": None}) == config_hash(BASE)


@pytest.mark.parametrize(
    "other",
    [
        {"hidden_size": 128},
        {"model_type": "qwen3"},
        {"layer_types": ["full_attention"]},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"attention_bias": True},
    ],
)
def test_config_hash_sees_the_architecture(other):
    assert config_hash(BASE) != config_hash({**BASE, **other})
    private = {**BASE, "rope_parameters": {**BASE["rope_parameters"], "_cached": 1}}
    assert config_hash(BASE) == config_hash(private)


@pytest.mark.parametrize("hub", [SMOLLM2, QWEN_CODER], ids=["smollm2", "qwen-coder"])
def test_config_hash_is_of_the_architecture_however_the_model_was_loaded(hub, tmp_path):
    kind = type(AutoConfig.for_model(hub["model_type"]))
    made = kind.from_dict(from_gguf(hub))
    assert made.rms_norm_eps != hub["rms_norm_eps"]
    assert config_hash(made.to_dict()) == config_hash(kind.from_dict(hub).to_dict())
    made.save_pretrained(tmp_path)
    assert config_hash(AutoConfig.from_pretrained(tmp_path).to_dict()) == config_hash(made.to_dict())
    bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    quantised = kind.from_dict({**hub, "quantization_config": bits, "torch_dtype": "float16", "pad_token_id": 9})
    assert config_hash(quantised.to_dict()) == config_hash(made.to_dict())


def test_config_hash_sees_no_noise_of_float32_in_what_is_nested():
    def rope(number):
        nested = {"full_attention": {"rope_theta": number(1e6), "rope_type": "longrope", "factor": number(1.3)}}
        return {**BASE, "rope_parameters": {**nested, "long_factor": [number(1.08), number(32)]}}

    assert config_hash(rope(float)) == config_hash(rope(lambda x: float(np.float32(x))))
    assert config_hash(rope(float)) == config_hash(rope(lambda x: int(x) if x == int(x) else x))
    assert config_hash(rope(float)) != config_hash(rope(lambda x: 1.0001 * x))


def test_config_hash_of_a_clean_configuration_stays_what_it_was():
    """Caches that users have saved, and files that are shipped, name it."""
    config = AutoConfig.from_pretrained(reference_path()).to_dict()
    assert config_hash(config) == "1be077c41a6e05f8c0ff6089c5644da4eaf2d803e0565d1d0c6e1ca2d81a1902"
    found = [describe(path)["origin"]["config_hash"] for path in reference_path().glob("*/*.safetensors")]
    assert found == [config_hash(config)] * 4


def damaged(**changes):
    """Hulls with some tensors changed."""
    return {**hull(), **changes}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"width": hull()["width"]}, "lacks 'hull.protected'"),
        (damaged(more=torch.ones(4)), "unknown tensor 'hull.more'"),
        (damaged(width=torch.ones(4, 3) / 3), r"'hull.slope' has shape \(4, 2\), but .* need \(4, 3\)"),
        (damaged(width=hull()["width"][:3]), "'hull.width' has shape .* need"),
        (damaged(protected=torch.zeros(4, 1)), r"'hull.protected' has shape \(4, 1\), .* need \(4, 0\)"),
        (damaged(width=hull()["width"] * 0.9), "widths must sum to 1 in every head; found sums from 0.9 to 0.9"),
        (
            damaged(width=hull()["width"] * torch.tensor([[-1.0], [1], [1], [1]])),
            "'hull.width' holds numbers from -0.75",
        ),
        (damaged(slope=hull()["slope"].flip(-1)), "slopes must not increase"),
        (damaged(slope=hull()["slope"] * torch.nan), "'hull.slope' holds numbers from nan"),
        (damaged(slope=hull()["slope"] * torch.inf), "'hull.slope' holds numbers from"),
        (damaged(slope=hull()["slope"].long()), "'hull.slope' is of dtype I64; expected F64 or"),
        (damaged(width=hull()["width"].flip(-1)), "unused steps must come last"),
    ],
)
def test_hulls_that_solve_nothing_are_refused(saved, parts, words):
    """Made in a program or read from a file."""
    with pytest.raises(BadInput, match=words):
        budget(hull=parts)
    tensors = {"ratios": budget().ratios, "fractions": budget().fractions}
    tensors |= {f"hull.{name}": tensor.contiguous() for name, tensor in parts.items()}
    write_tensors(saved, "budget", tensors, {"origin": describe(saved)["origin"]})
    with pytest.raises(BadInput, match=rf"budget\.safetensors.*{words}"):
        Budget.load(saved)


@pytest.mark.parametrize("name", ["curve", "scorer", "ideal"])
def test_curves_are_finite(name):
    curves = {one: torch.ones(2, 2, 5) for one in ("curve", "scorer", "ideal")}
    assert replace(budget(), evidence=curves).evidence == curves
    curves[name][1, 1, 4] = torch.inf
    with pytest.raises(BadInput, match=f"'evidence.{name}' holds numbers from 1 to inf"):
        replace(budget(), evidence=curves)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sink", -1),
        ("sink", 2**40),
        ("window", 1.5),
        ("model", 3),
        ("scorer_parameters", []),
        ("shape", {}),
        ("more", 1),
    ],
)
def test_an_altered_origin_is_named(saved, field, value):
    tensors, metadata = read_tensors(saved, "budget")
    write_tensors(saved, "budget", tensors, {"origin": {**metadata["origin"], field: value}})
    with pytest.raises(BadInput, match=rf"budget\.safetensors: the metadata is incomplete: the origin .*'{field}'"):
        Budget.load(saved)


def test_another_kind_is_named_and_how_to_get_the_right_one(saved):
    """Versions are told where they differ only."""
    with pytest.raises(ArtifactMismatch) as caught:
        Profile.load(saved)
    told = "is a budget of format 2, expected a profile of format 2. Give a profile: 'headwise profile' makes one."
    assert str(caught.value) == f"{saved} {told}"
    for version, told in ((artifacts._library_version(), ""), ("0.0.1", " It was written by headwise 0.0.1, this is ")):
        record = {"kind": "budget", "format_version": 1, "library_version": version}
        save_file({"x": torch.ones(1)}, saved, {"headwise": json.dumps(record)})
        with pytest.raises(ArtifactMismatch, match="expected a budget of format 2") as caught:
            Budget.load(saved)
        assert ("It was written by" in str(caught.value)) == bool(told) and told in str(caught.value)


def test_budgets_do_not_change_with_their_file(saved):
    loaded = Budget.load(saved)
    before = loaded.fractions.clone()
    saved.write_bytes(b"\0" * saved.stat().st_size)
    assert loaded.fractions.equal(before)


def test_tables_of_numbers_that_are_none_are_refused(tmp_path):
    table = np.zeros((99, 3, 2))
    for bad in (np.nan, np.inf):
        table[5, 1, 1] = bad
        np.save(tmp_path / "t.npy", table)
        with pytest.raises(BadInput, match=r"t\.npy holds NaN or infinity"):
            Budget.from_kvpress(tmp_path / "t.npy", shape=SHAPE)
        with pytest.raises(BadInput, match=r"heads\.tsv holds NaN or infinity"):
            Budget.from_duo_attention(duo_table(tmp_path, [[bad, 0], [0, 0], [0, 0]]), shape=SHAPE)


@pytest.mark.parametrize("shape", ["(99, 1000000, 1000000)", "(-1, 3, 2)", "(99,", "(" * 5000])
def test_a_table_that_claims_to_be_huge_takes_no_memory(tmp_path, shape):
    np.save(tmp_path / "t.npy", np.zeros((99, 3, 2)))
    content = (tmp_path / "t.npy").read_bytes()
    (tmp_path / "t.npy").write_bytes(content.replace(b"(99, 3, 2), }", f"{shape}, }}".encode()))
    with pytest.raises((BadInput, ArtifactMismatch), match=r"t\.npy"):
        Budget.from_kvpress(tmp_path / "t.npy", shape=SHAPE)


def test_a_text_far_larger_than_its_table_is_not_read(tmp_path):
    path = duo_table(tmp_path, [[1, 0], [0, 1], [1, 1]])
    path.write_text(path.read_text() + "\n" * 10_000)
    with pytest.raises(BadInput, match="too large for 3 x 2 numbers"):
        Budget.from_duo_attention(path, shape=SHAPE)
    path.write_text("# only a remark\n")
    with pytest.raises(BadInput, match="no data"):
        Budget.from_duo_attention(path, shape=SHAPE)
