"""Detector: every form of image, batches of images, explanations, and training from Python."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import spairkit
from spairkit import detector as detector_module
from spairkit.config import AIRConfig, Config, ConnCompConfig, DataConfig, PrepareConfig
from spairkit.data.datasets import open_dataset
from spairkit.detections import Detections
from spairkit.detector import Detector
from spairkit.errors import InputError
from spairkit.images import ImageLike, as_image, write_png
from spairkit.models.loading import build
from spairkit.report.signs import Signs, has_failed
from spairkit.training import loop


@pytest.fixture(scope="module")
def detector() -> Detector:
    return spairkit.load(device="cpu")


@pytest.fixture(scope="module")
def scenes() -> Tensor:  # [6, 3, 48, 48]
    return open_dataset(DataConfig(max_objects=3), "test").batch(torch.arange(6)).images


def assert_same(found: Detections, expected: Detections) -> None:
    assert found.boxes.tolist() == expected.boxes.tolist()
    assert found.scores.tolist() == pytest.approx(expected.scores.tolist(), abs=1e-6)


def bytes_of(scene: Tensor) -> Any:  # [H, W, 3] uint8
    return (scene * 255).round().byte().permute(1, 2, 0).numpy()


def forms(scene: Tensor, folder: Path) -> Iterator[ImageLike]:
    """The same grey scene in every form that `detect` accepts."""
    levels = bytes_of(scene)
    path = folder / "scene.png"
    write_png(path, scene)
    opaque = np.full((*levels.shape[:2], 1), 255, np.uint8)
    yield from (path, str(path), levels, levels[..., 0], np.concatenate([levels, opaque], 2))
    yield levels.astype(np.uint16) * 257
    yield (levels[..., 0].astype(np.uint16) * 257).astype(">u2")
    yield levels / 255
    yield (levels / 255).astype(np.float32)
    yield from (Image.fromarray(levels), Image.fromarray(levels[..., 0]))
    yield torch.from_numpy(levels.transpose(2, 0, 1).copy())
    yield scene.double()


def test_every_form_of_image_is_accepted(
    detector: Detector, scenes: Tensor, tmp_path: Path
) -> None:
    expected = detector.detect(scenes[0])
    assert len(expected) > 0
    for form in forms(scenes[0], tmp_path):
        found = detector.detect(form)
        assert_same(found, expected)
        assert found.image is form


def test_packaged_model_finds_the_true_number_of_objects(scenes: Tensor, tmp_path: Path) -> None:
    truth = open_dataset(DataConfig(max_objects=3), "test").batch(torch.arange(6)).truth()
    for index, scene in enumerate(scenes):
        write_png(tmp_path / f"{index}.png", scene)
    detector = spairkit.load()
    for found, true in zip(detector.detect_many(tmp_path), truth, strict=True):
        assert len(found) == len(true)


def test_transparency_is_composited_on_black() -> None:
    array = np.full((2, 2, 4), 200, np.uint8)
    array[..., 3] = 51
    assert as_image(array).flatten().tolist() == pytest.approx([200 / 255 / 5] * 12)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ([np.zeros((4, 4))], TypeError, r"must be a path, .* got list; for several .* detect_many"),
        (7, TypeError, "got int$"),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"got \[4, 4, 2\]"),
        (np.zeros((0, 4), np.uint8), ValueError, r"image is empty, got an array \[0, 4\]"),
        (np.zeros((4, 4), np.int64), ValueError, "uint8, uint16, bool or floats .* got int64"),
        (
            np.full((4, 4), 300.0),
            ValueError,
            r"must lie in \[0, 1\], got 300 to 300; divide",
        ),
        (np.full((4, 4), np.nan), ValueError, "the image contains NaN"),
        (torch.zeros(1, 3, 4, 4), ValueError, r"must be \[3, H, W\], got \[1, 3, 4, 4\]"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), ValueError, "got torch.int64"),
        ("absent.png", InputError, "absent.png: no such file"),
        (".", InputError, r"\.: is a folder; use detect_many"),
    ],
)
def test_other_inputs_give_one_line_errors(
    detector: Detector, image: Any, error: type[Exception], message: str
) -> None:
    for call in (detector.detect, detector.explain):
        with pytest.raises(error, match=message) as raised:
            call(image)
        assert "\n" not in str(raised.value)


def test_detect_many_keeps_order_and_batches_equal_sizes(
    detector: Detector, scenes: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = torch.zeros(3, 30, 70)
    images: list[ImageLike] = [*scenes[:3], wide, wide, *scenes[3:]]
    expected = [detector.detect(image) for image in images]
    sizes: list[tuple[int, ...]] = []
    detect_batch = Detector.detect_batch

    def noted(self: Detector, batch: Tensor, *arguments: Any) -> list[Detections]:
        sizes.append(tuple(batch.shape))
        return detect_batch(self, batch, *arguments)

    monkeypatch.setattr(Detector, "detect_batch", noted)
    found = list(detector.detect_many(images, batch_size=2))
    assert [size[0] for size in sizes] == [2, 1, 2, 2, 1]
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_detect_many_reads_at_most_one_batch_ahead(detector: Detector, scenes: Tensor) -> None:
    read = 0

    def lazily() -> Iterator[Tensor]:
        nonlocal read
        while True:
            read += 1
            yield scenes[0]

    found = detector.detect_many(lazily(), batch_size=3)
    assert read == 0
    next(found)
    assert read == 4  # the fourth image does not fit, which ends the batch of three


def test_damaged_files_of_a_folder_are_skipped_with_a_warning(
    detector: Detector, scenes: Tensor, tmp_path: Path
) -> None:
    for index, scene in enumerate(scenes[:3]):
        write_png(tmp_path / f"{index}.png", scene)
    data = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match=r"skipped 1 of 3: .*1\.png: a damaged image"):
        found = list(detector.detect_many(tmp_path))
    assert [item.image for item in found] == [tmp_path / "0.png", tmp_path / "2.png"]
    assert_same(found[1], detector.detect(scenes[2]))
    for name in ("0.png", "2.png"):
        (tmp_path / name).write_text("no image")
    with (
        pytest.warns(UserWarning, match="skipped 1 of 3"),
        pytest.raises(InputError, match=r"no image can be read: skipped 3 of 3: .*0\.png: not an"),
    ):
        list(detector.detect_many(tmp_path))


def test_reading_ahead_silences_no_warning(
    detector: Detector, scenes: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filters of warnings are those of all threads, and Pillow's warnings are ignored."""
    (tmp_path / "0.png").write_bytes(b"no image")
    for index, scene in enumerate(scenes[:2], start=1):
        write_png(tmp_path / f"{index}.png", scene)
    real, inside = Image.open, threading.Event()

    def slow(file: Any, *rest: Any, **options: Any) -> Any:
        if file.name.endswith("1.png"):
            inside.set()
            time.sleep(0.2)
        return real(file, *rest, **options)

    monkeypatch.setattr(Image, "open", slow)
    monkeypatch.setattr(
        "spairkit.detector.skipped_files", lambda *_: inside.wait(60) and "skipped a file"
    )
    with pytest.warns(UserWarning, match="skipped a file"):
        assert len(list(detector.detect_many(tmp_path))) == 2


def test_damaged_image_of_an_iterable_is_named_when_it_is_reached(
    detector: Detector, scenes: Tensor, tmp_path: Path
) -> None:
    (tmp_path / "b.png").write_text("no image")
    sources: list[ImageLike] = [scenes[0], tmp_path / "b.png", scenes[1]]
    with pytest.raises(InputError, match=r"b\.png: not an image"):
        list(detector.detect_many(sources, batch_size=1))
    seen: list[Any] = []
    found = detector.detect_many(sources, on_unreadable=lambda source, _: seen.append(source))
    assert [len(item) for item in found] == [len(detector.detect(scenes[i])) for i in (0, 1)]
    assert seen == [tmp_path / "b.png"]


def test_explain_agrees_with_detect(detector: Detector, scenes: Tensor) -> None:
    explanation = detector.explain(scenes[1])
    assert_same(explanation.detections, detector.detect(scenes[1]))
    assert torch.equal(explanation.image, scenes[1])
    assert explanation.appearances.shape == (len(explanation.detections), 14, 14, 4)
    assert float((explanation.reconstruction - scenes[1]).abs().mean()) < 0.1


def test_networks_run_in_float32(
    detector: Detector, scenes: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU torch would use TF32 in convolutions."""
    asked: list[tuple[str, str]] = []

    @contextmanager
    def noted(precision: str, device: torch.device) -> Iterator[None]:
        asked.append((precision, device.type))
        yield

    monkeypatch.setattr(detector_module, "computing_in", noted)
    detector.detect(scenes[0])
    detector.explain(scenes[0])
    assert asked == [("float32", "cpu")] * 2


def test_detector_applies_levels(detector: Detector, scenes: Tensor) -> None:
    config = Config(prepare=PrepareConfig(black=0.2, white=0.4), model=detector.config.model)
    dim = Detector(
        detector.network, config, search=detector.search, calibration=detector.calibration
    )
    image = scenes[0] * 0.2 + 0.2
    assert_same(dim.detect(image), detector.detect(scenes[0]))
    torch.testing.assert_close(dim.explain(image).image, image)


def test_box_contrast_comes_from_checkpoint_or_caller(scenes: Tensor) -> None:
    tight, raw = spairkit.load(device="cpu"), spairkit.load(device="cpu", box_contrast=0.0)
    assert (tight.box_contrast, tight.whole_pixels) == (0.03, True)
    assert (raw.box_contrast, raw.whole_pixels) == (0.0, False)
    ours, theirs = (detector.detect(scenes[0]).boxes for detector in (tight, raw))
    assert torch.equal(ours, ours.round())
    assert not torch.equal(theirs, theirs.round())
    with pytest.raises(ValueError, match=r"box_contrast must lie in \[0, 1\), got 1"):
        spairkit.load(device="cpu", box_contrast=1.0)
    config = Config(model=ConnCompConfig())
    with pytest.raises(InputError, match="conncomp draws boxes around whole objects"):
        Detector(build(config), config, box_contrast=0.5)


def test_only_models_with_given_counts_accept_a_count(detector: Detector, scenes: Tensor) -> None:
    with pytest.raises(InputError, match="this model infers the count itself; remove count"):
        detector.detect(scenes[0], count=2)
    with pytest.raises(InputError, match="infers the count"):
        list(detector.detect_many(scenes, count=2))
    config = Config(model=AIRConfig(kind="air", count="given", max_objects=3))
    air = Detector(build(config).eval(), config)
    assert air.count_is_given
    assert len(air.detect(scenes[0], count=2)) == 2
    assert [len(found) for found in air.detect_many(scenes, count=3)] == [3] * 6
    with pytest.raises(InputError, match=r"this AIR was trained with the number .* --count N, or"):
        air.detect(scenes[0])
    with pytest.raises(InputError, match="--count N"):
        air.detect_many(scenes)
    for count in (-1, 2.7):
        with pytest.raises(ValueError, match="count must be a whole number from 0"):
            air.detect(scenes[0], count=count)  # type: ignore[arg-type]


def test_detector_works_with_conncomp(scenes: Tensor) -> None:
    config = Config(model=ConnCompConfig(threshold=0.5))
    detector = Detector(build(config), config)
    assert detector.whole_pixels
    explanation = detector.explain(scenes[0])
    assert_same(detector.detect(scenes[0]), explanation.detections)
    assert len(explanation.detections) > 0


@pytest.mark.parametrize("threshold", [-0.1, 1.0])
def test_threshold_out_of_range_is_refused(
    detector: Detector, scenes: Tensor, threshold: float
) -> None:
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\)"):
        detector.detect(scenes[0], threshold=threshold)


def test_repr_is_one_line(detector: Detector) -> None:
    assert repr(detector) == "Detector(spair from the packaged model, search full, on cpu)"
    config = Config(model=ConnCompConfig())
    assert repr(Detector(build(config), config)) == "Detector(conncomp, on cpu)"


def test_package_lists_its_public_names() -> None:
    names = dir(spairkit)
    assert {"load", "train", "Detector", "Detections", "render", "presence_kl"} <= set(names)
    assert all(getattr(spairkit, name) is not None for name in names)
    with pytest.raises(AttributeError, match="no attribute 'detect'"):
        spairkit.detect  # noqa: B018


def test_train_reports_and_warns_of_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_png(tmp_path / "0.png", torch.rand(3, 40, 40))
    reason = "no object was found in any image"
    monkeypatch.setattr(loop, "signs_of", lambda *_: Signs(failures=(reason,)))
    settings = {"train.steps": 2, "train.batch_size": 2, "train.threads": 1}
    with pytest.warns(UserWarning, match=rf"the training of .*run failed, .*: {reason}"):
        spairkit.train(tmp_path / "0.png", set=settings, out=tmp_path / "run", verbose=False)
    assert has_failed(tmp_path / "run")
    assert reason in (tmp_path / "run" / "report.html").read_text()


def test_train_returns_a_detector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    for index in range(3):
        write_png(tmp_path / "images" / f"{index}.png", torch.rand(3, 40, 40))
    settings = {"train.steps": 2, "train.batch_size": 2, "train.threads": 1}
    detector = spairkit.train(
        tmp_path / "images",
        set={**settings, "model.background": "mode", "prepare.white": 0.5},
        out=tmp_path / "run",
        device="cpu",
    )
    assert "step 2: elbo" in capsys.readouterr().err
    assert detector.config.model.kind == "spair"
    assert detector.config.model.background == "mode"
    assert detector.config.prepare.white == 0.5
    again = spairkit.load(tmp_path / "run", "cpu")
    image = tmp_path / "images" / "0.png"
    assert_same(again.detect(image, threshold=0.0), detector.detect(image, threshold=0.0))
    with pytest.raises(InputError, match="unknown preset 'fast'"):
        spairkit.train(preset="fast", out=tmp_path / "other")
    with pytest.raises(InputError, match=r"train\.stepz: unknown key, did you mean steps"):
        spairkit.train(set={"train.stepz": 2}, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_tests_take_the_cpu_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU too: see conftest.py."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert detector_module.chosen_device("auto") == torch.device("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "unknown device 'gpu'; choose from: auto, cpu, cuda"),
        ("cuda", "torch finds no such GPU"),
        ("mps", "unknown device 'mps'"),
    ],
)
def test_unusable_devices_are_refused(
    device: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=message):
        spairkit.load(device=device)


def test_detect_many_takes_one_file(detector: Detector, scenes: Tensor, tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", scenes[0])
    (found,) = detector.detect_many(tmp_path / "a.png")
    assert torch.equal(found.boxes, detector.detect(tmp_path / "a.png").boxes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"minutes": -1}, InputError, "minutes must be above 0, got -1"),
        ({"set": "model.background=mode"}, TypeError, "set must be a dict such as"),
        ({"device": "gpu"}, InputError, "unknown device 'gpu'"),
        ({"set": {1: 2}}, TypeError, "set must be a dict such as"),
        ({"data": "absent"}, InputError, "absent: no such folder or file"),
        ({"set": {"data.max_objects": 90}}, InputError, "more area than the image has"),
    ],
)
def test_train_checks_its_arguments_before_it_makes_a_run(
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        spairkit.train(**arguments)
    assert not list(tmp_path.iterdir())


def test_images_before_a_damaged_one_are_not_lost(
    detector: Detector, scenes: Tensor, tmp_path: Path
) -> None:
    found = detector.detect_many([scenes[0], scenes[1], tmp_path / "absent.png"])
    assert [len(next(found)) for _ in range(2)] == [len(detector.detect(s)) for s in scenes[:2]]
    with pytest.raises(InputError, match="no such file"):
        next(found)


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), {}, TypeError, "use detect for one"),
        (Image.new("L", (4, 4)), {}, TypeError, "use detect for one"),
        (7, {}, TypeError, "use detect for one"),
        ([], {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ([], {"threshold": 1.0}, ValueError, "threshold must lie in"),
        ([], {"count": 2}, InputError, "infers the count"),
    ],
)
def test_detect_many_checks_its_arguments_at_once(
    detector: Detector, images: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        detector.detect_many(images, **options)


def test_detect_many_takes_a_batch(detector: Detector, scenes: Tensor) -> None:
    assert len(list(detector.detect_many(scenes))) == len(scenes)


def test_explained_detections_can_be_plotted(detector: Detector, scenes: Tensor) -> None:
    axes = detector.explain(scenes[0]).detections.plot(ax=Figure().add_subplot())
    assert axes.get_title() == "2 found, 2.0 expected, 2 to 2 at 90 %"


def test_counts_of_a_batch_are_refused_if_the_model_infers_them(
    detector: Detector, scenes: Tensor
) -> None:
    with pytest.raises(InputError, match="infers the count"):
        detector.detect_batch(scenes, counts=torch.ones(6, dtype=torch.int64))


def test_batches_of_bytes_are_refused_at_any_levels(detector: Detector, scenes: Tensor) -> None:
    config = replace(detector.config, prepare=PrepareConfig(black=0.1, white=0.9))
    for each in (detector, Detector(detector.network, config)):
        for method in (each.detect_batch, each.explain_batch):
            with pytest.raises(ValueError, match="floating-point"):
                method((scenes * 255).byte())


def test_damaged_pil_images_are_refused(detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    write_png(path, torch.rand(3, 40, 40))
    path.write_bytes(path.read_bytes()[:500])
    with Image.open(path) as image, pytest.raises(InputError, match="PIL image is damaged"):
        detector.detect(image)


def test_images_thinner_than_a_cell_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of 40,000 pixels of noise took half a minute, and had an object in every other cell."""
    noise = np.random.default_rng(0).integers(0, 255, (1, 2000)).astype(np.uint8)
    detector, plain = spairkit.load(), spairkit.load(search="off")
    for image in (noise, noise.T):
        found, expected = detector.detect(image), plain.detect(image)
        assert torch.equal(found.boxes, expected.boxes)
        assert torch.equal(detector.explain(image).detections.boxes, expected.boxes)
        assert len(found) < 10
    assert detector.detect(noise.reshape(20, 100)).counts is not None
    monkeypatch.setattr(detector_module, "WHOLE_PIXELS", 1000)
    assert torch.equal(detector.detect(noise).boxes, plain.detect(noise).boxes)
