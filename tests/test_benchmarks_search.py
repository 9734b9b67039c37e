"""The benchmark of the search: its images, its figures and its command."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from spairkit.benchmarks import search
from spairkit.benchmarks.search import SCENE, run, scenes, tiled
from spairkit.cli.bench import app
from spairkit.cli.main import main
from spairkit.data.datasets import open_dataset
from spairkit.detector import load

CPU = torch.device("cpu")
WORDS = ["search", "--device", "cpu", "--seconds", "0", "--batch", "2", "--size", "100"]


def test_tiles_are_the_scenes_in_raster_order() -> None:
    data = search._data(load(device="cpu").config)
    images, objects = scenes(data, 4)
    truth = open_dataset(data, "test").batch(torch.arange(4)).truth()
    assert objects == sum(len(item) for item in truth)
    assert all(1 <= len(item) <= 3 for item in truth)
    image, same = tiled(data, 2 * SCENE + 5)
    assert same == objects
    assert image.shape == (3, 101, 101)
    for number, (y, x) in enumerate([(0, 0), (0, 48), (48, 0), (48, 48)]):
        assert torch.equal(image[:, y : y + 48, x : x + 48], images[number])
    assert image[:, 96:].sum() == image[:, :, 96:].sum() == 0


def test_figures_are_complete() -> None:
    lines: list[str] = []
    figures = list(run([2], 2 * SCENE, CPU, 0, lines.append))
    modes = ["off", "refine", "full"]
    assert [figure.way for figure in figures] == 2 * modes
    assert [line.rpartition(" ")[2] for line in lines] == 2 * modes
    small, large = figures[:3], figures[3:]
    assert {figure.case.split(",")[0] for figure in small} == {"2 x 48 px"}
    assert {figure.case.split(",")[0] for figure in large} == {"96 px"}
    for group in (small, large):
        for figure in group:
            assert figure.samples == 1
            assert figure.p20_ms == figure.median_ms == figure.p80_ms > 0
            assert figure.times == pytest.approx(figure.median_ms / group[0].median_ms)
            assert figure.more["CPU ms"] > 0
            objects = int(figure.case.split(", ")[1].split()[0])
            assert abs(figure.more["found"] - objects) <= 0.5 * objects


def test_times_are_per_image(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"wall": 0.0, "cpu": 0.0}

    def detect_batch(images: torch.Tensor) -> list[list[int]]:
        now["wall"] += 3.0
        now["cpu"] += 1.0
        return [[1, 2]] * len(images)

    monkeypatch.setattr("time.perf_counter", lambda: now["wall"])
    monkeypatch.setattr("time.process_time", lambda: now["cpu"])
    detector = load(device="cpu")
    monkeypatch.setattr(detector, "detect_batch", detect_batch)
    call = search._Timed(detector, torch.zeros(4, 3, SCENE, SCENE))
    call()
    assert (call.wall, call.cpu, call.found) == ([750.0], [250.0], 8)


def test_bench_search_prints_a_table_or_json(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    table = CliRunner().invoke(app, [*WORDS, "--ledger", str(ledger)])
    assert table.exit_code == 0, table.output
    assert len(table.stderr.splitlines()) == 7
    assert "CPU ms" in table.stdout
    assert "times: slower than off" in table.stdout
    silent = CliRunner().invoke(app, [*WORDS, "--ledger", str(ledger), "--json", "--quiet"])
    assert silent.stderr == f"added to {ledger}\n"
    document = json.loads(silent.stdout)
    assert document["benchmark"] == "search"
    assert [figure["way"] for figure in document["figures"]] == 2 * ["off", "refine", "full"]
    assert len(ledger.read_text().splitlines()) == 12


def test_large_image_can_be_left_out_but_not_too_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", *WORDS, "--ledger", str(tmp_path / "ledger.jsonl")]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--size", "0", "--json"])
    assert ended.value.code == 0
    assert len(json.loads(capsys.readouterr().out)["figures"]) == 3
    with pytest.raises(SystemExit) as ended:
        main([*words, "--size", "20"])
    assert ended.value.code == 2
    assert "--size 20: must be 0, or at least the side of a scene, 48" in capsys.readouterr().err


def test_detection_is_timed_in_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["bench", "detect", "--size", "96", "--seconds", "0", "--device", "cpu", "--quiet"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--json"])
    assert ended.value.code == 0
    small, middle, large = json.loads(capsys.readouterr().out)["figures"]
    for speed, number, side in ((small, 256, 48), (middle, 16, 256), (large, 1, 96)):
        assert speed["case"].startswith(f"{number} x {side} px, ")
        objects = int(speed["case"].split(", ")[1].split()[0])
        assert abs(speed["found"] - objects) <= 0.2 * objects
        pixels = speed["images_per_second"] * side**2 / 1e6
        assert speed["megapixels_per_second"] == pytest.approx(pixels)
        assert speed["cpu_ms_per_image"] > 0
        assert speed["passes"] == 1
    assert len(Path("benchmarks.jsonl").read_text().splitlines()) == 3
    with pytest.raises(SystemExit) as ended:
        main(["bench", "detect", "--size", "20"])
    assert ended.value.code == 2
