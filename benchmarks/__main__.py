"""`python -m benchmarks [NAME ...] [--quick] [--out FOLDER]`: measure, print and write tables."""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

import torch
from rich.console import Console

from .report import environment, show, write

__all__ = ["main"]

#: Benchmarks, each a module of this package with `INTRO` and `run(quick)`.
NAMES = ("overhead", "evaluations", "imports")


def main() -> None:
    """Run the benchmarks named on the command line, all of them if none is."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="deqcore beside torchdeq, tables in markdown."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(NAMES)} (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="few rounds and seeds, no largest state: a look, not a figure"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder of the written tables"
    )
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(NAMES)}")
    console = Console()
    torch.set_num_threads(1)
    for name in given.names or NAMES:
        module = importlib.import_module(f".{name}", __package__)
        start = time.perf_counter()
        tables = module.run(given.quick)
        intro = f"{environment()} {module.INTRO}" + (" `--quick`: few rounds." if given.quick else "")
        console.rule(name)
        console.print(intro, highlight=False)
        show(console, tables)
        path = write(given.out, name, intro, tables)
        console.print(f"{name}: {time.perf_counter() - start:.0f} s, written to {path.name}", highlight=False)


if __name__ == "__main__":
    main()
