"""From a config or a checkpoint to a network that is ready to train or to detect."""

from collections.abc import Mapping

import torch
from torch import Tensor

from spairkit.config import AIRConfig, Config, ConnCompConfig, WatershedConfig
from spairkit.errors import InputError
from spairkit.models.air import AIR
from spairkit.models.conncomp import ConnComp
from spairkit.models.spair import SPAIR
from spairkit.models.watershed import Watershed
from spairkit.storage.checkpoints import Checkpoint

Network = SPAIR | AIR | ConnComp | Watershed
"""SPAIR and AIR are trained; ConnComp has a threshold to fit, and Watershed nothing."""


def build(config: Config) -> Network:
    """An untrained network; its weights depend on `train.seed` alone, and torch's state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.train.seed)  # not those of GPUs
        if isinstance(config.model, AIRConfig):
            return AIR(config.model, (config.data.image_height, config.data.image_width))
        if isinstance(config.model, ConnCompConfig):
            return ConnComp(config.model)
        if isinstance(config.model, WatershedConfig):
            return Watershed(config.model)
        return SPAIR(config.model)


def from_checkpoint(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> Network:
    """The network of a checkpoint, in evaluation mode.

    Raises:
        InputError: the tensors are not those of the network that its config describes.
    """
    with torch.device("meta"):  # no memory for whatever sizes a stranger's config names
        expected = build(checkpoint.config).state_dict()
    mistakes = _mismatches(expected, checkpoint.model)
    if mistakes:
        raise InputError(
            f"{checkpoint.path}: its tensors do not fit its config: {mistakes[0]}"
            + (f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else "")
        )
    network = build(checkpoint.config)
    network.load_state_dict(checkpoint.model)
    return network.to(device).eval()


def _mismatches(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    mistakes = [f"{name} is missing" for name in expected if name not in found]
    mistakes += [f"{name} is unknown" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        want, have = expected[name], found[name]
        if want.shape != have.shape:
            mistakes.append(f"{name} is {tuple(have.shape)} instead of {tuple(want.shape)}")
        elif want.dtype != have.dtype:
            mistakes.append(f"{name} is {have.dtype} instead of {want.dtype}")
    return mistakes
