"""Sample inputs of the three ops, for tests that ask the same of each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pahm_ops import MeshTransform, SpiralTable, mesh_pool, spiral_conv, vertex_sample
from pahm_ops.reference import mesh_pool as reference_pool
from pahm_ops.reference import spiral_conv as reference_conv
from pahm_ops.reference import vertex_sample as reference_sample
from pahm_ops.spiral_conv import ACTIVATIONS

OPS = ("spiral_conv", "mesh_pool", "vertex_sample")


@dataclass(frozen=True)
class Sample:
    """An op as a function of its floating-point arguments alone, its definition likewise, and arguments.

    The first argument and the output begin with the batch.
    """

    name: str
    function: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    raw: tuple[object, ...]
    """The arguments that the function calls the registered op with."""

    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(a.detach().clone().requires_grad_() for a in self.arguments)


def samples(op: str, dtype: torch.dtype = torch.float64) -> list[Sample]:
    torch.manual_seed(11)
    return {"spiral_conv": _spiral_conv, "mesh_pool": _mesh_pool, "vertex_sample": _vertex_sample}[op](dtype)


def _spiral_conv(dtype: torch.dtype) -> list[Sample]:
    found = []
    # vertices in and out, spiral, channels in and out: usual, thin, wider than a vector, one of everything
    for n, m, length, cin, cout, activation in (
        (7, 6, 3, 4, 5, None),
        (6, 6, 3, 17, 3, "elu"),
        (5, 5, 2, 3, 33, "gelu"),
        (5, 5, 2, 3, 6, "relu"),
        (1, 1, 1, 1, 1, None),
    ):
        for with_bias in (True, False):
            x = torch.randn(2, n, cin, dtype=dtype)
            indices = torch.randint(0, n, (m, length))
            weight = torch.randn(cout, length * cin, dtype=dtype) / (length * cin) ** 0.5
            arguments = (x, weight, torch.randn(cout, dtype=dtype))[: 3 if with_bias else 2]

            def function(x, weight, bias=None, indices=indices, activation=activation):
                return spiral_conv(x, indices, weight, bias, activation)

            def definition(x, weight, bias=None, indices=indices, activation=activation):
                return reference_conv.spiral_conv(x, indices, weight, bias, activation)

            name = f"{n}-{m}-{length}-{cin}-{cout}-{activation}{'-bias' if with_bias else ''}"
            bias = arguments[2] if with_bias else None
            tables = SpiralTable.prepare(indices, n)[2:]
            raw = (x, *tables, weight, bias, ACTIVATIONS.index(activation))
            found.append(Sample(name, function, definition, arguments, raw))
    return found


def _mesh_pool(dtype: torch.dtype) -> list[Sample]:
    found = []
    for name, matrix in (
        ("down", torch.eye(7)[[5, 0, 3]]),
        ("up", torch.rand(9, 7) * (torch.rand(9, 7) < 0.4)),
        ("empty rows", torch.diag(torch.tensor([0.0, -2.5, 0.0, 1.0, 0.0, 0.0, 0.5]))),
    ):
        transform = MeshTransform.prepare(matrix.to(torch.float64).to_sparse())
        x = torch.randn(2, 7, 5, dtype=dtype)
        found.append(
            Sample(
                name,
                lambda x, transform=transform: mesh_pool(x, transform),
                lambda x, transform=transform: reference_pool.mesh_pool(x, *transform.forward),
                (x,),
                (x, *transform.forward, *transform.backward),
            )
        )
    return found


def _vertex_sample(dtype: torch.dtype) -> list[Sample]:
    found = []
    for number, kind in enumerate(("points", "weak", "perspective")):
        for padding in ("zeros", "border"):
            for align in (False, True):
                # Half of the combinations, in which any three of the four settings meet in every way.
                last = (number + (padding == "border") + align) % 2 == 0
                memory_format = torch.channels_last if last else torch.contiguous_format
                maps = [
                    torch.randn(2, c, h, w, dtype=dtype).contiguous(memory_format=memory_format)
                    for c, h, w in ((3, 4, 5), (2, 3, 3))
                ]
                points = torch.rand(2, 6, 2, dtype=dtype) * 2.4 - 1.2
                depth = torch.rand(2, 6, 1, dtype=dtype) + 1
                size, camera = None, None
                vertices = points
                if kind == "weak":
                    vertices = torch.cat([points, depth], 2)
                    camera = torch.tensor([[0.9, 0.1, -0.1], [0.8, 0.0, 0.2]], dtype=dtype)
                elif kind == "perspective":
                    size = (20, 22)
                    vertices = torch.cat([points * 0.5 * depth, depth], 2)
                    camera = torch.tensor([[20.0, 0.5, 10], [0, 22, 9], [0.01, 0, 1]], dtype=dtype)
                    camera = camera.repeat(2, 1, 1)
                options = {"image_size": size, "align_corners": align, "padding_mode": padding}

                def function(vertices, *rest, camera=camera, options=options):
                    given, *maps = rest if camera is not None else (None, *rest)
                    return vertex_sample(maps, vertices, given, **options)

                def definition(vertices, *rest, camera=camera, options=options):
                    given, *maps = rest if camera is not None else (None, *rest)
                    return reference_sample.vertex_sample_gather(maps, vertices, given, *options.values())

                arguments = (vertices, *(() if camera is None else (camera,)), *maps)
                raw = (maps, vertices, camera, *(size or (0, 0)), align, padding == "border")
                found.append(
                    Sample(
                        f"{kind}-{padding}-{'corners' if align else 'edges'}-{'last' if last else 'nchw'}",
                        function,
                        definition,
                        arguments,
                        raw,
                    )
                )
    return found
