"""Make the gates that ship with the reference model: `lkv`, `lkv-t`, `lkv-h`.

    python recipes/gates.py [--seed 0]

As `headwise train --model reference --fit-steps 0 --warm-steps 500 --steps 600`: a model so small is distilled in a
quarter of an hour, and that teaches it more than what futures pay. Contexts come from the split "train" of the task
generators, whose seeds no calibration and no evaluation can reach. Takes a quarter of an hour on two cores. Sums of
floating-point numbers depend on the number of threads: another machine makes gates that do the same, not the same
bytes.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from headwise.models.families import view
from headwise.models.loading import REFERENCE, load, reference_path
from headwise.offline.calibration import load_examples
from headwise.offline.train.fit import FitSettings
from headwise.offline.train.loop import Settings
from headwise.offline.train.run import train

CONTEXTS = "builtin:160"


def main() -> None:
    """Train, and put gates and log where headwise looks for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    model, tokenizer = load(REFERENCE, dtype="float32")
    examples = load_examples(CONTEXTS, tokenizer, max_positions=view(model).max_positions, split="train")
    folder = reference_path() / "gates"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "lkv.safetensors"
        train(
            model,
            tokenizer,
            examples,
            out,
            settings=Settings(fit=FitSettings(steps=0), warm_steps=500, steps=600, seed=seed),
            progress=lambda done, total, text: print(f"{done}/{total} {text}") if done % 50 == 0 else None,
        )
        for path in (out, out.with_name(f"{out.name}.log.jsonl")):
            shutil.move(path, folder / path.name)


if __name__ == "__main__":
    main()
