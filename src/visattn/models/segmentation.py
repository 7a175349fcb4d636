"""DANet and EANet, and a plain FCN beside them: a backbone of timm that keeps its resolution, and a head.

Papers: Dual Attention Network for Scene Segmentation, https://arxiv.org/abs/1809.02983
Beyond Self-attention: External Attention using Two Linear Layers, https://arxiv.org/abs/2105.02358
Fully Convolutional Networks for Semantic Segmentation, https://arxiv.org/abs/1411.4038
Authors' code: https://github.com/junfu1115/DANet at b0a0fa008148f102321cdaa7ca38fb0ddd0239d1
(encoding/models/sseg/danet.py), https://github.com/MenghaoGuo/EANet at 59c03cb0a286d3a29a797f8ea07fb89d7af56b60
(model_torch.py)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.blocks import DualAttentionHead, ExternalAttention2d
from visattn.errors import check, one_line, require

__all__ = ["Segmenter", "danet", "danet50", "danet101", "eanet", "eanet50", "eanet101", "fcn"]


class Segmenter(nn.Module):
    """A backbone, a head on its deepest features, and the head's logits resized to the input.

    Args:
        backbone: Its last output counts: a network of timm with `features_only=True`.
        head: (B, C, h, w) to logits (B, num_classes, h, w), or to a tuple of them, the main ones first.

    Shape:
        Input (B, in_chans, H, W), output (B, num_classes, H, W), bilinear with aligned corners as both papers resize;
        of a head with several outputs all of them in training mode, the first in eval mode.

    Attributes:
        num_classes: Classes a pixel can have.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone, self.head, self.num_classes = backbone, head, num_classes

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """All logits of the head, each (B, num_classes, H, W), whatever the mode."""
        features = self.backbone(x)[-1]
        if _channels_last(self.backbone):
            features = features.permute(0, 3, 1, 2)
        logits = self.head(features)
        logits = logits if isinstance(logits, tuple) else (logits,)
        return tuple(F.interpolate(one, size=x.shape[2:], mode="bilinear", align_corners=True) for one in logits)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(B, in_chans, H, W) to (B, num_classes, H, W), or a tuple of several in training mode."""
        outputs = self.outputs(x)
        return outputs if self.training and len(outputs) > 1 else outputs[0]


def _channels_last(backbone: nn.Module) -> bool:
    form = getattr(backbone, "output_fmt", "NCHW")
    return str(getattr(form, "value", form)) == "NHWC"


def _backbone(
    owner: str, name: str, in_chans: int, output_stride: int, options: dict[str, Any]
) -> tuple[nn.Module, int]:
    """A network of timm that gives its deepest features of that stride, and their channels."""
    timm = require("timm", extra="compare", purpose=f"visattn.models.{owner}")
    check(output_stride >= 1, owner, "output_stride must be >= 1", output_stride=output_stride)
    common = {**options, "features_only": True, "in_chans": in_chans}
    failure: Exception | None = None
    for more in ({"output_stride": output_stride}, {}):  # where it cannot dilate, an earlier stage has the stride
        try:
            with torch.device("meta"):  # shapes alone
                info = timm.create_model(name, **common, **more).feature_info
            break
        except Exception as error:  # timm's networks refuse an argument each in its own way
            failure = error
    else:
        raise ValueError(
            f"{owner}: timm builds no features from backbone={name!r}: {one_line(failure or ValueError())[:200]}"
        ) from failure
    strides = info.reduction()
    fitting = [index for index, stride in enumerate(strides) if stride <= output_stride]
    check(
        bool(fitting),
        owner,
        f"backbone {name!r} has features of strides {', '.join(map(str, strides))} alone",
        remedy=f"Use output_stride={min(strides)} or more.",
        output_stride=output_stride,
    )
    index = fitting[-1]
    backbone: nn.Module = timm.create_model(name, **common, **more, out_indices=(info.out_indices[index],))
    return backbone, int(info.channels()[index])


def _dilate(owner: str, backbone: nn.Module, dilations: Sequence[int] | None) -> None:
    """Give the 3x3 convolutions in the units of a ResNet's last stage other dilations.

    Raises:
        ValueError: It is no ResNet, or one with another number of units.
    """
    if dilations is None:
        return
    units = [getattr(unit, "conv2", None) for unit in getattr(backbone, "layer4", ())]
    convolutions = [unit for unit in units if isinstance(unit, nn.Conv2d)]
    check(
        len(convolutions) == len(units) == len(dilations) > 0,
        owner,
        "last_dilations needs a ResNet and a number for each unit of its last stage",
        remedy="Use last_dilations=None.",
        last_dilations=tuple(dilations),
        units=len(units),
    )
    check(min(dilations) >= 1, owner, "last_dilations must be >= 1", last_dilations=tuple(dilations))
    for conv, dilation in zip(convolutions, dilations, strict=True):
        conv.dilation = conv.padding = (dilation, dilation)


def _conv_norm_act(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            bn=nn.BatchNorm2d(out_channels),
            act=nn.ReLU(),
        )
    )


def fcn(
    backbone: str = "resnet50",
    *,
    num_classes: int = 21,
    in_chans: int = 3,
    output_stride: int = 8,
    channels: int | None = None,
    drop_rate: float = 0.1,
    **options: Any,
) -> Segmenter:
    """A plain head, conv 3x3, BatchNorm, ReLU, dropout, 1x1 classifier: what attention is to be compared with.

    `visattn.insert(net, "dual", at="head.conv")` puts a mechanism before its classifier.

    Args:
        backbone: A network of timm.
        num_classes: Classes a pixel can have.
        in_chans: Channels of the images.
        output_stride: Of the features: the backbone dilates its last stages, or, where it cannot, its deepest stage of
            at most that stride is used.
        channels: Of the head; default a quarter of the backbone's.
        drop_rate: Dropout of whole channels before the classifier.
        options: Of the backbone, for timm.

    Raises:
        ValueError: timm has no such network, or it has no features of that stride.

    Example:
        >>> fcn("resnet18", num_classes=5)(torch.randn(2, 3, 33, 40)).shape
        torch.Size([2, 5, 33, 40])
    """
    net, width = _backbone("fcn", backbone, in_chans, output_stride, options)
    channels = max(1, width // 4) if channels is None else channels
    head = nn.Sequential(
        OrderedDict(
            conv=_conv_norm_act(width, channels),
            drop=nn.Dropout2d(drop_rate),
            classifier=nn.Conv2d(channels, num_classes, 1),
        )
    )
    return Segmenter(net, head, num_classes)


def danet(
    backbone: str = "resnet50s",
    *,
    num_classes: int = 21,
    in_chans: int = 3,
    output_stride: int = 8,
    drop_rate: float = 0.1,
    last_dilations: Sequence[int] | None = None,
    **options: Any,
) -> Segmenter:
    """DANet: position and channel attention in parallel, three outputs in training, their sum's in inference.

    Args:
        backbone: A network of timm; the authors' have a deep stem (`resnet50s`, `resnet101s`).
        num_classes: Classes a pixel can have.
        in_chans: Channels of the images.
        output_stride: See `fcn`.
        drop_rate: Dropout of whole channels before each classifier.
        last_dilations: Of the units in a ResNet's last stage, in place of timm's. The file that the authors published,
            for Cityscapes, needs `danet("resnet101", num_classes=19, last_dilations=(4, 8, 16))`.
        options: Of the backbone, for timm.

    Raises:
        ValueError: timm has no such network, it has no features of that stride, or last_dilations does not fit it.

    Differs from the authors' code:
        In eval mode the first output alone is returned (`outputs` gives all three), and any backbone will do.

    References:
        https://arxiv.org/abs/1809.02983; `visattn.load_checkpoint` loads the authors' files and MMSegmentation's.

    Example:
        >>> net = danet("resnet18", num_classes=5)
        >>> [out.shape[1] for out in net(torch.randn(2, 3, 33, 40))], net.eval()(torch.randn(1, 3, 33, 40)).shape[1]
        ([5, 5, 5], 5)
    """
    net, width = _backbone("danet", backbone, in_chans, output_stride, options)
    _dilate("danet", net, last_dilations)
    return Segmenter(net, DualAttentionHead(width, num_classes, drop=drop_rate), num_classes)


def danet50(**options: Any) -> Segmenter:
    """DANet on ResNet-50 with a deep stem. Arguments as of `danet`."""
    return danet("resnet50s", **options)


def danet101(**options: Any) -> Segmenter:
    """DANet on ResNet-101 with a deep stem. Arguments as of `danet`."""
    return danet("resnet101s", **options)


def eanet(
    backbone: str = "resnet50s",
    *,
    num_classes: int = 21,
    in_chans: int = 3,
    output_stride: int = 8,
    drop_rate: float = 0.1,
    last_dilations: Sequence[int] | None = None,
    **options: Any,
) -> Segmenter:
    """EANet for segmentation: conv 3x3, external attention, conv 3x3, classifier.

    Args:
        backbone: A network of timm; the authors' have a deep stem (`resnet50s`, `resnet101s`).
        num_classes: Classes a pixel can have.
        in_chans: Channels of the images.
        output_stride: See `fcn`.
        drop_rate: Dropout of whole channels before the classifier.
        last_dilations: Of the units in a ResNet's last stage, in place of timm's; `eanet50` and `eanet101` have the
            authors'.
        options: Of the backbone, for timm.

    Raises:
        ValueError: timm has no such network, it has no features of that stride, or last_dilations does not fit it.

    Differs from the authors' code:
        The two memories are separate (see `ExternalAttention2d`), the loss is not part of the network, and any
        backbone will do.

    References:
        https://arxiv.org/abs/2105.02358; `visattn.load_checkpoint` loads the authors' files.

    Example:
        >>> eanet("resnet18", num_classes=5)(torch.randn(2, 3, 33, 40)).shape
        torch.Size([2, 5, 33, 40])
    """
    net, width = _backbone("eanet", backbone, in_chans, output_stride, options)
    _dilate("eanet", net, last_dilations)
    inner = max(2, width // 4)
    head = nn.Sequential(
        OrderedDict(
            fc0=_conv_norm_act(width, inner),
            linu=ExternalAttention2d(inner),
            fc1=_conv_norm_act(inner, inner // 2),
            drop=nn.Dropout2d(drop_rate),
            fc2=nn.Conv2d(inner // 2, num_classes, 1),
        )
    )
    return Segmenter(net, head, num_classes)


# The authors' multi-grid at the strides that their code knows: timm's first unit, then 2 and 4 times timm's.
_MULTI_GRID = {8: (2, 8, 16), 16: (1, 4, 8)}


def eanet50(*, output_stride: int = 8, **options: Any) -> Segmenter:
    """EANet on ResNet-50 with a deep stem and, at output strides 8 and 16, multi-grid. Arguments as of `eanet`."""
    grid = {"last_dilations": _MULTI_GRID.get(output_stride)}
    return eanet("resnet50s", output_stride=output_stride, **{**grid, **options})


def eanet101(*, output_stride: int = 8, **options: Any) -> Segmenter:
    """EANet on ResNet-101 with a deep stem and, at output strides 8 and 16, multi-grid. Arguments as of `eanet`."""
    grid = {"last_dilations": _MULTI_GRID.get(output_stride)}
    return eanet("resnet101s", output_stride=output_stride, **{**grid, **options})
