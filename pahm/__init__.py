"""Pixel-aligned hand mesh reconstruction: a hand, its data, the network, training and prediction."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pahm")
except PackageNotFoundError:  # a copy of the sources that was not installed
    __version__ = "0+unknown"
