"""Tests with vLLM itself, in its own environment (`make test-vllm`). Engines run in processes of their own."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from serving_engine import JOBS, drive

AT_ONCE = 2  # engines, on as many cores


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory):
    """What happened when a job of JOBS was served. All of them start with the first that is asked for."""
    pool = ThreadPoolExecutor(AT_ONCE)
    running: dict[str, Future[dict[str, Any]]] = {}

    def result(name: str) -> dict[str, Any]:
        if not running:
            for job in JOBS:
                running[job] = pool.submit(drive, tmp_path_factory.mktemp(job), **JOBS[job]())
        return running[name].result()

    yield result
    pool.shutdown(cancel_futures=True)
