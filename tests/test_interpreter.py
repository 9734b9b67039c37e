"""The Triton kernels, on a machine without a GPU: their tests again, in Triton's interpreter.

Triton chooses between compiler and interpreter when it is imported: hence a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["kernels_render", "kernels_presence", "kernels_scenes"])
def test_kernels_pass_in_the_interpreter(name: str) -> None:
    pass_in_the_interpreter(f"tests/test_{name}.py")


@pytest.mark.timeout(900)
def test_scenes_are_part_of_an_update_in_the_interpreter() -> None:
    pass_in_the_interpreter("tests/test_update_graph.py", "-k", "scene")


def pass_in_the_interpreter(*tests: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *tests],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:]
    assert " passed" in run.stdout
