"""``deqcore plugins list`` and ``deqcore plugins show``: what is installed, where it is from, and what can be set."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..registry import KINDS, kind_of, registry
from . import describe

__all__ = ["app", "list_plugins", "show_plugin"]

#: Width of tables in a pipe or a file, where there is no terminal to ask.
PIPE_WIDTH = 160

#: The list is a table from this width on; on a narrower terminal the meaning goes below each row.
WIDE = 110
COLUMNS = ("kind", "name", "origin", "version", "status")

STYLES = {"ok": "green", "broken": "bold red", "disabled": "dim", "clash": "yellow", "shadowed": "yellow"}

app = typer.Typer(help="List and describe what is installed.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@app.command("list")
def list_plugins(
    kind: Annotated[str | None, typer.Argument(help="Only this kind, singular or plural: solver, norms, ...")] = None,
    as_json: Json = False,
) -> None:
    """List every plugin of every kind, its origin and its status.

    Imports them all, one by one; one that can't be imported is listed as broken, with the cause.
    """
    entries = registry.entries(kind_of(kind) if kind is not None else None)
    rows = [describe.summary(entry) for entry in entries]
    if as_json:
        _print_json({"plugins": rows})
        return
    console = _console()
    if not rows:
        console.print(f"No {kind_of(kind) if kind else 'plugins'} installed.")
    elif console.width < WIDE:
        _print_stacked(console, rows)
    else:
        console.print(_list_table(rows))


def _list_table(rows: list[dict[str, str]]) -> Table:
    table = _table(*COLUMNS, "meaning")
    for row in rows:
        cells = [Text(row[column], style=STYLES.get(row[column], "")) for column in COLUMNS]
        table.add_row(*cells, row["cause"] or row["meaning"])
    return table


def _print_stacked(console: Console, rows: list[dict[str, str]]) -> None:
    """The same for a narrow terminal: the meaning goes below its row."""
    widths = [max(len(row[column]) for row in rows) for column in COLUMNS]
    for row in rows:
        cells = [
            (row[column].ljust(width) + "  ", STYLES.get(row[column], "bold"))
            for column, width in zip(COLUMNS, widths, strict=True)
        ]
        console.print(Text.assemble(*cells))
        console.print(Padding(Text(row["cause"] or row["meaning"]), (0, 0, 0, 4)))


@app.command("show")
def show_plugin(
    kind: Annotated[str, typer.Argument(help="Its kind, singular or plural: solver, gradients, ...")],
    name: Annotated[str, typer.Argument(help="Its name, or DISTRIBUTION/NAME.")],
    as_json: Json = False,
) -> None:
    """Show where a plugin is from, what it does, and its settings."""
    found = describe.details(registry.find(kind_of(kind), name))
    if as_json:
        _print_json(found)
        return
    console = _console()
    console.print(Text(f"{found['name']} ({KINDS[found['kind']].singular})", style="bold"))
    console.print(Text(f"{found['origin']} {found['version']}".strip() + f", module {found['module']}", style="dim"))
    for paragraph in found["docstring"].split("\n\n"):
        console.print()
        console.print(Text(_reflowed(paragraph)))
    if found["settings"]:
        console.print()
        console.print(_settings_table(found["settings"]))


def _reflowed(paragraph: str) -> str:
    """Prose in one line, for the terminal to wrap; formulas and code, which are indented, and tables as they stand."""
    lines = paragraph.splitlines()
    return paragraph if any(line.startswith((" ", "=", "*", "-")) for line in lines) else " ".join(lines)


def _settings_table(settings: list[dict[str, Any]]) -> Table:
    table = _table("setting", "type", "default", "also called", "meaning")
    for index, setting in enumerate(settings):
        last_own = setting["own"] and index + 1 < len(settings) and not settings[index + 1]["own"]
        default = "(required)" if setting["required"] else describe.text_of(setting["default"])
        table.add_row(
            setting["name"],
            setting["type"],
            default,
            ", ".join(setting["aliases"]),
            setting["meaning"],
            end_section=last_own,
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        prose = column in ("meaning", "type")
        table.add_column(column, overflow="fold", no_wrap=not prose, min_width=20 if column == "meaning" else None)
    return table


def _console() -> Console:
    fixed = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, markup=False, emoji=False, width=None if fixed else PIPE_WIDTH)


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
