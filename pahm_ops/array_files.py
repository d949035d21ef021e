"""Reading NumPy's .npy and .npz files. Every size is checked before memory is allocated for it."""

from __future__ import annotations

import io
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIMIT = 2**27
"""The default limit on the bytes of arrays in a file: 128 MiB."""

_HEADER_LIMIT = 4096
_HEADER = re.compile(
    rb"\s*\{\s*'descr': *'([<>|=]?(?:b1|[iu][1248]|f[248]))', *'fortran_order': *(True|False), *"
    rb"'shape': *\((|\d{1,15}(?:, *\d{1,15})*,?)\),?\s*\}\s*"
)
_PREAMBLES = {1: "<H", 2: "<I", 3: "<I"}


def read_npy(path: str | os.PathLike[str], limit: int = LIMIT) -> NDArray[Any]:
    """Read the array of a .npy file: numbers or booleans of any shape, in the file's dtype.

    Args:
        path: the file.
        limit: the most bytes that the file may have.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is not a complete .npy file, is larger than `limit`, or does not hold numbers.
    """
    content = _content(path, limit)
    try:
        return _array(content)
    except ValueError as error:
        raise ValueError(f"{path} is not a whole .npy file of numbers: {error}") from error


def read_npz(
    path: str | os.PathLike[str], names: Iterable[str] | None = None, limit: int = LIMIT
) -> dict[str, NDArray[Any]]:
    """Read the arrays of a .npz file by name: numbers or booleans of any shape, in the file's dtypes.

    Args:
        path: the file.
        names: the arrays to read, if the file has them; None for all.
        limit: the most bytes that these arrays may have together.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is not a complete .npz file, its arrays are larger than `limit`, or one of them
            is damaged or does not hold numbers.
    """
    wanted = None if names is None else {f"{name}.npy" for name in names}
    content = _content(path, limit)
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [m for m in archive.infolist() if wanted is None or m.filename in wanted]
            total = sum(member.file_size for member in members)
            if total > limit:
                raise ValueError(f"its arrays have {total} bytes, expected at most {limit}")
            for member in members:
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"{member.filename!r} is compressed in a way that NumPy does not use")
                name = member.filename.removesuffix(".npy")
                try:
                    # Reading checks the member's CRC and never returns more than file_size bytes.
                    arrays[name] = _array(archive.read(member))
                except ValueError as error:
                    raise ValueError(f"array {name!r}: {error}") from error
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole .npz file: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a .npz file of numbers: {error}") from error
    return arrays


def _content(path: str | os.PathLike[str], limit: int) -> bytes:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit + _HEADER_LIMIT:
            raise ValueError(f"{path} has {size} bytes, expected a file of arrays of at most {limit}")
        return file.read(size)


def _array(content: bytes) -> NDArray[Any]:
    """The array in the bytes of a .npy file."""
    if content[:6] != b"\x93NUMPY" or len(content) < 10:
        raise ValueError("it does not start as a .npy file")
    preamble = _PREAMBLES.get(content[6])
    if preamble is None:
        raise ValueError(f"its version {content[6]}.{content[7]} is unknown")
    start = 8 + struct.calcsize(preamble)
    length = int.from_bytes(content[8:start], "little")
    if length > _HEADER_LIMIT or start + length > len(content):
        raise ValueError(f"it announces a header of {length} bytes")
    dtype, fortran, shape = _header(content[start : start + length])
    data = content[start + length :]
    if dtype.itemsize * math.prod(shape) != len(data):
        raise ValueError(f"shape {shape} of {dtype} does not fit the {len(data)} bytes that follow")
    # frombuffer gives a read-only array, so copy it.
    flat = np.frombuffer(data, dtype).copy() if data else np.zeros(0, dtype)
    if dtype.kind == "b":  # The bytes in a file may have values other than 0 and 1.
        flat = flat.view(np.uint8) != 0
    return flat.reshape(shape, order="F" if fortran else "C")


def _header(text: bytes) -> tuple[np.dtype, bool, tuple[int, ...]]:
    found = _HEADER.fullmatch(text)
    if found is None:
        raise ValueError("its header is not that of an array of integers, floats or booleans")
    dtype, fortran, sizes = (group.decode() for group in found.groups())
    shape = tuple(int(size) for size in sizes.replace(",", " ").split())
    if len(shape) > 8 or math.prod(max(size, 1) for size in shape) >= 2**48:
        raise ValueError(f"shape {shape[:8]} is not one of an array in memory")
    return np.dtype(dtype), fortran == "True", shape
