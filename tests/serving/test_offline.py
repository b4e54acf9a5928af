"""What a server would keep, kept by `headwise.compress`."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import headwise
from headwise.errors import BadInput
from headwise.serving import Served, Settings, equivalent

REFERENCE = str(Path(headwise.__file__).parent / "reference")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)


@pytest.mark.parametrize("method", ["keydiff+lukv", "snapkv", "lkv"])
def test_every_head_keeps_what_a_server_would(model, method):
    served = Served.of(Settings(method=method, keep=0.2), model.config)
    ids = torch.randint(5, 500, (1, 333))
    how, keep = equivalent(served, 333, block=16)
    cache = headwise.compress(model, ids, how, keep=keep)
    assert cache.lengths[:, 0].tolist() == served.tiers.kept(333, 16)
    assert how.keeps_protected == served.method.keeps_protected
    assert (how.sink, how.window) == (served.method.sink, served.method.window)


def test_another_keep_is_refused(model):
    served = Served.of(Settings(method="keydiff", keep=0.2), model.config)
    how, _ = equivalent(served, 100, block=16)
    with pytest.raises(BadInput, match="use the keep they give"):
        headwise.compress(model, torch.randint(5, 500, (1, 100)), how, keep=0.5)
