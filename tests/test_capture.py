import pytest
import timm
import torch
from torch import nn

import visattn
from visattn.testing.examples import randomize


def test_every_block_of_a_network_speaks():
    net = timm.create_model("resnet18", num_classes=7)
    x = torch.randn(2, 3, 96, 64)
    visattn.insert(net, "dual", at="layer3", sample=x)
    visattn.insert(net, "ea", at="layer4", sample=x)
    visattn.insert(net, "epsa", at="layer2", sample=x)
    with visattn.capture(net.eval(), queries=[(0.0, 0.0), (1.0, 1.0), (0.5, 0.2)]) as maps:
        net(x)
    assert {name: {k: tuple(v.shape) for k, v in kinds.items()} for name, kinds in maps.items()} == {
        "layer2.block": {"branch": (2, 4, 32)},
        "layer3.block.position": {"position": (2, 1, 3, 6, 4)},
        "layer3.block.channel": {"channel": (2, 256, 256)},
        "layer4.block": {"slot": (2, 64, 3, 2)},
    }
    assert not any(module._forward_hooks for module in net.modules())


def test_position_maps_are_rows_of_the_full_matrix():
    block = randomize(visattn.PositionAttention(16)).double()
    x = torch.randn(1, 16, 5, 7, dtype=torch.float64)
    with visattn.capture(block, queries=[(0.7, 0.2)]) as maps:  # row 3, column 1
        block(x)
    q, k = block.query_conv(x).flatten(2)[0], block.key_conv(x).flatten(2)[0]
    full = torch.softmax(q.T @ k, dim=-1)
    torch.testing.assert_close(maps[""]["position"][0, 0, 0].flatten(), full[3 * 7 + 1].detach())


def test_masked_tokens_get_nothing():
    block = randomize(visattn.MultiHeadAttention(16, num_heads=4))
    x = torch.randn(2, 10, 16)  # one prefix token and a 3 x 3 grid
    mask = torch.zeros(2, 1, 1, 10, dtype=torch.bool)
    mask[..., 4:] = True
    with visattn.capture(block, queries=[(0.5, 0.5)]) as maps:
        block(x, attention_mask=mask)
    position = maps[""]["position"]
    assert position.shape == (2, 4, 1, 10)
    assert position[..., 4:].abs().max() == 0
    assert torch.allclose(position.sum(-1), torch.ones(2, 4, 1))


def test_training_step_is_not_disturbed():
    net = nn.Sequential(nn.Conv2d(3, 32, 1), visattn.SelectiveKernel(32)).train()
    x = torch.randn(3, 3, 5, 7)
    with visattn.capture(net):
        net(x).sum().backward()
    assert int(net[1].convs[0].bn.num_batches_tracked) == 1
    assert all(p.grad is not None for p in net.parameters())


def test_compiled_network_speaks_too():
    net = nn.Sequential(visattn.ChannelAttention(8)).eval()
    compiled, x = torch.compile(net, backend="aot_eager"), torch.randn(1, 8, 5, 7)
    compiled(x)
    with visattn.capture(compiled) as maps:
        compiled(x)
    assert [kinds["channel"].shape for kinds in maps.values()] == [(1, 8, 8)]


def test_hooks_go_even_when_the_network_fails():
    net = nn.Sequential(visattn.ChannelAttention(8))
    with pytest.raises(ValueError, match="must be"), visattn.capture(net):
        net(torch.randn(1, 9, 5, 7))
    assert not net[0]._forward_hooks


def test_what_cannot_be_captured_is_said():
    with pytest.raises(ValueError, match="the network has no visattn block"), visattn.capture(nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match=r"fractions of height and width in \[0, 1\], got \(\(3, 4\),\)"):
        visattn.capture(visattn.ChannelAttention(8), queries=((3, 4),)).__enter__()


def test_arguments_by_name():
    block = visattn.MultiHeadAttention(16)
    with visattn.capture(block) as maps:
        block(queries=torch.randn(2, 5, 16), keys=torch.randn(2, 7, 16))
    assert maps[""]["position"].shape == (2, 8, 1, 7)


@pytest.mark.parametrize("count", [0, 3])
def test_queries_of_any_iterable(count):
    block = visattn.PositionAttention(8)
    with visattn.capture(block, queries=((i / 3, 0.5) for i in range(count))) as maps:
        block(torch.randn(2, 8, 5, 7))
    assert maps[""]["position"].shape == (2, 1, count, 5, 7)


@pytest.mark.parametrize("queries", [(0.5, 0.5), [(0.5,)], [(0.5, 0.5, 0.5)]])
def test_queries_that_are_no_pairs(queries):
    with (
        pytest.raises(ValueError, match=r"queries must be a list of pairs \(row, column\), got"),
        visattn.capture(visattn.PositionAttention(8), queries=queries),
    ):
        pass
