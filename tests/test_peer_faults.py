"""Faults found in the attention code people paste today; each test shows that one is not here."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import visattn
from visattn.testing.examples import randomize


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_external_memories_share_nothing_unless_asked():
    block = visattn.ExternalAttention2d(8)
    assert block.linear_0.weight.data_ptr() != block.linear_1.weight.data_ptr()
    tied = visattn.ExternalAttention2d(8, tie_memory=True)
    assert not any("linear_1" in key for key in tied.state_dict())
    twin = visattn.ExternalAttention2d(8)
    twin.load_state_dict({**tied.state_dict(), "linear_1.weight": tied.linear_0.weight.permute(1, 0, 2)})
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(tied.double()(x), twin.double()(x))  # still tied after a move to another type


def test_external_checkpoint_loads_into_both_memories():
    block, source = visattn.ExternalAttention2d(8), randomize(visattn.ExternalAttention2d(8), seed=3)
    block.load_state_dict(source.state_dict())
    for name in ("linear_0", "linear_1"):
        assert torch.equal(getattr(block, name).weight, getattr(source, name).weight)


@pytest.mark.parametrize("tie_memory", [False, True])
def test_external_memory_takes_one_step(tie_memory):
    block = visattn.ExternalAttention2d(8, tie_memory=tie_memory)
    before = block.linear_0.weight.detach().clone()
    block(torch.randn(2, 8, 5, 7)).square().sum().backward()
    torch.optim.SGD(block.parameters(), lr=0.5).step()
    torch.testing.assert_close(block.linear_0.weight.detach(), before - 0.5 * block.linear_0.weight.grad)


def test_import_needs_torch_alone_and_is_silent():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['timm', 'torchvision', 'lightning', 'torchmetrics', 'mlxtend', "
        "'matplotlib', 'jinja2', 'typer', 'rich', 'safetensors', 'scipy', 'pandas', 'PIL']))\n"
        "import visattn\nvisattn.create('sk', 32)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_external_slots_are_free_and_no_file_is_read():
    assert visattn.ExternalAttention2d(8, num_slots=5).linear_0.weight.shape == (5, 8, 1)
    assert visattn.MultiHeadExternalAttention(8, num_heads=2, num_slots=5).linear_0.weight.shape == (5, 4)


def test_arguments_that_do_nothing_do_not_exist():
    with pytest.raises(TypeError, match="qkv_bias"):
        visattn.MultiHeadExternalAttention(16, num_heads=2, qkv_bias=True)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("weighted", [False, True])
def test_fully_masked_row_gives_the_bias_and_harms_no_gradient(impl, weighted):
    block = randomize(visattn.MultiHeadAttention(16, num_heads=4, impl=impl)).double()
    x = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    mask[0, 0, 1] = True
    weights = torch.rand(2, 4, 6, 6, dtype=torch.float64) if weighted else None
    out = block(x, attention_mask=mask, attention_weights=weights)
    torch.testing.assert_close(out[0, 1], block.fc_o.bias)
    out[0, 0].sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(out).all()


def test_attention_weights_scale_scores_and_the_mask_removes_keys():
    block = randomize(visattn.MultiHeadAttention(16, num_heads=4)).double().eval()
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    keys = x.clone()
    keys[:, 0] += 1
    mask = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    mask[..., 0] = True
    weights = torch.ones(1, 1, 1, 5, dtype=torch.float64)
    weights[..., 0] = 0
    assert torch.equal(block(x, x, attention_mask=mask), block(x, keys, attention_mask=mask))
    assert not torch.allclose(block(x, x, attention_weights=weights), block(x, keys, attention_weights=weights))
    assert "does not remove the key" in visattn.MultiHeadAttention.__doc__


def test_no_dropout_unless_asked():
    block = randomize(visattn.MultiHeadAttention(16, num_heads=4)).train()
    x = torch.randn(1, 5, 16)
    assert torch.equal(block(x), block(x))
    dropping = randomize(visattn.MultiHeadAttention(16, num_heads=4, attn_drop=0.5)).train()
    assert not torch.equal(dropping(x), dropping(x))
    assert torch.equal(dropping.eval()(x), block.eval()(x))


def test_selective_kernel_is_the_papers_by_default():
    block = visattn.SelectiveKernel(64)
    assert [(b.conv.kernel_size, b.conv.dilation, b.conv.groups) for b in block.convs] == [
        ((3, 3), (1, 1), 32),
        ((3, 3), (2, 2), 32),
    ]
    assert isinstance(block.fc_bn, nn.BatchNorm2d)
    assert isinstance(block.fc_act, nn.ReLU)
    assert block.fc.out_features == 32  # max(32, 64 // 16)


@pytest.mark.parametrize("batch", [1, 2])
def test_selective_kernel_trains_at_any_batch(batch):
    block = visattn.SelectiveKernel(16, kernel_size=(3, 5, 7), min_hidden=8).train()
    mean = block.fc_bn.running_mean.clone()
    block(torch.randn(batch, 16, 5, 7)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())
    assert torch.equal(block.fc_bn.running_mean, mean) == (batch == 1)


def test_selective_kernel_receptive_fields_grow():
    block = randomize(visattn.SelectiveKernel(4, kernel_size=(1, 3, 5, 7))).eval()
    x = torch.zeros(1, 4, 9, 9, requires_grad=True)
    for reach, branch in enumerate(block.convs):
        (grad,) = torch.autograd.grad(branch.conv(x)[0, 0, 4, 4], x)
        rows = grad[0].abs().sum(dim=(0, 2)).nonzero().flatten()
        assert int(rows.max() - 4) == reach


@pytest.mark.parametrize("kernel_size", [(3, 4), (4, 3), ()])
def test_selective_kernel_checks_every_kernel(kernel_size):
    with pytest.raises(ValueError, match="kernel_size needs odd sizes"):
        visattn.SelectiveKernel(8, kernel_size=kernel_size)


def test_selective_kernel_passes_its_layers_on():
    block = visattn.SelectiveKernel(8, norm_layer=lambda c: nn.GroupNorm(1, c), act_layer=nn.SiLU)
    assert {type(m) for m in block.modules()} >= {nn.GroupNorm, nn.SiLU}
    assert not any(isinstance(m, nn.BatchNorm2d | nn.ReLU) for m in block.modules())


def test_bottleneck_with_stride_builds_its_shortcut():
    block = visattn.PyramidSqueezeBottleneck(256, 64, stride=2)
    assert block(torch.randn(1, 256, 9, 7)).shape == (1, 256, 5, 4)


def test_projected_dual_attention_honours_its_arguments():
    block = visattn.ProjectedDualAttention(12, (5, 6), kernel_size=5)
    assert block.position_attention_module.cnn.weight.shape == (12, 12, 5, 5)
    assert block.channel_attention_module.pa.fc_o.weight.shape == (30, 30)
    assert block(torch.randn(1, 12, 5, 6)).shape == (1, 12, 5, 6)


def test_dual_attention_starts_as_the_identity_of_each_part_at_any_size():
    block = visattn.DualAttention(12)
    for size in ((5, 7), (8, 3)):
        x = torch.randn(1, 12, *size)
        assert torch.equal(block.position(x), x)
        assert torch.equal(block.channel(x), x)


@pytest.mark.parametrize("inverted", [True, False])
def test_channel_attention_has_both_softmaxes(inverted):
    block = visattn.ChannelAttention(2, inverted=inverted).double()
    nn.init.ones_(block.gamma)
    x = torch.randn(1, 2, 1, 3, dtype=torch.float64)
    flat = x[0].flatten(1)
    energies = flat @ flat.T
    weights = torch.stack([torch.softmax(-row if inverted else row, dim=0) for row in energies])
    torch.testing.assert_close(block(x), (weights @ flat).view(x.shape) + x)


def test_few_channels_still_have_a_query():
    assert visattn.PositionAttention(4).query_conv.out_channels == 1
    assert visattn.DualAttentionHead(16, 3).sa.query_conv.out_channels == 1


def test_pyramid_scales_leave_in_reverse_order():
    block = randomize(visattn.PyramidSqueezeAttention(16, 64)).eval()
    x = torch.randn(1, 16, 5, 7)
    ratio = block(x)[:, :16] / block.conv_4(x)
    torch.testing.assert_close(ratio, ratio[..., :1, :1].expand_as(ratio), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "options", "message"),
    [
        (
            32,
            {},
            "out_channels // 4 must be divisible by max(groups), got out_channels=32, groups=(1, 4, 8, 16). Use a multiple of 64.",
        ),
        (
            96,
            {},
            "out_channels // 4 must be divisible by max(groups), got out_channels=96, groups=(1, 4, 8, 16). Use a multiple of 64.",
        ),
        (
            32,
            {"groups": (1, 1, 1, 1)},
            "out_channels // 4 must be at least reduction, got out_channels=32, reduction=16. Use a multiple of 64.",
        ),
        (
            24,
            {"out_channels": 64},
            "channels must be divisible by max(groups), got channels=24, groups=(1, 4, 8, 16). Use a multiple of 16.",
        ),
    ],
)
def test_pyramid_widths_that_do_not_fit_are_refused_with_a_remedy(channels, options, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        visattn.PyramidSqueezeAttention(channels, **options)
    assert str(caught.value) == f"PyramidSqueezeAttention: {message}"


def test_pyramid_gate_can_be_freed_to_select_a_scale():
    x = torch.randn(1, 64, 5, 7)
    largest = {}
    for gate in (nn.Sigmoid, nn.Identity):
        block = randomize(visattn.PyramidSqueezeAttention(64, gate_layer=gate)).eval()
        with torch.no_grad():
            block.se.fc2.bias.mul_(100)
            block.se.fc2.weight.mul_(100)
        with visattn.capture(block) as maps:
            block(x)
        largest[gate] = maps[""]["branch"].max().item()
    assert largest[nn.Sigmoid] <= 0.4754
    assert largest[nn.Identity] > 0.9


def test_bottleneck_passes_kernels_and_groups_on():
    block = visattn.PyramidSqueezeBottleneck(64, 64, kernel_size=(1, 3, 5, 7), groups=(1, 2, 4, 8))
    assert [(c.kernel_size[0], c.groups) for c in block.conv2.children() if isinstance(c, nn.Conv2d)] == [
        (1, 1),
        (3, 2),
        (5, 4),
        (7, 8),
    ]


def test_pyramid_registers_its_parameters_and_can_be_trained():
    block = visattn.PyramidSqueezeAttention(64)
    x = torch.randn(2, 64, 5, 7)
    before = x.clone()
    block(x).sum().backward()
    assert torch.equal(x, before)
    assert len(list(block.parameters())) == 8
    assert all(p.grad is not None for p in block.parameters())


def test_initialisation_is_the_published_one():
    external = visattn.ExternalAttention2d(256)
    assert external.conv1.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert external.linear_0.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert visattn.MultiHeadAttention(128).fc_q.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert visattn.MultiHeadAttention(128).fc_q.bias.abs().max() == 0
    assert visattn.ExternalAttention(128).mk.weight.std().item() == pytest.approx(0.001, rel=0.05)
    pyramid = visattn.PyramidSqueezeAttention(256)
    assert pyramid.conv_4.weight.std().item() == pytest.approx((2 / (81 * 64)) ** 0.5, rel=0.05)
    assert pyramid.se.fc2.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.2)
    assert visattn.PositionAttention(16).gamma.item() == 0
