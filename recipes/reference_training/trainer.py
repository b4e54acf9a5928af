"""The training loop of the reference model: bf16 weights with float32 masters, Muon and AdamW, checkpoints, a log.

A stage supplies batches and a schedule; the loop is the same for all of them and resumes from its last checkpoint.
"""

import copy
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from . import blocked_attention
from .muon import Muon

CHECKPOINT_EVERY_SECONDS = 180.0
LOG_EVERY_STEPS = 50
WARMUP_STEPS = 40
SCORED_WEIGHT = 0.24  # of a row's largest: tokens that weigh less are trained on but not counted in the accuracy


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Token ids [rows, length] and how much each one weighs in the loss when it is predicted.

    `alternatives` [rows, length, choices] lists further tokens that are as right as the one in `ids`, -1 for none.
    """

    ids: Tensor
    weights: Tensor
    alternatives: Tensor | None
    labels: Sequence[str]

    @classmethod
    def from_numpy(
        cls, ids: np.ndarray, weights: np.ndarray, *, labels: Sequence[str], alternatives: np.ndarray | None = None
    ) -> Self:
        """Wrap arrays of the same leading shape; `labels` names the kind of every row for the log."""
        return cls(
            ids=torch.from_numpy(ids),
            weights=torch.from_numpy(weights),
            alternatives=None if alternatives is None else torch.from_numpy(alternatives),
            labels=labels,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How a stage runs: `minutes` of training; the last `decay_share` of them lowers the learning rates."""

    minutes: float
    muon_lr: float
    adam_lr: float
    decay_share: float = 0.3

    def learning_rate_factor(self, progress: float, step: int) -> float:
        """Return the multiplier of both learning rates at `progress` in [0, 1]."""
        return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, max(0.05, (1 - progress) / self.decay_share))


MakeBatch = Callable[[np.random.Generator, float], Batch]


def new_model(config: LlamaConfig, *, seed: int) -> LlamaForCausalLM:
    """Build a model with plain normal weights: variance 1/columns, less on the way back into the residual stream."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.ndim != 2:
            continue
        std = weight.shape[1] ** -0.5
        if "embed" in name:
            std = 0.05
        elif "o_proj" in name or "down_proj" in name:
            std /= math.sqrt(2 * config.num_hidden_layers)
        nn.init.normal_(weight, std=std)
    return model


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the model made of the weighted tokens of a batch."""

    loss: Tensor
    correct: Tensor  # [weighted tokens]
    rows: Tensor  # [weighted tokens], the row each one stands in
    scored: Tensor  # [weighted tokens], whether it counts in the accuracy


def predict(model: LlamaForCausalLM, batch: Batch) -> Predictions:
    """Compute the weighted mean of -log p(token or one of its alternatives), and what was predicted right."""
    weights = batch.weights[:, 1:].flatten()
    chosen = weights.nonzero().squeeze(1)
    hidden = model.model(batch.ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1].flatten(0, 1)[chosen]).float()
    right = batch.ids[:, 1:].flatten()[chosen, None]  # [tokens, choices]
    if batch.alternatives is not None:
        right = torch.cat([right, batch.alternatives[:, 1:].flatten(0, 1)[chosen]], 1)
    log_probs = logits.log_softmax(-1).gather(1, right.clamp(min=0)).masked_fill(right < 0, -torch.inf)
    chosen_weights = weights[chosen]
    return Predictions(
        loss=-(log_probs.logsumexp(1) * chosen_weights).sum() / chosen_weights.sum(),
        correct=(logits.argmax(-1, keepdim=True) == right).any(1),
        rows=chosen // (batch.ids.shape[1] - 1),
        scored=(batch.weights > SCORED_WEIGHT * batch.weights.amax(1, keepdim=True))[:, 1:].flatten()[chosen],
    )


class Trainer:
    """One model in training: float32 masters, the bf16 copy that computes, optimizers, checkpoint and log."""

    def __init__(self, model: LlamaForCausalLM, schedule: Schedule, out: Path, *, seed: int) -> None:
        blocked_attention.register()
        self.schedule = schedule
        self.out = out
        self.seed = seed
        self.master = model.float()
        self.worker = copy.deepcopy(model).bfloat16()
        self.worker.set_attn_implementation(blocked_attention.NAME)
        named = list(self.master.named_parameters())
        is_matrix = {name: weight.ndim == 2 and "embed" not in name for name, weight in named}
        self.optimizers = (
            Muon([weight for name, weight in named if is_matrix[name]], lr=schedule.muon_lr),
            torch.optim.AdamW(
                [weight for name, weight in named if not is_matrix[name]],
                lr=schedule.adam_lr,
                betas=(0.9, 0.98),
                weight_decay=0.0,
            ),
        )
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self._tallies: dict[str, list[float]] = defaultdict(list)
        out.mkdir(parents=True, exist_ok=True)
        if self._checkpoint.exists():
            self._load(torch.load(self._checkpoint, weights_only=True))

    @property
    def progress(self) -> float:
        """The share of the scheduled minutes that has been trained."""
        return self.seconds / 60 / self.schedule.minutes

    def run(self, make_batch: MakeBatch) -> LlamaForCausalLM:
        """Train until the scheduled minutes are used, and return the float32 model."""
        saved_at = self.seconds
        while self.progress < 1:
            started = time.perf_counter()
            # One generator per step, so that a resumed run sees the data it would have seen.
            rng = np.random.default_rng((self.seed, self.step))
            self._train_step(make_batch(rng, self.progress))
            self.seconds += time.perf_counter() - started
            if self.seconds - saved_at > CHECKPOINT_EVERY_SECONDS:
                self._save()
                saved_at = self.seconds
        self._save()
        return self.master

    def _train_step(self, batch: Batch) -> None:
        predictions = predict(self.worker, batch)
        predictions.loss.backward()
        masters, workers = list(self.master.parameters()), list(self.worker.parameters())
        for master, worker in zip(masters, workers, strict=True):
            assert worker.grad is not None
            master.grad = worker.grad.float()
            worker.grad = None
        nn.utils.clip_grad_norm_(masters, 1.0)
        factor = self.schedule.learning_rate_factor(self.progress, self.step)
        rates = (self.schedule.muon_lr, self.schedule.adam_lr)
        for optimizer, rate in zip(self.optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for master, worker in zip(masters, workers, strict=True):
                worker.copy_(master)
        self.step += 1
        self.tokens += batch.ids.numel()
        self._tally(batch, predictions)

    def _tally(self, batch: Batch, predictions: Predictions) -> None:
        self._tallies["loss"].append(predictions.loss.item())
        labels = np.array(batch.labels)[predictions.rows[predictions.scored].numpy()]
        correct = predictions.correct[predictions.scored].numpy()
        for label in sorted(set(batch.labels)):
            if (labels == label).any():
                self._tallies[label].append(float(correct[labels == label].mean()))
        if self.step % LOG_EVERY_STEPS == 0:
            means = {name: round(float(np.mean(values)), 3) for name, values in self._tallies.items()}
            self._tallies.clear()
            self.log({"length": batch.ids.shape[1], **means})

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to the training log, and show it."""
        stamp = {"step": self.step, "tokens": self.tokens, "minutes": round(self.seconds / 60, 2)}
        line = json.dumps(stamp | entry)
        print(line, flush=True)
        with (self.out / "training_log.jsonl").open("a") as log:
            log.write(line + "\n")

    @property
    def _checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def _save(self) -> None:
        state = {
            "config": self.master.config.to_dict(),
            "model": self.master.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._checkpoint)

    def _load(self, state: dict[str, Any]) -> None:
        self.master.load_state_dict(state["model"])
        self.worker.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
