"""The mechanisms as modules, one file per paper."""

from visattn.blocks.base import Block
from visattn.blocks.dual import ChannelAttention, DualAttention, DualAttentionHead, PositionAttention
from visattn.blocks.dual_projected import (
    ProjectedChannelAttention,
    ProjectedDualAttention,
    ProjectedPositionAttention,
)
from visattn.blocks.external import ExternalAttention, ExternalAttention2d, MultiHeadExternalAttention
from visattn.blocks.multihead import MultiHeadAttention, MultiHeadAttention2d
from visattn.blocks.pyramid_squeeze import PyramidSqueezeAttention, PyramidSqueezeBottleneck, SqueezeWeight
from visattn.blocks.selective_kernel import SelectiveKernel

__all__ = [
    "Block",
    "ChannelAttention",
    "DualAttention",
    "DualAttentionHead",
    "ExternalAttention",
    "ExternalAttention2d",
    "MultiHeadAttention",
    "MultiHeadAttention2d",
    "MultiHeadExternalAttention",
    "PositionAttention",
    "ProjectedChannelAttention",
    "ProjectedDualAttention",
    "ProjectedPositionAttention",
    "PyramidSqueezeAttention",
    "PyramidSqueezeBottleneck",
    "SelectiveKernel",
    "SqueezeWeight",
]
