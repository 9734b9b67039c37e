"""Imports go down the ladder, without cycles; some packages are confined to some folders."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# a module imports from its own rung and the rungs below it; a folder stands for all its modules
LADDER: tuple[tuple[str, ...], ...] = (
    ("kernels",),
    (
        "errors",
        "names",
        "boxes",
        "config",
        "config_values",
        "presets",
        "backends",
        "cuda_graphs",
        "rendering",
        "presence",
    ),
    ("storage",),
    ("tiff", "tiff_pages", "numpy_images", "frames", "deep_pixels", "remote"),
    (
        "images",
        "counts",
        "label_images",
        "polygons",
        "formats",
        "groups",
        "measurements",
        "detections",
        "tracking",
        "metrics",
        "preparation",
    ),
    ("data",),
    ("models",),
    ("search", "survey"),
    ("detector", "tiles", "evaluation", "floor", "export"),
    ("report",),
    ("training",),
    ("parts",),
    ("benchmarks", "experiments", "sweeps", "app"),
    ("cli",),
)
RUNG = {place: rung for rung, places in enumerate(LADDER) for place in places}

KERNELS_NEED = {"torch", "triton", "numba", "numpy", "spairkit", "scipy", "threadpoolctl"}
ONLY_CLI_NEEDS = {"typer", "rich"}


def modules() -> dict[str, Path]:
    """Name below spairkit, and file; the links to kernels/ and cli/ are not followed."""
    paths = [path for top in ("kernels", "spairkit", "cli") for path in (ROOT / top).rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {
        name.removeprefix("spairkit."): path
        for name, path in names.items()
        if not path.stem.startswith("__")
    }


MODULES = modules()


def imports(name: str) -> set[str]:
    """Full names of all imports of a module; the last part may be a module or a name in one."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def imported_modules(name: str) -> set[str]:
    """Modules of spairkit that a module imports, at the top or inside a function."""
    return {other.removeprefix("spairkit.") for other in imports(name)} & set(MODULES)


def test_ladder_lists_exactly_the_existing_modules() -> None:
    assert {name.split(".")[0] for name in MODULES} == set(RUNG)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down_the_ladder(name: str) -> None:
    own = RUNG[name.split(".")[0]]
    above = {other for other in imported_modules(name) if RUNG[other.split(".")[0]] > own}
    assert not above, f"{name} imports {above} from a higher rung"


def test_imports_have_no_cycles() -> None:
    try:
        list(TopologicalSorter({name: imported_modules(name) for name in MODULES}).static_order())
    except CycleError as error:
        pytest.fail(f"imports form a cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_packages_are_imported_only_where_allowed(name: str) -> None:
    packages = {other.split(".")[0] for other in imports(name)} - sys.stdlib_module_names
    if name.startswith("kernels."):
        assert packages <= KERNELS_NEED
    elif not name.startswith("cli."):
        assert not packages & ONLY_CLI_NEEDS


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_can_execute_file_contents(name: str) -> None:
    """No module unpickles, executes strings or starts a shell."""
    assert not imports(name) & {"pickle", "joblib", "yaml", "dill", "marshal", "shelve"}
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call not in {"eval", "exec", "torch.load", "os.system"}
            if call.endswith("np.load"):
                assert "allow_pickle=False" in ast.unparse(node)
            assert "shell" not in {keyword.arg for keyword in node.keywords}
