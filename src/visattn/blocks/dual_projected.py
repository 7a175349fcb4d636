"""Dual attention as tutorials have it: convolutions and projections, one part tied to a map size.

Paper: Dual Attention Network for Scene Segmentation, https://arxiv.org/abs/1809.02983
Published code compared with: https://github.com/xmu-xiaoma666/External-Attention-pytorch
at d75848e40233ed56fa503c888472bab8b17c568c (model/attention/DANet.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visattn.blocks.base import Block, check_map, convolved, kernels_only, layout_like, query_indices
from visattn.blocks.multihead import MultiHeadAttention
from visattn.errors import check
from visattn.ops.multihead import IMPLEMENTATIONS, multihead_weights

__all__ = ["ProjectedChannelAttention", "ProjectedDualAttention", "ProjectedPositionAttention"]


def _same_conv(name: str, channels: int, kernel_size: int, device: Any, dtype: Any) -> nn.Conv2d:
    check(kernel_size >= 1 and kernel_size % 2 == 1, name, "kernel_size must be odd", kernel_size=kernel_size)
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, device=device, dtype=dtype)


class ProjectedPositionAttention(Block):
    """A convolution, then single-head attention over positions with query, key, value and output projections.

    Args:
        channels: Channels C of the map.
        kernel_size: Odd kernel of the convolution.
        attn_drop: Dropout on the attention.
        impl: "auto", "reference", "fused", "pieces" or "native", see `visattn.ops.multihead.multihead_attention`.
        device: Where parameters live.
        dtype: Type of the parameters.

    Shape:
        Input (B, C, H, W), output (B, C, H, W), any H, W.

    Raises:
        ValueError: An even kernel, a size below 1, or an input of another shape.

    Differs from the authors' code:
        Returns a map where the published class returns (B, H*W, C). No dropout by default (published: 0.1).

    References:
        Names and initialisation of xmu-xiaoma666's PositionAttentionModule.

    Example:
        >>> ProjectedPositionAttention(8)(torch.randn(2, 8, 5, 7)).shape
        torch.Size([2, 8, 5, 7])
    """

    impls = IMPLEMENTATIONS

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = 3,
        attn_drop: float = 0.0,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.cnn = _same_conv("ProjectedPositionAttention", channels, kernel_size, device, dtype)
        self.pa = MultiHeadAttention(channels, num_heads=1, attn_drop=attn_drop, impl=impl, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """The convolution by torch's default, the attention as `MultiHeadAttention`."""
        self.cnn.reset_parameters()
        self.pa.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        check_map(self, x, self.channels)
        out: Tensor = self.pa(convolved(self.cnn, x, kernels_only(self.pa.impl)).flatten(2).transpose(1, 2))
        return layout_like(out.transpose(1, 2).reshape(x.shape), x)

    def attention_maps(self, x: Tensor, *, queries: Sequence[tuple[float, float]], **_: Any) -> dict[str, Tensor]:
        """`position`: (B, 1, Q, H, W), what the chosen positions attend to."""
        tokens = convolved(self.cnn, x, kernels_only(self.pa.impl)).flatten(2).transpose(1, 2)
        chosen = tokens.index_select(1, query_indices(queries, x.shape[2], x.shape[3], x.device))
        weights = multihead_weights(self.pa._heads(chosen, "fc_q"), self.pa._heads(tokens, "fc_k"))
        return {"position": weights.view(*weights.shape[:3], *x.shape[2:])}


class ProjectedChannelAttention(Block):
    """A convolution, then attention over channels with a linear layer over the H*W axis: tied to one map size.

    Args:
        channels: Channels C of the map.
        feat_size: The (H, W) it is built for.
        kernel_size: Odd kernel of the convolution.
        attn_drop: Dropout on the attention.
        impl: "auto", "reference", "fused", "pieces" or "native", see `visattn.ops.multihead.multihead_attention`.
        device: Where parameters live.
        dtype: Type of the parameters.

    Shape:
        Input (B, C, H, W) with (H, W) = feat_size, output the same.

    Raises:
        ValueError: An even kernel, a size below 1, or an input of another shape.

    Differs from the authors' code:
        Returns a map where the published class returns (B, C, H*W). No dropout by default (published: 0.1).

    References:
        Names and initialisation of xmu-xiaoma666's ChannelAttentionModule.

    Example:
        >>> ProjectedChannelAttention(8, (5, 7))(torch.randn(2, 8, 5, 7)).shape
        torch.Size([2, 8, 5, 7])
    """

    impls = IMPLEMENTATIONS

    def __init__(
        self,
        channels: int,
        feat_size: tuple[int, int],
        *,
        kernel_size: int = 3,
        attn_drop: float = 0.0,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        height, width = feat_size
        check(min(height, width) >= 1, "ProjectedChannelAttention", "feat_size must be >= 1", feat_size=feat_size)
        self.channels, self.feat_size = channels, (height, width)
        self.cnn = _same_conv("ProjectedChannelAttention", channels, kernel_size, device, dtype)
        self.pa = MultiHeadAttention(
            height * width,
            num_heads=1,
            project=False,
            attn_drop=attn_drop,
            impl=impl,
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self) -> None:
        """The convolution by torch's default, the attention as `MultiHeadAttention`."""
        self.cnn.reset_parameters()
        self.pa.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W) for the H, W it was built for."""
        check_map(self, x, self.channels)
        check(
            tuple(x.shape[2:]) == self.feat_size,
            type(self).__name__,
            f"built for maps of {self.feat_size[0]} x {self.feat_size[1]}",
            remedy="Build it with feat_size=(H, W) of your map, or use DualAttention, which takes any size.",
            shape=tuple(x.shape),
        )
        out: Tensor = self.pa(convolved(self.cnn, x, kernels_only(self.pa.impl)).flatten(2))
        return layout_like(out.view(x.shape), x)

    def attention_maps(self, x: Tensor, *, queries: Sequence[tuple[float, float]], **_: Any) -> dict[str, Tensor]:
        """`channel`: (B, C, C), what each channel attends to."""
        tokens = convolved(self.cnn, x, kernels_only(self.pa.impl)).flatten(2).unsqueeze(1)
        return {"channel": multihead_weights(tokens, tokens).squeeze(1)}

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"channels={self.channels}, feat_size={self.feat_size}"


class ProjectedDualAttention(Block):
    """The dual attention of tutorials: convolution and projected attention, over positions and over channels, summed.

    It has no gamma and no residual, and a linear layer over H*W ties it to one map size; `DualAttention` is the
    paper's block.

    Args:
        channels: Channels C of the map.
        feat_size: The (H, W) it is built for.
        kernel_size: Odd kernel of the convolutions.
        attn_drop: Dropout on the attention.
        impl: "auto", "reference", "fused", "pieces" or "native", see `visattn.ops.multihead.multihead_attention`.
        device: Where parameters live.
        dtype: Type of the parameters.

    Shape:
        Input (B, C, H, W) with (H, W) = feat_size, output the same.

    Raises:
        ValueError: An even kernel, a size below 1, or an input of another shape.

    Differs from the authors' code:
        Its arguments are honoured: the published class is always 512 channels, 3x3 kernels, 7 x 7. No dropout by
        default (published: 0.1).

    References:
        Names and initialisation of xmu-xiaoma666's DAModule.

    Example:
        >>> ProjectedDualAttention(8, (5, 7))(torch.randn(2, 8, 5, 7)).shape
        torch.Size([2, 8, 5, 7])
    """

    impls = IMPLEMENTATIONS

    def __init__(
        self,
        channels: int,
        feat_size: tuple[int, int],
        *,
        kernel_size: int = 3,
        attn_drop: float = 0.0,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.position_attention_module = ProjectedPositionAttention(
            channels, kernel_size=kernel_size, attn_drop=attn_drop, impl=impl, device=device, dtype=dtype
        )
        self.channel_attention_module = ProjectedChannelAttention(
            channels, feat_size, kernel_size=kernel_size, attn_drop=attn_drop, impl=impl, device=device, dtype=dtype
        )

    def reset_parameters(self) -> None:
        """As its two parts."""
        self.position_attention_module.reset_parameters()
        self.channel_attention_module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W) for the H, W it was built for."""
        out: Tensor = self.position_attention_module(x) + self.channel_attention_module(x)
        return out
