"""Fig. 4 and Table 1: their tasks, trials and trends; a classifier resumes within an experiment."""

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch

from spairkit.config import DataConfig, SPAIRConfig
from spairkit.experiments import fig4, table1
from spairkit.experiments.experiment import Measured, Scale, Settings
from spairkit.experiments.published import FIGURE_4
from spairkit.experiments.work import carry_out, is_measured, open_experiment, read_measured

CPU = torch.device("cpu")
SIZES = [1000 * 2**k for k in range(8)]


def stop_after(calls: int) -> Callable[[], bool]:
    counter = count(1)
    return lambda: next(counter) > calls


def test_sum_counts_only_digits_that_are_there() -> None:
    labels = torch.tensor([[9, 9, 9, 9, 9], [0, 1, 2, -1, -1], [-1, -1, -1, -1, -1]])
    assert fig4.sum_of_digits(labels).tolist() == [45, 3, 0]


def test_interrupted_classifier_resumes_to_the_same_figures(tmp_path: Path) -> None:
    figures = []
    for name in ("whole", "stopped"):
        folder, rounds = tmp_path / name, 0
        trials = open_experiment("fig4", folder, scale="smoke")[3]
        chosen = [trial for trial in trials if trial.name.startswith("conncomp-8-")]
        assert len(chosen) == 1
        while not all(is_measured(trial, folder) for trial in chosen):
            rounds += 1
            list(carry_out(chosen, folder, CPU, stop_after(10**6 if name == "whole" else rounds)))
        assert rounds == 1 if name == "whole" else rounds > 3
        runs = [folder / "runs" / trial.name for trial in chosen]
        states = [path.read_bytes() for run in runs for path in sorted(run.glob("classifier-*"))]
        assert len(states) == 3
        figures.append((states, [read_measured(run).figures for run in runs]))
    assert figures[0] == figures[1]


@pytest.mark.parametrize("scale", ["smoke", "cpu", "full"])
def test_methods_of_fig4_see_the_same_images(scale: Scale) -> None:
    settings = Settings("fig4", scale, 2)
    trials = fig4.EXPERIMENT.trials(settings, Path())
    sizes = fig4.EXPERIMENT.effort(settings).train_images
    assert len(trials) == 2 * 3 * len(sizes)
    by_size: dict[str, DataConfig] = {}
    for trial in trials:
        _, size, _, _ = trial.name.split("-")
        data = trial.config.data
        digits = 3 if scale == "cpu" else 5
        assert (data.min_objects, data.max_objects, data.seed) == (digits, digits, 0)
        assert data.train_images == int(size)
        assert data == by_size.setdefault(size, data)
    assert {trial.config.data.train_images for trial in trials} == set(sizes)
    if scale == "full":
        assert list(sizes) == SIZES


def test_full_scale_of_table1_is_the_papers() -> None:
    trials = table1.EXPERIMENT.trials(Settings("table1", "full", 6), Path())
    assert [trial.config.train.seed for trial in trials] == list(range(6))
    config = trials[0].config
    assert isinstance(config.model, SPAIRConfig)
    assert (config.model.background, config.model.pointwise_kernel) == ("mlp", 2)
    assert (config.data.name, config.data.max_objects) == ("cards", 7)
    assert config.data.train_images == 128_000
    fewer = table1.EXPERIMENT.trials(Settings("table1", "cpu", 1), Path())[0].config.data
    assert (fewer.min_objects, fewer.max_objects) == (3, 3)
    assert config.train.training_wheels == 0


def accuracies(**means: float) -> dict[str, Measured]:
    """Measurements of Fig. 4 at the scale smoke with these accuracies at the largest size."""
    found = {}
    for kind, keys in (
        ("spair", ("fixed", "unfixed")),
        ("air", ("fixed", "unfixed")),
        ("conncomp", ("components", "truebb", "convnet")),
    ):
        for size in (8, 16):
            figures = {
                key: {"accuracy": means.get(f"{kind}_{key}", 0.1) if size == 16 else 0.1}
                for key in keys
            }
            found[f"{kind}-{size}-seed-0"] = Measured(1, None, figures)
    return found


def test_order_of_the_methods_is_judged_at_the_largest_size() -> None:
    settings = Settings("fig4", "smoke", 1)
    order = {"conncomp_truebb": 0.9, "spair_unfixed": 0.7, "conncomp_components": 0.2}
    found = fig4.EXPERIMENT.conclude(settings, Path(), accuracies(**order))
    assert found.trends == [
        "TrueBB > SPAIR > ConnComp > ConvNet, AIR: holds (accuracy of 16 images: TrueBB 0.900, "
        "SPAIR 0.700, ConnComp 0.200, ConvNet 0.100, AIR 0.100)"
    ]
    drawn = {line.name: line for chart in found.charts for line in chart.lines}
    assert len(drawn) == 7
    assert [drawn["TrueBB"].ours[n].mean for n in (8, 16)] == [0.1, 0.9]
    assert {id(line.published) for line in drawn.values()} == set(map(id, FIGURE_4.values()))
    for change in ({"spair_unfixed": 0.95}, {"air_unfixed": 0.3}, {"conncomp_convnet": 0.2}):
        changed = fig4.EXPERIMENT.conclude(settings, Path(), accuracies(**{**order, **change}))
        assert "does not hold" in changed.trends[0]


@pytest.mark.parametrize("scale", ["cpu", "full"])
def test_published_sums_are_of_five_digits(scale: Scale) -> None:
    settings = Settings("fig4", scale, 1)
    trials = fig4.EXPERIMENT.trials(settings, Path())
    measured = {
        trial.name: Measured(1, None, {key: {"accuracy": 0.5} for key in trial.measures})
        for trial in trials
        if trial.name.endswith("-seed-0")
    }
    found = fig4.EXPERIMENT.conclude(settings, Path(), measured)
    lines = [line for chart in found.charts for line in chart.lines]
    assert all(bool(line.published) == (scale == "full") for line in lines)
    assert all(f"{3 if scale == 'cpu' else 5} digits" in chart.title for chart in found.charts)


@pytest.mark.parametrize("scale", ["cpu", "full"])
def test_published_accuracies_are_for_seven_cards(scale: Scale) -> None:
    measures = ("fixed", "unfixed", "convnet", "truebb")
    figures = {name: {"accuracy": 0.5 + n / 10} for n, name in enumerate(measures)}
    measured = {"spair-seed-0": Measured(1, None, figures)}
    found = table1.EXPERIMENT.conclude(Settings("table1", scale, 1), Path(), measured)
    (chart,) = found.charts
    published = {line.name for line in chart.lines if line.published}
    assert published == ({"SPAIR", "ConvNet", "TrueBB"} if scale == "full" else set())
    assert chart.title == f"Accuracy, {3 if scale == 'cpu' else 7} cards"
    assert "does not hold" in found.trends[0]
    figures["unfixed"]["accuracy"] = 0.71
    found = table1.EXPERIMENT.conclude(Settings("table1", scale, 1), Path(), measured)
    assert "does not hold" not in found.trends[0]
    assert found.picture is not None
    assert found.picture("a note").startswith(b"\x89PNG")


def test_fixed_encoder_is_not_in_the_state(tmp_path: Path) -> None:
    trials = open_experiment("table1", tmp_path / "x", scale="smoke")[3]
    list(carry_out(trials, tmp_path / "x", CPU))
    run = tmp_path / "x" / "runs" / "spair-seed-0"
    from safetensors import safe_open

    held = {}
    for objects in ("fixed", "unfixed", "convnet", "truebb"):
        with safe_open(run / f"classifier-{objects}.safetensors", "pt") as state:
            names = [name for name in state.keys() if name.startswith("weight:vectors.")]  # noqa: SIM118
        held[objects] = {name.split(".")[1] for name in names}
    assert held == {
        "fixed": set(),
        "unfixed": {"encoder"},
        "truebb": {"encoder"},
        "convnet": {"backbone"},
    }
    figures = json.loads((run / "measured.json").read_text())["figures"]
    assert all(item["best_step"] <= item["steps"] == 2 for item in figures.values())
