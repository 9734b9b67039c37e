"""Updates and iterations on a device that is not the CPU: torch's `meta`, which has no values.

Reading a value raises there. A tensor that stayed on the CPU would be copied in each update on a
GPU, which waits for it, and a CUDA graph cannot record the copy.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spairkit import presets
from spairkit.models.loading import build
from spairkit.search.iterations import Work, advanced

if TYPE_CHECKING:
    from conftest import Discs

META = torch.device("meta")


class Apart(TorchDispatchMode):
    """Fails on an operation that takes or returns a tensor of the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            assert not isinstance(value, Tensor) or value.device == META, f"{func} on the CPU"
        return result


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses this device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def twice(call: Callable[[], object]) -> None:
    """Fills the caches, whose tables come from the CPU; then the call keeps to the device."""
    call()
    with Apart():  # type: ignore[no-untyped-call]
        call()


@pytest.mark.parametrize(
    ("recipe", "wheels"),
    [("paper spair", False), ("quick spair", True), ("quick air", False), ("paper dair", False)],
)
def test_update_takes_nothing_from_the_cpu(recipe: str, wheels: bool) -> None:
    preset, kind = recipe.split()
    config = presets.resolve(preset, {"model": {"kind": kind}})
    model = build(config).to(META).train()
    height, width = config.data.image_height, config.data.image_width
    inputs: dict[str, Any] = {"success": torch.empty((), dtype=torch.float64, device=META)}
    if config.model.count_is_given:
        counts = torch.empty(2, dtype=torch.int64, device=META)
        inputs |= {"counts": counts, "steps": config.data.max_objects}

    def update() -> None:
        images = torch.empty(2, 3, height, width, device=META)
        losses = model(images, training_wheels=wheels, **inputs)
        losses.total.mean().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        torch.nn.utils.get_total_norm(gradients)

    twice(update)


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_iteration_takes_nothing_from_the_cpu(discs: "type[Discs]", likelihood: str) -> None:
    world = discs(likelihood=likelihood)
    slots = world.slots([(14.0, 18.0, 12.0, 0.0)], [(20.0, 20.0, 12.0, 0.2)])
    scene = world.scene(world.draw(slots, (48, 48)))
    work = Work.of(scene, slots, slots.present[..., None])._each(lambda tensor: tensor.to(META))
    world.network.to(META)
    twice(lambda: advanced(world.energy, work, [1]))
    twice(lambda: work.padded(4, 8))
