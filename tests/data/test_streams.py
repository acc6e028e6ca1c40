import builtins
import logging
import os
import re
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from masklr.data import SampleError, ShardedImages
from masklr.data.remote_shards import Shards
from masklr.data.streams import StreamBatches, shares_of_pass, shuffled

pytest.importorskip("datasets")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


def streamed(train, **options):
    options = {"streaming": True, "num_classes": 4, "batch_size": 4, "num_workers": 0, "shuffle_buffer": 7} | options
    data = ShardedImages(train, **options)
    data.setup("fit")
    return data


def prints(batches):
    """What tells the images of these batches apart."""
    return [image.numpy().tobytes() for images, _, _ in batches for image in images]


@pytest.fixture
def originals(made):
    return {np.ascontiguousarray(made.pixels(number, height=6).transpose(2, 0, 1)).tobytes() for number in range(40)}


@pytest.mark.parametrize("num_shares", [1, 2, 4, 5, 9])
def test_shares_of_a_pass_are_disjoint_and_complete(num_shares):
    paths = [f"{shard}.tar" for shard in range(4)]
    for epoch in range(3):
        read = Counter()
        for share in range(num_shares):
            for path, first, step in shares_of_pass(paths, share, num_shares, 0, epoch):
                read.update((path, sample) for sample in range(first, 10, step))
        assert set(read.values()) == {1}
        assert len(read) == 40


def test_shuffling_keeps_every_sample_and_its_seed_decides():
    import random

    orders = [list(shuffled(range(50), 8, random.Random(seed))) for seed in (1, 1, 2)]
    assert sorted(orders[0]) == list(range(50))
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    assert sorted(shuffled(range(3), 8, random.Random(0))) == [0, 1, 2]


@pytest.mark.parametrize(("num_ranks", "num_workers"), [(1, 0), (1, 2), (3, 0), (2, 3)])
def test_first_pass_of_all_ranks_and_workers_is_every_sample_once(shards, originals, num_ranks, num_workers):
    data = streamed(shards, val_fraction=0.0, num_workers=num_workers, batch_size=1)
    seen = []
    for rank in range(num_ranks):
        loader = data.train_dataloader()
        loader.dataset.rank, loader.dataset.num_ranks = rank, num_ranks
        for share in range(max(1, num_workers)):
            number = rank * max(1, num_workers) + share
            samples = loader.dataset._forever(number, num_ranks * max(1, num_workers), 0)
            seen += [s.data for epoch, _, s in takewhile_first_pass(samples)]
    assert len(seen) == len(set(seen)) == len(originals)


def takewhile_first_pass(samples):
    for sample in samples:
        if sample[0] > 0:
            return
        yield sample


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_goes_on_over_passes_and_sees_every_image_equally_often(shards, originals, num_workers):
    loader = streamed(shards, val_fraction=0.0, num_workers=num_workers).train_dataloader()
    seen = Counter(prints(islice(loader, 30)))
    assert set(seen) == originals
    assert set(seen.values()) == {3}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_validation_covers_the_held_out_samples_once_in_order(shards, originals, num_workers, num_ranks):
    data = streamed(shards, val_fraction=0.4, num_workers=num_workers)
    batches, held_out = [], data.val_dataloader()
    for rank in range(num_ranks):
        held_out.dataset.rank, held_out.dataset.num_ranks = rank, num_ranks
        batches += list(held_out)
    positions = torch.cat([positions for _, _, positions in batches])
    assert sorted(positions.tolist()) == list(range(len(positions)))
    kept = prints(data.unaugmented_train_dataloader())
    assert 5 < len(positions) < 30
    assert len(kept) + len(positions) == 40
    assert set(kept) | set(prints(batches)) == originals
    by_position = dict(zip(positions.tolist(), prints(batches), strict=True))
    alone = ShardedImages(shards, streaming=True, num_classes=4, val_fraction=0.4, num_workers=0)
    alone.setup("fit")
    assert [by_position[position] for position in range(len(positions))] == prints(alone.val_dataloader())


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("steps", [5, 22])
def test_resumed_run_sees_the_batches_of_the_uninterrupted_one(shards, run, tmp_path, num_workers, steps):
    def data():
        return ShardedImages(
            shards,
            streaming=True,
            num_classes=4,
            batch_size=4,
            image_size=(6, 4),
            random_resized_crop=(0.3, 1.0),
            shuffle_buffer=7,
            num_workers=num_workers,
        )

    whole = run(data(), max_steps=30)
    before = run(data(), max_steps=steps, save=tmp_path / "saved.ckpt")
    after = run(data(), checkpoint=tmp_path / "saved.ckpt", max_steps=30)
    assert before.seen + after.seen == whole.seen
    assert before.sums + after.sums == whole.sums


def test_epochs_of_a_limited_number_of_batches_go_on_in_the_stream(shards, run):
    def data():
        return ShardedImages(shards, streaming=True, num_classes=4, batch_size=4, num_workers=0)

    assert run(data(), max_epochs=4, limit_train_batches=3).seen == run(data(), max_steps=12).seen


def test_stream_works_with_validation_by_steps(shards, recorder):
    data = ShardedImages(shards, val=shards.replace("*", "00[23]"), streaming=True, num_classes=4, batch_size=4)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=6,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module = recorder()
    trainer.fit(module, data)
    assert module.validated == list(range(20)) * 2
    assert len(module.seen) == 6
    assert len(trainer.predict(recorder(), data)) == 5


def test_stream_without_max_steps_is_refused(shards, run):
    with pytest.raises(ValueError, match="`max_steps` for a stream, which has no length"):
        run(ShardedImages(shards, streaming=True, num_classes=4), max_epochs=1)


def test_damaged_samples_of_a_stream_are_named_or_skipped(tmp_path, made, run, caplog):
    members = made.pairs(range(12))
    members[3] = ("000001.txt", b"no class")
    members[14] = ("000007.png", members[14][1][:-30])
    path = made.write_tar(tmp_path / "a.tar", members)
    options = {"streaming": True, "num_classes": 4, "batch_size": 4, "num_workers": 0, "image_size": 8}
    with pytest.raises(SampleError, match=r"^a.tar: sample 00000(1: no class index|7: cut off or damaged)"):
        run(ShardedImages(str(path), val_fraction=0.0, **options), max_steps=6)
    with caplog.at_level(logging.WARNING):
        module = run(
            ShardedImages(str(path), val_fraction=0.0, on_error="skip", max_skipped=0.3, **options), max_steps=6
        )
    assert sum(map(len, module.seen)) == 20
    assert "Skipped a.tar: sample 000007: cut off or damaged" in caplog.text
    # Two in each of the two passes; Lightning has fetched one batch more than it used.
    assert re.search(r"skipped samples that cannot be read [45] times, counting each pass", caplog.text)


def test_class_that_is_no_number_ends_its_shard(tmp_path, made):
    members = made.pairs(range(5))
    members[7] = ("000003.cls", b"cat")
    data = streamed(str(made.write_tar(tmp_path / "a.tar", members)), val_fraction=0.0, batch_size=1)
    with pytest.raises(SampleError, match=r"^a.tar: sample 000002: the shard cannot be read beyond it \(.*cat"):
        list(data.unaugmented_train_dataloader())


def test_stream_of_a_shard_that_is_cut_off_is_an_error_that_names_it(tmp_path, made):
    path = made.write_tar(tmp_path / "a.tar", made.pairs(range(12)))
    os.truncate(path, path.stat().st_size // 2)
    data = streamed(str(path), val_fraction=0.0)
    with pytest.raises(SampleError, match=r"^a.tar: sample 0000\d\d: "):
        list(data.unaugmented_train_dataloader())


@pytest.fixture
def parquet(tmp_path, made):
    import datasets

    for shard in range(2):
        numbers = range(5 * shard, 5 * shard + 5)
        images = [{"bytes": made.encoded(made.pixels(number)), "path": None} for number in numbers]
        columns = {"img": images, "fine": [number % 3 for number in numbers]}
        features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(num_classes=3)})
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{shard}.parquet")
    return str(tmp_path / "*.parquet")


def test_parquet_is_streamed(parquet, made):
    data = ShardedImages(
        parquet, num_classes=3, label_column="fine", batch_size=5, num_workers=0, val_fraction=0.0, in_chans=1
    )
    data.setup("fit")
    assert data.streaming
    labels = torch.cat([labels for _, labels, _ in data.unaugmented_train_dataloader()])
    assert labels.tolist() == [number % 3 for number in range(10)]
    assert data.image_size == (8, 8)
    assert next(iter(data.train_dataloader()))[0].shape == (5, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "`label_column`: .* 'label', only img, fine"), ({"image_column": "x"}, "`image_column`")],
)
def test_missing_columns_are_named(parquet, options, message):
    data = ShardedImages(parquet, num_classes=3, **options)
    with pytest.raises(SampleError, match=message):
        data.setup("fit")


def test_tar_and_parquet_together_are_refused(parquet, shards):
    with pytest.raises(ValueError, match="`train`: expected tar shards or parquet files, got both"):
        ShardedImages([parquet, shards])


def test_missing_library_is_a_sentence(shards, monkeypatch):
    original = builtins.__import__

    def without_datasets(name, *arguments, **options):
        if name == "datasets":
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(ValueError, match=r"pip install 'masklr\[stream\]'"):
        ShardedImages(shards, streaming=True, num_classes=4)


def test_a_spawned_copy_of_the_stream_knows_where_the_run_stands(shards):
    import pickle

    stream = streamed(shards).train_dataloader().dataset
    stream.start = lambda: 3
    copy = pickle.loads(pickle.dumps(stream))
    assert isinstance(copy, StreamBatches)
    assert copy.start() == 3


@pytest.mark.parametrize("num_samples", [4, 5, 12, 13, 14, 15, 16, 23, 24, 25, 27, 28])
def test_all_shares_of_a_split_have_equally_many_batches_whatever_its_length(shards, monkeypatch, num_samples):
    loader = streamed(shards, val_fraction=0.0, batch_size=3).unaugmented_train_dataloader()
    stream, num_shares = loader.dataset, 4
    stream.num_ranks, stream.batch_size = 2, 3
    monkeypatch.setattr(type(stream.shards), "samples", lambda self, path: iter(range(num_samples)))
    stream.shards = replace(stream.shards, paths=stream.shards.paths[:1])
    batches = [list(stream._once(share, num_shares)) for share in range(num_shares)]
    assert len({len(of_share) for of_share in batches}) == 1
    assert all(1 <= len(batch) <= 4 for of_share in batches for batch in of_share)
    positions = [[position for batch in of_share for _, position, _ in batch] for of_share in batches]
    assert positions == [list(range(share, num_samples, num_shares)) for share in range(num_shares)]


def test_split_with_fewer_samples_than_shares_is_refused_for_several_ranks(shards, monkeypatch):
    stream = streamed(shards, val_fraction=0.0).unaugmented_train_dataloader().dataset
    monkeypatch.setattr(type(stream.shards), "samples", lambda self, path: iter(range(3)))
    stream.shards = replace(stream.shards, paths=stream.shards.paths[:1])
    assert [len(batch) for share in range(4) for batch in stream._once(share, 4)] == [1, 1, 1]
    stream.num_ranks = 2
    with pytest.raises(SampleError, match="fewer samples of the split than ranks x workers"):
        list(stream._once(0, 4))


@pytest.mark.parametrize("part", ["all", "kept", "held out"])
def test_shards_of_pairs_are_counted_without_being_read_and_others_are_not(shards, made, tmp_path, part):
    paths = tuple(str(tmp_path / f"train-{number:03d}.tar") for number in range(4))
    split = Shards(paths, "webdataset", held_out=0.3, part=part)
    for path in paths:
        assert split.known_length(path) == sum(1 for _ in split.samples(path))
    pairs = made.pairs(range(3))
    others = {
        "another member": [*pairs, ("000009.json", b"{}")],
        "no class": pairs[:-1],
        "apart": [pairs[0], pairs[2], pairs[1], pairs[3]],
        "twice": [*pairs, *pairs],
        "no key": [("png", b"1"), ("cls", b"1")],
    }
    for name, members in others.items():
        assert split.known_length(str(made.write_tar(tmp_path / f"{name}.tar", members))) is None
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "train-000.tar").read_bytes()[:3000])
    (tmp_path / "empty.tar").touch()
    for path in (cut, tmp_path / "empty.tar", tmp_path / "missing.tar", "https://host/a.tar"):
        assert split.known_length(str(path)) is None


def test_passes_gone_by_that_are_counted_leave_the_stream_as_if_they_were_read(shards, monkeypatch):
    def batches():
        data = streamed(shards, val_fraction=0.25)
        stream = data.train_dataloader().dataset
        stream.start = lambda: 29  # of 7 or 8 a pass
        return prints(islice(stream, 6))

    counted = batches()
    monkeypatch.setattr(Shards, "known_length", lambda self, path: None)
    assert counted == batches()
