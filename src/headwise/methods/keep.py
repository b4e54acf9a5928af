"""`keep`: how much of the cache a caller wants to retain. One parser for the library and the command line.

0.15, "0.15", "15%"    a fraction of all KV entries of the compressible layers
"1024tok"              that many tokens per KV head on average
"2GiB", "500MB"        bytes of keys and values
"5%bytes"              a share of the bytes of all KV entries in the model's dtype
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Real
from reprlib import repr as shown
from typing import Literal

from headwise.errors import BadInput
from headwise.shapes import ModelShape

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
MOST = 2**63  # tokens or bytes
MOST_TOKENS = 2**27  # of a context: what is computed of one takes memory for each
LONGEST = 64  # characters of a number that is written
_WRITTEN = re.compile(r"(\d*\.?\d+(?:[eE]-?\d{1,3})?|\d+\.)\s*(tok|%bytes|%|[KMGT]?i?B)?")
_ADVICE = (
    "keep must be a fraction in (0, 1] such as 0.15, a number of tokens such as '1024tok', or bytes such as '2GiB' or "
    "'5%bytes'"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Keep:
    """A parsed `keep`; `amount` is exact (0.15 is 3/20, not the nearest float)."""

    kind: Literal["fraction", "tokens", "bytes", "share"]  # share: of all bytes
    amount: Fraction

    def entries(self, *, shape: ModelShape, tokens: Sequence[int], entry_bytes: int) -> list[int]:
        """KV entries to keep in each row of a batch, over all compressible layers and heads.

        `tokens` are the context lengths of the rows (padding excluded). Never more than there are. Bytes are shared
        among the rows in proportion to their length.
        """
        full = [shape.num_heads * n for n in tokens]
        if self.kind == "fraction":
            return [round_half_up(self.amount * f) for f in full]
        if self.kind == "tokens":
            return [min(f, round_half_up(self.amount * shape.num_heads)) for f in full]
        total = self._nbytes(sum(full), entry_bytes) // entry_bytes
        return [min(f, total * f // sum(full)) for f in full]

    def limits(self, *, shape: ModelShape, tokens: Sequence[int], entry_bytes: int) -> list[int]:
        """Bytes of each row, where it is bytes that are kept: what `entries` shares out before it counts entries."""
        full = [shape.num_heads * n for n in tokens]
        return [self._nbytes(sum(full), entry_bytes) * f // sum(full) for f in full]

    @property
    def counts_bytes(self) -> bool:
        """Whether it says bytes, and entries follow from what each costs."""
        return self.kind in ("bytes", "share")

    def _nbytes(self, entries: int, entry_bytes: int) -> int:
        return int(self.amount * entries * entry_bytes if self.kind == "share" else self.amount)

    @property
    def value(self) -> float | str:
        """As JSON carries it: a fraction as a number, tokens and bytes as text."""
        return float(self.amount) if self.kind == "fraction" else str(self)

    def __str__(self) -> str:
        amount = 100 * self.amount if self.kind == "share" else self.amount
        number = int(amount) if amount.denominator == 1 else float(amount)
        return f"{number}{ {'fraction': '', 'tokens': 'tok', 'bytes': 'B', 'share': '%bytes'}[self.kind] }"


def round_half_up(x: Fraction) -> int:
    """Nearest integer; halves go up (Python's own `round` sends them to even)."""
    return int(x + Fraction(1, 2))


def parse_keep(value: "str | float | int | Keep") -> Keep:
    """Parse `keep`. Raises BadInput on anything that is not a fraction or share in (0, 1], tokens or bytes."""
    if isinstance(value, Keep):
        return value
    if isinstance(value, bool) or not isinstance(value, str | Real):
        raise BadInput(f"keep={shown(value)} is not understood. {_ADVICE}.")
    try:  # of a number the shortest decimal, as it was written
        text = value.strip() if isinstance(value, str) else repr(float(value))
    except OverflowError as error:
        raise BadInput(f"the number given as keep is too large. {_ADVICE}.") from error
    match = _WRITTEN.fullmatch(text) if len(text) <= LONGEST else None
    if match is None or (match[2] is not None and match[2] not in {"tok", "%", "%bytes", *UNITS}):
        raise BadInput(f"keep={shown(value)} is not understood. {_ADVICE}.")
    number, unit = Fraction(match[1]), match[2]
    if unit == "%bytes":
        return replace(_fraction(number / 100, value, ""), kind="share")
    if unit is None or unit == "%":
        return _fraction(number / (100 if unit else 1), value, "" if unit else _meant(number))
    if number <= 0:
        raise BadInput(f"keep={value!r} keeps nothing. {_ADVICE}.")
    amount = number * (1 if unit == "tok" else UNITS[unit])
    if amount >= MOST:
        raise BadInput(f"keep={value!r} is more than there can be. {_ADVICE}.")
    return Keep(kind="tokens" if unit == "tok" else "bytes", amount=amount)


def parse_fraction(text: str, what: str) -> float:
    """Parse a fraction such as `0.15` or `15%`, where tokens and bytes mean nothing. Raises BadInput, naming `what`."""
    keep = parse_keep(text)
    if keep.kind != "fraction":
        raise BadInput(f"{what}={shown(text)}: write fractions strictly between 0 and 1, such as 0.15 or 15%.")
    return float(keep.amount)


def parse_bytes(text: str) -> int:
    """Parse a memory size such as `24GiB`."""
    try:
        keep = parse_keep(text)
    except BadInput:
        keep = None
    if keep is None or keep.kind != "bytes":
        raise BadInput(f"{shown(text)} is not a size in bytes; write for instance 24GiB (units: {', '.join(UNITS)}).")
    return int(keep.amount)


def parse_tokens(text: str | int) -> int:
    """Parse a number of tokens such as `4096`, `128k` (times 1024) or `1M`."""
    written = text.strip() if isinstance(text, str) else str(min(text, MOST_TOKENS + 1))
    match = re.fullmatch(r"(\d{1,12})\s*([kKmM]?)", written)
    tokens = int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()] if match else 0
    if not 1 <= tokens <= MOST_TOKENS:
        raise BadInput(
            f"{shown(written)} is not a number of tokens from 1 to {MOST_TOKENS // 1024**2}M; write for instance 4096 "
            "or 128k."
        )
    return tokens


def _fraction(number: Fraction, value: object, hint: str) -> Keep:
    if not 0 < number <= 1:
        raise BadInput(f"keep={value!r} is outside (0, 1]. {hint}{_ADVICE}.")
    return Keep(kind="fraction", amount=number)


def _meant(number: Fraction) -> str:
    """What a number without a unit may have been meant for."""
    if not 1 < number < 10**9:
        return ""
    text = f"{float(number):.15g}"
    percent = f"'{text}%' for percent, or " if number <= 100 else ""
    return f"Write {percent}'{text}tok' for tokens per KV head: "
