"""The census of transformers' causal language models: which can be compressed, by which methods, and if not, why.

    python recipes/model_families.py                # every type; writes models/families.json and docs/models.md
    python recipes/model_families.py llama gemma2   # these types only; prints their rows and writes nothing
    python recipes/model_families.py --changes      # every type; says what the table has otherwise and writes nothing

Of each type a tiny random model is built, and the invariants are run on it (`checked`): what holds is written down, and
what does not hold is refused with its reason. Tests build the same models for a sample of types.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import headwise
from headwise.errors import HeadwiseError
from headwise.methods.method import Method
from headwise.models.families import given, view
from headwise.models.layout import FAMILIES, text_config
from headwise.models.table import UNTRIED, Row, Table, table

ROOT = Path(__file__).parents[1]
TABLE, PAGE = ROOT / "src/headwise/models/families.json", ROOT / "docs/models.md"
HEADING = "## Supported\n\n"  # what comes after it in the page is made here
CONTEXT, QUESTION = 64, 4
KEEP = 0.5
TOLERANCE = 2e-4  # of logits, relative: sums in another order, in float32
LEARNED = "lkv"  # with random gates
METHODS = ("keydiff", "knorm", "streaming", LEARNED, "snapkv", "tova", "h2o", "expected", "criticalkv", "kvzip")

# Sizes under every name that a configuration may have for them.
SIZES = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 99),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_head_kv"), 2),
    "head_dim": 16,
    "kv_channels": 16,
    "rotary_dim": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 512),
    "sliding_window": 16,
    "attention_chunk_size": 16,
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_ffn_hidden_size"), 32),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 8,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "is_decoder": True,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
}
OFTEN_NONE = ("head_dim", "num_key_value_heads")
# What of a type is not as its sizes say.
STATES = ["linear_attention", "full_attention"] * 2
CONVOLUTIONS = ["conv", "full_attention"] * 2
WINDOWS = ["sliding_attention", "full_attention"] * 2
SHARED = {"num_hidden_layers": 6, "layer_types": [*WINDOWS, *WINDOWS[:2]], "num_kv_shared_layers": 2}
GEMMA4 = {**SHARED, "global_head_dim": 32}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "layer_types": WINDOWS},
    "gemma3n_text": {**SHARED, "activation_sparsity_pattern": [0.0] * 6},
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "granitemoehybrid": {"layer_types": STATES, "shared_intermediate_size": 32, "num_key_value_heads": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "laguna": {"num_attention_heads_per_layer": [4] * 4},
    "lfm2": {"layer_types": CONVOLUTIONS},
    "lfm2_moe": {"layer_types": CONVOLUTIONS, "num_dense_layers": 1},
    "ministral": {"layer_types": WINDOWS},
    "mistral": {"sliding_window": None},
    "moshi": {"sliding_window": 512},
    "xmod": {"default_language": "en_XX"},
}
# Configurations with a text part that is made as that type is.
PARTS = {"gemma3n": "gemma3n_text", "gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text"}


def types() -> list[str]:
    """Every model type that transformers makes a causal language model of."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config_of(kind: str) -> Any:
    """A configuration with tiny sizes."""
    if kind in SPECIAL:
        known = type(AutoConfig.for_model(kind)).__dataclass_fields__
        sizes = {name: value for name, value in SIZES.items() if name in known and name not in SPECIAL[kind]}
        return AutoConfig.for_model(kind, **sizes, **SPECIAL[kind])
    config = AutoConfig.for_model(kind)
    if kind in PARTS:
        config.text_config = config_of(PARTS[kind])
        return config
    text = text_config(config)
    for part in [text] if text is config else [config, text]:
        for name, value in SIZES.items():
            if _has(part, name) and (getattr(part, name) is not None or name in OFTEN_NONE):
                with suppress(AttributeError, NotImplementedError):  # what is derived cannot be set
                    setattr(part, name, value)
    layers = text.num_hidden_layers
    for name in ("layer_types", "mlp_layer_types"):
        given_types = getattr(text, name, None)
        if isinstance(given_types, list | tuple) and given_types:
            with suppress(AttributeError):
                setattr(text, name, ([*dict.fromkeys(given_types)] * layers)[:layers])
    return config


def _has(config: Any, name: str) -> bool:
    """Whether it has this attribute, one for all layers."""
    try:
        return hasattr(config, name)
    except ValueError:
        return False


def tiny(kind: str) -> Any:
    """A random model; weights large enough that its attention is not uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                weight.normal_()
            elif weight.ndim == 2 and "norm" not in name and ("q_proj" in name or "k_proj" in name):
                weight.normal_(std=2.0 * weight.shape[1] ** -0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def ids_of(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids without special ones."""
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def method_of(name: str, model: Any) -> str | Method:
    """The method of this name; learned ones with random gates."""
    if name != LEARNED:
        return name
    from headwise.artifacts.gates import EntryScores, Gates  # what a trained file holds
    from headwise.artifacts.origin import Origin
    from headwise.methods.allocate import Global
    from headwise.methods.scores import LKVT

    model_view = view(model)
    shape = model_view.shape
    torch.manual_seed(1)
    scores = EntryScores(len(shape.layers), shape.kv_heads, shape.head_dim)
    for weight in scores.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    origin = Origin(shape=shape, config_hash=model_view.config_hash, sink=1, window=4)
    gates = Gates(origin=origin, scores=scores.requires_grad_(False), budgets=None, comparable=True)
    return Method(scorer=LKVT(gates=gates), allocator=Global())


def examine(kind: str) -> Row:
    """Build a type's model, run the invariants, try every method."""
    if kind in FAMILIES and FAMILIES[kind].refused:
        return Row(type=kind, supported=False, refused=FAMILIES[kind].refused)
    try:
        model = tiny(kind)
    except Exception as error:  # whatever a configuration's class raises where its sizes do not fit
        return Row(type=kind, supported=False, refused=f"{UNTRIED}: {_line(error)}")
    try:
        for check in INVARIANTS:
            check(model)
    except (HeadwiseError, AssertionError) as error:
        return Row(type=kind, supported=False, refused=_line(error))
    working, without = [], {}
    for name in METHODS:
        try:
            decoded(model, name)
            working.append(name)
        except (HeadwiseError, AssertionError) as error:
            without[name] = _line(error)
    return Row(type=kind, supported=True, layers=layers_told(model), methods=tuple(working), without=without)


def layers_told(model: Any) -> str:
    """How many layers are cut, and what the others are."""
    found = [layer.kind for layer in view(model).layers]
    names = {"whole": "cut", "window": "window", "state": "state", "none": "without a cache"}
    return ", ".join(
        f"{found.count(kind)} {names[kind]}" for kind in dict.fromkeys(sorted(found, key=list(names).index))
    )


def _line(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said if len(said) <= 240 else f"{said[:240].rsplit(' ', 1)[0]} ..."


def _close(found: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    error = float((found - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise AssertionError(f"{what}: logits are {error:.1e} off")


@torch.no_grad()
def logits(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Of the last tokens `ids`, of those that `mask` covers."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(
        input_ids=ids, attention_mask=mask, position_ids=positions, **given(model, cache), use_cache=True
    ).logits


def stock(model: Any, pieces: list[Tensor], mask: Tensor) -> Tensor:
    """Logits of the last piece with transformers' own cache, and with its own attention."""
    before = text_config(model.config)._attn_implementation
    model.set_attn_implementation("eager")
    try:
        cache, seen, found = DynamicCache(config=model.config), 0, []
        for piece in pieces:
            seen += piece.shape[1]
            found.append(logits(model, piece, mask[:, :seen], cache))
        return found[-1]
    finally:
        model.set_attn_implementation(before)


def keeping_everything_changes_nothing(model: Any) -> None:
    """keep = 1.0 gives the logits of a stock cache, for a question of several tokens and then for one more."""
    context, question, last = ids_of(1, CONTEXT), ids_of(1, QUESTION, 1), ids_of(1, 1, 2)
    every = torch.ones(1, CONTEXT + QUESTION + 1, dtype=torch.long)
    cache = headwise.compress(model, context, "keydiff", keep=1.0)
    found = logits(model, question, every[:, :-1], cache)
    _close(found, stock(model, [context, question], every), "keep 1.0")
    found = logits(model, last, every, cache)
    _close(found, stock(model, [context, question, last], every), "keep 1.0, one more token")


def batches_are_their_rows(model: Any) -> None:
    """A padded batch answers as each of its rows alone."""
    ids, mask = ids_of(2, CONTEXT), torch.ones(2, CONTEXT + QUESTION, dtype=torch.long)
    ids[0, :7], mask[0, :7] = 0, 0
    question = ids_of(2, QUESTION, 1)
    cache = headwise.compress(model, ids, "keydiff", keep=KEEP, attention_mask=mask[:, :CONTEXT])
    together = logits(model, question, mask, cache)
    for row, start in ((0, 7), (1, 0)):
        alone = headwise.compress(model, ids[row : row + 1, start:], "keydiff", keep=KEEP)
        found = logits(model, question[row : row + 1], mask[row : row + 1, start:], alone)
        _close(together[row : row + 1], found, "batch")


def pieces_are_the_whole(model: Any) -> None:
    """A context read in pieces keeps the same entries."""
    context = ids_of(1, CONTEXT)
    once = headwise.compress(model, context, "keydiff", keep=KEEP)
    pieces = headwise.compress(model, context, "keydiff", keep=KEEP, prefill_chunk_size=16)
    if not torch.equal(once.lengths, pieces.lengths):
        raise AssertionError("a context read in pieces keeps other entries")


def half_is_masked_attention(model: Any) -> None:
    """What decodes from half of the entries equals the model's eager attention, masked to these."""
    context, question = ids_of(1, CONTEXT), ids_of(1, QUESTION, 1)
    cache = headwise.compress(model, context, "keydiff", keep=KEEP)
    shape, kept = view(model).shape, {}
    for index, layer in enumerate(shape.layers):
        kept[layer] = torch.zeros(shape.kv_heads, CONTEXT, dtype=torch.bool)
        for head in range(shape.kv_heads):
            kept[layer][head, cache.positions(index, 0, head)] = True
    text = text_config(model.config)
    modes, kinds = (getattr(text, name, None) or [] for name in ("kv_sharing_modes", "layer_types"))
    sharing = [i for i, mode in enumerate(modes) if mode == "reuse" and kinds[i] == "full_attention"]
    kept |= {i: kept[max(kept)] for i in sharing}
    found = logits(model, question, torch.ones(1, CONTEXT + QUESTION, dtype=torch.long), cache)
    before = text_config(model.config)._attn_implementation
    AttentionInterface.register("masked", partial(_masked, kept))
    AttentionMaskInterface.register("masked", sdpa_mask)
    model.set_attn_implementation("masked")
    try:
        with torch.no_grad():
            expected = model(torch.cat([context, question], -1), use_cache=False).logits[:, CONTEXT:]
    finally:
        model.set_attn_implementation(before)
    has_states = any(layer.kind == "state" for layer in view(model).layers)  # they are summed up in other pieces
    _close(found, expected, "half kept", TOLERANCE * (10 if has_states else 1))


def _masked(
    kept: dict[int, Tensor],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """The eager attention of the model's own file, with a mask that hides what was not kept."""
    tokens = query.shape[2]
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril() if attention_mask is None else attention_mask
    seen = seen.expand(1, query.shape[1], tokens, tokens).clone()
    layer = getattr(module, "layer_idx", None)  # one that slides and reads another's cache has lost nothing
    if layer in kept:
        group = query.shape[1] // key.shape[1]
        seen[:, :, CONTEXT:, :CONTEXT] &= kept[layer].repeat_interleave(group, 0)[:, None]
    bias = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, bias, **kwargs)


def bytes_are_counted(model: Any) -> None:
    """What is reported is what the layers hold; what is cut takes the share that was asked for."""
    half, everything = (headwise.compress(model, ids_of(1, CONTEXT), "keydiff", keep=keep) for keep in (KEEP, 1.0))
    cut, whole = (cache.nbytes - cache.sliding_nbytes for cache in (half, everything))
    shape = view(model).shape
    if whole != shape.num_heads * CONTEXT * shape.entry_bytes(4) or abs(cut - KEEP * whole) > shape.entry_bytes(4):
        raise AssertionError(f"{cut} and {whole} bytes are held")


def saved_is_the_same(model: Any) -> None:
    """A saved and loaded cache answers as the one that was saved."""
    question, mask = ids_of(1, QUESTION, 1), torch.ones(1, CONTEXT + QUESTION, dtype=torch.long)
    cache = headwise.compress(model, ids_of(1, CONTEXT), "keydiff", keep=KEEP)
    with TemporaryDirectory() as folder:
        cache.save(f"{folder}/cache.safetensors")
        loaded = headwise.load(f"{folder}/cache.safetensors", model)
    _close(logits(model, question, mask, loaded), logits(model, question, mask, cache.fork()), "saved and loaded")


def generates(model: Any) -> None:
    """generate() goes on, and gives a stock cache's tokens where everything is kept."""
    context, question = ids_of(1, CONTEXT), ids_of(1, QUESTION, 1)
    cache = headwise.compress(model, context, "keydiff", keep=1.0)
    found = model.generate(**cache.fork().inputs(question), max_new_tokens=4, do_sample=False)
    expected = model.generate(torch.cat([context, question], -1), max_new_tokens=4, do_sample=False, use_cache=True)
    if not torch.equal(found, expected):
        raise AssertionError("generate() gives other tokens than with a stock cache")


INVARIANTS: tuple[Callable[[Any], None], ...] = (
    keeping_everything_changes_nothing,
    batches_are_their_rows,
    pieces_are_the_whole,
    half_is_masked_attention,
    bytes_are_counted,
    saved_is_the_same,
    generates,
)


def decoded(model: Any, name: str) -> None:
    """Compress by a method, and decode some tokens. Raises HeadwiseError where that cannot be."""
    cache = headwise.compress(model, ids_of(1, CONTEXT), method_of(name, model), keep=0.6)
    shape = view(model).shape
    if int(cache.lengths.sum()) != round(0.6 * shape.num_heads * CONTEXT):
        raise AssertionError(f"{name} keeps {int(cache.lengths.sum())} entries")
    mask = torch.ones(1, CONTEXT + QUESTION, dtype=torch.long)
    if not bool(logits(model, ids_of(1, QUESTION, 1), mask, cache).isfinite().all()):
        raise AssertionError(f"{name}: logits are not finite")


def page(table: Table) -> str:
    """docs/models.md: the words that are there, and the tables anew."""
    supported = [row for row in table.families if row.supported]
    every = sum(len(row.methods) == len(table.methods) for row in supported)
    lines = [
        f"With transformers {table.transformers} {len(supported)} of {len(table.families)} types pass,",
        f"{every} of them with every scorer.",
        "",
        "| type | layers | without |",
        "|---|---|---|",
        *(f"| `{row.type}` | {row.layers} | {_without(row)} |" for row in supported),
        "",
        "## Refused",
        "",
        "| type | why |",
        "|---|---|",
        *(f"| `{row.type}` | {_cell(row.refused)} |" for row in table.families if not row.supported),
    ]
    words = PAGE.read_text(encoding="utf-8").partition(HEADING)[0]
    return words + HEADING + "\n".join(lines) + "\n"


def _without(row: Row) -> str:
    reasons: dict[str, list[str]] = {}
    for name, why in row.without.items():
        reasons.setdefault(why.partition(" cannot be used: ")[2] or why, []).append(f"`{name}`")
    return "; ".join(f"{', '.join(names)}: {_cell(why)}" for why, names in reasons.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def changes(before: Table, rows: list[Row]) -> list[str]:
    """What rows have otherwise than a table, in words: what works no more comes first."""
    said: list[tuple[bool, str]] = []
    for row in rows:
        old = before.row(row.type)
        if old is None:
            said.append((False, f"{row.type} is new: {row.layers or row.refused}"))
        elif old.supported and not row.supported:
            said.append((True, f"{row.type} is refused now: {row.refused}"))
        elif row.supported and not old.supported:
            said.append((False, f"{row.type} is supported now; it was not: {old.refused}"))
        elif lost := sorted(set(old.methods) - set(row.methods)):
            said.append((True, f"{row.type} has lost {', '.join(lost)}: {row.without[lost[0]]}"))
        elif old != row:
            said.append((False, f"{row.type}: {row.layers} {_without(row)} {row.refused}".rstrip()))
    gone = {row.type for row in before.families} - {row.type for row in rows}
    said += [(True, f"{kind} is not in this transformers") for kind in sorted(gone)]
    return [f"{'BROKEN' if broken else 'changed'}  {line}" for broken, line in sorted(said, key=lambda one: not one[0])]


def compare() -> None:
    """Examine every type and say what the table has otherwise. The exit code is 1 if something works no more."""
    _quiet()
    said = changes(table(), [examine(kind) for kind in types()])
    print(f"transformers {transformers.__version__}, the table is of {table().transformers}: {len(said)} changes")
    print("\n".join(said))
    sys.exit(int(any(line.startswith("BROKEN") for line in said)))


def _quiet() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


def main(chosen: list[str]) -> None:
    """Examine these types, or all and write the table."""
    _quiet()
    began, rows = time.perf_counter(), []
    for kind in chosen or types():
        rows.append(examine(kind))
        row = rows[-1]
        print(f"{kind}: {row.layers + ' ' + _without(row) if row.supported else row.refused}", flush=True)
    seconds = time.perf_counter() - began
    every = sum(len(row.methods) == len(METHODS) for row in rows)
    print(f"{sum(row.supported for row in rows)} of {len(rows)} pass, {every} with every method; {seconds:.0f} s")
    if not chosen:
        made = Table(transformers=transformers.__version__, methods=METHODS, families=tuple(rows))
        TABLE.write_text(json.dumps(asdict(made), indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(made), encoding="utf-8")


if __name__ == "__main__":
    compare() if sys.argv[1:] == ["--changes"] else main(sys.argv[1:])
