"""Pixel-aligned sampling of feature maps at projected vertices, in plain PyTorch.

features: list of (B, C_s, H_s, W_s)   vertices: (B, N, 3) or (B, N, 2)   camera: None, (B, 3) or (B, 3, 3)
output: (B, N, C_1 + ... + C_S)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pahm_ops import _torch_internals as internals


def project(
    vertices: Tensor,
    camera: Tensor | None,
    image_size: tuple[int, int] | None,
    align_corners: bool,
    strict: bool = True,
) -> tuple[Tensor, Tensor]:
    """Project vertices to normalised image coordinates.

    Returns points (B, N, 2), x before y, in grid_sample's coordinates, and valid (B, N), bool. A vertex with
    a NaN or infinite coordinate, or whose projection is not finite, is invalid; its point is (0, 0) and
    carries no gradient. With `strict`, raises ValueError for a finite vertex at or behind a perspective
    camera. Otherwise such a vertex is invalid, as it is inside torch.compile and torch.func's transforms,
    which cannot look at values.
    """
    valid = vertices.isfinite().all(-1)
    if camera is None:
        points = torch.where(valid.unsqueeze(-1), vertices, 0.0)
        return points, valid
    valid = valid & camera.isfinite().flatten(1).all(1, keepdim=True)
    camera = torch.where(camera.isfinite(), camera, 0.0)
    vertices = torch.where(valid.unsqueeze(-1), vertices, 0.0)
    if camera.dim() == 2:
        points = camera[:, None, :1] * (vertices[..., :2] + camera[:, None, 1:])
    else:
        assert image_size is not None
        rays = vertices @ camera.transpose(1, 2)
        depth = rays[..., 2:]
        front = depth.squeeze(-1) > 0
        if strict and not torch.compiler.is_compiling() and not internals.functorch_active():
            _refuse_behind(valid & ~front, depth.squeeze(-1))
        valid = valid & front
        pixels = rays[..., :2] / torch.where(valid.unsqueeze(-1), depth, 1.0)
        extent = torch.tensor([image_size[1], image_size[0]], dtype=pixels.dtype, device=pixels.device)
        points = 2 * pixels / (extent - 1) - 1 if align_corners else (2 * pixels + 1) / extent - 1
    valid = valid & points.isfinite().all(-1)
    return torch.where(valid.unsqueeze(-1), points, 0.0), valid


def _refuse_behind(behind: Tensor, depth: Tensor) -> None:
    if behind.any():
        b, n = behind.nonzero()[0].tolist()
        raise ValueError(
            f"vertices must lie in front of the camera (depth > 0), but vertex {n} of batch item {b} "
            f"is behind the camera at depth {depth[b, n].item():g}"
        )


def vertex_sample(
    features: Sequence[Tensor],
    vertices: Tensor,
    camera: Tensor | None,
    image_size: tuple[int, int] | None,
    align_corners: bool,
    padding_mode: str,
) -> Tensor:
    """Project, sample every map with grid_sample and concatenate; half precision is computed in float32."""

    def sample(feature: Tensor, points: Tensor, align_corners: bool, padding_mode: str) -> Tensor:
        grid = points.unsqueeze(2)
        return F.grid_sample(
            feature, grid, mode="bilinear", padding_mode=padding_mode, align_corners=align_corners
        ).squeeze(3)

    return _sample_all(sample, features, vertices, camera, image_size, align_corners, padding_mode)


def vertex_sample_gather(
    features: Sequence[Tensor],
    vertices: Tensor,
    camera: Tensor | None,
    image_size: tuple[int, int] | None,
    align_corners: bool,
    padding_mode: str,
    strict: bool = True,
) -> Tensor:
    """The same with four gathers per map: slower, but differentiable any number of times."""
    return _sample_all(_gather, features, vertices, camera, image_size, align_corners, padding_mode, strict)


def _sample_all(
    sample: Callable[[Tensor, Tensor, bool, str], Tensor],
    features: Sequence[Tensor],
    vertices: Tensor,
    camera: Tensor | None,
    image_size: tuple[int, int] | None,
    align_corners: bool,
    padding_mode: str,
    strict: bool = True,
) -> Tensor:
    dtype = features[0].dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    camera = None if camera is None else camera.to(work)
    points, valid = project(vertices.to(work), camera, image_size, align_corners, strict)
    # Beyond +-10 every point lies off the map or is clamped to its edge, whatever the map's size. Clamping
    # here changes no result and keeps integer overflow and 0 * inf out of grid_sample.
    points = points.clamp(-10, 10)
    sampled = [sample(feature.to(work), points, align_corners, padding_mode) for feature in features]
    output = torch.cat(sampled, 1).transpose(1, 2)
    return torch.where(valid.unsqueeze(-1), output, 0.0).to(dtype).contiguous()


def _gather(feature: Tensor, points: Tensor, align_corners: bool, padding_mode: str) -> Tensor:
    size = torch.tensor([feature.shape[3], feature.shape[2]], dtype=points.dtype, device=points.device)
    pixels = (points + 1) / 2 * (size - 1) if align_corners else ((points + 1) * size - 1) / 2
    if padding_mode == "border":
        inside = (pixels > 0) & (pixels < size - 1)
        pixels = torch.where(inside, pixels, pixels.detach().clamp(min=0).minimum(size - 1))
    cell = pixels.detach().floor()
    right, down = (pixels - cell).unbind(-1)
    width, height = feature.shape[3], feature.shape[2]
    # Beyond 2^24 floats skip pixels, and rounding may have moved a position past the map's end.
    last = torch.tensor([width - 1, height - 1], device=points.device)
    x, y = torch.where(cell < size, torch.minimum(cell.long(), last), cell.long()).unbind(-1)
    flat = feature.flatten(2)
    total = flat.new_zeros(())
    for i, wy in ((y, 1 - down), (y + 1, down)):
        for j, wx in ((x, 1 - right), (x + 1, right)):
            inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
            index = torch.where(inside, i * width + j, 0).unsqueeze(1).expand(-1, flat.shape[1], -1)
            corner = torch.where(inside.unsqueeze(1), flat.gather(2, index), 0.0)
            total = total + (wx * wy).unsqueeze(1) * corner
    return total
