"""The names that published networks have in their files, and ours.

A `Layout` is recognised by names that only it has. Single blocks are in `visattn.checkpoints.published`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from visattn.checkpoints.published import PUBLISHED, Published

__all__ = ["LAYOUTS", "Layout", "architecture", "classifier", "recognise", "strip_prefixes"]

Rule = tuple[str, str, str]
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")


@dataclass(frozen=True)
class Layout:
    """How one repository names the tensors of its network.

    Attributes:
        title: What the network is.
        repo: GitHub repository, owner/name.
        marks: Patterns, each of which some name has to fit as a whole.
        rules: (their prefix, our prefix, form), `{s}`, `{u}`, `{i}` standing for numbers. The form is "same",
            "pointwise" (theirs is a 1x1 convolution, ours is linear) or "scalar" (ours has one entry, theirs no axis).
        dropped: Prefixes of what only training needs.
        note: What the file does not tell and the network has to be built with.
    """

    title: str
    repo: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]
    dropped: tuple[str, ...] = ()
    note: str = ""

    def fits(self, names: Iterable[str]) -> bool:
        """Whether a file with these names is of this layout."""
        names = list(names)
        return all(any(re.fullmatch(mark, name) for name in names) for mark in self.marks)

    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str], list[str]]:
        """Our names with the tensors reshaped, the names that are dropped, and those that the layout does not have."""
        ours: dict[str, Tensor] = {}
        dropped, unknown = [], []
        for name, tensor in state.items():
            if name.startswith(self.dropped):
                dropped.append(name)
                continue
            for theirs, mine, form in self.rules:
                match = re.match(_pattern(theirs), name)
                if match:
                    mine = re.sub(r"\{(\w)\}", lambda number, match=match: match[number[1]], mine)  # type: ignore[misc]
                    mine += name[match.end() :]
                    if mine in ours:  # two names for one tensor: which is meant, nothing tells
                        unknown.append(name)
                    else:
                        ours[mine] = _reshape(tensor, form)
                    break
            else:
                unknown.append(name)
        return ours, dropped, unknown


def _pattern(prefix: str) -> str:
    return re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(prefix))


def _reshape(tensor: Tensor, form: str) -> Tensor:
    if form == "pointwise" and tensor.dim() == 4:
        return tensor.flatten(1)
    return tensor.reshape(1) if form == "scalar" and tensor.dim() == 0 else tensor


def _of(source: str) -> Published:
    return next(entry for entry in PUBLISHED if entry.source == source)


def _within(theirs: str, mine: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules of a block, of a block inside a network."""
    return tuple((theirs + their, mine + own, form) for their, own, form in rules)


_STEM = tuple((f"backbone.stem.{i}.", f"backbone.conv1.{i}.", "same") for i in (0, 1, 3, 4, 6))
_MMSEG_HEAD: tuple[Rule, ...] = (
    ("pam_in_conv.conv.", "conv5a.0.", "same"),
    ("pam_in_conv.bn.", "conv5a.1.", "same"),
    ("cam_in_conv.conv.", "conv5c.0.", "same"),
    ("cam_in_conv.bn.", "conv5c.1.", "same"),
    ("pam.query_project.", "sa.query_conv.", "same"),
    ("pam.key_project.", "sa.key_conv.", "same"),
    ("pam.value_project.", "sa.value_conv.", "same"),
    ("pam.gamma.scale", "sa.gamma", "scalar"),
    ("cam.gamma.scale", "sc.gamma", "scalar"),
    ("pam_out_conv.conv.", "conv51.0.", "same"),
    ("pam_out_conv.bn.", "conv51.1.", "same"),
    ("cam_out_conv.conv.", "conv52.0.", "same"),
    ("cam_out_conv.bn.", "conv52.1.", "same"),
    ("pam_conv_seg.", "conv6.1.", "same"),
    ("cam_conv_seg.", "conv7.1.", "same"),
    ("conv_seg.", "conv8.1.", "same"),
)

_DANET: tuple[Rule, ...] = (("pretrained.", "backbone.", "same"), ("head.", "head.", "same"))
_DANET_DROPPED = ("pretrained.fc.", "auxlayer.")  # of pre-training, and of a loss in training

_UNIT: tuple[Rule, ...] = (
    ("feas.0.", "conv1.", "same"),
    ("feas.1.", "bn1.", "same"),
    ("feas.3.", "bn2.", "same"),
    ("feas.4.", "conv3.", "same"),
    ("feas.5.", "bn3.", "same"),
    *_within("feas.2.", "conv2.", _of("pppLang/SKNet:SKConv").names),
    ("shortcut.", "downsample.", "same"),
)

_BOTTLENECK: tuple[Rule, ...] = (
    *((f"conv{i}.{j}.", f"{name}{i}.", "same") for i in (1, 3) for j, name in enumerate(("conv", "bn"))),
    *_within("conv2_sk.", "conv2.", _of("developer0hye/SKNet-PyTorch:SKConv").names),
    ("shortcut.", "downsample.", "same"),
)

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "DANet",
        "open-mmlab/mmsegmentation",
        (r"decode_head\.pam_in_conv\.conv\.weight", r"decode_head\.pam\.gamma\.scale"),
        (
            *_STEM,
            ("backbone.stem.7.", "backbone.bn1.", "same"),
            ("backbone.", "backbone.", "same"),
            *_within("decode_head.", "head.", _MMSEG_HEAD),
        ),
        dropped=("auxiliary_head.",),
        note="its backbone is timm's resnet50c or resnet101c; files trained on crops other than 769x769 resize their "
        "logits without aligned corners",
    ),
    Layout(
        "DANet",
        "junfu1115/DANet",
        (r"pretrained\.conv1\.weight", r"head\.conv5a\.0\.weight"),
        _DANET,
        dropped=_DANET_DROPPED,
        note="its backbone has a plain stem, as timm's resnet101; files do not tell dilations: the authors' DANet101 "
        "for Cityscapes needs last_dilations=(4, 8, 16)",
    ),
    Layout(
        "DANet",
        "junfu1115/DANet",
        (r"pretrained\.conv1\.0\.weight", r"head\.conv5a\.0\.weight"),
        _DANET,
        dropped=_DANET_DROPPED,
    ),
    Layout(
        "EANet",
        "MenghaoGuo/EANet",
        (r"extractor\.\d\..*", r"linu\.linear_0\.weight"),
        (
            ("extractor.0.", "backbone.conv1.", "same"),
            ("extractor.1.", "backbone.bn1.", "same"),
            *((f"extractor.{i + 3}.", f"backbone.layer{i}.", "same") for i in (1, 2, 3, 4)),
            ("fc0.", "head.fc0.", "same"),
            ("linu.", "head.linu.", "same"),
            ("fc1.0.", "head.fc1.", "same"),
            ("fc2.", "head.fc2.", "same"),
        ),
    ),
    Layout(
        "SKNet",
        "developer0hye/SKNet-PyTorch",
        (r"stage_\d\.\d+\.conv2_sk\..*",),
        (
            ("basic_conv.0.", "conv1.", "same"),
            ("basic_conv.1.", "bn1.", "same"),
            *_within("stage_{s}.{u}.", "layer{s}.{u}.", _BOTTLENECK),
            ("classifier.", "fc.", "same"),
        ),
    ),
    Layout(
        "SKNet",
        "pppLang/SKNet",
        (r"stage_\d\.\d+\.feas\..*",),
        (
            ("basic_conv.0.", "conv1.", "same"),
            ("basic_conv.1.", "bn1.", "same"),
            *_within("stage_{s}.{u}.", "layer{s}.{u}.", _UNIT),
            ("classifier.0.", "fc.", "same"),
        ),
    ),
    Layout("SKUnit", "developer0hye/SKNet-PyTorch", (r"conv2_sk\.convs\.0\.0\.weight",), _BOTTLENECK),
    Layout("SKUnit", "pppLang/SKNet", (r"feas\.2\.convs\.0\.0\.weight",), _UNIT),
    Layout("EPSANet", "murufeng/EPSANet", (r"layer1\.0\.conv2\.conv_1\.weight",), (("", "", "same"),)),
)


def recognise(names: Iterable[str]) -> Layout | None:
    """The layout of a file with these names; None where it is none of `LAYOUTS`."""
    names = list(names)
    return next((layout for layout in LAYOUTS if layout.fits(names)), None)


def strip_prefixes(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Names without what wrappers such as DataParallel put before every one, and what that was."""
    stripped, prefixes = dict(state), ""
    while prefix := next((p for p in _PREFIXES if stripped and all(name.startswith(p) for name in stripped)), ""):
        stripped = {name[len(prefix) :]: tensor for name, tensor in stripped.items()}
        prefixes += prefix
    return stripped, prefixes


_CLASSIFIERS = (
    "fc.weight",
    "classifier.weight",
    "head.weight",
    "head.fc.weight",
    "head.conv8.1.weight",
    "head.fc2.weight",
    "head.classifier.weight",
)
_HEADS = {"head.conv5a.0.weight": "DANet's", "head.linu.linear_0.weight": "EANet's", "head.conv.conv.weight": "FCN's"}
_STEMS = {"conv1.weight": "plain", "conv1.6.weight": "deep"}
_UNITS = {
    "weight": "convolutions",
    "conv_{}.weight": "pyramid squeeze attention",
    "convs.{}.conv.weight": "selective kernels",
}


def architecture(state: Mapping[str, Tensor]) -> dict[str, str]:
    """What names and shapes (ours) tell of a network, in words, by aspect; aspects that are not told are missing."""
    state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    layers: dict[str, set[str]] = {}
    for name in state:
        match = re.match(r"layer(\d+)\.(\d+)\.", name)
        if match:
            layers.setdefault(match[1], set()).add(match[2])
    told = {
        "layers": str(tuple(len(layers[stage]) for stage in sorted(layers))) if layers else "",
        "stem": next((_kernel(title, state[name]) for name, title in _STEMS.items() if name in state), ""),
        "units": _units(state),
        "head": next((title for name, title in _HEADS.items() if name in state), ""),
        "classes": str(len(state[last])) if (last := classifier(state)) else "",
    }
    return {aspect: what for aspect, what in told.items() if what}


def classifier(state: Mapping[str, Tensor]) -> str | None:
    """Name (ours) of the weight whose rows are the classes; None where there is none."""
    if "fcs.0.weight" in state:  # a selective kernel alone, whose fc is no classifier
        return None
    return next((name for name in _CLASSIFIERS if name in state), None)


def _kernel(title: str, weight: Tensor) -> str:
    return f"{title}, {'x'.join(map(str, weight.shape[2:]))}, {weight.shape[0]} channels"


def _units(state: Mapping[str, Tensor]) -> str:
    """What stands in the middle of a unit."""
    for pattern, title in _UNITS.items():
        names = dict.fromkeys(f"layer1.0.conv2.{pattern.format(i)}" for i in range(10))
        kernels = [state[name] for name in names if name in state]
        if kernels:
            sizes = ", ".join("x".join(map(str, kernel.shape[2:])) for kernel in kernels)
            return f"{title} {sizes}, {len(kernels[0])} channels"
    return ""
