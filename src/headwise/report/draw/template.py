"""Fill templates of web pages, which lie beside the modules that use them."""

import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files

from headwise.files.terminal import shown


def filled(package: str, name: str, parts: Mapping[str, str]) -> str:
    """Return a package's template with every {{name}} replaced by its part."""
    template = (files(package) / name).read_text(encoding="utf-8")
    return shown(re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template), lines=True)


def facts_html(facts: Mapping[str, str], command: str) -> str:
    """Return HTML that says how something was measured."""
    rows = "".join(f"<dt>{name}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    return f"<dl>{rows}</dl><pre>{escape(command)}</pre>"
