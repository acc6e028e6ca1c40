"""Classification sets of torchvision, opened by class name in one way whatever their constructors ask for."""

import difflib
import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from masklr.data.decoding import SampleError


class TorchvisionSource:
    """One split of a classification set of torchvision.

    Args:
        set_class: The class in `torchvision.datasets`.
        root: Where it lies on disk.
        training: Training or test split.
        options: Further arguments of the class.
        split: Value of its `split`; None finds one.
        download: Whether to fetch what is not there.
        in_chans: 1 or 3; None for what the first image has.
    """

    def __init__(
        self,
        set_class: type,
        root: str,
        training: bool,
        options: dict[str, Any],
        split: str | None,
        download: bool,
        in_chans: int | None,
    ) -> None:
        self.title = f"{set_class.__name__} {'train' if training else 'test'}"
        self.images = torchvision_split(set_class, root, training, options, split, download)
        first = self.images[0]
        if not (hasattr(first[0], "mode") and isinstance(first[1], (int, torch.Tensor)) and int(first[1]) >= 0):
            raise ValueError(f"Expected `name` of a set of images with one class each, got {set_class.__name__!r}.")
        self.in_chans = in_chans or (1 if first[0].mode in ("L", "1") else 3)
        self.num_classes = self._num_classes()

    def _num_classes(self) -> int:
        for attribute in ("classes", "class_to_idx", "num_classes", "targets", "labels", "_labels"):
            found = getattr(self.images, attribute, None)
            if found is None:
                continue
            if attribute in ("targets", "labels", "_labels"):
                return int(max(found)) + 1
            return found if isinstance(found, int) else len(found)
        return 1 + max(int(self.images[row][1]) for row in range(len(self)))

    def __len__(self) -> int:
        return len(self.images)

    def name(self, row: int) -> str:
        """The path of the image where the set tells it, else its number."""
        for attribute in ("_image_files", "_images", "_samples", "samples"):
            found = getattr(self.images, attribute, None)
            if isinstance(found, list) and len(found) == len(self):
                path = found[row][0] if isinstance(found[row], tuple) else found[row]
                if isinstance(path, (str, Path)):
                    return str(path)
        return f"{self.title} {row:06d}"

    def read(self, row: int) -> tuple[Tensor, int]:
        """See `Source.read`."""
        from torchvision.transforms.v2.functional import pil_to_tensor

        try:
            image, label = self.images[row]
            if image.mode == "CMYK" or image.mode.startswith(("I", "F")):
                kind = "CMYK" if image.mode == "CMYK" else "16-bit"
                raise SampleError(f"{self.name(row)}: a {kind} image is refused; convert it, or pass `on_error: skip`.")
            return pil_to_tensor(image.convert("L" if self.in_chans == 1 else "RGB")), int(label)
        except (OSError, SyntaxError) as error:  # how PIL says truncated, missing, or damaged
            raise SampleError(f"{self.name(row)}: cut off or damaged ({error}).") from None


def torchvision_class(name: str) -> type:
    """Class of this name in `torchvision.datasets`; ValueError names the nearest ones."""
    from torchvision import datasets

    if name in datasets.__all__:
        return getattr(datasets, name)
    spelled = {known.lower(): known for known in datasets.__all__}
    near = [spelled[match] for match in difflib.get_close_matches(name.lower(), spelled, n=3, cutoff=0.5)]
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    raise ValueError(f"Expected `name` of a set in torchvision.datasets, got {name!r}{hint}")


def constructor_arguments(set_class: type) -> set[str]:
    """Names of the arguments of a constructor; `**kwargs` stands for those of the class it inherits from (EMNIST)."""
    names: set[str] = set()
    for ancestor in set_class.__mro__:
        parameters = inspect.signature(ancestor).parameters.values()
        names |= {parameter.name for parameter in parameters}
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names


def has_test_split(set_class: type) -> bool:
    """Whether the set's constructor chooses between training and test images."""
    parameters = constructor_arguments(set_class)
    return "train" in parameters or "split" in parameters


def torchvision_split(
    set_class: type, root: str, training: bool, options: dict[str, Any], split: str | None, download: bool
) -> Any:
    """Training or test images of a set, whichever way its constructor is asked for them."""
    parameters = constructor_arguments(set_class)
    arguments = dict(options)
    if "root" in parameters:
        arguments["root"] = root
    if download and "download" in parameters:
        arguments["download"] = True
    if "train" in parameters:
        attempts: list[dict[str, Any]] = [{"train": training}]
    elif "split" in parameters:
        usual = ("trainval", "train", "train-standard") if training else ("test", "val")
        attempts = [{"split": name} for name in ((split,) if split else usual)]
    else:
        attempts = [{}]
    refused = ""
    for attempt in attempts:
        try:
            return set_class(**arguments, **attempt)
        except ValueError as error:  # torchvision's word for a `split` that the set does not have
            refused = str(error)
        except TypeError as error:
            raise ValueError(f"`options`: {set_class.__name__} says: {error}.") from None
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            if isinstance(error, RuntimeError) and "download" not in reason.lower():
                raise ValueError(f"{set_class.__name__}: {reason}") from None
            where = f"{set_class.__name__} is not in {os.path.abspath(root)!r}"
            if "download" in parameters and not download:
                raise FileNotFoundError(f"{where}; pass `download: true` to fetch it.") from None
            raise FileNotFoundError(f"{where} and could not be fetched ({reason}).") from None
    raise ValueError(f"{set_class.__name__}: {refused}")
