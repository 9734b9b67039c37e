"""The floor: what a watershed finds in the images that a detector is given.

floor = floor_of(detector)
agreed = agreement([detector.detect(image)], [floor.detect(image)])  # spairkit.metrics
print(agreed.found, agreed.other, agreed.f1)

A detector that agrees little with its floor has failed, or sees what a threshold cannot. Only its
pictures tell which.
"""

from dataclasses import replace

from spairkit.config import SearchConfig, WatershedConfig
from spairkit.detector import Detector
from spairkit.models.watershed import Watershed


def floor_of(detector: Detector) -> Detector:
    """A watershed that sees the images as `detector` does, on its device.

    Objects are about 12 px across in a prepared image, so the watershed takes that diameter.
    """
    model = WatershedConfig()
    config = replace(detector.config, model=model, search=SearchConfig())
    return Detector(Watershed(model).to(detector.device), config, name=f"floor of {detector.name}")
