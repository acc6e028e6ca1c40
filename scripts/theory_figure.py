"""The figure of the theory table: singular values over training, one panel a row."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from theory_predictions import Prediction, invariant_tail, modes
from theory_rows import Row, Training
from torch import Tensor

PAGE_WIDTH, PANEL_HEIGHT, COLUMNS = 7.1, 1.32, 3  # inches: a page of two columns
# Okabe and Ito's palette, which color-blind readers can tell apart; the largest value first.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
STYLE = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "xtick.minor.size": 0,
    "pdf.fonttype": 42,  # text that can be edited and searched
}


def draw_figure(rows: list[tuple[Row, Prediction, Training]], path: Path) -> None:
    """Write the figure; the ending of the path is its format."""
    with plt.rc_context(STYLE):
        columns = min(COLUMNS, len(rows))
        lines = -(-len(rows) // columns)
        size = (PAGE_WIDTH * columns / COLUMNS, PANEL_HEIGHT * lines + 0.45)
        figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
        for ax in axes.flat[len(rows) :]:
            ax.axis("off")
        for ax, row in zip(axes.flat, rows, strict=False):
            draw_panel(ax, *row)
        figure.supxlabel("step", fontsize=7)
        figure.supylabel("singular values", fontsize=7)
        figure.legend(
            [Line2D([], [], color=COLORS[0], lw=1.2), Line2D([], [], color="0.75", lw=0.8), theory_line()],
            ["trained with sampled masks", "without (p = 0)", "theory"],
            loc="outside upper center",
            ncols=3,
            frameon=False,
        )
        figure.savefig(path, dpi=300)
        plt.close(figure)


def theory_line() -> Line2D:
    """The dashed line of a prediction, for the legend."""
    return Line2D([], [], color="black", lw=0.8, ls=(0, (3, 2)))


def draw_panel(ax: Axes, row: Row, prediction: Prediction, training: Training) -> None:
    """Means over seeds of all singular values, and where theory puts them."""
    steps = torch.tensor(training.steps)
    tail = row.name == "small_init_invariant"
    weights = training.weights[:1] if tail else training.weights
    sigma = torch.linalg.svdvals(weights[0]) if tail else row.spectrum(weights)
    masked, control = (half.mean(1) for half in sigma.chunk(2, 1))
    if not row.schedule.path:
        ax.plot(steps, control, color="0.75", lw=0.8, zorder=1)
    for i in reversed(range(masked.shape[1])):
        ax.plot(steps, masked[:, i], color=color(i, prediction.rank, masked.shape[1]), lw=1.2, zorder=2)
    dashes = {"color": "black", "lw": 0.7, "ls": (0, (3, 2)), "zorder": 3}
    if tail:
        curve = invariant_tail(row, training.steps[-1])[:, None]
    elif row.schedule.path:
        curve = modes(row, torch.arange(training.steps[-1] + 1))
    else:
        curve = None
        ax.hlines(unique(prediction.spectrum), steps[1], steps[-1], **dashes)
    if curve is not None:
        ax.plot(curve, **dashes)
    top = 1.08 * float(torch.cat([masked.flatten(), control.flatten()]).max())
    ax.set(ylim=(-0.03 * top, top), title=f"{row.schedule.label}\n{row.setting}")
    if row.schedule.path:
        ax.set_xlim(0, training.steps[-1])
    else:
        ax.set(xscale="log", xlim=(1, training.steps[-1]))
        ax.xaxis.set_major_locator(LogLocator(numticks=9))
    label_values(ax, prediction.spectrum, top)


def color(i: int, rank: int, count: int) -> str | tuple[float, ...]:
    """Color of the i-th of `count` singular values: one of four, or of a scale if more than four are above 0."""
    if rank <= len(COLORS):
        return COLORS[min(i, len(COLORS) - 1)]
    return plt.colormaps["viridis"](0.9 * i / (count - 1))


def unique(values: Tensor) -> list[float]:
    """Values that a reader of two decimals can tell apart."""
    return sorted({round(v, 3) for v in values.tolist()}, reverse=True)


def label_values(ax: Axes, values: Tensor, top: float) -> None:
    """Write the predicted values to the right of their lines, as many as find room."""
    last = float("inf")
    for value in unique(values):
        if last - value > 0.14 * top:
            ax.annotate(
                f"{value:.2f}",
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(2, 0),
                textcoords="offset points",
                va="center",
                annotation_clip=False,
            )
            last = value
