"""The rotary embedding of a layer: how it turns pairs of channels, found by what it does to states and proven by it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3}  # relative; else EXACT_ENOUGH
EXACT_ENOUGH = 0.04  # of what 16 bits leave of cosines and sines; another frequency is off by about 1


@dataclass(frozen=True, kw_only=True)
class ModelRotary:
    """Implements `interfaces.Rotary` by the frequencies a forward pass has used, partial rotation included.

    The model's own module is not called: to be asked about other positions would change it (dynamic and long scaling).
    `start` is the first channel that is turned; pairs are neighbours if `interleaved`, else half of the turned channels
    apart. Without frequencies nothing is turned.
    """

    frequencies: Float[Tensor, " pairs"]
    attention_scaling: float  # of cosines and sines (1 but for YaRN and the like)
    head_dim: int
    start: int = 0
    interleaved: bool = False

    def unrotate(
        self, states: Float[Tensor, "batch heads tokens head_dim"], positions: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Undo the rotation of queries or keys; float32."""
        return self._turned(states, positions, -1.0, 1 / self.attention_scaling)

    def rotate(
        self, states: Float[Tensor, "batch heads tokens head_dim"], positions: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Rotate as the layer does; float32."""
        return self._turned(states, positions, 1.0, self.attention_scaling)

    def mean_rotation(self, positions: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch head_dim head_dim"]:
        """The rotation matrix averaged over positions; float32."""
        angles = self._angles(positions)
        cos, sin = (x.mean(1) * self.attention_scaling for x in (angles.cos(), angles.sin()))  # [B, pairs]
        matrix = torch.eye(self.head_dim, device=cos.device, dtype=torch.float32).repeat(len(cos), 1, 1)
        first, second = (channels.to(cos.device) for channels in self._pairs)
        matrix[:, first, first] = matrix[:, second, second] = cos
        matrix[:, first, second], matrix[:, second, first] = -sin, sin
        return matrix

    def _turned(self, states: Tensor, positions: Tensor, direction: float, size: float) -> Tensor:
        angles = self._angles(positions)[:, None]
        cos, sin = angles.cos() * size, angles.sin() * (direction * size)
        first, second = (channels.to(states.device) for channels in self._pairs)
        out = states.float().clone()
        one, other = out[..., first], out[..., second]
        out[..., first], out[..., second] = one * cos - other * sin, other * cos + one * sin
        return out

    def _angles(self, positions: Tensor) -> Tensor:
        return positions[..., None].float() * self.frequencies.to(positions.device)

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        """The first and the second channel of every pair."""
        number = len(self.frequencies)
        steps = torch.arange(number, dtype=torch.int64, device=self.frequencies.device)
        if self.interleaved:
            return self.start + 2 * steps, self.start + 2 * steps + 1
        return self.start + steps, self.start + number + steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """Where a decoder keeps the frequencies of a layer's rotation, and which channels it turns."""

    module: str = ""  # within the decoder
    buffer: str = ""  # of the module; empty where nothing is turned
    start: int = 0
    interleaved: bool = False
    backwards: bool = False  # whether angles fall with the position

    def of(self, decoder: nn.Module, head_dim: int) -> ModelRotary:
        """As the latest forward pass has used it. Frequencies are copied, for the next pass may choose others."""
        if not self.buffer:
            nothing = torch.zeros(0, dtype=torch.float32, device="cpu")
            return ModelRotary(frequencies=nothing, attention_scaling=1.0, head_dim=head_dim)
        module: Any = decoder.get_submodule(self.module)
        scaling = getattr(module, self.buffer.removesuffix("inv_freq") + "attention_scaling", 1.0)
        return ModelRotary(
            frequencies=getattr(module, self.buffer).detach().float() * (-1 if self.backwards else 1),
            attention_scaling=float(scaling),
            head_dim=head_dim,
            start=self.start,
            interleaved=self.interleaved,
        )


def find(
    decoder: nn.Module,
    states: Float[Tensor, "rows heads 1 head_dim"],
    positions: Int[Tensor, "rows 1"],
) -> Rotation | None:
    """How a layer has turned the same states at these positions, the first of which is 0; None if it is not known."""
    dim = states.shape[-1]
    for rotation in _candidates(decoder, dim):
        if agrees(rotation.of(decoder, dim), states, positions):
            return rotation
    if not any("inv_freq" in name for name, _ in decoder.named_buffers()) and _differ_in_length(states):
        return Rotation()  # positions are in the hidden states already, as those of GPT-2: keys are not turned
    return None


def _differ_in_length(states: Tensor) -> bool:
    """Whether what positions do is no rotation, which would leave lengths as they are."""
    lengths = states.float().norm(dim=-1)
    return bool(((lengths - lengths[:1]).abs() > EXACT_ENOUGH * lengths[:1]).any())


def agrees(
    rotary: ModelRotary, states: Float[Tensor, "rows heads 1 head_dim"], positions: Int[Tensor, "rows 1"]
) -> bool:
    """Whether it makes of the first row, turned back, all of them; and of all of them, turned back, the same."""
    exact = states.float()
    plain = rotary.unrotate(states[:1], positions[:1])
    made, undone = rotary.rotate(plain.expand_as(exact), positions), rotary.unrotate(states, positions)
    limit = TOLERANCE.get(states.dtype, EXACT_ENOUGH)
    return bool((made - exact).norm() <= limit * exact.norm()) and bool(
        (undone - plain).norm() <= limit * undone.norm()
    )


def _candidates(decoder: nn.Module, dim: int) -> Iterator[Rotation]:
    yield Rotation()
    for name, buffer in decoder.named_buffers():
        module, _, own = name.rpartition(".")
        frequencies = own.endswith("inv_freq") and "original" not in own and buffer.ndim == 1 and not buffer.is_meta
        if not frequencies or 2 * len(buffer) > dim:
            continue
        for start in sorted({0, dim - 2 * len(buffer)}):
            for interleaved, backwards in product((False, True), repeat=2):
                yield Rotation(module=module, buffer=own, start=start, interleaved=interleaved, backwards=backwards)
