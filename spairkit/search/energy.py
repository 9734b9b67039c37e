"""The energy that the search lowers: minus the log density of an image and its objects.

    E(z) = -log p(image | z) + beta sum KL(where, what, depth) - log p(z_pres)

The sum is over the present objects. Its terms are those of the training objective (docs/model.md 5)
at the means of the latents; log p(z_pres) is the closed form of supplement A. Where nothing that
changes reaches beyond a window of the image, the energy of the window changes by exactly as much as
that of the image.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spairkit.kernels.constants import LOGIT_LIMIT
from spairkit.models.densities import weighted_kls
from spairkit.models.slots import Slots
from spairkit.models.spair import SPAIR
from spairkit.presence import log_presence_prior
from spairkit.rendering import render


@dataclass(frozen=True, eq=False)
class Scene:
    """Images, or windows of images, and all that the energy needs besides the objects."""

    images: Tensor  # [B, 3, H, W] in [0, 1]
    background: Tensor  # [B, 3, 1, 1] in [0, 1]
    channels: Tensor  # [B] channels that the likelihood counts; see `images.num_channels`
    evidence: Tensor  # [B] weight of the likelihood: independent pixels, as a share of all
    outside: Tensor  # [B] objects of the image that have no slot in the window
    places: Tensor  # [B] n of the count prior of the whole image

    def select(self, index: Tensor | slice) -> "Scene":
        """Some of the images; `index` holds integers, is a mask [B] or a slice."""
        return Scene(*(getattr(self, field.name)[index] for field in fields(self)))


class Energy:
    """E of a trained network.

    Args:
        network: in evaluation mode.
        beta: weight of the KL terms.
    """

    def __init__(self, network: SPAIR, beta: float) -> None:
        self.network, self.beta = network, beta
        self.recorded: Any = None
        """The iterations of refinement that a GPU has recorded."""

    def __call__(self, scene: Scene, slots: Slots) -> Tensor:  # [B] nats
        """The energy of each image, with gradients to `slots.latents`."""
        nll = self.network.reconstruction_loss(
            self.draw(scene, slots), scene.images, scene.channels
        )
        kl = weighted_kls(slots.latents, slots.std, slots.present, *self.network.priors).sum(1)
        count = scene.outside + slots.count
        nll = scene.evidence * nll
        prior = log_presence_prior(count, scene.places, self.network.final_success)
        return nll + self.beta * kl - prior

    def boxes(self, slots: Slots) -> Tensor:  # [B, N, 4] xyxy, px
        """The boxes of z_where."""
        return self.network.boxes(slots.where, slots.corner)

    def draw(self, scene: Scene, slots: Slots) -> Tensor:  # [B, 3, H, W]
        """The image of the present objects."""
        # the importance floor would let absent ones blend in background
        boxes = torch.where((slots.present > 0)[..., None], self.boxes(slots), 0.0)
        return render(
            self.network.decode(slots.what),
            boxes,
            slots.depth.clamp(-LOGIT_LIMIT, LOGIT_LIMIT),
            slots.present,
            scene.background,
            size=(scene.images.shape[-2], scene.images.shape[-1]),
            importance_floor=self.network.config.importance_floor,
        )

    @torch.no_grad()
    def excess(self, scene: Scene, slots: Slots) -> Tensor:  # [B, H, W] nats
        """How much more each pixel costs than in a perfect reconstruction."""
        drawn, images = self.draw(scene, slots), scene.images
        loss = self.network.pixel_loss
        more = loss(drawn, images, scene.channels) - loss(images, images, scene.channels)
        return scene.evidence[:, None, None] * more

    @torch.no_grad()
    def evidence(self, scene: Scene, slots: Slots) -> Tensor:  # [B] in (0, 1]
        """The share of independent pixels, from the residuals; 1 with the Bernoulli likelihood.

        The normal likelihood treats the residuals of pixels as independent, but blur, texture and a
        wrong background make neighbours differ from the model alike. The mean residual of a block
        of k x k pixels, a third of a cell, would have a variance of sigma^2 / k^2. Where it is
        larger, each pixel counts for less by this factor.
        """
        if self.network.config.likelihood != "normal":
            return torch.ones_like(scene.evidence)
        residual = self.draw(scene, slots) - scene.images
        side = min(max(self.network.config.cell // 3, 1), *residual.shape[-2:])
        blocks = F.avg_pool2d(residual, side)
        variance = side**2 * blocks.square().flatten(1).mean(1)
        share: Tensor = self.network.noise_std.square() / variance.clamp(min=1e-12)
        return share.clamp(max=1)
