"""The accuracy of a classifier on the objects of a run, as the experiments measure it."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from spairkit.config import DataConfig, SPAIRConfig
from spairkit.detector import load
from spairkit.experiments.experiment import Figures, Measure
from spairkit.experiments.shared_runs import Started
from spairkit.models.air import AIR
from spairkit.models.classifier import (
    CellVectors,
    Classifier,
    Glimpses,
    GlimpseVectors,
    component_glimpses,
    glimpse_encoder,
    true_glimpses,
)
from spairkit.models.conncomp import ConnComp
from spairkit.models.loading import Network
from spairkit.models.networks import Backbone
from spairkit.models.spair import SPAIR
from spairkit.training.classification import ClassifierTraining, Label, train_classifier
from spairkit.training.loop import Event

Objects = Literal["fixed", "unfixed", "components", "truebb", "convnet"]
"""Objects to classify by: those that a trained SPAIR or AIR finds, with its glimpse encoder fixed
or trained on; connected components that a fitted ConnComp finds; the true boxes; or the cells of
SPAIR's backbone. The last three are trained from scratch."""

_WIDTH = 50  # of vectors that are trained from scratch
_COMPONENT, _TRUE = 21, 14  # texels of a glimpse's side


@dataclass(frozen=True)
class Task:
    """A task of classification."""

    data: DataConfig
    """The images, those of the run; their file may have moved since."""
    label: Label
    """The class of an image."""
    num_classes: int
    units: int
    """Units of the LSTM."""
    training: ClassifierTraining
    """Its seed and threads are those of the run."""
    backbone: SPAIRConfig
    """Has the backbone that "convnet" trains."""


def accuracy_with(objects: Objects, task: Task) -> Measure:
    """Measures the accuracy of a classifier that is trained on the images of a run.

    Its state is kept in the run's folder, in classifier-OBJECTS.safetensors.

    Returns:
        A measure. Its figures are `accuracy` on test images, `validation_accuracy`, the `best_step`
        at which that was reached, and the `steps` made.
    """

    def measure(
        run: Path, device: torch.device, stop: Callable[[], bool]
    ) -> Generator[Started | Event, None, Figures | None]:
        detector = load(run, device)
        config = detector.config
        training = replace(task.training, seed=config.train.seed, threads=config.train.threads)
        yield Started(run.name, training.steps, "updates of a classifier")
        found = yield from train_classifier(
            lambda: _classifier(objects, task, detector.network),
            task.label,
            task.data,
            training,
            run / f"classifier-{objects}.safetensors",
            device,
            stop,
        )
        if found is None:
            return None
        return {
            "accuracy": found.test,
            "validation_accuracy": found.validation,
            "best_step": found.best_step,
            "steps": found.steps,
        }

    return measure


def _classifier(objects: Objects, task: Task, model: Network) -> Classifier:
    """A classifier with new weights, on the objects that `model` finds or on others."""
    vectors: GlimpseVectors | CellVectors
    if objects == "convnet":
        c = task.backbone
        shape = c.strides, c.backbone_channels, c.features, c.pointwise_kernel, c.activation
        # half of the features are ignored, as in the authors' code
        vectors = CellVectors(Backbone(*shape), c.features // 2)
    elif objects == "truebb":
        encoder = glimpse_encoder(_TRUE, _WIDTH)
        vectors = GlimpseVectors(true_glimpses(_TRUE), encoder, _WIDTH, trained=True)
    elif isinstance(model, ConnComp):
        encoder = glimpse_encoder(_COMPONENT, _WIDTH)
        found = component_glimpses(model, _COMPONENT)
        vectors = GlimpseVectors(found, encoder, _WIDTH, trained=True)
    else:
        assert isinstance(model, SPAIR | AIR)
        width, trained = model.config.what, objects == "unfixed"
        vectors = GlimpseVectors(_found(model), model.encoder, width, trained=trained)
    return Classifier(vectors, width=vectors.width, units=task.units, num_classes=task.num_classes)


def _found(model: SPAIR | AIR) -> Glimpses:
    if isinstance(model, SPAIR):
        return lambda batch: model.glimpses(batch.images)
    given = model.config.count_is_given
    return lambda batch: model.glimpses(batch.images, batch.counts if given else None)
