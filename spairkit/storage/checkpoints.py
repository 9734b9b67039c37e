"""Checkpoints: a folder of safetensors files and a manifest with their sha256. Never a pickle.

A checkpoint is the folder `step-N/`: `model.safetensors`, `optimiser.safetensors` (absent in a
packaged model) and `manifest.json`. Checkpoints are untrusted: sizes are bounded, hashes are
checked, and nothing in them can run. `models.loading` checks whether the tensors fit the model.
"""

import json
import os
import platform
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

import spairkit
from spairkit.config import Config
from spairkit.config_values import from_dict, to_dict
from spairkit.errors import InputError
from spairkit.storage import durable

FORMAT = 1
"""Version of the format; a spairkit reads its own version only."""

MAX_BYTES = 1 << 30
"""Largest safetensors file that is read."""

Scalar = str | int | float | bool | None

_MAX_MANIFEST_BYTES = 1 << 20
_MODEL, _OPTIMISER, _MANIFEST = "model.safetensors", "optimiser.safetensors", "manifest.json"
_PICKLES = {".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin", ".joblib", ".npz", ".npy"}
_DTYPES = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The content of a checkpoint folder; tensors are on the CPU, those of the model finite."""

    step: int
    config: Config
    model: dict[str, Tensor]
    optimiser: dict[str, Tensor] | None
    """State of the optimiser; None if absent or not asked for."""
    metrics: dict[str, float | None]
    """Figures of the validation at this step; None for a figure that was not finite."""
    environment: dict[str, Scalar]
    """Versions and CPU threads of the writing process, on which bits depend."""
    calibration: dict[str, float]
    """That of the search, see `search.calibration`; empty if it was not calibrated."""
    path: Path
    """The folder itself, links resolved."""
    sha256: str
    """That of the manifest, which covers everything."""

    @property
    def files(self) -> list[Path]:
        """The files that it was read from."""
        return [self.path / name for name in (_MODEL, _OPTIMISER, _MANIFEST)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    size: Annotated[int, Field(ge=0, le=MAX_BYTES)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    format: Literal[1]
    step: Annotated[int, Field(ge=0, le=10**9)]
    config: dict[str, Any]
    metrics: dict[str, float | None]
    environment: dict[str, Scalar]
    calibration: dict[str, float] = Field(default_factory=dict)
    files: dict[Literal["model.safetensors", "optimiser.safetensors"], _File]


def environment() -> dict[str, Scalar]:
    """The versions and CPU threads of this process, on which the bits of a run depend."""
    return {
        "spairkit": spairkit.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    config: Config,
    model: Mapping[str, Tensor],
    optimiser: Mapping[str, Tensor] | None = None,
    metrics: Mapping[str, float] | None = None,
    environment: Mapping[str, Scalar],
) -> Path:
    """Writes `folder/step-N/` durably, replacing one of that name, and returns its path.

    Args:
        model, optimiser: state dicts. metrics: figures of a validation, by name.
        environment: versions and machine, for the record.

    Raises:
        InputError: the model is not finite or the optimiser holds NaN (nothing is written), or the
            system refuses.
    """
    files = {_MODEL: _pack(model, _MODEL, step)}
    if optimiser is not None:
        files[_OPTIMISER] = _pack(optimiser, _OPTIMISER, step)
    manifest = {
        "format": FORMAT,
        "step": step,
        "config": to_dict(config),
        "metrics": {k: v if isfinite(v) else None for k, v in (metrics or {}).items()},
        "environment": dict(environment),
        "files": {
            name: {"size": len(data), "sha256": sha256(data).hexdigest()}
            for name, data in files.items()
        },
    }
    files[_MANIFEST] = json.dumps(manifest, indent=2, allow_nan=False).encode()
    path = folder / f"step-{step}"
    durable.write_folder(path, files)
    return path


def save_calibration(path: Path, calibration: Mapping[str, float]) -> None:
    """Writes the calibration of the search into the manifest of a checkpoint.

    Args:
        path: as in `load_checkpoint`.
        calibration: by name; finite.

    Raises:
        InputError: there is no checkpoint, or its manifest cannot be read or written.
    """
    source = _find(path) / _MANIFEST
    data = _read(source, _MAX_MANIFEST_BYTES)
    _parse(data, source)
    manifest = json.loads(data) | {"calibration": dict(calibration)}
    durable.write_text(source, json.dumps(manifest, indent=2, allow_nan=False))


def load_checkpoint(path: Path, *, with_optimiser: bool = False) -> Checkpoint:
    """Loads a checkpoint.

    Args:
        path: the folder of a checkpoint, a file in it, a link to it, or the folder of a run, whose
            `best` is taken, or `last` if there is no best. If another process replaces the
            checkpoint meanwhile, it is looked up again.
        with_optimiser: also load the state of the optimiser.

    Raises:
        InputError: there is no checkpoint, or it is damaged, of another format, or not finite.
    """
    folder = _find(path)
    while True:
        try:
            return _load(folder, with_optimiser)
        except InputError:
            now = _find(path)
            if now == folder:
                raise
            folder = now


def _find(path: Path) -> Path:
    """The folder of the checkpoint at `path`, with links resolved."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; create one with `spairkit train`") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        if (path / _MANIFEST).exists():
            return _resolved(path)
        for name in ("best", "last"):
            if os.path.lexists(path / name):
                return _resolved(path / name)
        raise InputError(
            f"{path}: neither a checkpoint nor a run (no {_MANIFEST}, best or last in it); "
            "create one with `spairkit train`"
        )
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: neither a file nor a folder; name a checkpoint or a run")
    if path.suffix.lower() in _PICKLES:
        raise InputError(
            f"{path}: {path.suffix} files can hold code and are never opened; "
            "spairkit reads checkpoints in safetensors only"
        )
    if path.name not in (_MODEL, _OPTIMISER, _MANIFEST):
        raise InputError(f"{path}: not a checkpoint; name a run, or a folder with {_MODEL} in it")
    return _resolved(path.parent)


def _load(folder: Path, with_optimiser: bool) -> Checkpoint:
    source = folder / _MANIFEST
    data = _read(source, _MAX_MANIFEST_BYTES)
    manifest = _parse(data, source)
    config = from_dict(manifest.config, str(source))
    model = _unpack(folder / _MODEL, manifest)
    optimiser = None
    if with_optimiser:
        if _OPTIMISER not in manifest.files:
            raise InputError(f"{folder}: cannot be resumed: it has no optimiser state")
        optimiser = _unpack(folder / _OPTIMISER, manifest)
    return Checkpoint(
        step=manifest.step,
        config=config,
        model=model,
        optimiser=optimiser,
        metrics=manifest.metrics,
        environment=manifest.environment,
        calibration=manifest.calibration,
        path=folder,
        sha256=sha256(data).hexdigest(),
    )


def _parse(data: bytes, source: Path) -> _Manifest:
    try:
        return _Manifest.model_validate_json(data)
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
    for item in mistakes:
        if item["loc"] == ("format",) and isinstance(item["input"], int):
            raise InputError(
                f"{source}: format {item['input']}, but this spairkit reads format {FORMAT}; "
                "use the version that wrote it"
            )
    first = mistakes[0]
    key = ".".join(str(part) for part in first["loc"])
    raise InputError(
        f"{source}: not a spairkit manifest: {f'{key}: ' if key else ''}{first['msg']}"
    )


def _unpack(path: Path, manifest: _Manifest) -> dict[str, Tensor]:
    """The tensors of a safetensors file, after size and hash were compared with the manifest."""
    name: Any = path.name
    if name not in manifest.files:
        raise InputError(f"{path.parent / _MANIFEST}: lists no {name}")
    expected = manifest.files[name]
    data = _read(path, MAX_BYTES)
    if len(data) != expected.size:
        raise InputError(
            f"{path}: damaged: {len(data)} bytes, the manifest says {expected.size}; "
            "use another checkpoint"
        )
    if sha256(data).hexdigest() != expected.sha256:
        raise InputError(
            f"{path}: damaged: its sha256 is not that in the manifest; use another checkpoint"
        )
    try:
        tensors = safetensors.torch.load(data)
    except (
        SafetensorError,
        KeyError,
        ValueError,
        RuntimeError,
        AssertionError,
        TypeError,
    ) as error:
        # raised by the reader, and by its conversion to torch
        raise InputError(f"{path}: not safetensors: {error}") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise InputError(f"{path}: {key!r} has dtype {tensor.dtype}, which is not supported")
    unsound = _unsound(tensors, path.name)
    if unsound is not None:
        raise InputError(f"{path}: {unsound!r} is not finite; use another checkpoint")
    return tensors


def _pack(tensors: Mapping[str, Tensor], name: str, step: int) -> bytes:
    # cloned, because safetensors refuses tensors that share memory
    plain = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    unsound = _unsound(plain, name)
    if unsound is not None:
        raise InputError(
            f"{name} of step {step} is not saved: {unsound!r} is not finite: training diverged; "
            "try a lower train.learning_rate"
        )
    return safetensors.torch.save(plain)


def _unsound(tensors: Mapping[str, Tensor], name: str) -> str | None:
    """The key of a tensor that holds NaN or, in a model, infinity; None if there is none."""
    for key, tensor in tensors.items():
        # the best figure so far, kept with the optimiser, starts at minus infinity
        unsound = tensor.isnan() if name == _OPTIMISER else ~tensor.isfinite()
        if unsound.any():
            return key
    return None


def _read(path: Path, limit: int) -> bytes:
    """The bytes of a regular file; others are not opened, because a FIFO would block."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: not a regular file")
        if status.st_size > limit:
            raise InputError(f"{path}: {status.st_size} bytes; at most {limit} are read")
        with path.open("rb") as file:
            return file.read(status.st_size)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}; use another checkpoint"
        ) from None


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))
