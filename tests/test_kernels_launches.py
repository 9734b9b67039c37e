"""The number of kernels that an update launches on a GPU, counted in Triton's interpreter.

An operation of torch counts as one launch unless it returns a view or only allocates. Some take
more than one on a GPU, such as the gradient of a convolution, and all of Adam counts as one.
"""

import os
from collections import Counter
from typing import Any

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from spairkit import backends, presence, presets, rendering
from spairkit.backends import Backend
from spairkit.data.datasets import open_dataset
from spairkit.training.trainer import Trainer

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton: see test_interpreter.py"
)
ALLOCATING = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
FREE = ALLOCATING | {"detach", "lift_fresh", "_unsafe_view", "_reshape_alias"}


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel, also those inside spairkit's own operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = OPDEFS.get(func._schema.name)
        if own is not None:
            with self:
                return own._init_fn(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not (func.is_view or name in FREE):
            self.counts[name] += 1
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def _poison_fresh_memory() -> None:
    """Not here: filling fresh memory would count."""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Counts launches, Triton's included, where torch takes the ways that it takes on a GPU."""
    from triton.runtime.interpreter import GridExecutor

    counter = Launches()

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        """Runs nothing: no launch depends on values."""
        counter.counts[self.fn.__name__] += 1

    def chosen(backend: Backend, tensor: torch.Tensor, name: str) -> str:
        is_auto = backend == "auto" and tensor.dtype != torch.float64
        return backends.chosen_backend("triton" if is_auto else backend, tensor, name)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    for module in (presence, rendering):
        monkeypatch.setattr(module, "chosen_backend", chosen)
    monkeypatch.setitem(backends._tried, "cpu", False)
    # squash and row_product pad on a CPU, unless they are exported
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    return counter


def make_trainer(preset: str, grid: tuple[int, int], backend: str) -> Trainer:
    """Of a tiny SPAIR with as many layers as in `preset`, after one update."""
    device = torch.device("cpu")
    model = {
        "kind": "spair",
        "cell": 12,
        "backbone_channels": [2],
        "features": 3,
        "hidden": 4,
        "passthrough": 2,
        "what": 2,
        "encoder_hidden": [3, 3],
        "decoder_hidden": [3, 3],
        "object_size": 2,
    }
    data = {"image_height": 12 * grid[0], "image_width": 12 * grid[1], "max_objects": 1}
    train = {"batch_size": 1, "training_wheels": 0, "threads": 1, "backend": backend}
    config = presets.resolve(preset, {"data": data, "model": model, "train": train})
    trainer = Trainer(config, None, open_dataset(config.data, "train", device), device)
    trainer.update()
    return trainer


def launches_of_update(
    launches: Launches, preset: str, grid: tuple[int, int], backend: str
) -> Counter[str]:
    """Of an update from a batch and noise that lie on the device."""
    trainer = make_trainer(preset, grid, backend)
    inputs = trainer._inputs(1)
    launches.counts.clear()
    with launches:
        trainer._apply(inputs)
    return Counter(launches.counts)


@pytest.mark.parametrize("side", [4, 12])
@pytest.mark.parametrize("preset", ["paper", "quick"])
def test_update_takes_at_most_200_launches_at_any_grid(
    preset: str, side: int, launches: Launches
) -> None:
    small, large = (
        launches_of_update(launches, preset, grid, "triton") for grid in ((2, 2), (side, side))
    )
    assert small == large
    assert large["_cells_forward_kernel"] == large["_cells_backward_kernel"] == 1
    assert large["convolution_backward"] == 6
    print(f"{preset}, {side} x {side} cells: {large.total()} launches")
    assert large.total() <= 200, large


def test_plain_loop_takes_more_launches_the_more_waves(launches: Launches) -> None:
    few, many = (
        launches_of_update(launches, "paper", (side, side), "auto").total() for side in (4, 12)
    )
    print(f"plain: {few} and {many} launches")
    assert many > 2 * few > 2000


def test_update_never_waits_for_the_device(launches: Launches, no_sync: type[Any]) -> None:
    trainer = make_trainer("paper", (2, 3), "triton")
    inputs = trainer._inputs(1)
    with no_sync():
        trainer._apply(inputs)
    assert launches.counts["_cells_backward_kernel"] == 2
