from __future__ import annotations

import numpy as np
import pytest

from pahm.synth.sampling import rotation_matrix, sample_annotation, shipped_hand


@pytest.fixture(scope="module")
def annotations():
    return [sample_annotation(1, "training", index) for index in range(150)]


def project(annotation, points):
    pixels = points @ annotation.K.T
    return pixels[:, :2] / pixels[:, 2:]


def test_a_sample_depends_on_seed_split_and_index_alone():
    first = sample_annotation(3, "training", 7)
    np.random.default_rng(0).random(5)
    for a, b in zip(first, sample_annotation(3, "training", 7), strict=True):
        assert np.array_equal(a, b)
    for other in ((4, "training", 7), (3, "evaluation", 7), (3, "training", 8)):
        assert not np.allclose(first.pose, sample_annotation(*other).pose)


def test_annotations_scale_with_the_image():
    small, large = (sample_annotation(3, "training", 7, size) for size in (112, 224))
    assert np.array_equal(small.pose, large.pose)
    assert np.allclose((project(small, small.joints) + 0.5) * 2, project(large, large.joints) + 0.5, atol=0.1)


def test_joints_are_the_regressor_times_the_vertices(annotations):
    regressor = shipped_hand().joint_regressor.numpy()
    for annotation in annotations:
        assert np.abs(regressor @ annotation.vertices - annotation.joints).max() <= 5.1e-7
        for values in (annotation.vertices, annotation.joints):
            assert np.array_equal(values, np.round(values, 6))


def test_hands_are_before_the_camera_inside_the_image_and_of_useful_size(annotations):
    sides = []
    for annotation in annotations:
        assert annotation.vertices[:, 2].min() > 0.15
        pixels = project(annotation, annotation.vertices)
        assert pixels.min() > 0 and pixels.max() < 223
        sides.append(np.ptp(pixels, axis=0).max() / 224)
        assert np.abs((pixels.max(axis=0) + pixels.min(axis=0)) / 2 - 111.5).max() < 0.09 * 224
    assert max(sides) < 0.76
    assert np.mean(np.array(sides) > 0.44) > 0.75
    depths = [annotation.joints[9, 2] for annotation in annotations]
    assert min(depths) > 0.35 and max(depths) < 1.1 and np.ptp(depths) > 0.3


def test_views_are_wide_but_seldom_along_the_arm(annotations):
    rest = (shipped_hand().joint_regressor @ shipped_hand().template).numpy()
    fingers, across = rest[9] - rest[0], rest[17] - rest[5]
    palm = np.cross(fingers, across)
    turns = [rotation_matrix(annotation.pose[0]) for annotation in annotations]
    facing = np.array([(turn @ palm)[2] for turn in turns]) / np.linalg.norm(palm)
    assert np.mean(facing < -0.3) > 0.15 and np.mean(facing > 0.3) > 0.15
    pointing = np.array([turn @ fingers for turn in turns]) / np.linalg.norm(fingers)
    quadrants = np.histogram(np.arctan2(pointing[:, 1], pointing[:, 0]), 4, (-np.pi, np.pi))[0]
    assert quadrants.min() > 20
    assert pointing[:, 2].max() < 0.75


def test_the_mano_record_is_freihands(annotations):
    for annotation in annotations[:5]:
        ((record),) = annotation.mano
        assert len(record) == 61
        assert np.allclose(record[:48], annotation.pose.ravel()) and np.allclose(
            record[48:58], annotation.shape
        )
        assert np.allclose(record[58:60], project(annotation, annotation.joints[[9]])[0], atol=1e-3)
        assert record[60] == pytest.approx(
            np.linalg.norm(annotation.joints[9] - annotation.joints[10]), abs=1e-6
        )


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((-1, "training", 0), "seed"),
        ((0, "validation", 0), "split"),
        ((0, "training", -1), "index"),
        ((0, "training", 0, 0), "image_size"),
    ],
)
def test_a_bad_sample_is_named(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        sample_annotation(*arguments)
