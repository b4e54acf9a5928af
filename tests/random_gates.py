"""Gates that were never trained: random budgets and scores, so that heads and entries differ widely."""

from dataclasses import replace

import torch

from headwise.artifacts.gates import EntryScores, Gates, HeadBudgets, summary_width
from headwise.artifacts.origin import Origin
from headwise.methods.allocate import ShippedContest, ShippedLKVH, contest, learned_budgets
from headwise.methods.method import Method
from headwise.methods.scores import ShippedLKVT, learned_scorer
from headwise.models.families import view

PARTS = ("budgets", "scores")


@torch.no_grad()
def scatter(module, seed=0, size=1.0):
    """Random parameters throughout, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in (*module.parameters(), *module.buffers()):
        parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return module.requires_grad_(False)


def make_gates(shape, config_hash="", *, parts=PARTS, seed=0, sink=2, window=5, size=0.5, comparable=False):
    """Gates with these parts for a ModelShape."""
    modules = {}
    if "budgets" in parts:
        modules["budgets"] = scatter(HeadBudgets(shape.num_heads, summary_width(shape)), seed, size)
        modules["budgets"].usual[1] = 1.0
    if "scores" in parts:
        modules["scores"] = scatter(EntryScores(len(shape.layers), shape.kv_heads, shape.head_dim), seed, size)
    origin = Origin(shape=shape, model="a/b", config_hash=config_hash, sink=sink, window=window, calibration="c")
    settings = {"sink": sink, "window": window, "seed": seed}
    return Gates(origin=origin, comparable=comparable, settings=settings, **modules)


def gates_for(model, **options):
    """Gates for a model."""
    seen = view(model)
    return make_gates(seen.shape, seen.config_hash, **options)


def gates_file(folder, model, **options):
    """A file of such gates; a path without "+", which would end a method's scorer."""
    path = folder / f"gates-{len(list(folder.iterdir()))}.safetensors"
    gates_for(model, **options).save(path)
    return path


def method_for(name, model):
    """The method of this name; where its gates would be shipped with headwise, with random ones for the model."""
    method, gates = Method.parse(name), gates_for(model)
    if method.scorer == ShippedLKVT():
        method = replace(method, scorer=learned_scorer(gates))
    if method.allocator == ShippedLKVH():
        method = replace(method, allocator=learned_budgets(gates))
    if method.allocator == ShippedContest():
        method = replace(method, allocator=contest(gates))
    return method
