"""Calibration of the search: fits that recover known curves, and what a checkpoint keeps."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import spairkit
from spairkit.counts import CountPosterior
from spairkit.detections import Detections, Truth
from spairkit.detector import load
from spairkit.errors import InputError
from spairkit.search.calibration import (
    Calibration,
    calibration_of,
    fit_scores,
    fit_temperature,
)
from spairkit.storage.checkpoints import load_checkpoint, save_calibration, sealed
from spairkit.storage.runs import pretrained
from spairkit.training.calibration import matches


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the packaged model."""
    return Path(shutil.copytree(pretrained(), tmp_path / "step-1"))


def test_scores_are_logistic_in_the_log_of_the_energy() -> None:
    calibration = Calibration(midpoint=40.0, slope=1.5, temperature=10.0)
    saved = torch.tensor([40.0, 40 * math.e, 40 / math.e, 0.1, 0.0, -5.0, math.inf])
    low, high = 1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-1.5))
    least = 1 / (1 + math.exp(-1.5 * math.log(0.1 / 40)))
    expected = [0.5, high, low, least, least, least]
    assert calibration.score(saved)[:-1].tolist() == pytest.approx(expected, rel=1e-5)
    assert float(calibration.score(saved)[-1]) == pytest.approx(1)
    costs = torch.tensor([0.0, 10.0, -3.0, 1000.0])
    expected = [0.5, 1 / (1 + math.e), 0.5, 0.0]
    assert calibration.missed(costs).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("midpoint", "slope"), [(30.0, 2.0), (200.0, 0.7), (5.0, 4.0)])
def test_fitted_scores_recover_a_known_logistic(midpoint: float, slope: float) -> None:
    random = np.random.default_rng(0)
    saved = np.exp(math.log(midpoint) + 2.5 / slope * random.standard_normal(40_000))
    real = random.random(len(saved)) < 1 / (1 + (saved / midpoint) ** -slope)
    found = fit_scores(saved, real)
    assert found[0] == pytest.approx(midpoint, rel=0.05)
    assert found[1] == pytest.approx(slope, rel=0.05)
    scores = Calibration(*found, 1.0).score(torch.from_numpy(saved)).numpy()
    for low in np.arange(0, 1, 0.2):  # of those with about this score, as many are real
        here = (scores >= low) & (scores < low + 0.2)
        assert real[here].mean() == pytest.approx(scores[here].mean(), abs=0.03)


@pytest.mark.parametrize(
    ("saved", "real"),
    [
        ([50.0, 900.0, 2000.0], [True] * 3),
        ([1.0, 2.0, 0.5], [False] * 3),
        ([1.0, 2.0, 900.0, 800.0], [False, False, True, True]),
        ([900.0, 800.0, 1.0, 2.0], [False, False, True, True]),
        ([0.0, -10.0, math.inf], [False, True, True]),
        ([30.0], [True]),
        ([], []),
    ],
)
def test_fitted_scores_are_valid_for_any_sample(saved: list[float], real: list[bool]) -> None:
    midpoint, slope = fit_scores(np.array(saved), np.array(real, dtype=bool))
    calibration = Calibration(midpoint, slope)
    assert calibration_of(asdict(calibration), "test") == calibration
    rising = calibration.score(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert bool((rising.diff() >= 0).all())


def count_likelihood(images: list[tuple[Tensor, Tensor, int]], calibration: Calibration) -> float:
    total = 0.0
    for saved, costs, count in images:
        chances = torch.cat([calibration.score(saved), calibration.missed(costs)])
        total += math.log(CountPosterior.independent(chances).probability(count) + 1e-6)
    return total


@pytest.mark.parametrize("temperature", [2.0, 15.0, 60.0])
def test_fitted_temperature_recovers_a_known_one(temperature: float) -> None:
    random = torch.Generator().manual_seed(0)
    base = Calibration(30.0, 2.0, temperature)
    images = []
    for _ in range(150):
        saved = 1000 + 1000 * torch.rand(3, generator=random)
        costs = 4 * temperature * torch.rand(4, generator=random)
        count = 3 + int((torch.rand(4, generator=random) < base.missed(costs)).sum())
        images.append((saved, costs, count))
    found = fit_temperature(images, Calibration(30.0, 2.0))
    assert found == pytest.approx(temperature, rel=0.4)
    best = count_likelihood(images, Calibration(30.0, 2.0, found))
    for other in (found / 2, found * 2):
        assert best > count_likelihood(images, Calibration(30.0, 2.0, other))


def test_calibration_of_a_checkpoint_is_read_back(checkpoint: Path) -> None:
    before = load_checkpoint(checkpoint)
    calibration = Calibration(midpoint=12.5, slope=3.0, temperature=7.0)
    save_calibration(checkpoint, asdict(calibration))
    after = load_checkpoint(checkpoint)
    assert after.calibration == asdict(calibration)
    assert after.config == before.config
    assert after.metrics == before.metrics
    assert (after.step, after.environment) == (before.step, before.environment)
    assert after.model.keys() == before.model.keys()
    assert all(torch.equal(tensor, before.model[key]) for key, tensor in after.model.items())
    assert load(checkpoint, "cpu", search="full").calibration == calibration
    again = Calibration(midpoint=13.0)
    save_calibration(checkpoint / "model.safetensors", asdict(again))
    assert load(checkpoint, "cpu").calibration == again
    assert not list(checkpoint.parent.glob("*tmp*"))


def test_calibration_of_a_missing_or_damaged_checkpoint_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint"):
        save_calibration(checkpoint / "absent", {})
    (checkpoint / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"manifest.json: not a spairkit manifest"):
        save_calibration(checkpoint, {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"midpoint": -1.0}, "calibration.midpoint: Input should be greater than 0"),
        ({"slope": 1e9}, "calibration.slope: Input should be less than or equal to 1000"),
        ({"temperature": 0.0}, "calibration.temperature: Input should be greater than 0"),
        ({"warmth": 1.0}, "calibration.warmth: Unexpected keyword argument"),
        ({"slope": "2"}, "calibration.slope: Input should be a valid number"),
        ({"slope": None}, "calibration.slope: Input should be a valid number"),
    ],
)
def test_bad_calibrations_give_one_line_that_names_the_key(
    checkpoint: Path, values: dict[str, Any], message: str
) -> None:
    source = checkpoint / "manifest.json"
    manifest = json.loads(source.read_text()) | {"calibration": values}
    source.write_bytes(sealed(manifest))
    with pytest.raises(InputError) as raised:
        spairkit.load(checkpoint, "cpu")
    assert "\n" not in str(raised.value)
    assert str(checkpoint) in str(raised.value)
    assert message in str(raised.value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(checkpoint: Path, number: str) -> None:
    source = checkpoint / "manifest.json"
    manifest = json.loads(source.read_text()) | {"calibration": {"slope": "NUMBER"}}
    source.write_text(json.dumps(manifest).replace('"NUMBER"', number))
    with pytest.raises(InputError, match=r"calibration") as raised:
        spairkit.load(checkpoint, "cpu")
    assert "\n" not in str(raised.value)


def test_a_checkpoint_without_calibration_has_the_default() -> None:
    assert calibration_of({}, "here") == Calibration()
    assert calibration_of({"slope": 3.0}, "here") == Calibration(slope=3.0)


def found_and_true(boxes: list[list[float]], truth: list[list[float]]) -> tuple[Detections, Truth]:
    number = len(boxes)
    found = Detections(
        torch.tensor(boxes).reshape(-1, 4),
        torch.ones(number),
        torch.zeros(number, 2),
        torch.zeros(number),
    )
    return found, Truth(
        torch.tensor(truth).reshape(-1, 4), torch.zeros(len(truth), dtype=torch.int64)
    )


def test_each_true_object_is_matched_once_by_the_surest() -> None:
    boxes: list[list[float]] = [
        [0, 0, 10, 10],
        [1, 0, 11, 10],
        [40, 40, 50, 50],
        [20, 0, 30, 10],
        [20, 0, 27, 10],
    ]
    truth: list[list[float]] = [[0, 0, 10, 10], [20, 0, 30, 10]]
    found, true = found_and_true(boxes, truth)
    saved = torch.tensor([5.0, 9.0, 100.0, 7.0, 1.0])
    assert matches(found, saved, true).tolist() == [False, True, False, True, False]
    saved[0], saved[4] = 10.0, 8.0
    assert matches(found, saved, true).tolist() == [True, False, False, False, True]


def test_an_object_takes_another_true_one_if_its_best_is_gone() -> None:
    boxes: list[list[float]] = [[0, 0, 10, 10], [0, 0, 10, 10]]
    found, true = found_and_true(boxes, [[0.0, 0, 10, 10], [0, 0, 10, 5]])
    assert matches(found, torch.tensor([2.0, 1.0]), true).tolist() == [True, True]


@pytest.mark.parametrize(("width", "hit"), [(2.6, True), (2.4, False)])
def test_matches_need_a_quarter_of_overlap(width: float, hit: bool) -> None:
    found, true = found_and_true([[0.0, 0, width, 10]], [[0.0, 0, 10, 10]])
    assert matches(found, torch.ones(1), true).tolist() == [hit]


def test_without_truth_or_objects_nothing_matches() -> None:
    found, true = found_and_true([[0.0, 0, 1, 1]], [])
    assert matches(found, torch.ones(1), true).tolist() == [False]
    found, true = found_and_true([], [[0.0, 0, 1, 1]])
    assert matches(found, torch.zeros(0), true).tolist() == []
