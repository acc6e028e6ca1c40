"""The command `masklr export`. Imports nothing heavy: `masklr export --help` answers at once."""

from pathlib import Path

from masklr.command_parser import CommandParser


def parser() -> CommandParser:
    """Options of `masklr export`."""
    made = CommandParser(
        prog="masklr export",
        description="Weights of a run as safetensors, for other libraries.",
        epilog="The encoder comes under timm's keys, so that a timm model without a head loads it with strict=True. "
        "Weights of the original release of the masked autoencoder are taken too, and come out in masklr's names.",
        allow_abbrev=False,
    )
    made.add_argument(
        "source", metavar="RUN_OR_CHECKPOINT", help="a run's folder, of which the newest checkpoint is taken, or a file"
    )
    made.add_argument(
        "--what",
        choices=["encoder", "all"],
        default="encoder",
        help="the encoder (of a classifier: its backbone), or the whole model with its decoder or head "
        "(default: %(default)s)",
    )
    made.add_argument(
        "--out", type=Path, metavar="FILE", help="a .safetensors file; default: WHAT.safetensors in the run's folder"
    )
    return made


def run(arguments: list[str]) -> Path:
    """Export, and say how to load it; returns the file.

    Args:
        arguments: Those after `masklr export`.
    """
    options = parser().parse_args(arguments)
    from masklr.checkpoint_files import sound_checkpoint
    from masklr.export import encoder_architecture, exported, write

    source = Path(options.source)
    checkpoint = sound_checkpoint(source)
    tensors = exported(checkpoint, options.what)
    folder = source if source.is_dir() else source.parent
    name = f"{options.what}.safetensors" if source.is_dir() else f"{source.stem}.{options.what}.safetensors"
    out = options.out or folder / name
    if out.suffix != ".safetensors" or (out.exists() and out.samefile(checkpoint)):
        raise ValueError(f"Expected `--out` to be a .safetensors file other than the source, got {out}.")
    architecture = encoder_architecture(checkpoint)
    write(tensors, out, architecture if options.what == "encoder" else None)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    print(f"{checkpoint}\n{out}: {options.what}, {len(tensors)} tensors, {parameters:,} numbers")
    if options.what == "encoder" and architecture is not None:
        given = "".join(f", {key}={value!r}" for key, value in architecture[1].items())
        print("\nimport timm, safetensors.torch")
        print(f"model = timm.create_model({architecture[0]!r}{given})")
        print(f"model.load_state_dict(safetensors.torch.load_file({str(out)!r}), strict=True)")
    return out
