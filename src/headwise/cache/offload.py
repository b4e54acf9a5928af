"""Reading exactly with little memory (reading="offload"): a layer that is not at work waits outside of memory.

On a GPU it waits in pinned host memory, and is copied to the device while the layer before it computes. On a CPU it
waits in a memory-mapped file of the folder for temporary files (TMPDIR): the system is told to read a layer while the
one before computes, and to drop it from memory afterwards. The file has no name from the moment it is made, so that
nothing is left of it however a run ends, and its space is reserved before anything is read.
"""

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.cache.layer import FillingLayer, FrozenLayer
from headwise.cache.prefill import Filled, Prefill
from headwise.errors import BadInput, UnsupportedGeneration, WriteFailed
from headwise.kernels.quantised import Bits
from headwise.models.interface import Call


class OffloadingPrefill(Prefill):
    """Watches the layers of one cache fill; tells them how many tokens will come, and which layer is the next one."""

    def watch(self, filled: Filled) -> None:
        """As ever. Raises BadInput where the length of the context is not known."""
        if self.prompt_length is None:
            raise BadInput("reading='offload' needs the length of the context, which room is made for: give it.")
        self.view.require_one_device("reading='offload'")
        super().watch(filled)
        layers = [layer for layer in self.filling if isinstance(layer, OffloadedLayer)]
        for layer in layers:
            layer.capacity = self.prompt_length
        for layer, following in zip(layers, layers[1:] + layers[:1], strict=True):
            layer.following = ref(following)
        layers[0].reserve = self.reserve

    def reserve(self, like: Float[Tensor, "batch kv_heads new head_dim"]) -> None:
        """Have all layers make room, before the first one takes anything. Raises WriteFailed."""
        for layer in self.filling:
            if isinstance(layer, OffloadedLayer):
                layer.make_room(like)


class OffloadedLayer(FillingLayer):
    """Everything seen, out of memory but for when it is this layer's turn."""

    capacity = 0  # tokens

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.following: Callable[[], OffloadedLayer | None] = lambda: None  # weak: a cycle would keep files alive
        self.reserve: Callable[[Tensor], None] = lambda like: None  # of the first layer: makes room for all
        self.store: Sequence[Tensor] = ()  # keys and values [B, H, capacity, D], outside of memory
        self.mapping: mmap.mmap | None = None  # where they are a file
        self.stream: Any = None  # that copies to a GPU
        self.resident = False  # whether what is held is in memory

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in the memory that the model computes in."""
        return sum(states.nbytes for states in self.held) if self.resident else 0

    def make_room(self, like: Float[Tensor, "batch kv_heads new head_dim"]) -> None:
        """Reserve what the whole context takes. Raises WriteFailed where the disk has no room for it."""
        shape = (2, *like.shape[:2], self.capacity, like.shape[3])
        if like.device.type == "cpu":
            self.mapping, flat = _mapped_file(torch.Size(shape).numel() * like.element_size(), like.dtype)
            self.store = flat.view(shape).unbind(0)
        else:
            self.store = torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=True).unbind(0)
            self.stream = torch.cuda.Stream(like.device)

    def take(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Put new tokens behind those held, and have the next layer fetched. A replay's are shown and forgotten."""
        if not self.store:
            self.reserve(value_states)
        self.fetch()
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        states = super().take(key_states, value_states) if self.replaying else self._append(key_states, value_states)
        following = self.following()
        if following is not None and following is not self:
            following.fetch()
        return states

    def fetch(self) -> None:
        """Begin to bring what is held into memory."""
        if self.resident or not self.seen or not self.store:
            return
        self.resident = True
        if self.mapping is not None:
            self.mapping.madvise(mmap.MADV_WILLNEED)
        else:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                states = [part[:, :, : self.seen].to(self.device, non_blocking=True) for part in self.store]
            for part in states:
                part.record_stream(torch.cuda.current_stream())
            self.held = states
        self._report()

    def rest(self) -> None:
        """Leave memory; what is held stays where it waits."""
        if not self.resident or not self.store:
            return
        self.resident = False
        if self.mapping is not None:
            self.mapping.madvise(mmap.MADV_DONTNEED)
        else:
            self.held = []
        self._report()

    def observe(self, call: Call) -> None:
        """A piece has passed: once it is looked at, this layer leaves memory."""
        super().observe(call)
        self.rest()

    def cut(
        self,
        kept: Bool[Tensor, "batch kv_heads tokens"],
        positions: Int[Tensor, "batch tokens"],
        quantised: Sequence[tuple[Bits, Bool[Tensor, "batch kv_heads tokens"]]] = (),
    ) -> FrozenLayer:
        """As ever, from wherever it waits."""
        self.fetch()
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        return super().cut(kept, positions, quantised)

    def release(self) -> None:
        """Let go of all keys and values, in memory and outside."""
        super().release()
        self.store, self.mapping, self.resident = (), None, False

    def _append(self, *new: Tensor) -> tuple[Tensor, Tensor]:
        count = new[0].shape[2]
        if self.seen + count > self.capacity:
            raise UnsupportedGeneration(
                f"there is room for {self.capacity} tokens, those the context was to have: {self.seen + count} came."
            )
        stop = self.seen + count
        for part, states in zip(self.store, new, strict=True):
            part[:, :, self.seen : stop].copy_(states, non_blocking=True)
        if self.mapping is not None:
            self.held = [part[:, :, :stop] for part in self.store]
        else:
            self.held = [torch.cat(pair, dim=2) for pair in zip(self.held, new, strict=True)] if self.held else [*new]
        self.seen, self.resident = stop, True
        self._report()
        return self.states


def _mapped_file(nbytes: int, dtype: torch.dtype) -> tuple[mmap.mmap, Tensor]:
    """A file without a name, in memory when it is looked at: the mapping, and a tensor in it. Raises WriteFailed."""
    try:
        with tempfile.TemporaryFile(prefix="headwise-") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
            mapping = mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        raise WriteFailed(
            f"reading='offload' needs {nbytes / 2**20:,.0f} MiB for every layer in a file for the time of the reading, "
            f"and none could be made: {error.strerror or error}. Set TMPDIR to a folder on a disk with more room."
        ) from error
    return mapping, torch.frombuffer(mapping, dtype=dtype)
