"""All that the model card reports: accuracy per task and length, and which KV heads matter."""

import os
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from headwise.tasks.mini_ruler.suite import TASKS

from .evaluation import accuracy
from .heads import HeadStudy, dense_rows

TRAINED_LENGTHS = (128, 256, 512, 1024)
PROBED_LENGTH = 2048  # never trained; an eighth of the samples
HEAD_STUDY_LENGTH = 512
NUM_HEAD_STUDY_SAMPLES = 64


@dataclass(frozen=True, kw_only=True)
class HeadRoles:
    """Accuracy on niah_multikey_dense under eviction of whole heads."""

    nothing_evicted: float
    without: np.ndarray  # [layers, heads], one head evicted
    with_fewest: list[tuple[int, float]]  # heads kept, accuracy


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What was measured, and on how many samples."""

    num_samples: int
    accuracy: Mapping[tuple[str, int], float]  # (task, length)
    heads: HeadRoles


def measure(directory: Path, *, num_samples: int) -> Measurements:
    """Measure a saved model in one process per core, which takes about ten minutes on two for 200 samples."""
    cells = [(task, length) for length in (PROBED_LENGTH, *reversed(TRAINED_LENGTHS)) for task in TASKS]
    # Processes that are forked after torch has computed may hang.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        heads = pool.submit(_study_heads, directory)
        values = pool.map(partial(_measure_cell, directory, num_samples), cells)
        return Measurements(
            num_samples=num_samples, accuracy=dict(zip(cells, values, strict=True)), heads=heads.result()
        )


def _measure_cell(directory: Path, num_samples: int, cell: tuple[str, int]) -> float:
    task, length = cell
    samples = num_samples // 8 if length == PROBED_LENGTH else num_samples
    value = accuracy(*_load(directory), task, length=length, num_samples=samples)
    print(f"{task} at {length}: {value:.3f}", file=sys.stderr, flush=True)
    return value


def _study_heads(directory: Path) -> HeadRoles:
    model, _ = _load(directory)
    study = HeadStudy(model, dense_rows(length=HEAD_STUDY_LENGTH, num_samples=NUM_HEAD_STUDY_SAMPLES))
    return HeadRoles(
        nothing_evicted=study.accuracy(np.zeros(study.shape, bool)),
        without=study.accuracy_without_each(),
        with_fewest=study.accuracy_with_fewest(),
    )


def _load(directory: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    return cast(LlamaForCausalLM, model), cast(PreTrainedTokenizerFast, tokenizer)
