"""Reading MANO's pickle, and what is refused in one."""

import gzip
import pickle
import re
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from pahm.cli import main
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


def change(name, place, value):
    def changed(content):
        array = content[name].toarray() if scipy.sparse.issparse(content[name]) else content[name].copy()
        array[place] = value
        return {name: array}

    return changed


def mirrored(content):
    return {"v_template": content["v_template"] * [-1, 1, 1], "f": content["f"][:, [0, 2, 1]]}


IMPLAUSIBLE = {
    "left": (mirrored, "the hand must be a right one, got a left one: take MANO_RIGHT.pkl, and .* --left"),
    "template": (
        change("v_template", (5, 1), np.nan),
        "template must be finite, got NaN or infinity in row 5",
    ),
    "weights": (change("weights", (7, 0), np.inf), "skinning_weights must be finite, .* in row 7"),
    "shape": (change("shapedirs", (9, 0, 3), -np.inf), "shape_basis must be finite, .* in row 9"),
    "pose": (change("posedirs", (3, 2, 1), np.nan), "pose_basis must be finite, .* in row 3"),
    "regressor": (change("J_regressor", (2, 1), np.nan), "bone_regressor must be finite, .* in row 2"),
    "weights' sum": (change("weights", 7, 0.0), "skinning_weights must have rows of sum 1, got 0 in row 7"),
    "regressor's sum": (
        change("J_regressor", 2, 0.01),
        "bone_regressor must have rows of sum 1, got 7.78 in",
    ),
    "millimetres": (
        lambda c: {"v_template": 1000 * c["v_template"]},
        "a hand in metres, .* got a length of 189",
    ),
    "a point": (lambda c: {"v_template": 0 * c["v_template"]}, "a hand in metres, .* got a length of 0"),
    "overflow": (change("v_template", (5, 1), 1e308), "a hand in metres, .* got a length of 1e\\+308"),
    "shape's size": (
        change("shapedirs", (9, 0, 3), 5.0),
        "shape_basis must move a vertex by less than .* got 5",
    ),
    "pose's size": (
        change("posedirs", (9, 0, 3), -5.0),
        "pose_basis must move a vertex by less than .* got 5",
    ),
    "faces": (change("f", (9, 1), 778), r"faces must lie in \[0, 778\), got values from 0 to 778"),
    "fractions": (lambda c: {"f": c["f"] + 0.5}, "f in .* must hold whole numbers"),
    "flags": (lambda c: {"weights": c["weights"] > 0}, "weights in .* must hold numbers, got dtype bool"),
    "tree": (change("kintree_table", (0, 3), 9), "parents must start with -1 and name an earlier bone each"),
}


@pytest.mark.parametrize("case", IMPLAUSIBLE)
@pytest.mark.filterwarnings("error")
def test_what_is_no_right_hand_in_metres_is_refused(tmp_path, content, case):
    changed, sentence = IMPLAUSIBLE[case]
    path = save(tmp_path / "x.pkl", {**content, **changed(content)})
    with pytest.raises(ValueError, match=sentence) as caught:
        HandModel.from_mano(path)
    assert str(path) in str(caught.value)


def test_a_right_hand_is_known_in_any_frame(tmp_path, content):
    template = content["v_template"]
    rng = np.random.default_rng(0)
    for k in range(8):
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        right = np.linalg.det(turn) > 0
        path = save(tmp_path / "x.pkl", {**content, "v_template": template @ turn.T + rng.normal(size=3)})
        try:
            HandModel.from_mano(path)
        except ValueError as error:
            assert not right and "got a left one" in str(error), k
        else:
            assert right, k


def test_command_names_the_left_hand(tmp_path, content, capsys):
    path = save(tmp_path / "MANO_LEFT.pkl", {**content, **mirrored(content)})
    assert main(["train", "--data", str(tmp_path), "--mano", str(path), "--out", str(tmp_path / "run")]) != 0
    said = capsys.readouterr().err.strip()
    assert "got a left one" in said and "\n" not in said


def test_files_of_other_kinds_are_named(tmp_path, content):
    def zipped(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("mano_v1_2/models/MANO_RIGHT.pkl", b"")

    kinds = {
        "a .npz archive": lambda path: np.savez(path.open("wb"), v_template=content["v_template"]),
        "a .npy file": lambda path: np.save(path.open("wb"), content["v_template"]),
        "a .zip archive": zipped,
        "a gzip archive": lambda path: path.write_bytes(gzip.compress(pickle.dumps(1))),
    }
    for k, legacy in enumerate((False, True)):
        kinds["a PyTorch checkpoint" + " " * k] = lambda path, legacy=legacy: torch.save(
            {"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=not legacy
        )
    for kind, write in kinds.items():
        path = tmp_path / "MANO_RIGHT.pkl"
        write(path)
        sentence = (
            f"{re.escape(str(path))} is {kind.strip()}, expected a pickle; MANO's is the MANO_RIGHT.pkl of"
        )
        with pytest.raises(ValueError, match=sentence):
            HandModel.from_mano(path)


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
