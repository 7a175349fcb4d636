"""`visattn.replace`: blocks in the place of convolutions."""

import copy

import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.resnet import Bottleneck, ResNet

import visattn
from visattn.blocks import PyramidSqueezeAttention, SelectiveKernel
from visattn.testing.tolerance import FLOAT64_TOLERANCE, relative_error


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=2, dilation=2, groups=4),
        nn.BatchNorm2d(128),
        nn.Conv2d(128, 64, 1),
    )


def test_a_block_takes_over_channels_stride_dilation_and_groups():
    net = plain()
    record = visattn.replace(net, "sk", at=["0", "3"])
    first, second = net[0], net[3]
    assert (first.channels, first.out_channels, first.stride, first.groups) == (3, 64, 2, 1)
    assert (second.channels, second.out_channels, second.dilation, second.groups) == (64, 128, 2, 4)
    assert [branch.conv.dilation[0] for branch in second.convs] == [2, 4]
    assert net(torch.randn(2, 3, 13, 11)).shape == (2, 64, 7, 6)
    assert [place.name for place in record.places] == ["0", "3"]
    assert "0  conv 3 -> 64, 3x3, stride 2" in str(record)


def test_norm_and_activation_behind_a_selective_kernel_go():
    net = plain()
    visattn.replace(net, "sk", at="0")
    assert [type(module) for module in net][:3] == [SelectiveKernel, nn.Identity, nn.Identity]
    net = plain()
    visattn.replace(net, "sk", at="3")  # a norm, but no activation
    assert [type(module) for module in net][3:] == [SelectiveKernel, nn.Identity, nn.Conv2d]


def test_pyramid_squeeze_leaves_the_norm_and_takes_groups_for_every_scale():
    net = timm.create_model("resnext50_32x4d", layers=(1, 1, 1, 1))
    visattn.replace(net, "epsa", at="layer?.0.conv2")
    assert net.layer2[0].conv2.groups == (32, 32, 32, 32)
    assert isinstance(net.layer2[0].bn2, nn.BatchNorm2d)
    net = timm.create_model("resnet50", layers=(1, 1, 1, 1))
    visattn.replace(net, "epsa", at="layer?.0.conv2", kernel_size=(3, 5), groups=(1, 2))
    assert (net.layer2[0].conv2.kernel_size, net.layer2[0].conv2.groups) == ((3, 5), (1, 2))


@pytest.mark.parametrize("block", ["selective_kernel", "pyramid_squeeze"])
@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_timm_networks_train(name, block):
    net = timm.create_model(name, layers=(1, 1, 1, 1), num_classes=5)
    record = visattn.replace(net, block, at="layer*.conv2")
    assert len(record.places) == 4
    net(torch.randn(2, 3, 65, 71)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_torchvision_network_trains():
    net = resnet18()
    visattn.replace(net, "sk", at="layer*.conv?")
    assert isinstance(net.layer1[0].bn1, nn.Identity)
    net(torch.randn(2, 3, 65, 71)).square().sum().backward()


def test_a_torchvision_resnext_trains():
    net = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, groups=32, width_per_group=4)
    record = visattn.replace(net, "selective_kernel", at="layer*.conv2")
    assert [place.convolution for place in record.places][1] == "conv 256 -> 256, 3x3, stride 2, 32 groups"
    assert isinstance(net.layer1[0].bn2, nn.Identity)
    assert isinstance(net.layer1[0].relu, nn.ReLU)  # it also serves the norms that stay
    net(torch.randn(2, 3, 65, 71)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_remove_brings_everything_back():
    net = timm.create_model("resnet18").eval()
    x = torch.randn(1, 3, 33, 41)
    before, state = net(x), copy.deepcopy(net.state_dict())
    record = visattn.replace(net, "sk", at="layer*.conv1")
    added = record.parameters_added
    assert added == sum(p.numel() for p in net.parameters()) - sum(
        v.numel() for k, v in state.items() if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )
    record.remove()
    assert torch.equal(net(x), before)
    assert net.state_dict().keys() == state.keys()
    assert "removed again" in str(record)
    with pytest.raises(RuntimeError, match="back already"):
        record.remove()


def test_remove_refuses_what_was_changed_since():
    net = plain()
    record = visattn.replace(net, "sk", at="0")
    later = visattn.insert(net, "dual", at="0", sample=torch.randn(1, 3, 9, 7))
    with pytest.raises(RuntimeError, match=r"remove: 0 of Sequential is not what was put there.*removed first"):
        record.remove()
    later.remove()
    record.remove()
    assert isinstance(net[0], nn.Conv2d)


def test_dtype_mode_and_shared_modules_are_kept():
    conv = nn.Conv2d(64, 64, 3, padding=1)
    net = nn.Sequential(conv, conv, nn.ReLU()).double().eval()
    visattn.replace(net, "psa", at=["0", "1"])
    assert net[0] is net[1]
    assert not net[0].training
    assert net(torch.randn(1, 64, 5, 7, dtype=torch.float64)).dtype == torch.float64


def test_a_function_of_channels():
    net = plain()
    visattn.replace(net, lambda c, out, *, stride, dilation, groups: nn.Conv2d(c, out, 1, stride=stride), at="0")
    assert net[0].kernel_size == (1, 1)
    assert isinstance(net[1], nn.BatchNorm2d)


def test_blocks_dilate():
    x = torch.randn(2, 64, 9, 7, dtype=torch.float64)
    for cls in (SelectiveKernel, PyramidSqueezeAttention):
        block = cls(64, dilation=2, stride=2, dtype=torch.float64).eval()
        reference = cls(64, dilation=2, stride=2, impl="reference", dtype=torch.float64).eval()
        reference.load_state_dict(block.state_dict())
        assert block(x).shape == (2, 64, 5, 4)
        assert relative_error(block(x), reference(x)) < FLOAT64_TOLERANCE
        with pytest.raises(ValueError, match=r"dilation must be >= 1|dilation, reduction"):
            cls(64, dilation=0)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(64, 64, 1), "1x1: it looks at no neighbours"),
        (nn.Conv2d(64, 64, (3, 5), padding=(1, 2)), "kernel 3x5, not square and odd"),
        (nn.Conv2d(64, 64, 4, padding=2), "kernel 4x4, not square and odd"),
        (nn.Conv2d(64, 64, 3), r"padding \(0, 0\), where 1 would keep the size of the map"),
        (nn.Conv2d(64, 64, 3, padding=1, stride=(1, 2)), r"stride \(1, 2\) or dilation \(1, 1\) differs by direction"),
        (nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"), "padding_mode 'reflect', not zeros"),
        (nn.LazyConv2d(64, 3, padding=1), "its channels are not known before a first call"),
        (nn.Conv1d(64, 64, 3), "Conv1d, not a 2-D convolution"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(64, 64, 3, padding=1)), "hooks or parametrizations .*first"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_be_replaced_is_named(conv, reason):
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), conv)
    with pytest.raises(
        ValueError, match=rf"replace: 1 of the 2 modules that at=.* names cannot be replaced: 1 \({reason}\)\."
    ):
        visattn.replace(net, "sk", at=["0", "1"])
    assert isinstance(net[0], nn.Conv2d)


def test_wrong_arguments():
    net = plain()
    with pytest.raises(ValueError, match=r"at='layer9' matches no module. Convolutions: 0, 3\."):
        visattn.replace(net, "sk", at="layer9")
    with pytest.raises(ValueError, match=r"matches no module. It has no convolution to replace\."):
        visattn.replace(nn.Sequential(nn.Linear(2, 2)), "sk", at="x")
    with pytest.raises(ValueError, match="at must name at least one convolution"):
        visattn.replace(net, "sk", at=[])
    with pytest.raises(
        ValueError, match=r"got 'dual'. Choose from pyramid_squeeze, selective_kernel, or use visattn.insert"
    ):
        visattn.replace(net, "dual", at="0")
    with pytest.raises(ValueError, match=r"got an instance of SelectiveKernel. Give the class"):
        visattn.replace(net, SelectiveKernel(64), at="0")
    with pytest.raises(ValueError, match="unknown block"):
        visattn.replace(net, "sq", at="0")
    with pytest.raises(
        ValueError, match=r"replace: 0, conv 3 -> 64, 3x3, stride 2: PyramidSqueezeAttention: channels must"
    ):
        visattn.replace(net, "psa", at="0")
    with pytest.raises(TypeError, match="kernels"):
        visattn.replace(net, "sk", at="0", kernels=3)
    assert isinstance(net[0], nn.Conv2d)


def test_a_unit_with_two_names_is_replaced_once_and_comes_back():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.Sequential(nn.Conv2d(8, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())

    net = Net()
    before = list(net.first)
    record = visattn.replace(net, "sk", at=["first.0", "second.0"])
    assert [place.name for place in record.places] == ["first.0", "second.0"]
    record.remove()
    assert list(net.first) == before
