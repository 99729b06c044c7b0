"""The measured parts of docs/solvers.md, and docs/solvers.png: every solver on every kind of problem."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import deqcore
from deqcore import DEQError
from deqcore.testing import exact_problems, installed

from . import exact, report
from .evaluations import OTHER_FORM, of_ours
from .maps import six
from .options import Options
from .report import Table
from .tally import Tally

__all__ = ["INTRO", "publish", "run"]

INTRO = "Default settings, float64."
DOCS = Path(__file__).resolve().parent.parent / "docs"
PLOTTED = {
    "G64a": "G64a: spectral radius 0.9",
    "G64b": "G64b: spectral radius 0.99",
    "N64": "N64: eigenvalues down to -3",
}
#: Families by line style, members by colour, most used first.
STYLES: dict[str, tuple[str, Any, float]] = {
    "fixed_point_iter": ("#7f7f7f", ":", 1.8),
    "aitken": ("#f4b6e0", "-", 3.4),
    "damped": ("#5b2c20", (0, (1, 1.5)), 1.6),
    "anderson": ("#1f77b4", "-", 2.2),
    "broyden": ("#d62728", "-", 2.2),
    "auto": ("#000000", "-", 1.4),
    "newton_krylov": ("#2ca02c", "--", 1.6),
    "pseudo_transient": ("#ff7f0e", "--", 1.6),
    "newton": ("#9467bd", "-.", 1.4),
    "chord": ("#17becf", "-.", 1.4),
}
FARTHEST = 1000
LOWEST = 1e-10


def run(options: Options) -> list[Table]:
    """The two tables of the page."""
    return [_maps(options), _exact()]


def publish(tables: list[Table]) -> list[Path]:
    """Write the tables into docs/solvers.md, between the marks of their names, and draw docs/solvers.png."""
    page = report.publish(DOCS / "solvers.md", dict(zip(("maps", "exact"), tables, strict=True)))
    picture = DOCS / "solvers.png"
    _draw(picture)
    return [page, picture]


def _maps(options: Options) -> Table:
    names = options.maps()
    table = Table(
        "Evaluations on tanh maps",
        ("solver", *names),
        notes="Evaluations of f, products with J included, until the worst of 32 samples is at 1e-6 relative; "
        "lowest-highest of seeds 0-3. F: of so many seeds the solve ended without it; -: the map is too large for it.",
    )
    for name in installed("solvers"):
        if name not in OTHER_FORM:
            solve = of_ours(name)
            tallies = {map_name: Tally() for map_name in names}
            for map_name, tally in tallies.items():
                for seed in options.of(map_name):
                    solve(six(map_name, seed), tally)
            table.add(f"`{name}`", *tallies.values())
    return table


def _exact() -> Table:
    names = [name for name in installed("solvers") if name not in OTHER_FORM]
    problems = exact_problems()
    table = Table(
        "Problems with exact answers",
        ("problem", *(f"`{name}`" for name in names)),
        notes="Evaluations of f, products with J included, until a relative residual of 1e-12, the error below "
        "1e-9; else the status it ended with.",
    )
    for problem in problems:
        table.add(problem.name, *(exact.cell(name, problem) for name in names))
    return table


# ---- the plot


class Residuals:
    """f, which notes the worst sample's best relative residual so far at every evaluation."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self.best: Tensor | None = None
        self.found: list[float] = []

    def __call__(self, z: Tensor) -> Tensor:
        fz = self.fn(z)
        if not _is_dual(fz):  # else this is a product with J, at a state that was evaluated before
            relative = ((fz - z).norm(dim=1) / fz.norm(dim=1)).detach()
            self.best = relative if self.best is None else torch.fmin(self.best, relative)
        self.found.append(float("inf") if self.best is None else float(self.best.max()))
        return fz


def _is_dual(tensor: Tensor) -> bool:
    """Whether it carries a forward-mode tangent."""
    with suppress(RuntimeError):  # no level is open
        return forward_ad.unpack_dual(tensor).tangent is not None
    return False


def _curve(name: str, map_name: str) -> list[float]:
    tanh = six(map_name, 0)
    f = Residuals(tanh.fn())
    settings = {"name": name, "tol": LOWEST, "stop_mode": "rel", "max_iter": FARTHEST}
    try:
        with torch.no_grad():
            deqcore.get_deq(solver=settings, on_failure="ignore").eval()(f, torch.zeros_like(tanh.x))
    except DEQError:
        return []
    return f.found[: FARTHEST + 1]


def _draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in installed("solvers") if name not in OTHER_FORM]
    names.sort(key=lambda name: list(STYLES).index(name) if name in STYLES else len(STYLES))
    figure, axes = plt.subplots(1, len(PLOTTED), figsize=(12, 5), sharey=True, layout="constrained")
    for axis, (map_name, title) in zip(axes, PLOTTED.items(), strict=True):
        for name in names:
            curve = _curve(name, map_name)
            color, style, width = STYLES.get(name, ("#bcbd22", "-", 1.2))
            axis.plot(range(1, len(curve) + 1), curve, linestyle=style, color=color, lw=width, label=name)
        axis.set_yscale("log")
        axis.set_xscale("log")
        axis.set_xlim(3, FARTHEST)
        axis.set_xticks([3, 10, 30, 100, 300], ["3", "10", "30", "100", "300"])
        axis.minorticks_off()
        axis.set_ylim(LOWEST, 3)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("evaluations of f and products with J")
        axis.grid(True, color="#dddddd", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("relative residual of the worst of 32 samples, best so far")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
