"""`pahm predict` with the shipped network: its forward pass, and all its work except starting Python.

One call of "command" reads `IMAGES` pictures of 224 x 224 pixels and writes four files for each. Images per
second are printed after each benchmark and kept as `images_per_second`.
"""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pahm.infer.predictor import Predictor
from pahm.infer.writers import predict_files
from pahm.model import load_checkpoint
from pahm.synth.picture import draw

IMAGES = 16
KINDS = ("png", "glb", "ply", "json")


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(load_checkpoint(), "cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{i:02}.jpg" for i in range(IMAGES)]
    for i, path in enumerate(paths):
        picture = draw(0, "evaluation", i)
        picture.image.save(path, quality=picture.quality)
    return paths


@pytest.fixture
def rate(benchmark, request) -> Callable[[int], None]:
    """`rate(images)`: report images per second, for calls with `images` images each."""

    def tell(images: int) -> None:
        if benchmark.stats is None:
            return
        per_second = images / benchmark.stats.stats.min
        benchmark.extra_info["images_per_second"] = per_second
        terminal = request.config.pluginmanager.get_plugin("terminalreporter")
        terminal.write_line(f"  {request.node.name.removeprefix('bench_')}: {per_second:.1f} images/s")

    return tell


@pytest.mark.parametrize("batch", [8, 1])
def bench_predict_network(compare, rate, predictor, batch):
    nchw = load_checkpoint()
    side = predictor.network.config.image_size
    images = torch.randn(batch, 3, side, side)
    laid_out = images.contiguous(memory_format=torch.channels_last)

    def ours() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return tuple(predictor.network(laid_out).meshes)

    def plain() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return tuple(nchw(images).meshes)

    compare(f"network of pahm predict, batch {batch}", {"ours": ours, "NCHW": plain}, tolerance=1e-3)
    rate(batch)


@pytest.mark.parametrize("batch", [8, 1])
def bench_predict_command(compare, rate, predictor, images, tmp_path, batch):
    folders = (tmp_path / f"{i}" for i in count())  # each call has its own folder, so nothing is replaced

    def vertices(folder: Path) -> Tensor:
        tables = [(folder / f"{path.stem}.ply").read_bytes().split(b"end_header\n", 1)[1] for path in images]
        return torch.from_numpy(np.stack([np.frombuffer(table, "<f4", 778 * 3) for table in tables]))

    def ours() -> Tensor:
        folder = next(folders)
        for result in predict_files(predictor, images, folder, kinds=KINDS, batch_size=batch):
            assert not isinstance(result, Exception), result
        return vertices(folder)

    def alone() -> Tensor:
        folder = next(folders)
        for path in images:
            predictor.predict(path).save(folder, formats=KINDS)
        return vertices(folder)

    compare(f"pahm predict, batch {batch}", {"ours": ours, "image after image": alone}, tolerance=1e-3)
    rate(len(images))
