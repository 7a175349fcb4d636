import torch
from torch.nn import functional as F

from visattn.benchmarks.flops import count


def test_a_grouped_convolution_costs_three_times_as_much_with_its_backward_pass():
    x = torch.randn(2, 8, 7, 5, requires_grad=True)
    weight = torch.randn(12, 2, 3, 3, requires_grad=True)  # 4 groups
    forward = 2 * 2 * (7 * 5) * 12 * 2 * 9

    def run(x, weight):
        out = F.conv2d(x, weight, padding=1, groups=4)
        if out.requires_grad:
            out.backward(torch.ones_like(out))

    assert count(lambda: run(x.detach(), weight.detach())) == forward
    assert count(lambda: run(x, weight)) == 3 * forward
    assert count(lambda: run(x.detach(), weight)) == 2 * forward


def test_a_transposed_convolution_counts_its_input():
    x, weight = torch.randn(1, 4, 3, 3, requires_grad=True), torch.randn(4, 2, 2, 2, requires_grad=True)
    forward = 2 * 9 * 4 * 2 * 4
    assert count(lambda: F.conv_transpose2d(x, weight, stride=2).sum().backward()) == 3 * forward


def test_fused_attention_counts_its_products():
    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 5 * 5 * 4
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        assert count(lambda: F.scaled_dot_product_attention(q.detach(), k.detach(), v.detach())) == 2 * product
        assert count(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == 7 * product
