"""The benchmarks of training: both versions of an update agree, and figures are complete."""

import json
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from torch import Tensor
from typer.testing import CliRunner

from spairkit.benchmarks import plain, timing, training
from spairkit.benchmarks.plain import PlainSPAIR, PlainTrainer
from spairkit.benchmarks.timing import Figure
from spairkit.benchmarks.training import (
    PAPER_AP,
    attempt,
    check,
    losses_and_gradients,
    run,
    sized,
    target,
)
from spairkit.cli.bench import app
from spairkit.cli.main import main
from spairkit.config import Config, DataConfig
from spairkit.config_values import from_dict, merge
from spairkit.data.datasets import open_dataset
from spairkit.errors import InputError
from spairkit.images import write_png
from spairkit.models import densities
from spairkit.models.loading import build
from spairkit.presets import resolve
from spairkit.training.loop import Event, Step, Validation, fit
from spairkit.training.trainer import Trainer

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "data": {"image_height": 24, "image_width": 24, "max_objects": 1, "validation_images": 4},
    "model": {
        "backbone_channels": [4],
        "features": 8,
        "hidden": 8,
        "passthrough": 4,
        "what": 4,
        "encoder_hidden": [8],
        "decoder_hidden": [8],
    },
    "train": {"batch_size": 2, "steps": 6, "validation_every": 2, "threads": 1},
}


def quiet(line: str) -> None:
    """Ignores a line of progress."""


def tiny(cells: int = 2, **model: Any) -> Config:
    return sized(from_dict(merge(TINY, {"model": model})), 2, cells)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"activation": "celu", "importance_floor": 0.2, "background": "solid", "beta": 2.0},
        {"lateral": False, "importance_floor": 0.0, "stride_order": "descending"},
    ],
)
def test_both_versions_have_equal_losses_and_gradients(model: dict[str, Any]) -> None:
    check(tiny(**model), CPU)


@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_both_versions_agree_at_preset_sizes(preset: str) -> None:
    check(sized(resolve(preset), 32, 4), CPU)


def test_plain_version_uses_no_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> Tensor:
        raise AssertionError("called a kernel")

    model: Any = build(tiny())
    images = torch.rand(2, 3, 24, 24)
    monkeypatch.setattr(densities, "fused", refused)
    losses_and_gradients(PlainSPAIR.like(model), images)
    with pytest.raises(AssertionError, match="called a kernel"):
        losses_and_gradients(model, images)


@pytest.mark.parametrize(
    "function", ["render_by_grid_sample", "presence_kl_by_loop", "cross_entropy_by_torch"]
)
def test_nothing_is_timed_if_the_versions_differ(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(plain, function)

    def wrong(*arguments: Any) -> Tensor:
        value: Tensor = 1.01 * right(*arguments)
        return value

    monkeypatch.setattr(plain, function, wrong)
    message = r"spairkit and the plain version differ by .* in .*; nothing was timed"
    with pytest.raises(RuntimeError, match=message):
        next(run({"tiny 2x4": tiny()}, CPU, 0, quiet))


def test_importance_floor_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = plain.render_by_grid_sample
    monkeypatch.setattr(plain, "render_by_grid_sample", lambda *a: right(*a[:-1], 0.0))
    with pytest.raises(RuntimeError, match="differ by"):
        check(tiny(importance_floor=0.3), CPU)


def test_both_versions_have_equal_weights_after_two_updates() -> None:
    config = tiny()
    rate = config.train.learning_rate
    train = replace(config.train, gradient_noise=0.0, learning_rate_end=rate)
    config = replace(config, train=train)
    scenes = open_dataset(config.data, "train", CPU)
    ours = Trainer(config, run=None, train=scenes, device=CPU)
    model: Any = ours.model
    theirs = PlainTrainer(config, PlainSPAIR.like(model), scenes)
    for step in range(2):
        # the sampling noise of an update is a function of the seed and the step
        digest = sha256(f"{config.train.seed} 1 {step}".encode()).digest()
        theirs.generator.manual_seed(int.from_bytes(digest[:8], "big"))
        ours.update()
        theirs.update()
    found = theirs.model.state_dict()
    for name, value in ours.model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_plain_version_adds_gradient_noise() -> None:
    config = tiny()
    config = replace(config, train=replace(config.train, gradient_noise=0.5, clip_norm=0.0))
    model: Any = build(config)
    trainer = PlainTrainer(config, PlainSPAIR.like(model), open_dataset(config.data, "train", CPU))
    trainer.update()
    gradients = [p.grad.flatten() for p in trainer.parameters if p.grad is not None]
    centre = float(torch.cat(gradients).median())
    assert abs(centre) < 0.2
    assert float(torch.cat(gradients).abs().median()) > 0.2


def test_figures_are_complete() -> None:
    lines: list[str] = []
    figures = list(run({"tiny 2x4": tiny(2), "tiny 2x9": tiny(3)}, CPU, 0, lines.append))
    assert [(figure.case.split("x")[1], figure.way) for figure in figures] == [
        ("4", "spairkit"),
        ("4", "plain"),
        ("9", "spairkit"),
        ("9", "plain"),
    ]
    for figure in figures:
        assert 0 < figure.p20_ms <= figure.median_ms <= figure.p80_ms
        assert figure.samples == 3
        assert figure.more["images/s"] == pytest.approx(2e3 / figure.median_ms)
        assert figure.more["x backbone"] > 1
        assert (figure.times == 1) == (figure.way == "spairkit")
    assert [line.partition(": ")[2] for line in lines] == ["checking"] * 2 + ["timing"] * 2


def test_plain_version_is_skipped_if_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "free_bytes", lambda device: 2**10)
    lines: list[str] = []
    figures = list(run({"tiny 2x4": tiny()}, CPU, 0, lines.append))
    assert [figure.way for figure in figures] == ["spairkit"]
    assert "skipping the plain version, which needs about 0 GiB" in lines[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_updates_are_compared_with_the_backbone() -> None:
    ours, theirs = run({"tiny 2x4": tiny()}, torch.device("cuda"), 0, quiet)
    assert ours.note == theirs.note == ""
    assert ours.more["x backbone"] > 1


def test_bench_train_prints_a_table_or_json(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    words = ["train", "--preset", "quick", "--batch", "1", "--cells", "2", "--seconds", "0"]
    words += ["--device", "cpu", "--ledger", str(ledger), "--set", "model.hidden=8"]
    table = CliRunner().invoke(app, words)
    assert table.exit_code == 0, table.output
    lines = [f"quick 1x4: {step}" for step in ("checking", "timing")]
    assert table.stderr.splitlines() == [*lines, f"added to {ledger}"]
    assert "backbone ms  x backbone" in table.stdout
    silent = CliRunner().invoke(app, [*words, "--json", "--quiet"])
    assert silent.stderr == f"added to {ledger}\n"
    document = json.loads(silent.stdout)
    assert document["benchmark"] == "train"
    assert [figure["way"] for figure in document["figures"]] == ["spairkit", "plain"]
    assert len(ledger.read_text().splitlines()) == 4
    refused = CliRunner().invoke(app, [*words, "--preset", "none"])
    assert isinstance(refused.exception, InputError)


def test_batch_size_as_a_setting_is_refused(tmp_path: Path) -> None:
    words = ["train", "--device", "cpu", "--ledger", str(tmp_path / "ledger.jsonl")]
    refused = CliRunner().invoke(app, [*words, "--set", "train.batch_size=4"])
    assert isinstance(refused.exception, InputError)
    assert "takes its batches from --batch" in str(refused.exception)


def test_other_models_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "train", "--device", "cpu", "--ledger", str(tmp_path / "ledger.jsonl")]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--preset", "quick", "--set", "model.kind=air"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "spairkit: model.kind = 'air' cannot be benchmarked, because only spair has a plain "
        "version to compare with; use spair\n"
    )


def test_interrupted_benchmark_keeps_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = next(run({"tiny 2x4": tiny()}, CPU, 0, quiet))

    def interrupted(*_: Any) -> Iterator[Figure]:
        yield figure
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "run", interrupted)
    ledger = tmp_path / "ledger.jsonl"
    found = CliRunner().invoke(app, ["train", "--device", "cpu", "--ledger", str(ledger), "--json"])
    document = json.loads(found.stdout)
    assert document["partial"] is True
    assert len(document["figures"]) == len(ledger.read_text().splitlines()) == 1


def test_run_ends_once_one_validation_reaches_all_targets() -> None:
    config: Config = from_dict(TINY)
    events: list[Event] = []
    easy = attempt(config, {"ap_spair": 0.0, "count_accuracy": 0.0}, CPU, events.append)
    assert (easy.reached, easy.step, easy.seed) == (True, 2, config.train.seed)
    assert set(easy.best) == {"ap_spair", "count_accuracy"}
    assert easy.minutes > 0
    assert [type(event) for event in events] == [Step, Step, Validation]
    never = attempt(config, {"ap_spair": 0.0, "count_accuracy": 1.1}, CPU)
    assert (never.reached, never.step) == (False, 6)


def test_default_target_is_the_papers_ap() -> None:
    assert PAPER_AP == {1: 0.789, 3: 0.696, 5: 0.673, 7: 0.659, 9: 0.624}
    assert target(resolve("quick").data, None) == 0.696
    with pytest.raises(InputError, match=r"no AP for 4 objects, only for 1, 3, 5, 7, 9; give a"):
        target(DataConfig(max_objects=4), None)
    assert target(DataConfig(max_objects=4), 0.5) == 0.5


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """`bench time-to-ap` on a tiny model; the ledger is ledger.jsonl in the temporary folder."""
    file = tmp_path / "tiny.toml"
    file.write_text(tomli_w.dumps(TINY))
    words = ["time-to-ap", "--config", str(file), "--device", "cpu", "--quiet"]
    return [*words, "--ledger", str(tmp_path / "ledger.jsonl")]


def test_time_to_ap_prints_a_table_or_json(words: list[str], tmp_path: Path) -> None:
    words += ["--ap", "0", "--seeds", "2", "--every", "3"]
    table = CliRunner().invoke(app, words)
    assert table.exit_code == 0, table.output
    assert re.search(r"^ seed +reached +minutes +CPU min +step +best AP paper", table.stdout, re.M)
    assert "2 of 2 seeds reached AP paper 0 in " in table.stdout
    assert "AP paper: the rule of the SPAIR authors' code." in table.stdout
    document = json.loads(
        CliRunner().invoke(app, [*words, "--json", "--count-accuracy", "1"]).stdout
    )
    assert document["validation_every"] == 3
    assert set(document["figures"][0]) == {
        *("seed", "targets", "best", "reached", "step", "minutes", "cpu_minutes")
    }
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 4


def test_time_to_ap_exits_with_2_if_no_seed_succeeds(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *words, "--ap", "1", "--seeds", "2"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert "0 of 2 seeds reached AP paper 1." in printed.out
    assert re.fullmatch(
        r"spairkit: no seed reached AP paper 1; the best figures are AP paper \d\.\d{3}\. .*--ap.*",
        printed.err.splitlines()[-1],
    )
    with pytest.raises(SystemExit):
        main(["bench", "time-to-ap", "--help"])
    assert "0 if any seed succeeded, 2 if none did" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_finished_seeds_survive_a_signal(
    number: signal.Signals,
    status: int,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def signalled(config: Config, *arguments: Any) -> Iterator[Any]:
        for event in fit(config, *arguments):
            if config.train.seed == 1 and event.step == 3:
                signal.raise_signal(number)
            yield event

    monkeypatch.setattr(training, "fit", signalled)
    with pytest.raises(SystemExit) as ended:
        main(["bench", *words, "--ap", "1", "--seeds", "3"])
    assert ended.value.code == status
    assert "0 of 1 seed reached AP paper 1." in capsys.readouterr().out
    line = json.loads((tmp_path / "ledger.jsonl").read_text())
    assert (line["seed"], line["reached"], line["step"]) == (0, False, 6)


def test_time_to_ap_needs_ground_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_png(tmp_path / "image.png", torch.zeros(3, 48, 48))
    with pytest.raises(SystemExit) as ended:
        main(["bench", "time-to-ap", "--data", str(tmp_path), "--device", "cpu"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"spairkit: {tmp_path}: there is no annotations.json (COCO), and an AP needs true boxes; "
        "add that file or choose other data\n"
    )
