"""Which KV heads the reference model needs: evict the context of some of them and see whether answers survive.

Eviction is exact here but frees nothing: the context is read once, then question and ideal answer are read with the
evicted entries masked. An answer counts when every token of it is predicted, as in greedy decoding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from headwise.tasks.mini_ruler.lexicon import REFERENCE_LEXICON
from headwise.tasks.mini_ruler.suite import generate

from .asking import encode, encode_document
from .evaluation import EVALUATION_SEED

NAME = "evicting"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Token ids of documents [rows, context], of their questions and ideal answers [rows, tail]."""

    contexts: Tensor
    tails: Tensor
    num_answer_tokens: int


def dense_rows(*, length: int, num_samples: int) -> Rows:
    """Write evaluation samples of niah_multikey_dense, each with its first question; all have the same size."""
    contexts, tails, num_answer_tokens = [], [], 0
    for index in range(num_samples):
        sample = generate(
            "niah_multikey_dense", lexicon=REFERENCE_LEXICON, length=length, seed=EVALUATION_SEED, index=index
        )
        question = sample.questions[0]
        answer = encode(question.completion)
        contexts.append(encode_document(sample.context))
        tails.append(encode(question.prompt) + answer)
        num_answer_tokens = len(answer)
    return Rows(contexts=torch.tensor(contexts), tails=torch.tensor(tails), num_answer_tokens=num_answer_tokens)


class HeadStudy:
    """A model that has read the rows' contexts, and its accuracy under any choice of evicted heads [layers, heads]."""

    def __init__(self, model: LlamaForCausalLM, rows: Rows) -> None:
        self.model = model
        self.rows = rows
        self.shape = (model.config.num_hidden_layers, cast(int, model.config.num_key_value_heads))
        self._cache = DynamicCache()
        with torch.no_grad():
            model.model(rows.contexts, past_key_values=self._cache)

    @torch.no_grad()
    def accuracy(self, evicted: np.ndarray) -> float:
        """Return the share of right answers when the heads where `evicted` is true keep only the first token."""
        tails = self.rows.tails
        with self._evicting(torch.from_numpy(evicted)):
            predicted = self.model(tails[:, :-1], past_key_values=self._cache).logits.argmax(-1)
        self._cache.crop(1 - tails.shape[1])
        right = (predicted == tails[:, 1:])[:, -self.rows.num_answer_tokens :]
        return right.all(1).float().mean().item()

    def accuracy_without_each(self) -> np.ndarray:
        """Return the accuracy [layers, heads] without the context of one head."""
        return self._accuracy_without_another(np.zeros(self.shape, bool))

    def accuracy_with_fewest(self) -> list[tuple[int, float]]:
        """Evict one head after the other, always the one missed least; return what is left: (heads kept, accuracy)."""
        evicted = np.zeros(self.shape, bool)
        course = []
        for kept in reversed(range(evicted.size)):
            accuracies = self._accuracy_without_another(evicted)
            least_missed = np.unravel_index(np.nanargmax(accuracies), self.shape)
            evicted[least_missed] = True
            course.append((kept, float(accuracies[least_missed])))
        return course

    def _accuracy_without_another(self, evicted: np.ndarray) -> np.ndarray:
        accuracies = np.full(self.shape, np.nan)
        for head in np.ndindex(self.shape):
            if not evicted[head]:
                another = evicted.copy()
                another[head] = True
                accuracies[head] = self.accuracy(another)
        return accuracies

    @contextmanager
    def _evicting(self, evicted: Tensor) -> Iterator[None]:
        context_length = self.rows.contexts.shape[1]

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **kwargs: Any
        ) -> tuple[Tensor, None]:
            positions = torch.arange(key.shape[2])
            causal = positions[-query.shape[2] :, None] >= positions
            gone = (positions >= 1) & (positions < context_length)
            head_evicted = evicted[cast(int, module.layer_idx)].repeat_interleave(query.shape[1] // key.shape[1])
            visible = causal & ~(gone & head_evicted[:, None, None])  # [heads, queries, keys]
            output = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=visible, scale=scaling, enable_gqa=True
            )
            return output.transpose(1, 2), None

        before = self.model.config._attn_implementation or "sdpa"
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
        self.model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)
