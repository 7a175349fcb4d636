import pytest
import torch
from torch import nn

from visattn import ExternalAttention2d, SelectiveKernel, checkpoints
from visattn.checkpoints import PUBLISHED, build, convert, find
from visattn.verify import SHIPPED, load_case, load_cases

CASES = load_cases(SHIPPED)


def case_of(entry):
    for case in CASES:
        same = case.source["class"] == entry.name and case.source["repo"] == entry.repo
        if same and case.constructor.get("split_input", False) is False and case.name not in SPLIT:
            return case
    raise AssertionError(f"no recorded case of {entry.source}")


SPLIT = ("sk_timm_split_eval", "sk_timm_split_groups")


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry.source)
def test_a_published_state_dict_loads_and_comes_back(entry):
    case = case_of(entry)
    state = {name: torch.from_numpy(array) for name, array in case.state.items()}
    block = entry.build(case.constructor, channels=next(iter(case.inputs.values())).shape[1], dtype=torch.float64)
    block.load_state_dict(convert(state, entry.source))
    back = entry.to_theirs(block.state_dict())
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(back[name], value), name


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry.source)
def test_an_unknown_argument_is_an_error(entry):
    with pytest.raises(ValueError, match=f"{entry.name}.*unexpected keyword argument 'no_such'"):
        entry.build({**case_of(entry).constructor, "no_such": 1})


def test_defaults_are_those_of_the_published_constructors():
    assert build("SKAttention").channels == 512
    assert build("SKAttention").kernel_size == (1, 3, 5, 7)
    assert build("SKLayer", inplanes=64, planes=1024).fc.out_features == 64
    assert build("developer0hye/SKNet-PyTorch:SKConv", features=64).groups == 32
    assert build("pppLang/SKNet:SKConv", features=64, WH=8, M=2, G=8, r=2).fc.out_features == 32
    assert build("ScaledDotProductAttention", d_model=8, d_k=4, d_v=2, h=2).attn_drop == 0.1
    arguments = {"d_model": 8, "d_k": 4, "d_v": 2, "h": 2}
    assert find("ScaledDotProductAttention").build(arguments, dropout=False).attn_drop == 0.0
    assert build("SEWeightModule", channels=32).fc1.out_channels == 2
    assert build("DAModule", d_model=64, H=5, W=5).channel_attention_module.feat_size == (7, 7)  # theirs ignores them
    assert build("changzy00/pytorch-attention:CAM", channels=12).channels == 12
    with pytest.raises(ValueError, match=r"does not say how many channels\. Give channels="):
        build("changzy00/pytorch-attention:CAM")


@pytest.mark.parametrize(
    ("width", "options"),
    [
        *((width, {}) for width in (16, 100, 136, 264, 512)),  # the rounding of the hidden width
        *((100, options) for options in ({"rd_ratio": 0.25}, {"rd_divisor": 4}, {"keep_3x3": False}, {"dilation": 2})),
    ],
)
def test_timm_selective_kernel(width, options):
    from timm.layers import SelectiveKernel as Timm

    torch.manual_seed(0)
    theirs = Timm(8, width, split_input=False, groups=4, stride=2, **options).eval()
    ours = build("SelectiveKernel", in_channels=8, out_channels=width, split_input=False, groups=4, stride=2, **options)
    ours.load_state_dict(convert(theirs.state_dict(), "SelectiveKernel"))
    x = torch.randn(2, 8, 9, 7)
    torch.testing.assert_close(ours.eval()(x), theirs(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "split_input=True has no counterpart here, only False"),
        ({"split_input": False, "stride": 3}, "stride=3 has no counterpart here, only 1 or 2"),
        ({"split_input": False, "act_layer": "torch.nn.SiLU"}, "act_layer='torch.nn.SiLU' has no counterpart"),
        ({"split_input": False, "norm_layer": nn.Identity}, "norm_layer=.*Identity.* has no counterpart"),
        ({"split_input": False, "keep_3x3": False, "dilation": 2}, "dilation .*=2 has no counterpart"),
        ({"split_input": False, "kernel_size": [3, 4], "keep_3x3": False}, "kernel_size needs odd sizes"),
    ],
)
def test_values_without_a_counterpart_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build("SelectiveKernel", in_channels=16, **options)


def test_unknown_and_ambiguous_classes():
    with pytest.raises(ValueError, match=r"unknown published class, got source='SKAtention'.*:SKAttention"):
        find("SKAtention")
    with pytest.raises(ValueError, match=r"'SKConv' is ambiguous\. Choose from .*developer0hye.*pppLang"):
        find("SKConv")


def test_a_name_that_the_class_does_not_have_is_an_error():
    with pytest.raises(ValueError, match=r"PAM: no parameter or buffer named 'e\.weight'"):
        convert({"alpha": torch.zeros(1), "e.weight": torch.zeros(1)}, "changzy00/pytorch-attention:PAM")


def test_norm_layers_by_name():
    assert isinstance(
        build("External_attention", c=8, norm_layer="torch.nn.InstanceNorm2d").conv2[1], nn.InstanceNorm2d
    )
    with pytest.raises(ValueError, match=r"norm_layer: unknown layer, got 'os\.system'"):
        build("External_attention", c=8, norm_layer="os.system")


def test_a_downsampling_path_is_parsed():
    text = "torch.nn.Sequential(torch.nn.AvgPool2d(2), torch.nn.Conv2d(32, 256, kernel_size=(1, 1), bias=False))"
    block = build("EPSABlock", inplanes=32, planes=64, stride=2, downsample=text)
    assert block(torch.randn(2, 32, 6, 8)).shape == (2, 256, 3, 4)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "torch.nn.Sequential(torch.load('x'))",
        "torch.nn.Conv2d(32, 256, kernel_size=open('x'))",
        "torch.nn.Sequential(*[])",
        "torch.nn.Conv2d(",
        "torch.nn.Conv2d",
        "x" * 10,
        7,
    ],
)
def test_a_downsampling_path_is_never_evaluated(text):
    with pytest.raises(ValueError, match="downsample: not a path of"):
        build("EPSABlock", inplanes=32, planes=64, downsample=text)


def test_tied_memory_has_the_sum_of_the_two_recorded_gradients():
    case = load_case(SHIPPED / "external" / "ea_conv_tied.json")
    state = {name: torch.from_numpy(array) for name, array in case.state.items() if name != "linear_1.weight"}
    block = ExternalAttention2d(12, tie_memory=True, dtype=torch.float64).eval()
    block.load_state_dict(state)
    out = block(torch.from_numpy(case.inputs["x"]))
    out.backward(torch.from_numpy(case.cotangents["out"]))
    recorded = {name: torch.from_numpy(array) for name, array in case.expected.items()}
    summed = recorded["grad:linear_0.weight"] + recorded["grad:linear_1.weight"].transpose(0, 1)
    assert (out - recorded["out"]).abs().max() < 1e-10
    assert (block.linear_0.weight.grad - summed).abs().max() < 1e-10


def test_the_module_lists_what_it_offers():
    offered = {"PUBLISHED", "Published", "build", "convert", "find", "Loaded", "convert_file", "load_checkpoint"}
    assert set(checkpoints.__all__) == offered
    assert isinstance(build("SKLayer", inplanes=32, planes=32), SelectiveKernel)
