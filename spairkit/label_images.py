"""Masks as one label image: areas, intensities, outlines, COCO's segmentations, agreement.

A label image is [H, W] int32 with 0 on the background. Object i has the pixels of value
`labels[i]`; labels are 1 or more, and one may have no pixel.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spairkit.images import to_colour

_COCO_DIGITS = 7  # of five bits: counts of up to 2^34 pixels
_STRIP_PIXELS = 1 << 22


def relabelled(label_image: Tensor, labels: Tensor) -> Tensor:  # [H, W] int32
    """The label image with i + 1 on the pixels of object i, and 0 elsewhere.

    The pixels of a label that two objects share go to the later one.
    """
    pixels, chosen = label_image.numpy(), labels.numpy()
    table = np.zeros(_size(label_image, labels), np.int32)
    table[chosen] = np.arange(1, len(chosen) + 1)
    return torch.from_numpy(table[pixels])


def foreground_ari(found: Tensor, true: Tensor) -> float:  # [H, W] integers
    """How far two label images agree on which pixels of the true objects belong together.

    It is the adjusted Rand index (Hubert and Arabie 1985) of the pixels of true objects, "ARI-FG"
    in papers on scenes of objects. Those that no found object has count as one more object; those
    found on the true background do not count at all.

    Args:
        found, true: of one size, 0 on the background.

    Returns:
        At most 1, the same parts; 0 is expected by chance.

    Raises:
        ValueError: they differ in size, or there is no true object.
    """
    if found.shape != true.shape:
        raise ValueError(f"label images differ in size: {list(found.shape)}, {list(true.shape)}")
    inside = true > 0
    if not inside.any():
        raise ValueError("the true label image must have an object")
    both = torch.stack([found[inside], true[inside]])
    _, counts = both.unique(dim=1, return_counts=True)
    pairs, in_found, in_true = (
        float((sizes.double() * (sizes - 1) / 2).sum())
        for sizes in (counts, *(row.unique(return_counts=True)[1] for row in both))
    )
    pixels = both.shape[1]
    chance = in_found * in_true / max(pixels * (pixels - 1) / 2, 1)
    most = (in_found + in_true) / 2
    return 1.0 if most == chance else (pairs - chance) / (most - chance)


def halved(label_image: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:  # [2 H, 2 W] -> [H, W]
    """Labels at half the resolution: that of the most of each four pixels.

    Of two labels with two pixels each it is that of the second and the first pixel in turn, along
    both axes, so that masks keep their place and their size on average.
    """
    rows, columns = (
        2 * np.arange(length // 2) + (np.arange(length // 2) + 1) % 2
        for length in label_image.shape
    )
    chosen = label_image[rows[:, None], columns]
    four = np.stack([label_image[y::2, x::2] for y in (0, 1) for x in (0, 1)])
    least, less, more, most = np.sort(four, axis=0)
    chosen = np.where((least == less) & (more != most), least, chosen)
    chosen = np.where((more == most) & (least != less), most, chosen)
    half: npt.NDArray[np.int32] = np.where(less == more, less, chosen)
    return half


def areas(label_image: Tensor, labels: Tensor) -> Tensor:  # [n] int64
    """The number of pixels of each object."""
    number = _size(label_image, labels)
    sizes = np.zeros(number, np.int64)
    for rows in _strips(label_image):
        sizes += np.bincount(label_image[rows].numpy().ravel(), minlength=number)
    return torch.from_numpy(sizes[labels.numpy()])


def intensities(
    label_image: Tensor,
    labels: Tensor,
    image: Tensor,  # [1 or 3, H, W], as `images.read_pixels` gives it
) -> Tensor:  # [n] float32
    """The mean of the image over channels and the pixels of each object; NaN without a pixel.

    Intensities are in [0, 1].

    Raises:
        ValueError: the image has another size than the label image.
    """
    if image.shape[1:] != label_image.shape:
        raise ValueError(
            f"the image must be as large as the masks, {list(label_image.shape)}, "
            f"got {list(image.shape[1:])}"
        )
    number = _size(label_image, labels)
    sums, sizes = np.zeros(number), np.zeros(number)
    for rows in _strips(label_image):
        label = label_image[rows].numpy().ravel()
        place = np.flatnonzero(label)
        pixels = image[:, rows].flatten(1)[:, torch.from_numpy(place)]
        values = to_colour(pixels[:, None]).mean(0, dtype=torch.float64).numpy().ravel()
        sums += np.bincount(label[place], values, number)
        sizes += np.bincount(label[place], minlength=number)
    with np.errstate(invalid="ignore"):
        means = sums[labels.numpy()] / sizes[labels.numpy()]
    return torch.from_numpy(means).float()


def outlines(label_image: Tensor, height: int, width: int) -> npt.NDArray[np.int32]:
    """[height, width]: the label of the object whose outline a pixel is, else 0.

    The label image is resized to nearest pixels. Outlines are one pixel wide and run outside the
    objects; where two touch, inside the one of the higher label.
    """
    rows = np.arange(height) * label_image.shape[0] // height
    columns = np.arange(width) * label_image.shape[1] // width
    pixels = label_image.numpy()[rows[:, None], columns]
    drawn = np.zeros_like(pixels)
    for here, there in (
        (np.s_[1:], np.s_[:-1]),
        (np.s_[:-1], np.s_[1:]),
        (np.s_[:, 1:], np.s_[:, :-1]),
        (np.s_[:, :-1], np.s_[:, 1:]),
    ):
        own, other = pixels[here], pixels[there]
        beside = np.where(own == 0, other, np.where((other > 0) & (other < own), own, 0))
        np.maximum(drawn[here], beside, out=drawn[here])
    return drawn


def coco_segmentations(label_image: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Each object's mask as COCO's compressed RLE: `size` [H, W], and `counts` as text."""
    pixels = label_image.numpy().ravel(order="F")  # COCO counts down the columns
    starts = np.append(0, np.flatnonzero(pixels[1:] != pixels[:-1]) + 1)
    ends = np.append(starts[1:], pixels.size)
    values = pixels[starts]
    order = np.argsort(values, kind="stable")
    first = np.searchsorted(values[order], labels.numpy(), "left")
    last = np.searchsorted(values[order], labels.numpy(), "right")
    # the edges of each object's runs: where its pixels begin and end, in turn
    number = 2 * (last - first)
    runs = order[
        np.repeat(first - (number.cumsum() - number) // 2, number // 2)
        + np.arange(number.sum() // 2)
    ]
    edges = np.stack([starts[runs], ends[runs]], axis=1).ravel()
    texts = _compressed(edges, number, pixels.size)
    return [{"size": list(label_image.shape), "counts": text} for text in texts]


def _compressed(
    edges: npt.NDArray[np.int64],  # of all objects, ascending in each
    number: npt.NDArray[np.int64],  # of the edges of each
    size: int,  # number of pixels
) -> list[str]:
    """COCO's text of the lengths of an object's runs.

    From the fourth on, a count is its difference from the last but one. Each is written as signed
    digits of five bits, the lowest first; bit 32 says that another digit follows.
    """
    # an object ends with the image, where no count of 0 is written
    stop = number.cumsum()
    begin = stop - number
    at_end = np.append(edges, 0)[stop - 1] == size
    closed = np.insert(edges, stop[~at_end | (number == 0)], size)
    number = number + (~at_end | (number == 0))
    begin = number.cumsum() - number
    place = np.arange(len(closed)) - np.repeat(begin, number)  # of a count in its object
    counts = closed.copy()
    counts[place > 0] -= closed[np.flatnonzero(place > 0) - 1]
    values = counts.copy()
    later = np.flatnonzero(place > 2)
    values[later] -= counts[later - 2]
    digit = np.arange(_COCO_DIGITS)
    shifted = values[:, None] >> 5 * digit
    digits = shifted & 31
    complete = shifted >> 5 == np.where(digits & 16, -1, 0)
    final = complete.argmax(1)[:, None]
    text = 48 + digits + 32 * (digit < final)
    written = text[digit <= final].astype(np.uint8).tobytes().decode("ascii")
    lengths = np.append(0, (final[:, 0] + 1).cumsum())
    stops = lengths[begin + number].tolist()
    return [written[a:b] for a, b in zip(lengths[begin].tolist(), stops, strict=True)]


def _strips(label_image: Tensor) -> Iterator[slice]:
    """Rows that are worked on together, so that little memory is needed besides the image."""
    height, width = label_image.shape
    step = max(_STRIP_PIXELS // width, 1)
    return (slice(top, top + step) for top in range(0, height, step))


def _size(label_image: Tensor, labels: Tensor) -> int:
    """The length of a table that is indexed by labels."""
    return int(np.max(labels.numpy(), initial=int(label_image.max()))) + 1
