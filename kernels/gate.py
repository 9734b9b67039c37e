"""The compile gate: every kernel in every shipped configuration, for GPUs that are not here.

    python -m spairkit.kernels.gate [--representative]

Triton brings its own assembler, so this needs no GPU and no driver. The interpreter accepts what
the compiler rejects, and neither tells when registers spill: hence this list. It prints registers,
spills, shared memory and occupancy, and fails (exit status 1) where a kernel does not compile,
a default spills at all, or another configuration more than a few words. Not to be run under
TRITON_INTERPRET=1.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# the default will change; registers are counted for what runs today
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spairkit.kernels import (
    presence_triton,
    render_triton,
    render_triton_backward,
    scenes_compose_triton,
    scenes_layout_triton,
)
from spairkit.kernels.presence_blocks import walk_block

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_WARPS_AND_SHARED_KB = {80: (64, 164), 89: (48, 100), 90: (64, 228), 100: (64, 228), 120: (48, 100)}

# words of spill that pass outside the defaults: the assembler gives up a few registers on purpose
# to reach the next step of occupancy, and any edit moves which kernel that happens to
_TOLERATED = 8


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One kernel as a launcher would build it."""

    name: str
    kernel: Any
    signature: dict[str, str]
    """Type of each pointer and number that is not a constant."""
    constants: dict[str, Any]
    warps: int
    is_default: bool = False
    """Whether it is what the paper's shapes run: it must not spill."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """What came out of the compiler, or `error`."""

    registers: int = 0
    spills: int = 0
    shared: int = 0
    warps_per_sm: str = "-"
    seconds: float = 0.0
    error: str = ""

    def passes(self, configuration: Configuration) -> bool:
        """No error, and no more spills than the configuration may have."""
        return not self.error and self.spills <= (0 if configuration.is_default else _TOLERATED)


def _types(kernel: Any, constants: dict[str, Any], **exceptions: str) -> dict[str, str]:
    """float32 pointers and int32 numbers, but for the exceptions."""
    return {
        name: exceptions.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in constants
    }


def _of_one(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """The constants where every number is 1: Triton compiles those in, which is other code."""
    numbers = [name for name in kernel.arg_names if not name.endswith("_ptr") and name != "floor"]
    return dict.fromkeys(numbers, 1) | constants


def render_configurations() -> Iterator[Configuration]:
    """Both passes of the renderer: dtypes, colours, floor, map sizes, few and many objects."""
    rows = [
        # map, colours, floor, objects, dtype of rgba
        (14, 3, False, 64, "fp32"),
        (14, 3, True, 64, "fp32"),
        (14, 3, False, 64, "bf16"),
        (14, 3, True, 64, "bf16"),
        (14, 3, False, 64, "fp16"),
        (14, 3, False, 576, "fp32"),
        (14, 3, True, 576, "fp32"),
        (14, 3, True, 1, "fp32"),
        (14, 1, False, 64, "fp32"),
        (14, 2, True, 64, "fp32"),
        (14, 4, True, 64, "fp32"),
        (2, 3, False, 64, "fp32"),
        (28, 3, False, 64, "fp32"),
        (28, 3, True, 64, "fp32"),
        (64, 1, True, 64, "fp32"),
        (64, 3, False, 64, "fp32"),
        (64, 3, True, 64, "fp32"),
        (64, 4, True, 64, "fp32"),
    ]
    passes = [
        ("forward", render_triton._render_forward_kernel, render_triton.forward_tile),
        ("backward", render_triton_backward._render_backward_kernel, None),
    ]
    for side, colours, has_floor, objects, dtype in rows:
        for name, kernel, forward_tile in passes:
            if forward_tile:
                tile = forward_tile(objects, colours) | {"MAP_H": side, "MAP_W": side}
            elif objects == 576:
                continue  # the backward pass is the same for any number
            else:
                # neighbouring pixels of the gradient of an image: a stride of 1 is compiled in
                tile = render_triton_backward.backward_tile(side, side) | {"stride_gx": 1}
            warps = tile.pop("num_warps")
            constants = tile | {
                "C": colours,
                "CH": int(triton.next_power_of_2(colours + 1)),
                "HAS_FLOOR": has_floor,
                "stride_x": 1,
            }
            if objects == 1:
                constants = _of_one(kernel, constants)
            types = {"rgba_ptr": f"*{dtype}", "grad_rgba_ptr": f"*{dtype}", "floor": "fp32"}
            suffix = f"{side}x{side} C{colours} N{objects} {dtype}{' floor' if has_floor else ''}"
            yield Configuration(
                name=f"render {name} {suffix}",
                kernel=kernel,
                signature=_types(kernel, constants, **types),
                constants=constants,
                warps=warps,
                is_default=(side, colours, objects, dtype) == (14, 3, 64, "fp32"),
            )


def presence_configurations() -> Iterator[Configuration]:
    """The table, the lookup with the KL, and the walk over relaxed samples at every block size."""
    types = {
        "odds_ptr": "*fp64",
        "success_ptr": "*fp64",
        "prior_logit_ptr": "*fp64",
        "grad_logit_ptr": "*fp64",
        "grad_log_failure_ptr": "*fp64",
    }
    lookups = [(1, "fp32"), (16, "fp32"), (144, "fp32"), (144, "bf16"), (1024, "fp32")]
    rows: list[tuple[str, Any, int, dict[str, Any], int, str]] = []
    for num_cells in (1, 144):
        constants = {"BLOCK": presence_triton.ODDS_BLOCK}
        kernel = presence_triton._odds_kernel
        rows.append(("odds", kernel, num_cells, constants, presence_triton.ODDS_WARPS, "fp32"))
    for num_cells, dtype in lookups:
        constants = {"BLOCK": presence_triton.lookup_block(num_cells)}
        kernel = presence_triton._presence_kl_kernel
        rows.append(("KL", kernel, num_cells, constants, presence_triton.LOOKUP_WARPS, dtype))
    for num_cells in (1, 16, 64, 144, 400, 576, 1024):
        counts, block, warps = walk_block(num_cells)
        constants = {"COUNTS": counts, "BLOCK": block}
        forward = presence_triton._count_posterior_kernel
        backward = presence_triton._count_posterior_backward_kernel
        rows.append(("walk forward", forward, num_cells, constants, warps, "fp32"))
        rows.append(("walk backward", backward, num_cells, constants, warps, "fp32"))
    for name, kernel, num_cells, constants, warps, dtype in rows:
        if num_cells == 1:
            constants = _of_one(kernel, constants)
        samples = "*fp32" if "walk" in name else f"*{dtype}"
        known = {**types, "logits_ptr": f"*{dtype}", "samples_ptr": samples}
        yield Configuration(
            name=f"presence {name} n{num_cells} {dtype}",
            kernel=kernel,
            signature=_types(kernel, constants, **known),
            constants=constants,
            warps=warps,
            is_default="walk" not in name and dtype == "fp32",
        )


def scatter_configurations() -> Iterator[Configuration]:
    """Layouts of scenes: few and many squares, of one size and of several, in one tile or more."""
    rows = [
        # squares, sizes of them, image, least side
        (9, 1, (48, 48), 14),
        (9, 9, (48, 48), 10),
        (1, 1, (48, 48), 14),
        (2, 1, (24, 24), 14),
        (1, 1, (14, 14), 14),  # a single position
        (2, 3, (14, 24), 10),
        (12, 1, (96, 96), 14),
        (64, 9, (144, 300), 10),
        (256, 1, (1024, 4096), 4),
    ]
    kernel = scenes_layout_triton._scatter_kernel
    pointers = {name: "*i64" for name in kernel.arg_names if name.endswith("_ptr")}
    for squares, num_sides, (height, width), side in rows:
        tile = scenes_layout_triton.scatter_tile(squares, height - side + 1, width - side + 1)
        warps = tile.pop("num_warps")
        constants = tile | {"FIRST_WORD": 3, "SQUARE_WORDS": 16, "ATTEMPT_WORDS": 4096}
        # ones are compiled in
        numbers = {"num_squares": squares, "num_sides": num_sides}
        constants |= {name: number for name, number in numbers.items() if number == 1}
        yield Configuration(
            name=f"scatter {height}x{width} N{squares} of {num_sides} sizes",
            kernel=kernel,
            signature=_types(kernel, constants, **pointers | {"complete_ptr": "*i1"}),
            constants=constants,
            warps=warps,
            is_default=(squares, num_sides) == (9, 1),
        )


def compose_configurations() -> Iterator[Configuration]:
    """Images of scenes: grey ones and those in colours, with few glyphs and many."""
    kernel = scenes_compose_triton._compose_kernel
    types = {"table_ptr": "*u8", "entries_ptr": "*i64", "corners_ptr": "*i64"}
    types |= {"colours_ptr": "*i32", "backgrounds_ptr": "*i32"}
    for colours, glyphs in ((1, 9), (3, 9), (1, 1), (3, 1)):
        constants = {
            "C": colours,
            "CH": int(triton.next_power_of_2(colours)),
            "BLOCK": scenes_compose_triton.COMPOSE_BLOCK,
        }
        if glyphs == 1:
            constants = _of_one(kernel, constants)
        yield Configuration(
            name=f"compose C{colours} N{glyphs}",
            kernel=kernel,
            signature=_types(kernel, constants, **types),
            constants=constants,
            warps=scenes_compose_triton.COMPOSE_WARPS,
            is_default=glyphs == 9,
        )


def configurations() -> list[Configuration]:
    """All that ship."""
    return [
        *render_configurations(),
        *presence_configurations(),
        *scatter_configurations(),
        *compose_configurations(),
    ]


def build(configuration: Configuration, target: GPUTarget) -> Build:
    """Compiles for `target`: pointers are aligned, and of other numbers nothing is assumed.

    A launch may know more, as strides that are multiples of 16, and then build faster code.
    """
    names = configuration.kernel.arg_names
    types = configuration.signature
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in configuration.constants.items()}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*")
    }
    start = time.perf_counter()
    try:
        source = ASTSource(configuration.kernel, signature, constants, aligned)
        built = triton.compile(source, target=target, options={"num_warps": configuration.warps})
    # whatever the compiler raises is this row's result, and the other rows still have to be tried
    except Exception as error:
        return Build(error=f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    read = _amd_resources if target.backend == "hip" else _nvidia_resources
    return read(built, target, configuration.warps, seconds)


def _nvidia_resources(built: Any, target: GPUTarget, warps: int, seconds: float) -> Build:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _output(_TOOLS / "cuobjdump", "-res-usage", file.name)
        assembly = _output(_TOOLS / "nvdisasm", "-c", file.name)
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    shared = max(built.metadata.shared, int(re.findall(r"SHARED:(\d+)", usage)[0]))
    max_warps, shared_kb = _WARPS_AND_SHARED_KB[int(target.arch)]
    by_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        max_warps // warps,
        65536 // (by_warp * warps),
        32,
        shared_kb * 1024 // (shared + 1024),
    )
    return Build(
        registers=registers,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        shared=shared,
        warps_per_sm=str(blocks * warps),
        seconds=seconds,
    )


def _amd_resources(built: Any, target: GPUTarget, warps: int, seconds: float) -> Build:
    def number(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s*(\d+)", built.asm["amdgcn"])[0])

    return Build(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count"),
        shared=built.metadata.shared,
        seconds=seconds,
    )


def _output(tool: Path, *arguments: str) -> str:
    command = [str(tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Builds and prints every row; 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--representative",
        action="store_true",
        help="only the defaults, and only for sm_90",
    )
    representative = parser.parse_args().representative
    failures = 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # every row is compiled, not looked up
        for configuration in configurations():
            if representative and not configuration.is_default:
                continue
            for name, target in TARGETS.items():
                if representative and name != "sm_90":
                    continue
                result = build(configuration, target)
                passes = result.passes(configuration)
                failures += not passes
                print(
                    f"{'ok' if passes else 'FAIL':4} {name:6} {configuration.name:45} "
                    f"registers {result.registers:3} spills {result.spills:3} "
                    f"shared {result.shared:6} warps/SM {result.warps_per_sm:>2} "
                    f"{result.seconds:5.1f} s {result.error}",
                    flush=True,
                )
    print(f"{failures} failed", file=sys.stderr)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
