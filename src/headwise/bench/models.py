"""Models to measure: checkpoints, or random weights in the shape of well-known models."""

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from headwise.artifacts.gates import EntryScores, Gates, HeadBudgets, summary_width
from headwise.artifacts.origin import Origin, config_hash
from headwise.cache.prefill import make_plan
from headwise.errors import BadInput, BudgetInfeasible
from headwise.methods.allocate import ShippedContest, ShippedLKVH, learned_budgets
from headwise.methods.keep import parse_keep
from headwise.methods.method import Method
from headwise.methods.scores import ShippedLKVT, learned_scorer
from headwise.models.families import shape_of
from headwise.models.loading import load_config
from headwise.shapes import ModelShape

_LLAMA3 = {
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}
SHAPES: dict[str, dict[str, Any]] = {
    "random-llama-1b": _LLAMA3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "random-llama-8b": _LLAMA3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    # Much cache and little else, so that long contexts can be read on a CPU: 64 KiB a token in float32.
    "random-narrow": {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 512,
        "max_position_embeddings": 131072,
    },
}


def shape_for(name: str, layers: int | None) -> dict[str, Any] | None:
    """Return the sizes of the random model of this name, perhaps with fewer layers; None for a checkpoint.

    Raises BadInput if there is no such model or the layers do not fit, UnsupportedModel for a checkpoint's family.
    """
    if name in SHAPES:
        has = SHAPES[name]["num_hidden_layers"]
        if layers is not None and layers > has:
            raise BadInput(f"--layers {layers}: {name} has {has} layers; give as many or fewer.")
        return SHAPES[name] | ({} if layers is None else {"num_hidden_layers": layers})
    if layers is not None:
        raise BadInput(f"the layers of a checkpoint are its own: --layers is for {', '.join(SHAPES)}.")
    if get_close_matches(name, SHAPES, cutoff=0.8) and not Path(name).exists():
        raise BadInput(f"there is no folder {name}, and the random models are {', '.join(SHAPES)}.")
    shape_of(load_config(name))
    return None


def method_for(name: str, shape: ModelShape, config_hash: str) -> Method:
    """Return the method of this name. A method with shipped gates gets untrained ones, which cost the same."""
    method = Method.parse(name)
    if method.scorer == ShippedLKVT():
        method = replace(method, scorer=learned_scorer(_untrained(shape, config_hash)))
    if method.allocator in (ShippedLKVH(), ShippedContest()):
        method = replace(method, allocator=learned_budgets(_untrained(shape, config_hash)))
    return method


def require_budgets(
    name: str, layers: int | None, methods: Sequence[str], *, keep: float, tokens: int, batch: int, dtype: str
) -> None:
    """Raise an error if a method could not keep `keep` of `tokens`. Loads no weights.

    Raises BadInput, ArtifactMismatch, UnsupportedModel or BudgetInfeasible.
    """
    random_shape = shape_for(name, layers)
    config = load_config(name) if random_shape is None else LlamaConfig(**random_shape)
    shape, hashed = shape_of(config), config_hash(config.get_text_config().to_dict())
    valid = torch.ones(batch, tokens, dtype=torch.bool, device="cpu")
    for method in methods:
        try:
            make_plan(
                method_for(method, shape, hashed).for_model(shape, hashed),
                parse_keep(keep),
                shape=shape,
                itemsize=getattr(torch, dtype).itemsize,
                valid=valid,
                positions=valid.cumsum(-1) - 1,
            )
        except BudgetInfeasible as error:
            raise BudgetInfeasible(f"{method} cannot work with keep={keep:g} of {tokens} tokens: {error}") from error


def _untrained(shape: ModelShape, config_hash: str) -> Gates:
    settings = {"sink": 4, "window": 32, "seed": 0}
    origin = Origin(shape=shape, model="", config_hash=config_hash, sink=4, window=32, calibration="")
    return Gates(
        origin=origin,
        settings=settings,
        budgets=HeadBudgets(shape.num_heads, summary_width(shape)).requires_grad_(False),
        scores=EntryScores(len(shape.layers), shape.kv_heads, shape.head_dim).requires_grad_(False),
    )
