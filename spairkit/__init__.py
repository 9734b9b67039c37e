"""Find, box and count many small things in images, without labels: SPAIR and its baselines.

    detector = spairkit.load()                       # the packaged model, a run or a checkpoint
    found = detector.detect("scene.png")             # a path, an array, a PIL image or a tensor
    detector = spairkit.train("folder", minutes=5)   # a detector for images of one's own

Read the code in this order: `detections` and `boxes` (values and conventions), `rendering` and
`presence` (the two operators), `models/spair`, `training/loop`, `detector`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spairkit.counts import CountPosterior as CountPosterior
    from spairkit.detections import Detections as Detections
    from spairkit.detections import Explanation as Explanation
    from spairkit.detector import Detector as Detector
    from spairkit.detector import load as load
    from spairkit.errors import InputError as InputError
    from spairkit.presence import presence_kl as presence_kl
    from spairkit.presence import presence_prior as presence_prior
    from spairkit.rendering import render as render
    from spairkit.tracking import Tracks as Tracks
    from spairkit.tracking import track as track
    from spairkit.training.loop import train as train

__version__ = "0.1.0"

_PUBLIC = {
    "CountPosterior": "counts",
    "Detections": "detections",
    "Detector": "detector",
    "Explanation": "detections",
    "InputError": "errors",
    "Tracks": "tracking",
    "load": "detector",
    "presence_kl": "presence",
    "presence_prior": "presence",
    "render": "rendering",
    "track": "tracking",
    "train": "training.loop",
}
__all__ = ["__version__", *_PUBLIC]  # names of the table


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, so modules are imported when a name is used
    if name in _PUBLIC:
        return getattr(import_module(f"spairkit.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'spairkit' has no attribute {name!r}")
