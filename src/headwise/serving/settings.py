"""What a server is told about headwise, and what follows from it for a model: method, tiers, or a refusal.

The same settings are read where the engine starts, in the scheduler and in every worker, so they are plain JSON.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from reprlib import repr as shown
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig

from headwise.artifacts.origin import config_hash
from headwise.cache.prefill import make_plan
from headwise.errors import BadInput, UnsupportedModel
from headwise.interfaces import StaticAllocator
from headwise.methods.allocate import Global, learned_budgets
from headwise.methods.allocate.unresolved import Shipped
from headwise.methods.keep import MOST_TOKENS, Keep, parse_keep
from headwise.methods.method import Method
from headwise.methods.names import entries_of
from headwise.methods.registry import ALLOCATORS, SCORERS, Entry
from headwise.methods.scores import LKVT
from headwise.models.families import max_positions, shape_of
from headwise.serving.tiers import WHOLE, Tiers, quantise
from headwise.shapes import ModelShape

SERVED = ("llama", "mistral", "qwen2", "qwen3", "phi3")  # model types that vLLM was run with


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a server compresses.

    `method` is a scorer and an allocator whose counts are the same for every prompt of a length, `keep` a fraction of
    all entries. Head budgets are rounded to `tiers` values. `context` is the prompt length that budgets are solved for
    (None: the longest that is served); they are fractions, so other lengths follow. Tiers are balanced for so many
    tensor-parallel `ranks` (None: those of the server); give it to keep the same where their number differs.
    """

    method: str
    keep: float | str
    tiers: int = 8
    context: int | None = None
    ranks: int | None = None

    def __post_init__(self) -> None:
        _fraction(self.keep)
        for name in ("tiers", "context", "ranks"):
            value = getattr(self, name)
            if value is None and name != "tiers":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_TOKENS:
                raise BadInput(f"{name}={shown(value)} must be a whole number, from 1 to {MOST_TOKENS}.")
        require_servable(self.method)
        Method.parse(self.method)  # files that it names are there

    @classmethod
    def parse(cls, given: object) -> "Settings":
        """From JSON. Raises BadInput naming what is wrong and what would work."""
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping):
            raise BadInput(
                f"settings are missing (found {given!r}). Start vLLM with --hf-overrides "
                '\'{"architectures": ["HeadwiseForCausalLM"], "headwise": {"method": "keydiff+uniform", "keep": 0.2}}\''
            )
        for name in given:
            if name not in known:
                close = get_close_matches(str(name), known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise BadInput(f"there is no setting {name!r}.{hint} Known: {', '.join(known)}.")
        for name in ("method", "keep"):
            if name not in given:
                raise BadInput(f"the setting {name!r} is missing; for instance method='keydiff', keep=0.2.")
        if not isinstance(given["method"], str):
            raise BadInput(f"method={given['method']!r} must be a name such as 'keydiff+lukv'.")
        return cls(**given)

    def as_json(self) -> dict[str, Any]:
        """What `parse` takes."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A method, resolved for a model, with its tiers."""

    settings: Settings
    method: Method
    shape: ModelShape
    context: int  # prompt length that budgets were solved for
    tiers: Tiers
    fractions: Float[Tensor, "layers kv_heads"]  # before they were rounded to tiers

    @property
    def largest_change(self) -> float:
        """By which rounding to tiers changed a head's fraction."""
        rounded = torch.tensor(self.tiers.keeps, dtype=torch.float64, device="cpu") / WHOLE
        return float((rounded - self.fractions).abs().max())

    @classmethod
    def of(cls, settings: Settings, config: PretrainedConfig, longest: int | None = None, ranks: int = 1) -> "Served":
        """Raises BadInput, UnsupportedModel, ArtifactMismatch, BudgetInfeasible.

        `longest` is the longest prompt that will be served (None: what the model was made for), `ranks` the number of
        tensor-parallel ranks.
        """
        method, shape = resolved(settings, config)
        longest = longest or max_positions(config)
        _require_steady_rotation(config, longest)
        context = settings.context or longest
        fractions = static_fractions(method, _fraction(settings.keep), shape, context)
        floor = max(1, (method.sink + method.window) * method.keeps_protected)
        tiers = quantise(fractions, settings.tiers, floor=floor, tokens=context, ranks=settings.ranks or ranks)
        return cls(settings=settings, method=method, shape=shape, context=context, tiers=tiers, fractions=fractions)


def resolved(settings: Settings, config: PretrainedConfig) -> tuple[Method, ModelShape]:
    """The method for a model that can be served. Raises BadInput, UnsupportedModel, ArtifactMismatch."""
    shape = shape_of(config)
    text = config.get_text_config()
    if len(shape.layers) < shape.num_layers or text.model_type.startswith("gemma3"):
        raise UnsupportedModel(
            f"this {config.model_type} model has sliding-window layers, which share no page size with single "
            "heads: it can be compressed with transformers (headwise.compress), not served."
        )
    if text.model_type not in SERVED:
        raise UnsupportedModel(
            f"models of type {text.model_type!r} have not been tried with vLLM: they can be compressed with "
            f"transformers (headwise.compress), not served. Served: {', '.join(SERVED)}."
        )
    return _static(Method.parse(settings.method).for_model(shape, config_hash(text.to_dict()))), shape


def _static(method: Method) -> Method:
    """Learned scores with the budgets that were learned with them, where their heads would compete over each prompt."""
    if isinstance(method.allocator, Global) and isinstance(method.scorer, LKVT):
        return replace(method, allocator=learned_budgets(method.scorer.gates))
    return method


def require_servable(method: str) -> None:
    """Raise BadInput, naming what would work, unless scorer and allocator can be served."""
    Method.parse(method)  # raises for what is no method, and for a file that is not there
    scorer, allocator = entries_of(method)
    _require(method, "scorer", scorer, SCORERS, "it needs more of the model than a server keeps")
    _require(method, "allocator", allocator, ALLOCATORS, "its counts depend on the prompt, but block tables do not")


def static_fractions(method: Method, keep: Keep, shape: ModelShape, tokens: int) -> Float[Tensor, "layers kv_heads"]:
    """What every head keeps of a context of so many tokens. Raises BadInput where that depends on the context."""
    allocator = method.allocator
    if not isinstance(allocator, StaticAllocator):
        unresolved = isinstance(allocator, Shipped)
        reason = "must be resolved for a model first" if unresolved else "counts by the scores of a prompt"
        raise BadInput(f"{type(allocator).__name__} cannot be planned with: it {reason}.")
    valid = torch.ones(1, tokens, dtype=torch.bool, device="cpu")
    plan = make_plan(
        method,
        keep,
        shape=shape,
        itemsize=1,
        valid=valid,
        positions=torch.arange(tokens, dtype=torch.int64, device="cpu")[None],
    )
    return allocator.counts(plan.demand)[:, 0].double() / tokens


def _require_steady_rotation(config: PretrainedConfig, longest: int) -> None:
    """Raise UnsupportedModel where the model's code would choose rotary frequencies by the longest of a batch."""
    text = config.get_text_config()
    rope = text.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    original = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    steady = original or text.max_position_embeddings
    if kind in ("dynamic", "longrope") and longest > steady:
        raise UnsupportedModel(
            f"rotary embeddings of type {kind!r} depend on the longest sequence of a batch beyond {steady} tokens, so "
            f"answers would depend on other requests. Serve prompts up to that: --max-model-len {steady}."
        )


def _require(method: str, kind: str, name: str, registry: Mapping[str, Entry], reason: str) -> None:
    if not registry[name].served:
        able = ", ".join(word for word, entry in registry.items() if entry.served)
        raise BadInput(f"{method!r} cannot be served, because of its {kind} {name!r}: {reason}. Use {able}.")


def _fraction(value: float | str) -> Keep:
    keep = parse_keep(value)
    if keep.kind != "fraction":
        raise BadInput(f"keep={value!r} must be a fraction when serving, such as 0.2: prompts differ in length.")
    return keep
