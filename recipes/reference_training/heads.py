"""Which KV heads the reference model needs: evict the context of some of them and see whether answers survive.

Eviction is exact here but frees nothing: one pass over document, question and ideal answer, in which the tokens after
the context do not see the evicted entries. An answer counts when every token of it is predicted, as in
greedy decoding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from headwise.evals.lexicon import REFERENCE_LEXICON
from headwise.evals.ruler import generate

from .asking import encode, encode_document
from .evaluation import EVALUATION_SEED

NAME = "evicting"
ROWS_AT_ONCE = 16
RECENT_TOKENS = 16  # kept everywhere in `accuracy_with_only`


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Right-padded token ids [rows, tokens], where the context of each row ends, and which tokens are answers."""

    ids: Tensor
    context_ends: Tensor
    is_answer: Tensor


def dense_rows(*, length: int, num_samples: int) -> Rows:
    """Write evaluation samples of niah_multikey_dense, each with its first question and the ideal answer."""
    ids = torch.zeros(num_samples, length, dtype=torch.long)
    context_ends = torch.zeros(num_samples, dtype=torch.long)
    is_answer = torch.zeros(num_samples, length, dtype=torch.bool)
    for row in range(num_samples):
        sample = generate(
            "niah_multikey_dense", lexicon=REFERENCE_LEXICON, length=length, seed=EVALUATION_SEED, index=row
        )
        question = sample.questions[0]
        context, answer = encode_document(sample.context), encode(question.completion)
        prompt = encode(question.prompt)
        end = len(context) + len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*context, *prompt, *answer])
        context_ends[row] = len(context)
        is_answer[row, end - len(answer) : end] = True
    return Rows(ids=ids, context_ends=context_ends, is_answer=is_answer)


class HeadStudy:
    """A model, rows to answer, and the accuracy under any choice of evicted heads."""

    def __init__(self, model: LlamaForCausalLM, rows: Rows) -> None:
        self.model = model
        self.rows = rows
        self.shape = (model.config.num_hidden_layers, cast(int, model.config.num_key_value_heads))

    def accuracy(self, evicted: np.ndarray, *, recent: int = 0) -> float:
        """Return the share of right answers when the heads where `evicted` [layers, heads] is true keep only the
        document's first token and its `recent` last ones.
        """
        right = []
        for start in range(0, len(self.rows.ids), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            with self._evicting(torch.from_numpy(evicted), self.rows.context_ends[part], recent), torch.no_grad():
                predicted = self.model(self.rows.ids[part], use_cache=False).logits[:, :-1].argmax(-1)
            is_right = predicted == self.rows.ids[part, 1:]
            right.append((is_right | ~self.rows.is_answer[part, 1:]).all(1))
        return torch.cat(right).float().mean().item()

    def accuracy_without_each(self) -> np.ndarray:
        """Return the accuracy [layers, heads] without the context of one head."""
        accuracies = np.empty(self.shape)
        for head in np.ndindex(self.shape):
            evicted = np.zeros(self.shape, bool)
            evicted[head] = True
            accuracies[head] = self.accuracy(evicted)
        return accuracies

    def accuracy_with_only(self, kept: int, importance: np.ndarray) -> float:
        """Return the accuracy when only the `kept` most important heads keep their context, the others its end."""
        evicted = np.ones(self.shape, bool)
        evicted.flat[np.argsort(-importance, axis=None, kind="stable")[:kept]] = False
        return self.accuracy(evicted, recent=RECENT_TOKENS)

    @contextmanager
    def _evicting(self, evicted: Tensor, context_ends: Tensor, recent: int) -> Iterator[None]:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **kwargs: Any
        ) -> tuple[Tensor, None]:
            tokens = torch.arange(query.shape[2])
            ends = context_ends[:, None]
            gone = (tokens >= 1) & (tokens < ends - recent)  # [rows, tokens]
            hidden = (tokens >= ends)[:, :, None] & gone[:, None, :]  # [rows, queries, keys]
            head_evicted = evicted[cast(int, module.layer_idx)].repeat_interleave(query.shape[1] // key.shape[1])
            causal = tokens[:, None] >= tokens
            visible = causal & ~(hidden[:, None] & head_evicted[:, None, None])
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
