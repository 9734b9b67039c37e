"""Training of a classifier: a toy task, early stopping, resumption to the bit, damaged states."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spairkit.config import DataConfig
from spairkit.data.datasets import open_dataset
from spairkit.errors import InputError
from spairkit.models.classifier import Classifier, GlimpseVectors, glimpse_encoder, true_glimpses
from spairkit.training.classification import (
    Accuracy,
    ClassifierTraining,
    accuracy,
    train_classifier,
)

DATA = DataConfig(
    image_height=24,
    image_width=24,
    min_objects=0,
    max_objects=2,
    validation_images=48,
    test_images=200,
    train_images=500,
)
CPU = torch.device("cpu")
SHORT = ClassifierTraining(steps=6, validation_every=2, batch_size=8, threads=1)


def make() -> Classifier:
    vectors = GlimpseVectors(true_glimpses(8), glimpse_encoder(8, 6), 6, trained=True)
    return Classifier(vectors, width=6, units=16, num_classes=3)


def count(labels: Tensor) -> Tensor:
    return (labels >= 0).sum(1)


def holds_a_zero(labels: Tensor) -> Tensor:
    return (labels == 0).any(1).long()


def run(
    path: Path, training: ClassifierTraining = SHORT, stop_at: int = 0, data: DataConfig = DATA
) -> Accuracy | None:
    """Trains on the count until a number of updates."""
    updates = train_classifier(
        make, count, data, training, path, CPU, lambda: bool(stop_at) and step >= stop_at
    )
    step = 0
    while True:
        try:
            step = next(updates).step
        except StopIteration as end:
            result: Accuracy | None = end.value
            return result


def test_learns_to_count(tmp_path: Path) -> None:
    training = ClassifierTraining(
        steps=120, validation_every=20, learning_rate=3e-3, batch_size=32, threads=1
    )
    found = run(tmp_path / "state", training)
    assert found is not None
    assert found.test > 0.9  # a guess is right a third of the time
    assert found.validation > 0.9
    assert found.best_step % 20 == 0
    assert found.steps == 120


def test_result_is_a_function_of_the_seed(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    run(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    run(tmp_path / "b")
    run(tmp_path / "c", replace(SHORT, seed=1))
    first, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again
    assert first != other


@pytest.mark.parametrize("stop_at", [2, 3])
def test_resumes_to_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    whole = run(tmp_path / "whole")
    assert run(tmp_path / "parts", stop_at=stop_at) is None
    assert run(tmp_path / "parts") == whole
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()


def test_finished_training_is_only_measured(tmp_path: Path) -> None:
    whole = run(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    updates = train_classifier(make, count, DATA, SHORT, tmp_path / "state", CPU)
    with pytest.raises(StopIteration) as end:
        next(updates)
    assert end.value.value == whole
    assert (tmp_path / "state").read_bytes() == before


def test_stops_without_a_better_validation(tmp_path: Path) -> None:
    # no update moves the weights enough to change a decision
    training = replace(SHORT, steps=100, learning_rate=1e-12, patience=4)
    found = run(tmp_path / "state", training)
    assert found is not None
    assert (found.best_step, found.steps) == (2, 6)


def test_accuracy_is_the_share_of_right_images() -> None:
    torch.manual_seed(0)
    network = make()
    dataset = open_dataset(DATA, "test")
    batch = dataset.batch(torch.arange(200))
    chosen = network(batch).argmax(1)
    right = sum(int(a == b) for a, b in zip(chosen, holds_a_zero(batch.labels), strict=True))
    assert accuracy(network, holds_a_zero, dataset) == right / 200


@pytest.mark.parametrize("damage", ["cut", "text", "other"])
def test_damaged_state_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state"
    run(path)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-7])
    elif damage == "text":
        path.write_text("no state")
    else:
        path.write_bytes(content.replace(b"weight:embed.0.weight", b"weight:embed.9.weight"))
    with pytest.raises(InputError, match="delete it to train again"):
        run(path)
