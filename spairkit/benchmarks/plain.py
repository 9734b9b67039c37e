"""SPAIR's training update in plain torch, the baseline of the benchmarks.

The same mathematics and weights as `SPAIR`, with torch's convolutions, a raster loop over the cells
under autograd, grid_sample as the renderer, and a loop for the KL divergence of presence.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spairkit.config import Config, SPAIRConfig
from spairkit.data.datasets import Dataset
from spairkit.kernels.constants import LOGIT_LIMIT, MIN_IMPORTANCE, MIN_PROBABILITY
from spairkit.models.convolutions import convolve_by_torch
from spairkit.models.densities import (
    count_success,
    cross_entropy_by_torch,
    normal_kl,
    squash,
)
from spairkit.models.elbo import Losses
from spairkit.models.latents import Latents, Noise, join
from spairkit.models.networks import Backbone, shared_weights
from spairkit.models.parts import Part
from spairkit.models.spair import SPAIR, appearance_constants
from spairkit.models.wavefront import NEIGHBOURS

COPIES = 40
"""Tensors [B, N, H, W] that grid_sample over all objects and its gradients hold at their peak."""


class PlainBackbone(Backbone):
    """The backbone in torch's default memory layout."""

    def forward(self, images: Tensor) -> Tensor:
        x, layers = images, [layer for layer in self.layers if isinstance(layer, nn.Conv2d)]
        for layer, stride in zip(layers, self.strides, strict=True):
            assert layer.bias is not None
            x = self.activation(x) if x is not images else x
            x = convolve_by_torch(x, layer.weight, layer.bias, stride)
        return x


class PlainSPAIR(SPAIR):
    """SPAIR's training pass in plain torch. Its state dict is that of `SPAIR`."""

    def __init__(self, config: SPAIRConfig) -> None:
        super().__init__(config)
        c = config
        self.backbone = PlainBackbone(
            c.strides, c.backbone_channels, c.features, c.pointwise_kernel, c.activation
        )

    @classmethod
    def like(cls, model: SPAIR) -> "PlainSPAIR":
        """The plain version of a model, with a copy of its weights on its device."""
        plain = cls(model.config)
        plain.load_state_dict(model.state_dict())
        return plain.to(next(model.parameters()).device)

    def _encode(
        self,
        images: Tensor,
        noise: Noise | None,
        training_wheels: bool,
        relaxed: bool,
        part: Part | Sequence[Part] | None = None,
    ) -> Latents:
        assert noise is not None
        c = self.config
        features = self.backbone(images)  # [B, F, rows, columns]
        rows, columns = features.shape[-2:]
        networks = (self.where_network, self.depth_network, self.presence_network)
        weights = shared_weights(networks, 0, networks[0].shared)
        bias = torch.cat([network.first.bias for network in networks])
        edge = self.edge_object().expand(1, len(images), -1) if c.lateral else None
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
            product, corner = F.linear(inputs, weights, bias), corners[k].expand(1, 1, 2)
            cell, vectors[i, j] = self.encode_wave(
                images, product, corner, drawn, training_wheels, relaxed, part
            )
            cells.append(cell)
        return join(cells, torch.arange(len(cells), device=images.device))

    def decode(self, what: Tensor) -> Tensor:
        logits = self.decoder(what).to(what.dtype)
        logits = logits.unflatten(-1, (self.config.object_size, self.config.object_size, 4))
        scale, bias = appearance_constants(self.config, logits.device, logits.dtype)
        return squash(logits * scale + bias)

    def _render(self, latents: Latents, background: Tensor, images: Tensor, maps: Tensor) -> Tensor:
        depth = latents.depth.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        back, floor = background.expand(-1, -1, *images.shape[-2:]), self.config.importance_floor
        return render_by_grid_sample(maps, latents.boxes, depth, latents.presence, back, floor)

    def _losses(
        self, images: Tensor, latents: Latents, image: Tensor, success: float | Tensor | None
    ) -> Losses:
        assert isinstance(success, float)
        c, weight = self.config, latents.presence
        centre, size = latents.where_mean.split(2, dim=-1)
        centre_std, size_std = latents.where_std.split(2, dim=-1)
        where = normal_kl(centre, centre_std, 0.0, c.position_prior_std).sum(-1)
        where = where + normal_kl(size, size_std, c.size_prior_mean, c.size_prior_std).sum(-1)
        what = normal_kl(latents.what_mean, latents.what_std, 0.0, 1.0).sum(-1)
        depth = normal_kl(latents.depth_mean, latents.depth_std, 0.0, 1.0)
        chance = torch.full((), success, dtype=torch.float64, device=images.device)
        return Losses(
            reconstruction=cross_entropy_by_torch(image, images, c.likelihood_floor),
            kl_where=(weight * where).sum(1),
            kl_what=(weight * what).sum(1),
            kl_depth=(weight * depth).sum(1),
            kl_pres=presence_kl_by_loop(latents.presence_logit, weight.detach(), chance).sum(1),
            beta=c.beta,
        )


class PlainTrainer:
    """SPAIR's training updates in plain torch, with a constant learning rate."""

    def __init__(self, config: Config, model: PlainSPAIR, train: Dataset) -> None:
        self.config, self.model, self.train, self.step = config, model, train, 0
        self.parameters = list(model.parameters())
        self.optimiser = torch.optim.Adam(self.parameters, lr=config.train.learning_rate)
        self.generator = torch.Generator(self.parameters[0].device).manual_seed(config.train.seed)

    def update(self) -> None:
        """One step of Adam."""
        settings, c, step = self.config.train, self.model.config, self.step
        first = (settings.seed << 32) + step * settings.batch_size
        images = self.train.batch(torch.arange(first, first + settings.batch_size)).images
        success = count_success(step, c.odds_start, c.odds_end, c.odds_decay, c.odds_schedule)
        bf16 = settings.precision == "bf16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            losses: Losses = self.model(images, success=success, generator=self.generator)
        self.optimiser.zero_grad()
        losses.total.mean().backward()
        if settings.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm)
        std = settings.gradient_noise * 0.1 ** (step / settings.gradient_noise_decay)
        for parameter in self.parameters if std > 1e-12 else ():
            assert parameter.grad is not None
            noise = torch.empty_like(parameter.grad)
            parameter.grad += nn.init.trunc_normal_(noise, std=std, a=-2 * std, b=2 * std)
        self.optimiser.step()
        self.step += 1


def render_by_grid_sample(
    rgba: Tensor, boxes: Tensor, depth: Tensor, presence: Tensor, back: Tensor, floor: float = 0.0
) -> Tensor:
    """The renderer in plain torch: draws every object on a full image, then sums the images."""
    num_images, num_objects, map_height, map_width, channels = rgba.shape
    height, width = back.shape[2:]
    alpha = rgba[..., -1:] * presence[..., None, None, None]
    importance = alpha * torch.sigmoid(-depth)[..., None, None, None]
    importance = importance.clamp(min=floor) if floor > 0 else importance
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
    change = (importance * alpha * (colour - cover * back[:, None])).sum(1)
    total = importance.sum(1)
    touched = total > MIN_IMPORTANCE
    return back + torch.where(touched, change / torch.where(touched, total, 1.0), 0.0)


def presence_kl_by_loop(
    logits: Tensor, samples: Tensor, success: Tensor, *, relaxed: bool = False
) -> Tensor:
    """The KL of presence in plain torch: equations (B1) and (B2), one cell after another.

    Relaxed samples are used as they are and get gradients. Probabilities below 1e-30 are raised to
    1e-30, as in the operator.
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
    kl_on = F.logsigmoid(logits) - F.logsigmoid(prior)
    kl_off = F.logsigmoid(-logits) - F.logsigmoid(-prior)
    return on * kl_on + (1 - on) * kl_off
