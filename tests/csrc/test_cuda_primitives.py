"""The half of csrc/kernels/device.cuh that only nvcc sees, instruction by instruction.

tests/simt/primitives.cu has a kernel for each primitive. Its stores, atomics and barriers are read off its
PTX, their operands followed back to the kernel's parameters, p0, p1, ... Loads, stores and shuffles move
bits: their types are left out (`ld.global.32`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from functools import cache

import pytest
import torch
from repository import ROOT

#: instructions that are no values alone
EFFECTS = ("st.", "atom.", "red.", "bar.", "barrier.")


@cache
def kernels() -> dict[str, list[str]]:
    """The PTX of each kernel, an instruction an entry."""
    spec = importlib.util.spec_from_file_location("build_tools_cuda", ROOT / "build_tools" / "cuda.py")
    assert spec is not None and spec.loader is not None
    cuda = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = cuda  # dataclasses look it up
    spec.loader.exec_module(cuda)
    try:
        nvcc = cuda.find(torch.version.cuda, os.environ).nvcc
    except cuda.Skip as reason:
        pytest.skip(f"no nvcc here: {reason}")
    done = subprocess.run(
        [nvcc, "-ptx", "-std=c++17", "-arch=sm_90", "-I", "csrc", "tests/simt/primitives.cu", "-o", "-"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    text = re.sub(r"//.*", "", done.stdout)
    found = re.findall(r"\.entry (\w+)\(.*?\)\s*\{(.*?)^\}", text, re.DOTALL | re.MULTILINE)
    # Inline assembly has braces of its own around an instruction.
    return {
        name: [part.strip().removeprefix("{").strip() for part in re.split(r"[;\n]\}?", body)]
        for name, body in found
    }


def untyped(op: str) -> str:
    """ "ld.global.32" for "ld.global.u32": loads, stores, moves and shuffles only move bits."""
    return re.sub(r"\.[busf](\d+)$", r".\1", op) if re.match(r"(ld|st|mov|shfl)\.", op) else op


class Reader:
    """Follows the registers of a kernel back to its parameters."""

    def __init__(self, kernel: str) -> None:
        self.values: dict[str, str] = {}
        self.effects: list[str] = []
        for line in kernels()[kernel]:
            self.read(line, kernel)

    def value(self, operand: str) -> str:
        operand = operand.strip()
        if match := re.fullmatch(r"\[(.+?)(\+\d+)?\]", operand):
            return f"[{self.value(match[1])}{match[2] or ''}]"
        if operand.startswith("{"):
            return "{" + ", ".join(self.value(part) for part in operand[1:-1].split(",")) + "}"
        if re.fullmatch(r"_ZZ\w+array|pahm_dynamic_shared", operand):
            return "array"
        return self.values.get(operand, operand)

    def read(self, line: str, kernel: str) -> None:
        if not line or line.startswith(".") or line == "ret":
            return
        assert not line.startswith("@"), f"a branch in {kernel}: {line}"
        op, _, rest = line.partition(" ")
        operands = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
        if op.startswith(EFFECTS):
            # What an atomic gives is used by no primitive.
            given = operands[1:] if op.startswith("atom.") else operands
            self.effects.append(f"{untyped(op)} {', '.join(map(self.value, given))}")
            return
        target, sources = operands[0], [self.value(o) for o in operands[1:]]
        if op.startswith("ld.param"):
            number = re.fullmatch(rf"\[{kernel}_param_(\d+)\]", sources[0])
            assert number is not None, line
            result = f"p{number[1]}"
        elif op.startswith(("cvta.", "mov.")):
            result = sources[0]
        else:
            result = f"{untyped(op)}({', '.join(sources)})"
        if target.startswith("{"):
            for i, part in enumerate(target[1:-1].split(",")):
                self.values[part.strip()] = f"{result}.{'xyzw'[i]}"
        else:
            self.values[target.partition("|")[0]] = result


def test_every_primitive_is_looked_at():
    half = (ROOT / "csrc/kernels/device.cuh").read_text().split("#if defined(__CUDACC__)")[-1]
    primitives = set(re.findall(r"__device__ __forceinline__ \w+(?:<.*>)? (\w+)\(", half))
    assert {"load", "store", "shuffle", "shared_atomic_max", "from_float", "load_shared"} <= primitives
    assert primitives <= set(re.findall(r"\w+", (ROOT / "tests/simt/primitives.cu").read_text()))
    assert set(kernels()) == {*EXPECTED, "located_float", "located_double"}


WIDE = "ld.global.nc.v4.32([p1])"
BYTES_16 = ["st.global.v4.32 [p0], {" + ", ".join(f"{WIDE}.{part}" for part in "xyzw") + "}"]
AT_4 = "add.s32(array, shl.b32({}, 2))"
EXPECTED = {
    # 16 bytes by way of the read-only cache, others not
    "load_16": BYTES_16,
    "load_16_halves": BYTES_16,
    "load_8": ["st.global.64 [p0], ld.global.64([p1])"],
    "load_4": ["st.global.32 [p0], ld.global.32([p1])"],
    "load_2": ["st.global.16 [p0], ld.global.16([p1])"],
    "add_float": ["atom.global.add.f32 [p0], p1"],
    "add_double": ["atom.global.add.f64 [p0], p1"],
    "add_int": ["atom.global.add.u32 [p0], p1"],
    # to the nearest, even
    "widen_half": ["st.global.32 [p0], cvt.f32.f16(p1)"],
    "widen_bfloat16": ["st.global.32 [p0], cvt.f32.bf16(p1)"],
    "narrow_half": ["st.global.16 [p0], cvt.rn.f16.f32(p1)"],
    "narrow_bfloat16": ["st.global.16 [p0], cvt.rn.bf16.f32(p1)"],
    "keep_float": ["st.global.32 [p0], p1"],
    "keep_double": ["st.global.64 [p0], p1"],
    # element 17 of an array from element 4 * p1 or 2 * p1 on: 68 bytes
    "shared_16": [
        "st.shared.v4.32 [add.s32(array, shl.b32(p1, 4))], {1065353216, 1073741824, 1077936128, 1082130432}",
        "bar.sync 0",
        "st.global.32 [p0], ld.shared.32([add.s32(array, shl.b32(p1, 4))+68])",
    ],
    "shared_8": [
        "st.shared.v2.32 [add.s32(array, shl.b32(p1, 3))], {0f3F800000, 0f40000000}",
        "bar.sync 0",
        "st.global.32 [p0], ld.shared.32([add.s32(array, shl.b32(p1, 3))+68])",
    ],
    "shared_min": [f"atom.shared.min.s32 [{AT_4.format('p0')}], p1"],
    "shared_max": [f"atom.shared.max.s32 [{AT_4.format('p0')}], p1"],
    # value, lane, all 32 lanes, mask
    "shuffle_float": ["st.global.32 [p0], shfl.sync.idx.32(p2, p3, 31, p1)"],
    "shuffle_double": [
        "st.global.64 [p0], {shfl.sync.idx.32(p2.x, p3, 31, p1), shfl.sync.idx.32(p2.y, p3, 31, p1)}"
    ],
    "shuffle_xor_float": ["st.global.32 [p0], shfl.sync.bfly.32(p2, p3, 31, p1)"],
    "ballot_of": ["st.global.32 [p0], vote.sync.ballot.b32(setp.gt.s32(p2, 5), p1)"],
    "barriers": ["bar.sync 0", "bar.warp.sync p0"],
    # rounded, so that no sum takes it in
    "product_of_floats": ["st.global.32 [p0], add.f32(mul.rn.f32(p1, p2), p1)"],
    "product_of_doubles": ["st.global.64 [p0], add.f64(mul.rn.f64(p1, p2), p1)"],
    # one comparison an index
    "index_is": ["st.global.32 [p0], selp.b32(7, 9, setp.lt.u32(p1, p2))"],
    "bound_is": ["st.global.32 [p0], min.u32(p1, p2)"],
}


@pytest.mark.parametrize("kernel", EXPECTED)
def test_a_primitive_is_the_instruction_that_it_should_be(kernel):
    assert Reader(kernel).effects == EXPECTED[kernel]


@pytest.mark.parametrize("type", ["f32", "f64"])
def test_the_place_of_a_vertex_is_the_same_in_every_kernel(type):
    """Its products are rounded, and can be fused with a sum in none; but for halves, which are exact."""
    kernel = kernels()[{"f32": "located_float", "f64": "located_double"}[type]]
    half = {"f32": "0f3F000000", "f64": "0d3FE0000000000000"}[type]
    assert sum(line.startswith(f"mul.rn.{type}") for line in kernel) >= 9 + 2 + 1 + 2
    fusible = [line for line in kernel if re.match(rf"(mul|fma\.rn)\.{type}", line)]
    assert [line for line in fusible if half not in line] == []
