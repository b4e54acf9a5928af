"""`headwise plan`: compute memory before and after from a model's configuration."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from headwise.commands.console import print_json, print_table
from headwise.commands.inputs import require_entries
from headwise.commands.options import AsJson, Chunk, Dtype, Entries, Keep, Model, Reading
from headwise.commands.tables import say_sliding, yes
from headwise.files.strict_json import MOST
from headwise.files.terminal import say, size
from headwise.methods.reading import require_reading
from headwise.models.places import find

if TYPE_CHECKING:
    from headwise.models.plan import Plan

ContextTokens = Annotated[str, typer.Option("--context", "-c", help="Tokens, such as 32768 or 128k.")]
Memory = Annotated[str | None, typer.Option(help="Memory of the device, such as 24GiB.")]
Batch = Annotated[int, typer.Option(min=1, max=MOST, help="Sequences at a time.")]


def plan(
    model: Model = "reference",
    context: ContextTokens = "1024",
    keep: Keep = "0.15",
    entries: Entries = "native",
    memory: Memory = None,
    batch: Batch = 1,
    reading: Reading = "exact",
    prefill_chunk_size: Chunk = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Compute KV memory before and after, and what fits. Needs the configuration only, no weights."""
    stored, source = require_entries(entries), find(model)
    require_reading(reading, stored)
    from headwise.methods.keep import parse_bytes, parse_tokens
    from headwise.models.loading import find_dtype, load_config
    from headwise.models.plan import plan as make

    known_dtype = find_dtype(model, dtype)
    planned = make(
        load_config(source),
        context=parse_tokens(context),
        keep=keep,
        entries=stored,
        batch=batch,
        memory=None if memory is None else parse_bytes(memory),
        dtype=None if known_dtype == "auto" else known_dtype,
        reading=reading,
        prefill_chunk_size=prefill_chunk_size,
    )
    if as_json:
        print_json({"model": model, **asdict(planned)})
        return
    title = f"{model}, made for {planned.max_positions:,} tokens"
    kind = "" if planned.entries == "native" else f", {planned.entries}"
    heads = ["", "everything kept", f"keep {planned.keep}" + kind]
    print_table(f"{title}: {planned.context:,} x {planned.batch}, {planned.dtype}", heads, _rows(planned))
    say_sliding(planned.sliding_kv_bytes)
    _say_limits(planned)
    say(f"Note: {planned.note}.")


def _rows(plan: "Plan") -> list[list[str]]:
    """Return rows of bytes without and with compression, and of what fits if the memory is known."""
    whole = plan.reading == "exact" and plan.prefill_chunk_size == plan.context
    pieces = "" if whole else f" ({plan.reading}, {plan.prefill_chunk_size:,} tokens a piece)"
    rows = [
        ["weights", size(plan.weight_bytes), size(plan.weight_bytes)],
        ["KV held", size(plan.full_kv_bytes), size(plan.kv_bytes)],
        [f"KV peak while reading{pieces}", size(plan.full_kv_bytes), size(plan.peak_kv_bytes)],
        ["the same, scope 'model'", size(plan.full_kv_bytes), size(plan.peak_kv_bytes_model_scope)],
    ]
    if plan.memory_bytes is not None:
        rows += [
            [f"fits in {size(plan.memory_bytes)}", yes(plan.full_fits), yes(plan.fits)],
            ["largest batch", str(plan.max_batch_full), str(plan.max_batch)],
            ["longest context", f"{plan.max_context_full:,}", f"{plan.max_context:,}"],
        ]
    return rows


def _say_limits(plan: "Plan") -> None:
    """Print it if the model's positions, and not the memory, limit the context."""
    made_for = f"{plan.max_positions:,} tokens"
    if plan.beyond_positions:
        say(f"Too long for the model: it was made for {made_for}, so {plan.context:,} are refused.")
    elif (plan.max_context or 0) > plan.max_positions:
        say(f"The model was made for {made_for}: a longer context may fit, but is refused.")
