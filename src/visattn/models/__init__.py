"""The papers' whole networks, as recipes over timm backbones; importing this registers the classifiers with timm."""

from visattn.models.classification import (
    epsanet50,
    epsanet50_large,
    epsanet101,
    epsanet101_large,
    sknet26,
    sknet50,
    sknet101,
)
from visattn.models.segmentation import Segmenter, danet, danet50, danet101, eanet, eanet50, eanet101, fcn
from visattn.models.sknet_small import SelectiveKernelUnit, sknet_small

__all__ = [
    "Segmenter",
    "SelectiveKernelUnit",
    "danet",
    "danet50",
    "danet101",
    "eanet",
    "eanet50",
    "eanet101",
    "epsanet50",
    "epsanet50_large",
    "epsanet101",
    "epsanet101_large",
    "fcn",
    "sknet26",
    "sknet50",
    "sknet101",
    "sknet_small",
]
