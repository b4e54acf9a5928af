"""`headwise build-kernels`: compile the C++ kernel."""

import time

from headwise.commands.console import print_json
from headwise.commands.options import AsJson
from headwise.files.terminal import say


def build_kernels(as_json: AsJson = False) -> None:
    """Compile the C++ kernel now, instead of at first use."""
    from headwise.kernels import native

    start = time.perf_counter()
    kernel = native.load()
    seconds = time.perf_counter() - start
    if as_json:
        print_json({"path": str(kernel.path), "features": kernel.features, "built": kernel.built, "seconds": seconds})
    else:
        done = "built in" if kernel.built else "was there, loaded in"
        say(f"{kernel.path}: {done} {seconds:.1f} s ({kernel.features})")
