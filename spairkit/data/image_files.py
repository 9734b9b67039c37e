"""Images with their boxes as a folder of files, with annotations.json (COCO)."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from spairkit.data import invaders
from spairkit.data.shapes import SIDE, shapes
from spairkit.detections import Truth
from spairkit.images import png
from spairkit.storage.durable import appearing, write_bytes, write_text


@dataclass(frozen=True)
class Source:
    """Images to write."""

    images: Iterator[tuple[bytes, Truth]]
    """Contents of the files, and boxes; may be endless."""
    count: int
    """Number of images to write."""
    size: tuple[int, int]
    """Height and width of every image."""
    suffix: str = ".png"
    categories: tuple[str, ...] = ()
    """Names of the labels; none: labels are digits."""
    beside: Mapping[str, bytes] = field(default_factory=dict)
    """Contents of the other files, by name."""

    def name(self, index: int) -> str:
        """The file of an image."""
        return f"{index:05}{self.suffix}"


def invaders_source(seed: int, count: int) -> Source:
    """Frames of Space Invaders. Raises InputError, at the first one, as `invaders.frames`."""
    return Source(
        ((png(image), truth) for image, truth in invaders.frames(seed)),
        count,
        (invaders.HEIGHT, invaders.WIDTH),
        categories=invaders.NAMES,
    )


def shapes_source(kind: str, seed: int, count: int) -> Source:
    """Scenes of a kind of `data.shapes`."""
    scenes = (shapes(kind, seed, index) for index in range(count))
    return Source(
        (
            (
                png(torch.from_numpy(scene.image).permute(2, 0, 1) / 255),
                Truth(torch.from_numpy(scene.boxes), torch.zeros(len(scene.boxes)).long()),
            )
            for scene in scenes
        ),
        count,
        (SIDE, SIDE),
        categories=("object",),
    )


def write_images(
    source: Source, out: Path, progress: Callable[[int], None] = lambda done: None
) -> int:
    """Writes the images and annotations.json into a new folder, which appears when it is complete.

    Args:
        source: the images.
        out: the folder.
        progress: called with the number of images written so far.

    Returns:
        The number of images.

    Raises:
        InputError: the images cannot be made, or the folder cannot be written; none is left then.
    """
    first = next(source.images)  # a dataset that cannot be used leaves no folder
    truth: list[Truth] = []
    with appearing(out) as folder:
        for name, content in source.beside.items():
            write_bytes(folder / name, content)
        for content, boxes in islice(chain([first], source.images), source.count):
            write_bytes(folder / source.name(len(truth)), content)
            truth.append(boxes)
            progress(len(truth))
        write_text(folder / "annotations.json", json.dumps(_coco(source, truth)))
    return len(truth)


def _coco(source: Source, truth: list[Truth]) -> dict[str, Any]:
    """COCO's annotations, with ids from 1; without categories a label stands under `label`."""
    (height, width), categories = source.size, source.categories
    images = [
        {"id": index + 1, "file_name": source.name(index), "width": width, "height": height}
        for index in range(len(truth))
    ]
    annotations: list[dict[str, Any]] = []
    for number, item in enumerate(truth, start=1):
        for (x1, y1, x2, y2), label in zip(item.boxes.tolist(), item.labels.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1 if categories else 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    **({} if categories else {"label": label}),
                }
            )
    named = [{"id": i, "name": name} for i, name in enumerate(categories or ("object",), start=1)]
    return {"images": images, "annotations": annotations, "categories": named}
