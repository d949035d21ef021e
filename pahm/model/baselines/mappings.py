"""Other feature mappings than the pixel-aligned one (Tables 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pahm.model.network import FeatureMapping


class GlobalRepeat(FeatureMapping):
    """The global feature, the mean of Q_32, repeated for each vertex (Table 1, first row).

    GraphCMR (Kolotouros et al., CVPR 2019) and Kulon et al. (CVPR 2020) see the image this way.
    """

    def forward(self, maps: Sequence[Tensor], vertices: Tensor, camera: Tensor) -> Tensor:
        return maps[0].mean(dim=(2, 3))[:, None].expand(-1, vertices.shape[1], -1)


class GlobalMLP(FeatureMapping):
    """The global feature of `inputs` channels through an MLP to the features of all vertices at once (section
    3.2; Table 1, second row). The paper does not give its depth; here it has one hidden layer of `inputs`.
    """

    def __init__(self, inputs: int, vertices: int, channels: int) -> None:
        super().__init__(channels)
        self.layers = nn.Sequential(
            nn.Linear(inputs, inputs), nn.GELU(), nn.Linear(inputs, vertices * channels)
        )

    def forward(self, maps: Sequence[Tensor], vertices: Tensor, camera: Tensor) -> Tensor:
        return self.layers(maps[0].mean(dim=(2, 3))).unflatten(1, (-1, self.channels))


class NoSkip(FeatureMapping):
    """No features: the level sees the image only through those of the coarser one (Table 2)."""

    def __init__(self) -> None:
        super().__init__(0)

    def forward(self, maps: Sequence[Tensor], vertices: Tensor, camera: Tensor) -> Tensor:
        return vertices[..., :0]
