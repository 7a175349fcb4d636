"""Published code -> our blocks: constructor arguments, and state-dict names and layouts.

One table, `PUBLISHED`, has an entry for each published class that a block of ours equals. An entry's `options` function
has the signature of the published constructor (names and defaults are its authors'), and returns the arguments of our
block; its `names` rename and reshape parameters and buffers, in both directions.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from visattn import blocks

__all__ = ["PUBLISHED", "Published", "build", "convert", "find"]

_DROPOUT = ("attn_drop", "proj_drop", "drop")


@dataclass(frozen=True)
class Published:
    """One published class and the block of ours that equals it.

    Attributes:
        repo: GitHub repository, owner/name.
        name: The class.
        mechanisms: Registry keys of the mechanisms it belongs to.
        block: Name of our class.
        options: The published constructor's arguments -> the arguments of our block.
        names: Rules (their prefix, our prefix, form), `{i}` standing for a number. The form is "same", "pointwise"
            (theirs may be a 1x1 convolution, ours is linear) or "stacked" (theirs is one 1x1 convolution without bias
            for all branches, ours is one linear layer with bias for each). No rules: the names are equal.
        layout: What they return of a map: "map" (B, C, H, W) as we do, "tokens" (B, H*W, C), "rows" (B, C, H*W).
        fixed: Options that our block has to be built with and that no name or shape in a file tells.
    """

    repo: str
    name: str
    mechanisms: tuple[str, ...]
    block: str
    options: Callable[..., dict[str, Any]] = field(repr=False)
    names: tuple[tuple[str, str, str], ...] = field(default=(), repr=False)
    layout: str = field(default="map", repr=False)
    fixed: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def source(self) -> str:
        """Unique name of the class, `owner/name:Class`."""
        return f"{self.repo}:{self.name}"

    def accepts(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the published constructor takes these keyword arguments."""
        try:
            inspect.signature(self.options).bind(**arguments)
        except TypeError:
            return False
        return True

    def build(
        self,
        arguments: Mapping[str, Any],
        *,
        channels: int | None = None,
        dropout: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """Build our block as the published constructor would with these arguments.

        Args:
            arguments: Keyword arguments of the published class; a class may be given as its dotted name.
            channels: Channels of the input, for a published class whose constructor does not say.
            dropout: False sets every dropout probability to 0.
            impl: Passed to the block.
            device: Passed to the block.
            dtype: Passed to the block.

        Raises:
            ValueError: An argument that the class does not have, or a value that our block cannot honour.
        """
        try:
            bound = inspect.signature(self.options).bind(**arguments)
        except TypeError as error:
            raise ValueError(f"{self.source}: {error}, got {dict(arguments)}") from error
        options = self.options(*bound.args, **bound.kwargs)
        if options.get("channels", 0) is None:
            if channels is None:
                raise ValueError(f"{self.source}: its constructor does not say how many channels. Give channels=")
            options["channels"] = channels
        if not dropout:
            options.update({name: 0.0 for name in _DROPOUT if name in options})
        block_class: type[nn.Module] = getattr(blocks, self.block)
        if "impl" in inspect.signature(block_class).parameters:  # a block without an op has no choice of one
            options["impl"] = impl
        block = block_class(**options, device=device, dtype=dtype)
        return block.to(device=device, dtype=dtype)  # a downsampling path is built without knowing either

    def recognises(self, names: Iterable[str]) -> bool:
        """Whether these are the names of the class: each fits a rule, each rule a name. False where it has no rules."""
        patterns = [_pattern(theirs) + r"[^.]*" for theirs, _, _ in self.names]
        used = [next((pattern for pattern in patterns if re.fullmatch(pattern, name)), None) for name in names]
        return bool(patterns) and {*used} == {*patterns}

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename and reshape tensors with the published names into ours.

        Raises:
            ValueError: A name that the published class does not have.
        """
        if not self.names:
            return dict(state)
        ours: dict[str, Tensor] = {}
        for key, value in state.items():
            for theirs, mine, form in self.names:
                match = re.match(_pattern(theirs), key)
                if match is None:
                    continue
                number, rest = (match.group(1) if match.groups() else ""), key[match.end() :]
                if "." in rest:  # of something else below the same name
                    continue
                if form == "stacked":
                    branches = len({k for k in state if re.fullmatch(_pattern("paths.{i}.conv.weight"), k)})
                    for i, part in enumerate(value.flatten(1).chunk(branches)):
                        ours[mine.replace("{i}", str(i)) + rest] = part
                        ours[mine.replace("{i}", str(i)) + "bias"] = part.new_zeros(len(part))
                else:
                    pointwise = form == "pointwise" and value.dim() == 4
                    ours[mine.replace("{i}", number) + rest] = value.flatten(1) if pointwise else value
                break
            else:
                raise ValueError(f"{self.source}: no parameter or buffer named {key!r}")
        return ours

    def to_theirs(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename and reshape tensors with our names (parameters, gradients, buffers) into the published ones.

        What the published class does not have is left out.
        """
        if not self.names:
            return dict(named)
        theirs: dict[str, Tensor] = {}
        for key, value in named.items():
            for their, mine, form in self.names:
                match = re.match(_pattern(mine), key)
                if match is None:
                    continue
                number, rest = (match.group(1) if match.groups() else ""), key[match.end() :]
                name = their.replace("{i}", number) + rest
                if form == "stacked":
                    if rest == "weight":
                        part = value[..., None, None]
                        theirs[name] = torch.cat([theirs[name], part]) if name in theirs else part
                else:
                    pointwise = form == "pointwise" and value.dim() == 2
                    theirs[name] = value[..., None, None] if pointwise else value
                break
        return theirs

    def to_their_layout(self, output: Tensor) -> Tensor:
        """Our output in the layout that the published class returns."""
        if self.layout == "tokens":
            return output.flatten(2).transpose(1, 2)
        return output.flatten(2) if self.layout == "rows" else output


def _pattern(prefix: str) -> str:
    """Regular expression of a name prefix in which `{i}` stands for a number."""
    return re.escape(prefix).replace(re.escape("{i}"), r"(\d+)")


def find(source: str) -> Published:
    """The entry of a published class.

    Args:
        source: `owner/name:Class`, or the class alone where that is unique.

    Raises:
        ValueError: No such class, or several of that name.
    """
    found = [entry for entry in PUBLISHED if source in (entry.source, entry.name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"checkpoints: {source!r} is ambiguous. Choose from {[entry.source for entry in found]}")
    known = [entry.source for entry in PUBLISHED]
    short = {entry.name.lower(): entry.source for entry in PUBLISHED}
    near = [short[name] for name in difflib.get_close_matches(source.split(":")[-1].lower(), short, cutoff=0.5)]
    raise ValueError(f"checkpoints: unknown published class, got source={source!r}. Choose from {near or known}")


def build(source: str, /, *, channels: int | None = None, **arguments: Any) -> nn.Module:
    """Build our block with the arguments of a published class.

    Args:
        source: `owner/name:Class`, or the class alone where that is unique.
        channels: Channels of the input, for a published class whose constructor does not say (changzy00's CAM).
        **arguments: Keyword arguments of the published class.

    Raises:
        ValueError: Unknown class or argument, or a value that our block cannot honour.

    Example:
        >>> from visattn import checkpoints
        >>> type(checkpoints.build("PSAModule", inplans=32, planes=64)).__name__
        'PyramidSqueezeAttention'
    """
    entry = find(source)
    if channels is not None and "channels" in inspect.signature(entry.options).parameters:
        arguments, channels = {**arguments, "channels": channels}, None
    return entry.build(arguments, channels=channels)


def convert(state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Turn the state dict of a published class into that of our block.

    Args:
        state_dict: Parameters and buffers under the published names.
        source: `owner/name:Class`, or the class alone where that is unique.

    Returns:
        A state dict that the block built by `build` loads strictly. Tensors are not copied.

    Raises:
        ValueError: Unknown class, or a name that it does not have.

    Example:
        >>> import torch
        >>> from visattn import checkpoints
        >>> state = {"alpha": torch.zeros(1), "b.weight": torch.zeros(4, 4, 1, 1)}
        >>> list(checkpoints.convert(state, "changzy00/pytorch-attention:PAM"))
        ['gamma', 'query_conv.weight']
    """
    return find(source).to_ours(state_dict)


# ---- values that stand in a published constructor -------------------------------------------------------------------

_NORMS: dict[str, type[nn.Module]] = {
    "torch.nn.BatchNorm2d": nn.BatchNorm2d,
    "torch.nn.InstanceNorm2d": nn.InstanceNorm2d,
}
_DOWNSAMPLING: dict[str, Callable[..., nn.Module]] = {
    "torch.nn.Sequential": nn.Sequential,
    "torch.nn.Conv2d": nn.Conv2d,
    "torch.nn.BatchNorm2d": nn.BatchNorm2d,
    "torch.nn.AvgPool2d": nn.AvgPool2d,
    "torch.nn.Identity": nn.Identity,
}


def _norm(norm_layer: Any) -> Any:
    """A normalisation layer given as a class or as its dotted name."""
    if not isinstance(norm_layer, str):
        return norm_layer
    if norm_layer not in _NORMS:
        raise ValueError(f"norm_layer: unknown layer, got {norm_layer!r}. Choose from {list(_NORMS)}")
    return _NORMS[norm_layer]


def _only(what: str, value: Any, *allowed: Any) -> None:
    """Raise unless a value is one of those that our block can honour."""
    if value not in allowed:
        raise ValueError(f"{what}={value!r} has no counterpart here, only {' or '.join(map(repr, allowed))}")


def _module(text: Any) -> nn.Module | None:
    """A downsampling path: a module, or the text of one, such as `torch.nn.Sequential(torch.nn.Conv2d(8, 16, 1))`.

    The text is parsed, never evaluated: calls of a few layers, with literal arguments.
    """
    if text is None or isinstance(text, nn.Module):
        return text
    try:
        return _call(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, ValueError, AttributeError, RecursionError, MemoryError) as error:
        raise ValueError(f"downsample: not a path of {list(_DOWNSAMPLING)}, got {text!r} ({error})") from error


def _call(node: ast.expr) -> nn.Module:
    """Build the module of one call in the text of a downsampling path."""
    layer = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    if not isinstance(node, ast.Call) or layer not in _DOWNSAMPLING:
        raise ValueError(f"{ast.unparse(node)} is not one of these layers")
    if layer == "torch.nn.Sequential":
        if node.keywords:
            raise ValueError("torch.nn.Sequential takes no keywords")
        return nn.Sequential(*(_call(argument) for argument in node.args))
    positional = [ast.literal_eval(argument) for argument in node.args]
    keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    return _DOWNSAMPLING[layer](*positional, **keywords)


# ---- published constructors: their names and defaults, our arguments ------------------------------------------------


def _external_tokens(d_model: int, S: int = 64) -> dict[str, Any]:
    return {"dim": d_model, "num_slots": S, "eps": 0.0}


def _external_heads(
    dim: int,
    num_heads: int = 8,
    qkv_bias: bool = False,  # accepted and ignored by their code, as is qk_scale
    qk_scale: float | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
) -> dict[str, Any]:
    return {"dim": dim, "num_heads": num_heads, "num_slots": 64, "attn_drop": attn_drop, "proj_drop": proj_drop}


def _external_map(c: int, norm_layer: Any = "torch.nn.BatchNorm2d") -> dict[str, Any]:
    return {"channels": c, "num_slots": 64, "norm_layer": _norm(norm_layer)}


def _scaled_dot_product(d_model: int, d_k: int, d_v: int, h: int, dropout: float = 0.1) -> dict[str, Any]:
    return {"dim": d_model, "num_heads": h, "head_dim": d_k, "value_dim": d_v, "attn_drop": dropout}


def _simplified_dot_product(d_model: int, h: int, dropout: float = 0.1) -> dict[str, Any]:
    return {"dim": d_model, "num_heads": h, "project": False, "attn_drop": dropout}


def _selective(
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    hidden: int,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of `SelectiveKernel` with a hidden width that is given as a number."""
    return {
        "channels": in_channels,
        "out_channels": out_channels,
        "kernel_size": tuple(kernel_size),
        "min_hidden": hidden,
        "reduction": out_channels,  # out_channels // reduction is 1: min_hidden decides
        **options,
    }


def _sk_attention(
    channel: int = 512,
    kernels: Sequence[int] = (1, 3, 5, 7),
    reduction: int = 16,
    group: int = 1,
    L: int = 32,
) -> dict[str, Any]:
    hidden = max(L, channel // reduction)
    return _selective(channel, channel, kernels, hidden, groups=group, dilated=False, hidden_norm=False, bias=True)


def _sk_layer(inplanes: int, planes: int, groups: int = 32, ratio: int = 16) -> dict[str, Any]:
    return _selective(inplanes, planes, (3, 5), max(planes // ratio, 32), groups=groups, dilated=True, bias=True)


def _sk_conv(
    features: int,
    M: int = 2,
    G: int = 32,
    r: int = 16,
    stride: int = 1,
    L: int = 32,
) -> dict[str, Any]:
    kernels = [3 + 2 * i for i in range(M)]
    hidden = max(int(features / r), L)
    return _selective(features, features, kernels, hidden, groups=G, stride=stride, dilated=True, bias=False)


def _sk_conv_full(
    features: int,
    WH: int,  # ignored by their code
    M: int,
    G: int,
    r: int,
    stride: int = 1,
    L: int = 32,
) -> dict[str, Any]:
    return {**_sk_conv(features, M, G, r, stride, L), "dilated": False, "hidden_norm": False, "bias": True}


def _sk_timm(
    in_channels: int,
    out_channels: int | None = None,
    kernel_size: int | Sequence[int] | None = None,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    rd_ratio: float = 1 / 16,
    rd_channels: int | None = None,
    rd_divisor: int = 8,
    keep_3x3: bool = True,
    split_input: bool = True,
    act_layer: Any = "torch.nn.ReLU",
    norm_layer: Any = "torch.nn.BatchNorm2d",
    aa_layer: Any = None,
    drop_layer: Any = None,
) -> dict[str, Any]:
    _only("split_input", split_input, False)
    _only("act_layer", act_layer, "torch.nn.ReLU", nn.ReLU)
    _only("norm_layer", norm_layer, "torch.nn.BatchNorm2d", nn.BatchNorm2d)
    _only("aa_layer", aa_layer, None)
    _only("drop_layer", drop_layer, None)
    _only("stride", stride, 1, 2)  # they pad a larger stride unevenly
    kernel_size = kernel_size or [3, 5]
    kernels = [kernel_size] * 2 if isinstance(kernel_size, int) else list(kernel_size)
    if keep_3x3:  # a kernel of k is 3x3 with dilation * (k - 1) / 2: that of a wider kernel undilated
        kernels = [dilation * (k - 1) + 1 for k in kernels]
    else:
        _only("dilation (with keep_3x3=False)", dilation, 1)
    width = out_channels or in_channels
    if not rd_channels:  # rounded to a multiple of rd_divisor, but not down by more than a tenth
        wanted = width * rd_ratio
        rd_channels = max(rd_divisor, int(wanted + rd_divisor / 2) // rd_divisor * rd_divisor)
        rd_channels += rd_divisor if rd_channels < 0.9 * wanted else 0
    return _selective(
        in_channels, width, kernels, rd_channels, groups=min(width, groups), stride=stride, dilated=keep_3x3, bias=False
    )


def _position(in_dim: int) -> dict[str, Any]:
    return {"channels": in_dim, "reduction": 8}


def _position_plain(dim: int) -> dict[str, Any]:
    return {"channels": dim, "reduction": 1}


def _channel(in_dim: int) -> dict[str, Any]:
    return {"channels": in_dim, "inverted": True}


def _channel_plain() -> dict[str, Any]:
    return {"channels": None, "inverted": False}


def _dual_head(in_channels: int, out_channels: int, norm_layer: Any) -> dict[str, Any]:
    return {"in_channels": in_channels, "out_channels": out_channels, "drop": 0.1, "norm_layer": _norm(norm_layer)}


def _projected_position(d_model: int = 512, kernel_size: int = 3, H: int = 7, W: int = 7) -> dict[str, Any]:
    return {"channels": d_model, "kernel_size": kernel_size, "attn_drop": 0.1}


def _projected_channel(d_model: int = 512, kernel_size: int = 3, H: int = 7, W: int = 7) -> dict[str, Any]:
    return {"channels": d_model, "feat_size": (H, W), "kernel_size": kernel_size, "attn_drop": 0.1}


def _projected_dual(d_model: int = 512, kernel_size: int = 3, H: int = 7, W: int = 7) -> dict[str, Any]:
    return _projected_channel()  # their class ignores its arguments: always 512 channels, 3x3, 7 x 7


def _pyramid(
    inplans: int,
    planes: int,
    conv_kernels: Sequence[int] = (3, 5, 7, 9),
    stride: int = 1,
    conv_groups: Sequence[int] = (1, 4, 8, 16),
) -> dict[str, Any]:
    kernels, groups = tuple(conv_kernels), tuple(conv_groups)
    return {"channels": inplans, "out_channels": planes, "kernel_size": kernels, "groups": groups, "stride": stride}


def _pyramid_bottleneck(
    inplanes: int,
    planes: int,
    stride: int = 1,
    downsample: Any = None,
    norm_layer: Any = None,
    conv_kernels: Sequence[int] = (3, 5, 7, 9),
    conv_groups: Sequence[int] = (1, 4, 8, 16),
) -> dict[str, Any]:
    return {
        "in_channels": inplanes,
        "channels": planes,
        "stride": stride,
        "downsample": _module(downsample),
        "kernel_size": tuple(conv_kernels),
        "groups": tuple(conv_groups),
        "norm_layer": nn.BatchNorm2d if norm_layer is None else _norm(norm_layer),
    }


def _squeeze_weight(channels: int, reduction: int = 16) -> dict[str, Any]:
    return {"channels": channels, "reduction": reduction}


# ---- the table ------------------------------------------------------------------------------------------------------

_EANET = "MenghaoGuo/EANet"
_XMU = "xmu-xiaoma666/External-Attention-pytorch"
_DANET = "junfu1115/DANet"
_CHANGZY = "changzy00/pytorch-attention"
_EPSANET = "murufeng/EPSANet"

_SK_LAYER_NAMES = (
    ("split_3x3.0.", "convs.0.conv.", "same"),
    ("split_3x3.1.", "convs.0.bn.", "same"),
    ("split_5x5.0.", "convs.1.conv.", "same"),
    ("split_5x5.1.", "convs.1.bn.", "same"),
    ("fc.0.", "fc.", "same"),
    ("fc.1.", "fc_bn.", "same"),
    ("fc1.", "fcs.0.", "same"),
    ("fc2.", "fcs.1.", "same"),
)
_SK_CONV_NAMES = (
    ("convs.{i}.0.", "convs.{i}.conv.", "same"),
    ("convs.{i}.1.", "convs.{i}.bn.", "same"),
    ("fc.0.", "fc.", "pointwise"),
    ("fc.1.", "fc_bn.", "same"),
    ("fcs.{i}.", "fcs.{i}.", "pointwise"),
)
_SK_CONV_FULL_NAMES = (
    ("convs.{i}.0.", "convs.{i}.conv.", "same"),
    ("convs.{i}.1.", "convs.{i}.bn.", "same"),
    ("fc.", "fc.", "same"),
    ("fcs.{i}.", "fcs.{i}.", "same"),
)
_SK_TIMM_NAMES = (
    ("paths.{i}.conv.", "convs.{i}.conv.", "same"),
    ("paths.{i}.bn.", "convs.{i}.bn.", "same"),
    ("attn.fc_reduce.", "fc.", "pointwise"),
    ("attn.bn.", "fc_bn.", "same"),
    ("attn.fc_select.", "fcs.{i}.", "stacked"),
)
_PAM_NAMES = (
    ("alpha", "gamma", "same"),
    ("b.", "query_conv.", "same"),
    ("c.", "key_conv.", "same"),
    ("d.", "value_conv.", "same"),
)

_MULTIHEAD = ("multihead", "dual")
_SK = ("selective_kernel",)

PUBLISHED: tuple[Published, ...] = (
    Published(_EANET, "External_attention", ("external",), "ExternalAttention2d", _external_map),
    Published(_EANET, "Attention", ("external",), "MultiHeadExternalAttention", _external_heads),
    Published(_XMU, "ExternalAttention", ("external",), "ExternalAttention", _external_tokens),
    Published(_XMU, "ScaledDotProductAttention", _MULTIHEAD, "MultiHeadAttention", _scaled_dot_product),
    Published(_XMU, "SimplifiedScaledDotProductAttention", _MULTIHEAD, "MultiHeadAttention", _simplified_dot_product),
    Published(_XMU, "SKAttention", _SK, "SelectiveKernel", _sk_attention),
    Published(_CHANGZY, "SKLayer", _SK, "SelectiveKernel", _sk_layer, _SK_LAYER_NAMES),
    Published("developer0hye/SKNet-PyTorch", "SKConv", _SK, "SelectiveKernel", _sk_conv, _SK_CONV_NAMES),
    Published("pppLang/SKNet", "SKConv", _SK, "SelectiveKernel", _sk_conv_full, _SK_CONV_FULL_NAMES),
    Published("huggingface/pytorch-image-models", "SelectiveKernel", _SK, "SelectiveKernel", _sk_timm, _SK_TIMM_NAMES),
    Published(_DANET, "PAM_Module", ("dual",), "PositionAttention", _position),
    Published(_DANET, "CAM_Module", ("dual",), "ChannelAttention", _channel, fixed={"inverted": True}),
    Published(_DANET, "DANetHead", ("dual",), "DualAttentionHead", _dual_head),
    Published(_CHANGZY, "PAM", ("dual",), "PositionAttention", _position_plain, _PAM_NAMES),
    Published(
        _CHANGZY,
        "CAM",
        ("dual",),
        "ChannelAttention",
        _channel_plain,
        (("beta", "gamma", "same"),),
        fixed={"inverted": False},
    ),
    Published(
        _XMU, "PositionAttentionModule", ("dual",), "ProjectedPositionAttention", _projected_position, layout="tokens"
    ),
    Published(
        _XMU, "ChannelAttentionModule", ("dual",), "ProjectedChannelAttention", _projected_channel, layout="rows"
    ),
    Published(_XMU, "DAModule", ("dual",), "ProjectedDualAttention", _projected_dual),
    Published(_EPSANET, "PSAModule", ("pyramid_squeeze",), "PyramidSqueezeAttention", _pyramid),
    Published(_EPSANET, "SEWeightModule", ("pyramid_squeeze",), "SqueezeWeight", _squeeze_weight),
    Published(_EPSANET, "EPSABlock", ("pyramid_squeeze",), "PyramidSqueezeBottleneck", _pyramid_bottleneck),
)
