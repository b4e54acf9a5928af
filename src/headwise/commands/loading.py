"""Load the model of --model and its tokenizer, and choose its default method. All is imported when it is needed.

A command calls `find` first: it refuses a wrong name before torch and transformers are imported.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headwise.errors import BadInput
from headwise.files.terminal import complain
from headwise.methods.registry import AUTO
from headwise.models.places import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.models.processes import Processes


def load_model(source: Source, dtype: str, device: str) -> "tuple[PreTrainedModel, Any]":
    """Load model and tokenizer, without transformers' own messages."""
    from transformers.utils import logging

    from headwise.models.loading import load

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load(source, dtype=dtype, device=device)


def load_launched(
    source: Source, dtype: str, device: str, *, shared_out: bool = True
) -> "tuple[Processes, PreTrainedModel, Any]":
    """Return this process among those of 'accelerate launch' or torchrun, and load model and tokenizer for it."""
    from headwise.models.processes import Launched, Sharded, launched

    processes = launched(device)
    if isinstance(processes, Sharded) and not shared_out:  # generate() then counts its steps across processes by itself
        raise BadInput("eval needs the whole model in every process: launch it with --multi_gpu, not with --use_fsdp.")
    if isinstance(processes, Launched):
        device = "cpu" if isinstance(processes, Sharded) else str(processes.device)
    model, tokenizer = load_model(source, dtype, device)
    if isinstance(processes, Sharded):
        processes.adopt(model)
    return processes, model, tokenizer


def choose_methods(names: Sequence[str], model: "PreTrainedModel", *, quiet: bool = False) -> list[str]:
    """Return the methods, with the model's default for "auto". Print on stderr which one that is, and why."""
    if AUTO not in names:
        return list(names)
    from headwise.methods.method import choose
    from headwise.models.families import view

    model_view = view(model)
    choice = choose(model_view.shape, model_view.config_hash)
    if not quiet:
        complain(f"the method is {choice.name}: {choice.reason}.")
    return [choice.name if name == AUTO else name for name in names]
