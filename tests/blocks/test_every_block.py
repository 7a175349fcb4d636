"""The same questions to every registered block; a new entry of the registry is asked too."""

import copy
import inspect
import pickle
import re

import pytest
import torch

import visattn
from visattn.registry import resolve
from visattn.testing.examples import FEAT_SIZE, example, example_input, randomize, required_arguments
from visattn.testing.tolerance import NEIGHBOURS, assert_close_to_exact, nudge

NAMES = visattn.list_blocks()
MAPS = [name for name in NAMES if resolve(name).role != "tokens"]
ANY_SIZE = [name for name in MAPS if not resolve(name).fixed_size]
LOW = [torch.float16, torch.bfloat16]


def outputs(block, x):
    out = block(x)
    return out if isinstance(out, tuple) else (out,)


def gradients(block, x):
    """Outputs and the gradients of input and parameters for fixed random cotangents."""
    x = x.detach().clone().requires_grad_()
    block.zero_grad()
    generator = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=generator).to(o)).sum() for o in outputs(block, x))
    loss.backward()
    return x.grad, {name: p.grad for name, p in block.named_parameters()}


def close(actual, expected, tolerance=1e-10):
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max()) < tolerance * max(1.0, float(expected.abs().max()))


IMPLS = [(name, impl) for name in NAMES for impl in resolve(name).cls.impls if impl != "reference"]


def has_impl(name):
    return "impl" in inspect.signature(resolve(name).cls.__init__).parameters


@pytest.mark.parametrize("name", NAMES)
def test_implementations_are_listed(name):
    impls = resolve(name).cls.impls
    assert impls[:2] == (("auto", "reference") if has_impl(name) else ())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_dtype_and_input_and_is_repeatable(name, dtype):
    block, x = example(name).to(dtype), example_input(name, dtype=dtype)
    before, state = x.clone(), copy.deepcopy(block.state_dict())
    first, second = outputs(block, x), outputs(block, x)
    with torch.inference_mode():
        assert all(close(a, b, 1e-5) for a, b in zip(outputs(block, x), first))
    assert torch.equal(x, before)
    assert all(torch.equal(a, b) and a.dtype == dtype and torch.isfinite(a).all() for a, b in zip(first, second))
    assert all(torch.equal(state[key], value) for key, value in block.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_shape_is_kept_or_as_documented(name):
    x = example_input(name)
    expected = {
        "dual_head": (2, 5, *FEAT_SIZE),
        "pyramid_squeeze_bottleneck": (2, 256, *FEAT_SIZE),
        "squeeze_weight": (2, 64, 1, 1),
    }.get(name, tuple(x.shape))
    assert {tuple(o.shape) for o in outputs(example(name), x)} == {expected}


@pytest.mark.parametrize("size", [(1, 1), (1, 11), (9, 4), (3, 13)])
@pytest.mark.parametrize("name", ANY_SIZE)
def test_any_size_eval_and_train(name, size):
    block, x = example(name), example_input(name, batch=3, size=size)
    assert all(torch.isfinite(o).all() for o in outputs(block, x))
    x_grad, _ = gradients(block.train(), x)
    assert torch.isfinite(x_grad).all()


@pytest.mark.parametrize("name", [name for name in MAPS if resolve(name).fixed_size])
def test_fixed_size_is_said(name):
    size = f"{FEAT_SIZE[0]} x {FEAT_SIZE[1]}"
    with pytest.raises(
        ValueError, match=rf"built for maps of {size}, got shape=\(2, 64, 9, 4\)\. Build it with feat_size"
    ):
        example(name)(example_input(name, size=(9, 4)))


@pytest.mark.parametrize("name", NAMES)
def test_one_sample_does_not_depend_on_the_batch(name):
    block, x = example(name).double(), example_input(name, batch=3, dtype=torch.float64)
    for whole, alone in zip(outputs(block, x), outputs(block, x[1:2])):
        assert close(whole[1:2], alone)


@pytest.mark.parametrize("name", MAPS)
def test_memory_formats(name):
    block, x = example(name).double(), example_input(name, dtype=torch.float64)
    last = x.to(memory_format=torch.channels_last)
    strided = x.repeat_interleave(2, dim=3)[..., ::2]
    for plain, channels_last, from_strided in zip(outputs(block, x), outputs(block, last), outputs(block, strided)):
        assert close(channels_last, plain)
        assert close(from_strided, plain)
        assert plain.is_contiguous()
        assert channels_last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", [name for name in NAMES if resolve(name).role == "tokens"])
def test_strided_tokens(name):
    block, x = example(name).double(), example_input(name, dtype=torch.float64)
    assert close(block(x.transpose(1, 2).contiguous().transpose(1, 2)), block(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "impl"), IMPLS)
def test_each_implementation_equals_the_reference(name, impl, training):
    x = example_input(name, batch=3, dtype=torch.float64)
    blocks = [example(name, impl=which).double().train(training) for which in (impl, "reference")]
    for block in blocks:
        for module in block.modules():
            if isinstance(module, torch.nn.Dropout2d):
                module.p = 0.0
    for fast, plain in zip(*(outputs(copy.deepcopy(block), x) for block in blocks)):
        assert close(fast, plain)
    with torch.no_grad():  # where more may be written in place
        for fast, plain in zip(*(outputs(copy.deepcopy(block), x) for block in blocks)):
            assert close(fast, plain)
    (fast_x, fast), (plain_x, plain) = (gradients(block, x) for block in blocks)
    assert close(fast_x, plain_x)
    assert fast.keys() == plain.keys()
    assert all(close(fast[key], plain[key]) for key in plain)
    assert all(close(*pair) for pair in zip(blocks[0].buffers(), blocks[1].buffers()))


def losses(name, implementation, dtype, seed):
    """(its, reference, exact) results in `dtype`, the exact ones in float64 from the same rounded numbers."""
    results = []
    for impl, compute in ((implementation, dtype), ("reference", dtype), ("reference", torch.float64)):
        block, x = example(name, impl=impl), example_input(name)
        with torch.no_grad():
            for index, tensor in enumerate(block.parameters()):
                tensor.copy_(nudge(tensor, dtype, 100 * seed + index) if seed else tensor)
        x = nudge(x, dtype, seed) if seed else x
        x_grad, grads = gradients(block.to(dtype).to(compute), x.to(dtype).to(compute))
        out = outputs(block, x.to(dtype).to(compute))
        results.append({"input gradient": x_grad, **grads, **{f"output {i}": o for i, o in enumerate(out)}})
    return results


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize(("name", "impl"), IMPLS)
def test_low_precision_loses_no_more_than_the_reference_does(name, impl, dtype):
    auto, reference, exact = losses(name, impl, dtype, 0)
    largest = max(float(value.detach().abs().max()) for value in exact.values())
    for label in exact:
        if exact[label].abs().max() < 1e-12 * largest:
            # Zero by an identity (a softmax does not see the bias of its keys): what is left is the rounding of terms
            # that cancel, so the rounding step of the budget is that of the largest result.
            assert auto[label].abs().max() <= 2 * reference[label].abs().max() + torch.finfo(dtype).eps * largest
            continue

        def neighbours(label=label):
            runs = (losses(name, impl, dtype, seed) for seed in range(1, NEIGHBOURS + 1))
            return [tuple(result[label] for result in run) for run in runs]

        assert_close_to_exact(
            auto[label], exact[label], reference[label], f"{name} {impl} {label}", dtype=dtype, neighbours=neighbours
        )


@pytest.mark.parametrize("name", [name for name in NAMES if has_impl(name)])
def test_unknown_impl_is_refused_with_choices(name):
    with pytest.raises(ValueError, match=r"impl must be one of auto, reference(, \w+)*, got impl='turbo'"):
        example(name, impl="turbo")(example_input(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    block, reached = example(name).train(), set()
    assert list(block.parameters())
    for seed in range(4):  # one set of weights may leave a narrow rectified layer silent
        _, grads = gradients(randomize(block, seed=seed), example_input(name, batch=3, seed=seed))
        assert all(g is not None and torch.isfinite(g).all() for g in grads.values())
        reached |= {key for key, g in grads.items() if g.abs().max() > 0}
    # The softmax over positions removes the bias b1: its gradient is zero, and exactly so where that is known.
    assert set(grads) - reached == ({"conv1.bias"} if name == "external" else set())


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    block = example(name).double()
    x = example_input(name, batch=1, dtype=torch.float64).requires_grad_()
    parameters = dict(block.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(block, dict(zip(parameters, values)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_deepcopy_and_pickle(name):
    block, x = example(name), example_input(name)
    other = randomize(copy.deepcopy(block), seed=7)
    other.load_state_dict(block.state_dict())
    for twin in (other, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert all(torch.equal(a, b) for a, b in zip(outputs(twin, x), outputs(block, x)))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_with_realistic_activations_is_finite(name, dtype):
    block, x = example(name).train(), 4 * example_input(name, batch=2, size=(24, 20)).relu()
    if resolve(name).fixed_size:
        block = randomize(resolve(name).cls(64, (24, 20))).train()
    x.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = outputs(block, x)
    sum(o.float().sum() for o in out).backward()
    assert all(torch.isfinite(o).all() for o in out)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("channels", "dtype", "impl"),
    [(512, torch.float16, "auto"), (64, torch.bfloat16, "auto"), (64, torch.float16, "reference")],
)
def test_channel_attention_energies_do_not_overflow(channels, dtype, impl):
    block = visattn.ChannelAttention(channels, impl=impl)
    torch.nn.init.ones_(block.gamma)
    x = 4 * torch.randn(1, channels, 96, 96).relu()
    assert x.flatten(2).square().sum(dim=2).max() > torch.finfo(torch.float16).max
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        assert torch.isfinite(block(x)).all()
    small = x[:, :64]
    with torch.no_grad():
        assert torch.isfinite(visattn.ChannelAttention(64, impl=impl).to(dtype)(small.to(dtype))).all()


@pytest.mark.parametrize("name", NAMES)
def test_uninitialised_memory_is_never_read(name):
    block, x = example(name), example_input(name)
    expected = outputs(block, x)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        assert all(close(a, b, 1e-6) for a, b in zip(outputs(block, x), expected))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_breaks(name):
    block, x = example(name).double(), example_input(name, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert all(close(a, b) for a, b in zip(outputs(compiled, x), outputs(block, x)))
    grad, _ = gradients(compiled, x)
    assert close(grad, gradients(block, x)[0])


@pytest.mark.parametrize("name", NAMES)
def test_exports_with_dynamic_batch_and_size(name):
    block, dim = example(name).double(), torch.export.Dim
    shapes = {0: dim("batch", min=1, max=64)}
    if resolve(name).role == "tokens":
        shapes[1] = dim("tokens", min=1, max=1024)
    elif not resolve(name).fixed_size:
        shapes |= {2: dim("height", min=1, max=128), 3: dim("width", min=1, max=128)}
    x = example_input(name, dtype=torch.float64)
    exported = torch.export.export(block, (x,), dynamic_shapes=(shapes,)).module()
    size = FEAT_SIZE if resolve(name).fixed_size else (11, 4)
    for batch in (1, 3):
        other = example_input(name, batch=batch, size=size, dtype=torch.float64, seed=5)
        assert all(close(a, b) for a, b in zip(outputs(exported, other), outputs(block, other)))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_inputs_are_refused_by_name(name):
    block, cls = example(name), resolve(name).cls
    shape = r"\(B, N, 64\)" if resolve(name).role == "tokens" else r"\(B, 64, H, W\)"
    for bad in (torch.randn(2, 64), torch.randn(2, 3, 5, 7), torch.randn(2, 5, 63)):
        with pytest.raises(
            ValueError, match=rf"the input must be {shape}, got shape=\({re.escape(str(tuple(bad.shape))[1:-1])}\)"
        ):
            block(bad)
    assert cls.__name__


@pytest.mark.parametrize("name", NAMES)
def test_placement(name):
    cls = resolve(name).cls
    placed = cls(**required_arguments(cls), device="meta", dtype=torch.float64).state_dict().values()
    assert {t.device.type for t in placed} == {"meta"}
    assert {t.dtype for t in placed if t.is_floating_point()} == {torch.float64}


@pytest.mark.parametrize("name", NAMES)
def test_docstring_says_what_a_user_needs(name):
    cls = resolve(name).cls
    doc = inspect.getdoc(cls)
    sections = ["Args:", "Shape:", "Raises:", "Differs from the authors' code:", "References:", "Example:"]
    positions = [doc.find(section) for section in sections]
    assert -1 not in positions, dict(zip(sections, positions))
    assert positions == sorted(positions)
    parameters = inspect.signature(cls.__init__).parameters
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    missing = [p for p in parameters if p != "self" and f"{p}:" not in doc]
    assert not missing


@pytest.mark.parametrize("name", NAMES)
def test_capture_sees_it_without_touching_it(name):
    block, x = example(name).train(), example_input(name, batch=3)
    twin = copy.deepcopy(block)
    torch.manual_seed(3)
    expected = outputs(twin, x)
    torch.manual_seed(3)
    with visattn.capture(block, queries=[(0.5, 0.5), (0.0, 0.99)]) as maps:
        out = outputs(block, x)
    assert all(torch.equal(a, b) for a, b in zip(out, expected))
    assert all(torch.equal(a, b) for a, b in zip(block.state_dict().values(), twin.state_dict().values()))
    assert maps
    sums = {"position": -1, "slot": 1, "channel": -1, "branch": 1}
    for kinds in maps.values():
        for kind, tensor in kinds.items():
            assert not tensor.requires_grad
            if kind == "position" and resolve(name).role != "tokens":
                assert tensor.shape[2:] == (2, *FEAT_SIZE)
                tensor = tensor.flatten(3)
            if name != "squeeze_weight":
                total = tensor.sum(dim=sums[kind])
                assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    assert not any(module._forward_hooks for module in block.modules())
    block.eval()
    reference = copy.deepcopy(block)
    for module in reference.modules():
        if hasattr(module, "impl"):
            module.impl = "reference"
    with visattn.capture(block) as fast, visattn.capture(reference) as plain:
        block(x), reference(x)
    assert fast.keys() == plain.keys()
    assert all(torch.allclose(fast[k][kind], plain[k][kind], atol=1e-5) for k in fast for kind in fast[k])


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch(name):
    block = example(name).train()
    with visattn.capture(block):
        out = outputs(block, example_input(name, batch=1)[:0].requires_grad_())
    sum(o.sum() for o in out).backward()
    assert all(o.shape[0] == 0 for o in out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_of_keys_alone(dtype):
    block, x = example("multihead_tokens").to(dtype), example_input("multihead_tokens", dtype=dtype)
    mask = torch.arange(x.shape[1]) % 3 == 0
    assert torch.equal(block(x, attention_mask=mask), block(x, attention_mask=mask[None, None, None]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: visattn.create("mhsa", 16, attn_drop=-0.1), r"attn_drop must lie in \[0, 1\], got attn_drop=-0.1"),
        (lambda: visattn.create("external_heads", 16, proj_drop=2), r"proj_drop must lie in \[0, 1\], got proj_drop=2"),
        (lambda: visattn.create("external_heads", 16, num_heads=0), "sizes must be >= 1, got dim=16, num_heads=0"),
        (lambda: visattn.create("dual_head", 16, 0), "out_channels must be >= 1, got out_channels=0"),
        (lambda: visattn.create("dual_head", 16, 3, drop=2), r"drop must lie in \[0, 1\], got drop=2"),
        (
            lambda: visattn.create("mha", 16)(torch.ones(1, 5, 16), torch.ones(1, 7, 16), torch.ones(1, 6, 16)),
            r"as many values as keys, got keys=\(1, 7, 16\), values=\(1, 6, 16\)",
        ),
    ],
)
def test_sizes_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["selective_kernel", "pyramid_squeeze", "dual_position", "external"])
def test_parts_with_hooks_and_parts_put_in_their_place_are_called(name):
    block, x = example(name), example_input(name)
    before = {key: module for key, module in block.named_modules() if type(module) in (torch.nn.Conv2d, torch.nn.ReLU)}
    expected = outputs(block, x)[0]
    seen = {}
    watched = {key: module for key, module in before.items() if not key.startswith(("conv1", "conv2", "se"))}
    if name == "external":
        watched = {"conv2.1": block.conv2[1]}  # its convolutions are factors of a product
    for key, module in watched.items():
        module.register_forward_hook(lambda module, args, out, key=key: seen.update({key: (out, out.clone())}))
    with torch.no_grad():
        assert close(outputs(block, x)[0], expected, 1e-5)
    assert seen.keys() == watched.keys()
    assert all(torch.equal(out, copied) for out, copied in seen.values())  # nothing wrote over what a hook has seen


def test_half_precision_convolutions_with_a_float32_norm():
    block = example("selective_kernel").half()
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.float()
    x = example_input("selective_kernel").half()
    with torch.no_grad():
        quiet = block(x)
    assert close(quiet.float(), block(x).float(), 1e-2)


def test_a_batch_norm_without_bias():
    block = example("external", norm_layer=lambda c: torch.nn.BatchNorm2d(c))
    block.conv2[1].register_parameter("bias", None)
    assert torch.isfinite(block(example_input("external"))).all()


def test_the_output_keeps_the_layout_of_the_input_whatever_the_convolutions_used():
    block = visattn.create("sk", 64, kernel_size=(5, 7), dilated=False, groups=8)
    assert block(torch.randn(2, 64, 5, 7)).is_contiguous()
