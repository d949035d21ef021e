"""`import pahm`: what it gives, and that it gives it without waiting for torch."""

import importlib
import subprocess
import sys

import pytest

import pahm

HOMES = {
    "Hand": "pahm.infer.hand",
    "HandModel": "pahm.hand",
    "HandNet": "pahm.model",
    "Predictor": "pahm.infer.predictor",
    "load_checkpoint": "pahm.model",
}


def test_importing_the_package_imports_nothing_slow():
    slow = "[name for name in ('torch', 'numpy', 'PIL') if name in sys.modules]"
    command = [sys.executable, "-c", f"import sys, pahm; pahm.__version__; dir(pahm); print({slow})"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", HOMES)
def test_every_name_resolves(name):
    assert getattr(pahm, name) is getattr(importlib.import_module(HOMES[name]), name)
    assert name in dir(pahm) and name in pahm.__all__


def test_all_names_are_known():
    assert sorted(pahm.__all__) == sorted([*HOMES, "__version__"])
    assert {"__version__", "__name__"} <= set(dir(pahm))


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="module 'pahm' has no attribute 'Prediktor'"):
        pahm.Prediktor  # noqa: B018
    with pytest.raises(ImportError):
        from pahm import Prediktor  # noqa: F401
