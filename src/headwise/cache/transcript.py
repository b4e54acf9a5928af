"""The tokens that a cache has seen, so that it can tell what continues them from what does not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from headwise.errors import BadInput

ADVICE = (
    "give all that it has seen, followed by the new tokens, and use cache.fork() for every question or conversation of "
    "its own"
)
PIECES = 64  # steps whose ids are held apart


@dataclass(frozen=True, kw_only=True, slots=True)
class Transcript:
    """Ids of all tokens of every row, padding included, in pieces; None where they are not known. Never changed.

    They stay on the device: a decoding step must not wait for it.
    """

    pieces: tuple[Int[Tensor, "batch _"], ...] | None = ()
    length: int = 0  # tokens of a row whose ids are known

    @property
    def nbytes(self) -> int:
        """Bytes of the ids."""
        return sum(piece.nbytes for piece in self.pieces or ())

    @property
    def ids(self) -> Int[Tensor, "batch tokens"] | None:
        """All ids, if they are known."""
        return torch.cat(self.pieces, dim=-1) if self.pieces else None

    def followed_by(self, ids: Int[Tensor, "batch new"] | None) -> "Transcript":
        """With new tokens; without their ids nothing is known any more."""
        if ids is None or self.pieces is None:
            return Transcript(pieces=None)
        device = self.pieces[0].device if self.pieces else ids.device  # a model on several takes ids from anywhere
        pieces = (*self.pieces, ids.detach().to(device, torch.int64, copy=True))
        if len(pieces) >= PIECES:
            pieces = (torch.cat(pieces, dim=-1),)
        return Transcript(pieces=pieces, length=self.length + ids.shape[1])

    def picked(self, pick: Callable[[Tensor], Tensor]) -> "Transcript":
        """Of other rows."""
        return replace(self, pieces=self.pieces and tuple(pick(piece) for piece in self.pieces))

    def cut(self, tokens: int) -> "Transcript":
        """The first so many tokens."""
        return Transcript(pieces=None) if self.ids is None else Transcript().followed_by(self.ids[:, :tokens])

    @staticmethod
    def stacked(parts: "Sequence[Transcript]") -> "Transcript":
        """The rows of all of them, if all are known."""
        rows = [part.ids for part in parts]
        known = [ids for ids in rows if ids is not None]
        return Transcript().followed_by(torch.cat(known) if len(known) == len(rows) else None)

    def require_prefix(self, seen: int, ids: Int[Tensor, "batch tokens"], mask: Tensor | None) -> None:
        """Raise BadInput unless `ids` begin with the `seen` tokens of this transcript, and go on after them.

        Where `mask` [batch, tokens] is 0 there is padding, which may be anything.
        """
        if ids.shape[1] <= seen:
            raise BadInput(
                f"among {ids.shape[1]} ids there are no new tokens for this cache, which has seen {seen}: {ADVICE}."
            )
        known = self.ids
        if known is None or len(known) != len(ids):  # of another batch: the layers refuse it
            return
        other = known != ids[:, :seen].to(known)
        if mask is not None:
            other = other & mask[:, :seen].to(known.device, torch.bool)
        if bool(other.any()):
            row, token = other.nonzero()[0].tolist()
            where = f"token {token}" + (f" of row {row}" if len(ids) > 1 else "")
            raise BadInput(
                f"these are not the tokens that this cache has seen ({where} of {seen} is the first that differs): "
                f"{ADVICE}."
            )
