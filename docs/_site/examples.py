"""Lines of a docstring that begin with `>>>` are Python: for the site they become a block of it."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """What mkdocstrings loads."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of whatever has one."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?:^>>> .*\n?)+", _block, obj.docstring.value, flags=re.MULTILINE)


def _block(found: re.Match[str]) -> str:
    code = re.sub(r"^>>> ", "", found[0].rstrip("\n"), flags=re.MULTILINE)
    return f"```python\n{code}\n```\n"
