"""For tests that serve the bundled model with vLLM: prompts, expected tokens, engines in their own processes."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import headwise
from headwise.evals.suites import Sizes, make_tasks, parse_tasks
from headwise.serving import Served, Settings, equivalent

MODEL = str(Path(headwise.__file__).parent / "reference")
DRIVE = Path(__file__).with_name("drive.py")
LONGEST = 2048  # tokens, prompt and answer
BLOCK = 16
TASKS = "mini-ruler:niah_single,niah_multikey,niah_multivalue,niah_multiquery,vt,cwe,fwe"


@cache
def mini_ruler_prompts(lengths: tuple[int, ...], each: int) -> list[list[int]]:
    """Whole prompts, context and question, of several lengths and tasks, from the evaluation's seeds."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompts = []
    for length in lengths:
        for task in make_tasks(parse_tasks(TASKS), tokenizer, Sizes(samples=each, length=length)):
            for index in range(each):
                sample = task.sample(index)
                prompts.append(tokenizer(sample.context + sample.questions[0].prompt).input_ids)
    return prompts


@cache
def reference_model() -> Any:
    """The bundled model, in transformers."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


@torch.no_grad()
def compressed_tokens(prompts: list[list[int]], method: str, keep: float, count: int, block: int) -> list[list[int]]:
    """What transformers answers after `headwise.compress` has kept what a server would keep of each prompt.

    The first token is that of the whole prompt, as in the server: nothing is cut before it.
    """
    model = reference_model()
    served = Served.of(Settings(method=method, keep=keep), model.config, LONGEST)
    answers = []
    for ids in prompts:
        context = torch.tensor([ids])
        first = model(input_ids=context, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        how, kept = equivalent(served, len(ids), block)
        cache = headwise.compress(model, context, how, keep=kept)
        given = torch.cat([context, first], dim=-1)
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            past_key_values=cache,
            max_new_tokens=count - 1,
            do_sample=False,
            eos_token_id=None,
        )
        answers.append(out[0, len(ids) :].tolist())
    return answers


def drive(folder: Path, **job: Any) -> dict[str, Any]:
    """Serve a job in an engine of its own; see drive.py."""
    path = folder / "result.json"
    job["engine"] = {"model": MODEL, "block_size": BLOCK, "enable_prefix_caching": False, **job["engine"]}
    run = subprocess.run(
        [sys.executable, str(DRIVE), str(path)], input=json.dumps(job), capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(path.read_text())
