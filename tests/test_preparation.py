"""Preparation: the same objects look the same, whatever the file's light, polarity and size."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from spairkit.config import PrepareConfig, WatershedConfig
from spairkit.detections import Detections
from spairkit.images import to_colour
from spairkit.models.watershed import Watershed
from spairkit.preparation import (
    _quadric,
    background_of,
    contrast_of,
    half_level,
    in_file_pixels,
    noise_of,
    of_prepared_pixels,
    otsu,
    prepare_image,
    prepare_images,
    prepare_pixels,
    prepared_size,
)

LIGHT = PrepareConfig(contrast="direction", background="surface", levels="image")
DARK = PrepareConfig(
    contrast="direction", direction=(-1 / 3, -1 / 3, -1 / 3), background="surface", levels="image"
)


def discs(
    side: int = 144, radius: float = 6.0, every: int = 24, noise: float = 0.01
) -> tuple[Tensor, Tensor]:
    """A grey image [3, H, W] of discs of contrast .3 on .2, and the mask of the discs [H, W]."""
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    mask = ((y % every - every / 2) ** 2 + (x % every - every / 2) ** 2) < radius**2
    grain = noise * torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    image = (0.2 + 0.3 * mask + grain).clamp(0, 1)
    return image.expand(3, -1, -1), mask


def test_default_changes_nothing() -> None:
    image, _ = discs()
    assert torch.equal(prepare_image(image, PrepareConfig()), image)
    assert torch.equal(prepare_images(image[None], PrepareConfig()), image[None])


def test_objects_become_bright_on_dark() -> None:
    image, mask = discs()
    seen = prepare_image(image, LIGHT)
    assert seen.shape == image.shape
    assert torch.equal(seen[0], seen[2])
    assert float(seen[0][~mask].mean()) < 0.05
    assert float(seen[0][mask].mean()) == pytest.approx(0.45, abs=0.07)  # one of 2.5 contrasts


def test_dark_objects_are_turned_over() -> None:
    image, _ = discs()
    torch.testing.assert_close(
        prepare_image(1 - image, DARK), prepare_image(image, LIGHT), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("gain", [0.1, 0.5])
def test_levels_of_each_image_remove_gain_and_offset(gain: float) -> None:
    image, _ = discs(noise=0.02)
    seen = prepare_image(gain * image + 0.1, LIGHT)
    torch.testing.assert_close(seen, prepare_image(image, LIGHT), atol=0.05, rtol=0)


def test_surface_removes_uneven_light() -> None:
    image, mask = discs(side=288)
    ramp = 0.5 * torch.linspace(0, 1, 288)
    seen = prepare_image((image + ramp).clamp(0, 1), LIGHT)[0]
    left, right = seen[:, :96][~mask[:, :96]], seen[:, 192:][~mask[:, 192:]]
    assert abs(float(left.mean()) - float(right.mean())) < 0.05
    one = prepare_image(
        (image + ramp).clamp(0, 1), PrepareConfig(contrast="direction", background="image")
    )[0]
    assert float(one[:, 192:][~mask[:, 192:]].mean()) > 0.25


@pytest.mark.parametrize("side", [120, 190, 400])
def test_curved_light_is_removed_under_objects_of_a_quarter_of_the_image(side: int) -> None:
    """Light with a maximum, three times as strong as the objects, and noise."""
    image, mask = discs(side=side)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    light = 0.25 + 0.25 * torch.sin(1.5 + 1.2 * y) + 0.2 * x - 0.1 * x * y
    noise = 0.005 * torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    grey = (image[0] + light + noise).numpy()
    assert 0.1 < float(mask.float().mean()) < 0.4
    rest = torch.from_numpy(grey - background_of(grey, "surface", 20.0, 0.002))
    ground = rest[~mask]
    assert float(ground.std()) < 0.02
    assert abs(float(ground.mean())) < 0.02


def test_even_light_is_measured_by_blocks_alone() -> None:
    image, _ = discs(side=288)
    for light in (torch.zeros(288), 0.1 * torch.linspace(0, 1, 288)):
        assert _quadric((image + light)[0].numpy(), 20.0, 0.002) is None
    assert _quadric((image + torch.linspace(0, 2, 288))[0].numpy(), 20.0, 0.002) is not None
    one_row = np.linspace(0, 1, 7, dtype=np.float32)[None]
    assert _quadric(one_row, 20.0, 0.002) is not None


def test_distance_finds_objects_of_any_colour() -> None:
    grey, mask = discs(noise=0.02)
    y = torch.arange(144)
    colours = torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.2, 0.9], [0.1, 0.6, 0.1]])
    colour = colours[(y // 24) % 3].T[:, :, None]  # each row of discs has one
    image = torch.where(mask, colour, 0.45 + 0.1 * (grey - 0.2))
    seen = prepare_image(
        image, PrepareConfig(contrast="distance", background="image", levels="image")
    )[0]
    for row in range(3):
        here = (y // 24) % 3 == row
        assert float(seen[here][mask[here]].mean()) > 0.25
    assert float(seen[~mask].mean()) < 0.05


def test_noise_alone_stays_dark() -> None:
    noise = 0.5 + 0.1 * torch.randn(3, 200, 200, generator=torch.Generator().manual_seed(1))
    noise = noise[:1].clamp(0, 1).expand(3, -1, -1)
    seen = prepare_image(noise, LIGHT)
    assert float(seen.mean()) < 0.2
    assert float((seen > 0.75).float().mean()) < 1e-3
    flat = prepare_image(torch.full((3, 90, 90), 0.4), LIGHT)
    assert float(flat.max()) < 0.01


@pytest.mark.parametrize("background", ["image", "surface"])
def test_a_small_part_of_16_bits_is_seen_like_all_of_it(
    background: Literal["image", "surface"],
) -> None:
    """Cameras often fill a few hundred of 65,536 levels."""
    image, mask = discs(noise=0.02)
    dim = (50 + 300 * image[:1]).round().to(torch.uint16)
    config = PrepareConfig(contrast="direction", background=background, levels="image")
    whole, part = prepare_pixels(image[:1], config), prepare_pixels(dim, config)
    assert (
        float((of_prepared_pixels(part, config) - of_prepared_pixels(whole, config)).std()) < 0.01
    )
    assert float(of_prepared_pixels(part, config)[0][mask].mean()) > 0.3
    torch.testing.assert_close(
        prepare_image(to_colour(dim), config), of_prepared_pixels(part, config), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("pixels", "levels"),
    [
        (torch.tensor([[[0, 255]]], dtype=torch.uint8), 257),
        (torch.tensor([[[0, 5, 9]]]).to(torch.uint16), 4),
        (torch.tensor([[[0, 1000]]]).to(torch.uint16), 257),
        (torch.tensor([[[7, 7]]]).to(torch.uint16), 257),
        (torch.tensor([[[0, 1, 4]]]) / 255, 257),
        (torch.tensor([[[0, 1, 4]]]) / 4095, 16),
        (torch.tensor([[[0, 1e-7, 0.1, 0.10002]]]), 1),
    ],
)
def test_half_level_is_that_of_the_levels_in_use(pixels: torch.Tensor, levels: int) -> None:
    assert half_level(pixels) == pytest.approx(levels / 2 / 65535)
    assert half_level(pixels.expand(3, -1, -1)) == half_level(pixels)


def test_a_typical_white_keeps_an_empty_image_dark() -> None:
    image, _ = discs(noise=0.001)
    dim = 0.2 + 0.01 * (image - 0.2)
    assert float(prepare_image(dim, LIGHT).max()) > 0.3
    floor = PrepareConfig(
        contrast="direction", background="surface", levels="image", typical_white=1.0
    )
    assert float(prepare_image(dim, floor).max()) < 0.05


def test_one_object_looks_as_it_does_among_others() -> None:
    image, mask = discs(side=480, noise=0.03)
    y, x = torch.meshgrid(torch.arange(480), torch.arange(480), indexing="ij")
    single = (y < 24) & (x < 24)
    alone = torch.where(mask & ~single, image[:, :1].expand_as(image), image)
    config = PrepareConfig(contrast="direction", background="image", levels="image")
    seen = prepare_image(alone, config)[0]
    assert float(seen[mask & single].mean()) > 0.9, "noise is taken for the typical contrast"
    config = replace(config, typical_white=0.7)
    among, seen = prepare_image(image, config)[0], prepare_image(alone, config)[0]
    here = mask & single
    assert float(seen[here].mean()) == pytest.approx(float(among[here].mean()), rel=0.15)
    assert float(seen[~mask].std()) < 0.04


def test_scale_resizes_and_boxes_return() -> None:
    image, _ = discs(side=120, radius=5)
    config = PrepareConfig(scale=0.51)
    size = prepared_size(120, 120, 0.51)
    assert prepare_image(image, config).shape == (3, *size) == (3, 61, 61)
    found = Detections(
        torch.tensor([[0.0, 6.1, 61.0, 61.0]]),
        torch.ones(1),
        torch.zeros(1, 2),
        torch.zeros(1),
        label_image=torch.ones(61, 61, dtype=torch.int32),
        labels=torch.ones(1, dtype=torch.int32),
    )
    back = in_file_pixels(found, size, (120, 120))
    torch.testing.assert_close(back.boxes, torch.tensor([[0.0, 12.0, 120.0, 120.0]]))
    assert back.label_image is not None
    assert back.label_image.shape == (120, 120)
    assert in_file_pixels(found, size, size) is found


def test_noise_is_that_of_independent_pixels() -> None:
    y, x = np.mgrid[:300, :300]
    smooth = 0.3 + 0.2 * np.sin(x / 30) * np.cos(y / 40)
    grain = np.random.default_rng(0).normal(0, 0.03, (300, 300))
    assert noise_of((smooth + grain).astype(np.float32), 0.002) == pytest.approx(0.03, rel=0.05)


def test_otsu_equals_an_exhaustive_search() -> None:
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.normal(0.5, 0.15, 700), rng.normal(2.0, 0.3, 300)]).clip(0, 3)

    def between(threshold: float) -> float:
        above = values >= threshold
        gap = values[above].mean() - values[~above].mean()
        return float(above.mean() * (~above).mean() * gap**2)

    best = max(between(value) for value in np.sort(values)[1:])
    assert between(otsu(values)) > 0.999 * best
    assert between(1.9) < 0.9 * best
    assert otsu(np.array([0.0, 0.0, 3.0])) == pytest.approx(1.5)
    assert otsu(np.full(5, 0.3)) == 0.3
    close = (0.3 + 1e-6 * np.random.default_rng(0).normal(size=1000)).astype(np.float32)
    assert close.min() < otsu(close) < close.max()


def test_contrast_of_direction_has_the_weights() -> None:
    image = np.zeros((3, 8, 8), np.float32)
    image[1, 2, 2] = 0.5
    config = PrepareConfig(contrast="direction", direction=(0.0, -1.0, 0.0))
    found = contrast_of(image, config, 0.002)
    assert found[2, 2] == pytest.approx(-0.5)
    assert found[0, 0] == 0


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.0, 1.7])
def test_masks_lie_on_the_objects(scale: float) -> None:
    """Their centroids are those of the discs that were drawn, on average, at any scale."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:300, :300] + 0.5
    image, centres = np.zeros((300, 300)), []
    for row in range(30, 280, 30):
        for column in range(30, 280, 30):
            cy, cx = row + rng.uniform(-4, 4), column + rng.uniform(-4, 4)
            centres.append((cy, cx))
            image += 0.5 / (1 + np.exp(np.clip((np.hypot(y - cy, x - cx) - 7.5) / 0.6, -50, 50)))
    pixels = torch.from_numpy(image).float().expand(3, -1, -1)
    config = PrepareConfig(contrast="direction", scale=scale)
    seen = prepare_image(pixels, config)
    (found,) = Watershed(WatershedConfig(diameter=15 * scale)).detect(seen[None])
    found = in_file_pixels(found, (seen.shape[1], seen.shape[2]), (300, 300))
    masks = found.masks.numpy()
    assert len(found) == len(centres) == 81
    centroids = np.array(ndimage.center_of_mass(masks > 0, masks, range(1, 82))) + 0.5
    distances = np.linalg.norm(centroids[:, None] - np.array(centres), axis=2)
    errors = centroids - np.array(centres)[distances.argmin(1)]
    assert np.abs(errors.mean(0)).max() < 0.2
    assert np.abs(errors).max() < 0.8
