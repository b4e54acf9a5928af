"""The nouns a contributor implements: a scorer says which entries matter, an allocator how many each head keeps.

During prefill every compressible layer is seen as a series of `Chunk`s (one, unless prefill is chunked). When its last
chunk has passed, the scorer turns an `Observation` into scores, the allocator turns scores into counts, and the top
entries of every head are kept. See docs/how-to-extend.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.shapes import ModelShape

Scope = Literal["layer", "model"]
WhileReading = Literal["once", "anew", "never"]
Provenance = dict[str, Any]
Statistics = dict[str, Tensor]
Follow = Callable[[str], tuple[int, ...]]  # ids of an instruction that comes after a context; none if it has no words


@runtime_checkable
class Rotary(Protocol):
    """The rotary position embedding of one layer."""

    def unrotate(
        self, states: Float[Tensor, "batch heads tokens head_dim"], positions: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Undo the rotation of queries or keys (float32)."""
        ...

    def mean_rotation(self, positions: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch head_dim head_dim"]:
        """The matrix R, averaged over `positions`, that turns a column vector x into its rotated self R x (float32)."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A piece of prefill, as the attention of one layer sees it. Query token t is token `offset + t` of the context."""

    queries: Float[Tensor, "batch query_heads queries head_dim"]  # rotated
    keys: Float[Tensor, "batch kv_heads tokens head_dim"]  # rotated; all tokens up to and with this chunk
    valid: Bool[Tensor, "batch tokens"]  # False at padding
    positions: Int[Tensor, "batch tokens"]
    offset: int
    scaling: float
    rotary: Rotary
    softcap: float | None = None  # of logits, as `Kernel` has it; `sinks` as well
    sinks: Float[Tensor, " query_heads"] | None = None
    # Tokens start:stop that these queries repeat in a second reading (`replay`), whose keys then follow the context's.
    repeats: tuple[int, int] | None = None
    until: Int[Tensor, "batch queries"] | None = None  # last token that each sees (Gemma 3's images). None: itself


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """All a scorer may look at, on the device of one layer, when the whole context has passed through the layer."""

    shape: ModelShape
    layer: int  # among the compressible layers
    keys: Float[Tensor, "batch kv_heads tokens head_dim"]  # rotated
    values: Float[Tensor, "batch kv_heads tokens head_dim"]
    queries: Float[Tensor, "batch query_heads window head_dim"]  # rotated; the last `scorer.query_window` ones
    valid: Bool[Tensor, "batch tokens"]
    positions: Int[Tensor, "batch tokens"]
    project: Callable[[], Tensor]  # makes `output_weight`
    scaling: float
    rotary: Rotary
    statistics: Statistics  # what `accumulate` gathered over the chunks
    totals: tuple[int, ...]  # entries each row may keep over all layers and heads
    softcap: float | None = None
    sinks: Float[Tensor, " query_heads"] | None = None
    ends: Int[Tensor, "batch 2"] | None = None  # first and last position of the context, if `keys` are a part of it
    until: Int[Tensor, "batch window"] | None = None  # of `queries`, as `Chunk` has it

    @property
    def span(self) -> Int[Tensor, "batch 2"]:
        """Positions of the first and the last token of the context."""
        return self.positions[:, [0, -1]] if self.ends is None else self.ends

    @property
    def output_weight(self) -> Float[Tensor, "query_heads head_dim hidden"]:
        """W_O as the layer applies it, one slice per query head; made when asked for. Raises UnsupportedModel."""
        return self.project()


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """How a scorer wants the model to read the context a second time, in chunks (KVzip)."""

    chunk_size: int  # tokens
    overlap: int  # tokens of the chunk before that precede each chunk
    instruction: tuple[int, ...]  # token ids before those


class Part:
    """What scorers and allocators share. Subclasses are frozen dataclasses: their fields are the provenance."""

    @property
    def sink(self) -> int:
        """First tokens that it always keeps, or that its counts take for granted: a method protects them."""
        return 0

    @property
    def window(self) -> int:
        """Last tokens that it always keeps, or that its counts take for granted: a method protects them."""
        return 0

    @property
    def needs(self) -> frozenset[str]:
        """What must be known of layers: "rotation" of keys, that queries have it too ("queries"), "output" (W_O)."""
        return frozenset()

    @property
    def made_for(self) -> str:
        """The model whose file it uses, by its name; empty where there is none."""
        return ""

    def provenance(self) -> Provenance:
        """Name and parameters, as JSON-ready values."""
        return {"name": type(self).__name__, **asdict(self)}  # pyright: ignore[reportArgumentType]


class AbstractScorer(Part, ABC):
    """Says which entries of a head matter."""

    needs_budget: ClassVar[bool] = False  # whether scores depend on `Observation.totals`
    # How it scores if entries are evicted while the context is read. "once": an entry by itself and `Observation.span`;
    # "anew": after every piece all that a head holds, by the last queries; "never": only the whole context.
    while_reading: ClassVar[WhileReading] = "never"

    @property
    def query_window(self) -> int:
        """How many of the last queries `Observation.queries` must hold."""
        return 0

    @property
    def replay(self) -> Replay | None:
        """How the model shall read the context again before scores are asked for; None: not at all."""
        return None

    def resolve(self, shape: ModelShape, config_hash: str) -> "AbstractScorer":
        """The scorer to use on this model. Raises ArtifactMismatch if it was made for another."""
        return self

    def instructed(self, follow: Follow) -> "AbstractScorer":
        """The scorer to use where there is a tokenizer: with an instruction before what the model repeats (KVzip)."""
        return self

    def of_heads(self, heads: slice) -> "AbstractScorer":
        """The scorer for some of the KV heads of every layer, where each process has its own (tensor parallelism)."""
        return self

    def accumulate(self, statistics: Statistics, chunk: Chunk) -> Statistics:
        """Fold one chunk into the statistics; the result must not depend on how the context was cut into chunks."""
        return statistics

    @abstractmethod
    def score(self, observation: Observation) -> Float[Tensor, "batch kv_heads tokens"]:
        """Float32 scores, higher = keep. Values at padding and at protected tokens are ignored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What an allocator must deliver: exact totals above the floors, for each row of the batch."""

    shape: ModelShape
    tokens: tuple[int, ...]  # context length of each row, padding excluded
    totals: tuple[int, ...]  # entries to keep over all L * H heads
    floors: tuple[int, ...]  # entries every head must keep: at least one, and the protected ones where they are a floor
    protected: tuple[int, ...]  # tokens of each row that are protected
    summary: Float[Tensor, "batch width"] | None = None  # what the allocator's `summarise` said of the context


class AbstractAllocator(Part, ABC):
    """Says how many entries every head keeps.

    With scope "layer" it is asked as soon as a layer is done, whose full K and V are freed before the next one runs.
    With scope "model" it is asked once, at the end, with the scores of all layers.
    """

    scope: ClassVar[Scope] = "layer"
    # Whether every head keeps all protected tokens. If not, a head may keep fewer: see select.protection_order.
    keeps_protected: ClassVar[bool] = True

    def resolve(self, scorer: AbstractScorer, shape: ModelShape, config_hash: str) -> "AbstractAllocator":
        """The allocator to use with this scorer on this model. Raises ArtifactMismatch if it was made for others."""
        return self

    def summarise(self, first: Observation) -> Float[Tensor, "batch width"] | None:
        """What it wants to know of a context (`Demand.summary`): a mean over the first layer's tokens, or None."""
        return None

    @abstractmethod
    def allocate(
        self,
        scores: Float[Tensor, "layers batch kv_heads tokens"],
        candidates: Bool[Tensor, "batch tokens"],
        layers: Sequence[int],
        demand: Demand,
    ) -> Int[Tensor, "layers batch kv_heads"]:
        """Counts for `layers` (one layer for scope "layer", all for "model"), protected entries included.

        `candidates` are the tokens that are neither padding nor protected. Over all layers and heads the counts of a
        row sum to its total exactly; none is below the floor or above the row's tokens.
        """


class StaticAllocator(AbstractAllocator):
    """Counts that depend on a context's length, and on its `summary`, but on no scores. A server can plan with them."""

    @abstractmethod
    def counts(self, demand: Demand) -> Int[Tensor, "layers batch kv_heads"]:
        """The whole table, on the CPU, protected entries included. It must hold what `allocate` promises."""

    def allocate(self, scores: Tensor, candidates: Tensor, layers: Sequence[int], demand: Demand) -> Tensor:
        """Their rows of the table, whatever the scores."""
        return self.counts(demand)[list(layers)].to(scores.device)
