"""Imports run one way only: kernels <- the library, rung by rung <- cli. Some run nowhere."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (
    *("kernels", "spairkit", "spairkit/benchmarks", "spairkit/data"),
    *("spairkit/experiments", "spairkit/report", "cli"),
)

# a module may import from the rungs above its own, and from no other
RUNGS: list[set[str]] = [
    {"kernels.launch", "kernels.threads", "kernels.walk"},
    {"kernels.elementary_cpu"},
    {"kernels.squash_cpu"},
    {
        "kernels.appearance_cpu",
        "kernels.compose_triton",
        "kernels.convolution_cpu",
        "kernels.glimpse_cpu",
        "kernels.likelihood_cpu",
        "kernels.normal_kl_cpu",
        "kernels.presence_cpu",
        "kernels.render_cpu",
        "kernels.render_triton",
        "kernels.scatter_triton",
    },
    {"kernels.cells_cpu", "kernels.presence_triton", "kernels.render_triton_backward"},
    {"kernels.cells_op", "kernels.presence_op", "kernels.render_op", "kernels.scenes_op"},
    {"kernels.gate"},
    {
        "allocator",
        "backends",
        "errors",
        "boxes",
        "colours",
        "config",
        "detections",
        "elbo",
        "fused",
        "precision",
        "sampling",
        "tight_boxes",
        "wavefront",
    },
    {
        "config_values",
        "convolutions",
        "densities",
        "detector",
        "distributed",
        "drawing",
        "durable",
        "metrics",
        "update_graph",
        "data.hashing",
    },
    {
        "affine",
        "glimpses",
        "latents",
        "networks",
        "presence",
        "rendering",
        "images",
        "checkpoints",
        "presets",
        "search_space",
        "data.scatter",
        "data.glyphs",
    },
    {"cell_steps", "conncomp", "sweep_study"},
    {"cell_loop"},
    {
        "air",
        "spair",
        "benchmarks.timing",
        "runs",
        "data.annotations",
        "data.scenes",
        "report.curves",
        "experiments.published",
    },
    {"models", "evaluation", "data.folder", "report.page", "report.trials"},
    {"data.datasets", "benchmarks.plain"},
    {"validation", "benchmarks.operators"},
    {"threshold_search"},
    {"training"},
    {
        "sweeps",
        "benchmarks.steps",
        "benchmarks.targets",
        "experiments.intervals",
        "experiments.settings",
    },
    {"sweep_processes", "experiments.folder"},
    {"experiments.compare"},
    {"experiments.table"},
    {"experiments.picture"},
    {"cli.console", "cli.interrupts"},
    {"cli.ledger", "cli.options"},
    {"cli.figures"},
    {"cli.bench_train"},
    {"cli.bench", "cli.config", "cli.data", "cli.detect", "cli.doctor", "cli.report", "cli.viz"},
    {"cli.evaluate", "cli.train"},
    {"cli.compare", "cli.sweep"},
    {"cli.main"},
]
RUNG = {name: number for number, names in enumerate(RUNGS) for name in names}

KERNELS_NEED = {"torch", "triton", "numba", "numpy", "spairkit", "scipy", "threadpoolctl"}
ONLY_CLI_NEEDS = {"typer", "rich"}


def modules() -> dict[str, Path]:
    """Name below spairkit, and file."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {
        name.removeprefix("spairkit."): path
        for name, path in names.items()
        if not path.stem.startswith("__")
    }


MODULES = modules()


def imports(name: str) -> set[str]:
    """Full names of what a module imports: modules, and names in them that may be modules."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_every_module_has_a_rung() -> None:
    assert set(RUNG) == set(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_upwards(name: str) -> None:
    for other in {other.removeprefix("spairkit.") for other in imports(name)} & set(RUNG):
        assert RUNG[other] < RUNG[name], f"{name} imports {other}, which is not above it"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_other_packages_stay_where_they_belong(name: str) -> None:
    packages = {other.split(".")[0] for other in imports(name)} - sys.stdlib_module_names
    if name.startswith("kernels."):
        assert packages <= KERNELS_NEED
    elif not name.startswith("cli."):
        assert not packages & ONLY_CLI_NEEDS


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_can_run_what_a_file_holds(name: str) -> None:
    """No door to pickle, to code in strings, or to a shell."""
    assert not imports(name) & {"pickle", "joblib", "yaml", "dill", "marshal", "shelve"}
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call not in {"eval", "exec", "torch.load", "os.system"}
            if call.endswith("np.load"):
                assert "allow_pickle=False" in ast.unparse(node)
            assert "shell" not in {keyword.arg for keyword in node.keywords}
