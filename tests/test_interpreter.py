"""Runs the tests of the Triton kernels in Triton's interpreter, on a machine without a GPU.

Triton chooses between compiler and interpreter when it is imported, so they need another process:
a single one, because importing torch and its compiler takes long.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    "tests/test_kernels_render.py",
    "tests/test_kernels_presence.py",
    "tests/test_kernels_scenes.py",
    "tests/test_update_graph.py",  # only the tests of scenes
]


@pytest.mark.timeout(900)
def test_kernels_pass_in_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-rp", "-k", "test_kernels or scene", *FILES],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:]
    for file in FILES:
        assert f"PASSED {file}::" in run.stdout
