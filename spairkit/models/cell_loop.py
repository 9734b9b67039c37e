"""The loop over the cells of a batch in training, with a hand-written gradient.

The mathematics is that of `SPAIR._encode_wave`, the readable version, which inference uses. There a
wave takes about 90 small operations, each recorded by autograd, and each layer one more product for
the gradient of its weights. Here autograd records nothing, and the products with features, the
factors of derivatives and the gradients of weights are computed once for all cells. On the CPU in
float32 `spairkit.kernels.cells_op` is one compiled call each way, unless the encoder has no hidden
layer or Numba is missing.

Tensors are matrices [R, ...] of R = K B rows, cells in wave order, each with all images: row
place * B + image. h hidden units, S features passed on, A numbers of what, M = 4 + A + 1 of where,
what and depth, V = M + 1 of an object vector (box, what, nearness, presence). `split_with_sizes`
is `split` without its checks in Python, which take a tenth of the loop.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spairkit.backends import runs_compiled
from spairkit.config import SPAIRConfig
from spairkit.kernels.constants import BOX, DEPTH_SCALE, LOGIT_LIMIT, STD_SCALE
from spairkit.models import cell_steps
from spairkit.models.cell_steps import by_wave, wave_by_wave
from spairkit.models.densities import squash
from spairkit.models.glimpses import box_gradient, glimpse_rows
from spairkit.models.latents import Latents, Noise, unpack
from spairkit.models.networks import LateralNetwork, shared_weights
from spairkit.models.wavefront import NEIGHBOURS, Wavefront

if TYPE_CHECKING:
    from spairkit.kernels.cells_cpu import Grid, Numbers


@dataclass(frozen=True)
class _Plan:
    """Arguments of a pass that are not tensors with gradients."""

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
    products: Tensor,  # [B, K, 3 h] first layers applied to features, cells in raster order
    noise: Noise,
    edge: Tensor | None,  # [V] the object beyond the rim; None without lateral connections
    networks: tuple[LateralNetwork, LateralNetwork, LateralNetwork],  # where, depth, pres
    encoder: nn.Sequential, config: SPAIRConfig, front: Wavefront, training_wheels: bool,
) -> Latents:  # fmt: skip
    """Relaxed latents in raster order, with gradients to everything except images and noise.

    With training wheels only the weights of `encoder` get gradients, through what.

    Raises:
        RuntimeError: a second derivative was requested.
    """
    lines = [module for module in encoder if isinstance(module, nn.Linear)]
    # the context has no columns without lateral connections, and where has no inputs of its own
    context_weight = shared_weights(networks, config.features, networks[0].shared)
    weights = [context_weight]
    for network in networks:
        weights += [network.first.weight[:, network.shared :]]
        for line in (network.second, network.last):
            weights += [line.weight, line.bias]
    if training_wheels:
        # autograd has to know too that they get no gradient
        weights = [weight.detach() for weight in weights]
        products, edge = products.detach(), None if edge is None else edge.detach()
    for line in lines:
        weights += [line.weight, line.bias]
    products = products.to(images.dtype)  # from bfloat16, under autocast
    if runs_compiled(images) and len(lines) > 1:
        from spairkit.kernels.cells_op import encode_cells_cpu

        grid, numbers = _grid(front), _numbers(config, images, training_wheels)
        given = (noise.normal, noise.logistic, edge, weights)
        return unpack(encode_cells_cpu(grid, numbers, images, products, *given), config.what)
    plan = _Plan(config, front, training_wheels, images.shape[0])
    normal = noise.normal.transpose(0, 1)[front.order].flatten(0, 1)
    jitter = noise.logistic.T[front.order].reshape(-1, 1) / config.temperature
    with torch.autocast(images.device.type, enabled=False):
        rows = products.transpose(0, 1)[front.order].flatten(0, 1)
        record: Tensor = _CellLoop.apply(  # type: ignore[no-untyped-call]
            plan, images.contiguous(), rows, normal, jitter, edge, *weights
        )
    record = record.unflatten(0, (-1, images.shape[0]))[front.places].transpose(0, 1)
    return unpack(record, config.what)


@cache
def _grid(front: Wavefront) -> "Grid":
    """The schedule as arrays for the compiled loop."""
    from spairkit.kernels.cells_cpu import Grid

    starts = np.array([wave.start for wave in front.waves] + [len(front.order)], np.int64)
    order, neighbours, followers = front.order, front.neighbours, front.followers
    tables = order.numpy(), neighbours.numpy(), followers.numpy()
    return Grid(starts, *tables, largest=int(np.diff(starts).max()))


def _numbers(config: SPAIRConfig, images: Tensor, training_wheels: bool) -> "Numbers":
    """The settings for the compiled loop."""
    from spairkit.kernels.cells_cpu import Numbers

    return Numbers(
        constants=_box_constants(config, images.device, images.dtype).numpy(),
        columns=-(-images.shape[-1] // config.cell),
        size=config.object_size,
        temperature=np.float32(config.temperature),
        relu=config.activation == "relu",
        training_wheels=training_wheels,
    )


class _Network:
    """Linear layers with an activation between them, for all rows, wave by wave.

    The caller fills a wave's `inputs[0]`, and in the backward pass its `grads[-1]`. The first layer
    adds a term from the caller: a bias, or the product with inputs that networks share.
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
        """Allocates the forward pass, for waves of `sizes` rows."""
        rows = sum(sizes)
        self.inputs = [weight.new_empty(rows, weight.shape[1]) for weight in self.weights]
        self.outputs = self.weights[-1].new_empty(rows, self.weights[-1].shape[0])
        self.wave_inputs = [x.split_with_sizes(sizes) for x in (*self.inputs, self.outputs)]

    def forward(self, wave: int, added: Tensor) -> None:
        """Fills a wave's inputs of all layers after the first, and its outputs."""
        inputs = [waves[wave] for waves in self.wave_inputs]
        torch.addmm(added, inputs[0], self.transposed[0], out=inputs[1])
        for layer, bias in enumerate(self.biases, start=1):
            self.activate(inputs[layer])
            torch.addmm(bias, inputs[layer], self.transposed[layer], out=inputs[layer + 1])

    def start_back(self, sizes: list[int]) -> None:
        """Allocates the backward pass, for waves of `sizes` rows."""
        rows = sum(sizes)
        self.grads = [weight.new_empty(rows, weight.shape[0]) for weight in self.weights]
        # from the output y: relu' = [y > 0], celu' = exp(min(x, 0)) = min(y, 0) + 1
        slopes = [(y > 0).to(y.dtype) if self.relu else y.clamp(max=0) + 1 for y in self.inputs[1:]]
        self.wave_grads = [grad.split_with_sizes(sizes) for grad in self.grads]
        self.wave_slopes = [slope.split_with_sizes(sizes) for slope in slopes]

    def back(self, wave: int, grad_inputs: Tensor | None = None) -> None:
        """Fills a wave's gradients of all layers before the last, and `grad_inputs` if given."""
        for layer in range(len(self.weights) - 1, 0, -1):
            grad = self.wave_grads[layer - 1][wave]
            torch.mm(self.wave_grads[layer][wave], self.weights[layer], out=grad)
            grad.mul_(self.wave_slopes[layer - 1][wave])
        if grad_inputs is not None:
            torch.mm(self.wave_grads[0][wave], self.weights[0], out=grad_inputs)

    def grad_weights(self) -> list[Tensor]:
        """Gradients of weight 0, weight 1, bias 1, ...: one product a layer, over all rows."""
        products = [grad.t() @ x for grad, x in zip(self.grads, self.inputs, strict=True)]
        grads = products[:1]
        for product, grad in zip(products[1:], self.grads[1:], strict=True):
            grads += [product, grad.sum(0)]
        return grads


def _networks(activation: str, weights: tuple[Tensor, ...]) -> list[_Network]:
    """where, depth, pres and encoder, from weights in the order of `encode_cells`."""
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
        num_rows, m = len(products), BOX + c.what + 1
        new = products.new_empty
        networks = where, depth, pres, encoder = _networks(c.activation, weights)
        for network in networks:
            network.start(sizes)
        constants = _box_constants(c, products.device, products.dtype)
        samples, boxes, presence = new(num_rows, m), new(num_rows, BOX), new(num_rows, 1)
        vectors = new(num_rows + plan.batch, m + 1)  # the edge after all cells
        contexts = new(num_rows, context_weight.shape[1])
        step = partial(wave_by_wave, sizes)
        depth_own, presence_own = depth.inputs[0], pres.inputs[0]
        corners = _corners(images, plan, constants[2])
        draw_where = step(
            cell_steps.draw_where, where.outputs, normal, corners, samples, boxes, depth_own,
            fixed=(constants,),
        )  # fmt: skip
        draw_what = step(cell_steps.draw_what, encoder.outputs, normal, samples, depth_own)
        draw_depth = step(
            cell_steps.draw_depth, depth.outputs, normal, depth_own, samples, presence_own
        )
        draw_presence = step(
            cell_steps.draw_presence, pres.outputs, jitter, presence_own, presence,
            vectors[:num_rows], fixed=(c.temperature,),
        )  # fmt: skip
        first_bias = weights[16]  # of the encoder
        if edge is not None:
            vectors[num_rows:] = edge
            near = _vector_rows(plan.front.neighbours, plan.batch).flatten()
            slots = contexts.view(-1, m + 1)
            reads = by_wave((near, slots), [len(NEIGHBOURS) * size for size in sizes])
            context_weight_t = context_weight.t()
        added = products if edge is None else new(products.shape)
        added_parts = by_wave(added.chunk(3, dim=1), sizes)
        rows = by_wave((products, contexts, added, boxes), sizes)

        for wave, (product, context, total, box) in enumerate(rows):
            if edge is not None:
                near_part, slot = reads[wave]
                torch.index_select(vectors, 0, near_part, out=slot)
                torch.addmm(product, context, context_weight_t, out=total)
            to_where, to_depth, to_pres = added_parts[wave]
            where.forward(wave, to_where)
            draw_where(wave)
            glimpse_rows(images, box, c.object_size, encoder.wave_inputs[0][wave])
            encoder.forward(wave, first_bias)
            draw_what(wave)
            depth.forward(wave, to_depth)
            draw_depth(wave)
            pres.forward(wave, to_pres)
            draw_presence(wave)

        moments = [
            network.outputs.split_with_sizes([n, n, network.outputs.shape[1] - 2 * n], dim=1)
            for network, n in zip((where, encoder, depth), (BOX, c.what, 1), strict=True)
        ]
        means = torch.cat([parts[0] for parts in moments], dim=1)
        raws = torch.cat([parts[1] for parts in moments], dim=1)
        logits = pres.outputs
        ctx.plan = plan
        ctx.save_for_backward(
            images, normal, context_weight, *weights, samples, raws, logits, presence, boxes,
            contexts, *(x for network in networks for x in network.inputs),
        )  # fmt: skip
        clipped = logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        return torch.cat(
            [means, STD_SCALE * squash(raws), samples, clipped, presence, boxes], dim=1
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_record: Tensor) -> tuple[Tensor | None, ...]:
        plan, grad_record = ctx.plan, grad_record.contiguous()
        c, front, sizes, batch = plan.config, plan.front, plan.sizes, plan.batch
        num_weights = 15 + 2 * (len(c.encoder_hidden) + 1)
        m = BOX + c.what + 1
        images, normal, context_weight, *saved = ctx.saved_tensors
        weights, saved = tuple(saved[:num_weights]), saved[num_weights:]
        samples, raws, logits, presence, boxes, contexts, *saved = saved
        networks = where, depth, pres, encoder = _networks(c.activation, weights)
        for network in networks:
            network.inputs = [saved.pop(0) for _ in network.weights]
        grad_mean, grad_std, grad_sample, grad_logit, grad_presence, grad_boxes = (
            grad_record.split_with_sizes([m, m, m, 1, 1, BOX], dim=1)
        )

        # sample = mean + std noise and std = 2 sigmoid(raw): a gradient g of a sample adds g to
        # that of its mean and g * lever to that of its raw
        half = squash(raws)
        slope_std = STD_SCALE * half * (1 - half) * _inside(raws)
        lever = normal * slope_std
        grad_mean = grad_mean + grad_sample
        grad_raw = torch.addcmul(grad_std * slope_std, grad_sample, lever)
        if plan.training_wheels:
            encoder.start_back([len(samples)])
            what = slice(BOX, -1)
            torch.cat([grad_mean[:, what], grad_raw[:, what]], dim=1, out=encoder.grads[-1])
            encoder.back(0)
            return (*(None,) * 7, *(None,) * 15, *_encoder_grads(encoder))

        constants = _box_constants(c, samples.device, samples.dtype)
        unit = squash(samples[:, :BOX])
        slope_placed = constants[0] * unit * (1 - unit) * _inside(samples[:, :BOX])
        nearness = squash(-samples[:, -1:])
        slope_nearness = -DEPTH_SCALE * nearness * (1 - nearness) * _inside(samples[:, -1:])
        inside = _inside(logits)
        slope_presence = inside * presence * (1 - presence) / c.temperature
        grad_logit = torch.addcmul(grad_logit * inside, grad_presence, slope_presence)
        for network in networks:
            network.start_back(sizes)
        new, zeros = samples.new_empty, samples.new_zeros
        grad_products = new(len(samples), context_weight.shape[0])
        # for each row the four vectors in its context; the last B rows, of no cell, stay 0
        grad_contexts = zeros(len(samples) + batch, context_weight.shape[1])
        grad_vectors = (new if c.lateral else zeros)(len(samples), m + 1)
        grad_depth_own, grad_presence_own = new(depth.inputs[0].shape), new(pres.inputs[0].shape)
        to_boxes = new(len(samples), BOX)
        so_far = grad_mean, grad_raw, lever
        step = partial(wave_by_wave, sizes)
        if c.lateral:
            uses = _vector_rows(front.followers, batch) * len(NEIGHBOURS)
            uses = uses + torch.arange(len(NEIGHBOURS), device=uses.device)  # [R, 4]
            vector_back = step(
                cell_steps.vector_back, uses, grad_vectors, fixed=(grad_contexts.view(-1, m + 1),)
            )
        depth_back = step(
            cell_steps.depth_back, grad_presence_own, slope_nearness, *so_far, grad_vectors,
            depth.grads[-1],
        )  # fmt: skip
        what_back = step(
            cell_steps.what_back, grad_depth_own, *so_far, grad_vectors, encoder.grads[-1]
        )
        where_back = step(
            cell_steps.where_back, grad_vectors, grad_depth_own, to_boxes, slope_placed, *so_far,
            where.grads[-1], fixed=(constants,),
        )  # fmt: skip
        rows = by_wave(
            (grad_logit, slope_presence, grad_vectors[:, -1:], grad_presence_own, grad_depth_own,
             boxes, grad_boxes, to_boxes, grad_products, grad_contexts[: len(samples)]), sizes,
        )  # fmt: skip

        for wave in reversed(range(len(sizes))):
            to_logit, presence_slope, grad_present, to_pres, to_depth, *rest = rows[wave]
            box, grad_box, to_box, grad_product, grad_context = rest
            if c.lateral:
                vector_back(wave)
            torch.addcmul(to_logit, grad_present, presence_slope, out=pres.wave_grads[-1][wave])
            pres.back(wave, to_pres)
            depth_back(wave)
            depth.back(wave, to_depth)
            what_back(wave)
            encoder.back(wave)
            grad_glimpses = encoder.wave_grads[0][wave] @ encoder.weights[0]
            torch.add(grad_box, box_gradient(grad_glimpses, images, box, c.object_size), out=to_box)
            where_back(wave)
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


def _vector_rows(places: Tensor, batch: int) -> Tensor:
    """[K, 4] places -> [R, 4] rows of the same image."""
    images = torch.arange(batch, device=places.device)[:, None]
    return (places[:, None] * batch + images).flatten(0, 1)


@cache  # without limit: a recorded CUDA graph reads from their addresses
@torch.inference_mode(False)  # the cache outlives the mode
def _box_constants(
    config: SPAIRConfig, device: torch.device, dtype: torch.dtype
) -> Tensor:  # [3, 4]
    """Scale and shift of placed = scale * sigmoid + shift, and pixels for each unit of placed.

    For y, x, h, w. Cached, because a tensor from numbers in Python waits for the device.
    """
    low, span = config.centre_min, config.centre_max - config.centre_min
    rows = ([span, span, 1.0, 1.0], [low, low, 0.0, 0.0], [config.cell] * 2 + [config.anchor] * 2)
    return torch.tensor(rows, device=device, dtype=dtype)


def _corners(images: Tensor, plan: _Plan, to_pixels: Tensor) -> Tensor:  # [R, 4]
    """Corner y, x of each row's cell in pixels, then two zeros."""
    columns = -(-images.shape[-1] // plan.config.cell)
    order = plan.front.order
    corners = torch.zeros(len(order), BOX, device=order.device, dtype=to_pixels.dtype)
    corners[:, 0], corners[:, 1] = order // columns, order % columns
    return (corners * to_pixels).repeat_interleave(plan.batch, dim=0)


def _encoder_grads(encoder: _Network) -> list[Tensor]:
    first, *rest = encoder.grad_weights()
    return [first, encoder.grads[0].sum(0), *rest]
