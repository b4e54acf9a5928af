"""An answer on stdout while it grows, for `headwise generate`."""

import sys

from transformers import TextStreamer

from headwise.files.terminal import shown


class AnswerStreamer(TextStreamer):
    """On a terminal control characters are written out; into a pipe or a file the answer goes as it is."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with whole words."""
        safe = shown(text, lines=True) if sys.stdout.isatty() else text
        print(safe, end="\n" if stream_end else "", flush=True)
