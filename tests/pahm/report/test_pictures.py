import numpy as np
import pytest
from PIL import Image
from resting_hand import hue_share, resting_hand

from pahm.infer.drawing import PREDICTED, TRUE
from pahm.report.pictures import SheetRow, contact_sheet, from_the_side


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
    hand = resting_hand()
    rows = [
        SheetRow(hand, hand.vertices + np.array([0.01, 0, 0]), "PA 5.1 mm"),
        SheetRow(hand),
    ]
    sheet = contact_sheet(rows, cell)
    bare = contact_sheet([SheetRow(hand)] * 2, cell)
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
    pixels = np.full((128, 128, 3), 120, np.uint8)
    pixels[64:, 64:] = (250, 10, 10)
    hand = resting_hand(image=Image.fromarray(pixels), box=(64.0, 64.0, 64.0, 64.0))
    sheet = contact_sheet([SheetRow(hand)], 64)
    picture = sheet.crop((4, sheet.height - 68, 68, sheet.height - 4))
    assert picture.getcolors(1) == [(64 * 64, (250, 10, 10))]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="rows: expected at least one, got none"):
        contact_sheet([])
    with pytest.raises(ValueError, match="cell: expected at least 32 pixels, got 8"):
        contact_sheet([SheetRow(resting_hand())], 8)
