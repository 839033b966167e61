"""Fully sharded data parallelism (Zhao et al. 2023) with PyTorch's FSDP2.

Every process stores a shard of each parameter, of its gradient and of its optimizer state. The parameters of a block
are gathered for its computation and freed afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
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

# Not strict: a task compares names and shapes itself, and its checkpoints do not hold a frozen base.
_OPTIONS = StateDictOptions(full_state_dict=True, strict=False)


class FSDP2Strategy(ModelParallelStrategy):
    """Strategy that shards a model over all processes of all machines.

    Checkpoints have the same format as without sharding: one file, which runs with and without sharding can load.
    Lightning's ModelParallelStrategy would load weights before the model can reject them; this strategy loads them
    afterwards.

    Args:
        process_group_backend: as in ModelParallelStrategy.
        timeout: as in ModelParallelStrategy.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        settings: dict[str, Any] = {"process_group_backend": process_group_backend, "timeout": timeout}
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **settings)

    def setup_environment(self) -> None:
        """Set the size of the data-parallel mesh to the number of processes, and set up the environment."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def on_validation_end(self) -> None:
        """Free the parameters that an evaluation gathered, so that the optimizer's shards are used again."""
        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    on_test_end = on_predict_end = on_validation_end

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether the trainer loads the optimizer's state; always true."""
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint on every process, without executing code from it."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only=True)  # The trainer may pass None.

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load each process's shard of the weights."""
        assert self.model is not None
        set_model_state_dict(self.model, checkpoint["state_dict"], options=_OPTIONS)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the full state on the process that writes it, with parameters numbered in the optimizer's order.

        This is PyTorch's order without sharding; Lightning would use that of the model.
        """
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        inner: Any = optimizer
        named: Any = get_optimizer_state_dict(self.model, getattr(inner, "optimizer", inner), options=options)
        if not named:
            return {}
        names = [name for group in named["param_groups"] for name in group["params"]]
        return _rename_parameters(named, {name: number for number, name in enumerate(names)})

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load each process's shard of the optimizers' states."""
        assert self.model is not None
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            named = _rename_parameters(state, dict(enumerate(order)))
            set_optimizer_state_dict(self.model, optimizer, named, options=_OPTIONS)


def _rename_parameters(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """Return an optimizer's state with the keys of its parameters replaced by ``names``."""
    groups = [{**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[key]: values for key, values in state["state"].items()}, "param_groups": groups}


def shard(backbone: GPT2, mesh: DeviceMesh) -> None:
    """Shard a GPT-2 over the processes of ``mesh``: each block is a unit, and the other parameters are one more.

    The last unit, which has the token embedding, stays gathered from the forward to the backward pass, because the loss
    reads it.
    """
    for block in backbone.h:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(backbone, mesh=mesh["data_parallel"], reshard_after_forward=False)
