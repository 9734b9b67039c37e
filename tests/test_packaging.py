"""kernels/ and cli/ are importable as spairkit.kernels and spairkit.cli, also from a wheel."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
SLOW_PACKAGES = (
    *("torch", "triton", "numba", "numpy", "scipy", "PIL", "matplotlib", "pydantic"),
    "optuna",
)
MAX_WHEEL_BYTES = 4_000_000


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


@pytest.mark.slow
def test_wheel_contains_one_complete_package(tmp_path: Path) -> None:
    litter = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=litter)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.stat().st_size < MAX_WHEEL_BYTES
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entries = archive.read(
            f"spairkit-{CONFIG['project']['version']}.dist-info/entry_points.txt"
        )
    assert {name.split("/")[0] for name in names} == {"spairkit"}
    modules = {
        f"spairkit/{path.relative_to(ROOT)}".replace("spairkit/spairkit/", "spairkit/")
        for top in ("spairkit", "kernels", "cli")
        for path in ROOT.glob(f"{top}/**/*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules
    packaged = "spairkit/pretrained/quick"
    page = {f"spairkit/app/page/{path.name}" for path in ROOT.glob("spairkit/app/page/*")}
    assert {Path(name).suffix for name in page} == {".html", ".css", ".js", ".svg"}
    assert names - modules - page == {
        "spairkit/py.typed",
        "spairkit/data/digits.npz",
        "spairkit/report/page.html.j2",
        f"{packaged}/manifest.json",
        f"{packaged}/model.safetensors",
    }
    assert page <= names
    assert "spairkit = spairkit.cli.main:main" in entries.decode()
