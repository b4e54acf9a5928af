"""Whether the tensors of a ragged attention fit each other: kernels compute addresses from their sizes."""

from torch import Tensor

from headwise.errors import ShapeMismatch
from headwise.layout import Segments


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
) -> None:
    """The same of a storage in its parts; this is done in every step of decoding, so it takes a microsecond or two."""
    if query.ndim == 5:
        batch, heads, _, num_new, dim = query.shape
        tail = tail_keys.shape
        if (
            heads
            and dim
            and keys.shape == values.shape == (len(keys), dim)
            and num_segments % heads == 0
            and rows.shape == (batch,)
            and len(tail) == 4
            and tail == tail_values.shape == (batch, heads, tail[2], dim)
            and (mask is None or mask.shape == (batch, num_new, tail[2]))
        ):
            return
    given = {"query": query, "keys": keys, "values": values, "rows": rows, "tail_keys": tail_keys}
    given |= {"tail_values": tail_values} | ({} if mask is None else {"mask": mask})
    said = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
    raise ShapeMismatch(
        "ragged attention takes query [B, H, G, T, D], keys and values [rows, D] in H segments for every context, rows "
        f"[B], tails [B, H, n, D] and a mask [B, T, n]; found {said} and {num_segments} segments."
    )
