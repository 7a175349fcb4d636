import random

import numpy as np
import pytest
import torch
from PIL import Image

from visattn.data import open_data, pictures
from visattn.data.pictures import decode, open_picture
from visattn.errors import UserError

SIZE = {"backbone_size": 224, "fixed_size": False}


def paint(path, colour, size=(41, 37)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, colour)
    image.putpixel((random.Random(str(path)).randrange(size[0]), 5), (1, 2, 3))
    image.save(path)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("cat", "red"), ("dog", "blue"), ("eel", "green")):
        for i in range(10):
            paint(tmp_path / "pets" / name / f"{i}.png", colour)
    return tmp_path / "pets"


def test_one_folder_is_split_in_every_class(folder):
    data = open_data(str(folder), **SIZE)
    assert data.classes == ("cat", "dog", "eel")
    assert data.train.labels.bincount().tolist() == [8, 8, 8]
    assert data.val.labels.bincount().tolist() == [2, 2, 2]
    assert data.image_size == (64, 64)  # the shorter side, 37, rounded up to a multiple of 32
    assert data.fingerprint == open_data(str(folder), **SIZE).fingerprint


def test_train_and_val_folders_are_taken_as_they_are(tmp_path):
    for half, count in (("train", 3), ("val", 2)):
        for name in ("a", "b"):
            for i in range(count):
                paint(tmp_path / half / name / f"{i}.png", "red")
    data = open_data(str(tmp_path), **SIZE)
    assert (len(data.train.labels), len(data.val.labels)) == (6, 4)


def test_small_images_are_not_enlarged_unless_the_backbone_needs_it(folder):
    assert open_data(str(folder), backbone_size=224, fixed_size=True).image_size == (224, 224)
    assert open_data(str(folder), backbone_size=32, fixed_size=False).image_size == (32, 32)


def test_augmentation_depends_on_seed_epoch_and_index_alone(folder):
    train = open_data(str(folder), **SIZE).train
    indices = torch.tensor([4, 20, 9])
    first = train.batch(indices, seed=1, epoch=2)
    assert first.shape == (3, 3, 64, 64)
    assert torch.equal(first[2:], train.batch(indices[2:], seed=1, epoch=2))
    assert not torch.equal(first, train.batch(indices, seed=1, epoch=3))


def test_validation_images_are_fixed(folder):
    val = open_data(str(folder), **SIZE).val
    indices = torch.tensor([0, 5])
    assert torch.equal(val.batch(indices, seed=0, epoch=0), val.batch(indices, seed=3, epoch=4))
    assert val.pictures(indices).shape == (2, 64, 64, 3)
    assert val.pictures(indices).dtype == torch.uint8


def test_images_read_anew_are_those_kept_in_memory(folder, monkeypatch):
    kept = open_data(str(folder), **SIZE).train.batch(torch.arange(6), seed=0, epoch=1)
    monkeypatch.setattr(pictures, "MEMORY", 0)
    anew = open_data(str(folder), **SIZE).train
    assert anew.kept is None
    assert torch.equal(anew.batch(torch.arange(6), seed=0, epoch=1), kept)


def test_unreadable_images_are_named_or_skipped_and_counted(folder):
    (folder / "cat" / "3.png").write_bytes(b"no picture")
    whole = (folder / "dog" / "4.png").read_bytes()
    (folder / "dog" / "4.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"unreadable image .*(3|4)\.png \(and 1 more\): .*--skip-unreadable"):
        open_data(str(folder), **SIZE)
    data = open_data(str(folder), **SIZE, skip_unreadable=True)
    assert data.unreadable == 2
    assert len(data.train.labels) + len(data.val.labels) == 28


def test_an_image_beyond_the_limit_is_refused_before_it_is_decoded(folder, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    with pytest.raises(UserError, match="41 x 37 pixels are more than the limit of 1,000"):
        open_data(str(folder), **SIZE)


def test_a_pickle_with_the_name_of_an_image_is_not_run(folder):
    (folder / "cat" / "0.png").write_bytes(b"cos\nsystem\n(S'touch /nowhere'\ntR.")
    with pytest.raises(UserError, match=r"0\.png: not an image"):
        open_data(str(folder), **SIZE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such path"),
        (lambda p: p.write_text("x"), "a file. Give a folder"),
        (lambda p: p.mkdir(), "no images in class folders"),
        (lambda p: paint(p / "a.png", "red"), "no images in class folders"),
        (lambda p: [paint(p / "a" / f"{i}.png", "red") for i in range(3)], "one class only, 'a'"),
        (
            lambda p: [paint(p / name / f"{i}.png", "red") for name, n in (("a", 3), ("b", 1)) for i in range(n)],
            "class 'b' has one image only",
        ),
        (
            lambda p: [paint(p / name / f"{i}.png", "red") for name in ("images", "masks") for i in range(2)],
            "images/ and masks/ are for segmentation. Give --task",
        ),
        (
            lambda p: (
                [paint(p / half / name / "0.png", "red") for half in ("train", "val") for name in ("a", "b")]
                + [paint(p / "val" / "c" / "0.png", "red")]
            ),
            "val/ has classes that train/ lacks: c",
        ),
    ],
)
def test_what_is_no_data_set(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        open_data(str(tmp_path / "data"), **SIZE)


def test_a_timm_name_passes_through(monkeypatch):
    import timm.data

    class Items:
        classes = ("left", "right")

        def __len__(self):
            return 6

        def __getitem__(self, index):
            if index >= 6:
                raise IndexError
            return Image.new("RGB", (40, 36), ("red", "blue")[index % 2]), index % 2

    asked = []
    monkeypatch.setattr(timm.data, "create_dataset", lambda name, **o: asked.append((name, o["split"])) or Items())
    data = open_data("hfds/some/set", **SIZE)
    assert asked == [("hfds/some/set", "train"), ("hfds/some/set", "validation")]
    assert data.classes == ("left", "right")
    assert data.train.batch(torch.tensor([1]), seed=0, epoch=0).shape == (1, 3, 64, 64)


def test_a_download_that_fails_is_one_line(monkeypatch):
    import timm.data

    def fail(name, **options):
        raise OSError("no route\nto host")

    monkeypatch.setattr(timm.data, "create_dataset", fail)
    with pytest.raises(UserError) as caught:
        open_data("torch/cifar10", **SIZE)
    assert str(caught.value) == "--data torch/cifar10: timm.data could not open its train split: no route to host"


def test_grey_pictures_of_16_bits_are_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray((values / 256).astype(np.uint8)).save(tmp_path / "8.png")
    assert torch.equal(open_picture(tmp_path / "16.png", 64), open_picture(tmp_path / "8.png", 64))


def test_pictures_of_32_bits_are_refused(tmp_path):
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "32.tif")
    with pytest.raises(ValueError, match="its pixels have 32 bits, and nothing tells which value is white"):
        decode(tmp_path / "32.tif")
