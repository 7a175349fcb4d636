"""`visattn train`: the trial of a comparison, kept, continued, spread over processes."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import visattn.train
from visattn.cli import main
from visattn.compare import Settings, compare
from visattn.errors import UserError
from visattn.train import TrainSettings, _Show, train
from visattn.training import Epoch, TrainingError
from visattn.writing import alone

OPTIONS = ["--epochs", "3", "--batch-size", "8", "--device", "cpu"]


def settings(data, out, **options):
    own = {key: options.pop(key) for key in list(options) if key not in Settings.__dataclass_fields__}
    trial = {"data": str(data), "epochs": 2, "batch_size": 8, "device": "cpu", "out": out, **options}
    return TrainSettings(Settings(**trial), **{"mechanism": "dual", **own})


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A training of two epochs."""
    out = tmp_path_factory.mktemp("trained") / "out"
    train(settings(pictures, out))
    return out


def same_weights(one, two):
    first, second = load_file(one / "weights.safetensors"), load_file(two / "weights.safetensors")
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_it_is_the_trial_of_compare(trained, pictures, tmp_path):
    trial = Settings(data=str(pictures), mechanisms=("dual",), epochs=2, seeds=1, batch_size=8, device="cpu")
    compare(Settings(**{**vars(trial), "out": tmp_path / "run"}))
    assert same_weights(trained, tmp_path / "run" / "trials" / "dual-seed0")


def test_what_a_training_leaves(trained):
    names = [".lock", "epochs.csv", "last.ckpt", "train.json", "weights.safetensors"]
    assert sorted(path.name for path in trained.iterdir()) == names
    record = json.loads((trained / "train.json").read_text())
    assert record["settings"]["mechanism"] == "dual"
    assert record["network"]["classes"] == ["left", "right"]
    assert record["results"]["epoch"] == 2
    assert record["dataset"]["train"] == 16
    assert {"versions", "hardware", "parameters", "command"} <= record.keys()
    lines = (trained / "epochs.csv").read_text().splitlines()
    assert len(lines) == 3
    assert lines[0] == "epoch,train_loss,train_score,val_loss,val_score,seconds"


def test_a_finished_training_stays_as_it_is(trained, pictures):
    before = (trained / "weights.safetensors").read_bytes()
    train(settings(pictures, trained, resume=True))
    assert (trained / "weights.safetensors").read_bytes() == before


def test_other_settings_do_not_continue_it(trained, pictures):
    with pytest.raises(UserError, match=r"holds a training\. Add --resume to continue it, or use another --out\."):
        train(settings(pictures, trained))
    with pytest.raises(UserError, match=r"holds another training: epochs was 2, now 5; seed was 0, now 1\. Repeat"):
        train(settings(pictures, trained, resume=True, epochs=5, seed=1))


def test_what_changed_around_it_is_noted(trained, pictures, monkeypatch):
    real = visattn.train.versions
    monkeypatch.setattr(visattn.train, "versions", lambda: {**real(), "timm": "9.9"})
    train(settings(pictures, trained, resume=True))
    notes = json.loads((trained / "train.json").read_text())["notes"]
    assert [note.split(";")[0] for note in notes] == ["Continued with timm 9.9"]


def start(data, out, script, *options):
    command = [sys.executable, str(script), "train", "--data", str(data), "--out", str(out), *OPTIONS, *options]
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=-1, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def script(tmp_path):
    """What pip makes of the entry point."""
    path = tmp_path / "command.py"
    path.write_text("from visattn.cli import main\n\nmain()\n")
    return path


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_steps_and_a_line_for_every_epoch(tmp_path):
    stream = Terminal()
    show = _Show(settings("data", tmp_path, epochs=3), [Epoch(1, 1.0, 0.5, 1.0, 0.5, 10.0)], stream)
    show.batch(2, 5, 10)
    show.epoch(Epoch(2, 0.75, 0.5, 0.625, 0.875, 10.0))
    lines = stream.getvalue().replace("\r\x1b[2K", "|").splitlines()
    assert lines[0] == "|Continuing after epoch 1 of 3."
    assert lines[1].startswith(
        "|epoch 2/3  step 5/10  0s left|epoch 2/3  loss 0.750  validation loss 0.625  top-1 87.5%"
    )
    assert len((tmp_path / "epochs.csv").read_text().splitlines()) == 3


def test_sigkill_in_mid_training_changes_nothing(tmp_path, pictures, script):
    options = ["--mechanism", "external", "--resume"]  # --resume with nothing there starts
    killed = start(pictures, tmp_path / "killed", script, *options)
    for line in killed.stderr:
        if line.startswith("epoch 2/3"):
            killed.send_signal(signal.SIGKILL)
            break
    assert killed.wait() == -signal.SIGKILL
    killed.stdout.close(), killed.stderr.close()
    assert not (tmp_path / "killed" / "weights.safetensors").exists()

    again = start(pictures, tmp_path / "killed", script, *options)
    out, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert said.startswith("Continuing after epoch ")
    assert f"Weights: {tmp_path / 'killed' / 'weights.safetensors'}" in out
    train(settings(pictures, tmp_path / "whole", mechanism="external", epochs=3))
    assert same_weights(tmp_path / "whole", tmp_path / "killed")


def test_two_processes_train_the_network_of_one(tmp_path, pictures, script):
    backbone = "test_convnext"  # without batch norms, whose statistics are those of each share
    two = start(pictures, tmp_path / "two", script, "--backbone", backbone, "--devices", "2", "--strategy", "ddp")
    out, said = two.communicate(timeout=120)
    assert two.returncode == 0, said
    assert out.count("Weights: ") == 1  # the first process alone speaks
    assert said.count("epoch 3/3") == 1
    train(settings(pictures, tmp_path / "one", mechanism="plain", epochs=3, backbone=backbone))
    first = load_file(tmp_path / "one" / "weights.safetensors")
    second = load_file(tmp_path / "two" / "weights.safetensors")
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)
    one, two = (json.loads((tmp_path / name / "train.json").read_text())["results"] for name in ("one", "two"))
    assert one["val_score"] == two["val_score"]
    assert one["val_loss"] == pytest.approx(two["val_loss"], rel=1e-3)


@pytest.fixture
def refused(tmp_path, pictures, capsys):
    """Run the command with some options; returns its line."""

    def run(*options, out=tmp_path / "out"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            main(["train", "--out", str(out), "--data", str(pictures), "--device", "cpu", *options])
        printed = capsys.readouterr()
        assert (stop.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
        assert sorted(tmp_path.rglob("*")) == before
        return printed.err

    return run


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--mechanism", "duel"], "--mechanism: unknown block 'duel'. Did you mean dual"),
        (["--mechanism", "dual_head"], "--mechanism: dual_head is no block for feature maps. Known: external"),
        (["--seed", "-1"], "--seed must be 0 or more, got -1."),
        (["--devices", "0"], "--devices must be 1 or more, got 0."),
        (["--strategy", "deepspeed"], "--strategy must be one of auto, ddp, ddp_find_unused_parameters_true, fsdp, go"),
        (["--strategy", "fsdp"], "--strategy fsdp needs CUDA devices. Use ddp on the CPU."),
        (["--devices", "3"], "--batch-size 64 does not give 3 devices equal shares of 2 images or more. Use --batch-"),
        (["--devices", "5", "--batch-size", "10"], "--devices 5: more than the 4 images to measure on."),
        (["--epochs", "0"], "--epochs must be 1 or more, got 0."),
        (["--backbone", "resnet81"], "--backbone: timm has no model 'resnet81'. Did you mean resnet"),
    ],
)
def test_settings_that_cannot_be(refused, options, line):
    assert f"visattn: {line}" in refused(*options)


def test_several_devices_and_one_of_them():
    with pytest.raises(
        UserError, match=r"--device cuda:1 is one device, --devices 2 are several\. Use --device cuda\."
    ):
        train(TrainSettings(Settings(device="cuda:1"), devices=2))


def test_more_devices_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--devices 2: torch finds 1 CUDA devices"):
        train(TrainSettings(Settings(device="cuda"), devices=2))


def test_two_trainings_do_not_write_to_one_folder(tmp_path, pictures):
    with (
        alone(tmp_path / "out", "visattn train"),
        pytest.raises(UserError, match=f"process {os.getpid()}\\) is writing"),
    ):
        train(settings(pictures, tmp_path / "out"))


def test_a_folder_of_something_else(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    line = refused("--resume")
    assert "out: not empty and no folder of visattn train. Use another --out." in line
    assert "thesis.tex: a file. Give a folder." in refused(out=tmp_path / "out" / "thesis.tex")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "is not readable as a record of visattn train. Use another --out."),
        ("[]", "is not readable as a record of visattn train. Use another --out."),
        ('{"format": 9, "identity": {}, "notes": []}', "was written by another version of visattn train. Use another"),
    ],
)
def test_a_record_that_is_none(refused, tmp_path, content, line):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.json").write_text(content)
    (tmp_path / "out" / ".lock").touch()  # the one thing that is written
    assert f"train.json {line}" in refused("--resume")


def test_a_mechanism_that_does_not_fit(refused):
    line = refused("--mechanism", "epsa", "--at", "stages.0")
    assert "visattn: --mechanism pyramid_squeeze does not fit stages.0: PyramidSqueezeAttention: " in line


def test_ctrl_c_says_how_to_go_on(pictures, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(visattn.train, "run_trial", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--out", str(tmp_path / "my out"), "--data", str(pictures), *OPTIONS])
    assert stop.value.code == 130
    line = capsys.readouterr().err
    assert "Stopped. To continue after the last whole epoch: visattn train --task classification" in line
    assert line.endswith(f"--out '{tmp_path / 'my out'}' --resume\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory on cpu. Use a smaller --batch-size."),
        (TrainingError("the loss is not finite in epoch 2"), "in epoch 2. Use a smaller --lr, or --precision float32."),
    ],
)
def test_a_training_that_comes_to_no_end(pictures, tmp_path, monkeypatch, error, line):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(visattn.train, "run_trial", fail)
    with pytest.raises(UserError, match=line):
        train(settings(pictures, tmp_path / "out"))


@pytest.mark.parametrize("damage", ["network", "row", "history", "no rows"])
def test_a_checkpoint_of_something_else(trained, pictures, tmp_path, damage):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    kept = torch.load(out / "last.ckpt")
    if damage == "network":
        kept["state_dict"].popitem()
    else:
        kept["history"] = {"row": [{"a": 1}], "history": 5, "no rows": []}[damage]
    torch.save(kept, out / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt is no checkpoint of this training\. Remove it to start"):
        train(settings(pictures, out, resume=True))


def test_a_record_with_settings_of_another_form(trained, pictures, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    record = json.loads((out / "train.json").read_text())
    (out / "train.json").write_text(json.dumps({**record, "settings": [1]}))
    with pytest.raises(UserError, match=r"train\.json is not readable as a record of visattn train"):
        train(settings(pictures, out, resume=True))
