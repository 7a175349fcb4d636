"""Products of large matrices by the kernels, and the linear layers that use them."""

import itertools

import pytest
import torch
from torch.nn import functional as F

import visattn
from visattn import native
from visattn.native.matrices import multiply
from visattn.ops import linear as linears
from visattn.ops.linear import linear

pytestmark = pytest.mark.skipif(not native.available(), reason=native.MISSING)

SIZES = [(1, 1, 1), (7, 13, 5), (97, 301, 35), (64, 600, 300), (200, 17, 517), (613, 5, 2)]  # rows, depth, columns
BOUND = {torch.float32: 4e-6, torch.float64: 1e-14}  # of the largest entry


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layouts(x):
    """The same matrix row by row, column by column, as a part of a wider one, and as every other number."""
    wide = torch.cat([x, x], dim=1)[:, : x.shape[1]]
    return x, x.t().contiguous().t(), wide, torch.stack([x, x], dim=2)[..., 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES)
def test_any_layout_and_threads(sizes, dtype, threads):
    rows, depth, columns = sizes
    a, b, bias = normal(rows, depth, seed=1), normal(depth, columns, seed=2), normal(columns, seed=3)
    want = a @ b + bias
    bound = BOUND[dtype] * want.abs().max().clamp_min(1)
    for left, right in itertools.product(layouts(a.to(dtype)), layouts(b.to(dtype))):
        out = multiply(left, right, bias=bias.to(dtype))
        assert (out.double() - want).abs().max() <= bound
        into = torch.full((rows, columns + 3), 7.0, dtype=dtype)
        multiply(left, right, out=into[:, :columns])
        assert (into[:, :columns].double() + bias - want).abs().max() <= bound
        assert (into[:, columns:] == 7).all()
        assert (
            multiply(left, right, bias=bias.to(dtype), out=out, add=True).double() - 2 * want
        ).abs().max() <= 2 * bound


def test_shapes_are_checked_before_memory_is_read():
    a, b = normal(3, 5), normal(5, 7)
    for wrong in ({"b": normal(4, 7)}, {"out": normal(7, 3)}, {"out": normal(7, 3).t()}):
        with pytest.raises(ValueError, match="multiply was given matrices"):
            multiply(**{"a": a, "b": b, **wrong})
    with pytest.raises(RuntimeError, match="expanded size"):
        multiply(a, b, bias=normal(5))


def test_infinities_and_nan_reach_what_they_reach_in_torch():
    a, b = normal(23, 31), normal(31, 37)
    a[4, 7], a[11, 3], b[5, 9] = torch.inf, torch.nan, -torch.inf
    got, want = multiply(a, b), a @ b
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    assert torch.equal(got[want.isinf()], want[want.isinf()])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(11,), (3, 11), (2, 3, 11)])
def test_linear_and_its_gradients(shape, bias):
    given = [normal(*shape, seed=1), normal(7, 11, seed=2), normal(7, seed=3) if bias else None]
    given = [x if x is None else x.requires_grad_() for x in given]
    wanted = [x for x in given if x is not None]
    out, want = linear(*given, impl="native"), F.linear(*given)
    assert torch.allclose(out, want, rtol=1e-12, atol=1e-12)
    cotangent = normal(*out.shape, seed=4)
    for got, plain in zip(*(torch.autograd.grad(y, wanted, cotangent, retain_graph=True) for y in (out, want))):
        assert torch.allclose(got, plain, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(lambda *x: linear(*x, impl="native"), wanted[:2])
    assert linear(*(x if x is None else x.half() for x in given), impl="native").dtype == torch.float16


@pytest.mark.parametrize("large", [True, False])
def test_auto_takes_the_kernels_for_large_products(large, monkeypatch):
    monkeypatch.setattr(native, "leads", lambda: True)
    monkeypatch.setattr(linears, "LEAST", 2 * 2 * 13 * 24 * 24 if large else 10**9)
    called = []
    monkeypatch.setattr(linears, "multiply", lambda *a, **k: called.append(a) or multiply(*a, **k))
    block = visattn.create("multihead_tokens", 24, num_heads=4)
    tokens = normal(2, 13, 24, dtype=torch.float32)
    with torch.no_grad():
        block(tokens)
        assert len(called) == (4 if large else 0)
        block.fc_v.register_forward_hook(lambda *_: None)  # which wants a call of the layer
        block(tokens)
        assert len(called) == (7 if large else 0)


def test_native_gives_the_type_that_autocast_does():
    x, weight = normal(5, 11, dtype=torch.float32), normal(7, 11, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, impl="native").dtype == F.linear(x, weight).dtype == torch.bfloat16


def test_what_native_does_not_serve():
    with pytest.raises(ValueError, match="input, weight and bias must fit"):
        linear(normal(2, 5), normal(3, 4), impl="native")
    with pytest.raises(ValueError, match="compilers"):
        torch.func.grad(lambda x: linear(x, normal(3, 5), impl="native").sum())(normal(2, 5))
