"""The encoder that a pretraining run has trained, from the run's folder."""

from pathlib import Path
from typing import Any

from masklr.models.encoders import encoder_options
from masklr.models.pretrained import load_encoder
from masklr.models.timm_models import timm_model

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


def run_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or the last one of a run's folder.

    Raises:
        FileNotFoundError: There is none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = sorted(folder.glob("*step=*.ckpt"))
    last = folder / "last.ckpt"
    if not last.exists() and not found:
        raise FileNotFoundError(f"Expected a checkpoint or the folder of a run with one, but there is none in {path}.")
    return last if last.exists() else found[-1]


def run_encoder_options(checkpoint: Path) -> tuple[str, dict[str, Any]]:
    """Name and `timm.create_model` options of the encoder that a pretraining run has trained.

    Args:
        checkpoint: A checkpoint in the run's folder, whose `config.yaml` says how the encoder was built: the weights
            alone do not tell the number of heads.

    Raises:
        ValueError: There is no such file beside the checkpoint, or it is not of a run that pretrains.
    """
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
        options = model["init_args"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, RecursionError):
        model, options = {}, {}
    pretrains = str(model.get("class_path", "")).endswith("MaskedAutoencoder")
    if not pretrains or not isinstance(options.get("encoder"), str):
        raise ValueError(f"Expected a run that pretrains an encoder by name, got {recipe}, which does not.")
    image_size, patch_size, in_chans = (options.get(name) for name in ("image_size", "patch_size", "in_chans"))
    encoder_args = {**(options.get("encoder_args") or {}), "pretrained": False}
    return options["encoder"], encoder_options(image_size, patch_size, in_chans, encoder_args)


def pretrained_encoder(path: str, argument: str, overrides: dict[str, Any]) -> Any:
    """The encoder of a pretraining run, without a head.

    Args:
        path: The run's folder, or a checkpoint in it.
        argument: The argument that the path came by, for errors.
        overrides: Of the run's own options of `timm.create_model`, such as `img_size`, to which positions are
            interpolated, or `drop_path_rate`.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It is of no run that pretrains, or the overrides change the architecture.
    """
    checkpoint = run_checkpoint(path)
    if not checkpoint.exists():
        raise FileNotFoundError(f"Expected `{argument}` to be a checkpoint or a run, but there is no file {path}.")
    name, options = run_encoder_options(checkpoint)
    vit = timm_model(argument, name, {**options, **overrides}, family="vit_*")
    load_encoder(vit, checkpoint, argument)
    return vit
