"""Trainings that show signs of failure at a validation, and start again with other settings."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spairkit.config import Config
from spairkit.config_values import from_dict, merge
from spairkit.data.datasets import open_splits
from spairkit.images import write_png
from spairkit.models.loading import build
from spairkit.models.spair import SPAIR
from spairkit.storage import durable
from spairkit.storage.runs import Run
from spairkit.training import restarts
from spairkit.training.loop import Restart, Step, Validation, fit
from spairkit.training.restarts import _change, _means, _sign, is_judged

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "data": {"name": "folder", "image_height": 24, "image_width": 24, "validation_images": 8},
    "prepare": {"contrast": "direction", "background": "image", "levels": "image"},
    "model": {
        "backbone_channels": [4],
        "features": 8,
        "hidden": 8,
        "passthrough": 4,
        "what": 4,
        "encoder_hidden": [8],
        "decoder_hidden": [8],
        "object_size": 6,
        "likelihood": "normal",
        "least_noise": 0.1,
        "box_contrast": 0.5,
        "odds_start": 1.0,
    },
    "train": {
        "steps": 12,
        "batch_size": 4,
        "validation_every": 3,
        "training_wheels": 0,
        "threads": 1,
        "retries": ["background", "seed"],
    },
}
ALL_ON = {"model": {"presence_bias": 8.0}, "train": {"learning_rate": 1e-6}}
"""Settings with which every cell is on, and stays on."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of bright discs on a dark ground."""
    place = tmp_path / "images"
    place.mkdir()
    y, x = np.mgrid[:60, :60]
    disc = (y % 20 - 10) ** 2 + (x % 20 - 10) ** 2 < 30
    noise = np.random.default_rng(0).normal(0, 0.01, (2, 60, 60))
    for number in range(2):
        image = torch.from_numpy(0.2 + 0.6 * disc + noise[number]).float()
        write_png(place / f"{number}.png", image.expand(3, -1, -1))
    return place


@pytest.fixture
def from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judges every validation."""
    monkeypatch.setattr(restarts, "_FIRST_STEP", 0)


def tiny(folder: Path, *layers: dict[str, Any]) -> Config:
    return from_dict(merge(TINY, {"data": {"path": str(folder)}}, *layers))


def train(config: Config, path: Path, updates: int | None = None) -> tuple[Run, list[Any]]:
    """Trains in a new run or resumes one; stops after so many updates of this call."""
    run = Run.open(path) if path.exists() else Run.create(path, config)
    made = 0

    def stop() -> bool:
        return updates is not None and made >= updates

    events = []
    with run.lock():
        for event in fit(run.config, run, CPU, stop):
            made += isinstance(event, Step)
            events.append(event)
    return run, events


def weights(run: Run) -> bytes:
    return (run.path / "last" / "model.safetensors").read_bytes()


def network(config: Config) -> SPAIR:
    model = build(config)
    assert isinstance(model, SPAIR)
    return model.eval()


@pytest.mark.usefixtures("from_the_first")
def test_failing_training_starts_again_with_what_may_change(folder: Path, tmp_path: Path) -> None:
    run, events = train(tiny(folder, ALL_ON), tmp_path / "run")
    first, second = (event for event in events if isinstance(event, Restart))
    assert str(first) == (
        "step 3: 100% of cells are on; starting again with prepare.background = 'surface'"
    )
    assert str(second) == "step 3: 100% of cells are on; starting again with train.seed = 1"
    steps = [event.step for event in events if isinstance(event, Step)]
    assert steps == [1, 2, 3, 1, 2, 3, *range(1, 13)]
    assert [event.step for event in events if isinstance(event, Validation)] == [3, 6, 9, 12]
    again = Run.open(run.path)
    assert again.config == run.config
    train_config = again.config.train
    assert (again.config.prepare.background, train_config.seed) == ("surface", 1)
    assert train_config.retries == ()
    records = again.metrics()
    assert records[:2] == [first.record(), second.record()]
    assert records[1] == {
        "kind": "restart",
        "step": 0,
        "after": 3,
        "reason": "100% of cells are on",
        "changed": {"train.seed": 1},
    }
    assert [record["step"] for record in records[2:]] == [3, 6, 9, 12]
    assert sorted(path.name for path in (run.path / "pictures").iterdir()) == [
        "step-12.png",
        "step-3.png",
        "step-6.png",
        "step-9.png",
    ]

    direct = {"prepare": {"background": "surface"}, "train": {"seed": 1, "retries": []}}
    plain, _ = train(tiny(folder, ALL_ON, direct), tmp_path / "plain")
    assert weights(plain) == weights(run)


@pytest.mark.usefixtures("from_the_first")
def test_good_training_is_untouched(folder: Path, tmp_path: Path) -> None:
    good = {"model": {"presence_bias": -8.0}}  # no object: only found where a watershed finds some
    config = tiny(folder, good, {"train": {"retries": []}})
    calls = []

    def sign(*_: Any) -> None:
        calls.append(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restarts, "_sign", sign)
        watched, events = train(tiny(folder, good), tmp_path / "watched")
    assert len(calls) == 2, "of four validations, those of the first half"
    assert not any(isinstance(event, Restart) for event in events)
    assert watched.config.train.retries == ("background", "seed")
    plain, _ = train(config, tmp_path / "plain")
    assert weights(plain) == weights(watched)
    assert plain.metrics() == watched.metrics()


@pytest.mark.usefixtures("from_the_first")
@pytest.mark.parametrize("stops", [(2,), (4, 1), (3,), (6, 2, 3)])
def test_stopped_and_resumed_training_is_bit_identical(
    folder: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    config = tiny(folder, ALL_ON)
    whole, _ = train(config, tmp_path / "whole")
    for updates in stops:
        train(config, tmp_path / "cut", updates)
    cut, _ = train(config, tmp_path / "cut")
    assert weights(cut) == weights(whole)
    assert cut.metrics() == whole.metrics()
    assert cut.config == whole.config


class _KilledError(Exception):
    pass


def failing(function: Callable[..., Any], calls: Iterator[int]) -> Callable[..., Any]:
    """The function, which is killed before one of its calls: the one at which `calls` gives 0."""

    def call(*args: Any, **options: Any) -> Any:
        if next(calls) == 0:
            raise _KilledError
        return function(*args, **options)

    return call


@pytest.mark.usefixtures("from_the_first")
@pytest.mark.parametrize("last", range(8))
def test_kill_during_a_restart_loses_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """Every file that a restart removes or writes is the last one of a process."""
    late = {"train": {"validation_every": 2, "retries": ["seed"]}}
    config = tiny(folder, ALL_ON, late)

    def sign(model: SPAIR, config: Config, dataset: Any) -> tuple[str, str] | None:
        """A failure at the second validation of the first seed."""
        has_begun = config.train.seed == 0 and run_at_2()
        return ("many", "too many") if has_begun else None

    path = tmp_path / "whole"

    def run_at_2() -> bool:
        return (path / "checkpoints" / "step-2").exists()

    monkeypatch.setattr(restarts, "_sign", sign)
    whole, events = train(config, path)
    assert [event.step for event in events if isinstance(event, Restart)] == [4]

    path = tmp_path / "cut"
    train(config, path, 3)
    calls = iter(range(-last, 100))
    with monkeypatch.context() as patch:
        original = Run.restart

        def restart(self: Run, *args: Any) -> None:
            with pytest.MonkeyPatch.context() as inner:
                for name in ("remove_folder", "write_text"):
                    inner.setattr(durable, name, failing(getattr(durable, name), calls))
                original(self, *args)

        patch.setattr(Run, "restart", restart)
        try:
            train(config, path)
        except _KilledError:
            assert last < 6
        else:
            assert last >= 5, "a restart removes or writes five to seven things"
    cut, _ = train(config, path)
    assert weights(cut) == weights(whole)
    assert cut.metrics() == whole.metrics()
    assert Run.open(path).config == whole.config


def test_validations_that_are_judged() -> None:
    config = tiny(Path("images"), {"train": {"steps": 1000, "training_wheels": 50}})
    judged = [step for step in range(0, 1001, 50) if is_judged(config, step)]
    assert judged == [250, 300, 350, 400, 450, 500]
    assert not is_judged(replace(config, train=replace(config.train, retries=())), 300)
    flat = {"odds_start": 1e6, "odds_end": 0.0125, "odds_schedule": "exponential"}
    plain = {"prepare": {"contrast": "none", "background": "none", "levels": "fixed"}}
    assert not is_judged(tiny(Path("images"), {"train": {"steps": 1000}}, plain), 300)
    slow = tiny(Path("images"), {"model": flat, "train": {"steps": 300_000}})
    assert not is_judged(slow, 5000), "the prior wants half of the cells to be on"
    assert is_judged(slow, 7000)


def test_changes_help_against_what_is_wrong() -> None:
    config = tiny(Path("images"))
    assert _change("background", config, "many") == {"prepare.background": "surface"}
    assert _change("background", config, "few") == {}
    smooth = tiny(Path("images"), {"prepare": {"background": "surface"}})
    assert _change("background", smooth, "many") == {}
    assert _change("prior", config, "many") == {"model.least_noise": 0.3}
    assert _change("prior", config, "few") == {}
    noisy = tiny(Path("images"), {"model": {"least_noise": 0.5}})
    assert _change("prior", noisy, "many") == {}, "out of bounds"
    assert _change("seed", config, "few") == {"train.seed": 1}


@pytest.mark.usefixtures("from_the_first")
def test_few_objects_are_a_failure_only_after_a_third(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "_sign", lambda *words: ("few", "no object is found"))
    _, events = train(tiny(folder), tmp_path / "run")
    (restart,) = (event for event in events if isinstance(event, Restart))
    assert (restart.step, restart.changed) == (6, {"train.seed": 1})


def test_signs_at_a_validation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sign(presence: float, *layers: dict[str, Any]) -> tuple[str, str] | None:
        config = tiny(folder, {"model": {"presence_bias": presence}}, *layers)
        _, validation = open_splits(config)
        return _sign(network(config), config, validation)

    assert sign(8.0) == ("many", "100% of cells are on")
    way, reason = sign(-8.0) or ("", "")
    assert way == "few"
    assert reason.startswith("no object is found in the crops (a watershed finds ")
    monkeypatch.setattr(restarts, "_CELLS_ON", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(restarts, "_DARK", 1.0)
        assert sign(8.0) == ("many", "100% of objects lie on the background")
    monkeypatch.setattr(restarts, "_PAINTED", 1.0)
    monkeypatch.setattr(restarts, "_RECONSTRUCTED", 1e-3)
    assert sign(8.0) == ("few", "the reconstruction is no better than the background alone")
    monkeypatch.setattr(restarts, "_RECONSTRUCTED", 1e9)
    assert sign(8.0) is None
    monkeypatch.setattr(restarts, "AGREED", 1.0)
    way, reason = sign(8.0) or ("", "")
    assert way == "many"
    assert reason.startswith("objects agree with a watershed's by an F1 of 0.")


def test_means_are_those_of_the_pixels_in_boxes() -> None:
    values = torch.rand(9, 13, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor(
        [[0.0, 0, 13, 9], [2, 3, 5, 4], [-4, -2, 3, 2], [11, 7, 20, 30], [4, 4, 4, 6]]
    )
    expected: list[Tensor] = []
    for x1, y1, x2, y2 in boxes.int().tolist():
        part = values[max(y1, 0) : y2, max(x1, 0) : x2]
        expected.append(part.mean() if part.numel() else torch.tensor(0.0))
    torch.testing.assert_close(_means(boxes, values).float(), torch.stack(expected))
    assert _means(boxes[:0], values).shape == (0,)
