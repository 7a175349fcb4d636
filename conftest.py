"""Names that examples in docstrings may use, and one thread per worker."""

import pytest
import torch

import visattn

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _example_names(doctest_namespace):
    doctest_namespace.update(torch=torch, visattn=visattn)
    torch.manual_seed(0)
