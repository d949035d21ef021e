"""The pixel-aligned feature mapping (section 3.2): image features at the projections of the vertices."""

from __future__ import annotations

from torch import Tensor, nn

from pahm_ops import vertex_sample


class PixelAligned(nn.Module):
    """G_s = f(Q_s, pi(M_s)), equation 2: bilinear samples of a map at the projected vertices.

    The camera pi is weak perspective, predicted by the network itself. The paper leaves it open; this choice
    needs no intrinsics at inference, so any image can be reconstructed, and it is supervised by the
    projections of the true vertices (`pahm.losses.projection_loss`). Vertices outside the image read the
    nearest border pixel, as in MobRecon, so that a bad first guess still gets a gradient.

    Forward: `features (B, C, H, W)`, `vertices (B, N, 3)` in metres relative to the root joint,
    `camera (B, 3)` = [s, tx, ty] with x_n = s * (X + tx) in normalised coordinates (-1 and 1 are the image's
    outer edges, `align_corners=False`), to `(B, N, C)`.
    """

    def forward(self, features: Tensor, vertices: Tensor, camera: Tensor) -> Tensor:
        return vertex_sample(features, vertices, camera, align_corners=False, padding_mode="border")
