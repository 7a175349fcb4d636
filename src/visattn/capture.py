"""What every visattn block in a network attends to."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visattn.blocks import Block

__all__ = ["capture"]


def _speaking_blocks(net: nn.Module, prefix: str = "") -> Iterator[tuple[str, Block]]:
    """Blocks that tell their maps; parts of such a block are not asked again."""
    if isinstance(net, Block) and type(net).attention_maps is not Block.attention_maps:
        yield prefix, net
        return
    for name, child in net.named_children():
        yield from _speaking_blocks(child, f"{prefix}.{name}" if prefix else name)


@contextlib.contextmanager
def _spare_buffers(block: Block) -> Iterator[None]:
    """Lend copies of the buffers, since looking must not count as a training step of a batch norm."""
    kept = [(module, dict(module._buffers)) for module in block.modules() if module._buffers]
    for module, buffers in kept:
        module._buffers.update({key: None if value is None else value.clone() for key, value in buffers.items()})
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)


def _watch(
    name: str, maps: dict[str, dict[str, Tensor]], queries: Sequence[tuple[float, float]]
) -> Callable[..., None]:
    def hook(block: Block, args: Any, kwargs: Any, output: Any) -> None:
        call = inspect.signature(block.forward).bind(*args, **kwargs)  # by position: forward may have its own `queries`
        with torch.no_grad(), _spare_buffers(block):
            found = block.attention_maps(*call.args, **call.kwargs, queries=queries)
        maps[name] = {kind: tensor.detach() for kind, tensor in found.items()}

    return hook


@contextlib.contextmanager
def capture(
    net: nn.Module, queries: Sequence[tuple[float, float]] = ((0.5, 0.5),)
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Collect the attention maps of all visattn blocks in a network while it runs.

    The maps are computed apart from the forward pass, so they exist whether a block's implementation is fused or not,
    and nothing is paid outside the context. A compiled network runs uncompiled inside it.

    Args:
        net: Any network.
        queries: Positions whose position-to-position maps are wanted, as (row, column) fractions of height and width.

    Yields:
        Maps by module name and kind, of the latest call of each block:
        "position" (B, heads, Q, H, W), for tokens (B, heads, Q, N): what each query attends to;
        "slot" (B, S, H, W), for tokens (B, S, N): weights over memory slots;
        "channel" (B, C, C): what each channel attends to, or (B, C): its gate;
        "branch" (B, K, C): each channel's weights over branches.

    Raises:
        ValueError: The network has no visattn block, or a query is no pair of fractions in [0, 1].

    Example:
        >>> block = visattn.create("external", 8)
        >>> with capture(block) as maps:
        ...     _ = block(torch.randn(2, 8, 5, 7))
        >>> maps[""]["slot"].shape
        torch.Size([2, 64, 5, 7])
    """
    queries = tuple(queries)
    if not all(isinstance(query, Iterable) and len(tuple(query)) == 2 for query in queries):
        raise ValueError(f"capture: queries must be a list of pairs (row, column), got {queries!r}.")
    if not all(0 <= fraction <= 1 for query in queries for fraction in query):
        raise ValueError(f"capture: queries must be fractions of height and width in [0, 1], got {queries!r}.")
    maps: dict[str, dict[str, Tensor]] = {}
    blocks = dict(_speaking_blocks(net))
    if not blocks:
        raise ValueError("capture: the network has no visattn block. Insert one with visattn.insert.")
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # compiled code would not call the hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, block in blocks.items():
            handle = block.register_forward_hook(_watch(name, maps, queries), with_kwargs=True)
            stack.callback(handle.remove)
        yield maps
