"""The road of every image: crop, network, mesh, camera, `Hand`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pahm.data.augment import normalise_all
from pahm.data.camera import project_weakly, ray_rotation, rotate, solve_translation
from pahm.data.crop import Crop, Request, read_crop
from pahm.data.open_image import MOST_PIXELS
from pahm.hand.left import mirror_faces
from pahm.infer.hand import Hand

READERS = 2  # threads that decode and crop
_BONE = (9, 10)  # joints at the ends of the middle finger's proximal bone, which FreiHAND's scale measures


class HandNetwork(Protocol):
    """What is asked of a network; `pahm.model.HandNet` is one. Its device and dtype are those of
    `joint_regressor`.
    """

    config: Any
    topology: Any
    joint_regressor: Tensor

    def __call__(self, images: Tensor, /) -> Any: ...


class Seen(NamedTuple):
    """Hands that a network sees in `B` crops, before they have a place. Float32 at least, on its device."""

    meshes: list[Tensor]
    """`(B, N_s, 3)` metres, relative to the root joint, axes of a camera that looks at the crop's centre."""
    camera: Tensor
    """`(B, 3)` weak perspective, see `Prediction`."""
    silhouette: Tensor | None
    """`(B, h, h)` probabilities that a pixel of the crop shows the hand; None without 2D heads."""
    turn: Tensor
    """`(B, 3, 3)` rotations from the axes of `meshes` to those of the image's camera."""
    vertices: Tensor
    """`(B, 778, 3)` metres: the last of `meshes` in the axes of the image's camera."""
    joints: Tensor
    """`(B, 21, 3)` metres, relative to the root joint, in the axes of the image's camera."""


def see(network: HandNetwork, pixels: Tensor, K: Tensor) -> Seen:
    """Run a network on crops and turn its meshes to the image's camera, all on the network's device.

    The network sees a hand wherever in the image its crop is, as a camera would that looks at the crop's
    centre. The turn is the smallest rotation from that camera's axis to the ray of the crop's centre.

    pixels: `(B, 3, S, S)`, normalised, as the network takes them. K: `(B, 3, 3)` float32, intrinsics of the
    crops' pixels.
    """
    prediction = network(pixels)
    with torch.autocast(pixels.device.type, enabled=False):
        meshes = [_full(mesh) for mesh in prediction.meshes]
        silhouette = None
        if prediction.cues:
            silhouette = _full(prediction.cues[-1].silhouette_logits)[:, 0].sigmoid()
        middle = (network.config.image_size - 1) / 2
        turn = ray_rotation(K, K.new_full((2,), middle))
        vertices = rotate(meshes[-1], turn)
        joints = network.joint_regressor.to(vertices.dtype) @ vertices
    return Seen(meshes, _full(prediction.camera), silhouette, turn, vertices, joints)


def _full(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def reconstruct(network: HandNetwork, crops: Sequence[Crop]) -> list[Hand | FloatingPointError]:
    """The hands in crops, in camera space, as one batch.

    After `see`, a hand's translation is the least-squares solution of the equations that put each vertex on
    the ray of the pixel where the network's weak-perspective camera sees it. If the hand's bone is known
    (`Request.bone`), the hand is scaled to it first. A left hand, which the network sees mirrored, is
    mirrored back. A hand may come out behind the camera.

    Gives an error for each crop for which the network's output is not finite.
    """
    if not crops:
        return []
    like = network.joint_regressor
    pixels = normalise_all([crop.pixels for crop in crops])
    K = torch.from_numpy(np.stack([crop.seen_K for crop in crops]))
    with torch.inference_mode():
        seen = see(
            network,
            pixels.to(like.device, like.dtype, memory_format=torch.channels_last),
            K.to(like.device, torch.float32),
        )
        placed = _place(seen, crops, K, int(network.config.image_size))
    hierarchy = network.topology.hierarchy
    pairs = zip(hierarchy.vertices, hierarchy.faces, strict=True)
    faces = {len(v): np.ascontiguousarray(f, np.int64) for v, f in pairs}
    silhouettes = None if seen.silhouette is None else seen.silhouette.float().cpu().numpy()
    hands: list[Hand | FloatingPointError] = []
    for i, crop in enumerate(crops):
        if not placed.finite[i]:
            hands.append(FloatingPointError(f"{crop.request.name}: the network's output is not finite"))
            continue
        level_faces = [faces[mesh.shape[1]] for mesh in placed.meshes]
        silhouette = None if silhouettes is None else silhouettes[i]
        if crop.request.left:
            level_faces = [mirror_faces(level) for level in level_faces]
            silhouette = None if silhouette is None else silhouette[:, ::-1]
        hands.append(
            Hand(
                meshes=[mesh[i].numpy() for mesh in placed.meshes],
                level_faces=level_faces,
                joints=placed.joints[i].numpy(),
                relative_meshes=[mesh[i].numpy() for mesh in placed.relative],
                vertices_2d=placed.vertices_2d[i].numpy(),
                joints_2d=placed.joints_2d[i].numpy(),
                K=crop.K,
                intrinsics_assumed=crop.request.intrinsics is None,
                weak_camera=placed.camera[i].numpy(),
                box=crop.box,
                left=crop.request.left,
                image=crop.image,
                source=crop.source,
                silhouette=silhouette,
            )
        )
    return hands


class _Placed(NamedTuple):
    """The fields of `B` hands as `Hand` has them, float64 on the CPU."""

    meshes: list[Tensor]
    joints: Tensor
    relative: list[Tensor]
    vertices_2d: Tensor
    joints_2d: Tensor
    camera: Tensor
    finite: Tensor
    """`(B,)`, whether all that the network gave is finite."""


def _place(seen: Seen, crops: Sequence[Crop], K: Tensor, size: int) -> _Placed:
    """K: (B, 3, 3) float64, intrinsics of the crops' pixels. size: the crops' side in pixels."""
    # All values at once: a device is asked once, and each operation runs once.
    counts = [mesh.shape[1] for mesh in seen.meshes]
    parts = [*seen.meshes, seen.joints, seen.turn, seen.camera[:, None]]
    values = torch.cat(parts, 1).cpu().double()  # in this order: some devices have no float64
    finite = values.sum((1, 2)).isfinite()  # sums of float32's largest numbers are finite in float64
    relative, joints, turn, camera = values.split([sum(counts), seen.joints.shape[1], 3, 1], 1)
    camera = camera[:, 0]
    last = relative[:, -counts[-1] :]
    weak = project_weakly(torch.cat([last, rotate(joints, turn.mT)], 1), camera, size)

    points = torch.cat([rotate(relative, turn), joints], 1)
    bones = [crop.request.bone for crop in crops]
    if any(bones):
        wanted = torch.from_numpy(np.array([bone or np.nan for bone in bones]))
        lengths = torch.linalg.vector_norm(joints[:, _BONE[0]] - joints[:, _BONE[1]], dim=1)
        points = points * torch.where(wanted.isnan(), 1.0, wanted / lengths)[:, None, None]
    level, end = sum(counts), counts[-1]
    translation = solve_translation(points[:, level - end : level], weak[:, :end], K)[:, None]
    points = points + translation
    if any(crop.request.left for crop in crops):
        sides = [-1.0 if crop.request.left else 1.0 for crop in crops]
        mirrored = torch.from_numpy(np.array([[[side, 1.0, 1.0]] for side in sides]))
        points, relative = mirrored * points, mirrored * relative
        camera = camera * mirrored[:, 0, [1, 0, 2]]
    to_image = torch.from_numpy(np.linalg.inv(np.stack([crop.matrix for crop in crops])))
    pixels = torch.baddbmm(to_image[:, None, :2, 2], weak, to_image[:, :2, :2].mT)
    *meshes, placed_joints = points.split([*counts, points.shape[1] - level], 1)
    return _Placed(
        meshes=meshes,
        joints=placed_joints,
        relative=list(relative.split(counts, 1)),
        vertices_2d=pixels[:, :end],
        joints_2d=pixels[:, end:],
        camera=camera,
        finite=finite,
    )


def reconstruct_all(
    network: HandNetwork, requests: Iterator[Request], batch_size: int, readers: int = READERS
) -> Iterator[tuple[Request, Hand | Exception]]:
    """Read and crop images in threads while `reconstruct` takes `batch_size` at once; in their order.

    Gives each request with its hand, or with the error that names its image. About two batches of images are
    held, and fewer of very large photographs.
    """
    size, share = int(network.config.image_size), float(network.config.crop)
    pool = ThreadPoolExecutor(max(1, min(readers, batch_size)), thread_name_prefix="pahm-read")

    def read_ahead(count: int) -> list[tuple[Request, Future[Crop | Exception]]]:
        return [
            (request, pool.submit(read_crop, request, size, share)) for request in islice(requests, count)
        ]

    try:
        ahead = read_ahead(batch_size)
        while ahead:
            batch = [(request, future.result()) for request, future in ahead]
            crops = [crop for _, crop in batch if isinstance(crop, Crop)]
            most = max((crop.image.width * crop.image.height for crop in crops), default=1)
            ahead = read_ahead(max(1, min(batch_size, 2 * MOST_PIXELS // most)))
            hands = iter(reconstruct(network, crops))
            for request, crop in batch:
                yield request, crop if isinstance(crop, Exception) else next(hands)
    finally:
        pool.shutdown(cancel_futures=True)
