"""Compiles the CPU kernels of a model before its first update, so that progress can be shown.

for step in compiling(config.model, device):
    print(f"compiling {step.name}: {step.done / step.total:.0%}")
"""

from collections.abc import Iterator

import torch

from spairkit.backends import runs_compiled
from spairkit.config import ConnCompConfig, ModelConfig, SPAIRConfig
from spairkit.kernels.warm_up import KERNELS, Compiling, warm_up
from spairkit.models.convolutions import has_kernel
from spairkit.models.networks import strided_shapes


def compiling(config: ModelConfig, device: torch.device) -> Iterator[Compiling]:
    """Compiles every Numba kernel that training needs, or loads it from the cache on disk.

    Each is announced before the work on it begins. Nothing comes where nothing is to be compiled:
    on another device than the CPU, without Numba, and for ConnComp. With a warm cache it takes a
    fraction of a second, which the first update then saves.
    """
    if not runs_compiled(torch.empty(0, device=device, dtype=torch.float32)):
        return
    if isinstance(config, SPAIRConfig):
        names = list(KERNELS)
        shapes = strided_shapes(config.strides, config.backbone_channels)
        if not any(map(has_kernel, shapes, config.strides)):
            names.remove("convolutions")
        yield from warm_up(names)
    elif not isinstance(config, ConnCompConfig):
        yield from warm_up(["likelihood", "divergences"])
