"""Reversible equilibrium models for deqcore: a solver, a gradient backend and a core, all named ``reversible``."""

from __future__ import annotations

from .core import ReversibleCore
from .gradient import ReversibleGradient, ReversibleGradientSettings
from .solver import Reversible, ReversibleSettings

__all__ = [
    "Reversible",
    "ReversibleCore",
    "ReversibleGradient",
    "ReversibleGradientSettings",
    "ReversibleSettings",
]
