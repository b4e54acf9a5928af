"""The learned scorer: LKV-T, from an entry's key and value alone."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.artifacts.gates import Gates, entry_features, shipped_gates
from headwise.errors import BadInput
from headwise.interfaces import AbstractScorer, Observation, Provenance, WhileReading
from headwise.shapes import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class LKVT(AbstractScorer):
    """Scores by a small network per KV head that was trained for this model: LKV (arXiv 2605.06676).

    Sees of an entry its key before rotation, its value, their norms and its place; no queries, no attention. Scores
    compare between heads if they were taught to predict attention (`Gates.comparable`), else within a head only.
    """

    while_reading: ClassVar[WhileReading] = "once"

    gates: Gates

    @property
    def sink(self) -> int:
        """First tokens that came first in training."""
        return self.gates.origin.sink

    @property
    def window(self) -> int:
        """Last tokens that came next in training."""
        return self.gates.origin.window

    @property
    def made_for(self) -> str:
        """Of the gates."""
        return self.gates.origin.model

    @property
    def needs(self) -> frozenset[str]:
        """Keys are seen before rotation."""
        return frozenset({"rotation"})

    def provenance(self) -> Provenance:
        """Name, and which gates."""
        return {"name": type(self).__name__, "gates": self.gates.provenance()}

    def resolve(self, shape: ModelShape, config_hash: str) -> "LKVT":
        """Itself. Raises ArtifactMismatch for another model."""
        self.gates.require(shape, config_hash)
        return self

    def of_heads(self, heads: slice) -> "LKVT":
        """With the networks of these KV heads alone."""
        return LKVT(gates=replace(self.gates, scores=self.gates.entry_scores.of_heads(heads)))

    def score(self, observation: Observation) -> Float[Tensor, "batch kv_heads tokens"]:
        """Score every token of one layer."""
        network = self.gates.entry_scores.to(observation.keys.device)
        with torch.no_grad():
            states = observation.keys, observation.values
            features = entry_features(*states, observation.positions, observation.rotary, observation.span)
            return network(features, observation.layer)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShippedLKVT(AbstractScorer):
    """LKVT with the gates that come with headwise for the model at hand, if there are any."""

    while_reading: ClassVar[WhileReading] = "once"

    def resolve(self, shape: ModelShape, config_hash: str) -> LKVT:
        """With the gates for this model. Raises BadInput if none are shipped."""
        return learned_scorer(shipped_gates(config_hash)).resolve(shape, config_hash)

    def score(self, observation: Observation) -> Float[Tensor, "batch kv_heads tokens"]:
        """Never asked: `resolve` puts a LKVT in its place."""
        raise BadInput("shipped gates must be resolved for a model before they can score.")


def learned_scorer(gates: Gates) -> LKVT:
    """LKV-T of these gates. Raises BadInput if only budgets were trained."""
    if gates.scores is None:
        raise BadInput("these gates hold budgets only: use them as scorer+lkv-h@FILE.")
    return LKVT(gates=gates)
