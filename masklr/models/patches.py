"""Patches of images, and which of them are looked at.

Shape suffixes: B batch, C channels, H W pixels, N patches, K some of them, M masked patches, D width of a token, X
pixels of a patch.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def patchify(images: Shaped[Tensor, "B C H W"], patch_size: tuple[int, int]) -> Shaped[Tensor, "B N X"]:
    """Patches in rows, each in the order (channel, y, x), the order of a patch embedding's weights.

    Args:
        images: Images whose height and width are multiples of the patch's.
        patch_size: Height and width of a patch in pixels.

    Returns:
        Patches, row-major over the image.

    Example:
        >>> patchify(torch.arange(8).view(1, 1, 2, 4), (2, 2))
        tensor([[[0, 1, 4, 5],
                 [2, 3, 6, 7]]])
    """
    B, C, H, W = images.shape
    y, x = patch_size
    return images.view(B, C, H // y, y, W // x, x).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * y * x)


def unpatchify(
    patches: Shaped[Tensor, "B N X"], grid: tuple[int, int], patch_size: tuple[int, int]
) -> Shaped[Tensor, "B C H W"]:
    """Images of patches in rows; the inverse of `patchify`.

    Args:
        patches: Patches, row-major over the image.
        grid: Patches in height and width.
        patch_size: Height and width of a patch in pixels.

    Returns:
        Images.

    Example:
        >>> images = torch.arange(24).view(1, 2, 2, 6)
        >>> torch.equal(unpatchify(patchify(images, (2, 3)), (1, 2), (2, 3)), images)
        True
    """
    B = len(patches)
    (h, w), (y, x) = grid, patch_size
    return patches.view(B, h, w, -1, y, x).permute(0, 3, 1, 4, 2, 5).reshape(B, -1, h * y, w * x)


def rows(tokens_BND: Shaped[Tensor, "B N D"], index_BK: Int[Tensor, "B K"]) -> Shaped[Tensor, "B K D"]:
    """The tokens that each row of an index names.

    Args:
        tokens_BND: Tokens.
        index_BK: For each entry of the batch, indices from 0 to N - 1.

    Returns:
        Tokens in the order of the index.

    Example:
        >>> rows(torch.tensor([[[5], [6], [7]]]), torch.tensor([[2, 0]]))
        tensor([[[7],
                 [5]]])
    """
    return tokens_BND.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, tokens_BND.shape[-1]))


def patch_deviation(centered: Float[Tensor, "B M X"]) -> Float[Tensor, "B M 1"]:
    """Standard deviation of each patch, with the constant of the paper's code so that flat patches stay finite.

    Args:
        centered: Patches in rows, less the mean of each.

    Returns:
        Deviations, at least 0.001.

    Example:
        >>> patch_deviation(torch.tensor([[[1.0, -1.0]]])).flatten()
        tensor([1.4142])
    """
    # Of a norm instead of `Tensor.var`, whose kernel is ten times slower on CPUs.
    variance = torch.linalg.vector_norm(centered, dim=-1, keepdim=True).square() / (centered.shape[-1] - 1)
    return (variance + 1e-6).sqrt()


def num_predicted(num_masked: int, prediction_ratio: float) -> int:
    """Exact number of masked patches that are predicted: `round(num_masked * prediction_ratio)`.

    Args:
        num_masked: Masked patches of an image, M.
        prediction_ratio: Share of them, in (0, 1].

    Returns:
        A count from 1 to M.

    Raises:
        ValueError: `prediction_ratio` is outside (0, 1], or leaves no patch to predict.

    Example:
        >>> num_predicted(48, 0.25)
        12
    """
    if not 0 < prediction_ratio <= 1:
        raise ValueError(f"Expected `prediction_ratio` in (0, 1], got {prediction_ratio}.")
    count = round(num_masked * prediction_ratio)
    if not count:
        raise ValueError(
            f"Expected `prediction_ratio` to leave a patch to predict, got {prediction_ratio} of {num_masked} masked."
        )
    return count


def predicted_subset(
    masked: Int[Tensor, "B M"], prediction_ratio: float, *, generator: torch.Generator | None = None
) -> Int[Tensor, "B K"]:
    """The masked patches to predict: a uniformly random subset for each image, drawn on the index's device.

    Args:
        masked: Indices of masked patches.
        prediction_ratio: Share of them to predict, in (0, 1]; at 1 nothing is drawn.
        generator: Source of the draws; the default generator of the device when None.

    Returns:
        K = `num_predicted(M, prediction_ratio)` of the indices a row, in the order that they had.

    Raises:
        ValueError: As in `num_predicted`.

    Example:
        >>> predicted_subset(torch.arange(12).view(2, 6), 0.5).shape
        torch.Size([2, 3])

    Reference:
        Fu et al., "Rethinking patch dependence for masked autoencoders", 2024 (CrossMAE).
    """
    count = num_predicted(masked.shape[1], prediction_ratio)
    if count == masked.shape[1]:
        return masked
    noise = torch.rand(masked.shape, generator=generator, device=masked.device, dtype=torch.float32)
    return masked.gather(1, noise.topk(count, dim=1, sorted=False).indices.sort(1).values)
