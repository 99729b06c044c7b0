"""Memory of a training step, as torch's allocator saw it: it hardly grows with the steps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from deqcore_reversible import benchmark


@pytest.mark.parametrize(("damping", "limit"), [(0.2, 1.05), (0.5, 1.06)])
def test_sixty_four_steps_over_four(damping, limit):
    f = benchmark.Block(batch=32, size=128, dtype=torch.float64)

    def reversible(f, z0, steps):
        return benchmark.reversible(steps, damping)(f, z0)[0][0]

    few, many = (benchmark.peak(f, partial(reversible, steps=steps)) for steps in (4, 64))
    unrolled = benchmark.peak(f, partial(benchmark.unrolled, damping=damping, steps=16))
    assert many <= limit * few < unrolled / 3
