"""ConnComp: a connected component of pixels that differ from the background is an object.

The baseline of the paper (main text 5.1, supplement D.3; docs/model.md 9). It is the cheapest
detector, and the best one where objects do not touch.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from spairkit.config import ConnCompConfig
from spairkit.detections import Detections, Explanation
from spairkit.images import commonest_colour
from spairkit.models.networks import check_images

Array = npt.NDArray[Any]

# pixels connect to their four neighbours, never across images
_CROSS = np.zeros((3, 3, 3), dtype=bool)
_CROSS[1] = ndimage.generate_binary_structure(2, 1)
_OBJECT_SIDE = 21  # texels of an object's picture, as of the authors' glimpses


class ConnComp(nn.Module):
    """Finds objects as connected components, with two numbers to fit.

    Both stand in the state dict: `threshold` [] in [0, 3] and `background_colour` [3] in [0, 1].

    Args:
        config: a given threshold or colour applies at once. Until it is fitted, the threshold is
            .01, the lowest of the grid, and the background is black.
    """

    threshold: Tensor
    background_colour: Tensor

    def __init__(self, config: ConnCompConfig) -> None:
        super().__init__()
        self.config = config
        given = config.threshold if isinstance(config.threshold, float) else 0.01
        colour = config.colour if config.background == "given" else (0.0, 0.0, 0.0)
        self.register_buffer("threshold", torch.tensor(given))
        self.register_buffer("background_colour", torch.tensor(colour))

    @torch.no_grad()
    def distance(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, H, W]
        """|image - background| summed over the channels, in [0, 3].

        Raises:
            ValueError: `images` has another shape or dtype, or holds NaN or infinity.
        """
        check_images(images, finite=True)
        return (images - self.background_colour[:, None, None]).abs().sum(1)

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[Detections]:  # [B, 3, H, W]
        """The components of each image, in the order of their first pixels.

        Boxes are half-open and hold the pixels of a component exactly; scores are 1, embeddings
        have no dimension, and depths are 0.

        Raises:
            ValueError: as `distance`.
        """
        return find_components(self._foreground(images), self.config.min_area)

    @torch.no_grad()
    def explain(self, images: Tensor) -> list[Explanation]:  # [B, 3, H, W]
        """The components of each image, with appearances and a reconstruction.

        An appearance [21, 21, 4] is the image inside the box, with alpha 1 on the component's own
        pixels, resized. The reconstruction shows each component in its mean colour. Raises
        ValueError as `distance`.
        """
        foreground = self._foreground(images)
        found = find_components(foreground, self.config.min_area)
        pixels = images.detach().cpu().float()
        return [self._explained(found[b], pixels[b], foreground[b]) for b in range(len(foreground))]

    def _explained(self, found: Detections, image: Tensor, foreground: Array) -> Explanation:
        labels = _labelled(foreground[None], self.config.min_area)[0][0]
        drawn = mean_colours(image, labels, self.background_colour.cpu())
        return Explanation(found, image, drawn, pictures(image, labels))

    @torch.no_grad()
    def fit_background(self, images: Tensor) -> None:  # [B, 3, H, W] in [0, 1]
        """Takes the background "mode" or "median" from images. No effect on the other ones."""
        if self.config.background == "mode":
            self.background_colour.copy_(commonest_colour(images))
        elif self.config.background == "median":
            # numpy's, which has no limit on their number
            channels = images.detach().cpu().transpose(0, 1).flatten(1).numpy()
            self.background_colour.copy_(torch.from_numpy(np.median(channels, axis=1)))

    @torch.no_grad()
    def set_threshold(self, threshold: float) -> None:
        """Sets the threshold; pixels at or above it are foreground."""
        self.threshold.fill_(threshold)

    def _foreground(self, images: Tensor) -> Array:  # [B, H, W] bool
        foreground: Array = (self.distance(images) >= self.threshold).cpu().numpy()
        return foreground


def _labelled(foreground: Array, min_area: int) -> tuple[Array, int]:  # [B, H, W] bool
    """Labels of the components of at least `min_area` pixels, from 1, and their number."""
    labels, num = ndimage.label(foreground, _CROSS)
    if min_area > 1:
        kept = np.bincount(labels.ravel(), minlength=num + 1) >= min_area
        kept[0] = False
        labels = np.where(kept, np.cumsum(kept), 0)[labels]
        num = int(kept.sum())
    return labels, num


def find_components(
    foreground: Array,  # [B, H, W] bool
    min_area: int = 1,
) -> list[Detections]:
    """The 4-connected components of each image, in the order of their first pixels.

    Those of fewer than `min_area` pixels are left out.
    """
    labels, num = _labelled(foreground, min_area)
    spans = [
        (box[0].start, box[2].start, box[1].start, box[2].stop, box[1].stop)
        for box in ndimage.find_objects(labels, num)
    ]
    table = np.array(spans, dtype=np.int64).reshape(-1, 5)
    boxes = torch.from_numpy(table[:, 1:]).float()
    counts = np.bincount(table[:, 0], minlength=len(foreground)).tolist()
    return [
        Detections(
            boxes=own,
            scores=torch.ones(len(own)),
            what=torch.zeros(len(own), 0),
            depth=torch.zeros(len(own)),
        )
        for own in boxes.split(counts)
    ]


def mean_colours(
    image: Tensor,  # [3, H, W] in [0, 1]
    labels: Array,  # [H, W] int
    background: Tensor | None = None,  # [3]
) -> Tensor:  # [3, H, W] in [0, 1]
    """Each label's pixels in their mean colour; label 0 in `background`, if it is given."""
    flat = torch.from_numpy(labels.astype(np.int64)).flatten()
    size = int(flat.max()) + 1
    colours = image.double().flatten(1).T  # [H W, 3]
    sums = torch.zeros(size, 3, dtype=torch.float64).index_add_(0, flat, colours)
    means = sums / flat.bincount(minlength=size).clamp(min=1)[:, None]
    if background is not None:
        means[0] = background
    return means[flat].T.reshape(image.shape).clamp(0, 1).float().contiguous()


def pictures(image: Tensor, labels: Array) -> Tensor:  # [n, 21, 21, 4] in [0, 1]
    """The image inside the box of each label, resized, with alpha 1 on the label's own pixels."""
    cuts = [torch.zeros(0, _OBJECT_SIDE, _OBJECT_SIDE, 4)]
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        alpha = torch.from_numpy(labels[box] == number).float()
        cut = torch.cat([image[:, *box], alpha[None]])[None]
        size = (_OBJECT_SIDE, _OBJECT_SIDE)
        cut = F.interpolate(cut, size, mode="bilinear", antialias=True)
        cuts.append(cut.permute(0, 2, 3, 1).clamp(0, 1))
    return torch.cat(cuts)
