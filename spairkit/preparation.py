"""Preparation: from the pixels of a file to the image that a model sees.

    prepared = prepare_image(image, config.prepare)
    found = in_file_pixels(found, height, width)

An image is resized so that objects are about 12 px across, reduced to the contrast of its objects,
freed of its background and brought to levels, in this order; each step is a setting.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from spairkit.config import PrepareConfig
from spairkit.detections import Detections
from spairkit.images import to_colour

OBJECT_PX = 12.0
"""Side that a typical object has in a prepared image, px."""

Array = npt.NDArray[np.float32]

_BLOCK = 6 * OBJECT_PX  # side of the blocks whose low percentiles make a smooth background, px
_LOW = 20.0  # percentile of a block that is its background, of objects on one side of it
_MIDDLE = 50.0  # the same, of objects on both sides of it
_PLACES, _MEAN_REACH = 64, 2  # along an axis, and px round them, at which a quadric is fitted
_REWEIGHTINGS, _NEARLY = 30, 0.1  # of the fit; least residual, in the median one
_HIGH = 95.0  # percentile of the contrasts of objects
_STEEP = 0.4  # of this contrast: standard deviation of light that changes much
_SMOOTHING = 1.0  # standard deviation of the filter before levels are measured, px
_WHITE = 2.5  # contrasts of a typical object that become 1
_NOISES = 8.0  # standard deviations of the noise that become 1 at least
_LEAST_WHITE = 0.1  # of the typical white level; dimmer images hold no objects
_LEVELS_16, _LEVEL_8 = 1 << 16, 257  # levels of 16 bits, and of these those of one of 8 bits
_SOFT = 3.0  # standard deviations of the noise beyond which contrasts are compressed
_BINS = 256
_STRIP_PIXELS = 1 << 21  # that are converted to float32 together
_MEASURED_PIXELS = 1 << 23  # whose levels are measured, about
_BAND = 64  # rows of a band of these
_REACH = 5  # of the filter before levels are measured, px
_SECOND_DIFFERENCE = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
_FAR = 2.0  # medians of the distance that the background's colours reach
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
    if config.contrast == "none":
        size = prepared_size(image.shape[-2], image.shape[-1], config.scale)
        return fixed_levels(resized(image, size), config)
    return _levelled_contrast(image.cpu(), config).to(image.device).expand(3, -1, -1)


def prepare_pixels(pixels: Tensor, config: PrepareConfig) -> Tensor:
    """A prepared image that takes little memory, and needs little while it is made.

    Args:
        pixels: [1 or 3, H, W] on the CPU, as `images.read_pixels` gives them.

    Returns:
        [1 or 3, h, w], uint16 except where `pixels` themselves are returned; `of_prepared_pixels`
        makes `prepare_image`'s of it, or of a part of it.
    """
    if config.contrast != "none":
        return _in_16_bits(_levelled_contrast(pixels, config)[None])
    size = prepared_size(pixels.shape[-2], pixels.shape[-1], config.scale)
    if size == pixels.shape[-2:]:
        return pixels
    return _in_16_bits(_resized_pixels(pixels, size))


def of_prepared_pixels(part: Tensor, config: PrepareConfig) -> Tensor:  # [..., 3, h, w] float32
    """Prepared images, or parts of them, from those of `prepare_pixels`."""
    colour = to_colour(part)
    return fixed_levels(colour, config) if config.contrast == "none" else colour


def _in_16_bits(image: Tensor) -> Tensor:  # in [0, 1] -> uint16
    return image.mul_(65535).round_().to(torch.uint16)


def _levelled_contrast(pixels: Tensor, config: PrepareConfig) -> Tensor:  # [h, w] in [0, 1]
    size = prepared_size(pixels.shape[-2], pixels.shape[-1], config.scale)
    least_noise = least_noise_of(pixels, config)
    if config.contrast == "direction":
        grey = _resized_pixels(pixels, size, config.direction)[0].numpy()
        contrast = _without_background(grey, config, _LOW, least_noise)
    else:
        contrast = contrast_of(_resized_pixels(pixels, size).numpy(), config, least_noise)
    if config.levels == "image":
        measured = _bands(contrast)
        noise = noise_of(measured, least_noise)
        contrast /= white_level(typical_contrast(measured, noise), noise, config.typical_white)
    else:
        contrast -= config.black
        contrast /= config.white - config.black
    return torch.from_numpy(np.clip(contrast, 0, 1, out=contrast))


def _resized_pixels(
    pixels: Tensor,  # [1 or 3, H, W], as `images.read_pixels` gives them
    size: tuple[int, int],
    weights: tuple[float, float, float] | None = None,
) -> Tensor:  # [1 or 3, *size] float32
    """The image in another size, or one channel: the sum of the channels with weights.

    Strips are narrowed in turn, so that no copy of the whole image in float32 is made.
    """
    height, width = pixels.shape[-2:]
    channels = len(pixels) if weights is None else 1
    narrow = torch.zeros(channels, height, size[1])
    step = max(_STRIP_PIXELS // width, 1)
    for top in range(0, height, step):
        strip = to_colour(pixels[:, top : top + step])
        if weights is None:
            strip = strip[:channels]
        else:
            strip = torch.tensordot(torch.tensor(weights), strip, 1)[None]
        narrow[:, top : top + step] = _interpolated(strip, (strip.shape[1], size[1]))
    return _interpolated(narrow, size)


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
    return image if image.shape[-2:] == size else _interpolated(image, size).clamp(0, 1)


def _interpolated(image: Tensor, size: tuple[int, int]) -> Tensor:  # [C, H, W] -> [C, *size]
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def fixed_levels(images: Tensor, config: PrepareConfig) -> Tensor:  # any shape, in [0, 1]
    """From `config.black` to `config.white` becomes 0 to 1; intensities beyond are cut off."""
    if (config.black, config.white) == (0, 1):
        return images
    return ((images - config.black) / (config.white - config.black)).clamp(0, 1)


def least_noise_of(pixels: Tensor, config: PrepareConfig) -> float:
    """What the noise of the prepared image is at least, as a share of the file's range.

    That is `half_level`, and of an image that is enlarged, the noise before: between enlarged
    pixels it is smooth, and would be taken for objects.

    Args:
        pixels: [1 or 3, H, W], as `images.read_pixels` gives them.
    """
    least = half_level(pixels)
    if config.scale <= 1:
        return least
    image = to_colour(pixels).numpy()
    if config.contrast == "direction":
        weights = np.asarray(config.direction, np.float32)
        return noise_of(_bands(np.tensordot(weights, image, 1)), least)
    return float(np.mean([noise_of(_bands(channel), least) for channel in image]))


def half_level(pixels: Tensor) -> float:  # [1 or 3, H, W], as `images.read_pixels` gives them
    """Half of the least difference between intensities; from half a level of 16 bits to one of 8.

    Rounding to levels makes noise of about this size, or hides what is smaller. Of 12 bits in 16,
    or of 8 that fill a small part of 16, it is smaller than of 8 bits that fill the range.
    """
    if pixels.dtype == torch.uint8:
        return _LEVEL_8 / 2 / (_LEVELS_16 - 1)
    used = np.zeros(_LEVELS_16, bool)
    for strip in pixels.split(max(_STRIP_PIXELS // pixels.shape[-1], 1), -2):
        levels = strip.numpy()
        if pixels.dtype != torch.uint16:
            levels = np.round(levels * (_LEVELS_16 - 1)).astype(np.uint16)
        used[levels.ravel()] = True
    gaps = np.diff(np.flatnonzero(used))
    return min(int(gaps.min(initial=_LEVEL_8)), _LEVEL_8) / 2 / (_LEVELS_16 - 1)


def contrast_of(image: Array, config: PrepareConfig, least_noise: float) -> Array:
    """How far each pixel differs from the background, in intensities; the background is about 0.

    [1 or 3, h, w] -> [h, w]; `least_noise` as `least_noise_of` gives it.

    "direction" adds the channels with the weights of `config.direction`, so contrasts have a sign.
    "distance" is the distance of the colour to that of the background, in which the colours of the
    background spread equally far on every axis, less twice its median: almost all of the
    background, texture included, lies below 0.
    """
    if config.contrast == "direction":
        weights = np.asarray(config.direction, np.float32)
        return _without_background(np.tensordot(weights, image, 1), config, _LOW, least_noise)
    flat = [_without_background(c.copy(), config, _MIDDLE, least_noise) for c in image]
    spread = [_TO_STD * float(np.median(np.abs(_bands(c)))) + least_noise for c in flat]
    unit = sum(spread) / len(spread)
    for channel, own in zip(flat, spread, strict=True):
        channel *= unit / own
        np.square(channel, out=channel)
    for channel in flat[1:]:
        flat[0] += channel
    distance: Array = np.sqrt(flat[0] / len(flat))
    distance -= _FAR * np.median(_bands(distance))
    return distance


def _without_background(
    grey: Array, config: PrepareConfig, percentile: float, least_noise: float
) -> Array:
    """The same array [h, w], less its background."""
    grey -= background_of(grey, config.background, percentile, least_noise)
    return grey


def _bands(grey: Array) -> Array:  # [h, w] -> [at most h, w]
    """Bands of rows, evenly spread, of an image that is too large to be measured whole."""
    number = -(-grey.size // _MEASURED_PIXELS)
    if number == 1:
        return grey
    starts = range(0, len(grey), number * _BAND)
    return np.concatenate([grey[start : start + _BAND] for start in starts])


def background_of(grey: Array, kind: str, percentile: float, least_noise: float) -> Array:
    """The background [h, w] of an image [h, w]: 0, one value, or a smooth surface.

    The surface goes through low percentiles of blocks. As they lie too low where the light changes
    within a block, a quadric is fitted and subtracted first, if the light changes much.
    """
    if kind == "none":
        return np.zeros_like(grey)
    rows, columns = (max(1, round(side / _BLOCK)) for side in grey.shape)
    if kind == "image" or rows * columns == 1:
        smooth = ndimage.gaussian_filter(_bands(grey), _SMOOTHING)
        return np.full_like(grey, np.percentile(smooth, percentile))
    quadric = _quadric(grey, percentile, least_noise)
    if quadric is None:
        return _through_blocks(grey, (rows, columns), percentile)
    quadric += _through_blocks(grey - quadric, (rows, columns), percentile)
    return quadric


def _quadric(grey: Array, percentile: float, least_noise: float) -> Array | None:  # [h, w]
    """The quadric below which `percentile` of the image lies, if it is far from flat.

    A quantile regression on means of 5 x 5 pixels at 64 x 64 places, by reweighted least squares.
    """
    rows, columns = (
        np.linspace(0, side - 1, min(side, _PLACES)).astype(int) for side in grey.shape
    )
    near = range(-_MEAN_REACH, _MEAN_REACH + 1)
    values = np.zeros((len(rows), len(columns)))
    for down, right in product(near, near):
        y = np.clip(rows + down, 0, grey.shape[0] - 1)
        x = np.clip(columns + right, 0, grey.shape[1] - 1)
        values += grey[y[:, None], x]
    values /= len(near) ** 2
    y, x = (np.linspace(-1, 1, side) for side in grey.shape)
    ones = np.ones_like(values)
    v, u = ones * y[rows][:, None], ones * x[columns]
    terms = np.stack([ones, v, v**2, u, u**2, v * u], -1).reshape(-1, 6)
    share = percentile / 100
    weights = np.ones(values.size)
    for _ in range(_REWEIGHTINGS):
        root = np.sqrt(weights)
        factors = np.linalg.lstsq(terms * root[:, None], values.ravel() * root, rcond=None)[0]
        rest = values.ravel() - terms @ factors
        size = np.abs(rest)
        least = _NEARLY * max(float(np.median(size)), least_noise)
        weights = np.where(rest > 0, share, 1 - share) / np.maximum(size, least)
    low, high = np.percentile(rest, (percentile, _HIGH))
    if (terms @ factors).std() <= _STEEP * (high - low):
        return None
    a, b, c, d, e, f = factors.astype(np.float32)
    y, x = y.astype(np.float32)[:, None], x.astype(np.float32)
    quadric: Array = (a + b * y + c * y**2) + (d * x + e * x**2) + f * y * x
    return quadric


def _through_blocks(grey: Array, blocks: tuple[int, int], percentile: float) -> Array:
    """A smooth surface [h, w] through low percentiles of blocks: rows and columns of them."""
    rows, columns = blocks
    y, x = (
        np.linspace(0, side, n + 1).astype(int)
        for side, n in zip(grey.shape, (rows, columns), strict=True)
    )
    values = np.empty((rows, columns), np.float32)
    for i in range(rows):
        above, below = max(y[i] - _REACH, 0), y[i + 1] + _REACH
        smooth = ndimage.gaussian_filter(grey[above:below], _SMOOTHING)
        smooth = smooth[y[i] - above : y[i + 1] - above]
        for j in range(columns):
            values[i, j] = np.percentile(smooth[:, x[j] : x[j + 1]], percentile)
    values = ndimage.median_filter(values, size=3, mode="nearest")
    for axis, sides in enumerate([((1, 1), (0, 0)), ((0, 0), (1, 1))]):  # beyond the centres
        straight = values.shape[axis] > 1
        values = (
            np.pad(values, sides, mode="reflect", reflect_type="odd")
            if straight
            else np.pad(values, sides, mode="edge")
        )
    down, across = (
        _smooth_weights(side, n) for side, n in zip(grey.shape, (rows, columns), strict=True)
    )
    surface: Array = down @ values @ across.T
    return surface


def _smooth_weights(side: int, blocks: int) -> Array:  # [side, blocks + 2]
    """What the values at the centres of blocks, and beyond the ends, add to each pixel of an axis.

    Linear interpolation, then a Gaussian filter.
    """
    place = (np.arange(side) + 0.5) / side * blocks + 0.5
    distance = np.abs(place[:, None] - np.arange(blocks + 2))
    weights = np.maximum(1 - distance, 0).astype(np.float32)
    smooth: Array = ndimage.gaussian_filter1d(weights, _BLOCK / 4, axis=0, mode="nearest")
    return smooth


def noise_of(grey: Array, least: float) -> float:  # [h, w]
    """The standard deviation of noise that is independent between pixels, at least `least`.

    From the median size of second differences (Immerkaer 1996, with a median in place of the mean).
    """
    differences = ndimage.convolve(grey, _SECOND_DIFFERENCE)
    return max(_TO_STD * float(np.median(np.abs(differences))) / 6, least)


def typical_contrast(contrast: Array, noise: float) -> float:  # [h, w]
    """The median contrast of the pixels that Otsu's rule takes for objects, 0 if there are none.

    The rule is applied to logarithms beyond the noise, so dim objects count beside bright ones.
    """
    smooth = np.maximum(ndimage.gaussian_filter(contrast, _SMOOTHING), 0)
    soft = np.arcsinh(smooth / (_SOFT * noise))
    chosen = smooth[soft > otsu(soft)]
    return float(np.median(chosen)) if chosen.size else 0.0


def white_level(typical: float, noise: float, typical_white: float) -> float:
    """The contrast that becomes 1: 2.5 typical ones, if they stand out from the noise.

    Else what is measured may be noise, as in an image with few objects or none: the contrast is
    that of other images, so that the same objects look the same and noise stays dark.

    Args:
        typical: `typical_contrast` of an image.
        noise: `noise_of` it.
        typical_white: that of other images; no image has less than a tenth of it.
    """
    if stands_out(typical, noise):
        return max(_WHITE * typical, _LEAST_WHITE * typical_white)
    return max(_NOISES * noise, typical_white)


def stands_out(typical: float, noise: float) -> bool:
    """Whether the typical contrast of an image is certainly more than noise."""
    return _WHITE * typical > _NOISES * noise


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
    y, x = (
        (2 * torch.arange(length) + 1) * side // (2 * length)  # by the centre of each pixel
        for length, side in ((height, rows), (width, columns))
    )
    return replace(found, boxes=boxes, label_image=found.label_image[y[:, None], x])
