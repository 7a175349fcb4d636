"""Pyramid squeeze attention by the kernels in C, against torch in float64."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import visattn
from visattn import native
from visattn.native import pyramid
from visattn.ops.convolution import Convolution
from visattn.ops.pyramid_squeeze import Squeeze, pyramid_attention
from visattn.testing.tolerance import NEIGHBOURS, assert_close_to_exact

pytestmark = pytest.mark.skipif(not native.available(), reason=native.MISSING)
SIZES = [  # scales as (kernel, groups), batch, channels, channels of a scale, sides, stride, dilation, sigmoid
    ([(3, 1), (5, 2), (7, 4)], 3, 8, 4, (11, 7), 1, 1, True),
    ([(1, 1)], 2, 3, 5, (1, 2), 1, 1, True),
    ([(3, 2), (3, 1), (5, 2), (1, 2), (3, 2)], 2, 6, 10, (13, 5), 2, 1, False),
    ([(3, 16), (5, 1)], 2, 16, 16, (9, 47), 1, 2, True),
    ([(3, 1), (5, 4)], 1, 4, 4, (67, 53), 1, 1, True),
]


def attention(size, impl, dtype, *, training=True, seed=0, biases=True, value=None):
    """Output and all gradients."""
    scales, batch, channels, out, sides, stride, dilation, sigmoid = size
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_(training)

    x = make(batch, channels, *sides)
    if value is not None:
        with torch.no_grad():
            x[0, 1, 0, 1] = value
    convs = [
        Convolution(make(out, channels // groups, k, k), None, stride, k // 2 * dilation, dilation, groups)
        for k, groups in scales
    ]
    layers = make(3, out), make(3) if biases else None, make(out, 3), make(out) if biases else None
    result = pyramid_attention(x, convs, Squeeze(*layers, sigmoid), impl=impl)
    if not training:
        return [result]
    wanted = [x, *(conv.weight for conv in convs), *(layer for layer in layers if layer is not None)]
    return [result, *torch.autograd.grad(result, wanted, torch.randn(result.shape, generator=generator).to(dtype))]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_float64_is_the_reference(size, training, threads):
    pairs = zip(*(attention(size, impl, torch.float64, training=training) for impl in ("native", "reference")))
    for index, (got, exact) in enumerate(pairs):
        assert torch.allclose(got, exact, rtol=1e-10, atol=1e-10), index


@pytest.mark.parametrize("size", SIZES)
def test_float32_is_as_close_as_the_reference(size, threads):
    kinds = [("native", torch.float32), ("auto", torch.float32), ("reference", torch.float32)]

    def runs(seed):
        exact = attention(size, "reference", torch.float64, seed=seed)
        return list(zip(*(attention(size, *kind, seed=seed) for kind in kinds), exact, strict=True))

    for index, (got, auto, plain, exact) in enumerate(runs(0)):
        for chosen, one in ((0, got), (1, auto)):

            def neighbours(index=index, chosen=chosen):
                found = (runs(1000 * seed)[index] for seed in range(1, NEIGHBOURS + 1))
                return [(some[chosen], *some[2:]) for some in found]

            assert_close_to_exact(one, exact, plain, f"{index} {chosen}", neighbours=neighbours)


def test_layers_without_biases():
    for got, exact in zip(
        *(attention(SIZES[0], impl, torch.float64, biases=False) for impl in ("native", "reference"))
    ):
        assert torch.allclose(got, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none_go_where_torch_takes_them(value):
    for got, wanted in zip(*(attention(SIZES[0], i, torch.float32, value=value) for i in ("native", "reference"))):
        assert torch.equal(got.isfinite(), wanted.isfinite())


def block(**options):
    torch.manual_seed(0)
    return visattn.PyramidSqueezeAttention(16, groups=(1, 2, 4, 4), reduction=2, **options)


def test_some_gradients_again_and_later():
    """Any subset of gradients, twice, is what all of them at once are; recomputed activations too."""
    module, x = block(), torch.randn(2, 16, 5, 7).requires_grad_()
    wanted = [x, *module.parameters()]
    out = module(x).square().sum()
    every = torch.autograd.grad(out, wanted, retain_graph=True)
    for index, tensor in enumerate(wanted):
        assert torch.equal(torch.autograd.grad(out, tensor, retain_graph=True)[0], every[index])
    checkpoint(module, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(tensor.grad, one) for tensor, one in zip(wanted, every))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(out, wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, every))


def test_second_derivatives():
    def derivatives(impl):
        module, x = block(impl=impl).double(), torch.linspace(-1, 1, 2 * 16 * 15).view(2, 16, 3, 5).double()
        inputs = [x.requires_grad_(), *module.parameters()]
        first = torch.autograd.grad(module(x).square().sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum(one.square().sum() for one in first), inputs, allow_unused=True)]

    for a, b in zip(*(derivatives(impl) for impl in ("native", "reference")), strict=True):
        assert (a is None) is (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-8, atol=1e-8)


CHANGES = {
    "hook on a scale": lambda m: m.conv_1.register_forward_hook(lambda *a: None),
    "hook on the squeeze": lambda m: m.se.register_forward_hook(lambda *a: None),
    "hook on its layer": lambda m: m.se.fc2.register_forward_hook(lambda *a: None),
    "another gate": lambda m: setattr(m.se, "gate", torch.nn.Hardsigmoid()),
    "another layer": lambda m: setattr(m.se, "fc1", torch.nn.Sequential(m.se.fc1)),
    "another padding": lambda m: setattr(m.conv_1, "padding_mode", "reflect"),
    "a bias": lambda m: setattr(m.conv_1, "bias", torch.nn.Parameter(torch.ones(4))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_plain_is_called_as_it_is(change, monkeypatch):
    calls, call = [], native.call
    monkeypatch.setattr(pyramid, "call", lambda name, *a, **k: (calls.append(name), call(name, *a, **k)))
    ours, theirs, x = block(), block(impl="reference"), torch.randn(3, 16, 5, 7)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert calls == ["pyramid_means", "pyramid_weigh"]
    CHANGES[change](ours), CHANGES[change](theirs)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert len(calls) == 2


@pytest.mark.parametrize("last", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("stride", [1, 2])
def test_networks_in_channels_last(stride, last):
    x = torch.randn(2, 16, 9, 7)
    expected = block(impl="reference", stride=stride)(x)
    module = block(stride=stride).to(memory_format=torch.channels_last)
    got = module(x.contiguous(memory_format=last))
    assert torch.allclose(got, expected, atol=1e-5)
    assert got.is_contiguous(memory_format=last)
    got.sum().backward()
    narrow = visattn.PyramidSqueezeAttention(1, 2, kernel_size=[3], groups=[1], reduction=1, stride=stride)
    assert narrow(x[:, :1].contiguous(memory_format=last)).isfinite().all()


def test_shapes_that_do_not_fit_are_refused():
    maps = (torch.ones(2, 3, 5, 7), torch.ones(2, 3, 5, 7))
    for wrong in ((maps[0], torch.ones(2, 3, 7, 5)), (maps[0], torch.ones(2, 3, 7, 5).transpose(2, 3))):
        with pytest.raises(ValueError, match="a pyramid was given"):
            pyramid.means(wrong)
    with pytest.raises(ValueError, match="a pyramid was given"):
        pyramid.weigh(maps, torch.ones(2, 3, 2))
    with pytest.raises(ValueError, match="a pyramid was given"):
        pyramid.gather(maps, torch.ones(2, 5, 5, 7))
    convs = [Convolution(torch.ones(4, 2, 3, 3), padding=padding, groups=2) for padding in (0, 1)]
    layers = torch.ones(3, 4), None, torch.ones(4, 3), None
    with pytest.raises(ValueError, match="scales of one shape"):
        pyramid_attention(torch.ones(1, 4, 5, 7), convs, Squeeze(*layers), impl="native")
