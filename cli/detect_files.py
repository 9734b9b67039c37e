"""The files that `detect` writes for each image: formats of other tools, and overlays."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spairkit.cli.files import ImageFiles, check_output, file_id, mirrored
from spairkit.errors import InputError

if TYPE_CHECKING:
    from spairkit.detections import Detections
    from spairkit.parts.plan import Item

_OVERLAY = ".png"
_LABELS = ".tif"


def write_files(item: "Item", detections: "Detections") -> None:
    """Writes the files of an image, before it counts as finished.

    Raises:
        InputError: the system refuses, or a label image is asked of a model without masks.
    """
    from spairkit.images import as_image, write_picture
    from spairkit.report.drawing import overlay

    image = detections.image
    assert isinstance(image, (str, os.PathLike))
    for path in map(Path, item.files):
        if path.suffix == _LABELS and detections.label_image is None:
            raise InputError(f"{path}: this model finds boxes only; a label image needs masks")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == _OVERLAY:
            write_picture(path, overlay(as_image(image), detections), os.fspath(image))
        else:
            detections.save(path)


@dataclass(frozen=True)
class FilesOfImages:
    """The files of each image; their folders are made when the first of them is written."""

    files: Mapping[Path, list[tuple[str, Path]]]
    """By image: each file with the option that asks for it."""

    def by_name(self) -> dict[str, tuple[str, ...]]:
        """The files of each image."""
        return {
            str(image): tuple(str(path) for _, path in pairs) for image, pairs in self.files.items()
        }

    def paths(self) -> list[Path]:
        """All files of all images."""
        return [path for pairs in self.files.values() for _, path in pairs]

    def refuse(self, inputs: Iterable[Path]) -> None:
        """Raises InputError if one of the files is an input, by this or any other name."""
        known = {file_id(path): path for path in inputs}
        for option, path in (pair for pairs in self.files.values() for pair in pairs):
            own = file_id(path)
            if own is not None and own in known:
                raise InputError(
                    f"{option}: {path} is an input ({known[own]}); name another folder"
                )
            if own is not None and not path.is_file():
                raise InputError(f"{option}: {path} is not a regular file; name another folder")


def folders_of(
    format_: str, out: Path | None, annotated: Path | None
) -> dict[str, tuple[Path, str]]:
    """The folders that get a file for each image, with the suffix of these files, by option.

    Raises:
        InputError: the format needs a folder or a package that is missing.
    """
    from spairkit import formats

    folders = {}
    if suffix := formats.SUFFIXES.get(format_):
        formats.require(format_)
        if out is None:
            raise InputError(
                f"--format {format_} writes a file for each image: name a folder, --out"
            )
        if out.suffix.lower() == suffix and not out.is_dir():
            raise InputError(
                f"--out {out}: --format {format_} writes a file for each image into a folder; "
                f"name the folder, such as {out.with_suffix('')}"
            )
        folders["--out"] = out, suffix
    if annotated is not None:
        folders["--annotated"] = annotated, _OVERLAY
    return folders


def files_of_images(
    words: list[Path], images: ImageFiles, folders: Mapping[str, tuple[Path, str]]
) -> FilesOfImages:
    """The files of each image, by option: a folder and a suffix.

    Raises:
        InputError: a folder cannot be written to or has images, or a file is an input.
    """
    if images.urls and folders:
        option = next(iter(folders))
        raise InputError(f"{option}: writes a file for each image of this machine, not of URLs")
    with_images = {file_id(path.parent) for path in images.inputs}
    files: dict[Path, list[tuple[str, Path]]] = {path: [] for path in images.paths}
    for option, (folder, suffix) in folders.items():
        _check_folder(folder, option)
        names = mirrored(words, images.paths, folder)
        for image, name in zip(images.paths, names, strict=True):
            files[image].append((option, name.with_name(f"{name.name}{suffix}")))
        written = {file_id(place) for place in {folder, *(name.parent for name in names)}}
        if with_images & written - {None}:
            raise InputError(f"{option} {folder}: holds images to read; name another folder")
        place = folder.resolve()
        for word in words if suffix == _LABELS else ():
            if word.is_dir() and word.resolve() in place.parents:
                raise InputError(
                    f"{option} {folder}: label images in {word} would be taken for images; name a "
                    "folder outside"
                )
    outputs = FilesOfImages(files)
    outputs.refuse(images.inputs)
    return outputs


def _check_folder(folder: Path, option: str) -> None:
    if folder.name in ("", ".."):
        raise InputError(f"{option} {folder}: name a folder; it is made if it is missing")
    if not folder.exists():
        check_output(folder, option)
    elif not folder.is_dir():
        raise InputError(f"{option} {folder}: is a file; name a folder")
    elif not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{option} {folder}: is not writable; name another folder")
