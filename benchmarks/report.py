"""Tables on the terminal and, the same ones, in markdown files."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import rich.table
import torch
from rich.console import Console

from deqcore.files import write_text

__all__ = ["Table", "environment", "show", "write"]


@dataclass
class Table:
    """One table: cells are text, `notes` says how the figures were taken."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: str = ""

    def add(self, *cells: object) -> None:
        """Append a row; there must be a cell a column."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns in {self.title!r}")
        self.rows.append([str(cell) for cell in cells])

    def markdown(self) -> str:
        lines = [f"## {self.title}", ""]
        if self.notes:
            lines += [self.notes, ""]
        lines.append("| " + " | ".join(self.columns) + " |")
        lines.append("|" + "---|" * len(self.columns))
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def environment(extra: str = "") -> str:
    """Versions, threads and cores: what a figure needs to be compared with another."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("deqcore", "torch", "torchdeq"))
    threads = f"{torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"
    text = f"{versions}, Python {platform.python_version()} on {platform.machine()}; {threads}."
    return f"{text} {extra}".strip()


def show(console: Console, tables: Sequence[Table]) -> None:
    """Print the tables."""
    for table in tables:
        drawn = rich.table.Table(title=table.title, caption=table.notes, title_justify="left", caption_justify="left")
        for column in table.columns:
            drawn.add_column(column, overflow="fold")
        for row in table.rows:
            drawn.add_row(*(cell.replace("[", r"\[") for cell in row))
        console.print(drawn)


def write(folder: Path, name: str, intro: str, tables: Sequence[Table]) -> Path:
    """Write the tables to `folder`/`name`.md, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.md"
    body = "\n".join(table.markdown() for table in tables)
    write_text(path, f"# {name}\n\nWritten by `python -m benchmarks {name}`. {intro}\n\n{body}")
    return path


def publish(page: Path, tables: Mapping[str, Table]) -> Path:
    """Write tables into a page of the docs, each between the marks of its name; the page has headings of its own."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        body = table.markdown().partition("\n\n")[2]
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page.name} must have the marks {begin} and {end} once each")
        text = re.sub(f"{begin}.*{end}", lambda _, b=begin, e=end, t=body: f"{b}\n{t}{e}", text, flags=re.S)
    write_text(page, text)
    return page
