"""`visattn verify --networks`: the papers' networks, their weights read from files."""

import json

import numpy as np
import pytest
import torch

from visattn.checkpoints import load_checkpoint
from visattn.cli import main
from visattn.verify import networks
from visattn.verify.cases import SHIPPED, load_cases
from visattn.verify.networks import check_network, is_network

CASES = {case.name: case for case in load_cases(SHIPPED) if is_network(case)}
CPU = torch.device("cpu")


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["verify", "--networks", *arguments])
    return stop.value.code


def test_every_recorded_network_and_unit_is_checked():
    assert set(CASES) == {
        "danet50_eval",
        "eanet50_eval",
        "epsa_block_eval",
        "epsa_block_train",
        "epsanet50_eval",
        "sknet26_eval",
        "skunit_dilated_eval",
        "skunit_train",
    }


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_published_code(name):
    result = check_network(CASES[name], device=CPU, debug=True)
    assert result.verdict == "passed", result.reasons
    assert set(result.errors) == set(CASES[name].expected)


def test_command(tmp_path, capsys):
    file = tmp_path / "networks.json"
    assert run("selective_kernel", "--json", str(file)) == 0
    assert "3 passed (within 1e-10), 0 failed, 0 skipped" in capsys.readouterr().out
    assert [case["case"] for case in json.loads(file.read_text())["cases"]] == [
        "sknet26_eval",
        "skunit_dilated_eval",
        "skunit_train",
    ]


def test_a_wrong_result_fails():
    case = CASES["skunit_dilated_eval"]
    expected = {**case.expected, "out": case.expected["out"] + np.eye(4)[0] * 1e-6}
    wrong = type(case)(case.path, case.meta, expected)
    result = check_network(wrong, device=CPU)
    assert result.verdict == "failed"
    assert result.reasons[0].startswith("out: relative error")


def test_weights_that_do_not_load_fail(monkeypatch):
    monkeypatch.setattr(networks, "load_checkpoint", lambda net, file: load_checkpoint(net, file.with_suffix(".gone")))
    result = check_network(CASES["skunit_train"], device=CPU)
    assert result.verdict == "failed"
    assert "no such file" in result.reasons[0].lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float32"], "--networks checks what users get, in float64: leave --dtype and --impl out"),
        (["--impl", "all"], "leave --dtype and --impl out"),
        (["multihead"], "no network among the cases of multihead"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
