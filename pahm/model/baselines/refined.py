"""Refinements of the full mesh, which coarse-to-fine decoding is compared with (Table 3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pahm.config import ModelConfig
from pahm.hand.topology import HandTopology
from pahm.model.network import UNIT, FeatureMapping, MeshDecoder, MeshLevel, PixelAligned, level_spirals

REFINED_MAPS: dict[int, list[tuple[int, ...]]] = {1: [(1, 2, 3)], 3: [(1,), (2,), (3,)]}
"""Which of Q_32, Q_16, Q_8, Q_4 each refinement samples, by the number of refinements."""


class RefinedDecoder(MeshDecoder):
    """The decoder, then further levels at M1, each of which samples finer maps at the full mesh.

    Tang et al. (ICCV 2021) refine a rough mesh so: by one level that reads Q_16, Q_8 and Q_4 together, or by
    three that read one each. Called as `MeshDecoder` is; each refinement adds a mesh of 778 vertices.
    """

    def __init__(
        self, config: ModelConfig, topology: HandTopology, mappings: Sequence[FeatureMapping]
    ) -> None:
        super().__init__(config, topology, mappings)
        spirals = level_spirals(topology, 0, config.spiral_length)
        channels, heads = config.decoder_channels[-1], config.attention_heads[-1]
        self.refine = nn.ModuleList()
        for places in REFINED_MAPS[config.refinements]:
            mapping = PixelAligned(places, sum(config.feature_channels[i] for i in places))
            self.refine.append(MeshLevel(mapping, channels, channels, spirals, heads))

    def forward(self, maps: Sequence[Tensor], joints_2d: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        meshes, features, camera = self.coarse_to_fine(maps, joints_2d)
        for level in self.refine:
            mesh, features = level(maps, meshes[-1], camera, features)
            meshes.append(mesh)
        return [mesh * UNIT for mesh in meshes], camera, []
