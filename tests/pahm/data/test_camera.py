import numpy as np
import pytest
import torch

from pahm.data.camera import ray_rotation, read_intrinsics, rotate, solve_translation


def cameras():
    return torch.tensor(
        [
            [[500.0, 3.0, 110], [0, 480.0, 115], [0, 0, 1]],
            [[300.0, 0.0, -40], [0, 310.0, 60], [0, 0, 1]],
        ],
        dtype=torch.float64,
    )


def test_translation_is_exact_for_perspective_projections():
    generator = torch.Generator().manual_seed(0)
    points = 0.05 * torch.randn(2, 50, 3, generator=generator, dtype=torch.float64)
    truth = torch.tensor([[0.1, -0.05, 0.6], [-0.3, 0.2, 50.0]], dtype=torch.float64)
    pixels = (points + truth[:, None]) @ cameras().mT
    found = solve_translation(points, pixels[..., :2] / pixels[..., 2:], cameras())
    torch.testing.assert_close(found, truth, atol=1e-7, rtol=0)


def test_translation_is_the_least_squares_solution_for_other_pixels():
    rng = np.random.default_rng(0)
    K, points = cameras()[0].numpy(), rng.normal((0, 0, 0.6), 0.05, (50, 3))
    pixels = points @ K.T
    pixels = pixels[:, :2] / pixels[:, 2:] + rng.normal(0, 2, (50, 2))
    x, y, _ = np.linalg.solve(K, np.c_[pixels, np.ones(50)].T)
    one, zero = np.ones(50), np.zeros(50)
    left = np.concatenate([np.stack([one, zero, -x], 1), np.stack([zero, one, -y], 1)])
    right = np.concatenate([x * points[:, 2] - points[:, 0], y * points[:, 2] - points[:, 1]])
    expected = np.linalg.lstsq(left, right, rcond=None)[0]
    found = solve_translation(*map(torch.from_numpy, (points, pixels, K)))
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_ray_rotation_is_the_smallest_rotation_onto_the_ray():
    pixel = torch.tensor([190.0, 40.0], dtype=torch.float64)
    turns = ray_rotation(cameras(), pixel)
    for turn, K in zip(turns.numpy(), cameras().numpy(), strict=True):
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(turn) == pytest.approx(1)
        seen = K @ turn @ np.array([0, 0, 1])
        np.testing.assert_allclose(seen[:2] / seen[2], pixel)
        # No other rotation onto the ray has a smaller angle, whose cosine is (trace - 1) / 2.
        assert (np.trace(turn) - 1) / 2 == pytest.approx(turn[2, 2])
    axis = ray_rotation(cameras()[:1], cameras()[0, :2, 2])
    torch.testing.assert_close(axis[0], torch.eye(3, dtype=torch.float64))


def test_points_are_rotated_each_by_its_own_rotation():
    points = torch.randn(2, 5, 3, dtype=torch.float64)
    turns = ray_rotation(cameras(), torch.tensor([190.0, 40.0], dtype=torch.float64))
    torch.testing.assert_close(rotate(points, turns), points @ turns.mT)


@pytest.mark.parametrize("text", ['{"K": [[50,0,9],[0,60,8],[0,0,1]]}', "[[50,0,9],[0,60,8],[0,0,1]]"])
def test_intrinsics_files(tmp_path, text):
    path = tmp_path / "K.json"
    for content in (text, f"[{text}]" if text.startswith("[") else text):
        path.write_text(content)
        np.testing.assert_array_equal(read_intrinsics(path), [[50, 0, 9], [0, 60, 8], [0, 0, 1]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "K.json is not JSON that can be read: Expecting value"),
        ('{"focal": 3}', 'K.json: intrinsics: expected a key "K"'),
        ("[[1, 2], [3, 4]]", r"expected shape \(3, 3\), got \(2, 2\)"),
        ('[[1, 2, "x"]]', "expected 3 x 3 numbers"),
        (f"[[{'9' * 400},0,9],[0,60,8],[0,0,1]]", "expected 3 x 3 numbers"),
        ("[[-50,0,9],[0,60,8],[0,0,1]]", "positive fx and fy"),
        ("[[50,0,9],[0,60,8],[0,0,2]]", r"\[0, 0, 1\]"),
        ("[[50,0,NaN],[0,60,8],[0,0,1]]", "NaN is not a finite number"),
    ],
)
def test_bad_intrinsics_are_named(tmp_path, text, message):
    path = tmp_path / "K.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_intrinsics(path)
    with pytest.raises(FileNotFoundError, match=r"intrinsics: .*none.json does not exist"):
        read_intrinsics(tmp_path / "none.json")
