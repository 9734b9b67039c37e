"""The fit of ConnComp against a plain search, after interruptions, and without ground truth."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spairkit.cli.main import main
from spairkit.config import Config, PrepareConfig
from spairkit.config_values import from_dict
from spairkit.data.datasets import open_dataset
from spairkit.detections import Detections
from spairkit.detector import load
from spairkit.images import write_png
from spairkit.metrics import ap_spair, average_precision, count_error
from spairkit.models.conncomp import ConnComp, find_components
from spairkit.storage.runs import Run
from spairkit.training.loop import Event, Validation, fit

CPU = torch.device("cpu")
DATA = {"image_height": 30, "image_width": 32, "max_objects": 3, "validation_images": 6}


def config(**model: Any) -> Config:
    model = {"kind": "conncomp", "images": 40, **model}
    return from_dict({"data": DATA, "model": model, "train": {"steps": 12, "seed": 3}})


def fitted(folder: Path, settings: Config) -> tuple[Run, list[Event]]:
    run = Run.create(folder, settings)
    with run.lock():
        return run, list(fit(settings, run, CPU))


@pytest.mark.parametrize("white", [1.0, 0.4])
@pytest.mark.parametrize("criterion", ["ap", "ap_spair", "count_error"])
def test_fit_equals_a_plain_search(tmp_path: Path, criterion: str, white: float) -> None:
    settings = replace(config(criterion=criterion), prepare=PrepareConfig(white=white))
    run, events = fitted(tmp_path / "run", settings)
    batch = open_dataset(settings.data, "train").batch(torch.arange(3 << 32, (3 << 32) + 40))
    scores = []
    for k in range(12):
        model = ConnComp(from_dict({"model": {"kind": "conncomp"}}).model)  # type: ignore[arg-type]
        model.set_threshold(0.01 + k * 2.99 / 11)
        found, truth = model.detect((batch.images / white).clamp(max=1)), batch.truth()
        if criterion == "ap":
            scores.append(average_precision(found, truth))
        elif criterion == "ap_spair":
            scores.append(ap_spair(found, truth, whole_pixels=True))
        else:
            counts = [len(item) for item in found], [len(item) for item in truth]
            scores.append(-count_error(*counts))
    best = scores.index(max(scores))
    assert max(scores) > min(scores)
    loaded = load(run.path).network
    assert isinstance(loaded, ConnComp)
    assert float(loaded.threshold) == pytest.approx(0.01 + best * 2.99 / 11)
    records = run.metrics()
    tried = [record for record in records if record["kind"] == "step"]
    assert [record[criterion] for record in tried] == pytest.approx(np.abs(scores).tolist())
    assert [event.step for event in events] == [*range(1, 13), 12]
    last = events[-1]
    assert isinstance(last, Validation)
    assert last.is_best
    assert last.figures.keys() == {
        "threshold",
        "ap",
        "ap_spair",
        "count_accuracy",
        "count_error",
        "found",
    }
    assert last.figures["threshold"] == pytest.approx(float(loaded.threshold))
    assert last.picture.is_file()
    with run.lock():
        assert list(fit(settings, run, CPU)) == []


def test_resumed_search_is_bit_identical(tmp_path: Path) -> None:
    settings = config()
    whole, _ = fitted(tmp_path / "whole", settings)
    cut = Run.create(tmp_path / "cut", settings)
    for steps in (1, 5, 12):
        with cut.lock():
            asked = iter(range(100))
            stop = lambda: next(asked) + 1 == {1: 1, 5: 4, 12: 99}[steps]  # noqa: B023, E731
            list(fit(settings, cut, CPU, stop))
        assert cut.checkpoints[0][0] == steps
    for name in ("metrics.jsonl", "best/model.safetensors", "last/optimiser.safetensors"):
        assert (cut.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_search_restarts_for_other_thresholds(tmp_path: Path) -> None:
    run, _ = fitted(tmp_path / "run", config())
    run.adopt(replace(run.config, train=replace(run.config.train, steps=7)))
    with run.lock():
        events = list(fit(run.config, run, CPU))
    assert [event.step for event in events] == [*range(1, 8), 7]


def test_only_images_that_are_kept_are_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distances to a known background take less memory than images."""
    monkeypatch.setattr("spairkit.training.classical._MAX_PIXELS", 36 * 30 * 32)
    asked: list[int] = []

    def counted(foreground: np.ndarray[Any, Any], least: int) -> list[Detections]:
        asked.append(len(foreground))
        return find_components(foreground, least)

    monkeypatch.setattr("spairkit.training.classical.find_components", counted)
    for background, images in (("black", 40), ("mode", 32)):  # a batch has 32
        asked.clear()
        fitted(tmp_path / background, config(background=background))
        assert sum(asked) == 12 * images


def test_given_threshold_is_kept(tmp_path: Path) -> None:
    run, events = fitted(tmp_path / "run", config(threshold=0.25))
    assert [event.step for event in events] == [12, 12]
    model = load(run.path).network
    assert isinstance(model, ConnComp)
    assert model.threshold == 0.25


@pytest.fixture
def unlabelled(tmp_path: Path) -> Path:
    """Three images of grey squares on blue."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        image = torch.tensor([0.0, 0.2, 0.4])[:, None, None].repeat(1, 20 + index, 30)
        image[:, 3:9, 4:9] = 0.6
        image[:, 12:17, 20:28] = 0.8
        write_png(folder / f"{index}.png", image)
    return folder


def folder_config(folder: Path, **model: Any) -> Config:
    data = {"name": "folder", "path": str(folder), "image_height": 16, "image_width": 16}
    model = {"kind": "conncomp", **model}
    return from_dict({"data": data, "model": model, "train": {"steps": 5}})


def test_threshold_is_otsus_without_ground_truth(tmp_path: Path, unlabelled: Path) -> None:
    for name, background, threshold in (("a", "mode", "otsu"), ("b", "median", "fit")):
        settings = folder_config(unlabelled, threshold=threshold, background=background)
        run, events = fitted(tmp_path / name, settings)
        assert [event.step for event in events] == [5, 5]
        assert isinstance(events[-1], Validation)
        assert events[-1].figures.keys() == {"threshold", "found"}
        assert events[-1].figures["found"] == 2
        model = load(run.path).network
        assert isinstance(model, ConnComp)
        torch.testing.assert_close(model.background_colour, torch.tensor([0.0, 0.2, 0.4]))
        image = torch.zeros(1, 3, 9, 9) + model.background_colour[:, None, None]
        image[..., 2:4, 5] = 0.7
        assert model.detect(image)[0].boxes.tolist() == [[5, 2, 6, 4]]


def test_otsu_finds_nothing_in_images_of_one_colour(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    write_png(folder / "0.png", torch.full((3, 20, 20), 0.6))
    _, events = fitted(tmp_path / "run", folder_config(folder, threshold="otsu"))
    assert isinstance(events[-1], Validation)
    assert events[-1].figures["found"] == 0


def test_watershed_is_saved_once_and_needs_no_annotations(
    tmp_path: Path,
    unlabelled: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = folder_config(unlabelled, kind="watershed", diameter=8.0)
    run, events = fitted(tmp_path / "run", settings)
    assert [event.step for event in events] == [5, 5]
    assert isinstance(events[-1], Validation)
    assert events[-1].figures == {"found": 2.0}
    assert events[-1].picture.is_file()
    found = load(run.path).detect(unlabelled / "0.png")
    assert found.boxes.tolist() == [[4, 3, 9, 9], [20, 12, 28, 17]]
    assert found.area.tolist() == pytest.approx([30, 40], abs=1)
    with run.lock():
        assert list(fit(settings, run, CPU)) == []
    monkeypatch.chdir(tmp_path)
    for words in (
        ["train", "--model", "watershed", "--data", str(unlabelled), "--json"],
        ["train", "--model", "conncomp", "--data", str(unlabelled), "--json"],
        ["eval"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        printed = capsys.readouterr()
        if words == ["eval"]:
            assert ended.value.code == 2
            assert "annotations.json" in printed.err
            continue
        assert ended.value.code == 0, printed.err
        assert json.loads(printed.out)["test"] is None
        assert ("the threshold is Otsu's" in printed.err) == ("conncomp" in words)
    with pytest.raises(SystemExit):
        main(["detect", str(unlabelled / "0.png"), "--checkpoint", "runs/folder-quick-watershed-1"])
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_search_leaves_out_files_without_annotations(tmp_path: Path, unlabelled: Path) -> None:
    boxes = [[4, 3, 5, 6], [20, 12, 8, 5]]
    content = {
        "images": [{"id": 1, "file_name": "1.png"}],
        "categories": [{"id": 1}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 1, "bbox": box} for n, box in enumerate(boxes)
        ],
    }
    (unlabelled / "annotations.json").write_text(json.dumps(content))
    settings = folder_config(unlabelled, background="mode")
    run, _ = fitted(tmp_path / "run", settings)
    tried = [record["ap"] for record in run.metrics() if record["kind"] == "step"]
    assert max(tried) == 1.0


def test_commands_support_conncomp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*words])
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        return printed.out

    small = [f"data.{name}={value}" for name, value in DATA.items()]
    words = ["data.test_images=9", "model.images=20", "train.steps=5", *small]
    over = [word for pair in zip(["--set"] * len(words), words, strict=True) for word in pair]
    trained = json.loads(run("train", "--model", "conncomp", "--json", *over))
    assert trained["run"] == "runs/digits-quick-conncomp-1"
    assert trained["step"] == 5
    evaluated = json.loads(run("eval", "--checkpoint", trained["run"], "--json"))
    assert evaluated["overall"] == trained["test"]["overall"]
    run("data", "make", "scenes", "--count", "2", *over[:2])
    drawn = json.loads(run("viz", str(next(Path("scenes").glob("*.png"))), "--json"))
    found = json.loads(run("detect", drawn["pictures"][0]["image"]))
    assert drawn["pictures"][0]["count"] == len(found)
    with pytest.raises(SystemExit) as refused:
        main(["eval", "--checkpoint", trained["run"], "--box-contrast", "0.5"])
    assert refused.value.code == 2
    assert "--box-contrast" in capsys.readouterr().err
    page = Path(run("report", trained["run"]).strip()).read_text()
    assert "Threshold search" in page
    assert "CONNCOMP on digits" in page
