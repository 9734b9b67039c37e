"""Objects in slots: where, what and depth of each, several of which may share a cell.

B images or windows of images, N slots, M = 4 + A + 1 latents of an object in the order where, what,
depth. A slot without an object has presence 0.
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from spairkit.kernels.constants import BOX
from spairkit.models.latents import Latents


@dataclass(frozen=True, eq=False)
class Slots:
    """The objects of each image of a batch."""

    latents: Tensor  # [B, N, M] before their sigmoids
    std: Tensor  # [B, N, M] standard deviations of their posterior
    corner: Tensor  # [B, N, 2] y, x of the upper left corner of the object's cell, px
    present: Tensor  # [B, N] 1 where the slot holds an object, else 0
    saved: Tensor  # [B, N] energy that the object saves, nats; infinity if not known

    @classmethod
    def of(cls, latents: Latents, columns: int, cell: int) -> "Slots":
        """One slot for each cell of a grid with so many columns, cells of `cell` px."""
        batch, number = latents.presence.shape
        index = torch.arange(number, device=latents.presence.device)
        corner = cell * torch.stack([index // columns, index % columns], dim=-1)
        return cls(
            latents.mean,
            latents.std,
            corner.to(latents.mean.dtype).expand(batch, -1, -1),
            latents.presence,
            torch.full_like(latents.presence, torch.inf),
        )

    @property
    def where(self) -> Tensor:  # [B, N, 4] of z_y, z_x, z_h, z_w
        """Position and size."""
        return self.latents[..., :BOX]

    @property
    def what(self) -> Tensor:  # [B, N, A]
        """Appearance embedding."""
        return self.latents[..., BOX:-1]

    @property
    def depth(self) -> Tensor:  # [B, N]
        """Lower is nearer."""
        return self.latents[..., -1]

    @property
    def count(self) -> Tensor:  # [B]
        """The number of objects of each image."""
        return self.present.sum(1)

    def changed(self, latents: Tensor) -> "Slots":
        """The same objects with other latents."""
        return replace(self, latents=latents)

    def select(self, index: Tensor | slice) -> "Slots":
        """The slots of some images; `index` holds integers, is a mask [B] or a slice."""
        return Slots(*(part[index] for part in self._parts()))

    def gather(self, image: Tensor, index: Tensor) -> "Slots":
        """Slot `index[p, i]` of image `image[p]` as slot i of row p; both int64: [P], [P, n]."""
        return Slots(*(part[image[:, None], index] for part in self._parts()))

    def compact(self) -> "Slots":
        """The same objects, in order, in as few slots as hold those of every image."""
        most = int(self.count.amax()) if self.present.numel() else 0
        order = self.present.argsort(dim=1, descending=True, stable=True)[:, :most]
        return self.gather(torch.arange(len(order), device=order.device), order)

    def join(self, other: "Slots") -> "Slots":
        """The slots of both for each image, those of `other` last."""
        pairs = zip(self._parts(), other._parts(), strict=True)
        return Slots(*(torch.cat(pair, dim=1) for pair in pairs))

    def padded(self, slots: int) -> "Slots":
        """With empty slots behind, `slots` in all."""
        more = slots - self.present.shape[1]
        return Slots(
            F.pad(self.latents, (0, 0, 0, more)),
            F.pad(self.std, (0, 0, 0, more), value=1.0),
            F.pad(self.corner, (0, 0, 0, more)),
            F.pad(self.present, (0, more)),
            F.pad(self.saved, (0, more), value=torch.inf),
        )

    @staticmethod
    def stack(batches: "list[Slots]") -> "Slots":
        """The images of all batches, in order, with as many slots as the largest has."""
        most = max(batch.present.shape[1] for batch in batches)
        parts = zip(*(batch.padded(most)._parts() for batch in batches), strict=True)
        return Slots(*(torch.cat(part) for part in parts))

    def _parts(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]
