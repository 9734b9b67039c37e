"""Damaged checkpoints and configs, and pickles under every name, through the whole command."""

import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spairkit.cli.main import main
from spairkit.config import Config, SearchConfig, SPAIRConfig
from spairkit.config_values import to_toml
from spairkit.images import write_png
from spairkit.models.loading import build
from spairkit.presets import resolve
from spairkit.storage.checkpoints import environment, save_checkpoint

_GREATEST_GROWTH = 1 << 20  # KiB
_MOST_SECONDS = 1.0


def run(*words: object) -> int:
    """The exit status of a command in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """With bits flipped, bytes replaced, removed, repeated or inserted, or the end cut off."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 4))):
        at, end = rng.randrange(len(data)), rng.randint(1, 40)
        way = rng.randrange(6)
        if way == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            data[at] = rng.randrange(256)
        elif way == 2:
            del data[at : at + end]
        elif way == 3:
            data[at:at] = data[at : at + end]
        elif way == 4:
            data[at:at] = rng.randbytes(end)
        else:
            del data[at:]
        data = data or bytearray(b"\0")
    return bytes(data)


class Watch:
    """Asserts that commands take little time and memory, and say at most one line."""

    def __init__(self, capfd: pytest.CaptureFixture[str], seconds: float | None) -> None:
        self.capfd, self.seconds = capfd, seconds
        self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def refused(self, *words: object) -> str:
        """The line with which a command is refused; empty if it is not."""
        began = time.process_time()
        status = run(*words)
        took = time.process_time() - began
        printed, said = self.capfd.readouterr()
        assert status in (0, 2), said
        assert self.seconds is None or took < self.seconds, words
        if status == 0:
            return ""
        (line,) = said.splitlines()
        assert line.startswith("spairkit: ")
        assert line.isprintable()
        assert "internal error" not in line
        assert printed == ""
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before
        assert grown < _GREATEST_GROWTH, f"{grown} KiB more"
        return line


def watched(capfd: pytest.CaptureFixture[str], number: int) -> Watch:
    return Watch(capfd, _MOST_SECONDS if number >= 500 else None)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny checkpoint in the current folder, beside an image."""
    monkeypatch.chdir(tmp_path)
    write_png("a.png", torch.zeros(3, 24, 24))
    small: dict[str, Any] = {"features": 4, "hidden": 4, "passthrough": 2, "what": 2}
    layers: dict[str, Any] = {"encoder_hidden": (4,), "decoder_hidden": (4,)}
    config = Config(
        model=SPAIRConfig(backbone_channels=(4,), **small, **layers), search=SearchConfig()
    )
    weights = build(config).state_dict()
    return save_checkpoint(
        Path(),
        step=1,
        config=config,
        model=weights,
        optimiser=weights,
        environment=environment(),
        best=1,
    )


@pytest.mark.parametrize("number", [150, pytest.param(2000, marks=pytest.mark.long)])
@pytest.mark.timeout(3600)
def test_no_damaged_checkpoint_is_accepted(
    model: Path, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    command = ("detect", "a.png", "--checkpoint", model, "--out", "found.json", "--quiet")
    names = ("manifest.json", "model.safetensors")
    whole = {name: (model / name).read_bytes() for name in names}
    assert run(*command) == 0
    Path("found.json").unlink()
    capfd.readouterr()
    watch, rng = watched(capfd, number), random.Random(0)
    for n in range(number):
        name = names[n % 2]
        damaged = mutated(whole[name], rng)
        (model / name).write_bytes(damaged)
        refusal = watch.refused(*command)
        assert bool(refusal) == (damaged != whole[name]), n
        assert not refusal or refusal.startswith(f"spairkit: {model.resolve()}/")
        if refusal:
            assert sorted(os.listdir()) == ["a.png", model.name]
        Path("found.json").unlink(missing_ok=True)
        (model / name).write_bytes(whole[name])


@pytest.mark.parametrize("number", [100, pytest.param(500, marks=pytest.mark.long)])
@pytest.mark.timeout(3600)
def test_mutated_configs_are_shown_or_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    whole, rng = to_toml(resolve("quick")).encode(), random.Random(0)
    run("config", "show")
    capfd.readouterr()
    watch, refused = watched(capfd, number), 0
    for _ in range(number):
        Path("mine.toml").write_bytes(mutated(whole, rng))
        for words in (("config", "show"), ("config", "copy", "new.toml")):
            refusal = watch.refused(*words, "--config", "mine.toml")
            refused += bool(refusal)
            assert os.path.exists("new.toml") == (not refusal and words[1] == "copy")
        Path("new.toml").unlink(missing_ok=True)
    assert 0 < refused < 2 * number


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.marker,)


class Indirect(Payload):
    """The same by a call of `exec`."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (f"import os; os.mkdir({self.marker!r})",)


def pickles(marker: Path) -> Iterator[bytes]:
    """Twenty of them: protocols, wrappings, and archives with one inside."""
    for protocol in range(6):
        yield pickle.dumps(Payload(marker), protocol)
        yield pickle.dumps({"state_dict": [Indirect(marker)]}, protocol)
    plain = pickle.dumps(Payload(marker))
    yield gzip.compress(plain)
    yield zlib.compress(plain)
    for zipped in (True, False):
        data = io.BytesIO()
        torch.save({"model": Payload(marker)}, data, _use_new_zipfile_serialization=zipped)
        yield data.getvalue()
    for saved in ({"images": np.array([Payload(marker)], dtype=object)}, None):
        data = io.BytesIO()
        if saved:
            np.savez(data, **saved)  # type: ignore[arg-type]
        else:
            np.save(data, np.array([Payload(marker)], dtype=object))
        yield data.getvalue()
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", plain)
    yield data.getvalue()
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        entry = tarfile.TarInfo("pickle")
        entry.size = len(plain)
        tar.addfile(entry, io.BytesIO(plain))
    yield data.getvalue()


SUFFIXES = (
    *(".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin", ".joblib", ".safetensors"),
    *(".npz", ".npy", ".png", ".tif", ".json", ".toml", ".gz", ""),
)


@pytest.mark.parametrize("names", [2, pytest.param(len(SUFFIXES), marks=pytest.mark.long)])
def test_no_pickle_is_opened_under_any_name(
    model: Path, capfd: pytest.CaptureFixture[str], names: int
) -> None:
    marker = Path("marker").resolve()
    payloads = list(pickles(marker))
    assert len(payloads) == 20
    pickle.loads(payloads[0])  # noqa: S301
    assert marker.exists(), "they work"
    marker.rmdir()
    Path("folder").mkdir()
    shutil.copy("a.png", "folder/a.png")
    watch = watched(capfd, 0)
    for n, payload in enumerate(payloads):
        for suffix in ((*SUFFIXES, *SUFFIXES)[n % len(SUFFIXES) :])[:names]:
            path = Path(f"it{suffix}")
            path.write_bytes(payload)
            for words in (
                ("eval", "--checkpoint", path),
                ("train", "--data", path, "--out", "run"),
                ("train", "--config", path, "--out", "run"),
                ("viz", path),
            ):
                assert watch.refused(*words), (n, suffix, words)
            path.unlink()
        for place in (model / "model.safetensors", model / "manifest.json"):
            before = place.read_bytes()
            place.write_bytes(payload)
            assert watch.refused("detect", "a.png", "--checkpoint", model)
            place.write_bytes(before)
        Path("folder/annotations.json").write_bytes(payload)
        assert watch.refused("eval", "--data", "folder", "--checkpoint", model)
    assert not marker.exists()
    assert json.dumps(sorted(os.listdir())) == json.dumps(["a.png", "folder", model.name])
