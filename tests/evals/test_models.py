"""Loading models: from a folder, without a network, and what is said when it cannot be done."""

import shutil

import pytest
import torch
from transformers import GPT2Config

from headwise.errors import BadInput, UnsupportedModel
from headwise.evals.models import is_out_of_memory, load, load_config


@pytest.fixture
def spoiled(model_folders, tmp_path):
    """A copy of a good folder, to be damaged."""
    return shutil.copytree(model_folders["base"], tmp_path / "model")


def refusal(name: object, **options) -> str:
    with pytest.raises(BadInput) as caught:
        load(str(name), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["base", "qwen3"])
def test_a_folder_gives_a_model_and_a_tokenizer_ready_to_answer(model_folders, kind):
    model, tokenizer = load(str(model_folders[kind]))
    assert not model.training
    assert (model.dtype, model.device.type) == (torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id is not None


def test_dtype_by_name(model_folders):
    assert load(str(model_folders["base"]), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16


def test_a_tokenizer_without_padding_pads_with_its_end(spoiled):
    text = (spoiled / "tokenizer_config.json").read_text()
    (spoiled / "tokenizer_config.json").write_text(text.replace('"pad_token": "<pad>"', '"pad_token": null'))
    tokenizer = load(str(spoiled))[1]
    assert tokenizer.pad_token == tokenizer.eos_token


def test_the_configuration_alone_needs_no_weights(spoiled):
    (spoiled / "model.safetensors").unlink()
    assert load_config(str(spoiled)).model_type == "llama"
    assert "cannot load" in refusal(spoiled)


def test_an_unsupported_model_is_refused_before_weights_are_read(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="'gpt2' is not supported"):
        load(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "../nowhere"])
def test_a_folder_that_is_not_there(name):
    assert refusal(name).startswith(f"there is no folder {name}. Give a folder written by save_pretrained")


@pytest.mark.parametrize("name", ["no/such-model", "nothing here"])
def test_a_name_that_leads_nowhere(name):
    assert "Give a folder written by save_pretrained, a hub id" in refusal(name)


def test_a_file_in_place_of_its_folder(model_folders):
    assert "give the folder it is in" in refusal(model_folders["base"] / "config.json")


def test_damaged_folders(spoiled):
    weights = spoiled / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot load" in refusal(spoiled)
    (spoiled / "config.json").write_text("{")
    assert "not a valid JSON" in refusal(spoiled)


def test_weights_of_another_size(spoiled):
    config = (spoiled / "config.json").read_text()
    (spoiled / "config.json").write_text(config.replace('"hidden_size": 64', '"hidden_size": 32'))
    assert "cannot load" in refusal(spoiled)


def test_no_tokenizer(spoiled):
    for file in spoiled.glob("tokenizer*"):
        file.unlink()
    said = f"cannot load {str(spoiled)!r}: the folder has no tokenizer files (tokenizer.json, tokenizer_config.json). "
    assert refusal(spoiled).startswith(said)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_a_model_too_large_for_the_memory_is_no_bad_input(model_folders, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("headwise.evals.models.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(type(error)) as caught:
        load(str(model_folders["base"]), device="cpu")
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("a bug"))


def test_unknown_dtypes_and_devices(model_folders):
    assert "auto, float32, bfloat16, float16" in refusal(model_folders["base"], dtype="int4")
    assert "Choose auto, cpu or cuda" in refusal(model_folders["base"], device="abacus")
    assert "Choose auto, cpu or cuda" in refusal(model_folders["base"], device="cuda:99")
