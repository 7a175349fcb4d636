"""Multi-head attention (MHSA): tokens with separate queries, keys and values, and self-attention on feature maps.

Paper: Attention Is All You Need, https://arxiv.org/abs/1706.03762
Published code compared with: https://github.com/xmu-xiaoma666/External-Attention-pytorch
at d75848e40233ed56fa503c888472bab8b17c568c (model/attention/SelfAttention.py, SimplifiedSelfAttention.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visattn.blocks.base import (
    Block,
    check_map,
    check_tokens,
    kernels_only,
    layout_like,
    projected,
    query_indices,
    token_query_indices,
)
from visattn.errors import check
from visattn.ops.multihead import IMPLEMENTATIONS, multihead_attention, multihead_weights

__all__ = ["MultiHeadAttention", "MultiHeadAttention2d"]


class MultiHeadAttention(Block):
    """Scaled dot-product attention in heads: `fc_o(concat_h(softmax(mask(w q_h k_h^T / sqrt(d))) v_h))`.

    Args:
        dim: Width of queries, keys, values and output.
        num_heads: Heads.
        head_dim: Width of a head's queries and keys; default `dim // num_heads`.
        value_dim: Width of a head's values; default `dim // num_heads`.
        project: False leaves out the projections of queries, keys and values (the "simplified" published form).
        attn_drop: Dropout on the attention.
        impl: "auto", "reference", "fused", "pieces" or "native", see `visattn.ops.multihead.multihead_attention`.
        device: Where parameters live.
        dtype: Type of the parameters.

    Shape:
        queries (B, Nq, dim), keys and values (B, Nk, dim); output (B, Nq, dim). `attention_mask` (boolean, True where
        a key is not attended to) and `attention_weights` (multiply the scores before the mask) broadcast to
        (B, num_heads, Nq, Nk).

    Raises:
        ValueError: Sizes that do not fit, a mask that is not boolean, or inputs of other shapes.

    Differs from the authors' code:
        A query with all keys masked attends to nothing and gives the bias of `fc_o`, with finite gradients (published:
        NaN). No dropout by default (published: 0.1). A weight of 0 in `attention_weights` gives a score of 0, as
        published: it does not remove the key, the mask does.

    References:
        https://arxiv.org/abs/1706.03762; names and initialisation of xmu-xiaoma666's ScaledDotProductAttention.

    Example:
        >>> MultiHeadAttention(24, num_heads=4)(torch.randn(2, 5, 24), torch.randn(2, 7, 24)).shape
        torch.Size([2, 5, 24])
    """

    impls = IMPLEMENTATIONS

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        head_dim: int | None = None,
        value_dim: int | None = None,
        project: bool = True,
        attn_drop: float = 0.0,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "MultiHeadAttention"
        check(dim >= 1 and num_heads >= 1, name, "sizes must be >= 1", dim=dim, num_heads=num_heads)
        if head_dim is None or value_dim is None or not project:
            remedy = "Choose another num_heads, or give head_dim and value_dim." if project else ""
            check(
                dim % num_heads == 0,
                name,
                "dim must be a multiple of num_heads",
                remedy=remedy,
                dim=dim,
                num_heads=num_heads,
            )
        check(0 <= attn_drop <= 1, name, "attn_drop must lie in [0, 1]", attn_drop=attn_drop)
        head_dim = dim // num_heads if head_dim is None else head_dim
        value_dim = dim // num_heads if value_dim is None else value_dim
        check(head_dim >= 1 and value_dim >= 1, name, "sizes must be >= 1", head_dim=head_dim, value_dim=value_dim)
        if not project:
            rule = "without projections head_dim and value_dim are dim // num_heads"
            check(head_dim == value_dim == dim // num_heads, name, rule, head_dim=head_dim, value_dim=value_dim)
        self.dim, self.num_heads, self.head_dim, self.value_dim = dim, num_heads, head_dim, value_dim
        self.project, self.attn_drop, self.impl = project, attn_drop, impl
        if project:
            self.fc_q = nn.Linear(dim, num_heads * head_dim, device=device, dtype=dtype)
            self.fc_k = nn.Linear(dim, num_heads * head_dim, device=device, dtype=dtype)
            self.fc_v = nn.Linear(dim, num_heads * value_dim, device=device, dtype=dtype)
        self.fc_o = nn.Linear(num_heads * value_dim, dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights normal with standard deviation 0.001, biases zero, as published."""
        for linear in self.children():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=0.001)
                nn.init.zeros_(linear.bias)

    def _heads(self, x: Tensor, projection: str) -> Tensor:
        x = projected(getattr(self, projection), x, kernels_only(self.impl)) if self.project else x
        return x.reshape(*x.shape[:2], self.num_heads, x.shape[-1] // self.num_heads).transpose(
            1, 2
        )  # (B, heads, N, width)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        attention_weights: Tensor | None = None,
    ) -> Tensor:
        """Attend from queries to keys (default: the queries) and their values (default: the keys)."""
        keys = queries if keys is None else keys
        values = keys if values is None else values
        for tokens in (queries, keys, values):
            check_tokens(self, tokens, self.dim)
        check(
            keys.shape[1] == values.shape[1],
            "MultiHeadAttention",
            "there must be as many values as keys",
            keys=tuple(keys.shape),
            values=tuple(values.shape),
        )
        out = multihead_attention(
            self._heads(queries, "fc_q"),
            self._heads(keys, "fc_k"),
            self._heads(values, "fc_v"),
            attention_mask=attention_mask,
            attention_weights=attention_weights,
            dropout_p=self.attn_drop if self.training else 0.0,
            impl=self.impl,
        )
        return projected(self.fc_o, out.transpose(1, 2).flatten(2), kernels_only(self.impl))

    def attention_maps(
        self,
        tokens: Tensor,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        *,
        queries: Sequence[tuple[float, float]],
        attention_mask: Tensor | None = None,
        attention_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`position`: (B, heads, Q, Nk), what the chosen query tokens attend to."""
        chosen = token_query_indices(queries, tokens.shape[1], tokens.device)
        rows = [
            None if x is None else x.expand(*x.shape[:-2], tokens.shape[1], x.shape[-1]).index_select(-2, chosen)
            for x in (attention_mask, attention_weights)
        ]
        query = self._heads(tokens.index_select(1, chosen), "fc_q")
        key = self._heads(tokens if keys is None else keys, "fc_k")
        return {"position": multihead_weights(query, key, attention_mask=rows[0], attention_weights=rows[1])}

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, value_dim={self.value_dim}"


class MultiHeadAttention2d(Block):
    """Multi-head self-attention over the positions of a feature map.

    Args:
        channels: Channels C of the map.
        num_heads: Heads.
        head_dim: Width of a head's queries and keys; default `channels // num_heads`.
        value_dim: Width of a head's values; default `channels // num_heads`.
        attn_drop: Dropout on the attention.
        impl: "auto", "reference", "fused", "pieces" or "native", see `visattn.ops.multihead.multihead_attention`.
        device: Where parameters live.
        dtype: Type of the parameters.

    Shape:
        Input (B, C, H, W), output (B, C, H, W), any H, W.

    Raises:
        ValueError: Sizes that do not fit, or an input of another shape.

    Differs from the authors' code:
        `MultiHeadAttention` on the map's positions as tokens; see there.

    References:
        https://arxiv.org/abs/1706.03762

    Example:
        >>> MultiHeadAttention2d(16, num_heads=4)(torch.randn(2, 16, 5, 7)).shape
        torch.Size([2, 16, 5, 7])
    """

    impls = IMPLEMENTATIONS

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 8,
        head_dim: int | None = None,
        value_dim: int | None = None,
        attn_drop: float = 0.0,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.attention = MultiHeadAttention(
            channels,
            num_heads=num_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            attn_drop=attn_drop,
            impl=impl,
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self) -> None:
        """As `MultiHeadAttention`."""
        self.attention.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        check_map(self, x, self.channels)
        out: Tensor = self.attention(x.flatten(2).transpose(1, 2))
        return layout_like(out.transpose(1, 2).reshape(x.shape), x)

    def attention_maps(self, x: Tensor, *, queries: Sequence[tuple[float, float]], **_: Any) -> dict[str, Tensor]:
        """`position`: (B, heads, Q, H, W), what the chosen positions attend to."""
        tokens = x.flatten(2).transpose(1, 2)
        chosen = tokens.index_select(1, query_indices(queries, x.shape[2], x.shape[3], x.device))
        query = self.attention._heads(chosen, "fc_q")
        weights = multihead_weights(query, self.attention._heads(tokens, "fc_k"))
        return {"position": weights.view(*weights.shape[:3], *x.shape[2:])}
