"""Regression with squared loss, the loss that theory is about."""

from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric

from masklr.layers import LayerFactory, insert
from masklr.optim import Optim
from masklr.tasks.mask_penalty import MaskPenalty, closed_form_problem, masked_inputs_loss
from masklr.tasks.split_metrics import begin_split, log_split


class Regression(pl.LightningModule):
    """Fit targets by squared error, with masks drawn in every step or with the penalty that they induce.

    The loss is the sum over outputs of squared errors, averaged over samples. Batches are `(x, y, ...)`, as
    `masklr.data.Synthetic` gives them. `forward` is the evaluation path: outputs without masks.

    Logged: `train/loss`; `val/loss`, of all outputs without masks; and beside it, for a `DeepLinear` on data that state
        their `second_moment`, `val/objective`: the expectation over masks of the training loss, by theory (exact, where
        the validation split has that second moment, as Synthetic's has).

    Args:
        model: Any module that maps x to y; a `DeepLinear` for the closed form and for masked inputs.
        optim: Optimizer and schedule.
        masks: Masks or low-rank layers to put into the model: factories of `masklr.layers` by patterns of names in
            `model.named_modules()`, such as `layers.0` (`*` does not cross a dot, `**` does).
        penalty: `sampled`: masks are drawn. `closed_form`: none are; the penalty that they induce in expectation is
            added to the loss instead, for the second moment of the inputs that the data module states. It is computed
            in float64 and added in the precision of the loss.
        loss_on: `all` outputs, or only those whose input was `masked`, for a model that predicts its own inputs.

    Raises:
        ValueError: A closed form for a model or masks that have none; `masked` for a model without an input mask.

    Reference:
        Mianjy, Arora and Vidal, "On the implicit bias of dropout", ICML 2018; Wei, Kakade and Ma, "The implicit and
        explicit regularization effects of dropout", ICML 2020 (sampled or in closed form).
    """

    def __init__(
        self,
        model: nn.Module,
        optim: Optim = Optim(),  # noqa: B008 (frozen)
        masks: dict[str, LayerFactory] | None = None,
        penalty: Literal["sampled", "closed_form"] = "sampled",
        loss_on: Literal["all", "masked"] = "all",
    ) -> None:
        super().__init__()
        if penalty not in ("sampled", "closed_form"):
            raise ValueError(f"Expected `penalty` sampled or closed_form, got {penalty!r}.")
        if loss_on not in ("all", "masked"):
            raise ValueError(f"Expected `loss_on` all or masked, got {loss_on!r}.")
        if penalty == "closed_form" and loss_on == "masked":
            raise ValueError("Expected `penalty` sampled beside `loss_on` masked, got closed_form.")
        self._problem = "`masks` put into the model" if masks else closed_form_problem(model, loss_on)
        if penalty == "closed_form" and self._problem:
            raise ValueError(f"Expected `penalty` sampled, since there is no closed form for {self._problem}.")
        if loss_on == "masked":
            _check_masked_inputs(model)
        insert(model, masks or {})
        self.model: Any = model
        self.optim, self.penalty, self.loss_on = optim, penalty, loss_on
        self.metrics: Any = nn.ModuleDict({name: MeanMetric() for name in ("loss", "objective")})
        self._mask_penalty: MaskPenalty | None = None
        self._expected: Tensor | None = None  # by theory, at the weights that are evaluated

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (B, m) of inputs (B, n), unmasked in evaluation mode."""
        return self.model(x)

    def on_fit_start(self) -> None:
        """Take the second moment of the inputs from the data module, once."""
        data: Any = getattr(self.trainer, "datamodule", None)
        stated = getattr(data, "second_moment", None) is not None
        if self.penalty == "closed_form" and not stated:
            raise ValueError("Expected data with a `second_moment` for `penalty` closed_form, such as Synthetic.")
        if self.loss_on == "masked" and stated and not predicts_inputs(data):
            raise ValueError(
                "Expected data whose targets are its inputs for `loss_on` masked (Synthetic: `autoencode`)."
            )
        if stated and self._problem is None:
            if len(data.second_moment) != self.model.sizes[0]:
                raise ValueError(
                    f"Expected `sizes` to begin with the number of inputs of the data, {len(data.second_moment)}, got "
                    f"{self.model.sizes[0]}."
                )
            self._mask_penalty = MaskPenalty(self.model, data.second_moment.to(self.device))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss with masks drawn anew, or without masks and with their penalty."""
        x, y = batch[:2]
        if self.loss_on == "masked":
            keep = self.model.draw_input_keep(len(x), device=x.device)
            loss = squared_error(self.model(x, keep), y, ~keep)
        elif self.penalty == "closed_form":
            assert self._mask_penalty is not None
            loss = squared_error(nn.functional.linear(x, self.model.product()), y)
            loss = loss + self._mask_penalty(self.model).to(loss)
        else:
            loss = squared_error(self.model(x), y)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """What theory says of the weights that are evaluated."""
        begin_split(self.metrics)
        if self.trainer.state.fn != "fit":
            self.on_fit_start()
        if self._mask_penalty is not None:
            masked = self.loss_on == "masked"
            C = self._mask_penalty.second_moment
            self._expected = masked_inputs_loss(self.model, C) if masked else self._mask_penalty(self.model)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The loss without masks, and the objective."""
        x, y = batch[:2]
        loss = squared_error(self(x), y)
        self.metrics["loss"].update(loss, weight=len(x))
        if self._expected is not None:
            objective = self._expected if self.loss_on == "masked" else loss + self._expected
            self.metrics["objective"].update(objective, weight=len(x))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the mean over the whole split, over all processes."""
        self._log("val")

    def on_test_epoch_end(self) -> None:
        """Log the mean over the whole split, over all processes."""
        self._log("test")

    def _log(self, split: str) -> None:
        names = ("loss",) if self._expected is None else ("loss", "objective")
        log_split(self, split, {name: self.metrics[name] for name in names})

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Outputs (B, m), with the targets and positions that the batch has."""
        return {"outputs": self(batch[0]), **dict(zip(("targets", "positions"), batch[1:], strict=False))}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer and its schedule."""
        return self.optim.configure(self, self.trainer)


def squared_error(outputs: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
    """Sum over outputs of squared errors, of those that count, averaged over samples.

    Args:
        outputs: What is predicted, (B, m).
        targets: What should be, (B, m).
        counted: Which errors count, bool (B, m); all if None.

    Raises:
        ValueError: Shapes that differ, which would broadcast.

    Example:
        >>> squared_error(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
        tensor(5.)
    """
    if outputs.shape != targets.shape:
        raise ValueError(f"Expected outputs of the targets' shape {tuple(targets.shape)}, got {tuple(outputs.shape)}.")
    squares = (outputs - targets).square()
    return (squares if counted is None else squares * counted).sum() / len(targets)


def predicts_inputs(data: Any) -> bool:
    """Whether nothing that a data module states (`target_matrix`, `irreducible`) says that targets are not inputs."""
    target = getattr(data, "target_matrix", None)
    identical = target is None or target.equal(torch.eye(*target.shape).to(target))
    return identical and not getattr(data, "irreducible", 0.0)


def _check_masked_inputs(model: nn.Module) -> None:
    if getattr(model, "input_mask", "none") == "none":
        raise ValueError("Expected a `model` with an `input_mask` for `loss_on` masked.")
    inputs, *_, outputs = model.sizes  # type: ignore[misc]
    if inputs != outputs:
        raise ValueError(
            f"Expected a `model` with as many outputs as inputs, {inputs}, for `loss_on` masked, got {outputs}."
        )
