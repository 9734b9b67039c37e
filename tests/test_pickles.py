"""Malicious pickles under every suffix, wherever a command takes a file: none is opened.

Most payloads would make a folder, the marker, if anything unpickled them; `test_payloads_are_live`
proves that. Every command refuses each with one line.
"""

import bz2
import gzip
import io
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

SUFFIXES = [".pt", ".safetensors"]
FURTHER = [
    ".npz", ".pth", ".ckpt", ".pkl", ".pickle", ".bin", ".joblib", ".npy", ".PT", ".json", ".toml",
    ".zip", ".png", "",
]  # fmt: skip


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def text_pickle(module: str, name: str, argument: str) -> bytes:
    """Protocol 0, written by hand: a call of `module.name`, which need not be importable here."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def of_zip(files: dict[str, bytes], flags: int = 0) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    whole = bytearray(data.getvalue())
    if flags:  # as archives whose entries claim to be encrypted, which scanners pass over
        for at in [i for i in range(len(whole)) if whole[i : i + 4] == b"PK\x01\x02"]:
            whole[at + 8] |= flags
    return bytes(whole)


def of_tar(name: str, content: bytes) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return data.getvalue()


def of_torch(value: Any, zipped: bool) -> bytes:
    data = io.BytesIO()
    torch.save(value, data, _use_new_zipfile_serialization=zipped)
    return data.getvalue()


def of_numpy(save_arrays: Callable[..., None], value: Any) -> bytes:
    data = io.BytesIO()
    save_arrays(data, np.array([value, None], dtype=object))
    return data.getvalue()


def payloads(marker: Path) -> dict[str, bytes]:
    """Twenty files, by what they are."""
    code = f"import os; os.mkdir({str(marker)!r})"
    mkdir = Call(Path.mkdir, marker)
    plain = pickle.dumps(mkdir)
    return {
        **{f"protocol {n}": pickle.dumps(mkdir, protocol=n) for n in range(6)},
        "exec": text_pickle("builtins", "exec", code),
        "eval": text_pickle("builtins", "eval", f"__import__('os').mkdir({str(marker)!r})"),
        "system": text_pickle("posix", "system", f"mkdir {marker}"),
        "trailing bytes": pickle.dumps(Call(exec, code)) + b"rest",
        "broken after the call": plain[:-1] + b"\xff\xff",
        "torch": of_torch({"w": mkdir}, zipped=True),
        "torch of old": of_torch({"w": mkdir}, zipped=False),
        "torch by hand": of_zip(
            {"a/data.pkl": plain, "a/version": b"3\n", "a/byteorder": b"little"}
        ),
        "encrypted": of_zip({"a/data.pkl": plain, "a/version": b"3\n"}, flags=1),
        "npy": of_numpy(np.save, mkdir),
        "npz": of_numpy(lambda file, array: np.savez(file, images=array, w=array), mkdir),
        "tar": of_tar("data.pkl", plain),
        "compressed": gzip.compress(plain) + zlib.compress(plain) + bz2.compress(plain),
        "behind safetensors": save({"w": torch.zeros(2)}) + plain,
    }


def test_payloads_are_live(tmp_path: Path) -> None:
    live = set()
    for name, data in payloads(tmp_path / "marker").items():
        readers: list[Callable[[io.BytesIO], Any]] = [
            pickle.load,
            lambda file: torch.load(file, weights_only=False),
            lambda file: list(np.load(file, allow_pickle=True).values()),
        ]
        for read in readers:
            try:
                read(io.BytesIO(data))
            except Exception:  # of the wrong reader
                continue
            finally:
                if (tmp_path / "marker").exists():
                    live.add(name)
                    (tmp_path / "marker").rmdir()
    assert set(payloads(tmp_path)) - live == {
        "encrypted",
        "tar",
        "compressed",
        "behind safetensors",
    }


@pytest.mark.parametrize(
    "suffix", [*SUFFIXES, *(pytest.param(suffix, marks=pytest.mark.long) for suffix in FURTHER)]
)
def test_no_command_opens_a_pickle(
    suffix: str, workplace: Path, command: Callable[..., Any]
) -> None:
    marker, file = workplace / "marker", workplace / f"model{suffix}"
    checkpoint = workplace / "run" / "checkpoints" / "step-3"
    whole = sorted(workplace.rglob("*"))
    for name, data in payloads(marker).items():
        file.write_bytes(data)
        for words in (
            ["detect", "cells/0.png", "--checkpoint", file, "--out", "found.json"],
            ["detect", file, "--out", "found.json"],
            ["viz", file, "--out", "picture.png"],
            ["train", "--config", file, "--out", "new"],
            ["train", "--data", file, "--out", "new"],
            ["train", "--resume", file],
        ):
            ended = command(*words)
            assert ended.status == 2, (name, words)
        assert not marker.exists(), name
        file.unlink()
    assert sorted(workplace.rglob("*")) == whole
    assert checkpoint.is_dir()
