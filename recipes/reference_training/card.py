"""The reference model's card, written from what was measured."""

import platform

import torch
import transformers
from transformers import LlamaForCausalLM

from headwise.evals.ruler import TASKS

from .heads import RECENT_TOKENS
from .measure import HEAD_STUDY_LENGTH, LENGTHS, NUM_HEAD_STUDY_SAMPLES, Measurements


def write_card(model: LlamaForCausalLM, measurements: Measurements, *, command: str) -> str:
    """Return the card as Markdown."""
    return "\n\n".join(
        [
            _introduction(model),
            _training(command),
            _accuracy(measurements),
            _heads(measurements),
            _limits(),
        ]
    )


def _introduction(model: LlamaForCausalLM) -> str:
    config = model.config
    return f"""# The headwise reference model

A small language model that really retrieves: it lets the demo, the tests and the benchmarks of headwise run without a
network. It is a Llama-architecture model of {model.num_parameters() / 1e6:.2f} million parameters in bfloat16:
{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.num_attention_heads} query heads and
{config.num_key_value_heads} KV heads of {config.head_dim}, MLP {config.intermediate_size}, tied embeddings, a vocabulary of {config.vocab_size} English words.

It reads a document written by `headwise.evals.ruler` and answers one question placed right after it:

    the road to the tall castle was dusty. locker marble copper lantern. the marble was near the old gate. ? locker marble
    -> copper lantern

`AutoModelForCausalLM` and `AutoTokenizer` load it from this directory. `demo.txt` is a document, `demo.jsonl` its
questions and answers; they come from seeds of their own, apart from training and evaluation."""


def _training(command: str) -> str:
    return f"""## How it was trained

From plain random weights on one CPU core, in two stages: copying (random segments that repeat, tables that are queried),
then the tasks at lengths 64 to 1024. Muon for the matrices, AdamW for the rest, bfloat16 weights with float32 masters.
`training_log.jsonl` is the whole log. The command:

    {command}"""


def _accuracy(measurements: Measurements) -> str:
    header = f"| task | {' | '.join(map(str, LENGTHS))} |\n|---|{'---|' * len(LENGTHS)}"
    rows = [
        f"| {task} | {' | '.join(f'{measurements.accuracy[task, length]:.3f}' for length in LENGTHS)} |"
        for task in TASKS
    ]
    return f"""## How well it answers

Mean score of greedy generation on {measurements.num_samples} evaluation samples per task and length in tokens, one question each (seed 0, the first
question of samples 0 to {measurements.num_samples - 1}; a score is the share of the right phrases found in the answer). Lengths beyond 1024 were
never trained. Measured on {platform.processor() or platform.machine()} with torch {torch.__version__} and transformers {transformers.__version__}.

{header}
{chr(10).join(rows)}"""


def _heads(measurements: Measurements) -> str:
    without = measurements.accuracy_without
    header = f"| layer | {' | '.join(f'head {head}' for head in range(without.shape[1]))} |\n|---|{'---|' * without.shape[1]}"
    rows = [f"| {layer} | {' | '.join(f'{value:.2f}' for value in values)} |" for layer, values in enumerate(without)]
    kept = measurements.accuracy_with_only
    return f"""## Which KV heads matter

Accuracy on niah_multikey_dense at length {HEAD_STUDY_LENGTH} ({NUM_HEAD_STUDY_SAMPLES} samples) when one KV head of one layer loses the whole context but
its first token; with nothing evicted it is {measurements.dense_accuracy:.2f}.

{header}
{chr(10).join(rows)}

Accuracy when only the most needed heads of that table keep their whole context, and all others the first token and the
last {RECENT_TOKENS}:

| heads kept whole | {" | ".join(map(str, kept))} |
|---|{"---|" * len(kept)}
| accuracy | {" | ".join(f"{value:.2f}" for value in kept.values())} |"""


def _limits() -> str:
    return """## What it cannot do

It knows the sentence patterns of its own lexicon and nothing else: no general text, no instructions, no other question
forms. Words outside the vocabulary become `<unk>`. It is a test bed for cache compression; a method that wins here has
yet to be shown on a real model.
"""
