"""Make the LU-KV budgets that ship with the reference model: `snapkv+lukv`, `keydiff+lukv`, `expected+lukv`.

    python recipes/budgets.py

Calibration contexts come from the split "calibration" of the task generators, whose seeds no evaluation can reach.
Takes about a minute on one core.
"""

import tempfile
from pathlib import Path

from headwise.artifacts.profile import Profile
from headwise.models.families import view
from headwise.models.loading import REFERENCE, load, reference_path
from headwise.offline.calibration import load_examples
from headwise.offline.profile import Settings, profile
from headwise.offline.solve import check, solve

SCORERS = ("snapkv", "keydiff", "expected")
CALIBRATION = "builtin:48"
STEPS = 16  # the longest answers have about that many tokens


def main() -> None:
    """Profile once for all scorers, solve for each, say how good the budgets are on the profile's own curves."""
    model, tokenizer = load(REFERENCE)
    examples = load_examples(CALIBRATION, tokenizer, max_positions=view(model).max_positions)
    folder = reference_path() / "budgets"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "profile.safetensors"
        profile(model, tokenizer, examples, SCORERS, out, settings=Settings(steps=STEPS))
        found = Profile.load(out)
    for scorer in SCORERS:
        solve(found, scorer).save(folder / f"{scorer}.safetensors")
        for quality in check(found, scorer, [0.0625, 0.15, 0.25]):
            print(scorer, quality, f"gap={quality.gap:.4f}")


if __name__ == "__main__":
    main()
