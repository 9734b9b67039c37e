"""Two processes that share each batch against a single one; killed and stopped jobs."""

import gc
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spairkit import cuda_graphs, presets
from spairkit.cli.main import main
from spairkit.config_values import from_dict
from spairkit.errors import InputError
from spairkit.images import write_png
from spairkit.models.elbo import Losses
from spairkit.models.loading import build
from spairkit.models.noise import Part, Source, normal, uniform
from spairkit.storage.checkpoints import load_checkpoint
from spairkit.storage.runs import Run
from spairkit.training import loop
from spairkit.training.distributed import World, joined
from spairkit.training.loop import check
from spairkit.training.update_graph import RecordingTrainer

CPU = torch.device("cpu")
TINY = """\
[data]
image_height = 24
image_width = 28
max_objects = 2
validation_images = 6
test_images = 4

[model]
backbone_channels = [4]
features = 8
hidden = 8
passthrough = 4
what = 4
encoder_hidden = [8]
decoder_hidden = [8]
background = "mlp"
likelihood = "normal"

[train]
batch_size = 4
steps = 20
validation_every = 10
training_wheels = 6
gradient_noise = 0.01
learning_rate = 1e-3
threads = 1
"""
TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
FAR = ["--device", "cpu", "--steps", "1000000", "--set", "train.validation_every=10", "--quiet"]


def job(*words: object) -> subprocess.Popen[str]:
    """Starts `spairkit train` in two processes on this machine."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "spairkit", "train", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def step_of(run: Path) -> int:
    return int(os.readlink(run / "last").rpartition("-")[2]) if (run / "last").is_symlink() else 0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.mark.parametrize("draw", [normal, uniform])
def test_noise_of_parts_equals_rows_of_the_whole(draw: Callable[..., torch.Tensor]) -> None:
    like = torch.zeros(1)
    whole = draw(torch.Generator().manual_seed(5), like, 6, 3, 2)
    parts = [draw(Part(torch.Generator().manual_seed(5), i, 3), like, 2, 3, 2) for i in range(3)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    "kind",
    [
        {"kind": "spair", "background": "mlp"},
        {"kind": "air", "count": "inferred", "presence": "concrete"},
        {"kind": "dair", "count": "inferred", "presence": "exact"},
        {"kind": "dair", "count": "given"},
    ],
)
def test_losses_of_parts_equal_rows_of_the_whole(kind: dict[str, Any]) -> None:
    small = {"what": 3, "encoder_hidden": [5], "decoder_hidden": [5], "object_size": 5}
    data = {"image_height": 24, "image_width": 24}
    model = build(from_dict({"data": data, "model": small | kind}))
    images, counts = torch.rand(4, 3, 24, 24), torch.tensor([1, 0, 1, 3])

    def losses(rows: slice, source: Source) -> torch.Tensor:
        given = {} if kind["kind"] == "spair" else {"counts": counts[rows]}
        found: Losses = model(images[rows], generator=source, **given)
        return found.total.detach()

    seeded = torch.Generator().manual_seed
    whole = losses(slice(0, 4), seeded(2))
    parts = [losses(slice(2 * i, 2 * i + 2), Part(seeded(2), i, 2)) for i in range(2)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_single_process_gets_its_own_values_back() -> None:
    alone = World()
    assert alone.greatest(7) == 7
    assert alone.from_first(b"abc") == b"abc"
    assert alone.from_first(b"") == b""
    assert torch.equal(alone.mean(torch.tensor([1.0, 3.0])), torch.tensor([1.0, 3.0]))
    tensor = torch.tensor([1.0, 3.0])
    alone.average([tensor])
    assert tensor.tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("error", "of_the_group"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), True),
        # of torch 2.13, as seen when the other process was killed, ended, or was too late
        (
            RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [::1]"),
            True,
        ),
        (RuntimeError("Application timeout caused pair closure"), True),
    ],
)
def test_only_errors_of_the_group_are_those_of_another_process(
    error: RuntimeError, of_the_group: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_reduce(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    with pytest.raises(InputError if of_the_group else type(error)) as raised:
        World(0, 2).average([torch.zeros(3)])
    assert ("another process" in str(raised.value)) is of_the_group


EXCHANGES = """
import os, signal
import torch
from spairkit.errors import InputError
from spairkit.training.distributed import joined

def say(text):
    os.write(1, f"{text}\\n".encode())  # one write, so that lines of two processes do not mix

with joined(torch.device("cpu")) as (world, device):
    values = [torch.full((2, 3), world.rank), torch.full((), 3.0 * world.rank)]
    values = [value.float() for value in values]
    world.average(values)
    say(f"{values[0].tolist()} {values[1].tolist()}")
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    for exchange in (lambda: world.average(values), lambda: world.greatest(1)):
        try:
            exchange()
        except InputError as error:
            say(str(error))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_process_ends_every_exchange_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "exchanges.py").write_text(EXCHANGES)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "exchanges.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.stdout.count("[[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]] 1.5") == 2, ended.stderr
    assert ended.stdout.count("another process of this training has ended") == 2, ended.stderr


def test_trainers_are_gone_before_their_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL waits for the graphs that recorded its exchanges, without end."""
    trainers: list[weakref.ref[RecordingTrainer]] = []

    def make(*given: Any) -> RecordingTrainer:
        trainer = RecordingTrainer(*given)
        trainers.append(weakref.ref(trainer))
        return trainer

    def destroy() -> None:
        assert [trainer() for trainer in trainers] == [None]

    monkeypatch.setattr(loop, "make_trainer", make)
    monkeypatch.setattr(cuda_graphs, "_aside", lambda update, device: update())
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name, result in {"init_process_group": None, "get_rank": 0, "get_world_size": 1}.items():
        monkeypatch.setattr(torch.distributed, name, lambda *_, result=result, **__: result)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", destroy)
    settings = presets.resolve("quick", tomllib.loads(TINY), {"train": {"steps": 2}})
    gc.disable()
    try:
        with joined(CPU) as (world, device):
            steps = [event.step for event in loop.fit(settings, None, device, world=world)]
    finally:
        gc.enable()
    assert steps == [1, 2]


def test_indivisible_batch_is_refused() -> None:
    config = from_dict({"train": {"batch_size": 6}})
    check(config, CPU, 3)
    with pytest.raises(InputError, match=r"train\.batch_size \(6\) must be a multiple of .* \(4\)"):
        check(config, CPU, 4)
    alone = from_dict({"model": {"kind": "conncomp"}})
    check(alone, CPU, 1)
    with pytest.raises(InputError, match="fitted by one process"):
        check(alone, CPU, 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def test_two_processes_train_like_one(tmp_path: Path, config: Path, device: str) -> None:
    words = ["--config", str(config), "--device", device]
    with job(*words, "--out", tmp_path / "two") as process:
        printed, said = process.communicate(timeout=280)
    assert process.returncode == 0, said
    assert printed.count("run: ") == 1, "only one process prints"
    assert said.count("training in ") == 1
    assert "by 2 processes" in said
    assert said.count("arning") == said.count("warning: no object was found in any image") <= 1
    with pytest.raises(SystemExit) as ended:
        main(["train", *words, "--out", str(tmp_path / "one"), "--quiet"])
    assert ended.value.code == 0

    one, two = (Run.open(tmp_path / name) for name in ("one", "two"))
    assert [record["kind"] for record in one.metrics()] == ["validation", "step", "validation"]
    for ours, theirs in zip(one.metrics(), two.metrics(), strict=True):
        assert ours.pop("kind") == theirs.pop("kind")
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    alone, shared = (load_checkpoint(r.path / "last", with_optimiser=True) for r in (one, two))
    assert (alone.environment["processes"], shared.environment["processes"]) == (1, 2)
    torch.testing.assert_close(shared.model, alone.model, rtol=1e-3, atol=1e-5)
    assert alone.optimiser is not None
    assert shared.optimiser is not None
    assert shared.optimiser.keys() == alone.optimiser.keys()
    steps = {k: float(v) for k, v in alone.optimiser.items() if k.startswith("step:")}
    assert set(steps.values()) == {14.0, 20.0}, "with and without training wheels"
    assert steps == {k: float(shared.optimiser[k]) for k in steps}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_errors_are_printed_once(tmp_path: Path, config: Path) -> None:
    odd = ("--device", "cpu", "--set", "train.batch_size=5")
    with job("--config", config, "--out", tmp_path / "odd", *odd) as process:
        printed, said = process.communicate(timeout=280)
    assert process.returncode != 0
    assert printed == ""
    assert said.count("spairkit: ") == 1
    assert "spairkit: train.batch_size (5) must be a multiple of the number of processes" in said
    assert not (tmp_path / "odd").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default:.*not be bit-identical")
def test_killed_and_stopped_jobs_can_be_resumed(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with job("--config", config, "--out", run, *FAR) as process:
        wait(process, lambda: step_of(run) > 0)
        first = re.match(r"process (\d+) on", (run / ".owner").read_text())
        assert first is not None
        os.kill(int(first[1]), signal.SIGKILL)
        _, said = process.communicate(timeout=280)  # the surviving process does not wait for ever
    assert process.returncode != 0
    assert "internal error" not in said
    killed = step_of(run)

    with job("--resume", run, "--device", "cpu") as process:
        wait(process, lambda: step_of(run) > killed)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=280)
    stopped = step_of(run)
    assert f"stopped after step {stopped}, checkpoint saved" in said
    assert said.count("saving; press Ctrl-C again to quit now") == 1
    assert "spairkit: " not in said

    with pytest.raises(SystemExit) as ended:
        main(["train", "--resume", str(run), "--device", "cpu", "--minutes", "0", "--quiet"])
    assert ended.value.code == 0
    said = capsys.readouterr().err
    assert "not be bit-identical: processes was 2 and is 1" in said
    assert f"ended after step {stopped + 1} of 1000000" in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_start_again_together(tmp_path: Path, config: Path) -> None:
    """Every cell is on, and stays on: the training starts again at its first judged validation."""
    image = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    write_png(tmp_path / "images.png", image)
    settings = ["presence_bias=9.0", "least_noise=0.1", "odds_start=1.0", "likelihood=normal"]
    words = [word for setting in settings for word in ("--set", f"model.{setting}")]
    words += ["--set", "prepare.background=none"]  # or this could be changed first
    train = ["steps=406", "validation_every=203", "training_wheels=0", "learning_rate=1e-6"]
    words += [word for setting in train for word in ("--set", f"train.{setting}")]
    words += ["--data", str(tmp_path / "images.png"), "--device", "cpu"]
    with job("--config", config, *words, "--out", tmp_path / "run") as process:
        _, said = process.communicate(timeout=280)
    assert process.returncode == 0 or "this training failed" in said, said
    assert said.count("; starting again with ") == 1
    assert "step 203: 100% of cells are on; starting again with train.seed = 1" in said
    run = Run.open(tmp_path / "run")
    assert run.config.train.seed == 1
    assert [r["step"] for r in run.metrics() if r["kind"] == "validation"] == [203, 406]
    assert load_checkpoint(run.path / "last").config == run.config
