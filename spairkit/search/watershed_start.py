"""Objects to start the search from: the parts that a watershed finds in a prepared image."""

import torch
from torch import Tensor

from spairkit.config import WatershedConfig
from spairkit.detections import Detections
from spairkit.kernels.constants import BOX
from spairkit.models.glimpses import extract_glimpses
from spairkit.models.latents import Latents
from spairkit.models.parts import Part
from spairkit.models.slots import Slots
from spairkit.models.spair import SPAIR
from spairkit.models.watershed import Watershed
from spairkit.preparation import OBJECT_PX
from spairkit.search.trust import LEAST_TRUST, trust

_LARGE = 2.0  # diameter of large objects, in that of typical ones
_INSIDE = 0.3  # share of a typical part that lies in the large part that replaces it, at least
_HANDICAP = 0.7  # factor of the trust in large parts


def watershed_slots(
    network: SPAIR, images: Tensor, latents: Latents, encoded: Tensor, part: Part | None = None
) -> Slots:
    """An object for each part, with the appearance that the encoder gives to its glimpse.

    Args:
        network: in evaluation mode.
        images: [B, 3, H, W], bright objects on dark, about 12 px across.
        latents: the encoder's; objects take the standard deviations of their cells.
        encoded: [B, M, 4] boxes xyxy of the encoder's objects, px; empty ones for no object.
        part: of a larger image, if that is what each of the images is.
    """
    sizes = (OBJECT_PX, _LARGE * OBJECT_PX)
    typical, large = (Watershed(WatershedConfig(diameter=size)).detect(images) for size in sizes)
    found = [
        _chosen(one, other, image, boxes)
        for one, other, image, boxes in zip(typical, large, images, encoded, strict=True)
    ]
    most = max(map(len, found), default=0)
    cell = float(network.config.cell)
    boxes = torch.full((len(found), most, 4), cell)
    present = torch.zeros(len(found), most)
    for b, corners in enumerate(found):
        boxes[b, : len(corners)] = corners
        present[b, : len(corners)] = 1
    boxes, present = boxes.to(images), present.to(images)
    rows, columns = network.grid(images.shape[-2], images.shape[-1])
    place = ((boxes[..., :2] + boxes[..., 2:]).flip(-1) / 2 / cell).floor().clamp(min=0)
    place = torch.minimum(place, place.new_tensor([rows - 1, columns - 1]))
    number = (place[..., 0] * columns + place[..., 1]).long()
    image = torch.arange(len(found), device=images.device)[:, None]
    what, spread = network.appearance(
        extract_glimpses(images, boxes, network.config.object_size, part)
    )
    where = network.where_of(boxes, place * cell)
    std = latents.std[image, number]
    return Slots(
        torch.cat([where, what, torch.zeros_like(where[..., :1])], dim=-1),
        torch.cat([std[..., :BOX], spread, std[..., -1:]], dim=-1),
        place * cell,
        present,
        torch.full_like(present, torch.inf),
    )


def _chosen(typical: Detections, large: Detections, image: Tensor, encoded: Tensor) -> Tensor:
    """The boxes [n, 4] of typical parts, and of large ones that can be trusted more.

    A large part replaces the typical ones in it if the trust in it, times `_HANDICAP`, exceeds that
    in each of them. Objects with holes and texture are such large parts, and objects that touch
    are not.
    """
    assert typical.label_image is not None
    assert large.label_image is not None
    one, other = trust(typical, image, encoded), trust(large, image, encoded)
    number = len(large) + 1
    pair = typical.label_image.long() * number + large.label_image.long()
    both = torch.bincount(pair.flatten(), minlength=(len(typical) + 1) * number)
    both = both.view(-1, number)
    inside = both[1:, 1:] > _INSIDE * both[1:].sum(1, keepdim=True)
    rival = torch.where(inside, one[:, None], 0.0)
    best = rival.amax(0) if len(typical) else torch.zeros(len(large))
    wins = (other >= LEAST_TRUST) & (_HANDICAP * other > best)
    stays = ~(inside & wins).any(1)
    return torch.cat([typical.boxes[stays], large.boxes[wins]])
