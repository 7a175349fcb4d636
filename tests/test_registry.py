import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import visattn
from visattn import blocks
from visattn.registry import MECHANISMS, ROLES, resolve


@pytest.mark.parametrize(
    ("alias", "cls"),
    [
        ("ea", visattn.ExternalAttention2d),
        ("mhsa", visattn.MultiHeadAttention2d),
        ("sk", visattn.SelectiveKernel),
        ("da", visattn.DualAttention),
        ("epsa", visattn.PyramidSqueezeAttention),
        ("psa", visattn.PyramidSqueezeAttention),
        ("Selective-Kernel", visattn.SelectiveKernel),
    ],
)
def test_create_by_name_or_alias(alias, cls):
    block = visattn.create(alias, channels=64)
    assert type(block) is cls
    assert block.eval()(torch.randn(1, 64, 5, 7)).shape == (1, 64, 5, 7)


def test_options_are_passed_and_misspelt_ones_refused():
    assert visattn.create("sk", 64, kernel_size=(1, 3, 5), dilated=False).kernel_size == (1, 3, 5)
    with pytest.raises(TypeError, match="kernels"):
        visattn.create("sk", 64, kernels=(1, 3))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("selective", r"unknown block 'selective'\. Did you mean selective_kernel"),
        ("duel", "Did you mean dual"),
        ("xyzzy", "Known: external, external_tokens"),
    ],
)
def test_unknown_names_give_near_matches(name, message):
    with pytest.raises(ValueError, match=message):
        visattn.create(name, 64)


def test_roles_cover_the_registry():
    assert sorted(name for role in ROLES for name in visattn.list_blocks(role=role)) == visattn.list_blocks()
    assert set(MECHANISMS) <= set(visattn.list_blocks())
    assert visattn.list_blocks(role="convolution") == ["pyramid_squeeze", "selective_kernel"]
    for name in visattn.list_blocks(role="convolution"):
        assert resolve(name).cls(64, 128, stride=2)(torch.randn(2, 64, 9, 7)).shape == (2, 128, 5, 4)
    with pytest.raises(ValueError, match="role must be one of attention, convolution, tokens, part, got role='gate'"):
        visattn.list_blocks(role="gate")


def test_every_public_block_is_registered():
    parts = {"Block", "ProjectedChannelAttention", "ProjectedPositionAttention"}  # halves of dual_projected
    registered = {resolve(name).cls.__name__ for name in visattn.list_blocks()}
    assert registered == set(blocks.__all__) - parts


def test_public_names_are_recorded():
    recorded = json.loads((Path(__file__).parent / "public_names.json").read_text())
    assert sorted(visattn.__all__) == recorded
    assert all(inspect.getdoc(getattr(visattn, name)) for name in recorded if name != "__version__")
    assert all(issubclass(getattr(blocks, name), nn.Module) for name in blocks.__all__)
