import numpy as np
import pytest
from PIL import Image

from pahm.hand.topology import HandTopology, level_name
from pahm.infer.predictor import HandPrediction
from pahm.report.pictures import (
    PREDICTED,
    TRUE,
    SheetRow,
    contact_sheet,
    from_the_side,
    mesh_cutout,
    mesh_picture,
    overlay,
)

TOPOLOGY = HandTopology.load()
K = np.array([[200.0, 0, 63.5], [0, 200.0, 63.5], [0, 0, 1]])


def test_levels_are_named_by_their_vertices():
    # METRO has M3 and M1 only, a network with refinements M1 several times.
    assert [level_name(count) for count in (98, 195, 389, 778)] == [
        "M4 (98)",
        "M3 (195)",
        "M2 (389)",
        "M1 (778)",
    ]


def hand(left=False):
    """A prediction of the rest hand half a metre ahead, in a grey image of 128 x 128 pixels."""
    levels = [
        (vertices - TOPOLOGY.hierarchy.vertices[0].mean(0)) * 1.2 for vertices in TOPOLOGY.hierarchy.vertices
    ]
    # Palm towards the camera.
    levels = [level[:, [0, 2, 1]] * [1, 1, -1] + [0, 0, 0.5] for level in reversed(levels)]
    pixels = levels[-1] @ K.T
    return HandPrediction(
        vertices=levels[-1],
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
        left=left,
        image=Image.new("RGB", (128, 128), (120, 120, 120)),
        source=None,
    )


def hue_share(picture, colour):
    """Share of pixels whose strongest channel is that of `colour`, by a clear margin."""
    pixels = np.asarray(picture, int)
    strongest = int(np.argmax(colour))
    others = [channel for channel in range(3) if channel != strongest]
    return (pixels[..., strongest] > pixels[..., others].max(-1) + 15).mean()


def test_overlay_covers_the_hand_and_nothing_else():
    prediction = hand()
    drawn = np.asarray(overlay(prediction.image, prediction.vertices, prediction.faces, K), int)
    changed = np.abs(drawn - 120).max(-1) > 3
    pixels = prediction.vertices_2d.round().astype(int)
    assert changed[pixels[:, 1], pixels[:, 0]].mean() > 0.9
    low, high = pixels.min(0) - 1, pixels.max(0) + 1
    changed[low[1] : high[1] + 1, low[0] : high[0] + 1] = False
    assert not changed.any()


def test_overlay_opacity():
    prediction = hand()
    arguments = (prediction.image, prediction.vertices, prediction.faces, K)
    none, half, full = (np.asarray(overlay(*arguments, opacity=value), float) for value in (0, 0.5, 1))
    assert (none == 120).all()
    np.testing.assert_allclose(half, (none + full) / 2, atol=1.01)
    with pytest.raises(ValueError, match=r"opacity: expected a number from 0 to 1, got 1.5"):
        overlay(*arguments, opacity=1.5)


def test_overlay_of_a_large_image_lies_where_that_of_a_small_one_does():
    prediction = hand()
    small = overlay(prediction.image, prediction.vertices, prediction.faces, K)
    factor = 16
    large_K = K.copy()
    large_K[:2] *= factor
    large_K[:2, 2] += (factor - 1) / 2
    large_image = prediction.image.resize((128 * factor, 128 * factor))
    large = overlay(large_image, prediction.vertices, prediction.faces, large_K)
    assert large.size == (2048, 2048)
    difference = np.asarray(large.resize((128, 128), Image.Resampling.BOX), float) - np.asarray(small, float)
    assert np.abs(difference).mean() < 1.0


def test_flat_shading_shows_the_facets():
    prediction = hand()
    arguments = (prediction.meshes[0], prediction.level_faces[0], K, (128, 128))
    smooth, flat = (np.asarray(mesh_picture(*arguments, flat=flat)) for flat in (False, True))
    assert len(np.unique(flat.reshape(-1, 3), axis=0)) < len(np.unique(smooth.reshape(-1, 3), axis=0))
    assert (flat[0, 0] == 255).all() and hue_share(flat, PREDICTED) > 0.02


def test_cutout_is_the_picture_without_its_paper():
    prediction = hand()
    arguments = (prediction.vertices, prediction.faces, K, (128, 128))
    cutout = mesh_cutout(*arguments)
    cover = np.asarray(cutout.getchannel("A"))
    pixels = prediction.vertices_2d.round().astype(int)
    assert cutout.mode == "RGBA" and (cover[pixels[:, 1], pixels[:, 0]] > 0).mean() > 0.95
    assert cover[0].max() == 0 and 0.02 < (cover == 255).mean() < 0.5
    paper = Image.new("RGBA", (128, 128), "white")
    paper.alpha_composite(cutout)
    difference = np.asarray(paper.convert("RGB"), int) - np.asarray(mesh_picture(*arguments), int)
    assert np.abs(difference).max() <= 2


def test_side_view_is_a_quarter_turn():
    points = np.random.default_rng(0).normal(0, 0.1, (40, 3)) + np.array([0.2, 0, 0.7])
    turned = from_the_side(points)
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(turned[:, None] - turned, axis=-1), distances, atol=1e-12)
    assert np.linalg.det((turned[1:4] - turned[0]) @ np.linalg.inv(points[1:4] - points[0])) > 0
    middle = (turned.min(0) + turned.max(0)) / 2
    np.testing.assert_allclose(middle[:2], 0, atol=1e-12)
    assert np.ptp(turned[:, 0]) == pytest.approx(np.ptp(points[:, 2]))


def test_contact_sheet_has_a_picture_for_every_column_and_row():
    cell = 96
    prediction = hand()
    rows = [
        SheetRow(prediction, prediction.vertices + np.array([0.01, 0, 0]), "PA 5.1 mm"),
        SheetRow(prediction),
    ]
    sheet = contact_sheet(rows, cell)
    bare = contact_sheet([SheetRow(prediction)] * 2, cell)
    assert sheet.height == bare.height and sheet.width > bare.width + 2 * cell
    cells, margin = 9, sheet.width - 9 * (cell + 4) - 4
    assert margin > 20
    header = sheet.height - 2 * (cell + 4)
    for row in range(2):
        for column in range(cells):
            left, top = margin + 4 + column * (cell + 4), header + row * (cell + 4)
            picture = sheet.crop((left, top, left + cell, top + cell))
            if column == 0:
                assert picture.getcolors(1) == [(cell * cell, (120, 120, 120))]
            elif column in (6, 8):
                assert (hue_share(picture, TRUE) > 0.02) == (row == 0)
            else:
                assert hue_share(picture, PREDICTED) > 0.02
    labels = np.asarray(sheet.crop((0, header, margin, header + cell)))
    titles = np.asarray(sheet.crop((margin, 0, sheet.width, header)))
    assert (labels < 100).any() and (titles < 100).any()
    assert (np.asarray(sheet.crop((0, header + cell + 4, margin, sheet.height))) == 255).all()


def test_sheet_shows_the_crop_that_the_network_saw():
    prediction = hand()
    pixels = np.full((128, 128, 3), 120, np.uint8)
    pixels[64:, 64:] = (250, 10, 10)
    values = vars(prediction) | {"image": Image.fromarray(pixels), "box": (64.0, 64.0, 64.0, 64.0)}
    sheet = contact_sheet([SheetRow(HandPrediction(**values))], 64)
    picture = sheet.crop((4, sheet.height - 68, 68, sheet.height - 4))
    assert picture.getcolors(1) == [(64 * 64, (250, 10, 10))]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="rows: expected at least one, got none"):
        contact_sheet([])
    with pytest.raises(ValueError, match="cell: expected at least 32 pixels, got 8"):
        contact_sheet([SheetRow(hand())], 8)
