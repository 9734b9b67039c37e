"""The objects of a few images: what is written into a run and read again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import Tensor

from spairkit.config import Config, DataConfig, PrepareConfig, SearchConfig, SPAIRConfig
from spairkit.counts import CountPosterior
from spairkit.data.datasets import Dataset, open_dataset
from spairkit.detections import Detections
from spairkit.detector import Detector
from spairkit.errors import InputError
from spairkit.floor import floor_of
from spairkit.images import write_png
from spairkit.metrics import agreement
from spairkit.models.spair import SPAIR
from spairkit.report import objects as module
from spairkit.report.objects import MAX_IMAGES, Objects, picture_path, read_objects, write_objects


class Fake:
    """A detector that finds the same two objects in every image."""

    count_is_given = False
    has_intervals = False
    device = torch.device("cpu")
    name = "fake"

    def __init__(self, *, counts: bool = True, contrast: bool = False) -> None:
        self.counts = counts
        self.config = Config(
            data=DataConfig(name="folder", path="cells"),
            prepare=PrepareConfig(contrast="direction" if contrast else "none"),
        )
        self.sizes: list[tuple[int, ...]] = []

    def without_watershed(self) -> "Fake":
        return self

    def detect_batch(self, images: Tensor, counts: Tensor | None = None) -> list[Detections]:
        assert (counts is not None) == self.count_is_given
        self.sizes += [tuple(image.shape) for image in images]
        posterior = CountPosterior.independent(torch.tensor([1.0, 1.0, 0.5]))
        item = Detections(
            boxes=torch.tensor([[1.0, 2.0, 9.0, 12.0], [-4.0, 5.0, 4.0, 11.0]]),
            scores=torch.ones(2),
            what=torch.tensor([[5.0, 0.0], [0.0, 5.0]]),
            depth=torch.zeros(2),
            counts=posterior if self.counts else None,
        )
        return [item] * len(images)


def look(run: Path, detector: Fake, dataset: Dataset, **options: Any) -> Objects:
    run.mkdir(exist_ok=True)
    return write_objects(run, detector, dataset, **options)  # type: ignore[arg-type]


def folder_of(path: Path, sizes: list[tuple[int, int]]) -> Dataset:
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number, size in enumerate(sizes):
        write_png(path / f"{number:03}.png", torch.rand(3, *size, generator=generator))
    return open_dataset(DataConfig(name="folder", path=str(path)), "test")


def test_objects_of_a_folder_are_counted_grouped_and_drawn(tmp_path: Path) -> None:
    dataset = folder_of(tmp_path / "cells", [(30, 40)] * 6)
    done: list[int] = []
    found = look(tmp_path / "run", Fake(), dataset, progress=done.append)
    assert done == [1, 2, 3, 4, 5, 6]
    assert (found.count, found.available, len(found.images)) == (12, 6, 6)
    assert found.images[0].name == "000.png"
    assert found.images[0].size == (30, 40)
    assert found.images[0].interval == (2, 3)
    assert found.images[0].true_count is None
    assert found.interval == (13, 17)  # 12 and the number of heads in six throws of a coin
    assert not found.has_interval
    assert [group.count for group in found.groups] == [6, 6]
    assert {group.side for group in found.groups} == {10.0, 8.0}
    pictures = [image.picture for image in found.images]
    assert pictures == ["image-1.png", "image-2.png", "image-3.png", "image-4.png", None, None]
    sizes = []
    for name in [*pictures[:4], *(group.picture for group in found.groups)]:
        assert name is not None
        with Image.open(picture_path(tmp_path / "run", name)) as picture:
            sizes.append(picture.size)
    assert sizes[0] == (360, 270)  # enlarged nine times
    assert sizes[4] == (356, 56)
    assert read_objects(tmp_path / "run") == found


def test_crops_are_of_the_image_and_stay_inside_it(tmp_path: Path) -> None:
    path = tmp_path / "cells"
    path.mkdir()
    ramp = torch.linspace(0, 1, 40).expand(3, 30, 40).contiguous()
    write_png(path / "a.png", ramp)
    dataset = open_dataset(DataConfig(name="folder", path=str(path)), "test")
    found = look(tmp_path / "run", Fake(counts=False), dataset)
    assert found.interval is None
    with Image.open(picture_path(tmp_path / "run", found.groups[0].picture)) as picture:
        sheet = np.asarray(picture)[..., 0]
    first, second = sheet[:, :56], sheet[:, 60:116]
    levels = (ramp[0, 0] * 255).round().byte().numpy()
    assert sorted(set(first.flatten().tolist())) == levels[:12].tolist()  # 1.25 times 10 px
    assert sorted(set(second.flatten().tolist())) == levels[:10].tolist()
    assert (sheet[:, 120:] == 255).all()


def test_crops_of_few_levels_of_16_bits_keep_their_greys(tmp_path: Path) -> None:
    path = tmp_path / "cells"
    path.mkdir()
    ramp = np.broadcast_to(np.arange(100, 140, dtype=np.uint16), (30, 40))
    tifffile.imwrite(path / "a.tif", ramp)
    dataset = open_dataset(DataConfig(name="folder", path=str(path)), "test")
    found = look(tmp_path / "run", Fake(counts=False), dataset)
    with Image.open(picture_path(tmp_path / "run", found.groups[0].picture)) as picture:
        greys = set(np.asarray(picture)[:, :56, 0].ravel().tolist())
    assert len(greys) == 12, "one for each column of the crop"


def test_scenes_have_true_counts_and_are_limited(tmp_path: Path) -> None:
    scenes = open_dataset(DataConfig(test_images=200), "test")
    found = look(tmp_path / "run", Fake(), scenes)
    assert (found.available, len(found.images)) == (200, MAX_IMAGES)
    batch = scenes.batch(torch.arange(MAX_IMAGES))
    assert [image.true_count for image in found.images] == batch.counts.tolist()
    assert found.images[-1].name == f"scene {MAX_IMAGES}"


def test_middle_of_a_large_image_is_looked_at(tmp_path: Path) -> None:
    detector = Fake()
    found = look(tmp_path / "run", detector, folder_of(tmp_path / "cells", [(40, 1200)]))
    assert detector.sizes == [(3, 40, 1024)]
    assert found.images[0].part == (40, 1024)
    assert found.images[0].size == (40, 1200)
    with Image.open(picture_path(tmp_path / "run", "image-1.png")) as picture:
        assert max(picture.size) == 720


def test_no_image_is_begun_after_half_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECONDS", -1.0)
    found = look(tmp_path / "run", Fake(), folder_of(tmp_path / "cells", [(30, 40)] * 3))
    assert (len(found.images), found.available) == (1, 3)


def test_detector_that_needs_the_count_skips_images_without(tmp_path: Path) -> None:
    detector = Fake()
    detector.count_is_given = True
    found = look(tmp_path / "run", detector, open_dataset(DataConfig(test_images=3), "test"))
    assert len(found.images) == 3
    with pytest.raises(InputError, match="needs an image with a known number of objects"):
        look(tmp_path / "other", detector, folder_of(tmp_path / "cells", [(30, 40)]))
    assert not (tmp_path / "other" / "objects").exists()


def test_watershed_stands_beside_a_prepared_folder(tmp_path: Path) -> None:
    path = tmp_path / "cells"
    path.mkdir()
    image = torch.zeros(3, 60, 60)
    for y, x in ((7, 5), (40, 12), (30, 45)):  # the first where the fake one finds an object
        rows, columns = torch.arange(60)[:, None] - y, torch.arange(60) - x
        image[:, rows**2 + columns**2 <= 25] = 0.9
    write_png(path / "a.png", image)
    write_png(path / "b.png", image)
    dataset = open_dataset(DataConfig(name="folder", path=str(path)), "test")
    assert look(tmp_path / "plain", Fake(), dataset).floor is None
    found = look(tmp_path / "run", Fake(contrast=True), dataset)
    assert [entry.floor_count for entry in found.images] == [3, 3]
    assert found.floor is not None
    assert (found.floor.name, found.floor.count) == ("watershed", 6)
    assert found.floor.agreement == pytest.approx(2 * 2 / (4 + 6))
    assert read_objects(tmp_path / "run") == found


def test_agreement_is_that_of_the_encoder_where_the_search_starts_from_the_watershed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "cells"
    path.mkdir()
    side = torch.arange(96)
    image = ((side[:, None] % 24 - 12) ** 2 + (side % 24 - 12) ** 2 <= 36).float() * 0.8
    write_png(path / "a.png", image.expand(3, -1, -1))
    data = DataConfig(name="folder", path=str(path))
    torch.manual_seed(0)
    model = SPAIRConfig(likelihood="normal", presence_bias=4.0, box_contrast=0.5)
    config = Config(
        data=data,
        prepare=PrepareConfig(contrast="direction"),
        model=model,
        search=SearchConfig(mode="refine", start="watershed"),
    )
    detector = Detector(SPAIR(model).eval(), config)
    found = write_objects(tmp_path, detector, open_dataset(data, "test"))
    assert found.floor is not None
    assert found.floor.count == 16
    floor, encoder = floor_of(detector), Detector(detector.network, config, search="off")
    assert agreement([detector.detect(path / "a.png")], [floor.detect(path / "a.png")]).f1 > 0.5
    alone = agreement([encoder.detect(path / "a.png")], [floor.detect(path / "a.png")]).f1
    assert alone < 0.5  # it was not trained
    assert found.floor.agreement == pytest.approx(alone)


def test_damaged_files_are_no_images_to_look_at(tmp_path: Path) -> None:
    dataset = folder_of(tmp_path / "cells", [(30, 40)] * 4)
    file = tmp_path / "cells" / "001.png"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.warns(UserWarning, match="skipped 1 of 4"):
        found = look(tmp_path / "run", Fake(), dataset)
    assert (found.available, len(found.images)) == (3, 3)


def test_later_result_replaces_the_earlier_one(tmp_path: Path) -> None:
    look(tmp_path / "run", Fake(), folder_of(tmp_path / "many", [(30, 40)] * 4))
    look(tmp_path / "run", Fake(), folder_of(tmp_path / "one", [(30, 40)]))
    names = {path.name for path in (tmp_path / "run" / "objects").iterdir()}
    assert names == {"objects.json", "image-1.png", "group-1.png"}


def test_run_without_a_result_has_none(tmp_path: Path) -> None:
    assert read_objects(tmp_path) is None


@pytest.mark.parametrize(
    "change",
    [
        {"images": []},
        {"images": 3},
        {"available": -1},
        {"interval": [1, 2, 3]},
        {"script": "x"},
        {"groups": [{"count": 1, "side": 3.0, "picture": "../../secret.png"}]},
        {"groups": [{"count": 1, "side": 1e999, "picture": "group-1.png"}]},
    ],
)
def test_changed_results_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    look(tmp_path / "run", Fake(), folder_of(tmp_path / "cells", [(30, 40)]))
    path = tmp_path / "run" / "objects" / "objects.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=r"objects\.json: not a list of objects; remove the"):
        read_objects(tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"{", b"\x00\xff", b"[" * 100_000, b" " * (2 << 20)])
def test_damaged_results_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "objects.json").write_bytes(content)
    with pytest.raises(InputError, match=r"objects\.json: not a list of objects"):
        read_objects(tmp_path)
