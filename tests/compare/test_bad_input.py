"""Every kind of bad input: one clear line on stderr, exit code 2, nothing written."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from visattn.cli import main
from visattn.compare import Settings
from visattn.compare.folder import RunFolder
from visattn.compare.plan import make_plan
from visattn.errors import UserError
from visattn.writing import write_json


@pytest.fixture
def refused(tmp_path, capsys, pictures, monkeypatch):
    """Run the command with some options; returns its line."""

    def run(*options, out=tmp_path / "out", data=pictures):
        monkeypatch.setattr(RunFolder, "opened", lambda folder: pytest.fail("the input was taken"))
        before = sorted(tmp_path.rglob("*"))
        arguments = ["compare", "--out", str(out), "--data", str(data), "--device", "cpu", *options]
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        printed = capsys.readouterr()
        assert stop.value.code == 2
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert printed.err.startswith("visattn: ")
        assert sorted(tmp_path.rglob("*")) == before
        return printed.err

    return run


def test_no_such_path(refused, tmp_path):
    line = refused(data=tmp_path / "nowhere")
    assert "nowhere: no such path. Give a folder, 'cluttered-digits', or a name of timm.data such as" in line


def test_no_images(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no images in class folders. Expected" in refused(data=tmp_path / "empty")


def test_one_class_only(refused, tmp_path, paint_folder):
    data = paint_folder(tmp_path / "one", classes=("left",))
    assert "one class only, 'left'. Give a folder for each of two or more." in refused(data=data)


def test_an_unreadable_image(refused, tmp_path, paint_folder):
    data = paint_folder(tmp_path / "data")
    (data / "left" / "4.png").write_bytes(b"nothing")
    line = refused(data=data)
    assert f"unreadable image {data / 'left' / '4.png'}: not an image." in line
    assert "add --skip-unreadable to go on without" in line


def test_unreadable_images_are_skipped_and_counted(tmp_path, paint_folder):
    data = paint_folder(tmp_path / "data")
    (data / "left" / "4.png").write_bytes(b"nothing")
    plan = make_plan(Settings(data=str(data), mechanisms=("dual",), skip_unreadable=True, device="cpu"))
    assert plan.record()["dataset"]["unreadable"] == 1


def test_classes_of_val_that_train_lacks(refused, tmp_path, paint_folder):
    paint_folder(tmp_path / "data" / "train")
    data = paint_folder(tmp_path / "data" / "val", classes=("left", "right", "top")).parent
    assert "val/ has classes that train/ lacks: top." in refused(data=data)


def test_unknown_mechanism(refused):
    assert "unknown block 'duel'. Did you mean dual" in refused("--mechanisms", "external,duel")


def test_a_part_is_no_mechanism(refused):
    assert "dual_head is no block for feature maps. Known: external, multihead," in refused("--mechanisms", "dual_head")


def test_no_mechanism(refused):
    assert "--mechanisms is empty. Known: external," in refused("--mechanisms", ",")


def test_unknown_backbone(refused):
    assert "timm has no model 'resnet81'. Did you mean resnet" in refused("--backbone", "resnet81")


def test_a_backbone_that_does_not_take_the_images(refused):
    line = refused("--backbone", "dla46_c", data="cluttered-digits")
    assert "--backbone dla46_c does not take 60x60 images with 1 channel: The size of tensor" in line


def test_at_that_matches_nothing(refused):
    line = refused("--at", "layer9")
    assert "--at: at='layer9' matches no place. Places: stem (24, 32, 32)," in line
    assert "stages.1 (64, 8, 8)" in line


def test_no_mechanism_fits(refused):
    line = refused("--at", "stages.0", "--mechanisms", "pyramid_squeeze")
    assert "--at: no mechanism fits stages.0. pyramid_squeeze: PyramidSqueezeAttention: " in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "--epochs must be 1 or more, got 0."),
        (["--seeds", "-1"], "--seeds must be 1 or more, got -1."),
        (["--batch-size", "1"], "--batch-size must be 2 or more, got 1: BatchNorm needs two images."),
        (["--lr", "0"], "--lr must be above 0 and at most 10, got 0."),
        (["--lr", "nan"], "--lr must be above 0 and at most 10, got nan."),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:<index>, got 'tpu'."),
        (["--device", "cuda:99"], "--device cuda:99: torch finds"),
        (["--precision", "int8"], "--precision must be one of float32, bfloat16, float16, got 'int8'."),
        (["--precision", "float16"], "--precision float16 needs a CUDA device."),
    ],
)
def test_numbers_and_names_out_of_range(refused, options, message):
    assert message in refused(*options)


def test_out_is_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "file: a file. Give a folder." in refused(out=tmp_path / "file")


def test_out_is_no_run_folder(refused, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    line = refused(out=tmp_path / "full")
    assert "full: not empty and no run folder of visattn compare. Use another --out." in line


def test_out_has_a_broken_run_file(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{")
    assert "its run.json is not readable as JSON" in refused()
    (tmp_path / "out" / "run.json").write_text('{"format": 99}')
    assert "written by another version of visattn compare" in refused()


@pytest.fixture
def started(tmp_path, pictures):
    """The folder of a run with one finished trial, that of the plain arm, written without training it."""
    settings = Settings(
        data=str(pictures), mechanisms=("dual",), epochs=1, seeds=1, batch_size=8, device="cpu", out=tmp_path / "out"
    )
    plan = make_plan(settings)
    folder = RunFolder(plan)
    marks = {"run": plan.fingerprint(), "arm": "plain", "seed": 0}
    with folder.opened(), folder.new_trial("plain", 0) as path:
        weights = plan.build(plan.arms[0], 0)[0].state_dict()
        save_file(weights, path / "weights.safetensors", {key: str(value) for key, value in marks.items()})
        write_json(path / "result.json", {**marks, "score": 0.5, "epochs": [{}]})
    RunFolder(plan)  # as it is, it is taken
    return path.with_name("plain-seed0")


SAME = ("--mechanisms", "dual", "--epochs", "1", "--seeds", "1", "--batch-size", "8")


def test_out_of_another_run_names_what_changed(refused, started):
    options = ("--mechanisms", "dual,external", "--epochs", "3", "--seeds", "1", "--batch-size", "8", "--lr", "0.1")
    line = refused(*options)
    assert "out holds another run: mechanisms was dual, now dual,external; epochs was 1, now 3; " in line
    assert "; lr was 0.004, now 0.1. " in line
    assert "Repeat its settings to continue it, or use another --out." in line


def test_out_of_a_run_on_other_images(refused, started, tmp_path, pictures):
    shutil.copytree(pictures, tmp_path / "data")
    run = json.loads((started.parents[1] / "run.json").read_text())
    run["identity"]["dataset"]["train"] = 99
    (started.parents[1] / "run.json").write_text(json.dumps(run))
    assert "dataset was {'train': 99, 'val': 4}, now {'train': 16, 'val': 4}" in refused(*SAME)


def test_a_trial_of_another_run(refused, started):
    started.rename(started.with_name("dual-seed7"))
    assert "trials/dual-seed7 is no trial of this run. Remove it or use another --out." in refused(*SAME)


def test_a_trial_folder_copied_from_another_arm(refused, started):
    started.rename(started.with_name("dual-seed0"))
    line = refused(*SAME)
    assert "dual-seed0/result.json is not a checkpoint of this run: it has arm plain instead of dual." in line


def test_a_pickle_with_the_name_of_a_checkpoint(refused, started, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (started / "weights.safetensors").write_bytes(pickle.dumps(Bomb()))
    line = refused(*SAME)
    assert "weights.safetensors is not a checkpoint of this run: it is no whole safetensors file" in line
    assert f"Remove {started} to train it again." in line


def test_a_torch_checkpoint_with_the_name_of_ours(refused, started):
    torch.save({"weight": torch.zeros(3)}, started / "weights.safetensors")
    assert "is no whole safetensors file" in refused(*SAME)


def test_a_checkpoint_cut_short(refused, started):
    path = started / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "is no whole safetensors file" in refused(*SAME)


def test_a_checkpoint_of_another_network(refused, started):
    path = started / "weights.safetensors"
    marks = {"run": json.loads((started / "result.json").read_text())["run"], "arm": "plain", "seed": "0"}
    save_file({"weight": torch.zeros(3)}, path, marks)
    assert "it does not have the weights of this arm." in refused(*SAME)


def test_a_checkpoint_from_somewhere_else(refused, started):
    path = started / "weights.safetensors"
    save_file(load_file(path), path)
    assert "weights.safetensors is not a checkpoint of this run: it has run None instead of" in refused(*SAME)


@pytest.mark.parametrize("name", ["result.json", "weights.safetensors"])
def test_a_trial_with_a_file_missing(refused, started, name):
    (started / name).unlink()
    assert f"{name} is not a checkpoint of this run: it is missing." in refused(*SAME)


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(UserError, match="no such path"):
        main(["compare", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"), "--debug"])
