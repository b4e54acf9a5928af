"""What a server is told: what works, and what is refused with the reason."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, Gemma3TextConfig, LlamaConfig, Olmo2Config

import headwise
from headwise.errors import ArtifactMismatch, BadInput, UnsupportedModel
from headwise.methods.registry import ALLOCATORS, SCORERS
from headwise.serving import Served, Settings, vllm_arguments

REFERENCE = str(Path(headwise.__file__).parent / "reference")
SERVED_SCORERS = ["streaming", "knorm", "keydiff", "snapkv", "lkv-t"]
SERVED_ALLOCATORS = ["uniform", "pyramid", "fixed", "lukv", "lkv-h", "lkv-c"]


@pytest.fixture(scope="module")
def config():
    return AutoConfig.from_pretrained(REFERENCE)


@pytest.mark.parametrize("method", ["keydiff", "pyramidkv", "snapkv+lukv", "keydiff+lukv", "lkv", "lkv-t", "streaming"])
def test_tiers_keep_what_was_asked(config, method):
    served = Served.of(Settings(method=method, keep=0.2), config)
    assert served.tiers.keep == pytest.approx(0.2, abs=1e-4)
    assert served.fractions.mean().item() == pytest.approx(0.2, abs=1e-4)
    assert len(served.tiers.sizes) <= 8


def test_everything_kept_is_one_tier(config):
    assert Served.of(Settings(method="keydiff+lukv", keep=1.0), config).tiers.sizes == {1_000_000: 24}


def test_the_floor_is_what_every_head_must_keep(config):
    floors = {m: Served.of(Settings(method=m, keep=0.2), config).tiers.floor for m in ("keydiff", "snapkv", "lkv")}
    assert floors == {"keydiff": 1, "snapkv": 32, "lkv": 1}


def test_the_context_that_budgets_are_solved_for(config):
    short = Served.of(Settings(method="snapkv+lukv", keep=0.2, context=256), config)
    long = Served.of(Settings(method="snapkv+lukv", keep=0.2), config, longest=2048)
    assert short.tiers != long.tiers
    assert short.tiers.keep == pytest.approx(long.tiers.keep, abs=3e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "settings are missing"),
        ("keydiff", "settings are missing"),
        ({"metod": "keydiff", "keep": 0.2}, "Did you mean 'method'"),
        ({"keep": 0.2}, "the setting 'method' is missing"),
        ({"method": "keydiff"}, "the setting 'keep' is missing"),
        ({"method": "keydiff", "keep": 1.5}, "outside"),
        ({"method": "keydiff", "keep": "64tok"}, "must be a fraction"),
        ({"method": "keydif", "keep": 0.2}, "Did you mean 'keydiff'"),
        ({"method": 3, "keep": 0.2}, "must be a name"),
        ({"method": "keydiff", "keep": 0.2, "tiers": 0}, "tiers=0"),
        ({"method": "keydiff", "keep": 0.2, "tiers": True}, "tiers=True"),
        ({"method": "keydiff", "keep": 0.2, "context": -1}, "context=-1"),
        ({"method": "keydiff", "keep": 0.2, "ranks": 0}, "ranks=0"),
        ({"method": "keydiff+lukv@no-such-file", "keep": 0.2}, "no-such-file"),
        ({"method": "keydiff", "keep": 0.2, "entries": "int4"}, "there is no setting 'entries'"),
    ],
)
def test_wrong_settings_are_refused(given, message):
    with pytest.raises(BadInput, match=message):
        Settings.parse(given)


@pytest.mark.parametrize("scorer", sorted(set(SCORERS) - set(SERVED_SCORERS)))
def test_scorers_that_need_more_are_refused_with_those_that_can(scorer):
    with pytest.raises(BadInput, match=f"scorer '{scorer}'.*Use {', '.join(SERVED_SCORERS)}"):
        Settings(method=f"{scorer}+uniform", keep=0.2)


@pytest.mark.parametrize("allocator", sorted(set(ALLOCATORS) - set(SERVED_ALLOCATORS)))
def test_allocators_that_look_at_the_prompt_are_refused_with_those_that_do_not(allocator):
    with pytest.raises(BadInput, match=f"allocator '{allocator}'.*Use {', '.join(SERVED_ALLOCATORS)}"):
        Settings(method=f"keydiff+{allocator}", keep=0.2)


def test_models_that_cannot_be_served_are_refused():
    config = Gemma3TextConfig(num_hidden_layers=6, sliding_window=64)
    with pytest.raises(UnsupportedModel, match="sliding-window layers"):
        Served.of(Settings(method="keydiff", keep=0.2), config)
    with pytest.raises(UnsupportedModel, match="'olmo2' have not been tried with vLLM"):
        Served.of(Settings(method="keydiff", keep=0.2), Olmo2Config(num_hidden_layers=2))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_depend_on_the_batch_are_refused(kind):
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512, **factors}
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters=rope,
    )
    settings = Settings(method="keydiff", keep=0.2)
    with pytest.raises(UnsupportedModel, match="--max-model-len 512"):
        Served.of(settings, config, longest=2048)
    assert Served.of(settings, config, longest=512).tiers.keep == pytest.approx(0.2, abs=1e-2)


def test_a_budget_of_another_model_is_refused(tmp_path):
    budget = next((Path(REFERENCE) / "budgets").glob("*.safetensors"))
    other = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(ArtifactMismatch):
        Served.of(Settings(method=f"keydiff+fixed@{budget}", keep=0.2), other)


def test_arguments_for_vllm():
    assert vllm_arguments("keydiff+lukv", keep=0.2) == {
        "hf_overrides": {
            "architectures": ["HeadwiseForCausalLM"],
            "headwise": {"method": "keydiff+lukv", "keep": 0.2, "tiers": 8, "context": None, "ranks": None},
        },
        "enable_prefix_caching": False,
        "enforce_eager": True,
    }
    with pytest.raises(BadInput, match="cannot be served"):
        vllm_arguments("adakv", keep=0.2)


def test_a_rank_scores_its_heads_as_all_would(config):
    """Tensor parallelism: every rank has the gates of its own heads."""
    from headwise.interfaces import Observation
    from headwise.serving.settings import resolved

    method, shape = resolved(Settings(method="lkv", keep=0.2), config)
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, shape.kv_heads, 50, shape.head_dim).unbind()

    class NoRotation:
        def unrotate(self, states, positions):
            return states

        def mean_rotation(self, positions):
            raise AssertionError

    def scores(scorer, heads):
        observation = Observation(
            shape=shape,
            layer=3,
            keys=keys[:, heads],
            values=values[:, heads],
            queries=torch.zeros(1, shape.query_heads, 0, shape.head_dim),
            valid=torch.ones(1, 50, dtype=torch.bool),
            positions=torch.arange(50)[None],
            project=lambda: torch.zeros(shape.query_heads, shape.head_dim, 0),
            scaling=1.0,
            rotary=NoRotation(),
            statistics={},
            totals=(),
        )
        return scorer.score(observation)

    every = scores(method.scorer, slice(None))
    for heads in (slice(0, 2), slice(2, 4)):
        assert torch.equal(scores(method.scorer.of_heads(heads), heads), every[:, heads])
