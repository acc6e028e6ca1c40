"""Classification sets of torchvision by name, and folders of images."""

import os
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from masklr.data.decoding import EXTENSIONS, Interpolation, SampleError, View, decoded_image, size_pair
from masklr.data.loading import ImageData, SplitName, in_unit_interval
from masklr.data.splits import MAX_SKIPPED, Images, OnError, images_of
from masklr.data.torchvision_sets import TorchvisionSource, has_test_split, torchvision_class


class TorchvisionImages(ImageData):
    """Any classification set of torchvision by its class name, or a folder of images.

    A set has the test split that was published with it: `train=False`, or `split="test"`, or, where that is not
    offered (ImageNet, Imagenette), `split="val"`; sets without one (FakeData, EuroSAT, Caltech101) hold
    `test_fraction` out.
    A folder is `train/CLASS/IMAGE`, with `val/` or `test/` beside `train/`; without `train/`, the class folders are the
    folder's own. `val/`, which for ImageNet is the published evaluation split, is the *test* split, and validation is
    held out from `train/`, so that nothing chosen on validation has seen it; `val_folder` and `test_folder` change
    that. Images are JPEG, PNG or WebP files; classes are sorted by name.

    Args:
        name: Class name in `torchvision.datasets`, such as `CIFAR10`; this or `folder`.
        folder: Folder of images; this or `name`.
        root: Where torchvision's sets lie on disk.
        download: Whether to fetch a set that is not there.
        options: Further arguments of torchvision's class.
        train_split: Value of the class's `split` for training; None takes `trainval` or `train`, whichever there is.
        test_split: Value of the class's `split` for testing; None takes `test` or `val`, whichever there is.
        val_folder: Folder inside `folder` that is the validation split, instead of holding images out.
        test_folder: Folder inside `folder` that is the test split; None takes `val` or `test`, whichever there is.
        image_size: Pixels, one number or (height, width); None keeps the images as they are, which must be of one size.
        in_chans: 1 or 3; None is what a named set has, and 3 for a folder.
        in_memory: Whether the decoded images live in memory; `auto` does that up to `max_memory_bytes`.
        max_memory_bytes: Bound for `auto`, for each split, in bytes of decoded images.
        random_resized_crop: Range of the share of the area that a random crop of a training image keeps (MAE: 0.2, 1);
            None for none. Crops are cut from the images at full size, by the worker processes, so not in memory.
        interpolation: How images are resized, always with antialiasing.
        center_fraction: Share of the shorter side that the central crop keeps outside training, in (0, 1].
        on_error: `raise` stops at an image that cannot be used; `skip` leaves it out and logs how many.
        max_skipped: Share of a split's samples that `skip` may leave out before that is an error, in [0, 1].
        batch_size: Samples in one optimizer step, over all ranks and accumulated batches.
        num_workers: Processes that decode ahead, for each loader; a set in memory uses none.
        val_fraction: Share of the training split that is held out as validation, in [0, 1).
        test_fraction: Share held out as test where there is no test split, in [0, 1).
        split_seed: Seed of what is held out.
        seed: Seed of the order of training samples and of their crops.
        predict_split: The split that `predict` runs over.
    """

    def __init__(
        self,
        name: str | None = None,
        folder: str | None = None,
        root: str = "data",
        download: bool = False,
        options: dict[str, Any] | None = None,
        train_split: str | None = None,
        test_split: str | None = None,
        val_folder: str | None = None,
        test_folder: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        in_chans: Literal[1, 3] | None = None,
        in_memory: Literal["auto"] | bool = "auto",
        max_memory_bytes: int = 2**30,
        random_resized_crop: tuple[float, float] | None = None,
        interpolation: Interpolation = "bicubic",
        center_fraction: float = 1.0,
        on_error: OnError = "raise",
        max_skipped: float = MAX_SKIPPED,
        batch_size: int = 256,
        num_workers: int = 1,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        predict_split: SplitName = "validation",
    ) -> None:
        super().__init__(batch_size, num_workers, val_fraction, split_seed, seed, predict_split)
        if (name is None) == (folder is None):
            raise ValueError(f"Expected either `name` or `folder`, got name={name!r} and folder={folder!r}.")
        if name is not None:
            self._set_class = torchvision_class(name)
        elif not os.path.isdir(folder or ""):
            raise FileNotFoundError(f"`folder`: there is no folder {folder!r}.")
        if in_chans not in (None, 1, 3):
            raise ValueError(f"Expected `in_chans` 1 or 3, got {in_chans}.")
        if random_resized_crop is not None and in_memory is True:
            raise ValueError("Expected `in_memory` false or auto beside `random_resized_crop`, got true.")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"Expected `on_error` raise or skip, got {on_error!r}.")
        if not 0 <= max_skipped <= 1:
            raise ValueError(f"Expected `max_skipped` in [0, 1], got {max_skipped}.")
        self.name, self.folder, self.root, self.download = name, folder, root, download
        self.options = options or {}
        self._split_names = (train_split, test_split)
        self._channels = in_chans
        self._in_memory, self._max_memory_bytes, self._on_error = in_memory, max_memory_bytes, on_error
        self._max_skipped = max_skipped
        self.view = View(size_pair(image_size), interpolation, center_fraction, random_resized_crop)
        self.val_folder, self.test_folder = self._folders(val_folder, test_folder)
        self.own_validation = self.val_folder is not None
        own_test = self.test_folder is not None if name is None else has_test_split(self._set_class)
        self.test_fraction = 0.0 if own_test else in_unit_interval("test_fraction", test_fraction)

    def _folders(self, val_folder: str | None, test_folder: str | None) -> tuple[Path | None, Path | None]:
        if self.folder is None:
            if val_folder or test_folder:
                raise ValueError("Expected `val_folder` and `test_folder` only beside `folder`.")
            return None, None
        for argument, given in (("val_folder", val_folder), ("test_folder", test_folder)):
            if given and not Path(self.folder, given).is_dir():
                raise FileNotFoundError(f"`{argument}`: there is no folder {str(Path(self.folder, given))!r}.")
        usual = [name for name in ("val", "test") if name != val_folder and Path(self.folder, name).is_dir()]
        if not Path(self.folder, "train").is_dir():
            usual = []  # then `val` and `test` would be classes
        test_folder = test_folder or (usual[0] if usual else None)
        return Path(self.folder, val_folder) if val_folder else None, (
            Path(self.folder, test_folder) if test_folder else None
        )

    def prepare_data(self) -> None:
        """Download, on one process of a node."""
        if self.name is not None and self.download:
            TorchvisionSource(self._set_class, self.root, True, self.options, self._split_names[0], True, None)
            TorchvisionSource(self._set_class, self.root, False, self.options, self._split_names[1], True, None)

    def training_images(self) -> Images:
        """The published training split."""
        if self.folder is None:
            return self._named(training=True)
        return self._of_folder(self._train_folder(), None, "train")

    def validation_images(self) -> Images | None:
        """What lies in `val_folder`, if that is given."""
        return None if self.val_folder is None else self._of_folder(self.val_folder, self._classes(), "validation")

    def test_images(self) -> Images | None:
        """The published test split, if there is one."""
        if self.folder is None:
            return self._named(training=False) if has_test_split(self._set_class) else None
        return None if self.test_folder is None else self._of_folder(self.test_folder, self._classes(), "test")

    def _train_folder(self) -> Path:
        assert self.folder is not None
        return Path(self.folder, "train") if Path(self.folder, "train").is_dir() else Path(self.folder)

    def _classes(self) -> list[str]:
        return class_names(self._train_folder())

    def _named(self, training: bool) -> Images:
        source = TorchvisionSource(
            self._set_class,
            self.root,
            training,
            self.options,
            self._split_names[0 if training else 1],
            False,
            self._channels,
        )
        return self._images(source, f"{self.name} {'train' if training else 'test'}")

    def _of_folder(self, folder: Path, classes: list[str] | None, title: str) -> Images:
        return self._images(FolderSource(folder, self._channels or 3, classes), f"{folder} {title}")

    def _images(self, source: "FolderSource | TorchvisionSource", title: str) -> Images:
        return images_of(
            source,
            self.view,
            in_memory=self._in_memory,
            max_memory_bytes=self._max_memory_bytes,
            on_error=self._on_error,
            max_skipped=self._max_skipped,
            title=title,
        )


class FolderSource:
    """Images in `folder/CLASS/`, any depth below it.

    Args:
        folder: The folder of class folders.
        in_chans: 1 or 3.
        classes: Names of the classes in the order of their labels; None for all class folders, sorted.
    """

    def __init__(self, folder: Path, in_chans: int, classes: list[str] | None = None) -> None:
        found = class_names(folder)
        classes = found if classes is None else classes
        if unknown := sorted(set(found) - set(classes)):
            raise ValueError(f"{folder}: class {unknown[0]!r} is not among those of the training split.")
        self.paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            paths = image_paths(folder / name)
            self.paths += paths
            labels += [label] * len(paths)
        if not self.paths:
            raise FileNotFoundError(f"{folder}: no images ({', '.join(EXTENSIONS)}) in its class folders.")
        self.labels, self.num_classes, self.in_chans = labels, len(classes), in_chans

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, row: int) -> str:
        """The path of the image."""
        return self.paths[row]

    def read(self, row: int) -> tuple[Tensor, int]:
        """See `Source.read`."""
        try:
            with open(self.paths[row], "rb") as file:
                data = bytearray(file.read())
        except OSError as error:
            raise SampleError(f"{self.paths[row]}: {error.strerror}.") from None
        return decoded_image(data, self.in_chans, self.paths[row]), self.labels[row]


def class_names(folder: Path) -> list[str]:
    """Names of the class folders, sorted."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise FileNotFoundError(f"{folder}: no class folders.")
    return names


def image_paths(folder: Path) -> list[str]:
    """Paths of the images in a folder and below, sorted."""
    return sorted(
        os.path.join(parent, file)
        for parent, _, files in os.walk(folder, followlinks=True)
        for file in files
        if file.lower().endswith(EXTENSIONS)
    )
