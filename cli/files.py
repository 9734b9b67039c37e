"""The image files that a command is given: named one by one, or found in folders."""

from dataclasses import dataclass, field
from pathlib import Path

from spairkit.cli.console import say
from spairkit.errors import ImageFileError, InputError


@dataclass
class ImageFiles:
    """Files in the order given, those of a folder in the order of their names.

    A file of a folder that cannot be read is skipped; one that is named itself is an error.
    """

    paths: list[Path]
    numbers: list[int]
    """Ids of `paths`: those of a folder's annotations, or counted from 1, skipped files too."""
    total: int
    """Number of files, skipped ones included."""
    named: frozenset[Path] = frozenset()
    categories: list[int] = field(default_factory=list)
    """Ids of the categories of a folder's annotations."""
    skipped: list[str] = field(default_factory=list)
    """Why files were skipped, a line for each, which begins with its name."""

    def skip(self, path: object, error: ImageFileError) -> None:
        """Notes that a file cannot be read. Raises InputError if it is named, or the last one."""
        if path in self.named:
            raise error
        self.skipped.append(str(error))
        if len(self.skipped) == self.total:
            raise InputError(f"no image can be read: {self._listed()}")

    def say_skipped(self) -> None:
        """Names the files that were skipped so far, if there are any."""
        if self.skipped:
            say(self._listed())

    def _listed(self) -> str:
        from spairkit.images import skipped_files

        return skipped_files(self.skipped, self.total)


def image_files(words: list[Path]) -> ImageFiles:
    """The files that `words`, images and folders, stand for; their headers are read.

    Raises:
        InputError: one does not exist, a named file is no image, or no file can be read.
    """
    from spairkit.config import DataConfig
    from spairkit.data.folder import ANNOTATIONS, ImageFolder
    from spairkit.images import image_size, list_images

    for word in words:
        if not word.exists():
            raise InputError(f"{word}: no such image or folder")
    if len(words) == 1 and (words[0] / ANNOTATIONS).exists():
        config = DataConfig(name="folder", path=str(words[0]))
        folder = ImageFolder(config, "test", needs_truth=False)
        paths, ids = map(list, zip(*folder.files(), strict=True))
        return ImageFiles(
            paths, ids, folder.num_files, categories=folder.categories, skipped=folder.skipped
        )
    paths = [path for word in words for path in (list_images(word) if word.is_dir() else [word])]
    named = frozenset(word for word in words if not word.is_dir())
    files = ImageFiles([], [], len(paths), named)
    for number, path in enumerate(paths, start=1):
        try:
            image_size(path)
        except ImageFileError as error:
            files.skip(path, error)
        else:
            files.paths.append(path)
            files.numbers.append(number)
    return files
