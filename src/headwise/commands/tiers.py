"""`headwise tiers`: show what vLLM would keep."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.commands.console import print_json, print_table
from headwise.commands.options import AsJson, Keep, Model
from headwise.files.strict_json import MOST
from headwise.files.terminal import say
from headwise.methods.keep import parse_keep
from headwise.models.places import REFERENCE, find

if TYPE_CHECKING:
    from headwise.serving import Served

Method = Annotated[str, typer.Option(help="One that can be served: 'headwise methods' marks what can.")]
Number = Annotated[int, typer.Option(min=1, max=MOST, help="Different keeps that heads may have.")]
Prompt = Annotated[
    str | None, typer.Option("--context", "-c", help="Prompt that budgets are solved for; left out: the longest.")
]
BlockSize = Annotated[int, typer.Option(min=1, max=MOST, help="Tokens of a block, as vLLM's --block-size.")]
Ranks = Annotated[int, typer.Option(min=1, max=MOST, help="Tensor-parallel ranks, as vLLM's --tensor-parallel-size.")]

MILLION = 1e6  # keeps of tiers are whole millionths


def tiers(
    model: Model = "reference",
    method: Method = "keydiff",
    keep: Keep = "0.2",
    tiers: Number = 8,
    context: Prompt = None,
    block_size: BlockSize = 16,
    ranks: Ranks = 1,
    as_json: AsJson = False,
) -> None:
    """Show what vLLM would keep: head budgets in tiers, blocks of a prompt, and the command that starts it."""
    source = find(model)
    from headwise.methods.keep import parse_tokens
    from headwise.models.loading import load_config, reference_path
    from headwise.serving import Served, Settings, command

    settings = Settings(
        method=method,
        keep=parse_keep(keep).value,
        tiers=tiers,
        context=None if context is None else parse_tokens(context),
        ranks=ranks,
    )
    served = Served.of(settings, load_config(source))
    line = command(str(reference_path()) if model == REFERENCE else model, settings, block_size)
    if as_json:
        print_json({"model": model, **_facts(served, block_size), "command": line})
    else:
        _print_tiers(f"{model}, {method}, keep {keep}", served, block_size)
        say(f"\n{line}")


def _facts(served: "Served", block_size: int) -> dict[str, Any]:
    """Return what --json says of a method as it is served."""
    tiers, (reading, kept) = served.tiers, served.tiers.blocks(served.context, block_size)
    return {
        **served.settings.as_json(),
        "context": served.context,
        "block_size": block_size,
        "tiers": [{"keep": millionths / MILLION, "heads": heads} for millionths, heads in tiers.sizes.items()],
        "average_keep": tiers.keep,
        "floor": tiers.floor,
        "heads_per_group": tiers.heads_per_group,
        "largest_change": served.largest_change,
        "blocks_reading": reading,
        "blocks_kept": kept,
    }


def _print_tiers(title: str, served: "Served", block_size: int) -> None:
    tiers, (reading, kept) = served.tiers, served.tiers.blocks(served.context, block_size)
    rows = [[f"{millionths / MILLION:.4f}", str(heads)] for millionths, heads in tiers.sizes.items()]
    print_table(f"{title}: {tiers.keep:.4f} on average", ["keep", "KV heads"], rows)
    say(f"A head's budget changes by at most {served.largest_change:.4f}; groups of {tiers.heads_per_group} heads.")
    say(f"A prompt of {served.context:,} tokens takes {reading:,} blocks while it is read and {kept:,} after it.")
