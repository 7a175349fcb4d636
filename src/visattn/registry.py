"""Blocks by name: `create`, `list_blocks`, and a card for each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from visattn import blocks
from visattn.blocks import Block
from visattn.errors import check, did_you_mean

__all__ = ["MECHANISMS", "ROLES", "Card", "create", "list_blocks", "resolve"]

MECHANISMS = ("external", "multihead", "selective_kernel", "dual", "pyramid_squeeze")

ROLES = {
    "attention": "map in, map of the same shape out: insert it anywhere",
    "convolution": "takes the place of a convolution: out_channels and stride are options",
    "tokens": "token sequences (B, N, C)",
    "part": "parts of the papers' networks: heads, bottlenecks, gates",
}


@dataclass(frozen=True)
class Card:
    """What the registry knows of a block.

    Attributes:
        name: The key.
        cls: The class `create` builds.
        role: A key of `ROLES`.
        title: The mechanism in words.
        paper: Link to the paper.
        aliases: Short names people search for.
        tokens: The entry that serves token sequences in its stead.
        fixed_size: The constructor needs `feat_size` and the block takes only that map size.
    """

    name: str
    cls: type[Block]
    role: str
    title: str
    paper: str
    aliases: tuple[str, ...] = ()
    tokens: str | None = None
    fixed_size: bool = False


_EA = "https://arxiv.org/abs/2105.02358"
_MHSA = "https://arxiv.org/abs/1706.03762"
_SK = "https://arxiv.org/abs/1903.06586"
_DA = "https://arxiv.org/abs/1809.02983"
_EPSA = "https://arxiv.org/abs/2105.14447"

_CARDS = [
    Card(
        "external",
        blocks.ExternalAttention2d,
        "attention",
        "External attention",
        _EA,
        aliases=("ea",),
        tokens="external_tokens",
    ),
    Card("external_tokens", blocks.ExternalAttention, "tokens", "External attention, tokens", _EA),
    Card(
        "external_heads",
        blocks.MultiHeadExternalAttention,
        "tokens",
        "External attention, multi-head, tokens",
        _EA,
    ),
    Card(
        "multihead",
        blocks.MultiHeadAttention2d,
        "attention",
        "Multi-head self-attention",
        _MHSA,
        aliases=("mhsa",),
        tokens="multihead_tokens",
    ),
    Card("multihead_tokens", blocks.MultiHeadAttention, "tokens", "Multi-head attention, tokens", _MHSA, ("mha",)),
    Card(
        "selective_kernel",
        blocks.SelectiveKernel,
        "convolution",
        "Selective kernel",
        _SK,
        aliases=("sk",),
    ),
    Card("dual", blocks.DualAttention, "attention", "Dual attention", _DA, aliases=("da",)),
    Card(
        "dual_position",
        blocks.PositionAttention,
        "attention",
        "Dual attention, positions alone",
        _DA,
        aliases=("pam",),
    ),
    Card(
        "dual_channel",
        blocks.ChannelAttention,
        "attention",
        "Dual attention, channels alone",
        _DA,
        aliases=("cam",),
    ),
    Card(
        "dual_projected",
        blocks.ProjectedDualAttention,
        "attention",
        "Dual attention, projected form",
        _DA,
        fixed_size=True,
    ),
    Card("dual_head", blocks.DualAttentionHead, "part", "Dual attention, segmentation head", _DA),
    Card(
        "pyramid_squeeze",
        blocks.PyramidSqueezeAttention,
        "convolution",
        "Efficient pyramid squeeze attention",
        _EPSA,
        aliases=("epsa", "psa"),
    ),
    Card(
        "pyramid_squeeze_bottleneck",
        blocks.PyramidSqueezeBottleneck,
        "part",
        "Pyramid squeeze attention, bottleneck",
        _EPSA,
    ),
    Card("squeeze_weight", blocks.SqueezeWeight, "part", "Pyramid squeeze attention, gate", _EPSA),
]

_BY_NAME = {card.name: card for card in _CARDS}
_KEYS = {key: card for card in _CARDS for key in (card.name, *card.aliases)}


def resolve(name: str) -> Card:
    """The card of a name or alias.

    Raises:
        ValueError: Unknown name; the message has the nearest known ones.
    """
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    if key not in _KEYS:
        hint = did_you_mean(key, _KEYS, f"Known: {', '.join(_BY_NAME)}.")
        raise ValueError(f"unknown block {name!r}. {hint}")
    return _KEYS[key]


def create(name: str, *args: Any, **options: Any) -> Block:
    """Build a block by name.

    Args:
        name: A name of `list_blocks` or an alias (`ea`, `mhsa`, `sk`, `da`, `epsa`, ...).
        args: Positional arguments of the class, the channel count first.
        options: Keyword arguments of the class.

    Raises:
        ValueError: Unknown name, or options the class refuses.
        TypeError: An option the class does not have.

    Example:
        >>> create("sk", channels=256)(torch.randn(1, 256, 7, 5)).shape
        torch.Size([1, 256, 7, 5])
    """
    return resolve(name).cls(*args, **options)


def list_blocks(role: str | None = None) -> list[str]:
    """Names of all blocks, or of those of one role.

    Args:
        role: "attention", "convolution", "tokens" or "part".

    Raises:
        ValueError: Unknown role.

    Example:
        >>> list_blocks(role="convolution")
        ['pyramid_squeeze', 'selective_kernel']
    """
    check(role is None or role in ROLES, "list_blocks", f"role must be one of {', '.join(ROLES)}", role=role)
    return sorted(card.name for card in _CARDS if role is None or card.role == role)
