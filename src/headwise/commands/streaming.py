"""Print an answer on stdout while it grows, for `headwise generate`."""

import sys

from transformers import TextStreamer

from headwise.files.terminal import shown


class AnswerStreamer(TextStreamer):
    """Prints an answer. On a terminal, control characters are written out; a pipe or a file gets it as it is."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print whole words, with which transformers calls this."""
        safe = shown(text, lines=True) if sys.stdout.isatty() else text
        print(safe, end="\n" if stream_end else "", flush=True)
