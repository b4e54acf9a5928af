"""All that the model card reports: accuracy per task and length, and which KV heads matter."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from headwise.evals.ruler import TASKS

from .evaluation import accuracy
from .heads import HeadStudy, dense_rows

TRAINED_LENGTHS = (128, 256, 512, 1024)
PROBED_LENGTH = 2048  # never trained; a quarter of the samples
HEAD_STUDY_LENGTH = 512
NUM_HEAD_STUDY_SAMPLES = 64
KEPT_HEADS = (1, 2, 3, 4, 6, 8, 12)


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What was measured, and on how many samples."""

    num_samples: int
    accuracy: Mapping[tuple[str, int], float]  # (task, length)
    dense_accuracy: float  # of the head study, nothing evicted
    accuracy_without: np.ndarray  # [layers, heads]
    accuracy_with_only: Mapping[int, float]  # heads kept


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, num_samples: int) -> Measurements:
    """Measure a model, which takes about ten minutes for 200 samples."""
    accuracies = {}
    for length in (*TRAINED_LENGTHS, PROBED_LENGTH):
        samples = num_samples if length in TRAINED_LENGTHS else num_samples // 4
        for task in TASKS:
            value = accuracy(model, tokenizer, task, length=length, num_samples=samples)
            accuracies[task, length] = value
            print(f"{task} at {length}: {value:.3f}", file=sys.stderr, flush=True)
    study = HeadStudy(model, dense_rows(length=HEAD_STUDY_LENGTH, num_samples=NUM_HEAD_STUDY_SAMPLES))
    without = study.accuracy_without_each()
    dense = study.accuracy(np.zeros(study.shape, bool))
    return Measurements(
        num_samples=num_samples,
        accuracy=accuracies,
        dense_accuracy=dense,
        accuracy_without=without,
        accuracy_with_only={kept: study.accuracy_with_only(kept, dense - without) for kept in KEPT_HEADS},
    )
