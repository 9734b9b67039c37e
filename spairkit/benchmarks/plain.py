"""SPAIR's training step as a good torch user would write it, to be timed beside ours.

The same mathematics and the same weights: torch's convolutions, a raster loop over the cells under
autograd, the renderer by grid_sample, the KL divergence of the counts by a loop.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spairkit.config import SPAIRConfig
from spairkit.kernels.constants import LOGIT_LIMIT, MIN_IMPORTANCE, MIN_PROBABILITY
from spairkit.models.convolutions import convolve_by_torch
from spairkit.models.densities import normal_kl, squash
from spairkit.models.elbo import Losses
from spairkit.models.latents import Latents, Noise, join
from spairkit.models.networks import Backbone, shared_weights
from spairkit.models.spair import SPAIR, appearance_constants
from spairkit.models.wavefront import NEIGHBOURS

COPIES = 40
"""Planes of [B, N, H, W] that grid_sample and its gradients hold at their peak."""


class PlainBackbone(Backbone):
    """The backbone by torch's convolutions alone, with memory laid out as torch does by default."""

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for index, (layer, stride) in enumerate(zip(self.layers, self.strides, strict=True)):
            assert isinstance(layer, nn.Conv2d)
            assert layer.bias is not None
            x = convolve_by_torch(x, layer.weight, layer.bias, stride)
            if index < len(self.layers) - 1:
                x = self.activation(x)
        return x


class PlainSPAIR(SPAIR):
    """SPAIR in training, the plain way; takes the state of a `SPAIR` of the same config."""

    def __init__(self, config: SPAIRConfig) -> None:
        super().__init__(config)
        c = config
        self.backbone = PlainBackbone(
            c.strides, c.backbone_channels, c.features, c.pointwise_kernel, c.activation
        )

    def _encode(
        self, images: Tensor, noise: Noise | None, training_wheels: bool, relaxed: bool
    ) -> Latents:
        assert noise is not None
        c = self.config
        features = self.backbone(images)  # [B, F, rows, columns]
        rows, columns = features.shape[-2:]
        networks = (self.where_network, self.depth_network, self.presence_network)
        weights = shared_weights(networks, 0, networks[0].shared)
        bias = torch.cat([network.first.bias for network in networks])
        edge = self._edge().expand(1, len(images), -1) if c.lateral else None
        vectors: dict[tuple[int, int], Tensor] = {}  # [1, B, V]
        cells: list[Latents] = []
        places = torch.arange(rows * columns, device=images.device)
        corners = torch.stack([places // columns, places % columns], dim=-1).to(images.dtype)
        for k in range(rows * columns):
            i, j = divmod(k, columns)
            inputs = features[None, :, :, i, j]  # [1, B, F]
            if edge is not None:
                near = [vectors.get((i + di, j + dj), edge) for di, dj in NEIGHBOURS]
                inputs = torch.cat([inputs, *near], dim=-1)
            drawn = noise.normal[None, :, k], noise.logistic[None, :, k, None]
            cell, vectors[i, j] = self._encode_wave(
                images,
                F.linear(inputs, weights, bias),
                corners[k].expand(1, 1, 2),
                drawn,
                training_wheels,
                relaxed,
            )
            cells.append(cell)
        return join(cells, torch.arange(len(cells), device=images.device))

    def _decode(self, what: Tensor) -> Tensor:
        logits = self.decoder(what).to(what.dtype)
        logits = logits.unflatten(-1, (self.config.object_size, self.config.object_size, 4))
        scale, bias = appearance_constants(self.config, logits.device, logits.dtype)
        return squash(logits * scale + bias)

    def _render(self, latents: Latents, background: Tensor, images: Tensor) -> Tensor:
        return render_by_grid_sample(
            self._decode(latents.what),
            latents.boxes,
            latents.depth.clamp(-LOGIT_LIMIT, LOGIT_LIMIT),
            latents.presence,
            background.expand(-1, -1, *images.shape[-2:]),
            self.config.importance_floor,
        )

    def _losses(
        self, images: Tensor, latents: Latents, image: Tensor, success: float | Tensor | None
    ) -> Losses:
        assert success is not None
        c = self.config
        centre, size = latents.where_mean.split(2, dim=-1)
        centre_std, size_std = latents.where_std.split(2, dim=-1)
        where = normal_kl(centre, centre_std, 0.0, c.position_prior_std).sum(-1)
        where = where + normal_kl(size, size_std, c.size_prior_mean, c.size_prior_std).sum(-1)
        what = normal_kl(latents.what_mean, latents.what_std, 0.0, 1.0).sum(-1)
        depth = normal_kl(latents.depth_mean, latents.depth_std, 0.0, 1.0)
        if not isinstance(success, Tensor):
            success = torch.full((), success, dtype=torch.float64, device=images.device)
        weight = latents.presence
        pres = presence_kl_by_loop(latents.presence_logit, weight.detach(), success.double())
        return Losses(
            reconstruction=cross_entropy_of_images(image, images, c.likelihood_floor),
            kl_where=(weight * where).sum(1),
            kl_what=(weight * what).sum(1),
            kl_depth=(weight * depth).sum(1),
            kl_pres=pres.sum(1),
            beta=c.beta,
        )


class PlainAdam(torch.optim.Adam):
    """Adam as torch has it by default, which knows nothing of gradients that are not finite."""

    @property
    def found_inf(self) -> None:
        """What the fused Adam of training reads; set in vain."""

    @found_inf.setter
    def found_inf(self, value: Tensor) -> None:
        pass


def render_by_grid_sample(
    rgba: Tensor,
    boxes: Tensor,
    depth: Tensor,
    presence: Tensor,
    background: Tensor,
    importance_floor: float = 0.0,
) -> Tensor:
    """The renderer as one writes it in plain torch: every object on a full image, then sums."""
    num_images, num_objects, map_height, map_width, channels = rgba.shape
    height, width = background.shape[2:]
    alpha = rgba[..., -1:] * presence[..., None, None, None]
    importance = alpha * torch.sigmoid(-depth)[..., None, None, None]
    if importance_floor > 0:
        importance = importance.clamp(min=importance_floor)
    maps = torch.cat([rgba[..., :-1], torch.ones_like(alpha), alpha, importance], -1)
    maps = maps.reshape(-1, map_height, map_width, channels + 2).permute(0, 3, 1, 2)
    x1, y1, x2, y2 = boxes.reshape(-1, 4).unbind(-1)
    zero = torch.zeros_like(x1)
    across = torch.stack([width / (x2 - x1), zero, (width - x1 - x2) / (x2 - x1)], -1)
    down = torch.stack([zero, height / (y2 - y1), (height - y1 - y2) / (y2 - y1)], -1)
    places = torch.stack([across, down], 1)
    grid = F.affine_grid(places, [len(places), 1, height, width], align_corners=False)
    drawn = F.grid_sample(maps, grid, padding_mode="zeros", align_corners=False)
    drawn = drawn.view(num_images, num_objects, channels + 2, height, width)
    colour, cover, alpha, importance = drawn.split([channels - 1, 1, 1, 1], 2)
    change = (importance * alpha * (colour - cover * background[:, None])).sum(1)
    total = importance.sum(1)
    touched = total > MIN_IMPORTANCE
    return background + torch.where(touched, change / torch.where(touched, total, 1.0), 0.0)


def cross_entropy_of_images(image: Tensor, target: Tensor, floor: float) -> Tensor:  # [B]
    """The likelihood as one writes it in plain torch, an operation at a time."""
    image = image.clamp(0, 1)
    on, off = (image + floor).log(), (1 - image + floor).log()
    return -(off + target * (on - off)).flatten(1).sum(1)


def presence_kl_by_loop(
    logits: Tensor, samples: Tensor, success: Tensor, *, relaxed: bool = False
) -> Tensor:
    """The KL as one writes it in plain torch: equations (B1) and (B2), a cell at a time.

    Relaxed samples it takes as they are, with gradients; of a chance below 1e-30 it reads 1e-30,
    as the operator does.
    """
    num_images, num_cells = samples.shape
    counts = torch.arange(num_cells + 1, dtype=logits.dtype, device=logits.device)
    belief = (counts * torch.log1p(-success)).to(logits.dtype).expand(num_images, -1)
    present = (samples if relaxed else samples > 0.5).to(logits.dtype)
    before = torch.zeros_like(present[:, :1])
    log_odds = []
    for k in range(num_cells):
        on = ((counts - before) / (num_cells - k)).clamp(0, 1)
        weight = belief.softmax(1)
        chance, rest = (weight * on).sum(1), (weight * (1 - on)).sum(1)
        if relaxed:
            chance, rest = chance.clamp(min=MIN_PROBABILITY), rest.clamp(min=MIN_PROBABILITY)
        log_odds.append(chance.log() - rest.log())
        here = present[:, k, None]
        belief = belief + (here * on + (1 - here) * (1 - on)).log()
        before = before + here
    prior = torch.stack(log_odds, 1)
    on = torch.sigmoid(logits)
    return (
        on * (F.logsigmoid(logits) - F.logsigmoid(prior))
        + (1 - on) * (F.logsigmoid(-logits) - F.logsigmoid(-prior))
    )  # fmt: skip
