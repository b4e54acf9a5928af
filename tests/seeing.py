"""Tiny random models that see, by their type, and what a processor would make of a text with images for them."""

from functools import lru_cache

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

IMAGE, VIDEO = 90, 91  # placeholders
KINDS = ("llava", "mistral3", "gemma3", "qwen2_5_vl", "qwen3_vl")
ON_GRIDS = ("qwen2_5_vl", "qwen3_vl")
TYPES = {"gemma3": "token_type_ids", "qwen2_5_vl": "mm_token_type_ids", "qwen3_vl": "mm_token_type_ids"}
PER_IMAGE = {"llava": 16, "mistral3": 16, "gemma3": 16, "qwen2_5_vl": 12, "qwen3_vl": 12}
SIZES = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
TEXT = {**SIZES, **HEADS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
EYE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
QWEN_EYE = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
WINDOWS = ["sliding_attention", "full_attention", "full_attention"]
MARKS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 92, "vision_end_token_id": 93}


def config_of(kind):
    """A configuration with tiny sizes."""
    clip = {"model_type": "clip_vision_model", **EYE, "image_size": 16, "projection_dim": 32}
    pixtral = {"model_type": "pixtral", **EYE, "head_dim": 16, "image_size": 32}
    siglip = {"model_type": "siglip_vision_model", **EYE, "image_size": 16}
    gemma = {**TEXT, "sliding_window": 12, "layer_types": WINDOWS, "query_pre_attn_scalar": 16}
    deep = {"depth": 3, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    parts = {
        "llava": {"text_config": {"model_type": "llama", **TEXT}, "vision_config": clip},
        "vipllava": {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": clip,
            "vision_feature_layers": [-1, -2],
        },
        "mistral3": {
            "text_config": {"model_type": "mistral", **TEXT, "sliding_window": None},
            "vision_config": pixtral,
            "spatial_merge_size": 2,
        },
        "gemma3": {"text_config": gemma, "vision_config": siglip, "mm_tokens_per_image": 16},
        "qwen2_5_vl": {
            "text_config": {**TEXT, "rope_parameters": _sections(2, 3, 3)},
            "vision_config": {**QWEN_EYE, "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 16},
        },
        "qwen3_vl": {
            "text_config": {**TEXT, "rope_parameters": _sections(3, 3, 2)},
            "vision_config": {**QWEN_EYE, "out_hidden_size": 64, **deep},
        },
    }
    marks = MARKS if kind in ON_GRIDS else {"image_token_id": IMAGE}
    return AutoConfig.for_model(kind, **parts[kind], **marks)


def _sections(*sizes):
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sizes)}


@lru_cache(maxsize=len(KINDS) + 1)
def seeing(kind):
    """A random model; weights large enough that its attention is not uniform and that images matter."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config_of(kind), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and ("q_proj" in name or "k_proj" in name):
                weight.normal_(std=2.0 * weight.shape[1] ** -0.5)
            if "mm_input_projection" in name:
                weight.normal_(std=0.3)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def shown(kind, *, seed=0, before=12, after=8, images=1):
    """A text, an image, a text ...: ids, their mask, and all that comes with images."""
    made = torch.Generator().manual_seed(seed)
    parts = [words(before, seed)]
    for number in range(images):
        parts += [torch.full((1, PER_IMAGE[kind]), IMAGE), words(after, seed + number + 1)]
    ids = torch.cat(parts, dim=-1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind in ON_GRIDS:  # 6 times 8 patches, of which 2 times 2 become a token: a grid of 3 times 4
        inputs["pixel_values"] = torch.randn(images * 48, 3 * 2 * 4 * 4, generator=made)
        inputs["image_grid_thw"] = torch.tensor([[1, 6, 8]] * images)
    else:
        side = 32 if kind == "mistral3" else 16
        inputs["pixel_values"] = torch.randn(images, 3, side, side, generator=made)
        inputs |= {"image_sizes": torch.tensor([[side, side]] * images)} if kind == "mistral3" else {}
    return inputs | ({TYPES[kind]: (ids == IMAGE).long()} if kind in TYPES else {})


def words(count, seed=0, rows=1):
    """Ids of text."""
    return torch.randint(3, 88, (rows, count), generator=torch.Generator().manual_seed(100 + seed))


def followed(kind, inputs, ids):
    """The same, and text behind it."""
    both = inputs | {"input_ids": torch.cat([inputs["input_ids"], ids], dim=-1)}
    both["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=-1)
    if kind in TYPES:
        both[TYPES[kind]] = torch.cat([inputs[TYPES[kind]], torch.zeros_like(ids)], dim=-1)
    return both


def stacked(kind, rows):
    """A batch of them, padded on the left."""
    length = max(row["input_ids"].shape[1] for row in rows)
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if values[0].shape == rows[0]["input_ids"].shape and name not in ("pixel_values", "image_grid_thw"):
            values = [torch.nn.functional.pad(value, (length - value.shape[1], 0)) for value in values]
        batch[name] = torch.cat(values)
    return batch
