"""The ops as the paper's decoder calls them, on the open hand's four meshes: for counts of memory traffic."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pahm.hand.topology import HandTopology
from pahm_ops import MeshTransform
from pahm_ops.mesh import spiral_indices

LENGTH = 9
#: a level's channels in and out of its spiral convolution, coarsest level first
CHANNELS = ((256, 256), (256, 128), (128, 64), (64, 64))
#: the feature map that a level samples: channels and size
MAPS = ((256, 7), (256, 14), (256, 28), (256, 56))


class Level(NamedTuple):
    count: int
    """Vertices."""
    indices: Tensor
    """(N, 9) int64, spirals."""
    up: MeshTransform | None
    """From the next coarser level, None at the coarsest."""
    points: Tensor
    """(N, 2) float32: the vertices in normalised image coordinates, filling three quarters of the image."""


@cache
def levels() -> list[Level]:
    """The four levels, coarsest first."""
    hierarchy = HandTopology.load().hierarchy
    found = []
    for i in reversed(range(4)):
        vertices = torch.from_numpy(hierarchy.vertices[i]).float()
        flat = vertices[:, vertices.std(0).argsort(descending=True)[:2]]
        centre, extent = (flat.amax(0) + flat.amin(0)) / 2, (flat.amax(0) - flat.amin(0)).max()
        up = MeshTransform.prepare(hierarchy.up[i].astype(np.float32)) if i < 3 else None
        indices = torch.from_numpy(spiral_indices(hierarchy.faces[i], LENGTH, vertices=hierarchy.vertices[i]))
        found.append(Level(len(vertices), indices, up, 1.5 * (flat - centre) / extent))
    return found
