"""Train the bundled reference model from scratch on a CPU, measure it and export it.

Copying first, then the mini-RULER tasks: once a model of plain random initialisation can copy, the tasks come quickly.
Training resumes where it stopped. One thread each; two runs fit on two cores.

Example:

    python recipes/reference_model.py train --seed 1 --minutes 103 --out runs/reference
    python recipes/reference_model.py export --run runs/reference --to src/headwise/reference
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from reference_training.asking import LISTINGS, MIXED, asking_batch
from reference_training.card import Provenance
from reference_training.copying import copying_batch
from reference_training.export import export
from reference_training.tokenizer import LONGEST_INPUT
from reference_training.trainer import Batch, Schedule, Trainer, new_model
from transformers import LlamaConfig, LlamaForCausalLM

from headwise.tasks.mini_ruler.lexicon import BOS, EOS, PAD, REFERENCE_VOCABULARY

COPYING_SHARE = 0.17  # of the minutes
COPYING_TOKENS_PER_STEP = 4096
COPYING_LENGTHS = {0.0: 64, 0.55: 128, 0.7: 256}  # from this share of the stage on
AMBIGUOUS_FROM = 0.15
ASKING_TOKENS_PER_STEP = 8192
ASKING_LENGTHS = {0.0: 64, 0.06: 128, 0.16: 256, 0.28: 512, 0.5: 1024}
LONGEST_LENGTH_SHARE = 0.7  # of the steps
SHORTEST_MIXED_LENGTH = 256
TASK_MIX = {
    "niah_single": 0.02,
    "niah_multikey": 0.02,
    "niah_multikey_dense": 0.16,
    "niah_multivalue": 0.26,
    LISTINGS: 0.2,
    "niah_multiquery": 0.04,
    "vt": 0.04,
    "cwe": 0.1,
    "fwe": 0.1,
    MIXED: 0.06,
}
# Answers in any order are the last to be learned: what was given must not be given again.
TASK_MIX_OF_SHORTER = TASK_MIX | {
    "niah_multikey_dense": 0.08,
    LISTINGS: 0.2,
    "niah_multiquery": 0.05,
    "vt": 0.04,
    "cwe": 0.3,
    "fwe": 0.2,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The sizes of the model that can be chosen."""

    layers: int = 6
    kv_heads: int = 4
    hidden: int = 128
    mlp: int = 384


def model_config(shape: Shape) -> LlamaConfig:
    """Describe a Llama model with two query heads per KV head and tied embeddings."""
    token_ids = {word: index for index, word in enumerate(REFERENCE_VOCABULARY)}
    return LlamaConfig(
        vocab_size=len(REFERENCE_VOCABULARY),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.mlp,
        num_attention_heads=2 * shape.kv_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=32,
        max_position_embeddings=LONGEST_INPUT,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        pad_token_id=token_ids[PAD],
        bos_token_id=token_ids[BOS],
        eos_token_id=token_ids[EOS],
    )


def train_copying(shape: Shape, out: Path, *, seed: int, minutes: float) -> LlamaForCausalLM:
    """Stage 1: from random weights to a model that copies."""

    def make_batch(rng: np.random.Generator, progress: float) -> Batch:
        length = at_progress(COPYING_LENGTHS, progress)
        return copying_batch(
            rng,
            rows=COPYING_TOKENS_PER_STEP // length,
            length=length,
            vocab_size=len(REFERENCE_VOCABULARY),
            ambiguous=progress > AMBIGUOUS_FROM,
        )

    schedule = Schedule(minutes=minutes, muon_lr=0.01, adam_lr=2e-3)
    return Trainer(new_model(model_config(shape), seed=seed), schedule, out / "copying", seed=seed).run(make_batch)


def train_asking(model: LlamaForCausalLM, out: Path, *, seed: int, minutes: float) -> LlamaForCausalLM:
    """Stage 2: from a model that copies to one that answers all the tasks."""

    def make_batch(rng: np.random.Generator, progress: float) -> Batch:
        longest = at_progress(ASKING_LENGTHS, progress)
        length = draw_length(rng, longest)
        mix = TASK_MIX if length == longest else TASK_MIX_OF_SHORTER
        mix = {task: share for task, share in mix.items() if task != MIXED or length >= SHORTEST_MIXED_LENGTH}
        return asking_batch(rng, rows=ASKING_TOKENS_PER_STEP // length, length=length, mix=mix, seed=seed)

    schedule = Schedule(minutes=minutes, muon_lr=0.02, adam_lr=3e-3, decay_share=0.5)
    return Trainer(model, schedule, out / "asking", seed=seed).run(make_batch)


def draw_length(rng: np.random.Generator, longest: int) -> int:
    """Draw the length of a step: mostly the longest, else a shorter one, whose many rows supervise more answers."""
    shorter = [length for length in ASKING_LENGTHS.values() if length < longest]
    return longest if not shorter or rng.random() < LONGEST_LENGTH_SHARE else int(rng.choice(shorter))


def at_progress(starts: Mapping[float, int], progress: float) -> int:
    """Return the value of the last start that `progress` has reached."""
    return starts[max(start for start in starts if start <= progress)]


def main() -> None:
    """Run the command line."""
    options = _read_command_line()
    if options.command == "train":
        torch.set_num_threads(1)
        shape = Shape(layers=options.layers, kv_heads=options.kv_heads, hidden=options.hidden, mlp=options.mlp)
        copying_minutes = COPYING_SHARE * options.minutes
        model = train_copying(shape, options.out, seed=options.seed, minutes=copying_minutes)
        train_asking(model, options.out, seed=options.seed, minutes=options.minutes - copying_minutes)
    else:
        provenance = Provenance(command=options.trained_by, note=options.note)
        export(options.run, options.to, provenance=provenance, num_samples=options.samples)


def _read_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train both stages, or resume")
    train.add_argument("--seed", type=int, default=1)
    train.add_argument("--minutes", type=float, default=103.0, help="of training, both stages together")
    train.add_argument("--out", type=Path, required=True, help="directory for checkpoints and logs")
    for name, value in asdict(Shape()).items():
        train.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    package = commands.add_parser("export", help="measure a trained model and write all its files")
    package.add_argument("--run", type=Path, required=True, help="the --out of train")
    package.add_argument("--to", type=Path, required=True, help="directory whose files are replaced")
    package.add_argument("--samples", type=int, default=200, help="per task and length")
    package.add_argument("--trained-by", default="", help="the train command, for the model card")
    package.add_argument("--note", default="", help="what else a reader of the card must know about this run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
