"""Which room of the package may import which, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import masklr

ROOT = Path(masklr.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

MAY_IMPORT = {
    "masks": set(),
    "spectra": set(),
    "layer_weights": set(),
    "products": {"spectra.decompositions"},
    "matrices": {"layer_weights", "products"},
    "moments": {"spectra"},
    "probes": {"spectra"},
    "theory": {"spectra"},
    "layers": {"masks"},
    "models": {"layers", "masks", "state_dicts", "checkpoint_files"},
    "export": {"models", "state_dicts"},
    "data": set(),
    "optim": set(),
    "checkpoint_files": set(),
    "checkpoints": {"checkpoint_files"},
    "processes": set(),
    "allocator": set(),
    "strategies": {"checkpoint_files"},
    "loggers": {"callbacks.recording", "processes"},
    "summary": set(),
    "names": set(),
    "command_parser": set(),
    "state_dicts": set(),
    "spectra_figure": set(),
    "measure": {"spectra", "matrices", "products", "state_dicts", "spectra_figure"},
    "adapters": {"layers", "spectra", "moments", "matrices"},
    "compress": {"layers", "spectra", "moments", "matrices"},
    "uniformity": set(),
    "neighbors": set(),
    "tasks": {"theory", "masks", "layers", "optim", "adapters", "uniformity"},
    "callbacks": {
        "allocator",
        "checkpoint_files",
        "checkpoints",
        "processes",
        "spectra",
        "moments",
        "matrices",
        "products",
        "probes",
        "neighbors",
        "theory",
        "masks",
        "layers",
    },
    "report": {"spectra"},
    "sweep": {"spectra"},
}
COMMAND_LINE = {
    "cli",
    "recipe_cli",
    "resumed_run",
    "saved_recipe",
    "recipe_parser",
    "measure_cli",
    "export_cli",
}  # may import everything
SERVES_TIMM = {"models.attention", "models.decoder_blocks", "models.fast_mlp"}  # subclasses of its layers
HEAVY = {"plotly", "matplotlib", "timm", "wandb", "torchvision", "sklearn", "datasets", "transformers"}


def module_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def imports(tree, below_functions=True):
    """Dotted names of what is imported, names taken from a module included."""
    found, todo = set(), [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if typing_only or (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not below_functions):
            continue
        todo += ast.iter_child_nodes(node)
    return found


def forbidden(module, source):
    """The imports of masklr that this module's room does not allow."""
    room = module.partition(".")[0]
    if room in COMMAND_LINE or not room:
        return []
    allowed = {room, "names", "__version__", *MAY_IMPORT[room]}
    inside = {name.removeprefix("masklr.") for name in imports(ast.parse(source)) if name.split(".")[0] == "masklr"}
    return sorted(n for n in inside if not any(n == a or n.startswith(f"{a}.") for a in allowed))


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_file_imports_only_the_rooms_that_its_own_may_import(file):
    module = module_of(file)
    assert not module or module.partition(".")[0] in MAY_IMPORT.keys() | COMMAND_LINE, f"{module} has no room"
    assert forbidden(module, file.read_text()) == []


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_file_imports_no_heavy_library_when_it_is_imported(file):
    tops = {name.split(".")[0] for name in imports(ast.parse(file.read_text()), below_functions=False)}
    allowed = {"timm"} if module_of(file) in SERVES_TIMM else set()
    assert tops & HEAVY == allowed & tops
    assert "" not in tops, "relative import"


@pytest.mark.parametrize("file", [f for f in FILES if module_of(f).partition(".")[0] == "models"], ids=module_of)
def test_models_never_import_lightning(file):
    tops = {name.split(".")[0] for name in imports(ast.parse(file.read_text()))}
    assert not tops & {"pytorch_lightning", "lightning"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("callbacks.probe", "from masklr.models import MaskedAutoencoder"),
        ("callbacks.probe", "def f():\n    import masklr.tasks.pretraining"),
        ("callbacks.probe", "from masklr import tasks"),
        ("matrices", "from masklr.spectra import gram"),
        ("loggers", "from masklr.callbacks.probe import Probe"),
    ],
)
def test_the_reader_of_imports_sees_a_forbidden_one(module, source):
    assert forbidden(module, source)


def test_the_package_itself_imports_no_torch():
    code = "import sys, masklr, masklr.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
