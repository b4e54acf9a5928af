"""Render a document and a question in a tokenizer's chat template, and find the document's end.

They are one message of the user's. The end is found by a mark that is not in their text and is rendered with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from secrets import randbits
from typing import Any

from jinja2 import TemplateError

from headwise.errors import BadInput

Writer = Callable[[str], str]  # a message in a template; `str` where there is none


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A part of a conversation, as the template shows it: the message's text, and what the template adds."""

    text: str
    own: str  # before the document, after the question


def chat(tokenizer: Any) -> Writer:
    """Return a function that writes a user's message in the chat template, up to where the model's turn starts.

    It raises BadInput if the template refuses the message.
    """

    def write(content: str) -> str:
        messages = [{"role": "user", "content": content}]
        try:
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, enable_thinking=False
            )
        except TemplateError as error:
            raise BadInput(f"this tokenizer's chat template refuses a user's message: {error}.") from error

    return write


def opening(write: Writer, document: str) -> Rendered:
    """Return the conversation up to the document's end. Raises BadInput if the template does not show it as it is."""
    start, own = _split(write, document, "")[0], _split(write, "", "")[0]
    if not start.startswith(own):
        raise _altered()
    return Rendered(text=start.removeprefix(own), own=own)


def ending(write: Writer, document: str, start: Rendered, question: str) -> Rendered:
    """Return the rest of a conversation with this start. The question begins with its separator.

    Raises BadInput if the template shows document and question together otherwise than one by one.
    """
    end, own = _split(write, "", question)[1], _split(write, "", "")[1]
    if not end.endswith(own) or write(document + question) != start.own + start.text + end:
        raise _altered()
    return Rendered(text=end.removesuffix(own), own=own)


def _split(write: Writer, before: str, after: str) -> tuple[str, str]:
    """Return what the template shows up to the end of `before`, and from the start of `after`."""
    mark = _mark(before + after)
    text = write(f"{before}{mark}{after}")
    count = text.count(mark)
    if count != 1:
        times = f"{count} times" if count else "not at all"
        raise BadInput(
            f"this tokenizer's chat template does not show the user's message once and as it is, but {times}: set "
            "another tokenizer.chat_template, or None to go without."
        )
    start, _, end = text.partition(mark)
    return start, end


def _mark(text: str) -> str:
    """Return digits that are not in the text. Templates do not change digits."""
    while (mark := str(randbits(128)).zfill(39)) in text:
        pass
    return mark


def _altered() -> BadInput:
    return BadInput(
        "this tokenizer's chat template changes a document by what follows it, so the two cannot be cut apart: set "
        "another tokenizer.chat_template, or None to go without."
    )
