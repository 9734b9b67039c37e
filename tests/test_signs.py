"""Signs of failure: what speaks against a trained model, without labels."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spairkit.config import Config, DataConfig, PrepareConfig, SPAIRConfig, WatershedConfig
from spairkit.detections import Detections
from spairkit.detector import Detector
from spairkit.models.spair import SPAIR
from spairkit.models.watershed import Watershed
from spairkit.report.objects import Floor, FoundImage, Objects
from spairkit.report.signs import Signs, has_failed, misfit, signs_of, write_signs
from spairkit.survey import Survey

SMALL = SPAIRConfig(
    backbone_channels=(4,),
    features=4,
    hidden=4,
    passthrough=2,
    what=2,
    encoder_hidden=(),
    decoder_hidden=(),
)


def spair(scale: float = 1.0) -> Detector:
    data = DataConfig(name="folder", path="cells")
    config = Config(data=data, model=SMALL, prepare=PrepareConfig(scale=scale))
    return Detector(SPAIR(SMALL).eval(), config, name="spair")


def watershed() -> Detector:
    model = WatershedConfig()
    return Detector(Watershed(model), Config(model=model), name="watershed")


def squares(number: int, side: int, size: tuple[int, int]) -> Detections:
    """Objects whose masks are squares in rows, `side` px wide, without a gap."""
    label_image = torch.zeros(size, dtype=torch.int32)
    across = size[1] // side
    boxes = torch.zeros(number, 4)
    for n in range(number):
        y, x = n // across * side, n % across * side
        label_image[y : y + side, x : x + side] = n + 1
        boxes[n] = torch.tensor([x, y, x + side, y + side])
    return Detections(
        boxes,
        torch.ones(number),
        torch.zeros(number, 2),
        torch.zeros(number),
        label_image=label_image,
        labels=torch.arange(1, number + 1, dtype=torch.int32),
    )


def objects(
    *counts: int, floor: Floor | None = None, part: tuple[int, int] | None = None
) -> Objects:
    """Of images of 120 x 240 px, which have 200 cells."""
    images = tuple(
        FoundImage(name=f"{n}.png", size=(120, 240), part=part, count=count)
        for n, count in enumerate(counts)
    )
    return Objects(available=len(counts), images=images, floor=floor)


def survey(share: float) -> Survey:
    """Of images in which compact objects hold this share of the contrast."""
    return Survey(
        images=2,
        prepare=PrepareConfig(contrast="direction"),
        diameter=12.0,
        smallest=10.0,
        largest=14.0,
        objects=9.0,
        objects_per_crop=3.0,
        noise=0.01,
        contrast=0.3,
        agreement=1.0,
        is_grey=True,
        share=share,
    )


@pytest.mark.parametrize(
    ("confidence", "share", "failures", "warnings"),
    [(0.6, 0.9, 0, 0), (0.58, 0.9, 0, 1), (0.6, 0.2, 0, 1), (0.58, 0.2, 1, 1)],
)
def test_irregular_outlines_in_cluttered_images_are_a_failure(
    confidence: float, share: float, failures: int, warnings: int
) -> None:
    network = spair()
    search = replace(network.config.search, start="watershed", mode="refine")
    detector = Detector(network.network, replace(network.config, search=search))
    found = replace(objects(9, 12), confidence=confidence)
    signs = signs_of(detector, found, survey(share))
    assert (len(signs.failures), len(signs.warnings)) == (failures, warnings)
    plain = Detector(network.network, replace(network.config, search=search), search="off")
    assert not signs_of(plain, found, survey(0.9)).warnings  # scores are the encoder's


def test_cells_are_those_of_the_prepared_image() -> None:
    assert spair().cells((120, 240)) == 10 * 20
    assert spair(scale=0.5).cells((120, 240)) == 5 * 10
    assert spair().cells((1, 13)) == 2
    assert watershed().cells((120, 240)) == 0


def test_many_objects_for_the_cells_are_a_misfit() -> None:
    size = (120, 120)  # 100 cells
    assert misfit(spair(), squares(70, 6, size)) is None
    assert misfit(spair(), squares(71, 6, size)) == (
        "71 objects on 100 cells of the grid: they paint the background"
    )
    assert misfit(spair(scale=2), squares(71, 6, size)) is None
    assert misfit(watershed(), squares(71, 6, size)) is None


@pytest.mark.parametrize("level", [0.2, 0.34, 0.36, 1.0])
def test_dim_objects_are_a_misfit_of_a_model_of_white_digits(level: float) -> None:
    found = replace(squares(8, 6, (60, 60)), image=torch.full((3, 60, 60), level))
    scenes = Detector(SPAIR(SMALL).eval(), Config(model=SMALL), name="spair")
    said = misfit(scenes, found)
    assert (said is not None) == (level < 0.35)
    assert said is None or said.startswith(f"objects have {level:.0%} of the intensity of white")
    assert misfit(spair(), found) is None, "trained on a folder"
    assert misfit(scenes, replace(found, image=None)) is None
    coloured = Config(model=SMALL, data=DataConfig(colour="random"))
    assert misfit(Detector(SPAIR(SMALL).eval(), coloured, name="spair"), found) is None


def test_masks_on_most_of_the_image_are_a_misfit() -> None:
    size = (120, 120)
    assert misfit(spair(), squares(20, 24, size)) is None
    assert misfit(spair(), squares(23, 24, size)) == (
        "objects cover 92% of the image: they paint the background"
    )


def test_few_objects_and_those_without_masks_are_not_judged() -> None:
    assert misfit(spair(), squares(4, 10, (20, 20))) is None
    assert misfit(spair(), squares(0, 10, (20, 20))) is None
    found = squares(71, 6, (120, 120))
    bare = Detections(found.boxes, found.scores, found.what, found.depth)
    assert misfit(spair(), bare) is None


def test_no_object_anywhere_is_a_failure() -> None:
    for detector in (spair(), watershed()):
        assert signs_of(detector, objects(0, 0)).failures == ("no object was found in any image",)
        assert signs_of(detector, objects(0, 1)) == Signs()


def test_objects_in_most_cells_are_a_failure() -> None:
    said = "objects on 400 cells of the grid: they paint the background"
    assert signs_of(spair(), objects(140, 140)).failures == ()
    assert signs_of(spair(), objects(80, 201)).failures == (f"281 {said}",)
    assert signs_of(watershed(), objects(80, 201)).failures == ()
    assert signs_of(spair(scale=2), objects(80, 201)).failures == ()
    middle = signs_of(spair(), objects(30, 60, part=(60, 120)))  # 50 cells each
    assert middle.failures == ("90 objects on 100 cells of the grid: they paint the background",)


@pytest.mark.parametrize(
    ("agreement", "failures", "warnings"), [(0.29, 1, 0), (0.3, 0, 1), (0.59, 0, 1), (0.6, 0, 0)]
)
def test_agreement_with_a_watershed_is_judged(
    agreement: float, failures: int, warnings: int
) -> None:
    floor = Floor(name="watershed", count=20, agreement=agreement)
    signs = signs_of(spair(), objects(8, 9, floor=floor))
    assert (len(signs.failures), len(signs.warnings)) == (failures, warnings)
    for line in signs.failures + signs.warnings:
        assert line.startswith(
            "the encoder, before any search, agrees with a watershed by an F1 of "
            f"{agreement:.2f} only"
        )


def test_agreement_on_few_objects_is_not_judged() -> None:
    floor = Floor(name="watershed", count=4, agreement=0.0)
    assert signs_of(spair(), objects(2, 2, floor=floor)) == Signs()
    assert len(signs_of(spair(), objects(2, 3, floor=floor)).failures) == 1


def test_signs_of_a_short_training_are_warnings() -> None:
    (reason,) = signs_of(spair(), objects(0), updates=200).failures
    assert signs_of(spair(), objects(0), updates=199) == Signs(warnings=(reason,))


def test_doubts_of_the_survey_are_warnings() -> None:
    looked = survey(0.2)
    signs = signs_of(spair(), objects(3), looked)
    assert signs == Signs(warnings=tuple(looked.doubts()))
    assert len(signs.warnings) == 1


def test_signs_are_kept_in_the_run(tmp_path: Path) -> None:
    assert not has_failed(tmp_path)
    write_signs(tmp_path, Signs(warnings=("look first",)))
    assert not has_failed(tmp_path)
    write_signs(tmp_path, Signs(failures=("no object",), warnings=("look first",)))
    assert has_failed(tmp_path)
    kept = json.loads((tmp_path / "signs.json").read_text())
    assert kept == {"warnings": ["no object", "look first"], "failed": True}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b'{"failed": 1}', b'{"failed": "yes"}', b"\xff\xfe", b"[" * 100_000],
)
def test_files_that_are_no_signs_are_passed_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "signs.json").write_bytes(content)
    assert not has_failed(tmp_path)


def test_large_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "signs.json"
    path.write_bytes(b'{"failed": true}' + b" " * (1 << 20))
    assert not has_failed(tmp_path)
    path.unlink()
    path.mkdir()
    assert not has_failed(tmp_path)
