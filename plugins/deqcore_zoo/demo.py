"""``deqcore demo``: train a small convolutional DEQ on real handwritten digits, and see how its solvers converge."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from deqcore import ConfigError, DEQConfig, PluginError, hookimpl
from deqcore.files import to_toml, write_text

from .convergence import Curve, draw, require_matplotlib, residual_curve
from .digits import BATCH, DigitsDEQ, Epoch, Split, fit, load_digits_split

__all__ = ["DEFAULTS", "demo"]

#: What the demo uses where nothing else is asked for. A relative residual of 1 % is enough to learn from, forward and
#: backward, and halves the cost; the picture shows how much further each solver gets. The regularizer keeps f a
#: contraction: without it a few digits end up with an equilibrium that plain iteration circles and never reaches. A
#: sample of an early epoch that misses its tolerance is no reason to interrupt: the table has the residual.
DEFAULTS: dict[str, Any] = {
    "solver": {"name": "anderson", "rtol": 1e-2, "max_iter": 30},
    "gradient": {"name": "implicit", "solver": {"name": "anderson", "tol": 1e-2, "max_iter": 30}},
    "norm": {"name": "weight_norm"},
    "regularizers": [{"name": "jacobian", "weight": 0.3}],
    "on_failure": "ignore",
}

#: The solvers in the picture.
SOLVERS = ("fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden")

PICTURE, CONFIGURATION = "convergence.png", "demo.toml"
INTERRUPTED = 130


def demo(
    solver: Annotated[str | None, typer.Option(help="Forward solver, by any installed name.")] = None,
    gradient: Annotated[str | None, typer.Option(help="Gradient method, by any installed name.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML, JSON or YAML file with the whole configuration, instead of the demo's own."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the 1,437 training images.")] = 14,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights, the order and the augmentation.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for convergence.png and demo.toml; made if missing.")] = Path("."),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Train a small convolutional DEQ on 1,797 real handwritten digits.

    Prints a table of the training, and writes a picture of how the solvers converge on the trained model and the
    configuration that was used. Everything that can be refused is refused before the training starts.
    """
    chosen = configuration(config, solver, gradient)
    _make_folder(out)
    require_matplotlib()
    data = load_digits_split()
    notes = Console(stderr=True, highlight=False, markup=False)
    rows: list[Epoch] = []
    begin = time.perf_counter()
    try:
        with _one_thread(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = DigitsDEQ(chosen)
            train(model, data, epochs, seed, rows, notes)
            curves = convergence(model, data, lambda text: notes.print(text, style="yellow", soft_wrap=True))
        files = write_results(model, curves, out, rows)
    except KeyboardInterrupt:
        notes.print(f"Interrupted after {len(rows)} of {epochs} epochs.")
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        document = {
            "accuracy": rows[-1].accuracy,
            "seconds": time.perf_counter() - begin,
            "seed": seed,
            "epochs": [asdict(row) for row in rows],
            "convergence": [asdict(curve) for curve in curves],
            "config": model.deq.config.to_dict(),
            "files": {name: str(path) for name, path in files.items()},
        }
        typer.echo(json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _report(rows, files, model.deq.config, time.perf_counter() - begin)


def configuration(file: Path | None, solver: str | None, gradient: str | None) -> DEQConfig:
    """The configuration: the demo's own or that of a file, then the environment, then the names given."""
    names: dict[str, Any] = {"solver": solver, "gradient": gradient}
    names = {key: name for key, name in names.items() if name is not None}
    if file is not None:
        return DEQConfig.load(file, **names)
    with tempfile.TemporaryDirectory() as folder:  # as a file they rank below the environment, as defaults should
        defaults = Path(folder) / "defaults.toml"
        write_text(defaults, to_toml(DEFAULTS))
        return DEQConfig.load(defaults, **names)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out {str(out)!r}: can't write there: {error.strerror}. Give a folder that can be written."
        ) from error


@contextmanager
def _one_thread() -> Generator[None, None, None]:
    """Compute in one thread: tensors as small as these gain little from a second, and where another program is busy on
    the machine, threads that wait for each other at every operation cost many times what they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(model: DigitsDEQ, data: Split, epochs: int, seed: int, rows: list[Epoch], notes: Console) -> None:
    """Train with a progress bar on `notes`, if that is a terminal; `rows` grows by one an epoch."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as progress:
        bar = progress.add_task(f"epoch 1 of {epochs}", total=epochs * (len(data.train_images) // BATCH))
        for row in fit(model, data, epochs, torch.Generator().manual_seed(seed)):
            progress.advance(bar)
            if row is not None:
                rows.append(row)
                text = f"epoch {min(row.epoch + 1, epochs)} of {epochs}, test accuracy {row.accuracy:.1%}"
                progress.update(bar, description=text)


def convergence(model: DigitsDEQ, data: Split, note: Callable[[str], Any]) -> list[Curve]:
    """A curve for each of the four built-in solvers, and for the model's own if it is another, on the test images.

    A built-in that can't be had (it may be switched off) is left out, and `note` hears of it.
    """
    model.eval()
    with torch.no_grad():
        u = model.inject(data.test_images)
    own = model.deq.config.solver
    settings = own.model_dump(mode="json", exclude_unset=True) | {"name": own.name}
    curves: list[Curve] = []
    for name in dict.fromkeys((*SOLVERS, own.name)):
        try:
            curves.append(residual_curve(model.cell, torch.zeros_like(u), (u,), settings if name == own.name else name))
        except PluginError as error:
            note(f"{name} is not in the picture: {error}")
    return curves


def write_results(model: DigitsDEQ, curves: list[Curve], out: Path, rows: list[Epoch]) -> dict[str, Path]:
    """Write the picture and the configuration; returns their paths."""
    files = {"picture": out / PICTURE, "config": out / CONFIGURATION}
    title = f"Equilibria of 360 test digits, model at {rows[-1].accuracy:.1%} test accuracy"
    draw(curves, files["picture"], title)
    model.deq.config.save(files["config"])
    return files


def _report(rows: list[Epoch], files: dict[str, Path], config: DEQConfig, seconds: float) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("epoch", "loss", "test accuracy", "solver steps", "nfe", "residual", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.epoch),
            f"{row.loss:.4f}",
            f"{row.accuracy:.1%}",
            f"{row.steps:.1f}",
            str(row.nfe),
            f"{row.residual:.1e}",
            f"{row.seconds:.1f}",
        )
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    console.print(
        "\nsolver steps (mean), nfe (evaluations of f) and residual (relative, median) are of the test images' solve."
    )
    last = rows[-1]
    console.print(
        f"solver {config.solver.name}, gradient {config.gradient.name}: test accuracy {last.accuracy:.2%} "
        f"in {seconds:.0f} s; {last.converged:.1%} of the test images reached the tolerance."
    )
    console.print(f"wrote {files['picture']} and {files['config']}")


def _finite(value: Any) -> Any:
    """`value` with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@hookimpl
def deqcore_command() -> Callable[..., None]:
    return demo
