"""What is printed: text that is safe for a terminal, and that any encoding can carry."""

import io
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.commands import console
from headwise.files import terminal

CONTROL = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
EVIL = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e\u2066\u2028\r\x00\x7f\udc9b"
SAFE = r"\x1b]0;title\x07\x1b[2J\x9b31m\u202e\u2066\u2028\r\x00\x7f\udc9b"


@pytest.fixture
def pipe(monkeypatch):
    """Stdout and stderr in an encoding, as (stream, what was written to it)."""

    def open_pipe(encoding: str, errors: str = "strict") -> tuple[io.TextIOWrapper, io.BytesIO]:
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding=encoding, errors=errors)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        return stream, raw

    return open_pipe


@pytest.mark.parametrize("code", CONTROL)
def test_every_control_character_is_written_out(code):
    text = terminal.shown(f"a{chr(code)}b")
    assert text.isprintable()
    assert text == f"a{chr(code).encode('unicode_escape').decode()}b"


@given(st.text())
def test_what_is_shown_cannot_move_a_cursor(text):
    found = terminal.shown(text)
    assert not any(ord(letter) in CONTROL or "\ud800" <= letter <= "\udfff" for letter in found)
    assert terminal.shown(found) == found
    assert terminal.shown(text, lines=True).replace("\n", "\\n").replace("\t", "\\t") == found


@pytest.mark.parametrize("text", ["naïve café", "日本語", "שלום", "👩\u200d💻", "a\\b|c<d>", "नमस्ते", ""])
def test_other_text_is_left_as_it_is(text):
    assert terminal.shown(text) == text


def test_tables_escape_cells_columns_and_titles(capsys):
    console.print_table(f"t{EVIL}\n", [f"c{EVIL}"], [[f"x{EVIL}"], ["two\nlines"]])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and "\r" not in out
    for start in "tcx":
        assert start + SAFE in out
    assert f"{SAFE}\\n" in out  # a title is one line
    assert [line.strip() for line in out.splitlines()[-3:-1]] == ["two", "lines"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_step_is_told_when_it_begins(monkeypatch):
    """The first one of a benchmark takes minutes, and nothing was told of it."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.progress_bar("candidates") as progress:
        progress(0, 3, "full")
        assert "0/3" in sys.stderr.getvalue() and "full" in sys.stderr.getvalue()
        progress(1, 3, f"keydiff{EVIL}")
        assert "1/3" in sys.stderr.getvalue() and f"keydiff{SAFE}" in sys.stderr.getvalue()


def test_a_table_of_80_columns_cuts_nothing(monkeypatch):
    """Once words ended in an ellipsis."""
    header = ["tokens", "candidate", "prefill s", "ms/token", "faster", "attention", "KV held", "peak", "claimed"]
    row = ["131072", "snapkv+adakv", "1234.56", "1234.5", "12.34x", "100%", "123.4 MiB", "1.234 GiB", "1.234 GiB"]
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    console.print_table("t", header, [row] * 2)
    lines = re.sub("\x1b\\[[0-9;]*m", "", sys.stdout.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    printed = Counter("".join(lines)) - Counter({" ": 10**4, "─": 10**4})
    assert printed == Counter("".join(["t", *header, *row, *row])) - Counter({" ": 10**4}), "every letter is there"


def test_results_and_errors_are_escaped(capsys):
    terminal.say(f"r{EVIL}\nnext")
    terminal.complain(ValueError(f"e{EVIL}\nnext"))
    assert capsys.readouterr() == (f"r{SAFE}\nnext\n", f"headwise: e{SAFE}\\nnext\n")


def test_json_is_ascii(capsys):
    console.print_json({"answer": f"{EVIL}→"})
    out = capsys.readouterr().out
    assert out.isascii() and set(out) & {chr(code) for code in CONTROL} == {"\n"}
    assert json.loads(out)["answer"] == f"{EVIL}→"


@pytest.mark.parametrize(
    ("encoding", "arrow"), [("utf-8", "→"), ("cp1252", r"\u2192"), ("ascii", r"\u2192"), ("cp437", r"\u2192")]
)
def test_a_character_that_the_encoding_lacks_is_written_out(pipe, encoding, arrow):
    stream, raw = pipe(encoding)
    terminal.open_streams()
    terminal.say("a → é")
    console.print_table("t →", ["é"], [["→"]])
    terminal.complain("→")
    print("\udc80", file=sys.stderr)  # of a file's name, in a message of another library
    stream.flush()
    written = raw.getvalue().decode(encoding)
    assert written.startswith(f"a {arrow} ")
    assert written.endswith(f"headwise: {arrow}\n\\udc80\n")
    assert f"t {arrow}" in written


@pytest.mark.parametrize("missing", [None, "closed"])
def test_where_there_is_no_stdout(monkeypatch, missing):
    """As under pythonw, or after `>&-`."""
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(io.BytesIO())
        stream.close()
        monkeypatch.setattr(sys, name, None if missing is None else stream)
    terminal.open_streams()
    terminal.say("result")
    console.print_table("t", ["c"], [["x"]])
    terminal.complain("error")
    sys.stdout.close()
    sys.stderr.close()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.process
def test_a_process_with_such_a_stdout_gives_its_result(encoding):
    """Once a traceback, with nothing printed."""
    command = [sys.executable, "-m", "headwise", "inspect", "→\x1b[2J"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.decode("ascii").count("\n") == 1
    assert r"\u2192\x1b[2J" in done.stderr.decode("ascii")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(console, "time", made)
    monkeypatch.setattr(console, "FIRST_LINE", 5.0)
    return made


def told(capsys):
    return capsys.readouterr().err.splitlines()


def test_progress_in_a_log_is_a_line_now_and_then(clock, capsys):
    with console.progress_bar("contexts") as progress:
        progress(0, 8)
        clock.now += 4
        progress(0.5, 8)
        assert told(capsys) == []
        clock.now += 2
        progress(0.75, 8, f"loss{EVIL}")
        assert told(capsys) == [f"headwise: 0.75 of 8 contexts, 00:06 elapsed, about 00:58 left: loss{SAFE}"]
        clock.now += 29
        progress(3, 8)
        assert told(capsys) == []
        clock.now += 1
        progress(4, 8)
        assert told(capsys) == ["headwise: 4 of 8 contexts, 00:36 elapsed, about 00:36 left"]


def test_what_was_done_before_tells_nothing_about_the_time_left(clock, capsys):
    with console.progress_bar("contexts") as progress:
        progress(6, 8)
        clock.now += 10
        progress(7, 8)
        assert told(capsys) == ["headwise: 7 of 8 contexts, 00:10 elapsed, about 00:10 left"]
        progress(0, 100)  # other work
        clock.now += 60
        progress(0, 100)
        assert told(capsys) == ["headwise: 0 of 100 contexts, 01:00 elapsed"]


def test_numbers_are_plain_large_and_broken_ones_too(clock, capsys):
    with console.progress_bar("rows") as progress:
        progress(0, 123456)
        for done in (12345, 12345.678):
            clock.now += 60
            progress(done, 123456)
    assert [line.split(" rows")[0] for line in told(capsys)] == [
        "headwise: 12345 of 123456",
        "headwise: 12345.68 of 123456",
    ]


def test_short_work_says_nothing_in_a_log(capsys):
    with console.progress_bar("contexts") as progress:
        progress(0, 1)
        progress(1, 1)
    assert told(capsys) == []


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with console.progress_bar("contexts") as progress:
        progress(2, 8)
        time.sleep(0.2)  # it is drawn ten times a second
        progress(2.456, 8)
    assert "2.46/8 [" in screen.getvalue() and "headwise:" not in screen.getvalue()
