"""Answers by transformers' own model, for oracles: every step over the whole text, every attention matrix complete."""

import copy
from functools import cache

import torch
from families import tiny_model
from transformers import DynamicCache


@cache
def dense_twin(family):
    model = copy.deepcopy(tiny_model(family))
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def decode(family, context, question, steps, end=None):
    """Of every step, per model layer: the last token's attention [query_heads, all]; the values [kv_heads, all, D]."""
    model, ids = dense_twin(family), torch.cat([context, question[None]], dim=-1)
    for _ in range(steps):
        held = DynamicCache(config=model.config)
        out = model(ids, output_attentions=True, past_key_values=held)
        yield [attention[0, :, -1] for attention in out.attentions], [layer.values[0] for layer in held.layers]
        new = out.logits[0, -1].argmax()
        if int(new) == end:
            return
        ids = torch.cat([ids, new.view(1, 1)], dim=-1)


@torch.no_grad()
def greedy_answer(family, context, question, steps):
    model, ids = dense_twin(family), torch.cat([context, question[None]], dim=-1)
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=-1)
    return ids[0, -steps:].tolist()
