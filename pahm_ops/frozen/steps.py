"""The steps that the kernels of csrc/cpu/frozen.cpp know, and how a program spells them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

from torch import Tensor

from pahm_ops.frozen.constants import Place
from pahm_ops.frozen.tape import Value

KINDS = [
    "product",
    "depthwise",
    "max_pool",
    "pad",
    "upsample",
    "norm",
    "elementwise",
    "sparse_product",
    "attention",
    "sample",
    "winograd",
    "soft_argmax",
]
ACTIVATIONS = {"none": 0, "relu": 1, "elu": 2, "gelu": 3, "relu6": 4, "silu": 5}
BEFORE, AFTER = 1, 2  # where a product adds its residual: before or after its activation
NONE = -1

Fields = list[int]


@dataclass(eq=False)
class Buffer:
    """Working memory of a step that is no tensor of the module."""

    size: int
    """In floats."""


Held = Value | Buffer
"""What the workspace holds."""


@dataclass(eq=False)
class Step:
    """Computes `output` from `reads`, with working memory of its own."""

    kind: str
    reads: Sequence[Held]
    output: Held
    spell: Callable[[Callable[[Held], int]], Fields]
    """The fields after the kind, given where in the workspace a value lies."""
    scratch: list[Buffer] = field(default_factory=list)

    def fields(self, offset: Callable[[Held], int]) -> Fields:
        return [KINDS.index(self.kind), *self.spell(offset)]


def channels(value: Value | Tensor) -> int:
    """Of a map `(B, C, H, W)`, of vertices `(B, N, C)` or of features `(B, C)`."""
    return value.shape[1] if len(value.shape) == 4 else value.shape[-1]


def size(value: Held) -> int:
    return value.size if isinstance(value, Buffer) else prod(value.shape)


def row_count(value: Value) -> int:
    return size(value) // channels(value)


def real(number: float) -> int:
    """The bits of a float64."""
    (bits,) = struct.unpack("<q", struct.pack("<d", number))
    return int(bits)


def rows(offset: int, stride: int) -> Fields:
    """Rows in the workspace."""
    return [0, offset, stride]


NO_ROWS: Fields = [NONE, NONE, NONE]
NO_TABLE: Fields = [NONE, NONE]


@dataclass
class Source:
    """Some of the inputs of a product, see ProductSource in csrc/cpu/frozen_shared.h."""

    held: Held | Place
    """A place holds a constant."""
    rows: int
    channels: int
    stride: int
    table: Place | None = None

    def fields(self, offset: Callable[[Held], int]) -> Fields:
        table = NO_TABLE if self.table is None else list(self.table)
        place = self.held if isinstance(self.held, Place) else Place(0, offset(self.held))
        return [self.rows, self.channels, *place, self.stride, *table]


def product_step(
    output: Value,
    sources: list[Source],
    *,
    batch: int,
    weight: Place,
    bias: Place,
    zeros: Place,
    activation: str = "none",
    residual: Value | None = None,
    mode: int = 0,
) -> Step:
    """`batch` items with as many rows each as `output` has in all, divided by `batch`."""
    width = channels(output)

    def spell(offset: Callable[[Held], int]) -> Fields:
        added = NO_ROWS if residual is None else rows(offset(residual), width)
        fields = [batch, row_count(output) // batch, width, ACTIVATIONS[activation]]
        fields += [*rows(offset(output), width), mode if residual is not None else 0, *added, len(sources)]
        for source in sources:
            fields += source.fields(offset)
        return [*fields, *weight, *bias, *zeros]

    reads = [source.held for source in sources if not isinstance(source.held, Place)]
    reads += [] if residual is None else [residual]
    return Step("product", reads, output, spell)


def winograd_block(count: int) -> int:
    """Tiles that are computed at once, as in csrc/cpu/frozen_shared.h."""
    return min(24, max(6, 8192 // count))


def winograd_step(
    source: Value,
    output: Value,
    *,
    weight: Place,
    bias: Place,
    zeros: Place,
    activation: str,
    residual: Value | None,
    mode: int,
    threads: int,
) -> Step:
    batch, inputs, height, width = source.shape
    outputs = channels(output)
    scratch = Buffer(threads * 16 * winograd_block(inputs) * (inputs + 32))

    def spell(offset: Callable[[Held], int]) -> Fields:
        added = NO_ROWS if residual is None else rows(offset(residual), outputs)
        fields = [batch, height, width, inputs, outputs, ACTIVATIONS[activation]]
        fields += [*rows(offset(source), inputs), *rows(offset(output), outputs)]
        fields += [mode if residual is not None else 0, *added, *weight, *bias, *zeros]
        return [*fields, threads, 0, offset(scratch)]

    reads = [source] + ([] if residual is None else [residual])
    return Step("winograd", reads, output, spell, [scratch])


def map_step(kind: str, source: Held, shape: tuple[int, ...], output: Held, extra: Fields) -> Step:
    """A step on maps. shape: batch, height, width, channels, height and width of the output."""
    width = shape[3]

    def spell(offset: Callable[[Held], int]) -> Fields:
        return [*shape, *rows(offset(source), width), *rows(offset(output), width), *extra]

    return Step(kind, [source], output, spell)


def norm_step(source: Value, output: Value, epsilon: float, gamma: Place, beta: Place) -> Step:
    width = channels(source)

    def spell(offset: Callable[[Held], int]) -> Fields:
        before = [row_count(source), width, real(epsilon), *rows(offset(source), width)]
        return [*before, *gamma, *beta, *rows(offset(output), width)]

    return Step("norm", [source], output, spell)


def elementwise_step(
    source: Value, output: Value, *, scale: float = 1.0, added: Value | None = None, activation: str = "none"
) -> Step:
    # Rows of 3 channels would waste the vectors.
    width = 1024 if size(source) % 1024 == 0 else channels(source)
    if size(source) <= 1 << 14:
        width = size(source)

    def spell(offset: Callable[[Held], int]) -> Fields:
        other = NO_ROWS if added is None else rows(offset(added), width)
        before = [size(source) // width, width, real(scale), *rows(offset(source), width), *other]
        return [*before, ACTIVATIONS[activation], *rows(offset(output), width)]

    return Step("elementwise", [source] + ([] if added is None else [added]), output, spell)


def soft_argmax_step(source: Value, output: Value, places: Place) -> Step:
    """source: a map; places: (2, pixels); output: `(B, C, 2)`."""
    batch, width, pixels = source.shape[0], channels(source), size(source) // source.shape[0]

    def spell(offset: Callable[[Held], int]) -> Fields:
        shape = [batch, pixels // width, width]
        return [*shape, *rows(offset(source), width), *places, *rows(offset(output), 2)]

    return Step("soft_argmax", [source], output, spell)


def sparse_product_step(
    source: Value, output: Value, pointers: Place, columns: Place, values: Place, entries: int
) -> Step:
    """source: vertices or a map, each of whose pixels is a row."""
    width, batch = channels(source), source.shape[0]

    def spell(offset: Callable[[Held], int]) -> Fields:
        before = [batch, row_count(source) // batch, row_count(output) // batch, width, entries]
        tables = [*pointers, *columns, *values]
        return [*before, *tables, *rows(offset(source), width), *rows(offset(output), width)]

    return Step("sparse_product", [source], output, spell)


def attention_step(packed: Value, output: Value, heads: int, scale: float) -> Step:
    """packed: `(B, N, 3 * heads * D)`, queries, keys and values side by side."""
    batch, vertices, width = output.shape
    each = width // heads
    floats = (vertices + 32) * (each + 32) * 2 + 16 * (vertices + 32)
    scratch = Buffer(batch * heads * floats)

    def spell(offset: Callable[[Held], int]) -> Fields:
        fields = [batch, vertices, heads, each, real(scale)]
        for i in range(3):
            fields += rows(offset(packed) + i * width, 3 * width)
        return [*fields, 0, offset(scratch), *rows(offset(output), width)]

    return Step("attention", [packed], output, spell, [scratch])


def sample_step(
    maps: list[Value],
    points: Value,
    camera: Value | None,
    output: Value,
    *,
    align_corners: bool,
    border: bool,
    zeros: Place,
) -> Step:
    def spell(offset: Callable[[Held], int]) -> Fields:
        fields = [points.shape[0], points.shape[1], len(maps)]
        for value in maps:
            _, width, height, columns = value.shape
            fields += [height, columns, width, *rows(offset(value), width)]
        fields += [int(camera is not None), *rows(offset(points), channels(points))]
        fields += NO_ROWS if camera is None else rows(offset(camera), 3)
        return [*fields, int(align_corners), int(border), *zeros, *rows(offset(output), channels(output))]

    return Step("sample", [*maps, points] + ([] if camera is None else [camera]), output, spell)
