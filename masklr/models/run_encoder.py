"""The encoder that a pretraining run has trained, from the run's folder."""

from pathlib import Path
from typing import Any

import torch

from masklr.checkpoint_files import sound_checkpoint
from masklr.models.encoders import encoder_options
from masklr.models.pretrained import load_encoder
from masklr.models.timm_models import size_options, timm_model

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


def is_file(source: str) -> bool:
    """Whether a string names a file or folder, not a model.

    Example:
        >>> is_file("vit_base_patch16_224.mae"), is_file("runs/pretrain_digits/version_0")
        (False, True)
    """
    path = Path(source)
    is_hub = source.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    return not is_hub and (path.exists() or len(path.parts) > 1 or path.suffix in SUFFIXES)


def run_encoder_options(checkpoint: Path) -> tuple[str, dict[str, Any]]:
    """Name and `timm.create_model` options of the encoder that a pretraining run has trained.

    Args:
        checkpoint: A checkpoint in the run's folder, whose `config.yaml` says how the encoder was built: the weights
            alone do not tell the number of heads.

    Raises:
        ValueError: There is no such file beside the checkpoint, or it is not of a run that pretrains.
    """
    model, recipe = _recipe(checkpoint)
    options = model.get("init_args") or {}
    pretrains = str(model.get("class_path", "")).endswith("MaskedAutoencoder")
    if not pretrains or not isinstance(options.get("encoder"), str):
        raise ValueError(f"Expected a run that pretrains an encoder by name, got {recipe}, which does not.")
    image_size, patch_size, in_chans = (options.get(name) for name in ("image_size", "patch_size", "in_chans"))
    encoder_args = {**(options.get("encoder_args") or {}), "pretrained": False}
    return options["encoder"], encoder_options(image_size, patch_size, in_chans, encoder_args)


def run_backbone_options(checkpoint: Path) -> tuple[str, dict[str, Any]]:
    """Name and `timm.create_model` options of the backbone that a run of a `Classifier` has trained.

    Args:
        checkpoint: A checkpoint in the run's folder. A backbone that came from another run is built as there.

    Raises:
        FileNotFoundError: The run that the backbone came from is gone.
        ValueError: There is no recipe beside the checkpoint, or it is not of a backbone by name.
    """
    model, recipe = _recipe(checkpoint)
    options = model.get("init_args") or {}
    name = options.get("backbone")
    if not str(model.get("class_path", "")).endswith("Classifier") or not isinstance(name, str):
        raise ValueError(f"Expected a run of a classifier with a backbone by name, got {recipe}, which is of none.")
    given = size_options(*(options.get(size) for size in ("image_size", "patch_size", "in_chans")))
    given |= options.get("backbone_args") or {}
    if not is_file(name):
        return name, _without_unused_size(name, {"num_classes": 0, **given, "pretrained": False})
    encoder, own = run_encoder_options(sound_checkpoint(Path(name)))
    return encoder, {**own, **given}


def _without_unused_size(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of `timm.create_model` without `img_size` where the architecture takes images of any size."""
    try:
        with torch.device("meta"):
            timm_model("backbone", name, options)
    except ValueError as error:
        if "unexpected keyword argument 'img_size'" in str(error):
            return {key: value for key, value in options.items() if key != "img_size"}
    return options


def _recipe(checkpoint: Path) -> tuple[dict[str, Any], Path]:
    """The model in the recipe beside a checkpoint, empty if it has none, and the recipe's file."""
    import yaml

    recipes = [folder / "config.yaml" for folder in checkpoint.absolute().parents[:2]]
    recipe = next((file for file in recipes if file.is_file()), None)
    if recipe is None:
        raise ValueError(
            f"Expected a checkpoint in its run's folder, whose config.yaml says how it was built, got {checkpoint}; "
            "else give the name of the architecture, and the file as `weights`."
        )
    try:
        model = yaml.safe_load(recipe.read_text())["model"]["init_args"]["model"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, RecursionError):
        model = {}
    return model if isinstance(model, dict) else {}, recipe


def pretrained_encoder(path: str, argument: str, overrides: dict[str, Any]) -> Any:
    """The encoder of a pretraining run, without a head.

    Args:
        path: The run's folder, or a checkpoint in it.
        argument: The argument that the path came by, for errors.
        overrides: Of the run's own options of `timm.create_model`, such as `img_size`, to which positions are
            interpolated, or `drop_path_rate`.

    Raises:
        FileNotFoundError: There is no sound checkpoint.
        ValueError: It is damaged, or of no run that pretrains, or the overrides change the architecture.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"Expected `{argument}` to be a checkpoint or a run's folder, but there is no {path}.")
    checkpoint = sound_checkpoint(Path(path))
    name, options = run_encoder_options(checkpoint)
    vit = timm_model(argument, name, {**options, **overrides}, family="vit_*")
    load_encoder(vit, checkpoint, argument)
    return vit
