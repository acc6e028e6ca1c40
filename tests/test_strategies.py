"""Two processes that hold parts of the weights train as two that hold all of them, and go on exactly."""

import warnings
from datetime import timedelta

import pytest
import pytorch_lightning as pl
import timm
import torch
from torch import nn

from masklr.callbacks import Peers, RunCheckpoint, RunState, StepSeed
from masklr.callbacks.peers import is_loss_of_a_peer
from masklr.checkpoints import WholeCheckpointIO, read
from masklr.strategies import FullyShard, blocks
from tests.two_processes import in_two_processes


class Sharded(pl.Callback):
    """Holds each process to having half of each weight whenever a callback can look."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        for name, parameter in pl_module.named_parameters():
            assert type(parameter).__name__ == "DTensor", name
        weight = pl_module.model.encoder.blocks[0].mlp.fc1.weight
        assert weight.to_local().numel() * 2 == weight.numel()

    on_validation_batch_end = on_train_batch_end


def make_task(in_chans=1):
    from masklr.layers import DropConnect
    from masklr.models import MaskedAutoencoder
    from masklr.optim import Optim
    from masklr.tasks import Pretraining

    torch.manual_seed(0)
    model = MaskedAutoencoder(
        image_size=8,
        patch_size=2,
        in_chans=in_chans,
        decoder_dim=16,
        decoder_depth=2,
        decoder_heads=2,
        encoder_args={"embed_dim": 24, "depth": 2, "num_heads": 2, "proj_drop_rate": 0.1},
    )
    masks = {"encoder.blocks.*.mlp.fc2": DropConnect(p=0.3)}
    return Pretraining(model, Optim(base_lr=4e-3), mean=[0.305], std=[0.376], masks=masks)


def trainer_of(folder, name, strategy, watched=True):
    warnings.filterwarnings("ignore")
    checkpoints = RunCheckpoint(every_n_steps=1, keep_last=9, best=None)
    observers = [Sharded()] if isinstance(strategy, FullyShard) and watched else []
    return pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        default_root_dir=folder / name,
        logger=False,
        callbacks=[StepSeed(0), RunState(), checkpoints, Peers(), *observers],
        plugins=[WholeCheckpointIO()],
        max_steps=5,
        check_val_every_n_epoch=None,
        val_check_interval=3,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit(folder, name, strategy, ckpt_path=None):
    trainer_of(folder, name, strategy).fit(make_task(), datamodule=digits(), ckpt_path=ckpt_path)


def digits():
    from masklr.data import Digits

    return Digits(batch_size=64)


def in_one_of_two(rank, folder):
    runs = [("whole", "ddp", None), ("parts", FullyShard(timedelta(minutes=5)), None)]
    runs += [
        (f"from_{step}", FullyShard(timedelta(minutes=5)), folder / "parts" / "checkpoints" / f"step={step:08d}.ckpt")
        for step in (2, 3)  # 3: after a validation
    ]
    whole = folder / "whole" / "checkpoints" / "step=00000002.ckpt"
    runs.append(("whole_then_parts", FullyShard(timedelta(minutes=5)), whole))
    for name, strategy, ckpt_path in runs:
        fit(folder, name, strategy, ckpt_path)
    measured = []
    for strategy in ("ddp", FullyShard(timedelta(minutes=5))):
        trainer = trainer_of(folder, "measured", strategy)
        measured += trainer.validate(make_task(), digits(), ckpt_path=whole, verbose=False)
    torch.save(measured, folder / f"measured_{rank}.pt")
    frozen, other = make_task(), make_task(in_chans=3)
    frozen.model.encoder.norm.requires_grad_(False)
    refusals = {"doesn't match the size": frozen, "size mismatch for model.encoder.patch_embed.proj.weight": other}
    for sentence, task in refusals.items():
        trainer = trainer_of(folder, "refused", FullyShard(timedelta(minutes=5)))
        with pytest.raises((ValueError, RuntimeError), match=sentence):
            trainer.fit(task, datamodule=digits(), ckpt_path=whole)
    torch.save(states_come_back(folder, rank), folder / f"states_{rank}.pt")


def states_come_back(folder, rank):
    """Whether optimizers without a state, or with one for some weights only, go on under FullyShard."""
    same = []
    for name, options in {"plain": {}, "momentum": {"momentum": 0.9}, "compiled": {}}.items():
        runs = []
        for number, step in enumerate((None, 2, 3)):  # of the run before
            strategy = FullyShard(timedelta(minutes=5)) if number else "ddp_find_unused_parameters_true"
            begun = folder / f"{name}_{number - 1}" / "checkpoints" / f"step={step:08d}.ckpt" if number else None
            task = Unused(options)
            if name == "compiled":
                task.layers[1] = torch.compile(task.layers[1], backend="eager")
            trainer = trainer_of(folder, f"{name}_{number}", strategy, watched=False)
            trainer.fit(task, datamodule=digits(), ckpt_path=begun)
            runs.append(last(folder, f"{name}_{number}"))
        one, *others = ({k.replace("_orig_mod.", ""): v for k, v in run["state_dict"].items()} for run in runs)
        same.append(all(torch.allclose(one[k], other[k], rtol=1e-5, atol=1e-7) for other in others for k in one))
        same.append([sorted(run["optimizer_states"][0]["state"]) for run in runs])
    return same


class Unused(pl.LightningModule):
    """Two layers, of which one never has a gradient."""

    def __init__(self, options):
        super().__init__()
        torch.manual_seed(0)
        self.options = options
        self.layers = nn.ModuleList([nn.Linear(64, 10), nn.Linear(64, 10)])

    def training_step(self, batch, batch_idx):
        logits = self.layers[1](batch[0].flatten(1).float() / 16)
        return nn.functional.cross_entropy(logits, batch[1]) + 0 * batch_idx

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, **self.options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strategies")
    in_two_processes(in_one_of_two, folder)
    return folder


def last(folder, name):
    return read(folder / name / "checkpoints" / "last.ckpt")


def test_sharded_training_is_that_of_whole_weights(folder):
    whole, parts = last(folder, "whole"), last(folder, "parts")
    assert parts["global_step"] == 5
    assert parts["state_dict"].keys() == whole["state_dict"].keys()
    before = make_task().state_dict()
    moved = max(float((whole["state_dict"][name] - before[name]).abs().max()) for name in before)
    assert moved > 1e-3
    for name, value in whole["state_dict"].items():
        torch.testing.assert_close(parts["state_dict"][name], value, rtol=1e-3, atol=1e-2 * moved, msg=name)


def test_checkpoint_of_sharded_weights_is_that_of_one_process(folder):
    parts, task = last(folder, "parts"), make_task()
    task.load_state_dict(parts["state_dict"], strict=True)
    assert not any(type(value).__name__ == "DTensor" for value in parts["state_dict"].values())
    states = parts["optimizer_states"][0]["state"]
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    assert len(states) == len(trained)
    shapes = sorted(tuple(state["exp_avg"].shape) for state in states.values())
    assert shapes == sorted(tuple(parameter.shape) for parameter in trained)


def test_run_of_whole_weights_goes_on_with_sharded_ones(folder):
    whole, resumed = last(folder, "whole"), last(folder, "whole_then_parts")
    groups = [[group["params"] for group in run["optimizer_states"][0]["param_groups"]] for run in (whole, resumed)]
    states = [run["optimizer_states"][0]["state"] for run in (whole, resumed)]
    # Numbers differ, their order in the groups does not.
    numbers = zip(*([number for group in run for number in group] for run in groups), strict=True)
    for one, other in numbers:
        for key in ("exp_avg", "exp_avg_sq"):
            value = states[0][one][key]
            torch.testing.assert_close(states[1][other][key], value, rtol=1e-3, atol=1e-2 * float(value.abs().max()))
    before = make_task().state_dict()
    moved = max(float((whole["state_dict"][name] - before[name]).abs().max()) for name in before)
    for name, value in whole["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], value, rtol=1e-3, atol=1e-2 * moved, msg=name)


def test_whole_weights_are_measured_with_sharded_ones(folder):
    for rank in (0, 1):
        whole, parts = torch.load(folder / f"measured_{rank}.pt")
        assert whole.keys() == parts.keys()
        assert "val/loss" in whole
        assert parts["val/loss"] == pytest.approx(whole["val/loss"], rel=1e-4)


def test_optimizer_without_a_state_for_every_weight_goes_on(folder):
    for rank in (0, 1):
        plain, plain_states, momentum, momentum_states, compiled, _ = torch.load(folder / f"states_{rank}.pt")
        assert plain
        assert compiled
        assert plain_states[0] == plain_states[1] == plain_states[2]
        assert momentum
        assert momentum_states[0] == momentum_states[1] == momentum_states[2]


def test_name_is_enough():
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="FullyShard", logger=False, enable_checkpointing=False)
    assert type(trainer.strategy) is FullyShard


@pytest.mark.parametrize("step", [2, 3])
def test_resumed_run_of_sharded_weights_is_bitwise_the_uninterrupted_one(folder, step):
    whole, resumed = last(folder, "parts"), last(folder, f"from_{step}")
    assert resumed["global_step"] == whole["global_step"] == 5
    for name, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    for number, state in whole["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(resumed["optimizer_states"][0]["state"][number][key]), value), key


def test_blocks_are_the_outermost_that_repeat_and_single_layers_are_none():
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=12, depth=3, num_heads=2, num_classes=2)
    assert list(blocks(nn.ModuleDict({"network": vit}))) == list(vit.blocks)
    resnet = timm.create_model("resnet18", num_classes=2)
    expected = [block for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4) for block in stage]
    assert list(blocks(resnet)) == expected
    assert list(blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))) == []


def test_time_out_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"Expected `timeout` above 0, got 0:00:00\."):
        FullyShard(timedelta(0))


def test_loss_of_a_peer_is_told_from_other_errors():
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:33168: Connection reset by peer.")
    assert is_loss_of_a_peer(lost)
    assert is_loss_of_a_peer(torch.distributed.DistNetworkError("The client socket has timed out"))
    assert not is_loss_of_a_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_loss_of_a_peer(ValueError("gloo"))
