"""A run that is killed and started again ends where one that was not killed ends."""

import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest

from visattn.compare.run import _is_measured

OPTIONS = ["--mechanisms", "dual", "--epochs", "6", "--seeds", "1", "--batch-size", "8", "--device", "cpu"]


def start(out, pictures):
    command = [sys.executable, "-c", "from visattn.cli import main; main()", "compare", *OPTIONS]
    return subprocess.Popen(
        [*command, "--data", str(pictures), "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def results(out):
    """What the trials came to, without the seconds they took."""
    found = {}
    for path in sorted(out.glob("trials/*/result.json")):
        result = json.loads(path.read_text())
        epochs = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in result["epochs"]]
        found[path.parent.name] = (result["score"], epochs, result["gates"], result["step0_difference"])
    return found


def test_sigkill_in_mid_trial_changes_nothing(tmp_path, pictures):
    whole = start(tmp_path / "whole", pictures)
    killed = start(tmp_path / "killed", pictures)
    for line in killed.stderr:
        if line.startswith("trial 2/3  dual  seed 0  epoch 2/6"):
            killed.send_signal(signal.SIGKILL)
            break
    assert killed.wait() == -signal.SIGKILL
    assert list(results(tmp_path / "killed")) == ["plain-seed0"]
    untouched = tmp_path / "killed" / "trials" / "plain-seed0" / "result.json"
    before = untouched.stat().st_mtime_ns
    killed.stdout.close(), killed.stderr.close()

    again = start(tmp_path / "killed", pictures)
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert "Continuing: 1 of 3 trials are finished." in said
    assert "  plain  seed" not in said
    assert untouched.stat().st_mtime_ns == before

    _, said = whole.communicate(timeout=120)
    assert whole.returncode == 0, said
    assert "max|output difference| = 0" in said
    expected = results(tmp_path / "whole")
    assert set(expected) == {"plain-seed0", "dual-seed0", "control-seed0"}
    assert results(tmp_path / "killed") == expected


def test_two_processes_do_not_write_to_one_folder(tmp_path, pictures):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        lock.write(str(os.getpid()))
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = start(tmp_path / "out", pictures)
        _, said = second.communicate(timeout=120)
    assert second.returncode == 2
    assert f"out: another visattn compare (process {os.getpid()}) is writing to it." in said


@pytest.mark.parametrize("content", ["garbage", "[1]", "{}"])
def test_damaged_costs_are_measured_anew(tmp_path, content):
    (tmp_path / "dual.json").write_text(content)
    assert not _is_measured(tmp_path / "dual.json")
    (tmp_path / "dual.json").write_text('{"parameters": 3}')
    assert _is_measured(tmp_path / "dual.json")
