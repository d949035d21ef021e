"""The examples run as they stand, on a mesh that they have not been written for."""

import importlib.util

import torch
import trimesh
from repository import ROOT

EXAMPLES = ROOT / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_autoencoder_learns_the_shapes_of_a_mesh_with_a_boundary(tmp_path):
    torch.manual_seed(0)
    mesh = trimesh.creation.icosphere(3)
    mesh.update_faces(mesh.triangles_center[:, 2] > -0.5)
    mesh.remove_unreferenced_vertices()
    mesh.export(tmp_path / "bowl.off")
    losses = load("mesh_autoencoder").train(str(tmp_path / "bowl.off"), 40)
    assert len(losses) == 40 and sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_autoencoder_is_short():
    assert len((EXAMPLES / "mesh_autoencoder.py").read_text().splitlines()) < 60
