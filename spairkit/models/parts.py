"""`Part`: what a network has to know of a large image when it sees a part of it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A part of a larger image, which is seen by itself; lengths in px."""

    corner: tuple[int, int]
    """y and x of its upper left corner in the image, at a corner of cells."""
    size: tuple[int, int]
    """Height and width of the image."""
    core: tuple[int, int, int, int]
    """xyxy in the part: only objects with a centre in it count in the posterior of the count."""
    outside: int = 0
    """Objects of the image that do not lie in the part."""

    def holds(self, boxes: Tensor) -> Tensor:  # [..., 4] xyxy in the part -> [...] bool
        """Whether the core holds the centres; it is half-open."""
        centre = (boxes[..., :2] + boxes[..., 2:]) / 2
        low, high = boxes.new_tensor(self.core[:2]), boxes.new_tensor(self.core[2:])
        return ((centre >= low) & (centre < high)).all(-1)
