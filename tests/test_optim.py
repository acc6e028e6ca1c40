import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from masklr.optim import Optim, layer_scales, parameter_groups


class Rates(pl.Callback):
    """The learning rates with which each optimizer step was taken."""

    def __init__(self):
        self.rates, self.stepped = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.stepped.append(trainer.global_step)


class Line(pl.LightningModule):
    def __init__(self, optim):
        super().__init__()
        self.layer, self.optim = nn.Linear(2, 1), optim

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return self.optim.configure(self, self.trainer)


class Stream(IterableDataset):
    def __iter__(self):
        while True:
            yield (torch.ones(2),)


def rates_of(make_trainer, folder, optim, data, **options):
    rates = Rates()
    options = {"logger": False, **options}
    make_trainer(folder, callbacks=[rates], **options).fit(Line(optim), data)
    assert all(len(set(groups)) == 1 for groups in rates.rates)
    return [groups[0] for groups in rates.rates]


def loader(size=40, batch_size=8):
    return DataLoader(TensorDataset(torch.ones(size, 2)), batch_size)


def expected(step, total, warmup, peak, floor=0.0):
    """Linear warm-up that ends on the peak, then half a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2)


def test_rate_follows_warm_up_and_cosine_by_step_over_epochs(make_trainer, tmp_path):
    optim = Optim(base_lr=0.1, warmup=0.25, min_lr_ratio=0.1)
    rates = rates_of(make_trainer, tmp_path, optim, loader(), max_epochs=4)
    assert rates == pytest.approx([expected(s, 20, 5, 0.1 * 8 / 256, 0.1) for s in range(20)])
    assert max(rates) == rates[4] == pytest.approx(0.1 * 8 / 256)


def test_a_warm_up_of_one_or_more_is_a_number_of_steps(make_trainer, tmp_path):
    rates = rates_of(make_trainer, tmp_path, Optim(base_lr=0.1, warmup=3), loader(), max_steps=9)
    assert rates == pytest.approx([expected(s, 9, 3, 0.1 * 8 / 256) for s in range(9)])


def test_rate_is_scaled_by_the_global_batch_and_counts_accumulated_batches_once(make_trainer, tmp_path):
    optim = Optim(base_lr=0.1, warmup=0.0)
    for options, total in (({"max_epochs": 4}, 12), ({"max_steps": 7}, 7)):  # 5 batches an epoch: 2 + 2 + 1
        rates = rates_of(make_trainer, tmp_path, optim, loader(), accumulate_grad_batches=2, **options)
        assert rates == pytest.approx([expected(s, total, 0, 0.1 * 16 / 256) for s in range(total)])


def test_stream_without_length_follows_max_steps(make_trainer, tmp_path):
    rates = rates_of(make_trainer, tmp_path, Optim(base_lr=0.1, warmup=2), DataLoader(Stream(), 4), max_steps=6)
    assert rates == pytest.approx([expected(s, 6, 2, 0.1 * 4 / 256) for s in range(6)])


def test_stream_without_end_may_have_a_constant_rate(make_trainer, tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 4

    rates = Rates()
    optim = Optim(base_lr=0.1, warmup=2, schedule="constant")
    trainer = make_trainer(tmp_path, callbacks=[rates, Stop()], logger=False, max_epochs=-1)
    trainer.fit(Line(optim), DataLoader(Stream(), 4))
    peak = 0.1 * 4 / 256
    assert [groups[0] for groups in rates.rates] == pytest.approx([peak / 2, peak, peak, peak])


@pytest.mark.parametrize("optim", [Optim(), Optim(schedule="constant", warmup=0.1)])
def test_stream_without_end_cannot_have_a_schedule_that_needs_one(make_trainer, tmp_path, optim):
    with pytest.raises(ValueError, match="Expected `max_steps` or `max_epochs`"):
        rates_of(make_trainer, tmp_path, optim, DataLoader(Stream(), 4), max_epochs=-1)


def test_batch_size_is_found_behind_a_batch_sampler_and_missing_raises(make_trainer, tmp_path):
    data = TensorDataset(torch.ones(40, 2))
    sampled = DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 8, drop_last=False))
    rates = rates_of(make_trainer, tmp_path, Optim(base_lr=0.1, warmup=0.0), sampled, max_steps=2)
    assert rates[0] == pytest.approx(0.1 * 8 / 256)
    whole = DataLoader([(torch.ones(8, 2),)] * 3, batch_size=None)
    with pytest.raises(ValueError, match="`batch_size`"):
        rates_of(make_trainer, tmp_path, Optim(base_lr=0.1, warmup=0.0), whole, max_steps=2)


def test_matrices_are_decayed_and_biases_norms_tokens_and_named_exceptions_are_not(make_mae):
    model = make_mae(encoder_args={"reg_tokens": 1})
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, exempt = ({names[id(p)] for p in group} for group in parameter_groups(model))
    assert decayed | exempt == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not decayed & exempt
    linears = (nn.Linear, nn.Conv2d)
    assert decayed == {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, linears)}
    assert {"mask_token", "encoder.cls_token", "encoder.reg_token"} <= exempt
    assert "encoder.pos_embed" not in decayed | exempt  # fixed


def test_a_learned_position_that_the_encoder_exempts_is_not_decayed(make_mae):
    model = make_mae()
    model.encoder.pos_embed.requires_grad_(True)
    _, exempt = parameter_groups(nn.ModuleDict({"inner": model}))
    assert any(p is model.encoder.pos_embed for p in exempt)


def test_decay_reaches_the_optimizer(make_trainer, tmp_path):
    module = Line(Optim(weight_decay=0.3, betas=(0.8, 0.9)))
    trainer = make_trainer(tmp_path, logger=False, max_steps=1)
    trainer.fit(module, loader())
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(len(g["params"]), g["weight_decay"], g["betas"]) for g in optimizer.param_groups] == [
        (1, 0.3, (0.8, 0.9)),
        (1, 0.0, (0.8, 0.9)),
    ]


def test_sgd_takes_the_step_of_its_formula_with_decay_in_the_gradient(make_trainer, tmp_path):
    torch.manual_seed(0)
    optim = Optim(optimizer="sgd", base_lr=3.2, weight_decay=0.3, momentum=0.5, schedule="constant", warmup=0)
    module = Line(optim)
    weight, bias, (a, b) = module.layer.weight.detach().clone(), module.layer.bias.detach().clone(), (0.0, 0.0)
    make_trainer(tmp_path, max_steps=3, logger=False).fit(module, loader())
    lr = 3.2 * 8 / 256
    for _ in range(3):
        gradient = 2 * (weight.sum() + bias)  # of the square at inputs of one
        a, b = 0.5 * a + gradient + 0.3 * weight, 0.5 * b + gradient
        weight, bias = weight - lr * a, bias - lr * b
    torch.testing.assert_close(module.layer.weight.detach(), weight)
    torch.testing.assert_close(module.layer.bias.detach(), bias)


@pytest.mark.parametrize(
    "options",
    [
        {"base_lr": 0.0},
        {"base_lr": math.nan},
        {"weight_decay": -0.1},
        {"warmup": -1.0},
        {"min_lr_ratio": 1.5},
        {"betas": (0.9, 1.0)},
        {"optimizer": "adam"},
        {"momentum": 1.0, "optimizer": "sgd"},
        {"momentum": 0.9},
    ],
)
def test_values_outside_their_range_raise(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        Optim(**options)


def classifier(**options):
    from masklr.models import Classifier

    sizes = {"embed_dim": 24, "depth": 3, "num_heads": 2, **options}
    return Classifier(num_classes=5, image_size=8, patch_size=2, in_chans=1, backbone_args=sizes)


def test_layer_decay_falls_from_the_head_to_the_patches():
    scales = layer_scales(nn.ModuleDict({"model": classifier()}), 0.5)
    found = {name.removeprefix("model."): scale for name, scale in scales.items()}
    assert found["head.weight"] == found["head.bias"] == 1
    for block in range(3):
        of_block = {scale for name, scale in found.items() if name.startswith(f"backbone.blocks.{block}.")}
        assert of_block == {0.5 ** (3 - block)}
    assert found["backbone.norm.weight"] == 0.5
    stem = ("backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed.proj.weight")
    assert {found[name] for name in stem} == {0.5**4}


def test_layer_decay_is_that_of_timm_for_a_network_with_its_head():
    import timm
    from timm.optim import param_groups_layer_decay

    for name in ("vit_tiny_patch16_224", "resnet10t"):
        network = timm.create_model(name, num_classes=5)
        wanted = {
            id(p): group["lr_scale"]
            for group in param_groups_layer_decay(network, layer_decay=0.7)
            for p in group["params"]
        }
        head = network.get_classifier()
        network.reset_classifier(0)
        ours = layer_scales(nn.ModuleList([network, head]), 0.7)
        for key, parameter in nn.ModuleList([network, head]).named_parameters():
            assert ours[key] == pytest.approx(wanted[id(parameter)]), (name, key)


def test_every_layer_follows_the_schedule_at_its_own_rate(make_trainer, tmp_path):
    class Task(Line):
        def __init__(self, optim):
            super().__init__(optim)
            self.layer = classifier()

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0].view(-1, 1, 8, 8)).square().mean()

    data = DataLoader(TensorDataset(torch.ones(32, 64)), 8)
    optim = Optim(base_lr=0.32, warmup=1, layer_decay=0.5)
    rates, task = Rates(), Task(optim)
    make_trainer(tmp_path, logger=False, callbacks=[rates], max_steps=4).fit(task, data)
    optimizer = task.optimizers().optimizer
    groups = {(group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert groups == {(0.01 * 0.5**i, decay) for i in range(5) for decay in (0.05, 0.0)}
    in_groups = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, in_groups)) == sorted(map(id, task.parameters()))
    for step, found in enumerate(rates.rates):
        factor = expected(step, 4, 1, 1.0)
        assert found == pytest.approx([group["initial_lr"] * factor for group in optimizer.param_groups])


def test_no_layer_decay_is_two_groups_and_a_network_without_layers_is_refused():
    assert {scale for scale in layer_scales(classifier(), 1.0).values()} == {1.0}
    with pytest.raises(ValueError, match=r"Expected a timm backbone for `layer_decay`, got 0\.5 and none"):
        layer_scales(nn.Linear(2, 2), 0.5)
    for value in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"Expected `layer_decay` in \(0, 1\], got"):
            Optim(layer_decay=value)
