"""Images in a context: what a model is given of them besides ids, which types have been tried, and what must fit.

An image is a run of placeholders among the ids. The model puts what it sees in their place, in the pass that reads the
context. What must not happen is that a placeholder is read as a word, or that image tokens are taken for others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwise.errors import BadInput, ShapeMismatch, UnsupportedModel
from headwise.models.devices import device_of

PIXELS = "pixel_values"
ENCODED = "mm_encoder_outputs"  # what generate() makes of pixel values before it reads the prompt
MEDIA = frozenset({PIXELS, ENCODED, "pixel_values_videos"})  # what brings something to see


@dataclass(frozen=True, kw_only=True, slots=True)
class Seeing:
    """What the forward pass of a type of models takes with pixel values: what it needs, and what it may be given."""

    needed: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    types: str = ""  # the one of `needed` that is 1 at the tokens of images and 0 at others

    @property
    def arguments(self) -> frozenset[str]:
        """All of them."""
        return frozenset({PIXELS, *self.needed, *self.others})


_ON_GRID = Seeing(needed=("image_grid_thw", "mm_token_type_ids"), types="mm_token_type_ids")
# Types that tests/models/test_vision.py compares to transformers' own cache.
SEEING: Mapping[str, Seeing] = MappingProxyType(
    {
        "llava": Seeing(others=("image_sizes",)),
        "mistral3": Seeing(needed=("image_sizes",)),
        "gemma3": Seeing(needed=("token_type_ids",), types="token_type_ids"),
        "qwen2_5_vl": _ON_GRID,
        "qwen3_vl": _ON_GRID,
    }
)


def images_in(model: nn.Module, ids: Int[Tensor, "batch tokens"] | None, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """What of `given` shows images to a model that reads the context `ids`; nothing where it is text only.

    Raises BadInput or ShapeMismatch for what is unknown, missing or does not fit, UnsupportedModel for a type of models
    that has not been tried with images.
    """
    inner = inner_of(model)
    found = {name: value for name, value in given.items() if value is not None}
    for name, value in found.items():
        _require_known(inner, name, value)
    known = SEEING.get(inner.config.model_type, Seeing())
    if PIXELS not in found:
        _require_text(inner, ids, known, found)
        return {}
    missing = [name for name in known.needed if name not in found]
    if missing:
        raise BadInput(f"{PIXELS} came without {', '.join(missing)}: give all that the model's processor makes.")
    _require_placeholders(inner, ids, found.get(known.types))
    return found


def brought(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """What of the arguments of a forward pass is about images; of types not tried with them, what brings some."""
    known = SEEING.get(inner_of(model).config.model_type)
    names = MEDIA if known is None else MEDIA | known.arguments
    found = {name: given[name] for name in names if given.get(name) is not None}
    if ENCODED in found:
        found[ENCODED] = {kind: output for kind, output in found[ENCODED].items() if output is not None}
    return {name: value for name, value in found.items() if name != ENCODED or value}


def are_read(model: nn.Module, ids: Int[Tensor, "batch tokens"] | None, images: Mapping[str, Any]) -> bool:
    """Whether the pass that begins to read a context brings images (`brought`). Raises what `images_in` does."""
    if ENCODED not in images:
        return bool(images_in(model, ids, images))
    inner = inner_of(model)
    known = SEEING.get(inner.config.model_type)
    if known is None:
        _refuse_type(inner, ENCODED)
    others = sorted(images[ENCODED].keys() - {"image"})
    if others:
        raise BadInput(f"headwise does not know what {others[0]} does to a context: give images only.")
    if known.types and known.types not in images:
        raise BadInput(f"images came without {known.types}: give all that the model's processor makes.")
    _require_placeholders(inner, ids, images.get(known.types))
    return True


def require_no_images(model: nn.Module, ids: Tensor | None, given: Mapping[str, Any], *, look: bool) -> None:
    """Raise BadInput if tokens that come after the (first piece of the) context bring images.

    Whether `ids` hold placeholders is seen only with `look`: a single token may be one that the model has chosen.
    """
    late = sorted(MEDIA & given.keys())
    if not late and look and ids is not None and _placeholders(model, ids):
        late = [f"placeholders: {_placeholders(model, ids)}"]
    if late:
        raise BadInput(
            f"new tokens bring images ({late[0]}): images belong to the context, which is read in one piece. Compress "
            "a context with all of them."
        )


def inner_of(model: nn.Module) -> Any:
    """The model of transformers; peft wraps it."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _require_known(inner: Any, name: str, value: Any) -> None:
    kind = inner.config.model_type
    if name not in _parameters(type(inner)):
        raise BadInput(f"{type(inner).__name__} takes no argument {name!r}.")
    if kind not in SEEING and name in MEDIA:
        _refuse_type(inner, name)
    if kind not in SEEING or name not in SEEING[kind].arguments:
        raise BadInput(f"headwise does not know what the argument {name!r} does to a context: leave it out.")
    if not isinstance(value, Tensor):
        raise BadInput(f"{name} is a {type(value).__name__}; expected a tensor: use return_tensors='pt'.")
    if value.device != device_of(inner):
        raise BadInput(f"{name} is on {value.device}, the model on {device_of(inner)}: use inputs.to(model.device).")


def _refuse_type(inner: Any, name: str) -> NoReturn:
    kind, tried = inner.config.model_type, ", ".join(SEEING)
    raise UnsupportedModel(f"model type {kind!r} has not been tried with images ({name}), only {tried} have.")


def _require_text(inner: Any, ids: Tensor | None, known: Seeing, found: Mapping[str, Tensor]) -> None:
    """Raise BadInput unless a context without pixel values is a text."""
    marked = [name for name, value in found.items() if name != known.types or bool((value != 0).any())]
    kind = "" if ids is None else _placeholders(inner, ids)
    if marked or kind:
        what = f"{marked[0]} tells of an image" if marked else f"input_ids have placeholders ({kind})"
        raise BadInput(f"{what}, but there are no {PIXELS}: give them, or a context of text only.")


def _placeholders(model: nn.Module, ids: Tensor) -> str:
    """Of what ids of a model that can see hold placeholders: "image" or "video"; empty if of nothing."""
    inner = inner_of(model)
    if PIXELS not in _parameters(type(inner)):
        return ""
    tokens = {kind: getattr(inner.config, f"{kind}_token_id", None) for kind in ("image", "video")}
    found = (kind for kind, token in tokens.items() if token is not None and bool((ids == token).any()))
    return next(found, "")


def _require_placeholders(inner: Any, ids: Tensor | None, types: Tensor | None) -> None:
    """Raise BadInput or ShapeMismatch unless ids have placeholders for images, and types say the same."""
    token = inner.config.image_token_id
    if ids is None:
        raise BadInput("images came without input_ids, whose placeholders say where they are.")
    if _placeholders(inner, ids) != "image":
        raise BadInput(f"there are images, but no placeholder {token} for one in input_ids.")
    shown = ids == token
    if types is not None and types.shape != ids.shape:
        raise ShapeMismatch(f"types of tokens have shape {tuple(types.shape)}, input_ids {tuple(ids.shape)}.")
    if types is not None and not torch.equal(types, shown.to(types)):
        raise BadInput(f"types of tokens must be 1 at the placeholders {token} in input_ids, and 0 elsewhere.")
    if _placeholders(inner, ids.masked_fill(shown, -1)):
        raise BadInput("there are placeholders for videos in input_ids, which headwise does not know yet.")


@lru_cache(maxsize=64)
def _parameters(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(signature(kind.forward).parameters)
