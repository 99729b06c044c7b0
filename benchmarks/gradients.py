"""Gradients: products, time, memory, graph breaks, and every backend on the digits model."""

from __future__ import annotations

from pathlib import Path

from . import gradients_compile, gradients_digits, gradients_memory, gradients_products, gradients_time, report
from .options import Options
from .report import Table

__all__ = ["INTRO", "publish", "run"]

INTRO = "Each table says how its figures were taken."
DOCS = Path(__file__).resolve().parent.parent / "docs"
#: Marks in docs/gradients.md -> how the title of the table between them begins.
PUBLISHED = {"digits": "Backends on the digits model"}
PARTS = (gradients_products, gradients_time, gradients_digits, gradients_memory, gradients_compile)


def run(options: Options) -> list[Table]:
    """All tables, in the order of the parts."""
    return [table for part in PARTS for table in part.tables(options)]


def publish(tables: list[Table]) -> list[Path]:
    """Write what docs/gradients.md shows between its marks."""
    chosen: dict[str, Table] = {}
    for name, title in PUBLISHED.items():
        (chosen[name],) = (table for table in tables if table.title.startswith(title))
    return [report.publish(DOCS / "gradients.md", chosen)]
