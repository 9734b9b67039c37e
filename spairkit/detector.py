"""`Detector`: everything between a user's image and boxes in its pixels.

detector = spairkit.load()                # the packaged model, or a run, or a checkpoint
found = detector.detect("cells.tif")
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from spairkit.backends import computing_in
from spairkit.config import ClassicalConfig, Config, ConnCompConfig, SearchMode
from spairkit.detections import Detections, Explanation
from spairkit.errors import ImageFileError, InputError
from spairkit.images import (
    ImageLike,
    as_image,
    list_images,
    read_pixels,
    same_sized,
    skipped_files,
    to_colour,
    warn,
)
from spairkit.models.loading import Network, from_checkpoint
from spairkit.models.networks import check_images
from spairkit.models.parts import Part
from spairkit.models.spair import SPAIR
from spairkit.preparation import (
    in_file_pixels,
    of_prepared_pixels,
    prepare_images,
    prepare_pixels,
    prepared_size,
    resized,
)
from spairkit.search.calibration import Calibration, calibration_of
from spairkit.search.search import PosteriorSearch, Progress
from spairkit.storage.checkpoints import Checkpoint, load_checkpoint
from spairkit.storage.runs import pretrained
from spairkit.tiles import WHOLE_PIXELS, Mosaic, Tile, elsewhere, tiles_of

_MAX_BATCH_PIXELS = 1 << 22  # unless one image has more
_TILES = 32  # whose results are held at once

Result = TypeVar("Result")


class Detector:
    """A trained network, and the preparation of images that it was trained with.

    Every command, validation and comparison finds objects through this class.

    Args:
        network: in evaluation mode, on the device to compute on.
        config: of its run.
        box_contrast: draws boxes round pixels above this share of an object's height, in [0, 1); 0
            keeps the network's own boxes, None takes `config.model.box_contrast`.
        search: of the objects of the highest posterior probability, by SPAIR: "off", "refine" or
            "full"; None takes `config.search.mode`.
        calibration: of the search; None takes the default.
        name: the origin of the network, for `repr` and reports.

    Attributes:
        on_progress: called during a search with the name of a phase and the share of it that is
            done, so that a search in a large image can be watched; None at first.

    Raises:
        InputError: `box_contrast` or `search` is given, and the network has none.
        ValueError: `box_contrast` is out of range.
    """

    def __init__(
        self,
        network: Network,
        config: Config,
        *,
        box_contrast: float | None = None,
        search: SearchMode | None = None,
        calibration: Calibration | None = None,
        name: str = "",
    ) -> None:
        self.network, self.config, self.name = network, config, name
        self.search: SearchMode = config.search.mode if search is None else search
        self.is_calibrated = calibration is not None and self.search == config.search.mode
        """Whether scores and counts were calibrated with this search."""
        by_trust = self.search != "off" and config.search.start == "watershed"
        self.has_intervals = self.is_calibrated or by_trust
        """Whether intervals of the count rest on known objects, of its images or of others."""
        self.calibration = calibration or Calibration()
        self.finder: Network | PosteriorSearch = network
        self.on_progress: Progress | None = None
        self._tiles = 0, 1  # the one that is searched, and their number
        if self.search not in get_args(SearchMode):
            raise ValueError(f"search must be off, refine or full, got {search!r}")
        if self.search != "off":
            if not isinstance(network, SPAIR):
                raise InputError(
                    f"{config.model.kind} has no search; remove it (--search), or use off"
                )
            self.finder = PosteriorSearch(
                network,
                self.search,
                config.search.beta,
                self.calibration,
                self._progress,
                config.search.start,
            )
        self.box_contrast = box_contrast
        if isinstance(config.model, ClassicalConfig):
            if box_contrast is not None:
                raise InputError(
                    f"{config.model.kind} draws boxes around whole objects; remove the box "
                    "contrast (--box-contrast)"
                )
        elif box_contrast is None:
            self.box_contrast = config.model.box_contrast
        elif not 0 <= box_contrast < 1:
            raise ValueError(f"box_contrast must lie in [0, 1), got {box_contrast}")

    def __repr__(self) -> str:
        """The model, where it came from, its search and its device, in one line."""
        source = f" from {self.name}" if self.name else ""
        search = "" if self.search == "off" else f", search {self.search}"
        return f"Detector({self.config.model.kind}{source}{search}, on {self.device})"

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        device: torch.device = next(iter(self.network.state_dict().values())).device
        return device

    @property
    def count_is_given(self) -> bool:
        """Whether the network needs the true number of objects (AIR and DAIR, count "given")."""
        return self.config.model.count_is_given

    @property
    def whole_pixels(self) -> bool:
        """Whether boxes end at the edges of pixels; see `metrics.ap_spair`."""
        return self.box_contrast is None or self.box_contrast > 0

    def without_watershed(self) -> "Detector":
        """Its encoder alone, if its search starts from a watershed; else this detector.

        Only so can its agreement with a watershed say anything.
        """
        if self.search == "off" or self.config.search.start != "watershed":
            return self
        contrast = self.box_contrast
        return Detector(self.network, self.config, box_contrast=contrast, search="off")

    def cells(self, size: tuple[int, int]) -> int:
        """Cells of SPAIR's grid in an image of `size` (height, width), px; 0 of other models."""
        if not isinstance(self.network, SPAIR):
            return 0
        rows, columns = self.network.grid(*prepared_size(*size, self.config.prepare.scale))
        return rows * columns

    def detect(
        self, image: ImageLike, *, threshold: float = 0.5, count: int | None = None
    ) -> Detections:
        """The objects in one image of any size, with boxes in its pixels.

        Args:
            image: a path, a NumPy array [H, W], [H, W, 3] or [H, W, 4], a PIL image or a tensor
                [3, H, W]; see `images.as_image`.
            threshold: objects with a score above it are returned, in [0, 1).
            count: the true number of objects, for AIR and DAIR that were trained with it.

        Raises:
            TypeError: `image` is of another type.
            ValueError: its shape, dtype or values, `threshold` or `count` are not supported.
            InputError: a file cannot be read; the network takes images of another size; or it
                needs the count and gets none, or infers the count and gets one.
        """
        _refuse_folder(image)
        return self._detect([(image, self._opened(image))], threshold, count)[0]

    def detect_many(
        self,
        images: str | os.PathLike[str] | Iterable[ImageLike],
        *,
        threshold: float = 0.5,
        count: int | None = None,
        batch_size: int = 32,
        on_unreadable: Callable[[ImageLike, ImageFileError], None] | None = None,
    ) -> Iterator[Detections]:
        """The objects in each of many images, in order; neighbours of one size share a batch.

        One batch and one image are held at most, and of a folder or a list the next ones, which a
        thread reads: 4 million pixels, or one image. Files of a folder that cannot be read are
        skipped, with a warning.

        Args:
            images: a folder, whose image files are taken in the order of their paths, a stack (a
                file of several images), or images as `detect` takes them. They may differ in size.
            threshold: as in `detect`.
            count: the true number of objects in every image, as in `detect`.
            batch_size: images in a batch, at most; large images make smaller batches.
            on_unreadable: called in place of the warning or, for images of an iterable, of raising
                the error; the image is left out.

        Raises:
            TypeError, ValueError, InputError: as `detect`; for an image, after the results of the
                images before it.
        """
        sources: Iterable[ImageLike] = ()
        if isinstance(images, (str, os.PathLike)):
            sources = files = list_images(Path(images))
            on_unreadable = on_unreadable or _warned_of(len(files))
        elif isinstance(images, Iterable) and getattr(images, "ndim", 4) == 4:
            sources = images
        else:  # an array, a tensor or a PIL image
            raise TypeError("detect_many takes a folder or several images; use detect for one")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._options(threshold, self._counts(count, 1))  # raises here, not at the first image
        read = self._read(sources, on_unreadable)
        grows = max(self.config.prepare.scale, 1.0) ** 2  # prepared pixels count
        groups = same_sized(read, batch_size, round(_MAX_BATCH_PIXELS / grows))
        return (found for group in groups for found in self._detect(group, threshold, count))

    def explain(
        self, image: ImageLike, *, threshold: float = 0.5, count: int | None = None
    ) -> Explanation:
        """The objects in one image, their appearances and the reconstruction, in one pass.

        Arguments and errors as in `detect`.
        """
        _refuse_folder(image)
        counts, opened = self._counts(count, 1), self._opened(image)
        if self._cuts(opened):
            with computing_in("float32", self.device):
                explanation = self._explained(opened, self._options(threshold, counts))
        else:
            explanation = self.explain_batch(opened[None], threshold, counts)[0]
        detections = replace(explanation.detections, image=image)
        return replace(explanation, detections=detections)

    def detect_batch(
        self,
        images: Tensor,  # [B, 3, H, W] in [0, 1], before their preparation
        threshold: float = 0.5,
        counts: Tensor | None = None,  # [B] int64, for a network that is given them
    ) -> list[Detections]:
        """The objects in each image of a batch that is already read, for training and metrics.

        Returns:
            B `Detections` in order, on the CPU.

        Raises:
            ValueError: `threshold` is out of [0, 1), or `images` has another shape or dtype.
            InputError: as `detect`.
        """
        options = self._options(threshold, counts)
        check_images(images)
        with computing_in("float32", self.device):  # torch would use TF32 in convolutions
            if self._cuts(images):
                return [self._found(image, options) for image in images]
            seen = self._seen(images)
            found = self._finder(_size(seen)).detect(seen, **options)
        return [in_file_pixels(item, _size(seen), _size(images)) for item in found]

    def explain_batch(
        self, images: Tensor, threshold: float = 0.5, counts: Tensor | None = None
    ) -> list[Explanation]:
        """`explain` for a batch that is already read; arguments and errors as in `detect_batch`."""
        options = self._options(threshold, counts)
        check_images(images)
        with computing_in("float32", self.device):
            if self._cuts(images):
                return [self._explained(image, options) for image in images]
            seen = self._seen(images)
            explained = self._finder(_size(seen)).explain(seen, **options)
        return [
            _in_file(item, image, _size(seen))
            for item, image in zip(explained, images.float().cpu(), strict=True)
        ]

    def _finder(self, size: tuple[int, int]) -> Network | PosteriorSearch:
        """The search, but the network alone for prepared images thinner than a cell.

        No object fits into one. The search would explain its noise by an object in each cell, and
        take as long as for an image of whole cells.
        """
        network = self.network
        thin = isinstance(network, SPAIR) and min(size) < network.config.cell
        return network if thin else self.finder

    def _seen(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, 3, h, w]
        """The prepared images, on the device."""
        return prepare_images(images.to(self.device), self.config.prepare)

    def _read(
        self,
        sources: Iterable[ImageLike],
        skip: Callable[[ImageLike, ImageFileError], None] | None,
    ) -> Iterator[tuple[ImageLike, Tensor]]:
        for source, image in self._opened_ahead(sources):
            if isinstance(image, Tensor):
                yield source, image
            elif isinstance(image, ImageFileError) and skip is not None:
                skip(source, image)
            else:
                raise image

    def _opened_ahead(
        self, sources: Iterable[ImageLike]
    ) -> Iterator[tuple[ImageLike, Tensor | Exception]]:
        """Each source with its image, or the reason why there is none.

        The next files of a list are read in a thread meanwhile, until they have 4 million pixels.
        """

        def opened(source: ImageLike) -> Tensor | Exception:
            try:
                return self._opened(source)
            except Exception as error:
                return error

        if not (isinstance(sources, (list, tuple)) and len(sources) > 1):
            yield from ((source, opened(source)) for source in sources)
            return
        ready: deque[tuple[ImageLike, Tensor | Exception]] = deque()
        pixels, stopped, change = 0, False, threading.Condition()

        def has_room() -> bool:
            return stopped or pixels < _MAX_BATCH_PIXELS

        def read() -> None:
            nonlocal pixels
            for source in sources:
                with change:
                    change.wait_for(has_room)
                    if stopped:
                        return
                image = opened(source)
                with change:
                    ready.append((source, image))
                    pixels += _pixels(image)
                    change.notify()

        reader = threading.Thread(target=read, name="spairkit-reader", daemon=True)
        reader.start()
        try:
            for _ in sources:
                with change:
                    change.wait_for(lambda: ready)
                    source, image = ready.popleft()
                    pixels -= _pixels(image)
                    change.notify()
                yield source, image
        finally:
            with change:
                stopped = True
                change.notify()
            reader.join()

    def _cuts(self, images: Tensor) -> bool:  # [..., H, W]
        """Whether images are so large, once they are prepared, that they are cut into tiles."""
        height, width = prepared_size(*_size(images), self.config.prepare.scale)
        return isinstance(self.network, SPAIR) and height * width > WHOLE_PIXELS

    def _opened(self, source: ImageLike) -> Tensor:
        """The image; of a large file the pixels, which take less memory."""
        if not isinstance(source, (str, os.PathLike)):
            return as_image(source)
        pixels = read_pixels(os.fspath(source))
        return pixels if self._cuts(pixels) else to_colour(pixels).contiguous()

    def _found(self, pixels: Tensor, options: dict[str, Any]) -> Detections:
        """The objects of an image that is cut into tiles."""
        mosaic = self._joined(pixels, options, explain=False)
        return in_file_pixels(mosaic.found(), mosaic.size, _size(pixels))

    def _explained(self, pixels: Tensor, options: dict[str, Any]) -> Explanation:
        """The explanation of an image that is cut into tiles."""
        mosaic = self._joined(pixels, options, explain=True)
        image = to_colour(pixels.cpu())
        return _in_file(mosaic.explained(image), image, mosaic.size)

    def _joined(self, pixels: Tensor, options: dict[str, Any], *, explain: bool) -> Mosaic:
        """The objects of the tiles of an image [1 or 3, H, W]."""
        network, prepare = self.network, self.config.prepare
        prepared = prepare_pixels(pixels.cpu(), prepare)
        size = _size(prepared)
        finder = self._finder(size)
        assert isinstance(network, SPAIR)
        assert isinstance(finder, (SPAIR, PosteriorSearch))

        def seen(some: list[int]) -> Tensor:  # [n, 3, h, w]
            pixels = [of_prepared_pixels(tiles[i].of(prepared), prepare) for i in some]
            return torch.stack(pixels).to(self.device)

        tiles = tiles_of(*size, network.config.cell)
        parts = [Part((t.rows.start, t.columns.start), size, t.inner) for t in tiles]

        def guessed(some: list[int]) -> list[Tensor]:
            latents, _ = network.infer(seen(some), part=[parts[i] for i in some])
            pairs = zip(latents.boxes, latents.presence > 0, strict=True)
            return [boxes[present].cpu() for boxes, present in pairs]

        def found(some: list[int]) -> list[Detections] | list[Explanation]:
            self._tiles = some[0], len(tiles)
            if isinstance(finder, PosteriorSearch):
                part: Any = parts[some[0]]  # it searches in one tile at a time
            else:
                part = [parts[i] for i in some]
            find = finder.explain if explain else finder.detect
            results = find(seen(some), **options, part=part)
            self._progress("done", 1.0)
            return results

        together = _TILES
        if isinstance(finder, PosteriorSearch):
            outside = elsewhere(tiles, list(_in_batches(tiles, guessed, _TILES)))
            parts = [replace(part, outside=n) for part, n in zip(parts, outside, strict=True)]
            together = 1
        mosaic = Mosaic(size)
        for tile, result in zip(tiles, _in_batches(tiles, found, together), strict=True):
            if isinstance(result, Explanation):
                mosaic.add_explained(tile, result)
            elif isinstance(result, Detections):
                mosaic.add(tile, result)
        self._tiles = 0, 1
        return mosaic

    def _progress(self, phase: str, share: float) -> None:
        if self.on_progress is not None:
            tile, tiles = self._tiles
            if tiles > 1:
                phase = f"tile {tile + 1} of {tiles}: {phase}"
            self.on_progress(phase, (tile + share) / tiles)

    def _detect(
        self, group: list[tuple[ImageLike, Tensor]], threshold: float, count: int | None
    ) -> list[Detections]:
        sources, images = zip(*group, strict=True)
        if self._cuts(images[0]):
            options = self._options(threshold, self._counts(count, 1))
            with computing_in("float32", self.device):
                found = [self._found(image, options) for image in images]
        else:
            counts = self._counts(count, len(group))
            found = self.detect_batch(torch.stack(images), threshold, counts)
        return [replace(item, image=source) for item, source in zip(found, sources, strict=True)]

    def _counts(self, count: int | None, images: int) -> Tensor | None:
        if count is None:
            return None
        if not isinstance(count, Integral) or count < 0:
            raise ValueError(f"count must be a whole number from 0, got {count!r}")
        return torch.full((images,), int(count))

    def _options(self, threshold: float, counts: Tensor | None) -> dict[str, Any]:
        """The arguments that the network takes besides images."""
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
        if counts is not None and not self.count_is_given:
            raise InputError("this model infers the count itself; remove count (--count)")
        if counts is None and self.count_is_given:
            raise InputError(
                f"this {self.config.model.kind.upper()} was trained with the number of objects "
                "(model.count = 'given'): give it with --count N, or train a model with --set "
                "model.count=inferred"
            )
        if isinstance(self.config.model, ConnCompConfig):
            return {}
        options: dict[str, Any] = {"threshold": threshold}
        if not isinstance(self.config.model, ClassicalConfig):
            options["box_contrast"] = self.box_contrast
        return options | ({"counts": counts} if self.count_is_given else {})


def load(
    path: str | os.PathLike[str] | None = None,
    device: torch.device | Literal["auto", "cpu", "cuda"] = "auto",
    *,
    box_contrast: float | None = None,
    search: SearchMode | None = None,
) -> Detector:
    """The detector of a run, a checkpoint folder or its model file; by default the packaged one.

    Args:
        path: of a run its best checkpoint is taken. None is the model that ships with spairkit:
            the preset `quick`, trained on digits.
        device: "auto" takes a GPU if there is one.
        box_contrast, search: as in `Detector`.

    Raises:
        InputError: there is nothing at `path`, or it is damaged, foreign or of another version; or
            the device cannot be used; or a model without weights is given a `box_contrast`, or
            another model than SPAIR a `search`.
        ValueError: `box_contrast` is out of [0, 1), or `search` is unknown.

    Example:
        >>> import spairkit
        >>> spairkit.load(device="cpu")
        Detector(spair from the packaged model, search full, on cpu)
    """
    device = chosen_device(device)
    checkpoint = load_checkpoint(pretrained() if path is None else Path(path))
    detector = detector_of(checkpoint, device, box_contrast=box_contrast, search=search)
    if path is None:
        detector.name = "the packaged model"
    return detector


def detector_of(
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    box_contrast: float | None = None,
    search: SearchMode | None = None,
) -> Detector:
    """The detector of a checkpoint, with its calibration; arguments and errors as in `load`."""
    known = checkpoint.calibration
    return Detector(
        from_checkpoint(checkpoint, device),
        checkpoint.config,
        box_contrast=box_contrast,
        search=search,
        calibration=calibration_of(known, str(checkpoint.path)) if known else None,
        name=str(checkpoint.path),
    )


def chosen_device(device: torch.device | str) -> torch.device:
    """The torch device of "auto" (a GPU if there is one), "cpu", "cuda" or a torch device.

    Raises:
        InputError: the device is unknown, or a GPU is asked for and torch finds none.
    """
    if device == "auto":
        device = _default_device()
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {device!r}; choose from: auto, cpu, cuda")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device}: torch finds no such GPU; see `spairkit doctor`")
    return chosen


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _pixels(image: Tensor | Exception) -> int:
    return image[0].numel() if isinstance(image, Tensor) else 0


def _in_batches(
    tiles: list[Tile], compute: Callable[[list[int]], Sequence[Result]], most: int
) -> Iterator[Result]:
    """The results of tiles, in order.

    `compute` is given indices of tiles of one size, and gives a result for each. At most `most`
    results are held.
    """
    for start in range(0, len(tiles), most):
        chunk = range(start, min(start + most, len(tiles)))
        groups: dict[tuple[int, int], list[int]] = {}
        for i in chunk:
            rows, columns = tiles[i].rows, tiles[i].columns
            size = rows.stop - rows.start, columns.stop - columns.start
            groups.setdefault(size, []).append(i)
        results: dict[int, Result] = {}
        for (height, width), group in groups.items():
            step = max(_MAX_BATCH_PIXELS // (height * width), 1)
            for at in range(0, len(group), step):
                some = group[at : at + step]
                results |= zip(some, compute(some), strict=True)
        yield from (results[i] for i in chunk)


def _in_file(explained: Explanation, image: Tensor, prepared: tuple[int, int]) -> Explanation:
    """The explanation of a prepared image, in the pixels of its file."""
    size = _size(image)
    return replace(
        explained,
        detections=in_file_pixels(explained.detections, prepared, size),
        image=image,
        reconstruction=resized(explained.reconstruction, size),
    )


def _size(images: Tensor) -> tuple[int, int]:
    """Height and width."""
    return images.shape[-2], images.shape[-1]


def _warned_of(total: int) -> Callable[[ImageLike, ImageFileError], None]:
    """Warns of each file that is skipped, and raises InputError if all of them are."""
    reasons: list[str] = []

    def skip(source: ImageLike, error: ImageFileError) -> None:
        reasons.append(str(error))
        if len(reasons) == total:
            raise InputError(f"no image can be read: {skipped_files(reasons, total)}")
        warn(skipped_files([str(error)], total), stacklevel=2)

    return skip


def _refuse_folder(image: Any) -> None:
    if isinstance(image, (str, os.PathLike)) and os.path.isdir(image):
        raise InputError(f"{os.fspath(image)}: is a folder; use detect_many")
