import subprocess

import pytest
import torch

import visattn
from visattn.benchmarks import machine
from visattn.benchmarks.machine import Machine


def test_the_limit_is_the_longer_of_computing_and_moving():
    device = Machine("cpu", "a", "b", 2, gemm_gflops=100.0, copy_gbps=10.0)
    assert device.limit_ms(flops=2e9, moved=1e6) == pytest.approx(20)
    assert device.limit_ms(flops=2e9, moved=1e9) == pytest.approx(100)
    again = Machine("cpu", "a", "b", 2, gemm_gflops=50.0, copy_gbps=20.0)
    assert (device.best(again).gemm_gflops, device.best(again).copy_gbps) == (100.0, 20.0)


def test_rates_are_measured(monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    monkeypatch.setattr(machine, "SIDE", {"cpu": 64})
    monkeypatch.setattr(machine, "BUFFER", {"cpu": 2**16})
    measured = machine.measure(torch.device("cpu"), torch.float32)
    assert 0.01 < measured.gemm_gflops < 1e5
    assert 0.01 < measured.copy_gbps < 1e4
    assert measured.threads == torch.get_num_threads()


def test_versions_and_commit(tmp_path):
    assert machine.versions()["visattn"] == visattn.__version__

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    file = tmp_path / "__init__.py"
    file.write_text("")
    assert machine.commit(tmp_path) is None
    git("init")
    assert machine.commit(tmp_path) is None  # in a checkout, but not part of it
    git("add", ".")
    git("commit", "-m", "one")
    commit = machine.commit(tmp_path)
    assert len(commit) == 40
    file.write_text("changed")
    assert machine.commit(tmp_path) == f"{commit}+changes"
