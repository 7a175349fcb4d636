"""Folders of images with masks: what is read, what is paired, and what each bad file is told."""

import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from visattn.data import open_data, pictures
from visattn.errors import UserError

SIZE = {"backbone_size": 224, "fixed_size": False, "task": "segmentation"}


def paint(part, name, *, size=(41, 37), mode="P", labels=(0, 1, 2)):
    """A picture whose red channel says the class, so that masks can be checked against it; returns the classes."""
    classes = np.full(size[::-1], labels[0], dtype=np.uint8)
    classes[: size[1] // 2, size[0] // 3 :] = labels[1]
    classes[size[1] // 2 :, : size[0] // 2] = labels[-1]
    picture = np.zeros((*classes.shape, 3), np.uint8)
    picture[..., 0] = 50 * classes
    for folder in ("images", "masks"):
        (part / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(part / "images" / f"{name}.png")
    mask = Image.fromarray(classes)
    if mode == "P":
        mask.putpalette([value for colour in range(256) for value in (255 - colour, colour, 7)])
    mask.save(part / "masks" / f"{name}.png")
    return classes


@pytest.fixture
def folder(tmp_path):
    for i in range(10):
        paint(tmp_path / "scenes", f"{i}", mode="PL"[i % 2])
    return tmp_path / "scenes"


def refusal(folder, **options):
    with pytest.raises(UserError) as caught:
        open_data(str(folder), **SIZE, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_one_folder_is_split_by_the_seed(folder):
    data = open_data(str(folder), **SIZE)
    assert (len(data.train), len(data.val), data.task) == (8, 2, "segmentation")
    assert data.classes == ("0", "1", "2")
    assert data.image_size == (64, 64)
    assert data.fingerprint == open_data(str(folder), **SIZE).fingerprint


def test_train_and_val_are_taken_as_they_are(tmp_path):
    for half, count in (("train", 3), ("val", 2)):
        for i in range(count):
            paint(tmp_path / half, f"{i}")
    data = open_data(str(tmp_path), **SIZE)
    assert (len(data.train), len(data.val)) == (3, 2)


def test_classes_have_the_names_of_the_file(folder):
    unnamed = open_data(str(folder), **SIZE)
    (folder / "classes.txt").write_text("sky\nroad\n\ncar\nbus\n")
    named = open_data(str(folder), **SIZE)
    assert named.classes == ("sky", "road", "car", "bus")
    assert named.fingerprint != unnamed.fingerprint


@pytest.mark.parametrize("kept", [True, False])
def test_masks_are_cropped_and_mirrored_with_their_images(folder, monkeypatch, kept):
    if not kept:
        monkeypatch.setattr(pictures, "MEMORY", 0)
    train = open_data(str(folder), **SIZE).train
    assert (train.kept is not None) == kept
    indices = torch.arange(8)
    where = {"seed": 1, "epoch": 2}
    images, masks = train.batch(indices, **where), train.targets(indices, **where)
    assert (masks.shape, masks.dtype) == ((8, 64, 64), torch.int64)
    assert masks.unique().tolist() == [0, 1, 2]
    red = (images[:, 0] * 0.229 + 0.485) * 255 / 50  # the class again, blurred where two meet
    assert ((red - masks).abs() < 0.05).float().mean() > 0.9
    assert not torch.equal(masks, train.targets(indices, seed=1, epoch=3))
    assert torch.equal(masks[3:4], train.targets(indices[3:4], **where))  # whatever batch it is in


def test_ignored_pixels_stay_ignored_and_are_no_class(tmp_path):
    for i in range(5):
        paint(tmp_path, f"{i}", labels=(0, 1, 255))
    data = open_data(str(tmp_path), **SIZE)
    assert data.classes == ("0", "1")
    assert data.val.targets(torch.arange(1), seed=0, epoch=0).unique().tolist() == [0, 1, 255]


def test_masks_of_one_bit_hold_classes_0_and_1(tmp_path):
    for i in range(2):
        classes = paint(tmp_path, f"{i}", labels=(0, 1, 0))
        Image.fromarray(classes.astype(bool)).save(tmp_path / "masks" / f"{i}.png")
    assert open_data(str(tmp_path), **SIZE).classes == ("0", "1")


def test_a_mask_of_another_size(folder):
    Image.new("L", (41, 36)).save(folder / "masks" / "4.png")
    assert (f"mask {folder / 'masks' / '4.png'} is 41 x 36, its image 41 x 37. Make them the same size.") in refusal(
        folder
    )


def test_a_class_without_a_name(folder):
    (folder / "classes.txt").write_text("sky\nroad\ncar\n")
    paint(folder, "4", labels=(0, 1, 9))
    assert (
        f"mask {folder / 'masks' / '4.png'} has class 9, but classes.txt names 3, 0 to 2. Name it there, or give those "
        "pixels 255 to ignore them."
    ) in refusal(folder)


def test_an_image_without_a_mask(folder):
    path = folder / "masks" / "4.png"
    path.unlink()
    assert f"image {folder / 'images' / '4.png'} has no mask. Add {path} or remove the image." in refusal(folder)


def test_a_mask_without_an_image(folder):
    (folder / "images" / "4.png").unlink()
    assert (
        f"mask {folder / 'masks' / '4.png'} has no image. Add it to {folder / 'images'} by the same name or remove the "
        "mask."
    ) in refusal(folder)


def test_halves_inside_images_are_not_mixed(folder):
    for kind in ("images", "masks"):
        for half in ("train", "val"):
            (folder / kind / half).mkdir()
    assert "train/ and val/ inside" in (said := refusal(folder))
    assert said.endswith("/train/images, " + f"{folder}/train/masks and so on.")


def test_a_mask_of_colours(folder):
    Image.new("RGB", (41, 37)).save(folder / "masks" / "4.png")
    assert (
        f"mask {folder / 'masks' / '4.png'} holds RGB pixels, not one class number of 8 bits each. Save it as an "
        "indexed or grey PNG whose values are the classes, 255 to ignore."
    ) in refusal(folder)


def test_a_mask_with_loss(folder):
    (folder / "masks" / "4.png").rename(folder / "masks" / "4.jpg")
    assert f"mask {folder / 'masks' / '4.jpg'} is compressed with loss. Save the class numbers as PNG." in refusal(
        folder
    )


def test_unreadable_masks_are_named_or_skipped_and_counted(folder):
    (folder / "masks" / "4.png").write_bytes(b"nothing")
    assert (
        f"unreadable image {folder / 'images' / '4.png'}: its mask {folder / 'masks' / '4.png'}: not an image. Mend or "
        "remove it, or add --skip-unreadable to go on without."
    ) in refusal(folder)
    data = open_data(str(folder), **SIZE, skip_unreadable=True)
    assert (data.unreadable, len(data.train) + len(data.val)) == (1, 9)


def test_two_images_of_one_name(folder):
    Image.new("RGB", (41, 37)).save(folder / "images" / "4.jpg")
    assert "4.jpg and" in (line := refusal(folder))
    assert "4.png have one name. Remove or rename one of them." in line


def test_a_folder_without_masks(tmp_path):
    (tmp_path / "images").mkdir()
    assert (
        f"no images/ and masks/ in {tmp_path}. Expected {tmp_path}/images/<name>.jpg and {tmp_path}/masks/<name>.png, "
        "or both in train/ and in val/."
    ) in refusal(tmp_path)
    (tmp_path / "masks").mkdir()
    assert f"no images in {tmp_path / 'images'}." in refusal(tmp_path)


def test_one_image_or_one_class_is_not_enough(tmp_path):
    paint(tmp_path, "0", labels=(0, 0, 0))
    assert "one image only; two are needed, one to train on and one to measure on." in refusal(tmp_path)
    paint(tmp_path, "1", labels=(0, 255, 0))
    assert "one class only in the masks. Two or more are needed." in refusal(tmp_path)


def test_nothing_readable_is_left(tmp_path):
    for i in range(2):
        paint(tmp_path, f"{i}")
    (tmp_path / "masks" / "0.png").write_bytes(b"nothing")
    assert "no readable image is left to train on, or none to measure on." in refusal(tmp_path, skip_unreadable=True)


@pytest.mark.parametrize(
    ("content", "rule"),
    [(b"sky", "must name 2 to 255 classes, one on a line, got 1."), (b"\xff\xfe", "is not readable as text. Write a")],
)
def test_a_file_of_names_that_cannot_be_used(folder, content, rule):
    (folder / "classes.txt").write_bytes(content)
    assert re.search(rf"classes\.txt {re.escape(rule)}", refusal(folder))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nowhere", "no such path. Segmentation takes a folder with images/ and masks/, or 'cluttered-digits'."),
        ("torch/cifar10", "no such path. Segmentation takes a folder with images/ and masks/, or 'cluttered-digits'."),
    ],
)
def test_what_is_no_folder(name, line):
    assert line in refusal(name)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "file: a file. Give a folder of images/ and masks/." in refusal(tmp_path / "file")


def grey_png(path, values, bits):
    """A grey PNG of 2 or 4 bits, which PIL itself does not write."""
    rows = b""
    for row in values:
        line = row.reshape(-1, 8 // bits)
        weights = 1 << np.arange(8 - bits, -1, -bits)
        rows += b"\0" + (line * weights).sum(1).astype(np.uint8).tobytes()
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_masks_of_few_bits_keep_their_numbers(folder, bits):
    paint(folder, "3", size=(48, 48), labels=(0, 1, 3))
    before = open_data(str(folder), **SIZE)
    classes = np.asarray(Image.open(folder / "masks" / "3.png"))
    grey_png(folder / "masks" / "3.png", classes, bits)
    data = open_data(str(folder), **SIZE)
    assert data.classes == ("0", "1", "2", "3")
    for old, new in ((before.train, data.train), (before.val, data.val)):
        everything = torch.arange(len(old))
        assert torch.equal(
            old.targets(everything, seed=0, epoch=0),
            new.targets(everything, seed=0, epoch=0),
        )


@pytest.mark.parametrize("drawn_on", ["as it is seen", "as it lies in the file"])
def test_an_image_that_exif_turns_is_paired_upright(folder, drawn_on):
    plain = open_data(str(folder), **SIZE)
    for name in map(str, range(10)):
        path = folder / "images" / f"{name}.png"
        picture, exif = Image.open(path).transpose(Image.Transpose.ROTATE_90), Image.Exif()
        exif[0x0112] = 6
        picture.save(path, exif=exif)
        mask = Image.open(folder / "masks" / f"{name}.png")
        mask.load()
        if drawn_on != "as it is seen":
            mask.transpose(Image.Transpose.ROTATE_90).save(folder / "masks" / f"{name}.png")
    turned = open_data(str(folder), **SIZE)
    for old, new in ((plain.train, turned.train), (plain.val, turned.val)):
        everything, where = torch.arange(len(old)), {"seed": 0, "epoch": 0}
        assert torch.equal(old.batch(everything, **where), new.batch(everything, **where))
        assert torch.equal(old.targets(everything, **where), new.targets(everything, **where))


def test_an_image_that_exif_turns_within_its_size_is_refused(folder):
    path, exif = folder / "images" / "4.png", Image.Exif()
    exif[0x0112] = 3
    Image.open(path).save(path, exif=exif)
    message = refusal(folder)
    assert f"unreadable image {path}: it is to be turned (EXIF orientation 3), and nothing tells" in message


def test_masks_that_are_ignored_as_a_whole(folder):
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.full((37, 41), 255, np.uint8)).save(path)
    assert "the masks of all 8 images to train on are ignored as a whole (class 255)" in refusal(folder)
