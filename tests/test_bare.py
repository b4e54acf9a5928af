"""Without the extra `cli` the library works, and the command says what it needs."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

WITHOUT = "import sys; sys.modules.update(dict.fromkeys({names!r}))\n"  # an import of None fails: it is not installed
COMPRESS = """
import headwise
from headwise.models.loading import load

model, tokenizer = load("reference")
prompt = headwise.prompt(tokenizer, "locker apple copper lantern. " * 20, ["? locker apple"])
cache = headwise.compress(model, prompt.context, keep=0.25)
assert not set(sys.modules) & {"headwise.cli", "headwise.commands"}
print(f"{int(cache.lengths.sum()) / cache.lengths.numel() / prompt.context.shape[1]:.2f}")
"""
COMMAND = """
import runpy
sys.argv = ["headwise", "--version"]
runpy.run_module("headwise", run_name="__main__")
"""


def python(code, *without):
    """Run it where these packages cannot be imported."""
    program = WITHOUT.format(names=without) + code
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def test_the_library_imports_and_compresses():
    done = python(COMPRESS, "rich", "typer")
    assert (done.returncode, done.stdout) == (0, "0.25\n"), done.stderr


@pytest.mark.parametrize("missing", ["rich", "typer"])
def test_the_command_says_what_to_install(missing):
    done = python(COMMAND, missing)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("headwise: the command line needs typer, rich and tqdm: pip install 'headwise[cli]'\n")


def test_another_module_that_is_missing_is_not_hidden():
    done = python(COMMAND, "headwise.commands")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr and "headwise[cli]" not in done.stderr


def test_the_command_runs_where_all_is_there():
    done = python(COMMAND)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("headwise ")
