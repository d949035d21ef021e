"""Measures what makes a hand hard to reconstruct, from its ground truth and mask (figure 4 of the paper)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pahm.data.crop import hand_box
from pahm.synth.render import Scene, trace


class Limit(NamedTuple):
    """`usual` is the share of an easy hand. A share counts as a reason from `named` on."""

    usual: float
    named: float


LIMITS = {
    "occlusion": Limit(0.0, 0.10),
    "out of frame": Limit(0.0, 0.05),
    # An open hand hides half of its vertices, those on its far side, and is still easy.
    "self-occlusion": Limit(0.50, 0.60),
}
"""The share from which `dominant` names each reason, in the order of `Reasons`."""
NONE = "none stands out"
_DEPTH = 1e-3  # metres; a surface hides a vertex if it is this much nearer


class Reasons(NamedTuple):
    """Shares from 0 to 1 that measure how hard a hand is; see `find_reasons`."""

    occlusion: float
    """NaN if unknown."""
    out_of_frame: float
    self_occlusion: float


def find_reasons(sample: dict[str, Any], faces: npt.ArrayLike, share: float = 1.0) -> Reasons:
    """Measure the reasons of an annotated, untransformed sample of `FreiHand`.

    faces: (F, 3), the triangles of the sample's `vertices` (N, 3), metres, camera space. share: the network
    sees the square about the image's centre with this fraction of its longer side (`ModelConfig.crop`).
    Returns

    - occlusion: the part of the true mesh's silhouette, in image pixels, that the mask lacks; NaN without a
      mask or if the silhouette is outside the image;
    - out of frame: the fraction of the vertices that project outside that square, or outside the image;
    - self-occlusion: the fraction of the vertices that the hand itself hides from the camera, because they
      face away or are behind another part. One ray per vertex tests this.

    Raises ValueError for a share that is not positive and finite, for a mask whose size differs from the
    image's, and as `pahm.synth.render.trace` for vertices that are not in front of the camera.
    """
    if not (math.isfinite(share) and share > 0):
        raise ValueError(f"share: expected a positive, finite fraction, got {share}")
    vertices, K = np.asarray(sample["vertices"], np.float64), np.asarray(sample["K"], np.float64)
    width, height = sample["image"].size
    _, ids = trace(vertices, faces, K, (height, width))
    pixels = vertices @ K.T
    pixels = pixels[:, :2] / pixels[:, 2:]
    x, y, side, _ = hand_box((width, height), None, share)
    first, last = np.maximum([x, y], 0), np.minimum([x + side, y + side], [width, height])
    outside = ((pixels < first - 0.5) | (pixels > last - 0.5)).any(axis=1)
    rays = np.ascontiguousarray(vertices / vertices[:, 2:], np.float32)
    hidden = Scene(vertices, faces).cast(rays).depth < vertices[:, 2] - _DEPTH
    return Reasons(_occlusion(sample, ids >= 0), float(outside.mean()), float(hidden.mean()))


def _occlusion(sample: dict[str, Any], silhouette: npt.NDArray[np.bool_]) -> float:
    if "mask" not in sample or not silhouette.any():
        return math.nan
    mask = np.asarray(sample["mask"]) > 127
    if mask.shape != silhouette.shape:
        (height, width), shape = mask.shape, silhouette.shape
        raise ValueError(
            f"mask: that of image {sample['index']} has {width} x {height} pixels, "
            f"expected {shape[1]} x {shape[0]} as the image has"
        )
    return float(1 - mask[silhouette].mean())


def dominant(reasons: Reasons) -> str:
    """The name in `LIMITS` of the reason furthest above its usual share, in units of the distance from the
    usual share to the limit; `NONE` if no known reason reaches its limit.
    """
    excess = {
        name: (share - limit.usual) / (limit.named - limit.usual)
        for (name, limit), share in zip(LIMITS.items(), reasons, strict=True)
        if not math.isnan(share)
    }
    name = max(excess, key=excess.__getitem__)
    return name if excess[name] >= 1 else NONE
