"""SKNet and EPSANet: ResNets of timm whose 3x3 convolutions became selective kernels or pyramid squeeze attention.

Papers: Selective Kernel Networks, https://arxiv.org/abs/1903.06586
EPSANet: An Efficient Pyramid Squeeze Attention Block on CNN, https://arxiv.org/abs/2105.14447
Published code compared with:
https://github.com/developer0hye/SKNet-PyTorch at f78ea0c8e9394a77e58b33b228a4209186a6ad9e (sknet.py),
https://github.com/murufeng/EPSANet at 9955041a1db4591fae080d2e6edb25e2a2914d47 (models/epsanet.py)

Every function takes timm's arguments (`num_classes`, `in_chans`, `drop_rate`, `output_stride`, `features_only`,
`out_indices`, ...) and is registered under its name: `timm.create_model("epsanet50", num_classes=10)`. The networks are
timm's `ResNet`, so they take any input of at least 32x32, and `forward_features`, `forward_intermediates`,
`reset_classifier` and gradient checkpointing work. Initialisation is timm's, which is that of EPSANet's authors;
`zero_init_last=True` starts every residual branch at zero, which neither paper does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from visattn.errors import require
from visattn.replacement import replace

__all__ = [
    "epsanet50",
    "epsanet50_large",
    "epsanet101",
    "epsanet101_large",
    "sknet26",
    "sknet50",
    "sknet101",
]

_models = require("timm.models", extra="compare", purpose="visattn.models")

default_cfgs = _models.generate_default_cfgs(  # timm looks for this name
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for name in __all__
    }
)


def _resnet(
    name: str, base: str, block: str, pretrained: bool, timm_options: dict[str, Any], **block_options: Any
) -> nn.Module:
    """A ResNet of timm with blocks in place of its 3x3 convolutions."""
    if pretrained:
        raise ValueError(
            f"{name}: there are no weights to download, got pretrained=True. Load a file with visattn.load_checkpoint."
        )
    given = {"zero_init_last": False, **timm_options}
    config = given.pop("pretrained_cfg", None) or _models.get_pretrained_cfg(name)
    net: nn.Module = _models.create_model(base, **given)
    replace(net, block, at="layer*.conv2", **block_options)
    config = config if isinstance(config, dict) else config.to_dict()
    net.pretrained_cfg = net.default_cfg = config  # type: ignore[assignment]  # what timm keeps there
    return net


def sknet26(pretrained: bool = False, **options: Any) -> nn.Module:
    """SKNet-26: ResNeXt with 32 groups and (2, 2, 2, 2) units, their 3x3 convolutions selective kernels.

    Args:
        pretrained: Has to be False: nobody published weights that fit.
        options: As of timm's `resnext50_32x4d`.

    Example:
        >>> import torch
        >>> sknet26(num_classes=10)(torch.randn(1, 3, 32, 37)).shape
        torch.Size([1, 10])
    """
    return _resnet("sknet26", "resnext50_32x4d", "selective_kernel", pretrained, {"layers": (2, 2, 2, 2), **options})


def sknet50(pretrained: bool = False, **options: Any) -> nn.Module:
    """SKNet-50: 27.5 M parameters, as published. Arguments as of `sknet26`."""
    return _resnet("sknet50", "resnext50_32x4d", "selective_kernel", pretrained, options)


def sknet101(pretrained: bool = False, **options: Any) -> nn.Module:
    """SKNet-101: 48.9 M parameters, as published. Arguments as of `sknet26`."""
    return _resnet("sknet101", "resnext101_32x4d", "selective_kernel", pretrained, options)


def epsanet50(pretrained: bool = False, **options: Any) -> nn.Module:
    """EPSANet-50, the small one: ResNet-50 whose 3x3 convolutions are pyramid squeeze attention.

    Args:
        pretrained: Has to be False: the authors published no weights.
        options: As of timm's `resnet50`.

    Example:
        >>> import torch
        >>> epsanet50(num_classes=10)(torch.randn(1, 3, 32, 37)).shape
        torch.Size([1, 10])
    """
    return _resnet("epsanet50", "resnet50", "pyramid_squeeze", pretrained, options)


def epsanet101(pretrained: bool = False, **options: Any) -> nn.Module:
    """EPSANet-101, the small one. Arguments as of `epsanet50`."""
    return _resnet("epsanet101", "resnet101", "pyramid_squeeze", pretrained, options)


_LARGE = (3, 5, 5, 7)


def _large(
    name: str, base: str, pretrained: bool, kernel_size: Sequence[int], timm_options: dict[str, Any]
) -> nn.Module:
    """Twice the width, 32 groups at every scale."""
    groups = (32,) * len(kernel_size)
    timm_options = {"base_width": 128, **timm_options}
    return _resnet(
        name, base, "pyramid_squeeze", pretrained, timm_options, kernel_size=tuple(kernel_size), groups=groups
    )


def epsanet50_large(pretrained: bool = False, *, kernel_size: Sequence[int] = _LARGE, **options: Any) -> nn.Module:
    """EPSANet-50, the large one: widths 128 to 1,024, 32 groups.

    The paper describes kernels (3, 5, 7, 9), which come to 30.10 M parameters; the 27.90 M it publishes are those of
    (3, 5, 5, 7), which is therefore the default. The authors' code has the small networks alone.

    Args:
        pretrained: Has to be False: the authors published no weights.
        kernel_size: Of the four scales.
        options: As of timm's `resnet50`.
    """
    return _large("epsanet50_large", "resnet50", pretrained, kernel_size, options)


def epsanet101_large(pretrained: bool = False, *, kernel_size: Sequence[int] = _LARGE, **options: Any) -> nn.Module:
    """EPSANet-101, the large one: 49.59 M parameters as published, 53.74 M with the kernels of the paper's text.

    Arguments as of `epsanet50_large`.
    """
    return _large("epsanet101_large", "resnet101", pretrained, kernel_size, options)


for _entry_point in (sknet26, sknet50, sknet101, epsanet50, epsanet101, epsanet50_large, epsanet101_large):
    _models.register_model(_entry_point)
