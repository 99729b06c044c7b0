"""Gradients: products, time, memory, graph breaks, and every backend on the digits model."""

from __future__ import annotations

import re
from pathlib import Path

from deqcore.files import write_text

from . import gradients_compile, gradients_digits, gradients_memory, gradients_products, gradients_time
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
    page = DOCS / "gradients.md"
    text = page.read_text(encoding="utf-8")
    for name, title in PUBLISHED.items():
        (table,) = (table for table in tables if table.title.startswith(title))
        body = table.markdown().partition("\n\n")[2]  # the page has headings of its own
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page.name} must have the marks {begin} and {end} once each")
        text = re.sub(f"{begin}.*{end}", lambda _, b=begin, e=end, t=body: f"{b}\n{t}{e}", text, flags=re.S)
    write_text(page, text)
    return [page]
