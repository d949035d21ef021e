"""The losses of section 3.4, equations 5 and 6, and the camera's supervision.

The paper writes sums. Here each loss is a mean over its elements, so a weight means the same for any image
size or mesh. This follows CMR's code, whose weights resemble the paper's. Lengths are in units of 0.2 m
(CMR).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pahm.config import LossConfig
from pahm.model.network import UNIT, Prediction, expected_position


class Targets(NamedTuple):
    """The truth for `B` images."""

    meshes: list[Tensor]
    """M4 ... M1, as in `Prediction.meshes`: metres, relative to the root joint."""
    vertices_2d: list[Tensor]
    """`(B, N_s, 2)` projections of these vertices, in normalised crop coordinates (`align_corners=False`)."""
    joints: Tensor
    """`(B, 21, 3)`, metres, relative to the root joint."""
    joints_2d: Tensor
    """`(B, 21, 2)` projections of the joints, in the same normalised coordinates."""
    mask: Tensor
    """`(B, 1, S, S)`, 1 on the hand."""
    has_mask: Tensor
    """`(B,)` bool: which images have a mask."""


def mesh_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """L_mesh of one level: mean L1 distance of coordinates; both `(B, N, 3)` in the same unit."""
    return (predicted - target).abs().mean()


def joint_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """METRO's supervision of its joint queries: mean L1 distance of coordinates.

    Both `(B, 21, 3)` in the same unit.
    """
    return (predicted - target).abs().mean()


def edge_loss(predicted: Tensor, target: Tensor, faces: Tensor) -> Tensor:
    """L_edge: mean | |e^| - |e| | over the three edges of every face.

    Vertices are `(B, N, 3)`, faces `(F, 3)`.
    """
    lengths, expected = (torch.linalg.vector_norm(_edges(v, faces), dim=-1) for v in (predicted, target))
    return (lengths - expected).abs().mean()


def normal_loss(predicted: Tensor, target: Tensor, faces: Tensor) -> Tensor:
    """L_norm: mean |cos| between the predicted edges of a face and the true face's normal.

    Shapes are as in `edge_loss`.
    """
    edges = F.normalize(_edges(predicted, faces), dim=-1, eps=1e-6)
    true_edges = _edges(target, faces)
    normals = F.normalize(torch.linalg.cross(true_edges[:, 0], true_edges[:, 1]), dim=-1, eps=1e-12)
    return (edges * normals[:, None]).sum(-1).abs().mean()


def _edges(vertices: Tensor, faces: Tensor) -> Tensor:
    """`(B, 3, F, 3)`: the edges 0->1, 1->2, 2->0 of every face."""
    corners = [vertices.index_select(1, faces[:, i]) for i in range(3)]
    return torch.stack([corners[(i + 1) % 3] - corners[i] for i in range(3)], dim=1)


def silhouette_loss(logits: Tensor, mask: Tensor, has_mask: Tensor) -> Tensor:
    """L_sil: binary cross entropy against the mask, averaged down to the logits' size.

    logits `(B, 1, h, w)`, mask `(B, 1, S, S)`, has_mask `(B,)` bool. The mean excludes images without a mask.
    """
    target = F.adaptive_avg_pool2d(mask.float(), (logits.shape[-2], logits.shape[-1]))
    loss = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none").mean(dim=(1, 2, 3))
    return (loss * has_mask).sum() / has_mask.sum().clamp(min=1)


def heatmaps(joints_2d: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """Gaussian heatmaps with peak 1 at the joints.

    `joints_2d (B, J, 2)` normalised with `align_corners=False`, `size` (h, w) of the map, `sigma` the
    standard deviation in pixels of a 224-pixel image. Returns `(B, J, h, w)`.
    """
    height, width = size
    x = (2 * torch.arange(width, device=joints_2d.device, dtype=joints_2d.dtype) + 1) / width - 1
    y = (2 * torch.arange(height, device=joints_2d.device, dtype=joints_2d.dtype) + 1) / height - 1
    spread = 2 * (2 * sigma / 224) ** 2
    gx = torch.exp(-((x - joints_2d[..., :1]) ** 2) / spread)
    gy = torch.exp(-((y - joints_2d[..., 1:]) ** 2) / spread)
    return gy[..., :, None] * gx[..., None, :]


def pose_loss(logits: Tensor, joints_2d: Tensor, sigma: float) -> Tensor:
    """L_2Dpose: binary cross entropy against the joints' heatmaps.

    logits `(B, 21, h, w)`, joints `(B, 21, 2)`.
    """
    target = heatmaps(joints_2d.float(), (logits.shape[-2], logits.shape[-1]), sigma)
    return F.binary_cross_entropy_with_logits(logits.float(), target)


def position_loss(logits: Tensor, joints_2d: Tensor) -> Tensor:
    """Mean L1 distance of the heatmaps' soft-argmax to the joints.

    logits `(B, 21, h, w)`, joints `(B, 21, 2)`. The first mesh is lifted from these positions (see
    `FirstMesh`). The heatmaps' cross entropy supervises them only indirectly (integral regression; Sun et
    al., ECCV 2018).
    """
    return (expected_position(logits) - joints_2d).abs().mean()


def project(vertices: Tensor, camera: Tensor) -> Tensor:
    """Project `(B, N, 3)` metres with weak perspective `(B, 3)` [s, tx, ty] to normalised `(B, N, 2)`."""
    return camera[:, None, :1] * (vertices[..., :2] + camera[:, None, 1:])


def projection_loss(meshes: Sequence[Tensor], camera: Tensor, vertices_2d: Sequence[Tensor]) -> Tensor:
    """Supervise the camera: mean L1 distance between each mesh's projection and the true one, normalised.

    The paper projects but does not specify the camera. Ours is predicted (see `PixelAligned`). This loss
    makes each level's mesh project to its own pixels, where the next level samples.
    """
    terms = [(project(m, camera) - t).abs().mean() for m, t in zip(meshes, vertices_2d, strict=True)]
    return torch.stack(terms).mean()


def total_loss(
    prediction: Prediction, targets: Targets, faces: Tensor, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of all losses, and each unweighted loss by name; `faces (F, 3)` are those of M1.

    Each mesh is compared with the truth of the level with the same number of vertices. Equation 5 sums over
    all meshes; a level may have several (see `Prediction`). Losses of the 2D cues are means over the
    hourglasses. Outputs that the network does not predict have no loss.
    """
    finest, truth = prediction.meshes[-1] / UNIT, targets.meshes[-1] / UNIT
    levels = {target.shape[1]: i for i, target in enumerate(targets.meshes)}
    places = [levels[mesh.shape[1]] for mesh in prediction.meshes]
    by_level: dict[int, list[Tensor]] = {}
    for mesh, place in zip(prediction.meshes, places, strict=True):
        by_level.setdefault(place, []).append(mesh_loss(mesh / UNIT, targets.meshes[place] / UNIT))
    names = {place: f"mesh_{len(targets.meshes) - place}" for place in by_level}
    parts = {names[place]: torch.stack(terms).sum() for place, terms in by_level.items()}
    weights = {names[place]: config.mesh[place] for place in by_level}
    parts["edge"] = edge_loss(finest, truth, faces)
    parts["normal"] = normal_loss(finest, truth, faces)
    if prediction.cues:
        sigma, joints = config.heatmap_sigma, targets.joints_2d
        silhouettes, poses = (
            [c.silhouette_logits for c in prediction.cues],
            [c.pose_logits for c in prediction.cues],
        )
        parts["silhouette"] = _mean([silhouette_loss(x, targets.mask, targets.has_mask) for x in silhouettes])
        parts["pose"] = _mean([pose_loss(x, joints, sigma) for x in poses])
        parts["position"] = _mean([position_loss(x, joints) for x in poses])
    if prediction.joints:
        parts["joints"] = _mean([joint_loss(j / UNIT, targets.joints / UNIT) for j in prediction.joints])
    vertices_2d = [targets.vertices_2d[place] for place in places]
    parts["projection"] = projection_loss(prediction.meshes, prediction.camera, vertices_2d)
    weights |= {name: getattr(config, name) for name in parts if name not in weights}
    return torch.stack([weights[name] * value for name, value in parts.items()]).sum(), parts


def _mean(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).mean()
