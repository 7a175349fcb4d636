"""How a training is spread over processes, and kept so that it can go on after a kill."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from visattn.errors import UserError, one_line
from visattn.writing import PARTIAL

__all__ = ["KeepLast", "Launch", "read_checkpoint"]


@dataclass(frozen=True)
class Launch:
    """Where a training runs and what is kept of it; the default is one process that keeps nothing.

    Attributes:
        devices: Processes of this machine, one to a device; each takes its share of every batch.
        strategy: As Lightning names it, such as "ddp".
        checkpoint: A file written whole at the end of every epoch, and read first where it is there already.
    """

    devices: int = 1
    strategy: str = "auto"
    checkpoint: Path | None = None


class KeepLast(Checkpoint):
    """Write the state of a training at the end of every epoch: whole or not at all, one file.

    Args:
        path: Where to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's own callback moves files over from a temporary folder, which a kill can cut short."""
        partial = self.path.with_name(f"{PARTIAL}{self.path.name}")
        try:
            trainer.save_checkpoint(partial)  # by all processes: each may hold a part of the weights
            if trainer.is_global_zero:
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(partial, self.path)
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror or one_line(error)})") from error
        trainer.strategy.barrier()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `KeepLast` wrote, tensors and plain values alone.

    Args:
        path: The file.

    Raises:
        UserError: It is no such file; nothing in it was executed.
    """
    remedy = "Remove it to start from the beginning."
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors and plain values, or is cut short. {remedy}") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"{path} is no whole checkpoint: {one_line(error)[:200]}. {remedy}") from error
    if not isinstance(content, dict) or not {"state_dict", "history", "epoch"} <= content.keys():
        raise UserError(f"{path} is no checkpoint of visattn train. {remedy}")
    return content
