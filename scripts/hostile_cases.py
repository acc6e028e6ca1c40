"""The inputs of scripts/hostile_inputs: what each kind spoils, and how it is then used.

A kind is a function of (generator, originals, folder) that writes spoiled copies into `folder` and returns what uses
them. That ends in normal use, or in an exception that the command line would turn into one sentence.
"""

import io
import json
import os
import pickle
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from masklr.checkpoint_files import damage, newest_sound, step_of
from masklr.checkpoints import read, write
from masklr.data import ShardedImages, TorchvisionImages
from masklr.data.decoding import View, decoded_image
from masklr.state_dicts import checkpoint_state_dict

Use = Callable[[], object]
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CANARY = "CANARY"  # stands for a path in what is written; a file there shows that code was run
TINY = {"embed_dim": 16, "depth": 1, "num_heads": 2, "class_token": False}


class Violation(Exception):  # noqa: N818 (not an error of the input)
    """Something that must not happen, in words."""


# ------------------------------------------------------------------------------------------------------------ originals


def write_originals(folder: Path) -> None:
    """Everything that is spoiled later: images, shards, a run with checkpoints, recipes."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows, columns = np.mgrid[0:24, 0:20]
    for number in range(40):
        base = (6 * rows + 4 * columns + 9 * number) % 256
        pixels = np.stack([base, 255 - base, base // 2], axis=2) + rng.integers(0, 9, (24, 20, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        ending, options = [("jpg", {}), ("png", {}), ("webp", {}), ("jpg", {"progressive": True})][number % 4]
        image = image.convert("L") if number % 8 >= 6 else image
        data = io.BytesIO()
        image.save(data, {"jpg": "JPEG"}.get(ending, ending.upper()), **options)
        (folder / "images" / f"{number:03d}.{ending}").write_bytes(data.getvalue())
    files = sorted((folder / "images").iterdir())
    (folder / "shards").mkdir()
    for number in range(2):
        with tarfile.open(folder / "shards" / f"train-{number}.tar", "w") as tar:
            for path in files[20 * number : 20 * number + 20]:
                for name, data in ((path.name, path.read_bytes()), (f"{path.stem}.cls", b"%d" % (int(path.stem) % 4))):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    _write_parquet(folder / "shards" / "train.parquet", files)
    for name, recipe in recipes().items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    options = ["--wandb=off", f"--runs={folder / 'runs'}", "--trainer.max_steps=4"]
    command(["fit", f"--config={folder / 'pretrain.yaml'}", *options])
    run = folder / "runs" / "hostile" / "version_0"
    state = read(run / "checkpoints" / "last.ckpt")["state_dict"]
    torch.save({"state_dict": state}, folder / "plain.pt")
    torch.save({"state_dict": state}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    from safetensors.torch import save_file

    save_file({key: tensor.clone() for key, tensor in state.items()}, folder / "plain.safetensors")


def _write_parquet(path: Path, files: list[Path]) -> None:
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    table = pyarrow.table({"image": images, "label": [int(file.stem) % 4 for file in files]})
    pyarrow.parquet.write_table(table, path)


def recipes() -> dict[str, dict[str, Any]]:
    """Recipes of masklr, small and without pictures."""
    trainer = {
        "accelerator": "cpu",
        "max_steps": 2,
        "check_val_every_n_epoch": None,
        "val_check_interval": 2,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    spectrum = {"every_n_steps": 2, "picture": False}
    pretrain = yaml.safe_load((CONFIGS / "pretrain_digits.yaml").read_text())
    pretrain |= {"name": "hostile"}
    pretrain["trainer"] = trainer | {
        "gradient_clip_val": 1.0,
        "callbacks": [
            {"class_path": "masklr.callbacks.RunCheckpoint", "init_args": {"every_n_steps": 2, "keep_last": 2}},
            {"class_path": "masklr.callbacks.WeightSpectrum", "init_args": {"module": "model.encoder", **spectrum}},
            {
                "class_path": "masklr.callbacks.MaskSchedule",
                "init_args": {"start": 0.1, "end": 0.0, "what": "p", "module": "model.encoder"},
            },
        ],
    }
    task = pretrain["model"]["init_args"]
    task["masks"] = {"encoder.blocks.*.mlp.fc2": {"class_path": "masklr.layers.DropConnect", "init_args": {"p": 0.1}}}
    task["augmentation"] = [{"class_path": "masklr.data.RandomCrop", "init_args": {"padding": 1}}]
    task["model"]["init_args"] |= {"encoder_args": TINY, "decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
    classify = yaml.safe_load((CONFIGS / "classify_digits_groups.yaml").read_text())
    regress = yaml.safe_load((CONFIGS / "regress_synthetic_dropout.yaml").read_text())
    for recipe in (classify, regress):
        callbacks = [c for c in recipe["trainer"]["callbacks"] if c["class_path"].endswith("WeightSpectrum")]
        callbacks[0]["init_args"] |= spectrum
        recipe["trainer"] = trainer | {"callbacks": callbacks}
    regress["trainer"]["limit_val_batches"] = 1.0
    return {"pretrain": pretrain, "classify": classify, "regress": regress}


# ------------------------------------------------------------------------------------------------------------- spoiling


def spoiled(data: bytes, rng: random.Random) -> bytes:
    """Bytes with something flipped, overwritten, cut, swapped, doubled or put in."""
    if not data:
        return bytes([rng.randrange(256)])
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        size = len(changed)
        # Headers lie in front, indices of archives at the end.
        place = rng.choice(
            [rng.randrange(size), rng.randrange(min(size, 600)), size - 1 - rng.randrange(min(size, 99))]
        )
        length = min(size - place, rng.choice([1, 2, 4, 30, 512, size]))
        how = rng.choice(["flip", "flip", "flip", "set", "noise", "end", "out", "swap", "double", "in"])
        if how == "flip":
            changed[place] ^= 1 << rng.randrange(8)
        elif how == "set":
            changed[place : place + length] = bytes([rng.choice([0, 255, 127, 48])]) * min(length, 512)
        elif how == "noise":
            changed[place : place + length] = rng.randbytes(min(length, 512))
        elif how == "end":
            del changed[place:]
        elif how == "out":
            del changed[place : place + length]
        elif how == "swap":
            other = rng.randrange(size)
            a, b = sorted((place, other))
            length = min(length, b - a, size - b)
            changed[a : a + length], changed[b : b + length] = changed[b : b + length], changed[a : a + length]
        elif how == "double":
            changed[place:place] = changed[place : place + length]
        else:
            changed[place:place] = rng.randbytes(min(length, 512))
        if not changed:
            break
    return bytes(changed)


class Code:
    """Runs code when it is unpickled."""

    def __init__(self, call: tuple[Any, tuple[Any, ...]]) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def code(rng: random.Random, canary: str) -> Code:
    """An object whose unpickling would leave the canary."""
    python = f"open({canary!r}, 'w').close()"
    return Code(
        rng.choice(
            [
                (os.system, (f"touch {canary}",)),
                (exec, (python,)),
                (eval, (python,)),
                (os.mkdir, (canary,)),
                (Path.touch, (Path(canary),)),
                (torch.save, ({}, canary)),
                (shutil.copyfile, (__file__, canary)),
            ]
        )
    )


def value(rng: random.Random, depth: int = 0) -> Any:
    """A value that no recipe expects."""
    canary = CANARY
    plain: list[Any] = [
        None,
        True,
        False,
        0,
        1,
        -1,
        -7,
        3,
        2**31,
        2**63,
        -(2**63),
        10**18,
        10**40,
        0.5,
        -0.5,
        1e-300,
        1e300,
        -1e300,
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        " ",
        "x",
        "nan",
        "null",
        "1e999",
        "0x10",
        "1_000",
        "*",
        "**",
        "[",
        "][",
        "{",
        "a.b",
        ".",
        "..",
        "/",
        "../../..",
        "\0",
        "\n",
        "\u202e\U0001f512",
        "%s%n{0}{x}${HOME}",
        "a" * 5000,
        [],
        {},
        [[]],
        [None],
        [1, "a", None],
        {"a": 1},
        {1: 2},
        {"class_path": "masklr.nothing.Here"},
        {"class_path": "torch.nn.Linear"},
        {"class_path": "torch.nn.Dropout", "init_args": {"p": 0.5}},
        {"class_path": "masklr.layers.Dropout", "p": 0.5},
        {"class_path": None},
        {"class_path": 3, "init_args": []},
        {"init_args": {}},
        {"class_path": "os.system", "init_args": {"command": f"touch {canary}"}},
        {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", canary]}},
        {"class_path": "builtins.exec", "init_args": {"source": f"open('{canary}', 'w')"}},
        {"class_path": "pathlib.Path.touch", "init_args": {"self": canary}},
        "os.system",
        "builtins.eval",
        f"__import__('os').system('touch {canary}')",
        f"$(touch {canary})",
        f"`touch {canary}`; touch {canary}",
        f"!!python/object/apply:os.system ['touch {canary}']",
        f"!!python/object/new:subprocess.Popen [[touch, {canary}]]",
        "!!python/name:os.system",
        "@" * 50,
    ]
    if depth < 2 and rng.random() < 0.08:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if depth < 2 and rng.random() < 0.08:
        return {str(value(rng, 2))[:9]: value(rng, depth + 1) for _ in range(rng.randrange(4))}
    if rng.random() < 0.02:
        nested: Any = 1
        for _ in range(rng.choice([20, 200])):
            nested = rng.choice([[nested], {"a": nested}])
        return nested
    return rng.choice(plain)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values below a nested one."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, child in children for found in [(*path, key), *places(child, (*path, key))]]


def spoil_recipe(recipe: dict[str, Any], rng: random.Random) -> None:
    """Replace values, leave some out, misspell or add keys."""
    for _ in range(rng.choice([1, 1, 1, 1, 2, 3])):
        *above, key = rng.choice(places(recipe))
        parent: Any = recipe
        for step in above:
            parent = parent[step]
        how = rng.choice(["replace"] * 7 + ["drop", "rename", "add", "wrap"])
        if how == "replace":
            old = parent[key]
            numeric = isinstance(old, int | float) and not isinstance(old, bool)
            near = (
                [0, -old, old * 10**6, old + 0.5, str(old), [old], 1 - old, old * 1e-9]
                if numeric
                else [[old], f"{old}x"]
            )
            parent[key] = rng.choice(near) if rng.random() < 0.3 else value(rng)
        elif how == "drop":
            del parent[key]
        elif how == "wrap":
            parent[key] = rng.choice([[parent[key]], {"class_path": parent[key]}, {"init_args": parent[key]}])
        elif isinstance(parent, dict):
            new = str(key)[:-1] if how == "rename" and len(str(key)) > 1 else rng.choice(["x", "p", "init_arg", "mask"])
            parent[new] = parent.pop(key) if how == "rename" else value(rng)


def yaml_text(recipe: Any, canary: str) -> str:
    """A recipe as text; what looks like a tag of Python's becomes one."""
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    lines = []
    for line in text.splitlines():
        head, tag, rest = line.partition("'!!python/")
        lines.append(f"{head}!!python/{rest.rstrip(chr(39)).replace(chr(39) * 2, chr(39))}" if tag else line)
    return "\n".join(lines).replace(CANARY, canary)


# --------------------------------------------------------------------------------------------------------- command line


def command(arguments: list[str]) -> str:
    """Run a command line of masklr in this process; its exit code must be 0, or 2 with one sentence."""
    from masklr.cli import main

    for name in [name for name in os.environ if name.startswith(("PL_", "MASKLR_"))]:
        del os.environ[name]  # set by a run for its further processes
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            exit_code: Any = main(arguments)
        except SystemExit as stopped:
            exit_code = stopped.code
    sentences = [line for line in err.getvalue().splitlines() if line.startswith("masklr: error: ")]
    if "Traceback" in err.getvalue():
        raise Violation(f"a stack trace: {err.getvalue().strip().splitlines()[-1][:200]}")
    if exit_code in (0, None):
        return "used"
    if exit_code != 2 or len(sentences) != 1:
        raise Violation(f"exit code {exit_code} with {len(sentences)} sentences: {err.getvalue()[-300:]}")
    check_sentence(sentences[0].removeprefix("masklr: error: "))
    return "one sentence"


def check_sentence(sentence: str) -> None:
    """A sentence is short, on one line, and tells something."""
    if not 10 <= len(sentence) <= 1000 or "\n" in sentence or "Traceback" in sentence:
        raise Violation(f"no sentence ({len(sentence)} characters): {sentence[:300]}")


# ---------------------------------------------------------------------------------------------------------------- kinds


def image(rng: random.Random, originals: Path, folder: Path) -> Use:
    """Bytes of an image, decoded and brought to a size."""
    path = rng.choice(sorted((originals / "images").iterdir()))
    (folder / path.name).write_bytes(spoiled(path.read_bytes(), rng))
    in_chans, view = rng.choice([1, 3]), View((16, 16), random_resized_crop=rng.choice([None, (0.2, 1.0)]))

    def use() -> None:
        decoded = decoded_image(bytearray((folder / path.name).read_bytes()), in_chans, path.name)
        made = view(decoded, (0, 0, 1))
        if decoded.dtype != torch.uint8 or made.shape != (in_chans, 16, 16):
            raise Violation(f"an image of {decoded.dtype} and {tuple(made.shape)}")

    return use


def image_folder(rng: random.Random, originals: Path, folder: Path) -> Use:
    """A folder of images, some of them spoiled, read as a data set."""
    for number, path in enumerate(rng.sample(sorted((originals / "images").iterdir()), 12)):
        target = folder / "train" / f"class{number % 2}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes()
        target.write_bytes(spoiled(data, rng) if rng.random() < 0.3 else data)
    options = _data_options(rng)
    return lambda: _read_data(TorchvisionImages(folder=str(folder), image_size=16, **options))


def shard(rng: random.Random, originals: Path, folder: Path) -> Use:
    """Bytes of tar shards, read in place; some are cut or replaced once they are indexed."""
    for path in sorted((originals / "shards").glob("*.tar")):
        data = path.read_bytes()
        (folder / path.name).write_bytes(spoiled(data, rng) if rng.random() < 0.7 else data)
    options = {"in_memory": rng.choice([True, False]), **_data_options(rng)}
    later = spoiled((folder / "train-0.tar").read_bytes(), rng) if rng.random() < 0.3 else None

    def use() -> None:
        change = None if later is None else lambda: (folder / "train-0.tar").write_bytes(later)
        _read_data(ShardedImages(str(folder / "train-*.tar"), image_size=16, streaming=False, **options), change)

    return use


def stream(rng: random.Random, originals: Path, folder: Path) -> Use:
    """Bytes of tar shards and parquet files, read as a stream."""
    pattern = rng.choice(["*.tar", "*.tar", "*.parquet"])
    for path in sorted((originals / "shards").glob(pattern)):
        data = path.read_bytes()
        (folder / path.name).write_bytes(spoiled(data, rng) if rng.random() < 0.8 else data)
    options = _data_options(rng)
    return lambda: _read_data(
        ShardedImages(str(folder / pattern), image_size=16, streaming=True, num_classes=4, shuffle_buffer=8, **options)
    )


def _data_options(rng: random.Random) -> dict[str, Any]:
    return {
        "batch_size": 4,
        "num_workers": 0,
        "in_chans": rng.choice([1, 3]),
        "on_error": rng.choice(["raise", "skip"]),
        "val_fraction": 0.25,
    }


def _read_data(data: Any, change: Callable[[], object] | None = None) -> None:
    """Read up to 12 batches for training, and the validation split."""
    data.setup("fit")
    if change is not None:
        change()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for number, (images, labels, positions) in enumerate([] if loader == [] else loader):
            if images.dtype != torch.uint8 or images.shape[1:] != (data.in_chans, 16, 16):
                raise Violation(f"a batch of {images.dtype} and {tuple(images.shape)}")
            if not len(images) == len(labels) == len(positions) or int(labels.min()) < 0:
                raise Violation("a batch whose parts do not fit together")
            if number == 11:
                break


def checkpoint(rng: random.Random, originals: Path, folder: Path) -> Use:
    """Bytes of a checkpoint with a checksum: what is not the original is refused, and the one before is found."""
    source = originals / "runs" / "hostile" / "version_0" / "checkpoints"
    for name in ("step=00000002.ckpt", "step=00000004.ckpt"):
        shutil.copyfile(source / name, folder / name)
    path, original = folder / "step=00000004.ckpt", (folder / "step=00000004.ckpt").read_bytes()
    path.write_bytes(spoiled(original, rng))

    def use() -> None:
        sound = path.read_bytes() == original
        found = newest_sound(folder)
        if found != (path if sound else folder / "step=00000002.ckpt"):
            raise Violation(f"{found} passes for the newest sound checkpoint")
        content = read(path)
        if content["global_step"] != 4:
            raise Violation("another content")

    return use


def weights(rng: random.Random, originals: Path, folder: Path) -> Use:
    """Bytes of files without a checksum: torch's, old and new, and safetensors."""
    name = rng.choice(["plain.pt", "legacy.pt", "plain.safetensors"])
    (folder / name).write_bytes(spoiled((originals / name).read_bytes(), rng))

    def use() -> object:
        if rng.random() < 0.1:
            return command(["measure", str(folder / name), f"--out={folder.parent / 'measured'}"])
        if rng.random() < 0.1:
            return command(["export", str(folder / name), f"--out={folder.parent / 'out.safetensors'}"])
        if name.endswith(".pt") and rng.random() < 0.3:
            return read(folder / name)
        return checkpoint_state_dict(folder / name)

    return use


def pickled_code(rng: random.Random, originals: Path, folder: Path) -> Use:
    """Checkpoints and weights that would run code; the sound ones among them carry a right checksum."""
    canary = str(folder.parent / "canary")
    kind = rng.choice(["whole", "zip", "legacy", "pickle", "member", "npy"])
    path = folder / ("step=00000009.ckpt" if rng.random() < 0.5 else "weights.pt")
    thing = code(rng, canary)
    state = {"a.weight": torch.ones(3, 3)}
    content = rng.choice(
        [thing, {"state_dict": {**state, "x": thing}}, {"state_dict": state, "callbacks": {"x": [thing]}}, {thing: 1}]
        if kind != "whole"
        else [{"state_dict": {**state, "x": thing}}, {"state_dict": state, "masklr": {"version": thing}}]
    )
    if kind == "whole":
        write(content, path)
    elif kind in ("zip", "member"):
        torch.save(content, path)
    elif kind == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=rng.choice([0, 2, 4])))
    else:
        with path.open("wb") as file:
            np.save(file, np.array([thing], dtype=object), allow_pickle=True)
    if kind == "member":  # a sound archive whose pickle is another
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, pickle.dumps(thing, protocol=2) if name.endswith("data.pkl") else data)
    uses: list[Use] = [
        lambda: read(path),
        lambda: checkpoint_state_dict(path),
        lambda: command(["measure", str(path), f"--out={folder.parent / 'measured'}"]),
        lambda: command(["export", str(path), f"--out={folder.parent / 'out.safetensors'}"]),
        lambda: damage(path),
    ]
    return rng.choice(uses)


def resumed(rng: random.Random, originals: Path, folder: Path) -> Use:
    """The folder of a run with something in it spoiled, resumed."""
    run = folder / "version_0"
    shutil.copytree(originals / "runs" / "hostile" / "version_0", run)
    what = rng.choice(["content", "content", "content", "metrics.csv", "run.lock", "config.yaml", "checkpoints"])
    last = run / "checkpoints" / "step=00000004.ckpt"
    if what == "content":  # a checkpoint that is whole, but says strange things
        held = read(last)
        for _ in range(rng.choice([1, 1, 2])):
            *above, key = rng.choice([p for p in places(held) if len(p) < 5 and "state_dict" not in p[:-2]])
            parent: Any = held
            for step in above:
                parent = parent[step] if isinstance(parent, dict | list) else {}
            if isinstance(parent, list | dict) and (key in parent or isinstance(parent, list)):
                if rng.random() < 0.3:
                    del parent[key]
                else:
                    strange = [torch.zeros(3), torch.full((), float("nan")), {}, [], (), "x", -1, 2**40, None, 0.5]
                    parent[key] = rng.choice(strange)
        write(held, last)
    elif what == "run.lock":
        locks = [
            "",
            "[]",
            "3",
            "null",
            '{"pid": "x"}',
            '{"pid": -1}',
            '{"pid": 1e99}',
            "\0",
            '{"pid": [1]}',
            "[" * 5000,
        ]
        locks += [json.dumps({"pid": 2**70, "host": os.uname().nodename, "started": None})]
        (run / "run.lock").write_text(rng.choice(locks))
    elif what == "checkpoints":
        for path in (run / "checkpoints").iterdir():
            if rng.random() < 0.6:
                data = spoiled(path.read_bytes(), rng)
                path.unlink()
                path.write_bytes(data)
    else:
        (run / what).write_bytes(spoiled((run / what).read_bytes(), rng))
    before = contents(run)

    def use() -> str:
        done = command(["fit", f"--resume={run}", f"--trainer.max_steps={rng.choice([4, 5])}"])
        lost = [str(path) for path in before if not path.exists() and not path.name.endswith(".lock")]
        newest = newest_sound(run / "checkpoints")
        if newest is not None:  # of checkpoints the last few are kept
            lost = [path for path in lost if not 0 <= step_of(Path(path)) < step_of(newest)]
        if done != "used" and lost:
            raise Violation(f"lost: {lost}")
        return done

    return use


resumed.writes = True  # type: ignore[attr-defined]


def recipe_values(rng: random.Random, originals: Path, folder: Path) -> Use:
    """A recipe with other values, run for a step or two."""
    recipe = yaml.safe_load((originals / f"{rng.choice(['pretrain', 'classify', 'regress'])}.yaml").read_text())
    spoil_recipe(recipe, rng)
    path = folder / "recipe.yaml"
    path.write_text(yaml_text(recipe, str(folder.parent / "canary")))
    return lambda: command(["fit", f"--config={path}", *_bounds(folder)])


def recipe_text(rng: random.Random, originals: Path, folder: Path) -> Use:
    """Bytes of a recipe."""
    source = originals / f"{rng.choice(['pretrain', 'classify', 'regress'])}.yaml"
    path = folder / "recipe.yaml"
    path.write_bytes(spoiled(source.read_bytes(), rng))
    return lambda: command(["fit", f"--config={path}", *_bounds(folder)])


def options(rng: random.Random, originals: Path, folder: Path) -> Use:
    """A command line with other values and names."""
    name = rng.choice(["pretrain", "classify", "regress"])
    recipe = yaml.safe_load((originals / f"{name}.yaml").read_text())
    path = folder / "recipe.yaml"
    shutil.copyfile(originals / f"{name}.yaml", path)
    given = []
    for _ in range(rng.choice([1, 1, 2])):
        place = [str(step) for step in rng.choice(places(recipe)) if isinstance(step, str)]
        key = ".".join(place)
        if rng.random() < 0.2:
            key = key.replace(".init_args", "")
        if rng.random() < 0.15:
            key = key[: rng.randrange(1, len(key) + 1)]
        text = yaml_text(value(rng), str(folder.parent / "canary")).strip().removesuffix("...").strip()
        text = text.replace("\0", "")
        given.append(rng.choice([f"--{key}={text}", f"--{key}", text]) if rng.random() < 0.2 else f"--{key}={text}")
    verb = rng.choices(["fit", "validate", "test", "predict", "nonsense"], [10, 1, 1, 1, 1])[0]
    bounds = _bounds(folder) if verb == "fit" else [b for b in _bounds(folder) if "max_" not in b]
    return lambda: command([verb, f"--config={path}", *given, *bounds])


def _bounds(folder: Path) -> list[str]:
    return ["--trainer.max_steps=2", "--trainer.max_epochs=2", "--wandb=off", f"--runs={folder.parent / 'runs'}"]


def arguments(rng: random.Random, originals: Path, folder: Path) -> Use:
    """Functions of `masklr.theory` with other arguments."""
    from masklr import theory

    square = torch.eye(4)
    good: dict[str, tuple[Any, ...]] = {
        "shrunk_spectrum": (torch.tensor([4.0, 3.0, 2.0, 1.0]), 0.5),
        "critical_variances": (torch.tensor([4.0, 3.0, 2.0, 1.0]), 4),
        "k_support_norm": (torch.tensor([4.0, 3.0, 2.0, 1.0]), 2),
        "mask_variance": (0.5,),
        "dropout_penalty": (square, square, 0.5),
        "dropblock_penalty": (square, square, 0.5, 2),
        "fixed_count_penalty": (square, square, 2),
        "covariance_penalty": (square, square, square),
        "dropconnect_penalty": (square, square, 0.5),
        "deep_dropout_penalty": ([square, square], 0.5),
        "deep_dropout_factor": ([4, 4], 0.5),
        "linear_mae": (square, 2, 0.5),
        "saxe_mode": (1.0, torch.tensor([0.1, 0.2]), 0.1),
        "invariant_tail": (0.1, 0.01, 0.1, 3, 5),
    }
    name = rng.choice([name for name in good if hasattr(theory, name)])
    given = list(good[name])
    for _ in range(rng.choice([1, 1, 2])):
        place = rng.randrange(len(given))
        strange = [
            [1.0, 2.0],
            [[1.0, 0.0], [0.0, 1.0]],
            np.ones((4, 4)),
            torch.ones(0),
            torch.ones(2, 2, 2),
            torch.full((4, 4), float("nan")),
            torch.arange(4),
            torch.ones(4, dtype=torch.complex64),
            torch.ones(4, 4, dtype=torch.bool),
            -torch.eye(4),
            "x",
            None,
            {},
            [],
            -1,
            0,
            10**30,
            float("nan"),
            float("inf"),
            1.5,
            True,
        ]
        given[place] = rng.choice(strange)
    return lambda: getattr(theory, name)(*given)


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Each kind with its share of all cases.
KINDS: dict[str, tuple[Callable[[random.Random, Path, Path], Use], int]] = {
    "image": (image, 24),
    "folder of images": (image_folder, 6),
    "shards in place": (shard, 14),
    "shards as a stream": (stream, 4),
    "checkpoint": (checkpoint, 14),
    "weights": (weights, 10),
    "pickled code": (pickled_code, 5),
    "run, resumed": (resumed, 2),
    "recipe, values": (recipe_values, 10),
    "recipe, bytes": (recipe_text, 3),
    "command line": (options, 4),
    "arguments in Python": (arguments, 4),
}
