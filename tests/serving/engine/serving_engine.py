"""For tests that serve the bundled model with vLLM: prompts, expected tokens, engines in their own processes."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import headwise
from headwise.serving import Served, Settings, equivalent, vllm_arguments
from headwise.tasks.suites import Sizes, make_tasks, parse_tasks

MODEL = str(Path(headwise.__file__).parent / "reference")
DRIVE = Path(__file__).with_name("drive.py")
LONGEST = 2048  # tokens, prompt and answer
LONG_COUNT = 90  # enough for answers to need blocks that are not there
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
def compressed_tokens(
    prompts: list[list[int]],
    method: str,
    keep: float,
    count: int,
    block: int,
    *,
    ranks: int = 1,
    model: Any = None,
    longest: int = LONGEST,
) -> list[list[int]]:
    """What transformers answers after `headwise.compress` has kept what a server would keep of each prompt.

    The first token is that of the whole prompt, as in the server: nothing is cut before it.
    """
    model = model or reference_model()
    served = Served.of(Settings(method=method, keep=keep), model.config, longest, ranks)
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


# What is served, by name. Made when asked for: prompts need the tokenizer.
LUKV, LKV, SNAPKV = ("keydiff+lukv", 0.2), ("lkv", 0.2), ("snapkv", 0.2)
MIXED = ((200, 500, 900, 1400), 2)  # 56 prompts
FEWER = ((200, 500, 900), 1)  # 21
SHORT = ((200,), 2)  # 14
COUNT = 16  # tokens of an answer
TIGHT = {"max_model_len": 1100, "num_gpu_blocks_override": 1750}


def _job(method: tuple[str, float] | None, prompts: list[list[int]], count: int = COUNT, **engine: Any) -> dict:
    ranks = engine.pop("ranks", None)
    arguments = {} if method is None else vllm_arguments(method[0], keep=method[1], context=LONGEST, ranks=ranks)
    batch = {"max_num_batched_tokens": 512, "max_num_seqs": 16}
    return {"engine": {**arguments, **batch, **engine}, "prompts": prompts, "max_tokens": count}


def _random_prompts(count: int, longest: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(5, 500) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def long_prompts(count: int) -> list[list[int]]:
    """Of 1900 tokens each: speed does not depend on what they say."""
    rng = random.Random(1)
    return [[rng.randrange(5, 500) for _ in range(1900)] for _ in range(count)]


JOBS: dict[str, Callable[[], dict[str, Any]]] = {
    "mixed": lambda: _job(LUKV, mini_ruler_prompts(*MIXED)),
    "ranks": lambda: _job(LKV, mini_ruler_prompts(*FEWER), tensor_parallel_size=2, num_gpu_blocks_override=20000),
    "one for two": lambda: _job(LKV, mini_ruler_prompts(*FEWER), ranks=2, num_gpu_blocks_override=20000),
    "lkv": lambda: _job(LKV, mini_ruler_prompts(*FEWER)),
    "ahead": lambda: _job(LKV, mini_ruler_prompts(*FEWER), async_scheduling=True),
    "aborted": lambda: {**_job(LUKV, _random_prompts(500, 200), count=6), "aborts": 0.06, "spread": True},
    "chunks": lambda: _job(SNAPKV, mini_ruler_prompts(*FEWER), max_num_batched_tokens=48),
    "preempted": lambda: _job(LKV, mini_ruler_prompts(*SHORT), LONG_COUNT, **TIGHT),
    "all kept": lambda: _job(("keydiff+lukv", 1.0), mini_ruler_prompts(*FEWER), block_size=32),
    "stock": lambda: _job(None, mini_ruler_prompts(*FEWER), block_size=32),
    "pyramid": lambda: _job(("knorm+pyramid", 0.25), mini_ruler_prompts(*FEWER)[::3]),
    "long": lambda: _job(LUKV, mini_ruler_prompts((1700,), 1)[:1]),
}
