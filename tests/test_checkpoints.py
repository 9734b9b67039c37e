"""Checkpoints: bit-identical round trips; damaged and hostile files give one-line errors."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from spairkit.config import Config, DataConfig
from spairkit.errors import InputError
from spairkit.storage.checkpoints import environment, load_checkpoint, save_checkpoint, sealed
from spairkit.storage.durable import remove_folder, replace_link

CONFIG = Config(preset="quick", data=DataConfig(max_objects=4))


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "encoder.weight": torch.randn(5, 3, generator=generator),
        "encoder.bias": torch.randn(5, generator=generator).half(),
        "nothing": torch.zeros(0, 4),
        "steps": torch.tensor(7),
    }


def save(folder: Path, **changes: Any) -> Path:
    optimiser = {"moments": torch.arange(4.0, dtype=torch.float64), "random": torch.tensor([1, 2])}
    values: dict[str, Any] = {
        "step": 20,
        "config": CONFIG,
        "model": weights(),
        "optimiser": optimiser,
        "metrics": {"ap": 0.5, "elbo": float("-inf")},
        "environment": environment(),
    }
    return save_checkpoint(folder, **(values | changes))


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_bytes(sealed(manifest))


def put_model(folder: Path, data: bytes) -> None:
    """Replaces the model file, with a manifest that matches it."""
    (folder / "model.safetensors").write_bytes(data)
    record = {"size": len(data), "sha256": sha256(data).hexdigest()}
    rewrite_manifest(folder, lambda m: m["files"].update({"model.safetensors": record}))


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_checkpoint(path, with_optimiser=path.is_dir())
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_round_trip_is_bit_identical(tmp_path: Path) -> None:
    path = save(tmp_path)
    assert path == tmp_path / "step-20"
    loaded = load_checkpoint(path, with_optimiser=True)
    assert loaded.step == 20
    assert loaded.config == CONFIG
    assert loaded.metrics == {"ap": 0.5, "elbo": None}
    assert loaded.environment == environment()
    assert loaded.path == path
    assert loaded.model.keys() == weights().keys()
    for name, tensor in weights().items():
        assert loaded.model[name].dtype == tensor.dtype
        assert torch.equal(loaded.model[name], tensor)
    assert loaded.optimiser is not None
    assert torch.equal(
        loaded.optimiser["moments"], torch.tensor([0.0, 1, 2, 3], dtype=torch.float64)
    )


def test_shared_and_strided_tensors_are_saved(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3).requires_grad_()
    loaded = load_checkpoint(
        save(tmp_path, model={"one": shared, "two": shared, "turned": shared.T})
    )
    assert torch.equal(loaded.model["two"], shared)
    assert torch.equal(loaded.model["turned"], shared.T)
    assert not loaded.model["one"].requires_grad


def test_equal_states_give_identical_files(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first, second = save(tmp_path), save(tmp_path / "other")
    for name in ("model.safetensors", "optimiser.safetensors", "manifest.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_checkpoint_loads_from_its_folder_files_link_or_run(tmp_path: Path) -> None:
    path = save(tmp_path)
    (tmp_path / "last").symlink_to(path)
    for name in (path, path / "model.safetensors", path / "manifest.json", tmp_path / "last"):
        assert load_checkpoint(name).path == path
    assert load_checkpoint(tmp_path).path == path, "a run without `best` loads `last`"
    best = save(tmp_path, step=10)
    (tmp_path / "best").symlink_to(best)
    assert load_checkpoint(tmp_path).step == 10


def test_optimiser_state_is_loaded_on_request_only(tmp_path: Path) -> None:
    path = save(tmp_path)
    (path / "optimiser.safetensors").unlink()
    assert load_checkpoint(path).optimiser is None
    assert "optimiser.safetensors: cannot be read: No such file" in refusal(path)
    path = save(tmp_path, optimiser=None)
    assert "cannot be resumed: it has no optimiser state" in refusal(path)


@pytest.mark.parametrize(
    ("part", "value"),
    [("model", float("nan")), ("model", float("-inf")), ("optimiser", float("nan"))],
)
def test_non_finite_tensors_are_not_saved(tmp_path: Path, part: str, value: float) -> None:
    save(tmp_path)
    with pytest.raises(InputError, match=rf"{part}\.safetensors of step 20 .* 'bad' .* diverged"):
        save(tmp_path, **{part: {"good": torch.zeros(2), "bad": torch.tensor([0.0, value])}})
    assert load_checkpoint(tmp_path / "step-20").step == 20, "the previous checkpoint is untouched"


def test_optimiser_state_may_hold_minus_infinity_as_best(tmp_path: Path) -> None:
    path = save(tmp_path, optimiser={"best": torch.tensor([float("-inf"), 0.0])})
    optimiser = load_checkpoint(path, with_optimiser=True).optimiser
    assert optimiser is not None
    assert optimiser["best"].tolist() == [float("-inf"), 0.0]


def test_non_finite_weights_are_not_loaded(tmp_path: Path) -> None:
    path = save(tmp_path)
    put_model(path, safetensors.torch.save({"w": torch.tensor([1.0, float("nan")])}))
    assert refusal(path).endswith("'w' is not finite; use another checkpoint")


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    for name in ("model.safetensors", "manifest.json"):
        whole = (path / name).read_bytes()
        for size in range(0, len(whole), 64):
            (path / name).write_bytes(whole[:size])
            assert name in refusal(path)
        (path / name).write_bytes(whole)
    load_checkpoint(path)


def test_flipped_bits_are_refused(tmp_path: Path) -> None:
    path, rng = save(tmp_path), random.Random(0)
    for name in ("model.safetensors", "optimiser.safetensors", "manifest.json"):
        whole = (path / name).read_bytes()
        for _ in range(200):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            (path / name).write_bytes(damaged)
            assert ("manifest" if name == "manifest.json" else "its sha256 is not") in refusal(path)
        (path / name).write_bytes(whole)
    load_checkpoint(path)


def test_edited_manifests_are_refused(tmp_path: Path) -> None:
    """Every byte is covered, those between the values too."""
    manifest = save(tmp_path) / "manifest.json"
    text = manifest.read_text()
    for edited in (
        text.replace('"max_objects": 4', '"max_objects": 5'),
        text.replace('"best": null', '"best": 20'),
        text.replace("\n  ", "\n\t", 3),
        text + "\n",
        " " + text,
        json.dumps(json.loads(text)),
    ):
        assert edited != text
        manifest.write_text(edited)
        assert "its sha256 is not that of its content" in refusal(manifest.parent)
    manifest.write_text(text)
    load_checkpoint(manifest.parent)


def test_mutated_model_with_valid_hash_loads_or_is_refused(tmp_path: Path) -> None:
    path, rng = save(tmp_path), random.Random(1)
    whole = (path / "model.safetensors").read_bytes()
    for _ in range(300):
        damaged = bytearray(whole)
        # mostly in the header, which the reader parses
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(whole) - 70)] = rng.randrange(256)
        put_model(path, bytes(damaged))
        with suppress(InputError):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.update(format=1),
            "format 1, but this spairkit reads format 2; use the version",
        ),
        (lambda m: m.update(format="2"), "not a spairkit manifest: format"),
        (lambda m: m.pop("step"), "not a spairkit manifest: step: Field required"),
        (lambda m: m.update(step=-1), "step: Input should be greater than or equal to 0"),
        (lambda m: m.update(extra=1), "extra: Extra inputs are not permitted"),
        (lambda m: m["config"]["model"].update(kind="air"), "model.cell: unknown key"),
        (lambda m: m["config"]["train"].update(steps=0), "train.steps"),
        (lambda m: m["config"].update(colour=1), "colour: unknown key"),
        (lambda m: m["files"].pop("model.safetensors"), "lists no model.safetensors"),
        (lambda m: m["files"].update({"../x": m["files"]["model.safetensors"]}), "files.../x"),
        (lambda m: m["files"]["model.safetensors"].update(sha256="0" * 64), "its sha256 is not"),
        (lambda m: m["files"]["model.safetensors"].update(size=10**12), "less than or equal"),
        (lambda m: m["files"]["model.safetensors"].update(size=3), "damaged: "),
    ],
)
def test_wrong_manifests_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = save(tmp_path)
    rewrite_manifest(path, change)
    assert message in refusal(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{",
        "[" * 100_000,
        '{"step": ' + "9" * 5000 + "}",
        "\xff",
        '{"format": NaN}',
    ],
    ids=["empty", "null", "list", "truncated", "nested", "huge number", "not UTF-8", "NaN"],
)
def test_unparsable_manifests_are_refused(tmp_path: Path, text: str) -> None:
    path = save(tmp_path)
    (path / "manifest.json").write_bytes(text.encode("latin-1"))
    assert "manifest.json: not a spairkit manifest" in refusal(path)


def test_oversized_files_are_not_read(tmp_path: Path) -> None:
    path = save(tmp_path)
    with (path / "manifest.json").open("wb") as file:
        file.truncate(10 << 30)
    assert "10737418240 bytes; at most 1048576 are read" in refusal(path)
    path = save(tmp_path)
    with (path / "model.safetensors").open("wb") as file:
        file.truncate(2 << 30)
    assert "2147483648 bytes; at most 1073741824 are read" in refusal(path)


def test_unsupported_dtypes_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    put_model(path, safetensors.torch.save({"w": torch.zeros(2).to(torch.float8_e4m3fn)}))
    assert "'w' has dtype torch.float8_e4m3fn, which is not supported" in refusal(path)


class Payload:
    """Creates the folder `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize(
    "suffix", [".pt", ".pth", ".ckpt", ".pkl", ".PT", ".bin", ".npz", ".joblib"]
)
@pytest.mark.parametrize("zipped", [False, True])
def test_pickles_are_never_opened(tmp_path: Path, suffix: str, zipped: bool) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / f"model{suffix}"
    if zipped:
        torch.save({"w": Payload(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(marker)))
    message = refusal(path)
    assert "never opened" in message
    assert "safetensors" in message
    assert not marker.exists()


def test_pickle_named_as_a_model_is_not_unpickled(tmp_path: Path) -> None:
    path, marker = save(tmp_path), tmp_path / "marker"
    for data in (pickle.dumps(Payload(marker)), pickle.dumps(Payload(marker), protocol=0)):
        put_model(path, data)
        assert "model.safetensors: not safetensors" in refusal(path)
    assert not marker.exists()


def test_special_files_are_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "neither a file nor a folder" in refusal(tmp_path / "fifo")
    assert "neither a file nor a folder" in refusal(Path("/dev/zero"))
    (tmp_path / "loop").symlink_to("loop")
    assert "loop: cannot be read: Too many levels of symbolic links" in refusal(tmp_path / "loop")
    for name in ("model.safetensors", "manifest.json"):
        path = save(tmp_path)
        (path / name).unlink()
        os.mkfifo(path / name)
        assert f"{name}: not a regular file" in refusal(path)
        shutil.rmtree(path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "best").symlink_to("best")
    assert "neither a checkpoint nor a run" in refusal(run)


def test_wrong_paths_are_named_in_the_error(tmp_path: Path) -> None:
    assert "no such checkpoint; create one with `spairkit train`" in refusal(tmp_path / "absent")
    assert "neither a checkpoint nor a run" in refusal(tmp_path)
    (tmp_path / "notes.txt").write_text("notes")
    assert "not a checkpoint; name a run" in refusal(tmp_path / "notes.txt")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "manifest.json: cannot be read: No such file" in refusal(tmp_path / "model.safetensors")


def test_concurrent_reader_sees_complete_checkpoints(tmp_path: Path) -> None:
    def save_step(step: int) -> Path:
        tensors = {name: torch.full((5000,), float(step)) for name in "abc"}
        return save(tmp_path, step=step, model=tensors, optimiser=tensors)

    link = tmp_path / "best"
    replace_link(link, save_step(0).name)

    def replace_many() -> None:
        for step in range(1, 60):
            replace_link(link, save_step(step).name)
            remove_folder(tmp_path / f"step-{step - 1}")

    writer = Thread(target=replace_many)
    writer.start()
    seen = set()
    while writer.is_alive():
        loaded = load_checkpoint(link, with_optimiser=True)
        assert loaded.optimiser is not None
        for tensor in [*loaded.model.values(), *loaded.optimiser.values()]:
            assert torch.equal(tensor, torch.full((5000,), float(loaded.step)))
        seen.add(loaded.step)
    writer.join()
    assert len(seen) > 1
