"""`visattn predict`: from weights and pictures to classes or masks."""

import csv
import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import visattn.predict
from visattn.cli import main
from visattn.colours import palette
from visattn.compare import Settings, compare
from visattn.compare.arms import list_arms
from visattn.compare.plan import make_plan, open_plan
from visattn.compare.weights import Description, load_network, save_network
from visattn.data import open_data
from visattn.errors import UserError
from visattn.predict import _labels, _names, find_images, predict
from visattn.tasks import CLASSIFICATION


def settings(data, **options):
    return Settings(**{"data": str(data), "mechanisms": ("dual",), "seeds": 1, "device": "cpu", **options})


def saved(plan, arm, path, seed=0):
    """Weights of an arm that was not trained, except that its gate is open."""
    net, _ = plan.build(arm, seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.5)
    save_network(net.state_dict(), path, plan.describe(arm))
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def plan(pictures):
    return make_plan(settings(pictures))


@pytest.fixture(scope="session")
def weights(plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    saved(plan, plan.arms[1], path)
    return path


def table(out):
    with (out / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("index", range(3))
def test_every_arm_is_built_again(plan, tmp_path, index):
    arm = plan.arms[index]
    net = saved(plan, arm, tmp_path / "w.safetensors")
    again, description = load_network(tmp_path / "w.safetensors")
    assert (description.arm, description.classes) == (arm.name, ("left", "right"))
    images = plan.data.val.batch(torch.arange(4), seed=0, epoch=0)
    assert torch.equal(again.eval().requires_grad_(False)(images), net(images))


def test_pictures_are_prepared_as_in_validation(plan, weights, pictures, tmp_path):
    net, _ = load_network(weights)
    expected = net.eval().requires_grad_(False)(plan.data.val.batch(torch.arange(4), seed=0, epoch=0)).softmax(1)
    found = predict(weights, [pictures], tmp_path / "out", device="cpu", batch_size=3)
    rows = {row[0]: row for row in found.rows}
    assert len(rows) == 20
    for path, chances in zip(validation(pictures), expected, strict=True):
        row = rows[str(path)]
        assert row[1] == ("left", "right")[int(chances.argmax())]
        assert float(row[2]) == pytest.approx(float(chances.max()), abs=2e-6)
        assert float(row[2]) + float(row[4]) == pytest.approx(1, abs=2e-6)


def validation(folder):
    """The files of the validation split, in order."""
    data = open_data(str(folder), backbone_size=160, fixed_size=False)
    shown = data.val.pictures(torch.arange(len(data.val)))
    return [next(p for p in sorted(folder.rglob("*.png")) if same(p, picture)) for picture in shown]


def same(path, picture):
    side, crop = round(picture.shape[0] * 8 / 7), picture.shape[0]
    start = (side - crop) // 2
    image = read(path).resize((side, side), resample=2).crop((start, start, start + crop, start + crop))
    return np.array_equal(np.asarray(image), picture.numpy())


def test_weights_of_compare_and_the_command(pictures, tmp_path, capsys):
    compare(settings(pictures, epochs=2, batch_size=8, out=tmp_path / "run"))
    for arm in ("plain", "dual", "control"):
        out = tmp_path / arm
        trial = tmp_path / "run" / "trials" / f"{arm}-seed0" / "weights.safetensors"
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["predict", str(trial), str(pictures / "left"), "--out", str(out), "--device", "cpu"])
        said = capsys.readouterr().out
        assert stop.value.code == 0
        assert f"10 images in {out / 'predictions.csv'}" in said.replace("\n", "")
        rows = table(out)
        assert rows[0] == ["file", "class", "probability", "class 2", "probability 2"]
        assert len(rows) == 11


def test_grey_networks_take_any_picture(tmp_path):
    digits = open_plan(settings("cluttered-digits"))
    path = tmp_path / "w.safetensors"
    net = saved(digits, list_arms(("dual",), CLASSIFICATION)[1], path)
    pixels = digits.data.val.pictures(torch.tensor([0]))[0].numpy()
    grey = Image.fromarray(pixels)
    for name, mode in (("grey.png", "L"), ("colour.png", "RGB"), ("alpha.png", "RGBA"), ("palette.gif", "P")):
        grey.convert(mode).save(tmp_path / name)
    files = [tmp_path / name for name in ("grey.png", "colour.png", "alpha.png", "palette.gif")]
    found = predict(path, files, tmp_path / "out", device="cpu")
    chances = net(digits.data.val.batch(torch.tensor([0]), seed=0, epoch=0)).softmax(1)
    assert {tuple(row[1:3]) for row in found.rows} == {(str(int(chances.argmax())), f"{chances.max():.6f}")}
    assert len(found.columns) == 11  # five of ten classes


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """A plan of segmentation, weights of its dual arm, and the network."""
    plan = make_plan(settings("cluttered-digits", task="segmentation"))
    path = tmp_path_factory.mktemp("pixels") / "weights.safetensors"
    return plan, path, saved(plan, plan.arms[1], path)


def test_masks_have_the_size_and_the_name_of_their_picture(pixels, tmp_path):
    plan, weights, net = pixels
    index = torch.tensor([3])
    digit = Image.fromarray(plan.data.val.pictures(index)[0].numpy())
    for folder, size in (("a", (60, 60)), ("b", (91, 60)), ("c", (200, 31))):
        (tmp_path / "in" / folder).mkdir(parents=True)
        digit.resize(size).convert("RGB").save(tmp_path / "in" / folder / "1.png")
    out = tmp_path / "out"
    found = predict(weights, [tmp_path / "in"], out, device="cpu", batch_size=2)
    for folder, size in (("a", (60, 60)), ("b", (91, 60)), ("c", (200, 31))):
        mask, overlay = read(out / "masks" / folder / "1.png"), read(out / "overlays" / folder / "1.png")
        assert (mask.mode, mask.size, overlay.mode, overlay.size) == ("P", size, "RGB", size)
    mask = read(out / "masks" / "a" / "1.png")
    labels = net(plan.data.val.batch(index, seed=0, epoch=0)).argmax(1)[0]
    assert np.array_equal(np.asarray(mask), labels.numpy())
    assert mask.getpalette()[: 3 * 11] == [value for colour in palette(11)[:11] for value in colour]
    rows = table(out)
    assert rows[0][:4] == ["file", "mask", "overlay", "share of background"]
    assert [row[1] for row in rows[1:]] == [f"masks/{folder}/1.png" for folder in "abc"]
    assert all(sum(map(float, row[3:])) == pytest.approx(1, abs=1e-5) for row in rows[1:])
    legend = json.loads((out / "classes.json").read_text())
    assert legend[0] == {"index": 0, "class": "background", "colour": "#262b33"}
    assert [entry["class"] for entry in legend[1:]] == [str(digit) for digit in range(10)]
    assert found.brief[0][0] == str(tmp_path / "in" / "a" / "1.png")


def read(path):
    with Image.open(path) as image:
        image.load()
        return image


def test_an_overlay_leaves_the_background_clear(pixels, tmp_path, monkeypatch):
    plan, weights, _ = pixels
    picture = plan.data.val.pictures(torch.tensor([3]))[0].numpy()
    Image.fromarray(picture).save(tmp_path / "1.png")
    labels = (torch.arange(60) // 20).to(torch.uint8).expand(60, 60)
    monkeypatch.setattr(visattn.predict, "_labels", lambda scores, size: labels)
    predict(weights, [tmp_path / "1.png"], tmp_path / "out", device="cpu")
    assert np.array_equal(np.asarray(read(tmp_path / "out" / "masks" / "1.png")), labels)
    overlay = np.asarray(read(tmp_path / "out" / "overlays" / "1.png"))
    clear = labels.numpy() == 0
    assert np.array_equal(overlay[clear], np.repeat(picture[clear][:, None], 3, axis=1))
    assert (overlay[~clear] != picture[~clear][:, None]).any(axis=1).all()


def test_a_picture_is_squeezed_where_it_is_very_long_and_kept_in_shape_where_not(pixels):
    _, description = load_network(pixels[1])
    assert description.whole(Image.new("RGB", (90, 120))).shape == (1, 80, 60)
    assert description.whole(Image.new("L", (3000, 30))).shape == (1, 60, 240)


@pytest.mark.parametrize("index", [0, 2])
def test_the_other_arms_of_segmentation_are_built_again(pixels, tmp_path, index):
    plan = pixels[0]
    net = saved(plan, plan.arms[index], tmp_path / "w.safetensors")
    again, _ = load_network(tmp_path / "w.safetensors")
    images = plan.data.val.batch(torch.arange(2), seed=0, epoch=0)
    assert torch.equal(again.eval().requires_grad_(False)(images), net(images))


def test_unreadable_pictures_are_named_and_the_others_done(weights, pictures, tmp_path, capsys):
    folder = tmp_path / "some"
    folder.mkdir()
    whole = (pictures / "left" / "1.png").read_bytes()
    (folder / "a.png").write_bytes(whole)
    (folder / "b.png").write_bytes(whole[:-40])
    (folder / "c.jpg").write_text("<svg/>")
    (folder / "d.png").write_bytes(whole)
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(weights), str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert stop.value.code == 1
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert lines[0].startswith(f"visattn: cannot read {folder / 'b.png'}: ")
    assert lines[1:] == [
        f"visattn: cannot read {folder / 'c.jpg'}: not an image",
        "visattn: 2 of 4 images could not be read.",
    ]
    assert [row[0] for row in table(tmp_path / "out")[1:]] == [str(folder / "a.png"), str(folder / "d.png")]


def test_files_and_folders_none_twice(pictures, tmp_path):
    left = pictures / "left"
    assert len(find_images([left / "1.png", pictures, left, left / ".." / "left" / "2.png"], tmp_path)) == 20
    assert len(find_images([pictures], left)) == 10  # results are no input


def test_names_of_masks_never_meet(tmp_path):
    files = [tmp_path / name for name in ("a/1.jpg", "b/1.jpg", "a/1.png", "a/1.JPG", "a/1.jpg.png", "a/.x/1.png")]
    names = _names(files)
    assert names[:3] == ["a/1.png", "b/1.png", "a/1.png.png"]
    assert len({name.casefold() for name in names}) == 6
    assert _names([tmp_path / "one.tif"]) == ["one.png"]


def test_labels_at_another_size_are_those_of_the_resized_scores():
    scores = torch.randn(5, 7, 11)
    large = torch.nn.functional.interpolate(scores[None], size=(23, 31), mode="bilinear", align_corners=True)
    assert torch.equal(_labels(scores, (23, 31)), large[0].argmax(0).to(torch.uint8))


@pytest.fixture
def refused(weights, pictures, tmp_path, capsys):
    """Run the command; returns its line."""

    def run(file=weights, images=pictures, out=tmp_path / "out", *options):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            main(["predict", str(file), str(images), "--out", str(out), "--device", "cpu", *options])
        printed = capsys.readouterr()
        assert (stop.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
        assert sorted(tmp_path.rglob("*")) == before
        return printed.err

    return run


def test_files_that_hold_no_weights(refused, weights, tmp_path):
    assert "nowhere: no such file." in refused(tmp_path / "nowhere")
    assert f"{tmp_path}: a folder. Give a file such as weights.safetensors." in refused(tmp_path)
    whole = weights.read_bytes()
    for content in (
        b"",
        b"something else",
        whole[:-100],
        whole[:100],
        struct.pack("<Q", 2**63) + whole[8:],
        struct.pack("<Q", 10**9) + whole[8:],
        struct.pack("<Q", 8) + b"[" * 8,
    ):
        (tmp_path / "bad").write_bytes(content)
        assert f"visattn: {tmp_path / 'bad'} is no whole safetensors file: " in refused(tmp_path / "bad")


def change(description, **entries):
    content = json.loads(description)
    content.update(entries)
    return json.dumps({key: value for key, value in content.items() if value is not ...})


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ({"format": 2}, "its description has format 2, this visattn reads up to 1: update visattn."),
        ({"format": "x"}, "its description is not of visattn."),
        ({"task": "detection"}, 'its description has task "detection", which no network has.'),
        ({"output_stride": 8}, "its description has output_stride 8, which no network has."),
        ({"task": "segmentation"}, "its description has output_stride null, which no network has."),
        ({"arm": "duel"}, 'its description has arm "duel", which no network has.'),
        ({"arm": 3}, "its description has arm 3, which no network has."),
        ({"backbone": "resnet81"}, "has no model 'resnet81': install another timm."),
        ({"backbone": "hf-hub:someone/something"}, "has no model 'hf-hub:someone/something': install another timm."),
        ({"at": ["layer9"]}, "its network cannot be built: insert: at='layer9' matches no place."),
        ({"at": []}, "its description has at [], which no network has."),
        ({"classes": "left"}, 'its description has classes "left", which no network has.'),
        ({"classes": ["left"]}, 'its description has classes ["left"], which no network has.'),
        ({"image_size": [10**9, 10**9]}, "its description has image_size [1000000000, 1000000000], which no network"),
        ({"image_size": [64]}, "its description has image_size [64], which no network has."),
        ({"side": 3}, "its description has side 3, which no network has."),
        ({"channels": True}, "its description has channels true, which no network has."),
        ({"mean": [0.5]}, "its description has mean [0.5], which no network has."),
        ({"std": [0.0, 1.0, 1.0]}, "its description has std [0.0, 1.0, 1.0], which no network has."),
        ({"std": ...}, "its description has std null, which no network has."),
        ({"control": [3]}, "its description has control [3], which no network has."),
    ],
)
def test_descriptions_that_fit_no_network(weights, tmp_path, entries, line):
    with safe_open(weights, framework="pt") as file:
        text = change(file.metadata()["visattn"], **entries)
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors", {"visattn": text})
    with pytest.raises(UserError) as error:
        load_network(tmp_path / "w.safetensors")
    assert str(error.value).startswith(f"{tmp_path / 'w.safetensors'} cannot be used: ")
    assert line in str(error.value)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "3", "null"])
def test_descriptions_that_are_none(text):
    with pytest.raises(ValueError, match="its description is n"):
        Description.parse(text)


def test_weights_without_or_beside_their_description(weights, refused, tmp_path):
    tensors = load_file(weights)
    bare = tmp_path / "bare.safetensors"
    save_file(tensors, bare)
    line = refused(bare)
    assert "does not say which network it is for. Give weights of visattn train or of visattn compare." in line

    _, description = load_network(weights)
    name = next(name for name in tensors if name.endswith("weight"))
    save_network({**tensors, name: torch.zeros(7)}, bare, description)
    assert (
        f"does not have the weights of its network: Error(s) in loading state_dict for ByobNet: size mismatch for {name}"
        in refused(bare)
    )
    tensors.pop(name)
    save_network(tensors, bare, description)
    assert f'Missing key(s) in state_dict: "{name}"' in refused(bare)


def test_images_that_are_none(refused, tmp_path, weights):
    assert "nowhere: no such file or folder." in refused(images=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert f"visattn: no images in {tmp_path / 'empty'}." in refused(images=tmp_path / "empty")


def test_folders_that_are_not_written_to(refused, tmp_path, weights, pictures):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert "out: not empty and without predictions.csv of visattn predict. Use another --out." in refused()
    assert "thesis.tex: a file. Give a folder." in refused(out=tmp_path / "out" / "thesis.tex")
    for _ in range(2):  # a second time too
        predict(weights, [pictures / "left"], tmp_path / "again", device="cpu")


def test_other_settings(refused, pictures, tmp_path, weights):
    line = refused(weights, pictures, tmp_path / "out", "--batch-size", "0")
    assert line == "visattn: --batch-size must be 1 or more, got 0.\n"
    line = refused(weights, pictures, tmp_path / "out", "--device", "tpu")
    assert "unknown device 'tpu'. Devices here: cpu" in line


def test_a_description_of_a_network_larger_than_its_file(weights, tmp_path):
    with safe_open(weights, framework="pt") as file:
        described = json.loads(file.metadata()["visattn"])
    tensors = load_file(weights)
    for change in ({"arm": "control", "control": [10**12]}, {"backbone": "vit_7b_patch16_dinov3"}):
        save_file(tensors, tmp_path / "a.safetensors", {"visattn": json.dumps(described | change)})
        with pytest.raises(UserError, match="its description is of a network larger than the file"):
            load_network(tmp_path / "a.safetensors")


def test_weights_that_are_no_numbers(weights, tmp_path):
    with safe_open(weights, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(weights)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].flatten()[0] = torch.nan
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with pytest.raises(UserError, match=rf"has infinite or NaN weights \(1 tensors, the first {name}\)"):
        load_network(tmp_path / "a.safetensors")


def test_images_that_all_lie_where_results_go(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="all 1 images lie in it, where results go"):
        find_images([tmp_path], tmp_path)


def test_masks_of_a_network_that_takes_multiples_of_32_alone(tmp_path):
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            if any(length % 32 for length in x.shape[2:]):
                raise RuntimeError("The size of tensor a (19) must match the size of tensor b (20)")
            return self.conv(x)

    net = Picky()
    images = torch.rand(2, 3, 70, 33)
    description = Description(
        "segmentation", "hrnet_w18", 8, "plain", ("head",), (), ("a", "b"), (64, 64), 73, 3, (0.5,) * 3, (0.5,) * 3
    )
    masks = visattn.predict._Masks(net, description, [tmp_path / "a.png"], tmp_path)
    assert masks._logits(images).shape == (2, 2, 64, 32)


def test_a_folder_that_cannot_be_made(weights, pictures, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file/out: cannot write there \(Not a directory\)"):
        predict(weights, [pictures], tmp_path / "file" / "out", device="cpu")


def test_weights_that_cannot_be_written(plan, tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*gone/w\.safetensors"):
        saved(plan, plan.arms[0], tmp_path / "gone" / "w.safetensors")
