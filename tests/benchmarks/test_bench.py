import json
from functools import partial

import pytest
import torch

import visattn
from visattn.benchmarks import run
from visattn.benchmarks.results import read
from visattn.benchmarks.settings import Settings
from visattn.cli import main

NAMES = ("dual_channel", "sk")


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    return stop.value.code, *capsys.readouterr()


def bench(rates, **settings):
    chosen = Settings(names=NAMES, shapes="small", **settings)
    content = run.bench(chosen, rates=rates, seconds=0.0, say=lambda line: None)
    return content, {(row["block"], row["mode"], row["contender"]): row for row in content["rows"]}


@pytest.fixture
def wrong(monkeypatch):
    """Selective kernel in its fast form gives a result that is off by a thousandth."""
    right = visattn.SelectiveKernel.forward

    def forward(self, x):
        return right(self, x) * (1.001 if self.impl == "auto" else 1)

    monkeypatch.setattr(visattn.SelectiveKernel, "forward", forward)


@pytest.mark.usefixtures("quick")
def test_the_small_shapes_from_end_to_end(capsys, tmp_path):
    file = tmp_path / "results.json"
    status, out, progress = call(capsys, "--shapes", "small", "--json", str(file))
    assert status == 0
    assert max(len(line) for line in out.splitlines()) <= 100
    assert "[16/16] pyramid_squeeze.64@7x5 training" in progress
    for word in ("matrix product", "GFLOP/s", "inference: visattn is", "training: visattn is", "least"):
        assert word in out
    content = read(file)
    assert len(content["rows"]) >= 8 * 2 * 2
    for row in content["rows"]:
        assert (row["verdict"], row["reason"]) == ("equal", "")
        assert row["runs"] >= 5
        for key in ("median_ms", "peak_mib", "gflop", "parameters", "ratio", "limit_ms", "percent_of_limit"):
            assert row[key] > 0 or (key in ("parameters", "gflop") and row["block"] == "dual_channel")
    assert {entry["mode"]: entry["shapes"] for entry in content["summary"]} == {"inference": 8, "training": 8}


@pytest.mark.usefixtures("wrong")
def test_a_wrong_implementation_is_marked_and_not_timed(rates):
    content, rows = bench(rates)
    for mode in ("inference", "training"):
        row = rows["selective_kernel", mode, "visattn"]
        assert row["verdict"] == "NOT EQUAL"
        assert row["budget_used"] > 1
        assert " is off by " in row["reason"]
        assert row["median_ms"] is row["ratio"] is None
        assert rows["selective_kernel", mode, "reference"]["verdict"] == "equal"
        assert rows["dual_channel", mode, "visattn"]["verdict"] == "equal"
    means = {(entry["mode"], entry["contender"]): entry["shapes"] for entry in content["summary"]}
    assert means == {("inference", "visattn"): 1, ("inference", "fused"): 2, ("training", "visattn"): 1}
    assert not run.passed(content)


@pytest.mark.usefixtures("wrong", "quick")
def test_a_wrong_implementation_ends_in_exit_code_1(capsys):
    status, out, _ = call(capsys, "sk", "--shapes", "small", "--mode", "inference")
    assert status == 1
    assert "NOT EQUAL" in out
    assert "1 without a time, in no mean: not equal or failed" in out


@pytest.mark.usefixtures("wrong", "quick")
def test_without_the_gate_rows_are_unverified(capsys):
    status, out, _ = call(capsys, "sk", "--shapes", "small", "--mode", "inference", "--no-gate")
    assert status == 0
    assert out.count("unverified") == 3
    assert " equal" not in out


def test_a_contender_that_fails_is_told_and_the_others_are_measured(rates, monkeypatch):
    right = visattn.SelectiveKernel.forward

    def forward(self, x):
        if self.impl == "auto":
            raise RuntimeError("no\n luck")
        return right(self, x)

    monkeypatch.setattr(visattn.SelectiveKernel, "forward", forward)
    content, rows = bench(rates, modes=("training",))
    row = rows["selective_kernel", "training", "visattn"]
    assert (row["verdict"], row["reason"]) == ("failed", "RuntimeError: no luck")
    assert rows["selective_kernel", "training", "reference"]["median_ms"] > 0
    assert not run.passed(content)
    with pytest.raises(RuntimeError, match="no"):
        run.bench(Settings(names=NAMES, shapes="small"), rates=rates, debug=True, say=lambda line: None)


def test_a_reference_that_fails_leaves_the_others_unverified(rates, monkeypatch):
    right = visattn.ChannelAttention.forward

    def forward(self, x):
        if x.dtype == torch.float64:
            raise RuntimeError("out of memory")
        return right(self, x)

    monkeypatch.setattr(visattn.ChannelAttention, "forward", forward)
    _, rows = bench(rates, modes=("inference",))
    row = rows["dual_channel", "inference", "visattn"]
    assert (row["verdict"], row["reason"]) == ("unverified", "the reference in float64: RuntimeError: out of memory")
    assert row["median_ms"] > 0


def test_the_compiler_and_a_fused_copy_are_contenders(rates, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(visattn, "fuse", lambda net: net, raising=False)
    content, rows = bench(rates, against=("compiled",))
    assert {contender for _, _, contender in rows} == {"visattn", "fused", "compiled"}
    assert ("dual_channel", "training", "fused") not in rows
    row = rows["selective_kernel", "training", "compiled"]
    assert row["verdict"] == "equal"
    assert row["median_ms"] > 0
    assert row["ratio"] is None
    assert {(s["mode"], s["contender"], s["against"]) for s in content["summary"]} == {
        ("inference", "visattn", "compiled"),
        ("inference", "fused", "compiled"),
        ("training", "visattn", "compiled"),
    }


@pytest.mark.usefixtures("quick")
def test_a_folder_gets_a_file_named_after_device_and_day(capsys, tmp_path):
    status, _, progress = call(capsys, "cam", "--shapes", "3x2", "--mode", "inference", "--json", str(tmp_path))
    assert status == 0
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    assert file.name.endswith(f"-{content['date']}.json")
    assert f"wrote {file}" in progress
    assert content["rows"][0]["size"] == [512, 3, 2]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["duel"], "unknown block 'duel'. Did you mean dual"),
        (["squeeze_weight"], "no shape of block 'squeeze_weight' is measured. Choose from external, "),
        (["--shapes", "big"], "unknown shapes 'big'. Choose from paper, small or map sizes such as 56x56,28x28"),
        (["--dtype", "int8"], "unknown dtype 'int8'. Choose from float32, bfloat16, float16, float64"),
        (["--mode", "test"], "unknown mode 'test'. Choose from inference, training"),
        (["--mode", ""], "no mode given. Choose from inference, training"),
        (["--against", "me"], "unknown contender for --against 'me'. Choose from reference, compiled, peers"),
        (["--device", "cuda:99"], "no device 'cuda:99' here. Devices here: cpu"),
        (["--device", "meta"], "bench runs on cpu and cuda, got device 'meta'. Devices here: cpu"),
        (["--json", "no/such/folder/a.json"], "no such folder: no/such/folder"),
    ],
)
def test_wrong_values_are_one_line_and_exit_code_2(capsys, arguments, line):
    status, out, error = call(capsys, *arguments)
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"visattn: {line}")
