import math

import numpy as np
import pytest
import torch

from masklr.data import Synthetic


def opened(**options):
    data = Synthetic(**options)
    data.setup("fit")
    return data


def whole_set(data):
    """(x, y) of all samples, in order."""
    images = data.splits["train"].images
    images.dtype = torch.float64
    x, y, positions = data.splits["train"].__getitems__(range(data.num_samples))
    assert positions.tolist() == list(range(data.num_samples))
    return x, y


OPTIONS = {
    "diagonal": {"spectrum": [4.0, 3.0, 2.0, 1.0]},
    "wide": {"spectrum": [2.0, 1.0], "num_inputs": 7, "num_outputs": 3},
    "rotated": {"spectrum": [2.0, 1.0], "num_inputs": 5, "num_outputs": 6, "rotate": True},
    "input spectrum": {"spectrum": [2.0, 1.0], "input_spectrum": [9.0, 4.0, 1.0]},
    "singular": {"autoencode": True, "input_spectrum": [16.0, 9.0, 0.0], "rotate": True},
    "autoregressive": {"autoencode": True, "autocorrelation": 0.9, "num_inputs": 16},
    "negative correlation": {"spectrum": [1.0], "autocorrelation": -0.5, "num_inputs": 3},
    "noise": {"spectrum": [3.0, 1.0], "autocorrelation": 0.5, "noise": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_moments_of_the_set_are_exactly_those_of_the_population(options):
    data = opened(num_samples=64, **options)
    x, y = whole_set(data)
    C, M, noise = data.second_moment, data.target_matrix, data.noise
    assert (C.dtype, M.dtype, x.dtype) == (torch.float64,) * 3
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(x.T @ x / 64, C, **close)
    torch.testing.assert_close(y.T @ x / 64, M @ C, **close)
    torch.testing.assert_close(y.T @ y / 64, M @ C @ M.T + noise**2 * torch.eye(len(M), dtype=torch.float64), **close)
    assert data.irreducible == pytest.approx((y - x @ M.T).square().sum().item() / 64, abs=1e-12)


def test_loss_of_any_linear_network_is_that_of_the_population():
    data = opened(spectrum=[3.0, 1.0], input_spectrum=[4.0, 1.0, 0.5], noise=0.5, num_samples=32)
    x, y = whole_set(data)
    W = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    error = W - data.target_matrix
    population = (error @ data.second_moment @ error.T).trace() + 0.25 * 2
    torch.testing.assert_close((x @ W.T - y).square().sum(1).mean(), population, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("rotate", [False, True])
def test_spectra_are_the_given_ones(rotate):
    data = Synthetic(spectrum=[4.0, 2.0], num_outputs=5, input_spectrum=[3.0, 2.0, 1.0], rotate=rotate)
    sigma = torch.linalg.svdvals(data.target_matrix)
    torch.testing.assert_close(sigma, torch.tensor([4.0, 2.0, 0.0]).double(), rtol=1e-12, atol=1e-12)
    eigenvalues = torch.linalg.eigvalsh(data.second_moment)
    torch.testing.assert_close(eigenvalues, torch.tensor([1.0, 2.0, 3.0]).double(), rtol=1e-12, atol=1e-12)
    diagonal = torch.equal(data.second_moment, data.second_moment.diag().diag())
    assert diagonal != rotate
    assert torch.equal(data.second_moment, data.second_moment.T)
    assert (data.target_matrix.count_nonzero() == 2) != rotate


def test_second_moment_of_an_autoregressive_input_is_a_power_of_the_distance():
    C = Synthetic(autoencode=True, autocorrelation=-0.5, num_inputs=4).second_moment
    for i in range(4):
        for j in range(4):
            assert C[i, j].item() == (-0.5) ** abs(i - j)


def test_targets_of_an_autoencoder_are_its_inputs():
    data = opened(autoencode=True, num_inputs=5, num_samples=16)
    x, y = whole_set(data)
    assert torch.equal(x, y)
    assert torch.equal(data.second_moment, torch.eye(5, dtype=torch.float64))


def test_seed_decides_the_samples_and_the_vectors():
    first, same, other = (
        opened(spectrum=[2.0, 1.0], rotate=True, noise=0.1, num_samples=8, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.target_matrix, same.target_matrix)
    assert not torch.allclose(first.target_matrix, other.target_matrix)
    for ours, theirs, differ in zip(whole_set(first), whole_set(same), whole_set(other), strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.allclose(ours, differ)


def test_training_is_shuffled_and_validation_is_the_whole_set_in_order():
    data = opened(spectrum=[2.0, 1.0], num_samples=50, batch_size=10)
    data.setup("test")
    batches = list(data.train_dataloader())
    positions = torch.cat([batch[2] for batch in batches])
    assert sorted(positions.tolist()) == list(range(50))
    assert positions.tolist() != list(range(50))
    assert data.num_train_batches == len(batches) == 5
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert torch.cat([batch[2] for batch in loader]).tolist() == list(range(50))
    x, y, _ = batches[0]
    assert x.shape == y.shape == (10, 2)
    assert x.dtype == y.dtype == torch.float32


def save(matrix, path):
    if path.suffix == ".npy":
        np.save(path, matrix)
    elif path.suffix == ".npz":
        np.savez(path, matrix)
    elif path.suffix == ".pt":
        torch.save(torch.from_numpy(matrix), path)
    else:
        np.savetxt(path, matrix, delimiter=",", fmt="%.17g")
    return str(path)


@pytest.mark.parametrize("ending", [".npy", ".npz", ".pt", ".csv"])
def test_matrices_are_read_from_files(tmp_path, ending):
    generator = np.random.default_rng(0)
    target = generator.normal(size=(2, 3))
    root = generator.normal(size=(3, 3))
    data = opened(
        target=save(target, tmp_path / f"target{ending}"),
        covariance=save(root @ root.T, tmp_path / f"covariance{ending}"),
        num_samples=16,
    )
    assert torch.equal(data.target_matrix, torch.from_numpy(target))
    torch.testing.assert_close(data.second_moment, torch.from_numpy(root @ root.T), rtol=1e-15, atol=1e-15)
    x, y = whole_set(data)
    torch.testing.assert_close(y, x @ torch.from_numpy(target).T)


def test_one_line_of_csv_is_a_matrix_of_one_row(tmp_path):
    (tmp_path / "row.csv").write_text("1, 2, 3\n")
    assert Synthetic(target=str(tmp_path / "row.csv")).target_matrix.shape == (1, 3)


BAD_FILES = {
    "not two axes": (np.zeros(3), ".npy", r"hold a matrix, got shape \(3,\)"),
    "empty": (np.zeros((0, 3)), ".npy", "hold a matrix"),
    "infinite": (np.array([[1.0, np.inf]]), ".pt", "to be finite, got 1 values"),
    "words": (None, ".csv", "cannot be read as a matrix"),
    "not an array": (None, ".npy", "cannot be read as a matrix"),
    "unknown ending": (None, ".txt", "expected a .npy, .npz, .pt or .csv file, got '.txt'"),
}


@pytest.mark.parametrize(("matrix", "ending", "sentence"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_raises_one_sentence_with_its_path(tmp_path, matrix, ending, sentence):
    path = tmp_path / f"bad{ending}"
    if matrix is None:
        path.write_text("no, numbers\nhere\n")
    else:
        save(matrix, path)
    with pytest.raises(ValueError, match=sentence) as error:
        Synthetic(target=str(path))
    assert str(path) in str(error.value)
    assert "`target`" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_raises_one_sentence_with_its_path():
    with pytest.raises(FileNotFoundError, match=r"`covariance`: there is no file 'nowhere/C.npy'"):
        Synthetic(autoencode=True, covariance="nowhere/C.npy")


@pytest.mark.parametrize(
    ("matrix", "sentence"),
    [
        (np.array([[1.0, 0.5], [0.0, 1.0]]), "to be symmetric"),
        (np.ones((2, 3)), "to be symmetric"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "without negative eigenvalues, got -1"),
    ],
)
def test_file_that_is_no_second_moment_raises(tmp_path, matrix, sentence):
    with pytest.raises(ValueError, match=f"Expected `covariance` .* {sentence}"):
        Synthetic(autoencode=True, covariance=save(matrix, tmp_path / "C.npy"))


BAD = {
    "nothing to predict": ({}, "Expected one of `spectrum`, `target` and `autoencode`, got none"),
    "two targets": ({"spectrum": [1.0], "autoencode": True}, "Expected one of .*, got spectrum and autoencode"),
    "two inputs": (
        {"spectrum": [1.0], "input_spectrum": [1.0], "autocorrelation": 0.5},
        "Expected at most one of .*, got input_spectrum and autocorrelation",
    ),
    "sizes of inputs": (
        {"spectrum": [1.0], "input_spectrum": [1.0, 2.0], "num_inputs": 3},
        "Expected `num_inputs` and `input_spectrum` of one size, got 3 and 2",
    ),
    "sizes of an autoencoder": (
        {"autoencode": True, "num_inputs": 3, "num_outputs": 2},
        "Expected `num_outputs` and `autoencode` of one size, got 2 and 3",
    ),
    "no size": ({"autoencode": True}, "Expected `num_inputs`, which no other argument gives, got None"),
    "size of zero": ({"autoencode": True, "num_inputs": 0}, "Expected `num_inputs` of at least 1, got 0"),
    "too many singular values": (
        {"spectrum": [3.0, 2.0, 1.0], "num_inputs": 2},
        "Expected `spectrum` of at most 2 values for these sizes, got 3",
    ),
    "negative singular value": ({"spectrum": [1.0, -1.0]}, r"Expected `spectrum` .* got \[1.0, -1.0\]"),
    "infinite singular value": ({"spectrum": [math.inf]}, r"Expected `spectrum` of finite values"),
    "no singular value": ({"spectrum": [], "num_inputs": 2}, r"Expected `spectrum` .* got \[\]"),
    "negative eigenvalue": (
        {"autoencode": True, "input_spectrum": [-1.0]},
        r"Expected `input_spectrum` .* got \[-1.0\]",
    ),
    "correlation of one": (
        {"autoencode": True, "autocorrelation": 1.0, "num_inputs": 2},
        r"Expected `autocorrelation` in \(-1, 1\), got 1.0",
    ),
    "nothing to rotate": ({"autoencode": True, "num_inputs": 2, "rotate": True}, "Expected `rotate` only beside"),
    "negative noise": ({"spectrum": [1.0], "noise": -0.1}, "Expected `noise` of 0 or more, got -0.1"),
    "too few samples": ({"spectrum": [1.0, 1.0], "num_samples": 1}, "Expected `num_samples` of at least 2, .* got 1"),
    "too few samples for noise": (
        {"spectrum": [1.0, 1.0], "num_samples": 3, "noise": 0.1},
        "Expected `num_samples` of at least 4, as many as inputs and outputs, got 3",
    ),
    "batch size": ({"spectrum": [1.0], "batch_size": 0}, "Expected `batch_size` of at least 1, got 0"),
    "seed": ({"spectrum": [1.0], "seed": -1}, "Expected `seed` of at least 0, got -1"),
}


@pytest.mark.parametrize(("options", "sentence"), BAD.values(), ids=BAD)
def test_bad_values_raise_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        Synthetic(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("64-true", torch.float64)])
def test_batches_have_the_precision_of_the_trainer(make_trainer, tmp_path, recorder, precision, dtype):
    class Noted(recorder):
        def training_step(self, batch, batch_idx):
            self.dtypes = (batch[0].dtype, batch[1].dtype)
            self.x = batch[0][batch[2].argsort()]
            return self.weight * batch[0].mean()

    data, module = Synthetic(autoencode=True, autocorrelation=0.9, num_inputs=3, num_samples=16, batch_size=16), Noted()
    make_trainer(tmp_path, logger=False, max_steps=1, limit_val_batches=0, precision=precision).fit(module, data)
    assert module.dtypes == (dtype, dtype)
    error = (module.x.double().T @ module.x.double() / 16 - data.second_moment).abs().max().item()
    assert error < (1e-6 if dtype == torch.float32 else 1e-13)


def test_resumed_run_sees_the_batches_of_the_uninterrupted_one(run, tmp_path, recorder):
    class Module(recorder):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch[2].tolist())
            return (self.weight - batch[0].mean()) ** 2

    def data():
        return Synthetic(spectrum=[1.0], num_samples=40, batch_size=8, seed=3)

    whole = run(data(), module=Module(), max_steps=12)
    before = run(data(), module=Module(), max_steps=7, save=tmp_path / "saved.ckpt")
    after = run(data(), module=Module(), checkpoint=tmp_path / "saved.ckpt", max_steps=12)
    assert before.seen + after.seen == whole.seen
    assert torch.equal(after.weight, whole.weight)
