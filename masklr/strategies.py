"""Weights dealt out to several processes (FSDP2), for any LightningModule, with checkpoints that are one file."""

import zipfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy, StrategyRegistry
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map_only

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
        """Read a checkpoint whose checksum is right; nothing but tensors and plain values.

        Every process takes its own parts from the file: no process waits for another, and all refuse it alike.
        """
        path = Path(self.broadcast(checkpoint_path))
        if (problem := damage(path)) is not None:
            raise ValueError(f"Expected a sound checkpoint, got {path}, which {problem}.")
        module = self.lightning_module
        assert module is not None
        mmap = zipfile.is_zipfile(path)  # torch has not always written archives
        checkpoint = torch.load(path, mmap=mmap, map_location="cpu", weights_only=True)
        own = module.state_dict()
        names = {name.replace("_orig_mod.", ""): name for name in own}  # torch saves without what compilation adds
        saved = {names.get(name, name): tensor for name, tensor in checkpoint.pop("state_dict").items()}
        weights = {name: _parts(tensor, own.get(name)) for name, tensor in saved.items()}
        module.load_state_dict(weights, strict=module.strict_loading)
        if module.trainer.state.fn == "fit":
            states = checkpoint["optimizer_states"]
            if len(states) != len(self.optimizers):
                raise ValueError(
                    f"Expected a checkpoint of {len(self.optimizers)} optimizers, got {path}, which has {len(states)}."
                )
            for optimizer, state in zip(self.optimizers, states, strict=True):
                optimizer.load_state_dict(_parts_of_state(state, optimizer))
        # What callbacks and loops take over must not live in a file that is removed one day.
        kept = {key: value for key, value in checkpoint.items() if key != "optimizer_states"}
        return checkpoint | tree_map_only(Tensor, Tensor.clone, kept)


def _parts(tensor: Any, like: Tensor | None) -> Any:
    """This process's parts of a whole tensor, dealt out as one of the same shape is; as it is where none is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or not isinstance(tensor, Tensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def _parts_of_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's saved state with this process's parts of all that has the shape of a parameter.

    It numbers parameters in the order of the groups. Lightning takes the numbers for places in the module, which they
    are not where there are groups or frozen weights.
    """
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    like = dict(zip(numbers, parameters, strict=False))  # of other sizes: the optimizer itself says so
    dealt = {
        number: tree_map_only(Tensor, Tensor.clone, {key: _parts(v, like.get(number)) for key, v in values.items()})
        for number, values in state["state"].items()
    }
    return {**state, "state": dealt}


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
