"""Scores and kept entries equal kvpress's, method by method, at the conventions that the docstrings name.

Runs on the recording that lies beside this file (see record_kvpress.py, which also says how to make it again). With
HEADWISE_KVPRESS_PYTHON set to the python of an environment that has kvpress 0.5.5, the recorder also runs there, in a
process of its own, and everything is checked against its fresh output too.
"""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from headwise.interfaces import AbstractScorer, Chunk, Demand, Observation, Statistics
from headwise.methods.allocate.heuristic import AdaKV, Pyramid
from headwise.methods.scores import (
    H2O,
    TOVA,
    CriticalKV,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    KVzip,
    Random,
    SnapKV,
    Streaming,
)
from headwise.methods.select import protected_mask, select
from headwise.shapes import ModelShape

HERE = Path(__file__).parent
KVPRESS_PYTHON = os.environ.get("HEADWISE_KVPRESS_PYTHON")
SHAPE = ModelShape(num_layers=5, layers=(0, 1, 2, 3, 4), kv_heads=2, query_heads=6, head_dim=8)
RECORDED_LAYERS = (0, 4)
CASES = {"long": (333, SnapKV()), "short": (90, SnapKV(window_size=8, kernel_size=7))}
MEAN_ONLY = ExpectedAttention(use_covariance=False, use_vnorm=False)

Recording = dict[str, np.ndarray]


def scorers(case: str) -> dict[str, AbstractScorer]:
    snapkv = CASES[case][1]
    return {
        "knorm": Knorm(),
        "keydiff": KeyDiff(),
        "streaming": Streaming(),
        "snapkv": snapkv,
        "tova": TOVA(),
        "h2o": H2O(),
        "expected": ExpectedAttention(),
        "expected-epsilon": ExpectedAttention(epsilon=0.02),
        "expected-mean": MEAN_ONLY,
        "critical-snapkv": CriticalKV(base=snapkv),
        "critical-expected": CriticalKV(base=MEAN_ONLY),
    }


@dataclass(frozen=True)
class RecordedRotary:
    """The rotate-half RoPE of the recorded model."""

    inv_freq: Tensor

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * self.inv_freq
        return angles.cos().repeat(1, 1, 2), angles.sin().repeat(1, 1, 2)

    def unrotate(self, states: Tensor, positions: Tensor) -> Tensor:
        cos, sin = (table.unsqueeze(1) for table in self._tables(positions))
        left, right = states.float().chunk(2, dim=-1)
        return states * cos - torch.cat([-right, left], dim=-1) * sin

    def mean_rotation(self, positions: Tensor) -> Tensor:
        cos, sin = (table.mean(1) for table in self._tables(positions))
        turn = torch.cat([-torch.eye(8)[4:], torch.eye(8)[:4]])
        return torch.diag_embed(cos) + sin.unsqueeze(-1) * turn


@pytest.fixture(scope="module", params=["recorded", *(["live"] if KVPRESS_PYTHON else [])])
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    path = HERE / "kvpress.npz"
    if request.param == "live":
        assert KVPRESS_PYTHON is not None
        path = tmp_path_factory.mktemp("kvpress") / "live.npz"
        subprocess.run([KVPRESS_PYTHON, HERE / "record_kvpress.py", path], check=True)
    with np.load(path) as file:
        return dict(file)


def chunk_of(recording: Recording, prefix: str, offset: int = 0) -> Chunk:
    keys = torch.from_numpy(recording[f"{prefix}/keys"])
    batch, _, tokens, head_dim = keys.shape
    return Chunk(
        queries=torch.from_numpy(recording[f"{prefix}/queries"]),
        keys=keys,
        valid=torch.ones(batch, tokens, dtype=torch.bool),
        positions=torch.arange(tokens).expand(batch, -1),
        offset=offset,
        scaling=head_dim**-0.5,
        rotary=RecordedRotary(torch.from_numpy(recording["inv_freq"])),
    )


def observe(recording: Recording, prefix: str, scorer: AbstractScorer, count: int) -> Observation:
    """What the scorer sees of a recorded layer when every head may keep `count` entries on average."""
    chunk = chunk_of(recording, prefix)
    return Observation(
        shape=SHAPE,
        layer=0,
        keys=chunk.keys,
        values=torch.from_numpy(recording[f"{prefix}/values"]),
        queries=chunk.queries[:, :, chunk.queries.shape[2] - scorer.query_window :],
        valid=chunk.valid,
        positions=chunk.positions,
        project=lambda: torch.from_numpy(recording[f"{prefix}/output_weight"]),
        scaling=chunk.scaling,
        rotary=chunk.rotary,
        statistics=scorer.accumulate({}, chunk),
        totals=(count * SHAPE.num_heads,) * len(chunk.keys),
    )


def kept_by_kvpress(recording: Recording, name: str, tokens: int) -> Iterator[tuple[int, Tensor]]:
    """For each compression ratio, the count it stands for in kvpress and the entries kept, [B, H, N]."""
    for ratio, bits in zip(recording["ratios"], recording[name], strict=True):
        kept = torch.from_numpy(np.unpackbits(bits, axis=-1, count=tokens)).bool()
        yield max(1, int(tokens * (1 - float(ratio)))), kept


def demand_of(observation: Observation, scorer: AbstractScorer) -> Demand:
    batch, _, tokens, _ = observation.keys.shape
    protected = scorer.sink + scorer.window
    return Demand(
        shape=SHAPE,
        tokens=(tokens,) * batch,
        totals=observation.totals,
        floors=(max(1, protected),) * batch,
        protected=(protected,) * batch,
    )


def assert_scores_equal(found: Tensor, expected: Tensor, candidates: Tensor) -> None:
    """Where kvpress has no score of its own (protected, or chosen in a first stage) there is nothing to compare."""
    compared = candidates.unsqueeze(1) & (expected < torch.finfo(torch.float32).max)
    torch.testing.assert_close(found[compared], expected[compared], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", RECORDED_LAYERS)
@pytest.mark.parametrize("name", scorers("long"))
@pytest.mark.parametrize("case", CASES)
def test_scores_and_kept_entries(recording: Recording, case: str, name: str, layer: int) -> None:
    scorer, tokens, prefix = scorers(case)[name], CASES[case][0], f"{case}/{layer}"
    for count, expected in kept_by_kvpress(recording, f"{prefix}/kept/{name}", tokens):
        observation = observe(recording, prefix, scorer, count)
        protected = protected_mask(observation.valid, scorer.sink, scorer.window)
        scores = scorer.score(observation)
        counts = torch.full(scores.shape[:2], count)
        assert torch.equal(select(scores, counts, observation.valid, protected), expected)
        if count == tokens // 2 and name != "streaming":  # scores were recorded at half
            recorded = torch.from_numpy(recording[f"{prefix}/scores/{name}"])
            assert_scores_equal(scores, recorded, ~protected)


@pytest.mark.parametrize("layer", RECORDED_LAYERS)
@pytest.mark.parametrize("case", CASES)
def test_random(recording: Recording, case: str, layer: int) -> None:
    """kvpress draws the whole batch at once and every layer alike: its first row is our layer 0."""
    tokens, prefix, scorer = CASES[case][0], f"{case}/{layer}", Random(seed=0)
    for count, expected in kept_by_kvpress(recording, f"{prefix}/kept/random", tokens):
        observation = observe(recording, prefix, scorer, count)
        scores = scorer.score(observation)
        assert torch.equal(scores[0], torch.from_numpy(recording[f"{prefix}/scores/random"])[0])
        protected = protected_mask(observation.valid, scorer.sink, scorer.window)
        kept = select(scores, torch.full(scores.shape[:2], count), observation.valid, protected)
        assert torch.equal(kept[0], expected[0])


@pytest.mark.parametrize("layer", RECORDED_LAYERS)
@pytest.mark.parametrize("name", ["knorm", "keydiff", "snapkv"])
@pytest.mark.parametrize("case", CASES)
def test_adakv(recording: Recording, case: str, name: str, layer: int) -> None:
    scorer, tokens, prefix = scorers(case)[name], CASES[case][0], f"{case}/{layer}"
    allocator = AdaKV(safeguard=0.2, pool_protected=True)
    for count, expected in kept_by_kvpress(recording, f"{prefix}/adakv/{name}", tokens):
        observation = observe(recording, prefix, scorer, count)
        protected = protected_mask(observation.valid, scorer.sink, scorer.window)
        scores = scorer.score(observation)
        demand = demand_of(observation, scorer)
        counts = allocator.allocate(scores.unsqueeze(0), observation.valid & ~protected, (layer,), demand)[0]
        assert torch.equal(select(scores, counts, observation.valid, protected), expected)


@pytest.mark.parametrize(("case", "tokens"), [("long", 333), ("long", 4096), ("short", 90), ("short", 4096)])
def test_pyramid(recording: Recording, case: str, tokens: int) -> None:
    """To within one entry: kvpress rounds every layer by itself, so its layers need not sum to the total."""
    allocator, floor = Pyramid(uniform_fallback=True), CASES[case][1].window
    for ratio, expected in zip(recording["ratios"], recording[f"{case}/pyramid/{tokens}"], strict=True):
        total = round(tokens * (1 - float(ratio)) * SHAPE.num_heads)
        demand = Demand(shape=SHAPE, tokens=(tokens,), totals=(total,), floors=(floor,), protected=(floor,))
        scores, candidates = torch.zeros(5, 1, 2, tokens), torch.ones(1, tokens, dtype=torch.bool)
        counts = allocator.allocate(scores, candidates, SHAPE.layers, demand)
        assert (counts[:, 0] - torch.from_numpy(expected).unsqueeze(-1)).abs().max() <= 1


@pytest.mark.parametrize("layer", RECORDED_LAYERS)
def test_kvzip(recording: Recording, layer: int) -> None:
    scorer, ranges = KVzip(chunk_size=24), recording["kvzip/replays"]
    context = int(ranges.max())
    statistics: Statistics = {}
    for number, (start, end) in enumerate(ranges.tolist()):
        chunk = chunk_of(recording, f"kvzip/{layer}/{number}", context)
        statistics = scorer.accumulate(statistics, replace(chunk, repeats=(start, end)))
    expected = torch.from_numpy(recording["kvzip/scores"])[layer]
    torch.testing.assert_close(statistics["received"], expected, rtol=1e-5, atol=1e-5)
