import numpy as np
import pytest

from masklr.data.sampling import EvaluationSampler, TrainingSampler, even_batch_size, held_out_rows


def epochs(sampler, numbers):
    seen = []
    for epoch in numbers:
        sampler.set_epoch(epoch)
        seen.append(list(sampler))
    return seen


def test_ranks_share_an_epoch_without_overlap_and_with_equal_lengths():
    samplers = [TrainingSampler(range(103), 4, rank=rank, num_ranks=3, seed=5) for rank in range(3)]
    seen = [[position for _, position in sampler] for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(positions) for positions in seen] == [32, 32, 32]
    assert len({position for positions in seen for position in positions}) == 96


def test_order_is_a_function_of_seed_and_epoch():
    first, again = (epochs(TrainingSampler(range(40), 4, seed=1), [0, 1, 7]) for _ in range(2))
    other = epochs(TrainingSampler(range(40), 4, seed=2), [0])
    assert first == again
    assert first[0] != other[0]
    assert [position for _, position in first[0]] != [position for _, position in first[1]]
    assert {epoch for epoch, _ in first[2]} == {7}


def test_what_is_dropped_differs_between_epochs():
    seen = epochs(TrainingSampler(range(11), 4, seed=0), range(20))
    assert {position for epoch in seen for _, position in epoch} == set(range(11))


def test_start_in_the_middle_yields_the_rest_once_and_keeps_the_length():
    whole = epochs(TrainingSampler(range(40), 4, seed=1), [3, 4])
    sampler = TrainingSampler(range(40), 4, seed=1, start=lambda: (3, 6))
    assert len(sampler) == 40
    assert epochs(sampler, [3, 4]) == [whole[0][24:], whole[1]]


def test_second_iteration_without_set_epoch_is_whole():
    sampler = TrainingSampler(range(8), 4, start=lambda: (0, 1))
    assert [len(list(sampler)), len(list(sampler))] == [4, 8]


def test_batch_larger_than_the_split_is_refused():
    with pytest.raises(ValueError, match="at least `batch_size` = 16 training samples, got 15"):
        TrainingSampler(range(15), 8, num_ranks=2)


def test_evaluation_covers_every_sample_once_in_order():
    seen = [list(EvaluationSampler(range(11), rank=rank, num_ranks=3)) for rank in range(3)]
    assert sorted(position for positions in seen for position in positions) == list(range(11))
    assert all(positions == sorted(positions) for positions in seen)


def test_even_batch_size_gives_all_ranks_equally_many_batches():
    for num_samples in range(4, 60):
        for num_ranks in range(1, 5):
            for batch_size in range(1, 9):
                size = even_batch_size(num_samples, num_ranks, batch_size)
                counts = {-(-len(range(rank, num_samples, num_ranks)) // size) for rank in range(num_ranks)}
                assert len(counts) == 1
                if num_samples % num_ranks == 0:
                    assert size == batch_size


def test_held_out_rows_are_a_partition_that_depends_on_the_seed_alone():
    kept, held_out = held_out_rows(50, 0.3, seed=1)
    assert len(held_out) == 15
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(50))
    np.testing.assert_array_equal(held_out_rows(50, 0.3, seed=1)[1], held_out)
    assert not np.array_equal(held_out_rows(50, 0.3, seed=2)[1], held_out)
