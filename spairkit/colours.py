"""What colour the background of images probably has."""

import torch
from torch import Tensor


def commonest_colour(images: Tensor) -> Tensor:  # [..., 3, H, W] -> [3]
    """The 8-bit colour that most pixels have, in [0, 1] (docs/model.md 4.4, mode "mode").

    Args:
        images: float in [0, 1], or uint8. Of equally common colours the one with the least red
            is taken, then green, then blue.
    """
    levels = images if images.dtype == torch.uint8 else (images * 255).round()
    red, green, blue = levels.long().unbind(-3)
    values, counts = ((red << 16) + (green << 8) + blue).flatten().unique(return_counts=True)
    code = values[counts.argmax()]
    return torch.stack([code >> 16, code >> 8 & 255, code & 255]) / 255
