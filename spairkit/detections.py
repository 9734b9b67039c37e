"""The values that flow between models, data, metrics and pictures: `Detections` and `Truth`."""

import base64
import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spairkit import formats
from spairkit.counts import CountPosterior
from spairkit.errors import InputError
from spairkit.groups import clusters
from spairkit.images import ImageLike, as_image, image_size, pixel_size, read_pixels
from spairkit.label_images import areas, coco_segmentations, intensities, outlines, relabelled
from spairkit.measurements import measurements
from spairkit.storage.durable import write_bytes

_PLOT_INCHES = 6.0
_OUTLINE_PIXELS = 512  # least length of the longer side that outlines are drawn on
_OUTLINE_COLOUR = (1.0, 0.95, 0.6, 0.6)  # RGBA


@dataclass(frozen=True, eq=False)
class Truth:
    """The true objects of one image."""

    boxes: Tensor  # [n, 4] xyxy, pixels, half-open
    labels: Tensor  # [n] int64, the class of each object, -1 where it has none
    crowds: Tensor = field(default_factory=lambda: torch.zeros(0, 4))
    """[m, 4], regions of objects without boxes of their own, COCO's `iscrowd`. What is found in one
    is neither right nor wrong."""

    def __len__(self) -> int:
        """The number of objects."""
        return self.boxes.shape[0]


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """The objects found in one image. Tensors are on the CPU, float32 with a row for each object.

    `found[mask]`, `found[indices]` and `found[2]` select objects; `len(found)` is the count. Masks
    and the posterior of the count are there if the model gives them.

    Raises:
        ValueError: one of `label_image` and `labels` is missing, or they are not int32 [H, W] and
            int32 [n].
    """

    boxes: Tensor  # [n, 4] xyxy, pixels; may leave the image
    scores: Tensor  # [n] in [0, 1], the probability of presence; they rank the boxes
    what: Tensor  # [n, A] appearance embedding, A may be 0
    depth: Tensor  # [n] z_depth, lower is nearer
    image: ImageLike | None = field(default=None)
    """The image, as it was given to the detector: `plot` draws on it."""
    label_image: Tensor | None = field(default=None)
    """[H, W] int32, the label of the object that each pixel belongs to, 0 on the background."""
    labels: Tensor | None = field(default=None)
    """[n] int32, the label of each object in `label_image`, from 1."""
    counts: CountPosterior | None = field(default=None)
    """The posterior of the number of objects in the whole image; a selection has none."""

    def __post_init__(self) -> None:
        if self.label_image is None and self.labels is None:
            return
        image, labels = self.label_image, self.labels
        if image is None or labels is None:
            raise ValueError("label_image and labels must both be given, or neither")
        if image.dim() != 2 or labels.shape != (len(self),):
            raise ValueError(
                f"label_image and labels must be [H, W] and [{len(self)}], got "
                f"{list(image.shape)} and {list(labels.shape)}"
            )
        if image.dtype != torch.int32 or labels.dtype != torch.int32:
            raise ValueError(
                f"label_image and labels must be int32, got {image.dtype} and {labels.dtype}"
            )

    @classmethod
    def of_batch(cls, chosen: Tensor, **columns: Tensor) -> list["Detections"]:
        """The `chosen` [B, K] objects of each image, from the fields as [B, K, ...]."""
        fields: list[dict[str, Any]] = [
            {name: column[b, on].float().cpu() for name, column in columns.items()}
            for b, on in enumerate(chosen)
        ]
        return [cls(**rows) for rows in fields]

    def __len__(self) -> int:
        """The count."""
        return self.boxes.shape[0]

    def __repr__(self) -> str:
        """The count, the range of scores and the interval of the count, in one line."""
        parts = ["1 object" if len(self) == 1 else f"{len(self)} objects"]
        if len(self):
            low, high = float(self.scores.min()), float(self.scores.max())
            parts.append(f"scores {low:.2f} to {high:.2f}")
        if self.counts is not None:
            parts.append(str(self.counts))
        return f"Detections({', '.join(parts)})"

    def __getitem__(self, index: Any) -> "Detections":
        """The selected objects, as in `found[found.scores > 0.9]`, without `counts`.

        Args:
            index: a boolean mask [n], integers [m], a slice, or one integer. Torch tensors, NumPy
                arrays and lists are taken.

        Raises:
            IndexError: `index` is of another type, or does not fit the number of objects.
        """
        if isinstance(index, Tensor):
            index = index.numpy()
        rows = np.atleast_1d(np.arange(len(self))[index]).copy()
        if rows.ndim > 1 or getattr(index, "dtype", None) == np.uint8:  # bytes may be a mask
            raise IndexError("select objects by a boolean mask, integers, a slice or one integer")
        chosen = torch.from_numpy(rows)
        parts: dict[str, Any] = {name: getattr(self, name)[chosen] for name in _FIELDS}
        if self.labels is not None:
            parts["labels"] = self.labels[chosen]
        return replace(self, **parts, counts=None)

    def __iter__(self) -> Iterator["Detections"]:
        """Each object by itself."""
        return (self[index] for index in range(len(self)))

    @property
    def masks(self) -> Tensor:  # [H, W] int32
        """Each pixel's object: i + 1 on the pixels of object i, 0 elsewhere.

        Raises:
            ValueError: the model gave no masks.
        """
        return relabelled(*self._labelled())

    @property
    def area(self) -> Tensor:  # [n] int64
        """The size of each object's mask in pixels. Raises ValueError as `masks`."""
        return areas(*self._labelled())

    @property
    def intensity(self) -> Tensor:  # [n] float32
        """The mean of `image` over the mask and the three channels of each object.

        It is in [0, 1] of the range of the file, before levels; NaN for a mask without a pixel. An
        image file is read again.

        Raises:
            ValueError: the model gave no masks, no image is known, or it has another size.
            InputError: the image file cannot be read.
        """
        labelled = self._labelled()
        if self.image is None:
            raise ValueError("these detections have no image; set it: replace(found, image=image)")
        if isinstance(self.image, (str, os.PathLike)):
            return intensities(*labelled, read_pixels(os.fspath(self.image)))
        return intensities(*labelled, as_image(self.image))

    def _labelled(self) -> tuple[Tensor, Tensor]:
        if self.label_image is None or self.labels is None:
            raise ValueError("these detections have no masks: this model finds boxes only")
        return self.label_image, self.labels

    def plot(self, image: ImageLike | None = None, *, ax: Any = None) -> Any:
        """Draws boxes and the outlines of masks on the image and returns the matplotlib axes.

        Args:
            image: the image to draw on; by default the one that the objects were found in.
            ax: matplotlib axes to draw into; by default those of a new pyplot figure.

        Raises:
            ValueError: no image is known.
        """
        from matplotlib import pyplot
        from matplotlib.collections import PatchCollection
        from matplotlib.patches import Rectangle

        image = self.image if image is None else image
        if image is None:
            raise ValueError("these detections have no image; pass one: found.plot(image)")
        pixels = as_image(image)
        if ax is None:
            _, ax = pyplot.subplots(figsize=(_PLOT_INCHES, _PLOT_INCHES), layout="constrained")
        height, width = pixels.shape[1:]
        ax.imshow(pixels.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
        if self.label_image is not None:
            scale = -(-_OUTLINE_PIXELS // max(self.label_image.shape))
            outline = outlines(self.masks, *(side * scale for side in self.label_image.shape)) > 0
            overlay = np.where(outline[..., None], _OUTLINE_COLOUR, (*_OUTLINE_COLOUR[:3], 0.0))
            ax.imshow(overlay, extent=(0, width, height, 0))
        corners = self.boxes.tolist()
        boxes = [Rectangle((x1, y1), x2 - x1, y2 - y1) for x1, y1, x2, y2 in corners]
        lines = PatchCollection(boxes, facecolor="none", edgecolor="tab:orange", linewidth=1.5)
        ax.add_collection(lines, autolim=False)  # boxes may leave the image
        ax.set_axis_off()
        interval = "" if self.counts is None else f", {self.counts}"
        ax.set_title(f"{len(self)} found{interval}", fontsize="medium")
        return ax

    def _repr_html_(self) -> str:
        """For notebooks: the picture of `plot`, or one line of text if the image is not at hand."""
        if self.image is None:
            return f"<p>{self!r}</p>"
        from matplotlib.figure import Figure

        figure = Figure(figsize=(_PLOT_INCHES, _PLOT_INCHES), layout="constrained")
        try:
            self.plot(ax=figure.add_subplot())
        except InputError:  # the file is gone
            return f"<p>{self!r}</p>"
        png = io.BytesIO()
        figure.savefig(png, format="png")
        data = base64.b64encode(png.getvalue()).decode()
        return f'<img alt="{self!r}" src="data:image/png;base64,{data}">'

    def to_coco(self, image_id: int, category_id: int = 1) -> list[dict[str, Any]]:
        """Results in COCO's form: `bbox` is x, y, width, height in pixels; all of one category.

        With masks there are `area` in pixels and `segmentation` in COCO's compressed RLE.
        """
        corners = self.boxes.tolist()
        results: list[dict[str, Any]] = [
            {
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            for (x1, y1, x2, y2), score in zip(corners, self.scores.tolist(), strict=True)
        ]
        if self.label_image is not None:
            segmentations = coco_segmentations(*self._labelled())
            for result, rle, area in zip(results, segmentations, self.area.tolist(), strict=True):
                result |= {"segmentation": rle, "area": area}
        return results

    def to_json(self) -> dict[str, Any]:
        """`count`, and plain lists under the names of the tensors, ready for `json.dumps`.

        With masks there are `area` in pixels and, if the image is known, `intensity`, None for a
        mask without a pixel; with `counts`, its mean `count_mean` and its 90 % interval
        `count_interval`.

        Raises:
            ValueError, InputError: as `intensity`, for an image that does not fit or is gone.
        """
        values: dict[str, Any] = {"count": len(self)}
        if self.counts is not None:
            values |= self.counts.to_json()
        values |= {name: getattr(self, name).tolist() for name in _FIELDS}
        if self.label_image is not None:
            values["area"] = self.area.tolist()
            if self.image is not None:
                intensity = self.intensity.tolist()
                values["intensity"] = [None if math.isnan(x) else x for x in intensity]
        return values

    def measurements(self) -> dict[str, npt.NDArray[np.float64]]:
        """Columns [n] float64 by name, NaN where a value is not known.

        `x`, `y` (centre of the box), `x1`, `y1`, `x2`, `y2`, in pixels, and `score`. With masks:
        `area` in pixels, `equivalent_diameter`, of the disc of this area, and `eccentricity`, of
        the ellipse with the mask's second moments, from 0 (round) to 1. With masks and an image:
        `mean` and `sum` of the mask's pixels, each in [0, 1] of the file's range, before levels,
        and `corrected_mean`, the mean less that of the pixels without an object around: in the box
        widened on each side by half of its longer side, 5 px at least. In a coloured image these
        three are by channel: `mean_red`, `mean_green`, `mean_blue` and so on.

        If the image is a file that has a resolution, see `images.pixel_size`, there are also
        `x_um`, `y_um`, `width_um`, `height_um` (of the box), `area_um2` and
        `equivalent_diameter_um`, in micrometres. An image file is read again.

        Raises:
            ValueError: the image has another size than the masks.
            InputError: the image file cannot be read.
        """
        image, size = None, None
        if isinstance(self.image, (str, os.PathLike)):
            path = os.fspath(self.image)
            size = pixel_size(path)
            image = None if self.label_image is None else read_pixels(path)
        elif self.image is not None:
            image = as_image(self.image)
        masks = None if self.label_image is None else self._labelled()
        return measurements(self.boxes, self.scores, masks, image, size)

    def to_dataframe(self) -> Any:
        """A `pandas.DataFrame` with a row for each object: `measurements`, and `cluster`.

        `cluster` numbers the groups of objects that look alike by their embeddings `what`, from 1,
        the largest; it is not known (NA) without embeddings.

        Raises:
            ImportError: pandas is missing.
            ValueError, InputError: as `measurements`.
        """
        import pandas

        frame = pandas.DataFrame(self.measurements())
        frame["cluster"] = pandas.Series(clusters(self.what), dtype="Int64")  # short: NA
        return frame

    def to_geojson(self) -> dict[str, Any]:
        """A GeoJSON FeatureCollection of QuPath's detections, in pixels; see `formats.geojson`."""
        return formats.geojson(self.boxes, self.scores, self._masks())

    def to_yolo(self) -> str:
        """YOLO's lines: class 0, centre, width, height and score; see `formats.yolo`.

        Raises:
            ValueError: there are no masks, and no image is known, which would tell the size.
            InputError: the image file cannot be read.
        """
        return formats.yolo(self.boxes, self.scores, self._size())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the objects as a file of another tool, which the suffix tells (docs/formats.md).

        .zip: ImageJ's ROIs, outlines of masks or boxes. .geojson: `to_geojson`, for QuPath. .txt:
        `to_yolo`. .tif: `masks` as a label image of 16 bits, or of 32 for more than 65,535 objects.

        Raises:
            ValueError: the suffix is another one; .tif: the model gave no masks; .txt: as
                `to_yolo`.
            InputError: the file cannot be written; .zip: the package roifile is missing.
        """
        suffix = os.path.splitext(path)[1].lower()
        if suffix == ".zip":
            data = formats.rois(self.boxes, self.scores, self._masks())
        elif suffix == ".geojson":
            data = formats.geojson_file(self.boxes, self.scores, self._masks())
        elif suffix == ".txt":
            data = self.to_yolo().encode()
        elif suffix == ".tif":
            data = formats.label_tiff(self.masks, len(self))
        else:
            known = ", ".join(formats.SUFFIXES.values())
            raise ValueError(f"the name must end in one of {known}, got {os.fspath(path)!r}")
        write_bytes(Path(path), data)

    def _masks(self) -> formats.Masks | None:
        return None if self.label_image is None else self._labelled()

    def _size(self) -> tuple[int, int]:
        """Height and width of the image."""
        if self.label_image is not None:
            height, width = self.label_image.shape
        elif isinstance(self.image, (str, os.PathLike)):
            height, width = image_size(os.fspath(self.image))
        elif self.image is not None:
            height, width = as_image(self.image).shape[1:]
        else:
            raise ValueError("these detections have no image; set it: replace(found, image=image)")
        return height, width

    def to_supervision(self) -> Any:
        """A `supervision.Detections`. Raises ImportError where that package is missing.

        Masks become [n, H, W] bool, which is large for many objects.
        """
        import supervision

        masks: dict[str, Any] = {}
        if self.label_image is not None:
            label_image, labels = self._labelled()
            masks["mask"] = (label_image == labels[:, None, None]).numpy()
        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=np.zeros(len(self), dtype=int),
            **masks,
        )


_FIELDS = ("boxes", "scores", "what", "depth")


@dataclass(frozen=True, eq=False)
class Explanation:
    """One image as a model explains it, all on the CPU."""

    detections: Detections
    image: Tensor  # [3, H, W] in [0, 1], as in the file
    reconstruction: Tensor  # [3, H, W] in [0, 1], of the prepared image
    appearances: Tensor  # [n, P, P, 4] colour and alpha of each detection, in [0, 1]

    @classmethod
    def of_batch(
        cls,
        chosen: Tensor,  # [B, K] bool
        found: list[Detections],
        images: Tensor,  # [B, 3, H, W]
        drawn: Tensor,  # [B, 3, H, W]
        maps: Tensor,  # [B, K, P, P, 4]
    ) -> list["Explanation"]:
        """One for each image of a batch, with the maps of the chosen objects."""
        return [
            cls(item, *(x.float().cpu() for x in (images[b], drawn[b], maps[b, chosen[b]])))
            for b, item in enumerate(found)
        ]
