"""The command line: runs, their folders, and what a mistake is answered with."""

import csv
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image

from masklr.cli import main, sentence_of

RECIPE = Path(__file__).parents[1] / "configs" / "pretrain_digits.yaml"
SHARDS = RECIPE.with_name("pretrain_cifar10_shards.yaml")
MODEL = "--model.init_args.model.init_args."
SMALL = [
    f"{MODEL}encoder_args={{'embed_dim': 16, 'depth': 2, 'num_heads': 2}}",
    f"{MODEL}decoder_dim=8",
    f"{MODEL}decoder_depth=1",
    f"{MODEL}decoder_heads=2",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=2",
    "--trainer.val_check_interval=4",
]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set by a run for its further processes; kept from the next test.
    address = ("MASTER_ADDR", "MASTER_PORT")
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "MASKLR_RUN_FOLDER", "MASKLR_DEBUG", *address):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def fit(runs: Path, *arguments: str, steps: int = 4, wandb: str = "off", command: str = "fit") -> int:
    return main(
        [
            command,
            f"--config={RECIPE}",
            *SMALL,
            f"--trainer.max_steps={steps}",
            f"--runs={runs}",
            f"--wandb={wandb}",
            *arguments,
        ]
    )


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def steps_of(folder: Path, key: str) -> list[int]:
    return [int(row["step"]) for row in metrics(folder) if row.get(key)]


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert fit(runs, steps=8) == 0
    return runs / "pretrain_digits" / "version_0"


def test_run_keeps_everything_in_its_own_folder(run_folder: Path) -> None:
    assert {path.name for path in run_folder.iterdir()} >= {
        "config.yaml",
        "metrics.csv",
        "spectra",
        "pictures",
        "checkpoints",
    }
    assert (run_folder / "spectra" / "weight_spectrum" / "step=00000000.npz").exists()
    assert (run_folder / "spectra" / "weight_spectrum" / "step=00000008.npz").exists()
    assert (run_folder / "pictures" / "reconstructions" / "step=00000008.png").exists()
    assert (run_folder / "checkpoints" / "last.ckpt").exists()
    assert not list(run_folder.rglob(".*")), "temporary files are left"


def test_metrics_stand_at_the_steps_of_their_measurement(run_folder: Path) -> None:
    assert steps_of(run_folder, "val/loss") == [0, 4, 8]
    assert steps_of(run_folder, "representation/norm/effective_rank") == [0, 4, 8]
    assert steps_of(run_folder, "probe/norm/accuracy") == [0, 4, 8]
    assert steps_of(run_folder, "probe/pixels/accuracy") == [0]
    assert steps_of(run_folder, "weight/mean/stable_rank") == [0, 8]


def test_config_of_a_run_repeats_it_exactly(run_folder: Path, tmp_path: Path) -> None:
    again = ["fit", f"--config={run_folder / 'config.yaml'}", f"--runs={tmp_path}"]
    assert main(again) == 0
    repeated = tmp_path / "pretrain_digits" / "version_0"
    assert [row["train/loss"] for row in metrics(repeated) if row["train/loss"]] == [
        row["train/loss"] for row in metrics(run_folder) if row["train/loss"]
    ]
    first, second = (torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (run_folder, repeated))
    assert all(torch.equal(first["state_dict"][key], second["state_dict"][key]) for key in first["state_dict"])


def test_two_runs_of_one_config_get_folders_of_their_own_and_wandb_knows_the_config(tmp_path: Path) -> None:
    for _ in range(2):
        assert fit(tmp_path, wandb="offline") == 0
    folders = sorted((tmp_path / "pretrain_digits").iterdir())
    assert [folder.name for folder in folders] == ["version_0", "version_1"]
    for folder in folders:
        (stored,) = folder.glob("wandb/offline-run-*/*.wandb")
        assert b"MaskedAutoencoder" in stored.read_bytes(), "the recipe is not in wandb's config"


@pytest.mark.parametrize(("command", "key"), [("validate", "val/loss"), ("test", "test/loss")])
def test_checkpoint_of_a_run_is_measured_with_its_config(
    command: str, key: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, checkpoint = run_folder / "config.yaml", run_folder / "checkpoints" / "last.ckpt"
    assert main([command, f"--config={config}", f"--ckpt_path={checkpoint}", f"--runs={tmp_path}"]) == 0
    folder = tmp_path / "pretrain_digits" / f"{command}_0"
    assert capsys.readouterr().out.endswith(f"run: {folder}\n")
    (value,) = [float(row[key]) for row in metrics(folder) if row.get(key)]
    assert steps_of(folder, key) == [8], "not at the checkpoint's step"
    if command == "validate":
        last = [row["val/loss"] for row in metrics(run_folder) if row.get("val/loss")][-1]
        assert value == pytest.approx(float(last), rel=1e-6)
        accuracy = [row["probe/norm/accuracy"] for row in metrics(run_folder) if row.get("probe/norm/accuracy")][-1]
        (probed,) = [float(row["probe/norm/accuracy"]) for row in metrics(folder) if row.get("probe/norm/accuracy")]
        assert probed == pytest.approx(float(accuracy))
        assert steps_of(folder, "probe/norm/accuracy") == [8]


class Logging(pl.LightningModule):
    """A module of one's own, whose metrics Lightning places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: object, batch_idx: int) -> torch.Tensor:
        return self.layer(torch.ones(1, 1)).square().sum()

    def validation_step(self, batch: object, batch_idx: int) -> None:
        self.log("val/one", 1.0)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_metrics_of_a_module_of_ones_own_stand_where_they_stood_in_training(command: str, tmp_path: Path) -> None:
    recipe = {
        "name": "own",
        "trainer": {"accelerator": "cpu", "max_steps": 6, "val_check_interval": 6, "num_sanity_val_steps": 0},
        "model": {"class_path": f"{__name__}.Logging"},
        "data": {"class_path": "masklr.data.Digits", "init_args": {"batch_size": 64}},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    arguments = [f"--config={tmp_path / 'own.yaml'}", f"--runs={tmp_path}", "--wandb=off"]
    assert main(["fit", *arguments]) == 0
    assert main([command, *arguments, f"--ckpt_path={tmp_path / 'own' / 'version_0'}"]) == 0
    trained, measured = (steps_of(tmp_path / "own" / folder, "val/one") for folder in ("version_0", f"{command}_0"))
    assert trained == measured == [5]


def test_folder_of_a_run_means_its_newest_sound_checkpoint(run_folder: Path, tmp_path: Path, caplog) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    (copy / "checkpoints" / "step=99999999.ckpt").write_bytes(b"PK torn")
    runs = [f"--config={copy / 'config.yaml'}", f"--runs={tmp_path}"]
    for checkpoint in (copy, run_folder / "checkpoints" / "last.ckpt"):
        assert main(["test", *runs, f"--ckpt_path={checkpoint}"]) == 0
    assert "Passed over" in caplog.text
    values = [metrics(tmp_path / "pretrain_digits" / f"test_{number}")[0]["test/loss"] for number in (0, 1)]
    assert values[0] == values[1]


def test_weights_without_a_model_and_untrained_ones_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.ckpt")
    run = ["test", f"--config={RECIPE}", f"--runs={tmp_path / 'runs'}", "--trainer.limit_test_batches=1"]
    assert "`ckpt_path` to be a checkpoint of a run" in answer(capsys, [*run, f"--ckpt_path={tmp_path / 'other.ckpt'}"])
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "weights.ckpt")
    fit = ["fit", f"--config={RECIPE}", f"--runs={tmp_path / 'runs'}", f"--ckpt_path={tmp_path / 'weights.ckpt'}"]
    assert "which has no 'optimizer_states'" in answer(capsys, fit)
    assert main(run) == 0
    assert "masklr: no `ckpt_path`: the weights are those that the recipe begins with" in capsys.readouterr().err


def test_no_thread_of_a_process_group_outlives_its_run(tmp_path: Path) -> None:
    """One that holds a tensor when Python ends aborts the process, which then fails after all its work is done."""
    assert fit(tmp_path, "--trainer.strategy=ddp", "--trainer.devices=1", steps=1) == 0
    assert not torch.distributed.is_initialized()
    assert not [name for name in threads() if "gloo" in name]


def threads() -> list[str]:
    return [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]


def test_predict_writes_features_of_a_split(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    arguments = ["--data.init_args.predict_split=test", "--trainer.callbacks=null"]
    recipe = yaml.safe_load(RECIPE.read_text())
    for option in ("max_steps", "val_check_interval", "check_val_every_n_epoch", "callbacks"):
        recipe["trainer"].pop(option)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["predict", f"--config={path}", *SMALL[:6], f"--runs={tmp_path}", "--wandb=off", *arguments]) == 0
    (written,) = tmp_path.rglob("predictions.safetensors")
    tensors = load_file(written)
    count = len(tensors["labels"])
    assert tensors["features"].shape == (count, 16)
    assert tensors["positions"].tolist() == list(range(count))
    assert set(tensors["labels"].tolist()) == set(range(10))


# -------------------------------------------------------------------------------------------------- help, quick answers


def test_help_shows_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from masklr.cli import main; assert main(['--help']) == 0; "
        "assert not {'torch', 'pytorch_lightning', 'timm', 'wandb', 'numpy'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for command in ("fit", "validate", "test", "predict"):
        assert f"\n  {command} " in shown


def test_help_of_fit_imports_no_library_that_only_a_run_needs() -> None:
    # Lightning's own imports are the measure: torchmetrics alone brings several plotting and vision libraries.
    code = (
        "import sys\nimport pytorch_lightning.cli\nbefore = set(sys.modules)\nfrom masklr.cli import main\n"
        "try:\n    main(['fit', '--help'])\nexcept SystemExit as stopped:\n    assert stopped.code == 0\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'timm', 'wandb', 'sklearn', 'datasets', 'matplotlib', 'torchvision', 'safetensors', 'pandas'} & new\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--wandb" in done.stdout


# ----------------------------------------------------------------------------------------------------------- bad input


def answer(capsys: pytest.CaptureFixture[str], run: list[str]) -> str:
    """The one sentence that a failing command prints."""
    try:
        code = main(run)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert len(errors) == 1, errors
    assert errors[0].startswith("masklr: error: ")
    return errors[0].removeprefix("masklr: error: ")


def edited(tmp_path: Path, old: str, new: str) -> Path:
    text = RECIPE.read_text()
    assert old in text
    path = tmp_path / "edited.yaml"
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("mask_ratio:", "mask_ration:", "`MaskedAutoencoder` has no option 'mask_ration'; did you mean mask_ratio"),
        ("max_steps:", "max_stepz:", "`fit` has no option 'trainer.max_stepz'; did you mean trainer.max_steps"),
        ("batch_size:", "batchsize:", "`Digits` has no option 'batchsize'; did you mean batch_size"),
        ("name: pre", "nam: pre", "`fit` has no option 'nam'; did you mean name"),
        ("masklr.data.Digits", "masklr.data.Digitz", "did you mean Digits"),
        ("mask_ratio: 0.6", "mask_ratio: 1.2", "Expected `mask_ratio` in (0, 1), got 1.2."),
        ("mask_ratio: 0.6", "mask_ratio: 0.99", "`mask_ratio`"),
        ("mask_ratio: 0.6", "mask_ratio: most", "mask_ratio"),
        ("image_size: 8", "image_size: 9", "Expected `image_size` height 9 to be a multiple of `patch_size` 2."),
        ("vit_tiny_patch16_224", "vit_tinny", "did you mean vit_tiny_patch16"),
        ("layers: [norm]", "layers: [norn]", "Expected `layers` to match something, got 'norn'; did you mean norm"),
        ("module: model.encoder", "module: model.encode", "did you mean model.encoder"),
        ("accelerator: auto", "accelerator: abacus", "abacus"),
        ("    optim:", "    mask: {'*': 1}\n    optim:", "`Pretraining` has no option 'mask'; did you mean masks"),
        ("    optim:", "    masks: [3]\n    optim:", "`masks`: Expected a mapping of names to values, got [3]."),
        (
            "    optim:",
            "    masks: {'**.fc2': {class_path: masklr.layers.Dropout, p: 0.1}}\n    optim:",
            "`masks`: Expected only `class_path` and `init_args` in the entry of a class, got 'p' beside them",
        ),
        (
            "    optim:",
            "    masks: {'**.fc2': {class_path: torch.nn.Dropout}}\n    optim:",
            "`masks`: Expected a LayerFactory, got torch.nn.Dropout; did you mean masklr.layers.Dropout?",
        ),
        ("    optim:", "    masks:\n      *.fc2: 3\n    optim:", "edited.yaml to be YAML: while scanning an alias in"),
        ("embed_dim: 96", "embed_dim: [1]", "timm cannot build `encoder`"),
    ],
)
def test_mistake_in_a_recipe_is_one_sentence_and_leaves_no_folder(
    old: str, new: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    run = ["fit", f"--config={edited(tmp_path, old, new)}", f"--runs={runs}", "--wandb=off"]
    assert told in answer(capsys, run)
    assert not [path for path in runs.rglob("*") if path.is_file()]
    assert not list(runs.glob("*/*"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fitt"], "did you mean fit"),
        (["zzz"], "there are fit, validate, test, predict, measure, export."),
        (["fit"], "Expected a recipe, --config RECIPE.yaml, or at least the options fit.data, fit.model."),
        (
            ["fit", f"--config={RECIPE}", "--seed_everything=x"],
            "`seed_everything`: Expected true or false or an integer, got x.",
        ),
        (["fit", f"--config={RECIPE}", "--data.batch_size=x"], "`batch_size`: Expected an integer, got x."),
        (
            ["fit", f"--config={RECIPE}", f"{MODEL}decoder=half"],
            "`decoder`: Expected one of 'full', 'cross', got half.",
        ),
        (
            ["fit", f"--config={SHARDS}", "--data.init_args.streaming=maybe"],
            "Expected 'auto' or true or false, got maybe.",
        ),
        (["fit", f"--config={RECIPE}", "--trainer.precision=17"], "`trainer.precision`: Expected one of 64, 32, 16, "),
        (["fit", f"--config={RECIPE}", f"{MODEL}decoder_heads=0"], "Expected `decoder_heads` of at least 1, got 0."),
        (["fit", f"--config={RECIPE}", f"{MODEL}mask_ratio=[0.5]"], "Expected a number or 2 of them, got [0.5]."),
        (["fit", "--config=nowhere.yaml"], "There is no file"),
        (["fit", f"--config={RECIPE}", "--trainer.max_step=3"], "did you mean trainer.max_steps"),
        (["fit", f"--config={RECIPE}", "--data.init_args.foo=3"], "`Digits` has no option 'foo'"),
        (["validate", f"--config={RECIPE}", "--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
        (["test", f"--config={RECIPE}", "--ckpt_path=best"], "`ckpt_path` to be a checkpoint or a run's folder"),
        (["fit", f"--config={RECIPE}", "--ckpt_path=last"], "`ckpt_path` to be a checkpoint or a run's folder"),
        (["predict", f"--config={RECIPE}", f"--ckpt_path={RECIPE}"], "pretrain_digits.yaml, which is no checkpoint"),
        (["test", f"--config={RECIPE}", f"--ckpt_path={RECIPE.parent}"], "none in"),
    ],
)
def test_mistake_on_the_command_line_is_one_sentence(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in answer(capsys, arguments)


@pytest.mark.parametrize(
    ("told", "end"),
    [
        ("DataLoader worker (pid 12) is killed by signal: Killed. ", "but 12 has ended (signal: Killed)."),
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", "but 12, 13 has ended."),
    ],
)
def test_killed_worker_is_told_with_its_signal_where_torch_knows_it(told: str, end: str) -> None:
    sentence = sentence_of(RuntimeError(told))
    assert sentence == f"Expected the worker processes of the data (`num_workers`) to go on, {end}"


@pytest.mark.parametrize(
    ("error", "printed"), [("DataLoader worker (pid 12) is killed by signal: Killed. ", False), ("another", True)]
)
def test_killed_worker_noticed_where_python_ignores_errors_prints_no_stack_trace(
    error: str, printed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Finalized:
        def __del__(self) -> None:
            raise RuntimeError(error)

    monkeypatch.setattr("masklr.recipe_cli.run", lambda arguments: Finalized() and None)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    assert main(["fit"]) == 0
    assert ("Traceback" in capsys.readouterr().err) == printed
    assert sys.unraisablehook is sys.__unraisablehook__


def test_missing_shards_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = str(tmp_path / "nothing-*.tar")
    recipe = RECIPE.with_name("pretrain_cifar10_shards.yaml")
    told = answer(capsys, ["fit", f"--config={recipe}", f"--data.init_args.train={pattern}", f"--runs={tmp_path}"])
    assert pattern in told
    assert "train" in told


def test_unknown_data_set_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = RECIPE.with_name("pretrain_cifar10.yaml")
    told = answer(capsys, ["fit", f"--config={recipe}", "--data.init_args.name=CIFAR11", f"--runs={tmp_path}"])
    assert "CIFAR10" in told


def test_run_folder_below_a_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    told = answer(capsys, ["fit", f"--config={RECIPE}", f"--runs={tmp_path / 'file' / 'runs'}", "--wandb=off"])
    assert "Cannot make a run folder" in told


def test_run_folder_without_write_permission_is_one_sentence() -> None:
    # Root may write anywhere, so the process becomes another user once everything is imported.
    code = (
        "import os, sys; from pathlib import Path; from masklr.cli import sentence_of; from masklr.loggers import *\n"
        "if os.geteuid() == 0:\n    os.seteuid(65534)\n"
        "try:\n    new_run_folder(Path(sys.argv[1]), 'x', 'fit')\n"
        "except Exception as error:\n    print(sentence_of(error))"
    )
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        locked = Path(parent) / "locked"
        locked.mkdir(mode=0o555)
        run = [sys.executable, "-c", code, str(locked)]
        told = subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()
        assert told == f"Cannot make a run folder in {locked / 'x'} (`runs`, `name`): Permission denied."
        assert not list(locked.iterdir())


def shards(folder: Path, spoil: str) -> Path:
    """A shard of 40 images, one of them spoiled."""
    rng = np.random.default_rng(0)
    path = folder / "train-000.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(40):
            pixels = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
            data = io.BytesIO()
            (pixels.convert("CMYK") if spoil == "cmyk" and number == 7 else pixels).save(data, "JPEG")
            encoded = data.getvalue()[: 200 if spoil == "truncated" and number == 7 else None]
            for ending, content in (("jpg", encoded), ("cls", str(number % 10).encode())):
                entry = tarfile.TarInfo(f"{number:06d}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:20_000])
    return path


SHARDS = [
    f"--config={RECIPE.with_name('pretrain_cifar10_shards.yaml')}",
    f"{MODEL}encoder_args={{'embed_dim': 16, 'depth': 1, 'num_heads': 2}}",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.accelerator=cpu",
    "--data.init_args.batch_size=8",
    "--wandb=off",
]


@pytest.mark.parametrize(("spoil", "named"), [("truncated", "000007"), ("cmyk", "000007"), ("cut", "train-000.tar")])
@pytest.mark.parametrize("workers", [0, 1])
def test_spoiled_sample_is_named_in_one_sentence(
    spoil: str, named: str, workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shards(tmp_path, spoil)
    run = ["fit", *SHARDS, f"--data.init_args.train={path}", f"--runs={tmp_path / 'runs'}"]
    told = answer(capsys, [*run, f"--data.init_args.num_workers={workers}", "--trainer.max_steps=20"])
    assert named in told
    assert "train-000.tar" in told


def test_spoiled_samples_are_skipped_and_counted_if_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = shards(tmp_path, "truncated")
    run = ["fit", *SHARDS, f"--data.init_args.train={path}", f"--runs={tmp_path / 'runs'}"]
    assert (
        main([*run, "--data.init_args.num_workers=0", "--data.init_args.on_error=skip", "--trainer.max_steps=20"]) == 0
    )
    assert "skipped 1 of 40 samples" in caplog.text
