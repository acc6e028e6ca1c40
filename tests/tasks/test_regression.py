import itertools
import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from masklr.callbacks import StepSeed
from masklr.data import Synthetic
from masklr.layers import DropConnect, DropConnectLinear, Dropout
from masklr.models import MLP, DeepLinear
from masklr.optim import Optim
from masklr.tasks import Regression
from masklr.tasks.mask_penalty import MaskPenalty, masked_inputs_loss
from masklr.tasks.regression import squared_error
from masklr.theory import linear_mae

SGD = Optim(base_lr=0.04, optimizer="sgd", weight_decay=0.0, warmup=0.0)  # 0.01 for 64 samples

MODELS = {
    "no mask": {"sizes": [3, 2, 2]},
    "dropout": {"sizes": [3, 2, 2], "p": 0.4},
    "dropout on two layers": {"sizes": [3, 2, 3, 2], "p": [0.4, 0.25]},
    "groups": {"sizes": [3, 4, 2], "p": 0.4, "mask": "groups", "group_size": 2},
    "weights": {"sizes": [2, 2, 2], "p": [0.5, 0.25], "mask": "dropconnect"},
    "inputs": {"sizes": [3, 2], "input_mask": "units", "input_p": 0.3},
    "patches": {"sizes": [4, 2], "input_mask": "patches", "input_p": 0.3, "patch_size": 2},
    "exact count": {"sizes": [4, 2], "input_mask": "units", "input_p": 0.5, "exact_count": True},
    "exact count of patches": {
        "sizes": [6, 2],
        "input_mask": "patches",
        "input_p": 1 / 3,
        "patch_size": 2,
        "exact_count": True,
    },
    "inputs and dropout": {"sizes": [3, 2, 2], "p": 0.4, "input_mask": "units", "input_p": 0.3},
    "exact count and weights": {
        "sizes": [3, 2, 1],
        "p": [0.0, 0.5],
        "mask": "dropconnect",
        "input_mask": "units",
        "input_p": 1 / 3,
        "exact_count": True,
    },
}


def kept(count, p):
    """All masks of `count` entries with their probability, divided by 1 - p."""
    for entries in itertools.product([0.0, 1.0], repeat=count):
        num_kept = int(sum(entries))
        yield (1 - p) ** num_kept * p ** (count - num_kept), torch.tensor(entries, dtype=torch.float64) / (1 - p)


def input_masks(model):
    """All masks of the inputs with their probability."""
    if model.input_mask == "none":
        return [(1.0, torch.ones(model.sizes[0], dtype=torch.float64))]
    count = model.sizes[0] // model.patch_size
    masks = [(chance, factors.repeat_interleave(model.patch_size)) for chance, factors in kept(count, model.input_p)]
    if model.exact_count:
        number = round(model.sizes[0] * model.input_keep_probability)
        masks = [factors for _, factors in masks if int((factors > 0).sum()) == number]
        theta = model.input_keep_probability
        masks = [(1 / len(masks), (factors > 0).double() / theta) for factors in masks]
    assert sum(chance for chance, _ in masks) == pytest.approx(1)
    return masks


def hidden_masks(model):
    """All choices of masks behind (or, of weights, in) each layer, with their probability."""
    if model.mask == "dropconnect":
        layers = [list(kept(layer.weight.numel(), layer.p)) for layer in model.layers]
        shapes = [layer.weight.shape for layer in model.layers]
    else:
        layers = [
            [
                (chance, factors.repeat_interleave(model.group_size))
                for chance, factors in kept(width // model.group_size, p)
            ]
            for width, p in zip(model.sizes[1:-1], model.drop_probabilities, strict=True)
        ]
        shapes = [(width, 1) for width in model.sizes[1:-1]]
    for choice in itertools.product(*layers):
        chance = math.prod(chance for chance, _ in choice)
        if chance:
            yield chance, [factors.view(shape) for (_, factors), shape in zip(choice, shapes, strict=True)]


def enumerated_loss(model, x, y):
    """Expectation over all masks of the loss, by the definition."""
    total = 0.0
    for chance, factors in hidden_masks(model):
        product = torch.eye(model.sizes[0], dtype=torch.float64)
        for i, weight in enumerate(model.weights):
            product = (weight * factors[i] if model.mask == "dropconnect" else weight) @ product
            if model.mask != "dropconnect" and i < len(factors):
                product = factors[i] * product
        for input_chance, input_factors in input_masks(model):
            total += chance * input_chance * ((x * input_factors) @ product.T - y).square().sum() / len(x)
    return total


def population(inputs, outputs, **options):
    """(x, y, C) of a small correlated set."""
    data = Synthetic(
        spectrum=[2.0, 1.0][: min(inputs, outputs)],
        num_inputs=inputs,
        num_outputs=outputs,
        autocorrelation=0.6,
        num_samples=16,
        batch_size=16,
        noise=0.3,
        **options,
    )
    images = data.training_images()
    return images.x, images.y, data


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_penalty_is_what_all_masks_enumerated_add_to_the_loss(options):
    model = DeepLinear(init_seed=0, **options).double()
    x, y, data = population(model.sizes[0], model.sizes[-1])
    penalty = MaskPenalty(model, data.second_moment)(model)
    added = enumerated_loss(model, x, y) - squared_error(x @ model.product().T, y)
    torch.testing.assert_close(penalty, added, rtol=1e-10, atol=1e-12)
    assert (penalty.item() == 0) == ("p" not in options and "input_p" not in options)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_training_step_with_the_closed_form_is_the_expected_step_with_sampled_masks(
    options, make_trainer, tmp_path, read_metrics
):
    model = DeepLinear(init_seed=0, **options).double()
    x, y, data = population(model.sizes[0], model.sizes[-1])
    expected = enumerated_loss(model, x, y)
    gradients = torch.autograd.grad(expected, model.weights)
    weights = [w.detach() - 0.01 * g for w, g in zip(model.weights, gradients, strict=True)]
    task = Regression(model, Optim(base_lr=0.16, optimizer="sgd", weight_decay=0.0, warmup=0), penalty="closed_form")
    trainer = make_trainer(
        tmp_path,
        max_steps=1,
        precision="64-true",
        val_check_interval=1,
        num_sanity_val_steps=-1,
        callbacks=[StepSeed(0)],
    )
    trainer.fit(task, data)
    for weight, wanted in zip(model.weights, weights, strict=True):
        torch.testing.assert_close(weight.detach(), wanted, rtol=1e-9, atol=1e-12)
    found = read_metrics(tmp_path)
    assert found["train/loss"][0] == pytest.approx(expected.item(), rel=1e-6)
    assert found["val/objective"][0] == pytest.approx(expected.item(), rel=1e-6)
    assert found["val/objective"][1] == pytest.approx(enumerated_loss(model, x, y).item(), rel=1e-6)
    assert found["val/loss"][1] == pytest.approx(squared_error(x @ model.product().T, y).item(), rel=1e-6)


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("exact_count", [False, True])
@pytest.mark.parametrize("loss_on", ["all", "masked"])
def test_best_linear_autoencoder_of_theory_has_its_loss_and_no_gradient(patch_size, exact_count, loss_on):
    C = Synthetic(autoencode=True, autocorrelation=0.9, num_inputs=8).second_moment
    kind = "units" if patch_size == 1 else "patches"
    model = DeepLinear([8, 8], input_mask=kind, input_p=0.5, patch_size=patch_size, exact_count=exact_count).double()
    best = linear_mae(C, 0.5, patch_size=patch_size, loss_on=loss_on, exact_count=exact_count)
    with torch.no_grad():
        model.weights[0].copy_(best.W)
    if loss_on == "masked":
        loss = masked_inputs_loss(model, C)
    else:
        error = torch.eye(8, dtype=torch.float64) - model.product()
        loss = (error @ C @ error.T).trace() + MaskPenalty(model, C)(model)
    torch.testing.assert_close(loss.detach(), torch.as_tensor(best.loss).double(), rtol=1e-10, atol=0.0)
    (gradient,) = torch.autograd.grad(loss, model.weights)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize(("input_p", "exact_count"), [(0.3, False), (0.5, True)])
def test_loss_on_masked_inputs_is_that_of_all_masks_enumerated(input_p, exact_count):
    model = DeepLinear(
        [8, 3, 8], input_mask="patches", input_p=input_p, patch_size=2, exact_count=exact_count, init_seed=0
    ).double()
    data = Synthetic(autoencode=True, autocorrelation=0.6, num_inputs=8, num_samples=16)
    x = data.training_images().x
    expected = sum(
        chance * squared_error((x * factors) @ model.product().T, x, (factors == 0).expand_as(x))
        for chance, factors in input_masks(model)
    )
    torch.testing.assert_close(masked_inputs_loss(model, data.second_moment), expected, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("exact_count", [False, True])
def test_training_on_masked_inputs_counts_their_errors_alone(exact_count, make_trainer, tmp_path, read_metrics):
    model = DeepLinear([6, 6], input_mask="units", input_p=0.5, exact_count=exact_count, init_seed=0)
    task = Regression(model, Optim(base_lr=0.2, optimizer="sgd", weight_decay=0.0, warmup=0.0), loss_on="masked")
    data = Synthetic(autoencode=True, autocorrelation=0.9, num_inputs=6, num_samples=64)
    torch.manual_seed(3)
    keep = model.draw_input_keep(64)
    x = data.training_images().x.float()
    by_hand = ((model(x, keep) - x)[~keep] ** 2).sum() / 64
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="`self.trainer` reference is not registered"):
        assert task.training_step((x, x), 0).item() == pytest.approx(by_hand.item(), rel=1e-5)
    trainer = make_trainer(
        tmp_path, max_steps=300, val_check_interval=300, num_sanity_val_steps=-1, log_every_n_steps=300
    )
    trainer.fit(task, data)
    found = read_metrics(tmp_path)["val/objective"]
    best = float(linear_mae(data.second_moment, 0.5, loss_on="masked", exact_count=exact_count).loss)
    assert found[0] > 2 * best
    assert best < found[300] < 1.1 * best


@pytest.mark.parametrize(
    ("penalty", "precision", "base_lr", "tolerance"),
    [("sampled", "32-true", 0.06, 0.15), ("closed_form", "64-true", 0.12, 0.01)],
)
def test_t3_dropout_shrinks_and_truncates_to_the_spectrum_of_theory(
    penalty, precision, base_lr, tolerance, make_trainer, tmp_path, read_metrics
):
    model = DeepLinear([4, 4, 4], p=0.75, init_scale=0.7, init_seed=0)
    trainer = make_trainer(
        tmp_path,
        max_steps=400,
        precision=precision,
        val_check_interval=400,
        log_every_n_steps=400,
        callbacks=[StepSeed(0)],
    )
    # The peak rate is base_lr * batch / 256.
    optim = Optim(base_lr=base_lr / 16, optimizer="sgd", weight_decay=0.0, warmup=0.0)
    data = Synthetic(spectrum=[4.0, 3.0, 2.0, 1.0], num_samples=1024, batch_size=1024)
    trainer.fit(Regression(model, optim, penalty=penalty), data)
    assert model.weights[0].dtype == (torch.float64 if precision == "64-true" else torch.float32)
    sigma = torch.linalg.svdvals(model.product().detach()).double()
    wanted = torch.tensor([1.9, 0.9, 0.0, 0.0]).double()
    torch.testing.assert_close(sigma, wanted, rtol=0.0, atol=tolerance)
    assert 19.699 < read_metrics(tmp_path)["val/objective"][400] < 19.7 * (1 + tolerance / 10)


def test_objective_is_known_only_where_theory_is(make_trainer, tmp_path):
    data = Synthetic(spectrum=[2.0, 1.0], num_samples=16, batch_size=16)
    deep_groups = DeepLinear([2, 2, 2, 2], p=0.5, mask="groups", group_size=2)
    for task, known in (
        (Regression(DeepLinear([2, 2, 2], p=0.5)), True),
        (Regression(deep_groups), False),
        (Regression(MLP([2, 4, 2], p=0.5)), False),
        (Regression(DeepLinear([2, 2, 2]), masks={"layers.0": DropConnect(0.5)}), False),
    ):
        result = make_trainer(tmp_path, logger=False).validate(task, data, verbose=False)[0]
        assert ("val/objective" in result) == known
        assert "val/loss" in result
        tested = make_trainer(tmp_path, logger=False).test(task, data, verbose=False)[0]
        assert tested["test/loss"] == result["val/loss"]


def test_validation_before_training_leaves_nothing_behind(make_trainer, tmp_path):
    data = Synthetic(spectrum=[2.0, 1.0], num_samples=16, batch_size=16)
    task = Regression(DeepLinear([2, 2, 2], p=0.5), SGD, penalty="closed_form")
    make_trainer(tmp_path, logger=False).validate(task, data, verbose=False)
    trainer = make_trainer(tmp_path, logger=False, max_steps=2)
    trainer.fit(task, data)
    assert trainer.global_step == 2


def test_any_network_learns_from_sampled_masks(make_trainer, tmp_path, read_metrics):
    task = Regression(MLP([4, 16, 2], activation="tanh", p=0.1), Optim(base_lr=0.04))
    trainer = make_trainer(
        tmp_path, max_steps=200, val_check_interval=100, num_sanity_val_steps=-1, callbacks=[StepSeed(0)]
    )
    trainer.fit(task, Synthetic(spectrum=[2.0, 1.0], num_inputs=4, num_samples=128, batch_size=32))
    found = read_metrics(tmp_path)["val/loss"]
    assert list(found) == [0, 100, 200]
    assert found[200] < 0.3 * found[0]


def test_closed_form_draws_nothing_and_reads_p_at_every_step(make_trainer, tmp_path, read_metrics):
    class States(pl.Callback):
        def __init__(self):
            self.states = []

        def on_train_batch_start(self, trainer, task, *_):
            task.model.dropouts[0].p = 0.5 * trainer.global_step
            self.states.append(torch.get_rng_state())

        def on_train_batch_end(self, *_):
            self.states.append(torch.get_rng_state())

    model, states = DeepLinear([2, 2, 2], p=0.9, init_seed=0).double(), States()
    x, y, data = population(2, 2)
    losses = []
    for p in (0.0, 0.5):
        model.dropouts[0].p = p
        losses.append(enumerated_loss(model, x, y).item())
    optim = Optim(base_lr=1e-12, optimizer="sgd", weight_decay=0.0)  # stands still
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=0, precision="64-true", callbacks=[states])
    trainer.fit(Regression(model, optim, penalty="closed_form"), data)
    assert list(read_metrics(tmp_path)["train/loss"].values()) == pytest.approx(losses, rel=1e-6)
    assert torch.equal(states.states[0], states.states[1])


def test_masks_are_put_into_the_model():
    model = DeepLinear([4, 4, 2])
    task = Regression(model, masks={"layers.*": DropConnect(0.5, per="sample")})
    assert all(type(layer) is DropConnectLinear and layer.p == 0.5 for layer in task.model.layers)
    perceptron = Regression(MLP([4, 4, 2]), masks={"dropouts.0": Dropout(0.3)}).model
    assert perceptron.dropouts[0].p == 0.3
    with pytest.raises(ValueError, match=r"Expected `masks` to match something, got 'layer\.0'"):
        Regression(DeepLinear([4, 2]), masks={"layer.0": DropConnect(0.5)})


def test_predictions_are_outputs_with_targets_and_positions(make_trainer, tmp_path):
    data = Synthetic(spectrum=[2.0, 1.0], num_inputs=3, num_samples=20, batch_size=8)
    model = DeepLinear([3, 2], input_mask="units", input_p=0.5)
    outputs = make_trainer(tmp_path, logger=False).predict(Regression(model), data)
    found = {name: torch.cat([out[name] for out in outputs]) for name in outputs[0]}
    assert found.keys() == {"outputs", "targets", "positions"}
    images = data.training_images()
    torch.testing.assert_close(found["outputs"], images.x.float() @ model.product().detach().T)
    torch.testing.assert_close(found["targets"], images.y.float())
    assert torch.equal(found["positions"], torch.arange(20))


def test_outputs_of_another_shape_raise_before_they_broadcast():
    with pytest.raises(ValueError, match=r"Expected outputs of the targets' shape \(3, 2\), got \(3, 1\)"):
        squared_error(torch.zeros(3, 1), torch.zeros(3, 2))


BAD = {
    "unknown penalty": ({"penalty": "exact"}, "Expected `penalty` sampled or closed_form, got 'exact'"),
    "unknown loss": ({"loss_on": "visible"}, "Expected `loss_on` all or masked, got 'visible'"),
    "closed form of a perceptron": (
        {"model": MLP([2, 2]), "penalty": "closed_form"},
        "Expected `penalty` sampled, since there is no closed form for a MLP",
    ),
    "closed form of deep groups": (
        {"model": DeepLinear([2, 2, 2, 2], mask="groups", group_size=2), "penalty": "closed_form"},
        "no closed form for `mask` groups on 2 hidden layers",
    ),
    "closed form of masked inputs": (
        {
            "model": DeepLinear([2, 2], input_mask="units", input_p=0.5),
            "penalty": "closed_form",
            "loss_on": "masked",
        },
        "Expected `penalty` sampled beside `loss_on` masked, got closed_form",
    ),
    "closed form of other masks": (
        {"penalty": "closed_form", "masks": {"layers.0": DropConnect(0.5)}},
        "no closed form for `masks` put into the model",
    ),
    "nothing masked": ({"loss_on": "masked"}, "Expected a `model` with an `input_mask` for `loss_on` masked"),
    "no autoencoder": (
        {"model": DeepLinear([3, 2], input_mask="units", input_p=0.5), "loss_on": "masked"},
        "Expected a `model` with as many outputs as inputs, 3, for `loss_on` masked, got 2",
    ),
}


@pytest.mark.parametrize(("options", "sentence"), BAD.values(), ids=BAD)
def test_bad_values_raise_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        Regression(**{"model": DeepLinear([2, 2]), **options})
    assert "\n" not in str(error.value)


def test_data_that_do_not_say_what_the_closed_form_needs_raise(make_trainer, tmp_path):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.zeros(4, 2)))
    trainer = make_trainer(tmp_path, logger=False, max_steps=1, limit_val_batches=0)
    with pytest.raises(ValueError, match="Expected data with a `second_moment` for `penalty` closed_form"):
        trainer.fit(Regression(DeepLinear([2, 2]), penalty="closed_form"), loader, loader)
    model = DeepLinear([2, 2], input_mask="units", input_p=0.5)
    for options in ({"spectrum": [2.0, 1.0]}, {"autoencode": True, "num_inputs": 2, "noise": 0.1}):
        with pytest.raises(ValueError, match="Expected data whose targets are its inputs for `loss_on` masked"):
            make_trainer(tmp_path, logger=False, max_steps=1).fit(
                Regression(model, loss_on="masked"), Synthetic(num_samples=16, **options)
            )


def test_training_step_reads_nothing_from_the_device():
    # On the meta device there is nothing to read: `.item()` and branches on values raise, as they would wait on a GPU.
    for options in ({}, {"loss_on": "masked"}):
        model = DeepLinear([4, 4, 4], p=0.0 if options else 0.5, input_mask="units", input_p=0.5, exact_count=True)
        task = Regression(model, **options).to("meta")
        with pytest.warns(UserWarning, match="`self.trainer` reference is not registered"):
            loss = task.training_step((torch.empty(8, 4, device="meta"), torch.empty(8, 4, device="meta")), 0)
        loss.backward()
        assert all(isinstance(weight.grad, nn.Parameter | torch.Tensor) for weight in model.weights)
