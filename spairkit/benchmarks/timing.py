"""How long calls take and how much memory they need, and what a figure depends on besides them."""

import contextlib
import ctypes
import datetime
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from spairkit import __version__
from spairkit.errors import InputError


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code, and its version; no key for what is not here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "spairkit": __version__,
        "torch": torch.__version__,
        **_versions("triton", "numba"),
        **({"cuda": torch.version.cuda} if torch.version.cuda else {}),
    }


def check_ledger(path: Path) -> None:
    """Refuses a ledger that could not be written, before what it is to hold is measured.

    Raises:
        InputError: the file cannot be opened to add to it.
    """
    new = not path.exists()
    try:
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise _not_added(path, error) from error


def append_to_ledger(path: Path, machine: dict[str, Any], figures: Sequence[Any]) -> None:
    """Adds one line of JSON: the machine, and all figures.

    Raises:
        InputError: the file cannot be written.
    """
    line = json.dumps({**machine, "figures": [asdict(figure) for figure in figures]})
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise _not_added(path, error) from error


def times_of(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Sorted seconds of calls: at least three if they are done in 20 s; one was made before."""
    times: list[float] = []
    begin = time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds or len(times) < (3 if spent < 20 else 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """How far memory rises in one call, after one that has loaded and compiled what it needs."""
    call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    # give back what the allocator holds, and start the record of the largest size anew
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # what torch holds, and nobody uses
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "linux":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 8 * 2**30


def _not_added(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path}: cannot add to the ledger ({error.strerror}); name another with --ledger"
    )


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"the system's record of this process has no {key}")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
