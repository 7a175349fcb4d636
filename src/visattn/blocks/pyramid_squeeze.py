"""Efficient pyramid squeeze attention (EPSA, PSA): grouped convolutions at several scales, weighed per channel.

Paper: EPSANet: An Efficient Pyramid Squeeze Attention Block on CNN, https://arxiv.org/abs/2105.14447
Authors' code: https://github.com/murufeng/EPSANet at 9955041a1db4591fae080d2e6edb25e2a2914d47
(models/epsanet.py, models/SE_weight_module.py)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visattn import native
from visattn.blocks.base import (
    Block,
    NormLayer,
    check_map,
    conv_numbers,
    conv_with_norm,
    convolved,
    has_hooks,
    layout_like,
    make_norm,
    plain_conv,
)
from visattn.errors import check
from visattn.ops._shared import eager, map_layout, precise
from visattn.ops.convolution import IMPLEMENTATIONS, Convolution
from visattn.ops.pyramid_squeeze import Squeeze, attend, attention_forms, pyramid_squeeze, pyramid_weights

__all__ = ["PyramidSqueezeAttention", "PyramidSqueezeBottleneck", "SqueezeWeight"]


def _init_convs(module: nn.Module) -> None:
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight, std=math.sqrt(2 / (math.prod(conv.kernel_size) * conv.out_channels)))


class SqueezeWeight(Block):
    """Squeeze-and-excitation weights: `gate(fc2(relu(fc1(mean over positions of x))))`, not applied to x.

    Args:
        channels: Channels C of the map.
        reduction: The hidden layer has `channels // reduction` channels.
        gate_layer: Builds the gate. The authors' sigmoid confines the softmax over four scales to 0.109 .. 0.475;
            `torch.nn.Identity` lets it select a scale.
        device: Where parameters live.
        dtype: Type of the parameters.

    Shape:
        Input (B, C, H, W), output (B, C, 1, 1).

    Raises:
        ValueError: `channels < reduction`, a size below 1, or an input of another shape.

    Differs from the authors' code:
        The gate is a choice.

    References:
        https://arxiv.org/abs/2105.14447; names of the authors' SEWeightModule, initialisation of their network.

    Example:
        >>> SqueezeWeight(32)(torch.randn(2, 32, 5, 7)).shape
        torch.Size([2, 32, 1, 1])
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        gate_layer: Callable[[], nn.Module] = nn.Sigmoid,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check(reduction >= 1, "SqueezeWeight", "reduction must be >= 1", reduction=reduction)
        check(
            channels >= reduction,
            "SqueezeWeight",
            "channels // reduction must be >= 1",
            remedy=f"Use reduction <= {channels}.",
            channels=channels,
            reduction=reduction,
        )
        self.channels = channels
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, device=device, dtype=dtype)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, device=device, dtype=dtype)
        self.gate = gate_layer()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights normal with variance 2 / output channels, as the authors' network; biases by torch's default."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()
        _init_convs(self)

    def excite(self, mean: Tensor) -> Tensor:
        """The gates of means (B, C, 1, 1)."""
        gates: Tensor = self.gate(self.fc2(F.relu(self.fc1(mean))))
        return gates

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 1, 1)."""
        check_map(self, x, self.channels)
        return self.excite(x.mean(dim=(2, 3), keepdim=True))

    def attention_maps(self, x: Tensor, *, queries: Sequence[tuple[float, float]], **_: Any) -> dict[str, Tensor]:
        """`channel`: (B, C), the weight of each channel."""
        return {"channel": self.forward(x).flatten(1)}


class PyramidSqueezeAttention(Block):
    """Pyramid squeeze attention: `y = concat over scales i, last first, of a_i F_i`, `F_i = conv_i(x)`.

    `a = softmax over i of SE(F_i)` per channel; one SE part is shared by the scales. It takes the place of a
    convolution.

    Args:
        channels: Input channels; a multiple of every group count.
        out_channels: Output channels; default `channels`. A quarter of them (one share per scale) must be a multiple
            of every group count and at least `reduction`.
        kernel_size: One odd size per scale.
        groups: One group count per scale.
        stride: Stride of the convolutions.
        dilation: Widens every kernel, as where a network keeps its resolution instead of taking a stride.
        reduction: Of the SE part.
        gate_layer: Of the SE part.
        impl: "auto", "reference", or a form of the convolutions, see `visattn.ops.convolution.grouped_conv2d`.
        device: Where parameters live.
        dtype: Type of the parameters.

    Shape:
        Input (B, channels, H, W), output (B, out_channels, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: Sizes that do not fit (the message says what would), or an input of another shape.

    Differs from the authors' code:
        Nothing in the numbers, the reverse order of the scales in the output included. The SE part runs once on the
        stacked means; its reduction and gate are choices (authors: 16, sigmoid), and so is the number of scales.

    References:
        https://arxiv.org/abs/2105.14447; names of the authors' PSAModule, initialisation of their network.

    Example:
        >>> PyramidSqueezeAttention(64, stride=2)(torch.randn(2, 64, 9, 7)).shape
        torch.Size([2, 64, 5, 4])
    """

    impls = IMPLEMENTATIONS

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        kernel_size: Sequence[int] = (3, 5, 7, 9),
        groups: Sequence[int] = (1, 4, 8, 16),
        stride: int = 1,
        dilation: int = 1,
        reduction: int = 16,
        gate_layer: Callable[[], nn.Module] = nn.Sigmoid,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "PyramidSqueezeAttention"
        out_channels = channels if out_channels is None else out_channels
        kernel_size, groups = tuple(kernel_size), tuple(groups)
        scales = len(kernel_size)
        check(
            scales == len(groups) >= 1,
            name,
            "kernel_size and groups need one entry per scale",
            kernel_size=kernel_size,
            groups=groups,
        )
        odd = all(k >= 1 and k % 2 == 1 for k in kernel_size)
        check(odd, name, "kernel_size needs odd sizes", kernel_size=kernel_size)
        check(
            min(*groups, stride, dilation) >= 1,
            name,
            "groups, stride and dilation must be >= 1",
            groups=groups,
            stride=stride,
            dilation=dilation,
        )
        each = math.lcm(*groups)  # for the paper's powers of two this is the largest
        unit = scales * math.lcm(each, reduction)
        remedy = f"Use a multiple of {unit}."
        rule = f"out_channels // {scales} must be divisible by max(groups)"
        got = {"out_channels": out_channels, "groups": groups}
        check(out_channels % (scales * each) == 0 and out_channels > 0, name, rule, remedy=remedy, **got)
        rule = "channels must be divisible by max(groups)"
        check(
            channels % each == 0 and channels > 0,
            name,
            rule,
            remedy=f"Use a multiple of {each}.",
            channels=channels,
            groups=groups,
        )
        rule = f"out_channels // {scales} must be at least reduction"
        check(
            out_channels // scales >= reduction,
            name,
            rule,
            remedy=remedy,
            out_channels=out_channels,
            reduction=reduction,
        )
        self.channels, self.out_channels, self.impl = channels, out_channels, impl
        self.kernel_size, self.groups, self.stride, self.dilation = kernel_size, groups, stride, dilation
        share = out_channels // scales
        for index, (size, group) in enumerate(zip(kernel_size, groups, strict=True), start=1):
            conv = nn.Conv2d(
                channels,
                share,
                size,
                stride=stride,
                padding=dilation * (size // 2),
                dilation=dilation,
                groups=group,
                bias=False,
                device=device,
                dtype=dtype,
            )
            self.add_module(f"conv_{index}", conv)
        self.se = SqueezeWeight(share, reduction=reduction, gate_layer=gate_layer, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions normal with variance 2 / (kernel positions * output channels), as the authors' network."""
        self.se.reset_parameters()
        _init_convs(self)

    def _known(self) -> tuple[list[Convolution], Squeeze] | None:
        """What the layers compute, if they are known and nothing else sees them."""
        convs = [getattr(self, f"conv_{index}") for index in range(1, len(self.kernel_size) + 1)]
        fc1, fc2, gate = self.se.fc1, self.se.fc2, self.se.gate
        plain = type(self.se) is SqueezeWeight and not any(has_hooks(module) for module in (self.se, gate))
        plain = (
            plain and type(gate) in (nn.Sigmoid, nn.Identity) and all(plain_conv(conv) for conv in (*convs, fc1, fc2))
        )
        ones = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        if not plain or any(conv_numbers(fc) != ones or fc.kernel_size != (1, 1) for fc in (fc1, fc2)):
            return None
        squeeze = Squeeze(fc1.weight.flatten(1), fc1.bias, fc2.weight.flatten(1), fc2.bias, type(gate) is nn.Sigmoid)
        return [Convolution(conv.weight, conv.bias, **conv_numbers(conv)) for conv in convs], squeeze

    def _scales(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        convs = [getattr(self, f"conv_{index}") for index in range(1, len(self.kernel_size) + 1)]
        features = [convolved(conv, x, self.impl) for conv in convs]
        means = torch.stack([feature.mean(dim=(2, 3)) for feature in features], dim=1)  # (B, K, C)
        gates = self.se.excite(means.flatten(0, 1)[..., None, None])
        return features, gates.view(means.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        check_map(self, x, self.channels)
        known = self._known()
        if known is not None and (forms := attention_forms(x, *known, impl=self.impl)):
            return layout_like(attend(x, *known, forms), x)
        layout = map_layout(x)
        # Converted once to the layout that most scales are computed in, the map serves them all.
        if self.impl == "auto" and x.device.type == "cpu" and eager(x):
            ours = native.available() and precise(x)
            x = x.contiguous(memory_format=torch.contiguous_format if ours else torch.channels_last)
        features, gates = self._scales(x)
        plainness = "reference" if self.impl == "reference" else "auto"
        return pyramid_squeeze(features, gates, layout=layout, impl=plainness)

    def attention_maps(self, x: Tensor, *, queries: Sequence[tuple[float, float]], **_: Any) -> dict[str, Tensor]:
        """`branch`: (B, K, C), each channel's weights over the scales, smallest kernel first."""
        return {"branch": pyramid_weights(self._scales(x)[1])}

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        sizes = f"{self.channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return f"{sizes}, groups={self.groups}, stride={self.stride}, dilation={self.dilation}"


class PyramidSqueezeBottleneck(Block):
    """EPSANet's bottleneck: 1x1 conv, pyramid squeeze attention, 1x1 conv to 4 * channels, residual.

    Args:
        in_channels: Input channels.
        channels: Channels of the pyramid squeeze attention; the output has 4 times as many.
        stride: Of the pyramid squeeze attention and of the shortcut.
        downsample: The shortcut. Default: the identity where input and output agree, else 1x1 conv and norm.
        kernel_size: See `PyramidSqueezeAttention`.
        groups: See `PyramidSqueezeAttention`.
        norm_layer: Builds every norm from a channel count.
        impl: See `PyramidSqueezeAttention`.
        device: Where parameters live.
        dtype: Type of the parameters.

    Shape:
        Input (B, in_channels, H, W), output (B, 4 * channels, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: Sizes that do not fit, or an input of another shape.

    Differs from the authors' code:
        The shortcut that their network adds outside is built here when it is needed and not given.

    References:
        https://arxiv.org/abs/2105.14447; names of the authors' EPSABlock, initialisation of their network.

    Example:
        >>> PyramidSqueezeBottleneck(32, 64, stride=2)(torch.randn(2, 32, 9, 7)).shape
        torch.Size([2, 256, 5, 4])
    """

    impls = IMPLEMENTATIONS
    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        stride: int = 1,
        downsample: nn.Module | None = None,
        kernel_size: Sequence[int] = (3, 5, 7, 9),
        groups: Sequence[int] = (1, 4, 8, 16),
        norm_layer: NormLayer = nn.BatchNorm2d,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check(in_channels >= 1, "PyramidSqueezeBottleneck", "in_channels must be >= 1", in_channels=in_channels)
        self.in_channels = in_channels
        out_channels = channels * self.expansion
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False, **placed)
        self.bn1 = make_norm(norm_layer, channels, **placed)
        self.conv2 = PyramidSqueezeAttention(
            channels, kernel_size=kernel_size, groups=groups, stride=stride, impl=impl, **placed
        )
        self.bn2 = make_norm(norm_layer, channels, **placed)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False, **placed)
        self.bn3 = make_norm(norm_layer, out_channels, **placed)
        if downsample is None and (stride != 1 or in_channels != out_channels):
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False, **placed)
            downsample = nn.Sequential(shortcut, make_norm(norm_layer, out_channels, **placed))
        self.downsample = downsample
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions normal with variance 2 / (kernel positions * output channels), as the authors' network."""
        self.conv2.reset_parameters()
        _init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, 4 * channels, ceil(H / stride), ceil(W / stride))."""
        check_map(self, x, self.in_channels)
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + identity)

    def fused(self) -> nn.Module:
        """`FusedPyramidSqueezeBottleneck`."""
        return FusedPyramidSqueezeBottleneck(self)


class FusedPyramidSqueezeBottleneck(nn.Module):
    """`PyramidSqueezeBottleneck` for inference: norms behind convolutions are part of them.

    Args:
        block: In eval mode.
    """

    def __init__(self, block: PyramidSqueezeBottleneck) -> None:
        super().__init__()
        self.in_channels = block.in_channels
        self.conv1 = conv_with_norm(block.conv1, block.bn1)
        self.conv2 = block.conv2
        self.bn2 = block.bn2  # between the attention and a ReLU: nothing to make it part of
        self.conv3 = conv_with_norm(block.conv3, block.bn3)
        shortcut = block.downsample
        if type(shortcut) is nn.Sequential and len(shortcut) == 2:
            shortcut = conv_with_norm(*shortcut)
        self.downsample = shortcut
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, 4 * channels, ceil(H / stride), ceil(W / stride))."""
        check_map(self, x, self.in_channels)
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn2(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(self.conv3(out) + identity)
