"""An inference copy of a network: norms folded, small matrices multiplied, the same function."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visattn.blocks import Block
from visattn.blocks.base import folded, has_hooks
from visattn.errors import check

__all__ = ["FoldedNorm", "fuse"]

# Of these exact classes alone is it known what they compute. A linear layer is missing: what follows (B, N, C) norms N.
_PAIRS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.Conv1d: (nn.BatchNorm1d, nn.SyncBatchNorm),
    nn.Conv2d: (nn.BatchNorm2d, nn.SyncBatchNorm),
    nn.Conv3d: (nn.BatchNorm3d, nn.SyncBatchNorm),
}


class FoldedNorm(nn.Module):
    """What is left of timm's norm with an activation inside once its norm went into the convolution before it.

    Args:
        drop: Applied first.
        act: Applied last.
    """

    def __init__(self, drop: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.drop, self.act = drop, act
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """`act(drop(x))`."""
        out: Tensor = self.act(self.drop(x))
        return out


class _Tracer(fx.Tracer):
    """Looks at one module's own forward: what it calls is not entered, except plain sequences."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not _is_sequence(module) or has_hooks(module)


def _is_sequence(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward


def _is_norm_with_act(module: nn.Module) -> bool:
    layers = sys.modules.get("timm.layers.norm_act")  # not imported, no module can be of its class
    return layers is not None and type(module) is layers.BatchNormAct2d


def _fit(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the two can be one, seen by themselves."""
    if has_hooks(conv) or has_hooks(norm):
        return False
    norms = _PAIRS.get(type(conv), ())
    if type(norm) not in norms and not (type(conv) is nn.Conv2d and _is_norm_with_act(norm)):
        return False
    return (
        isinstance(norm, _BatchNorm)
        and norm.running_mean is not None
        and norm.running_var is not None
        and norm.num_features == conv.out_channels
    )


def _inner(net: nn.Module) -> Iterator[nn.Module]:
    """All modules outside of blocks, each once, outer ones first."""
    seen, waiting = set(), [net]
    while waiting:
        module = waiting.pop(0)
        if id(module) in seen or isinstance(module, Block):
            continue
        seen.add(id(module))
        yield module
        waiting += [child for child in module._modules.values() if child is not None]


def _held_aside(net: nn.Module) -> set[nn.Module]:
    """Modules that another one keeps under a plain attribute too, in a list for example, where they may be called."""
    held: set[nn.Module] = set()
    for module in net.modules():
        waiting: list[Any] = [value for key, value in vars(module).items() if key != "_modules"]
        while waiting:
            value = waiting.pop()
            if isinstance(value, nn.Module):
                held.add(value)
            elif isinstance(value, dict):
                waiting += value.values()
            elif isinstance(value, list | tuple | set):
                waiting += value
    return held


def _graphs(module: nn.Module) -> list[fx.Graph]:
    """A module's forward with all arguments given, and with the optional ones left out; none where fx cannot say."""
    tensors: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    try:
        parameters = inspect.signature(type(module).forward).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # What a forward pass leaves behind on the module must not stay: it is done by copies that share weights.
            graphs = [_Tracer().trace(copy.deepcopy(module, dict(tensors)))]
            if defaults:
                graphs.append(_Tracer().trace(copy.deepcopy(module, dict(tensors)), concrete_args=defaults))
    except Exception:  # the forward pass of anybody: it may raise whatever it likes
        return []
    return graphs


def _pairs_of(graph: fx.Graph, at: dict[str, nn.Module]) -> tuple[set[tuple[nn.Module, nn.Module]], set[nn.Module]]:
    """Convolutions whose output one norm alone takes, each called once; and all modules that the graph uses."""
    nodes: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            nodes.setdefault(at[str(node.target)], []).append(node)
        elif node.op == "get_attr":  # a parameter is read by itself, so the module is used in two ways
            name = str(node.target).rpartition(".")[0]
            owner = at.get(name)
            if owner is not None and name:  # not the one whose forward this is
                nodes.setdefault(owner, []).extend([node, node])
    pairs = set()
    for conv, calls in nodes.items():
        users = list(calls[0].users)
        if len(calls) != 1 or len(users) != 1 or users[0].op != "call_module":
            continue
        norm = at[str(users[0].target)]
        if len(nodes[norm]) == 1 and users[0].args == (calls[0],) and not users[0].kwargs and _fit(conv, norm):
            pairs.add((conv, norm))
    return pairs, set(nodes)


def _pairs(net: nn.Module) -> set[tuple[nn.Module, nn.Module]]:
    """Convolutions and norms of a network that may become one, told from the forward of every module around them."""
    places: dict[nn.Module, int] = {}
    for module in _inner(net):
        for child in module._modules.values():
            if child is not None:
                places[child] = places.get(child, 0) + 1
    barred = _held_aside(net) | {child for child, count in places.items() if count > 1}
    found: set[tuple[nn.Module, nn.Module]] = set()
    entered: set[nn.Module] = set()
    for module in _inner(net):  # outer ones first: they know what becomes of the parts of a sequence
        known = module in entered and places[module] == 1
        if known or not any(isinstance(child, _BatchNorm) for child in module.modules()):
            continue
        at = dict(module.named_modules(remove_duplicate=False))
        seen = [_pairs_of(graph, at) for graph in _graphs(module)]
        if not seen:
            continue
        pairs = set.intersection(*(pairs for pairs, _ in seen))
        used = set().union(*(used for _, used in seen))
        found |= pairs
        barred |= used - {part for pair in pairs for part in pair}
        entered |= {part for part in at.values() if _is_sequence(part) and used & ({*part.modules()} - {part})}
    return {pair for pair in found if barred.isdisjoint(pair)}


def _rest(norm: nn.Module) -> nn.Module:
    """What is left to do where the norm was."""
    if _is_norm_with_act(norm):
        return FoldedNorm(norm.get_submodule("drop"), norm.get_submodule("act"))
    return nn.Identity().eval()


def _fold_norms(net: nn.Module) -> None:
    """Make batch norms part of the convolutions before them."""
    gone: dict[nn.Module, nn.Module] = {}
    for conv, norm in _pairs(net):
        weight, bias = folded(conv.weight, conv.bias, norm)  # type: ignore[arg-type]
        if bool(weight.isfinite().all()) and bool(bias.isfinite().all()):  # float16 has an end
            conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
            gone[norm] = _rest(norm)
    for module in _inner(net):
        for name, child in module._modules.items():
            if child in gone:
                module._modules[name] = gone[child]


def _fused(block: Block) -> nn.Module:
    """The fused form of a block that is known to be what its class says: no hooks, no subclass that changes it."""
    known = "fused" in vars(type(block)) and not any(has_hooks(module) for module in block.modules())
    return block.fused() if known else block


def _fuse_blocks(net: nn.Module) -> nn.Module:
    """Replace every outermost block."""
    if isinstance(net, Block):
        return _fused(net)
    done: dict[nn.Module, nn.Module] = {}
    for module in list(_inner(net)):
        for name, child in module._modules.items():
            if isinstance(child, Block):
                if child not in done:
                    done[child] = _fused(child)
                module._modules[name] = done[child]
    return net


def _train(net: nn.Module, mode: bool = True) -> nn.Module:
    """`train` of a fused network."""
    check(not mode, "fuse", "fused networks are for inference", remedy="Train the original.", mode=mode)
    return type(net).train(net, mode)


def _check_evaluating(net: nn.Module) -> None:
    for name, module in net.named_modules():
        parts = module.modules() if isinstance(module, Block) else [module] if isinstance(module, _BatchNorm) else []
        training = net.training or any(part.training for part in parts)
        got = {"training": training, "module": f"{name or 'net'} ({type(module).__name__})"}
        check(not training, "fuse", "the network must be in eval mode", remedy="Call net.eval() first.", **got)
        compiled = type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        remedy = "Compile what fuse returns."
        check(not compiled, "fuse", "the network must not be compiled yet", remedy=remedy, module=got["module"])


def fuse(net: nn.Module) -> nn.Module:
    """An inference copy of a network: equal outputs, fewer and smaller operations, nothing left to train.

    Every visattn block is replaced by its fused form: norms are part of the convolutions before them, small matrices
    are multiplied, linear layers on the same input are one. Of the network around them, batch norms become part of the
    convolutions whose output they alone take; timm's norms keep their activation. A pair is left as it is where the
    forward passes do not show that it is one: something with a hook or a parametrisation, used twice, or held in two
    places; transposed convolutions; linear layers. Where torch.fx cannot follow a forward pass, pairs within
    `torch.nn.Sequential` are found all the same.

    Modules are taken to be called as modules, not by other methods or part by part, with optional arguments left out or
    given as a whole; a branch on the type of a tensor is not seen. Compare outputs once where a network does such
    things.

    The result can be copied, pickled, compiled and exported. Fused blocks know no `impl`, and `visattn.capture` does
    not see them: look at the original. Subclasses of blocks, and blocks with hooks, stay as they are.

    Args:
        net: The network in eval mode, not compiled; it is not changed.

    Returns:
        The copy, without gradients of parameters; it refuses `train()`.

    Raises:
        ValueError: Not a module, one that is compiled, or one whose blocks or batch norms are in training mode.

    Example:
        >>> block = visattn.create("sk", 64).eval()
        >>> fused = fuse(block)
        >>> x = torch.randn(2, 64, 5, 7)
        >>> bool(((fused(x) - block(x)).abs() < 1e-5).all())
        True
    """
    check(isinstance(net, nn.Module), "fuse", "net must be a torch.nn.Module", net=type(net).__name__)
    _check_evaluating(net)
    fused = copy.deepcopy(net)
    with torch.no_grad():
        _fold_norms(fused)
        fused = _fuse_blocks(fused)
    fused.requires_grad_(False)
    fused.__dict__["train"] = functools.partial(_train, fused)
    return fused
