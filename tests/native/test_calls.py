"""What stands between Python and the kernels: tensors that they must never see, libraries that are not theirs."""

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import visattn
from visattn import native
from visattn.native.convolution import Geometry, input_gradient, weight_gradient
from visattn.native.products import product
from visattn.ops.convolution import conv2d_relu, grouped_conv2d
from visattn.ops.dual import channel_residual, position_residual
from visattn.ops.external import BatchNorm, external_residual_2d
from visattn.ops.multihead import multihead_attention

GROUPED = {"padding": 1, "groups": 4}
NUMBERS = {"stride": 1, "padding": 1, "dilation": 1, "groups": 4}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def external(x, device="cpu"):
    shapes = [(6, 6, 1, 1), (6,), (4, 6), (6, 4), (6, 6, 1, 1)]
    weights = [normal(*shape, seed=i).to(device) for i, shape in enumerate(shapes)]
    ones = torch.ones(6, device=device)
    return external_residual_2d(x, *weights, BatchNorm(ones, ones, ones, ones, False))


@pytest.mark.parametrize(
    "call", [lambda x: external(x, "meta"), lambda x: visattn.SelectiveKernel(6, groups=2).to("meta").eval()(x)]
)
def test_a_model_on_another_device_is_torchs_error(call):
    with torch.no_grad(), pytest.raises(RuntimeError, match="device"):
        call(normal(2, 6, 5, 7))


def test_weights_on_another_device_are_torchs_to_judge():
    x, weight = normal(2, 8, 5, 7), torch.ones(4, 2, 3, 3, device="meta")
    expected = F.conv2d(x, weight, **GROUPED).device
    assert grouped_conv2d(x, weight, **GROUPED).device == expected
    assert conv2d_relu(x, weight, None, None, **NUMBERS)[0].device == expected


def test_lazily_negated_tensors():
    x, weight = normal(2, 8, 5, 7), normal(4, 2, 3, 3, seed=1)
    negated = torch._neg_view(x)
    assert torch.allclose(grouped_conv2d(negated, weight, **GROUPED), F.conv2d(-x, weight, **GROUPED), atol=1e-5)
    gamma = torch.ones(1)
    assert torch.allclose(channel_residual(negated, gamma), channel_residual(-x, gamma, impl="reference"), atol=1e-4)


@pytest.mark.parametrize("scale", [torch.ones(1), torch.ones(4, dtype=torch.float64) * 2, torch.ones(4) * 2])
def test_scales_of_another_shape_or_type(scale):
    x, weight = normal(2, 8, 5, 7), normal(4, 2, 3, 3, seed=1)
    out, _ = conv2d_relu(x, weight, scale.to(x.dtype) if scale.numel() > 1 else scale, None, **NUMBERS)
    assert torch.allclose(out, F.relu(F.conv2d(x, weight, **GROUPED) * scale[:, None, None]).float(), atol=1e-5)


def test_queries_and_keys_of_unequal_width_are_refused():
    x = normal(1, 6, 5, 7)
    query, key, value = ((normal(n, 6, 1, 1), normal(n)) for n in (5, 3, 6))
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
        position_residual(x, query, key, value, torch.ones(1))


def test_a_tracer_sees_torchs_operations():
    x, weight = normal(2, 8, 5, 7), normal(4, 2, 3, 3, seed=1)
    graph = make_fx(lambda x, weight: grouped_conv2d(x, weight, **GROUPED))(x, weight)
    other = normal(2, 8, 5, 7, seed=9)
    assert torch.allclose(graph(other, weight), F.conv2d(other, weight, **GROUPED), atol=1e-5)


def test_types_are_not_mixed():
    x = normal(3, 5)
    for other in (x.double(), x.to("meta"), torch._neg_view(x)):
        with pytest.raises(ValueError, match=r"visattn.native: product_each was given a tensor of"):
            native.call("product_each", x, other, flops=0)


@pytest.mark.parametrize("op", [channel_residual, lambda x, gamma, impl: external(x)])
def test_channels_last_maps_keep_their_layout(op):
    x = normal(2, 6, 5, 7).contiguous(memory_format=torch.channels_last)
    out = op(x, torch.ones(1), impl="native")
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(out, op(x.contiguous(), torch.ones(1), impl="native"), atol=1e-5)


@pytest.mark.parametrize("outputs", [1, 2, 4, 8])
def test_an_infinity_reaches_the_gradients_that_torch_lets_it_reach(outputs):
    x, weight = normal(1, 6, 5, 11), normal(2 * outputs, 3, 3, 3, seed=1)
    gradient = normal(1, 2 * outputs, 5, 9, seed=2)
    geometry = Geometry(1, 0, 1, 2)
    x = F.pad(x, (0, 0, 1, 1))
    x[0, 1, 3, 10], gradient[0, 0, 2, 4] = float("inf"), float("nan")
    x.requires_grad_(), weight.requires_grad_()
    wanted = torch.autograd.grad(F.conv2d(x, weight, groups=2), (x, weight), gradient)
    got = (
        input_gradient(gradient, weight.detach(), x.shape, geometry),
        weight_gradient(x.detach(), gradient, weight.detach(), geometry),
    )
    for ours, torchs in zip(got, wanted):
        assert torch.equal(ours.isfinite(), torchs.isfinite())


def test_several_python_threads_at_once():
    x, weight = normal(2, 8, 31, 29), normal(8, 2, 3, 3, seed=1)
    expected = grouped_conv2d(x, weight, **GROUPED)
    before = torch.get_num_threads()

    def run(threads):
        torch.set_num_threads(threads)
        return [grouped_conv2d(x, weight, **GROUPED) for _ in range(20)]

    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(out, expected) for outs in pool.map(run, (1, 2, 3, 2)) for out in outs)
    finally:
        torch.set_num_threads(before)


def test_a_library_of_other_sources_is_not_used(monkeypatch):
    native._library.cache_clear()
    monkeypatch.setattr(native, "sources", lambda: 0)
    try:
        assert not native.available()
    finally:
        native._library.cache_clear()


@pytest.fixture
def build(monkeypatch):
    path = Path(__file__).parents[2] / "hatch_build.py"
    spec = importlib.util.spec_from_file_location("hatch_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.delenv("CFLAGS", raising=False)
    return module.build


def compiler(folder, body):
    file = folder / "fake cc"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return f"'{file}' -pipe"


def test_a_library_is_there_whole_or_not_at_all(build, monkeypatch, tmp_path):
    target = tmp_path / "there" / "kernels.so"
    target.parent.mkdir()
    target.write_text("an old one")
    monkeypatch.setenv("CC", compiler(tmp_path, "exit 1"))
    assert "did not compile the kernels" in build(target)
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    assert "there is no C compiler" in build(target)
    assert target.read_text() == "an old one"  # which its checksum tells apart
    said = tmp_path / "said"
    body = f'echo "$@" >> "{said}"; while [ "$1" != -o ]; do shift; done; echo new > "$2"'
    monkeypatch.setenv("CC", compiler(tmp_path, body))
    monkeypatch.setenv("CFLAGS", "-g")
    assert build(target) == ""
    assert target.read_text() == "new\n"
    assert os.listdir(target.parent) == ["kernels.so"]
    lines = said.read_text().splitlines()
    assert all("-pipe" in line and "-g" in line for line in lines)
    assert sum("-DDOUBLE" in line for line in lines) == len(lines) // 2
    assert sum(f"-DSOURCES={native.sources()}u" in line for line in lines) == len(lines) - 1


def test_norms_of_another_size_and_freed_memory():
    x = normal(1, 6, 5, 7)
    shapes = [(6, 6, 1, 1), (6,), (4, 6), (6, 4), (6, 6, 1, 1)]
    norm = BatchNorm(*(torch.ones(1) for _ in range(4)), False)
    with pytest.raises((RuntimeError, ValueError)):
        external_residual_2d(x, *(normal(*shape) for shape in shapes), norm)
    weight = normal(4, 2, 3, 3)
    x = normal(2, 8, 5, 7)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory was freed"):
        grouped_conv2d(x, weight, **GROUPED, impl="native")


def test_a_kernel_that_reaches_far_beyond_the_map_is_torchs():
    x, weight = normal(1, 4, 4, 4), normal(4, 2, 2, 2)
    options = {"groups": 2, "padding": 4000, "dilation": 8002}
    assert torch.allclose(grouped_conv2d(x, weight, **options), F.conv2d(x, weight, **options))
    with pytest.raises(ValueError, match="impl='native'"):
        grouped_conv2d(x, weight, **options, impl="native")
    with pytest.raises(ValueError, match="was given matrices"):
        product(normal(2, 3, 5), normal(3, 5, 7))
    with pytest.raises(ValueError, match="what is added does not fit"):
        product(normal(3, 5), normal(2, 5, 7), bias=normal(4))


def test_large_values_do_not_overflow_before_they_are_weighed():
    query, value = torch.zeros(1, 1, 16, 4), torch.full((1, 1, 16, 8), 1e38)
    assert torch.allclose(multihead_attention(query, query, value, impl="native"), value)


def test_a_mask_for_more_samples_than_there_are_is_refused():
    query, mask = normal(1, 2, 5, 3), torch.zeros(3, 1, 5, 5, dtype=torch.bool)
    for impl in ("pieces", "native"):
        with pytest.raises(ValueError, match="attention_mask must broadcast to the batch, heads, queries and keys"):
            multihead_attention(query, query, query, attention_mask=mask, impl=impl)


@pytest.mark.parametrize(("capability", "expected"), [("AVX2", True), ("AVX512", False), ("DEFAULT", False)])
def test_large_products_are_taken_where_torch_has_no_longer_vectors(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(native, "available", lambda: True)
    assert native.leads() == expected
    monkeypatch.setattr(native, "available", lambda: False)
    assert not native.leads()
