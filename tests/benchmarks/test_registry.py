import pytest
import torch

from visattn.benchmarks.registry import shapes
from visattn.errors import UserError
from visattn.registry import MECHANISMS

PAPER = [shape.label for shape in shapes("paper")]


def test_labels_are_derived_and_unique():
    assert len(set(PAPER)) == len(PAPER) == 34
    for label in (
        "eanet@65x65",
        "transformer@4096+weights",
        "sknet50.stage1@56x56",
        "sknet50.stage2.unit1@56x56/2",
        "article.sk@14x14",
        "danet.position@97x97",
        "article.dual@7x7",
        "epsanet50.stage4@7x7",
    ):
        assert label in PAPER


def test_the_papers_widths():
    by_label = {shape.label: shape for shape in shapes("paper")}
    assert by_label["sknet50.stage4.unit1@14x14/2"].size == (1024, 14, 14)
    assert by_label["epsanet50.stage3@14x14"].size == (256, 14, 14)
    assert [by_label[label].batch_on("cuda") for label in ("eanet@65x65", "eanet@14x14")] == [16, 512]


@pytest.mark.parametrize("shape", shapes("small"), ids=lambda shape: shape.block)
def test_small_shapes_run(shape):
    assert shape.size in ((64, 7, 5), (35, 64))
    for impl in ("auto", "reference"):
        block, args, kwargs = shape.build(impl=impl, dtype=torch.float64)
        assert not block.training
        assert all(p.abs().max() > 0 for p in block.parameters())
        out = block(*args, **kwargs)
        assert out.dtype == torch.float64
        assert out.isfinite().all()
        assert 0.01 < out.std() < 10


def test_small_has_every_block_of_the_paper_shapes():
    assert {shape.block for shape in shapes("small")} == {shape.block for shape in shapes("paper")}
    assert {shape.mechanism for shape in shapes("small")} == set(MECHANISMS)


def test_the_same_seed_gives_the_same_numbers():
    shape = shapes("small", ["mha"])[0]
    (one, (x,), _), (two, (y,), _) = shape.build(), shape.build(dtype=torch.bfloat16)
    assert torch.equal(x.bfloat16(), y)
    assert all(torch.equal(p.bfloat16(), q) for p, q in zip(one.parameters(), two.parameters()))
    assert not torch.equal(shape.build(seed=1)[1][0], x)


def test_arguments_of_the_call():
    masked, weighted = (s for s in shapes("paper", ["multihead"]) if s.call and s.positions == 196)
    _, _, kwargs = masked.build(batch=1)
    assert kwargs["attention_mask"].shape == (1, 1, 196, 196)
    assert 0.05 < kwargs["attention_mask"].float().mean() < 0.15
    _, _, kwargs = weighted.build(batch=1)
    assert list(kwargs) == ["attention_weights"]


def test_names_choose_mechanisms_and_blocks():
    assert {s.block for s in shapes("paper", ["da"])} == {"dual", "dual_position", "dual_channel", "dual_projected"}
    assert {s.block for s in shapes("paper", ["pam", "psa"])} == {"dual_position", "pyramid_squeeze"}


def test_map_sizes_of_ones_own():
    ours = shapes("9x8,3x3", ["external", "multihead", "dual_projected"])
    assert [(s.block, s.size) for s in ours] == [
        ("external", (512, 9, 8)),
        ("external", (512, 3, 3)),
        ("multihead_tokens", (72, 512)),
        ("multihead_tokens", (9, 512)),
        ("dual_projected", (512, 9, 8)),
        ("dual_projected", (512, 3, 3)),
    ]
    block, args, kwargs = ours[-1].build(batch=1)
    assert block(*args, **kwargs).shape == (1, 512, 3, 3)
    assert shapes("130x65", ["external"])[0].batch == 1


@pytest.mark.parametrize(
    ("which", "names", "message"),
    [
        ("big", [], r"unknown shapes 'big'\. Choose from paper, small or map sizes such as 56x56,28x28"),
        ("7x0", [], "unknown shapes '7x0'"),
        ("7x7,", [], "unknown shapes '7x7,'"),
        ("70000x70000", [], r"more than 2\*\*24 positions"),
        ("paper", ["duel"], "unknown block 'duel'. Did you mean dual"),
        ("small", ["squeeze_weight"], "no shape of block 'squeeze_weight' is measured. Choose from external"),
    ],
)
def test_wrong_values(which, names, message):
    with pytest.raises(UserError, match=message):
        shapes(which, names)
