"""Fully sharded data parallelism (Zhao et al. 2023) in PyTorch's second form, FSDP2.

Every process holds a part of each parameter, of its gradient and of its optimizer state. The parameters of a block are
gathered when it is computed, and let go after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from gpt2_pl.model import GPT2

# A task compares names and shapes itself, and a frozen base is not in its checkpoints.
_OPTIONS = StateDictOptions(full_state_dict=True, strict=False)


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's strategy for sharded models, over all processes of all machines.

    A checkpoint is one file, as without sharding, and either is read where the other was written. Lightning would
    load weights before the model can refuse them; here they are loaded after.

    Args:
        process_group_backend: as in Lightning's.
        timeout: as in Lightning's.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """As Lightning's, once the number of processes is known."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def on_validation_end(self) -> None:
        """Let go of what an evaluation gathered, so that the parameters are the optimizer's again."""
        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    on_test_end = on_predict_end = on_validation_end

    @property
    def lightning_restore_optimizer(self) -> bool:
        """That the trainer asks for the optimizer's state to be loaded."""
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """The file's contents, on every process; nothing in it is executed."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only=True)  # which the trainer leaves out here

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give every process its part of the weights."""
        assert self.model is not None
        set_model_state_dict(self.model, checkpoint["state_dict"], options=_OPTIONS)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state, for the process that writes it: parameters are numbered in the optimizer's order, as always.

        Lightning would number them in the model's.
        """
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        inner: Any = optimizer
        named: Any = get_optimizer_state_dict(self.model, getattr(inner, "optimizer", inner), options=options)
        if not named:
            return {}
        names = [name for group in named["param_groups"] for name in group["params"]]
        return _renamed(named, {name: number for number, name in enumerate(names)})

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give every process its part of the optimizers' states."""
        assert self.model is not None
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            set_optimizer_state_dict(self.model, optimizer, _renamed(state, dict(enumerate(order))), options=_OPTIONS)


def _renamed(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with other keys for its parameters."""
    groups = [{**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[key]: values for key, values in state["state"].items()}, "param_groups": groups}


def shard(core: GPT2, mesh: DeviceMesh) -> None:
    """Shard a GPT-2 over the processes of ``mesh``, one block a unit and the rest another.

    The rest, with the token embedding, stays gathered from the forward to the backward pass, for the loss reads it.
    """
    for block in core.h:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(core, mesh=mesh["data_parallel"], reshard_after_forward=False)


def shard_head(head: nn.Module, mesh: DeviceMesh) -> None:
    """Shard what stands behind the GPT-2."""
    fully_shard(head, mesh=mesh["data_parallel"])
