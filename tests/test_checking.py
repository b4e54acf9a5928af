"""The checks of annotations that all other tests run under."""

import importlib
import sys
from dataclasses import FrozenInstanceError

import pytest
import torch
from checking import check_calls
from jaxtyping import TypeCheckError

SOURCE = '''
"""What is wrong with a call shows when it is made."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, no_type_check

from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from nowhere import Unknown


def add(x: Float[Tensor, "rows columns"], y: Float[Tensor, "rows"]) -> Float[Tensor, "rows columns"]:
    return later(x, y)


def later(x: Float[Tensor, "columns rows"], y: "Tensor") -> Tensor:
    return x + y[:, None]


def first(x: Float[Tensor, "rows columns"]) -> Float[Tensor, "columns"]:
    return x[:, 0]


def outer(number: int) -> int:
    def inner(text: str) -> str:
        return text

    return len(inner(number))


def unknown(x: "Unknown", number: "int" = 0) -> int:
    return number


def count(x: Int[Tensor, "rows"]) -> Iterator[Float[Tensor, "rows"]]:
    for length in range(3):
        yield x.new_zeros(length).float()


@no_type_check
def anything(number: int) -> str:
    return number


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    left: Float[Tensor, "size"]
    right: Float[Tensor, "size"]
    names: tuple[str, ...] = field(default=())

    @property
    def wrong(self) -> int:
        return self.names

    @classmethod
    def of(cls, size: int) -> "Pair":
        return cls(left=size, right=size)

    @staticmethod
    def add(number: int) -> int:
        return str(number)


@dataclass(frozen=True, kw_only=True, slots=True)
class Triple(Pair):
    pass


class Plain:
    def __init__(self, number: int) -> None:
        self.number = number

    @cached_property
    def text(self) -> str:
        return self.number
'''


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checked")
    (folder / "wrongly_called.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "meta_path", [*sys.meta_path])
        patch.syspath_prepend(folder)
        check_calls("wrongly_called")
        yield importlib.import_module("wrongly_called")
        del sys.modules["wrongly_called"]


def test_what_fits_goes_through(module):
    assert module.add(torch.zeros(2, 2), torch.ones(2)).equal(torch.ones(2, 2))
    assert module.add(torch.zeros(2, 3), torch.ones(2)).equal(torch.ones(2, 3))
    assert module.first(torch.zeros(3, 3)).shape == (3,)
    assert module.unknown(None) == 0
    assert module.anything(3) == 3
    assert [len(x) for x in module.count(torch.zeros(5, dtype=torch.int64))] == [0, 1, 2]
    pair = module.Pair(left=torch.zeros(2), right=torch.zeros(2), names=("a", "b"))
    with pytest.raises(FrozenInstanceError):
        pair.names = ()
    assert module.Triple(left=torch.zeros(2), right=torch.zeros(2)).names == ()


@pytest.mark.parametrize(
    "call",
    [
        lambda module: module.add(torch.zeros(2, 3), torch.zeros(3)),
        lambda module: module.add(torch.zeros(2), torch.zeros(2)),
        lambda module: module.add(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2)),
        lambda module: module.later(torch.zeros(2, 3), 3),
        lambda module: module.first(torch.zeros(2, 3)),
        lambda module: module.outer(3),
        lambda module: module.unknown(None, number="three"),
        lambda module: module.Pair(left=torch.zeros(2), right=torch.zeros(3)),
        lambda module: module.Pair(left=torch.zeros(2), right=torch.zeros(2), names=(1,)),
        lambda module: module.Pair(left=torch.zeros(2), right=torch.zeros(2)).wrong,
        lambda module: module.Pair.of(3),
        lambda module: module.Pair.add(3),
        lambda module: module.Triple(left=torch.zeros(2), right=torch.zeros(3)),
        lambda module: module.Plain("3"),
        lambda module: module.Plain(3).text,
        lambda module: list(module.count(torch.zeros(5))),
    ],
)
def test_what_does_not_fit_is_an_error(module, call):
    with pytest.raises(TypeCheckError):
        call(module)
