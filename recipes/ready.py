"""Make the files that ship for a model, or that you share: budgets for keydiff, expected and snapkv, and LKV's gates.

    python recipes/ready.py --model FOLDER --name HuggingFaceTB/SmolLM2-135M-Instruct --out ready [--data BOOKS]

Runs the documented commands one after the other and prints them. A killed run goes on where it was (OUT.work holds what
is large). Without --data the calibration text is `builtin`, which is made on this machine; with it, your own texts:
a folder of .txt files, such as books in the public domain (docs/sharing.md).
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

SCORERS = ("keydiff", "expected", "snapkv")


def main() -> None:
    """Profile and solve, train, make small copies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--name", required=True, help="hub id that the files shall name")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--data", help="calibration text; left out: builtin")
    arguments = parser.parse_args()
    out, work = arguments.out, arguments.out.with_name(f"{arguments.out.name}.work")
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    source = ["--model", arguments.model, *(["--data", arguments.data] if arguments.data else [])]
    profile = work / "profile.safetensors"
    if not profile.is_file():
        headwise("profile", *source, "--scorer", ",".join(SCORERS[1:]), "--out", profile)
    bits = work / "bits.safetensors"  # of one scorer, for what bits cost takes room
    if not bits.is_file():
        headwise("profile", *source, "--scorer", SCORERS[0], "--entries", "native,int8,k8v4,int4", "--out", bits)
    for scorer in SCORERS:
        made_from = bits if scorer == SCORERS[0] else profile
        headwise("solve", made_from, "--scorer", scorer, "--out", work / f"{scorer}.safetensors")
    if not (work / "lkv.safetensors").is_file():
        headwise("train", *source, "--out", work / "lkv.safetensors")
    for name in (*SCORERS, "lkv"):
        file = f"{name}.safetensors"
        headwise("shrink", work / file, "--model", arguments.name, "--out", out / file)


def headwise(*words: str | Path) -> None:
    """Run a command, and show it."""
    print(shlex.join(["headwise", *map(str, words)]), flush=True)
    subprocess.run([sys.executable, "-m", "headwise", *map(str, words)], check=True)


if __name__ == "__main__":
    main()
