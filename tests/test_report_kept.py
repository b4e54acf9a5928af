"""The page of a saved cache: which tokens are kept, where in the text they are, the page, and the command."""

import base64
import json
import re
from html import unescape

import numpy as np
import pytest
import torch
from families import random_ids, tiny_model
from folders import word_tokenizer
from test_report import run as run
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import headwise
from headwise.artifacts.tensors import read_tensors, write_tensors
from headwise.cache.kept import tokens_fingerprint
from headwise.errors import ArtifactMismatch, BadInput
from headwise.models import loading as models
from headwise.report.inspect.kept import KeptTokens, page, pieces, plot, tokenizer_for
from headwise.tasks.document import tokenize

TEXT = "the red stone.\n\nthe bold fox guarded the silver bridge, the  garden. " * 4


@pytest.fixture(scope="module")
def saved(model_folders, tmp_path_factory):
    """A document, and caches of it: as it is, and in a chat template."""
    folder = tmp_path_factory.mktemp("caches")
    (folder / "text.txt").write_text(TEXT)
    for name in ("base", "chat"):
        model, tokenizer = models.load(str(model_folders[name]), device="cpu")
        context = tokenize(tokenizer, TEXT, ["the?"]).context
        headwise.compress(model, context, "snapkv+adakv", keep=0.7).save(folder / f"{name}.safetensors")
    return folder


def made_up(kept, **known):
    fields = {"layers": tuple(range(len(kept))), "name": "KeyDiff+Uniform, keep 0.5", "model": "a/b"}
    return KeptTokens(kept=kept, **{**fields, "tokens_fingerprint": None, **known})


def joined(words):
    return "".join(before + token for before, token in words)


# --- what is kept ---


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_is_kept_is_what_the_cache_holds(tmp_path, family):
    """Sliding-window layers have no part in it, tokens after the context neither."""
    model, context = tiny_model(family), random_ids(1, 60)
    cache = headwise.compress(model, context, "keydiff+adakv", keep=0.6)
    with torch.no_grad():
        model(random_ids(1, 7, seed=1), past_key_values=cache)
    cache.save(tmp_path / "c.safetensors")
    found = KeptTokens.load(tmp_path / "c.safetensors")
    assert found.layers == cache.view.shape.layers
    assert found.kept.shape == (len(found.layers), cache.view.shape.kv_heads, 60)
    assert found.name == "KeyDiff+AdaKV, keep 0.6"
    for layer, head in np.ndindex(found.kept.shape[:2]):
        assert found.kept[layer, head].nonzero()[0].tolist() == cache.positions(layer, 0, head).tolist()


@pytest.mark.parametrize("entries", ["int8", "k8v4", "int4"])
def test_entries_in_fewer_bits_are_kept_too(tmp_path, entries):
    model, context = tiny_model("gemma3_text"), random_ids(1, 60)
    native, small = (
        headwise.compress(model, context, "keydiff+adakv", keep=0.6, entries=e) for e in ("native", entries)
    )
    small.save(tmp_path / "c.safetensors")
    found = KeptTokens.load(tmp_path / "c.safetensors")
    assert found.name == f"KeyDiff+AdaKV, keep 0.6, {entries}"
    assert int(found.kept.sum()) == int(native.lengths.sum())
    for layer, head in np.ndindex(found.kept.shape[:2]):
        assert found.kept[layer, head].nonzero()[0].tolist() == native.positions(layer, 0, head).tolist()
    html = page(found, [("", "fox")] * 60, "a.txt")
    assert re.findall(r'<td class="s\d">(\d+)</td>', html) == [str(n) for n in native.lengths[:, 0].flatten().tolist()]


def test_a_batch_is_refused(tmp_path):
    headwise.compress(tiny_model(), random_ids(2, 60), "keydiff", keep=0.5).save(tmp_path / "c.safetensors")
    with pytest.raises(BadInput, match="holds 2 contexts; a map is of one"):
        KeptTokens.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize("damage", ["seen", "lengths", "positions", "method"])
def test_a_damaged_cache_is_refused(saved, tmp_path, damage):
    tensors, metadata = read_tensors(saved / "base.safetensors", "cache")
    if damage in metadata:
        metadata[damage] = {"seen": 3, "method": {}}[damage]
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(damage)}
    write_tensors(tmp_path / "c.safetensors", "cache", tensors, metadata)
    with pytest.raises(BadInput, match="is damaged"):
        KeptTokens.load(tmp_path / "c.safetensors")


def test_a_context_of_more_tokens_than_a_map_can_hold(saved, tmp_path):
    """The file only says so."""
    tensors, metadata = read_tensors(saved / "base.safetensors", "cache")
    del tensors["ids"]  # as files of earlier versions
    write_tensors(tmp_path / "c.safetensors", "cache", tensors, {**metadata, "seen": 2**31 - 1})
    with pytest.raises(BadInput, match="saw 2147483647 tokens, which are too many for a map"):
        KeptTokens.load(tmp_path / "c.safetensors")


# --- where in the text ---


def test_every_token_is_found_in_the_document(saved, model_folders):
    words = pieces(models.load_tokenizer(str(model_folders["base"])), TEXT, KeptTokens.load(saved / "base.safetensors"))
    assert words[:5] == [("", "<bos>"), ("", "the"), (" ", "red"), (" ", "stone"), ("", ".")]
    assert words[5] == ("\n\n", "the")
    assert joined(words) == f"<bos>{TEXT.rstrip()}"


def test_a_chat_template_is_part_of_what_was_compressed(saved, model_folders):
    words = pieces(models.load_tokenizer(str(model_folders["chat"])), TEXT, KeptTokens.load(saved / "chat.safetensors"))
    assert [token for _, token in words[:6]] == ["<bos>", "[", "user", "]", "the", "red"]
    assert joined(words).endswith("garden.")


@pytest.mark.parametrize("kind", ["base", "chat"])
@pytest.mark.parametrize("split", [False, True])
def test_control_tokens_in_a_document_are_found_either_way(model_folders, kind, split):
    text = f"{TEXT * 4} the <eos> fox <bos>."
    tokenizer = models.load_tokenizer(str(model_folders[kind]))
    context = tokenize(tokenizer, text, ["the?"], split_special_tokens=split).context
    found = made_up(
        np.ones((1, 1, context.shape[1]), dtype=bool),
        tokens_fingerprint=tokens_fingerprint(context, torch.ones_like(context)),
    )
    words = pieces(tokenizer, text, found)
    assert joined(words).endswith(text)
    assert (("", "<eos>") in words[2:] or (" ", "<eos>") in words) is not split


def test_tokens_of_bytes_share_a_character():
    """Four of them make a fox: the first has it, the others show as nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    coder = Tokenizer(BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = decoders.ByteLevel()
    text = "a \U0001f98a, é\n"
    words = pieces(PreTrainedTokenizerFast(tokenizer_object=coder), text, made_up(np.ones((1, 1, 11), dtype=bool)))
    assert len(words) == len(text.encode()) == 11
    assert joined(words) == text
    assert [token for _, token in words[2:6]] == ["\U0001f98a", "", "", ""]


def test_another_document_or_tokenizer_is_refused(saved):
    found, tokenizer = KeptTokens.load(saved / "base.safetensors"), word_tokenizer()
    for text in (TEXT[:-20], TEXT.replace("red", "bold")):
        with pytest.raises(ArtifactMismatch, match="the document is not what was compressed"):
            pieces(tokenizer, text, found)


def test_where_generate_has_read_the_context_its_length_must_do(tmp_path, model_folders):
    model, tokenizer = models.load(str(model_folders["base"]), device="cpu")
    cache = headwise.RaggedCache(model, "keydiff", keep=0.5)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None)
    cache.save(tmp_path / "c.safetensors")
    found = KeptTokens.load(tmp_path / "c.safetensors")
    assert found.tokens_fingerprint is None
    assert joined(pieces(tokenizer, TEXT, found)) == f"<bos>{TEXT.rstrip()}"
    with pytest.raises(ArtifactMismatch):
        pieces(tokenizer, f"{TEXT} fox fox", found)


# --- the page ---


def test_the_page_holds_text_and_bits(saved, model_folders, tmp_path):
    out = tmp_path / "c.html"
    plot(saved / "base.safetensors", out, context=saved / "text.txt", text=TEXT)
    html, found = out.read_text(), KeptTokens.load(saved / "base.safetensors")
    (body,) = re.findall(r"<pre>(.*?)</pre>", html, re.DOTALL)
    assert unescape(re.sub(r"</?i>", "", body)) == f"<bos>{TEXT.rstrip()}"
    assert body.count("<i>") == found.kept.shape[-1]
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)
    data = json.loads(data)
    bits = np.frombuffer(base64.b64decode(data["kept"]), dtype=np.uint8)
    kept = np.unpackbits(bits.reshape(len(data["layers"]), data["heads"], -1), axis=-1)[..., : data["tokens"]]
    assert (kept == found.kept).all()
    assert re.findall(r'<td class="s\d">(\d+)</td>', html) == [str(n) for n in found.kept.sum(-1).flatten()]
    assert "text.txt: what every head keeps" in html
    assert str(model_folders["base"]) not in html, "where a model lies is not for sharing"


def test_the_page_needs_nothing_else_and_knows_light_and_dark():
    html = page(made_up(np.ones((1, 1, 1), dtype=bool)), [("", "fox")], "a.txt")
    assert not re.search(r"https?:|src=|<link|@import|url\(", html)
    assert "{{" not in html
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_text_is_shown_never_run():
    words = [("", "</pre><script>alert(1)</script>"), ("&", "{{data}}"), (" ", ""), ("", "\n"), ("", "\\1")]
    found = made_up(np.ones((1, 1, 5), dtype=bool), model="<b>", name="<i>")
    html = page(found, words, "<u>.txt")
    assert "<script>alert" not in html
    assert "&lt;u&gt;.txt" in html
    assert "&lt;b&gt;, &lt;i&gt;" in html
    (body,) = re.findall(r"<pre>(.*?)</pre>", html, re.DOTALL)
    assert body.count("<i") == 5
    assert body.endswith('&amp;<i>{{data}}</i> <i class="b">·</i><i class="b">·</i>\n<i>\\1</i>')


def test_thirty_thousand_tokens_take_two_megabytes():
    """A bit for every head and token, and a few letters for every token."""
    kept = np.random.default_rng(0).random((36, 8, 30_000)) < 0.15
    html = page(made_up(kept), [(" ", "garden")] * 30_000, "a.txt")
    assert len(html) < 2**21
    assert html.count("<i>garden</i>") == 30_000


@pytest.mark.parametrize(
    ("name", "words"),
    [("c.png", "name an .html file"), ("nowhere/c.html", "does not exist"), ("folder.html", "is a folder; name a")],
)
def test_where_no_page_can_be(saved, tmp_path, name, words):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(BadInput, match=words):
        plot(saved / "base.safetensors", tmp_path / name, context=saved / "text.txt", text=TEXT)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.html"]


# --- the command ---


def test_the_command_writes_beside_the_cache(run, saved, model_folders, tmp_path):
    line = f"inspect {saved}/chat.safetensors --plot --context {saved}/text.txt"
    assert json.loads(run(f"{line} --json")[1])["plot"] == str(saved / "chat.html")
    assert "SnapKV+AdaKV, keep 0.7" in (saved / "chat.html").read_text()
    code, _, err = run(f"{line} --out {tmp_path}/c.html --model {model_folders['chat']}")
    assert (code, err) == (0, "")
    assert (tmp_path / "c.html").read_text() == (saved / "chat.html").read_text()


@pytest.mark.parametrize("name", ["Qwen/Qwen3-4B", "gpt2", "/no/such/folder", "//server/share", r"\\server\share"])
def test_a_name_in_a_file_is_shown_and_not_fetched(monkeypatch, name):
    """Whoever wrote the file chose it."""
    monkeypatch.setattr(models, "_read", lambda *arguments, **options: pytest.fail("something was read"))
    with pytest.raises(BadInput, match="name the model with --model") as caught:
        tokenizer_for(made_up(np.ones((1, 1, 5), dtype=bool), model=name), None)
    assert repr(name) in str(caught.value)


def test_a_folder_here_and_the_bundled_model_serve_by_the_name_in_a_file(model_folders):
    for name in (str(model_folders["base"]), "reference"):
        tokenizer = tokenizer_for(made_up(np.ones((1, 1, 5), dtype=bool), model=name), None)
        assert tokenizer.get_vocab() == models.load_tokenizer(name).get_vocab()


def test_what_the_command_refuses(run, saved, model_folders, tmp_path):
    headwise.compress(tiny_model(), random_ids(1, 60), "keydiff", keep=0.5).save(saved / "nameless.safetensors")
    (tmp_path / "other.txt").write_text("the fox")
    draw = f"inspect {saved}/base.safetensors --plot --out {tmp_path}/c.html"
    for line, words, expected in [
        (draw, "name the file with --context", 2),
        (f"inspect {saved}/base.safetensors --context {saved}/text.txt", "add --plot", 2),
        (f"{draw} --context {tmp_path}/nowhere.txt", "cannot read the document", 2),
        (f"{draw} --context {tmp_path}/other.txt", "is not what was compressed", 1),
        (f"{draw} --context {saved}/text.txt --model {tmp_path}", "cannot load the tokenizer of", 2),
        (f"{draw} --context {saved}/text.txt --beside {saved}/chat.safetensors", "drawn beside gates", 2),
        (f"inspect {saved}/nameless.safetensors --plot --context {saved}/text.txt", "which model made it", 2),
        (f"inspect {saved}/base.safetensors --plot --context {saved}/text.txt --out {tmp_path}/c.png", ".html file", 2),
    ]:
        code, out, err = run(line)
        assert words in err
        assert (code, out, err.count("\n")) == (expected, "", 1)
    assert [file.name for file in tmp_path.iterdir()] == ["other.txt"]
