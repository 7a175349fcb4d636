"""The run: from settings to a report, or to an estimate."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from visattn.compare.arms import Arm
from visattn.compare.folder import RunFolder, check_out
from visattn.compare.plan import Plan, make_plan
from visattn.compare.progress import Progress, duration
from visattn.compare.settings import Settings
from visattn.compare.trials import measure_costs, run_trial
from visattn.errors import UserError
from visattn.profile import MIB, count_parameters
from visattn.training import TrainingError
from visattn.writing import write_json

__all__ = ["estimate", "run"]

VAL_STEP = 1 / 3  # of a training step: a forward pass without a backward one


def run(settings: Settings) -> Path:
    """See `visattn.compare.compare`."""
    from visattn.compare.report import write_report

    with _undisturbed():
        check_out(settings.out)
        plan = make_plan(settings)
        folder = RunFolder(plan)
        with folder.opened():
            _measure_all(plan, folder)
            failed = _train_all(plan, folder)
            _say_step0(plan, folder)
            report: Path = write_report(folder.path)
    if failed:
        print(f"{failed} of {len(plan.trials())} trials failed; the report says why.", file=sys.stderr)
    return report


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the advice of the libraries underneath off the terminal; their errors are exceptions all the same."""
    with warnings.catch_warnings():
        for package in ("timm", "torchvision", "PIL", "datasets", "huggingface_hub"):
            warnings.filterwarnings("ignore", module=rf"{package}\b")
        yield


def _reason(error: BaseException) -> str:
    """An exception in one line."""
    said = " ".join(str(error).split())
    if said and isinstance(error, TrainingError | UserError | ValueError):
        return said[:500]
    return f"{type(error).__name__}: {said[:450]}"


def _is_measured(path: Path) -> bool:
    """Whether a file holds the costs of an arm; one that is damaged is measured anew."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "parameters" in found and "failed" not in found


def _measure_all(plan: Plan, folder: RunFolder) -> None:
    """Costs of the arms not yet measured, and the check that all are the same function before training."""
    progress = Progress(1, [])
    largest, checked = 0.0, 0
    plain_parameters = 0
    for arm in plan.arms:
        path = folder.costs(arm.name)
        if _is_measured(path):
            continue
        if arm.name in plan.refused:
            write_json(path, {"arm": arm.name, "failed": plan.refused[arm.name]})
            continue
        try:
            costs, difference, _ = measure_costs(plan, arm)
        except Exception as error:  # out of memory, most often; whatever it was, the others go on
            write_json(path, {"arm": arm.name, "failed": _reason(error)})
            continue
        largest, checked = max(largest, difference), checked + 1
        plain_parameters = plain_parameters or count_parameters(plan.build(plan.arms[0], 0)[0])
        write_json(
            path,
            {
                "arm": arm.name,
                "parameters": costs.parameters,
                "added_parameters": costs.parameters - plain_parameters,
                "flops": costs.flops,
                "latency_ms": {str(size): {"p50": p50, "p90": p90} for size, (p50, p90) in costs.latency_ms.items()},
                "peak_memory_mib": costs.peak_memory_mib,
                "peak_memory_note": f"{costs.peak_memory_note}, batch of {plan.settings.batch_size}",
            },
        )
    if checked:
        progress.message(f"{checked} arms before training: max|output difference| = {largest:g}")


def _train_all(plan: Plan, folder: RunFolder) -> int:
    """Run the trials that are not finished; returns how many failed."""
    finished = folder.finished()
    waiting = [(arm, seed) for arm, seed in plan.trials() if (arm.name, seed) not in finished]
    progress = Progress(plan.settings.epochs, [(arm.name, seed) for arm, seed in waiting], plan.task.score)
    if finished and waiting:
        progress.message(f"Continuing: {len(finished)} of {len(plan.trials())} trials are finished.")
    failed = 0
    try:
        for arm, seed in waiting:
            progress.start(arm.name, seed)
            failed += not _attempt(plan, folder, arm, seed, progress)
    except KeyboardInterrupt:
        done = len(folder.finished())
        progress.message(
            f"Stopped: {done} of {len(plan.trials())} trials are finished. To continue: {plan.settings.command()}"
        )
        raise
    progress.clear()
    return failed


def _say_step0(plan: Plan, folder: RunFolder) -> None:
    """Print how far the arms of all finished trials were from plain before training."""
    results = [folder.trial(arm, seed) / "result.json" for arm, seed in sorted(folder.finished())]
    told = [json.loads(path.read_text(encoding="utf-8")).get("step0_difference") for path in results]
    found = [difference for difference in told if isinstance(difference, int | float)]
    if found:
        Progress(1, []).message(f"{len(found)} trials at step 0: max|output difference| = {max(found):g}")


def _attempt(plan: Plan, folder: RunFolder, arm: Arm, seed: int, progress: Progress) -> bool:
    """Run one trial; a failure is put on record with its reason and does not stop the others."""
    record = folder.failure(arm.name, seed)
    try:
        if arm.name in plan.refused:
            raise TrainingError(plan.refused[arm.name])
        run_trial(plan, folder, arm, seed, progress)
    except Exception as error:  # whatever went wrong in one arm, the others go on
        trace = traceback.format_exc()
        write_json(record, {"arm": arm.name, "seed": seed, "reason": _reason(error), "traceback": trace})
        progress.message(f"{arm.name} seed {seed} failed: {_reason(error)}")
        return False
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    record.unlink(missing_ok=True)
    return True


def estimate(settings: Settings) -> str:
    """See `visattn.compare.estimate`."""
    with _undisturbed():
        check_out(settings.out)
        plan = make_plan(settings)
        folder = RunFolder(plan)
        finished = folder.finished()
        seeds = range(plan.settings.seeds)
        lines = [_Line.of(plan, arm, sum((arm.name, seed) not in finished for seed in seeds)) for arm in plan.arms]
    settings, data = plan.settings, plan.data
    head = [
        f"{data.description}: {len(data.train):,} to train on, {len(data.val):,} to measure on, "
        f"{len(data.classes)} classes",
        f"{settings.backbone} at {data.image_size[0]}x{data.image_size[1]}, blocks at "
        + ", ".join(map(str, plan.places)),
        f"{len(plan.arms)} arms x {settings.seeds} seeds x {settings.epochs} epochs on {settings.device}, "
        f"{settings.precision}, batches of {settings.batch_size}",
        "",
        f"{'arm':<20}{'trials left':>12}{'time':>10}{'memory':>12}{'disk':>12}",
    ]
    total = sum(line.seconds for line in lines)
    disk = sum(line.disk for line in lines)
    memory = max(line.memory for line in lines)
    foot = [
        "",
        f"In all about {duration(total)}, {memory:,.0f} MiB of tensors at a time and {disk / MIB:,.1f} MiB on disk, "
        "estimated from a few training steps. Nothing was trained or written.",
        f"To run it: {settings.command()}",
    ]
    return "\n".join([*head, *map(str, lines), *foot])


@dataclass(frozen=True)
class _Line:
    """One arm of the estimate: seconds, MiB and bytes for the trials left."""

    arm: str
    trials: int
    seconds: float = 0.0
    memory: float = 0.0
    disk: int = 0
    failed: str = ""

    @classmethod
    def of(cls, plan: Plan, arm: Arm, trials: int) -> _Line:
        if arm.name in plan.refused:
            return cls(arm.name, trials, failed=plan.refused[arm.name])
        try:
            costs, _, step = measure_costs(plan, arm)
        except Exception as error:  # as in `_measure_all`
            return cls(arm.name, trials, failed=_reason(error))
        data, settings = plan.data, plan.settings
        steps = (len(data.train) + VAL_STEP * len(data.val)) / settings.batch_size
        some = torch.arange(min(settings.batch_size, len(data.train)))
        data.train.batch(some, seed=0, epoch=0)  # the first batch of an epoch may draw all of it
        started = time.perf_counter()
        data.train.batch(some, seed=0, epoch=0)
        step += time.perf_counter() - started
        weights, _ = plan.build(arm, 0)
        size = sum(t.numel() * t.element_size() for t in weights.state_dict().values())
        seconds = trials * settings.epochs * steps * step
        return cls(arm.name, trials, seconds, costs.peak_memory_mib, trials * size)

    def __str__(self) -> str:
        if self.failed:
            return f"{self.arm:<20}  cannot be trained: {self.failed}"
        return (
            f"{self.arm:<20}{self.trials:>12}{duration(self.seconds):>10}{self.memory:>8,.0f} MiB"
            f"{self.disk / MIB:>8,.1f} MiB"
        )
