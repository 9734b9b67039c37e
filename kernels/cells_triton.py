"""Triton twin of `SPAIR.encode_wave`, forward: all waves of a batch in one launch.

The cells of an image depend on no other image, so one program owns a few images and walks the waves
of their cells; programs share nothing but the weights. Rows of a tile are the cells of a wave, each
with its images. Every layer is written to the record of `spairkit.kernels.cells_layout`, which the
gradients need in any case, and read back by the same program after a barrier: a tile in registers
cannot be cut into the pieces that the next product takes.

Letters in shapes: see `spairkit.kernels.cells_layout`; M = 4 + A + 1 numbers of where, what, depth,
V = M + 1 of an object vector. NaN propagates.
"""

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spairkit.kernels import cells_layout as layout
from spairkit.kernels import constants
from spairkit.kernels.cells_layout import Numbers, Sizes, Tables
from spairkit.kernels.glimpse_triton import cut_glimpses
from spairkit.kernels.launch import on

BOX = tl.constexpr(constants.BOX)
LIMIT = tl.constexpr(constants.LOGIT_LIMIT)
STD_SCALE = tl.constexpr(constants.STD_SCALE)
DEPTH_SCALE = tl.constexpr(constants.DEPTH_SCALE)
_FIELDS = tl.constexpr(len(layout.Forward._fields))
_PACKING_FIELDS = tl.constexpr(len(layout.Packing._fields))
PACK_BLOCK, PACK_PROGRAMS, PACK_WARPS = 32, 16, 4  # programs of each weight
_BIAS, _ADDED = tl.constexpr(layout.BIAS), tl.constexpr(layout.ADDED)
WHERE, WHAT = tl.constexpr(layout.WHERE), tl.constexpr(layout.WHAT)
DEPTH, PRES = tl.constexpr(layout.DEPTH), tl.constexpr(layout.PRES)


@triton.jit
def clip(logit):
    """The logit, clipped to [-10, 10]."""
    return tl.where(logit > LIMIT, LIMIT, tl.where(logit < -LIMIT, -LIMIT, logit))


@triton.jit
def squash(logit):
    """1 / (1 + e^-logit) of the clipped logit."""
    return 1.0 / (1.0 + tl.exp(-clip(logit)))


@triton.jit
def wave_cells(t, rows, columns):
    """Row of the first cell of wave t, and the number of its cells: 2 row + column = t."""
    top = (tl.maximum(t - columns + 1, 0) + 1) // 2
    return top, tl.minimum(rows - 1, t // 2) - top + 1


@triton.jit
def tile_cells(r, n, t, top, columns):
    """Image of the program, index of the cell, and its row and column, of rows r of a wave."""
    i = top + r // n
    j = t - 2 * i
    return r % n, i * columns + j, i, j


@triton.jit
def step(columns, D: tl.constexpr):
    """Cells from a cell to its neighbour D: top left, top, top right, left."""
    return D - 1 - columns if D < 3 else -1


@triton.jit
def beyond(i, j, rows, columns, D: tl.constexpr, SIGN: tl.constexpr):
    """Whether neighbour D of cell (i, j), or the follower if SIGN is -1, is outside the grid."""
    y = i - SIGN if D < 3 else i
    x = j + SIGN * (D - 1) if D < 3 else j - SIGN
    return (y < 0) | (y >= rows) | (x < 0) | (x >= columns)


@triton.jit
def product(
    left_ptr, rows, exists, inputs, weight_ptr, outputs, columns, M: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[M, N]: sum over `inputs` of left[rows, :] times the packed weights of the output `columns`.

    Weights in bfloat16 round `left` to it too; the sum is float32. The loop copies the next pieces
    to shared memory meanwhile; the weights' rows begin at multiples of 16, so that 16 bytes are
    copied at once.
    """
    acc = tl.zeros([M, N], tl.float32)
    stride = (outputs + 15) // 16 * 16
    for k in tl.range(0, inputs, K, num_stages=4):
        ks = k + tl.arange(0, K)
        inside = ks < inputs
        mask = exists[:, None] & inside[None, :]
        left = tl.load(left_ptr + rows[:, None] + ks[None, :], mask=mask, other=0.0)
        mask = inside[:, None] & (columns < stride)[None, :]
        place = weight_ptr + (ks[:, None] * stride + columns[None, :])
        weight = tl.load(place, mask=mask, other=0.0)
        # ignored for bfloat16
        exactness: tl.constexpr = "tf32" if PRECISION == "tf32" else "ieee"
        acc = tl.dot(left.to(weight.dtype), weight, acc, input_precision=exactness)
    return acc


@triton.jit
def activation(x, RELU: tl.constexpr):
    """relu or celu."""
    return tl.where(x < 0, 0.0, x) if RELU else tl.where(x > 0, x, tl.exp(x) - 1.0)


@triton.jit
def _draw(mean, raw, normal, latents_ptr, place, size, mask):
    """A sample; mean, standard deviation and sample go to the latents."""
    std = squash(raw) * STD_SCALE
    sample = mean + std * normal
    tl.store(latents_ptr + place, mean, mask=mask)
    tl.store(latents_ptr + place + size, std, mask=mask)
    tl.store(latents_ptr + place + 2 * size, sample, mask=mask)
    return sample


@triton.jit
def _fill_edges(
    edge_ptr, record_ptr, num_rows, rows, columns, vector, stride, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """The learned object beyond the rim, wherever it is read."""
    r0 = 0
    while r0 < num_rows:
        r = r0 + tl.arange(0, M)
        i, j = r % (rows * columns) // columns, r % columns
        slot = record_ptr + r * stride
        for d in tl.static_range(4):
            is_edge = (r < num_rows) & beyond(i, j, rows, columns, d, 1)
            v0 = 0
            while v0 < vector:
                v = v0 + tl.arange(0, N)
                edge = tl.load(edge_ptr + v, mask=v < vector, other=0.0)
                place = slot[:, None] + (d * vector + v)[None, :]
                mask = is_edge[:, None] & (v < vector)[None, :]
                tl.store(place, tl.broadcast_to(edge[None, :], [M, N]), mask=mask)
                v0 += N
        r0 += M


@triton.jit
def _draw_where(
    record_ptr, normal_ptr, latents_ptr, row, i, j, exists, out, passed, size, low, span, cell,
    anchor,
):  # fmt: skip
    """where and its box; depth's inputs get it in units of cells and anchors."""
    packed = 3 * size + 6
    for axis in tl.static_range(2):  # y, x
        extent = 0.0
        for d in tl.static_range(2):  # the size, then the position
            c = axis + 2 - 2 * d
            mean = tl.load(record_ptr + out + c, mask=exists, other=0.0)
            raw = tl.load(record_ptr + out + BOX + c, mask=exists, other=0.0)
            normal = tl.load(normal_ptr + row * size + c, mask=exists, other=0.0)
            sample = _draw(mean, raw, normal, latents_ptr, row * packed + c, size, exists)
            placed = squash(sample)
            if d == 1:
                placed = low + span * placed
            tl.store(record_ptr + out + 2 * BOX + passed + c, placed, mask=exists)
            if d == 0:
                extent = placed * anchor
            else:
                corner = i if axis == 0 else j
                begin = placed * cell + corner * cell - 0.5 * extent
                box = latents_ptr + row * packed + 3 * size + 3 - axis
                tl.store(box, begin, mask=exists)
                tl.store(box + 2, begin + extent, mask=exists)


@triton.jit
def _draw_what(
    record_ptr, normal_ptr, latents_ptr, row, exists, out, of_depth, of_pres, what,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """what, to the inputs of depth and of pres, and the box to those of pres."""
    size = 5 + what
    packed = 3 * size + 6
    b = tl.arange(0, BOX)
    box = tl.load(record_ptr + (of_depth - BOX)[:, None] + b[None, :], mask=exists[:, None])
    tl.store(record_ptr + (of_pres - BOX)[:, None] + b[None, :], box, mask=exists[:, None])
    begin = 0
    while begin < what:
        a = begin + tl.arange(0, N)
        mask = exists[:, None] & (a < what)[None, :]
        place = out[:, None] + a[None, :]
        mean = tl.load(record_ptr + place, mask=mask, other=0.0)
        raw = tl.load(record_ptr + place + what, mask=mask, other=0.0)
        normal = normal_ptr + (row * size + BOX)[:, None] + a[None, :]
        normal = tl.load(normal, mask=mask, other=0.0)
        place = (row * packed + BOX)[:, None] + a[None, :]
        sample = _draw(mean, raw, normal, latents_ptr, place, size, mask)
        tl.store(record_ptr + of_depth[:, None] + a[None, :], sample, mask=mask)
        tl.store(record_ptr + of_pres[:, None] + a[None, :], sample, mask=mask)
        begin += N


@triton.jit
def _draw_depth(record_ptr, normal_ptr, latents_ptr, row, exists, out, passed, size):
    """depth, and nearness to the inputs of pres."""
    mean = tl.load(record_ptr + out, mask=exists, other=0.0)
    raw = tl.load(record_ptr + out + 1, mask=exists, other=0.0)
    normal = tl.load(normal_ptr + row * size + size - 1, mask=exists, other=0.0)
    place = row * (3 * size + 6) + size - 1
    sample = _draw(mean, raw, normal, latents_ptr, place, size, exists)
    near = squash(-sample) * DEPTH_SCALE
    tl.store(record_ptr + out + 1 + passed + size, near, mask=exists)


@triton.jit
def _draw_presence(
    record_ptr, jitter_ptr, latents_ptr, row, i, j, exists, at, vectors, pres_out, rows, columns,
    size, stride, temperature, LATERAL: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """pres; and the object vector, written to the contexts of all cells that will read it."""
    logit = clip(tl.load(record_ptr + at + pres_out, mask=exists, other=0.0))
    jitter = tl.load(jitter_ptr + row, mask=exists, other=0.0)
    present = 1.0 / (1.0 + tl.exp(-(logit + jitter) / temperature))
    latent = latents_ptr + row * (3 * size + 6) + 3 * size
    tl.store(latent, logit, mask=exists)
    tl.store(latent + 1, present, mask=exists)
    if LATERAL:
        vector = size + 1
        begin = 0
        while begin < vector:
            v = begin + tl.arange(0, N)
            placed = exists[:, None] & (v < size)[None, :]
            value = record_ptr + (at + vectors)[:, None] + v[None, :]
            value = tl.load(value, mask=placed, other=0.0)
            value = tl.where((v < size)[None, :], value, present[:, None])
            for d in tl.static_range(4):
                reads = exists & (beyond(i, j, rows, columns, d, -1) == 0)
                # the follower's row, and its context of the direction
                slot = at - step(columns, d) * stride + d * vector
                place = record_ptr + slot[:, None] + v[None, :]
                tl.store(place, value, mask=reads[:, None] & (v < vector)[None, :])
            begin += N


@triton.jit
def _pack_kernel(
    packing_ptr,  # [L, 5] int32, `Packing`
    weights_ptr,  # all weights, flat; each [outputs, inputs]
    forward_ptr,  # to be filled: each [inputs, outputs], rows padded with zeros
    backward_ptr,  # to be filled: each [outputs, inputs], rows padded with zeros
    BLOCK: tl.constexpr,
):
    entry = packing_ptr + tl.program_id(0) * _PACKING_FIELDS
    weight, outputs, inputs = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    forward, backward = tl.load(entry + 3), tl.load(entry + 4)
    outputs_padded, inputs_padded = (outputs + 15) // 16 * 16, (inputs + 15) // 16 * 16
    across = (inputs_padded + BLOCK - 1) // BLOCK
    tile = tl.program_id(1)
    while tile < (outputs_padded + BLOCK - 1) // BLOCK * across:
        o = (tile // across * BLOCK + tl.arange(0, BLOCK))[:, None]
        i = (tile % across * BLOCK + tl.arange(0, BLOCK))[None, :]
        exists = (o < outputs) & (i < inputs)
        values = tl.load(weights_ptr + weight + o * inputs + i, mask=exists, other=0.0)
        mask = (o < outputs) & (i < inputs_padded)
        tl.store(backward_ptr + backward + o * inputs_padded + i, values, mask=mask)
        mask = (o < outputs_padded) & (i < inputs)
        place = forward_ptr + forward + tl.trans(i * outputs_padded + o)
        tl.store(place, tl.trans(values), mask=tl.trans(mask))
        tile += tl.num_programs(1)


@triton.jit
def _cells_forward_kernel(
    layers_ptr,  # [L, 9] int32, `Forward`
    weights_ptr,  # packed
    biases_ptr,  # all weights, flat
    images_ptr,  # [B, 3, H, W]
    products_ptr,  # [R, 3 h] first layers applied to features, with their biases
    normal_ptr,  # [R, M] standard normal
    jitter_ptr,  # [R] standard logistic
    edge_ptr,  # [V] the object beyond the rim
    record_ptr,  # [R, width] to be filled
    latents_ptr,  # [R, 3 M + 6] to be filled, columns as in `spairkit.models.latents.unpack`
    num_images,
    images_per_program,
    num_layers,
    rows,  # of the grid
    columns,
    height,
    width,
    side,  # of a glimpse
    hidden,
    passed,
    what,
    stride,  # of the record; then its columns
    where_out,
    depth_out,
    glimpse,
    what_out,
    pres_out,
    low,  # position of a box in its cell: low + span * squash(z)
    span,
    cell,  # pixels
    anchor,
    temperature,
    LATERAL: tl.constexpr,
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
    vector = size + 1  # V
    packed = 3 * size + 6
    # rows of the program count from 0, so that their places fit in 32 bits
    begin = start.to(tl.int64) * num_cells
    images_ptr += start.to(tl.int64) * (3 * height * width)
    products_ptr += begin * (3 * hidden)
    normal_ptr += begin * size
    jitter_ptr += begin
    record_ptr += begin * stride
    latents_ptr += begin * packed
    if LATERAL:
        _fill_edges(edge_ptr, record_ptr, n * num_cells, rows, columns, vector, stride, M, C)
    t = 0
    while t < columns + 2 * (rows - 1):
        tl.debug_barrier()
        top, num_of_wave = wave_cells(t, rows, columns)
        num_rows = num_of_wave * n
        layer = 0
        while layer < num_layers:
            entry = layers_ptr + layer * _FIELDS
            left, inputs = tl.load(entry), tl.load(entry + 1)
            weight = tl.multiple_of(tl.load(entry + 2), 16)
            out, outputs = tl.load(entry + 3), tl.load(entry + 4)
            rest, bias = tl.load(entry + 5), tl.load(entry + 6)
            activated, then = tl.load(entry + 7), tl.load(entry + 8)
            r0 = 0
            while r0 < num_rows:
                r = r0 + tl.arange(0, M)
                exists = r < num_rows
                image, k, _i, _j = tile_cells(r, n, t, top, columns)
                row = image * num_cells + k
                o0 = 0
                while o0 < outputs:
                    o = o0 + tl.arange(0, N)
                    acc = product(
                        record_ptr + left, row * stride, exists, inputs, weights_ptr + weight,
                        outputs, o, M, N, K, PRECISION,
                    )  # fmt: skip
                    mask = exists[:, None] & (o < outputs)[None, :]
                    place = record_ptr + (row * stride + out)[:, None] + o[None, :]
                    if rest == _BIAS:
                        acc += tl.load(biases_ptr + bias + o, mask=o < outputs, other=0.0)[None, :]
                    elif rest == _ADDED:
                        acc += tl.load(place, mask=mask, other=0.0)
                    else:
                        given = products_ptr + (row * (3 * hidden))[:, None] + o[None, :]
                        acc += tl.load(given, mask=mask, other=0.0)
                    acc = tl.where((o < activated)[None, :], activation(acc, RELU), acc)
                    tl.store(place, acc, mask=mask)
                    o0 += N
                r0 += M
            tl.debug_barrier()
            r0 = tl.where(then > 0, 0, num_rows)
            while r0 < num_rows:
                r = r0 + tl.arange(0, M)
                exists = r < num_rows
                image, k, i, j = tile_cells(r, n, t, top, columns)
                row = image * num_cells + k
                at = row * stride
                if then == WHERE:
                    _draw_where(
                        record_ptr, normal_ptr, latents_ptr, row, i, j, exists,
                        at + where_out, passed, size, low, span, cell, anchor,
                    )  # fmt: skip
                    tl.debug_barrier()
                    cut_glimpses(
                        images_ptr, latents_ptr, record_ptr, image, row * packed + 3 * size + 2,
                        at + glimpse, exists, side, height, width, M, C,
                    )  # fmt: skip
                elif then == WHAT:
                    _draw_what(
                        record_ptr, normal_ptr, latents_ptr, row, exists, at + what_out,
                        at + where_out + 12 + passed, at + depth_out + 6 + passed, what, M, C,
                    )  # fmt: skip
                elif then == DEPTH:
                    _draw_depth(
                        record_ptr, normal_ptr, latents_ptr, row, exists, at + depth_out,
                        passed, size,
                    )  # fmt: skip
                else:
                    _draw_presence(
                        record_ptr, jitter_ptr, latents_ptr, row, i, j, exists,
                        at, depth_out + 2 + passed, pres_out, rows, columns, size, stride,
                        temperature, LATERAL, C,
                    )  # fmt: skip
                r0 += M
            tl.debug_barrier()
            layer += 1
        t += 1


class Tile(NamedTuple):
    """What a launch chooses by shape alone."""

    images: int  # of a program
    constants: dict[str, int]
    options: dict[str, int]


def cells_tile(num_images: int, rows: int, columns: int, precision: str) -> Tile:
    """Two images to a program, or up to eight where there are many; tiles of the largest wave, or
    of 16 of its rows: higher ones spill registers."""
    images = min(8, max(2, int(triton.next_power_of_2(triton.cdiv(num_images, 128)))))
    largest = images * min(rows, (columns + 1) // 2)
    least = 4 if precision == "ieee" else 16  # tensor cores take 16 rows
    m = min(16, max(least, int(triton.next_power_of_2(largest))))
    k, c = (16, 32) if precision == "ieee" else (32, 16)
    options = {"num_warps": 4 if m < 16 else 8}
    if torch.version.hip is None:
        # the assembler would spill to make room for more programs than there are
        options["maxnreg"] = 255
    return Tile(images, {"M": m, "N": 128, "K": k, "C": c}, options)


def precision(device: torch.device) -> Literal["ieee", "tf32", "bf16"]:
    """Of products on this device, as torch's own are set: "ieee" is float32.

    "bf16" is that of `torch.autocast`. The interpreter has float32 only: it multiplies the bits of
    bfloat16 as integers.
    """
    if device.type != "cuda":
        return "ieee"
    if torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16:
        return "bf16"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def cells_forward_triton(
    tables: Tables, sizes: Sizes, numbers: Numbers, precision: str, weights: Tensor,
    images: Tensor, products: Tensor, normal: Tensor, jitter: Tensor, edge: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The record of all cells [R, width], latents [B, K, 3 M + 6], weights for the gradients."""
    batch, num_cells, size = normal.shape
    at = layout.columns(sizes)
    record = normal.new_empty(batch * num_cells, at.width)
    latents = normal.new_empty(batch, num_cells, 3 * size + 6)
    dtype = torch.bfloat16 if precision == "bf16" else normal.dtype
    packed, packed_back = (
        normal.new_empty(size, dtype=dtype) for size in (tables.forward_size, tables.backward_size)
    )
    tile = cells_tile(batch, numbers.rows, numbers.columns, precision)
    with on(images.device):
        _pack_kernel[(len(tables.packing), PACK_PROGRAMS)](
            tables.packing, weights, packed, packed_back, BLOCK=PACK_BLOCK, num_warps=PACK_WARPS
        )
        _cells_forward_kernel[(triton.cdiv(batch, tile.images),)](
            tables.forward, packed, weights, images, products, normal, jitter, edge, record,
            latents, batch, tile.images, len(tables.forward), numbers.rows, numbers.columns,
            *images.shape[2:], numbers.side, sizes.hidden, sizes.passed, sizes.what, at.width,
            at.where[-1], at.depth[-1], at.glimpse, at.encoder[-1], at.pres[-1], numbers.low,
            numbers.span, numbers.cell, numbers.anchor, numbers.temperature,
            LATERAL=sizes.context > 0, RELU=numbers.relu, PRECISION=precision,
            **tile.constants, **tile.options,
        )  # fmt: skip
    return record, latents, packed_back
