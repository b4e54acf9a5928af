"""Record what kvpress computes on a tiny random model, for tests/parity/test_kvpress_parity.py.

kvpress pins its own versions of torch and transformers, so it lives in an environment of its own:

    python -m venv kvpress-env
    kvpress-env/bin/pip install kvpress==0.5.5
    kvpress-env/bin/python tests/parity/record_kvpress.py tests/parity/kvpress.npz

The recording holds, per case and recorded layer, the rotated queries and keys, the values and W_O; the scores of every
press; the entries it keeps at several compression ratios.
To check headwise against a kvpress installed elsewhere without touching the recording, set HEADWISE_KVPRESS_PYTHON to
that environment's python and run the test.
"""

import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from kvpress import (
    AdaKVPress,
    CriticalKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    ObservedAttentionPress,
    PyramidKVPress,
    RandomPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

RATIOS = (0.25, 0.5, 0.8, 0.9)  # removed
LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 5, 6, 2, 8
RECORDED = (0, 4)  # layers, to keep the file small
VOCABULARY = 512
REPLAYS = ((0, 24), (24, 48), (48, 60))  # KVzip's chunks of its 60 tokens
Recording = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A prompt, and SnapKV's parameters on it."""

    tokens: int
    window: int
    kernel: int


CASES = {"long": Case(333, 32, 5), "short": Case(90, 8, 7)}


def presses(case: Case) -> dict[str, Callable[[float], Any]]:
    """The scorer presses, by compression ratio."""

    def snapkv(ratio: float) -> SnapKVPress:
        return SnapKVPress(ratio, window_size=case.window, kernel_size=case.kernel)

    def mean_only(ratio: float) -> ExpectedAttentionPress:
        return ExpectedAttentionPress(ratio, use_covariance=False, use_vnorm=False)

    return {
        "random": lambda ratio: RandomPress(ratio, seed=0),
        "knorm": KnormPress,
        "keydiff": KeyDiffPress,
        "streaming": StreamingLLMPress,
        "snapkv": snapkv,
        "tova": TOVAPress,
        "h2o": ObservedAttentionPress,
        "expected": ExpectedAttentionPress,
        "expected-epsilon": lambda ratio: ExpectedAttentionPress(ratio, epsilon=0.02),
        "expected-mean": mean_only,
        "critical-snapkv": lambda ratio: CriticalKVPress(snapkv(ratio)),
        "critical-expected": lambda ratio: CriticalKVPress(mean_only(ratio)),
    }


def make_model(implementation: str) -> LlamaForCausalLM:
    """The same random weights for every attention implementation."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        initializer_range=0.2,  # attention with some contrast
        attn_implementation=implementation,
    )
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb  # what kvpress does on entry
    return model


def forward(model: LlamaForCausalLM, ids: torch.Tensor, cache: DynamicCache) -> list[dict[str, Any]]:
    """Run the model; return what each attention layer was given and made: the arguments of `press.score`."""
    calls: list[dict[str, Any]] = []

    def note(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        calls.append(
            {
                "module": module,
                "hidden_states": kwargs["hidden_states"],
                "keys": layer.keys.clone(),
                "values": layer.values.clone(),
                "attentions": output[1],
                "kwargs": kwargs,
            }
        )

    with ExitStack() as stack:
        for layer in model.model.layers:
            stack.callback(layer.self_attn.register_forward_hook(note, with_kwargs=True).remove)
        model.model(input_ids=ids, past_key_values=cache)
    return calls


def rotated_queries(call: dict[str, Any]) -> torch.Tensor:
    hidden = call["hidden_states"]
    states = call["module"].q_proj(hidden).view(*hidden.shape[:2], QUERY_HEADS, HEAD_DIM).transpose(1, 2)
    return apply_rotary_pos_emb(states, states, *call["kwargs"]["position_embeddings"])[0]


def kept_by(press: Any, call: dict[str, Any]) -> torch.Tensor:
    """Which entries are in the cut cache: found by their keys, which are all different."""
    keys = press.compress(**call)[0]
    return (call["keys"].unsqueeze(3) == keys.unsqueeze(2)).all(-1).any(-1)


def kept_by_adakv(press: Any, call: dict[str, Any]) -> torch.Tensor:
    press.compress(**call)
    kept = torch.ones(call["keys"].shape[:3], dtype=torch.bool)
    kept[call["module"].masked_key_indices] = False
    call["module"].masked_key_indices = None
    return kept


def record_layer(case: Case, call: dict[str, Any], eager: dict[str, Any]) -> Recording:
    """One layer: its tensors, and each press's scores and kept entries (one bit each, ratio by ratio)."""
    out = {
        "queries": rotated_queries(call),
        "keys": call["keys"],
        "values": call["values"],
        "output_weight": call["module"].o_proj.weight.T.reshape(QUERY_HEADS, HEAD_DIM, -1),
    }
    kept = {}
    for name, make in presses(case).items():
        seen = eager if name == "h2o" else call
        if name != "streaming":  # its scores depend on the ratio
            out[f"scores/{name}"] = make(0.5).score(**seen)
        kept[f"kept/{name}"] = [kept_by(make(ratio), seen) for ratio in RATIOS]
    for name in ("knorm", "keydiff", "snapkv"):
        kept[f"adakv/{name}"] = [kept_by_adakv(AdaKVPress(presses(case)[name](ratio)), call) for ratio in RATIOS]
    bits = {name: np.packbits(torch.stack(masks).numpy(), axis=-1) for name, masks in kept.items()}
    return {name: tensor.numpy() for name, tensor in out.items()} | bits


def record_case(case: Case) -> Recording:
    generator = torch.Generator().manual_seed(case.tokens)
    # No token twice in a row of the batch: in the first layer their keys would have the same norm, and tie.
    ids = torch.stack([torch.randperm(VOCABULARY, generator=generator)[: case.tokens] for _ in range(2)])
    calls = forward(make_model("sdpa"), ids, DynamicCache())
    eager = forward(make_model("eager"), ids, DynamicCache())
    recording = {}
    for index in RECORDED:
        layer = record_layer(case, calls[index], eager[index])
        recording |= {f"{index}/{name}": array for name, array in layer.items()}
    pyramids = [PyramidKVPress(ratio, window_size=case.window) for ratio in RATIOS]
    for tokens in (case.tokens, 4096):
        budgets = [[p.get_layer_budget(call["module"], tokens) for call in calls] for p in pyramids]
        recording[f"pyramid/{tokens}"] = np.array(budgets)
    return recording


def record_kvzip() -> Recording:
    """KVzip's scores after replaying 60 tokens in chunks, with a made-up instruction of 5 tokens."""
    model, generator, length = make_model("sdpa"), torch.Generator().manual_seed(1), REPLAYS[-1][1]
    context = torch.randint(0, VOCABULARY, (1, length), generator=generator)
    instruction = torch.randint(0, VOCABULARY, (1, 5), generator=generator)
    press, cache = KVzipPress(0.5), DynamicCache()
    press.context_length = length
    press.score_val = torch.zeros(LAYERS, 1, KV_HEADS, length)
    forward(model, context, cache)
    recording = {"replays": np.array(REPLAYS)}
    for number, (start, end) in enumerate(REPLAYS):
        press.start_idx, press.end_idx = start, end
        repeated = torch.cat([instruction, context[:, max(0, start - 8) : end]], dim=1)
        for index, call in enumerate(forward(model, repeated, cache)):
            press.score_kvzip(**call)
            if index in RECORDED:
                recording[f"{index}/{number}/queries"] = rotated_queries(call).numpy()
                recording[f"{index}/{number}/keys"] = call["keys"].numpy()
        cache.crop(length)
    return recording | {"scores": press.score_val.numpy()}


def main(path: str) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    recording = {"inv_freq": make_model("sdpa").model.rotary_emb.inv_freq.numpy(), "ratios": np.array(RATIOS)}
    with torch.no_grad():
        for name, case in CASES.items():
            recording |= {f"{name}/{key}": array for key, array in record_case(case).items()}
        recording |= {f"kvzip/{key}": array for key, array in record_kvzip().items()}
    np.savez_compressed(path, **recording)


if __name__ == "__main__":
    main(sys.argv[1])
