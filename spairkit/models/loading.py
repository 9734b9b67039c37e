"""From a config or a checkpoint to a model that is ready to train or to detect."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spairkit.config import AIRConfig, Config, ConnCompConfig
from spairkit.errors import InputError
from spairkit.models.air import AIR
from spairkit.models.conncomp import ConnComp
from spairkit.models.spair import SPAIR
from spairkit.storage.checkpoints import Checkpoint, load_checkpoint

Model = SPAIR | AIR | ConnComp
"""Each is a `Detector`; the first two are trained, and the third one's threshold is fitted."""


def build(config: Config) -> Model:
    """An untrained model, its weights a function of `train.seed`; torch's state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.train.seed)  # not those of GPUs
        return _new(config)


def from_checkpoint(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> Model:
    """The model of a checkpoint, in evaluation mode.

    Raises:
        InputError: the tensors are not those of the model that its config describes.
    """
    with torch.device("meta"):
        model = _new(checkpoint.config)
    expected = model.state_dict()
    mistakes = _mismatches(expected, checkpoint.model)
    if mistakes:
        raise InputError(
            f"{checkpoint.path}: its tensors do not fit its config: {mistakes[0]}"
            + (f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else "")
        )
    model.to_empty(device=device)
    model.load_state_dict(checkpoint.model)
    return model.eval()


def load(path: str | Path, device: torch.device | str = "cpu") -> Model:
    """The detector in a run folder, a checkpoint folder or its model file.

    It takes images as they are: for a run with `data.black` and `data.white` give it those that
    `spairkit.images.stretched` makes.

    Raises:
        InputError: nothing is there, or it is damaged, foreign or of another version.
    """
    return from_checkpoint(load_checkpoint(Path(path)), device)


def _new(config: Config) -> Model:
    if isinstance(config.model, AIRConfig):
        return AIR(config.model, (config.data.image_height, config.data.image_width))
    if isinstance(config.model, ConnCompConfig):
        return ConnComp(config.model)
    return SPAIR(config.model)


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
