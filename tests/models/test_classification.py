"""SKNet and EPSANet as timm networks."""

import pytest
import timm
import torch
from torch import nn

import visattn
from visattn import models
from visattn.blocks import PyramidSqueezeAttention, SelectiveKernel
from visattn.testing.tolerance import FLOAT64_TOLERANCE, relative_error

NAMES = ("sknet26", "sknet50", "sknet101", "epsanet50", "epsanet101", "epsanet50_large", "epsanet101_large")
SMALL = {"layers": (1, 1, 1, 1)}


@pytest.mark.parametrize("name", NAMES)
def test_timm_builds_it(name):
    net = timm.create_model(name, num_classes=7, in_chans=2, drop_rate=0.5, **SMALL).eval()
    with torch.no_grad():
        assert net(torch.randn(1, 2, 33, 40)).shape == (1, 7)
        assert net(torch.randn(2, 2, 32, 32)).shape == (2, 7)
    blocks = [m for m in net.modules() if isinstance(m, SelectiveKernel | PyramidSqueezeAttention)]
    assert len(blocks) == 4
    assert net.drop_rate == 0.5
    assert timm.data.resolve_model_data_config(net)["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("name", NAMES)
def test_it_gives_features(name):
    features = timm.create_model(name, features_only=True, out_indices=(1, 4), output_stride=16, **SMALL).eval()
    with torch.no_grad():
        shapes = [tuple(f.shape) for f in features(torch.randn(1, 3, 64, 96))]
    assert shapes == [(1, 256, 16, 24), (1, 2048, 4, 6)]
    net = timm.create_model(name, **SMALL).eval()
    with torch.no_grad():
        final, between = net.forward_intermediates(torch.randn(1, 3, 64, 96), indices=2)
    assert [tuple(f.shape) for f in (*between, final)] == [(1, 1024, 4, 6), (1, 2048, 2, 3), (1, 2048, 2, 3)]


@pytest.mark.parametrize("name", ["sknet26", "epsanet50"])
def test_every_parameter_learns(name):
    net = timm.create_model(name, num_classes=3, **SMALL)
    net(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_units_are_as_published():
    unit = models.sknet50(**SMALL).layer2[0]
    assert unit.conv2.kernel_size == (3, 5)
    assert (unit.conv2.channels, unit.conv2.stride, unit.conv2.groups) == (256, 2, 32)
    assert isinstance(unit.bn2, nn.Identity)
    unit = models.epsanet50(**SMALL).layer2[0]
    assert (unit.conv2.channels, unit.conv2.stride, unit.conv2.groups) == (128, 2, (1, 4, 8, 16))
    assert isinstance(unit.bn2, nn.BatchNorm2d)
    unit = models.epsanet50_large(**SMALL).layer4[0]
    assert (unit.conv2.channels, unit.conv2.groups, unit.conv2.kernel_size) == (1024, (32,) * 4, (3, 5, 5, 7))
    assert models.epsanet50_large(kernel_size=(3, 5, 7, 9), **SMALL).layer1[0].conv2.kernel_size == (3, 5, 7, 9)
    assert unit.bn3.weight.eq(1).all()  # neither paper starts its branches at zero


def test_fuse_and_capture_take_them():
    net = models.sknet26(num_classes=3, **SMALL).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(visattn.fuse(net)(x), net(x)) < FLOAT64_TOLERANCE
    with torch.no_grad(), visattn.capture(net) as maps:
        net(x)
    assert maps["layer3.0.conv2"]["branch"].shape == (1, 2, 512)


@pytest.mark.parametrize("name", NAMES)
def test_there_is_nothing_to_download(name):
    with pytest.raises(ValueError, match=rf"{name}: there are no weights to download, got pretrained=True"):
        timm.create_model(name, pretrained=True)
