"""Selective kernels by the kernels in C, against torch in float64."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import visattn
from visattn import native
from visattn.native import select
from visattn.native.convolution import Geometry
from visattn.ops._shared import BatchNorm
from visattn.ops.convolution import Convolution
from visattn.ops.selective_kernel import NORMED_IMPLEMENTATIONS, Gate, normed_select, selective_kernel
from visattn.testing.tolerance import NEIGHBOURS, assert_close_to_exact

pytestmark = pytest.mark.skipif(not native.available(), reason=native.MISSING)
SIZES = [
    (2, 3, 5, 1, 7),
    (1, 2, 3, 2, 3),
    (3, 5, 7, 5, 11),
    (4, 2, 3, 47, 53),
    (2, 3, 11, 8, 8),
]  # branches, (B, C, H, W)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def selection(size, impl, dtype, first=0, plain=False):
    """Tensors with gradients, the op on them, and the statistics that it updates."""
    branches, batch, channels, *sides = size
    hidden = 13
    vectors = [(channels,)] * (2 * branches) + [(hidden, channels), (hidden,), (hidden,), (hidden,)]
    vectors += [(channels, hidden)] * branches + [(channels,)] * branches
    shapes = [(batch, channels, *sides)] * branches + vectors
    tensors = [normal(*shape, seed=first + i).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]
    statistics = [torch.full((channels,), 0.5 + i).to(dtype) for i in range(2 * branches)]
    statistics += [torch.zeros(hidden, dtype=dtype), torch.ones(hidden, dtype=dtype)]

    def call():
        maps, weights, biases = (tensors[i * branches : (i + 1) * branches] for i in range(3))
        norms = [
            BatchNorm(w, b, *statistics[2 * i : 2 * i + 2], True, 0.1 + 0.2 * i, 1e-3 * (i + 1))
            for i, (w, b) in enumerate(zip(weights, biases))
        ]
        weight, bias, *norm = tensors[3 * branches : 3 * branches + 4]
        norm = None if plain else BatchNorm(*norm, *statistics[-2:], True, 0.3, 1e-2)
        rest = tensors[3 * branches + 4 :]
        gate = Gate(weight, None if plain else bias, norm, rest[:branches], rest[branches:])
        return normed_select([x + 3.0 for x in maps], norms, gate, impl=impl)

    return tensors, call, statistics


def results(size, impl, dtype, first=0, plain=False):
    """Output, gradients and statistics; without the gradient of a bias that a norm takes away again."""
    tensors, call, statistics = selection(size, impl, dtype, first, plain)
    out = call()
    gradients = torch.autograd.grad(out, tensors, normal(*out.shape, seed=99).to(dtype), allow_unused=True)
    dropped = 3 * size[0] + 1
    assert gradients[dropped] is None or gradients[dropped].abs().max() < 1e-3
    return [out, *(x for i, x in enumerate(gradients) if x is not None and i != dropped), *statistics]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_float64_is_the_reference(size, plain, threads):
    for index, (got, exact) in enumerate(
        zip(*(results(size, impl, torch.float64, plain=plain) for impl in ("native", "reference")), strict=True)
    ):
        assert torch.allclose(got, exact, rtol=1e-10, atol=1e-10), index


@pytest.mark.parametrize("size", SIZES)
def test_float32_is_as_close_as_the_reference(size, threads):
    kinds = [("native", torch.float32), ("reference", torch.float32), ("reference", torch.float64)]

    def runs(first):
        return list(zip(*(results(size, *kind, first) for kind in kinds), strict=True))

    for index, (got, plain, exact) in enumerate(runs(0)):

        def neighbours(index=index):
            return [runs(1000 * seed)[index] for seed in range(1, NEIGHBOURS + 1)]

        assert_close_to_exact(got, exact, plain, str(index), neighbours=neighbours)


WHOLE = [  # branches as (kernel, dilation), batch, input and output channels of a group, groups, sides, stride
    ([(3, 1), (3, 2)], 3, 4, 4, 3, (11, 7), 1),
    ([(3, 1), (5, 1), (1, 1)], 2, 8, 16, 2, (5, 13), 2),
    ([(3, 2)], 2, 3, 5, 1, (7, 5), 1),
    ([(1, 1), (3, 1), (3, 3), (7, 1)], 5, 1, 2, 2, (3, 5), 3),
    ([(3, 1), (3, 2)], 2, 16, 8, 2, (1, 2), 1),
    ([(3, 1), (3, 2)], 3, 2, 24, 2, (67, 53), 2),
]


def whole(size, impl, dtype, training, *, seed=0, hidden=37, plain=False):
    """The whole op: output, gradients in training, statistics."""
    branches, batch, ins, outs, groups, sides, stride = size
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_(training)

    def norm(channels, eps):
        statistics = make(channels).detach(), make(channels).detach().square() + 0.5
        return BatchNorm(make(channels), make(channels), *statistics, training, 0.2, eps)

    x, channels = make(batch, groups * ins, *sides), groups * outs
    convs = [
        Convolution(
            make(channels, ins, k, k),
            None if training else make(channels),
            stride,
            (k // 2) * dilation,
            dilation,
            groups,
        )
        for k, dilation in branches
    ]
    norms = [None if plain else norm(channels, 1e-3 * (k + 1)) for k in range(len(branches))]
    of_hidden = None if plain else norm(hidden, 1e-2)
    weights, biases = [make(channels, hidden) for _ in branches], [make(channels) for _ in branches]
    gate = Gate(make(hidden, channels), make(hidden), of_hidden, weights, biases, relu=not plain)
    out = selective_kernel(x, convs, norms, gate, impl=impl)
    if not training:
        return [out]
    vectors = [vector for norm in norms for vector in norm[:2]]
    wanted = [x, *(conv.weight for conv in convs), *vectors, gate.weight, *of_hidden[:2], *weights, *biases]
    gradients = torch.autograd.grad(out, wanted, torch.randn(out.shape, generator=generator).to(dtype))
    return [out, *gradients, *(s for norm in (*norms, of_hidden) for s in norm[2:4])]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", WHOLE)
def test_the_whole_in_float64_is_the_reference(size, training, threads):
    for index, (got, exact) in enumerate(
        zip(*(whole(size, impl, torch.float64, training) for impl in ("native", "reference")), strict=True)
    ):
        assert torch.allclose(got, exact, rtol=1e-10, atol=1e-10), index


@pytest.mark.parametrize("size", WHOLE)
def test_the_whole_without_norms(size):
    got, exact = (whole(size, impl, torch.float64, False, plain=True)[0] for impl in ("native", "reference"))
    assert torch.allclose(got, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", WHOLE)
def test_the_whole_in_float32_is_as_close_as_the_reference(size, training, threads):
    kinds = [("native", torch.float32), ("reference", torch.float32), ("reference", torch.float64)]

    def runs(seed):
        return list(zip(*(whole(size, *kind, training, seed=seed) for kind in kinds), strict=True))

    for index, (got, plain, exact) in enumerate(runs(0)):

        def neighbours(index=index):
            return [runs(1000 * seed)[index] for seed in range(1, NEIGHBOURS + 1)]

        assert_close_to_exact(got, exact, plain, str(index), neighbours=neighbours)


def test_convolutions_of_branches_are_the_same_with_any_threads():
    x, gradient, weight = normal(3, 8, 23, 7), normal(3, 12, 23, 7, seed=1), normal(12, 4, 3, 3, seed=2)
    convs = select.Convolutions((weight, weight + 1), (Geometry(1, 1, 1, 2), Geometry(1, 2, 2, 2)))
    factors = select.Factors(normal(2, 12, 5, seed=3), normal(2, 3, 12, 2, seed=4))
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            maps = select.convolve(x, convs)
            d_x = select.input_gradient(x.shape, convs, maps, gradient, factors)
            outs.append([*maps, d_x, *select.weight_gradients(x, convs, maps, gradient, factors)])
    finally:
        torch.set_num_threads(before)
    for other in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs[0], other, strict=True))


def test_a_long_batch_is_inferred_some_samples_at_a_time():
    size = ([(3, 1), (3, 2)], 37, 4, 8, 8, (23, 41), 1)
    got, exact = (whole(size, impl, torch.float64, False)[0] for impl in ("native", "reference"))
    assert 2 * got.numel() > 2097152  # more than are at hand at one time, see AT_ONCE
    assert torch.allclose(got, exact, rtol=1e-10, atol=1e-10)


def test_second_derivatives_of_the_whole():
    def derivatives(impl):
        generator = torch.Generator().manual_seed(0)
        x, *weights = (
            torch.randn(shape, generator=generator).double().requires_grad_()
            for shape in ((2, 4, 3, 5), (6, 2, 3, 3), (6, 2, 3, 3), (3, 6), (6, 3), (6, 3))
        )
        convs = [Convolution(weight, None, 1, k, k, 2) for k, weight in enumerate(weights[:2], 1)]
        ones, zeros = torch.ones(6).double(), torch.zeros(6).double()
        norms = [BatchNorm(ones, zeros, zeros.clone(), ones.clone(), True) for _ in range(2)]
        hidden = BatchNorm(ones[:3], zeros[:3], zeros[:3].clone(), ones[:3].clone(), True)
        gate = Gate(weights[2], None, hidden, weights[3:], [zeros, zeros], relu=False)
        out = selective_kernel(x, convs, norms, gate, impl=impl).square().sum()
        first = torch.autograd.grad(out, [x, *weights], create_graph=True)
        second = torch.autograd.grad(sum(one.square().sum() for one in first), [x, *weights])
        return [*first, *second, *(one for norm in (*norms, hidden) for one in norm[2:4])]  # statistics, updated once

    for a, b in zip(*(derivatives(impl) for impl in ("native", "reference")), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none_in_the_whole(value, monkeypatch):
    torch.manual_seed(0)
    x = normal(3, 12, 11, 7)
    x[1, 5, 3, 4] = value
    calls = called(monkeypatch)
    for training in (False, True):
        with torch.set_grad_enabled(training):
            got, wanted = (block(impl=impl).train(training)(x) for impl in ("auto", "reference"))
        assert torch.equal(got.isfinite(), wanted.isfinite()), training
    assert calls == ["select_infer", "convolve_branches", "select_normalise", "select_combine"]


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_blocks_take_the_whole(mode, monkeypatch):
    calls = called(monkeypatch)
    ours, theirs, x = block(), block(impl="reference"), normal(3, 12, 11, 7)
    if mode == "training":
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
        assert calls == ["convolve_branches", "select_normalise", "select_combine"]
        return
    for module in (ours, theirs):
        module.eval()
    with torch.no_grad():
        expected = theirs(x)
        for module in (ours, visattn.fuse(ours)):
            assert torch.allclose(module(x), expected, atol=1e-5)
    assert calls == ["select_infer"] * 2
    calls.clear()
    assert torch.allclose(ours(x), expected, atol=1e-5)  # recorded: by torch's norms
    assert not calls


SWAPPED = {
    "no bias of a selector": lambda m: setattr(m.fcs[0], "bias", None),
    "no bias of the layer before": lambda m: setattr(m.fc, "bias", None),
    "one output for all channels": lambda m: [setattr(m.fcs, str(k), torch.nn.Linear(5, 1)) for k in range(2)],
    "sliced statistics": lambda m: setattr(m.convs[0].bn, "running_mean", torch.linspace(-1, 1, 24)[::2]),
    "expanded bias": lambda m: setattr(m.fcs[1], "bias", torch.nn.Parameter(torch.ones(1).expand(12))),
    "one norm for both": lambda m: setattr(m.convs[0], "bn", m.convs[1].bn),
    "a bias of a convolution": lambda m: setattr(m.convs[0].conv, "bias", torch.nn.Parameter(torch.ones(12))),
    "norms alone in training": lambda m: m.eval() and [one.bn.train() for one in m.convs] and m.fc_bn.train(),
    "statistics that are not tracked": lambda m: setattr(m.convs[0].bn, "track_running_stats", False),
}


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("swap", SWAPPED)
def test_layers_of_other_shapes(swap, training, gradient):
    ours, theirs, x = block(), block(impl="reference"), normal(3, 12, 5, 7)
    for module in (ours, theirs):
        torch.manual_seed(1)
        module.train(training)
        SWAPPED[swap](module)
    with torch.set_grad_enabled(gradient):
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers()):
        assert torch.allclose(a, b, rtol=1e-5), name


def test_a_mean_far_from_zero_loses_no_digits_of_the_maps():
    x = normal(2, 3, 47, 53) + 100
    numbers, _ = select.normalise((x,), (torch.full((3,), 0.3),), (torch.zeros(3),), [1e-5])
    ours = select.combine((x,), torch.ones(2, 1, 3), numbers)
    exact, plain = (
        torch.nn.functional.batch_norm(y, None, None, None, None, True).mul(0.3).relu() for y in (x.double(), x)
    )
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_sizes_that_no_kernel_serves_are_refused():
    x, weight, zeros = normal(2, 4, 5, 7), normal(6, 2, 3, 3), torch.zeros(6)
    gate = Gate(normal(3, 6), None, None, [normal(6, 3)] * 2, [zeros] * 2)
    for other in (Convolution(weight, None, 2, 1, 1, 2), Convolution(weight, None, 1, 0, 1, 2)):
        with pytest.raises(ValueError, match="branches of one shape"):
            selective_kernel(x, [Convolution(weight, None, 1, 1, 1, 2), other], [None] * 2, gate, impl="native")
    convs = [Convolution(weight, None, 1, 1, 1, 2)] * 2
    with pytest.raises(ValueError, match="branches of one shape"):
        selective_kernel(x, convs, [None] * 2, gate._replace(weight=normal(3, 5)), impl="native")


def test_the_same_numbers_with_any_threads():
    maps, gradient = (normal(3, 67, 5, 7), normal(3, 67, 5, 7, seed=1)), normal(3, 67, 5, 7, seed=2)
    weights, attention, d_descriptor = normal(67), normal(3, 2, 67).softmax(dim=1), normal(3, 67, seed=3)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            numbers, descriptor = select.normalise(maps, (weights, weights), (weights, weights), [1e-5, 1e-3])
            d_attention, sums = select.gather(maps, numbers, gradient)
            *vectors, factors = select.factors(numbers, attention, sums, d_descriptor, 5 * 7)
            out, d_maps = select.combine(maps, attention, numbers), select.scatter(maps, gradient, factors)
            outs.append([numbers, descriptor, d_attention, sums, out, *vectors, *factors, *d_maps])
    finally:
        torch.set_num_threads(before)
    for other in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs[0], other))


def test_a_mean_far_from_zero_loses_no_digits_of_the_variance():
    x = normal(2, 3, 47, 53) + 1000
    numbers, _ = select.normalise((x,), (torch.ones(3),), (torch.zeros(3),), [1e-5])
    exact = x.double().transpose(0, 1).flatten(1).var(dim=1)
    assert torch.allclose(numbers[1, 0].double(), exact, rtol=1e-5)


@pytest.mark.parametrize("where", ["map", "gradient"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none_go_where_torch_takes_them(value, where):
    got, wanted = [], []
    for impl, found in (("native", got), ("reference", wanted)):
        tensors, call, statistics = selection((2, 3, 5, 5, 7), impl, torch.float32)
        gradient = normal(3, 5, 5, 7, seed=99)
        (gradient if where == "gradient" else tensors[0].data)[1, 2, 3, 4] = value
        out = call()
        gradients = torch.autograd.grad(out, tensors, gradient)
        found += [out, *gradients, *statistics]
    assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(got, wanted))


def test_second_derivatives():
    tensors, call, _ = selection((2, 2, 3, 2, 3), "native", torch.float64)
    maps = tensors[:2]
    first = torch.autograd.grad(call().square().sum(), maps, create_graph=True)
    second = torch.autograd.grad(sum(one.square().sum() for one in first), tensors, allow_unused=True)
    others, plain, _ = selection((2, 2, 3, 2, 3), "reference", torch.float64)
    expected = torch.autograd.grad(plain().square().sum(), others[:2], create_graph=True)
    again = torch.autograd.grad(sum(one.square().sum() for one in expected), others, allow_unused=True)
    for a, b in zip((*first, *second), (*expected, *again)):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-8)


def block(**options):
    torch.manual_seed(0)
    return visattn.SelectiveKernel(12, groups=3, min_hidden=5, **options)


def called(monkeypatch):
    calls, call = [], native.call
    monkeypatch.setattr(
        select, "call", lambda name, *rest, **options: (calls.append(name), call(name, *rest, **options))
    )
    return calls


def test_some_gradients_again_and_later():
    """Any subset of gradients, twice, is what all of them at once are; recomputed activations too."""
    module, x = block(), normal(2, 12, 5, 7).requires_grad_()
    wanted = [x, *module.parameters()]
    out = module(x).square().sum()
    every = torch.autograd.grad(out, wanted, retain_graph=True)
    for index, tensor in enumerate(wanted):
        assert torch.equal(torch.autograd.grad(out, tensor, retain_graph=True)[0], every[index])
    for module_wide in (True, False):
        recomputed = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=module_wide).square().sum()
        recomputed.backward()
        assert all(torch.equal(tensor.grad, one) for tensor, one in zip(wanted, every))
        for tensor in wanted:
            tensor.grad = None
    for tensor in wanted[1::2]:
        tensor.requires_grad_(False)
    module(x).square().sum().backward()
    for tensor, one in zip(wanted, every):
        assert tensor.grad is None if not tensor.requires_grad else torch.equal(tensor.grad, one)


def test_statistics_are_updated_as_modules_do(monkeypatch):
    calls = called(monkeypatch)
    ours, theirs = block(), block(impl="reference")
    for step in range(3):
        x = normal(3, 12, 5, 7, seed=step)
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert calls
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers()):
        assert torch.allclose(a, b, rtol=1e-5), name


def other_momentum(module):
    module.convs[0].bn.momentum = None


def no_statistics(module):
    module.convs[1].bn.track_running_stats = False
    module.convs[1].bn.running_mean = module.convs[1].bn.running_var = None


CHANGES = {
    "hook on a norm": lambda m: m.convs[1].bn.register_forward_hook(lambda *a: None),
    "hook on a branch": lambda m: m.convs[0].register_forward_hook(lambda *a: None),
    "hook on the gate": lambda m: m.fc.register_forward_hook(lambda *a: None),
    "hook on a selector": lambda m: m.fcs[1].register_full_backward_hook(lambda *a: None),
    "frozen norm": lambda m: m.convs[0].bn.eval(),
    "frozen gate": lambda m: m.fc_bn.eval(),
    "another activation": lambda m: setattr(m.convs[0], "act", torch.nn.SiLU()),
    "averaged statistics": other_momentum,
    "no statistics": no_statistics,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_plain_is_called_as_it_is(change, training, monkeypatch):
    calls = called(monkeypatch)
    ours, theirs = block().train(training), block(impl="reference").train(training)
    CHANGES[change](ours), CHANGES[change](theirs)
    x = normal(3, 12, 5, 7)
    with torch.set_grad_enabled(training):
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert not calls or (not training and change.startswith("frozen"))
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers()):
        assert torch.allclose(a, b, rtol=1e-5), name


def test_a_hook_on_a_convolution_changes_nothing(monkeypatch):
    calls, seen, module, x = called(monkeypatch), [], block(), normal(3, 12, 5, 7)
    expected = module(x)
    calls.clear()
    module.convs[0].conv.register_forward_hook(lambda m, inputs, out: seen.append(out.clone()))
    assert torch.allclose(module(x), expected, atol=1e-5)
    assert calls
    assert seen


def test_a_batch_that_has_no_statistics_is_torchs():
    tensors = [normal(1, 3, 1, 1), normal(1, 3, 1, 1)]
    norms = [BatchNorm(*(torch.ones(3) for _ in range(4)), True) for _ in range(2)]
    gate = Gate(normal(5, 3), None, None, [normal(3, 5)] * 2, [normal(3)] * 2)
    for impl in NORMED_IMPLEMENTATIONS:
        with pytest.raises(ValueError, match=r"more than 1 value per channel|at most 4 maps of one shape"):
            normed_select(tensors, norms, gate, impl=impl)


def test_shapes_that_do_not_fit_are_refused():
    maps = (normal(2, 3, 5, 7), normal(2, 3, 5, 7))
    attention, numbers = normal(2, 2, 3), normal(5, 2, 3)
    for wrong in ((maps[0], normal(2, 3, 7, 5)), (maps[0], maps[1].transpose(2, 3).contiguous().transpose(2, 3))):
        with pytest.raises(ValueError, match="a selection was given tensors"):
            select.combine(wrong, attention, numbers)
    with pytest.raises(ValueError, match="a selection was given tensors"):
        select.combine(maps, attention[:1], numbers)
    with pytest.raises(ValueError, match="needs a norm"):
        select.normalise(maps, (torch.ones(3),), (torch.ones(3),), [1e-5])


def test_autocast_in_the_backward_pass_changes_nothing():
    module, x = block(), normal(2, 12, 5, 7).requires_grad_()
    out = module(x).square().sum()
    expected = torch.autograd.grad(out, [x, *module.parameters()], retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(out, [x, *module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_relu_lets_nothing_through_at_zero():
    x = torch.zeros(2, 1, 2, 3).requires_grad_()
    norms = [BatchNorm(torch.ones(1), torch.zeros(1), torch.zeros(1), torch.ones(1), True)]
    gate = Gate(torch.ones(1, 1), None, None, [torch.ones(1, 1)], [torch.zeros(1)])
    norms[0].bias.requires_grad_()
    out = normed_select([x], norms, gate, impl="native")
    gradients = torch.autograd.grad(out, (x, norms[0].bias), torch.arange(12.0).view(2, 1, 2, 3))
    assert not any(gradient.any() for gradient in gradients)


def test_a_checkpoint_updates_all_statistics_as_often():
    block = visattn.create("selective_kernel", 16)
    x = torch.randn(3, 16, 7, 5, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    branch = block.convs[0].bn
    assert branch.num_batches_tracked == block.fc_bn.num_batches_tracked == 2
    with torch.no_grad():
        plain = block.convs[0].conv(x).mean(dim=(0, 2, 3))
    assert torch.allclose(branch.running_mean, (1 - 0.9**2) * plain, atol=1e-6)  # two steps of 0.1 from zero
