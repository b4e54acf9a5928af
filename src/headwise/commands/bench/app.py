"""Put the verbs of `headwise bench` together."""

import typer

from headwise.commands.bench.decode import decode
from headwise.commands.bench.generate import generate
from headwise.commands.bench.memory import memory
from headwise.commands.bench.prefill import prefill

app = typer.Typer(help="Measure speed and memory, next to the full cache and to what memory allows, in the same run.")
app.command("decode", epilog="Example: headwise bench decode --dtype bfloat16,float32 --keep 0.1,0.2 --json")(decode)
app.command("prefill", epilog="Example: headwise bench prefill --methods lkv,snapkv --tokens 8192 --dtype float32")(
    prefill
)
app.command("generate", epilog="Example: headwise bench generate --methods snapkv+adakv,lkv --tokens 8192 --keep 0.15")(
    generate
)
app.command("memory", epilog="Example: headwise bench memory --tokens 2048,4096,8192 --methods keydiff,lkv")(memory)
