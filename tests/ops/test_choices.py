"""What "auto" takes, by device and sizes: the paths of a GPU are chosen here too, and each of them runs on the CPU."""

import pytest
import torch

import visattn
from visattn import native
from visattn.ops import convolution, dual, multihead
from visattn.ops.convolution import best_form
from visattn.ops.dual import best_position
from visattn.ops.multihead import best_multihead

SMALL, LARGE = 2**20, 2**28


@pytest.mark.parametrize(
    ("device", "precise", "entries", "weights", "dropout", "expected"),
    [
        ("cpu", True, SMALL, False, False, "pieces"),
        ("cpu", True, LARGE, False, False, "fused"),
        ("cpu", True, LARGE, True, False, "pieces"),
        ("cpu", True, SMALL, False, True, "reference"),
        ("cpu", False, SMALL, False, False, "fused"),
        ("cpu", False, SMALL, True, False, "pieces"),
        ("cuda", True, SMALL, False, False, "reference"),
        ("cuda", True, LARGE, False, False, "fused"),
        ("cuda", True, LARGE, True, False, "pieces"),
        ("cuda", True, SMALL, True, False, "reference"),
        ("cuda", False, LARGE, False, False, "fused"),
        ("cuda", False, SMALL, False, True, "fused"),
        ("cuda", False, LARGE, True, False, "pieces"),
        ("cuda", False, LARGE, True, True, "reference"),
    ],
)
def test_multihead(device, precise, entries, weights, dropout, expected):
    options = {"precise": precise, "weights": weights, "dropout": dropout}
    assert best_multihead(device, compiling=False, buffers=True, entries=entries, **options) == expected
    kernels = best_multihead(device, compiling=False, buffers=True, entries=entries, native=True, **options)
    assert kernels == ("native" if precise and not dropout else expected)
    without = best_multihead(device, compiling=False, buffers=False, entries=entries, **options)
    assert without == ("reference" if expected == "pieces" else expected)
    compiled = best_multihead(device, compiling=True, buffers=False, entries=0, **options)
    assert compiled == ("reference" if weights else "fused")


@pytest.mark.parametrize(
    ("device", "precise", "entries", "expected", "without"),
    [
        ("cpu", True, SMALL, "pieces", "reference"),
        ("cpu", True, LARGE, "pieces", "fused"),
        ("cpu", False, SMALL, "pieces", "fused"),
        ("cuda", True, SMALL, "reference", "reference"),
        ("cuda", True, LARGE, "pieces", "fused"),
        ("cuda", False, LARGE, "fused", "fused"),
    ],
)
def test_position(device, precise, entries, expected, without):
    options = {"precise": precise, "entries": entries}
    assert best_position(device, compiling=False, buffers=True, **options) == expected
    kernels = best_position(device, compiling=False, buffers=True, native=True, **options)
    assert kernels == ("native" if precise else expected)
    assert best_position(device, compiling=False, buffers=False, **options) == without
    assert best_position(device, compiling=True, buffers=False, **options) == "fused"


@pytest.mark.parametrize(
    ("size", "outputs", "width", "groups", "expected"),
    [
        (3, 16, 64, 1, "reference"),  # EPSANet-50, stage 1
        (5, 4, 16, 4, "channels_last"),
        (7, 2, 8, 8, "channels_last"),
        (9, 1, 4, 16, "channels_last"),
        (3, 4, 4, 32, "merged"),  # SKNet-50, stages 1 and 2
        (3, 8, 8, 32, "reference"),
        (7, 1, 1, 64, "reference"),  # depthwise as it is
    ],
)
def test_convolution(size, outputs, width, groups, expected):
    options = {"size": size, "outputs": outputs, "width": width, "groups": groups}
    assert best_form("cpu", native=False, **options) == expected
    narrow = groups > 1 and (outputs, width) != (1, 1)
    assert best_form("cpu", native=True, **options) == ("native" if narrow else "reference")
    assert best_form("cpu", native=True, beats_torch=True, **options) == (
        "native" if groups == 1 or narrow else "reference"
    )
    assert best_form("cpu", native=False, beats_torch=True, **options) == expected
    assert best_form("cuda", native=False, **options) == "reference"


NARROW = torch.ones(64, 4, 3, 3)


@pytest.mark.parametrize(
    ("module", "table", "call", "expected"),
    [
        (multihead, "_MULTIHEAD", lambda x: visattn.create("mhsa", 64)(x), "pieces"),
        (dual, "_POSITION", lambda x: visattn.create("pam", 64)(x), "pieces"),
        (convolution, "_CONVOLUTION", lambda x: visattn.create("sk", 64, groups=16)(x), "merged"),
        (convolution, "_CONVOLUTION", lambda x: convolution.grouped_conv2d(x, NARROW, groups=16), "native"),
        (multihead, "_MULTIHEAD", lambda x: visattn.create("mhsa", 64)(x), "native"),
        (dual, "_POSITION", lambda x: visattn.create("pam", 64)(x), "native"),
    ],
)
def test_the_choice_is_what_runs(module, table, call, expected, monkeypatch):
    seen = []
    if expected == "native" and not native.available():
        pytest.skip("there is no C compiler: tests/native checks that there is none")
    for name in ("available", "leads"):
        monkeypatch.setattr(native, name, lambda: expected == "native")
    for name, function in dict(getattr(module, table)).items():

        def spy(*args, name=name, function=function):
            seen.append(name)
            return function(*args)

        if name != "auto":
            monkeypatch.setitem(getattr(module, table), name, spy)
    call(torch.randn(2, 64, 5, 7))
    assert set(seen) == {expected}
