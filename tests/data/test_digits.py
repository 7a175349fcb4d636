import numpy as np
import pytest
import torch

from visattn.data import cluttered_digits
from visattn.data.digits import INK, draw


@pytest.fixture(scope="module")
def data():
    return cluttered_digits(train=200, val=100)


def test_default_is_four_thousand_and_one_thousand_balanced_digits():
    data = cluttered_digits()
    assert (len(data.train.labels), len(data.val.labels)) == (4000, 1000)
    assert data.train.labels.bincount().tolist() == [400] * 10
    assert data.val.labels.bincount().tolist() == [100] * 10


def test_no_source_digit_is_in_both_splits():
    data = cluttered_digits()
    train = {digit.tobytes() for digit in data.train.digits}
    val = {digit.tobytes() for digit in data.val.digits}
    assert not train & val


def test_image_holds_the_whole_digit_brightened_by_clutter_only():
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 256, size=(5, 28, 28), dtype=np.uint8)
    images, _ = draw(digits, rng)
    assert images.shape == (5, 60, 60)
    for image, digit in zip(images, digits, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(image, (28, 28)).reshape(-1, 28, 28)
        # clutter adds light, and covers at most 4 * 64 of the 784 pixels
        there = (windows >= digit).all(axis=(1, 2)) & ((windows == digit).mean(axis=(1, 2)) > 0.6)
        assert there.sum() == 1


def test_clutter_is_there_and_sums_are_clipped_not_wrapped():
    images, _ = draw(np.full((6, 28, 28), 255, dtype=np.uint8), np.random.default_rng(1))
    assert set(np.unique(images)) == {0, 255}
    assert (images.reshape(6, -1) > 0).sum(axis=1).max() > 28 * 28


def test_training_images_change_with_seed_and_epoch_alone(data):
    indices = torch.tensor([7, 3, 150])
    first = data.train.batch(indices, seed=1, epoch=2)
    data.train.batch(indices, seed=1, epoch=3)
    assert torch.equal(first, data.train.batch(indices, seed=1, epoch=2))
    assert torch.equal(first[1:2], data.train.batch(indices[1:2], seed=1, epoch=2))
    assert not torch.equal(first, data.train.batch(indices, seed=1, epoch=3))
    assert not torch.equal(first, data.train.batch(indices, seed=2, epoch=2))


def test_validation_images_are_fixed(data):
    indices = torch.tensor([0, 99])
    assert torch.equal(data.val.batch(indices, seed=0, epoch=0), data.val.batch(indices, seed=5, epoch=9))
    assert data.val.pictures(indices).shape == (2, 60, 60)


def test_batches_are_normalised():
    data = cluttered_digits()
    batch = data.train.batch(torch.arange(4000), seed=0, epoch=0)
    assert batch.shape == (4000, 1, 60, 60)
    assert abs(batch.mean().item()) < 0.05
    assert abs(batch.std().item() - 1) < 0.05


def test_another_seed_splits_otherwise():
    one, two = cluttered_digits(0, train=200, val=100), cluttered_digits(1, train=200, val=100)
    assert not np.array_equal(one.train.digits, two.train.digits)
    assert one.fingerprint != two.fingerprint


def test_more_digits_than_there_are():
    with pytest.raises(ValueError, match=r"at most 5000 together, got train=4000, val=2000"):
        cluttered_digits(train=4000, val=2000)


@pytest.fixture(scope="module")
def masked():
    return cluttered_digits(train=200, val=100, task="segmentation")


def test_masks_name_background_and_ten_digits(masked):
    assert masked.task == "segmentation"
    assert masked.classes == ("background", *"0123456789")
    masks = masked.val.targets(torch.arange(100), seed=0, epoch=0)
    assert (masks.shape, masks.dtype) == ((100, 60, 60), torch.int64)
    assert masks.unique().tolist() == list(range(11))
    own = 1 + masked.val.labels
    assert all((mask == label).any() for mask, label in zip(masks, own))  # what an image is listed by is in it


def test_pixels_are_the_digits_where_it_has_ink_and_clutter_is_background():
    digits = np.zeros((3, 28, 28), dtype=np.uint8)
    digits[:, 4:20, 10:13] = 255  # a bar of 48 pixels, with a rim too faint to count
    digits[:, 4:20, 13] = INK - 1
    images, owner = draw(digits, np.random.default_rng(0))
    for number, (image, mine) in enumerate(zip(images, owner)):
        assert set(np.unique(mine)) == {-1, number}
        assert (mine == number).sum() == 48
        assert (image[mine == number] == 255).all()
        rows, columns = np.nonzero(mine == number)
        assert (np.ptp(rows), np.ptp(columns)) == (15, 2)
    assert (images[owner < 0] == 255).any()  # clutter as bright as the digit


def test_where_two_digits_cross_the_one_with_more_ink_has_the_pixel(monkeypatch):
    monkeypatch.setattr("visattn.data.digits.TRIES", 1)  # as near as chance has them
    digits = np.stack([np.full((28, 28), 100, dtype=np.uint8), np.full((28, 28), 200, dtype=np.uint8)])
    images, owner = draw(digits, np.random.default_rng(0), pair=True)
    for image, mine in zip(images, owner):
        assert (mine == 1).sum() == 28 * 28  # whole, whether drawn first or last
        assert 0 < (mine == 0).sum() < 28 * 28
        assert image[mine == 0].min() >= 100


def test_two_digits_are_mostly_apart():
    _, owner = draw(np.full((200, 28, 28), 255, dtype=np.uint8), np.random.default_rng(0), pair=True)
    shares = (owner >= 0).mean(axis=(1, 2)) * 60 * 60 / (2 * 28 * 28)
    assert shares.mean() > 0.85


def test_masks_follow_seed_and_epoch_with_their_images(masked):
    indices = torch.tensor([7, 3, 150])
    images, masks = (getattr(masked.train, name)(indices, seed=1, epoch=2) for name in ("batch", "targets"))
    assert images[masks[:, None] > 0].min() > images.min()  # where a digit is, there is ink
    assert not torch.equal(masks, masked.train.targets(indices, seed=1, epoch=3))
    assert torch.equal(masks[1:2], masked.train.targets(indices[1:2], seed=1, epoch=2))
    fixed = masked.val.targets(torch.tensor([0]), seed=0, epoch=0)
    assert torch.equal(fixed, masked.val.targets(torch.tensor([0]), seed=4, epoch=2))


def test_classification_targets_are_the_labels(data):
    assert torch.equal(data.train.targets(torch.tensor([5, 9]), seed=1, epoch=1), data.train.labels[[5, 9]])
