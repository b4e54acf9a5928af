"""Whether the tensors of a ragged attention fit each other: kernels compute addresses from their sizes."""

from torch import Tensor

from headwise.errors import ShapeMismatch
from headwise.kernels.segments import Segments


def require_fit(
    query: Tensor, segments: Segments, rows: Tensor, tail_keys: Tensor, tail_values: Tensor, mask: Tensor | None
) -> None:
    """Raise ShapeMismatch unless these are what `reference.attend` says. Whom rows name is not looked at here."""
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
