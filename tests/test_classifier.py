"""The classifier against single objects in turn; the sources of objects against loops."""

import pytest
import torch
from torch import Tensor

from spairkit.config import AIRConfig, ConnCompConfig, DataConfig, SPAIRConfig
from spairkit.data.datasets import open_dataset
from spairkit.data.scenes import Batch
from spairkit.models.air import AIR
from spairkit.models.classifier import (
    CellVectors,
    Classifier,
    GlimpseVectors,
    component_glimpses,
    glimpse_encoder,
    true_glimpses,
)
from spairkit.models.conncomp import ConnComp
from spairkit.models.glimpses import extract_glimpses
from spairkit.models.networks import Backbone
from spairkit.models.spair import SPAIR

TINY = SPAIRConfig(
    backbone_channels=(4,),
    features=8,
    hidden=8,
    passthrough=4,
    what=5,
    encoder_hidden=(8,),
    decoder_hidden=(8,),
)


@pytest.fixture(scope="module")
def batch() -> Batch:
    scenes = open_dataset(DataConfig(min_objects=0, max_objects=4), "test")
    return scenes.batch(torch.arange(6))


def spair(images: Tensor) -> SPAIR:
    """An untrained model that finds objects in some of its cells."""
    torch.manual_seed(0)
    model = SPAIR(TINY).eval()
    with torch.no_grad():
        model.presence_network.last.bias.sub_(model.means(images).presence_logit.median())
    return model


def classifier(width: int = 5) -> Classifier:
    torch.manual_seed(1)
    vectors = CellVectors(Backbone((2, 2, 3), (4,), 2 * width, 1, "relu"), width)
    return Classifier(vectors, width=width, units=7, num_classes=3)


def test_classifier_reads_present_objects_in_their_order() -> None:
    network = classifier()
    vectors = torch.randn(20, 6, 5)
    present = torch.rand(20, 6) < 0.5
    present[0], present[1] = False, True
    logits = network.classify(vectors, present)
    for b in range(20):
        state = None
        output = torch.zeros(7)
        for n in range(6):
            if present[b, n]:
                steps, state = network.lstm(network.embed(vectors[b, n])[None, None], state)
                output = steps[0, 0]
        torch.testing.assert_close(logits[b], network.decide(output), rtol=1e-5, atol=1e-6)


def test_absent_objects_get_no_gradient() -> None:
    vectors = torch.randn(4, 5, 5, requires_grad=True)
    present = torch.tensor([[True, False, True, False, False]]).expand(4, -1)
    classifier().classify(vectors, present).sum().backward()
    assert vectors.grad is not None
    assert (vectors.grad[~present] == 0).all()
    assert (vectors.grad[present].abs().sum(-1) > 0).all()


def test_order_of_objects_matters() -> None:
    vectors, present = torch.randn(1, 3, 5), torch.ones(1, 3, dtype=torch.bool)
    network = classifier()
    turned = network.classify(vectors.flip(1), present)
    assert not torch.allclose(network.classify(vectors, present), turned)


def test_cells_of_the_backbone_are_objects(batch: Batch) -> None:
    network = classifier()
    vectors, present = network.vectors(batch)
    assert isinstance(network.vectors, CellVectors)
    features = network.vectors.backbone(batch.images)
    assert present.all()
    assert vectors.shape == (6, 16, 5)
    for row in range(4):
        for column in range(4):
            assert torch.equal(vectors[:, 4 * row + column], features[:, :5, row, column])


def test_true_boxes_in_raster_order(batch: Batch) -> None:
    glimpses, present = true_glimpses(14)(batch)
    for b, truth in enumerate(batch.truth()):
        boxes = sorted(truth.boxes.tolist(), key=lambda box: (box[1], box[0]))
        assert int(present[b].sum()) == len(boxes)
        for box, cut in zip(boxes, glimpses[b, present[b]], strict=True):
            expected = extract_glimpses(batch.images[b : b + 1], torch.tensor([[box]]), 14)
            torch.testing.assert_close(cut, expected[0, 0])


def test_components_in_raster_order(batch: Batch) -> None:
    model = ConnComp(ConnCompConfig(threshold=0.5))
    glimpses, present = component_glimpses(model, 21)(batch)
    assert glimpses.shape[-1] == 21
    for b in range(6):
        found = model.detect(batch.images[b : b + 1])[0]
        assert int(present[b].sum()) == len(found)
        assert present[b, : len(found)].all()
        expected = extract_glimpses(batch.images[b : b + 1], found.boxes[None], 21)[0]
        torch.testing.assert_close(glimpses[b, : len(found)], expected)


def test_images_without_components(batch: Batch) -> None:
    model = ConnComp(ConnCompConfig(threshold=3.0, background="given", colour=(0.0, 0.0, 0.0)))
    black = batch.each(torch.zeros_like)
    _, present = component_glimpses(model, 21)(black)
    assert not present.any()


def test_glimpses_of_spair_encode_to_its_embeddings(batch: Batch) -> None:
    model = spair(batch.images)
    vectors = GlimpseVectors(lambda b: model.glimpses(b.images), model.encoder, 5, trained=False)
    what, present = vectors(batch)
    found = model.detect(batch.images, box_contrast=0)
    assert 0 < int(present.sum()) < present.numel()
    for b in range(6):
        torch.testing.assert_close(what[b, present[b]], found[b].what, rtol=1e-4, atol=1e-5)


def test_glimpses_of_air_encode_to_its_embeddings(batch: Batch) -> None:
    torch.manual_seed(0)
    config = AIRConfig(
        units=8, output_hidden=8, what=5, encoder_hidden=(8,), decoder_hidden=(8,), count="given"
    )
    model = AIR(config, (48, 48)).eval()
    vectors = GlimpseVectors(
        lambda b: model.glimpses(b.images, b.counts), model.encoder, 5, trained=False
    )
    what, present = vectors(batch)
    assert present.sum(1).tolist() == batch.counts.tolist()
    found = model.detect(batch.images, counts=batch.counts)
    for b in range(6):
        torch.testing.assert_close(what[b, present[b]], found[b].what, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_encoder_trains_only_if_asked(batch: Batch, trained: bool) -> None:
    model = spair(batch.images)
    vectors = GlimpseVectors(lambda b: model.glimpses(b.images), model.encoder, 5, trained=trained)
    network = Classifier(vectors, width=5, units=7, num_classes=3)
    network(batch).square().sum().backward()

    def has_gradient(parameter: Tensor) -> bool:
        return parameter.grad is not None and bool(parameter.grad.any())

    assert any(map(has_gradient, model.encoder.parameters())) == trained
    assert all(p.grad is None for p in model.backbone.parameters())
    assert any(map(has_gradient, network.embed.parameters()))


def test_encoder_has_the_papers_widths() -> None:
    encoder = glimpse_encoder(21, 50)
    sizes = [tuple(p.shape) for p in encoder.parameters() if p.dim() == 2]
    assert sizes == [(512, 3 * 21 * 21), (256, 512), (50, 256)]
