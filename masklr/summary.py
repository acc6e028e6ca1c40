"""What a run found, in one table: run folder -> text."""

import csv
from pathlib import Path

Series = list[tuple[int, float]]


def series(folder: Path) -> dict[str, Series]:
    """The values of every key in a run's `metrics.csv` as (step, value), in order of steps."""
    found: dict[str, Series] = {}
    path = folder / "metrics.csv"
    if not path.exists():
        return found
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for key, value in row.items():
                if value:
                    found.setdefault(key, []).append((step, float(value)))
    return {key: sorted(values) for key, values in found.items()}


def summary(folder: Path) -> str:
    """The first and last value of what a run measures, and where its files are.

    Args:
        folder: A run's folder.

    Returns:
        Lines of text; only those for which the run has values.
    """
    values = series(folder)
    steps = max((found[-1][0] for found in values.values()), default=0)
    lines = ["", f"{'':42}{'start':>10}{'end':>10}    step 0 and step {steps:,}"]

    def row(label: str, key: str, form: str, note: str = "", scale: float = 1.0) -> None:
        if key in values:
            (first_step, first), (last_step, last) = values[key][0], values[key][-1]
            first, last = scale * first, scale * last
            start = format(first, form) if first_step == 0 or len(values[key]) > 1 else ""
            # A run that stops between two validations ends with older values: say which.
            note = f"{note} (measured at step {last_step:,})" if last_step < steps else note
            lines.append(f"{label:42}{start:>10}{format(last, form):>10}    {note}".rstrip())

    def constant(key: str, form: str, text: str) -> str:
        return text.format(format(values[key][-1][1], form)) if key in values else ""

    means = constant("val/loss_of_patch_means", ".3f", "predicting each patch's mean: {}")
    row("validation loss", "val/loss", ".3f", means)
    row("validation accuracy, %", "val/accuracy", ".1f", scale=100)
    if "test/accuracy" in values:
        lines.append(f"{'test accuracy, %':42}{'':>10}{100 * values['test/accuracy'][-1][1]:>10.1f}")
    row("objective, with the masks' penalty", "val/objective", ".4f")
    pixels = constant("probe/pixels/accuracy", ".1f", "raw pixels: {}")
    for key in values:
        what, _, measure = key.rpartition("/")
        if what.startswith("probe/") and measure == "accuracy" and what not in ("probe/pixels", "probe/mean"):
            row(f"ridge probe on {what[6:]}, accuracy %", key, ".1f", pixels)
    for key in values:
        what, _, measure = key.rpartition("/")
        if what.startswith("representation/") and measure == "effective_rank" and what != "representation/mean":
            null = constant(f"{what}/effective_rank_null", ".1f", "Gaussian features: {}")
            row(f"effective rank of {what[15:]}", key, ".1f", null)
    null = constant("weight/mean/effective_rank_null", ".1f", "Gaussian weights: {}")
    row("effective rank of weights, mean", "weight/mean/effective_rank", ".1f", null)
    spent, elapsed = 0.0, 0.0
    for key, found in values.items():
        if key.startswith("cost/") and key.endswith("/seconds"):
            total = sum(seconds for _, seconds in found)
            spent += total
            share = values.get(key.replace("/seconds", "/share"), [(0, 0.0)])[-1][1]
            elapsed = max(elapsed, total / share if share else 0.0)  # of the callback that measured last
    if elapsed:
        lines.append(f"{'measuring, share of the run':42}{'':>10}{spent / elapsed:>10.1%}")
    pictures = list((folder / "pictures").rglob("step=*.png"))
    if pictures:  # the latest; of several the one that shows most at a glance
        lines.append(f"picture: {max(pictures, key=lambda path: (path.name, 'reconstructions' in path.parts))}")
    lines.append(f"run: {folder}")
    return "\n".join(lines)
