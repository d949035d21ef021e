"""Images of every kind that PIL opens, damaged, huge, odd or plain: one picture or one sentence."""

import io
import os
import struct

import numpy as np
import pytest
from PIL import Image

from pahm.cli import main
from pahm.data.camera import read_intrinsics
from pahm.data.crop import load_image
from pahm.data.open_image import MOST_PIXELS, decode_image, read_image
from pahm.infer.predictor import Predictor
from pahm.model import load_checkpoint
from pahm.synth.backgrounds import crop_background

GREY = np.add.outer(np.arange(48), np.arange(64)).astype(np.uint8) * 2
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)


@pytest.fixture(scope="module")
def predictor():
    return Predictor(load_checkpoint(), "cpu")


def encoded(picture, suffix, **options):
    stream = io.BytesIO()
    picture.save(stream, suffix, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "block", [b"Exif\0\0not a TIFF header", b"Exif\0\0MM\0*\0\0\0\x08\0\x05", b"Exif\0\0"]
)
@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_no_exif(tmp_path, suffix, block):
    path = tmp_path / "a"
    path.write_bytes(encoded(Image.fromarray(COLOUR), suffix, exif=b"Exif\0\0" + block))
    image, _ = load_image(path)
    assert image.size == (64, 48) and image.mode == "RGB"


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_whole_exif_turns_the_image(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x112] = 6
    path = tmp_path / "a"
    path.write_bytes(encoded(Image.fromarray(COLOUR), suffix, exif=exif.tobytes()))
    assert load_image(path)[0].size == (48, 64)
    assert read_image(path).size == (64, 48) or suffix == "TIFF"  # which Pillow itself turns
    assert load_image(Image.open(path))[0].size == (48, 64)


def sixteen(kind, tmp_path):
    wide = GREY.astype(np.uint16) * 257
    if kind == "pgm":
        (tmp_path / kind).write_bytes(b"P5 64 48 65535\n" + wide.astype(">u2").tobytes())
    elif kind == "big-endian tiff":
        Image.frombytes("I;16B", (64, 48), wide.astype(">u2").tobytes()).save(tmp_path / kind, "TIFF")
    elif kind == "float tiff":
        Image.fromarray(GREY.astype(np.float32) / 255).save(tmp_path / kind, "TIFF")
    else:
        Image.fromarray(wide).save(tmp_path / kind, kind.upper())
    return tmp_path / kind


@pytest.mark.parametrize("kind", ["png", "tiff", "pgm", "big-endian tiff", "float tiff"])
def test_wide_greyscale_is_the_picture_of_8_bits(tmp_path, kind):
    path = sixteen(kind, tmp_path)
    for image in (read_image(path), load_image(Image.open(path))[0]):
        assert np.array_equal(np.asarray(image), np.stack([GREY] * 3, -1))
    assert np.array_equal(np.asarray(read_image(path, "L")), GREY)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            np.full((4, 4), 200.0, np.float32),
            "has values from 200 to 200, expected a float image's from 0 to 1",
        ),
        (np.full((4, 4), np.nan, np.float32), "has values from nan to nan"),
        (np.full((4, 4), 70000, np.int32), "has 32-bit values from 70000 to 70000, expected 8 or 16 bits"),
    ],
)
def test_numbers_without_a_scale_are_refused(tmp_path, values, sentence):
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path)
    with pytest.raises(ValueError, match=f"image: {path} {sentence}"):
        read_image(path)
    with pytest.raises(ValueError, match=f"image {sentence}"):
        load_image(Image.open(path))


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_converted(mode):
    picture = Image.fromarray(COLOUR).convert(mode)
    assert load_image(picture)[0].mode == "RGB"


def huge_png(width, height):
    """A PNG of one colour in a few hundred bytes."""
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min(1 << 20, (width + 1) * height)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height"), [(100_000_000, 1), (1, 70_000), (20_000, 20_000), (12_000, 9_000)]
)
def test_too_large_images_are_refused_before_they_are_decoded(width, height):
    with pytest.raises(ValueError, match=f"^a .*({width} x {height}|{MOST_PIXELS}) pixels"):
        decode_image(huge_png(width, height), "a")


def damaged_avif():
    content = bytearray(encoded(Image.fromarray(COLOUR), "AVIF"))
    start = content.find(b"mdat") + 4
    content[start : start + 60] = b"\xff" * len(content[start : start + 60])
    return bytes(content)


def odd_dds():
    content = bytearray(encoded(Image.fromarray(COLOUR), "DDS"))
    content[80:84] = bytes(4)
    return bytes(content)


DAMAGED = {
    "avif": damaged_avif,
    "dds": odd_dds,
    "cut": lambda: encoded(Image.fromarray(COLOUR), "JPEG")[:200],
    "empty": lambda: b"",
    "text": lambda: b"not an image",
    "huge": lambda: huge_png(100_000_000, 1),
}


@pytest.mark.parametrize("make", DAMAGED.values(), ids=DAMAGED)
def test_one_bad_image_is_named_and_the_others_go_on(tmp_path, predictor, make):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(make())
    first, second, third = predictor.attempt_many([COLOUR, bad, COLOUR], batch_size=2)
    assert isinstance(second, ValueError) and str(bad) in str(second) and len(str(second)) < 400
    assert np.array_equal(first.vertices, third.vertices)
    with pytest.raises(ValueError, match=r"bad\.jpg"):
        crop_background(np.random.default_rng(0), bad, 32)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    for name, sentence in (
        ("pipe.jpg", "it is not a file"),
        (".", "it is not a file"),
        ("loop.jpg", "symbolic"),
    ):
        with pytest.raises(ValueError, match=sentence):
            read_image(tmp_path / name)


@pytest.mark.parametrize("left", [True, np.bool_(True), 1, np.int64(1), np.array(True)])
def test_sides_are_bools(predictor, left):
    hand = predictor.predict(COLOUR, left=left)
    assert hand.left is True
    hands = list(predictor.predict_many([COLOUR, COLOUR], left=np.array([0, 1])))
    assert [h.left for h in hands] == [False, True]


@pytest.mark.parametrize("left", ["right", "", None, 2, 0.5, np.array([1, 0])])
def test_other_sides_are_refused(predictor, left):
    with pytest.raises(TypeError, match="left: expected True or False, got"):
        predictor.predict(COLOUR, left=left)
    if not isinstance(left, np.ndarray):
        with pytest.raises(TypeError, match="left: expected True or False, got"):
            list(predictor.predict_many([COLOUR], left=left))


@pytest.mark.parametrize("box", [[[8, 8, 30, 30]], np.array([8, 8, 30, 30]), (8, 8, 30, 30.0)])
def test_boxes_come_in_several_forms(predictor, box):
    assert predictor.predict(COLOUR, bbox=box).box == predictor.predict(COLOUR, bbox=[8, 8, 30, 30]).box


@pytest.mark.parametrize(
    ("box", "sentence"),
    [
        ([0, 0, 1e170, 1e170], "expected a longer side from 2 pixels to 10 times the image's, got 1e"),
        ([0, 0, 1e12, 1e12], "expected a longer side"),
        ([5, 5, 1e-5, 1e-5], "expected a longer side .*, got 1e-05 x 1e-05 in 64 x 48 pixels"),
        ([[1, 2], [3, 4]], "expected four finite numbers X Y W H"),
        ([1, 2, 3], "expected four finite numbers X Y W H"),
        (["a", 2, 3, 4], "expected four finite numbers X Y W H"),
        ([1, 2, [3], 4], "expected four finite numbers X Y W H"),
        ([0, 0, 10**400, 3], "expected four finite numbers X Y W H"),
        ([0, 0, np.nan, 3], "expected four finite numbers X Y W H"),
    ],
)
def test_boxes_that_hold_no_hand_are_refused(predictor, box, sentence):
    bad, good = predictor.attempt_many([COLOUR, COLOUR], bboxes=[box, None])
    assert isinstance(bad, ValueError) and not isinstance(good, Exception)
    with pytest.raises(ValueError, match=rf"^images\[0\]: bbox: {sentence}"):
        raise bad


@pytest.mark.parametrize("scale", [1e-300, 1e-3, 1e12])
def test_absurd_intrinsics_are_refused(predictor, scale):
    with pytest.raises(ValueError, match="intrinsics: expected pixels, with fx and fy from 1 to 10000000"):
        predictor.predict(COLOUR, intrinsics=[[480 * scale, 0, 3], [0, 480 * scale, 3], [0, 0, 1]])


def test_a_hand_at_an_absurd_distance_is_refused(predictor):
    with pytest.raises(FloatingPointError, match=r"the hand would be .* m away, expected at most 100"):
        predictor.predict(COLOUR, intrinsics=[[1e6, 0, 32], [0, 1e6, 24], [0, 0, 1]])


@pytest.mark.parametrize("size", [True, 0, 2.5, "8"])
def test_batch_sizes_are_whole_numbers(predictor, size):
    with pytest.raises(ValueError, match="batch_size: expected a whole number of at least 1, got"):
        predictor.predict_many([COLOUR], batch_size=size)


def test_intrinsics_are_read_from_npy(tmp_path):
    K = np.array([[480.0, 0, 112], [0, 470, 112], [0, 0, 1]])
    np.save(tmp_path / "K.npy", K.astype(np.float32)[None])
    assert np.array_equal(read_intrinsics(tmp_path / "K.npy"), K)
    np.save(tmp_path / "K.npy", np.array([{"K": K}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"K\.npy is not a whole \.npy file of numbers"):
        read_intrinsics(tmp_path / "K.npy")


@pytest.mark.parametrize(
    ("name", "encoding"),
    [(b"a\xf6.png", "utf-8"), ("aö.png".encode(), "ascii"), (b"a\x1b[31m\n.png", "utf-8")],
)
def test_names_that_cannot_be_printed_stop_nothing(tmp_path, monkeypatch, name, encoding):
    folder = tmp_path / "in"
    folder.mkdir()
    for other in (b"b.png", name, b"z" + name):
        (folder / os.fsdecode(other)).write_bytes(encoded(Image.fromarray(COLOUR), "PNG"))
    (folder / os.fsdecode(b"z" + name)).write_bytes(b"no image")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2))
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    command = ["predict", str(folder), "--out", str(tmp_path / "out"), "--write", "json", "--device", "cpu"]
    assert main(command) == 2
    out.flush()
    err.flush()
    assert len(list((tmp_path / "out").glob("*.json"))) == 3, "of two hands, and their faces"
    printed = out.buffer.getvalue() + err.buffer.getvalue()
    assert printed.count(b"\n") == 3 and b"\x1b" not in printed
    assert any(mark in printed for mark in (b"\\udcf6", b"\\xf6", b"\\x1b[31m\\n"))
