"""The default kernels compile without a GPU; `python -m spairkit.kernels.gate` compiles all.

Triton's interpreter accepts more than its compiler, and does not count registers.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spairkit.kernels.gate import TARGETS, Build, configurations, occupancy

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(900)
def test_default_kernels_compile_without_spills() -> None:
    # Triton chooses between compiler and interpreter when it is imported
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "spairkit.kernels.gate", "--representative"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) >= 8
    assert all(line.startswith("ok") and "spills   0" in line for line in lines)


def test_registers_are_bounded_in_the_backward_pass_of_training() -> None:
    """By as much as lets a multiprocessor of 65,536 registers hold two blocks of 256 threads."""
    rows = [row for row in configurations() if row.name.startswith("render backward")]
    bounds = {row.name: row.most_registers for row in rows}
    assert bounds["render backward 14x14 C3 N64 fp32"] is None
    bound = bounds["render backward 14x14 C3 N64 fp32 floor"]
    assert bound is not None
    assert 2 * 256 * bound <= 65536
    assert bounds["render backward 28x28 C3 N64 fp32 floor"] is None, "it would spill"


def test_gate_lists_every_kernel() -> None:
    listed = {configuration.kernel.__name__ for configuration in configurations()}
    written = {
        line.split("(")[0].removeprefix("def ")
        for path in (ROOT / "kernels").glob("*_triton*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def _") and line.split("(")[0].endswith("_kernel")
    }
    assert listed == written


def test_failures_and_spills_fail_the_gate() -> None:
    rows = configurations()
    default = next(row for row in rows if row.is_default)
    other = next(row for row in rows if not row.is_default)
    assert Build().passes(default)
    assert not Build(spills=1).passes(default)
    assert Build(spills=8).passes(other)
    assert not Build(spills=9).passes(other)
    assert not Build(error="CompilationError").passes(other)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "held"),
    [
        # 64 warps, 65,536 registers in four parts, 228 KiB of shared memory
        (64, 1024, 1, 32),
        (56, 2048, 4, 36),
        (80, 7168, 8, 24),
        (95, 7168, 8, 16),
        (32, 0, 4, 64),
        (32, 116736, 4, 8),
        (32, 116737, 4, 4),
        (255, 0, 8, 8),
    ],
)
def test_occupancy_on_a_hopper(registers: int, shared: int, warps: int, held: int) -> None:
    assert occupancy(TARGETS["sm_90"], registers, shared, warps) == held
