"""How commands end in real processes when the system fails them: a line, an exit code, no traceback, nothing lost."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from killing import ended, forked
from safetensors import SafetensorError

from headwise import cli, kernels
from headwise.models import loading as models

DOCUMENT = "locker marble clever robin. " * 60
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def started(line, **options):
    """`headwise LINE` as a process."""
    command = [sys.executable, "-m", "headwise", *(line if isinstance(line, list) else shlex.split(line))]
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=ENVIRONMENT, **options)


def shell(line):
    """The exit code and stderr of a line of bash in which `headwise` is ours."""
    script = f'set -o pipefail; headwise() {{ {shlex.quote(sys.executable)} -m headwise "$@"; }}; {line}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("headwise methods > /dev/full", 1, "No space left on device"),
        ("headwise --version > /dev/full", 1, "No space left on device"),
        ("headwise methods | true", 1, None),
        ("headwise --help | true", 1, None),
        ("headwise --version >&-", 0, None),
        ("headwise report nowhere -o x 2>&-", 2, None),
        ("headwise report nowhere -o x 2>/dev/full", 2, None),
        ("headwise report nowhere -o $'no\\xff'", 2, "no\\udcff: a report is a web page"),
    ],
)
def test_streams_that_fail(line, code, words):
    """A pipe whose reader has gone away is no error to tell; a disk that is full is."""
    found, err = shell(line)
    assert (found, err.count("\n")) == (code, 0 if words is None else 1), err
    assert words is None or (words in err and err.startswith("headwise: "))


def test_an_interrupt_is_a_line_and_code_130_and_loses_nothing(tmp_path):
    out = tmp_path / "run"
    line = "eval --tasks mini-ruler:vt --methods keydiff --keep 0.3 --samples 400 --length 200 --timed 0"
    process = started(f"{line} --out {out}", stdout=subprocess.DEVNULL)
    until = time.monotonic() + 90
    try:
        while not (out / "records.jsonl").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)  # which a process that was started in the background does not hear
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, b"headwise: interrupted.\n")
    assert sorted(path.name for path in out.iterdir()) == ["maps.jsonl", "records.jsonl", "run.json"]
    assert all(json.loads(line) for line in (out / "records.jsonl").read_text().split("\n")[:-1])


# --- in this process: what main makes of errors that reach it ---


@pytest.fixture
def run(monkeypatch, capsys):
    """A command as the console script runs it: (exit code, stdout, stderr)."""

    def call(line):
        monkeypatch.setattr(sys, "argv", ["headwise", *map(str, line if isinstance(line, list) else shlex.split(line))])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device"), 1, "the system failed: No space left on device."),
        (OSError(122, "Disk quota exceeded", "/x"), 1, "the system failed: /x: Disk quota exceeded."),
        (PermissionError(13, "Permission denied", b"/x\xff"), 1, r"/x\udcff: Permission denied"),
        (OSError(), 1, "the system failed: OSError."),
        (SafetensorError("broken"), 1, "a safetensors file cannot be read or written: broken."),
        (RecursionError("deep"), 2, "nested too deeply"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), 2, "no valid Unicode"),
        (OverflowError("int too big"), 2, "a number is too large"),
        (KeyboardInterrupt(), 130, "headwise: interrupted."),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_that_reaches_the_end_is_a_line(run, monkeypatch, error, code, words):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("headwise.evals.run.versions", fail)
    found, out, err = run("doctor --json")
    assert (found, out, err.count("\n")) == (code, "", 1 if words else 0)
    assert words in err


def test_a_bug_is_not_hidden(run, monkeypatch):
    for error in (ValueError("a bug"), TypeError("a bug"), RuntimeError("a bug"), AssertionError("a bug")):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr("headwise.evals.run.versions", fail)
        with pytest.raises(type(error), match="a bug"):
            run("doctor --json")


NINES = "9" * 5000


@pytest.mark.parametrize(
    "line",
    [
        f"plan --context {NINES}",
        f"plan --keep {NINES}",
        f"plan --keep 0.{NINES}",
        "plan --keep 1e-999999999",
        f"plan --memory {NINES}GiB",
        f"plan --batch {NINES}",
        f"tiers --context {NINES}",
        f"profile --data builtin:{NINES} --out p",
        f"profile --seed {2**63} --out p",
        f"eval --seed {2**63}",
        f"eval --samples {NINES}",
        f"train --seed {2**63} --out g",
        f"train --keeps 0.1,{NINES} --out g",
        f"bench decode --tokens {NINES}",
        f"bench decode --keep {NINES}",
    ],
    ids=lambda line: " ".join(line.split()[: 2 + line.startswith("bench")]) + f" {len(line)}",
)
def test_numbers_beyond_all_bounds(run, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(line)
    assert (code, out, "Traceback" in err) == (2, "", False)
    assert len(err) < 3000
    assert list(tmp_path.iterdir()) == []


# --- goals are looked at before anything else is done ---

COMMANDS = {
    "generate": "generate -q who --context {document} --method keydiff --save {goal}",
    "eval": "eval --out {goal}",
    "profile": "profile --data {document} --out {goal}",
    "train": "train --data {document} --out {goal}",
    "solve": "solve {document} --out {goal}",
    "inspect": "inspect {artifact} --plot --out {goal}.png",
    "report": "report {document} --out {goal}.html",
}


@pytest.fixture
def files(tmp_path):
    """A folder with a document, and an artifact of each kind that has a plot."""
    from test_writing import budget

    (tmp_path / "document").write_text(DOCUMENT)
    budget().save(tmp_path / "artifact")
    return tmp_path


@pytest.fixture
def no_work(monkeypatch):
    """Nothing may be loaded, read or made."""
    for name in (
        "headwise.models.loading.load",
        "headwise.artifacts.profile.Profile.load",
        "headwise.report.quality.results.load",
    ):
        monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail("work was done before the goal was looked at"))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["pipe", "nowhere", "loop", "long"])
def test_a_goal_that_cannot_be_written_is_told_before_any_work(run, files, no_work, command, place):
    if command == "eval" and place == "nowhere":
        pytest.skip("eval makes its folder, and those above")
    goal = files / ("nowhere/goal" if place == "nowhere" else "x" * 300 if place == "long" else "goal")
    line = COMMANDS[command].format(document=files / "document", artifact=files / "artifact", goal=goal)
    real = Path(line.split()[-1])
    if place == "pipe":
        os.mkfifo(real)
    elif place == "loop":
        real.symlink_to(real)
    before = sorted((path, path.lstat().st_ino) for path in files.iterdir())
    code, out, err = run(line)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert str(real) in err
    assert sorted((path, path.lstat().st_ino) for path in files.iterdir()) == before


@pytest.mark.parametrize(
    "line",
    [
        "generate -q who --context {document} --method keydiff --save {document}",
        "generate -q who --context {document} --method keydiff+fixed@{artifact} --save {artifact}",
        "generate -m {folder} -q who --context {other} --method keydiff --save {document}",
        "profile --data {document} --out {document}",
        "profile --data {folder} --out {folder}/text.jsonl",
        "train --data {document} --out {document}",
        "train --part lkv-h --scorer lkv-t@{artifact} --out {artifact}",
        "solve {document} --out {document}",
        "inspect {folder}/text.png --plot",
        "report {folder}/text.csv --out {folder}/text.html",
    ],
)
def test_what_is_read_is_not_written(run, files, no_work, line):
    (files / "artifact").rename(files / "text.png")
    (files / "artifact").hardlink_to(files / "text.png")
    for name in ("text.jsonl", "text.csv"):
        (files / name).write_text(DOCUMENT)
    (files.parent / "other").write_text(DOCUMENT)
    before = {path: path.read_bytes() for path in files.iterdir()}
    names = {name: files / name for name in ("document", "artifact")}
    code, out, err = run(line.format(**names, folder=files, other=files.parent / "other"))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "one of the files that are read" in err
    assert {path: path.read_bytes() for path in files.iterdir()} == before


def test_a_file_that_is_too_large_for_the_disk_is_told(tmp_path, files, monkeypatch):
    """In a process of its own, whose files may not grow."""
    goal, loaded = tmp_path / "saved", models.load("reference")  # once: loading takes threads, a fork has none
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: loaded)

    def limited():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        sys.argv = ["headwise", "generate", "-q", "? locker", "-c", str(files / "document"), "--method", "keydiff"]
        sys.argv += ["--keep", "0.3", "--max-new-tokens", "2", "--save", str(goal)]
        with open(tmp_path / "said", "w") as said, redirect_stderr(said), pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 1

    kernels.why_not("native")  # a compiler would need larger files
    assert ended(forked(limited)) == 0
    said = (tmp_path / "said").read_text()
    assert (said.count("\n"), "File too large" in said, goal.exists()) == (1, True, False)
