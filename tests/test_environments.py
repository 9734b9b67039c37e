"""A command where folders are missing, the locale and the terminal are odd, or packages broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spairkit.images import write_png

ODD = {
    "HOME": "/nonexistent",
    "TMPDIR": "/nonexistent",
    "LC_ALL": "POSIX",
    "LANG": "C",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONUTF8": "0",
    "PYTHONIOENCODING": "ascii",
    "TERM": "dumb",
    "COLUMNS": "20",
    "LINES": "1",
    "OMP_NUM_THREADS": "0",
}


def detect(folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    write_png(folder / "é.png", torch.zeros(3, 48, 48))
    words = ["detect", "é.png", "--out", "found.json", "--search", "off", "--device", "cpu"]
    return subprocess.run(
        [sys.executable, "-m", "spairkit", *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_odd_environment_changes_nothing(tmp_path: Path) -> None:
    done = detect(tmp_path, **ODD)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "found.json").read_text()) == []
    assert "wrote found.json: 0 objects in 1 image" in done.stderr


@pytest.mark.parametrize(("names", "status"), [(("numba", "triton", "optuna"), 0), (("scipy",), 2)])
def test_broken_packages_are_named_in_one_line(
    tmp_path: Path, names: tuple[str, ...], status: int
) -> None:
    for name in names:
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "__init__.py").write_text(f"raise ImportError('no {name}')")
    path = os.pathsep.join(
        [str(tmp_path / "broken"), str(Path(__file__).parent.parent), os.getenv("PYTHONPATH", "")]
    )
    done = detect(tmp_path, PYTHONPATH=path)
    assert done.returncode == status, done.stderr
    assert done.stderr.count(f"no {names[0]}") == 1
    if status:
        said = (
            "spairkit: a package that it needs is missing or broken: no scipy; install it again\n"
        )
        assert done.stderr == said
    else:
        assert "spairkit: warning: numba does not work here" in done.stderr
        assert json.loads((tmp_path / "found.json").read_text()) == []
