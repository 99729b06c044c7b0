"""How fast solvers get to an equilibrium: the residual at each evaluation of f, and a picture of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deqcore
from deqcore import DEQConfig, MissingExtraError
from deqcore.files import write_atomic

__all__ = ["Curve", "draw", "require_matplotlib", "residual_curve"]

#: Line style of each of the built-in solvers; two of them may coincide, so the second is thin and dashed on the first.
STYLES: dict[str, dict[str, Any]] = {
    "fixed_point_iter": {"color": "#9ecae1", "linewidth": 6.0, "linestyle": "-"},
    "simple_fixed_point_iter": {"color": "#08519c", "linewidth": 1.8, "linestyle": (0, (4, 2))},
    "anderson": {"color": "#d95f02", "linewidth": 2.2, "linestyle": "-", "marker": "o", "markevery": (0, 6)},
    "broyden": {"color": "#1b7837", "linewidth": 2.2, "linestyle": "-", "marker": "s", "markevery": (3, 6)},
}
OTHERS: tuple[dict[str, Any], ...] = (
    {"color": "#7b3294", "linewidth": 2.2, "linestyle": "-.", "marker": "^"},
    {"color": "#444444", "linewidth": 2.2, "linestyle": ":", "marker": "D"},
)


@dataclass(frozen=True)
class Curve:
    """Relative residuals of one solver.

    Attributes:
        solver: its name.
        residuals: ||f(z) - z|| / ||f(z)|| at evaluation 1, 2, ... of f, of the sample where it is
            largest: the one that the whole batch waits for.
    """

    solver: str
    residuals: list[float]


def residual_curve(
    fn: Callable[..., Tensor],
    z0: Tensor,
    args: tuple[Any, ...],
    solver: str | Mapping[str, Any],
    *,
    rtol: float = 1e-6,
    max_iter: int = 150,
) -> Curve:
    """Solve once, and note the residual at every evaluation of f, trial points of a line search included.

    It looks at f, not at the solver's own records, so that it is the same measure for every method.

    Args:
        fn: the map, called as ``fn(z, *args)``.
        z0: the start, shape (B, ...).
        args: further arguments of `fn`.
        solver: a name, or a dict with a name and settings.
        rtol: relative residual at which all samples must be for the solver to stop; near float32's rounding error.
        max_iter: most steps.

    Raises:
        PluginError: the solver can't be had.
    """
    residuals: list[float] = []

    def watched(z: Tensor, *rest: Any) -> Tensor:
        fz = fn(z, *rest)
        size = fz.flatten(1).norm(dim=1)
        residual = (fz - z).flatten(1).norm(dim=1)
        residuals.append(torch.where(residual == 0, 0.0, residual / size).max().item())
        return fz

    given = {"name": solver} if isinstance(solver, str) else dict(solver)
    for key in ("tol", "stop_mode", "atol"):
        given.pop(key, None)
    config = DEQConfig.from_dict({"solver": {**given, "rtol": rtol, "max_iter": max_iter}, "on_failure": "ignore"})
    with torch.no_grad():
        deqcore.DEQ(config).eval()(watched, z0, args=args)
    return Curve(config.solver.name, residuals)


def require_matplotlib() -> None:
    """Find out that matplotlib is missing before an hour of work, not after.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingExtraError("drawing the convergence of solvers", "matplotlib", "demo") from error


def draw(curves: Sequence[Curve], path: Path, title: str, floor: float = 1e-6) -> None:
    """Write a PNG with one line for each curve, down to the residual `floor`; an old file is replaced at once.

    Args:
        curves: what to draw; later ones lie on top.
        path: where to write it, ending in ``.png``.
        title: line above the axes.
        floor: each line ends where it first is at or below this, and the axis with it.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    others = iter(OTHERS * len(curves))
    for curve in curves:
        shown = _down_to(curve.residuals, floor)
        style = {"markersize": 5.0, "markevery": (1, 6), **(STYLES.get(curve.solver) or next(others))}
        axes.semilogy(
            range(1, len(shown) + 1), shown, label=f"{curve.solver} ({_reached(curve, shown, floor)})", **style
        )
    axes.set_xlabel("evaluations of f")
    axes.set_ylabel("relative residual  ||f(z) - z|| / ||f(z)||  (largest of all samples)")
    axes.set_title(title)
    axes.set_ylim(floor / 2, 3.0)  # a line that diverges leaves the picture
    axes.set_xlim(left=0)
    axes.grid(which="major", color="#dddddd")
    axes.axhline(floor, color="#888888", linewidth=1.0, linestyle=":", zorder=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title=f"solver (evaluations to {floor:g})", frameon=True, framealpha=0.9, handlelength=3.5)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))


def _down_to(residuals: list[float], floor: float) -> list[float]:
    """`residuals` up to the first that is at or below `floor`."""
    for k, residual in enumerate(residuals):
        if residual <= floor:
            return residuals[: k + 1]
    return residuals


def _reached(curve: Curve, shown: list[float], floor: float) -> str:
    if shown and shown[-1] <= floor:
        return str(len(shown))
    return f"not in {len(curve.residuals)}"
