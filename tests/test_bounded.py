"""What is no file, or has no end, is not read as one."""

import os
import threading

import pytest

from headwise.errors import BadInput
from headwise.files.bounded import read_bytes
from headwise.report.quality.results import write_report
from headwise.tasks.document import read_questions, read_text


@pytest.mark.parametrize("read", [read_text, read_questions, lambda path: read_bytes(path, 10)])
def test_a_device_is_refused(tmp_path, read):
    """/dev/zero has no end: it was read until memory ran out."""
    device = tmp_path / "zero"
    try:
        os.mknod(device, 0o666 | 0o020000, os.makedev(1, 5))
        device.open("rb").close()
    except (OSError, AttributeError):
        pytest.skip("no devices can be made here")
    with pytest.raises(BadInput, match="is a device, not a file"):
        read(device)
    with pytest.raises(BadInput, match="is a device, not a file"):
        write_report([device], tmp_path / "report.html")


def test_a_pipe_is_read_to_its_end(tmp_path):
    """`--context /dev/stdin` is one."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(b"the red stone"))
    writer.start()
    assert read_text(pipe) == "the red stone"
    writer.join()


def test_more_than_the_bound_is_refused(tmp_path):
    (tmp_path / "f").write_bytes(bytes(2**20 + 1))
    assert len(read_bytes(tmp_path / "f", 2**21)) == 2**20 + 1
    with pytest.raises(BadInput, match=r"the document .*f is larger than 1 MiB"):
        read_bytes(tmp_path / "f", 2**20, "the document")
