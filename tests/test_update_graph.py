"""The update as a CUDA graph. Without a GPU, a recorder of operations replaces the graph."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from spairkit import backends, cuda_graphs, presets
from spairkit.backends import set_precision
from spairkit.config import Config
from spairkit.data import scenes as scenes_module
from spairkit.data.datasets import open_dataset
from spairkit.data.scenes import Scenes
from spairkit.errors import InputError
from spairkit.models.elbo import Losses
from spairkit.models.loading import build
from spairkit.models.noise import Tape, normal, uniform
from spairkit.storage.runs import Run
from spairkit.training import loop, update_graph
from spairkit.training.distributed import World
from spairkit.training.loop import fit
from spairkit.training.trainer import Trainer
from spairkit.training.update_graph import RecordingTrainer, UpdateGraph, make_trainer

if TYPE_CHECKING:
    from conftest import Recorder

CPU = torch.device("cpu")
UPDATES, WHEELS = 12, 6  # both graphs are recorded, and replayed more than once
INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton: see test_interpreter.py"
)


@cache
def as_operator(kernel: Callable[..., Any]) -> Any:
    """The kernel as an operator of torch, for the recorder to see; CUDA sees it as it is."""
    return torch.library.custom_op(f"tests::{kernel.__name__}", mutates_args=())(kernel)


def config_of(recipe: str, data: dict[str, Any] | None = None, **loop: Any) -> Config:
    preset, kind, *names = recipe.split()
    model: dict[str, Any] = {"kind": kind}
    if kind == "spair":
        small = {"backbone_channels": [4], "features": 6, "hidden": 8, "passthrough": 4}
        names += ["black", "bernoulli"][len(names) :]
        model |= small | {"background": names[0], "likelihood": names[1]}
    data = {"image_height": 24, "image_width": 24, "max_objects": 2} | (data or {})
    train = {"batch_size": 2, "training_wheels": WHEELS, "steps": UPDATES, "threads": 1} | loop
    return presets.resolve(preset, {"data": data, "model": model, "train": train})


def plain_trainer(config: Config, device: torch.device = CPU) -> Trainer:
    set_precision(config.train.precision, device)
    return Trainer(config, None, open_dataset(config.data, "train", device), device)


def recording_trainer(config: Config, device: torch.device = CPU) -> RecordingTrainer:
    set_precision(config.train.precision, device)
    return RecordingTrainer(config, None, open_dataset(config.data, "train", device), device)


def make_scenes(trainer: Trainer) -> None:
    """Makes the trainer create its scenes inside the record, as on a GPU."""
    assert isinstance(trainer.train, Scenes)
    trainer.train.fused = True


def trained(trainer: Trainer) -> tuple[list[Tensor], list[float]]:
    totals = []
    for _ in range(UPDATES):
        totals.append(float(trainer.update().total.mean()))
    return [value.clone() for value in trainer.model.state_dict().values()], totals


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch, recorder: "type[Recorder]") -> list[int]:
    """Replaces CUDA by the recorder; returns the number of operations of each record."""
    sizes: list[int] = []

    def record(update: Callable[[], Losses], *_: Any) -> Callable[[], Losses]:
        trainer: Trainer = update.__self__  # type: ignore[attr-defined]
        state = [*trainer.model.state_dict().values(), trainer.skipped]
        state += [t for moments in trainer.optimiser.state.values() for t in moments.values()]
        before = [tensor.detach().clone() for tensor in state]
        recording = recorder()
        with recording:
            losses = update()
        with torch.no_grad():  # CUDA does not execute while it records
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        sizes.append(len(recording.calls))

        @torch.no_grad()
        def play() -> Losses:
            recording.play()
            return losses

        return play

    if os.environ.get("TRITON_INTERPRET") == "1":
        from spairkit.kernels import scenes_compose_triton, scenes_layout_triton

        modules = {"compose_triton": scenes_compose_triton, "scatter_triton": scenes_layout_triton}
        for name, module in modules.items():
            monkeypatch.setattr(module, name, as_operator(getattr(module, name)))
    monkeypatch.setitem(
        backends._tried, "cpu", False
    )  # the recorder cannot see operations inside Numba
    monkeypatch.setattr(cuda_graphs, "_aside", lambda update, device: update())
    monkeypatch.setattr(cuda_graphs, "_record", record)
    return sizes


@pytest.mark.parametrize(
    "recipe",
    [
        "quick spair",
        "paper spair mlp",
        "quick spair mode",
        "quick spair mode normal",
        "quick air",
        "quick dair",
        "paper air",
        "paper dair",
    ],
)
def test_replayed_updates_equal_unrecorded_ones(
    recipe: str, records: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(cuda_graphs, "WARM_UP", UPDATES)
        unrecorded = recording_trainer(config)
        wanted, wanted_totals = trained(unrecorded)
        assert not records
    trainer = recording_trainer(config)
    found, found_totals = trained(trainer)
    assert len(records) == 2
    assert min(records) > 100
    assert found_totals == wanted_totals
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)

    _, plain_totals = trained(plain_trainer(config))
    assert found_totals == pytest.approx(plain_totals, rel=1e-3), (
        "the learning rate is rounded to float32"
    )


@INTERPRETED
@pytest.mark.parametrize("recipe", ["quick spair", "quick air"])
def test_replayed_updates_make_their_scenes(recipe: str, records: list[int]) -> None:
    """New ones for each update, equal to those that plain torch makes outside the record."""
    config = config_of(recipe)
    given = recording_trainer(config)
    wanted, wanted_totals = trained(given)
    assert not given.makes_scenes
    trainer = recording_trainer(config)
    make_scenes(trainer)
    found, found_totals = trained(trainer)
    assert trainer.makes_scenes
    assert len(records) == 4
    assert records[2] > records[0] + 50, "the scenes are recorded too"
    assert "images" in given.places
    assert "images" not in trainer.places
    assert len(set(found_totals)) == UPDATES
    assert found_totals == wanted_totals
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@INTERPRETED
def test_scene_without_a_layout_ends_training(
    records: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At the next report, replayed or not, and before a checkpoint is written."""

    def recording(*arguments: Any) -> Trainer:
        trainer = RecordingTrainer(*arguments)
        make_scenes(trainer)
        return trainer

    monkeypatch.setattr(loop, "make_trainer", recording)
    monkeypatch.setattr(scenes_module, "_MAX_ATTEMPTS", 2)
    monkeypatch.setattr(loop, "REPORT_EVERY", 4)
    data = {"glyph_size": 10, "max_overlap": 0.0, "min_objects": 3, "max_objects": 3}
    settings = {"training_wheels": 0, "validation_every": 50, "steps": 50}
    config = config_of("quick spair", data=data, **settings)
    run = Run.create(tmp_path / "run", config)
    reached = 0
    with run.lock(), pytest.raises(InputError, match="no layout in 2 attempts"):  # noqa: PT012
        for event in fit(config, run, CPU):
            reached = event.step
    assert reached % 4 == 3
    assert run.latest() is None


@INTERPRETED
def test_scene_without_a_layout_prevents_a_checkpoint() -> None:
    trainer = recording_trainer(config_of("quick spair"))
    make_scenes(trainer)
    assert isinstance(trainer.train, Scenes)
    trainer.save({}, is_best=False)
    trainer.train._unplaced.fill_(True)
    with pytest.raises(InputError, match="no layout"):
        trainer.save({}, is_best=False)


def test_replayed_non_finite_updates_change_no_state(
    records: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = recording_trainer(config_of("quick spair black normal", training_wheels=0))
    for _ in range(5):
        trainer.update()
    assert len(records) == 1
    (_, noise, _), *_ = trainer.tapes[0]._draws
    monkeypatch.setattr(Tape, "wind", lambda *_: noise.fill_(torch.nan))
    before = [value.clone() for value in trainer.model.state_dict().values()]
    trainer.update()
    trainer.update()
    assert int(trainer.skipped) == 2
    for now, value in zip(trainer.model.state_dict().values(), before, strict=True):
        assert torch.equal(now, value)


def test_updates_run_without_a_graph_if_recording_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(update: Callable[[], Losses], *_: Any) -> Callable[[], Losses]:
        trainer: RecordingTrainer = update.__self__  # type: ignore[attr-defined]
        trainer.tapes[0].rewind()
        trainer.tapes[0].take(
            Tensor.normal_, trainer.skipped, 1
        )  # it fails after the first draw of noise
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "_aside", lambda update, device: update())
    monkeypatch.setattr(cuda_graphs, "_record", fail)
    config = config_of("quick spair", training_wheels=0)

    def losses() -> list[float]:
        return trained(recording_trainer(config))[1]

    with pytest.warns(RuntimeWarning, match="could not be recorded as a CUDA graph") as warned:
        found = losses()
    assert len(warned) == 1
    monkeypatch.setattr(update_graph, "UpdateGraph", lambda update, *_: update)
    assert found == losses()
    # scalars in tensors are rounded differently, which grows to 2e-3 in the end
    plain = trained(plain_trainer(config))[1]
    assert found[:5] == pytest.approx(plain[:5], rel=1e-5)
    assert found[5] == pytest.approx(plain[5], rel=2e-4)


def test_failed_recording_of_one_process_ends_that_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or exchanges that are replayed here and made there might not meet."""
    calls: list[str] = []

    def update() -> Losses:
        calls.append("update")
        return Losses(torch.zeros(1), torch.zeros(1), torch.zeros(1))

    class Pair(World):
        def greatest(self, number: int) -> int:
            assert number == 0, "this process succeeds"
            return 1

    monkeypatch.setattr(cuda_graphs, "_aside", lambda update, device: update())
    monkeypatch.setattr(cuda_graphs, "_record", lambda update, *_: calls.clear)
    graph = UpdateGraph(update, CPU, Pair(0, 2))
    for _ in range(cuda_graphs.WARM_UP):
        graph()
    with pytest.warns(RuntimeWarning, match="another process could not record its own"):
        graph()
    graph()
    assert calls == ["update"] * 5
    assert not graph.plays


@pytest.mark.parametrize("kind", ["air", "dair"])
def test_more_steps_than_objects_change_no_losses(kind: str) -> None:
    config = config_of(f"paper {kind}", data={"max_objects": 4})
    model, images = build(config), torch.rand(3, 3, 24, 24)
    counts = torch.tensor([0, 1, 2])

    def losses(steps: int | None) -> list[Tensor]:
        source = torch.Generator().manual_seed(0)
        found: Losses = model(images, counts=counts, generator=source, steps=steps)
        gradients = torch.autograd.grad(found.total.mean(), list(model.parameters()))
        return [found.total.detach(), *gradients]

    torch.testing.assert_close(losses(4), losses(None))


def test_recorded_parts_of_a_batch_draw_the_noise_of_the_whole() -> None:
    config = config_of("quick spair", batch_size=4)
    dataset = open_dataset(config.data, "train")
    drawn = []
    for world in (World(0, 1), World(0, 2), World(1, 2)):
        # weights and gradients are exchanged between processes; noise and images are not
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(World, "average", lambda *_: None)
            patch.setattr(Trainer, "_take_from_first", lambda _: None)
            patch.setattr(cuda_graphs, "_aside", lambda update, device: update())
            trainer = RecordingTrainer(config, None, dataset, CPU, world)
            trainer.update()
            trainer.update()
        drawn.append(([part for _, _, part in trainer.tapes[0]._draws], trainer.places["images"]))
    (whole, images), (first, some), (second, others) = drawn
    assert torch.equal(torch.cat([some, others]), images)
    for one, half, other in zip(whole, first, second, strict=True):
        assert torch.equal(torch.cat([half, other]), one)


def test_tape_draws_equal_those_of_its_source() -> None:
    def draw(source: Any) -> list[Tensor]:
        like = torch.zeros(1)
        return [normal(source, like, 2, 3), uniform(source, like, 4), normal(source, like, 2)]

    tape, seen = Tape(), []
    for seed in (7, 8, 9):
        tape.wind(torch.Generator().manual_seed(seed))
        tape.rewind()
        draw(tape)
        tape.rewind()
        drawn = draw(tape)
        for one, other in zip(drawn, draw(torch.Generator().manual_seed(seed)), strict=True):
            assert torch.equal(one, other)
        seen.append([numbers.data_ptr() for numbers in drawn])
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize(
    ("recipe", "device", "size", "records"),
    [
        ("quick spair", "cuda", 1, True),
        ("quick spair", "cuda", 2, True),
        ("quick spair", "cpu", 1, False),
        ("paper air", "cuda", 1, True),
    ],
)
def test_updates_on_scenes_are_recorded_on_gpus(
    monkeypatch: pytest.MonkeyPatch, recipe: str, device: str, size: int, records: bool
) -> None:
    monkeypatch.setattr(update_graph, "Trainer", lambda *_: "plain")
    monkeypatch.setattr(update_graph, "RecordingTrainer", lambda *_: "recording")
    config, dataset = config_of(recipe), open_dataset(config_of(recipe).data, "train")
    made = make_trainer(config, None, dataset, torch.device(device), World(0, size))
    assert made == ("recording" if records else "plain")  # type: ignore[comparison-overlap]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(
    "recipe", ["quick spair", "paper spair mlp", "quick spair mode normal", "quick air"]
)
def test_updates_replayed_on_a_gpu_equal_unrecorded_ones(
    recipe: str, precision: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda")
    config = config_of(recipe, precision=precision, backend=backend)
    trainer = recording_trainer(config, device)
    assert trainer.makes_scenes
    _, found = trained(trainer)
    assert trainer.graph.plays
    again = recording_trainer(config, device)
    assert trained(again)[1] == found, "bit-identical, beside the graph of another trainer"
    given = recording_trainer(config, device)
    assert isinstance(given.train, Scenes)
    given.train.fused = False
    assert trained(given)[1] == found, "scenes made by plain torch outside the graph"
    tolerance = 1e-2 if precision == "bf16" else 1e-3
    with monkeypatch.context() as patch:
        patch.setattr(cuda_graphs, "WARM_UP", UPDATES)
        unrecorded = trained(recording_trainer(config, device))[1]
    assert found == pytest.approx(unrecorded, rel=tolerance)
    for wheels in (WHEELS, 0):  # so that each of the two graphs is replayed within six updates
        config = config_of(recipe, precision=precision, backend=backend, training_wheels=wheels)
        played = trained(recording_trainer(config, device))[1]
        wanted = trained(plain_trainer(config, device))[1]
        # scalars in tensors are rounded differently, which grows
        assert played[:6] == pytest.approx(wanted[:6], rel=tolerance)
