"""Every implementation of an op against its reference where blocks do not lead: many pieces, odd sizes, both gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

from visattn import native
from visattn.ops import _attention, convolution, dual, external, multihead
from visattn.ops.convolution import grouped_conv2d
from visattn.ops.dual import channel_residual, position_attention, position_residual
from visattn.ops.external import BatchNorm, external_residual_2d
from visattn.ops.multihead import multihead_attention
from visattn.ops.pyramid_squeeze import pyramid_squeeze
from visattn.ops.selective_kernel import branch_descriptor, branch_select


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def assert_equal(function, reference, inputs):
    """Outputs with and without gradients, and the gradients, to one part in 10^10."""
    with torch.no_grad():
        plain, quiet = reference(*inputs), function(*inputs)
    out = function(*inputs)
    assert out.shape == plain.shape
    assert torch.allclose(quiet, plain, rtol=1e-10, atol=1e-10)
    assert torch.allclose(out, plain, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn(plain.shape, dtype=plain.dtype)
    wanted = [x for x in inputs if x.requires_grad]
    fast = torch.autograd.grad(function(*inputs), wanted, cotangent)
    for got, want in zip(fast, torch.autograd.grad(reference(*inputs), wanted, cotangent), strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-10)


@pytest.fixture(params=[(2**21, 2**23), (97, 0), (29, 0)], ids=["one piece", "some heads", "some rows"])
def pieces(request, monkeypatch):
    """Pieces of a few rows or heads, the matrix kept or computed again."""
    monkeypatch.setitem(_attention.PIECE, "cpu", request.param[0])
    monkeypatch.setitem(_attention.KEPT, "cpu", request.param[1])


@pytest.mark.parametrize("weights", [None, (7, 13), (3, 1, 13), (2, 1, 7, 13), (2, 3, 7, 1), (1,)])
@pytest.mark.parametrize("mask", [None, (13,), (7, 13), (2, 1, 7, 13), (1, 3, 1, 13)])
@pytest.mark.parametrize("impl", multihead.IMPLEMENTATIONS)
def test_multihead_attention(impl, mask, weights, pieces):
    if impl == "fused" and weights:
        with pytest.raises(ValueError, match=r"impl='fused' knows no attention_weights"):
            multihead_attention(*(normal(1, 1, 2, 3) for _ in range(3)), attention_weights=torch.ones(1), impl=impl)
        return
    q, k, v = normal(2, 3, 7, 5, seed=1), normal(2, 3, 13, 5, seed=2), normal(2, 3, 13, 11, seed=3)
    options = {} if mask is None else {"attention_mask": normal(*mask, seed=4) > 0.3}
    if mask == (7, 13):
        options["attention_mask"][2] = True  # a query without keys

    def run(impl):
        return lambda q, k, v, *w: multihead_attention(
            q, k, v, **options, attention_weights=w[0] if w else None, scale=0.3, impl=impl
        )

    assert_equal(run(impl), run("reference"), [q, k, v, *([normal(*weights, seed=5)] if weights else [])])


@pytest.mark.parametrize("impl", dual.POSITION_IMPLEMENTATIONS)
def test_position_attention(impl, pieces):
    q, k, v = normal(2, 3, 5, 7, seed=1), normal(2, 3, 5, 7, seed=2), normal(2, 11, 5, 7, seed=3)
    assert_equal(
        lambda *x: position_attention(*x, impl=impl), lambda *x: position_attention(*x, impl="reference"), [q, k, v]
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("impl", dual.POSITION_IMPLEMENTATIONS)
def test_position_residual(impl, layout, pieces):
    x = normal(2, 11, 5, 7).detach().contiguous(memory_format=layout).requires_grad_()
    q, k, v = ((normal(n, 11, 1, 1, seed=n), normal(n, seed=n + 1)) for n in (3, 3, 11))
    gamma = normal(1, seed=9)

    def run(impl):
        return lambda x, a, b, c, d, e, f, g: position_residual(x, (a, b), (c, d), (e, f), g, impl=impl)

    assert_equal(run(impl), run("reference"), [x, *q, *k, *v, gamma])


@pytest.mark.parametrize("inverted", [True, False])
@pytest.mark.parametrize("channels", [6, 259])
@pytest.mark.parametrize("impl", dual.CHANNEL_IMPLEMENTATIONS)
def test_channel_residual(impl, channels, inverted):
    def run(impl):
        return lambda x, gamma: channel_residual(x, gamma, inverted=inverted, impl=impl)

    x = (normal(2, channels, 3, 5).detach() / 4).requires_grad_()
    assert_equal(run(impl), run("reference"), [x, normal(1, seed=1)])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("impl", external.IMPLEMENTATIONS)
def test_external_residual(impl, layout, training):
    x = normal(3, 7, 5, 4).detach().contiguous(memory_format=layout).requires_grad_()
    w1, b1, mk, mv, w2 = (normal(*s, seed=i) for i, s in enumerate([(7, 7, 1, 1), (7,), (4, 7), (7, 4), (7, 7, 1, 1)]))
    statistics = {}

    def run(impl):
        def call(x, w1, b1, mk, mv, w2, weight, bias):
            mean, var = torch.full((7,), 0.5).double(), torch.full((7,), 2.0).double()
            norm = BatchNorm(weight, bias, mean, var, training, 0.3, 1e-3)
            out = external_residual_2d(x, w1, b1, mk, mv, w2, norm, impl=impl)
            statistics[impl] = (mean, var)
            return out

        return call

    assert_equal(run(impl), run("reference"), [x, w1, b1, mk, mv, w2, normal(7, seed=7), normal(7, seed=8)])
    for got, want in zip(statistics[impl], statistics["reference"], strict=True):
        assert torch.allclose(got, want, rtol=1e-10)


def test_the_variance_of_near_uniform_attention_keeps_its_digits():
    """A covariance from second moments would lose them: entries near 1/S that vary in the fifth digit."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 21, 23)
    weights = (torch.randn(16, 16, 1, 1) * 1e-3, torch.zeros(16), torch.randn(8, 16) * 1e-2, torch.randn(16, 8))
    results = {}
    for impl, dtype in (("auto", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        tensors = [
            t.to(dtype) for t in (x, *weights, torch.randn(16, 16, 1, 1, generator=torch.Generator().manual_seed(1)))
        ]
        norm = BatchNorm(
            *(t.to(dtype) for t in (torch.ones(16), torch.zeros(16), torch.zeros(16), torch.ones(16))), True, 0.1, 1e-16
        )
        results[impl, dtype] = external_residual_2d(*tensors, norm, impl=impl).double()
    exact = results["reference", torch.float64]
    auto, plain = ((results[impl, torch.float32] - exact).abs().max() for impl in ("auto", "reference"))
    assert auto <= 2 * plain


CONVOLUTIONS = [  # channels, outputs, kernel, groups, stride, dilation
    (16, 16, 3, 4, 1, 1),
    (16, 16, 3, 4, 1, 2),
    (16, 16, 3, 4, 2, 1),
    (16, 8, 5, 4, 1, 1),
    (24, 12, 3, 6, 1, 1),
    (64, 16, 5, 2, 1, 1),
    (16, 4, 9, 4, 1, 1),
    (16, 8, 7, 4, 2, 1),
    (12, 12, 5, 12, 1, 1),
    (6, 10, 3, 1, 1, 1),
]


@pytest.mark.parametrize("size", [(5, 7), (31, 27)])
@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("impl", convolution.IMPLEMENTATIONS)
def test_grouped_convolution(impl, case, size):
    channels, outputs, kernel, groups, stride, dilation = case
    x, bias = normal(3, channels, *size), normal(outputs, seed=2)
    weight = normal(outputs, channels // groups, kernel, kernel, seed=1)
    padding = dilation * (kernel // 2)

    def run(impl):
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return lambda *inputs: grouped_conv2d(*inputs, **options, impl=impl)

    assert_equal(run(impl), run("reference"), [x, weight, bias])
    assert_equal(run(impl), lambda x, w: F.conv2d(x, w, None, stride, padding, dilation, groups), [x, weight])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scales", [1, 2, 4])
def test_pyramid_squeeze(scales, layout):
    features = [normal(2, 6, 3, 5, seed=i) for i in range(scales)]

    def run(impl):
        return lambda gates, *features: pyramid_squeeze(features, gates, layout=layout, impl=impl)

    assert_equal(run("auto"), run("reference"), [normal(2, scales, 6, seed=9), *features])
    assert run("auto")(normal(2, scales, 6), *features).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("branches", [1, 2, 4])
def test_branch_select_and_descriptor(branches):
    features, logits = [normal(2, 6, 3, 5, seed=i) for i in range(branches)], normal(2, branches, 6, seed=9)
    assert_equal(
        lambda logits, *f: branch_select(f, logits),
        lambda logits, *f: branch_select(f, logits, impl="reference"),
        [logits, *features],
    )
    assert_equal(lambda *f: branch_descriptor(f), lambda *f: branch_descriptor(f, impl="reference"), features)
    with torch.no_grad():
        copies = [f.clone() for f in features]
        expected = branch_select(features, logits, impl="reference")
        assert torch.allclose(branch_select(copies, logits, overwrite=True), expected, rtol=1e-12)


def test_the_descriptor_of_large_float16_maps_is_finite():
    feature = torch.full((1, 3, 300, 300), 2.0, dtype=torch.float16)
    assert torch.equal(branch_descriptor([feature, feature]), torch.full((1, 3), 4.0, dtype=torch.float16))


# ---- what looks at operations one by one, and second derivatives -----------------------------------------------------


def _residual(x, *rest):
    statistics = torch.zeros_like(rest[5]).detach(), torch.ones_like(rest[5]).detach()
    norm = BatchNorm(rest[5], rest[6], *statistics, True)
    return external_residual_2d(x, *rest[:5], norm)


OPS = {
    "multihead": (lambda q, k, v, w: multihead_attention(q, k, v, attention_weights=w), [(1, 2, 3, 2)] * 3 + [(3, 3)]),
    "position": (position_attention, [(1, 2, 2, 3), (1, 2, 2, 3), (1, 3, 2, 3)]),
    "channel": (channel_residual, [(1, 3, 2, 2), (1,)]),
    "external": (_residual, [(2, 3, 2, 2), (3, 3, 1, 1), (3,), (2, 3), (3, 2), (3, 3, 1, 1), (3,), (3,)]),
    "convolution": (lambda x, w, b: grouped_conv2d(x, w, b, padding=1, groups=2), [(1, 4, 3, 4), (4, 2, 3, 3), (4,)]),
    "pyramid": (lambda gates, a, b: pyramid_squeeze([a, b], gates), [(1, 2, 3), (1, 3, 2, 2), (1, 3, 2, 2)]),
    "select": (lambda logits, a, b: branch_select([a, b], logits), [(1, 2, 3), (1, 3, 2, 2), (1, 3, 2, 2)]),
}


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives(name):
    function, shapes = OPS[name]
    inputs = [normal(*shape, seed=index) for index, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-4, rtol=1e-3)


DEPENDENT = {
    "pyramid": lambda x: pyramid_squeeze([x, x.sin()], torch.stack([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)),
    "channel": lambda x: channel_residual(x, x.mean().view(1)),
    "convolution": lambda x: grouped_conv2d(x, x[:1, :2, :3, :3].expand(4, -1, -1, -1) * 1.0, padding=1, groups=2),
    "position": lambda x: position_attention(x, x.cos(), x * 2),
    "multihead": lambda x: multihead_attention(x, x.cos(), x * 2, attention_weights=x[..., :1] ** 2),
    "external": lambda x: _residual(
        x, *(x.flatten()[: 16 if i in (0, 4) else 4 if i in (1, 5, 6) else 8].reshape(s) for i, s in enumerate(_SIZES))
    ),
}
_SIZES = [(4, 4, 1, 1), (4,), (2, 4), (4, 2), (4, 4, 1, 1), (4,), (4,)]


@pytest.mark.parametrize("name", DEPENDENT)
def test_gradients_that_are_recorded_are_the_same_where_inputs_depend_on_each_other(name):
    x = normal(2, 4, 5, 3)
    quiet = torch.autograd.grad(DEPENDENT[name](x).square().sum(), x)[0]
    recorded = torch.autograd.grad(DEPENDENT[name](x).square().sum(), x, create_graph=True)[0]
    assert torch.allclose(recorded, quiet, rtol=1e-9, atol=1e-10)
    assert torch.autograd.grad(recorded.square().sum(), x)[0].isfinite().all()


def test_an_input_from_inference_mode_with_parameters_that_train():
    with torch.inference_mode():
        x = torch.randn(2, 4, 5, 3)
    gamma = torch.ones(1, requires_grad=True)
    channel_residual(x, gamma).sum().backward()
    assert gamma.grad is not None


# torch.func refuses every batch norm that updates its statistics.
@pytest.mark.parametrize("name", [name for name in OPS if name != "external"])
def test_function_transforms_get_plain_operations(name):
    function, shapes = OPS[name]
    inputs = [normal(*shape, seed=index).detach() for index, shape in enumerate(shapes)]
    gradient = torch.func.grad(lambda *x: function(*x).square().sum())(*inputs)
    wanted = [x.requires_grad_() for x in inputs]
    (expected,) = torch.autograd.grad(function(*wanted).square().sum(), wanted[:1])
    assert torch.allclose(gradient, expected, rtol=1e-9)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: multihead_attention(x, x, x, impl="pieces"),
        lambda x: channel_residual(x, torch.ones(1), impl="buffered"),
        lambda x: position_attention(x, x, x, impl="pieces"),
    ],
)
def test_a_named_implementation_never_falls_back(call):
    with pytest.raises(ValueError, match=r"need plain operations, got .* Leave impl at 'auto'"):
        torch.func.vmap(call)(torch.ones(2, 1, 3, 4, 5))


def test_autocast_in_the_backward_pass_changes_nothing():
    q, k, v = (normal(1, 2, 7, 4, seed=i).detach().float().requires_grad_() for i in range(3))
    weights = torch.rand(7, 7)
    expected = torch.autograd.grad(multihead_attention(q, k, v, attention_weights=weights).sum(), (q, k, v))
    out = multihead_attention(q, k, v, attention_weights=weights).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(out, (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("impl", native.served(["auto", "pieces", "native", "fused"]))
def test_a_large_softmax_loses_nothing(impl, monkeypatch):
    """Rows that saturate: recomputing from a log-sum-exp would cost digits of the gradients."""
    monkeypatch.setitem(_attention.KEPT, "cpu", 0)
    q, k, v = ((30 * normal(1, 1, 11, 5, seed=i).detach()).float().requires_grad_() for i in range(3))
    fast = torch.autograd.grad(multihead_attention(q, k, v, impl=impl).sum(), (q, k, v))
    plain = torch.autograd.grad(multihead_attention(q, k, v, impl="reference").sum(), (q, k, v))
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6 * math.sqrt(30)) for a, b in zip(fast, plain))


@pytest.mark.parametrize("impl", native.served(["auto", "pieces", "native", "reference", "fused"]))
@pytest.mark.parametrize("tokens", [7, 13])
def test_queries_of_one_sample_and_keys_of_one_head_broadcast(impl, tokens):
    q, k, v = normal(1, 3, tokens, 5), normal(2, 1, 13, 5, seed=1), normal(2, 1, 13, 4, seed=2)

    def plain(q, k, v):
        return (q @ k.transpose(2, 3) / 5**0.5).softmax(dim=-1) @ v

    if impl == "fused":
        q, k, v = (x.expand(2, 3, *x.shape[2:]) for x in (q, k, v))  # torch's kernels want them so
    assert_equal(lambda *x: multihead_attention(*x, impl=impl), plain, [q, k, v])


def test_the_result_of_attention_may_be_written_to():
    q, k = normal(1, 2, 5, 3), normal(1, 2, 7, 3, seed=1)
    multihead_attention(q, k, k).mul_(2).sum().backward()
    assert q.grad is not None


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # of torch's own derivatives
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in OPS if name != "external"])
def test_forward_mode_derivatives(name):
    function, shapes = OPS[name]
    inputs = tuple(normal(*shape, seed=index).detach() for index, shape in enumerate(shapes))
    tangents = tuple(torch.randn_like(x) for x in inputs)
    _, derivative = torch.func.jvp(function, inputs, tangents)
    moved = [x + 1e-6 * t for x, t in zip(inputs, tangents, strict=True)]
    back = [x - 1e-6 * t for x, t in zip(inputs, tangents, strict=True)]
    assert torch.allclose(derivative, (function(*moved) - function(*back)) / 2e-6, rtol=1e-5, atol=1e-5)


def test_as_many_weights_as_maps():
    with pytest.raises(ValueError, match=r"as many gates as maps, got features=1, gates=\(2, 2, 6\)"):
        pyramid_squeeze([torch.ones(2, 6, 3, 5)], torch.ones(2, 2, 6))
    with pytest.raises(ValueError, match=r"as many logits as maps, got features=2, logits=\(2, 3, 6\)"):
        branch_select([torch.ones(2, 6, 3, 5)] * 2, torch.ones(2, 3, 6))


def test_a_variance_that_rounding_makes_negative_is_zero():
    """A common part of all slots cancels: the attention of a position sums to one."""
    torch.manual_seed(0)
    x, w, eye = torch.randn(2, 4, 5, 3), torch.randn(4, 4, 1, 1), torch.eye(4)[:, :, None, None]
    values = torch.full((4, 6), 1e4)
    norm = BatchNorm(torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4), True)
    out = external_residual_2d(x, w, torch.zeros(4), torch.randn(6, 4), values, eye, norm)
    assert torch.isfinite(out).all()
    assert (norm.running_var > 0).all()
