"""All kernels of training are compiled before the first update, with the signatures it uses."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spairkit import backends
from spairkit.models.compiling import KERNELS, compiling
from spairkit.presets import resolve

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

# a new signature means a compilation, whether or not the cache on disk holds it
FIRST_UPDATE = """
import sys, torch
from numba.core.registry import CPUDispatcher
from spairkit.models.compiling import compiling
from spairkit.models.loading import build
from spairkit.presets import resolve

def compiled():
    return {
        f"{name}.{key}": function.signatures
        for name, module in list(sys.modules.items()) if name.startswith("spairkit.kernels.")
        for key, function in vars(module).items() if isinstance(function, CPUDispatcher)
    }

kind, preset, *likelihood = sys.argv[1:]
model = {"kind": kind} | ({"likelihood": likelihood[0]} if likelihood else {})
config = resolve(preset, {"model": model})
steps = list(compiling(config.model, torch.device("cpu")))
before = compiled()
model, images = build(config), torch.rand(8, 3, config.data.image_height, config.data.image_width)
given = {} if kind == "spair" else {"counts": torch.full((8,), 2)}
model(images, **given).total.mean().backward()
after = compiled()
print(len(before), {name for name in after if after[name] != before.get(name, [])})
"""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["spair quick", "spair paper", "spair quick normal", "air quick"])
def test_first_update_compiles_nothing_new(model: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FIRST_UPDATE, *model.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    number, more = run.stdout.split(maxsplit=1)
    assert int(number) > 4
    assert more.strip() == "set()"


@pytest.mark.parametrize(
    ("likelihood", "other"), [("bernoulli", "normal likelihood"), ("normal", "likelihood")]
)
def test_progress_lists_every_kernel_in_order(likelihood: str, other: str) -> None:
    model = resolve("paper", {"model": {"likelihood": likelihood}}).model
    steps = list(compiling(model, CPU))
    assert [step.name for step in steps] == [name for name in KERNELS if name != other]
    done = [step.done for step in steps]
    assert done[0] == 0
    assert done == sorted(set(done))
    assert done[-1] < steps[-1].total


def test_narrow_backbones_compile_no_convolutions() -> None:
    assert "convolutions" not in [step.name for step in compiling(resolve("quick").model, CPU)]


def test_nothing_is_compiled_if_no_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(compiling(resolve("quick", {"model": {"kind": "conncomp"}}).model, CPU))
    assert not list(compiling(resolve("quick").model, torch.device("meta")))
    monkeypatch.setitem(backends._tried, "cpu", False)
    assert not list(compiling(resolve("quick").model, CPU))
