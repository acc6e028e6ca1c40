import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from masklr.callbacks import RepresentationSpectrum
from masklr.callbacks.features import pooled

LAYERS = ["network.3", "network.4"]


class States(pl.Callback):
    """The state at every validation, the sanity check included."""

    def __init__(self):
        self.states = {}

    def on_validation_end(self, trainer, module):
        self.states[trainer.global_step] = {key: value.clone() for key, value in module.state_dict().items()}


def spectra(folder):
    files = sorted((folder / "spectra" / "representation_spectrum").iterdir())
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
    assert len(keys) == 3 * 4 + 2
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
