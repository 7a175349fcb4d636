"""A block at one shape in one mode, ready to run: what is checked, counted and timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import visattn
from visattn.benchmarks.registry import Shape

__all__ = ["MODES", "Contender", "Task", "compiled", "fused"]

MODES = ("inference", "training")
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Task:
    """What a contender has to do.

    Attributes:
        shape: The shape.
        mode: "inference" is a forward pass in eval mode; "training" one in training mode and the backward pass to
            the input and all parameters.
        dtype: Of parameters and inputs.
        device: Where.
        state: Parameters and buffers.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        cotangent: The gradient that the backward pass starts from.
    """

    shape: Shape
    mode: str
    dtype: torch.dtype
    device: torch.device
    state: State
    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    cotangent: Tensor

    @classmethod
    def of(cls, shape: Shape, mode: str, dtype: torch.dtype, device: torch.device) -> Task:
        """The numbers of a shape."""
        block, args, kwargs = shape.build(impl="reference", dtype=dtype, device=device)
        if mode == "training":
            _leave_kinks(block, 10.0 if shape.block == "external" else 1.5)  # external adds its input, far from 0 too
        with torch.inference_mode():
            out = block(*args, **kwargs)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        state = {name: value.clone() for name, value in block.state_dict().items()}
        return cls(shape, mode, dtype, device, state, args, kwargs, cotangent)

    def map(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Task:
        """The same task with other numbers.

        Args:
            change: What becomes of each tensor of floating-point numbers.
            dtype: Their type afterwards.
        """

        def new(tensor: Tensor) -> Tensor:
            return change(tensor) if tensor.is_floating_point() else tensor

        return Task(
            self.shape,
            self.mode,
            dtype,
            self.device,
            {name: new(value) for name, value in self.state.items()},
            tuple(new(x) for x in self.args),
            {name: new(x) for name, x in self.kwargs.items()},
            new(self.cotangent),
        )

    @property
    def moved(self) -> int:
        """Bytes that must move: inputs, parameters and output; in training also the gradients of them all."""
        parameters = [value for name, value in self.state.items() if not name.endswith(("running_mean", "running_var"))]
        differentiable = [*self.args, self.cotangent, *(p for p in parameters if p.is_floating_point())]
        size = sum(x.numel() * x.element_size() for x in differentiable)
        given = sum(x.numel() * x.element_size() for x in self.kwargs.values())
        return given + size * (2 if self.mode == "training" else 1)


def _leave_kinks(block: nn.Module, bias: float) -> None:
    """Move what batch norms give to ReLUs away from 0, half the channels to either side.

    Among millions of values some lie within rounding of 0. There the derivative is that of either side, by chance, and
    one such value moves gradients by far more than any rounding: no precision could be asked of them.
    """
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.copy_(bias * module.bias.sign())
                module.weight.copy_(0.1 * bias * module.weight.sign())


class Contender:
    """One way to do a task.

    Args:
        name: Its name in the table.
        task: The task; its state and inputs are loaded.
        impl: Implementation of the block.
        wrap: What becomes of the block before it runs.
        rewrap: The block is to be wrapped again when its numbers change.
    """

    def __init__(
        self,
        name: str,
        task: Task,
        impl: str,
        wrap: Callable[[nn.Module], Callable[..., Tensor]] = lambda block: block,
        *,
        rewrap: bool = False,
    ) -> None:
        self.name, self.wrap, self.rewrap, self.runs = name, wrap, rewrap, 0
        self.block, _, _ = task.shape.build(impl=impl, dtype=task.dtype, device=task.device, batch=1)
        self._take(task)
        self.call = wrap(self.block)

    def load(self, task: Task) -> None:
        """Take the numbers of a task of the same shape and mode."""
        self._take(task)
        if self.rewrap:
            self.call = self.wrap(self.block)

    def _take(self, task: Task) -> None:
        self.task = task
        self.block.load_state_dict(dict(task.state))
        training = task.mode == "training"
        self.block.train(training)
        self.args = tuple(x.detach().requires_grad_(training) for x in task.args)

    @property
    def parameters(self) -> int:
        """Trained values."""
        return sum(p.numel() for p in self.block.parameters())

    def prepare(self) -> None:
        """Forget gradients."""
        for tensor in (*self.args, *self.block.parameters()):
            tensor.grad = None

    def run(self) -> Tensor:
        """Do the task once."""
        self.runs += 1
        if self.task.mode == "inference":
            with torch.inference_mode():
                return self.call(*self.args, **self.task.kwargs)
        out = self.call(*self.args, **self.task.kwargs)
        torch.autograd.backward(out, self.task.cotangent)
        return out

    def results(self) -> dict[str, Tensor]:
        """What a run gives: the output and, in training, all gradients and the buffers it updates; on the CPU."""
        self.prepare()
        found: dict[str, Any] = {"output": self.run()}
        if self.task.mode == "training":
            found |= {f"gradient of input {i}": x.grad for i, x in enumerate(self.args)}
            found |= {f"gradient of {name}": p.grad for name, p in self.block.named_parameters()}
            found |= {name: b for name, b in self.block.named_buffers() if b.is_floating_point()}
        missing = [name for name, value in found.items() if value is None]
        if missing:
            raise ValueError(f"no {missing[0]}")
        arrays = {name: value.detach().cpu().clone() for name, value in found.items()}
        self.prepare()
        return arrays


def compiled(task: Task) -> Contender:
    """The reference through `torch.compile`, compiled for this shape alone."""
    torch.compiler.reset()  # the compiler keeps few variants of one class and then gives up in silence
    return Contender("compiled", task, "reference", lambda block: torch.compile(block, dynamic=False))


def fused(task: Task) -> Contender:
    """The package's inference copy of the block."""
    return Contender("fused", task, "auto", visattn.fuse, rewrap=True)
