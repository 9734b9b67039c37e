"""Classifies images by their objects: an LSTM over appearance embeddings (main text 5.2 and 5.3).

    vectors = GlimpseVectors(true_glimpses(14), glimpse_encoder(14, 50), 50, trained=True)
    classifier = Classifier(vectors, width=50, units=128, num_classes=46)
    logits = classifier(batch)  # [B, 46]

The objects are those of a trained SPAIR or AIR, of the true boxes, or of connected components; or
the cells of a backbone stand for objects. B images, N objects, A dimensions, P the side of a
glimpse.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spairkit.data.scenes import Batch
from spairkit.models.conncomp import ConnComp
from spairkit.models.glimpses import extract_glimpses
from spairkit.models.networks import Backbone, mlp

_HIDDEN = (100, 100)  # of both MLPs
_EMBEDDED = 50  # inputs of the LSTM

Glimpses = Callable[[Batch], tuple[Tensor, Tensor]]
"""From a batch to glimpses [B, N, 3, P, P] in raster order, and whether each is an object [B, N].

Nothing has gradients."""


class GlimpseVectors(nn.Module):
    """A vector for each object: the encoder's first outputs for its glimpse.

    Args:
        glimpses: cuts out the objects.
        encoder: maps [..., 3 P P] to at least `width` outputs, the means of z_what.
        width: A, the dimension of a vector.
        trained: whether the encoder gets gradients. They do not reach boxes and presence, even
            where these depend on the encoder.
    """

    def __init__(
        self, glimpses: Glimpses, encoder: nn.Module, width: int, *, trained: bool
    ) -> None:
        super().__init__()
        self.glimpses, self.width = glimpses, width
        self.encoder = encoder.requires_grad_(trained)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Vectors [B, N, A], and whether each is that of an object [B, N]."""
        glimpses, present = self.glimpses(batch)
        outputs = self.encoder(glimpses.flatten(2))
        return outputs[..., : self.width], present


class CellVectors(nn.Module):
    """A vector for each cell of a backbone, in raster order: the paper's ConvNet.

    Args:
        backbone: has at least `width` features.
        width: A; further features are ignored, as in the authors' code.
    """

    def __init__(self, backbone: Backbone, width: int) -> None:
        super().__init__()
        self.backbone, self.width = backbone, width

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Vectors [B, K, A]; every cell counts as an object: [B, K] True."""
        features: Tensor = self.backbone(batch.images).flatten(2).mT[..., : self.width]
        return features, torch.ones_like(features[..., 0], dtype=torch.bool)


class Classifier(nn.Module):
    """Logits of classes from the vectors of an image's objects, read one after the other.

    Each vector passes an MLP; an LSTM reads those of present objects in their order; its last
    output, or zeros where nothing is present, passes another MLP.

    Args:
        vectors: a module from a `Batch` to vectors [B, N, width] and presence [B, N].
        width: A, the dimension of a vector.
        units: of the LSTM.
        num_classes: C.

    Source: docs/model.md 12.3.
    """

    def __init__(self, vectors: nn.Module, *, width: int, units: int, num_classes: int) -> None:
        super().__init__()
        self.vectors = vectors
        self.embed = mlp((width, *_HIDDEN, _EMBEDDED), "relu")
        self.lstm = nn.LSTM(_EMBEDDED, units, batch_first=True)
        biases = [bias for name, bias in self.lstm.named_parameters() if "bias" in name]
        with torch.no_grad():
            for bias in biases:
                bias.zero_()
            # of the forget gate, as in the authors' TensorFlow: it remembers at first
            biases[0][units : 2 * units] = 1.0
        self.decide = mlp((units, *_HIDDEN, num_classes), "relu")

    def forward(self, batch: Batch) -> Tensor:  # [B, C]
        """Logits of the classes."""
        return self.classify(*self.vectors(batch))

    def classify(self, vectors: Tensor, present: Tensor) -> Tensor:  # [B, N, A], [B, N] -> [B, C]
        """Logits of the classes from vectors; those that are not present change nothing."""
        counts = present.sum(1)
        most = max(int(counts.amax()), 1)
        # present ones first, in their order; an output of the LSTM depends on earlier inputs only
        order = present.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
        front = vectors.gather(1, order[..., None].expand(-1, -1, vectors.shape[-1]))
        outputs, _ = self.lstm(self.embed(front))  # [B, most, units]
        last = outputs[torch.arange(len(counts), device=counts.device), (counts - 1).clamp(min=0)]
        logits: Tensor = self.decide(last * (counts > 0)[:, None])
        return logits


def true_glimpses(size: int) -> Glimpses:
    """Cuts out what is inside the true boxes (TrueBB), ordered by their top, then left, edges.

    Args:
        size: P, in texels.
    """

    def glimpses(batch: Batch) -> tuple[Tensor, Tensor]:
        present = batch.labels >= 0
        left, top = batch.boxes[..., 0], batch.boxes[..., 1]
        order = (top * batch.images.shape[-1] + left).argsort(dim=1, stable=True)
        boxes = batch.boxes.gather(1, order[..., None].expand(-1, -1, 4))
        return extract_glimpses(batch.images, boxes, size), present.gather(1, order)

    return glimpses


def component_glimpses(model: ConnComp, size: int) -> Glimpses:
    """Cuts out connected components, ordered by their first pixels.

    Args:
        model: finds the components.
        size: P, in texels.
    """

    def glimpses(batch: Batch) -> tuple[Tensor, Tensor]:
        found = model.detect(batch.images)
        most = max(1, *(len(item) for item in found))
        boxes = torch.zeros(len(found), most, 4)
        present = torch.zeros(len(found), most, dtype=torch.bool)
        for b, item in enumerate(found):
            boxes[b, : len(item)], present[b, : len(item)] = item.boxes, True
        device = batch.images.device
        cut = extract_glimpses(batch.images, boxes.to(device), size)
        return cut, present.to(device)

    return glimpses


def glimpse_encoder(size: int, width: int) -> nn.Sequential:
    """An untrained encoder from glimpses [..., 3 P P] to vectors [..., A]: an MLP of 512 and 256.

    Args:
        size: P, in texels.
        width: A.
    """
    return mlp((3 * size**2, 512, 256, width), "relu")
