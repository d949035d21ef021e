"""A `Hand` without a network: the template at rest, half a metre before the camera."""

from typing import Any

import numpy as np
from PIL import Image

from pahm.hand.topology import HandTopology
from pahm.infer.hand import Hand

TOPOLOGY = HandTopology.load()
K = np.array([[200.0, 0, 63.5], [0, 200.0, 63.5], [0, 0, 1]])


def resting_hand(**changes):
    """The hand in a grey image of 128 x 128 pixels, with some of its fields changed."""
    levels = [
        (vertices - TOPOLOGY.hierarchy.vertices[0].mean(0)) * 1.2 for vertices in TOPOLOGY.hierarchy.vertices
    ]
    # Palm towards the camera.
    levels = [level[:, [0, 2, 1]] * [1, 1, -1] + [0, 0, 0.5] for level in reversed(levels)]
    pixels = levels[-1] @ K.T
    values: dict[str, Any] = dict(
        joints=TOPOLOGY.joint_regressor @ levels[-1],
        meshes=levels,
        level_faces=[np.asarray(faces) for faces in reversed(TOPOLOGY.hierarchy.faces)],
        relative_meshes=levels,
        vertices_2d=pixels[:, :2] / pixels[:, 2:],
        joints_2d=np.zeros((21, 2)),
        K=K,
        intrinsics_assumed=False,
        weak_camera=np.array([5.0, 0, 0]),
        box=(0.0, 0.0, 128.0, 128.0),
        left=False,
        image=Image.new("RGB", (128, 128), (120, 120, 120)),
        source=None,
        silhouette=None,
    )
    return Hand(**values | changes)


def hue_share(picture, colour):
    """Share of pixels whose strongest channel is that of `colour`, by a clear margin."""
    pixels = np.asarray(picture, int)
    strongest = int(np.argmax(colour))
    others = [channel for channel in range(3) if channel != strongest]
    return (pixels[..., strongest] > pixels[..., others].max(-1) + 15).mean()
