"""Trains a classifier of images by their objects (docs/model.md 12.3).

Everything random is a function of (seed, step), so a training that is stopped and resumed gives the
same result on a CPU. Its state is one safetensors file, which is written at every validation.
"""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from spairkit.backends import computing_in
from spairkit.config import DataConfig
from spairkit.data.datasets import Dataset, evaluation_batches, open_dataset
from spairkit.errors import InputError
from spairkit.models.classifier import Classifier
from spairkit.storage import durable
from spairkit.storage.checkpoints import MAX_BYTES
from spairkit.training.validation import Step

Label = Callable[[Tensor], Tensor]
"""The class of each image [B] int64 from the labels of its objects [B, N] int64, -1 for none."""

_BATCH_SIZE = 64  # of validation
_PROGRESS = "progress"  # of the state: updates, the best accuracy, and updates until then
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of Adam


@dataclass(frozen=True)
class ClassifierTraining:
    """How a classifier is trained; the defaults are the paper's for the addition of digits."""

    steps: int = 200_000
    """Most updates."""
    validation_every: int = 1000
    """Updates between validations."""
    patience: int = 10_000
    """Updates without a better validation after which the training stops."""
    batch_size: int = 32
    """Images in an update."""
    learning_rate: float = 1e-4
    """Of Adam."""
    seed: int = 0
    """Seed of weights and of the choice of images."""
    threads: int = 0
    """CPU threads; 0 is torch's choice."""


@dataclass(frozen=True)
class Accuracy:
    """The result: shares of images whose class is right, by the weights that validated best."""

    test: float
    validation: float
    best_step: int
    """Updates of these weights."""
    steps: int
    """Updates made."""


def train_classifier(
    make: Callable[[], Classifier],
    label: Label,
    data: DataConfig,
    training: ClassifierTraining,
    path: Path,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[Step, None, Accuracy | None]:
    """Trains by cross-entropy with Adam, until the accuracy on validation images stops to improve.

    Args:
        make: a classifier whose new weights come from torch's default generator; others, such as
            those of a trained SPAIR, it may bring along. Parameters without `requires_grad` stay.
        label: the class of each image.
        data: the images; with `train_images` the training set is finite.
        training: the settings.
        path: the file of the state, resumed from if it exists, and kept at the end.
        device: of the classifier and the images.
        stop: called after every update; if it returns True, the training ends with its state
            saved.

    Yields:
        A `Step` for every update.

    Returns:
        The accuracy on test images, or None if it was stopped.

    Raises:
        InputError: the state in `path` cannot be used or written, or the data cannot be read.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(training.threads or threads)
    try:
        trainer = _Trainer(make, label, data, training, path, device)
        return (yield from trainer.train(stop))
    finally:
        torch.set_num_threads(threads)


def accuracy(classifier: Classifier, label: Label, dataset: Dataset) -> float:
    """The share of a dataset's images whose most probable class is right."""
    right = images = 0
    with torch.no_grad():
        for batch in evaluation_batches(dataset, _BATCH_SIZE):
            right += int((classifier(batch).argmax(1) == label(batch.labels)).sum())
            images += len(batch.labels)
    return right / images


class _Trainer:
    """A classifier, its optimiser and the best weights so far."""

    def __init__(
        self,
        make: Callable[[], Classifier],
        label: Label,
        data: DataConfig,
        training: ClassifierTraining,
        path: Path,
        device: torch.device,
    ) -> None:
        self.label, self.training, self.path, self.device = label, training, path, device
        self.images, self.validation, self.test = (
            open_dataset(data, split, device) for split in ("train", "validation", "test")
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(training.seed)  # not those of GPUs
            self.classifier = make().to(device)
        self.parameters = {
            name: parameter
            for name, parameter in self.classifier.named_parameters()
            if parameter.requires_grad
        }
        self.optimiser = torch.optim.Adam(
            self.parameters.values(), lr=training.learning_rate, fused=True
        )
        self.step, self.best, self.best_step = 0, -1.0, 0
        self.best_weights = self._weights()
        if path.exists():
            self._resume()

    def train(self, stop: Callable[[], bool]) -> Generator[Step, None, Accuracy | None]:
        """As `train_classifier`."""
        training = self.training
        started = time.perf_counter()
        while not self._is_over():
            with computing_in("float32", self.device):
                self._update()
                validates = self.step % training.validation_every == 0
                if validates or self.step == training.steps:
                    self._validate()
            yield Step(self.step, training.steps, None, time.perf_counter() - started)
            if stop() and not self._is_over():
                self._save()
                return None
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best_weights[name])
        with computing_in("float32", self.device):
            test = accuracy(self.classifier.eval(), self.label, self.test)
        return Accuracy(test, self.best, self.best_step, self.step)

    def _is_over(self) -> bool:
        return (
            self.step >= self.training.steps or self.step - self.best_step >= self.training.patience
        )

    def _update(self) -> None:
        training = self.training
        first = (training.seed << 32) + self.step * training.batch_size
        batch = self.images.batch(torch.arange(first, first + training.batch_size))
        loss = F.cross_entropy(self.classifier.train()(batch), self.label(batch.labels))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.step += 1

    def _validate(self) -> None:
        found = accuracy(self.classifier.eval(), self.label, self.validation)
        if found > self.best:
            self.best, self.best_step, self.best_weights = found, self.step, self._weights()
        self._save()

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.parameters.items()}

    def _save(self) -> None:
        numbers = [self.step, self.best, self.best_step]
        state = {_PROGRESS: torch.tensor(numbers, dtype=torch.float64)}
        for name, parameter in self.parameters.items():
            state[f"weight:{name}"] = parameter.detach()
            state[f"best:{name}"] = self.best_weights[name]
            for key in _MOMENTS:
                state[f"{key}:{name}"] = self.optimiser.state[parameter][key]
        # copied, because on a GPU the weights of an LSTM share memory
        state = {name: value.cpu() for name, value in state.items()}
        durable.write_bytes(self.path, safetensors.torch.save(state))

    def _resume(self) -> None:
        try:
            if self.path.stat().st_size > MAX_BYTES:
                raise ValueError("it is too large")
            state = safetensors.torch.load(self.path.read_bytes())
            step, best, best_step = state[_PROGRESS].tolist()
            for name, parameter in self.parameters.items():
                moments = {key: state[f"{key}:{name}"].to(self.device) for key in _MOMENTS}
                weight, best_weight = state[f"weight:{name}"], state[f"best:{name}"]
                for value in (weight, best_weight, moments["exp_avg"], moments["exp_avg_sq"]):
                    if value.shape != parameter.shape or value.dtype != parameter.dtype:
                        raise ValueError(f"{name} does not fit")
                if moments["step"].dim():
                    raise ValueError(f"the updates of {name} are no number")
                with torch.no_grad():
                    parameter.copy_(weight)
                self.best_weights[name] = best_weight.to(self.device)
                self.optimiser.state[parameter] = moments
            self.step, self.best, self.best_step = int(step), best, int(best_step)
        except (SafetensorError, KeyError, ValueError, OverflowError, OSError) as error:
            raise InputError(
                f"{self.path}: not the state of this training ({error}); delete it to train again"
            ) from None
