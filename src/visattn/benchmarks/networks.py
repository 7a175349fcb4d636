"""Whole networks, timed and counted each in a process of its own, whose memory is then theirs alone.

`python -m visattn.benchmarks.networks ORDER` is that process; it prints JSON.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone

import torch
from torch import Tensor, nn

from visattn.benchmarks import machine, memory
from visattn.benchmarks.registry import SETS, map_size
from visattn.benchmarks.settings import Settings
from visattn.devices import precise_matmul
from visattn.errors import UserError, did_you_mean, one_line, require
from visattn.profile import MIB, count_flops, count_parameters, device_name
from visattn.tasks import CLASSIFICATION, main_output
from visattn.writing import writable, write_json

__all__ = ["NETWORKS", "Network", "bench", "measure"]

CLASSES = 19  # of Cityscapes, whose crops of 769x769 the segmentation papers train on
LONGEST = 300  # characters of a reason
SECONDS = 1.0  # of timed runs: one run of a small network is mostly the noise of the machine


@dataclass(frozen=True)
class Network:
    """A network and the input it is measured at."""

    name: str
    size: tuple[int, int]
    batch: int


_CLASSIFIERS = (
    "resnet50",
    "sknet26",
    "sknet50",
    "sknet101",
    "epsanet50",
    "epsanet101",
    "epsanet50_large",
    "epsanet101_large",
)
_SEGMENTERS = ("danet50", "danet101", "eanet50", "eanet101")
NETWORKS = (
    *(Network(name, (224, 224), 8) for name in _CLASSIFIERS),
    *(Network(name, (769, 769), 1) for name in _SEGMENTERS),
)


@dataclass
class Row:
    """One network in one implementation; what was not measured is None.

    Attributes:
        network: Its name.
        size: (H, W) of the images.
        batch: Images in a call.
        impl: "visattn", or "reference" for blocks that do the authors' arithmetic.
        parameters: Trained values.
        gmac: 10^9 multiply-adds of one image, forward.
        inference_ms: A forward pass in eval mode.
        training_ms: A training step: forward, backward, update.
        inference_mib: Most memory allocated in a forward pass, weights included.
        training_mib: Most memory allocated in a training step; weights, gradients and momentum included.
        resident_mib: Most memory that the process held, everything included.
        reason: Why it has no numbers.
    """

    network: str
    size: tuple[int, int]
    batch: int
    impl: str
    parameters: int | None = None
    gmac: float | None = None
    inference_ms: float | None = None
    training_ms: float | None = None
    inference_mib: float | None = None
    training_mib: float | None = None
    resident_mib: float | None = None
    reason: str = ""


def _build(name: str) -> nn.Module:
    models = require("visattn.models", extra="compare", purpose="visattn bench --networks")
    timm = require("timm", extra="compare", purpose="visattn bench --networks")
    net: nn.Module = getattr(models, name)(num_classes=CLASSES) if name in _SEGMENTERS else timm.create_model(name)
    return net


def measure(network: Network, impl: str, *, device: torch.device, dtype: torch.dtype, modes: Sequence[str]) -> Row:
    """Measure a network here: one run to warm up, runs that are timed, one whose allocations are counted.

    Args:
        network: Which.
        impl: "visattn" or "reference".
        device: Where.
        dtype: Of weights and images.
        modes: Of "inference" and "training".
    """
    row = Row(network.name, network.size, network.batch, impl)
    torch.manual_seed(0)
    net = _build(network.name)
    if impl == "reference":
        for module in net.modules():
            if isinstance(getattr(module, "impl", None), str):
                setattr(module, "impl", "reference")  # noqa: B010 - nn.Module's own typing knows no strings
    row.parameters = count_parameters(net)
    with torch.device("meta"):
        row.gmac = count_flops(_build(network.name), torch.empty(1, 3, *network.size)) / 2e9
    net = net.to(device, dtype)
    images = torch.randn(network.batch, 3, *network.size).to(device, dtype)
    weights = sum(t.nbytes for t in (*net.parameters(), *net.buffers()))

    if "inference" in modes:
        net.eval()

        def infer() -> None:
            with torch.inference_mode():
                net(images)

        row.inference_ms, peak = _timed(infer, device)
        row.inference_mib = (peak + weights) / MIB
    if "training" in modes:
        net.train()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            _loss(net(images)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        row.training_ms, peak = _timed(step, device, lambda: optimizer.zero_grad(set_to_none=True))
        momentum = sum(entry["momentum_buffer"].nbytes for entry in optimizer.state.values())
        row.training_mib = (peak + weights + momentum) / MIB
    if device.type == "cpu" and sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        row.resident_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
    return row


def _loss(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Cross-entropy towards class 0, of every output."""
    logits = main_output(outputs)
    return CLASSIFICATION.loss(outputs, logits.new_zeros(len(logits), *logits.shape[2:], dtype=torch.long))


def _timed(
    call: Callable[[], None], device: torch.device, between: Callable[[], None] = lambda: None
) -> tuple[float, int]:
    """Median milliseconds of the runs that fill `SECONDS`, one at least, and the most bytes allocated in another."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    wait()
    times: list[float] = []
    while sum(times) < SECONDS:
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    between()
    gc.collect()
    return 1000 * statistics.median(times), memory.peak_bytes(call, device)


def _apart(network: Network, impl: str, settings: Settings) -> Row:
    """The same in a process of its own."""
    order = {
        "network": asdict(network),
        "impl": impl,
        "device": settings.device,
        "dtype": settings.dtype,
        "modes": list(settings.modes),
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "visattn.benchmarks.networks", json.dumps(order)],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return Row(**json.loads(lines[-1]))
    said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    said = "killed, most likely for its memory" if done.returncode == -9 else said
    return Row(network.name, network.size, network.batch, impl, reason=said[:LONGEST])


def _chosen(settings: Settings) -> list[Network]:
    """The networks that settings name, at their sizes.

    Raises:
        UserError: An unknown name or size, or an option that networks have no use for.
    """
    if other := [word for word in settings.against if word != "reference"]:
        raise UserError(f"--networks knows --against reference alone, got {', '.join(other)}")
    known = [network.name for network in NETWORKS]
    for name in settings.names:
        if name not in known:
            hint = did_you_mean(name, known, f"Choose from {', '.join(known)}")
            raise UserError(f"unknown network {name!r}. {hint}")
    chosen = [network for network in NETWORKS if not settings.names or network.name in settings.names]
    if settings.shapes == "paper":
        return chosen
    sizes = (
        [(64, 64)]
        if settings.shapes in SETS
        else [map_size(word, settings.shapes) for word in settings.shapes.split(",")]
    )
    return [replace(network, size=size, batch=1) for network in chosen for size in sizes]


def bench(
    settings: Settings, *, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
) -> bool:
    """Measure the networks that settings ask for, print them, and write them where the settings say.

    Args:
        settings: Names are networks here; `shapes` is "paper" (224x224 in batches of 8, 769x769 one by one), or image
            sizes, then one by one.
        say: Is told of the progress.

    Returns:
        Whether every network was measured.

    Raises:
        UserError: Wrong settings, or a file that cannot be written.
    """
    require("visattn.models", extra="compare", purpose="visattn bench --networks")
    device, _ = settings.place()
    chosen = _chosen(settings)
    target = None if settings.json_file is None else writable(settings.json_file)
    rows = []
    tasks = [(network, impl) for network in chosen for impl in ("visattn", *settings.against)]
    for done, (network, impl) in enumerate(tasks, 1):
        say(f"[{done}/{len(tasks)}] {network.name} {network.size[0]}x{network.size[1]} {impl}")
        rows.append(_apart(network, impl, settings))
    _show(rows, settings)
    if target is not None:
        content = {
            "format": 1,
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "commit": machine.commit(),
            "versions": machine.versions(),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "dtype": settings.dtype,
            "networks": [asdict(row) for row in rows],
        }
        write_json(target, content)
    return not any(row.reason for row in rows)


def _show(rows: Sequence[Row], settings: Settings) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console = console if console.is_terminal else Console(width=120)
    device, _ = settings.place()
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    console.print(Text(f"{device_name(device)}{threads}, torch {torch.__version__}, {settings.dtype}"))
    table = Table()
    for heading in ("network", "images", "blocks"):
        table.add_column(heading, no_wrap=True)
    costs = ("inference\nms", "peak\nMiB", "training\nms a step", "peak\nMiB", "resident\nMiB")
    for heading in ("params\nM", "GMAC", *costs):
        table.add_column(heading, justify="right")
    for row in rows:
        millions = None if row.parameters is None else row.parameters / 1e6
        table.add_row(
            row.network,
            f"{row.batch} of {row.size[0]}x{row.size[1]}",
            row.impl,
            *(_number(value, digits) for value, digits in ((millions, 2), (row.gmac, 2), (row.inference_ms, 0))),
            *(_number(value) for value in (row.inference_mib, row.training_ms, row.training_mib, row.resident_mib)),
        )
    console.print(table)
    for row in rows:
        if row.reason:
            console.print(Text(f"failed {row.network} {row.impl}: {row.reason}", style="red"))
    console.print(
        Text(
            "Peak memory counts weights, gradients, momentum and every allocation of torch's allocator in one call; "
            "resident is the most the process held, the libraries included. Times are medians of the runs in one "
            "second, or of one run that takes longer."
        )
    )


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _main(text: str) -> None:
    order = json.loads(text)
    torch.set_num_threads(order["threads"])
    network = Network(order["network"]["name"], tuple(order["network"]["size"]), order["network"]["batch"])
    dtype = getattr(torch, order["dtype"])
    with precise_matmul():
        row = measure(network, order["impl"], device=torch.device(order["device"]), dtype=dtype, modes=order["modes"])
    print(json.dumps(asdict(row)))


if __name__ == "__main__":
    try:
        _main(sys.argv[1])
    except Exception as error:  # whatever a network raises becomes the reason in its row
        sys.exit(f"{type(error).__name__}: {one_line(error)}")
