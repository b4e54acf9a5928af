"""What cannot be served is refused where the engine starts, in our words."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from serving_engine import MODEL

from headwise.serving import ARCHITECTURE, vllm_arguments

GOOD = {"model": MODEL, "dtype": "float32", **vllm_arguments("keydiff", keep=0.2)}
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


def _overrides(**settings: object) -> dict:
    return {"hf_overrides": {"architectures": [ARCHITECTURE], "headwise": settings}}


REFUSED = {
    "prefix caching": ({"enable_prefix_caching": True}, "prefix caching cannot be used.*--no-enable-prefix-caching"),
    "speculation": ({"speculative_config": NGRAM}, "speculative decoding cannot be used: rejected tokens"),
    "a connector": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "a KV connector or KV offloading cannot be used: it moves blocks",
    ),
    "stages": ({"pipeline_parallel_size": 2}, "pipeline parallelism cannot be used"),
    "too many ranks": ({"tensor_parallel_size": 8}, "more ranks than KV heads"),
    "another precision": ({"kv_cache_dtype": "fp8"}, "a KV cache of another precision"),
    "one group": ({"disable_hybrid_kv_cache_manager": True}, "tiers of heads are groups"),
    "no settings": ({"hf_overrides": {"architectures": [ARCHITECTURE]}}, "settings are missing"),
    "a scorer that cannot": (
        _overrides(method="h2o", keep=0.2),
        "its scorer 'h2o'.*Use streaming, knorm, keydiff, snapkv, lkv-t",
    ),
    "an allocator that cannot": (_overrides(method="adakv", keep=0.2), "its allocator 'adakv'.*Use uniform, pyramid"),
    "a misspelt setting": (_overrides(method="keydiff", kep=0.2), "Did you mean 'keep'"),
    "no budget": (_overrides(method="knorm+lukv", keep=0.2), "no budget of Knorm is shipped"),
}


@pytest.fixture(scope="module")
def said():
    """Errors by name; of what is right too."""
    asked = {"nothing": GOOD, **{name: {**GOOD, **wrong} for name, (wrong, _) in REFUSED.items()}}
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("refuse.py"))],
        input=json.dumps(list(asked.values())),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(zip(asked, json.loads(run.stdout.splitlines()[-1]), strict=True))


def test_what_is_right_is_accepted(said):
    assert said["nothing"] == ""


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused(said, name):
    message = REFUSED[name][1]
    assert re.search("headwise: .*" + message, said[name], re.DOTALL), said[name]
