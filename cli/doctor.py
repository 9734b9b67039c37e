"""`spairkit doctor`: versions, devices and backends, and whether each works."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from spairkit import __version__
from spairkit.cli.console import echo, print_json
from spairkit.cli.options import JsonOption
from spairkit.errors import InputError

_PACKAGES = ("torch", "triton", "numba", "numpy", "safetensors", "pillow", "pydantic", "typer")


def doctor(as_json: JsonOption = False) -> None:
    """Print versions, devices and backends. Include the output when you report a bug."""
    import torch

    findings: dict[str, str] = {
        "spairkit": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: _version(name) for name in _PACKAGES},
        "CPU threads": str(torch.get_num_threads()),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "backend torch": _try_backend("torch", "cpu"),
        "backend cpu": _try_backend("cpu", "cpu"),
        "backend triton": _try_triton(),
        "current folder": _writable(Path.cwd()),
        "Triton's cache": _writable(
            Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
        ),
        "packaged model": _try_model(),
    }
    if as_json:
        print_json(findings)
        return
    width = max(len(name) for name in findings) + 2
    for name, finding in findings.items():
        echo(f"{name:<{width}}{finding}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _try_triton() -> str:
    import torch

    if torch.cuda.is_available():
        return _try_backend("triton", "cuda")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return f"{_try_backend('triton', 'cpu')} (interpreted)"
    return "needs a GPU"


def _try_backend(backend: Literal["torch", "cpu", "triton"], device: str) -> str:
    """Renders a white map over a black pixel."""
    import torch

    from spairkit.rendering import render

    try:
        image = render(
            torch.ones(1, 1, 2, 2, 4, device=device),
            torch.tensor([[[-1.0, -1.0, 2.0, 2.0]]], device=device),
            torch.zeros(1, 1, device=device),
            torch.ones(1, 1, device=device),
            torch.zeros(1, 3, 1, 1, device=device),
            backend=backend,
        )
    # a broken installation fails in its own way
    except Exception as error:
        return f"broken: {type(error).__name__}: {error}"
    right = torch.allclose(image, torch.ones_like(image))
    return "works" if right else f"broken: {image.flatten().tolist()} instead of white"


def _try_model() -> str:
    from spairkit.detector import load

    try:
        load(device="cpu")
    except InputError as error:
        return f"broken: {error}"
    return "works"


def _writable(folder: Path) -> str:
    """Whether files can be made in the folder, or in the first one above it that exists."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    allowed = os.access(existing, os.W_OK | os.X_OK)
    return f"{folder}{'' if allowed else ', not writable'}"
