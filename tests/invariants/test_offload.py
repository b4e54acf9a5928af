"""Reading with layers outside of memory: the very cache of an exact reading, little of it in memory, no file left."""

import os
import subprocess
import sys
import tempfile

import pytest
import torch
from families import padded_ids, random_ids, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

import headwise
from headwise import RaggedCache
from headwise.cache.offload import OffloadedLayer
from headwise.errors import BadInput, UnsupportedGeneration, WriteFailed

METHODS = ["knorm", "snapkv+adakv", "expected+global", "h2o", "kvzip", "criticalkv"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("entries", ["native", "int8"])
def test_what_is_kept_is_what_an_exact_reading_keeps(method, entries):
    model, (ids, mask) = tiny_model(), padded_ids((96, 61))
    options = {"keep": 0.6, "attention_mask": mask, "prefill_chunk_size": 30, "entries": entries}
    exact, moved = (headwise.compress(model, ids, method, reading=r, **options) for r in ("exact", "offload"))
    assert moved.nbytes == exact.nbytes
    for layer, other in zip(exact.frozen_layers, moved.frozen_layers, strict=True):
        for part, own in zip(
            (layer.segments, *layer.segments.quantised), (other.segments, *other.segments.quantised), strict=True
        ):
            assert torch.equal(part.positions, own.positions)
            assert torch.equal(part.keys, own.keys) and torch.equal(part.values, own.values)


def test_sliding_window_layers_stay_where_they_are():
    model, ids = tiny_model("gemma3_text"), random_ids(1, 90)
    caches = [
        headwise.compress(model, ids, "knorm", keep=0.5, reading=r, prefill_chunk_size=25) for r in ("exact", "offload")
    ]
    question = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(*(model.generate(**cache.inputs(random_ids(1, 4)), **question) for cache in caches))


def mapped_kib():
    """What of files without a name is in memory, as the system counts it: their mappings' Rss."""
    total, ours = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if "-" in line.split(" ", 1)[0]:
                ours = "headwise-" in line or "(deleted)" in line
            elif ours and line.startswith("Rss:"):
                total += int(line.split()[1])
    return total


@pytest.mark.parametrize("method", ["knorm+adakv", "knorm+global"])
def test_little_of_it_is_in_memory(method, tmp_path, monkeypatch):
    """16 layers: two of them at a time, and what is kept at the end; by the cache's own count and by the system's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, intermediate_size=64, num_hidden_layers=16, **sizes)).eval()
    ids, layer, most = random_ids(1, 2048), 2 * 2048 * 4 * 16 * 4, []
    rest = OffloadedLayer.rest
    monkeypatch.setattr(OffloadedLayer, "rest", lambda layer: (most.append(mapped_kib() * 1024), rest(layer)))
    cache = headwise.compress(model, ids, method, keep=0.1, prefill_chunk_size=512, reading="offload")
    assert cache.peak_nbytes <= 0.1 * 16 * layer + 2 * layer < 0.3 * 16 * layer
    assert layer / 4 < max(most) <= 2.5 * layer
    assert not os.listdir(tmp_path)


def test_room_that_cannot_be_had_is_an_error_before_anything_is_read(tmp_path, monkeypatch):
    model, ids, options = tiny_model(), random_ids(1, 60), {"keep": 0.5, "reading": "offload"}
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(WriteFailed, match=r"none could be made: No such file or directory. Set TMPDIR"):
        headwise.compress(model, ids, "knorm", **options)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(WriteFailed, match="No space left on device"):
        headwise.compress(model, ids, "knorm", **options)
    assert not os.listdir(tmp_path)


def test_a_killed_run_leaves_no_file(tmp_path):
    code = (
        "import os, signal, sys; sys.path.insert(0, 'tests')\n"
        "import headwise; from families import random_ids, tiny_model\n"
        "def kill(done, total): os.kill(os.getpid(), signal.SIGKILL)\n"
        "options = dict(keep=0.5, reading='offload', prefill_chunk_size=20, progress=kill)\n"
        "headwise.compress(tiny_model(), random_ids(1, 60), 'knorm', **options)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert ended.returncode == -9
    assert not os.listdir(tmp_path)


def test_the_length_of_the_context_must_be_known_and_right():
    model = tiny_model()
    with pytest.raises(BadInput, match="the length of the context"):
        RaggedCache(model, "knorm", keep=0.5, reading="offload")
    cache = RaggedCache(model, "knorm", keep=0.5, prompt_length=40, reading="offload")
    with torch.no_grad(), pytest.raises(UnsupportedGeneration, match=r"room for 40 tokens.*50 came"):
        model(random_ids(1, 50), past_key_values=cache)
