"""Run one vLLM engine in a process of its own: a job (JSON) on stdin, what happened (JSON) into the file named.

The engine's steps are taken one by one, so that the scheduler's own counters can be read between them.
"""

import json
import os
import random
import sys
import time
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # two ranks, and other processes, share the cores
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
)


class Watch:
    """Reads the scheduler's block pool after every step."""

    def __init__(self, engine: Any):
        self.scheduler = engine.engine_core.engine_core.scheduler
        self.manager = self.scheduler.kv_cache_manager
        self.pool = self.manager.block_pool
        self.free_at_start = self.pool.get_num_free_blocks()
        self.steps: list[dict[str, Any]] = []
        self.preempted = 0
        self._scheduled: dict[str, int] = {}
        self._wrap()

    def _wrap(self) -> None:
        schedule = self.scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            out = schedule(*args, **kwargs)
            self._scheduled = dict(out.num_scheduled_tokens)
            self.preempted += len(out.preempted_req_ids or ())
            return out

        self.scheduler.schedule = watched

    @property
    def used(self) -> int:
        """Blocks that are not free."""
        return self.free_at_start - self.pool.get_num_free_blocks()

    def note(self, seconds: float) -> None:
        """After a step."""
        running = list(self.scheduler.running)
        decoding = [r for r in running if r.num_computed_tokens > r.num_prompt_tokens]
        self.steps.append(
            {
                "used": self.used,
                "expected": sum(self._expected(r) for r in running),
                "running": len(running),
                "decoding": len(decoding),
                "tokens": sum(self._scheduled.values()),
                "seconds": seconds,
            }
        )

    def _expected(self, request: Any) -> int:
        """Blocks that a running request should hold: those of its tokens, less those its prompt has given back."""
        computed, prompt = request.num_computed_tokens, request.num_prompt_tokens
        cut = computed - self._scheduled.get(request.request_id, 0) >= prompt
        total = 0
        for group in self.manager.kv_cache_config.kv_cache_groups:
            spec = group.kv_cache_spec
            freed = spec.freed_blocks(prompt) if cut and hasattr(spec, "freed_blocks") else 0
            total += -(-computed // spec.block_size) - freed
        return total


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Make the engine and serve the job's requests; abort some if asked to."""
    from vllm import LLM, SamplingParams

    began = time.perf_counter()
    llm = LLM(**{"dtype": "float32", "max_model_len": 2048, "enforce_eager": True, **job["engine"]})
    loaded = time.perf_counter() - began
    engine = llm.llm_engine
    watch = Watch(engine)
    order = random.Random(0)
    tokens: dict[str, list[int]] = {}
    aborted: list[str] = []
    for number, ids in enumerate(job["prompts"]):
        sampling = SamplingParams(max_tokens=job["max_tokens"], temperature=0, ignore_eos=True, detokenize=False)
        engine.add_request(str(number), {"prompt_token_ids": ids}, sampling)
        while job.get("spread") and order.random() < 0.5:  # some arrive while others are served
            _step(engine, watch, tokens)
            aborted += _abort(engine, watch, order, job.get("aborts", 0.0))
    while engine.has_unfinished_requests():
        _step(engine, watch, tokens)
        aborted += _abort(engine, watch, order, job.get("aborts", 0.0))
    config = watch.manager.kv_cache_config
    return {
        "loaded_seconds": loaded,
        "tokens": [tokens.get(str(n)) for n in range(len(job["prompts"]))],
        "aborted": aborted,
        "steps": watch.steps,
        "used_at_end": watch.used,
        "preempted": watch.preempted,
        "num_blocks": config.num_blocks,
        "pool_bytes": config.kv_cache_tensors[0].size,
        "groups": [
            {"heads": len(g.layer_names), "keep": getattr(g.kv_cache_spec, "keep", None)}
            for g in config.kv_cache_groups
        ],
        "leftover": sum(len(m.req_to_blocks) for m in watch.manager.coordinator.single_type_managers),
    }


def _abort(engine: Any, watch: Watch, order: random.Random, share: float) -> list[str]:
    """Abort some of the requests that wait or run; which ones."""
    alive = sorted({name.split("-")[0] for name in watch.scheduler.requests})
    chosen = [name for name in alive if order.random() < share]
    if chosen:
        engine.abort_request(chosen)
    return chosen


def _step(engine: Any, watch: Watch, tokens: dict[str, list[int]]) -> None:
    began = time.perf_counter()
    outputs = engine.step()
    watch.note(time.perf_counter() - began)
    for output in outputs:
        if output.finished and output.outputs[0].finish_reason != "abort":
            tokens[output.request_id] = list(output.outputs[0].token_ids)


if __name__ == "__main__":
    job = json.load(sys.stdin)
    result = main(job)
    with open(sys.argv[1], "w") as file:
        json.dump(result, file)
