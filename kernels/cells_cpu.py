"""Numba twins of `spairkit.cell_steps`, float32: whole arrays, and of them the rows of a wave.

Shapes are those of `spairkit.cell_loop`: V = M + 1 = 4 + A + 2. NaN goes the way of the numbers. A
wave takes microseconds, so that it is not spread over threads.
"""

import numpy as np

from spairkit.kernels.threads import compiled, inlined

_HALF = np.float32(0.5)
_ONE = np.float32(1.0)
_TWO = np.float32(2.0)
_LOGIT_LIMIT = np.float32(10.0)  # as in spairkit.densities
_DEPTH_SCALE = np.float32(4.0)  # as in spairkit.cell_steps
_BOX = 4


@inlined
def _clip(logit):
    if logit > _LOGIT_LIMIT:
        logit = _LOGIT_LIMIT
    elif logit < -_LOGIT_LIMIT:
        logit = -_LOGIT_LIMIT
    return logit


@inlined
def _squash(logit):
    return _ONE / (_ONE + np.exp(-_clip(logit)))


@compiled
def draw_where(
    start,
    stop,
    constants,  # [3, 4] scale, shift, to_pixels
    outputs,  # [R, 8 + S] means, raws, passed on
    normal,  # [R, M]
    corners,  # [R, 4]
    samples,  # [R, M]
    boxes,  # [R, 4]
    depth_own,  # [R, S + 4 + A]
):
    scale, shift, to_pixels = constants
    passed = outputs.shape[1] - 2 * _BOX
    pixels = np.empty(_BOX, np.float32)
    for r in range(start, stop):
        for i in range(passed):
            depth_own[r, i] = outputs[r, 2 * _BOX + i]
        for i in range(_BOX):
            std = _TWO * _squash(outputs[r, _BOX + i])
            sample = outputs[r, i] + std * normal[r, i]
            placed = shift[i] + scale[i] * _squash(sample)
            pixels[i] = corners[r, i] + placed * to_pixels[i]
            samples[r, i] = sample
            depth_own[r, passed + i] = placed
        for i in range(2):  # x, y
            low = pixels[1 - i] - _HALF * pixels[3 - i]
            boxes[r, i] = low
            boxes[r, 2 + i] = low + pixels[3 - i]


@compiled
def draw_what(
    start,
    stop,
    outputs,  # [R, 2 A] means, raws
    normal,  # [R, M]
    samples,  # [R, M]
    depth_own,  # [R, S + 4 + A]
):
    what = outputs.shape[1] // 2
    first = depth_own.shape[1] - what
    for r in range(start, stop):
        for i in range(what):
            std = _TWO * _squash(outputs[r, what + i])
            sample = outputs[r, i] + std * normal[r, _BOX + i]
            samples[r, _BOX + i] = sample
            depth_own[r, first + i] = sample


@compiled
def draw_depth(
    start,
    stop,
    outputs,  # [R, 2 + S] mean, raw, passed on
    normal,  # [R, M]
    depth_own,  # [R, S + 4 + A]
    samples,  # [R, M]
    presence_own,  # [R, S + 4 + A + 1]
):
    passed, last = outputs.shape[1] - 2, depth_own.shape[1]
    depth = samples.shape[1] - 1
    for r in range(start, stop):
        for i in range(passed):
            presence_own[r, i] = outputs[r, 2 + i]
        for i in range(passed, last):
            presence_own[r, i] = depth_own[r, i]
        sample = outputs[r, 0] + _TWO * _squash(outputs[r, 1]) * normal[r, depth]
        samples[r, depth] = sample
        presence_own[r, last] = _DEPTH_SCALE * _squash(-sample)


@compiled
def draw_presence(
    start,
    stop,
    temperature,
    logits,  # [R, 1] of pres
    jitter,  # [R, 1]
    presence_own,  # [R, S + 4 + A + 1]
    presence,  # [R, 1]
    vectors,  # [R, V]
):
    size = vectors.shape[1] - 1
    passed = presence_own.shape[1] - size
    sharpness = _ONE / np.float32(temperature)
    for r in range(start, stop):
        logit = _clip(logits[r, 0]) * sharpness + jitter[r, 0]
        present = _ONE / (_ONE + np.exp(-logit))
        presence[r, 0] = present
        for i in range(size):
            vectors[r, i] = presence_own[r, passed + i]
        vectors[r, size] = present


@compiled
def vector_back(
    start,
    stop,
    grad_contexts,  # [4 (R + B), V]
    uses,  # [R, 4] rows of grad_contexts where the row's vector is read
    grad_vectors,  # [R, V]
):
    size = grad_vectors.shape[1]
    for r in range(start, stop):
        a, b, c, d = uses[r, 0], uses[r, 1], uses[r, 2], uses[r, 3]
        for i in range(size):
            grad = grad_contexts[a, i] + grad_contexts[b, i]
            grad_vectors[r, i] = grad + grad_contexts[c, i] + grad_contexts[d, i]


@compiled
def depth_back(
    start,
    stop,
    grad_presence_own,  # [R, S + M]
    slope_nearness,  # [R, 1]
    grad_means,  # [R, M]
    grad_raws,  # [R, M]
    levers,  # [R, M]
    grad_vectors,  # [R, V]
    grad_outputs,  # [R, 2 + S]
):
    passed, last = grad_outputs.shape[1] - 2, levers.shape[1] - 1
    for r in range(start, stop):
        for i in range(last + 1):
            grad_vectors[r, i] += grad_presence_own[r, passed + i]
        grad = grad_vectors[r, last] * slope_nearness[r, 0]
        grad_outputs[r, 0] = grad_means[r, last] + grad
        grad_outputs[r, 1] = grad_raws[r, last] + grad * levers[r, last]
        for i in range(passed):
            grad_outputs[r, 2 + i] = grad_presence_own[r, i]


@compiled
def what_back(
    start,
    stop,
    grad_depth_own,  # [R, S + M - 1]
    grad_means,  # [R, M]
    grad_raws,  # [R, M]
    levers,  # [R, M]
    grad_vectors,  # [R, V]
    grad_outputs,  # [R, 2 A]
):
    what = grad_outputs.shape[1] // 2
    passed = grad_depth_own.shape[1] - _BOX - what
    for r in range(start, stop):
        for i in range(_BOX + what):
            grad_vectors[r, i] += grad_depth_own[r, passed + i]
        for i in range(what):
            k = _BOX + i
            grad = grad_vectors[r, k]
            grad_outputs[r, i] = grad_means[r, k] + grad
            grad_outputs[r, what + i] = grad_raws[r, k] + grad * levers[r, k]


@compiled
def where_back(
    start,
    stop,
    constants,  # [3, 4] scale, shift, to_pixels
    grad_vectors,  # [R, V]
    grad_depth_own,  # [R, S + M - 1]
    grad_boxes,  # [R, 4]
    slope_placed,  # [R, 4]
    grad_means,  # [R, M]
    grad_raws,  # [R, M]
    levers,  # [R, M]
    grad_outputs,  # [R, 8 + S]
):
    to_pixels = constants[2]
    passed = grad_outputs.shape[1] - 2 * _BOX
    for r in range(start, stop):
        for i in range(_BOX):  # y, x, h, w
            k = 1 - i % 2
            low, high = grad_boxes[r, k], grad_boxes[r, 2 + k]
            pixels = low + high if i < 2 else _HALF * (high - low)
            grad = (grad_vectors[r, i] + pixels * to_pixels[i]) * slope_placed[r, i]
            grad_outputs[r, i] = grad_means[r, i] + grad
            grad_outputs[r, _BOX + i] = grad_raws[r, i] + grad * levers[r, i]
        for i in range(passed):
            grad_outputs[r, 2 * _BOX + i] = grad_depth_own[r, i]
