"""The values that flow between models, data, metrics and pictures: `Detections` and `Truth`."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Truth:
    """What is known to be in one image."""

    boxes: Tensor  # [n, 4] xyxy, pixels, half-open
    labels: Tensor  # [n] int64, the class of each object, -1 where it has none

    def __len__(self) -> int:
        """The number of objects."""
        return self.boxes.shape[0]


@dataclass(frozen=True, eq=False)
class Detections:
    """What a detector found in one image, on the CPU, float32. `Detector.detect` says the order."""

    boxes: Tensor  # [n, 4] xyxy, pixels; may leave the image
    scores: Tensor  # [n] in [0, 1], the probability of presence; they rank the boxes
    what: Tensor  # [n, A] appearance codes, A may be 0
    depth: Tensor  # [n] z_depth, lower is nearer
    whole_pixels: bool = False
    """Whether boxes are drawn as the true ones are, from the first to the last pixel of an object.
    `ap_spair`, for which the true boxes end a pixel earlier, then takes the same pixel from these.
    """

    def __len__(self) -> int:
        """The count."""
        return self.boxes.shape[0]

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
        """Plain lists under the names of the fields, ready for `json.dumps`."""
        return {
            "count": len(self),
            "boxes": self.boxes.tolist(),
            "scores": self.scores.tolist(),
            "what": self.what.tolist(),
            "depth": self.depth.tolist(),
        }

    def to_supervision(self) -> Any:
        """A `supervision.Detections`. Raises ImportError where that package is missing."""
        import numpy as np
        import supervision

        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=np.zeros(len(self), dtype=int),
        )
