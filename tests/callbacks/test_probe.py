import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import PredefinedSplit
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from masklr.callbacks import Probe
from masklr.probes import folds

ONE_SAMPLE = 100 / 144 + 1e-4  # percent


def ridge_accuracy(train, train_labels, val, val_labels):
    """scikit-learn's ridge on standardized features, penalty by the same folds and grid."""
    scaler = StandardScaler().fit(train.double().numpy())
    x, n = scaler.transform(train.double().numpy()), len(train)
    split = PredefinedSplit(folds(torch.arange(n), 5).numpy())
    model = RidgeCV(np.logspace(-6, 2, 25) * n, cv=split, scoring="neg_mean_squared_error")
    model.fit(x, np.eye(10)[train_labels.numpy()])
    scores = model.predict(scaler.transform(val.double().numpy()))
    return 100 * float((scores.argmax(1) == val_labels.numpy()).mean())


class States(pl.Callback):
    def __init__(self):
        self.states = {}

    def on_validation_end(self, trainer, module):
        self.states[trainer.global_step] = {key: value.clone() for key, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def probed(make_classifier, make_trainer, make_digits, tmp_path_factory, read_metrics):
    """A plain module on the digits, probed at the start and at steps 7 and 14."""

    class Floats(pl.LightningModule):
        """Takes the data module's uint8 images."""

        def __init__(self):
            super().__init__()
            self.inner = make_classifier()

        def forward(self, images):
            return self.inner(images / 255)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.2)

    folder = tmp_path_factory.mktemp("probe")
    states, module = States(), Floats()
    trainer = make_trainer(
        folder,
        max_steps=14,
        val_check_interval=7,
        num_sanity_val_steps=-1,
        log_every_n_steps=5,
        callbacks=[Probe(["network.4", "network.8"], module="inner"), states],
    )
    trainer.fit(module, make_digits(50))
    return module, states.states, read_metrics(folder)


def test_accuracies_are_logged_at_their_steps_and_those_of_pixels_once(probed):
    metrics = {key: list(found) for key, found in probed[2].items() if key.startswith(("probe/", "cost/"))}
    assert metrics.pop("probe/pixels/accuracy") == [0]
    keys = [f"probe/{name}/accuracy" for name in ("network.4", "network.8", "mean")]
    assert metrics == {key: [0, 7, 14] for key in [*keys, "cost/probe/seconds", "cost/probe/share"]}


def test_accuracy_is_that_of_scikit_learns_ridge(probed, digits):
    module, states, metrics = probed
    train, train_labels, val, val_labels = digits
    for step in (0, 7, 14):
        module.load_state_dict(states[step])
        module.eval()
        values = []
        for layer in (4, 8):
            network = module.inner.network[: layer + 1]
            with torch.no_grad():
                features = [
                    network(images).reshape(len(images), network(images).shape[1], -1).mean(2)
                    for images in (train, val)
                ]
            expected = ridge_accuracy(features[0], train_labels, features[1], val_labels)
            values.append(metrics[f"probe/network.{layer}/accuracy"][step])
            assert values[-1] == pytest.approx(expected, abs=ONE_SAMPLE)
        assert metrics["probe/mean/accuracy"][step] == pytest.approx(np.mean(values))


def test_accuracy_of_pixels_is_that_of_scikit_learns_ridge(probed, digits):
    train, train_labels, val, val_labels = digits
    expected = ridge_accuracy(train.flatten(1), train_labels, val.flatten(1), val_labels)
    assert probed[2]["probe/pixels/accuracy"][0] == pytest.approx(expected, abs=ONE_SAMPLE)
    assert expected > 85


def accuracy(make_trainer, folder, module, loaders, probe, **options):
    trainer = make_trainer(folder, max_steps=1, val_check_interval=1, callbacks=[probe], **options)
    trainer.fit(module, *loaders)
    return {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("probe/")}


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_accuracy_depends_on_no_batch_size(make_classifier, make_trainer, plain_loaders, tmp_path):
    found = []
    for batch_size, val_batch_size in ((32, 144), (100, 13)):
        loaders = plain_loaders(batch_size, val_batch_size=val_batch_size)
        module = make_classifier(lr=0.0)
        found.append(accuracy(make_trainer, tmp_path / str(batch_size), module.eval(), loaders, Probe(["network.4"])))
    assert found[0] == pytest.approx(found[1], abs=ONE_SAMPLE)


def test_samples_are_spread_over_a_split_that_is_sorted_by_class(make_classifier, make_trainer, digits, tmp_path):
    order = digits[1].argsort(stable=True)
    train = DataLoader(TensorDataset(digits[0][order], digits[1][order]), 50)
    loaders = (train, DataLoader(TensorDataset(*digits[2:]), 50))
    found = accuracy(make_trainer, tmp_path, make_classifier(), loaders, Probe(max_train_samples=200))
    # The first 200 would all be zeros and ones.
    assert found["probe/pixels/accuracy"] > 75


def test_stream_without_length_is_probed_by_its_first_batches(
    make_classifier, make_trainer, plain_loaders, digits, tmp_path
):
    taken = []

    class Stream(IterableDataset):
        def __iter__(self):
            for index in range(10**6):
                taken.append(index)
                yield digits[0][index % 1294], digits[1][index % 1294]

    loaders = (DataLoader(Stream(), 25), plain_loaders()[1])
    found = accuracy(make_trainer, tmp_path, make_classifier(), loaders, Probe(max_train_samples=320))
    expected = ridge_accuracy(digits[0][:325].flatten(1), digits[1][:325], digits[2].flatten(1), digits[3])
    assert found["probe/pixels/accuracy"] == pytest.approx(expected, abs=ONE_SAMPLE)
    assert len(taken) < 500


def test_default_sanity_check_is_not_recorded_and_costs_no_fit(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics
):
    probe = Probe(["network.4"])
    trainer = make_trainer(tmp_path, max_steps=2, val_check_interval=2, num_sanity_val_steps=2, callbacks=[probe])
    trainer.fit(make_classifier(), *plain_loaders())
    found = read_metrics(tmp_path)
    assert list(found["probe/mean/accuracy"]) == list(found["probe/pixels/accuracy"]) == [2]


def test_one_callback_in_two_trainers_measures_both_runs_alike(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics
):
    probe, found = Probe(["network.4"]), []
    for name in ("first", "second"):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path / name, max_steps=4, val_check_interval=2, callbacks=[probe])
        trainer.fit(make_classifier(), *plain_loaders())
        metrics = read_metrics(tmp_path / name)
        found.append({key: value for key, value in metrics.items() if key.startswith("probe/")})
    assert list(found[0]["probe/pixels/accuracy"]) == [2]
    assert found[0] == found[1]


@pytest.mark.usefixtures("compilable")
def test_layer_of_a_compiled_module_is_really_probed(make_classifier, make_trainer, plain_loaders, tmp_path):
    found = []
    for how in ("plain", "in place", "wrapped"):
        module = make_classifier()
        if how == "in place":
            module.network.compile(backend="eager")
        elif how == "wrapped":
            module.network = torch.compile(module.network, backend="eager")
        torch.manual_seed(0)
        probe = Probe(["4"], module="network")
        found.append(accuracy(make_trainer, tmp_path / how, module, plain_loaders(50, val_batch_size=48), probe))
    assert set(found[0]) == {"probe/4/accuracy", "probe/mean/accuracy", "probe/pixels/accuracy"}
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=ONE_SAMPLE)


def test_timm_resnet_is_probed_and_a_checkpoint_can_watch(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics
):
    module = make_classifier(lambda: timm.create_model("resnet10t", in_chans=1, num_classes=10), lr=1e-3)
    watch = ModelCheckpoint(tmp_path / "best", monitor="probe/mean/accuracy", mode="max")
    trainer = make_trainer(
        tmp_path,
        max_steps=2,
        val_check_interval=1,
        enable_checkpointing=True,
        callbacks=[Probe(["layer2", "global_pool"], module="network"), watch],
    )
    trainer.fit(module, *plain_loaders())
    found = read_metrics(tmp_path)
    assert set(found["probe/layer2/accuracy"]) == {1, 2}
    assert watch.best_model_score.item() == pytest.approx(max(found["probe/mean/accuracy"].values()))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"layers": ["network.44"]},
            r"Expected `layers` to match something, got 'network.44'; did you mean network\.4",
        ),
        ({"module": "netwrok"}, "Expected `module` to be a part of Classifier, got 'netwrok'; did you mean network"),
        ({"labels": 3}, "Expected a tensor at `labels`=3 of the batch"),
    ],
)
def test_what_cannot_be_measured_raises(make_classifier, make_trainer, plain_loaders, tmp_path, options, sentence):
    trainer = make_trainer(tmp_path, max_steps=1, val_check_interval=1, callbacks=[Probe(**options)])
    with pytest.raises(ValueError, match=sentence):
        trainer.fit(make_classifier(), *plain_loaders())


@pytest.mark.parametrize("pixels", [True, False])
def test_images_too_large_for_a_probe_of_pixels_raise_unless_it_is_off(make_classifier, make_trainer, tmp_path, pixels):
    data = TensorDataset(torch.rand(20, 1, 65, 64), torch.arange(20) % 10)
    loaders = (DataLoader(data, 10), DataLoader(data, 10))
    module = make_classifier(lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 10)))
    if not pixels:
        found = accuracy(make_trainer, tmp_path, module, loaders, Probe(pixels=False))
        assert set(found) == {"probe/output/accuracy", "probe/mean/accuracy"}
        return
    with pytest.raises(ValueError, match="at most 4,096 values for `pixels`, got 4160; set `pixels: false`"):
        accuracy(make_trainer, tmp_path, module, loaders, Probe())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"max_train_samples": 9}, "`max_train_samples` of at least 10, got 9"), ({"pool": "tokens"}, "`pool`.*'tokens'")],
)
def test_bad_options_raise(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Probe(**options)


def test_nearest_neighbors_are_logged_beside_ridge_and_change_nothing_of_it(
    make_classifier, make_trainer, plain_loaders, digits, tmp_path
):
    from masklr.neighbors import neighbor_classes

    class Data(pl.LightningDataModule):
        def unaugmented_train_dataloader(self):
            return DataLoader(TensorDataset(digits[0][:320], digits[1][:320]), 32)

        def val_dataloader(self):
            return plain_loaders()[1]

    found = {}
    module = make_classifier()
    for neighbors in (0, 5):
        probe = Probe(["network.4", "network.8"], module="", neighbors=neighbors)
        trainer = make_trainer(tmp_path, callbacks=[probe], logger=False)
        trainer.validate(module, Data(), verbose=False)
        found[neighbors] = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("probe/")}
    without, with_neighbors = found[0], found[5]
    assert {k: with_neighbors[k] for k in without} == without
    keys = {"probe/network.4/knn_accuracy", "probe/network.8/knn_accuracy", "probe/mean/knn_accuracy"}
    assert with_neighbors.keys() - without.keys() == keys
    with torch.no_grad():
        known, samples = (module.eval().network(part) for part in (digits[0][:320], digits[2]))
    classes = neighbor_classes(samples, known, digits[1][:320], 5)
    accuracy = 100 * (classes == digits[3]).float().mean().item()
    assert with_neighbors["probe/network.8/knn_accuracy"] == pytest.approx(accuracy, abs=1e-4)
    with pytest.raises(ValueError, match="Expected `neighbors` of 0 or more, got -1"):
        Probe(neighbors=-1)
