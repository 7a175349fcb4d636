import pytest

from visattn.benchmarks import machine
from visattn.benchmarks.machine import Machine


@pytest.fixture
def quick(monkeypatch):
    """Measure neither the machine nor for long."""
    monkeypatch.setattr(machine, "SECONDS", 0.0)
    monkeypatch.setattr(machine, "REPEATS", 1)
    monkeypatch.setattr(machine, "SIDE", {"cpu": 64})
    monkeypatch.setattr(machine, "BUFFER", {"cpu": 2**16})


@pytest.fixture
def rates():
    return lambda device, dtype: Machine(str(device), "A machine", "Linux x86_64", 2, 100.0, 10.0)
