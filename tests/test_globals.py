"""torch's default device and dtype are the user's: headwise names both wherever it makes a tensor."""

import ast
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import headwise
from headwise.artifacts.profile import Profile
from headwise.methods.registry import SCORERS
from headwise.models import loading as models
from headwise.offline.calibration import Example
from headwise.offline.profile import Settings, profile
from headwise.offline.solve import solve
from headwise.offline.train.fit import FitSettings
from headwise.offline.train.loop import Settings as Training
from headwise.offline.train.run import train

WORDS = "locker apple red stone. the key was under the old tower, near a river. "
EXAMPLES = [
    Example(context=f"{opening} {WORDS * 2}", questions=("? locker apple", "? who"))
    for opening in (
        "then",
        "he saw a",
        "she had a",
        "near the",
        "under the",
        "a red",
        "an old",
        "the key",
        "who",
        "all",
    )
]
IDS = torch.randint(10, 300, (1, 130), generator=torch.Generator().manual_seed(0))
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


@contextmanager
def defaults(dtype=torch.float32, device=None):
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


# "meta" stands for a GPU: what is made there by mistake cannot be mixed with what is on the CPU.
OTHERS = {
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "device": {"device": "meta"},
}


@pytest.fixture(scope="module")
def loaded(model_folders):
    return models.load(str(model_folders["qwen3"]), device="cpu")


@pytest.fixture(scope="module")
def bundled_model():
    return models.load("reference")[0]


@pytest.fixture(scope="module")
def plain(loaded, tmp_path_factory):
    """Files as they are made under torch's own defaults."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headwise.offline.train.warm.PROFILED", 1)
        return make_files(loaded, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def kept_by_default(bundled_model):
    return cache(partial(kept, bundled_model, IDS))


def kept(model, ids, method):
    """What stays of a context, and the logits of a question."""
    with torch.no_grad():
        cache = headwise.compress(model, ids, method, keep=0.4)
        logits = model(ids[:, :9], past_key_values=cache.fork()).logits
    layers = range(len(cache.ragged_layers))
    return cache.lengths, torch.cat([cache.positions(layer, 0, 0) for layer in layers]), logits


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("method", [*SCORERS, "snapkv+pyramid", "adakv", "expected+global", "keydiff+lukv", "lkv"])
def test_every_method_keeps_the_same_under_other_defaults(bundled_model, kept_by_default, method, name):
    expected = kept_by_default(method)
    with defaults(**OTHERS[name]):
        found = kept(bundled_model, IDS, method)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_files_are_the_same_under_other_defaults(loaded, plain, tmp_path, monkeypatch, name):
    """A profile, the budget solved from it, gates that were trained, a cache that was saved and loaded."""
    monkeypatch.setattr("headwise.offline.train.warm.PROFILED", 1)
    with defaults(**OTHERS[name]):
        make_files(loaded, tmp_path)
    for file in ("profile", "budget", "gates", "cache"):
        found, expected = (load_file(folder / file) for folder in (tmp_path, plain))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), file


def make_files(loaded, folder):
    torch.manual_seed(0)
    model, _ = loaded
    profile(*loaded, EXAMPLES[:2], ["keydiff", "expected"], folder / "profile", settings=Settings(steps=2, window=3))
    solve(Profile.load(folder / "profile"), "keydiff").save(folder / "budget")
    fit = FitSettings(steps=100, questions=2, answer_tokens=3)
    quick = Training(fit=fit, steps=2, warm_steps=2, contexts_per_step=2, questions=2, answer_tokens=3)
    train(*loaded, EXAMPLES, folder / "gates", settings=quick)
    ids = torch.randint(3, 90, (1, 130), generator=torch.Generator(device="cpu").manual_seed(0), device="cpu")
    headwise.compress(model, ids, f"keydiff+lukv@{folder / 'budget'}", keep=0.4).save(folder / "saved")
    headwise.load(folder / "saved", model, input_ids=ids).save(folder / "cache")
    return folder
