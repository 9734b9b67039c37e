"""A folder of images: crops for training, whole images otherwise, ground truth if there is any."""

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from spairkit.config import DataConfig, PrepareConfig
from spairkit.data.annotations import NO_FILE, Annotated, read_annotations
from spairkit.data.crops import Cuts, ImagesOnDevice, images_on_device
from spairkit.data.glyphs import Split
from spairkit.data.hashing import below, draws, hashed, seeded
from spairkit.data.scenes import Batch
from spairkit.detections import Truth
from spairkit.errors import ImageFileError, InputError
from spairkit.frames import file_of
from spairkit.images import (
    image_size,
    list_images,
    read_pixels,
    skipped_files,
    stored_form,
    to_colour,
    upright_boxes,
    warn,
)
from spairkit.names import printable
from spairkit.preparation import of_prepared_pixels, prepare_pixels, prepared_size

ANNOTATIONS = "annotations.json"

_CACHE_BYTES = 1 << 29
# files of a folder of fewer pixels are all decoded when it is opened
_DECODED_PIXELS = 1 << 26
# of the crops of a validation together
_CROPPED_PIXELS = 1 << 22
_ANNOUNCED = 3  # damaged files that are found late
# crops drawn from one choice of images, if not all fit into memory
_WINDOW = 4096
_SPLITS = {"train": 0, "validation": 1, "test": 2}
_CROPS, _WINDOWS = range(2)
_FILE, _TOP, _LEFT, _WHETHER, _WHICH = range(5)
_BLOCK = 4  # px of a prepared image: its parts that are bright or not
_BRIGHT = 0.2  # of a typical object's white; noise is below it
# a part of a box thinner than this is dropped (docs/model.md 10)
_THIN_PX = 1e-6


class ImageFolder:
    """The images of a folder and its subfolders, in the order of their paths.

    An image file is a folder of its frames. Files that cannot be read are skipped: `skipped` has
    the reasons. Files whose headers are whole but whose pixels are damaged are found when the
    folder is opened if it has at most 67 million pixels, and else when they are first decoded, with
    a warning; in place of their crops those of the next file are taken.

    Of ten files or more, about a tenth is for validation, those of lowest hash of the name, so that
    a file stays in its split when others are added. Of fewer, all are for both. The test split
    holds every file.

    Crops are `image_height` x `image_width`, at places drawn uniformly or, with `crops` of
    `objects`, every second one where the prepared image is bright; a smaller image is padded to the
    right and below by repeating its last pixels. File and place of a crop are a pure function of
    the files, `config.seed`, the split and the index; the validation split takes its files in turn,
    and if some of them are annotated only these. Decoded images are cached, as compact as in the
    file, up to 512 MiB; if the split needs more, each 4,096 consecutive indices share as many files
    as fit.

    Ground truth is read from `annotations.json` (COCO) in the folder. Boxes are those of the stored
    pixels, and turn with an image that EXIF turns, unless the size of its entry is the upright one.
    In crops they are clipped. What is harmless in that file is passed over, with one warning that
    counts it.

    Attributes:
        categories: the ids of the annotations' categories.
    """

    def __init__(
        self,
        config: DataConfig,
        split: Split,
        device: torch.device | str = "cpu",
        prepare: PrepareConfig | None = None,
        *,
        needs_truth: bool = True,
    ) -> None:
        """Reads the header of every file.

        Args:
            prepare: of crops, which are cut from prepared images; None: none.
            needs_truth: if not, annotations that are wrong are as good as none, with a warning.

        Raises:
            InputError: there is no such folder or no image in it, none of the split can be read, or
                the annotations are wrong and needed.
        """
        self.config = config
        self.prepare = prepare or PrepareConfig()
        self.split: Split = split
        self.device = torch.device(device)
        files = list_images(Path(config.path))
        alone = not Path(config.path).is_dir()
        self._folder = Path(config.path).parent if alone else Path(config.path)
        names = [path.relative_to(self._folder).as_posix() for path in files]
        self.num_files = len(names)
        """Number of image files in the folder, skipped ones included."""
        self._broken: dict[str, str] = {}  # name, and reason
        sizes = self._measured(names)
        self.categories: list[int] = []
        self._annotated: dict[str, Annotated] = {}
        if (self._folder / ANNOTATIONS).exists():
            try:
                self._annotate(names, sizes, alone)
            except InputError as error:
                if needs_truth:
                    raise
                _warn_once(f"{error}; the annotations are left out, and ids of images count from 1")
        self._numbers = _numbers(names, self._annotated)
        names = list(sizes)
        self._names = _of_split(names, split)
        self.has_truth = any(self._truth(name) is not None for name in self._names)
        self._sizes = [sizes[name] for name in self._names]
        self.sizes = set(self._sizes)  # height and width, of whole images
        self._prepared_sizes = [prepared_size(*size, self.prepare.scale) for size in self._sizes]
        needed = [self._bytes(size) for size in self._prepared_sizes]
        self._cache: OrderedDict[int, Tensor] = OrderedDict()
        self._cached_bytes = 0
        self._bright: dict[int, Tensor] = {}
        self._kept = len(self._names)
        if sum(needed) > _CACHE_BYTES:
            self._kept = max(min(_CACHE_BYTES // max(needed), self._kept), 1)
        self._key, self._window_key = (
            seeded(config.seed, _SPLITS[split], purpose) for purpose in (_CROPS, _WINDOWS)
        )
        self._validated = [
            file
            for file, name in enumerate(self._names)
            if self._truth(name) is not None or not self.has_truth
        ]
        self._crops: Batch | None = None
        damage = [_damage(self._folder / self._names[0])]
        while all(damage):  # ends at the first file that can be read
            if len(damage) == len(self._names):
                raise InputError(
                    f"no {split} image can be read: {skipped_files(damage, len(names))}"
                )
            damage.append(_damage(self._folder / self._names[len(damage)]))

    @property
    def skipped(self) -> list[str]:
        """Why files were skipped so far: a line for each, which begins with its name."""
        return list(self._broken.values())

    def __len__(self) -> int:
        """Number of files of the validation or test split; TypeError for train."""
        if self.split == "train":
            raise TypeError("the train split has no length: any index is a crop")
        return len(self._names)

    def batch(self, indices: Tensor) -> Batch:
        """The crops of prepared images for `indices` ([B] int64), on the device of the dataset.

        Raises:
            ValueError: the indices are not a row of int64.
            InputError: a file has changed, or every file of the split is damaged.
        """
        return self.on_host(indices).to(self.device)

    def ahead(self, with_truth: bool) -> Callable[[Tensor], Batch | Cuts]:
        """A function that makes batches in a thread; `to(device)` completes one.

        A GPU that has room for the prepared images keeps them and cuts the crops itself. Else they
        are cut on the CPU.

        Args:
            with_truth: if not, the batches hold images only, and take less time.
        """
        images = images_on_device(self._prepared_sizes, self._channels, self.device)
        make = self.on_host if images is None else partial(self.cuts, images)
        return partial(make, with_truth=with_truth)

    def on_host(self, indices: Tensor, with_truth: bool = True) -> Batch:
        """As `batch`, but on the CPU, and for a GPU in memory that it copies without a stop."""
        height, width = self.config.image_height, self.config.image_width
        crops, truths = [], []
        for (_, top, left), pixels, truth in self._placed(indices, with_truth):
            assert pixels is not None
            crops.append(pixels[:, top : top + height, left : left + width])
            truths.append(truth)
        made = batch_of(self._prepared_crops(crops), truths, (height, width))
        return made.each(Tensor.pin_memory) if self.device.type == "cuda" else made

    def cuts(self, images: ImagesOnDevice, indices: Tensor, with_truth: bool = True) -> Cuts:
        """As `on_host`, but the crops are left to the device that holds the images."""
        places, truths, missing = [], [], {}
        for place, pixels, truth in self._placed(indices, with_truth, images.there):
            places.append(place)
            truths.append(truth)
            file = place[0]
            if pixels is not None and file not in missing:
                values = of_prepared_pixels(pixels, self.prepare)[: images.channels]
                missing[file] = values.contiguous()
                if self.config.crops == "objects":
                    self._bright_blocks(file, pixels)
        size = self.config.image_height, self.config.image_width
        objects = batch_of(torch.zeros(len(truths), 3, 0, 0), truths, size)
        made = Cuts(
            images, missing, torch.tensor(places, dtype=torch.int64).reshape(-1, 3), size, objects
        )
        return made.pinned() if self.device.type == "cuda" else made

    def _placed(
        self, indices: Tensor, with_truth: bool, elsewhere: Container[int] = ()
    ) -> Iterator[tuple[tuple[int, int, int], Tensor | None, Truth]]:
        """File, top and left of each crop, pixels of the file, and what is true of the crop.

        Pixels are None for the files `elsewhere`.
        """
        if indices.dtype != torch.int64 or indices.dim() != 1:
            raise ValueError(
                f"indices must be int64 [B], got {indices.dtype} {list(indices.shape)}"
            )
        indices = indices.cpu()
        keys = hashed(self._key, indices)
        height, width = self.config.image_height, self.config.image_width
        words = torch.stack(
            [draws(keys, purpose) for purpose in (_TOP, _LEFT, _WHETHER, _WHICH)], 1
        )
        # Python's numbers, which are faster one by one
        for drawn, word in zip(self._drawn(indices, keys), words.tolist(), strict=True):
            file, pixels = self._readable(drawn, elsewhere)
            rows, columns = self._prepared_sizes[file]
            top, left = self._place(file, pixels, (rows, columns), word)
            truth = self._prepared_truth(file) if with_truth else None
            if truth is not None:
                frame = (left, top, min(left + width, columns), min(top + height, rows))
                truth = _clipped(truth, frame)
            yield (file, top, left), pixels, NOTHING if truth is None else truth

    def _prepared_crops(self, crops: list[Tensor]) -> Sequence[Tensor] | Tensor:
        """The crops as a model sees them: of one form, as they mostly are, all at once."""
        height, width = self.config.image_height, self.config.image_width
        if len({(crop.dtype, crop.shape) for crop in crops}) == 1:
            together = of_prepared_pixels(torch.stack(crops), self.prepare)
            return _continued(together, height, width).contiguous()
        crops = [of_prepared_pixels(crop, self.prepare) for crop in crops]
        return [_continued(crop[None], height, width)[0] for crop in crops]

    def crops(self) -> Batch:
        """The same crops at every call, for a validation: the first `config.validation_images`.

        They have at most 4 million pixels together. If no image is larger than a crop, each is
        taken once. Errors as in `batch`.
        """
        if self._crops is None:
            height, width = self.config.image_height, self.config.image_width
            number = min(self.config.validation_images, max(_CROPPED_PIXELS // height // width, 1))
            if all(rows <= height and columns <= width for rows, columns in self._prepared_sizes):
                number = min(number, len(self._validated))
            # file by file, so that each is decoded once
            order = (torch.arange(number) % len(self._validated)).argsort(stable=True)
            made = self.batch(order)
            back = order.argsort()
            self._crops = made.part(back)
            self._cache.clear()
            self._cached_bytes = 0
        return self._crops

    def files(self) -> list[tuple[Path, int]]:
        """Path and id of each file of the split, in the order of `images`."""
        return [(self._folder / name, self._numbers[name]) for name in self._names]

    def images(self) -> Iterator[tuple[str, int, Tensor, Truth | None]]:
        """Path in the folder, id, whole image [3, H, W] and ground truth of each file of the split.

        Boxes may leave the image. Ids are those of the annotations; without annotations they count
        from 1. The ground truth of a file that is not annotated is None, and its id follows those
        of the annotations. Damaged files are left out.

        Raises:
            InputError: a file has changed, or every file of the split is damaged.
        """
        for file, name in enumerate(self._names):
            pixels = self._decoded(file)
            if pixels is None:
                continue
            image = to_colour(pixels).contiguous()
            yield name, self._numbers[name], image.to(self.device), self._truth(name)

    def _annotate(self, names: list[str], sizes: dict[str, tuple[int, int]], alone: bool) -> None:
        """Takes the annotations of the files, and warns of what was passed over."""
        annotations = read_annotations(self._folder / ANNOTATIONS)
        annotated = annotations.of_files(names)
        passed_over = annotations.passed_over
        if not alone:  # else the other entries are of the files beside it
            passed_over[NO_FILE] += len(annotations.images) - len(annotated)
            if annotations.images and not annotated:
                example = next(iter(annotations.images))
                raise InputError(
                    f"{printable(annotations.path)}: no file_name is an image of this folder, as "
                    f"{_shortened(example)}; correct the names"
                )
        turned = 0
        for name, size in sizes.items():
            if name in annotated:
                given = annotated[name]
                annotated[name], in_doubt = _upright(self._folder / name, size, given)
                turned += in_doubt
                _refuse_misfits(annotations.path, name, size, annotated[name])
        self._annotated, self.categories = annotated, annotations.categories
        counted = [f"{kind} ({number:,})" for kind, number in passed_over.items() if number]
        notes = [f"passed over {', '.join(counted)}"] if counted else []
        if turned:
            notes.append(
                f"images whose boxes are taken to be turned by EXIF, as the images are ({turned:,})"
            )
        if notes:
            _warn_once(f"{printable(annotations.path)}: {'; '.join(notes)}")

    def _truth(self, name: str) -> Truth | None:
        return self._annotated[name].truth if name in self._annotated else None

    def _prepared_truth(self, file: int) -> Truth | None:
        truth = self._truth(self._names[file])
        if truth is None:
            return None
        (rows, columns), (height, width) = self._prepared_sizes[file], self._sizes[file]
        scale = torch.tensor([columns / width, rows / height] * 2)
        return replace(truth, boxes=truth.boxes * scale, crowds=truth.crowds * scale)

    def _bytes(self, prepared_size: tuple[int, int]) -> int:
        """Bytes of a prepared image in the cache, of 8 bits where it keeps pixels and colours."""
        height, width = prepared_size
        plain = self.prepare.contrast == "none" and self.prepare.scale == 1
        return (3 if plain else 2 if self.prepare.contrast != "none" else 6) * height * width

    def _measured(self, names: list[str]) -> dict[str, tuple[int, int]]:
        """Height and width of the files that can be read; the others are skipped."""
        sizes = {}
        for name in names:
            try:
                sizes[name] = image_size(self._folder / name)
            except ImageFileError as error:
                self._broken[name] = str(error)
        if sum(height * width for height, width in sizes.values()) <= _DECODED_PIXELS:
            for name in list(sizes):
                if reason := _damage(self._folder / name):
                    self._broken[name] = reason
                    del sizes[name]
        if not sizes:
            raise InputError(f"no image can be read: {skipped_files(self.skipped, len(names))}")
        return sizes

    @property
    def _channels(self) -> int:
        """Of prepared images; those of a contrast are grey."""
        return 3 if self.prepare.contrast == "none" else 1

    def _place(
        self, file: int, pixels: Tensor | None, size: tuple[int, int], words: list[int]
    ) -> tuple[int, int]:
        """Top and left of a crop in a prepared image of `size`, by four words drawn for it.

        Uniform; or, with the crops `objects`, in every second crop a bright block of the image
        lies at a uniform place of the crop.
        """
        crop = self.config.image_height, self.config.image_width
        most = [max(length - side, 0) for length, side in zip(size, crop, strict=True)]
        if self.config.crops == "objects" and below(words[2], 2):
            bright = self._bright_blocks(file, pixels)
            if len(bright):
                block = bright[below(words[3], len(bright))].tolist()
                starts = [
                    _BLOCK * place - below(word, max(side - _BLOCK, 0) + 1)
                    for place, word, side in zip(block, words, crop, strict=False)
                ]
                return min(max(starts[0], 0), most[0]), min(max(starts[1], 0), most[1])
        return below(words[0], most[0] + 1), below(words[1], most[1] + 1)

    def _bright_blocks(self, file: int, pixels: Tensor | None) -> Tensor:  # [m, 2] rows and columns
        """The blocks of 4 x 4 pixels of a prepared image that are not background."""
        if file not in self._bright:
            assert pixels is not None
            grey = of_prepared_pixels(pixels, self.prepare).amax(0, keepdim=True)
            means = functional.avg_pool2d(grey, _BLOCK) if min(grey.shape[1:]) >= _BLOCK else grey
            self._bright[file] = (means[0] > _BRIGHT).nonzero()
        return self._bright[file]

    def _drawn(self, indices: Tensor, keys: Tensor) -> list[int]:
        """The file of each crop."""
        if self.split == "validation":
            return [self._validated[i] for i in (indices % len(self._validated)).tolist()]
        files = below(draws(keys, _FILE), self._kept)
        if self._kept < len(self._names):
            windows = hashed(self._window_key, indices // _WINDOW)
            files = below(draws(windows, files), len(self._names))
        drawn: list[int] = files.tolist()
        return drawn

    def _readable(self, file: int, elsewhere: Container[int]) -> tuple[int, Tensor | None]:
        """The file, or the next one that is not damaged, and its pixels if not `elsewhere`."""
        for step in range(len(self._names)):
            following = (file + step) % len(self._names)
            if following in elsewhere:
                return following, None
            pixels = self._pixels(following)
            if pixels is not None:
                return following, pixels
        raise InputError(
            f"no {self.split} image can be read: {skipped_files(self.skipped, self.num_files)}"
        )

    def _pixels(self, file: int) -> Tensor | None:
        """The prepared file, through a cache that evicts the least recently used."""
        if file in self._cache:
            self._cache.move_to_end(file)
            return self._cache[file]
        pixels = self._decoded(file)
        if pixels is None:
            return None
        pixels = prepare_pixels(pixels, self.prepare)
        self._cache[file] = pixels
        self._cached_bytes += pixels.nbytes
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes
        return pixels

    def _decoded(self, file: int) -> Tensor | None:
        """The pixels of a file; None if it is damaged, with a warning at the first time."""
        name, path = self._names[file], self._folder / self._names[file]
        if name in self._broken:
            return None
        try:
            pixels = read_pixels(path)
        except ImageFileError as error:
            self._broken[name] = str(error)
            if len(self._broken) <= _ANNOUNCED:
                warn(skipped_files([str(error)], self.num_files), stacklevel=2)
            return None
        if tuple(pixels.shape[1:]) != self._sizes[file]:
            raise InputError(f"{printable(path)}: changed during use; start again")
        return pixels


@lru_cache(maxsize=1 << 10)
def _warn_once(message: str) -> None:
    """A folder is opened for each split, and told of once."""
    warnings.warn(message, stacklevel=4)


def _damage(path: Path) -> str:
    """What is wrong with the pixels of an image file; empty if nothing is."""
    try:
        state = file_of(path)[0].stat()
    except OSError as error:
        return f"{printable(path)}: {error.strerror}"
    return _damage_at(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1 << 16)
def _damage_at(path: Path, changed: int, size: int) -> str:
    """Decodes a file that has not changed only once, though its folder is opened for each split."""
    try:
        read_pixels(path)
    except ImageFileError as error:
        return str(error)
    return ""


def batch_of(
    images: Sequence[Tensor] | Tensor, truths: Sequence[Truth], size: tuple[int, int]
) -> Batch:
    """A batch on the device of the images, which all have this height and width."""
    device = images[0].device if len(images) else torch.device("cpu")
    counts = torch.tensor([len(truth) for truth in truths], dtype=torch.int64)
    most = int(counts.max()) if len(counts) else 0
    most_crowds = max((len(truth.crowds) for truth in truths), default=0)
    crowds = torch.zeros(len(truths), most_crowds, 4) if most_crowds else None
    boxes = torch.zeros(len(truths), most, 4)
    labels = torch.full((len(truths), most), -1)
    for b, truth in enumerate(truths):
        if truth is NOTHING:
            continue
        boxes[b, : len(truth)], labels[b, : len(truth)] = truth.boxes, truth.labels
        if crowds is not None:
            crowds[b, : len(truth.crowds)] = truth.crowds
    if isinstance(images, Tensor):
        stack = images
    elif len(images) == 1:
        stack = images[0][None]  # no copy of a large image
    else:
        stack = torch.stack(list(images)) if images else torch.zeros(0, 3, *size)
    crowds = None if crowds is None else crowds.to(device)
    return Batch(stack, boxes.to(device), labels.to(device), counts.to(device), crowds)


NOTHING = Truth(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
"""The ground truth of an image without objects."""


def _continued(crops: Tensor, height: int, width: int) -> Tensor:  # [B, 3, ...]
    missing = (0, width - crops.shape[3], 0, height - crops.shape[2])
    return functional.pad(crops, missing, mode="replicate") if any(missing) else crops


def _clipped(truth: Truth, frame: tuple[int, int, int, int]) -> Truth:
    """The parts of boxes inside a frame (x1, y1, x2, y2), relative to its corner."""
    x1, y1, x2, y2 = frame
    least, most = torch.tensor([x1, y1, x1, y1]), torch.tensor([x2, y2, x2, y2])
    (boxes, kept), (crowds, kept_crowds) = (
        (inside, (inside[:, 2:] - inside[:, :2] > _THIN_PX).all(1))
        for inside in (
            torch.minimum(torch.maximum(given, least), most) - least
            for given in (truth.boxes, truth.crowds)
        )
    )
    return Truth(boxes[kept], truth.labels[kept], crowds[kept_crowds])


def _numbers(names: list[str], annotated: dict[str, Annotated]) -> dict[str, int]:
    """The id of each file: that of the annotations, or the next free one."""
    following = max((entry.image_id for entry in annotated.values()), default=0) + 1
    numbers = {}
    for name in names:
        if name in annotated:
            numbers[name] = annotated[name].image_id
        else:
            numbers[name] = following
            following += 1
    return numbers


def _of_split(names: list[str], split: Split) -> list[str]:
    if split == "test" or len(names) < 10:
        return names

    def position(name: str) -> bytes:
        return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()

    by_hash = sorted(names, key=position)
    tenth = sum(10 * position(name)[0] < 256 for name in names)
    validation = set(by_hash[: min(max(tenth, 1), len(names) - 1)])
    return [name for name in names if (name in validation) == (split == "validation")]


def _upright(path: Path, size: tuple[int, int], given: Annotated) -> tuple[Annotated, bool]:
    """Annotations turned with an image of this upright size; whether they may have been upright.

    They are of the stored pixels, which COCO's tools read, if the size that is given is not that of
    the upright image alone.
    """
    stored, orientation = stored_form(path)
    if orientation == 1 or (given.size == size and size != stored):
        return given, False
    upright_given = replace(given, size=size if given.size == stored else given.size)
    truth = given.truth
    if truth is None:
        return upright_given, False
    boxes, crowds = (
        upright_boxes(some, orientation, stored) for some in (truth.boxes, truth.crowds)
    )
    turned = replace(truth, boxes=boxes, crowds=crowds)
    in_doubt = (given.size is None or size == stored) and len(truth) + len(truth.crowds) > 0
    return replace(upright_given, truth=turned), in_doubt


def _shortened(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:77]}...")


def _refuse_misfits(path: Path, name: str, size: tuple[int, int], annotated: Annotated) -> None:
    height, width = size
    if annotated.size is not None and annotated.size != size:
        raise InputError(
            f"{printable(path)}: {name!r} has {height}x{width} pixels (height x width), "
            f"not {annotated.size[0]}x{annotated.size[1]}; correct the entry"
        )
    boxes = [] if annotated.truth is None else annotated.truth.boxes.tolist()
    for x1, y1, x2, y2 in boxes:
        if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            raise InputError(
                f"{printable(path)}: the box {x1:g}, {y1:g}, {x2:g}, {y2:g} of {name!r} lies "
                "outside its image; correct or remove the entry"
            )
