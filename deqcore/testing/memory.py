"""How much memory a solve takes, as the allocator saw it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes", "states_beyond"]

Call = Callable[[], Any]


def peak_bytes(call: Call, device: torch.device | str = "cpu") -> int:
    """The most bytes of tensors that `call` had at once, beyond those that were there before it.

    Every allocation and release of torch's allocator is counted, temporaries inside operations included; on the CPU by
    torch's profiler, on CUDA by the allocator's own statistics. What libraries below torch allocate for themselves
    (LAPACK's work space, for one) is seen by neither.

    Args:
        call: what to measure. What it returns is held until the end, so that a result counts.
        device: where its tensors are.
    """
    gc.collect()  # what is released in between, but was there before, would hide what is taken
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        held = call()
    del held
    results: Any = run.profiler and run.profiler.kineto_results
    events: list[Any] = [event for event in results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def states_beyond(solve: Call, evaluate: Call, z0: Tensor) -> float:
    """Memory of a solve beyond the state it works on and what one evaluation of f takes, in states.

    Args:
        solve: the whole solve from `z0`. Let a short one of the same kind run before, so that loading is not counted.
        evaluate: one evaluation of f, its result included; it takes one state if f works in place on its own result.
        z0: the start, which the caller holds, shape (B, ...), any dtype; its bytes are the unit.
    """
    size = z0.numel() * z0.element_size()
    return (peak_bytes(solve, z0.device) - peak_bytes(evaluate, z0.device)) / size - 1
