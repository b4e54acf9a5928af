"""Every family that can be served: tiny random models, the same tokens as in transformers."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import random_ids
from folders import save_model
from serving_engine import compressed_tokens, drive
from transformers import AutoModelForCausalLM

from headwise.serving import vllm_arguments

FAMILIES = ("mistral", "qwen2", "qwen3", "phi3", "phi4_mini")
LONGEST, COUNT, BLOCK = 512, 8, 16  # phi4_mini's frequencies change beyond 512 tokens
METHOD = ("snapkv+pyramid", 0.3)
PROMPTS = [random_ids(1, length, seed=length)[0].tolist() for length in (150, 90, 400, 33)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_model(tmp_path_factory.mktemp(family) / "model", family) for family in FAMILIES}


@pytest.fixture(scope="module")
def served(folders, tmp_path_factory):
    """What happened in an engine for each family."""
    arguments = vllm_arguments(METHOD[0], keep=METHOD[1])
    engine = {"block_size": BLOCK, "max_model_len": LONGEST, "max_num_batched_tokens": 128, **arguments}

    def serve(family):
        own = {**engine, "model": str(folders[family])}
        return drive(tmp_path_factory.mktemp("served"), engine=own, prompts=PROMPTS, max_tokens=COUNT)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FAMILIES, pool.map(serve, FAMILIES), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_as_in_transformers(served, folders, family):
    model = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
    found = served[family]
    assert found["tokens"] == compressed_tokens(PROMPTS, *METHOD, COUNT, BLOCK, model=model, longest=LONGEST)
    assert found["used_at_end"] == 0
