"""Attention in C against the reference in float64: odd sizes, strides, masks, and numbers that are none."""

import math
from types import SimpleNamespace

import pytest
import torch

from visattn import native
from visattn.native import attention
from visattn.ops import _attention, dual
from visattn.ops.dual import position_attention, position_residual
from visattn.ops.multihead import multihead_attention
from visattn.testing.tolerance import assert_close_to_exact, nudge

SIZES = [  # batch, heads, queries, keys, width, values
    (1, 1, 1, 1, 1, 1),
    (1, 1, 1, 17, 1, 3),
    (2, 3, 7, 13, 5, 11),
    (3, 1, 101, 6, 17, 2),
    (1, 5, 47, 47, 8, 16),
    (2, 2, 113, 67, 64, 64),
    (1, 1, 211, 307, 13, 263),
]
LAYOUTS = {  # how a tensor (batch, heads, tokens, width) lies in memory
    "heads": (0, 1, 2, 3),
    "tokens": (0, 2, 1, 3),
    "map": (0, 1, 3, 2),
    "backwards": (3, 2, 1, 0),
}


def normal(*shape, seed=0, layout="heads"):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    order = LAYOUTS[layout]
    return x.permute(order).contiguous().permute([order.index(i) for i in range(4)]) if len(shape) == 4 else x


def results(impl, inputs, cotangent, options):
    inputs = [x.detach().requires_grad_() for x in inputs]
    weights = {"attention_weights": inputs[3]} if len(inputs) > 3 else {}
    with torch.no_grad():
        quiet = multihead_attention(*inputs[:3], **weights, **options, impl=impl)
    out = multihead_attention(*inputs[:3], **weights, **options, impl=impl)
    assert torch.allclose(quiet, out, rtol=0, atol=0, equal_nan=True)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


def assert_native_is_close(inputs, options):
    cotangent = normal(*inputs[0].shape[:3], inputs[2].shape[3], seed=9)

    def run(inputs):
        exact = results("reference", [x.double() for x in inputs], cotangent.double(), options)
        return results("native", inputs, cotangent, options), results("reference", inputs, cotangent, options), exact

    runs = [run(inputs)]

    def neighbours(index):
        while len(runs) <= 16:
            runs.append(run([nudge(x, torch.float32, 10 * len(runs) + i) for i, x in enumerate(inputs)]))
        return [(got[index], plain[index], exact[index]) for got, plain, exact in runs[1:]]

    for index, (got, plain, exact) in enumerate(zip(*runs[0], strict=True)):
        assert_close_to_exact(got, exact, plain, f"result {index}", neighbours=lambda index=index: neighbours(index))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_layouts(size, layout, threads):
    batch, heads, queries, keys, width, values = size
    q = normal(batch, heads, queries, width, seed=1, layout=layout)
    k = normal(batch, heads, keys, width, seed=2, layout=layout)
    v = normal(batch, heads, keys, values, seed=3, layout=layout)
    assert_native_is_close([q, k, v], {"scale": 0.7})


@pytest.mark.parametrize("weights", [None, (29, 53), (3, 1, 53), (2, 1, 29, 53), (2, 3, 29, 1), (1,)])
@pytest.mark.parametrize("mask", [None, (53,), (29, 53), (2, 1, 29, 53), (1, 3, 1, 53), (29, 1)])
def test_masks_and_weights(mask, weights):
    q, k, v = normal(2, 3, 29, 7, seed=1), normal(2, 3, 53, 7, seed=2), normal(2, 3, 53, 11, seed=3)
    options = {} if mask is None else {"attention_mask": normal(*mask, seed=4) > 0.3}
    if mask == (29, 53):
        options["attention_mask"][2] = True  # a query without keys
    assert_native_is_close([q, k, v, *([normal(*weights, seed=5)] if weights else [])], options)
    if weights:  # that need no gradients
        options["attention_weights"] = normal(*weights, seed=5)
        got, want = (
            results(impl, [x.to(dtype) for x in (q, k, v)], torch.ones(2, 3, 29, 11, dtype=dtype), options)
            for impl, dtype in (("native", torch.float32), ("reference", torch.float64))
        )
        for fast, plain in zip(got, want, strict=True):
            assert torch.allclose(fast.double(), plain, rtol=1e-4, atol=1e-5)


def test_a_query_without_keys_is_zero():
    q, k = normal(1, 2, 5, 3), normal(1, 2, 19, 3, seed=1)
    mask = torch.zeros(5, 19, dtype=torch.bool)
    mask[3] = True
    out, d_query, *rest = results("native", [q, k, k], torch.ones(1, 2, 5, 3), {"attention_mask": mask})
    assert not out[:, :, 3].any()
    assert not d_query[:, :, 3].any()
    assert all(x.isfinite().all() for x in rest)


def test_every_element_of_strided_inputs():
    """Views with gaps, of one number seen everywhere, and a gradient that is such."""
    q, k, v = (
        normal(2, 3, 29, 14, seed=1)[..., ::2],
        normal(2, 3, 62, 7, seed=2)[:, :, 1::2],
        normal(1, 1, 1, 9, seed=3),
    )
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v.expand(2, 3, 31, 9)))
    fast = torch.autograd.grad(multihead_attention(q, k, v, impl="native").sum(), (q, k, v))
    plain = torch.autograd.grad(multihead_attention(q, k, v, impl="reference").sum(), (q, k, v))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(fast, plain, strict=True))


@pytest.mark.parametrize("layout", ["heads", "map"])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_whose_largest_score_comes_late(layout, masked):
    """Keys come in blocks: what the first ones gave is scaled down, or is nothing where all of a block are hidden."""
    q = normal(1, 2, 31, 7, seed=1, layout=layout)
    k = normal(1, 2, 523, 7, seed=2, layout=layout) * torch.linspace(0.1, 4, 523)[:, None]
    mask = normal(31, 523, seed=4) > 0.3
    mask[3, :400] = True
    mask[5] = True
    mask[7, :-1] = True
    assert_native_is_close([q, k, normal(1, 2, 523, 11, layout=layout)], {"attention_mask": mask} if masked else {})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [(0, 3), (1, 3), (2, 3), (1, 411), (2, 411)])
@pytest.mark.parametrize("layout", ["heads", "map"])
def test_numbers_that_are_none(layout, where, value):
    keys = 37 if where[1] < 37 else 523
    inputs = [normal(1, 2, n, m, seed=m, layout=layout) for n, m in ((29, 7), (keys, 7), (keys, 11))]
    inputs[where[0]][0, 1, where[1], 2] = value
    cotangent = normal(1, 2, 29, 11, seed=4)
    for plain, options in (("reference", {}), ("pieces", {"attention_mask": normal(29, keys, seed=5) > 0.5})):
        for got, want in zip(*(results(impl, inputs, cotangent, options) for impl in ("native", plain)), strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_scores_of_any_size(size):
    """Also rows that saturate, whose small probabilities are zero."""
    q, k, v = (normal(1, 2, 61, 5, seed=i) for i in range(3))
    assert_native_is_close([size**0.5 * q, size**0.5 * k, v], {})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_position_attention(layout, threads):
    tensors = [torch.randn(3, n, 11, 13).contiguous(memory_format=layout).requires_grad_() for n in (5, 5, 19)]
    out, plain = (position_attention(*tensors, impl=impl) for impl in ("native", "reference"))
    assert torch.allclose(out, plain, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(out)
    for got, want in zip(*(torch.autograd.grad(x, tensors, cotangent) for x in (out, plain)), strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_position_residual_without_gradients(layout, monkeypatch):
    monkeypatch.setattr(dual, "POSITIONS", 47)
    x = torch.randn(2, 11, 13, 17).contiguous(memory_format=layout)
    q, k, v = ((normal(n, 11, 1, 1, seed=n) / 4, normal(n, seed=n + 1)) for n in (3, 3, 11))
    gamma = torch.full((1,), 0.5)
    got, want = (position_residual(x, q, k, v, gamma, impl=impl) for impl in ("auto", "reference"))
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous(memory_format=layout)


def test_second_derivatives():
    q, k, v = (normal(1, 2, 5, 3, seed=i).requires_grad_() for i in range(3))
    found = []
    for impl in ("native", "reference"):
        first = torch.autograd.grad(multihead_attention(q, k, v, impl=impl).sin().sum(), (q, k, v), create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in first), (q, k, v)))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True))


def test_nothing_is_written_beside_the_results():
    whole = torch.full((2, 3, 40, 13), 7.0)
    q = normal(2, 3, 29, 11, seed=1)
    parts = [whole.clone() for _ in range(4)]
    out, *into = (x[:, :, 5:34, 1:12] for x in parts)
    attention.attend(q, q, q, None, None, 1.0, out)
    attention.attend_backward(q, q, q, None, None, 1.0, q, tuple(into))
    for x in parts:
        assert not (x[:, :, 5:34, 1:12] == 7).any()
        x[:, :, 5:34, 1:12] = 7
        assert torch.equal(x, whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_served_as_by_pieces(dtype):
    q = normal(2, 3, 29, 11).to(dtype)
    got, want = (multihead_attention(q, q, q, impl=impl) for impl in ("native", "pieces"))
    assert got.dtype == dtype
    assert torch.allclose(got, want, rtol=1e-12 if dtype == torch.float64 else 1e-2)


def test_the_choice_is_the_kernel(monkeypatch):
    monkeypatch.setattr(native, "leads", lambda: True)
    seen = []
    monkeypatch.setattr(_attention, "attend", lambda *x: seen.append(x))
    q = normal(2, 3, 29, 11)
    multihead_attention(q, q, q)
    assert len(seen) == 1
    multihead_attention(q, q, q, dropout_p=0.5)
    multihead_attention(q.double(), q.double(), q.double())
    monkeypatch.setattr(native, "leads", lambda: False)
    multihead_attention(q, q, q)
    assert len(seen) == 1


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    q = normal(1, 1, 5, 3)
    with pytest.raises(ValueError, match=r"impl='native': visattn was installed without its kernels"):
        multihead_attention(q, q, q, impl="native")
    with pytest.raises(ValueError, match="knows no dropout"):
        multihead_attention(q, q, q, impl="native", dropout_p=0.5)


def test_shapes_that_do_not_agree_are_refused():
    q, k = normal(1, 1, 5, 3), normal(1, 1, 7, 4)
    for arguments in ((q, k, k), (q, q, k)):
        with pytest.raises(ValueError, match="queries, keys and values need four dimensions that fit"):
            multihead_attention(*arguments, impl="native")


def test_no_memory(monkeypatch):
    monkeypatch.setattr(native, "_library", lambda: SimpleNamespace(attention_forward_float32=lambda *_: 1))
    q = normal(1, 1, 5, 3)
    with pytest.raises(MemoryError, match="no memory for the buffers of attention_forward"):
        multihead_attention(q, q, q, impl="native")


def test_nan_of_any_payload_stays():
    payload = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)
    query, key, value = (torch.randn(1, 1, 7, 5, generator=torch.Generator().manual_seed(i)) for i in range(3))
    query[0, 0, 3] = payload
    out = multihead_attention(query, key, value, impl="native")
    assert out[0, 0, 3].isnan().all()
    assert out[0, 0, [0, 1, 2, 4, 5, 6]].isfinite().all()
