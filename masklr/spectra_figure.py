"""A picture of the spectra of a model: one panel for each kind of matrix, one line for each layer."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

MAX_PANELS = 8
OTHERS = "others"


class Spectrum(Protocol):
    """Singular values of a matrix, and of a Gaussian one of that shape."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @property
    def sigma(self) -> Tensor:
        """Singular values, descending."""

    @property
    def null(self) -> Tensor:
        """Those of a Gaussian matrix."""


def kind(name: str) -> str:
    """What a matrix is, whichever layer it is of: the end of its name, without numbers.

    Args:
        name: Name of a matrix.

    Example:
        >>> [kind(name) for name in ("blocks.3.attn.qkv.q", "layer1.0.conv2", "layer1.0.downsample.0", "head")]
        ['qkv.q', 'conv2', 'downsample', 'head']
    """
    parts = name.split(".")
    while len(parts) > 1 and parts[-1].isdigit():
        parts.pop()
    return ".".join(parts[-2:]) if len(parts) > 1 and not parts[-2].isdigit() else parts[-1]


def kinds(names: Sequence[str]) -> dict[str, list[str]]:
    """Names by kind, in order; at most eight, the smallest ones together as `others`.

    Args:
        names: Names of matrices.

    Example:
        >>> kinds(["stem", "blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2", "head"])
        {'fc1': ['blocks.0.fc1', 'blocks.1.fc1'], 'fc2': ['blocks.0.fc2', 'blocks.1.fc2'], 'others': ['stem', 'head']}
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(kind(name), []).append(name)
    several = [group for group in groups if len(groups[group]) > 1] or list(groups)
    kept = sorted(several, key=lambda group: -len(groups[group]))[:MAX_PANELS]
    if len(groups) > len(kept):
        kept = kept[: MAX_PANELS - 1]
    shown = {group: groups[group] for group in groups if group in kept}
    rest = {group: groups[group] for group in groups if group not in kept}
    if len(rest) < 2:
        return shown | rest
    return {**shown, OTHERS: [name for found in rest.values() for name in found]}


def spectra_figure(spectra: Mapping[str, Spectrum], title: str) -> Any:
    """Singular values over the largest of each matrix, against their number over that of all.

    Args:
        spectra: Spectra by the name of the matrix, the first layer first.
        title: Whose they are.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure  # not pyplot: no global state and no window

    groups = kinds([name for name, found in spectra.items() if found.sigma.any()])
    smallest = [float(found.sigma.min() / found.sigma.max()) for found in spectra.values() if found.sigma.any()]
    lowest = max(1e-4, min(smallest, default=0.1) / 2)
    columns = min(4, max(1, len(groups)))
    rows = max(1, -(-len(groups) // columns))
    figure = Figure(figsize=(1.2 + 2.6 * columns, 1.1 + 2.3 * rows), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    colors = colormaps["viridis"].resampled(256)
    for ax, (group, names) in zip(axes, groups.items(), strict=False):
        for number, name in enumerate(names):
            color = colors(0.9 * number / max(1, len(names) - 1))
            _line(ax, spectra[name].sigma, color=color, linewidth=1.1, label=name)
        for null in {spectra[name].shape: spectra[name].null for name in names if group != OTHERS}.values():
            _line(ax, null, color="0.35", linestyle="--", linewidth=1.0)
        ax.set_title(f"{group} ({len(names)})", fontsize=9)
        if group == OTHERS and len(names) <= 6:
            ax.legend(fontsize=6, frameon=False, loc="lower left")
    for ax in axes:
        ax.set_yscale("log")
        ax.set_ylim(lowest, 1.5)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.25)
    for above, ax in zip(axes[len(groups) - columns :], axes[len(groups) :], strict=False):
        ax.set_visible(False)
        above.tick_params(labelbottom=True)
    figure.supxlabel("number of the singular value / number of all; dashed: Gaussian matrix", fontsize=8)
    figure.supylabel("singular value / largest", fontsize=8)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1 / 0.9), colors), ax=axes, shrink=0.6, aspect=30, pad=0.01)
    bar.ax.set_ylim(0, 1)
    bar.set_ticks([0, 1], labels=["first layer", "last"])
    bar.ax.tick_params(labelsize=7)
    return figure


def _line(ax: Any, sigma: Tensor, **style: Any) -> None:
    values = sigma.numpy() / float(sigma.max())
    values = values[values > 1e-8]  # zeros have no place on a logarithmic axis
    ax.plot(np.arange(1, len(values) + 1) / len(sigma), values, marker="." if len(values) < 6 else "", **style)
