"""Batch normalisation folded into the convolutions before it, for inference."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pahm.model.network import HandNet


def folded(network: HandNet) -> HandNet:
    """A copy of `network` in evaluation mode without batch normalisation behind its convolutions.

    The scale and shift of each normalisation become part of the convolution whose output it takes. Results
    differ by rounding alone. Where timm's normalisation also activates, the activation stays.
    """
    network = copy.deepcopy(network).eval()
    names = {module: name for name, module in network.named_modules()}
    for conv, norm in _pairs(network):
        assert norm.running_mean is not None and norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.weight, conv.bias = weight.requires_grad_(False), bias.requires_grad_(False)
        parent, _, name = names[norm].rpartition(".")
        rest = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()
        setattr(network.get_submodule(parent), name, rest)
    return network


def _pairs(network: HandNet) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions and the normalisations that take their outputs, where both run once."""
    made: list[tuple[Tensor, nn.Conv2d]] = []
    taken: list[tuple[Tensor, nn.BatchNorm2d]] = []
    hooks = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda conv, _, out: made.append((out, conv))))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(lambda norm, given: taken.append((given[0], norm))))
    size, like = network.config.image_size, network.joint_regressor
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 3, size, size, device=like.device, dtype=like.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    calls = Counter(module for _, module in [*made, *taken])
    makers = {id(out): conv for out, conv in made}  # `made` keeps the tensors, so no id is used twice
    pairs = [(makers[id(given)], norm) for given, norm in taken if id(given) in makers]
    return [(conv, norm) for conv, norm in pairs if calls[conv] == calls[norm] == 1]
