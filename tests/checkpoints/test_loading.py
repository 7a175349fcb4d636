import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import visattn
from visattn import models
from visattn.checkpoints import PUBLISHED, load_checkpoint
from visattn.models.sknet_small import SelectiveKernelUnit, sknet_small
from visattn.verify import SHIPPED, load_case, load_cases

SMALL = {"layers": (1, 2, 1, 1), "channels": (64, 64, 64, 64)}
TINY = {"layers": (1, 2, 1, 1), "channels": (16, 24, 32, 48), "num_classes": 5}


def epsanet(**options):
    return models.epsanet50(**{**SMALL, "num_classes": 5, **options})


def danet(backbone="resnet50s", **options):
    return models.danet(backbone, **{**TINY, **options})


def eanet(**options):
    return models.eanet("resnet50s", **{**TINY, **options})


def changed(net):
    """A network of other numbers everywhere, and its state."""
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) + 0.1 if tensor.is_floating_point() else torch.tensor(7))
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def renamed(state, *rules):
    """A state under other names; of the rules (pattern, replacement) the first that fits counts."""
    theirs = {}
    for name, tensor in state.items():
        fitting = [(pattern, by) for pattern, by in rules if re.match(pattern, name)]
        theirs[re.sub(*fitting[0], name, count=1) if fitting else name] = tensor
    assert len(theirs) == len(state)
    return theirs


def saved(tmp_path, value):
    file = tmp_path / "file.pth"
    torch.save(value, file)
    return file


def equal(net, state):
    now = net.state_dict()
    assert now.keys() == state.keys()
    return all(torch.equal(now[name], state[name]) for name in state)


# ---- networks in their authors' names -------------------------------------------------------------------------------


def of_danet(state):
    return renamed(state, (r"backbone\.", "pretrained."))


def of_mmseg(state):
    """Written by hand from the names that MMSegmentation's DAHead and ResNetV1c give their layers."""
    theirs = renamed(
        state,
        (r"backbone\.conv1\.", "backbone.stem."),
        (r"backbone\.bn1\.", "backbone.stem.7."),
        (r"head\.conv5a\.0", "decode_head.pam_in_conv.conv"),
        (r"head\.conv5a\.1", "decode_head.pam_in_conv.bn"),
        (r"head\.conv5c\.0", "decode_head.cam_in_conv.conv"),
        (r"head\.conv5c\.1", "decode_head.cam_in_conv.bn"),
        (r"head\.conv51\.0", "decode_head.pam_out_conv.conv"),
        (r"head\.conv51\.1", "decode_head.pam_out_conv.bn"),
        (r"head\.conv52\.0", "decode_head.cam_out_conv.conv"),
        (r"head\.conv52\.1", "decode_head.cam_out_conv.bn"),
        (r"head\.conv6\.1", "decode_head.pam_conv_seg"),
        (r"head\.conv7\.1", "decode_head.cam_conv_seg"),
        (r"head\.conv8\.1", "decode_head.conv_seg"),
        (r"head\.sa\.(query|key|value)_conv", r"decode_head.pam.\1_project"),
        (r"head\.sa\.gamma", "decode_head.pam.gamma.scale"),
        (r"head\.sc\.gamma", "decode_head.cam.gamma.scale"),
    )
    return {name: tensor.squeeze() if "gamma" in name else tensor for name, tensor in theirs.items()}


def of_eanet(state):
    return renamed(
        state,
        (r"backbone\.conv1\.", "extractor.0."),
        (r"backbone\.bn1\.", "extractor.1."),
        *((rf"backbone\.layer{i}\.", f"extractor.{i + 3}.") for i in (1, 2, 3, 4)),
        (r"head\.fc1\.", "fc1.0."),
        (r"head\.", ""),
    )


def of_developer0hye(state):
    theirs = renamed(
        state,
        (r"conv1\.", "basic_conv.0."),
        (r"bn1\.", "basic_conv.1."),
        (r"layer(\d)\.(\d+)\.conv2\.convs\.(\d)\.conv\.", r"stage_\1.\2.conv2_sk.convs.\3.0."),
        (r"layer(\d)\.(\d+)\.conv2\.convs\.(\d)\.bn\.", r"stage_\1.\2.conv2_sk.convs.\3.1."),
        (r"layer(\d)\.(\d+)\.conv2\.fc\.", r"stage_\1.\2.conv2_sk.fc.0."),
        (r"layer(\d)\.(\d+)\.conv2\.fc_bn\.", r"stage_\1.\2.conv2_sk.fc.1."),
        (r"layer(\d)\.(\d+)\.conv2\.", r"stage_\1.\2.conv2_sk."),
        (r"layer(\d)\.(\d+)\.conv(\d)\.", r"stage_\1.\2.conv\3.0."),
        (r"layer(\d)\.(\d+)\.bn(\d)\.", r"stage_\1.\2.conv\3.1."),
        (r"layer(\d)\.(\d+)\.downsample\.", r"stage_\1.\2.shortcut."),
        (r"fc\.", "classifier."),
    )
    pointwise = re.compile(r".*(conv2_sk\.fc\.0|fcs\.\d)\.weight")
    return {name: t[..., None, None] if pointwise.fullmatch(name) else t for name, t in theirs.items()}


def of_ppplang_unit(state):
    numbers = {"conv1": 0, "bn1": 1, "conv2": 2, "bn2": 3, "conv3": 4, "bn3": 5}
    return renamed(
        state,
        (r"conv2\.convs\.(\d)\.conv\.", r"feas.2.convs.\1.0."),
        (r"conv2\.convs\.(\d)\.bn\.", r"feas.2.convs.\1.1."),
        (r"downsample\.", "shortcut."),
        *((rf"{name}\.", f"feas.{i}.") for name, i in numbers.items()),
    )


def of_ppplang(state):
    theirs = {}
    for name, tensor in state.items():
        match = re.match(r"layer(\d)\.(\d+)\.", name)
        if match:
            (rest,) = of_ppplang_unit({name[match.end() :]: tensor})
            theirs[f"stage_{match[1]}.{match[2]}.{rest}"] = tensor
        else:
            theirs.update(
                renamed({name: tensor}, (r"conv1", "basic_conv.0"), (r"bn1", "basic_conv.1"), (r"fc", "classifier.0"))
            )
    return theirs


def sknet(**options):
    return models.sknet26(**{"layers": (1, 2, 1, 1), "channels": (32, 48, 64, 96), "num_classes": 5, **options})


NETWORKS = {
    "EPSANet as of murufeng/EPSANet": (epsanet, dict),
    "DANet as of junfu1115/DANet": (danet, of_danet),
    "DANet as of open-mmlab/mmsegmentation": (lambda: danet("resnet50c", stem_width=8), of_mmseg),
    "EANet as of MenghaoGuo/EANet": (eanet, of_eanet),
    "SKNet as of developer0hye/SKNet-PyTorch": (sknet, of_developer0hye),
    "SKNet as of pppLang/SKNet": (sknet_small, of_ppplang),
    "SKUnit as of pppLang/SKNet": (lambda: SelectiveKernelUnit(16, 32, stride=2), of_ppplang_unit),
}


@pytest.mark.parametrize("title", NETWORKS)
def test_a_network_in_its_authors_names(tmp_path, title):
    build, theirs = NETWORKS[title]
    source, net = build(), build()
    state = changed(source)
    file = saved(tmp_path, {"epoch": 2, "state_dict": {f"module.{k}": v for k, v in theirs(state).items()}})
    record = load_checkpoint(net, file)
    assert equal(net, state)
    assert record.layout == f"{title}, under 'state_dict', without the prefix 'module.'"
    assert {*record.mapped} == {*state}
    assert (record.dropped, record.left) == ((), ())


def test_numbers_too_large_for_the_network_are_refused(tmp_path):
    net = visattn.PyramidSqueezeBottleneck(64, 64).half()
    state = {name: tensor.float() for name, tensor in net.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state["bn1.running_var"] = torch.full((64,), 70_000.0)
    with pytest.raises(
        ValueError, match=r"numbers that are infinite in the network's torch.float16 \(bn1.running_var\)"
    ):
        load_checkpoint(net, saved(tmp_path, state))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    state["bn1.running_var"] = torch.full((64,), 7.0)
    load_checkpoint(net, saved(tmp_path, state))
    assert net.bn1.running_var.eq(7).all()


def test_what_only_training_needs_is_dropped(tmp_path):
    net = danet()
    theirs = of_danet(changed(danet()))
    extra = {"pretrained.fc.weight": torch.ones(1000, 64), "auxlayer.conv5.0.weight": torch.ones(3)}
    assert load_checkpoint(net, saved(tmp_path, {**theirs, **extra})).dropped == (*extra,)
    net = danet("resnet50c", stem_width=8)
    theirs = of_mmseg(changed(danet("resnet50c", stem_width=8)))
    extra = {f"auxiliary_head.convs.0.{name}": torch.ones(3) for name in ("a", "b", "c", "d")}
    record = load_checkpoint(net, saved(tmp_path, {"meta": {"epoch": 1}, "state_dict": {**theirs, **extra}}))
    assert record.dropped == (*extra,)
    assert "\n  dropped 4: auxiliary_head.* (4)\n" in str(record)
    assert "note: its backbone is timm's resnet50c or resnet101c" in str(record)


def test_the_plain_stem_of_the_file_for_cityscapes(tmp_path):
    state = changed(danet("resnet50"))
    file, net = saved(tmp_path, of_danet(state)), danet("resnet50")
    assert "DANet101 for Cityscapes needs last_dilations=(4, 8, 16)" in str(load_checkpoint(net, file))
    assert equal(net, state)
    with pytest.raises(
        ValueError, match=r"stem: plain, 7x7, 64 channels in the file, deep, 3x3, 128 channels in the .*"
    ):
        load_checkpoint(danet(), file)


def test_a_memory_that_is_tied_in_the_network(tmp_path):
    tied = visattn.ExternalAttention2d(8, num_slots=6, tie_memory=True)
    state = changed(tied)
    both = {**state, "linear_1.weight": state["linear_0.weight"].transpose(0, 1)}
    net = visattn.ExternalAttention2d(8, num_slots=6, tie_memory=True)
    assert load_checkpoint(net, saved(tmp_path, both)).dropped == ("linear_1.weight",)
    assert equal(net, state)
    with pytest.raises(ValueError, match=r"has 1 that it does not know \(linear_1\.weight\)"):
        load_checkpoint(net, saved(tmp_path, {**both, "linear_1.weight": torch.zeros(8, 6, 1)}))


# ---- single blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry.source)
def test_a_bare_block(tmp_path, entry):
    case = next(
        case
        for case in load_cases(SHIPPED)
        if (case.source["class"], case.source["repo"]) == (entry.name, entry.repo)
        and case.constructor.get("split_input", False) is False
        and not case.name.startswith("sk_timm_split")
    )
    channels = next(iter(case.inputs.values())).shape[1]
    state = {name: torch.from_numpy(array) for name, array in case.state.items()}
    block = entry.build(case.constructor, channels=channels, dtype=torch.float64)
    file = saved(tmp_path, {"model": state})
    record = load_checkpoint(block, file)
    assert entry.name in record.layout
    assert entry.repo in record.layout
    assert equal(block, {**block.state_dict(), **entry.to_ours(state)})
    inside = nn.Sequential(nn.Conv2d(3, 4, 1), entry.build(case.constructor, channels=channels, dtype=torch.float64))
    before = {name: tensor.clone() for name, tensor in inside[0].state_dict().items()}
    record = load_checkpoint(inside, file)
    assert record.left[:2] == ("0.weight", "0.bias")
    assert equal(inside[0], before)
    assert equal(inside[1], block.state_dict())


def test_a_block_that_fits_several_places(tmp_path):
    net = nn.Sequential(visattn.PositionAttention(8), nn.ReLU(), visattn.PositionAttention(8))
    file = saved(tmp_path, visattn.PositionAttention(8).state_dict())
    with pytest.raises(ValueError, match=r"fits 2 blocks of the network \(0, 2\)\. Load it into one of them"):
        load_checkpoint(net, file)
    load_checkpoint(net.get_submodule("2"), file)


def test_channel_attention_of_the_other_kind(tmp_path):
    file = saved(tmp_path, {"beta": torch.ones(1)})
    load_checkpoint(visattn.ChannelAttention(8, inverted=False), file)
    with pytest.raises(ValueError, match="no published layout, and none of its names"):
        load_checkpoint(visattn.ChannelAttention(8), file)


def test_a_block_of_another_size(tmp_path):
    case = load_case(SHIPPED / "selective_kernel" / "skconv_dilated_eval.json")
    file = saved(tmp_path, {name: torch.from_numpy(array) for name, array in case.state.items()})
    with pytest.raises(
        ValueError,
        match=r"SKConv as of developer0hye/SKNet-PyTorch\) has 7 that it does not know \(convs\.2\.conv.* of another shape \(convs\.0\.conv",
    ):
        load_checkpoint(visattn.SelectiveKernel(64), file)


# ---- other networks' weights ----------------------------------------------------------------------------------------


def test_a_classification_network_into_a_backbone(tmp_path):
    source = timm.create_model("resnet50", **TINY)
    state = changed(source)
    net = danet("resnet50")
    head = {name: tensor.clone() for name, tensor in net.head.state_dict().items()}
    record = load_checkpoint(net, saved(tmp_path, state))
    assert record.dropped == ("fc.weight", "fc.bias")
    assert {name.split(".")[0] for name in record.left} == {"head"}
    assert equal(net.head, head)
    assert equal(net.backbone, {k: v for k, v in state.items() if not k.startswith("fc.")})


def test_a_published_classifier_into_a_backbone(tmp_path):
    theirs = of_developer0hye(changed(sknet()))
    net = danet("sknet26", channels=(32, 48, 64, 96))
    record = load_checkpoint(net, saved(tmp_path, theirs))
    assert record.layout == "SKNet as of developer0hye/SKNet-PyTorch, into the backbone"
    assert record.dropped == ("fc.weight", "fc.bias")
    assert {name.split(".")[0] for name in record.left} == {"head"}


def test_a_backbone_that_timm_flattens(tmp_path):
    state = changed(timm.create_model("convnext_atto", num_classes=5))
    net = models.fcn("convnext_atto", num_classes=3, output_stride=32)
    record = load_checkpoint(net, saved(tmp_path, state))
    assert {name.split(".")[0] for name in record.dropped} == {"head"}
    assert {name.split(".")[0] for name in record.left} == {"head"}


def test_a_backbone_out_of_a_larger_network(tmp_path):
    state = changed(timm.create_model("resnet50", **TINY))
    net = timm.create_model("resnet50", **TINY)
    assert (
        "its backbone" in load_checkpoint(net, saved(tmp_path, {f"backbone.{k}": v for k, v in state.items()})).layout
    )
    assert equal(net, state)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_network(tmp_path, wrap):
    state = changed(sknet())
    net = sknet()
    load_checkpoint(wrap(net), saved(tmp_path, of_developer0hye(state)))
    assert equal(net, state)


def test_a_network_with_inserted_blocks(tmp_path):
    net, state = epsanet(), changed(epsanet())
    sample = torch.randn(1, 3, 64, 64)
    first = visattn.insert(net, "dual", at="layer2", sample=sample)
    second = visattn.insert(net, "sk", at="layer2.host.1", sample=sample)
    record = load_checkpoint(net, saved(tmp_path, state))
    assert len(record.left) == len(net.state_dict()) - len(state)
    again = changed(net)
    assert load_checkpoint(net, saved(tmp_path, again)).left == ()
    load_checkpoint(net, saved(tmp_path, state))
    second.remove()
    first.remove()
    assert equal(net, state)


def test_types_stay_and_old_files_have_no_counters(tmp_path):
    state = changed(sknet())
    net = sknet().half()
    record = load_checkpoint(net, saved(tmp_path, {k: v for k, v in state.items() if "num_batches" not in k}))
    assert all(tensor.dtype == torch.float16 for tensor in net.parameters())
    assert equal(net, {k: v.half() if v.is_floating_point() else torch.tensor(0) for k, v in state.items()})
    assert {name.rsplit(".", 1)[1] for name in record.left} == {"num_batches_tracked"}
    assert re.search(r"left at initialisation (\d+): num_batches_tracked of \1 norms$", str(record))


def test_safetensors(tmp_path):
    state = changed(sknet())
    save_file(state, tmp_path / "file.safetensors")
    net = sknet()
    load_checkpoint(net, tmp_path / "file.safetensors")
    assert equal(net, state)


# ---- errors ---------------------------------------------------------------------------------------------------------


def without(state, *patterns):
    return {name: t for name, t in state.items() if not any(re.match(pattern, name) for pattern in patterns)}


ERRORS = {
    "more units": (
        epsanet,
        lambda: epsanet(layers=(1, 2, 3, 1)).state_dict(),
        r"EPSANet as of murufeng/EPSANet.* is of another network: "
        r"layers: \(1, 2, 3, 1\) in the file, \(1, 2, 1, 1\) in the network, got file='.*file\.pth'\.$",
    ),
    "other units": (
        epsanet,
        lambda: of_developer0hye(sknet().state_dict()),
        r"SKNet as of developer0hye/SKNet-PyTorch.* is of another network: units: selective kernels 3x3, 3x3, 64 channels in "
        r"the file, pyramid squeeze attention 3x3, 5x5, 7x7, 9x9, 16 channels in the network",
    ),
    "a plain ResNet": (
        epsanet,
        lambda: timm.create_model("resnet50", **SMALL, num_classes=5).state_dict(),
        "names as of visattn, timm, torchvision.* is of another network: units: convolutions 3x3, 64 channels in the file",
    ),
    "wider": (
        epsanet,
        lambda: epsanet(base_width=128).state_dict(),
        r"units: .*, 32 channels in the file, .*, 16 channels in the network",
    ),
    "another head": (
        eanet,
        lambda: of_danet(danet().state_dict()),
        r"DANet as of junfu1115/DANet.* is of another network: head: DANet's in the file, EANet's in the network",
    ),
    "a head into a classifier": (
        lambda: timm.create_model("resnet50s", **TINY),
        lambda: of_danet(danet().state_dict()),
        r"of another network: head: DANet's in the file, none in the network",
    ),
    "another stem": (
        danet,
        lambda: of_mmseg(danet("resnet50c", stem_width=8).state_dict()),
        r"stem: deep, 3x3, 16 channels in the file, deep, 3x3, 128 channels in the network \(its backbone is timm's resnet50c",
    ),
    "other classes": (
        danet,
        lambda: of_danet(danet(num_classes=19).state_dict()),
        r"DANet as of junfu1115/DANet.* is for 19 classes, the network for 5\. Build the network with num_classes=19, or give "
        r"strict=False to leave the classifier as it is, got file=",
    ),
    "missing": (
        danet,
        lambda: without(of_danet(danet().state_dict()), r"head\.sa\.(query|key)_conv"),
        r"\) lacks 4 tensors of the network \(head\.sa\.query_conv\.weight, head\.sa\.query_conv\.bias, "
        r"head\.sa\.key_conv\.weight and 1 more\)\. Give strict=False to load the rest",
    ),
    "extra": (
        danet,
        lambda: {**of_danet(danet().state_dict()), "dran.weight": torch.ones(1), "head.x.weight": torch.ones(1)},
        r"\) has 2 that it does not know \(dran\.weight, head\.x\.weight\)\. Give strict=False",
    ),
    "missing and extra": (
        sknet,
        lambda: {
            **without(of_developer0hye(sknet().state_dict()), "classifier"),
            "stage_1.0.conv9.0.weight": torch.ones(1),
        },
        r"lacks 2 tensors of the network \(fc\.weight, fc\.bias\) and has 1 that it does not know \(stage_1\.0\.conv9",
    ),
    "shapes": (
        danet,
        lambda: {**of_danet(danet().state_dict()), "head.conv51.0.weight": torch.ones(48, 48, 1, 1)},
        r"\) has 1 of another shape \(head\.conv51\.0\.weight: \(48, 48, 1, 1\) in the file, \(48, 48, 3, 3\) in the net",
    ),
    "types": (
        danet,
        lambda: {**of_danet(danet().state_dict()), "head.sa.gamma": torch.ones(1, dtype=torch.int8)},
        r"head\.sa\.gamma: \(1,\) int8 in the file, \(1,\) in the network",
    ),
    "nothing in common": (
        sknet,
        lambda: {"embed.weight": torch.ones(2), "blocks.0.weight": torch.ones(2)},
        r"no published layout, and none of its names are the network's: the file has embed\.weight, blocks\.0\.weight; "
        r"the network has conv1\.weight, bn1\.weight, bn1\.bias and \d+ more\.$",
    ),
    "a backbone without a part": (
        lambda: danet("resnet50"),
        lambda: without(timm.create_model("resnet50", **TINY).state_dict(), r"layer3\.0\.bn3"),
        r"into the backbone\) lacks 4 tensors of the network \(backbone\.layer3\.0\.bn3\.weight",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_file_that_does_not_fit_leaves_the_network_as_it_was(tmp_path, case):
    build, make, message = ERRORS[case]
    net = build()
    before = changed(net)
    versions = [tensor._version for tensor in net.state_dict().values()]
    file = saved(tmp_path, {"state_dict": make()})
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(net, file)
    assert str(caught.value).startswith("load_checkpoint: ")
    assert "\n" not in str(caught.value)
    assert equal(net, before)
    assert versions == [tensor._version for tensor in net.state_dict().values()]


def test_not_strict(tmp_path):
    net = danet()
    before = changed(net)
    state = changed(danet(num_classes=19))
    theirs = {**without(of_danet(state), r"head\.sa\."), "more.weight": torch.ones(1)}
    record = load_checkpoint(net, saved(tmp_path, theirs), strict=False)
    classifiers = {f"head.conv{i}.1.{kind}" for i in (6, 7, 8) for kind in ("weight", "bias")}
    left = classifiers | {name for name in before if name.startswith("head.sa.")}
    assert {*record.left} == left
    assert {*record.dropped} == {"more.weight", *classifiers}
    assert equal(net, {name: before[name] if name in left else state[name] for name in before})
    with pytest.raises(ValueError, match="of another network: layers"):
        load_checkpoint(danet(layers=(1, 1, 1, 1), channels=(16, 24, 32, 64)), saved(tmp_path, theirs), strict=False)


def test_networks_that_nothing_can_be_loaded_into(tmp_path):
    file = saved(tmp_path, {"weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"the network has no parameters or buffers, got net=ReLU"):
        load_checkpoint(nn.ReLU(), file)
    with torch.device("meta"):
        net = nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"not in memory yet \(weight, bias\)\. Run it once on a sample, or move it off"
    ):
        load_checkpoint(net, file)
    with pytest.raises(ValueError, match=r"not in memory yet \(weight, bias\)"):
        load_checkpoint(nn.LazyLinear(2), file)


def test_the_record_is_short(tmp_path):
    record = load_checkpoint(danet(), saved(tmp_path, {"state_dict": of_danet(changed(danet()))}))
    assert isinstance(record.file, Path)
    assert str(record) == (
        "file.pth: DANet as of junfu1115/DANet, under 'state_dict'\n"
        f"  mapped  {len(record.mapped)} tensors\n  dropped nothing\n  left at initialisation nothing"
    )


@pytest.mark.parametrize("kind", ["shared", "inference"])
def test_a_network_that_cannot_be_written_is_left_whole(tmp_path, kind):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    torch.save(net.state_dict(), tmp_path / "net.pth")
    before = changed(net)
    with torch.inference_mode():
        made = torch.ones(2)
    net[1].bias = nn.Parameter(made if kind == "inference" else torch.ones(1).expand(2), requires_grad=False)
    with pytest.raises(ValueError, match=r"^load_checkpoint: the network's tensors cannot be written \(1\.bias\)"):
        load_checkpoint(net, tmp_path / "net.pth")
    assert torch.equal(net[0].weight, before["0.weight"])


def test_two_names_for_one_tensor_are_refused(tmp_path):
    net = models.fcn("convnext_atto", num_classes=2)
    state = timm.create_model("convnext_atto").state_dict()
    flat = {n.replace("stages.0.", "stages_0.", 1): t + 1 for n, t in state.items() if n.startswith("stages.0.")}
    torch.save({**state, **flat}, tmp_path / "net.pth")
    before = changed(net)
    with pytest.raises(ValueError, match=r"that it does not know \(stages_0\.blocks\.0"):
        load_checkpoint(net, tmp_path / "net.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_two_names_of_a_published_layout_for_one_tensor_are_refused(tmp_path):
    net = danet("resnet50c")
    state = changed(net)
    torch.save(
        {
            **{name: t for name, t in state.items() if name.startswith("backbone.")},
            "backbone.stem.0.weight": state["backbone.conv1.0.weight"] + 1,
            "decode_head.pam_in_conv.conv.weight": state["head.conv5a.0.weight"],
            "decode_head.pam.gamma.scale": torch.tensor(1.0),
        },
        tmp_path / "net.pth",
    )
    with pytest.raises(ValueError, match=r"that it does not know \(backbone\.stem\.0\.weight\)"):
        load_checkpoint(net, tmp_path / "net.pth")


def test_names_with_codes_for_a_terminal_are_spelled_out(tmp_path):
    torch.save({"a\n\x1b[31mb": torch.ones(2)}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"the file has a\\n\\x1b\[31mb; the network has"):
        load_checkpoint(nn.Linear(2, 2), tmp_path / "net.pth")


def test_a_file_of_another_network_has_nothing_to_take(tmp_path):
    net = torch.nn.Linear(3, 2)
    file = saved(tmp_path, {"conv2_sk.convs.0.0.weight": torch.zeros(8, 4, 3, 3)})
    with pytest.raises(
        ValueError, match=r"SKUnit as of developer0hye/SKNet-PyTorch\) has nothing that the network could"
    ):
        load_checkpoint(net, file, strict=False)
