"""Weights dealt out to several processes (FSDP2), for any LightningModule, with checkpoints that are one file."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy, StrategyRegistry
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from masklr.checkpoint_files import damage

# Methods besides `forward` in which a LightningModule uses its weights; `reconstruct` is that of pretraining.
_METHODS = ("training_step", "validation_step", "test_step", "predict_step", "reconstruct")


class FullyShard(ModelParallelStrategy):
    """FSDP2: every process keeps a part of each weight and of its optimizer state, and fetches the rest when used.

    Takes any LightningModule: if it has no `configure_model` of its own, its repeated blocks are sharded one by one,
    and the rest together. A checkpoint is one file, put together on rank 0, which holds the whole model for a moment;
    it is that of any other strategy, so one process can go on with the run or use its weights.

    Args:
        timeout: How long a process waits for the others before it ends, as H:MM:SS.
        process_group_backend: `nccl`, `gloo`; None is that of the accelerator.

    Raises:
        ValueError: A time-out that is not positive.

    Reference:
        Zhao et al., "PyTorch FSDP: experiences on scaling fully sharded data parallel", VLDB 2023.
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=30), process_group_backend: str | None = None) -> None:
        if timeout <= timedelta(0):
            raise ValueError(f"Expected `timeout` above 0, got {timeout}.")
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Join the other processes: all of them share the data."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard the module before its optimizer is made."""
        module = self.lightning_module
        assert module is not None
        if not is_overridden("configure_model", module):
            shard(module, self.device_mesh["data_parallel"])
            # Lightning asks that the module has it, which is done here.
            module.configure_model = _sharded  # type: ignore[method-assign]
        super().setup(trainer)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint whose checksum is right; nothing but tensors and plain values."""
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        if (problem := damage(Path(checkpoint_path))) is not None:
            raise ValueError(f"Expected a sound checkpoint, got {checkpoint_path}, which {problem}.")
        module = self.lightning_module
        assert module is not None
        checkpoint = torch.load(checkpoint_path, mmap=True, map_location="cpu", weights_only=True)
        saved = [sizes(state) for state in checkpoint.get("optimizer_states", [])]
        wanted = [sizes(optimizer) for optimizer in self.optimizers]
        if self.optimizers and saved != wanted:
            raise ValueError(
                f"Expected a checkpoint of the same optimizers, got {checkpoint_path}, whose groups have {saved} "
                f"parameters, not {wanted}."
            )
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=module.strict_loading)
        set_model_state_dict(module, checkpoint.pop("state_dict"), options=options)
        for place, optimizer in enumerate(self.optimizers):  # none where nothing is trained
            state = _by_name(checkpoint["optimizer_states"][place], optimizer, module)
            set_optimizer_state_dict(module, optimizer, state, options=options)
        return checkpoint


def sizes(optimizer: torch.optim.Optimizer | dict[str, Any]) -> list[int]:
    """How many parameters each group of an optimizer, or of its saved state, has."""
    groups = optimizer["param_groups"] if isinstance(optimizer, dict) else optimizer.param_groups
    return [len(group["params"]) for group in groups]


def _by_name(state: dict[str, Any], optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Any]:
    """An optimizer's saved state, which numbers parameters in the order of the groups, by their names.

    Lightning takes the numbers for places in the module, which they are not where there are groups or frozen weights.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = [
        dict(saved, params=[names[parameter] for parameter in group["params"]])
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    name_of = dict(zip(numbers, [name for group in groups for name in group["params"]], strict=True))
    return {"state": {name_of[number]: values for number, values in state["state"].items()}, "param_groups": groups}


def _sharded() -> None:
    """Nothing is left to do."""


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Deal a module's weights out to the processes of a mesh, block by block, in place.

    Between uses every weight is a part of it, the module's own as well, so that whoever measures weights always finds
    the same.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in [*blocks(module), module]:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    for name in _METHODS:
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost repeated blocks of a module: entries of its lists and sequences that hold several layers.

    Single layers are left out: their weights may be used from outside of them, as the patch embedding's are.
    """
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            for entry in child:
                layers = [part for part in entry.modules() if part._parameters]
                if len(layers) > 1:
                    yield entry
                else:
                    yield from blocks(entry)
        else:
            yield from blocks(child)


# So that `strategy="FullyShard"` is enough: Lightning looks names up in lower case.
StrategyRegistry.register("fullyshard", FullyShard)
