"""A loss term against dimensional collapse."""

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch import distributed as dist


def uniformity(features: Float[Tensor, "n d"], temperature: float = 0.1) -> Float32[Tensor, ""]:
    r"""Mean squared cosine of all pairs of features, each with itself included, over the squared temperature.

    .. math:: \frac{1}{n^2 \tau^2} \sum_{i, j} \Bigl(\frac{f_i^T f_j}{\|f_i\| \|f_j\|}\Bigr)^2

    Features of one direction give 1 / temperature^2, features spread evenly over k orthonormal axes 1 / k of that;
    n features give at least 1 / min(n, d) of it. Scale and rotation of the features do not matter.

    Args:
        features: One sample a row.
        temperature: Tau, above 0.

    Returns:
        A scalar, computed in float32.

    Example:
        >>> round(uniformity(torch.eye(4).repeat(3, 1)).item(), 4)
        25.0

    Reference:
        Zhang, Wang and Wang, "How mask matters: towards theoretical understandings of masked autoencoders", NeurIPS
        2022 (U-MAE).
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = torch.nn.functional.normalize(features.float(), dim=1)
        # Both Gram matrices have the same Frobenius norm: take the smaller.
        gram = unit @ unit.T if len(unit) < unit.shape[1] else unit.T @ unit
        return gram.square().sum() / (len(unit) * temperature) ** 2


def of_all_processes(features: Float[Tensor, "n d"]) -> Float[Tensor, "all_n d"]:
    """Features of the images of all processes, with gradients: a loss over pairs of images is about the whole batch.

    Where gradients are averaged over processes, as in data-parallel training, those of a loss computed from what this
    returns are the gradients that one process would find.

    Args:
        features: One sample a row; as many on each process.

    Returns:
        The same where there is one process.

    Example:
        >>> of_all_processes(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return features
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(features))
