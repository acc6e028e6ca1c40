"""Outputs of named layers on the evaluation path, for the callbacks that measure representations."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from masklr.names import did_you_mean, matching

Pool = Literal["mean", "first", "tokens"]

Weights = Literal["current", "ema"]

OUTPUT = "output"  # the name of what `forward` of the LightningModule returns


def submodule(pl_module: nn.Module, path: str) -> nn.Module:
    """The part of a module at a dotted path, seen through `torch.compile`.

    Raises:
        ValueError: There is none; the sentence names the nearest paths.
    """
    part = pl_module
    for name in path.split(".") if path else []:
        child = getattr(part, name, None)
        if not isinstance(child, nn.Module):
            known = [plain(found) for found, _ in pl_module.named_modules() if found]
            kind = type(pl_module).__name__
            raise ValueError(f"Expected `module` to be a part of {kind}, got {path!r}{did_you_mean(path, known)}")
        part = child
    return getattr(part, "_orig_mod", part)


def plain(name: str) -> str:
    """A module's name without the step that `torch.compile` puts in."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def named_layers(pl_module: nn.Module, module: str, patterns: list[str]) -> dict[str, nn.Module]:
    """Layers below a part of the module whose names match any of these patterns (see `masklr.names.matching`).

    Raises:
        ValueError: A pattern matches nothing; the sentence names the nearest layers.
    """
    layers = {plain(name): layer for name, layer in submodule(pl_module, module).named_modules() if name}
    return {name: layers[name] for name in matching(layers, patterns, "layers")}


def element(batch: Any, key: int | str, argument: str) -> Tensor:
    """An element of a batch, by index or key.

    Raises:
        ValueError: The batch has none, or it is no tensor.
    """
    try:
        found = batch if isinstance(batch, Tensor) and key == 0 else batch[key]
    except (KeyError, IndexError, TypeError):
        found = None
    if not isinstance(found, Tensor):
        raise ValueError(f"Expected a tensor at `{argument}`={key!r} of the batch, which is a {type(batch).__name__}.")
    return found


def pooled(output: Any, pool: Pool, where: str) -> Tensor:
    """Features (n, d) of a layer's output.

    Args:
        output: (B, d); (B, T, d), tokens; or (B, d, H, W), a feature map. Of a tuple, its first element.
        pool: `mean` over tokens or pixels, the `first` token, or every one of the `tokens` or pixels as a sample.
        where: Name of the layer, for the error.

    Raises:
        ValueError: The output has another form.
    """
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or not 2 <= output.ndim <= 4:
        kind = f"of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(f"Expected layer {where!r} to give features of 2 to 4 axes, got an output {kind}.")
    if output.ndim == 2:
        return output
    if output.ndim == 4:
        output = output.flatten(2).transpose(1, 2)
    if pool == "tokens":
        return output.flatten(0, 1)
    # The mean of bf16 tokens is taken in float32.
    return output[:, 0] if pool == "first" else output.mean(1, dtype=torch.promote_types(output.dtype, torch.float32))


@contextmanager
def evaluation(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """The evaluation path: evaluation mode, no gradient, the trainer's precision, nothing compiled.

    A compiled module would not run hooks that were set after its compilation.
    """
    pl_module.eval()
    with torch.no_grad(), trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
        yield


def averages_weights(callback: pl.Callback) -> bool:
    """Whether it is Lightning's `WeightAveraging` (or `EMAWeightAveraging`)."""
    return isinstance(callback, getattr(pl.callbacks, "WeightAveraging", ()))  # not before Lightning 2.6


def weight_averaging(trainer: pl.Trainer) -> Any:
    """The callback among the trainer's that averages weights; None if there is none."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next(filter(averages_weights, callbacks), None)


@contextmanager
def weights_in_place(trainer: pl.Trainer, pl_module: pl.LightningModule, weights: Weights) -> Iterator[None]:
    """Within a validation: the module has the weights that are trained, or their running average.

    For the whole of a validation Lightning's `WeightAveraging` puts the average into the module, which is therefore
    exchanged for the trained ones here, and back afterwards, bit for bit.
    """
    averaging = weight_averaging(trainer)
    if weights == "ema" or averaging is None or averaging._average_model is None:
        yield
        return
    averaging._swap_models(pl_module)
    try:
        yield
    finally:
        averaging._swap_models(pl_module)


def features(
    pl_module: pl.LightningModule, layers: dict[str, nn.Module], images: Tensor, pool: Pool
) -> dict[str, Tensor]:
    """Features of each layer (of `forward`'s output if none is named) for a batch of images.

    Call it under `evaluation`.

    Raises:
        ValueError: A layer did not run, ran more than once, or gave something that is not features.
    """
    found: dict[str, Tensor] = {}
    repeated: list[str] = []

    def collector(name: str) -> Any:
        def collect(module: nn.Module, args: object, output: Any) -> None:
            if name in found:
                repeated.append(name)
            found[name] = pooled(output, pool, name)

        return collect

    handles = [layer.register_forward_hook(collector(name)) for name, layer in layers.items()]
    try:
        output = pl_module(images)
    finally:
        for handle in handles:
            handle.remove()
    if not layers:
        return {OUTPUT: pooled(output, pool, OUTPUT)}
    if silent := [name for name in layers if name not in found]:
        raise ValueError(
            f"Layer {silent[0]!r} did not run in `forward` of {type(pl_module).__name__}: nothing to measure."
        )
    if repeated:
        raise ValueError(f"Layer {repeated[0]!r} runs more than once in `forward`: name its parts or another layer.")
    return {name: found[name] for name in layers}
