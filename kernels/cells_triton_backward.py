"""Triton twin of `SPAIR.encode_wave`, backward: all waves of a batch, in reverse, in one launch.

Gradients of all layers, before their activation, go to a record with the columns of the forward
pass; the weights' gradients are products over all its rows, which `spairkit.kernels.cells_layout`
takes afterwards. An object vector collects the gradients that its followers left in their contexts.
Nothing is added atomically, so bits do not vary. Letters are those of the forward pass.
"""

import triton
import triton.language as tl
from torch import Tensor

from spairkit.kernels import cells_layout as layout
from spairkit.kernels.cells_layout import Numbers, Sizes
from spairkit.kernels.cells_triton import (
    BOX,
    DEPTH,
    DEPTH_SCALE,
    LIMIT,
    PRES,
    STD_SCALE,
    WHAT,
    beyond,
    cells_tile,
    product,
    squash,
    step,
    tile_cells,
    wave_cells,
)
from spairkit.kernels.glimpse_triton import boxes_back
from spairkit.kernels.launch import on

_FIELDS = tl.constexpr(len(layout.Backward._fields))


@triton.jit
def _slope(logit):
    """The derivative of `squash`."""
    squashed = squash(logit)
    return tl.where(tl.abs(logit) <= LIMIT, squashed * (1.0 - squashed), 0.0)


@triton.jit
def _activation_slope(y, RELU: tl.constexpr):
    """From an activation's output: relu' = [y > 0], celu' = exp(min(x, 0)) = min(y, 0) + 1."""
    return tl.where(y > 0, 1.0, 0.0) if RELU else tl.where(y < 0, y + 1.0, 1.0)


@triton.jit
def _from_followers(grads_ptr, at, v, i, j, mask, rows, columns, vector, stride):
    """The gradient of number v of object vectors from the cells that read them."""
    total = 0.0
    for d in tl.static_range(4):
        reads = mask & (beyond(i, j, rows, columns, d, -1) == 0)
        slot = at - step(columns, d) * stride + d * vector + v
        total += tl.load(grads_ptr + slot, mask=reads, other=0.0)
    return total


@triton.jit
def _moments_back(grad, raw, normal, grad_latents_ptr, place, size, mask):
    """Gradients of mean and raw value; `grad` adds to that of the sample among the latents."""
    grad += tl.load(grad_latents_ptr + place + 2 * size, mask=mask, other=0.0)
    grad_std = tl.load(grad_latents_ptr + place + size, mask=mask, other=0.0) + grad * normal
    grad_mean = tl.load(grad_latents_ptr + place, mask=mask, other=0.0) + grad
    return grad_mean, grad_std * _slope(raw) * STD_SCALE


@triton.jit
def _presence_back(
    record_ptr, latents_ptr, grad_latents_ptr, grads_ptr, row, i, j, exists, at, pres_out, rows,
    columns, size, stride, temperature, LATERAL: tl.constexpr,
):  # fmt: skip
    """From vectors and latents to the output of pres."""
    place = row * (3 * size + 6) + 3 * size
    present = tl.load(latents_ptr + place + 1, mask=exists, other=0.0)
    grad = tl.load(grad_latents_ptr + place + 1, mask=exists, other=0.0)
    if LATERAL:
        grad += _from_followers(grads_ptr, at, size, i, j, exists, rows, columns, size + 1, stride)
    grad = grad * present * (1.0 - present) / temperature
    grad += tl.load(grad_latents_ptr + place, mask=exists, other=0.0)
    logit = tl.load(record_ptr + at + pres_out, mask=exists, other=0.0)
    grad = tl.where(tl.abs(logit) <= LIMIT, grad, 0.0)
    tl.store(grads_ptr + at + pres_out, grad, mask=exists)


@triton.jit
def _depth_back(
    record_ptr, normal_ptr, latents_ptr, grad_latents_ptr, grads_ptr, row, i, j, exists, at, out,
    passed, rows, columns, size, stride, LATERAL: tl.constexpr,
):  # fmt: skip
    """From vectors and the inputs of pres to the moments of depth."""
    grad = tl.load(grads_ptr + at + out + 1 + passed + size, mask=exists, other=0.0)
    if LATERAL:
        grad += _from_followers(
            grads_ptr, at, size - 1, i, j, exists, rows, columns, size + 1, stride
        )
    place = row * (3 * size + 6) + size - 1
    sample = tl.load(latents_ptr + place + 2 * size, mask=exists, other=0.0)
    raw = tl.load(record_ptr + at + out + 1, mask=exists, other=0.0)
    normal = tl.load(normal_ptr + row * size + size - 1, mask=exists, other=0.0)
    grad_mean, grad_raw = _moments_back(
        -grad * _slope(sample) * DEPTH_SCALE, raw, normal, grad_latents_ptr, place, size, exists
    )
    tl.store(grads_ptr + at + out, grad_mean, mask=exists)
    tl.store(grads_ptr + at + out + 1, grad_raw, mask=exists)


@triton.jit
def _what_back(
    record_ptr, normal_ptr, grad_latents_ptr, grads_ptr, row, i, j, exists, at, out, of_depth,
    of_pres, rows, columns, what, stride, LATERAL: tl.constexpr, WHEELS: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """From vectors and the inputs of depth and pres to the outputs of the encoder."""
    size = 5 + what
    begin = 0
    while begin < what:
        a = begin + tl.arange(0, N)[None, :]
        mask = exists[:, None] & (a < what)
        here = at[:, None] + a
        normal = tl.load(normal_ptr + (row * size + BOX)[:, None] + a, mask=mask, other=0.0)
        grad = tl.zeros_like(normal)
        if not WHEELS:
            grad += tl.load(grads_ptr + here + of_depth, mask=mask, other=0.0)
            grad += tl.load(grads_ptr + here + of_pres, mask=mask, other=0.0)
            if LATERAL:
                grad += _from_followers(
                    grads_ptr, at[:, None], BOX + a, i[:, None], j[:, None], mask, rows, columns,
                    size + 1, stride,
                )  # fmt: skip
        raw = tl.load(record_ptr + here + out + what, mask=mask, other=0.0)
        place = (row * (3 * size + 6) + BOX)[:, None] + a
        grad_mean, grad_raw = _moments_back(grad, raw, normal, grad_latents_ptr, place, size, mask)
        tl.store(grads_ptr + here + out, grad_mean, mask=mask)
        tl.store(grads_ptr + here + out + what, grad_raw, mask=mask)
        begin += N


@triton.jit
def _where_back(
    record_ptr, normal_ptr, latents_ptr, grad_latents_ptr, grads_ptr, grad_x1, grad_y1, grad_x2,
    grad_y2, row, i, j, exists, at, out, of_depth, of_pres, rows, columns, size, stride, span,
    cell, anchor, LATERAL: tl.constexpr,
):  # fmt: skip
    """From vectors, boxes and the inputs of depth and pres to the moments of where."""
    packed = 3 * size + 6
    for axis in tl.static_range(2):  # y, x
        boxes = grad_latents_ptr + row * packed + 3 * size + 3 - axis
        low = (grad_y1 if axis == 0 else grad_x1) + tl.load(boxes, mask=exists, other=0.0)
        high = (grad_y2 if axis == 0 else grad_x2) + tl.load(boxes + 2, mask=exists, other=0.0)
        for d in tl.static_range(2):  # the position, then the size
            c = axis + 2 * d
            grad = (low + high) * cell if d == 0 else 0.5 * (high - low) * anchor
            grad += tl.load(grads_ptr + at + of_depth + c, mask=exists, other=0.0)
            grad += tl.load(grads_ptr + at + of_pres + c, mask=exists, other=0.0)
            if LATERAL:
                grad += _from_followers(
                    grads_ptr, at, c, i, j, exists, rows, columns, size + 1, stride
                )
            place = row * packed + c
            sample = tl.load(latents_ptr + place + 2 * size, mask=exists, other=0.0)
            grad *= _slope(sample) * (span if d == 0 else 1.0)
            raw = tl.load(record_ptr + at + out + BOX + c, mask=exists, other=0.0)
            normal = tl.load(normal_ptr + row * size + c, mask=exists, other=0.0)
            grad_mean, grad_raw = _moments_back(
                grad, raw, normal, grad_latents_ptr, place, size, exists
            )
            tl.store(grads_ptr + at + out + c, grad_mean, mask=exists)
            tl.store(grads_ptr + at + out + BOX + c, grad_raw, mask=exists)


@triton.jit
def _edges_back(
    grads_ptr, grad_edges_ptr, num_rows, rows, columns, vector, stride, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """The gradient of the object beyond the rim, from all cells of the program."""
    v0 = 0
    while v0 < vector:
        v = v0 + tl.arange(0, N)
        total = tl.zeros([M, N], tl.float32)
        r0 = 0
        while r0 < num_rows:
            r = r0 + tl.arange(0, M)
            i, j = r % (rows * columns) // columns, r % columns
            slot = r * stride
            for d in tl.static_range(4):
                is_edge = (r < num_rows) & beyond(i, j, rows, columns, d, 1)
                place = slot[:, None] + (d * vector + v)[None, :]
                mask = is_edge[:, None] & (v < vector)[None, :]
                total += tl.load(grads_ptr + place, mask=mask, other=0.0)
            r0 += M
        place = grad_edges_ptr + tl.program_id(0) * vector + v
        tl.store(place, tl.sum(total, 0), mask=v < vector)
        v0 += N


@triton.jit
def _cells_backward_kernel(
    layers_ptr,  # [L, 7] int32, `Backward`
    weights_ptr,  # packed
    images_ptr,  # [B, 3, H, W]
    normal_ptr,  # [R, M]
    record_ptr,  # [R, width]
    latents_ptr,  # [R, 3 M + 6]
    grad_latents_ptr,  # [R, 3 M + 6]
    grads_ptr,  # [R, width] to be filled, with the columns of the record
    grad_edges_ptr,  # [programs, V] to be filled
    num_images,
    images_per_program,
    num_layers,
    rows,  # of the grid
    columns,
    height,
    width,
    side,  # of a glimpse
    passed,
    what,
    stride,  # of the record; then its columns
    where_out,
    depth_out,
    glimpse,
    what_out,
    pres_out,
    span,
    cell,  # pixels
    anchor,
    temperature,
    LATERAL: tl.constexpr,
    WHEELS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,  # rows of a tile
    N: tl.constexpr,  # columns of a tile
    K: tl.constexpr,  # terms of a product that are loaded together
    C: tl.constexpr,  # numbers of a row that are computed together outside products
):
    num_cells = rows * columns
    start = tl.program_id(0) * images_per_program
    n = tl.minimum(images_per_program, num_images - start)
    size = 5 + what  # M
    packed = 3 * size + 6
    # rows of the program count from 0, so that their places fit in 32 bits
    begin = start.to(tl.int64) * num_cells
    images_ptr += start.to(tl.int64) * (3 * height * width)
    normal_ptr += begin * size
    record_ptr += begin * stride
    grads_ptr += begin * stride
    latents_ptr += begin * packed
    grad_latents_ptr += begin * packed
    t = columns + 2 * (rows - 1) - 1
    while t >= 0:
        top, num_of_wave = wave_cells(t, rows, columns)
        num_rows = num_of_wave * n
        layer = 0
        while layer < num_layers:
            entry = layers_ptr + layer * _FIELDS
            left, inputs = tl.load(entry), tl.load(entry + 1)
            weight = tl.multiple_of(tl.load(entry + 2), 16)
            out, outputs = tl.load(entry + 3), tl.load(entry + 4)
            is_activated, before = tl.load(entry + 5), tl.load(entry + 6)
            r0 = tl.where(before > 0, 0, num_rows)
            while r0 < num_rows:
                r = r0 + tl.arange(0, M)
                exists = r < num_rows
                image, k, i, j = tile_cells(r, n, t, top, columns)
                row = image * num_cells + k
                at = row * stride
                of_depth, of_pres = where_out + 2 * BOX + passed, depth_out + 2 + passed
                if before == PRES:
                    _presence_back(
                        record_ptr, latents_ptr, grad_latents_ptr, grads_ptr, row, i, j, exists,
                        at, pres_out, rows, columns, size, stride, temperature, LATERAL,
                    )  # fmt: skip
                elif before == DEPTH:
                    _depth_back(
                        record_ptr, normal_ptr, latents_ptr, grad_latents_ptr, grads_ptr, row, i,
                        j, exists, at, depth_out, passed, rows, columns, size, stride, LATERAL,
                    )  # fmt: skip
                elif before == WHAT:
                    _what_back(
                        record_ptr, normal_ptr, grad_latents_ptr, grads_ptr, row, i, j, exists, at,
                        what_out, of_depth + BOX, of_pres + BOX, rows, columns, what, stride,
                        LATERAL, WHEELS, C,
                    )  # fmt: skip
                else:
                    grad_x1, grad_y1, grad_x2, grad_y2 = boxes_back(
                        images_ptr, latents_ptr, grads_ptr, image,
                        row * packed + 3 * size + 2, at + glimpse, exists, side, height,
                        width, M, C,
                    )  # fmt: skip
                    _where_back(
                        record_ptr, normal_ptr, latents_ptr, grad_latents_ptr, grads_ptr, grad_x1,
                        grad_y1, grad_x2, grad_y2, row, i, j, exists, at, where_out, of_depth,
                        of_pres, rows, columns, size, stride, span, cell, anchor, LATERAL,
                    )  # fmt: skip
                r0 += M
            tl.debug_barrier()
            r0 = 0
            while r0 < num_rows:
                r = r0 + tl.arange(0, M)
                exists = r < num_rows
                image, k, _i, _j = tile_cells(r, n, t, top, columns)
                at = (image * num_cells + k) * stride
                o0 = 0
                while o0 < outputs:
                    o = o0 + tl.arange(0, N)
                    acc = product(
                        grads_ptr + left, at, exists, inputs, weights_ptr + weight, outputs, o,
                        M, N, K, PRECISION,
                    )  # fmt: skip
                    mask = exists[:, None] & (o < outputs)[None, :]
                    place = (at + out)[:, None] + o[None, :]
                    if is_activated > 0:
                        y = tl.load(record_ptr + place, mask=mask, other=0.0)
                        acc *= _activation_slope(y, RELU)
                    tl.store(grads_ptr + place, acc, mask=mask)
                    o0 += N
                r0 += M
            tl.debug_barrier()
            layer += 1
        t -= 1
    if LATERAL and not WHEELS:
        _edges_back(
            grads_ptr, grad_edges_ptr, n * num_cells, rows, columns, size + 1, stride, M, C
        )  # fmt: skip


def cells_backward_triton(
    layers: Tensor, sizes: Sizes, numbers: Numbers, precision: str, packed: Tensor,
    images: Tensor, normal: Tensor, record: Tensor, latents: Tensor, grad_latents: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of all layers [R, width], and of the edge for each program [programs, V]."""
    batch, _, size = normal.shape
    at = layout.columns(sizes)
    tile = cells_tile(batch, numbers.rows, numbers.columns, precision)
    programs = triton.cdiv(batch, tile.images)
    grads = record.new_empty(record.shape)
    grad_edges = record.new_empty(programs, size + 1)
    with on(images.device):
        _cells_backward_kernel[(programs,)](
            layers, packed, images, normal, record, latents, grad_latents, grads, grad_edges,
            batch, tile.images, len(layers), numbers.rows, numbers.columns, *images.shape[2:],
            numbers.side, sizes.passed, sizes.what, at.width, at.where[-1], at.depth[-1],
            at.glimpse, at.encoder[-1], at.pres[-1], numbers.span, numbers.cell, numbers.anchor,
            numbers.temperature, LATERAL=sizes.context > 0, WHEELS=numbers.training_wheels,
            RELU=numbers.relu, PRECISION=precision, **tile.constants, **tile.options,
        )  # fmt: skip
    return grads, grad_edges
