"""Memory that is freed is used again, without asking the system for it."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from spairkit.allocator import keep_freed_memory

assert keep_freed_memory()

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 25)  # 256 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first, second = page_faults(), page_faults()
print(first, second)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_freed_memory_is_used_again() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    first, second = map(int, run.stdout.split())
    assert first > 100
    assert second < first / 10
