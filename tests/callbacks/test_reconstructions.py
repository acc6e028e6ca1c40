import matplotlib.image
import numpy as np
import pytest
import torch

from masklr.callbacks import Reconstructions
from masklr.callbacks.reconstructions import figure_of


def pictures(folder):
    return sorted((folder / "pictures" / "reconstructions").iterdir())


@pytest.fixture(scope="module")
def drawn(make_task, make_digits, make_trainer, tmp_path_factory, read_metrics):
    """14 steps of pretraining, a picture at the start and every 7."""
    folder = tmp_path_factory.mktemp("pictures")
    trainer = make_trainer(
        folder,
        max_steps=14,
        val_check_interval=7,
        num_sanity_val_steps=-1,
        log_every_n_steps=5,
        callbacks=[Reconstructions(num_images=3)],
    )
    trainer.fit(make_task(), make_digits())
    return folder, read_metrics(folder)


def test_a_picture_is_written_whole_at_every_validation_and_nothing_else(drawn):
    names = [file.name for file in pictures(drawn[0])]
    assert names == [f"step={step:08d}.png" for step in (0, 7, 14)]
    for file in pictures(drawn[0]):
        assert matplotlib.image.imread(file).std() > 0.1


def test_cost_is_logged_at_the_steps_of_the_pictures(drawn):
    assert list(drawn[1]["cost/reconstructions/seconds"]) == [0, 7, 14]
    assert all(0 < share < 1 for share in drawn[1]["cost/reconstructions/share"].values())


def test_pictures_change_as_the_model_learns(drawn):
    first, *_, last = (matplotlib.image.imread(file) for file in pictures(drawn[0]))
    assert not np.array_equal(first, last)


def test_figure_has_a_row_for_each_name_with_these_pixels():
    generator = torch.Generator().manual_seed(0)
    gray, color = torch.rand(2, 1, 4, 6, generator=generator), torch.rand(2, 3, 4, 6, generator=generator)
    figure = figure_of({"original": gray, "reconstruction": color, "far out": 3 * color - 1}, step=1234)
    axes = np.array(figure.axes).reshape(3, 2)
    assert [row[0].get_ylabel() for row in axes] == ["original", "reconstruction", "far out"]
    assert "1,234" in figure.get_suptitle()
    for column in range(2):
        shown = [ax.images[0].get_array() for ax in axes[:, column]]
        np.testing.assert_allclose(shown[0], gray[column, 0])
        np.testing.assert_allclose(shown[1], color[column].permute(1, 2, 0))
        np.testing.assert_allclose(shown[2], (3 * color - 1).clamp(0, 1)[column].permute(1, 2, 0))
        assert axes[0, column].images[0].get_clim() == (0, 1)


def test_default_sanity_check_is_not_drawn(make_task, make_digits, make_trainer, tmp_path):
    options = {"max_steps": 2, "val_check_interval": 2, "num_sanity_val_steps": 2}
    callback = Reconstructions(num_images=1)
    make_trainer(tmp_path, callbacks=[callback], **options).fit(make_task(), make_digits())
    assert [file.name for file in pictures(tmp_path)] == ["step=00000002.png"]
    make_trainer(tmp_path / "second", callbacks=[callback], **options).fit(make_task(), make_digits())
    assert [file.name for file in pictures(tmp_path / "second")] == ["step=00000002.png"]


def test_module_without_reconstruct_raises_at_setup(make_classifier, make_trainer, plain_loaders, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[Reconstructions()])
    with pytest.raises(ValueError, match=r"Expected a LightningModule with `reconstruct\(images\)`, got a Classifier"):
        trainer.fit(make_classifier(), *plain_loaders())
    assert not (tmp_path / "pictures").exists()


def test_a_drawing_that_fails_leaves_no_file(make_task, make_digits, make_trainer, tmp_path):
    task = make_task()
    task.reconstruct = lambda images: (_ for _ in ()).throw(RuntimeError("out of paint"))
    trainer = make_trainer(tmp_path, max_steps=1, val_check_interval=1, callbacks=[Reconstructions()])
    with pytest.raises(RuntimeError, match="out of paint"):
        trainer.fit(task, make_digits())
    assert not (tmp_path / "pictures").exists()


def test_number_of_images_is_checked():
    with pytest.raises(ValueError, match="Expected `num_images` of at least 1, got 0"):
        Reconstructions(num_images=0)
