import subprocess
import sys

import torch
from torch.nn import functional as F

from visattn.benchmarks.memory import allocations, peak_bytes

KIB = 1024


def test_a_chain_of_operations_frees_as_it_goes():
    x = torch.ones(256)  # 1 KiB

    def chain():
        y = x.exp()
        for _ in range(10):
            y = y.neg()  # the old one lives until the new one is there

    assert peak_bytes(chain) == 2 * KIB
    assert peak_bytes(lambda: x.view(16, 16)) == 0


def test_memory_inside_one_operation_counts():
    x = torch.ones(256, 256, dtype=torch.bfloat16)  # 128 KiB
    inside = peak_bytes(lambda: torch.linalg.matrix_norm(x.float(), ord=2) * 0)
    assert inside > 256 * KIB  # the float copy and the factors within
    # softmax over a dimension that is not contiguous is one call; it makes a copy (256 KiB) beside its result
    y = torch.ones(256, 1, 256).transpose(0, 2)
    sizes = allocations(lambda: F.softmax(y, dim=-1))
    assert sum(size for size in sizes if size > 0) == peak_bytes(lambda: F.softmax(y, dim=-1)) == 512 * KIB


def test_what_a_call_gives_back_in_another_order():
    def call():
        a = torch.empty(1024, dtype=torch.uint8)
        b = torch.empty(4096, dtype=torch.uint8)
        del a
        c = torch.empty(512, dtype=torch.uint8)
        del b, c

    assert allocations(call) == [1024, 4096, -1024, 512, -4096, -512]
    assert peak_bytes(call) == 5120


def test_backward_counts_saved_tensors_and_gradients():
    x = torch.ones(256, requires_grad=True)

    def step():
        x.grad = None
        (x.exp() * 2).backward(torch.ones(256))

    step()
    # exp's result, the product, the cotangent, the gradient of the product and of exp, give or take what is freed
    assert 4 * KIB <= peak_bytes(step) <= 5 * KIB


def test_counting_says_nothing_of_its_own():
    code = "import torch; from visattn.benchmarks.memory import peak_bytes; print(peak_bytes(lambda: torch.ones(8)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("32\n", "")
