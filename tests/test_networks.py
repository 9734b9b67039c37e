"""The backbone's sizes, padding and receptive field (docs/model.md 3.1), and the lateral MLP."""

import math

import pytest
import torch

from spairkit.config import SPAIRConfig
from spairkit.models.networks import Backbone, LateralNetwork, mlp, shared_weights


def paper_backbone(channels: int = 8) -> Backbone:
    torch.manual_seed(0)
    return Backbone((2, 2, 3), (channels,), 10, pointwise_kernel=1, activation="relu")


@pytest.mark.parametrize(("height", "width"), [(48, 48), (1, 5), (13, 100), (210, 160)])
@pytest.mark.parametrize("cell", [5, 8, 12])
def test_each_cell_has_one_feature_vector(height: int, width: int, cell: int) -> None:
    strides = SPAIRConfig(cell=cell).strides
    backbone = Backbone(strides, (4, 6), 7, pointwise_kernel=2, activation="celu")
    features = backbone(torch.rand(1, 3, height, width))
    assert features.shape == (1, 7, math.ceil(height / cell), math.ceil(width / cell))


def test_cell_sees_22_pixels_from_its_corner() -> None:
    backbone = paper_backbone()
    images = torch.rand(1, 3, 60, 72, requires_grad=True)
    gradient = torch.autograd.grad(backbone(images)[0, :, 1, 2].sum(), images)[0].abs().sum((0, 1))
    rows, columns = gradient.nonzero().T
    assert (int(rows.min()), int(rows.max())) == (12, 33)
    assert (int(columns.min()), int(columns.max())) == (24, 45)


def test_extending_an_image_right_and_down_keeps_its_features() -> None:
    backbone = paper_backbone()
    images = torch.rand(1, 3, 96, 96)
    whole, part = backbone(images), backbone(images[..., :60, :72])
    torch.testing.assert_close(whole[..., :4, :5], part[..., :4, :5])


def test_shared_and_own_products_add_up_to_the_first_layer() -> None:
    torch.manual_seed(0)
    networks = [LateralNetwork(5, own, 6, 4, "relu") for own in (0, 3)]
    shared, own = torch.rand(2, 5), torch.rand(2, 3)
    weights = shared_weights(networks, 0, 5)
    bias = torch.cat([network.first.bias for network in networks])
    products = (shared @ weights.T + bias).chunk(2, dim=-1)
    inputs = (shared, torch.cat([shared, own], dim=-1))
    for network, product, rest, whole in zip(networks, products, (None, own), inputs, strict=True):
        hidden = torch.relu(network.second(torch.relu(network.first(whole))))
        torch.testing.assert_close(network(product, rest), network.last(hidden))


def test_weights_start_as_glorot_uniform() -> None:
    torch.manual_seed(0)
    layer = mlp((300, 200), "relu")[0]
    assert isinstance(layer, torch.nn.Linear)
    bound = math.sqrt(6 / 500)
    assert float(layer.weight.detach().abs().max()) <= bound
    assert float(layer.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not bool(layer.bias.any())
