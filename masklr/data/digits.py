"""scikit-learn's handwritten digits: real images that come with an installed library."""

from typing import Literal

import numpy as np
import torch

from masklr.data.loading import ImageData, SplitName, in_unit_interval
from masklr.data.splits import MemoryImages


class Digits(ImageData):
    """1,797 real 8 x 8 images of handwritten digits, in memory; no download.

    Values 0 to 16 become `round(v * 255 / 16)`. The test split is stratified and depends on `test_fraction` and
    `test_seed` alone; validation is held out from the rest. 10 classes.

    Args:
        batch_size: Samples in one optimizer step, over all ranks and accumulated batches.
        val_fraction: Share of the non-test images that is held out as validation, in [0, 1).
        test_fraction: Share of all images that is the test split, in (0, 1).
        in_chans: 1, or 3 equal channels for networks that want color.
        split_seed: Seed of what is held out as validation.
        test_seed: Seed of the test split.
        seed: Seed of the order of training samples.
        predict_split: The split that `predict` runs over.

    Reference:
        Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI Machine Learning Repository, 1998.
    """

    def __init__(
        self,
        batch_size: int = 256,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        in_chans: Literal[1, 3] = 1,
        split_seed: int = 0,
        test_seed: int = 0,
        seed: int = 0,
        predict_split: SplitName = "validation",
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            val_fraction=val_fraction,
            split_seed=split_seed,
            seed=seed,
            predict_split=predict_split,
        )
        if in_chans not in (1, 3):
            raise ValueError(f"Expected `in_chans` 1 or 3, got {in_chans}.")
        if in_unit_interval("test_fraction", test_fraction) == 0:
            raise ValueError("Expected `test_fraction` in (0, 1), got 0.")
        if test_seed < 0:
            raise ValueError(f"Expected `test_seed` of at least 0, got {test_seed}.")
        self.in_chans = in_chans
        self._test = (test_fraction, test_seed)

    def training_images(self) -> MemoryImages:
        """All images but those of the test split."""
        return self._images(in_test=False)

    def test_images(self) -> MemoryImages:
        """The fixed, stratified test split."""
        return self._images(in_test=True)

    def _images(self, in_test: bool) -> MemoryImages:
        from sklearn.datasets import load_digits

        values, labels = load_digits(return_X_y=True)
        rows = stratified_rows(labels, *self._test)
        chosen = rows if in_test else np.setdiff1d(np.arange(len(labels)), rows)
        pixels = np.rint(values[chosen] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
        images = torch.from_numpy(pixels.repeat(self.in_chans, axis=1))
        return MemoryImages(images, torch.from_numpy(labels[chosen].astype(np.int64)), num_classes=10)


def stratified_rows(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Rows, ascending, of a random share of each class.

    Example:
        >>> stratified_rows(np.array([0, 0, 1, 1, 1, 1]), 0.5, seed=0).shape
        (3,)
    """
    generator = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        chosen.append(rows[: round(len(rows) * fraction)])
    return np.sort(np.concatenate(chosen))
