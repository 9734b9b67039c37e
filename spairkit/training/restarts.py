"""Early signs that a training fails, and the settings that it starts again with.

They are looked for at validations of a training on a folder whose settings were measured
(`spairkit.survey`). `train.retries` names what may change; each is used once, in its order. When
none is left, the training goes on, and is judged at its end only (`spairkit.report.signs`).

Whether a training starts again is a pure function of its config and its weights, so a run that is
killed and resumed starts again at the same step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spairkit.backends import computing_in
from spairkit.config import Config, SPAIRConfig
from spairkit.config_values import from_dict, merge, nested, to_dict
from spairkit.data.datasets import Dataset, validation_batches
from spairkit.detections import Detections
from spairkit.detector import Detector
from spairkit.floor import floor_of
from spairkit.metrics import agreement
from spairkit.models.spair import SPAIR
from spairkit.report.signs import AGREED
from spairkit.training.trainer import Trainer, success_at
from spairkit.training.validation import of_prepared

Way = Literal["many", "few"]
"""Whether a training has failed with too many objects, or with too few."""

_BATCHES = 4  # of crops that are judged
_FIRST_STEP = 200
_FEW_SHARE = 0.3  # of the updates, before which few objects are only slow to appear
_LAST_SHARE = 0.5  # of the updates, after which a training is judged at its end only
_INFORMED = 0.5  # s of the count prior from which empty cells are at least as likely as objects
_CELLS_ON = 0.9  # share of the cells of the grid
_DARK, _PAINTED = 0.15, 0.5  # mean contrast of an object on the background; share of these
_RECONSTRUCTED = 0.95  # of the squared error of the background alone
_FEWEST = 20  # objects that an agreement is judged on
_FACTOR = 3.0  # by which the noise of a pixel grows


@dataclass(frozen=True)
class Restart:
    """A training was given up, and starts again at the first step with another config."""

    step: int
    """Number of updates when it was given up."""
    reason: str
    """The sign of failure, for users."""
    changed: Mapping[str, Any]
    """The settings that differ now, by dotted key."""
    config: Config
    """Of the training that begins."""

    def __str__(self) -> str:
        """In one line."""
        words = ", ".join(f"{key} = {value!r}" for key, value in self.changed.items())
        return f"step {self.step}: {self.reason}; starting again with {words}"

    def record(self) -> dict[str, Any]:
        """The line of metrics.jsonl; its step is 0, so that it stays when training goes on."""
        return {
            "kind": "restart",
            "step": 0,
            "after": self.step,
            "reason": self.reason,
            "changed": dict(self.changed),
        }


def is_judged(config: Config, step: int) -> bool:
    """Whether the validation after `step` updates may end in a restart.

    Not before the prior on the count has left its flat start, where many objects are no failure.
    """
    suits = isinstance(config.model, SPAIRConfig) and config.prepare.contrast != "none"
    if not config.train.retries or not suits:
        return False
    first = _FIRST_STEP + config.train.training_wheels
    in_time = first <= step <= _LAST_SHARE * config.train.steps
    return in_time and success_at(config, step) >= _INFORMED


def restart_of(trainer: Trainer, dataset: Dataset) -> Restart | None:
    """The restart that a training of SPAIR needs now; None if it goes well.

    None, too, if nothing of `train.retries` helps against what is wrong.

    Args:
        trainer: has just made an update.
        dataset: the validation split.
    """
    config, model = trainer.config, trainer.model
    assert isinstance(model, SPAIR)
    model.eval()
    with computing_in("float32", trainer.device):
        sign = _sign(model, config, dataset)
    model.train()
    if sign is None:
        return None
    way, reason = sign
    if way == "few" and trainer.step < _FEW_SHARE * config.train.steps:
        return None
    for number, name in enumerate(config.train.retries, start=1):
        change = _change(name, config, way)
        if change:
            left = {"train.retries": list(config.train.retries[number:])}
            values = merge(to_dict(config), nested(change), nested(left))
            return Restart(trainer.step, reason, change, from_dict(values))
    return None


def _change(name: str, config: Config, way: Way) -> dict[str, Any]:
    """The settings of one entry of `train.retries`, by dotted key; none if it is no help."""
    if name == "seed":
        return {"train.seed": (config.train.seed + 1) % (1 << 30)}
    if name == "background":
        helps = way == "many" and config.prepare.background == "image"
        return {"prepare.background": "surface"} if helps else {}
    assert isinstance(config.model, SPAIRConfig)
    noise = float(f"{config.model.least_noise * _FACTOR:.3g}")
    return {"model.least_noise": noise} if way == "many" and noise <= 1 else {}


@torch.no_grad()
def _sign(model: SPAIR, config: Config, dataset: Dataset) -> tuple[Way, str] | None:
    """The first sign of failure in the first crops of a validation."""
    detector = of_prepared(Detector(model, config, search="off"))
    floor = floor_of(detector)
    cells, error, plain = 0, 0.0, 0.0
    found: list[Detections] = []
    beside: list[Detections] = []
    contrasts: list[Tensor] = []
    for batch in islice(
        validation_batches(dataset, config.train.batch_size, config.prepare), _BATCHES
    ):
        images = batch.images
        _, background = model.infer(images)
        rows, columns = model.grid(images.shape[-2], images.shape[-1])
        cells += rows * columns * len(images)
        beside += floor.detect_batch(images)
        for item, image, empty in zip(
            detector.explain_batch(images), images, background, strict=True
        ):
            found.append(item.detections)
            error += float((item.reconstruction.to(image.device) - image).square().sum())
            plain += float((empty - image).square().sum())
            contrasts.append(_means(item.detections.boxes, (image - empty).abs().amax(0).cpu()))
    number, others = sum(map(len, found)), sum(map(len, beside))
    if number > _CELLS_ON * cells:
        return "many", f"{number / cells:.0%} of cells are on"
    painted = float((torch.cat(contrasts) < _DARK).float().mean()) if number else 0.0
    if number >= _FEWEST and painted > _PAINTED:
        return "many", f"{painted:.0%} of objects lie on the background"
    if not number and others:
        return "few", f"no object is found in the crops (a watershed finds {others})"
    if number and error > _RECONSTRUCTED * plain:
        return "few", "the reconstruction is no better than the background alone"
    f1 = agreement(found, beside).f1
    if max(number, others) >= _FEWEST and f1 < AGREED:
        way: Way = "many" if number > others else "few"
        return way, f"objects agree with a watershed's by an F1 of {f1:.2f} ({number} and {others})"
    return None


def _means(
    boxes: Tensor,  # [n, 4], px
    values: Tensor,  # [H, W]
) -> Tensor:  # [n]
    """The mean value in each box, 0 of one without pixels."""
    sums = F.pad(values.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    height, width = values.shape
    ends = torch.tensor([width, height, width, height])
    x1, y1, x2, y2 = torch.minimum(boxes.round().long().clamp(min=0), ends).unbind(1)
    total = sums[y2, x2] - sums[y1, x2] - sums[y2, x1] + sums[y1, x1]
    return total / ((x2 - x1) * (y2 - y1)).clamp(min=1)
