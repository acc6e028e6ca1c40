"""timm's models by name, with a sentence where one cannot be built, and the sizes of images that they take."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from masklr.names import did_you_mean


def timm_model(argument: str, name: str, options: dict[str, Any], family: str = "") -> Any:
    """`timm.create_model`, whose errors name our arguments.

    Args:
        argument: The argument that the name came by; overrides come by `{argument}_args`.
        name: Name of the model.
        options: Arguments of `timm.create_model`.
        family: Pattern of the names that a wrong one is compared with; all if empty.

    Raises:
        ValueError: There is no such model, or timm cannot build it with these options.
    """
    import timm

    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models(family))
        what = "timm vision transformer" if family.startswith("vit") else "timm model"
        raise ValueError(f"Expected `{argument}` to be the name of a {what}, got {name!r}{hint}")
    try:
        return timm.create_model(name, **options)
    except (TypeError, AssertionError, RuntimeError, OSError) as error:  # the last: weights that cannot be fetched
        raise ValueError(
            f"timm cannot build `{argument}` {name!r} with these sizes and `{argument}_args`: {error}"
        ) from error


def pair(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """(height, width) of a size that may be one number.

    Example:
        >>> pair(8)
        (8, 8)
    """
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def size_options(
    image_size: int | Sequence[int] | None, patch_size: int | Sequence[int] | None, in_chans: int | None
) -> dict[str, Any]:
    """Those of three sizes that are given, as options of `timm.create_model`.

    Example:
        >>> size_options(32, None, 1)
        {'img_size': (32, 32), 'in_chans': 1}
    """
    sizes = {"img_size": pair(image_size), "patch_size": pair(patch_size), "in_chans": in_chans}
    return {option: size for option, size in sizes.items() if size is not None}


def check_size(images: Tensor, in_chans: int | None, image_size: tuple[int, int] | None) -> None:
    """Raise unless images (B, C, H, W) have these channels and this height and width; None allows any."""
    wanted = (in_chans, *(image_size or (None, None)))
    found = tuple(images.shape[1:])
    if len(found) != 3 or any(size not in (None, other) for size, other in zip(wanted, found, strict=False)):
        expected = " x ".join("any" if size is None else str(size) for size in wanted)
        got = " x ".join(str(size) for size in found)
        raise ValueError(f"Expected images of {expected} (channels x height x width), got {got}.")
