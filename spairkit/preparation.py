"""Preparation: from the pixels of a file to the image that a model sees.

    prepared = prepare_image(image, config.prepare)
    found = in_file_pixels(found, height, width)

An image is resized so that objects are about 12 px across, reduced to the contrast of its objects,
freed of its background and brought to levels, in this order; each step is a setting.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from spairkit.config import PrepareConfig
from spairkit.detections import Detections

OBJECT_PX = 12.0
"""Side that a typical object has in a prepared image, px."""

Array = npt.NDArray[np.float32]

_BLOCK = 6 * OBJECT_PX  # side of the blocks whose low percentiles make a smooth background, px
_LOW = 20.0  # percentile of a block that is its background, of objects on one side of it
_MIDDLE = 50.0  # the same, of objects on both sides of it
_SMOOTHING = 1.0  # standard deviation of the filter before levels are measured, px
_WHITE = 2.5  # contrasts of a typical object that become 1
_NOISES = 8.0  # standard deviations of the noise that become 1 at least
_LEAST_NOISE = 0.5 / 255  # half a level of an 8-bit image
_SOFT = 3.0  # standard deviations of the noise beyond which contrasts are compressed
_BINS = 256
_SECOND_DIFFERENCE = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
_TO_STD = 1.4826  # from the median absolute deviation of a normal


def prepare_image(image: Tensor, config: PrepareConfig) -> Tensor:  # [3, H, W] -> [3, h, w]
    """The image as a model sees it, float32 in [0, 1].

    Args:
        image: [3, H, W] in [0, 1], on any device.
        config: the default returns the same image.

    Returns:
        [3, h, w] with h = round(H scale), w = round(W scale), at least 1. With a contrast the three
        channels are equal.
    """
    image = resized(image, prepared_size(image.shape[-2], image.shape[-1], config.scale))
    if config.contrast == "none":
        return fixed_levels(image, config)
    contrast = contrast_of(image.cpu().numpy(), config)
    if config.levels == "image":
        white = white_level(contrast, config.least_white)
        levelled = np.clip(contrast / white, 0, 1)
    else:
        levelled = np.clip((contrast - config.black) / (config.white - config.black), 0, 1)
    return torch.from_numpy(levelled).to(image.device).expand(3, -1, -1)


def prepare_images(images: Tensor, config: PrepareConfig) -> Tensor:  # [B, 3, H, W] -> [B, 3, h, w]
    """Each image as a model sees it."""
    if (config.contrast, config.scale) == ("none", 1):
        return fixed_levels(images, config)
    size = prepared_size(images.shape[-2], images.shape[-1], config.scale)
    seen = [prepare_image(image, config) for image in images]
    return torch.stack(seen) if seen else images.new_zeros(0, 3, *size)


def prepared_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Height and width of the prepared image."""
    return max(round(height * scale), 1), max(round(width * scale), 1)


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:  # [3, H, W] -> [3, *size]
    """The image in another size, averaged where it shrinks."""
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def fixed_levels(images: Tensor, config: PrepareConfig) -> Tensor:  # any shape, in [0, 1]
    """From `config.black` to `config.white` becomes 0 to 1; intensities beyond are cut off."""
    if (config.black, config.white) == (0, 1):
        return images
    return ((images - config.black) / (config.white - config.black)).clamp(0, 1)


def contrast_of(image: Array, config: PrepareConfig) -> Array:  # [3, h, w] -> [h, w]
    """How far each pixel differs from the background, in intensities; the background is about 0.

    "direction" adds the channels with the weights of `config.direction`, so contrasts have a sign.
    "distance" is the distance of the colour to that of the background, in which the colours of the
    background spread equally far on every axis; half of its background lies below 0.
    """
    if config.contrast == "direction":
        weights = np.asarray(config.direction, np.float32)[:, None, None]
        grey = (image * weights).sum(0)
        contrast: Array = (grey - background_of(grey, config.background, _LOW)).astype(np.float32)
        return contrast
    flat = np.stack([c - background_of(c, config.background, _MIDDLE) for c in image])
    spread = _TO_STD * np.median(np.abs(flat), axis=(1, 2)) + _LEAST_NOISE
    unit = float(spread.mean())
    distance: Array = np.sqrt(np.square(flat * (unit / spread)[:, None, None]).mean(0))
    distance -= np.median(distance)
    return distance


def background_of(grey: Array, kind: str, percentile: float) -> Array:  # [h, w] -> [h, w]
    """The background: 0, one value, or a smooth surface through low percentiles of blocks."""
    if kind == "none":
        return np.zeros_like(grey)
    smooth = ndimage.gaussian_filter(grey, _SMOOTHING)
    rows, columns = (max(1, round(side / _BLOCK)) for side in grey.shape)
    if kind == "image" or rows * columns == 1:
        return np.full_like(grey, np.percentile(smooth, percentile))
    y, x = (
        np.linspace(0, side, n + 1).astype(int)
        for side, n in zip(grey.shape, (rows, columns), strict=True)
    )
    blocks = np.array(
        [
            [
                np.percentile(smooth[y[i] : y[i + 1], x[j] : x[j + 1]], percentile)
                for j in range(columns)
            ]
            for i in range(rows)
        ],
        np.float32,
    )
    blocks = ndimage.median_filter(blocks, size=3, mode="nearest")
    for axis, sides in enumerate([((1, 1), (0, 0)), ((0, 0), (1, 1))]):  # beyond the centres
        straight = blocks.shape[axis] > 1
        blocks = (
            np.pad(blocks, sides, mode="reflect", reflect_type="odd")
            if straight
            else np.pad(blocks, sides, mode="edge")
        )
    centres = [
        (np.arange(side) + 0.5) / side * n + 0.5
        for side, n in zip(grey.shape, (rows, columns), strict=True)
    ]
    places = np.meshgrid(*centres, indexing="ij")
    surface: Array = ndimage.map_coordinates(blocks, places, order=1, output=np.float32)
    ndimage.gaussian_filter(surface, _BLOCK / 4, mode="nearest", output=surface)
    return surface


def noise_of(grey: Array) -> float:  # [h, w]
    """The standard deviation of noise that is independent between pixels, at least `_LEAST_NOISE`.

    From the median size of second differences (Immerkaer 1996, with a median in place of the mean).
    """
    differences = ndimage.convolve(grey, _SECOND_DIFFERENCE)
    return max(_TO_STD * float(np.median(np.abs(differences))) / 6, _LEAST_NOISE)


def typical_contrast(contrast: Array) -> float:  # [h, w]
    """The median contrast of the pixels that Otsu's rule takes for objects, 0 if there are none.

    The rule is applied to logarithms beyond the noise, so dim objects count beside bright ones.
    """
    smooth = np.maximum(ndimage.gaussian_filter(contrast, _SMOOTHING), 0)
    soft = np.arcsinh(smooth / (_SOFT * noise_of(contrast)))
    chosen = smooth[soft > otsu(soft)]
    return float(np.median(chosen)) if chosen.size else 0.0


def white_level(contrast: Array, least: float) -> float:  # [h, w]
    """The contrast that becomes 1: 2.5 typical ones, but at least `least` and 8 noises.

    The noise keeps an image without objects dark.
    """
    return max(_WHITE * typical_contrast(contrast), _NOISES * noise_of(contrast), least)


def otsu(values: npt.NDArray[np.floating]) -> float:
    """The threshold that maximises the variance between the values below it and above it.

    Otsu's rule (1979) on a histogram of 256 equal bins; equal values are their own threshold.
    """
    low, high = float(values.min()), float(values.max())
    if not low < high:
        return high
    # in float32 the edges of narrow bins coincide
    counts, edges = np.histogram(values.astype(np.float64), _BINS, (low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    moment = np.cumsum(counts * centres)
    gap = moment[:-1] / below - (moment[-1] - moment[:-1]) / np.maximum(above, 1)
    between = below * above * gap**2
    # every edge inside a gap of the histogram is as good: the middle one
    return float(edges[1:-1][between == between.max()].mean())


def in_file_pixels(
    found: Detections, prepared: tuple[int, int], size: tuple[int, int]
) -> Detections:
    """Detections in a prepared image, in the pixels of its file.

    Args:
        prepared: height and width of the prepared image.
        size: those of the file.
    """
    if prepared == size:
        return found
    (rows, columns), (height, width) = prepared, size
    boxes = found.boxes * torch.tensor([width / columns, height / rows] * 2)
    if found.label_image is None:
        return replace(found, boxes=boxes)
    y = torch.arange(height) * rows // height
    x = torch.arange(width) * columns // width
    return replace(found, boxes=boxes, label_image=found.label_image[y[:, None], x])
