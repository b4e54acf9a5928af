"""From a finished run to the files users load: weights, tokenizer, training log, model card and the demo document."""

import json
import shutil
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from headwise.tasks.mini_ruler.lexicon import REFERENCE_LEXICON
from headwise.tasks.mini_ruler.suite import Question, seeded_generator

from .asking import MIXED, mixed_document
from .card import Provenance, write_card
from .measure import measure
from .tokenizer import build_tokenizer

STAGES = ("copying", "asking")
DEMO_LENGTH = 900
NUM_DEMO_LOOKUPS = 18
NUM_DEMO_OTHERS = 4  # of each other kind
DEMO_WIDTH = 100


def export(run: Path, to: Path, *, provenance: Provenance, num_samples: int) -> None:
    """Write everything beside `to` first, measure what was written, then move the files in."""
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent) as directory:
        staged = Path(directory)
        save_model(run, staged)
        write_log(run, staged / "training_log.jsonl")
        write_demo(staged)
        measurements = measure(staged, num_samples=num_samples)
        model = LlamaForCausalLM.from_pretrained(staged)
        (staged / "README.md").write_text(write_card(model, measurements, provenance))
        for file in staged.iterdir():
            file.chmod(0o644)
            shutil.move(file, to / file.name)


def save_model(run: Path, to: Path) -> None:
    """Write the last stage's model in bf16, its generation settings and the tokenizer."""
    checkpoint = torch.load(run / STAGES[-1] / "checkpoint.pt", weights_only=True)
    model = LlamaForCausalLM(LlamaConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.bfloat16().save_pretrained(to)
    build_tokenizer().save_pretrained(to)


def write_log(run: Path, to: Path) -> None:
    """Join the stages' logs, each line marked with its stage."""
    lines = [
        json.dumps({"stage": stage} | json.loads(line))
        for stage in STAGES
        for line in (run / stage / "training_log.jsonl").read_text().splitlines()
    ]
    to.write_text("\n".join(lines) + "\n")


def write_demo(to: Path) -> None:
    """Write one mixed document and its questions; no other split has the seed of this one."""
    rng = seeded_generator("demo", task=MIXED, length=DEMO_LENGTH, seed=0, index=0)
    document = mixed_document(rng, DEMO_LENGTH)
    lines = [
        json.dumps({"question": asked.prompt, "answers": asked.answers})
        for asked in _demo_questions(document.questions)
    ]
    (to / "demo.txt").write_text(textwrap.fill(document.context, DEMO_WIDTH) + "\n")
    (to / "demo.jsonl").write_text("\n".join(lines) + "\n")


def _demo_questions(questions: Sequence[Question]) -> list[Question]:
    """Take some of each kind, mostly plain lookups; the document answers many more."""
    by_kind: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        kind = question.prompt.split()[1]
        by_kind[kind].append(question)
    most = {REFERENCE_LEXICON.lookup.question.split()[1]: NUM_DEMO_LOOKUPS}
    return [question for kind, asked in by_kind.items() for question in asked[: most.get(kind, NUM_DEMO_OTHERS)]]
