"""Compiles every Triton kernel in every shipped configuration, for GPUs that are not here.

    python -m spairkit.kernels.gate [--representative]

Triton brings its own assembler, so neither a GPU nor a driver is needed. The interpreter accepts
code that the compiler rejects, and it cannot tell when registers spill. Prints registers, spills,
shared memory, occupancy (the warps that a multiprocessor holds at once) and the instructions of the
machine code. The exit status is 1 if a kernel does not compile, a default configuration spills, or
another one spills more than a few words. All cores are used. Do not set TRITON_INTERPRET.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spairkit.kernels import (
    appearance_triton,
    cells_triton,
    cells_triton_backward,
    likelihood_triton,
    normal_kl_triton,
    presence_triton,
    render_triton,
    render_triton_backward,
    scenes_compose_triton,
    scenes_layout_triton,
)
from spairkit.kernels.presence_blocks import walk_block

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# of a multiprocessor: warps, programs, bytes of shared memory
_LIMITS = {
    80: (64, 32, 164 << 10),
    89: (48, 24, 100 << 10),
    90: (64, 32, 228 << 10),
    100: (64, 32, 228 << 10),
    120: (48, 24, 100 << 10),
}

# words of spill that pass outside the defaults: the assembler gives up a few registers on purpose
# to reach the next step of occupancy, and any edit changes which kernel that happens to
_TOLERATED = 8


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One kernel as a launcher would build it."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int
    types: dict[str, str]
    """Of arguments that are neither constants, float32 pointers nor int32 numbers."""
    most_registers: int | None = None
    """Of a thread, if the launcher asks for it (NVIDIA only)."""
    is_default: bool = False
    """Whether the paper's shapes use it: it must not spill."""

    @property
    def signature(self) -> dict[str, str]:
        """Type of each argument that is not a constant."""
        return {
            name: self.types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
            for name in self.kernel.arg_names
            if name not in self.constants
        }


class Build(NamedTuple):
    """Resources of a compiled kernel, or `error`."""

    registers: int = 0
    spills: int = 0
    shared: int = 0
    occupancy: int = 0  # warps that a multiprocessor holds at once
    instructions: int = 0
    error: str = ""

    def passes(self, configuration: Configuration) -> bool:
        """Whether it compiled, with no more spills than the configuration may have."""
        most = 0 if configuration.is_default else _TOLERATED
        return not self.error and self.spills <= most


def _of_one(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """The constants where every number is 1: Triton compiles those in, which is different code."""
    numbers = [name for name in kernel.arg_names if not name.endswith("_ptr") and name != "floor"]
    return dict.fromkeys(numbers, 1) | constants


def render_configurations() -> Iterator[Configuration]:
    """Both passes of the renderer: dtypes, colours, floor, map sizes, few and many objects."""
    rows = [  # side of the map, colours, floor, objects, dtype of rgba
        (14, 3, False, 64, "fp32"), (14, 3, True, 64, "fp32"), (14, 3, False, 64, "bf16"),
        (14, 3, True, 64, "bf16"), (14, 3, False, 64, "fp16"), (14, 3, False, 576, "fp32"),
        (14, 3, True, 576, "fp32"), (14, 3, True, 1, "fp32"), (14, 1, False, 64, "fp32"),
        (14, 1, True, 64, "fp32"), (2, 3, False, 64, "fp32"), (28, 3, False, 64, "fp32"),
        (28, 3, True, 64, "fp32"), (64, 1, True, 64, "fp32"), (64, 3, False, 64, "fp32"),
        (64, 3, True, 64, "fp32"),
    ]  # fmt: skip
    forward = render_triton._render_forward_kernel
    backward = render_triton_backward._render_backward_kernel
    for side, colours, has_floor, objects, dtype in rows:
        types = {"rgba_ptr": f"*{dtype}", "grad_rgba_ptr": f"*{dtype}", "floor": "fp32"}
        suffix = f"{side}x{side} C{colours} N{objects} {dtype}{' floor' if has_floor else ''}"
        common = {"C": colours, "HAS_FLOOR": has_floor, "stride_x": 1}
        tile = render_triton.forward_tile(objects)
        limit = render_triton_backward.register_limit(side, float(has_floor))
        passes = [("forward", forward, tile | {"MAP_H": side, "MAP_W": side})]
        if objects != 576:  # the backward pass is the same for any number
            # a stride of 1, as in the gradient of a contiguous image, is compiled in
            tile = render_triton_backward.backward_tile(side, side)
            passes.append(("backward", backward, tile | {"stride_gx": 1}))
        for name, kernel, tile in passes:
            warps = tile.pop("num_warps")
            constants = tile | common
            yield Configuration(
                name=f"render {name} {suffix}",
                kernel=kernel,
                types=types,
                constants=_of_one(kernel, constants) if objects == 1 else constants,
                warps=warps,
                most_registers=limit.get("maxnreg") if name == "backward" else None,
                is_default=(side, colours, objects, dtype) == (14, 3, 64, "fp32"),
            )


def presence_configurations() -> Iterator[Configuration]:
    """The KL of hard samples, and the walk over relaxed ones, at every block size."""
    names = ("success", "prior_logit", "grad_logit", "grad_log_failure")
    doubles = {f"{name}_ptr": "*fp64" for name in names}
    rows: list[tuple[str, Any, int, dict[str, Any], int, str]] = []
    sizes = [(num_cells, "fp32") for num_cells in (1, 16, 144)]
    for num_cells, dtype in [*sizes, (144, "bf16")]:
        constants = presence_triton.kl_block(num_cells)
        warps = constants.pop("num_warps")
        kernel = presence_triton._presence_kl_kernel
        rows.append(("KL", kernel, num_cells, constants, warps, dtype))
    for num_cells in (1, 16, 64, 144, 400, 576, 1024):
        counts, block, warps = walk_block(num_cells)
        constants = {"COUNTS": counts, "BLOCK": block}
        forward = presence_triton._count_posterior_kernel
        backward = presence_triton._count_posterior_backward_kernel
        rows.append(("walk forward", forward, num_cells, constants, warps, "fp32"))
        rows.append(("walk backward", backward, num_cells, constants, warps, "fp32"))
    for name, kernel, num_cells, constants, warps, dtype in rows:
        yield Configuration(
            name=f"presence {name} n{num_cells} {dtype}",
            kernel=kernel,
            types={**doubles, "logits_ptr": f"*{dtype}", "samples_ptr": f"*{dtype}"},
            constants=_of_one(kernel, constants) if num_cells == 1 else constants,
            warps=warps,
            is_default="walk" not in name and dtype == "fp32",
        )


def scatter_configurations() -> Iterator[Configuration]:
    """Layouts of scenes: few and many squares, of one size and of several, in one tile or more."""
    rows = [  # squares, sizes of them, height, width, least side
        (9, 1, 48, 48, 14), (9, 9, 48, 48, 10), (1, 1, 48, 48, 14), (2, 1, 24, 24, 14),
        (1, 1, 14, 14, 14), (2, 3, 14, 24, 10), (12, 1, 96, 96, 14), (64, 9, 144, 300, 10),
        (256, 1, 1024, 4096, 4),
    ]  # fmt: skip
    kernel = scenes_layout_triton._scatter_kernel
    types = {name: "*i64" for name in kernel.arg_names if name.endswith("_ptr")}
    for squares, num_sides, height, width, side in rows:
        tile = scenes_layout_triton.scatter_tile(squares, height - side + 1, width - side + 1)
        warps = tile.pop("num_warps")
        constants = tile | {"FIRST_WORD": 3, "SQUARE_WORDS": 16, "ATTEMPT_WORDS": 4096}
        # ones are compiled in
        numbers = {"num_squares": squares, "num_sides": num_sides}
        constants |= {name: number for name, number in numbers.items() if number == 1}
        yield Configuration(
            name=f"scatter {height}x{width} N{squares} of {num_sides} sizes",
            kernel=kernel,
            types=types | {"complete_ptr": "*i1"},
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
        constants = {"C": colours, "CH": int(triton.next_power_of_2(colours))}
        constants |= {"BLOCK": scenes_compose_triton.COMPOSE_BLOCK}
        yield Configuration(
            name=f"compose C{colours} N{glyphs}",
            kernel=kernel,
            types=types,
            constants=_of_one(kernel, constants) if glyphs == 1 else constants,
            warps=scenes_compose_triton.COMPOSE_WARPS,
            is_default=glyphs == 9,
        )


def cells_configurations() -> Iterator[Configuration]:
    """The loop over cells: each height of a tile, with and without neighbours, training wheels;
    and the functions beside it in an update."""
    rows = [  # images, side of the grid, activation, precision, lateral, training wheels
        (32, 4, "relu", "ieee", True, False), (32, 4, "celu", "ieee", True, False),
        (32, 4, "relu", "ieee", True, True), (32, 4, "relu", "ieee", False, False),
        (1, 1, "relu", "ieee", True, False), (512, 4, "relu", "ieee", True, False),
        (1024, 4, "relu", "ieee", True, False), (32, 4, "relu", "tf32", True, False),
        (32, 4, "relu", "bf16", True, False), (1024, 4, "celu", "bf16", True, True),
        (1, 1, "relu", "bf16", True, False),
    ]  # fmt: skip
    forward = cells_triton._cells_forward_kernel
    backward = cells_triton_backward._cells_backward_kernel
    types = dict.fromkeys(("low", "span", "cell", "anchor", "temperature"), "fp32")
    types |= {"layers_ptr": "*i32"}
    for images, side, activation, precision, lateral, wheels in rows:
        tile = cells_triton.cells_tile(images, side, side, precision)
        common = {"LATERAL": lateral, "RELU": activation == "relu", "PRECISION": precision}
        common |= tile.constants
        passes = [("backward", backward, common | {"WHEELS": wheels})]
        if not wheels:  # they change nothing in the forward pass
            passes.append(("forward", forward, common))
        for name, kernel, constants in passes:
            if side == 1:
                ones = ("num_images", "rows", "columns")
                constants = dict.fromkeys(ones, 1) | constants
            kind = f"{activation} {precision}{' wheels' if wheels else ''}"
            yield Configuration(
                name=f"cells {name} {side}x{side} B{images} {kind}{'' if lateral else ' alone'}",
                kernel=kernel,
                types=types | {"weights_ptr": "*bf16" if precision == "bf16" else "*fp32"},
                constants=constants,
                warps=tile.options["num_warps"],
                most_registers=tile.options.get("maxnreg"),
                is_default=(images, side, lateral, wheels, precision)
                == (32, 4, True, False, "ieee"),
            )
    kls, likelihood, appearance = normal_kl_triton, likelihood_triton, appearance_triton
    rows_of_kl = {"GROUPS": 4, "ROWS": kls.KL_ROWS, "COLUMNS": kls.KL_COLUMNS}
    of_kl = ({"GROUPS": 4, "BLOCK": kls.KL_BLOCK}, kls.KL_WARPS)
    of_likelihood = ({"BLOCK": likelihood.LIKELIHOOD_BLOCK}, likelihood.LIKELIHOOD_WARPS)
    of_squash = ({"BLOCK": appearance.SQUASH_BLOCK}, appearance.SQUASH_WARPS)
    packing = cells_triton._pack_kernel, {"BLOCK": cells_triton.PACK_BLOCK}, cells_triton.PACK_WARPS
    packed = {"forward_ptr": "*bf16", "backward_ptr": "*bf16"}
    others: list[tuple[str, Any, Mapping[str, Any], int]] = [
        ("packing", *packing),
        ("packing bf16", *packing),
        ("KL forward", kls._weighted_kls_kernel, *of_kl),
        ("KL backward", kls._weighted_kls_backward_kernel, rows_of_kl, kls.KL_WARPS),
        ("likelihood forward", likelihood._cross_entropy_kernel, *of_likelihood),
        ("likelihood backward", likelihood._cross_entropy_backward_kernel, *of_likelihood),
        ("normal forward", likelihood._normal_nll_kernel, *of_likelihood),
        ("normal backward", likelihood._normal_nll_backward_kernel, *of_likelihood),
        ("squash forward", appearance._squash_kernel, *of_squash),
        ("squash backward", appearance._squash_backward_kernel, *of_squash),
    ]  # fmt: skip
    for name, kernel, fixed, warps in others:
        yield Configuration(
            name=f"update {name}",
            kernel=kernel,
            types={"packing_ptr": "*i32", "floor": "fp32"} | (packed if "bf16" in name else {}),
            constants=dict(fixed),
            warps=warps,
            is_default=True,
        )


@cache
def configurations() -> list[Configuration]:
    """All configurations that ship."""
    scenes = [*scatter_configurations(), *compose_configurations()]
    operators = [*render_configurations(), *presence_configurations()]
    return [*operators, *cells_configurations(), *scenes]


def build(configuration: Configuration, target: GPUTarget) -> Build:
    """Compiles for `target`: pointers are aligned, and nothing is assumed of other numbers.

    A launch may know more, such as strides that are multiples of 16, and then build faster code.
    """
    names, types = configuration.kernel.arg_names, configuration.signature
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in configuration.constants.items()}
    pointers = [name for name, kind in types.items() if kind.startswith("*")]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    options = {"num_warps": configuration.warps}
    if configuration.most_registers and target.backend == "cuda":
        options["maxnreg"] = configuration.most_registers
    try:
        source = ASTSource(configuration.kernel, signature, constants, aligned)
        built = triton.compile(source, target=target, options=options)
    # whatever the compiler raises is this row's result, and the other rows still have to be tried
    except Exception as error:
        return Build(error=f"{type(error).__name__}: {error}")
    if target.backend == "hip":
        keys = (r"\.vgpr_count:\s*(\d+)", r"\.vgpr_spill_count:\s*(\d+)")
        registers, spills = (int(re.findall(key, built.asm["amdgcn"])[0]) for key in keys)
        shared = built.metadata.shared
        held = occupancy(target, registers, shared, configuration.warps)
        instructions = len(re.findall(r"^\t[a-z]\w+", built.asm["amdgcn"], re.MULTILINE))
        return Build(registers, spills, shared, held, instructions)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _output(_TOOLS / "cuobjdump", "-res-usage", file.name)
        assembly = _output(_TOOLS / "nvdisasm", "-c", file.name)
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    shared = max(built.metadata.shared, int(re.findall(r"SHARED:(\d+)", usage)[0]))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", assembly))
    instructions = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", assembly, re.MULTILINE))
    held = occupancy(target, registers, shared, configuration.warps)
    return Build(registers, spills, shared, held, instructions)


def occupancy(target: GPUTarget, registers: int, shared: int, warps: int) -> int:
    """Warps of programs of one kernel that a multiprocessor holds at once.

    Args:
        target: the GPU.
        registers: of a thread.
        shared: memory of a program, bytes, with what the driver reserves.
        warps: of a program.

    Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; for
    gfx942 AMD's CDNA 3 ISA guide: four SIMDs with 512 vector registers a lane, 64 KiB of LDS.
    """
    if target.backend == "hip":
        of_simd = min(8, 512 // max(8, -(-registers // 8) * 8))  # waves
        programs = 4 * of_simd // warps
        return warps * min(programs, 65536 // max(shared, 1))
    most_warps, most_programs, most_shared = _LIMITS[target.arch]
    of_warp = -(-registers * 32 // 256) * 256
    # warps are bound to one of four schedulers with 16,384 registers each
    held = 4 * (16384 // max(of_warp, 256))
    programs = min(most_programs, min(most_warps, held) // warps)
    return warps * min(programs, most_shared // max(-(-shared // 128) * 128, 1))


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _built(job: tuple[int, str]) -> Build:
    number, name = job
    return build(configurations()[number], TARGETS[name])


def main() -> int:
    """Builds and prints every row; 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--representative", action="store_true", help="only defaults, for sm_90")
    representative = parser.parse_args().representative
    targets = ["sm_90"] if representative else list(TARGETS)
    rows = [i for i, row in enumerate(configurations()) if row.is_default or not representative]
    jobs = [(row, target) for row in rows for target in targets]
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # every row is compiled, not looked up
        with ProcessPoolExecutor() as pool:
            for (row, target), result in zip(jobs, pool.map(_built, jobs), strict=True):
                configuration = configurations()[row]
                passes = result.passes(configuration)
                failures += not passes
                print(
                    f"{'ok' if passes else 'FAIL':4} {target:6} {configuration.name:45} "
                    f"registers {result.registers:3} spills {result.spills:3} "
                    f"shared {result.shared:6} warps {result.occupancy:2} "
                    f"instructions {result.instructions:5} {result.error}",
                    flush=True,
                )
    print(f"{failures} failed", file=sys.stderr)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
