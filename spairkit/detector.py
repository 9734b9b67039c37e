"""What every trained model offers, whatever it is made of, and the images that it takes."""

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
        counts: Tensor | None = None,  # [B] int64
    ) -> list[Detections]:
        """What is in each image, in raster order or in the order of its finding.

        Args:
            images: [B, 3, H, W] in [0, 1], on the detector's device; any H and W from 1 pixel.
            threshold: only objects whose score, in [0, 1], is above it are given. A lower one
                gives the same objects and more: that is how candidates are ranked.
            deterministic: takes means and thresholds the probability of presence. False samples,
                as the paper did, from torch's own generator; what is then present has score 1.
            counts: how many objects there truly are, for a model that was told so in training
                (AIR and DAIR with `count = "given"`), and needs it. Every other ignores them.

        Returns:
            One `Detections` per image, on the CPU.

        Raises:
            InputError: the model needs counts and got none, or takes images of another size.
            ValueError: `images` has another shape or dtype, or holds what is not finite.
        """
        ...

    def reconstruct(
        self,
        images: Tensor,  # [B, 3, H, W]
        *,
        counts: Tensor | None = None,  # [B]
    ) -> Tensor:  # [B, 3, H, W]
        """The images as the detector explains them, in [0, 1], on the same device.

        A detector that has no idea of appearance gives its found objects in flat colours.
        """
        ...

    def appearance(
        self,
        images: Tensor,  # [B, 3, H, W]
        threshold: float = 0.5,
        *,
        counts: Tensor | None = None,  # [B]
    ) -> list[Tensor]:
        """Colour and alpha of each object of `detect(images, threshold)`: [n, P, P, 4], CPU."""
        ...
