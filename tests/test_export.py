"""Exported graphs against the model: torch.export in this process, ONNX in onnxruntime."""

import importlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spairkit.config import SPAIRConfig
from spairkit.detector import load
from spairkit.errors import InputError
from spairkit.export import METADATA, OUTPUTS, export, traced
from spairkit.images import as_image, write_png
from spairkit.models import cell_scan
from spairkit.models.spair import SPAIR
from spairkit.preparation import prepare_images

if TYPE_CHECKING:
    from conftest import Ended

Runner = Callable[..., "Ended"]
ROOT = Path(__file__).parent.parent
SIZE = 24, 36
BATCHES = 1, 2, 5, 64  # the padding of the model differs


def eager(network: SPAIR, images: Tensor) -> list[Tensor]:
    """The model as `detect` runs it, with its compiled kernels."""
    latents, _ = network.infer(images)
    return [latents.boxes, latents.presence_logit.sigmoid(), latents.what, latents.depth]


def scenes(batch: int, size: tuple[int, int] = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.rand(batch, 3, *size, generator=generator)


def test_pt2_equals_the_model_in_any_batch(workplace: Path, in_process: Runner) -> None:
    ended = in_process("export", "run", "--size", "24x36")
    assert ended.status == 0
    assert ended.err.splitlines()[-2:] == [
        "wrote model.pt2: images [B, 3, 24, 36] to boxes, scores, embeddings and depths of 6 cells",
        "the graph is the encoder alone, without search, masks and the preparation of images",
    ]
    detector = load("run", device="cpu")
    network = detector.network
    assert isinstance(network, SPAIR)
    texts = {METADATA: ""}
    program = torch.export.load(io.BytesIO(Path("model.pt2").read_bytes()), extra_files=texts)
    facts = json.loads(texts[METADATA])
    assert (facts["rows"], facts["columns"], facts["cell"]) == (2, 3, 12)
    graph = program.module()
    assert len(program.graph.nodes) < 150, "the waves are not written one by one"
    for batch in BATCHES:
        images = scenes(batch)
        for actual, expected in zip(graph(images), eager(network, images), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
            assert expected.std() > 1e-3, "there is something to compare"

    # detect without search and masks finds the same, in the pixels of its file
    prepare = detector.config.prepare
    assert facts["prepare"] == json.loads(json.dumps(asdict(prepare)))
    height, width = (round(side / prepare.scale) for side in SIZE)
    write_png("scene.png", scenes(1, (height, width))[0])
    words = ["--checkpoint", "run", "--search", "off", "--box-contrast", "0", "--threshold", "0"]
    found = json.loads(in_process("detect", "scene.png", *words).out)
    boxes, scores, *_ = graph(prepare_images(as_image("scene.png")[None], prepare))
    assert [item["score"] for item in found] == pytest.approx(scores[0].tolist(), abs=1e-5)
    x1, y1, x2, y2 = (boxes[0] * torch.tensor([width / 36, height / 24] * 2)).T
    sides = torch.stack([x1, y1, x2 - x1, y2 - y1], dim=1).numpy()
    assert np.array([item["bbox"] for item in found]) == pytest.approx(sides, abs=1e-3)

    ended = in_process("export", "run")
    assert ended.status == 2
    assert ended.err == "spairkit: model.pt2 already exists; name a new file with --out\n"
    ended = in_process("export", "run", "--out", "model.xyz")
    assert ended.status == 2
    assert ended.err.startswith("spairkit: --out model.xyz: a graph ends in .pt2 or .onnx; ")
    assert not Path("model.xyz").exists()


@pytest.mark.parametrize(("lateral", "size"), [(True, (96, 60)), (False, (12, 12))])
def test_cells_by_a_scan_are_those_of_the_model(lateral: bool, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = SPAIR(SPAIRConfig(hidden=8, encoder_hidden=(8,), what=5, lateral=lateral)).eval()
    graph = traced(network, size).module()
    for batch in (1, 3):
        images = scenes(batch, size)
        for actual, expected in zip(graph(images), eager(network, images), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_torch_without_a_scan_writes_larger_graphs(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, path = load("run", device="cpu"), Path("model.pt2")
    network = detector.network
    assert isinstance(network, SPAIR)
    small = len(traced(network, SIZE).graph.nodes)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "torch._higher_order_ops", None)
        importlib.reload(cell_scan)
    try:
        with pytest.warns(RuntimeWarning, match="lacks torch._higher_order_ops.scan"):
            export(detector, SIZE, "pt2", path)
    finally:
        importlib.reload(cell_scan)
    assert cell_scan.has_scan
    program = torch.export.load(path)
    assert len(program.graph.nodes) > 2 * small
    images = scenes(3)
    for actual, expected in zip(program.module()(images), eager(network, images), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_onnx_equals_the_model_in_any_batch(workplace: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    detector = load("run", device="cpu")
    assert isinstance(detector.network, SPAIR)
    export(detector, SIZE, "onnx", Path("model.onnx"))
    session = onnxruntime.InferenceSession("model.onnx")
    assert [value.name for value in session.get_inputs()] == ["images"]
    assert [value.name for value in session.get_outputs()] == list(OUTPUTS)
    for batch in BATCHES:
        images = scenes(batch)
        outputs = session.run(None, {"images": images.numpy()})
        for actual, expected in zip(outputs, eager(detector.network, images), strict=True):
            assert np.abs(actual - expected.numpy()).max() < 1e-4
    facts = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    assert facts["outputs"].keys() == set(OUTPUTS)

    # the program of the documentation, which knows nothing of spairkit; Pillow rounds to bytes
    program = (ROOT / "docs" / "export.md").read_text().split("```python\n")[1].split("```")[0]
    assert "import spairkit" not in program
    prepare = detector.config.prepare
    height, width = (round(side / prepare.scale) for side in SIZE)
    write_png("scene.png", scenes(1, (height, width))[0])
    names: dict[str, Any] = {}
    exec(compile(program, "export.md", "exec"), names)
    seen = prepare_images(as_image("scene.png")[None], prepare)
    assert prepare.scale != 1
    assert np.abs(names["images"] - seen.numpy()).max() < 0.02
    boxes, scores, *_ = eager(detector.network, seen)
    assert np.abs(names["scores"] - scores.numpy()).max() < 0.01
    assert np.abs(names["boxes"] - boxes.numpy()).max() < 0.1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--size", "48"], "--size 48: give height and width in pixels, as 48x64"),
        (["--size", "48x11"], "size 48x11: sides must be from 12 (a cell) to 4096 px"),
        (["--size", "12x4097"], "size 12x4097: sides must be from 12 (a cell) to 4096 px"),
        (["--out", "no/model.onnx"], "--out no/model.onnx: there is no folder no"),
    ],
)
def test_user_errors_are_one_line(
    workplace: Path, in_process: Runner, words: list[str], reason: str
) -> None:
    ended = in_process("export", "run", *words)
    assert ended.status == 2
    assert ended.err.startswith(f"spairkit: {reason}")
    assert not list(Path().glob("*.pt2"))


def test_other_models_and_missing_packages_are_one_line(
    workplace: Path, in_process: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train = ["train", "--model", "watershed", "--data", "cells", "--out", "w", "--quiet"]
    assert in_process(*train).status in (0, 3)
    ended = in_process("export", "w")
    assert ended.status == 2
    assert ended.err.endswith("spairkit: watershed cannot be exported; only SPAIR can\n")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr("spairkit.export.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"ONNX needs onnx and onnxscript, .*'.\[onnx\]'"):
        export(load("run", device="cpu"), SIZE, "onnx", tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
