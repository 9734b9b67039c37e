"""Pictures of what was found: boxes, reconstructions, galleries. Arrays in, arrays out.

Every function returns a [3, H, W] uint8 tensor, as `spairkit.images.write_png` takes it. Small
images are enlarged by a whole factor, pixel by pixel, so that labels are legible beside them and
nothing is blurred. A found object has one colour throughout a picture: of its box, its label and
its frame in the gallery.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from spairkit.detections import Detections, Explanation, Truth
from spairkit.images import commonest_colour

COLOURS = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 186, 140),
    (240, 228, 66),
    (255, 122, 64),
    (222, 145, 190),
)
"""Of the boxes, in turn: Okabe and Ito's, which colour-blind people tell apart, without the darker
ones, and with green, vermilion and purple lightened so that black text is legible on all."""

MAX_OBJECTS = 24
"""In a gallery; the ones of highest score."""

_PAPER = (255, 255, 255)
_INK = (40, 44, 52)
_FAINT = (120, 124, 132)
_SHADOW = (0, 0, 0)
_TRUE = (255, 255, 255)

_GAP = 16
_LEGIBLE_SIDE = 384  # pixels; the longer side of a smaller image is brought to this at least
_MAX_SCALE = 16
_TILE_SIDE = 192  # the longer side of an image in a sheet, likewise
_MAX_TILE_SIDE = 512
_MAX_PANEL_SIDE = 1024
_MAX_SHEET_WIDTH = 1680
_MAX_COLUMNS = 8
_OBJECT_SIDE = 84
_MAX_LABELS = 200
_OUTSIDE = 6  # of the places for a label, those around its box
_MAX_HIDDEN = 0.4  # boxes or labels that a label may hide


def legible_scale(height: int, width: int) -> int:
    """The least whole factor that makes the longer side 384 pixels or more; 16 at most."""
    return _enlargement(max(height, width), _LEGIBLE_SIDE)


def draw_boxes(
    image: Tensor,  # [3, H, W]
    detections: Detections,
    *,
    scale: int | None = None,
) -> Tensor:  # [3, sH, sW] uint8
    """The image with the boxes and scores of what was found.

    Lines run outside the boxes. A score stands beside its box where it hides least of the others;
    inside only where the box leaves no room around it. It is left out where it would hide too
    much, and beyond the 200 highest.

    Args:
        image: [3, H, W] in [0, 1].
        detections: boxes that are empty, inverted or not finite are not drawn.
        scale: whole enlargement, `legible_scale` by default.

    Raises:
        ValueError: `image` is not [3, H, W], or `scale` is less than 1.
    """
    _check_image(image, "image")
    if scale is None:
        scale = legible_scale(*image.shape[1:])
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    picture = _picture(image, scale)
    _mark(picture, detections, scale)
    return _tensor(picture)


def panel(explanation: Explanation) -> Tensor:  # [3, H', W'] uint8
    """One picture of one image: itself, the boxes, the reconstruction and the objects found.

    Objects stand on the commonest colour of the image, which shows through where they are
    transparent, the highest score first, 24 at most. An image longer than 1,024 pixels is reduced
    to that.

    Raises:
        ValueError: shapes do not fit each other.
    """
    image, detections = explanation.image, explanation.detections
    reconstruction, appearances = explanation.reconstruction, explanation.appearances
    _check_image(image, "image")
    _check_image(reconstruction, "reconstruction")
    height, width = image.shape[1:]
    scale = _scale(height, width, _LEGIBLE_SIDE, _MAX_PANEL_SIDE)
    boxed = _picture(image, scale)
    _mark(boxed, detections, scale)
    parts = [
        _beside(
            [
                _captioned(_picture(image, scale), f"image, {width} by {height} px"),
                _captioned(boxed, _count(len(detections), "found")),
                _captioned(_picture(reconstruction, scale), "reconstruction"),
            ]
        )
    ]
    if appearances.shape[:1] + appearances.shape[3:] != (len(detections), 4):
        raise ValueError(
            f"appearances must be [{len(detections)}, P, P, 4], got {list(appearances.shape)}"
        )
    ground = commonest_colour(image).double().numpy()
    parts.append(_gallery(detections, appearances, ground, parts[0].width))
    return _tensor(_framed(_below(parts)))


def reconstruction_sheet(
    explanations: Sequence[Explanation], truth: Sequence[Truth] | None = None
) -> Tensor:  # [3, H', W'] uint8
    """A sheet of images with boxes, each above its reconstruction; white corners mark the truth.

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
        found = explanation.detections
        _check_image(explanation.image, "images")
        _check_image(explanation.reconstruction, "reconstructions")
        boxed = _picture(explanation.image, scale)
        caption = _count(len(found), "found")
        if truth is not None:
            _mark_truth(boxed, truth[b], scale)
            caption = f"{len(found)} found, {len(truth[b])} there"
        _mark(boxed, found, scale)
        drawn = _picture(explanation.reconstruction, scale)
        pairs.append(_captioned(_below([boxed, drawn], gap=4), caption))
    widest = max(pair.width for pair in pairs)
    fitting = max(1, min(_MAX_COLUMNS, _MAX_SHEET_WIDTH // (widest + _GAP)))
    columns = -(-len(pairs) // -(-len(pairs) // fitting))  # rows of equal length, if they can be
    rows = [pairs[i : i + columns] for i in range(0, len(pairs), columns)]
    return _tensor(_framed(_below([_beside(row) for row in rows])))


def _mark(picture: Image.Image, detections: Detections, scale: float) -> None:
    """Draws boxes and scores; the likeliest object lies on top."""
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
            # a box that ends at the rim has its line inside the picture
            outline = (
                max(x1 - grown, min(x1, 0)),
                max(y1 - grown, min(y1, 0)),
                min(x2 + grown, max(x2, picture.width)) - 1,
                min(y2 + grown, max(y2, picture.height)) - 1,
            )
            draw.rectangle(outline, outline=colour, width=width)
    _label(picture, draw, boxes, scores, visible, line)


def _label(
    picture: Image.Image,
    draw: ImageDraw.ImageDraw,
    boxes: npt.NDArray[np.float64],
    scores: npt.NDArray[np.float64],
    visible: Sequence[int],
    line: int,
) -> None:
    """Writes each score around its box, where it hides least of other boxes and labels."""
    font = _font(max(11, min(28, round(max(picture.size) / 60))))
    labels = np.zeros((0, 4))
    for i in visible[:_MAX_LABELS]:
        text = f"{scores[i]:.2f}"
        left, top, right, bottom = font.getbbox(text)
        size = np.array([right - left, bottom - top]) + 6
        corners = _label_corners(boxes[i], size, line + 2)
        places = np.concatenate([corners, corners + size], axis=1)
        enough = np.concatenate([places[:, :2], np.array(picture.size) - places[:, 2:]], axis=1)
        fits: npt.NDArray[np.bool_] = enough.min(axis=1) >= 0
        if not fits.any():
            continue
        if fits[:_OUTSIDE].any():
            fits[_OUTSIDE:] = False
        hidden = _hidden(places, boxes[list(visible)]) + _hidden(places, labels)
        best = int(np.where(fits, hidden, np.inf).argmin())
        if hidden[best] > _MAX_HIDDEN:
            continue
        labels = np.concatenate([labels, places[best, None]])
        x1, y1, x2, y2 = places[best].astype(int).tolist()
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=_colour(i))
        draw.text((x1 + 3 - left, y1 + 3 - top), text, fill=_SHADOW, font=font)


def _label_corners(
    box: npt.NDArray[np.float64],  # [4]
    size: npt.NDArray[np.float64],  # [2] width and height of the label
    off: int,
) -> npt.NDArray[np.float64]:  # [8, 2]
    """Where the upper left corner of a label can be: six places around its box, two inside."""
    (x1, y1, x2, y2), (width, height) = box.tolist(), size.tolist()
    places = [
        (x1 - off, y1 - off - height),
        (x2 + off - width, y1 - off - height),
        (x1 - off, y2 + off),
        (x2 + off - width, y2 + off),
        (x2 + off, y1 - off),
        (x1 - off - width, y1 - off),
        (max(x1, 0) + off, max(y1, 0) + off),
        (max(x1, 0) + off, y2 - off - height),
    ]
    return np.array(places).round()


def _hidden(
    places: npt.NDArray[np.float64],  # [P, 4]
    things: npt.NDArray[np.float64],  # [n, 4], none empty
) -> npt.NDArray[np.float64]:  # [P]
    """How much of the things each place hides: the sum of the shares of each."""
    low = np.maximum(places[:, None, :2], things[:, :2])
    high = np.minimum(places[:, None, 2:], things[:, 2:])
    areas = (things[:, 2:] - things[:, :2]).prod(-1)
    shares: npt.NDArray[np.float64] = (np.maximum(high - low, 0.0).prod(-1) / areas).sum(1)
    return shares


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
        more = Image.new("RGB", (cells[0].width, cells[0].height), _PAPER)
        text = f"and {len(detections) - MAX_OBJECTS} more"
        cells.append(_written(more, text))
    columns = max(1, (width + _GAP) // (max((c.width for c in cells), default=1) + _GAP))
    rows = [_beside(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    return _below([_line(title), *rows], gap=8)


def _object(
    rgba: Tensor,  # [P, P, 4]
    ground: npt.NDArray[np.float64],  # [3]
    colour: tuple[int, int, int],
) -> Image.Image:
    """An appearance map on ground of one colour, framed."""
    scale = max(1, _OBJECT_SIDE // max(rgba.shape[:2]))
    values = rgba.detach().cpu().float().nan_to_num().clamp(0, 1).numpy()
    values = values.repeat(scale, axis=0).repeat(scale, axis=1)
    height, width = values.shape[:2]
    alpha = values[..., 3:]
    blended = ground + alpha * (values[..., :3] - ground)
    tile = Image.fromarray((blended * 255).round().astype(np.uint8))
    framed = Image.new("RGB", (width + 6, height + 6), colour)
    framed.paste(tile, (3, 3))
    return framed


def _scale(height: int, width: int, side: int, max_side: int) -> float:
    """A whole factor, to `side` pixels or more; below 1 for images longer than `max_side`."""
    longer = max(height, width)
    return _enlargement(longer, side) if longer <= max_side else max_side / longer


def _enlargement(longer: int, side: int) -> int:
    return min(_MAX_SCALE, -(-side // longer))


def _picture(image: Tensor, scale: float) -> Image.Image:
    values = image.detach().cpu().float().nan_to_num().clamp(0, 1)
    levels = (values * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    picture = Image.fromarray(levels.numpy())
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    way = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    return picture.resize(size, way)


def _corners(boxes: Tensor, scale: float, picture: Image.Image) -> npt.NDArray[np.float64]:
    """Boxes in pixels of the picture, no further outside than it is large; not finite: empty."""
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


def _written(ground: Image.Image, text: str) -> Image.Image:
    centre = (ground.width // 2, ground.height // 2)
    ImageDraw.Draw(ground).text(centre, text, fill=_FAINT, font=_font(14), anchor="mm")
    return ground


def _beside(pictures: Sequence[Image.Image], gap: int = _GAP) -> Image.Image:
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    joined = Image.new("RGB", (width, max(p.height for p in pictures)), _PAPER)
    x = 0
    for picture in pictures:
        joined.paste(picture, (x, 0))
        x += picture.width + gap
    return joined


def _below(pictures: Sequence[Image.Image], gap: int = _GAP) -> Image.Image:
    height = sum(p.height for p in pictures) + gap * (len(pictures) - 1)
    joined = Image.new("RGB", (max(p.width for p in pictures), height), _PAPER)
    y = 0
    for picture in pictures:
        joined.paste(picture, (0, y))
        y += picture.height + gap
    return joined


def _framed(picture: Image.Image) -> Image.Image:
    framed = Image.new("RGB", (picture.width + 2 * _GAP, picture.height + 2 * _GAP), _PAPER)
    framed.paste(picture, (_GAP, _GAP))
    return framed


def _count(number: int, word: str) -> str:
    return f"{number} {'object' if number == 1 else 'objects'} {word}"


def _colour(index: int) -> tuple[int, int, int]:
    return COLOURS[index % len(COLOURS)]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with Pillow."""
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType, which draws its text")
    return font


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def _check_image(image: Tensor, name: str) -> None:
    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"{name} must be [3, H, W], got {list(image.shape)}")
