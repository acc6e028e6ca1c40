"""Classification by nearest neighbors, without anything to fit."""

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torch.nn.functional import normalize


def neighbor_classes(
    features: Float[Tensor, "n d"],
    known: Float[Tensor, "m d"],
    labels: Int[Tensor, " m"],
    num_neighbors: int = 20,
    temperature: float = 0.07,
) -> Int64[Tensor, " n"]:
    r"""Class of each sample by the votes of its nearest neighbors, weighted by their similarity.

    .. math:: \arg\max_c \sum_{i \in N_k(x),\, y_i = c} \exp\bigl(\cos(x, x_i) / \tau\bigr)

    Neighbors are those of the largest cosine, so the scale of a feature vector does not matter. Of classes with equal
    votes the lowest wins.

    Args:
        features: Samples to classify, one a row.
        known: Samples whose classes are known.
        labels: Their classes, from 0.
        num_neighbors: Neighbors that vote, k, at least 1; all samples where there are fewer.
        temperature: Tau, above 0.

    Returns:
        Classes, from 0.

    Raises:
        ValueError: `num_neighbors` is below 1, `temperature` not above 0, or no class is known.

    Example:
        >>> known = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> neighbor_classes(torch.tensor([[2.0, 0.1], [0.0, 5.0]]), known, torch.tensor([1, 1, 0]), num_neighbors=1)
        tensor([1, 0])

    Reference:
        Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018; Caron et al.,
        "Emerging properties in self-supervised vision transformers", ICCV 2021 (k = 20).
    """
    if num_neighbors < 1:
        raise ValueError(f"Expected `num_neighbors` of at least 1, got {num_neighbors}.")
    if not temperature > 0:
        raise ValueError(f"Expected `temperature` above 0, got {temperature}.")
    if not len(known):
        raise ValueError("Expected `known` samples, got none.")
    cosines = normalize(features.float(), dim=1) @ normalize(known.float(), dim=1).T
    nearest, index = cosines.topk(min(num_neighbors, len(known)), dim=1)
    # The nearest votes with one: exp(1 / tau) alone is 1.6e6, and a small tau would overflow.
    votes = torch.exp((nearest - nearest[:, :1]) / temperature)
    neighbors = labels.long()[index]
    of_class = votes.new_zeros(len(features), int(labels.max()) + 1)
    return of_class.scatter_add_(1, neighbors, votes).argmax(1)
