"""Reading MANO's pickle, and what is refused in one."""

import pickle
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from pahm.hand import FREIHAND_TIPS, HandModel
from pahm_ops.mesh.pickles import load_arrays


def mano_like() -> dict[str, object]:
    """A dictionary laid out as MANO's, with the shipped hand's numbers moved off the origin."""
    hand = HandModel.load(dtype=torch.float64)
    rng = np.random.default_rng(0)
    parents = np.array([2**32 - 1, *hand.parents[1:]], dtype=np.uint32)
    return {
        "v_template": hand.template.numpy() + np.array([0.095, 0.006, 0.006]),
        "f": hand.faces.numpy().astype(np.uint32),
        "weights": hand.skinning_weights.numpy(),
        "shapedirs": hand.shape_basis.numpy(),
        "posedirs": 1e-3 * rng.normal(size=(778, 3, 135)),
        "J_regressor": scipy.sparse.csc_matrix(hand.bone_regressor.numpy()),
        "kintree_table": np.stack([parents, np.arange(16, dtype=np.uint32)]),
        "bs_style": "lbs",
    }


def save(path: Path, content: object, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.fixture(scope="module")
def content() -> dict[str, object]:
    return mano_like()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_mano_is_read_with_its_pose_blend_shapes(tmp_path, content, protocol):
    hand = HandModel.from_mano(save(tmp_path / "MANO_RIGHT.pkl", content, protocol), dtype=torch.float64)
    own = HandModel.load(dtype=torch.float64)
    assert hand.tips == FREIHAND_TIPS and hand.parents == own.parents
    assert torch.equal(hand.bone_regressor, own.bone_regressor)
    pose = torch.zeros(1, 16, 3, dtype=torch.float64)
    assert torch.allclose(hand(pose).vertices[0], hand.template, atol=1e-12)
    pose[0, 7, 2] = np.pi / 2
    change = np.zeros((15, 3, 3))
    change[6] = [[-1, -1, 0], [1, -1, 0], [0, 0, 0]]
    bumps = content["posedirs"] @ change.ravel()
    still = hand.skinning_weights[:, 7:10].sum(1) == 0
    moved = hand(pose).vertices[0] - hand.template
    np.testing.assert_allclose(moved[still].numpy(), bumps[still.numpy()], atol=1e-12)


def test_tips_by_name(tmp_path, content):
    path = save(tmp_path / "MANO_RIGHT.pkl", content)
    assert HandModel.from_mano(path, tips="cmr").tips == (744, 333, 443, 555, 672)
    with pytest.raises(ValueError, match="one of freihand, cmr, smplx, manopth, got 'mine'"):
        HandModel.from_mano(path, tips="mine")


def test_chumpy_arrays_are_read_without_chumpy(tmp_path, content, monkeypatch):
    """The official file holds its shape blend shapes as a chumpy selection of a chumpy value."""
    values = types.ModuleType("chumpy.ch")
    selections = types.ModuleType("chumpy.reordering")
    values.Ch = type("Ch", (), {"__module__": "chumpy.ch"})
    selections.Select = type("Select", (), {"__module__": "chumpy.reordering"})
    basis = content["shapedirs"]
    whole, part = values.Ch(), selections.Select()
    padded = np.concatenate([basis, basis], -1)
    whole.x, whole._dirty_vars = padded, {"x"}
    part.a, part.preferred_shape = whole, (778, 3, 10)
    part.idxs = np.arange(padded.size).reshape(padded.shape)[..., :10].ravel()
    with monkeypatch.context() as patch:
        for module in (types.ModuleType("chumpy"), values, selections):
            patch.setitem(sys.modules, module.__name__, module)
        files = [save(tmp_path / f"{p}.pkl", {**content, "shapedirs": part}, p) for p in (0, 2)]
    for path in files:
        hand = HandModel.from_mano(path, dtype=torch.float64)
        np.testing.assert_array_equal(hand.shape_basis.numpy(), basis)
    assert "chumpy" not in sys.modules


class Command:
    """Pickles to a call of the shell."""

    def __reduce__(self):
        import os

        return os.system, ("touch pwned",)


class Numpy:
    """Pickles to a call of a numpy function that is not an array's constructor."""

    def __reduce__(self):
        return np.fromfile, ("/etc/hostname",)


@pytest.mark.parametrize(("bad", "name"), [(Command(), "system"), (Numpy(), "fromfile"), (Path("x"), "Path")])
def test_forbidden_class_is_named_and_not_run(tmp_path, content, monkeypatch, bad, name):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "MANO_RIGHT.pkl", {**content, "bs_type": bad})
    with pytest.raises(ValueError, match=rf"asks for \S*{name}\S*, and only numpy's and scipy.sparse's"):
        HandModel.from_mano(path)
    assert not (tmp_path / "pwned").exists()


def test_constructor_of_old_objects_makes_no_other_class(tmp_path):
    import copyreg

    class Any:
        def __reduce__(self):
            return copyreg._reconstructor, (set, object, None)

    with pytest.raises(ValueError, match="builds no"):
        load_arrays(save(tmp_path / "x.pkl", {"a": Any()}))


def test_bad_mano_files_are_named(tmp_path, content):
    with pytest.raises(FileNotFoundError, match=r"no MANO model at .*none\.pkl"):
        HandModel.from_mano(tmp_path / "none.pkl")
    lacking = {key: value for key, value in content.items() if key not in ("posedirs", "f")}
    with pytest.raises(ValueError, match="lacks f, posedirs"):
        HandModel.from_mano(save(tmp_path / "lacking.pkl", lacking))
    with pytest.raises(ValueError, match=re.escape("weights in")):
        HandModel.from_mano(save(tmp_path / "shape.pkl", {**content, "weights": np.zeros((778, 15))}))
    with pytest.raises(ValueError, match=r"v_template in .* must hold numbers"):
        HandModel.from_mano(save(tmp_path / "text.pkl", {**content, "v_template": "x"}))
    with pytest.raises(ValueError, match="must hold a dictionary, got list"):
        HandModel.from_mano(save(tmp_path / "list.pkl", [1]))
    whole = save(tmp_path / "whole.pkl", content).read_bytes()
    (tmp_path / "cut.pkl").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.pkl"):
        HandModel.from_mano(tmp_path / "cut.pkl")
    (tmp_path / "image.pkl").write_bytes(b"\x89PNG not a pickle")
    with pytest.raises(ValueError, match=r"image\.pkl"):
        HandModel.from_mano(tmp_path / "image.pkl")
