"""EleutherAI's lm-evaluation-harness on a compressed cache: its model "headwise" is its Hugging Face model, cut.

    python -m headwise.evals.lm_eval --model headwise \\
        --model_args pretrained=Qwen/Qwen3-4B,method=snapkv+adakv,keep=0.15 --tasks ruler,longbench

A request of the harness is one prompt, its question included, so what is measured is query-aware: all of the prompt but
its last token is compressed, and that token and everything after it see what was kept and nothing else. So it is for
text to be generated as for continuations to be scored. Nothing of headwise imports this module, or needs lm_eval.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from headwise import __version__
from headwise.cache.cache import RaggedCache
from headwise.cache.compress import compress
from headwise.errors import BadInput, BudgetInfeasible, HeadwiseError
from headwise.evals.answers import FULL
from headwise.files.terminal import complain, open_streams
from headwise.kernels.quantised import NATIVE, require_entries
from headwise.methods.keep import Keep, parse_keep
from headwise.methods.method import Method
from headwise.models.families import given, view
from headwise.tasks.document import instructed

try:
    # By name, so that types are checked alike whether the harness is installed or not.
    HFLM: Any = import_module("lm_eval.models.huggingface").HFLM
    register_model: Any = import_module("lm_eval.api.registry").register_model
except ImportError as error:
    _MISSING = f"this needs the lm-evaluation-harness ({error}): pip install 'headwise[lm-eval]'."
    if __name__ != "__main__":
        raise ModuleNotFoundError(_MISSING, name="lm_eval") from error
    complain(_MISSING)
    sys.exit(2)

QUERY_AWARE = "query-aware"
SHOWN = 60  # characters of a prompt in an error

Request = tuple[Any, list[int], list[int]]  # (context, continuation) as text, and the tokens of each


@register_model("headwise")
class HeadwiseLM(HFLM):
    """lm_eval's HFLM, which compresses every prompt with a method before it generates or scores.

    Parameters
    ----------
    method
        A name, or "full", which is HFLM as it is.
    keep
        A fraction, tokens ("256tok") or bytes ("2GiB").
    entries
        How what is kept is stored: "native", "int8", "k8v4", "int4" or "auto".
    protocol
        "query-aware" is the only one.
    options
        All that HFLM takes.

    Raises
    ------
    BadInput, ArtifactMismatch, UnsupportedModel
        Before a task is read.
    BudgetInfeasible, BadInput
        If a prompt is too short to compress. The error names the request.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        method: str | None = None,
        keep: str | float | int | Keep | None = None,
        entries: str = NATIVE,
        protocol: str = QUERY_AWARE,
        **options: Any,
    ):
        _require_query_aware(protocol)
        self.cut_with, self.keep = _parse(method, keep, entries)  # before the model is loaded, which takes its time
        self.entries = entries
        self.entries_read = self.entries_kept = 0
        super().__init__(pretrained, **options)
        if self.cut_with is not None:
            model_view = view(self.model)
            self.cut_with = instructed(self.cut_with, self.tokenizer, chat=False)  # prompts come as tokens
            self.cut_with.for_model(model_view.shape, model_view.config_hash)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Compress the prompts of a batch, padded on the left, and generate from what was kept."""
        if self.cut_with is None:
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        mask = generation_kwargs.get("attention_mask")
        memory = self._read(context, torch.ones_like(context) if mask is None else mask)
        beams = int(generation_kwargs.get("num_beams") or 1)
        if beams > 1:
            memory = memory.fork(copies=beams)
        return super()._model_generate(context, max_length, stop, **generation_kwargs, **given(self.model, memory))

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is it greedy) of every continuation. Each context is read once for all of its own."""
        if self.cut_with is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        scored: dict[int, tuple[float, bool]] = {}
        with tqdm(
            total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests"
        ) as bar:
            for context, numbers in _by_context(requests, self.max_length):
                scores = self._score(
                    torch.tensor(context, dtype=torch.int64, device="cpu"), [requests[i][2] for i in numbers]
                )
                for number, score in zip(numbers, scores, strict=True):
                    scored[number] = score
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], score)
                    bar.update()
        return [scored[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Refuse: every token of the text is predicted, so there is no context to compress before."""
        if self.cut_with is None:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        raise BadInput(
            "a task of the harness asks for loglikelihood_rolling, the likelihood of a whole text: it has no context "
            "that could be compressed first. Use headwise eval --tasks perplexity:FILE, which compresses the first "
            "part of every piece and predicts the rest, or method=full."
        )

    def get_model_info(self) -> dict[str, Any]:
        """Return HFLM's facts for the harness's results, the method, and the share of KV entries kept so far."""
        info = {"headwise_version": __version__}
        if self.cut_with is not None:
            info |= {
                "headwise_method": self.cut_with.provenance(),
                "headwise_keep": self.keep.value,
                "headwise_entries": self.entries,
                "headwise_protocol": QUERY_AWARE,
                "headwise_kept": self.entries_kept / max(1, self.entries_read),
            }
        return {**super().get_model_info(), **info}

    @torch.no_grad()
    def _score(self, context: Int[Tensor, " tokens"], continuations: Sequence[list[int]]) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is it greedy) of some continuations of one context."""
        context = context.to(self.device)[None]
        memory, scores = self._read(context, torch.ones_like(context)), []
        step = self.batch_size if isinstance(self.batch_size, int) else self.max_batch_size
        for start in range(0, len(continuations), step):
            batch = [context.new_tensor(tokens) for tokens in continuations[start : start + step]]
            # The last token of the context predicts the first of a continuation. What pads a row comes after it, where
            # causal attention does not look.
            inputs = pad_sequence([torch.cat([context[0, -1:], row[:-1]]) for row in batch], batch_first=True)
            with self._autocast():
                logits = self.model(inputs, **given(self.model, memory.fork(copies=len(batch))), use_cache=True).logits
            scores += map(_likelihood, F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype), batch)
        return scores

    def _read(self, prompts: Int[Tensor, "batch tokens"], mask: Int[Tensor, "batch tokens"]) -> RaggedCache:
        """Compress all but the last token of every prompt."""
        assert self.cut_with is not None
        with self._naming(prompts, mask), self._autocast():
            if int(mask[:, :-1].sum(-1).min()) == 0:
                raise BadInput("it has no context that could be compressed. Run such a task with method=full.")
            how = {"keep": self.keep, "entries": self.entries, "attention_mask": mask[:, :-1]}
            memory = compress(self.model, prompts[:, :-1], self.cut_with, **how)
        self.entries_kept += int(memory.lengths.sum())
        self.entries_read += int(mask[:, :-1].sum()) * memory.view.shape.num_heads
        return memory

    @contextmanager
    def _naming(self, prompts: Tensor, mask: Tensor) -> Iterator[None]:
        """Name the request in an error of ours: of a batch the shortest, on which a fraction fails first."""
        try:
            yield
        except HeadwiseError as error:
            row = int(mask.sum(-1).argmin())
            text, batch = self.tok_decode(prompts[row][mask[row].bool()].tolist()), len(prompts)
            which = f"of a batch of {batch} prompts the shortest," if batch > 1 else "the prompt"
            shown = f"...{text[-SHOWN:]}" if len(text) > SHOWN else text
            advice = (
                " A keep in tokens, such as keep=256tok, leaves shorter prompts whole."
                if isinstance(error, BudgetInfeasible)
                else ""
            )
            count = f"{int(mask[row].sum())} tokens, all but the last to be compressed"
            raise type(error)(f"{which} {shown!r} ({count}): {error}{advice}") from error

    def _autocast(self) -> AbstractContextManager[Any]:
        """Return the context of HFLM's option mixed_precision_dtype."""
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


def main() -> None:
    """Run the harness's own command line, which knows "headwise" now. An error of ours is one line and an exit code."""
    open_streams()
    try:
        import_module("lm_eval.__main__").cli_evaluate()
    except HeadwiseError as error:
        print(file=sys.stderr)  # the harness has left a progress bar on the line
        complain(error)
        sys.exit(2 if isinstance(error, BadInput) else 1)


def _require_query_aware(protocol: str) -> None:
    if protocol != QUERY_AWARE:
        raise BadInput(
            f"protocol={protocol!r} is not possible here: the harness gives document and question as one prompt, so it "
            f"is {QUERY_AWARE!r}. For documents that are cut before a question is seen use headwise eval."
        )


def _parse(method: str | None, keep: str | float | int | Keep | None, entries: str) -> tuple[Method | None, Keep]:
    """Return the method (None for "full") and the keep. Both must be given, for results quote the arguments."""
    require_entries(entries)
    if method == FULL and entries != NATIVE:
        raise BadInput(f"method={FULL} is the harness's own model, whose cache is native; use keep=1.0 of a method.")
    if method == FULL:
        return None, parse_keep(1.0)
    if method is None or keep is None:
        missing = "method" if method is None else "keep"
        raise BadInput(f"{missing} is missing: write for instance method=snapkv+adakv,keep=0.15, or method={FULL}.")
    return Method.parse(method), parse_keep(keep)


def _by_context(requests: Sequence[Request], limit: int) -> list[tuple[tuple[int, ...], list[int]]]:
    """Return contexts, longest first, with the numbers of their requests. The left is cut to fit, as HFLM does."""
    numbers: dict[tuple[int, ...], list[int]] = {}
    for number, (_, context, continuation) in enumerate(requests):
        room = limit + 1 - len(continuation)  # its last token is predicted only
        numbers.setdefault(tuple(context[-room:]), []).append(number)
    return sorted(numbers.items(), key=lambda item: -len(item[0]))


def _likelihood(logs: Tensor, tokens: Int[Tensor, " tokens"]) -> tuple[float, bool]:
    """Return (log-likelihood, is it greedy) of the tokens; row t of `logs` [T, vocabulary] predicts token t."""
    logs = logs[: len(tokens)]
    return float(logs.gather(-1, tokens[:, None]).sum()), bool((logs.argmax(-1) == tokens).all())


if __name__ == "__main__":
    main()
