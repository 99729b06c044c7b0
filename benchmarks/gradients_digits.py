"""Gradient backends on the digits model: what is learned with each, at what cost, and how near the gradient is."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from deqcore import DEQError
from deqcore.testing import installed
from deqcore_zoo.demo import DEFAULTS
from deqcore_zoo.digits import BATCH, DigitsDEQ, Epoch, Split, fit, load_digits_split

from .gradients_count import Counter
from .options import Options
from .report import Table

__all__ = ["tables"]

EPOCHS = 6
SEEDS = (0, 1)
#: Batches of 48 training images on which gradients are compared.
BATCHES = 5
COSINE, SHARE = 0.95, 0.2
BROYDEN: dict[str, Any] = {"solver": {"name": "broyden", "rtol": 1e-2, "max_iter": 30}}
REVERSIBLE: dict[str, Any] = {
    "solver": {"name": "reversible", "damping": 0.5, "rtol": 1e-2, "max_iter": 30},
    "core": "reversible",
}
LOOSE = DEFAULTS["gradient"]

#: title -> what differs from the demo's configuration.
ROWS: dict[str, dict[str, Any]] = {
    "implicit": {"gradient": "implicit"},
    "implicit, anderson to 1e-2": {"gradient": LOOSE},
    "phantom": {"gradient": "phantom"},
    "phantom, 5 steps": {"gradient": {"name": "phantom", "steps": 5}},
    "one_step": {"gradient": "one_step"},
    "neumann": {"gradient": "neumann"},
    "shine": {"gradient": "shine", **BROYDEN},
    "unrolled": {"gradient": "unrolled"},
    "reversible": {"gradient": "reversible", **REVERSIBLE},
}
EXACT: dict[str, Any] = {
    "solver": {"name": "broyden", "rtol": 1e-10, "max_iter": 300},
    "gradient": {"name": "implicit", "solver": {"name": "gmres", "tol": 1e-10, "max_iter": 500}},
}
#: SHINE as it is by default, and with other numbers of steps; nothing but the steps where it falls back to none.
SHINES: dict[str, Any] = {
    "shine": "shine",
    **{f"shine, refine {k}, no fallback": {"name": "shine", "refine": k, "fallback": "none"} for k in (0, 1, 2, 8)},
}


class Backward(NamedTuple):
    """One backward: the gradient of the cell and the injection, evaluations of f, products with J^T."""

    gradient: Tensor
    evaluations: int
    products: int


def tables(options: Options) -> list[Table]:
    """The backends, and SHINE beside the implicit backward."""
    data = load_digits_split()
    epochs, seeds, batches = (1, SEEDS[:1], 2) if options.quick else (EPOCHS, SEEDS, BATCHES)
    given = {
        title: _configured(changes)
        for title, changes in _rows().items()
        if _name(changes["gradient"]) in installed("gradients")
    }
    first = _made(_configured(ROWS["implicit, anderson to 1e-2"]), 0)
    fresh = copy.deepcopy(first)
    _train(first, data, epochs if options.quick else 14, 0)
    images = data.train_images.split(BATCH)[:batches]
    labels = data.train_labels.split(BATCH)[:batches]
    parts = list(zip(images, labels, strict=True))
    return [_backends(given, fresh, first, data, parts, epochs, seeds), _shine(first, parts)]


def _rows() -> dict[str, dict[str, Any]]:
    """The rows, and one for every backend that someone else has installed."""
    named = {_name(changes["gradient"]) for changes in ROWS.values()}
    return ROWS | {name: {"gradient": name} for name in installed("gradients") if name not in named}


def _name(choice: str | dict[str, Any]) -> str:
    return choice if isinstance(choice, str) else choice["name"]


def _configured(changes: dict[str, Any]) -> dict[str, Any]:
    return {**DEFAULTS, **changes}


def _made(configuration: dict[str, Any], seed: int) -> DigitsDEQ:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitsDEQ(configuration)


def _train(model: DigitsDEQ, data: Split, epochs: int, seed: int) -> tuple[float, float]:
    """Test accuracy, and the thread's seconds."""
    start = time.thread_time()
    rows: list[Epoch] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rows = [row for row in fit(model, data, epochs, torch.Generator().manual_seed(seed)) if row is not None]
    return rows[-1].accuracy, time.thread_time() - start


def _backward(
    model: DigitsDEQ, changes: dict[str, Any], part: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float32
) -> Backward:
    """A backward of `model`'s weights with another configuration."""
    made = DigitsDEQ({**_configured(changes), "regularizers": []})
    made.load_state_dict(model.state_dict())
    made.to(dtype).train()
    made.head.eval()  # its dropout aside
    counter = Counter(lambda z: z)

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return counter(output)

    made.cell.register_forward_hook(hook)
    images, labels = part
    logits, _ = made(images.to(dtype))
    functional.cross_entropy(logits, labels).backward()
    found = [p.grad for module in (made.inject, made.cell) for p in module.parameters()]
    gradient = torch.cat([torch.zeros(0) if grad is None else grad.flatten().double() for grad in found])
    return Backward(gradient, counter.calls, counter.passes - 1)


def _cosine(found: Tensor, right: Tensor) -> float:
    return float(functional.cosine_similarity(found, right, dim=0))


def _exact(model: DigitsDEQ, parts: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [_backward(model, EXACT, part, torch.float64).gradient for part in parts]


def _backends(
    given: dict[str, dict[str, Any]],
    fresh: DigitsDEQ,
    trained: DigitsDEQ,
    data: Split,
    parts: list[tuple[Tensor, Tensor]],
    epochs: int,
    seeds: tuple[int, ...],
) -> Table:
    table = Table(
        "Backends on the digits model",
        ("backend", "test accuracy", "seconds", "cosine, trained", "cosine, untrained", "evaluations", "products"),
        notes=f"`make demo`'s model and settings (anderson to a relative 1e-2; shine: broyden; reversible: its own "
        f"solver), {epochs} epochs, each backend with its defaults where nothing else is said. Accuracy on 360 test "
        f"images after training with the backend, seeds {', '.join(map(str, seeds))}; seconds of one such training, "
        f"one thread, median. Cosine with the exact gradient (float64, both solves to 1e-10), all parameters before "
        f"the head together, mean (lowest) of {len(parts)} batches of {BATCH}, at weights that are the same for all: "
        "at initialisation, and trained by implicit differentiation for 14 epochs (`--quick`: 1). Evaluations of f in "
        "a training step, those of the forward solve included, and products with J^T, at the trained weights.",
    )
    exact = {"trained": _exact(trained, parts), "untrained": _exact(fresh, parts)}
    for title, configuration in given.items():
        found = {"trained": trained, "untrained": fresh}
        try:
            backs = {key: [_backward(model, configuration, part) for part in parts] for key, model in found.items()}
            trainings = [_train(_made(configuration, seed), data, epochs, seed) for seed in seeds]
        except (DEQError, RuntimeError) as error:
            table.add(f"`{title}`", f"refused: {type(error).__name__}", *[""] * 5)
            continue
        cosines = [
            [_cosine(back.gradient, right) for back, right in zip(backs[key], exact[key], strict=True)] for key in backs
        ]
        table.add(
            f"`{title}`",
            ", ".join(f"{100 * accuracy:.1f} %" for accuracy, _ in trainings),
            f"{statistics.median(seconds for _, seconds in trainings):.0f}",
            *(f"{statistics.mean(values):.3f} ({min(values):.3f})" for values in cosines),
            f"{statistics.mean(back.evaluations for back in backs['trained']):.0f}",
            f"{statistics.mean(back.products for back in backs['trained']):.0f}",
        )
    return table


def _shine(model: DigitsDEQ, parts: list[tuple[Tensor, Tensor]]) -> Table:
    table = Table(
        "SHINE beside implicit differentiation, trained digits model",
        ("backward", "products with J^T", "over implicit", "lowest cosine", "ok"),
        notes="Forward by broyden to a relative 1e-2 for all; implicit with its defaults (gmres to 1e-6). Sum of "
        f"{len(parts)} batches, counted inside f; the pass to the parameters, which all make, left out. ok: at most "
        f"{SHARE} of the products at a cosine above {COSINE}.",
    )
    if "shine" not in installed("gradients"):
        table.add("shine is not installed", "", "", "", "")
        return table
    exact, base = _exact(model, parts), 0
    for title, gradient in {"implicit": "implicit", **SHINES}.items():
        backs = [_backward(model, {**BROYDEN, "gradient": gradient}, part) for part in parts]
        products = sum(back.products for back in backs)
        base = base or products
        cosine = min(_cosine(back.gradient, right) for back, right in zip(backs, exact, strict=True))
        ok = "" if title == "implicit" else "yes" if products <= SHARE * base and cosine > COSINE else "no"
        table.add(f"`{title}`", products, f"{products / base:.2f}", f"{cosine:.3f}", ok)
    return table
