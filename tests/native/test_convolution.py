"""The kernels for grouped convolutions against torch in float64: every stride, dilation, width and remainder."""

import itertools
import platform
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from visattn import native
from visattn.native.convolution import Geometry, convolve, convolve_relu, input_gradient, weight_gradient
from visattn.ops.convolution import conv2d_relu, grouped_conv2d

CASES = [  # batch, groups, in, out, height, width, kernel, stride, padding, dilation
    (2, 3, 4, 4, 13, 11, 3, 1, 1, 1),
    (2, 3, 4, 4, 13, 29, 3, 1, 2, 2),
    (3, 2, 8, 16, 7, 5, 3, 1, 1, 1),
    (3, 2, 5, 8, 17, 31, 5, 1, 2, 1),
    (1, 4, 3, 2, 19, 37, 7, 1, 3, 1),
    (2, 4, 4, 1, 23, 103, 9, 1, 4, 1),
    (2, 2, 3, 5, 14, 9, 5, 2, 2, 1),
    (2, 2, 8, 8, 15, 17, 3, 2, 2, 2),
    (2, 1, 7, 24, 11, 13, 3, 2, 1, 1),
    (1, 2, 16, 12, 16, 23, 3, 3, 0, 1),
    (2, 2, 2, 6, 6, 40, 3, 5, 4, 3),
    (5, 2, 3, 4, 1, 1, 3, 1, 1, 1),
    (2, 3, 1, 2, 1, 7, 9, 2, 4, 1),
    (1, 1, 1, 1, 5, 3, 1, 1, 0, 1),
    (2, 2, 9, 8, 61, 67, 3, 1, 5, 4),
    (2, 2, 33, 40, 9, 6, 11, 1, 5, 1),
]
BOUND = {torch.float32: 4e-6, torch.float64: 1e-14}  # of the largest entry


def case_of(sizes, dtype):
    batch, groups, inputs, outputs, height, width, kernel, *numbers = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    x = torch.randn(batch, groups * inputs, height, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups * outputs, inputs, kernel, kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(groups * outputs, generator=generator, dtype=torch.float64)
    # rounded first: the sums are what is compared
    return *(t.to(dtype).double() for t in (x, weight, bias)), Geometry(*numbers, groups)


def assert_near(got, want, name):
    bound = BOUND[got.dtype] * want.abs().max().clamp_min(1)
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= bound, name


def test_the_kernels_are_there_wherever_they_can_be_compiled():
    can = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") and shutil.which("cc")
    assert native.available() or not can


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", CASES)
def test_against_torch(sizes, dtype, threads):
    x, weight, bias, geometry = case_of(sizes, dtype)
    numbers = dict(zip(("stride", "padding", "dilation", "groups"), geometry))
    x.requires_grad_(), weight.requires_grad_()
    out = F.conv2d(x, weight, bias, **numbers)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    d_x, d_weight = torch.autograd.grad(out, (x, weight), gradient)
    low_x, low_weight, low_bias, low_gradient = (t.detach().to(dtype) for t in (x, weight, bias, gradient))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_near(convolve(low_x, low_weight, low_bias, geometry), out.detach(), "forward")
        assert_near(input_gradient(low_gradient, low_weight, x.shape, geometry), d_x, "input")
        assert_near(weight_gradient(low_x, low_gradient, low_weight, geometry), d_weight, "weight")
        activated, sums = convolve_relu(low_x, low_weight, low_bias, low_bias, geometry)
    finally:
        torch.set_num_threads(before)
    plain = F.conv2d(x, weight, None, **numbers).detach()
    want = F.relu(bias[:, None, None] * plain + bias[:, None, None])
    assert_near(activated, want, "relu")
    assert_near(sums, want.sum(dim=(2, 3)), "sums")


def test_numbers_do_not_depend_on_threads():
    x, weight, bias, geometry = (t.float() if torch.is_tensor(t) else t for t in case_of(CASES[3], torch.float32))
    gradient = convolve(x, weight, bias, geometry)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(
            (
                convolve(x, weight, bias, geometry),
                input_gradient(gradient, weight, x.shape, geometry),
                weight_gradient(x, gradient, weight, geometry),
            )
        )
    torch.set_num_threads(before)
    for one, other in itertools.product(results[:1], results[1:]):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_any_strides_of_the_inputs():
    x, weight, bias, geometry = (t.float() if torch.is_tensor(t) else t for t in case_of(CASES[0], torch.float32))
    plain = convolve(x, weight, bias, geometry)
    wide = torch.cat([x, x], dim=3)[..., : x.shape[3]]
    last = x.contiguous(memory_format=torch.channels_last)
    for view in (wide, last):
        assert not view.is_contiguous()
        assert torch.equal(convolve(view, weight, bias, geometry), plain)
    expanded = torch.ones(()).expand(plain.shape)
    ones = torch.ones_like(plain)
    assert torch.equal(
        input_gradient(expanded, weight, x.shape, geometry), input_gradient(ones, weight, x.shape, geometry)
    )
    every_other = torch.stack([bias, bias], dim=1)[:, 0]
    assert torch.equal(convolve(x, weight, every_other, geometry), plain)


def test_nan_comes_out_where_torch_has_it_and_passes_the_relu():
    x, weight, _, geometry = (t.float() if torch.is_tensor(t) else t for t in case_of(CASES[1], torch.float32))
    x[0, 5, 6, 7] = float("nan")
    numbers = dict(zip(("stride", "padding", "dilation", "groups"), geometry))
    want = F.conv2d(x, weight, None, **numbers).isnan()
    assert want.any()
    assert not want.all()
    assert torch.equal(convolve(x, weight, None, geometry).isnan(), want)
    activated, sums = convolve_relu(x, weight, None, None, geometry)
    assert torch.equal(activated.isnan(), want)
    assert torch.equal(sums.isnan(), want.any(dim=3).any(dim=2))


@pytest.mark.parametrize(
    ("x", "weight", "options"),
    [
        ((2, 8, 5, 7), (4, 4, 3, 3), {"groups": 4}),  # channels of another layer
        ((2, 8, 5, 7), (6, 2, 3, 3), {"groups": 4}),  # outputs that the groups do not divide
        ((2, 8, 5, 7), (4, 2, 3, 5), {"groups": 4}),  # an oblong kernel
        ((2, 8, 2, 7), (4, 2, 5, 5), {"groups": 4}),  # a kernel beyond the map
        ((8, 5, 7), (4, 2, 3, 3), {"groups": 4}),  # no batch
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, weight, options):
    assert native.available()
    with pytest.raises(ValueError, match=r"impl='native': the kernels are for square kernels"):
        grouped_conv2d(torch.randn(x), torch.randn(weight), **options, impl="native")
    results = []
    for convolution in (F.conv2d, grouped_conv2d):
        try:
            results.append(convolution(torch.ones(x), torch.ones(weight), **options).tolist())
        except RuntimeError as error:
            results.append(str(error))
    assert results[0] == results[1]  # torch's own errors, where it has any


def test_types_without_kernels():
    x, weight = torch.randn(2, 8, 5, 7), torch.randn(4, 2, 3, 3)
    with pytest.raises(ValueError, match=r"the kernels are for float32 and float64 on a CPU, got .*complex64"):
        grouped_conv2d(x.to(torch.complex64), weight.to(torch.complex64), groups=4, impl="native")
    with pytest.raises(ValueError, match="tensors of one type"):
        grouped_conv2d(x, weight.double(), groups=4, impl="native")
    low = grouped_conv2d(x.bfloat16(), weight.bfloat16(), groups=4, impl="native")
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.float(), F.conv2d(x, weight, groups=4), atol=0.1)


def test_without_kernels_torch_serves(monkeypatch, tmp_path):
    x, weight = torch.randn(2, 8, 5, 7), torch.randn(4, 2, 3, 3)
    native._library.cache_clear()
    monkeypatch.setattr(native, "FILE", tmp_path / "kernels.so")
    try:
        assert not native.available()
        assert native.served(("auto", "native")) == ("auto",)
        assert torch.allclose(grouped_conv2d(x, weight, groups=4), F.conv2d(x, weight, groups=4), atol=1e-5)
        out, sums = conv2d_relu(x, weight, torch.full((4,), 2.0), None, stride=1, padding=0, dilation=1, groups=4)
        assert torch.allclose(out, F.relu(2 * F.conv2d(x, weight, groups=4)), atol=1e-5)
        assert torch.allclose(sums, out.sum(dim=(2, 3)), atol=1e-5)
        with pytest.raises(ValueError, match=r"visattn was installed without its kernels.*got machine=.*C compiler"):
            grouped_conv2d(x, weight, groups=4, impl="native")
        native._library.cache_clear()
        (tmp_path / "kernels.so").write_bytes(b"not a library")
        assert not native.available()
    finally:
        native._library.cache_clear()


def test_no_memory_is_an_error(monkeypatch):
    failing = SimpleNamespace(convolve_float32=lambda *_: 1)
    monkeypatch.setattr(native, "_library", lambda: failing)
    with pytest.raises(MemoryError, match="no memory for the buffers of convolve"):
        native.call("convolve", torch.ones(1), None, 3, flops=0)
