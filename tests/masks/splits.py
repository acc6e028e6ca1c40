"""Generators, and what is asked of every split."""

import torch


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_partition(visible: torch.Tensor, masked: torch.Tensor, num_patches: int, count: int) -> None:
    assert visible.dtype == masked.dtype == torch.int64
    assert masked.shape[1] == count
    everything = torch.arange(num_patches).expand(len(visible), -1)
    assert torch.equal(torch.cat([visible, masked], 1).sort(1).values, everything)
    assert (visible.diff(dim=1) > 0).all()
    assert (masked.diff(dim=1) > 0).all()


def indicator(masked: torch.Tensor, num_patches: int) -> torch.Tensor:
    return torch.zeros(len(masked), num_patches, dtype=torch.float64).scatter_(1, masked, 1.0)
