"""What the masks of a linear model add to its expected loss, by theory."""

from typing import Any

import torch
from torch import Tensor, nn

from masklr.theory import covariance_penalty, deep_dropout_penalty, dropblock_penalty, dropconnect_penalty


class MaskPenalty:
    """Expectation over masks of a `DeepLinear`'s squared loss, minus the loss without masks; exact, in float64.

    The masked inputs have the second moment C + K * C, with K the covariance of their mask; the hidden masks act on
    that. Hidden drop probabilities are read at every call, since a schedule may move them.

    Args:
        model: A `DeepLinear`.
        second_moment: C = E[x x^T] of the unmasked inputs (n, n), where the penalty is computed.
    """

    def __init__(self, model: nn.Module, second_moment: Tensor) -> None:
        linear: Any = model
        self.second_moment = second_moment.double()
        self.input_covariance: Tensor = linear.input_mask_covariance().to(second_moment.device)
        self.masked_second_moment = self.second_moment * (1 + self.input_covariance)
        self._identity = torch.eye(len(second_moment), dtype=torch.float64, device=second_moment.device)

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty at the model's weights, differentiable in them."""
        linear: Any = model
        penalty = _hidden_penalty(linear, self.masked_second_moment)
        if linear.input_mask == "none":
            return penalty
        return penalty + covariance_penalty(
            linear.product().double(), self._identity, self.input_covariance, self.second_moment
        )


def _hidden_penalty(linear: Any, second_moment: Tensor) -> Tensor:
    weights, p = linear.weights, linear.drop_probabilities
    if linear.mask == "dropconnect":
        return dropconnect_penalty(weights, p, second_moment)
    if linear.mask == "groups" and p:
        hidden, output = weights
        return dropblock_penalty(output, hidden.T, p[0], linear.group_size, second_moment)
    return deep_dropout_penalty(weights, p, second_moment)


def closed_form_problem(model: nn.Module, loss_on: str = "all") -> str | None:
    """Why theory does not know the expected loss of a model, as the end of a sentence; None if it does.

    Args:
        model: Any module.
        loss_on: `all` outputs, or those whose input is `masked`.
    """
    linear: Any = model
    if not hasattr(model, "input_mask_covariance"):
        return f"a {type(model).__name__} (only for a DeepLinear)"
    if linear.mask == "groups" and len(linear.weights) > 2:
        return f"`mask` groups on {len(linear.weights) - 1} hidden layers (only on one)"
    if loss_on == "masked" and any(linear.drop_probabilities):
        return "`loss_on` masked together with masks on hidden units or weights"
    return None


def masked_inputs_loss(model: nn.Module, second_moment: Tensor) -> Tensor:
    r"""Expectation of the squared error on masked inputs alone, of a `DeepLinear` that predicts its own inputs.

    .. math:: (1 - \theta) \Bigl(\mathrm{tr}\, C - \frac{2 a}{\theta} \langle W, C \rangle
        + \frac{1}{\theta^2} \langle W (C \circ A), W \rangle\Bigr)

    W is the product without entries inside a patch, which never meet a masked output. Given that an input is masked,
    another patch is kept with probability a, and two others with probability A_ij = a_2, or a if they are the same one:
    theta and theta^2 where patches are masked independently, K / (N - 1) and K (K - 1) / ((N - 1) (N - 2)) where
    exactly K of N are kept.

    Args:
        model: A `DeepLinear` with an input mask and without hidden masks.
        second_moment: C = E[x x^T] of the unmasked inputs (n, n).

    Returns:
        A float64 scalar, summed over inputs, averaged over samples.
    """
    linear: Any = model
    C, theta = second_moment.double(), linear.input_keep_probability
    num_patches = linear.sizes[0] // linear.patch_size
    one, two = theta, theta**2
    if linear.exact_count:
        kept = round(num_patches * theta)
        one = kept / (num_patches - 1)
        two = one * (kept - 1) / max(num_patches - 2, 1)
    patch = torch.arange(len(C), device=C.device) // linear.patch_size
    same = (patch == patch[:, None]).double()
    W = linear.product().double() * (1 - same)
    pairs = C * (one * same + two * (1 - same))
    return (1 - theta) * (C.trace() - 2 * one / theta * (W * C).sum() + ((W @ pairs) * W).sum() / theta**2)
