"""The compositing renderer: draws objects with boxes, depths and presences on a background.

`render` is Algorithm 1 of the supplement (section C) with the rim of the authors' renderer. This
file checks the arguments, chooses an implementation and contains the readable one, in plain torch.
"""

import torch
from torch import Tensor

from spairkit.backends import Backend, chosen_backend
from spairkit.kernels.constants import MIN_IMPORTANCE, MIN_SIDE
from spairkit.kernels.render_op import render_op

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_TRITON_COLOURS = (1, 3)  # with alpha a power of two, as the shapes of Triton are


def render(
    rgba: Tensor,  # [B, N, h, w, C + 1]
    boxes: Tensor,  # [B, N, 4]
    depth: Tensor,  # [B, N]
    presence: Tensor,  # [B, N]
    background: Tensor,  # [B, C, H, W] or [B, C, 1, 1]
    *,
    size: tuple[int, int] | None = None,
    importance_floor: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:  # [B, C, H, W]
    """The image of all objects, blended by transparency and importance over the background.

    Object maps are placed in their boxes by bilinear interpolation between pixel centres. Beyond
    the texels of a map, alpha and importance are 0 and the colour is that of the background: an
    object fades out over its outermost texel, and the image is continuous in the box. Primes denote
    values at a pixel: alpha' is the interpolated alpha * presence, o' the interpolated colour, and
    gamma' the interpolated importance max(alpha * presence * sigmoid(-depth), importance_floor).

        image = background + sum gamma' alpha' (o' - background) / sum gamma'

    A pixel shows exactly the background if the sum of gamma' is at most 1e-30, as it is if all
    presences are 0. All tensors get gradients, which are 0 where nothing contributes. NaN in an
    object gives NaN at the pixels that it covers, or slightly beyond; a coordinate that is not
    finite gives NaN in its whole image.

    Args:
        rgba: [B, N, h, w, C + 1] in [0, 1], alpha last; float32, float16 or bfloat16 with float32
            arithmetic, or float64 on the torch backend. C from 1 to 4, h and w from 2 to 64.
        boxes: [B, N, 4] x1, y1, x2, y2 in pixels, half-open. A box may leave the image; one that
            is empty or inverted (a side under 1e-6 px) contributes nothing and gets no gradient.
        depth: [B, N] z_depth; lower is nearer.
        presence: [B, N] z_pres in [0, 1].
        background: [B, C, H, W] in [0, 1], or [B, C, 1, 1] for one colour per image, with `size`.
        size: (H, W) of the image in pixels if the background is one colour; default: the size of
            the background.
        importance_floor: lower bound of a texel's importance. 0 is the supplement. The authors'
            renderer has 0.01: absent objects still blend in background where boxes overlap.
        backend: "torch", "cpu" (Numba), "triton" (GPU, or Triton's interpreter), or "auto": by
            the device of `rgba`. Only "torch" has second derivatives and float64. Triton draws 1
            or 3 colours, and "auto" takes plain torch on a GPU for others.

    Returns:
        [B, C, H, W] float32, or float64 if `rgba` is.

    Raises:
        ValueError: the rank, shape, dtype, device or value of an argument is wrong; the message
            names it.

    A white square of 2 x 2 texels in a box of 2 x 2 pixels:

    >>> square = torch.ones(1, 1, 2, 2, 4)
    >>> boxes = torch.tensor([[[1.0, 1.0, 3.0, 3.0]]])
    >>> depth, presence = torch.zeros(1, 1), torch.ones(1, 1)
    >>> black = torch.zeros(1, 3, 4, 4)
    >>> render(square, boxes, depth, presence, black)[0, 0]
    tensor([[0., 0., 0., 0.],
            [0., 1., 1., 0.],
            [0., 1., 1., 0.],
            [0., 0., 0., 0.]])

    Source: Algorithm 1 of the supplement, section C; rim and floor from the authors' code.
    """
    _check(rgba, boxes, depth, presence, background, size, importance_floor)
    if size is not None:
        background = background.expand(-1, -1, *size)
    dtype = torch.float64 if rgba.dtype == torch.float64 else torch.float32
    placed = boxes.to(dtype), depth.to(dtype), presence.to(dtype), background.to(dtype)
    chosen = chosen_backend(backend, rgba, "rgba")
    if chosen == "triton" and rgba.shape[-1] - 1 not in _TRITON_COLOURS:
        if backend == "triton":
            raise ValueError(
                f"backend 'triton' draws 1 or 3 colours, got {rgba.shape[-1] - 1}: "
                "use backend='torch'"
            )
        chosen = "torch"
    if chosen != "torch":
        image: Tensor = render_op(rgba, *placed, importance_floor, chosen)[0]
        return image
    with torch.autocast(rgba.device.type, enabled=False):
        return _render_torch(rgba.to(dtype), *placed, importance_floor)


def _check(
    rgba: Tensor,
    boxes: Tensor,
    depth: Tensor,
    presence: Tensor,
    background: Tensor,
    size: tuple[int, int] | None,
    importance_floor: float,
) -> None:
    if rgba.dim() != 5:
        raise ValueError(f"rgba must be [B, N, h, w, C + 1], got shape {tuple(rgba.shape)}")
    num_images, num_objects, height, width, channels = rgba.shape
    if not 2 <= channels <= 5:
        raise ValueError(f"rgba must have 1 to 4 colours and alpha, got {channels} channels")
    if not (2 <= height <= 64 and 2 <= width <= 64):
        raise ValueError(f"rgba must have 2 to 64 texels per side, got {height}x{width}")
    wanted = {
        "boxes": (boxes, (num_images, num_objects, 4)),
        "depth": (depth, (num_images, num_objects)),
        "presence": (presence, (num_images, num_objects)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} to match rgba, got {tuple(tensor.shape)}"
            )
    if background.dim() != 4 or background.shape[:2] != (num_images, channels - 1):
        raise ValueError(
            f"background must be [{num_images}, {channels - 1}, H, W] to match rgba, "
            f"got shape {tuple(background.shape)}"
        )
    if size is not None and not (
        isinstance(size, tuple)
        and len(size) == 2
        and all(isinstance(n, int | torch.SymInt) and n > 0 for n in size)
    ):
        raise ValueError(f"size must be two positive integers (H, W), got {size!r}")
    if size is not None and background.shape[2:] not in ((1, 1), tuple(size)):
        raise ValueError(
            f"size {tuple(size)} needs a background of [B, C, 1, 1], "
            f"got shape {tuple(background.shape)}"
        )
    for name, tensor in {
        "rgba": rgba,
        **{name: tensor for name, (tensor, _) in wanted.items()},
        "background": background,
    }.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.device != rgba.device:
            raise ValueError(
                f"{name} must be on the device of rgba, {rgba.device}, got {tensor.device}"
            )
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} must have 16, 32 or 64 bits, got {tensor.dtype}")
        if tensor.dtype == torch.float64 and rgba.dtype != torch.float64:
            raise ValueError(f"{name} is float64, so rgba must be too, got {rgba.dtype}")
    if not 0.0 <= importance_floor < float("inf"):
        raise ValueError(f"importance_floor must be finite and at least 0, got {importance_floor}")


def _render_torch(
    rgba: Tensor,
    boxes: Tensor,
    depth: Tensor,
    presence: Tensor,
    background: Tensor,
    importance_floor: float,
) -> Tensor:
    height, width = background.shape[-2:]
    boxes = torch.where(boxes.isfinite().all(-1, keepdim=True), boxes, torch.nan)
    x1, y1, x2, y2 = boxes.unbind(-1)
    empty = (x2 - x1 < MIN_SIDE) | (y2 - y1 < MIN_SIDE)
    rows = taps(y1, y2, empty, rgba.shape[2], height)  # [B, N, H, h]
    columns = taps(x1, x2, empty, rgba.shape[3], width)  # [B, N, W, w]

    colour, alpha = rgba[..., :-1], rgba[..., -1]
    alpha = alpha * presence[..., None, None]
    importance = alpha * torch.sigmoid(-depth)[..., None, None]
    if importance_floor > 0:
        importance = importance.clamp(min=importance_floor)
    maps = torch.cat([colour, alpha[..., None], importance[..., None]], dim=-1)
    maps = maps.permute(0, 1, 4, 2, 3)  # [B, N, C + 2, h, w]
    values = rows[:, :, None] @ maps @ columns.mT[:, :, None]  # [B, N, C + 2, H, W]
    colour, alpha, importance = values.split([rgba.shape[-1] - 1, 1, 1], dim=2)

    # taps beyond the map have the colour of the background and add nothing to o' - background
    cover = rows.sum(-1)[:, :, None, :, None] * columns.sum(-1)[:, :, None, None, :]
    change = (importance * alpha * (colour - cover * background[:, None])).sum(1)
    total = importance.sum(1)  # [B, 1, H, W]
    untouched = total <= MIN_IMPORTANCE
    change = torch.where(untouched, torch.zeros_like(change), change)
    return background + change / torch.where(untouched, torch.ones_like(total), total)


def taps(low: Tensor, high: Tensor, empty: Tensor, num_texels: int, num_pixels: int) -> Tensor:
    """[B, N, pixels, texels]: the weight of every texel at every pixel, on one axis."""
    side = torch.where(empty, torch.ones_like(low), high - low)[..., None]
    pixel = torch.arange(num_pixels, dtype=low.dtype, device=low.device) + 0.5
    texel = torch.arange(num_texels, dtype=low.dtype, device=low.device)
    # divided first: the gradient of num_texels / side would overflow at sides of 1e38
    position = (pixel - low[..., None]) / side * num_texels - 0.5  # [B, N, pixels]
    weight = torch.relu(1 - (position[..., None] - texel).abs())
    return torch.where(empty[..., None, None], torch.zeros_like(weight), weight)
