"""A budget that knows what fewer bits cost every head of a model: some suffer from them, others do not."""

import torch

from headwise.artifacts.budget import Budget
from headwise.artifacts.hulls import concave_hulls
from headwise.artifacts.origin import Origin
from headwise.kernels.quantised import ENTRIES
from headwise.methods.registry import SCORERS
from headwise.models.families import view

RANKS, SINK, WINDOW = 32, 4, 4
LOST = {"int8": 0.001, "k8v4": 0.03, "int4": 0.1}  # shares of the utility, times how much a head suffers


def mixed_budget(model, scorer="keydiff", kinds=tuple(ENTRIES), seed=0):
    """Solved for nothing: random curves."""
    model_view, generator = view(model), torch.Generator().manual_seed(seed)
    heads = model_view.shape.num_heads
    gains = torch.rand(heads, SINK + WINDOW + RANKS, generator=generator, dtype=torch.float64) ** 2
    gains *= torch.linspace(1, 0.01, gains.shape[1], dtype=torch.float64) / gains.sum()
    suffers = 10 ** torch.linspace(-1, 0.9, heads, dtype=torch.float64)[torch.randperm(heads, generator=generator)]
    return Budget(
        ratios=torch.tensor([0.5]),
        fractions=torch.full((1, len(model_view.shape.layers), model_view.shape.kv_heads), 0.5),
        origin=Origin(
            shape=model_view.shape,
            config_hash=model_view.config_hash,
            scorer=scorer,
            scorer_parameters=SCORERS[scorer].make().provenance(),
            sink=SINK,
            window=WINDOW,
            loss="output",
        ),
        hull=_hull(gains),
        kinds={kind: _hull(_spoilt(gains, suffers * LOST[kind])) for kind in kinds},
    )


def _spoilt(gains, share):
    """Of all but the first tokens, which stay native."""
    spoilt = gains * (1 - share[:, None])
    spoilt[:, :SINK] = gains[:, :SINK]
    return spoilt


def _hull(gains):
    first, rest = gains.tensor_split([SINK + WINDOW], dim=-1)
    hulls = concave_hulls(rest)
    return {"protected": first.contiguous(), "width": hulls.width, "slope": hulls.slope}
