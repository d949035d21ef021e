"""Pixel-aligned hand mesh reconstruction: a hand, its data, the network, training and prediction."""
