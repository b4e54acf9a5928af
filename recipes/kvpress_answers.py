"""Answer with kvpress what recipes/compare_kvpress.py has written down: the half that runs in kvpress's environment.

    python recipes/kvpress_answers.py JOB.json ANSWERS.jsonl

Prompts are token ids, so that both sides read the same. A context is compressed before any question is known, as in
kvpress's own pipeline; greedy answers follow. What is in ANSWERS.jsonl already is not answered again.
"""

import copy
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import kvpress  # pyright: ignore[reportMissingImports]
import torch
from transformers import AutoModelForCausalLM, DynamicCache

PRESSES: Mapping[str, Callable[[float, Mapping[str, Any]], Any]] = {
    "full": lambda removed, snapkv: None,
    "snapkv": lambda removed, snapkv: kvpress.SnapKVPress(removed, **snapkv),
    "adakv": lambda removed, snapkv: kvpress.AdaKVPress(kvpress.SnapKVPress(removed, **snapkv)),
    "keydiff": lambda removed, snapkv: kvpress.KeyDiffPress(removed),
    "expected": lambda removed, snapkv: kvpress.ExpectedAttentionPress(removed),
    "kvzip": lambda removed, snapkv: kvpress.KVzipPress(removed),
}


def main() -> None:
    """Every sample with every press."""
    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    done = {tuple(json.loads(line)["of"]) for line in out.read_text().splitlines()} if out.exists() else set()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
    with out.open("a") as file:
        for sample in job["samples"]:
            for name in job["presses"]:
                of = (*sample["of"], name)
                if of in done:
                    continue
                press = PRESSES[name](1 - job["keep"], job["snapkv"])
                file.write(json.dumps({"of": of, "answers": answers(model, press, sample)}) + "\n")
                file.flush()
                print(*of, file=sys.stderr)


@torch.no_grad()
def answers(model: Any, press: Any, sample: Mapping[str, Any]) -> list[list[int]]:
    """Token ids of a greedy answer to every question of a sample."""
    context, cache = torch.tensor([sample["context"]]), DynamicCache()
    with press(model) if press is not None else nullcontext():
        model.model(input_ids=context, past_key_values=cache)
    return [
        answer(model, copy.deepcopy(cache), question, context.shape[1], sample["max_new_tokens"])
        for question in sample["questions"]
    ]


def answer(model: Any, cache: DynamicCache, question: list[int], position: int, most: int) -> list[int]:
    """A greedy answer: positions go on after the whole context, whatever is left of it in the cache."""
    ends = model.generation_config.eos_token_id
    ends, said, new = ends if isinstance(ends, list) else [ends], [], question
    while len(said) < most:
        positions = torch.arange(position, position + len(new))[None]
        out = model(input_ids=torch.tensor([new]), past_key_values=cache, position_ids=positions, logits_to_keep=1)
        position += len(new)
        new = [int(out.logits[0, -1].argmax())]
        said += new
        if new[0] in ends:
            break
    return said


if __name__ == "__main__":
    main()
