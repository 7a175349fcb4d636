"""The shapes that are measured: one entry each, labels derived from their values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from visattn.blocks import Block
from visattn.errors import UserError, did_you_mean
from visattn.registry import MECHANISMS, create, resolve
from visattn.testing.examples import randomize

__all__ = ["SETS", "Shape", "shapes"]

SETS = ("paper", "small")
GAMMA = 0.5  # of dual attention: at its first value of 0 the work would not show in the output
MASKED = 0.1  # share of the pairs of tokens that a mask takes out
MOST = 64  # inputs in a batch at a size of the user's own
FEW_POSITIONS = 1024  # up to so many a GPU needs a larger batch to be filled


@dataclass(frozen=True)
class Shape:
    """A block at one size of input.

    Attributes:
        block: Its name for `visattn.create`.
        size: (C, H, W) of a map or (N, dim) of tokens, without the batch.
        batch: On a CPU, so that the reference takes tens to hundreds of milliseconds.
        options: Of the constructor, beside the width.
        call: Of "mask" and "weights", what the call is given beside the tokens.
        network: Where the shape is from; by default the block's name and width.
    """

    block: str
    size: tuple[int, ...]
    batch: int
    options: Mapping[str, Any] = field(default_factory=dict)
    call: tuple[str, ...] = ()
    network: str = ""

    @property
    def mechanism(self) -> str:
        """The mechanism that the block belongs to."""
        return next(key for key in MECHANISMS if self.block.startswith(key))

    @property
    def tokens(self) -> bool:
        """Whether the input is tokens, not a map."""
        return len(self.size) == 2

    @property
    def width(self) -> int:
        """Channels of the map or of the tokens."""
        return self.size[1] if self.tokens else self.size[0]

    @property
    def positions(self) -> int:
        """Positions of the map, or tokens."""
        return self.size[0] if self.tokens else self.size[1] * self.size[2]

    @property
    def label(self) -> str:
        """What the shape is called, such as `sknet50.stage2.unit1@56x56/2` or `transformer@196+mask`."""
        where = self.network or f"{self.block}.{self.width}"
        size = str(self.size[0]) if self.tokens else f"{self.size[1]}x{self.size[2]}"
        stride = f"/{self.options['stride']}" if self.options.get("stride", 1) != 1 else ""
        return f"{where}@{size}{stride}" + "".join(f"+{name}" for name in self.call)

    def batch_on(self, device: torch.device | str) -> int:
        """The batch that fills a device."""
        if torch.device(device).type == "cpu":
            return self.batch
        return self.batch * (16 if self.positions <= FEW_POSITIONS else 8)

    def build(
        self,
        *,
        impl: str = "auto",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        batch: int | None = None,
        seed: int = 0,
    ) -> tuple[Block, tuple[Tensor, ...], dict[str, Tensor]]:
        """A block with generic parameters, in eval mode, and the arguments to call it with.

        The numbers depend on the seed alone, up to rounding to `dtype`. They keep every softmax away from its ends.

        Args:
            impl: Implementation of the block.
            dtype: Of parameters and inputs.
            device: Where they are.
            batch: Default `batch_on(device)`.
            seed: Of all numbers.

        Returns:
            The block, its positional and its keyword arguments.
        """
        block = create(self.block, self.width, **self.options, impl=impl, device=device, dtype=dtype)
        randomize(block, seed)
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                if name.rpartition(".")[2] == "gamma":
                    parameter.fill_(GAMMA)
        generator = torch.Generator().manual_seed(seed)
        batch = self.batch_on(device) if batch is None else batch
        x = torch.randn((batch, *self.size), generator=generator) * self._spread
        pairs = (1, 1, self.positions, self.positions)
        keywords: dict[str, Tensor] = {}
        if "mask" in self.call:
            keywords["attention_mask"] = (torch.rand(pairs, generator=generator) < MASKED).to(device)
        if "weights" in self.call:
            keywords["attention_weights"] = torch.rand(pairs, generator=generator).to(device, dtype)
        return block.eval(), (x.to(device, dtype),), keywords

    @property
    def _spread(self) -> float:
        """Standard deviation of the input: where scores are its products with itself, unscaled, it is below 1."""
        own_products = self.block in ("dual", "dual_position", "dual_channel")
        return float(self.positions**-0.25) if own_products else 1.0

    def at(self, height: int, width: int) -> Shape:
        """The same block at another size, the batch chosen for about as many positions in all."""
        positions = height * width
        options = dict(self.options)
        if resolve(self.block).fixed_size:
            options["feat_size"] = (height, width)
        size = (positions, self.width) if self.tokens else (self.width, height, width)
        batch = min(MOST, max(1, round(self.batch * self.positions / positions)))
        return replace(self, size=size, options=options, batch=batch, network="")


_ARTICLE = {"kernel_size": (1, 3, 5, 7), "dilated": False, "groups": 1, "hidden_norm": False, "bias": True}
_STAGES = ((56, 1), (28, 2), (14, 4), (7, 8))  # side of the map and width, in the width of the first stage
_PARTS = {"dual": "danet", "dual_position": "danet.position", "dual_channel": "danet.channel"}


def _paper() -> list[Shape]:
    """The papers' own sizes; the first of a block is also the one that `HxW` changes."""
    return [
        *(Shape("external", (512, side, side), batch, network="eanet") for side, batch in ((65, 2), (32, 8), (14, 32))),
        *(
            Shape("multihead_tokens", (tokens, 512), batch, {"num_heads": 8}, call, network="transformer")
            for tokens, batch in ((196, 16), (1024, 2), (4096, 1))
            for call in ((), ("mask",), ("weights",))
        ),
        *(
            Shape("selective_kernel", (128 * width, side, side), 8, network=f"sknet50.stage{stage}")
            for stage, (side, width) in enumerate(_STAGES, 1)
        ),
        *(
            Shape(
                "selective_kernel",
                (128 * width, 2 * side, 2 * side),
                8,
                {"stride": 2},
                network=f"sknet50.stage{stage}.unit1",
            )
            for stage, (side, width) in enumerate(_STAGES[1:], 2)
        ),
        Shape("selective_kernel", (256, 14, 14), 8, _ARTICLE, network="article.sk"),
        *(
            Shape(part, (512, side, side), batch, network=network)
            for part, network in _PARTS.items()
            for side, batch in ((33, 4), (65, 1), (97, 1))
        ),
        Shape("dual_projected", (512, 7, 7), 32, {"feat_size": (7, 7)}, network="article.dual"),
        *(
            Shape("pyramid_squeeze", (64 * width, side, side), 8, network=f"epsanet50.stage{stage}")
            for stage, (side, width) in enumerate(_STAGES, 1)
        ),
    ]


def _small() -> list[Shape]:
    """Every block of the papers' shapes at one size that takes no time."""
    firsts = {shape.block: shape for shape in reversed(_paper())}
    narrow = (replace(shape, size=(7 * 5, 64) if shape.tokens else (64, 7, 5), network="") for shape in firsts.values())
    return [replace(shape.at(7, 5), batch=2) for shape in reversed(list(narrow))]


def shapes(which: str = "paper", names: Iterable[str] = ()) -> list[Shape]:
    """The shapes to measure.

    Args:
        which: "paper", "small", or map sizes such as "56x56,28x28" for the first shape of each mechanism.
        names: Mechanisms, aliases or blocks; all if empty.

    Raises:
        UserError: Unknown names, blocks that no shape is of, or sizes that are none.

    Example:
        >>> [shape.label for shape in shapes("paper", ["external"])]
        ['eanet@65x65', 'eanet@32x32', 'eanet@14x14']
    """
    chosen = _named(_small() if which == "small" else _paper(), list(names))
    if which in SETS:
        return chosen
    sizes = [map_size(word.strip(), which) for word in which.split(",")]
    firsts: dict[str, Shape] = {}
    for shape in chosen:
        firsts.setdefault(shape.mechanism, shape)
    return [shape.at(height, width) for shape in firsts.values() for height, width in dict.fromkeys(sizes)]


def map_size(word: str, which: str) -> tuple[int, int]:
    """A map size written as HxW.

    Args:
        word: The size.
        which: All that was given, for the message.

    Raises:
        UserError: It is none, or far too large.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", word)
    if match is None:
        known = f"{', '.join(SETS)} or map sizes such as 56x56,28x28"
        raise UserError(f"unknown shapes {which!r}. Choose from {known}")
    height, width = int(match[1]), int(match[2])
    if math.log2(height * width) > 24:
        raise UserError(f"a map of {word} has more than 2**24 positions. Choose a smaller one")
    return height, width


def _named(all_shapes: Sequence[Shape], names: Sequence[str]) -> list[Shape]:
    """The shapes of these mechanisms, aliases or blocks."""
    known = list(dict.fromkeys([*(s.mechanism for s in all_shapes), *(s.block for s in all_shapes)]))
    wanted = set()
    for name in names:
        try:
            key = resolve(name).name
        except ValueError as error:
            hint = did_you_mean(name, known, f"Choose from {', '.join(known)}")
            raise UserError(f"unknown block {name!r}. {hint}") from error
        if key not in known:
            raise UserError(f"no shape of block {key!r} is measured. Choose from {', '.join(known)}")
        wanted.add(key)
    return [shape for shape in all_shapes if not wanted or {shape.block, shape.mechanism} & wanted]
