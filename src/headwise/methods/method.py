"""A method = one scorer + one allocator + one protection. Written `scorer+allocator`, or by a short name (registry.py).

And the default: what is used where nobody says which method.
"""

import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headwise.artifacts.gates import shipped_gates
from headwise.artifacts.shipped import shipped
from headwise.errors import BadInput
from headwise.interfaces import AbstractAllocator, AbstractScorer, Follow
from headwise.methods.names import made
from headwise.methods.registry import AUTO
from headwise.shapes import ModelShape

# The default where no gates are ready for a model: what needs no preparation and is best on real models, query-agnostic
# (docs/results; set by measurement). The second one is for where a context cannot be read twice: models with
# sliding-window layers, and prompts that generate() reads.
PLAIN_DEFAULT = "kvzip-l2"
ONE_PASS_DEFAULT = "keydiff"
READY_DEFAULT = "lkv"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """What to keep. Protected tokens are kept first, inside the budget (None: those of the scorer's paper).

    Every head keeps all of them, unless the allocator decides how many a head gets (`lukv`); tokens that are named here
    are kept by every head of every method.

    >>> Method.parse("snapkv+adakv")
    >>> Method(scorer=SnapKV(window_size=64), allocator=AdaKV(safeguard=0.05), protect_sink=4)
    """

    scorer: AbstractScorer
    allocator: AbstractAllocator
    protect_sink: int | None = None
    protect_window: int | None = None

    @property
    def sink(self) -> int:
        """First tokens always kept."""
        return max(self.scorer.sink, self.allocator.sink) if self.protect_sink is None else self.protect_sink

    @property
    def window(self) -> int:
        """Last tokens always kept."""
        return max(self.scorer.window, self.allocator.window) if self.protect_window is None else self.protect_window

    @property
    def keeps_protected(self) -> bool:
        """Whether every head keeps all protected tokens."""
        named = self.protect_sink is not None or self.protect_window is not None
        return named or self.allocator.keeps_protected

    @classmethod
    def parse(cls, name: "str | Method") -> "Method":
        """From an alias ("adakv"), a scorer ("keydiff" means keydiff+uniform) or a pair ("keydiff+adakv").

        An allocator that reads a file takes it after @: "keydiff+fixed@budget.safetensors". Raises BadInput.
        """
        if isinstance(name, Method):
            return name
        if not isinstance(name, str):
            raise BadInput(
                f"method={name!r}: give a name such as 'snapkv+adakv', or Method(scorer=..., allocator=...)."
            )
        if name == AUTO:
            raise BadInput(f"method {AUTO!r} is chosen for a model: give it to headwise.compress or to a command.")
        scorer, allocator = made(name)
        return cls(scorer=scorer, allocator=allocator)

    def instructed(self, follow: Follow) -> "Method":
        """With the instruction, if its scorer reads the context again after one; `follow` makes tokens of it."""
        return replace(self, scorer=self.scorer.instructed(follow))

    def for_model(self, shape: ModelShape, config_hash: str, name: str = "") -> "Method":
        """The method to use on this model. Raises ArtifactMismatch if its budget is for another model or scorer.

        Models of one architecture share a configuration, whatever their weights. Where `name` is a hub id and the file
        was made for another one, there is a warning.
        """
        scorer = self.scorer.resolve(shape, config_hash)
        allocator = self.allocator.resolve(scorer, shape, config_hash)
        for made_for in sorted({scorer.made_for, allocator.made_for}):
            _warn_of_another(made_for, name)
        return replace(self, scorer=scorer, allocator=allocator)

    def provenance(self) -> dict[str, Any]:
        """Names and parameters, for records and saved caches."""
        return {
            "scorer": self.scorer.provenance(),
            "allocator": self.allocator.provenance(),
            "sink": self.sink,
            "window": self.window,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A model's default method, by its name, and why it is that one."""

    name: str
    reason: str


def choose(shape: ModelShape, config_hash: str, *, replays: bool = True) -> Choice:
    """The default method of a model: learned, if its gates come with headwise, else the best without preparation.

    `replays`: whether the context can be read twice, as compress() does and generate() does not.
    """
    if _gates_are_ready(config_hash):
        return Choice(name=READY_DEFAULT, reason="its gates for this model come with headwise")
    bare = "no gates are ready for this model ('headwise train' makes some), and of what needs no preparation it is"
    if not replays:
        return Choice(name=ONE_PASS_DEFAULT, reason=f"{bare} the default where a prompt is read once")
    if len(shape.layers) < shape.num_layers:
        return Choice(name=ONE_PASS_DEFAULT, reason=f"{bare} the default for models with sliding-window layers")
    return Choice(name=PLAIN_DEFAULT, reason=f"{bare} the default")


def for_model(
    method: str | Method, shape: ModelShape, config_hash: str, *, name: str = "", replays: bool = True
) -> Method:
    """The method to use on a model; "auto" is the one that `choose` names. Raises BadInput, ArtifactMismatch.

    `name` is the model's, as in `Method.for_model`.
    """
    if method == AUTO:
        method = choose(shape, config_hash, replays=replays).name
    return Method.parse(method).for_model(shape, config_hash, name)


def _warn_of_another(made_for: str, name: str) -> None:
    """Warn if both are hub ids, and of different models: only copies and quantisations have a longer name."""
    hub_ids = all(_HUB_ID.fullmatch(each) for each in (made_for, name)) and not Path(name).is_dir()
    if not hub_ids or name.rpartition("/")[2].lower().startswith(made_for.rpartition("/")[2].lower()):
        return
    warnings.warn(
        f"this method's file was made for {made_for}; {name} has the same architecture, but it may have other weights. "
        "Measure with 'headwise eval', or make a file for this model.",
        UserWarning,
        stacklevel=3,
    )


def _gates_are_ready(config_hash: str) -> bool:
    """Whether both parts of LKV are shipped for a model."""
    if not shipped("gates", config_hash):
        return False
    gates = shipped_gates(config_hash)  # damaged ones are told, not passed over
    return gates.budgets is not None and gates.scores is not None
