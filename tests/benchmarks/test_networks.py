"""`visattn bench --networks`."""

import json

import pytest
import torch
from torch import nn

from visattn.benchmarks import networks
from visattn.benchmarks.networks import NETWORKS, Network, measure
from visattn.cli import main
from visattn.profile import MIB


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--networks", *arguments])
    return stop.value.code


def test_the_papers_networks_at_their_sizes():
    sizes = {network.name: (network.size, network.batch) for network in NETWORKS}
    assert sizes["danet50"] == sizes["eanet50"] == ((769, 769), 1)
    assert sizes["epsanet50"] == ((224, 224), 8)


def test_command_measures_in_processes_of_their_own(tmp_path, capsys):
    file = tmp_path / "networks.json"
    assert run("epsanet50", "--shapes", "33x40", "--json", str(file)) == 0
    said = capsys.readouterr().out
    assert "1 of 33x40" in said
    assert "22.56" in said
    rows = json.loads(file.read_text())["networks"]
    assert [(row["network"], row["impl"]) for row in rows] == [("epsanet50", "visattn"), ("epsanet50", "reference")]
    for row in rows:
        weights = row["parameters"] * 4 / MIB
        assert row["inference_mib"] > weights
        assert row["training_mib"] > 3 * weights  # gradients and momentum
        assert row["resident_mib"] > row["training_mib"]
        assert 0 < row["inference_ms"] < row["training_ms"]
        assert not row["reason"]


def test_a_failure_is_told(capsys):
    assert run("eanet50", "--shapes", "8x8", "--mode", "training") == 1
    assert "failed eanet50 visattn: ValueError: Expected more than 1 value per channel" in capsys.readouterr().out


def test_memory_and_modes_of_a_known_network(monkeypatch):
    monkeypatch.setattr(networks, "_build", lambda name: nn.Conv2d(3, 8, 1, bias=False))
    network = Network("conv", (16, 16), 1)
    row = measure(network, "visattn", device=torch.device("cpu"), dtype=torch.float32, modes=["inference"])
    assert row.training_ms is None
    assert row.parameters == 24
    assert row.gmac == pytest.approx(24 * 256 / 1e9)
    assert row.inference_mib * MIB == 4 * (24 + 8 * 256)  # the weights and the one map


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet"], "unknown network 'resnet'. Did you mean resnet50"),
        (["danet50", "--against", "reference,peers"], "--networks knows --against reference alone, got peers"),
        (["danet50", "--shapes", "7"], "unknown shapes '7'"),
        (["danet50", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["danet50", "--json", "/no/such/folder/x.json"], "no such folder"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
