"""Convolutions by Fourier transforms against torch in float64, and where they are taken."""

import pytest
import torch
from torch.nn import functional as F

import visattn
from visattn import native
from visattn.native import fourier
from visattn.native.convolution import Geometry
from visattn.ops.convolution import conv2d_relu, grouped_conv2d

pytestmark = pytest.mark.skipif(not native.available(), reason=native.MISSING)

CASES = [  # batch, in, out, height, width, kernel
    (1, 1, 1, 1, 1, 1),
    (2, 3, 4, 5, 7, 3),
    (3, 20, 33, 8, 15, 5),
    (2, 67, 17, 13, 9, 7),
    (5, 97, 32, 7, 7, 3),
    (1, 5, 7, 2, 3, 9),
    (2, 31, 50, 11, 13, 1),
    (3, 7, 5, 29, 3, 15),
    (2, 311, 19, 7, 5, 3),  # a sum of more than one part
]
BOUND = {torch.float32: 4e-6, torch.float64: 1e-14}  # of the largest entry


def case_of(sizes):
    batch, inputs, outputs, height, width, kernel = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    shapes = [(batch, inputs, height, width), (outputs, inputs, kernel, kernel), (batch, outputs, height, width)]
    return [torch.randn(shape, generator=generator).double() for shape in (*shapes, (outputs,))]


def assert_near(got, want, name):
    bound = BOUND[got.dtype] * want.abs().max().clamp_min(1)
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= bound, name


@pytest.mark.parametrize("most", [1, fourier.MOST])  # one map at a time, or all
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", CASES)
def test_against_torch(sizes, dtype, most, monkeypatch):
    monkeypatch.setattr(fourier, "MOST", most)
    x, weight, gradient, bias = case_of(sizes)
    x.requires_grad_(), weight.requires_grad_()
    plain = F.conv2d(x, weight, padding=sizes[-1] // 2)
    d_x, d_weight = torch.autograd.grad(plain, (x, weight), gradient)
    plain = plain.detach()
    x, weight, gradient, bias = (tensor.detach().to(dtype) for tensor in (x, weight, gradient, bias))
    assert_near(fourier.convolve(x, weight, bias), plain + bias[:, None, None], "forward")
    assert_near(fourier.convolve(x, weight, None), plain, "without a bias")
    assert_near(fourier.input_gradient(gradient, weight), d_x, "input")
    assert_near(fourier.weight_gradient(x, gradient, weight), d_weight, "weight")
    out, sums = fourier.convolve_relu(x, weight, bias, bias)
    want = F.relu(bias[:, None, None] * plain + bias[:, None, None])
    assert_near(out, want, "relu")
    assert_near(sums, want.sum(dim=(2, 3)), "sums")


def test_float32_loses_no_more_than_a_sum_over_taps():
    x, weight, _, _ = case_of((4, 256, 64, 7, 7, 5))
    exact = F.conv2d(x, weight, padding=2)
    x, weight = x.float(), weight.float()
    columns, total = F.unfold(x, 5, padding=2), torch.zeros(4, 64, 49)
    for part, taps in zip(columns.split(1, dim=1), weight.flatten(1).split(1, dim=1)):
        total += taps * part  # one term after the other, as a plain loop has it
    ours, plain = (
        (out.double() - exact).abs().max() for out in (fourier.convolve(x, weight, None), total.view(exact.shape))
    )
    assert ours <= plain


def test_shapes_are_checked_before_memory_is_read():
    x, weight, gradient, bias = case_of(CASES[1])
    for wrong in (weight[:, :2], weight[..., :2], weight[..., :2, :2]):
        with pytest.raises(ValueError, match="by transforms was given"):
            fourier.convolve(x, wrong, None)
    for call in (
        lambda: fourier.convolve(x, weight, bias[1:]),
        lambda: fourier.input_gradient(gradient[:, 1:], weight),
        lambda: fourier.weight_gradient(x, gradient[..., 1:], weight),
    ):
        with pytest.raises(ValueError, match="by transforms was given"):
            call()


def test_tables_are_made_on_the_cpu_whatever_the_default_device_is():
    x, weight, _, _ = case_of(CASES[1])
    fourier._waves.cache_clear()
    with torch.device("meta"):
        fourier._waves(fourier.TILE, 9, True, torch.float64)
    assert_near(fourier.convolve(x, weight, None), F.conv2d(x, weight, padding=1), "forward")


def test_any_strides_and_threads():
    x, weight, gradient, bias = (tensor.float() for tensor in case_of(CASES[2]))
    want = [fourier.convolve(x, weight, bias), fourier.input_gradient(gradient, weight)]
    want.append(fourier.weight_gradient(x, gradient, weight))
    last = torch.channels_last
    views = [tensor.contiguous(memory_format=last) for tensor in (x, weight, gradient)]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            got = [fourier.convolve(views[0], views[1], torch.stack([bias, bias], dim=1)[:, 0])]
            got += [fourier.input_gradient(views[2], views[1]), fourier.weight_gradient(views[0], views[2], views[1])]
            assert all(torch.equal(a, b) for a, b in zip(got, want))
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def leading(monkeypatch):
    """On a processor where the kernels' products are taken."""
    monkeypatch.setattr(native, "leads", lambda: True)


@pytest.mark.parametrize(
    ("shape", "outputs", "kernel", "way"),
    [
        ((8, 256, 14, 14), 256, 7, "fourier"),
        ((8, 256, 14, 14), 256, 3, "fourier"),
        ((32, 512, 7, 7), 512, 3, "fourier"),
        ((8, 64, 56, 56), 16, 3, "direct"),  # few outputs: transforms of the input would cost too much
        ((8, 512, 7, 7), 128, 3, "direct"),
        ((1, 512, 7, 7), 512, 3, "direct"),  # few positions: so would those of the weight
        ((8, 256, 14, 14), 256, 11, "direct"),
        ((1, 256, 211, 223), 256, 7, "direct"),  # large maps: so would their memory
        ((8, 256, 14, 14), 256, 1, "product"),
        ((8, 256, 7, 7), 256, 1, "direct"),
        ((8, 256, 14, 14), 32, 1, "direct"),
    ],
)
def test_where_each_way_is_taken(shape, outputs, kernel, way, leading, monkeypatch):
    weight = torch.empty(outputs, shape[1], kernel, kernel)
    assert Geometry(1, kernel // 2, 1, 1).way(shape, weight) == way
    for geometry in (Geometry(2, kernel // 2, 1, 1), Geometry(1, kernel // 2 + 1, 1, 1), Geometry(1, kernel, 2, 1)):
        assert geometry.way(shape, weight) == "direct"
    monkeypatch.setattr(native, "leads", lambda: False)
    assert Geometry(1, kernel // 2, 1, 1).way(shape, weight) == "direct"


@pytest.mark.parametrize("bias", [True, False])
def test_products_for_1x1_convolutions(bias, leading):
    x, weight, gradient, shift = case_of((3, 67, 71, 7, 11, 1))
    x, weight, shift = (tensor.requires_grad_() for tensor in (x, weight, shift))
    given = (x, weight, shift) if bias else (x, weight)
    want, out = F.conv2d(*given), grouped_conv2d(*given, impl="native")
    assert out.grad_fn.name() == "_ConvolutionBackward"
    assert_near(out.detach(), want.detach(), "forward")
    for got, plain in zip(*(torch.autograd.grad(y, given, gradient) for y in (out, want))):
        assert_near(got, plain, "gradient")
    low = [tensor.detach().float() for tensor in given]
    with torch.no_grad():
        numbers = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        out, sums = conv2d_relu(*low[:2], low[2] if bias else None, low[2] if bias else None, **numbers)
    want = F.relu((shift[:, None, None] if bias else 1) * F.conv2d(x, weight) + (shift[:, None, None] if bias else 0))
    assert_near(out, want.detach(), "relu")
    assert_near(sums, want.detach().sum(dim=(2, 3)), "sums")


def test_auto_takes_it_for_wide_convolutions(leading, monkeypatch):
    called = []
    for name in ("convolve", "convolve_relu", "input_gradient", "weight_gradient"):
        function = getattr(fourier, name)
        monkeypatch.setattr(fourier, name, lambda *a, f=function, n=name: called.append(n) or f(*a))
    x, weight, gradient, bias = (tensor.float().requires_grad_() for tensor in case_of((6, 96, 80, 7, 14, 5)))
    exact = F.conv2d(x, weight, bias, padding=2)
    out = grouped_conv2d(x, weight, bias, padding=2)
    assert_near(out, exact.double(), "forward")
    for got, want in zip(*(torch.autograd.grad(y, (x, weight, bias), gradient) for y in (out, exact))):
        assert_near(got, want.double(), "gradient")
    with torch.no_grad():
        conv2d_relu(x, weight, None, bias, stride=1, padding=2, dilation=1, groups=1)
    assert called == ["convolve", "input_gradient", "weight_gradient", "convolve_relu"]


def test_the_article_blocks_run_on_it(leading, monkeypatch):
    called = []
    function = fourier._convolve
    monkeypatch.setattr(fourier, "_convolve", lambda *a, **k: called.append(a[1].shape[2]) or function(*a, **k))
    with torch.no_grad():
        visattn.create("dual_projected", 128, (7, 7)).eval()(torch.randn(18, 128, 7, 7))
        article = {"dilated": False, "groups": 1, "hidden_norm": False, "bias": True}
        visattn.create("selective_kernel", 128, kernel_size=(1, 3, 5), **article).eval()(torch.randn(18, 128, 7, 7))
    assert called == [3, 3, 3, 5]


def test_narrow_3x3_convolutions_are_taken_from_torch(leading, monkeypatch):
    for outputs, inputs, kernel, taken in (
        (16, 64, 3, True),
        (64, 256, 3, True),
        (128, 512, 3, True),
        (256, 512, 3, False),
        (8, 16, 5, False),
    ):
        shape, weight = (1, inputs, 7, 7), torch.empty(outputs, inputs, kernel, kernel)
        assert Geometry(1, kernel // 2, 1, 1).beats_torch(shape, weight) == taken
        assert not Geometry(2, kernel // 2, 1, 1).beats_torch(shape, weight)
    monkeypatch.setattr(native, "leads", lambda: False)
    assert not Geometry(1, 1, 1, 1).beats_torch((1, 64, 7, 7), torch.empty(16, 64, 3, 3))
