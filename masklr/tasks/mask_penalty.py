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


def closed_form_problem(model: nn.Module) -> str | None:
    """Why there is no closed form for a model's masks, as the end of a sentence; None if there is one."""
    linear: Any = model
    if not hasattr(model, "input_mask_covariance"):
        return f"a {type(model).__name__} (only for a DeepLinear)"
    if linear.mask == "groups" and len(linear.weights) > 2:
        return f"`mask` groups on {len(linear.weights) - 1} hidden layers (only on one)"
    return None
