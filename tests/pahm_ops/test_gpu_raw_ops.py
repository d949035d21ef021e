"""`torch.ops.pahm_ops` on a GPU with any arguments: refused in a sentence, or computed inside the tensors."""

import pytest
import torch
from gpu_cases import DEVICE
from simt_ops import hostile, list_bound

from pahm_ops import _library

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _library.CUDA_LOADED, reason="no compiled CUDA library here"),
]
ops = torch.ops.pahm_ops


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def int32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


# What the ops take for their derivatives alone may be anything.


def mesh_pool(x: torch.Tensor, *matrix: torch.Tensor) -> torch.Tensor:
    return ops.mesh_pool(x, *matrix, *matrix)


def spiral_conv(x: torch.Tensor, table: torch.Tensor, *rest: object) -> torch.Tensor:
    return ops.spiral_conv(x, table, table, table, *rest)


def weight_grad(grad: torch.Tensor, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return ops._spiral_conv_weight_grad(grad, x, table, table, table)


@pytest.mark.parametrize("channels", [8, 3])
@pytest.mark.parametrize("what", ["columns", "row_pointers"])
def test_small_pools_of_hostile_tables(what, channels):
    pointers, columns = torch.arange(0, 61, 3).int(), torch.arange(60).int() % 10
    if what == "columns":
        columns = hostile(columns, 10)
    else:
        pointers = hostile(pointers, 60, 2)
    x, values = torch.randn(2, 10, channels), torch.rand(60)
    wanted = torch.zeros(2, 20, channels)
    for row in range(20):
        for e in range(list_bound(pointers[row], 60), list_bound(pointers[row + 1], 60)):
            if 0 <= columns[e] < 10:
                wanted[:, row] += values[e] * x[:, int(columns[e])]
    out = mesh_pool(*(t.to(DEVICE) for t in (x, pointers, columns, values)))
    torch.testing.assert_close(out.cpu(), wanted)


@pytest.mark.parametrize(("channels", "out_channels"), [(8, 16), (3, 5)])
@pytest.mark.parametrize("vertices", [11, 0])
def test_small_spirals_of_hostile_tables(vertices, channels, out_channels):
    table = hostile(torch.randint(0, 11, (4, 13)), vertices)
    x, weight = torch.randn(2, vertices, channels), torch.randn(out_channels, 4 * channels)
    grad = torch.randn(2, 13, out_channels)
    found = (table >= 0) & (table < vertices)
    padded = torch.cat([x, torch.zeros(2, 1, channels)], 1)
    gathered = padded[:, torch.where(found, table, vertices).long().t()].flatten(2)
    x, table, weight, grad = (t.to(DEVICE) for t in (x, table, weight, grad))
    out = spiral_conv(x, table, weight, None, 0).cpu()
    torch.testing.assert_close(out, gathered @ weight.cpu().t(), rtol=1e-4, atol=1e-4)
    out = weight_grad(grad, x, table).cpu()
    wanted = torch.einsum("bmo,bmk->ok", grad.cpu(), gathered)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    if vertices:  # Lists of anything: memory safe, and finite.
        pointers = hostile(torch.linspace(0, 52, 45), 52, 4).to(DEVICE)
        lists = hostile(torch.arange(52) % 13, 13).to(DEVICE)
        assert ops._spiral_conv_input_grad(grad, table, pointers, lists, weight, 11).isfinite().all()


REFUSED = {
    "int32": lambda: mesh_pool(zeros(1, 2, 3), int32(2).long(), int32(2), zeros(2)),
    "got none": lambda: mesh_pool(zeros(1, 2, 3), int32(0), int32(2), zeros(2)),
    "one number a column": lambda: mesh_pool(zeros(1, 2, 3), int32(2), int32(2), zeros(3)),
    "rank 3, got 2": lambda: mesh_pool(zeros(2, 3), int32(2), int32(2), zeros(2)),
    "number of channels": lambda: mesh_pool(zeros(1, 0, 2**31), int32(2), int32(2), zeros(2)),
    "number of vertices": lambda: mesh_pool(zeros(1, 2**32, 0), int32(2), int32(2), zeros(2)),
    "weight must": lambda: spiral_conv(zeros(1, 2, 3), int32(0, 2), zeros(4, 0), None, 0),
    "Cout, L": lambda: spiral_conv(zeros(1, 2, 3), int32(2, 2), zeros(4, 5), None, 0),
    "activation": lambda: spiral_conv(zeros(1, 2, 3), int32(2, 2), zeros(4, 6), None, 9),
    "vertices must be at most": lambda: ops._spiral_conv_input_grad(
        zeros(1, 2, 3), int32(4, 2), int32(1), int32(8), zeros(3, 4), 2**62
    ),
    "t_rows": lambda: ops._spiral_conv_input_grad(
        zeros(1, 2, 3), int32(4, 2), int32(1), int32(7), zeros(3, 4), 0
    ),
    "height of a map must be at most": lambda: ops.vertex_sample(
        [zeros(1, 0, 2**31, 1)], zeros(1, 2, 2), None, 0, 0, False, True
    ),
    "image_size": lambda: ops.vertex_sample(
        [zeros(1, 2, 4, 4)], zeros(1, 2, 3), zeros(1, 3, 3), 0, 1, False, True
    ),
    "camera": lambda: ops.vertex_sample([zeros(1, 2, 4, 4)], zeros(1, 2, 3), zeros(3, 1), 1, 1, False, True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_sizes_that_do_not_fit_are_refused(message):
    with DEVICE, pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_empty_results_launch_nothing():
    with DEVICE:
        matrix = int32(1), int32(0), zeros(0)
        assert mesh_pool(zeros(2, 3, 4), *matrix).shape == (2, 0, 4)
        table, weight = int32(2, 0), zeros(4, 6)
        assert spiral_conv(zeros(1, 2, 3), table, weight, None, 0).shape == (1, 0, 4)
        assert spiral_conv(zeros(0, 2, 3), int32(2, 2), weight, None, 0).shape == (0, 2, 4)
        assert not weight_grad(zeros(1, 0, 3), zeros(1, 2, 3), int32(2, 0)).any()
        no_channels = zeros(1, 2, 0)
        assert spiral_conv(no_channels, int32(2, 2), zeros(4, 0), zeros(4) + 3, 0).eq(3).all()
        none = zeros(1, 0, 2)
        assert ops.vertex_sample([zeros(1, 2, 4, 4)], none, None, 0, 0, False, True).numel() == 0
