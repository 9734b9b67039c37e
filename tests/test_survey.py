"""The look at a folder: objects of known size and colour, and settings that resolve."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from spairkit import survey as survey_module
from spairkit.config import Config, DataConfig, PrepareConfig, SPAIRConfig
from spairkit.config_values import assignments
from spairkit.data.synthetic import drawn, encoded
from spairkit.errors import InputError
from spairkit.images import list_images, write_png
from spairkit.presets import resolve
from spairkit.survey import Survey, look, sample, survey_of

Colour = tuple[float, float, float]
Array = npt.NDArray[np.float64]

GREY: Colour = (0.2, 0.2, 0.2)
LIGHT: Colour = (0.7, 0.7, 0.7)


def spots(
    side: int,
    diameters: Sequence[float],
    ground: Colour = GREY,
    colours: Sequence[Colour] = (LIGHT,),
    *,
    apart: float = 1.8,
    ramp: float = 0.0,
    noise: float = 0.01,
) -> tuple[Tensor, int]:
    """An image [3, side, side] of discs near a grid, and their number.

    Args:
        apart: spacing of the grid, in the largest of the diameters, which take turns.
        ramp: light that is added at the right edge.
        noise: standard deviation of grey noise.
    """
    rng = np.random.default_rng(side)
    y, x = np.mgrid[:side, :side] + 0.5
    image = np.full((3, side, side), np.array(ground)[:, None, None])
    step = apart * max(diameters)
    centres = np.arange(0.6 * step, side - 0.6 * step + 1, step)
    number = 0
    for row in centres:
        for column in centres:
            cy, cx = (row, column) + rng.uniform(-0.08, 0.08, 2) * step
            disc = (y - cy) ** 2 + (x - cx) ** 2 < (diameters[number % len(diameters)] / 2) ** 2
            image[:, disc] = np.array(colours[number % len(colours)])[:, None]
            number += 1
    image += ramp * x / side + noise * rng.normal(size=(1, side, side))
    return torch.from_numpy(image.clip(0, 1)).float(), number


def gaussians(side: int, peaks: Array, std: float, rng: np.random.Generator) -> Array:
    """The sum [side, side] of Gaussians of these heights at random places, 8 px from the border."""
    y, x = np.mgrid[:side, :side] + 0.5
    image = np.zeros((side, side))
    for peak, (cy, cx) in zip(peaks, rng.uniform(8, side - 8, (len(peaks), 2)), strict=True):
        image += peak * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * std**2))
    return image


def look_at(folder: Path, *images: Tensor) -> Survey:
    return look([written(folder / f"{n}.png", image) for n, image in enumerate(images)])


def written(path: Path, image: Tensor) -> Path:
    write_png(path, image)
    return path


@pytest.mark.parametrize(("diameter", "side"), [(8, 96), (20, 170), (60, 400)])
@pytest.mark.parametrize(
    ("ground", "colour", "polarity", "grey"),
    [
        (GREY, LIGHT, "bright", True),
        ((0.8, 0.8, 0.8), (0.3, 0.3, 0.3), "dark", True),
        ((0.1, 0.4, 0.2), (0.8, 0.3, 0.2), "bright", False),
        ((0.9, 0.8, 0.9), (0.4, 0.2, 0.6), "dark", False),
    ],
)
def test_discs_of_any_size_and_polarity_are_measured(
    tmp_path: Path,
    diameter: int,
    side: int,
    ground: Colour,
    colour: Colour,
    polarity: str,
    grey: bool,
) -> None:
    image, number = spots(side, [diameter], ground, [colour])
    survey = look_at(tmp_path, image)
    assert survey.diameter == pytest.approx(diameter, rel=0.15)
    assert survey.prepare.scale == pytest.approx(12 / survey.diameter, rel=1e-3)
    assert survey.smallest <= survey.diameter <= survey.largest < 1.3 * diameter
    assert survey.objects == pytest.approx(number, rel=0.2)
    assert (survey.polarity, survey.is_grey, survey.images) == (polarity, grey, 1)
    prepare = survey.prepare
    assert (prepare.contrast, prepare.background, prepare.levels) == ("direction", "image", "image")
    step = np.dot(prepare.direction, np.subtract(colour, ground))
    assert step > 0, "objects become brighter than the background"
    assert 0.6 < survey.contrast / step < 1.1, "blurred rims count"
    assert survey.share > 0.5
    assert survey.doubts() == []


def test_objects_in_a_small_part_of_16_bits_are_measured(tmp_path: Path) -> None:
    """A few hundred levels above the offset of a camera, with its noise."""
    image, number = spots(170, [20])
    path = tmp_path / "dim.tif"
    tifffile.imwrite(path, (100 + 200 * image[0]).round().numpy().astype(np.uint16))
    survey = look([path])
    assert survey.diameter == pytest.approx(20, rel=0.15)
    assert survey.objects == pytest.approx(number, rel=0.2)
    assert survey.noise < 3 / 65535
    assert survey.doubts() == []


def test_objects_that_cover_most_of_the_image_are_measured(tmp_path: Path) -> None:
    image, number = spots(340, [20], apart=1.08)
    survey = look_at(tmp_path, image)
    assert survey.polarity == "bright"
    assert survey.diameter == pytest.approx(20, rel=0.15)
    assert survey.objects == pytest.approx(number, rel=0.3), "objects at the border are left out"


def test_a_colour_in_each_image_calls_for_a_distance(tmp_path: Path) -> None:
    colours = [(0.8, 0.3, 0.3), (0.3, 0.8, 0.3), (0.2, 0.2, 0.8)]
    images = [spots(96, [16], GREY, [colour])[0] for colour in colours]
    survey = look_at(tmp_path, *images)
    assert survey.prepare.contrast == "distance"
    assert survey.diameter == pytest.approx(16, rel=0.15)


def test_stars_of_any_brightness_are_measured(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    peaks = np.exp(rng.uniform(np.log(0.05), np.log(0.9), 150))
    image = 0.05 + gaussians(400, peaks, 1.5, rng)
    image += 0.01 * rng.normal(size=image.shape)
    survey = look_at(tmp_path, torch.from_numpy(image).clamp(0, 1).float().expand(3, -1, -1))
    assert survey.diameter == pytest.approx(5, rel=0.25)
    assert survey.doubts() == []


def test_rods_at_any_angle_are_measured(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = np.full((300, 300), 0.1)
    sides = []
    y, x = np.mgrid[:300, :300] + 0.5
    for cy in range(25, 300, 50):
        for cx in range(25, 300, 50):
            angle = rng.uniform(0, np.pi)
            u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
            v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
            rod = np.hypot(np.maximum(np.abs(u) - 10, 0), v) < 3.5
            image[rod] = 0.6
            sides.append(np.sqrt(np.prod([np.ptp(axis) + 1 for axis in np.nonzero(rod)])))
    image = ndimage.gaussian_filter(image, 1) + rng.normal(0, 0.03, image.shape)
    survey = look_at(tmp_path, torch.from_numpy(image).clamp(0, 1).float().expand(3, -1, -1))
    assert survey.diameter == pytest.approx(np.median(sides), rel=0.2)
    assert survey.objects == pytest.approx(36, rel=0.1)


def test_noise_between_small_spots_is_no_object(tmp_path: Path) -> None:
    """Gaussian spots of 4 px; enlarged noise looks like objects of their size."""
    rng = np.random.default_rng(0)
    image = 100 + gaussians(256, rng.uniform(200, 600, 60), 1.2, rng)
    path = tmp_path / "spots.tif"
    tifffile.imwrite(path, (rng.poisson(image) + rng.normal(0, 5, (256, 256))).astype(np.uint16))
    survey = look([path])
    assert survey.diameter == pytest.approx(4.3, rel=0.2)
    [(_, middle, found)] = sample([path], survey)
    area = middle.shape[1] * middle.shape[2]
    assert len(found) == pytest.approx(60 * area / 240**2, rel=0.3)


def test_parts_of_patterned_objects_are_not_measured(tmp_path: Path) -> None:
    true: list[float] = []
    for index in range(3):
        image, boxes = drawn("sprites", 7, index)
        (tmp_path / f"{index}.png").write_bytes(encoded("sprites", image))
        true += np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1)).tolist()
    survey = look(sorted(tmp_path.iterdir()))
    assert survey.diameter == pytest.approx(np.median(true), rel=0.2)
    assert survey.prepare.contrast == "distance"


@pytest.mark.parametrize(("light", "number_of_images"), [(False, 6), (True, 6), (False, 60)])
def test_steady_sizes_win_over_noise_and_light(
    monkeypatch: pytest.MonkeyPatch, light: bool, number_of_images: int
) -> None:
    """Noise has the size that is assumed; light is one large object in each image."""

    def compact(
        images: Sequence[Tensor], config: PrepareConfig, diameter: float
    ) -> survey_module._Measured:
        number, side, share = (50, 20.0, 0.3) if 14 < diameter < 60 else (500, diameter, 0.6)
        if diameter >= 60:
            number, side, share = (3, 250.0, 0.7) if light else (0, diameter, 0.0)
        sides = np.full(2 * number, side)
        return survey_module._Measured(diameter, sides, share, share, len(images), 1)

    monkeypatch.setattr(survey_module, "_compact", compact)
    images = [torch.zeros(3, 600, 600)] * number_of_images
    diameter, measured, evidence = survey_module._diameter(
        images, PrepareConfig(), lambda share: None
    )
    assert (diameter, len(measured.sides)) == (20, 100)
    assert evidence == pytest.approx(0.3)


def test_cells_between_bright_walls_are_measured(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:240, :240]
    places = rng.uniform(-12, 12, (8, 8, 2)) + 32 * np.mgrid[:8, :8].transpose(1, 2, 0)
    apart = np.hypot(*(places.reshape(-1, 2).T[..., None, None] - np.stack([y, x])[:, None]))
    first, second = np.sort(apart, axis=0)[:2]
    walls = 0.1 + 0.6 * np.exp(-(((second - first) / 3) ** 2)) + 0.02 * rng.normal(size=y.shape)
    found = look_at(tmp_path, torch.from_numpy(walls).float().expand(3, -1, -1))
    assert found.diameter == pytest.approx(28, rel=0.2)
    assert found.polarity == "dark"


def test_colours_on_all_sides_of_the_background_call_for_a_distance(tmp_path: Path) -> None:
    colours = [(0.9, 0.2, 0.2), (0.2, 0.2, 0.9), (0.1, 0.7, 0.1)]
    image, number = spots(200, [20], (0.45, 0.45, 0.45), colours)
    survey = look_at(tmp_path, image)
    assert (survey.prepare.contrast, survey.polarity) == ("distance", "either")
    assert survey.agreement < 0.5
    assert survey.diameter == pytest.approx(20, rel=0.2)
    assert survey.objects == pytest.approx(number, rel=0.2)
    assert any("unlike the background" in line for line in survey.lines())


def test_uneven_light_calls_for_a_surface(tmp_path: Path) -> None:
    image, number = spots(260, [16], (0.1, 0.1, 0.1), [(0.4, 0.4, 0.4)], ramp=0.5)
    survey = look_at(tmp_path, image)
    assert survey.prepare.background == "surface"
    assert survey.diameter == pytest.approx(16, rel=0.2)
    assert survey.objects == pytest.approx(number, rel=0.2)
    assert "background: uneven" in "\n".join(survey.lines())


def test_sizes_that_differ_widen_the_prior(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    image, _ = spots(260, [8, 16, 32], apart=1.4)
    alike, _ = spots(150, [16])
    survey, even = look_at(tmp_path, image), look_at(tmp_path / "one", alike)
    assert survey.smallest == pytest.approx(8, rel=0.2)
    assert survey.diameter == pytest.approx(16, rel=0.2)
    assert survey.largest == pytest.approx(32, rel=0.2)
    assert survey.lines()[-1].startswith("sizes differ much")
    assert not even.lines()[-1].startswith("sizes differ much")

    def prior(survey: Survey) -> tuple[float, float]:
        model = survey.settings(SPAIRConfig(), {})["model"]
        return model["size_prior_mean"], model["size_prior_std"]

    for found in (survey, even):
        side = 48 / (1 + math.exp(-prior(found)[0]))
        assert side == pytest.approx(12, rel=0.01), "objects of the median side have 12 px"
    assert prior(survey)[1] > 1.5 * prior(even)[1]


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_images_without_objects_are_doubtful(tmp_path: Path, noise: float) -> None:
    image, _ = spots(160, [20], GREY, [GREY], noise=noise)
    survey = look_at(tmp_path, image)
    assert survey.objects == 0
    assert survey.doubts() == [
        "fewer than 5 compact objects were found: are there any in these images?"
    ]
    assert resolved(survey, "spair").prepare.scale == survey.prepare.scale


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (5, 3)])
def test_tiny_images_are_taken(tmp_path: Path, size: tuple[int, int]) -> None:
    survey = look_at(tmp_path, torch.rand(3, *size, generator=torch.Generator().manual_seed(0)))
    assert survey.objects == 0
    resolved(survey, "watershed")


def test_texture_and_faint_objects_are_doubtful() -> None:
    def doubts(**values: float) -> str:
        return "; ".join(survey_with(**values).doubts())

    assert doubts() == ""
    assert "hold only 4% of the contrast" in doubts(share=0.04)
    assert doubts(contrast=0.03, noise=0.02) == "objects hardly stand out from the noise"


def test_damaged_files_are_passed_over(tmp_path: Path) -> None:
    image, _ = spots(96, [8])
    paths = [written(tmp_path / f"{n}.png", image) for n in range(3)]
    expected = look(paths[1:])
    content = paths[0].read_bytes()
    paths[0].write_bytes(content[: len(content) // 2])
    survey = look(paths)
    assert survey.images == 3
    assert (survey.diameter, survey.prepare) == (expected.diameter, expected.prepare)
    assert [name for name, _, _ in sample(paths, survey)] == ["1.png", "2.png"]
    for path in paths[1:]:
        path.write_text("no image")
    with pytest.raises(InputError, match=r"no image can be read: skipped 3 of 3: .*0\.png"):
        look(paths)
    with pytest.raises(InputError, match="no image can be read"):
        look([])


def test_progress_rises_and_stays_below_the_end(tmp_path: Path) -> None:
    shares: list[float] = []
    look([written(tmp_path / "0.png", spots(96, [8])[0])], shares.append)
    assert shares == sorted(set(shares))
    assert 0 < shares[0] < shares[-1] <= 1


def test_sample_has_boxes_and_masks_in_the_pixels_of_the_file(tmp_path: Path) -> None:
    image, number = spots(120, [24])
    path = written(tmp_path / "discs.png", image)
    (one,) = sample([path], look([path]))
    name, pixels, found = one
    assert name == "discs.png"
    torch.testing.assert_close(pixels, image, rtol=0, atol=0.5 / 255)
    assert len(found) == number
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    torch.testing.assert_close(sides, torch.full_like(sides, 24), rtol=0, atol=3.0)
    assert found.label_image is not None
    mask, true = found.label_image > 0, image[0] > 0.45
    assert int((mask & true).sum()) > 0.85 * int((mask | true).sum())


def test_the_middle_of_a_large_image_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, _ = spots(160, [30])
    middle, number = spots(80, [8])
    image[:, 40:120, 40:120] = middle
    path = written(tmp_path / "0.png", image)
    monkeypatch.setattr(survey_module, "_MOST_SIDE", 80)
    survey = look([path])
    assert survey.diameter == pytest.approx(8, rel=0.2)
    assert survey.objects == pytest.approx(number, rel=0.2)


def test_sample_takes_the_middle_of_a_large_image(tmp_path: Path) -> None:
    path = written(tmp_path / "large.png", torch.zeros(3, 700, 500))
    _, pixels, found = sample([path], survey_with(prepare=PrepareConfig(scale=1.0)))[0]
    assert pixels.shape == (3, 480, 480)
    assert len(found) == 0


def survey_with(**values: Any) -> Survey:
    base: dict[str, Any] = {
        "images": 4,
        "prepare": PrepareConfig(
            scale=0.5,
            contrast="direction",
            direction=(-0.5, -0.5, 0.0),
            background="surface",
            levels="image",
            typical_white=0.5,
        ),
        "diameter": 24.0,
        "smallest": 20.0,
        "largest": 30.0,
        "objects": 9.0,
        "objects_per_crop": 3.0,
        "noise": 0.01,
        "contrast": 0.3,
        "agreement": 0.95,
        "is_grey": False,
        "share": 0.8,
    }
    return Survey(**base | values)


def resolved(survey: Survey, kind: str, *words: str) -> Config:
    """The config of `spairkit train --data images --model KIND --set WORD ...`."""
    given = {"data": {"name": "folder", "path": "images"}, "model": {"kind": kind}}
    chosen = assignments(list(words))
    layers = [given, chosen]
    free = {key: value for key, value in chosen.items() if key != "prepare"}
    model = resolve("quick", given, free).model
    return resolve("quick", survey.settings(model, chosen), *layers)


@pytest.mark.parametrize("kind", ["spair", "watershed", "conncomp"])
def test_settings_lie_between_preset_and_user(kind: str) -> None:
    survey = survey_with()
    config = resolved(survey, kind)
    assert config.model.kind == kind
    assert config.prepare == survey.prepare
    assert resolved(survey, kind, "prepare.scale=0.25").prepare.scale == 0.25
    turned = resolved(survey, kind, "prepare.direction=[1, 0, 0]").prepare
    assert (turned.direction, turned.background) == ((1.0, 0.0, 0.0), "surface")
    distance = resolved(survey, kind, "prepare.contrast='distance'").prepare
    assert (distance.contrast, distance.levels) == ("distance", "image")


@pytest.mark.parametrize("kind", ["spair", "watershed", "conncomp"])
def test_settings_by_hand_leave_out_what_does_not_go_with_them(kind: str) -> None:
    survey = survey_with()
    plain = resolved(survey, kind, "prepare.contrast='none'").prepare
    assert plain == PrepareConfig(scale=0.5)
    levels = resolved(survey, kind, "prepare.contrast='none'", "prepare.black=0.2").prepare
    assert levels == PrepareConfig(scale=0.5, black=0.2)
    levels = resolved(survey, kind, "prepare.black=0.2", "prepare.white=0.6").prepare
    assert (levels.contrast, levels.levels) == ("direction", "fixed")
    assert (levels.black, levels.white) == (0.2, 0.6)


def test_failing_training_may_change_what_the_user_has_not_set() -> None:
    def retries(
        *words: str, background: Literal["image", "surface"] = "surface"
    ) -> tuple[str, ...]:
        prepare = replace(survey_with().prepare, background=background)
        return resolved(survey_with(prepare=prepare), "spair", *words).train.retries

    assert retries() == ("prior", "seed")
    assert retries(background="image") == ("background", "prior", "seed")
    assert retries("prepare.background='image'", background="image") == ("prior", "seed")
    assert retries("train.seed=3") == ("prior",)
    assert retries("train.seed=3", "model.least_noise=.2") == ()
    assert retries("prepare.contrast='none'") == ()
    assert retries("train.retries=['seed']") == ("seed",)
    assert resolved(survey_with(), "watershed").train.retries == ()


def test_search_starts_from_a_watershed_where_images_are_prepared() -> None:
    def chosen(*words: str) -> tuple[str, str, str]:
        config = resolved(survey_with(), "spair", *words)
        assert isinstance(config.model, SPAIRConfig)
        return config.search.start, config.model.background, config.model.likelihood

    assert chosen() == ("watershed", "black", "normal")
    assert chosen("prepare.contrast='none'") == ("encoder", "mode", "normal")
    assert chosen("search.start='encoder'")[0] == "encoder"


def test_scenes_and_models_of_one_size_are_not_surveyed(tmp_path: Path) -> None:
    assert survey_of(Config()) is None
    path = written(tmp_path / "0.png", spots(96, [8])[0])
    for place in (tmp_path, path):
        data = {"name": "folder", "path": str(place)}
        found = survey_of(resolve("quick", {"data": data}))
        assert found is not None
        assert (found.images, round(found.diameter)) == (1, 8)
        assert survey_of(resolve("quick", {"data": data, "model": {"kind": "air"}})) is None


def test_folder_without_images_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        survey_of(Config(data=DataConfig(name="folder", path=str(tmp_path))))


def test_lines_name_the_settings_that_override() -> None:
    lines = survey_with().lines()
    assert len(lines) == 4
    text = "\n".join(lines)
    assert "size: 24 px (20 to 30); images are resized by 0.5" in text
    assert "darker than the background, red, green, blue by -0.50, -0.50, 0.00" in text
    for name in ("scale", "contrast", "direction", "background", "levels", "black", "white"):
        assert f"prepare.{name}" in text


def test_json_holds_every_measurement() -> None:
    survey = survey_with(objects=0.0)
    values = json.loads(json.dumps(survey.to_json()))
    assert values["diameter"] == 24
    assert values["prepare"]["direction"] == [-0.5, -0.5, 0.0]
    assert values["polarity"] == "dark"
    assert values["doubts"] == survey.doubts() != []


def test_scale_of_the_user_holds_and_sizes_are_measured_with_it(tmp_path: Path) -> None:
    paths = [written(tmp_path / "0.png", spots(240, [18, 26])[0])]
    free = look(paths)
    assert free.prepare.scale == pytest.approx(12 / 22, rel=0.15)
    held = look(paths, chosen={"scale": 0.4})
    assert held.prepare.scale == 0.4
    assert 17 < held.diameter < 27, "the median side of the discs, whatever the scale"
    assert (held.prepare.contrast, held.prepare.direction) == (
        free.prepare.contrast,
        free.prepare.direction,
    )
    assert (
        f"resized by 0.4, to {held.diameter * 0.4:.0f} px an object (set: prepare.scale)"
        in (held.lines(held.prepare, ["scale"])[0])
    )


def test_contrast_and_background_of_the_user_hold(tmp_path: Path) -> None:
    dark = spots(170, [20], (0.8, 0.8, 0.8), [(0.3, 0.3, 0.3)])[0]
    paths = [written(tmp_path / "0.png", dark)]
    assert look(paths).polarity == "dark"
    bright = look(paths, chosen={"direction": [1, 0, 0], "background": "surface"})
    assert bright.polarity == "bright"
    assert bright.prepare.direction == (1.0, 0.0, 0.0)
    assert bright.prepare.background == "surface"
    distance = look(paths, chosen={"contrast": "distance"})
    assert distance.polarity == "either"
    assert distance.diameter == pytest.approx(20, rel=0.2)


@pytest.mark.parametrize(
    "chosen", [{}, {"scale": "much"}, {"scale": -1}, {"contrast": "none"}, {"white": 2}, {"x": 1}]
)
def test_mistakes_in_chosen_settings_are_passed_over(
    tmp_path: Path, chosen: dict[str, Any]
) -> None:
    paths = [written(tmp_path / "0.png", spots(96, [8])[0])]
    assert look(paths, chosen=chosen) == look(paths)


def test_lines_show_what_is_used() -> None:
    survey = survey_with()
    prepare = PrepareConfig(scale=0.25, black=0.1, white=0.6)
    size, contrast, background, levels = survey.lines(
        prepare, ["scale", "contrast", "black", "white"]
    )
    assert "images are resized by 0.25, to 6 px an object (set: prepare.scale)" in size
    assert contrast == (
        "contrast: none, colours are kept (set: prepare.contrast; --set prepare.direction)"
    )
    assert background == "background: none is subtracted (--set prepare.background)"
    assert levels.startswith("levels: fixed, from 0.1 to 0.6; contrast 0.3 and noise 0.01 of")
    assert levels.endswith("(set: prepare.black, prepare.white; --set prepare.levels)")


def test_prior_of_sizes_follows_the_anchor() -> None:
    def median(anchor: float) -> float:
        values = survey_with().settings(SPAIRConfig(anchor=anchor), {})["model"]
        return anchor / (1 + math.exp(-values["size_prior_mean"]))

    assert median(48.0) == pytest.approx(12, rel=1e-3)
    assert median(24.0) == pytest.approx(12, rel=1e-3)
    assert median(12.0) == pytest.approx(0.9 * 12, rel=1e-3), "the largest that it knows"


def test_sparse_objects_get_crops_of_their_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:600, :600]
    for number, columns in (("few", (90, 470)), ("many", range(40, 600, 40))):
        folder = tmp_path / number
        folder.mkdir()
        image = rng.normal(30, 4, (600, 600))
        for row in columns:
            for column in columns:
                image[(y - row) ** 2 + (x - column) ** 2 < 8**2] += 120
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "a.png")
        Image.fromarray(image.T.clip(0, 255).astype(np.uint8)).save(folder / "b.png")
    few, many = (look(list_images(tmp_path / name)) for name in ("few", "many"))
    assert few.is_sparse
    assert 0.03 < few.objects_per_crop < 0.1  # the middle of an image is measured
    assert few.settings(SPAIRConfig(), {})["data"] == {"crops": "objects"}
    assert any(line.startswith("sparse: ") for line in few.lines())
    assert not few.is_cluttered
    assert not many.is_sparse
    assert "data" not in many.settings(SPAIRConfig(), {})
    assert not any(line.startswith("sparse: ") for line in many.lines())
