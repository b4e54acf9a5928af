"""vLLM's OpenAI server with the plugin, and the real `openai` client."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import URLError
from urllib.request import urlopen

import openai
import pytest
from serving_engine import COUNT, FEWER, MODEL, compressed_tokens, mini_ruler_prompts
from transformers import AutoTokenizer

from headwise.serving import ARCHITECTURE

METHOD, KEEP, BLOCK = "keydiff+lukv", 0.2, 16
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def _command(folder, port, **settings):
    """As `vllm serve MODEL ...`: the CPU build has no such command."""
    (folder / "chat.jinja").write_text(TEMPLATE)
    overrides = {"architectures": [ARCHITECTURE], "headwise": settings}
    words = f"--served-model-name bundled --dtype float32 --max-model-len 2048 --block-size {BLOCK} --port {port}"
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, *words.split()),
        *("--host", "127.0.0.1", "--no-enable-prefix-caching", "--enforce-eager", "--max-num-seqs", "16"),
        *("--chat-template", str(folder / "chat.jinja"), "--hf-overrides", json.dumps(overrides)),
    ]


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A client of a running server."""
    folder, port = tmp_path_factory.mktemp("server"), _free_port()
    log = folder / "log"
    with log.open("w") as sink:
        command = _command(folder, port, method=METHOD, keep=KEEP)
        server = subprocess.Popen(command, stdout=sink, stderr=sink, env=ENVIRONMENT)
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", log)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300)
        finally:
            server.terminate()
            server.wait(timeout=60)


def _wait(server, url, log):
    for _ in range(180):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def _complete(client, prompt, **more):
    return client.completions.create(
        model="bundled", prompt=prompt, max_tokens=COUNT, temperature=0, extra_body={"ignore_eos": True}, **more
    )


@pytest.fixture(scope="module")
def prompts():
    return mini_ruler_prompts(*FEWER)[::4]


@pytest.fixture(scope="module")
def answers(prompts):
    """What `headwise.compress` leads to."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens = compressed_tokens(prompts, METHOD, KEEP, COUNT, BLOCK)
    return [tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False) for answer in tokens]


def test_completions_at_once(client, prompts, answers):
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(lambda prompt: _complete(client, prompt), prompts))
    assert [each.choices[0].text.strip() for each in found] == [answer.strip() for answer in answers]
    assert [each.usage.prompt_tokens for each in found] == [len(prompt) for prompt in prompts]


def test_a_completion_that_is_streamed(client, prompts, answers):
    pieces = list(_complete(client, prompts[0], stream=True))
    assert len(pieces) > 4
    assert "".join(piece.choices[0].text for piece in pieces).strip() == answers[0].strip()


def test_chat_streamed_and_not(client, prompts):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    content = tokenizer.decode(prompts[1], skip_special_tokens=True)
    asked = {
        "model": "bundled",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": COUNT,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [
        piece.choices[0].delta.content or ""
        for piece in client.chat.completions.create(stream=True, **asked)
        if piece.choices
    ]
    assert whole.strip()
    assert "".join(pieces) == whole


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["bundled"]


def test_a_prompt_that_is_too_long_is_the_clients_fault(client):
    with pytest.raises(openai.BadRequestError):
        _complete(client, [5] * 4000)
    assert _complete(client, [5] * 40).choices[0].finish_reason == "length"


def test_a_server_with_wrong_settings_does_not_start(tmp_path):
    command = _command(tmp_path, _free_port(), method="adakv", keep=0.2)
    run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert run.returncode != 0
    assert "headwise: 'adakv' cannot be served, because of its allocator 'adakv'" in run.stderr + run.stdout
