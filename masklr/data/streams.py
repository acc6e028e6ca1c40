"""Streams of batches: shuffled and endless for training, dealt out to ranks and worker processes, and resumed."""

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from masklr.data.decoding import SampleError, View
from masklr.data.remote_shards import Encoded, Shards, decoded_sample
from masklr.data.splits import MAX_SKIPPED, NAMED_SKIPS, Batch, OnError, check_skipped, mixed_sizes

log = logging.getLogger(__name__)

_FEWEST = 1000  # samples of which a share is taken
_MAX_WORKERS = 1024  # counters of skipped samples, one for each worker process, so that none is lost to a race


class StreamBatches(IterableDataset[Batch]):
    """Batches of a stream: endless and shuffled for training, or each sample once, in order.

    Every worker process of every rank has its own share of each pass, disjoint and together complete. Training never
    ends, so that no rank waits at the end of an epoch for one with a shorter share; the order of shards and of samples
    in the buffer is drawn from (seed, pass, share). It starts after the `start()` batches that its rank has already
    seen, by reading past them without decoding; with the same ranks and workers the run goes on exactly.

    Args:
        shards: What is read.
        view: How images are brought to one size.
        in_chans: 1 or 3.
        on_error: `raise` stops at a sample that cannot be used; `skip` makes the batch smaller and counts it.
        batch_size: Samples in a batch of this rank.
        rank: This process among those that share the data.
        num_ranks: Number of processes that share the data.
        endless: Training order, forever; otherwise each sample once, in order.
        seed: Seed of the order and of augmentation.
        shuffle_buffer: Encoded samples that wait to be drawn, in each worker process.
        start: Batches this rank has seen, asked when iteration begins.
        max_skipped: Share of the samples of a worker process that may be skipped before that is an error, once it has
            read 1,000.
    """

    def __init__(
        self,
        shards: Shards,
        view: View,
        in_chans: int,
        on_error: OnError,
        batch_size: int,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        endless: bool = False,
        seed: int = 0,
        shuffle_buffer: int = 4096,
        start: Callable[[], int] | None = None,
        max_skipped: float = MAX_SKIPPED,
    ) -> None:
        super().__init__()
        self.shards, self.view, self.in_chans, self.on_error = shards, view, in_chans, on_error
        self.batch_size, self.rank, self.num_ranks = batch_size, rank, num_ranks
        self.endless, self.seed, self.shuffle_buffer = endless, seed, shuffle_buffer
        self.start, self.max_skipped = start, max_skipped
        self._num_read = 0  # by this process
        self.skipped = torch.zeros(_MAX_WORKERS, dtype=torch.int64).share_memory_()

    @property
    def num_skipped(self) -> int:
        """How many times a sample was skipped, by any worker process of this rank."""
        return int(self.skipped.sum())

    def __getstate__(self) -> dict[str, Any]:
        # Spawned worker processes are sent a copy when iteration begins; the trainer is not to go with it.
        seen = self.start() if self.start is not None else 0
        return {**self.__dict__, "start": _Constant(seen)}

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        worker_id, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        seen = self.start() if self.start is not None else 0
        num_shares = self.num_ranks * num_workers
        if self.endless:
            # Batches come from the workers in turn, beginning with worker 0: it takes the share that was next.
            turn = (worker_id + seen) % num_workers
            past = len(range(turn, seen, num_workers))
            numbered = self._forever(self.rank * num_workers + turn, num_shares, past * self.batch_size)
        else:
            for chunk in self._once(self.rank * num_workers + worker_id, num_shares):
                yield self._decoded(chunk, worker_id)
            return
        while chunk := list(islice(numbered, self.batch_size)):
            yield self._decoded(chunk, worker_id)

    def _once(self, share: int, num_shares: int) -> Iterator[list[tuple[int, int, Encoded]]]:
        """Each sample of this share once, in as many batches as every other share has.

        A rank with one batch more than another would wait for it forever where a forward pass has collectives (FSDP).
        If what is left over at the end has not one sample for each share, it goes into the batches before.
        """
        # Every share reads every shard, since a sample's position among all is known only by counting.
        samples = (sample for path in self.shards.paths for sample in self.shards.samples(path))
        held: list[tuple[int, int, Encoded]] = []
        num_batches, num_samples = 0, 0
        for position, sample in enumerate(samples):
            num_samples = position + 1
            if position % num_shares == share:
                held.append((0, position, sample))
            if num_samples >= (num_batches + 1) * self.batch_size * num_shares + num_shares:  # enough for another batch
                yield held[: self.batch_size]
                held, num_batches = held[self.batch_size :], num_batches + 1
        if num_samples < num_shares and self.num_ranks > 1:
            raise SampleError(
                f"{self.shards.paths[0]} and {len(self.shards.paths) - 1} others: fewer samples of the split than "
                f"ranks x workers ({num_shares}), {num_samples}."
            )
        if held:
            yield held

    def _forever(self, share: int, num_shares: int, past: int) -> Iterator[tuple[int, int, Encoded]]:
        lengths: dict[str, int] = {}
        for epoch in count():
            readings = shares_of_pass(self.shards.paths, share, num_shares, self.seed, epoch)
            if past:
                for path, _, _ in readings:
                    if path not in lengths and (length := self.shards.known_length(path)) is not None:
                        lengths[path] = length
            if past and all(path in lengths for path, _, _ in readings):
                num_samples = sum(len(range(first, lengths[path], step)) for path, first, step in readings)
                if num_samples <= past:  # a whole pass that need not be read
                    past -= num_samples
                    continue
            draws = random.Random(f"{self.seed} {epoch} {share}")
            number = -1
            for number, sample in enumerate(shuffled(self._read(readings, lengths), self.shuffle_buffer, draws)):
                if past:
                    past -= 1
                else:
                    yield epoch, number * num_shares + share, sample
            if number < 0:
                raise SampleError(
                    f"{self.shards.paths[0]} and {len(self.shards.paths) - 1} others: fewer samples than "
                    f"ranks x workers ({num_shares})."
                )

    def _read(self, readings: Iterable[tuple[str, int, int]], lengths: dict[str, int]) -> Iterator[Encoded]:
        for path, first, step in readings:
            number = -1
            for number, sample in enumerate(self.shards.samples(path)):
                if number % step == first:
                    yield sample
            lengths[path] = number + 1

    def _decoded(self, chunk: Sequence[tuple[int, int, Encoded]], worker_id: int) -> Batch:
        images: list[Tensor] = []
        labels, positions = [], []
        self._num_read += len(chunk)
        for epoch, position, sample in chunk:
            try:
                image, label = decoded_sample(sample, self.in_chans)
            except SampleError as error:
                if self.on_error == "raise":
                    raise
                self.skipped[worker_id] += 1
                if self.skipped[worker_id] <= NAMED_SKIPS:
                    log.warning("Skipped %s", error)
                num_skipped = int(self.skipped[worker_id])
                check_skipped(num_skipped, max(self._num_read, _FEWEST), self.max_skipped, str(error))
                continue
            image = self.view(image, (self.seed, epoch, position) if self.endless else None)
            if images and image.shape != images[0].shape:
                raise SampleError(mixed_sizes(sample.name, image, (images[0].shape[1], images[0].shape[2])))
            images.append(image)
            labels.append(label)
            positions.append(position)
        if not images:
            raise SampleError(f"{chunk[0][2].name}: no image of its batch of {len(chunk)} can be read.")
        return torch.stack(images), torch.tensor(labels), torch.tensor(positions)


@dataclass(frozen=True)
class _Constant:
    value: int

    def __call__(self) -> int:
        return self.value


def shares_of_pass(
    paths: Sequence[str], share: int, num_shares: int, seed: int, epoch: int
) -> list[tuple[str, int, int]]:
    """What one worker process reads in one pass: (shard, first sample, step).

    Whole shards if there are enough, in an order drawn for the pass, so that no share has the smaller half forever;
    otherwise several read one shard in turns. Over all shares, each sample of each shard is read once.
    """
    order = list(paths)
    random.Random(f"{seed} {epoch}").shuffle(order)
    if len(order) >= num_shares:
        return [(path, 0, 1) for path in order[share::num_shares]]
    shard = share % len(order)
    return [(order[shard], share // len(order), len(range(shard, num_shares, len(order))))]


def shuffled(samples: Iterable[Encoded], buffer_size: int, draws: random.Random) -> Iterator[Encoded]:
    """Each sample once: one at random out of a buffer, whose place the next one takes."""
    source = iter(samples)
    buffer = list(islice(source, buffer_size))
    for sample in source:
        place = draws.randrange(len(buffer))
        buffer[place], sample = sample, buffer[place]
        yield sample
    draws.shuffle(buffer)
    yield from buffer
