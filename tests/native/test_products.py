"""The matrix products in C against torch in float64: odd sizes, strides, and numbers that are none."""

import itertools

import pytest
import torch

from visattn import native
from visattn.native import products
from visattn.native.products import product, product_sum
from visattn.ops.dual import channel_residual
from visattn.ops.external import BatchNorm, external_residual_2d
from visattn.testing.tolerance import NEIGHBOURS, assert_close_to_exact

SIZES = [  # batch, rows, columns, depth
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 67, 13, 2),
    (2, 5, 197, 64),
    (1, 13, 11, 1031),
    (5, 64, 33, 257),
    (2, 129, 401, 66),
    (1, 7, 97, 23),
]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def laid_out(x, how):
    """The same numbers with rows side by side, columns side by side, or neither."""
    if how == "rows":
        return x.contiguous()
    if how == "columns":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    wide = x.new_full((*x.shape[:-1], 3 * x.shape[-1]), torch.nan)
    wide[..., ::3] = x
    return wide[..., ::3]


@pytest.mark.parametrize("size", SIZES)
def test_product(size, threads):
    batch, rows, columns, depth = size
    layouts = itertools.product(("rows", "columns", "strided"), repeat=2)
    for (how_a, how_b), batched in itertools.product(layouts, ("a", "b", "ab")):
        a = normal(*([batch] if "a" in batched else []), rows, depth, seed=1)
        b = normal(*([batch] if "b" in batched else []), depth, columns, seed=2)
        addend, bias = normal(batch, rows, columns, seed=3), normal(rows, seed=4)
        exact = a.double() @ b.double()
        label = f"{how_a} {how_b} {batched}"
        assert_close_to_exact(product(laid_out(a, how_a), laid_out(b, how_b)), exact, a @ b, label)
        exact = (exact + addend.double() + bias.double()[:, None]).relu()
        plain = (a @ b + addend + bias[:, None]).relu()
        out = torch.full_like(addend, torch.nan)
        got = product(laid_out(a, how_a), laid_out(b, how_b), addend=addend, bias=bias, relu=True, out=out)
        assert got is out
        assert_close_to_exact(out, exact, plain, label)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_added_may_be_the_output(size, threads):
    batch, rows, columns, depth = size
    a, b, out = normal(rows, depth, seed=1), normal(batch, depth, columns, seed=2), normal(batch, rows, columns)
    exact, plain = out.double() + a.double() @ b.double(), out + a @ b
    assert_close_to_exact(product(a, b, addend=out, out=out), exact, plain)


@pytest.mark.parametrize("size", SIZES)
def test_product_sum(size, threads):
    batch, rows, columns, depth = size
    for how_a, how_b in itertools.product(("rows", "columns", "strided"), repeat=2):
        a, b = normal(batch, rows, depth, seed=1), normal(batch, depth, columns, seed=2)
        exact, plain = (a.double() @ b.double()).sum(dim=0), (a @ b).sum(dim=0)
        got = product_sum(laid_out(a, how_a), laid_out(b, how_b))
        assert_close_to_exact(got, exact, plain, f"{how_a} {how_b}")
        assert torch.equal(got, product_sum(laid_out(a, how_a), laid_out(b, how_b))), "the same sums every time"


def test_a_long_sum_keeps_its_digits():
    a, b = torch.rand(1, 3, 100_003), torch.rand(1, 100_003, 5)
    exact = (a.double() @ b.double())[0]
    assert ((product_sum(a, b) - exact).abs() / exact).max() < 1e-5


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["a", "b", "addend", "bias"])
def test_numbers_that_are_none_go_where_torch_takes_them(where, value):
    given = {"a": normal(5, 11), "b": normal(2, 11, 29), "addend": normal(2, 5, 29), "bias": normal(5)}
    given[where].view(-1)[7 % given[where].numel()] = value
    a, b, addend, bias = given.values()
    plain = (a @ b + addend + bias[:, None]).relu()
    got = product(a, b, addend=addend, bias=bias, relu=True)
    assert torch.equal(got.isnan(), plain.isnan())
    assert torch.allclose(got, plain, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("channels", "positions"), [(1, 1), (7, 13), (67, 5), (203, 301)])
def test_a_symmetric_product(channels, positions, threads):
    x = normal(3, channels, positions)
    got = product(x, x.transpose(1, 2), symmetric=True)
    assert torch.equal(got, got.transpose(1, 2))
    exact = x.double() @ x.double().transpose(1, 2)
    assert_close_to_exact(got, exact, x @ x.transpose(1, 2))


def test_nothing_is_written_beside_the_output():
    memory = torch.full((1000,), 7.0)
    out = memory[10 : 10 + 3 * 5 * 13].view(3, 5, 13)
    product(normal(5, 17), normal(3, 17, 13), out=out)
    assert (memory[:10] == 7).all()
    assert (memory[10 + out.numel() :] == 7).all()


def external(impl, dtype, first=0, training=False):
    c, s = 67, 13
    shapes = [(3, c, 11, 17), (c, c, 1, 1), (c,), (s, c), (c, s), (c, c, 1, 1), (c,), (c,)]
    x, *rest = (normal(*shape, seed=first + i).to(dtype).requires_grad_() for i, shape in enumerate(shapes))
    norm = BatchNorm(rest[5], rest[6], torch.zeros(c, dtype=dtype), torch.ones(c, dtype=dtype), training, 0.1, 1e-3)
    weights = [weight / weight[0].numel() ** 0.5 for weight in rest[:5]]
    return [x, *rest], lambda: external_residual_2d(x, *weights, norm, impl=impl)


def external_training(impl, dtype, first=0):
    return external(impl, dtype, first, training=True)


def channel(impl, dtype, first=0):
    x, gamma = ((normal(*shape, seed=first + 3) / 4).to(dtype).requires_grad_() for shape in [(2, 67, 11, 17), (1,)])
    return [x, gamma], lambda: channel_residual(x, gamma, impl=impl)


def three_runs(op, first):
    """Output without and with gradients, and the gradients: of the kernels, the reference, and that in float64."""
    results = []
    for impl, dtype in (("native", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        inputs, function = op(impl, dtype, first)
        with torch.no_grad():
            quiet = function()
        out = function()
        out.backward(normal(*out.shape, seed=99).to(dtype))
        bias = inputs.pop(2) if len(inputs) > 2 else None  # whose gradient is zero up to rounding
        assert bias is None or bias.grad.abs().max() < 1e-3
        results.append([quiet, out, *(tensor.grad for tensor in inputs)])
    return list(zip(*results, strict=True))


@pytest.mark.parametrize("op", [external, external_training, channel])
@pytest.mark.parametrize("threads", [1, 3], indirect=True)
def test_float32_is_as_close_as_the_reference(op, threads):
    for index, (got, plain, exact) in enumerate(three_runs(op, 0)):

        def neighbours(index=index):
            return [three_runs(op, 100 * seed)[index] for seed in range(1, NEIGHBOURS + 1)]

        assert_close_to_exact(got, exact, plain, f"{op.__name__} {index}", neighbours=neighbours)


@pytest.mark.parametrize("op", [external, channel])
def test_the_kernels_run_where_they_can(op, monkeypatch):
    calls = []
    monkeypatch.setattr(products, "_run", lambda *arguments, **_: calls.append(arguments[0]))
    for impl, dtype, leads, expected in (
        ("native", torch.float32, False, True),
        ("auto", torch.float32, True, True),
        ("auto", torch.float32, False, False),
        ("buffered", torch.float32, True, False),
        ("auto", torch.float64, True, False),
    ):
        monkeypatch.setattr(native, "leads", lambda leads=leads: leads)
        calls.clear()
        with torch.no_grad():
            op(impl, dtype)[1]()
        assert bool(calls) == expected


@pytest.mark.parametrize("op", [external, channel])
def test_without_the_library_torch_serves_and_native_says_so(op, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    expected = op("buffered", torch.float32)[1]()
    assert torch.equal(op("auto", torch.float32)[1](), expected)
    with pytest.raises(ValueError, match=r"impl='native': visattn was installed without its kernels"):
        op("native", torch.float32)[1]()
