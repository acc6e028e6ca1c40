"""Draw the README's picture from a run of the quickstart: python scripts/readme_picture.py RUN [PICTURE]."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from masklr.summary import series


def main(run: Path, picture: Path) -> None:
    """Left: the last reconstructions. Right: accuracy, effective rank, and the spectrum at the start and the end."""
    values = series(run)
    figure = plt.figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.55, 1])
    image = left.subplots()
    image.imshow(plt.imread(sorted((run / "pictures" / "reconstructions").glob("*.png"))[-1]))
    image.axis("off")
    accuracy, rank, spectrum = right.subplots(3, 1)

    steps, found = zip(*values["probe/norm/accuracy"], strict=True)
    accuracy.plot(steps, found, "o-", color="C0", clip_on=False)
    pixels = values["probe/pixels/accuracy"][0][1]
    accuracy.axhline(pixels, color="0.5", linestyle="--")
    accuracy.annotate("raw pixels", (steps[-1], pixels), ha="right", va="bottom", color="0.4", fontsize=8)
    accuracy.set(title="accuracy of a ridge probe, %", xlabel="step")

    steps, found = zip(*values["representation/norm/effective_rank"], strict=True)
    rank.plot(steps, found, "o-", color="C1", clip_on=False)
    rank.set(title="effective rank of the representation", xlabel="step")

    files = sorted((run / "spectra" / "representation_spectrum").glob("*.npz"))
    for file, color, label in ((files[0], "0.6", "step 0"), (files[-1], "C1", f"step {steps[-1]:,}")):
        sigma = np.load(file)["norm"]
        sigma = sigma[sigma > 1e-6 * sigma[0]]  # the final norm leaves one direction empty
        spectrum.semilogy(np.arange(1, len(sigma) + 1), sigma / sigma[0], color=color, label=label)
    spectrum.set(title="singular values of the representation / the largest", xlabel="index", ylim=(1e-3, 1.5))
    spectrum.legend(fontsize=8, frameon=False)
    for ax in (accuracy, rank, spectrum):
        ax.title.set_fontsize(9)
        ax.tick_params(labelsize=8)
        ax.xaxis.label.set_fontsize(8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)
    print(picture)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "configs/pretrain_digits.png"))
