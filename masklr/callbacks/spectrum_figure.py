"""A picture of spectra: now, at initialization, and of random matrices of the same sizes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MAX_PANELS = 12


def spectrum_figure(
    spectra: Mapping[str, Tensor], initial: Mapping[str, Tensor], nulls: Mapping[str, Tensor], step: int
) -> Any:
    """A panel for each of at most 12 matrices, evenly chosen; singular values against their number.

    Args:
        spectra: Singular values by name, at least one matrix, none of zeros.
        initial: Those at initialization; a name may be missing.
        nulls: Those of a random matrix, which are drawn with the norm of the present one.
        step: When, for the title.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state and no window
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    names = _evenly(list(spectra))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(0.4 + 2.4 * columns, 0.8 + 1.8 * rows), dpi=110, layout="constrained")
    shown = f" of {len(names)} of {len(spectra)} matrices" if len(names) < len(spectra) else ""
    figure.suptitle(f"singular values{shown}, largest first, step {step:,}", fontsize=10)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, name in zip(axes, names, strict=False):
        scale = spectra[name].norm() / nulls[name].norm()
        _line(ax, nulls[name] * scale, "random, same norm", color="0.6", linestyle="--")
        if name in initial:
            _line(ax, initial[name], "initialization", color="tab:orange")
        _line(ax, spectra[name], f"step {step:,}", color="tab:blue")
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_title(name, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.margins(x=0.02)
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.supylabel("singular value", fontsize=8)
    return figure


def _line(ax: Any, sigma: Tensor, label: str, **style: Any) -> None:
    sigma = sigma[sigma > 1e-8 * sigma.max()].cpu()  # zeros have no place on a logarithmic axis
    ax.plot(range(1, len(sigma) + 1), sigma, label=label, linewidth=1.2, marker="." if len(sigma) < 12 else "", **style)


def _evenly(names: list[str]) -> list[str]:
    count = min(MAX_PANELS, len(names))
    return [names[i] for i in torch.linspace(0, len(names) - 1, count).round().int().tolist()]
