"""What the tests of the kernels share."""

import pytest
import torch


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    """How many threads torch, and the kernels with it, may take."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
