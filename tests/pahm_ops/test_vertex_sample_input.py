import pytest
import torch

from pahm_ops import backends, vertex_sample

compiled = pytest.mark.skipif(
    backends()["vertex_sample"]["cpu"] == "reference", reason="no compiled kernels here"
)


def arguments(**changes):
    given = {
        "features": [torch.zeros(2, 4, 5, 5), torch.zeros(2, 3, 2, 2)],
        "vertices": torch.ones(2, 6, 3),
        "camera": torch.eye(3).expand(2, 3, 3),
        "image_size": (8, 8),
    }
    return {**given, **changes}


@pytest.mark.parametrize(
    ("error", "sentence", "changes"),
    [
        (TypeError, "features must be a tensor or a list", {"features": "map"}),
        (ValueError, "at least one map", {"features": []}),
        (TypeError, r"features\[1\] must be a tensor, got int", {"features": [torch.zeros(2, 4, 5, 5), 3]}),
        (ValueError, r"features\[0\] must have shape \(B, C, H, W\)", {"features": torch.zeros(4, 5, 5)}),
        (TypeError, r"features\[0\] must be float32.*int64", {"features": torch.zeros(2, 4, 5, 5).long()}),
        (
            TypeError,
            "share one dtype.*float32.*float64",
            {"features": [torch.zeros(2, 4, 5, 5), torch.zeros(2, 4, 5, 5).double()]},
        ),
        (
            ValueError,
            "share one batch size, got 2.*3",
            {"features": [torch.zeros(2, 4, 5, 5), torch.zeros(3, 4, 5, 5)]},
        ),
        (
            ValueError,
            "one device, got cpu.*meta",
            {"features": [torch.zeros(2, 4, 5, 5), torch.zeros(2, 4, 5, 5, device="meta")]},
        ),
        (ValueError, "height and a width", {"features": torch.zeros(2, 4, 0, 5)}),
        (TypeError, "vertices must be a tensor, got list", {"vertices": [1.0]}),
        (
            ValueError,
            r"vertices must have shape \(B, N, 3\) with a camera",
            {"vertices": torch.ones(2, 6, 2)},
        ),
        (
            ValueError,
            r"vertices must have shape \(B, N, 2\) without",
            {"camera": None, "image_size": None},
        ),
        (ValueError, "vertices must have shape", {"vertices": torch.ones(6, 3)}),
        (ValueError, "maps' batch size 2, got 3", {"vertices": torch.ones(3, 6, 3)}),
        (TypeError, "vertices must be torch.float32.*float64", {"vertices": torch.ones(2, 6, 3).double()}),
        (ValueError, "vertices must be on.*cpu, got meta", {"vertices": torch.ones(2, 6, 3, device="meta")}),
        (TypeError, "camera must be a tensor or None, got tuple", {"camera": (1, 2, 3)}),
        (ValueError, r"camera must have shape \(2, 3\).*got \(2, 4\)", {"camera": torch.ones(2, 4)}),
        (ValueError, r"camera must have shape.*got \(3, 3\)", {"camera": torch.eye(3)}),
        (TypeError, "camera must have the vertices' dtype", {"camera": torch.ones(2, 3, 3).double()}),
        (ValueError, "camera must be on", {"camera": torch.ones(2, 3, 3, device="meta")}),
        (ValueError, r"image_size=\(height, width\).*needed", {"image_size": None}),
        (ValueError, r"image_size must be \(height, width\)", {"image_size": (1, 2, 3)}),
        (ValueError, r"image_size must be \(height, width\)", {"image_size": 224}),
        (TypeError, "image_size must be whole numbers of pixels", {"image_size": (8.9, 8.9)}),
        (TypeError, "image_size must be whole numbers of pixels", {"image_size": ("8", 8)}),
        (ValueError, "image_size must be at least 1 x 1", {"image_size": (0, 4)}),
        (ValueError, "image_size must be at least 2 x 2", {"image_size": (1, 4), "align_corners": True}),
        (ValueError, "image_size belongs to intrinsics", {"camera": torch.ones(2, 3)}),
        (
            ValueError,
            "padding_mode must be 'zeros' or 'border', got 'reflection'",
            {"padding_mode": "reflection"},
        ),
    ],
)
def test_bad_input_is_refused_with_a_sentence(error, sentence, changes):
    vertex_sample(**arguments())
    with pytest.raises(error, match=sentence):
        vertex_sample(**arguments(**changes))


@compiled
def test_the_raw_op_checks_what_memory_safety_needs():
    op = torch.ops.pahm_ops.vertex_sample
    maps, points = [torch.zeros(2, 4, 5, 5)], torch.zeros(2, 6, 2)
    for bad in (
        ([], points, None),
        ([torch.zeros(4, 5, 5)], points, None),
        ([torch.zeros(2, 4, 0, 5)], points, None),
        ([*maps, torch.zeros(3, 4, 5, 5)], points, None),
        ([*maps, torch.zeros(2, 4, 5, 5).double()], points, None),
        ([torch.zeros(2, 4, 5, 5).half()], points, None),
        (maps, torch.zeros(2, 6, 3), None),
        (maps, torch.zeros(3, 6, 2), None),
        (maps, points.double(), None),
        (maps, torch.ones(2, 6, 3), torch.ones(2, 4)),
        (maps, torch.ones(2, 6, 3), torch.ones(1, 3, 3)),
        (maps, torch.ones(2, 6, 3), torch.ones(2, 3, 3)),
    ):
        with pytest.raises(ValueError, match=r"must|too small|another dtype|expected a tensor"):
            op(*bad, 0, 0, False, False)
    backward = torch.ops.pahm_ops._vertex_sample_backward
    for grad, needs in ((torch.zeros(2, 6, 5), [True] * 3), (torch.zeros(2, 6, 4), [True] * 2)):
        with pytest.raises(ValueError, match="must"):
            backward(grad, maps, points, None, 0, 0, False, False, needs)
