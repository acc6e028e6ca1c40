import random

import numpy as np
import pytest
import pytorch_lightning as pl
import scipy.linalg
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from masklr.callbacks import RepresentationSpectrum
from masklr.callbacks.features import pooled
from masklr.callbacks.views import augmented_views, evenly_spaced
from masklr.data.augment import RandomCrop, RandomHorizontalFlip
from tests.two_processes import in_two_processes

LAYERS = ["network.3", "network.4"]


class States(pl.Callback):
    """The state at every validation, the sanity check included."""

    def __init__(self):
        self.states = {}

    def on_validation_end(self, trainer, module):
        self.states[trainer.global_step] = {key: value.clone() for key, value in module.state_dict().items()}


def spectra(folder, name="representation_spectrum"):
    files = sorted((folder / "spectra" / name).iterdir())
    return {int(file.stem.removeprefix("step=")): dict(np.load(file)) for file in files}


def centered_spectrum(features):
    x = features.double().numpy()
    return np.linalg.svd(x - x.mean(0), compute_uv=False)


def effective_rank(sigma):
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def by_hand(module, state, images, layer):
    """Features of `network.{layer}` in evaluation mode, over all images at once."""
    module.load_state_dict(state)
    with torch.no_grad():
        return module.eval().network[: layer + 1](images)


@pytest.fixture(scope="module")
def measured(make_classifier, make_trainer, plain_loaders, tmp_path_factory, read_metrics):
    """20 steps, a validation every 7, the initialization too; validation batches of 50, 50 and 44."""
    folder = tmp_path_factory.mktemp("representations")
    states = States()
    trainer = make_trainer(
        folder,
        max_steps=21,
        val_check_interval=7,
        num_sanity_val_steps=-1,
        log_every_n_steps=50,
        callbacks=[RepresentationSpectrum(LAYERS), states],
    )
    trainer.fit(make_classifier(), *plain_loaders(num_train=700))
    return folder, states.states, read_metrics(folder)


def test_validations_are_measured_at_their_step_and_the_initialization_at_step_0(measured):
    folder, _, metrics = measured
    assert list(spectra(folder)) == [0, 7, 14, 21]
    keys = [key for key in metrics if key.startswith(("representation/", "cost/"))]
    assert len(keys) == 3 * 4 + 2 + 2
    assert all(list(metrics[key]) == [0, 7, 14, 21] for key in keys)


def test_spectra_are_those_of_centered_features_over_the_whole_split(measured, make_classifier, digits):
    folder, states, metrics = measured
    module = make_classifier()
    for step, found in spectra(folder).items():
        for layer in (3, 4):
            features = by_hand(module, states[step], digits[2], layer).mean((2, 3))
            sigma = centered_spectrum(features)
            np.testing.assert_allclose(found[f"network.{layer}"], sigma, rtol=1e-5, atol=1e-5 * sigma[0])
            logged = metrics[f"representation/network.{layer}/effective_rank"][step]
            assert logged == pytest.approx(effective_rank(sigma), rel=1e-4)
    assert not np.allclose(spectra(folder)[0]["network.4"], spectra(folder)[21]["network.4"], rtol=1e-2)


def test_null_is_that_of_gaussian_features_of_that_count(measured):
    _, _, metrics = measured
    draws = np.random.default_rng(0).standard_normal((50, 144, 8))
    ranks = [effective_rank(np.linalg.svd(x - x.mean(0), compute_uv=False)) for x in draws]
    null = metrics["representation/network.4/effective_rank_null"]
    assert len(set(null.values())) == 1
    assert abs(null[0] - np.mean(ranks)) < 5 * np.std(ranks)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers": ["4"], "pool": "tokens"}, lambda net, x: net[:5](x).flatten(2).transpose(1, 2).flatten(0, 1)),
        ({"layers": ["4"], "pool": "first"}, lambda net, x: net[:5](x)[:, :, 0, 0]),
        ({"layers": ["7"]}, lambda net, x: net[:8](x)),
        ({"layers": []}, lambda net, x: net(x)),
    ],
)
def test_pools_and_the_output_of_forward(
    make_classifier, make_trainer, plain_loaders, tmp_path, digits, options, expected
):
    module = make_classifier()
    callback = RepresentationSpectrum(module="network", **options)
    make_trainer(tmp_path, callbacks=[callback]).validate(module, plain_loaders()[1], verbose=False)
    name = options["layers"][0] if options["layers"] else "output"
    with torch.no_grad():
        sigma = centered_spectrum(expected(module.eval().network, digits[2]))
    found = spectra(tmp_path)[0]
    assert set(found) == {name}
    np.testing.assert_allclose(found[name], sigma, rtol=1e-5, atol=1e-5 * sigma[0])


def test_spectrum_does_not_depend_on_the_validation_batch_size(make_classifier, make_trainer, plain_loaders, tmp_path):
    found = []
    for size in (144, 13):
        callback = RepresentationSpectrum(["network.4"])
        trainer = make_trainer(tmp_path / str(size), callbacks=[callback])
        trainer.validate(make_classifier(), plain_loaders(val_batch_size=size)[1], verbose=False)
        found.append(spectra(tmp_path / str(size))[0]["network.4"])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_default_sanity_check_is_not_recorded(make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics):
    callback = RepresentationSpectrum(["network.4"])
    trainer = make_trainer(tmp_path, max_steps=4, val_check_interval=4, num_sanity_val_steps=2, callbacks=[callback])
    trainer.fit(make_classifier(), *plain_loaders())
    assert list(spectra(tmp_path)) == [4]
    assert list(read_metrics(tmp_path)["representation/mean/effective_rank"]) == [4]


def test_one_callback_in_two_trainers_measures_both_runs_alike(make_classifier, make_trainer, plain_loaders, tmp_path):
    callback, found = RepresentationSpectrum(["network.4"]), []
    for name in ("first", "second"):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path / name, max_steps=4, val_check_interval=2, callbacks=[callback])
        trainer.fit(make_classifier(), *plain_loaders())
        found.append(spectra(tmp_path / name))
    assert list(found[0]) == list(found[1]) == [2, 4]
    np.testing.assert_array_equal(found[0][4]["network.4"], found[1][4]["network.4"])


@pytest.mark.usefixtures("compilable")
@pytest.mark.parametrize("how", ["in place", "wrapped", "part wrapped"])
def test_layer_of_a_compiled_module_is_really_measured(make_classifier, make_trainer, plain_loaders, tmp_path, how):
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
        callback = RepresentationSpectrum(["4", "7"], module="network")
        # Compiled code is there, without hooks, from training and from validation before the second measurement.
        trainer = make_trainer(folder, max_steps=4, val_check_interval=2, callbacks=[callback])
        trainer.fit(module, *plain_loaders(batch_size=50, val_batch_size=48))
        found.append(spectra(folder))
    assert list(found[0]) == list(found[1]) == [2, 4]
    for step in (2, 4):
        assert set(found[0][step]) == set(found[1][step]) == {"4", "7"}
        for name, sigma in found[0][step].items():
            np.testing.assert_allclose(found[1][step][name], sigma, rtol=1e-4, atol=1e-5)


def test_features_are_computed_in_the_precision_of_the_trainer(make_classifier, make_trainer, plain_loaders, tmp_path):
    dtypes = []
    module = make_classifier()
    module.network[4].register_forward_hook(lambda layer, args, output: dtypes.append(output.dtype))
    trainer = make_trainer(tmp_path, precision="bf16-mixed", callbacks=[RepresentationSpectrum(["network.4"])])
    trainer.validate(module, plain_loaders()[1], verbose=False)
    assert dtypes == [torch.bfloat16] * 6  # the validation step and the measurement


def test_timm_resnet_is_measured_and_a_checkpoint_can_watch(make_classifier, make_trainer, plain_loaders, tmp_path):
    import timm  # here, so that further processes need not

    module = make_classifier(lambda: timm.create_model("resnet10t", in_chans=1, num_classes=10), lr=1e-3)
    watch = ModelCheckpoint(tmp_path / "best", monitor="representation/mean/effective_rank", mode="max")
    callback = RepresentationSpectrum(["layer[12]", "global_pool"], module="network")
    options = {"max_steps": 2, "val_check_interval": 1, "enable_checkpointing": True}
    trainer = make_trainer(tmp_path, callbacks=[callback, watch], **options)
    trainer.fit(module, *plain_loaders())
    found = spectra(tmp_path)
    assert set(found[2]) == {"layer1", "layer2", "global_pool"}
    best = max(np.mean([effective_rank(sigma) for sigma in found[step].values()]) for step in (1, 2))
    assert watch.best_model_score.item() == pytest.approx(best, rel=1e-4)


class Odd(pl.LightningModule):
    """Layers that do not run, run twice, or give no features."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.twice = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 3)
        self.scalar = nn.Flatten(0)

    def forward(self, images):
        self.scalar(images)
        return self.twice(self.twice(self.used(images)))

    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        ("unused", "Layer 'unused' did not run in `forward` of Odd"),
        ("twice", "Layer 'twice' runs more than once"),
        ("scalar", r"Expected layer 'scalar' to give features of 2 to 4 axes, got an output of shape \(12,\)"),
    ],
)
def test_layer_that_cannot_be_measured_raises(make_trainer, tmp_path, layer, sentence):
    trainer = make_trainer(tmp_path, callbacks=[RepresentationSpectrum([layer])])
    module = Odd()
    with pytest.raises(ValueError, match=sentence):
        trainer.validate(module, torch.utils.data.DataLoader(torch.randn(6, 4), 3), verbose=False)
    assert not any(part._forward_hooks for part in module.modules())
    assert not (tmp_path / "spectra").exists()


def test_batches_of_tensors_and_of_dicts_are_taken_by_index_and_key(make_trainer, tmp_path):
    rows = torch.randn(6, 4)
    for name, data, inputs in (("a", list(rows), 0), ("b", [{"image": row} for row in rows], "image")):
        trainer = make_trainer(tmp_path / name, callbacks=[RepresentationSpectrum(inputs=inputs)])
        trainer.validate(Odd(), torch.utils.data.DataLoader(data, 3), verbose=False)
        assert set(spectra(tmp_path / name)[0]) == {"output"}
    trainer = make_trainer(tmp_path / "c", callbacks=[RepresentationSpectrum(inputs="picture")])
    with pytest.raises(ValueError, match="Expected a tensor at `inputs`='picture' of the batch, which is a dict"):
        trainer.validate(Odd(), torch.utils.data.DataLoader(data, 3), verbose=False)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"layers": ["network.44"]},
            r"Expected `layers` to match something, got 'network.44'; did you mean network\.4",
        ),
        ({"layers": ["net*.*.*"]}, r"got 'net\*\.\*\.\*'"),
        ({"module": "netwrok"}, "Expected `module` to be a part of Classifier, got 'netwrok'; did you mean network"),
    ],
)
def test_names_that_match_nothing_raise_before_anything_runs(
    make_classifier, make_trainer, plain_loaders, tmp_path, options, sentence
):
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[RepresentationSpectrum(**options)])
    with pytest.raises(ValueError, match=sentence):
        trainer.fit(make_classifier(), *plain_loaders())
    assert trainer.global_step == 0


def test_unknown_measure_raises():
    with pytest.raises(ValueError, match="stable_rank, got 'stable_rnk'"):
        RepresentationSpectrum(measures=["stable_rnk"])


def test_mean_of_bf16_tokens_is_taken_in_float32():
    tokens = torch.full((1, 1000, 1), 1.0, dtype=torch.bfloat16)
    tokens[0, :3] = 2.0
    assert pooled(tokens, "mean", "x").item() == pytest.approx(1.003, abs=1e-6)


def test_first_element_of_a_tuple_is_measured_and_other_outputs_raise():
    assert torch.equal(pooled((torch.ones(2, 3), None), "mean", "x"), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"layer 'x' .* got an output a dict"):
        pooled({"a": torch.ones(2, 3)}, "mean", "x")


# ------------------------------------------------------------------------------------- measures, and what stands beside


def validated(make_trainer, folder, module, loader, callback, **options):
    make_trainer(folder, callbacks=[callback], **options).validate(module, loader, verbose=False)


def test_measures_are_of_centered_features_unless_named_otherwise(
    make_classifier, make_trainer, plain_loaders, tmp_path, digits, read_metrics
):
    names = ["rankme", "effective_rank", "effective_rank_uncentered", "participation_ratio", "alpha_req", "hill_alpha"]
    module = make_classifier()
    callback = RepresentationSpectrum(["network.7"], measures=[*names, "numerical_rank"])
    validated(make_trainer, tmp_path, module, plain_loaders()[1], callback)
    features = by_hand(module, module.state_dict(), digits[2], 7).double().numpy()
    sigma, whole = centered_spectrum(torch.from_numpy(features)), np.linalg.svd(features, compute_uv=False)
    assert effective_rank(whole) < 0.8 * effective_rank(sigma), "the offset must matter"
    lam = sigma[sigma > 1e-6 * sigma[0]] ** 2
    slope = np.polyfit(np.log(np.arange(1, len(lam) + 1)), np.log(lam), 1)[0]
    expected = {
        "effective_rank": effective_rank(sigma),
        "effective_rank_uncentered": effective_rank(whole),
        "rankme": effective_rank(whole),
        "participation_ratio": (sigma**2).sum() ** 2 / (sigma**4).sum(),
        "alpha_req": -slope,
        "alpha_req_values": len(lam),
        "hill_alpha_values": len(lam),
        "numerical_rank_values": len(lam),
        "samples": 144,
    }
    logged = {key: value[0] for key, value in read_metrics(tmp_path).items()}
    for name, value in expected.items():
        assert logged[f"representation/network.7/{name}"] == pytest.approx(value, rel=1e-4), name
    assert "representation/mean/samples" not in logged
    assert not [key for key in logged if "lidar" in key or "skipped" in key or "repeated" in key]


def test_fewer_samples_than_dimensions_show_in_the_companion(make_trainer, tmp_path, read_metrics):
    callback = RepresentationSpectrum(measures=["effective_rank", "alpha_req"])
    images = torch.randn(9, 40)
    validated(make_trainer, tmp_path, identity(), torch.utils.data.DataLoader(images, 4), callback)
    logged = {key: value[0] for key, value in read_metrics(tmp_path).items()}
    assert logged["representation/output/samples"] == 9
    assert logged["representation/output/alpha_req_values"] == 8
    assert logged["representation/output/effective_rank"] <= 8
    assert logged["representation/output/effective_rank_null"] <= 8
    assert spectra(tmp_path)[0]["output"].shape == (9,)


def test_only_singular_values_above_a_millionth_of_the_first_count_in_the_tail(make_trainer, tmp_path, read_metrics):
    images = torch.randn(500, 9, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -8, 9)
    callback = RepresentationSpectrum(measures=["alpha_req"])
    validated(make_trainer, tmp_path, identity(), torch.utils.data.DataLoader(images, 100), callback)
    logged = read_metrics(tmp_path)
    assert logged["representation/output/alpha_req_values"][0] == 6
    sigma = centered_spectrum(images)[:6]
    slope = np.polyfit(np.log(np.arange(1, 7)), 2 * np.log(sigma), 1)[0]
    assert logged["representation/output/alpha_req"][0] == pytest.approx(-slope, rel=1e-4)


class Identity(pl.LightningModule):
    """Features are the images."""

    def forward(self, images):
        return images

    def validation_step(self, batch, batch_idx):
        pass


def identity():
    return Identity()


def test_representation_that_collapses_ends_no_run(make_trainer, tmp_path, read_metrics):
    callback = RepresentationSpectrum(measures=["effective_rank", "alpha_req", "frobenius_norm", "rankme"])
    images = torch.full((6, 4), 0.3)
    validated(make_trainer, tmp_path, identity(), torch.utils.data.DataLoader(images, 4), callback)
    logged = {key: v[0] for key, v in read_metrics(tmp_path).items() if key.startswith("representation/output")}
    assert logged == {
        "representation/output/frobenius_norm": 0,
        "representation/output/rankme": pytest.approx(1, abs=1e-4),
        "representation/output/samples": 6,
    }


# ------------------------------------------------------------------------------------------------ what is not finite


@pytest.fixture
def spoiled():
    images = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    images[3, 1], images[8, 2] = torch.nan, torch.inf
    return images


def test_features_that_are_not_finite_raise_with_layer_and_step(make_trainer, tmp_path, spoiled):
    with pytest.raises(
        ValueError, match="NaN or infinity in 2 samples of layer 'output' at step 0; `on_nonfinite: skip`"
    ):
        validated(make_trainer, tmp_path, identity(), torch.utils.data.DataLoader(spoiled, 4), RepresentationSpectrum())
    assert not (tmp_path / "spectra").exists()


def test_samples_that_are_not_finite_are_skipped_and_counted_if_asked(make_trainer, tmp_path, spoiled, read_metrics):
    callback = RepresentationSpectrum(on_nonfinite="skip")
    validated(make_trainer, tmp_path, identity(), torch.utils.data.DataLoader(spoiled, 4), callback)
    logged = {key: value[0] for key, value in read_metrics(tmp_path).items()}
    assert logged["representation/output/samples"] == 8
    assert logged["representation/output/samples_skipped"] == 2
    rest = spoiled[spoiled.isfinite().all(1)]
    np.testing.assert_allclose(spectra(tmp_path)[0]["output"], centered_spectrum(rest), rtol=1e-6)


def test_a_layer_without_a_finite_sample_has_no_measures_if_asked(make_trainer, tmp_path, read_metrics):
    callback = RepresentationSpectrum(on_nonfinite="skip")
    images = torch.full((6, 4), torch.nan)
    validated(make_trainer, tmp_path, identity(), torch.utils.data.DataLoader(images, 4), callback)
    logged = {key: v[0] for key, v in read_metrics(tmp_path).items() if key.startswith("representation")}
    assert logged == {"representation/output/samples": 0, "representation/output/samples_skipped": 6}


# ------------------------------------------------------------------------------------------------ LiDAR


class Jitter(nn.Module):
    """Noise of torch's, numpy's and Python's generators, one draw for the whole batch, in training mode alone."""

    def forward(self, images):
        assert self.training
        noise = torch.rand(1).item() + np.random.rand() + random.random()  # noqa: NPY002
        return images * (1 + 0.1 * noise) + 0.1 * torch.randn(images.shape[1:])


def lidar_by_hand(views, delta=1e-6):
    """From features (q, n, d), with loops."""
    views = views.double().numpy()
    q, n, d = views.shape
    means = views.mean(0)
    between = sum(np.outer(m - means.mean(0), m - means.mean(0)) for m in means) / n
    within = sum(np.outer(views[v, i] - means[i], views[v, i] - means[i]) for v in range(q) for i in range(n)) / (n * q)
    root = np.linalg.inv(scipy.linalg.sqrtm(within + delta * np.eye(d)).real)
    lam = np.linalg.eigvalsh(root @ between @ root)
    p = lam[lam > 0] / lam[lam > 0].sum()
    return float(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize(("size", "lidar_images"), [(144, 1000), (13, 1000), (13, 40)])
def test_lidar_is_that_of_views_drawn_by_position(
    make_classifier, make_trainer, plain_loaders, tmp_path, digits, read_metrics, size, lidar_images
):
    module = make_classifier()
    callback = RepresentationSpectrum(
        ["network.4"], lidar_views=3, lidar_images=lidar_images, augmentation=[RandomCrop(1), Jitter()]
    )
    validated(make_trainer, tmp_path, module, plain_loaders(val_batch_size=size)[1], callback)
    chosen = evenly_spaced(torch.arange(144), lidar_images, 144).nonzero()[:, 0]
    augmentation = nn.Sequential(RandomCrop(1), Jitter())
    with torch.random.fork_rng():
        views = augmented_views(digits[2][chosen], chosen, augmentation, 3)
    features = torch.stack([by_hand(module, module.state_dict(), view, 4).mean((2, 3)) for view in views])
    logged = read_metrics(tmp_path)
    assert logged["representation/network.4/lidar"][0] == pytest.approx(lidar_by_hand(features), rel=1e-4)
    assert logged["representation/network.4/lidar_images"][0] == min(lidar_images, 144)
    assert logged["representation/network.4/samples"][0] == 144, "the spectrum is of the images themselves"


def test_views_of_an_image_differ_and_do_not_depend_on_its_batch():
    images = torch.rand(6, 1, 8, 8)
    places = torch.tensor([4, 9, 11, 12, 30, 31])
    whole = augmented_views(images, places, Jitter(), 4)
    part = augmented_views(images[2:4], places[2:4], Jitter(), 4)
    assert torch.equal(whole[:, 2:4], part)
    assert len({tuple(view.flatten().tolist()) for view in whole[:, 0]}) == 4
    alike = augmented_views(images[:1].expand(3, -1, -1, -1), torch.tensor([4, 9, 4]), Jitter(), 1)[0]
    assert torch.equal(alike[0], alike[2])
    assert not torch.allclose(alike[0], alike[1])


def test_evenly_spaced_positions_are_as_many_as_asked_for():
    for size in (7, 100, 144):
        for count in (2, 6, 7):
            chosen = evenly_spaced(torch.arange(size + 5), count, size).nonzero()[:, 0]
            assert len(chosen) == count
            assert chosen.diff().max() - chosen.diff().min() <= 1
    assert evenly_spaced(torch.arange(5), 9, 5).all()
    assert evenly_spaced(torch.arange(5), 3, None).tolist() == [True, True, True, False, False]


def test_module_draws_views_with_its_own_augmentation(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics
):
    logged = []
    for given in (None, [RandomHorizontalFlip(), Jitter()]):
        module = make_classifier()
        module.augmentation = nn.Sequential(RandomHorizontalFlip(), Jitter()) if given is None else None
        callback = RepresentationSpectrum(["network.4"], lidar_views=4, augmentation=given)
        folder = tmp_path / str(given is None)
        validated(make_trainer, folder, module, plain_loaders()[1], callback)
        logged.append(read_metrics(folder)["representation/network.4/lidar"][0])
    assert logged[0] == logged[1] > 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lidar_views": 1}, "Expected `lidar_views` of 0 or at least 2, got 1: one view of an image has no scatter"),
        ({"lidar_views": 2, "lidar_images": 1}, "Expected `lidar_images` of at least 2, got 1"),
        ({"lidar_views": 2, "pool": "tokens"}, "for `lidar_views`, got 'tokens'"),
        ({"lidar_views": 2}, "Expected `augmentation` to draw views with, since Classifier has none of its own"),
        ({"weights": "ema"}, "Expected a callback `EMAWeightAveraging` in the trainer for `weights` 'ema'"),
        ({"measures": ["rankme_uncentred"]}, "such as rankme"),
    ],
)
def test_options_that_cannot_be_raise_before_anything_runs(
    make_classifier, make_trainer, plain_loaders, tmp_path, options, sentence
):
    with pytest.raises(ValueError, match=sentence):
        validated(make_trainer, tmp_path, make_classifier(), plain_loaders()[1], RepresentationSpectrum(**options))


def test_augmentation_that_changes_nothing_raises(make_classifier, make_trainer, plain_loaders, tmp_path):
    callback = RepresentationSpectrum(lidar_views=2, augmentation=[nn.Identity()])
    with pytest.raises(ValueError, match="Expected `augmentation` to change images"):
        validated(make_trainer, tmp_path, make_classifier(), plain_loaders()[1], callback)


# ------------------------------------------------------------------------------------------------ averaged weights


class Averages(States):
    """The averaged state as well."""

    def __init__(self, averaging):
        super().__init__()
        self.averaging, self.averages = averaging, {}

    def on_validation_end(self, trainer, module):
        super().on_validation_end(trainer, module)
        average = self.averaging._average_model.module
        self.averages[trainer.global_step] = {key: value.clone() for key, value in average.state_dict().items()}


@pytest.mark.parametrize("weights", ["current", "ema", None])
def test_current_and_averaged_weights_are_measured_and_left_as_they_are(
    make_classifier, make_trainer, plain_loaders, tmp_path, digits, weights, averaged_run, read_metrics
):
    module = make_classifier()
    averaging = EMAWeightAveraging(decay=0.5)
    averages = Averages(averaging)
    watched = [] if weights is None else [RepresentationSpectrum(["network.4"], weights=weights)]
    trainer = make_trainer(
        tmp_path, max_steps=6, val_check_interval=3, num_sanity_val_steps=-1, callbacks=[*watched, averaging, averages]
    )
    torch.manual_seed(0)
    trainer.fit(module, *plain_loaders())
    for step in (3, 6):
        current, average = averages.states[step], averages.averages[step]
        assert not torch.equal(current["network.0.weight"], average["network.0.weight"])
        if weights:
            state = current if weights == "current" else average
            sigma = centered_spectrum(by_hand(make_classifier(), state, digits[2], 4).mean((2, 3)))
            ending = "_ema" if weights == "ema" else ""
            found = spectra(tmp_path, f"representation_spectrum{ending}")[step]["network.4"]
            np.testing.assert_allclose(found, sigma, rtol=1e-4, atol=1e-4 * sigma[0])
            logged = read_metrics(tmp_path)[f"representation/network.4/effective_rank{ending}"][step]
            assert logged == pytest.approx(effective_rank(sigma), rel=1e-3)
    # Bit for bit the run that nobody watched, in both sets of weights and in the loss, which is of the average.
    loss = read_metrics(tmp_path)["val/loss"]
    found = {"states": averages.states, "averages": averages.averages}
    first = averaged_run.setdefault("first", (loss, found))
    assert first[0] == loss
    for kind in found:
        for step, state in found[kind].items():
            assert all(torch.equal(state[key], first[1][kind][step][key]) for key in state)


@pytest.fixture(scope="module")
def averaged_run():
    return {}


def test_several_in_one_trainer_write_apart_or_raise(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics
):
    callbacks = [
        RepresentationSpectrum(["network.4"]),
        RepresentationSpectrum(["network.7"]),
        RepresentationSpectrum(["network.4"], weights="ema"),
        EMAWeightAveraging(decay=0.5),
    ]
    options = {"max_steps": 3, "val_check_interval": 3}
    make_trainer(tmp_path, callbacks=callbacks, **options).fit(make_classifier(), *plain_loaders())
    first, second = spectra(tmp_path)[3], spectra(tmp_path, "representation_spectrum_2")[3]
    averaged = spectra(tmp_path, "representation_spectrum_ema")[3]
    assert (list(first), list(second), list(averaged)) == (["network.4"], ["network.7"], ["network.4"])
    assert not np.allclose(first["network.4"], averaged["network.4"], rtol=1e-3)
    metrics = read_metrics(tmp_path)
    for key in ("network.4/effective_rank", "mean/effective_rank_ema", "network.4/samples_ema", "mean_2/stable_rank"):
        assert f"representation/{key}" in metrics
    again = make_trainer(
        tmp_path / "again", callbacks=[callbacks[0], RepresentationSpectrum(["network.[45]"], pool="first")]
    )
    with pytest.raises(ValueError, match=r"no other RepresentationSpectrum measures, got 'network\.4' in two"):
        again.validate(make_classifier(), plain_loaders()[1])


# ------------------------------------------------------------------------------------------------ two processes


def in_one_of_two(rank, folder):
    """One of two processes that validate as Lightning's DDP has it."""
    for name in RUNS:
        validate(folder / name, name, strategy="ddp", devices=2)


RUNS = {
    # 187 validation images: 94 and 93, in batches of which the last is smaller.
    "masklr": {"layers": ["network.4", "network.7"], "lidar_views": 2, "lidar_images": 50},
    "skip": {"layers": ["network.4"], "on_nonfinite": "skip"},
    "raise": {"layers": ["network.4"]},
    "padded": {"layers": ["network.4"]},
}


COUNTED = {"masklr": [("4", "samples")], "skip": [("1.4", "samples"), ("1.4", "samples_skipped")]}


class Spoil(nn.Module):
    """Images that begin with a bright pixel give no finite feature; two of the validation split do."""

    def forward(self, images):
        return torch.where(images[:, :, :1, 3:4] > 0.9, torch.nan, images)


def validate(folder, name, **options):
    from masklr.data import Digits

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    module = Numbers(nn.Sequential(Spoil(), network) if name in ("skip", "raise") else network)
    callback = RepresentationSpectrum(
        **RUNS[name] | {"layers": [f"network.{'1.4' if name in ('skip', 'raise') else '4'}"]},
        measures=["rankme", "stable_rank", "effective_rank", "participation_ratio"],
        augmentation=[RandomCrop(1)],
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        precision="64-true",  # so that nothing hangs on how batches are cut
        default_root_dir=folder,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    data = Digits(batch_size=32, val_fraction=0.13)
    loaders = {"datamodule": data}
    if name == "padded":
        data.setup("validate")
        images = torch.cat([batch[0] for batch in data.val_dataloader()])[:143]
        loaders = {"dataloaders": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), 20)}
    try:
        trainer.validate(module, verbose=False, **loaders)
    except ValueError as error:
        (folder / f"error_{trainer.global_rank}").write_text(str(error))


class Numbers(pl.LightningModule):
    """A network on uint8 images, in the precision of the trainer."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images.to(self.dtype) / 255)

    def validation_step(self, batch, batch_idx):
        pass


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Folders of the same validations by one process and by two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    in_two_processes(in_one_of_two, two)
    for name in RUNS:
        validate(one / name, name)
    return one, two


@pytest.mark.parametrize("name", ["masklr", "skip"])
def test_two_processes_log_the_numbers_of_one(two_processes, read_metrics, name):
    one, two = (read_metrics(folder / name) for folder in two_processes)
    keys = [key for key in one if key.startswith("representation/")]
    assert keys == [key for key in two if key.startswith("representation/")]
    assert any("lidar" in key for key in keys) == (name == "masklr")
    assert any("skipped" in key for key in keys) == (name == "skip")
    assert not any("repeated" in key for key in keys)
    for key in keys:
        assert two[key][0] == pytest.approx(one[key][0], rel=1e-9), key
    total = sum(one[f"representation/network.{layer}/{count}"][0] for layer, count in COUNTED[name])
    assert total == 187
    sigma = [spectra(folder / name)[0] for folder in two_processes]
    for layer, values in sigma[0].items():
        np.testing.assert_allclose(sigma[1][layer], values, rtol=1e-9, atol=1e-9 * values[0])


def test_features_that_are_not_finite_on_one_process_end_both(two_processes):
    told = {path.name: path.read_text() for folder in two_processes for path in (folder / "raise").glob("error_*")}
    assert set(told) == {"error_0", "error_1"}
    assert len(set(told.values())) == 1
    assert "NaN or infinity in " in told["error_1"]


def test_samples_that_a_sampler_repeats_are_counted(two_processes, read_metrics):
    one, two = (read_metrics(folder / "padded") for folder in two_processes)
    assert one["representation/network.4/samples"][0] == 143
    assert "representation/network.4/samples_repeated" not in one
    assert two["representation/network.4/samples"][0] == 144
    assert two["representation/network.4/samples_repeated"][0] == 1
