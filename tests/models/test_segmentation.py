"""DANet, EANet and FCN on any backbone."""

import pytest
import torch
from torch import nn

import visattn
from visattn import models

X = torch.randn(2, 3, 61, 47)


@pytest.mark.parametrize("build", [models.fcn, models.danet, models.eanet])
@pytest.mark.parametrize("backbone", ["resnet18", "test_convnext", "test_efficientnet"])
def test_any_backbone(build, backbone):
    net = build(backbone, num_classes=5)
    outputs = net(X)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert [tuple(out.shape) for out in outputs] == [(2, 5, 61, 47)] * (3 if build is models.danet else 1)
    sum(out.square().sum() for out in outputs).backward()
    # the zero gammas of dual attention hold back what lies before them, and EANet's b1 never reaches its output
    idle = ("query_conv", "key_conv", "value_conv", "linu.conv1.bias")
    assert all(p.grad is not None for name, p in net.named_parameters() if not any(part in name for part in idle))
    assert net.eval()(X[:1]).shape == (1, 5, 61, 47)
    assert net.num_classes == 5


def test_a_backbone_with_channels_last_maps():
    net = models.fcn("test_efficientnet", num_classes=3).eval()
    want = net(X)

    class Last(nn.Module):
        output_fmt = "NHWC"

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return [feature.permute(0, 2, 3, 1) for feature in self.inner(x)]

    net.backbone = Last(net.backbone)
    torch.testing.assert_close(net(X), want)


def test_dual_attention_has_three_outputs_in_training_and_all_of_them_on_request():
    net = models.danet("resnet18", num_classes=4)
    assert len(net(X)) == 3
    net.eval()
    assert torch.equal(net(X), net.outputs(X)[0])
    assert len(net.outputs(X)) == 3


def test_output_stride():
    sizes = {}
    for stride in (4, 8, 16, 32):
        net = models.fcn("resnet18", num_classes=2, output_stride=stride)
        net.head.register_forward_hook(lambda module, inputs, output, s=stride: sizes.update({s: output.shape[2:]}))
        net(torch.randn(2, 3, 64, 96))
    assert {stride: tuple(size) for stride, size in sizes.items()} == {4: (16, 24), 8: (8, 12), 16: (4, 6), 32: (2, 3)}


def test_authors_networks_are_dilated_as_published():
    with torch.device("meta"):
        ea, da = models.eanet50(num_classes=3), models.danet50(num_classes=3)
    assert [unit.conv2.dilation[0] for unit in ea.backbone.layer4] == [2, 8, 16]
    assert [unit.conv2.padding[0] for unit in ea.backbone.layer4] == [2, 8, 16]
    assert [unit.conv2.dilation[0] for unit in da.backbone.layer4] == [2, 4, 4]
    assert isinstance(da.backbone.conv1, nn.Sequential)
    assert da.head.conv5a[0].in_channels == 2048
    with torch.device("meta"):
        wide = models.eanet50(num_classes=3, output_stride=16)
        assert [unit.conv2.dilation[0] for unit in wide.backbone.layer4] == [1, 4, 8]
        assert [unit.conv2.dilation[0] for unit in models.eanet50(output_stride=32).backbone.layer4] == [1, 1, 1]
        assert len(models.danet101(num_classes=3).backbone.layer3) == 23
        assert len(models.eanet101(num_classes=3).backbone.layer3) == 23


def test_a_mechanism_goes_before_the_classifier():
    net = models.fcn("resnet18", num_classes=3, channels=64).eval()
    record = visattn.insert(net, "dual", at="head.conv", sample=X)
    assert record.max_difference == 0
    assert record.places[0].shape == (64, 8, 6)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="fcn: timm builds no features from backbone='resnet19'"):
        models.fcn("resnet19")
    with pytest.raises(
        ValueError, match=r"danet: backbone 'test_vit' has features of strides .*, got output_stride=8. Use"
    ):
        models.danet("test_vit")
    with pytest.raises(ValueError, match="eanet: last_dilations needs a ResNet"):
        models.eanet("test_convnext", last_dilations=(2, 8, 16))
    with pytest.raises(ValueError, match=r"danet: last_dilations must be >= 1, got last_dilations=\(0, 2, 4\)"):
        models.danet("resnet50", last_dilations=(0, 2, 4))
    with pytest.raises(ValueError, match="output_stride must be >= 1, got output_stride=0"):
        models.fcn("resnet18", output_stride=0)


def test_the_dilations_of_the_authors_file_for_cityscapes():
    net = models.danet("resnet50", last_dilations=(4, 8, 16), num_classes=2)
    units = [unit.conv2 for unit in net.backbone.layer4]
    assert [(unit.dilation, unit.padding) for unit in units] == [((d, d), (d, d)) for d in (4, 8, 16)]
    assert net.eval()(X[:1]).shape == (1, 2, 61, 47)
    with pytest.raises(ValueError, match=r"danet: last_dilations needs a ResNet and a number .*\(4, 8\), units=3"):
        models.danet("resnet50", last_dilations=(4, 8))
