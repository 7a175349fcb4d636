"""Dual attention (DA): DANet's position and channel attention, and its head.

Paper: Dual Attention Network for Scene Segmentation, https://arxiv.org/abs/1809.02983
Authors' code: https://github.com/junfu1115/DANet at b0a0fa008148f102321cdaa7ca38fb0ddd0239d1
(encoding/nn/da_att.py, encoding/models/sseg/danet.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from visattn.blocks.base import Block, NormLayer, check_map, conv_with_norm, make_norm, plain_conv, query_indices
from visattn.errors import check
from visattn.ops.dual import (
    CHANNEL_IMPLEMENTATIONS,
    POSITION_IMPLEMENTATIONS,
    channel_residual,
    channel_weights,
    position_attention,
    position_residual,
    position_weights,
)

__all__ = [
    "ChannelAttention",
    "DualAttention",
    "DualAttentionHead",
    "PositionAttention",
]


class PositionAttention(Block):
    """DANet's position attention: `y = gamma * (v softmax(q^T k)^T) + x` over all positions, gamma starting at 0.

    Args:
        channels: Channels C of the map.
        reduction: Queries and keys have `max(1, channels // reduction)` channels.
        impl: "auto", "reference", "fused", "pieces" or "native", see `visattn.ops.dual.position_attention`.
        device: Where parameters live.
        dtype: Type of the parameters.

    Shape:
        Input (B, C, H, W), output (B, C, H, W), any H, W.

    Raises:
        ValueError: A size below 1, or an input of another shape.

    Differs from the authors' code:
        Fewer channels than `reduction` still leave one query channel (theirs: none, which fails). `reduction=1` is the
        paper's text. The N x N matrix is not returned, nor need it exist.

    References:
        https://arxiv.org/abs/1809.02983; names and initialisation of the authors' PAM_Module.

    Example:
        >>> PositionAttention(16)(torch.randn(2, 16, 5, 7)).shape
        torch.Size([2, 16, 5, 7])
    """

    impls = POSITION_IMPLEMENTATIONS

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 8,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check(
            channels >= 1 and reduction >= 1,
            "PositionAttention",
            "sizes must be >= 1",
            channels=channels,
            reduction=reduction,
        )
        self.channels, self.impl = channels, impl
        inner = max(1, channels // reduction)
        self.query_conv = nn.Conv2d(channels, inner, 1, device=device, dtype=dtype)
        self.key_conv = nn.Conv2d(channels, inner, 1, device=device, dtype=dtype)
        self.value_conv = nn.Conv2d(channels, channels, 1, device=device, dtype=dtype)
        self.gamma = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Convolutions by torch's default, gamma zero, as published."""
        for conv in (self.query_conv, self.key_conv, self.value_conv):
            conv.reset_parameters()
        nn.init.zeros_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        check_map(self, x, self.channels)
        convs = (self.query_conv, self.key_conv, self.value_conv)
        if not all(plain_conv(conv) for conv in convs):
            return x + self.gamma * position_attention(*(conv(x) for conv in convs), impl=self.impl)
        query, key, value = ((conv.weight, cast(Tensor, conv.bias)) for conv in convs)
        return position_residual(x, query, key, value, self.gamma, impl=self.impl)

    def wake(self) -> None:
        """Gamma 1."""
        nn.init.ones_(self.gamma)

    def attention_maps(self, x: Tensor, *, queries: Sequence[tuple[float, float]], **_: Any) -> dict[str, Tensor]:
        """`position`: (B, 1, Q, H, W), what the chosen positions attend to."""
        chosen = query_indices(queries, x.shape[2], x.shape[3], x.device)
        query = self.query_conv(x).flatten(2).index_select(2, chosen)
        weights = position_weights(query, self.key_conv(x).flatten(2))
        return {"position": weights.view(*weights.shape[:2], *x.shape[2:]).unsqueeze(1)}

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"channels={self.channels}"


class ChannelAttention(Block):
    """DANet's channel attention: `y = gamma * (softmax(rowmax(E) - E) X) + x`, `E = X X^T`, gamma starting at 0.

    Args:
        channels: Channels C of the map.
        inverted: The authors' code (the most alike channels get the least weight), which their checkpoints need;
            False is the paper's equation `softmax(E)`.
        impl: "auto", "reference", "plain", "buffered" or "native", see `visattn.ops.dual.channel_residual`.
        device: Where parameters live.
        dtype: Type of the parameters.

    Shape:
        Input (B, C, H, W), output (B, C, H, W), any H, W.

    Raises:
        ValueError: A size below 1, or an input of another shape.

    Differs from the authors' code:
        Energies stay in float32 under autocast: they overflow float16 at ordinary sizes.

    References:
        https://arxiv.org/abs/1809.02983; names and initialisation of the authors' CAM_Module.

    Example:
        >>> ChannelAttention(16)(torch.randn(2, 16, 5, 7)).shape
        torch.Size([2, 16, 5, 7])
    """

    impls = CHANNEL_IMPLEMENTATIONS

    def __init__(
        self,
        channels: int,
        *,
        inverted: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check(channels >= 1, "ChannelAttention", "channels must be >= 1", channels=channels)
        self.channels, self.inverted, self.impl = channels, inverted, impl
        self.gamma = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Gamma zero, as published."""
        nn.init.zeros_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        check_map(self, x, self.channels)
        return channel_residual(x, self.gamma, inverted=self.inverted, impl=self.impl)

    def wake(self) -> None:
        """Gamma 1."""
        nn.init.ones_(self.gamma)

    def attention_maps(self, x: Tensor, *, queries: Sequence[tuple[float, float]], **_: Any) -> dict[str, Tensor]:
        """`channel`: (B, C, C), what each channel attends to."""
        return {"channel": channel_weights(x, inverted=self.inverted)}

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"channels={self.channels}, inverted={self.inverted}"


class DualAttention(Block):
    """DANet's two attentions in parallel: `y = position(x) + channel(x)`, each with its own residual and gamma.

    Args:
        channels: Channels C of the map.
        reduction: See `PositionAttention`.
        inverted: See `ChannelAttention`.
        impl: That of `PositionAttention`; channel attention is "reference" with it, otherwise "auto".
        device: Where parameters live.
        dtype: Type of the parameters.

    Shape:
        Input (B, C, H, W), output (B, C, H, W), any H, W.

    Raises:
        ValueError: A size below 1, or an input of another shape.

    Differs from the authors' code:
        They publish the sum only inside their head (see `DualAttentionHead`), after one convolution each.

    References:
        https://arxiv.org/abs/1809.02983

    Example:
        >>> DualAttention(16)(torch.randn(2, 16, 5, 7)).shape
        torch.Size([2, 16, 5, 7])
    """

    impls = POSITION_IMPLEMENTATIONS

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 8,
        inverted: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.position = PositionAttention(channels, reduction=reduction, impl=impl, device=device, dtype=dtype)
        plainness = "reference" if impl == "reference" else "auto"
        self.channel = ChannelAttention(channels, inverted=inverted, impl=plainness, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """As its two parts."""
        self.position.reset_parameters()
        self.channel.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        out: Tensor = self.position(x) + self.channel(x)
        return out


class DualAttentionHead(Block):
    """DANet's segmentation head: two stems, position and channel attention, and three classifiers.

    Args:
        in_channels: Channels of the backbone's map, at least 4; a quarter of them is used inside.
        out_channels: Classes.
        reduction: See `PositionAttention`.
        inverted: See `ChannelAttention`.
        drop: Dropout of whole channels before the classifiers.
        norm_layer: Builds every norm from a channel count.
        impl: See `DualAttention`.
        device: Where parameters live.
        dtype: Type of the parameters.

    Shape:
        Input (B, in_channels, H, W), output three maps (B, out_channels, H, W): fused, position, channel.

    Raises:
        ValueError: Fewer than 4 input channels, no output channel, `drop` outside [0, 1], or an input of another shape.

    Differs from the authors' code:
        Fewer than 32 input channels work (see `PositionAttention`). `norm_layer` has a default.

    References:
        https://arxiv.org/abs/1809.02983; names and initialisation of the authors' DANetHead.

    Example:
        >>> [tuple(y.shape) for y in DualAttentionHead(32, 5)(torch.randn(2, 32, 5, 7))]
        [(2, 5, 5, 7), (2, 5, 5, 7), (2, 5, 5, 7)]
    """

    impls = POSITION_IMPLEMENTATIONS

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        reduction: int = 8,
        inverted: bool = True,
        drop: float = 0.1,
        norm_layer: NormLayer = nn.BatchNorm2d,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check(in_channels >= 4, "DualAttentionHead", "in_channels must be >= 4", in_channels=in_channels)
        check(out_channels >= 1, "DualAttentionHead", "out_channels must be >= 1", out_channels=out_channels)
        check(0 <= drop <= 1, "DualAttentionHead", "drop must lie in [0, 1]", drop=drop)
        self.in_channels = in_channels
        inner = in_channels // 4

        def stem(channels: int) -> nn.Sequential:
            conv = nn.Conv2d(channels, inner, 3, padding=1, bias=False, device=device, dtype=dtype)
            return nn.Sequential(conv, make_norm(norm_layer, inner, device, dtype), nn.ReLU())

        def classifier() -> nn.Sequential:
            return nn.Sequential(nn.Dropout2d(drop), nn.Conv2d(inner, out_channels, 1, device=device, dtype=dtype))

        self.conv5a, self.conv5c = stem(in_channels), stem(in_channels)
        self.sa = PositionAttention(inner, reduction=reduction, impl=impl, device=device, dtype=dtype)
        plainness = "reference" if impl == "reference" else "auto"
        self.sc = ChannelAttention(inner, inverted=inverted, impl=plainness, device=device, dtype=dtype)
        self.conv51, self.conv52 = stem(inner), stem(inner)
        self.conv6, self.conv7, self.conv8 = classifier(), classifier(), classifier()

    def reset_parameters(self) -> None:
        """Torch's defaults, gammas zero, as published."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | PositionAttention | ChannelAttention):
                module.reset_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, in_channels, H, W) to three maps (B, out_channels, H, W)."""
        check_map(self, x, self.in_channels)
        position = self.conv51(self.sa(self.conv5a(x)))
        channel = self.conv52(self.sc(self.conv5c(x)))
        return self.conv8(position + channel), self.conv6(position), self.conv7(channel)

    def fused(self) -> nn.Module:
        """`FusedDualAttentionHead`."""
        return FusedDualAttentionHead(self)


class FusedDualAttentionHead(nn.Module):
    """`DualAttentionHead` for inference: norms but that before the positions are part of the convolutions.

    Args:
        block: In eval mode.
    """

    conv5a: nn.Module
    conv5c: nn.Module
    conv51: nn.Module
    conv52: nn.Module

    def __init__(self, block: DualAttentionHead) -> None:
        super().__init__()
        self.in_channels = block.in_channels
        # Folded weights are rounded once more, which the softmax over positions magnifies: its stem keeps its norm.
        self.conv5a = block.conv5a
        for name in ("conv5c", "conv51", "conv52"):
            stem = getattr(block, name)
            if type(stem) is nn.Sequential and len(stem) == 3:
                stem = nn.Sequential(conv_with_norm(stem[0], stem[1]), stem[2])
            self.add_module(name, stem)
        self.sa, self.sc = block.sa, block.sc
        self.conv6, self.conv7, self.conv8 = block.conv6, block.conv7, block.conv8
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, in_channels, H, W) to three maps (B, out_channels, H, W)."""
        check_map(self, x, self.in_channels)
        position = self.conv51(self.sa(self.conv5a(x)))
        channel = self.conv52(self.sc(self.conv5c(x)))
        return self.conv8(position + channel), self.conv6(position), self.conv7(channel)
