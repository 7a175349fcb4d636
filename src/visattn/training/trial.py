"""A training by Lightning, silent and, on the CPU, a pure function of network, data and settings."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric

from visattn.data import Dataset, Split
from visattn.tasks import main_output, task_named
from visattn.training.launch import KeepLast, Launch
from visattn.training.scores import scores

__all__ = ["Epoch", "TrainingError", "TrialSettings", "parameter_groups", "train"]

LIGHTNINGS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}  # names of precisions
WEIGHT_DECAY = 0.05
WARM_UP = 0.1  # share of the steps in which the learning rate climbs
GATE_RATE = 10.0  # gates start at 0 and have to open within few epochs: they learn this many times as fast

_SHARDED = "_fsdp_wrapped_module."  # what FSDP puts into names

OnBatch = Callable[[int, int, int], None]
"""Called after every step with (epoch from 1, step, steps of the epoch)."""


class TrainingError(Exception):
    """A training that came to no end worth reporting; the message is the reason."""


@dataclass(frozen=True)
class TrialSettings:
    """How one trial trains.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images in a step.
        lr: Peak learning rate of AdamW.
        seed: Decides order and augmentation of the images, and dropout.
        device: "cpu", "cuda" or "cuda:<index>".
        precision: A key of `visattn.devices.PRECISIONS`.
    """

    epochs: int
    batch_size: int
    lr: float
    seed: int
    device: str = "cpu"
    precision: str = "float32"


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to.

    Attributes:
        epoch: Counts from 1.
        train_loss: Mean over the steps of the epoch, while it was trained.
        train_score: The task's main score from 0 to 1, while it was trained.
        val_loss: Mean over the validation images, or all their pixels that are not ignored, after the epoch.
        val_score: The main score on them.
        seconds: How long it took, validation included.
        details: Further scores on the validation images: numbers, or one number (or NaN) for each class.
    """

    epoch: int
    train_loss: float
    train_score: float
    val_loss: float
    val_score: float
    seconds: float
    details: dict[str, float | list[float]] = field(default_factory=dict)


def parameter_groups(net: nn.Module, lr: float, shapes: Mapping[str, torch.Size] | None = None) -> list[dict[str, Any]]:
    """AdamW's groups: weights decay, biases and norms do not, scalars (gates) do not and learn faster.

    Args:
        net: The network.
        lr: Peak learning rate.
        shapes: Of all parameters, where the network in hand may hold pieces of them.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": lr, "weight_decay": WEIGHT_DECAY},
        {"params": [], "lr": lr, "weight_decay": 0.0},
        {"params": [], "lr": lr * GATE_RATE, "weight_decay": 0.0},
    ]
    for name, parameter in net.named_parameters():
        shape = parameter.shape if shapes is None else shapes[name.replace(_SHARDED, "")]
        if parameter.requires_grad:
            groups[2 if shape.numel() == 1 else 0 if len(shape) > 1 else 1]["params"].append(parameter)
    return [group for group in groups if group["params"]]


class _Batches:
    """The batches of one epoch; the order of training is a function of seed and epoch alone.

    Several processes go through the same batches, each with its share of every one: as many images each in training,
    so that the mean of their gradients is the gradient of the batch (nearly, where shares differ in ignored pixels); in
    validation one more or less.
    """

    def __init__(
        self, split: Split, settings: TrialSettings, *, epoch: int, training: bool, rank: int = 0, ranks: int = 1
    ) -> None:
        self.split, self.seed, self.epoch = split, settings.seed, epoch
        count = len(split)
        if training:
            mix = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
            chunks = torch.split(torch.randperm(count, generator=mix), settings.batch_size)
            # BatchNorm wants batches alike: the rest of an epoch waits for the next one, which is mixed anew
            full = [chunk for chunk in chunks if len(chunk) == settings.batch_size]
            self.chunks = full or [chunk[: len(chunk) // ranks * ranks] for chunk in chunks]
        else:
            self.chunks = list(torch.split(torch.arange(count), settings.batch_size))
            if len(self.chunks) > 1 and len(self.chunks[-1]) < ranks:  # too few for all: they join the batch before
                self.chunks[-2:] = [torch.cat(self.chunks[-2:])]
        self.chunks = [chunk[rank::ranks] for chunk in self.chunks]

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chunk in self.chunks:
            where = {"seed": self.seed, "epoch": self.epoch}
            yield self.split.batch(chunk, **where), self.split.targets(chunk, **where)


class _Trial(LightningModule):
    """The loss of the task with AdamW, a short warm-up and a cosine to zero."""

    def __init__(self, net: nn.Module, data: Dataset, settings: TrialSettings, on_batch: OnBatch) -> None:
        super().__init__()
        self.net, self.data, self.settings, self.on_batch = net, data, settings, on_batch
        self.shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
        self.task = task_named(data.task)
        self.train_loss, self.val_loss = MeanMetric(), MeanMetric()
        self.train_scores = scores(self.task, len(data.classes))
        self.val_scores = scores(self.task, len(data.classes))
        self.measured: dict[str, Any] = {}
        self.history: list[Epoch] = []
        self.started = 0.0

    def train_dataloader(self) -> Any:
        return self._batches(self.data.train, epoch=self.current_epoch, training=True)

    def val_dataloader(self) -> Any:
        return self._batches(self.data.val, epoch=0, training=False)

    def _batches(self, split: Split, *, epoch: int, training: bool) -> _Batches:
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return _Batches(split, self.settings, epoch=epoch, training=training, rank=rank, ranks=ranks)

    def on_train_epoch_start(self) -> None:
        # dropout too is a function of seed and epoch, so that a training that goes on after a kill draws the same
        torch.manual_seed(self.settings.seed + 1_000_003 * self.current_epoch + 7_368_787 * self.global_rank)
        self.started = time.perf_counter()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, targets = batch
        output = self.net(images.contiguous(memory_format=torch.channels_last))
        loss = self.task.loss(output, targets)
        self.train_loss.update(loss.detach())
        self.train_scores.update(main_output(output).detach(), targets)
        self.on_batch(self.current_epoch + 1, index + 1, int(self.trainer.num_training_batches))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, targets = batch
        logits = main_output(self.net(images.contiguous(memory_format=torch.channels_last)))
        self.val_loss.update(self.task.loss(logits, targets), weight=self.task.counted(targets))
        self.val_scores.update(logits, targets)

    def on_validation_epoch_end(self) -> None:
        self.measured = {name: value.tolist() for name, value in self.val_scores.compute().items()}
        self.measured["loss"] = self.val_loss.compute().item()
        self.val_loss.reset()
        self.val_scores.reset()

    def on_train_epoch_end(self) -> None:
        number, loss = self.current_epoch + 1, self.train_loss.compute().item()
        measured = dict(self.measured)
        val_loss, val_score = measured.pop("loss"), measured.pop("score")
        if not (math.isfinite(loss) and math.isfinite(val_loss)):
            raise TrainingError(f"the loss is not finite in epoch {number}")
        score = self.train_scores.compute()["score"].item()
        self.train_loss.reset()
        self.train_scores.reset()
        seconds = time.perf_counter() - self.started
        self.history.append(Epoch(number, loss, score, val_loss, val_score, seconds, measured))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = [asdict(epoch) for epoch in self.history]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = [Epoch(**row) for row in checkpoint["history"]]

    def configure_optimizers(self) -> Any:
        settings = self.settings
        optimizer = torch.optim.AdamW(parameter_groups(self.net, settings.lr, self.shapes))
        steps = settings.epochs * len(_Batches(self.data.train, settings, epoch=0, training=True))
        warm_up = max(1, round(WARM_UP * steps))

        def factor(step: int) -> float:
            if step < warm_up:
                return (step + 1) / warm_up
            return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning says nothing while the context lasts; its errors are exceptions all the same."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(lightning|torchmetrics)\b")
            # Lightning's advice on loaders and its calls of names that torch has since renamed, reported as torch's
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\b")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\b")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Same arguments, same bits, on the CPU; CUDA lacks deterministic kernels for some layers."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.use_deterministic_algorithms(device.type == "cpu")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def train(
    net: nn.Module,
    data: Dataset,
    settings: TrialSettings,
    *,
    on_batch: OnBatch = lambda epoch, step, steps: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    launch: Launch = Launch(),  # noqa: B008  # it is frozen
) -> list[Epoch]:
    """Train a network in place.

    On the CPU the result depends on nothing but the arguments (and the number of threads): not on what ran before, not
    on the global random state, which is left as it was.

    Args:
        net: (B, C, H, W) to the logits of the task: (B, K), or (B, K, H, W) for segmentation; in training it may give
            several, the main ones first, whose losses are summed.
        data: What to train and measure on.
        settings: How.
        on_batch: Called after every step.
        on_epoch: Called after every epoch.
        launch: Over how many processes, and whether a checkpoint is kept; a training whose checkpoint is there goes
            on from it, and on the CPU ends with the bits it would have had.

    Returns:
        One record per epoch, those from before the checkpoint included.

    Raises:
        TrainingError: The loss became infinite or NaN.
    """
    device = torch.device(settings.device)
    net.train()  # Lightning keeps the mode it finds
    net.to(memory_format=torch.channels_last)  # convolutions train twice as fast on a CPU
    module = _Trial(net, data, settings, on_batch)
    report = module.on_train_epoch_end

    def finished() -> None:
        report()
        on_epoch(module.history[-1])

    module.on_train_epoch_end = finished  # type: ignore[method-assign]
    with _quiet(), _deterministic(device):
        torch.manual_seed(settings.seed)
        trainer = Trainer(
            accelerator=device.type,
            devices=launch.devices if device.type == "cpu" or launch.devices > 1 else [device.index or 0],
            strategy=launch.strategy,
            precision=LIGHTNINGS[settings.precision],  # type: ignore[arg-type]
            max_epochs=settings.epochs,
            logger=False,
            enable_checkpointing=launch.checkpoint is not None,
            callbacks=[] if launch.checkpoint is None else [KeepLast(launch.checkpoint)],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=1,
            # one process, also inside a cluster's job; several as Lightning finds them or starts them
            plugins=[LightningEnvironment()] if launch.devices == 1 else None,
        )
        try:
            known = launch.checkpoint is not None and launch.checkpoint.exists()
            trainer.fit(module, ckpt_path=launch.checkpoint if known else None)
        except SystemExit as stop:
            if not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning turned Ctrl-C off and into an exit
            raise KeyboardInterrupt from None
    return module.history
