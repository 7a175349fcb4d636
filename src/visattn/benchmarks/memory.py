"""The most memory that one call allocates, buffers inside operations included."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.profiler import profile

from visattn import native

__all__ = ["NOT_SEEN", "allocations", "peak_bytes"]

NOT_SEEN = (
    "Allocations of torch's allocator and of visattn.native are counted, those inside operations included; scratch "
    "memory that oneDNN, the BLAS or worker threads get elsewhere is not seen on the CPU."
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the profiler's library from logging; it reads the setting when it is first used."""
    key = "KINETO_LOG_LEVEL"
    if key in os.environ:
        yield
        return
    os.environ[key] = "99"
    try:
        yield
    finally:
        os.environ.pop(key, None)


def allocations(call: Callable[[], Any]) -> list[int]:
    """Bytes of every allocation of torch's CPU allocator during a call, in order; those given back are negative.

    Memory that was allocated before the call is not counted when it is given back.

    Args:
        call: What to run; its result is given back at once.
    """
    with _quiet(), profile(profile_memory=True) as profiler:
        call()
    results = profiler.kineto_results
    if results is None:
        raise RuntimeError("torch's profiler recorded nothing; is another one running?")
    events: list[tuple[int, int]] = []
    pending = list(results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.name == "[memory]" and event.extra_fields.device.type == "cpu":
            events.append((event.start_time_ns, event.extra_fields.alloc_size))
    events.sort(key=lambda entry: entry[0])
    return [size for _, size in events]


def peak_bytes(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes that are allocated at one time during a call, beyond what was there before.

    Args:
        call: What to run; not the first run, which may keep what it allocates. Its inputs and parameters are there
            before, so they do not count; what it gives out and gradients that it makes do.
        device: Whose memory.

    Example:
        >>> x = torch.ones(1024)
        >>> peak_bytes(lambda: x.exp().exp())  # 4 KiB each, alive together
        8192
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    now = peak = 0
    native.memory_peak()
    for size in allocations(call):
        now += size
        peak = max(peak, now)
    return peak + native.memory_peak()  # at most: the two need not be highest at one time
