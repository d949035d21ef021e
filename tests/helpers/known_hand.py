"""A network that gives a known hand, for tests of what is around it."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import nn

from pahm.hand import HandModel
from pahm.hand.topology import HandTopology
from pahm.model.network import Prediction

SIZE = 64
TOPOLOGY = HandTopology.load()


def known_hand():
    """A bent right hand relative to its root joint, (778, 3) float64 metres."""
    hand = HandModel.load().double()
    pose = torch.zeros(1, 16, 3, dtype=torch.float64)
    pose[0, 1:] = 0.25 * torch.randn(15, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pose[0, 0] = torch.tensor([0.4, -0.9, 1.3])
    output = hand(pose)
    return (output.vertices[0] - output.joints[0, 9]).detach().numpy()


class KnownNetwork(nn.Module):
    """Returns a given mesh and camera; with `look` > 0 both also follow the brightness of the crop."""

    def __init__(self, mesh, camera, look=0.0):
        super().__init__()
        self.config = SimpleNamespace(image_size=SIZE, crop=1.0, root_joint=9)
        self.topology = TOPOLOGY
        self.register_buffer("joint_regressor", torch.tensor(TOPOLOGY.joint_regressor, dtype=torch.float32))
        self.register_buffer("mesh", torch.tensor(mesh))
        self.register_buffer("camera", torch.tensor(camera, dtype=torch.float64))
        self.look = look
        self.seen = []

    def forward(self, images):
        self.seen.append(images.clone())
        ramp = torch.linspace(-1, 1, SIZE)
        across = (images.mean(1) * ramp).mean((1, 2))
        down = (images.mean(1) * ramp[:, None]).mean((1, 2))
        mesh = self.mesh * (1 + self.look * torch.stack([across, down, across - down], -1)[:, None])
        camera = self.camera.repeat(len(images), 1)
        camera[:, 1] += 0.1 * self.look * across
        levels = [mesh[:, TOPOLOGY.hierarchy.selection(level)] for level in (3, 2, 1, 0)]
        return Prediction(levels, camera, [], [])


def picture(seed=0, size=(90, 70)):
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def enclosed(vertices, faces):
    """The volume inside an open mesh whose one hole, the wrist, is closed by a fan; negative inside out."""
    edges = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    sides, counts = np.unique(edges, axis=0, return_counts=True)
    corners = (vertices - vertices[sides[counts == 1]].mean((0, 1)))[faces]
    return np.linalg.det(corners).sum() / 6
