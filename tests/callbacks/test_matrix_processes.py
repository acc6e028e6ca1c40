"""Two processes, with whole weights or with shards of them, measure what one does."""

import json
import os
import warnings

import pytest
import pytorch_lightning as pl
import timm
import torch
import torch.multiprocessing as mp
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn

from masklr.callbacks import GradientSpectrum, UpdateSpectrum, WeightSpectrum
from tests.two_processes import free_port, in_two_processes, one_of_two


class Transformer(pl.LightningModule):
    """A small transformer in float64, so that nothing hangs on how batches are cut; sharded if the strategy says so."""

    def __init__(self, sharded):
        super().__init__()
        self.sharded = sharded
        options = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 12, "depth": 1, "num_heads": 2}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = timm.create_model("vit_tiny_patch16_224", num_classes=10, **options).double()

    def configure_model(self):
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for part in (*self.network.blocks, self.network):
                fully_shard(part, mesh=mesh)

    def forward(self, images):
        return self.network(images.double() / 255)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Dies(pl.Callback):
    def on_train_batch_start(self, trainer, module, *_):
        if trainer.global_rank == 1 and trainer.global_step == 1:
            os._exit(1)


def fit(folder, name, **options):
    from masklr.data import Digits

    warnings.filterwarnings("ignore")
    common = {"module": "network", "every_n_steps": 2}
    callbacks = [
        WeightSpectrum(
            **common, attention_products=True, products=[["blocks.*.mlp.fc1", "blocks.*.mlp.fc2"]], weighted=True
        ),
        GradientSpectrum(**common, rank=3),
        UpdateSpectrum(**common, rank=3),
    ]
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder / name,
        logger=CSVLogger(folder / name, name="", version=""),
        callbacks=[*callbacks, *([Dies()] if name == "dies" else [])],
        max_steps=3,
        limit_val_batches=0 if name == "dies" else 1.0,
        val_check_interval=3,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        **options,
    )
    module = Transformer(sharded=name == "shards")
    # 431 validation images: the processes have 216 and 215.
    trainer.fit(module, datamodule=Digits(batch_size=32, val_fraction=0.3))
    if name == "shards":
        weight = module.network.blocks[0].attn.qkv.weight
        assert type(weight).__name__ == "DTensor"
        assert len(weight.to_local()) == 18
    # Lightning keeps them on every process, in float32.
    kept = {key: float(value) for key, value in trainer.callback_metrics.items() if not key.startswith("cost/")}
    (folder / f"{name}_{trainer.global_rank}.json").write_text(json.dumps(kept))


def in_one_of_two(rank, folder, names):
    for name in names:
        shards = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        fit(folder, name, strategy=shards if name == "shards" else "ddp", devices=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the same run by one process, by two, and by two that hold shards."""
    folder = tmp_path_factory.mktemp("processes")
    context = in_two_processes(in_one_of_two, folder, ["ddp", "shards"], join=False)
    with warnings.catch_warnings():
        fit(folder, "one")
    while not context.join():
        pass
    return folder


@pytest.mark.parametrize("name", ["ddp", "shards"])
def test_two_processes_measure_what_one_does(folder, read_metrics, name):
    one, two = (
        {k: v for k, v in read_metrics(folder / run).items() if k.split("/")[0] in ("weight", "gradient", "update")}
        for run in ("one", name)
    )
    assert one.keys() == two.keys()
    assert one["weight/blocks.0.attn.qk.1/effective_rank"].keys() == {0, 2, 3}
    assert one["weight/blocks.0.mlp.fc2*fc1/effective_rank_weighted"].keys() == {3}
    assert one["weight/mean_product/samples_weighted"] == {3: 431 * 5}
    assert one["gradient/blocks.0.attn.qkv.v/overlap_first"].keys() == {2}
    assert one["update/patch_embed.proj/overlap_first_gradient"].keys() == {2, 3}
    for key, values in one.items():
        assert two[key] == pytest.approx(values, rel=1e-9), key


@pytest.mark.parametrize("name", ["ddp", "shards"])
def test_every_process_knows_what_was_measured(folder, name):
    kept = [json.loads((folder / f"{run}.json").read_text()) for run in ("one_0", f"{name}_0", f"{name}_1")]
    assert kept[2] == kept[1]
    assert kept[2] == pytest.approx(kept[0], rel=1e-6)


def test_a_process_that_dies_ends_the_other(tmp_path):
    context = mp.get_context("spawn")
    args = (free_port(), in_one_of_two, tmp_path, ["dies"])
    processes = [context.Process(target=one_of_two, args=(rank, *args)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    alive = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
    assert alive == [False, False]
    assert [process.exitcode for process in processes] == [1, 1]
