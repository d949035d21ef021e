"""A SpiralNet++-style autoencoder of shapes, for any triangle mesh: python mesh_autoencoder.py FILE [STEPS]

The shapes are the file's mesh, bent at random. To train on registered meshes of your own, replace `bent`.
"""

import sys

import torch
from torch import Tensor, nn

from pahm_ops import MeshPool, SpiralConv
from pahm_ops.mesh import MeshHierarchy, load_mesh


class Autoencoder(nn.Module):
    """Vertices (B, N, 3) to a code (B, `code`) and back, through the levels of a hierarchy."""

    def __init__(self, levels: MeshHierarchy, channels: tuple[int, ...] = (16, 32, 64), code: int = 16):
        super().__init__()
        tables = [torch.from_numpy(levels.spiral_indices(s, 9)) for s in range(len(levels.sizes))]
        down, up = [], [SpiralConv(channels[0], 3, tables[0])]
        for s, (wide, narrow) in enumerate(zip((3, *channels), channels, strict=False)):
            down += [SpiralConv(wide, narrow, tables[s]), nn.ELU(), MeshPool(levels.down[s])]
            back = max(wide, channels[0])
            up = [MeshPool(levels.up[s]), SpiralConv(narrow, back, tables[s]), nn.ELU(), *up]
        size, flat = (levels.sizes[-1], channels[-1]), levels.sizes[-1] * channels[-1]
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(flat, code))
        self.decoder = nn.Sequential(nn.Linear(code, flat), nn.Unflatten(1, size), *up)

    def forward(self, shapes: Tensor) -> Tensor:
        return self.decoder(self.encoder(shapes))


def bent(rest: Tensor, count: int) -> Tensor:
    """`count` shapes (count, N, 3): each coordinate of the mesh (N, 3) moved by slow waves along it."""
    size, waves = 0.2 * torch.randn(count, 1, 3), torch.randn(count, 3, 3)
    return rest + size * torch.sin(rest @ waves + 6.3 * torch.rand(count, 1, 3))


def train(path: str, steps: int = 300) -> list[float]:
    vertices, faces = load_mesh(path)
    vertices = (vertices - vertices.mean(0)) / vertices.std()
    levels = MeshHierarchy.build(vertices, faces, [max(len(vertices) // 3**s, 12 - s) for s in range(4)])
    model, losses = Autoencoder(levels), []
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(steps):
        shapes = bent(torch.from_numpy(vertices).float(), 16)
        loss = (model(shapes) - shapes).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: mean error {losses[-1]:.4f} of the mesh's standard deviation")
    return losses


if __name__ == "__main__":
    train(sys.argv[1], *map(int, sys.argv[2:]))
