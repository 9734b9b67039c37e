"""The encoder's noise and latents, and the order in which latents are packed."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from spairkit.kernels.constants import BOX
from spairkit.models.densities import logistic
from spairkit.models.noise import Source, normal, uniform


@dataclass(frozen=True, eq=False)
class Noise:
    """Random numbers for one pass over a batch, drawn in advance."""

    normal: Tensor  # [B, K, 4 + A + 1] standard normal: where, what, depth
    logistic: Tensor  # [B, K] standard logistic: pres
    background: Tensor  # [B, 3] standard normal

    @classmethod
    def draw(cls, batch: int, cells: int, what: int, source: Source, like: Tensor) -> "Noise":
        """Fresh noise with the device and dtype of `like`."""
        placed = normal(source, like, batch, cells, BOX + what + 1)
        jitter = logistic(uniform(source, like, batch, cells))
        return cls(placed, jitter, normal(source, like, batch, 3))


@dataclass(frozen=True, eq=False)
class Latents:
    """Posterior and samples of every cell; normal variables are before their sigmoid."""

    where_mean: Tensor  # [B, K, 4] of z_y, z_x, z_h, z_w
    where_std: Tensor  # [B, K, 4]
    what_mean: Tensor  # [B, K, A]
    what_std: Tensor  # [B, K, A]
    what: Tensor  # [B, K, A] the sample
    depth_mean: Tensor  # [B, K]
    depth_std: Tensor  # [B, K]
    depth: Tensor  # [B, K] the sample of z_depth; lower is nearer
    presence_logit: Tensor  # [B, K] in [-10, 10]
    presence: Tensor  # [B, K] relaxed in training, else 0 or 1
    boxes: Tensor  # [B, K, 4] xyxy, pixels

    @property
    def mean(self) -> Tensor:  # [B, K, 4 + A + 1]
        """Means of where, what and depth."""
        return torch.cat([self.where_mean, self.what_mean, self.depth_mean[..., None]], dim=-1)

    @property
    def std(self) -> Tensor:  # [B, K, 4 + A + 1]
        """Standard deviations of where, what and depth."""
        return torch.cat([self.where_std, self.what_std, self.depth_std[..., None]], dim=-1)


_SCALARS = ("depth_mean", "depth_std", "depth", "presence_logit", "presence")


def join(waves: list[Latents], places: Tensor) -> Latents:
    """Joins waves of [n, B, ...] to latents in raster order, [B, K, ...], or [B, K] for scalars."""
    joined = {}
    for field in fields(Latents):
        part = torch.cat([getattr(wave, field.name) for wave in waves])[places].transpose(0, 1)
        joined[field.name] = part.squeeze(-1) if field.name in _SCALARS else part
    return Latents(**joined)


def unpack(record: Tensor, what: int) -> Latents:
    """Latents from [B, K, 3 (4 + A + 1) + 6] columns.

    Columns: means, stds and samples of where, what and depth; logit and sample of pres; boxes.
    """
    sizes = [BOX, what, 1] * 3 + [1, 1, BOX]
    parts = record.split(sizes, dim=-1)
    mean, std, sample, (logit, presence, boxes) = parts[:3], parts[3:6], parts[6:9], parts[9:]
    return Latents(
        where_mean=mean[0],
        where_std=std[0],
        what_mean=mean[1],
        what_std=std[1],
        what=sample[1],
        depth_mean=mean[2].squeeze(-1),
        depth_std=std[2].squeeze(-1),
        depth=sample[2].squeeze(-1),
        presence_logit=logit.squeeze(-1),
        presence=presence.squeeze(-1),
        boxes=boxes,
    )
