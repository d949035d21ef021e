"""Streams, CUDA graphs, and tensors beyond 2^31 elements."""

from collections.abc import Sequence

import pytest
import torch
from gpu_cases import DEVICE, all_close, capture, close, expected, op_sample, warm_up, with_gradients
from op_samples import OPS
from torch import Tensor

from pahm_ops import MeshTransform, mesh_pool, spiral_conv, vertex_sample
from pahm_ops.prepared import spiral_table
from pahm_ops.reference import vertex_sample as sample_reference

pytest_plugins = ["gpu_fixtures"]
pytestmark = pytest.mark.gpu

each_op = pytest.mark.parametrize("op", OPS)
#: of a sleeping stream: about half a second
CYCLES = 10**9


def renew(tensors: Sequence[Tensor]) -> None:
    """Other values in the same memory; geometry in another order, to keep away from pixels' borders."""
    with torch.no_grad():
        for tensor in tensors:
            geometric = tensor.dim() == 3 and tensor.shape[-1] == 3
            tensor.copy_(tensor.flip(0) if geometric else torch.randn_like(tensor))


@each_op
def test_a_side_stream_does_not_wait_for_the_default_one(path, op):
    """Inputs come from a third stream by an event."""
    sample = op_sample(op)
    sources = [a.clone() for a in sample.arguments]
    run = with_gradients(sample)
    wanted = expected(sample)
    run()
    for argument in sample.arguments:
        argument.detach().zero_()
    torch.cuda.synchronize(DEVICE)
    producer, side = torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE)
    torch.cuda._sleep(CYCLES)
    busy = torch.cuda.current_stream(DEVICE).record_event()
    with torch.cuda.stream(producer):
        torch.cuda._sleep(CYCLES // 20)
        for argument, source in zip(sample.arguments, sources, strict=True):
            argument.detach().copy_(source)
        ready = producer.record_event()
    with torch.cuda.stream(side):
        side.wait_event(ready)
        found = [t.cpu() for t in run()]
    assert not busy.query(), "the default stream must be busy until here"
    all_close(found, [t.cpu() for t in wanted])


def test_a_table_made_on_one_stream_serves_another():
    with DEVICE:
        indices = torch.randint(0, 2**16, (2**20, 16))
    spiral_table(indices.clone(), 2**16)
    torch.cuda.synchronize(DEVICE)
    first, second = torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(first):
        spiral_table(indices, 2**16)
    with torch.cuda.stream(second):
        seen = [t.clone() for t in spiral_table(indices, 2**16)[1:]]
    torch.cuda.synchronize(DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(seen, spiral_table(indices, 2**16)[1:], strict=True))


@each_op
def test_a_graph_replays_with_other_inputs(path, op):
    sample = op_sample(op)
    grad = torch.randn_like(sample.function(*sample.arguments))
    run = with_gradients(sample, grad)
    warm_up(run)
    replay, results = capture(run)
    for _ in range(3):
        renew([*sample.arguments, grad])
        replay()
        all_close(results, expected(sample, grad))


def test_a_table_is_not_prepared_within_a_capture(path):
    sample = op_sample("spiral_conv")
    warm_up(with_gradients(sample))
    indices = sample.raw[1].t().long()
    with pytest.raises(RuntimeError, match="cannot be prepared while a CUDA graph is captured"):
        capture(lambda: [spiral_conv(sample.raw[0], indices, *sample.raw[2:4])])


def needs_memory(size: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(DEVICE)[0] < size:
        pytest.skip("less free memory than the large tensors take")


#: More than 2^31 elements in a batch of two.
LARGE = 2, 2**20, 1100
SIDE = 1024


@pytest.mark.slow
def test_spiral_conv_beyond_32_bits(path):
    needs_memory(24 * 2**30)
    batch, vertices, channels = LARGE
    with DEVICE:
        x = torch.ones(batch, vertices, channels, dtype=torch.bfloat16)
        x[1, -1] = 2
        x.requires_grad_()
        indices = torch.tensor([[vertices - 1], [0]])
        weight = torch.full((3, channels), 2.0**-5, dtype=torch.bfloat16, requires_grad=True)
        out = spiral_conv(x, indices, weight)
        all_close([out[..., 0]], [torch.tensor([[1, 1], [2, 1]]).double() * channels / 32])
        grads = torch.autograd.grad(out, [x, weight], torch.ones_like(out))
        close("x's gradient", grads[0][1, [-1, 0, 5], -1], torch.tensor([3 / 32, 3 / 32, 0]).double(), 0)
        assert float(grads[0][:, [0, -1]].double().sum()) == float(grads[0].sum(dtype=torch.float64))
        assert (grads[1] == 5).all()
        del x, grads
        # Beyond them in the result.
        x = torch.arange(4.0, dtype=torch.bfloat16).view(2, 2, 1)
        indices = torch.zeros(vertices, 1, dtype=torch.int64)
        indices[-1] = 1
        weight = torch.ones(channels, 1, dtype=torch.bfloat16)
        out = spiral_conv(x, indices, weight)
        assert out[:, -1, -1].tolist() == [1, 3] and out[:, -2, -1].tolist() == [0, 2]


@pytest.mark.slow
def test_mesh_pool_beyond_32_bits(path):
    needs_memory(24 * 2**30)
    batch, vertices, channels = LARGE
    with DEVICE:
        few = torch.ones(batch, 2, channels, dtype=torch.bfloat16, requires_grad=True)
        places = torch.tensor([[0, vertices - 1], [0, 1]])
        up = MeshTransform.prepare(torch.sparse_coo_tensor(places, torch.tensor([2.0, 3.0]), (vertices, 2)))
        many = mesh_pool(few, up)
        assert many.shape == LARGE and (many[:, 0] == 2).all() and (many[:, -1] == 3).all()
        assert float(many.sum(dtype=torch.float64)) == 5 * batch * channels
        (grad,) = torch.autograd.grad(many, few, many.detach())
        assert (grad[:, 0] == 4).all() and (grad[:, 1] == 9).all()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_vertex_sample_beyond_32_bits(path, layout):
    needs_memory(24 * 2**30)
    last = layout == "channels_last"
    with DEVICE:
        maps = torch.zeros(2, SIDE, SIDE, 1100, dtype=torch.bfloat16)
        maps = maps.permute(0, 3, 1, 2) if last else maps.view(2, 1100, SIDE, SIDE)
        corner = maps[:, -3:, -16:, -16:]
        corner.copy_(torch.randn(corner.shape))
        maps.requires_grad_()
        # In the last pixels, away from their borders.
        points = 1 - (torch.randint(2, 14, (2, 40, 2)) + 0.3) / (SIDE / 2)
        points.requires_grad_()
        out = vertex_sample(maps, points)
        grads = torch.autograd.grad(out, [maps, points], torch.ones_like(out))
        wide = [maps[:, -3:].detach().double().requires_grad_(), points.detach().double().requires_grad_()]
        wanted = sample_reference.vertex_sample_gather(wide[:1], wide[1], None, None, False, "zeros")
        wanted_grads = torch.autograd.grad(wanted, wide, torch.ones_like(wanted))
        close("the result", out[..., -3:], wanted, 2e-2)
        close("the maps' gradient", grads[0][:, -3:], wanted_grads[0], 2e-2)
        close("the vertices' gradient", grads[1], wanted_grads[1], 1e-4)
