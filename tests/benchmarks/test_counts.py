"""What the fast paths save at the papers' own shapes, counted instead of timed: a regression fails without a clock."""

from functools import partial

import pytest
import torch

from visattn import native
from visattn.benchmarks.flops import count
from visattn.benchmarks.memory import peak_bytes
from visattn.benchmarks.registry import shapes
from visattn.ops.dual import position_attention

# FLOPs and peak memory against the reference for one sample: in inference, and in training where that does not take
# long. A ratio above 1 buys speed (a product computed again, zeros between merged groups, weights in another layout) and
# is bounded too. The second table is for torch's operations alone.
RATIOS = {
    "eanet@65x65": ((0.125, 0.374),),
    "eanet@32x32": ((0.167, 0.418), (0.174, 0.577)),
    "eanet@14x14": ((0.401, 1.112), (0.418, 0.748)),
    "transformer@196": ((1.000, 0.539), (1.027, 0.832)),
    "transformer@196+mask": ((1.000, 0.403), (1.027, 0.693)),
    "transformer@196+weights": ((1.000, 0.539), (1.027, 0.832)),
    "transformer@1024": ((1.000, 0.123), (1.083, 0.175)),
    "transformer@1024+mask": ((1.000, 0.085), (1.083, 0.167)),
    "transformer@1024+weights": ((1.000, 0.123), (1.083, 0.175)),
    "transformer@4096": ((1.000, 0.033),),
    "transformer@4096+mask": ((1.000, 0.022),),
    "transformer@4096+weights": ((1.000, 0.033),),
    "sknet50.stage1@56x56": ((1.000, 0.437), (1.000, 0.824)),
    "sknet50.stage2@28x28": ((1.000, 0.468), (1.000, 0.834)),
    "sknet50.stage3@14x14": ((1.000, 0.658), (1.000, 0.893)),
    "sknet50.stage4@7x7": ((1.000, 1.699), (1.000, 0.501)),
    "sknet50.stage2.unit1@56x56/2": ((1.000, 0.477), (1.000, 0.738)),
    "sknet50.stage3.unit1@28x28/2": ((1.000, 0.676), (1.000, 0.699)),
    "sknet50.stage4.unit1@14x14/2": ((1.000, 1.282), (1.000, 0.599)),
    "article.sk@14x14": ((1.000, 1.027), (1.000, 0.970)),
    "danet@33x33": ((0.911, 0.594), (0.927, 0.938)),
    "danet@65x65": ((0.960, 0.178),),
    "danet@97x97": ((0.979, 0.083),),
    "danet.position@33x33": ((1.000, 0.532), (1.024, 0.763)),
    "danet.position@65x65": ((1.000, 0.100),),
    "danet.position@97x97": ((1.000, 0.041),),
    "danet.channel@33x33": ((0.750, 0.759), (0.750, 1.174)),
    "danet.channel@65x65": ((0.750, 0.567),),
    "danet.channel@97x97": ((0.750, 0.530),),
    "article.dual@7x7": ((1.000, 1.049), (1.015, 1.057)),
    "epsanet50.stage1@56x56": ((1.000, 0.544), (1.000, 0.672)),
    "epsanet50.stage2@28x28": ((1.000, 0.662), (1.000, 0.718)),
    "epsanet50.stage3@14x14": ((1.000, 1.317), (1.000, 1.128)),
    "epsanet50.stage4@7x7": ((1.000, 1.082), (1.000, 1.351)),
}
WITHOUT_KERNELS = {
    "eanet@65x65": ((0.125, 0.370),),
    "eanet@32x32": ((0.167, 0.401), (0.177, 0.555)),
    "eanet@14x14": ((0.401, 1.047), (0.436, 0.706)),
    "transformer@196": ((1.000, 0.774), (1.000, 1.071)),
    "transformer@196+mask": ((1.000, 0.580), (1.000, 0.892)),
    "transformer@196+weights": ((1.000, 0.774), (1.000, 1.071)),
    "transformer@1024": ((1.000, 0.229), (1.000, 0.538)),
    "transformer@1024+mask": ((1.000, 0.157), (1.000, 0.514)),
    "transformer@1024+weights": ((1.000, 0.229), (1.000, 0.538)),
    "transformer@4096": ((1.000, 0.031),),
    "transformer@4096+mask": ((1.000, 0.072),),
    "transformer@4096+weights": ((1.000, 0.038),),
    "sknet50.stage1@56x56": ((2.000, 0.437), (2.000, 0.818)),
    "sknet50.stage2@28x28": ((1.000, 0.455), (1.000, 0.818)),
    "sknet50.stage3@14x14": ((1.000, 0.637), (1.000, 0.902)),
    "sknet50.stage4@7x7": ((1.000, 1.000), (1.000, 1.000)),
    "sknet50.stage2.unit1@56x56/2": ((1.000, 0.883), (1.000, 1.000)),
    "sknet50.stage3.unit1@28x28/2": ((1.000, 1.065), (1.000, 1.000)),
    "sknet50.stage4.unit1@14x14/2": ((1.000, 1.000), (1.000, 1.000)),
    "article.sk@14x14": ((1.000, 1.000), (1.000, 1.000)),
    "danet@33x33": ((0.934, 0.881), (0.919, 0.830)),
    "danet@65x65": ((0.970, 0.169),),
    "danet@97x97": ((0.984, 0.079),),
    "danet.position@33x33": ((1.000, 0.881), (1.000, 0.814)),
    "danet.position@65x65": ((1.000, 0.138),),
    "danet.position@97x97": ((1.000, 0.046),),
    "danet.channel@33x33": ((0.812, 0.735), (0.771, 0.976)),
    "danet.channel@65x65": ((0.812, 0.561),),
    "danet.channel@97x97": ((0.812, 0.527),),
    "article.dual@7x7": ((1.000, 1.000), (1.000, 1.000)),
    "epsanet50.stage1@56x56": ((1.038, 0.751), (1.013, 0.615)),
    "epsanet50.stage2@28x28": ((1.000, 0.763), (1.000, 0.584)),
    "epsanet50.stage3@14x14": ((1.000, 1.711), (1.000, 0.980)),
    "epsanet50.stage4@7x7": ((1.000, 1.953), (1.000, 1.325)),
}
SLACK = 1.5  # convolution libraries take scratch memory of their own choice, by processor and threads


def training(block, x, options):
    x = x.clone().requires_grad_()
    block.train()(x, **options).sum().backward()


def inference(block, x, options):
    with torch.inference_mode():
        block.eval()(x, **options)


def gradients(q, k, v):
    return torch.autograd.grad(position_attention(q, k, v).sum(), (q, k, v))


def ratios(shape, run):
    counts = []
    for impl in ("auto", "reference"):
        block, (x,), options = shape.build(impl=impl, batch=1)
        run(block, x, options)  # the first run makes the gradients
        call = partial(run, block, x, options)
        counts.append((count(call), peak_bytes(call)))
    (flops, memory), (all_flops, all_memory) = counts
    return flops / all_flops, memory / all_memory


def test_every_paper_shape_is_counted():
    assert list(RATIOS) == list(WITHOUT_KERNELS) == [shape.label for shape in shapes("paper")]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("shape", shapes("paper"), ids=lambda shape: shape.label)
def test_work_and_memory_at_the_papers_shapes(shape, kernels, monkeypatch):
    if kernels and not native.available():
        pytest.skip("there is no C compiler: tests/native checks that there is none")
    if not kernels:
        monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "leads", lambda: kernels)
    for run, recorded in zip((inference, training), (RATIOS if kernels else WITHOUT_KERNELS)[shape.label]):
        flops, memory = ratios(shape, run)
        assert flops <= recorded[0] + 0.005
        assert memory <= SLACK * recorded[1]


def test_position_attention_takes_memory_linear_in_the_positions():
    """Under 1/20 of the reference's at 97 x 97; here by its growth over four sizes, forward and backward."""
    sizes, peaks = (33, 49, 65, 97), {"inference": [], "training": []}
    for side in sizes:
        q, k, v = (torch.randn(1, channels, side, side, requires_grad=True) for channels in (8, 8, 64))
        with torch.no_grad():
            peaks["inference"].append(peak_bytes(partial(position_attention, q, k, v)))
        peaks["training"].append(peak_bytes(partial(gradients, q, k, v)))
    for kind, buffers in (("inference", 1), ("training", 2)):
        for side, peak in zip(sizes, peaks[kind]):
            piece = min(side**4, 2**21) * 4 * buffers  # the rows of the matrix at hand
            kept = side**4 * 4 if kind == "training" and side**4 <= 2**23 else 0  # small matrices are kept
            assert peak <= piece + kept + 5 * 80 * side**2 * 4
