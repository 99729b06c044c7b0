"""`python -m benchmarks [NAME ...] [--quick] [--seeds LIST] [--out FOLDER]`: measure, print and write tables."""

from __future__ import annotations

import argparse
import importlib
import os
import time
from pathlib import Path

import torch
from rich.console import Console

from .options import Options, parse_seeds
from .report import environment, show, write

__all__ = ["main"]

#: Benchmarks, each a module of this package with `INTRO` and `run(options)`.
NAMES = ("overhead", "evaluations", "compaction", "memory", "random", "imports", "solvers", "gradients")


def main() -> None:
    """Run the benchmarks named on the command line, all of them if none is."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="deqcore beside its peers, tables in markdown."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(NAMES)} (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="few rounds and seeds, no largest state: a look, not a figure"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder of the written tables"
    )
    parser.add_argument("--seeds", type=parse_seeds, metavar="LIST", help="seeds of the six maps: 4-7, or 0,5,9")
    parser.add_argument("--cases", type=int, default=Options.cases, help="of `random` (default: %(default)s)")
    given = parser.parse_args()
    options = Options(given.quick, given.seeds, given.cases)
    unknown = [name for name in given.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(NAMES)}")
    console = Console()
    torch.set_num_threads(1)
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")  # jax's
    for name in given.names or NAMES:
        module = importlib.import_module(f".{name}", __package__)
        start = time.perf_counter()
        tables = module.run(options)
        seeds = f" Seeds {', '.join(map(str, given.seeds))}." if given.seeds else ""
        intro = f"{environment()} {module.INTRO}{seeds}" + (" `--quick`: few rounds." if given.quick else "")
        console.rule(name)
        console.print(intro, highlight=False)
        show(console, tables)
        written = [write(given.out, name, intro, tables)]
        if hasattr(module, "publish") and not given.quick:
            written += module.publish(tables)
        names = ", ".join(path.name for path in written)
        console.print(f"{name}: {time.perf_counter() - start:.0f} s, written to {names}", highlight=False)


if __name__ == "__main__":
    main()
