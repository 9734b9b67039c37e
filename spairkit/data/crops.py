"""Crops that a GPU cuts from the images of a folder, which stay in its memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from spairkit.data.scenes import Batch

_SHARE = 4  # of the free memory of a GPU images take one part in so many at most


class ImagesOnDevice:
    """Images of different sizes in the memory of a device, and crops of them.

    The device only copies values, so crops have the bits of those that are cut on the CPU.

    Args:
        sizes: height and width of each image.
        channels: of all images, 1 or 3.
        device: that holds them.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, int]], channels: int, device: torch.device
    ) -> None:
        areas = [height * width for height, width in sizes]
        self.starts = [channels * start for start in accumulate(areas, initial=0)]
        self.values = torch.empty(self.starts.pop(), device=device)
        forms = [(start, *size) for start, size in zip(self.starts, sizes, strict=True)]
        self.forms = torch.tensor(forms, device=device)  # [F, 3] start, height, width
        self.channels = channels
        self.there: set[int] = set()
        """The images that have been put in."""

    def put(self, image: int, values: Tensor) -> None:  # [channels, H, W]
        """Copies an image to the device, unless it is there."""
        if image not in self.there:
            place = self.values[self.starts[image] :][: values.numel()]
            place.copy_(values.flatten(), non_blocking=True)
            self.there.add(image)

    def crops(self, places: Tensor, size: tuple[int, int]) -> Tensor:
        """Crops, continued to the right and below by the last pixels of their images.

        Args:
            places: [B, 3] int64 on the device: image, top and left.
            size: height and width of a crop.

        Returns:
            [B, 3, *size]; the three channels of grey images are equal.
        """
        images, top, left = places.unbind(1)
        start, height, width = self.forms[images].unbind(1)
        rows, columns = (torch.arange(side, device=places.device) for side in size)
        y = torch.minimum(top[:, None] + rows, height[:, None] - 1)
        x = torch.minimum(left[:, None] + columns, width[:, None] - 1)
        channels = torch.arange(self.channels, device=places.device)
        planes = start[:, None] + (height * width)[:, None] * channels  # [B, channels]
        pixels = y[:, :, None] * width[:, None, None] + x[:, None]  # [B, *size]
        crops = self.values[planes[:, :, None, None] + pixels[:, None]]
        return crops.expand(-1, 3, -1, -1).contiguous()


def images_on_device(
    sizes: Sequence[tuple[int, int]], channels: int, device: torch.device
) -> ImagesOnDevice | None:
    """Room for the images on a GPU that has four times as much free; None without it."""
    if device.type != "cuda":
        return None
    needed = 4 * channels * sum(height * width for height, width in sizes)
    free, _ = torch.cuda.mem_get_info(device)
    return ImagesOnDevice(sizes, channels, device) if _SHARE * needed <= free else None


@dataclass(frozen=True, eq=False)
class Cuts:
    """A batch whose crops are still to be cut by the device that holds their images."""

    images: ImagesOnDevice
    missing: dict[int, Tensor]
    """Images of the batch that were not on the device, [channels, H, W]."""
    places: Tensor  # [B, 3] image, top and left
    size: tuple[int, int]  # of a crop
    batch: Batch
    """Objects of the crops, and images without pixels."""

    def pinned(self) -> "Cuts":
        """The same in memory that a GPU copies without a stop."""
        missing = {image: values.pin_memory() for image, values in self.missing.items()}
        batch = self.batch.each(Tensor.pin_memory)
        return replace(self, missing=missing, places=self.places.pin_memory(), batch=batch)

    def to(self, device: torch.device) -> Batch:
        """The batch on the device of the images."""
        for image, values in self.missing.items():
            self.images.put(image, values)
        places = self.places.to(device, non_blocking=device.type == "cuda")
        return replace(self.batch.to(device), images=self.images.crops(places, self.size))
