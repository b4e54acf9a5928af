"""Listeners: who wants to know what passes through the layers of a cache, and changes nothing."""

from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor

from headwise.interfaces import AbstractScorer, Observation


class Listener:
    """Hears what passes through the layers of one cache, but not of its forks. Both methods do nothing by default.

    It changes nothing of what is kept. A scorer of its own that needs a second reading makes all layers stay whole
    until then. Scorers must be resolved for the model (`AbstractScorer.resolve`).

    Give it to `compress` to hear how a context is read, or to `RaggedCache.listen` to hear what comes after it.
    """

    @property
    def scorers(self) -> Sequence[AbstractScorer]:
        """Scorers that watch the context besides the method's own. They decide nothing."""
        return ()

    def observed(self, scorer: AbstractScorer, observation: Observation) -> None:
        """The whole context has passed through a layer: what `scorer` is given, be it the method's or one of ours."""

    def attends(
        self,
        layer: int,
        query: Float[Tensor, "batch kv_heads group queries head_dim"],
        tail_keys: Float[Tensor, "batch kv_heads tail head_dim"],
        tail_values: Float[Tensor, "batch kv_heads tail head_dim"],
        mask: Bool[Tensor, "batch queries tail"] | None,
        scaling: float,
        *,
        softcap: float | None = None,
        sinks: Float[Tensor, " query_heads"] | None = None,
    ) -> None:
        """New tokens are about to attend to what was kept of the context in `layer`, and to the tail.

        `layer` counts the compressible layers. `mask` says which tail tokens each query sees (None: all). Logits are
        `scaling * query @ key`, queries and keys being rotated already. A soft cap and sinks are given
        where a model has them: logits are `softcap * tanh(logits / softcap)` then, and every query head has one more
        logit, which takes attention and has no value.
        """
