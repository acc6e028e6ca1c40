"""Draw what is kept (units, weights, blocks) and what is visible (patches).

Every function is pure in its random numbers: a `torch.Generator`, for `weight_keep` a seed, for `fixed_patch_split` a
seed and the position of the sample. Draws are in float32 or 16-bit integers, since a bfloat16 draw has a grid of 2^-8
and so a wrong probability.
"""

from masklr.masks.patches import Strategy, fixed_patch_split, num_masked, patch_split
from masklr.masks.units import block_keep, check_probability, unit_keep
from masklr.masks.weights import kept_share, weight_keep

__all__ = [
    "Strategy",
    "block_keep",
    "check_probability",
    "fixed_patch_split",
    "kept_share",
    "num_masked",
    "patch_split",
    "unit_keep",
    "weight_keep",
]
