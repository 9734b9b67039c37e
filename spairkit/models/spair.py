"""SPAIR: convolutional, spatially invariant Attend-Infer-Repeat (Crawford & Pineau, AAAI 2019).

The model of the supplement and the released code (docs/model.md 1-5). B images, K = rows x
columns cells, A what dimensions, P the side of an object map. Inside the encoder tensors are in
wave order, cells first: [K, B, ...]; everything public is in raster order: [B, K, ...].
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spairkit.backends import Backend
from spairkit.boxes import whole_pixels, xyxy_from_centre
from spairkit.config import SPAIRConfig
from spairkit.detections import Detections, Explanation
from spairkit.images import commonest_colour, num_channels
from spairkit.kernels.constants import BOX, DEPTH_SCALE, LOGIT_LIMIT
from spairkit.label_images import halved
from spairkit.models.cell_loop import cells_backend, encode_cells
from spairkit.models.densities import (
    Group,
    bernoulli_cross_entropy,
    concrete_sample,
    limited,
    normal_nll,
    scaled_squash,
    squash,
    weighted_kls,
)
from spairkit.models.elbo import Losses
from spairkit.models.glimpses import extract_glimpses
from spairkit.models.latents import Latents, Noise, join
from spairkit.models.masks import masks_of, owners
from spairkit.models.networks import (
    Backbone,
    LateralNetwork,
    check_images,
    mlp,
    row_product,
)
from spairkit.models.noise import Source
from spairkit.models.parts import Part
from spairkit.models.slots import Slots
from spairkit.models.wavefront import LOOKBACK, NEIGHBOURS, wavefront
from spairkit.presence import presence_kl
from spairkit.rendering import render

_BACKGROUND_SCALE = 10.0  # of the learned colour's logits (docs/model.md 4.4)
_BACKGROUND_POOL = 12  # the MLP sees the image pooled to this side, whatever its size
_BACKGROUND_HIDDEN = (10, 10)
_LEAST_SCORE = 0.05  # of a cell that owns pixels
_HALF = 0.5  # of an object's height: where masks end if boxes are those of z_where
_RIM = 1e-3  # from the least and greatest position and size, when boxes become z_where
_NOISE_RATE = 0.01  # share of an update's residuals in the running mean (docs/model.md 5)


@cache  # without limit: a recorded CUDA graph reads from their addresses
@torch.inference_mode(False)  # the cache outlives the mode
def appearance_constants(
    config: SPAIRConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Of colour and alpha: [P, P, 4] scale and bias of the decoder's logits."""
    rows = [config.colour_scale] * 3 + [config.alpha_scale], [0.0, 0.0, 0.0, config.alpha_bias]
    texels = torch.ones(config.object_size, config.object_size, 1, device=device, dtype=dtype)
    scale, bias = (texels * torch.tensor(row, device=device, dtype=dtype) for row in rows)
    return scale, bias


class SPAIR(nn.Module):
    """Finds objects in images without labels.

    Args:
        config: the hyper-parameters; the defaults are those of Table 1.

    Source: main text section 4, supplement A-D; numbers and deviations in docs/model.md, which the
    comments here cite.
    """

    background_colour: Tensor
    """[3] in [0, 1], for background "mode" only."""
    noise_std: Tensor
    """0-d: standard deviation of a pixel, for likelihood "normal" only. In training mode every
    call moves it towards the root mean square of the residuals."""
    backend: Backend
    """Of the loop over cells in training, KL terms, likelihood and decoder's sigmoid, as in
    `spairkit.backends.compiled_backend`: the plain torch versions on a GPU, unless it is set to
    "triton"."""

    def __init__(self, config: SPAIRConfig) -> None:
        super().__init__()
        self.config = config
        self.backend = "auto"
        c = config
        self.vector = BOX + c.what + 2  # of one object: box, what, depth, presence
        context = len(NEIGHBOURS) * self.vector if c.lateral else 0
        shared = c.features + context
        glimpse = 3 * c.object_size**2
        self.backbone = Backbone(
            c.strides, c.backbone_channels, c.features, c.pointwise_kernel, c.activation
        )
        self.where_network = LateralNetwork(
            shared, 0, c.hidden, 2 * BOX + c.passthrough, c.activation
        )
        self.depth_network = LateralNetwork(
            shared, c.passthrough + BOX + c.what, c.hidden, 2 + c.passthrough, c.activation
        )
        self.presence_network = LateralNetwork(
            shared, c.passthrough + BOX + c.what + 1, c.hidden, 1, c.activation
        )
        self.encoder = mlp((glimpse, *c.encoder_hidden, 2 * c.what), c.activation)
        self.decoder = mlp((c.what, *c.decoder_hidden, 4 * c.object_size**2), c.activation)
        moments = self.encoder[-1]
        assert isinstance(moments, nn.Linear)
        with torch.no_grad():
            self.where_network.last.bias[2:BOX] = c.size_bias
            self.where_network.last.bias[BOX : 2 * BOX] = c.std_bias
            moments.bias[c.what :] = c.std_bias
            self.depth_network.last.bias[1] = c.std_bias
            self.presence_network.last.bias[:] = c.presence_bias
        if c.lateral:
            bound = (3 / self.vector) ** 0.5  # Glorot for a vector: U(-.23, .23)
            self.edge = nn.Parameter(torch.empty(self.vector).uniform_(-bound, bound))
        if c.background == "solid":
            self.background_logit = nn.Parameter(torch.zeros(3))
        elif c.background == "mlp":
            pixels = 3 * _BACKGROUND_POOL**2
            self.background_network = mlp((pixels, *_BACKGROUND_HIDDEN, 6), "relu")
        elif c.background == "mode":
            self.register_buffer("background_colour", torch.zeros(3))
        if c.likelihood == "normal":
            self.register_buffer("noise_std", torch.ones(()))

    @property
    def priors(self) -> tuple[Group, ...]:
        """Those of position, size, what and depth, in the order of the latents."""
        c = self.config
        return (
            (2, 0.0, c.position_prior_std),
            (2, c.size_prior_mean, c.size_prior_std),
            (c.what, 0.0, 1.0),
            (1, 0.0, 1.0),
        )

    @property
    def final_success(self) -> float:
        """s of the count prior at the end of its schedule."""
        return 1 / (1 + self.config.odds_end)

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W] in [0, 1]
        *,
        success: float | Tensor | None = None,
        training_wheels: bool = False,
        generator: Source = None,
    ) -> Losses:
        """The terms of the negative ELBO with one relaxed sample of the latents.

        Args:
            images: any height and width.
            success: s of the count prior, in (0, 1); None is the schedule's end.
            training_wheels: stop the gradients of where, depth and pres (docs/model.md 2.2).
            generator: source of the sampling noise, which may be a `Part` of a batch; None is
                torch's default generator.

        Returns:
            Losses, every term [B] in nats.

        Raises:
            ValueError: `images` has another shape or dtype.
        """
        check_images(images)
        latents, background = self._sample(images, training_wheels, generator)
        image = self._render(latents, background, images, self.decode(latents.what))
        losses = self._losses(images, latents, image, success)
        if self.training and self.config.likelihood == "normal":
            self._measure_noise(image, images)
        return losses

    @torch.no_grad()
    def detect(
        self,
        images: Tensor,
        threshold: float = 0.5,
        *,
        box_contrast: float | None = None,
        sample: bool = False,
        part: Part | Sequence[Part] | None = None,
    ) -> list[Detections]:
        """The objects of each image, in raster order of the cells.

        Args:
            images: [B, 3, H, W] in [0, 1], any height and width.
            threshold: cells with a presence probability above it are returned.
            box_contrast: draws boxes round masks as `config.box_contrast` says, which None takes;
                0 keeps the boxes of z_where.
            sample: sample every latent, as for the paper's figures; scores are then the sampled
                presences, 0 or 1. Otherwise latents are their means.
            part: of a larger image, if that is what each of the images is, or a part for each.

        Returns:
            B `Detections`, on the CPU.

        Raises:
            ValueError: `images` has another shape or dtype, or holds NaN or infinity.
        """
        latents, background = self.infer(images, sample, part)
        scores = latents.presence if sample else latents.presence_logit.sigmoid()
        slots, order = self._slots(latents, images, scores, threshold)
        scores = scores.gather(1, order)
        return self.detections(images, background, slots, scores, threshold, box_contrast)

    @torch.no_grad()
    def explain(
        self,
        images: Tensor,
        threshold: float = 0.5,
        *,
        box_contrast: float | None = None,
        part: Part | Sequence[Part] | None = None,
    ) -> list[Explanation]:
        """The objects of each image, their appearances and the reconstruction, in one pass.

        Arguments and errors as in `detect`. The reconstruction shows the cells with a presence
        probability above 1/2.
        """
        latents, background = self.infer(images, part=part)
        scores = latents.presence_logit.sigmoid()
        slots, order = self._slots(latents, images, scores, threshold)
        scores = scores.gather(1, order)
        maps = self.decode(slots.what)
        found = self.detections(
            images, background, slots, scores, threshold, box_contrast, maps=maps
        )
        drawn = render(
            maps,
            latents.boxes.gather(1, order[..., None].expand(-1, -1, BOX)),
            slots.depth.clamp(-LOGIT_LIMIT, LOGIT_LIMIT),
            latents.presence.gather(1, order),
            background,
            size=(images.shape[-2], images.shape[-1]),
            importance_floor=self.config.importance_floor,
        )
        return Explanation.of_batch(
            (slots.present > 0) & (scores > threshold), found, images, drawn.clamp(0, 1), maps
        )

    def _slots(
        self, latents: Latents, images: Tensor, scores: Tensor, threshold: float
    ) -> tuple[Slots, Tensor]:  # [B, n, ...], [B, n] int64
        """The cells whose score is above `threshold` or .05, as objects, and their indices.

        Pixels are owned by the same objects at any threshold from .05. Cells without an object are
        left out, or stand behind those with one.
        """
        _, columns = self.grid(images.shape[-2], images.shape[-1])
        chosen = (scores > min(threshold, _LEAST_SCORE)).to(scores.dtype)
        slots = replace(Slots.of(latents, columns, self.config.cell), present=chosen)
        most = int(slots.count.amax())
        order = chosen.argsort(dim=1, descending=True, stable=True)[:, :most]
        return slots.gather(torch.arange(len(order), device=order.device), order), order

    @torch.no_grad()
    def infer(
        self, images: Tensor, sample: bool = False, part: Part | Sequence[Part] | None = None
    ) -> tuple[Latents, Tensor]:
        """The latents of each cell, their means or a sample, and the background [B, 3, 1, 1].

        Cells and boxes are those of `images`, also if they are a part of a larger image.

        Raises:
            ValueError: as `detect`.
        """
        check_images(images, finite=True)
        noise = self._draw(images, None) if sample else None
        latents = self._encode(images, noise, training_wheels=False, relaxed=False, part=part)
        return latents, self._background(images, noise)

    def means(self, images: Tensor) -> Latents:  # [B, 3, H, W] in [0, 1]
        """The means of the latents, as `infer`, of images that are not checked."""
        return self._encode(images, None, training_wheels=False, relaxed=False)

    def detections(
        self,
        images: Tensor,  # [B, 3, H, W]
        background: Tensor,  # [B, 3, 1, 1]
        slots: Slots,
        scores: Tensor,  # [B, N]
        threshold: float,
        box_contrast: float | None = None,
        magnified: bool = False,
        maps: Tensor | None = None,  # [B, N, P, P, 4], if they are decoded already
    ) -> list[Detections]:
        """The present objects with a score above `threshold`, in order, with their masks.

        All present objects own pixels. Boxes are drawn round masks; if `magnified`, in the image
        at twice its size, so they end at half pixels.

        An object without a mask keeps the box of z_where, in whole pixels inside the image. With a
        box contrast of 0 all boxes are those of z_where, and masks end at half an object's height.
        """
        contrast = self.config.box_contrast if box_contrast is None else box_contrast
        size = images.shape[-2], images.shape[-1]
        boxes = self.boxes(slots.where, slots.corner)
        drawn = whole_pixels(boxes, size) if contrast else boxes
        if magnified:
            images = F.interpolate(images, scale_factor=2, mode="bicubic").clamp(0, 1)
            size, boxes = (images.shape[-2], images.shape[-1]), 2 * boxes
        weight = slots.present * scores  # doubtful objects own pixels that no other one claims
        if maps is None:
            maps = self.decode(slots.what)
        floor = self.config.importance_floor
        owner = owners(maps, boxes, slots.depth, weight, background, size, floor).numpy()
        heights = (images - background).abs().amax(1).float().cpu().numpy()
        found = []
        chosen = ((slots.present > 0) & (scores > threshold)).cpu()
        drawn, scores, what, depth = (
            x.float().cpu() for x in (drawn, scores, slots.what, slots.depth)
        )
        for b, on in enumerate(chosen):
            masks = masks_of(owner[b], heights[b], contrast or _HALF)
            corners = drawn[b].clone()
            if contrast:
                corners[masks.slots] = torch.from_numpy(masks.boxes) / (2 if magnified else 1)
            label_image = halved(masks.label_image) if magnified else masks.label_image
            found.append(
                Detections(
                    corners[on],
                    scores[b, on],
                    what[b, on],
                    depth[b, on],
                    label_image=torch.from_numpy(label_image),
                    labels=on.nonzero()[:, 0].int() + 1,
                )
            )
        return found

    def boxes(self, where: Tensor, corner: Tensor) -> Tensor:  # [..., 4], [..., 2] -> [..., 4]
        """Boxes xyxy in pixels, from z_where and the upper left corner of its cell (y, x, px).

        Source: equations 2 to 5.
        """
        c = self.config
        unit = squash(where)
        offset = unit[..., :2] * (c.centre_max - c.centre_min) + c.centre_min  # b~_y, b~_x
        return xyxy_from_centre(corner + offset * c.cell, unit[..., 2:] * c.anchor)

    def where_of(self, boxes: Tensor, corner: Tensor) -> Tensor:  # [..., 4], [..., 2] -> [..., 4]
        """z_where of boxes, the inverse of `boxes`; what is out of reach is clipped."""
        c = self.config
        centre = (boxes[..., :2] + boxes[..., 2:]).flip(-1) / 2
        size = (boxes[..., 2:] - boxes[..., :2]).flip(-1)
        offset = ((centre - corner) / c.cell - c.centre_min) / (c.centre_max - c.centre_min)
        return torch.logit(torch.cat([offset, size / c.anchor], dim=-1), eps=_RIM)

    def appearance(self, glimpses: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of z_what [B, N, A] of glimpses [B, N, 3, P, P]."""
        return self._moments(self.encoder(glimpses.flatten(2)), training_wheels=False)

    @torch.no_grad()
    def glimpses(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Glimpses [B, K, 3, P, P] of all cells, and whether each has an object [B, K] bool.

        Latents are their means; a cell has an object if its presence probability is above 1/2.
        Images are [B, 3, H, W] in [0, 1], and are not checked.
        """
        latents = self.means(images)
        cut = extract_glimpses(images, latents.boxes, self.config.object_size)
        return cut, latents.presence > 0

    @torch.no_grad()
    def fit_background(self, images: Tensor) -> None:  # [B, 3, H, W] in [0, 1]
        """Takes the colour of background "mode" from images.

        Raises:
            ValueError: the background is another one.
        """
        if self.config.background != "mode":
            raise ValueError(f"background {self.config.background!r} is not fitted to images")
        self.background_colour.copy_(commonest_colour(images))

    @torch.no_grad()
    def fit_noise(self, images: Tensor) -> None:  # [B, 3, H, W] in [0, 1]
        """Starts `noise_std` at the standard deviation of images.

        Raises:
            ValueError: the likelihood is another one.
        """
        if self.config.likelihood != "normal":
            raise ValueError(f"likelihood {self.config.likelihood!r} has no noise to fit")
        self.noise_std.copy_(images.std(correction=0).clamp(min=self.config.least_noise))

    def reconstruction_loss(
        self,
        drawn: Tensor,  # [B, 3, H, W] in [0, 1] up to rounding
        images: Tensor,  # [B, 3, H, W] in [0, 1]
        channels: Tensor,  # [B]
    ) -> Tensor:  # [B]
        """-log p(images | drawn) in nats, summed over pixels and channels (docs/model.md 5).

        Args:
            drawn: reconstructions; only they get gradients.
            images: whole images, or crops of them.
            channels: the number of channels that count, `num_channels` of the whole images. The
                Bernoulli likelihood always counts three.
        """
        if self.config.likelihood == "bernoulli":
            floor = self.config.likelihood_floor
            return bernoulli_cross_entropy(drawn, images, floor, backend=self.backend)
        # a copy, because the running mean changes in place before the backward pass
        nats = normal_nll(drawn, images, self.noise_std.clone(), backend=self.backend)
        return nats * (channels.to(nats.dtype) / 3)

    def pixel_loss(self, drawn: Tensor, images: Tensor, channels: Tensor) -> Tensor:  # [B, H, W]
        """The part of `reconstruction_loss` of each pixel, up to a constant; without the kernel."""
        if self.config.likelihood == "normal":
            squares = ((drawn - images) / self.noise_std).square().sum(1)
            return squares * (channels.to(squares.dtype) / 6)[:, None, None]
        floor, drawn = self.config.likelihood_floor, drawn.clamp(0, 1)
        on, off = (drawn + floor).log(), (1 - drawn + floor).log()
        return -(images * on + (1 - images) * off).sum(1)

    @torch.no_grad()
    def _measure_noise(self, drawn: Tensor, images: Tensor) -> None:
        """Moves the running mean `noise_std` towards the residuals, unless they are not finite."""
        square = (drawn - images).square().mean()
        std = self.noise_std.square().lerp(square, _NOISE_RATE).sqrt()
        std = std.clamp(min=self.config.least_noise)
        self.noise_std.copy_(torch.where(square.isfinite(), std, self.noise_std))

    def _sample(
        self, images: Tensor, training_wheels: bool, generator: Source
    ) -> tuple[Latents, Tensor]:
        noise = self._draw(images, generator)
        latents = self._encode(images, noise, training_wheels, relaxed=True)
        return latents, self._background(images, noise)

    def _draw(self, images: Tensor, generator: Source) -> Noise:
        rows, columns = self.grid(images.shape[-2], images.shape[-1])
        return Noise.draw(images.shape[0], rows * columns, self.config.what, generator, images)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of cells of an image: ceil(size / cell)."""
        return -(-height // self.config.cell), -(-width // self.config.cell)

    def first_layers(self, images: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """The first layers of where, depth and presence, applied to the features of the images.

        Returns:
            [B, K, 3 hidden] in raster order, and the weights of these layers for the context and
            for inputs of their own, of the three networks each.
        """
        features = self.backbone(images).flatten(2).transpose(1, 2)  # [B, K, F]
        networks = (self.where_network, self.depth_network, self.presence_network)
        parts = (network.first_weights(self.config.features) for network in networks)
        of_features, *rest = zip(*parts, strict=True)
        bias = torch.cat([network.first.bias for network in networks])
        return row_product(features, torch.cat(of_features), bias, self.training), rest

    def _encode(
        self,
        images: Tensor,
        noise: Noise | None,
        training_wheels: bool,
        relaxed: bool,
        part: Part | Sequence[Part] | None = None,
    ) -> Latents:
        """All cells, wave by wave (docs/model.md 3). Without noise, latents are
        their means, and presence is 1 where its probability is above 1/2."""
        c = self.config
        products, rest = self.first_layers(images)
        rows, columns = self.grid(images.shape[-2], images.shape[-1])
        front = wavefront(rows, columns, images.device)
        edge = self.edge_object() if c.lateral else None
        backend = cells_backend(images, self.encoder, relaxed, self.backend)
        if backend != "torch":
            networks = self.where_network, self.depth_network, self.presence_network
            given = images, products, noise, edge, networks, rest, self.encoder, c, front
            return encode_cells(*given, training_wheels, relaxed, part, backend)
        # from bfloat16, under autocast
        products = products.to(images.dtype).transpose(0, 1)[front.order]
        corners = torch.stack([front.order // columns, front.order % columns], dim=-1)
        corners = corners[:, None].to(images.dtype)  # [K, 1, 2] row and column of each cell
        if noise is not None:
            normal = noise.normal.transpose(0, 1)[front.order]  # [K, B, 4 + A + 1]
            jitter = noise.logistic.T[front.order, :, None]  # [K, B, 1]

        if edge is not None:
            context_weights = torch.cat(rest[0])
            edge = edge.expand(1, images.shape[0], -1)
        vectors: list[Tensor] = []  # of the waves so far, [n, B, V]
        waves: list[Latents] = []  # cells first
        for wave in front.waves:
            cells = slice(wave.start, wave.stop)
            product = products[cells]
            if edge is not None:
                pool = torch.cat([edge, *vectors[-LOOKBACK:]])
                context = pool[wave.neighbours].transpose(1, 2).flatten(2)  # [n, B, 4 V]
                product = product + row_product(context, context_weights, None, self.training)
            drawn = None if noise is None else (normal[cells], jitter[cells])
            latents, vector = self.encode_wave(
                images, product, corners[cells], drawn, training_wheels, relaxed, part
            )
            vectors.append(vector)
            waves.append(latents)
        return join(waves, front.places)

    def encode_wave(
        self,
        images: Tensor,  # [B, 3, H, W]
        products: Tensor,  # [n, B, 3 hidden] the first layers applied to features and context
        corners: Tensor,  # [n, 1, 2] row and column of each cell
        noise: tuple[Tensor, Tensor] | None,  # [n, B, 4 + A + 1], [n, B, 1]
        training_wheels: bool,
        relaxed: bool,
        part: Part | Sequence[Part] | None,
    ) -> tuple[Latents, Tensor]:  # cells first: [n, B, ...]; object vectors [n, B, V]
        """where, what, depth and pres of the cells of one wave (docs/model.md 3.3)."""
        c = self.config
        where_product, depth_product, presence_product = products.chunk(3, dim=-1)

        outputs = self.where_network(where_product, None)
        moments, passed = outputs.split([2 * BOX, c.passthrough], dim=-1)
        where_mean, where_std = self._moments(moments, training_wheels)
        where = where_mean if noise is None else where_mean + where_std * noise[0][..., :BOX]
        unit = squash(where)
        offset = unit[..., :2] * (c.centre_max - c.centre_min) + c.centre_min  # b~_y, b~_x
        centre = (corners + offset) * c.cell  # equations 2 and 3
        size = unit[..., 2:] * c.anchor  # equations 4 and 5
        boxes = xyxy_from_centre(centre, size)

        glimpses = extract_glimpses(images, boxes.transpose(0, 1), c.object_size, part)
        moments = self.encoder(glimpses.flatten(2)).transpose(0, 1)
        what_mean, what_std = self._moments(moments, training_wheels=False)
        what = what_mean if noise is None else what_mean + what_std * noise[0][..., BOX:-1]

        placed = torch.cat([offset, unit[..., 2:], what], dim=-1)
        outputs = self.depth_network(depth_product, torch.cat([passed, placed], dim=-1))
        moments, passed = outputs.split([2, c.passthrough], dim=-1)
        depth_mean, depth_std = self._moments(moments, training_wheels)
        depth = depth_mean if noise is None else depth_mean + depth_std * noise[0][..., -1:]
        placed = torch.cat([placed, DEPTH_SCALE * squash(-depth)], dim=-1)

        logit = self.presence_network(presence_product, torch.cat([passed, placed], dim=-1))
        logit = logit.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        if training_wheels:
            logit = logit.detach()
        if noise is None:
            presence = (logit > 0).to(logit.dtype)
        else:
            presence = concrete_sample(logit, noise[1], c.temperature)
            if not relaxed:
                presence = presence.round()
        latents = Latents(
            where_mean=where_mean,
            where_std=where_std,
            what_mean=what_mean,
            what_std=what_std,
            what=what,
            depth_mean=depth_mean,
            depth_std=depth_std,
            depth=depth,
            presence_logit=logit,
            presence=presence,
            boxes=boxes,
        )
        return latents, torch.cat([placed, presence], dim=-1)

    def edge_object(self) -> Tensor:  # [V]
        """The learned object beyond the rim; its box and presence lie in (0, 1)."""
        box, rest, presence = self.edge.split([BOX, self.vector - BOX - 1, 1])
        return torch.cat([box.sigmoid(), rest, presence.sigmoid()])

    def _moments(self, outputs: Tensor, training_wheels: bool) -> tuple[Tensor, Tensor]:
        """Means and standard deviations, the two halves: std = 2 sigmoid(raw)."""
        if training_wheels:
            outputs = outputs.detach()
        mean, raw = outputs.chunk(2, dim=-1)
        return mean, 2 * squash(raw)

    def decode(self, what: Tensor) -> Tensor:  # [B, K, A] -> [B, K, P, P, 4]
        """Colour and alpha of object maps, in [0, 1] (docs/model.md 4.1)."""
        c = self.config
        logits = self.decoder(what).to(what.dtype)  # from bfloat16, under autocast
        logits = logits.unflatten(-1, (c.object_size, c.object_size, 4))
        scale, bias = appearance_constants(c, logits.device, logits.dtype)
        return scaled_squash(logits, scale, bias, backend=self.backend)

    def _background(self, images: Tensor, noise: Noise | None) -> Tensor:  # [B, 3, 1, 1]
        """One colour for each image (docs/model.md 4.4); the MLP has no KL, as in the code."""
        batch = images.shape[0]
        kind = self.config.background
        if kind == "solid":
            colour = (_BACKGROUND_SCALE * self.background_logit).sigmoid().expand(batch, -1)
        elif kind == "mode":
            colour = self.background_colour.expand(batch, -1)
        elif kind == "mlp":
            pooled = F.adaptive_avg_pool2d(images, _BACKGROUND_POOL).flatten(1)
            mean, log_std = self.background_network(pooled).chunk(2, dim=-1)
            std = limited(log_std, LOGIT_LIMIT).exp()  # an infinite one has no gradient
            colour = squash(mean if noise is None else mean + std * noise.background)
        else:
            colour = images.new_zeros(batch, 3)
        return colour[:, :, None, None]

    def _render(
        self, latents: Latents, background: Tensor, images: Tensor, maps: Tensor
    ) -> Tensor:  # [B, 3, H, W]
        return render(
            maps,
            latents.boxes,
            latents.depth.clamp(-LOGIT_LIMIT, LOGIT_LIMIT),
            latents.presence,
            background,
            size=(images.shape[-2], images.shape[-1]),
            importance_floor=self.config.importance_floor,
        )

    def _losses(
        self, images: Tensor, latents: Latents, image: Tensor, success: float | Tensor | None
    ) -> Losses:
        """Every term, summed over all but the images (docs/model.md 5)."""
        c = self.config
        if success is None:
            success = self.final_success
        pres = presence_kl(latents.presence_logit, latents.presence.detach(), success)
        centre, size, what, depth = weighted_kls(
            latents.mean,
            latents.std,
            # the gradient through the weight is what switches useless cells off
            latents.presence,
            *self.priors,
            backend=self.backend,
        ).unbind(1)
        return Losses(
            reconstruction=self.reconstruction_loss(image, images, num_channels(images)),
            kl_where=centre + size,
            kl_what=what,
            kl_depth=depth,
            kl_pres=pres.sum(1),
            found=(latents.presence_logit > 0).to(pres.dtype).sum(1),
            beta=c.beta,
        )
