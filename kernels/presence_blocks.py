"""Block sizes and limits of the presence prior; imports no Triton."""

MAX_CELLS = 1024
"""Cells of an image in the Triton walk over relaxed samples: with more, it spills."""

_MAX_TABLE = 1024


def fits_table(num_cells: int) -> bool:
    """Whether the odds of hard samples come from a table of n^2 numbers, which images share.

    For more cells, and in Triton, the odds of each cell are summed by themselves: a table of the
    62,500 cells of an image of 3000 x 3000 pixels would take 31 GB.
    """
    return num_cells <= _MAX_TABLE


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
