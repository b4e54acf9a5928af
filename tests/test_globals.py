"""torch's default device and dtype are the user's: headwise names both wherever it makes a tensor."""

import ast
from pathlib import Path

import headwise

SOURCE = Path(headwise.__file__).parent
MAKERS = {
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn"),
    *("randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}
MODULES = ["Embedding", "LayerNorm", "Linear", "RMSNorm"]


def unnamed(source):
    """(line, call) of every tensor or module of weights that is made without naming device or dtype."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)) if name in MAKERS:
                pass
            case ast.Call(func=ast.Attribute(value=ast.Name(id="nn"), attr=name)) if name in MODULES:
                pass
            case _:
                continue
        missing = {"device", "dtype"} - {keyword.arg for keyword in node.keywords}
        if missing:
            yield node.lineno, f"{name} without {' and '.join(sorted(missing))}"


def test_the_rule_finds_what_it_is_made_for():
    source = "torch.zeros(3)\nnn.Linear(2, 2, device=d)\ntorch.ones(1, device=d, dtype=t)\nx.new_zeros(3)\n"
    assert list(unnamed(source)) == [(1, "zeros without device and dtype"), (2, "Linear without dtype")]


def test_every_tensor_names_its_device_and_dtype():
    found = [
        f"{path.relative_to(SOURCE)}:{line}: {call}"
        for path in sorted(SOURCE.rglob("*.py"))
        for line, call in unnamed(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)
