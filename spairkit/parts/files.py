"""The image files of a part, in place or fetched from afar; and whether they have changed."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spairkit.data.files import sha256_of
from spairkit.errors import ImageFileError
from spairkit.frames import refuse_remote_stack
from spairkit.parts.plan import Item, Part
from spairkit.remote import fetch, is_remote, remote_version


def version(item: Item, folder: str = "") -> str:
    """The hash of an image file in `folder`, or what its store says of a URL.

    Raises:
        InputError: a store cannot be reached.
    """
    if is_remote(item.name):
        return remote_version(item.name)
    return sha256_of(Path(folder, item.name))


@contextmanager
def in_place(
    part: Part, folder: str = ""
) -> Iterator[tuple[list[tuple[str, Item]], list[list[str]]]]:
    """The path to read of each image of a part, and those that are not, with reasons.

    Files of URLs that cannot be fetched, or are stacks, are not read.

    Files of URLs are removed in the end.

    Raises:
        InputError: a store cannot be reached, or the disk is full.
    """
    places: list[tuple[str, Item]] = []
    skipped: list[list[str]] = []
    if not any(is_remote(item.name) for item in part):
        yield [(os.path.join(folder, item.name), item) for item in part], skipped
        return
    with tempfile.TemporaryDirectory(prefix="spairkit-") as cache:
        for index, item in enumerate(part):
            if not is_remote(item.name):
                places.append((os.path.join(folder, item.name), item))
                continue
            place = Path(cache, f"{index}{Path(item.name).suffix}")
            try:
                fetch(item.name, place)
                refuse_remote_stack(place, item.name)
            except ImageFileError as error:
                skipped.append([item.name, str(error)])
            else:
                places.append((str(place), item))
        yield places, skipped
