"""`masklr measure`: spectra of checkpoints and timm models from the command line, and of modules from Python."""

import csv
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from masklr.cli import main
from masklr.matrices import measured_matrices
from masklr.measure import MatrixSpectrum, measure, table, write
from masklr.products import null_product_singular_values
from masklr.spectra import effective_rank, null_singular_values, stable_rank
from masklr.spectra_figure import kinds, spectra_figure

RECIPE = Path(__file__).parents[1] / "configs" / "pretrain_digits.yaml"
MODEL = "--model.init_args.model.init_args."


def vit(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
        return timm.create_model("vit_tiny_patch16_224", **options)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------ from Python


def test_spectra_of_a_module_and_of_its_state_dict_are_those_of_its_matrices():
    model = vit()
    before, state = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    of_model, of_state = measure(model), measure(model.state_dict())
    matrices = measured_matrices(model)
    assert list(of_model) == list(of_state) == list(matrices)
    for name, found in of_model.items():
        expected = np.linalg.svd(matrices[name].double().numpy(), compute_uv=False)
        np.testing.assert_allclose(found.sigma, expected, rtol=1e-6, atol=1e-9)
        assert found.shape == of_state[name].shape == tuple(matrices[name].shape)
        assert torch.equal(found.sigma, of_state[name].sigma)
        assert found.values == of_state[name].values
        assert found.values["stable_rank"] == stable_rank(found.sigma).item()
        null = null_singular_values(*found.shape)
        assert torch.equal(found.null, null)
        assert found.values["effective_rank_null"] == effective_rank(null).item()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_products_are_measured_of_a_model_beside_their_own_null():
    found = measure(
        vit(), include=["blocks.0.**"], attention_products=True, products=[["blocks.*.mlp.fc1", "blocks.*.mlp.fc2"]]
    )
    product = found["blocks.0.mlp.fc2*fc1"]
    assert product.shape == (24, 24)
    assert torch.equal(product.null, null_product_singular_values([24, 96, 24]))
    assert found["blocks.0.attn.qk.2"].shape == (24, 24)
    assert len(found["blocks.0.attn.qk.2"].sigma) == 8
    assert sum(".qk." in name for name in found) == 3


def test_measures_are_those_asked_for_and_a_matrix_of_zeros_has_no_rank():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    nn.init.zeros_(model[1].weight)
    found = measure(model, measures=["energy_rank_90", "nuclear_norm"])
    assert list(found["0"].values) == ["energy_rank_90", "nuclear_norm"]
    assert found["1"].values == {"nuclear_norm": 0}
    assert table(found).splitlines()[3].split() == ["1", "3", "x", "4", "0.000"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"measures": ["stable_rnk"]}, "stable_rank, got 'stable_rnk'"),
        ({"include": ["blocks.*.fc1"]}, "Expected `include` to match something"),
        ({"attention_products": True}, "Expected a model for `attention_products` and `products`"),
    ],
)
def test_what_cannot_be_measured_raises(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        measure(vit().state_dict(), **options)


def test_matrix_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Matrix '1' cannot be measured: Expected finite entries"):
        measure(model)


# ------------------------------------------------------------------------------------------------ table, files, picture


def test_table_has_a_row_a_matrix_and_the_means():
    found = measure(vit())
    lines = table(found).splitlines()
    assert lines[0].split() == ["matrix", "shape", "stable", "rank", "effective", "rank", "(null)", "frobenius", "norm"]
    assert len(lines) == len(found) + 4
    row = lines[2].split()
    values = found["patch_embed.proj"].values
    assert row[:4] == ["patch_embed.proj", "24", "x", "48"]
    shown = [float(cell) for cell in row[4:]]
    named = [values[n] for n in ("stable_rank", "effective_rank", "effective_rank_null", "frobenius_norm")]
    assert shown == pytest.approx(named, rel=1e-3)
    means = [float(cell) for cell in lines[-1].split()[1:]]
    assert means[0] == pytest.approx(np.mean([f.values["stable_rank"] for f in found.values()]), rel=1e-3)
    assert len({len(line) for line in lines}) == 1


def test_files_hold_all_numbers(tmp_path):
    found = measure(vit())
    written = write(tmp_path / "a" / "b", found, "a title")
    assert (
        [path.name for path in written] == files(tmp_path / "a" / "b") == ["spectra.csv", "spectra.npz", "spectra.png"]
    )
    arrays = dict(np.load(tmp_path / "a" / "b" / "spectra.npz"))
    with (tmp_path / "a" / "b" / "spectra.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(arrays) == [row["matrix"] for row in rows] == list(found)
    for row in rows:
        spectrum = found[row["matrix"]]
        np.testing.assert_array_equal(arrays[row["matrix"]], spectrum.sigma)
        assert (int(row["rows"]), int(row["cols"])) == spectrum.shape
        assert float(row["effective_rank_null"]) == spectrum.values["effective_rank_null"]
    assert (tmp_path / "a" / "b" / "spectra.png").read_bytes().startswith(b"\x89PNG")
    assert files(tmp_path / "a") == ["b"], "nothing is left beside"


def test_files_are_written_all_or_none(tmp_path, monkeypatch):
    found = measure(nn.Sequential(nn.Linear(4, 3)))
    write(tmp_path / "out", found, "first")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(ValueError, match=r"Cannot write into .*out \(`out`\): No space left on device\."):
        write(tmp_path / "out", measure(nn.Sequential(nn.Linear(5, 5))), "second")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ValueError, match="No space left"):
        write(tmp_path / "new", found, "third")
    assert files(tmp_path) == ["out"]


def test_picture_groups_matrices_by_kind():
    found = measure(vit())
    assert list(kinds(list(found))) == ["qkv.q", "qkv.k", "qkv.v", "attn.proj", "mlp.fc1", "mlp.fc2", "others"]
    figure = spectra_figure(found, "random weights")
    shown = [ax for ax in figure.axes if ax.get_visible() and ax.get_title()]
    assert [ax.get_title() for ax in shown] == [
        *(f"{kind} (2)" for kind in ("qkv.q", "qkv.k", "qkv.v", "attn.proj", "mlp.fc1", "mlp.fc2")),
        "others (2)",
    ]
    for ax in shown:
        assert ax.get_yscale() == "log"
        for line in ax.lines:
            assert line.get_ydata()[0] == pytest.approx(1), "each is divided by its largest"
    first = shown[0].lines[0]
    sigma = found["blocks.0.attn.qkv.q"].sigma
    np.testing.assert_allclose(first.get_ydata(), sigma / sigma[0])
    np.testing.assert_allclose(first.get_xdata(), np.arange(1, 25) / 24)


def test_picture_has_at_most_eight_panels_whatever_the_model():
    for name in ("resnet10t", "convnext_atto"):
        names = list(measured_matrices(timm.create_model(name)))
        found = kinds(names)
        assert len(found) <= 8
        assert sorted(chain(*found.values())) == sorted(names)
    assert list(kinds(["a", "b"])) == ["a", "b"]
    assert len(kinds([f"layer_{letter}" for letter in "abcdefghijk"])["others"]) == 4
    assert kinds(["a.0", "a.1", "b"]) == {"a": ["a.0", "a.1"], "b": ["b"]}
    ones = MatrixSpectrum((1, 3), torch.tensor([2.0]), torch.tensor([1.0]), {})
    zeros = MatrixSpectrum((3, 3), torch.zeros(3), torch.ones(3), {})
    assert len(spectra_figure({"a": ones, "b": zeros}, "").axes[0].lines) == 2
    assert spectra_figure({"b": zeros}, "").axes


# ------------------------------------------------------------------------------------------------ command line


def test_timm_model_has_random_weights_unless_pretrained_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["measure", "resnet10t", "--include", "layer[12].**"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("resnet10t, random weights\n\nmatrix ")
    assert "matrices in " in shown
    _, first, second = shown.split("resnet10t, random weights")
    assert first.partition(" matrices in ")[0] == second.partition(" matrices in ")[0]
    folder = tmp_path / "measured" / "resnet10t"
    assert files(folder) == ["spectra.csv", "spectra.npz", "spectra.png"]
    names = list(np.load(folder / "spectra.npz"))
    assert names[0] == "layer1.0.conv1"
    assert {name.partition(".")[0] for name in names} == {"layer1", "layer2"}


def test_pretrained_weights_are_those_of_timm(tmp_path, monkeypatch, capsys):
    asked, model = [], vit()

    def create_model(name, pretrained):
        asked.append((name, pretrained))
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    out = tmp_path / "out"
    assert main(["measure", "resnet10t", "--pretrained", "--out", str(out), "--attention_products"]) == 0
    assert asked == [("resnet10t", True)]
    assert capsys.readouterr().out.startswith("resnet10t, pretrained weights\n")
    assert "blocks.1.attn.ov.2" in np.load(out / "spectra.npz")


@pytest.fixture(scope="module")
def run_checkpoint(tmp_path_factory):
    """The checkpoint of a tiny run of the quickstart's recipe."""
    runs = tmp_path_factory.mktemp("runs")
    options = [
        f"{MODEL}encoder_args={{'embed_dim': 16, 'depth': 2, 'num_heads': 2}}",
        f"{MODEL}decoder_dim=8",
        f"{MODEL}decoder_depth=1",
        f"{MODEL}decoder_heads=2",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        "--wandb=off",
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "MASKLR_RUN_FOLDER"):
            patch.setenv(name, "")
            patch.delenv(name)
        assert main(["fit", f"--config={RECIPE}", *options, f"--runs={runs}"]) == 0
    return runs / "pretrain_digits" / "version_0"


def test_checkpoint_of_a_run_reads_as_its_callback_measured_it(run_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = run_checkpoint / "checkpoints" / "last.ckpt"
    assert main(["measure", str(path)]) == 0
    (folder,) = (tmp_path / "measured").iterdir()
    assert folder.name == "pretrain_digits-version_0-checkpoints-last"
    assert capsys.readouterr().out.startswith(f"{path}\n\n")
    found = np.load(folder / "spectra.npz")
    logged = np.load(run_checkpoint / "spectra" / "weight_spectrum" / "step=00000002.npz")
    assert len(logged) == 2 * 6 + 1
    for name, sigma in logged.items():
        np.testing.assert_allclose(found[f"model.encoder.{name}"], sigma, rtol=1e-6, atol=1e-9)
    assert any(name.startswith("model.decoder") for name in found)


def test_folder_of_a_run_means_its_newest_checkpoint(run_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["measure", str(run_checkpoint), "--out", "of_run"]) == 0
    assert main(["measure", str(run_checkpoint / "checkpoints" / "last.ckpt"), "--out", "of_file"]) == 0
    of_run, of_file = (np.load(tmp_path / name / "spectra.npz") for name in ("of_run", "of_file"))
    assert set(of_run) == set(of_file)
    for name in of_run:
        np.testing.assert_array_equal(of_run[name], of_file[name])


def test_help_of_measure_imports_nothing_heavy():
    code = (
        "import sys\nfrom masklr.cli import main\n"
        "try:\n    main(['measure', '--help'])\nexcept SystemExit as stopped:\n    assert stopped.code == 0\n"
        "assert not {'torch', 'pytorch_lightning', 'timm', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for option in ("--pretrained", "--include", "--exclude", "--measures", "--out", "--attention_products"):
        assert option in shown


def test_measuring_imports_no_lightning():
    code = (
        "import sys, masklr.measure, masklr.spectra_figure, masklr.measure_cli\n"
        "assert not {'timm', 'wandb', 'matplotlib', 'torchvision'} & set(sys.modules)\n"
        "assert 'masklr.callbacks' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def truncated(path):
    torch.save(vit().state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])


def pickled(path):
    torch.save(vit(), path)


@pytest.mark.parametrize(
    ("arguments", "make", "told"),
    [
        (["missing.ckpt"], None, "there is no file missing.ckpt"),
        (["runs/missing"], None, "there is no file runs/missing"),
        (["runs"], lambda path: path.mkdir(), "a run's folder with a sound checkpoint, but there is none in runs"),
        (["a.ckpt"], truncated, "Cannot read a.ckpt: it is truncated, or no checkpoint."),
        (["a.pt"], pickled, "Refused to read a.pt: it needs code to be run, timm.models.vision_transformer."),
        (["a.safetensors"], truncated, "it is truncated, or no safetensors file."),
        (["a.pth"], lambda path: path.write_text("x"), "Cannot read a.pth: it is truncated, or no checkpoint."),
        (["a.csv"], lambda path: path.write_text("cost/run,step\n"), "Cannot read a.csv: it is truncated, or"),
        (["vit_base_patch16_244"], None, "'vit_base_patch16_244'; did you mean vit_base_patch16_224"),
        (["resnet10t", "--measures", "stable_rnk"], None, "stable_rank, got 'stable_rnk'"),
        (["resnet10t", "--include", "layer9.**"], None, "Expected `include` to match something, got 'layer9.**'"),
        (["resnet10t", "--pretraind"], None, "`masklr measure`: unrecognized arguments: --pretraind"),
        ([], None, "`masklr measure`: the following arguments are required: CHECKPOINT_OR_TIMM_NAME"),
        (["a.pt", "--pretrained"], lambda path: torch.save({}, path), "`--pretrained` with the name of a timm model"),
        (["resnet10t", "--attention_products"], None, "Expected an attention for `attention_products`"),
        (["resnet10t", "--include", "fc", "--out", "file/x"], lambda _: Path("file").touch(), "write into file/x"),
    ],
)  # fmt: skip
def test_mistake_is_one_sentence_and_leaves_nothing(arguments, make, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if make is not None:
        make(tmp_path / (arguments[0] if arguments else ""))
    before = files(tmp_path)
    assert main(["measure", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("masklr: error: ")
    assert len(shown.err.splitlines()) == 1
    assert told in shown.err
    assert files(tmp_path) == before


def test_weights_that_cannot_be_downloaded_are_one_sentence(tmp_path, monkeypatch, capsys):
    def create_model(name, pretrained):
        raise RuntimeError("Cannot reach the hub.\nA second line.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", create_model)
    assert main(["measure", "resnet10t", "--pretrained"]) == 2
    told = capsys.readouterr().err
    assert told == "masklr: error: Cannot make 'resnet10t' with pretrained weights: Cannot reach the hub.\n"
    assert files(tmp_path) == []
