"""The house stays small: short functions, few modules at the root, an hour's reading from README to compress."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "headwise"
READ_FIRST = ("README.md", "docs/concepts.md", "src/headwise/interfaces.py", "src/headwise/methods/registry.py")
READ_FIRST += ("src/headwise/cache/compress.py",)
MODULES = sorted(path for path in SOURCE.rglob("*.py") if "kernels" not in path.parts)


def lines_of(function):
    """Without its docstring, which may be long."""
    lines, first = function.end_lineno - function.lineno + 1, function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_functions_have_at_most_40_lines(path):
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    assert {f.name: lines_of(f) for f in functions if lines_of(f) > 40} == {}


def test_the_root_has_at_most_6_modules():
    assert len(list(SOURCE.glob("*.py"))) <= 6


def test_states_are_seldom_told_apart_by_none():
    asserted = [line for path in SOURCE.rglob("*.py") for line in path.read_text().splitlines()]
    assert sum("assert " in line and "is not None" in line for line in asserted) <= 8


def test_what_is_read_first_has_fewer_than_600_lines():
    assert sum(len((ROOT / name).read_text().splitlines()) for name in READ_FIRST) < 600
