"""Numba twin of `spairkit.models.cell_loop` in float32: one call forward, one backward.

The images of a call, n of them, are those of one thread, and no two calls share a row. Row
start * K + place * n + (image - start) belongs to a cell and an image: the cells of a wave lie one
after the other, each with the n images, and what is in rows are the operands of matrix products.
What comes from outside or goes there, [B, K, ...], has its cells in raster order.

What belongs to a wave, from place `first` to `last`, and the n images from `start` on, is computed
by parts. `boxes`, `added` and `grad_boxes`, `grad_vectors` and `grad_own` are those of the wave,
[(last - first) n, ...]. `outputs` [R, outputs] are of a network's last layer and `grads` their
gradients, `own` its inputs, [R, S + 4 + A] of depth and one more, nearness, of pres. All other
arrays are described where `cells_forward` and `cells_backward` take them; R = K B rows.

M = 4 + A + 1 counts where, what and depth, V = M + 1 the numbers of an object vector (box, what,
nearness, presence), S the features passed on, h the hidden units. NaN goes the way of the numbers.
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


class Grid(NamedTuple):
    """Which cell is worked out when: `spairkit.models.wavefront` as arrays of int64."""

    starts: Array  # [waves + 1] the first place of each wave, then K
    order: Array  # [K] the raster index of each place
    neighbours: Array  # [K, 4] places of the cells that a place reads; K is beyond the rim
    followers: Array  # [K, 4] the way back: of which places is it neighbour d; or K


class Numbers(NamedTuple):
    """What the config says."""

    constants: Array  # [3, 4] float32 of y, x, h, w: scale, shift, pixels for each unit of placed
    columns: int  # of cells
    size: int  # side of a glimpse
    temperature: np.float32
    relu: bool  # or celu
    training_wheels: bool


class Network(NamedTuple):
    """Linear layers with the activation between them.

    The first layer adds the product of its own inputs to what the caller gives.
    """

    own: Array  # [h, inputs] weights of the first layer for the network's own inputs
    inputs: Array  # [R, inputs]
    weights: tuple[Array, ...]  # of the layers after the first
    biases: tuple[Array, ...]
    values: tuple[Array, ...]  # [R, outputs] of each layer, but for the last one's activated


@part
def _fill(values, value):
    for r in range(len(values)):
        for i in range(values.shape[1]):
            values[r, i] = value


@part
def _add(values, bias):
    for r in range(len(values)):
        for i in range(len(bias)):
            values[r, i] += bias[i]


@part
def _add_and_activate(values, added, relu):
    """values += added, [m, h] or [1, h] for all rows; then the activation."""
    for r in range(len(values)):
        row, more = values[r], added[min(r, len(added) - 1)]
        if relu:
            for i in range(len(row)):
                total = row[i] + more[i]
                row[i] = _ZERO if total < _ZERO else total
        else:
            for i in range(len(row)):
                total = row[i] + more[i]
                row[i] = total if total > _ZERO else exp(total) - _ONE


@part
def _forward(lo, hi, network, added, relu):
    """Fills the values of rows lo to hi; `added` is the rest of the first layer."""
    if network.own.shape[1] > 0:
        np.dot(network.inputs[lo:hi], network.own.T, network.values[0][lo:hi])
    else:
        _fill(network.values[0][lo:hi], _ZERO)
    _add_and_activate(network.values[0][lo:hi], added, relu)
    num_layers = len(network.weights)
    for layer in range(num_layers):
        values = network.values[layer + 1][lo:hi]
        np.dot(network.values[layer][lo:hi], network.weights[layer].T, values)
        if layer < num_layers - 1:
            _add_and_activate(values, network.biases[layer].reshape((1, -1)), relu)
        else:
            _add(values, network.biases[layer])


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
def _backward(lo, hi, network, grads, relu):
    """Fills the gradients, before the activation, of all layers but the last one, which has its."""
    for layer in range(len(network.weights) - 1, -1, -1):
        grad = grads[layer][lo:hi]
        np.dot(grads[layer + 1][lo:hi], network.weights[layer], grad)
        _multiply_by_slope(grad, network.values[layer][lo:hi], relu)


@inlined
def _draw(mean, raw, normal, record, i, size):
    """A sample; writes it, its mean and its standard deviation to the record."""
    std = _STD_SCALE * squash(raw)
    sample = mean + std * normal
    record[i], record[size + i], record[2 * size + i] = mean, std, sample
    return sample


@inlined
def _moments_back(grad, raw, normal, grad_record, i, size):
    """Gradients of a mean and a raw, with `grad` what else reaches the sample."""
    grad_sample = grad_record[2 * size + i] + grad
    raw_slope = _STD_SCALE * slope(raw, squash(raw))
    return grad_record[i] + grad_sample, raw_slope * (grad_record[size + i] + grad_sample * normal)


@part
def _first_layers(first, last, start, n, order, context_weight, contexts, products, added):
    """The products of three first layers with what they share: features and context."""
    rows = (last - first) * n
    if contexts.shape[1] > 0:
        lo = start * len(order) + first * n
        np.dot(contexts[lo : lo + rows], context_weight.T, added[:rows])
    else:
        _fill(added[:rows], _ZERO)
    for r in range(rows):
        product = products[start + r % n, order[first + r // n]]
        for i in range(added.shape[1]):
            added[r, i] += product[i]


@part
def _draw_where(
    first,
    last,
    start,
    n,
    order,
    constants,
    columns,
    outputs_of_where,
    own_of_depth,
    normal,
    record,
    boxes,
):
    """where, its box, and what is passed on to depth."""
    scale, shift, to_pixels = constants[0], constants[1], constants[2]
    lo, size = start * len(order) + first * n, normal.shape[2]
    pixels = np.empty(BOX, np.float32)
    for r in range((last - first) * n):
        b, k = start + r % n, order[first + r // n]
        outputs, own = outputs_of_where[lo + r], own_of_depth[lo + r]
        passed = len(outputs) - 2 * BOX
        for i in range(passed):
            own[i] = outputs[2 * BOX + i]
        corner = k // columns, k % columns
        for i in range(BOX):
            sample = _draw(outputs[i], outputs[BOX + i], normal[b, k, i], record[b, k], i, size)
            placed = shift[i] + scale[i] * squash(sample)
            pixels[i] = placed * to_pixels[i]
            own[passed + i] = placed
        for i in range(2):  # x, y
            centre = pixels[1 - i] + np.float32(corner[1 - i]) * to_pixels[1 - i]
            low = centre - _HALF * pixels[3 - i]
            boxes[r, i] = low
            boxes[r, 2 + i] = low + pixels[3 - i]
        for i in range(BOX):
            record[b, k, 3 * size + 2 + i] = boxes[r, i]


@part
def _draw_what(first, last, start, n, order, outputs_of_encoder, own_of_depth, normal, record):
    """what."""
    lo, size = start * len(order) + first * n, normal.shape[2]
    what = size - BOX - 1
    for r in range((last - first) * n):
        b, k = start + r % n, order[first + r // n]
        outputs, own = outputs_of_encoder[lo + r], own_of_depth[lo + r]
        begin = len(own) - what
        for i in range(what):
            j = BOX + i
            own[begin + i] = _draw(
                outputs[i], outputs[what + i], normal[b, k, j], record[b, k], j, size
            )


@part
def _draw_depth(
    first, last, start, n, order, outputs_of_depth, own_of_depth, own_of_pres, normal, record
):
    """depth, and all that pres reads of its own."""
    lo, size = start * len(order) + first * n, normal.shape[2]
    for r in range((last - first) * n):
        b, k = start + r % n, order[first + r // n]
        outputs, own = outputs_of_depth[lo + r], own_of_pres[lo + r]
        passed = len(outputs) - 2
        for i in range(passed):
            own[i] = outputs[2 + i]
        for i in range(passed, len(own) - 1):
            own[i] = own_of_depth[lo + r, i]
        j = size - 1
        sample = _draw(outputs[0], outputs[1], normal[b, k, j], record[b, k], j, size)
        own[-1] = _DEPTH_SCALE * squash(-sample)


@part
def _draw_presence(
    first,
    last,
    start,
    n,
    order,
    followers,
    temperature,
    logits,
    own_of_pres,
    jitter,
    record,
    contexts,
):
    """pres; and the object vector, to all that will read it."""
    base, size = start * len(order), (record.shape[2] - 6) // 3
    lo, vector = base + first * n, size + 1
    for r in range((last - first) * n):
        place, image = first + r // n, r % n
        b, k = start + image, order[place]
        own = own_of_pres[lo + r]
        logit = clip(logits[lo + r, 0])
        present = _ONE / (_ONE + np.exp(-(logit + jitter[b, k]) / temperature))
        record[b, k, 3 * size], record[b, k, 3 * size + 1] = logit, present
        if contexts.shape[1] == 0:
            continue
        for d in range(followers.shape[1]):
            if followers[place, d] < len(order):
                slot = contexts[base + followers[place, d] * n + image]
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


@inlined
def _most_rows(starts, n):
    """Of a wave."""
    most = 0
    for t in range(len(starts) - 1):
        most = max(most, starts[t + 1] - starts[t])
    return n * most


@compiled
def cells_forward(
    start,
    stop,
    grid,  # Grid
    numbers,  # Numbers
    images,  # [B, C, H, W]
    products,  # [B, K, 3 h] first layers applied to features, with their biases
    normal,  # [B, K, M] standard normal
    jitter,  # [B, K] standard logistic
    edge,  # [V]
    context_weight,  # [3 h, 4 V], or no columns
    where,  # Network, as the others are; values and inputs are to be filled
    encoder,
    encoder_bias,  # [1, h] of its first layer
    depth,
    pres,
    contexts,  # [R, 4 V], or no columns; to be filled
    record,  # [B, K, 3 M + 6], columns as in `spairkit.models.latents.unpack`; to be filled
):
    """Latents of the images from start to stop, and what their gradients will need."""
    starts, order = grid.starts, grid.order
    n, num_cells, h = stop - start, len(order), products.shape[2] // 3
    most = _most_rows(starts, n)
    added = np.empty((most, 3 * h), np.float32)
    boxes = np.empty((most, BOX), np.float32)
    here = images[start:stop]
    if contexts.shape[1] > 0:
        _fill_edges(start, n, grid.neighbours, edge, contexts)
    for t in range(len(starts) - 1):
        first, last = starts[t], starts[t + 1]
        rows = (last - first) * n
        lo = start * num_cells + first * n
        hi = lo + rows
        _first_layers(first, last, start, n, order, context_weight, contexts, products, added)
        _forward(lo, hi, where, added[:rows, :h], numbers.relu)
        _draw_where(
            first, last, start, n, order, numbers.constants, numbers.columns, where.values[-1],
            depth.inputs, normal, record, boxes,
        )  # fmt: skip
        glimpses = encoder.inputs[lo:hi].reshape((rows, images.shape[1], numbers.size, -1))
        glimpses_forward(here, boxes[:rows], glimpses)
        _forward(lo, hi, encoder, encoder_bias, numbers.relu)
        _draw_what(first, last, start, n, order, encoder.values[-1], depth.inputs, normal, record)
        _forward(lo, hi, depth, added[:rows, h : 2 * h], numbers.relu)
        _draw_depth(
            first, last, start, n, order, depth.values[-1], depth.inputs, pres.inputs, normal,
            record,
        )  # fmt: skip
        _forward(lo, hi, pres, added[:rows, 2 * h :], numbers.relu)
        _draw_presence(
            first, last, start, n, order, grid.followers, numbers.temperature, pres.values[-1],
            pres.inputs, jitter, record, contexts,
        )  # fmt: skip


@part
def _vectors_back(first, last, n, followers, grad_contexts, grad_vectors):
    """The gradient that reaches object vectors from the cells that read them."""
    vector = grad_vectors.shape[1]
    for r in range((last - first) * n):
        place, image = first + r // n, r % n
        for i in range(vector):
            grad_vectors[r, i] = _ZERO
        for d in range(followers.shape[1]):
            if followers[place, d] < len(followers) and grad_contexts.shape[1] > 0:
                slot = grad_contexts[followers[place, d] * n + image]
                begin = d * vector
                for i in range(vector):
                    grad_vectors[r, i] += slot[begin + i]


@part
def _presence_back(
    first, last, start, n, order, temperature, logits, record, grad_record, grad_vectors, grads
):
    """From vectors and the record to the outputs of pres."""
    lo, size = start * len(order) + first * n, grad_vectors.shape[1] - 1
    for r in range((last - first) * n):
        b, k = start + r % n, order[first + r // n]
        present = record[b, k, 3 * size + 1]
        grad = grad_record[b, k, 3 * size + 1] + grad_vectors[r, size]
        grad = grad * present * (_ONE - present) / temperature
        grads[lo + r, 0] = clip_backward(logits[lo + r, 0], grad + grad_record[b, k, 3 * size])


@part
def _depth_back(
    first,
    last,
    start,
    n,
    order,
    outputs,
    normal,
    record,
    grad_record,
    grad_own,
    grad_vectors,
    grads,
):
    """From vectors and the inputs of pres to the outputs of depth."""
    lo, size = start * len(order) + first * n, normal.shape[2]
    j = size - 1
    passed = grads.shape[1] - 2
    for r in range((last - first) * n):
        b, k = start + r % n, order[first + r // n]
        for i in range(size):
            grad_vectors[r, i] += grad_own[r, passed + i]
        sample = record[b, k, 2 * size + j]
        grad = -_DEPTH_SCALE * slope(sample, squash(-sample)) * grad_vectors[r, j]
        raw = outputs[lo + r, 1]
        mean, std = _moments_back(grad, raw, normal[b, k, j], grad_record[b, k], j, size)
        grads[lo + r, 0], grads[lo + r, 1] = mean, std
        for i in range(passed):
            grads[lo + r, 2 + i] = grad_own[r, i]


@part
def _what_back(
    first, last, start, n, order, outputs, normal, grad_record, grad_own, grad_vectors, grads
):
    """From vectors and the inputs of depth to the outputs of the encoder."""
    lo, size = start * len(order) + first * n, normal.shape[2]
    what = size - BOX - 1
    passed = grad_own.shape[1] - BOX - what
    for r in range((last - first) * n):
        b, k = start + r % n, order[first + r // n]
        for i in range(BOX + what):
            grad_vectors[r, i] += grad_own[r, passed + i]
        for i in range(what):
            j = BOX + i
            raw = outputs[lo + r, what + i]
            mean, std = _moments_back(
                grad_vectors[r, j], raw, normal[b, k, j], grad_record[b, k], j, size
            )
            grads[lo + r, i], grads[lo + r, what + i] = mean, std


@part
def _where_back(
    first, last, start, n, order, constants, outputs, normal, record, grad_record, grad_own,
    grad_vectors, grad_boxes, grads,
):  # fmt: skip
    """From vectors and boxes to the outputs of where, and what depth was passed."""
    scale, to_pixels = constants[0], constants[2]
    lo, size = start * len(order) + first * n, normal.shape[2]
    passed = grads.shape[1] - 2 * BOX
    for r in range((last - first) * n):
        b, k = start + r % n, order[first + r // n]
        for i in range(BOX):  # y, x, h, w
            edge = 1 - i % 2
            low = grad_boxes[r, edge] + grad_record[b, k, 3 * size + 2 + edge]
            high = grad_boxes[r, 2 + edge] + grad_record[b, k, 3 * size + 4 + edge]
            pixels = low + high if i < 2 else _HALF * (high - low)
            sample = record[b, k, 2 * size + i]
            placed_slope = scale[i] * slope(sample, squash(sample))
            grad = (grad_vectors[r, i] + pixels * to_pixels[i]) * placed_slope
            raw = outputs[lo + r, BOX + i]
            mean, std = _moments_back(grad, raw, normal[b, k, i], grad_record[b, k], i, size)
            grads[lo + r, i], grads[lo + r, BOX + i] = mean, std
        for i in range(passed):
            grads[lo + r, 2 * BOX + i] = grad_own[r, i]


@part
def _first_layers_back(first, last, start, n, order, where, depth, pres, grad_added, grad_products):
    """The gradients of three first layers side by side, in rows and in raster order."""
    lo, h = start * len(order) + first * n, where.shape[1]
    for r in range((last - first) * n):
        b, k = start + r % n, order[first + r // n]
        row = grad_added[lo + r]
        for i in range(h):
            row[i] = where[lo + r, i]
            row[h + i] = depth[lo + r, i]
            row[2 * h + i] = pres[lo + r, i]
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
    start,
    stop,
    grid,
    numbers,
    images,
    normal,
    record,
    grad_record,  # [B, K, 3 M + 6]
    context_weight,
    where,
    encoder,
    depth,
    pres,
    grad_where,  # a tuple of [R, outputs] for each layer, before its activation; to be filled
    grad_encoder,  # likewise
    grad_depth,
    grad_pres,
    grad_added,  # [R, 3 h] to be filled, as is what follows
    grad_products,  # [B, K, 3 h]
    grad_edges,  # [B, V]
):
    """Gradients of all that was added and drawn; with training wheels of the encoder's alone."""
    starts, order = grid.starts, grid.order
    n, num_cells, size = stop - start, len(order), normal.shape[2]
    most = _most_rows(starts, n)
    relu = numbers.relu
    lateral = context_weight.shape[1] > 0
    here = images[start:stop]
    grad_contexts = np.empty((num_cells * n, context_weight.shape[1]), np.float32)
    grad_vectors = np.zeros((most, size + 1), np.float32)
    grad_pres_own = np.zeros((most, pres.inputs.shape[1]), np.float32)
    grad_depth_own = np.zeros((most, depth.inputs.shape[1]), np.float32)
    grad_glimpses = np.empty((most, encoder.inputs.shape[1]), np.float32)
    grad_boxes = np.empty((most, BOX), np.float32)
    boxes = np.empty((most, BOX), np.float32)
    for t in range(len(starts) - 2, -1, -1):
        first, last = starts[t], starts[t + 1]
        rows = (last - first) * n
        lo = start * num_cells + first * n
        hi = lo + rows
        if numbers.training_wheels:
            _what_back(
                first, last, start, n, order, encoder.values[-1], normal, grad_record,
                grad_depth_own, grad_vectors, grad_encoder[-1],
            )  # fmt: skip
            _backward(lo, hi, encoder, grad_encoder, relu)
            continue
        _vectors_back(first, last, n, grid.followers, grad_contexts, grad_vectors)
        _presence_back(
            first, last, start, n, order, numbers.temperature, pres.values[-1], record,
            grad_record, grad_vectors, grad_pres[-1],
        )  # fmt: skip
        _backward(lo, hi, pres, grad_pres, relu)
        np.dot(grad_pres[0][lo:hi], pres.own, grad_pres_own[:rows])
        _depth_back(
            first, last, start, n, order, depth.values[-1], normal, record, grad_record,
            grad_pres_own, grad_vectors, grad_depth[-1],
        )  # fmt: skip
        _backward(lo, hi, depth, grad_depth, relu)
        np.dot(grad_depth[0][lo:hi], depth.own, grad_depth_own[:rows])
        _what_back(
            first, last, start, n, order, encoder.values[-1], normal, grad_record, grad_depth_own,
            grad_vectors, grad_encoder[-1],
        )  # fmt: skip
        _backward(lo, hi, encoder, grad_encoder, relu)
        np.dot(grad_encoder[0][lo:hi], encoder.own, grad_glimpses[:rows])
        for r in range(rows):
            for i in range(BOX):
                cell = record[start + r % n, order[first + r // n]]
                boxes[r, i] = cell[3 * size + 2 + i]
        glimpses = grad_glimpses[:rows].reshape((rows, images.shape[1], numbers.size, -1))
        glimpses_backward(glimpses, here, boxes[:rows], grad_boxes)
        _where_back(
            first, last, start, n, order, numbers.constants, where.values[-1], normal, record,
            grad_record, grad_depth_own, grad_vectors, grad_boxes, grad_where[-1],
        )  # fmt: skip
        _backward(lo, hi, where, grad_where, relu)
        _first_layers_back(
            first, last, start, n, order, grad_where[0], grad_depth[0], grad_pres[0], grad_added,
            grad_products,
        )  # fmt: skip
        if lateral:
            np.dot(grad_added[lo:hi], context_weight, grad_contexts[first * n : last * n])
    if lateral and not numbers.training_wheels:
        _edges_back(start, n, grid.neighbours, grad_contexts, grad_edges)
