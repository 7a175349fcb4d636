"""What the machine can do at best, measured: the rates behind "percent of the limit"."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import visattn
from visattn import native
from visattn.benchmarks.timing import Timed, interleave, summarise
from visattn.profile import device_name

__all__ = ["Machine", "commit", "measure", "versions"]

SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices that are multiplied
BUFFER = {"cpu": 256 * 2**20, "cuda": 2**30}  # bytes that are copied, many times any cache
REPEATS = 3  # medians, the best of which counts
SECONDS = 0.4  # for each


@dataclass(frozen=True)
class Machine:
    """A device and its two rates.

    Attributes:
        device: As torch names it.
        name: The model.
        system: Operating system and architecture.
        threads: Of torch, on a CPU.
        gemm_gflops: Rate of a large square matrix product in the measured precision, in 10^9 FLOPs per second.
        copy_gbps: Rate of a copy, bytes read and bytes written together, in 10^9 per second.
        kernels: Whether those of `visattn.native` serve it.
    """

    device: str
    name: str
    system: str
    threads: int
    gemm_gflops: float
    copy_gbps: float
    kernels: bool = False

    def limit_ms(self, flops: float, moved: float) -> float:
        """Milliseconds that so many FLOPs and bytes take at least."""
        return max(flops / self.gemm_gflops, moved / self.copy_gbps) / 1e6

    def best(self, again: Machine) -> Machine:
        """The better rates of two measurements of one machine."""
        gemm, copy = max(self.gemm_gflops, again.gemm_gflops), max(self.copy_gbps, again.copy_gbps)
        return replace(self, gemm_gflops=gemm, copy_gbps=copy)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def _best(call: Any, device: torch.device) -> float:
    """Seconds of the best of a few medians."""
    return min(summarise(interleave([Timed(call)], device, seconds=SECONDS)[0]).median for _ in range(REPEATS)) / 1000


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure both rates.

    Args:
        device: Which device.
        dtype: Of the matrices.
    """
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    size = BUFFER[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with torch.inference_mode():
        gemm = 2 * side**3 / _best(lambda: torch.matmul(a, b, out=product), device)
        copy = 2 * size / _best(lambda: target.copy_(source), device)
    return Machine(
        str(device),
        device_name(device),
        f"{platform.system()} {platform.machine()}",
        torch.get_num_threads(),
        gemm / 1e9,
        copy / 1e9,
        device.type == "cpu" and native.available(),
    )


def versions() -> dict[str, str]:
    """Versions that decide results."""
    return {"visattn": visattn.__version__, "torch": str(torch.__version__), "python": platform.python_version()}


def commit(package: Path | None = None) -> str | None:
    """The commit of the checkout that the package lies in, with "+changes" where tracked files differ; else None.

    Args:
        package: Folder of the package; by default where it was imported from.
    """
    package = Path(visattn.__file__).parent if package is None else package

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, check=False)
        except OSError:  # no git here
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "__init__.py"):  # an installed copy may lie in somebody else's checkout
        return None
    head = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{head}+changes" if head and changed else head
