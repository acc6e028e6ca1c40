"""Weights of a run for other libraries: a timm model's, or all, as safetensors."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from masklr.models.pretrained import mae_state_dict
from masklr.models.run_encoder import run_backbone_options, run_encoder_options
from masklr.state_dicts import checkpoint_state_dict

TASK = "model."  # where a task keeps its model


def exported(checkpoint: Path, what: Literal["encoder", "all"] = "encoder") -> dict[str, Tensor]:
    """The weights of a checkpoint without what belongs to training.

    Args:
        checkpoint: A checkpoint of masklr, or any file that `masklr.models.pretrained.mae_state_dict` reads.
        what: `encoder`: the encoder of a masked autoencoder, or the backbone of a classifier, under timm's keys. `all`:
            the whole model under its own keys, the decoder or the head with it.

    Returns:
        Tensors by key, contiguous, each with memory of its own, as safetensors wants them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint, or has no encoder.
    """
    if what == "encoder":
        state = {
            k.removeprefix("encoder."): t for k, t in mae_state_dict(checkpoint).items() if k.startswith("encoder.")
        }
    else:
        whole = {key.replace("_orig_mod.", ""): tensor for key, tensor in checkpoint_state_dict(checkpoint).items()}
        state = {key.removeprefix(TASK): tensor for key, tensor in whole.items() if key.startswith(TASK)}
        state = state or mae_state_dict(checkpoint)
    if not state:
        raise ValueError(f"Expected a checkpoint with an encoder, got {checkpoint}, which has none.")
    return {key: tensor.contiguous().clone() for key, tensor in state.items()}


def encoder_architecture(checkpoint: Path) -> tuple[str, dict[str, Any]] | None:
    """Name and options with which `timm.create_model` builds an exported encoder; None where the run does not say."""
    try:
        name, options = run_encoder_options(checkpoint)
    except ValueError:
        try:
            name, options = run_backbone_options(checkpoint)
        except (ValueError, FileNotFoundError):
            return None
    return name, {key: value for key, value in options.items() if key != "pretrained"}


def write(tensors: dict[str, Tensor], path: Path, architecture: tuple[str, dict[str, Any]] | None = None) -> None:
    """Write safetensors, whole or not at all.

    Args:
        tensors: By key, contiguous.
        path: The file; its folder is made.
        architecture: Name and options of `timm.create_model`, kept as `architecture` and `architecture_options` (JSON)
            in the file's metadata.

    Raises:
        ValueError: The file cannot be written.
    """
    from safetensors.torch import save_file

    metadata = {"format": "pt"}
    if architecture is not None:
        metadata |= {"architecture": architecture[0], "architecture_options": json.dumps(architecture[1])}
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(path)
    except OSError as error:
        raise ValueError(f"Cannot write {path} (`out`): {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
