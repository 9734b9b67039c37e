"""TIFF's variant of LZW: most significant bit first, and codes that grow one entry early.

tifffile decodes LZW only with imagecodecs, an installation of 80 MB, and Pillow only through
libtiff, which writes to stderr.
"""

import numpy as np

from spairkit.kernels.threads import compiled

_CLEAR, _END, _FIRST = 256, 257, 258
_BITS = 9, 12
_ENTRIES = 4096


@compiled
def decode(
    data,  # [n] uint8
    out,  # [m] uint8, written
):
    """The number of bytes written, at most m; -1 where `data` holds an impossible code."""
    # an entry is the place of its string in `out`, as each string was written there before
    start, length = np.zeros(_ENTRIES, np.int64), np.zeros(_ENTRIES, np.int64)
    following, width = _FIRST, _BITS[0]
    before, before_length = 0, 0  # the string of the last code
    bits, num_bits, position = 0, 0, 0
    for byte in data:
        bits = ((bits << 8) | int(byte)) & 0xFFFFFF
        num_bits += 8
        if num_bits < width:
            continue
        num_bits -= width
        code = (bits >> num_bits) & ((1 << width) - 1)
        if code == _CLEAR:
            following, width, before_length = _FIRST, _BITS[0], 0
            continue
        if code == _END:
            break
        if before_length > 0 and following < _ENTRIES:
            start[following], length[following] = before, before_length + 1
            following += 1
            if following == (1 << width) - 1 and width < _BITS[1]:
                width += 1
        if code >= following:
            return -1
        source, count = position, 1
        if code >= _FIRST:
            source, count = start[code], length[code]
        elif position < len(out):
            out[position] = code
        count = min(count, len(out) - position)
        if code >= _FIRST:
            for i in range(count):  # forwards: the source may end inside of what is written
                out[position + i] = out[source + i]
        before, before_length = position, count
        position += count
        if position == len(out):
            break
    return position
