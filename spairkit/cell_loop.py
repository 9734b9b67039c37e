"""The cells of a batch in training, wave by wave, with a hand-written gradient.

The same mathematics as `SPAIR._encode_wave`, which is the readable version and the one that
inference uses. There a wave costs some 90 small operations, each recorded by autograd, and one
product a layer for the gradients of the weights. Here nothing is recorded, and what need not be
done wave by wave is done once for all cells: the products with features, factors of derivatives,
and the gradients of the weights.

Tensors are matrices [R, ...] whose rows are cells in wave order, each with all images: row
place * B + image, R = K B. M = 4 + A + 1 counts where, what and depth, V = M + 1 the numbers of an
object vector (box, what, nearness, presence), S the passthrough features, h the hidden units.
`split_with_sizes` is `split` without its checks in Python, a tenth of the loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spairkit.boxes import xyxy_from_centre
from spairkit.config import SPAIRConfig
from spairkit.densities import LOGIT_LIMIT, squash
from spairkit.glimpses import box_gradient, glimpse_rows
from spairkit.latents import BOX, Latents, Noise, unpack
from spairkit.networks import LateralNetwork, shared_weights
from spairkit.wavefront import NEIGHBOURS, Wavefront

DEPTH_SCALE = 4.0
"""The authors' depth is 4 sigmoid(z), in object vectors and importance."""


@dataclass(frozen=True)
class _Plan:
    """What is not a tensor with a gradient."""

    config: SPAIRConfig
    front: Wavefront
    training_wheels: bool
    batch: int

    @property
    def sizes(self) -> list[int]:
        """Rows of each wave."""
        return [(wave.stop - wave.start) * self.batch for wave in self.front.waves]


def encode_cells(
    images: Tensor,  # [B, 3, H, W]
    products: Tensor,  # [K, B, 3 h] first layers applied to features, cells in wave order
    noise: Noise,
    edge: Tensor | None,  # [V] the object beyond the rim; None without lateral connections
    networks: tuple[LateralNetwork, LateralNetwork, LateralNetwork],  # where, depth, pres
    encoder: nn.Sequential,
    config: SPAIRConfig,
    front: Wavefront,
    training_wheels: bool,
) -> Latents:
    """Relaxed latents in raster order, with gradients to all but images and noise.

    With training wheels only the weights of `encoder` get gradients, through what.

    Raises:
        RuntimeError: a second derivative is asked for.
    """
    lines = [module for module in encoder if isinstance(module, nn.Linear)]
    # without lateral connections the context is of no width, as is the own input of where
    context_weight = shared_weights(networks, config.features, networks[0].shared)
    weights = [context_weight]
    for network in networks:
        weights += [network.first.weight[:, network.shared :]]
        weights += [network.second.weight, network.second.bias]
        weights += [network.last.weight, network.last.bias]
    if training_wheels:
        # so that autograd too knows who gets no gradient
        weights = [weight.detach() for weight in weights]
        products, edge = products.detach(), None if edge is None else edge.detach()
    for line in lines:
        weights += [line.weight, line.bias]
    plan = _Plan(config, front, training_wheels, images.shape[0])
    normal = noise.normal.transpose(0, 1)[front.order].flatten(0, 1)
    jitter = noise.logistic.T[front.order].reshape(-1, 1) / config.temperature
    with torch.autocast(images.device.type, enabled=False):
        rows = products.flatten(0, 1).to(images.dtype)
        record: Tensor = _CellLoop.apply(  # type: ignore[no-untyped-call]
            plan, images.contiguous(), rows, normal, jitter, edge, *weights
        )
    record = record.unflatten(0, (-1, images.shape[0]))[front.places].transpose(0, 1)
    return unpack(record, config.what)


class _Network:
    """Linear layers with the activation between them, for all rows, wave by wave.

    The caller fills `inputs[0]` of a wave, and on the way back `grads[-1]`. The first layer adds
    what the caller gives: a bias, or the product with the input that networks share.
    """

    def __init__(self, activation: str, weights: list[Tensor], biases: list[Tensor]) -> None:
        self.activate = torch.relu_ if activation == "relu" else torch.celu_
        self.relu = activation == "relu"
        self.weights = weights  # [outputs, inputs]
        self.transposed = [weight.t() for weight in weights]
        self.biases = biases  # of all layers but the first
        self.inputs: list[Tensor] = []  # [R, inputs] of each layer
        self.outputs = weights[0].new_empty(0)  # [R, outputs] of the last layer
        self.grads: list[Tensor] = []  # [R, outputs] of each layer, before its activation

    def start(self, sizes: list[int]) -> None:
        """Makes room for the way there, in waves of so many rows."""
        rows = sum(sizes)
        self.inputs = [weight.new_empty(rows, weight.shape[1]) for weight in self.weights]
        self.outputs = self.weights[-1].new_empty(rows, self.weights[-1].shape[0])
        self.wave_inputs = [x.split_with_sizes(sizes) for x in (*self.inputs, self.outputs)]

    def forward(self, wave: int, added: Tensor) -> None:
        """Fills the inputs of layer 1 on, and the outputs."""
        inputs = [waves[wave] for waves in self.wave_inputs]
        torch.addmm(added, inputs[0], self.transposed[0], out=inputs[1])
        for layer, bias in enumerate(self.biases, start=1):
            self.activate(inputs[layer])
            torch.addmm(bias, inputs[layer], self.transposed[layer], out=inputs[layer + 1])

    def start_back(self, sizes: list[int]) -> None:
        """Makes room for the way back."""
        rows = sum(sizes)
        self.grads = [weight.new_empty(rows, weight.shape[0]) for weight in self.weights]
        # from the output y: relu' = [y > 0], celu' = exp(min(x, 0)) = min(y, 0) + 1
        slopes = [(y > 0).to(y.dtype) if self.relu else y.clamp(max=0) + 1 for y in self.inputs[1:]]
        self.wave_grads = [grad.split_with_sizes(sizes) for grad in self.grads]
        self.wave_slopes = [slope.split_with_sizes(sizes) for slope in slopes]

    def back(self, wave: int) -> None:
        """Fills the gradients below the last layer's."""
        for layer in range(len(self.weights) - 1, 0, -1):
            grad = self.wave_grads[layer - 1][wave]
            torch.mm(self.wave_grads[layer][wave], self.weights[layer], out=grad)
            grad.mul_(self.wave_slopes[layer - 1][wave])

    def grad_inputs(self, wave: int) -> Tensor:
        return self.wave_grads[0][wave] @ self.weights[0]

    def grad_weights(self) -> list[Tensor]:
        """Of weight 0, weight 1, bias 1, ...: one product a layer, over all rows."""
        products = [grad.t() @ x for grad, x in zip(self.grads, self.inputs, strict=True)]
        grads = products[:1]
        for product, grad in zip(products[1:], self.grads[1:], strict=True):
            grads += [product, grad.sum(0)]
        return grads


def _networks(activation: str, weights: tuple[Tensor, ...]) -> list[_Network]:
    """where, depth, pres and encoder from the weights in the order of `encode_cells`."""
    parts = [weights[5 * n : 5 * n + 5] for n in range(3)]
    first, _, *rest = weights[15:]  # the caller adds the bias of the encoder's first layer
    parts.append((first, *rest))
    return [_Network(activation, [part[0], *part[1::2]], list(part[2::2])) for part in parts]


def _inside(logits: Tensor) -> Tensor:
    """Derivative of the clipping of logits: 1 inside, else 0."""
    return (logits.abs() <= LOGIT_LIMIT).to(logits.dtype)


class _CellLoop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        images: Tensor,
        products: Tensor,  # [R, 3 h]
        normal: Tensor,  # [R, M]
        jitter: Tensor,  # [R, 1] logistic noise / temperature
        edge: Tensor | None,
        context_weight: Tensor,  # [3 h, 4 V], or no columns
        *weights: Tensor,
    ) -> Tensor:  # [R, 3 M + 6], columns as in `unpack`
        c, sizes = plan.config, plan.sizes
        num_rows, columns = len(products), [BOX, c.what, 1]
        new = products.new_empty
        networks = where, depth, pres, encoder = _networks(c.activation, weights)
        for network in networks:
            network.start(sizes)
        moments = [2 * [BOX], 2 * [c.what], 2 * [1]]
        passed = [[c.passthrough], [], [c.passthrough]]
        outputs = [
            network.outputs.split_with_sizes(m + p, dim=1)
            for network, m, p in zip((where, encoder, depth), moments, passed, strict=True)
        ]
        where_out, what_out, depth_out = (_by_wave(parts, sizes) for parts in outputs)
        samples = new(num_rows, sum(columns))
        boxes, presence = new(num_rows, BOX), new(num_rows, 1)
        wave_samples = _by_wave(samples.split_with_sizes(columns, dim=1), sizes)
        twice = _by_wave(
            (2 * normal).split_with_sizes(columns, dim=1), sizes
        )  # std = 2 sigmoid(raw)
        scale, shift, to_pixels = _box_constants(c, products.device, products.dtype)
        first_bias = weights[16]  # of the encoder
        vectors = new(num_rows + plan.batch, samples.shape[1] + 1)  # the edge after all cells
        contexts = new(num_rows, context_weight.shape[1])
        added_parts = _by_wave(products.chunk(3, dim=1), sizes)
        if edge is not None:
            vectors[num_rows:] = edge
            near = _vector_rows(plan.front.neighbours, plan.batch)  # [R, 4]
            near_parts = near.flatten().split_with_sizes([len(NEIGHBOURS) * size for size in sizes])
        rows = _by_wave(
            (products, contexts, vectors[:num_rows], _corners(images, plan, to_pixels), jitter,
             boxes, presence), sizes,
        )  # fmt: skip

        for wave, (product, context, vector, corner, shove, box, present) in enumerate(rows):
            added = added_parts[wave]
            if edge is not None:
                slots = context.view(-1, vectors.shape[1])
                torch.index_select(vectors, 0, near_parts[wave], out=slots)
                added = torch.addmm(product, context, context_weight.t()).chunk(3, dim=1)

            where.forward(wave, added[0])
            mean, raw, passed_on = where_out[wave]
            sample, what, depth_sample = wave_samples[wave]
            torch.addcmul(mean, squash(raw), twice[wave][0], out=sample)
            placed = torch.addcmul(shift, squash(sample), scale)  # b~_y, b~_x, h, w
            pixels = torch.addcmul(corner, placed, to_pixels)
            box.copy_(xyxy_from_centre(*pixels.split_with_sizes([2, 2], dim=1)))

            encoder.wave_inputs[0][wave].copy_(glimpse_rows(images, box, c.object_size))
            encoder.forward(wave, first_bias)
            mean, raw = what_out[wave]
            torch.addcmul(mean, squash(raw), twice[wave][1], out=what)

            torch.cat([passed_on, placed, what], dim=1, out=depth.wave_inputs[0][wave])
            depth.forward(wave, added[1])
            mean, raw, passed_on = depth_out[wave]
            torch.addcmul(mean, squash(raw), twice[wave][2], out=depth_sample)
            nearness = DEPTH_SCALE * squash(-depth_sample)

            own = torch.cat([passed_on, placed, what, nearness], 1, out=pres.wave_inputs[0][wave])
            pres.forward(wave, added[2])
            logit = pres.wave_inputs[-1][wave].clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
            torch.add(shove, logit, alpha=1 / c.temperature, out=present).sigmoid_()
            torch.cat([own[:, c.passthrough :], present], dim=1, out=vector)

        means = torch.cat([parts[0] for parts in outputs], dim=1)
        raws = torch.cat([parts[1] for parts in outputs], dim=1)
        logits = pres.outputs
        ctx.plan = plan
        ctx.save_for_backward(
            images, normal, context_weight, *weights, samples, raws, logits, presence, boxes,
            contexts, *(x for network in networks for x in network.inputs),
        )  # fmt: skip
        clipped = logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        return torch.cat([means, 2 * squash(raws), samples, clipped, presence, boxes], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_record: Tensor) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        c, front, sizes, batch = plan.config, plan.front, plan.sizes, plan.batch
        columns, num_weights = [BOX, c.what, 1], 15 + 2 * (len(c.encoder_hidden) + 1)
        m, s = sum(columns), c.passthrough
        images, normal, context_weight, *saved = ctx.saved_tensors
        weights, saved = tuple(saved[:num_weights]), saved[num_weights:]
        samples, raws, logits, presence, boxes, contexts, *saved = saved
        networks = where, depth, pres, encoder = _networks(c.activation, weights)
        for network in networks:
            network.inputs = [saved.pop(0) for _ in network.weights]
        grad_mean, grad_std, grad_sample, grad_logit, grad_presence, grad_boxes = (
            grad_record.split_with_sizes([m, m, m, 1, 1, BOX], dim=1)
        )

        # sample = mean + std noise and std = 2 sigmoid(raw): a gradient g that reaches a sample
        # adds g to its mean's and g * lever to its raw's
        half = squash(raws)
        slope_std = 2 * half * (1 - half) * _inside(raws)
        lever = normal * slope_std
        grad_mean = grad_mean + grad_sample
        grad_raw = torch.addcmul(grad_std * slope_std, grad_sample, lever)
        if plan.training_wheels:
            encoder.start_back([len(samples)])
            what = slice(BOX, -1)
            torch.cat([grad_mean[:, what], grad_raw[:, what]], dim=1, out=encoder.grads[-1])
            encoder.back(0)
            return (*(None,) * 7, *(None,) * 15, *_encoder_grads(encoder))

        scale, _, to_pixels = _box_constants(c, samples.device, samples.dtype)
        unit = squash(samples[:, :BOX])
        slope_placed = scale * unit * (1 - unit) * _inside(samples[:, :BOX])
        nearness = squash(-samples[:, -1:])
        slope_nearness = -DEPTH_SCALE * nearness * (1 - nearness) * _inside(samples[:, -1:])
        inside = _inside(logits)
        slope_presence = inside * presence * (1 - presence) / c.temperature
        grad_logit = torch.addcmul(grad_logit * inside, grad_presence, slope_presence)
        for network in networks:
            network.start_back(sizes)
        # of where, what and depth: for each wave the gradients so far, and the lever
        parts = [x.split_with_sizes(columns, dim=1) for x in (grad_mean, grad_raw, lever)]
        drawn = [_by_wave(latent, sizes) for latent in zip(*parts, strict=True)]
        grad_products = samples.new_empty(len(samples), context_weight.shape[0])
        # of each row the four vectors in its context; those of no cell are 0
        grad_contexts = samples.new_zeros(len(samples) + batch, context_weight.shape[1])
        no_grad_vector = samples.new_zeros(max(sizes), m + 1)
        if c.lateral:
            per_vector = grad_contexts.view(-1, m + 1)
            uses = _vector_rows(front.followers, batch) * len(NEIGHBOURS)
            uses = uses + torch.arange(len(NEIGHBOURS), device=uses.device)  # [R, 4]
            use_parts = uses.flatten().split_with_sizes([len(NEIGHBOURS) * size for size in sizes])
        rows = _by_wave(
            (grad_logit, slope_presence, slope_nearness, slope_placed, boxes, grad_boxes,
             grad_products, grad_contexts[: len(samples)]), sizes,
        )  # fmt: skip

        for wave in reversed(range(len(sizes))):
            to_logit, presence_slope, nearness_slope, placed_slope, *rest = rows[wave]
            box, to_box, grad_product, grad_context = rest
            grad_vector = no_grad_vector[: sizes[wave]]
            if c.lateral:
                used = per_vector.index_select(0, use_parts[wave])
                grad_vector = used.view(-1, len(NEIGHBOURS), m + 1).sum(1)
            grad_object, grad_present = grad_vector.split_with_sizes([m, 1], dim=1)

            last = pres.wave_grads[-1][wave]
            torch.addcmul(to_logit, grad_present, presence_slope, out=last)
            pres.back(wave)
            grad_passed, grad_own = pres.grad_inputs(wave).split_with_sizes([s, m], dim=1)
            grad_object, grad_near = (grad_object + grad_own).split_with_sizes([m - 1, 1], dim=1)

            grads = _grad_moments(grad_near * nearness_slope, *drawn[2][wave])
            torch.cat([*grads, grad_passed], dim=1, out=depth.wave_grads[-1][wave])
            depth.back(wave)
            grad_passed, grad_own = depth.grad_inputs(wave).split_with_sizes([s, m - 1], dim=1)
            grad_placed, grad_what = (grad_object + grad_own).split_with_sizes([BOX, c.what], dim=1)

            grads = _grad_moments(grad_what, *drawn[1][wave])
            torch.cat(grads, dim=1, out=encoder.wave_grads[-1][wave])
            encoder.back(wave)

            grad_glimpses = encoder.grad_inputs(wave)
            grad_box = to_box + box_gradient(grad_glimpses, images, box, c.object_size)
            grad_high, grad_low = grad_box.flip(1).split_with_sizes([2, 2], dim=1)  # y, x
            # corners are centre -+ size / 2
            grad_pixels = torch.cat([grad_low + grad_high, (grad_high - grad_low) / 2], dim=1)
            grad_placed = torch.addcmul(grad_placed, grad_pixels, to_pixels)
            grads = _grad_moments(grad_placed * placed_slope, *drawn[0][wave])
            torch.cat([*grads, grad_passed], dim=1, out=where.wave_grads[-1][wave])
            where.back(wave)

            firsts = [network.wave_grads[0][wave] for network in (where, depth, pres)]
            torch.cat(firsts, dim=1, out=grad_product)
            if c.lateral:
                torch.mm(grad_product, context_weight, out=grad_context)

        grad_edge = None
        if c.lateral:
            beyond = front.neighbours == len(front.neighbours)  # [K, 4]
            slots = grad_contexts[:-batch].view(-1, batch, len(NEIGHBOURS), m + 1).sum(1)
            grad_edge = (slots * beyond[:, :, None]).sum((0, 1))
        lateral = [grad for network in (where, depth, pres) for grad in network.grad_weights()]
        grad_weights = [*lateral, *_encoder_grads(encoder)]
        grad_context_weight = grad_products.t() @ contexts
        return None, None, grad_products, None, None, grad_edge, grad_context_weight, *grad_weights


def _by_wave(tensors: Sequence[Tensor], sizes: list[int]) -> list[tuple[Tensor, ...]]:
    """For each wave its rows of each tensor. Made in one go: slices in the loop cost much more."""
    return list(zip(*(tensor.split_with_sizes(sizes) for tensor in tensors), strict=True))


def _vector_rows(places: Tensor, batch: int) -> Tensor:
    """[K, 4] places -> [R, 4] rows of the same image."""
    images = torch.arange(batch, device=places.device)[:, None]
    return (places[:, None] * batch + images).flatten(0, 1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the cache outlives the mode
def _box_constants(
    config: SPAIRConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Of y, x, h, w: placed = scale * sigmoid + shift, and pixels for each unit of placed.

    Made once: a tensor from numbers in Python waits for the device.
    """
    low, span = config.centre_min, config.centre_max - config.centre_min
    rows = ([span, span, 1.0, 1.0], [low, low, 0.0, 0.0], [config.cell] * 2 + [config.anchor] * 2)
    scale, shift, to_pixels = (torch.tensor(row, device=device, dtype=dtype) for row in rows)
    return scale, shift, to_pixels


def _corners(images: Tensor, plan: _Plan, to_pixels: Tensor) -> Tensor:  # [R, 4]
    """Corner of each row's cell in pixels, y and x, then zeros."""
    columns = -(-images.shape[-1] // plan.config.cell)
    order = plan.front.order
    corners = torch.zeros(len(order), BOX, device=order.device, dtype=to_pixels.dtype)
    corners[:, 0], corners[:, 1] = order // columns, order % columns
    return (corners * to_pixels).repeat_interleave(plan.batch, dim=0)


def _grad_moments(
    grad: Tensor, grad_mean: Tensor, grad_raw: Tensor, lever: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of means and raws, now that `grad` has reached their samples too."""
    return grad_mean + grad, torch.addcmul(grad_raw, grad, lever)


def _encoder_grads(encoder: _Network) -> list[Tensor]:
    first, *rest = encoder.grad_weights()
    return [first, encoder.grads[0].sum(0), *rest]
