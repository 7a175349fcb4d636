import pytest
import torch

import visattn
from visattn.benchmarks import check
from visattn.benchmarks.check import Gate
from visattn.benchmarks.contenders import Contender, Task
from visattn.benchmarks.registry import shapes
from visattn.testing.tolerance import budget

CPU = torch.device("cpu")


def task(name="selective_kernel", mode="training", dtype=torch.float32):
    return Task.of(shapes("small", [name])[0], mode, dtype, CPU)


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", ["selective_kernel", "dual_projected"])
def test_the_fast_form_is_equal(name, mode, dtype):
    todo = task(name, mode, dtype)
    contender = Contender("visattn", todo, "auto")
    verdict = Gate(todo).check(contender)
    assert verdict.equal, verdict.reason
    assert 0 <= verdict.used <= 1
    state = contender.block.state_dict()
    assert all(torch.equal(state[key], value) for key, value in todo.state.items())  # running means too


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_output_is_caught(dtype):
    todo = task(mode="inference", dtype=dtype)
    wrong = Contender("visattn", todo, "auto", lambda block: lambda x: block(x) * 1.001)
    verdict = Gate(todo).check(wrong)
    assert not verdict.equal
    assert verdict.used > 10
    assert verdict.reason.startswith("output is off by ")
    assert verdict.reason.endswith(f"times what {str(dtype).removeprefix('torch.')} allows")


def test_a_wrong_gradient_is_caught():
    todo = task()
    wrong = Contender("visattn", todo, "auto", lambda block: lambda x: Wrong.apply(block(x)))
    verdict = Gate(todo).check(wrong)
    assert not verdict.equal
    assert "gradient of " in verdict.reason


def test_a_wrong_buffer_is_caught():
    todo = task()

    def twice(block):
        def call(x):
            with torch.no_grad():
                block(x)
            return block(x)

        return call

    verdict = Gate(todo).check(Contender("visattn", todo, "auto", twice))
    assert not verdict.equal
    assert "running_" in verdict.reason


def test_a_missing_gradient_is_an_error():
    todo = task("dual_channel")
    stuck = Contender("visattn", todo, "auto", lambda block: lambda x: block(x.detach()))
    with pytest.raises(ValueError, match="no gradient of input 0"):
        Gate(todo).check(stuck)


def test_bad_luck_is_told_from_a_systematic_loss(monkeypatch):
    monkeypatch.setattr(check, "NEIGHBOURS", 8)
    todo = task("dual_channel", "inference")
    gate = Gate(todo)
    allowed = budget(gate._low["output"], gate._exact["output"], todo.dtype)
    calls = []

    def off(times):
        def wrap(block):
            def call(x):
                calls.append(x)
                out = block(x)
                if times == "once" and len(calls) > 1:
                    return out
                out[0, 0, 0, 0] += 3 * allowed
                return out

            return call

        return wrap

    assert gate.check(Contender("visattn", todo, "auto", off("once"))).equal
    assert len(calls) == 9
    calls.clear()
    verdict = gate.check(Contender("visattn", todo, "auto", off("always")))
    assert not verdict.equal
    assert 1 < verdict.used < 10


def test_a_fused_copy_is_made_anew_for_other_numbers(monkeypatch):
    from visattn.benchmarks.contenders import fused

    made = []
    monkeypatch.setattr(visattn, "fuse", lambda net: made.append(net) or net, raising=False)
    todo = task(mode="inference")
    contender = fused(todo)
    assert Gate(todo).check(contender).equal
    assert len(made) == 2


@pytest.mark.parametrize(("name", "near"), [("external", 5.0), ("selective_kernel", 0.5)])
def test_training_stays_away_from_the_kinks_of_relu(name, near):
    contender = Contender("reference", task(name), "reference")
    seen = []
    for module in contender.block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda module, args, out: seen.append(out))
    contender.run()
    assert seen
    assert all(out.abs().min() > near and (out > 0).any() and (out < 0).any() for out in seen)
