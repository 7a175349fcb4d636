"""What a network costs: parameters, FLOPs, latency, memory of a training step."""

from __future__ import annotations

import contextlib
import platform
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "MIB",
    "Costs",
    "count_flops",
    "count_parameters",
    "device_name",
    "measure_latency",
    "peak_memory",
    "profile",
]

MIB = 1024**2
WARM_UP = 5  # runs before the clock counts
RUNS = 50  # at most
LEAST = 10  # at least, whatever the time
SECONDS = 1.5  # after which no further run is started


@dataclass(frozen=True)
class Costs:
    """Costs of one network.

    Attributes:
        parameters: Trained values.
        flops: Of one image, forward; one multiply-add counts as 2, layers without a matrix product as 0.
        latency_ms: Batch size to (median, 90th percentile) of a forward pass in eval mode, in milliseconds.
        peak_memory_mib: Most memory in tensors at one time during a training step.
        peak_memory_note: How that was measured.
    """

    parameters: int
    flops: int
    latency_ms: dict[int, tuple[float, float]]
    peak_memory_mib: float
    peak_memory_note: str


def device_name(device: torch.device) -> str:
    """The model of a GPU or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # Linux tells it here, where `platform` does not
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "CPU"


def count_parameters(net: nn.Module) -> int:
    """Number of trained values."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def count_flops(net: nn.Module, image: Tensor) -> int:
    """FLOPs of a forward pass in eval mode, by `torch.utils.flop_counter`; one multiply-add counts as 2.

    Of visattn's blocks the published arithmetic is counted: what runs instead differs by device.
    """
    chosen = {module: module.impl for module in net.modules() if isinstance(getattr(module, "impl", None), str)}
    try:
        for module in chosen:
            setattr(module, "impl", "reference")  # noqa: B010 - nn.Module's own typing knows no strings
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net.eval()(image)
    finally:
        for module, impl in chosen.items():
            setattr(module, "impl", impl)  # noqa: B010
    return int(counter.get_total_flops())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_latency(net: nn.Module, images: Tensor) -> tuple[float, float]:
    """Median and 90th percentile in milliseconds of a forward pass in eval mode, after warm-up."""
    net.eval()
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(WARM_UP):
            net(images)
        until = time.perf_counter() + SECONDS
        while len(times) < LEAST or (len(times) < RUNS and time.perf_counter() < until):
            _wait(images.device)
            start = time.perf_counter()
            net(images)
            _wait(images.device)
            times.append(1000 * (time.perf_counter() - start))
    p50, p90 = torch.tensor(times).quantile(torch.tensor([0.5, 0.9])).tolist()
    return p50, p90


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes in live tensors while it is entered."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: set[int] = set()
        for tensor in tensors:
            self._count(tensor)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone).atexit = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return output


def peak_memory(net: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> tuple[float, str]:
    """Most memory in tensors during a training step, in MiB, and how it was measured.

    Args:
        net: The network.
        optimizer: Its optimiser.
        step: Runs one step, from forward pass to update; it is run twice, as the first makes the optimiser's state.
    """
    step()
    optimizer.zero_grad(set_to_none=True)
    device = next(net.parameters()).device
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) / MIB, "torch.cuda.max_memory_allocated over one training step"
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    live = _Live([*net.parameters(), *net.buffers(), *state])
    with live:
        step()
    return live.peak / MIB, (
        "weights, optimiser state, gradients and activations alive at one time in a training step, counted after every "
        "operation (scratch memory inside an operation is not seen)"
    )


def profile(
    net: nn.Module,
    images: Tensor,
    *,
    optimizer: torch.optim.Optimizer,
    step: Callable[[], None],
    batch_sizes: Iterable[int] = (1, 32),
) -> Costs:
    """Measure the costs of a network; its weights are trained by two steps, its mode is left in eval.

    Args:
        net: The network, on the device to measure.
        images: (B, C, H, W) to repeat to the batch sizes.
        optimizer: As in training.
        step: One training step.
        batch_sizes: Of the latency.
    """

    def batch(size: int) -> Tensor:
        return images[:1].expand(size, -1, -1, -1).contiguous()

    flops = count_flops(net, batch(1))
    latency = {size: measure_latency(net, batch(size)) for size in batch_sizes}
    memory, note = peak_memory(net, optimizer, step)
    net.eval()
    return Costs(count_parameters(net), flops, latency, memory, note)
