"""`visattn compare --task segmentation`: arms, a run, its report, and options that do not apply."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from visattn import models, profile
from visattn.cli import main
from visattn.compare import Settings, compare
from visattn.compare.arms import Widened, widened_width
from visattn.compare.plan import make_plan
from visattn.compare.report import write_report
from visattn.compare.trials import step0_difference
from visattn.errors import UserError


def paint(folder, count=10):
    """Squares on noise, named by their colour; a rim of pixels to be ignored."""
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(count):
        image = rng.integers(0, 60, (48, 48, 3), dtype=np.uint8)
        mask = np.zeros((48, 48), dtype=np.uint8)
        for label in (1, 2):
            top, left = rng.integers(0, 30, 2)
            image[top : top + 14, left : left + 14, label] = 250
            mask[top : top + 14, left : left + 14] = label
        mask[:8] = 255
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    (folder / "classes.txt").write_text("ground\ngreen\nblue\n")
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    return paint(tmp_path_factory.mktemp("data") / "scenes")


def settings_of(scenes, out, **changes):
    given = {"mechanisms": ("dual",), "epochs": 1, "seeds": 2, "batch_size": 4, "device": "cpu"}
    return Settings.of_task("segmentation", data=str(scenes), out=out, **given | changes)


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    """The folder of a finished run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile, "SECONDS", 0.0)
        patch.setattr(profile, "LEAST", 2)
        out = tmp_path_factory.mktemp("run") / "out"
        assert compare(settings_of(scenes, out)) == out / "report.html"
    torch.set_num_threads(threads)
    return out


def read(path):
    return json.loads(path.read_text())


def test_all_arms_are_one_function_before_training(scenes, tmp_path):
    plan = make_plan(settings_of(scenes, tmp_path / "out", mechanisms=Settings.mechanisms))
    assert plan.refused == {}
    assert [arm.title for arm in plan.arms if arm.kind != "mechanism"] == ["Plain head", "Wider plain head"]
    assert [place.name for place in plan.places] == ["head.conv"]
    plain = plan.build(plan.arms[0], 3)[0].state_dict()
    for arm in plan.arms[1:]:
        net, _ = plan.build(arm, 3)
        assert step0_difference(plan, net, 3) == 0
        held = net.state_dict()
        renamed = {"head.": "head.head."} if arm.kind == "control" else {"head.conv.": "head.conv.host."}
        for name, weight in plain.items():
            for before, after in renamed.items():
                name = after + name.removeprefix(before) if name.startswith(before) else name
            assert torch.equal(weight, held[name])


def test_the_wider_head_has_the_size_of_the_largest_mechanism(scenes, tmp_path):
    plan = make_plan(settings_of(scenes, tmp_path / "out", mechanisms=Settings.mechanisms))
    counts = {arm.name: profile.count_parameters(plan.build(arm, 0)[0]) for arm in plan.arms}
    added = {name: count - counts["plain"] for name, count in counts.items()}
    control = added.pop("control")
    one_more_channel = 9 * 256 + 2 + 3
    assert abs(control - max(added.values())) <= one_more_channel / 2 + 1  # and a gate


@pytest.mark.parametrize("hidden", [1, 3, 17])
def test_widened_width_inverts_the_parameter_count(hidden):
    branch = Widened(torch.nn.Identity(), 5, hidden, 3).branch
    assert widened_width(5, 3, sum(p.numel() for p in branch.parameters())) == hidden


def test_the_branch_of_the_wider_head_is_trained():
    net = models.fcn("test_byobnet", num_classes=3, in_chans=1, output_stride=8)
    features = torch.randn(2, 256, 4, 4)
    widened = Widened(net.head.eval(), 256, 5, 3)
    assert torch.equal(widened(features), net.head(features))
    widened(features).square().sum().backward()
    assert widened.branch[-1].weight.grad.any()


def test_a_run_leaves_what_the_report_needs(finished):
    run = read(finished / "run.json")
    assert run["settings"]["task"] == "segmentation"
    assert run["dataset"]["classes"] == ["ground", "green", "blue"]
    assert "--task segmentation" in run["command"]
    assert "--output-stride 4" in run["command"]
    assert "--at" not in run["command"]
    result = read(finished / "trials" / "dual-seed0" / "result.json")
    iou = [value for value in result["details"]["iou"] if value is not None]
    assert result["score"] == pytest.approx(sum(iou) / len(iou))
    assert 0 <= result["details"]["pixel_accuracy"] <= 1
    assert result["step0_difference"] == 0
    with np.load(finished / "trials" / "dual-seed0" / "examples.npz") as examples:
        assert examples["labels"].shape == examples["predictions"].shape == (2, 64, 64)
        assert set(np.unique(examples["labels"])) == {0, 1, 2, 255}
        assert examples["head.conv|position"].shape == (2, 16, 16)


def test_the_report_speaks_of_miou_and_shows_masks(finished):
    html, markdown = (finished / "report.html").read_text(), (finished / "report.md").read_text()
    for text in (html, markdown):
        assert "mIoU" in text
        assert "Pixel accuracy" in text
        assert "IoU by class" in text
        assert not re.search(r"top-1|Top-1|control block", text)
    assert "| green |" in markdown
    for arm in ("Plain head", "Dual attention", "Wider plain head"):
        assert f'aria-label="Mask by {arm}, image 2' in html
    assert 'aria-label="True mask, image 1' in html
    assert "with ground, green, blue, ignored" in html
    assert html.count("<svg") == html.count("</svg>")


def test_the_table_holds_pixel_accuracy_and_the_iou_of_each_class(finished):
    lines = (finished / "results.csv").read_text().splitlines()
    plain = dict(zip(lines[0].split(","), lines[1].split(",")))
    results = [read(finished / "trials" / f"plain-seed{seed}" / "result.json") for seed in (0, 1)]
    assert float(plain["miou_percent_mean"]) == pytest.approx(50 * sum(r["score"] for r in results), rel=1e-4)
    accuracy = 50 * sum(r["details"]["pixel_accuracy"] for r in results)
    assert float(plain["pixel_accuracy_percent_mean"]) == pytest.approx(accuracy, rel=1e-4)
    ground = 50 * sum(r["details"]["iou"][0] for r in results)
    assert float(plain["iou_percent_mean_ground"]) == pytest.approx(ground, rel=1e-4)


def test_the_same_folder_gives_the_same_report(finished):
    before = (finished / "report.html").read_bytes()
    write_report(finished)
    assert (finished / "report.html").read_bytes() == before


def test_masks_of_another_size_than_their_images_are_refused(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    path = copy / "trials" / "dual-seed0" / "examples.npz"
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files}
    np.savez(path, **{**arrays, "predictions": arrays["predictions"][:, :5]})
    with pytest.raises(UserError, match=r"labels, predictions and query must have shapes \(2, 64, 64\), \(2, 64, 64\)"):
        write_report(copy)


def test_a_head_that_wins_by_size_alone_is_said(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    for arm, scores in (("plain", (0.5, 0.6)), ("control", (0.58, 0.681)), ("dual", (0.58, 0.681))):
        for seed, score in enumerate(scores):
            path = copy / "trials" / f"{arm}-seed{seed}" / "result.json"
            path.write_text(json.dumps({**read(path), "score": score}))
    html = write_report(copy).read_text()
    assert "None of these could be shown to be better than the control head, so more capacity alone may" in html


def test_a_run_is_continued(scenes, finished, capsys, tmp_path):
    written = (finished / "trials" / "plain-seed0" / "result.json").stat().st_mtime_ns
    removed = finished / "trials" / "control-seed1"
    expected = read(removed / "result.json")
    removed.rename(tmp_path / "moved")
    compare(settings_of(scenes, finished))
    assert "Continuing: 5 of 6 trials are finished." in capsys.readouterr().err
    again = read(removed / "result.json")
    assert (again["score"], again["details"]) == (expected["score"], expected["details"])
    assert (finished / "trials" / "plain-seed0" / "result.json").stat().st_mtime_ns == written


def refused(capsys, *options):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--device", "cpu", *options])
    said = capsys.readouterr()
    assert (stop.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    return said.err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--task", "detection"], "--task must be one of classification, segmentation, got 'detection'."),
        (
            ["--task", "segmentation", "--at", "layer4"],
            "--at does not apply to --task segmentation: blocks go before the classifier of the head.",
        ),
        (["--output-stride", "8"], "--output-stride does not apply to --task classification. Leave it out."),
        (["--task", "segmentation", "--output-stride", "6"], "--output-stride must be a power of 2 such as 4, 8 or 16"),
        (["--task", "segmentation", "--output-stride", "0"], "--output-stride must be a power of 2 such as 4, 8 or 16"),
        (["--task", "segmentation", "--epochs", "0"], "--epochs must be 1 or more, got 0."),
        (
            ["--task", "segmentation", "--output-stride", "1"],
            "--backbone test_byobnet carries no segmentation head: fcn: backbone 'test_byobnet' has features of strides",
        ),
    ],
)
def test_options_that_cannot_be(capsys, tmp_path, options, line):
    assert line in refused(capsys, "--out", str(tmp_path / "out"), *options)
    assert not (tmp_path / "out").exists()


def test_a_bad_mask_is_one_line(capsys, tmp_path):
    data = paint(tmp_path / "data", count=4)
    (data / "masks" / "2.png").unlink()
    line = refused(capsys, "--task", "segmentation", "--data", str(data), "--out", str(tmp_path / "out"))
    assert f"image {data / 'images' / '2.png'} has no mask." in line


def test_plan_knows_the_defaults_of_the_task(capsys, tmp_path, scenes, monkeypatch):
    monkeypatch.setattr(profile, "SECONDS", 0.0)
    monkeypatch.setattr(profile, "LEAST", 2)
    arguments = ["compare", "--task", "segmentation", "--mechanisms", "dual", "--data", str(scenes), "--plan"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--device", "cpu", "--out", str(tmp_path / "out")])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "3 arms x 2 seeds x 3 epochs on cpu, float32, batches of 8" in said
    assert "--task segmentation" in said
