"""What a kernel is, and whether its arguments fit each other: kernels compute addresses from their sizes."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.errors import ShapeMismatch
from headwise.kernels.segments import Segments


@runtime_checkable
class Kernel(Protocol):
    """Attention of new tokens over what was kept of their contexts and over their tails, the tokens that came since."""

    def __call__(
        self,
        query: Float[Tensor, "batch kv_heads group new head_dim"],
        segments: Segments,
        rows: Int[Tensor, " batch"],
        tail_keys: Float[Tensor, "batch kv_heads tail head_dim"],
        tail_values: Float[Tensor, "batch kv_heads tail head_dim"],
        mask: Bool[Tensor, "batch new tail"] | None,
        scaling: float,
        /,
        **options: Any,
    ) -> Float[Tensor, "batch kv_heads group new head_dim"]:
        """The attention's output, in the dtype of the query.

        `query`: the rotated queries. `group` query heads read each KV head.
        `segments`: the kept keys (rotated) and values, of every context and KV head. A query sees all of its context's.
        `rows`: row b of the batch continues context `rows[b]`, int64. Several rows may continue the same context.
        `tail_keys`, `tail_values`: views of longer tensors, oldest token first. The last two axes are contiguous.
        `mask`: True where a new token sees a token of the tail. None: it sees all of them.
        `scaling`: what logits are multiplied by before the softmax.
        `options`: of models that have them only, and only for kernels that say so in their line of KERNELS. `softcap`:
        logits are then `softcap * tanh(logits / softcap)`. `sinks` [query_heads]: one more logit for every query head,
        from which no value comes.

        One softmax goes over both parts; a kernel may merge them by their log-sum-exp (`partial.merge`). Its error from
        float64 is at most twice that of PyTorch's attention in the same precision. It changes none of its arguments.
        """
        ...


def require_fit(
    query: Tensor, segments: Segments, rows: Tensor, tail_keys: Tensor, tail_values: Tensor, mask: Tensor | None
) -> None:
    """Raise ShapeMismatch unless these are what `Kernel` says. Whom rows name is not looked at here."""
    require_shapes(query, segments.keys, segments.values, len(segments.lengths), rows, tail_keys, tail_values, mask)


def require_shapes(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    num_segments: int,
    rows: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    mask: Tensor | None,
) -> int:
    """The same of a storage in its parts; returns the size of a head.

    Done in every step of decoding, so it asks tensors for as little as can be.
    """
    asked, tail, stored = query.shape, tail_keys.shape, keys.shape
    if len(asked) == 5 and len(tail) == 4 and len(stored) == 2 and asked[1] and asked[4]:
        batch, heads, _, num_new, dim = asked
        if (
            stored[1] == dim
            and values.shape == stored
            and tail == (batch, heads, tail[2], dim)
            and tail_values.shape == tail
            and num_segments % heads == 0
            and rows.shape == (batch,)
            and (mask is None or mask.shape == (batch, num_new, tail[2]))
        ):
            return dim
    given = {"query": query, "keys": keys, "values": values, "rows": rows, "tail_keys": tail_keys}
    given |= {"tail_values": tail_values} | ({} if mask is None else {"mask": mask})
    said = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
    raise ShapeMismatch(
        "ragged attention takes query [B, H, G, T, D], keys and values [rows, D] in H segments for every context, rows "
        f"[B], tails [B, H, n, D] and a mask [B, T, n]; found {said} and {num_segments} segments."
    )
