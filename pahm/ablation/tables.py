"""Tables 1 to 4 of the paper: their rows as changes to a configuration, and the paper's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pahm.config import Config

SCORES = {"pa_mpjpe": "PA-MPJPE mm", "pa_mpvpe": "PA-MPVPE mm", "f5": "F@5 mm", "f15": "F@15 mm"}
"""The titles of the tables' scores, by their names in `HandMetrics`."""

RESULT = "{variant}-seed{seed}.json"
"""The name of the file in `results/` with a run's scores."""


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    cells: tuple[str, ...]
    """The text of the table's descriptive columns."""
    paper: tuple[float, ...]
    """The paper's scores, in the order of `Table.scores`."""
    variant: str | None = None
    """Name of the network in `VARIANTS`; None for a result that the paper quotes from others."""


@dataclass(frozen=True)
class Table:
    """One table of the paper."""

    title: str
    columns: tuple[str, ...]
    scores: tuple[str, ...]
    rows: tuple[Row, ...]


_FIRST, _ALL = [True, False, False, False], [True] * 4
_WITHOUT_2D = {"loss.silhouette": 0.0, "loss.pose": 0.0, "loss.position": 0.0}
_GLOBAL = {"model.skips": _FIRST, **_WITHOUT_2D}

VARIANTS: dict[str, tuple[bool, dict[str, Any]]] = {
    "repeat": (False, {"model.mapping": "repeat", **_GLOBAL}),
    "mlp": (False, {"model.mapping": "mlp", **_GLOBAL}),
    "mlp-attention": (True, {"model.mapping": "mlp", **_GLOBAL}),
    "aligned-without-2d": (False, _WITHOUT_2D),
    "aligned": (False, {}),
    "aligned-attention": (True, {}),
    "skips-m4": (False, {"model.skips": _FIRST}),
    "skips-m4-m3": (False, {"model.skips": [True, True, False, False]}),
    "skips-m4-m2": (False, {"model.skips": [True, True, True, False]}),
    "refine-once": (False, {"model.skips": _FIRST, "model.refinements": 1}),
    "refine-three-times": (False, {"model.skips": _FIRST, "model.refinements": 3}),
    "metro": (False, {"model.decoder": "metro", "model.mapping": "repeat", "model.cues": False}),
    "metro-aligned": (False, {"model.decoder": "metro"}),
    "gcn-stacked": (True, {"model.stacks": 2}),
}
"""Each network by name: whether its graph convolutions have self-attention, and its other changes to the base
configuration. The base is the pixel-aligned network with 2D supervision and skip connections into all levels.

Networks shared by several tables run once: the last row of Table 2 is the fourth of Table 1 and the last of
Table 3.

All rows of Table 1 have the same extractor and the same first mesh, which reads the mean of Q_32 and the 2D
pose. "Without 2D" removes only the losses of the silhouette and of the 2D pose (its heatmaps and its
positions). All rows keep the projection loss, which trains the camera. The rows with global features have no
2D supervision either: the paper compares them with its third row, "which has the same architecture" and no 2D
supervision. They see the image only at the first mesh and at M4, as in Kulon et al. (CVPR 2020).
"""


def configuration(base: Config, variant: str) -> Config:
    """The base configuration changed to one of `VARIANTS`. Without attention, the heads become 0."""
    attention, changes = VARIANTS[variant]
    heads = {} if attention else {"model.attention_heads": [0, 0, 0, 0]}
    return base.override({**heads, **changes, "name": variant})


_TWO = ("pa_mpjpe", "pa_mpvpe")
_OTHERS = (
    ("Hasson et al., 2019", (13.3, 13.3, 0.429, 0.907)),
    ("Zimmermann et al., 2019", (10.9, 11.0, 0.516, 0.934)),
    ("Kulon et al., 2020", (8.4, 8.6, 0.614, 0.966)),
    ("Pose2Mesh, 2020", (7.7, 7.8, 0.674, 0.969)),
    ("I2L-MeshNet, 2020", (7.4, 7.6, 0.681, 0.973)),
    ("Tang et al., 2021", (7.1, 7.1, 0.706, 0.977)),
    ("Chen et al., 2021b", (6.9, 7.0, 0.715, 0.977)),
)

TABLES: dict[str, Table] = {
    "table1": Table(
        "Mapping module, 2D supervision and self-attention",
        ("Features", "Mapping", "Self-attention"),
        _TWO,
        (
            Row(("global", "repeat", "no"), (10.1, 10.3), "repeat"),
            Row(("global", "MLP", "no"), (9.1, 9.2), "mlp"),
            Row(("maps, without 2D", "pixel-aligned", "no"), (8.3, 8.4), "aligned-without-2d"),
            Row(("maps, with 2D", "pixel-aligned", "no"), (7.8, 7.9), "aligned"),
            Row(("global", "MLP", "yes"), (8.4, 8.6), "mlp-attention"),
            Row(("maps", "pixel-aligned", "yes"), (7.5, 7.7), "aligned-attention"),
        ),
    ),
    "table2": Table(
        "Skip connections into the levels of the decoder",
        ("Levels",),
        _TWO,
        (
            Row(("M4",), (8.25, 8.31), "skips-m4"),
            Row(("M4, M3",), (8.06, 8.13), "skips-m4-m3"),
            Row(("M4, M3, M2",), (7.93, 8.02), "skips-m4-m2"),
            Row(("M4, M3, M2, M1",), (7.83, 7.93), "aligned"),
        ),
    ),
    "table3": Table(
        "Coarse-to-fine decoding against refinement of the full mesh",
        ("Method",),
        _TWO,
        (
            Row(("refine once",), (8.31, 8.42), "refine-once"),
            Row(("refine three times",), (8.12, 8.22), "refine-three-times"),
            Row(("coarse to fine",), (7.83, 7.93), "aligned"),
        ),
    ),
    "table4": Table(
        "Comparison with other methods",
        ("Method",),
        tuple(SCORES),
        (
            *(Row((name,), scores) for name, scores in _OTHERS),
            Row(("METRO",), (6.8, 6.7, 0.717, 0.981), "metro"),
            Row(("Graphormer, 2021a",), (6.0, 5.9, 0.764, 0.986)),
            Row(("ours with METRO",), (6.1, 6.2, 0.757, 0.984), "metro-aligned"),
            Row(("ours with GCN",), (5.9, 6.0, 0.766, 0.985), "gcn-stacked"),
        ),
    ),
}
