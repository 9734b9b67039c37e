"""Models from seeds and checkpoints: equal models, or an InputError that names the tensor."""

import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import spairkit
from spairkit.config import Config, SPAIRConfig, TrainConfig
from spairkit.errors import InputError
from spairkit.models.loading import build, from_checkpoint
from spairkit.models.spair import SPAIR
from spairkit.storage.checkpoints import environment, load_checkpoint, save_checkpoint
from spairkit.storage.runs import pretrained

SMALL = SPAIRConfig(
    backbone_channels=(4,), features=6, hidden=6, what=3, encoder_hidden=(5,), decoder_hidden=(5,)
)


def spair(config: SPAIRConfig, seed: int = 0) -> SPAIR:
    model = build(Config(model=config, train=TrainConfig(seed=seed)))
    assert isinstance(model, SPAIR)
    return model


def test_seed_sets_the_weights_without_touching_torchs_seed() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second, third = spair(SMALL), spair(SMALL), spair(SMALL, 1)
    assert torch.equal(torch.rand(2), expected)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first.edge, third.edge)


def test_saved_model_gives_the_same_detections(tmp_path: Path) -> None:
    model = spair(SMALL).eval()
    path = save_checkpoint(
        tmp_path,
        step=3,
        config=Config(model=SMALL),
        model=model.state_dict(),
        environment=environment(),
    )
    images = torch.rand(2, 3, 30, 40)
    for source in (path, path / "model.safetensors"):
        loaded = spairkit.load(source, "cpu")
        assert not loaded.network.training
        found, expected = loaded.detect_batch(images, 0.0), model.detect(images, 0.0)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.boxes, theirs.boxes)
            assert torch.equal(ours.scores, theirs.scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edge": None}, "edge is missing"),
        ({"surplus": torch.zeros(2)}, "surplus is unknown"),
        ({"edge": torch.zeros(2)}, r"edge is \(2,\) instead of \(9,\)"),
        ({"edge": torch.zeros(9, dtype=torch.float64)}, "edge is torch.float64 instead of"),
    ],
)
def test_mismatched_tensors_are_named(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    tensors = spair(SMALL).state_dict() | change
    path = save_checkpoint(
        tmp_path,
        step=0,
        config=Config(model=SMALL),
        model={name: tensor for name, tensor in tensors.items() if tensor is not None},
        environment=environment(),
    )
    with pytest.raises(InputError, match=message):
        from_checkpoint(load_checkpoint(path))


def test_sizes_of_a_strangers_config_take_no_memory(tmp_path: Path) -> None:
    huge = replace(SMALL, cell=64, backbone_channels=(2048,) * 8, features=2048, hidden=4096)
    path = save_checkpoint(
        tmp_path,
        step=0,
        config=Config(model=huge),
        model=spair(SMALL).state_dict(),
        environment=environment(),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="its tensors do not fit its config"):
        from_checkpoint(load_checkpoint(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_background_colour_is_saved_with_the_model(tmp_path: Path) -> None:
    config = replace(SMALL, background="mode")
    model = spair(config)
    model.fit_background(torch.tensor([51, 102, 153]).byte()[None, :, None, None] / 255)
    path = save_checkpoint(
        tmp_path,
        step=0,
        config=Config(model=config),
        model=model.state_dict(),
        environment=environment(),
    )
    loaded = spairkit.load(path, "cpu").network
    assert isinstance(loaded, SPAIR)
    assert loaded.background_colour.tolist() == pytest.approx([0.2, 0.4, 0.6])


def test_packaged_model_detects_digits() -> None:
    from spairkit.data.datasets import open_dataset
    from spairkit.evaluation import evaluate

    checkpoint = load_checkpoint(pretrained())
    scenes = open_dataset(checkpoint.config.data, "test")
    batches = (scenes.batch(torch.arange(i, i + 32)) for i in (0, 32))
    figures = evaluate(spairkit.load(), batches).overall
    assert figures.ap > 0.7
    assert figures.count_accuracy > 0.85
