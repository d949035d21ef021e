"""The Triton kernels, in Triton's interpreter and on a GPU, against the reference in float64."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import triton_cases

pytest.importorskip("triton", reason="no Triton here")

NAMES = [name for name, _ in triton_cases.cases()]
PROGRAM = Path(triton_cases.__file__)


def run(device: str, names: list[str], **environment: str) -> dict[str, str | None]:
    """What each case complains of; in another process, for Triton reads the environment when imported."""
    done = subprocess.run(
        [sys.executable, PROGRAM, device],
        input="\n".join(names),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    found = dict(map(json.loads, done.stdout.splitlines()))
    return {name: found.get(name, f"did not run: {done.stderr[-2000:]}") for name in names}


@pytest.fixture(scope="module")
def complaints(request: pytest.FixtureRequest) -> dict[str, str | None]:
    """Of the cases that were asked for, in two processes."""
    asked = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.function.__name__ == "test_interpreted"  # type: ignore[attr-defined]
    ]
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(lambda i: run("cpu", asked[i::2], TRITON_INTERPRET="1"), range(2))
    return {name: complaint for part in parts for name, complaint in part.items()}


def is_quick(name: str) -> bool:
    """Of the combinations of camera, memory format, corners and padding, half are interpreted in float64, and
    two, with one camera, in other types; of wide maps and invalid numbers half, of edges a quarter. On a GPU
    all of them are quick.
    """
    match name.split():
        case [
            "vertex_sample",
            "float64",
            "points" | "weak" | "perspective" as camera,
            layout,
            align,
            padding,
        ]:
            # Any three of the four settings meet in every way.
            return (camera == "weak") ^ (layout == "last") ^ (align == "corners") ^ (padding == "border")
        case ["vertex_sample", _, "points" | "weak" | "perspective" as camera, layout, align, _]:
            return camera == "perspective" and (layout == "last") == (align == "corners")
        case ["vertex_sample", dtype, "wide", layout]:
            return (layout == "last") == (dtype in ("float32", "bfloat16"))
        case ["vertex_sample", "invalid", camera, padding]:
            return (camera == "perspective") == (padding == "zeros")
        case ["vertex_sample", "gradient", "past", *_]:
            return False
        case ["vertex_sample", "edges", layout, align, padding]:
            return (layout == "last") == (align == "corners") == (padding == "border")
    return True


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if is_quick(name) else pytest.mark.slow) for name in NAMES]
)
def test_interpreted(complaints, name):
    assert complaints[name] is None, complaints[name]


@pytest.mark.gpu
def test_on_a_gpu():
    found = run("cuda", NAMES, PAHM_TRITON_TUNE="0", CUBLAS_WORKSPACE_CONFIG=":4096:8")
    assert not {name: complaint for name, complaint in found.items() if complaint is not None}


class Recorder:
    """Stands for a kernel and for its tuner; notes what it is launched with."""

    best_config = None

    def __init__(self) -> None:
        self.launched: list[dict[str, object]] = []

    def __getitem__(self, grid):
        def launch(**arguments):
            self.launched.append(
                {**arguments, "programs": grid(arguments)[0] if "BLOCK" in arguments else None}
            )

        return launch


@pytest.fixture
def tuning(monkeypatch):
    """(kernel, its function, its tuner, what `_capturing` gives, candidates), as on a GPU."""
    from pahm_ops.triton import _tuning

    function, tuner, capturing = Recorder(), Recorder(), []
    candidates = [_tuning.config(4, 2, BLOCK=16), _tuning.config(4, 2, BLOCK=64)]
    tuner.best_config = candidates[1]
    monkeypatch.delenv("PAHM_TRITON_TUNE", raising=False)
    monkeypatch.setattr(_tuning, "_capturing", lambda tensor: bool(capturing))
    monkeypatch.setattr(_tuning.triton, "autotune", lambda *args, **options: lambda kernel: tuner)
    kernel = _tuning.Kernel(function, ["size"])
    return (
        lambda size: kernel.launch([(size, "BLOCK"), (3, None)], candidates, x=torch.zeros(1), size=size),
        function,
        tuner,
        capturing,
    )


def blocks(recorder: Recorder) -> list[object]:
    return [arguments.get("BLOCK") for arguments in recorder.launched]


def test_a_class_of_shapes_is_tuned_once(tuning):
    launch, function, tuner, _ = tuning
    launch(100)
    launch(100)
    launch(200)
    assert len(tuner.launched) == 2
    assert blocks(function) == [64]
    assert function.launched[0]["programs"] == 2 * 3


def test_nothing_is_tuned_while_a_graph_is_captured(tuning):
    launch, function, tuner, capturing = tuning
    capturing.append(True)
    launch(100)
    assert not tuner.launched and blocks(function) == [16]
    capturing.clear()
    launch(100)
    capturing.append(True)
    launch(100)
    assert len(tuner.launched) == 1 and blocks(function) == [16, 64]


@pytest.mark.parametrize("reason", ["environment", "deterministic"])
def test_tuning_can_be_turned_off(tuning, monkeypatch, reason):
    launch, function, tuner, _ = tuning
    launch(100)
    if reason == "environment":
        monkeypatch.setenv("PAHM_TRITON_TUNE", "0")
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    launch(100)
    launch(200)
    assert len(tuner.launched) == 1 and blocks(function) == [16, 16]


def test_two_threads_tune_a_class_of_shapes_once(tuning, monkeypatch):
    from pahm_ops.triton import _tuning

    launch, function, tuner, _ = tuning
    both = threading.Barrier(2)  # Both find it not tuned before either begins.
    monkeypatch.setattr(_tuning, "_capturing", lambda tensor: both.wait(60) < 0)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(launch, (100, 100)))
    assert len(tuner.launched) == 1 and blocks(function) == [64]


def test_sizes_that_32_bits_do_not_count_are_refused():
    from pahm_ops.triton import mesh_pool, spiral_conv, vertex_sample

    def meta(*shape, dtype=torch.float16):
        return torch.empty(1, device="meta", dtype=dtype).expand(shape)

    many, table = 2**31 - 2**15, {"dtype": torch.int32}
    matrix = meta(many + 1, **table), meta(2, **table), meta(2)
    lists = meta(2, many, **table), meta(1, **table), meta(1, **table)
    points, options = meta(1, 5, 2), (0, 0, False, True)
    wide = [meta(1, 1, 2**16, 2**16)], points, None, *options
    tall = [meta(1, 3, 4, 4)], meta(1, many, 2), None, *options
    for refused, function, arguments in (
        ("pixels of a map", vertex_sample.vertex_sample, wide),
        ("pixels of a map", vertex_sample.vertex_sample_backward, (meta(1, 5, 1), *wide, [True] * 3)),
        ("vertices", vertex_sample.vertex_sample, tall),
        ("vertices", vertex_sample.vertex_sample_backward, (meta(1, many, 3), *tall, [True] * 3)),
        ("rows", mesh_pool.mesh_pool, (meta(1, 4, 3), *matrix, *matrix)),
        ("rows", spiral_conv.spiral_conv, (meta(1, 4, 3), *lists, meta(5, 6), None, 0)),
        (
            "rows",
            spiral_conv.spiral_conv_weight_grad,
            (meta(1, many, 5), meta(1, 4, 3), *lists),
        ),
        (
            "vertices",
            spiral_conv.spiral_conv_input_grad,
            (
                meta(1, 4, 5),
                meta(2, 4, **table),
                meta(2 * many + 1, **table),
                meta(8, **table),
                meta(5, 6),
                many,
            ),
        ),
        (
            "columns of weight",
            spiral_conv.spiral_conv,
            (meta(1, 4, 2**30), meta(2, 6, **table), *lists[1:], meta(5, 2**31), None, 0),
        ),
    ):
        with pytest.raises(
            ValueError, match=rf"{refused} must be at most {2**31 - 2**16} in Triton's kernels"
        ):
            function(*arguments)


def test_too_many_programs_are_refused(tuning):
    launch, _, _, capturing = tuning
    capturing.append(True)
    with pytest.raises(ValueError, match="a grid of 2147483649 programs: at most 2147483647 are possible"):
        launch(16 * 715827883)


def test_pahm_ops_does_not_import_triton():
    code = "import pahm_ops, sys; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import pahm_ops.triton.mesh_pool, pahm_ops.triton.spiral_conv, pahm_ops.triton.vertex_sample"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
