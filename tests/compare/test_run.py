import io
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from visattn import profile
from visattn.cli import main
from visattn.compare import Settings, compare, run, trials
from visattn.compare.arms import Control, build_backbone, choose_places, control_width
from visattn.compare.folder import RunFolder
from visattn.compare.plan import make_plan
from visattn.compare.progress import Progress, duration


@pytest.fixture(autouse=True)
def quick_clock(monkeypatch):
    monkeypatch.setattr(profile, "SECONDS", 0.0)
    monkeypatch.setattr(profile, "LEAST", 2)


@pytest.fixture
def settings(tmp_path, pictures):
    return Settings(
        data=str(pictures),
        mechanisms=("dual",),
        epochs=1,
        seeds=1,
        batch_size=8,
        device="cpu",
        out=tmp_path / "out",
    )


def read(path):
    return json.loads(path.read_text())


def test_a_run_leaves_what_the_report_needs(settings, capsys):
    report = compare(settings)
    out = settings.out
    assert report == out / "report.html"
    written = read(out / "run.json")
    assert written["format"] == 2
    assert [arm["name"] for arm in written["arms"]] == ["plain", "dual", "control"]
    assert written["places"] == [{"name": "stages.1", "shape": [64, 8, 8], "layout": "map"}]
    assert written["dataset"]["classes"] == ["left", "right"]
    assert "--at stages.1" in written["command"]
    assert written["versions"]["torch"] == torch.__version__
    assert written["hardware"]["threads"] == 1

    result = read(out / "trials" / "dual-seed0" / "result.json")
    assert result["step0_difference"] == 0
    assert result["score"] == result["epochs"][-1]["val_score"]
    assert list(result["gates"]) == ["stages.1"]
    assert (out / "trials" / "dual-seed0" / "epochs.csv").read_text().startswith("epoch,train_loss,train_score,")
    weights = load_file(out / "trials" / "dual-seed0" / "weights.safetensors")
    assert weights["stages.1.gate"].item() == result["gates"]["stages.1"]
    with np.load(out / "trials" / "dual-seed0" / "examples.npz") as examples:
        assert examples["images"].shape == (4, 64, 64, 3)
        assert examples["stages.1|position"].shape == (4, 8, 8)
        assert examples["stages.1|channel"].shape == (4, 64, 64)
        assert np.allclose(examples["stages.1|position"].sum(axis=(1, 2)), 1)
    with np.load(out / "trials" / "plain-seed0" / "examples.npz") as examples:
        assert sorted(examples) == ["images", "labels", "predictions", "query"]

    plain, control = (read(out / "costs" / f"{arm}.json") for arm in ("plain", "control"))
    assert plain["added_parameters"] == 0
    assert plain["flops"] < control["flops"]
    assert set(plain["latency_ms"]) == {"1", "32"}
    assert plain["peak_memory_mib"] > 0
    said = capsys.readouterr()
    assert "3 arms before training: max|output difference| = 0" in said.err
    assert "3 trials at step 0: max|output difference| = 0" in said.err
    assert said.err.count("\n") == 5  # and one line for each epoch
    assert said.out == ""


def test_a_failed_arm_is_on_record_the_rest_go_on_and_it_is_tried_again(settings, capsys, monkeypatch):
    def attended(plan, arm, net):
        if arm.name == "dual":
            raise MemoryError("no room\nat all")
        return {"images": np.zeros((1, 4, 4), np.uint8), "labels": np.zeros(1), "predictions": np.zeros(1)}

    with monkeypatch.context() as patch:
        patch.setattr(trials, "attended", attended)
        patch.setattr("visattn.compare.report.write_report", lambda path: path / "report.html")
        compare(settings)
    failure = settings.out / "failures" / "dual-seed0.json"
    assert read(failure)["reason"] == "MemoryError: no room at all"
    assert sorted(p.name for p in (settings.out / "trials").iterdir()) == ["control-seed0", "plain-seed0"]
    said = capsys.readouterr().err
    assert "dual seed 0 failed: MemoryError: no room at all" in said
    assert "1 of 3 trials failed; the report says why." in said

    with monkeypatch.context() as patch:
        patch.setattr("visattn.compare.report.write_report", lambda path: path / "report.html")
        compare(settings)
    assert not failure.exists()
    assert (settings.out / "trials" / "dual-seed0").is_dir()
    assert "Continuing: 2 of 3 trials are finished." in capsys.readouterr().err


def test_an_arm_that_does_not_fit_is_refused_with_its_reason(pictures):
    plan = make_plan(Settings(data=str(pictures), at=("stages.0",), mechanisms=("external", "pyramid_squeeze")))
    assert list(plan.refused) == ["pyramid_squeeze"]
    assert "PyramidSqueezeAttention: " in plan.refused["pyramid_squeeze"]


def test_an_arm_that_is_another_function_at_step_0_is_not_trained(settings, monkeypatch):
    monkeypatch.setattr(trials, "step0_difference", lambda plan, net, seed: 0.5)
    plan = make_plan(settings)
    folder = RunFolder(plan)
    with pytest.raises(trials.TrainingError, match=r"at step 0 its output differs from the plain backbone's by 0\.5"):
        trials.run_trial(plan, folder, plan.arms[1], 0, Progress(1, [("dual", 0)]))


def test_the_difference_at_step_0_is_measured(settings):
    plan = make_plan(settings)
    net, _ = plan.build(plan.arms[1], 0)
    assert trials.step0_difference(plan, net, 0) == 0
    with torch.no_grad():
        net.get_submodule("stages.1").gate.fill_(0.5)
    assert trials.step0_difference(plan, net, 0) > 0


def test_ctrl_c_says_how_to_continue(settings, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_trial", interrupt)
    arguments = ["--epochs", "1", "--seeds", "1", "--batch-size", "8", "--device", "cpu", "--mechanisms", "dual"]
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--data", settings.data, "--out", str(settings.out), *arguments])
    assert stop.value.code == 130
    assert (
        "Stopped: 0 of 3 trials are finished. To continue: visattn compare --task classification --data"
        in capsys.readouterr().err
    )


def test_plan_prints_the_grid_and_writes_nothing(settings, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--data", settings.data, "--out", str(settings.out), "--device", "cpu", "--plan"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "7 arms x 3 seeds x 20 epochs on cpu, float32, batches of 64" in said
    assert "Nothing was trained or written." in said
    assert list(tmp_path.iterdir()) == []


def test_arms_of_one_seed_share_the_backbone_bit_for_bit(settings):
    plan = make_plan(settings)
    plain, dual, control = (plan.build(arm, 3)[0].state_dict() for arm in plan.arms)
    for name, weight in plain.items():
        for other in (dual, control):
            same = other[name.replace("stages.1.", "stages.1.host.")]
            assert torch.equal(weight, same)
    assert not torch.equal(plain["head.fc.weight"], plan.build(plan.arms[0], 4)[0].state_dict()["head.fc.weight"])


def test_the_control_has_the_size_of_the_largest_arm(pictures):
    plan = make_plan(Settings(data=str(pictures), device="cpu"))
    counts = {a.name: plan.build(a, 0)[1].parameters_added for a in plan.arms if a.kind != "plain"}
    control = counts.pop("control")
    one_more_channel = 10 * 64 + 2
    assert abs(control - max(counts.values())) <= one_more_channel / 2


@pytest.mark.parametrize("hidden", [1, 3, 17])
def test_control_width_inverts_the_parameter_count(hidden):
    assert control_width(5, sum(p.numel() for p in Control(5, hidden).parameters())) == hidden


@pytest.mark.parametrize(
    ("name", "size", "place"),
    [
        ("resnet10t", 64, "layer2"),
        ("resnet10t", 32, "layer1"),
        ("test_convnext", 112, "stages.2"),
        ("test_vit", 160, "blocks.5"),
    ],
)
def test_the_default_place_is_the_deepest_map_of_seven_by_seven(name, size, place):
    net = build_backbone(name, classes=3, channels=1, image_size=(size, size), seed=0)
    assert choose_places(net, torch.zeros(1, 1, size, size), ()) == (place,)


def test_progress_on_a_terminal_is_one_line():
    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = Progress(2, [("plain", 0), ("dual", 0)], "top-1", stream)
    progress.start("plain", 0)
    progress.epoch(1, 0.5, 10.0)
    progress.epoch(2, 0.75, 10.0)
    assert "\n" not in stream.getvalue()
    assert stream.getvalue().endswith("trial 1/2  plain  seed 0  epoch 2/2  top-1 75.0%  20s left")


def test_progress_elsewhere_is_one_line_an_epoch():
    stream = io.StringIO()
    progress = Progress(1, [("plain", 0)], "top-1", stream)
    progress.start("plain", 0)
    progress.batch(1, 1, 5)
    progress.epoch(1, 0.5, 1.0)
    assert stream.getvalue() == "trial 1/1  plain  seed 0  epoch 1/1  top-1 50.0%  0s left\n"


def test_durations_in_words():
    assert [duration(s) for s in (9.6, 200, 7500)] == ["10s", "3m 20s", "2h 05m"]
