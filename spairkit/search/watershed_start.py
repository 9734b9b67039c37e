"""Objects to start the search from: the parts that a watershed finds in a prepared image."""

import torch
from torch import Tensor

from spairkit.kernels.constants import BOX
from spairkit.models.glimpses import extract_glimpses
from spairkit.models.latents import Latents
from spairkit.models.parts import Part
from spairkit.models.slots import Slots
from spairkit.models.spair import SPAIR
from spairkit.models.watershed import find_parts
from spairkit.preparation import OBJECT_PX


def watershed_slots(
    network: SPAIR, images: Tensor, latents: Latents, part: Part | None = None
) -> Slots:
    """An object for each part, with the appearance that the encoder gives to its glimpse.

    Args:
        images: [B, 3, H, W], bright objects on dark, about 12 px across.
        latents: the encoder's; objects take the standard deviations of their cells.
        part: of a larger image, if that is what each of the images is.
    """
    found = [find_parts(image.amax(0).cpu().numpy(), OBJECT_PX).boxes for image in images]
    most = max(map(len, found), default=0)
    cell = float(network.config.cell)
    boxes = torch.full((len(found), most, 4), cell)
    present = torch.zeros(len(found), most)
    for b, corners in enumerate(found):
        boxes[b, : len(corners)] = torch.from_numpy(corners)
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
