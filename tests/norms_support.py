"""Models and shorthands for the tests of weight normalisation."""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn.utils import parametrize

from deqcore import add_deq_args, apply_norm

NORMS = ["weight_norm", "spectral_norm"]


def all_layers():
    return nn.ModuleDict(
        {
            "linear": nn.Linear(3, 4),
            "conv1": nn.Conv1d(2, 4, 3),
            "conv2": nn.Conv2d(4, 6, 3, groups=2),
            "conv3": nn.Conv3d(2, 3, 2),
            "up1": nn.ConvTranspose1d(2, 4, 3),
            "up2": nn.ConvTranspose2d(4, 6, 3, groups=2),
            "up3": nn.ConvTranspose3d(2, 3, 2),
            "norm": nn.LayerNorm(4),
        }
    )


LAYERS = [name for name in all_layers() if name != "norm"]


def block():
    return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))


def originals(layer):
    """The parameters that the weight is made from."""
    return list(layer.parametrizations.weight.parameters(recurse=False))


def scaling(layer):
    """The parametrization of the weight."""
    return layer.parametrizations.weight[0]


def count_computations(monkeypatch, name):
    """A list that grows by one with each weight computed by norm `name`."""
    module = scaling(apply_norm(nn.Linear(2, 2), name))
    calls = []
    whole = type(module).scale
    monkeypatch.setattr(type(module), "scale", lambda self, *o: (calls.append(self), whole(self, *o))[1])
    return calls


def parametrized(layer):
    return parametrize.is_parametrized(layer, "weight")


class Recurrent(nn.Module):
    """Two weights, a cycle in its attributes, and another module inside."""

    def __init__(self, inputs=3, features=4):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, features))
        self.recurrent = nn.Parameter(torch.randn(features, features))
        self.inner = nn.Linear(2, 2)
        self.__dict__["parent"] = [self]


def parse(*flags):
    """A Namespace of a program that takes deqcore's flags."""
    return add_deq_args(argparse.ArgumentParser()).parse_args(flags)
