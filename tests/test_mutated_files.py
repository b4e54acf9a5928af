"""Damaged, hand-made and hostile files of every kind: refused in a sentence, or used without harm. Never anything else.

Files are mutated from a seed, read in this process, and used: an accepted cache is decoded one step by the C++ kernel.
HEADWISE_FUZZ_FILES=20000 makes that many files instead of a few of each kind, HEADWISE_FUZZ_SEED others than usual:

    HEADWISE_FUZZ_FILES=20000 python -m pytest tests/test_mutated_files.py -s
"""

import os
import random
import resource
import sys
import traceback
from collections import Counter

import file_kinds
import pytest
from file_kinds import KINDS, outcome
from mutations import mutate

FILES = int(os.environ.get("HEADWISE_FUZZ_FILES", "1500"))
SEED = int(os.environ.get("HEADWISE_FUZZ_SEED", "0"))
MOST_MEMORY = 800  # MiB that reading may take at its peak, however many files there are


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Whole files of all kinds, by name."""
    file_kinds.FOLDER[0] = tmp_path_factory.mktemp("whole")
    return {kind.name: kind.make() for kind in KINDS}


def peak_memory() -> float:
    """Of this process so far, in MiB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_whole_file_is_accepted(kind, whole, tmp_path):
    (tmp_path / kind.name).write_bytes(whole[kind.name])
    assert outcome(kind, tmp_path / kind.name) == "accepted"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_mutated_files_are_refused_or_used(kind, whole, tmp_path, capsys):
    rng, found, failed = random.Random(f"{SEED} {kind.name}"), Counter(), []
    suffix, before = os.path.splitext(kind.name)[1], peak_memory()
    for number in range(FILES // len(KINDS)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / kind.name).write_bytes(mutate(whole[kind.name], suffix, rng))
        try:
            found[outcome(kind, folder / kind.name)] += 1
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            failed.append(
                f"{folder / kind.name}: {type(error).__name__}: {error!s:.200} ({place.name}, {place.lineno})"
            )
            continue
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    grown = peak_memory() - before
    with capsys.disabled():
        if FILES > 1500:
            print(f"\n{kind.name:22} {dict(found)}, {len(failed)} internal errors, peak memory +{grown:.0f} MiB")
    assert not failed, f"{len(failed)} internal errors:\n" + "\n".join(failed[:5])
    assert not found.keys() - {"accepted", "refused"}
    assert found["refused"] > 0
    assert grown < MOST_MEMORY
