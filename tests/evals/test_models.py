"""Loading models: from a folder, without a network, and what is said when it cannot be done."""

import ast
import json
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from seeing import KINDS, config_of
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, RobertaConfig, T5Config

from headwise.errors import BadInput, UnsupportedModel
from headwise.files import hub
from headwise.models import loading as models
from headwise.models import places
from headwise.models.loading import is_out_of_memory, load, load_config, load_tokenizer
from headwise.models.plan import plan


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
    RobertaConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="'roberta' is not supported"):
        load(str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_sees_is_loaded_with_its_eyes_and_planned_for(kind, model_folders, tmp_path):
    made = AutoModelForImageTextToText.from_config(config_of(kind), dtype=torch.float32)
    made.save_pretrained(tmp_path)
    load_tokenizer(str(model_folders["base"])).save_pretrained(tmp_path)
    model, _ = load(str(tmp_path))
    assert type(model) is type(made)
    assert all(torch.equal(weight, made.state_dict()[name]) for name, weight in model.state_dict().items())
    assert plan(load_config(str(tmp_path)), context=64, keep=0.5).weight_bytes == sum(
        weight.nbytes for weight in made.parameters()
    )


def test_what_is_no_causal_model_is_refused_by_its_configuration(tmp_path):
    T5Config().save_pretrained(tmp_path)
    for read in (load, load_config):
        with pytest.raises(UnsupportedModel, match="'t5' is not supported: transformers makes no causal"):
            read(str(tmp_path))
    with pytest.raises(UnsupportedModel, match="'t5' is not supported"):
        plan(T5Config(), context=64, keep=0.5)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "../nowhere"])
def test_a_folder_that_is_not_there(name):
    assert refusal(name).startswith(f"there is no folder {name}. Give a folder written by save_pretrained")


@pytest.mark.parametrize("name", ["no/such-model", "nothing here"])
def test_a_name_that_leads_nowhere(name):
    assert "Give a folder written by save_pretrained, a hub id" in refusal(name)


def test_a_bare_name_that_leads_nowhere():
    said = refusal("mymodel")
    assert said.startswith("cannot load 'mymodel': there is no folder of this name, and HF_HUB_OFFLINE switches the")
    assert "Did you mean" not in said


@pytest.mark.parametrize("name", ["refrence", "Reference", "references"])
def test_a_slip_of_the_bundled_name_is_noticed(name):
    assert "Did you mean 'reference'?" in refusal(name)


@pytest.mark.parametrize("name", ["a/b/c", "two words", "a//b", "C:\\models\\mine"])
def test_a_name_that_no_hub_can_have(name):
    assert refusal(name).startswith(f"there is no folder {name}. Give a folder")


@pytest.fixture
def online(monkeypatch):
    """As where the hub may be asked; returns a function that says where it is."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    place = "http://127.0.0.1:{}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    return lambda port: monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", place.format(port))


@pytest.mark.parametrize("name", ["mymodel", "some/model"])
def test_a_hub_that_is_not_there_is_asked_once(online, name):
    """transformers tries again for half a minute."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        online(unused.getsockname()[1])  # nobody listens
        start = time.monotonic()
        said = refusal(name)
    assert f"cannot load {name!r}: there is no folder of this name, and the hub could not be reached (" in said
    assert time.monotonic() - start < 3


def test_a_hub_that_does_not_answer_is_not_waited_for(online, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        online(silent.getsockname()[1])
        start = time.monotonic()
        assert "the hub " in refusal("some/model")
        assert time.monotonic() - start < 3
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")  # read when the library is imported
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
        start = time.monotonic()
        assert "the hub " in refusal("some/model")
        assert time.monotonic() - start >= 1


def test_a_name_server_that_takes_its_time(online, monkeypatch):
    """The time for one address says nothing about all of them, nor about finding their names."""
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, timeout: time.sleep(5))
    start = time.monotonic()
    assert "the hub did not answer within 0.1 seconds (HF_HUB_ETAG_TIMEOUT" in refusal("some/model")
    assert time.monotonic() - start < 3


@pytest.fixture
def options(monkeypatch):
    """Those with which transformers is asked for anything."""
    noted, config = [], RobertaConfig()
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name, **options: noted.append(options) or config)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **options: noted.append(options))
    return noted


def no_answer(url, timeout):
    raise ConnectionError("no route")


def no_such_file(url, timeout):
    raise HfHubHTTPError.__new__(HfHubHTTPError)


@pytest.mark.parametrize("ask", [no_answer, no_such_file, lambda url, timeout: None])
def test_a_hub_that_answers_is_left_to_transformers(online, options, monkeypatch, ask):
    """Whatever it answers; what is in the cache serves where it does not."""
    monkeypatch.setattr(hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(places, "try_to_load_from_cache", lambda name, file: "config.json")
    load_config("some/model")
    load_tokenizer("some/model")
    local = {"local_files_only": True} if ask is no_answer else {}
    assert options == [{"trust_remote_code": False, **local}] * 2


def test_a_folder_asks_no_hub(model_folders, online, monkeypatch):
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, timeout: pytest.fail("the hub was asked"))
    load(str(model_folders["base"]), device="cpu")
    load_tokenizer(str(model_folders["base"]))


def test_every_place_that_reads_a_model_says_that_its_code_is_not_run():
    root = Path(models.__file__).parents[1]
    calls = [
        (path.name, {word.arg: ast.unparse(word.value) for word in node.keywords})
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "from_pretrained"
    ]
    assert len(calls) >= 2
    assert {name: words.get("trust_remote_code") for name, words in calls} == dict.fromkeys(dict(calls), "False")


def test_code_that_comes_with_a_model_is_not_run(spoiled):
    """Without a word about it transformers asks on the terminal whether it may be."""
    (spoiled / "evil.py").write_text("open('ran', 'w')")
    config = json.loads((spoiled / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (spoiled / "config.json").write_text(json.dumps(config))
    assert f"cannot load {str(spoiled)!r}" in refusal(spoiled)


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

    monkeypatch.setattr("headwise.models.loading.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(type(error)) as caught:
        load(str(model_folders["base"]), device="cpu")
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("a bug"))


def test_unknown_dtypes_and_devices(model_folders):
    assert "auto, float32, bfloat16, float16" in refusal(model_folders["base"], dtype="int4")
    assert "Choose auto, cpu or cuda" in refusal(model_folders["base"], device="abacus")
    assert "Choose auto, cpu or cuda" in refusal(model_folders["base"], device="cuda:99")


@pytest.mark.parametrize("name", ["meta", "hpu", "CPU", "auto:1", ""])
def test_devices_that_no_model_runs_on(name):
    with pytest.raises(BadInput, match=r"cannot be used: it is none of cpu, cuda, mps, xpu\. Choose auto"):
        models.find_device(name)


def test_a_device_that_is_not_here_is_told_briefly():
    with pytest.raises(BadInput, match=r"cannot be used: .*\.\.\. Choose auto, cpu or cuda") as caught:
        models.find_device("xpu")
    assert len(str(caught.value)) < 150
