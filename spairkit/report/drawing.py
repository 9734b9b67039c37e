"""Pictures of explanations: boxes, reconstructions, galleries of objects.

Pictures are [3, H, W] uint8 tensors, as `spairkit.images.write_png` takes them. Small images are
enlarged by a whole factor, so that nothing is blurred. An object has one colour throughout a
picture, for its box and its frame in the gallery.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from spairkit.detections import Detections, Explanation, Truth
from spairkit.images import commonest_colour
from spairkit.label_images import rims

COLOURS = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 186, 140),
    (240, 228, 66),
    (255, 122, 64),
    (222, 145, 190),
)
"""Colours of the boxes, in turn: the lighter ones of Okabe and Ito, which colour-blind people can
tell apart, with green, vermilion and purple lightened."""

MAX_OBJECTS = 24
"""Objects in a gallery, those of highest score."""

_PAPER = (255, 255, 255)
_INK = (40, 44, 52)
_FAINT = (120, 124, 132)
_SHADOW = (0, 0, 0)
_TRUE = (255, 255, 255)
_RIM = (255, 242, 153)
_RIM_ALPHA = 160  # of 255

_GAP = 16
_LEGIBLE_SIDE = 384  # pixels; least length of an image's longer side
_MAX_SCALE = 16
_TILE_SIDE = 192  # the same for an image in a sheet
_MAX_TILE_SIDE = 512
_MAX_PANEL_SIDE = 1024
_MAX_SHEET_WIDTH = 1680
_MAX_COLUMNS = 8
_OBJECT_SIDE = 84


def draw_boxes(
    image: Tensor,  # [3, H, W]
    detections: Detections,
    scale: float = 1,
    truth: Truth | None = None,
) -> Image.Image:
    """The image, enlarged or reduced, with a line around each box; lines run outside the boxes.

    Masks have pale yellow rims, which lie under the lines.

    Args:
        image: [3, H, W] in [0, 1].
        detections: boxes that are empty, inverted or not finite are not drawn.
        scale: a whole enlargement, or a reduction below 1.
        truth: true boxes, marked by white corners.

    Raises:
        ValueError: `image` is not [3, H, W], or masks are not [H, W].
    """
    picture = _picture(image, scale)
    if detections.label_image is not None:
        _mark_rims(picture, detections.masks, image)
    if truth is not None:
        _mark_truth(picture, truth, scale)
    _mark(picture, detections, scale)
    return picture


def panel(explanation: Explanation) -> Tensor:  # [3, H', W'] uint8
    """One picture of one image: the image, its boxes, its reconstruction and its objects.

    Objects are sorted by score, 24 at most, each on the commonest colour of the image. An image
    longer than 1,024 pixels is reduced to that.

    Raises:
        ValueError: shapes do not fit each other.
    """
    image, detections = explanation.image, explanation.detections
    appearances = explanation.appearances
    height, width = image.shape[1:]
    scale = _scale(height, width, _LEGIBLE_SIDE, _MAX_PANEL_SIDE)
    found = _count(len(detections), "found")
    if detections.counts is not None:
        found = f"{found} ({detections.counts})"
    pictures = [
        _captioned(_picture(image, scale), f"image, {width} by {height} px"),
        _captioned(draw_boxes(image, detections, scale), found),
        _captioned(_picture(explanation.reconstruction, scale), "reconstruction"),
    ]
    parts = [_beside(pictures)]
    if appearances.shape[:1] + appearances.shape[3:] != (len(detections), 4):
        raise ValueError(
            f"appearances must be [{len(detections)}, P, P, 4], got {list(appearances.shape)}"
        )
    ground = commonest_colour(image).double().numpy()
    parts.append(_gallery(detections, appearances, ground, parts[0].width))
    return _tensor(_below(parts))


def reconstruction_sheet(
    explanations: Sequence[Explanation], truth: Sequence[Truth] | None = None
) -> Tensor:  # [3, H', W'] uint8
    """A sheet of images with boxes above their reconstructions; white corners mark true boxes.

    Args:
        explanations: of images of one size; each becomes at most 512 pixels long.
        truth: one per image, where it is known.

    Raises:
        ValueError: shapes or lengths do not fit each other, or there is no image.
    """
    if not explanations:
        raise ValueError("explanations must hold at least one image, got none")
    if truth is not None and len(truth) != len(explanations):
        raise ValueError(f"truth must hold {len(explanations)} images, got {len(truth)}")
    height, width = explanations[0].image.shape[1:]
    scale = _scale(height, width, _TILE_SIDE, _MAX_TILE_SIDE)
    pairs = []
    for b, explanation in enumerate(explanations):
        found, true = explanation.detections, None if truth is None else truth[b]
        boxed = draw_boxes(explanation.image, found, scale, true)
        drawn = _picture(explanation.reconstruction, scale)
        number = _count(len(found), "found")
        caption = number if true is None else f"{len(found)} found, {len(true)} there"
        pairs.append(_captioned(_below([boxed, drawn], gap=4), caption))
    widest = max(pair.width for pair in pairs)
    fitting = max(1, min(_MAX_COLUMNS, _MAX_SHEET_WIDTH // (widest + _GAP)))
    columns = -(-len(pairs) // -(-len(pairs) // fitting))  # rows of equal length, if they can be
    rows = [pairs[i : i + columns] for i in range(0, len(pairs), columns)]
    return _tensor(_below([_beside(row) for row in rows]))


def _mark(picture: Image.Image, detections: Detections, scale: float) -> None:
    """Draws a line around each box; boxes of higher score lie on top."""
    boxes = _corners(detections.boxes, scale, picture)
    scores = detections.scores.detach().cpu().double().numpy()
    visible = [
        i
        for i in np.argsort(-scores, kind="stable").tolist()
        if (boxes[i, 2:] > boxes[i, :2]).all()
    ]
    draw = ImageDraw.Draw(picture)
    line = max(1, round(max(picture.size) ** 0.5 / 10))
    for i in reversed(visible):
        x1, y1, x2, y2 = np.round(boxes[i]).astype(int).tolist()
        for grown, colour, width in ((line + 2, _SHADOW, line + 2), (line + 1, _colour(i), line)):
            # at the rim of the picture the line of a box lies inside
            outline = (
                max(x1 - grown, min(x1, 0)),
                max(y1 - grown, min(y1, 0)),
                min(x2 + grown, max(x2, picture.width)) - 1,
                min(y2 + grown, max(y2, picture.height)) - 1,
            )
            draw.rectangle(outline, outline=colour, width=width)


def _mark_rims(picture: Image.Image, masks: Tensor, image: Tensor) -> None:
    """Draws the rim of each mask, one pixel of the picture wide."""
    if masks.shape != image.shape[1:]:
        raise ValueError(f"masks must be {list(image.shape[1:])}, got {list(masks.shape)}")
    rim = rims(masks, picture.height, picture.width)
    picture.paste(_RIM, mask=Image.fromarray(rim.astype(np.uint8) * _RIM_ALPHA))


def _mark_truth(picture: Image.Image, truth: Truth, scale: float) -> None:
    """Draws the corners of each true box, white beside black."""
    draw = ImageDraw.Draw(picture)
    for x1, y1, x2, y2 in _corners(truth.boxes, scale, picture).round().astype(int).tolist():
        if x2 <= x1 or y2 <= y1:
            continue
        arm = max(3, min(x2 - x1, y2 - y1) // 4)
        for x, along in ((x1, 1), (x2 - 1, -1)):
            for y, down in ((y1, 1), (y2 - 1, -1)):
                for shift, colour in ((1, _SHADOW), (0, _TRUE)):
                    u, v = x + shift * along, y + shift * down
                    draw.line((u + arm * along, v, u, v, u, v + arm * down), fill=colour)


def _gallery(
    detections: Detections,
    appearances: Tensor,  # [n, P, P, 4]
    ground: npt.NDArray[np.float64],  # [3]
    width: int,
) -> Image.Image:
    """The objects in rows of at most `width` pixels."""
    title = "objects by score" if len(detections) else "no object to show"
    scores = detections.scores.detach().cpu()
    order = scores.argsort(descending=True, stable=True)[:MAX_OBJECTS].tolist()
    cells = [
        _captioned(_object(appearances[i], ground, _colour(i)), f"{scores[i]:.2f}") for i in order
    ]
    if len(detections) > MAX_OBJECTS:
        more, text = (
            Image.new("RGB", cells[0].size, _PAPER),
            f"{len(detections) - MAX_OBJECTS} more",
        )
        centre = (more.width // 2, more.height // 2)
        ImageDraw.Draw(more).text(centre, f"and {text}", fill=_FAINT, font=_font(14), anchor="mm")
        cells.append(more)
    columns = max(1, (width + _GAP) // (max((c.width for c in cells), default=1) + _GAP))
    rows = [_beside(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    return _below([_line(title), *rows], gap=8)


def _object(
    rgba: Tensor,  # [P, P, 4]
    ground: npt.NDArray[np.float64],  # [3]
    colour: tuple[int, int, int],
) -> Image.Image:
    """An appearance map on a ground of one colour, with a frame."""
    scale = max(1, _OBJECT_SIDE // max(rgba.shape[:2]))
    values = rgba.detach().cpu().float().nan_to_num().clamp(0, 1).numpy()
    values = values.repeat(scale, axis=0).repeat(scale, axis=1)
    alpha = values[..., 3:]
    blended = ground + alpha * (values[..., :3] - ground)
    tile = Image.fromarray((blended * 255).round().astype(np.uint8))
    return ImageOps.expand(tile, 3, colour)


def _scale(height: int, width: int, side: int, max_side: int) -> float:
    """A whole factor, to `side` pixels or more; below 1 for images longer than `max_side`."""
    longer = max(height, width)
    return min(_MAX_SCALE, -(-side // longer)) if longer <= max_side else max_side / longer


def _picture(image: Tensor, scale: float) -> Image.Image:
    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image must be [3, H, W], got {list(image.shape)}")
    values = image.detach().cpu().float().nan_to_num().clamp(0, 1)
    levels = (values * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    picture = Image.fromarray(levels.numpy())
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    way = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    return picture.resize(size, way)


def _corners(boxes: Tensor, scale: float, picture: Image.Image) -> npt.NDArray[np.float64]:
    """Boxes in pixels of the picture, clipped not far outside it; empty if not finite."""
    corners: npt.NDArray[np.float64] = boxes.detach().cpu().double().numpy().reshape(-1, 4)
    corners = np.where(np.isfinite(corners).all(1, keepdims=True), corners * scale, 0.0)
    size = np.array(picture.size * 2)
    return np.clip(corners, -size, 2 * size)


def _captioned(picture: Image.Image, caption: str) -> Image.Image:
    return _below([_line(caption), picture], gap=4)


def _line(text: str) -> Image.Image:
    font = _font(14)
    ascent, descent = font.getmetrics()
    line = Image.new("RGB", (round(font.getlength(text)) + 2, ascent + descent + 2), _PAPER)
    ImageDraw.Draw(line).text((0, 0), text, fill=_INK, font=font)
    return line


def _beside(pictures: Sequence[Image.Image]) -> Image.Image:
    width = sum(p.width for p in pictures) + _GAP * (len(pictures) - 1)
    joined = Image.new("RGB", (width, max(p.height for p in pictures)), _PAPER)
    x = 0
    for picture in pictures:
        joined.paste(picture, (x, 0))
        x += picture.width + _GAP
    return joined


def _below(pictures: Sequence[Image.Image], gap: int = _GAP) -> Image.Image:
    height = sum(p.height for p in pictures) + gap * (len(pictures) - 1)
    joined = Image.new("RGB", (max(p.width for p in pictures), height), _PAPER)
    y = 0
    for picture in pictures:
        joined.paste(picture, (0, y))
        y += picture.height + gap
    return joined


def _count(number: int, word: str) -> str:
    return f"{number} {'object' if number == 1 else 'objects'} {word}"


def _colour(index: int) -> tuple[int, int, int]:
    return COLOURS[index % len(COLOURS)]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font."""
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType, which draws its text")
    return font


def _tensor(picture: Image.Image) -> Tensor:
    picture = ImageOps.expand(picture, _GAP, _PAPER)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
