"""`visattn train`: one arm of a comparison trained in earnest, on several devices and past a kill."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from visattn.compare.arms import Arm, list_arms
from visattn.compare.folder import check_same, notes_on
from visattn.compare.plan import Plan, hardware, open_plan, versions
from visattn.compare.progress import REFRESH, duration
from visattn.compare.settings import STRATEGIES, Settings, command_line, known_mechanisms
from visattn.compare.weights import Description, save_network
from visattn.errors import UserError, one_line
from visattn.profile import count_parameters
from visattn.tasks import task_named
from visattn.training import Epoch, TrainingError, TrialSettings
from visattn.training import train as run_trial
from visattn.training.history import as_json, epochs_table
from visattn.training.launch import Launch, read_checkpoint
from visattn.writing import LOCK, PARTIAL, alone, write_json, write_text

__all__ = ["TrainSettings", "train"]

FORMAT = 1  # of train.json
RECORD, CHECKPOINT, EPOCHS, WEIGHTS = "train.json", "last.ckpt", "epochs.csv", "weights.safetensors"


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training.

    Attributes:
        trial: What it shares with a comparison; `mechanisms` and `seeds` of it are not looked at.
        mechanism: Name or alias of a block, or "plain".
        seed: Of the weights, the order of the images and dropout: the trial of that seed in a comparison.
        devices: Processes, one to a device.
        strategy: One of `STRATEGIES`.
        resume: Continue what is in the folder.
    """

    trial: Settings = field(default_factory=lambda: Settings(out=Path("visattn-train")))
    mechanism: str = "plain"
    seed: int = 0
    devices: int = 1
    strategy: str = "auto"
    resume: bool = False

    def command(self) -> str:
        """The command line that continues the training."""
        trial = self.trial
        return command_line(
            "train",
            task=trial.task,
            data=trial.data,
            backbone=trial.backbone,
            mechanism=self.mechanism,
            at=trial.chosen_at,
            output_stride=trial.output_stride,
            epochs=trial.epochs,
            batch_size=trial.batch_size,
            lr=trial.lr,
            seed=self.seed,
            device=trial.device,
            devices=self.devices,
            strategy=self.strategy,
            precision=trial.precision,
            out=trial.out,
            skip_unreadable=trial.skip_unreadable,
            resume=True,
        )


def train(settings: TrainSettings) -> Path | None:
    """Train one network and keep it, as `visattn train` does.

    The trial is that of the same arm and seed in `visattn compare`: on one CPU the weights are the same bits. After a
    kill the training goes on from its last whole epoch and, on the same CPU, ends with the bits it would have had.

    Args:
        settings: What to train, on what, and where to.

    Returns:
        The weights, for `visattn predict`; None in the processes that another one started to help it.

    Raises:
        UserError: A setting, the data or the folder is not fit; or the training came to no end worth keeping.
    """
    first = settings.devices == 1 or _rank() == 0
    _check_launch(settings)
    if first:
        _check_out(settings)
    keys = () if settings.mechanism == "plain" else known_mechanisms((settings.mechanism,), option="--mechanism")
    plan = open_plan(settings.trial)
    arm = list_arms(keys, plan.task)[len(keys)]  # plain comes first
    if len(plan.data.val) < settings.devices:
        raise UserError(f"--devices {settings.devices}: more than the {len(plan.data.val)} images to measure on.")
    settings = replace(settings, trial=plan.settings, mechanism=arm.name)
    try:
        net, _ = plan.build(arm, settings.seed)
    except ValueError as error:
        raise UserError(
            f"--mechanism {arm.name} does not fit {', '.join(plan.settings.at)}: {one_line(error)}"
        ) from error
    with alone(plan.settings.out, "visattn train") if first else contextlib.nullcontext():
        return _train(settings, plan, arm, net, first=first)


def _train(settings: TrainSettings, plan: Plan, arm: Arm, net: nn.Module, *, first: bool) -> Path | None:
    """Train in a folder of one's own; `first` is the process that writes."""
    out, description = plan.settings.out, plan.describe(arm)
    if first:
        _begin(out, _record(settings, plan, description, count_parameters(net)))
    before = _history(out, net)
    show = _Show(settings, before) if first else None
    trial = TrialSettings(
        plan.settings.epochs,
        plan.settings.batch_size,
        plan.settings.lr,
        settings.seed,
        device=plan.settings.device,
        precision=plan.settings.precision,
    )
    launch = Launch(settings.devices, settings.strategy, out / CHECKPOINT)
    on_batch, on_epoch = (show.batch, show.epoch) if show else (_nothing, _nothing)
    try:
        if len(before) < plan.settings.epochs:
            run_trial(net, plan.data, trial, on_batch=on_batch, on_epoch=on_epoch, launch=launch)
    except TrainingError as error:
        raise UserError(f"{error}. Use a smaller --lr, or --precision float32.") from error
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory on {plan.settings.device}. Use a smaller --batch-size.") from error
    except KeyboardInterrupt:
        if show:
            show.say(f"Stopped. To continue after the last whole epoch: {settings.command()}")
        raise
    return _keep(out, description, show.rows) if show else None


def _keep(out: Path, description: Description, rows: Sequence[Epoch]) -> Path:
    """Write the weights of a finished training, and what it came to into its record."""
    kept = read_checkpoint(out / CHECKPOINT)
    weights = {name.removeprefix("net."): t for name, t in kept["state_dict"].items() if name.startswith("net.")}
    save_network(weights, out / WEIGHTS, description)
    record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    record["results"] = as_json({**asdict(rows[-1]), "seconds": sum(row.seconds for row in rows)})
    write_json(out / RECORD, record)
    return out / WEIGHTS


def _nothing(*said: Any) -> None:
    """What all processes but the first one say."""


def _rank() -> int:
    """Number of this process among those that train together; the first one alone writes."""
    from lightning.pytorch.utilities import rank_zero_only

    return int(getattr(rank_zero_only, "rank", 0))


def _check_launch(settings: TrainSettings) -> None:
    """Raise `UserError` unless seed, devices and strategy go together."""
    devices, batch, device = settings.devices, settings.trial.batch_size, settings.trial.device
    if settings.seed < 0:
        raise UserError(f"--seed must be 0 or more, got {settings.seed}.")
    if devices < 1:
        raise UserError(f"--devices must be 1 or more, got {devices}.")
    if settings.strategy not in STRATEGIES:
        raise UserError(f"--strategy must be one of {', '.join(STRATEGIES)}, got {settings.strategy!r}.")
    cuda = torch.cuda.device_count() if device == "auto" or device.startswith("cuda") else 0
    if settings.strategy == "fsdp" and not cuda:
        raise UserError("--strategy fsdp needs CUDA devices. Use ddp on the CPU.")
    if devices == 1:
        return
    if ":" in device:
        raise UserError(f"--device {device} is one device, --devices {devices} are several. Use --device cuda.")
    if cuda and devices > cuda:
        raise UserError(f"--devices {devices}: torch finds {cuda} CUDA devices.")
    if batch % devices or batch < 2 * devices:
        raise UserError(
            f"--batch-size {batch} does not give {devices} devices equal shares of 2 images or more. "
            f"Use --batch-size {max(2, -(-batch // devices)) * devices}."
        )


def _check_out(settings: TrainSettings) -> None:
    """Raise `UserError` if the folder is not to be trained into; looks at names alone, so it can go first."""
    out = settings.trial.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file. Give a folder.")
    if not out.is_dir():
        return
    if (out / RECORD).exists():
        if not settings.resume:
            raise UserError(f"--out {out} holds a training. Add --resume to continue it, or use another --out.")
    elif any(path.name != LOCK and not path.name.startswith(PARTIAL) for path in out.iterdir()):
        raise UserError(f"--out {out}: not empty and no folder of visattn train. Use another --out.")


def _record(settings: TrainSettings, plan: Plan, description: Description, parameters: int) -> dict[str, Any]:
    """The contents of `train.json` before training."""
    shared = plan.record()
    identity = {k: v for k, v in plan.identity().items() if k not in ("mechanisms", "seeds", "device")}
    return {
        "format": FORMAT,
        "command": settings.command(),
        "identity": {**identity, "mechanism": settings.mechanism, "seed": settings.seed},
        "settings": {
            **{k: v for k, v in shared["settings"].items() if k not in ("mechanisms", "seeds")},
            "mechanism": settings.mechanism,
            "seed": settings.seed,
            "devices": settings.devices,
            "strategy": settings.strategy,
        },
        "versions": versions(),
        "hardware": hardware(plan.settings.device),
        "dataset": shared["dataset"],
        "places": shared["places"],
        "network": json.loads(description.text()),
        "parameters": parameters,
        "results": None,
        "notes": [],
    }


def _begin(out: Path, record: dict[str, Any]) -> None:
    """Write `train.json`, or check that the one there is of the same training and note what has changed around it.

    Raises:
        UserError: It is of another training, or cannot be written.
    """
    path = out / RECORD
    if not path.exists():
        write_json(path, record)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        known = before["format"] == FORMAT
        identity, notes = dict(before["identity"]), list(before["notes"])
        before |= {part: dict(before.get(part, {})) for part in ("settings", "versions", "hardware")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not readable as a record of visattn train. Use another --out.") from error
    if not known:
        raise UserError(f"{path} was written by another version of visattn train. Use another --out.")
    check_same(out, "training", identity, record["identity"])
    notes += notes_on({**before, "notes": notes}, record, ("settings", "versions", "hardware"))
    write_json(path, {**before, "notes": notes})


def _history(out: Path, net: nn.Module) -> list[Epoch]:
    """The epochs that the checkpoint of a folder has behind it.

    Raises:
        UserError: It is no checkpoint, or one of another network.
    """
    path = out / CHECKPOINT
    if not path.exists():
        return []
    kept = read_checkpoint(path)
    try:
        epochs = [Epoch(**row) for row in kept["history"]]
        shapes = {name: tensor.shape for name, tensor in kept["state_dict"].items() if name.startswith("net.")}
    except (TypeError, AttributeError):
        epochs, shapes = [], {}
    if not epochs or shapes != {f"net.{name}": tensor.shape for name, tensor in net.state_dict().items()}:
        raise UserError(f"{path} is no checkpoint of this training. Remove it to start from the beginning.")
    return epochs


class _Show:
    """What a training says on its way, and `epochs.csv`.

    Args:
        settings: The training.
        before: Epochs that it has behind it.
        stream: Where to; default stderr.
    """

    def __init__(self, settings: TrainSettings, before: list[Epoch], stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.path = settings.trial.out / EPOCHS
        self.score = task_named(settings.trial.task).score
        self.rows, self.before, self.epochs = list(before), len(before), settings.trial.epochs
        self.started, self.drawn, self.left = time.monotonic(), 0.0, ""
        if before:
            self.say(f"Continuing after epoch {len(before)} of {self.epochs}.")

    def batch(self, epoch: int, step: int, steps: int) -> None:
        """A step is done."""
        done = (epoch - 1 - self.before) * steps + step
        seconds = (time.monotonic() - self.started) / done * ((self.epochs - self.before) * steps - done)
        self.left = f"  {duration(seconds)} left"
        if self.live and time.monotonic() - self.drawn > REFRESH:
            self._draw(f"epoch {epoch}/{self.epochs}  step {step}/{steps}{self.left}")
            self.drawn = time.monotonic()

    def epoch(self, row: Epoch) -> None:
        """An epoch is done."""
        self.rows.append(row)
        write_text(self.path, epochs_table(self.rows))
        self.say(
            f"epoch {row.epoch}/{self.epochs}  loss {row.train_loss:.3f}  validation loss {row.val_loss:.3f}  "
            f"{self.score} {100 * row.val_score:.1f}%{self.left if row.epoch < self.epochs else ''}"
        )

    def say(self, text: str) -> None:
        """A line that stays."""
        self._draw("")
        print(text, file=self.stream, flush=True)

    def _draw(self, text: str) -> None:
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[2K{text[:width]}", end="", file=self.stream, flush=True)
