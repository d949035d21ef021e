"""Where the decoder starts: the camera and the mesh of the first projection."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pahm.config import ModelConfig
from pahm.model.extractor import JOINTS
from pahm_ops.constant_buffers import ConstantBuffers

UNIT = 0.2
"""The decoders work in units of 0.2 m, as CMR does, so that a hand is about one unit long."""

HIDDEN = 256
"""Hidden width of the perceptron that lifts the 2D pose to the first mesh."""


class FirstMesh(nn.Sequential, ConstantBuffers):
    """The first mesh of 98 vertices, and the weak-perspective camera.

    The paper does not say where the first projection takes place. Here a small perceptron lifts the 2D pose,
    which the extractor is supervised to predict, together with the globally pooled Q_32 to offsets from the
    template and to the camera. Without 2D cues it sees the pooled map alone. Without pixel-aligned mapping
    nothing is projected: there the first mesh is the template, as in the baselines' papers, so that the
    image reaches the vertices by the mapping under test only, and the camera merely places the result.

    Forward: Q_32 `(B, C, h, w)` and 2D joints `(B, 21, 2)`, normalised, or None, to `(mesh, camera)`:
    `(B, 98, 3)`, at least float32, in units of 0.2 m relative to the root joint, `(B, 3)` [s, tx, ty].
    """

    template: Tensor
    mean_camera: Tensor

    def __init__(self, config: ModelConfig, template: NDArray[np.float64]) -> None:
        lifts = config.mapping == "pixel_aligned"
        to_mesh = nn.Linear(HIDDEN, 3 + (3 * len(template) if lifts else 0))
        nn.init.normal_(to_mesh.weight, std=1e-3)
        nn.init.zeros_(to_mesh.bias)
        inputs = config.feature_channels[0] + (2 * JOINTS if config.cues else 0)
        super().__init__(nn.Linear(inputs, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), to_mesh)
        self.lifts = lifts
        scaled = torch.as_tensor(template, dtype=torch.float32, device="cpu") / UNIT
        self.register_constant("template", scaled, cast=True)
        # A hand of about 0.18 m takes about 60 % of an image's side.
        mean_camera = torch.tensor([6.0 / config.crop, 0.0, 0.0], dtype=torch.float32, device="cpu")
        self.register_constant("mean_camera", mean_camera, cast=True)

    def forward(  # type: ignore[override]
        self, coarse_map: Tensor, joints_2d: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        seen = coarse_map.mean(dim=(2, 3))
        if joints_2d is not None:
            seen = torch.cat([seen, joints_2d.flatten(1).to(seen.dtype)], dim=1)
        initial = super().forward(seen)
        initial = initial.to(torch.promote_types(initial.dtype, torch.float32))
        log_scale, shift = initial[:, :1].clamp(-3, 3), 0.1 * initial[:, 1:3]
        camera = torch.cat([self.mean_camera[:1] * log_scale.exp(), self.mean_camera[1:] + shift], dim=1)
        if self.lifts:
            return self.template + initial[:, 3:].unflatten(1, (-1, 3)), camera
        return self.template.expand(len(initial), -1, -1), camera
