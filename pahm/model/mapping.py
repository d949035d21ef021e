"""Feature mapping (section 3.2): from image feature maps to features of the vertices.

Each mapping's forward takes `features`, one map `(B, C, H, W)` or several, `vertices (B, N, 3)` in metres
relative to the root joint, and `camera (B, 3)` = [s, tx, ty], and gives `(B, N, C)`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pahm_ops import vertex_sample


class PixelAligned(nn.Module):
    """G_s = f(Q_s, pi(M_s)), equation 2: bilinear samples of a map at the projected vertices.

    The camera pi is weak perspective, predicted by the network itself: x_n = s * (X + tx) in normalised
    coordinates (-1 and 1 are the image's outer edges, `align_corners=False`). The paper leaves it open; this
    choice needs no intrinsics at inference, so any image can be reconstructed, and it is supervised by the
    projections of the true vertices (`pahm.train.losses.projection_loss`). Vertices outside the image read
    the nearest border pixel, as in MobRecon, so that a bad first guess still gets a gradient.
    """

    def forward(self, features: Tensor | Sequence[Tensor], vertices: Tensor, camera: Tensor) -> Tensor:
        return vertex_sample(features, vertices, camera, align_corners=False, padding_mode="border")


class GlobalRepeat(nn.Module):
    """The baseline of Table 1's first row: the global feature, the mean of a map, repeated for each vertex.

    GraphCMR (Kolotouros et al., CVPR 2019) and Kulon et al. (CVPR 2020) see the image this way.
    """

    def forward(self, features: Tensor, vertices: Tensor, camera: Tensor) -> Tensor:
        return features.mean(dim=(2, 3))[:, None].expand(-1, vertices.shape[1], -1)


class GlobalMLP(nn.Module):
    """The baseline of Table 1's second row: the global feature of C_in channels through an MLP to all `N x C`
    vertex features at once (section 3.2). The paper does not give its depth; here it has one hidden layer of
    C_in.
    """

    def __init__(self, inputs: int, vertices: int, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, inputs), nn.GELU(), nn.Linear(inputs, vertices * channels)
        )
        self.channels = channels

    def forward(self, features: Tensor, vertices: Tensor, camera: Tensor) -> Tensor:
        return self.layers(features.mean(dim=(2, 3))).unflatten(1, (-1, self.channels))
