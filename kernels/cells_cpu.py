"""Numba twin of `SPAIR.encode_wave` in float32: one call forward, one backward.

A call handles n images, those of one thread, and no two calls share a row. Row
start * K + place * n + (image - start) belongs to one cell of one image: the cells of a wave lie
one after the other, each with its n images, and matrix products run over rows. Tensors from the
outside, [B, K, ...], have their cells in raster order.

The layers of a network lie one after the other in flat arrays, with a table of offsets. The depth
of a network is thus data, and one compilation serves every config.

K cells, R = K B rows, h hidden units, S features passed on, M = 4 + A + 1 numbers of where, what
and depth, V = M + 1 numbers of an object vector (box, what, nearness, presence). NaN propagates.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spairkit.kernels.constants import BOX, DEPTH_SCALE, STD_SCALE
from spairkit.kernels.elementary_cpu import clip, clip_backward, exp, slope, squash
from spairkit.kernels.glimpse_cpu import glimpses_backward, glimpses_forward
from spairkit.kernels.threads import compiled, inlined, part

_ZERO = np.float32(0.0)
_HALF = np.float32(0.5)
_ONE = np.float32(1.0)
_STD_SCALE = np.float32(STD_SCALE)
_DEPTH_SCALE = np.float32(DEPTH_SCALE)

Array = NDArray[Any]

WHERE, ENCODER, DEPTH, PRES = range(4)
"""The networks of a cell in the order in which they run."""

OUTPUTS, COLUMN, WEIGHT, BIAS = range(4)
"""Columns of `Network.layers`."""

_BLOCK = 8  # rows of a product that are multiplied together if a row must not see its neighbours


class Grid(NamedTuple):
    """The schedule of `spairkit.models.wavefront` as arrays of int64."""

    starts: Array  # [waves + 1] the first place of each wave, then K
    order: Array  # [K] the raster index of each place
    neighbours: Array  # [K, 4] places of the cells that a place reads; K is beyond the rim
    followers: Array  # [K, 4] the inverse: the places whose neighbour d this place is, or K
    largest: int  # cells of the largest wave


class Numbers(NamedTuple):
    """Settings of the config."""

    constants: Array  # [3, 4] float32 of y, x, h, w: scale, shift, pixels for each unit of placed
    columns: int  # of cells
    size: int  # side of a glimpse
    temperature: np.float32
    relu: bool  # or celu
    training_wheels: bool
    hard: bool  # presences are 0 or 1
    apart: bool  # a row has the same bits beside any other rows


class Network(NamedTuple):
    """Linear layers with an activation between them; `added` joins the product of the first."""

    layers: Array  # [L, 4] int64 outputs, outputs of all layers below, first weight, first bias
    own: Array  # [h, inputs] weights of the first layer for the network's own inputs
    inputs: Array  # [R, inputs]
    weights: Array  # [outputs, inputs] of each layer after the first, flat
    biases: Array  # [1, outputs] of each layer after the first, side by side
    values: Array  # [R, outputs] of each layer, flat; activated, except for the last layer


class Wave(NamedTuple):
    """Cells that are computed together."""

    first: int  # place of the first cell
    start: int  # first image of the call
    n: int  # images of the call
    lo: int  # first row
    rows: int


@part
def _wave(grid, t, start, n):
    first, last = grid.starts[t], grid.starts[t + 1]
    return Wave(first, start, n, start * len(grid.order) + first * n, (last - first) * n)


@part
def _cell(wave, order, r):
    """Image and raster index of row r of a wave."""
    return wave.start + r % wave.n, order[wave.first + r // wave.n]


@part
def _layer(flat, network, layer):
    """[R, outputs] of a layer, from the values or gradients of all layers."""
    rows, outputs = len(network.inputs), network.layers[layer, OUTPUTS]
    begin = rows * network.layers[layer, COLUMN]
    return flat[begin : begin + rows * outputs].reshape((rows, outputs))


@part
def _last(flat, network):
    return _layer(flat, network, len(network.layers) - 1)


@part
def _weight(network, layer):  # [outputs, inputs]
    outputs, inputs = network.layers[layer, OUTPUTS], network.layers[layer - 1, OUTPUTS]
    begin = network.layers[layer, WEIGHT]
    return network.weights[begin : begin + outputs * inputs].reshape((outputs, inputs))


@part
def _fill(values, value):
    for r in range(len(values)):
        for i in range(values.shape[1]):
            values[r, i] = value


@part
def _widest(networks, context_weight):
    """The most inputs or outputs of a product."""
    widest = max(context_weight.shape[0], context_weight.shape[1])
    for stage in range(len(networks)):
        network = networks[stage]
        widest = max(widest, network.own.shape[1])
        for layer in range(len(network.layers)):
            widest = max(widest, network.layers[layer, OUTPUTS])
    return widest


@part
def _multiply(rows, weight, values, apart, scratch):
    """values = rows weight^T; `scratch` has room for a block of rows and its products.

    Libraries multiply few rows by another kernel, which rounds differently, and some round a row
    differently in another place of a large block. Blocks of eight rows each give a row the same
    bits beside any others, with OpenBLAS's kernels for Nehalem, Sandy Bridge, Haswell, Zen and
    Skylake.
    """
    num_rows = len(rows)
    size = _BLOCK if apart else max(num_rows, 1)
    whole = num_rows - num_rows % size
    for lo in range(0, whole, size):
        np.dot(rows[lo : lo + size], weight.T, values[lo : lo + size])
    if whole < num_rows:
        block = scratch[: size * rows.shape[1]].reshape((size, rows.shape[1]))
        products = scratch[block.size : block.size + size * values.shape[1]]
        products = products.reshape((size, values.shape[1]))
        for r in range(whole, num_rows):
            for i in range(rows.shape[1]):
                block[r - whole, i] = rows[r, i]
        np.dot(block, weight.T, products)
        for r in range(whole, num_rows):
            for i in range(values.shape[1]):
                values[r, i] = products[r - whole, i]


@part
def _add_and_activate(values, added, column, linear, relu):
    """values += added[:, column:], [m, ...] or [1, ...] for all rows; then the activation."""
    for r in range(len(values)):
        row, more = values[r], added[min(r, len(added) - 1)]
        if linear:
            for i in range(len(row)):
                row[i] += more[column + i]
        elif relu:
            for i in range(len(row)):
                total = row[i] + more[column + i]
                row[i] = _ZERO if total < _ZERO else total
        else:
            for i in range(len(row)):
                total = row[i] + more[column + i]
                row[i] = total if total > _ZERO else exp(total) - _ONE


@part
def _forward(wave, network, added, column, numbers, scratch):
    """Fills the values of a wave; `added[:, column:]` is the rest of the first layer."""
    lo, hi = wave.lo, wave.lo + wave.rows
    for layer in range(len(network.layers)):
        values = _layer(network.values, network, layer)[lo:hi]
        if layer > 0:
            below = _layer(network.values, network, layer - 1)[lo:hi]
            _multiply(below, _weight(network, layer), values, numbers.apart, scratch)
            added, column = network.biases, network.layers[layer, BIAS]
        elif network.own.shape[1] > 0:
            _multiply(network.inputs[lo:hi], network.own, values, numbers.apart, scratch)
        else:
            _fill(values, _ZERO)
        is_last = layer == len(network.layers) - 1
        _add_and_activate(values, added, column, is_last, numbers.relu)


@part
def _multiply_by_slope(grad, values, relu):
    """From an activation's output y: relu' = [y > 0], celu' = exp(min(x, 0)) = min(y, 0) + 1."""
    for r in range(len(grad)):
        for i in range(grad.shape[1]):
            y = values[r, i]
            if relu:
                grad[r, i] = grad[r, i] if y > _ZERO else _ZERO
            else:
                grad[r, i] *= y + _ONE if y < _ZERO else _ONE


@part
def _backward(wave, network, grads, relu):
    """Fills a wave's gradients before the activation, from those of the last layer down."""
    lo, hi = wave.lo, wave.lo + wave.rows
    for layer in range(len(network.layers) - 1, 0, -1):
        grad = _layer(grads, network, layer - 1)[lo:hi]
        np.dot(_layer(grads, network, layer)[lo:hi], _weight(network, layer), grad)
        _multiply_by_slope(grad, _layer(network.values, network, layer - 1)[lo:hi], relu)


@inlined
def _draw(mean, raw, normal, record, i):
    """Sample i of a cell; its record gets mean, standard deviation and sample."""
    size = len(normal)
    std = _STD_SCALE * squash(raw)
    sample = mean + std * normal[i]
    record[i], record[size + i], record[2 * size + i] = mean, std, sample
    return sample


@inlined
def _moments_back(grad, raw, normal, grad_record, i):
    """Gradients of mean and raw i of a cell; `grad` adds to the record's gradient of the sample."""
    size = len(normal)
    grad_sample = grad_record[2 * size + i] + grad
    grad_std = grad_record[size + i] + grad_sample * normal[i]
    return grad_record[i] + grad_sample, _STD_SCALE * slope(raw, squash(raw)) * grad_std


@part
def _first_layers(wave, order, context_weight, contexts, products, added, apart, scratch):
    """The products of three first layers with the inputs they share: features and context."""
    if contexts.shape[1] > 0:
        rows = contexts[wave.lo : wave.lo + wave.rows]
        _multiply(rows, context_weight, added[: wave.rows], apart, scratch)
    else:
        _fill(added[: wave.rows], _ZERO)
    for r in range(wave.rows):
        b, k = _cell(wave, order, r)
        product = products[b, k]
        for i in range(added.shape[1]):
            added[r, i] += product[i]


@part
def _draw_where(wave, order, numbers, all_outputs, own_of_depth, normal, record, boxes):
    """where, its box, and the features passed on to depth."""
    constants, begin = numbers.constants, record.shape[2] - BOX
    scale, shift, to_pixels = constants[0], constants[1], constants[2]
    pixels = np.empty(BOX, np.float32)
    for r in range(wave.rows):
        b, k = _cell(wave, order, r)
        outputs, own = all_outputs[wave.lo + r], own_of_depth[wave.lo + r]
        passed = len(outputs) - 2 * BOX
        for i in range(passed):
            own[i] = outputs[2 * BOX + i]
        corner = k // numbers.columns, k % numbers.columns
        for i in range(BOX):
            sample = _draw(outputs[i], outputs[BOX + i], normal[b, k], record[b, k], i)
            placed = shift[i] + scale[i] * squash(sample)
            pixels[i] = placed * to_pixels[i]
            own[passed + i] = placed
        for i in range(2):  # x, y
            centre = pixels[1 - i] + np.float32(corner[1 - i]) * to_pixels[1 - i]
            low = centre - _HALF * pixels[3 - i]
            boxes[r, i] = low
            boxes[r, 2 + i] = low + pixels[3 - i]
        for i in range(BOX):
            record[b, k, begin + i] = boxes[r, i]


@part
def _draw_what(wave, order, all_outputs, own_of_depth, normal, record):
    size = normal.shape[2]
    what = size - BOX - 1
    for r in range(wave.rows):
        b, k = _cell(wave, order, r)
        outputs, own = all_outputs[wave.lo + r], own_of_depth[wave.lo + r]
        begin = len(own) - what
        for i in range(what):
            j = BOX + i
            own[begin + i] = _draw(outputs[i], outputs[what + i], normal[b, k], record[b, k], j)


@part
def _draw_depth(wave, order, all_outputs, own_of_depth, own_of_pres, normal, record):
    """depth, and all own inputs of pres."""
    size = normal.shape[2]
    for r in range(wave.rows):
        b, k = _cell(wave, order, r)
        outputs, own = all_outputs[wave.lo + r], own_of_pres[wave.lo + r]
        passed = len(outputs) - 2
        for i in range(passed):
            own[i] = outputs[2 + i]
        for i in range(passed, len(own) - 1):
            own[i] = own_of_depth[wave.lo + r, i]
        j = size - 1
        sample = _draw(outputs[0], outputs[1], normal[b, k], record[b, k], j)
        own[-1] = _DEPTH_SCALE * squash(-sample)


@part
def _draw_presence(wave, grid, numbers, logits, own_of_pres, jitter, record, contexts):
    """pres; and the object vector, written to the contexts of all cells that will read it."""
    order, followers = grid.order, grid.followers
    base, size = wave.start * len(order), (record.shape[2] - 6) // 3
    vector = size + 1
    for r in range(wave.rows):
        place, image = wave.first + r // wave.n, r % wave.n
        b, k = _cell(wave, order, r)
        own = own_of_pres[wave.lo + r]
        logit = clip(logits[wave.lo + r, 0])
        raw = logit + jitter[b, k]
        present = _ONE / (_ONE + np.exp(-raw / numbers.temperature))
        if numbers.hard:
            present = _ONE if raw > _ZERO else _ZERO
        record[b, k, 3 * size], record[b, k, 3 * size + 1] = logit, present
        if contexts.shape[1] == 0:
            continue
        for d in range(followers.shape[1]):
            if followers[place, d] < len(order):
                slot = contexts[base + followers[place, d] * wave.n + image]
                begin = d * vector
                for i in range(size):
                    slot[begin + i] = own[len(own) - size + i]
                slot[begin + size] = present


@part
def _fill_edges(start, n, neighbours, edge, contexts):
    """The learned object beyond the rim, wherever it is read."""
    vector = len(edge)
    for place in range(len(neighbours)):
        for d in range(neighbours.shape[1]):
            if neighbours[place, d] == len(neighbours):
                lo = start * len(neighbours) + place * n
                for r in range(lo, lo + n):
                    for i in range(vector):
                        contexts[r, d * vector + i] = edge[i]


@compiled
def cells_forward(
    start,
    stop,
    grid,  # Grid
    numbers,  # Numbers
    networks,  # four of Network: where, encoder, depth, pres; inputs and values are to be filled
    images,  # [B, C, H, W]
    products,  # [B, K, 3 h] first layers applied to features, with their biases
    frames,  # [B, 4] scale and shift from coordinates to pixel indices, of y and of x
    normal,  # [B, K, M] standard normal
    jitter,  # [B, K] standard logistic
    edge,  # [V]
    context_weight,  # [3 h, 4 V], or no columns
    encoder_bias,  # [1, h] of its first layer
    contexts,  # [R, 4 V], or no columns; to be filled
    record,  # [B, K, 3 M + 6], columns as in `spairkit.models.latents.unpack`; to be filled
):
    """Latents of the images from start to stop, and everything that their gradients need."""
    order, n, h = grid.order, stop - start, products.shape[2] // 3
    most = n * grid.largest
    added = np.empty((most, 3 * h), np.float32)
    boxes = np.empty((most, BOX), np.float32)
    scratch = np.zeros(2 * _BLOCK * _widest(networks, context_weight), np.float32)
    here, frame = images[start:stop], frames[start:stop]
    of_depth, of_pres = networks[DEPTH].inputs, networks[PRES].inputs
    if contexts.shape[1] > 0:
        _fill_edges(start, n, grid.neighbours, edge, contexts)
    for t in range(len(grid.starts) - 1):
        wave = _wave(grid, t, start, n)
        _first_layers(
            wave, order, context_weight, contexts, products, added, numbers.apart, scratch
        )
        # a loop, so that the code of a network is compiled once and not four times
        for stage in range(len(networks)):
            network = networks[stage]
            if stage == ENCODER:
                inputs = network.inputs[wave.lo : wave.lo + wave.rows]
                glimpses = inputs.reshape((wave.rows, images.shape[1], numbers.size, -1))
                glimpses_forward(here, boxes[: wave.rows], frame, glimpses)
            column = 0 if stage <= ENCODER else (stage - 1) * h
            rest = encoder_bias if stage == ENCODER else added
            _forward(wave, network, rest, column, numbers, scratch)
            outputs = _last(network.values, network)
            if stage == WHERE:
                _draw_where(wave, order, numbers, outputs, of_depth, normal, record, boxes)
            elif stage == ENCODER:
                _draw_what(wave, order, outputs, of_depth, normal, record)
            elif stage == DEPTH:
                _draw_depth(wave, order, outputs, of_depth, of_pres, normal, record)
            else:
                _draw_presence(wave, grid, numbers, outputs, of_pres, jitter, record, contexts)


@part
def _vectors_back(wave, followers, grad_contexts, grad_vectors):
    """The gradient that reaches object vectors from the cells that read them."""
    vector = grad_vectors.shape[1]
    for r in range(wave.rows):
        place, image = wave.first + r // wave.n, r % wave.n
        for i in range(vector):
            grad_vectors[r, i] = _ZERO
        for d in range(followers.shape[1]):
            if followers[place, d] < len(followers) and grad_contexts.shape[1] > 0:
                slot = grad_contexts[followers[place, d] * wave.n + image]
                begin = d * vector
                for i in range(vector):
                    grad_vectors[r, i] += slot[begin + i]


@part
def _presence_back(wave, order, temperature, logits, record, grad_record, grad_vectors, grads):
    """From vectors and the record to the outputs of pres."""
    size = grad_vectors.shape[1] - 1
    for r in range(wave.rows):
        b, k = _cell(wave, order, r)
        present = record[b, k, 3 * size + 1]
        grad = grad_record[b, k, 3 * size + 1] + grad_vectors[r, size]
        grad = grad * present * (_ONE - present) / temperature
        row = wave.lo + r
        grads[row, 0] = clip_backward(logits[row, 0], grad + grad_record[b, k, 3 * size])


@part
def _depth_back(wave, order, outputs, normal, record, grad_record, grad_own, grad_vectors, grads):
    """From vectors and the inputs of pres to the outputs of depth."""
    size = normal.shape[2]
    j = size - 1
    passed = grads.shape[1] - 2
    for r in range(wave.rows):
        b, k = _cell(wave, order, r)
        for i in range(size):
            grad_vectors[r, i] += grad_own[r, passed + i]
        sample = record[b, k, 2 * size + j]
        grad = -_DEPTH_SCALE * slope(sample, squash(-sample)) * grad_vectors[r, j]
        row = wave.lo + r
        raw = outputs[row, 1]
        mean, std = _moments_back(grad, raw, normal[b, k], grad_record[b, k], j)
        grads[row, 0], grads[row, 1] = mean, std
        for i in range(passed):
            grads[row, 2 + i] = grad_own[r, i]


@part
def _what_back(wave, order, outputs, normal, grad_record, grad_own, grad_vectors, grads):
    """From vectors and the inputs of depth to the outputs of the encoder."""
    size = normal.shape[2]
    what = size - BOX - 1
    passed = grad_own.shape[1] - BOX - what
    for r in range(wave.rows):
        b, k = _cell(wave, order, r)
        for i in range(BOX + what):
            grad_vectors[r, i] += grad_own[r, passed + i]
        row = wave.lo + r
        for i in range(what):
            j = BOX + i
            raw = outputs[row, what + i]
            mean, std = _moments_back(grad_vectors[r, j], raw, normal[b, k], grad_record[b, k], j)
            grads[row, i], grads[row, what + i] = mean, std


@part
def _where_back(
    wave, order, constants, outputs, normal, record, grad_record, grad_own, grad_vectors,
    grad_boxes, grads,
):  # fmt: skip
    """From vectors and boxes to the outputs of where, with the features passed on to depth."""
    scale, to_pixels, size = constants[0], constants[2], normal.shape[2]
    passed = grads.shape[1] - 2 * BOX
    for r in range(wave.rows):
        b, k = _cell(wave, order, r)
        row = wave.lo + r
        for i in range(BOX):  # y, x, h, w
            edge = 1 - i % 2
            low = grad_boxes[r, edge] + grad_record[b, k, 3 * size + 2 + edge]
            high = grad_boxes[r, 2 + edge] + grad_record[b, k, 3 * size + 4 + edge]
            pixels = low + high if i < 2 else _HALF * (high - low)
            sample = record[b, k, 2 * size + i]
            placed_slope = scale[i] * slope(sample, squash(sample))
            grad = (grad_vectors[r, i] + pixels * to_pixels[i]) * placed_slope
            raw = outputs[row, BOX + i]
            mean, std = _moments_back(grad, raw, normal[b, k], grad_record[b, k], i)
            grads[row, i], grads[row, BOX + i] = mean, std
        for i in range(passed):
            grads[row, 2 * BOX + i] = grad_own[r, i]


@part
def _boxes_back(wave, order, record, images, frames, grad_inputs, size, boxes, grad_boxes):
    """From the encoder's inputs, the glimpses, to the boxes."""
    begin = record.shape[2] - BOX
    for r in range(wave.rows):
        b, k = _cell(wave, order, r)
        for i in range(BOX):
            boxes[r, i] = record[b, k, begin + i]
    grad_glimpses = grad_inputs.reshape((wave.rows, images.shape[1], size, -1))
    glimpses_backward(grad_glimpses, images, boxes[: wave.rows], frames, grad_boxes)


@part
def _first_layers_back(wave, order, where, depth, pres, grad_added, grad_products):
    """The gradients of three first layers side by side, in rows and in raster order."""
    h = where.shape[1]
    for r in range(wave.rows):
        b, k = _cell(wave, order, r)
        row = grad_added[wave.lo + r]
        for i in range(h):
            row[i] = where[wave.lo + r, i]
            row[h + i] = depth[wave.lo + r, i]
            row[2 * h + i] = pres[wave.lo + r, i]
        for i in range(3 * h):
            grad_products[b, k, i] = row[i]


@part
def _edges_back(start, n, neighbours, grad_contexts, grad_edges):
    """The gradient of the object beyond the rim, for each image."""
    vector = grad_edges.shape[1]
    _fill(grad_edges[start : start + n], _ZERO)
    for place in range(len(neighbours)):
        for d in range(neighbours.shape[1]):
            if neighbours[place, d] == len(neighbours):
                for r in range(n):
                    for i in range(vector):
                        grad_edges[start + r, i] += grad_contexts[place * n + r, d * vector + i]


@compiled
def cells_backward(
    start, stop, grid, numbers, networks,
    grads,  # four, each as the values of its network, before the activation; to be filled
    images, frames, normal, record,
    grad_record,  # [B, K, 3 M + 6]
    context_weight,
    grad_added,  # [R, 3 h] to be filled, as are the next two
    grad_products,  # [B, K, 3 h]
    grad_edges,  # [B, V]
):  # fmt: skip
    """Gradients of products, edges and all layers; with training wheels of the encoder alone."""
    order, n, size = grid.order, stop - start, normal.shape[2]
    most = n * grid.largest
    wheels = numbers.training_wheels
    lateral = context_weight.shape[1] > 0 and not wheels
    here, frame = images[start:stop], frames[start:stop]
    grad_contexts = np.empty((len(order) * n, context_weight.shape[1]), np.float32)
    grad_vectors = np.zeros((most, size + 1), np.float32)
    grad_boxes, boxes = np.empty((most, BOX), np.float32), np.empty((most, BOX), np.float32)
    grad_inputs = (
        np.zeros((most, networks[WHERE].inputs.shape[1]), np.float32),
        np.zeros((most, networks[ENCODER].inputs.shape[1]), np.float32),
        np.zeros((most, networks[DEPTH].inputs.shape[1]), np.float32),
        np.zeros((most, networks[PRES].inputs.shape[1]), np.float32),
    )
    of_depth, of_pres = grad_inputs[DEPTH], grad_inputs[PRES]
    for t in range(len(grid.starts) - 2, -1, -1):
        wave = _wave(grid, t, start, n)
        lo, hi, rows = wave.lo, wave.lo + wave.rows, wave.rows
        for stage in range(PRES, WHERE - 1, -1):
            if wheels and stage != ENCODER:
                continue
            network = networks[stage]
            outputs, grad = _last(network.values, network), _last(grads[stage], network)
            if stage == PRES:
                _vectors_back(wave, grid.followers, grad_contexts, grad_vectors)
                _presence_back(
                    wave, order, numbers.temperature, outputs, record, grad_record, grad_vectors,
                    grad,
                )  # fmt: skip
            elif stage == DEPTH:
                _depth_back(
                    wave, order, outputs, normal, record, grad_record, of_pres, grad_vectors, grad
                )
            elif stage == ENCODER:
                _what_back(wave, order, outputs, normal, grad_record, of_depth, grad_vectors, grad)
            else:
                _boxes_back(
                    wave, order, record, here, frame, grad_inputs[ENCODER][:rows], numbers.size,
                    boxes, grad_boxes,
                )  # fmt: skip
                _where_back(
                    wave, order, numbers.constants, outputs, normal, record, grad_record,
                    of_depth, grad_vectors, grad_boxes, grad,
                )  # fmt: skip
            _backward(wave, network, grads[stage], numbers.relu)
            if network.own.shape[1] > 0 and not wheels:
                first = _layer(grads[stage], network, 0)[lo:hi]
                np.dot(first, network.own, grad_inputs[stage][:rows])
        if not wheels:
            _first_layers_back(
                wave,
                order,
                _layer(grads[WHERE], networks[WHERE], 0),
                _layer(grads[DEPTH], networks[DEPTH], 0),
                _layer(grads[PRES], networks[PRES], 0),
                grad_added,
                grad_products,
            )
        if lateral:
            begin = wave.first * n
            np.dot(grad_added[lo:hi], context_weight, grad_contexts[begin : begin + rows])
    if lateral:
        _edges_back(start, n, grid.neighbours, grad_contexts, grad_edges)
