"""How much is masked, as a function of the progress of training."""

import math
from typing import Any, Literal

import pytorch_lightning as pl

from masklr.callbacks.features import plain, submodule
from masklr.layers import masking
from masklr.masks import num_masked
from masklr.names import matching


class MaskSchedule(pl.Callback):
    """Move the drop probability of masks, or the mask ratio of a masked autoencoder, while training goes on.

    The value is `start` up to the share `begin` of all optimizer steps, then moves to `end`, which it reaches at the
    share `until` and keeps. `begin == until` is a jump: `start=0.1, end=0.0, begin=0.2, until=0.2` is early dropout
    (Liu et al., "Dropout reduces underfitting", ICML 2023). It depends on the number of the step alone, so a resumed
    run goes on with the same values. The mask ratio of validation stays the one that the model was built with.

    Logged: `mask_schedule/p` or `mask_schedule/mask_ratio`, the value with which each step was taken.

    Args:
        start: Value at the beginning.
        end: Value at the end.
        begin: Share of training, in [0, 1], at which the value begins to move.
        until: Share of training, from `begin` to 1, at which it arrives.
        shape: How it moves: on a line, or on half a cosine.
        what: `p`, the drop probability of masks, in [0, 1), or `mask_ratio`, in (0, 1).
        module: Dotted path of the part of the LightningModule that is scheduled; for `mask_ratio` usually `model`.
        include: For `p`, patterns of the masks below `module` (`*` does not cross a dot, `**` does); all if None.

    Raises:
        ValueError: A value outside its range; a part without masks or without a mask ratio; a pattern that matches
            nothing; a run whose number of steps is not known.
    """

    def __init__(
        self,
        start: float,
        end: float,
        begin: float = 0.0,
        until: float = 1.0,
        shape: Literal["linear", "cosine"] = "linear",
        what: Literal["p", "mask_ratio"] = "p",
        module: str = "",
        include: list[str] | None = None,
    ) -> None:
        if what not in ("p", "mask_ratio"):
            raise ValueError(f"Expected `what` to be p or mask_ratio, got {what!r}.")
        if shape not in ("linear", "cosine"):
            raise ValueError(f"Expected `shape` to be linear or cosine, got {shape!r}.")
        for name, value in (("start", start), ("end", end)):
            if not 0 <= value < 1 or (what == "mask_ratio" and value == 0):
                raise ValueError(f"Expected `{name}` in {'[' if what == 'p' else '('}0, 1), got {value}.")
        if not 0 <= begin <= until <= 1:
            raise ValueError(f"Expected `begin` and `until` with 0 <= begin <= until <= 1, got {begin} and {until}.")
        if what == "mask_ratio" and include is not None:
            raise ValueError("Expected no `include` for mask_ratio, which belongs to the part named by `module`.")
        self.start, self.end, self.begin, self.until = start, end, begin, until
        self.shape, self.what, self.module, self.include = shape, what, module, include
        self._targets: list[Any] = []
        self._total_steps = math.inf

    @property
    def state_key(self) -> str:
        """Differs between two such callbacks in one trainer."""
        return f"{type(self).__name__}({self.what}, {self.module!r}, {self.include})"

    def value(self, progress: float) -> float:
        """The value at a share of training, in [0, 1].

        Example:
            >>> MaskSchedule(start=0.0, end=0.8, begin=0.5).value(0.75)
            0.4
        """
        if progress < self.begin:
            return self.start
        if progress >= self.until:
            return self.end
        share = (progress - self.begin) / (self.until - self.begin)
        if self.shape == "cosine":
            share = 0.5 * (1 - math.cos(math.pi * share))
        return self.start + (self.end - self.start) * share

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find what is scheduled, so that a wrong name ends the run before it begins."""
        if stage != "fit":
            return
        part = submodule(pl_module, self.module)
        if self.what == "mask_ratio":
            if not isinstance(getattr(part, "mask_ratio", None), float):
                kind = type(part).__name__
                raise ValueError(f"Expected `module` to be a part with a mask ratio, got {self.module!r}, a {kind}.")
            if getattr(part, "strategy", None) == "grid" and self.start != self.end:
                raise ValueError("Expected a strategy other than grid, which has few possible mask ratios.")
            if (grid := getattr(part, "grid", None)) is not None:
                for ratio in (self.start, self.end):
                    num_masked(grid[0] * grid[1], ratio)  # raises where nothing would be left
            self._targets = [part]
            return
        masks = {plain(name): mask for name, mask in masking(part).items()}
        if not masks:
            raise ValueError(f"Expected masks to schedule in {self.module or type(part).__name__!r}, found none.")
        self._targets = [masks[name] for name in matching(masks, self.include or ["**"], "include")]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Learn how long training is."""
        self._total_steps = float(trainer.estimated_stepping_batches)
        if math.isinf(self._total_steps):
            raise ValueError(
                "Expected `max_steps` or `max_epochs` of the trainer to be set: the schedule needs the run's length."
            )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, idx: int) -> None:
        """Set the value of this step."""
        value = self.value(trainer.global_step / self._total_steps)
        for target in self._targets:
            setattr(target, self.what, value)
        pl_module.log(f"mask_schedule/{self.what}", value)
