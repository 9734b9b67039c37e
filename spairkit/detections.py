"""The values that flow between models, data, metrics and pictures: `Detections` and `Truth`."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spairkit.errors import InputError
from spairkit.images import ImageLike, as_image

_PLOT_INCHES = 6.0


@dataclass(frozen=True, eq=False)
class Truth:
    """The true objects of one image."""

    boxes: Tensor  # [n, 4] xyxy, pixels, half-open
    labels: Tensor  # [n] int64, the class of each object, -1 where it has none

    def __len__(self) -> int:
        """The number of objects."""
        return self.boxes.shape[0]


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """The objects found in one image. Tensors are float32 on the CPU, a row for each object.

    `found[mask]`, `found[indices]` and `found[2]` select objects; `len(found)` is the count.
    """

    boxes: Tensor  # [n, 4] xyxy, pixels; may leave the image
    scores: Tensor  # [n] in [0, 1], the probability of presence; they rank the boxes
    what: Tensor  # [n, A] appearance embedding, A may be 0
    depth: Tensor  # [n] z_depth, lower is nearer
    image: ImageLike | None = field(default=None)
    """The image, as it was given to the detector: `plot` draws on it."""

    @classmethod
    def of_batch(cls, chosen: Tensor, **columns: Tensor) -> list["Detections"]:
        """The `chosen` [B, K] objects of each image, from the fields as [B, K, ...]."""
        return [
            cls(**{name: column[b, on].float().cpu() for name, column in columns.items()})
            for b, on in enumerate(chosen)
        ]

    def __len__(self) -> int:
        """The count."""
        return self.boxes.shape[0]

    def __repr__(self) -> str:
        """The count and the range of scores, in one line."""
        if not len(self):
            return "Detections(0 objects)"
        low, high = float(self.scores.min()), float(self.scores.max())
        objects = "1 object" if len(self) == 1 else f"{len(self)} objects"
        return f"Detections({objects}, scores {low:.2f} to {high:.2f})"

    def __getitem__(self, index: Any) -> "Detections":
        """The selected objects, as in `found[found.scores > 0.9]`.

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
        parts = {name: getattr(self, name)[torch.from_numpy(rows)] for name in _FIELDS}
        return replace(self, **parts)

    def __iter__(self) -> Iterator["Detections"]:
        """Each object by itself."""
        return (self[index] for index in range(len(self)))

    def plot(self, image: ImageLike | None = None, *, ax: Any = None) -> Any:
        """Draws the boxes on the image and returns the matplotlib axes.

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
        corners = self.boxes.tolist()
        boxes = [Rectangle((x1, y1), x2 - x1, y2 - y1) for x1, y1, x2, y2 in corners]
        outlines = PatchCollection(boxes, facecolor="none", edgecolor="tab:orange", linewidth=1.5)
        ax.add_collection(outlines, autolim=False)  # boxes may leave the image
        ax.set_axis_off()
        ax.set_title(f"{len(self)} found", fontsize="medium")
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

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Results in COCO's form: `bbox` is x, y, width, height in pixels; category 1."""
        corners = self.boxes.tolist()
        return [
            {
                "image_id": image_id,
                "category_id": 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            for (x1, y1, x2, y2), score in zip(corners, self.scores.tolist(), strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        """`count`, and plain lists under the names of the tensors, ready for `json.dumps`."""
        return {"count": len(self)} | {name: getattr(self, name).tolist() for name in _FIELDS}

    def to_supervision(self) -> Any:
        """A `supervision.Detections`. Raises ImportError where that package is missing."""
        import supervision

        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=np.zeros(len(self), dtype=int),
        )


_FIELDS = ("boxes", "scores", "what", "depth")


@dataclass(frozen=True, eq=False)
class Explanation:
    """One image as a model explains it, all on the CPU."""

    detections: Detections
    image: Tensor  # [3, H, W] in [0, 1], as the model sees it: after its preparation
    reconstruction: Tensor  # [3, H, W] in [0, 1]
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
