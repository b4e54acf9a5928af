"""Shape annotations are checked while tests run, and only then; torch runs on one thread, without a network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("headwise", "beartype.beartype")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_progress_in_logs(monkeypatch):
    """Whether a command takes five seconds depends on the machine. test_console.py sees to these lines."""
    monkeypatch.setattr("headwise.commands.console.FIRST_LINE", 1e9)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """Folders of tiny random models: "base" (Llama), "chat" (Llama with a chat template) and "qwen3"."""
    from folders import CHAT_TEMPLATE, save_model

    root = tmp_path_factory.mktemp("models")
    kinds = {"base": ("llama", None), "chat": ("llama", CHAT_TEMPLATE), "qwen3": ("qwen3", None)}
    return {name: save_model(root / name, *kind) for name, kind in kinds.items()}
