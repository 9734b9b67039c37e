"""What every model offers once it is trained, whatever it is made of: the `Detector` protocol."""

from typing import Protocol

from torch import Tensor

from spairkit.detections import Detections


class Detector(Protocol):
    """Finds objects in images of any size. Nothing that it returns carries a gradient."""

    def detect(
        self,
        images: Tensor,  # [B, 3, H, W]
        threshold: float = 0.5,
        *,
        deterministic: bool = True,
    ) -> list[Detections]:
        """What is in each image, in raster order.

        Args:
            images: [B, 3, H, W] in [0, 1], on the detector's device; any H and W from 1 pixel.
            threshold: in [0, 1); only objects whose score is above it are given. A lower one
                gives the same objects and more: that is how candidates are ranked.
            deterministic: takes means and thresholds the probability of presence. False samples,
                as the paper did, from torch's own generator; what is then present has score 1.

        Returns:
            One `Detections` per image, on the CPU.
        """
        ...

    def reconstruct(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, 3, H, W]
        """The images as the detector explains them, in [0, 1], on the same device.

        A detector that has no idea of appearance gives its found objects in flat colours.
        """
        ...
