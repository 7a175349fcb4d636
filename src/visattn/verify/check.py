"""One recorded case against our block: build it, run it, compare everything that was recorded."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from visattn import blocks
from visattn.checkpoints import PUBLISHED, Published
from visattn.testing.tolerance import FLOAT64_TOLERANCE, NEIGHBOURS, budget_used, deviation, nudge, relative_error
from visattn.verify.cases import Case

__all__ = ["GROUPS", "Result", "check_case", "group_of", "implementations", "skip_reason"]

GROUPS = ("outputs", "input_gradients", "parameter_gradients", "buffers")

Arrays = dict[str, Tensor]


@dataclass
class Result:
    """What came of one case.

    Attributes:
        case: The case.
        verdict: "passed", "failed" or "skipped".
        reasons: Why it failed or was skipped; empty if it passed.
        notes: What else to know, such as what we give where published code gives NaN.
        errors: Array name -> largest relative error in the precision under test.
        float64_errors: The same of the float64 check, which is part of every check.
        budget_used: Array name -> share of the permitted deviation used, below float64.
    """

    case: Case
    verdict: str = "passed"
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    float64_errors: dict[str, float] = field(default_factory=dict)
    budget_used: dict[str, float] = field(default_factory=dict)

    def largest(self, group: str) -> float | None:
        """Largest relative error of the arrays of a group; None if there are none."""
        return max((error for name, error in self.errors.items() if group_of(name) == group), default=None)

    def fail(self, reason: str) -> None:
        """Note a reason for failing."""
        self.verdict = "failed"
        self.reasons.append(reason)


def group_of(name: str) -> str | None:
    """Which of `GROUPS` a recorded array belongs to; None if the format has no array of that name."""
    prefixes = {"out": "outputs", "grad_": "input_gradients", "grad:": "parameter_gradients", "buffer:": "buffers"}
    return next((group for prefix, group in prefixes.items() if name.startswith(prefix)), None)


# ---- which cases are checked, and by what ---------------------------------------------------------------------------

_NETWORKS = {"EANet": "external", "DANet": "dual", "SKNet26": "selective_kernel", "epsanet50": "pyramid_squeeze"}


def skip_reason(case: Case, mechanisms: Iterable[str]) -> str | None:
    """Why a case is not checked; None if it is.

    Args:
        case: The case.
        mechanisms: The mechanisms that visattn has.
    """
    name, mechanism = case.source["class"], case.mechanism
    if mechanism not in mechanisms:
        return f"visattn has no mechanism {mechanism!r} yet"
    if _NETWORKS.get(name) == mechanism:
        return f"{name} is a whole network: visattn verify --networks checks it"
    if mechanism != "selective_kernel":
        return None
    if name == "SKUnit":
        return "SKUnit is the unit of a network: visattn verify --networks checks it"
    if name == "Bottleneck" and case.source["repo"] == "implus/PytorchInsight":
        return "a residual unit whose branches are two 3x3 convolutions, not the paper's selective kernel"
    if name == "SelectiveKernel" and case.constructor.get("split_input", True) is True:
        return "split_input=True (the default there) gives each branch a part of the input; no such block here"
    return None


def _published(case: Case) -> Published:
    """The entry that serves a case.

    Raises:
        ValueError: None does.
    """
    name = case.source["class"]
    entries = [entry for entry in PUBLISHED if entry.name == name and case.mechanism in entry.mechanisms]
    if not entries:
        raise ValueError(f"no block of {case.mechanism!r} stands for the published class {name!r}")
    same_repo = [entry for entry in entries if entry.repo == case.source["repo"]]
    fitting = [entry for entry in entries if entry.accepts(case.constructor)]
    return (same_repo or fitting or entries)[0]


# ---- one run --------------------------------------------------------------------------------------------------------


def _arguments(case: Case, inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Positional and keyword arguments of the recorded call, such as `module(x, x, x, attention_mask=m)`."""
    call = case.meta["forward"]["call"]
    try:
        node = ast.parse(call, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        node = None
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id != "module":
        raise ValueError(f"call {call!r} is not of the form module(input, ..., name=input, ...)")
    used = [*node.args, *(keyword.value for keyword in node.keywords)]
    names = [argument.id for argument in used if isinstance(argument, ast.Name)]
    if len(names) < len(used) or set(names) != set(inputs) or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError(f"call {call!r} does not use exactly the inputs {list(inputs)}")
    positional = [inputs[name] for name in names[: len(node.args)]]
    keywords = {str(k.arg): inputs[name] for k, name in zip(node.keywords, names[len(node.args) :], strict=True)}
    return positional, keywords


class _Run:
    """What one implementation gives for a case in one precision.

    Args:
        case: The case.
        impl: Implementation of the block.
        device: Where it runs.
        dtype: Precision it runs in.
        rounded_to: Round inputs, state and cotangents to this precision first.
        neighbour: Run on neighbouring inputs and state instead: which of them.
    """

    def __init__(
        self,
        case: Case,
        impl: str,
        device: torch.device,
        dtype: torch.dtype,
        rounded_to: torch.dtype = torch.float64,
        neighbour: int | None = None,
    ) -> None:
        def tensor(array: Any) -> Tensor:
            value = torch.from_numpy(np.ascontiguousarray(array).reshape(np.shape(array)))
            if neighbour is not None:
                value = nudge(value, rounded_to, neighbour)
            return value.to(rounded_to).to(device, dtype) if value.is_floating_point() else value.to(device)

        self.published = _published(case)
        inputs = {name: tensor(array) for name, array in case.inputs.items()}
        for value in inputs.values():
            value.requires_grad_(value.is_floating_point())
        first = next(iter(inputs.values()))
        channels = first.shape[1] if first.ndim > 1 else None
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            block = self.published.build(
                case.constructor, channels=channels, dropout=False, impl=impl, device=device, dtype=dtype
            )
        block.load_state_dict(self.published.to_ours({name: tensor(array) for name, array in case.state.items()}))
        block.train(case.training)

        self.bound = _bind(block, *_arguments(case, inputs))
        outputs = block(*self.bound.args, **self.bound.kwargs)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        if len(outputs) != len(case.output_names):
            raise ValueError(f"{len(outputs)} outputs, the recording has {len(case.output_names)}")
        outputs = [self.published.to_their_layout(output) for output in outputs]
        self.arrays: Arrays = dict(zip(case.output_names, outputs, strict=True))
        cotangents = {name: tensor(array) for name, array in _cotangents(case).items()}
        self._differentiate(block, inputs, cotangents)
        buffers = self.published.to_theirs(dict(block.named_buffers()))
        self.arrays |= {f"buffer:{name}": value for name, value in buffers.items()}
        self.arrays = {name: value.detach().cpu() for name, value in self.arrays.items()}

    def _differentiate(self, block: nn.Module, inputs: Arrays, cotangents: Arrays) -> None:
        """Gradients of the sum over outputs of (output * cotangent)."""
        if not cotangents:
            return
        torch.autograd.backward([self.arrays[name] for name in cotangents], list(cotangents.values()))
        self.arrays |= {f"grad_{name}": value.grad for name, value in inputs.items() if value.grad is not None}
        gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
        self.arrays |= {f"grad:{name}": value for name, value in self.published.to_theirs(gradients).items()}


def _bind(block: nn.Module, positional: Sequence[Tensor], keywords: Mapping[str, Tensor]) -> inspect.BoundArguments:
    """The call's arguments under the names of our block's `forward`."""
    try:
        return inspect.signature(block.forward).bind(*positional, **keywords)
    except TypeError as error:
        raise ValueError(f"{type(block).__name__}.forward: {error}") from error


# ---- where published code gives NaN ---------------------------------------------------------------------------------

_EMPTY_ROWS = (
    "the published code gives NaN where a query's keys are all masked; here such a head attends to nothing: zeros from "
    "its attention, so with all heads masked the bias of fc_o. Checked against that formula, gradients finite"
)


def _attention_with_empty_rows(case: Case) -> Arrays:
    """What multi-head attention gives if a row without keys gives zeros: a formula that stands apart from our op."""
    state = {name: torch.from_numpy(array).requires_grad_() for name, array in case.state.items()}
    inputs = {name: torch.from_numpy(array) for name, array in case.inputs.items()}
    for value in inputs.values():
        value.requires_grad_(value.is_floating_point())
    positional, keywords = _arguments(case, inputs)
    names = ("queries", "keys", "values", "attention_mask", "attention_weights")
    given = dict(zip(names, positional, strict=False)) | keywords
    queries, keys, values = (given[name] for name in names[:3])
    heads = case.constructor["h"]

    def split(x: Tensor, name: str) -> Tensor:
        if f"{name}.weight" in state:
            x = x @ state[f"{name}.weight"].T + state[f"{name}.bias"]
        return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)  # (B, heads, N, width)

    q, k, v = split(queries, "fc_q"), split(keys, "fc_k"), split(values, "fc_v")
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if "attention_weights" in given:
        scores = scores * given["attention_weights"]
    kept = (~given["attention_mask"]).double()
    exponentials = (scores - scores.detach().amax(dim=-1, keepdim=True)).exp() * kept
    total = exponentials.sum(dim=-1, keepdim=True)
    attention = exponentials / torch.where(total > 0, total, torch.ones_like(total))
    mixed = torch.einsum("bhqk,bhkd->bqhd", attention, v).flatten(2)
    out = mixed @ state["fc_o.weight"].T + state["fc_o.bias"]
    (name,) = case.output_names
    torch.autograd.backward(out, torch.from_numpy(_cotangents(case)[name]))
    arrays = {name: out}
    arrays |= {f"grad_{name}": value.grad for name, value in inputs.items() if value.grad is not None}
    arrays |= {f"grad:{name}": value.grad for name, value in state.items() if value.grad is not None}
    return {name: value.detach() for name, value in arrays.items()}


_INSTEAD_OF_NAN: dict[str, tuple[str, Callable[[Case], Arrays]]] = {
    "ScaledDotProductAttention": (_EMPTY_ROWS, _attention_with_empty_rows),
    "SimplifiedScaledDotProductAttention": (_EMPTY_ROWS, _attention_with_empty_rows),
}


def _stands_in(case: Case) -> bool:
    """Whether the recording has NaN for which there is a statement of what we give instead."""
    return case.source["class"] in _INSTEAD_OF_NAN and any(np.isnan(array).any() for array in case.expected.values())


def _cotangents(case: Case) -> Mapping[str, npt.NDArray[Any]]:
    """The recorded cotangents; ones if there are none and gradients are to be finite in spite of NaN."""
    if case.cotangents or not _stands_in(case):
        return case.cotangents
    return {entry["name"]: np.ones(tuple(entry["shape"])) for entry in case.meta["forward"]["outputs"]}


# ---- the check ------------------------------------------------------------------------------------------------------


def implementations(case: Case, device: torch.device) -> tuple[str, ...]:
    """What the argument `impl` of the block that serves a case may be; "auto" alone if it has none."""
    try:
        block: type[blocks.Block] = getattr(blocks, _published(case).block)
    except ValueError:
        return ("auto",)  # the check says that nothing serves it
    impls = block.impls or ("auto",)
    unfit = {"fused"} if "attention_weights" in case.inputs else set()  # which torch's fused kernels do not know
    unfit |= set() if device.type == "cpu" else {"native"}
    return tuple(impl for impl in impls if impl not in unfit)


def check_case(
    case: Case,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
    impl: str = "auto",
    debug: bool = False,
) -> Result:
    """Compare our block with everything that a case recorded.

    In every precision the default and the reference implementation have to equal the recording in float64 first. Below
    float64 the default one may then lose at most twice what the reference loses, plus one rounding step; both are
    measured against the reference in float64 on the same rounded numbers. An array that exceeds this on the recorded
    inputs has to keep to it on average over inputs a rounding step away (see `visattn.testing.tolerance`).

    Args:
        case: The case.
        device: Where to run.
        dtype: Precision to check.
        impl: Implementation to check; "all" for each that the block has.
        debug: Let an exception through instead of making it the reason of a failure.
    """
    result = Result(case)
    try:
        for problem in _incomplete(case):
            result.fail(problem)
        expected = _expected(case, result)
        chosen = implementations(case, device) if impl == "all" else (impl,)
        if impl == "all" and "attention_weights" in case.inputs:
            result.notes.append('impl="fused" is not checked: torch\'s kernels know no attention_weights')
        for name in dict.fromkeys([*chosen, "reference"]):
            _compare_float64(case, expected, _Run(case, name, device, torch.float64).arrays, name, result)
        result.errors = dict(result.float64_errors)
        if dtype != torch.float64 and result.verdict == "passed":
            result.errors = {}
            for name in chosen:
                _compare_low(case, expected, device, dtype, name, result)
    except Exception as error:
        if debug:
            raise
        lines = str(error).strip().splitlines() or ["no message"]
        text = (
            " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        )  # load_state_dict tells more below its heading
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        result.fail(kind + " ".join(text.split()))
    return result


def _incomplete(case: Case) -> Iterator[str]:
    """What a recording lacks, has too much, or has in another size than it says."""
    forward = case.meta["forward"]
    shapes = {entry["name"]: entry["shape"] for entry in forward["outputs"]}
    needed = list(shapes)
    real = [entry for entry in forward["inputs"] if entry["fill"]["kind"] != "mask"]
    if case.cotangents:
        needed += [f"grad_{entry['name']}" for entry in real]
    shapes |= {f"grad_{entry['name']}": entry["shape"] for entry in real}
    for entry in case.meta["state"]:
        name = entry["name"]
        shapes |= {f"grad:{name}": entry["shape"], f"buffer:{name}": entry["shape"]}
        if case.training and name.endswith(("running_mean", "running_var")):
            needed.append(f"buffer:{name}")
    for name in needed:
        if name not in case.expected:
            yield f"the recording has no {name!r}"
    for name, array in case.expected.items():
        step = case.step(name)
        if name.endswith("_nan_rows") and name.removesuffix("_nan_rows") in case.output_names:
            continue
        if name not in shapes:
            if group_of(name) is None:  # of the others the comparison says that our block has no such array
                yield f"{name!r} is recorded, but the format has no array of that name"
            continue
        whole = math.prod(shapes[name])
        size = shapes[name] if step == 1 else [len(range(0, whole, step))]
        if list(array.shape) != size:
            yield f"{name!r} is recorded as {list(array.shape)}, the case says {size}"
    for name in case.meta.get("sampled", {}):
        if name not in case.expected:
            yield f"{name!r} is said to be sampled, but not recorded"


def _expected(case: Case, result: Result) -> Arrays:
    """The recorded arrays, NaN replaced where visattn states what it gives instead."""
    expected = {name: torch.from_numpy(np.asarray(array)) for name, array in case.expected.items()}
    marks = {name: expected.pop(name) for name in list(expected) if name.endswith("_nan_rows")}
    for name, mark in marks.items():
        output = expected.get(name.removesuffix("_nan_rows"), torch.empty(0))
        if not torch.equal(output.isnan().all(-1), mark.bool()):
            result.fail(f"{name!r} does not mark the rows of NaN in the output")
    if not _stands_in(case):
        return expected
    note, formula = _INSTEAD_OF_NAN[case.source["class"]]
    result.notes.append(note)
    for name, stated in formula(case).items():
        instead = _sample(case, name, stated)
        recorded = expected.get(name)
        if recorded is None:
            if not case.cotangents:  # they differentiated nothing; here every gradient has to be as stated
                expected[name] = instead
        elif recorded.shape == instead.shape:
            expected[name] = torch.where(recorded.isnan(), instead, recorded.double())
    return expected


def _sample(case: Case, name: str, array: Tensor) -> Tensor:
    """The part of an array that the case stores."""
    step = case.step(name)
    return array if step == 1 else array.reshape(-1)[::step]


def _compare_float64(case: Case, expected: Arrays, actual: Arrays, impl: str, result: Result) -> None:
    """The float64 check of one implementation."""
    for name, want in expected.items():
        if group_of(name) is None:
            continue  # reported already
        if name not in actual:
            result.fail(f"{name}: recorded, but our block has none")
            continue
        error = relative_error(_sample(case, name, actual[name]), want)
        result.float64_errors[name] = max(error, result.float64_errors.get(name, 0.0))
        if not error < FLOAT64_TOLERANCE:
            which = "" if impl == "auto" else f' (impl="{impl}")'
            result.fail(f"{name}: relative error {error:.2g} in float64, allowed {FLOAT64_TOLERANCE:.0e}{which}")


def _compare_low(
    case: Case, expected: Arrays, device: torch.device, dtype: torch.dtype, impl: str, result: Result
) -> None:
    """The check of an implementation in a precision below float64."""

    @cache
    def runs(neighbour: int | None = None) -> tuple[Arrays, Arrays, Arrays]:
        """That and the reference implementation in that precision, and the reference in float64."""
        return (
            _Run(case, impl, device, dtype, rounded_to=dtype, neighbour=neighbour).arrays,
            _Run(case, "reference", device, dtype, rounded_to=dtype, neighbour=neighbour).arrays,
            _Run(case, "reference", device, torch.float64, rounded_to=dtype, neighbour=neighbour).arrays,
        )

    for name in expected:
        actual, low, exact = (arrays[name] for arrays in runs())
        used = budget_used([(actual, low, exact)], dtype)
        if 1.0 < used < math.inf:
            near = [runs(neighbour) for neighbour in range(NEIGHBOURS)]
            used = budget_used([(a[name], b[name], c[name]) for a, b, c in (runs(), *near)], dtype)
        result.errors[name] = max(relative_error(actual, exact), result.errors.get(name, 0.0))
        result.budget_used[name] = max(used, result.budget_used.get(name, 0.0))
        if not used <= 1.0:
            lost = f"deviation {deviation(actual, exact):.2g}, {used:.2g} times the budget"
            which = "" if impl == "auto" else f' (impl="{impl}")'
            result.fail(f"{name}: {lost} in {str(dtype).removeprefix('torch.')}{which}")
