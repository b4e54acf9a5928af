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
