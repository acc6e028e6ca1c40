"""The penalty that masks induce in any network: predicted from curvature, and measured with real masks.

For masks of mean one the expected loss is the loss without masks plus a penalty. To second order it is

    penalty = p / (2 (1 - p)) * sum_j E[h_j^2 d^2 loss / d h_j^2]

over what the masks multiply: activations h, or weights. `gauss_newton` takes the Gauss-Newton part of the curvature,
which one backward pass gives for all sites; `full_curvature` all of it. Where the network is linear in what is masked
and the loss is squared, the second order is all there is and both parts agree: `closed_form` is then exact.

Where the approximations fail. All of them keep the second order alone: at p = 0.1 they miss 5 to 10 % of an MLP's
penalty. Gauss-Newton leaves out the curvature of the network itself. That is little in an MLP, but attention, layer
norms and GELU carry much of that of a transformer: Gauss-Newton sees about half of its penalty, full curvature about
95 %. What is left out does not vanish with p: a mask drops whole units; its third moment is as large as its variance.
A transformer under a high constant learning rate can be so sharp that full curvature sees 75 %: compare `measured`.

References:
    Wei, Kakade and Ma, "The implicit and explicit regularization effects of dropout", ICML 2020; Wager, Wang and Liang,
    "Dropout training as adaptive regularization", NeurIPS 2013; Hutchinson, "A stochastic estimator of the trace of the
    influence matrix", 1990 (Rademacher probes).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from masklr.callbacks.mask_sites import Captured, Site, hooked, masks_on, multiplied

Loss = Literal["cross_entropy", "squared"]
Batch = tuple[Tensor, Tensor]

# Draws before the first look at how far they spread.
FIRST_DRAWS = 8


class Estimate(NamedTuple):
    """A mean, half the width of its 95 % interval, and the number of draws behind it."""

    mean: float
    halfwidth: float
    draws: int


class Penalties:
    """What the masks of a model add to its loss on some samples.

    The model must be in evaluation mode. Everything is computed in the parameters' own precision: the penalty is a
    small difference of losses, which bf16 would drown.

    Args:
        forward: Inputs (B, ...) to outputs (B, K), the evaluation path of the model.
        batches: Inputs and targets: class indices (B,), or for the squared loss values (B, K).
        loss: `cross_entropy`, or `squared`: the sum over outputs. Both are averaged over samples.
        label_smoothing: Of the cross-entropy, in [0, 1).

    Raises:
        ValueError: Outputs that are not (B, K), or targets that do not fit.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        batches: Sequence[Batch],
        loss: Loss = "cross_entropy",
        label_smoothing: float = 0.0,
    ) -> None:
        self._forward, self.batches, self.loss, self.label_smoothing = forward, batches, loss, label_smoothing
        self.num_samples = sum(len(inputs) for inputs, _ in batches)
        with torch.no_grad():
            self._dtype = self._outputs(batches[0][0][:1]).dtype
            self.without_masks = self._mean_loss()

    def closed_form(self, sites: Sequence[Site]) -> float | None:
        """The exact penalty of masks that the outputs are linear in, under squared loss; None where they are not."""
        if self.loss != "squared" or any(site.kind == "unseen" for site in sites) or not self._linear(sites):
            return None
        return sum(self._second_order(sites, exact=True).values())

    def gauss_newton(self, sites: Sequence[Site], draws: int = 1) -> dict[str, float]:
        """Penalty of each site by the Gauss-Newton part of the curvature, for all sites in `draws` backward passes.

        Targets are drawn from the model's own output (squared loss: from N(f, I / 2)), which makes the squared
        gradients unbiased; with `draws` of 0 the expectation over targets is taken exactly, in K backward passes.
        Sites that only training mode shows have none.
        """
        seen = [site for site in sites if site.kind != "unseen"]
        return self._second_order(seen, exact=draws == 0, draws=draws) if seen else {}

    def full_curvature(self, sites: Sequence[Site], probes: int = 16) -> Estimate:
        """Penalty of some sites together to second order, by Rademacher probes v: double backward through the scalar e.

        The second derivative of the loss at e = 0, for masks 1 + e sqrt(p / (1 - p)) v, has the mean that is wanted.
        """
        if unseen := [site.name for site in sites if site.kind == "unseen"]:
            raise ValueError(f"Expected sites whose masks multiply something outside fused kernels, got {unseen[0]!r}.")
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            return _summary([self._curvature(sites) for _ in range(probes)])

    def symmetric_pairs(self, sites: Sequence[Site], relative_error: float = 0.05, max_draws: int = 100) -> Estimate:
        """Penalty of some sites together, by pairs of masks 1 + sqrt(p / (1 - p)) v and 1 - sqrt(p / (1 - p)) v.

        They have the mean and the variance of the real masks, and what is odd in them cancels within a pair: the same
        error as of real masks comes with about a quarter of the draws. Third and higher moments are not the real ones.
        """

        def pair() -> float:
            probe = Probe()
            losses = []
            for sign in (1.0, -1.0):
                with multiplied(sites, probe.along(sign)):
                    losses.append(self._mean_loss())
            return sum(losses) / 2 - self.without_masks

        with torch.no_grad():
            return estimate(pair, relative_error, max_draws)

    def measured(self, sites: Sequence[Site], relative_error: float = 0.05, max_draws: int = 100) -> Estimate:
        """Mean over real masks of the loss, less the loss without masks.

        Args:
            sites: Whose masks are on.
            relative_error: Draws go on until half the width of the 95 % interval is at most this share of the mean.
            max_draws: Or until there were so many.
        """
        with torch.no_grad(), masks_on(sites):
            return estimate(lambda: self._mean_loss() - self.without_masks, relative_error, max_draws)

    def _mean_loss(self) -> float:
        total = sum(self._losses(self._outputs(inputs), targets).double().sum() for inputs, targets in self.batches)
        return float(total) / self.num_samples

    def _outputs(self, inputs: Tensor) -> Tensor:
        outputs = self._forward(inputs)
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            kind = f"of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(f"Expected `forward` to give outputs (B, K) for the penalty, got {kind}.")
        return outputs

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each sample, (B,)."""
        if self.loss == "squared":
            if outputs.shape != targets.shape:
                raise ValueError(
                    f"Expected targets of the outputs' shape {tuple(outputs.shape)}, got {tuple(targets.shape)}."
                )
            return (outputs - targets).square().sum(1)
        return nn.functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=self.label_smoothing)

    def _second_order(self, sites: Sequence[Site], exact: bool, draws: int = 1) -> dict[str, float]:
        """The half variance times E[(g h)^2] of each site, over the model's own outputs."""
        sums = {site.name: torch.zeros((), dtype=torch.float64) for site in sites}
        for inputs, _ in self.batches:
            captured = Captured(len(inputs))
            with torch.enable_grad(), hooked(sites, captured.hook):
                outputs = self._outputs(inputs)
                silent = sums.keys() - captured.squared_sums([None] * len(captured.tensors)).keys()
                if silent:
                    raise ValueError(f"Expected every masked layer to run in `forward`, but {min(silent)!r} did not.")
                for scalar in self._scalars(outputs, exact, draws):
                    gradients = torch.autograd.grad(scalar, captured.tensors, retain_graph=True, allow_unused=True)
                    for name, found in captured.squared_sums(gradients).items():
                        sums[name] += found.cpu()
        scale = 1 if exact else 1 / draws
        return {site.name: site.variance / 2 * scale * float(sums[site.name]) / self.num_samples for site in sites}

    def _scalars(self, outputs: Tensor, exact: bool, draws: int) -> Iterator[Tensor]:
        """Losses whose gradients g have E[g g^T] (exact: the sum of g g^T) equal to the Gauss-Newton matrix."""
        fixed = outputs.detach()
        if self.loss == "squared":
            for k in range(outputs.shape[1] if exact else draws):
                if exact:
                    yield outputs[:, k].sum() * 2**0.5
                else:
                    yield (outputs - fixed - torch.randn_like(fixed) * 0.5**0.5).square().sum()
            return
        probabilities = fixed.softmax(1)
        for k in range(outputs.shape[1] if exact else draws):
            if exact:
                losses = -outputs.log_softmax(1)[:, k]
                yield (losses * probabilities[:, k].sqrt()).sum()
            else:
                labels = torch.multinomial(probabilities.float(), 1).squeeze(1)
                yield nn.functional.cross_entropy(outputs, labels, reduction="sum")

    def _curvature(self, sites: Sequence[Site]) -> float:
        """Half the second derivative along one probe."""
        total = 0.0
        shared: dict[str, Tensor] = {}  # a mask of weights is one for all samples, and so is its probe
        for inputs, targets in self.batches:
            along = torch.zeros((), dtype=self._dtype, device=inputs.device, requires_grad=True)

            def draw(site: Site, shape: tuple[int, ...], like: Tensor, along: Tensor = along) -> Tensor:
                if site.kind != "weights":
                    return 1 + along * site.variance**0.5 * _rademacher(shape, like)
                if site.name not in shared:
                    shared[site.name] = _rademacher(shape, like)
                return 1 + along * site.variance**0.5 * shared[site.name]

            with multiplied(sites, draw):
                loss = self._losses(self._outputs(inputs), targets).sum()
            (first,) = torch.autograd.grad(loss, along, create_graph=True)
            if first.requires_grad:
                (second,) = torch.autograd.grad(first, along, allow_unused=True)
                total += 0.0 if second is None else float(second)
        return total / 2 / self.num_samples

    def _linear(self, sites: Sequence[Site]) -> bool:
        """Whether the outputs are linear in what the sites mask, all together."""
        inputs, probe = self.batches[0][0][:16], Probe()
        with torch.no_grad():
            middle = self._outputs(inputs)
            with multiplied(sites, probe.along(0.5)):
                ahead = self._outputs(inputs)
            with multiplied(sites, probe.along(-0.5)):
                back = self._outputs(inputs)
        error = (ahead + back - 2 * middle).abs().max()
        return bool(error <= 1e3 * torch.finfo(middle.dtype).eps * (ahead.abs().max() + back.abs().max()))


class Probe:
    """Random signs for every draw of every site, which a second pass in the opposite direction meets again."""

    def __init__(self) -> None:
        self._signs: list[Tensor] = []

    def along(self, step: float) -> Callable[[Site, tuple[int, ...], Tensor], Tensor]:
        """What gives masks 1 + step * sqrt(p / (1 - p)) * v, the same v in every pass."""
        position = 0

        def draw(site: Site, shape: tuple[int, ...], like: Tensor) -> Tensor:
            nonlocal position
            if position == len(self._signs):
                self._signs.append(_rademacher(shape, like))
            position += 1
            return 1 + step * site.variance**0.5 * self._signs[position - 1]

        return draw


def estimate(draw: Callable[[], float], relative_error: float, max_draws: int) -> Estimate:
    """Mean of draws, as many as a relative error needs.

    Args:
        draw: Gives one draw.
        relative_error: Half the width of the 95 % interval, as a share of the mean, at which to stop; above 0.
        max_draws: Draws at most.
    """
    values: list[float] = []
    wanted = min(FIRST_DRAWS, max_draws)
    while True:
        values += [draw() for _ in range(wanted - len(values))]
        found = _summary(values)
        if len(values) >= max_draws or found.halfwidth <= relative_error * abs(found.mean):
            return found
        # As many as the variance so far asks for, at most twice as many at a time.
        ratio = (found.halfwidth / max(relative_error * abs(found.mean), 1e-300)) ** 2
        wanted = min(max_draws, int(len(values) * min(2.0, 1.05 * ratio)) + 1)


def _summary(values: Sequence[float]) -> Estimate:
    from scipy.stats import t

    draws = torch.tensor(values, dtype=torch.float64)
    mean = float(draws.mean())
    if len(values) < 2:
        return Estimate(mean, float("inf"), len(values))
    halfwidth = float(t.ppf(0.975, len(values) - 1)) * float(draws.std()) / len(values) ** 0.5
    return Estimate(mean, halfwidth, len(values))


def _rademacher(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.randint(0, 2, shape, device=like.device).to(like.dtype) * 2 - 1
