"""What is ready for a model: found for its configuration however it was loaded, and what must be made first."""

import json
import shlex
import shutil

import pytest
import torch
from families import CONFIGS, tiny_model
from hub_configs import QWEN_CODER, SMOLLM2, from_gguf
from random_gates import make_gates
from transformers import AutoConfig
from typer.testing import CliRunner

from headwise import cli
from headwise.artifacts import shipped
from headwise.artifacts import tensors as artifacts
from headwise.artifacts.budget import Budget
from headwise.artifacts.origin import Origin, config_hash
from headwise.errors import BadInput, HeadwiseError
from headwise.methods.allocate import LUKV, Global
from headwise.methods.method import Method
from headwise.methods.names import entries_of
from headwise.methods.registry import ALIASES, SCORERS
from headwise.methods.scores import LKVT
from headwise.models.available import overview
from headwise.models.families import shape_of
from headwise.models.loading import reference_path

MODELS = {"smollm2": SMOLLM2, "qwen-coder": QWEN_CODER}


def config_of(known):
    return type(AutoConfig.for_model(known["model_type"])).from_dict(known)


def make_budget(shape, name, scorer):
    heads = shape.num_heads
    hull = {
        "protected": torch.zeros(heads, 2),
        "width": torch.full((heads, 2), 0.5),
        "slope": torch.tensor([[2.0, 1.0]]).expand(heads, 2),
    }
    origin = Origin(
        shape=shape,
        model="org/it",
        config_hash=name,
        scorer=scorer,
        scorer_parameters=json.loads(json.dumps(SCORERS[scorer].make().provenance())),
        sink=1,
        window=1,
    )
    fractions = torch.full((1, len(shape.layers), shape.kv_heads), 0.5)
    return Budget(ratios=torch.tensor([0.5]), fractions=fractions, origin=origin, hull=hull)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package that ships files for two models, made from their hub configurations, and the bundled model's."""
    root = tmp_path_factory.mktemp("package")
    for name, known in MODELS.items():
        folder, config = root / "ready" / name, config_of(known)
        folder.mkdir(parents=True)
        shape, found = shape_of(config), config_hash(config.to_dict())
        make_gates(shape, found).save(folder / "lkv.safetensors", dtype=torch.float16)
        for scorer in ("keydiff", "snapkv"):
            make_budget(shape, found, scorer).save(folder / f"{scorer}.safetensors")
    for folder in ("gates", "budgets"):
        shutil.copytree(reference_path() / folder, root / "reference" / folder)
    return root


@pytest.fixture
def shipping(package, monkeypatch):
    monkeypatch.setattr(shipped, "files", lambda name: package)
    return package


@pytest.mark.parametrize("known", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("loaded", ["hub", "gguf", "folder", "quantised"])
def test_shipped_files_are_found_however_the_model_was_loaded(shipping, known, loaded, tmp_path):
    config = {
        "hub": lambda: config_of(known),
        "gguf": lambda: config_of(from_gguf(known)),
        "folder": lambda: config_of(from_gguf(known)),
        "quantised": lambda: config_of({**known, "quantization_config": {"quant_method": "gptq", "bits": 4}}),
    }[loaded]()
    if loaded == "folder":
        config.save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
    shape, found = shape_of(config), config_hash(config.to_dict())
    lkv = Method.parse("lkv").for_model(shape, found)
    assert isinstance(lkv.scorer, LKVT)
    assert lkv.scorer.gates.origin.shape == shape
    for scorer in ("keydiff", "snapkv"):
        method = Method.parse(f"{scorer}+lukv").for_model(shape, found)
        assert isinstance(method.allocator, LUKV)
        assert method.allocator.budget.origin.scorer == scorer
    with pytest.raises(BadInput, match="no budget of ExpectedAttention is shipped"):
        Method.parse("expected+lukv").for_model(shape, found)


def test_looking_for_a_file_reads_no_tensor_of_the_others(shipping, monkeypatch):
    read = []
    whole = artifacts.Opened.copies
    monkeypatch.setattr(artifacts.Opened, "copies", lambda self: read.append(self.path.parent.name) or whole(self))
    config = config_of(SMOLLM2)
    Method.parse("keydiff+lukv").for_model(shape_of(config), config_hash(config.to_dict()))
    assert read == ["smollm2"]


def test_what_is_ready_for_the_bundled_model():
    found = overview("reference", AutoConfig.from_pretrained(reference_path()))
    rows = {row.method: row for row in found.methods}
    assert {name for name, row in rows.items() if row.state == "ready" and row.file} == {
        *("lkv", "lkv-t", "snapkv+lukv", "keydiff+lukv", "expected+lukv")
    }
    assert rows["lkv"].made_for == "reference"
    assert rows["lkv"].file.endswith("lkv.safetensors")
    assert rows["kvzip"].state == "ready"
    assert set(ALIASES) <= set(rows)
    assert "kvzip+lukv" not in rows  # cannot be profiled
    assert rows["knorm+lukv"].state == "make"
    assert found.default.name == "lkv"


def test_the_commands_that_are_named_can_be_run():
    """They parse, and what they write is what the method is then called by."""
    commands = dict(cli.typer.main.get_command(cli.app).commands)
    for row in overview("my model", CONFIGS["llama"]()).methods:
        for line in row.command.split(" && ") if row.command else ():
            _, name, *words = shlex.split(line)
            with commands[name].make_context(name, words) as context:
                assert context.params.get("model", "my model") == "my model"
        assert bool(row.command) == (row.state == "make")
        if row.state == "ready":
            assert entries_of(row.method)


def test_a_method_that_reads_twice_is_there_where_layers_slide_but_is_not_the_default():
    found = overview("m", CONFIGS["gemma3_text"]())
    rows = {row.method: row for row in found.methods}
    assert rows["kvzip"].state == rows["keydiff"].state == "ready"
    assert found.default.name == "keydiff"


def test_files_of_a_folder_are_found_too(tmp_path):
    model = tiny_model()
    shape, found = shape_of(model.config), config_hash(model.config.to_dict())
    make_gates(shape, found, parts=("scores",)).save(tmp_path / "mine.safetensors")
    make_budget(shape, found, "keydiff").save(tmp_path / "b.safetensors")
    make_budget(shape, "other", "keydiff").save(tmp_path / "c.safetensors")
    model.save_pretrained(tmp_path / "model")
    shutil.copy(tmp_path / "model" / "model.safetensors", tmp_path)
    rows = {row.method: row for row in overview("m", model.config, tmp_path).methods}
    assert rows[f"lkv-t@{tmp_path / 'mine.safetensors'}"].state == "ready"
    assert rows[f"lkv@{tmp_path / 'mine.safetensors'}"].state == "refused"
    assert "hold scores only" in rows[f"lkv@{tmp_path / 'mine.safetensors'}"].why
    assert rows[f"keydiff+lukv@{tmp_path / 'b.safetensors'}"].made_for == "org/it"
    assert not any("c.safetensors" in name for name in rows)
    for row in rows.values():
        if row.state == "ready":
            Method.parse(row.method).for_model(shape, found)
    with pytest.raises(HeadwiseError, match="there is no folder"):
        overview("m", model.config, tmp_path / "nowhere")


def test_the_command(model_folders):
    run = CliRunner()
    shown = run.invoke(cli.app, ["methods", "--model", str(model_folders["base"]), "--json"])
    assert shown.exit_code == 0
    found = json.loads(shown.stdout)
    assert set(found) == {"model", "config_hash", "default", "methods"}
    assert set(found["methods"][0]) == {"method", "state", "file", "made_for", "command", "why"}
    table = run.invoke(cli.app, ["methods", "--model", "reference"])
    assert table.exit_code == 0
    assert f"Default: {found['default']['name']}" not in table.stdout  # that one has gates
    assert "Default: lkv, because its gates for this model come with headwise." in table.stdout
    assert run.invoke(cli.app, ["methods", "--files", "."]).exit_code != 0


def test_the_command_makes_a_small_copy(tmp_path):
    source = reference_path() / "gates" / "lkv.safetensors"
    line = ["shrink", str(source), "--model", "org/name", "--out", str(tmp_path / "lkv.safetensors"), "--json"]
    shown = CliRunner().invoke(cli.app, line)
    assert shown.exit_code == 0
    found = json.loads(shown.stdout)
    assert set(found) == {"path", "kind", "bytes_before", "bytes_after", "changed", "shared"}
    assert found["kind"] == "gates"


# --- the files that really come with headwise ---

REAL = [
    *((SMOLLM2, name) for name in ("lkv", "lkv-t+lkv-h", "keydiff+lukv", "expected+lukv", "snapkv+lukv")),
    *((QWEN_CODER, name) for name in ("lkv", "lkv-t+lkv-h")),
]


@pytest.mark.parametrize("known", [lambda known: known, from_gguf], ids=["hub", "gguf"])
@pytest.mark.parametrize(("model", "name"), REAL, ids=lambda value: value if isinstance(value, str) else "")
def test_a_model_finds_the_files_that_are_shipped_for_it(model, name, known):
    config = config_of(known(model))
    method = Method.parse(name).for_model(shape_of(config), config_hash(config.to_dict()))
    made_for = {method.scorer.made_for, method.allocator.made_for} - {""}
    assert len(made_for) == 1
    assert made_for.pop().rpartition("/")[2].lower().startswith(("smollm2-135m", "qwen2.5-coder-0.5b"))
    if name == "lkv":
        assert type(method.allocator) is Global
        assert method.scorer.gates.comparable


def test_what_is_shipped_is_small():
    files = [*(reference_path().parent / "ready").rglob("*.safetensors")]
    assert len(files) >= 5
    assert sum(file.stat().st_size for file in files) < 4 * 2**20
