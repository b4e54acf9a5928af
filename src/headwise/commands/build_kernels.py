"""`headwise build-kernels`: compile the C++ kernel."""

import time

from headwise.commands.console import print_json
from headwise.commands.options import AsJson
from headwise.files.terminal import say


def build_kernels(as_json: AsJson = False) -> None:
    """Compile the C++ kernel now, instead of at first use."""
    from headwise.kernels import native

    start = time.perf_counter()
    made = native.load()
    seconds = time.perf_counter() - start
    if as_json:
        print_json({"path": str(made.path), "features": made.features, "built": made.built, "seconds": seconds})
    else:
        say(f"{made.path}: {'built in' if made.built else 'was there, loaded in'} {seconds:.1f} s ({made.features})")
