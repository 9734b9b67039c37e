"""Block sizes of the Triton walk over relaxed samples, for callers without Triton too."""

MAX_CELLS = 1024
"""Cells of an image in Triton: with more, the table of odds overflows and a walk spills."""


def walk_block(num_cells: int) -> tuple[int, int, int]:
    """Counts (a power of two above n), cells of a block, and warps of the Triton walk.

    The product of the first two over 32 times the third is at most 8: more spills registers.
    """
    for counts, block, warps in ((32, 8, 2), (128, 8, 4), (256, 8, 8), (512, 4, 8), (1024, 2, 16)):
        if num_cells < counts:
            return counts, block, warps
    return 2048, 1, 8


def saved_shape(num_images: int, num_cells: int) -> tuple[int, int, int]:
    """Shape of the log-weights before each block, which the Triton walk saves for its backward."""
    num_counts, block, _ = walk_block(num_cells)
    return num_images, (num_cells + block - 1) // block, num_counts
