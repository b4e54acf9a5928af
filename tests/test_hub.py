"""Budgets and gates from the hub: names, revisions, what is recorded, and what is said where nothing can be read.

The hub is a server on this machine that answers as the real one does; its client is the real one.
"""

import json
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from families import random_ids, tiny_model
from huggingface_hub import constants
from random_gates import gates_for

import headwise
from headwise.artifacts.budget import Budget
from headwise.artifacts.origin import Origin
from headwise.errors import ArtifactMismatch, BadInput
from headwise.files import hub
from headwise.methods.method import Method
from headwise.methods.names import entries_of
from headwise.methods.registry import SCORERS
from headwise.models.families import view

FIRST, SECOND = "1" * 40, "2" * 40


class Hub(BaseHTTPRequestHandler):
    """`files`: (repository, commit, name) -> bytes; `branches`: name -> commit."""

    files: dict[tuple[str, str, str], bytes]
    branches: dict[str, str]
    asked: list[str]

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, *, body):
        owner, name, _, revision, file = self.path.strip("/").split("/", 4)
        self.asked.append(f"{self.command} {owner}/{name} {revision} {file}")
        commit = self.branches.get(revision, revision)
        if not any(repo == f"{owner}/{name}" for repo, _, _ in self.files):
            return self._refuse("RepoNotFound", commit)
        if not any(known == commit for _, known, _ in self.files):
            return self._refuse("RevisionNotFound", commit)
        data = self.files.get((f"{owner}/{name}", commit, file))
        if data is None:
            return self._refuse("EntryNotFound", commit)
        self.send_response(200)
        self._headers({"ETag": f'"{sha256(data).hexdigest()}"', "Content-Length": str(len(data))}, commit)
        if body:
            self.wfile.write(data)
        return None

    def _refuse(self, code, commit):
        self.send_response(404)
        self._headers({"X-Error-Code": code, "Content-Length": "0"}, commit)

    def _headers(self, found, commit):
        for name, value in {**found, "X-Repo-Commit": commit}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The hub's handler; a cache of its own, and nothing remembered."""
    handler = type("Handler", (Hub,), {"files": {}, "branches": {"main": FIRST}, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # looks so often whether it shall end
        place = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", place)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        hub.fetch.cache_clear()
        yield handler
        hub.fetch.cache_clear()
        server.shutdown()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def gates_bytes(model, tmp_path, **options):
    gates_for(model, **options).save(tmp_path / "gates.safetensors")
    return (tmp_path / "gates.safetensors").read_bytes()


def refusal(name):
    with pytest.raises(BadInput) as caught:
        Method.parse(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_gates_of_a_repository_are_used_and_recorded_with_their_commit(served, model, tmp_path):
    served.files["ada/gates", FIRST, "lkv.safetensors"] = gates_bytes(model, tmp_path)
    cache = headwise.compress(model, random_ids(1, 60), "lkv@hub:ada/gates", keep=0.5)
    found = json.loads(json.dumps(cache.provenance["method"]))
    assert found["scorer"]["gates"]["source"] == f"hub:ada/gates/lkv.safetensors@{FIRST}"
    assert found["allocator"]["gates"]["source"] == found["scorer"]["gates"]["source"]
    here = headwise.compress(model, random_ids(1, 60), f"lkv@{tmp_path / 'gates.safetensors'}", keep=0.5)
    assert cache.lengths.equal(here.lengths)
    assert "source" not in here.provenance["method"]["scorer"]["gates"]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("lkv@hub:ada/gates", "main lkv.safetensors"),
        ("lkv-t@hub:ada/gates+uniform", "main lkv.safetensors"),
        ("snapkv+lkv-h@hub:ada/gates", "main lkv.safetensors"),
        ("lkv@hub:ada/gates@v1", "v1 lkv.safetensors"),
        (f"lkv@hub:ada/gates/small/other.safetensors@{SECOND}", f"{SECOND} small/other.safetensors"),
    ],
)
def test_which_file_a_name_asks_for(served, model, tmp_path, name, asked):
    data = gates_bytes(model, tmp_path)
    served.branches["v1"] = SECOND
    for commit in (FIRST, SECOND):
        for file in ("lkv.safetensors", "small/other.safetensors"):
            served.files["ada/gates", commit, file] = data
    Method.parse(name)
    assert {line.partition(" ")[2] for line in served.asked} == {f"ada/gates {asked}"}
    assert {"lkv-t", "lkv-h"} & set(entries_of(name))


@pytest.mark.parametrize("allocator", ["lukv", "fixed"])
def test_a_budget_is_called_like_its_scorer(served, model, tmp_path, allocator):
    shape, scorer = view(model).shape, SCORERS["keydiff"].make()
    heads = shape.num_heads
    budget = Budget(
        ratios=torch.tensor([0.5]),
        fractions=torch.tensor([0.5] * heads).reshape(1, len(shape.layers), shape.kv_heads),
        hull={
            "protected": torch.tensor([]).reshape(1, 0).expand(heads, 0),
            "width": torch.tensor([1.0] * heads)[:, None],
            "slope": torch.tensor([1.0] * heads)[:, None],
        },
        origin=Origin(shape=shape, scorer="keydiff", scorer_parameters=scorer.provenance()),
    )
    budget.save(tmp_path / "b.safetensors")
    served.files["ada/budgets", FIRST, "keydiff.safetensors"] = (tmp_path / "b.safetensors").read_bytes()
    cache = headwise.compress(model, random_ids(1, 60), f"keydiff+{allocator}@hub:ada/budgets@main", keep=0.5)
    source = cache.provenance["method"]["allocator"]["budget"]["source"]
    assert source == f"hub:ada/budgets/keydiff.safetensors@{FIRST}"


def test_a_branch_that_moves_changes_no_running_process(served, model, tmp_path):
    served.files["ada/gates", FIRST, "lkv.safetensors"] = gates_bytes(model, tmp_path)
    served.files["ada/gates", SECOND, "lkv.safetensors"] = gates_bytes(model, tmp_path, seed=1)
    first = Method.parse("lkv@hub:ada/gates").provenance()
    served.branches["main"] = SECOND
    assert Method.parse("lkv@hub:ada/gates").provenance() == first
    hub.fetch.cache_clear()
    assert Method.parse("lkv@hub:ada/gates").provenance()["scorer"]["gates"]["source"].endswith(f"@{SECOND}")


def test_without_a_network_the_cache_must_do(served, model, tmp_path, monkeypatch):
    served.files["ada/gates", FIRST, "lkv.safetensors"] = gates_bytes(model, tmp_path)
    first = Method.parse("lkv@hub:ada/gates").provenance()
    hub.fetch.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Method.parse("lkv@hub:ada/gates").provenance() == first
    assert Method.parse(f"lkv@hub:ada/gates@{FIRST}").provenance() == first
    told = refusal("lkv@hub:ada/others")
    assert "HF_HUB_OFFLINE switches the hub off, and the file is not in the hub's cache on this machine" in told


def test_a_hub_that_is_not_there(served, model, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    told = refusal("lkv@hub:ada/gates")
    assert "the hub could not be reached" in told
    assert "not in the hub's cache" in told


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("hub:bob/gates", "'lkv.safetensors' of 'bob/gates' on the hub: there is no such repository, or it is private"),
        ("hub:ada/gates@v9", "of 'ada/gates' at 'v9' on the hub: the repository has no such revision"),
        ("hub:ada/gates/x.safetensors", "'x.safetensors' of 'ada/gates' on the hub: the repository has no such file"),
        ("hub:ada", "names no file on the hub: write hub:owner/name"),
        ("hub:", "names no file on the hub"),
        ("hub:ada/gates@", "names no file on the hub"),
        ("hub:ada/gates/model.bin", "'model.bin' is not read from the hub, only safetensors files are"),
        ("hub:ada/gates/../x.safetensors", "'../x.safetensors' is not read from the hub"),
        ("hub:ada/gates//x.safetensors", "'/x.safetensors' is not read from the hub"),
        ("hub:-ada-/gates..", "Check the name"),
    ],
)
def test_wrong_names_are_told_what_is_wrong(served, model, tmp_path, name, told):
    served.files["ada/gates", FIRST, "lkv.safetensors"] = gates_bytes(model, tmp_path)
    assert told in refusal(f"lkv@{name}")


def test_a_file_of_something_else_is_refused(served, model, tmp_path):
    served.files["ada/gates", FIRST, "lkv.safetensors"] = b"nothing of ours"
    assert "is damaged or no safetensors file" in refusal("lkv@hub:ada/gates")


def test_gates_of_another_model_are_refused(served, model, tmp_path):
    served.files["ada/gates", FIRST, "lkv.safetensors"] = gates_bytes(tiny_model("qwen3"), tmp_path)
    with pytest.raises(ArtifactMismatch, match="this model's is"):
        headwise.compress(model, random_ids(1, 60), "lkv@hub:ada/gates", keep=0.5)


def test_a_model_of_another_name_and_the_same_architecture_is_warned_about(model, tmp_path):
    gates = gates_for(model)
    path = tmp_path / "gates.safetensors"
    replace(gates, origin=replace(gates.origin, model="org/Model-1B-Instruct")).save(path)
    shape, found = view(model).shape, view(model).config_hash
    method = Method.parse(f"lkv@{path}")
    for name in ("", "org/Model-1B-Instruct", "other/model-1b-instruct-4bit", str(tmp_path), "model"):
        method.for_model(shape, found, name)
    with pytest.warns(UserWarning, match=r"made for org/Model-1B-Instruct; org/Model-1B has the same architecture"):
        method.for_model(shape, found, "org/Model-1B")
