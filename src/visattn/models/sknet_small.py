"""The small SKNet of pppLang, for 64x64 images, and its unit.

Published code compared with:
https://github.com/pppLang/SKNet at ef76d8dd87a3c12eac69169758ee90fd1e189372 (sknet.py)
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from visattn.blocks import SelectiveKernel
from visattn.errors import check

__all__ = ["SelectiveKernelUnit", "sknet_small"]


class SelectiveKernelUnit(nn.Module):
    """Residual unit: 1x1 convolution, selective kernel with full kernels, 1x1 convolution, a norm behind each.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        channels: Of the selective kernel; default half the output channels.
        stride: Of the selective kernel and of the shortcut.
        options: Of `SelectiveKernel`, over those of pppLang's: kernels 3 and 5 undilated, 8 groups, reduction 2.

    Shape:
        Input (B, in_channels, H, W), output (B, out_channels, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: A stride without a change of channels, or sizes that `SelectiveKernel` refuses.

    Differs from the paper:
        All convolutions have biases, the hidden vector has neither norm nor activation, and there are no activations
        between the layers nor at the end.

    Example:
        >>> import torch
        >>> SelectiveKernelUnit(16, 32, stride=2)(torch.randn(2, 16, 9, 7)).shape
        torch.Size([2, 32, 5, 4])
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, channels: int | None = None, stride: int = 1, **options: Any
    ) -> None:
        super().__init__()
        check(
            stride == 1 or in_channels != out_channels,
            "SelectiveKernelUnit",
            "a shortcut that is the identity has no stride",
            remedy="Use stride=1, or another number of output channels.",
            stride=stride,
            in_channels=in_channels,
            out_channels=out_channels,
        )
        channels = out_channels // 2 if channels is None else channels
        full = {"groups": 8, "reduction": 2, "dilated": False, "hidden_norm": False, "bias": True}
        self.conv1 = nn.Conv2d(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = SelectiveKernel(channels, stride=stride, **{**full, **options})
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = nn.Sequential()
        if in_channels != out_channels:
            self.downsample.append(nn.Conv2d(in_channels, out_channels, 1, stride=stride))
            self.downsample.append(nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        out = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        out = self.bn3(self.conv3(out))
        return out + self.downsample(x)  # type: ignore[no-any-return]  # modules have no types


def sknet_small(num_classes: int = 10, *, in_chans: int = 3) -> nn.Sequential:
    """The SKNet of pppLang: three stages of three units, 256 to 1,024 channels.

    Args:
        num_classes: Classes.
        in_chans: Channels of the images.

    Differs from pppLang's code:
        The mean over all positions takes the place of that over 8x8 of them, which is the same for images of 64x64,
        theirs having no other size.

    Example:
        >>> import torch
        >>> sknet_small()(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(in_chans, 64, 3, padding=1), bn1=nn.BatchNorm2d(64)
    )
    width = 64
    for stage, channels in enumerate((256, 512, 1024), start=1):
        units: list[nn.Module] = []
        for stride in (2, 1, 1):
            units += [SelectiveKernelUnit(width, channels, stride=stride), nn.ReLU()]
            width = channels
        layers[f"layer{stage}"] = nn.Sequential(*units)
    layers.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(width, num_classes))
    return nn.Sequential(layers)
