"""What the compiler made of the CUDA kernels, read off the machine code of the compiled library."""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from pahm_ops import _library

LIBRARY = _library._find("_cuda")
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no CUDA library was compiled")

#: bytes a multiprocessor has of shared memory, and its threads (CUDA C++ programming guide)
PROCESSORS = {
    "75": (64, 1024),
    "80": (164, 2048),
    "86": (100, 1536),
    "89": (100, 1536),
    "90": (228, 2048),
    "100": (228, 2048),
    "120": (100, 1536),
}
#: threads of a block, blocks that fit on a multiprocessor at least
BUDGETS = {
    "mesh_pool_kernel": (256, 4),
    "sample_pixels_kernel": (256, 4),
    "sample_planes_kernel": (256, 3),
    "sort_vertices_kernel": (256, 4),
    "merge_vertices_kernel": (256, 4),
    "pixel_grads_kernel": (256, 4),
    "plane_grads_kernel": (256, 2),
    "point_grads_kernel": (256, 2),
    "tile_product_kernel": (128, 2),
    "add_splits_kernel": (256, 4),
    "nothing": (1, 1),
}
DTYPES = {"f": 4, "d": 8, "6__half": 2, "13__nv_bfloat16": 2}


def tool() -> str:
    """cuobjdump, of the CUDA toolkit or of Triton."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.exists():
            return str(path)
    found = shutil.which("cuobjdump")
    if found is None:
        pytest.skip("no cuobjdump here")
    return found


def dump(*options: str) -> str:
    done = subprocess.run([tool(), *options, str(LIBRARY)], capture_output=True, text=True, check=True)
    return done.stdout


class Use(NamedTuple):
    arch: str
    name: str
    registers: int
    stack: int
    local: int
    shared: int


@cache
def uses() -> list[Use]:
    found, arch = [], ""
    name = ""
    for line in dump("--dump-resource-usage").splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found.append(Use(arch, name, registers, stack, local, shared))
    return found


def kernel(name: str) -> str:
    return next(k for k in BUDGETS if k in name)


def archs() -> list[str]:
    return sorted({use.arch for use in uses()}, key=int)


def test_every_kernel_is_there_for_every_architecture():
    by_arch = {arch: {use.name for use in uses() if use.arch == arch} for arch in archs()}
    assert all(names == by_arch[archs()[0]] for names in by_arch.values())
    assert {kernel(name) for name in by_arch[archs()[0]]} == set(BUDGETS)
    for dtype in DTYPES:
        assert any(f"mesh_pool_kernelI{dtype}" in name for name in by_arch[archs()[0]])


def test_nothing_spills_and_nothing_has_a_stack():
    assert [use for use in uses() if use.stack or use.local] == []


def test_registers_and_shared_memory_let_enough_blocks_run():
    for use in uses():
        threads, wanted = BUDGETS[kernel(use.name)]
        kilobytes, most_threads = PROCESSORS[use.arch]
        # Registers are given out to warps in units of 256; a block's shared memory costs 1 KiB more.
        warps = -(-threads // 32)
        by_registers = 65536 // (-(-use.registers * 32 // 256) * 256 * warps)
        by_shared = kilobytes * 1024 // (use.shared + 1024)
        blocks = min(by_registers, by_shared, most_threads // threads)
        assert blocks >= wanted, f"{use}: {blocks} blocks of {threads} threads"


def functions(arch: str) -> Iterator[tuple[str, str]]:
    for part in dump("-sass", "-arch", f"sm_{arch}").split("Function : ")[1:]:
        name, code = part.split("\n", 1)
        yield name, code


def is_wide(name: str) -> bool | None:
    """Whether a kernel was made for 16 bytes at a time; None where it is not said."""
    # A pool's kernel also names the type of its matrix.
    match = re.search(r"I(f|d|6__half|13__nv_bfloat16)(?:EE|f|d)?Li(\d+)E", name)
    return None if match is None else DTYPES[match[1]] * int(match[2]) == 16


# Of the same source: two architectures stand for all in the quick run.
@pytest.mark.parametrize(
    "arch",
    [pytest.param(arch, marks=() if arch in ("80", "120") else pytest.mark.slow) for arch in PROCESSORS],
)
def test_wide_kernels_move_16_bytes_at_a_time(arch):
    if arch not in archs():
        pytest.skip(f"the library has no code for sm_{arch}")
    seen = 0
    for name, code in functions(arch):
        wide = is_wide(name)
        if not wide:
            continue
        loads = len(re.findall(r"LDG\.E\.(?:\w+\.)*128", code))
        stores = len(re.findall(r"STG\.E\.(?:\w+\.)*128", code))
        seen += 1
        assert loads > 0, name
        if kernel(name) in ("mesh_pool_kernel", "sample_pixels_kernel", "pixel_grads_kernel"):
            assert stores > 0, name
        if kernel(name) == "tile_product_kernel":
            assert re.search(r"LDS\.(?:\w+\.)*128", code) and re.search(r"\b(FFMA|DFMA|FFMA2)\b", code), name
    assert seen >= 4 * (2 + 1 + 2 + 6)
