"""Shape annotations are checked while tests run, and only then; torch runs on one thread, without a network."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from checking import check_calls

check_calls("headwise")

torch.set_num_threads(1)

TESTS = Path(__file__).parent
# What `make quick` does not even import: folders and modules that take long as a whole. Single tests have markers.
SLOW = {
    "bench",
    "evals",
    "invariants",
    "parity",
    "serving/engine",
    "train",
    "allocate/test_allocators.py",
    "allocate/test_learned_budgets.py",
    "allocate/test_profiled.py",
    "allocate/test_shipped.py",
    "cache/test_store.py",
    "kernels/test_compiled.py",
    "kernels/test_native.py",
    "models/test_families.py",
    "models/test_fingerprint.py",
    "models/test_offloaded.py",
    "models/test_vision.py",
    "test_available.py",
    "test_calibration.py",
    "test_cli.py",
    "test_endings.py",
    "test_extending.py",
    "test_gates.py",
    "test_globals.py",
    "test_hulls.py",
    "test_losses.py",
    "test_mutated_files.py",
    "test_oracle.py",
    "test_plan.py",
    "test_profile.py",
    "test_reading.py",
    "test_report.py",
    "test_report_gates.py",
    "test_report_kept.py",
    "test_report_results.py",
    "test_report_speed.py",
    "test_shrink.py",
    "test_soft_topk.py",
    "test_solve.py",
}
STARTS = {"os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen"}


def pytest_addoption(parser):
    """`--quick` is what `make quick` runs."""
    parser.addoption("--quick", action="store_true", help="leave out what is slow or starts a process; compile nothing")


def pytest_configure(config):
    """A quick run decodes with PyTorch: it looks for no compiler. Modules ask for one when they are imported."""
    if config.getoption("quick"):
        os.environ["CXX"] = "none"
        if missing := sorted(name for name in SLOW if not (TESTS / name).exists()):
            raise pytest.UsageError(f"SLOW in tests/conftest.py names what is not there: {', '.join(missing)}")


def pytest_ignore_collect(collection_path, config):
    """Whether a quick run passes by a folder or a module."""
    return True if config.getoption("quick") and _name(collection_path) in SLOW else None


def pytest_collection_modifyitems(config, items):
    """A quick run has the tests without the markers. In it a test that starts a process all the same fails."""
    if not config.getoption("quick"):
        return
    left_out = [item for item in items if any(map(item.get_closest_marker, ("process", "slow")))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    sys.addaudithook(_refuse_processes)


def _name(path):
    return path.relative_to(TESTS).as_posix() if path.is_relative_to(TESTS) else ""


def _refuse_processes(event, arguments):
    fonts = event == "subprocess.Popen" and arguments[0] == "fc-list"  # matplotlib's, once on a machine
    if event in STARTS and not fonts:
        raise AssertionError(f"{event} {arguments[:1]}: a test that starts a process has the marker `process`")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_progress_in_logs(monkeypatch):
    """Whether a command takes five seconds depends on the machine. test_console.py sees to these lines."""
    monkeypatch.setattr("headwise.commands.console.FIRST_LINE", 1e9)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """Folders of tiny random models: "base" (Llama), "chat" (Llama with a chat template) and "qwen3"."""
    from folders import CHAT_TEMPLATE, save_model

    root = tmp_path_factory.mktemp("models")
    kinds = {"base": ("llama", None), "chat": ("llama", CHAT_TEMPLATE), "qwen3": ("qwen3", None)}
    return {name: save_model(root / name, *kind) for name, kind in kinds.items()}
