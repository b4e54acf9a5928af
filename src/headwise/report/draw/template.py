"""Web pages from templates that lie beside the modules which fill them."""

import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files

from headwise.files.terminal import shown


def filled(package: str, name: str, parts: Mapping[str, str]) -> str:
    """A package's template with every {{name}} replaced; the parts themselves are left as they are."""
    template = (files(package) / name).read_text(encoding="utf-8")
    return shown(re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template), lines=True)


def told(facts: Mapping[str, str], command: str) -> str:
    """How something was measured."""
    rows = "".join(f"<dt>{name}</dt><dd>{escape(said)}</dd>" for name, said in facts.items())
    return f"<dl>{rows}</dl><pre>{escape(command)}</pre>"
