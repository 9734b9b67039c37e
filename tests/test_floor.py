"""The floor sees what the detector sees."""

import torch

from spairkit.config import Config, ConnCompConfig, DataConfig, PrepareConfig, SearchConfig
from spairkit.detector import Detector, load
from spairkit.floor import floor_of
from spairkit.metrics import agreement
from spairkit.models.conncomp import ConnComp


def test_floor_has_the_preparation_of_the_detector() -> None:
    """Dark squares of 24 px, which are bright and 12 px large once they are prepared."""
    image = torch.full((3, 120, 160), 0.8)
    corners = [(20, 20), (20, 100), (70, 60)]
    for y, x in corners:
        image[:, y : y + 24, x : x + 24] = 0.3
    model = ConnCompConfig(threshold=0.5)
    prepare = PrepareConfig(
        scale=0.5, contrast="direction", direction=(-1.0, -1.0, -1.0), background="image"
    )
    data = DataConfig(name="folder", path="images")
    config = Config(data=data, model=model, prepare=prepare)
    detector = Detector(ConnComp(model), config, name="squares")
    floor = floor_of(detector)
    found = floor.detect(image)
    assert sorted(found.boxes.round().tolist()) == sorted(
        [x, y, x + 24, y + 24] for y, x in corners
    )
    agreed = agreement([detector.detect(image)], [found])
    assert (agreed.found, agreed.other, agreed.f1) == (3, 3, 1.0)
    assert repr(floor) == "Detector(watershed from floor of squares, on cpu)"
    assert (floor.config.prepare, floor.config.search) == (prepare, SearchConfig())


def test_floor_of_the_packaged_model_needs_no_search() -> None:
    floor = floor_of(load(device="cpu"))
    assert floor.search == "off"
    assert len(floor.detect(torch.zeros(3, 48, 48))) == 0
