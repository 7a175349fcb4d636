"""`visattn.fuse`: the same function as the network in eval mode, and nothing folded that is not surely a pair."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import visattn
from visattn.inference import FoldedNorm
from visattn.registry import resolve
from visattn.surgery import Inserted
from visattn.testing.examples import FEAT_SIZE, example, example_input, randomize
from visattn.testing.tolerance import NEIGHBOURS, assert_close_to_exact, nudge

NAMES = visattn.list_blocks()
GAINED = [name for name in NAMES if "fused" in vars(resolve(name).cls)]
# What a constructor's options change in the fused form.
VARIANTS = {
    **{name: (name, {}) for name in NAMES},
    "external tied": ("external", {"tie_memory": True}),
    "external without eps": ("external", {"eps": 0.0}),
    "external another norm": ("external", {"norm_layer": lambda c: nn.GroupNorm(4, c)}),
    "sk full kernels": (
        "sk",
        {"kernel_size": (1, 3, 5, 7), "dilated": False, "groups": 1, "hidden_norm": False, "bias": True},
    ),
    "sk another norm": ("sk", {"norm_layer": lambda c: nn.GroupNorm(1, c), "act_layer": nn.SiLU}),
    "sk one branch": ("sk", {"kernel_size": (3,), "act_layer": nn.Identity}),
    "sk stride": ("sk", {"stride": 2, "out_channels": 32}),
    "psa free gate": ("psa", {"gate_layer": nn.Identity, "stride": 2}),
    "bottleneck stride": ("pyramid_squeeze_bottleneck", {"stride": 2, "norm_layer": nn.BatchNorm2d}),
    "bottleneck another norm": ("pyramid_squeeze_bottleneck", {"norm_layer": lambda c: nn.GroupNorm(1, c)}),
    "head another norm": ("dual_head", {"norm_layer": lambda c: nn.GroupNorm(1, c)}),
}


def outputs(net, x):
    with torch.no_grad():
        out = net(x)
    return out if isinstance(out, tuple) else (out,)


def build(variant, **more):
    name, options = VARIANTS[variant]
    return example(name, **options, **more)


def same(actual, expected):
    for got, want in zip(actual, expected, strict=True):
        assert_close_to_exact(got, want)


def norms(net):
    return [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def checked(net, *inputs, folded):
    """Fuse in float64, compare, and expect so many batch norms less."""
    randomize(net).double().eval()
    inputs = [x.double() for x in inputs]
    state = copy.deepcopy(net.state_dict())
    fused = visattn.fuse(net)
    with torch.no_grad():
        same([fused(*inputs)], [net(*inputs)])
    assert len(norms(net)) - len(norms(fused)) == folded
    after = net.state_dict()
    assert list(state) == list(after)
    assert all(torch.equal(state[key], after[key]) for key in state)
    return fused


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fused_block_is_the_same_function(variant):
    block = build(variant).double()
    state = copy.deepcopy(block.state_dict())
    fused = visattn.fuse(block)
    for batch, size in ((2, FEAT_SIZE), (1, FEAT_SIZE if resolve(VARIANTS[variant][0]).fixed_size else (11, 4))):
        x = example_input(VARIANTS[variant][0], batch=batch, size=size, dtype=torch.float64)
        before = x.clone()
        same(outputs(fused, x), outputs(block, x))
        if x.ndim == 4:
            last = outputs(fused, x.to(memory_format=torch.channels_last))
            same(last, outputs(block, x))
            assert all(out.is_contiguous(memory_format=torch.channels_last) for out in last)
            assert all(out.is_contiguous() for out in outputs(fused, x))
        assert torch.equal(x, before)
    assert all(torch.equal(state[key], value) for key, value in block.state_dict().items())
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert any(parameter.requires_grad for parameter in block.parameters())


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


SWAPS = {
    "reflected": lambda m: setattr(m.convs[0].conv, "padding_mode", "reflect"),
    "same": lambda m: setattr(m.convs[0].conv, "padding", "same"),
    "two paddings": lambda m: setattr(m.convs[1], "conv", nn.Conv2d(12, 12, (3, 5), padding=(1, 2))),
    "another class": lambda m: setattr(m.convs[1], "conv", Doubled(12, 12, 3, padding=1)),
    "no norm": lambda m: setattr(m, "fc_bn", None),
    "no activation": lambda m: setattr(m, "fc_act", None),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_selective_kernels_with_other_layers(swap):
    block = visattn.SelectiveKernel(12, groups=3)
    SWAPS[swap](block)
    block.eval()
    x = torch.randn(2, 12, 5, 7)
    with torch.no_grad():
        assert torch.allclose(visattn.fuse(block)(x), block(x), atol=1e-5)


@pytest.mark.parametrize("name", GAINED)
def test_forms_that_replace_a_block(name):
    block = example(name)
    fused = visattn.fuse(block)
    assert type(fused).__name__ == f"Fused{type(block).__name__}"
    assert fused.__class__.__doc__
    assert not any(module.training for module in fused.modules())
    # bn2 of the bottleneck stands between the attention and a ReLU; that of a stem of the head keeps the budget
    assert len(norms(fused)) == (name in ("pyramid_squeeze_bottleneck", "dual_head"))
    size = sum(t.numel() for t in (*fused.parameters(), *fused.buffers()))
    assert size <= 1 + sum(t.numel() for t in (*block.parameters(), *block.buffers()))
    with pytest.raises(ValueError, match=r"the input must be \(B, 64, H, W\)"):
        fused(torch.randn(2, 63, 5, 7))
    assert outputs(fused, example_input(name)[:0])[0].shape[0] == 0


def test_sizes_of_matrices():
    fused = visattn.fuse(visattn.create("ea", 16, num_slots=8).eval())
    shapes = {name: tuple(t.shape) for name, t in fused.state_dict().items()}
    assert shapes == {"into_slots": (8, 16), "out_of_slots": (16, 8), "shift": (16,)}
    assert "channels=16, num_slots=8" in repr(fused)
    fused = visattn.fuse(visattn.create("sk", 32, kernel_size=(3, 5, 7)).eval())
    assert fused.select_weight.shape == (96, 32)


def losses(name, dtype, seed):
    """(fused, reference, exact) outputs in `dtype`, the exact ones in float64 from the same rounded numbers."""
    block, x = example(name, **({"impl": "reference"} if resolve(name).cls.impls else {})), example_input(name)
    if seed:
        with torch.no_grad():
            for index, tensor in enumerate(block.parameters()):
                tensor.copy_(nudge(tensor, dtype, 100 * seed + index))
        x = nudge(x, dtype, seed)
    block, x = block.to(dtype), x.to(dtype)
    auto = copy.deepcopy(block)
    for module in auto.modules():
        if hasattr(module, "impl"):
            module.impl = "auto"
    fused = outputs(visattn.fuse(auto), x)
    return list(zip(fused, outputs(block, x), outputs(block.double(), x.double())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_low_precision_loses_no_more_than_the_reference_does(name, dtype):
    for index, (fused, reference, exact) in enumerate(losses(name, dtype, 0)):
        assert fused.dtype == dtype

        def neighbours(index=index):
            runs = (losses(name, dtype, seed)[index] for seed in range(1, NEIGHBOURS + 1))
            return [(fused, reference, exact) for fused, reference, exact in runs]

        label = f"fused {name}, output {index}"
        assert_close_to_exact(fused, exact, reference, label, dtype=dtype, neighbours=neighbours)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_gradients_and_plain_operations(name):
    fused, block, x = visattn.fuse(example(name)), example(name), example_input(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.isfinite(out).all() for out in outputs(fused, x))
    fused, block, x = visattn.fuse(block.double()), block.double(), x.double()
    gradients = []
    for net in (fused, block):
        point = x.clone().requires_grad_()
        out = net(point)
        sum((o * o).sum() for o in (out if isinstance(out, tuple) else (out,))).backward()
        gradients.append(point.grad)
    same(*([g] for g in gradients))


@pytest.mark.parametrize("name", NAMES)
def test_copies_compiles_and_exports(name):
    fused, x, dim = visattn.fuse(example(name).double()), example_input(name, dtype=torch.float64), torch.export.Dim
    expected = outputs(fused, x)
    loaded = visattn.fuse(randomize(example(name), seed=5).double())
    if name in GAINED:
        assert not torch.equal(outputs(loaded, x)[0], expected[0])
    loaded.load_state_dict(fused.state_dict())
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), visattn.fuse(fused), loaded):
        same(outputs(twin, x), expected)
        assert twin.eval() is twin
        with pytest.raises(ValueError, match=r"fused networks are for inference, got mode=True\. Train the original\."):
            twin.train()
        assert not twin.training
    torch.compiler.reset()
    same(outputs(torch.compile(fused, fullgraph=True, backend="aot_eager"), x), expected)
    shapes = {0: dim("batch", min=1, max=64)}
    if x.ndim == 3:
        shapes[1] = dim("tokens", min=1, max=1024)
    elif not resolve(name).fixed_size:
        shapes |= {2: dim("height", min=1, max=128), 3: dim("width", min=1, max=128)}
    exported = torch.export.export(fused, (x,), dynamic_shapes=(shapes,)).module()
    size = FEAT_SIZE if resolve(name).fixed_size else (11, 4)
    for batch in (1, 3):
        other = example_input(name, batch=batch, size=size, dtype=torch.float64, seed=5)
        same(outputs(exported, other), outputs(fused, other))


def inserted(net, block, at, x):
    visattn.insert(net, block, at=at, sample=x)
    return net


IMAGE = (2, 3, 33, 65)
NETWORKS = {
    "timm resnet18": (
        lambda: inserted(timm.create_model("resnet18", num_classes=7), "sk", ["layer1", "layer4.1"], torch.ones(IMAGE)),
        IMAGE,
        20 + 6,
    ),
    "timm resnet stem": (lambda: timm.create_model("resnet14t", num_classes=7), IMAGE, 19),
    "timm efficientnet": (lambda: timm.create_model("efficientnet_lite0", num_classes=7), IMAGE, 49),
    "timm convnext": (
        lambda: inserted(timm.create_model("convnext_atto", num_classes=7), "ea", "stages.3", torch.ones(2, 3, 64, 96)),
        (2, 3, 64, 96),
        1,
    ),
    "timm vit": (
        lambda: inserted(
            timm.create_model("vit_tiny_patch16_224", img_size=(64, 48), depth=2, num_classes=7),
            "dual",
            "blocks.1",
            torch.ones(2, 3, 64, 48),
        ),
        (2, 3, 64, 48),
        0,
    ),
    "torchvision resnet18": (
        lambda: inserted(torchvision.models.resnet18(num_classes=7), "dual", "layer3", torch.ones(IMAGE)),
        IMAGE,
        20,
    ),
    "torchvision mobilenet": (lambda: torchvision.models.mobilenet_v2(num_classes=7), IMAGE, 52),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_others(name):
    make, shape, folded = NETWORKS[name]
    net, x = make(), torch.randn(shape)
    fused = checked(net, x, folded=folded)
    places = [n for n, module in net.named_modules() if isinstance(module, Inserted)]
    assert [n for n, module in fused.named_modules() if isinstance(module, Inserted)] == places
    for place in places:
        block = fused.get_submodule(place).block
        block = getattr(block, "block", block)
        assert type(block).__name__.startswith("Fused") or "fused" not in vars(type(block))
    if hasattr(net, "forward_features"):
        with torch.no_grad():
            same([fused.forward_features(x.double())], [net.forward_features(x.double())])
    with pytest.raises(ValueError, match="Train the original"):
        fused.train()
    assert visattn.fuse(fused)(x.double()).shape == (2, net(x.double()).shape[1])


def conv(inputs=4, outputs=4, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def test_a_small_network_exports_with_a_dynamic_batch():
    net = nn.Sequential(conv(3, 64, bias=False), nn.BatchNorm2d(64), nn.ReLU(), visattn.create("psa", 64), conv(64, 2))
    fused = checked(net, torch.randn(2, 3, 9, 7), folded=1)
    batch = torch.export.Dim("batch", min=1, max=64)
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    exported = torch.export.export(fused, (x,), dynamic_shapes=({0: batch},)).module()
    other = torch.randn(5, 3, 9, 7, dtype=torch.float64)
    same(outputs(exported, other), outputs(net, other))


X = torch.randn(2, 4, 6, 5)


class Owner(nn.Module):
    """A convolution and a norm, used as `call` says."""

    def __init__(self, call, **more):
        super().__init__()
        self.conv, self.bn, self.call = conv(), nn.BatchNorm2d(4), call
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.call(self, x)


class Optional(Owner):
    def forward(self, x, early=False):
        out = self.conv(x)
        if early:
            return out
        return self.bn(out)


class Given(Owner):
    def forward(self, x, mask=None):
        out = self.conv(x)
        if mask is not None:
            out = out * mask
        return self.bn(out)


class Loop(Owner):
    """A forward that cannot be traced, around a sequence that can."""

    def forward(self, x):
        if x.sum() > -1e9:
            return self.bn(self.conv(self.inner(x)))
        return x


class Steps(nn.Sequential):
    """Adds up what its parts give."""

    def forward(self, x):
        total = 0
        for module in self:
            x = module(x)
            total = total + x
        return total


def hooked(module, kind="register_forward_hook"):
    getattr(module, kind)(lambda module, args, out=None: None)
    return module


def instance_forward():
    module = conv()
    module.forward = lambda x: F.relu(F.conv2d(x, module.weight, module.bias, padding=1))
    return module


def shared_bn():
    bn = nn.BatchNorm2d(4)
    return nn.Sequential(conv(), bn, nn.ReLU(), conv(), bn)


def shared_conv():
    one = conv()
    return nn.Sequential(one, nn.BatchNorm2d(4), nn.ReLU(), one, nn.BatchNorm2d(4))


def tied_weights():
    net = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4))
    net[3].weight = net[0].weight
    return net


def held_in_a_list():
    net = Owner(lambda self, x: self.bn(self.conv(self.layers[1](self.layers[0](x)))))
    net.layers = [net.conv, net.bn]
    return net


def by_its_list():
    net = Owner(lambda self, x: self.layers[1](self.layers[0](x)))
    net.layers = [net.conv, net.bn]
    return net


def parametrised():
    one = conv()
    nn.utils.parametrizations.weight_norm(one)
    return one


CASES = {
    "pair": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(4)), 1),
    "attributes": (lambda: Owner(lambda s, x: s.bn(s.conv(x)).relu()), 1),
    "without affine": (lambda: nn.Sequential(conv(bias=False), nn.BatchNorm2d(4, affine=False)), 1),
    "padding and groups": (lambda: nn.Sequential(conv(groups=2, padding_mode="reflect"), nn.BatchNorm2d(4)), 1),
    "after an activation": (lambda: nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(4)), 0),
    "before": (lambda: nn.Sequential(nn.BatchNorm2d(4), conv()), 0),
    "no running statistics": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)), 0),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)), 0),
    "parametrised": (lambda: nn.Sequential(parametrised(), nn.BatchNorm2d(4)), 0),
    "hook on the conv": (lambda: nn.Sequential(hooked(conv()), nn.BatchNorm2d(4)), 0),
    "pre-hook on the norm": (
        lambda: nn.Sequential(conv(), hooked(nn.BatchNorm2d(4), "register_forward_pre_hook")),
        0,
    ),
    "forward of the instance": (lambda: nn.Sequential(instance_forward(), nn.BatchNorm2d(4)), 0),
    "subclass": (lambda: nn.Sequential(type("Mine", (nn.Conv2d,), {})(4, 4, 1), nn.BatchNorm2d(4)), 0),
    "shared conv": (shared_conv, 0),
    "shared norm": (shared_bn, 0),
    "tied weights": (tied_weights, 2),
    "called twice": (lambda: Owner(lambda s, x: s.bn(s.conv(s.bn(s.conv(x))))), 0),
    "norm twice": (lambda: Owner(lambda s, x: s.bn(s.bn(s.conv(x)))), 0),
    "output also used": (lambda: Owner(lambda s, x: s.bn(y := s.conv(x)) + y), 0),
    "weight also used": (lambda: Owner(lambda s, x: s.bn(s.conv(x)) * s.conv.weight.sum()), 0),
    "statistics also used": (lambda: Owner(lambda s, x: s.bn(s.conv(x)) * s.bn.weight.sum()), 0),
    "sequence of a user": (lambda: Steps(conv(), nn.BatchNorm2d(4)), 0),
    "sequence run by its owner": (
        lambda: Owner(
            lambda s, x: s.bn(s.conv(x)) + s.inner[0](x), inner=nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())
        ),
        1,
    ),
    "parts reached from outside": (
        lambda: Owner(lambda s, x: s.inner(x) + s.inner.conv(x), inner=Owner(lambda s, x: s.bn(s.conv(x)))),
        0,
    ),
    "across a sequence": (lambda: Owner(lambda s, x: s.bn(s.inner(x)), inner=nn.Sequential(nn.ReLU(), conv())), 1),
    "across a sequence with a pair": (
        lambda: Owner(
            lambda s, x: s.bn(s.conv(s.inner(x))),
            inner=nn.Sequential(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())),
            bn=nn.BatchNorm2d(4),
        ),
        2,
    ),
    "sequence ends in a conv": (
        lambda: Owner(lambda s, x: s.bn(s.inner(x)), inner=nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv())),
        2,
    ),
    "sequence in two places": (
        lambda: Owner(
            lambda s, x: s.bn(s.inner(x)) + s.other(x),
            inner=(inner := nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv())),
            other=inner,
        ),
        0,
    ),
    "held in a list": (held_in_a_list, 0),
    "called by its list": (by_its_list, 0),
    "early output": (lambda: Optional(None), 0),
    "optional input": (lambda: Given(None), 0),
    "cannot be traced": (lambda: Loop(None, inner=nn.Sequential(conv(), nn.BatchNorm2d(4))), 1),
    "inside an insertion": (
        lambda: inserted(
            nn.Sequential(nn.Sequential(conv(), nn.BatchNorm2d(4)), conv(), nn.BatchNorm2d(4)), "ea", ["0", "1"], X
        ),
        3,
    ),
    "block used twice": (lambda: nn.Sequential(block := visattn.create("ea", 4), nn.ReLU(), block), 1),
    "timm's norm with its activation": (lambda: nn.Sequential(conv(), timm.layers.BatchNormAct2d(4)), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_a_pair_and_what_is_not(case):
    make, folded = CASES[case]
    checked(make(), X, folded=folded)


def test_other_dimensions():
    checked(nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), torch.randn(2, 4, 9), folded=1)
    checked(nn.Sequential(nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6)), torch.randn(2, 2, 5, 4, 3), folded=1)
    checked(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), torch.randn(5, 4), folded=0)
    checked(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), torch.randn(5, 6, 4), folded=0)


def test_optional_arguments_keep_their_effect():
    net = randomize(Optional(None)).double().eval()
    fused, x = visattn.fuse(net), X.double()
    same([fused(x, early=True)], [net(x, early=True)])


def test_a_folded_norm_keeps_drop_and_activation():
    norm = timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=nn.Hardtanh)
    fused = checked(nn.Sequential(conv(), norm), X, folded=1)
    assert type(fused[1]) is FoldedNorm
    assert type(fused[1].act) is nn.SiLU
    assert type(fused[1].drop) is nn.Hardtanh


def test_nothing_is_left_behind_by_looking_at_a_forward():
    seen = []

    def remember(self, x):
        self.last = self.conv(x)
        self.calls += 1
        self.count.add_(1)
        return self.bn(self.last)

    net = Owner(remember, inner=hooked(nn.Sequential(conv())))
    net.calls = 0
    net.register_buffer("count", torch.zeros(()))
    net.eval().inner.register_forward_hook(lambda *_: seen.append(1))
    for one in (net, visattn.fuse(net)):
        assert one.calls == 0
        assert not hasattr(one, "last")
        assert one.count == 0
    assert not seen


def test_values_out_of_range_are_left_alone():
    net = nn.Sequential(conv(), nn.BatchNorm2d(4)).eval().half()
    nn.init.constant_(net[0].weight, 60.0)
    net[1].running_var.zero_()
    net[1].weight.data.fill_(100.0)
    assert len(norms(visattn.fuse(net))) == 1


class Own(visattn.SelectiveKernel):
    def forward(self, x):
        return -super().forward(x)


def test_blocks_that_are_more_than_their_class_stay():
    x = torch.randn(2, 64, 5, 7)
    checked(Own(64), x, folded=0)
    block = visattn.create("sk", 64)
    block.convs[0].conv.register_forward_hook(lambda module, args, out: out + 1)
    checked(block, x, folded=0)
    block = visattn.create("sk", 64)
    nn.utils.parametrizations.weight_norm(block.fc)
    checked(block, x, folded=0)
    block = visattn.create("sk", 64)
    nn.utils.parametrizations.weight_norm(block.convs[0].conv)
    checked(block, x, folded=3)  # its weight is read, not computed in a call


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "resnet18", "net must be a torch.nn.Module, got net='str'"),
        (lambda: nn.Linear(2, 2), r"must be in eval mode, got training=True, module='net \(Linear\)'. Call net.eval"),
        (lambda: visattn.create("ea", 8), r"eval mode, got training=True, module='net \(ExternalAttention2d\)'"),
    ],
)
def test_what_cannot_be_fused_is_refused(make, message):
    with pytest.raises(ValueError, match=f"fuse: .*{message}"):
        visattn.fuse(make())


def test_a_part_in_training_mode_is_named():
    net = nn.Sequential(conv(), nn.BatchNorm2d(4), visattn.create("ea", 4), nn.Dropout()).eval()
    net[3].train()  # a wish of its own: dropout at inference
    fused = visattn.fuse(net)
    assert fused[3].training
    net[2].conv2.train()
    with pytest.raises(ValueError, match=r"module='2 \(ExternalAttention2d\)'\. Call net\.eval\(\) first"):
        visattn.fuse(net)
    net.eval()[1].train()
    with pytest.raises(ValueError, match=r"module='1 \(BatchNorm2d\)'"):
        visattn.fuse(net)


def test_compiled_networks_are_refused():
    net = nn.Sequential(conv()).eval()
    with pytest.raises(ValueError, match=r"must not be compiled yet.*Compile what fuse returns"):
        visattn.fuse(torch.compile(net, backend="eager"))
    net.compile(backend="eager")
    with pytest.raises(ValueError, match="must not be compiled yet"):
        visattn.fuse(net)
