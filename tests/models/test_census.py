"""The table of model types that comes with headwise is what the census gives, and says it in docs/models.md."""

import json
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import transformers
from transformers import AutoConfig
from typer.testing import CliRunner

from headwise import cli
from headwise.errors import UnsupportedModel
from headwise.models.available import overview
from headwise.models.table import Row, table

ROOT = Path(__file__).parents[2]
SAME = transformers.__version__ == table().transformers
# Of every kind: experts, windows, chunks, states, soft caps, sinks, shared caches, learned positions; and refused ones.
SAMPLE = [
    *("qwen2", "qwen3_moe", "gemma3_text", "llama4_text", "qwen3_next", "jamba", "lfm2", "gemma2", "gpt_oss"),
    *("gemma4_text", "gpt2", "gptj", "cohere", "glm4", "bert", "deepseek_v3", "gpt_neo", "bloom", "roberta", "zamba2"),
]


@pytest.fixture(scope="module")
def census():
    spec = spec_from_file_location("model_families", ROOT / "recipes" / "model_families.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not SAME, reason="the table is of another version of transformers")
def test_every_type_of_transformers_is_in_the_table(census):
    assert [row.type for row in table().families] == census.types()


@pytest.mark.skipif(not SAME, reason="the table is of another version of transformers")
@pytest.mark.parametrize("kind", SAMPLE)
def test_the_census_gives_what_the_table_says(census, kind):
    assert census.examine(kind) == table().row(kind)


def test_what_the_table_promises():
    supported = [row for row in table().families if row.supported]
    assert all({"keydiff", "knorm", "streaming"} <= set(row.methods) for row in supported)
    assert sum("lkv" in row.methods for row in supported) >= 90
    assert sum(len(row.methods) == len(table().methods) for row in supported) >= 60
    for row in table().families:
        assert row.supported != bool(row.refused), row
        assert set(row.methods) | set(row.without) == (set(table().methods) if row.supported else set()), row


def test_the_page_shows_the_table(census):
    assert census.page(table()) == (ROOT / "docs" / "models.md").read_text()


def test_what_another_transformers_changes_is_said_and_what_breaks_comes_first(census):
    before = table()
    new = Row(type="zebra", supported=False, refused="no layer of it has keys and values")
    rows = [row for row in before.families if row.type != "xlnet"]
    assert census.changes(before, list(before.families)) == []
    llama, bloom = before.row("llama"), before.row("bloom")
    rows[rows.index(llama)] = replace(llama, methods=llama.methods[1:], without={llama.methods[0]: "it does not score"})
    rows[rows.index(bloom)] = replace(llama, type="bloom")
    rows[rows.index(before.row("opt"))] = Row(type="opt", supported=False, refused="it is gone")
    assert census.changes(before, [*rows, new]) == [
        "BROKEN  llama has lost keydiff: it does not score",
        "BROKEN  opt is refused now: it is gone",
        "BROKEN  xlnet is not in this transformers",
        f"changed  bloom is supported now; it was not: {bloom.refused}",
        "changed  zebra is new: no layer of it has keys and values",
    ]


def test_families_are_printed():
    said = CliRunner().invoke(cli.app, ["methods", "--families"], env={"COLUMNS": "200"}).output
    assert f"by transformers {table().transformers}" in said
    found = json.loads(CliRunner().invoke(cli.app, ["methods", "--families", "--json"]).output)
    assert [row["type"] for row in found["families"]] == [row.type for row in table().families]
    assert found["transformers"] == table().transformers


def test_methods_of_a_model_say_what_its_type_cannot_have():
    rows = {row.method: row for row in overview("m", AutoConfig.for_model("gptj")).methods}
    assert rows["keydiff"].state == "ready"
    for name in ("expected", "lkv", "lkv-t", "expected+lukv"):
        assert rows[name].state == "refused"
        assert "rotate" in rows[name].why
    with pytest.raises(UnsupportedModel, match=r"type 'gpt_neo' are not supported: layer 0 .* does not give"):
        overview("m", AutoConfig.for_model("gpt_neo"))
