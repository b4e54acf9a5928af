"""The reference model's card, written from what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from transformers import LlamaForCausalLM

from headwise.tasks.mini_ruler.suite import TASKS

from .measure import HEAD_STUDY_LENGTH, NUM_HEAD_STUDY_SAMPLES, PROBED_LENGTH, TRAINED_LENGTHS, HeadRoles, Measurements

SHOWN_KEPT_HEADS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20)


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """The command that trained the model, and what it does not tell."""

    command: str
    note: str


def write_card(model: LlamaForCausalLM, measurements: Measurements, provenance: Provenance) -> str:
    """Return the card as Markdown."""
    return "\n\n".join(
        [
            _introduction(model),
            _training(provenance),
            _accuracy(measurements),
            _heads(measurements.heads),
            _limits(),
        ]
    )


def _introduction(model: LlamaForCausalLM) -> str:
    config = model.config
    return f"""# The headwise reference model

A small language model that really retrieves: it lets the demo, the tests and the benchmarks of headwise run without a
network. Llama architecture, plain random initialisation, trained on a CPU.

| | |
|---|---|
| parameters | {model.num_parameters() / 1e6:.2f} million, bfloat16, tied embeddings |
| layers | {config.num_hidden_layers} |
| query heads, KV heads per layer | {config.num_attention_heads}, {config.num_key_value_heads} |
| head dimension | {config.head_dim} |
| hidden size, MLP | {config.hidden_size}, {config.intermediate_size} |
| vocabulary | {config.vocab_size} tokens, each an English word or a punctuation mark |

It reads a document written by `headwise.tasks.mini_ruler.suite` and answers one question placed right after it:

    the road to the tall castle was dusty. locker marble copper lantern. the marble was near the old gate.
    ? locker marble                                                                       -> copper lantern

`AutoModelForCausalLM` and `AutoTokenizer` load it from this directory. `demo.txt` is a document, `demo.jsonl` its
questions and answers; they come from seeds of their own, apart from training and evaluation."""


def _training(provenance: Provenance) -> str:
    return f"""## How it was trained

On one CPU core, in two stages: copying (random segments that repeat, tables that are queried), then the tasks at
lengths 64 to 1024. Muon for the matrices, AdamW for the rest, bfloat16 weights with float32 masters.
`training_log.jsonl` is the whole log; its minutes are of training alone. The command, run in the repository's root:

    {provenance.command}

{provenance.note}""".rstrip()


def _accuracy(measurements: Measurements) -> str:
    lengths = (*TRAINED_LENGTHS, PROBED_LENGTH)
    rows = [[task, *(f"{measurements.accuracy[task, length]:.3f}" for length in lengths)] for task in TASKS]
    last = measurements.num_samples - 1
    versions = f"torch {torch.__version__} and transformers {transformers.__version__}"
    return f"""## How well it answers

Mean score of greedy generation by length in tokens, over the first questions of evaluation samples 0 to {last}
(seed 0). A score is the share of the right phrases that the answer contains. Length {PROBED_LENGTH} was never
trained, and is probed with an eighth of the samples. Measured in bfloat16 on a CPU with {versions}.

{_table(["task", *map(str, lengths)], rows)}"""


def _heads(heads: HeadRoles) -> str:
    rows = [[str(layer), *(f"{value:.2f}" for value in values)] for layer, values in enumerate(heads.without)]
    fewest = {kept: accuracy for kept, accuracy in reversed(heads.with_fewest) if kept in SHOWN_KEPT_HEADS}
    accuracies = [f"{accuracy:.2f}" for accuracy in fewest.values()]
    return f"""## Which KV heads matter

Accuracy on niah_multikey_dense at length {HEAD_STUDY_LENGTH} when one KV head of one layer loses the whole context
but its first token, over {NUM_HEAD_STUDY_SAMPLES} samples; with nothing evicted it is {heads.nothing_evicted:.2f}.

{_table(["layer", *(f"head {head}" for head in range(heads.without.shape[1]))], rows)}

Accuracy when heads lose their context one after the other, always the one that is missed least:

{_table(["heads left", *map(str, fewest)], [["accuracy", *accuracies]])}"""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _limits() -> str:
    return """## What it cannot do

It knows the sentence patterns of its own lexicon and nothing else: no general text, no instructions, no other question
forms. Words outside the vocabulary become `<unk>`. It is a test bed for cache compression; a method that wins here has
yet to be shown on a real model.
"""
