"""The optimizer and learning rate schedule of every task."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn


@dataclass(frozen=True)
class Optim:
    """AdamW or SGD with linear learning rate scaling, warm-up and cosine decay by step.

    Biases, norms, tokens and positions (every parameter with fewer than two axes, or that the model names in
    `no_weight_decay()`) are not decayed.

    Args:
        base_lr: Learning rate for 256 images a step; the peak is base_lr * global batch / 256, where the global batch
            counts all processes and accumulated batches.
        weight_decay: Weight decay, 0 or more: decoupled for `adamw`; for `sgd` a part of the gradient, which makes it
            the gradient of weight_decay / 2 * |w|^2.
        betas: Decay rates of AdamW's moment estimates, each in [0, 1).
        warmup: Linear warm-up: a number of steps if 1 or more, otherwise the share of all steps.
        schedule: What follows the warm-up: `cosine` to `min_lr_ratio`, or `constant`.
        min_lr_ratio: Where the cosine ends, as a share of the peak, in [0, 1].
        optimizer: `adamw` or `sgd`.
        momentum: Momentum of `sgd`, in [0, 1).
        layer_decay: Factor, in (0, 1], by which the learning rate of each layer of a timm backbone is below that of the
            layer after it; what comes after the backbone (a head, a decoder) has the full one. 1 is the same for all.

    Raises:
        ValueError: A value outside its range.

    Reference:
        Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019; Goyal et al., "Accurate, large
        minibatch SGD", 2017 (linear scaling); Bao et al., "BEiT: BERT pre-training of image transformers", ICLR 2022
        (`layer_decay`).
    """

    base_lr: float = 1.5e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = field(default=(0.9, 0.95))
    warmup: float = 0.05
    schedule: Literal["cosine", "constant"] = "cosine"
    min_lr_ratio: float = 0.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.0
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if not self.base_lr > 0:
            raise ValueError(f"Expected `base_lr` above 0, got {self.base_lr}.")
        if not self.weight_decay >= 0:
            raise ValueError(f"Expected `weight_decay` of 0 or more, got {self.weight_decay}.")
        if not self.warmup >= 0:
            raise ValueError(f"Expected `warmup` of 0 or more, got {self.warmup}.")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"Expected `min_lr_ratio` in [0, 1], got {self.min_lr_ratio}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"Expected `betas` in [0, 1), got {self.betas}.")
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"Expected `optimizer` adamw or sgd, got {self.optimizer!r}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"Expected `momentum` in [0, 1), got {self.momentum}.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"Expected `layer_decay` in (0, 1], got {self.layer_decay}.")
        if self.momentum and self.optimizer == "adamw":
            raise ValueError(f"Expected no `momentum` with adamw, which has `betas`, got {self.momentum}.")

    def peak_lr(self, global_batch: int) -> float:
        """The learning rate after warm-up, for a number of images a step."""
        return self.base_lr * global_batch / 256

    def factor(self, step: int, total_steps: float) -> float:
        """Share of the peak learning rate at a step (0 is the first).

        Args:
            step: Number of optimizer steps already taken.
            total_steps: Number of steps of the whole run; infinite is allowed for `constant`.
        """
        warmup = self.warmup if self.warmup >= 1 else self.warmup * total_steps
        if step < warmup:
            return (step + 1) / max(warmup, 1)
        if self.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1.0, total_steps - warmup))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    def configure(self, module: nn.Module, trainer: pl.Trainer) -> OptimizerLRSchedulerConfig:
        """What `configure_optimizers` returns: the optimizer of decayed and other parameters, by step."""
        total_steps = planned_steps(trainer)
        if math.isinf(total_steps) and (self.schedule == "cosine" or 0 < self.warmup < 1):
            raise ValueError(
                "Expected `max_steps` or `max_epochs` of the trainer to be set: the schedule needs the run's length."
            )
        peak_lr = self.peak_lr(global_batch_size(trainer))
        groups = self._groups(module, peak_lr)
        # One kernel for all parameters. Lightning cannot clip gradients of a fused optimizer under mixed precision.
        options: dict[str, Any] = {
            "lr": peak_lr,
            "fused": not trainer.gradient_clip_val,
        }
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, betas=self.betas, **options)
        else:
            optimizer = torch.optim.SGD(groups, momentum=self.momentum, **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step, total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _groups(self, module: nn.Module, peak_lr: float) -> list[dict[str, Any]]:
        """Decayed and other parameters, of each learning rate."""
        decayed, not_decayed = parameter_groups(module)
        if self.layer_decay == 1:
            return [
                {"params": decayed, "weight_decay": self.weight_decay},
                {"params": not_decayed, "weight_decay": 0.0},
            ]
        scales = layer_scales(module, self.layer_decay)
        scale_of = {id(parameter): scales[name] for name, parameter in module.named_parameters()}
        return [
            {"params": chosen, "weight_decay": weight_decay, "lr": peak_lr * scale}
            for scale in sorted(set(scale_of.values()), reverse=True)
            for parameters, weight_decay in ((decayed, self.weight_decay), (not_decayed, 0.0))
            if (chosen := [parameter for parameter in parameters if scale_of[id(parameter)] == scale])
        ]


def layer_scales(module: nn.Module, layer_decay: float) -> dict[str, float]:
    """Share of the learning rate that each parameter gets under layer-wise decay.

    Of a timm backbone (any part that has timm's `group_matcher`) whose layers are numbered from 0, the stem, to L, the
    last block and the norms after it, layer i gets layer_decay^(L + 1 - i); all else gets 1.

    Args:
        module: Any module with a timm backbone in it.
        layer_decay: Factor from a layer to the one before it, in (0, 1].

    Returns:
        Shares by name, in the order of `named_parameters()`.

    Raises:
        ValueError: There is no backbone whose layers are known.
    """
    from timm.models import group_parameters

    scales = {name: 1.0 for name, _ in module.named_parameters()}
    backbones: dict[str, Any] = {}
    for prefix, part in module.named_modules():
        inside = any(prefix.startswith(f"{outer}.") or not outer for outer in backbones)
        if callable(getattr(part, "group_matcher", None)) and not inside:
            backbones[prefix] = part
    if not backbones:
        raise ValueError(
            f"Expected a timm backbone for `layer_decay`, got {layer_decay} and none whose layers are known."
        )
    for prefix, backbone in backbones.items():
        layers = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
        last = max(layers.values())
        for name, layer in layers.items():
            scales[f"{prefix}.{name}" if prefix else name] = layer_decay ** (last + 1 - layer)
    return scales


def parameter_groups(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Trainable parameters that are decayed, and those that are not."""
    exempt: set[str] = set()
    for prefix, part in module.named_modules():
        if callable(named := getattr(part, "no_weight_decay", None)):
            exempt |= {f"{prefix}.{name}" if prefix else name for name in named()}
    decayed: list[Tensor] = []
    not_decayed: list[Tensor] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            token = name.rpartition(".")[2].endswith("_token")
            no_decay = parameter.ndim < 2 or token or name in exempt
            (not_decayed if no_decay else decayed).append(parameter)
    return decayed, not_decayed


def planned_steps(trainer: pl.Trainer) -> float:
    """Optimizer steps of the whole run; infinite if it has no end.

    Lightning's own estimate makes the training loader before a checkpoint is restored, too early for a loader that
    starts where the run stood; masklr's data modules state the number of batches instead.
    """
    by_steps = trainer.max_steps if trainer.max_steps > 0 else math.inf
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return by_steps
    batches = getattr(getattr(trainer, "datamodule", None), "num_train_batches", None)
    if batches is None:
        return trainer.estimated_stepping_batches
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return min(by_steps, math.ceil(batches / trainer.accumulate_grad_batches) * trainer.max_epochs)


def global_batch_size(trainer: pl.Trainer) -> int:
    """Images an optimizer step: over all processes and accumulated batches."""
    if (size := getattr(getattr(trainer, "datamodule", None), "batch_size", None)) is not None:
        return size  # masklr's data modules state the global batch
    loader = trainer.train_dataloader
    if loader is None:
        # Lightning shows it only after the optimizer is made, unless it had to count the batches of an epoch.
        loader = trainer.fit_loop._data_source.dataloader()
    size = getattr(loader, "batch_size", None)
    if size is None and (sampler := getattr(loader, "batch_sampler", None)) is not None:
        size = sampler.batch_size
    if size is None:
        raise ValueError("Expected a training loader with a `batch_size`: the learning rate is scaled by it.")
    return size * trainer.world_size * trainer.accumulate_grad_batches
