"""What is done when a loss or a gradient is NaN or infinite."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from masklr.callbacks.recording import run_folder, undisturbed

log = logging.getLogger(__name__)


class NonFinite(pl.Callback):
    """End the run at the first loss or gradient that is NaN or infinite, or skip some such steps.

    Says at which step it was, which layer's output (or which parameter's gradient) was the first not to be finite, and
    in which samples of the training split; keeps the batch, with the seed of its masks, in
    `nonfinite/step=00000100.pt`. To find the layer, the batch is run once more. The gradient of such a step counts as
    zero, so weights stay finite, and so does every checkpoint. Logs `nonfinite/skipped`, the steps skipped so far.

    On the CPU every step is looked at when it is taken. On other devices the host does not wait for a step: its
    gradient is set to zero there, the first such batch is kept there, and the host looks every so many steps. The batch
    is then run again with the weights of that later step, at which the numbers may be finite.

    Steps that a loss scaler skips (`16-mixed`) are left to it.

    Args:
        skip: Number of such steps that are skipped, over the whole run, before one ends it.
        every_n_steps: Optimizer steps between looks on devices other than the CPU.

    Raises:
        ValueError: A value outside its range; in training, a loss or gradient that is not finite.
    """

    def __init__(self, skip: int = 0, every_n_steps: int = 50) -> None:
        if skip < 0:
            raise ValueError(f"Expected `skip` of at least 0, got {skip}.")
        if every_n_steps < 1:
            raise ValueError(f"Expected `every_n_steps` of at least 1, got {every_n_steps}.")
        self.skip, self.every_n_steps = skip, every_n_steps
        self.skipped = 0

    def state_dict(self) -> dict[str, Any]:
        """How many steps were skipped."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped = state_dict["skipped"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder, which takes all processes."""
        self.folder = run_folder(trainer) / "nonfinite"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing was seen yet."""
        self._on_cpu = pl_module.device.type == "cpu"
        self._scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._loss: Tensor | None = None
        self._batch: Any = None
        self._bad: Tensor | None = None  # in this step
        self._steps: Tensor | None = None  # since the last look
        self._first: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, idx: int) -> None:
        """Keep hold of the batch."""
        self._batch, self._index = batch, idx

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep hold of the loss."""
        self._loss = loss.detach()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See whether loss and gradients are finite, on their device."""
        if self._scaled or self._loss is None:
            return
        bad = ~finite([self._loss, *gradients(pl_module)])
        self._loss = None
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce(bad.int(), reduce_op="max").bool()
        self._bad = bad if self._bad is None else self._bad | bad
        if self._on_cpu:
            if bad:
                self._first = self._first or self._place(trainer, self._batch, torch.tensor(trainer.global_step))
        else:
            self._keep_on_device(trainer, bad)

    def _place(self, trainer: pl.Trainer, batch: Any, step: Tensor) -> dict[str, Any]:
        # StepSeed has seeded the generator for this batch.
        index, seed = torch.tensor(self._index), torch.tensor(torch.initial_seed())
        return {"batch": batch, "step": step, "index": index, "seed": seed}

    def _keep_on_device(self, trainer: pl.Trainer, bad: Tensor) -> None:
        now = self._place(trainer, self._batch, torch.tensor(trainer.global_step))
        now = trainer.strategy.batch_to_device({**now, "bad": bad}, dataloader_idx=0)
        if not self._first:
            self._first = now
            return
        keep = self._first["bad"] | ~bad  # the first one is kept
        self._first = chosen(keep, self._first, now)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the step with a gradient of zero if there is a value in it that is not finite."""
        if self._bad is None:
            return
        if not self._on_cpu or self._bad:
            for gradient in gradients(pl_module):
                gradient.masked_fill_(self._bad, 0.0)
        self._steps = self._bad.int() if self._steps is None else self._steps + self._bad
        self._bad = None
        if self._on_cpu or (trainer.global_step + 1) % self.every_n_steps == 0:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the last steps."""
        self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        count = 0 if self._steps is None else int(self._steps)
        self._steps = None
        if count == 0:
            if not self._on_cpu:
                self._first = {}
            return
        self.skipped += count
        first, self._first = self._first, {}
        sentence = self._report(trainer, pl_module, first)
        if self.skipped > self.skip:
            raise ValueError(sentence)
        log.warning("Skipped %d of at most %d steps. %s", self.skipped, self.skip, sentence)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics({"nonfinite/skipped": float(self.skipped)}, step=trainer.global_step)

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule, first: dict[str, Any]) -> str:
        """Find out what happened and keep the batch; returns both in a sentence."""
        step, batch = int(first["step"]), first["batch"]
        place, rows = first_nonfinite(pl_module, batch, int(first["index"]), int(first["seed"]))
        samples = positions(batch)
        if samples is not None and rows is not None:
            samples = samples[rows.to(samples.device)]
        rank = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = self.folder / f"step={step:08d}{rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"batch": batch, "step": step, "seed": int(first["seed"]), "place": place}, path)
        where = "" if samples is None else f", in {listed(samples.tolist())} of the training split"
        return (
            f"Expected a finite loss and gradient, got NaN or infinity at step {step}: {place}{where}; batch: {path}."
        )


def first_nonfinite(module: pl.LightningModule, batch: Any, index: int, seed: int) -> tuple[str, Tensor | None]:
    """Where values that are not finite come from, found by running a training step once more.

    Args:
        module: The task; its gradients, generators and metrics stay as they are.
        batch: The batch.
        index: Number of the batch in its epoch.
        seed: Seed of the step's masks.

    Returns:
        The place in words, and which rows of the batch have such values there, if that can be told.
    """
    for name, parameter in module.named_parameters():
        if not finite([parameter.detach()]):
            return f"the weights {name!r}", None
    found: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Any:
        def look(layer: nn.Module, inputs: Any, output: Any) -> None:
            bad = [t for t in tensors(output) if not finite([t])]
            if bad and not found:
                kind = "the input" if any(not finite([t]) for t in tensors(inputs)) else "the output"
                found.append((f"{kind} of {name!r}", bad[0]))

        return look

    with undisturbed(module), silent(module), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        handles = [layer.register_forward_hook(hook(name)) for name, layer in module.named_modules() if name]
        try:
            torch.manual_seed(seed)
            takes_index = len(signature(module.training_step).parameters) > 1
            output: Any = module.training_step(batch, index) if takes_index else module.training_step(batch)
        finally:
            for handle in handles:
                handle.remove()
        loss = output["loss"] if isinstance(output, dict) else output
        if found:
            return found[0][0], rows_of(found[0][1], batch)
        if not finite([loss.detach()]):
            return "the loss, with every layer's output finite", None
        named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        values = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        bad = [name for name, value in zip(named, values, strict=True) if value is not None and not finite([value])]
    if bad:
        others = f" and {len(bad) - 1} others" if len(bad) > 1 else ""
        return f"the gradient of {bad[-1]!r}{others}, with a finite loss", None
    return "it does not happen again when the batch is run once more", None


@contextmanager
def silent(module: pl.LightningModule) -> Iterator[None]:
    """Whatever the module logs is dropped."""
    names = ("log", "log_dict")
    for name in names:
        module.__dict__[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name in names:
            module.__dict__.pop(name, None)


def gradients(module: nn.Module) -> list[Tensor]:
    """Gradients of a module's parameters; of sharded ones, the part of this process."""
    found = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return [gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in found]


def finite(values: list[Tensor]) -> Tensor:
    """Whether all values of some floating-point tensors are finite, as a tensor on their device.

    Example:
        >>> finite([torch.ones(2), torch.tensor([1.0, float("nan")])])
        tensor(False)
    """
    chosen = [value for value in values if value.is_floating_point() and value.numel()]
    if not chosen:
        return torch.tensor(True)
    largest = torch._foreach_norm(chosen, float("inf"))  # NaN stays NaN, and no square overflows
    return torch.stack([norm.float() for norm in largest]).isfinite().all()


def chosen(first: Tensor, a: Any, b: Any) -> Any:
    """Nested values of `a` where a condition on the device holds, else of `b`, without waiting for the device."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.where(first, a, b) if a.shape == b.shape else a
    if isinstance(a, dict):
        return {key: chosen(first, a[key], b[key]) for key in a}
    if isinstance(a, list | tuple):
        return type(a)(chosen(first, x, y) for x, y in zip(a, b, strict=True))
    return a


def tensors(value: Any) -> list[Tensor]:
    """Tensors in a layer's inputs or output."""
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in tensors(part)]
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, list | tuple) else []


def positions(batch: Any) -> Tensor | None:
    """Positions of a batch's samples in their split, if it has them as masklr's batches do."""
    if isinstance(batch, list | tuple) and len(batch) > 2 and isinstance(batch[2], Tensor) and batch[2].ndim == 1:
        return batch[2]
    return None


def rows_of(output: Tensor, batch: Any) -> Tensor | None:
    """Rows of a layer's output that are not finite, if it has one row for each sample."""
    samples = positions(batch)
    if samples is None or output.ndim == 0 or len(output) != len(samples):
        return None
    return (~output.flatten(1).isfinite().all(1)).nonzero().flatten() if output.ndim > 1 else None


def listed(numbers: list[int]) -> str:
    """Numbers of samples, the first ten of them.

    Example:
        >>> listed([3]), listed([3, 5])
        ('sample 3', 'samples 3, 5')
    """
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return f"sample{'s' if len(numbers) != 1 else ''} {', '.join(map(str, numbers[:10]))}{more}"
