"""All five parts of docs/how-to-extend.md, followed in one copy of the tree: the checks of `make test` pass there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how-to-extend.md").read_text()
PARTS = dict(part.split("\n", 1) for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:])
TREE = ("src", "tests", "typings", "recipes", "benchmarks", "docs")
# The tests that a part names for what it adds, and the lists that must know it.
TESTS = {
    "A scorer": ("valuenorm", ["scores/test_scores.py", "test_method.py", "invariants/test_masked_dense.py"]),
    "An allocator": ("rising", ["allocate/test_allocators.py", "test_method.py"]),
    "A model family": ("olmo2", ["models/test_families.py", "invariants/test_masked_dense.py"]),
    "A kernel": ("sdpa", ["kernels/test_kernels.py", "invariants/test_masked_dense.py"]),
    "A task suite": ("boxes", ["evals/test_suites.py"]),
}
LISTS = {
    "every_scorer_is_a_method": "test_method.py",
    "registry_says": "test_method.py",
    "every_scorer_and_allocator_has_its_row": "test_docs.py",
    "every_suite_has_its_row": "evals/test_suites.py",
    "every_tensor_names_its_device": "test_globals.py",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The copy, and the files of the package that were written or changed."""
    place = tmp_path_factory.mktemp("tree")
    for folder in TREE:
        shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.md"), ROOT / "pyproject.toml"):
        shutil.copy(file, place)
    touched = {path for part in TESTS for path in follow(PARTS[part], place)}
    return place, sorted(path for path in touched if path.startswith("src/"))


def follow(text, place):
    """Write the files of a part, and add its lines; yields the paths."""
    for path, code in re.findall(r"^```python\n# (src/\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        (place / path).write_text(code)
        yield path
    for diff in re.findall(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for path, lines in re.findall(r"^# (\S+)\n((?:[ +].*\n)+)", diff, re.MULTILINE):
            for above, added in re.findall(r"((?:^ .*\n)+)((?:^\+.*\n)+)", lines, re.MULTILINE):
                add(place / path, *(re.sub(r"^.", "", part, flags=re.MULTILINE) for part in (above, added)))
            yield path


def add(file, above, added):
    """Add lines below those that are there."""
    text = file.read_text()
    found = [match.end() for match in re.finditer(f"^{re.escape(above)}", text, re.MULTILINE)]
    assert len(found) == 1, f"{file.name} has {len(found)} times {above!r}"
    file.write_text(text[: found[0]] + added + text[found[0] :])


def run(place, *command):
    """What a command says in the copy."""
    environment = {**os.environ, "PYTHONPATH": str(place / "src"), "CXX": "none"}  # the compiled kernel is as it was
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tool(name):
    return Path(sys.executable).with_name(name)


def test_every_part_is_followed():
    assert set(TESTS) < set(PARTS)
    assert PAGE.count("```diff") == sum(PARTS[part].count("```diff") for part in TESTS)


def test_style_and_import_rules(tree):
    place, _ = tree
    run(place, tool("ruff"), "check", ".")
    run(place, tool("ruff"), "format", "--check", ".")
    run(place, tool("lint-imports"))


def test_types(tree):
    place, touched = tree
    run(place, tool("pyright"), "--pythonpath", sys.executable, *touched)


def test_tests(tree):
    place, _ = tree
    wanted = [(word, file) for word, files in TESTS.values() for file in files] + [*LISTS.items()]
    files = sorted({f"tests/{file}" for _, file in wanted})
    words = " or ".join(dict.fromkeys(word for word, _ in wanted))
    said = run(place, sys.executable, "-m", "pytest", "-rA", *files, "-k", words)
    passed = re.findall(r"^PASSED (.*)$", said, re.MULTILINE)
    for word, file in wanted:
        assert any(name.startswith(f"tests/{file}::") and word in name.lower() for name in passed), (word, file)
