"""The loop over the cells as one scan, for graphs that other programs run.

The mathematics is that of `SPAIR.encode_wave`. A trace writes the readable loop down wave by wave,
about 110 operations each; the body of a scan is written once, so a graph has one size for any grid.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spairkit.models.spair import SPAIR
from spairkit.models.wavefront import LOOKBACK, even_waves

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]

try:
    # as torch documents it: a prototype without a public name
    from torch._higher_order_ops import scan
except ImportError:
    scan = None  # type: ignore[assignment]

has_scan = callable(scan)
"""Whether torch has a scan; without it a graph repeats the body of the loop for each wave."""


def scan_cells(network: SPAIR, images: Tensor) -> Outputs:  # [B, 3, H, W] in [0, 1]
    """Boxes, logits of presence, what and depth of all cells, as `SPAIR.means` gives them.

    To be traced: `even_waves` of the grid has to be cached before, or it would keep tensors of the
    tracer.

    Returns:
        [B, K, 4] xyxy in pixels, [B, K], [B, K, A] and [B, K], in raster order.
    """
    products, rest = network.first_layers(images)
    rows, columns = network.grid(images.shape[-2], images.shape[-1])
    waves = even_waves(rows, columns)
    context_weights = torch.cat(rest[0])
    lateral = network.config.lateral
    edge = network.edge_object().expand(1, images.shape[0], -1) if lateral else None

    def step(window: Tensor, wave: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Outputs]:
        product, corners, neighbours = wave
        if edge is not None:
            context = torch.cat([edge, window])[neighbours]  # [n, 4, B, V]
            context = context.transpose(1, 2).flatten(2)
            product = product + F.linear(context, context_weights)
        latents, vectors = network.encode_wave(images, product, corners, None, False, False, None)
        outputs = latents.boxes, latents.presence_logit, latents.what, latents.depth
        # no output of a scan may share memory with another one
        copies = tuple(output.clone() for output in outputs)
        return torch.cat([window[len(vectors) :], vectors]), copies  # type: ignore[return-value]

    corners = torch.stack([waves.order // columns, waves.order % columns], dim=-1)
    corners = corners[:, :, None].to(images.dtype)  # [T, n, 1, 2] row and column
    window = images.new_zeros(LOOKBACK * waves.order.shape[1], images.shape[0], network.vector)
    products = products.transpose(0, 1)[waves.order]  # [T, n, B, 3 hidden]
    loop = scan if has_scan else _unrolled
    _, found = loop(step, window, (products, corners, waves.neighbours))
    boxes, logit, what, depth = (x.flatten(0, 1)[waves.places].transpose(0, 1) for x in found)
    return boxes, logit.squeeze(-1), what, depth.squeeze(-1)


def _unrolled(
    step: Callable[[Tensor, Any], tuple[Tensor, Outputs]], window: Tensor, waves: tuple[Tensor, ...]
) -> tuple[Tensor, list[Tensor]]:
    """The result of torch's scan."""
    outputs = []
    for wave in zip(*waves, strict=True):
        window, output = step(window, wave)
        outputs.append(output)
    return window, [torch.stack(values) for values in zip(*outputs, strict=True)]
