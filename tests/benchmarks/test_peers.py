import os

import pytest
import torch

from visattn.benchmarks import peers, run
from visattn.benchmarks.contenders import Task
from visattn.benchmarks.peers import PEERS, measure_apart, module_of, peer_of
from visattn.benchmarks.registry import shapes
from visattn.benchmarks.settings import Settings

SOURCE = """
import torch
class ExternalAttention(torch.nn.Module):
    def __init__(self, d_model, S):
        super().__init__()
        self.layer = torch.nn.Linear(d_model, S)
    def forward(self, x):
        return self.layer(x)
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package of that name which the other process finds first."""

    def install(init="", **modules):
        folder = tmp_path / "fightingcv_attention" / "attention"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text(init)
        (folder / "__init__.py").write_text("")
        for name, source in modules.items():
            (folder / f"{name}.py").write_text(source)
        paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))

    return install


def test_who_has_something_for_a_shape():
    found = {shape.label: peer_of(shape) for shape in shapes("paper")}
    assert found["sknet50.stage1@56x56"] == "timm"
    assert found["article.sk@14x14"] == found["eanet@65x65"] == found["epsanet50.stage1@56x56"] == "fightingcv"
    assert found["danet@33x33"] is found["danet.position@33x33"] is None
    assert set(found.values()) == {*PEERS, None}


def test_timm_has_the_strides_and_widths_of_the_shapes():
    for shape in shapes("paper", ["sk"]):
        if peer_of(shape) == "timm" and shape.width <= 512:
            x = torch.randn(1, *shape.size)
            ours, _, _ = shape.build(batch=1)
            assert module_of(shape).eval()(x).shape == ours(x).shape


def test_a_peer_is_timed_in_a_process_of_its_own(installed, rates):
    installed(ExternalAttention=SOURCE)
    settings = Settings(("external", "dual"), shapes="small", against=("reference", "peers"))
    content = run.bench(settings, rates=rates, seconds=0.0, say=lambda line: None)
    order = [(row["mode"], row["contender"]) for row in content["rows"] if row["block"] == "external"]
    contenders = ("visattn", "fused", "reference", "fightingcv")
    assert order[:4] == [("inference", contender) for contender in contenders]
    row = next(row for row in content["rows"] if row["contender"] == "fightingcv" and row["block"] == "external")
    assert row["verdict"] == "speed only"
    assert row["parameters"] == 64 * 64 + 64
    assert row["median_ms"] > 0
    assert row["peak_mib"] > 0
    assert row["ratio"] > 0
    broken = next(row for row in content["rows"] if row["contender"] == "fightingcv" and row["block"] != "external")
    assert broken["reason"].startswith("cannot run: ModuleNotFoundError: ")
    assert run.passed(content)  # a fault of theirs is none of ours


def test_a_peer_that_is_not_installed_is_skipped_with_a_word(installed):
    installed(init="raise ModuleNotFoundError('none', name='fightingcv_attention')")
    rows, skipped = measure_apart(Settings(("external",), shapes="small"), seconds=0.0)
    assert rows == []
    assert skipped == [{"contender": "fightingcv", "reason": "not installed (pip install fightingcv-attention)"}]


def test_a_process_that_dies_is_told(installed):
    installed(init="import os; os._exit(3)")
    rows, skipped = measure_apart(Settings(("external",), shapes="small"), seconds=0.0)
    assert rows == []
    assert skipped == [{"contender": "peers", "reason": "their process failed: exit status 3"}]


def test_a_peer_that_writes_into_its_input_finds_it_new_each_time():
    todo = Task.of(shapes("small", ["psa"])[0], "inference", torch.float32, torch.device("cpu"))

    class Doubles(torch.nn.Module):
        def forward(self, x):
            seen.append(x.clone())
            return x.mul_(2)

    seen = []
    timed = peers._timed(Doubles(), todo)
    for _ in range(2):
        timed.prepare()
        timed.run()
    assert torch.equal(*seen)
