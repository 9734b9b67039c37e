"""Runs the tests of the Triton kernels in Triton's interpreter, on a machine without a GPU.

Triton chooses between compiler and interpreter when it is imported, so they need another process:
a single one, because importing torch and its compiler takes long.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import triton

ROOT = Path(__file__).parent.parent
FILES = [
    "tests/test_kernels_render.py",
    "tests/test_kernels_presence.py",
    "tests/test_kernels_scenes.py",
    "tests/test_kernels_cells.py",
    "tests/test_kernels_densities.py",
    "tests/test_kernels_launches.py",
    "tests/test_update_graph.py",  # only the tests of scenes
    "tests/test_extreme_inputs.py",  # only those of rendering and of the count prior
]
# it makes arrays of one number into numbers, which NumPy 2.4 refuses
pytestmark = pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 needs NumPy below 2.4",
)
CHOSEN = "test_kernels or scene or rendered_images or count_priors"


@pytest.mark.timeout(900)
def test_kernels_pass_in_the_interpreter() -> None:
    interpret(CHOSEN, "not long", FILES)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_every_grid_of_cells_passes_in_the_interpreter() -> None:
    files = [file for file in FILES if "cells" in file or "launches" in file]
    interpret(CHOSEN, "long", files)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_200_extreme_inputs_are_finite_in_the_interpreter() -> None:
    interpret(CHOSEN, "long", FILES[-1:])


def interpret(chosen: str, marks: str, files: list[str]) -> None:
    """Runs the chosen tests of each of the files."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rp", "-k", chosen, "-m", marks]
    run = subprocess.run(
        [*command, *files],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTEST_ADDOPTS": "",
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:]
    for file in files:
        assert f"PASSED {file}::" in run.stdout
