import copy
import dataclasses
import io
import math
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn

import visattn
from visattn.registry import MECHANISMS
from visattn.surgery import Inserted


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2),
        nn.Flatten(),
    )


NETWORKS = {
    "timm resnet18": (lambda: timm.create_model("resnet18", num_classes=7), "layer4", (2, 3, 97, 65)),
    "timm convnext": (lambda: timm.create_model("convnext_atto", num_classes=7), "stages.3", (2, 3, 97, 65)),
    "timm vit": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=(64, 48)), "blocks.1*", (2, 3, 64, 48)),
    "timm swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, num_classes=7),
        "layers.3",
        (1, 3, 64, 64),
    ),
    "torchvision resnet50": (torchvision.models.resnet50, ["layer3", "layer4.1"], (1, 3, 65, 97)),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128),
        "encoder.layers.encoder_layer_1",
        (2, 3, 32, 32),
    ),
    "plain": (small_net, "2", (2, 3, 9, 7)),
}


SMALL = ["timm resnet18", "timm convnext", "timm vit", "plain"]
PAIRS = [(n, m) for n in NETWORKS for m in (MECHANISMS if n in SMALL else ["external", "dual"])]


@pytest.mark.parametrize(("network", "mechanism"), PAIRS)
def test_output_is_unchanged_and_removal_restores_every_bit(network, mechanism):
    build, at, shape = NETWORKS[network]
    net, x = build(), torch.randn(shape)
    for index, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(index % 2 == 0)  # some weights frozen
    net.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    parameters = sum(p.numel() for p in net.parameters())
    names = [name for name, _ in net.named_modules()]
    frozen = [p.requires_grad for p in net.parameters()]
    expected = net.eval()(x)
    net.train()

    record = visattn.insert(net, mechanism, at=at, sample=x)
    assert record.max_difference == 0
    assert str(record).endswith("max|output difference| = 0")
    assert all(module.training for module in net.modules())
    assert torch.equal(net.eval()(x), expected)
    assert record.parameters_added == sum(p.numel() for p in net.parameters()) - parameters

    record.remove()
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [name for name, _ in net.named_modules()] == names
    assert [p.requires_grad for p in net.parameters()] == frozen


def test_record_says_what_went_where():
    net = timm.create_model("resnet18")
    record = visattn.insert(net, "dual", at="layer4", sample=torch.randn(1, 3, 64, 64))
    assert str(record) == (
        "Dual attention (dual) inserted at 1 place, 328,323 parameters added\n"
        "  layer4  (512, 2, 2)      328,323 parameters\n"
        "max|output difference| = 0"
    )
    assert record.gates() == {"layer4": 0.0}


def test_timm_network_tells_its_own_sample():
    record = visattn.insert(timm.create_model("resnet18"), "ea", at="layer4")
    assert record.places[0].shape == (512, 7, 7)


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("layer*", ["layer1", "layer2", "layer3", "layer4"]),
        ("layer*.conv2", [f"layer{i}.{j}.conv2" for i in range(1, 5) for j in range(2)]),
        (["layer1.?", "layer4"], ["layer1.0", "layer1.1", "layer4"]),
    ],
)
def test_patterns_take_the_outermost_match(at, expected):
    net = timm.create_model("resnet18")
    record = visattn.insert(net, "dual_channel", at=at, sample=torch.randn(1, 3, 33, 65))
    assert [place.name for place in record.places] == expected


def test_no_match_lists_the_places_with_shapes():
    with pytest.raises(
        ValueError, match=r"at='layer9' matches no place\. Places: 0 \(64, 9, 7\), 1 \(64, 9, 7\), .*3 \(64, 4, 3\)\."
    ):
        visattn.insert(small_net(), "dual", at="layer9", sample=torch.randn(1, 3, 9, 7))
    with pytest.raises(
        ValueError, match=r"layer4 \(512, 2, 3\), .*, and \d+ deeper ones \(visattn.find_places lists all\)"
    ):
        visattn.insert(timm.create_model("resnet18"), "dual", at="layer9", sample=torch.randn(1, 3, 64, 65))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": "duall"}, r"unknown block 'duall'\. Did you mean dual"),
        ({"block": "dual_head"}, "is a part of a network"),
        ({"block": "external_tokens"}, r"takes tokens \(B, N, C\), 2 gives a map \(64, 9, 7\)"),
        ({"sample": None}, "Give sample=, one input of the network"),
        ({"block": "epsa", "reduction": 99}, "must be at least reduction"),
    ],
)
def test_what_cannot_be_done_leaves_the_network_alone(arguments, message):
    net = small_net()
    with pytest.raises(ValueError, match=message):
        visattn.insert(net, **{"block": "dual", "at": "2", "sample": torch.randn(1, 3, 9, 7), **arguments})
    assert not any(isinstance(module, Inserted) for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())


def test_a_block_that_breaks_the_network_is_taken_out_again():
    class Broken(nn.Module):
        def forward(self, x):
            return x + math.inf

    net = small_net()
    with pytest.raises(RuntimeError, match="the output changed by inf on the sample, so the insertion was undone"):
        visattn.insert(net, lambda channels: Broken(), at="2", sample=torch.randn(1, 3, 9, 7))
    assert isinstance(net[2], nn.ReLU)


def test_token_blocks_serve_tokens_and_map_blocks_the_patch_grid():
    net = timm.create_model("vit_tiny_patch16_224", img_size=(64, 48), dynamic_img_size=True)
    x = torch.randn(1, 3, 64, 48)
    tokens = visattn.insert(net, "ea", at="blocks.1", sample=x)
    assert isinstance(net.blocks[1].block, visattn.ExternalAttention)
    tokens.remove()
    visattn.insert(net, "sk", at="blocks.1", sample=x)
    assert net.blocks[1].block.grid == (4, 3)
    net.eval()
    assert net(torch.randn(1, 3, 80, 80)).shape == (1, 1000)  # another, square grid
    with pytest.raises(ValueError, match="neither the 4 x 3 grid it was inserted for nor a square"):
        net(torch.randn(1, 3, 80, 64))


def test_checkpoints_from_before_the_insertion_load():
    net = small_net()
    saved = copy.deepcopy(net.state_dict())
    visattn.insert(net, "dual", at="3", sample=torch.randn(1, 3, 9, 7))
    with torch.no_grad():
        net[3].host.weight.zero_()
    keys = net.load_state_dict(saved, strict=False)
    assert not keys.unexpected_keys
    assert {key.split(".")[1] for key in keys.missing_keys} == {"gate", "block"}
    assert torch.equal(net[3].host.weight, saved["3.weight"])
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    twin = small_net()
    visattn.insert(twin, "dual", at="3", sample=torch.randn(1, 3, 9, 7))
    twin.load_state_dict(torch.load(buffer, weights_only=True))


def test_network_stays_a_network():
    net, x = small_net().eval(), torch.randn(2, 3, 9, 7)
    visattn.insert(net, "mhsa", at="0", sample=x)
    with torch.no_grad():
        net[0].gate.fill_(0.3)
        nn.init.normal_(net[0].block.attention.fc_o.weight)
    expected = net(x)
    assert torch.equal(copy.deepcopy(net)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), expected)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    assert net[0].weight.shape == (64, 3, 3, 3)  # attributes of the host stay reachable
    assert timm.create_model("resnet18").layer4[0]
    resnet = timm.create_model("resnet18")
    visattn.insert(resnet, "ea", at="layer4", sample=torch.randn(1, 3, 64, 64))
    assert resnet.layer4[1].conv1.in_channels == 512


def test_distributed_data_parallel_trains_every_inserted_parameter(tmp_path):
    net, x = small_net(), torch.randn(2, 3, 9, 7)
    visattn.insert(net, "dual", at="2", sample=x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(net)
        parallel(x).square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_gate_opens_in_training_and_the_host_learns_as_before():
    net, x = small_net(), torch.randn(4, 3, 9, 7)
    plain = copy.deepcopy(net)
    record = visattn.insert(net, "sk", at="2", sample=x)
    for model in (net, plain):
        model(x).square().sum().backward()
    torch.testing.assert_close(net[0].weight.grad, plain[0].weight.grad)
    torch.optim.SGD(net.parameters(), lr=1e-3).step()
    assert record.gates()["2"] != 0


@pytest.mark.parametrize("name", [*visattn.list_blocks("attention"), *visattn.list_blocks("convolution")])
def test_every_inserted_parameter_learns_within_three_steps(name):
    net, x = small_net(), torch.randn(4, 3, 9, 7)
    visattn.insert(net, name, at="2", sample=x)
    before = {key: p.detach().clone() for key, p in net.named_parameters() if ".block." in key or "gate" in key}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    still = {key for key, p in net.named_parameters() if key in before and torch.equal(p, before[key])}
    # The softmax over positions removes the bias b1 of external attention: its gradient is exactly zero.
    assert still == ({"2.block.conv1.bias"} if name == "external" else set())


@pytest.mark.parametrize(
    "name", [n for role in ("attention", "convolution", "tokens") for n in visattn.list_blocks(role)]
)
def test_every_block_goes_into_a_map_and_a_token_network(name):
    nets = [(torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128), "encoder.layers.*", (2, 3, 32, 32))]
    if name not in visattn.list_blocks("tokens"):
        nets.append((small_net(), "2", (2, 3, 9, 7)))
    for net, at, shape in nets:
        x, before = torch.randn(shape), copy.deepcopy(net.state_dict())
        record = visattn.insert(net, name, at=at, sample=x)
        assert record.max_difference == 0
        net.train()(x).square().mean().backward()
        record.remove()
        assert str(record).endswith("removed again")
        after = net.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[k], before[k]) for k in before if "running_" not in k and "num_batches" not in k)


def test_insertions_nest_and_come_out_in_reverse_order():
    net, x = small_net(), torch.randn(2, 3, 9, 7)
    first = visattn.insert(net, "dual", at="2", sample=x)
    second = visattn.insert(net, "ea", at="2", sample=x)
    with pytest.raises(RuntimeError, match="a later insertion has to be removed first"):
        first.remove()
    second.remove()
    first.remove()
    assert isinstance(net[2], nn.ReLU)


def test_half_precision_network_gets_a_half_precision_block():
    net, x = small_net().bfloat16(), torch.randn(1, 3, 9, 7, dtype=torch.bfloat16)
    visattn.insert(net, "dual", at="2", sample=x)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert net(x).dtype == torch.bfloat16


def test_sample_can_be_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, left, right):
            return {"out": [self.conv(left) + self.conv(right)]}

    pair = {"left": torch.randn(1, 3, 5, 7), "right": torch.randn(1, 3, 5, 7)}
    for sample in (pair, tuple(pair.values())):
        net = Two()
        assert visattn.insert(net, "dual", at="conv", sample=sample).max_difference == 0


def test_running_through_a_stage_module_by_module_includes_the_block():
    net, x = timm.create_model("resnet18", num_classes=7).eval(), torch.randn(2, 3, 65, 65)
    for mechanism in ("dual_channel", "ea"):  # one around the other
        visattn.insert(net, mechanism, at="layer4", sample=x)
    with torch.no_grad():
        net.layer4.gate.fill_(0.5)
        net.layer4.host.gate.fill_(0.5)
        net.layer4.host.block.gamma.fill_(1.0)
    expected = net(x)
    net.set_grad_checkpointing(True)  # timm runs the children of the stages
    assert torch.equal(net(x), expected)
    assert len(net.layer4) == len(list(net.layer4)) == 2
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64)
    visattn.insert(vit, "ea", at="blocks", sample=torch.randn(1, 3, 64, 64))
    assert vit.forward_intermediates(torch.randn(1, 3, 64, 64))[0].shape == (1, 17, 192)


def test_settings_reach_the_host():
    net = timm.create_model("convnext_atto")
    visattn.insert(net, "ea", at="stages.3", sample=torch.randn(1, 3, 65, 33))
    net.set_grad_checkpointing(True)
    assert net.stages[3].host.grad_checkpointing is True
    net.stages[3].gate = nn.Parameter(torch.ones(()))
    assert dict(net.named_parameters())["stages.3.gate"] == 1


def test_checkpoint_of_a_host_with_a_block_of_its_own_loads():
    net, x = torchvision.models.convnext_tiny(), torch.randn(1, 3, 33, 33)
    saved = copy.deepcopy(net.state_dict())
    visattn.insert(net, "dual", at="features.1.0", sample=x)  # torchvision's has a submodule `block`
    with torch.no_grad():
        net.features[1][0].host.block[0].weight.zero_()
    keys = net.load_state_dict(saved, strict=False)
    assert not keys.unexpected_keys
    assert torch.equal(net.features[1][0].host.block[0].weight, saved["features.1.0.block.0.weight"])


def test_checkpoints_of_one_insertion_load_into_two_and_those_of_the_blocks_alone():
    net, x = small_net(), torch.randn(1, 3, 9, 7)
    visattn.insert(net, "dual", at="2", sample=x)
    net[2].gate.data.fill_(0.7)
    saved = copy.deepcopy(net.state_dict())
    own = {key: value for key, value in saved.items() if key.startswith(("2.gate", "2.block."))}
    net[2].gate.data.zero_()
    assert not net.load_state_dict(own, strict=False).unexpected_keys
    assert net[2].gate == saved["2.gate"]
    net, x = small_net(), torch.randn(1, 3, 9, 7)
    visattn.insert(net, "dual", at="0", sample=x)
    net[0].gate.data.fill_(0.7)
    saved = copy.deepcopy(net.state_dict())
    visattn.insert(net, "ea", at="0", sample=x)
    net[0].host.gate.data.zero_()
    assert not net.load_state_dict(saved, strict=False).unexpected_keys
    assert net[0].host.gate == saved["0.gate"]
    assert net[0].gate == 0


def test_channels_are_found_where_the_layers_have_them():
    swin = torchvision.models.swin_t()
    layouts = {name: place.layout for name, place in visattn.find_places(swin, torch.randn(1, 3, 64, 96)).items()}
    assert layouts["features.0.0"] == "map"
    assert layouts["features.0"] == layouts["features.7"] == "map_last"
    small = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, num_classes=0)
    x = torch.randn(1, 3, 64, 64)
    assert visattn.find_places(small, x)["patch_embed.proj"].layout == "map"
    within = nn.Sequential(small)  # has no output_fmt
    assert visattn.find_places(within, x)["0.layers.3"].channels == 768


def test_what_has_no_patches_or_mixes_samples_is_no_place():
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.mix = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 16)

        def forward(self, x):
            return self.mix(self.patches(x).flatten(2).permute(2, 0, 1)).mean(0)

    assert list(visattn.find_places(SequenceFirst(), torch.randn(1, 3, 16, 16))) == ["patches"]
    for net, x in (
        (nn.Sequential(nn.Conv1d(3, 16, 3), nn.ReLU()), torch.randn(1, 3, 20)),
        (nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()), torch.randn(3, 20, 20)),  # one image, no batch
    ):
        with pytest.raises(ValueError, match=r"the network has no place for a block: no module of it gives \(B, C, H"):
            visattn.insert(net, "ea", at="0", sample=x)


def test_a_grid_that_is_not_square_is_not_guessed():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.mix = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 16)

        def forward(self, x):
            return self.mix(self.patches(x).flatten(2).transpose(1, 2)).mean(1)

    with pytest.raises(ValueError, match="mix gives 48 tokens, which are no square grid of patches"):
        visattn.insert(Patches(), "sk", at="mix", sample=torch.randn(1, 3, 24, 32))


def test_of_places_within_each_other_the_outermost_is_taken_over_all_patterns():
    net = timm.create_model("resnet18")
    record = visattn.insert(net, "dual_channel", at=["layer4.0", "layer[34]"], sample=torch.randn(1, 3, 33, 65))
    assert [place.name for place in record.places] == ["layer3", "layer4"]


def test_a_class_gets_the_options():
    net = small_net()
    visattn.insert(net, visattn.DualAttention, at="2", sample=torch.randn(1, 3, 9, 7), reduction=2)
    assert net[2].block.position.query_conv.out_channels == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"block": visattn.DualAttention(64)},
            "a name, a class or a function of a channel count, got an instance of Dual",
        ),
        ({"block": "sk", "stride": 2}, r"must have the shape of its input, got \(1, 64, 5, 4\) for \(1, 64, 9, 7\)"),
        ({"block": "sk", "stride": 9}, r"must have the shape of its input, got \(1, 64, 1, 1\) for \(1, 64, 9, 7\)"),
        ({"at": []}, r"at must name at least one place, got \[\]"),
    ],
)
def test_what_would_be_inserted_wrongly_is_refused(arguments, message):
    net = small_net()
    with pytest.raises(ValueError, match=message):
        visattn.insert(net, **{"block": "dual", "at": "2", "sample": torch.randn(1, 3, 9, 7), **arguments})
    assert not any(isinstance(module, Inserted) for module in net.modules())


def test_insertions_within_each_other_come_out_in_any_order():
    x = torch.randn(1, 3, 33, 33)
    for first, second in (("layer4", "layer4.*.conv2"), ("layer4.?.conv2", "layer4")):
        net = timm.create_model("resnet18")
        names = [name for name, _ in net.named_modules()]
        records = [visattn.insert(net, "ea", at=at, sample=x) for at in (first, second)]
        for record in records:
            record.remove()
        assert [name for name, _ in net.named_modules()] == names


def test_a_network_that_folds_its_weights_in_eval_is_left_as_it_was():
    class Folding(nn.Conv2d):
        folded = False

        def train(self, mode=True):
            self.folded = not mode
            return super().train(mode)

    net = nn.Sequential(Folding(3, 8, 1)).train()
    visattn.insert(net, "dual", at="0", sample=torch.randn(1, 3, 5, 7))
    assert net[0].folded is False


def test_an_interruption_undoes_the_insertion():
    class Interrupted(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return x

    net = small_net().append(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        visattn.insert(net, "dual", at="2", sample=torch.randn(1, 3, 9, 7))
    assert isinstance(net[2], nn.ReLU)


def test_the_difference_is_never_that_of_nothing():
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor

    class Net(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.conv, self.wrap = nn.Conv2d(3, 8, 1), wrap

        def forward(self, x):
            return self.wrap(self.conv(x) + torch.rand(()))  # differs from run to run

    x = torch.randn(1, 3, 5, 7)
    with pytest.raises(RuntimeError, match="the output changed by"):
        visattn.insert(Net(Output), "dual", at="conv", sample=x)
    with pytest.raises(ValueError, match="the network's output has no tensor to compare"):
        visattn.insert(Net(lambda x: None), "dual", at="conv", sample=x)


def test_a_network_that_computes_otherwise_when_watched():
    """Grouped convolutions with hooks are torch's own, without them they may be ours: equal up to rounding alone."""
    net = torch.nn.Sequential(visattn.PyramidSqueezeAttention(64), torch.nn.ReLU(), visattn.SelectiveKernel(64))
    record = visattn.insert(net.eval(), "external", at="1", sample=torch.randn(1, 64, 11, 13))
    assert record.max_difference == 0
