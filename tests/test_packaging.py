"""kernels/ and cli/ are importable as spairkit.kernels and spairkit.cli, also from a wheel."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

import spairkit
from spairkit.storage.checkpoints import load_checkpoint

ROOT = Path(__file__).parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
SLOW_PACKAGES = (
    *("torch", "triton", "numba", "numpy", "scipy", "PIL", "matplotlib", "pydantic"),
    "optuna",
)
MAX_WHEEL_BYTES = 4_000_000
PACKAGED = "pretrained/quick"
DATA = {
    "py.typed",
    "data/digits.npz",
    "report/page.html.j2",
    f"{PACKAGED}/manifest.json",
    f"{PACKAGED}/model.safetensors",
    *(f"app/page/{path.name}" for path in ROOT.glob("spairkit/app/page/*")),
}
TINY = [
    *("--set", "data.validation_images=4", "--set", "data.test_images=4"),
    *("--set", "train.batch_size=4", "--set", "search.mode=off"),
]


@pytest.mark.parametrize("folder", ["kernels", "cli"])
def test_checkout_links_the_folder_into_the_package(folder: str) -> None:
    assert (ROOT / "spairkit" / folder).resolve() == ROOT / folder
    assert not (ROOT / folder / "__init__.py").exists(), "would shadow a package of that name"


def test_every_package_is_listed() -> None:
    sources = [p for top in ("spairkit", "kernels", "cli") for p in ROOT.glob(f"{top}/**/*.py")]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in sources}
    packages = CONFIG["tool"]["setuptools"]["packages"]
    places = CONFIG["tool"]["setuptools"]["package-dir"]
    assert {places.get(name, name) for name in packages} == found


@pytest.mark.parametrize(
    "code", ["import spairkit", "from spairkit.cli.main import main; main(['--help'])"]
)
def test_import_and_help_load_no_slow_package(code: str) -> None:
    # atexit: main ends the process
    check = f"""
import atexit, os, sys
def check():
    slow = [name for name in {SLOW_PACKAGES!r} if name in sys.modules]
    sys.stdout.flush()
    if slow:
        print(slow, file=sys.stderr, flush=True)
        os._exit(1)
atexit.register(check)
{code}
"""
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines[0] == "torch==2.13.0"
    assert all("==" in line for line in lines)
    held = {line.split("==")[0] for line in lines}
    project = CONFIG["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {line.split(">=")[0] for line in wanted} <= held


def test_version_is_written_once_and_cited() -> None:
    assert "version" not in CONFIG["project"]
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited is not None
    assert cited[1] == spairkit.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", spairkit.__version__)
    assert spairkit.__version__ in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source distribution of the checkout, and a wheel that is built from it."""
    folder = tmp_path_factory.mktemp("distributions")
    litter = shutil.ignore_patterns(
        *(".git", ".venv", ".hypothesis", ".*_cache", "build", "dist", "runs", "shared"),
        *("*.egg-info", "__pycache__"),
    )
    source = shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=litter)
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True
    )
    sdist = next(folder.glob("*.tar.gz"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(folder), str(sdist)], check=True, capture_output=True)
    return sdist, next(folder.glob("*.whl"))


def sources() -> set[str]:
    """The modules of the three folders, in the checkout."""
    tops = "spairkit", "kernels", "cli"
    return {p.relative_to(ROOT).as_posix() for top in tops for p in ROOT.glob(f"{top}/**/*.py")}


@pytest.mark.slow
def test_source_distribution_is_the_checkout(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    kept = [*ROOT.glob("*.md"), *ROOT.glob("docs/*"), *ROOT.glob("tests/*.py")]
    assert {path.relative_to(ROOT).as_posix() for path in kept if path.is_file()} <= names
    assert sources() <= names
    assert {f"spairkit/{name}" for name in DATA} <= names
    more = "LICENSE", "NOTICE", "CITATION.cff", "constraints.txt", "pyproject.toml", ".ci/run"
    assert set(more) <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("spairkit/cli")]


@pytest.mark.slow
def test_wheel_contains_one_complete_package(distributions: tuple[Path, Path]) -> None:
    wheel = distributions[1]
    assert wheel.name == f"spairkit-{spairkit.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < MAX_WHEEL_BYTES
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entries = archive.read(f"spairkit-{spairkit.__version__}.dist-info/entry_points.txt")
    modules = {f"spairkit/{name.removeprefix('spairkit/')}" for name in sources()}
    assert names == modules | {f"spairkit/{name}" for name in DATA}
    page = {Path(name).suffix for name in names if name.startswith("spairkit/app/page/")}
    assert page == {".html", ".css", ".js", ".svg"}
    assert "spairkit = spairkit.cli.main:main" in entries.decode()


def needed(wheel: Path) -> set[str]:
    """The distributions that a wheel needs without extras, and what these need."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    found: set[str] = set()
    while lines:
        wanted = Requirement(lines.pop())
        name = canonicalize_name(wanted.name)
        if name not in found and (not wanted.marker or wanted.marker.evaluate({"extra": ""})):
            found.add(name)
            lines += metadata.requires(name) or ()
    return found


def environment(folder: Path, names: set[str]) -> Path:
    """The Python of an environment with these distributions alone, as links."""
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in names:
        found = metadata.distribution(name)
        for top in {path.parts[0] for path in found.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))).resolve())
    return folder / "bin" / "python"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_trains_and_draws_in_an_empty_environment(
    distributions: tuple[Path, Path], tmp_path: Path
) -> None:
    """pip installs the wheel without an index: what it needs is what its metadata say."""
    wheel = distributions[1]
    python = environment(tmp_path / "environment", needed(wheel))
    bare = {"PATH": os.defpath, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    bare["NUMBA_OPT"] = "0"  # compiling takes most of the time

    def run(*words: object) -> str:
        done = subprocess.run(
            [str(word) for word in words],
            cwd=tmp_path,
            env=bare,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import importlib.util as u; print(u.find_spec('spairkit'))"
    assert run(python, "-c", where) == "None\n", "the environment is empty"
    pip = sys.executable, "-m", "pip", "--python", python, "install", "--no-index"
    run(*pip, wheel)
    command = python.with_name("spairkit")
    assert run(command, "--version").split()[-1] == spairkit.__version__
    run(command, "train", "--steps", 20, "--out", "run", *TINY)
    printed = run(command, "viz", "run/example.png", "--checkpoint", "run", "--out", "found.png")
    assert "found.png" in printed
    with Image.open(tmp_path / "found.png") as picture:
        assert min(picture.size) > 100
    assert load_checkpoint(tmp_path / "run" / "last").step == 20
    assert run(python, "-c", "import spairkit.cli as c; print(*c.__path__)").startswith(
        str(tmp_path / "environment")
    )
