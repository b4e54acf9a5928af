"""W_O, the output projection of an attention layer, as the layer applies it.

A plain linear layer has it as its weight. What quantises, adapts or packs weights has something else there, or nothing:
it is then asked what it makes of every unit vector.
"""

from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import UnsupportedModel
from headwise.models.devices import has_numbers
from headwise.shapes import ModelShape

BLOCK = 512  # unit vectors projected at once
TOLERANCE = 0.05  # by which what a layer makes of a random vector may differ from its W_O, in its norm


@torch.no_grad()
def output_weight(projection: nn.Module, shape: ModelShape) -> Float[Tensor, "query_heads head_dim hidden"]:
    """W_O, one slice per query head: a view where the projection is a plain linear layer, else made anew.

    Raises UnsupportedModel if the projection is not linear, or if its weights wait elsewhere and are not fetched for it
    alone.
    """
    if not has_numbers(projection):
        raise UnsupportedModel(
            f"the output projection of an attention layer ({type(projection).__name__}) is on the device 'meta', "
            "without numbers, so its W_O, which this method reads, is not known. Offload without "
            "preload_module_classes, or choose a method without W_O, such as keydiff."
        )
    if _is_plain(projection):
        weight = projection.weight  # [hidden, query_heads * D]
    else:
        weight = _effective(projection, shape.query_heads * shape.head_dim).T
    return weight.view(-1, shape.query_heads, shape.head_dim).permute(1, 2, 0)


def _is_plain(projection: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether what it does is its weight: no subclass, no quantised tensor in it, no hook on it."""
    return (
        type(projection) is nn.Linear
        and type(projection.weight) is nn.Parameter
        and "forward" not in vars(projection)
        and not (projection._forward_hooks or projection._forward_pre_hooks)
    )


def _effective(projection: nn.Module, width: int) -> Float[Tensor, "width hidden"]:
    """What is made of unit vectors, less what is made of nothing (a bias)."""
    tensors = [*projection.parameters(), *projection.buffers()]
    like = next((t for t in tensors if t.is_floating_point()), None)
    # What fetches weights that wait moves what a module is given to where it puts them.
    device = next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))
    dtype = torch.float32 if like is None else like.dtype
    eye = torch.eye(width, device=device, dtype=dtype)

    def project(rows: Tensor) -> Tensor:
        return projection(rows[None])[0].float()  # with a batch, as hooks of users expect it

    nothing = project(eye[:1] * 0)
    weight = torch.cat([project(rows) - nothing for rows in eye.split(BLOCK)])
    probe = torch.randn(4, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    made = project(probe.to(eye)) - nothing
    error = (made - probe.to(weight) @ weight).norm() / made.norm().clamp(min=1e-12)
    if not bool(error <= TOLERANCE):
        raise UnsupportedModel(
            f"the output projection of an attention layer ({type(projection).__name__}) is not linear, so it has no "
            "W_O, which this method reads. Call model.eval() if it drops out, or choose a method without W_O, such as "
            "keydiff."
        )
    return weight
