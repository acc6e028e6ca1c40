import logging
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch

from masklr.data import SampleError, ShardedImages
from masklr.data.splits import DecodedImages, MemoryImages
from masklr.data.tar_index import TarSource, shard_index, shard_paths

few_workers = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def every(split):
    return split.__getitems__(range(len(split)))


def opened(train, **options):
    data = ShardedImages(train, **options)
    data.setup("fit")
    return data


def test_samples_are_those_of_the_shards(shards, made):
    data = opened(shards, val_fraction=0.0)
    images, labels, positions = every(data.splits["train"])
    assert isinstance(data.splits["train"].images, MemoryImages)
    assert positions.tolist() == list(range(40))
    assert labels.tolist() == [number % 4 for number in range(40)]
    assert np.array_equal(images[23].permute(1, 2, 0), made.pixels(23, height=6))
    assert (data.num_classes, data.image_size, data.in_chans) == (4, (6, 8), 3)


@pytest.mark.parametrize("kind", ["jpg", "jpeg", "png", "webp"])
def test_every_kind_of_image_is_read(tmp_path, made, kind):
    made.write_tar(tmp_path / "a.tar", made.pairs(range(3), kind=kind))
    images, _, _ = every(opened(str(tmp_path / "a.tar"), in_chans=1, batch_size=1, val_fraction=0.0).splits["train"])
    assert images.shape == (3, 1, 8, 8)


@few_workers
@pytest.mark.parametrize("num_workers", [0, 2])
def test_decoding_in_workers_gives_what_memory_gives(shards, num_workers):
    loaders = []
    for in_memory in (True, False):
        data = opened(shards, in_memory=in_memory, batch_size=8, num_workers=num_workers, image_size=(5, 4))
        assert isinstance(data.splits["train"].images, MemoryImages if in_memory else DecodedImages)
        loaders.append(list(data.train_dataloader()))
    for one, other in zip(*loaders, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_splits_are_disjoint_and_the_test_split_is_its_own(shards, tmp_path, made):
    made.write_tar(tmp_path / "test.tar", made.pairs(range(100, 106), height=6))
    data = opened(shards, test=str(tmp_path / "test.tar"), val_fraction=0.25, split_seed=3)
    data.setup("test")
    train, validation, test = (data.splits[name] for name in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (30, 10, 6)
    assert not set(train.rows) & set(validation.rows)
    again = opened(shards, val_fraction=0.25, split_seed=3)
    assert np.array_equal(again.splits["validation"].rows, validation.rows)


def test_val_shards_are_the_validation_split(shards):
    data = opened(shards.replace("*", "{000..002}"), val=shards.replace("*", "003"))
    assert (len(data.splits["train"]), len(data.splits["validation"])) == (30, 10)


def test_resumed_run_is_exact(shards, run, tmp_path):
    def data():
        return ShardedImages(shards, batch_size=6, in_memory=False, num_workers=0)

    whole = run(data(), max_steps=15)
    before = run(data(), max_steps=8, save=tmp_path / "saved.ckpt")
    after = run(data(), checkpoint=tmp_path / "saved.ckpt", max_steps=15)
    assert before.seen + after.seen == whole.seen
    assert before.sums + after.sums == whole.sums


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("length", [5, 90, 130])
def test_index_agrees_with_tarfile_whatever_the_names(tmp_path, made, layout, length):
    stem = "/".join(["d" * 40] * (length // 41) + ["k" * (length % 41)])
    members = [
        (f"{stem}{number}.{kind}", data)
        for number, kind, data in [
            (n, k, d) for n in range(3) for k, d in (("PNG", made.encoded(made.pixels(n))), ("cls", b"1\n"))
        ]
    ]
    path = made.write_tar(tmp_path / "a.tar", [*members, ("notes.txt", b"?"), (".hidden", b"")], format=layout)
    index = shard_index(str(path))
    with tarfile.open(path) as tar:
        expected = {member.name: (member.offset_data, member.size) for member in tar}
    assert not index.errors
    assert index.labels == [1, 1, 1]
    for key, offset, size in zip(index.keys, index.offsets, index.sizes, strict=True):
        assert expected[key + ".PNG"] == (offset, size)


def test_folders_in_a_shard_and_keys_with_the_same_name_are_told_apart(tmp_path, made):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "0.png").write_bytes(made.encoded(made.pixels(1)))
            (tmp_path / folder / "0.cls").write_bytes(b"2")
            tar.add(tmp_path / folder, arcname=folder)
    assert sorted(shard_index(str(tmp_path / "a.tar")).keys) == ["a/0", "b/0"]


@pytest.mark.parametrize("into", ["header", "data", "end"])
def test_shard_that_is_cut_off_is_found_while_indexing(tmp_path, made, caplog, into):
    path = made.write_tar(tmp_path / "train-000001.tar", made.pairs(range(4)))
    with tarfile.open(path) as tar:
        member = tar.getmember("000003.png")
    size = {"header": member.offset + 100, "data": member.offset_data + 20, "end": member.offset}[into]
    os.truncate(path, size)
    named = "000003" if into == "data" else "000002"
    data = ShardedImages(str(path))
    with pytest.raises(SampleError, match=rf"^train-000001.tar: sample {named}: the shard is cut off"):
        data.setup("fit")
    with caplog.at_level(logging.WARNING):
        assert (
            len(opened(str(path), on_error="skip", max_skipped=0.3, val_fraction=0.0, batch_size=1).splits["train"])
            == 3
        )
    assert "skipped 1 samples while indexing" in caplog.text


def test_shard_with_long_names_that_is_cut_off_is_found_too(tmp_path, made):
    members = [("k" * 120 + name, data) for name, data in made.pairs(range(3))]
    path = made.write_tar(tmp_path / "a.tar", members, format=tarfile.GNU_FORMAT)
    with tarfile.open(path) as tar:
        os.truncate(path, tar.getmembers()[-2].offset_data + 10)
    with pytest.raises(SampleError, match=r"a.tar: sample k+00000\d: "):
        opened(str(path))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"000002.cls": None}, "sample 000002: no .cls file beside its image"),
        ({"000002.cls": b"cat"}, "sample 000002: .cls holds 'cat', which is not a class index"),
        ({"000002.cls": b""}, "sample 000002: .cls holds ''"),
        ({"000002.cls": b"-1"}, "sample 000002: .cls holds '-1'"),
        ({"000002.png": None}, "sample 000002: no image"),
        ({"000002.png": b"text"}, "sample 000002: neither a JPEG"),
        ({"000002.png": b""}, "sample 000002: the file is empty"),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_samples_that_cannot_be_used_are_named_or_skipped(tmp_path, made, caplog, change, sentence, in_memory):
    members = [(name, change.get(name, data)) for name, data in made.pairs(range(5))]
    path = made.write_tar(tmp_path / "a.tar", [(name, data) for name, data in members if data is not None])
    options = {"in_memory": in_memory, "val_fraction": 0.0, "num_workers": 0, "batch_size": 1, "max_skipped": 0.2}

    def everything(on_error):
        data = opened(str(path), on_error=on_error, **options)
        images = every(data.splits["train"])[0]
        data.teardown("fit")
        return images

    with pytest.raises(SampleError) as error:
        everything("raise")
    assert str(error.value).startswith(f"a.tar: {sentence}")
    with caplog.at_level(logging.WARNING):
        assert len(everything("skip")) == 4
    assert "kipped 1 " in caplog.text
    assert f"a.tar: {sentence}" in caplog.text


def test_mixed_sizes_ask_for_image_size(tmp_path, made):
    path = made.write_tar(tmp_path / "a.tar", made.pairs(range(3)) + made.pairs(range(3, 5), height=9))
    with pytest.raises(SampleError, match=r"sample 000003: 9 x 8 pixels where others have 8 x 8; pass `image_size`"):
        opened(str(path))
    assert opened(str(path), image_size=4, batch_size=1).image_size == (4, 4)


def test_classes_beyond_num_classes_are_an_error_and_fewer_are_not(shards):
    with pytest.raises(SampleError, match=r"sample 000003: class 3, but `num_classes` is 3"):
        opened(shards, num_classes=3)
    assert opened(shards, num_classes=7).num_classes == 7


def test_source_reads_on_after_pickling_and_closes_its_files(shards):
    source = TarSource([shard_index(path) for path in shard_paths("train", shards)], 3)
    before, _ = source.read(17)
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.read(17)[0], before)
    descriptor = next(iter(source._descriptors.values()))
    del source
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_globs_without_files_name_argument_and_pattern(shards):
    for argument, options in (("train", {"train": "no/*.tar"}), ("test", {"train": shards, "test": ["no/*.tar"]})):
        with pytest.raises(FileNotFoundError, match=rf"`{argument}`: no file matches 'no/\*.tar'"):
            ShardedImages(**options)


def test_braces_and_lists_are_expanded(tmp_path):
    for name in ("a-000", "a-001", "b-001"):
        (tmp_path / f"{name}.tar").touch()
    names = [os.path.basename(path) for path in shard_paths("train", str(tmp_path / "{a,b}-{001..001}.tar"))]
    assert names == ["a-001.tar", "b-001.tar"]
    assert len(shard_paths("train", [str(tmp_path / "a-*"), str(tmp_path / "b-*")])) == 3
    assert shard_paths("train", "s3://x/{08..10}.tar") == [f"s3://x/{n}.tar" for n in ("08", "09", "10")]
    with pytest.raises(ValueError, match="matched more than once"):
        shard_paths("train", [str(tmp_path / "a-*"), str(tmp_path / "*")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_chans": 4}, "`in_chans` 1 or 3, got 4"),
        ({"shuffle_buffer": 0}, "`shuffle_buffer` of at least 1, got 0"),
        ({"num_classes": 0}, "`num_classes` of at least 1, got 0"),
        ({"on_error": "x"}, "`on_error` raise or skip, got 'x'"),
        ({"streaming": True}, "`num_classes` for a stream"),
        ({"streaming": True, "in_memory": True, "num_classes": 2}, "`in_memory` false or auto for a stream"),
        ({"test": "https://host/a.tar", "streaming": False}, "`streaming` true or auto"),
    ],
)
def test_wrong_arguments_are_named(shards, options, message):
    with pytest.raises(ValueError, match=message):
        ShardedImages(shards, **options)
