"""The networks of SPAIR, without sampling (supplement D.2, docs/model.md 3)."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spairkit.models.convolutions import convolve

_ACTIVATIONS = {"relu": nn.ReLU, "celu": nn.CELU, "softplus": nn.Softplus}
_KERNEL = 4  # of the strided layers
_LEAST_ROWS = 64  # of a product, for the kernel that is used for many


class Linear(nn.Linear):
    """A linear layer that uses `row_product`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., outputs] from [..., inputs]."""
        return row_product(x, self.weight, self.bias, self.training)


def row_product(x: Tensor, weight: Tensor, bias: Tensor | None, training: bool) -> Tensor:
    """`F.linear`; on a CPU, outside training, a row has the same bits beside any other rows.

    Libraries multiply few rows by another kernel, which rounds differently. Whether an image is
    searched alone or in a batch would then decide between states of nearly the same energy.
    """
    if training or x.device.type != "cpu" or torch.compiler.is_exporting():
        return F.linear(x, weight, bias)
    rows = math.prod(x.shape[:-1])
    if rows >= _LEAST_ROWS:
        return F.linear(x, weight, bias)
    padded = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, _LEAST_ROWS - rows))
    outputs: Tensor = F.linear(padded, weight, bias)[:rows].unflatten(0, x.shape[:-1])
    return outputs


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with Glorot-uniform weights and zero biases (docs/model.md 3.1)."""
    layer = Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(sizes: Sequence[int], activation: str) -> nn.Sequential:
    """Linear layers from sizes[0] inputs to sizes[-1] outputs, with an activation between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [linear(inputs, outputs), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


class Backbone(nn.Module):
    """A feature vector for each cell of an image of any size (docs/model.md 3.1).

    Strided 4 x 4 convolutions, then three with kernels of `pointwise_kernel`, the last one linear.
    Zero padding is only at the right and bottom, so a cell sees the same pixels, relative to its
    corner, in an image of any size.
    """

    def __init__(
        self,
        strides: Sequence[int],
        channels: Sequence[int],  # of the strided layers; the last one repeats
        features: int,
        pointwise_kernel: int,
        activation: str,
    ) -> None:
        super().__init__()
        strided = [channels[min(i, len(channels) - 1)] for i in range(len(strides))]
        widths = pairwise([3, *strided, strided[-1], strided[-1], features])
        kernels = [_KERNEL] * len(strides) + [pointwise_kernel] * 3
        self.layers = nn.ModuleList()
        self.strides = [*strides, 1, 1, 1]
        for (inputs, outputs), kernel, stride in zip(widths, kernels, self.strides, strict=True):
            layer = nn.Conv2d(inputs, outputs, kernel, stride)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            self.layers.append(layer)
        self.activation = _ACTIVATIONS[activation]()

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, features, rows, columns]
        """Features; rows = ceil(H / cell) and columns = ceil(W / cell)."""
        x = images
        if x.device.type == "cpu":
            # convolutions and their gradients are 10 % faster with the channels last
            x = x.contiguous(memory_format=torch.channels_last)
        for index, (layer, stride) in enumerate(zip(self.layers, self.strides, strict=True)):
            assert isinstance(layer, nn.Conv2d)
            assert layer.bias is not None
            x = convolve(x, layer.weight, layer.bias, stride)
            if index < len(self.layers) - 1:
                x = self.activation(x)
        return x


class LateralNetwork(nn.Module):
    """An MLP with two hidden layers, whose first inputs are shared by all networks of a cell.

    The caller computes the product of the first layer with the shared inputs, features and
    context, for all networks at once (`shared_weights`).
    """

    def __init__(self, shared: int, own: int, hidden: int, outputs: int, activation: str) -> None:
        super().__init__()
        self.shared = shared
        self.first = linear(shared + own, hidden)
        self.second = linear(hidden, hidden)
        self.last = linear(hidden, outputs)
        self.activation = _ACTIVATIONS[activation]()

    def first_weights(self, features: int) -> tuple[Tensor, Tensor, Tensor]:
        """[hidden, ...] weights of the first layer for features, context and own inputs.

        One split, whose gradient is one operation, where each slice would take three.
        """
        weight = self.first.weight
        sizes = [features, self.shared - features, weight.shape[1] - self.shared]
        of_features, of_context, of_own = weight.split(sizes, dim=1)
        return of_features, of_context, of_own

    def forward(self, product: Tensor, own: Tensor | None) -> Tensor:
        """[..., outputs] from the shared product [..., hidden] and the own inputs [..., own]."""
        if own is not None:
            weight = self.first.weight[:, self.shared :]
            product = product + row_product(own, weight, None, self.training)
        x = self.activation(product)
        outputs: Tensor = self.last(self.activation(self.second(x)))
        return outputs


def shared_weights(
    networks: Sequence[LateralNetwork], start: int, stop: int
) -> Tensor:  # [len(networks) * hidden, stop - start]
    """First-layer weights of all networks for inputs start to stop, stacked."""
    return torch.cat([network.first.weight[:, start:stop] for network in networks])


def check_images(images: Tensor, *, finite: bool = False) -> None:
    """Checks a batch of images.

    Raises:
        ValueError: `images` is not [B, 3, H, W], floating-point and, if asked, finite.
    """
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(
            f"images must be [B, 3, H, W] with B, H and W at least 1, got {list(images.shape)}"
        )
    if not images.is_floating_point():
        raise ValueError(f"images must be floating-point in [0, 1], got {images.dtype}")
    # NaN is the least and the greatest value; one pass, where isfinite takes three
    if finite and not all(map(math.isfinite, torch.stack(images.aminmax()).tolist())):
        raise ValueError("images must be finite, got NaN or infinity among them")
