"""The command `masklr measure`. Imports nothing heavy: `masklr measure --help` answers at once."""

import time
from pathlib import Path
from typing import Any

from masklr.command_parser import CommandParser

FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


def parser() -> CommandParser:
    """Options of `masklr measure`."""
    made = CommandParser(
        prog="masklr measure",
        description="Singular values of every weight matrix of a checkpoint or a timm model: a table on the terminal, "
        "and spectra.csv, spectra.npz and spectra.png in a folder.",
        epilog="A checkpoint is a Lightning .ckpt, a state dict saved by torch (.pt, .pth) or a .safetensors file. "
        "Only tensors are read; a file that needs code to be run is refused.",
        allow_abbrev=False,
    )
    made.add_argument(
        "source", metavar="CHECKPOINT_OR_TIMM_NAME", help="a file, a run's folder, or the name of a model in timm"
    )
    made.add_argument(
        "--pretrained",
        action="store_true",
        help="take timm's pretrained weights, downloaded if need be; else random ones",
    )
    made.add_argument(
        "--include",
        nargs="+",
        metavar="GLOB",
        help="matrices to measure: * does not cross a dot, ** does; default: all",
    )
    made.add_argument("--exclude", nargs="+", metavar="GLOB", help="matrices to leave out")
    made.add_argument(
        "--measures",
        nargs="+",
        metavar="NAME",
        default=["stable_rank", "effective_rank", "frobenius_norm"],
        help="functions of masklr.spectra (default: %(default)s)",
    )
    made.add_argument(
        "--attention_products",
        action="store_true",
        help="the products of each head too, W_Q^T W_K and W_O W_V; of a model",
    )
    made.add_argument("--out", type=Path, metavar="FOLDER", help="where the files go (default: measured/NAME)")
    return made


def run(arguments: list[str]) -> Path:
    """Measure, print and write; returns the folder.

    Args:
        arguments: Those after `masklr measure`.
    """
    options = parser().parse_args(arguments)
    from masklr.measure import measure, table, timm_model, write
    from masklr.state_dicts import checkpoint_state_dict

    source, path = options.source, Path(options.source)
    if path.is_dir():
        from masklr.checkpoint_files import sound_checkpoint

        path = sound_checkpoint(path)
    is_file = path.exists() or path.suffix in FILES or len(path.parts) > 1
    if is_file and not source.startswith(("hf-hub:", "hf_hub:")):
        if options.pretrained:
            raise ValueError("Expected `--pretrained` with the name of a timm model, got a checkpoint.")
        title, name = str(path), "-".join(path.with_suffix("").parts[-4:])
        model: Any = checkpoint_state_dict(path)
    else:
        title, name = f"{source}, {'pretrained' if options.pretrained else 'random'} weights", path.name
        model = timm_model(source, options.pretrained)
    began = time.perf_counter()
    spectra = measure(
        model,
        include=options.include,
        exclude=options.exclude,
        measures=options.measures,
        attention_products=options.attention_products,
    )
    seconds = time.perf_counter() - began
    print(f"{title}\n\n{table(spectra)}\n")
    files = write(options.out or Path("measured") / name.lstrip("./-"), spectra, title)
    print(f"{len(spectra)} matrices in {seconds:.2g} seconds")
    print("\n".join(str(file) for file in files))
    return files[0].parent
