"""Vision attention for PyTorch: proven blocks, inserted without loss, compared on your images."""

from visattn.blocks import (
    Block,
    ChannelAttention,
    DualAttention,
    DualAttentionHead,
    ExternalAttention,
    ExternalAttention2d,
    MultiHeadAttention,
    MultiHeadAttention2d,
    MultiHeadExternalAttention,
    PositionAttention,
    ProjectedChannelAttention,
    ProjectedDualAttention,
    ProjectedPositionAttention,
    PyramidSqueezeAttention,
    PyramidSqueezeBottleneck,
    SelectiveKernel,
    SqueezeWeight,
)
from visattn.capture import capture
from visattn.checkpoints import load_checkpoint
from visattn.inference import fuse
from visattn.registry import create, list_blocks
from visattn.replacement import replace
from visattn.surgery import find_places, insert

__version__ = "0.1.0"

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
    "__version__",
    "capture",
    "create",
    "find_places",
    "fuse",
    "insert",
    "list_blocks",
    "load_checkpoint",
    "replace",
]
