"""Pictures of explanations: boxes or outlines, reconstructions, galleries of objects.

Pictures are [3, H, W] uint8 tensors, as `spairkit.images.write_png` takes them. Small images are
enlarged by a whole factor, so that nothing is blurred, and dim ones are brightened. An object has
one colour throughout a picture, for its box or outline and its frame in the gallery, and its
neighbours have others.
"""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from spairkit.detections import Detections, Explanation, Truth
from spairkit.images import commonest_colour
from spairkit.label_images import outlines
from spairkit.report.colours import COLOURS, Colour, object_colours

MAX_OBJECTS = 24
"""Objects in a gallery, those of highest score."""

_PAPER = (255, 255, 255)
_INK = (40, 44, 52)
_FAINT = (120, 124, 132)
_SHADOW = (0, 0, 0)
_TRUE = (255, 255, 255)
_OUTLINE = (255, 242, 153)
_OUTLINE_ALPHA = 160  # of 255
_SHADOW_ALPHA = 130

_STRETCHED = 0.5  # images that use less of the range are brightened
_DARKEST, _LIGHTEST = 0.001, 0.999  # shares of the pixels, which become black and white
_LEAST_RANGE = 1e-4  # an even image is not brightened
_MAX_SAMPLED = 1 << 20  # pixels

_FEW = 12  # more objects have outlines instead of boxes
_SMALL_SIDE = 32  # pixels of the picture; so have smaller objects
_THICK_SIDE = 80  # larger boxes have lines of two pixels

_GAP = 16
_LEGIBLE_SIDE = 384  # pixels; least length of an image's longer side
_MAX_SCALE = 16
_TILE_SIDE = 192  # the same for an image in a sheet
_MAX_TILE_SIDE = 512
_MAX_PANEL_SIDE = 1024
_MAX_BOXED_SIDE = 3072
_MAX_SHEET_WIDTH = 1680
_MAX_COLUMNS = 8
_OBJECT_SIDE = 84
_SHEET_COLUMNS = 3
_MAX_CAPTION = 32  # characters of a name


def display_levels(image: Tensor) -> tuple[float, float]:
    """The intensities of an image [3, H, W] that are shown as black and white.

    0 and 1, unless the image uses less than half of that range: then the lowest and highest
    intensity, but for a thousandth of the pixels at either end.
    """
    every = max(1, image[0].numel() // _MAX_SAMPLED)
    sampled = image.detach().flatten(1)[:, ::every]
    pixels = sampled.cpu().float().nan_to_num().clamp(0, 1).numpy()
    low = float(np.quantile(pixels.min(0), _DARKEST))
    high = float(np.quantile(pixels.max(0), _LIGHTEST))
    return (low, high) if _LEAST_RANGE < high - low < _STRETCHED else (0.0, 1.0)


def reduced(
    image: Tensor,  # [3, H, W]
    max_side: int,
    levels: tuple[float, float] = (0.0, 1.0),
) -> Image.Image:
    """The image, at most `max_side` pixels long, with the `levels` as black and white."""
    return _picture(image, min(1.0, max_side / max(image.shape[1:])), levels)


def encoded(picture: Image.Image) -> bytes:
    """The picture as PNG."""
    data = io.BytesIO()
    picture.save(data, format="PNG", optimize=True)
    return data.getvalue()


def draw_boxes(
    image: Tensor,  # [3, H, W]
    detections: Detections,
    scale: float = 1,
    truth: Truth | None = None,
    *,
    labels: bool = False,
    levels: tuple[float, float] = (0.0, 1.0),
    colours: Sequence[Colour] | None = None,
) -> Image.Image:
    """The image, enlarged or reduced, with a thin line around each object, outside it.

    Objects that are many or small in the picture have the outline of their mask, if they have one.
    Others have a box, and the outline in pale yellow. With true boxes all have boxes.

    Args:
        image: [3, H, W] in [0, 1].
        detections: boxes that are empty, inverted or not finite are not drawn.
        scale: a whole enlargement, or a reduction below 1.
        truth: true boxes, marked by white corners.
        labels: whether to write the number of each object, from 1, and its score beside it. A label
            that would cover another one of higher score is left out.
        levels: as `display_levels`.
        colours: of each object. Default: neighbours differ.

    Raises:
        ValueError: `image` is not [3, H, W], or masks are not [H, W].
    """
    picture = _picture(image, scale, levels)
    if colours is None:
        colours = object_colours(detections.boxes, picture)
    boxes = _corners(detections.boxes, scale, picture)
    boxed: npt.NDArray[np.bool_] = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
    if detections.label_image is not None:
        outline = _outline(detections.masks, picture, image)
        sides = (boxes[boxed, 2:] - boxes[boxed, :2]).min(1)
        dense = len(sides) > _FEW or (len(sides) > 0 and np.median(sides) < _SMALL_SIDE)
        if truth is None and dense:
            outlined = np.unique(outline[outline > 0]) - 1
            _mark_outlines(picture, outline, colours)
            boxed[outlined] = False
        else:
            alpha = (outline > 0).astype(np.uint8) * _OUTLINE_ALPHA
            picture.paste(_OUTLINE, mask=Image.fromarray(alpha))
    if truth is not None:
        _mark_truth(picture, truth, scale)
    scores = detections.scores.detach().cpu().double().numpy()
    best_first = np.argsort(-scores, kind="stable").tolist()
    _mark(picture, boxes, [i for i in best_first if boxed[i]], colours)
    if labels:
        _label(picture, boxes, scores, best_first, colours)
    return picture


def overlay(
    image: Tensor,  # [3, H, W]
    detections: Detections,
    colours: Sequence[Colour] | None = None,
) -> Tensor:  # [3, H', W'] uint8
    """The image at display levels with a line around each object, as `draw_boxes` draws them.

    A small image is enlarged by a whole factor; a large one keeps its size.
    """
    height, width = image.shape[1:]
    scale = max(1, picture_scale(height, width, _LEGIBLE_SIDE, _MAX_PANEL_SIDE))
    drawn = draw_boxes(image, detections, scale, levels=display_levels(image), colours=colours)
    return torch.from_numpy(np.array(drawn)).permute(2, 0, 1)


def panel(
    explanation: Explanation,
    *,
    labels: bool = False,
) -> Tensor:  # [3, H', W'] uint8
    """One picture of one image: the image, its objects, its reconstruction and a gallery.

    The objects of the gallery are sorted by score, 24 at most, each on the commonest colour of the
    reconstruction. An image longer than 1,024 pixels is reduced to that; with its objects it is
    below the others, up to 3,072 pixels long. `labels` is as in `draw_boxes`.

    Raises:
        ValueError: shapes do not fit each other.
    """
    image, detections = explanation.image, explanation.detections
    appearances = explanation.appearances
    height, width = image.shape[1:]
    levels = display_levels(image)
    scale = picture_scale(height, width, _LEGIBLE_SIDE, _MAX_PANEL_SIDE)
    boxed_scale = max(scale, min(1.0, _MAX_BOXED_SIDE / max(height, width)))
    found = _count(len(detections), "found")
    if detections.counts is not None:
        found = f"{found} ({detections.counts})"
    drawn = draw_boxes(image, detections, boxed_scale, labels=labels, levels=levels)
    caption = f"image, {width} by {height} px{', brightened' if levels != (0, 1) else ''}"
    plain = _captioned(_picture(image, scale, levels), caption)
    boxed = _captioned(drawn, found)
    drawn_levels = display_levels(explanation.reconstruction)  # of the prepared image
    rebuilt = _captioned(
        _picture(explanation.reconstruction, scale, drawn_levels), "reconstruction"
    )
    if boxed_scale > scale:
        parts = [_beside([plain, rebuilt]), boxed]
    else:
        parts = [_beside([plain, boxed, rebuilt])]
    if appearances.shape[:1] + appearances.shape[3:] != (len(detections), 4):
        raise ValueError(
            f"appearances must be [{len(detections)}, P, P, 4], got {list(appearances.shape)}"
        )
    gallery = _gallery(
        detections,
        torch.cat([_stretched(appearances[..., :3], drawn_levels), appearances[..., 3:]], dim=-1),
        _stretched(commonest_colour(explanation.reconstruction), drawn_levels).double().numpy(),
        max(part.width for part in parts),
        object_colours(detections.boxes, _picture(image, boxed_scale, levels)),
        labels=labels,
    )
    parts.append(gallery)
    return _tensor(_below(parts))


def contact_sheet(
    names: Sequence[str], images: Sequence[Tensor], found: Sequence[Detections]
) -> Tensor:  # [3, H', W'] uint8
    """Images of any sizes side by side, at display levels, with their objects and names."""
    rows: list[list[Image.Image]] = []
    for number, (name, image, item) in enumerate(zip(names, images, found, strict=True)):
        height, width = image.shape[1:]
        scale = picture_scale(height, width, _TILE_SIDE, _MAX_TILE_SIDE)
        drawn = draw_boxes(image, item, scale, levels=display_levels(image))
        if number % _SHEET_COLUMNS == 0:
            rows.append([])
        caption = f"{_shortened(name)}: {_count(len(item), 'found')}"
        rows[-1].append(_captioned(drawn, caption))
    return _tensor(_below([_beside(row) for row in rows]))


def _shortened(name: str) -> str:
    return name if len(name) <= _MAX_CAPTION else f"...{name[3 - _MAX_CAPTION :]}"


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
    scale = picture_scale(height, width, _TILE_SIDE, _MAX_TILE_SIDE)
    pairs = []
    for b, explanation in enumerate(explanations):
        found, true = explanation.detections, None if truth is None else truth[b]
        levels = display_levels(explanation.image)
        boxed = draw_boxes(explanation.image, found, scale, true, levels=levels)
        drawn_levels = display_levels(explanation.reconstruction)
        drawn = _picture(explanation.reconstruction, scale, drawn_levels)
        number = _count(len(found), "found")
        caption = number if true is None else f"{len(found)} found, {len(true)} there"
        pairs.append(_captioned(_below([boxed, drawn], gap=4), caption))
    widest = max(pair.width for pair in pairs)
    fitting = max(1, min(_MAX_COLUMNS, _MAX_SHEET_WIDTH // (widest + _GAP)))
    columns = -(-len(pairs) // -(-len(pairs) // fitting))  # rows of equal length, if they can be
    rows = [pairs[i : i + columns] for i in range(0, len(pairs), columns)]
    return _tensor(_below([_beside(row) for row in rows]))


def _mark(
    picture: Image.Image,
    boxes: npt.NDArray[np.float64],  # [n, 4] pixels of the picture
    order: Sequence[int],
    colours: Sequence[Colour],  # of each object
) -> None:
    """Draws a line around each box of `order`; the first ones lie on top."""
    draw = ImageDraw.Draw(picture)
    shadow = Image.new("L", picture.size)
    rings = []
    for i in reversed(order):
        x1, y1, x2, y2 = np.round(boxes[i]).astype(int).tolist()
        line = 1 if min(x2 - x1, y2 - y1) < _THICK_SIDE else 2
        # at the rim of the picture the line of a box lies inside
        inner, outer = (
            (
                max(x1 - grown, min(x1, 0)),
                max(y1 - grown, min(y1, 0)),
                min(x2 + grown, max(x2, picture.width)) - 1,
                min(y2 + grown, max(y2, picture.height)) - 1,
            )
            for grown in (line, line + 1)
        )
        if line > 1:
            ImageDraw.Draw(shadow).rectangle(outer, outline=_SHADOW_ALPHA)
        rings.append((inner, colours[i], line))
    picture.paste(_SHADOW, mask=shadow)
    for outline, colour, line in rings:
        draw.rectangle(outline, outline=colour, width=line)


def _outline(
    masks: Tensor,  # [H, W] int32
    picture: Image.Image,
    image: Tensor,  # [3, H, W]
) -> npt.NDArray[np.int32]:
    if masks.shape != image.shape[1:]:
        raise ValueError(f"masks must be {list(image.shape[1:])}, got {list(masks.shape)}")
    return outlines(masks, picture.height, picture.width)


def _mark_outlines(
    picture: Image.Image,
    outline: npt.NDArray[np.int32],  # [H, W] number of the object from 1, or 0
    colours: Sequence[Colour],  # of each object
) -> None:
    painted = np.array([(0, 0, 0), *colours], np.uint8)[outline]
    picture.paste(Image.fromarray(painted), mask=Image.fromarray(outline > 0))


def _label(
    picture: Image.Image,
    boxes: npt.NDArray[np.float64],  # [n, 4] pixels of the picture
    scores: npt.NDArray[np.float64],  # [n]
    order: Sequence[int],
    colours: Sequence[Colour],  # of each object
) -> None:
    """Writes number and score above each box, or below it at the upper rim."""
    draw, font = ImageDraw.Draw(picture), _font(11)
    height = sum(font.getmetrics())
    taken = Image.new("1", picture.size)
    for i in order:
        x1, y1, x2, y2 = boxes[i]
        if not (x1 < x2 and y1 < y2 and x2 > 0 and y2 > 0):
            continue
        text = f"{i + 1}: {scores[i]:.2f}"
        width = round(font.getlength(text))
        x = max(0, min(round(x1), picture.width - width))
        y = round(y1) - height - 1
        y = y if y >= 0 else min(round(y2) + 2, picture.height - height)
        place = (x, y, x + width, y + height)
        if taken.crop(place).getbbox():
            continue
        taken.paste(1, place)
        ground = _SHADOW if colours[i] in COLOURS else _PAPER
        draw.text((x, y), text, fill=colours[i], font=font, stroke_width=1, stroke_fill=ground)


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
    colours: Sequence[Colour],  # of each object
    *,
    labels: bool,
) -> Image.Image:
    """The objects in rows of at most `width` pixels."""
    title = "objects by score" if len(detections) else "no object to show"
    scores = detections.scores.detach().cpu()
    order = scores.argsort(descending=True, stable=True)[:MAX_OBJECTS].tolist()
    cells = [
        _captioned(
            _object(appearances[i], ground, colours[i]),
            f"{i + 1}: {scores[i]:.2f}" if labels else f"{scores[i]:.2f}",
        )
        for i in order
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
    colour: Colour,
) -> Image.Image:
    """An appearance map on a ground of one colour, with a frame."""
    scale = max(1, _OBJECT_SIDE // max(rgba.shape[:2]))
    values = rgba.detach().cpu().float().nan_to_num().clamp(0, 1).numpy()
    values = values.repeat(scale, axis=0).repeat(scale, axis=1)
    alpha = values[..., 3:]
    blended = ground + alpha * (values[..., :3] - ground)
    tile = Image.fromarray((blended * 255).round().astype(np.uint8))
    return ImageOps.expand(tile, 3, colour)


def picture_scale(height: int, width: int, side: int, max_side: int) -> float:
    """A whole factor, to `side` pixels or more; below 1 for images longer than `max_side`."""
    longer = max(height, width)
    return min(_MAX_SCALE, -(-side // longer)) if longer <= max_side else max_side / longer


def _picture(image: Tensor, scale: float, levels: tuple[float, float] = (0.0, 1.0)) -> Image.Image:
    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image must be [3, H, W], got {list(image.shape)}")
    height, width = image.shape[1:]
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(_MAX_SAMPLED // width, 1)
    for top in range(0, height, rows):  # a large image takes much memory in float32
        strip = image[:, top : top + rows].detach().cpu().float().nan_to_num()
        strip = (_stretched(strip, levels) * 255).round().to(torch.uint8)
        pixels[top : top + rows] = strip.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    way = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    return picture.resize(size, way)


def _stretched(values: Tensor, levels: tuple[float, float]) -> Tensor:
    """From `levels` to [0, 1]; cut off beyond."""
    low, high = levels
    return ((values - low) / (high - low)).clamp(0, 1)


def _corners(boxes: Tensor, scale: float, picture: Image.Image) -> npt.NDArray[np.float64]:
    """Boxes in pixels of the picture, clipped not far outside it; empty if not finite."""
    corners: npt.NDArray[np.float64] = boxes.detach().cpu().double().numpy().reshape(-1, 4)
    corners = np.where(np.isfinite(corners).all(1, keepdims=True), corners * scale, 0.0)
    size = np.array(picture.size * 2)
    return np.clip(corners, -size, 2 * size)


def _captioned(picture: Image.Image, caption: str) -> Image.Image:
    return _below([_line(caption), picture], gap=4)


def _line(text: str) -> Image.Image:
    font = _font(14, every_letter=not text.isascii())
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


@cache
def _font(size: int, *, every_letter: bool = False) -> ImageFont.FreeTypeFont:
    """Pillow's own font, or Matplotlib's, which has more letters than those of English."""
    if every_letter:
        from matplotlib import get_data_path  # takes long to import

        return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType, which draws its text")
    return font


def _tensor(picture: Image.Image) -> Tensor:
    picture = ImageOps.expand(picture, _GAP, _PAPER)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
