"""Whole networks against recorded cases, their weights going the way that a user's file goes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visattn.checkpoints import build, load_checkpoint
from visattn.checkpoints.layouts import recognise
from visattn.errors import require
from visattn.replacement import replace
from visattn.testing.tolerance import FLOAT64_TOLERANCE, relative_error
from visattn.verify.cases import Case
from visattn.verify.check import Result

__all__ = ["check_network", "is_network"]

_EXTRA = {"extra": "compare", "purpose": "visattn verify --networks"}


def _models() -> Any:
    return require("visattn.models", **_EXTRA)


def _sknet_unit(arguments: Mapping[str, Any]) -> nn.Module:
    """A unit of our SKNets: timm's bottleneck, whose 3x3 convolution a selective kernel stands for."""
    resnet = require("timm.models.resnet", **_EXTRA)
    width, out, stride = (arguments[name] for name in ("in_features", "out_features", "stride"))
    planes = out // resnet.Bottleneck.expansion
    shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    unit: nn.Module = resnet.Bottleneck(
        width,
        planes,
        stride=stride,
        downsample=None if width == out else shortcut,
        cardinality=arguments["G"],
        base_width=math.ceil(64 * arguments["mid_features"] / arguments["G"] / planes),
    )
    kernels = tuple(3 + 2 * i for i in range(arguments["M"]))
    reduction, least = arguments["r"], arguments["L"]
    replace(unit, "selective_kernel", at="conv2", kernel_size=kernels, reduction=reduction, min_hidden=least)
    return unit


def _small_unit(arguments: Mapping[str, Any]) -> nn.Module:
    unit: nn.Module = _models().SelectiveKernelUnit(
        arguments["in_features"],
        arguments["out_features"],
        stride=arguments["stride"],
        kernel_size=tuple(3 + 2 * i for i in range(arguments["M"])),
        groups=arguments["G"],
        reduction=arguments["r"],
        min_hidden=arguments["L"],
    )
    return unit


_BUILDERS: Mapping[tuple[str, str], Callable[[Mapping[str, Any]], nn.Module]] = {
    ("MenghaoGuo/EANet", "EANet"): lambda a: getattr(_models(), f"eanet{a['n_layers']}")(num_classes=a["n_classes"]),
    ("junfu1115/DANet", "DANet"): lambda a: getattr(_models(), a["backbone"].replace("resnet", "danet"))(
        num_classes=a["nclass"]
    ),
    ("developer0hye/SKNet-PyTorch", "SKNet26"): lambda a: _models().sknet26(num_classes=a["nums_class"]),
    ("developer0hye/SKNet-PyTorch", "SKUnit"): _sknet_unit,
    ("pppLang/SKNet", "SKUnit"): _small_unit,
    ("murufeng/EPSANet", "epsanet50"): lambda a: _models().epsanet50(),
    ("murufeng/EPSANet", "EPSABlock"): lambda a: build("EPSABlock", **a),
}


def is_network(case: Case) -> bool:
    """Whether a case recorded a network, or a unit of one, that is here."""
    return (case.source["repo"], case.source["class"]) in _BUILDERS


def check_network(case: Case, *, device: torch.device, debug: bool = False) -> Result:
    """Compare a network with everything that a case recorded, in float64.

    The recorded state is written to a file under the authors' names, as their training script would leave it, and read
    by `visattn.load_checkpoint`.

    Args:
        case: The case.
        device: Where to run.
        debug: Let an exception through instead of making it the reason of a failure.
    """
    result = Result(case)
    try:
        ours = _run(case, device)
        for name, array in case.expected.items():
            expected = torch.from_numpy(array)
            if name not in ours:
                result.fail(f"{name} is recorded, and nothing here stands for it")
                continue
            actual = ours[name].reshape(-1)[:: case.step(name)]
            error = relative_error(actual, expected.reshape(-1))
            result.errors[name] = result.float64_errors[name] = error
            if not error <= FLOAT64_TOLERANCE:
                result.fail(f"{name}: relative error {error:.2g}")
    except Exception as error:
        if debug:
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        result.fail(kind + " ".join(str(error).split()))
    return result


def _run(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Everything that the recording may have, under its names."""
    state = {name: torch.from_numpy(array) for name, array in case.state.items()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        net = _BUILDERS[case.source["repo"], case.source["class"]](case.constructor).to(device, torch.float64)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{case.name}.pth")
        torch.save({"epoch": 1, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, file)
        load_checkpoint(net, file)
    net.train(case.training)
    for module in net.modules():  # recorded without dropout
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0

    (name, array), *_ = case.inputs.items()
    x = torch.from_numpy(array).to(device).requires_grad_(bool(case.cotangents))
    forward: Callable[[Tensor], Any] = getattr(net, "outputs", net)  # all of a segmentation network, whatever the mode
    with torch.set_grad_enabled(bool(case.cotangents)):
        outputs = forward(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = dict(zip(case.output_names, outputs, strict=True))
    if case.cotangents:
        cotangents = [torch.from_numpy(case.cotangents[name]).to(device) for name in case.output_names]
        torch.autograd.backward(list(outputs), cotangents)
        found[f"grad_{name}"] = x.grad
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    for theirs, mine in _names(state).items():
        if mine in buffers:
            found[f"buffer:{theirs}"] = buffers[mine]
        elif mine in parameters and parameters[mine].grad is not None:
            found[f"grad:{theirs}"] = parameters[mine].grad
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def _names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Our name for each of theirs."""
    layout = recognise(state)
    if layout is None:
        return {name: name for name in state}
    return {name: mine for name, tensor in state.items() for mine in layout.to_ours({name: tensor})[0]}
