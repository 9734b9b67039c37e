"""Clocks for calls on a CPU or GPU, peak memory, and a description of the machine."""

import ctypes
import datetime
import gc
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from spairkit import __version__

Call = Callable[[], object]
Clock = Callable[[], float]
"""Runs a call once or several times and returns the seconds that one call took."""

_MIN_ROUNDS = 3
_GRAPH_CALLS, _SHORT_SECONDS = 20, 5e-3


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Time and memory of one implementation of a case."""

    case: str
    """The operator or preset, and its size."""
    way: str
    """The implementation: "spairkit", or the plain version it is compared with."""
    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    times: float
    """Median over that of spairkit."""
    peak_mib: float | None
    """Rise in memory during a call; None where the operating system does not tell."""
    note: str = ""
    """How it was computed or timed."""
    more: dict[str, float] = field(default_factory=dict)
    """Further figures by the heading of their column."""


def take_turns(clocks: Mapping[str, Clock], seconds: float) -> dict[str, dict[str, Any]]:
    """Reads the clocks in turn for `seconds` and at least three times; their times by name."""
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < _MIN_ROUNDS or time.perf_counter() < end:
        for name, clock in clocks.items():
            samples[name].append(1e3 * clock())
        rounds += 1
    return {name: spread(values) for name, values in samples.items()}


def spread(samples: list[float]) -> dict[str, Any]:
    """Median, 20 % and 80 % points, and number, of times in ms: fields of a `Figure`."""
    ranked, number = sorted(samples), len(samples)
    middle, low, high = (ranked[n] for n in (number // 2, number // 5, number * 4 // 5))
    return {"median_ms": middle, "p20_ms": low, "p80_ms": high, "samples": number}


def host_clock(call: Call, device: torch.device, calls: int = 1) -> Clock:
    """Wall time of `calls` calls in a row, up to the end of their work on the device."""

    def clock() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / calls

    return clock


def device_clock(call: Call, device: torch.device) -> tuple[Clock, str]:
    """Time on the device alone: on a GPU by CUDA events around the replay of a CUDA graph.

    A call that waits for the GPU cannot be recorded. It is timed by events around an ordinary
    call, and the second value says so.
    """
    if device.type != "cuda":
        return host_clock(call, device), ""
    aside, here = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        call()
        call()
        eager = _seconds_by_events(call)
    here.wait_stream(aside)
    # several short calls share a graph, so that launching the graph does not count
    calls = _GRAPH_CALLS if eager < _SHORT_SECONDS else 1
    graph = torch.cuda.CUDAGraph()
    gc.collect()  # a graph that is destroyed during the recording of another one breaks it
    gc.disable()
    try:
        with torch.cuda.graph(graph, stream=aside):
            for _ in range(calls):
                call()
    except RuntimeError:
        torch.cuda.set_stream(here)  # torch stays on the other one after a failed recording
        return lambda: _seconds_by_events(call), "launched eagerly"
    finally:
        gc.enable()
    graph.replay()
    return lambda: _seconds_by_events(graph.replay) / calls, ""


def _seconds_by_events(call: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def peak_mib(call: Call, device: torch.device) -> float | None:
    """The rise in memory during a call, after a first call that compiles and loads."""
    call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
    try:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    except OSError:
        return None
    before = _proc_bytes("self/status", "VmRSS")
    call()
    return max(0, _proc_bytes("self/status", "VmHWM") - before) / 2**20


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors can take; 8 GiB where the operating system does not tell."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return _proc_bytes("meminfo", "MemAvailable") if sys.platform == "linux" else 8 << 30


def machine(device: torch.device) -> dict[str, Any]:
    """Date, device, threads and versions, which all figures depend on."""
    gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if gpu else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "spairkit": __version__,
        "torch": torch.__version__,
        **{name: version(name) for name in ("triton", "numba") if find_spec(name)},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.machine()


def _proc_bytes(file: str, key: str) -> int:
    kilobytes = re.findall(rf"{key}:\s*(\d+)", Path("/proc", file).read_text())
    return 1024 * int(kilobytes[0])
