"""Weights that say which network they belong to and what it was shown, so that their file is enough to run it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from visattn.compare.arms import build_arm, build_backbone, list_arms
from visattn.data import Dataset
from visattn.data.pictures import BILINEAR, square
from visattn.errors import UserError, one_line, require
from visattn.registry import MECHANISMS
from visattn.tasks import IGNORED, SEGMENTATION, TASKS
from visattn.writing import whole

__all__ = ["FORMAT", "Description", "load_network", "save_network"]

FORMAT = 1  # of the description
KEY = "visattn"  # its name among the metadata
LARGEST = 4096  # side of images; more is no network's
SMALL = 100_000_000  # parameters that are built whatever the size of their file
LONGEST = 4  # a picture more than this many times as long as wide is squeezed to that


@dataclass(frozen=True)
class Description:
    """A network and what it was trained on.

    Attributes:
        task: "classification" or "segmentation".
        backbone: A name of timm.
        output_stride: Of its features under a segmentation head; None for classification.
        arm: "plain", a mechanism, or "control".
        at: Places of the blocks.
        control: Hidden channels of the control, see `build_arm`.
        classes: Names of the classes.
        image_size: (H, W) of the images.
        side: What the shorter side of a picture is brought to, before its centre is cut out.
        channels: 1 (grey) or 3 (RGB).
        mean: Of the pixels from 0 to 1, by channel; it is subtracted.
        std: What they are divided by then.
    """

    task: str
    backbone: str
    output_stride: int | None
    arm: str
    at: tuple[str, ...]
    control: tuple[int, ...]
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    side: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(
        cls,
        data: Dataset,
        *,
        backbone: str,
        output_stride: int | None,
        arm: str,
        at: tuple[str, ...],
        control: tuple[int, ...],
    ) -> Description:
        """Describe a network on a data set."""
        return cls(
            task=data.task,
            backbone=backbone,
            output_stride=output_stride,
            arm=arm,
            at=at,
            control=control if arm == "control" else (),
            classes=data.classes,
            image_size=data.image_size,
            side=data.side,
            channels=data.channels,
            mean=data.mean,
            std=data.std,
        )

    def text(self) -> str:
        """The description as JSON, with the version of its form."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def parse(cls, text: str) -> Description:
        """Read what `text` wrote.

        Raises:
            ValueError: It is no such description, or a newer one; the message says what is wrong.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("its description is no JSON") from None
        form = content.get("format") if isinstance(content, dict) else None
        if isinstance(form, int) and form > FORMAT:
            raise ValueError(f"its description has format {form}, this visattn reads up to {FORMAT}: update visattn")
        if form != FORMAT:
            raise ValueError("its description is not of visattn")
        found = {name: _read(content, name) for name in (field.name for field in dataclasses.fields(cls))}
        described = cls(**found)
        sizes, channels = (*described.image_size, described.side), described.channels
        pixels, places = described.task == SEGMENTATION.name, len(described.at)
        fits = {
            "task": described.task in TASKS,
            "output_stride": described.output_stride in ((1, 2, 4, 8, 16, 32, 64) if pixels else (None,)),
            "arm": described.arm in ("plain", "control", *MECHANISMS),
            "image_size": len(described.image_size) == 2 and all(1 <= size <= LARGEST for size in sizes[:2]),
            "side": max(sizes[:2], default=0) <= described.side <= 2 * LARGEST,
            "channels": channels in (1, 3),
            "classes": len(described.classes) >= 2 and (not pixels or len(described.classes) <= IGNORED),
            "mean": len(described.mean) == channels,
            "std": len(described.std) == channels and min(described.std, default=0) > 0,
            "at": described.arm == "plain" or bool(described.at),
            "control": len(described.control) == ((1 if pixels else places) if described.arm == "control" else 0)
            and min(described.control, default=1) >= 1,
        }
        for name, holds in fits.items():
            if not holds:
                raise ValueError(f"its description has {name} {json.dumps(content[name])[:80]}, which no network has")
        return described

    def build(self) -> nn.Module:
        """The network, with weights of no meaning.

        Raises:
            ValueError: It cannot be built here.
        """
        timm = require("timm", extra="compare", purpose="visattn predict")
        import visattn.models  # noqa: F401  # it registers the papers' networks with timm

        if not timm.is_model(self.backbone):
            raise ValueError(f"timm {timm.__version__} has no model {self.backbone!r}: install another timm")
        arm = next(arm for arm in list_arms(MECHANISMS, TASKS[self.task]) if arm.name == self.arm)
        try:
            net = build_backbone(
                self.backbone,
                classes=len(self.classes),
                channels=self.channels,
                image_size=self.image_size,
                seed=0,
                output_stride=self.output_stride,
            )
            sample = torch.zeros(2, self.channels, *self.image_size)
            build_arm(net, arm, at=self.at, sample=sample, seed=0, control=self.control)
        except (UserError, ValueError) as error:
            raise ValueError(f"its network cannot be built: {one_line(error)[:300]}") from error
        return net

    def central(self, picture: Any) -> Tensor:
        """The centre of a PIL picture as in validation: (C, H, W), normalised."""
        height, width = self.image_size
        pixels = square(picture.convert(self._mode), self.side)
        top, left = (self.side - height) // 2, (self.side - width) // 2
        return self._normalised(pixels[:, top : top + height, left : left + width])

    def whole(self, picture: Any) -> Tensor:
        """All of a PIL picture at the scale of validation: (C, h, w), normalised.

        Its shorter side becomes `side` and its shape stays, up to 4 to 1; a backbone of a fixed size gets that size.
        """
        models = require("timm.models", extra="compare", purpose="visattn predict")
        height, width = self.image_size
        if not models.get_pretrained_cfg(self.backbone).fixed_input_size:
            scale = self.side / min(picture.size)
            width, height = (round(min(scale * length, LONGEST * self.side)) for length in picture.size)
        functional = require("torchvision.transforms.v2.functional", extra="compare", purpose="reading images")
        return self._normalised(
            functional.pil_to_tensor(picture.convert(self._mode).resize((width, height), resample=BILINEAR))
        )

    @property
    def _mode(self) -> str:
        return "L" if self.channels == 1 else "RGB"

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean, std = torch.tensor(self.mean).view(-1, 1, 1), torch.tensor(self.std).view(-1, 1, 1)
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


_KINDS: dict[str, type] = {"str": str, "int": int, "float": float}


def _read(content: Mapping[str, Any], name: str) -> Any:
    """One entry of a description, of the type that its attribute has."""
    hint = str(Description.__annotations__[name])
    many = hint.startswith("tuple")
    if name in content and content[name] is None and hint.endswith("None"):
        return None
    kind = next(kind for word, kind in _KINDS.items() if word in hint)
    value = content.get(name)
    values = value if isinstance(value, list) else [value]
    whole = all(isinstance(v, kind) and not isinstance(v, bool) for v in values)
    if not whole or many != isinstance(value, list) or (kind is float and not all(map(math.isfinite, values))):
        raise ValueError(f"its description has {name} {json.dumps(value)[:80]}, which no network has")
    return tuple(values) if many else value


def save_network(
    weights: Mapping[str, Tensor], path: Path, description: Description, marks: Mapping[str, str] | None = None
) -> None:
    """Write weights with the description of their network, whole or not at all.

    Args:
        weights: A state dict.
        path: Where to.
        description: Of the network.
        marks: Further metadata.

    Raises:
        UserError: They cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    try:
        with whole(path) as partial:
            save_file(tensors, partial, {**(marks or {}), KEY: description.text()})
    except SafetensorError as error:
        raise UserError(f"cannot write {path} ({one_line(error)[:200]})") from error


def load_network(path: Path) -> tuple[nn.Module, Description]:
    """Build the network that weights describe, and load them.

    Args:
        path: A file of `visattn train`, or of a trial of `visattn compare`.

    Returns:
        The network on the CPU, and its description.

    Raises:
        UserError: The file is not whole, does not describe its network, or does not fit it.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file.")
    if path.is_dir():
        raise UserError(f"{path}: a folder. Give a file such as weights.safetensors.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise UserError(
                    f"{path} does not say which network it is for. Give weights of visattn train or of visattn compare."
                )
            description = Description.parse(text)
            _check_size(description, path)
            net = description.build()
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file: {one_line(error)[:200]}.") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {one_line(error)}.") from error
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not have the weights of its network: {one_line(error)[:300]}.") from error
    broken = [name for name, tensor in net.state_dict().items() if not bool(tensor.isfinite().all())]
    if broken:
        raise UserError(f"{path} has infinite or NaN weights ({len(broken)} tensors, the first {broken[0]}).")
    return net, description


def _check_size(description: Description, path: Path) -> None:
    """Raise `ValueError` where a network would take more memory than its weights do in the file.

    The file says what is built, so it must not be able to fill the memory with a few words.
    """
    timm = require("timm", extra="compare", purpose="visattn predict")
    import visattn.models  # noqa: F401  # it registers the papers' networks with timm

    size = path.stat().st_size
    large = sum(description.control) > size
    if timm.is_model(description.backbone):
        with contextlib.suppress(Exception), torch.device("meta"):  # what cannot be built so is built in full
            weights = timm.create_model(description.backbone, num_classes=0).parameters()
            large = large or sum(weight.numel() for weight in weights) > max(size, SMALL)
    if large:
        raise ValueError("its description is of a network larger than the file")
