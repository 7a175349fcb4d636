"""An example of every registered block, built from its signature so that a new block needs no entry."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from visattn.blocks import Block
from visattn.registry import resolve

__all__ = ["CHANNELS", "FEAT_SIZE", "example", "example_input", "randomize", "required_arguments"]

CHANNELS = 64  # the least that pyramid squeeze attention takes
FEAT_SIZE = (5, 7)
_REQUIRED: dict[str, Any] = {
    "channels": CHANNELS,
    "in_channels": CHANNELS,
    "dim": CHANNELS,
    "out_channels": 5,
    "feat_size": FEAT_SIZE,
}


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and buffer a generic value, so that no zero gate or unit norm hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                fan_in = max(1, tensor[0].numel()) if tensor.ndim > 1 else 4
                tensor.copy_(values / fan_in**0.5)
        for name, tensor in module.named_buffers():
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return module


def required_arguments(cls: type[Block]) -> dict[str, Any]:
    """Small values for the arguments that have no default."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: _REQUIRED[p.name] for p in parameters if p.default is p.empty and p.name != "self"}


def example(name: str, **options: Any) -> Block:
    """The block of that name at small sizes, with generic parameters, in eval mode."""
    cls = resolve(name).cls
    block = cls(**{**required_arguments(cls), **options})
    randomize(block)
    return block.eval()


def example_input(
    name: str, batch: int = 2, size: tuple[int, int] = FEAT_SIZE, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """A standard normal map (batch, 64, *size), or the tokens of that many positions."""
    generator = torch.Generator().manual_seed(seed)
    tokens = resolve(name).role == "tokens"
    shape = (batch, size[0] * size[1], CHANNELS) if tokens else (batch, CHANNELS, *size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
