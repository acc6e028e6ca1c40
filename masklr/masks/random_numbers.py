"""Uniform numbers from a generator, or as a function of a seed and a position."""

import torch
from jaxtyping import Float32, Int, Int64
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of SplitMix64


def uniform(
    shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str | None
) -> Float32[Tensor, "..."]:
    """Uniform numbers in [0, 1), on the device, or else on the generator's."""
    if device is None and generator is not None:
        device = generator.device
    return torch.rand(shape, generator=generator, device=device, dtype=torch.float32)


def _signed(x: int) -> int:
    """The int64 with the bits of x modulo 2^64."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def _mixed(z: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """Output function of SplitMix64. Multiplication of int64 wraps; `>>` copies the sign bit, which is masked off."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def hashed_uniform(positions: Int[Tensor, " batch"], seed: int, num_draws: int) -> Float32[Tensor, "batch draws"]:
    """Uniform numbers in [0, 1) with 24 bits, a function of (seed, position, index of the draw)."""
    # One round of mixing for each of the three, so that neighbouring seeds and positions share no stream.
    positions = positions.long()
    start = _mixed(torch.full_like(positions, _signed(seed * GOLDEN + GOLDEN)))
    streams = _mixed(start + positions * _signed(GOLDEN))
    steps = torch.arange(1, num_draws + 1, device=positions.device) * _signed(GOLDEN)
    bits = (_mixed(streams[:, None] + steps) >> 40) & ((1 << 24) - 1)
    return bits.float() * 2.0**-24
