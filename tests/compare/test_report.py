from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.transforms import Bbox

from visattn.compare.figures import _free_spot
from visattn.compare.report import write_report
from visattn.errors import UserError

# Top-1 by arm and seed. Differences to plain in points: dual 1.7, 1.8, 1.9; external -1, -2, -3.
TOP1 = {
    "plain": (0.800, 0.810, 0.820),
    "dual": (0.817, 0.828, 0.839),
    "external": (0.790, 0.790, 0.790),
    "multihead": (0.804, 0.804, 0.825),
    "control": (0.812, 0.828, 0.833),
}
DUAL = (
    "better than plain by 1.8 points, 95% CI 1.6 to 2.0, 3 paired seeds, but not distinguishable from the control "
    "block of the same size (difference +0.4 points, 95% CI -0.4 to 1.2, 3 paired seeds)"
)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def build(folder, top1=TOP1, seeds=(0, 1, 2), classes=("zero", "one"), title="{}", name="tiny-images", examples=True):
    """A small run folder; an accuracy of None leaves the trial out."""
    kinds = {"plain": "plain", "control": "control"}
    run = {
        "format": 2,
        "command": "visattn compare --data tiny-images --out out",
        "settings": {
            "task": "classification",
            "data": name,
            "backbone": "resnet10t",
            "epochs": 2,
            "seeds": list(seeds),
            "lr": 0.001,
        },
        "versions": {"visattn": "0.1.0", "torch": "2.6.0"},
        "hardware": {"device": "a processor", "cores": 2},
        "dataset": {"name": name, "classes": list(classes), "train": 40, "val": 10, "image_size": [12, 10]},
        "places": [{"name": "layer2", "shape": [8, 5, 3], "layout": "map"}],
        "arms": [{"name": arm, "kind": kinds.get(arm, "mechanism"), "title": title.format(arm)} for arm in top1],
        "notes": ["largest difference at step 0: 0.0"],
    }
    write_json(folder / "run.json", run)
    added = {"plain": 0, "dual": 1000, "external": 400, "multihead": 950}
    for turn, (arm, values) in enumerate(top1.items()):
        latency = {"1": {"p50": 2.0 + turn, "p90": 2.5 + turn}, "32": {"p50": 40.0 + turn, "p90": 50.0}}
        cost = {"parameters": 10000 + added.get(arm, 1000), "added_parameters": added.get(arm, 1000), "flops": 2.5e6}
        write_json(
            folder / "costs" / f"{arm}.json", {"arm": arm, **cost, "latency_ms": latency, "peak_memory_mib": 100}
        )
        for seed, value in zip(seeds, values, strict=False):
            if value is None:
                continue
            trial = folder / "trials" / f"{arm}-seed{seed}"
            epochs = [{"epoch": 1, "val_score": value / 2}, {"epoch": 2, "val_score": value}]
            gates = {} if arm == "plain" else {"layer2": 0.1 + seed / 100}
            write_json(
                trial / "result.json",
                {"arm": arm, "seed": seed, "score": value, "seconds": 60, "epochs": epochs, "gates": gates},
            )
            if examples and seed == seeds[0]:
                save_examples(trial / "examples.npz", arm)
    return folder


def save_examples(path, arm, **changes):
    generator = np.random.default_rng(7)
    maps = {
        "dual": {
            "layer2|position": generator.random((3, 5, 4)),
            "layer2|channel": generator.random((3, 8, 8)),
            "layer3|channel": generator.random((3, 90)),
        },
        "external": {"layer2|slot": np.full((3, 5, 4), 0.25)},
        "multihead": {"layer2|branch": np.full((3, 2), 0.5)},
    }
    arrays = {
        "images": generator.integers(0, 255, (3, 12, 10), dtype=np.uint8),
        "labels": np.array([0, 1, 0]),
        "predictions": np.array([0, 1, 1]),
        "query": np.array([0.5, 0.5]),
        **maps.get(arm, {}),
    }
    np.savez(path, **{key: value for key, value in {**arrays, **changes}.items() if value is not None})


def lines(path):
    with path.open(newline="") as file:
        return {line["arm"]: line for line in csv.DictReader(file)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = build(tmp_path_factory.mktemp("run"))
    assert write_report(folder) == folder / "report.html"
    return folder


def test_csv_holds_the_numbers(finished):
    table = lines(finished / "results.csv")
    assert list(table) == list(TOP1)
    dual = table["dual"]
    half = 4.30265 * 0.1 / 3**0.5
    assert float(dual["points_over_plain_mean"]) == pytest.approx(1.8, abs=1e-5)
    assert float(dual["points_over_plain_low"]) == pytest.approx(1.8 - half, abs=1e-4)
    assert float(dual["points_over_plain_high"]) == pytest.approx(1.8 + half, abs=1e-4)
    assert float(dual["top1_percent_mean"]) == pytest.approx(82.8)
    assert [dual[f"top1_percent_seed{seed}"] for seed in range(3)] == ["81.7", "82.8", "83.9"]
    assert (dual["parameters"], dual["flops_per_image"], dual["seeds_finished"]) == ("11000", "2500000", "3")
    assert (dual["latency_ms_batch1_p50"], dual["latency_ms_batch32_p90"]) == ("3", "50")
    assert dual["verdict"] == DUAL
    assert table["plain"]["points_over_plain_mean"] == ""


def test_verdicts_in_every_file(finished):
    html, markdown = (finished / "report.html").read_text(), (finished / "report.md").read_text()
    assert f"- **dual**: {DUAL}" in markdown
    assert f"B{DUAL[1:]}." in html
    for text in (html, markdown):
        # -1, -2 and -3 points: mean -2, half width 4.30 / sqrt(3) = 2.48.
        assert "ot distinguishable from plain (difference -2.0 points, 95% CI -4.5 to 0.5, 3 paired seeds)" in text
        assert "Better than the plain network here: dual (+1.8 points)." in text
        assert "None of these could be shown to be better than the control block" in text
        assert "one multiply-add counted as 2" in text
        assert "visattn compare --data tiny-images --out out" in text
        assert "One of the 10 images is 10 points." in text
        assert "7 intervals at 95% each, without correction" in text


def test_control_of_another_size_is_called_so(finished):
    assert lines(finished / "results.csv")["external"]["verdict"] == (
        "not distinguishable from plain (difference -2.0 points, 95% CI -4.5 to 0.5, 3 paired seeds), but worse than "
        "the larger control block by 3.4 points, 95% CI 0.7 to 6.2, 3 paired seeds"
    )


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags = set()
        self.resources = []
        self.unnamed = 0

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        attributes = dict(attributes)
        self.resources += [attributes[key] for key in ("src", "href", "xlink:href", "srcset") if key in attributes]
        self.unnamed += tag == "svg" and not (attributes.get("aria-label") or attributes.get("aria-hidden"))


def test_html_needs_nothing_from_outside(finished):
    html = (finished / "report.html").read_text()
    page = Tags()
    page.feed(html)
    assert page.resources
    assert all(resource.startswith(("data:image/png;base64,", "#")) for resource in page.resources)
    assert not page.tags & {"script", "link", "iframe", "img", "object"}
    assert not re.search(r"@import|url\((?!#)", html)
    assert page.unnamed == 0  # every drawing says what it shows
    assert len(html) < 500_000


def test_the_same_folder_gives_the_same_files(finished):
    names = ("results.csv", "report.md", "report.html")
    before = [(finished / name).read_bytes() for name in names]
    write_report(finished)
    assert [(finished / name).read_bytes() for name in names] == before
    assert not list(finished.glob(".*"))


def test_failed_and_missing_trials_stay_with_their_reason(tmp_path):
    folder = build(tmp_path, {**TOP1, "dual": (None, 0.828, 0.839), "external": (None, None, None)})
    write_json(folder / "failures" / "dual-seed0.json", {"arm": "dual", "seed": 0, "reason": "out of\nmemory"})
    write_report(folder)
    table = lines(folder / "results.csv")
    assert table["dual"]["problems"] == "seed 0 failed: out of memory"
    assert "2 paired seeds of 3 planned" in table["dual"]["verdict"]
    assert table["external"]["problems"] == "seeds 0, 1 and 2 not finished"
    assert table["external"]["verdict"].startswith("no verdict against plain (no seed finished in both)")
    html = (folder / "report.html").read_text()
    assert "seed 0 failed: out of memory" in html
    assert "11 of 15 trials finished" in html
    assert "dual: seed 0 failed: out of memory" in (folder / "report.md").read_text()


def test_one_seed_gives_no_answer(tmp_path):
    folder = build(tmp_path, seeds=(4,), examples=False)
    html = write_report(folder).read_text()
    assert "No answer yet: one paired seed gives no interval" in html
    assert "The best mechanism was dual (+1.7 points); another seed may reverse it." in html
    assert "better than plain by" not in html
    assert lines(folder / "results.csv")["dual"]["points_over_plain_low"] == ""


def test_capacity_that_helps_without_attention_is_said(tmp_path):
    top1 = {"plain": TOP1["plain"], "external": TOP1["external"], "control": TOP1["dual"]}
    html = write_report(build(tmp_path, top1)).read_text()
    assert "The control block was better: control (+1.8 points), so capacity alone helps here." in html


def test_accuracy_that_is_no_number_is_left_out_and_said(tmp_path):
    folder = build(tmp_path, {**TOP1, "dual": (0.817, float("nan"), 0.839)})
    write_report(folder)
    line = lines(folder / "results.csv")["dual"]
    assert line["problems"] == "seed 1: its top-1 is not a number and is left out"
    assert line["seeds_finished"] == "2"
    assert line["top1_percent_seed1"] == ""


def test_plain_without_a_trial_is_no_answer(tmp_path):
    folder = build(tmp_path, {"plain": (None, None, None), "dual": (0.8, 0.8, 0.8)}, examples=False)
    assert "No answer: the plain network has no finished trial" in write_report(folder).read_text()


def test_costs_may_be_missing_or_failed(tmp_path):
    folder = build(tmp_path)
    (folder / "costs" / "plain.json").unlink()
    write_json(folder / "costs" / "dual.json", {"arm": "dual", "failed": "no memory"})
    write_report(folder)
    table = lines(folder / "results.csv")
    assert table["plain"]["problems"] == "costs not measured"
    assert table["dual"]["problems"] == "costs could not be measured: no memory"
    assert table["dual"]["verdict"].count("the control block (") == 1


def test_text_from_outside_is_shown_and_never_run(tmp_path):
    evil = '<script>alert("x")</script> & | *b* `c` $x_1$'
    folder = build(
        tmp_path, {**TOP1, "dual": (0.817, 0.828, None)}, classes=(evil, evil), title="{} " + evil, name=evil
    )
    write_json(folder / "failures" / "dual-seed2.json", {"arm": "dual", "seed": 2, "reason": evil})
    page = Tags()
    page.feed(write_report(folder).read_text())
    assert "script" not in page.tags
    markdown = (folder / "report.md").read_text()
    assert "\\<script\\>" in markdown
    table = next(line for line in markdown.splitlines() if line.startswith("| dual"))
    assert len(re.findall(r"(?<!\\)\|", table)) == 12  # eleven columns, whatever the name


def test_one_epoch_and_two_arms_are_enough(tmp_path):
    folder = build(tmp_path, {"plain": (0.8,), "dual": (0.8,)}, seeds=(0,), examples=False)
    for path in folder.glob("trials/*/result.json"):
        result = json.loads(path.read_text())
        write_json(path, {**result, "epochs": [{"epoch": 1, "val_score": None}], "gates": {}})
    html = write_report(folder).read_text()
    assert "Learning curves" not in html
    assert "How far each gate opened" not in html
    assert "What each arm attended to" not in html


@pytest.mark.parametrize(
    ("path", "content", "rule"),
    [
        ("run.json", "{", "it cannot be read"),
        ("run.json", '{"format": 1}', "must have format 2, got format=1"),
        ("run.json", '{"format": 2, "settings": {"seeds": []}}', "settings.seeds must be a list of whole numbers"),
        ("run.json", '{"format": 2, "settings": {"seeds": [0]}}', "settings.task must be one of classification, segm"),
        ("trials/dual-seed1/result.json", '{"epochs": [], "details": 1}', "`details` must be a dict, got 1"),
        ("costs/dual.json", "[]", "it must hold a JSON object, got list"),
        ("costs/dual.json", '{"flops": "many"}', "`flops` must be a number, got 'many'"),
        ("trials/dual-seed1/result.json", "", "it cannot be read"),
        ("trials/dual-seed1/result.json", '{"score": 0.5}', "`epochs` must be a list, got None"),
        ("trials/dual-seed0/examples.npz", "not an archive", "it cannot be read"),
        ("failures/dual-seed2.json", "{}", "`reason` must be a str, got None"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_one_line(tmp_path, path, content, rule):
    folder = build(tmp_path, {**TOP1, "dual": (0.817, 0.828, None)})
    (folder / "failures").mkdir()
    (folder / path).write_text(content)
    with pytest.raises(UserError) as caught:
        write_report(folder)
    message = str(caught.value)
    assert str(folder / path) in message
    assert rule in message
    assert "\n" not in message
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"labels": None}, "it has no array 'labels'"),
        ({"labels": np.array([0])}, "labels, predictions and query must have shapes"),
        ({"images": np.zeros((3, 4, 4))}, "images must be uint8"),
        ({"layer2|position": np.zeros((3, 4))}, "array 'layer2|position' must be <place>|<kind> with 3 maps"),
        ({"labels": np.array([{}, {}, {}], dtype=object)}, "it cannot be read"),  # nothing is unpickled
    ],
)
def test_examples_are_checked(tmp_path, changes, rule):
    folder = build(tmp_path)
    path = folder / "trials" / "dual-seed0" / "examples.npz"
    save_examples(path, "dual", **changes)
    with pytest.raises(UserError, match=re.escape(rule)) as caught:
        write_report(folder)
    assert str(path) in str(caught.value)


def test_a_folder_of_another_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a run folder must hold run\.json"):
        write_report(tmp_path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    folder = build(tmp_path, examples=False)
    (folder / "results.csv").write_text("old")

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(UserError, match=r"cannot write .*results\.csv \(No space left on device\)"):
        write_report(folder)
    assert (folder / "results.csv").read_text() == "old"
    assert not list(folder.glob(".*"))


def test_labels_of_crowded_points_do_not_overlap():
    frame = Bbox([[0, 0], [360, 300]])
    points = np.array([(150 + 3 * turn, 120 + 5 * (turn % 4)) for turn in range(14)], float)
    taken = [(x - 7, y - 6, x + 7, y + 6, 1000.0) for x, y in points]
    for turn, point in enumerate(points):
        left, bottom = _free_spot(tuple(point), (80, 24), frame, np.array(taken), np.delete(points, turn, axis=0))
        for x0, y0, x1, y1, _ in taken:
            assert left >= x1 or left + 80 <= x0 or bottom >= y1 or bottom + 24 <= y0
        taken.append((left, bottom, left + 80, bottom + 24, 1000.0))
