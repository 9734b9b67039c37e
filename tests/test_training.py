"""The training loop: bit-identical resumption, non-finite updates, precision, schedules."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spairkit import presets
from spairkit.config import Config, TrainConfig
from spairkit.config_values import from_dict, merge
from spairkit.data import folder as folder_module
from spairkit.data.datasets import open_dataset, open_splits
from spairkit.data.folder import ImageFolder
from spairkit.data.scenes import Batch
from spairkit.errors import InputError
from spairkit.images import write_png
from spairkit.models import cell_loop, densities
from spairkit.models.elbo import Losses
from spairkit.models.spair import SPAIR
from spairkit.storage import checkpoints, durable
from spairkit.storage.checkpoints import load_checkpoint
from spairkit.storage.runs import Run
from spairkit.training import trainer as trainer_module
from spairkit.training.loop import Step, Validation, fit
from spairkit.training.trainer import (
    _VALIDATE,
    Trainer,
    learning_rate,
    success_at,
    validation_rows,
)

NoSync = Callable[[], AbstractContextManager[object]]

CPU = torch.device("cpu")
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TINY: dict[str, Any] = {
    "data": {"image_height": 24, "image_width": 24, "max_objects": 2, "validation_images": 6},
    "model": {
        "backbone_channels": [4],
        "features": 8,
        "hidden": 8,
        "passthrough": 4,
        "what": 4,
        "encoder_hidden": [8],
        "decoder_hidden": [8],
        "object_size": 6,
    },
    "train": {
        "steps": 8,
        "batch_size": 4,
        "validation_every": 4,
        "training_wheels": 2,
        "learning_rate": 1e-2,
        "threads": 1,
    },
}


def tiny(**train: Any) -> Config:
    return from_dict(merge(TINY, {"train": train}))


def train(
    config: Config, folder: Path, steps: int | None = None, device: torch.device = CPU
) -> Run:
    """Trains in `folder`, or resumes there; stops after `steps` updates of this call."""
    run = Run.open(folder) if folder.exists() else Run.create(folder, config)
    made = 0

    def stop() -> bool:
        return steps is not None and made >= steps

    with run.lock():
        for event in fit(config, run, device, stop):
            made += isinstance(event, Step)
    return run


def weights(run: Run) -> dict[str, Tensor]:
    checkpoint = load_checkpoint(run.path / "last", with_optimiser=True)
    assert checkpoint.optimiser is not None
    return checkpoint.model | checkpoint.optimiser


def assert_same_bits(first: Run, second: Run) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("kind", ["spair", "conncomp"])
def test_levels_train_like_stretched_images(tmp_path: Path, kind: str) -> None:
    """Halved images with white at one half have the bits of the whole ones."""
    models = {"spair": TINY["model"], "conncomp": {"kind": "conncomp", "threshold": "otsu"}}
    pixels = torch.randint(0, 120, (12, 3, 24, 24), generator=torch.Generator().manual_seed(0))
    pixels[:, :, 6:] = torch.tensor([20, 30, 40])[:, None, None]
    runs = []
    for name, factor, white in (("half", 1, 0.5), ("whole", 2, 1.0)):
        folder = tmp_path / name
        folder.mkdir()
        for index, image in enumerate(pixels):
            write_png(folder / f"{index:02}.png", (factor * image).byte())
        data = {"name": "folder", "path": str(folder), "image_height": 24, "image_width": 24}
        config = merge(TINY, {"data": data, "prepare": {"white": white}, "train": {"steps": 4}})
        config["model"] = models[kind] | {"background": "mode"}
        runs.append(train(from_dict(config), tmp_path / f"run-{name}"))
    assert_same_bits(*runs)
    background = load_checkpoint(runs[0].path / "last").model["background_colour"]
    assert (background * 255).round().tolist() == [40, 60, 80]
    ours, theirs = ([r for r in run.metrics() if r["kind"] == "validation"] for run in runs)
    names = ours[-1].keys() & {"elbo", "threshold"}
    assert names
    assert [ours[-1][name] for name in names] == [theirs[-1][name] for name in names]


def test_fit_yields_every_step_and_validation(tmp_path: Path) -> None:
    config = tiny()
    run = Run.create(tmp_path / "run", config)
    with run.lock():
        events = list(fit(config, run, CPU))
    assert [event.step for event in events if isinstance(event, Step)] == list(range(1, 9))
    validations = [event for event in events if isinstance(event, Validation)]
    assert [event.step for event in validations] == [4, 8]
    assert all(event.picture.is_file() for event in validations)
    assert {"elbo", "found", "ap", "ap_spair"} <= validations[0].figures.keys()
    assert 0 <= validations[0].figures["found"] <= 2 * 2, "at most the cells of an image"
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [4, 8]
    best = max(validations, key=lambda event: event.figures["elbo"])
    assert load_checkpoint(run.path / "best").step == best.step


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
@pytest.mark.parametrize("stops", [(1,), (4,), (3, 2)])
def test_resumed_run_is_bit_identical(tmp_path: Path, stops: tuple[int], likelihood: str) -> None:
    config = from_dict(merge(TINY, {"model": {"likelihood": likelihood}}))
    whole = train(config, tmp_path / "whole")
    for steps in stops:
        train(config, tmp_path / "parts", steps)
    parts = train(config, tmp_path / "parts")
    assert_same_bits(whole, parts)
    assert whole.metrics() == parts.metrics()


def folder_config(folder: Path, **prepare: Any) -> Config:
    data = {"name": "folder", "path": str(folder), "image_height": 24, "image_width": 24}
    return from_dict(merge(TINY, {"data": data, "prepare": prepare}))


def images_in(folder: Path, *sizes: tuple[int, int]) -> None:
    folder.mkdir()
    for index, size in enumerate(sizes):
        write_png(folder / f"{index}.png", torch.rand(3, *size))


@pytest.mark.filterwarnings("ignore:skipped 1 of 4")
def test_file_whose_damage_shows_late_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a resumed training is still bit-identical."""
    monkeypatch.setattr(folder_module, "_DECODED_PIXELS", 100)  # as in a large folder
    images_in(tmp_path / "images", *[(30, 40)] * 4)
    path = tmp_path / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:2000])
    config = folder_config(tmp_path / "images")
    with pytest.warns(UserWarning, match=r"skipped 1 of 4: .*2\.png: a damaged image"):
        whole = train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", 3)
    parts = train(config, tmp_path / "parts")
    assert_same_bits(whole, parts)
    assert whole.metrics() == parts.metrics()


def test_validation_of_a_folder_sees_prepared_crops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs no whole image, and prepares none twice."""
    images_in(tmp_path / "images", (90, 120))
    config = folder_config(tmp_path / "images", scale=0.5, black=0.2, white=0.7)
    seen: list[Tensor] = []
    model = SPAIR
    infer = model.infer

    def noted(self: Any, images: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(images)
        return infer(self, images, *args, **options)

    monkeypatch.setattr(model, "infer", noted)
    train(config, tmp_path / "run")
    validation = open_splits(config)[1]
    assert isinstance(validation, ImageFolder)
    crops = validation.crops().images
    assert len(crops) == TINY["data"]["validation_images"]
    assert {tuple(images.shape[1:]) for images in seen} == {(3, 24, 24)}
    assert any(torch.equal(images, crops) for images in seen), "the picture shows them"


def test_stopped_run_is_saved(tmp_path: Path) -> None:
    config = tiny()
    run = Run.create(tmp_path / "run", config)
    asked = iter(range(10**9))
    with run.lock():
        list(fit(config, run, CPU, lambda: next(asked) >= 1))
    assert next(asked) == 2, "once after each update"
    assert load_checkpoint(run.path / "last").step == 2


AIR: dict[str, Any] = {
    "data": {**TINY["data"], "min_objects": 0},
    "model": {
        "units": 8,
        "difference_hidden": [8],
        "output_hidden": 8,
        "what": 4,
        "encoder_hidden": [8],
        "decoder_hidden": [8],
        "object_size": 6,
    },
    "train": TINY["train"],
}


@pytest.mark.parametrize(
    "model",
    [
        {"kind": "air"},
        {"kind": "dair"},
        {"kind": "air", "count": "inferred", "max_objects": 2},
        {"kind": "dair", "count": "inferred", "presence": "exact", "max_objects": 2},
    ],
    ids=lambda model: "-".join(map(str, model.values())),
)
def test_resumed_air_is_bit_identical(tmp_path: Path, model: dict[str, Any]) -> None:
    config = from_dict(merge(AIR, {"model": model}))
    whole = train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", 3)
    parts = train(config, tmp_path / "parts")
    assert_same_bits(whole, parts)
    assert whole.metrics() == parts.metrics()
    validation = next(r for r in whole.metrics() if r["kind"] == "validation")
    if "count" not in model:
        assert validation["count_accuracy"] == 1.0, "the counts are given"


def test_given_counts_need_ground_truth(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    write_png(images / "0.png", torch.rand(3, 30, 30))
    data = {"name": "folder", "path": str(images)}
    config = from_dict(merge(AIR, {"data": data, "model": {"kind": "air"}}))
    with pytest.raises(InputError, match=r"model\.count = 'given' needs the true number"):
        train(config, tmp_path / "run")
    inferred_count = {"kind": "air", "count": "inferred"}
    config = from_dict(merge(AIR, {"data": data, "model": inferred_count}))
    with pytest.raises(InputError, match=r"AIR takes images of one size, here 24x24 px, .* 30x30"):
        train(config, tmp_path / "run 2")
    whole = {**data, "image_height": 30, "image_width": 30}
    train(from_dict(merge(AIR, {"data": whole, "model": inferred_count})), tmp_path / "run 3", 1)


@pytest.mark.parametrize("name", ["checkpoints", "last", "best"])
def test_kill_while_saving_a_validation_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = tiny()
    whole = train(config, tmp_path / "whole")
    place = (checkpoints, "save_checkpoint") if name == "checkpoints" else (durable, "replace_link")
    write = getattr(*place)

    def killed(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == name:
            raise KeyboardInterrupt
        return write(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(*place, killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "cut")
    cut = train(config, tmp_path / "cut", 1)
    if name != "checkpoints":
        assert load_checkpoint(cut.path / "best").step == 4
    train(config, cut.path)
    assert_same_bits(whole, cut)
    assert whole.metrics() == cut.metrics()


def test_resuming_elsewhere_warns_of_the_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny(), tmp_path / "run", 1)
    elsewhere = checkpoints.environment() | {"threads": 64}
    monkeypatch.setattr(trainer_module, "environment", lambda: elsewhere)
    with pytest.warns(UserWarning, match="not be bit-identical: threads was 1 and is 64"):
        train(tiny(), tmp_path / "run", 1)


def test_seed_changes_the_trained_weights(tmp_path: Path) -> None:
    runs = [train(tiny(seed=seed), tmp_path / str(seed)) for seed in (0, 1)]
    first, second = (weights(run)["edge"] for run in runs)
    assert not torch.equal(first, second)


def test_seed_changes_scenes_and_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Tensor, Tensor]] = []
    forward = SPAIR.forward

    def noted(self: SPAIR, images: Tensor, **kwargs: Any) -> Losses:
        if self.training:
            state = kwargs["generator"].get_state()
            drawn.append((images.clone(), torch.rand(4, generator=kwargs["generator"])))
            kwargs["generator"].set_state(state)
        return forward(self, images, **kwargs)

    monkeypatch.setattr(SPAIR, "forward", noted)
    for seed in (0, 1):
        train(tiny(seed=seed, steps=2), tmp_path / str(seed))
    for one in range(4):
        for other in range(one):
            assert not torch.equal(drawn[one][0], drawn[other][0])
            assert not torch.equal(drawn[one][1], drawn[other][1])


KILLED_THREE_TIMES = """
import os, random, signal, sys, time, torch, torch._dynamo
from pathlib import Path
from spairkit.kernels import cells_op, presence_cpu, render_cpu
from spairkit.storage.runs import Run
from spairkit.training.loop import fit
draw = random.Random(0)
for _ in range(3):
    steps, to_parent = os.pipe()
    child = os.fork()
    if child == 0:
        run = Run.open(Path(sys.argv[1]))
        with run.lock():
            for event in fit(run.config, run, torch.device("cpu")):
                os.write(to_parent, b".")
        os._exit(0)
    os.close(to_parent)
    assert os.read(steps, 1), "it never trained"
    time.sleep(draw.uniform(0, 0.3))  # it trains: kill it at a random moment
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(steps)
    latest = Run.open(Path(sys.argv[1])).latest()
    print(latest.step if latest is not None else 0)
"""


@pytest.mark.slow
def test_killed_and_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    """Kills come at random moments of training; forks share one import of torch."""
    config = tiny(steps=30, validation_every=3)
    whole = train(config, tmp_path / "whole")
    killed = Run.create(tmp_path / "killed", config)
    words = [sys.executable, "-c", KILLED_THREE_TIMES, str(killed.path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reached = [int(line) for line in done.stdout.split()]
    assert len(reached) == 3
    assert reached == sorted(reached), "a kill must not lose a checkpoint"
    finished = train(config, killed.path)
    assert_same_bits(whole, finished)
    assert whole.metrics() == finished.metrics()


def break_losses(monkeypatch: pytest.MonkeyPatch, broken: set[int]) -> None:
    """Makes the losses NaN in the calls numbered `broken`, from 0."""
    forward = SPAIR.forward
    calls = iter(range(10**9))

    def poisoned(self: SPAIR, images: Tensor, **kwargs: Any) -> Losses:
        losses = forward(self, images, **kwargs)
        if self.training and next(calls) in broken:
            return replace(losses, reconstruction=losses.reconstruction * float("nan"))
        return losses

    monkeypatch.setattr(SPAIR, "forward", poisoned)


def test_non_finite_steps_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_losses(monkeypatch, {2, 5})
    run = train(tiny(), tmp_path / "run")
    state = weights(run)
    assert all(bool(tensor.isfinite().all()) for name, tensor in state.items())
    assert float(state["step:decoder.0.bias"]) == 6


def test_terms_of_a_skipped_update_are_not_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_losses(monkeypatch, {19})
    run = train(tiny(steps=40, validation_every=40), tmp_path / "run")
    assert [record["step"] for record in run.metrics() if record["kind"] == "step"] == [40]


def test_validation_elbo_is_the_mean_over_batches_with_fixed_noise(tmp_path: Path) -> None:
    config = tiny()
    trainer = Trainer(config, None, open_dataset(config.data, "train", CPU), CPU)
    dataset = open_dataset(config.data, "validation")
    elbos = []
    for index, rows in enumerate((torch.arange(4), torch.arange(4, 6))):
        with torch.no_grad():
            noise = trainer._generator(_VALIDATE, index)
            elbos += trainer.model(dataset.batch(rows).images, generator=noise).elbo.tolist()
    assert trainer._mean_elbo(dataset)["elbo"] == pytest.approx(sum(elbos) / 6, rel=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        TINY["model"],
        {"kind": "air", "count": "inferred", "presence": "concrete"},
        {"kind": "dair", "count": "given"},
    ],
)
def test_validation_figures_do_not_depend_on_the_size_of_batches(
    model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU computes several batches together, of which the last has fewer images."""
    config = from_dict(TINY | {"model": model, "data": TINY["data"] | {"validation_images": 11}})
    train, validation = open_splits(config)
    trainer = Trainer(config, None, train, CPU)
    assert validation_rows(config, CPU) == 4
    assert validation_rows(config, torch.device("cuda")) == 4 * (2**21 // (4 * 24 * 24))
    found = []
    for rows in (4, 8, 12, 40):
        monkeypatch.setattr(trainer_module, "validation_rows", lambda *_, rows=rows: rows)
        found.append(trainer._mean_elbo(validation))
    for figures in found[1:]:
        assert figures == pytest.approx(found[0], rel=1e-6)


def test_non_finite_updates_change_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments and Adam's step counts stay the same."""
    break_losses(monkeypatch, {2, 3})
    run = Run.create(tmp_path / "run", tiny())
    states = []
    with run.lock():
        trainer = Trainer(run.config, run, open_dataset(run.config.data, "train", CPU), CPU)
        for _ in range(5):
            trainer.update()
            trainer.save({}, is_best=False)
            states.append((int(trainer.skipped), weights(run)))
    assert [skipped for skipped, _ in states] == [0, 0, 1, 2, 0]
    before, first, second, after = (state for _, state in states[1:])
    for name, tensor in before.items():
        assert torch.equal(first[name], tensor)
        assert torch.equal(second[name], tensor)
    assert not torch.equal(after["decoder.0.bias"], before["decoder.0.bias"])


@pytest.mark.parametrize("in_a_row", [10, 11])
def test_ten_non_finite_updates_in_a_row_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_a_row: int
) -> None:
    break_losses(monkeypatch, set(range(16 - in_a_row, 99)))
    message = f"not finite in {in_a_row} updates in a row, up to step 16"
    with pytest.raises(InputError, match=message):
        train(tiny(steps=40), tmp_path / "run")
    checkpoint = load_checkpoint(tmp_path / "run" / "last")
    assert checkpoint.step == 12
    assert all(bool(t.isfinite().all()) for t in checkpoint.model.values())


class OneBatch:
    """A dataset of one batch, which is already on the device."""

    has_truth = False

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def batch(self, indices: Tensor) -> Batch:
        none = torch.zeros(len(indices), 0)
        return Batch(self.images, none, none, none)


@pytest.mark.parametrize("wheels", [True, False])
@pytest.mark.parametrize(
    "recipe", ["quick spair", "quick spair normal", "quick air", "quick dair", "paper spair"]
)
def test_update_does_not_synchronise_with_the_device(
    tmp_path: Path,
    no_sync: NoSync,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    wheels: bool,
) -> None:
    """Presets except AIR with given counts, whose number of steps depends on the counts."""
    preset, kind, *likelihood = recipe.split()
    model = {"kind": kind} | ({"likelihood": likelihood[0]} if likelihood else {})
    for module in (cell_loop, densities):  # the code path of a GPU, without CPU kernels
        monkeypatch.setattr(module, "compiled_backend", lambda *_: "torch")
    loop = {"batch_size": 2, "training_wheels": 9 if wheels else 0, "threads": 1}
    config = presets.resolve(preset, {"model": model, "train": loop})
    run = Run.create(tmp_path / "run", config)
    data: Any = OneBatch(torch.rand(2, 3, config.data.image_height, config.data.image_width))
    trainer = Trainer(config, run, data, CPU)
    trainer.update()  # creates state that later updates reuse
    with no_sync():
        trainer.update()
        assert trainer.step == 2


def test_no_sync_detects_synchronising_operations(no_sync: NoSync) -> None:
    for wait in (bool, float, torch.nonzero, lambda x: x[x > 0], lambda x: x.new_tensor([1.0])):
        with no_sync(), pytest.raises(AssertionError):
            wait(torch.ones(1))


@pytest.mark.parametrize("kind", ["spair", "air"])
@pytest.mark.parametrize("low", ["bf16", pytest.param("tf32", marks=GPU)])
def test_low_precision_trains_to_nearly_the_same_losses(
    tmp_path: Path, device: torch.device, kind: str, low: str
) -> None:
    shared = {key: TINY["model"][key] for key in ("what", "encoder_hidden", "decoder_hidden")}
    model = TINY["model"] if kind == "spair" else {"kind": "air", "count": "inferred", **shared}
    means = {}
    for precision in ("float32", low):
        loop = TINY["train"] | {"steps": 20, "validation_every": 20, "precision": precision}
        loop["learning_rate"] = 1e-4  # a higher rate would amplify rounding
        config = from_dict({"data": TINY["data"], "model": model, "train": loop})
        run = train(config, tmp_path / precision, device=device)
        state = load_checkpoint(run.path / "last").model
        assert {value.dtype for value in state.values()} == {torch.float32}
        [means[precision]] = [record for record in run.metrics() if record["kind"] == "step"]
        assert Run.open(run.path).config.train.precision == precision
    exact, rough = means["float32"], means[low]
    assert rough["elbo"] != exact["elbo"]
    assert rough["elbo"] == pytest.approx(exact["elbo"], rel=0.05)


def test_tf32_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.precision = 'tf32' needs an NVIDIA GPU"):
        train(tiny(precision="tf32"), tmp_path / "run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the backend")
def test_triton_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.backend: .* needs the model on a GPU"):
        train(tiny(backend="triton"), tmp_path / "run")


def test_ap_selects_the_best_and_patience_ends_training(tmp_path: Path) -> None:
    config = tiny(steps=400, validation_every=2, patience=4, select="ap", learning_rate=1e-6)
    run = train(config, tmp_path / "run")
    validations = [r for r in run.metrics() if r["kind"] == "validation"]
    scores = [r["ap_spair"] for r in validations]
    assert validations[-1]["step"] < 400
    assert load_checkpoint(run.path / "best").step == validations[scores.index(max(scores))]["step"]


def test_selection_by_ap_needs_ground_truth(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    write_png(images / "0.png", torch.rand(3, 30, 30))
    data = {"name": "folder", "path": str(images)}
    config = from_dict(merge(TINY, {"data": data, "train": {"select": "ap"}}))
    with pytest.raises(InputError, match=r"train\.select = 'ap' needs ground truth"):
        train(config, tmp_path / "run")


def gradients_of_first_update(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: float
) -> Tensor:
    """The gradients passed to Adam, of all parameters in one vector."""
    given: list[Tensor] = []

    def note(self: torch.optim.Adam) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in parameters if p.grad is not None]
        given.append(torch.cat([grad.flatten() for grad in grads]))

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", note)
        config = tiny(steps=1, validation_every=2, training_wheels=0, **settings)
        run = Run.create(folder, config)
        with run.lock():
            next(fit(config, run, CPU))
    return given[0]


def test_gradients_are_clipped_before_noise_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(name: str, **settings: float) -> Tensor:
        return gradients_of_first_update(tmp_path / name, monkeypatch, **settings)

    plain = gradients("plain", clip_norm=0.0, gradient_noise=0.0)
    assert float(plain.norm()) > 0.1
    clipped = gradients("clipped", clip_norm=0.1, gradient_noise=0.0)
    torch.testing.assert_close(clipped, 0.1 * plain / plain.norm())
    noise = gradients("noisy", clip_norm=0.1, gradient_noise=0.5) - clipped
    assert float(noise.abs().max()) <= 2 * 0.5 + 1e-6, "truncated at two standard deviations"
    assert float(noise.abs().max()) > 1.8 * 0.5
    # the standard deviation of a standard normal between -2 and 2
    assert float(noise.std()) == pytest.approx(0.5 * 0.8796, rel=0.03)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.02)


def test_mode_background_is_the_commonest_colour(tmp_path: Path) -> None:
    config = from_dict(
        merge(TINY, {"model": {"background": "mode"}, "train": {"steps": 1, "validation_every": 1}})
    )
    run = train(config, tmp_path / "run")
    assert weights(run)["background_colour"].tolist() == [0.0, 0.0, 0.0]


def test_noise_starts_at_the_deviation_of_prepared_images() -> None:
    given = {"model": {"likelihood": "normal"}, "prepare": {"white": 0.5}}
    config = from_dict(merge(TINY, given))
    dataset = open_dataset(config.data, "train", CPU)
    trainer = Trainer(config, None, dataset, CPU)
    images = (2 * dataset.batch(torch.arange(256)).images).clamp(max=1)
    assert float(trainer.model.state_dict()["noise_std"]) == pytest.approx(
        float(images.std(correction=0)), rel=1e-6
    )


def test_learning_rate_is_linear() -> None:
    settings = TrainConfig(steps=100, learning_rate=1e-2, learning_rate_end=1e-3)
    assert [learning_rate(settings, t) for t in (0, 50, 100)] == pytest.approx([1e-2, 5.5e-3, 1e-3])


def test_paper_preset_anneals_the_count_prior() -> None:
    assert success_at(Config(), 0) == pytest.approx(1e-6, rel=1e-3)
    assert success_at(Config(), 10**6) == pytest.approx(0.98765, rel=1e-5)


def test_gradient_noise_falls_tenfold_in_each_decay() -> None:
    config = tiny(gradient_noise=0.5, gradient_noise_decay=40.0)
    trainer = Trainer(config, None, open_dataset(config.data, "train", CPU), CPU)
    scales = [trainer._inputs(step).gradient_scale for step in (0, 40, 80)]
    assert scales == pytest.approx([0.5, 0.05, 0.005])


def test_small_gradients_are_not_scaled_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, unclipped = (
        gradients_of_first_update(
            tmp_path / str(norm), monkeypatch, clip_norm=norm, gradient_noise=0.0
        )
        for norm in (0.0, 1e6)
    )
    assert torch.equal(plain, unclipped)


def test_training_stops_as_soon_as_patience_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # best at the first
    monkeypatch.setattr(Trainer, "_mean_elbo", lambda self, _: {"elbo": -float(self.step)})
    run = train(tiny(steps=400, validation_every=2, patience=4), tmp_path / "run")
    assert load_checkpoint(run.path / "best").step == 2
    assert [r["step"] for r in run.metrics() if r["kind"] == "validation"] == [2, 4, 6]


def test_resuming_a_run_that_patience_ended_trains_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_mean_elbo", lambda self, _: {"elbo": -float(self.step)})
    config = tiny(steps=400, validation_every=2, patience=4)
    run = train(config, tmp_path / "run")
    before = run.metrics()
    assert train(config, tmp_path / "run").metrics() == before
    assert load_checkpoint(run.path / "last").step == 6


def test_fit_restores_the_number_of_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(tiny(steps=1, threads=1), tmp_path / "run")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
