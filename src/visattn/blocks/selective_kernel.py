"""Selective kernel (SK): convolutions with several receptive fields, chosen per channel.

Paper: Selective Kernel Networks, https://arxiv.org/abs/1903.06586
Published code compared with:
https://github.com/developer0hye/SKNet-PyTorch at f78ea0c8e9394a77e58b33b228a4209186a6ad9e (sknet.py),
https://github.com/xmu-xiaoma666/External-Attention-pytorch at d75848e40233ed56fa503c888472bab8b17c568c
(model/attention/SKAttention.py),
https://github.com/pppLang/SKNet at ef76d8dd87a3c12eac69169758ee90fd1e189372 (sknet.py)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visattn import native
from visattn.blocks.base import (
    Block,
    NormLayer,
    affine,
    batch_norm_tensors,
    check_map,
    conv_numbers,
    convolved,
    foldable,
    folded,
    has_hooks,
    layout_like,
    make_norm,
    plain_conv,
    plain_norm,
    square_conv,
)
from visattn.errors import check
from visattn.ops._shared import BatchNorm, eager, precise, recording
from visattn.ops.convolution import IMPLEMENTATIONS, Convolution, conv2d_relu, grouped_conv2d
from visattn.ops.selective_kernel import (
    Gate,
    branch_descriptor,
    branch_select,
    branch_weights,
    normed_select,
    normed_served,
    whole,
    whole_way,
)

__all__ = ["SelectiveKernel"]


class _Branch(nn.Module):
    """Convolution, norm, activation."""

    def __init__(self, conv: nn.Conv2d, bn: nn.Module, act: nn.Module, impl: str) -> None:
        super().__init__()
        self.conv, self.bn, self.act, self.impl = conv, bn, act, impl

    def convolved(self, x: Tensor) -> Tensor:
        """Output of the convolution."""
        return convolved(self.conv, x, self.impl)

    def plain(self) -> bool:
        """Whether what follows the convolution is a batch norm and a ReLU, and no more."""
        return plain_norm(self.bn) and type(self.act) is nn.ReLU and not has_hooks(self.act) and not has_hooks(self)

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.conv, self.bn
        out = norm(self.convolved(x))
        if not plain_conv(conv):
            return cast(Tensor, self.act(out))
        known = type(self.act) is nn.ReLU and type(norm) is nn.BatchNorm2d
        if known and self.impl != "reference" and not has_hooks(self.act) and not has_hooks(norm):
            return F.relu_(out)  # neither convolution nor norm looks at its output again
        return cast(Tensor, self.act(out))

    def summed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output and its sums over positions, (B, C), without recording; the norm is part of the convolution."""
        conv, norm = self.conv, self.bn
        known = type(self.act) is nn.ReLU and self.impl == "auto" and plain_conv(conv) and foldable(norm)
        if known and precise(x, conv.weight):
            scale, shift = (numbers.to(x.dtype) for numbers in affine(norm, conv.bias))
            return conv2d_relu(x, conv.weight, scale, shift, **conv_numbers(conv))
        out = self(x)
        return out, out.sum(dim=(2, 3), dtype=torch.promote_types(out.dtype, torch.float32))


class SelectiveKernel(Block):
    """Selective kernel convolution: `y = sum_k a_k F_k`, `F_k = act(norm(conv_k(x)))`.

    `a = softmax over k of fcs_k(z)` per channel, `z = fc(mean over positions of sum_k F_k)`, normed and activated in
    the paper's form. The default is the paper's form: 3x3 kernels, a larger kernel k as 3x3 with dilation
    (k - 1) // 2, 32 groups. The full-kernel form that circulates in tutorials is
    `SelectiveKernel(c, kernel_size=(1, 3, 5, 7), dilated=False, groups=1, hidden_norm=False, bias=True)`.

    Args:
        channels: Input channels.
        out_channels: Output channels; default `channels`.
        kernel_size: One odd size per branch.
        dilated: Build kernels above 3 as dilated 3x3.
        stride: Stride of the branches.
        dilation: Widens every branch, as where a network keeps its resolution instead of taking a stride.
        groups: Groups of the branches; default the largest power of two up to the paper's 32 that divides both widths.
        reduction: The hidden vector has `max(min_hidden, out_channels // reduction)` entries.
        min_hidden: See `reduction`.
        hidden_norm: Norm and activation on the hidden vector (paper) or a plain linear layer.
        bias: Bias of the branch convolutions and of `fc`.
        norm_layer: Builds every norm, that of the hidden vector included, from a channel count.
        act_layer: Builds every activation.
        impl: "auto", "reference", or a form of the convolutions, see `visattn.ops.convolution.grouped_conv2d`.
        device: Where parameters live.
        dtype: Type of the parameters.

    Shape:
        Input (B, channels, H, W), output (B, out_channels, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: An even kernel, groups that do not divide the widths, a size below 1, or an input of another shape.

    Differs from the authors' code:
        Training with a batch of one works: the hidden batch norm then uses its running statistics, where published
        code raises. `groups` fits itself to the width unless given.

    References:
        https://arxiv.org/abs/1903.06586; `visattn.checkpoints` maps the names of five published versions.

    Example:
        >>> SelectiveKernel(64, stride=2)(torch.randn(2, 64, 9, 7)).shape
        torch.Size([2, 64, 5, 4])
    """

    impls = IMPLEMENTATIONS
    activated = True

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        kernel_size: Sequence[int] = (3, 5),
        dilated: bool = True,
        stride: int = 1,
        dilation: int = 1,
        groups: int | None = None,
        reduction: int = 16,
        min_hidden: int = 32,
        hidden_norm: bool = True,
        bias: bool = False,
        norm_layer: NormLayer = nn.BatchNorm2d,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "SelectiveKernel"
        out_channels = channels if out_channels is None else out_channels
        check(
            min(channels, out_channels) >= 1, name, "sizes must be >= 1", channels=channels, out_channels=out_channels
        )
        groups = math.gcd(32, channels, out_channels) if groups is None else groups
        check(
            groups >= 1 and channels % groups == 0 and out_channels % groups == 0,
            name,
            "groups must divide channels and out_channels",
            remedy="Leave groups out to have one chosen.",
            groups=groups,
            channels=channels,
            out_channels=out_channels,
        )
        kernel_size = tuple(kernel_size)
        odd = len(kernel_size) >= 1 and all(k >= 1 and k % 2 == 1 for k in kernel_size)
        check(odd, name, "kernel_size needs odd sizes, one per branch", kernel_size=kernel_size)
        check(
            min(stride, dilation, reduction, min_hidden) >= 1,
            name,
            "stride, dilation, reduction and min_hidden must be >= 1",
            stride=stride,
            dilation=dilation,
            reduction=reduction,
            min_hidden=min_hidden,
        )
        self.channels, self.out_channels, self.kernel_size = channels, out_channels, kernel_size
        self.dilated, self.stride, self.dilation, self.groups, self.impl = dilated, stride, dilation, groups, impl
        self.convs = nn.ModuleList()
        for k in kernel_size:
            size, widened = (3, dilation * (k - 1) // 2) if dilated and k > 3 else (k, dilation)
            conv = nn.Conv2d(
                channels,
                out_channels,
                size,
                stride=stride,
                padding=widened * (size - 1) // 2,
                dilation=widened,
                groups=groups,
                bias=bias,
                device=device,
                dtype=dtype,
            )
            self.convs.append(_Branch(conv, make_norm(norm_layer, out_channels, device, dtype), act_layer(), impl))
        hidden = max(min_hidden, out_channels // reduction)
        self.fc = nn.Linear(out_channels, hidden, bias=bias, device=device, dtype=dtype)
        self.fc_bn = make_norm(norm_layer, hidden, device, dtype) if hidden_norm else None
        self.fc_act = act_layer() if hidden_norm else None
        self.fcs = nn.ModuleList(nn.Linear(hidden, out_channels, device=device, dtype=dtype) for _ in kernel_size)

    def reset_parameters(self) -> None:
        """The defaults of torch's layers, as published."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                module.reset_parameters()

    def _hidden(self, descriptor: Tensor) -> Tensor:
        hidden: Tensor = self.fc(descriptor)
        if self.fc_bn is None or self.fc_act is None:
            return hidden
        hidden = hidden[..., None, None]
        if self.training and isinstance(self.fc_bn, nn.BatchNorm2d) and hidden.shape[0] == 1:
            bn = self.fc_bn  # one value per channel has no variance: normalise as in eval
            hidden = F.batch_norm(hidden, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        else:
            hidden = self.fc_bn(hidden)
        activated: Tensor = self.fc_act(hidden)
        return activated.flatten(1)

    @property
    def _plainness(self) -> str:
        return "reference" if self.impl == "reference" else "auto"

    def _alone(self, x: Tensor) -> bool:
        if self.impl == "reference" or torch.is_grad_enabled() or not eager(x):
            return False
        return not any(has_hooks(module) for module in self.convs.modules())

    def _branches(self, x: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        sums: Sequence[Tensor] = ()
        if self._alone(x):
            features, sums = zip(*(cast(_Branch, branch).summed(x) for branch in self.convs), strict=True)
        else:
            features = tuple(branch(x) for branch in self.convs)
        hidden = self._hidden(branch_descriptor(features, sums, impl=self._plainness))
        return features, torch.stack([fc(hidden) for fc in self.fcs], dim=1)  # logits (B, K, C)

    def _gate(self) -> Gate | None:
        """The layers between descriptor and logits, if they are known and nothing else sees them."""
        fcs = [cast(nn.Linear, fc) for fc in self.fcs]
        if any(type(fc) is not nn.Linear or has_hooks(fc) for fc in (self.fc, *fcs)):
            return None
        norm, relu = None, self.fc_bn is not None and self.fc_act is not None
        if relu:
            norm = batch_norm_tensors(cast(nn.Module, self.fc_bn), count=False)
            if norm is None or type(self.fc_act) is not nn.ReLU or has_hooks(self.fc_act):
                return None
        return Gate(self.fc.weight, self.fc.bias, norm, [fc.weight for fc in fcs], [fc.bias for fc in fcs], relu)

    def _by_kernels(self, x: Tensor) -> Tensor | None:
        """The output, by kernels for the whole block or for all that follows its convolutions; None without them."""
        if self.impl not in ("auto", "native") or not eager(x) or not native.available():
            return None
        branches, gate = [cast(_Branch, branch) for branch in self.convs], self._gate()
        if gate is None or not all(branch.plain() for branch in branches):
            return None
        norms = [cast(BatchNorm, batch_norm_tensors(branch.bn, count=False)) for branch in branches]
        if all(plain_conv(branch.conv) for branch in branches):
            convs = [Convolution(one.conv.weight, one.conv.bias, **conv_numbers(one.conv)) for one in branches]
            if way := whole_way(x, convs, norms, gate, impl=self.impl):
                self._count_batch(gate)
                return whole(x, convs, norms, gate, way)
        if not normed_served(x, norms, gate, impl=self.impl):
            return None
        self._count_batch(gate)
        return normed_select([branch.convolved(x) for branch in branches], norms, gate, impl=self.impl)

    def _count_batch(self, gate: Gate) -> None:
        norms = [cast(_Branch, branch).bn for branch in self.convs] + ([] if gate.norm is None else [self.fc_bn])
        for norm in cast(list[nn.BatchNorm2d], norms):
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        check_map(self, x, self.channels)
        out = self._by_kernels(x)
        if out is None:
            features, logits = self._branches(x)
            out = branch_select(features, logits, overwrite=self._alone(x), impl=self._plainness)
        return layout_like(out, x)

    def attention_maps(self, x: Tensor, *, queries: Sequence[tuple[float, float]], **_: Any) -> dict[str, Tensor]:
        """`branch`: (B, K, C), each channel's weights over the branches."""
        return {"branch": branch_weights(self._branches(x)[1])}

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        sizes = f"{self.channels}, {self.out_channels}, kernel_size={self.kernel_size}, dilated={self.dilated}"
        return f"{sizes}, stride={self.stride}, dilation={self.dilation}, groups={self.groups}"

    def fused(self) -> nn.Module:
        """`FusedSelectiveKernel`, where its layers are those that it was built of."""
        plain = all(type(linear) is nn.Linear for linear in (self.fc, *self.fcs))
        convs = [
            cast(_Branch, branch).conv for branch in self.convs
        ]  # their weights may be parametrised: they are read
        plain = plain and all(type(conv).forward is nn.Conv2d.forward and square_conv(conv) for conv in convs)
        return FusedSelectiveKernel(self) if plain and (self.fc_bn is None) == (self.fc_act is None) else self


class _FusedBranch(nn.Module):
    """Convolution with its norm folded in, activation."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, branch: _Branch) -> None:
        super().__init__()
        conv, norm = branch.conv, branch.bn
        self.numbers, self.act = conv_numbers(conv), branch.act
        weight, bias, fold = conv.weight, conv.bias, foldable(norm)
        if fold:
            weight, bias = folded(conv.weight, conv.bias, norm)
            if not (weight.isfinite().all() and bias.isfinite().all()):  # float16 has an end
                weight, bias, fold = conv.weight, conv.bias, False
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.norm = nn.Identity() if fold else norm

    def plain(self) -> bool:
        """Whether a ReLU is all that follows the convolution."""
        return type(self.act) is nn.ReLU and type(self.norm) is nn.Identity

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output and its sums over positions."""
        if self.plain():
            return conv2d_relu(x, self.weight, None, self.bias, **self.numbers)
        out: Tensor = self.act(self.norm(grouped_conv2d(x, self.weight, self.bias, **self.numbers)))
        return out, out.sum(dim=(2, 3), dtype=torch.promote_types(out.dtype, torch.float32))

    def extra_repr(self) -> str:
        return ", ".join(
            [str(tuple(self.weight.shape)), *(f"{name}={number}" for name, number in self.numbers.items())]
        )


class FusedSelectiveKernel(nn.Module):
    """`SelectiveKernel` for inference: norms folded in, one linear layer for the logits of all branches.

    Args:
        block: In eval mode.
    """

    fc_weight: Tensor
    fc_bias: Tensor | None
    select_weight: Tensor
    select_bias: Tensor

    def __init__(self, block: SelectiveKernel) -> None:
        super().__init__()
        self.channels, self.out_channels = block.channels, block.out_channels
        self.convs = nn.ModuleList(_FusedBranch(branch) for branch in block.convs if isinstance(branch, _Branch))
        weight, bias, norm = block.fc.weight, cast(Tensor | None, block.fc.bias), block.fc_bn
        self.fc_bn = None if norm is None or foldable(norm) else norm
        if norm is not None and foldable(norm):
            weight, bias = folded(weight, bias, norm)
        self.register_buffer("fc_weight", weight.detach())
        self.register_buffer("fc_bias", None if bias is None else bias.detach())
        self.fc_act = block.fc_act
        selectors = [cast(nn.Linear, fc) for fc in block.fcs]
        self.register_buffer("select_weight", torch.cat([fc.weight.detach() for fc in selectors]))  # (K * C, hidden)
        self.register_buffer("select_bias", torch.cat([fc.bias.detach() for fc in selectors]))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        check_map(self, x, self.channels)
        plain = self.fc_bn is None and (self.fc_act is None or type(self.fc_act) is nn.ReLU)
        branches = [cast(_FusedBranch, conv) for conv in self.convs]
        if plain and all(branch.plain() for branch in branches):
            convs = [Convolution(conv.weight, conv.bias, **conv.numbers) for conv in branches]
            weights = self.select_weight.view(len(convs), self.out_channels, -1).unbind()
            biases = self.select_bias.view(len(convs), -1).unbind()
            gate = Gate(self.fc_weight, self.fc_bias, None, weights, biases, self.fc_act is not None)
            norms = [None] * len(convs)
            if way := whole_way(x, convs, norms, gate):
                return layout_like(whole(x, convs, norms, gate, way), x)
        features, sums = zip(*(conv(x) for conv in branches), strict=True)
        hidden = F.linear(branch_descriptor(features, sums), self.fc_weight, self.fc_bias)[..., None, None]
        hidden = hidden if self.fc_bn is None else self.fc_bn(hidden)
        hidden = hidden if self.fc_act is None else self.fc_act(hidden)
        logits = F.linear(hidden.flatten(1), self.select_weight, self.select_bias)
        logits = logits.view(-1, len(features), self.out_channels)
        out = branch_select(features, logits, overwrite=eager(x) and not recording(*features, logits))
        return layout_like(out, x)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.channels}, {self.out_channels}, branches={len(self.convs)}"
