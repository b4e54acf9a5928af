"""How well the reference model answers: greedy generation, one question right after each document."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from headwise.tasks.mini_ruler.lexicon import REFERENCE_LEXICON
from headwise.tasks.mini_ruler.suite import Sample, generate, score

TOKENS_AT_ONCE = 16_384
EVALUATION_SEED = 0


def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: str, *, length: int, num_samples: int
) -> float:
    """Return the mean score over the evaluation samples 0 to `num_samples` - 1, the first question of each."""
    samples = [
        generate(task, lexicon=REFERENCE_LEXICON, length=length, seed=EVALUATION_SEED, index=index, num_questions=1)
        for index in range(num_samples)
    ]
    rows = max(1, TOKENS_AT_ONCE // length)
    batches = [samples[start : start + rows] for start in range(0, num_samples, rows)]
    return float(np.concatenate([_scores(model, tokenizer, batch) for batch in batches]).mean())


@torch.no_grad()
def _scores(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]) -> list[float]:
    texts = [f"{sample.context} {sample.questions[0].prompt}" for sample in samples]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    most = max(sample.max_new_tokens for sample in samples)
    # transformers' own annotation of `self` excludes its models.
    output = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        **inputs, max_new_tokens=most, do_sample=False
    )
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [score(answer, sample.questions[0]) for answer, sample in zip(answers, samples, strict=True)]
