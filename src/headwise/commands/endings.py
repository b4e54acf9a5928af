"""End a command: an error is one line on stderr and an exit code. Only a bug of ours has a traceback.

This is the last line of defence: the library raises its own errors wherever it can say more.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from typer.core import TyperGroup

from headwise.errors import BadInput, HeadwiseError
from headwise.files.terminal import complain, open_streams
from headwise.files.writing import reason

INTERRUPTED = 130  # 128 + SIGINT, as shells count


class Commands(TyperGroup):
    """Commands whose interrupts and closed pipes `run` handles: typer does it differently in every version."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, BrokenPipeError) as error:
            raise _Stopped from error


class _Stopped(Exception):
    """Carries, as its cause, an error that typer must not see."""


def run(app: Callable[[], Any]) -> NoReturn:
    """Run commands and leave the process, with exit code 0 if all went well."""
    open_streams()
    line, code = "", 0
    try:
        try:
            app()
        except SystemExit:
            sys.stdout.flush()  # here, not when the interpreter ends: a full disk shows now
            raise
    except (Exception, KeyboardInterrupt) as error:
        line, code = _line_and_code(error.__cause__ if isinstance(error, _Stopped) and error.__cause__ else error)
    _give_up_output()
    with suppress(OSError):
        if line:
            complain(line)
    sys.exit(code)


def _line_and_code(error: BaseException) -> tuple[str, int]:
    """Return the line for stderr, and the exit code. Raises the error if it is a bug."""
    if isinstance(error, HeadwiseError):
        return str(error), 2 if isinstance(error, BadInput) else 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted.", INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return "", 1  # the reader of the output wants no more of it
    if isinstance(error, OSError):
        place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"the system failed: {place}{reason(error)}.", 1
    if isinstance(error, RecursionError):
        return "an input is nested too deeply; make it simpler.", 2
    if isinstance(error, UnicodeError):
        return f"an input holds text that is no valid Unicode ({error}); correct it.", 2
    if isinstance(error, OverflowError):
        return f"a number is too large ({error}); choose a smaller one.", 2
    return _of_libraries(error)


def _of_libraries(error: BaseException) -> tuple[str, int]:
    from safetensors import SafetensorError

    if isinstance(error, SafetensorError):
        return f"a safetensors file cannot be read or written: {error}.", 1
    if isinstance(error, RuntimeError | MemoryError):
        from headwise.models.loading import is_out_of_memory

        if is_out_of_memory(error):
            advice = "try --prefill-chunk-size, a shorter document or --dtype bfloat16; see 'headwise plan'"
            return f"the device is out of memory; {advice}.", 1
    raise error


def _give_up_output() -> None:
    """Drop the output that stdout did not take, so that the interpreter does not write it again when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError), open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
