"""External attention (EA): token form, multi-head token form and EANet's block for feature maps.

Paper: Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks, https://arxiv.org/abs/2105.02358
Authors' code: https://github.com/MenghaoGuo/EANet at 59c03cb0a286d3a29a797f8ea07fb89d7af56b60
(model_torch.py, multi_head_attention_torch.py); token form: https://github.com/xmu-xiaoma666/External-Attention-pytorch
at d75848e40233ed56fa503c888472bab8b17c568c (model/attention/ExternalAttention.py)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.blocks.base import (
    Block,
    NormLayer,
    batch_norm_tensors,
    check_map,
    check_tokens,
    foldable,
    folded,
    layout_like,
    make_norm,
    wide,
)
from visattn.errors import check
from visattn.ops._shared import eager, precise, recording
from visattn.ops.external import (
    IMPLEMENTATIONS,
    double_normalize,
    external_attention,
    external_attention_2d,
    external_residual_2d,
    external_residual_eval,
)

__all__ = ["ExternalAttention", "ExternalAttention2d", "MultiHeadExternalAttention"]


class ExternalAttention(Block):
    """External attention on tokens: keys and values are two learned memories shared by all samples.

    `y = Mv A`, `A = double_normalize(Mk x)`: softmax over tokens, then each token divided by its sum over slots.

    Args:
        dim: Width of the tokens.
        num_slots: Number of memory slots S.
        eps: Added to the sum over slots; 0 as in the published token form.
        impl: "auto" or "reference".
        device: Where parameters live.
        dtype: Type of the parameters.

    Shape:
        Input (B, N, dim), output (B, N, dim).

    Raises:
        ValueError: A size below 1, a negative eps, or an input of another shape.

    Differs from the authors' code:
        With eps=0 a token that no slot attends to gives finite weights where the published code (and
        `impl="reference"`) gives 0 / 0.

    References:
        https://arxiv.org/abs/2105.02358; names and initialisation of xmu-xiaoma666's ExternalAttention.

    Example:
        >>> ExternalAttention(16, num_slots=8)(torch.randn(2, 11, 16)).shape
        torch.Size([2, 11, 16])
    """

    impls = ("auto", "reference")

    def __init__(
        self,
        dim: int,
        *,
        num_slots: int = 64,
        eps: float = 0.0,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check(dim >= 1 and num_slots >= 1, "ExternalAttention", "sizes must be >= 1", dim=dim, num_slots=num_slots)
        check(eps >= 0, "ExternalAttention", "eps must not be negative", eps=eps)
        self.dim, self.num_slots, self.eps, self.impl = dim, num_slots, eps, impl
        self.mk = nn.Linear(dim, num_slots, bias=False, device=device, dtype=dtype)
        self.mv = nn.Linear(num_slots, dim, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.001, as published."""
        nn.init.normal_(self.mk.weight, std=0.001)
        nn.init.normal_(self.mv.weight, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) to (B, N, dim)."""
        check_tokens(self, x, self.dim)
        return external_attention(x, self.mk.weight, self.mv.weight, eps=self.eps, impl=self.impl)

    def attention_maps(self, x: Tensor, *, queries: Sequence[tuple[float, float]], **_: Any) -> dict[str, Tensor]:
        """`slot`: (B, S, N), each token's weights over the slots."""
        return {"slot": double_normalize(self.mk(x).transpose(1, 2), eps=self.eps)}

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"dim={self.dim}, num_slots={self.num_slots}"


class MultiHeadExternalAttention(Block):
    """External attention of EAMLP: tokens widened four times, cut into heads that share one pair of memories.

    `y = proj(concat_h(Mv double_normalize(Mk t_h) ))`, `t = trans_dims(x)` of width 4 dim in 4 num_heads heads.

    Args:
        dim: Width of the tokens; a multiple of `num_heads`.
        num_heads: Heads before widening; 4 times as many are used.
        num_slots: Memory slots S.
        attn_drop: Dropout on the attention.
        proj_drop: Dropout on the output.
        impl: "auto" or "reference".
        device: Where parameters live.
        dtype: Type of the parameters.

    Shape:
        Input (B, N, dim), output (B, N, dim).

    Raises:
        ValueError: `dim` not a multiple of `num_heads`, a size below 1, or an input of another shape.

    Differs from the authors' code:
        The number of slots is free (theirs: 64); their `qkv_bias` and `qk_scale`, which do nothing, do not exist.

    References:
        https://arxiv.org/abs/2105.02358; names and initialisation of the authors' Attention.

    Example:
        >>> MultiHeadExternalAttention(24, num_heads=3)(torch.randn(2, 11, 24)).shape
        torch.Size([2, 11, 24])
    """

    impls = ("auto", "reference")
    widening = 4
    eps = 1e-9

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        num_slots: int = 64,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "MultiHeadExternalAttention"
        check(
            min(dim, num_heads, num_slots) >= 1,
            name,
            "sizes must be >= 1",
            dim=dim,
            num_heads=num_heads,
            num_slots=num_slots,
        )
        check(dim % num_heads == 0, name, "dim must be a multiple of num_heads", dim=dim, num_heads=num_heads)
        check(0 <= attn_drop <= 1, name, "attn_drop must lie in [0, 1]", attn_drop=attn_drop)
        check(0 <= proj_drop <= 1, name, "proj_drop must lie in [0, 1]", proj_drop=proj_drop)
        self.dim, self.num_heads, self.num_slots, self.impl = dim, num_heads, num_slots, impl
        head_dim = dim // num_heads
        self.trans_dims = nn.Linear(dim, dim * self.widening, device=device, dtype=dtype)
        self.linear_0 = nn.Linear(head_dim, num_slots, device=device, dtype=dtype)
        self.linear_1 = nn.Linear(num_slots, head_dim, device=device, dtype=dtype)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim * self.widening, dim, device=device, dtype=dtype)
        self.proj_drop = proj_drop

    def reset_parameters(self) -> None:
        """The defaults of `torch.nn.Linear`, as published."""
        for linear in (self.trans_dims, self.linear_0, self.linear_1, self.proj):
            linear.reset_parameters()

    def _heads(self, x: Tensor) -> Tensor:
        wide: Tensor = self.trans_dims(x)
        return wide.view(*x.shape[:2], self.widening * self.num_heads, self.dim // self.num_heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) to (B, N, dim)."""
        check_tokens(self, x, self.dim)
        out = external_attention(
            self._heads(x),  # (B, heads, N, head_dim)
            self.linear_0.weight,
            self.linear_1.weight,
            key_bias=self.linear_0.bias,
            value_bias=self.linear_1.bias,
            eps=self.eps,
            dropout_p=self.attn_drop if self.training else 0.0,
            impl=self.impl,
        )
        return F.dropout(self.proj(out.transpose(1, 2).flatten(2)), self.proj_drop, self.training)

    def attention_maps(self, x: Tensor, *, queries: Sequence[tuple[float, float]], **_: Any) -> dict[str, Tensor]:
        """`slot`: (B, S, N), each token's weights over the slots, averaged over heads."""
        logits = self.linear_0(self._heads(x)).transpose(-1, -2)
        return {"slot": double_normalize(logits, eps=self.eps).mean(dim=1)}

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"dim={self.dim}, num_heads={self.num_heads}, num_slots={self.num_slots}"


class ExternalAttention2d(Block):
    """EANet's block for feature maps: `y = relu(x + BN(W2 Mv A))`, `A = double_normalize(Mk (W1 x + b1))`.

    Args:
        channels: Channels C of the map.
        num_slots: Memory slots S.
        tie_memory: One memory, `Mv = Mk^T`; otherwise two separate ones.
        norm_layer: Builds the norm from a channel count.
        eps: Added to the sum over slots.
        impl: "auto", "reference", "plain", "buffered" or "native", see `visattn.ops.external.external_residual_2d`.
        device: Where parameters live.
        dtype: Type of the parameters.

    Shape:
        Input (B, C, H, W), output (B, C, H, W), any H, W.

    Raises:
        ValueError: A size below 1, a negative eps, or an input of another shape.

    Differs from the authors' code:
        Their constructor lets the memories share storage, which a move to the GPU undoes and a checkpoint may not
        survive; here they are separate, or one parameter with `tie_memory=True` (no `linear_1`). The number of slots
        is free (theirs: 64). Plain batch norm with torch's momentum stands for their synchronised one.

    References:
        https://arxiv.org/abs/2105.02358; names and initialisation of the authors' External_attention.

    Example:
        >>> ExternalAttention2d(16)(torch.randn(2, 16, 5, 7)).shape
        torch.Size([2, 16, 5, 7])
    """

    impls = IMPLEMENTATIONS

    def __init__(
        self,
        channels: int,
        *,
        num_slots: int = 64,
        tie_memory: bool = False,
        norm_layer: NormLayer = nn.BatchNorm2d,
        eps: float = 1e-9,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "ExternalAttention2d"
        check(channels >= 1 and num_slots >= 1, name, "sizes must be >= 1", channels=channels, num_slots=num_slots)
        check(eps >= 0, name, "eps must not be negative", eps=eps)
        self.channels, self.num_slots, self.tie_memory = channels, num_slots, tie_memory
        self.eps, self.impl = eps, impl
        self.conv1 = nn.Conv2d(channels, channels, 1, device=device, dtype=dtype)
        self.linear_0 = nn.Conv1d(channels, num_slots, 1, bias=False, device=device, dtype=dtype)
        self.linear_1 = (
            None if tie_memory else nn.Conv1d(num_slots, channels, 1, bias=False, device=device, dtype=dtype)
        )
        self.conv2 = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False, device=device, dtype=dtype),
            make_norm(norm_layer, channels, device, dtype),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions normal with variance 2 / (kernel positions * output channels), as published."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv1d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))

    def _value_memory(self) -> Tensor:
        if self.linear_1 is None:
            return self.linear_0.weight[..., 0].t()
        return self.linear_1.weight[..., 0]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        check_map(self, x, self.channels)
        weights = (
            self.conv1.weight,
            self.conv1.bias,
            self.linear_0.weight[..., 0],
            self._value_memory(),
            cast(Tensor, self.conv2[0].weight),
        )
        norm = None if self.impl == "reference" else batch_norm_tensors(self.conv2[1])
        if norm is None:
            mapped = external_attention_2d(x, *weights, eps=self.eps, impl=self.impl)
            return F.relu(x + self.conv2[1](mapped))
        return external_residual_2d(x, *weights, norm, eps=self.eps, impl=self.impl)

    def attention_maps(self, x: Tensor, *, queries: Sequence[tuple[float, float]], **_: Any) -> dict[str, Tensor]:
        """`slot`: (B, S, H, W), each position's weights over the slots."""
        logits = self.linear_0(self.conv1(x).flatten(2))
        return {"slot": double_normalize(logits, eps=self.eps).view(x.shape[0], self.num_slots, *x.shape[2:])}

    def fused(self) -> nn.Module:
        """`FusedExternalAttention2d`, where the norm is a batch norm with running statistics."""
        return FusedExternalAttention2d(self) if foldable(self.conv2[1]) else self

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"channels={self.channels}, num_slots={self.num_slots}, tie_memory={self.tie_memory}"


class FusedExternalAttention2d(nn.Module):
    """`ExternalAttention2d` for inference: two matrices and a shift, `y = relu(x + shift + V double_normalize(K x))`.

    Args:
        block: In eval mode, with a batch norm that can be folded.
    """

    into_slots: Tensor
    out_of_slots: Tensor
    shift: Tensor

    def __init__(self, block: ExternalAttention2d) -> None:
        super().__init__()
        self.channels, self.num_slots, self.eps = block.channels, block.num_slots, block.eps
        dtype = block.conv1.weight.dtype
        out_weight, shift = folded(wide(cast(Tensor, block.conv2[0].weight)), None, block.conv2[1])
        query, key = wide(block.conv1.weight).flatten(1), wide(block.linear_0.weight).flatten(1)
        self.register_buffer("into_slots", (key @ query).to(dtype))  # the softmax removes the bias of the queries
        self.register_buffer("out_of_slots", (out_weight.flatten(1) @ wide(block._value_memory())).to(dtype))
        self.register_buffer("shift", shift.to(dtype))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        check_map(self, x, self.channels)
        given = (x, self.into_slots, self.out_of_slots, self.shift)
        if self.eps > 0 and eager(*given) and precise(*given) and not recording(*given):
            return external_residual_eval(*given, self.eps)
        logits = F.conv2d(x, self.into_slots[..., None, None])
        attention = double_normalize(logits.flatten(2), eps=self.eps).view(logits.shape)
        mapped = F.conv2d(attention, self.out_of_slots[..., None, None], self.shift)
        return layout_like(F.relu(x + mapped), x)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"channels={self.channels}, num_slots={self.num_slots}"
