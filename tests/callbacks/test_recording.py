import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger, Logger
from torch import nn

from masklr.callbacks.recording import Recording, run_folder, undisturbed, with_means, written_whole


class Kept(Logger):
    """A logger that keeps what it is given and shows pictures as TensorBoard's writer does."""

    def __init__(self):
        super().__init__()
        self.scalars, self.figures = [], []

    name, version = "kept", "0"

    @property
    def experiment(self):
        return self

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.scalars.append((step, dict(metrics)))

    def add_figure(self, key, figure, global_step):
        self.figures.append((key, figure, global_step))


class Recorder(pl.Callback):
    """Records at odd steps, of which the loggers' cadence knows nothing."""

    def setup(self, trainer, module, stage):
        self.recording = Recording(trainer, "odd")

    def on_train_batch_end(self, trainer, module, *_):
        step = trainer.global_step
        if step % 2:
            with self.recording.measurement():
                torch.rand(3)
            self.recording.spectra(step, {"a.b": torch.tensor([2.0, 1.0]), "zero": torch.zeros(2)})
            self.recording.picture(step, Figure())
            self.recording.scalars(step, {"odd/x": float(step)})


@pytest.fixture(scope="module")
def recorded(make_classifier, make_trainer, plain_loaders, tmp_path_factory):
    folder, kept = tmp_path_factory.mktemp("recorded"), Kept()
    loggers = [CSVLogger(folder, name="", version=""), kept]
    trainer = make_trainer(folder, max_steps=6, log_every_n_steps=4, logger=loggers, callbacks=[Recorder()])
    trainer.fit(make_classifier(), *plain_loaders())
    return folder, kept, trainer


def test_scalars_reach_every_logger_at_their_own_step(recorded, read_metrics):
    folder, kept, trainer = recorded
    assert read_metrics(folder)["odd/x"] == {1: 1.0, 3: 3.0, 5: 5.0}
    assert [(step, values["odd/x"]) for step, values in kept.scalars if "odd/x" in values] == [(1, 1), (3, 3), (5, 5)]
    assert trainer.callback_metrics["odd/x"] == 5


def test_spectra_are_one_array_a_matrix_in_a_file_a_step_and_no_other_file_is_left(recorded):
    folder = recorded[0] / "spectra" / "odd"
    assert sorted(file.name for file in folder.iterdir()) == [f"step={step:08d}.npz" for step in (1, 3, 5)]
    arrays = np.load(folder / "step=00000003.npz")
    assert sorted(arrays) == ["a.b", "zero"]
    np.testing.assert_array_equal(arrays["a.b"], [2, 1])


def test_pictures_are_files_and_go_to_loggers_that_show_them(recorded):
    folder, kept, _ = recorded
    assert sorted(f.name for f in (folder / "pictures" / "odd").iterdir()) == [f"step={s:08d}.png" for s in (1, 3, 5)]
    assert [(key, step) for key, _, step in kept.figures] == [("pictures/odd", step) for step in (1, 3, 5)]


def test_share_is_the_measured_part_of_the_time_since_the_start(make_trainer, make_classifier, tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("masklr.callbacks.recording.time.perf_counter", lambda: clock[0])
    trainer = make_trainer(tmp_path)
    trainer.strategy.connect(make_classifier())
    recording = Recording(trainer, "x")
    found = []
    for measured, between in ((1.0, 3.0), (2.0, 2.0), (0.0, 4.0)):
        clock[0] += between
        with recording.measurement():
            clock[0] += measured
        recording.scalars(0, {})
        metrics = trainer.callback_metrics
        found.append((metrics["cost/x/seconds"].item(), metrics["cost/x/share"].item()))
    assert found == [(1.0, pytest.approx(1 / 4)), (2.0, pytest.approx(3 / 8)), (0.0, pytest.approx(3 / 12))]


def test_undisturbed_restores_generators_and_flags_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)))
    model[1][0].eval()
    flags = [part.training for part in model.modules()]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    def disturb():
        with undisturbed(model):
            torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
            model.eval()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        disturb()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002
    assert [part.training for part in model.modules()] == flags


def test_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with written_whole(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "first"

    def fail_halfway():
        with written_whole(path) as temporary:
            temporary.write_text("sec")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert path.read_text() == "first"
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


def test_files_go_into_the_folder_of_the_trainer_or_of_its_logger(make_trainer, tmp_path, monkeypatch):
    assert run_folder(make_trainer(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    logger = CSVLogger(tmp_path / "logs", name="a", version="b")
    assert run_folder(make_trainer(tmp_path, default_root_dir=None, logger=logger)) == tmp_path / "logs" / "a" / "b"
    assert run_folder(make_trainer(tmp_path, default_root_dir=None, logger=False)) == tmp_path


def test_means_are_over_the_places_that_have_the_measure():
    keys = with_means("weight", {"a": {"rank": 1.0, "norm": 4.0}, "b": {"rank": 3.0}, "c": {}})
    assert keys == {
        "weight/a/rank": 1.0,
        "weight/a/norm": 4.0,
        "weight/b/rank": 3.0,
        "weight/mean/rank": 2.0,
        "weight/mean/norm": 4.0,
    }
