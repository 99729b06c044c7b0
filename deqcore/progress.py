"""A progress bar over the steps of one call."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(steps: int, callback: Callable[..., Any] | None) -> Generator[Callable[..., Any]]:
    """`callback`, and a bar on standard error that shows the worst residual at each judged step.

    Args:
        steps: the step limit; the bar ends where the solve does.
        callback: what to call as well, or None.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("residual ...", total=steps)

        def show(step: int, z: Tensor, residual: Tensor) -> None:
            bar.update(task, completed=step, description=f"residual {residual.max().item():.2e}")
            if callback is not None:
                callback(step, z, residual)

        yield show
