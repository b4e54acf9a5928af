"""Pages of the site that have no file in docs/: those of the repository's root, and the API, from the names themselves.

mkdocs calls `on_files`. Links are written as GitHub needs them; here they are turned into what the site needs.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import headwise

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/headwise/headwise/blob/main"
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
API = """# API

The public names of `headwise`, and under them the interfaces that a new method implements. [Python](python.md) has
examples, and says which other modules are public.
"""
INTERFACES = """::: headwise.interfaces
    options:
        show_root_heading: false
        show_root_toc_entry: false
"""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=for_the_site((ROOT / source).read_text(encoding="utf-8"))))
    files.append(File.generated(config, "api.md", content=api()))
    return files


def for_the_site(text: str) -> str:
    """The text of a file of the root, with links that lead somewhere from the root of the site."""
    return re.sub(
        r"\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)", lambda found: f"]({_target(found[1])}{found[2] or ''})", text
    )


def _target(path: str) -> str:
    return path.removeprefix("docs/") if path.startswith("docs/") else PAGES.get(path, f"{REPOSITORY}/{path}")


def api() -> str:
    """A directive for each public name, which mkdocstrings turns into what its docstrings say."""
    names = [f"::: {headwise._HOME[name]}.{name}" for name in sorted(headwise._HOME)]
    return "\n\n".join([API, "## Names", *names, "## Interfaces", INTERFACES])
