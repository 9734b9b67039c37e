"""Tight boxes that the search starts from."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from spairkit.models.glimpses import extract_glimpses
from spairkit.models.masks import owners
from spairkit.search.reframe import reframe

if TYPE_CHECKING:
    from conftest import Discs


def test_boxes_become_tight_round_discs(discs: "type[Discs]") -> None:
    world = discs()
    true = world.slots([(14, 18, 12, 0.0), (34, 30, 14, 0.0)], [(20, 22, 10, 0.0)])
    scene = world.scene(world.draw(true, (48, 48)))
    loose = world.slots([(14.5, 17, 20, 0.0), (33, 31, 22, 0.0)], [(21, 23, 18, 0.0)])
    found = reframe(world.energy, scene, loose, 0.1)
    assert torch.equal(found.present, loose.present)
    assert torch.equal(found.corner, loose.corner)
    assert torch.equal(found.depth, loose.depth)
    boxes, expected = world.energy.boxes(found), world.energy.boxes(true)
    on = true.present > 0
    torch.testing.assert_close(boxes[on], expected[on], rtol=0, atol=1.01)
    for box in boxes[on]:
        torch.testing.assert_close(box, box.round(), rtol=0, atol=1e-3)


def test_glimpses_are_encoded_without_the_pixels_of_other_objects(discs: "type[Discs]") -> None:
    world = discs()
    net, background = world.network, torch.tensor([0.1, 0.0, 0.2])[:, None, None]
    moments = net.encoder[-1]
    assert isinstance(moments, nn.Linear)
    moments.weight.copy_(
        torch.randn(moments.weight.shape, generator=torch.Generator().manual_seed(0))
    )
    slots = world.slots([(14, 18, 12, 0.0), (20, 24, 12, 0.0)])
    depth = torch.tensor([[-2.0, 2.0]])[..., None]
    slots = slots.changed(torch.cat([slots.latents[..., :-1], depth], dim=-1))
    image = world.draw(slots, (40, 48))
    scene = replace(world.scene(image), background=background[None])
    before, floor = world.energy.boxes(slots), net.config.importance_floor
    maps, on = net.decode(slots.what), slots.present
    owner = owners(maps, before, slots.depth, on, scene.background, (40, 48), floor)[0]
    found = reframe(world.energy, scene, slots, 0.1)
    boxes = world.energy.boxes(found)
    glimpses = extract_glimpses(image, boxes, 14)[0]
    painted = 0
    for n, (x1, y1, x2, y2) in enumerate(boxes[0].tolist()):
        for r in range(14):
            for c in range(14):
                y = round((y1 + (y2 - y1) * r / 13) * 39 / 40)
                x = round((x1 + (x2 - x1) * c / 13) * 47 / 48)
                if int(owner[y, x]) not in (0, n + 1):
                    glimpses[n, :, r, c] = background[:, 0, 0]
                    painted += 1
    assert painted > 20
    torch.testing.assert_close(found.what, net.appearance(glimpses[None])[0])


def test_objects_without_a_mask_keep_their_boxes(discs: "type[Discs]") -> None:
    world = discs()
    slots = world.slots([(14, 18, 12, 0.0), (34, 30, 14, 0.0)])
    scene = world.scene(torch.zeros(1, 3, 48, 48))
    found = reframe(world.energy, scene, slots, 0.1)
    torch.testing.assert_close(world.energy.boxes(found), world.energy.boxes(slots))


def test_empty_batches_stay_empty(discs: "type[Discs]") -> None:
    world = discs()
    slots = world.slots([], [])
    assert reframe(world.energy, world.scene(torch.rand(2, 3, 30, 30)), slots, 0.1).count.sum() == 0
