"""How Triton's walk over relaxed samples is cut into blocks; needs no Triton to say."""

MAX_CELLS = 1024
"""Of one image, for Triton: with more, odds of the table overflow and counts do not fit a walk."""


def walk_block(num_cells: int) -> tuple[int, int, int]:
    """Counts (a power of two above n), cells a block and warps of the Triton walk.

    The product of the first two over 32 times the third is at most 8: more spills registers.
    """
    if num_cells <= 31:
        return 32, 8, 2
    if num_cells <= 127:
        return 128, 8, 4
    if num_cells <= 255:
        return 256, 8, 8
    if num_cells <= 511:
        return 512, 4, 8
    if num_cells <= 1023:
        return 1024, 2, 16
    return 2048, 1, 8


def saved_shape(num_images: int, num_cells: int) -> tuple[int, int, int]:
    """Of what the Triton walk leaves for the way back: the log-weights before each block."""
    num_counts, block, _ = walk_block(num_cells)
    return num_images, (num_cells + block - 1) // block, num_counts
