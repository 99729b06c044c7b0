"""The `deqcore` program: its own commands, and those of the group ``deqcore.commands``, loaded when they are named."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from ..errors import BrokenPluginError, DEQError, UnknownPluginError, suggest
from ..registry import registry
from . import plugins

__all__ = ["PluginGroup", "app", "main"]

#: Exit code of a deqcore error, the same as that of a wrong option.
FAILED = 2


class PluginGroup(TyperGroup):
    """Commands of our own, and those that plugins bring. Listing them imports no plugin; naming one imports only it."""

    listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        own = super().list_commands(ctx)
        theirs = {entry.name for entry in registry.entries("commands") if not registry.disabled(entry)}
        return [*own, *sorted(theirs - set(own))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        if self.listing:
            return _placeholder(cmd_name)
        known = self.list_commands(ctx)
        if cmd_name.rpartition("/")[2] not in [*known, *registry.names("commands")]:
            if ctx.resilient_parsing:
                return None
            raise UnknownPluginError(
                f"no command named {cmd_name!r}.{suggest(cmd_name, known)} Commands: {', '.join(known)}. "
                "Others come with plugins that bring a command."
            )
        return load_command(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self.listing = False


def _as_command(name: str, run: Any, text: str | None = None) -> Any:
    """A function as a command that can be added to a group."""
    single = typer.Typer(add_completion=False)
    single.command(name, help=text)(run)
    command = typer.main.get_command(single)
    command.name = name
    return command


def _placeholder(name: str) -> Any:
    """What stands in the list of commands for one whose module is not imported."""
    entries = [entry for entry in registry.entries("commands") if entry.name == name and not registry.disabled(entry)]
    origins = ", ".join(f"{entry.origin} {entry.version}".strip() for entry in entries)
    return _as_command(name, lambda: None, f"From {origins}; see deqcore {name} --help.")


def load_command(name: str) -> Any:
    """The command that a plugin brings under `name` (or ``dist/name``), imported now.

    Raises:
        UnknownPluginError, PluginClashError, PluginDisabledError: `name` doesn't name one enabled command.
        BrokenPluginError: its module can't be imported, or what its hook returned can't be a command.
    """
    entry = registry.find("commands", name)
    found = registry.load(entry)
    try:
        command = typer.main.get_command(found) if isinstance(found, typer.Typer) else _as_command(entry.name, found)
    except Exception as error:
        raise BrokenPluginError(
            f"{entry} can't be used: deqcore_command() must return a typer.Typer or a function whose parameters have "
            f"types that typer knows; it returned {found!r} ({type(error).__name__}: {error}). Repair or uninstall it."
        ) from error
    command.name = entry.name
    return command


app = typer.Typer(
    name="deqcore",
    cls=PluginGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Deep equilibrium models in PyTorch: look at what is installed, and run what it brings.",
)
app.add_typer(plugins.app, name="plugins")


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"deqcore {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options before any command."""


def _line(text: str, style: str) -> None:
    """One line on stderr, whatever its length."""
    Console(stderr=True, highlight=False).print(" ".join(text.split()), style=style, markup=False, soft_wrap=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    _line(f"warning: {message}", "yellow")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `deqcore` with `arguments` (default: the process's) and exit.

    An error of deqcore's is printed as one line on stderr, with exit code 2. Other exceptions are bugs and pass on.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            typer.main.get_command(app).main(args=arguments, prog_name="deqcore")
        except DEQError as error:
            _line(f"error: {error}", "bold red")
            sys.exit(FAILED)
