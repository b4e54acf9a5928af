"""The command line, put together: every verb is a file in `commands/`. Results on stdout, progress on stderr.

Exit codes: 0 done, 1 it could not be done, 2 the command line or an input is wrong, 130 interrupted (endings.py).
"""

from typing import Annotated

import typer

from headwise import __version__
from headwise.commands.bench.app import app as bench
from headwise.commands.build_kernels import build_kernels
from headwise.commands.calibrate import calibrate
from headwise.commands.compare import compare
from headwise.commands.doctor import doctor
from headwise.commands.endings import Commands
from headwise.commands.endings import run as run_to_the_end
from headwise.commands.evaluate import evaluate
from headwise.commands.generate import generate
from headwise.commands.inspect import inspect
from headwise.commands.methods import methods
from headwise.commands.plan import plan
from headwise.commands.profile import profile
from headwise.commands.report import report
from headwise.commands.shrink import shrink
from headwise.commands.solve import solve
from headwise.commands.tiers import tiers
from headwise.commands.train import train

app = typer.Typer(
    name="headwise",
    cls=Commands,
    epilog="Example: headwise compare --model reference --methods full,snapkv,adakv --keep 0.15",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point: an error is one line on stderr and an exit code."""
    run_to_the_end(app)


def _version(asked: bool | None) -> None:
    if asked:
        print(f"headwise {__version__}")
        raise typer.Exit


Version = Annotated[bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")]


@app.callback()
def every_command(version: Version = None) -> None:
    """Evict a language model's KV cache head by head: less memory, faster decoding."""


# In the order of --help.
app.command(epilog="Example: headwise compare --model reference --methods full,snapkv,adakv --keep 0.15,0.25")(compare)
app.command(
    epilog='Example: headwise generate --model Qwen/Qwen3-4B --context report.txt -q "Who signed it?" --keep 0.2'
)(generate)
app.command(
    "eval",
    epilog="Example: headwise eval --tasks mini-ruler:niah_multikey_dense --methods keydiff --keep 0.15,0.25 --out run",
)(evaluate)
app.command(epilog="Example: headwise report run -o report.html")(report)
app.command(epilog="Example: headwise calibrate --model Qwen/Qwen3-4B --data report.txt --questions auto --show 3")(
    calibrate
)
app.command(epilog="Example: headwise profile --model reference --scorer snapkv,keydiff --out profile.safetensors")(
    profile
)
app.command(epilog="Example: headwise solve profile.safetensors --scorer snapkv --out snapkv.safetensors")(solve)
app.command(epilog="Example: headwise train --model reference --out gates.safetensors")(train)
app.command(epilog="Example: headwise methods --model Qwen/Qwen3-4B")(methods)
app.command(epilog="Example: headwise shrink gates.safetensors --model Qwen/Qwen3-4B --out lkv.safetensors")(shrink)
app.command(epilog="Example: headwise doctor --json")(doctor)
app.command("build-kernels", epilog="Example: headwise build-kernels")(build_kernels)
app.add_typer(bench, name="bench", no_args_is_help=True)
app.command(epilog="Example: headwise inspect gates.safetensors --plot --beside budget.safetensors")(inspect)
app.command(epilog="Example: headwise plan --model Qwen/Qwen3-8B --context 128k --keep 0.15 --memory 24GiB")(plan)
app.command(
    epilog="Example: headwise tiers -m meta-llama/Llama-3.1-8B-Instruct --method keydiff+lukv@budget.safetensors -k 0.2"
)(tiers)
