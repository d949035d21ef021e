"""The Triton kernels, compiled for GPUs that are not here: what registers and machine code they come to."""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="no Triton here")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pahm_ops.triton import _tuning, mesh_pool, spiral_conv, vertex_sample  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100, 120)
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
Launch = tuple[Any, Any, dict[str, Any]]

pytestmark = pytest.mark.skipif(not (TOOLS / "nvdisasm").exists(), reason="this Triton is not for NVIDIA")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Launch]]:
    """What a function launches, its tensors without memory: (kernel, default configuration, arguments)."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found: list[Launch] = []

    def note(self: Any, grid: Any, candidates: Any, **arguments: Any) -> None:
        found.append((self.function, candidates[0], arguments))

    def launched(function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Launch]:
        found.clear()
        function(*arguments, **options)
        return list(found)

    monkeypatch.setattr(_tuning.Kernel, "launch", note)
    return launched


def source(function: Any, config: Any, arguments: dict[str, Any]) -> Any:
    """The kernel specialised as at a launch: numbers that are 1 or multiples of 16, whole vectors."""
    values = {**arguments, **config.kwargs}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constants, attributes)


def compiled(launch: Launch, architecture: int, folder: Path) -> str:
    """The kernel's machine code, once it is sure to need no memory for its registers."""
    function, config, arguments = launch
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.maxnreg}
    parameters = {parameter.name for parameter in function.params}
    options |= {name: value for name, value in config.kwargs.items() if name not in parameters}
    target = GPUTarget("cuda", architecture, 32)
    kernel = triton.compile(source(function, config, arguments), target=target, options=options)
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    usage = tool("cuobjdump", "-res-usage", file)
    assert re.findall(r"STACK:(\d+)", usage) == ["0"], (function.__name__, architecture, usage)
    code = tool("nvdisasm", "-c", file)
    spills = re.findall(r"\b(?:STL|LDL)\b.*", code)
    assert not spills, (function.__name__, architecture, spills)
    assert not lopsided(code), (function.__name__, architecture, lopsided(code))
    return code


def lopsided(code: str) -> list[str]:
    """Multiply-adds of what a butterfly shuffle brought.

    Of two lanes that do so, each rounds the other's product and not its own: their sums differ.
    """
    brought: set[int] = set()
    found = []
    for operation, operands in re.findall(
        r"^\s+/\*\w+\*/\s+(?:@\S+\s+)?([\w.]+)\s+([^;]*);", code, re.MULTILINE
    ):
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
        wide = operation.startswith("D")
        # What goes to no register (RZ, a predicate, memory) has sources alone.
        to = registers.pop(0) if re.match(r"R\d", operands) else None
        sources = {r + half for r in registers for half in range(1 + wide)} & brought
        if re.match("[FDH]FMA", operation) and sources:
            found.append(f"{operation} {operands}")
        if operation.startswith("SHFL.BFLY"):
            # SHFL has a predicate before the register that it writes.
            brought.add(registers[0] if to is None else to)
        elif to is not None:
            brought -= {to, to + wide}
            if operation == "MOV" and sources:
                brought.add(to)
    return found


def tool(name: str, *arguments: Any) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# spiral_conv

#: The product of matrices in machine code: of a warp, of a warp group (Hopper), of a block (Blackwell), of
#: float64.
PRODUCTS = {"HMMA", "HGMMA", "UTCHMMA", "DMMA"}
KINDS = {"float16": (HALF, False), "bfloat16": (BFLOAT, False), "tf32": (FLOAT, True)}
KINDS |= {"float32": (FLOAT, False), "float64": (DOUBLE, False)}


def products(kind: str, architecture: int, rows_of_tiles: int) -> set[str]:
    """What a kernel's default configuration comes to."""
    if kind == "float32":
        return set()
    if kind == "float64":
        return set() if architecture == 120 else {"DMMA"}
    large = {90: "HGMMA", 100: "UTCHMMA"} if rows_of_tiles >= 64 else {}
    return {large.get(architecture, "HMMA")}


def convolutions(
    launches: Callable[..., list[Launch]], kind: str, batch: int, channels: int, out_channels: int
) -> Iterator[Launch]:
    (dtype, tf32), vertices, length = KINDS[kind], 778, 9

    def table(*shape: int) -> Tensor:
        return meta(*shape, dtype=torch.int32)

    x, grad = (meta(batch, vertices, c, dtype=dtype) for c in (channels, out_channels))
    weight, bias = meta(out_channels, length * channels, dtype=dtype), meta(out_channels, dtype=dtype)
    tables = table(length, vertices), table(vertices * length + 1), table(vertices * length)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield from launches(spiral_conv.spiral_conv, x, *tables, weight, bias, 2 if tf32 else 3)
        yield from launches(spiral_conv.spiral_conv_input_grad, grad, *tables, weight, vertices)
        yield from launches(spiral_conv.spiral_conv_weight_grad, grad, x, *tables)
    finally:
        torch.set_float32_matmul_precision(before)


#: Every product on one architecture, tensor cores on all four, and a small batch.
QUICK = {(kind, 80, 32) for kind in KINDS}
QUICK |= {("float16", architecture, 32) for architecture in (90, 100, 120)}
QUICK |= {("tf32", 90, 32), ("float16", 80, 1)}


def slow_unless(quick: bool, *values: Any) -> Any:
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "architecture", "batch", "channels"),
    [
        slow_unless(
            channels == (64, 64) and (kind, architecture, batch) in QUICK,
            kind,
            architecture,
            batch,
            channels,
        )
        for kind in KINDS
        for architecture in ARCHITECTURES
        for batch in (32, 1)
        for channels in ((64, 64), (30, 30), (71, 71), (3, 64), (64, 3), (256, 128))
    ],
)
def test_spiral_conv_runs_on_tensor_cores_without_spilling(
    launches, tmp_path, kind, architecture, batch, channels
):
    found = 0
    for launch in convolutions(launches, kind, batch, *channels):
        code = compiled(launch, architecture, tmp_path)
        if "WIDEN" not in launch[2]:
            continue
        config = launch[1].kwargs
        by_weight = launch[0] is spiral_conv.kernels.weight_grad_kernel
        rows = config["BLOCK_O" if by_weight else "BLOCK_R"]
        used = set(re.findall(r"\b(\w+MMA)\b", code)) & PRODUCTS
        assert used == products(kind, architecture, rows), (launch[0].__name__, config, used)
        if kind == "tf32" and used == {"HMMA"}:
            assert "HMMA.1688.F32.TF32" in code
        found += 1
    assert found == 3


# mesh_pool and vertex_sample


@pytest.mark.parametrize(
    ("dtype", "architecture", "channels"),
    [
        slow_unless(
            channels in (24, 71) and architecture == (80 if dtype in (HALF, DOUBLE) else 120),
            dtype,
            architecture,
            channels,
        )
        for dtype in (HALF, BFLOAT, FLOAT, DOUBLE)
        for architecture in ARCHITECTURES
        for channels in (64, 24, 71, 3)
    ],
)
def test_mesh_pool_reads_whole_vectors(launches, tmp_path, dtype, architecture, channels):
    x = meta(32, 195, channels, dtype=dtype)
    pointers, columns = (meta(n, dtype=torch.int32) for n in (391, 1200))
    values = meta(1200, dtype=DOUBLE if dtype == DOUBLE else FLOAT)
    matrix = pointers, columns, values
    [launch] = launches(mesh_pool.mesh_pool, x, *matrix, *matrix)
    code = compiled(launch, architecture, tmp_path)
    if channels % 8 == 0:
        assert "LDG.E.128" in code and "STG.E.128" in code


@pytest.mark.parametrize(
    ("dtype", "architecture", "layout", "camera"),
    [
        slow_unless(
            (dtype, architecture, layout, camera) in ((HALF, 80, "last", 2), (FLOAT, 120, "nchw", 1)),
            dtype,
            architecture,
            layout,
            camera,
        )
        for dtype in (HALF, BFLOAT, FLOAT, DOUBLE)
        for architecture in ARCHITECTURES
        for layout in ("nchw", "last")
        for camera in (0, 1, 2)
    ],
)
def test_vertex_sample_reads_whole_vectors(launches, tmp_path, dtype, architecture, layout, camera):
    memory_format = torch.channels_last if layout == "last" else torch.contiguous_format
    maps = [meta(8, c, s, s, dtype=dtype).to(memory_format=memory_format) for c, s in ((24, 28), (71, 14))]
    vertices = meta(8, 778, 3 if camera else 2, dtype=dtype)
    given = [None, meta(8, 3, dtype=dtype), meta(8, 3, 3, dtype=dtype)][camera]
    arguments = maps, vertices, given, 224, 224, False, bool(camera)
    forward = launches(vertex_sample.vertex_sample, *arguments)
    grad = meta(8, 778, 95, dtype=dtype)
    backward = launches(vertex_sample.vertex_sample_backward, grad, *arguments, [True] * 4)
    assert len(forward) == 2 and len(backward) == 2 * 3 + 1
    for launch in [*forward, *backward]:
        code = compiled(launch, architecture, tmp_path)
        if layout == "last" and launch[2].get("map") is maps[0]:
            assert "LDG.E.128" in code, launch[0].__name__
