"""Several processes at one work, as `accelerate launch` and torchrun start them: each does its share.

Where the frozen model fits on one GPU, every process has all of it. Where it does not (`accelerate launch --use_fsdp
--fsdp_version 2`), FSDP2 shares out the weights, and every forward pass of one process needs the others: they hand it
the weights of a layer while they run that layer themselves. Shares of work do not take equally many passes (one answer
is longer, one lesson is still in memory), so each announces its passes, and who is done runs along on one token.
"""

import atexit
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.errors import BadInput
from headwise.models.families import view


class Processes:
    """One process, which does everything itself; `Launched` is one of several."""

    rank = 0
    number = 1

    def share(self, items: int) -> range:
        """Which of so many items this process does."""
        return range(self.rank, items, self.number)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return tensor

    def wait(self) -> None:
        """Until all are here."""

    def catch_up(self) -> None:
        """Until all have made the forward passes of what they do now. Required before `sum` and before gradients."""

    def require_equal_shares(self, items: int) -> None:
        """Raise BadInput if gradients through the model are asked for by some processes more often than by others."""

    def gather(self, rows: Sequence[Tensor], items: int, like: Tensor) -> Tensor:
        """Rows of all items, from those that each process has of its share; each `like` a row on the model's device."""
        whole = like.new_zeros(items, *like.shape)
        for at, row in zip(self.share(items), rows, strict=True):
            whole[at] = row
        return self.sum(whole)


class Launched(Processes):
    """One of several processes. Needs accelerate, which knows every way to be launched."""

    def __init__(self, device: str):
        from datetime import timedelta

        from accelerate import PartialState

        # Without cpu=True accelerate takes processes without a GPU for independent ones. Shares may differ in length.
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        self._state = PartialState(cpu=on_cpu, timeout=timedelta(days=1))
        self.rank, self.number = self._state.process_index, self._state.num_processes
        self.device = torch.device(self._state.device or "cpu")
        atexit.register(self._state.destroy_process_group)  # its threads must not outlive the interpreter

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        from accelerate.utils import reduce

        return reduce(tensor, "sum")  # pyright: ignore[reportReturnType]

    def wait(self) -> None:
        """Until all are here."""
        self._state.wait_for_everyone()


class Sharded(Launched):
    """One of several processes that share the weights: `adopt` the model, loaded on the CPU, before its first use."""

    def __init__(self, device: str):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise BadInput("weights are shared out by FSDP2 only: add --fsdp_version 2 to accelerate launch.")
        if os.environ.get("FSDP_OFFLOAD_PARAMS", "false") == "true":
            raise BadInput("weights stay on the GPUs: leave --fsdp_offload_params out of accelerate launch.")
        # Weights that are read from files are mapped into memory, all processes the same: none needs to send them.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        super().__init__(device)
        self._model: PreTrainedModel | None = None
        self._running_along = False

    def adopt(self, model: PreTrainedModel) -> None:
        """Keep a share of the frozen weights on this process's device; output projections are kept whole.

        Scorers and losses read the latter (a fifteenth of an 8B Llama) as the tensors they are.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model.requires_grad_(False)
        mesh = init_device_mesh(self.device.type, (self.number,))
        decoder: Any = model.get_decoder()
        model_view = view(model)
        projections = {
            weight
            for layer in range(len(model_view.shape.layers))
            for weight in model_view.projection(layer).to(self.device).parameters()
        }
        for module in (*decoder.layers, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=projections)
        model.register_forward_pre_hook(self._announce, prepend=True)  # before FSDP's own
        self._model = model

    def catch_up(self) -> None:
        """Run along until no process announces a pass any more."""
        model = self._model
        assert model is not None
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self._running_along = True
        with torch.no_grad():
            while self._others_at_work(False):
                model(input_ids=token, use_cache=False, logits_to_keep=1)
        self._running_along = False

    def require_equal_shares(self, items: int) -> None:
        """Backward passes are not announced: every process must make as many."""
        if items % self.number:
            raise BadInput(
                f"{items} contexts per step cannot be shared equally by {self.number} processes that hold a share of "
                f"the weights each; choose a multiple of {self.number}."
            )

    def _announce(self, *_: Any) -> None:
        if not self._running_along:
            self._others_at_work(True)

    def _others_at_work(self, at_work: bool) -> bool:
        working = torch.tensor(float(at_work), device=self.device, dtype=torch.float32)
        torch.distributed.all_reduce(working)
        return not at_work and bool(working > 0)


def launched(device: str) -> Processes:
    """What `accelerate launch` or torchrun says this process is. Raises BadInput."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    return Sharded(device) if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" else Launched(device)
