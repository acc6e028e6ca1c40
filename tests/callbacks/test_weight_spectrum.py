import copy

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch

from masklr.callbacks import WeightSpectrum
from masklr.callbacks.spectrum_figure import spectrum_figure


class Weights(pl.Callback):
    """The state at the end of every step, and at the start."""

    def __init__(self):
        self.states = {}

    def on_train_start(self, trainer, module):
        self.states[0] = copy.deepcopy(module.state_dict())

    def on_train_batch_end(self, trainer, module, *_):
        self.states[trainer.global_step] = copy.deepcopy(module.state_dict())


def spectra(folder):
    files = sorted((folder / "spectra" / "weight_spectrum").iterdir())
    return {int(file.stem.removeprefix("step=")): dict(np.load(file)) for file in files}


def effective_rank(sigma):
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


@pytest.fixture(scope="module")
def measured(make_classifier, make_trainer, plain_loaders, tmp_path_factory, read_metrics):
    """20 steps, measured every 7 while loggers log every 50 and validation comes every 5."""
    folder = tmp_path_factory.mktemp("weights")
    weights = Weights()
    trainer = make_trainer(
        folder,
        max_steps=20,
        log_every_n_steps=50,
        val_check_interval=5,
        callbacks=[WeightSpectrum(every_n_steps=7, measures=["effective_rank", "spectral_norm"]), weights],
    )
    trainer.fit(make_classifier(), *plain_loaders())
    return folder, weights.states, read_metrics(folder), trainer


def test_spectra_and_scalars_are_at_the_start_at_the_cadence_and_at_the_end(measured):
    folder, _, metrics, _ = measured
    assert list(spectra(folder)) == [0, 7, 14, 20]
    keys = [key for key in metrics if key.startswith(("weight/", "cost/"))]
    assert len(keys) == 3 * (3 + 1) + 2  # measures and null, of three matrices and their mean; seconds and share
    assert all(list(metrics[key]) == [0, 7, 14, 20] for key in keys)


def test_spectra_are_those_of_the_weights_at_that_step(measured):
    folder, states, _, _ = measured
    for step, found in spectra(folder).items():
        assert set(found) == {"network.0", "network.4", "network.8"}
        for name, sigma in found.items():
            weight = states[step][f"{name}.weight"].double().flatten(1).numpy()
            np.testing.assert_allclose(sigma, np.linalg.svd(weight, compute_uv=False), rtol=1e-6, atol=1e-7)
    assert not np.allclose(spectra(folder)[0]["network.0"], spectra(folder)[20]["network.0"], rtol=1e-4)


def test_scalars_are_the_measures_of_the_spectra_and_their_means(measured):
    folder, _, metrics, _ = measured
    for step, found in spectra(folder).items():
        ranks = [effective_rank(sigma) for sigma in found.values()]
        for name, rank in zip(found, ranks, strict=True):
            assert metrics[f"weight/{name}/effective_rank"][step] == pytest.approx(rank)
            assert metrics[f"weight/{name}/spectral_norm"][step] == pytest.approx(found[name].max())
        assert metrics["weight/mean/effective_rank"][step] == pytest.approx(sum(ranks) / 3)


def test_null_is_the_effective_rank_of_a_gaussian_matrix_of_that_shape(measured):
    _, _, metrics, _ = measured
    draws = np.random.default_rng(0).standard_normal((200, 10, 32))
    ranks = [effective_rank(np.linalg.svd(draw, compute_uv=False)) for draw in draws]
    null = metrics["weight/network.8/effective_rank_null"]
    assert len(set(null.values())) == 1
    assert abs(null[0] - np.mean(ranks)) < 5 * np.std(ranks)  # one draw against their spread


def test_scalars_are_in_callback_metrics_and_costs_are_real(measured):
    _, _, metrics, trainer = measured
    assert trainer.callback_metrics["weight/mean/effective_rank"] == pytest.approx(
        metrics["weight/mean/effective_rank"][20]
    )
    assert all(0 < seconds < 5 for seconds in metrics["cost/weight_spectrum/seconds"].values())
    assert all(0 < share < 1 for share in metrics["cost/weight_spectrum/share"].values())


def test_step_that_stands_still_while_gradients_accumulate_is_measured_once(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics
):
    trainer = make_trainer(
        tmp_path, max_steps=4, accumulate_grad_batches=2, callbacks=[WeightSpectrum(every_n_steps=2)]
    )
    trainer.fit(make_classifier(), *plain_loaders())
    assert list(read_metrics(tmp_path)["weight/mean/stable_rank"]) == [0, 2, 4]


def test_resumed_run_does_not_measure_its_first_step_again(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics
):
    trainer = make_trainer(tmp_path / "a", max_steps=4, callbacks=[WeightSpectrum(every_n_steps=2)])
    trainer.fit(make_classifier(), *plain_loaders(num_train=128))
    trainer.save_checkpoint(tmp_path / "step4.ckpt")
    trainer = make_trainer(tmp_path / "b", max_steps=8, callbacks=[WeightSpectrum(every_n_steps=2)])
    trainer.fit(make_classifier(), *plain_loaders(num_train=128), ckpt_path=tmp_path / "step4.ckpt", weights_only=True)
    assert list(read_metrics(tmp_path / "b")["weight/mean/stable_rank"]) == [6, 8]


def test_one_callback_in_two_trainers_measures_both_runs_alike(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics
):
    callback, found = WeightSpectrum(every_n_steps=3), []
    for name in ("first", "second"):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path / name, max_steps=6, callbacks=[callback])
        trainer.fit(make_classifier(), *plain_loaders())
        found.append(read_metrics(tmp_path / name)["weight/mean/effective_rank"])
        assert list(spectra(tmp_path / name)) == [0, 3, 6]
    assert list(found[0]) == [0, 3, 6]
    assert found[0] == found[1]


@pytest.mark.usefixtures("compilable")
@pytest.mark.parametrize("how", ["in place", "wrapped", "part wrapped"])
def test_compiled_module_is_measured_under_the_same_names(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics, how
):
    found = []
    for compiled in (False, True):
        module = make_classifier()
        if compiled and how == "in place":
            module.network.compile(backend="eager")
        elif compiled and how == "wrapped":
            module.network = torch.compile(module.network, backend="eager")
        elif compiled:
            module.network[4] = torch.compile(module.network[4], backend="eager")
        folder = tmp_path / str(compiled)
        torch.manual_seed(0)
        trainer = make_trainer(folder, max_steps=2, callbacks=[WeightSpectrum("network", every_n_steps=2)])
        trainer.fit(module, *plain_loaders())
        found.append(spectra(folder))
    assert list(found[0]) == list(found[1]) == [0, 2]
    for step in (0, 2):
        assert set(found[0][step]) == set(found[1][step]) == {"0", "4", "8"}
        for name, sigma in found[0][step].items():
            np.testing.assert_allclose(found[1][step][name], sigma, rtol=1e-5)


def test_timm_resnet_is_measured(make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics):
    module = make_classifier(lambda: timm.create_model("resnet10t", in_chans=1, num_classes=10))
    callback = WeightSpectrum("network", include=["layer*.*.conv1", "fc"], exclude=["layer4.**"])
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[callback]).fit(module, *plain_loaders())
    found = spectra(tmp_path)
    assert list(found) == [0, 1]
    assert set(found[1]) == {"layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1", "fc"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"module": "netwrok"}, "Expected `module` to be a part of Classifier, got 'netwrok'; did you mean network"),
        ({"module": "network.99"}, "got 'network.99'"),
        ({"include": ["network.44"]}, r"`include`.*'network\.44'.*network\.4"),
        ({"exclude": ["nothing*"]}, r"`exclude`.*'nothing\*'"),
    ],
)
def test_names_that_match_nothing_raise_before_training(
    make_classifier, make_trainer, plain_loaders, tmp_path, options, sentence
):
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[WeightSpectrum(**options)])
    with pytest.raises(ValueError, match=sentence):
        trainer.fit(make_classifier(), *plain_loaders())
    assert trainer.global_step == 0
    assert not (tmp_path / "spectra").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"every_n_steps": 0}, "Expected `every_n_steps` of at least 1, got 0"),
        ({"measures": ["effective_rnak"]}, "effective_rank, got 'effective_rnak'"),
    ],
)
def test_bad_options_raise(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        WeightSpectrum(**options)


# ------------------------------------------------------------------------------------------------ products, picture


def transformer():
    options = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 12, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **options)


@pytest.fixture(scope="module")
def products(make_classifier, make_trainer, plain_loaders, tmp_path_factory, read_metrics):
    """A transformer for 4 steps with validations at 0, 2 and 4, with its states and what its layers were given."""
    folder, weights = tmp_path_factory.mktemp("products"), Weights()
    callback = WeightSpectrum(
        "network",
        every_n_steps=2,
        attention_products=True,
        products=[["blocks.*.mlp.fc1", "blocks.*.mlp.fc2"], ["blocks.0.attn.qkv.v", "blocks.0.attn.proj"]],
        weighted=True,
    )
    options = {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": -1}
    trainer = make_trainer(folder, callbacks=[callback, weights], **options)
    trainer.fit(make_classifier(transformer), *plain_loaders())
    return folder, weights.states, read_metrics(folder)


def test_products_are_measured_beside_the_matrices_and_averaged_apart(products):
    folder, states, metrics = products
    found = spectra(folder)[4]
    kinds = {
        "mean_qk": [f"blocks.{i}.attn.qk.{h}" for i in range(2) for h in range(2)],
        "mean_ov": [f"blocks.{i}.attn.ov.{h}" for i in range(2) for h in range(2)],
        "mean_product": ["blocks.0.mlp.fc2*fc1", "blocks.1.mlp.fc2*fc1", "blocks.0.attn.proj*qkv.v"],
    }
    kinds["mean"] = [name for name in found if not any(name in names for names in kinds.values())]
    assert len(kinds["mean"]) == 2 + 2 * 6
    for mean, names in kinds.items():
        ranks = [effective_rank(found[name]) for name in names]
        assert metrics[f"weight/{mean}/effective_rank"][4] == pytest.approx(sum(ranks) / len(ranks))
    fc1, fc2 = (states[4][f"network.blocks.1.mlp.{name}.weight"].double() for name in ("fc1", "fc2"))
    expected = torch.linalg.svdvals(fc2 @ fc1)
    np.testing.assert_allclose(found["blocks.1.mlp.fc2*fc1"], expected, rtol=1e-6)


def test_null_of_a_product_is_that_of_a_product(products):
    _, _, metrics = products
    draws = [np.random.default_rng(i).standard_normal((2, 12, 48)) for i in range(200)]
    ranks = [effective_rank(np.linalg.svd(a @ b.T, compute_uv=False)) for a, b in draws]
    null = metrics["weight/blocks.0.mlp.fc2*fc1/effective_rank_null"][0]
    assert abs(null - np.mean(ranks)) < 5 * np.std(ranks)  # one draw against their spread
    assert null < metrics["weight/blocks.0.mlp.fc1/effective_rank_null"][0] - 1  # a single matrix is flatter


def test_weighted_product_is_the_map_times_the_root_of_the_second_moment_of_its_inputs(
    products, make_classifier, digits
):
    folder, states, metrics = products
    files = sorted((folder / "spectra" / "weight_spectrum_weighted").iterdir())
    assert [file.stem for file in files] == ["step=00000000", "step=00000002", "step=00000004"]
    for step, file in zip((0, 2, 4), files, strict=True):
        module, inputs = make_classifier(transformer).eval(), []
        module.load_state_dict(states[step])
        block = module.network.blocks[1].mlp
        block.fc1.register_forward_pre_hook(lambda layer, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            module(digits[2])
        X = torch.cat(inputs).flatten(0, 1).double()
        # The singular values of (map x C^(1/2)) are those of the outputs over the root of their number.
        outputs = X @ (block.fc2.weight.double() @ block.fc1.weight.double()).T
        expected = torch.linalg.svdvals(outputs.detach()) / len(X) ** 0.5
        np.testing.assert_allclose(np.load(file)["blocks.1.mlp.fc2*fc1"], expected, rtol=1e-4, atol=1e-6)
        key = "weight/blocks.1.mlp.fc2*fc1"
        assert metrics[f"{key}/effective_rank_weighted"][step] == pytest.approx(
            effective_rank(expected.numpy()), rel=1e-4
        )
        assert metrics[f"{key}/samples_weighted"][step] == len(X) == 144 * 5
        assert metrics[f"{key}/effective_rank_weighted_null"][step] > 0
    assert set(np.load(files[0])) == {"blocks.0.mlp.fc2*fc1", "blocks.1.mlp.fc2*fc1", "blocks.0.attn.proj*qkv.v"}
    weighted = metrics["weight/mean_product/effective_rank_weighted"][4]
    assert weighted < metrics["weight/mean_product/effective_rank"][4]


def test_weighted_layer_that_does_not_run_ends_the_run(make_classifier, make_trainer, plain_loaders, tmp_path):
    network = lambda: torch.nn.ModuleDict({"a": torch.nn.Linear(64, 10), "b": torch.nn.Linear(10, 10)})  # noqa: E731
    module = make_classifier(network)
    module.forward = lambda images: module.network["b"](images.flatten(1)[:, :10])
    callback = WeightSpectrum("network", products=[["a", "b"]], weighted=True)
    trainer = make_trainer(tmp_path, max_steps=1, val_check_interval=1, callbacks=[callback])
    with pytest.raises(ValueError, match=r"Layer of 'b\*a' did not run in `forward` of Classifier"):
        trainer.fit(module, *plain_loaders())


def test_a_picture_is_drawn_at_the_end_and_only_on_request(
    products, make_classifier, make_trainer, plain_loaders, tmp_path
):
    folder, _, _ = products
    assert [file.name for file in (folder / "pictures" / "weight_spectrum").iterdir()] == ["step=00000004.png"]
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[WeightSpectrum(picture=False)], limit_val_batches=0)
    trainer.fit(make_classifier(), *plain_loaders())
    assert not (tmp_path / "pictures").exists()


def test_picture_shows_now_initialization_and_null_of_at_most_twelve_matrices():
    now = {f"{i}": torch.tensor([4.0, 2.0, 0.0]) for i in range(30)}
    figure = spectrum_figure(now, {"0": torch.tensor([3.0, 3.0])}, {name: torch.ones(2) for name in now}, 7)
    panels = [ax for ax in figure.axes if ax.get_visible()]
    assert [panels[0].get_title(), panels[-1].get_title(), len(panels)] == ["0", "29", 12]
    lines = {line.get_label(): line.get_ydata().tolist() for line in panels[0].lines}
    null = pytest.approx([10**0.5] * 2)  # of the norm of the present one
    assert lines == {"random, same norm": null, "initialization": [3.0, 3.0], "step 7": [4.0, 2.0]}


def test_initial_spectra_are_in_the_picture_of_a_resumed_run(make_classifier, make_trainer, plain_loaders, tmp_path):
    drawn = {}
    for name, steps, options in (("a", 4, {}), ("b", 8, {"ckpt_path": tmp_path / "a.ckpt", "weights_only": True})):
        callback = WeightSpectrum(every_n_steps=2)
        trainer = make_trainer(tmp_path / name, max_steps=steps, limit_val_batches=0, callbacks=[callback])
        trainer.fit(make_classifier(), *plain_loaders(num_train=128), **options)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        drawn[name] = callback.state_dict()["initial"]
    for name, sigma in spectra(tmp_path / "a")[0].items():
        np.testing.assert_array_equal(drawn["b"][name], sigma)


def test_nan_ends_the_run_or_is_left_out(make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics):
    def spoiled():
        module = make_classifier()
        module.network[4].weight.data[0] = float("inf")
        return module

    trainer = make_trainer(tmp_path / "a", max_steps=1, callbacks=[WeightSpectrum()])
    with pytest.raises(ValueError, match=r"Expected finite weights of 'network\.4', got NaN or infinity at step 0"):
        trainer.fit(spoiled(), *plain_loaders())
    callback = WeightSpectrum(on_nonfinite="skip")
    trainer = make_trainer(tmp_path / "b", max_steps=1, callbacks=[callback], limit_val_batches=0)
    trainer.fit(spoiled(), *plain_loaders())
    assert set(spectra(tmp_path / "b")[0]) == {"network.0", "network.8"}


def test_weighted_without_products_raises():
    with pytest.raises(ValueError, match="Expected `products` to be weighted, got None"):
        WeightSpectrum(weighted=True)


def test_callbacks_that_differ_in_their_products_alone_keep_their_states_apart():
    options = ({}, {"products": [["a", "b"]]}, {"attention_products": True})
    assert len({WeightSpectrum(**each).state_key for each in options}) == 3
    assert WeightSpectrum().state_key == WeightSpectrum().state_key
