"""Which samples a rank sees, in which order: pure functions of (seed, epoch, rank)."""

from collections.abc import Callable, Iterator, Sized
from itertools import chain, count, repeat

import numpy as np
from torch.utils.data import DistributedSampler

# What a sampler yields: (epoch, position), so that a worker process can draw from (seed, epoch, position) without being
# told when an epoch begins. A bare position is taken as one of epoch 0.
Key = tuple[int, int] | int


class TrainingSampler(DistributedSampler):
    """Shuffles from (seed, epoch), deals the samples out to the ranks, and can start in the middle of an epoch.

    All ranks yield the same number of whole batches; what is left over is dropped, other samples in each epoch. The
    length is that of a whole epoch even if the first one starts in its middle, since Lightning counts on from there.
    It is a `DistributedSampler` so that Lightning does not replace it.

    Args:
        dataset: The training split; only its length is used.
        batch_size: Samples in one batch of one rank.
        rank: This process among those that share the data.
        num_ranks: Number of processes that share the data.
        seed: Seed of the order.
        start: Where the run stands, as (epoch, batches of it that were seen); asked when the first iteration begins,
            which leaves those out. None is the beginning.

    Raises:
        ValueError: The ranks together need more samples for one batch than there are.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        seed: int = 0,
        start: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=num_ranks, rank=rank, shuffle=True, seed=seed, drop_last=True)  # type: ignore[arg-type]
        num_batches = len(dataset) // num_ranks // batch_size
        if num_batches == 0:
            raise ValueError(
                f"Expected at least `batch_size` = {batch_size * num_ranks} training samples, got {len(dataset)}."
            )
        self.batch_size = batch_size
        self.num_samples = num_batches * batch_size
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        past = 0
        if self.start is not None:
            self.epoch, past = self.start()
            self.start = None
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.dataset))  # type: ignore[arg-type]
        mine = order[self.rank :: self.num_replicas][: self.num_samples]
        yield from zip(repeat(self.epoch), mine[past * self.batch_size :].tolist(), strict=False)


class EvaluationSampler(DistributedSampler):
    """Every sample exactly once over all ranks, in order; no padding, no repeats.

    Args:
        dataset: The split; only its length is used.
        rank: This process among those that share the data.
        num_ranks: Number of processes that share the data.
    """

    def __init__(self, dataset: Sized, *, rank: int = 0, num_ranks: int = 1) -> None:
        super().__init__(dataset, num_replicas=num_ranks, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.positions = range(rank, len(dataset), num_ranks)
        self.num_samples = len(self.positions)

    def __iter__(self) -> Iterator[int]:
        return iter(self.positions)


def even_batch_size(num_samples: int, num_ranks: int, batch_size: int) -> int:
    """Batch size, close to the wanted one, at which all ranks have equally many evaluation batches.

    Ranks that differ by one sample may differ by one batch, and then a forward pass with collectives (FSDP) waits
    forever. The wanted size is returned wherever it serves.

    Args:
        num_samples: Size of the split.
        num_ranks: Number of processes that share it, at most `num_samples`.
        batch_size: Wanted number of samples in one batch of one rank.

    Example:
        >>> even_batch_size(17, 2, 4)  # 9 and 8 samples: 3 and 2 batches of 4, but 3 and 3 of 3
        3
    """
    fewest, more = divmod(num_samples, num_ranks)
    if not more or fewest % batch_size:
        return batch_size
    return next(size for size in chain(range(batch_size - 1, 1, -1), count(batch_size + 1)) if fewest % size)


def held_out_rows(num_rows: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split 0..num_rows-1 into (kept, held out), both ascending, `round(num_rows * fraction)` of them held out.

    Example:
        >>> kept, held_out = held_out_rows(10, 0.2, seed=0)
        >>> len(kept), len(held_out)
        (8, 2)
    """
    order = np.random.default_rng(seed).permutation(num_rows)
    num_held_out = round(num_rows * fraction)
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])
