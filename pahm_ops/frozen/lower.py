"""From a tape to the steps that the kernels know. What they do not know stays a call of PyTorch.

A convolution takes the normalisation, the activation and the sum that follow it into its own step, and reads
concatenated or padded inputs from where they were before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pahm_ops.frozen.constants import Constants, Place
from pahm_ops.frozen.match import (
    PackedAttention,
    activation_of,
    added_by,
    are_constants,
    is_depthwise,
    is_float,
    is_norm,
    is_product,
    packed_attention,
    pair,
    reads_padded,
    sees_pixels,
    soft_argmax,
)
from pahm_ops.frozen.steps import (
    ACTIVATIONS,
    AFTER,
    BEFORE,
    Buffer,
    Source,
    Step,
    attention_step,
    channels,
    elementwise_step,
    map_step,
    norm_step,
    product_step,
    row_count,
    sample_step,
    soft_argmax_step,
    sparse_product_step,
    winograd_step,
)
from pahm_ops.frozen.tape import Node, Tape, Value
from pahm_ops.frozen.weights import fold, tap_tables, winograd

aten = torch.ops.aten
_FEW_CHANNELS = 8  # a kernel's row of so few channels is read as one source


def lower(tape: Tape, constants: Constants) -> list[Step | Node]:
    """Steps, and nodes that no step covers, in an order in which they can run."""
    return _Lowering(tape, constants).units


class _Tail:
    """What follows a product and belongs to its step: its last value, and what is done on the way there."""

    def __init__(self, value: Value, activation: str = "none") -> None:
        self.value = value
        self.activation = activation
        self.norm: Node | None = None
        self.residual: Value | None = None
        self.mode = 0


class _Lowering:
    def __init__(self, tape: Tape, constants: Constants) -> None:
        self.constants = constants
        self.covered: set[Node] = set()
        self.units: list[Step | Node] = []
        self.attention: dict[Node, PackedAttention] = {}
        self.in_steps: set[Value] = set()
        self.virtual: set[Value] = set()  # concatenated or padded where they are read
        for node in tape.nodes:
            if (found := packed_attention(node)) is not None:
                self.attention[node] = found
                self.covered.update(found.views)
        handlers = _handlers()
        for node in tape.nodes:
            if node in self.covered:
                continue
            handler = handlers.get(node.op)
            steps = None if handler is None or not is_float(node) else handler(self, node)
            self.covered.add(node)
            self.units += [node] if steps is None else steps
            self.in_steps.update(
                step.output
                for step in steps or []
                if isinstance(step, Step) and isinstance(step.output, Value)
            )

    # ---- products ----

    def convolution(self, node: Node) -> list[Step] | None:
        x, weight = node.args[:2]
        bias, stride = node.argument(2), pair(node.argument(3, [1, 1]))
        padding, dilation = pair(node.argument(4, [0, 0])), pair(node.argument(5, [1, 1]))
        groups = node.argument(6, 1)
        if not is_product(node):
            return None
        x, top, left, bottom, right = self._unpadded(x)
        pads = (padding[0] + top, padding[1] + left, padding[0] + bottom, padding[1] + right)
        if groups == 1:
            return self._dense(node, x, weight, bias, stride, pads, dilation)
        if is_depthwise(node, x, pads):
            return [self._depthwise(node, x, weight, bias, stride, pads)]
        return None

    def _dense(
        self,
        node: Node,
        x: Value,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        pads: tuple[int, int, int, int],
        dilation: tuple[int, int],
    ) -> list[Step]:
        tail = self._tail(node, node.outputs)
        parts = self._parts(x)
        if len(parts) == 1 and isinstance(parts[0], Value):
            x = parts[0]
        batch, _, height, width = x.shape
        out_height, out_width = node.outputs.shape[2:]
        kernel = tuple(weight.shape[2:])
        folded, offset = fold(weight, bias, tail.norm)
        steps: list[Step] = []
        # Weights (outputs, taps, inputs): the sources follow in this order.
        by_tap = folded.permute(0, 2, 3, 1).flatten(1, 2)
        if kernel == (1, 1) and stride == (1, 1) and not any(pads):
            pixels = batch * height * width
            sources = [self._source(part, pixels) for part in parts]
            batch = 1
        elif channels(x) < _FEW_CHANNELS and kernel[1] > 1 and dilation == (1, 1) and len(parts) == 1:
            sources = self._rows_of_kernel(steps, x, kernel, stride, pads, (out_height, out_width))
        elif self._suits_winograd(x, parts, kernel, stride, pads, dilation):
            return [self._winograd(tail, x, folded, offset, (weight, bias))]
        else:
            tables = tap_tables((height, width), (out_height, out_width), kernel, stride, pads[:2], dilation)
            places = [self.constants.table(table) for table in tables]
            sources = [self._source(part, height * width, place) for place in places for part in parts]
        matrix = by_tap.flatten(1)
        return [*steps, self._product(tail, sources, batch, (weight, bias), matrix, offset)]

    def _suits_winograd(
        self,
        x: Value,
        parts: list[Value | Tensor],
        kernel: tuple[int, ...],
        stride: tuple[int, int],
        pads: tuple[int, int, int, int],
        dilation: tuple[int, int],
    ) -> bool:
        """Whether tiles of 2 x 2 pixels save a third of the multiplications or more."""
        height, width = x.shape[2:]
        fits = kernel == (3, 3) and stride == dilation == (1, 1) and pads == (1, 1, 1, 1) and len(parts) == 1
        tiles = -(-height // 2) * -(-width // 2)
        return fits and channels(x) % 16 == 0 and 9 * height * width >= 1.5 * 16 * tiles

    def _winograd(
        self, tail: _Tail, x: Value, weight: Tensor, bias: Tensor, key: tuple[Tensor | None, ...]
    ) -> Step:
        norm = () if tail.norm is None else tail.norm.args[1:5]
        places = self.constants.product(("winograd", *key, *norm), winograd(weight), bias)
        return winograd_step(
            x,
            tail.value,
            weight=places[0],
            bias=places[1],
            zeros=self.constants.zeros(channels(x)),
            activation=tail.activation,
            residual=tail.residual,
            mode=tail.mode,
            threads=torch.get_num_threads(),
        )

    def _rows_of_kernel(
        self,
        steps: list[Step],
        x: Value,
        kernel: tuple[int, ...],
        stride: tuple[int, int],
        pads: tuple[int, int, int, int],
        out: tuple[int, int],
    ) -> list[Source]:
        """A source for each row of the kernel: the pixels under it are adjacent, once the map is padded."""
        batch, count, height, width = x.shape
        padded = (height + pads[0] + pads[2], width + pads[1] + pads[3])
        # A source's rows begin at every pixel, so that the last ones reach beyond the map.
        held = Buffer((batch * padded[0] * padded[1] + kernel[1] - 1) * count)
        shape = (batch, height, width, count, *padded)
        steps.append(map_step("pad", x, shape, held, [pads[0], pads[1]]))
        height, width = padded
        rows, columns = torch.meshgrid(
            torch.arange(out[0]) * stride[0], torch.arange(out[1]) * stride[1], indexing="ij"
        )
        return [
            Source(
                held,
                height * width,
                kernel[1] * count,
                count,
                self.constants.table(((rows + ky) * width + columns).flatten().to(torch.int32)),
            )
            for ky in range(kernel[0])
        ]

    def linear(self, node: Node) -> list[Step] | None:
        x, weight, bias = node.args[0], node.args[1], node.argument(2)
        if not is_product(node):
            return None
        tail = self._tail(node, node.outputs)
        count = row_count(x)
        sources = [self._source(part, count) for part in self._parts(x)]
        return [self._product(tail, sources, 1, (weight, bias), weight, bias)]

    def spiral(self, node: Node) -> list[Step] | None:
        x, table, _, _, weight, bias, activation = node.args
        if not isinstance(x, Value) or any(isinstance(part, Value) for part in (table, weight, bias)):
            return None
        name = {number: name for name, number in ACTIVATIONS.items()}[activation]
        tail = self._tail(node, node.outputs, name)
        sources = [self._source(x, x.shape[1], self.constants.table(row)) for row in table]
        return [self._product(tail, sources, x.shape[0], (weight, bias), weight, bias)]

    def _product(
        self,
        tail: _Tail,
        sources: list[Source],
        batch: int,
        key: tuple[Tensor | None, ...],
        weight: Tensor,
        bias: Tensor | None,
    ) -> Step:
        norm = () if tail.norm is None else tail.norm.args[1:5]
        places = self.constants.product((*key, *norm), weight, bias)
        return product_step(
            tail.value,
            sources,
            batch=batch,
            weight=places[0],
            bias=places[1],
            zeros=self.constants.zeros(max(source.channels for source in sources)),
            activation=tail.activation,
            residual=tail.residual,
            mode=tail.mode,
        )

    def _tail(self, start: Node, value: Value, activation: str = "none", residuals: bool = True) -> _Tail:
        """Covers the nodes that follow `start` as long as each reads only the one before."""
        tail = _Tail(value, activation)
        while (node := tail.value.sole_user) is not None and node not in self.covered:
            if is_norm(node) and tail.value is value and activation == "none":
                tail.norm = node
            elif (name := activation_of(node)) and tail.activation == "none" and tail.mode != AFTER:
                tail.activation = name
            elif residuals and tail.residual is None and (other := added_by(node, tail.value)) is not None:
                if other.index >= start.outputs.index or other in self.virtual:
                    break
                tail.residual = other
                tail.mode = BEFORE if tail.activation == "none" else AFTER
            else:
                break
            self.covered.add(node)
            tail.value = node.outputs
        return tail

    def _parts(self, value: Value | Tensor) -> list[Value | Tensor]:
        """What a concatenation that products alone read consists of, or the value itself."""
        if not isinstance(value, Value) or value not in self.virtual:
            return [value]
        assert value.producer is not None
        parts = [part for whole in value.producer.args[0] for part in self._parts(whole)]
        return [part for part in parts if channels(part) > 0]

    def _source(self, part: Value | Tensor, rows: int, table: Place | None = None) -> Source:
        width = channels(part)
        held = part if isinstance(part, Value) else self.constants.vector(part.contiguous())
        return Source(held, rows, width, width, table)

    # ---- nodes that need no step because their readers do the work ----

    def _products_alone_read(self, value: Value) -> bool:
        readers = all(
            is_product(user) and user.args[0] is value and user.argument(6, 1) == 1 for user in value.users
        )
        return readers and not value.is_output

    def concatenation(self, node: Node) -> list[Step] | None:
        parts, value = node.args[0], node.outputs
        rank = len(value.shape)
        axis = 1 if rank == 4 else rank - 1
        joined = all(len(part.shape) == rank and part.dtype == torch.float32 for part in parts) and (
            rank < 4 or all(isinstance(part, Value) for part in parts)
        )
        if not joined or node.argument(1, 0) % rank != axis or not self._products_alone_read(value):
            return None
        self.virtual.add(value)
        return []

    def padding(self, node: Node) -> list[Step] | None:
        pads, value = node.args[1], node.outputs
        zeros = node.argument(2, "constant") == "constant" and not node.argument(3, 0.0)
        fits = len(value.shape) == 4 and len(pads) <= 4 and min(pads) >= 0
        if not zeros or not fits or value.is_output:
            return None
        if not all(reads_padded(user, value, pads) for user in value.users):
            return None
        self.virtual.add(value)
        return []

    def _unpadded(self, value: Value) -> tuple[Value, int, int, int, int]:
        """A value before its padding, and the padding: top, left, bottom, right."""
        node = value.producer
        if node is None or node.op is not aten.pad.default or value not in self.virtual:
            return value, 0, 0, 0, 0
        left, right, top, bottom = [*node.args[1], 0, 0][:4]
        return node.args[0], top, left, bottom, right

    # ---- other steps ----

    def _depthwise(
        self,
        node: Node,
        x: Value,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        pads: tuple[int, int, int, int],
    ) -> Step:
        tail = self._tail(node, node.outputs, residuals=False)
        folded, offset = fold(weight, bias, tail.norm)
        return self._by_channel(x, tail, folded, offset, stride, pads)

    def _by_channel(
        self,
        x: Value,
        tail: _Tail,
        weight: Tensor,
        bias: Tensor,
        stride: tuple[int, int],
        pads: tuple[int, int, int, int],
    ) -> Step:
        batch, count, height, width = x.shape
        kernel = tuple(weight.shape[2:])
        by_tap = self.constants.vector(weight.flatten(1).t().contiguous())
        extra = [*kernel, *stride, pads[0], pads[1], *by_tap, *self.constants.vector(bias)]
        extra.append(ACTIVATIONS[tail.activation])
        shape = (batch, height, width, count, *tail.value.shape[2:])
        return map_step("depthwise", x, shape, tail.value, extra)

    def batch_norm(self, node: Node) -> list[Step] | None:
        x = node.args[0]
        if not is_norm(node) or not isinstance(x, Value):
            return None
        tail = self._tail(node, node.outputs, residuals=False)
        ones = torch.ones(channels(x), 1, 1, 1)
        weight, bias = fold(ones, None, node)
        return [self._by_channel(x, tail, weight, bias, (1, 1), (0, 0, 0, 0))]

    def max_pool(self, node: Node) -> list[Step] | None:
        x, kernel = node.args[0], pair(node.args[1])
        stride, pads = pair(node.argument(2) or kernel), pair(node.argument(3, [0, 0]))
        if pair(node.argument(4, [1, 1])) != (1, 1) or len(x.shape) != 4:
            return None
        if not sees_pixels(x.shape[2:], node.outputs.shape[2:], kernel, stride, (*pads, *pads)):
            return None
        shape = (x.shape[0], *x.shape[2:], channels(x), *node.outputs.shape[2:])
        return [map_step("max_pool", x, shape, node.outputs, [*kernel, *stride, *pads])]

    def upsample(self, node: Node) -> list[Step] | None:
        x, _, align_corners, scale = node.args
        if align_corners or scale is not None:
            return None
        shape = (x.shape[0], *x.shape[2:], channels(x), *node.outputs.shape[2:])
        return [map_step("upsample", x, shape, node.outputs, [])]

    def layer_norm(self, node: Node) -> list[Step] | None:
        x, shape, gamma, beta = node.args[0], node.args[1], node.argument(2), node.argument(3)
        if len(shape) != 1 or len(x.shape) not in (2, 3) or not are_constants(gamma, beta):
            return None
        places = [self.constants.vector(part) for part in (gamma, beta)]
        return [norm_step(x, node.outputs, node.argument(4, 1e-5), places[0], places[1])]

    def add(self, node: Node) -> list[Step] | None:
        first, second = node.args[:2]
        if not isinstance(first, Value) or added_by(node, first) is None or not self._worth_it(node):
            return None
        tail = self._tail(node, node.outputs, residuals=False)
        return [elementwise_step(first, tail.value, added=second, activation=tail.activation)]

    def scale(self, node: Node) -> list[Step] | None:
        x, factor = node.args[:2]
        if not isinstance(x, Value) or not isinstance(factor, (int, float)) or not self._worth_it(node):
            return None
        tail = self._tail(node, node.outputs, residuals=False)
        return [elementwise_step(x, tail.value, scale=float(factor), activation=tail.activation)]

    def activation(self, node: Node) -> list[Step] | None:
        name = activation_of(node)
        if name is None or not self._worth_it(node):
            return None
        return [elementwise_step(node.args[0], node.outputs, activation=name)]

    def _worth_it(self, node: Node) -> bool:
        """A pass over numbers joins the steps around it, but is no reason to leave PyTorch."""
        return any(value in self.in_steps for value in node.values)

    def mesh_pool(self, node: Node) -> list[Step] | None:
        x, pointers, columns, values = node.args[:4]
        if not isinstance(x, Value) or not are_constants(pointers, columns, values):
            return None
        places = (
            self.constants.table(pointers),
            self.constants.table(columns),
            self.constants.vector(values),
        )
        return [sparse_product_step(x, node.outputs, *places, entries=len(columns))]

    def mean(self, node: Node) -> list[Step] | None:
        """Of a map over its pixels: a product with a matrix of one row."""
        x, dims = node.args[:2]
        if len(x.shape) != 4 or {d % 4 for d in dims} != {2, 3} or node.argument(2) or node.kwargs:
            return None
        pixels = x.shape[2] * x.shape[3]
        pointers, columns = torch.tensor([0, pixels], dtype=torch.int32), torch.arange(pixels)
        places = (
            self.constants.table(pointers),
            self.constants.table(columns.to(torch.int32)),
            self.constants.add(torch.full((pixels,), 1 / pixels)),
        )
        return [sparse_product_step(x, node.outputs, *places, entries=pixels)]

    def flatten(self, node: Node) -> list[Step] | None:
        """Values of vertices in another shape, or the start of a soft-argmax."""
        x, output = node.args[0], node.outputs
        if (found := soft_argmax(node)) is not None:
            places, chain = found
            self.covered.update(chain)
            return [soft_argmax_step(x, chain[-1].outputs, self.constants.vector(places))]
        if 4 in (len(x.shape), len(output.shape)) or not self._worth_it(node):
            return None
        return [elementwise_step(x, output)]

    def vertex_sample(self, node: Node) -> list[Step] | None:
        maps, points, camera, _, _, align_corners, border = node.args
        weak = camera is None or (isinstance(camera, Value) and len(camera.shape) == 2)
        if not weak or not all(isinstance(part, Value) for part in (*maps, points)):
            return None
        zeros = self.constants.zeros(max(channels(value) for value in maps))
        return [
            sample_step(
                list(maps),
                points,
                camera,
                node.outputs,
                align_corners=align_corners,
                border=border,
                zeros=zeros,
            )
        ]

    def attend(self, node: Node) -> list[Step] | None:
        if node not in self.attention:
            return None
        found = self.attention[node]
        return [attention_step(found.packed, found.output, found.heads, found.scale)]


Handler = Callable[[_Lowering, Node], "list[Step] | None"]


@cache
def _handlers() -> dict[Any, Handler]:
    """What covers a node of each op, or gives None. The library of this package's ops must be loaded."""
    ours = torch.ops.pahm_ops
    return {
        aten.conv2d.default: _Lowering.convolution,
        aten.linear.default: _Lowering.linear,
        aten.cat.default: _Lowering.concatenation,
        aten.pad.default: _Lowering.padding,
        aten.batch_norm.default: _Lowering.batch_norm,
        aten.max_pool2d.default: _Lowering.max_pool,
        aten.upsample_bilinear2d.vec: _Lowering.upsample,
        aten.layer_norm.default: _Lowering.layer_norm,
        aten.mean.dim: _Lowering.mean,
        aten.flatten.using_ints: _Lowering.flatten,
        aten.add.Tensor: _Lowering.add,
        aten.add_.Tensor: _Lowering.add,
        aten.mul.Tensor: _Lowering.scale,
        aten.relu.default: _Lowering.activation,
        aten.relu_.default: _Lowering.activation,
        aten.hardtanh.default: _Lowering.activation,
        aten.hardtanh_.default: _Lowering.activation,
        aten.relu6.default: _Lowering.activation,
        aten.relu6_.default: _Lowering.activation,
        aten.gelu.default: _Lowering.activation,
        aten.silu.default: _Lowering.activation,
        aten.silu_.default: _Lowering.activation,
        aten.scaled_dot_product_attention.default: _Lowering.attend,
        ours.spiral_conv.default: _Lowering.spiral,
        ours.mesh_pool.default: _Lowering.mesh_pool,
        ours.vertex_sample.default: _Lowering.vertex_sample,
    }
