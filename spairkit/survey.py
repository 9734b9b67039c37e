"""A look at a folder of images before training: what the objects are like, and the settings.

    survey = look(list_images("cells"))
    survey.settings(SPAIRConfig(), {})  # a layer of settings for `presets.resolve`
    survey.lines()                      # what was found, why, and the setting that changes it

Everything is measured without labels, on some of the images, in seconds.
"""

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from torch import Tensor

from spairkit.config import (
    AIRConfig,
    Config,
    ModelConfig,
    PrepareConfig,
    SPAIRConfig,
    WatershedConfig,
)
from spairkit.config_values import from_dict
from spairkit.detections import Detections
from spairkit.errors import InputError
from spairkit.images import list_images, read_pixels, skipped_files, to_colour
from spairkit.models.watershed import Watershed, find_parts
from spairkit.preparation import (
    OBJECT_PX,
    background_of,
    contrast_of,
    half_level,
    in_file_pixels,
    least_noise_of,
    noise_of,
    otsu,
    prepare_image,
    prepared_size,
    resized,
    stands_out,
    typical_contrast,
    white_level,
)

Array = npt.NDArray[np.float32]

_IMAGES = 6  # that are measured
_MOST_SIDE = 3072  # px of the files; of a larger image the middle is measured
_FIELD = 1536  # px after resizing; the same for levels and background
_SIDE = 480  # of the part of an image that is measured at one scale, px after resizing
_STARTS = (4.0, 6.0, 9.0, 14.0, 21.0, 32.0, 48.0, 72.0, 108.0, 162.0, 243.0)  # diameters tried, px
_LEAST, _MOST = 1.0, 2400.0  # diameters that a scale brings to 12 px
_NEAR = 1.6  # ratio of two diameters that nearly agree
_STEADY = 0.75  # exponent of the growth of sides with the assumed diameter: steady below it
_SEVERAL = 2  # objects in an image, on average: more than one large patch of light
_ROUNDS = 4  # of measuring the objects that were found with the diameter before, at most
_CLOSE = 1.04  # ratio of two diameters that agree
_KEPT = 0.97  # of the share of the contrast that objects hold: about as much
_MORE = 1.2  # times as many objects as at the start: their parts
_COMPACT = 0.6  # share of its box that a single object fills at least
_TURNED = 2.0  # times the evidence for objects, if they are taken for the background
_LONG, _FULL = 2.0, 0.97  # length of a rod in widths; area in that of a rectangle
_FEWEST = 5  # objects that a diameter is measured on
_SHARE = 0.38  # of the contrast above noise that lies in compact objects, at least
_BRIGHT = 0.2  # of white: contrast above noise
_LEAST_MASS = 1e-9
_ALIGNED = 0.75  # agreement of the colours of objects that calls for one direction
_GREY = 2e-3  # of the range of a grey image: largest difference between its channels
_UNEVEN = 0.1  # of a typical contrast: spread of the background that calls for a surface
_SPREAD = (10, 90)  # percentiles of the sides of objects
_STDS = 2.56  # standard deviations of a normal between these
_CROP = 48  # side of a training crop, prepared px
_SPARSE = 0.5  # objects in such a crop, at least, or crops are taken where objects are
_WIDE = 3.0  # ratio of large to small objects that is worth a warning
_FAINT = 2.0  # contrasts in noises that can hardly be seen
_TEXTURE = 0.12  # least noise in training: texture that objects should not be spent on
_LEAST_SHARE, _MOST_SHARE = 1 / 24, 0.9  # sides that the prior knows, in the largest side of a box
_LEAST_STD, _MOST_STD = 0.35, 0.8  # of the prior of sizes, in logits


@dataclass(frozen=True)
class Survey:
    """What a look at a folder found."""

    images: int
    """Number of files, of which at most six are measured."""
    prepare: PrepareConfig
    """The preparation that makes objects bright on dark, and 12 px across."""
    diameter: float
    """Median side of the objects, px in the files."""
    smallest: float
    """Tenth percentile of the sides, px in the files."""
    largest: float
    """Ninetieth percentile of the sides, px in the files."""
    objects: float
    """Objects in an image, or in the middle of a large one, on average: a rough estimate."""
    objects_per_crop: float
    """The same for a training crop of 48 x 48 prepared pixels."""
    noise: float
    """Standard deviation of the noise in a prepared image, as a share of the file's range."""
    contrast: float
    """Contrast of a typical object to the background, rims included, likewise."""
    agreement: float
    """How far the colours of the objects differ from the background alike, in [0, 1]."""
    is_grey: bool
    """Whether the three channels are equal."""
    share: float
    """Share of the contrast above noise that lies in compact objects."""

    @property
    def polarity(self) -> Literal["bright", "dark", "either"]:
        """Whether objects are brighter or darker than the background."""
        if self.prepare.contrast == "distance":
            return "either"
        return "bright" if sum(self.prepare.direction) > 0 else "dark"

    def settings(self, model: ModelConfig, given: Mapping[str, Any]) -> dict[str, Any]:
        """A layer of settings for a model, between a preset and the user's.

        Args:
            model: its config without this layer.
            given: the user's settings. Where they choose the contrast or the levels by hand,
                settings that do not go with these are left out.
        """
        p = self.prepare
        prepare: dict[str, Any] = {
            "scale": p.scale,
            "contrast": p.contrast,
            "direction": p.direction,
            "background": p.background,
            "levels": p.levels,
            "typical_white": p.typical_white,
        }
        chosen = preparation(given)
        by_hand = chosen.get("contrast") == "none"
        if by_hand:
            prepare = {"scale": p.scale}
        elif "black" in chosen or "white" in chosen:
            prepare["levels"] = "fixed"
        if not isinstance(model, SPAIRConfig):
            return {"prepare": prepare}
        logits = [
            math.log(side / (model.anchor - side))
            for side in (
                min(max(side * p.scale, _LEAST_SHARE * model.anchor), _MOST_SHARE * model.anchor)
                for side in (self.smallest, OBJECT_PX / p.scale, self.largest)
            )
        ]
        std = min(max((logits[2] - logits[0]) / _STDS, _LEAST_STD), _MOST_STD)
        values = {
            "background": "mode" if by_hand else "black",
            "likelihood": "normal",
            "box_contrast": 0.5,
            "size_prior_mean": round(logits[1], 3),
            "size_prior_std": round(std, 3),
            "least_noise": _TEXTURE,
        }
        search = {} if by_hand else {"start": "watershed", "mode": "refine"}
        settings: dict[str, Any] = {"prepare": prepare, "model": values, "search": search}
        if not by_hand and self.is_sparse:
            settings["data"] = {"crops": "objects"}
        if not by_hand:
            settings["train"] = {"retries": self._retries(given)}
        return settings

    @property
    def is_sparse(self) -> bool:
        """Whether most training crops would be empty."""
        return self.objects_per_crop < _SPARSE

    def _retries(self, given: Mapping[str, Any]) -> list[str]:
        """What a failing training may change: not what the user has set."""
        free = {
            "background": self.prepare.background == "image"
            and not _has(given, "prepare.background"),
            "prior": not _has(given, "model.least_noise"),
            "seed": not _has(given, "train.seed"),
        }
        return [name for name, is_free in free.items() if is_free]

    def lines(
        self, prepare: PrepareConfig | None = None, chosen: Collection[str] = ()
    ) -> list[str]:
        """What was found, what is done, and the settings that override it; a line each.

        Args:
            prepare: the preparation that is used; None: the one that was found.
            chosen: names of its settings that the user has made.
        """
        p = prepare or self.prepare

        def of(*names: str) -> str:
            made = [f"prepare.{name}" for name in names if name in chosen]
            free = [f"prepare.{name}" for name in names if name not in chosen]
            parts = [f"set: {', '.join(made)}"] if made else []
            parts += [f"--set {', '.join(free)}"] if free else []
            return f"({'; '.join(parts)})"

        if p.contrast == "none":
            contrast = "none, colours are kept"
        elif p.contrast == "distance":
            contrast = "objects are unlike the background, their colours differ"
        else:
            weights = ", ".join(f"{weight:.2f}" for weight in p.direction)
            way = "brighter" if sum(p.direction) > 0 else "darker"
            why = "grey images" if self.is_grey else f"red, green, blue by {weights}"
            contrast = f"objects are {way} than the background, {why}"
        background = {
            "none": "none is subtracted",
            "image": "even: one value",
            "surface": "uneven: a smooth surface",
        }[p.background]
        levels = "of each image"
        if p.levels == "fixed":
            levels = f"fixed, from {p.black:g} to {p.white:g}"
        lines = [
            f"size: {self.diameter:.0f} px ({self.smallest:.0f} to {self.largest:.0f}); images "
            f"are resized by {p.scale:.3g}, to {self.diameter * p.scale:.0f} px an object "
            f"{of('scale')}",
            f"contrast: {contrast} {of('contrast', 'direction')}",
            f"background: {background} {of('background')}",
            f"levels: {levels}; contrast {self.contrast:.2g} and noise {self.noise:.2g} of "
            f"the file's range {of('levels', 'black', 'white')}",
        ]
        if self.largest > _WIDE * self.smallest:
            lines.append(
                "sizes differ much: objects far from the typical size may be missed or split"
            )
        if self.is_sparse and p.contrast != "none":
            lines.append(
                f"sparse: {self.objects_per_crop:.2g} objects in a training crop; every second one "
                "is taken where something is bright (--set data.crops)"
            )
        return lines

    @property
    def is_cluttered(self) -> bool:
        """Whether most of the contrast lies outside compact objects, as in photographs."""
        return self.share < _SHARE

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return asdict(self) | {"polarity": self.polarity, "doubts": self.doubts()}

    def doubts(self) -> list[str]:
        """Reasons to expect a failure; none if the images look fit."""
        if not self.objects:
            return [
                f"fewer than {_FEWEST} compact objects were found: are there any in these images?"
            ]
        found = []
        if self.is_cluttered:
            found.append(
                f"compact objects hold only {self.share:.0%} of the contrast: clutter or texture "
                "may be taken for objects"
            )
        if self.contrast < _FAINT * self.noise:
            found.append("objects hardly stand out from the noise")
        return found


@dataclass(frozen=True)
class _Measured:
    """Compact objects at one scale."""

    assumed: float  # diameter, px in the files
    sides: npt.NDArray[np.float64]  # [n] px in the files
    share: float  # of the contrast
    bright_share: float  # of that above noise
    images: int
    area: int  # px^2 of the prepared images

    @property
    def median(self) -> float:
        return float(np.median(self.sides))

    @property
    def apart(self) -> float:
        """The logarithm of the ratio of the median side and the assumed diameter, without sign."""
        return abs(math.log(self.median / self.assumed))


def preparation(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the preparation in the user's nested settings."""
    chosen = given.get("prepare")
    return chosen if isinstance(chosen, Mapping) else {}  # a mistake is refused later


def _has(given: Mapping[str, Any], key: str) -> bool:
    """Whether nested settings hold a dotted key."""
    table, _, name = key.partition(".")
    values = given.get(table)
    return isinstance(values, Mapping) and name in values


def survey_of(
    config: Config,
    on_progress: Callable[[float], None] = lambda share: None,
    chosen: Mapping[str, Any] | None = None,
) -> Survey | None:
    """The survey of the folder that a config names; None for scenes, and for AIR and DAIR.

    Arguments as in `look`.

    Raises:
        InputError: there is no image that can be read.
    """
    if config.data.name != "folder" or isinstance(config.model, AIRConfig):
        return None
    path = Path(config.data.path)
    return look(list_images(path), on_progress, chosen)


def look(
    paths: Sequence[Path],
    on_progress: Callable[[float], None] = lambda share: None,
    chosen: Mapping[str, Any] | None = None,
) -> Survey:
    """Measures some images of a folder.

    Args:
        paths: of the images; those that cannot be read are passed over.
        on_progress: called with the share that is done.
        chosen: the user's settings of the preparation. Scale, contrast, direction and background
            hold, and the rest is measured with the first three.

    Raises:
        InputError: no image can be read.
    """
    images, files = [image for _, image in _read(paths, _IMAGES)], len(paths)
    reduced = [resized(image, _within(image.shape[-2:], _SIDE)) for image in images]
    is_grey = all(
        float((image - image[:1]).abs().max()) <= _GREY * float(image.max() - image.min())
        for image in reduced
    )
    contrast, direction, agreement = _colours(reduced, is_grey)
    holds = _held(chosen or {})
    direction = holds.get("direction", direction)
    contrast = holds.get("contrast", "direction" if "direction" in holds else contrast)
    config = PrepareConfig(
        contrast=contrast, direction=direction, background="surface", levels="image"
    )
    levels = [half_level(image) for image in images]

    def with_white(config: PrepareConfig) -> PrepareConfig:
        typical, noise = _levels([image.numpy() for image in reduced], config, levels)
        return replace(config, typical_white=min(white_level(typical, noise, 0.0), 1.0))

    config = with_white(config)
    if "scale" in holds:
        scale = holds["scale"]
        measured = _compact(images, config, OBJECT_PX / scale)
        diameter = measured.median if len(measured.sides) >= _FEWEST else OBJECT_PX / scale
    else:
        diameter, measured, evidence = _diameter(images, config, on_progress)
        if measured.bright_share < _SHARE and contrast == "direction" and "direction" not in holds:
            turned = with_white(replace(config, direction=_negative(direction)))
            other, opposite, against = _diameter(images, turned, lambda share: None)
            if against > _TURNED * evidence:
                config, direction = turned, turned.direction
                diameter, measured = other, opposite
        scale = OBJECT_PX / diameter
    fields = [_middle(image, math.ceil(_FIELD / scale)) for image in images]
    seen = [
        resized(field, prepared_size(field.shape[-2], field.shape[-1], scale)).numpy()
        for field in fields
    ]
    enlarged = replace(config, scale=scale)
    least_noises = [least_noise_of(image, enlarged) for image in images]
    typical, noise = _levels(seen, config, least_noises)
    background = holds.get("background")
    if background is None:
        background = _background(seen, config, typical, min(least_noises))
    sides = measured.sides if len(measured.sides) else np.array([diameter])
    return Survey(
        images=files,
        prepare=PrepareConfig(
            scale=holds.get("scale", _rounded(scale)),
            contrast=contrast,
            direction=direction,
            background=background,
            levels="image",
            typical_white=_rounded(min(white_level(typical, noise, 0.0), 1.0)),
        ),
        diameter=diameter,
        smallest=float(np.percentile(sides, _SPREAD[0])),
        largest=float(np.percentile(sides, _SPREAD[1])),
        objects=len(measured.sides) / max(measured.images, 1),
        objects_per_crop=len(measured.sides) / max(measured.area, 1) * _CROP**2,
        noise=noise,
        contrast=typical,
        agreement=agreement,
        is_grey=is_grey,
        share=measured.bright_share,
    )


def _held(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen settings that the others are measured with."""
    names = ("scale", "contrast", "direction", "background")
    held = {name: chosen[name] for name in names if name in chosen}
    if held.get("contrast") == "none":
        return {"scale": held["scale"]} if "scale" in held else {}
    data = {"name": "folder", "path": "."}
    try:
        config = from_dict({"data": data, "prepare": {"contrast": "direction", **held}})
    except InputError:  # it is refused later
        return {}
    return {name: getattr(config.prepare, name) for name in held}


def sample(
    paths: Sequence[Path], survey: Survey, most: int = 6
) -> list[tuple[str, Tensor, Detections]]:
    """The objects that a watershed finds in some of the images, with their names and pixels.

    Names are from the folder that all images lie in. Boxes and masks are in the pixels of the
    files. Of a large image the middle is taken.
    """
    place = os.path.commonpath([path.parent for path in paths])
    found = []
    for path, image in _read(paths, most):
        middle = _middle(image, math.ceil(_SIDE / survey.prepare.scale))
        seen = prepare_image(middle, survey.prepare)
        item = Watershed(WatershedConfig()).detect(seen[None])[0]
        size = (middle.shape[-2], middle.shape[-1])
        found.append(
            (
                os.path.relpath(path, place),
                middle,
                in_file_pixels(item, (seen.shape[-2], seen.shape[-1]), size),
            )
        )
    return found


def _read(paths: Sequence[Path], most: int) -> list[tuple[Path, Tensor]]:
    """Some of the images, evenly chosen, or the middles of large ones; [3, H, W] in [0, 1]."""
    every = max(len(paths) / most, 1)
    chosen = [paths[int(i * every)] for i in range(min(len(paths), most))]
    images: list[tuple[Path, Tensor]] = []
    reasons: list[str] = []
    for path in [*chosen, *(path for path in paths if path not in chosen)]:
        if len(images) == len(chosen):
            break
        try:
            images.append((path, to_colour(_middle(read_pixels(path), _MOST_SIDE))))
        except InputError as error:
            reasons.append(str(error))
    if not images:
        raise InputError(f"no image can be read: {skipped_files(reasons, len(paths))}")
    return images


def _negative(direction: tuple[float, float, float]) -> tuple[float, float, float]:
    red, green, blue = direction
    return -red, -green, -blue


def _within(size: Sequence[int], most: int) -> tuple[int, int]:
    """The size reduced so that the area is at most most^2, with the same proportions."""
    scale = min(most / math.sqrt(size[0] * size[1]), 1.0)
    return prepared_size(size[0], size[1], scale)


def _colours(
    images: Sequence[Tensor], is_grey: bool
) -> tuple[Literal["direction", "distance"], tuple[float, float, float], float]:
    """How objects differ from the background: the kind of contrast, its direction, agreement.

    If the colours that lie far from the commonest all lie on one side of it, objects have one
    direction: the first principal component of the colours. Its sign makes the distribution of
    the contrast skewed to the right, as objects cover less than half of most images.
    """
    smooth = [np.stack([ndimage.gaussian_filter(c, 1) for c in im.numpy()]) for im in images]
    if is_grey:
        direction = np.full(3, 1 / 3)
    else:
        flat = [image - np.median(image, axis=(1, 2), keepdims=True) for image in smooth]
        colours = np.concatenate([image.reshape(3, -1)[:, ::7] for image in flat], axis=1)
        direction = np.linalg.eigh(np.cov(colours, bias=True))[1][:, -1]
        direction = direction / np.abs(direction).sum()
    greys = [np.tensordot(direction, image, 1) for image in smooth]
    skews = []
    for grey in greys:
        even = grey - ndimage.gaussian_filter(grey, max(grey.shape) / 4)
        spread = float(even.std())
        skews.append(float((even**3).mean()) / spread**3 if spread > 1e-6 else 0.0)
    sign = -1 if np.median(skews) < 0 else 1
    means = []
    for image, grey in zip(smooth, greys, strict=True):
        ground = sign * grey <= otsu(sign * grey)
        apart = image - np.median(image[:, ground], axis=1)[:, None, None]
        distance = np.sqrt(np.square(apart).sum(0))
        far = distance > max(otsu(distance), 1e-6)
        units = apart[:, far] / distance[far]
        if far.any():
            means.append(units.mean(1))
    agreement = float(np.linalg.norm(np.mean(means, axis=0))) if means else 1.0
    r, g, b = (round(sign * float(weight), 4) for weight in direction)
    return ("direction" if agreement >= _ALIGNED else "distance"), (r, g, b), agreement


def _diameter(
    images: Sequence[Tensor], config: PrepareConfig, on_progress: Callable[[float], None]
) -> tuple[float, _Measured, float]:
    """The median side of compact objects, these objects, and the evidence for them, in [0, 1].

    Objects are found with an assumed diameter, and their median side is assumed next, until both
    agree. In noise the sides follow the assumed diameter; those of real objects hardly change with
    it: they are steady. The search starts at a diameter that its median side nearly equals:
    preferably a steady one with two objects an image, as uneven light looks like one large object;
    else a steady one; else any. Of several it takes the largest whose objects hold about as much
    of the contrast as those of any, so that objects are measured and not their parts. If there is
    none, as with stars of any brightness, it starts at the nearest diameter whose objects hold the
    contrast above the noise.
    """
    largest = max(max(image.shape[1:]) for image in images)
    starts = [start for start in _STARTS if start < largest / 2] or [max(largest / 4, _LEAST)]
    tried = []
    for number, assumed in enumerate(starts):
        measured = _compact(images, config, assumed)
        on_progress((number + 1) / (len(starts) + 1))
        if len(measured.sides) >= _FEWEST:
            tried.append(measured)
    before, after = tried[:1] + tried[:-1], tried[1:] + tried[-1:]
    growth = [_growth(one, other) for one, other in zip(before, after, strict=True)]
    agreeing = [i for i, item in enumerate(tried) if item.apart < math.log(_NEAR)]
    steady = [i for i in agreeing if growth[i] < _STEADY]
    several = [i for i in steady if len(tried[i].sides) >= _SEVERAL * len(images)]
    bright = [i for i, item in enumerate(tried) if item.bright_share >= _SHARE]
    if group := several or steady or agreeing:
        least = _KEPT * max(tried[i].share for i in group)
        start = [i for i in group if tried[i].share >= least][-1]
    elif bright:
        start = min(bright, key=lambda i: tried[i].apart)
    else:
        nothing = _Measured(1.5 * OBJECT_PX, np.zeros(0), 0.0, 0.0, len(images), 1)
        return nothing.assumed, nothing, 0.0
    best = tried[start]
    most = _MORE * len(best.sides)
    for _ in range(_ROUNDS):
        if len(best.sides) < _FEWEST or best.apart < math.log(_CLOSE):
            break
        measured = _compact(images, config, min(max(best.median, _LEAST), _MOST))
        parts = measured.share < _KEPT * best.share or len(measured.sides) > most
        if measured.assumed < best.assumed and parts:
            break  # it would go on to parts of objects
        best = measured
    evidence = best.bright_share * (1 - min(max(growth[start], 0.0), 1.0))
    diameter = best.median if len(best.sides) else best.assumed
    return min(max(diameter, _LEAST), _MOST), best, evidence


def _growth(one: _Measured, other: _Measured) -> float:
    """Exponent of the growth of the median side with the assumed diameter: 0 if it stays."""
    if one.assumed == other.assumed:
        return 1.0
    return math.log(other.median / one.median) / math.log(other.assumed / one.assumed)


def _compact(images: Sequence[Tensor], config: PrepareConfig, diameter: float) -> _Measured:
    """The compact objects of an assumed diameter in the middles of images."""
    scale = OBJECT_PX / diameter
    sides: list[npt.NDArray[np.float64]] = []
    held, total, measured = np.zeros(2), np.zeros(2), 0
    for image in images:
        middle = _middle(image, math.ceil(_SIDE / scale))
        seen = prepare_image(middle, replace(config, scale=scale))[0].numpy()
        parts = find_parts(seen, OBJECT_PX, fine=False)
        extent = parts.boxes[:, 2:] - parts.boxes[:, :2]
        labels = parts.label_image.ravel()
        area = np.bincount(labels, minlength=len(extent) + 1)[1:]
        contrasts = [seen.ravel(), np.where(seen > _BRIGHT, seen, 0).ravel()]
        mass = np.stack([np.bincount(labels, c, len(extent) + 1)[1:] for c in contrasts])
        end = np.array(seen.shape[::-1])
        inside = (parts.boxes[:, :2] > 0).all(1) & (parts.boxes[:, 2:] < end).all(1)
        kept = inside & ((area >= _COMPACT * extent.prod(1)) | _are_rods(parts.label_image, area))
        sides.append(np.sqrt(extent[kept].prod(1, dtype=np.float64)) / scale)
        held += mass[:, kept].sum(1)
        total += [contrast.sum() for contrast in contrasts]
        measured += seen.size
    share, bright = (held / np.maximum(total, _LEAST_MASS)).tolist()
    return _Measured(diameter, np.concatenate(sides), share, bright, len(images), measured)


def _are_rods(
    labels: npt.NDArray[np.int32],  # [H, W]
    area: npt.NDArray[np.integer],  # [n] pixels
) -> npt.NDArray[np.bool_]:  # [n]
    """Which objects are long, and as full as a rectangle of the same second moments."""
    rows, columns = np.nonzero(labels)
    number = labels[rows, columns] - 1

    def mean(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        return np.bincount(number, values, len(area)) / area

    y, x = rows - mean(rows)[number], columns - mean(columns)[number]
    yy, xx, yx = mean(y * y) + 1 / 12, mean(x * x) + 1 / 12, mean(y * x)  # 1/12 is a pixel's
    middle, apart = (yy + xx) / 2, np.hypot((yy - xx) / 2, yx)
    full = area >= _FULL * 12 * np.sqrt(np.maximum(yy * xx - yx**2, 0))
    return full & (middle + apart > _LONG**2 * (middle - apart))


def _middle(image: Tensor, side: int) -> Tensor:
    """The middle of an image, at most side x side."""
    top, left = (max(length - side, 0) // 2 for length in image.shape[1:])
    return image[:, top : top + side, left : left + side]


def _levels(
    images: Iterable[Array], config: PrepareConfig, least_noises: Iterable[float]
) -> tuple[float, float]:
    """The typical contrast, of images in which it stands out if there are any, and the noise."""
    measured = []
    for image, least in zip(images, least_noises, strict=True):
        contrast = contrast_of(image, config, least)
        noise = noise_of(contrast, least)
        measured.append((typical_contrast(contrast, noise), noise))
    clear = [pair for pair in measured if stands_out(*pair)] or measured
    return float(np.median([t for t, _ in clear])), float(np.median([s for _, s in measured]))


def _background(
    images: Sequence[Array], config: PrepareConfig, typical: float, least_noise: float
) -> Literal["image", "surface"]:
    """A surface if the background of most images is uneven."""
    spreads = []
    for image in images:
        weights = np.asarray(config.direction, np.float32)[:, None, None]
        surface = background_of((image * weights).sum(0), "surface", 20.0, least_noise)
        spreads.append(float(surface.std()))
    return "surface" if np.median(spreads) > _UNEVEN * typical else "image"


def _rounded(value: float) -> float:
    """With four significant digits."""
    return float(f"{value:.4g}")
