"""Tight boxes to start from: drawn round the pixels that each object owns."""

import torch
from torch import Tensor

from spairkit.models.glimpses import extract_glimpses
from spairkit.models.masks import masks_of, owners
from spairkit.models.parts import Part
from spairkit.models.slots import Slots
from spairkit.search.energy import Energy, Scene


@torch.no_grad()
def reframe(
    energy: Energy, scene: Scene, slots: Slots, share: float, part: Part | None = None
) -> Slots:
    """The same objects in tight boxes, with appearances encoded anew.

    The same pixels can be drawn by a large box with an empty margin, or by a tight one. The prior
    of the size prefers the tight one, but gradients hardly lead from one to the other. So each box
    is drawn round its object's mask, and its glimpse is encoded with the pixels of other objects
    painted in the background's colour.

    Args:
        share: of an object's height, where masks end; see `masks.masks_of`.
        part: of a larger image, if that is what each of the images is.
    """
    net, c = energy.network, energy.network.config
    size = scene.images.shape[-2], scene.images.shape[-1]
    boxes = energy.boxes(slots)
    maps, floor = net.decode(slots.what), c.importance_floor
    owner = owners(maps, boxes, slots.depth, slots.present, scene.background, size, floor)
    heights = (scene.images - scene.background).abs().amax(1).cpu().numpy()
    tight = boxes.cpu().clone()
    for b in range(len(tight)):
        masks = masks_of(owner[b].numpy(), heights[b], share)
        tight[b, masks.slots] = torch.from_numpy(masks.boxes).to(tight.dtype)
    boxes = tight.to(boxes.device)
    glimpses = extract_glimpses(scene.images, boxes, c.object_size, part)
    others = _others(owner.to(boxes.device), boxes, c.object_size)
    glimpses = torch.where(others[:, :, None], scene.background[:, None], glimpses)
    what, _ = net.appearance(glimpses)
    where = net.where_of(boxes, slots.corner)
    return slots.changed(torch.cat([where, what, slots.depth[..., None]], dim=-1))


def _others(owner: Tensor, boxes: Tensor, side: int) -> Tensor:  # [B, N, side, side] bool
    """Whether another object owns the pixel nearest to each point of a glimpse."""
    height, width = owner.shape[-2:]
    steps = torch.linspace(0, 1, side, device=boxes.device)[:, None]
    points = boxes[..., None, :2] + (boxes[..., 2:] - boxes[..., :2])[..., None, :] * steps
    scale = boxes.new_tensor([(width - 1) / width, (height - 1) / height])
    x, y = (points * scale).round().long().unbind(-1)
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    image = torch.arange(len(boxes), device=boxes.device)[:, None, None, None]
    seen = owner[image, y[..., :, None], x[..., None, :]]
    own = torch.arange(1, boxes.shape[1] + 1, device=boxes.device)[:, None, None]
    return (seen != 0) & (seen != own)
