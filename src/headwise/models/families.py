"""Uniform access to what the flow needs from a model: sizes, rotation, output projection.

A model is taken if its layers give their attention to transformers' attention interface, with arguments that are known
(interface.py). Sizes come from its configuration (layout.py); which rotation and which projection a layer has is found
in one forward pass, and proven there (anatomy.py). Where something is not known, the methods that need it are refused.
"""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from headwise.artifacts.origin import config_hash
from headwise.errors import BadInput, UnsupportedModel
from headwise.interfaces import Part as MethodPart
from headwise.interfaces import Rotary
from headwise.models import layout
from headwise.models.anatomy import Anatomy, anatomy_of, forget_moved
from headwise.models.devices import device_of
from headwise.models.given import decoder_of, unchanged
from headwise.models.given import given as given
from headwise.models.layout import max_positions as max_positions
from headwise.models.layout import shape_of as shape_of
from headwise.models.output import output_weight
from headwise.models.rotation import ModelRotary as ModelRotary
from headwise.shapes import ModelShape

TOO_LONG = "Shorten the context, configure rope scaling on the model, or raise config.max_position_embeddings."
WITHOUT = "Choose a method that needs keys and values only, such as keydiff."


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelView:
    """A supported model, seen alike whatever its kind. Layers are counted among the compressible ones."""

    model: PreTrainedModel
    shape: ModelShape

    @property
    def max_positions(self) -> int:
        """Longest sequence the model may have been made for."""
        return max_positions(self.model.config)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the first device of a model that is spread over several."""
        return device_of(self.model)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where each layer of the model computes, and what a cache holds of it is."""
        return self.anatomy.devices

    @property
    def layers(self) -> tuple[layout.Layer, ...]:
        """Every layer of the model, compressible or not."""
        return layout.layers_of(self.model.config)

    @property
    def anatomy(self) -> Anatomy:
        """What its attention is made of; the first time the model reads a few tokens. Raises UnsupportedModel."""
        return anatomy_of(self.model, self.shape)

    def require_positions(self, needed: int, what: str) -> None:
        """Raise BadInput if a context needs more positions than the model has; `what` says what it does or has."""
        if needed > self.max_positions:
            raise BadInput(f"the context {what}, but this model was made for {self.max_positions}. {TOO_LONG}")

    def warn_of_positions(self, needed: int) -> None:
        """Warn if it is not certain that the model has so many positions."""
        written = layout.written_positions(self.model.config)
        if needed > written and _stretches_linearly(self.model.config):
            warnings.warn(
                f"the context goes beyond the {written} positions that the model's configuration names. Its rope "
                "scaling is linear, and it does not say whether they are counted before or after scaling: if after, "
                "answers mean nothing.",
                UserWarning,
                stacklevel=2,
            )

    @property
    def name(self) -> str:
        """What it was loaded by: a hub id or a folder; empty where it was not loaded."""
        return self.model.config.name_or_path or ""

    @property
    def config_hash(self) -> str:
        """Names the architecture, as artifacts do."""
        return config_hash(layout.text_config(self.model.config).to_dict())

    def require_parts(self, *parts: MethodPart) -> None:
        """Raise UnsupportedModel if a scorer or an allocator needs of a layer what is not known of it."""
        for part in parts:
            for need in sorted(part.needs):
                why = self.lacks(need)
                if why:
                    raise UnsupportedModel(f"{type(part).__name__} cannot be used: {why}. {WITHOUT}")

    def lacks(self, need: str) -> str:
        """Why the model cannot give what a method needs (`Part.needs`); empty where it can."""
        parts = self.anatomy.parts
        if need in ("rotation", "queries") and any(part.rotation is None for part in parts):
            return "how the layers of this model rotate their keys is not known"
        if need == "queries" and not all(part.turns_queries for part in parts):
            return "the layers of this model rotate their queries in another way than their keys"
        if need == "output" and not all(part.projection for part in parts):
            return "what the heads of this model write goes through no linear projection that is known"
        return ""

    def require_one_device(self, what: str) -> None:
        """Raise UnsupportedModel if layers compute on several devices, which `what` does not know."""
        _require_one(self.devices, what)

    def require_weights_together(self, what: str) -> None:
        """Raise UnsupportedModel if weights are on several devices, or wait out of the way, which `what` cannot do."""
        _require_one(self.anatomy.placement, what)

    def projection(self, layer: int) -> nn.Module:
        """The output projection of a layer. Raises UnsupportedModel where there is none that is known."""
        name = self.anatomy.parts[layer].projection
        if not name:
            raise UnsupportedModel(f"W_O cannot be read: {self.lacks('output')}. {WITHOUT}")
        return self.decoder.get_submodule(name)

    def output_weight(self, layer: int) -> Float[Tensor, "query_heads head_dim hidden"]:
        """W_O of a layer as the layer applies it, adapters and quantisation included. Raises UnsupportedModel.

        Where a layer gates what its heads write, by the hidden state, the gate is not part of it.
        """
        return output_weight(self.projection(layer), self.shape)

    def unchanged(self) -> AbstractContextManager[None]:
        """Whatever the model reads inside, its rotary embedding is afterwards what it was before."""
        return unchanged(self.decoder)

    def rotary(self, layer: int) -> Rotary:
        """The rotary embedding that a layer's queries and keys went through in the latest forward pass.

        Its frequencies are copied: dynamic and long scaling choose them anew in every pass, and a later one may differ.
        Where it is not known, whatever it is asked raises UnsupportedModel.
        """
        rotation = self.anatomy.parts[layer].rotation
        if rotation is None:
            return UnknownRotary(why=self.lacks("rotation"))
        return rotation.of(self.decoder, self.shape.head_dim)

    @property
    def decoder(self) -> Any:
        """The part of the model that has the layers."""
        return decoder_of(self.model)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnknownRotary:
    """Stands for a rotation that is not known. Everything raises UnsupportedModel."""

    why: str

    def unrotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """Cannot be done."""
        raise UnsupportedModel(f"{self.why}. {WITHOUT}")

    def mean_rotation(self, positions: Tensor) -> Tensor:
        """Cannot be told."""
        raise UnsupportedModel(f"{self.why}. {WITHOUT}")


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Return the ids of the tokens that end an answer of generate()."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return [ends] if isinstance(ends, int) else list(ends or [])


def view(model: Any) -> ModelView:
    """Describe a model; a description stays as it is, so that it is made once, where a model comes in.

    Raises BadInput for what is no model, UnsupportedModel, naming what is in the way.
    """
    if isinstance(model, ModelView):
        return model
    model = _require_model(model)
    shape = shape_of(model.config)
    forget_moved(model)
    return ModelView(model=model, shape=shape)


def _require_one(devices: Sequence[torch.device], what: str) -> None:
    names = sorted({str(device) for device in devices})
    if len(names) > 1 or "meta" in names:
        raise UnsupportedModel(
            f"this model is spread over {', '.join(names)}, and {what} needs all of it on one device: load it there."
        )


def _stretches_linearly(config: PretrainedConfig) -> bool:
    """Whether positions are scaled down and the configuration does not say how many there were before."""
    rope = layout.rope_of(config)
    return rope.get("rope_type") == "linear" and "original_max_position_embeddings" not in rope


def _require_model(model: Any) -> PreTrainedModel:
    """The model itself, where it was compiled. Raises BadInput for anything but a model of transformers."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper; dynamo cannot trace what a cache does
    if isinstance(model, nn.Module) and isinstance(getattr(model, "config", None), PretrainedConfig):
        return model  # pyright: ignore[reportReturnType]  # peft's wrappers are no PreTrainedModel
    if isinstance(model, str):
        raise BadInput(
            f"the model is the text {model!r}: load it with AutoModelForCausalLM.from_pretrained, and give that."
        )
    parts = {name: getattr(model, name, None) for name in ("module", "model")}  # DataParallel, a pipeline
    inner = next((f"its .{name}" for name, part in parts.items() if isinstance(part, PreTrainedModel)), None)
    advice = inner or "what AutoModelForCausalLM.from_pretrained returns"
    raise BadInput(f"a {type(model).__name__} is not a model of transformers: give {advice}.")
