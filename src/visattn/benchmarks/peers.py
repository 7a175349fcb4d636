"""What people install today, timed in a process of its own: `python -m visattn.benchmarks.peers` prints JSON.

Their functions differ from ours, in what they compute and in their numbers, so only their speed is told.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from visattn.benchmarks import memory
from visattn.benchmarks.contenders import Task
from visattn.benchmarks.registry import Shape
from visattn.benchmarks.results import Row
from visattn.benchmarks.settings import Settings
from visattn.benchmarks.timing import SECONDS, Timed, interleave, summarise
from visattn.errors import one_line
from visattn.profile import MIB

__all__ = ["PEERS", "measure_apart", "module_of", "peer_of"]

PEERS = {"fightingcv": "fightingcv-attention", "timm": "timm"}  # name in the table: distribution
_FIGHTINGCV = "fightingcv_attention.attention"


def peer_of(shape: Shape) -> str | None:
    """Which peer has something for a shape; None if none has."""
    if shape.block == "selective_kernel":
        return "timm" if shape.options.get("dilated", True) else "fightingcv"
    return "fightingcv" if shape.block in _BUILD else None


def _selective_kernel(shape: Shape) -> nn.Module:
    width, options = shape.width, shape.options
    if options.get("dilated", True):
        layers = importlib.import_module("timm.layers")
        stride = options.get("stride", 1)
        block: nn.Module = layers.SelectiveKernel(width, width, stride=stride, groups=32, split_input=False)
        return block
    kernels = list(options["kernel_size"])
    return _of("SKAttention", "SKAttention", channel=width, kernels=kernels, reduction=16, group=1)


def _of(module: str, name: str, **arguments: Any) -> nn.Module:
    cls = getattr(importlib.import_module(f"{_FIGHTINGCV}.{module}"), name)
    block: nn.Module = cls(**arguments)
    return block


def _multihead(shape: Shape) -> nn.Module:
    heads = shape.options["num_heads"]
    each = shape.width // heads
    return _of("SelfAttention", "ScaledDotProductAttention", d_model=shape.width, d_k=each, d_v=each, h=heads)


def _projected(shape: Shape) -> nn.Module:
    height, width = shape.options["feat_size"]
    return _of("DANet", "DAModule", d_model=shape.width, kernel_size=3, H=height, W=width)


_BUILD: dict[str, Callable[[Shape], nn.Module]] = {
    "external": lambda shape: _of("ExternalAttention", "ExternalAttention", d_model=shape.width, S=64),
    "multihead_tokens": _multihead,
    "selective_kernel": _selective_kernel,
    "dual_projected": _projected,
    "pyramid_squeeze": lambda shape: _of("PSA", "PSA", channel=shape.width, reduction=4, S=4),
}


def module_of(shape: Shape) -> nn.Module:
    """The peer's module for a shape, with the numbers that its constructor gives it."""
    return _BUILD[shape.block](shape)


def _timed(module: nn.Module, task: Task) -> Timed:
    """The module at a task; a map becomes tokens where it takes those."""
    module = module.to(task.device, task.dtype).train(task.mode == "training")
    given = task.args[0]
    if task.shape.block == "external":  # it has no form for maps
        given = given.flatten(2).transpose(1, 2).contiguous()
    x = given.clone()
    x.requires_grad_(task.mode == "training")
    cotangents: list[Tensor] = []

    def prepare() -> None:
        with torch.no_grad():
            x.copy_(given)  # some write into their input
        x.grad = None
        module.zero_grad(set_to_none=True)

    def run() -> None:
        args = (x, x, x) if task.shape.tokens else (x,)
        if task.mode == "inference":
            with torch.inference_mode():
                module(*args, **task.kwargs)
            return
        out = module(*args, **task.kwargs)
        if not cotangents:
            cotangents.append(torch.randn_like(out))
        torch.autograd.backward(out, cotangents[0])

    return Timed(run, prepare)


def _measure(settings: Settings, seconds: float) -> dict[str, Any]:
    """Rows of every shape that a peer has something for."""
    shapes, device, dtype = settings.resolve()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows, skipped = [], {}
    for shape in shapes:
        name = peer_of(shape)
        if name is None or name in skipped:
            continue
        try:
            importlib.import_module("timm" if name == "timm" else "fightingcv_attention")
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name in ("timm", "fightingcv_attention")
            reason = f"not installed (pip install {PEERS[name]})" if missing else one_line(error)
            skipped[name] = reason
            continue
        for mode in settings.modes:
            batch = shape.batch_on(device)
            row = Row(shape.label, shape.mechanism, shape.block, list(shape.size), batch, mode, name, "speed only")
            try:
                torch.manual_seed(0)
                module = module_of(shape)
                timed = _timed(module, Task.of(shape, mode, dtype, device))
                timed.prepare()
                timed.run()
                timed.prepare()
                row.peak_mib = memory.peak_bytes(timed.run, device) / MIB
                times = summarise(interleave([timed], device, seconds=seconds)[0])
                row.parameters = sum(p.numel() for p in module.parameters())
                row.median_ms, row.p20_ms, row.p80_ms, row.runs = times.median, times.p20, times.p80, times.runs
            except Exception as error:  # its fault is told, and is no failure of ours
                row.reason = f"cannot run: {type(error).__name__}: {one_line(error)}"[:300]
            rows.append(asdict(row))
    return {"rows": rows, "skipped": [{"contender": name, "reason": reason} for name, reason in skipped.items()]}


def measure_apart(settings: Settings, *, seconds: float = SECONDS) -> tuple[list[Row], list[dict[str, str]]]:
    """Time the peers in a process of their own: what they import and switch stays there.

    Args:
        settings: As for ours.
        seconds: Time for each.

    Returns:
        Their rows, and who was skipped for which reason.
    """
    order = settings.record() | {"device": settings.device, "seconds": seconds, "threads": torch.get_num_threads()}
    done = subprocess.run(
        [sys.executable, "-m", "visattn.benchmarks.peers", json.dumps(order)],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return [], [{"contender": "peers", "reason": f"their process failed: {said}"}]
    answer = json.loads(lines[-1])
    return [Row(**row) for row in answer["rows"]], answer["skipped"]


def _main(text: str) -> None:
    order = json.loads(text)
    torch.set_num_threads(order["threads"])
    settings = Settings(
        names=tuple(order["names"]),
        shapes=order["shapes"],
        device=order["device"],
        dtype=order["dtype"],
        modes=tuple(order["modes"]),
        against=("peers",),
    )
    print(json.dumps(_measure(settings, order["seconds"])))


if __name__ == "__main__":
    _main(sys.argv[1])
