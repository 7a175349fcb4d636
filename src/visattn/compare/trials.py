"""One arm and one seed: train, measure, save."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from visattn.capture import capture
from visattn.compare.arms import Arm
from visattn.compare.folder import RunFolder
from visattn.compare.plan import Plan
from visattn.compare.progress import Progress
from visattn.compare.weights import save_network
from visattn.devices import PRECISIONS
from visattn.profile import Costs, profile
from visattn.surgery import Place
from visattn.tasks import main_output
from visattn.training import Epoch, TrainingError, TrialSettings, parameter_groups, train
from visattn.training.history import as_json, epochs_table
from visattn.writing import write_json, write_text

__all__ = ["attended", "measure_costs", "run_trial", "step0_difference"]

EXAMPLES = 6  # validation images shown with what an arm attended to
CHECKED = 32  # validation images on which all arms must agree before training
QUERY = (0.5, 0.5)


def _images(plan: Plan, count: int) -> Tensor:
    indices = torch.arange(min(count, len(plan.data.val)))
    images = plan.data.val.batch(indices, seed=0, epoch=0)
    return images.to(plan.settings.device).contiguous(memory_format=torch.channels_last)


def _placed(plan: Plan, net: nn.Module) -> nn.Module:
    placed: nn.Module = net.to(device=plan.settings.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return placed


def step0_difference(plan: Plan, net: nn.Module, seed: int) -> float:
    """Largest output difference between an untrained arm and the plain backbone of its seed."""
    images = _images(plan, CHECKED)
    plain = _placed(plan, plan.build(plan.arms[0], seed)[0])
    with torch.no_grad():
        difference: Tensor = _placed(plan, net).eval()(images) - plain.eval()(images)
    return difference.abs().max().item()


def run_trial(plan: Plan, folder: RunFolder, arm: Arm, seed: int, progress: Progress) -> None:
    """Train an arm and save the trial whole.

    Raises:
        TrainingError: The arm is not the plain backbone at step 0, or its loss became infinite or NaN.
        ValueError: The block does not fit.
    """
    started = time.perf_counter()
    settings = plan.settings
    net, record = plan.build(arm, seed)
    difference = step0_difference(plan, net, seed)
    if difference != 0:
        raise TrainingError(f"at step 0 its output differs from the plain backbone's by {difference:g}")

    def on_epoch(epoch: Epoch) -> None:
        progress.epoch(epoch.epoch, epoch.val_score, epoch.seconds)

    trial = TrialSettings(
        settings.epochs, settings.batch_size, settings.lr, seed, device=settings.device, precision=settings.precision
    )
    epochs = train(net, plan.data, trial, on_batch=progress.batch, on_epoch=on_epoch)
    marks = {"run": plan.fingerprint(), "arm": arm.name, "seed": seed}
    with folder.new_trial(arm.name, seed) as path:
        rows = [asdict(epoch) for epoch in epochs]
        details = [row.pop("details") for row in rows]
        write_text(path / "epochs.csv", epochs_table(epochs))
        text_marks = {key: str(value) for key, value in marks.items()}
        save_network(net.state_dict(), path / "weights.safetensors", plan.describe(arm), text_marks)
        if seed == 0:
            np.savez_compressed(path / "examples.npz", **attended(plan, arm, net))
        result = {
            **marks,
            "score": epochs[-1].val_score,
            "details": as_json(details[-1]),
            "seconds": time.perf_counter() - started,
            "epochs": rows,
            "step0_difference": difference,
            "gates": record.gates() if record else {},
        }
        write_json(path / "result.json", result)


def attended(plan: Plan, arm: Arm, net: nn.Module) -> dict[str, Any]:
    """Some validation images, what a network says they are, and what its blocks attended to, reduced for a picture."""
    count = len(plan.data.val)
    indices = torch.linspace(0, count - 1, min(EXAMPLES, count)).round().long()
    where = {"seed": 0, "epoch": 0}
    images = plan.data.val.batch(indices, **where).to(plan.settings.device)
    net = _placed(plan, net).eval()
    maps: dict[str, dict[str, Tensor]] = {}
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if arm.kind == "mechanism":
            maps = stack.enter_context(capture(net, queries=[QUERY]))
        logits = main_output(net(images))
    found: dict[str, Any] = {
        "images": plan.data.val.pictures(indices).numpy(),
        "labels": _answers(plan.data.val.targets(indices, **where)),
        "predictions": _answers(logits.argmax(1).cpu()),
        "query": np.array(QUERY),
    }
    for module, kinds in maps.items():
        place = next(place for place in plan.places if module.startswith(f"{place.name}.block"))
        for kind, tensor in kinds.items():
            found[f"{place.name}|{kind}"] = _reduced(kind, tensor.float().cpu(), place).numpy()
    return found


def _answers(classes: Tensor) -> npt.NDArray[Any]:
    """Classes of images as they are, classes of pixels in a byte each."""
    return (classes if classes.ndim == 1 else classes.to(torch.uint8)).numpy()


def _reduced(kind: str, found: Tensor, place: Place) -> Tensor:
    """What is shown of a captured map."""
    if kind == "position":  # (B, heads, 1, H, W) or (B, heads, 1, N): mean over heads
        return _grid(found[:, :, 0].mean(1), place)
    if kind == "slot":  # (B, S, H, W) or (B, S, N): of each image the slot that differs most from place to place
        chosen = found.flatten(2).var(dim=2).argmax(1)
        return _grid(found[torch.arange(len(found)), chosen], place)
    return found.mean(2) if kind == "branch" else found


def _grid(found: Tensor, place: Place) -> Tensor:
    """(B, H, W) as it is; of (B, N) tokens the square grid of patches at the end."""
    if found.ndim == 3:
        return found
    side = math.isqrt(found.shape[1])
    return found[:, found.shape[1] - side * side :].reshape(len(found), side, side)


def measure_costs(plan: Plan, arm: Arm) -> tuple[Costs, float, float]:
    """Costs of an arm with the weights of seed 0, its difference to plain at step 0, and seconds of a training step."""
    net, _ = plan.build(arm, 0)
    difference = step0_difference(plan, net, 0)
    settings = plan.settings
    optimizer = torch.optim.AdamW(parameter_groups(net, settings.lr))
    count = min(settings.batch_size, len(plan.data.train))
    images = plan.data.train.batch(torch.arange(count), seed=0, epoch=0)
    images = images.to(settings.device).contiguous(memory_format=torch.channels_last)
    targets = plan.data.train.targets(torch.arange(count), seed=0, epoch=0).to(settings.device)
    kind = torch.device(settings.device).type
    dtype = PRECISIONS[settings.precision]

    def step() -> None:
        net.train()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(kind, dtype=dtype, enabled=dtype is not torch.float32):
            loss = plan.task.loss(net(images), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if kind == "cuda":
            torch.cuda.synchronize()

    costs = profile(net, _images(plan, 1), optimizer=optimizer, step=step)
    start = time.perf_counter()
    for _ in range(3):
        step()
    return costs, difference, (time.perf_counter() - start) / 3
