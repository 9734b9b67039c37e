"""Checkpoints: a folder of safetensors files and a manifest with their sha256. Never a pickle.

A checkpoint is the folder `step-N/`: `model.safetensors`, `optimiser.safetensors` (absent in a
packaged model) and `manifest.json`, which begins with a sha256 of the rest of itself. Checkpoints
are untrusted: sizes are bounded, hashes are checked, and nothing in them can run. `models.loading`
checks whether the tensors fit the model.

The checkpoints of a run are `RUN/checkpoints/step-N/`. The last one is that of the highest step,
and its manifest names the best one, so that a run needs no links, which copies lose.
"""

import json
import os
import platform
import re
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

FORMAT = 2
"""Version of the format; a spairkit reads its own version only."""

MAX_BYTES = 1 << 30
"""Largest safetensors file that is read."""

Scalar = str | int | float | bool | None

_FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{1,10})")
_MAX_MANIFEST_BYTES = 1 << 20
_HEAD = b'{\n  "sha256": "'  # of a manifest; the hash and all that it covers follow
_HEX = 64
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
    """That of the manifest, which covers all files."""

    @property
    def run(self) -> Path | None:
        """The folder of its run; None if it does not lie in one."""
        return self.path.parent.parent if self.path.parent.name == _FOLDER else None

    @property
    def files(self) -> list[Path]:
        """The files that it was read from, and those of its run that commands read."""
        if self.run is None:
            return [self.path / name for name in (_MODEL, _OPTIMISER, _MANIFEST)]
        beside = ("config.toml", "data.json", "metrics.jsonl", "signs.json")
        return [*self.run.glob(f"{_FOLDER}/*/*"), *(self.run / name for name in beside)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    size: Annotated[int, Field(ge=0, le=MAX_BYTES)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    format: Literal[2]
    step: Annotated[int, Field(ge=0, le=10**9)]
    best: Annotated[int, Field(ge=0, le=10**9)] | None
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
    best: int | None = None,
) -> Path:
    """Writes `folder/step-N/` durably, replacing one of that name, and returns its path.

    Args:
        model, optimiser: state dicts. metrics: figures of a validation, by name.
        environment: versions and machine, for the record.
        best: the step of the run's best checkpoint so far.

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
        "best": best,
        "config": to_dict(config),
        "metrics": {k: v if isfinite(v) else None for k, v in (metrics or {}).items()},
        "environment": dict(environment),
        "files": {
            name: {"size": len(data), "sha256": sha256(data).hexdigest()}
            for name, data in files.items()
        },
    }
    files[_MANIFEST] = sealed(manifest)
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
    durable.write_bytes(source, sealed(json.loads(data) | {"calibration": dict(calibration)}))


def load_checkpoint(path: Path, *, with_optimiser: bool = False) -> Checkpoint:
    """Loads a checkpoint.

    Args:
        path: the folder of a checkpoint, a file in it, a link to it, RUN/best or RUN/last (whether
            there is such a link or not), or a run, whose best is taken, or the last if there is no
            best. If another process replaces the checkpoint meanwhile, it is looked up again.
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
    if path.name in ("best", "last") and (path.parent / _FOLDER).is_dir():
        return _of_run(path.parent, path.name)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; create one with `spairkit train`") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        if (path / _MANIFEST).exists():
            return _resolved(path)
        if (path / _FOLDER).is_dir():
            return _of_run(path, "best")
        for name in ("best", "last"):
            if (path / name / _MANIFEST).exists():
                return _resolved(path / name)
        raise InputError(
            f"{path}: neither a checkpoint nor a run (no {_MANIFEST}, {_FOLDER}, best or last in "
            "it); create one with `spairkit train`"
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


def checkpoints_of(run: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint of a run, the newest first."""
    folder = run / _FOLDER
    if not folder.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted([(int(m[1]), path) for m, path in matches if m], reverse=True)


def best_step(run: Path, up_to: int | None = None) -> int | None:
    """The step of a run's best checkpoint, as named by the newest one whose manifest is whole.

    Args:
        run: its folder.
        up_to: later checkpoints do not count.

    Returns:
        None if there is no checkpoint, or no best one.
    """
    for step, path in checkpoints_of(run):
        if up_to is None or step <= up_to:
            source = path / _MANIFEST
            try:
                return _parse(_read(source, _MAX_MANIFEST_BYTES), source).best
            except InputError:
                continue
    return None


def _of_run(run: Path, name: str) -> Path:
    """The best or the last checkpoint of a run; without a best one the last."""
    found = dict(checkpoints_of(run))
    if not found:
        raise InputError(f"{run}: has no checkpoint yet; continue with `spairkit train --resume`")
    step = best_step(run) if name == "best" else None
    return _resolved(found[max(found) if step not in found else step])


def _load(folder: Path, with_optimiser: bool) -> Checkpoint:
    source = folder / _MANIFEST
    manifest = _parse(_read(source, _MAX_MANIFEST_BYTES), source)
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
        sha256=manifest.sha256,
    )


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as JSON, with the sha256 of all that follows the hash."""
    values = {"sha256": "0" * _HEX} | {k: v for k, v in manifest.items() if k != "sha256"}
    text = json.dumps(values, indent=2, allow_nan=False).encode()
    rest = text[len(_HEAD) + _HEX :]
    return _HEAD + sha256(rest).hexdigest().encode() + rest


def _parse(data: bytes, source: Path) -> _Manifest:
    try:
        manifest = _Manifest.model_validate_json(data)
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
    else:
        end = len(_HEAD) + _HEX
        if data[:end] != _HEAD + sha256(data[end:]).hexdigest().encode():
            raise InputError(
                f"{source}: damaged or edited: its sha256 is not that of its content; use another "
                "checkpoint"
            )
        return manifest
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
