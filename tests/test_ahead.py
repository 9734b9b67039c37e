"""Batches that a thread makes ahead against plain calls."""

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spairkit.config_values import from_dict
from spairkit.data import folder as folder_module
from spairkit.data.crops import ImagesOnDevice
from spairkit.data.datasets import open_dataset
from spairkit.data.scenes import Batch
from spairkit.errors import InputError
from spairkit.images import write_png
from spairkit.training.ahead import Ahead
from spairkit.training.trainer import Trainer

CPU = torch.device("cpu")
INTERRUPTED = """
import threading, time
import torch
from spairkit.training.ahead import Ahead

started = threading.Event()

def make(step):
    if step == 1:
        started.set()
        time.sleep(0.5)
    return step

ahead = Ahead(make, 10)
ahead(0)
started.wait()
raise KeyboardInterrupt
"""


def batch(step: int) -> Batch:
    zeros = torch.zeros(1, 0)
    return Batch(torch.full((1, 3, 2, 2), float(step)), zeros, zeros, torch.tensor([step]), None)


def workers() -> list[threading.Thread]:
    gc.collect()
    found = [t for t in threading.enumerate() if t.name.startswith("spairkit-batch")]
    for thread in found:
        thread.join(0.2)
    return [thread for thread in found if thread.is_alive()]


def test_every_step_is_made_once_in_order_and_no_step_after_the_last() -> None:
    made: list[int] = []

    def make(step: int) -> Batch:
        made.append(step)
        return batch(step)

    before = len(workers())
    ahead = Ahead(make, 5)
    assert [int(ahead(step).counts) for step in range(5)] == [0, 1, 2, 3, 4]
    assert made == [0, 1, 2, 3, 4]
    del ahead
    assert len(workers()) == before


def test_any_step_can_follow() -> None:
    ahead = Ahead(batch, 100)
    assert [int(ahead(step).counts) for step in (7, 8, 3, 4, 4, 50)] == [7, 8, 3, 4, 4, 50]


def test_errors_are_raised_for_their_own_step() -> None:
    def make(step: int) -> Batch:
        if step == 2:
            raise InputError(f"no batch {step}")
        return batch(step)

    ahead = Ahead(make, 10)
    for step in (0, 1):
        ahead(step)
    with pytest.raises(InputError, match="no batch 2"):
        ahead(2)
    assert int(ahead(3).counts) == 3


def test_interrupted_process_ends() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60
    )
    assert ended.stderr.endswith("KeyboardInterrupt\n")


@pytest.mark.parametrize("held", [False, True], ids=["cut by the thread", "cut by the device"])
def test_training_with_batches_made_ahead_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    if held:
        monkeypatch.setattr(folder_module, "images_on_device", ImagesOnDevice)
    for index in range(3):
        random = torch.Generator().manual_seed(index)
        write_png(tmp_path / f"{index}.png", torch.rand(3, 40, 50, generator=random))
    data = {"name": "folder", "path": str(tmp_path), "image_height": 24, "image_width": 24}
    small = {"backbone_channels": [4], "features": 8, "hidden": 8, "passthrough": 4, "what": 4}
    small |= {"encoder_hidden": [8], "decoder_hidden": [8], "object_size": 6}
    train = {"batch_size": 4, "steps": 6, "training_wheels": 2, "threads": 1}
    config = from_dict({"data": data, "model": small, "train": train})

    def weights(looks_ahead: bool) -> list[Tensor]:
        trainer = Trainer(config, None, open_dataset(config.data, "train"), CPU)
        if looks_ahead:
            trainer._look_ahead()
        for _ in range(6):
            trainer.update()
        return list(trainer.model.state_dict().values())

    assert all(map(torch.equal, weights(True), weights(False)))
